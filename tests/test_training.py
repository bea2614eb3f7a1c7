"""Losses against known answers, steps against their rules, and runs that are cut off and go on."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_flows as toy
from fake_results import fake_system
from scipy.stats import norm

from freeflow import training
from freeflow.errors import FreeflowError, InputError
from freeflow.training import Compiled, Limits, begin, compile_trainer, run, trainer
from freeflow.types import Ensemble, TrainingPlan

PLAN = TrainingPlan(loss="reverse_kl", max_steps=300, batch_size=32, learning_rate=0.03, min_gain=0.0)
SOME = {"log_width": np.array([0.2, -0.1, 0.3], "float32"), "centre": np.array([0.1, 0.2, -0.4], "float32")}


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def kl(params):
    """KL(flow || target) of the affine flow, in closed form."""
    ratio = np.exp(np.asarray(params["log_width"], float)) / toy.WIDTH
    off = (np.asarray(params["centre"], float) - toy.CENTRE) / toy.WIDTH
    return float(np.sum(0.5 * (ratio**2 + off**2 - 1) - np.log(ratio)))


def forward_kl(params):
    """KL(target || flow) of the affine flow, in closed form."""
    ratio = toy.WIDTH / np.exp(np.asarray(params["log_width"], float))
    off = (np.asarray(params["centre"], float) - toy.CENTRE) / np.exp(np.asarray(params["log_width"], float))
    return float(np.sum(0.5 * (ratio**2 + off**2 - 1) - np.log(ratio)))


def frames(n, seed=5):
    return toy.CENTRE + toy.WIDTH * np.random.default_rng(seed).standard_normal((n, 3))


@pytest.fixture(scope="module")
def gaussian():
    """The affine flow's trainer, compiled once."""
    made = trainer(toy.gaussian_flow(), toy.STATE, PLAN, seed=3)
    return made, compile_trainer(made)


def equal(a, b):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves_a) == len(leaves_b)
    return all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


# ------------------------------------------------------------------------------ losses


def test_work_there_and_back_is_equal_and_opposite():
    flow = toy.gaussian_flow(quartic=0.1)
    x = flow.reference.sample(jax.random.key(1), toy.STATE)
    y, _ = flow.bijector.forward(SOME, x, toy.STATE)
    there = float(training.forward_work(flow, flow.target)(SOME, jax.random.key(1), toy.STATE))
    z = (y - toy.CENTRE) / toy.WIDTH
    by_hand = float(jnp.sum(0.5 * z**2 + 0.1 * z**4 - 0.5 * x**2) - SOME["log_width"].sum())
    assert there == pytest.approx(by_hand, abs=1e-6)
    assert training.reverse_work(flow, flow.target)(SOME, y, toy.STATE) == pytest.approx(-there, abs=1e-6)
    assert training.path_work(flow, flow.target)(SOME, jax.random.key(1), toy.STATE) == pytest.approx(there, abs=1e-6)


def test_losses_are_the_divergences():
    # 4096 samples, work with a standard deviation below 2.5 kT: 5 standard errors are 0.2 (one in 10^6).
    flow, n = toy.gaussian_flow(), 4096
    shift = -toy.LOG_PARTITION + 1.5 * math.log(2 * math.pi)  # reverse_kl = KL + delta F
    y = jnp.asarray(frames(n))
    assert training.reverse_kl(flow)(SOME, keys(n), None, toy.STATE) == pytest.approx(kl(SOME) + shift, abs=0.2)
    entropy = 1.5 * (1 + math.log(2 * math.pi)) + float(np.log(toy.WIDTH).sum())  # of the target
    expected = forward_kl(SOME) + entropy - 1.5 * math.log(2 * math.pi)
    assert training.forward_kl(flow)(SOME, keys(n), y, toy.STATE) == pytest.approx(expected, abs=0.2)
    both = training.lbar(flow)(SOME, keys(n), y, toy.STATE)
    assert both == pytest.approx(kl(SOME) + forward_kl(SOME), abs=0.4)


