"""Checkpoint files and the folders of runs: what is kept, what fits, and one clear line for what does not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toy_flows as toy
from hypothesis import given, settings
from hypothesis import strategies as st

from freeflow import checkpoints, config, flows, preparation, training_run
from freeflow.checkpoints import Checkpoint, difference, fingerprint, flatten, restore
from freeflow.errors import FreeflowError, InputError
from freeflow.types import FlowPlan, Plan, TrainingPlan

SMALL = "mw_cubic_8"
TREE = {
    "a": [np.arange(6, dtype="float32").reshape(2, 3).T, (np.float64(0.1), np.int32(-3))],
    "b": {"c/d": np.array([1 + 2j, -3.5j]), "empty": np.zeros((0, 3))},
}


def complaint(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture(scope="module")
def made_for():
    return fingerprint(config.load(SMALL))


def example(made_for, **changes):
    arrays = flatten("state", TREE) | flatten("state/average", {"w": np.float32([1, 2])})
    values = {
        "architecture": "residual",
        "options": {"width": 2},
        "transferable": True,
        "system": made_for,
        "arrays": arrays,
        "provenance": {"command": "freeflow train", "device": "cpu"},
        "training": {"seed": 1, "metrics": [{"step": 0, "bound": 0.1, "none": None}]},
    }
    return Checkpoint(**{**values, **changes})


# ------------------------------------------------------------------------------ files


def test_what_is_saved_is_read(tmp_path, made_for):
    path = tmp_path / checkpoints.FILE_NAME
    original = example(made_for)
    checkpoints.save(path, original)
    for place in (path, str(path), tmp_path):  # the folder of a run stands for its checkpoint
        found = checkpoints.read(place)
        assert dataclasses.replace(found, arrays={}) == dataclasses.replace(original, arrays={})
        assert found.arrays.keys() == original.arrays.keys()
        for name, array in original.arrays.items():
            assert (found.arrays[name].dtype, found.arrays[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found.arrays[name], array)
    assert os.listdir(tmp_path) == [checkpoints.FILE_NAME]
    tree = restore({k: v for k, v in found.arrays.items() if "average" not in k}, "state", TREE)
    assert jax.tree.structure(tree) == jax.tree.structure(TREE)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, tree, TREE))


def test_the_small_form_has_the_averaged_parameters_alone(made_for):
    small = checkpoints.parameters_only(example(made_for))
    assert list(small.arrays) == ["parameters/w"] and small.training == {}
    assert small.provenance == example(made_for).provenance
    assert checkpoints.parameters_only(small).arrays.keys() == small.arrays.keys()


@pytest.fixture(scope="module")
def content(made_for, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "c"
    checkpoints.save(path, example(made_for))
    return path.read_bytes()


@given(share=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_cut_files_are_refused(content, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "c"
    path.write_bytes(content[: int(share * len(content))])
    assert complaint(checkpoints.read, path).startswith(f"{path}: not a checkpoint")


@given(place=st.integers(0, 10**9), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_a_wrong_byte_is_noticed_or_harmless(content, made_for, tmp_path_factory, place, flip):
    damaged = bytearray(content)
    damaged[place % len(content)] ^= flip
    path = tmp_path_factory.mktemp("damaged") / "c"
    path.write_bytes(damaged)
    try:
        found = checkpoints.read(path)
    except InputError as error:
        assert str(error).isprintable()
    else:
        original = example(made_for)
        assert dataclasses.replace(found, arrays={}) == dataclasses.replace(original, arrays={})
        assert all(np.array_equal(found.arrays[name], array) for name, array in original.arrays.items())


def test_files_that_are_no_checkpoints(tmp_path, content):
    def read(data):
        (tmp_path / "c").write_bytes(data)
        return complaint(checkpoints.read, tmp_path / "c").removeprefix(f"{tmp_path / 'c'}: ")

    assert read(b"").startswith("not a checkpoint")
    assert read(b"words " * 100).startswith("not a checkpoint")
    assert read(safetensors.numpy.save({"a": np.zeros(2)})) == "not a checkpoint of freeflow"
    newer = content.replace(b'"version":"1"', b'"version":"2"')
    assert newer != content
    assert read(newer) == "made by a newer freeflow (format 2, this one reads 1); update freeflow"
    weight = np.float32([1, 2]).tobytes()
    assert content.count(weight) == 1
    assert read(content.replace(weight, np.float32([1, 3]).tobytes())).startswith("the checkpoint is damaged")
    assert complaint(checkpoints.read, tmp_path / "no").endswith("no: no checkpoint there")
    (tmp_path / "folder").mkdir()
    assert complaint(checkpoints.read, tmp_path / "folder").endswith("folder: no checkpoint there")


def test_a_failed_write_leaves_the_old_file(tmp_path, made_for, monkeypatch):
    path = tmp_path / "c"
    checkpoints.save(path, example(made_for))
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FreeflowError, match=r"c: cannot be written: No space left on device"):
        checkpoints.save(path, example(made_for, options={"width": 3}))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("g/w"), "its parameters do not fit the flow: g/w is missing"),
        (lambda a: a.update({"g/x": np.zeros(1)}), "its parameters do not fit the flow: g/x has no place in this flow"),
        (
            lambda a: a.update({"g/w": np.zeros((3, 2), "float32")}),
            "its parameters do not fit the flow: g/w is float32 [3, 2], not float32 [2, 3]",
        ),
        (
            lambda a: a.update({"g/w": np.zeros((2, 3))}),
            "its parameters do not fit the flow: g/w is float64 [2, 3], not float32 [2, 3]",
        ),
        (lambda a: a["g/w"].__setitem__((1, 1), np.nan), "g/w holds numbers that are not finite"),
        (lambda a: a["g/w"].__setitem__((0, 1), np.inf), "g/w holds numbers that are not finite"),
    ],
)
def test_arrays_that_do_not_fit(change, message):
    like = {"w": jax.ShapeDtypeStruct((2, 3), np.dtype("float32"))}
    arrays = {"g/w": np.zeros((2, 3), "float32"), "other/w": np.zeros(5)}
    assert restore(arrays, "g", like)["w"].dtype == np.float32
    change(arrays)
    assert complaint(restore, arrays, "g", like) == message


# ------------------------------------------------------------------------------ what system a flow is for


def variant(source=SMALL, **changes):
    values = config.read(source)[2].resolved()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    return fingerprint(config.load(values))


def test_one_family_has_many_sizes(made_for):
    cubic = fingerprint(config.load("mw_cubic_64"))
    assert difference(made_for, cubic, any_size=True) is None
    assert difference(cubic, fingerprint(config.load("mw_cubic_216")), any_size=True) is None
    assert difference(made_for, made_for, any_size=False) is None
    assert difference(made_for, variant(name="another", thermal_wavelength=1.0), any_size=False) is None
    assert difference(made_for, cubic, any_size=False).startswith("n_atoms: the flow is for 8, this system has 64; ")
    assert json.loads(json.dumps(made_for)) == made_for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 201.0}, "temperature: the flow is for 200, this system has 201"),
        ({"boltzmann": 0.002}, "boltzmann: the flow is for 0.0019872067, this system has 0.002"),
        ({"crystal__number_density": 0.034}, "number_density: the flow is for 0.033567184, this system has 0.034"),
        ({"potential__lambda": 23.0}, "potential.lambda: the flow is for 23.15, this system has 23"),
        ({"potential__epsilon": 6.0}, "potential.epsilon: the flow is for 6.189, this system has 6"),
    ],
)
def test_what_differs_is_named(made_for, changes, message):
    assert difference(made_for, variant(**changes), any_size=True) == message


def test_structures_are_told_apart_by_their_neighbours():
    cubic, hexagonal = (fingerprint(config.load(f"mw_{kind}_64")) for kind in ("cubic", "hexagonal"))
    assert difference(cubic, {**hexagonal, "number_density": cubic["number_density"]}, True).startswith("lattice: ")
    fcc = config.load("lj_fcc_256")
    hcp = variant("lj_fcc_256", crystal={"lattice": "hcp", "repeats": [7, 7, 4], "number_density": 1.28})
    assert difference(fingerprint(fcc), hcp, any_size=True) == (
        "lattice: the flow is for 'face-centred cubic, 4 atoms per cubic cell', "
        "this system is 'hexagonal close-packed, ideal c/a, 2 atoms per hexagonal cell'"
    )
    assert difference(fingerprint(fcc), variant("lj_fcc_500"), any_size=True) is None
    assert difference(fingerprint(fcc), cubic, any_size=True).startswith("units: the flow is for lj")


def test_potentials_without_names_are_told_apart_by_their_values():
    system = config.load(SMALL)
    bare = dataclasses.replace(system, config={})
    other = dataclasses.replace(bare, potential=dataclasses.replace(bare.potential, pair=lambda r2: 0 * r2))
    assert difference(fingerprint(system), fingerprint(bare), any_size=False) is None
    assert difference(fingerprint(bare), fingerprint(other), any_size=False) == (
        "potential: its energies are not those that the flow is for"
    )


def test_shipped_flows_are_found_by_family(tmp_path, made_for):
    system = config.load("mw_cubic_64")
    assert "no flow ships with this version" in complaint(checkpoints.shipped, system, tmp_path)
    checkpoints.save(tmp_path / "lj.safetensors", example(variant("lj_fcc_32")))
    checkpoints.save(tmp_path / "other.safetensors", example(made_for, transferable=False))
    assert complaint(checkpoints.shipped, system, tmp_path) == (
        "no shipped flow for mw_cubic_64: there are flows for lj, other; freeflow train makes one"
    )
    checkpoints.save(tmp_path / "mw_cubic.safetensors", example(made_for))
    assert checkpoints.shipped(system, tmp_path) == tmp_path / "mw_cubic.safetensors"


# ------------------------------------------------------------------------------ runs


@pytest.fixture
def toy_architecture(monkeypatch):
    """The architecture `residual` is one parameter, and its reference takes no fit."""
    monkeypatch.setattr(flows, "residual", toy.residual)
    monkeypatch.setattr(preparation, "fit_gaussian", toy.fit_gaussian)


def plan_for(**training):
    settings = TrainingPlan(**{"max_steps": 40, "batch_size": 16, "learning_rate": 0.02, **training})
    return Plan(seed=5, flow=FlowPlan(architecture="residual", options={"width": 2}, training=settings))


@pytest.fixture(scope="module")
def system():
    return config.load(SMALL)


@pytest.fixture(scope="module")
def finished(system, tmp_path_factory):
    """A whole run, and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows, "residual", toy.residual)
        patch.setattr(preparation, "fit_gaussian", toy.fit_gaussian)
        folder = tmp_path_factory.mktemp("runs") / "whole"
        told = []
        result = training_run.train(system, folder, plan_for(), told.append, command="freeflow train x")
    return result, folder, told


