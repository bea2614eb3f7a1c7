"""`freeflow train`: a folder in which a flow is trained, and can be trained on."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from freeflow import checkpoints, config, preparation, training
from freeflow.checkpoints import FILE_NAME, RANGES, Checkpoint
from freeflow.crystals import at_temperature, strained_system
from freeflow.documents import JSON_VERSION, Document, require_writable, write_atomically
from freeflow.errors import FreeflowError, InputError
from freeflow.flows import Flow, starting_from
from freeflow.folders import alone_in
from freeflow.preparation import Progress, Report, format_bound, format_ess, training_progress
from freeflow.references import Gaussian
from freeflow.result import provenance
from freeflow.training import Compiled, Ending, Family, Limits, Metrics, Session
from freeflow.types import FlowPlan, Plan, System, TrainingPlan, TrajectoryPlan, double_precision

_FAMILY = "family"  # groups of arrays: references of the states of one density
METRICS_FILE, SYSTEM_FILE = "metrics.jsonl", "system.yaml"
DEFAULT_ARCHITECTURE = "residual"
_SAVE_SECONDS = 30.0
_OVERTIME = 1.25  # of a time budget, for the end of the schedule where steps were slower than measured
_FEW_SKIPPED = 0.01
_TEMPERATURES, _DENSITIES = 4, 3  # in which a flow for ranges of them is trained

_EXIT_STATUS: Mapping[Ending, int] = {
    "finished": 0,
    "plateau": 0,
    "time_limit": 0,
    "step_limit": 0,
    "interrupted": 130,
}


@dataclass(frozen=True)
class TrainingResult(Document):
    """How training went."""

    system: System
    checkpoint: Path
    flow: Flow
    n_parameters: int
    ending: Ending
    horizon: int
    metrics: tuple[Metrics, ...]  # from the untrained flow to the last evaluation
    step: int
    wall_seconds: float  # of this session
    warnings: tuple[str, ...]
    states: tuple[Metrics, ...] = ()  # of a flow for a range of them, with what it is worth in each

    @property
    def worse(self) -> bool:
        """Whether the bound is above that of the untrained flow, by two standard errors."""
        first, last = self.metrics[0], self.metrics[-1]
        if last["bound_per_atom"] is None or first["bound_per_atom"] is None:
            return last["bound_per_atom"] is None
        error = math.hypot(first["bound_std_error"], last["bound_std_error"])
        return last["bound_per_atom"] > first["bound_per_atom"] + 2 * error

    @property
    def exit_status(self) -> int:
        """What the command line returns: 3 where the schedule ended and training did harm."""
        done = self.ending in {"finished", "plateau"}
        return 3 if done and self.worse else _EXIT_STATUS[self.ending]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract of training, version 1."""
        return {
            "version": JSON_VERSION,
            "system": self.system.name,
            "n_atoms": self.system.n_atoms,
            "architecture": self.flow.architecture,
            "options": dict(self.flow.options),
            "n_parameters": self.n_parameters,
            "checkpoint": str(self.checkpoint),
            "status": self.ending,
            "steps": self.step,
            "horizon": self.horizon,
            "first": self.metrics[0],
            "last": self.metrics[-1],
            "wall_seconds": self.wall_seconds,
            "warnings": list(self.warnings),
            **({"states": [dict(state) for state in self.states]} if self.states else {}),
        }

    @property
    def summary(self) -> str:
        """One line: the bound of beta F per atom, the effective sample size, and how training ended."""
        last, ending = self.metrics[-1], self.ending.replace("_", " ")
        return f"beta F / N below {format_bound(last)}, ESS {format_ess(last)}, {ending}"

    def render(self, console: Console) -> None:
        """Print the table."""
        console.print(Text(str(self)))

    def __str__(self) -> str:
        first, last = self.metrics[0], self.metrics[-1]
        rows = [
            ("architecture", f"{self.flow.architecture}, {self.n_parameters} parameters", ""),
            ("steps", f"{self.step} of {self.horizon}", f"{last['skipped_steps']} skipped"),
            ("beta F / N, upper bound", format_bound(last), f"untrained {format_bound(first)}"),
            ("effective sample size", format_ess(last), f"untrained {format_ess(first)}"),
            ("wall time", f"{self.wall_seconds:.1f} s", f"training in all {last['seconds']:.1f} s"),
            ("checkpoint", str(self.checkpoint), ""),
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [self.system.name, ""]
        lines += [f"  {name:<{widths[0]}}   {value:<{widths[1]}}   {note}".rstrip() for name, value, note in rows]
        if self.states:
            lines += ["", "  temperature   number density   beta F / N, upper bound   effective sample size"]
            lines += [
                f"  {state['temperature']:>11.6g}   {state['number_density']:>14.6g}   {format_bound(state):>23}   "
                f"{format_ess(state):>21}"
                for state in self.states
            ]
        if self.warnings:
            lines += ["", "Warnings", *(f"  {warning}" for warning in self.warnings)]
        return "\n".join([*lines, "", _SENTENCES[self.ending]])


_SENTENCES: Mapping[Ending, str] = {
    "finished": "Finished: the learning rate has reached zero.",
    "plateau": "Finished: the bound has stopped falling.",
    "time_limit": "Out of time before the end of the schedule; --resume goes on.",
    "step_limit": "Stopped at the step asked for; --resume goes on.",
    "interrupted": "Interrupted; --resume goes on.",
}


# ------------------------------------------------------------------------------ the job


def train(
    system: System | str | Path | dict[str, Any],
    run_dir: str | Path,
    plan: Plan | None = None,
    progress: Report | None = None,
    *,
    resume: bool = False,
    given: Mapping[str, Any] | None = None,
    command: str = "",
    **changes: Any,
) -> TrainingResult:
    """Train a flow for a crystal, in a folder that holds the checkpoint and the record of evaluations.

    A run that is resumed goes on with its own settings and towards its own horizon; `max_minutes`
    and `max_steps` then only say where to pause.

    Args:
        system: A system, or what `freeflow.load` makes one from.
        run_dir: Where to keep the run; made if need be, empty unless resumed.
        plan: How; `plan.flow` says which architecture and how to train it. The system's own by default.
        progress: Called now and then with what is going on.
        resume: Go on with the run that the folder holds.
        given: When resuming, settings that the caller insists on, by the names of `TrainingPlan`, and
            `seed` and `architecture`: they must be the run's own, but for `max_minutes` and `max_steps`.
        command: What to note as the command that did it.
        **changes: Values of the plan to replace, such as
            `flow={"architecture": "residual", "training": {"max_steps": 500}}`.

    Raises:
        InputError: If the system, the folder, the plan or the checkpoint cannot be used, or if another run is at work
            in the folder.
        KeyboardInterrupt: If interrupted before there was a checkpoint.
    """
    begun = time.monotonic()
    system = system if isinstance(system, System) else config.load_crystal(system)
    system.require_fixed_cell("flows are for")
    plan = plan or system.plan
    plan = config.revise(plan, **changes) if changes else plan
    folder, report = Path(run_dir), progress or (lambda _: None)
    given = dict(given or {})
    if resume and not folder.is_dir():
        raise InputError(f"{folder / FILE_NAME}: no checkpoint there")
    if not resume:
        _make_folder(folder)
    with double_precision(), alone_in(folder):
        if resume:
            run, session, limits = _take_up(system, plan, folder, given, report, begun)
        else:
            run, session, limits = _set_out(system, plan, folder, report, begun)
        run = replace(run, command=command)
        return _carry_on(run, session, limits, report, begun)


@dataclass(frozen=True)
class _Run:
    """What does not change in a run."""

    system: System
    plan: Plan
    settings: TrainingPlan
    folder: Path
    flow: Flow
    gaussian: Gaussian | None
    compiled: Compiled
    base: training.Baseline
    fingerprint: Mapping[str, Any]
    family: tuple[_Members, ...] = ()
    command: str = ""


@dataclass(frozen=True)
class _Members:
    """A crystal at the temperatures that a conditional flow is trained in."""

    systems: tuple[System, ...]
    family: Family

    @property
    def baselines(self) -> list[training.Baseline]:
        """What leads from work to the free energy, in each state."""
        found = []
        for k, system in enumerate(self.systems):
            flow = starting_from(self.family.flow, jax.tree.map(lambda leaf, k=k: leaf[k], self.family.gaussians))
            found.append(training.baseline(flow, system.constants, system.n_atoms, system.state))
        return found


def _members(
    system: System, flow: Flow, gaussian: Callable[[System], Gaussian], stored: Callable[[int], Gaussian | None]
) -> tuple[_Members, ...]:
    """The states in which a flow for ranges is trained, evenly spaced in the logarithm; none for a single state.

    Args:
        system: A crystal in a state within the ranges.
        flow: For it.
        gaussian: Fits the reference of a state.
        stored: The references of one density, if they are kept already.
    """
    ranges = {name: flow.options.get(name) for name in RANGES.values()}
    if not any(ranges.values()):
        return ()
    temperatures, densities = ranges["temperatures"], ranges["number_densities"]
    own = system.n_atoms / system.crystal.volume
    found = []
    for number, density in enumerate(
        [own] if densities is None else np.geomspace(densities[0], densities[1], _DENSITIES)
    ):
        crystal = system
        if densities is not None:
            crystal = strained_system(system, math.log(own / density) / 3 * np.eye(3))
        at = (
            [system.temperature]
            if temperatures is None
            else np.geomspace(temperatures[0], temperatures[1], _TEMPERATURES)
        )
        systems = tuple(at_temperature(crystal, float(t)) for t in at)
        gaussians = stored(number)
        if gaussians is None:
            gaussians = jax.tree.map(lambda *leaves: np.stack(leaves), *(gaussian(one) for one in systems))
        first = jax.tree.map(lambda leaf: leaf[0], gaussians)
        its_flow = checkpoints.build_flow(systems[0], flow.architecture, flow.options, lambda g=first: g)
        states = jax.tree.map(lambda *leaves: np.stack(leaves), *(one.state for one in systems))
        found.append(_Members(systems, Family(its_flow, gaussians, states)))
    return tuple(found)


def _along(run: _Run, session: Session) -> tuple[Metrics, ...]:
    """What the flow is worth in every state that it was trained in."""
    found = []
    for members in run.family:
        works = training.works_of(members.family, session.state.average, run.plan.seed)
        for system, base, work in zip(members.systems, members.baselines, works, strict=True):
            density = system.n_atoms / system.crystal.volume
            found.append({"temperature": system.temperature, "number_density": density, **training.measure(work, base)})
    return tuple(found)


def _samples(system: System, plan: Plan, flow: Flow, settings: TrainingPlan, report: Report) -> training.Frames:
    """Frames to learn from, where the loss asks for them."""
    if settings.loss not in training.FROM_FRAMES:
        return None
    if plan.trajectory is None:
        raise InputError(f"estimate.flow.training.loss: {settings.loss} needs a trajectory to learn from")
    found = preparation.read_trajectory(system, plan.trajectory, report)
    if found.faults:
        raise InputError(f"{plan.trajectory.file}: cannot be learned from: {found.faults[0]}")
    return training.frames_of(flow, found.frames(len(found.series.kept))[0])


def _set_out(system: System, plan: Plan, folder: Path, report: Report, begun: float) -> tuple[_Run, Session, Limits]:
    """A new run, up to the horizon and the evaluation of the untrained flow."""
    wanted = plan.flow or FlowPlan(architecture=DEFAULT_ARCHITECTURE)
    if wanted.checkpoint is not None:
        raise InputError("estimate.flow: it names a checkpoint, which needs no training; give an architecture")
    _require_empty(folder)
    plan, settings = replace(plan, flow=wanted), wanted.training
    fits: list[Gaussian] = []

    def gaussian() -> Gaussian:
        fits.append(preparation.fit_gaussian(system, plan, report).gaussian)
        return fits[-1]

    flow = checkpoints.build_flow(system, wanted.architecture or DEFAULT_ARCHITECTURE, wanted.options, gaussian)
    members = _members(system, flow, lambda one: _fitted(one, plan, report), lambda _: None)
    run, trainer = _prepared(system, plan, settings, folder, flow, fits[-1] if fits else None, report, members)
    report(Progress("training", None, "evaluating the untrained flow"))
    budget = math.inf if settings.max_minutes is None else 60 * settings.max_minutes
    session = training.begin(trainer, run.compiled, settings, run.base, begun + budget)
    return run, session, Limits(deadline=begun + _OVERTIME * budget)


def _take_up(
    system: System, plan: Plan, folder: Path, given: Mapping[str, Any], report: Report, begun: float
) -> tuple[_Run, Session, Limits]:
    """A run as its checkpoint has it."""
    path = folder / FILE_NAME
    checkpoint = checkpoints.read(path)
    try:
        apart = checkpoints.difference(checkpoint.system, checkpoints.fingerprint(system), any_size=False)
        if apart is not None:  # a run keeps its own state, whatever range it trains for
            raise InputError(f"another system ({checkpoint.system['name']}): {apart}")
        if not checkpoint.training:
            raise InputError("holds parameters alone; it can be used, but not resumed")
        known = dict(checkpoint.training)
        settings = TrainingPlan(**known["settings"])
        learned_from = known.get("trajectory") and TrajectoryPlan(**known["trajectory"])
        plan = replace(plan, seed=known["seed"], trajectory=learned_from or plan.trajectory)
        own = {**asdict(settings), "seed": plan.seed, "architecture": checkpoint.architecture}
        own |= {name: checkpoint.options.get(name) for name in RANGES.values()}
        for key, value in given.items():
            if key not in {"max_steps", "max_minutes"} and value != own[key]:
                option = f"--{key.replace('_', '-')}"
                raise InputError(f"{option}: this run has {own[key]}, and a resumed run keeps it; got {value}")
        flow = checkpoints.rebuild(checkpoint, system, lambda: preparation.fit_gaussian(system, plan, report).gaussian)
        members = _members(
            system,
            flow,
            lambda one: _fitted(one, plan, report),
            lambda number: checkpoints.reference(checkpoint, f"{_FAMILY}{number}"),
        )
        gaussian = checkpoints.reference(checkpoint)
        run, trainer = _prepared(system, plan, settings, folder, flow, gaussian, report, members)
        state = checkpoints.restore(checkpoint.arrays, "state", jax.eval_shape(trainer.init))
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None
    session = Session(state, tuple(known["metrics"]), known["seconds"])
    minutes = given.get("max_minutes")
    return (
        run,
        session,
        Limits(
            deadline=math.inf if minutes is None else begun + 60 * minutes, max_step=given.get("max_steps") or math.inf
        ),
    )


def _prepared(
    system: System,
    plan: Plan,
    settings: TrainingPlan,
    folder: Path,
    flow: Flow,
    gaussian: Gaussian | None,
    report: Report,
    members: tuple[_Members, ...],
) -> tuple[_Run, training.Trainer]:
    report(Progress("training", None, "compiling"))
    families = [one.family for one in members]
    trainer = training.trainer(flow, system.state, settings, plan.seed, families=families)
    compiled = training.compile_trainer(trainer, _samples(system, plan, flow, settings, report))
    base = training.baseline(flow, system.constants, system.n_atoms, system.state)
    fingerprint = checkpoints.fingerprint(system)
    return _Run(system, plan, settings, folder, flow, gaussian, compiled, base, fingerprint, members), trainer


def _fitted(system: System, plan: Plan, report: Report) -> Gaussian:
    def labelled(progress: Progress) -> None:
        where = f"at temperature {system.temperature:.4g}, number density {system.n_atoms / system.crystal.volume:.4g}"
        report(progress._replace(text=f"{where}: {progress.text}"))

    return preparation.fit_gaussian(system, plan, labelled).gaussian


def _carry_on(run: _Run, session: Session, limits: Limits, report: Report, begun: float) -> TrainingResult:
    """Train, and keep the folder up to date."""
    saved = [-1, -math.inf]  # evaluations, and when

    def keep(session: Session) -> None:
        _save(run, session)
        saved[:] = len(session.metrics), time.monotonic()

    def watch(session: Session) -> None:
        if len(session.metrics) != saved[0] or time.monotonic() - saved[1] > _SAVE_SECONDS:
            keep(session)
        report(training_progress(session))

    keep(session)
    session, ending = training.run(session, run.compiled, run.settings, run.base, limits, watch)
    keep(session)
    state = session.state
    result = TrainingResult(
        system=run.system,
        checkpoint=run.folder / FILE_NAME,
        flow=run.flow,
        n_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        ending=ending,
        horizon=int(state.horizon),
        metrics=session.metrics,
        step=int(state.step),
        wall_seconds=time.monotonic() - begun,
        warnings=tuple(_warnings(session)),
        states=() if ending == "interrupted" else _along(run, session),  # who interrupts does not wait
    )
    if result.worse:
        worse = "the bound is higher than that of the untrained flow; lower the learning rate or train for longer"
        return replace(result, warnings=(worse, *result.warnings))
    return result


def _warnings(session: Session) -> list[str]:
    last = session.metrics[-1]
    warnings = []
    skipped = int(session.state.skipped)
    if skipped > _FEW_SKIPPED * max(int(session.state.step), 1):
        warnings.append(f"{skipped} steps were skipped: energy or gradient not finite; lower the learning rate")
    if last["lost_fraction"] > 0:
        warnings.append(
            f"in {last['lost_fraction']:.2%} of the samples an atom left its site; the bound does not count them"
        )
    return warnings


# ------------------------------------------------------------------------------ reference and folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{folder}: a file stands there; a run needs a folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be made: {getattr(error, 'strerror', None) or error}") from None


def _require_empty(folder: Path) -> None:
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if FILE_NAME in others:
        raise InputError(f"{folder}: holds a run already; --resume goes on with it, or give another folder")
    if others:
        raise InputError(f"{folder}: not empty; give a new folder")
    try:
        require_writable(folder / FILE_NAME)
    except FreeflowError as error:
        raise InputError(str(error)) from None


def _save(run: _Run, session: Session) -> None:
    """Checkpoint and record, each whole or as before. The checkpoint counts: a record is made from it."""
    state = jax.device_get(session.state)
    arrays = checkpoints.flatten("state", state)
    if run.gaussian is not None:
        arrays |= checkpoints.flatten("reference", run.gaussian)
    for number, members in enumerate(run.family):
        arrays |= checkpoints.flatten(f"{_FAMILY}{number}", members.family.gaussians)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = provenance(run.system, run.plan) | {
        "command": run.command,
        "date": now,
        "devices": jax.local_device_count(),
        "wall_seconds": session.seconds,
        "reached": session.metrics[-1],
    }
    checkpoints.save(
        run.folder / FILE_NAME,
        Checkpoint(
            architecture=run.flow.architecture,
            options=dict(run.flow.options),
            transferable=run.flow.transferable,
            system=run.fingerprint,
            arrays=arrays,
            provenance=made,
            training={
                "settings": asdict(run.settings),
                "seed": run.plan.seed,
                "trajectory": run.plan.trajectory and dict(vars(run.plan.trajectory)),
                "metrics": list(session.metrics),
                "seconds": session.seconds,
            },
        ),
    )
    write_atomically(run.folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in session.metrics))
    system_file = run.folder / SYSTEM_FILE
    if run.system.config and not system_file.exists():
        write_atomically(system_file, config.dump(run.system.config))
