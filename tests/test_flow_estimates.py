"""Estimates with learned flows: trained on the spot or read from checkpoints, with and without a bridge.

Random tests fix their seeds. Four standard errors raise one false alarm in 16 000 per comparison;
there are about ten here.
"""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

import freeflow as ff
from freeflow import checkpoints, cli, training_run
from freeflow.checkpoints import Checkpoint
from freeflow.errors import InputError
from freeflow.flows import atomic_solids
from freeflow.types import FlowPlan, TrainingPlan

PUBLISHED_8 = (-25.8652, 3e-4)  # Wirnsberger et al. 2022, flow
OPTIONS = {"n_sweeps": 1, "width": 8, "depth": 1}
TRAINING = {"max_steps": 300, "batch_size": 16, "learning_rate": 0.01}
# From an Einstein crystal, which leaves the flow more to do than the usual reference.
LOOSE = {"target_error": 0.004, "max_samples": 4_000, "seed": 2, "reference": "einstein"}


@pytest.fixture(scope="module")
def small():
    return ff.load("mw_cubic_8")


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A folder with a flow, and how its training went."""
    folder = tmp_path_factory.mktemp("run") / "mw"
    flow = FlowPlan(architecture="residual", options=OPTIONS, training=TrainingPlan(**TRAINING))
    result = training_run.train(small, folder, replace(small.plan, flow=flow, seed=2, reference="einstein"))
    return folder, result


@pytest.fixture(scope="module")
def inline(small):
    """Trained on the spot, and used for targeted perturbation; with what it reported on the way."""
    reports = []
    flow = {"architecture": "residual", **OPTIONS, "training": TRAINING}
    return ff.estimate(small, flow=flow, bridge=None, progress=reports.append, **LOOSE), reports


@pytest.fixture(scope="module")
def ways(small, trained):
    """One checkpoint, used in every way."""
    flow = {"checkpoint": str(trained[0])}
    variants = {"bridge": {"bridge": 32}, "bar": {"bridge": 32, "estimator": "bar"}, "auto": {"bridge": "auto"}}
    return {name: ff.estimate(small, flow=flow, **{**LOOSE, **way}) for name, way in variants.items()}


def far(result, value, error):
    return abs(result.beta_f_per_atom - value) / math.hypot(result.beta_f_per_atom_std_error, error)


# ------------------------------------------------------------------------- residual


def test_a_flow_trained_on_the_spot_meets_the_published_value(inline):
    result, reports = inline
    assert result.status == "converged" and result.estimator == "fep"
    assert result.beta_f_per_atom_std_error <= result.plan.target_error
    assert far(result, *PUBLISHED_8) < 4
    phases = list(dict.fromkeys(report.phase for report in reports))
    assert phases == ["flow", "reference", "training", "sampling"]
    assert {"flow", "sampling"} <= set(result.wall_seconds)


def test_training_is_billed(inline):
    result, _ = inline
    spent = result.energy_evaluations
    # 300 steps of 16 samples, and 256 at the beginning and after every tenth step.
    assert spent["training"] == 300 * 16 + 31 * 256
    assert spent["reference"] >= 256
    assert spent["sampling"] == result.n_samples and spent["tuning"] == spent["checks"] == 0
    assert "training 12 736" in str(result) and result.to_dict()["energy_evaluations"] == sum(spent.values())


def test_components_add_up_with_a_flow(inline):
    result, _ = inline
    assert math.fsum(result.components.values()) == pytest.approx(result.beta_f, rel=1e-12)
    assert result.components["work"] == result.delta_f
    assert result.plan.flow.architecture == "residual" and result.plan.flow.training.max_steps == 300
    # What stands in the provenance repeats the run.
    assert ff.load(result.provenance["config"]).plan == result.plan


def test_training_lowers_the_bound(trained):
    _, result = trained
    first, last = result.metrics[0], result.metrics[-1]
    assert result.ending == "finished" and result.step == 300 and not result.worse
    error = math.hypot(first["bound_std_error"], last["bound_std_error"])
    assert first["bound_per_atom"] - last["bound_per_atom"] > 10 * error
    assert last["bound_per_atom"] > PUBLISHED_8[0] - 4 * math.hypot(last["bound_std_error"], PUBLISHED_8[1])
    assert last["work_variance"] < 0.2 * first["work_variance"]
    assert last["lost_fraction"] == last["skipped_steps"] == 0


@pytest.mark.parametrize("way", ["bridge", "bar", "auto"])
def test_a_checkpoint_meets_the_published_value(ways, way):
    result = ways[way]
    assert result.status == "converged"
    assert far(result, *PUBLISHED_8) < 4
    # The reference is that of the file, and was paid for when it was trained.
    assert result.energy_evaluations["training"] == 0
    assert result.energy_evaluations["reference"] < 256


def test_every_way_starts_from_the_reference_of_the_checkpoint(ways, trained):
    log_z = trained[1].flow.reference.log_partition(trained[1].system.state)
    for result in ways.values():
        assert result.components["reference"] == pytest.approx(-float(log_z), abs=1e-9)


def test_an_even_flow_needs_no_bridge(ways, inline, trained):
    """Trial samples show it; the estimate is then that without a bridge, from the same parameters."""
    auto, without = ways["auto"], inline[0]
    np.testing.assert_array_equal(auto.work.forward, without.work.forward)
    assert auto.beta_f == without.beta_f
    assert auto.energy_evaluations["tuning"] == 512
    # The weights are as even as training said; variances of 256 samples are known to 20 %.
    assert auto.work.forward.var() == pytest.approx(trained[1].metrics[-1]["work_variance"], rel=0.8)


def test_a_bridge_does_the_rest(ways):
    """It anneals in the flow's latent space and leaves less noise than the flow alone."""
    assert ways["bridge"].work.forward.var() < 0.5 * ways["auto"].work.forward.var()
    result = ways["bridge"]
    assert result.energy_evaluations["sampling"] == result.n_samples * (32 + 1)
    assert result.energy_evaluations["tuning"] > 512
    two_way = ways["bar"]
    assert len(two_way.work.reverse) == two_way.n_samples and two_way.overlap is not None


