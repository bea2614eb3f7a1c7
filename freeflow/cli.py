"""Subcommands: arguments in, text or JSON out, exit status.

Every bad input is one line on stderr and exit status 2. Heavy modules are imported inside the
commands that need them, so that help and lists appear at once.
"""

from __future__ import annotations

import contextlib
import functools
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
from typing import TYPE_CHECKING, Any, TypeVar

import click

from freeflow import config
from freeflow.compiler import prefer_fast_code
from freeflow.errors import FreeflowError, InputError

if TYPE_CHECKING:
    from freeflow.comparison import Comparison
    from freeflow.difference import DifferenceResult
    from freeflow.preparation import Progress
    from freeflow.result import Result
    from freeflow.sampling import Sampling
    from freeflow.solutions import Solution
    from freeflow.training_run import TrainingResult
    from freeflow.types import Plan, StateSeries, System, TrajectoryPlan

R = TypeVar("R")
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
  freeflow sample mw_cubic_64 -n 1000 -o ice.xtc
  freeflow compare mw_cubic_64 md.lammpstrj
  freeflow compare-phases mw_cubic_64 mw_hexagonal_64 --temperature 100:270:10
  freeflow run many_systems/ -o results
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


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, listed in this order."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


_STOPPING = _together(
    click.option("--target-error", type=float, help="Stop at this standard error [kT per atom]."),
    click.option("--max-samples", type=int, help="Stop after this many samples in any case."),
)
_ROAD = _together(
    click.option("--seed", type=int, help="Seed of the random numbers."),
    click.option(
        "--reference", type=click.Choice(["einstein", "harmonic", "self_consistent"]), help="Where samples start."
    ),
    click.option("--stages", type=_Stages(), help="Stages of the bridge; none for no bridge."),
    click.option("--precision", type=click.Choice(["float32", "float64"]), help="Of the energy kernels."),
    click.option("--checkpoint", metavar="FILE", help="A trained flow: a file, the folder of a run, or shipped."),
)
_FRAMES = _together(
    click.option("--topology", metavar="FILE", help="Checked against the system; no format needs one."),
    click.option("--frames", metavar="START:STOP:STRIDE", help="Frames to use, as in Python."),
    click.option(
        "--sigma", type=click.Choice(["angstrom", "nm"]), help="What one sigma is stored as, if no cell tells."
    ),
)


class _Temperatures(click.ParamType):
    name = "T|T,T,...|START:STOP:STEP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """One temperature or several, above zero."""
        if isinstance(value, tuple):
            return value
        try:
            found = config.temperature_range(value)
            numbers = found if isinstance(found, tuple) else tuple(float(part) for part in value.split(","))
        except ValueError:  # of either
            numbers = ()
        if not numbers or not all(0 < t < float("inf") for t in numbers):
            self.fail(f"{value!r} is no temperature, list or START:STOP:STEP; an example is 100:300:25.", param, ctx)
        return numbers


_STATES = _together(
    click.option("--temperature", type=_Temperatures(), help="Instead of the file's; several are a series."),
    click.option(
        "--pressure",
        metavar="P|P,P,...|START:STOP:STEP",
        help="The same, in the file's unit or with one: '1 kbar', '0:20:2 GPa'; a fixed cell then moves.",
    ),
)
_TABLE = _together(
    click.option("--csv", metavar="OUT", help="Write the table of a series as CSV."),
    click.option("--plot", metavar="OUT", help="Draw it: .png, .pdf or .svg."),
)
_NOT_OF_SERIES = (
    "methods",
    "max_minutes",
    "report",
    "u_nk",
    "trajectory",
    "topology",
    "frames",
    "sigma",
    "estimator",
    "distributed",
)
_OUTPUT = _together(
    click.option("--json", "json_path", metavar="OUT", help="Write the result as JSON; - for stdout, without tables."),
    click.option("--quiet", is_flag=True, help="Print one line: the outcome and the verdict."),
    click.option("--cache/--no-cache", default=None, help="Keep compiled kernels between runs (the default)."),
)
_REPORT = click.option("--report", metavar="OUT", help="Write an HTML page with plots, and their numbers as CSV.")


@cli.command(
    epilog="""\b
