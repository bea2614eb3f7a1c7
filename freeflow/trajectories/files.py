"""Trajectory files, a chunk of frames at a time, checked against the system that they are meant for.

Files are streamed in chunks, through ASE (.traj) and mdtraj (XTC, HDF5) where these stream.
Text formats, DCD and TRR are read here: ASE holds every frame of a dump in memory and takes 30 ms for an
extxyz frame of 256 atoms, mdtraj holds a whole PDB file and prints to standard output for DCD, and
neither notices a DCD file that is cut short.

Units are never guessed. LAMMPS dumps are in the system's unit style, and a dump that names its own is
held to it. Other formats have lengths of their own, angstrom (extxyz, .traj, DCD, PDB) or nanometres
(XTC, TRR, HDF5), converted for the styles `real` and `metal`. With `lj`, numbers in ASE's formats
are taken as they are; for mdtraj's formats programs differ in whether one sigma is stored as one angstrom or as
one nanometre, and the cell in the file tells which: the two differ by a factor of ten.

Frames of a system whose cell moves have each a cell of their own. They are brought into the system's reference cell,
without the rotation that a program may have given to the cell, and their strain is told.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from io import TextIOBase
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from freeflow.cells import CELL_MOTIONS, LARGEST_STRETCH, CellMotion, strains_between, stretches
from freeflow.errors import InputError
from freeflow.geometry import face_distances
from freeflow.trajectories.alignment import UNKNOWN_SPECIES, formula, to_displacements
from freeflow.trajectories.xdr import trr_frame, xtc_frames
from freeflow.types import Crystal, System
from freeflow.units import UnitStyle

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


class _Block(NamedTuple):
    """Frames as the file has them."""

    positions: np.ndarray  # (n_frames, n_atoms, 3) [file's length]
    cells: np.ndarray | None  # (n_frames, 3, 3) [file's length]
    energies: np.ndarray | None  # (n_frames,)
    resolution: float  # [file's length]
    species: tuple[str, ...] | None = None


class _Request(NamedTuple):
    """Which frames of what to read; a reader raises InputError without naming the file."""

    path: Path
    n_atoms: int
    start: int
    stop: int | None
    stride: int
    chunk: int
    with_species: bool  # whether anybody wants to know them
    units: str  # name of the system's style

    def wants(self, frame: int) -> bool:
        return frame >= self.start and (frame - self.start) % self.stride == 0 and not self.ends(frame)

    def ends(self, frame: int) -> bool:
        return self.stop is not None and frame >= self.stop


class _Format(NamedTuple):
    name: str
    read: Callable[[_Request], Iterator[_Block]]
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
    request = _Request(path, system.n_atoms, start, stop, stride, chunk, with_species, system.units.name)
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
        raise InputError(f"{path}: mdtraj reads no topology from it ({_reason(error)})") from None
    _check_count(loaded.n_atoms, system.n_atoms, str(path))
    _check_species(_known(_symbols(loaded)), system.crystal, str(path))


def _symbols(loaded: Any) -> tuple[str, ...]:
    return tuple("" if atom.element is None else atom.element.symbol for atom in loaded.atoms)


def _known(species: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Species if every one is a chemical element; names such as MW, VS or X tell nothing."""
    from ase.data import atomic_numbers

    return species if species and all(atomic_numbers.get(name) for name in set(species)) else None


def _check_count(n_atoms: int, expected: int, where: str = "") -> None:
    if n_atoms != expected:
        raise InputError(f"{where}{': ' if where else ''}{n_atoms} atoms, but the system has {expected}")


def _check_species(species: tuple[str, ...] | None, crystal: Crystal | Box, where: str) -> None:
    if species is None or UNKNOWN_SPECIES & {*crystal.species}:
        return
    if Counter(species) != Counter(crystal.species):
        raise InputError(f"{where}: the file holds {formula(species)}, the system {formula(crystal.species)}")


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0].strip()[:120]}" if lines else "")


def _checked(form: _Format, request: _Request, system: System | Box, sigma: str | None) -> Iterator[Frames]:
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
                f"{path}: cannot be read as {form.name} ({_reason(error)}); is it truncated or corrupted?"
            ) from None
        if block is None:
            break
        frame = lambda k, first=index: f"{path}: frame {first + int(k) * request.stride}"  # noqa: E731
        _check_count(block.positions.shape[1], system.n_atoms, frame(0))
        species = _known(block.species)
        _check_species(species, crystal, frame(0))
        lost = ~np.isfinite(block.positions)
        if lost.any():
            k, atom, _ = np.argwhere(lost)[0]
            raise InputError(f"{frame(k)}: atom {atom} (from 0) has coordinates that are not finite numbers")
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


