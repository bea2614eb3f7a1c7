"""Many devices and several processes: the same samples, and the same answer to the last bit."""

import json
import os
import socket
import subprocess
import sys

import pytest

from freeflow import memory, pipeline, preparation, team
from freeflow.errors import InputError
from freeflow.work import BridgeSampler

SYSTEM = """\
name: tiny
units: lj
temperature: 1.0
potential: {kind: lennard_jones, cutoff: 1.6}
crystal: {lattice: fcc, repeats: [3, 3, 3], number_density: 1.2}
estimate: {target_error: 5.0e-3, bridge: {stages: 10}, max_samples: 200}
"""
FACTS = ("beta_f", "beta_f_std_error", "n_samples", "energy_evaluations", "bootstrap_std_error")


@pytest.fixture
def start(tmp_path):
    """Begins one command line, with an option or a number of devices, and gives it an output of its own."""
    (tmp_path / "system.yaml").write_text(SYSTEM)

    def begin(name, *options, devices=1):
        out = tmp_path / f"{name}.json"
        command = [sys.executable, "-m", "freeflow", "estimate", "system.yaml", "--quiet", "--json", str(out), *options]
        cache = os.environ["JAX_COMPILATION_CACHE_DIR"]  # of the tests
        environment = {
            **os.environ,
            "FREEFLOW_CACHE": cache,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return out, subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    return begin


def facts(path):
    result = json.loads(path.read_text())
    return {name: result[name] for name in FACTS if name in result}


def test_devices_and_processes_change_nothing(start):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    alone_out, alone = start("alone")
    alone_said = alone.communicate(timeout=300)  # first, so that the others find what it compiled
    runs = {
        "devices": start("devices", devices=2),
        "first": start("first", "--distributed", f"{address},2,0"),
        "second": start("second", "--distributed", f"{address},2,1"),
    }
    said = {name: process.communicate(timeout=300) for name, (_, process) in runs.items()}
    assert {process.returncode for process in (alone, *(process for _, process in runs.values()))} <= {0, 3}, said
    expected = facts(alone_out)
    assert expected["n_samples"] == 200
    assert facts(runs["devices"][0]) == expected
    assert facts(runs["first"][0]) == expected
    # The first process speaks for all, and nothing else stands on stdout.
    assert said["first"][0] == alone_said[0]
    assert said["second"][0] == ""
    assert not runs["second"][0].exists()


@pytest.mark.parametrize(
    ("where", "complaint"),
    [("node1", "neither auto nor"), ("node1:1,2", "neither auto nor"), ("node1:12,2,2", "numbers begin with 0")],
)
def test_a_place_that_is_none(where, complaint):
    with pytest.raises(InputError, match=complaint):
        team.join(where)


def test_a_process_on_its_own_is_a_team():
    assert team.size() == 1
    assert team.is_first()
    assert team.share([1, 2, 3]) == team.gathered([1, 2, 3]) == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ memory


def test_a_run_that_runs_out_of_memory_goes_on_with_smaller_batches(tmp_path, monkeypatch):
    (tmp_path / "system.yaml").write_text(SYSTEM)
    moved = BridgeSampler.move

    def move(self, *arguments):
        if self.batch > 32:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")
        return moved(self, *arguments)

    monkeypatch.setattr(BridgeSampler, "move", move)
    result = pipeline.estimate(tmp_path / "system.yaml", max_samples=32)
    assert result.n_samples == 32
    assert any("memory is short: 32 samples at a time instead of 64" in warning for warning in result.warnings)


def test_other_errors_are_not_tried_again(tmp_path, monkeypatch):
    (tmp_path / "system.yaml").write_text(SYSTEM)

    def move(self, *_):
        raise RuntimeError("something else")

    monkeypatch.setattr(BridgeSampler, "move", move)
    with pytest.raises(RuntimeError, match="something else"):
        pipeline.estimate(tmp_path / "system.yaml", max_samples=32)


@pytest.mark.parametrize(("free", "batch"), [(None, 32), (10**12, 32), (2 * 2 * 4000 * 400 * 20, 16), (1, 1)])
def test_the_batch_fits_into_the_memory(free, batch, monkeypatch):
    from freeflow.potentials import lennard_jones

    monkeypatch.setattr(memory, "free_memory", lambda: free)
    monkeypatch.setattr(preparation, "n_workers", lambda: 2)
    assert preparation.fitting_batch(lennard_jones(), 4000, "float32") == batch
    if free == 2 * 2 * 4000 * 400 * 20:
        assert preparation.fitting_batch(lennard_jones(), 4000, "float64") == batch // 2


def test_the_machine_says_how_much_memory_is_free():
    free = memory.free_memory()
    assert free is None or free > 2**20


def test_a_container_counts(tmp_path, monkeypatch):
    for name, value in {"_LIMIT": "1000", "_USED": "400"}.items():
        (tmp_path / name).write_text(value)
        monkeypatch.setattr(memory, name, tmp_path / name)
    assert memory.free_memory() == 600
    (tmp_path / "_LIMIT").write_text("max")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "nothing")
    assert memory.free_memory() is None
