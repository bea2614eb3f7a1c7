"""Readers of binary formats: DCD, XTC, TRR, HDF5, ASE's .traj; chunks of frames."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from freeflow.errors import InputError
from freeflow.trajectories.apart import blocks_apart
from freeflow.trajectories.blocks import Block, Request, cell_of, require_count
from freeflow.trajectories.xdr import trr_frame, xtc_blocks


def _float32_rounding(positions: np.ndarray) -> float:
    return float(np.spacing(np.float32(np.abs(positions).max(initial=0.0))))


def read_dcd(request: Request) -> Iterator[Block]:
    """DCD as CHARMM, NAMD, LAMMPS, OpenMM and mdtraj write it; records checked at both ends.

    Raises:
        InputError: If the file is damaged or of other atoms, without its name.
    """
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
        require_count(n, request.n_atoms)
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
            cells = cell_of(np.stack([a, b, c], axis=1), angles)
        yield Block(positions, cells, None, _float32_rounding(positions))


def _strided(request: Request, advance: Callable[[int], Block | None]) -> Iterator[Block]:
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


def _joined(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    parts = {key: [getattr(block, key) for block in blocks] for key in blocks[0]._fields[:3]}
    return blocks[0]._replace(**{key: None if part[0] is None else np.concatenate(part) for key, part in parts.items()})


def read_xtc(request: Request) -> Iterator[Block]:
    """Frames of an XTC file, decoded in a process of their own.

    Raises:
        InputError: If the file is damaged or of other atoms, without its name.
    """
    with contextlib.closing(xtc_blocks(request.path, request.n_atoms, request.chunk, request.stop)) as blocks:

        def advance(_: int) -> Block | None:
            found = next(blocks, None)  # of as many frames as are asked for, which the reader knows
            if found is None:
                return None
            return Block(found["positions"], found["cells"], None, _gromacs_rounding(found["positions"]))

        yield from _strided(request, advance)


def read_trr(request: Request) -> Iterator[Block]:
    """Frames of a TRR file.

    Raises:
        InputError: If the file is damaged or of other atoms, without its name.
    """
    n_read = 0
    with request.path.open("rb") as file:

        def advance(count: int) -> Block | None:
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
            return Block(positions, cells, None, _gromacs_rounding(positions))

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


def read_hdf5(request: Request) -> Iterator[Block]:
    """Frames of an HDF5 file of mdtraj, with energies and species if it has them, read in a process of their own.

    Raises:
        InputError: If the file is damaged or of other atoms, without its name.
    """
    path = request.path
    with contextlib.closing(blocks_apart("h5", path, request.n_atoms, request.chunk, request.stop)) as blocks:

        def advance(_: int) -> Block | None:
            found = next(blocks, None)
            if found is None:
                return None
            cells = cell_of(found["lengths"], found["angles"]) if {"lengths", "angles"} <= set(found) else None
            species = found["species"] if request.with_species else None
            rounding = _float32_rounding(found["positions"])
            return Block(found["positions"], cells, found.get("energies"), rounding, species)

        yield from _strided(request, advance)


def read_ase(request: Request) -> Iterator[Block]:
    """Frames of a trajectory of ASE, with energies if its calculators kept them."""
    from ase.io import Trajectory

    opened: Any = Trajectory(str(request.path))
    with opened as file:
        last = len(file) if request.stop is None else min(len(file), request.stop)
        wanted = range(request.start, last, request.stride)
        for first in range(0, len(wanted), request.chunk):
            images = [file[k] for k in wanted[first : first + request.chunk]]
            for k, atoms in enumerate(images):
                if len(atoms) != request.n_atoms:
                    require_count(len(atoms), request.n_atoms, f"frame {wanted[first + k]}")
            positions = np.stack([atoms.positions for atoms in images])
            energies = [
                float(atoms.calc.results.get("energy", math.nan)) if atoms.calc else math.nan for atoms in images
            ]
            species = tuple(images[0].get_chemical_symbols())
            rounding = float(np.spacing(np.abs(positions).max()))
            yield Block(
                positions, np.stack([atoms.cell.array for atoms in images]), np.array(energies), rounding, species
            )
