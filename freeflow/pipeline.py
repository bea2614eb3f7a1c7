"""The main jobs, each told in one function."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from freeflow import bridge as bridges
from freeflow import checkpoints, references, training
from freeflow.bridge import BridgeParams, Pilot, Schedule
from freeflow.config import load, revise
from freeflow.crystals import target_ensemble
from freeflow.errors import InputError
from freeflow.estimators import ESTIMATORS, Estimator, bar, diagnose, record, reliability
from freeflow.flows import Flow, pulled_back
from freeflow.geometry import nearest_image_table, nearest_neighbour_distance, neighbour_table
from freeflow.potentials import Potential, force_constants
from freeflow.references import Fit, Gaussian, GaussianCrystal
from freeflow.result import Result, Status, format_with_error, provenance
from freeflow.stopping import StoppingRule
from freeflow.types import Ensemble, Params, Plan, System, double_precision
from freeflow.work import BridgeSampler, Crossing

# The kernel that crosses the bridge sees pairs up to the cutoff plus so many standard deviations
# of a distance. What it misses is put right exactly when a sample arrives.
_SKIN = 3.0
# A bridge is made so slow that its work varies by no more than this [kT^2]: one-sided estimates
# from a few hundred samples are sound up to about 1, and little is gained below the lower bound.
_WORK_VARIANCE = (0.08, 1.0)
# Fewest samples. Small crystals are cheap, and their work tends to be skewed: with 256 samples the error
# bars of mw_cubic_8 were 15 % too small, see tests/test_calibration.py.
_MIN_SAMPLES, _MIN_SAMPLES_SMALL = 160, 1024
_SAMPLES_TIMES_ATOMS = 2**16
_FEWEST_STAGES = 32
_MIN_SAMPLES_DIRECT = 2048  # without a bridge a soft mode hides from fewer
_TRIAL_SAMPLES = 512  # of a flow; a bridge follows unless their work varies by less than this [kT^2]
_WORK_VARIANCE_DIRECT = 1.5
_PILOT_UNDERESTIMATE = 1.2  # a short pilot sees less friction than a slow crossing meets
_SECOND_PILOT = (96, 1_000)  # stages, at least and at most
_MAX_STAGES = 50_000
_SETTLE = 96  # stages that arrivals spend at the target before they return
_MELTED = 0.1  # share of trial samples with an atom off its site at which a run is cut short
_BLUR = 0.02  # rounding error of the whole crystal's energy that float32 kernels may have [kT]
_LOST = 0.01  # share of samples with an atom off its site above which there is no crystal to speak of


class Progress(NamedTuple):
    """What a run is doing just now."""

    phase: str  # "reference" | "tuning" | "sampling"
    fraction: float | None
    text: str


Report = Callable[[Progress], None]


def enable_compilation_cache(folder: Path | None) -> None:
    """Keep compiled code in `folder` so that later runs start fast; None switches the cache off."""
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    if folder is not None:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def estimate(
    system: System | str | Path | dict[str, Any],
    plan: Plan | None = None,
    progress: Report | None = None,
    **changes: Any,
) -> Result:
    """Estimate a free energy until its error bar is small enough, and say how good it is.

    Args:
        system: A system, or what `freeflow.load` makes one from.
        plan: How to estimate; the system's own plan by default.
        progress: Called now and then with what is going on.
        **changes: Values of the plan to replace, such as `target_error=1e-4` [kT per atom].

    Returns:
        The result; its `status` says whether to trust it. Interrupted by Ctrl-C after some samples
        were complete, it holds what they tell.

    Raises:
        InputError: If the system or the plan cannot be used.
        KeyboardInterrupt: If interrupted before any sample was complete.
    """
    system = system if isinstance(system, System) else load(system)
    plan = revise(plan or system.plan, **changes)
    if plan.estimator == "bar" and plan.bridge is None:
        raise InputError("estimate.estimator: bar needs samples of the target; give it a bridge, or use fep")
    report = progress or (lambda _: None)
    clock = Clock()
    with double_precision():
        flow = _flow(system, plan, report)
        if flow is not None:
            clock.lap("flow")
        return _estimate(system, plan, flow, report, clock)


def _estimate(system: System, plan: Plan, flow: LearnedFlow | None, report: Report, clock: Clock) -> Result:
    with _sampler(system, plan, flow) as run:
        fit = _fit_reference(run, report)
        clock.lap("reference")
        crossing = _tune(run, fit.gaussian, report)
        clock.lap("tuning")
        samples = _sample_until(run, fit.gaussian, crossing, report)
        clock.lap("sampling")
        return _result(run, fit, samples, clock)


class Clock:
    """Wall time of the phases, and of the compilation inside them."""

    _compiled = 0.0  # of the whole process; JAX reports it from all threads

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._compiled_before = Clock._compiled
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """All that was booked, with the total."""
        total = time.perf_counter() - self._begin
        # Threads compile side by side: the sum may exceed what the user waited.
        return {"total": total, "compile": min(Clock._compiled - self._compiled_before, total), **self.laps}

    @classmethod
    def count_compilation(cls, event: str, duration_secs: float, **_: str | int) -> None:
        """Listener for JAX's own timings."""
        if event.startswith("/jax/core/compile/"):
            cls._compiled += duration_secs


