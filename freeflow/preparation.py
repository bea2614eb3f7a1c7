"""What every job on a crystal begins with: kernels, the reference, a flow, and how to cross the bridge."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from freeflow import bridge as bridges
from freeflow import checkpoints, isobaric, memory, references, team, training
from freeflow.bridge import BridgeParams, Pilot, Schedule
from freeflow.cells import CELL_MOTIONS
from freeflow.crystals import crystal_ensemble, energy_of, strained_system
from freeflow.errors import InputError
from freeflow.flows import Flow, pulled_back
from freeflow.geometry import nearest_neighbour_distance
from freeflow.potentials import External, many_body
from freeflow.references import Fit, Gaussian, GaussianCrystal
from freeflow.result import format_with_error
from freeflow.trajectories import Equilibrium, equilibrium, frame_series
from freeflow.types import Configuration, Ensemble, Params, Plan, System, ThermodynamicState, TrajectoryPlan
from freeflow.work import PLAIN, BridgeSampler, Coordinates, completed, n_workers

# The kernel that crosses the bridge sees pairs up to the cutoff plus so many standard deviations
# of a distance. What it misses is put right exactly when a sample arrives.
_SKIN = 3.0
# A bridge is made so slow that its work varies by no more than this [kT^2]: one-sided estimates
# from a few hundred samples are sound up to about 1, and little is gained below the lower bound.
_WORK_VARIANCE = (0.08, 1.0)
# Fewest samples. Small crystals are cheap, and their work tends to be skewed: with 256 samples the error
# bars of mw_cubic_8 were 15 % too small, see tests/test_calibration.py. The work of a crystal of thousands of
# atoms is a sum over regions that hardly know of each other, and as good as Gaussian.
_MIN_SAMPLES_LARGE, _MIN_SAMPLES, _MIN_SAMPLES_SMALL = 64, 160, 1024
_SAMPLES_TIMES_ATOMS_LARGE = 2**19
# Over so many stages work is a sum of pieces that have forgotten each other, in small crystals, too: the slower a
# crossing, the more Gaussian its work (Speck and Seifert, PRE 70, 066112, 2004). They then need no more than this.
_LONG_BRIDGE, _MIN_SAMPLES_LONG = 4096, 256
_LOOSE, _NOT_SMALL = 5e-4, 200  # target error [kT per atom] and atoms from which on preparations are cut short
# Samples of a flow, or fewer of a dear potential; a bridge follows unless their work varies by less than this [kT^2].
_TRIAL_SAMPLES = 512
_WORK_VARIANCE_DIRECT = 1.5
_PILOT_UNDERESTIMATE = 1.2  # a short pilot sees less friction than a slow crossing meets
_MAX_STAGES, _MAX_STAGES_PER_ATOM = 50_000, 16  # of a bridge, whichever is more: friction grows as the crystal
_MELTED = 0.1  # share of trial samples with an atom off its site at which a run is cut short
# Memory that a sample on its way takes for every atom in float32, compiled kernels measured: up to 300.
_BYTES_PER_ATOM = 400
_BATCH_OUTSIDE = 16  # samples that move together where a potential is not ours
# Samples that move together on CPU, in small crystals and in others: there, one or two vectors of a processor, so that
# what a tile's neighbours bring along stays in caches. docs/speed.md has what each costs.
_SMALL = 2**7
_ROWS_OF_PAIRS, _ROWS_OF_MANY_BODIES = (64, 32), (128, 16)
# A cell that moves: pairs are seen up to so many times the cutoff besides; it is at rest when its mean is stretched by
# less than this from the reference cell, and that must be the case after so many references.
_CELL_SKIN, _AT_REST, _CELLS = 1.03, 0.01, 8
_CELL_SAMPLES = 256  # per iteration of the fit of a cell that moves
_WIDENINGS = 6  # of the reference, at most, in modes that are far wider in the crystal
_BLUR = 0.02  # rounding error of the whole crystal's energy that float32 kernels may have [kT]


class Effort(NamedTuple):
    """How many evaluations preparations may take, where samples are cheap and where every one counts."""

    fit_samples: int  # of every iteration of the reference's fit
    pilot_samples: int
    only_pilot: tuple[int, int] | None  # stages of a single trial crossing, at least and at most; None: there are two
    second_pilot: tuple[int, int]  # stages of the second, at least and at most
    trial_samples: int | None  # that tell whether the reference alone will do, without a bridge; None: not asked
    most_to_begin_with: int  # samples over the bridge that an error bar is first asked from
    samples_times_atoms: int  # the same for larger crystals, times their atoms
    fewest_samples: int  # and in any case
    fewest_stages: int
    largest_batch: int  # samples that move together, so that no more than needed are drawn


# Fewer stages leave the work of soft modes a tail, however little work they cost on average: with 32 the weights of
# mw_cubic_8 had a skewness of 70, and error bars were too small.
_CHEAP = Effort(256, 128, None, (96, 1_000), None, _MIN_SAMPLES_SMALL, 2**16, _MIN_SAMPLES, 128, 2**13)
_DEAR = Effort(64, 32, None, (32, 300), 128, 2 * _MIN_SAMPLES, 2**16, _MIN_SAMPLES, 32, 2**13)
# In a flow's latent space a stage costs a pass through the flow, and soft modes are the flow's business.
_FLOWING = _CHEAP._replace(fewest_stages=32)
# An error bar that few samples give: preparations must not take more evaluations than these.
_LEAN = Effort(64, 64, (16, 96), (16, 96), None, _MIN_SAMPLES_SMALL, 2**15, _MIN_SAMPLES_LARGE, 64, 32)


def effort(system: System, plan: Plan) -> Effort:
    """What preparations may cost: potentials that are not ours count as dear, and a loose target asks for little."""
    if isinstance(system.potential, External):
        return _DEAR
    plain = plan.estimator == "fep" and plan.flow is None and plan.trajectory is None and system.cell_motion is None
    # The work of small crystals, and of those with three-body forces, has a tail that few samples miss; docs/speed.md.
    even = system.n_atoms >= _NOT_SMALL and not many_body(system.potential)
    if plain and even and plan.target_error >= _LOOSE:
        return _LEAN
    return _CHEAP if plan.flow is None else _FLOWING


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
    with prepared(system, replace(plan, estimator="fep", flow=None)) as run:
        fit = fit_reference(run, report)
        return fit._replace(energy_evaluations=run.sampler.energy_evaluations["reference"])


def read_trajectory(system: System, plan: TrajectoryPlan, report: Report) -> Equilibrium:
    """Frames as samples of the target, from their equilibration on.

    Raises:
        InputError: If the file cannot be used.
        LostCrystalError: If no frame is this crystal.
    """
    report(Progress("trajectory", None, f"reading {plan.file}"))
    series = frame_series(
        plan.file,
        system,
        plan.topology,
        sigma=plan.sigma,  # pyright: ignore[reportArgumentType]
        progress=lambda n: report(Progress("trajectory", None, f"{n} frames read")),
        **plan.slice,  # pyright: ignore[reportArgumentType]
    )
    return equilibrium(series)


def from_frames(plan: Plan) -> bool:
    """Whether the plan's flow is to be trained from frames of a trajectory.

    Raises:
        InputError: If it is, and there is no trajectory.
    """
    if plan.flow is None or plan.flow.checkpoint is not None or plan.flow.training.loss not in training.FROM_FRAMES:
        return False
    if plan.trajectory is None:
        raise InputError(f"estimate.flow.training.loss: {plan.flow.training.loss} needs a trajectory to learn from")
    return True


def learned_flow(system: System, plan: Plan, report: Report, frames: Equilibrium | None = None) -> LearnedFlow | None:
    """The plan's flow, from its checkpoint or trained here and now, from `frames` where its loss needs them.

    Args:
        system: What it is for.
        plan: Names the flow; without one there is none.
        report: Told what is going on.
        frames: Samples of the target to learn from.

    Raises:
        InputError: If the checkpoint does not suit the system, or the flow cannot be built, or is one for a range.
    """
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
    for option in checkpoints.RANGES.values():
        if plan.flow.options.get(option) is not None:
            raise InputError(
                f"estimate.flow.{option}: train it once for all states (freeflow train), then name its file"
            )
    flow = checkpoints.build_flow(system, plan.flow.architecture or "", plan.flow.options, gaussian)
    settings = plan.flow.training
    report(Progress("training", None, "compiling"))
    samples = None if frames is None else training.frames_of(flow, frames.frames(len(frames.series.kept))[0])
    watch = lambda now: report(training_progress(now))  # noqa: E731
    session = training.train_flow(flow, system, settings, plan.seed, watch, samples)
    spent["training"] = training.energy_evaluations(session, settings) if team.is_first() else 0
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
def prepared(system: System, plan: Plan, learned: LearnedFlow | None = None, batch: int | None = None) -> Iterator[Run]:
    """Tables, kernels and compiled pieces for a system; threads end with the context.

    Args:
        system: The system.
        plan: What they are for.
        learned: A flow that the target is seen through.
        batch: Samples that move together; as many as are good, and fit into the memory, by default.

    Raises:
        InputError: If forces near the lattice are not finite, or all zero, or the reference of the plan does not exist.
    """
    crystal, energy, beta = system.crystal, energy_of(system), float(system.state.beta)
    motion = None if system.cell_motion is None else CELL_MOTIONS[system.cell_motion]
    if motion is not None:
        recipe = isobaric.isobaric_crystal(crystal, motion)
    else:
        recipe = references.gaussian_crystal(crystal) if learned is None else learned.flow.recipe

    def seen(target: Ensemble) -> Ensemble:
        return target if learned is None else pulled_back(learned.flow, learned.params, target)

    columns = energy.force_constants(crystal.site_of[0])
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
    reach = nearest_neighbour_distance(crystal)
    if learned is None or learned.flow.transferable:  # others start from wider references than the crystal's own
        reach = min(_SKIN * math.sqrt(2.0) * references.root_mean_square(crystal, blocks), reach)
    precision = _precision(system, plan, run_warnings)
    if motion is None:
        cheap = crystal_ensemble(energy.relative(reach, precision))
    else:
        deformed = energy.deformed(_CELL_SKIN, reach, precision)
        cheap = isobaric.isobaric_ensemble(deformed, crystal.n_atoms, crystal.volume, motion)
    transport = bridges.bridge(recipe, seen(cheap), precision)
    good = batch_size(system.potential, crystal.n_atoms)
    batch = batch or fitting_batch(system.potential, crystal.n_atoms, precision)
    good = min(good, effort(system, plan).largest_batch)
    if batch < good:
        run_warnings.append(
            f"memory is short: {batch} samples at a time instead of {good}, which also draws other random numbers"
        )
    coordinates = PLAIN if learned is None else _through(learned, system.state)
    sampler = BridgeSampler(
        recipe,
        transport,
        seen(system.target),
        system.state,
        batch,
        plan.seed,
        coordinates,
        # Other processes share a batch; one batch at a time keeps them all busy.
        workers=1 if energy.on_host else None,
        require=energy.require,
    )
    if team.is_first():  # every process does this for itself
        sampler.energy_evaluations["reference"] += energy.evaluations_per_column * columns.shape[2]
    try:
        if learned is None:
            like = references.gaussian_from_blocks(crystal, references.isotropic_blocks(crystal, np.abs(blocks)))
            like = like if motion is None else isobaric.in_unit_cell(like, motion)
        else:
            like = learned.flow.gaussian
        fitted = learned is None and (plan.reference != "harmonic" or motion is not None)
        moves = plan.bridge is not None or fitted
        returns = plan.estimator == "bar" and plan.bridge is not None
        sampler.prepare([*["forward"] * moves, "launch", "exact", *["reverse"] * returns], like)
        yield Run(system, plan, recipe, sampler, blocks, learned, run_warnings)
    finally:
        sampler.close()


def _through(learned: LearnedFlow, state: ThermodynamicState) -> Coordinates:
    """Coordinates of a target that is seen through a flow."""
    flow, params = learned.flow, learned.params

    def displacements(x: Configuration) -> Array:
        return flow.displacements(flow.bijector.forward(_in_float64(params), x, state)[0])

    def configuration(u: Array) -> Configuration:
        return flow.bijector.inverse(_in_float64(params), flow.coordinates(u), state)[0]

    return Coordinates(displacements, configuration)


def _in_float64(params: Params) -> Params:
    return jax.tree.map(lambda leaf: jax.numpy.asarray(leaf).astype("float64"), params)


def _precision(system: System, plan: Plan, warnings: list[str]) -> str:
    """The plan's precision, or float64 where float32 would blur the energy by a noticeable part of kT."""
    if isinstance(system.potential, External):
        return "float64"
    scale = abs(system.constants["lattice energy"]) / system.n_atoms  # of an atom's energy [kT]
    blur = float(np.finfo(np.float32).eps) * scale * math.sqrt(system.n_atoms)
    if plan.precision == "float64" or blur < _BLUR:
        return plan.precision
    warnings.append(f"float32 kernels would blur the energy by {blur:.2g} kT at this temperature; float64 was used")
    return "float64"


