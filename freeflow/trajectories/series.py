"""A whole trajectory in one pass: numbers of every frame, and as many evenly spaced frames as fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from freeflow.cells import CELL_MOTIONS, LARGEST_STRETCH, CellMotion, Strained, strains_in_another_cell, stretches
from freeflow.errors import InputError
from freeflow.trajectories.alignment import to_displacements
from freeflow.trajectories.files import read
from freeflow.trajectories.recomputed import EnergyComparison, compare_energies, energies, energy_precision
from freeflow.types import Crystal, System

# Strain that cells of a run at constant volume may differ by: rounding. Those of 8000 atoms of silicon, which is hard,
# scatter by 5e-4 at room temperature.
_AT_REST = 1e-5


class FrameSeries(NamedTuple):
    """Frames of a trajectory as samples of the labelled crystal, in the order of the file."""

    path: str
    n_frames: int
    energies: Float[np.ndarray, " n_frames"]  # recomputed [energy]; infinite for frames that are not sound
    file_energies: Float[np.ndarray, " n_frames"]  # as the file has them; NaN where it has none
    mean_squared_displacements: Float[
        np.ndarray, " n_frames"
    ]  # mean over atoms of |u|^2, in the frame's cell [length^2]
    n_off: Int[np.ndarray, " n_frames"]  # atoms off their sites
    melted: Bool[np.ndarray, " n_frames"]
    hopped: Bool[np.ndarray, " n_frames"]
    resolution: float  # to which the file rounds positions, at worst [length]
    energy_comparison: EnergyComparison
    kept: Int[np.ndarray, " n_kept"]  # numbers in the series of the frames whose displacements are kept
    displacements: Float[np.ndarray, "n_kept n_atoms 3"]  # of sound frames, evenly spaced [length]
    strains: Float[np.ndarray, "n_frames 3 3"] | None = None  # of cells that move; displacements are in their reference

    @property
    def sound(self) -> Bool[np.ndarray, " n_frames"]:
        """Frames of the labelled crystal, which the system's target ensemble is made of."""
        return self.n_off == 0

    def part(self, start: int, stop: int) -> FrameSeries:
        """Frames start to stop - 1 alone."""
        some, inside = slice(start, stop), (self.kept >= start) & (self.kept < stop)
        return self._replace(
            n_frames=stop - start,
            energies=self.energies[some],
            file_energies=self.file_energies[some],
            mean_squared_displacements=self.mean_squared_displacements[some],
            n_off=self.n_off[some],
            melted=self.melted[some],
            hopped=self.hopped[some],
            kept=self.kept[inside] - start,
            displacements=self.displacements[inside],
            strains=None if self.strains is None else self.strains[some],
        )

    def configurations(self, some: Int[np.ndarray, " n_some"]) -> np.ndarray | Strained:
        """Kept frames, by their place among these: displacements, with strains where the cell moves."""
        strains = None if self.strains is None else self.strains[self.kept[some]]
        return _configurations(self.displacements[some], strains)

    def in_reference(self, before: Crystal, after: Crystal) -> FrameSeries:
        """Frames of a cell that moves, relative to another reference cell; which frames are sound is not asked anew."""
        if self.strains is None or np.array_equal(before.cell, after.cell):
            return self
        deformed = np.linalg.solve(before.cell, after.cell)
        return self._replace(
            displacements=self.displacements @ deformed, strains=strains_in_another_cell(self.strains, deformed)
        )

    def volumes(self, crystal: Crystal) -> Float[np.ndarray, " n_frames"] | None:
        """Of cells that move, by the crystal in their reference cell [length^3]; None if the cell is fixed."""
        if self.strains is None:
            return None
        return crystal.volume * np.exp(np.trace(self.strains, axis1=1, axis2=2))