def test_exact_flows_have_no_divergence_and_no_gradient_along_paths():
    flow = toy.gaussian_flow()
    y = jnp.asarray(frames(64))
    exact = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, "float64"), {"log_width": np.log(toy.WIDTH), "centre": toy.CENTRE}
    )
    value = training.lbar(flow)(exact, keys(64), y, toy.STATE)
    assert abs(float(value)) < 1e-12
    path = jax.jit(jax.grad(training.reverse_kl(flow, path_gradient=True)))(exact, keys(64), None, toy.STATE)
    plain = jax.jit(jax.grad(training.reverse_kl(flow)))(exact, keys(64), None, toy.STATE)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(path)) < 1e-12
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)) > 1e-3


def test_both_gradients_have_the_same_mean():
    # Six components, each within 5.2 standard errors: one false alarm in a million.
    flow = toy.gaussian_flow(quartic=0.05)

    def gradients(work):
        one = jax.vmap(jax.grad(work(flow, flow.target)), (None, 0, None))
        return np.concatenate([np.asarray(leaf) for leaf in jax.tree.leaves(one(SOME, keys(4096), toy.STATE))], axis=1)

    plain, path = gradients(training.forward_work), gradients(training.path_work)
    apart = plain - path
    z = apart.mean(axis=0) / (apart.std(axis=0) / math.sqrt(len(apart)))
    assert np.abs(z).max() < norm.isf(1e-6 / 12)
    assert np.abs(plain.mean(axis=0)).max() > 0.3  # and it is not that of zero


def test_wild_work_counts_by_its_logarithm():
    calm = np.random.default_rng(0).standard_normal(100)
    np.testing.assert_array_equal(training.tamed(jnp.asarray(calm)), calm)
    wild = jnp.asarray(np.append(calm, 1e6))
    assert float(training.tamed(wild)[-1]) < 40
    slope = jax.grad(lambda w: jnp.mean(training.tamed(w)))(wild)
    np.testing.assert_allclose(slope[:-1], 1 / 101, rtol=1e-12)
    assert 0 < float(slope[-1]) < 1e-7
    # One at 0, the others at 1: median 1, spread max(sqrt(2 / 9), 1), threshold 11, where it is continuous.
    around = [float(training.tamed(jnp.asarray([0.0] + 7 * [1.0] + [w]))[-1]) for w in (10.999, 11.0, 11.001)]
    np.testing.assert_allclose(around, [10.999, 11.0, 11 + math.log1p(0.001)], rtol=1e-12)


def test_losses_that_do_not_exist():
    with pytest.raises(InputError, match=r"training.loss: no loss 'kl'; use one of reverse_kl, path_gradient"):
        trainer(toy.gaussian_flow(), toy.STATE, TrainingPlan(loss="kl"), 0)


# ------------------------------------------------------------------------------ steps


def test_the_rate_rises_and_falls_to_zero():
    plan = TrainingPlan(learning_rate=1e-3)
    rate = [float(training.learning_rate(plan, np.int32(k), np.int32(1000))) for k in (0, 24, 49, 500, 999, 1000, 2000)]
    np.testing.assert_allclose(rate[:2], [1e-3 / 50, 0.5e-3 * (1 + math.cos(math.pi * 0.024)) / 2], rtol=1e-3)
    assert max(rate) == rate[2] > 0.99e-3
    np.testing.assert_allclose(rate[3:], [0.5e-3, 0, 0, 0], atol=1e-8)


@pytest.mark.parametrize("loss", ["reverse_kl", "path_gradient", "forward_kl", "lbar"])
def test_training_finds_the_exact_map(loss):
    plan = dataclasses.replace(PLAN, loss=loss)
    made = trainer(toy.gaussian_flow(), toy.STATE, plan, seed=1)
    # The fit to 20 000 frames is off by a KL of about 3e-4, six parameters over twice the frames.
    given = jnp.asarray(frames(20_000)) if loss in {"forward_kl", "lbar"} else None
    compiled = compile_trainer(made, given)
    session, ending = run(begin(made, compiled, plan, toy.BASE), compiled, plan, toy.BASE)
    first, last = session.metrics[0], session.metrics[-1]
    assert ending == "finished" and last["step"] == 300 and last["skipped_steps"] == 0
    assert first["ess_fraction"] < 0.7
    assert last["ess_fraction"] > 0.99
    assert kl(session.state.average) < 5e-3 < 0.3 < kl({"log_width": np.zeros(3), "centre": np.zeros(3)})
    assert 3 * last["bound_per_atom"] == pytest.approx(-toy.LOG_PARTITION, abs=0.03)


