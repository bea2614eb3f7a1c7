"""The command line: what it prints, where, and its exit status."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from fake_results import fake_result, fake_system

import freeflow
from freeflow import cli, config
from freeflow.errors import FreeflowError, InputError
from freeflow.types import FlowPlan, Plan, TrainingPlan

GOLDEN = Path(__file__).parent / "golden"
VALUE = "-25.16310(9) converged\n"


class Progress(NamedTuple):
    phase: str
    fraction: float | None
    text: str


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    """Stands in for the pipeline: `outcome` is what it returns or raises, `calls` what it was given."""
    fake = types.ModuleType("freeflow.pipeline")
    calls = types.SimpleNamespace(plan=None, cache="not asked", outcome=fake_result(), reports=[])

    def estimate(system, plan, progress, *, radial_distribution=False):
        calls.plan = plan
        for report in calls.reports:
            if progress is not None:
                progress(report)
        if isinstance(calls.outcome, BaseException):
            raise calls.outcome
        return calls.outcome

    fake.estimate = estimate
    fake.Progress = Progress
    fake.enable_compilation_cache = lambda path: setattr(calls, "cache", path)
    for name in ("pipeline", "preparation"):
        monkeypatch.setitem(sys.modules, f"freeflow.{name}", fake)
        monkeypatch.setattr(freeflow, name, fake, raising=False)
    monkeypatch.setattr(config, "load", lambda source: fake_system())
    monkeypatch.setenv("FREEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return calls


def run(capsys, *arguments):
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --------------------------------------------------------------------------- bad input

COMMANDS = "compare, compare-phases, estimate, run, sample, systems, train, validate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"no command given; use one of {COMMANDS}"),
        (["estimat"], "no such command 'estimat'; did you mean estimate?"),
        (["zap"], f"no such command 'zap'; use one of {COMMANDS}"),
        (["--xyz"], "no such option --xyz; see 'freeflow --help'"),
        (["estimate", "x", "--xyz"], "no such option --xyz; see 'freeflow estimate --help'"),
        (["estimate", "x", "--max-sample", "3"], "no such option --max-sample; did you mean --max-samples?"),
        (["systems", "--jsn"], "no such option --jsn; did you mean --json?"),
        (["estimate"], "Missing argument 'SYSTEM'."),
        (["estimate", "x", "y"], "Got unexpected extra argument (y)"),
        (["estimate", "x", "--json"], "Option '--json' requires an argument."),
        (["estimate", "x", "--seed", "one"], "Invalid value for '--seed': 'one' is not a valid integer."),
        (["estimate", "x", "--target-error", "low"], "Invalid value for '--target-error': 'low' is not a valid float."),
        (
            ["estimate", "x", "--stages", "fast"],
            "Invalid value for '--stages': 'fast' is not auto, none or a whole number.",
        ),
        (
            ["estimate", "x", "--estimator", "mbar"],
            "Invalid value for '--estimator': 'mbar' is not one of 'fep', 'bar'.",
        ),
        (["train", "x"], "Missing option '-o' / '--output'."),
        (["train", "x", "-o"], "Option '-o' requires an argument."),
        (["train", "x", "-o", "r", "--max-step", "3"], "no such option --max-step; did you mean --max-steps?"),
        (["train", "no.yaml", "-o", "r"], "no.yaml: no such file"),
        (
            ["train", "x", "-o", "r", "--architecture", "unet"],
            "Invalid value for '--architecture': 'unet' is not one of 'residual', 'atomic_solids'.",
        ),
        (["estimate", "no.yaml"], "no.yaml: no such file"),
        (["validate", "no.yaml"], "no.yaml: no such file"),
        (
            ["estimate", "mw_cubc_64"],
            "no file and no shipped system called 'mw_cubc_64'; did you mean mw_cubic_64?",
        ),
        (
            ["estimate", "x", "--json", "/no/where.json"],
            "--json: /no/where.json: cannot be written: No such file or directory",
        ),
        (["estimate", "x", "--json", "/"], "--json: /: cannot be written: it is a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    assert run(capsys, *arguments) == (2, "", f"freeflow: error: {message}\n")


def test_the_system_file_is_not_replaced_by_its_result(capsys, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("name: x\n")
    assert run(capsys, "estimate", str(path), "--json", f"{tmp_path}/./s.yaml") == (
        2,
        "",
        f"freeflow: error: --json: {tmp_path}/./s.yaml: this would replace a file that is read\n",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-error", "-1"], "--target-error: must be greater than 0, got -1.0"),
        (["--target-error", "nan"], "--target-error: expected a finite number, got nan"),
        (["--max-samples", "0"], "--max-samples: must be at least 2, got 0"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--stages", "0"], "--stages: expected auto or a whole number from 1 to 1000000, got 0"),
        (["--seed", "-1", "--max-samples", "0"], "--max-samples: must be at least 2, got 0 (and 1 more)"),
    ],
)
def test_impossible_plans_are_named_by_their_option(capsys, pipeline, options, message):
    assert run(capsys, "estimate", "x", *options) == (2, "", f"freeflow: error: {message}\n")
    assert pipeline.plan is None


def test_a_bad_file_is_one_line(capsys, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("name: x\nname: y\n")
    for command in ("estimate", "validate"):
        assert run(capsys, command, str(path)) == (
            2,
            "",
            f"freeflow: error: {path}:2: name: given twice (first on line 1)\n",
        )


# --------------------------------------------------------------------------- estimate


def test_the_table_goes_to_stdout(capsys, pipeline):
    status, out, err = run(capsys, "estimate", "mw_cubic_64")
    assert (status, err) == (0, "")
    assert out == (GOLDEN / "result_table.txt").read_text()
    assert pipeline.plan == Plan()


def test_options_replace_the_plan(capsys, pipeline):
    options = "--target-error 1e-3 --max-samples 500 --seed 7 --reference harmonic --stages none --estimator bar"
    run(capsys, "estimate", "x", *options.split(), "--precision", "float64")
    assert pipeline.plan == Plan("harmonic", None, "bar", 1e-3, 500, 7, "float64")
    run(capsys, "estimate", "x", "--stages", "40")
    assert pipeline.plan == Plan(bridge=40)
    run(capsys, "estimate", "x", "--stages", "auto")
    assert pipeline.plan == Plan()


def test_a_checkpoint_replaces_the_flow(capsys, pipeline, tmp_path):
    run(capsys, "estimate", "x", "--checkpoint", "runs/a")
    assert pipeline.plan == Plan(flow=FlowPlan(checkpoint=str(tmp_path / "runs" / "a")))
    run(capsys, "estimate", "x", "--checkpoint", "shipped", "--seed", "3")
    assert pipeline.plan == Plan(seed=3, flow=FlowPlan(checkpoint="shipped"))
    message = "freeflow: error: --checkpoint: expected one line of printable text, got ''\n"
    assert run(capsys, "estimate", "x", "--checkpoint", "") == (2, "", message)


def test_quiet_prints_one_line(capsys, pipeline):
    pipeline.reports = [Progress("sampling", 0.5, "half")]
    assert run(capsys, "estimate", "x", "--quiet") == (0, VALUE, "")


def test_json_to_a_file_and_to_stdout(capsys, pipeline, tmp_path):
    assert run(capsys, "estimate", "x", "--quiet", "--json", "out.json") == (0, VALUE, "")
    expected = fake_result().to_dict()
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    status, out, err = run(capsys, "estimate", "x", "--json", "-")
    assert (status, err) == (0, "")
    assert json.loads(out) == expected
    assert sorted(os.listdir(tmp_path)) == ["cache", "out.json"]


@pytest.mark.parametrize(
    ("state", "status"), [("converged", 0), ("unreliable", 3), ("target_not_reached", 3), ("interrupted", 130)]
)
def test_exit_status_tells_the_outcome(capsys, pipeline, state, status):
    pipeline.outcome = fake_result(status=state)
    assert run(capsys, "estimate", "x", "--quiet")[0] == status


def test_json_that_cannot_be_written_any_more(capsys, pipeline, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, out, err = run(capsys, "estimate", "x", "--json", "out.json")
    assert status == 2
    assert out == (GOLDEN / "result_table.txt").read_text()
    assert err == "freeflow: error: out.json: cannot be written: No space left on device\n"


def test_a_folder_that_is_missing_is_found_before_sampling(capsys, pipeline):
    assert run(capsys, "estimate", "x", "--json", "no/out.json") == (
        2,
        "",
        "freeflow: error: --json: no/out.json: cannot be written: No such file or directory\n",
    )
    assert pipeline.plan is None


def test_interrupted_before_any_sample(capsys, pipeline):
    pipeline.outcome = KeyboardInterrupt()
    assert run(capsys, "estimate", "x") == (130, "", "freeflow: interrupted before any sample was complete\n")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("the crystal\nmelts"), 2, "freeflow: error: the crystal melts"),
        (FreeflowError("no"), 2, "freeflow: error: no"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "freeflow: error: internal error, please report it (FREEFLOW_DEBUG=1 shows where): ZeroDivisionError: "
            "division by zero",
        ),
        (
            MemoryError(),
            1,
            "freeflow: error: internal error, please report it (FREEFLOW_DEBUG=1 shows where): MemoryError",
        ),
    ],
)
def test_errors_while_running(capsys, pipeline, monkeypatch, error, status, line):
    pipeline.outcome = error
    monkeypatch.delenv("FREEFLOW_DEBUG", raising=False)
    assert run(capsys, "estimate", "x") == (status, "", line + "\n")
    monkeypatch.setenv("FREEFLOW_DEBUG", "1")
    assert ("Traceback" in run(capsys, "estimate", "x")[2]) == (status == 1)


def test_progress_is_a_line_now_and_then(capsys, pipeline, monkeypatch):
    ticks = iter([0.0, 0.0, 3.0, 11.0, 11.0])
    monkeypatch.setattr("time.monotonic", lambda: next(ticks))
    pipeline.reports = [
        Progress("reference", None, "KL 0.02"),
        Progress("tuning", None, "not shown"),
        Progress("sampling", 0.254, "-25.1631(4) per atom"),
    ]
    status, _, err = run(capsys, "estimate", "x")
    assert status == 0
    assert err == "freeflow: reference: KL 0.02\nfreeflow: sampling: 25 %, -25.1631(4) per atom\n"


def test_progress_is_a_bar_on_a_terminal(capsys, pipeline, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    pipeline.reports = [Progress("sampling", 0.5, "[red]text"), Progress("sampling", None, "")]
    status, out, _ = run(capsys, "estimate", "x", "--quiet")
    assert (status, out) == (0, VALUE)
    status, out, _ = run(capsys, "estimate", "x")
    assert status == 0 and out.startswith("mw_cubic_64\n")


# --------------------------------------------------------------------------- train


@pytest.fixture
def training_run(pipeline, monkeypatch):
    """Stands in for the job: `outcome` is what it returns or raises, `calls` what it was given."""
    fake = types.ModuleType("freeflow.training_run")
    result = types.SimpleNamespace(
        summary="below -25.1(1), finished",
        json_text=lambda: '{"version": 1}\n',
        to_json=lambda path: Path(path).write_text('{"version": 1}\n'),
        exit_status=0,
        __str__=lambda: "",
    )
    calls = types.SimpleNamespace(outcome=result, plan=None)

    def train(system, run_dir, plan, progress, *, resume, given, command):
        calls.run_dir, calls.plan, calls.resume, calls.given, calls.command = run_dir, plan, resume, given, command
        if isinstance(calls.outcome, BaseException):
            raise calls.outcome
        return calls.outcome

    fake.train = train
    monkeypatch.setitem(sys.modules, "freeflow.training_run", fake)
    monkeypatch.setattr(freeflow, "training_run", fake, raising=False)
    monkeypatch.setattr(sys, "argv", ["freeflow", "train", "a b", "-o", "r"])
    return calls


def test_train_takes_a_plan_from_file_and_options(capsys, training_run, monkeypatch):
    assert run(capsys, "train", "x", "-o", "r", "--quiet") == (0, "below -25.1(1), finished\n", "")
    assert training_run.plan == Plan(flow=FlowPlan(architecture="residual"))
    assert (training_run.run_dir, training_run.resume, training_run.given) == ("r", False, {})
    assert training_run.command == "freeflow train 'a b' -o r"
    options = "--resume --max-minutes 2 --max-steps 9 --batch-size 8 --learning-rate 1e-3 --seed 4"
    run(capsys, "train", "x", "-o", "r", "--quiet", *options.split())
    chosen = TrainingPlan(max_minutes=2.0, max_steps=9, batch_size=8, learning_rate=1e-3)
    assert training_run.plan == Plan(seed=4, flow=FlowPlan(architecture="residual", training=chosen))
    assert training_run.resume and training_run.given == {
        "max_minutes": 2.0,
        "max_steps": 9,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "seed": 4,
    }
    own = FlowPlan(architecture="residual", options={"width": 8}, training=TrainingPlan(batch_size=4))
    monkeypatch.setattr(config, "load", lambda source: fake_system(plan=Plan(flow=own)))
    run(capsys, "train", "x", "-o", "r", "--quiet", "--max-steps", "5")
    assert training_run.plan.flow == FlowPlan(
        architecture="residual", options={"width": 8}, training=TrainingPlan(batch_size=4, max_steps=5)
    )
    run(capsys, "train", "x", "-o", "r", "--quiet", "--architecture", "atomic_solids")  # takes no options of another
    assert training_run.plan.flow == FlowPlan(architecture="atomic_solids", training=TrainingPlan(batch_size=4))
    monkeypatch.setattr(config, "load", lambda source: fake_system(plan=Plan(flow=FlowPlan(checkpoint="c"))))
    status, _, err = run(capsys, "train", "x", "-o", "r")
    assert (status, err) == (
        2,
        "freeflow: error: estimate.flow: it names a checkpoint; say with --architecture what to train\n",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-minutes", "0"], "--max-minutes: must be greater than 0, got 0.0"),
        (["--max-minutes", "nan"], "--max-minutes: expected a finite number, got nan"),
        (["--max-steps", "0"], "--max-steps: must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size: must be at least 1, got -1"),
        (["--learning-rate", "2"], "--learning-rate: must be at most 1, got 2.0"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
    ],
)
def test_impossible_training_is_named_by_its_option(capsys, training_run, options, message):
    assert run(capsys, "train", "x", "-o", "r", *options) == (2, "", f"freeflow: error: {message}\n")
    assert training_run.plan is None


def test_what_train_writes_and_returns(capsys, training_run, tmp_path):
    assert run(capsys, "train", "x", "-o", "r", "--json", "-") == (0, '{"version": 1}\n', "")
    assert run(capsys, "train", "x", "-o", "r", "--json", "out.json")[0] == 0
    assert json.loads((tmp_path / "out.json").read_text()) == {"version": 1}
    training_run.outcome.exit_status = 130
    assert run(capsys, "train", "x", "-o", "r", "--quiet")[0] == 130
    training_run.outcome = KeyboardInterrupt()
    assert run(capsys, "train", "x", "-o", "r") == (130, "", "freeflow: interrupted before training began\n")
    training_run.outcome = InputError("r: holds a run already")
    assert run(capsys, "train", "x", "-o", "r") == (2, "", "freeflow: error: r: holds a run already\n")


# --------------------------------------------------------------------------- compilation cache


def test_where_compiled_kernels_are_kept(capsys, pipeline, monkeypatch, tmp_path):
    place = tmp_path / "cache"

    def used(*options):
        run(capsys, "estimate", "x", "--quiet", *options)
        return pipeline.cache

    # One folder for each kind of processor: machine code of one may not run on another.
    assert used().parent == place and used().is_dir()
    assert used("--no-cache") is None
    monkeypatch.setenv("FREEFLOW_CACHE", "off")
    assert used() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert used("--cache").parent.name == "freeflow"
    monkeypatch.delenv("FREEFLOW_CACHE")
    assert used().parent.name == "freeflow" and tmp_path in used().parents


def test_a_cache_that_cannot_be_made_is_a_warning(capsys, pipeline, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FREEFLOW_CACHE", str(tmp_path / "file" / "cache"))
    status, _, err = run(capsys, "estimate", "x")
    assert (status, pipeline.cache) == (0, None)
    assert err.startswith("freeflow: warning: compiled kernels are not kept: ") and err.count("\n") == 1


# --------------------------------------------------------------------------- the other commands


def test_systems(capsys):
    status, out, err = run(capsys, "systems")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["SYSTEM", "PUBLISHED"]
    assert "mw_cubic_64         -25.16306(20)   mW cubic ice, 64 molecules at 200 K" in lines
    assert len(lines) == 1 + len(config.shipped())


def test_systems_as_json(capsys):
    status, out, _ = run(capsys, "systems", "--json")
    by_name = {system["name"]: system for system in json.loads(out)}
    assert status == 0
    assert by_name["mw_cubic_64"] == {
        "name": "mw_cubic_64",
        "description": "mW cubic ice, 64 molecules at 200 K",
        "beta_f_per_atom": -25.16306,
        "std_error": 2e-4,
        "source": "Wirnsberger et al. 2022, MBAR",
        "delta_f": None,
    }
    assert by_name["silicon_diamond_64"]["beta_f_per_atom"] is None


def test_validate_prints_a_system_file(capsys):
    status, out, err = run(capsys, "validate", "mw_cubic_8")
    assert (status, err) == (0, "")
    assert "# atoms: 8\n" in out
    assert "# number density [1/angstrom^3]: 0.033567184\n" in out
    assert "# cutoff [angstrom]: 4.3065\n" in out
    assert "# kT [kcal/mol]: 0.39744134\n" in out
    assert "# lattice energy [kcal/mol per atom]: -12.377985\n" in out  # REFERENCE: perfect lattice
    assert config.read(yaml.safe_load(out))[2] == config.read(config.read("mw_cubic_8")[2].resolved())[2]


def test_help_has_examples(capsys):
    for arguments in (
        ["--help"],
        ["-h"],
        ["estimate", "--help"],
        ["systems", "--help"],
        ["train", "--help"],
        ["validate", "--help"],
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, err) == (0, "")
        assert "Examples:\n" in out


def test_version(capsys):
    status, out, err = run(capsys, "--version")
    assert (status, err) == (0, "")
    assert out.startswith("freeflow ") and out.count("\n") == 1


# --------------------------------------------------------------------------- as a process


def process(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


def test_light_commands_do_not_start_jax():
    code = "import sys; from freeflow.cli import main; main(['systems']); sys.exit('jax' in sys.modules)"
    assert process(code).returncode == 0


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys; from freeflow.cli import main; sys.exit(main(['systems']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line():
    code = "import sys; from freeflow.cli import main; sys.exit(main(['systems']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 2
    assert done.stderr == b"freeflow: error: cannot write the output: No space left on device\n"


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "freeflow", "estimat"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "freeflow: error: no such command 'estimat'; did you mean estimate?\n"
