"""Configurations of a crystal as trajectory files that other programs read, and `read` takes back unasked.

ASE writes extxyz and .traj, mdtraj the binary formats and PDB, a chunk of frames at a time. LAMMPS dumps are written
here: mdtraj's have three decimals and one type of atom.

Lengths follow `freeflow.trajectories.files`: LAMMPS dumps in the system's unit style, ASE's formats in angstrom,
mdtraj's in angstrom or nanometres; with `lj`, one sigma stands for one angstrom in all of them. Formats other than
ASE's know lengths and angles of the cell only, or want its first vector along x and the second in the xy plane: there
cell and atoms are turned together.
"""

from __future__ import annotations

import gzip
import math
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from freeflow import documents
from freeflow.cells import stretches
from freeflow.errors import FreeflowError, InputError
from freeflow.geometry import nearest_neighbour_distance
from freeflow.trajectories.alignment import UNKNOWN_SPECIES
from freeflow.trajectories.files import topology
from freeflow.trajectories.recomputed import OTHER_ENERGIES
from freeflow.types import System

_CHUNK = 1 << 20  # coordinates that are converted at a time
_PDB_RANGE = -999.0, 9999.0  # eight columns, three decimals [angstrom]


class _Chunk(NamedTuple):
    """Consecutive frames, as they are laid in the file."""

    first: int  # number of the first frame
    positions: np.ndarray  # (n_frames, n_atoms, 3) [angstrom, or the style's length]
    cells: np.ndarray  # (n_frames, 3, 3), as they are laid in the file
    energies: np.ndarray  # (n_frames,) [energy]; NaN where there is none


class _Content(NamedTuple):
    """What goes into a file."""

    system: System
    chunks: Iterator[_Chunk]


class _Format(NamedTuple):
    name: str
    write: Callable[[Path, _Content], None]
    turns: bool = True  # whether the cell must be laid along x and into the xy plane
    pdb: bool = False  # whether the file is itself a PDB file
    topology: bool = False  # whether a PDB file of the perfect crystal goes with it


