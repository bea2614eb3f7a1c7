"""What goes wrong for users: one line, the right exit status, no traceback, and no endless runs."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from freeflow import cli, preparation, result

ROOT = Path(__file__).parent.parent
LJ = {
    "name": "name: tiny",
    "units": "units: lj",
    "temperature": "temperature: 2.0",
    "potential": "potential: {kind: lennard_jones, cutoff: 2.7, nearest_image_only: true}",
    "crystal": "crystal: {lattice: fcc, repeats: [2, 2, 2], number_density: 1.28}",
}
STEADY = "potential: {kind: lennard_jones, cutoff: 1.5}"  # fits twice into the box


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run `freeflow estimate` on a file with some lines replaced: (status, stdout, stderr)."""
    monkeypatch.setattr(preparation, "enable_compilation_cache", lambda folder: None)  # keep the tests' own
    monkeypatch.chdir(tmp_path)

    def run(*options, **lines):
        text = "\n".join(line for line in {**LJ, **lines}.values() if line)
        (tmp_path / "s.yaml").write_text(text + "\n")
        status = cli.main(["estimate", "s.yaml", "--quiet", *options])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return status, captured.out, captured.err

    return run


def refused(outcome, *words):
    """Status 2, nothing on stdout, one line on stderr with these words, and not an internal error."""
    status, out, err = outcome
    assert (status, out) == (2, ""), (status, out, err)
    assert err.startswith("freeflow: error: ") and err.count("\n") == 1, err
    assert "internal error" not in err
    for word in words:
        assert word in err, err
    return err


def unreliable(outcome, *words):
    """Status 3, one line with the verdict, nothing on stderr."""
    status, out, err = outcome
    assert (status, err) == (3, ""), (status, out, err)
    assert out.count("\n") == 1
    for word in words:
        assert word in out


# ------------------------------------------------------------------------------------- before any work


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"units": None}, ["s.yaml", "units: missing"]),
        ({"extra": "temprature: 3"}, ["s.yaml:6", "temprature: unknown key; did you mean temperature?"]),
        ({"temperature": "temperature: hot"}, ["s.yaml:3", "temperature: expected a number"]),
        ({"temperature": "temperature: -1"}, ["temperature: must be greater than 0"]),
        ({"temperature": "temperature: .inf"}, ["temperature: expected a finite number"]),
        ({"potential": "potential: {kind: lennard_jons, cutoff: 2}"}, ["did you mean lennard_jones?"]),
        ({"potential": "potential: {kind: lennard_jones}"}, ["potential.cutoff: missing"]),
        ({"potential": "potential: {kind: lennard_jones, cutoff: 2.7}"}, ["potential.cutoff", "exceeds half the box"]),
        ({"crystal": "crystal: {lattice: fcc, repeats: [2, 2, 2], number_density: -1.28}"}, ["number_density"]),
        ({"crystal": "crystal: {lattice: fcc, repeats: [0, 0, 0], number_density: 1.28}"}, ["crystal.repeats"]),
        ({"crystal": "crystal: {lattice: fcc, repeats: [2, 2], number_density: 1.28}"}, ["three whole numbers"]),
        ({"crystal": "crystal: {lattice: fcc, repeats: [2, 2, 2]}"}, ["give number_density or lattice_constant"]),
        ({"crystal": "crystal: {lattice: sc, repeats: [1, 1, 1], number_density: 1.0}"}, ["at least 2 atoms"]),
        ({"crystal": "structure: {file: none.cif}"}, ["structure.file: no file"]),
        ({"crystal": "structure: {file: s.yaml}"}, ["structure.file", "cannot read"]),
    ],
)
def test_bad_files_are_one_line_that_names_the_place(run, lines, words):
    refused(run(**lines), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-samples", "0"], ["--max-samples: must be at least 2"]),
        (["--target-error", "0"], ["--target-error: must be greater than 0"]),
        (["--estimator", "bar", "--stages", "none"], ["bar needs samples of the target"]),
        (["--json", "no/where.json"], ["--json: no/where.json: cannot be written"]),
    ],
)
def test_bad_options_are_one_line(run, options, words):
    refused(run(*options), *words)


def test_unreadable_structures_are_one_line(run, tmp_path):
    (tmp_path / "x.cif").write_bytes(os.urandom(300))
    refused(run(crystal="structure: {file: x.cif}"), "structure.file", "x.cif")
    (tmp_path / "x.xyz").write_text("2\n\nAr 0 0 0\nAr 0 0 1\n")
    refused(run(crystal="structure: {file: x.xyz}"), "no periodic cell")


def test_an_unstable_lattice_names_its_modes(run):
    outcome = run(
        "--reference", "harmonic", crystal="crystal: {lattice: sc, repeats: [3, 3, 3], number_density: 1.0}",
        potential="potential: {kind: lennard_jones, cutoff: 1.45}",
    )  # fmt: skip
    refused(outcome, "imaginary mode", "wave vector")