Examples:
  freeflow estimate mw_cubic_64
  freeflow estimate lj_fcc_256 --target-error 1e-4 --seed 7
  freeflow estimate my_crystal.yaml --json out.json --report out.html
  freeflow estimate mw_hexagonal_64 --reference harmonic --stages 200 --estimator bar
  freeflow estimate mw_cubic_64 --trajectory md.lammpstrj --frames 100: --stages none
  freeflow estimate solvation_wca --methods bar,radial,bridge --target-error 0.1
  freeflow estimate mw_cubic_64 --temperature 100:270:10 --csv ice.csv --plot ice.png""",
)
@click.argument("system")
@_STOPPING
@_STATES
@_ROAD
@click.option("--estimator", type=click.Choice(["fep", "bar"]), help="From forward work, or from forward and reverse.")
@click.option("--trajectory", metavar="FILE", help="MD frames as samples of the target, for bar.")
@_FRAMES
@_REPORT
@click.option("--u-nk", metavar="OUT", help="Write the work for alchemlyb and pymbar: .csv or .parquet.")
@click.option(
    "--methods", metavar="LIST", help="Of a solution: fep, bar, radial, lfep, lbar, bridge, escort, mbar; by commas."
)
@click.option("--map", type=click.Choice(["field", "radial", "torus"]), help="Of a solution: what lfep and lbar learn.")
@click.option("--max-minutes", type=float, help="Of a solution: stop after this long in any case.")
@click.option(
    "--distributed",
    metavar="WHERE",
    envvar="FREEFLOW_DISTRIBUTED",
    help="One of several processes: auto under a launcher, or HOST:PORT,N,I.",
)
@_TABLE
@_OUTPUT
def estimate(
    system: str,
    report: str | None,
    u_nk: str | None,
    distributed: str | None,
    temperature: tuple[float, ...] | None,
    pressure: str | None,
    csv: str | None,
    plot: str | None,
    json_path: str | None,
    quiet: bool,
    cache: bool | None,
    **options: Any,
) -> int:
    """Estimate the free energy of SYSTEM: a system.yaml, or the name of a shipped system.

    That is the absolute free energy of a crystal, or the difference of two states of a solution. Samples are drawn
    until the standard error reaches its target [kT per atom of a crystal, kT of a solution]. The options replace
    what the file says under `estimate`. Compiled kernels are kept in the user's cache folder; FREEFLOW_CACHE=DIR
    moves them, FREEFLOW_CACHE=off keeps none.

    Samples of a crystal are drawn on all cores, or on all GPUs, of this machine. With --distributed, or
    FREEFLOW_DISTRIBUTED, processes on several machines share them: the same command on each, with the address of
    the first process, how many there are and which one it is. The result does not depend on how many there are; the
    first one prints and writes it.

    At several temperatures or pressures (lists or START:STOP:STEP) the result is a table of free energy, energy or
    enthalpy, entropy, heat capacity and volume, each at the target error.
    """
    _require_places(system, json=json_path, report=report, u_nk=u_nk, csv=csv, plot=plot)
    speaks = distributed is None or _joined(distributed)
    problem = _at(config.load(system), temperature, pressure)
    from freeflow.solutions import Solution
    from freeflow.types import StateSeries

    if isinstance(problem, StateSeries):
        said = {**options, "report": report, "u_nk": u_nk, "distributed": distributed}
        _refuse(problem, said, _NOT_OF_SERIES, "a series of states")
        kept = {name: value for name, value in options.items() if name not in _NOT_OF_SERIES}
        return _estimate_series(problem, kept, csv, plot, json_path, quiet, cache)
    for name, value in (("csv", csv), ("plot", plot)):
        if value is not None:
            raise InputError(f"--{name}: {problem.name} is no series of states; see --json and --report")
    if isinstance(problem, Solution):
        _refuse(problem, {"distributed": distributed}, ("distributed",), "a solution")
        return _estimate_difference(problem, {**options, "report": report, "u_nk": u_nk}, json_path, quiet, cache)
    _refuse(problem, options, ("methods", "map", "max_minutes"), "a crystal")
    plan = _revise(problem, _with_trajectory(options, problem.plan.trajectory))

    from freeflow import pipeline, preparation

    preparation.enable_compilation_cache(_cache_folder(cache, quiet))
    with _progress(quiet or not speaks) as tell:
        result = pipeline.estimate(problem, plan, tell, radial_distribution=report is not None)
    if not speaks:
        return result.exit_status
    if u_nk is not None:
        result.write_u_nk(u_nk)
    if report is not None:
        from freeflow.report import write_estimate_report

        write_estimate_report(result, report)
    _print_result(result, json_path, quiet)
    return result.exit_status


@cli.command(
    name="compare-phases",
    epilog="""\b