jax.monitoring.register_event_duration_secs_listener(Clock.count_compilation)


# ------------------------------------------------------------------------- setting up


class LearnedFlow(NamedTuple):
    """A flow with its parameters, and what it cost to have it here."""

    flow: Flow
    params: Params
    energy_evaluations: Mapping[str, int]  # reference, training


def fit_gaussian(system: System, plan: Plan, report: Report) -> Fit:
    """The plan's reference for the bare crystal; to be called in double precision."""
    with _sampler(system, replace(plan, estimator="fep", flow=None)) as run:
        fit = _fit_reference(run, report)
        return fit._replace(energy_evaluations=run.sampler.energy_evaluations["reference"])


def _flow(system: System, plan: Plan, report: Report) -> LearnedFlow | None:
    """The plan's flow, from its checkpoint or trained here and now."""
    if plan.flow is None:
        return None
    spent = {"reference": 0}

    def gaussian() -> Gaussian:
        fit = fit_gaussian(system, plan, report)
        spent["reference"] += fit.energy_evaluations
        return fit.gaussian

    report(Progress("flow", None, "loading"))
    if plan.flow.checkpoint is not None:
        flow, params = checkpoints.load_flow(system, plan.flow.checkpoint, gaussian)
        return LearnedFlow(flow, params, spent)
    flow = checkpoints.build_flow(system, plan.flow.architecture or "", plan.flow.options, gaussian)
    settings = plan.flow.training
    report(Progress("training", None, "compiling"))
    session = training.train_flow(flow, system, settings, plan.seed, lambda now: report(training_progress(now)))
    spent["training"] = training.energy_evaluations(session, settings)
    return LearnedFlow(flow, session.state.average, spent)


def training_progress(session: training.Session) -> Progress:
    """Where training stands."""
    last, step, horizon = session.metrics[-1], int(session.state.step), int(session.state.horizon)
    text = f"step {step} of {horizon}, beta F below {format_bound(last)} per atom, ESS {format_ess(last)}"
    return Progress("training", step / horizon, text)


def format_bound(metrics: training.Metrics) -> str:
    """Upper bound of beta F per atom [kT], with its error."""
    if metrics["bound_per_atom"] is None:
        return "not estimable"
    return format_with_error(metrics["bound_per_atom"], metrics["bound_std_error"])


def format_ess(metrics: training.Metrics) -> str:
    """Effective sample size in per cent."""
    return f"{100 * metrics['ess_fraction']:.3g} %"


