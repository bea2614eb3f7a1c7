"""Runs that are killed at random moments, on full disks, or two in one folder: nothing reported is lost or corrupt.

Slow: `make slow ARGS=tests/faults/test_kills.py`. FREEFLOW_KILLS says how often each kind of run is killed.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from freeflow import checkpoints, config, many_runs, trajectories
from freeflow.errors import InputError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
N_KILLS = int(os.environ.get("FREEFLOW_KILLS", "9"))
SYSTEM = "mw_cubic_8"
BUDGET = ["--target-error", "0.01", "--max-samples", "600", "--stages", "20"]
N_FRAMES = 64


def started(folder: Path, *words: str, **options) -> subprocess.Popen:
    """`freeflow` with these words, in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FREEFLOW_CACHE": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    return subprocess.Popen(
        [sys.executable, "-m", "freeflow", *words], cwd=folder, env={**environment, **options.pop("env", {})},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def run(folder: Path, *words: str, **options) -> tuple[int, str, str]:
    """The same, to its end: (status, stdout, stderr)."""
    process = started(folder, *words, **options)
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err and "internal error" not in err, err
    return process.returncode, out, err


def refused(outcome: tuple[int, str, str], *words: str) -> None:
    """Exit status 2 and one line with these words."""
    status, _, err = outcome
    lines = [line for line in err.splitlines() if line.startswith("freeflow: error: ")]
    assert status == 2 and len(lines) == 1 and err.splitlines()[-1] == lines[0], outcome
    assert all(word in lines[0] for word in words), lines


