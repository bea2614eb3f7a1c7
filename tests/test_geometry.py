"""Lattices, translation groups and neighbour tables, against ASE and against counting by hand."""

import itertools
import json
from collections import Counter
from pathlib import Path

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.geometry import find_mic
from ase.neighborlist import neighbor_list
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from freeflow.crystals import lattice_crystal, structure_crystal
from freeflow.errors import InputError
from freeflow.geometry import (
    LATTICES,
    Translations,
    face_distances,
    is_orthorhombic,
    nearest_image_table,
    neighbour_table,
    smith_form,
)

REFDATA = Path(__file__).resolve().parents[2] / "shared" / "refdata"

SHELLS = {  # (neighbours, distance / a), nearest shells first
    "sc": [(6, 1.0), (12, 2**0.5), (8, 3**0.5)],
    "bcc": [(8, 0.75**0.5), (6, 1.0), (12, 2**0.5)],
    "fcc": [(12, 0.5**0.5), (6, 1.0), (24, 1.5**0.5)],
    "hcp": [(12, 1.0), (6, 2**0.5), (2, (8 / 3) ** 0.5), (18, 3**0.5)],
    "diamond": [(4, 3**0.5 / 4), (12, 0.5**0.5), (12, 11**0.5 / 4)],
    # Bonds of 3/8 c; the third shell, one atom across an eclipsed bond, tells it from diamond.
    "hexagonal_ice": [(4, 0.375**0.5), (12, 1.0), (1, 5 / 8 * (8 / 3) ** 0.5), (9, (11 / 8) ** 0.5)],
    "rocksalt": [(6, 0.5), (12, 0.5**0.5), (8, 0.75**0.5)],
    "cesium_chloride": [(8, 0.75**0.5), (6, 1.0), (12, 2**0.5)],
    "zincblende": [(4, 3**0.5 / 4), (12, 0.5**0.5), (12, 11**0.5 / 4)],
}
CELLS = {  # primitive or strange cells, in which some atom also neighbours its own images
    "fcc primitive": ase.build.bulk("Cu", "fcc", a=3.6),
    "bcc primitive": ase.build.bulk("Fe", "bcc", a=2.9),
    "diamond primitive": ase.build.bulk("Si", "diamond", a=5.43),
    "hcp": ase.build.bulk("Mg", "hcp", a=3.2, c=5.2),
    "rock salt": ase.build.bulk("NaCl", "rocksalt", a=5.6),
    "no symmetry": Atoms(
        "Cu5",
        cell=[[5.0, 0.3, -0.4], [1.7, 4.6, 0.2], [-1.1, 0.9, 5.3]],
        scaled_positions=np.random.default_rng(0).uniform(size=(5, 3)).round(3) + np.arange(5)[:, None] / 5,
        pbc=True,
    ),
    "skewed": Atoms("Cu2", cell=[[3, 0, 0], [6.5, 3, 0], [-7, 4.2, 3.1]], positions=[[0, 0, 0], [1, 1.6, 1]], pbc=True),
    "left-handed": Atoms("Cu", cell=[[0, 3.0, 0], [3.2, 0, 0], [0.5, 0, 3.4]], pbc=True),
}


def from_atoms(atoms, repeats, folder):
    atoms.write(folder / "structure.extxyz", format="extxyz")
    return structure_crystal(folder / "structure.extxyz", repeats)


def kinds(lattice):
    """Names for the kinds of atoms that a lattice has."""
    return ("Na", "Cl") if LATTICES[lattice].kinds else ("X",)


def ase_atoms(crystal):
    return Atoms("H" * crystal.n_atoms, positions=crystal.sites, cell=crystal.cell, pbc=True)


def table_pairs(table):
    """Atoms and separation of every pair in a table, as it stands there."""
    there = np.linalg.norm(table.offset, axis=-1) <= table.radius
    slot, i = np.nonzero(there)
    return i, table.partner[slot, i], table.offset[slot, i]


