"""Trajectories in every format, damaged ones, frames to displacements, and energies.

Random frames fix their seeds. Where a bound is statistical it is five standard deviations or more.
"""

import gzip
import math
from pathlib import Path

import ase.build
import ase.io
import jax
import mdtraj
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import freeflow as ff
from freeflow import trajectories
from freeflow.crystals import crystal_system, lattice_crystal, structure_crystal
from freeflow.errors import InputError
from freeflow.geometry import nearest_neighbour_distance
from freeflow.potentials import lennard_jones
from freeflow.trajectories import apart, compare_energies, energies, energy_precision, read, to_displacements
from freeflow.trajectories.blocks import cell_of
from freeflow.units import UNIT_STYLES

REFDATA = Path(__file__).resolve().parents[2] / "shared" / "refdata"
FORMATS = [
    "lammpstrj",
    "extxyz",
    "extxyz.gz",
    "traj",
    "pdb",
    "dcd",
    "xtc",
    "trr",
    "h5",
]
ROUNDING = {"lammpstrj": 1e-6, "extxyz": 1e-8, "extxyz.gz": 1e-8, "traj": 0.0, "pdb": 1e-3, "xtc": 1e-2}


def lj_system(crystal, cutoff=1.6, units="lj"):
    return crystal_system("test", crystal, lennard_jones(1.0, 1.0, cutoff, True), UNIT_STYLES[units], 2.0, 1.0)


@pytest.fixture(scope="module")
def ice():
    return ff.load("mw_cubic_64")


@pytest.fixture(scope="module")
def hcp():
    return lj_system(lattice_crystal("hcp", (4, 4, 3), number_density=1.28))


@pytest.fixture(scope="module")
def salt(tmp_path_factory):
    """Two species, in the primitive cell of fcc, whose vectors do not lie as LAMMPS or mdtraj lay them."""
    file = tmp_path_factory.mktemp("salt") / "POSCAR"
    ase.io.write(file, ase.build.bulk("NaCl", "rocksalt", a=2.0).repeat((3, 4, 3)), format="vasp")
    return lj_system(structure_crystal(file), cutoff=1.2, units="metal")


@pytest.fixture(scope="module")
def fcc():
    return ff.load("lj_fcc_32")


@pytest.fixture
def system(request):
    return request.getfixturevalue(request.param)


def displacements(crystal, n_frames, seed=0, size=0.06):
    """Mean-free displacements, Gaussian, by default of a twelfth of the hopping distance."""
    rng = np.random.default_rng(seed)
    u = rng.normal(0, size * nearest_neighbour_distance(crystal), (n_frames, crystal.n_atoms, 3))
    return u - u.mean(axis=1, keepdims=True)


def wrapped(x, cell):
    fractional = x @ np.linalg.inv(cell)
    return (fractional - np.floor(fractional)) @ cell


def drifting(crystal, n_frames, seed=0):
    """Displacements, and the same frames drifting by several cells and wrapped."""
    u = displacements(crystal, n_frames, seed)
    drift = np.random.default_rng(seed + 1).normal(0, 3 * crystal.cell.max(), (n_frames, 1, 3))
    return u, wrapped(crystal.sites + u + drift, crystal.cell)


# ------------------------------------------------------------------ writers


def write_dump(path, x, cell, columns="x", origin=0.0, shuffle=True, head="", element=None):
    """LAMMPS text dump, lines in random order; cells are diagonal or lower triangular."""
    rng, lines = np.random.default_rng(9), []
    xy, xz, yz = cell[1, 0], cell[2, 0], cell[2, 1]
    tilt = [[xy], [xz], [yz]] if np.any([xy, xz, yz]) else [[], [], []]
    low = origin + np.array([min(0, xy, xz, xy + xz), min(0, yz), 0]) * bool(tilt[0])
    high = origin + np.diag(cell) + np.array([max(0, xy, xz, xy + xz), max(0, yz), 0]) * bool(tilt[0])
    for step, frame in enumerate(x):
        values = (frame - origin) @ np.linalg.inv(cell) if "s" in columns else frame
        lines += [f"{head}ITEM: TIMESTEP", f"{step}", "ITEM: NUMBER OF ATOMS", f"{len(frame)}"]
        lines += [f"ITEM: BOX BOUNDS {'xy xz yz ' if tilt[0] else ''}pp pp pp"]
        lines += [" ".join(f"{v:.12g}" for v in (low[k], high[k], *tilt[k])) for k in range(3)]
        names = [columns.replace("x", axis, 1) for axis in "xyz"]
        lines += [f"ITEM: ATOMS id type {' '.join(names)}{' element' if element else ''}"]
        for i in rng.permutation(len(frame)) if shuffle else range(len(frame)):
            tail = f" {element[i]}" if element else ""
            lines.append(f"{i + 1} 1 " + " ".join(f"{v:.6f}" for v in values[i]) + tail)
    Path(path).write_text("\n".join(lines) + "\n")


def images(x, cell, symbols, energy=None):
    for k, frame in enumerate(x):
        atoms = Atoms(symbols, positions=frame, cell=cell, pbc=True)
        if energy is not None:
            atoms.calc = SinglePointCalculator(atoms, energy=energy[k])
        yield atoms


