"""A process that reads one XTC or HDF5 file: frames out, through a pipe; see freeflow.trajectories.apart.

These formats are read by libraries in C, which trust what a file says of its own sizes: a flipped bit makes them write
beyond their memory, or end by a signal. Here they have nothing to spoil but themselves. It is started as
`python -m freeflow.reading_worker FORMAT FILE CHUNK STOP` and writes messages: the length of a header, the header
(JSON), and the arrays that it announces. The last one announces nothing. It ends when nobody reads any more, also
when its parent was killed.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

LENGTH = struct.Struct("<i")
Block = dict[str, Any]  # arrays by name; None where the file has none


def main(form: str, path: str, chunk: int, stop: int) -> None:
    """Write frames, block after block.

    Args:
        form: A key of READERS.
        path: The file.
        chunk: Frames of a block, at most.
        stop: Frame to stop before; negative for the end of the file.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    out = os.fdopen(os.dup(1), "wb")
    # What the reader prints must not get between the frames, nor on the user's terminal.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        try:
            for block in READERS[form](path, chunk, stop):
                _send(out, block)
            _send(out, {})
        except BrokenPipeError:  # nobody reads any more
            raise
        except Exception as error:  # whatever the reader happens to raise
            line = next(iter(str(error).strip().splitlines()), "").strip()[:120]
            _send(out, {}, failed=type(error).__name__ + (f": {line}" if line else ""))
    except BrokenPipeError:
        pass
    # Memory may be damaged: nothing of it is tidied up.
    os._exit(0)


def _send(out: BinaryIO, block: Block, **more: Any) -> None:
    species = block.pop("species", None)
    arrays = {name: np.ascontiguousarray(part) for name, part in block.items() if part is not None}
    shapes = {name: [part.dtype.str, part.shape] for name, part in arrays.items()}
    header = json.dumps({"arrays": shapes, "species": species, **more}).encode()
    out.write(LENGTH.pack(len(header)) + header)
    for part in arrays.values():
        out.write(part.data)
    out.flush()


def _counts(chunk: int, stop: int) -> Iterator[int]:
    """How many frames to ask for, again and again."""
    frame = 0
    while stop < 0 or frame < stop:
        count = chunk if stop < 0 else min(chunk, stop - frame)
        frame += count
        yield count


def _xtc(path: str, chunk: int, stop: int) -> Iterator[Block]:
    from mdtraj.formats import XTCTrajectoryFile

    with XTCTrajectoryFile(path) as file:
        for count in _counts(chunk, stop):
            positions, _, _, cells = file.read(n_frames=count)
            if not len(positions):
                return
            yield {"positions": positions, "cells": cells}


def _hdf5(path: str, chunk: int, stop: int) -> Iterator[Block]:
    from mdtraj.formats import HDF5TrajectoryFile

    with HDF5TrajectoryFile(path) as file:
        made: Any = file.topology
        species = made and ["" if atom.element is None else atom.element.symbol for atom in made.atoms]
        for count in _counts(chunk, stop):
            if file.tell() == len(file):
                return
            frames: Any = file.read(n_frames=count)
            yield {
                "positions": frames.coordinates,
                "lengths": frames.cell_lengths,
                "angles": frames.cell_angles,
                "energies": frames.potentialEnergy,
                "species": species,
            }


READERS: dict[str, Callable[[str, int, int], Iterator[Block]]] = {"xtc": _xtc, "h5": _hdf5}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
