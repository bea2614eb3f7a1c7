"""Energies and forces against LAMMPS, sums by hand, finite differences, and themselves in batches."""

import functools
import itertools

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lammps_oracle import MW, SILICON

from freeflow import load
from freeflow.crystals import lattice_crystal, structure_crystal
from freeflow.geometry import NeighbourTable, nearest_image_table, neighbour_table
from freeflow.potentials import (
    atomic_energies_at_rest,
    bind,
    energy_and_gradient,
    force_constants,
    lattice_energy,
    lennard_jones,
    on_crystal,
    stillinger_weber,
    walks,
    wca,
)
from freeflow.potentials.core import run_once

pytestmark = pytest.mark.code("brief")


def from_words(parameters):
    return stillinger_weber(**{("lam" if k == "lambda" else k): v for k, v in parameters.items()})


LJ = {"cutoff": 2.7, "shift": True}
POTENTIALS = {
    "lj": (lennard_jones(cutoff=2.7), "lj", LJ, "lj"),
    "lj unshifted": (
        lennard_jones(1.3, 0.9, 2.1, shift=False),
        "lj",
        {"epsilon": 1.3, "sigma": 0.9, "cutoff": 2.1, "shift": False},
        "lj",
    ),
    "wca": (wca(0.7, 1.1), "lj", {"epsilon": 0.7, "sigma": 1.1, "cutoff": 2 ** (1 / 6) * 1.1, "shift": True}, "lj"),
    "mw": (from_words(MW), "sw", MW, "real"),
    "silicon": (from_words(SILICON), "sw", SILICON, "metal"),
    # Exponents that are not whole, and a non-zero one of the attraction.
    "sw odd": (
        from_words(MW | {"p": 3.5, "q": 1.25, "cos_theta0": -0.2}),
        "sw",
        MW | {"p": 3.5, "q": 1.25, "cos_theta0": -0.2},
        "real",
    ),
}
DENSITIES = {"lj": 1.1, "lj unshifted": 1.2, "wca": 0.9, "mw": 0.0336, "silicon": 0.05, "sw odd": 0.0336}
LATTICES = {  # cells so small that an atom meets its own images: LAMMPS counts those, too
    "fcc": ("fcc", (2, 2, 2)),
    "bcc": ("bcc", (2, 3, 2)),
    "hcp": ("hcp", (3, 2, 2)),
    "diamond": ("diamond", (2, 1, 1)),
    "hexagonal_ice": ("hexagonal_ice", (1, 2, 1)),
    "sc": ("sc", (3, 3, 3)),
}


@functools.cache
def lattice(name, potential):
    kind, repeats = LATTICES[name]
    return lattice_crystal(kind, repeats, number_density=DENSITIES[potential])


def thermal(crystal, size, seed=0):
    """Mean-free displacements of `size` times the spacing between atoms."""
    spacing = (crystal.volume / crystal.n_atoms) ** (1 / 3)
    u = size * spacing * np.random.default_rng(seed).standard_normal((crystal.n_atoms, 3))
    return u - u.mean(axis=0)


def wide_table(crystal, potential, *displacements):
    """Neighbours enough for atoms that moved this far."""
    furthest = max(np.linalg.norm(u, axis=1).max() for u in displacements)
    return neighbour_table(crystal, 1.0001 * potential.cutoff + 2 * furthest)


# ------------------------------------------------------------------ LAMMPS


@pytest.fixture(scope="module")
def lammps():
    import lammps_oracle

    lammps_oracle.require_lammps()
    return lammps_oracle.lammps_energy_forces


def batched(potential, table, dtype="float64"):
    """Energies relative to the lattice and gradients of a stack of displacements; compiled once."""
    return jax.jit(jax.vmap(energy_and_gradient(potential, table, dtype)))


def assert_agrees_with_lammps(lammps, crystal, name):
    potential, style, params, units = POTENTIALS[name]
    displacements = [thermal(crystal, size) for size in (0.02, 0.08)]
    table = wide_table(crystal, potential, *displacements)
    energies, gradients = batched(potential, table)(jnp.asarray(displacements))
    at_rest = lattice_energy(potential, table)
    for u, relative, gradient in zip(displacements, energies, gradients, strict=True):
        energy, forces = lammps(crystal.cell, crystal.sites + u, style, params, units)
        assert relative + at_rest == pytest.approx(energy, rel=1e-9)
        np.testing.assert_allclose(-gradient, forces, atol=1e-7 * np.abs(forces).max())