@dataclass
class Run:
    """What the phases of one estimate share."""

    system: System
    plan: Plan
    recipe: GaussianCrystal
    sampler: BridgeSampler
    blocks: np.ndarray  # harmonic precision
    flow: LearnedFlow | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def target_error(self) -> float:
        """Standard error to reach [kT, total]."""
        return self.plan.target_error * self.system.n_atoms


@contextmanager
def _sampler(system: System, plan: Plan, learned: LearnedFlow | None = None) -> Iterator[Run]:
    """Tables, kernels and compiled pieces for a system; threads end with the context."""
    crystal, potential, beta = system.crystal, system.potential, float(system.state.beta)
    recipe = references.gaussian_crystal(crystal) if learned is None else learned.flow.recipe

    def seen(target: Ensemble) -> Ensemble:
        return target if learned is None else pulled_back(learned.flow, learned.params, target)

    if system.nearest_image_only:
        near = nearest_image_table(crystal)
    else:
        near = neighbour_table(crystal, 1.0001 * potential.cutoff)
    columns = force_constants(potential, near, crystal.site_of[0])
    if not np.isfinite(columns).all():
        raise InputError("potential: the forces near the perfect lattice are not finite; check density and units")
    if not columns.any():
        raise InputError("potential: no atom feels another; the crystal is too thin for this cutoff, check the density")
    blocks = references.harmonic_blocks(crystal, columns, beta)
    unstable = references.instability(crystal, blocks)
    run_warnings = []
    if unstable is not None and plan.reference == "harmonic":
        references.gaussian_from_blocks(crystal, blocks)  # raises, naming the modes
    if unstable is not None:
        run_warnings.append(
            f"the perfect lattice is not a minimum of the energy: {unstable.count} imaginary modes, the strongest at "
            f"wave vector {unstable.wave} of {crystal.group}; the {plan.reference} reference goes round them"
        )
    if not system.nearest_image_only:
        reach = nearest_neighbour_distance(crystal)
        if learned is None or learned.flow.transferable:  # others start from wider references than the crystal's own
            reach = min(_SKIN * math.sqrt(2.0) * references.root_mean_square(crystal, blocks), reach)
        near = neighbour_table(crystal, potential.cutoff + reach)
    precision = _precision(system, plan, run_warnings)
    cheap = target_ensemble(potential, near, precision)
    transport = bridges.bridge(recipe, seen(cheap), precision)
    batch = batch_size(potential, crystal.n_atoms)
    sampler = BridgeSampler(recipe, transport, seen(system.target), system.state, batch, plan.seed)
    sampler.energy_evaluations["reference"] += 2 * columns.shape[2]  # a column costs a forward derivative
    try:
        if learned is None:
            like = references.gaussian_from_blocks(crystal, references.isotropic_blocks(crystal, np.abs(blocks)))
        else:
            like = learned.flow.gaussian
        if plan.bridge is not None or (learned is None and plan.reference != "harmonic"):
            sampler.compile("forward", like)
        sampler.compile("exact", like)
        if plan.estimator == "bar":
            sampler.compile("reverse", like)
        yield Run(system, plan, recipe, sampler, blocks, learned, run_warnings)
    finally:
        sampler.close()


def _precision(system: System, plan: Plan, warnings: list[str]) -> str:
    """The plan's precision, or float64 where float32 would blur the energy by a noticeable part of kT."""
    scale = abs(system.constants["lattice energy"]) / system.n_atoms  # of an atom's energy [kT]
    blur = float(np.finfo(np.float32).eps) * scale * math.sqrt(system.n_atoms)
    if plan.precision == "float64" or blur < _BLUR:
        return plan.precision
    warnings.append(f"float32 kernels would blur the energy by {blur:.2g} kT at this temperature; float64 was used")
    return "float64"


def batch_size(potential: Potential, n_atoms: int) -> int:
    """Samples that move together: enough to fill vector units, few enough for the cache."""
    if jax.default_backend() != "cpu":
        return int(np.clip(2 ** round(math.log2(2**20 / n_atoms)), 64, 8192))
    if potential.weight is None:
        return 64  # pair kernels go through tiles of atoms, whatever their number
    return int(np.clip(2 ** round(math.log2(2**15 / n_atoms)), 8, 128))


