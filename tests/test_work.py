"""Batches of crossings: what they return, what they cost, and that nothing but the seed decides them.

Random tests fix their seeds; a bound of five standard errors raises one false alarm in 2e6.
"""

import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freeflow import bridge as bridges
from freeflow import work as works
from freeflow.bridge import BridgeParams, Schedule
from freeflow.crystals import lattice_crystal
from freeflow.estimators import bar, record
from freeflow.references import gaussian_crystal, gaussian_from_blocks
from freeflow.types import Ensemble, ThermodynamicState
from freeflow.work import BridgeSampler, systematic_resample

STATE = ThermodynamicState(np.float64(1.0), np.float64(0.0))
BATCH, STAGES, SETTLE = 256, 12, 20
SCHEDULE = Schedule(np.array([0.0, 0.3, 1.0]), np.array([0.9, 0.7]), np.array([5, 7], np.int32))
SPREAD, STIFF = 0.1, 1.8


def whitened(u):
    return u / SPREAD


def toy():
    """Two atoms: a Gaussian reference, a target of 1.8 times the precision, and a kernel that is a bit off."""
    crystal = lattice_crystal("bcc", (1, 1, 1), lattice_constant=1.0)
    blocks = np.zeros((1, 2, 1, 3, 3))
    blocks[0, 0, 0] = np.eye(3) / SPREAD**2
    gaussian = gaussian_from_blocks(crystal, blocks)
    exact = Ensemble(lambda u, state: 0.5 * STIFF * jnp.sum(whitened(u) ** 2, dtype="float64"))
    cheap = Ensemble(lambda u, state: exact.reduced_potential(u, state) + 0.1 * jnp.sum(jnp.cos(3 * whitened(u))))
    return gaussian_crystal(crystal), gaussian, exact, cheap


RECIPE, GAUSSIAN, EXACT, CHEAP = toy()
DELTA_F = 1.5 * math.log(STIFF)
PARAMS = BridgeParams(GAUSSIAN, SCHEDULE)


def make(seed=0, target=EXACT):
    return BridgeSampler(RECIPE, bridges.bridge(RECIPE, CHEAP, "float64"), target, STATE, BATCH, seed)


@pytest.fixture(scope="module")
def sampler():
    sampler = make()
    yield sampler
    sampler.close()


@pytest.fixture(scope="module")
def crossings(sampler):
    """Sixteen batches over the bridge and back, what they reported and what they were billed."""
    told, before = [], dict(sampler.energy_evaluations)
    out = [job.result() for job in sampler.cross(PARAMS, range(16), told.append, SETTLE)]
    billed = {name: n - before.get(name, 0) for name, n in sampler.energy_evaluations.items()}
    return out, told, billed


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------ what is right


def test_forward_work_gives_the_exact_ratio_whatever_the_kernel(crossings):
    # The kernel of the stages is wrong by tenths of kT; the last switch puts that right.
    forward = np.concatenate([crossing.forward for crossing in crossings[0]])
    assert np.concatenate([crossing.correction for crossing in crossings[0]]).std() > 0.05
    weights = np.exp(DELTA_F - forward)
    assert abs(weights.mean() - 1) < 5 * weights.std() / math.sqrt(len(weights))


def test_both_ways_give_the_exact_difference(crossings):
    forward = np.concatenate([crossing.forward for crossing in crossings[0]])
    reverse = np.concatenate([crossing.reverse for crossing in crossings[0]])
    # Siblings share a parent: no more than twice the variance after twenty stages.
    answer = bar(record(forward, reverse), inefficiency=(1.0, 2.0))
    assert abs(float(answer.delta_f) - DELTA_F) < 5 * float(answer.std_error)
    weights = np.exp(-DELTA_F - reverse)
    assert abs(weights.mean() - 1) < 5 * math.sqrt(2) * weights.std() / math.sqrt(len(weights))