def test_the_bound_is_above_the_free_energy_by_the_divergence(gaussian):
    _, compiled = gaussian
    work = compiled.evaluate(jax.tree.map(jnp.asarray, SOME), 7)
    assert work.shape == (256,) and work.dtype == np.float64
    metrics = training.measure(work, toy.BASE)
    error = metrics["bound_std_error"]
    # Five standard errors: one false alarm in 10^6.
    assert abs(3 * metrics["bound_per_atom"] + toy.LOG_PARTITION - kl(SOME)) < 5 * 3 * error
    assert 0 < error < 0.1
    assert not np.array_equal(work, compiled.evaluate(jax.tree.map(jnp.asarray, SOME), 8))  # fresh samples


def test_lost_samples_are_counted_and_left_out():
    work = np.array([1.0, 1.0, np.inf, 1.0])
    metrics = training.measure(work, toy.BASE)
    assert metrics["lost_fraction"] == 0.25 and metrics["ess_fraction"] == pytest.approx(0.75)
    assert metrics["bound_per_atom"] == pytest.approx((1 + toy.BASE.constant) / 3)
    assert training.measure(np.full(4, np.inf), toy.BASE)["bound_per_atom"] is None


def test_baseline_is_the_convention():
    base = training.baseline(toy.gaussian_flow(), {"a": 3.0, "b": -1.0}, 3, toy.STATE)
    assert base == (2.0 - 1.5 * math.log(2 * math.pi), 3)
    shifted = dataclasses.replace(toy.gaussian_flow(), log_measure=0.5)
    assert training.baseline(shifted, {}, 3, toy.STATE).constant == pytest.approx(toy.BASE.constant - 0.5)


def test_steps_depend_on_seed_and_number_only(gaussian):
    made, compiled = gaussian
    start = jax.jit(made.init)()._replace(horizon=jnp.asarray(300, "int32"))
    once = compiled.advance(start, 7)
    assert equal(compiled.advance(compiled.advance(start, 3), 4), once)
    assert not equal(compiled.advance(start, 6).params, once.params)
    other = trainer(toy.gaussian_flow(), toy.STATE, PLAN, seed=4)
    assert not equal(compile_trainer(other).advance(start, 7).params, once.params)


def test_parameters_stay_in_single_precision(gaussian):
    made, compiled = gaussian
    state = compiled.advance(jax.jit(made.init)()._replace(horizon=jnp.asarray(300, "int32")), 2)
    for leaf in jax.tree.leaves((state.params, state.average, state.moments.mu, state.moments.nu)):
        assert leaf.dtype == np.float32
    assert state.loss.dtype == np.float64


def test_long_gradients_are_cut(gaussian):
    made, compiled = gaussian
    start = jax.jit(made.init)()._replace(horizon=jnp.asarray(300, "int32"))

    def length(tree):
        return math.sqrt(sum(float(jnp.sum(leaf.astype("float64") ** 2)) for leaf in jax.tree.leaves(tree)))

    first = compiled.advance(start, 1)
    whole = length(first.moments.mu) / 0.1  # Adam's first moment is a tenth of the first gradient
    assert first.usual_norm == pytest.approx(whole, rel=1e-5)
    cut = compiled.advance(start._replace(usual_norm=jnp.asarray(0.01 * whole, "float32")), 1)
    assert length(cut.moments.mu) / 0.1 == pytest.approx(PLAN.clip * 0.01 * whole, rel=1e-5)
    kept = compiled.advance(start._replace(usual_norm=jnp.asarray(whole, "float32")), 1)
    assert length(kept.moments.mu) / 0.1 == pytest.approx(whole, rel=1e-5)


def test_steps_that_are_not_finite_are_skipped_and_counted():
    def sometimes(y, state):
        return jnp.where(y[0] > 1.5, jnp.nan, jnp.sum(0.5 * y**2))

    plan = dataclasses.replace(PLAN, batch_size=2)
    made = trainer(toy.gaussian_flow(training_target=sometimes), toy.STATE, plan, seed=0)
    compiled = compile_trainer(made)
    state = jax.jit(made.init)()._replace(horizon=jnp.asarray(1000, "int32"))
    skipped = 0
    for k in range(1, 31):
        new = compiled.advance(state, 1)
        assert int(new.step) == k
        if int(new.skipped) > skipped:
            skipped += 1
            assert equal(new._replace(step=state.step, skipped=state.skipped), state)
        else:
            assert not equal(new.params, state.params)
        state = new
    # A pair has one above 1.5 with probability 0.13: none or all of 30 are rarer than one in 60, but the seed is fixed.
    assert 0 < skipped < 30 and int(state.used) == 30 - skipped


