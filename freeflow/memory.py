"""How much memory there is, and what running out of it looks like."""

from __future__ import annotations

from pathlib import Path

import jax

from freeflow.types import Device

# Limits that a container sets (control groups, version 2), and what it uses of them.
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
_MEMINFO = Path("/proc/meminfo")


def free_memory(device: Device | None = None) -> int | None:
    """Bytes that arrays on a device may still take; None where that cannot be told.

    A GPU's own memory, or what the machine, and the container, leave to this process.
    """
    place = jax.local_devices()[0] if device is None else device
    if place.platform != "cpu":
        stats = place.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= set(stats) else None
    return min((free for free in (_machine(), _container()) if free is not None), default=None)


def _machine() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def _container() -> int | None:
    try:
        return int(_LIMIT.read_text()) - int(_USED.read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
