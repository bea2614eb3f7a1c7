"""The main jobs, each told in one function."""

from __future__ import annotations

import functools
import math
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from freeflow import memory, observables, team
from freeflow.bridge import Pilot, Schedule
from freeflow.config import load_crystal, revise
from freeflow.errors import InputError
from freeflow.estimators import ESTIMATORS, Estimator, bar, diagnose, record, reliability, statistical_inefficiency
from freeflow.interrupts import looks, uninterrupted
from freeflow.observers import cell_average, observed_strain, observer, profile
from freeflow.preparation import (
    Clock,
    Crossings,
    Progress,
    Report,
    Run,
    effort,
    fewest_samples,
    fitting_batch,
    from_frames,
    learned_flow,
    read_trajectory,
    slower,
    too_fast,
    tune,
    with_reference,
)
from freeflow.references import Gaussian
from freeflow.result import Result, Status, provenance
from freeflow.stopping import StoppingRule
from freeflow.trajectories import Equilibrium
from freeflow.types import Ensemble, Plan, System, double_precision
from freeflow.work import Crossing, Observe, completed

_MIN_SAMPLES_DIRECT = 2048  # without a bridge a soft mode hides from fewer
_SETTLE = 96  # stages that arrivals spend at the target before they return
_LOST = 0.01  # share of samples with an atom off its site above which there is no crystal to speak of


def estimate(
    system: System | str | Path | dict[str, Any],
    plan: Plan | None = None,
    progress: Report | None = None,
    *,
    radial_distribution: bool = False,
    **changes: Any,
) -> Result:
    """Estimate a free energy until its error bar is small enough, and say how good it is.

    Args:
        system: A system, or what `freeflow.load` makes one from.
        plan: How to estimate; the system's own plan by default.
        progress: Called now and then with what is going on.
        radial_distribution: Also find g(r) of the target, `Result.profile`, if its cell is fixed.
        **changes: Values of the plan to replace, such as `target_error=1e-4` [kT per atom] or
            `trajectory="md.dcd"`.

    Returns:
        The result; its `status` says whether to trust it. Interrupted by Ctrl-C after some samples
        were complete, it holds what they tell.

    Raises:
        InputError: If the system or the plan cannot be used.
        KeyboardInterrupt: If interrupted before any sample was complete.
    """
    system, plan = settled(system, plan, changes)
    report, clock = progress or (lambda _: None), Clock()
    frames = None if plan.trajectory is None else read_trajectory(system, plan.trajectory, report)
    if frames is not None:
        clock.lap("trajectory")
    if not radial_distribution or system.cell_motion is not None:
        return carried_out(system, plan, report, clock, frames)
    shells = observables.radial_distribution(system.crystal)
    result = carried_out(system, plan, report, clock, frames, observer(system, shells))
    return replace(result, profile=profile(shells, result.observed.counts, np.asarray(result.work.forward)))


def settled(
    system: System | str | Path | dict[str, Any], plan: Plan | None, changes: dict[str, Any]
) -> tuple[System, Plan]:
    """System and plan as a job carries them out.

    Raises:
        InputError: If they cannot be used.
    """
    system = system if isinstance(system, System) else load_crystal(system)
    plan = revise(plan or system.plan, **changes)
    if plan.estimator == "bar" and plan.bridge is None and plan.trajectory is None:
        raise InputError(
            "estimate.estimator: bar needs samples of the target; give it a bridge or a trajectory, or use fep"
        )
    if plan.flow is not None:
        system.require_fixed_cell("flows are for")
    from_frames(plan)
    return system, plan