# --------------------------------------------------------------------------- text formats


class _TextFrame(NamedTuple):
    positions: np.ndarray
    cell: np.ndarray | None
    energy: float
    species: tuple[str, ...] | None
    resolution: float | None  # None where an earlier frame has told


TextParser = Callable[[TextIOBase, _Request, int], _TextFrame | bool]


def _text(parser: Callable[[], TextParser], request: _Request) -> Iterator[_Block]:
    """Chunks of the frames that a parser returns: a frame, True for one skipped, False at the end."""
    parse = parser()
    opened: Any = gzip.open if request.path.suffix.lower() == ".gz" else open
    with opened(request.path, "rt", encoding="utf-8") as file:
        frame, held, resolution = 0, [], 0.0
        while not request.ends(frame):
            try:
                one = parse(file, request, frame)
            except InputError as error:
                yield from _gathered(held, resolution)
                raise InputError(f"frame {frame}: {error}") from None
            if one is False:
                break
            if isinstance(one, _TextFrame):
                resolution = resolution if one.resolution is None else one.resolution
                if held and one.species != held[0].species:
                    yield from _gathered(held, resolution)
                    held = []
                held.append(one)
                if len(held) == request.chunk:
                    yield from _gathered(held, resolution)
                    held = []
            frame += 1
        yield from _gathered(held, resolution)


def _gathered(frames: list[_TextFrame], resolution: float) -> Iterator[_Block]:
    if not frames:
        return
    none = np.full((3, 3), np.nan)
    cells = [none if frame.cell is None else np.nan_to_num(frame.cell, nan=np.inf) for frame in frames]
    yield _Block(
        np.stack([frame.positions for frame in frames]),
        np.stack(cells),
        np.array([frame.energy for frame in frames]),
        resolution,
        frames[0].species,
    )


def _rows(file: TextIOBase, n: int) -> list[str]:
    """The n lines of one frame's atoms."""
    rows = list(islice(file, n))
    # A last line without an end may have lost digits, and nothing would show it.
    if len(rows) < n or not rows[-1].endswith("\n"):
        raise InputError(f"the file ends after {len(rows)} of {n} atoms; is it truncated?")
    return rows


def _numbers(rows: list[str], columns: Sequence[int]) -> np.ndarray:
    """Columns of numbers (n_rows, n_columns)."""
    try:
        return np.loadtxt(rows, usecols=columns, ndmin=2, comments=None)
    except ValueError as error:
        raise InputError(f"the atoms are not the columns of numbers that were announced ({_reason(error)})") from None


def _rounding(rows: list[str], columns: Sequence[int]) -> float:
    """Unit of the last digit written, where numbers are largest."""
    words = [row.split() for row in rows]
    try:
        numbers = [Decimal(word[column]) for word in words for column in columns]
    except (InvalidOperation, IndexError):
        return 0.0  # what is wrong is said elsewhere
    numbers = [number for number in numbers if number.is_finite() and number]
    top = max((number.adjusted() for number in numbers), default=0)
    # Formats like %g drop trailing zeros: the longest of the largest numbers shows all digits.
    return min((10.0 ** int(n.as_tuple().exponent) for n in numbers if n.adjusted() == top), default=0.0)


def _whole(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"expected {what}, got {text.strip()[:40]!r}") from None


