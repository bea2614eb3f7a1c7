"""What readers of one format are asked, and what they answer: frames as the file has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from freeflow.errors import InputError


class Block(NamedTuple):
    """Frames as the file has them."""

    positions: np.ndarray  # (n_frames, n_atoms, 3) [file's length]
    cells: np.ndarray | None  # (n_frames, 3, 3) [file's length]
    energies: np.ndarray | None  # (n_frames,)
    resolution: float  # [file's length]
    species: tuple[str, ...] | None = None


class Request(NamedTuple):
    """Which frames of what to read; a reader raises InputError without naming the file."""

    path: Path
    n_atoms: int
    start: int
    stop: int | None
    stride: int
    chunk: int
    with_species: bool  # whether anybody wants to know them
    units: str  # name of the system's style

    def wants(self, frame: int) -> bool:
        """Whether a frame is among those asked for."""
        return frame >= self.start and (frame - self.start) % self.stride == 0 and not self.ends(frame)

    def ends(self, frame: int) -> bool:
        """Whether none from this frame on is asked for."""
        return self.stop is not None and frame >= self.stop


def require_count(n_atoms: int, expected: int, where: str = "") -> None:
    """Refuse another number of atoms.

    Raises:
        InputError: If the numbers differ.
    """
    if n_atoms != expected:
        raise InputError(f"{where}{': ' if where else ''}{n_atoms} atoms, but the system has {expected}")


def reason_of(error: BaseException) -> str:
    """An error of another library in a line."""
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0].strip()[:120]}" if lines else "")


def cell_of(lengths: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Cells (n, 3, 3) with a along x and b in the xy plane, of lengths (n, 3) and angles (n, 3) [degrees]."""
    # Through the sine of the complement, right angles give exact zeros.
    ca, cb, cg = np.sin(np.radians(90.0 - np.asarray(angles, float))).T
    a, b, c = np.asarray(lengths, float).T
    cells = np.zeros((len(a), 3, 3))
    with np.errstate(all="ignore"):
        sg = np.sqrt(1 - cg**2)
        cells[:, 0, 0] = a
        cells[:, 1, 0], cells[:, 1, 1] = b * cg, b * sg
        cells[:, 2, 0], cells[:, 2, 1] = c * cb, c * (ca - cb * cg) / sg
        cells[:, 2, 2] = np.sqrt(c**2 - cells[:, 2, 0] ** 2 - cells[:, 2, 1] ** 2)
    # Infinite where there is no such cell; a cell of zeros is none.
    cells[~np.isfinite(cells).all(axis=(1, 2))] = np.inf
    cells[(np.asarray(lengths) == 0).all(axis=1)] = 0.0
    return cells


def symbols(loaded: Any) -> tuple[str, ...]:
    """Chemical symbols of the atoms of an mdtraj topology; empty where it has none."""
    return tuple("" if atom.element is None else atom.element.symbol for atom in loaded.atoms)
