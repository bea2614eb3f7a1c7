"""Trajectory files, a chunk of frames at a time, checked against the system that they are meant for.

Files are streamed in chunks, through ASE (.traj) and mdtraj (XTC, HDF5) where these stream.
Text formats, DCD and TRR have readers of freeflow's own (`texts`, `binaries`): ASE holds every frame of a dump in
memory and takes 30 ms for an extxyz frame of 256 atoms, mdtraj holds a whole PDB file and prints to standard output for
DCD, and neither notices a DCD file that is cut short.

Units are never guessed. LAMMPS dumps are in the system's unit style, and a dump that names its own is
held to it. Other formats have lengths of their own, angstrom (extxyz, .traj, DCD, PDB) or nanometres
(XTC, TRR, HDF5), converted for the styles `real` and `metal`. With `lj`, numbers in ASE's formats
are taken as they are; for mdtraj's formats programs differ in whether one sigma is stored as one angstrom or as
one nanometre, and the cell in the file tells which: the two differ by a factor of ten.

Frames of a system whose cell moves have each a cell of their own. They are brought into the system's reference cell,
without the rotation that a program may have given to the cell, and their strain is told.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from freeflow.cells import CELL_MOTIONS, LARGEST_STRETCH, CellMotion, strains_between, stretches
from freeflow.errors import InputError
from freeflow.geometry import face_distances
from freeflow.trajectories.alignment import UNKNOWN_SPECIES, formula, to_displacements
from freeflow.trajectories.binaries import read_ase, read_dcd, read_hdf5, read_trr, read_xtc
from freeflow.trajectories.blocks import Block, Request, reason_of, require_count, symbols
from freeflow.trajectories.texts import read_extxyz, read_lammps, read_pdb
from freeflow.types import Crystal, System
from freeflow.units import UnitStyle

_FARTHEST = 1e8  # coordinates of atoms that diffused or drifted, in cells: beyond, no digit of a position is left
CELL_TOLERANCE = 1e-4  # largest strain between the cell of a frame and the system's
_CHUNK = 1 << 21  # coordinates in memory at a time, if the caller does not say


class Frames(NamedTuple):
    """Consecutive frames of a file, in the system's length unit and the orientation of its cell."""

    positions: Float[np.ndarray, "n_frames n_atoms 3"]  # scaled into the reference cell if the cell moves [length]
    cells: Float[np.ndarray, "n_frames 3 3"]  # rows are lattice vectors [length]; NaN where the file has none
    energies: Float[np.ndarray, " n_frames"]  # as the file has them (see compare_energies); NaN where it has none
    index: int  # of the first frame in the file, from 0
    resolution: float  # to which the file rounds positions [length]
    species: tuple[str, ...] | None  # None where the file does not tell
    strains: Float[np.ndarray, "n_frames 3 3"] | None = None  # logarithmic, of the cells; None if the cell is fixed


@dataclass(frozen=True)
class Box:
    """What frames of a fluid are held to: atoms in a cell, on no sites; stands in for a system."""

    n_atoms: int
    cell: np.ndarray  # (3, 3), rows are the lattice vectors of the periodic box [length]
    units: UnitStyle
    species: tuple[str, ...] = ("X",)  # chemical symbol per atom; "X" where there is none

    @property
    def crystal(self) -> Box:
        """The cell and the species, where a system has them."""
        return self

    @property
    def volume(self) -> float:
        """Of the cell."""
        return float(abs(np.linalg.det(self.cell)))


class _Format(NamedTuple):
    name: str
    read: Callable[[Request], Iterator[Block]]
    unit: Literal["style", "ase", "angstrom", "nm"]
    cell_resolution: float = 0.0  # of cell vectors [file's length]


# --------------------------------------------------------------------------- reading