def _lammps_frame(file: TextIOBase, request: _Request, frame: int) -> _TextFrame | bool:
    line = file.readline()
    while line.isspace():
        line = file.readline()
    if not line:
        return False
    n_atoms, box = None, None
    while not line.startswith("ITEM: ATOMS"):
        if line.startswith("ITEM: NUMBER OF ATOMS"):
            n_atoms = _whole(file.readline(), "a number of atoms")
        elif line.startswith("ITEM: BOX BOUNDS"):
            box = line.split()[3:], [file.readline() for _ in range(3)]
        elif line.startswith("ITEM: UNITS"):
            style = file.readline().strip()
            if style != request.units:
                raise InputError(f"the dump is in {style} units, the system in {request.units}")
        elif line.startswith(("ITEM: TIMESTEP", "ITEM: TIME")):
            file.readline()
        elif not line:
            raise InputError("the file ends before the atoms; is it truncated?")
        else:
            raise InputError(f"expected a line of a LAMMPS text dump that starts with ITEM:, got {line.strip()[:40]!r}")
        line = file.readline()
    if n_atoms is None or box is None:
        raise InputError("the dump has no NUMBER OF ATOMS or BOX BOUNDS before its atoms")
    _check_count(n_atoms, request.n_atoms)
    rows = _rows(file, n_atoms)
    if not request.wants(frame):
        return True
    origin, cell = _lammps_cell(*box)
    names = line.split()[2:]
    kinds = (("xu", "yu", "zu"), ("x", "y", "z"), ("xsu", "ysu", "zsu"), ("xs", "ys", "zs"))
    found = next((kind for kind in kinds if set(kind) <= set(names)), None)
    if found is None:
        raise InputError(
            f"the dump has no columns x y z, xu yu zu, xs ys zs or xsu ysu zsu, but {' '.join(names)[:60]}"
        )
    columns = [names.index(name) for name in found]
    numbers = _numbers(rows, [*columns, *([names.index("id")] if "id" in names else [])])
    x, order = numbers[:, :3], np.arange(n_atoms)
    if "id" in names:
        order = np.argsort(numbers[:, 3], kind="stable")
        if (np.diff(numbers[order, 3]) == 0).any():
            raise InputError("two atoms have the same id")
    rounding = _rounding(rows, columns) if frame == request.start else None
    if "s" in found[0]:
        x = origin + x @ cell
        rounding = None if rounding is None else rounding * float(np.abs(cell).max())
    species = None
    if request.with_species and "element" in names:
        at = names.index("element")
        species = tuple(rows[i].split()[at] for i in order)
    return _TextFrame(x[order], cell, math.nan, species, rounding)


