"""Maps between two sampled ensembles: training on two Gaussians that a linear map connects exactly, and fields.

Fields are fitted to one and two atoms around a solute, whose free energies follow from quadrature and from a second
code path. Bounds on random numbers are five standard errors.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freeflow.bijectors import affine, elementwise, identity
from freeflow.errors import FreeflowError, InputError
from freeflow.estimators import bar
from freeflow.flows.fluid import field, fluid_map, no_motion, numbers_of, partners
from freeflow.map_training import (
    MapPlan,
    Parts,
    fit_map,
    folds,
    rates,
    shape_for,
    solvent_core,
    train_map,
    work_of_frames,
)
from freeflow.solutions import solution
from freeflow.types import Bijector, Ensemble, ThermodynamicState
from freeflow.units import UNIT_STYLES

STATE = ThermodynamicState(np.float64(1.0), np.float64(0.0))
N, WIDTH, CENTRE = 4, 0.6, 0.5
DELTA_F = -3 * N * math.log(WIDTH)
A = Ensemble(lambda x, state: 0.5 * state.beta * jnp.sum(x * x))
B = Ensemble(lambda y, state: 0.5 * state.beta * jnp.sum(((y - CENTRE) / WIDTH) ** 2))
MAP = elementwise(affine(), shared_axes=(0, 1))


def frames(which, n=400, seed=0):
    z = np.random.default_rng([seed, which]).standard_normal((n, N, 3))
    return z if which == 0 else CENTRE + WIDTH * z


def cut_by_time(frames, train=0.4, stop=0.1):
    """The first frames to train on, the next to stop on, and the rest to estimate from."""
    first, second = round(train * len(frames)), round((train + stop) * len(frames))
    return Parts(frames[:first], frames[first:second], frames[second:])


def parts(n=4000):
    return cut_by_time(frames(0, n)), cut_by_time(frames(1, n))


@pytest.fixture(scope="module")
def trained():
    a, b = parts()
    plan = MapPlan(max_minutes=None, max_steps=300, learning_rate=0.03, looks=10, average=0.9)
    return train_map(MAP, A, B, a, b, STATE, plan)


@pytest.mark.parametrize(("n_folds", "n_chains", "blocks"), [(2, 1, [10, 11]), (3, 7, [6, 9, 6]), (4, 3, [5, 5, 6, 5])])
def test_folds_are_estimated_from_once_and_never_by_who_saw_them(n_folds, n_chains, blocks):
    """Whole chains, here of three frames each, where there are enough of them."""
    x = np.arange(21.0)[:, None, None] * np.ones((1, N, 3))
    parts = folds(x, n_folds, n_chains)
    assert [len(part.estimate) for part in parts] == blocks
    np.testing.assert_array_equal(np.concatenate([part.estimate for part in parts]), x)
    for part in parts:
        seen = np.concatenate([part.train, part.stop])
        assert len(seen) + len(part.estimate) == len(x)
        assert not set(seen[:, 0, 0]) & set(part.estimate[:, 0, 0])


def test_folds_of_too_few_frames_are_refused():
    with pytest.raises(InputError, match=r"estimate\.map\.folds: 7 frames in 4 folds"):
        folds(frames(0, 7), 4)


def test_two_sided_training_finds_the_exact_map(trained):
    """After it all work is the same: variance and error bar vanish, where those of plain BAR do not."""
    a, b = parts()
    work = work_of_frames(MAP, trained.params, A, B, a.estimate, b.estimate, STATE)
    assert work.forward.dtype == np.float64 and work.forward.shape == (2000,) == work.reverse.shape
    np.testing.assert_allclose(work.forward, DELTA_F, atol=0.5)
    np.testing.assert_allclose(work.reverse, -DELTA_F, atol=0.5)
    plain = bar(work_of_frames(identity(), (), A, B, a.estimate, b.estimate, STATE))
    assert float(bar(work).std_error) < 0.1 * float(plain.std_error)


def test_the_record_says_who_saw_what(trained):
    assert trained.frames == ((1600, 1600), (400, 400))
    assert trained.steps == 300 and trained.skipped == 0 and trained.ending == "finished"
    assert trained.looks[0].step == 0 and trained.looks[0].training_loss is None
    assert trained.best.held_out_loss == min(look.held_out_loss for look in trained.looks) < 0.2
    assert trained.looks[0].held_out_loss > 10
    # Two energies of 16 frames of either side in every step, and of all held-out frames in every look.
    assert trained.energy_evaluations == 2 * (300 * 32 + len(trained.looks) * 800)


def test_one_sided_training_needs_no_frames_of_b():
    plan = MapPlan("lfep", max_minutes=None, max_steps=200, learning_rate=0.03, looks=10, average=0.9)
    found = train_map(MAP, A, B, parts()[0], None, STATE, plan)
    # The mean work is above the free energy difference, by the divergence that is left.
    assert DELTA_F - 1e-3 < found.best.held_out_loss < DELTA_F + 0.2
    assert found.frames == ((1600, 0), (400, 0))


def test_frames_of_the_estimate_are_never_read():
    a, b = parts(60)
    poisoned = [part._replace(estimate=np.full_like(part.estimate, np.nan)) for part in (a, b)]
    plan = MapPlan(max_minutes=None, max_steps=12, looks=2)
    clean, other = (train_map(MAP, A, B, *pair, STATE, plan) for pair in ((a, b), poisoned))
    np.testing.assert_array_equal(clean.params, other.params)
    spoiled = (a._replace(train=poisoned[0].estimate), b)
    with pytest.raises(FreeflowError, match="finite"):
        train_map(MAP, A, B, *spoiled, STATE, plan)


def test_steps_that_are_not_finite_are_left_out_and_counted():
    a, b = parts(60)
    a.train[:2] = np.nan
    plan = MapPlan(max_minutes=None, max_steps=100, looks=3, batch_size=8, learning_rate=0.03)
    found = train_map(MAP, A, B, a, b, STATE, plan)
    # A batch of 8 from 24 frames misses both with probability 0.50; five standard deviations.
    assert abs(found.skipped - 50) < 25
    assert np.isfinite(found.params).all() and found.best.held_out_loss < found.looks[0].held_out_loss


def test_training_stops_when_held_out_frames_say_that_it_overfits():
    """A map with parameters of its own for every number, and three frames to learn them from."""
    wild = elementwise(affine())
    a, b = (cut_by_time(frames(k, 60), 0.05, 0.5) for k in (0, 1))
    plan = MapPlan(max_minutes=None, max_steps=3000, looks=100, patience=5, learning_rate=0.03)
    found = train_map(wild, A, B, a, b, STATE, plan)
    assert found.ending == "overfitting" and found.steps < 3000
    assert found.looks[-1].held_out_loss > found.best.held_out_loss
    # The parameters are those of the best look, and not of the last.
    work = work_of_frames(wild, found.params, A, B, a.stop, b.stop, STATE)
    np.testing.assert_allclose(work.forward.mean() + work.reverse.mean(), found.best.held_out_loss, rtol=2e-3)


def test_a_minute_is_a_minute():
    plan = MapPlan(max_minutes=0.02, looks=3)
    found = train_map(MAP, A, B, *parts(60), STATE, plan)
    assert found.ending == "finished" and found.steps > 0
    assert 1.2 <= found.looks[-1].seconds < 30  # compiling counts, and cannot be cut short


def test_symmetries_turn_frames_anew_in_every_step():
    """With frames on the positive side only, reflections take the centre of the map back to zero."""
    x = np.abs(frames(0, 200))
    narrow = Ensemble(lambda y, state: 0.5 * state.beta * jnp.sum((y / WIDTH) ** 2))

    def reflect(key, x):
        return x * jax.random.rademacher(key, (1, 3), x.dtype)

    plan = MapPlan("lfep", max_minutes=None, max_steps=300, learning_rate=0.03, looks=5)
    shifts = []
    for augment in (None, reflect):
        a = cut_by_time(x)._replace(stop=frames(0, 40, seed=1))
        found = train_map(MAP, A, narrow, a, None, STATE, plan, augment)
        shifts.append(abs(float(found.params.reshape(-1)[1])))
    # One-sided work is that of an even function: the shift is about zero with reflections, and not without.
    assert shifts[1] < 0.1 < shifts[0]


def test_interrupted_training_keeps_what_it_has():
    looks = []

    def watch(look):
        looks.append(look)
        if len(looks) == 3:
            raise KeyboardInterrupt

    plan = MapPlan(max_minutes=None, max_steps=100, looks=10)
    found = train_map(MAP, A, B, *parts(60), STATE, plan, watch=watch)
    assert found.ending == "interrupted" and 0 < found.steps < 100
    assert found.best in looks


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [(MapPlan("lfep", max_minutes=None), "never ends"), (MapPlan("lbar"), "frames of B"), (MapPlan("kl"), "no loss")],
)
def test_impossible_plans_are_refused(plan, complaint):
    with pytest.raises(InputError, match=complaint):
        train_map(MAP, A, B, parts(60)[0], None, STATE, plan)


def test_work_of_frames_that_a_map_spoils_is_infinite_and_batches_do_not_matter():
    wall = Ensemble(lambda y, state: jnp.where(jnp.max(y) > 1.5, jnp.inf, 0.0))
    x = frames(0, 70)
    params = MAP.init(jax.random.key(0), jnp.zeros((N, 3)), STATE)
    whole, small = (work_of_frames(MAP, params, A, wall, x, x[:0], STATE, batch) for batch in (64, 9))
    np.testing.assert_array_equal(whole.forward, small.forward)
    np.testing.assert_array_equal(np.isinf(whole.forward), x.max(axis=(1, 2)) > 1.5)
    assert len(whole.reverse) == 0


def test_a_map_that_forgets_its_log_det_is_caught_by_the_two_sides():
    """Forward and reverse work of a wrong map disagree: the means no longer bracket the difference."""
    broken = Bijector(MAP.init, lambda p, x, s: (MAP.forward(p, x, s)[0], 0.0 * x[0, 0]), MAP.inverse)
    params = jnp.asarray([[[3 * math.atanh(math.log(WIDTH) / 3), CENTRE]]])  # the scale is bounded softly
    a, b = parts()
    work = work_of_frames(broken, params, A, B, a.estimate, b.estimate, STATE)
    np.testing.assert_allclose(-work.reverse, DELTA_F, atol=1e-9)
    assert abs(work.forward.mean() - DELTA_F) > 1


# ------------------------------------------------------------------------------ fields

L, RADII, TEMPERATURES = 4.0, (1.2, 1.5), (2.0, 1.6)


def around_a_solute(n, temperature=1.5, radii=RADII):
    return solution("test", n, L, UNIT_STYLES["lj"], temperature, "wca", radii)


def drawn(problem, which, n, seed):
    """Exact samples of one atom: rejection from the whole box; and its free energy -ln Z by the same numbers."""
    rng = np.random.default_rng([seed, which])
    x = rng.uniform(-L / 2, L / 2, (5 * n, 1, 3))
    ensemble = (problem.a, problem.b)[which]
    u = np.asarray(jax.jit(jax.vmap(lambda one: ensemble.reduced_potential(one, problem.state)))(jnp.asarray(x)))
    return x[rng.random(len(x)) < np.exp(-u)][:n]  # u >= 0: the solute repels


def log_partition(problem, which, m=120):
    """ln Z of one atom, by the midpoint rule on a grid."""
    ticks = (np.arange(m) + 0.5) / m * L / 2
    grid = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    ensemble = (problem.a, problem.b)[which]
    u = jax.jit(jax.vmap(lambda one: ensemble.reduced_potential(one, problem.state)))(jnp.asarray(grid))
    return math.log(L**3 * float(jnp.mean(jnp.exp(-u))))


@pytest.fixture(scope="module")
def one_atom():
    problem = around_a_solute(1)
    a, b = (cut_by_time(drawn(problem, k, 1500, seed=2), 0.3, 0.1) for k in (0, 1))
    shape = shape_for(problem, hops=False)
    return problem, a, b, shape, fit_map(problem, a, b, shape)


def test_a_fitted_map_gives_the_exact_answer_with_a_smaller_error_bar(one_atom):
    problem, a, b, shape, fitted = one_atom
    exact = log_partition(problem, 0) - log_partition(problem, 1)
    answers = [
        bar(work_of_frames(bijector, params, problem.a, problem.b, a.estimate, b.estimate, problem.state))
        for bijector, params in ((identity(), ()), (fluid_map(shape), fitted.params))
    ]
    plain, mapped = ((float(e.delta_f), float(e.std_error)) for e in answers)
    assert abs(plain[0] - exact) < 5 * plain[1]
    assert abs(mapped[0] - exact) < 5 * mapped[1] + 1e-3
    assert mapped[1] < 0.5 * plain[1]


def test_the_record_of_a_fit_says_who_saw_what(one_atom):
    *_, fitted = one_atom
    assert fitted.frames == ((450, 450), (150, 150)) and fitted.energy_evaluations == 1200
    assert 0 < fitted.left_over[0] < 0.3 and 0 < fitted.left_over[1] < 0.4


def test_a_fit_never_reads_the_frames_of_the_estimate(one_atom):
    problem, a, b, shape, fitted = one_atom
    poisoned = (part._replace(estimate=np.full_like(part.estimate, np.nan)) for part in (a, b))
    np.testing.assert_array_equal(numbers_of(fit_map(problem, *poisoned, shape).params), numbers_of(fitted.params))


def test_what_a_field_offers_has_mean_zero_in_equilibrium(one_atom):
    """The divergence theorem, in any state: five standard errors for each of 61 functions."""
    problem, _, b, shape, _ = one_atom
    functions = rates(problem, 1.0, b.train, shape).offered
    moving = functions.std(axis=0) > 0  # one atom has no pairs
    error = functions.std(axis=0)[moving] / math.sqrt(len(functions))
    assert moving.sum() == 19
    assert (np.abs(functions.mean(axis=0)[moving]) < 5 * error).all()


@pytest.mark.parametrize("lam", [0.4, 1.0])
def test_rates_against_autodiff_with_the_temperature_changing_too(lam):
    problem = around_a_solute(2, TEMPERATURES)
    # Both within reach of the solute, and of each other.
    x = np.random.default_rng(3).uniform(0.7, 0.9, (5, 2, 3)) * np.array([[[1.0, 1, 1], [-1, 1, 1]]])
    shape = shape_for(problem)
    found = rates(problem, lam, x, shape, batch=2)

    @jax.jit
    def u(lam, x):
        radius = RADII[0] + lam * (RADII[1] - RADII[0])
        beta = problem.betas[0] + lam * (problem.betas[1] - problem.betas[0])
        return problem.reduced_potential(x, radius, ThermodynamicState(beta, np.float64(0.0)))

    h = 1e-5
    wanted = [float(u(lam + h, one) - u(lam - h, one)) / (2 * h) for one in jnp.asarray(x)]
    np.testing.assert_allclose(found.wanted, wanted, rtol=2e-4, atol=1e-4)
    params = {name: np.full(leaf.shape, 0.3) for name, leaf in no_motion(shape).items()}
    batch = jnp.asarray(np.moveaxis(x, 0, -1)).swapaxes(0, 1)
    v, divergence = field(params, batch, shape, partners(batch, shape)[0])
    slope = jax.jit(jax.grad(u, 1))
    gradient = jnp.stack([slope(lam, one).T for one in jnp.asarray(x)], axis=-1)
    expected = divergence - jnp.sum(v * gradient, axis=(0, 1))
    np.testing.assert_allclose(found.offered @ numbers_of(params), expected, rtol=2e-3, atol=1e-3)


def test_a_fit_from_one_side_needs_no_frames_of_b(one_atom):
    problem, a, b, shape, both = one_atom
    found = fit_map(problem, a, None, shape)
    assert found.frames == ((450, 0), (150, 0))
    # What is learned at A serves at B, though less well than what is learned at both.
    far = rates(problem, 1.0, b.train, shape)
    assert far.left_over(numbers_of(both.params)) < far.left_over(numbers_of(found.params)) < 0.8


def test_core_of_a_solvent():
    problem = around_a_solute(20)
    core = solvent_core(problem)
    at = float(problem.solvent.pair(jnp.asarray(core**2)))
    assert at == pytest.approx(problem.kt, rel=0.02)


@pytest.mark.slow
def test_work_trains_a_fitted_field_further_or_leaves_it(one_atom):
    """The field is a map like any other: training on work goes on where the fit ended."""
    problem, a, b, shape, fitted = one_atom
    plan = MapPlan(max_minutes=None, max_steps=20, looks=2, learning_rate=1e-3, batch_size=8)
    further = train_map(
        fluid_map(shape, steps=2), problem.a, problem.b, a, b, problem.state, plan, params=fitted.params
    )
    assert further.skipped == 0
    assert further.best.held_out_loss <= further.looks[0].held_out_loss
