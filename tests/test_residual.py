"""The residual flow: colours, Jacobians, symmetries, and that parameters go from one size to another."""

import functools
import itertools
import json
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from freeflow import load
from freeflow.bijectors import mean_free
from freeflow.crystals import lattice_crystal, structure_crystal
from freeflow.errors import InputError
from freeflow.flows import pulled_back, residual
from freeflow.flows.residual import colour_flow, sweep
from freeflow.geometry import nearest_image_table, nearest_neighbour_distance, neighbour_table
from freeflow.potentials import force_constants
from freeflow.references import gaussian_from_blocks, harmonic_blocks
from freeflow.symmetries import site_colours
from freeflow.types import Ensemble, ThermodynamicState

pytestmark = pytest.mark.code("brief")

STATE = ThermodynamicState(np.float64(1), np.float64(0))
TINY = {"n_sweeps": 2, "width": 8, "depth": 1}
SCALE = 0.1  # displacements from the cage, in units of the bond

# name: (lattice, repeats, colour distance and reach in bonds)
LATTICE_CRYSTALS = {
    "diamond": ("diamond", (1, 1, 1), 1.7),
    "fcc": ("fcc", (2, 2, 1), 1.05),
    "bcc": ("bcc", (2, 2, 2), 1.2),
    "hcp": ("hcp", (2, 2, 2), 1.05),
    "ice": ("hexagonal_ice", (1, 1, 1), 1.7),
}
NAMES = [*LATTICE_CRYSTALS, "triclinic", "triclinic pair"]


@functools.cache
def crystal_of(name):
    """Small crystals; the triclinic ones have sites of three kinds, one of them no repeats."""
    if name in LATTICE_CRYSTALS:
        lattice, repeats, _ = LATTICE_CRYSTALS[name]
        return lattice_crystal(lattice, repeats, lattice_constant=1.7)
    cell = np.array([[3.1, 0.2, 0.1], [-0.7, 3.4, 0.3], [0.5, -0.6, 3.9]])
    positions = np.array([[0.05, 0.1, 0.02], [0.55, 0.48, 0.1], [0.4, 0.1, 0.55], [0.03, 0.6, 0.6]]) @ cell
    atoms = Atoms("CuNiCuAl", positions=positions, cell=cell, pbc=True)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "triclinic.cif", atoms)
        return structure_crystal(Path(folder) / "triclinic.cif", (2, 1, 1) if name == "triclinic pair" else (1, 1, 1))


def layers_of(name):
    distance = LATTICE_CRYSTALS[name][2] if name in LATTICE_CRYSTALS else 1.1
    return sweep(crystal_of(name), distance, distance)


def bijector_on(crystal, distance, **options):
    """The chain without the removal of the mean."""
    scale = SCALE * nearest_neighbour_distance(crystal)
    return colour_flow(sweep(crystal, distance, distance), **{**TINY, **options}, scale=scale)