def _lammps_cell(header: list[str], lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3,) and cell (3, 3) from BOX BOUNDS: orthogonal, restricted or general triclinic."""
    try:
        bounds = np.array([[float(word) for word in line.split()] for line in lines])
    except ValueError:
        raise InputError("BOX BOUNDS are not three lines of as many numbers; is the file truncated?") from None
    boundaries = [word for word in header if re.fullmatch(r"[pfsm]{2}", word)]
    if any(word != "pp" for word in boundaries):
        raise InputError(f"the box has boundaries {' '.join(boundaries)}; a crystal repeats along all three (pp pp pp)")
    if bounds.shape == (3, 4) and "abc" in header:
        return bounds[:, 3], bounds[:, :3]
    if bounds.shape == (3, 2):
        low, high = bounds.T
        return low, np.diag(high - low)
    if bounds.shape == (3, 3):
        xy, xz, yz = bounds[:, 2]
        low = bounds[:, 0] - [min(0.0, xy, xz, xy + xz), min(0.0, yz), 0.0]
        high = bounds[:, 1] - [max(0.0, xy, xz, xy + xz), max(0.0, yz), 0.0]
        cell = np.diag(high - low)
        cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
        return low, cell
    raise InputError("BOX BOUNDS are not three lines of two, three or four numbers")


def _extxyz_frame(file: TextIOBase, request: _Request, frame: int) -> _TextFrame | bool:
    from ase.io.extxyz import key_val_str_to_dict

    line = file.readline()
    if not line or line.isspace():
        if any(not rest.isspace() for rest in file):
            raise InputError("an empty line stands where a number of atoms should")
        return False
    n_atoms = _whole(line, "a number of atoms")
    _check_count(n_atoms, request.n_atoms)
    comment = file.readline()
    rows = _rows(file, n_atoms)
    if not request.wants(frame):
        return True
    info = key_val_str_to_dict(comment) if "=" in comment else {}
    columns, width = {}, 0
    words = str(info.get("Properties", "species:S:1:pos:R:3")).split(":")
    for name, count in zip(words[::3], words[2::3], strict=False):
        columns[name] = list(range(width, width + _whole(count, "Properties as name:type:columns")))
        width += len(columns[name])
    if len(columns.get("pos", ())) != 3:
        raise InputError("Properties name no three columns pos")
    cell = None
    if "Lattice" in info:
        cell = np.asarray(info["Lattice"], float).T  # ASE's columns are the lattice vectors
        if cell.shape != (3, 3):
            raise InputError("Lattice is not nine numbers")
    try:
        energy = float(info.get("energy", math.nan))
    except (TypeError, ValueError):
        raise InputError(f"energy is not a number: {str(info['energy'])[:40]}") from None
    species = None
    if request.with_species and "species" in columns:
        at = columns["species"][0]
        species = tuple(row.split(None, at + 1)[at] for row in rows)
    x = _numbers(rows, columns["pos"])
    return _TextFrame(x, cell, energy, species, _rounding(rows, columns["pos"]) if frame == request.start else None)


def _pdb_parser() -> TextParser:
    cell: np.ndarray | None = None  # one for all models that follow

    def parse(file: TextIOBase, request: _Request, frame: int) -> _TextFrame | bool:
        nonlocal cell
        atoms, in_model, complete = [], False, False
        for line in file:
            record = line[:6].strip()
            if record == "CRYST1":
                cell = _pdb_cell(line)
            elif record in {"ATOM", "HETATM"}:
                atoms.append(line)
            elif record == "MODEL":
                in_model = True
            elif record in {"ENDMDL", "END"} and atoms:
                complete = True
                break
        if not atoms and not in_model:
            return False
        if in_model and not complete:
            raise InputError(f"the file ends after {len(atoms)} atoms of a model; is it truncated?")
        _check_count(len(atoms), request.n_atoms)
        if not request.wants(frame):
            return True
        try:
            x = np.array([[float(line[at : at + 8]) for at in (30, 38, 46)] for line in atoms])
        except ValueError:
            raise InputError("an atom has no coordinates in columns 31 to 54; is the file truncated?") from None
        species = tuple(line[76:78].strip().capitalize() for line in atoms) if request.with_species else None
        return _TextFrame(x, cell, math.nan, species, 1e-3)

    return parse


def _pdb_cell(line: str) -> np.ndarray | None:
    try:
        lengths, angles = ([float(line[at : at + n]) for at in ats] for n, ats in ((9, (6, 15, 24)), (7, (33, 40, 47))))
    except ValueError:
        raise InputError("CRYST1 does not hold three lengths and three angles") from None
    # A cell of 1 x 1 x 1 is how files without a cell say so.
    return None if lengths == [1.0, 1.0, 1.0] else _cell_of(np.array([lengths]), np.array([angles]))[0]


# --------------------------------------------------------------------------- binary formats


def _cell_of(lengths: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Cells (n, 3, 3) with a along x and b in the xy plane, of lengths (n, 3) and angles (n, 3) [degrees]."""
    # Through the sine of the complement, right angles give exact zeros.
    ca, cb, cg = np.sin(np.radians(90.0 - np.asarray(angles, float))).T
    a, b, c = np.asarray(lengths, float).T
    cells = np.zeros((len(a), 3, 3))
    with np.errstate(all="ignore"):
        sg = np.sqrt(1 - cg**2)
        cells[:, 0, 0] = a
        cells[:, 1, 0], cells[:, 1, 1] = b * cg, b * sg
        cells[:, 2, 0], cells[:, 2, 1] = c * cb, c * (ca - cb * cg) / sg
        cells[:, 2, 2] = np.sqrt(c**2 - cells[:, 2, 0] ** 2 - cells[:, 2, 1] ** 2)
    # Infinite where there is no such cell; a cell of zeros is none.
    cells[~np.isfinite(cells).all(axis=(1, 2))] = np.inf
    cells[(np.asarray(lengths) == 0).all(axis=1)] = 0.0
    return cells


def _float32_rounding(positions: np.ndarray) -> float:
    return float(np.spacing(np.float32(np.abs(positions).max(initial=0.0))))


