"""Energies of frames from the system's own potential, and whether those in the file are the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from freeflow.types import System, double_precision
from freeflow.units import UnitStyle


class EnergyComparison(NamedTuple):
    """Energies of a file against recomputed ones."""

    n_frames: int  # frames that have both
    max_deviation: float  # [energy]; NaN without frames
    precision: float  # up to which deviations were accepted [energy]
    unit: str  # that the file's energies are in, or were taken to be in
    agrees: bool | None  # None: nothing to compare
    verdict: str  # one line
    offset: float | None = None  # by which all energies of the file are higher, if that is all that differs [energy]


def energies(
    system: System, displacements: Float[np.ndarray, "n_frames n_atoms 3"], batch: int = 64
) -> Float[np.ndarray, " n_frames"]:
    """Total potential energies of frames [energy], in float64.

    The lattice's energy plus what the system's own target ensemble says. Infinite where an atom is off its site:
    the ensemble ends there.
    """
    beta, n_frames = float(system.state.beta), len(displacements)
    reduced = np.empty(n_frames)
    with double_precision():
        evaluate = _batched(system.target.reduced_potential)
        for first in range(0, n_frames, batch):
            part = displacements[first : first + batch]
            # The last batch is filled up with perfect crystals: one shape compiles once.
            whole = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]))])
            reduced[first : first + batch] = np.asarray(evaluate(whole, system.state))[: len(part)]
    return (system.constants["lattice energy"] + reduced) / beta


def energy_precision(
    system: System, displacements: Float[np.ndarray, "n_frames n_atoms 3"], resolution: float
) -> float:
    """What rounding positions to `resolution` [length] may do to the energies of frames [energy].

    Five standard deviations of a sum of forces times rounding errors, which are even between plus and minus
    half the resolution. From up to 16 of the frames; for `compare_energies`.
    """
    beta = float(system.state.beta)
    some = displacements[:: max(1, len(displacements) // 16)][:16]
    if not len(some):
        return 0.0
    with double_precision():
        slopes = np.asarray(_gradients(system.target.reduced_potential)(some, system.state)) / beta
    norms = np.linalg.norm(slopes.reshape(len(some), -1), axis=1)
    return float(5 * resolution / math.sqrt(12) * norms[np.isfinite(norms)].max(initial=0.0))


@functools.lru_cache(maxsize=8)
def _batched(reduced_potential: Callable[..., Any]) -> Callable[..., jax.Array]:
    return jax.jit(jax.vmap(reduced_potential, in_axes=(0, None)))


@functools.lru_cache(maxsize=8)
def _gradients(reduced_potential: Callable[..., Any]) -> Callable[..., jax.Array]:
    return jax.jit(jax.vmap(jax.grad(reduced_potential), in_axes=(0, None)))


# How many of the style's energy units one unit is, for those that trajectories carry besides: ASE writes eV,
# mdtraj kJ/mol, whatever the program before them meant.
OTHER_ENERGIES = {
    "real": {"eV": 23.060547830619, "kJ/mol": 1 / 4.184},
    "metal": {"kJ/mol": 1 / 96.48533212331, "kcal/mol": 1 / 23.060547830619},
}


def compare_energies(
    file_energies: Float[np.ndarray, " n_frames"],
    ours: Float[np.ndarray, " n_frames"],
    precision: float,
    units: UnitStyle | None = None,
) -> EnergyComparison:
    """Whether the energies in a file are those of the system's potential, frame by frame.

    They are compared in the system's unit, and, as no format holds programs to one, in eV, kJ/mol and kcal/mol where
    the system has one of these; the verdict names the unit that fits. Frames without a finite number on both sides do
    not count.

    Args:
        file_energies: As `Frames.energies`.
        ours: As `energies` gives them [energy].
        precision: Largest deviation that the rounding of the file explains [energy]; see `energy_precision`.
        units: The system's.
    """
    used = np.isfinite(file_energies) & np.isfinite(ours)
    theirs, mine = file_energies[used], ours[used]
    own = "" if units is None else units.energy
    if not theirs.size:
        return EnergyComparison(0, math.nan, precision, own, None, "no energies to compare")
    # Numbers near -1000 carry rounding of their own.
    bound = precision + 1e-9 * float(np.abs(mine).max())
    for unit, factor in {own: 1.0, **OTHER_ENERGIES.get(units.name if units else "", {})}.items():
        worst = float(np.abs(theirs * factor - mine).max())
        if worst <= bound:
            text = f"energies in the file are reproduced to {worst:.2g} {own}".rstrip()
            if unit != own:
                text += f"; they are in {unit}"
            return EnergyComparison(len(theirs), worst, precision, unit, True, text)
    difference = theirs - mine
    worst, offset = float(np.abs(difference).max()), float(np.median(difference))
    text = (
        f"energies in the file differ by up to {worst:.4g} {own}".rstrip()
        + f" (their rounding explains {precision:.2g})"
    )
    shifted = bool(np.abs(difference - offset).max() <= bound)
    text += f", always by {offset:.6g}: another zero of energy?" if shifted else ": another potential, cutoff or unit?"
    return EnergyComparison(len(theirs), worst, precision, own, False, text, offset if shifted else None)
