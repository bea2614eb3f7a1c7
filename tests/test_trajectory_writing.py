"""Trajectories that are written: taken back by `read`, by ASE and by mdtraj, whole or not at all."""

import gzip
import os
import resource
import tracemalloc

import ase.build
import ase.io
import mdtraj
import numpy as np
import pytest
from ase import Atoms
from ase.units import kcal, mol

import freeflow as ff
from freeflow import trajectories
from freeflow.crystals import crystal_system, lattice_crystal, structure_crystal
from freeflow.errors import FreeflowError, InputError
from freeflow.geometry import face_distances
from freeflow.potentials import lennard_jones
from freeflow.trajectories import compare_energies, energies, read, require_writable, to_displacements, write
from freeflow.units import UNIT_STYLES

ASE_FORMATS = ["extxyz", "xyz", "extxyz.gz", "xyz.gz", "traj"]
MDTRAJ_FORMATS = ["xtc", "dcd", "trr", "h5", "pdb"]
WITH_TOPOLOGY = {"xtc", "dcd", "trr", "lammpstrj"}
# What a format keeps of a coordinate near 10; others are held to float32.
ROUNDING = {"xtc": 1e-2, "pdb": 1e-3, "lammpstrj": 1e-8, "traj": 0.0, **dict.fromkeys(ASE_FORMATS[:4], 1e-8)}
SYSTEMS = ["lj", "hcp", "ice", "salt"]


def argon(crystal, units, cutoff=1.6):
    return crystal_system("test", crystal, lennard_jones(1.0, 1.0, cutoff, True), UNIT_STYLES[units], 2.0, 1.0)


@pytest.fixture(scope="module")
def lj():
    return ff.load("lj_fcc_32")


@pytest.fixture(scope="module")
def ice():
    return ff.load("mw_cubic_64")


@pytest.fixture(scope="module")
def hcp():
    """Triclinic, laid as LAMMPS and GROMACS lay cells."""
    return argon(lattice_crystal("hcp", (4, 4, 3), number_density=1.28), "lj")


@pytest.fixture(scope="module")
def salt(tmp_path_factory):
    """Triclinic, two elements, and no vector of the cell along x."""
    file = tmp_path_factory.mktemp("salt") / "POSCAR"
    ase.io.write(file, ase.build.bulk("NaCl", "rocksalt", a=2.0).repeat((3, 4, 3)), format="vasp")
    return argon(structure_crystal(file), "metal", 1.2)


@pytest.fixture
def system(request):
    return request.getfixturevalue(request.param)


def displacements(system, n_frames=5, seed=0):
    reach = face_distances(system.crystal.cell).min() / 100
    u = np.random.default_rng(seed).normal(0, reach, (n_frames, system.n_atoms, 3))
    return u - u.mean(axis=1, keepdims=True)


def rounding(kind):
    return 0.51 * ROUNDING.get(kind, 2e-6) + 1e-12


def shapes(cells):
    """Lengths and angles: what is left of cells when the orientation is not looked at."""
    return np.array([Atoms(cell=cell).cell.cellpar() for cell in cells])


def distances(positions):
    """Between all pairs of atoms, whichever way the frames are turned."""
    return np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("kind", [*ASE_FORMATS, *MDTRAJ_FORMATS, "lammpstrj"])