Examples:
  freeflow compare-phases mw_cubic_64 mw_hexagonal_64
  freeflow compare-phases a.yaml b.yaml --temperature 100:300:25 --plot phases.png
  freeflow compare-phases a.yaml b.yaml --temperature 300 --pressure '10:20:1 GPa'

Exit status: 0 both phases reached the target error; 2 bad input; 3 not reliable, or short of it; 130 interrupted.""",
)
@click.argument("phase_a", metavar="A")
@click.argument("phase_b", metavar="B")
@_STATES
@_STOPPING
@_ROAD
@_TABLE
@_OUTPUT
def compare_phases(
    phase_a: str,
    phase_b: str,
    temperature: tuple[float, ...] | None,
    pressure: str | None,
    csv: str | None,
    plot: str | None,
    json_path: str | None,
    quiet: bool,
    cache: bool | None,
    **options: Any,
) -> int:
    """Compare the free energies of two crystals of one substance, A and B: which is stable, and up to where.

    In every state the difference per atom with its error, and the temperature, or of several pressures the pressure,
    where the two are equal, if there is one. Both are systems as `freeflow estimate` takes them, with the same
    potential and units.
    """
    _require_places(phase_a, phase_b, json=json_path, csv=csv, plot=plot)
    a, b = (_at(config.load(phase), temperature, pressure) for phase in (phase_a, phase_b))
    changes = {name: value for name, value in _with_flow(options).items() if value is not None}
    if "stages" in changes:
        stages = changes.pop("stages")
        changes["bridge"] = None if stages == "none" else stages

    from freeflow import phases, preparation

    preparation.enable_compilation_cache(_cache_folder(cache, quiet))
    with _progress(quiet) as tell:
        result = phases.compare_phases(a, b, None, tell, **changes)
    return _print_table(result, csv, plot, json_path, quiet)


@cli.command(
    epilog="""\b
Examples:
  freeflow sample mw_cubic_64 -n 1000 -o ice.xtc
  freeflow sample lj_fcc_256 -n 500 -o lj.extxyz.gz --seed 7
  freeflow sample mw_cubic_64 -n 2000 -o ice.dcd --method weighted --checkpoint shipped

Exit status: 0 sampled; 2 bad input; 3 sampled, but not to be relied on; 130 interrupted, with what there was
written.""",
)
@click.argument("system")
@click.option("-n", "--number", type=int, required=True, help="How many samples.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    help=".xtc, .dcd, .trr, .h5, .pdb, .lammpstrj, .traj, .extxyz or .xyz (these two also with .gz).",
)
@click.option(
    "--method",
    type=click.Choice(["mcmc", "weighted", "resampled"]),
    default="mcmc",
    show_default=True,
    help="Monte Carlo; samples of the model with weights; or these drawn by their weights.",
)
@_ROAD
@_OUTPUT
def sample(
    system: str,
    number: int,
    output: str,
    method: Any,
    json_path: str | None,
    quiet: bool,
    cache: bool | None,
    **options: Any,
) -> int:
    """Draw configurations of SYSTEM at its temperature and volume, or pressure, and write them as a trajectory.

    Needs no other program. Monte Carlo (generalised hybrid, many chains) starts from the reference; equilibration
    and correlation are found out and reported. Energies, and weights where samples have them, go beside the
    trajectory as FILE.csv; formats without atoms' names get a FILE.topology.pdb.
    """
    _require_places(system, json=json_path)
    problem = config.crystal_only(config.load(system))
    plan = _revise(problem, {**_with_flow(options), "trajectory": None})

    from freeflow import preparation, sampling

    preparation.enable_compilation_cache(_cache_folder(cache, quiet))
    with _progress(quiet) as tell:
        result = sampling.sample(problem, number, output, plan, tell, method=method)
    _print_result(result, json_path, quiet)
    return result.exit_status


@cli.command(
    epilog="""\b
Examples:
  freeflow compare mw_cubic_64 md.lammpstrj
  freeflow compare my_crystal.yaml md.xtc --frames 1000::10 --report check.html
  freeflow compare lj_fcc_256 md.dcd --target-error 3e-4 --json -

