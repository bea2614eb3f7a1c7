"""One crystal in many states, of temperature and of pressure: a few crossings serve them all.

Samples of an *anchor*, a state whose crystal was crossed to, are carried to other states by a map that would be exact
if the crystal were harmonic (`freeflow.carrying`). The generalised work of crossing and map together gives F or G at
every state as an exponential average over the same samples. In a fixed cell

    w(beta) = w + beta U(s u) - beta_0 U(u) - 3 (N - 1) ln s,        s = sqrt(beta_0 / beta),

U relative to the lattice. What spreads w is the anharmonic part of the energy alone: one anchor reaches far. Anchors
are set where the error is still too large, in the middle of the longest stretch of such states, until none is left.

The same samples give beta F as a smooth function of beta, and beta G of beta and p. The derivatives are energy or
enthalpy, heat capacity and volume; they are much sharper than averages and fluctuations, because the harmonic part has
no noise (Schultz and Kofke's harmonically mapped averaging). The plain averages of U, or U + pV, and V are compared
with the derivatives: where the Gibbs-Helmholtz relation or dG/dp = <V> fails, samples do not represent their state.

References: Jarzynski, PRE 65, 046122 (2002), for maps; Moustafa, Schultz and Kofke, PRE 92, 043303 (2015), for the
mapped averages; Paliwal and Shirts, JCTC 9, 4700 (2013), for maps between sampled states.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from freeflow import pipeline
from freeflow.bridge import Pilot
from freeflow.carrying import Carried, Carrier, carrier
from freeflow.config import load, revise
from freeflow.crystals import at_state
from freeflow.errors import InputError
from freeflow.estimators import diagnose, fep, record, reliability
from freeflow.observers import observed_crystal
from freeflow.preparation import Clock, Progress, Report
from freeflow.result import Result, Status, provenance
from freeflow.thermodynamics import N_FUNCTIONS, Functions, SeriesResult, StateResult
from freeflow.types import Plan, StateSeries, System

_STEP = 0.01  # of beta, for derivatives by central differences
_RESAMPLES = 200
_MARGIN = 0.95  # of the error that an anchor has to reach for its state: neighbours have a little more
_LOOSEST = 2.0  # target errors; anchors beyond would see too few samples
_MOST_ANCHORS = 3  # in one state
_FURTHEST = 2.5  # target errors up to which an anchor is followed
_LEAST_SHARE = 0.05  # of an anchor's weight in a state; less is not worth the derivatives
_DISAGREEMENT = 4.0  # standard errors between anchors, or between both sides of the Gibbs-Helmholtz relation


class Anchor(NamedTuple):
    """A state whose crystal was crossed to, and its samples."""

    result: Result
    carrier: Carrier

    @property
    def system(self) -> System:
        return self.result.system


class Reach(NamedTuple):
    """What an anchor says of one state."""

    carried: Carried
    delta_f: float  # [kT]
    std_error: float  # [kT]
    reasons: tuple[str, ...]  # why not to trust it


def estimate_series(
    problem: StateSeries | str | Path | dict[str, Any],
    plan: Plan | None = None,
    progress: Report | None = None,
    **changes: Any,
) -> SeriesResult:
    """Free energy, energy or enthalpy, entropy, heat capacity and volume of a crystal in several states.

    Args:
        problem: A series, or what `freeflow.load` makes one from; a single system is a series of one.
        plan: How to estimate; the system's own plan by default. The target error holds in every state.
        progress: Called now and then with what is going on.
        **changes: Values of the plan to replace, such as `target_error=1e-4` [kT per atom].

    Returns:
        The result. Interrupted by Ctrl-C after an anchor was complete, it holds what is known so far.

    Raises:
        InputError: If the problem or the plan cannot be used: estimates are by `fep`, which needs no trajectory.
        KeyboardInterrupt: If interrupted before the first anchor was complete.
    """
    series = as_series(problem)
    plan = revise(plan or series.system.plan, **changes)
    if plan.estimator != "fep" or plan.trajectory is not None:
        raise InputError("estimate.estimator: a series is estimated by fep, without a trajectory")
    report, clock, begun = progress or (lambda _: None), Clock(), time.monotonic()
    systems, shape = [at_state(series.system, *state) for state in series.states], _shape(series)
    target = plan.target_error * series.system.n_atoms
    anchors: list[Anchor] = []
    table: list[list[Reach | None]] = [[] for _ in systems]  # by state, then anchor
    tried: Counter[int] = Counter()
    doubted: set[int] = set()  # states whose anchor had few samples, and was not to be trusted
    interrupted = False
    while (at := _next_anchor(table, target, tried, shape)) is not None:
        tried[at] += 1
        try:
            tell = _labelled(report, systems[at], len(anchors), begun)
            error = target if at in doubted else _missing(table[at], target)
            anchor = _anchor(systems[at], plan, error, len(anchors), tell, _pilot(anchors, systems[at]))
            columns = _reaches(anchor, systems, at, target, shape, report)
        except KeyboardInterrupt:
            if not anchors:
                raise
            interrupted = True
            break
        anchors.append(anchor)
        for row, reach in zip(table, columns, strict=True):
            row.append(reach)
        if anchor.result.status == "interrupted":
            interrupted = True
            break
        if anchor.result.status == "unreliable":
            if error <= target:  # more of it would be no better
                tried[at] = _MOST_ANCHORS
            doubted.add(at)
    clock.lap("sampling")
    return _result(series, plan, systems, anchors, table, clock, interrupted)


def as_series(problem: StateSeries | System | str | Path | dict[str, Any]) -> StateSeries:
    """The problem as a series; a single crystal is a series of one state.

    Raises:
        InputError: If it is a solution, or anything is wrong with it.
    """
    found = problem if isinstance(problem, StateSeries | System) else load(problem)
    if isinstance(found, StateSeries):
        return found
    if not isinstance(found, System):
        raise InputError(f"{found.name}: a solution; series are of crystals")
    return StateSeries(found, (found.temperature,), () if found.cell_motion is None else (found.pressure,))


# ------------------------------------------------------------------------------ anchors


def _shape(series: StateSeries) -> tuple[int, int]:
    """Of the grid of states: pressures, temperatures."""
    return max(len(series.pressures), 1), len(series.temperatures)


def _neighbours(k: int, shape: tuple[int, int]) -> list[int]:
    """States beside one on the grid."""
    row, column = divmod(k, shape[1])
    near = ((row, column + 1), (row, column - 1), (row + 1, column), (row - 1, column))
    return [i * shape[1] + j for i, j in near if 0 <= i < shape[0] and 0 <= j < shape[1]]


def _stretches(states: Iterable[int], shape: tuple[int, int]) -> list[list[int]]:
    """States that hang together on the grid."""
    left, found = dict.fromkeys(states), []
    while left:
        stretch = [left.popitem()[0]]
        for k in stretch:  # grows on the way
            stretch += [n for n in _neighbours(k, shape) if left.pop(n, 0) is None]
        found.append(sorted(stretch))
    return found[::-1]


def _next_anchor(
    table: Sequence[Sequence[Reach | None]], target: float, tried: Mapping[int, int], shape: tuple[int, int]
) -> int | None:
    """The middle of the longest stretch of states that still need one; None if there is none."""
    short = [k for k, row in enumerate(table) if not _combined_error(row) <= target]
    open_ones = [k for k in short if tried[k] < _MOST_ANCHORS]
    if not open_ones:
        return None
    stretch = np.array(max(_stretches(open_ones, shape), key=len))
    at = np.stack(np.divmod(stretch, shape[1]))
    away = np.abs(at[:, :, None] - at[:, None]).sum(axis=(0, 2))
    return int(stretch[np.flatnonzero(away == away.min())[-1]])


def _shares(row: Sequence[Reach | None]) -> dict[int, float]:
    """Weights of the anchors in a state, by their variances: of the sound ones, or the best one if none is."""
    known = {a: reach for a, reach in enumerate(row) if reach is not None and math.isfinite(reach.std_error)}
    sound = {a: reach for a, reach in known.items() if not reach.reasons}
    if not sound and known:
        best = min(known, key=lambda a: known[a].std_error)
        sound = {best: known[best]}
    weights = {a: 1 / max(reach.std_error, 1e-12) ** 2 for a, reach in sound.items()}
    least = _LEAST_SHARE * sum(weights.values())
    weights = {a: weight for a, weight in weights.items() if weight >= least}
    return {a: weight / sum(weights.values()) for a, weight in weights.items()}


def _combined_error(row: Sequence[Reach | None]) -> float:
    """Standard error that all anchors together reach in a state [kT]; NaN if nothing sound is known."""
    sound = [reach.std_error for reach in row if reach is not None and not reach.reasons]
    return sum(1 / max(error, 1e-12) ** 2 for error in sound) ** -0.5 if sound else math.nan


def _missing(row: Sequence[Reach | None], target: float) -> float:
    """Error that a further anchor in a state must have for all together to reach the target [kT]."""
    known = _combined_error(row)
    rest = 1 / target**2 - (0.0 if math.isnan(known) else 1 / known**2)
    return min(_MARGIN * rest**-0.5, _LOOSEST * target) if rest > 0 else target


def _pilot(anchors: Sequence[Anchor], system: System) -> Pilot | None:
    """Trial crossing of the anchor that is nearest in temperature: one spares every anchor but the first another."""
    known = [anchor for anchor in anchors if anchor.result.pilot is not None]
    nearest = min(known, key=lambda anchor: abs(math.log(anchor.system.temperature / system.temperature)), default=None)
    return None if nearest is None else nearest.result.pilot


def _anchor(
    system: System, plan: Plan, error: float, number: int, report: Report, pilot: Pilot | None = None
) -> Anchor:
    """The estimate in one state up to an error [kT], with its samples."""
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0]) if number else plan.seed
    own = replace(plan, seed=seed, target_error=error / system.n_atoms)
    result = pipeline.carried_out(system, own, report, Clock(), observe=observed_crystal, pilot=pilot)
    return Anchor(result, carrier(result))


def _reaches(
    anchor: Anchor, systems: Sequence[System], at: int, target: float, shape: tuple[int, int], report: Report
) -> list[Reach | None]:
    """What an anchor says of all states, from its own outwards until its word is worth nothing."""
    found: list[Reach | None] = [None] * len(systems)
    front, seen = deque([at]), {at}
    while front:
        k = front.popleft()
        report(Progress("series", None, f"samples of {_degrees(anchor.system)} carried to {_degrees(systems[k])}"))
        found[k] = reach = _reach(anchor, systems[k])
        if reach.reasons or not reach.std_error <= _FURTHEST * target:
            continue
        further = [n for n in _neighbours(k, shape) if n not in seen]
        seen.update(further)
        front.extend(further)
    return found


def _reach(anchor: Anchor, system: System) -> Reach:
    carried = anchor.carrier.carried(*_state(system))
    answer = fep(record(carried.work))
    diagnostics = diagnose(record(carried.work), "fep", seed=anchor.result.plan.seed)
    reasons = reliability(diagnostics, answer)
    # What is wrong with the anchor's own samples is wrong with all that is made of them.
    if anchor.result.status == "unreliable":
        reasons = (*reasons, f"anchor at {_degrees(anchor.system)}: {anchor.result.warnings[0]}")
    return Reach(carried, float(answer.delta_f), float(answer.std_error), reasons)


def _state(system: System) -> tuple[float, float | None]:
    """Temperature and pressure in the style's units; no pressure in a fixed cell."""
    return system.temperature, None if system.cell_motion is None else system.pressure