def test_heavy_arrivals_have_many_children(crossings):
    # Arrivals differ little in weight here: the correlation shows over all batches, not within each.
    counts = np.concatenate([np.bincount(crossing.parents, minlength=BATCH) for crossing in crossings[0]])
    assert counts.sum() == len(counts) == 16 * BATCH
    weights = np.exp(-np.concatenate([crossing.forward for crossing in crossings[0]]))
    assert np.corrcoef(counts, weights)[0, 1] > 0.2


def test_acceptance_is_a_share(crossings):
    assert all(0.5 < crossing.acceptance <= 1 for crossing in crossings[0])


def test_without_a_bridge_the_switch_is_made_at_once(sampler):
    nothing = Schedule(np.array([0.0]), np.empty(0), np.empty(0, np.int32))
    before = dict(sampler.energy_evaluations)
    jobs = sampler.cross(BridgeParams(GAUSSIAN, nothing), range(16))
    work = np.concatenate([job.result().forward for job in jobs])
    weights = np.exp(DELTA_F - work)
    assert abs(weights.mean() - 1) < 5 * weights.std() / math.sqrt(len(weights))
    after = sampler.energy_evaluations
    assert after["sampling"] - before.get("sampling", 0) == 16 * BATCH
    assert after["checks"] == before["checks"]
    # w = (STIFF - 1) |z|^2 / 2 with three degrees of freedom; 4096 samples, five errors.
    assert abs(work.mean() - 1.5 * (STIFF - 1)) < 5 * math.sqrt(1.5) * (STIFF - 1) / math.sqrt(len(work))


def test_an_atom_off_its_site_has_infinite_work(sampler):
    inside = Ensemble(
        lambda u, state: jnp.where(
            jnp.max(jnp.sum(whitened(u) ** 2, axis=1)) < 1.0, EXACT.reduced_potential(u, state), jnp.inf
        )
    )
    walled = make(target=inside)
    try:
        lost = np.isposinf(walled.cross(PARAMS, [0])[0].result().forward)
        free = sampler.cross(PARAMS, [0])[0].result().forward
        work = walled.cross(PARAMS, [0])[0].result().forward
        assert 0 < lost.sum() < BATCH and not np.isnan(work).any()
        np.testing.assert_allclose(work[~lost], free[~lost], atol=1e-12)
    finally:
        walled.close()


# ---------------------------------------------------------------------------------------- what it costs


def test_every_evaluation_is_counted_once(crossings):
    out, told, billed = crossings
    batches = len(out)
    there, back = 1 + STAGES, SETTLE + STAGES
    assert billed["sampling"] == batches * BATCH * (there + back)
    assert billed["checks"] == batches * BATCH * 2
    assert sum(told) == batches * BATCH * (STAGES + back)  # all but the first fetch


def test_one_way_costs_its_stages(sampler):
    before = dict(sampler.energy_evaluations)
    sampler.cross(PARAMS, [3])[0].result()
    assert sampler.energy_evaluations["sampling"] - before["sampling"] == BATCH * (STAGES + 1)
    assert sampler.energy_evaluations["checks"] - before["checks"] == BATCH


def test_energies_and_gradients_on_demand(sampler):
    rng, before = np.random.default_rng(0), sampler.energy_evaluations["reference"]
    z = rng.standard_normal((2 * BATCH, 2, 3))
    z -= z.mean(axis=1, keepdims=True)
    energies, gradients = sampler.evaluate(GAUSSIAN, z)
    function = jax.jit(
        jax.vmap(jax.value_and_grad(lambda z: CHEAP.reduced_potential(RECIPE.colour(GAUSSIAN, z), STATE)))
    )
    expected = function(jnp.asarray(z))
    np.testing.assert_allclose(energies, expected[0], atol=1e-12)
    np.testing.assert_allclose(gradients, expected[1], atol=1e-12)
    assert sampler.energy_evaluations["reference"] - before == 2 * BATCH


# ----------------------------------------------------------------------------- what decides the numbers