def assert_same_pairs(crystal, radius):
    """Both directions of every pair of the table are ASE's full list, image by image."""
    table = neighbour_table(crystal, radius)
    i, j, d = table_pairs(table)
    image = (d - (crystal.sites[j] - crystal.sites[i])) @ np.linalg.inv(crystal.cell)
    np.testing.assert_allclose(image, np.rint(image), atol=1e-7)
    image = np.rint(image).astype(int)
    found = Counter(zip(i, j, map(tuple, image), strict=True)) + Counter(zip(j, i, map(tuple, -image), strict=True))
    expected = Counter(
        (i, j, tuple(s)) for i, j, s in zip(*neighbor_list("ijS", ase_atoms(crystal), radius), strict=True)
    )
    assert found == expected
    assert table.n_pairs == len(i) == sum(expected.values()) // 2
    assert_slots(table, crystal.n_atoms)
    return table


def assert_slots(table, n_atoms):
    """Every slot is a permutation, and `source` is its inverse."""
    everyone = np.broadcast_to(np.arange(n_atoms), table.partner.shape)
    np.testing.assert_array_equal(np.sort(table.partner, axis=1), everyone)
    np.testing.assert_array_equal(np.take_along_axis(table.partner, table.source, axis=1), everyone)


# ------------------------------------------------------------------ lattices


@pytest.mark.parametrize("lattice", LATTICES)
def test_shells_of_a_lattice(lattice):
    crystal = lattice_crystal(lattice, (2, 2, 1), lattice_constant=1.3, species=kinds(lattice))
    shells = SHELLS[lattice]
    i, d = neighbor_list("id", ase_atoms(crystal), 1.3 * shells[-1][1] + 1e-6)
    for atom in range(crystal.n_atoms):
        expected = np.repeat([1.3 * r for _, r in shells], [n for n, _ in shells])
        np.testing.assert_allclose(np.sort(d[i == atom]), expected, atol=1e-9)


@pytest.mark.parametrize("lattice", LATTICES)
def test_number_density_is_kept(lattice):
    crystal = lattice_crystal(lattice, (2, 3, 1), number_density=0.37, species=kinds(lattice))
    assert crystal.n_atoms == 6 * len(LATTICES[lattice].basis)
    assert crystal.n_atoms / crystal.volume == pytest.approx(0.37, rel=1e-13)
    assert len(crystal.site_of) * crystal.site_of.shape[1] == crystal.n_atoms
    np.testing.assert_array_equal(np.sort(crystal.site_of.ravel()), np.arange(crystal.n_atoms))


@pytest.mark.parametrize(
    ("lattice", "atoms"),
    [
        ("hcp", ase.build.bulk("Mg", "hcp", a=1.0, c=(8 / 3) ** 0.5)),
        ("hexagonal_ice", ase.build.bulk("ZnO", "wurtzite", a=1.0, c=(8 / 3) ** 0.5, u=3 / 8)),
        ("diamond", ase.build.bulk("C", "diamond", a=1.0)),
        ("fcc", ase.build.bulk("Cu", "fcc", a=1.0)),
        ("bcc", ase.build.bulk("Fe", "bcc", a=1.0)),
        ("sc", ase.build.bulk("Po", "sc", a=1.0)),
    ],
)
def test_distances_are_those_of_ase_builders(lattice, atoms):
    crystal = lattice_crystal(lattice, (1, 1, 1), lattice_constant=1.0)
    ours, theirs = (np.sort(neighbor_list("d", a, 3.01)) for a in (ase_atoms(crystal), atoms))
    np.testing.assert_allclose(
        np.repeat(ours, len(atoms)), np.repeat(theirs, crystal.n_atoms), atol=1e-9
    )  # as often per atom


