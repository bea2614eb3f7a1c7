"""One crystal at many temperatures: a few crossings serve them all.

A sample of the crystal at beta_0 is carried to another temperature by the map that would be exact if the crystal were
harmonic, u -> s u with s = sqrt(beta_0 / beta). The generalised work of crossing and map together is

    w(beta) = w + beta U(s u) - beta_0 U(u) - 3 (N - 1) ln s,

U relative to the lattice, so that F at every temperature is an exponential average over the same samples. What spreads
w is the anharmonic part of the energy alone: one *anchor*, a crystal that was crossed to, reaches far. Anchors are set
where the error is still too large, in the middle of the longest stretch of such temperatures, until none is left.

The same samples give beta F as a smooth function of beta. Its derivative is the energy, its second derivative the
heat capacity; both are much sharper than averages and fluctuations of U, because the harmonic part has no noise
(Schultz and Kofke's harmonically mapped averaging). The plain average of U is compared with the derivative: where the
Gibbs-Helmholtz relation fails, samples do not represent their temperature.

References: Jarzynski, PRE 65, 046122 (2002), for maps; Moustafa, Schultz and Kofke, PRE 92, 043303 (2015), for the
mapped averages; Paliwal and Shirts, JCTC 9, 4700 (2013), for maps between sampled states.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from freeflow import pipeline
from freeflow.config import load, revise
from freeflow.crystals import at_temperature
from freeflow.errors import InputError
from freeflow.estimators import diagnose, fep, record, reliability
from freeflow.preparation import Clock, Progress, Report
from freeflow.result import Result, Status, provenance
from freeflow.thermodynamics import Functions, SeriesResult, StateResult
from freeflow.trajectories import energies
from freeflow.types import Plan, System, TemperatureSeries, double_precision

_STEP = 0.01  # of beta, for derivatives by central differences
_RESAMPLES = 200
_MARGIN = 0.95  # of the error that an anchor has to reach for its temperature: neighbours have a little more
_LOOSEST = 3.0  # target errors; anchors beyond would see too few samples
_MOST_ANCHORS = 3  # at one temperature
_FURTHEST = 2.5  # target errors up to which an anchor is followed
_LEAST_SHARE = 0.05  # of an anchor's weight at a temperature; less is not worth the derivatives
_DISAGREEMENT = 4.0  # standard errors between anchors, or between both sides of the Gibbs-Helmholtz relation


class Anchor(NamedTuple):
    """A temperature whose crystal was crossed to, and its samples."""

    system: System
    result: Result
    displacements: Float[np.ndarray, "n n_atoms 3"]  # float32 [length]; NaN where a sample is nowhere
    energy: Float[np.ndarray, " n"]  # relative to the lattice, infinite off the crystal [energy]


class Reach(NamedTuple):
    """What an anchor says of one temperature."""

    work: Float[np.ndarray, " n"]  # [kT]
    energy: Float[np.ndarray, " n"]  # of the mapped samples, relative to the lattice [energy]
    delta_f: float  # [kT]
    std_error: float  # [kT]
    reasons: tuple[str, ...]  # why not to trust it


def estimate_series(
    problem: TemperatureSeries | str | Path | dict[str, Any],
    plan: Plan | None = None,
    progress: Report | None = None,
    **changes: Any,
) -> SeriesResult:
    """Free energy, energy, entropy and heat capacity of a crystal at several temperatures.

    Args:
        problem: A series, or what `freeflow.load` makes one from; a single system is a series of one.
        plan: How to estimate; the system's own plan by default. The target error holds at every temperature.
        progress: Called now and then with what is going on.
        **changes: Values of the plan to replace, such as `target_error=1e-4` [kT per atom].

    Returns:
        The result. Interrupted by Ctrl-C after an anchor was complete, it holds what is known so far.

    Raises:
        InputError: If the problem or the plan cannot be used: estimates are by `fep`, which needs no trajectory.
        KeyboardInterrupt: If interrupted before the first anchor was complete.
    """
    series = as_series(problem)
    series.system.require_fixed_cell("series and comparisons of phases are of")
    plan = revise(plan or series.system.plan, **changes)
    if plan.estimator != "fep" or plan.trajectory is not None:
        raise InputError("estimate.estimator: a series is estimated by fep, without a trajectory")
    report, clock, begun = progress or (lambda _: None), Clock(), time.monotonic()
    systems = [at_temperature(series.system, t) for t in series.temperatures]
    target = plan.target_error * series.system.n_atoms
    anchors: list[Anchor] = []
    table: list[list[Reach | None]] = [[] for _ in systems]  # by temperature, then anchor
    tried: Counter[int] = Counter()
    interrupted = False
    while (at := _next_anchor(table, target, tried)) is not None:
        tried[at] += 1
        try:
            tell = _labelled(report, systems[at], len(anchors), begun)
            anchor = _anchor(systems[at], plan, _missing(table[at], target), len(anchors), tell)
            columns = _reaches(anchor, systems, at, target, report)
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
        if anchor.result.status == "unreliable":  # more of it would be no better
            tried[at] = _MOST_ANCHORS
    clock.lap("sampling")
    return _result(series, plan, systems, anchors, table, clock, interrupted)


def as_series(problem: TemperatureSeries | System | str | Path | dict[str, Any]) -> TemperatureSeries:
    """The problem as a series; a single crystal is a series of one temperature.

    Raises:
        InputError: If it is a solution, or anything is wrong with it.
    """
    found = problem if isinstance(problem, TemperatureSeries | System) else load(problem)
    if isinstance(found, TemperatureSeries):
        return found
    if not isinstance(found, System):
        raise InputError(f"{found.name}: a solution; series are of crystals")
    return TemperatureSeries(found, (found.temperature,))


# ------------------------------------------------------------------------------ anchors


def _next_anchor(table: Sequence[Sequence[Reach | None]], target: float, tried: Mapping[int, int]) -> int | None:
    """The middle of the longest stretch of temperatures that still need one; None if there is none."""
    short = [k for k, row in enumerate(table) if not _combined_error(row) <= target]
    open_ones = [k for k in short if tried[k] < _MOST_ANCHORS]
    if not open_ones:
        return None
    ends = [k for k, after in zip(open_ones, [*open_ones[1:], math.inf], strict=True) if after > k + 1]
    starts = [k for k, before in zip(open_ones, [-math.inf, *open_ones[:-1]], strict=True) if before < k - 1]
    start, end = max(zip(starts, ends, strict=True), key=lambda stretch: stretch[1] - stretch[0])
    return (start + end + 1) // 2


def _shares(row: Sequence[Reach | None]) -> dict[int, float]:
    """Weights of the anchors at a temperature, by their variances: of the sound ones, or the best one if none is."""
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
    """Standard error that all anchors together reach at a temperature [kT]; NaN if nothing sound is known."""
    sound = [reach.std_error for reach in row if reach is not None and not reach.reasons]
    return sum(1 / max(error, 1e-12) ** 2 for error in sound) ** -0.5 if sound else math.nan


def _missing(row: Sequence[Reach | None], target: float) -> float:
    """Error that a further anchor at a temperature must have for all together to reach the target [kT]."""
    known = _combined_error(row)
    rest = 1 / target**2 - (0.0 if math.isnan(known) else 1 / known**2)
    return min(_MARGIN * rest**-0.5, _LOOSEST * target) if rest > 0 else target


def _anchor(system: System, plan: Plan, error: float, number: int, report: Report) -> Anchor:
    """The estimate at one temperature up to an error [kT], with its samples."""
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0]) if number else plan.seed
    own = replace(plan, seed=seed, target_error=error / system.n_atoms)
    result = pipeline.carried_out(system, own, report, Clock(), observe=_displacements)
    u: np.ndarray = result.observed
    return Anchor(system, result, u, _relative_energies(system, u))


def _displacements(u: np.ndarray) -> np.ndarray:
    return np.asarray(u, np.float32)


def _relative_energies(system: System, u: np.ndarray) -> np.ndarray:
    inside = np.asarray(np.isfinite(u).all(axis=(1, 2)))
    with double_precision():
        found = energies(system, np.where(inside[:, None, None], u, np.float32(0.0)).astype(np.float64))
    return np.where(inside, found - system.constants["lattice energy"] * system.kt, np.inf)


def _mapped(anchor: Anchor, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Work to the crystal at beta [kT], and energies there relative to the lattice [energy]."""
    beta_0, n = float(anchor.system.state.beta), anchor.system.n_atoms
    scale = math.sqrt(beta_0 / beta)
    energy = _relative_energies(anchor.system, anchor.displacements * np.float32(scale))
    # The map is by the number that float32 holds: its logarithm counts 3 (N - 1) times.
    stretch = 3 * (n - 1) * math.log(float(np.float32(scale)))
    with np.errstate(invalid="ignore"):
        work = anchor.result.work.forward + beta * energy - beta_0 * anchor.energy - stretch
    # Off the crystal before or after: it cannot be reached from there.
    lost = ~np.isfinite(energy) | ~np.isfinite(anchor.energy) | np.isposinf(anchor.result.work.forward)
    return np.where(lost, np.inf, work), energy