def test_training_without_any_finite_step_is_an_error():
    plan = dataclasses.replace(PLAN, max_steps=40)
    made = trainer(toy.gaussian_flow(training_target=lambda y, state: jnp.nan * y[0]), toy.STATE, plan, seed=0)
    compiled = compile_trainer(made)
    with pytest.raises(FreeflowError, match="none of the last 10 steps had a finite energy and gradient"):
        run(begin(made, compiled, plan, toy.BASE), compiled, plan, toy.BASE)


def test_the_average_follows_the_parameters(gaussian):
    made, compiled = gaussian
    state = jax.jit(made.init)()._replace(horizon=jnp.asarray(300, "int32"))
    expected = np.zeros(3)
    for k in range(4):
        state = compiled.advance(state, 1)
        share = min(0.99, (1 + k) / (10 + k))
        expected = share * expected + (1 - share) * np.asarray(state.params["centre"], float)
    np.testing.assert_allclose(state.average["centre"], expected, rtol=1e-5)


# ------------------------------------------------------------------------------ runs


def numbers(metrics):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in metrics]


@pytest.mark.parametrize("pause", [1, 20, 37])
def test_a_run_in_pieces_is_the_same_run(gaussian, pause):
    made, compiled = gaussian
    plan = dataclasses.replace(PLAN, max_steps=60)
    whole, ending = run(begin(made, compiled, plan, toy.BASE), compiled, plan, toy.BASE)
    assert ending == "finished" and [line["step"] for line in whole.metrics] == [0, 10, 20, 30, 40, 50, 60]
    part, ending = run(begin(made, compiled, plan, toy.BASE), compiled, plan, toy.BASE, Limits(max_step=pause))
    assert ending == "step_limit" and int(part.state.step) == pause
    rest, ending = run(part, compiled, plan, toy.BASE)
    assert ending == "finished"
    assert equal(rest.state, whole.state)
    assert numbers(rest.metrics) == numbers(whole.metrics)
    again, ending = run(rest, compiled, plan, toy.BASE)  # what is complete stays as it is
    assert ending == "finished" and again is rest


def test_an_interrupt_keeps_what_is_complete(gaussian):
    made, compiled = gaussian
    seen = []

    def watch(session):
        seen.append(session)
        if int(session.state.step) >= 30:
            raise KeyboardInterrupt

    plan = dataclasses.replace(PLAN, max_steps=60)
    session, ending = run(begin(made, compiled, plan, toy.BASE), compiled, plan, toy.BASE, watch=watch)
    assert ending == "interrupted" and session is seen[-1]
    rest, _ = run(session, compiled, plan, toy.BASE)
    whole, _ = run(begin(made, compiled, plan, toy.BASE), compiled, plan, toy.BASE)
    assert equal(rest.state, whole.state) and numbers(rest.metrics) == numbers(whole.metrics)


def test_training_in_memory_ends_the_schedule_or_not_at_all():
    system = fake_system(state=toy.STATE)
    plan = dataclasses.replace(PLAN, max_steps=20)
    session = training.train_flow(toy.gaussian_flow(), system, plan, 3)
    assert int(session.state.step) == 20
    assert training.energy_evaluations(session, plan) == 20 * 32 + 3 * 256

    def interrupt(session):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train_flow(toy.gaussian_flow(), system, plan, 3, interrupt)


def line(k, loss):
    return {"step": k, "training_loss": loss}