def carried_out(
    system: System,
    plan: Plan,
    report: Report,
    clock: Clock,
    frames: Equilibrium | None = None,
    observe: Observe | None = None,
    pilot: Pilot | None = None,
) -> Result:
    """The estimate of a plan.

    Args:
        system: What to estimate.
        plan: How.
        report: Told what is going on.
        clock: Books the time of the phases.
        frames: Samples of the target for `bar`, where they are not to come from the bridge.
        observe: Told the displacements of all arrivals; what it returns is `Result.observed`. The cell's strain if
            none is given and the cell moves.
        pilot: A trial crossing of the same crystal in another state, which spares one in this.

    A flow that is trained here from frames sees the earlier half of them, and the estimate uses the later one.
    """
    if observe is None and system.cell_motion is not None:
        observe = observed_strain
    with double_precision():
        if frames is not None and from_frames(plan):
            taught, frames = frames.halves()
        else:
            taught = None
        flow = learned_flow(system, plan, report, taught)
        if flow is not None:
            clock.lap("flow")
        batch = fitting_batch(system.potential, system.n_atoms, plan.precision)
        batch = min(batch, effort(system, plan).largest_batch)
        while True:
            try:
                with with_reference(system, plan, flow, report, batch) as (run, fit):
                    clock.lap("reference")
                    crossing = tune(run, fit, report, pilot)
                    clock.lap("tuning")
                    # A cell that moves may have been given another reference.
                    mine = None if frames is None else frames.in_reference(system.crystal, run.system.crystal)
                    back = None if mine is None else _carry_back(run, crossing, mine, report)
                    samples = _sample_until(run, crossing, back, observe, report)
                    clock.lap("sampling")
                    return replace(_result(run, crossing.reference, samples, mine, clock), pilot=crossing.pilot)
            except Exception as error:
                # A process of a team cannot take another way than the others.
                if not memory.ran_out(error) or batch == 1 or team.size() > 1:
                    raise
            batch //= 2
            report(Progress("reference", None, f"memory ran out; once more with {batch} samples at a time"))


# ------------------------------------------------------------------------- sampling


class Frames(NamedTuple):
    """What frames of a trajectory, given as samples of the target, came to."""

    work: np.ndarray  # (n_frames,) reverse work in the order of time [kT]
    inefficiency: float


@dataclass
class Samples:
    """All crossings so far, in the order of their batches."""

    crossings: list[Crossing] = field(default_factory=list)
    frames: Frames | None = None
    interrupted: bool = False

    @property
    def forward(self) -> np.ndarray:
        return np.concatenate([crossing.forward for crossing in self.crossings] or [np.empty(0)])

    @property
    def reverse(self) -> np.ndarray:
        if self.frames is not None:
            return self.frames.work
        return np.concatenate([crossing.reverse for crossing in self.crossings] or [np.empty(0)])

    @property
    def inefficiency(self) -> tuple[float, float]:
        """Statistical inefficiency of forward and reverse work.

        Frames of a trajectory remember each other, and so do siblings among samples that went over the bridge and back.
        """
        if self.frames is not None:
            return 1.0, self.frames.inefficiency
        groups = [
            crossing.reverse[crossing.parents == parent]
            for crossing in self.crossings
            for parent in np.unique(crossing.parents)
        ]
        return 1.0, _sibling_inefficiency(groups)


def _sibling_inefficiency(groups: list[np.ndarray]) -> float:
    """1 + (m - 1) rho, with m the mean size of a sample's group and rho the correlation within groups."""
    values = np.concatenate(groups or [np.empty(0)])
    pairs = sum(len(group) * (len(group) - 1) for group in groups)
    if len(values) < 3 or pairs == 0 or not np.isfinite(values).all() or values.var() == 0:
        return 1.0
    centred = [group - values.mean() for group in groups]
    within = sum(float(group.sum() ** 2 - (group**2).sum()) for group in centred) / pairs
    correlation = float(np.clip(within / values.var(), 0.0, 1.0))
    return 1.0 + pairs / len(values) * correlation


def _estimator(run: Run, samples: Samples) -> Estimator:
    if run.plan.estimator == "bar":
        return functools.partial(bar, inefficiency=samples.inefficiency)
    return ESTIMATORS[run.plan.estimator]


def _carry_back(run: Run, crossing: Crossings, frames: Equilibrium, report: Report) -> Frames:
    """Reverse work of the frames: of all in memory without a bridge, of independent ones where each has to cross it."""
    stages = int(crossing.schedule.counts.sum())
    most = 2 * fewest_samples(run.system, run.plan) if stages else run.plan.max_samples
    given, inefficiency = frames.frames(min(most, max(2, math.ceil(frames.effective))) if stages else most)
    n_frames = len(jax.tree.leaves(given)[0])
    planned, moved = n_frames * max(stages, 1), 0

    def on_segment(evaluations: int) -> None:  # called from the sampling threads; a lost update would dent the bar
        nonlocal moved
        moved += evaluations

    jobs = run.sampler.cross_back(crossing.params, given, on_segment)
    try:
        for _ in looks(jobs):
            text = f"{n_frames} frames on their way to the reference"
            report(Progress("trajectory", min(moved / planned, 0.99), text))
    except KeyboardInterrupt:
        run.sampler.stop()
        raise
    work = np.concatenate(team.gathered(completed(jobs, wait_for_all=True)))
    # On its sites by the cell that was described, but not by the one that was found: no sample of this ensemble.
    outside = np.isneginf(work)
    if outside.any():
        run.warnings.append(f"{outside.sum()} of {n_frames} frames are out of this ensemble's range and were left out")
    work = work[~outside]
    finite = work[np.isfinite(work)]
    return Frames(work, max(inefficiency, statistical_inefficiency(finite) if len(finite) else 1.0))