def _reaches(anchor: Anchor, systems: Sequence[System], at: int, target: float, report: Report) -> list[Reach | None]:
    """What an anchor says of all temperatures, from its own outwards until its word is worth nothing."""
    found: list[Reach | None] = [None] * len(systems)
    for way in (range(at, len(systems)), range(at - 1, -1, -1)):
        for k in way:
            text = f"samples of {_degrees(anchor.system)} carried to {_degrees(systems[k])}"
            report(Progress("series", None, text))
            found[k] = reach = _reach(anchor, systems[k])
            if reach.reasons or not reach.std_error <= _FURTHEST * target:
                break
    return found


def _reach(anchor: Anchor, system: System) -> Reach:
    beta = float(system.state.beta)
    work, energy = _mapped(anchor, beta)
    answer = fep(record(work))
    diagnostics = diagnose(record(work), "fep", seed=anchor.result.plan.seed)
    reasons = reliability(diagnostics, answer)
    # What is wrong with the anchor's own samples is wrong with all that is made of them.
    if anchor.result.status == "unreliable":
        reasons = (*reasons, f"anchor at {_degrees(anchor.system)}: {anchor.result.warnings[0]}")
    return Reach(work, energy, float(answer.delta_f), float(answer.std_error), reasons)


def _degrees(system: System) -> str:
    return f"T = {system.temperature:g} {system.units.temperature}"


