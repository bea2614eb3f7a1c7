"""Which frames of a trajectory are samples of the target, and how many independent ones they make."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from freeflow.errors import LostCrystalError
from freeflow.estimators import equilibrated, statistical_inefficiency
from freeflow.trajectories.series import FrameSeries
from freeflow.types import Crystal

LOST = 0.01  # share of frames with an atom off its site above which there is no crystal to speak of
FEWEST = 10.0  # independent frames; fewer tell neither a mean nor its error


class Equilibrium(NamedTuple):
    """The part of a trajectory that has forgotten how it began."""

    series: FrameSeries
    start: int  # its first frame
    inefficiency: float  # statistical inefficiency g >= 1 of energies, and volumes, from there on

    @property
    def used(self) -> Bool[np.ndarray, " n_frames"]:
        """Sound frames from `start` on."""
        return self.series.sound & (np.arange(self.series.n_frames) >= self.start)

    @property
    def effective(self) -> float:
        """Number of independent frames."""
        return float(self.used.sum()) / self.inefficiency

    def inefficiency_of(self, values: Float[np.ndarray, " n_frames"]) -> float:
        """Statistical inefficiency of another number per frame; never below that of the energies."""
        return max(self.inefficiency, statistical_inefficiency(values[self.used]))

    def frames(self, n: int) -> tuple[Any, float]:
        """At most `n` frames, evenly spaced in time, and the statistical inefficiency of this thinner series.

        Frames are displacements (n_some, n_atoms, 3), or a batch of `freeflow.cells.Strained` where the cell moves.
        """
        choice = np.flatnonzero(self.used[self.series.kept])
        choice = choice[np.linspace(0, len(choice) - 1, min(n, len(choice))).round().astype(int)]
        return self.series.configurations(choice), max(1.0, len(choice) / self.effective)

    def halves(self) -> tuple[Equilibrium, Equilibrium]:
        """The earlier and the later half of what is in equilibrium: what one is fitted to, the other can test."""
        n = self.series.n_frames
        middle = (self.start + n) // 2
        return self._replace(series=self.series.part(0, middle)), Equilibrium(
            self.series.part(middle, n), 0, self.inefficiency
        )

    def in_reference(self, before: Crystal, after: Crystal) -> Equilibrium:
        """The same relative to another reference cell, where the cell moves."""
        return self._replace(series=self.series.in_reference(before, after))

    @property
    def faults(self) -> tuple[str, ...]:
        """Why these frames cannot stand for samples of the target, one sentence each."""
        series, n = self.series, self.series.n_frames
        n_melted, n_hopped = int(series.melted.sum()), int(series.hopped.sum())
        found = []
        if n_melted + n_hopped > LOST * n:
            states = [f"{m} {word}" for m, word in ((n_melted, "melted"), (n_hopped, "with an atom off its site")) if m]
            found.append(f"of {n} frames {' and '.join(states)}: this crystal melts or its atoms hop here")
        if self.start > n / 2:
            found.append(f"it is too short: still on its way to equilibrium at frame {self.start} of {n}")
        elif self.effective < FEWEST:
            found.append(f"the {int(self.used.sum())} frames hold {self.effective:.1f} independent ones only")
        comparison = series.energy_comparison
        if comparison.agrees is False and not comparison.offset:
            found.append(comparison.verdict)
        return tuple(found)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know besides."""
        series, comparison = self.series, self.series.energy_comparison
        lost = int((~series.sound).sum())
        few = 0 < lost <= LOST * series.n_frames
        where = "an atom off its site" + ("" if series.strains is None else ", or the cell out of its range")
        said = [f"{lost} of {series.n_frames} frames have {where}; they are left out"] if few else []
        if self.start:
            said.append(f"the first {self.start} of {series.n_frames} frames are left out: equilibration")
        if comparison.agrees is False and comparison.offset:
            said.append(comparison.verdict)
        return tuple(said)


def equilibrium(series: FrameSeries) -> Equilibrium:
    """Where equilibration ends, by energies and volumes, and the statistical inefficiency from there on.

    Raises:
        LostCrystalError: If no frame is this crystal.

    References: Chodera, J. Chem. Theory Comput. 12, 1799 (2016).
    """
    sound = np.flatnonzero(series.sound)
    if not len(sound):
        melted = int(series.melted.sum())
        state = f"{melted} melted, {series.n_frames - melted} with an atom off its site"
        raise LostCrystalError(f"{series.path}: none of {series.n_frames} frames is this crystal ({state})")
    numbers = [series.energies[sound]]
    if series.strains is not None:  # a barostat may be slow
        numbers.append(np.trace(series.strains[sound], axis1=1, axis2=2))
    start = max(equilibrated(values).start for values in numbers)
    inefficiency = max(statistical_inefficiency(values[start:]) for values in numbers)
    return Equilibrium(series, int(sound[start]) if start else 0, inefficiency)