@pytest.mark.code("users")
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("lj", "fcc"),
        ("lj", "hcp"),
        ("lj unshifted", "bcc"),
        ("lj unshifted", "fcc"),
        ("wca", "sc"),
        pytest.param("mw", "diamond", marks=pytest.mark.slow),
        ("mw", "hexagonal_ice"),
        pytest.param("silicon", "hcp", marks=pytest.mark.slow),
        pytest.param("sw odd", "diamond", marks=pytest.mark.slow),
    ],
)
def test_energies_and_forces_are_those_of_lammps(lammps, name, where):
    assert_agrees_with_lammps(lammps, lattice(where, name), name)


@pytest.mark.code("users")
@pytest.mark.parametrize(
    ("name", "atoms", "repeats"),
    [
        ("lj", ase.build.bulk("Ar", "fcc", a=1.55), (3, 3, 4)),
        ("lj unshifted", ase.build.bulk("Ar", "hcp", a=1.1, c=1.75), (3, 3, 2)),
        pytest.param("mw", ase.build.bulk("Si", "diamond", a=6.2), (3, 2, 2), marks=pytest.mark.slow),
        ("silicon", ase.build.bulk("Si", "diamond", a=5.43), (2, 3, 2)),
        # Left-handed, and no symmetry left: dense, one translation.
        (
            "silicon",
            ase.build.make_supercell(ase.build.bulk("Si", "diamond", a=5.43), [[2, 1, 0], [0, 1, 2], [3, 0, 0]]),
            (1, 1, 1),
        ),
    ],
)
def test_triclinic_cells_agree_with_lammps(lammps, name, atoms, repeats, tmp_path):
    atoms.write(tmp_path / "a.extxyz")
    crystal = structure_crystal(tmp_path / "a.extxyz", repeats)
    assert_agrees_with_lammps(lammps, crystal, name)


@pytest.mark.slow
def test_a_structure_without_symmetry_agrees_with_lammps(lammps, tmp_path):
    atoms = ase.build.bulk("Si", "diamond", a=5.43, cubic=True)
    atoms.positions += thermal(lattice("diamond", "silicon"), 0.1)[:8]
    atoms.write(tmp_path / "a.extxyz")
    crystal = structure_crystal(tmp_path / "a.extxyz", (2, 1, 1))
    assert len(crystal.site_of) == 2
    assert_agrees_with_lammps(lammps, crystal, "silicon")


# ------------------------------------------------------------------ known sums


@pytest.mark.parametrize(
    ("system", "energy", "tolerance"),
    [
        ("lj_fcc_256", -6.303226, 6e-7),  # REFERENCE: Wirnsberger et al. 2022, its state
        ("mw_cubic_64", -12.377985, 6e-7),  # 2 A epsilon [B (s/r)^4 - 1] exp(s / (r - a s))
        ("mw_hexagonal_64", -12.377985, 6e-7),
        ("silicon_diamond_64", -4.3366, 1e-4),  # 2 epsilon: the minimum, Stillinger and Weber 1985
    ],
)
def test_lattice_energy(system, energy, tolerance):
    system = load(system)
    table = neighbour_table(system.crystal, 1.0001 * system.potential.cutoff)
    per_atom = lattice_energy(system.potential, table) / system.n_atoms
    assert per_atom == pytest.approx(energy, abs=tolerance)


def all_images(crystal, u, cutoff):
    """Every bond vector within the cutoff, as (atom, vector), by counting images."""
    reach = range(-3, 4)
    positions = crystal.sites + u
    shifts = np.array(list(itertools.product(reach, reach, reach))) @ crystal.cell
    bonds = positions[None, :, None] - positions[:, None, None] + shifts[None, None]
    r = np.linalg.norm(bonds, axis=-1)
    near = (r < cutoff) & (r > 1e-9)
    return [bonds[i][near[i]] for i in range(len(positions))]