@pytest.mark.skipif(not REFDATA.is_dir(), reason="the reference trajectories are not here")
@pytest.mark.parametrize(
    ("name", "lattice", "repeats", "density"),
    [
        ("lj_fcc_256", "fcc", (4, 4, 4), 1.28),
        ("mw_cubic_64", "diamond", (2, 2, 2), 0.033567184),
        ("mw_hexagonal_64", "hexagonal_ice", (2, 2, 2), 0.033567184),
    ],
)
def test_distances_are_those_of_the_reference_crystals(name, lattice, repeats, density):
    box = np.array(json.loads((REFDATA / name / "reference.json").read_text())["box"], float)
    sites = np.loadtxt(REFDATA / name / "lattice.csv", delimiter=",")
    crystal = lattice_crystal(lattice, repeats, number_density=density)
    # Box edges may come in another order: compare what does not depend on it.
    np.testing.assert_allclose(np.sort(box.ravel()), np.sort(np.diag(crystal.cell)), rtol=1e-6)
    theirs = Atoms("H" * len(sites), positions=sites, cell=box.ravel(), pbc=True)
    radius = 1.02 * face_distances(crystal.cell).min() / 2
    ours, theirs = (np.sort(neighbor_list("d", a, radius)) for a in (ase_atoms(crystal), theirs))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_face_distances_of_a_sheared_cell():
    cell = np.array([[2.0, 0, 0], [1.0, 3.0, 0], [0, 0, 5.0]])
    np.testing.assert_allclose(face_distances(cell), [6 / 10**0.5, 3, 5], rtol=1e-14)
    assert not is_orthorhombic(cell)
    assert is_orthorhombic(np.diag([1.0, 2.0, 3.0]))


# ------------------------------------------------------------------ translation groups

INTEGERS = st.lists(st.integers(-6, 6), min_size=9, max_size=9).map(lambda x: np.array(x).reshape(3, 3))


@given(INTEGERS)
@settings(deadline=None, max_examples=200, derandomize=True)
def test_smith_form_makes_integer_rows_a_product_of_cyclic_groups(matrix):
    determinant = round(np.linalg.det(matrix))
    assume(determinant != 0)
    orders, v = smith_form(matrix)
    assert np.prod(orders) == abs(determinant)
    assert abs(round(np.linalg.det(v))) == 1
    # Rows of the supercell are the neutral element: the map is well defined.
    np.testing.assert_array_equal((matrix @ v) % orders, 0)
    # M V = U^-1 diag(d) with U unimodular: so many elements, and the map reaches each of them.
    left = (matrix @ v) // orders
    assert abs(round(np.linalg.det(left))) == 1


@given(INTEGERS)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_translations_and_group_elements_are_one_to_one(matrix):
    determinant = abs(round(np.linalg.det(matrix)))
    assume(0 < determinant <= 60)
    orders, v = smith_form(matrix)
    # Enough integer rows to meet every class modulo the supercell.
    span = np.array(list(itertools.product(range(determinant), repeat=3))) if determinant <= 12 else None
    rows = span if span is not None else np.random.default_rng(0).integers(0, determinant, (20_000, 3))
    elements = (rows @ v) % orders
    # Two rows get the same element exactly when they differ by a row of the supercell.
    inside = rows @ np.linalg.inv(matrix)
    classes = np.round((inside - np.floor(inside + 1e-9)) * determinant).astype(int)
    pairs = set(zip(map(tuple, elements), map(tuple, classes), strict=True))
    assert len(pairs) == len({e for e, _ in pairs}) == len({c for _, c in pairs}) == determinant


def test_smith_form_of_a_singular_matrix_is_refused():
    with pytest.raises(ValueError, match="singular"):
        smith_form(np.array([[1, 2, 3], [2, 4, 6], [0, 0, 1]]))


