"""Subcommands: arguments in, text or JSON out, exit status.

Every bad input is one line on stderr and exit status 2. Heavy modules are imported inside the
commands that need them, so that help and lists appear at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json as json_module
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from freeflow import config
from freeflow.errors import FreeflowError, InputError

if TYPE_CHECKING:
    from freeflow.preparation import Progress
    from freeflow.result import Result
    from freeflow.training_run import TrainingResult
    from freeflow.types import Plan, System

LINE_EVERY_SECONDS = 10.0
BROKEN_PIPE = 141  # what the shell reports for a process that SIGPIPE ended
INTERRUPTED = 130


class _Stages(click.ParamType):
    name = "auto|none|INT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str | None:
        """The number of stages, "auto", or None for no bridge."""
        if value in {"auto", "none"}:
            return value
        if isinstance(value, str) and value.isascii() and value.isdecimal():
            return int(value[:20])
        self.fail(f"{value!r} is not auto, none or a whole number.", param, ctx)


class _Group(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when there is no such one."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"no such command {args[0]!r}; {config.suggest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Group,
    invoke_without_command=True,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  freeflow systems
  freeflow estimate mw_cubic_64
  freeflow train mw_cubic_64 -o runs/mw --max-minutes 5
  freeflow validate my_crystal.yaml

Exit status: 0 the target error was reached; 2 bad input; 3 finished, but not reliable or the target
error was not reached; 130 interrupted.""",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    help="Print the version.",
    callback=lambda ctx, _, value: _print_version(ctx) if value else None,
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Absolute free energies of crystals, with error bars."""
    if context.invoked_subcommand is None:
        context.fail(f"no command given; use one of {', '.join(cli.list_commands(context))}")


@cli.command(
    epilog="""\b
Examples:
  freeflow estimate mw_cubic_64
  freeflow estimate lj_fcc_256 --target-error 1e-4 --seed 7
  freeflow estimate my_crystal.yaml --json out.json --quiet
  freeflow estimate mw_hexagonal_64 --reference harmonic --stages 200 --estimator bar""",
)
@click.argument("system")
@click.option("--target-error", type=float, help="Stop at this standard error [kT per atom].")
@click.option("--max-samples", type=int, help="Stop after this many samples in any case.")
@click.option("--seed", type=int, help="Seed of the random numbers.")
@click.option(
    "--reference", type=click.Choice(["einstein", "harmonic", "self_consistent"]), help="Where samples start."
)
@click.option("--stages", type=_Stages(), help="Stages of the bridge; none for no bridge.")
@click.option("--estimator", type=click.Choice(["fep", "bar"]), help="From forward work, or from forward and reverse.")
@click.option("--precision", type=click.Choice(["float32", "float64"]), help="Of the energy kernels.")
@click.option("--checkpoint", metavar="FILE", help="A trained flow: a file, the folder of a run, or shipped.")
@click.option("--json", "json_path", metavar="OUT", help="Write the result as JSON; - for stdout, without the table.")
@click.option("--quiet", is_flag=True, help="Print one line: the value and the verdict.")
@click.option("--cache/--no-cache", default=None, help="Keep compiled kernels between runs (the default).")
def estimate(
    system: str, checkpoint: str | None, json_path: str | None, quiet: bool, cache: bool | None, **options: Any
) -> int:
    """Estimate the free energy of SYSTEM: a system.yaml, or the name of a shipped system.

    Samples are drawn until the standard error reaches its target. The options replace what the file
    says under `estimate`. Compiled kernels are kept in the user's cache folder; FREEFLOW_CACHE=DIR moves
    them, FREEFLOW_CACHE=off keeps none.
    """
    if json_path is not None and json_path != "-":
        _require_writable(json_path, system)
    problem = config.load(system)
    if checkpoint is not None:
        options["flow"] = {"checkpoint": checkpoint}
    plan = _revise(problem, options)

    from freeflow import pipeline, preparation

    preparation.enable_compilation_cache(_cache_folder(cache, quiet))
    with _progress(quiet) as report:
        result = pipeline.estimate(problem, plan, report)
    _print_result(result, json_path, quiet)
    return result.exit_status


@cli.command(
    epilog="""\b
Examples:
  freeflow train mw_cubic_64 -o runs/mw --max-minutes 5
  freeflow train mw_cubic_64 -o runs/mw --resume
  freeflow train my_crystal.yaml -o runs/mine --architecture atomic_solids --max-steps 5000
  freeflow estimate mw_cubic_64 --checkpoint runs/mw

