"""What goes in: options in the place of what a file says, and where outputs will go."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from freeflow import config
from freeflow.cli.output import say
from freeflow.errors import FreeflowError, InputError

if TYPE_CHECKING:
    from freeflow.types import Plan, StateSeries, System, TrajectoryPlan

R = TypeVar("R")


def at_states(problem: Any, temperatures: tuple[float, ...] | None, pressure: str | None) -> Any:
    """The problem at these temperatures and pressures, if any are given.

    Raises:
        InputError: If it is a solution, or a pressure makes no sense.
    """
    if temperatures is None and pressure is None:
        return problem
    from freeflow.crystals import at_state
    from freeflow.types import StateSeries, System

    if not isinstance(problem, System | StateSeries):
        option = "temperature" if pressure is None else "pressure"
        raise InputError(f"--{option}: {problem.name} is a solution; its state stands in the file")
    if pressure is not None:
        problem = _under_pressure(problem, pressure)
    system = problem.system if isinstance(problem, StateSeries) else problem
    known = (
        (problem.temperatures, problem.pressures) if isinstance(problem, StateSeries) else ((system.temperature,), ())
    )
    t, p = temperatures or known[0], known[1]
    if len(t) == 1 and len(p) < 2:
        return at_state(system, t[0], p[0] if p else None)
    return config.series_of(system, t, p)


def _under_pressure(problem: System | StateSeries, pressure: str) -> System | StateSeries:
    """The problem under the pressures of an option; the file's own rules hold for them."""
    listed = [part.strip() for part in pressure.split(",")]
    unit = listed[-1].partition(" ")[2]
    numbers = [_number(part if " " in part or not unit else f"{part} {unit}") for part in listed]
    values = {key: value for key, value in problem.config.items() if key != "published"}
    try:
        return config.load({**values, "pressure": numbers if len(numbers) > 1 else numbers[0]})  # pyright: ignore[reportReturnType]
    except InputError as error:
        raise InputError(f"--{str(error).removeprefix('system: ')}") from None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def refuse(problem: Any, options: dict[str, Any], names: Sequence[str], what: str) -> None:
    """Options that mean nothing here are no options; they are taken out.

    Args:
        problem: Whose name is told.
        options: Values by name; changed.
        names: Of those that mean nothing.
        what: What the problem is, in words.

    Raises:
        InputError: If one was given.
    """
    for name in names:
        if options.pop(name, None) is not None:
            raise InputError(f"--{name.replace('_', '-')}: {problem.name} is {what}, which this is not for")


def changes_of(options: dict[str, Any]) -> dict[str, Any]:
    """The plan's values that options stand for, where they were given: stages are a bridge."""
    changes = {name: value for name, value in options.items() if value is not None}
    if "stages" in changes:
        stages = changes.pop("stages")
        changes["bridge"] = None if stages == "none" else stages
    return changes


def revised(system: System, options: dict[str, Any]) -> Plan:
    """The system's plan with options in the place of what the file says."""
    return checked(config.revise, system.plan, changes_of(options))


def with_flow(options: dict[str, Any]) -> dict[str, Any]:
    """The plan's values that options stand for: a checkpoint is a flow."""
    values = dict(options)
    checkpoint = values.pop("checkpoint", None)
    return values if checkpoint is None else {**values, "flow": {"checkpoint": checkpoint}}


def with_trajectory(options: dict[str, Any], given: TrajectoryPlan | None) -> dict[str, Any]:
    """The same for what options say about a trajectory, in the place of what the file says about it.

    Raises:
        InputError: If they say something about a trajectory that nobody names.
    """
    values = with_flow(options)
    said = {"file": values.pop("trajectory", None)}
    said |= {name: values.pop(name, None) for name in ("topology", "frames", "sigma")}
    said = {name: value for name, value in said.items() if value is not None}
    if not said:
        return values
    if given is None and "file" not in said:
        option = next(iter(said))
        raise InputError(f"--{option}: there is no trajectory; name one with --trajectory")
    known = {} if given is None or "file" in said else dict(vars(given))
    return {**values, "trajectory": {**known, **said}}


def training_plan(system: System, given: dict[str, Any], trajectory: dict[str, Any]) -> Plan:
    """The system's plan, with the options in the place of what it says about flow, seed and trajectory.

    Raises:
        InputError: If a value is impossible, or the file names a flow that needs no training.
    """
    changes = dict(given)
    seed = {"seed": changes.pop("seed")} if "seed" in changes else {}
    architecture = changes.pop("architecture", None)
    flow = system.plan.flow
    if flow is not None and flow.checkpoint is not None and architecture is None:
        raise InputError("estimate.flow: it names a checkpoint; say with --architecture what to train")
    values: dict[str, Any] = {"architecture": "residual"} if flow is None else flow.values()
    if architecture is not None and architecture != values.get("architecture"):
        values = {"architecture": architecture, "training": values.get("training", {})}
    ranges = {name: changes.pop(name) for name in ("temperatures", "number_densities") if name in changes}
    values = {**values, **ranges, "training": {**values.get("training", {}), **changes}}
    return checked(config.revise, system.plan, {"flow": values, **seed, **trajectory})


def ends(name: str, text: str) -> list[float]:
    """LOW:HIGH as two numbers; whether these make sense is checked with the rest.

    Raises:
        InputError: If it is something else.
    """
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise InputError(f"--{name.replace('_', '-')}: give LOW:HIGH, got {text!r}") from None
    return [low, high]


def checked(revise: Callable[..., R], plan: Any, changes: dict[str, Any]) -> R:
    """A revised plan; what is wrong with it is told by the name of the option.

    Raises:
        InputError: If a value is impossible.
    """
    try:
        return revise(plan, **changes)
    except InputError as error:
        key, _, message = str(error).partition(": ")
        raise InputError(f"--{key.rpartition('.')[2].replace('_', '-')}: {message}") from None


def require_places(*inputs: str, **outputs: str | None) -> None:
    """Find out before the work whether outputs, by the names of their options, can be written.

    Raises:
        InputError: If one cannot, or would replace an input.
    """
    from freeflow.documents import require_writable
    from freeflow.result import require_table_writable

    for name, path in outputs.items():
        if path is None or (name == "json" and path == "-"):
            continue
        try:
            if any(os.path.exists(file) and os.path.exists(path) and os.path.samefile(path, file) for file in inputs):
                raise InputError(f"{path}: this would replace a file that is read")
            (require_table_writable if name == "u_nk" else require_writable)(path)
        except FreeflowError as error:
            raise InputError(f"--{name.replace('_', '-')}: {error}") from None


def _processor() -> str:
    """A short name for this machine's kind of processor and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine() or 'unknown'}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def cache_folder(wanted: bool | None, quiet: bool) -> Path | None:
    """Where compiled kernels are kept; None for nowhere."""
    place = os.environ.get("FREEFLOW_CACHE", "")
    off = place.lower() in {"off", "no", "false", "0"}
    if wanted is False or (off and wanted is None):
        return None
    if place and not off:
        folder = Path(place).expanduser()
    else:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("freeflow", appauthor=False))
    # Machine code of one processor may not run on another that shares the home folder.
    folder /= _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "Permission denied")
    except OSError as error:
        if not quiet:
            say(f"freeflow: warning: compiled kernels are not kept: {folder}: {error.strerror}")
        return None
    return folder
