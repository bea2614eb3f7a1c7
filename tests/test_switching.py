"""Switching, Monte Carlo and staged sampling of a solution, against integrals that quadrature gives.

Seeds are fixed. Free energies may miss by 4.5 standard errors, which chance does once in 150 000 times.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from freeflow import switching
from freeflow.bridge import Pilot
from freeflow.errors import InputError
from freeflow.estimators import bar, fep, record
from freeflow.flows.fluid import carrier, no_motion
from freeflow.map_training import shape_for
from freeflow.solutions import solution
from freeflow.switching import (
    Chains,
    Course,
    Fluid,
    StoppedError,
    Switches,
    course_from,
    escorted_course,
    even_course,
    packed,
)
from freeflow.units import UNIT_STYLES

LJ = UNIT_STYLES["lj"]
SIGMAS = 4.5
BOX = 3.4


def one_atom(radii=(0.9, 1.6), temperature=1.5):
    """A single solvent atom; the larger solute reaches beyond half the box."""
    return solution("one", 1, BOX, LJ, temperature, "wca", radii)


@functools.cache
def grid(n=40):
    """Gauss-Legendre nodes in an eighth of the box and weights that make the integral of 1 the volume."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    x, w = BOX / 4 * (nodes + 1), BOX / 4 * weights
    points = np.stack(np.meshgrid(x, x, x), axis=-1).reshape(-1, 3)
    return points, 8 * np.einsum("i,j,k->ijk", w, w, w).ravel()


def exact_energy(points, radius, temperature):
    """beta U of one atom around a WCA solute and all its images."""
    total = np.zeros(len(points))
    for shift in itertools.product((-1, 0, 1), repeat=3):
        r2 = np.sum((points + BOX * np.array(shift)) ** 2, axis=1)
        s6 = (radius**2 / r2) ** 3
        total += np.where(r2 < 2 ** (1 / 3) * radius**2, 4 * (s6 * s6 - s6) + 1, 0)
    return total / temperature


def exact_delta_f(radii, temperatures=(1.5, 1.5)):
    points, weights = grid()
    a, b = (np.sum(weights * np.exp(-exact_energy(points, *state))) for state in zip(radii, temperatures, strict=True))
    return np.log(a / b)


def switched(fluid, course, n_rounds=8, n_batches=2):
    """Work of journeys from chains at both ends."""
    ends = [fluid.equilibrate(lam, n_batches, 100 * k)[0] for k, lam in enumerate((0.0, 1.0))]
    rows = [[], []]
    for _ in range(n_rounds):
        for chains, row in zip(ends, rows, strict=True):
            chains.move("sampling")
            row.append(fluid.across(chains, course))
    return Switches(*(np.array(row) for row in rows))


def assert_agrees(value, error, exact):
    assert error > 0
    assert abs(value - exact) < SIGMAS * error


@pytest.fixture(scope="module")
def lonely():
    with Fluid(one_atom(), seed=3, batch=256) as fluid:
        yield fluid


# --------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("step", [0.05, 0.15])
def test_one_atom_has_the_free_energy_of_quadrature(lonely, step):
    """The larger step does shadow work of many kT now and then, and the acceptance ratio must make up for it.

    Forward work alone does it with the smaller step; backwards the small solute's surroundings are not found in time.
    """
    work = switched(lonely, even_course(12, step))
    exact = exact_delta_f((0.9, 1.6))
    answer = bar(work.work, work.inefficiency)
    assert_agrees(float(answer.delta_f), float(answer.std_error), exact)
    assert float(answer.std_error) < 0.02
    if step < 0.1:
        forward = fep(record(work.forward.ravel()))
        assert_agrees(float(forward.delta_f), float(forward.std_error) * work.inefficiency[0] ** 0.5, exact)