@pytest.mark.parametrize("system", SYSTEMS, indirect=True)
def test_frames_come_back_without_being_asked_for(system, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("freeflow.trajectories.writing._CHUNK", 2 * 3 * system.n_atoms)
    path, u = tmp_path / f"a.{kind}", displacements(system)
    files = write(path, system, u)
    expected = [path, tmp_path / "a.topology.pdb"] if kind in WITH_TOPOLOGY else [path]
    assert files == expected and sorted(tmp_path.iterdir()) == sorted(expected)
    frames = list(read(path, system, chunk=2))
    x = np.concatenate([part.positions for part in frames])
    np.testing.assert_allclose(x, system.crystal.sites + u, rtol=0, atol=3 * rounding(kind))
    cells = np.concatenate([part.cells for part in frames])
    np.testing.assert_allclose(cells, np.tile(system.crystal.cell, (5, 1, 1)), rtol=0, atol=2e-3)
    found = to_displacements(x, system.crystal, frames[0].species)
    np.testing.assert_allclose(found.displacements, u, rtol=0, atol=6 * rounding(kind))
    assert all(np.isnan(part.energies).all() for part in frames)
    for topology in expected[1:]:
        (perfect,) = read(topology, system)
        np.testing.assert_allclose(perfect.positions[0], system.crystal.sites, atol=1e-3)
        assert len(list(read(path, system, topology=topology))) == 1


@pytest.mark.parametrize("kind", MDTRAJ_FORMATS)
@pytest.mark.parametrize("system", SYSTEMS, indirect=True)
def test_as_mdtraj_reads_them(system, kind, tmp_path, capfd):
    """Cell and atoms must lie the same way: minimum images are then those of the crystal."""
    u = displacements(system)
    files = write(tmp_path / f"a.{kind}", system, u)
    assert capfd.readouterr().out == ""
    theirs = mdtraj.load(str(files[0]), **({"top": str(files[1])} if len(files) > 1 else {}))
    x = system.crystal.sites + u
    assert theirs.n_frames == 5
    np.testing.assert_allclose(distances(10 * theirs.xyz), distances(x), rtol=0, atol=4 * rounding(kind))
    if kind == "pdb" and system.units.name == "lj":
        assert theirs.unitcell_vectors is None  # mdtraj believes no cell that dense; `read` does
        return
    np.testing.assert_allclose(
        shapes(10 * theirs.unitcell_vectors), np.tile(shapes([system.crystal.cell]), (5, 1)), rtol=2e-5, atol=2e-3
    )
    known = [name for name in system.crystal.species if name != "X"]
    if known:
        assert [atom.element.symbol for atom in theirs.topology.atoms] == known
    pairs = np.array([(0, k) for k in range(1, system.n_atoms)])
    nearest = 10 * mdtraj.compute_distances(theirs, pairs, periodic=True).min()
    d = (x[:, 1:] - x[:, :1]) @ np.linalg.inv(system.crystal.cell)
    shifts = np.indices((3, 3, 3)).reshape(3, -1).T - 1
    images = (d - np.rint(d))[:, :, None] + shifts
    expected = np.linalg.norm(images @ system.crystal.cell, axis=-1).min()
    assert nearest == pytest.approx(expected, abs=4 * rounding(kind))


@pytest.mark.parametrize("kind", ASE_FORMATS)
@pytest.mark.parametrize("system", SYSTEMS, indirect=True)
def test_as_ase_reads_them(system, kind, tmp_path):
    u = displacements(system)
    (file,) = write(tmp_path / f"a.{kind}", system, u)
    images = ase.io.read(file, ":")
    np.testing.assert_allclose(
        [atoms.positions for atoms in images], system.crystal.sites + u, rtol=0, atol=rounding(kind)
    )
    for atoms in images:
        np.testing.assert_allclose(atoms.cell.array, system.crystal.cell, rtol=1e-12, atol=1e-12)
        assert atoms.pbc.all() and atoms.calc is None
        assert tuple(atoms.get_chemical_symbols()) == system.crystal.species


@pytest.mark.parametrize("system", SYSTEMS, indirect=True)
def test_dumps_as_ase_and_mdtraj_read_them(system, tmp_path):
    u = displacements(system)
    files = write(tmp_path / "a.lammpstrj", system, u)
    x = system.crystal.sites + u
    images = ase.io.read(files[0], ":", format="lammps-dump-text", units="metal")  # angstrom
    np.testing.assert_allclose(distances(np.array([a.positions for a in images])), distances(x), rtol=0, atol=1e-7)
    theirs = mdtraj.load(str(files[0]), top=str(files[1]))
    np.testing.assert_allclose(distances(10 * theirs.xyz), distances(x), rtol=0, atol=1e-5)
    for cells in ([a.cell.array for a in images], 10 * theirs.unitcell_vectors):
        np.testing.assert_allclose(shapes(cells), np.tile(shapes([system.crystal.cell]), (5, 1)), rtol=1e-6, atol=1e-4)
    if "X" not in system.crystal.species:
        assert all(tuple(a.get_chemical_symbols()) == system.crystal.species for a in images)


# ------------------------------------------------------------------ energies


@pytest.mark.parametrize("kind", ASE_FORMATS)
@pytest.mark.parametrize("system", ["lj", "ice", "salt"], indirect=True)
def test_energies_go_along_in_the_unit_of_the_format(system, kind, tmp_path):
    u = displacements(system)
    ours = energies(system, u)
    (file,) = write(tmp_path / f"a.{kind}", system, u, ours)
    ev = {"lj": 1.0, "real": kcal / mol, "metal": 1.0}[system.units.name]  # ASE's constants, of CODATA 2014
    stored = np.array([atoms.get_potential_energy() for atoms in ase.io.read(file, ":")])
    np.testing.assert_allclose(stored, ev * ours, rtol=2e-8)
    (frames,) = read(file, system)
    same = compare_energies(frames.energies, ours, 0.0, system.units)
    assert same.agrees and same.n_frames == 5
    assert same.unit == ("eV" if system.units.name != "lj" else "epsilon")


def test_energies_that_are_none(ice, tmp_path):
    ours = np.array([-1.0, np.inf, np.nan, -2.0, -3.0])
    for kind in ("extxyz", "traj"):
        write(tmp_path / f"a.{kind}", ice, displacements(ice), ours)
        (frames,) = read(tmp_path / f"a.{kind}", ice)
        np.testing.assert_array_equal(np.isnan(frames.energies), ~np.isfinite(ours))


# ------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("kind", ["xtc", "h5", "pdb", "extxyz.gz", "traj", "lammpstrj"])
def test_existing_files_are_replaced_and_faults_leave_them(lj, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("freeflow.trajectories.writing._CHUNK", 2 * 3 * lj.n_atoms)
    path, u = tmp_path / f"a.{kind}", displacements(lj)
    path.write_text("something else")
    files = write(path, lj, u)
    before = {file: file.read_bytes() for file in files}
    u[3, 7, 1] = np.nan
    with pytest.raises(InputError, match="frame 3 holds displacements that are not finite numbers"):
        write(path, lj, 2 * u)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_a_writer_raises_becomes_one_line(lj, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mdtraj.formats.PDBTrajectoryFile.write", full)
    for kind in ("dcd", "pdb"):
        with pytest.raises(FreeflowError, match=rf"a.{kind}: cannot be written: No space left on device"):
            write(tmp_path / f"a.{kind}", lj, displacements(lj))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["xtc", "dcd", "trr", "h5", "pdb", "lammpstrj", "extxyz.gz", "traj"])
def test_a_full_disk_is_noticed(lj, kind, tmp_path):
    path, u = tmp_path / f"a.{kind}", displacements(lj, 200)
    files = write(path, lj, u)
    before = {file: file.read_bytes() for file in files}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[path]) // 2, limits[1]))
    try:
        with pytest.raises(FreeflowError, match="cannot be written") as error:
            write(path, lj, u)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_links_are_written_through(lj, tmp_path):
    (tmp_path / "there").mkdir()
    os.symlink(tmp_path / "there" / "b.xyz", tmp_path / "a.xyz")
    write(tmp_path / "a.xyz", lj, displacements(lj))
    assert (tmp_path / "a.xyz").is_symlink() and (tmp_path / "there" / "b.xyz").is_file()


def test_gzip_only_where_the_name_says_so(lj, tmp_path):
    write(tmp_path / "a.XYZ.gz", lj, displacements(lj, 1))
    assert gzip.decompress((tmp_path / "a.XYZ.gz").read_bytes()).startswith(b"32\n")


@pytest.mark.parametrize("kind", ["dcd", "xtc", "h5", "lammpstrj"])
def test_no_second_copy_of_everything(lj, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("freeflow.trajectories.writing._CHUNK", 2**12)
    u = np.zeros((600, 32, 3))
    write(tmp_path / f"b.{kind}", lj, u[:50])  # modules are loaded
    tracemalloc.start()
    write(tmp_path / f"a.{kind}", lj, u)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < u.nbytes


# ------------------------------------------------------------------ refused before the work


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.foo", r"a.foo: unknown kind of trajectory; write one of \.xtc, \.dcd"),
        ("a.xtc.gz", r"unknown kind of trajectory; write one of"),
        ("trajectory", "unknown kind of trajectory"),
        ("none/a.xtc", "there is no directory .*none"),
        ("folder.dcd", "folder.dcd: cannot be written: it is a directory"),
        ("b.dcd", "b.topology.pdb: cannot be written: it is a directory"),
        ("pipe.xyz", "pipe.xyz: cannot be written: it is no file"),
    ],
)
def test_impossible_targets(name, message, lj, tmp_path):
    (tmp_path / "folder.dcd").mkdir()
    (tmp_path / "b.topology.pdb").mkdir()
    os.mkfifo(tmp_path / "pipe.xyz")
    for call in (require_writable, lambda *a: write(*a, displacements(lj))):
        with pytest.raises(InputError, match=message) as error:
            call(tmp_path / name, lj)
        assert "\n" not in str(error.value)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_directory_without_permission(lj, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="no permission"):
        require_writable(tmp_path / "closed" / "a.xtc", lj)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no file system here that nobody can write to")