def test_translations_locate_sites_across_the_periodic_boundary():
    primitive = np.array([[2.0, 0, 0], [0.5, 2.0, 0], [0, 0.3, 2.5]])
    basis = np.array([[0.0, 0, 0], [1.0, 1.0, 1.2]])
    supercell = np.array([[2, 0, 0], [1, 3, 0], [0, 0, 2]])
    orders, to_group = smith_form(supercell)
    translations = Translations(primitive, basis, orders, to_group)
    n = np.random.default_rng(0).integers(-5, 6, (50, 3))
    for b in range(2):
        # Noise puts some sites just below 0 and their twins just above.
        positions = n @ primitive + basis[b] + 1e-9 * np.random.default_rng(b).standard_normal((50, 3))
        t, found = translations.locate(positions, 1e-6)
        assert (found == b).all()
        np.testing.assert_array_equal(t, np.ravel_multi_index(tuple(((n @ to_group) % orders).T), tuple(orders)))
        again, _ = translations.locate(positions + supercell[1] @ primitive, 1e-6)
        np.testing.assert_array_equal(again, t)
    with pytest.raises(InputError, match=r"lies 0\.5 away"):
        translations.locate(np.array([[0, 0, 0.5]]), 1e-6)


# ------------------------------------------------------------------ neighbour tables


@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize(("repeats", "radius"), [((2, 2, 2), 1.3), ((1, 2, 3), 2.1), ((1, 1, 1), 1.6)])
def test_every_pair_of_a_lattice_stands_in_one_slot(lattice, repeats, radius):
    assert_same_pairs(lattice_crystal(lattice, repeats, lattice_constant=1.0, species=kinds(lattice)), radius)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("repeats", "radius"), [((2, 2, 2), 4.0), ((1, 2, 3), 5.5), ((1, 1, 1), 6.3)])
def test_every_pair_of_a_structure_stands_in_one_slot(name, repeats, radius, tmp_path):
    assert_same_pairs(from_atoms(CELLS[name], repeats, tmp_path), radius)


def test_slots_are_few():
    """A perfect lattice with one basis atom wastes no place; with several, few."""
    fcc = lattice_crystal("fcc", (4, 4, 4), lattice_constant=1.0)
    assert neighbour_table(fcc, 1.25).partner.shape == (21, 256)  # (12 + 6 + 24) / 2
    ice = lattice_crystal("hexagonal_ice", (2, 2, 2), lattice_constant=1.0)
    table = neighbour_table(ice, 1.01)
    assert table.partner.shape[0] <= 10  # 16 neighbours: 8 at best


def test_padding_lies_far_outside():
    table = neighbour_table(lattice_crystal("diamond", (2, 2, 2), lattice_constant=1.0), 0.5)
    distance = np.linalg.norm(table.offset, axis=-1)
    assert ((distance < 0.5) | (distance > 100 * 0.5)).all()


def test_without_pairs_there_is_one_empty_slot():
    crystal = lattice_crystal("sc", (2, 2, 2), lattice_constant=1.0)
    table = neighbour_table(crystal, 0.9)
    assert table.partner.shape == (1, 8)
    assert table.n_pairs == 0
    assert_slots(table, 8)


@pytest.mark.parametrize(("lattice", "repeats"), [("diamond", (1, 1, 1)), ("sc", (3, 3, 3)), ("sc", (1, 1, 2))])
def test_nearest_images_are_all_pairs_once(lattice, repeats):
    crystal = lattice_crystal(lattice, repeats, lattice_constant=1.0)
    table, n = nearest_image_table(crystal), crystal.n_atoms
    assert table.n_pairs == n * (n - 1) // 2
    assert_slots(table, n)
    slot, i = np.nonzero(~table.empty)
    j = table.partner[slot, i]
    assert {frozenset(p) for p in zip(i.tolist(), j.tolist(), strict=True)} == {
        frozenset(p) for p in itertools.combinations(range(n), 2)
    }
    _, nearest = find_mic(crystal.sites[j] - crystal.sites[i], crystal.cell)
    np.testing.assert_allclose(np.linalg.norm(table.offset[slot, i], axis=1), nearest, atol=1e-12)


def test_nearest_images_need_an_orthorhombic_cell():
    with pytest.raises(InputError, match="orthorhombic"):
        nearest_image_table(lattice_crystal("hcp", (2, 2, 2), lattice_constant=1.0))
