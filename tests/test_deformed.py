"""Energies, forces and virials in deformed cells: against the undeformed kernels, LAMMPS and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lammps_oracle import MW, SILICON, lammps_stress, require_lammps
from scipy.linalg import expm

from freeflow.crystals import lattice_crystal
from freeflow.geometry import nearest_image_table, neighbour_table
from freeflow.potentials import bind, deformed_energy, lattice_energy, lennard_jones, stillinger_weber, walks
from freeflow.types import Crystal

pytestmark = pytest.mark.code("brief")


def from_words(parameters):
    return stillinger_weber(**{("lam" if k == "lambda" else k): v for k, v in parameters.items()})


LJ = {"cutoff": 2.2, "shift": True}
CASES = {  # potential; lattice; LAMMPS's words
    "lj fcc": (lennard_jones(cutoff=2.2), ("fcc", (2, 2, 2), 1.1), ("lj", LJ, "lj")),
    "mw hexagonal": (from_words(MW), ("hexagonal_ice", (1, 1, 1), 0.0336), ("sw", MW, "real")),
    "silicon diamond": (from_words(SILICON), ("diamond", (1, 1, 1), 0.05), ("sw", SILICON, "metal")),
}


NAMES = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "silicon diamond")) for name in CASES]
)


@functools.cache
def case(name):
    """Crystal, potential, displacements, a deformation without any symmetry, and a table for both."""
    potential, (lattice, repeats, density), _ = CASES[name]
    crystal = lattice_crystal(lattice, repeats, number_density=density)
    rng = np.random.default_rng(3)
    u = 0.03 * density ** (-1 / 3) * rng.standard_normal((crystal.n_atoms, 3))
    strain = rng.standard_normal((3, 3))
    f = expm(0.02 * (strain + strain.T))
    table = neighbour_table(crystal, 1.2 * potential.cutoff + 2 * np.linalg.norm(u, axis=1).max())
    return crystal, potential, u - u.mean(axis=0), f, table


@functools.cache
def evaluator(name, dtype="float64"):
    _, potential, _, _, table = case(name)
    return jax.jit(jax.value_and_grad(deformed_energy(potential, table, dtype), (0, 1)))


@pytest.mark.parametrize(
    ("name", "way"), [("lj fcc", walks.ByThreads), pytest.param("mw hexagonal", walks.ByTiles, marks=pytest.mark.slow)]
)
def test_other_ways_find_what_slots_do(monkeypatch, name, way):
    """That of GPUs is interpreted; the last of the tiles is not full."""
    _, potential, u, f, table = case(name)
    value, gradients = evaluator(name)(jnp.asarray(u), jnp.asarray(f))
    monkeypatch.setattr(walks, "walk", way)
    monkeypatch.setattr(walks, "_WHOLE", 0)
    monkeypatch.setattr(walks, "_TILE", 7)
    threads, others = jax.jit(jax.value_and_grad(deformed_energy(potential, table), (0, 1)))(u, f)
    assert float(threads) == pytest.approx(float(value), rel=1e-11)
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(other, gradient, atol=1e-11 * float(jnp.abs(gradient).max()))


@pytest.mark.parametrize("name", ["lj fcc", pytest.param("mw hexagonal", marks=pytest.mark.slow)])
def test_any_order_of_atoms_finds_the_same(name):
    _, potential, u, f, table = case(name)
    value, gradients = evaluator(name)(jnp.asarray(u), jnp.asarray(f))
    ordered = table._replace(order=np.random.default_rng(0).permutation(len(u)))
    found, others = jax.jit(jax.value_and_grad(deformed_energy(potential, ordered), (0, 1)))(u, f)
    assert float(found) == pytest.approx(float(value), rel=1e-11)
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(other, gradient, atol=1e-11 * float(jnp.abs(gradient).max()))


@NAMES
def test_without_deformation_it_is_the_kernel_of_fixed_cells(name):
    _, potential, u, _, table = case(name)
    value, (gradient, _) = evaluator(name)(jnp.asarray(u), jnp.eye(3))
    known, slope = jax.jit(jax.value_and_grad(bind(potential, table)))(jnp.asarray(u))
    assert float(value) == pytest.approx(float(known), rel=1e-11)
    np.testing.assert_allclose(gradient, slope, atol=1e-10 * np.abs(slope).max())


@NAMES
def test_the_lattice_deforms_with_its_cell(name):
    crystal, potential, u, f, table = case(name)
    deformed = Crystal(**{**vars(crystal), "cell": crystal.cell @ f, "sites": crystal.sites @ f})
    wide = neighbour_table(deformed, table.radius)
    energy = lattice_energy(potential, wide) - lattice_energy(potential, table)
    value, _ = evaluator(name)(jnp.zeros_like(u), jnp.asarray(f))
    assert float(value) == pytest.approx(energy, rel=1e-10)


@NAMES
def test_gradients_are_finite_differences(name):
    _, _, u, f, _ = case(name)
    energy = evaluator(name)
    _, (by_u, by_f) = energy(jnp.asarray(u), jnp.asarray(f))
    rng = np.random.default_rng(0)
    for move_u, move_f in ((rng.standard_normal(u.shape), 0 * f), (0 * u, rng.standard_normal((3, 3)))):
        h = 1e-5
        up, down = (float(energy(jnp.asarray(u + s * h * move_u), jnp.asarray(f + s * h * move_f))[0]) for s in (1, -1))
        slope = float(np.sum(by_u * move_u) + np.sum(by_f * move_f))
        assert slope == pytest.approx((up - down) / (2 * h), rel=1e-6)


@pytest.mark.code("users")
@NAMES
def test_energy_forces_and_pressure_agree_with_lammps(name):
    require_lammps()
    crystal, potential, u, f, table = case(name)
    _, _, (style, parameters, units) = CASES[name]
    positions, cell = (crystal.sites + u) @ f, crystal.cell @ f
    energy, forces, stress = lammps_stress(cell, positions, style, parameters, units)
    value, (by_u, by_f) = evaluator(name)(jnp.asarray(u), jnp.asarray(f))
    assert float(value) + lattice_energy(potential, table) == pytest.approx(energy, rel=1e-9)
    np.testing.assert_allclose(-np.asarray(by_u) @ np.linalg.inv(f), forces, atol=1e-7 * np.abs(forces).max())
    # The virial part of the pressure tensor: -(dU/dF) F^T / V, from the table's bonds alone.
    virial = -np.asarray(by_f) @ f.T / abs(np.linalg.det(cell))
    np.testing.assert_allclose(virial, stress, rtol=1e-6, atol=1e-7 * np.abs(stress).max())


def test_batches_are_single_configurations():
    name = "lj fcc"
    _, potential, u, f, table = case(name)
    some = np.stack([u, 0.5 * u, 0 * u])
    deformations = np.stack([f, np.eye(3), 0.99 * np.eye(3)])
    batched = jax.jit(jax.vmap(jax.value_and_grad(deformed_energy(potential, table), (0, 1))))
    values, gradients = batched(some, deformations)
    for k in range(3):
        value, single = evaluator(name)(jnp.asarray(some[k]), jnp.asarray(deformations[k]))
        assert float(values[k]) == pytest.approx(float(value), rel=1e-12, abs=1e-12)
        for a, b in zip(gradients, single, strict=True):
            np.testing.assert_allclose(a[k], b, atol=1e-11)
    one_cell = jax.jit(jax.vmap(deformed_energy(potential, table), (0, None)))(some, jnp.asarray(f))
    assert float(one_cell[0]) == pytest.approx(float(values[0]), rel=1e-12)


@pytest.mark.code("users")
def test_float32_is_close():
    name = "lj fcc"
    _, _, u, f, _ = case(name)
    exact, gradients = evaluator(name)(jnp.asarray(u), jnp.asarray(f))
    value, rough = evaluator(name, "float32")(jnp.asarray(u, "float32"), jnp.asarray(f, "float32"))
    assert float(value) == pytest.approx(float(exact), rel=1e-4)
    for a, b in zip(rough, gradients, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_a_box_of_nearest_images_is_refused():
    crystal = lattice_crystal("fcc", (2, 2, 2), number_density=1.1)
    with pytest.raises(ValueError, match="one fixed box"):
        deformed_energy(lennard_jones(cutoff=2.2), nearest_image_table(crystal))
