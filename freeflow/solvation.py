"""`freeflow estimate` of a solution: one difference of two states by several methods, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from freeflow import switching
from freeflow.bijectors.radial import analytic_radial
from freeflow.config import load, revise_difference
from freeflow.difference import Answer, DifferenceResult
from freeflow.errors import InputError
from freeflow.estimators import (
    bar,
    diagnose,
    equilibrated,
    fep,
    record,
    reliability,
)
from freeflow.flows.fluid import carrier
from freeflow.learned_maps import learn, training_for
from freeflow.map_training import Parts, fit_map, folds, shape_for, work_of_frames
from freeflow.preparation import Clock, Progress, Report
from freeflow.result import environment
from freeflow.solutions import Solution, read_frames
from freeflow.switching import Chains, Course, Fluid, Switches
from freeflow.types import Bijector, DifferencePlan, Work, double_precision

_BATCHES = 4  # of chains, in each state
_FRAMES, _FRAMES_TO_FIT = 4096, 2048  # of each state, for methods that work on frames, and to fit an escort to
_STATES, _ROUNDS_OF_STATES = 9, 16  # for MBAR, and samples of every chain in each
_TRIAL_STAGES, _HASTE = 256, 4  # of the first trial, and by how much a journey may have more stages than its trial
_LARGEST_STEP = 0.03, 0.02  # of journeys: in radii of the larger solute, and in diameters of the solvent
_LEGS, _ESCORTED_VARIANCE = (4, 64), 2.0  # of escorted journeys: fewest and most, and of their work [kT^2]
_FEWEST_ROUNDS = 4  # of journeys from every chain; fewer tell nothing of their correlation


class FrameSet(NamedTuple):
    """Configurations of one state, chain after chain, each in the order of time."""

    x: np.ndarray  # (n, n_solvent, 3) [length]
    n_chains: int
    source: str


@dataclass
class _Job:
    """What the methods share: chains in equilibrium, frames, and what these cost."""

    problem: Solution
    plan: DifferencePlan
    fluid: Fluid
    report: Report
    deadline: float
    given: tuple[FrameSet, FrameSet] | None
    warnings: list[str] = field(default_factory=list)
    cost: dict[str, int] = field(default_factory=dict)  # evaluations for "chains" and "frames", once there are any
    _chains: list[tuple[Chains, int]] = field(default_factory=list)
    _frames: tuple[FrameSet, FrameSet] | None = None

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def spent(self) -> int:
        return int(sum(self.fluid.evaluations.values()))

    def tell(self, phase: str) -> Callable[[str], None]:
        """Progress of a phase, of unknown length."""
        return lambda text: self.report(Progress(phase, None, text))

    def chains(self) -> list[tuple[Chains, int]]:
        """Chains in equilibrium at A and at B, and how many moves make a chain forget."""
        if not self._chains:
            before = self.spent
            for k, state in enumerate("AB"):
                tell = self.tell(f"equilibration of state {state}")
                chains, found = self.fluid.equilibrate(float(k), _BATCHES, 1000 * k, tell)
                if not found.reached:
                    self.warnings.append(f"no equilibrium was seen in state {state} in {found.moves} moves")
                self._chains.append((chains, max(1, math.ceil(found.inefficiency))))
            self.cost["chains"] = self.spent - before
        return self._chains

    def frames(self) -> tuple[FrameSet, FrameSet]:
        """Samples of both states: those given, or drawn here."""
        if self.given is not None:
            return self.given
        if self._frames is None:
            chains = self.chains()
            before, sets = self.spent, []
            for state, (some, interval) in zip("AB", chains, strict=True):
                enough = _FRAMES if _ON_FRAMES & set(self.plan.methods) else _FRAMES_TO_FIT
                rounds = -(-min(enough, self.plan.max_samples) // len(some))
                x = self.fluid.sample(some, rounds, interval, self.tell(f"sampling of state {state}")).frames
                sets.append(FrameSet(x, len(some), f"{len(x)} samples of {len(some)} chains of Monte Carlo"))
            self._frames = sets[0], sets[1]
            self.cost["frames"] = self.spent - before
        return self._frames


def estimate_difference(
    problem: Solution | str | Path | dict[str, Any],
    plan: DifferencePlan | None = None,
    progress: Report | None = None,
    **changes: Any,
) -> DifferenceResult:
    """The free energy difference of two states of a solution, by every method of the plan.

    Args:
        problem: A solution, or what `freeflow.load` makes one from.
        plan: How to estimate; the solution's own plan by default.
        progress: Called now and then with what is going on.
        **changes: Values of the plan to replace, such as `methods=("bar", "bridge")`.

    Raises:
        InputError: If the problem or the plan cannot be used.
        KeyboardInterrupt: If interrupted before there was an answer.
    """
    found = problem if isinstance(problem, Solution) else load(problem)
    if not isinstance(found, Solution):
        raise InputError(f"{found.name}: a crystal; freeflow.estimate is for these")
    plan = revise_difference(plan or found.plan or DifferencePlan(), **changes)
    report, clock = progress or (lambda _: None), Clock()
    deadline = math.inf if plan.max_minutes is None else time.monotonic() + 60 * plan.max_minutes
    for method in plan.methods:
        if method == "radial" or (method in {"lfep", "lbar"} and plan.map.kind == "radial"):
            _require_sizes(found, method)
    answers: list[Answer] = []
    interrupted = False
    with double_precision(), Fluid(found, plan.seed) as fluid:
        job = _Job(found, plan, fluid, report, deadline, _given(found, report))
        for method in plan.methods:
            begun, before, shared = time.monotonic(), job.spent, sum(job.cost.values())
            try:
                answer = _WAYS[method](job)
            except KeyboardInterrupt:
                if not answers:
                    raise
                interrupted = True
                break
            # What was spent once for all counts for every method that makes use of it.
            own = job.spent - before - (sum(job.cost.values()) - shared)
            used = _USES[method] if job.given is None else ()
            cost = answer.energy_evaluations + own + sum(job.cost.get(name, 0) for name in used)
            answers.append(replace(answer, energy_evaluations=cost, wall_seconds=time.monotonic() - begun))
            clock.lap(method)
        sets = job.given or job._frames
    samples = {} if sets is None else {f"State {state}": some.source for state, some in zip("AB", sets, strict=True)}
    return DifferenceResult(
        problem=found,
        plan=plan,
        answers=tuple(answers),
        wall_seconds=clock.seconds(),
        samples=samples,
        warnings=tuple(job.warnings),
        interrupted=interrupted,
        provenance={**environment(plan.seed), "config": {**found.config, "estimate": plan.values()}},
    )


def _given(solution: Solution, report: Report) -> tuple[FrameSet, FrameSet] | None:
    """Frames of both states from files, from where they are in equilibrium."""
    files = solution.config.get("solution", {}).get("trajectories")
    if not files:
        return None
    sets = []
    for k, state in enumerate("AB"):
        report(Progress("trajectory", None, f"reading state {state}"))
        parts = [read_frames(file, solution) for file in files[state]]
        x = np.concatenate(parts)
        ensemble = (solution.a, solution.b)[k]
        with double_precision():
            energies = np.asarray(jax.jit(jax.vmap(ensemble.reduced_potential, (0, None)))(x, solution.state))
        # Files of one state may be runs of their own: then each is taken to be in equilibrium.
        start = equilibrated(energies).start if len(parts) == 1 else 0
        if start > len(x) / 2:
            raise InputError(
                f"{files[state][0]}: still on its way to equilibrium at frame {start} of {len(x)}: too short"
            )
        sets.append(FrameSet(x[start:], 1, f"{len(x) - start} of {len(x)} frames of {', '.join(files[state])}"))
    return sets[0], sets[1]


# ------------------------------------------------------------------------------ methods on frames


def _inefficiency(work: np.ndarray, n_chains: int) -> float:
    """Of one chain, or several of equal length, one after the other."""
    each = len(work) // n_chains
    return switching.memory(work[: each * n_chains].reshape(n_chains, each).T)


def _answer(
    method: str, work: Work, estimator: str, g: tuple[float, float], seed: int, evaluations: int, **facts: Any
) -> Answer:
    if estimator == "fep":
        work = record(work.forward)
    found = fep(work) if estimator == "fep" else bar(work, g)
    diagnostics = diagnose(work, estimator, inefficiency=g, seed=seed)
    error = float(found.std_error) * (math.sqrt(g[0]) if estimator == "fep" else 1.0)
    said = {"overlap": diagnostics.overlap, "inefficiency": list(g), "ess_fraction": diagnostics.ess_fraction}
    return Answer(
        method=method,
        delta_f=float(found.delta_f),
        std_error=error,
        reasons=reliability(diagnostics, found._replace(std_error=np.float64(error))),
        n_samples=(len(work.forward), len(work.reverse)),
        energy_evaluations=evaluations,
        wall_seconds=0.0,
        work=work,
        facts={**said, **facts},
    )


def _mapped(job: _Job, method: str, estimator: str, bijector: Bijector) -> Answer:
    """Work of all frames through a map without parameters."""
    solution, sets = job.problem, job.frames()
    a, b = (some.x for some in sets)
    if estimator == "fep":
        b = b[:0]
    job.report(Progress(method, None, "work of the frames"))
    work = work_of_frames(bijector, (), solution.a, solution.b, a, b, solution.state)
    g_a, g_b = (_inefficiency(np.asarray(w), some.n_chains) for w, some in zip(work, sets, strict=True))
    return _answer(method, work, estimator, (g_a, g_b), job.plan.seed, 2 * (len(a) + len(b)))


def _identity() -> Bijector:
    nothing = lambda params, x, state: (x, jnp.zeros((), x.dtype))  # noqa: E731
    return Bijector(lambda key, x, state: (), nothing, nothing)


def _require_sizes(solution: Solution, method: str) -> None:
    if min(solution.radii) <= 0 or max(solution.radii) >= solution.box_length / 2:
        raise InputError(
            f"estimate.methods: {method} needs two solutes, of radii above 0 and below half the box; use bridge or mbar"
        )


def _radial(job: _Job) -> Answer:
    bijector = analytic_radial(job.problem.box_length, job.problem.radii)
    return _mapped(job, "radial", "bar", bijector)


def _learned(job: _Job, loss: str) -> Answer:
    """Maps that learn from some folds of the frames carry the others."""
    solution, choice = job.problem, job.plan.map
    two_sided = loss == "lbar"
    job.report(Progress(loss, None, "frames"))
    sets = job.frames()
    a, b = (folds(some.x, choice.folds, some.n_chains) for some in sets)
    learned, works = [], []
    for k in range(choice.folds):

        def watch(look: Any, k: int = k) -> None:
            text = f"fold {k + 1} of {choice.folds}, step {look.step}, held-out loss {look.held_out_loss:.4f} kT"
            job.report(Progress(loss, None, text))

        left = None if math.isinf(job.deadline) else max(0.0, (job.deadline - time.monotonic()) / 60)
        job.report(Progress(loss, None, f"fold {k + 1} of {choice.folds}: the map learns"))
        training = training_for(choice, loss, job.plan.seed, left)
        found = learn(solution, choice.kind, a[k], b[k] if two_sided else None, training, watch)
        back = b[k].estimate if two_sided else b[k].estimate[:0]
        job.report(Progress(loss, None, f"fold {k + 1} of {choice.folds}: work of the frames"))
        works.append(
            work_of_frames(found.bijector, found.params, solution.a, solution.b, a[k].estimate, back, solution.state)
        )
        learned.append(found)
    if any(found.untouched for found in learned):
        job.warnings.append(f"{loss}: the time was over before the first step of training; maps are as they were made")
    work = Work(*(np.concatenate(side) for side in zip(*works, strict=True)))
    g = tuple(_inefficiency(np.asarray(w), some.n_chains) for w, some in zip(work, sets, strict=True))
    spent = sum(found.energy_evaluations for found in learned)
    facts: dict[str, Any] = {
        "map": choice.kind,
        "folds": choice.folds,
        "frames_to_train": [list(found.frames[0]) for found in learned],
        "frames_to_stop": [list(found.frames[1]) for found in learned],
        "training_steps": [found.steps for found in learned],
        "training_evaluations": spent,
    }
    if learned[0].fitted is not None:
        facts["left_over"] = [found.fitted.left_over[1] for found in learned if found.fitted is not None]
    evaluations = 2 * sum(len(side) for side in work) + spent
    answer = _answer(loss, work, "bar" if two_sided else "fep", (g[0], g[1]), job.plan.seed, evaluations, **facts)
    return replace(answer, how=_how(facts, two_sided))


def _how(facts: Mapping[str, Any], two_sided: bool) -> str:
    """Who learned from what, in one line."""

    def counts(pair: list[int]) -> str:
        return f"{pair[0]} + {pair[1]}" if two_sided else str(pair[0])

    (train, *_), (stop, *_) = facts["frames_to_train"], facts["frames_to_stop"]
    text = (
        f"{facts['map']} maps in {facts['folds']} folds; each learned from {counts(train)} frames and was chosen by "
        f"{counts(stop)}, none of which it carried"
    )
    if max(facts["training_steps"]):
        text += f"; {max(facts['training_steps'])} steps on work"
    if "left_over" in facts:
        text += f"; fields leave {max(facts['left_over']):.0%} of the variance of du/dl"
    return text


# ------------------------------------------------------------------------------ methods along the way


def _step(job: _Job) -> float:
    """Time step of journeys."""
    return min(_largest_step(job.problem), *(some.step for some, _ in job.chains()))


def _largest_step(solution: Solution) -> float:
    """Up to which time step a journey, which rejects nothing, meets other atoms softly enough.

    Where atoms are few, moves are accepted at larger ones; but a growing solute is in the way, and with steps of 0.03
    diameters some journeys of six atoms flew apart, whose work on the way a trial took for friction.
    """
    to_solute, to_solvent = _LARGEST_STEP
    return min(to_solute * max(solution.radii), to_solvent * solution.diameter)


def _bridge(job: _Job) -> Answer:
    """Journeys over stages of equal thermodynamic distance."""
    chains = job.chains()[0][0]
    trial = switching.even_course(_TRIAL_STAGES, _step(job))
    while True:
        job.report(Progress("bridge", None, f"trial journey of {trial.n_stages} stages"))
        pilot = job.fluid.pilot(chains, trial)
        stages = switching.stages_for(pilot)
        # A hasty trial tells little of a slow journey: a solute that came out of a point hit atoms on its way.
        if stages <= _HASTE * trial.n_stages:
            return _to_and_fro(job, "bridge", switching.course_from(pilot, stages), {})
        trial = switching.course_from(pilot, _HASTE * trial.n_stages)


def _escort(job: _Job) -> Answer:
    """Journeys along which a field carries the solvent, one that was fitted to frames from before they set out."""
    sets = job.frames()
    job.report(Progress("escort", None, "the field is fitted"))
    a, b = (_to_fit(some.x[:: -(-len(some.x) // _FRAMES_TO_FIT)]) for some in sets)
    shape = shape_for(job.problem, hops=False)
    fitted = fit_map(job.problem, a, b, shape)
    carry, chains = carrier(fitted.params, shape), job.chains()[0][0]
    legs = _LEGS[0]
    while True:
        course = switching.escorted_course(carry, legs, _step(job))
        job.report(Progress("escort", None, f"trial journey of {legs} legs"))
        trial = job.fluid.across(chains, course, "tuning")
        if np.var(trial[np.isfinite(trial)]) <= _ESCORTED_VARIANCE or 2 * legs > _LEGS[1]:
            break
        legs *= 2
    facts = {
        "legs": legs,
        "left_over": fitted.left_over[1],
        "frames_to_train": list(fitted.frames[0]),
        "frames_to_stop": list(fitted.frames[1]),
        "training_evaluations": fitted.energy_evaluations,
    }
    how = (
        f"{legs} legs; the field was fitted to {len(a.train)} + {len(b.train)} frames from before the journeys, and "
        f"leaves {fitted.left_over[1]:.0%} of the variance of du/dl"
    )
    return replace(_to_and_fro(job, "escort", course, facts), how=how)


def _to_fit(frames: np.ndarray) -> Parts:
    """Most of the frames to fit to, the last to choose the penalty by, none to estimate from."""
    first = round(0.8 * len(frames))
    return Parts(frames[:first], frames[first:], frames[:0])


def _to_and_fro(job: _Job, method: str, course: Course, facts: Mapping[str, Any]) -> Answer:
    """Journeys from A to B and back, round after round, from chains that move on between them."""
    fluid, plan = job.fluid, job.plan
    chains = job.chains()
    rounds: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    while True:
        try:
            both = []
            for some, interval in chains:
                for _ in range(interval):
                    some.move("sampling")
                both.append(fluid.across(some, course))
        except KeyboardInterrupt:
            if len(rounds[0]) < _FEWEST_ROUNDS:
                raise
            job.warnings.append(f"{method}: interrupted")
            break
        for side, work in zip(rounds, both, strict=True):
            side.append(work)
        switches = Switches(np.array(rounds[0]), np.array(rounds[1]))
        n, error = switches.forward.size, math.nan
        if len(rounds[0]) >= _FEWEST_ROUNDS or job.late:
            error = float(bar(switches.work, switches.inefficiency).std_error)
        done = 0.0 if math.isnan(error) else min(0.99, (plan.target_error / max(error, 1e-9)) ** 2)
        text = (
            f"{n} journeys each way over {course.n_stages} stages, error {error:.2g}, target {plan.target_error:g} kT"
        )
        job.report(Progress(method, done, text))
        if error <= plan.target_error or n >= plan.max_samples or job.late:
            break
    said = {"stages": course.n_stages, "step": course.step, "chains": len(chains[0][0]), **facts}
    evaluations = facts.get("training_evaluations", 0)
    return _answer(method, switches.work, "bar", switches.inefficiency, plan.seed, evaluations, **said)


def _staged(job: _Job) -> Answer:
    """MBAR over states along the way, all sampled by Monte Carlo."""
    chains, _ = job.chains()[0]
    found = job.fluid.staged(chains, np.linspace(0.0, 1.0, _STATES), _ROUNDS_OF_STATES, job.tell("mbar"))
    job.warnings.extend(f"mbar: {warning}" for warning in found.warnings)
    return Answer(
        method="mbar",
        delta_f=found.delta_f,
        std_error=found.std_error,
        reasons=(),
        n_samples=(int(found.n_k.sum()), 0),
        energy_evaluations=0,
        wall_seconds=0.0,
        facts={"states": len(found.lambdas), "inefficiency": float(found.inefficiencies.max())},
    )


_WAYS: Mapping[str, Callable[[_Job], Answer]] = {
    "fep": lambda job: _mapped(job, "fep", "fep", _identity()),
    "bar": lambda job: _mapped(job, "bar", "bar", _identity()),
    "radial": _radial,
    "lfep": lambda job: _learned(job, "lfep"),
    "lbar": lambda job: _learned(job, "lbar"),
    "bridge": _bridge,
    "escort": _escort,
    "mbar": _staged,
}
_ON_FRAMES = set(_WAYS) - {"bridge", "escort", "mbar"}
_USES = {method: ("chains",) if method in {"bridge", "mbar"} else ("chains", "frames") for method in _WAYS}
