"""The subcommands; heavy modules are imported inside those that need them, so that help and lists appear at once."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from freeflow import config
from freeflow.cli.inputs import (
    at_states,
    cache_folder,
    changes_of,
    checked,
    ends,
    refuse,
    require_places,
    revised,
    training_plan,
    with_flow,
    with_trajectory,
)
from freeflow.cli.options import FRAMES, OUTPUT, REPORT, ROAD, STATES, STOPPING, TABLE, Group
from freeflow.cli.output import Lines, facts_of, print_result, print_table, print_text, progress_reports, say
from freeflow.errors import InputError

if TYPE_CHECKING:
    from freeflow.solutions import Solution

INTERRUPTED = 130


@click.group(
    cls=Group,
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
@STOPPING
@STATES
@ROAD
@click.option("--estimator", type=click.Choice(["fep", "bar"]), help="From forward work, or from forward and reverse.")
@click.option("--trajectory", metavar="FILE", help="MD frames as samples of the target, for bar.")
@FRAMES
@REPORT
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
@TABLE
@OUTPUT
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
    require_places(system, json=json_path, report=report, u_nk=u_nk, csv=csv, plot=plot)
    speaks = distributed is None or _joined(distributed)
    problem = at_states(config.load(system), temperature, pressure)
    from freeflow.solutions import Solution
    from freeflow.types import StateSeries

    if isinstance(problem, StateSeries):
        said = {**options, "report": report, "u_nk": u_nk, "distributed": distributed}
        refuse(problem, said, _NOT_OF_SERIES, "a series of states")
        kept = {name: value for name, value in options.items() if name not in _NOT_OF_SERIES}
        return _estimate_series(problem, kept, csv, plot, json_path, quiet, cache)
    for name, value in (("csv", csv), ("plot", plot)):
        if value is not None:
            raise InputError(f"--{name}: {problem.name} is no series of states; see --json and --report")
    if isinstance(problem, Solution):
        refuse(problem, {"distributed": distributed}, ("distributed",), "a solution")
        return _estimate_difference(problem, {**options, "report": report, "u_nk": u_nk}, json_path, quiet, cache)
    refuse(problem, options, ("methods", "map", "max_minutes"), "a crystal")
    plan = revised(problem, with_trajectory(options, problem.plan.trajectory))

    from freeflow import pipeline, preparation

    preparation.enable_compilation_cache(cache_folder(cache, quiet))
    with progress_reports(quiet or not speaks) as tell:
        result = pipeline.estimate(problem, plan, tell, radial_distribution=report is not None)
    if not speaks:
        return result.exit_status
    if u_nk is not None:
        result.write_u_nk(u_nk)
    if report is not None:
        from freeflow.report import write_estimate_report

        write_estimate_report(result, report)
    print_result(result, json_path, quiet)
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
@STATES
@STOPPING
@ROAD
@TABLE
@OUTPUT
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
    require_places(phase_a, phase_b, json=json_path, csv=csv, plot=plot)
    a, b = (at_states(config.load(phase), temperature, pressure) for phase in (phase_a, phase_b))
    changes = changes_of(with_flow(options))

    from freeflow import phases, preparation

    preparation.enable_compilation_cache(cache_folder(cache, quiet))
    with progress_reports(quiet) as tell:
        result = phases.compare_phases(a, b, None, tell, **changes)
    return print_table(result, csv, plot, json_path, quiet)


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
@ROAD
@OUTPUT
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
    require_places(system, json=json_path)
    problem = config.crystal_only(config.load(system))
    plan = revised(problem, {**with_flow(options), "trajectory": None})

    from freeflow import preparation, sampling

    preparation.enable_compilation_cache(cache_folder(cache, quiet))
    with progress_reports(quiet) as tell:
        result = sampling.sample(problem, number, output, plan, tell, method=method)
    print_result(result, json_path, quiet)
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
@FRAMES
@STOPPING
@ROAD
@REPORT
@OUTPUT
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
    require_places(system, trajectory, json=json_path, report=report)
    problem = config.crystal_only(config.load(system))
    plan = revised(problem, with_trajectory({**options, "trajectory": trajectory}, None))
    assert plan.trajectory is not None

    from freeflow import comparison, preparation

    preparation.enable_compilation_cache(cache_folder(cache, quiet))
    with progress_reports(quiet) as tell:
        result = comparison.compare(problem, plan.trajectory, plan, tell)
    if report is not None:
        from freeflow.report import write_comparison_report

        write_comparison_report(result, report)
    print_result(result, json_path, quiet)
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
@FRAMES
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
    require_places(system, json=json_path)
    problem = config.crystal_only(config.load(system))
    trajectory = {name: options.pop(name) for name in ("trajectory", "topology", "frames", "sigma")}
    given = {name: value for name, value in options.items() if value is not None}
    given |= {name: ends(name, given[name]) for name in ("temperatures", "number_densities") if name in given}
    plan = training_plan(problem, given, with_trajectory(trajectory, problem.plan.trajectory))

    from freeflow import preparation, training_run

    preparation.enable_compilation_cache(cache_folder(cache, quiet))
    try:
        with progress_reports(quiet) as report:
            result = training_run.train(
                problem, run_dir, plan, report, resume=resume, given=given, command=_command_line()
            )
    except KeyboardInterrupt:
        say("freeflow: interrupted before training began")
        return INTERRUPTED
    print_result(result, json_path, quiet)
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
@STOPPING
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
    tell = (lambda _: None) if quiet else Lines(len(jobs))
    try:
        outcomes = many_runs.run_all(jobs, folder, workers=workers, dask=dask, retries=retries, report=tell)
    except KeyboardInterrupt:
        say(f"freeflow: interrupted; what was complete is in {folder}")
        return INTERRUPTED
    outcomes += broken
    for outcome in broken:
        many_runs.keep(folder, outcome)
    width = max(len(outcome.name) for outcome in outcomes)
    print_text("\n".join(f"{o.name:<{width}}  {o.status:<18}  {o.message}" for o in outcomes))
    if not jobs:
        return 2
    return 0 if all(outcome.status == "converged" for outcome in outcomes) else 3


@cli.command(epilog="\b\nExamples:\n  freeflow systems\n  freeflow systems --json")
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
def systems(as_json: bool) -> int:
    """List the systems that ship with freeflow, with published values of beta F / N."""
    from freeflow.result import format_with_error

    shipped = config.shipped()
    if as_json:
        print_text(json_module.dumps([system._asdict() for system in shipped], indent=2))
        return 0
    rows = [("SYSTEM", "PUBLISHED [kT]", "DESCRIPTION")]
    for system in shipped:
        value = system.beta_f_per_atom if system.delta_f is None else system.delta_f
        error = float("nan") if system.std_error is None else system.std_error
        rows.append((system.name, "-" if value is None else format_with_error(value, error), system.description))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    print_text("\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {text}" for name, value, text in rows))
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
    facts = "".join(f"# {name}: {value}\n" for name, value in facts_of(problem))
    print_text(facts + config.dump(problem.config).rstrip())
    return 0


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
    refuse(problem, options, [name for name in options if name not in known], "a solution")
    changes = {name: options[name] for name in known if options[name] is not None}
    if "methods" in changes:
        changes["methods"] = tuple(word.strip() for word in changes["methods"].split(","))
    plan = checked(config.revise_difference, problem.plan, changes)

    from freeflow import preparation, solvation

    preparation.enable_compilation_cache(cache_folder(cache, quiet))
    with progress_reports(quiet) as tell:
        result = solvation.estimate_difference(problem, plan, tell)
    print_result(result, json_path, quiet)
    return result.exit_status


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
    plan = revised(problem.system, with_flow(options))

    from freeflow import preparation, series

    preparation.enable_compilation_cache(cache_folder(cache, quiet))
    with progress_reports(quiet) as tell:
        result = series.estimate_series(problem, plan, tell)
    return print_table(result, csv, plot, json_path, quiet)


def _command_line() -> str:
    return shlex.join(["freeflow", *sys.argv[1:]])


def _print_version(context: click.Context) -> None:
    from importlib import metadata

    try:
        version = metadata.version("freeflow")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    print_text(f"freeflow {version}")
    context.exit()