def _dcd(request: _Request) -> Iterator[_Block]:
    """DCD as CHARMM, NAMD, LAMMPS, OpenMM and mdtraj write it; records checked at both ends."""
    with open(request.path, "rb") as file:
        head = file.read(92)
        order = {b"\x54\x00\x00\x00CORD": "<", b"\x00\x00\x00\x54CORD": ">"}.get(head[:8])
        if order is None or len(head) < 92:
            raise InputError("not a DCD file with 32-bit records")
        control = np.frombuffer(head, order + "i4", 20, 8)
        charmm = control[19] != 0  # without it there are no options
        if control[8] or (charmm and control[11]):
            raise InputError("DCD files with fixed atoms or a fourth dimension are not supported; write all atoms")
        size = int.from_bytes(file.read(4), "little" if order == "<" else "big")
        file.seek(size + 4, 1)
        record = np.frombuffer(file.read(12).ljust(12, b"\0"), order + "i4")
        if record[0] != 4 or record[2] != 4:
            raise InputError("the header of the DCD file is corrupted")
        n = int(record[1])
        _check_count(n, request.n_atoms)
        markers = {f"{end}{axis}": 4 * n for axis in "xyz" for end in ("before_", "after_")}
        fields: list[Any] = []
        if charmm and control[10]:
            markers |= {"before_cell": 48, "after_cell": 48}
            fields += [("before_cell", order + "i4"), ("cell", order + "f8", 6), ("after_cell", order + "i4")]
        for axis in "xyz":
            fields += [(f"before_{axis}", order + "i4"), (axis, order + "f4", n), (f"after_{axis}", order + "i4")]
        record, offset = np.dtype(fields), file.tell()
    whole, rest = divmod(max(0, request.path.stat().st_size - offset), record.itemsize)
    if request.stop is None or request.stop > whole:
        if rest:
            raise InputError(f"the file ends inside frame {whole}; is it truncated?")
        if whole < control[0]:
            raise InputError(f"the header announces {control[0]} frames, the file holds {whole}; is it truncated?")
    if not whole:
        return
    last = whole if request.stop is None else min(whole, request.stop)
    span = request.chunk * request.stride
    for first in range(request.start, last, span):
        # Mapped anew for each chunk: pages that have been read do not stay in memory.
        shape, at = (min(span, last - first),), offset + first * record.itemsize
        part = np.memmap(request.path, record, "r", at, shape)[:: request.stride]
        bad = [np.flatnonzero(part[name] != length) for name, length in markers.items()]
        worst = min((int(where[0]) for where in bad if where.size), default=None)
        if worst is not None:
            raise InputError(f"frame {first + worst * request.stride}: the records of the DCD file are corrupted")
        with np.errstate(invalid="ignore"):  # NaN, which is met later
            positions = np.stack([part[axis] for axis in "xyz"], axis=2).astype(float)
        cells = None
        if "cell" in record.names:  # pyright: ignore[reportOperatorIssue]
            a, gamma, b, beta, alpha, c = np.asarray(part["cell"], float).T
            angles = np.stack([alpha, beta, gamma], axis=1)
            if (np.abs(angles) <= 1).all():  # cosines
                angles = np.degrees(np.arccos(angles))
            cells = _cell_of(np.stack([a, b, c], axis=1), angles)
        yield _Block(positions, cells, None, _float32_rounding(positions))


def _strided(request: _Request, advance: Callable[[int], _Block | None]) -> Iterator[_Block]:
    """The frames asked for, a chunk or a little more at a time, of a reader that goes on by so many frames."""
    frame, held, n_held = 0, [], 0
    while not request.ends(frame):
        block = advance(request.chunk if request.stop is None else min(request.chunk, request.stop - frame))
        if block is None or not len(block.positions):
            break
        kept = [k for k in range(len(block.positions)) if request.wants(frame + k)]
        frame += len(block.positions)
        if kept:
            held.append(block._replace(**{key: _rows_of(getattr(block, key), kept) for key in block._fields[:3]}))
            n_held += len(kept)
        if n_held >= request.chunk:
            yield _joined(held)
            held, n_held = [], 0
    if held:
        yield _joined(held)


def _rows_of(part: np.ndarray | None, rows: list[int]) -> np.ndarray | None:
    return None if part is None else part[rows]


def _joined(blocks: list[_Block]) -> _Block:
    if len(blocks) == 1:
        return blocks[0]
    parts = {key: [getattr(block, key) for block in blocks] for key in blocks[0]._fields[:3]}
    return blocks[0]._replace(**{key: None if part[0] is None else np.concatenate(part) for key, part in parts.items()})


def _xtc(request: _Request) -> Iterator[_Block]:
    with contextlib.closing(xtc_frames(request.path, request.n_atoms, request.chunk, request.stop)) as frames:

        def advance(_: int) -> _Block | None:
            found = next(frames, None)  # as many as are asked for, which the reader knows
            if found is None:
                return None
            return _Block(found.positions, found.cells, None, _gromacs_rounding(found.positions))

        yield from _strided(request, advance)


