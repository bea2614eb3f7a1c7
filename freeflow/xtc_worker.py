"""A process that decodes one XTC file: frames out, through a pipe; see freeflow.trajectories.xdr.

mdtraj's reader, in C, trusts what a frame says of its own length: a flipped bit makes it write beyond its memory. Here
it has nothing to spoil but itself. It is started as `python -m freeflow.xtc_worker FILE CHUNK STOP` and writes, for up
to CHUNK frames at a time, their number, positions and cells; 0 is the end, at frame STOP (-1: that of the file).
It ends when nobody reads any more, also when its parent was killed.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from typing import BinaryIO

import numpy as np

COUNT = struct.Struct("<i")  # of frames, or -1 where a complaint of so many bytes follows
REAL = np.dtype("<f4")


def main(path: str, chunk: int, stop: int) -> None:
    """Write all frames up to `stop`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    out = os.fdopen(os.dup(1), "wb")
    # What the reader prints must not get between the frames, nor on the user's terminal.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        _write(out, path, chunk, stop)
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:  # whatever the reader happens to raise
        said = str(error).encode()
        out.write(COUNT.pack(-1) + COUNT.pack(len(said)) + said)
    out.flush()
    # Memory may be damaged: nothing of it is tidied up.
    os._exit(0)


def _write(out: BinaryIO, path: str, chunk: int, stop: int) -> None:
    from mdtraj.formats import XTCTrajectoryFile

    frame = 0
    with XTCTrajectoryFile(path) as file:
        while stop < 0 or frame < stop:
            positions, _, _, cells = file.read(n_frames=chunk if stop < 0 else min(chunk, stop - frame))
            frame += len(positions)
            out.write(COUNT.pack(len(positions)))
            for part in (positions, cells):
                out.write(np.ascontiguousarray(part, REAL).data)
            out.flush()
            if not len(positions):
                return
    out.write(COUNT.pack(0))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