def test_plateaus():
    rng = np.random.default_rng(0)
    noise = 0.001 * rng.standard_normal(20)
    flat = [line(0, None), *(line(k, 5 + noise[k]) for k in range(20))]
    assert training.on_plateau(flat, 0.01)
    assert not training.on_plateau(flat, 0.0)
    assert not training.on_plateau(flat[:-1], 0.01)  # too short to tell
    falling = [line(k, 5 - 0.002 * k + noise[k]) for k in range(20)]  # 0.02 from window to window
    assert not training.on_plateau(falling, 0.01)
    assert training.on_plateau(falling, 0.05)
    loud = [line(k, 5 + 100 * noise[k]) for k in range(20)]  # too noisy to tell
    assert not training.on_plateau(loud, 0.01)
    rising = [line(k, 5 + 0.1 * k) for k in range(20)]
    assert training.on_plateau(rising, 0.01)


def test_a_run_ends_on_a_plateau(gaussian):
    made, _ = gaussian
    flow = dataclasses.replace(toy.gaussian_flow(), training_target=Ensemble(lambda y, state: jnp.sum(0.5 * y**2)))
    plan = dataclasses.replace(PLAN, min_gain=0.01)
    made = trainer(flow, toy.STATE, plan, seed=3)  # the identity is exact from the start
    compiled = compile_trainer(made)
    session, ending = run(begin(made, compiled, plan, toy.BASE), compiled, plan, toy.BASE)
    assert ending == "plateau"
    assert 200 <= int(session.state.step) < 300
    assert run(session, compiled, plan, toy.BASE)[1] == "plateau"  # and stays ended


def slow(compiled, now, per_step, per_evaluation):
    def advance(state, steps):
        now.seconds += per_step * steps
        return compiled.advance(state, steps)

    def evaluate(params, index):
        now.seconds += per_evaluation
        return compiled.evaluate(params, index)

    return Compiled(advance, evaluate)


def test_the_horizon_is_what_fits_the_time(gaussian, monkeypatch):
    made, compiled = gaussian
    now = toy.clock(monkeypatch, training)
    taking = slow(compiled, now, 0.1, 0.5)
    plan = dataclasses.replace(PLAN, max_steps=None)
    session = begin(made, taking, plan, toy.BASE, budget_ends=60.0)
    horizon = int(session.state.horizon)
    run(session, taking, plan, toy.BASE)
    assert 50 < now.seconds < 60.5
    assert int(begin(made, taking, PLAN, toy.BASE, now.seconds + 1e6).state.horizon) == PLAN.max_steps
    assert int(begin(made, taking, plan, toy.BASE, now.seconds + 1e6).state.horizon) > 100 * horizon
    assert int(begin(made, taking, plan, toy.BASE, now.seconds).state.horizon) == 10  # nothing left: a token run
    assert int(begin(made, taking, plan, toy.BASE).state.horizon) == training.DEFAULT_STEPS


def test_a_deadline_pauses(gaussian, monkeypatch):
    made, compiled = gaussian
    now = toy.clock(monkeypatch, training)
    taking = slow(compiled, now, 0.1, 0.0)
    session, ending = run(begin(made, taking, PLAN, toy.BASE), taking, PLAN, toy.BASE, Limits(deadline=5.0))
    assert ending == "time_limit"
    assert 50 <= int(session.state.step) < 60
    assert session.seconds == pytest.approx(now.seconds)


def test_two_devices_share_a_batch(gaussian):
    code = (
        "import jax, numpy as np; jax.config.update('jax_enable_x64', True)\n"
        "import toy_flows as toy; from freeflow.training import *\n"
        "from freeflow.types import TrainingPlan\n"
        "assert jax.local_device_count() == 2\n"
        "plan = TrainingPlan(loss='reverse_kl', max_steps=300, batch_size=31, learning_rate=0.03)\n"
        "made = trainer(toy.gaussian_flow(), toy.STATE, plan, seed=3)\n"
        "compiled = compile_trainer(made)\n"
        "state = jax.jit(made.init)()._replace(horizon=jax.numpy.asarray(300, 'int32'))\n"
        "print(*np.asarray(compiled.advance(state, 5).params['centre']).tolist())\n"
        "print(compiled.evaluate(state.params, 0).mean())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    centre, mean = done.stdout.splitlines()
    made, compiled = gaussian
    state = jax.jit(made.init)()._replace(horizon=jnp.asarray(300, "int32"))
    np.testing.assert_allclose(np.array(centre.split(), float), compiled.advance(state, 5).params["centre"], rtol=1e-4)
    assert float(mean) == pytest.approx(compiled.evaluate(state.params, 0).mean(), rel=1e-9)
