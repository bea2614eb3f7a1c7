"""Energies of frames from the system's own potential, and whether those in the file are the same."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from freeflow.cells import Strained
from freeflow.geometry import NeighbourTable, nearest_neighbour_distance, neighbour_table
from freeflow.isobaric import energy_alone
from freeflow.potentials import External, Potential, many_body, on_crystal
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
    system: System, frames: Float[np.ndarray, "n_frames n_atoms 3"] | Strained, batch: int | None = None
) -> Float[np.ndarray, " n_frames"]:
    """Total potential energies of frames [energy], in float64, on all cores.

    The lattice's energy plus what the system's own target ensemble says, to rounding. Infinite where an atom is off
    its site, and where a cell that moves is out of its range: the ensemble ends there.

    Args:
        system: Whose potential and crystal it is.
        frames: Displacements from the sites, mean-free [length]; with their strains where the cell moves.
        batch: Frames that a core evaluates together; by default as many as fit in its cache.
    """
    displacements = frames.displacements if isinstance(frames, Strained) else frames
    largest = np.sqrt(np.max(np.einsum("fni,fni->fn", displacements, displacements), axis=1, initial=0.0))
    half = 0.5 * nearest_neighbour_distance(system.crystal)
    # The target itself decides at the very edge.
    inside = np.flatnonzero(largest < (1 + 1e-9) * half)
    # No table to be narrowed.
    given = system.nearest_image_only or isinstance(system.potential, External) or system.cell_motion is not None
    level = None if given else _level(largest[inside] / half)
    near = largest[inside] <= (0.0 if level is None else level) * half
    found = np.full(len(displacements), np.inf)

    def at_these(evaluate: Evaluator) -> Callable[[np.ndarray], jax.Array]:
        return lambda rows: evaluate(rows_of(frames, rows))

    for some, at in ((inside[near], level), (inside[~near], None)):
        if len(some):
            found[some] = in_batches(at_these(_evaluator(system, at)), some, batch or batch_size(system))
    on_crystal(system.potential, system.crystal).require()
    return found


# Ends of the narrow neighbour tables, in units of half the nearest-neighbour distance, where the ensemble ends.
_LEVELS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_FEW = 1024  # frames that are not worth a second kernel


def _level(largest: np.ndarray) -> float | None:
    """The narrowest table for nearly all frames, by their largest displacements; None for the target's own.

    A table of all pairs up to the cutoff plus twice the largest displacement misses nothing, and is evaluated faster
    than the target's, which holds what a crystal at its end may need.
    """
    if not largest.size:
        return None
    needed = largest.max() if largest.size <= _FEW else np.quantile(largest, 0.95)
    return next((level for level in _LEVELS if level >= needed), None)


def rows_of(frames: Any, rows: Any) -> Any:
    """Some frames of many: displacements (n, n_atoms, 3), or a batch of `freeflow.cells.Strained`."""
    return jax.tree.map(lambda part: part[rows], frames)


Evaluator = Callable[[Any], jax.Array]  # displacements (batch, n_atoms, 3), or with strains -> energies (batch,)


def _evaluator(system: System, level: float | None) -> Evaluator:
    """Compiled energies [energy] from a narrow table, or from the target ensemble."""
    compiled = _evaluators(system.target.reduced_potential)
    if level not in compiled:
        with double_precision():
            compiled[level] = jax.jit(_from_target(system) if level is None else _from_table(system, level))
    return compiled[level]


@functools.lru_cache(maxsize=8)
def _evaluators(_reduced_potential: Callable[..., Any]) -> dict[float | None, Evaluator]:
    """What has been compiled for a target, which stands for its system."""
    return {}


def _from_target(system: System) -> Evaluator:
    beta, rest = float(system.state.beta), system.constants["lattice energy"]
    if system.cell_motion is not None:
        alone = jax.vmap(energy_alone(system))
        return lambda x: rest / beta + alone(x)
    reduced = jax.vmap(system.target.reduced_potential, in_axes=(0, None))
    return lambda u: (rest + reduced(u, system.state)) / beta


def _from_table(system: System, level: float) -> Evaluator:
    half = 0.5 * nearest_neighbour_distance(system.crystal)
    # A little more than the frames need: rounding must not lose a pair.
    reach = 2.0002 * level * half + 1e-4 * system.potential.cutoff
    if isinstance(system.potential, Potential) and not many_body(system.potential):
        return _pair_energy(system.potential, neighbour_table(system.crystal, system.potential.cutoff + reach))
    rest = system.constants["lattice energy"] / float(system.state.beta)
    relative = jax.vmap(on_crystal(system.potential, system.crystal).relative(reach, "float64"))
    return lambda u: rest + relative(u)


def _pair_energy(potential: Potential, table: NeighbourTable) -> Evaluator:
    """Without forces every pair is evaluated once, and an array (n_atoms, batch) for each component is fastest."""
    partner, offset = table.partner.astype(np.int32), np.moveaxis(table.offset, 2, 0)[..., None]

    def energy(u: jax.Array) -> jax.Array:
        x = [jnp.moveaxis(u[:, :, a], 0, 1) for a in range(3)]

        def step(total: jax.Array, slot: Any) -> tuple[jax.Array, None]:
            partner, offset = slot
            d = [offset[a] + x[a][partner] - x[a] for a in range(3)]
            return total + potential.pair(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]), None

        return jnp.sum(jax.lax.scan(step, jnp.zeros_like(x[0]), (partner, list(offset)), unroll=2)[0], axis=0)

    return energy


def batch_size(system: System) -> int:
    """Frames that a core evaluates together: enough to fill vector units, few enough for the cache."""
    if jax.default_backend() != "cpu":
        return int(np.clip(2 ** round(math.log2(2**20 / system.n_atoms)), 64, 8192))
    return int(np.clip(2 ** round(math.log2(2**15 / system.n_atoms)), 16, 128))


def in_batches(evaluate: Callable[[np.ndarray], Any], rows: np.ndarray, batch: int) -> Any:
    """What a compiled function of so many row numbers gives for all of them, a batch at a time, one batch to a core.

    Args:
        evaluate: Takes row numbers (batch,); returns arrays, or a tree of them, with one row each.
        rows: Row numbers, at least one.
        batch: How many at a time; one shape compiles once.
    """

    def one(part: np.ndarray) -> Any:
        whole = np.concatenate([part, np.repeat(part[-1:], batch - len(part))])
        with double_precision():  # of this thread
            return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(part)], evaluate(whole))

    first, *others = np.split(rows, range(batch, len(rows), batch))
    found = [one(first)]  # alone: threads would each compile it
    if others:
        with ThreadPoolExecutor(_n_cores()) as threads:
            found += threads.map(one, others)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def _n_cores() -> int:
    """Batches to evaluate at the same time: one to a core, or one where a GPU does the work."""
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def energy_precision(
    system: System, frames: Float[np.ndarray, "n_frames n_atoms 3"] | Strained, resolution: float
) -> float:
    """What rounding positions to `resolution` [length] may do to the energies of frames [energy].

    Five standard deviations of a sum of forces times rounding errors, which are even between plus and minus
    half the resolution. From up to 16 of the frames; for `compare_energies`.
    """
    beta = float(system.state.beta)
    n_frames = len(jax.tree.leaves(frames)[0])
    some = rows_of(frames, np.arange(0, n_frames, max(1, n_frames // 16))[:16])
    if not n_frames:
        return 0.0
    with double_precision():
        found = _gradients(system.target.reduced_potential)(some, system.state)
    slopes = np.asarray(found.displacements if isinstance(found, Strained) else found) / beta
    norms = np.linalg.norm(slopes.reshape(len(some), -1), axis=1)
    return float(5 * resolution / math.sqrt(12) * norms[np.isfinite(norms)].max(initial=0.0))


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
    found = {own: 1.0, **OTHER_ENERGIES.get(units.name if units else "", {})}
    for unit, factor in found.items():
        worst = float(np.abs(theirs * factor - mine).max())
        if worst <= bound:
            text = f"energies in the file are reproduced to {worst:.2g} {own}".rstrip()
            if unit != own:
                text += f"; they are in {unit}"
            return EnergyComparison(len(theirs), worst, precision, unit, True, text)
    for unit, factor in found.items():
        difference = theirs * factor - mine
        offset = float(np.median(difference))
        # Of fewer frames any differ by a constant.
        if len(difference) > 2 and np.abs(difference - offset).max() <= bound:
            worst = float(np.abs(difference).max())
            text = f"energies in the file differ, always by {offset:.6g} {own}".rstrip() + ": another zero of energy?"
            return EnergyComparison(len(theirs), worst, precision, unit, False, text, offset)
    worst = float(np.abs(theirs - mine).max())
    text = (
        f"energies in the file differ by up to {worst:.4g} {own}".rstrip()
        + f" (their rounding explains {precision:.2g}): another potential, cutoff or unit?"
    )
    return EnergyComparison(len(theirs), worst, precision, own, False, text)