def test_moves_sample_the_ensemble(lonely):
    """Distances to the solute against their distribution by quadrature, with a step that many moves reject."""
    chains = Chains(lonely, 1.0, 0.2, lonely.packed(1.0, 4, 300), 300)
    for _ in range(40):
        chains.move("equilibration")
    r, chains.moves, chains.accepted = [], 0, 0.0
    for _ in range(20):
        for _ in range(3):
            chains.move("sampling")
        x = chains.positions()
        r.append(np.linalg.norm(x - BOX * np.round(x / BOX), axis=2).ravel())
    assert 0.2 < chains.accepted / chains.moves < 0.9
    points, weights = grid()
    p = weights * np.exp(-exact_energy(points, 1.6, 1.5))
    edges = np.array([0, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.2, 3.0])
    expected = np.histogram(np.linalg.norm(points, axis=1), edges, weights=p)[0] / p.sum()
    counts = np.histogram(np.concatenate(r), edges)[0]
    # Quadrature knows the shares to 1e-3; samples three moves apart count as half of their number.
    statistic = np.sum((counts / counts.sum() - expected) ** 2 / (expected / (0.5 * counts.sum()) + 1e-6))
    assert stats.chi2.sf(statistic, len(expected) - 1) > 1e-5


def test_pair_at_two_temperatures_has_the_free_energy_of_quadrature():
    """No solute at all: two atoms, whose separation alone matters, heated from 1 to 2."""
    problem = solution("pair", 2, BOX, LJ, (1.0, 2.0), "wca", (0.0, 0.0))
    points, weights = grid()
    r2 = np.sum(points**2, axis=1)
    cutoff = BOX / 2
    u = np.where(r2 < cutoff**2, 4 * (r2**-6.0 - r2**-3.0 - cutoff**-12 + cutoff**-6), 0)
    exact = np.log(np.sum(weights * np.exp(-u)) / np.sum(weights * np.exp(-u / 2)))
    with Fluid(problem, seed=5, batch=256) as fluid:
        work = switched(fluid, even_course(10, 0.08))
    answer = bar(work.work, work.inefficiency)
    assert_agrees(float(answer.delta_f), float(answer.std_error), exact)
    assert float(answer.std_error) < 0.01


def test_solute_grows_from_a_point():
    with Fluid(one_atom(radii=(0.0, 1.2)), seed=6, batch=256) as fluid:
        work = switched(fluid, even_course(120, 0.08), n_rounds=6)
        course = course_from(fluid.pilot(fluid.equilibrate(0.0, 1, 500)[0], even_course(128, 0.08)), 60)
    answer = bar(work.work, work.inefficiency)
    assert_agrees(float(answer.delta_f), float(answer.std_error), exact_delta_f((0.0, 1.2)))
    assert course.n_stages == 60 and course.lambdas[0] == 0 and course.lambdas[-1] == 1
    assert (np.diff(course.lambdas) > 0).all()


def test_equal_states_do_not_differ():
    """Four atoms: what is done along a way that leads nowhere is shadow work, and its exponential average is 1."""
    with Fluid(solution("four", 4, BOX, LJ, 1.2, "wca", (1.0, 1.0)), seed=8, batch=128) as fluid:
        work = switched(fluid, even_course(20, 0.07), n_rounds=6)
    assert np.std(work.forward) > 0.03
    answer = bar(work.work, work.inefficiency)
    assert_agrees(float(answer.delta_f), float(answer.std_error), 0.0)


def test_staged_sampling_has_the_free_energy_of_quadrature(lonely):
    chains, found = lonely.equilibrate(0.0, 1, 700)
    assert found.reached and 0.7 < found.acceptance < 1
    staged = lonely.staged(chains, np.linspace(0, 1, 4), n_rounds=12)
    assert staged.n_k.tolist() == [12 * 256] * 4
    assert_agrees(staged.delta_f, staged.std_error, exact_delta_f((0.9, 1.6)))
    middle = exact_delta_f((0.9, 0.9 + 0.7 / 3))
    assert_agrees(staged.f_k[1], staged.raw_error[0, 1] * staged.inefficiencies.max() ** 0.5, middle)
    assert staged.std_error < 0.05


def some_escort(problem, forgetful=False):
    """A field of no particular merit, or the same without its log det."""
    shape = shape_for(problem, hops=False)
    rng = np.random.default_rng(4)
    # Towards the corners of the box, where one atom spreads over less and less room.
    params = {name: rng.normal(0.0, 0.03, leaf.shape) for name, leaf in no_motion(shape).items()}
    params["waves"][0] = 0.4
    carry = carrier(params, shape)
    return (lambda x, span: (carry(x, span)[0], jnp.zeros(x.shape[2]))) if forgetful else carry