Exit status: 0 they agree; 2 bad input; 3 they disagree, or it could not be told; 130 interrupted.""",
)
@click.argument("system")
@click.argument("trajectory")
@_FRAMES
@_STOPPING
@_ROAD
@_REPORT
@_OUTPUT
def compare(
    system: str,
    trajectory: str,
    report: str | None,
    json_path: str | None,
    quiet: bool,
    cache: bool | None,
    **options: Any,
) -> int:
    """Compare a molecular dynamics TRAJECTORY with weighted samples of SYSTEM, and say whether they agree.

    Energies, displacements, g(r) and the free energy from both sides, each with error bars that allow for
    correlation, and one verdict. TRAJECTORY is a LAMMPS text dump, extxyz, PDB (all also gzipped), ASE .traj, XTC,
    DCD, TRR or HDF5 file; frames may be wrapped, drifted or in another order of the atoms.
    """
    _require_places(system, trajectory, json=json_path, report=report)
    problem = config.crystal_only(config.load(system))
    plan = _revise(problem, _with_trajectory({**options, "trajectory": trajectory}, None))
    assert plan.trajectory is not None

    from freeflow import comparison, preparation

    preparation.enable_compilation_cache(_cache_folder(cache, quiet))
    with _progress(quiet) as tell:
        result = comparison.compare(problem, plan.trajectory, plan, tell)
    if report is not None:
        from freeflow.report import write_comparison_report

        write_comparison_report(result, report)
    _print_result(result, json_path, quiet)
    return result.exit_status


@cli.command(
    epilog="""\b
Examples:
  freeflow train mw_cubic_64 -o runs/mw --max-minutes 5
  freeflow train mw_cubic_64 -o runs/mw --resume
  freeflow train my_crystal.yaml -o runs/mine --architecture atomic_solids --max-steps 5000
  freeflow estimate mw_cubic_64 --checkpoint runs/mw
  freeflow train mw_cubic_64 -o runs/warm --temperatures 180:270 --max-minutes 10
  freeflow estimate mw_cubic_64 --checkpoint runs/warm --temperature 250

Exit status: 0 trained, or paused at a limit; 2 bad input; 3 trained, but for the worse; 130 interrupted, with
a checkpoint that --resume goes on from.""",
)
@click.argument("system")
@click.option("-o", "--output", "run_dir", metavar="RUN_DIR", required=True, help="Folder for checkpoint and metrics.")
@click.option("--resume", is_flag=True, help="Go on with the run in RUN_DIR, with its own settings.")
@click.option("--max-minutes", type=float, help="Train for this long; the schedule is made to fit.")
@click.option("--max-steps", type=int, help="Train for this many steps (2000 if no limit is given).")
@click.option("--architecture", type=click.Choice(["residual", "atomic_solids"]), help="Kind of flow.")
@click.option(
    "--loss",
    type=click.Choice(["path_gradient", "reverse_kl", "forward_kl", "lbar"]),
    help="What is made small; the last two learn from a trajectory.",
)
@click.option("--trajectory", metavar="FILE", help="MD frames to learn from; keep others back to estimate with.")
@_FRAMES
@click.option("--batch-size", type=int, help="Samples per step.")
@click.option("--learning-rate", type=float, help="At its highest.")
@click.option("--temperatures", metavar="LOW:HIGH", help="One flow for all temperatures in between.")
@click.option("--number-densities", metavar="LOW:HIGH", help="One flow for all densities in between [1/length**3].")
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

    Needs the potential alone, no data, unless the loss asks for a trajectory. Every evaluation of the flow is a
    line of RUN_DIR/metrics.jsonl: an upper bound of beta F per atom, and the effective sample size.
    RUN_DIR/checkpoint.safetensors is kept up to date, so that a run that was cut off can go on with --resume; then
    --max-minutes and --max-steps only say where to pause.
    """
    _require_places(system, json=json_path)
    problem = config.crystal_only(config.load(system))
    trajectory = {name: options.pop(name) for name in ("trajectory", "topology", "frames", "sigma")}
    given = {name: value for name, value in options.items() if value is not None}
    given |= {name: _ends(name, given[name]) for name in ("temperatures", "number_densities") if name in given}
    plan = _training_plan(problem, given, _with_trajectory(trajectory, problem.plan.trajectory))

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


