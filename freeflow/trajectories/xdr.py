"""TRR and XTC frames, checked before and after a reader written in C follows what they say.

A flipped bit is enough to make mdtraj's readers write beyond their memory. TRR is read here. XTC is compressed: what
headers say is checked first, a process of its own decodes the frames, and these must lie within the corners that their
headers name.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float

from freeflow.errors import InputError
from freeflow.trajectories.apart import blocks_apart

_XTC_MAGIC, _TRR_MAGIC = 1995, 1993
_XTC_HEAD, _XTC_PACKING = struct.Struct(">iiif9fi"), struct.Struct(">f3i3iiI")
_XTC_SMALLEST, _XTC_LARGEST = 9, 72  # indices into the format's table of sizes
_XTC_PLAIN = 9  # no more atoms than this are stored as floats
_TRR_HEAD = struct.Struct(">ii4s12s13i")
_TRR_NAME = b"GMX_trn_file"


# --------------------------------------------------------------------------- XTC


def xtc_blocks(path: Path, n_atoms: int, chunk: int, stop: int | None) -> Generator[dict[str, Any], None, None]:
    """ "positions" (n_frames, n_atoms, 3) and "cells" [nm] of an XTC file, block after block, from the first frame on.

    Args:
        path: The file.
        n_atoms: That every frame must have.
        chunk: Frames of a block, at most.
        stop: Frame to stop before; None for the end of the file.

    Raises:
        InputError: If the file is cut short, corrupted or of another number of atoms.
    """
    corners, frame = _xtc_corners(path, n_atoms, stop), 0
    with contextlib.closing(blocks_apart("xtc", path, n_atoms, chunk, stop)) as blocks:
        for block in blocks:
            _require_within(block["positions"], corners[frame : frame + len(block["positions"])], frame)
            frame += len(block["positions"])
            yield block
    if frame < len(corners):
        raise InputError(f"the reader of XTC files finds no frame {frame}; is the file truncated or corrupted?")


def _require_within(
    positions: Float[np.ndarray, "n_frames n_atoms 3"], corners: Float[np.ndarray, "n_frames 2 3"], first: int
) -> None:
    """Corners that a header names are those of the box around the frame's atoms; a frame that goes wrong leaves it."""
    slack = 2e-6 * (1 + np.abs(corners).max(axis=(1, 2)))[:, None]  # single precision
    with np.errstate(invalid="ignore"):
        inside = (positions.min(axis=1) >= corners[:, 0] - slack) & (positions.max(axis=1) <= corners[:, 1] + slack)
    wrong = np.flatnonzero(~inside.all(axis=1))
    if wrong.size:
        raise InputError(f"frame {first + wrong[0]}: atoms are not where its header says; is the file corrupted?")


def _xtc_corners(path: Path, n_atoms: int, stop: int | None) -> Float[np.ndarray, "n_frames 2 3"]:
    """Walk through an XTC file from header to header, up to a frame number or the end.

    Returns:
        Lowest and highest coordinates that every frame's header announces [nm]; infinite where it announces none.

    Raises:
        InputError: Naming the frame whose header is corrupted, or which is cut short or of another number of atoms.
    """
    size, at, corners = path.stat().st_size, 0, []
    with path.open("rb") as file:
        while at < size and (stop is None or len(corners) < stop):
            file.seek(at)
            try:
                length, found = _xtc_frame(file, n_atoms)
                at += length
            except struct.error:
                at = size + 1
            except InputError as error:
                raise InputError(f"frame {len(corners)}: {error}") from None
            if at > size:
                raise InputError(f"the file ends inside frame {len(corners)}; is it truncated or corrupted?")
            corners.append(found)
    return np.array(corners).reshape(-1, 2, 3)


def _xtc_frame(file: BinaryIO, n_atoms: int) -> tuple[int, list[float]]:
    """Bytes of the frame that begins here, and its lowest and highest coordinates [nm]."""
    magic, count, _, _, *box, again = _XTC_HEAD.unpack(file.read(_XTC_HEAD.size))
    if magic != _XTC_MAGIC:
        raise InputError(f"cannot be read as XTC (it begins with {magic}, not {_XTC_MAGIC}); is it corrupted?")
    _require(count == again and all(map(math.isfinite, box)))
    _require_count(count, n_atoms)
    if count <= _XTC_PLAIN:
        return _XTC_HEAD.size + 12 * count, [-math.inf] * 3 + [math.inf] * 3
    precision, *corners, small, n_bytes = _XTC_PACKING.unpack(file.read(_XTC_PACKING.size))
    low, high = corners[:3], corners[3:]
    _require(0 < precision < math.inf and all(a <= b for a, b in zip(low, high, strict=True)))
    # The reader holds 1.2 times the uncompressed coordinates.
    _require(_XTC_SMALLEST <= small <= _XTC_LARGEST and 0 < n_bytes <= 14 * count)
    return _XTC_HEAD.size + _XTC_PACKING.size + -(-n_bytes // 4) * 4, [corner / precision for corner in corners]


# --------------------------------------------------------------------------- TRR


def trr_frame(file: BinaryIO, n_atoms: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The next frame of a TRR file, in single or double precision.

    Returns:
        Positions (n_atoms, 3) and cell (3, 3), zero where the file has none [nm]; None at the end of the file.

    Raises:
        InputError: If the frame is cut short, corrupted, without positions or of another number of atoms.
    """
    head = file.read(_TRR_HEAD.size)
    if not head:
        return None
    if len(head) < _TRR_HEAD.size:
        raise InputError("the file ends inside it; is it truncated or corrupted?")
    magic, length, _, name, *numbers = _TRR_HEAD.unpack(head)
    if magic != _TRR_MAGIC:
        raise InputError(f"cannot be read as TRR (it begins with {magic}, not {_TRR_MAGIC}); is it corrupted?")
    ir, energy, box, virial, pressure, topology, symbols, x, v, f, count, _, _ = numbers
    _require(length == len(_TRR_NAME) + 1 and name == _TRR_NAME and not any((ir, energy, topology, symbols)))
    _require_count(count, n_atoms)
    width = 8 if 72 in (box, virial, pressure) or 24 * count in (x, v, f) else 4
    _require({box, virial, pressure} <= {0, 9 * width} and {x, v, f} <= {0, 3 * width * count})
    if not x:
        raise InputError("it holds no positions")
    sizes = 2 * width, box, virial, pressure, x, v, f  # first time and lambda
    content = file.read(sum(sizes))
    if len(content) < sum(sizes):
        raise InputError("the file ends inside it; is it truncated or corrupted?")
    at = 2 * width + box + virial + pressure
    cell = np.frombuffer(content, f">f{width}", box // width, 2 * width) if box else np.zeros(9)
    positions = np.frombuffer(content, f">f{width}", 3 * count, at)
    with np.errstate(invalid="ignore"):  # NaN, which is met later
        return positions.reshape(count, 3).astype(f"f{width}"), cell.reshape(3, 3).astype(float)


def _require(sound: bool) -> None:
    if not sound:
        raise InputError("its header makes no sense; is the file truncated or corrupted?")


def _require_count(n_atoms: int, expected: int) -> None:
    if n_atoms != expected:
        raise InputError(f"{n_atoms} atoms, but the system has {expected}")