@pytest.mark.parametrize("relaxation", [1, 5])
def test_an_escort_of_no_merit_does_no_harm_and_one_without_its_log_det_does(relaxation):
    exact = exact_delta_f((1.2, 1.4))
    with Fluid(one_atom((1.2, 1.4)), seed=4, batch=256) as fluid:
        courses = [escorted_course(some_escort(fluid.solution, k), 5, 0.05, relaxation) for k in (False, True)]
        right, wrong = (bar(switched(fluid, course).work, (2.0, 2.0)) for course in courses)
        # Two courses, two directions, 8 rounds of 2 batches: five legs each, and the steps between them.
        assert fluid.evaluations["switching"] == 2 * 2 * 8 * 2 * 256 * (5 + 4 * relaxation)
    assert courses[0].n_stages == 4 * relaxation
    assert_agrees(float(right.delta_f), float(right.std_error), exact)
    assert float(right.std_error) < 0.02
    assert abs(float(wrong.delta_f) - exact) > 10 * float(wrong.std_error)


def test_an_escorted_way_back_undoes_the_way_there(lonely):
    """With a map and no steps, a journey is the map: what it makes of B's samples leads back to where they were."""
    carry = some_escort(lonely.solution)
    x = jnp.asarray(np.random.default_rng(1).uniform(1.0, 1.6, (1, 3, 256)), jnp.float32)
    y, log_det = carry(x, 0.25)
    back, log_det_back = carry(y, -0.25)
    np.testing.assert_allclose(back, x, atol=2e-5)
    np.testing.assert_allclose(log_det_back, -log_det, atol=2e-5)
    assert float(jnp.max(jnp.abs(y - x))) > 0.01


# --------------------------------------------------------------------------- machinery


def test_given_frames_are_carried_like_chains(lonely):
    """Frames of B, more than a batch and no multiple of it, bring back the free energy with the opposite sign."""
    chains, _ = lonely.equilibrate(1.0, 2, 800)
    samples = lonely.sample(chains, 3, 3)
    assert samples.frames.shape == (3 * 512, 1, 3) and samples.inefficiency >= 1
    np.testing.assert_array_equal(samples.frames[:3], samples.x[:, 0])
    u = jax.vmap(lonely.solution.b.reduced_potential, (0, None))(jnp.asarray(samples.x[-1]), lonely.solution.state)
    np.testing.assert_allclose(u, samples.u[-1], rtol=1e-5, atol=1e-5)
    work = lonely.across_from(samples.frames[:1300], even_course(12, 0.05), lam=1.0)
    assert work.shape == (1300,)
    back = fep(record(work))
    assert_agrees(float(back.delta_f), 1.3 * float(back.std_error), -exact_delta_f((0.9, 1.6)))


def test_the_number_of_threads_changes_nothing(lonely, monkeypatch):
    """Same seed, same numbers, on one thread and on three; batches from the same place go different ways."""
    rows = []
    for workers in (1, 3):
        monkeypatch.setattr(switching, "n_workers", lambda workers=workers: workers)
        with Fluid(lonely.solution, seed=9, batch=256) as fluid:
            chains = Chains(fluid, 0.0, 0.1, 3 * fluid.packed(0.0, 1, 0), 0)
            chains.move("sampling")
            rows.append(np.concatenate([fluid.across(chains, even_course(4, 0.1)), chains.energies()]))
    np.testing.assert_array_equal(*rows)
    parts = np.split(rows[0][: 3 * 256], 3)
    assert not np.array_equal(parts[0], parts[1]) and not np.array_equal(parts[1], parts[2])


def test_ways_there_and_back_visit_the_same_stages():
    course = Course(np.array([0.0, 0.2, 0.7, 1.0]), 0.1)
    assert course.n_stages == 3
    assert course.forward.stages.tolist() == [0.2, 0.7, 1.0]
    assert course.reverse.stages.tolist() == [1.0, 0.7, 0.2]
    assert (course.forward.start, course.forward.end, course.reverse.start, course.reverse.end) == (0, 1, 1, 0)