def _degrees(system: System) -> str:
    at = f"T = {system.temperature:g} {system.units.temperature}"
    return at if system.cell_motion is None else f"{at}, p = {system.pressure:g} {system.units.pressure}"


def _labelled(report: Report, system: System, number: int, begun: float) -> Report:
    where = f"anchor {number + 1} at {_degrees(system)}, {time.monotonic() - begun:.0f} s: "
    return lambda progress: report(progress._replace(text=where + progress.text))


# ------------------------------------------------------------------------------ thermodynamic functions


class _Sums(NamedTuple):
    """Of an anchor in one state: the samples' own, then one row for every resample."""

    beta_f: Float[np.ndarray, "rows points"]  # work part at the points of `_points` [kT]
    energy: Float[np.ndarray, " rows"]  # plain weighted average, relative to the lattice [energy]
    volume: Float[np.ndarray, " rows"]  # the same; NaN in a fixed cell [length**3]


def _points(carrier: Carrier, system: System) -> list[tuple[float, float | None]]:
    """States for derivatives: lower beta, the state itself, higher beta; and where the cell moves lower, higher p."""
    t, p = _state(system)
    points = [(t / (1 + step), p) for step in (-_STEP, 0.0, _STEP)]
    return points if p is None else [*points, *((t, p + step * carrier.pressure_step) for step in (-1, 1))]


