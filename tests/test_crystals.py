"""Crystals from names and from files, and the systems made of them."""

import math

import ase.build
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from test_symmetries import assert_group_acts_on_sites, modulo_cell

from freeflow.crystals import crystal_system, lattice_crystal, structure_crystal
from freeflow.errors import InputError
from freeflow.potentials import lennard_jones
from freeflow.units import UNIT_STYLES

pytestmark = pytest.mark.code("brief")

STRUCTURES = {  # structure, atoms per primitive cell, primitive cells in the structure
    "fcc primitive": (ase.build.bulk("Cu", "fcc", a=3.6), 1, 1),
    "fcc conventional": (ase.build.bulk("Cu", "fcc", a=3.6, cubic=True), 1, 4),
    "diamond primitive": (ase.build.bulk("Si", "diamond", a=5.43), 2, 1),
    "hcp": (ase.build.bulk("Mg", "hcp", a=3.2, c=5.2), 2, 1),
    "rock salt": (ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True), 2, 4),
    "wurtzite": (ase.build.bulk("ZnO", "wurtzite", a=3.25, c=5.2, u=0.38), 4, 1),
    "bcc skewed": (
        ase.build.make_supercell(ase.build.bulk("Fe", "bcc", a=2.9), [[1, 1, 0], [0, 1, 0], [1, -1, 2]]),
        1,
        2,
    ),
}
FORMATS = {"cif": "cif", "structure.extxyz": "extxyz", "POSCAR": "vasp"}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------ named lattices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lattice": "fc"}, "no lattice 'fc'"),
        ({"repeats": (0, 1, 1)}, "repeats"),
        ({"number_density": None}, "either number_density or lattice_constant"),
        ({"lattice_constant": 1.0}, "either number_density or lattice_constant"),
        ({"number_density": -1.0}, "must be positive"),
        ({"number_density": math.nan}, "must be positive"),
        ({"number_density": None, "lattice_constant": 0.0}, "must be positive"),
    ],
)
def test_impossible_lattices_are_refused(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        lattice_crystal(**{"lattice": "fcc", "repeats": (2, 2, 2), "number_density": 1.0} | arguments)
    one_line(error)


# ------------------------------------------------------------------ structure files


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 1, 3)])
@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_files(name, repeats, format, tmp_path):
    atoms, n_basis, n_cells = STRUCTURES[name]
    file = tmp_path / (f"a.{format}" if format == "cif" else format)
    atoms.write(file, format=FORMATS[format])
    crystal = structure_crystal(file, repeats)
    n = int(np.prod(repeats))
    assert crystal.n_atoms == n * len(atoms)
    assert crystal.volume == pytest.approx(n * atoms.get_volume(), rel=1e-6)
    assert crystal.site_of.shape == (n * n_cells, n_basis)
    assert sorted(crystal.species) == sorted(n * list(atoms.get_chemical_symbols()))
    assert_group_acts_on_sites(crystal)


def test_sites_are_where_the_file_puts_them(tmp_path):
    atoms = ase.build.bulk("Si", "diamond", a=5.43)
    atoms.positions += [0.1, 0.2, 0.3]
    atoms.write(tmp_path / "a.extxyz")
    crystal = structure_crystal(tmp_path / "a.extxyz", (2, 2, 1))
    np.testing.assert_allclose(crystal.cell, np.diag([2, 2, 1]) @ atoms.cell.array, atol=1e-7)
    repeated = atoms.repeat((2, 2, 1))
    apart = modulo_cell(crystal.sites[:, None] - repeated.positions[None], crystal.cell)
    assert (np.sort(apart, axis=1)[:, 0] < 1e-6).all()


def test_a_displaced_atom_leaves_no_translation(tmp_path):
    atoms = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 2, 2))
    atoms.positions[5] += [0.2, 0.1, -0.15]
    atoms.write(tmp_path / "a.extxyz")
    crystal = structure_crystal(tmp_path / "a.extxyz")
    assert crystal.group == (1, 1, 1)
    assert crystal.site_of.shape == (1, 32)
    assert_group_acts_on_sites(crystal)


def test_small_noise_is_put_onto_the_lattice(tmp_path):
    atoms = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 2, 2))
    atoms.positions += 2e-6 * np.random.default_rng(0).standard_normal(atoms.positions.shape)
    atoms.write(tmp_path / "a.extxyz")
    crystal = structure_crystal(tmp_path / "a.extxyz")
    assert crystal.site_of.shape == (32, 1)
    assert_group_acts_on_sites(crystal)


def test_the_last_frame_of_a_trajectory_counts(tmp_path):
    from ase.io import write

    frames = [ase.build.bulk("Cu", "fcc", a=a, cubic=True) for a in (3.5, 3.6)]
    write(tmp_path / "a.extxyz", frames)
    assert structure_crystal(tmp_path / "a.extxyz").volume == pytest.approx(3.6**3, rel=1e-6)


def without_cell():
    return Atoms("Cu2", positions=[[0, 0, 0], [2, 0, 0]])