# ------------------------------------------------------------------------------------ states of no crystal

STRANGE = {
    "no neighbours": {
        "crystal": "crystal: {lattice: fcc, repeats: [2, 2, 2], number_density: 1.0e-6}",
        "potential": STEADY,
    },
    "no forces": {"crystal": "crystal: {lattice: fcc, repeats: [2, 2, 2], number_density: 1.0e-6}"},
    "crushed": {"crystal": "crystal: {lattice: fcc, repeats: [2, 2, 2], number_density: 1.0e+3}"},
    "beyond numbers": {"crystal": "crystal: {lattice: fcc, repeats: [2, 2, 2], number_density: 1.0e+150}"},
    "very hot": {"temperature": "temperature: 1.0e+6"},
    "very cold": {"temperature": "temperature: 1.0e-4"},
    "colder": {"temperature": "temperature: 1.0e-6"},  # takes five times as long
}


@pytest.mark.parametrize(
    "state", [pytest.param(state, marks=[pytest.mark.slow] if state == "colder" else []) for state in STRANGE]
)
def test_strange_states_end_soon_and_plainly(run, state):
    begin = time.process_time()
    status, out, err = run("--max-samples", "400", "--target-error", "0.05", **STRANGE[state])
    assert time.process_time() - begin < 60  # of the processor: the machine may be busy
    assert "internal error" not in err
    if status == 2:
        refused((status, out, err))
    else:
        assert status in {0, 3} and err == "" and out.count("\n") == 1
        assert state in {"very cold", "colder"} or status == 3


def test_a_melting_crystal_is_named(run, tmp_path):
    begin = time.process_time()
    outcome = run("--json", "m.json", "--max-samples", "400", "--target-error", "0.05", temperature="temperature: 20")
    assert time.process_time() - begin < 60
    unreliable(outcome)
    values = json.loads((tmp_path / "m.json").read_text())
    assert values["status"] == "unreliable" and "melts" in values["warnings"][0]


def test_two_atoms_are_enough(run, tmp_path):
    outcome = run(
        "--target-error", "0.05", "--max-samples", "400", "--json", "two.json",
        crystal="crystal: {lattice: bcc, repeats: [1, 1, 1], number_density: 1.0}",
    )  # fmt: skip
    assert outcome[0] in {0, 3} and outcome[2] == ""
    assert json.loads((tmp_path / "two.json").read_text())["n_atoms"] == 2


def test_a_target_out_of_reach_says_what_it_would_take(run, tmp_path):
    outcome = run("--target-error", "1e-4", "--max-samples", "300", "--stages", "30", "--json", "r.json")
    unreliable(outcome)
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["beta_f_per_atom_std_error"] > 1e-4
    assert any("max_samples 300" in text and "would do" in text for text in values["warnings"])


# --------------------------------------------------------------------------------------- disks and signals


def test_a_full_disk_costs_the_file_but_not_the_answer(run, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result.os, "fsync", full)
    status, out, err = run("--target-error", "0.05", "--max-samples", "400", "--json", "full.json")
    assert status == 2 and out.count("\n") == 1 and "(" in out
    assert err == "freeflow: error: full.json: cannot be written: No space left on device\n"
    assert sorted(os.listdir(tmp_path)) == ["s.yaml"]


SAY_ALL = """
import signal, sys
from freeflow import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.LINE_EVERY_SECONDS = 0.2
sys.exit(cli.main(["estimate", *sys.argv[1:]]))
"""


def interrupted(tmp_path, word, *options):
    """Send SIGINT to a run once its progress has said `word`: (status, stdout, stderr)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FREEFLOW_CACHE": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    process = subprocess.Popen(
        [sys.executable, "-c", SAY_ALL, *options],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said, deadline = b"", time.monotonic() + 90
        while word.encode() not in said:
            assert time.monotonic() < deadline and process.poll() is None, said.decode()
            if select.select([process.stderr], [], [], 1.0)[0]:
                said += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out.decode(), (said + err).decode()


def test_an_interrupted_run_reports_what_it_has(tmp_path):
    options = ["mw_cubic_8", "--target-error", "1e-7", "--max-samples", "1000000000", "--json", "i.json"]
    status, out, err = interrupted(tmp_path, " samples, error ", *options)
    assert status == 130
    assert "Traceback" not in err and all(line.startswith("freeflow: ") for line in err.splitlines())
    assert "Interrupted after " in out and "beta F / N" in out
    values = json.loads((tmp_path / "i.json").read_text())
    assert values["status"] == "interrupted" and values["n_samples"] > 0
    assert abs(values["beta_f_per_atom"] + 25.8652) < 6 * values["beta_f_per_atom_std_error"] + 0.002


def test_interrupted_before_any_sample_there_is_nothing_to_report(tmp_path):
    status, out, err = interrupted(tmp_path, "reference: ", "mw_cubic_64", "--json", "i.json")
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == "freeflow: interrupted before any sample was complete"
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []
