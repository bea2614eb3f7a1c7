"""Folders that one run at a time works in. Importing this module starts nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from freeflow.errors import InputError

LOCK_FILE = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder while the block lasts, and clear away what a killed run left half written.

    The lock goes with the process, however that ends; only its empty file stays behind a run that was killed. A file
    system that knows no locks is used without.

    Raises:
        InputError: If another process holds the folder, or it cannot be written.
    """
    path = folder / LOCK_FILE
    descriptor = _locked(path)
    try:
        for torso in folder.glob(".*.tmp"):
            with suppress(OSError):
                torso.unlink()
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """The descriptor of the lock file, held."""
    import fcntl

    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"{path.parent}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            message = "another run is at work there; wait for it, or give another folder"
            raise InputError(f"{path.parent}: {message}") from None
        except OSError:
            return descriptor
        # Between opening and locking, the run before may have ended and removed the file: then it is nobody's.
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)