def slab():
    return ase.build.fcc111("Cu", (1, 1, 3), a=3.6)


def slab_in_vacuum():
    return ase.build.fcc111("Cu", (1, 1, 3), a=3.6, vacuum=8.0)


def coinciding():
    return Atoms("Cu2", positions=[[0, 0, 0], [4.0, 0, 1e-3]], cell=[4, 4, 4], pbc=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_cell, "no periodic cell"),
        (slab, "no periodic cell"),
        (slab_in_vacuum, "no periodic cell"),
        (coinciding, "share one place"),
        (lambda: Atoms(cell=[4, 4, 4], pbc=True), "no atoms|cannot read"),
    ],
    ids=["no cell", "slab", "slab in vacuum", "coinciding", "no atoms"],
)
def test_structures_that_are_no_crystals_are_refused(make, message, tmp_path):
    atoms = make()
    atoms.info.clear()  # the writer would warn about what the builder left here
    atoms.write(tmp_path / "a.extxyz")
    with pytest.raises(InputError, match=message) as error:
        structure_crystal(tmp_path / "a.extxyz")
    one_line(error)


@pytest.mark.parametrize("name", ["a.cif", "a.extxyz", "POSCAR", "a.xyz", "a.unknown"])
@pytest.mark.parametrize("text", ["", "garbage\nof\nsome lines\n", "\x00\x01\x02" * 100, "1\n"])
def test_unreadable_files_are_refused_in_one_line(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"structure\.file") as error:
        structure_crystal(tmp_path / name)
    assert name in one_line(error)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "nowhere.cif", tmp_path):
        with pytest.raises(InputError, match="no file") as error:
            structure_crystal(path)
        one_line(error)


def test_impossible_repeats_are_refused(tmp_path):
    ase.build.bulk("Cu").write(tmp_path / "a.extxyz")
    with pytest.raises(InputError, match="repeats"):
        structure_crystal(tmp_path / "a.extxyz", (1, 0, 1))


def test_positions_that_are_not_numbers_are_refused(tmp_path):
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.positions[1, 2] = math.nan
    atoms.write(tmp_path / "a.extxyz")
    with pytest.raises(InputError, match=r"finite|cannot read"):
        structure_crystal(tmp_path / "a.extxyz")


# ------------------------------------------------------------------ systems


def system(**changes):
    given = {
        "name": "test",
        "crystal": lattice_crystal("fcc", (3, 3, 3), number_density=1.1),
        "potential": lennard_jones(cutoff=2.0),
        "units": UNIT_STYLES["lj"],
        "temperature": 1.5,
        "thermal_wavelength": 1.0,
    }
    return crystal_system(**given | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature: must be positive"),
        ({"temperature": -1.0}, "temperature: must be positive"),
        ({"temperature": math.nan}, "temperature: must be positive"),
        ({"thermal_wavelength": 0.0}, "thermal_wavelength: must be positive"),
        ({"potential": lennard_jones(cutoff=2.5)}, "exceeds half the box"),
        ({"crystal": lattice_crystal("sc", (1, 1, 1), number_density=1.0)}, "at least 2 atoms"),
        (
            {"crystal": lattice_crystal("hcp", (2, 2, 2), number_density=1.0), "nearest_image_only": True},
            "orthorhombic",
        ),
        ({"crystal": lattice_crystal("fcc", (3, 3, 3), number_density=1e30)}, "exceeds half the box"),  # wrong unit
        (
            {"crystal": lattice_crystal("fcc", (3, 3, 3), number_density=1e120), "nearest_image_only": True},
            "not a finite",
        ),
    ],
)
def test_impossible_systems_are_refused(changes, message):
    with pytest.raises(InputError, match=message) as error:
        system(**changes)
    one_line(error)


def test_constants_of_the_convention():
    """beta F = beta U0 - ln[sqrt(N) (V / L^3) Z_u / L^(3 (N - 1))], term by term."""
    n, volume, wavelength = 108, 108 / 1.1, 0.7
    s = system(thermal_wavelength=wavelength)
    assert s.constants["centre of mass"] == pytest.approx(-0.5 * math.log(n) - math.log(volume / wavelength**3))
    assert s.constants["thermal wavelength"] == pytest.approx(3 * (n - 1) * math.log(wavelength))
    assert s.log_prefactor == pytest.approx(-sum(s.constants.values()))
    assert float(s.state.beta) == pytest.approx(1 / 1.5)
    # Lambda drops out of differences: beta F changes by 3 N ln Lambda.
    change = s.log_prefactor - system().log_prefactor
    assert change == pytest.approx(-3 * n * math.log(wavelength), rel=1e-12)


def test_atoms_off_their_sites_are_outside_the_ensemble():
    s = system()
    nearest = (4 / 1.1) ** (1 / 3) / 2**0.5
    for reach, inside in ((0.49, True), (0.51, False)):
        u = jnp.zeros((108, 3)).at[7, 0].set(reach * nearest)
        value = s.target.reduced_potential(u, s.state)
        assert np.isfinite(value) if inside else np.isposinf(value)
