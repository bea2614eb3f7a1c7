"""Ctrl-C beside threads: it strikes between two looks at their jobs, never inside a look.

`concurrent.futures.wait` takes the lock of every job in turn. A KeyboardInterrupt raised between two of them leaves the
first ones locked for good; the threads that hold these jobs can then never hand in their results, and whoever waits for
them never ends.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from typing import Any

_SECONDS = 0.2  # between two looks


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a SIGINT back until the block has ended. Other threads than the main one are never interrupted anyway."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    struck: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: struck.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if struck:
            handler(*struck[0])


def looks(jobs: Iterable[Future[Any]]) -> Iterator[None]:
    """Yield now and then while jobs are under way: until all are done, or one has failed.

    Raises:
        KeyboardInterrupt: Between two looks, if Ctrl-C struck during one.
    """
    jobs = list(jobs)
    while True:
        with uninterrupted():
            done, under_way = wait(jobs, timeout=_SECONDS, return_when=FIRST_EXCEPTION)
            failed = any(not job.cancelled() and job.exception() for job in done)
        if failed or not under_way:
            return
        yield