def _labelled(report: Report, system: System, number: int, begun: float) -> Report:
    where = f"anchor {number + 1} at {_degrees(system)}, {time.monotonic() - begun:.0f} s: "
    return lambda progress: report(progress._replace(text=where + progress.text))


# ------------------------------------------------------------------------------ thermodynamic functions


class _Sums(NamedTuple):
    """Of an anchor at one temperature: the samples' own, then one row for every resample."""

    beta_f: Float[np.ndarray, "rows 3"]  # work part, at the three betas [kT]
    energy: Float[np.ndarray, " rows"]  # plain weighted average, relative to the lattice [energy]


def _counts(anchor: Anchor, number: int) -> np.ndarray:
    """How often each sample is drawn: once, and in each of the resamples."""
    n = len(anchor.result.work.forward)
    rng = np.random.default_rng([anchor.result.plan.seed, number])
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    return np.concatenate([np.ones((1, n)), drawn]).astype(np.float64)


def _sums(anchor: Anchor, reach: Reach, beta: float, counts: np.ndarray) -> _Sums:
    n = counts.shape[1]
    low, high = (_mapped(anchor, beta * (1 + step))[0] for step in (-_STEP, _STEP))
    work = np.array([low, reach.work, high])
    energy = np.where(np.isfinite(reach.energy), reach.energy, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):  # where no sample arrives nothing is known
        top = -np.min(work, axis=1, keepdims=True)
        weights = np.exp(-work - top)
        means = counts @ weights.T / n
        average = counts @ (weights[1] * energy) / (n * means[:, 1])
        return _Sums(-(np.log(means) + top.T), average)