def lines(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def same_training(a, b):
    one, two = checkpoints.read(a), checkpoints.read(b)
    assert one.arrays.keys() == two.arrays.keys()
    for name in one.arrays:
        assert one.arrays[name].tobytes() == two.arrays[name].tobytes(), name
    drop = {"seconds"}
    assert [{k: v for k, v in line.items() if k not in drop} for line in lines(a)] == [
        {k: v for k, v in line.items() if k not in drop} for line in lines(b)
    ]


def test_a_run_leaves_checkpoint_metrics_and_system(finished, system):
    result, folder, told = finished
    assert sorted(os.listdir(folder)) == ["checkpoint.safetensors", "metrics.jsonl", "system.yaml"]
    assert [line["step"] for line in lines(folder)] == [0, 10, 20, 30, 40]
    assert tuple(lines(folder)) == result.metrics
    assert config.read(folder / "system.yaml")[2].resolved() == system.config
    assert (result.ending, result.exit_status, result.step, result.n_parameters) == ("finished", 0, 40, 2)
    found = checkpoints.read(folder)
    assert found.provenance["command"] == "freeflow train x" and found.provenance["seed"] == 5
    assert found.provenance["config"]["estimate"]["flow"]["training"]["batch_size"] == 16
    assert found.provenance["reached"] == result.metrics[-1]
    assert (found.architecture, found.options, found.transferable) == ("residual", {"width": 2}, True)
    assert told[-1].phase == "training" and told[-1].fraction == 1.0
    # The displacements of the toy reference are too small at first; the published value is the floor.
    bounds = [line["bound_per_atom"] for line in result.metrics]
    assert bounds[-1] < bounds[0] - 0.1
    assert bounds[-1] > -25.8652


def test_what_is_printed(finished):
    result, folder, _ = finished
    text = str(result)
    assert text.startswith("mw_cubic_8\n\n  architecture              residual, 2 parameters\n")
    assert "\n  steps                     40 of 40" in text and text.endswith("the learning rate has reached zero.")
    assert result.summary.startswith("beta F / N below -25.") and result.summary.endswith(" %, finished")
    values = json.loads(result.json_text())
    assert list(values) == [
        *("version", "system", "n_atoms", "architecture", "options", "n_parameters", "checkpoint", "status"),
        *("steps", "horizon", "first", "last", "wall_seconds", "warnings"),
    ]
    assert values["checkpoint"] == str(folder / "checkpoint.safetensors") and values["status"] == "finished"
    worse = dataclasses.replace(result, metrics=result.metrics[::-1])
    assert (worse.worse, worse.exit_status) == (True, 3)
    assert dataclasses.replace(result, ending="interrupted").exit_status == 130


def test_a_paused_run_goes_on_to_the_same_end(toy_architecture, finished, system, tmp_path):
    folder = tmp_path / "run"

    def interrupt(progress):
        if "step 1" in progress.text:
            raise KeyboardInterrupt

    first = training_run.train(system, folder, plan_for(), interrupt)
    assert (first.ending, first.exit_status) == ("interrupted", 130)
    second = training_run.train(system, folder, plan_for(), resume=True, given={"max_steps": 25})
    assert (second.ending, second.step, second.exit_status) == ("step_limit", 25, 0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30}\n')  # evaluated after the checkpoint, by a run that was killed
    third = training_run.train(system, folder, Plan(), resume=True, given={"seed": 5})  # settings are the run's own
    assert third.ending == "finished"
    same_training(folder, finished[1])


def test_a_finished_run_stays_as_it_is(toy_architecture, finished, system, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "checkpoint.safetensors").write_bytes((finished[1] / "checkpoint.safetensors").read_bytes())
    again = training_run.train(system, folder, resume=True)
    assert (again.ending, again.step) == ("finished", 40)
    same_training(folder, finished[1])


def test_folders_and_runs_that_do_not_fit(toy_architecture, finished, system, tmp_path):
    _, folder, _ = finished

    def train(place, source=system, plan=None, **options):
        return complaint(training_run.train, source, place, plan or plan_for(), **options)

    assert train(folder).endswith("whole: holds a run already; --resume goes on with it, or give another folder")
    assert train(tmp_path / "new", resume=True).endswith("new/checkpoint.safetensors: no checkpoint there")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    assert train(tmp_path).endswith(": not empty; give a new folder")
    assert train(tmp_path / "file").endswith("file: a file stands there; a run needs a folder")
    assert "checkpoint.safetensors: another system (mw_cubic_8): temperature: the flow is for 200" in train(
        folder, config.load({**system.config, "temperature": 210.0}), resume=True
    )
    assert "n_atoms: the flow is for 8, this system has 64" in train(folder, config.load("mw_cubic_64"), resume=True)
    assert train(folder, resume=True, given={"batch_size": 64}).endswith(
        ": --batch-size: this run has 16, and a resumed run keeps it; got 64"
    )
    assert train(folder, resume=True, given={"architecture": "atomic_solids"}).endswith(
        ": --architecture: this run has residual, and a resumed run keeps it; got atomic_solids"
    )
    assert "it names a checkpoint" in train(tmp_path / "new", plan=Plan(flow=FlowPlan(checkpoint="x")))
    small = tmp_path / "small"
    small.mkdir()
    checkpoints.save(small / checkpoints.FILE_NAME, checkpoints.parameters_only(checkpoints.read(folder)))
    assert train(small, resume=True).endswith(": holds parameters alone; it can be used, but not resumed")


def test_flows_are_loaded_for_any_size(toy_architecture, finished, system, tmp_path):
    _, folder, _ = finished

    def fit():
        fitted.append(1)
        return toy.isotropic(larger.crystal)

    fitted, larger = [], config.load("mw_cubic_64")
    flow, params = checkpoints.load_flow(system, str(folder), fit)
    assert not fitted  # the reference is in the file
    assert params["log_scale"].dtype == np.float32 and params["log_scale"].shape == (2,)
    stored = checkpoints.read(folder).arrays["state/average/log_scale"]
    np.testing.assert_array_equal(params["log_scale"], stored)
    flow, params = checkpoints.load_flow(larger, str(folder), fit)
    assert fitted == [1]
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), larger.state)
    y, log_det = flow.bijector.forward(params, flow.reference.sample(jax.random.key(0), state), state)
    assert y.shape == (64, 3) and float(log_det) == pytest.approx(189 * float(stored.sum()), rel=1e-5)
    small = tmp_path / "small.safetensors"
    checkpoints.save(small, checkpoints.parameters_only(checkpoints.read(folder)))
    again = checkpoints.load_flow(larger, str(small), fit)[1]["log_scale"]
    assert fitted == [1, 1]
    np.testing.assert_array_equal(again, stored)
    hexagonal = config.load("mw_hexagonal_64")
    assert complaint(checkpoints.load_flow, hexagonal, str(folder), fit).startswith(f"{folder}: another system")
    unknown = dataclasses.replace(checkpoints.read(folder), architecture="novel")
    checkpoints.save(small, unknown)
    assert "no architecture 'novel'" in complaint(checkpoints.load_flow, system, str(small), fit)
    checkpoints.save(small, dataclasses.replace(unknown, architecture="residual", options={"widht": 2}))
    assert "unexpected keyword argument 'widht'" in complaint(checkpoints.load_flow, system, str(small), fit)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    system = tmp_path / "system.yaml"
    values = config.read(SMALL)[2].resolved()
    options = dict.fromkeys(("n_layers", "n_blocks", "n_heads", "n_frequencies"), 1) | {"width": 4, "n_bins": 4}
    training = {"max_steps": 1500, "batch_size": 16, "min_gain": 0.0}
    values["estimate"]["flow"] = {"architecture": "atomic_solids", **options, "training": training}
    system.write_text(config.dump(values))

    def begin(folder, *options):
        command = [sys.executable, "-m", "freeflow", "train", str(system), "-o", str(tmp_path / folder), "--quiet"]
        return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def finish(process):
        _, errors = process.communicate(timeout=500)
        assert process.returncode in {0, 3}, errors

    finish(begin("whole"))
    doomed = begin("killed")
    record = tmp_path / "killed" / "metrics.jsonl"
    while not (record.exists() and record.read_text().count("\n") > 5):
        assert doomed.poll() is None
        time.sleep(0.02)
    doomed.send_signal(signal.SIGKILL)
    doomed.wait(timeout=60)
    at = int(checkpoints.read(tmp_path / "killed").arrays["state/step"])
    assert 0 < at < 1500
    finish(begin("killed", "--resume"))
    same_training(tmp_path / "killed", tmp_path / "whole")
    assert [line["step"] for line in lines(Path(tmp_path / "killed"))] == list(range(0, 1501, 50))