def _sample_until(
    run: Run,
    crossing: Crossings,
    frames: Frames | None,
    observe: Observe | None,
    report: Report,
) -> Samples:
    """Batches of samples until the stopping rule is content, the limit is reached, or Ctrl-C."""
    samples, jobs = Samples(frames=frames), list[Future[Crossing | None]]()
    try:
        _draw(run, crossing, observe, report, samples, jobs)
    except KeyboardInterrupt:  # wherever it struck, what has arrived is kept
        run.sampler.stop()
        samples.crossings += completed(jobs)
        if not samples.crossings:
            raise
        samples.interrupted = True
    return samples


def _draw(
    run: Run,
    crossing: Crossings,
    observe: Observe | None,
    report: Report,
    samples: Samples,
    jobs: list[Future[Crossing | None]],
) -> None:
    """The work of `_sample_until`: fills `samples`, keeps in `jobs` what is under way."""
    plan, sampler, limit = run.plan, run.sampler, crossing.max_samples
    stages = int(crossing.schedule.counts.sum())
    fewest = fewest_samples(run.system, plan, stages) if stages else _MIN_SAMPLES_DIRECT
    rule = StoppingRule(run.target_error, limit, min_samples=min(fewest, limit))
    told, begun = _Teller(run, crossing.schedule, report), 0
    settle = _SETTLE if plan.estimator == "bar" and samples.frames is None else 0
    while True:
        if too_fast(samples.forward, crossing.variance):
            crossing = slower(run, crossing, samples.forward)
            samples.crossings.clear()
            told = _Teller(run, crossing.schedule, report)
        work = record(samples.forward, samples.reverse)
        estimator = _estimator(run, samples)
        more = rule.further(work, estimator)
        if more == 0:
            return
        told.look(work, estimator, rule.predicted_samples(work, estimator))
        batches = range(begun, begun + math.ceil(more / sampler.batch))
        begun = batches.stop
        with uninterrupted():  # else what had been handed out would be lost
            jobs += sampler.cross(crossing.params, batches, told.moved, settle, observe)
        for _ in looks(jobs):
            told.tick()
        arrived = team.gathered(completed(jobs))
        jobs.clear()
        samples.crossings += arrived
        surplus = len(samples.forward) - limit
        if surplus > 0:  # a batch is drawn whole, but the user's limit holds
            samples.crossings[-1] = _shortened(samples.crossings[-1], surplus)


def _shortened(crossing: Crossing, by: int) -> Crossing:
    forward, *reverse = crossing.forward, crossing.reverse, crossing.parents
    keep = len(forward) - by
    observed = jax.tree.map(lambda rows: rows[:keep], crossing.observed)
    reverse, parents = (part[:keep] for part in reverse)
    return crossing._replace(forward=forward[:keep], reverse=reverse, parents=parents, observed=observed)


class _Teller:
    """Turns what the threads do into progress that a person can read."""

    def __init__(self, run: Run, schedule: Schedule, report: Report):
        self._run, self._report = run, report
        returning = 2 if run.plan.estimator == "bar" and run.plan.trajectory is None else 1
        self._per_sample = max(int(schedule.counts.sum()), 1) * returning
        self._moved, self._planned, self._text = 0, math.inf, "first samples"

    def moved(self, evaluations: int) -> None:
        """Called from the sampling threads; a lost update would only dent the bar."""
        self._moved += evaluations

    def look(self, work: Any, estimator: Estimator, predicted: int) -> None:
        """New estimate, new prediction."""
        n_atoms, target = self._run.system.n_atoms, self._run.plan.target_error
        planned = min(predicted, self._run.plan.max_samples)
        self._planned = planned * self._per_sample
        if len(work.forward) > 1:
            error = float(estimator(work).std_error) / n_atoms
            done = f"{len(work.forward)} of about {planned} samples"
            self._text = f"{done}, error {error:.1e} per atom, target {target:g}"
        self.tick()

    def tick(self) -> None:
        """Report where things stand."""
        self._report(Progress("sampling", min(self._moved / self._planned, 0.99), self._text))