def write(
    path: str | Path,
    system: System,
    displacements: Float[np.ndarray, "n_frames n_atoms 3"],
    energies: Float[np.ndarray, " n_frames"] | None = None,
    strains: Float[np.ndarray, "n_frames 3 3"] | None = None,
) -> list[Path]:
    """Write frames, sites plus displacements and so not wrapped into the cell, in the format the ending says.

    Formats without names of atoms (XTC, DCD, TRR, LAMMPS dumps) get a PDB file of the perfect crystal beside them, of
    the same name up to the ending .topology.pdb. Files that exist are replaced; every file appears whole or not at all.

    Args:
        path: .xtc, .dcd, .trr, .h5, .pdb, .lammpstrj, .traj, .extxyz or .xyz, the last two also with .gz.
        system: Whose crystal it is.
        displacements: From the sites, atom by atom [length].
        energies: Potential energies [energy], for extxyz and .traj (in eV unless the style is `lj`); no other format
            carries them, and where they are not finite the frame gets none.
        strains: Logarithmic, of every frame's cell, where the cell moves: atoms are then at (X + u) exp(strain).

    Returns:
        The files written, the trajectory first.

    Raises:
        InputError: As `require_writable`, and if the arrays do not fit the system or hold no finite numbers.
        FreeflowError: If writing fails.
    """
    path = Path(path)
    form = _checked_format(path, system)
    n_frames, n_atoms, _ = displacements.shape
    if n_atoms != system.n_atoms or not n_frames:
        raise InputError(f"{path}: {n_frames} frames of {n_atoms} atoms; the system has {system.n_atoms}")
    per_frame = np.full(n_frames, np.nan) if energies is None else np.asarray(energies, float)
    if len(per_frame) != n_frames:
        raise InputError(f"{path}: {len(per_frame)} energies for {n_frames} frames")
    if strains is not None and len(strains) != n_frames:
        raise InputError(f"{path}: {len(strains)} strains for {n_frames} frames")
    crystal = system.crystal

    def chunks(given: np.ndarray, energies: np.ndarray, strains: np.ndarray | None) -> Iterator[_Chunk]:
        size = max(1, _CHUNK // (3 * n_atoms))
        for first in range(0, len(given), size):
            u = np.asarray(given[first : first + size], float)
            if not np.isfinite(u).all():
                lost = first + int(np.flatnonzero(~np.isfinite(u).all(axis=(1, 2)))[0])
                raise InputError(f"{path}: frame {lost} holds displacements that are not finite numbers")
            x, cells = crystal.sites + u, np.broadcast_to(crystal.cell, (len(u), 3, 3))
            if strains is not None:
                f = stretches(strains[first : first + size])
                x, cells = x @ f, cells @ f
            cells, turns = _laid(cells, form.turns)
            yield _Chunk(first, x if turns is None else x @ turns, cells, energies[first : first + size])

    perfect = chunks(np.zeros((1, n_atoms, 3)), np.full(1, np.nan), None)
    parts = [(path, form.write, chunks(displacements, per_frame, strains))]
    if form.topology:
        parts.append((_topology_path(path), _pdb, perfect))
    # The trajectory is renamed last: where it is, its topology is.
    with _whole_files([target for target, _, _ in parts]) as neighbours:
        for neighbour, (_, writer, frames) in zip(neighbours, parts, strict=True):
            writer(neighbour, _Content(system, frames))
    return [target for target, _, _ in parts]


def require_writable(path: str | Path, system: System) -> None:
    """Find out before the work, not after it, whether `write` can write the system's frames there.

    Raises:
        InputError: If the ending is unknown, the directory missing or not writable, or if the format cannot hold the
            crystal; one line that says which.
        FreeflowError: If no file can be made there, as on a file system that is read-only.
    """
    _checked_format(Path(path), system)
    documents.require_writable(path)


def _checked_format(path: Path, system: System) -> _Format:
    form = _FORMATS.get(_ending(path).lower())
    if form is None:
        raise InputError(f"{path}: unknown kind of trajectory; write one of {', '.join(_FORMATS)}")
    for target in [path, _topology_path(path)] if form.topology else [path]:
        if target.exists() and not target.is_file():
            raise InputError(f"{target}: cannot be written: it is {'a directory' if target.is_dir() else 'no file'}")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise InputError(f"{path}: cannot be written: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written: no permission to write in {folder}")
    if form.pdb and system.cell_motion is not None:
        raise InputError(
            f"{path}: PDB files hold one cell for all frames, but each has its own; write .extxyz, .traj, .xtc or .dcd"
        )
    if form.pdb or form.topology or form.name == "HDF5":
        _check_species(path, form, system)
    if form.pdb or form.topology:
        _check_pdb_range(path, form, system)
    return form


def _check_species(path: Path, form: _Format, system: System) -> None:
    """Whether mdtraj has a name for every species; ASE has more."""
    import mdtraj

    for name in sorted(set(system.crystal.species) - UNKNOWN_SPECIES):
        try:
            mdtraj.element.get_by_symbol(name)
        except KeyError:
            raise InputError(
                f"{path}: mdtraj, which writes {form.name}, knows no element {name}; write .extxyz or .traj"
            ) from None


def _check_pdb_range(path: Path, form: _Format, system: System) -> None:
    (cell,), turns = _laid(system.crystal.cell[None], form.turns)
    sites = system.crystal.sites if turns is None else system.crystal.sites @ turns[0]
    reach = nearest_neighbour_distance(system.crystal) / 2
    low, high = _PDB_RANGE
    if sites.min() - reach < low or max(sites.max() + reach, np.linalg.norm(cell, axis=1).max()) > high:
        what = "PDB files" if form.pdb else f"the PDB file that goes with {form.name}"
        raise InputError(
            f"{path}: {what} cannot hold coordinates outside {low:g} to {high:g}; write .extxyz, .traj or .h5"
        )


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix.lower() == ".gz" else path.suffix


def _topology_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(_ending(path)) + ".topology.pdb")