def read(
    path: str | Path,
    system: System | Box,
    topology: str | Path | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    stride: int = 1,
    chunk: int | None = None,
    sigma: Literal["angstrom", "nm"] | None = None,
) -> Iterator[Frames]:
    """Frames start, start + stride, ... before stop, checked against the system, a chunk at a time.

    Dumps are sorted by atom id. A frame whose cell is the system's turned in space is turned back. Species are
    compared where both sides know them.

    Args:
        path: LAMMPS text dump (.lammpstrj, .dump), .extxyz or .xyz, PDB, all of these also with .gz behind
            their name; ASE .traj, XTC, DCD, TRR, HDF5.
        system: What the frames are meant to be samples of; for a fluid its box.
        topology: No format needs one. If given, a file that mdtraj reads a topology from, checked against the system.
        start: First frame, from 0.
        stop: Frame to stop before.
        stride: Read every so many frames.
        chunk: Frames in memory at a time; by default as many as hold two million coordinates.
        sigma: What one sigma is stored as in mdtraj's formats; needed only with `lj` if the file has no cell.

    Raises:
        InputError: If a file, or a frame when its turn comes, cannot be used; one line that names it.
    """
    path = Path(path)
    form = _format_of(path)
    if sigma not in {None, "angstrom", "nm"}:
        raise InputError(f"sigma: expected angstrom or nm, got {sigma!r}")
    if start < 0 or stride < 1 or (stop is not None and stop <= start) or (chunk is not None and chunk < 1):
        raise InputError(f"{path}: no frames from {start} to {stop} in steps of {stride}, {chunk} at a time")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if topology is not None:
        _check_topology(Path(topology), system)
    with_species = "X" not in system.crystal.species
    chunk = chunk or max(1, _CHUNK // (3 * system.n_atoms))
    request = Request(path, system.n_atoms, start, stop, stride, chunk, with_species, system.units.name)
    return _checked(form, request, system, sigma)


def topology(system: System) -> Any:
    """An mdtraj topology of the system's atoms, each a residue of its own; unknown species are virtual sites."""
    import mdtraj

    made = mdtraj.Topology()
    strand = made.add_chain()
    for name in system.crystal.species:
        element = mdtraj.element.virtual if name in UNKNOWN_SPECIES else mdtraj.element.get_by_symbol(name)
        made.add_atom(name, element, made.add_residue(name, strand))
    return made


def _format_of(path: Path) -> _Format:
    zipped = path.suffix.lower() == ".gz"
    form = _FORMATS.get(Path(path.stem if zipped else path.name).suffix.lower())
    if form is None:
        raise InputError(f"{path}: unknown kind of trajectory; use one of {', '.join(_FORMATS)}")
    if zipped and form.name not in _TEXT:
        raise InputError(f"{path}: {form.name} files cannot be read while compressed; gunzip it first")
    return form


def _check_topology(path: Path, system: System | Box) -> None:
    import mdtraj

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what mdtraj thinks of a cell that is not looked at here
            loaded: Any = mdtraj.load_topology(str(path))
    except Exception as error:  # mdtraj's readers raise whatever their format happens to raise
        raise InputError(f"{path}: mdtraj reads no topology from it ({reason_of(error)})") from None
    require_count(loaded.n_atoms, system.n_atoms, str(path))
    _check_species(_known(symbols(loaded)), system.crystal, str(path))


def _known(species: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Species if every one is a chemical element; names such as MW, VS or X tell nothing."""
    from ase.data import atomic_numbers

    return species if species and all(atomic_numbers.get(name) for name in set(species)) else None


def _check_species(species: tuple[str, ...] | None, crystal: Crystal | Box, where: str) -> None:
    if species is None or UNKNOWN_SPECIES & {*crystal.species}:
        return
    if Counter(species) != Counter(crystal.species):
        raise InputError(f"{where}: the file holds {formula(species)}, the system {formula(crystal.species)}")


def _checked(form: _Format, request: Request, system: System | Box, sigma: str | None) -> Iterator[Frames]:
    path, crystal = request.path, system.crystal
    index, scale, turned = request.start, None, None
    blocks = form.read(request)
    while True:
        try:
            block = next(blocks, None)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # readers raise whatever their format happens to raise
            raise InputError(
                f"{path}: cannot be read as {form.name} ({reason_of(error)}); is it truncated or corrupted?"
            ) from None
        if block is None:
            break
        frame = lambda k, first=index: f"{path}: frame {first + int(k) * request.stride}"  # noqa: E731
        require_count(block.positions.shape[1], system.n_atoms, frame(0))
        species = _known(block.species)
        _check_species(species, crystal, frame(0))
        lost = ~np.isfinite(block.positions)
        if lost.any():
            k, atom, _ = np.argwhere(lost)[0]
            raise InputError(f"{frame(k)}: atom {atom} (from 0) has coordinates that are not finite numbers")
        far = np.abs(block.positions) > _FARTHEST * np.abs(crystal.cell).max()
        if far.any():
            k, atom, axis = np.argwhere(far)[0]
            raise InputError(
                f"{frame(k)}: atom {atom} (from 0) has a coordinate of {block.positions[k, atom, axis]:.3g}, which is "
                "beyond any box; is the file corrupted?"
            )
        n_frames = len(block.positions)
        cells = np.full((n_frames, 3, 3), np.nan) if block.cells is None else np.array(block.cells, float)
        cells[(cells == 0).all(axis=(1, 2))] = np.nan  # how binary formats say that there is none
        if np.isinf(cells).any():
            raise InputError(f"{frame(np.argwhere(np.isinf(cells))[0, 0])}: the cell is not made of finite numbers")
        if scale is None:
            scale = _scale(form, system, cells[0], sigma, path)
        positions, cells = np.asarray(block.positions, float) * scale, cells * scale
        tolerance = CELL_TOLERANCE + form.cell_resolution * scale / face_distances(crystal.cell).min()
        if not isinstance(system, Box) and system.cell_motion is not None:
            strains = _strains(cells, system, CELL_MOTIONS[system.cell_motion], tolerance, frame)
            f = stretches(strains)
            if turned is None:
                turned = _turns_with_cell(cells[0], f[0], positions[0], system.crystal)
            positions = positions @ np.linalg.inv(np.linalg.solve(crystal.cell, cells) if turned else f)
            cells = crystal.cell @ f
        else:
            strain, strains = _strain(cells, crystal), None
            # Not beyond: NaN is a cell that the file does not have.
            if (strain > tolerance).any():
                k = int(np.argmax(strain > tolerance))
                raise InputError(f"{frame(k)}: {_wrong_cell(cells[k], strain[k], crystal, system.units)}")
            if turned is None:
                turned = _is_turned(cells[0], positions[0], crystal)
            if turned:
                turn = np.linalg.inv(cells[0]) @ crystal.cell
                positions, cells = positions @ turn, cells @ turn
        energies = np.full(n_frames, np.nan) if block.energies is None else np.asarray(block.energies, float)
        yield Frames(positions, cells, energies, index, float(block.resolution * scale), species, strains)
        index += n_frames * request.stride
    if index == request.start:
        more = f" from frame {request.start} on" if request.start else ""
        raise InputError(f"{path}: the file holds no frames{more}")


def _scale(form: _Format, system: System | Box, cell: np.ndarray, sigma: str | None, path: Path) -> float:
    """The system's length unit in the file's: numbers of the file times this are numbers of the system."""
    if form.unit == "style":
        return 1.0
    reduced = system.units.name == "lj"
    if form.unit == "ase" or (form.unit == "angstrom" and not reduced):
        return 1.0
    if not reduced:
        return 10.0
    scales = {"angstrom": 1.0, "nm": 0.1} if form.unit == "angstrom" else {"angstrom": 10.0, "nm": 1.0}
    if sigma is not None:
        return scales[sigma]
    if not np.isfinite(cell).all():
        raise InputError(
            f"{path}: no cell tells whether 1 sigma is stored as 1 angstrom or 1 nm; give sigma='angstrom' or 'nm'"
        )
    # The nearer one; whether it is near enough is checked for every frame.
    return min(scales.values(), key=lambda scale: _strain(cell[None] * scale, system.crystal)[0])


@np.errstate(all="ignore")  # of nonsense cells
def _strain(cells: np.ndarray, crystal: Crystal | Box) -> np.ndarray:
    """Largest strain (n_frames,) that takes a cell to the crystal's, however it is turned; NaN for no cell."""
    inverse = np.linalg.inv(crystal.cell)
    # Green's strain (F F^T - 1) / 2 of the deformation F, in rows: free of rotations and reflections.
    step = inverse @ cells
    return 0.5 * np.abs(step @ np.swapaxes(step, 1, 2) - np.eye(3)).max(axis=(1, 2))


@np.errstate(all="ignore")
def _wrong_cell(cell: np.ndarray, strain: float, crystal: Crystal | Box, units: UnitStyle) -> str:
    ratio = (abs(np.linalg.det(cell)) / crystal.volume) ** (1 / 3)
    close = [factor for factor in (0.1, 10.0) if abs(ratio / factor - 1) < 1e-2]
    hint = f"; it is {ratio:.3g} times as long: are its lengths in another unit?" if close else ""
    return (
        f"the cell {_shape(cell)} is not the system's {_shape(crystal.cell)} {units.length} (strain {strain:.2g}){hint}"
    )


def _shape(cell: np.ndarray) -> str:
    lengths = np.linalg.norm(cell, axis=1)
    unit = cell / np.maximum(lengths, 1e-300)[:, None]
    angles = [math.degrees(math.acos(np.clip(unit[i] @ unit[j], -1, 1))) for i, j in ((1, 2), (0, 2), (0, 1))]
    skewed = any(abs(angle - 90) > 1e-3 for angle in angles)
    return " x ".join(f"{x:.6g}" for x in lengths) + (
        f" ({', '.join(f'{a:.4g}' for a in angles)} deg)" if skewed else ""
    )


def _is_turned(cell: np.ndarray, positions: np.ndarray, crystal: Crystal | Box) -> bool:
    """Whether positions must be turned with the cell into the crystal's orientation.

    Formats that keep lengths and angles only, and programs that align a along x, say nothing about
    the atoms: where cells point elsewhere, the first frame tells which way the atoms fit.
    """
    if not np.isfinite(cell).all():
        return False
    turn = np.linalg.inv(cell) @ crystal.cell
    if np.abs(turn - np.eye(3)).max() < 10 * CELL_TOLERANCE:
        return False
    if isinstance(crystal, Box):  # a fluid fits either way; the faces of its cell do not
        return True
    as_given, with_cell = (to_displacements(x[None], crystal).n_off[0] for x in (positions, positions @ turn))
    return bool(with_cell <= as_given)


def _strains(
    cells: np.ndarray, system: System, motion: CellMotion, tolerance: float, frame: Callable[[int], str]
) -> np.ndarray:
    """Logarithmic strains (n_frames, 3, 3) of cells that move.

    Raises:
        InputError: If a frame has no cell, or one that the motion does not lead to.
    """
    crystal = system.crystal
    none = np.isnan(cells).any(axis=(1, 2))
    if none.any():
        k = int(np.argmax(none))
        raise InputError(f"{frame(k)}: there is no cell; under a pressure every frame needs its own")
    with np.errstate(all="ignore"):  # of nonsense cells
        strains = strains_between(crystal.cell, cells)
        largest = np.abs(np.linalg.eigvalsh(np.nan_to_num(strains, nan=1e9, posinf=1e9, neginf=-1e9))).max(axis=1)
    # Between once and twice the stretch at which the ensemble ends frames are told of, and are no samples.
    far = ~(largest <= 2 * LARGEST_STRETCH)
    if far.any():
        k = int(np.argmax(far))
        raise InputError(
            f"{frame(k)}: the cell {_shape(cells[k])} is not the system's {_shape(crystal.cell)} "
            f"{system.units.length}, stretched by less than {math.expm1(2 * LARGEST_STRETCH):.0%}; is it in another "
            "unit, or written another way?"
        )
    coordinates = np.tensordot(strains, motion.basis, ((1, 2), (1, 2)))
    beside = np.abs(strains - np.tensordot(coordinates, motion.basis, 1)).max(axis=(1, 2))
    if (beside > tolerance).any():
        k = int(np.argmax(beside > tolerance))
        fits = "orthorhombic or triclinic" if motion.name == "isotropic" else "triclinic"
        raise InputError(
            f"{frame(k)}: the cell {_shape(cells[k])} has another shape than the system's {_shape(crystal.cell)} "
            f"{system.units.length}, and cell_motion: {motion.name} does not change it; {fits} would"
        )
    return strains


def _turns_with_cell(cell: np.ndarray, stretch: np.ndarray, positions: np.ndarray, crystal: Crystal) -> bool:
    """The same for a cell that moves, where programs turn the cell a little in every frame and the atoms with it."""
    by_cell, by_stretch = (np.linalg.inv(f) for f in (np.linalg.solve(crystal.cell, cell), stretch))
    with_cell, as_given = (to_displacements(positions[None] @ f, crystal).n_off[0] for f in (by_cell, by_stretch))
    return bool(with_cell <= as_given)


_LAMMPS = _Format("a LAMMPS text dump", read_lammps, "style")
_EXTXYZ = _Format("extended XYZ", read_extxyz, "ase")
_PDB = _Format("PDB", read_pdb, "angstrom", cell_resolution=1e-3)
_HDF5 = _Format("HDF5", read_hdf5, "nm")
_TEXT = {form.name for form in (_LAMMPS, _EXTXYZ, _PDB)}
_FORMATS = {
    ".lammpstrj": _LAMMPS,
    ".lammpsdump": _LAMMPS,
    ".dump": _LAMMPS,
    ".extxyz": _EXTXYZ,
    ".xyz": _EXTXYZ,
    ".pdb": _PDB,
    ".traj": _Format("an ASE trajectory", read_ase, "ase"),
    ".xtc": _Format("XTC", read_xtc, "nm"),
    ".trr": _Format("TRR", read_trr, "nm"),
    ".dcd": _Format("DCD", read_dcd, "angstrom"),
    ".h5": _HDF5,
    ".hdf5": _HDF5,
}