def _counts(anchor: Anchor, number: int) -> np.ndarray:
    """How often each sample is drawn: once, and in each of the resamples."""
    n = len(anchor.result.work.forward)
    rng = np.random.default_rng([anchor.result.plan.seed, number])
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    return np.concatenate([np.ones((1, n)), drawn]).astype(np.float64)


def _sums(anchor: Anchor, reach: Reach, system: System, counts: np.ndarray) -> _Sums:
    n, here = counts.shape[1], reach.carried
    low, _, *others = _points(anchor.carrier, system)
    beside = [anchor.carrier.carried(*point, near=True).work for point in (low, *others)]
    work = np.array([beside[0], here.work, *beside[1:]])
    energy = np.where(np.isfinite(here.enthalpy), here.enthalpy, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):  # where no sample arrives nothing is known
        top = -np.min(work, axis=1, keepdims=True)
        weights = np.exp(-work - top)
        means = counts @ weights.T / n
        energy, volume = (counts @ (weights[1] * values) / (n * means[:, 1]) for values in (energy, here.volume))
        return _Sums(-(np.log(means) + top.T), energy, volume)


def _functions(anchor: Anchor, reach: Reach, system: System, counts: np.ndarray) -> Functions:
    """Thermodynamic functions (rows,) of the crystal in one state, from what an anchor says of it."""
    sums = _sums(anchor, reach, system, counts)
    beta, kt, units = float(system.state.beta), system.kt, system.units
    near = [at_state(anchor.system, *point) for point in _points(anchor.carrier, system)]
    base = anchor.result.components["reference"] - np.array([one.log_prefactor for one in near])
    low, here, high, *across = (base + sums.beta_f).T
    h = _STEP * beta
    energy = (high - low) / (2 * h)
    curvature = (high - 2 * here + low) / h**2
    volume = np.full(len(here), math.nan)
    if across:
        volume = (across[1] - across[0]) * kt / (2 * anchor.carrier.pressure_step * units.pressure_unit)
    rest = (near[1].constants["lattice energy"] + near[1].constants.get("pressure", 0.0)) * kt
    return Functions(
        beta_f=here,
        energy=energy,
        plain_energy=sums.energy + rest,
        entropy=beta * energy - here,
        heat_capacity=-(beta**2) * curvature,
        volume=volume,
        plain_volume=sums.volume,
    )