def frame_series(
    path: str | Path,
    system: System,
    topology: str | Path | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    stride: int = 1,
    sigma: Literal["angstrom", "nm"] | None = None,
    max_coordinates: int = 2**24,
    progress: Callable[[int], None] | None = None,
) -> FrameSeries:
    """Read, align and evaluate frames start, start + stride, ... before stop, a chunk at a time.

    Every s-th sound frame is kept whole: s is 1 until more than `max_coordinates` are held, then every other one is
    dropped and s doubles.

    Args:
        path: The trajectory; see `read` for this and for what has no entry here.
        system: What the frames are meant to be samples of.
        topology: As in `read`.
        start: First frame, from 0.
        stop: Frame to stop before.
        stride: Read every so many frames.
        sigma: As in `read`.
        max_coordinates: Coordinates of kept frames in memory.
        progress: Told how many frames are done, chunk by chunk.

    Raises:
        InputError: If the file, or a frame of it, cannot be used; one line that names it.
    """
    if max_coordinates < 3 * system.n_atoms:
        raise InputError(f"max_coordinates: {max_coordinates} hold no frame of {system.n_atoms} atoms")
    store = _Store(system.n_atoms, max_coordinates)
    ours: list[Future[np.ndarray]] = []
    columns: list[tuple[np.ndarray, ...]] = []
    cells: list[np.ndarray] = []
    guess, resolution, n_done = None, 0.0, 0
    with ThreadPoolExecutor(1) as side:
        for frames in read(path, system, topology, start=start, stop=stop, stride=stride, sigma=sigma):
            aligned = to_displacements(frames.positions, system.crystal, frames.species, guess)
            strains = frames.strains
            if strains is not None:  # a cell that left its range counts as an atom that left its site
                beyond = np.abs(np.linalg.eigvalsh(strains)).max(axis=1) >= LARGEST_STRETCH
                aligned = aligned._replace(n_off=np.maximum(aligned.n_off, beyond))
            u, sound = aligned.displacements, aligned.sound
            if sound.any():
                guess = aligned.order[np.flatnonzero(sound)[-1]]
            # Energies of one chunk, not more, are found while the next is read and aligned.
            wait(ours[-1:])
            ours.append(side.submit(energies, system, _configurations(u, strains)))
            apart = u if strains is None else u @ stretches(strains)
            spread = np.einsum("fni,fni->f", apart, apart) / system.n_atoms
            columns.append((frames.energies, spread, aligned.n_off, aligned.melted, aligned.hopped))
            if strains is not None:
                cells.append(strains)
            store.add(n_done, u, sound)
            resolution = max(resolution, frames.resolution)
            n_done += len(u)
            if progress is not None:
                progress(n_done)
    recomputed = np.concatenate([chunk.result() for chunk in ours])
    theirs, spread, n_off, melted, hopped = (np.concatenate(column) for column in zip(*columns, strict=True))
    kept, displacements = store.result()
    strains = np.concatenate(cells) if cells else None
    if strains is not None and system.cell_motion is not None:
        _require_motion(str(path), strains, CELL_MOTIONS[system.cell_motion])
    some = _configurations(displacements, None if strains is None else strains[kept])
    precision = energy_precision(system, some, resolution)
    comparison = compare_energies(theirs, recomputed, precision, system.units)
    return FrameSeries(
        str(path),
        n_done,
        recomputed,
        theirs,
        spread,
        n_off,
        melted,
        hopped,
        resolution,
        comparison,
        kept,
        displacements,
        strains,
    )


def _configurations(displacements: np.ndarray, strains: np.ndarray | None) -> np.ndarray | Strained:
    return displacements if strains is None else Strained(displacements, strains)  # pyright: ignore[reportArgumentType]


def _require_motion(path: str, strains: Float[np.ndarray, "n_frames 3 3"], motion: CellMotion) -> None:
    """Refuse frames from a run whose cell was fixed, or free in fewer ways than the system's.

    Raises:
        InputError: If a combination of strains never changes.
    """
    coordinates = np.tensordot(strains, motion.basis, ((1, 2), (1, 2)))
    if len(coordinates) < 2:
        return
    if np.ptp(coordinates, axis=0).max() < _AT_REST:
        raise InputError(
            f"{path}: the cell is the same in all {len(strains)} frames: a run at constant volume, but the system is "
            "under a pressure; leave the pressure out, or take a run at constant pressure"
        )
    # Fewer frames than that span no more ways.
    if len(coordinates) > 2 * motion.n_strains:
        spread = np.linalg.svd(coordinates - coordinates.mean(axis=0), compute_uv=False)[-1] / math.sqrt(len(strains))
        if spread < _AT_REST:
            raise InputError(
                f"{path}: the cell changes in fewer ways than cell_motion: {motion.name} lets it; "
                "say how it moved, isotropic for instance"
            )


class _Store:
    """Frames that are kept: every s-th of the series, if it is sound, with s as small as memory allows."""

    def __init__(self, n_atoms: int, max_coordinates: int):
        self.capacity = max_coordinates // (3 * n_atoms)
        self.every = 1
        self.numbers = np.empty(0, int)
        self.parts: list[np.ndarray] = []

    def add(self, first: int, displacements: np.ndarray, sound: np.ndarray) -> None:
        """Take in a chunk of frames, the first of which has this number."""
        numbers = first + np.arange(len(sound))
        chosen = sound & (numbers % self.every == 0)
        self.parts.append(displacements[chosen])
        self.numbers = np.concatenate([self.numbers, numbers[chosen]])
        while len(self.numbers) > self.capacity:
            self.every *= 2
            stays = self.numbers % self.every == 0
            cuts = np.cumsum([len(part) for part in self.parts])[:-1]
            self.parts = [part[some] for part, some in zip(self.parts, np.split(stays, cuts), strict=True)]
            self.numbers = self.numbers[stays]

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (n_kept,) and displacements (n_kept, n_atoms, 3)."""
        return self.numbers, np.concatenate(self.parts)
