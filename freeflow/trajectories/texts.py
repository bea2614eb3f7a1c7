"""Readers of text formats: LAMMPS dumps, extended XYZ, PDB; a frame at a time, gzipped or not."""

from __future__ import annotations

import functools
import gzip
import math
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from io import TextIOBase
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from freeflow.errors import InputError
from freeflow.trajectories.blocks import Block, Request, cell_of, reason_of, require_count


class _TextFrame(NamedTuple):
    positions: np.ndarray
    cell: np.ndarray | None
    energy: float
    species: tuple[str, ...] | None
    resolution: float | None  # None where an earlier frame has told


TextParser = Callable[[TextIOBase, Request, int], _TextFrame | bool]


def _read(parser: Callable[[], TextParser], request: Request) -> Iterator[Block]:
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


def _gathered(frames: list[_TextFrame], resolution: float) -> Iterator[Block]:
    if not frames:
        return
    none = np.full((3, 3), np.nan)
    cells = [none if frame.cell is None else np.nan_to_num(frame.cell, nan=np.inf) for frame in frames]
    yield Block(
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
        raise InputError(f"the atoms are not the columns of numbers that were announced ({reason_of(error)})") from None


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


def _lammps_frame(file: TextIOBase, request: Request, frame: int) -> _TextFrame | bool:
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
    require_count(n_atoms, request.n_atoms)
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


def _extxyz_frame(file: TextIOBase, request: Request, frame: int) -> _TextFrame | bool:
    from ase.io.extxyz import key_val_str_to_dict

    line = file.readline()
    if not line or line.isspace():
        if any(not rest.isspace() for rest in file):
            raise InputError("an empty line stands where a number of atoms should")
        return False
    n_atoms = _whole(line, "a number of atoms")
    require_count(n_atoms, request.n_atoms)
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

    def parse(file: TextIOBase, request: Request, frame: int) -> _TextFrame | bool:
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
        require_count(len(atoms), request.n_atoms)
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
    return None if lengths == [1.0, 1.0, 1.0] else cell_of(np.array([lengths]), np.array([angles]))[0]


read_lammps = functools.partial(_read, lambda: _lammps_frame)
read_extxyz = functools.partial(_read, lambda: _extxyz_frame)
read_pdb = functools.partial(_read, _pdb_parser)