class _Mixture(NamedTuple):
    """What all anchors say of one state."""

    functions: Functions  # the samples' own, then one row for every resample
    std_error: float  # of beta F [kT]
    apart: float  # largest difference of two anchors in standard errors; NaN for one
    n_anchors: int
    reasons: list[str]


def _mixture(
    system: System, row: Sequence[Reach | None], anchors: Sequence[Anchor], counts: Sequence[np.ndarray]
) -> _Mixture:
    shares = _shares(row)
    if not shares:
        nothing = np.full(_RESAMPLES + 1, math.nan)
        return _Mixture(Functions(*(nothing,) * N_FUNCTIONS), math.nan, math.nan, 0, ["no anchor reaches this state"])
    parts, errors, reasons = {}, {}, []
    for a in shares:
        reach = row[a]
        assert reach is not None
        parts[a] = _functions(anchors[a], reach, system, counts[a])
        errors[a] = reach.std_error
        reasons += [reason for reason in reach.reasons if reason not in reasons]
    mixed = Functions(*(sum(shares[a] * parts[a][q] for a in shares) for q in range(N_FUNCTIONS)))
    apart = [
        (parts[a].beta_f[0] - parts[b].beta_f[0]) / math.hypot(errors[a], errors[b])
        for a in shares
        for b in shares
        if a < b
    ]
    error = math.sqrt(sum((share * errors[a]) ** 2 for a, share in shares.items()))
    return _Mixture(mixed, error, float(max(apart, key=abs, default=math.nan)), len(shares), reasons)