def noise(chain, u, scale=0.02, seed=0):
    """Parameters of the right shapes: `scale` in the last layers, which start at zero, and 0.3 in the others."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda u: chain.init(jax.random.key(0), u, STATE), u)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.normal(0, scale if "out" in jax.tree_util.keystr(path) else 0.3, leaf.shape), leaf.dtype
        ),
        shapes,
    )


def randomised(params, scale, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + jnp.asarray(scale * rng.standard_normal(p.shape), p.dtype), params)


def displacements(crystal, seed=0):
    """As large as `SCALE`, of zero mean."""
    u = np.random.default_rng(seed).standard_normal((crystal.n_atoms, 3))
    return jnp.asarray(SCALE * nearest_neighbour_distance(crystal) * (u - u.mean(axis=0)))


@functools.cache
def made(name):
    """Chain, parameters with noise, and compiled: forward, the inverse of that, and the Jacobian of forward."""
    chain = colour_flow(layers_of(name), **TINY, scale=SCALE * nearest_neighbour_distance(crystal_of(name)))

    @jax.jit
    def everything(params, u):
        y, log_det = chain.forward(params, u, STATE)
        jacobian = jax.jacfwd(lambda u: chain.forward(params, u, STATE)[0])(u)
        return (y, log_det), chain.inverse(params, y, STATE), jacobian.reshape(u.size, u.size)

    return chain, noise(chain, displacements(crystal_of(name))), everything


def mean_free_basis(n_atoms):
    """Orthonormal columns (3 n, 3 (n - 1)) that span configurations of zero mean."""
    return np.kron(np.linalg.svd(np.ones((1, n_atoms)))[2][1:].T, np.eye(3))


# ------------------------------------------------------------------------- bijector


def test_flow_starts_as_the_identity():
    chain, _, everything = made("diamond")
    u = displacements(crystal_of("diamond"))
    start = jax.jit(chain.init)(jax.random.key(0), u, STATE)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(start)) > 0.1  # hidden layers are drawn
    for y, log_det in everything(start, u)[:2]:
        np.testing.assert_allclose(y, u, rtol=0, atol=1e-13)
        assert abs(log_det) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_inverse_and_log_det(name):
    """The log det is that of the Jacobian on the mean-free subspace, in an orthonormal basis."""
    _, params, everything = made(name)
    u, q = displacements(crystal_of(name), 1), mean_free_basis(crystal_of(name).n_atoms)
    (y, log_det), (back, back_log_det), jacobian = everything(params, u)
    sign, expected = np.linalg.slogdet(q.T @ np.asarray(jacobian) @ q)
    assert sign == 1 and abs(expected) > 0.02
    assert float(log_det) == pytest.approx(expected, abs=1e-10)
    assert float(back_log_det) == pytest.approx(-expected, abs=1e-10)
    np.testing.assert_allclose(back, u, rtol=0, atol=1e-13)
    assert jnp.abs(y - u).max() > 0.1 * jnp.abs(u).max()
    assert jnp.abs(jnp.mean(y, axis=0)).max() > 1e-4  # there is a mean to remove


@pytest.mark.parametrize("name", ["diamond", "triclinic"])
def test_single_precision(name):
    """Numbers to 1e-5 of the largest displacement, log dets to 1e-5 for each coordinate."""
    _, params, everything = made(name)
    params = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
    u = displacements(crystal_of(name), 2).astype("float32")
    (y, log_det), (back, back_log_det), _ = everything(params, u)
    assert y.dtype == back.dtype == log_det.dtype == back_log_det.dtype == "float32"
    atol = 1e-5 * float(jnp.abs(u).max())
    np.testing.assert_allclose(back, u, rtol=0, atol=atol)
    np.testing.assert_allclose(back_log_det, -log_det, rtol=0, atol=1e-5 * u.size)
    (exact, exact_log_det), _, _ = everything(*jax.tree.map(lambda leaf: leaf.astype("float64"), (params, u)))
    np.testing.assert_allclose(y, exact, rtol=0, atol=atol)
    np.testing.assert_allclose(log_det, exact_log_det, rtol=0, atol=1e-5 * u.size)


@pytest.mark.parametrize("name", NAMES)
def test_a_uniform_shift_passes_through(name):
    _, params, everything = made(name)
    u, by = displacements(crystal_of(name), 3), jnp.asarray([[0.3, -2.0, 0.7]])
    (y, log_det), _, _ = everything(params, u)
    (moved, moved_log_det), (back, _), _ = everything(params, u + by)
    np.testing.assert_allclose(moved, y + by, rtol=0, atol=1e-12)
    np.testing.assert_allclose(back, u + by, rtol=0, atol=1e-12)
    assert float(moved_log_det) == pytest.approx(float(log_det), abs=1e-11)


def test_a_flow_of_mean_free_displacements_stays_among_them():
    chain, params, everything = made("bcc")
    u = displacements(crystal_of("bcc"), 3)
    restricted = mean_free(chain)
    y, log_det = jax.jit(restricted.forward)(params, u, STATE)
    (free, free_log_det), _, _ = everything(params, u)
    np.testing.assert_allclose(jnp.mean(y, axis=0), 0, atol=1e-15)
    np.testing.assert_allclose(y, free - jnp.mean(free, axis=0, keepdims=True), rtol=0, atol=1e-13)
    assert float(log_det) == pytest.approx(float(free_log_det), abs=1e-11)
    back, back_log_det = jax.jit(restricted.inverse)(params, y, STATE)
    np.testing.assert_allclose(back, u, rtol=0, atol=1e-13)
    assert float(back_log_det) == pytest.approx(-float(log_det), abs=1e-11)


def translations_of(crystal):
    """Every lattice translation as the images of all sites (n_translations, n_atoms)."""
    steps = np.indices(crystal.group).reshape(3, -1).T
    images = np.empty((len(steps), crystal.n_atoms), int)
    for k, step in enumerate(steps):
        to = np.ravel_multi_index(tuple(((steps + step) % crystal.group).T), crystal.group)
        images[k, crystal.site_of] = crystal.site_of[to]
    return images


def colours_from(layers, n_atoms):
    colours = np.empty(n_atoms, int)
    for colour, atoms in enumerate(layers.atoms):
        colours[atoms] = colour
    return colours


@pytest.mark.parametrize("name", ["fcc", "bcc", "hcp"])
def test_flow_commutes_with_translations_that_keep_the_colours(name):
    crystal = crystal_of(name)
    _, params, everything = made(name)
    colours = colours_from(layers_of(name), crystal.n_atoms)
    u = displacements(crystal, 4)
    (y, log_det), _, _ = everything(params, u)
    kept = broken = 0
    for image in translations_of(crystal)[1:]:
        (moved, moved_log_det), _, _ = everything(params, u.at[image].set(u))
        if (colours[image] == colours).all():
            kept += 1
            np.testing.assert_allclose(moved, y.at[image].set(y), rtol=0, atol=1e-13)
            assert float(moved_log_det) == pytest.approx(float(log_det), abs=1e-11)
        else:
            broken += float(jnp.abs(moved - y.at[image].set(y)).max()) > 1e-4
    assert kept > 0 and broken > 0


def test_gradients_are_finite_where_atoms_meet():
    """A neighbour in the place of the cage: distances of zero, where a root has an infinite slope."""
    crystal, layers = crystal_of("triclinic"), layers_of("triclinic")
    chain, params, _ = made("triclinic")
    # Gentle, and in the first sweep alone: what comes next must not carry the atoms apart.
    params = jax.tree.map(lambda leaf: 0.1 * leaf.astype("float32"), params)

    def number(params, u):
        y, log_det = chain.forward(params, u, STATE)
        x, back = chain.inverse(params, u, STATE)
        return jnp.sum(y**2) + jnp.sum(x**2) + log_det - 2 * back

    gradients = jax.jit(jax.value_and_grad(number, (0, 1)))
    met = 0
    for layer, k in itertools.product(range(len(layers.atoms)), range(2)):
        u = np.zeros((crystal.n_atoms, 3))
        # In a small box an atom can be its own cage in part.
        atom, cage = layers.neighbours[layer, 0, k], layers.cage[layer]
        share = 1 - cage[layers.neighbours[layer, 0] == atom].sum()
        if share > 0:
            u[atom] = -layers.bonds[layer, k] / share
            around = u[layers.neighbours[layer, 0]]
            met += np.linalg.norm(layers.bonds[layer] + around - cage @ around, axis=1).min() < 1e-6
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients(params, u.astype("float32"))))
    assert met > 2


# ------------------------------------------------------------------------- other sizes


@pytest.mark.parametrize(("lattice", "distance"), [("fcc", 1.05), ("diamond", 1.7)])
def test_a_repeated_configuration_gives_the_repeated_map(lattice, distance):
    """Exact transfer: parameters know bonds and colours, and nothing of the size."""
    crystals = [lattice_crystal(lattice, repeats, number_density=1.1) for repeats in ((2, 2, 2), (4, 4, 4))]
    chains = [bijector_on(crystal, distance) for crystal in crystals]
    u = displacements(crystals[0], 6)
    apart = (crystals[1].sites[:, None] - crystals[0].sites[None]) @ np.linalg.inv(crystals[0].cell)
    away = np.linalg.norm((apart - np.rint(apart)) @ crystals[0].cell, axis=-1)
    copy_of = away.argmin(axis=1)
    assert away.min(axis=1).max() < 1e-9
    params = noise(chains[0], u)
    shapes = [jax.eval_shape(lambda u, c=c: c.init(jax.random.key(0), u, STATE), u) for c in chains]
    assert shapes[0] == shapes[1]
    y, log_det = jax.jit(chains[0].forward)(params, u, STATE)
    many, many_log_det = jax.jit(chains[1].forward)(params, u[copy_of], STATE)
    np.testing.assert_allclose(many, y[copy_of], rtol=0, atol=1e-12)
    assert float(many_log_det) == pytest.approx(8 * float(log_det), abs=1e-9)
    assert abs(float(log_det)) > 0.1


@pytest.mark.parametrize(
    ("family", "distance"),
    [
        (["mw_cubic_8", "mw_cubic_64", "mw_cubic_216", "mw_cubic_512"], 1.7),
        (["mw_hexagonal_64", "mw_hexagonal_512"], 1.7),
        (["mw_hexagonal_64", "mw_hexagonal_216", "mw_hexagonal_512"], 1.05),
        (["lj_fcc_32", "lj_fcc_256", "lj_fcc_500"], 1.05),
    ],
)
def test_shipped_families_share_their_neighbourhoods(family, distance):
    """Atoms of a colour see the same bonds to the same colours; so parameters carry over as they are."""
    seen = []
    for name in family:
        crystal = load(name).crystal
        layers = sweep(crystal, distance, distance)
        colours = colours_from(layers, crystal.n_atoms)
        spacing = nearest_neighbour_distance(crystal)
        seen.append((colours[layers.neighbours[:, 0]], layers.bonds / spacing, layers.cage, layers.present))
        # So do all atoms of the colour, each with its own bonds.
        for atoms, neighbours, bonds in zip(layers.atoms, layers.neighbours, layers.bonds, strict=True):
            steps = (crystal.sites[neighbours] - crystal.sites[atoms][:, None] - bonds) @ np.linalg.inv(crystal.cell)
            np.testing.assert_allclose(steps, np.rint(steps), atol=1e-9)
            assert (colours[neighbours] == colours[neighbours[:1]]).all()
            assert (colours[neighbours] != colours[atoms][:, None]).all()
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-7)


def test_parameters_of_64_molecules_serve_216():
    chains = {n: bijector_on(load(f"mw_cubic_{n}").crystal, 1.7) for n in (64, 216)}
    u = {n: displacements(load(f"mw_cubic_{n}").crystal, 7) for n in chains}
    params = noise(chains[64], u[64])
    y, log_det = jax.jit(chains[216].forward)(params, u[216], STATE)
    back, back_log_det = jax.jit(chains[216].inverse)(params, y, STATE)
    np.testing.assert_allclose(back, u[216], rtol=0, atol=1e-12)
    assert float(back_log_det) == pytest.approx(-float(log_det), abs=1e-9) and abs(float(log_det)) > 0.1


# ------------------------------------------------------------------------- colours


COLOURINGS = [
    ("diamond", (2, 2, 2), 1.05, 2),
    ("diamond", (2, 2, 2), 1.7, 8),
    ("diamond", (3, 2, 4), 1.7, 8),
    ("fcc", (4, 4, 4), 1.05, 4),
    ("fcc", (3, 3, 3), 1.05, 4),
    ("bcc", (3, 3, 3), 1.05, 2),
    ("bcc", (2, 2, 2), 1.2, None),
    ("sc", (4, 4, 4), 1.05, 2),
    ("sc", (3, 3, 3), 1.05, 3),
    ("hcp", (3, 3, 2), 1.05, 6),
    ("hexagonal_ice", (2, 2, 2), 1.05, 4),
    ("hexagonal_ice", (2, 2, 2), 1.7, None),
    ("hexagonal_ice", (3, 1, 2), 2.3, None),
]


def image_distances(crystal, i, j):
    """Distances of all images, up to two cells away, from atoms i to atoms j."""
    steps = np.array(list(itertools.product(range(-2, 3), repeat=3))) @ crystal.cell
    return np.linalg.norm(crystal.sites[j] - crystal.sites[i] + steps, axis=1)


def assert_colours_are_sound(crystal, distance):
    colours = site_colours(crystal, distance)
    np.testing.assert_array_equal(np.unique(colours), np.arange(colours.max() + 1))
    assert len(set(np.bincount(colours))) == 1
    basis = np.empty(crystal.n_atoms, int)
    basis[crystal.site_of] = np.arange(crystal.site_of.shape[1])
    for colour in range(colours.max() + 1):
        first, *others = np.flatnonzero(colours == colour)
        assert (basis[others] == basis[first]).all()  # translates of each other
        for other in others:
            assert image_distances(crystal, first, other).min() > distance
    # A translation maps colours onto colours.
    for image in translations_of(crystal):
        for colour in range(colours.max() + 1):
            assert len(set(colours[image[colours == colour]])) == 1
    np.testing.assert_array_equal(site_colours(crystal, distance), colours)
    assert colours[0] == 0
    return colours


@pytest.mark.parametrize(("lattice", "repeats", "distance", "number"), COLOURINGS)
def test_atoms_of_a_colour_are_far_apart(lattice, repeats, distance, number):
    crystal = lattice_crystal(lattice, repeats, lattice_constant=5.431)
    colours = assert_colours_are_sound(crystal, distance * nearest_neighbour_distance(crystal))
    assert number is None or colours.max() + 1 == number


@pytest.mark.parametrize(("name", "number"), [("triclinic", 4), ("triclinic pair", None)])
def test_structures_without_repeats_have_a_colour_for_every_atom(name, number):
    crystal = crystal_of(name)
    spacing = nearest_neighbour_distance(crystal)
    for distance in (0.5, 1.05, 3.0):
        colours = assert_colours_are_sound(crystal, distance * spacing)
        assert number is None or colours.max() + 1 == number
    # Two cells whose copies are close must be told apart, or need not be.
    if name == "triclinic pair":
        assert colours.max() + 1 == 8 and site_colours(crystal, 0.5 * spacing).max() + 1 == 4


def test_sites_of_different_kinds_get_colours_of_their_own():
    layers = layers_of("triclinic")
    crystal = crystal_of("triclinic")
    assert crystal.site_of.shape == (1, 4) and layers.atoms.shape == (4, 1)
    spacing = nearest_neighbour_distance(crystal)
    for atoms, neighbours, bonds, cage, present in zip(*layers, strict=True):
        assert cage.sum() == pytest.approx(1) and present[0] == 1
        assert (cage[present == 0] == 0).all()
        lengths = np.linalg.norm(bonds, axis=1)
        others = np.concatenate([image_distances(crystal, atoms[0], j) for j in range(4) if j != atoms[0]])
        limit = max(1.1 * spacing, 1.15 * others.min())
        assert (others < limit).sum() == present.sum()
        np.testing.assert_allclose(np.sort(lengths[present == 1]), np.sort(others[others < limit]), rtol=1e-9)
        assert not (neighbours == atoms[0]).any()


@pytest.mark.parametrize("constant", [1.0, 1.7, 5.431])
@pytest.mark.parametrize(
    ("lattice", "reach", "number"),
    [("sc", 2.0, 32), ("fcc", math.sqrt(2), 18), ("hcp", math.sqrt(2), 18), ("diamond", math.sqrt(8 / 3), 16)],
)
def test_a_shell_at_the_reach_is_seen(lattice, reach, number, constant):
    """However its distance is rounded, for every atom."""
    crystal = lattice_crystal(lattice, (5, 5, 3) if lattice == "sc" else (3, 3, 3), lattice_constant=constant)
    layers = sweep(crystal, reach + 0.02, reach)
    np.testing.assert_array_equal(layers.present.sum(axis=1), number)


def test_rounding_leaves_bonds_in_one_order(tmp_path):
    """Components that end where a rounding would, 0.5005 bonds: every cell must list its bonds alike."""
    cell = 1.37 * np.array([[-1.001, 1.8, 1.0], [1.001, -1.8, 1.0], [1.001, 1.8, -1.0]])
    write(tmp_path / "decimals.extxyz", Atoms("Cu", positions=[[0, 0, 0]], cell=cell, pbc=True))
    crystal = structure_crystal(tmp_path / "decimals.extxyz", (5, 5, 5))
    layers = sweep(crystal, 1.05, 1.3)
    for atoms, neighbours, bonds in zip(layers.atoms, layers.neighbours, layers.bonds, strict=True):
        steps = (crystal.sites[neighbours] - crystal.sites[atoms][:, None] - bonds) @ np.linalg.inv(crystal.cell)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-9)


# ------------------------------------------------------------------------- the flow of a system


@functools.cache
def harmonic(name):
    """A system and its harmonic Gaussian, which needs no fit."""
    system = load(name)
    if system.nearest_image_only:
        table = nearest_image_table(system.crystal)
    else:
        table = neighbour_table(system.crystal, 1.0001 * system.potential.cutoff)
    columns = force_constants(system.potential, table, system.crystal.site_of[0])
    blocks = harmonic_blocks(system.crystal, columns, float(system.state.beta))
    return system, gaussian_from_blocks(system.crystal, blocks)


@pytest.mark.parametrize(("name", "shell", "n_colours"), [("mw_cubic_8", 1.7, 8), ("lj_fcc_32", 1.05, 4)])
def test_defaults_follow_the_potential(name, shell, n_colours):
    system, gaussian = harmonic(name)
    flow = residual(system, gaussian)
    assert flow.options["colour_distance"] == flow.options["reach"] == shell
    assert len(sweep(system.crystal, shell, shell).atoms) == n_colours
    assert flow.architecture == "residual" and flow.transferable and flow.log_measure == 0
    # The unit is the spread of an atom about its cage, not far from that about its site.
    spread = math.sqrt(np.trace(gaussian.root @ gaussian.root.T) / (3 * system.n_atoms))
    assert 0.5 * spread < flow.options["scale"] < 2 * spread


def test_options_rebuild_the_flow():
    system, flow, _ = small_flow()
    again = residual(system, flow.gaussian, **json.loads(json.dumps(flow.options)))
    assert again.options == flow.options
    x = flow.reference.sample(jax.random.key(0), system.state)
    np.testing.assert_array_equal(again.reference.sample(jax.random.key(0), system.state), x)
    shapes = [jax.eval_shape(f.bijector.init, jax.random.key(0), x, system.state) for f in (flow, again)]
    assert shapes[0] == shapes[1]


def test_the_reference_is_the_gaussian():
    system, flow, _ = small_flow()
    for dtype in ("float64", "float32"):
        state = ThermodynamicState(*(jnp.asarray(value, dtype) for value in system.state))
        x = flow.reference.sample(jax.random.key(1), state)
        assert x.dtype == flow.reference.reduced_potential(x, state).dtype == dtype
        np.testing.assert_allclose(jnp.mean(x, axis=0), 0, atol=1e-6)
    keys = jax.random.split(jax.random.key(2), 4096)
    x = jax.jit(jax.vmap(flow.reference.sample, (0, None)))(keys, system.state)
    wanted = flow.gaussian.root @ flow.gaussian.root.T
    # Entries have relative errors of at most sqrt(2 / 4096); six of them.
    wrong = np.abs(np.cov(np.asarray(x).reshape(4096, -1).T) - wanted).max()
    assert wrong < 6 * math.sqrt(2 / 4096) * np.abs(wanted).max()
    x = x[0]
    exponent = 0.5 * np.sum((flow.gaussian.inverse_root @ np.asarray(x).reshape(-1)) ** 2)
    assert float(flow.reference.reduced_potential(x, system.state)) == pytest.approx(exponent, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_sweeps": 0}, "flow.n_sweeps: must be at least 1, got 0"),
        ({"width": 0}, "flow.width: must be at least 1"),
        ({"depth": -1}, "flow.depth: must be at least 1"),
        ({"colour_distance": 1.0}, "flow.colour_distance: must be above 1 and at most 4"),
        ({"colour_distance": math.nan}, "flow.colour_distance: must be above 1"),
        ({"reach": 4.5}, "flow.reach: must be above 1 and at most 4 nearest-neighbour distances, got 4.5"),
        ({"scale": 0.0}, "flow.scale: must be positive"),
        ({"scale": math.nan}, "flow.scale: must be positive"),
    ],
)
def test_impossible_options_are_refused(options, message):
    system, gaussian = harmonic("mw_cubic_8")
    with pytest.raises(InputError, match=message) as caught:
        residual(system, gaussian, **{**TINY, **options})
    assert "\n" not in str(caught.value)


def springs_of(gaussian, stiffness):
    """A quadratic target about the reference's own modes, with its ln Z over mean-free displacements."""
    precision = stiffness * gaussian.inverse_root @ gaussian.inverse_root.T

    def reduced_potential(u, state):
        return 0.5 * jnp.sum(u * (jnp.asarray(precision, u.dtype) @ u.reshape(-1)).reshape(u.shape))

    n_modes = len(gaussian.root) - 3
    log_z = 0.5 * n_modes * math.log(2 * math.pi / stiffness) + float(gaussian.log_det)
    return Ensemble(reduced_potential), log_z