def test_a_place_where_nobody_can_write(lj):
    """Permissions say that the superuser may, as on file systems that are read-only."""
    with pytest.raises(FreeflowError, match=r"/proc/a.xtc: cannot be written"):
        require_writable("/proc/a.xtc", lj)


def test_elements_and_coordinates_that_a_format_cannot_hold(tmp_path):
    def crystal(name, a):
        ase.io.write(tmp_path / "POSCAR", ase.build.bulk(name, "fcc", a=a, cubic=True).repeat(2), format="extxyz")
        (tmp_path / "POSCAR").rename(tmp_path / "a.xyz")
        return argon(structure_crystal(tmp_path / "a.xyz"), "metal", 0.9 * a)

    heavy, wide = crystal("Og", 4.0), crystal("Ar", 6000.0)
    for kind in ("pdb", "h5", "dcd"):
        with pytest.raises(InputError, match=r"knows no element Og; write \.extxyz or \.traj"):
            require_writable(tmp_path / f"b.{kind}", heavy)
    for kind in ("pdb", "dcd", "lammpstrj"):
        with pytest.raises(InputError, match="cannot hold coordinates outside -999 to 9999"):
            require_writable(tmp_path / f"b.{kind}", wide)
    for kind in ("traj", "extxyz"):
        for system in (heavy, wide):
            u = displacements(system)
            write(tmp_path / f"b.{kind}", system, u)
            (frames,) = read(tmp_path / f"b.{kind}", system)
            np.testing.assert_allclose(frames.positions, system.crystal.sites + u, rtol=0, atol=1e-8)
            assert frames.species == system.crystal.species
    write(tmp_path / "b.h5", wide, displacements(wide))


def test_arrays_that_do_not_fit(lj, tmp_path):
    u = displacements(lj)
    for given, message in (
        ((u[:, :31],), "5 frames of 31 atoms; the system has 32"),
        ((u[:0],), "0 frames"),
    ):
        with pytest.raises(InputError, match=message):
            write(tmp_path / "a.xtc", lj, *given)
    assert not list(tmp_path.iterdir())


def test_many_frames_of_pdb(lj, tmp_path):
    """Model numbers have four digits."""
    small = ff.load("mw_cubic_8")
    write(tmp_path / "a.pdb", small, np.zeros((10_001, 8, 3)))
    models = [line for line in (tmp_path / "a.pdb").open() if line.startswith("MODEL")]
    assert len(models) == 10_001 and {len(line.rstrip()) for line in models} == {14}


def test_the_public_names():
    assert {"write", "require_writable"} <= set(trajectories.__all__)
