"""Which cores this process may use. Importing this module does not start JAX."""

from __future__ import annotations

import os


def cores() -> list[int] | None:
    """Numbers of the cores that the process may run on; None where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def n_cores() -> int:
    """How many these are."""
    own = cores()
    return (os.cpu_count() or 1) if own is None else len(own)