def _fit_reference(run: Run, report: Report) -> Fit:
    """The plan's reference ensemble."""
    crystal, plan = run.system.crystal, run.plan
    if run.flow is not None:
        run.sampler.energy_evaluations.update(run.flow.energy_evaluations)
        return Fit(run.flow.flow.gaussian, 0, math.nan, 0)
    if plan.reference == "harmonic":
        return Fit(references.gaussian_from_blocks(crystal, run.blocks), 0, math.nan, 0)
    constants = -run.system.log_prefactor / crystal.n_atoms

    def tell(iteration: int, bound: float) -> None:
        text = f"fitting the {plan.reference} reference, beta F below {constants + bound:.5f} per atom"
        report(Progress("reference", None, text))

    report(Progress("reference", None, "compiling"))
    return references.fit_self_consistent(
        run.recipe,
        run.blocks,
        run.sampler.evaluate,
        plan.seed,
        isotropic=plan.reference == "einstein",
        n_samples=max(256, 2 * run.sampler.batch),
        progress=tell,
    )


class Crossings(NamedTuple):
    """How samples are to be carried over."""

    schedule: Schedule  # without segments: no bridge
    pilot: Pilot | None
    variance: float  # of the work, foreseen [kT^2]; infinite where the user chose the stages
    max_samples: int


def _tune(run: Run, gaussian: Gaussian, report: Report) -> Crossings:
    """How many stages the bridge gets, where they lie and how large their steps are."""
    if run.plan.bridge is None:
        return _no_bridge(run)
    if (
        run.flow is not None
        and run.plan.bridge == "auto"
        and run.plan.estimator == "fep"
        and _needs_no_bridge(run, gaussian)
    ):
        return _no_bridge(run)
    report(Progress("tuning", 0.0, "first trial crossing"))
    pilot = run.sampler.pilot(gaussian, lambda lam: report(Progress("tuning", 0.3 * lam, "first trial crossing")))
    # The first pilot hurries past whatever relaxes slowly; a second one, slow enough, sees the friction.
    slower = int(np.clip(0.6 * bridges.thermodynamic_length(pilot) ** 2, *_SECOND_PILOT))
    pilot = run.sampler.pilot(
        gaussian,
        lambda lam: report(Progress("tuning", 0.3 + 0.7 * lam, "second trial crossing")),
        bridges.schedule_from(pilot, slower),
    )
    if isinstance(run.plan.bridge, int):
        return Crossings(bridges.schedule_from(pilot, run.plan.bridge), pilot, math.inf, run.plan.max_samples)
    few = min(_MIN_SAMPLES, run.plan.max_samples)
    short = Crossings(bridges.schedule_from(pilot, int(pilot.counts.sum())), pilot, math.inf, few)
    if pilot.lost > _MELTED:  # no crystal: a few samples will say so as well as many
        return short
    stages, variance = _stages(run, pilot)
    if stages == _MAX_STAGES:
        run.warnings.append(f"a sound bridge would take more than {_MAX_STAGES} stages; this one is far too short")
        return short
    return Crossings(bridges.schedule_from(pilot, stages), pilot, variance, run.plan.max_samples)


def _no_bridge(run: Run) -> Crossings:
    nothing = np.empty(0)
    none = Schedule(np.array([0.0]), nothing, nothing.astype(np.int32))
    return Crossings(none, None, math.inf, run.plan.max_samples)


