"""Python processes of freeflow's own, which find the modules that this one finds and no others."""

from __future__ import annotations

import os
import sys


def command(module: str, *arguments: str) -> list[str]:
    """To run a module of freeflow; with -P no script in the current folder stands in for a library's module."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(**defaults: str) -> dict[str, str]:
    """This process's, with its module path; `defaults` hold where it says nothing."""
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)
    return {**defaults, **os.environ, "PYTHONPATH": path}