def stillinger_weber_by_hand(crystal, u, w):
    """Triplets one by one, as the papers write the potential."""
    sigma, cutoff = w["sigma"], w["a"] * w["sigma"]
    total = 0.0
    for bonds in all_images(crystal, u, cutoff):
        r = np.linalg.norm(bonds, axis=1)
        s = sigma / r
        pairs = w["A"] * (w["B"] * s ** w["p"] - s ** w["q"]) * np.exp(sigma / (r - cutoff))
        total += 0.5 * w["epsilon"] * pairs.sum()
        g = np.exp(w["gamma"] * sigma / (r - cutoff))
        for j, k in itertools.combinations(range(len(bonds)), 2):
            cosine = bonds[j] @ bonds[k] / (r[j] * r[k])
            total += w["lambda"] * w["epsilon"] * (cosine - w["cos_theta0"]) ** 2 * g[j] * g[k]
    return total


@pytest.mark.parametrize("where", ["diamond", pytest.param("hcp", marks=pytest.mark.slow)])
def test_moments_are_the_sum_over_triplets(where):
    crystal, potential = lattice(where, "mw"), POTENTIALS["mw"][0]
    u = thermal(crystal, 0.06)
    table = wide_table(crystal, potential, u)
    energy = lattice_energy(potential, table) + batched(potential, table)(jnp.asarray(u)[None])[0][0]
    assert energy == pytest.approx(stillinger_weber_by_hand(crystal, u, MW), rel=1e-11)


def test_wca_is_repulsive_and_ends_at_its_minimum():
    potential = wca(epsilon=0.7, sigma=1.1)
    r = np.array([1.0, 1.1, 1.2, 2 ** (1 / 6) * 1.1 - 1e-7, 2 ** (1 / 6) * 1.1 + 1e-7, 2.0])
    expected = np.where(r < 2 ** (1 / 6) * 1.1, 4 * 0.7 * ((1.1 / r) ** 12 - (1.1 / r) ** 6) + 0.7, 0.0)
    np.testing.assert_allclose(potential.pair(jnp.asarray(r**2)), expected, atol=1e-12)
    assert potential.cutoff == pytest.approx(2 ** (1 / 6) * 1.1)


# ------------------------------------------------------------------ nearest images

SMALL_BOXES = ["mw_cubic_8", "lj_fcc_32"]


def nearest_image_energy(crystal, u, name):
    """The papers' energy: every pair of atoms once, at its nearest image; triplets of those bonds."""
    positions, box = crystal.sites + u, np.diag(crystal.cell)
    bonds = positions[None] - positions[:, None]
    bonds -= box * np.round(bonds / box)
    r = np.linalg.norm(bonds, axis=-1) + 1e9 * np.eye(len(positions))
    total = 0.0
    for i, j in itertools.combinations(range(len(positions)), 2):
        if name == "lj_fcc_32" and r[i, j] < 2.7:
            total += 4 * (r[i, j] ** -12 - r[i, j] ** -6 - 2.7**-12 + 2.7**-6)
        if name == "mw_cubic_8" and r[i, j] < 1.8 * MW["sigma"]:
            s = MW["sigma"] / r[i, j]
            total += MW["epsilon"] * MW["A"] * (MW["B"] * s**4 - 1) * np.exp(1 / (1 / s - 1.8))
    if name == "mw_cubic_8":
        with np.errstate(over="ignore"):
            decay = 1.2 / np.where(r < 1.8 * MW["sigma"], r / MW["sigma"] - 1.8, -np.inf)
        g = np.where(r < 1.8 * MW["sigma"], np.exp(decay), 0.0)
        for i, (j, k) in itertools.product(range(8), itertools.combinations(range(8), 2)):
            cosine = bonds[i, j] @ bonds[i, k] / (r[i, j] * r[i, k])
            total += MW["lambda"] * MW["epsilon"] * (cosine + 1 / 3) ** 2 * g[i, j] * g[i, k]
    return total


