"""Space groups: how many elements, that they map sites to sites, and that energies do not notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st

from freeflow import load
from freeflow.crystals import crystal_system, lattice_crystal, structure_crystal
from freeflow.geometry import LATTICES
from freeflow.potentials import lennard_jones
from freeflow.symmetries import crystal_symmetries, primitive_cell
from freeflow.units import UNIT_STYLES

pytestmark = pytest.mark.code("brief")

# Orders of the point groups that the supercell keeps.
POINT_GROUPS = [
    ("sc", (2, 2, 2), 48),
    ("bcc", (3, 3, 3), 48),
    ("fcc", (4, 4, 4), 48),
    ("diamond", (2, 2, 2), 48),
    ("fcc", (2, 2, 3), 16),  # 4/mmm
    ("diamond", (1, 1, 2), 16),
    ("sc", (1, 2, 3), 8),  # mmm
    ("hcp", (2, 2, 2), 24),  # 6/mmm
    ("hcp", (2, 3, 2), 4),  # 2/m
    ("hexagonal_ice", (2, 2, 2), 8),  # the orthorhombic box keeps mmm out of 6/mmm
    ("hexagonal_ice", (1, 2, 1), 8),
]
TRANSLATIONS = [
    ("fcc", (4, 4, 4), 256, 1),
    ("bcc", (3, 3, 3), 54, 1),
    ("sc", (3, 2, 1), 6, 1),
    ("diamond", (2, 2, 2), 32, 2),
    ("hcp", (3, 3, 2), 18, 2),
    ("hexagonal_ice", (2, 2, 2), 16, 4),  # the primitive cell is half of the orthorhombic one
]


def modulo_cell(difference, cell):
    """Distance to the nearest lattice vector of the box."""
    steps = difference @ np.linalg.inv(cell)
    return np.linalg.norm((steps - np.rint(steps)) @ cell, axis=-1)


def assert_group_acts_on_sites(crystal):
    spacing = (crystal.volume / crystal.n_atoms) ** (1 / 3)
    n_translations = len(crystal.site_of)
    assert np.prod(crystal.group) == n_translations
    np.testing.assert_array_equal(np.sort(crystal.site_of.ravel()), np.arange(crystal.n_atoms))
    # Adding one group element moves every site by one and the same vector.
    steps = np.indices(crystal.group).reshape(3, -1).T
    for step in steps[:: max(1, n_translations // 8)]:
        to = np.ravel_multi_index(tuple(((steps + step) % crystal.group).T), crystal.group)
        moved = crystal.sites[crystal.site_of[to]] - crystal.sites[crystal.site_of]
        assert modulo_cell(moved - moved[0, 0], crystal.cell).max() < 1e-7 * spacing
    for rotation, image in zip(crystal.operations, crystal.operation_sites, strict=True):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-7)
        np.testing.assert_array_equal(np.sort(image), np.arange(crystal.n_atoms))
        assert all(np.array(crystal.species)[image] == np.array(crystal.species))
        moved = crystal.sites[image] - crystal.sites @ rotation.T
        assert modulo_cell(moved - moved[0], crystal.cell).max() < 1e-6 * spacing
    assert any(np.allclose(rotation, np.eye(3)) for rotation in crystal.operations)


@pytest.mark.parametrize(("lattice", "repeats", "n_translations", "n_basis"), TRANSLATIONS)
def test_translations_are_those_of_the_primitive_cell(lattice, repeats, n_translations, n_basis):
    crystal = lattice_crystal(lattice, repeats, lattice_constant=1.7)
    assert crystal.site_of.shape == (n_translations, n_basis)
    assert_group_acts_on_sites(crystal)


@pytest.mark.parametrize(("lattice", "repeats", "n_operations"), POINT_GROUPS)
def test_point_operations_are_those_that_the_box_keeps(lattice, repeats, n_operations):
    crystal = lattice_crystal(lattice, repeats, lattice_constant=1.7)
    assert len(crystal.operations) == n_operations
    assert len({np.round(o, 6).tobytes() for o in crystal.operations + 0.0}) == n_operations
    assert_group_acts_on_sites(crystal)


@pytest.mark.parametrize("lattice", LATTICES)
def test_primitive_cell_divides_the_conventional_one(lattice):
    shape = LATTICES[lattice]
    species = tuple("XY"[kind] for kind in shape.kinds or (0,) * len(shape.basis))
    primitive, basis = primitive_cell(shape.cell, shape.basis @ shape.cell, species, 1e-4)
    two_kinds = {"rocksalt": 2, "cesium_chloride": 2, "zincblende": 2}
    atoms = {"sc": 1, "bcc": 1, "fcc": 1, "hcp": 2, "diamond": 2, "hexagonal_ice": 4, **two_kinds}[lattice]
    assert len(basis) == atoms
    ratio = np.linalg.det(shape.cell) / np.linalg.det(primitive)
    assert abs(ratio) == pytest.approx(len(shape.basis) / atoms, rel=1e-12)
    whole = shape.cell @ np.linalg.inv(primitive)
    np.testing.assert_allclose(whole, np.rint(whole), atol=1e-9)


def test_species_break_symmetry():
    """Rock salt is simple cubic with every other atom different: two atoms per primitive cell."""
    fcc = LATTICES["fcc"].basis
    positions = np.concatenate([fcc, fcc + np.array([0.5, 0, 0])])
    assert len(primitive_cell(np.eye(3), positions, ("Na",) * 4 + ("Cl",) * 4, 1e-4)[1]) == 2
    assert len(primitive_cell(np.eye(3), positions, ("X",) * 8, 1e-4)[1]) == 1


# ------------------------------------------------------------------ invariance of energies

SYSTEMS = {name: load(name) for name in ("mw_cubic_8", "mw_hexagonal_64", "lj_fcc_32", "silicon_diamond_64")}
SYSTEMS["lj_hcp_triclinic"] = crystal_system(
    "lj_hcp",
    lattice_crystal("hcp", (4, 4, 3), number_density=1.1),
    lennard_jones(cutoff=1.6),
    UNIT_STYLES["lj"],
    1.0,
    1.0,
)
SYSTEMS["lj_fcc_2x2x3"] = crystal_system(
    "lj_fcc",
    lattice_crystal("fcc", (2, 2, 3), number_density=1.1),
    lennard_jones(cutoff=1.5),
    UNIT_STYLES["lj"],
    1.0,
    1.0,
)
CASES = [
    pytest.param(SYSTEMS[name], group, id=f"{name}-{group.name}")
    for name in SYSTEMS
    for group in crystal_symmetries(SYSTEMS[name].crystal)
]


def random_configuration(system, key):
    """Displacements of a few per cent of the spacing, mean-free."""
    x = jax.random.normal(key, (system.n_atoms, 3)) * 0.03 * (system.crystal.volume / system.n_atoms) ** (1 / 3)
    return x - jnp.mean(x, axis=0, keepdims=True)


@pytest.mark.parametrize(("system", "group"), CASES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_reduced_potential_is_invariant(system, group, seed):
    key_x, key_g = jax.random.split(jax.random.key(seed))
    u, act, state = jax.jit(system.target.reduced_potential), jax.jit(group.act), system.state
    x = random_configuration(system, key_x)
    y = act(key_g, x)
    assert not np.isinf(u(x, state))
    np.testing.assert_allclose(u(y, state), u(x, state), rtol=1e-9)
    np.testing.assert_allclose(jnp.mean(y, axis=0), 0, atol=1e-12)


@pytest.mark.parametrize(("system", "group"), CASES)
def test_symmetries_move_something_and_keep_lengths(system, group):
    x = random_configuration(system, jax.random.key(0))
    y = jax.vmap(group.act, (0, None))(jax.random.split(jax.random.key(1), 64), x)
    lengths = np.sort(np.linalg.norm(y, axis=-1), axis=-1)
    np.testing.assert_allclose(lengths, np.broadcast_to(np.sort(np.linalg.norm(x, axis=-1)), lengths.shape), rtol=1e-6)
    assert len(np.unique(np.round(y[:, 0, 0], 9))) > 1


def test_a_structure_without_symmetry_keeps_the_identity(tmp_path):
    positions = np.random.default_rng(0).uniform(0, 5, (4, 3)) + np.arange(4)[:, None]
    cell = [[9.0, 0.3, 0.1], [1.7, 8.0, 0.4], [-1.3, 0.9, 7.0]]
    Atoms("Cu4", positions=positions, cell=cell, pbc=True).write(tmp_path / "a.extxyz")
    crystal = structure_crystal(tmp_path / "a.extxyz")
    assert crystal.group == (1, 1, 1)
    np.testing.assert_allclose(crystal.operations, np.eye(3)[None], atol=1e-12)