def write(path, system, x, energy=None, cell=None, nm=False):
    """Any format, as another program would; `nm` stores one unit of length as a nanometre."""
    cell = system.crystal.cell if cell is None else cell
    kind = path.name.partition(".")[2]
    if kind == "lammpstrj":
        return write_dump(path, x, cell)
    if kind.startswith("extxyz") or kind == "traj":
        return ase.io.write(path, list(images(x, cell, system.crystal.species, energy)))
    scale = 1.0 if nm else 0.1
    made = mdtraj.Trajectory(np.asarray(x * scale, np.float32), trajectories.topology(system))
    made.unitcell_vectors = np.tile(np.asarray(cell * scale, np.float32), (len(x), 1, 1))
    return made.save(str(path))


def together(chunks):
    chunks = list(chunks)
    return np.concatenate([chunk.positions for chunk in chunks]), chunks


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("system", ["ice", "hcp", "fcc"], indirect=True)
def test_every_format_gives_the_frames_back(system, kind, tmp_path):
    _, x = drifting(system.crystal, 11)
    path = tmp_path / f"a.{kind}"
    write(path, system, x)
    back, chunks = together(read(path, system, chunk=4))
    rounding = ROUNDING.get(kind, 3e-6)
    assert [len(chunk.positions) for chunk in chunks] == [4, 4, 3]
    assert [chunk.index for chunk in chunks] == [0, 4, 8]
    np.testing.assert_allclose(back, x, rtol=0, atol=0.51 * rounding + 1e-12)
    np.testing.assert_allclose(chunks[1].cells, np.tile(system.crystal.cell, (4, 1, 1)), rtol=0, atol=2e-3)
    if kind in ROUNDING and rounding:
        assert chunks[0].resolution == pytest.approx(rounding)
    else:
        assert chunks[0].resolution < 3e-6
    assert np.isnan(chunks[0].energies).all()
    part, chunks = together(read(path, system, start=2, stop=9, stride=3, chunk=2))
    np.testing.assert_array_equal(part, back[2:9:3])
    assert [chunk.index for chunk in chunks] == [2, 8]


@pytest.mark.parametrize("columns", ["x", "xu", "xs", "xsu"])
@pytest.mark.parametrize("system", ["ice", "hcp"], indirect=True)
def test_dumps_with_scaled_and_unwrapped_columns(system, columns, tmp_path):
    u = displacements(system.crystal, 3)
    x = system.crystal.sites + u + 1.7
    x = x if "u" in columns else wrapped(x, system.crystal.cell) - 0.3
    write_dump(tmp_path / "a.dump", x, system.crystal.cell, columns, origin=-0.3)
    (frames,) = read(tmp_path / "a.dump", system)
    np.testing.assert_allclose(frames.positions, x, rtol=0, atol=1.5e-6 * np.abs(system.crystal.cell).max())
    np.testing.assert_allclose(to_displacements(frames.positions, system.crystal).displacements, u, atol=2e-5)
    theirs = ase.io.read(tmp_path / "a.dump", ":", format="lammps-dump-text")
    shift = x[0, 0] - theirs[0].positions[0]  # ASE moves scaled coordinates to an origin of its own
    np.testing.assert_allclose(frames.positions, [a.positions + shift for a in theirs], rtol=0, atol=1e-5)


def test_dcd_and_pdb_as_mdtraj_reads_them(ice, tmp_path):
    x = displacements(ice.crystal, 5) + ice.crystal.sites
    for kind in ("dcd", "pdb"):
        write(tmp_path / f"a.{kind}", ice, x)
        theirs = mdtraj.load(str(tmp_path / f"a.{kind}"), top=trajectories.topology(ice))
        (ours,) = read(tmp_path / f"a.{kind}", ice)
        np.testing.assert_allclose(ours.positions, 10 * theirs.xyz, rtol=0, atol=2e-6)
        np.testing.assert_allclose(ours.cells, 10 * theirs.unitcell_vectors, rtol=0, atol=2e-6)


def test_dcd_of_the_other_endianness_and_with_angles_in_degrees(hcp, tmp_path):
    x = displacements(hcp.crystal, 3) + hcp.crystal.sites
    write(tmp_path / "a.dcd", hcp, x)
    raw, n = (tmp_path / "a.dcd").read_bytes(), hcp.n_atoms
    title = 92 + 8 + int.from_bytes(raw[92:96], "little")
    swap = lambda part, kind="u4": np.frombuffer(part, kind).byteswap().tobytes()  # noqa: E731
    out = swap(raw[:4]) + raw[4:8] + swap(raw[8:92]) + swap(raw[92:100]) + raw[100 : title - 4]
    out += swap(raw[title - 4 : title + 12])
    size = 56 + 3 * (4 * n + 8)
    for first in range(title + 12, len(raw), size):
        cell = np.frombuffer(raw[first + 4 : first + 52]).copy()
        cell[[1, 3, 4]] = np.degrees(np.arccos(cell[[1, 3, 4]]))
        out += swap(raw[first : first + 4]) + cell.astype(">f8").tobytes() + swap(raw[first + 52 : first + size])
    (tmp_path / "b.dcd").write_bytes(out)
    (ours,), (theirs,) = (read(tmp_path / name, hcp) for name in ("b.dcd", "a.dcd"))
    np.testing.assert_array_equal(ours.positions, theirs.positions)
    np.testing.assert_allclose(ours.cells, theirs.cells, atol=1e-6)