def _laid(cells: np.ndarray, turns: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Cells (n, 3, 3) as they are laid in a file, and the orthogonal matrices that turn rows of coordinates there."""
    upper, diagonals = cells[:, *np.triu_indices(3, 1)], np.diagonal(cells, axis1=1, axis2=2)
    if not turns or (np.abs(upper).max() <= 1e-12 * np.abs(cells).max() and (diagonals > 0).all()):
        return cells, None
    q, r = np.linalg.qr(np.swapaxes(cells, 1, 2))
    # A left-handed cell is mirrored: these formats have no other.
    turn = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    return np.tril(cells @ turn), turn


@contextmanager
def _whole_files(targets: list[Path]) -> Iterator[list[Path]]:
    """Neighbours to write instead, with the same endings; renamed, the first last, if all goes well."""
    real = [Path(os.path.realpath(target)) for target in targets]  # a link is written through, not replaced
    neighbours = [path.with_name(f".{uuid.uuid4().hex[:12]}.tmp{_ending(path)}") for path in real]
    try:
        yield neighbours
        for neighbour, path in reversed(list(zip(neighbours, real, strict=True))):
            with neighbour.open("rb+") as file:
                os.fsync(file.fileno())
            neighbour.replace(path)
    except InputError:
        raise
    except Exception as error:  # writers raise whatever their format happens to raise
        detail = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}; is the disk full?"
        reason = getattr(error, "strerror", None) or detail
        raise FreeflowError(f"{targets[0]}: cannot be written: {reason}") from None
    finally:
        for neighbour in neighbours:
            neighbour.unlink(missing_ok=True)


# --------------------------------------------------------------------------- ASE's formats


def _images(content: _Content) -> Iterator[Any]:
    """Frames as ASE's Atoms, with their energies in ASE's unit."""
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    system = content.system
    ev = OTHER_ENERGIES.get(system.units.name, {}).get("eV", 1.0)
    like = Atoms(system.crystal.species, pbc=True)
    for chunk in content.chunks:
        for positions, cell, energy in zip(chunk.positions, chunk.cells, chunk.energies, strict=True):
            atoms = like.copy()
            atoms.cell, atoms.positions = cell, positions
            if math.isfinite(energy):
                atoms.calc = SinglePointCalculator(atoms, energy=float(energy) / ev)
            yield atoms


def _extxyz(path: Path, content: _Content) -> None:
    from ase.io.extxyz import write_extxyz

    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        write_extxyz(file, _images(content))


def _ase_traj(path: Path, content: _Content) -> None:
    from ase.io import Trajectory

    opened: Any = Trajectory(str(path), "w")
    with opened as file:
        for atoms in _images(content):
            file.write(atoms)


# --------------------------------------------------------------------------- mdtraj's formats


def _gromacs(kind: str) -> Callable[[Path, _Content], None]:
    def writer(path: Path, content: _Content) -> None:
        import mdtraj.formats

        with getattr(mdtraj.formats, kind)(str(path), "w") as file:
            for chunk in content.chunks:
                x = (0.1 * chunk.positions).astype(np.float32)
                step = np.arange(chunk.first, chunk.first + len(x), dtype=np.int32)
                file.write(x, time=step.astype(np.float32), step=step, box=(0.1 * chunk.cells).astype(np.float32))

    return writer


def _lengths_and_angles(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths (n, 3) and angles (n, 3) [degrees] of cells."""
    lengths = np.linalg.norm(cells, axis=2)
    unit = cells / lengths[:, :, None]
    cosines = np.stack([np.einsum("na,na->n", unit[:, i], unit[:, j]) for i, j in ((1, 2), (0, 2), (0, 1))], axis=1)
    return lengths, np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))


def _dcd(path: Path, content: _Content) -> None:
    from mdtraj.formats import DCDTrajectoryFile

    with DCDTrajectoryFile(str(path), "w") as file:
        for chunk in content.chunks:
            shapes = (part.astype(np.float32) for part in _lengths_and_angles(chunk.cells))
            file.write(chunk.positions.astype(np.float32), *shapes)