@pytest.mark.parametrize("name", SMALL_BOXES)
def test_nearest_images_against_a_double_loop(name):
    system = load(name)
    table = nearest_image_table(system.crystal)
    u = np.array([thermal(system.crystal, size) for size in (0.0, 0.03, 0.15)])  # the last far beyond a crystal
    energies, gradients = batched(system.potential, table)(jnp.asarray(u))
    expected = [nearest_image_energy(system.crystal, one, name) for one in u]
    np.testing.assert_allclose(energies + lattice_energy(system.potential, table), expected, rtol=1e-11)
    assert np.isfinite(gradients).all()
    # Its target, as the system is set up, is the same thing.
    reduced = jax.jit(system.target.reduced_potential)(jnp.asarray(u[1]), system.state)
    assert reduced == pytest.approx(float(system.state.beta * energies[1]), rel=1e-12)


# ------------------------------------------------------------------ derivatives

DERIVATIVES = [
    ("lj", "hcp"),
    ("mw", "diamond"),
    pytest.param("sw odd", "hexagonal_ice", marks=pytest.mark.slow),
    ("wca", "fcc"),
]


@pytest.mark.parametrize(("name", "where"), DERIVATIVES)
def test_gradient_is_that_of_the_energy(name, where):
    crystal, potential = lattice(where, name), POTENTIALS[name][0]
    u = jnp.asarray(thermal(crystal, 0.03))
    table = wide_table(crystal, potential, u)
    energy = bind(potential, table)
    values = jax.jit(jax.vmap(energy))
    (value,), (gradient,) = batched(potential, table)(u[None])
    assert float(values(u[None])[0]) == pytest.approx(float(value), rel=1e-14)
    by_grad = jax.jit(jax.grad(lambda v: 3 * energy(2 * v)))(u / 2)
    np.testing.assert_allclose(by_grad, 6 * gradient, atol=1e-12 * np.abs(gradient).max())
    directions = np.random.default_rng(3).standard_normal((6, *u.shape))
    h = 1e-4 * float(np.abs(u).max())
    ahead, behind = np.split(values(u[None] + h * np.concatenate([directions, -directions])), 2)
    slopes = (directions * np.asarray(gradient)).sum(axis=(1, 2))
    # LJ's force jumps at the cutoff, by about 0.04 epsilon/sigma a pair.
    tolerance = 1e-5 if name.startswith("lj") else 1e-6
    np.testing.assert_allclose((ahead - behind) / (2 * h), slopes, atol=tolerance * np.linalg.norm(gradient))
    # Moving everything costs nothing.
    np.testing.assert_allclose(np.asarray(gradient).sum(axis=0), 0, atol=1e-9 * np.abs(gradient).max())


@pytest.mark.parametrize(("name", "where"), DERIVATIVES)
def test_force_constants(name, where):
    crystal, potential = lattice(where, name), POTENTIALS[name][0]
    table = neighbour_table(crystal, 1.0001 * potential.cutoff)
    n = crystal.n_atoms
    hessian = force_constants(potential, table, np.arange(n)).reshape(3 * n, 3 * n)
    scale = np.abs(hessian).max()
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12 * scale)
    np.testing.assert_allclose(hessian.reshape(3 * n, n, 3).sum(axis=1), 0, atol=1e-11 * scale)  # acoustic sum rule
    h = 1e-5 * (crystal.volume / n) ** (1 / 3)
    atom, axis = n // 2, 1
    step = jnp.zeros((n, 3)).at[atom, axis].set(h)
    ahead, behind = batched(potential, table)(jnp.stack([step, -step]))[1]
    np.testing.assert_allclose((ahead - behind).ravel() / (2 * h), hessian[:, 3 * atom + axis], atol=1e-6 * scale)


# ------------------------------------------------------------------ batches


WALKED = ["lj", "mw", pytest.param("lj_fcc_32", id="nearest images")]


