"""What is looked at in configurations of the model as they arrive, and the averages that follow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freeflow.observables import Average, RadialDistribution, mean_squared_displacement, weighted_average
from freeflow.trajectories import energies
from freeflow.types import System
from freeflow.work import Observe


class Observed(NamedTuple):
    """Observables of configurations, one row each."""

    energy: np.ndarray  # (n,) infinite where an atom is off its site [energy]
    displacement: np.ndarray  # (n,) mean squared [length^2]
    counts: np.ndarray  # (n, n_bins) pairs by distance


class Profile(NamedTuple):
    """Radial distribution function, from the model and, if there is one, a trajectory."""

    edges: np.ndarray  # (n_bins + 1,) [length]
    model: Average  # (n_bins,)
    md: Average | None = None


def observer(system: System, distribution: RadialDistribution) -> Observe:
    """Observables of displacements (n, n_atoms, 3) [length]; of those that are nowhere (NaN), of the lattice."""

    def observe(u: np.ndarray) -> Observed:
        inside = np.asarray(np.isfinite(u).all(axis=(1, 2)))
        u = np.where(inside[:, None, None], u, 0.0)
        energy = np.where(inside, energies(system, u), np.inf)
        return Observed(energy, mean_squared_displacement(u), distribution.count(u).astype(np.float32))

    return observe


def profile(distribution: RadialDistribution, counts: np.ndarray, work: np.ndarray) -> Profile:
    """g(r) of the target from the pair counts (n, n_bins) of samples of weight exp(-work)."""
    return Profile(distribution.edges, weighted_average(distribution.normalise(counts), -work))