def _hdf5(path: Path, content: _Content) -> None:
    from mdtraj.formats import HDF5TrajectoryFile

    n_frames = 0
    with HDF5TrajectoryFile(str(path), "w") as file:
        file.topology = topology(content.system)
        for chunk in content.chunks:
            n = len(chunk.positions)
            lengths, angles = _lengths_and_angles(0.1 * chunk.cells)
            file.write(
                (0.1 * chunk.positions).astype(np.float32),
                time=np.arange(chunk.first, chunk.first + n, dtype=np.float32),
                cell_lengths=lengths.astype(np.float32),
                cell_angles=angles.astype(np.float32),
            )
            n_frames += n
    # A disk that fills up goes unnoticed until the file is opened again.
    with HDF5TrajectoryFile(str(path)) as file:
        if len(file) != n_frames:
            raise OSError(f"{len(file)} of {n_frames} frames are there")


def _pdb(path: Path, content: _Content) -> None:
    from mdtraj.formats import PDBTrajectoryFile

    atoms = topology(content.system)
    with warnings.catch_warnings(), PDBTrajectoryFile(str(path), "w") as file:
        warnings.simplefilter("ignore")
        for chunk in content.chunks:
            (lengths,), (angles,) = _lengths_and_angles(chunk.cells[:1])
            for k, positions in enumerate(chunk.positions):
                # Four digits, from 1.
                file.write(positions, atoms, 1 + (chunk.first + k) % 9999, lengths, angles)


# --------------------------------------------------------------------------- LAMMPS dumps


def _lammps(path: Path, content: _Content) -> None:
    species = content.system.crystal.species
    kinds = {name: k for k, name in enumerate(dict.fromkeys(species), 1)}
    rows = "".join(f"{i} {kinds[name]} {name} %.8f %.8f %.8f\n" for i, name in enumerate(species, 1))
    head, columns = f"ITEM: NUMBER OF ATOMS\n{len(species)}\n", "ITEM: ATOMS id type element xu yu zu\n"
    with path.open("w", encoding="utf-8") as file:
        for chunk in content.chunks:
            for k, (positions, cell) in enumerate(zip(chunk.positions, chunk.cells, strict=True)):
                file.write(f"ITEM: TIMESTEP\n{chunk.first + k}\n{head}{_lammps_box(cell)}{columns}")
                file.write(rows % tuple(positions.ravel()))


def _lammps_box(cell: np.ndarray) -> str:
    """BOX BOUNDS of a box with its origin at zero; the bounds of a triclinic one enclose it."""
    (lx, ly, lz), (xy, xz, yz) = (map(float, part) for part in (np.diag(cell), cell[[1, 2, 2], [0, 0, 1]]))
    if not any((xy, xz, yz)):
        return f"ITEM: BOX BOUNDS pp pp pp\n0 {lx!r}\n0 {ly!r}\n0 {lz!r}\n"
    low, high = min(0.0, xy, xz, xy + xz), lx + max(0.0, xy, xz, xy + xz)
    return (
        f"ITEM: BOX BOUNDS xy xz yz pp pp pp\n{low!r} {high!r} {xy!r}\n"
        f"{min(0.0, yz)!r} {ly + max(0.0, yz)!r} {xz!r}\n0 {lz!r} {yz!r}\n"
    )


_EXTXYZ = _Format("extended XYZ", _extxyz, turns=False)
_HDF5 = _Format("HDF5", _hdf5)
_FORMATS = {
    ".xtc": _Format("XTC", _gromacs("XTCTrajectoryFile"), topology=True),
    ".dcd": _Format("DCD", _dcd, topology=True),
    ".trr": _Format("TRR", _gromacs("TRRTrajectoryFile"), topology=True),
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    ".pdb": _Format("PDB", _pdb, pdb=True),
    ".lammpstrj": _Format("a LAMMPS text dump", _lammps, topology=True),
    ".extxyz": _EXTXYZ,
    ".extxyz.gz": _EXTXYZ,
    ".xyz": _EXTXYZ,
    ".xyz.gz": _EXTXYZ,
    ".traj": _Format("an ASE trajectory", _ase_traj, turns=False),
}