@pytest.mark.parametrize("way", ["threads", "tiles, 0", "tiles, 1", "tiles, 3"])
@pytest.mark.parametrize("name", WALKED)
def test_all_ways_find_the_same(monkeypatch, name, way):
    """That of GPUs is interpreted; the last of the tiles is not full; so many slots of tiles go together."""
    if name in POTENTIALS:
        crystal, potential = lattice("fcc" if name == "lj" else "diamond", name), POTENTIALS[name][0]
        table = neighbour_table(crystal, 1.1 * potential.cutoff)
    else:
        system = load(name)
        crystal, potential, table = system.crystal, system.potential, nearest_image_table(system.crystal)
    u = jnp.stack([thermal(crystal, 0.04, seed) for seed in range(3)])
    monkeypatch.setattr(walks, "_together", lambda *_: 0)  # every pair in XLA's own loops, all atoms in one tile
    plain, atoms = batched(potential, table)(u), _booked(potential, table, u)
    if way == "threads":
        monkeypatch.setattr(walks, "walk", walks.ByThreads)
    else:
        monkeypatch.setattr(walks, "_together", lambda *_: int(way[-1]))
        monkeypatch.setattr(walks, "_WHOLE", 0)
        monkeypatch.setattr(walks, "_TILE", 3 * crystal.n_atoms // 2 - 6)
    found = batched(potential, table)(u)
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], plain[1], atol=1e-12 * float(jnp.abs(plain[1]).max()))
    single = batched(potential, table, "float32")(u.astype("float32"))
    np.testing.assert_allclose(single[0], plain[0], rtol=1e-4)
    np.testing.assert_allclose(_booked(potential, table, u), atoms, rtol=1e-11)


@pytest.mark.parametrize("name", ["lj", "mw"])
def test_layer_by_layer_is_the_same_as_in_any_order(name):
    crystal, potential = lattice("fcc" if name == "lj" else "diamond", name), POTENTIALS[name][0]
    table = neighbour_table(crystal, 1.1 * potential.cutoff)
    assert table.order is None
    u = jnp.stack([thermal(crystal, 0.04, seed) for seed in range(5)])
    plain, atoms = batched(potential, table)(u), _booked(potential, table, u)
    ordered = table._replace(order=np.random.default_rng(3).permutation(crystal.n_atoms))
    found = batched(potential, ordered)(u)
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], plain[1], atol=1e-12 * float(jnp.abs(plain[1]).max()))
    np.testing.assert_allclose(_booked(potential, ordered, u), atoms, rtol=1e-11)


def test_a_long_batch_of_few_atoms_takes_no_more_rows_than_that():
    crystal = lattice("fcc", "lj")
    way = walks.ByTiles(neighbour_table(crystal, 3.0), "float32")
    assert len(way.rows(jnp.zeros((crystal.n_atoms, 3, 10**5), "float32"))[0]) <= crystal.n_atoms + 1


def _booked(potential, table, u):
    """Energies of the atoms (n_atoms, batch)."""
    from freeflow.potentials import core

    return jax.jit(core.atomic_energies(potential, table))(jnp.moveaxis(u, 0, -1))


@pytest.mark.code("users")
def test_batches_are_the_single_results(monkeypatch):
    from freeflow.potentials import core

    crystal, potential = lattice("diamond", "mw"), POTENTIALS["mw"][0]
    table = neighbour_table(crystal, 1.2 * potential.cutoff)
    seen, kernel = [], core._kernel

    def watched(*args):
        inner = kernel(*args)

        def outer(u):
            seen.append(u.shape)
            return inner(u)

        return outer

    evaluate = energy_and_gradient(potential, table)
    monkeypatch.setattr(core, "_kernel", watched)
    u = jnp.stack([thermal(crystal, 0.04, seed) for seed in range(6)])
    single = jax.jit(evaluate)
    loop = [single(one) for one in u]
    assert seen[-1] == (16, 3, 1)
    energies, gradients = jax.vmap(evaluate)(u)
    assert seen[-1] == (16, 3, 6)  # the whole batch at once, innermost
    np.testing.assert_allclose(energies, [e for e, _ in loop], rtol=1e-13)
    np.testing.assert_allclose(gradients, [g for _, g in loop], atol=1e-12)
    # jitted, with the batch elsewhere, and nested
    jitted = jax.jit(jax.vmap(evaluate, in_axes=2, out_axes=(0, 2)))(jnp.moveaxis(u, 0, -1))
    np.testing.assert_allclose(jitted[0], energies, rtol=1e-13)
    np.testing.assert_allclose(jnp.moveaxis(jitted[1], -1, 0), gradients, atol=1e-12)
    nested = jax.jit(jax.vmap(jax.vmap(evaluate)))(u.reshape(2, 3, *u.shape[1:]))
    np.testing.assert_allclose(nested[0].reshape(6), energies, rtol=1e-13)
    np.testing.assert_allclose(nested[1].reshape(gradients.shape), gradients, atol=1e-12)
    by_grad = jax.jit(jax.vmap(jax.grad(bind(potential, table))))(u)
    np.testing.assert_allclose(by_grad, gradients, atol=1e-12)