@functools.cache
def small_flow():
    system, gaussian = harmonic("mw_cubic_8")
    flow = residual(system, gaussian, **TINY)
    x = flow.reference.sample(jax.random.key(0), system.state)
    return system, flow, jax.jit(flow.bijector.init)(jax.random.key(1), x, system.state)


def by_perturbation(flow, target, state, n):
    """Function of parameters and a seed: ln Z of a target by targeted perturbation, and its standard error."""

    def work(params, key):
        x = flow.reference.sample(key, state)
        return pulled_back(flow, params, target).reduced_potential(x, state) - flow.reference.reduced_potential(
            x, state
        )

    works = jax.jit(jax.vmap(work, (None, 0)))

    def log_z(params, seed):
        weights = np.exp(-np.asarray(works(params, jax.random.split(jax.random.key(seed), n))))
        mean = weights.mean()
        return math.log(mean) + float(flow.reference.log_partition(state)), weights.std() / mean / math.sqrt(n)

    return log_z


def test_any_flow_leaves_a_known_free_energy_alone():
    """E[exp(-w)] with random parameters gives ln Z of springs; 5 sigma, 1 false alarm in 10^6 each."""
    system, flow, start = small_flow()
    target, expected = springs_of(flow.gaussian, 1.1)
    log_z = by_perturbation(flow, target, system.state, 4096)
    plain, error = log_z(start, 3)
    assert abs(plain - expected) < 5 * error
    for seed, scale in [(5, 0.01), (6, 0.015)]:
        estimate, wider = log_z(randomised(start, scale, seed), seed)
        assert abs(estimate - expected) < 5 * wider < 0.4
        assert wider > 1.2 * error  # the flow did something