@cli.command(
    epilog="""\b
Examples:
  freeflow run a.yaml b.yaml mw_cubic_64 -o results
  freeflow run folder_of_systems -o results --workers 2 --target-error 1e-3
  freeflow run list.txt -o results --dask tcp://scheduler:8786

Exit status: 0 all reached their target error; 2 bad input; 3 some did not, or failed; 130 interrupted. Begun again
with the same -o, it goes on with what is missing.""",
)
@click.argument("systems", nargs=-1, required=True)
@click.option("-o", "--output", metavar="DIR", required=True, help="Folder for results.jsonl and a file for each run.")
@click.option("--workers", type=click.IntRange(1, 1000), default=1, show_default=True, help="Runs side by side, here.")
@click.option("--dask", metavar="ADDRESS", help="Of the scheduler of a Dask cluster that runs them instead.")
@click.option(
    "--retries", type=click.IntRange(0, 100), default=1, show_default=True, help="Of a run whose process died."
)
@_STOPPING
@click.option("--seed", type=int, help="Seed of the random numbers.")
@click.option("--quiet", is_flag=True, help="No progress.")
def run(
    systems: tuple[str, ...], output: str, workers: int, dask: str | None, retries: int, quiet: bool, **options: Any
) -> int:
    """Estimate many SYSTEMS: files, names of shipped systems, folders of .yaml files, or .txt lists of these.

    Each runs in a process of its own, so that one that fails leaves the others alone; one whose process dies is tried
    again. Every result is a line of DIR/results.jsonl as soon as it is there, and a JSON file of its own.
    """
    from freeflow import many_runs

    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    jobs, broken = many_runs.gather(systems, given)
    folder = Path(output)
    tell = (lambda _: None) if quiet else _Lines(len(jobs))
    try:
        outcomes = many_runs.run_all(jobs, folder, workers=workers, dask=dask, retries=retries, report=tell)
    except KeyboardInterrupt:
        _say(f"freeflow: interrupted; what was complete is in {folder}")
        return INTERRUPTED
    outcomes += broken
    for outcome in broken:
        many_runs.keep(folder, outcome)
    width = max(len(outcome.name) for outcome in outcomes)
    _print("\n".join(f"{o.name:<{width}}  {o.status:<18}  {o.message}" for o in outcomes))
    if not jobs:
        return 2
    return 0 if all(outcome.status == "converged" for outcome in outcomes) else 3


class _Lines:
    """Progress of many runs: what has ended at once, how the others stand now and then."""

    def __init__(self, n_runs: int):
        self._n_runs, self._n_ended = n_runs, 0
        self._last: dict[str, float] = {}

    def __call__(self, told: Any) -> None:
        if told.outcome is not None:
            self._n_ended += 1
            state = "done before" if told.recalled else told.outcome.status
            _say(f"freeflow: {self._n_ended} of {self._n_runs}: {told.name}: {state}, {told.text}")
        elif time.monotonic() - self._last.get(told.name, -LINE_EVERY_SECONDS) >= LINE_EVERY_SECONDS:
            self._last[told.name] = time.monotonic()
            _say(f"freeflow: {told.name}: {told.text}")


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
        value = system.beta_f_per_atom if system.delta_f is None else system.delta_f
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
    prefer_fast_code()
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


def _joined(where: str) -> bool:
    """Whether this process is the first of its team, which speaks for all."""
    from freeflow import team

    team.join(where)
    return team.is_first()


def _estimate_difference(
    problem: Solution, options: dict[str, Any], json_path: str | None, quiet: bool, cache: bool | None
) -> int:
    """`freeflow estimate` of a solution."""
    known = ("methods", "map", "target_error", "max_samples", "max_minutes", "seed")
    _refuse(problem, options, [name for name in options if name not in known], "a solution")
    changes = {name: options[name] for name in known if options[name] is not None}
    if "methods" in changes:
        changes["methods"] = tuple(word.strip() for word in changes["methods"].split(","))
    plan = _checked(config.revise_difference, problem.plan, changes)

    from freeflow import preparation, solvation

    preparation.enable_compilation_cache(_cache_folder(cache, quiet))
    with _progress(quiet) as tell:
        result = solvation.estimate_difference(problem, plan, tell)
    _print_result(result, json_path, quiet)
    return result.exit_status


def _at(problem: Any, temperatures: tuple[float, ...] | None, pressure: str | None) -> Any:
    """The problem at these temperatures and pressures, if any are given."""
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


def _estimate_series(
    problem: Any,
    options: dict[str, Any],
    csv: str | None,
    plot: str | None,
    json_path: str | None,
    quiet: bool,
    cache: bool | None,
) -> int:
    """`freeflow estimate` of a crystal at several temperatures."""
    plan = _revise(problem.system, _with_flow(options))

    from freeflow import preparation, series

    preparation.enable_compilation_cache(_cache_folder(cache, quiet))
    with _progress(quiet) as tell:
        result = series.estimate_series(problem, plan, tell)
    return _print_table(result, csv, plot, json_path, quiet)


