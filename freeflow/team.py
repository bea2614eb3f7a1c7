"""Several processes, on one host or on many, that do one job together (`jax.distributed`).

Every process goes the same way and takes the same decisions, since all see the same samples: batches are dealt
out by their number, and what they came to is gathered by all. A process on its own is a team of one.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from freeflow.errors import FreeflowError, InputError

T = TypeVar("T")
_PATIENCE = 300  # seconds to wait for the others at the start


def join(where: str) -> None:
    """Make this process one of a team; to be called before JAX computes anything.

    Args:
        where: HOST:PORT,N,I with the address of the first process, the number of processes and this one's
            number from 0 on; or "auto" under Slurm, Open MPI or another launcher that `jax.distributed` knows.

    Raises:
        InputError: If it is neither.
        FreeflowError: If the others cannot be reached.
    """
    place = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", where)
    if place is None and where != "auto":
        raise InputError(f"distributed: {where!r} is neither auto nor HOST:PORT,N,I (such as node1:1234,4,0)")
    members: tuple[Any, ...] = ()
    if place is not None:
        members = (place[1], int(place[2]), int(place[3]))
        if not members[2] < members[1]:
            raise InputError(f"distributed: no process {members[2]} among {members[1]}; numbers begin with 0")
    try:
        with _stdout_aside():
            jax.distributed.initialize(*members, initialization_timeout=_PATIENCE)
            multihost_utils.process_allgather(np.zeros(1))
    except Exception as error:  # a launcher that is not there, an address that is taken, a peer that is missing
        reason = str(error).strip().splitlines()
        raise FreeflowError(f"the team of processes did not come together: {reason[0] if reason else error}") from None


@contextmanager
def _stdout_aside() -> Iterator[None]:
    """What libraries print on meeting each other goes to stderr: stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def size() -> int:
    """Number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return jax.process_index() == 0


def share(items: Sequence[T]) -> list[T]:
    """What of `items` falls to this process."""
    return list(items[jax.process_index() :: size()])


def gathered(own: Sequence[T]) -> list[T]:
    """The whole from everybody's share, in its order; all processes have to call this at the same point."""
    if size() == 1:
        return list(own)
    sent = np.frombuffer(pickle.dumps(list(own)), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([len(sent)]))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(sent)] = sent
    parcels = np.asarray(multihost_utils.process_allgather(padded))
    # Parcels come from processes of this very job: unpickling them runs nobody else's code.
    shares = [pickle.loads(row[:length].tobytes()) for row, length in zip(parcels, lengths, strict=True)]
    whole: list[T] = []
    for k in range(max(len(part) for part in shares)):
        whole += [part[k] for part in shares if k < len(part)]
    return whole