def test_any_flow_leaves_the_free_energy_of_ice_alone():
    """Two random flows and none; differences to 4 sigma, one false alarm in 16 000 each."""
    system, flow, start = small_flow()
    log_z = by_perturbation(flow, system.target, system.state, 4096)
    plain, error = log_z(start, 4)
    assert error < 0.05
    for seed in (5, 6):
        estimate, wider = log_z(randomised(start, 0.01, seed), seed)
        assert abs(estimate - plain) < 4 * math.hypot(error, wider) < 0.4


def test_pulled_back_follows_the_precision_of_the_configuration():
    system, flow, start = small_flow()
    params = randomised(start, 0.03)

    @jax.jit
    def numbers(x):
        y, log_det = flow.bijector.forward(params, x, system.state)
        exact = pulled_back(flow, params, system.target).reduced_potential(x, system.state)
        rough = pulled_back(flow, params, flow.training_target).reduced_potential(x.astype("float32"), system.state)
        return exact, flow.target.reduced_potential(y, system.state), log_det, rough

    exact, there, log_det, rough = map(float, numbers(flow.reference.sample(jax.random.key(3), system.state)))
    assert exact == pytest.approx(there - log_det, abs=1e-9) and abs(log_det) > 0.05
    assert rough == pytest.approx(exact, abs=2e-3)