def killed(folder: Path, seconds: float, *words: str) -> bool:
    """Whether the run was still going on when SIGKILL came."""
    process = started(folder, *words)
    try:
        process.communicate(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True


def answer(path: Path) -> dict:
    """A JSON result without what differs between two equal runs."""

    def lasting(values):
        if not isinstance(values, dict):
            return values
        return {key: lasting(value) for key, value in values.items() if key not in {"wall_seconds", "provenance"}}

    return lasting(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A trajectory of the system."""
    folder = tmp_path_factory.mktemp("frames")
    assert run(folder, "sample", SYSTEM, "-n", str(N_FRAMES), "-o", "t.extxyz", "--quiet")[0] in {0, 3}
    return folder / "t.extxyz"


@pytest.mark.parametrize("kind", ["estimate", "sample", "compare", "series"])
def test_killed_runs_leave_whole_files_or_none(kind, frames, tmp_path):
    """And the same command gives the answer of a run that was not killed."""
    words = {
        "estimate": ["estimate", SYSTEM, *BUDGET, "--json", "r.json", "--u-nk", "w.csv"],
        "sample": ["sample", SYSTEM, "-n", str(N_FRAMES), "-o", "s.extxyz", "--json", "r.json"],
        "compare": ["compare", SYSTEM, str(frames), *BUDGET, "--json", "r.json"],
        "series": ["estimate", SYSTEM, "--temperature", "190,200", *BUDGET, "--json", "r.json", "--csv", "s.csv"],
    }[kind]
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(whole, *words)[0] in {0, 3}  # compiles
    begin = time.monotonic()
    assert run(whole, *words)[0] in {0, 3}
    duration = time.monotonic() - begin
    names = sorted(os.listdir(whole))
    rng, n_killed = random.Random(kind), 0
    for k in range(N_KILLS):
        # Every third time near the end, where files are written.
        moment = duration * (rng.uniform(0.85, 1.1) if k % 3 == 0 else rng.random())
        begin = time.monotonic()
        if killed(tmp_path, moment, *words):
            n_killed += 1
        else:  # the machine has less to do than before
            duration = min(duration, time.monotonic() - begin)
        for name in os.listdir(tmp_path):
            if name == "whole" or name.startswith("."):
                continue
            assert name in names
            if name.endswith(".json"):
                assert answer(tmp_path / name) == answer(whole / name)
            else:
                assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert n_killed > N_KILLS / 3
    assert run(tmp_path, *words)[0] in {0, 3}
    assert answer(tmp_path / "r.json") == answer(whole / "r.json")
    print(f"{kind}: {n_killed} of {N_KILLS} killed, {duration:.1f} s")


TRAIN = ["train", SYSTEM, "-o", "run", "--max-steps", "120", "--batch-size", "8"]


def test_killed_training_goes_on_to_the_same_flow(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(whole, *TRAIN)[0] in {0, 3}
    expected = checkpoints.read(whole / "run")
    begin = time.monotonic()
    assert run(tmp_path, *[*TRAIN[:3], "timing", *TRAIN[4:]])[0] in {0, 3}
    duration = time.monotonic() - begin
    rng, n_killed, reported = random.Random(1), 0, 0
    for _ in range(3 * N_KILLS):
        there = (tmp_path / "run" / checkpoints.FILE_NAME).exists()
        n_killed += killed(tmp_path, rng.uniform(0.3, 1.0) * duration, *TRAIN, *(["--resume"] if there else []))
        try:
            found = checkpoints.read(tmp_path / "run")
        except InputError as error:
            assert not there and "no checkpoint there" in str(error)  # one that was there stays
            continue
        n_evaluations = len(found.training["metrics"])
        assert n_evaluations >= reported
        reported = n_evaluations
        lines = (
            [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
            if there
            else []
        )
        assert len(lines) <= n_evaluations
        if n_killed >= N_KILLS:
            break
    there = (tmp_path / "run" / checkpoints.FILE_NAME).exists()
    assert run(tmp_path, *TRAIN, *(["--resume"] if there else []))[0] in {0, 3}
    found = checkpoints.read(tmp_path / "run")
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint.safetensors", "metrics.jsonl", "system.yaml"]
    print(f"train: {n_killed} killed, {duration:.1f} s")


def test_killed_many_runs_keep_what_had_ended(tmp_path):
    for k in range(3):
        system = config.read(SYSTEM)[2].resolved() | {"name": f"s{k}"}
        (tmp_path / f"s{k}.yaml").write_text(config.dump(system))
    words = ["run", "s0.yaml", "s1.yaml", "s2.yaml", "-o", "out", "--target-error", "0.01", "--max-samples", "600"]
    begin = time.monotonic()
    assert run(tmp_path, *[word.replace("out", "whole") for word in words])[0] in {0, 3}
    duration = time.monotonic() - begin
    expected = {o.name: o.result for o in many_runs.recalled(tmp_path / "whole").values()}
    rng, known, n_killed = random.Random(2), {}, 0
    for _ in range(N_KILLS):
        cut_off = killed(tmp_path, rng.uniform(0.1, 0.6) * duration, *words)
        n_killed += cut_off
        found = many_runs.recalled(tmp_path / "out") if (tmp_path / "out").exists() else {}
        assert known.items() <= found.items()
        known = found
        if not cut_off:  # all had ended: begin again, so that there is something to kill
            shutil.rmtree(tmp_path / "out")
            known = {}
    assert run(tmp_path, *words)[0] in {0, 3}
    for outcome in many_runs.recalled(tmp_path / "out").values():
        assert outcome.result is not None
        assert outcome.result["beta_f"] == expected[outcome.name]["beta_f"]
    print(f"run: {n_killed} of {N_KILLS} killed, {duration:.1f} s")


# ------------------------------------------------------------------------------ disks, devices, folders


def full_disk():
    """In the child: no file may grow beyond a few kilobytes, as where a disk is full."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.mark.parametrize(
    "words",
    [
        TRAIN,
        ["estimate", SYSTEM, *BUDGET, "--json", "r.json"],
        ["sample", SYSTEM, "-n", str(N_FRAMES), "-o", "s.extxyz"],
        ["sample", SYSTEM, "-n", str(N_FRAMES), "-o", "s.dcd"],
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_a_full_disk_is_one_line_and_leaves_no_torso(words, tmp_path):
    outcome = run(tmp_path, *words, preexec_fn=full_disk, env={"FREEFLOW_CACHE": "off"})
    refused(outcome, "cannot be written")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left


def test_two_runs_in_one_folder_are_not_mixed(tmp_path):
    first = started(tmp_path, *TRAIN)
    while not (tmp_path / "run" / ".lock").exists():
        assert first.poll() is None
        time.sleep(0.1)
    refused(run(tmp_path, *TRAIN), "another run is at work there")
    refused(run(tmp_path, *TRAIN, "--resume"), "another run is at work there")
    first.communicate(timeout=600)
    assert first.returncode in {0, 3}
    checkpoints.read(tmp_path / "run")


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    refused(run(tmp_path, "estimate", SYSTEM, env={"JAX_PLATFORMS": "cuda"}), "JAX_PLATFORMS=cuda")


def test_the_frames_are_sound(frames):
    system = config.load(SYSTEM)
    assert sum(len(part.positions) for part in trajectories.read(frames, system)) == N_FRAMES