def _needs_no_bridge(run: Run, gaussian: Gaussian) -> bool:
    """Whether samples that a flow carries over at once have weights even enough to be averaged."""
    none = BridgeParams(gaussian, _no_bridge(run).schedule)
    # Far from the batches of the run, so that no random number serves twice.
    batches = range(2**30, 2**30 + -(-_TRIAL_SAMPLES // run.sampler.batch))
    arrived = _arrived([job for job in run.sampler.cross(none, batches)], wait_for_all=True)
    work = np.concatenate([crossing.forward for crossing in arrived])
    spent = run.sampler.energy_evaluations
    spent["tuning"] += spent.pop("sampling")
    return bool(np.isfinite(work).all()) and float(work.var()) < _WORK_VARIANCE_DIRECT


def _fewest_samples(n_atoms: int) -> int:
    return int(np.clip(_SAMPLES_TIMES_ATOMS // n_atoms, _MIN_SAMPLES, _MIN_SAMPLES_SMALL))


def _stages(run: Run, pilot: Pilot) -> tuple[int, float]:
    """Stages that bring the target error with few enough samples, and the work's variance then.

    After K stages var(w) = 2 L^2 / K, and n samples have the squared error (exp(var) - 1) / n: the
    cost K n for a given error falls with K until n reaches the fewest samples that an error bar
    can be had from.
    """
    length2 = _PILOT_UNDERESTIMATE * bridges.thermodynamic_length(pilot) ** 2
    n = min(_fewest_samples(run.system.n_atoms), run.plan.max_samples)
    variance = float(np.clip(math.log1p(n * run.target_error**2), *_WORK_VARIANCE))
    stages = int(np.clip(math.ceil(2 * length2 / variance), _FEWEST_STAGES, _MAX_STAGES))
    return stages, 2 * length2 / stages


# ------------------------------------------------------------------------- sampling


@dataclass
class Samples:
    """All crossings so far, in the order of their batches."""

    crossings: list[Crossing] = field(default_factory=list)
    interrupted: bool = False

    @property
    def forward(self) -> np.ndarray:
        return np.concatenate([crossing.forward for crossing in self.crossings] or [np.empty(0)])

    @property
    def reverse(self) -> np.ndarray:
        return np.concatenate([crossing.reverse for crossing in self.crossings] or [np.empty(0)])

    @property
    def inefficiency(self) -> tuple[float, float]:
        """Statistical inefficiency of forward and reverse work: siblings among the latter are not independent."""
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


def _sample_until(run: Run, gaussian: Gaussian, crossing: Crossings, report: Report) -> Samples:
    """Batches of samples until the stopping rule is content, the limit is reached, or Ctrl-C."""
    samples, jobs = Samples(), list[Future[Crossing | None]]()
    try:
        _draw(run, gaussian, crossing, report, samples, jobs)
    except KeyboardInterrupt:  # wherever it struck, what has arrived is kept
        run.sampler.stop()
        samples.crossings += _arrived(jobs)
        if not samples.crossings:
            raise
        samples.interrupted = True
    return samples


def _draw(
    run: Run,
    gaussian: Gaussian,
    crossing: Crossings,
    report: Report,
    samples: Samples,
    jobs: list[Future[Crossing | None]],
) -> None:
    """The work of `_sample_until`: fills `samples`, keeps in `jobs` what is under way."""
    plan, sampler, limit = run.plan, run.sampler, crossing.max_samples
    bridged = len(crossing.schedule.counts) > 0
    fewest = _fewest_samples(run.system.n_atoms) if bridged else _MIN_SAMPLES_DIRECT
    rule = StoppingRule(run.target_error, limit, min_samples=min(fewest, limit))
    told, begun = _Teller(run, crossing.schedule, report), 0
    settle = _SETTLE if plan.estimator == "bar" else 0
    while True:
        if _too_fast(samples, crossing.variance):
            crossing = _slower(run, crossing, samples)
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
        jobs += sampler.cross(BridgeParams(gaussian, crossing.schedule), batches, told.moved, settle)
        while wait(jobs, timeout=0.2, return_when=FIRST_EXCEPTION).not_done:
            if any(job.done() and job.exception() for job in jobs):
                break
            told.tick()
        arrived = _arrived(jobs)
        jobs.clear()
        samples.crossings += arrived
        surplus = len(samples.forward) - limit
        if surplus > 0:  # a batch is drawn whole, but the user's limit holds
            samples.crossings[-1] = _shortened(samples.crossings[-1], surplus)


def _too_fast(samples: Samples, foreseen: float) -> bool:
    """Whether the first samples show a work that varies far more than the pilot let expect."""
    work = samples.forward[np.isfinite(samples.forward)]
    return len(work) > 2 and float(work.var()) > 2 * max(foreseen, _WORK_VARIANCE[0])


def _slower(run: Run, crossing: Crossings, samples: Samples) -> Crossings:
    """The same road with as many more stages as the samples ask for; they count as tuning."""
    assert crossing.pilot is not None
    work = samples.forward[np.isfinite(samples.forward)]
    stages = math.ceil(int(crossing.schedule.counts.sum()) * float(work.var()) / crossing.variance)
    spent = run.sampler.energy_evaluations
    spent["tuning"] += spent["sampling"]
    spent["sampling"] = 0
    schedule = bridges.schedule_from(crossing.pilot, min(stages, _MAX_STAGES))
    # Once is enough: what a slower bridge does not cure, more stages will not.
    return crossing._replace(schedule=schedule, variance=math.inf)


def _shortened(crossing: Crossing, by: int) -> Crossing:
    return crossing._replace(
        forward=crossing.forward[:-by], reverse=crossing.reverse[:-by], parents=crossing.parents[:-by]
    )


def _arrived(jobs: list[Future[Crossing | None]], wait_for_all: bool = False) -> list[Crossing]:
    """Crossings that were completed; those that have not begun are called off, unless told to wait."""
    for job in jobs if not wait_for_all else ():
        job.cancel()
    done = [job.result() for job in jobs if not job.cancelled()]
    return [crossing for crossing in done if crossing is not None]


class _Teller:
    """Turns what the threads do into progress that a person can read."""

    def __init__(self, run: Run, schedule: Schedule, report: Report):
        self._run, self._report = run, report
        self._per_sample = max(int(schedule.counts.sum()), 1) * (2 if run.plan.estimator == "bar" else 1)
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


def _result(run: Run, fit: Fit, samples: Samples, clock: Clock) -> Result:
    """Everything a user should know about the answer."""
    system, plan = run.system, run.plan
    work = record(samples.forward, samples.reverse)
    inefficiency = samples.inefficiency
    answer = _estimator(run, samples)(work)
    diagnostics = diagnose(work, plan.estimator, inefficiency=inefficiency, seed=plan.seed)
    delta_f, error = float(answer.delta_f), float(answer.std_error)
    if not math.isfinite(delta_f):  # no sample arrived: that is no answer, not an infinite one
        delta_f = error = math.nan
    ensemble: Ensemble = run.recipe.ensemble(fit.gaussian)
    components = {
        "lattice energy": system.constants["lattice energy"],
        "reference": -float(ensemble.log_partition(system.state)),
        "work": delta_f,
        **{name: value for name, value in system.constants.items() if name != "lattice energy"},
    }
    reasons = list(reliability(diagnostics, answer))
    lost = float(np.mean(np.isposinf(work.forward)))
    if lost > _LOST:
        reasons.insert(
            0,
            f"in {lost:.0%} of the samples an atom left its site: the crystal melts or its atoms hop here",
        )
    elif lost > 0:
        run.warnings.append(f"in {lost:.2%} of the samples an atom left its site; they are not counted as this crystal")
    status: Status
    reached = error <= run.target_error
    if samples.interrupted:
        status = "interrupted"
    elif reasons:
        status = "unreliable"
    else:
        status = "converged" if reached else "target_not_reached"
    if not reached and not samples.interrupted and math.isfinite(error):
        need = len(work.forward) * (error / run.target_error) ** 2
        reasons.append(
            f"target error {plan.target_error:g} per atom not reached with {len(work.forward)} samples "
            f"(max_samples {plan.max_samples}); about {need:.0f} would do"
        )
    spent = run.sampler.energy_evaluations
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
    )