# ------------------------------------------------------------------ single precision


# Largest error of the energy [kT], of the order of 3 N / 2 itself, and of forces relative to the largest one. Measured
# on these configurations; the bounds are three times as wide.
STRAYS = {
    "lj_fcc_256": (4.3e-4, 1.2e-6),
    "mw_cubic_64": (1.6e-4, 5.0e-7),
    "mw_hexagonal_64": (2.4e-4, 6.4e-7),
    "mw_cubic_8": (2.4e-5, 8.5e-7),
}


@pytest.mark.code("users")
@pytest.mark.parametrize(
    "name",
    [
        "lj_fcc_256",
        "mw_cubic_64",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("mw_hexagonal_64", "mw_cubic_8")),
    ],
)
def test_single_precision_strays_little(name):
    system = load(name)
    crystal, potential = system.crystal, system.potential
    u = jnp.stack([0 * thermal(crystal, 0.05), *(thermal(crystal, 0.05, seed) for seed in range(7))])
    if system.nearest_image_only:
        table = nearest_image_table(crystal)
    else:
        table = neighbour_table(crystal, 1.15 * potential.cutoff)
    double, single = (batched(potential, table, d)(u) for d in ("float64", "float32"))
    assert single[0].dtype == jnp.float64
    energy_error = float(system.state.beta) * np.abs(single[0] - double[0])
    force_error = float(jnp.abs(single[1] - double[1]).max() / jnp.abs(double[1]).max())
    assert energy_error[1:].max() < 3 * STRAYS[name][0]
    assert force_error < 3 * STRAYS[name][1]
    # At rest all atoms round alike, and their errors add up: up to a dozen units in the last place of its energy each.
    last_place = float(np.spacing(np.float32(np.abs(atomic_energies_at_rest(potential, table)).max())))
    assert energy_error[0] < 12 * crystal.n_atoms * float(system.state.beta) * last_place


@pytest.mark.slow
@pytest.mark.jax_defaults
def test_kernels_run_with_jax_as_users_have_it():
    system = load("mw_cubic_64")
    table = neighbour_table(system.crystal, 1.1 * system.potential.cutoff)
    u = thermal(system.crystal, 0.04)
    energy, gradient = jax.jit(energy_and_gradient(system.potential, table, "float32"))(jnp.asarray(u, "float32"))
    assert energy.dtype == gradient.dtype == jnp.float32
    with jax.enable_x64(True):
        exact, exact_gradient = jax.jit(energy_and_gradient(system.potential, table))(jnp.asarray(u))
    assert float(energy) == pytest.approx(float(exact), rel=1e-5)
    np.testing.assert_allclose(gradient, exact_gradient, atol=1e-4 * float(np.abs(exact_gradient).max()))


# ------------------------------------------------------------------ edges


