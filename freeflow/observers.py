"""What is looked at in configurations of the model as they arrive, and the averages that follow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from freeflow.cells import Strained, stretches
from freeflow.observables import Average, RadialDistribution, mean_squared_displacement, weighted_average
from freeflow.trajectories import energies
from freeflow.types import Crystal, System
from freeflow.work import Observe


class Observed(NamedTuple):
    """Observables of configurations, one row each."""

    energy: np.ndarray  # (n,) infinite where an atom is off its site [energy]
    displacement: np.ndarray  # (n,) mean squared, in the configuration's cell [length^2]
    counts: np.ndarray  # (n, n_bins) pairs by distance
    strain: np.ndarray | None = None  # (n, 3, 3) logarithmic, of the cell; None if it is fixed


class Profile(NamedTuple):
    """Radial distribution function, from the model and, if there is one, a trajectory."""

    edges: np.ndarray  # (n_bins + 1,) [length]
    model: Average  # (n_bins,)
    md: Average | None = None


def observer(system: System, distribution: RadialDistribution) -> Observe:
    """Observables of displacements (n, n_atoms, 3) [length]; of those that are nowhere (NaN), of the lattice.

    With strains, where the cell moves.
    """

    def observe(x: np.ndarray | Strained) -> Observed:
        u, strain = (np.asarray(x.displacements, np.float64), x.strain) if isinstance(x, Strained) else (x, None)
        inside = np.asarray(np.isfinite(u).all(axis=(1, 2)))
        if strain is not None:
            inside &= np.isfinite(strain).all(axis=(1, 2))
            strain = np.where(inside[:, None, None], strain, 0.0)
        u = np.where(inside[:, None, None], u, 0.0)
        moved = u if strain is None else Strained(u, strain)  # pyright: ignore[reportArgumentType]
        energy = np.where(inside, energies(system, moved), np.inf)
        apart = mean_squared_displacement(u if strain is None else u @ stretches(strain))
        return Observed(energy, apart, distribution.count(u, strain).astype(np.float32), strain)

    return observe


def profile(distribution: RadialDistribution, counts: np.ndarray, work: np.ndarray) -> Profile:
    """g(r) of the target from the pair counts (n, n_bins) of samples of weight exp(-work)."""
    return Profile(distribution.edges, weighted_average(distribution.normalise(counts), -work))


class CellAverage(NamedTuple):
    """A cell that moves, as samples of the target have it."""

    volume: Average  # () [length^3]
    volume_spread: float  # standard deviation of the volume [length^3]
    vectors: Average  # (3, 3) mean lattice vectors, without rotations of the crystal [length]


def observed_strain(x: Strained) -> Float[np.ndarray, "n 3 3"]:
    """The strains of a batch."""
    return np.asarray(x.strain, np.float64)


def observed_crystal(x: np.ndarray | Strained) -> np.ndarray | Strained:
    """A batch itself, with displacements in float32."""
    if isinstance(x, Strained):
        return Strained(np.asarray(x.displacements, np.float32), observed_strain(x))  # pyright: ignore[reportArgumentType]
    return np.asarray(x, np.float32)


def cell_average(
    crystal: Crystal, observed: Strained | Float[np.ndarray, "n 3 3"] | None, work: Float[np.ndarray, " n"]
) -> CellAverage | None:
    """The cell of the target, from strains of the reference crystal in samples of weight exp(-work)."""
    if observed is None:
        return None
    strain = observed.strain if isinstance(observed, Strained) else observed
    values, axes = np.linalg.eigh(strain)
    volume = crystal.volume * np.exp(values.sum(axis=1))
    vectors = crystal.cell @ np.einsum("nak,nk,nbk->nab", axes, np.exp(values), axes, optimize=True)
    mean = weighted_average(volume, -work)
    spread = weighted_average(np.square(volume - mean.mean), -work)
    edges = weighted_average(vectors.reshape(-1, 9), -work)
    edges = edges._replace(mean=edges.mean.reshape(3, 3), std_error=edges.std_error.reshape(3, 3))
    return CellAverage(mean, float(np.sqrt(spread.mean)), edges)
