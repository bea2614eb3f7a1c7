"""Many runs: what is run, what is kept, what is run again; with systems that take no time, and on a cluster."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from freeflow import many_runs
from freeflow.cli import main
from freeflow.errors import InputError
from freeflow.many_runs import RESULTS, Job, Outcome, execute, gather, keep, recalled, run_all

SMALL = """
name: {name}
units: lj
temperature: {temperature}
potential: {{kind: lennard_jones, cutoff: 1.4}}
crystal: {{lattice: fcc, repeats: [2, 2, 2], number_density: 1.2}}
estimate: {{reference: harmonic, bridge: null, max_samples: 64, target_error: 0.5}}
"""


def write(folder, name, temperature=0.1):
    path = folder / f"{name}.yaml"
    path.write_text(SMALL.format(name=name, temperature=temperature))
    return path


def outcome(job, status="converged", message="fine", attempts=1):
    return Outcome(job.name, job.key, status, message, attempts, {"status": status})


@pytest.fixture
def jobs():
    return [Job(name, f"key of {name}", "", ()) for name in ("a", "b", "c")]


@pytest.fixture
def executed(monkeypatch):
    """Stands in for processes: what was executed; `answers` says what comes of it."""
    ran = []

    def fake(job, tell=lambda _: None, on=None, live=None):
        ran.append(job.name)
        tell("sampling: 10 %")
        answer = fake.answers.get(job.name, [])
        return answer.pop(0) if answer else outcome(job)

    fake.answers, fake.ran = {}, ran
    monkeypatch.setattr(many_runs, "execute", fake)
    return fake


def test_what_is_gathered(tmp_path):
    inside = tmp_path / "folder"
    inside.mkdir()
    a, b = write(tmp_path, "a"), write(inside, "b", 0.2)
    write(inside, "c", 0.3)
    (tmp_path / "list.txt").write_text("# a list\na.yaml\n\nfolder\nmw_cubic_8\n")
    (tmp_path / "broken.yaml").write_text("name: broken\n")
    found, broken = gather([str(tmp_path / "list.txt"), str(b), str(tmp_path / "broken.yaml"), "no_such"])
    assert [job.name for job in found] == ["a", "b", "c", "mw_cubic_8"]  # b is there once
    assert [(one.name, one.status) for one in broken] == [("broken", "failed"), ("no_such", "failed")]
    assert "broken.yaml" in broken[0].message and "\n" not in broken[0].message
    (again,), _ = gather([str(a)], ["--seed=1"])
    assert again.key != found[0].key  # another run
    with pytest.raises(InputError, match="nothing to run"):
        gather([])


def test_what_has_ended_is_not_run_again(tmp_path, jobs, executed):
    executed.answers["b"] = [outcome(jobs[1], "failed", "bad input")]
    said = []
    first = run_all(jobs, tmp_path, workers=2, report=said.append)
    assert [one.status for one in first] == ["converged", "failed", "converged"]
    assert {told.text for told in said if told.outcome is None} == {"sampling: 10 %"}
    assert len((tmp_path / RESULTS).read_text().splitlines()) == 3
    second = run_all(jobs, tmp_path)
    assert [one.status for one in second] == ["converged"] * 3
    assert sorted(executed.ran) == ["a", "b", "b", "c"]  # the failure alone was tried again
    assert len(recalled(tmp_path)) == 3 and len(list(tmp_path.glob("*.json"))) == 3


def test_runs_whose_process_died_are_tried_again(tmp_path, jobs, executed):
    died = outcome(jobs[0], "failed", "its process ended by signal 9")
    executed.answers["a"] = [died]
    executed.answers["b"] = [died._replace(name="b", key=jobs[1].key)] * 5
    executed.answers["c"] = [outcome(jobs[2], "failed", "potential: bad input")]
    found = run_all(jobs, tmp_path, retries=2)
    assert [(one.status, one.attempts) for one in found] == [("converged", 2), ("failed", 3), ("failed", 1)]


def test_a_torn_line_costs_one_run(tmp_path, jobs, executed):
    run_all(jobs, tmp_path)
    whole = (tmp_path / RESULTS).read_text()
    torn = json.loads(whole.splitlines()[-1])  # runs end in any order
    (tmp_path / RESULTS).write_text(whole[:-20])  # the machine failed while it was written
    other = next(job for job in jobs if job.key != torn["key"])
    keep(tmp_path, outcome(other))
    assert set(recalled(tmp_path)) == {job.key for job in jobs} - {torn["key"]}
    run_all(jobs, tmp_path)
    assert sorted(executed.ran) == sorted(["a", "b", "c", torn["name"]])


def test_cores_are_dealt_out():
    own = set(many_runs.cores() or [])
    dealt = many_runs._dealt(2)
    if len(own) >= 2:
        assert dealt[0].isdisjoint(dealt[1]) and dealt[0] | dealt[1] == own
    assert all(share for share in many_runs._dealt(100) if own)


def test_runs_in_processes_of_their_own(tmp_path, capfd):
    """Two sound systems and one that is none: whole processes, and a second call that finds all of it."""
    paths = [str(write(tmp_path, "cold")), str(write(tmp_path, "warm", 0.2))]
    (tmp_path / "bad.yaml").write_text(SMALL.format(name="bad", temperature=0.1).replace("1.4", "9.0"))
    command = ["run", *paths, str(tmp_path / "bad.yaml"), "-o", str(tmp_path / "out"), "--workers", "2", "--seed", "3"]
    assert main(command) == 3
    printed, told = capfd.readouterr()
    assert "cold" in printed and "beta F / N = " in printed and "exceeds half the box" in printed
    assert "3 of 3" in told
    lines = [json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    assert {line["name"]: line["status"] for line in lines} == dict(cold="converged", warm="converged", bad="failed")
    assert lines[0]["result"]["provenance"]["seed"] == 3
    begin = time.monotonic()
    assert main([*command[:3], *command[4:], "--quiet"]) == 0
    assert "done before" not in capfd.readouterr().err and time.monotonic() - begin < 20


def test_a_run_ends_with_its_parent(tmp_path):
    """A parent that is killed leaves nothing behind that computes."""
    (job,), _ = gather([str(write(tmp_path, "a"))])
    process = subprocess.Popen([sys.executable, "-m", "freeflow.run_worker"], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(["estimate", "lj_fcc_500", "--target-error", "1e-7", "--quiet"]) + "\n")
    process.stdin.close()  # as when the parent is no more
    assert process.wait(timeout=60) in {143, -signal.SIGTERM}
    assert job.name == "a"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_survives_the_death_of_a_worker(tmp_path):
    distributed = pytest.importorskip("distributed")
    folder = tmp_path / "systems"
    folder.mkdir()
    for k in range(6):
        write(folder, f"s{k}", 0.05 * (k + 1))
    found, _ = gather([str(folder)])
    told, killed = [], threading.Event()

    def kill_one_worker(what):
        told.append(what)
        if what.outcome is not None and not killed.is_set():  # some have ended, others are under way
            killed.set()
            os.kill(pids[0], signal.SIGKILL)

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        with distributed.Client(cluster) as client:
            pids = list(client.run(os.getpid).values())
        outcomes = run_all(found, tmp_path / "out", dask=cluster.scheduler_address, report=kill_one_worker)
        assert killed.is_set()
        again = run_all(found, tmp_path / "out", dask=cluster.scheduler_address, report=told.append)
    assert [one.status for one in outcomes] == ["converged"] * 6
    assert [one.key for one in again] == [one.key for one in outcomes]
    assert sum(what.recalled for what in told) == 6
    assert len(recalled(tmp_path / "out")) == 6


def test_a_cluster_that_is_not_there_is_said(tmp_path, jobs):
    pytest.importorskip("distributed")
    with pytest.raises(InputError, match="--dask"):
        run_all(jobs, tmp_path, dask="not an address")


def test_progress_of_a_process_is_passed_on(tmp_path):
    """A run that fails says why in one line; its own temporary file is not named."""
    text = SMALL.format(name="bad", temperature=0.1).replace("1.4", "9.0")
    (job,), _ = gather([str(write(tmp_path, "a"))])
    failed = execute(job._replace(system=text))
    assert failed.status == "failed" and failed.message.startswith("potential.cutoff: the cutoff 9")
    assert not list(Path(tmp_path).glob("freeflow-*"))