def _result(
    series: StateSeries,
    plan: Plan,
    systems: Sequence[System],
    anchors: Sequence[Anchor],
    table: Sequence[Sequence[Reach | None]],
    clock: Clock,
    interrupted: bool,
) -> SeriesResult:
    n_atoms = series.system.n_atoms
    counts = [_counts(anchor, k) for k, anchor in enumerate(anchors)]
    states, replicas, warnings = [], [], []
    for system, row in zip(systems, table, strict=True):
        functions, error, apart, n_anchors, reasons = _mixture(system, row, anchors, counts)
        spread = Functions(*(np.std(q[1:], ddof=1) for q in functions))
        helmholtz = _apart(functions.energy, functions.plain_energy)
        expansion = _apart(functions.volume, functions.plain_volume)
        if abs(apart) > _DISAGREEMENT:
            reasons.append(f"anchors differ by {abs(apart):.1f} standard errors")
        if abs(helmholtz) > _DISAGREEMENT:
            what = ("mean energy", "beta F") if system.cell_motion is None else ("mean enthalpy", "beta G")
            reasons.append(f"the {what[0]} is {abs(helmholtz):.1f} standard errors off the derivative of {what[1]}")
        if abs(expansion) > _DISAGREEMENT:
            reasons.append(f"the mean volume is {abs(expansion):.1f} standard errors off dG/dp")
        status: Status = "converged" if error <= plan.target_error * n_atoms else "target_not_reached"
        if reasons:
            status = "unreliable"
        elif interrupted and status != "converged":
            status = "interrupted"
        states.append(
            StateResult(
                temperature=system.temperature,
                pressure=_state(system)[1],
                kt=system.kt,
                beta_f=float(functions.beta_f[0]),
                beta_f_std_error=error,
                energy=float(functions.energy[0]),
                energy_std_error=float(spread.energy),
                plain_energy=float(functions.plain_energy[0]),
                plain_energy_std_error=float(spread.plain_energy),
                entropy=float(functions.entropy[0]),
                entropy_std_error=float(spread.entropy),
                heat_capacity=float(functions.heat_capacity[0]),
                heat_capacity_std_error=float(spread.heat_capacity),
                volume=float(functions.volume[0]),
                volume_std_error=float(spread.volume),
                plain_volume=float(functions.plain_volume[0]),
                plain_volume_std_error=float(spread.plain_volume),
                helmholtz_z=helmholtz,
                volume_z=expansion,
                anchors_z=apart,
                n_anchors=n_anchors,
                status=status,
                reasons=tuple(reasons),
            )
        )
        replicas.append(functions.beta_f)
    for anchor in anchors:
        warnings += [f"anchor at {_degrees(anchor.system)}: {text}" for text in _of_interest(anchor.result)]
    spent: dict[str, int] = {}
    for anchor in anchors:
        for purpose, number in anchor.result.energy_evaluations.items():
            spent[purpose] = spent.get(purpose, 0) + number
    spent["series"] = sum(anchor.carrier.energy_evaluations for anchor in anchors)
    clock.lap("series")
    return SeriesResult(
        system=series.system,
        plan=plan,
        states=tuple(states),
        anchors=tuple(_state(anchor.system) for anchor in anchors),
        replicas=np.array(replicas)[:, 1:],
        energy_evaluations=spent,
        wall_seconds=clock.seconds(),
        warnings=tuple(warnings),
        interrupted=interrupted,
        quantity=series.system.quantity,
        provenance=provenance(series.system, plan),
    )


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Difference of two rows of resamples, the first being the value, in standard errors."""
    gap = one - other
    error = float(np.std(gap[1:], ddof=1))
    return float(gap[0]) / error if error > 0 else math.nan


def _of_interest(result: Result) -> list[str]:
    """Warnings of an anchor, without that about a target error of its own."""
    return [text for text in result.warnings if not text.startswith("target error")]