Exit status: 0 trained, or paused at a limit; 2 bad input; 3 trained, but for the worse; 130 interrupted, with
a checkpoint that --resume goes on from.""",
)
@click.argument("system")
@click.option("-o", "--output", "run_dir", metavar="RUN_DIR", required=True, help="Folder for checkpoint and metrics.")
@click.option("--resume", is_flag=True, help="Go on with the run in RUN_DIR, with its own settings.")
@click.option("--max-minutes", type=float, help="Train for this long; the schedule is made to fit.")
@click.option("--max-steps", type=int, help="Train for this many steps (2000 if no limit is given).")
@click.option("--architecture", type=click.Choice(["residual", "atomic_solids"]), help="Kind of flow.")
@click.option("--batch-size", type=int, help="Samples per step.")
@click.option("--learning-rate", type=float, help="At its highest.")
@click.option("--seed", type=int, help="Seed of the random numbers.")
@click.option("--json", "json_path", metavar="OUT", help="Write the outcome as JSON; - for stdout, without the table.")
@click.option("--quiet", is_flag=True, help="Print one line: the bound on the free energy and how training ended.")
@click.option("--cache/--no-cache", default=None, help="Keep compiled kernels between runs (the default).")
def train(
    system: str,
    run_dir: str,
    resume: bool,
    json_path: str | None,
    quiet: bool,
    cache: bool | None,
    **options: Any,
) -> int:
    """Train a flow for SYSTEM: a system.yaml, or the name of a shipped system.

    Needs the potential alone, no data. Every evaluation of the flow is a line of RUN_DIR/metrics.jsonl:
    an upper bound of beta F per atom, and the effective sample size. RUN_DIR/checkpoint.safetensors is kept
    up to date, so that a run that was cut off can go on with --resume; then --max-minutes and
    --max-steps only say where to pause.
    """
    if json_path is not None and json_path != "-":
        _require_writable(json_path, system)
    problem = config.load(system)
    given = {name: value for name, value in options.items() if value is not None}
    plan = _training_plan(problem, given)

    from freeflow import preparation, training_run

    preparation.enable_compilation_cache(_cache_folder(cache, quiet))
    try:
        with _progress(quiet) as report:
            result = training_run.train(
                problem, run_dir, plan, report, resume=resume, given=given, command=_command_line()
            )
    except KeyboardInterrupt:
        _say("freeflow: interrupted before training began")
        return INTERRUPTED
    _print_result(result, json_path, quiet)
    return result.exit_status


@cli.command(epilog="\b\nExamples:\n  freeflow systems\n  freeflow systems --json")
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
def systems(as_json: bool) -> int:
    """List the systems that ship with freeflow, with published values of beta F / N."""
    from freeflow.result import format_with_error

    shipped = config.shipped()
    if as_json:
        _print(json_module.dumps([system._asdict() for system in shipped], indent=2))
        return 0
    rows = [("SYSTEM", "PUBLISHED [kT]", "DESCRIPTION")]
    for system in shipped:
        value = system.beta_f_per_atom
        error = float("nan") if system.std_error is None else system.std_error
        rows.append((system.name, "-" if value is None else format_with_error(value, error), system.description))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    _print("\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {text}" for name, value, text in rows))
    return 0


@cli.command(
    epilog="""\b
Examples:
  freeflow validate my_crystal.yaml
  freeflow validate mw_cubic_64 > everything_spelled_out.yaml""",
)
@click.argument("system")
def validate(system: str) -> int:
    """Check SYSTEM, print it with every default filled in, and run nothing.

    What is printed is a system.yaml again; what follows from it stands in comments on top.
    """
    problem = config.load(system)
    facts = "".join(f"# {name}: {value}\n" for name, value in _facts(problem))
    _print(facts + config.dump(problem.config).rstrip())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    # Loading cached code, XLA warns at length about processor features that are no features
    # ("prefer-no-gather"). What really goes wrong is raised, and shown.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with cli.make_context("freeflow", list(sys.argv[1:] if arguments is None else arguments)) as context:
            status = cli.invoke(context)
        _flush()
        return int(status or 0)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.NoSuchOption as error:
        return _complain(_no_such_option(error), 2)
    except click.ClickException as error:
        return _complain(error.format_message(), 2)
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except FreeflowError as error:
        return _complain(str(error), error.exit_status)
    except (KeyboardInterrupt, click.Abort):
        _say("freeflow: interrupted before any sample was complete")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("FREEFLOW_DEBUG") == "1":
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _complain(f"internal error, please report it (FREEFLOW_DEBUG=1 shows where): {what}", 1)


# --------------------------------------------------------------------------- what goes in


def _revise(system: System, options: dict[str, Any]) -> Plan:
    changes = {name: value for name, value in options.items() if value is not None}
    if "stages" in changes:
        stages = changes.pop("stages")
        changes["bridge"] = None if stages == "none" else stages
    return _checked(system.plan, changes)


def _training_plan(system: System, given: dict[str, Any]) -> Plan:
    """The system's plan, with the options in the place of what it says about flow and seed."""
    changes = dict(given)
    seed = {"seed": changes.pop("seed")} if "seed" in changes else {}
    architecture = changes.pop("architecture", None)
    flow = system.plan.flow
    if flow is not None and flow.checkpoint is not None and architecture is None:
        raise InputError("estimate.flow: it names a checkpoint; say with --architecture what to train")
    values: dict[str, Any] = {"architecture": "residual"} if flow is None else flow.values()
    if architecture is not None and architecture != values.get("architecture"):
        values = {"architecture": architecture, "training": values.get("training", {})}
    values["training"] = {**values.get("training", {}), **changes}
    return _checked(system.plan, {"flow": values, **seed})