def _functions(system: System, base: np.ndarray, beta_f: np.ndarray, plain: np.ndarray) -> Functions:
    """Thermodynamic functions (rows,) of the crystal from beta F at three betas, and the plain average of U."""
    beta, kt = float(system.state.beta), system.kt
    low, here, high = (base + beta_f).T
    h = _STEP * beta
    energy = (high - low) / (2 * h)
    curvature = (high - 2 * here + low) / h**2
    rest = system.constants["lattice energy"] * kt
    return Functions(here, energy, plain + rest, beta * energy - here, -(beta**2) * curvature)


def _base(anchor: Anchor, system: System) -> np.ndarray:
    """All of beta F but the work, at the three betas [kT]."""
    near = [at_temperature(system, system.temperature / (1 + step)) for step in (-_STEP, 0.0, _STEP)]
    return anchor.result.components["reference"] - np.array([one.log_prefactor for one in near])


class _Mixture(NamedTuple):
    """What all anchors say of one temperature."""

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
        return _Mixture(Functions(*(nothing,) * 5), math.nan, math.nan, 0, ["no anchor reaches this temperature"])
    parts, errors, reasons = {}, {}, []
    for a in shares:
        reach = row[a]
        assert reach is not None
        sums = _sums(anchors[a], reach, float(system.state.beta), counts[a])
        parts[a] = _functions(system, _base(anchors[a], system), sums.beta_f, sums.energy)
        errors[a] = reach.std_error
        reasons += [reason for reason in reach.reasons if reason not in reasons]
    mixed = Functions(*(sum(shares[a] * parts[a][q] for a in shares) for q in range(5)))
    apart = [
        (parts[a].beta_f[0] - parts[b].beta_f[0]) / math.hypot(errors[a], errors[b])
        for a in shares
        for b in shares
        if a < b
    ]
    error = math.sqrt(sum((share * errors[a]) ** 2 for a, share in shares.items()))
    return _Mixture(mixed, error, float(max(apart, key=abs, default=math.nan)), len(shares), reasons)


def _result(
    series: TemperatureSeries,
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
    evaluations = sum(len(anchor.energy) for anchor in anchors)
    for system, row in zip(systems, table, strict=True):
        evaluations += sum(len(reach.energy) for reach in row if reach is not None)
        evaluations += sum(2 * len(anchors[a].energy) for a in _shares(row))
        functions, error, apart, n_anchors, reasons = _mixture(system, row, anchors, counts)
        spread = Functions(*(np.std(q[1:], ddof=1) for q in functions))
        gap = functions.energy - functions.plain_energy
        helmholtz = _ratio(float(gap[0]), float(np.std(gap[1:], ddof=1)))
        if abs(apart) > _DISAGREEMENT:
            reasons.append(f"anchors differ by {abs(apart):.1f} standard errors")
        if abs(helmholtz) > _DISAGREEMENT:
            reasons.append(f"the mean energy is {abs(helmholtz):.1f} standard errors off the derivative of beta F")
        status: Status = "converged" if error <= plan.target_error * n_atoms else "target_not_reached"
        if reasons:
            status = "unreliable"
        elif interrupted and status != "converged":
            status = "interrupted"
        states.append(
            StateResult(
                temperature=system.temperature,
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
                helmholtz_z=helmholtz,
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
    spent["series"] = evaluations
    clock.lap("series")
    return SeriesResult(
        system=series.system,
        plan=plan,
        states=tuple(states),
        anchors=tuple(anchor.system.temperature for anchor in anchors),
        replicas=np.array(replicas)[:, 1:],
        energy_evaluations=spent,
        wall_seconds=clock.seconds(),
        warnings=tuple(warnings),
        interrupted=interrupted,
        provenance=provenance(series.system, plan),
    )


def _ratio(difference: float, error: float) -> float:
    return difference / error if error > 0 else math.nan


def _of_interest(result: Result) -> list[str]:
    """Warnings of an anchor, without that about a target error of its own."""
    return [text for text in result.warnings if not text.startswith("target error")]