def dimer(separation):
    """Two atoms and one bond, laid out as a table."""
    offset = np.array([[[separation, 0.0, 0.0], [1e6, 0.0, 0.0]]])
    swap = np.array([[1, 0]])
    return NeighbourTable(swap, swap, offset, 3.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", POTENTIALS)
def test_nothing_breaks_at_the_cutoff(name, dtype):
    potential = POTENTIALS[name][0]
    # Exactly at the cutoff, the next floats on both sides, and further off; one atom at a time moves.
    near = [0.0]
    for k in (1, 2, 4, 16, 1 << 10, 1 << 16, 1 << 20):
        near += [k * np.finfo(dtype).eps * potential.cutoff, -k * np.finfo(dtype).eps * potential.cutoff]
    for fraction in (1e-3, 0.9e-3, 1.1e-3, 0.01, 0.03):
        near += [fraction * potential.cutoff, -fraction * potential.cutoff]
    u = np.zeros((len(near), 2, 3))
    u[:, 1, 0] = near
    energy, gradient = batched(potential, dimer(potential.cutoff), dtype)(jnp.asarray(u))
    assert np.isfinite(energy).all()
    assert np.isfinite(gradient).all()
    outside = np.array(near) > 1e-6 * potential.cutoff
    np.testing.assert_array_equal(gradient[outside], 0)
    if name != "lj unshifted":  # continuous, apart from rounding
        np.testing.assert_allclose(energy[np.abs(near) < 1e-5 * potential.cutoff], energy[-2], atol=1e-3)
    derivative = jax.jit(jax.grad(bind(potential, dimer(potential.cutoff), dtype)))(jnp.zeros((2, 3)))
    assert np.isfinite(derivative).all()


@pytest.mark.code("users")  # where rounding leaves a dimer at rest without energy
@pytest.mark.parametrize("name", POTENTIALS)
def test_forces_of_a_dimer_are_opposite_and_right(name):
    potential, style, params, _ = POTENTIALS[name]
    r = 0.6 * potential.cutoff
    energy, gradient = jax.jit(energy_and_gradient(potential, dimer(r)))(jnp.zeros((2, 3)))
    assert energy == 0  # relative to where it stands
    h = 1e-5 * r
    if style == "lj":
        p = {"epsilon": 1.0, "sigma": 1.0} | params

        def by_hand(r):
            return 4 * p["epsilon"] * ((p["sigma"] / r) ** 12 - (p["sigma"] / r) ** 6)
    else:

        def by_hand(r):
            s = params["sigma"] / r
            two_body = params["A"] * params["epsilon"] * (params["B"] * s ** params["p"] - s ** params["q"])
            return two_body * np.exp(1 / (1 / s - params["a"]))

    slope = (by_hand(r + h) - by_hand(r - h)) / (2 * h)
    np.testing.assert_allclose(gradient, [[-slope, 0, 0], [slope, 0, 0]], rtol=1e-6, atol=1e-9 * abs(slope))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["lj", pytest.param("mw", marks=pytest.mark.slow)])
def test_padding_adds_nothing(name, dtype):
    """hcp and ice need slots that are not full; more of them change nothing."""
    potential = POTENTIALS[name][0]
    crystal = lattice("hcp" if name == "lj" else "hexagonal_ice", name)
    table = neighbour_table(crystal, 1.1 * potential.cutoff)
    n = crystal.n_atoms
    padded = NeighbourTable(
        np.concatenate([table.partner, np.tile(np.arange(n), (2, 1))]),
        np.concatenate([table.source, np.tile(np.arange(n), (2, 1))]),
        np.concatenate([table.offset, np.tile([1e3 * table.radius, 0.0, 0.0], (2, n, 1))]),
        table.radius,
    )
    u = jnp.asarray(thermal(crystal, 0.03))
    expected, found = (jax.jit(energy_and_gradient(potential, t, dtype))(u) for t in (table, padded))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-12)


def test_pairs_that_come_within_the_cutoff_count():
    """A table of the lattice at rest misses them: all pairs at their nearest images, one by one, are the check."""
    crystal = lattice_crystal("fcc", (4, 4, 4), number_density=1.28)
    potential, reach = lennard_jones(cutoff=2.5), 0.6
    rng = np.random.default_rng(4)
    u = rng.standard_normal((crystal.n_atoms, 3))
    u *= 0.5 * reach / np.linalg.norm(u, axis=1).max()

    def total(x):
        i, j = np.triu_indices(crystal.n_atoms, 1)
        box = np.diag(crystal.cell)
        d = x[i] - x[j]
        d -= box * np.round(d / box)  # the cutoff is less than half the box
        return float(np.sum(potential.pair(jnp.asarray(np.einsum("pk,pk->p", d, d)))))

    energy = on_crystal(potential, crystal).relative(reach, "float64")(jnp.asarray(u))
    assert float(energy) == pytest.approx(total(crystal.sites + u) - total(crystal.sites), rel=1e-10)


def test_options_that_a_compiler_does_not_know_are_left_out():
    options = {"xla_of_another_version": 1, "xla_backend_optimization_level": 0}
    np.testing.assert_array_equal(run_once(lambda x: x + 1, np.zeros(2), options=options), [1, 1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid"):
        run_once(lambda x: x + 1, np.zeros(2), options={"xla_backend_optimization_level": "fast"})