# ------------------------------------------------------------------------- atomic solids


@pytest.fixture(scope="module")
def untrained(small, tmp_path_factory):
    """A checkpoint of an atomic-solids flow with random parameters, near the identity."""
    options = {"n_layers": 1, "n_blocks": 1, "width": 8, "n_heads": 2, "n_bins": 4, "n_frequencies": 2, "stddev": 0.1}
    flow = atomic_solids(small, **options)
    x = flow.reference.sample(jax.random.key(0), small.state)
    rng = np.random.default_rng(0)
    # The last layers start at zero; what they make of the others' output is no larger than this.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: rng.normal(0, 3e-3 if "out" in jax.tree_util.keystr(path) else 0.3, leaf.shape),
        jax.eval_shape(flow.bijector.init, jax.random.key(1), x, small.state),
    )
    arrays = {name: leaf.astype("float32") for name, leaf in checkpoints.flatten("parameters", params).items()}
    path = tmp_path_factory.mktemp("untrained") / "flow.safetensors"
    fingerprint = checkpoints.fingerprint(small)
    checkpoints.save(path, Checkpoint("atomic_solids", flow.options, False, fingerprint, arrays))
    return path


@pytest.mark.slow
def test_fractional_coordinates_and_a_bridge_meet_the_published_value(small, untrained):
    """The measure of the torus, the truncation of the reference and its end on the bridge, together."""
    result = ff.estimate(small, flow={"checkpoint": str(untrained)}, bridge=200, seed=4, max_samples=256)
    assert result.n_samples == 256 and np.isfinite(result.work.forward).all()
    assert result.work.forward.mean() - result.delta_f < 1  # [kT]: slow enough for its error bar to hold
    assert result.beta_f_per_atom_std_error < 0.03
    assert far(result, *PUBLISHED_8) < 4
    assert result.energy_evaluations["training"] == 0


# ------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 210.0}, r"temperature: the flow is for 200, this system has 210"),
        (
            {"potential": {"kind": "stillinger_weber", "preset": "mw", "lambda": 24.0, "nearest_image_only": True}},
            "potential.lambda: the flow is for 23.15, this system has 24",
        ),
    ],
)
def test_a_flow_for_another_system_is_refused(small, trained, change, message):
    values = {**small.config, **change}
    values.pop("published", None)
    other = ff.load(values)
    with pytest.raises(InputError, match=message) as caught:
        ff.estimate(other, flow={"checkpoint": str(trained[0])}, **LOOSE)
    assert str(caught.value).startswith(str(trained[0])) and "\n" not in str(caught.value)


def test_a_flow_for_another_size_is_refused_where_it_cannot_serve(untrained):
    with pytest.raises(InputError, match="n_atoms: the flow is for 8, this system has 64"):
        ff.estimate(ff.load("mw_cubic_64"), flow={"checkpoint": str(untrained)}, **LOOSE)


def test_the_command_line_refuses_it_too(capsys, trained):
    status = cli.main(["estimate", "lj_fcc_32", "--checkpoint", str(trained[0])])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and "another system (mw_cubic_8): units" in err
    assert "Traceback" not in err
