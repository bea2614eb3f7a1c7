"""Blocks of frames from a reader in a process of its own, which a damaged file may bring down; see reading_worker."""

from __future__ import annotations

import json
import math
import signal
import struct
import subprocess
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from freeflow import children
from freeflow.errors import InputError
from freeflow.reading_worker import LENGTH

_PATIENCE = 60.0  # with the process, for a block of frames [s]
_NAMES = {"xtc": "XTC", "h5": "HDF5"}


def blocks_apart(
    form: str, path: Path, n_atoms: int, chunk: int, stop: int | None
) -> Generator[dict[str, Any], None, None]:
    """Arrays and species of consecutive frames, block after block, from the first one on.

    Args:
        form: "xtc" or "h5".
        path: The file.
        n_atoms: That every frame must have.
        chunk: Frames of a block, at most.
        stop: Frame to stop before; None for the end of the file.

    Raises:
        InputError: If the reader refuses the file, breaks off or takes too long.
    """
    last = -1 if stop is None else stop
    command = children.command("freeflow.reading_worker", form, str(path), str(chunk), str(last))
    environment = children.environment()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as worker:
        try:
            while block := _received(worker, _NAMES[form], n_atoms):
                yield block
        finally:
            worker.kill()


def _received(worker: subprocess.Popen[bytes], name: str, n_atoms: int) -> dict[str, Any]:
    """The next block; empty at the end."""
    assert worker.stdout is not None
    overdue = threading.Timer(_PATIENCE, worker.kill)
    overdue.start()
    try:
        header = json.loads(worker.stdout.read(LENGTH.unpack(worker.stdout.read(LENGTH.size))[0]))
        if "failed" in header:
            raise InputError(f"cannot be read as {name} ({header['failed']}); is it truncated or corrupted?")
        block: dict[str, Any] = {}
        for key, (dtype, shape) in header["arrays"].items():
            content = worker.stdout.read(np.dtype(dtype).itemsize * math.prod(shape))
            block[key] = np.frombuffer(content, dtype).reshape(shape)
    except (struct.error, ValueError, LookupError, TypeError):  # cut off, or nonsense
        status = worker.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else "broke off"
        raise InputError(f"the reader of {name} files {how}; is the file truncated or corrupted?") from None
    finally:
        overdue.cancel()
    if not block:
        return {}
    n_frames, found = len(block["positions"]), block["positions"].shape[1]
    if found != n_atoms:
        raise InputError(f"{found} atoms, but the system has {n_atoms}")
    if any(len(part) != n_frames for part in block.values()):
        raise InputError(f"{name}: not every frame has all its parts; is the file truncated or corrupted?")
    return {**block, "species": None if header["species"] is None else tuple(header["species"])}
