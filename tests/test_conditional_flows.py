"""Flows for a range of temperatures and densities: what they are told, what they are trained on, whom they fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freeflow import checkpoints, config, flows, preparation, training, training_run
from freeflow.crystals import at_temperature, strained_system
from freeflow.errors import InputError
from freeflow.flows.residual import conditioning
from freeflow.training import Family, over_states, reverse_kl, works_of
from freeflow.types import FlowPlan, Plan, TrainingPlan, double_precision

pytestmark = pytest.mark.code("brief")

SMALL, TINY = "mw_cubic_8", {"n_sweeps": 1, "width": 8, "depth": 1}
RANGES = {"temperatures": [150.0, 260.0], "number_densities": [0.0330, 0.0342]}


@pytest.fixture(scope="module")
def system():
    return config.load(SMALL)


@pytest.fixture(scope="module")
def gaussian(system):
    with double_precision():
        return preparation.fit_gaussian(system, Plan(reference="harmonic"), lambda _: None).gaussian


@pytest.fixture(scope="module")
def flow(system, gaussian):
    return flows.residual(system, gaussian, **TINY, **RANGES)


def wild(flow, state, seed=0):
    """Parameters that move things, the output layers too."""
    x = flow.reference.sample(jax.random.key(0), state)
    shapes = jax.eval_shape(lambda: flow.bijector.init(jax.random.key(0), x, state))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape)), shapes)


# ------------------------------------------------------------------------------ what the map is told


def test_features_run_from_minus_one_to_one_and_lengths_as_the_root_of_the_temperature(system):
    place = conditioning(system, **RANGES)
    density = system.n_atoms / system.crystal.volume
    for t, expected in ((150.0, -1.0), (np.sqrt(150 * 260), 0.0), (260.0, 1.0)):
        state = at_temperature(system, t).state
        low, high = np.log(RANGES["number_densities"])
        told = [expected, (2 * np.log(density) - low - high) / (high - low)]
        np.testing.assert_allclose(place.features(state), told, atol=1e-6)
        assert place.growth(state) == pytest.approx(np.sqrt(t / np.sqrt(150 * 260)), rel=1e-6)
    assert conditioning(system).n_features == 0
    assert conditioning(system).growth(system.state) == 1.0


def test_the_state_reaches_the_map_and_its_jacobian_is_exact(system, flow):
    with double_precision():
        params = wild(flow, system.state)
        x = flow.reference.sample(jax.random.key(2), system.state)
        seen = []
        for t in (160.0, 250.0):
            state = at_temperature(system, t).state
            y, log_det = flow.bijector.forward(params, x, state)
            back, inverse_log_det = flow.bijector.inverse(params, y, state)
            np.testing.assert_allclose(back, x, atol=1e-10)
            assert inverse_log_det == pytest.approx(-float(log_det), abs=1e-9)
            # On the mean-free space, which has an orthonormal basis of 3 (n - 1) vectors.
            n = len(x)
            basis = np.linalg.svd(np.eye(n) - 1 / n)[0][:, : n - 1]
            basis = np.kron(basis, np.eye(3))
            jacobian = jax.jacfwd(lambda u, at=state: flow.bijector.forward(params, u, at)[0])(x)
            inner = basis.T @ np.asarray(jacobian).reshape(3 * n, 3 * n) @ basis
            assert np.linalg.slogdet(inner)[1] == pytest.approx(float(log_det), abs=1e-8)
            seen.append(np.asarray(y))
    assert np.abs(seen[0] - seen[1]).max() > 1e-4


def test_untrained_it_is_the_identity_in_every_state(system, flow):
    x = flow.reference.sample(jax.random.key(3), system.state)
    params = flow.bijector.init(jax.random.key(0), x, system.state)
    for t in (150.0, 260.0):
        y, log_det = flow.bijector.forward(params, x, at_temperature(system, t).state)
        np.testing.assert_allclose(y, x, atol=1e-6)
        assert float(log_det) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ({"temperatures": [250.0, 270.0]}, "200, the system's own, is not between 250 and 270"),
        ({"temperatures": [270.0, 150.0]}, "give the lowest and the highest"),
        ({"number_densities": [0.04, 0.05]}, "the system's own, is not between 0.04 and 0.05"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(system, gaussian, ranges, said):
    with pytest.raises(InputError, match=said):
        flows.residual(system, gaussian, **TINY, **ranges)


# ------------------------------------------------------------------------------ what it is trained on


def test_the_loss_is_the_mean_over_states_each_with_its_own_reference(system, gaussian, flow):
    """Two states of one crystal and one of a denser one, each by itself."""
    colder, warmer = (at_temperature(system, t) for t in (160.0, 240.0))
    dense = strained_system(system, -0.003 * np.eye(3))
    wide = gaussian._replace(root=1.1 * gaussian.root, inverse_root=gaussian.inverse_root / 1.1)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), gaussian, wide)
    states = jax.tree.map(lambda *leaves: np.stack(leaves), colder.state, warmer.state)
    dense_flow = flows.residual(dense, gaussian, **flow.options)
    only = jax.tree.map(lambda leaf: np.asarray(leaf)[None], (gaussian, dense.state))
    families = [Family(flow, stacked, states), Family(dense_flow, *only)]
    keys = jax.random.split(jax.random.key(5), 14)  # four for each state, and two over
    at = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), system.state)
    params = jax.tree.map(lambda leaf: leaf.astype("float32"), wild(flow, at))
    members = [(flow, gaussian, colder), (flow, wide, warmer), (dense_flow, gaussian, dense)]

    @jax.jit  # eagerly it takes ten times as long
    def both(params, keys):
        parts = []
        for k, (own, g, one) in enumerate(members):
            state = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), one.state)
            some = keys[4 * k : 4 * k + 4]
            parts.append(reverse_kl(flows.starting_from(own, g))(params, some, None, state))
        return over_states(families, reverse_kl)(params, keys, None, at), jnp.stack(parts)

    found, parts = both(params, keys)
    assert float(found) == pytest.approx(float(np.mean(parts)), rel=1e-4)
    assert np.ptp(parts) > 1e-3 * abs(np.mean(parts))


def test_losses_from_frames_and_batches_smaller_than_the_states_are_refused(system, gaussian, flow):
    pair = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), (gaussian, system.state))
    families = [Family(flow, *pair)]
    for plan, said in (
        (TrainingPlan(loss="lbar"), "learns from frames of one state"),
        (TrainingPlan(batch_size=1), "at least one sample in each of 2 states"),
    ):
        with pytest.raises(InputError, match=said):
            training.trainer(flow, system.state, plan, 0, families=families)


# ------------------------------------------------------------------------------ files and runs


def test_a_file_fits_what_is_in_its_ranges(system):
    made_for = checkpoints.fingerprint(system)
    ranged = checkpoints.Checkpoint("residual", RANGES, True, made_for, {})
    plain = dataclasses.replace(ranged, options={})
    warm, hot = (at_temperature(system, t) for t in (255.0, 261.0))
    dense, denser = (strained_system(system, s * np.eye(3)) for s in (-0.003, -0.01))
    assert checkpoints.apart(ranged, warm, True) is None
    assert checkpoints.apart(ranged, dense, True) is None
    assert "temperature: the flow is for 150 to 260, this system has 261" in str(checkpoints.apart(ranged, hot, True))
    assert "number_density: the flow is for 0.033 to 0.0342" in str(checkpoints.apart(ranged, denser, True))
    assert "temperature" in str(checkpoints.apart(plain, warm, True))
    assert "number_density" in str(checkpoints.apart(plain, dense, True))
    # Another potential is another potential at every temperature.
    other = config.load("silicon_diamond_64")
    assert checkpoints.apart(ranged, other, True) is not None


@pytest.mark.slow
def test_a_run_trains_in_all_states_goes_on_and_serves_others(system, tmp_path):
    training_plan = TrainingPlan(loss="reverse_kl", max_steps=12, batch_size=8, min_gain=0.0)
    options = {**TINY, "temperatures": [150.0, 260.0]}
    plan = Plan(reference="harmonic", flow=FlowPlan(architecture="residual", options=options, training=training_plan))
    whole = training_run.train(system, tmp_path / "whole", plan)
    assert [round(state["temperature"]) for state in whole.states] == [150, 180, 216, 260]
    assert all(state["ess_fraction"] > 0.2 for state in whole.states)
    bounds = [state["bound_per_atom"] for state in whole.states]
    assert bounds == sorted(bounds)  # beta F of a crystal rises with the temperature
    assert json.loads(whole.json_text())["states"][3]["temperature"] == pytest.approx(260)
    assert "260" in str(whole)
    warm = at_temperature(system, 230.0)
    with double_precision():
        flow, params = checkpoints.load_flow(
            warm, str(tmp_path / "whole"), lambda: preparation.fit_gaussian(warm, plan, lambda _: None).gaussian
        )
        assert flow.options["temperatures"] == [150.0, 260.0]
        own = jax.tree.map(lambda leaf: np.asarray(leaf)[None], (flow.gaussian, warm.state))
        work = works_of(Family(flow, *own), params, 1)[0]
    base = training.baseline(flow, warm.constants, warm.n_atoms, warm.state)
    assert bounds[2] < training.measure(work, base)["bound_per_atom"] < bounds[3]
    with pytest.raises(InputError, match="another system"):
        training_run.train(warm, tmp_path / "whole", plan, resume=True)