def test_stages_are_dense_where_the_way_is_hard():
    """Work whose variance per switch is nine times larger in the second half."""
    rng = np.random.default_rng(0)
    work = rng.normal(size=(16, 4000)) * np.repeat([1.0, 3.0], 8)[:, None]
    pilot = Pilot(np.linspace(0, 1, 17), np.full(16, 16), np.full(16, 0.02), np.ones(16), work, 0.0)
    course = course_from(pilot, 400)
    in_first_half = np.mean(course.lambdas < 0.5)
    assert in_first_half == pytest.approx(0.25, abs=0.04)
    assert course.step == 0.02
    # L^2 = K var / 2 over stages of equal length: [sqrt(8 * 16 * 8 / 2) (1 + 3)]^2 / ...
    foreseen = switching.stages_for(pilot, variance=1.0)
    assert foreseen == pytest.approx((8 * 1.0 + 8 * 3.0) ** 2 * 16, rel=0.1)


@pytest.mark.parametrize("lost", [1e30, np.inf])
def test_a_lost_journey_has_no_say_in_memory_and_stages(lonely, monkeypatch, lost):
    """Work of 400 chains that forgets half from round to round (g = 3), and one journey that flew apart."""
    rng = np.random.default_rng(3)
    work = np.zeros((50, 400))
    for k in range(1, 50):
        work[k] = 0.5 * work[k - 1] + rng.normal(size=400)
    sound = switching.memory(work[10:])
    assert sound == pytest.approx(3.0, rel=0.1)
    work[30, 7] = lost
    assert switching.memory(work[10:]) == pytest.approx(sound, rel=0.1)
    assert switching.memory(np.full((50, 4), lost)) == 1.0

    with Fluid(lonely.solution, seed=1, batch=256) as fluid:
        chains = Chains(fluid, 0.0, 0.1, fluid.packed(0.0, 1, 0), 0)
        pieces = rng.normal(size=(16, 256))

        def journeys(*_):
            return [switching.Journey(np.cumsum(pieces, axis=0), chains.x[0])]

        monkeypatch.setattr(fluid, "_journeys", journeys)
        stages = switching.stages_for(fluid.pilot(chains, even_course(2560, 0.1)))
        pieces[5, 3] = lost
        assert switching.stages_for(fluid.pilot(chains, even_course(2560, 0.1))) == pytest.approx(stages, rel=0.1)


def test_journeys_stop_when_asked(lonely):
    with Fluid(lonely.solution, seed=1, batch=256) as fluid:
        chains = Chains(fluid, 0.0, 0.1, fluid.packed(0.0, 1, 0), 0)
        fluid.stop()
        with pytest.raises(StoppedError):
            fluid.across(chains, even_course(4, 0.1))


def test_evaluations_are_counted(lonely):
    with Fluid(lonely.solution, seed=1, batch=256) as fluid:
        chains = Chains(fluid, 0.0, 0.1, fluid.packed(0.0, 2, 0), 0)
        fluid.across(chains, even_course(7, 0.1))
        assert fluid.evaluations["switching"] == 7 * 2 * 256


@pytest.mark.parametrize(("n", "radius"), [(1, 0.0), (30, 0.0), (20, 1.5), (200, 1.0)])
def test_packed_atoms_stand_apart_and_outside_the_solute(n, radius):
    problem = solution("packed", n, BOX, LJ, 1.0, "wca", (radius, radius))
    x = packed(problem, radius, 5, np.random.default_rng(0))
    assert x.shape == (n, 3, 5)
    assert (np.linalg.norm(x, axis=1) > 0.9 * radius).all()
    first = x[:, :, 0]
    d = first[:, None] - first[None]
    d = np.linalg.norm(d - BOX * np.round(d / BOX), axis=2)[~np.eye(n, dtype=bool)]
    assert (d > 0.5 * (BOX**3 / max(n, 4)) ** (1 / 3)).all() if n > 1 else True


def test_no_room_is_an_error():
    problem = solution("full", 5, BOX, LJ, 1.0, "wca", (0.5, 0.5))
    with pytest.raises(InputError, match="find no room"):
        packed(problem, 4.0, 1, np.random.default_rng(0))