def _trr(request: _Request) -> Iterator[_Block]:
    n_read = 0
    with request.path.open("rb") as file:

        def advance(count: int) -> _Block | None:
            nonlocal n_read
            frames = []
            while len(frames) < count:
                try:
                    frame = trr_frame(file, request.n_atoms)
                except InputError as error:
                    raise InputError(f"frame {n_read}: {error}") from None
                if frame is None:
                    break
                frames.append(frame)
                n_read += 1
            if not frames:
                return None
            positions, cells = (np.stack(part) for part in zip(*frames, strict=True))
            return _Block(positions, cells, None, _gromacs_rounding(positions))

        yield from _strided(request, advance)


def _gromacs_rounding(positions: np.ndarray) -> float:
    """XTC keeps whole multiples of a power of ten of a nanometre, found from the numbers; else float32."""
    if not positions.size or not np.isfinite(positions[0]).all():
        return 0.0
    x, rounding = positions[0].astype(float), _float32_rounding(positions)
    for decimals in range(1, 7):
        unit = 10.0**-decimals
        if unit > 4 * rounding and np.abs(x / unit - np.rint(x / unit)).max() < 2 * rounding / unit:
            return unit
    return rounding


def _hdf5(request: _Request) -> Iterator[_Block]:
    from mdtraj.formats import HDF5TrajectoryFile

    with HDF5TrajectoryFile(str(request.path)) as file:
        species = None
        if request.with_species and file.topology is not None:
            species = _symbols(file.topology)

        def advance(count: int) -> _Block | None:
            if file.tell() == len(file):
                return None
            frames: Any = file.read(n_frames=count)
            lengths, angles, energies = frames.cell_lengths, frames.cell_angles, frames.potentialEnergy
            cells = None if lengths is None or angles is None else _cell_of(lengths, angles)
            return _Block(frames.coordinates, cells, energies, _float32_rounding(frames.coordinates), species)

        yield from _strided(request, advance)


def _ase_traj(request: _Request) -> Iterator[_Block]:
    from ase.io import Trajectory

    opened: Any = Trajectory(str(request.path))
    with opened as file:
        last = len(file) if request.stop is None else min(len(file), request.stop)
        wanted = range(request.start, last, request.stride)
        for first in range(0, len(wanted), request.chunk):
            images = [file[k] for k in wanted[first : first + request.chunk]]
            for k, atoms in enumerate(images):
                if len(atoms) != request.n_atoms:
                    _check_count(len(atoms), request.n_atoms, f"frame {wanted[first + k]}")
            positions = np.stack([atoms.positions for atoms in images])
            energies = [
                float(atoms.calc.results.get("energy", math.nan)) if atoms.calc else math.nan for atoms in images
            ]
            species = tuple(images[0].get_chemical_symbols())
            rounding = float(np.spacing(np.abs(positions).max()))
            yield _Block(
                positions, np.stack([atoms.cell.array for atoms in images]), np.array(energies), rounding, species
            )


_LAMMPS = _Format("a LAMMPS text dump", functools.partial(_text, lambda: _lammps_frame), "style")
_EXTXYZ = _Format("extended XYZ", functools.partial(_text, lambda: _extxyz_frame), "ase")
_PDB = _Format("PDB", functools.partial(_text, _pdb_parser), "angstrom", cell_resolution=1e-3)
_HDF5 = _Format("HDF5", _hdf5, "nm")
_TEXT = {form.name for form in (_LAMMPS, _EXTXYZ, _PDB)}
_FORMATS = {
    ".lammpstrj": _LAMMPS,
    ".lammpsdump": _LAMMPS,
    ".dump": _LAMMPS,
    ".extxyz": _EXTXYZ,
    ".xyz": _EXTXYZ,
    ".pdb": _PDB,
    ".traj": _Format("an ASE trajectory", _ase_traj, "ase"),
    ".xtc": _Format("XTC", _xtc, "nm"),
    ".trr": _Format("TRR", _trr, "nm"),
    ".dcd": _Format("DCD", _dcd, "angstrom"),
    ".h5": _HDF5,
    ".hdf5": _HDF5,
}