def test_a_script_beside_stands_in_for_no_module(ice, tmp_path, monkeypatch):
    """The process that decodes XTC runs in the user's folder, where anything may lie."""
    x = ice.crystal.sites + displacements(ice.crystal, 2)
    write(tmp_path / "a.xtc", ice, x)
    (tmp_path / "struct.py").write_text("raise SystemExit(3)")
    (tmp_path / "numpy.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    (frames,) = read("a.xtc", ice)
    np.testing.assert_allclose(frames.positions, x, rtol=0, atol=2e-2)


def test_cells_of_lengths_and_angles():
    shapes = np.random.default_rng(2).uniform([1, 1, 1, 70, 70, 70], [9, 9, 9, 110, 110, 110], (20, 6))
    expected = [ase.geometry.cellpar_to_cell(shape) for shape in shapes]
    np.testing.assert_allclose(cell_of(shapes[:, :3], shapes[:, 3:]), expected, atol=1e-12)
    impossible = cell_of(np.ones((2, 3)), np.array([[30.0, 30.0, 100.0], [90.0, 90.0, 90.0]]))
    assert np.isinf(impossible[0]).all() and np.array_equal(impossible[1], np.eye(3))


@pytest.mark.parametrize("kind", ["dcd", "xtc", "extxyz", "lammpstrj"])
def test_turned_cells_are_turned_back(salt, kind, tmp_path):
    u, x = drifting(salt.crystal, 3)
    # As LAMMPS lays the cell: a along x, b in the xy plane; the atoms turn with it.
    lengths, angles = Atoms(cell=salt.crystal.cell).cell.cellpar()[:3], Atoms(cell=salt.crystal.cell).cell.cellpar()[3:]
    cell = ase.geometry.cellpar_to_cell([*lengths, *angles])
    write(tmp_path / f"a.{kind}", salt, x @ np.linalg.inv(salt.crystal.cell) @ cell, cell=cell)
    (frames,) = read(tmp_path / f"a.{kind}", salt)
    np.testing.assert_allclose(frames.positions, x, rtol=0, atol=2e-2 if kind == "xtc" else 2e-5)
    found = to_displacements(frames.positions, salt.crystal)
    np.testing.assert_allclose(found.displacements, u, rtol=0, atol=2e-2 if kind == "xtc" else 2e-5)
    if kind in {"dcd", "xtc"}:
        # mdtraj keeps the atoms where they are, and lengths and angles of the cell.
        write(tmp_path / f"b.{kind}", salt, x)
        (frames,) = read(tmp_path / f"b.{kind}", salt)
        np.testing.assert_allclose(frames.positions, x, rtol=0, atol=2e-2 if kind == "xtc" else 2e-5)


@pytest.mark.parametrize("kind", ["dcd", "xtc", "trr", "pdb", "h5"])
def test_the_cell_tells_how_a_sigma_is_stored(fcc, kind, tmp_path):
    x = displacements(fcc.crystal, 2) + fcc.crystal.sites
    for nm, name in ((False, "angstrom"), (True, "nm")):
        write(tmp_path / f"a.{kind}", fcc, x, nm=nm)
        (frames,) = read(tmp_path / f"a.{kind}", fcc)
        np.testing.assert_allclose(frames.positions, x, rtol=0, atol=6e-3)
        (said,) = read(tmp_path / f"a.{kind}", fcc, sigma=name)
        np.testing.assert_array_equal(said.positions, frames.positions)
    if kind in {"dcd", "trr"}:
        made = mdtraj.Trajectory(np.asarray(x, np.float32), trajectories.topology(fcc))
        made.save(str(tmp_path / f"b.{kind}"))
        with pytest.raises(InputError, match="1 sigma is stored as 1 angstrom or 1 nm; give sigma="):
            next(read(tmp_path / f"b.{kind}", fcc))
        (frames,) = read(tmp_path / f"b.{kind}", fcc, sigma="nm")
        np.testing.assert_allclose(frames.positions, x, rtol=0, atol=1e-5)
        assert np.isnan(frames.cells).all()


def test_energies_and_species_of_a_file(salt, tmp_path):
    x, energy = displacements(salt.crystal, 3) + salt.crystal.sites, np.array([-1.5, 2.25, 1e3])
    for kind in ("extxyz", "extxyz.gz", "traj"):
        write(tmp_path / f"a.{kind}", salt, x, energy)
        (frames,) = read(tmp_path / f"a.{kind}", salt)
        np.testing.assert_allclose(frames.energies, energy)
        assert frames.species == salt.crystal.species


def test_a_fault_at_the_end_leaves_what_stands_before(ice, tmp_path):
    path = tmp_path / "a.lammpstrj"
    write(path, ice, displacements(ice.crystal, 6) + ice.crystal.sites)
    text = path.read_text()
    path.write_text(text[:-40])
    frames = read(path, ice, chunk=2)
    assert [next(frames).index, next(frames).index, next(frames).index] == [0, 2, 4]
    with pytest.raises(InputError, match="frame 5: the file ends after 63 of 64 atoms"):
        next(frames)
    assert len(together(read(path, ice, stop=5))[0]) == 5
    # A last number may be cut short without looking wrong.
    path.write_text(text[:-3])
    with pytest.raises(InputError, match="truncated"):
        list(read(path, ice))


# ------------------------------------------------------------------ bad input


def damaged(change):
    """A dump of ice with its text changed."""

    def make(path, system, x):
        write_dump(path, x, system.crystal.cell, shuffle=False)
        path.write_text(change(path.read_text()))

    return "a.lammpstrj", make


def plain(name, text):
    return name, lambda path, *_: path.write_text(text)


def cut(kind, share=0.7):
    def make(path, system, x):
        write(path, system, x)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return f"a.{kind}", make


def other(kind, **change):
    def make(path, system, x):
        write(path, system, x * change.get("factor", 1.0), cell=system.crystal.cell * change.get("factor", 1.0))

    return f"a.{kind}", make


def fewer(kind):
    def make(path, system, x):
        small = ff.load("mw_cubic_8")
        write(path, small, x[:, :8], cell=system.crystal.cell)

    return f"a.{kind}", make


def with_nan(kind):
    def make(path, system, x):
        x = x.copy()
        x[2, 7, 1] = np.nan
        write(path, system, x)

    return f"a.{kind}", make


def corrupt_dcd(path, system, x):
    write(path, system, x)
    raw = bytearray(path.read_bytes())
    raw[-900:-820] = b"\xff" * 80
    path.write_bytes(bytes(raw))


def without_last_frame(path, system, x):
    write(path, system, x)
    path.write_bytes(path.read_bytes()[: -(56 + 3 * (4 * system.n_atoms + 8))])


def cut_gzip(path, system, x):
    write(path, system, x)
    path.write_bytes(path.read_bytes()[:-2000])


BAD = {
    "missing": (("none.dcd", lambda *_: None), "no such file"),
    "empty": (plain("a.xtc", ""), "the file is empty"),
    "unknown": (plain("a.foo", "x"), r"unknown kind of trajectory; use one of .lammpstrj"),
    "no extension": (plain("trajectory", "x"), "unknown kind of trajectory"),
    "zipped binary": (plain("a.dcd.gz", "x"), "gunzip it first"),
    "not gzip": (plain("a.extxyz.gz", "no gzip"), "cannot be read as extended XYZ"),
    "cut gzip": (("a.extxyz.gz", cut_gzip), "truncated or corrupted"),
    "no frames": (plain("a.lammpstrj", "\n"), "the file holds no frames"),
    "no frames pdb": (plain("a.pdb", "REMARK nothing\nEND\n"), "the file holds no frames"),
    "other text": (plain("a.lammpstrj", "hello\n" * 9), "starts with ITEM:, got 'hello'"),
    "other text xyz": (plain("a.xyz", "hello\n" * 9), "expected a number of atoms, got 'hello'"),
    **{
        f"other text {kind}": (plain(f"a.{kind}", "hello\n" * 99), message)
        for kind, message in (
            ("dcd", "not a DCD file"),
            ("xtc", "cannot be read as XTC"),
            ("trr", "cannot be read as TRR"),
            ("traj", "cannot be read as an ASE trajectory"),
        )
    },
    **{
        f"cut {kind}": (cut(kind), message)
        for kind, message in (
            ("dcd", "frame 2; is it truncated"),
            ("xtc", "truncated or corrupted"),
            ("trr", "truncated or corrupted"),
            ("traj", "truncated or corrupted"),
            ("h5", "cannot be read as HDF5"),
            ("pdb", "frame 2: .*is it truncated"),
            ("extxyz", "frame 2: .*is it truncated"),
            ("lammpstrj", "frame 2: .*is it truncated"),
        )
    },
    "short dcd": (("a.dcd", without_last_frame), "the header announces 4 frames, the file holds 3"),
    "corrupt dcd": (("a.dcd", corrupt_dcd), "frame 2: the records of the DCD file are corrupted"),
    **{
        f"atoms {kind}": (fewer(kind), "8 atoms, but the system has 64")
        for kind in ("lammpstrj", "extxyz", "traj", "pdb", "dcd", "xtc", "trr")
    },
    **{
        f"cell {kind}": (
            other(kind, factor=1.01),
            r"frame 0: the cell 12.524 x .* is not the system's 12.4 x .*strain 0.01",
        )
        for kind in ("lammpstrj", "extxyz", "traj", "pdb", "dcd", "xtc", "trr")
    },
    "nanometres": (other("extxyz", factor=0.1), "it is 0.1 times as long: are its lengths in another unit"),
    **{
        f"nan {kind}": (with_nan(kind), r"frame 2: atom 7 \(from 0\) has coordinates that are not finite")
        for kind in ("lammpstrj", "extxyz", "traj", "dcd", "trr")
    },
    "far": (
        damaged(lambda text: text.replace("\n7 1 ", "\n7 1 1e200 0 0 ", 1)),
        "frame 0: atom 6 .* has a coordinate of 1e\\+200, which is beyond any box",
    ),
    "units": (
        damaged(lambda text: text.replace("ITEM: TIMESTEP", "ITEM: UNITS\nlj\nITEM: TIMESTEP", 1)),
        "frame 0: the dump is in lj units, the system in real",
    ),
    "columns": (damaged(lambda text: text.replace("type x y z", "type vx vy vz")), "no columns x y z"),
    "mixed columns": (damaged(lambda text: text.replace("type x y z", "type x ys z")), "no columns x y z"),
    "words": (damaged(lambda text: text.replace("\n7 1 ", "\n7 1 oh", 1)), "not the columns of numbers"),
    "same id": (damaged(lambda text: text.replace("\n7 1 ", "\n8 1 ", 1)), "two atoms have the same id"),
    "boundaries": (damaged(lambda text: text.replace("pp pp pp", "pp pp ff", 1)), "boundaries pp pp ff"),
    "no box": (damaged(lambda text: text.replace("\n0 12.4", "\nzero 12.4", 1)), "BOX BOUNDS are not"),
    "changing": (
        damaged(lambda text: "63\nITEM: BOX".join(text[: text.rindex("\n64 1 ") + 1].rsplit("64\nITEM: BOX", 1))),
        "frame 3: 63 atoms, but the system has 64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(case, ice, tmp_path):
    (name, make), message = BAD[case]
    path = tmp_path / name
    make(path, ice, ice.crystal.sites + displacements(ice.crystal, 4))
    with pytest.raises(InputError, match=message) as error:
        list(read(path, ice))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


def test_wrong_species_and_topologies(salt, ice, tmp_path):
    x = salt.crystal.sites[None]
    swapped = tuple({"Na": "K"}.get(name, name) for name in salt.crystal.species)
    ase.io.write(tmp_path / "a.extxyz", list(images(x, salt.crystal.cell, swapped)))
    with pytest.raises(InputError, match="frame 0: the file holds Cl36 K36, the system Cl36 Na36"):
        list(read(tmp_path / "a.extxyz", salt))
    cell = ase.geometry.cellpar_to_cell(Atoms(cell=salt.crystal.cell).cell.cellpar())
    write_dump(tmp_path / "a.dump", x @ np.linalg.inv(salt.crystal.cell) @ cell, cell, element=swapped)
    with pytest.raises(InputError, match="the file holds Cl36 K36"):
        list(read(tmp_path / "a.dump", salt))
    write(tmp_path / "a.dcd", salt, x)
    write(tmp_path / "ice.pdb", ice, ice.crystal.sites[None])
    with pytest.raises(InputError, match=r"ice.pdb: 64 atoms, but the system has 72"):
        read(tmp_path / "a.dcd", salt, topology=tmp_path / "ice.pdb")
    write(tmp_path / "salt.pdb", salt, x)
    assert next(read(tmp_path / "a.dcd", salt, topology=tmp_path / "salt.pdb")).positions.shape == (1, 72, 3)
    text = (tmp_path / "salt.pdb").read_text().replace("          Na", "           K")
    (tmp_path / "salt.pdb").write_text(text)
    with pytest.raises(InputError, match="the file holds Cl36 K36"):
        read(tmp_path / "a.dcd", salt, topology=tmp_path / "salt.pdb")
    for name, message in (("none.pdb", "no such file"), ("a.dcd", "reads no topology")):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "a.dcd", salt, topology=tmp_path / name)


@pytest.mark.parametrize("kind", ["xtc", "h5"])
@pytest.mark.parametrize(
    ("does", "said"), [("kill -SEGV $$", "SIGSEGV"), ("exec sleep 9", "SIGKILL"), ("", "broke off")]
)
def test_a_reader_that_comes_to_grief_is_one_line(kind, does, said, ice, tmp_path, monkeypatch):
    """It has a process of its own: damaged files have ended it by a signal, and it must not hang."""
    write(tmp_path / f"a.{kind}", ice, ice.crystal.sites[None])
    (tmp_path / "python").write_text(f"#!/bin/sh\n{does}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr(apart, "_PATIENCE", 0.5)
    with pytest.raises(InputError, match=f"{said}; is the file truncated or corrupted") as error:
        list(read(tmp_path / f"a.{kind}", ice))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("request_", [{"start": -1}, {"stride": 0}, {"start": 3, "stop": 3}, {"chunk": 0}])
def test_impossible_requests(request_, ice, tmp_path):
    with pytest.raises(InputError, match="no frames from"):
        read(tmp_path / "a.xtc", ice, **request_)


def test_a_start_beyond_the_end(ice, tmp_path):
    for kind in ("extxyz", "dcd", "xtc", "traj"):
        write(tmp_path / f"a.{kind}", ice, ice.crystal.sites[None])
        with pytest.raises(InputError, match="holds no frames from frame 5 on"):
            list(read(tmp_path / f"a.{kind}", ice, start=5))


def test_an_xyz_file_without_cell_or_species(ice, tmp_path):
    x = ice.crystal.sites
    rows = "".join(f"MW {a:.5f} {b:.5f} {c:.5f}\n" for a, b, c in x)
    with gzip.open(tmp_path / "a.xyz.gz", "wt") as file:
        file.write(f"64\nno keys here\n{rows}\n\n")
    (frames,) = read(tmp_path / "a.xyz.gz", ice)
    np.testing.assert_allclose(frames.positions[0], x, atol=1e-5)
    assert np.isnan(frames.cells).all() and frames.species is None
    assert frames.resolution == pytest.approx(1e-5)


# ------------------------------------------------------------------ frames to displacements


@pytest.mark.parametrize("name", ["mw_cubic_8", "mw_cubic_64", "mw_hexagonal_64", "lj_fcc_32", "hcp", "salt"])
@pytest.mark.parametrize("order", ["as is", "one order", "an order each"])
def test_frames_are_restored(name, order, request):
    crystal = (request.getfixturevalue(name) if name in {"hcp", "salt"} else ff.load(name)).crystal
    u, x = drifting(crystal, 20)
    rng = np.random.default_rng(3)
    n = crystal.n_atoms
    shuffles = np.array([rng.permutation(n) for _ in x])
    if order == "as is":
        shuffles = np.tile(np.arange(n), (len(x), 1))
    elif order == "one order":
        shuffles = np.tile(shuffles[0], (len(x), 1))
    shuffled = np.take_along_axis(x, shuffles[:, :, None], axis=1)
    found = to_displacements(shuffled, crystal)
    assert found.sound.all() and not found.hopped.any() and not found.melted.any()
    np.testing.assert_allclose(found.displacements.mean(axis=1), 0, atol=1e-12)
    # The same crystal, up to a symmetry of the lattice that relabels sites.
    np.testing.assert_allclose(np.sum(found.displacements**2, axis=(1, 2)), np.sum(u**2, axis=(1, 2)), rtol=1e-9)
    for frame, (row, taken) in enumerate(zip(found.order, found.displacements, strict=True)):
        assert sorted(row) == list(range(n))
        step = shuffled[frame, row] - crystal.sites - taken
        step = (step - step[0]) @ np.linalg.inv(crystal.cell)
        np.testing.assert_allclose(step, np.rint(step), atol=1e-9)
    if order == "as is":
        np.testing.assert_allclose(found.displacements, u, atol=1e-12)
        assert (found.order == np.arange(n)).all()
    if order == "one order":
        assert (found.order == found.order[0]).all()
        again = to_displacements(shuffled[10:], crystal, guess=found.order[9])
        np.testing.assert_array_equal(again.displacements, found.displacements[10:])


def test_labels_that_differ_by_a_lattice_translation_stay(ice):
    crystal = ice.crystal
    u, x = drifting(crystal, 2)
    moved = np.empty(crystal.n_atoms, int)
    moved[crystal.site_of.ravel()] = np.roll(crystal.site_of, 1, axis=0).ravel()
    # Translations are a group: rolling a cyclic direction is one only along the last axis of a full cycle.
    grid = crystal.site_of.reshape(*crystal.group, -1)
    moved[grid.ravel()] = np.roll(grid, 1, axis=2).ravel()
    found = to_displacements(x[:, moved], crystal)
    np.testing.assert_array_equal(found.order, np.tile(np.arange(crystal.n_atoms), (2, 1)))
    np.testing.assert_allclose(found.displacements, u[:, moved], atol=1e-12)


@pytest.mark.parametrize("system", ["hcp"], indirect=True)
def test_labels_that_merely_fit_are_not_enough(system):
    """Shifted from one basis atom to the other, every atom of hcp is within reach of some site, one to one."""
    crystal = system.crystal
    u, _ = drifting(crystal, 3)
    shifted = crystal.sites + crystal.sites[crystal.site_of[0, 1]] - crystal.sites[crystal.site_of[0, 0]]
    shifted += [0.01, 0.02, 0.0]  # half of the atoms lie between three sites: all take the same way
    d = (shifted[:, None] - crystal.sites[None]) @ np.linalg.inv(crystal.cell)
    d = (d - np.rint(d)) @ crystal.cell
    nearest = np.argmin(np.sum(d**2, axis=2), axis=1)
    assert len(set(nearest)) == crystal.n_atoms
    x = crystal.sites[nearest] + u
    as_labelled = to_displacements(x, crystal, guess=np.arange(crystal.n_atoms))
    assert as_labelled.n_off.max() < 3 and np.sum(as_labelled.displacements**2) > 5 * np.sum(u**2)
    found = to_displacements(x, crystal)
    np.testing.assert_allclose(np.sum(found.displacements**2, axis=(1, 2)), np.sum(u**2, axis=(1, 2)), rtol=1e-9)


def test_hops_swaps_and_melts(ice):
    crystal = ice.crystal
    limit = nearest_neighbour_distance(crystal) / 2
    u, _ = drifting(crystal, 40)
    x = crystal.sites + u
    x[5, 9] += [0.0, 0.0, 1.6 * limit]  # one atom goes astray
    x[7, [3, 4]] = x[7, [4, 3]]  # two change places, once
    x[9:, [10, 11]] = x[9:, [11, 10]]  # two change places for good
    rng = np.random.default_rng(5)
    x[20:30] = rng.random((10, 64, 3)) * np.diag(crystal.cell)
    found = to_displacements(wrapped(x, crystal.cell), crystal)
    np.testing.assert_array_equal(np.flatnonzero(found.hopped), [5])
    np.testing.assert_array_equal(np.flatnonzero(found.melted), np.arange(20, 30))
    assert found.n_off[5] == 1
    sound = found.sound
    np.testing.assert_allclose(
        np.sort(np.sum(found.displacements[sound] ** 2, axis=2), axis=1),
        np.sort(np.sum(u[sound] ** 2, axis=2), axis=1),
        atol=1e-10,
    )
    assert list(found.order[7, [3, 4]]) == [4, 3] and list(found.order[12, [10, 11]]) == [11, 10]
    assert list(found.order[35, [10, 11]]) == [11, 10]


def test_the_hopping_distance_is_the_end_of_the_target_ensemble(ice):
    crystal = ice.crystal
    limit = nearest_neighbour_distance(crystal) / 2
    for factor, off in ((0.999, 0), (1.001, 1)):
        u = np.zeros((1, 64, 3))
        u[0, 0, 2] = factor * limit * 64 / 63
        found = to_displacements(crystal.sites + u, crystal)
        assert found.n_off[0] == off
        assert np.isfinite(energies(ice, found.displacements)[0]) == (off == 0)


def test_atoms_stay_on_sites_of_their_kind(salt):
    crystal = salt.crystal
    _, x = drifting(crystal, 4)
    rng = np.random.default_rng(7)
    shuffle = rng.permutation(crystal.n_atoms)
    species = tuple(crystal.species[i] for i in shuffle)
    found = to_displacements(x[:, shuffle], crystal, species)
    assert found.sound.all()
    for row in found.order:
        assert tuple(species[i] for i in row) == crystal.species
    # One pair on the wrong sublattice: a crystal for who does not know species, not for who does.
    wrong = list(crystal.species)
    i, j = wrong.index("Na"), wrong.index("Cl")
    wrong[i], wrong[j] = "Cl", "Na"
    assert to_displacements(x, crystal).sound.all()
    assert (to_displacements(x, crystal, wrong).n_off == 2).all()
    with pytest.raises(InputError, match="do not fit sites"):
        to_displacements(x, crystal, ("Na",) * crystal.n_atoms)


def test_frames_that_cannot_be_of_the_crystal(ice):
    with pytest.raises(InputError, match="frames of 8 atoms"):
        to_displacements(np.zeros((1, 8, 3)), ice.crystal)
    with pytest.raises(InputError, match="not finite"):
        to_displacements(np.full((1, 64, 3), np.nan), ice.crystal)


# ------------------------------------------------------------------ energies


@pytest.mark.jax_defaults
def test_energies_by_hand(fcc):
    """Lennard-Jones energies of every pair once, at its nearest image: cutoff 2.7, shifted."""
    u = displacements(fcc.crystal, 70)
    i, j = np.triu_indices(fcc.n_atoms, 1)
    x, box = fcc.crystal.sites + u, np.diag(fcc.crystal.cell)
    d = x[:, i] - x[:, j]
    r2 = np.sum((d - box * np.rint(d / box)) ** 2, axis=2)
    pair = lambda r2: 4 * (r2**-6 - r2**-3)  # noqa: E731
    expected = np.sum(np.where(r2 < 2.7**2, pair(r2) - pair(2.7**2), 0.0), axis=1)
    np.testing.assert_allclose(energies(fcc, u), expected, rtol=1e-12)
    assert energies(fcc, u[:0]).shape == (0,)


def on_target(system, u):
    """Energies from the system's target ensemble."""
    with jax.enable_x64(True):
        reduced = jax.jit(jax.vmap(system.target.reduced_potential, (0, None)))(u, system.state)
    return (system.constants["lattice energy"] + np.asarray(reduced)) / float(system.state.beta)


@pytest.mark.jax_defaults
@pytest.mark.parametrize("system", ["ice", "hcp", "fcc"], indirect=True)
def test_energies_are_those_of_the_target(system):
    """Frames of all sizes, of which most fit a narrow table."""
    crystal, half = system.crystal, nearest_neighbour_distance(system.crystal) / 2
    small = displacements(crystal, 1100, size=0.02)
    wide = displacements(crystal, 60, seed=1, size=0.3)
    # As far out as the ensemble reaches, and some beyond.
    wide *= (np.linspace(0.3, 1.2, 60) * half / np.linalg.norm(wide, axis=2).max(axis=1))[:, None, None]
    u = np.concatenate([small, wide])[np.random.default_rng(2).permutation(1160)]
    largest = np.linalg.norm(u, axis=2).max(axis=1)
    found = energies(system, u)
    np.testing.assert_array_equal(np.isfinite(found), largest < half)
    some = np.concatenate([np.argsort(largest)[::40], np.argsort(largest)[-60:]])
    np.testing.assert_allclose(found[some], on_target(system, u[some]), rtol=1e-9)
    assert found.dtype == np.float64
    np.testing.assert_allclose(energies(system, u[some], batch=7), found[some], rtol=1e-12)


@pytest.mark.parametrize("system", ["ice", "hcp"], indirect=True)
def test_no_pair_is_lost_where_two_atoms_come_together(system):
    """The two sites furthest apart whose atoms can meet within the cutoff, for every width of table."""
    crystal, half, cutoff = system.crystal, nearest_neighbour_distance(system.crystal) / 2, system.potential.cutoff
    d = (crystal.sites - crystal.sites[0]) @ np.linalg.inv(crystal.cell)
    d = (d - np.rint(d)) @ crystal.cell
    apart = np.linalg.norm(d, axis=1)
    u, missed = np.zeros((4, system.n_atoms, 3)), 0
    for frame, reach in zip(u, half * np.array([0.37, 0.49, 0.74, 0.95]), strict=True):
        # Pairs that come well inside the cutoff: a lost one shows.
        other = int(np.argmax(np.where(apart < 0.97 * cutoff + 2 * reach, apart, 0)))
        frame[0], frame[other] = reach * d[other] / apart[other], -reach * d[other] / apart[other]
        missed += apart[other] > cutoff + reach
    each = [energies(system, u[k : k + 1], batch=1)[0] for k in range(4)]
    np.testing.assert_allclose(each, on_target(system, u), rtol=1e-9)
    assert missed  # a table too narrow by half would not do


def test_rounding_explains_energies_and_no_more(ice):
    u = displacements(ice.crystal, 30)
    for resolution in (1e-2, 1e-3, 1e-6):
        rounded = np.rint((u + ice.crystal.sites) / resolution) * resolution - ice.crystal.sites
        worst = np.abs(energies(ice, rounded) - energies(ice, u)).max()
        bound = energy_precision(ice, u, resolution)
        assert bound / 10 < worst < bound
    assert energy_precision(ice, u[:0], 1e-3) == 0.0


def test_comparing_energies(ice):
    ours = np.array([-750.0, -752.5, math.inf, -760.0, -748.0, -755.0])
    close = ours + np.array([1e-4, -2e-4, 0, np.nan, 0, 1e-4])
    same = compare_energies(close, ours, 3e-4, ice.units)
    assert (
        same.agrees
        and same.n_frames == 4
        and same.offset is None
        and same.max_deviation == pytest.approx(2e-4)
        and same.unit == "kcal/mol"
    )
    assert not compare_energies(close, ours, 1e-4, ice.units).agrees
    ev = compare_energies(close / 23.0605478306, ours, 3e-4, ice.units)
    assert ev.agrees and ev.unit == "eV" and "they are in eV" in ev.verdict
    kj = compare_energies(close * 4.184, ours, 3e-4, ice.units)
    assert kj.agrees and kj.unit == "kJ/mol"
    # Reduced energies have one unit only.
    assert not compare_energies(close / 23.0605478306, ours, 3e-4, UNIT_STYLES["lj"]).agrees
    for unit, factor in (("kcal/mol", 1.0), ("eV", 23.0605478306)):
        offset = compare_energies((close + 12.0) / factor, ours, 3e-4, ice.units)
        assert offset.agrees is False and offset.offset == pytest.approx(12.0, abs=2e-4) and offset.unit == unit
        assert "another zero of energy?" in offset.verdict
    # Any two frames differ by something near a constant.
    assert compare_energies((close + 12.0)[:2], ours[:2], 3e-4, ice.units).offset is None
    other = compare_energies(close * 1.1, ours, 3e-4, ice.units)
    assert not other.agrees and other.offset is None and "another potential" in other.verdict
    none = compare_energies(np.full(6, np.nan), ours, 3e-4, ice.units)
    assert none.agrees is None and none.n_frames == 0


# ------------------------------------------------------------------ the reference data

REFERENCE = [
    ("lj_fcc_256", "traj.extxyz.gz"),
    ("lj_fcc_500", "traj.dcd"),
    ("mw_cubic_216", "traj.dcd"),
    ("mw_cubic_216", "traj_lossy.xtc"),
    ("mw_cubic_512", "traj.dcd"),
    ("mw_cubic_64", "traj.lammpstrj"),
    ("mw_cubic_64", "traj.extxyz.gz"),
    ("mw_hexagonal_64", "traj.dcd"),
    ("mw_hexagonal_64", "traj.h5"),
]


@pytest.mark.skipif(not REFDATA.is_dir(), reason="the reference trajectories are not part of the repository")
@pytest.mark.parametrize(("name", "file"), REFERENCE)
def test_reference_trajectories(name, file):
    """LAMMPS trajectories and LAMMPS's energies of the same frames; at most 200 frames of each."""
    system = ff.load(name)
    lammps = np.loadtxt(REFDATA / name / "energies.csv", delimiter=",")[:200, 1]
    x, chunks = together(read(REFDATA / name / file, system, topology=REFDATA / name / "topology.pdb", stop=200))
    assert len(x) == 200
    found = to_displacements(x, system.crystal)
    assert found.sound.all()
    assert (found.order == found.order[0]).all()
    ours = energies(system, found.displacements)
    precision = energy_precision(system, found.displacements, chunks[0].resolution)
    assert precision < {"traj_lossy.xtc": 2.0}.get(file, 3e-3)
    assert compare_energies(lammps, ours, precision, system.units).agrees
    stored = compare_energies(np.concatenate([chunk.energies for chunk in chunks]), ours, precision, system.units)
    assert stored.agrees is (True if "extxyz" in file else None)
    # A cutoff that is a little off would not pass.
    assert not compare_energies(lammps * (1 + 1e-4), ours, min(precision, 3e-3), system.units).agrees