def _print_table(result: Any, csv: str | None, plot: str | None, json_path: str | None, quiet: bool) -> int:
    if csv is not None:
        result.to_csv(csv)
    if plot is not None:
        result.write_plot(plot)
    _print_result(result, json_path, quiet)
    return result.exit_status


def _refuse(problem: Any, options: dict[str, Any], names: Sequence[str], what: str) -> None:
    """Options that mean nothing here are no options; they are taken out."""
    for name in names:
        if options.pop(name, None) is not None:
            raise InputError(f"--{name.replace('_', '-')}: {problem.name} is {what}, which this is not for")


# --------------------------------------------------------------------------- what goes in


def _revise(system: System, options: dict[str, Any]) -> Plan:
    changes = {name: value for name, value in options.items() if value is not None}
    if "stages" in changes:
        stages = changes.pop("stages")
        changes["bridge"] = None if stages == "none" else stages
    return _checked(config.revise, system.plan, changes)


def _with_flow(options: dict[str, Any]) -> dict[str, Any]:
    """The plan's values that options stand for: a checkpoint is a flow."""
    values = dict(options)
    checkpoint = values.pop("checkpoint", None)
    return values if checkpoint is None else {**values, "flow": {"checkpoint": checkpoint}}


def _with_trajectory(options: dict[str, Any], given: TrajectoryPlan | None) -> dict[str, Any]:
    """The same for what options say about a trajectory, in the place of what the file says about it."""
    values = _with_flow(options)
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


def _training_plan(system: System, given: dict[str, Any], trajectory: dict[str, Any]) -> Plan:
    """The system's plan, with the options in the place of what it says about flow, seed and trajectory."""
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
    return _checked(config.revise, system.plan, {"flow": values, **seed, **trajectory})


def _ends(name: str, text: str) -> list[float]:
    """LOW:HIGH as two numbers; whether these make sense is checked with the rest."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise InputError(f"--{name.replace('_', '-')}: give LOW:HIGH, got {text!r}") from None
    return [low, high]


def _checked(revise: Callable[..., R], plan: Any, changes: dict[str, Any]) -> R:
    try:
        return revise(plan, **changes)
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


def _require_places(*inputs: str, **outputs: str | None) -> None:
    """Find out before the work whether outputs, by the names of their options, can be written."""
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


def _print_result(
    result: Result | DifferenceResult | TrainingResult | Sampling | Comparison, json_path: str | None, quiet: bool
) -> None:
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


def _facts(system: System | Solution | StateSeries) -> Iterator[tuple[str, Any]]:
    from freeflow.solutions import Solution
    from freeflow.types import StateSeries

    if isinstance(system, StateSeries):
        yield "temperatures", len(system.temperatures)
        if system.pressures:
            yield "pressures", len(system.pressures)
        system = system.system

    units, n = system.units, system.n_atoms
    if isinstance(system, Solution):
        yield "atoms of the solvent", n
        yield f"number density of the solvent [1/{units.length}^3]", f"{n / system.box_length**3:.8g}"
        yield f"solvent's cutoff [{units.length}]", f"{system.solvent.cutoff:.8g}"
        yield f"reach of the larger solute [{units.length}]", f"{system.reach:.8g}"
        yield f"kT of A [{units.energy}]", f"{system.kt:.10g}"
        return
    crystal = system.crystal
    yield "atoms", n
    if crystal.description:
        yield "crystal", crystal.description
    yield (
        f"cell [{units.length}]",
        ", ".join("[" + ", ".join(f"{x:.6g}" for x in row) + "]" for row in crystal.cell.tolist()),
    )
    yield f"number density [1/{units.length}^3]", f"{n / crystal.volume:.8g}"
    if system.cell_motion is not None:
        yield "cell and density", "where the search for the equilibrium cell starts"
        pressure = float(system.state.pressure)
        yield f"pressure [{units.energy}/{units.length}^3]", f"{pressure:.10g}"
        yield "beta p V at this density, of beta G [kT per atom]", f"{system.constants['pressure'] / n:.8g}"
    if system.potential.cutoff is not None:
        yield f"cutoff [{units.length}]", f"{system.potential.cutoff:.8g}"
    if len(set(system.wavelengths)) > 1 or "masses" in system.config:
        for name, value in system.wavelengths.items():
            yield f"thermal wavelength of {name} [{units.length}]", f"{value:.8g}"
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
    _say("freeflow: error: " + config.printable(" ".join(message.split())))
    return status


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(line, err=True)