def test_a_batch_depends_on_its_number_alone(sampler, crossings):
    again = sampler.cross(PARAMS, [5], settle=SETTLE)[0].result()
    assert same(again, crossings[0][5])
    assert not np.array_equal(crossings[0][4].forward, crossings[0][5].forward)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(monkeypatch, crossings, workers):
    monkeypatch.setattr(works, "n_workers", lambda: workers)
    other = make()
    try:
        assert other.workers == workers
        jobs = other.cross(PARAMS, range(4), settle=SETTLE)
        assert all(same(job.result(), crossing) for job, crossing in zip(jobs, crossings[0], strict=False))
    finally:
        other.close()


def test_the_seed_changes_everything(crossings):
    other = make(seed=1)
    try:
        forward = other.cross(PARAMS, [0])[0].result().forward
        assert not np.isin(forward, np.concatenate([crossing.forward for crossing in crossings[0]])).any()
    finally:
        other.close()


def test_there_is_at_least_one_worker():
    assert works.n_workers() >= 1


def test_a_stopped_sampler_returns_nothing():
    other, reached, go = make(), threading.Event(), threading.Event()

    def pause(_):
        reached.set()
        go.wait(60)

    try:
        job = other.cross(PARAMS, [0], pause)[0]
        assert reached.wait(60)
        other.stop()
        go.set()
        assert job.result() is None
    finally:
        go.set()
        other.close()


# ------------------------------------------------------------------------------------------------ pilots


def test_a_pilot_goes_all_the_way(sampler):
    seen, before = [], sampler.energy_evaluations["tuning"]
    pilot = sampler.pilot(GAUSSIAN, seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert pilot.lambdas[0] == 0 and pilot.lambdas[-1] == 1 and pilot.lost == 0
    n = pilot.work.shape[1]
    assert n % BATCH == 0
    assert sampler.energy_evaluations["tuning"] - before == n * (pilot.counts.sum() + 1)
    # Its own work gives the ratio too, of the kernel that it walks with: close to the exact one.
    weights = np.exp(DELTA_F - pilot.work.sum(axis=0))
    assert abs(weights.mean() - 1) < 0.3


def test_a_pilot_can_follow_a_schedule(sampler):
    pilot = sampler.pilot(GAUSSIAN, schedule=SCHEDULE)
    np.testing.assert_allclose(pilot.lambdas, SCHEDULE.lambdas)
    np.testing.assert_array_equal(pilot.counts, SCHEDULE.counts)


# -------------------------------------------------------------------------------------------- resampling


def test_resampling_is_as_even_as_whole_numbers_allow():
    rng = np.random.default_rng(0)
    for _ in range(50):
        log_weights = 3 * rng.standard_normal(100) - 1_000
        weights = np.exp(log_weights - log_weights.max())
        counts = np.bincount(systematic_resample(log_weights, rng), minlength=100)
        assert counts.sum() == 100
        assert (np.abs(counts - 100 * weights / weights.sum()) < 1).all()


def test_resampling_is_unbiased():
    rng, log_weights = np.random.default_rng(0), np.log([0.1, 0.25, 0.65])
    counts = np.array([np.bincount(systematic_resample(log_weights, rng), minlength=3) for _ in range(20_000)])
    # Counts are whole numbers within one of 3 p, so their variance is at most 1/4.
    np.testing.assert_allclose(counts.mean(axis=0), [0.3, 0.75, 1.95], atol=5 * 0.5 / math.sqrt(20_000))


def test_resampling_passes_over_what_cannot_be_weighed():
    log_weights = np.array([-np.inf, 0.0, np.nan, 0.0, -np.inf])
    counts = np.bincount(systematic_resample(log_weights, np.random.default_rng(0)), minlength=5)
    assert counts[[0, 2, 4]].sum() == 0 and sorted(counts[[1, 3]]) == [2, 3]
    np.testing.assert_array_equal(systematic_resample(np.full(4, -np.inf), np.random.default_rng(0)), np.arange(4))