def batch_size(potential: Any, n_atoms: int) -> int:
    """Samples that move together: enough to fill vector units, few enough for the cache."""
    if isinstance(potential, External):
        return _BATCH_OUTSIDE
    if jax.default_backend() != "cpu":
        return int(np.clip(2 ** round(math.log2(2**20 / n_atoms)), 64, 8192))
    return (_ROWS_OF_MANY_BODIES if many_body(potential) else _ROWS_OF_PAIRS)[n_atoms > _SMALL]


def fitting_batch(potential: Any, n_atoms: int, precision: str) -> int:
    """`batch_size`, or less where half of the free memory does not hold as much on every core or device."""
    wanted, free = batch_size(potential, n_atoms), memory.free_memory()
    if free is None:
        return wanted
    each = n_atoms * _BYTES_PER_ATOM * (2 if precision == "float64" else 1)
    # Cores of a machine share its memory, GPUs have their own.
    places = n_workers() if jax.default_backend() == "cpu" else 1
    room = free // (2 * places * each)
    return wanted if room >= wanted else 2 ** int(math.log2(max(room, 1)))


def fit_reference(run: Run, report: Report) -> Fit:
    """The plan's reference ensemble."""
    crystal, plan = run.system.crystal, run.plan
    if run.flow is not None:
        run.sampler.energy_evaluations.update(run.flow.energy_evaluations)
        return Fit(run.flow.flow.gaussian, 0, math.nan, 0)
    if plan.reference == "harmonic" and run.system.cell_motion is None:
        return Fit(references.gaussian_from_blocks(crystal, run.blocks), 0, math.nan, 0)
    constants = -run.system.log_prefactor / crystal.n_atoms
    symbol = "F" if run.system.cell_motion is None else "G"

    def tell(iteration: int, bound: float) -> None:
        text = f"fitting the {plan.reference} reference, beta {symbol} below {constants + bound:.5f} per atom"
        report(Progress("reference", None, text))

    report(Progress("reference", None, "compiling"))
    batch = run.sampler.batch
    n_samples = batch * max(2, _fit_samples(run.system, plan) // batch)
    if run.system.cell_motion is not None:
        motion = CELL_MOTIONS[run.system.cell_motion]
        kind = {"isotropic": plan.reference == "einstein", "frozen": plan.reference == "harmonic"}
        start = isobaric.start_fit(crystal, motion, run.blocks, run.sampler.gradients, **kind)
        n_samples = batch * max(2, _CELL_SAMPLES // batch)  # no translations to average over
        return references.converged(run.recipe, start, run.sampler.evaluate, plan.seed, n_samples, progress=tell)
    return references.fit_self_consistent(
        run.recipe,
        run.blocks,
        run.sampler.evaluate,
        plan.seed,
        isotropic=plan.reference == "einstein",
        n_samples=n_samples,
        progress=tell,
    )


def _fit_samples(system: System, plan: Plan) -> int:
    """Samples per iteration of the reference's fit: averages run over the crystal's translations, too."""
    return int(np.clip(2 ** round(math.log2(2**21 / system.n_atoms)), 16, effort(system, plan).fit_samples))


@contextmanager
def with_reference(
    system: System, plan: Plan, learned: LearnedFlow | None, report: Report, batch: int | None = None
) -> Iterator[tuple[Run, Fit]]:
    """A run with its reference; one of a cell that moves is made anew around the mean cell that was found.

    The arguments are those of `prepared`, and who is told what is going on.

    Raises:
        InputError: If the mean cell does not come to rest.
    """
    spent = 0
    for _ in range(_CELLS):
        with prepared(system, plan, learned, batch) as run:
            run.sampler.energy_evaluations["reference"] += spent
            fit = fit_reference(run, report)
            strain = isobaric.mean_strain(system, fit.gaussian)
            if np.abs(np.linalg.eigvalsh(strain)).max() < _AT_REST:
                yield run, fit
                return
            spent = run.sampler.energy_evaluations["reference"]
        system = strained_system(system, strain)
    raise InputError(
        f"pressure: no equilibrium cell was found near the given one; the last mean cell has the volume "
        f"{system.crystal.volume:.6g} {system.units.length}^3; check pressure, density and units"
    )


class Crossings(NamedTuple):
    """How samples are to be carried over."""

    reference: Gaussian  # where they start
    schedule: Schedule  # without segments: no bridge
    pilot: Pilot | None
    variance: float  # of the work, foreseen [kT^2]; infinite where the user chose the stages
    max_samples: int

    @property
    def params(self) -> BridgeParams:
        """The bridge itself."""
        return BridgeParams(self.reference, self.schedule)


def tune(run: Run, fit: Fit, report: Report, known: Pilot | None = None) -> Crossings:
    """Where the bridge starts, how many stages it gets, where they lie and how large their steps are.

    Args:
        run: What to cross to.
        fit: The reference.
        report: Told what is going on.
        known: A trial crossing of the same crystal in another state; it stands for the first of two.
    """
    if run.plan.bridge is None:
        return _no_bridge(run, fit.gaussian)
    spend = effort(run.system, run.plan)
    trial = spend.trial_samples if run.flow is None else _TRIAL_SAMPLES
    if (
        trial is not None
        and run.plan.bridge == "auto"
        and run.plan.estimator == "fep"
        and _needs_no_bridge(run, fit.gaussian, trial)
    ):
        return _no_bridge(run, fit.gaussian)
    pilot = _trial_crossing(run, fit.gaussian, spend, report, known)
    gaussian, pilot = _widened(run, fit, spend, report, pilot)
    pilot = pilot._replace(arrivals=None)  # they have served
    if isinstance(run.plan.bridge, int):
        schedule = bridges.schedule_from(pilot, run.plan.bridge)
        return Crossings(gaussian, schedule, pilot, math.inf, run.plan.max_samples)
    few = min(_MIN_SAMPLES, run.plan.max_samples)
    short = Crossings(gaussian, bridges.schedule_from(pilot, int(pilot.counts.sum())), pilot, math.inf, few)
    if pilot.lost > _MELTED:  # no crystal: a few samples will say so as well as many
        return short
    stages, variance = _stages(run, pilot)
    if stages == (most := _most_stages(run.system)):
        run.warnings.append(f"a sound bridge would take more than {most} stages; this one is far too short")
        return short
    return Crossings(gaussian, bridges.schedule_from(pilot, stages), pilot, variance, run.plan.max_samples)


def _trial_crossing(
    run: Run,
    gaussian: Gaussian,
    spend: Effort,
    report: Report,
    known: Pilot | None = None,
    name: str = "trial crossing",
) -> Pilot:
    """What crossing takes, from one pilot or two; one that is known already stands for the first of two."""
    if known is None or spend.only_pilot is not None:
        report(Progress("tuning", 0.0, f"first {name}"))
        pilot = run.sampler.pilot(
            gaussian,
            lambda lam: report(Progress("tuning", 0.3 * lam, f"first {name}")),
            n_samples=spend.pilot_samples,
            stages=spend.only_pilot,
        )
    else:
        pilot = known
    if spend.only_pilot is not None:
        return pilot
    # The first pilot hurries past whatever relaxes slowly; a second one, slow enough, sees the friction.
    slower = int(np.clip(0.6 * bridges.thermodynamic_length(pilot) ** 2, *spend.second_pilot))
    return run.sampler.pilot(
        gaussian,
        lambda lam: report(Progress("tuning", 0.3 + 0.7 * lam, f"second {name}")),
        bridges.schedule_from(pilot, slower),
        spend.pilot_samples,
    )


def _widened(run: Run, fit: Fit, spend: Effort, report: Report, pilot: Pilot) -> tuple[Gaussian, Pilot]:
    """A reference as wide as the crystal in modes that the fit took for far narrower, and the pilot from it.

    The Gaussian of least KL(q || target) stays inside the target. Where a mode has two wells, or is wide because the
    others like it so, that is far too narrow, and arrivals of the pilot tell. They lag behind: it takes some rounds.
    Lengths say nothing here, since a fast pilot does not see the friction of a mode that it leaves behind.
    """
    gaussian, step = fit.gaussian, fit.step
    if step is None or run.plan.reference != "self_consistent" or spend.only_pilot is not None:
        return gaussian, pilot
    for _ in range(_WIDENINGS):
        if pilot.arrivals is None or pilot.lost > _MELTED:
            break
        step, n_wide = step.widened(pilot.arrivals)
        if not n_wide:
            break
        gaussian, name = step.gaussian(), f"trial crossing, reference wider in {n_wide} modes"
        pilot = _trial_crossing(run, gaussian, spend, report, name=name)
    return gaussian, pilot


def _no_bridge(run: Run, gaussian: Gaussian) -> Crossings:
    nothing = np.empty(0)
    none = Schedule(np.array([0.0]), nothing, nothing.astype(np.int32))
    return Crossings(gaussian, none, None, math.inf, run.plan.max_samples)


def _needs_no_bridge(run: Run, gaussian: Gaussian, n_samples: int) -> bool:
    """Whether samples that are carried over at once, by a flow or as they are, have weights even enough."""
    none = _no_bridge(run, gaussian).params
    # Far from the batches of the run, so that no random number serves twice.
    batches = range(2**30, 2**30 + -(-n_samples // run.sampler.batch))
    arrived = team.gathered(completed(run.sampler.cross(none, batches), wait_for_all=True))
    work = np.concatenate([crossing.forward for crossing in arrived])
    spent = run.sampler.energy_evaluations
    spent["tuning"] += spent.pop("sampling")
    return bool(np.isfinite(work).all()) and float(work.var()) < _WORK_VARIANCE_DIRECT


def fewest_samples(system: System, plan: Plan, stages: int = 0) -> int:
    """Samples over a bridge of so many stages that an error bar can be had from."""
    n_atoms, spend = system.n_atoms, effort(system, plan)
    fewest = int(np.clip(_SAMPLES_TIMES_ATOMS_LARGE // n_atoms, _MIN_SAMPLES_LARGE, spend.fewest_samples))
    usual = int(np.clip(spend.samples_times_atoms // n_atoms, fewest, spend.most_to_begin_with))
    return usual if stages < _LONG_BRIDGE else min(usual, _MIN_SAMPLES_LONG)


def _stages(run: Run, pilot: Pilot) -> tuple[int, float]:
    """Stages that bring the target error with few enough samples, and the work's variance then.

    After K stages var(w) = 2 L^2 / K, and n samples have the squared error (exp(var) - 1) / n: the
    cost K n for a given error falls with K until n reaches the fewest samples that an error bar
    can be had from.
    """
    length2 = _PILOT_UNDERESTIMATE * bridges.thermodynamic_length(pilot) ** 2
    n = min(fewest_samples(run.system, run.plan), run.plan.max_samples)
    variance = float(np.clip(math.log1p(n * run.target_error**2), *_WORK_VARIANCE))
    stages = int(
        np.clip(math.ceil(2 * length2 / variance), effort(run.system, run.plan).fewest_stages, _most_stages(run.system))
    )
    return stages, 2 * length2 / stages


def _most_stages(system: System) -> int:
    return max(_MAX_STAGES, _MAX_STAGES_PER_ATOM * system.n_atoms)


def too_fast(work: np.ndarray, foreseen: float) -> bool:
    """Whether the first samples show a work that varies far more than the pilot let expect."""
    work = work[np.isfinite(work)]
    return len(work) > 2 and float(work.var()) > 2 * max(foreseen, _WORK_VARIANCE[0])


def slower(run: Run, crossing: Crossings, work: np.ndarray) -> Crossings:
    """The same road with as many more stages as the samples ask for; they count as tuning."""
    assert crossing.pilot is not None
    work = work[np.isfinite(work)]
    stages = math.ceil(int(crossing.schedule.counts.sum()) * float(work.var()) / crossing.variance)
    spent = run.sampler.energy_evaluations
    spent["tuning"] += spent["sampling"]
    spent["sampling"] = 0
    schedule = bridges.schedule_from(crossing.pilot, min(stages, _most_stages(run.system)))
    # Once is enough: what a slower bridge does not cure, more stages will not.
    return crossing._replace(schedule=schedule, variance=math.inf)