def _checked(plan: Plan, changes: dict[str, Any]) -> Plan:
    try:
        return config.revise(plan, **changes)
    except InputError as error:
        key, _, message = str(error).partition(": ")
        raise InputError(f"--{key.rpartition('.')[2].replace('_', '-')}: {message}") from None


def _command_line() -> str:
    return shlex.join(["freeflow", *sys.argv[1:]])


def _no_such_option(error: click.NoSuchOption) -> str:
    command = error.ctx.command_path if error.ctx else "freeflow"
    known = [name for param in error.ctx.command.params for name in param.opts] if error.ctx else []
    near = config.nearest(error.option_name, [name for name in known if name.startswith("--")])
    return f"no such option {error.option_name}; " + (f"did you mean {near}?" if near else f"see '{command} --help'")


def _require_writable(path: str, system: str) -> None:
    from freeflow.result import require_writable

    try:
        if os.path.exists(path) and os.path.exists(system) and os.path.samefile(path, system):
            raise InputError(f"{path}: this would replace the system file")
        require_writable(path)
    except FreeflowError as error:
        raise InputError(f"--json: {error}") from None


def _processor() -> str:
    """A short name for this machine's kind of processor and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine() or 'unknown'}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def _cache_folder(wanted: bool | None, quiet: bool) -> Path | None:
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
            _say(f"freeflow: warning: compiled kernels are not kept: {folder}: {error.strerror}")
        return None
    return folder


# --------------------------------------------------------------------------- what comes out


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A function to report progress to: a bar on a terminal, otherwise a line now and then."""
    if quiet or sys.stderr is None:
        yield None
        return
    if not sys.stderr.isatty():
        last = -LINE_EVERY_SECONDS

        def line(progress: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_EVERY_SECONDS:
                last = time.monotonic()
                _say(f"freeflow: {progress.phase}: {_done(progress)}{progress.text}")

        yield line
        return

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, text="")

        def show(progress: Any) -> None:
            total = None if progress.fraction is None else 1.0
            bar.update(
                task,
                description=escape(progress.phase),
                total=total,
                completed=progress.fraction or 0.0,
                text=escape(progress.text),
            )

        yield show


def _done(progress: Any) -> str:
    return "" if progress.fraction is None else f"{100 * progress.fraction:.0f} %, "


def _print_result(result: Result | TrainingResult, json_path: str | None, quiet: bool) -> None:
    if json_path == "-":
        _print(result.json_text().rstrip("\n"))
        return
    if quiet:
        _print(result.summary)
    elif sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console

        result.render(Console())
    else:
        _print(str(result))
    if json_path is not None:
        _flush()
        result.to_json(json_path)


def _facts(system: System) -> Iterator[tuple[str, Any]]:
    units, n = system.units, system.n_atoms
    crystal = system.crystal
    yield "atoms", n
    if crystal.description:
        yield "crystal", crystal.description
    yield (
        f"cell [{units.length}]",
        ", ".join("[" + ", ".join(f"{x:.6g}" for x in row) + "]" for row in crystal.cell.tolist()),
    )
    yield f"number density [1/{units.length}^3]", f"{n / crystal.volume:.8g}"
    yield f"cutoff [{units.length}]", f"{system.potential.cutoff:.8g}"
    yield f"kT [{units.energy}]", f"{system.kt:.10g}"
    if "lattice energy" in system.constants:
        yield f"lattice energy [{units.energy} per atom]", f"{system.constants['lattice energy'] * system.kt / n:.8g}"


def _print_version(context: click.Context) -> None:
    from importlib import metadata

    try:
        version = metadata.version("freeflow")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    _print(f"freeflow {version}")
    context.exit()


def _print(text: str) -> None:
    """To stdout; a full disk is an error like any other."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise FreeflowError(f"cannot write the output: {error.strerror}") from None


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise FreeflowError(f"cannot write the output: {error.strerror}") from None


def _drop_output() -> None:
    """Let the interpreter's last flush go nowhere, instead of failing again on its way out."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, status: int) -> int:
    _say("freeflow: error: " + " ".join(message.split()))
    return status


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(line, err=True)