# ------------------------------------------------------------------------- the answer


def _result(run: Run, reference: Gaussian, samples: Samples, frames: Equilibrium | None, clock: Clock) -> Result:
    """Everything a user should know about the answer."""
    system, plan = run.system, run.plan
    work = record(samples.forward, samples.reverse)
    inefficiency = samples.inefficiency
    answer = _estimator(run, samples)(work)
    diagnostics = diagnose(work, plan.estimator, inefficiency=inefficiency, seed=plan.seed)
    delta_f, error = float(answer.delta_f), float(answer.std_error)
    if not math.isfinite(delta_f):  # no sample arrived: that is no answer, not an infinite one
        delta_f = error = math.nan
    ensemble: Ensemble = run.recipe.ensemble(reference)
    components = {
        "lattice energy": system.constants["lattice energy"],
        "reference": -float(ensemble.log_partition(system.state)),
        "work": delta_f,
        **{name: value for name, value in system.constants.items() if name != "lattice energy"},
    }
    reasons = list(reliability(diagnostics, answer))
    lost = float(np.mean(np.isposinf(work.forward)))
    left = "an atom left its site" + ("" if system.cell_motion is None else " or the cell its range")
    if lost > _LOST:
        reasons.insert(
            0,
            f"in {lost:.0%} of the samples {left}: the crystal melts or its atoms hop here",
        )
    elif lost > 0:
        run.warnings.append(f"in {lost:.2%} of the samples {left}; they are not counted as this crystal")
    if frames is not None:
        reasons += [f"trajectory: {fault}" for fault in frames.faults]
        run.warnings += [f"trajectory: {remark}" for remark in frames.remarks]
    status: Status
    reached = error <= run.target_error
    if samples.interrupted:
        status = "interrupted"
    elif reasons:
        status = "unreliable"
    else:
        status = "converged" if reached else "target_not_reached"
    if not reached and not samples.interrupted and math.isfinite(error):
        if frames is None:
            need = len(work.forward) * (error / run.target_error) ** 2
            more = f"about {need:.0f} would do"
        else:  # how the error falls with one side alone is not that simple
            more = f"more frames than {len(work.reverse)} would help" + ("" if run.plan.bridge else ", or a bridge")
        reasons.append(
            f"target error {plan.target_error:g} per atom not reached with {len(work.forward)} samples "
            f"(max_samples {plan.max_samples}); {more}"
        )
    spent = sum(team.gathered([run.sampler.energy_evaluations]), Counter())
    observed = _rows([crossing.observed for crossing in samples.crossings])
    purposes = (*(("training",) if run.flow is not None else ()), "reference", "tuning", "sampling", "checks")
    return Result(
        system=system,
        plan=plan,
        estimator=plan.estimator,
        delta_f=delta_f,
        delta_f_std_error=error,
        components=components,
        beta_f=math.fsum(components.values()),
        beta_f_std_error=error,
        work=work,
        n_samples=len(work.forward),
        energy_evaluations={name: spent[name] for name in purposes},
        wall_seconds=clock.seconds(),
        status=status,
        ess_fraction=float(answer.ess_fraction),
        pareto_k=diagnostics.pareto_k,
        overlap=diagnostics.overlap,
        largest_weight_share=diagnostics.largest_weight_share,
        drift_z=diagnostics.drift_z,
        hysteresis_z=diagnostics.hysteresis_z,
        bootstrap_std_error=diagnostics.bootstrap_std_error,
        warnings=(*reasons, *run.warnings),
        provenance=provenance(system, plan),
        trajectory=None if frames is None else _facts(frames, samples),
        observed=observed,
        cell=None if system.cell_motion is None else cell_average(system.crystal, observed, work.forward),
    )


def _facts(frames: Equilibrium, samples: Samples) -> dict[str, Any]:
    """What the result says of the trajectory."""
    series = frames.series
    assert samples.frames is not None
    return {
        "file": series.path,
        "n_frames": series.n_frames,
        "n_melted": int(series.melted.sum()),
        "n_hopped": int(series.hopped.sum()),
        "equilibrated_from": frames.start,
        "inefficiency": frames.inefficiency,
        "n_used": len(samples.frames.work),
        "inefficiency_of_work": samples.frames.inefficiency,
        "energies": series.energy_comparison.verdict,
    }


def _rows(observed: list[Any]) -> Any:
    """What was observed batch by batch, as one."""
    seen = [part for part in observed if part is not None]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *seen) if seen else None
