"""The bridge against targets whose free energy is known exactly.

Random tests fix their seeds. A bound of five standard errors raises one false alarm in 2e6 per
check; this file makes about a hundred checks, so fresh seeds would fail it once in 2e4 times.
"""

import functools
import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from freeflow import bridge as bridges
from freeflow.bridge import BridgeParams, Pace, Pilot, Schedule, Segment
from freeflow.crystals import lattice_crystal
from freeflow.estimators import bar, record
from freeflow.references import gaussian_crystal, gaussian_from_blocks
from freeflow.types import Ensemble, ThermodynamicState
from freeflow.work import forward_work, reverse_work

STATE = ThermodynamicState(np.float64(1.0), np.float64(0.0))
SIGMAS = 5.0


class Toy(NamedTuple):
    """A crystal, a reference and a target whose free energy difference is known."""

    recipe: Any
    gaussian: Any
    target: Ensemble
    delta_f: float
    sample_target: Any  # (rng, n) -> (n, n_atoms, 3)

    @property
    def reference(self):
        return self.recipe.ensemble(self.gaussian)


# Two atoms with a fixed centre have one relative vector q: three independent coordinates.
SPREAD = 0.1


def quartic_well(q):
    """Lopsided and stiff: far enough from a Gaussian that large steps are often rejected."""
    return 0.2 * q**2 + 0.3 * q**3 + 0.3 * q**4


def relative(u):
    """White coordinates (..., 3) of two atoms' displacements (..., 2, 3) from a Gaussian of width SPREAD."""
    return (u[..., 0, :] - u[..., 1, :]) / (math.sqrt(2) * SPREAD)


def from_relative(q):
    return SPREAD * np.stack([q, -q], axis=-2) / math.sqrt(2)


def tabulated(energy, low=-8.0, high=8.0):
    """Grid, probabilities and integral of exp(-energy) along one coordinate."""
    q = np.linspace(low, high, 200_001)
    weight = np.exp(-energy(q))
    integral = weight.sum() * (q[1] - q[0])
    return q, weight / weight.sum(), integral


def draw(energy, rng, shape):
    q, p, _ = tabulated(energy)
    return np.interp(rng.random(shape), np.cumsum(p), q)


def quartic():
    crystal = lattice_crystal("bcc", (1, 1, 1), lattice_constant=1.0)
    recipe = gaussian_crystal(crystal)
    blocks = np.zeros((1, 2, 1, 3, 3))
    blocks[0, 0, 0] = np.eye(3) / SPREAD**2
    gaussian = gaussian_from_blocks(crystal, blocks)
    target = Ensemble(lambda u, state: jnp.sum(quartic_well(relative(u)), dtype="float64"))
    integral = tabulated(quartic_well)[2]
    return Toy(
        recipe,
        gaussian,
        target,
        -3 * math.log(integral / math.sqrt(2 * math.pi)),
        lambda rng, n: from_relative(draw(quartic_well, rng, (n, 3))),
    )


def coupled():
    """Four atoms; the target is a Gaussian crystal that the reference does not resemble."""
    crystal = lattice_crystal("fcc", (1, 1, 1), lattice_constant=1.6)
    recipe = gaussian_crystal(crystal)

    def blocks(spring, tensor):
        out = np.zeros((1, 4, 1, 3, 3))
        out[0, :, 0] = -np.asarray(tensor)
        out[0, 0, 0] = spring * np.eye(3) + 3 * np.asarray(tensor)
        return out

    reference = gaussian_from_blocks(crystal, blocks(100.0, np.zeros((3, 3))))
    bond = np.array([[20.0, 5.0, 0.0], [5.0, 10.0, -4.0], [0.0, -4.0, 30.0]])
    b = gaussian_from_blocks(crystal, blocks(60.0, bond))
    # Every mode but the uniform one has the precision 60 + 4 bond, three times over.
    values = 60.0 + 4 * np.linalg.eigvalsh(bond)
    delta_f = 1.5 * (np.log(values).sum() - 3 * math.log(100.0))

    def sample(rng, n):
        z = rng.standard_normal((n, 4, 3))
        z -= z.mean(axis=1, keepdims=True)
        return np.asarray(jax.vmap(partial(recipe.colour, b))(jnp.asarray(z)))

    return Toy(recipe, reference, recipe.ensemble(b), delta_f, sample)


TOYS = {"quartic": quartic(), "coupled": coupled()}
SCHEDULES = {
    "one stage": Schedule(np.array([0.0, 0.0, 0.0, 1.0]), np.full(3, 0.9), np.array([0, 0, 1], np.int32)),
    "eight stages": Schedule(np.array([0.0, 0.25, 0.5, 1.0]), np.full(3, 0.7), np.array([2, 2, 4], np.int32)),
    "uneven": Schedule(np.array([0.0, 0.05, 0.3, 1.0]), np.array([0.3, 1.3, 0.6]), np.array([3, 7, 5], np.int32)),
}
N_SAMPLES = 8_000


@functools.cache
def carriers(name):
    """Forward and reverse work of batches; all schedules have three segments, so this compiles once."""
    toy = TOYS[name]
    transport = bridges.bridge(toy.recipe, toy.target, "float64")
    forward, reverse = (make(toy.reference, toy.target, transport) for make in (forward_work, reverse_work))
    return jax.jit(jax.vmap(forward, (None, 0, None))), jax.jit(jax.vmap(reverse, (None, 0, 0, None)))


@pytest.fixture(scope="module", params=[(toy, name) for toy in TOYS for name in SCHEDULES], ids=" ".join)
def crossed(request):
    """A toy, and forward and reverse work along one schedule."""
    name, schedule = request.param
    toy = TOYS[name]
    forward, reverse = carriers(name)
    params = BridgeParams(toy.gaussian, SCHEDULES[schedule])
    keys = jax.random.split(jax.random.key(1), N_SAMPLES)
    y = jnp.asarray(toy.sample_target(np.random.default_rng(2), N_SAMPLES))
    keys_back = jax.random.split(jax.random.key(3), N_SAMPLES)
    return toy, np.asarray(forward(params, keys, STATE)), np.asarray(reverse(params, keys_back, y, STATE))


def agrees(samples, expected, sigmas=SIGMAS):
    samples = np.asarray(samples, float)
    error = samples.std() / math.sqrt(len(samples))
    assert abs(samples.mean() - expected) < sigmas * error + 1e-12, (
        f"{samples.mean():.5g} is {(samples.mean() - expected) / error:+.1f} errors from {expected:.5g}"
    )


def test_forward_work_averages_to_the_exact_ratio(crossed):
    toy, forward, _ = crossed
    agrees(np.exp(toy.delta_f - forward), 1.0)


def test_reverse_work_averages_to_the_exact_ratio(crossed):
    toy, _, reverse = crossed
    agrees(np.exp(-toy.delta_f - reverse), 1.0)


def test_both_directions_together_give_the_exact_difference(crossed):
    toy, forward, reverse = crossed
    answer = bar(record(forward, reverse))
    assert abs(float(answer.delta_f) - toy.delta_f) < SIGMAS * float(answer.std_error)
    assert float(answer.std_error) < 0.05


@pytest.mark.parametrize("f", [lambda w: w, np.tanh, lambda w: w > 0.5, lambda w: np.exp(-w * w)])
def test_work_obeys_crooks_relation(crossed, f):
    # P_F(w) exp(-(w - delta_f)) = P_R(-w), tried on several functions of the work.
    toy, forward, reverse = crossed
    left = f(forward - toy.delta_f) * np.exp(toy.delta_f - forward)
    right = f(-reverse - toy.delta_f)
    error = math.hypot(left.std(), right.std()) / math.sqrt(N_SAMPLES)
    assert abs(left.mean() - right.mean()) < SIGMAS * error


def test_slow_crossings_dissipate_little():
    toy, one = TOYS["quartic"], carriers("quartic")[0]
    keys = jax.random.split(jax.random.key(5), N_SAMPLES)
    lost = []
    for stages in (4, 16, 64):
        schedule = SCHEDULES["one stage"]._replace(counts=np.array([0, 0, stages], np.int32))
        lost.append(float(np.mean(one(BridgeParams(toy.gaussian, schedule), keys, STATE))) - toy.delta_f)
    # Dissipation goes as one over the number of stages: here it falls at least twofold per fourfold slower.
    assert lost[0] > 2 * lost[1] > 4 * lost[2] > 0


def test_steps_of_size_zero_leave_plain_perturbation():
    toy = TOYS["coupled"]
    transport = bridges.bridge(toy.recipe, toy.target, "float64")
    schedule = Schedule(np.array([0.0, 0.4, 1.0]), np.zeros(2), np.array([3, 4], np.int32))
    x = jnp.asarray(toy.sample_target(np.random.default_rng(0), 1)[0])
    y, log_ratio = transport.forward(BridgeParams(toy.gaussian, schedule), jax.random.key(0), x, STATE)
    np.testing.assert_allclose(y, x, atol=1e-14)
    np.testing.assert_allclose(log_ratio, 0.0, atol=1e-12)


def test_one_configuration_moves_as_in_a_batch():
    toy = TOYS["coupled"]
    transport = bridges.bridge(toy.recipe, toy.target, "float64")
    params = BridgeParams(toy.gaussian, SCHEDULES["uneven"])
    move = jax.jit(transport.reverse)
    x = jnp.asarray(toy.sample_target(np.random.default_rng(0), 3))
    keys = jax.random.split(jax.random.key(8), 3)
    together = jax.jit(jax.vmap(move, (None, 0, 0, None)))(params, keys, x, STATE)
    for i in range(3):
        alone = move(params, keys[i], x[i], STATE)
        np.testing.assert_allclose(alone.configuration, together.configuration[i], atol=1e-12)
        np.testing.assert_allclose(alone.log_ratio, together.log_ratio[i], atol=1e-10)
    assert np.abs(np.asarray(together.configuration - x)).max() > 1e-3


# ------------------------------------------------------------- the step leaves its distribution alone


def standing(z, key, dtype="float64"):
    """Walkers at z with fresh velocities; their energy is yet to be fetched."""
    noise = jax.random.normal(key, z.shape, dtype)
    zero = jnp.zeros(len(z), "float64")
    return bridges.Walker(
        z=z,
        velocity=noise - noise.mean(axis=1, keepdims=True),
        u_b=zero,
        gradient=jnp.zeros_like(z),
        work=zero,
        accepted=zero,
        stage=jnp.zeros(len(z), jnp.int32),
    )


def walk(toy, z, lam, step_size, count, seed=0, dtype="float64"):
    """`count` stages at one lambda from whitened configurations z (n, n_atoms, 3)."""
    transport = bridges.bridge(toy.recipe, toy.target, dtype)
    move = jax.jit(jax.vmap(transport.forward_segment, (None, 0, 0, None, None)))
    keys = jax.random.split(jax.random.key(seed), len(z))
    walker = move(toy.gaussian, keys, standing(jnp.asarray(z, dtype), jax.random.key(seed + 1), dtype), FETCH, STATE)
    stay = Segment(np.float64(lam), np.float64(lam), np.float64(step_size), np.int32(count))
    return move(toy.gaussian, keys, walker, stay, STATE)


FETCH = bridges.fetch_segment()


@pytest.mark.parametrize("step_size", [0.5, 1.2])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_step_leaves_its_distribution_invariant(lam, step_size):
    # Exact samples of u_lambda, moved thirty times, must still be samples of u_lambda.
    n, toy = 60_000, TOYS["quartic"]

    def energy(q):
        return (1 - lam) * 0.5 * q**2 + lam * quartic_well(q)

    q0 = draw(energy, np.random.default_rng(3), (n, 3))
    walker = walk(toy, from_relative(q0) / SPREAD, lam, step_size, 30)
    q = np.asarray(relative(walker.z * SPREAD))
    v = np.asarray(relative(walker.velocity * SPREAD))
    grid, p, _ = tabulated(energy)
    for f in (lambda x: x, np.square, lambda x: x**3, lambda x: x > 1.0, lambda x: np.abs(x) < 0.2):
        agrees(np.asarray(f(q), float).mean(axis=1), float((f(grid) * p).sum()))
    agrees(v.mean(axis=1), 0.0)
    agrees((v**2).mean(axis=1), 1.0)
    agrees((q * v).mean(axis=1), 0.0)
    assert np.abs(walker.work).max() == 0  # lambda did not move
    share = float(np.mean(walker.accepted - 1)) / 30
    assert share == 1 if lam == 0 else 0.3 < share < 0.99


def bonds(u):
    return u[None] - u[:, None]


def test_a_long_chain_obeys_the_virial_theorem():
    # <z . du/dz> = 3 N - 3 in any anharmonic well; the chain starts far from equilibrium.
    base = TOYS["coupled"]
    target = Ensemble(
        lambda u, state: (
            base.target.reduced_potential(u, state)
            + jnp.sum(30.0 * jnp.sum(bonds(u) ** 2, axis=-1) ** 2, dtype="float64")
        )
    )
    toy, lam = base._replace(target=target), 0.7
    z = np.zeros((4_000, 4, 3))
    walker = walk(toy, z, lam, 0.6, 200)
    z, g = np.asarray(walker.z), np.asarray(walker.gradient)
    force = (1 - lam) * z + lam * g
    assert 0.3 < float(np.mean(walker.accepted)) / 200 < 0.97
    agrees((z * force).sum(axis=(1, 2)), 9.0)
    # Equipartition holds for every direction of every atom: 3 N - 3 shared by 3 N coordinates.
    for i in range(4):
        for a in range(3):
            agrees((z * force)[:, i, a], 0.75)
    assert np.abs(z.mean(axis=1)).max() < 1e-12  # the centre of mass stays


def test_uncoupled_walkers_never_meet():
    """A kernel at lambda 0 with no rejections: the velocity keeps the share that it should."""
    toy, n = TOYS["quartic"], 40_000
    z = from_relative(np.random.default_rng(0).standard_normal((n, 3))) / SPREAD
    after = {count: np.asarray(walk(toy, z, 0.0, 0.9, count).z) for count in (1, 2)}
    # One step turns position and velocity by 0.9 of a radian, so <z0 z1> = cos(0.9) per coordinate.
    per_walker = (z * after[1]).sum(axis=(1, 2)) / 3
    agrees(per_walker, math.cos(0.9))
    # Two steps with persistence s: cos^2 - s sin^2; it tells how much velocity survives.
    persistence = math.sqrt(0.7)
    agrees((z * after[2]).sum(axis=(1, 2)) / 3, math.cos(0.9) ** 2 - persistence * math.sin(0.9) ** 2)


# ------------------------------------------------------------------------ walls, holes and rounding


def walled(outside):
    """The quartic toy's Gaussian, unchanged inside |q_k| < 1 and `outside` beyond."""
    base = TOYS["quartic"]

    def reduced_potential(u, state):
        q = relative(u)
        inside = jnp.max(jnp.abs(q)) < 1.0
        return jnp.where(inside, 0.5 * jnp.sum(q**2, dtype="float64"), outside)

    return base._replace(target=Ensemble(reduced_potential), delta_f=-3 * math.log(erf(1 / math.sqrt(2))))


@pytest.mark.parametrize("outside", [math.inf, math.nan])
def test_steps_into_nonsense_are_rejected(outside):
    toy = walled(outside)
    q = np.random.default_rng(0).uniform(-0.9, 0.9, (4_000, 3))
    for lam in (0.3, 1.0):
        walker = walk(toy, from_relative(q) / SPREAD, lam, 1.2, 60)
        q_end = np.asarray(relative(walker.z * SPREAD))
        assert np.abs(q_end).max() < 1.0
        for part in (walker.z, walker.velocity, walker.u_b, walker.gradient, walker.work):
            assert np.isfinite(np.asarray(part)).all()
        # A truncated Gaussian at any lambda: the walls reject, and bias nothing.
        grid, p, _ = tabulated(lambda x: 0.5 * x**2, -1.0, 1.0)
        agrees((q_end**2).mean(axis=1), float((grid**2 * p).sum()))
        assert 0.1 < float(np.mean(walker.accepted)) / 60 < 0.9


def test_samples_outside_a_wall_have_infinite_work_and_no_weight():
    toy = walled(math.inf)
    transport = bridges.bridge(toy.recipe, toy.target, "float64")
    one = jax.jit(jax.vmap(forward_work(toy.reference, toy.target, transport), (None, 0, None)))
    params = BridgeParams(toy.gaussian, SCHEDULES["eight stages"])
    work = np.asarray(one(params, jax.random.split(jax.random.key(0), N_SAMPLES), STATE))
    assert not np.isnan(work).any()
    agrees(np.isposinf(work), 1 - erf(1 / math.sqrt(2)) ** 3)
    agrees(np.exp(toy.delta_f - work), 1.0)


def test_work_adds_up_in_float64():
    # A constant offset is all work and no force: thousands of float32 increments would lose it.
    base, offset, stages = TOYS["quartic"], 1234.567890123, 3_000
    target = Ensemble(lambda u, state: 0.5 * jnp.sum(relative(u) ** 2, dtype="float64") + offset)
    transport = bridges.bridge(base.recipe, target, "float32")
    schedule = Schedule(np.array([0.0, 1.0]), np.array([0.7]), np.array([stages], np.int32))
    segment = jax.tree.map(lambda part: part[0], bridges.segments_of(schedule))
    walker = transport.launch(jax.random.key(0))
    assert walker.z.dtype == walker.velocity.dtype == walker.gradient.dtype == np.float32
    walker = jax.jit(transport.forward_segment)(base.gaussian, jax.random.key(0), walker, FETCH, STATE)
    walker = jax.jit(transport.forward_segment)(base.gaussian, jax.random.key(0), walker, segment, STATE)
    assert walker.work.dtype == walker.u_b.dtype == np.float64
    np.testing.assert_allclose(walker.work, offset, rtol=1e-8)
    assert int(walker.stage) == stages + 1


# ------------------------------------------------------------------------------- schedules and pilots


def test_schedules_are_travelled_both_ways():
    schedule = SCHEDULES["uneven"]
    there, back = bridges.segments_of(schedule), bridges.segments_of(schedule, forward=False)
    np.testing.assert_array_equal(there.start, back.stop[::-1])
    np.testing.assert_array_equal(there.stop, back.start[::-1])
    np.testing.assert_array_equal(there.count, back.count[::-1])
    np.testing.assert_array_equal(there.step_size, back.step_size[::-1])


def synthetic_pilot(resistance, steps=lambda lam: 0 * lam + 0.5, n_segments=64, n_samples=20_000, seed=0):
    """A pilot whose segments scatter as a medium with this friction per lambda makes them."""
    lambdas = np.linspace(0.0, 1.0, n_segments + 1) ** 1.2  # of unequal widths
    middle, width = 0.5 * (lambdas[1:] + lambdas[:-1]), np.diff(lambdas)
    counts = np.random.default_rng(seed).integers(3, 9, n_segments)
    variance = 2 * resistance(middle) * width**2 / counts
    noise = np.random.default_rng(seed + 1).standard_normal((n_segments, n_samples))
    work = np.sqrt(variance)[:, None] * noise
    return Pilot(lambdas, counts, steps(middle), np.full(n_segments, 0.85), work, 0.0)


def growing(lam):
    return 50.0 * (1 + 3 * lam)


def test_friction_of_a_known_medium_is_found():
    pilot = synthetic_pilot(growing)
    width = np.diff(pilot.lambdas)
    middle = 0.5 * (pilot.lambdas[1:] + pilot.lambdas[:-1])
    density = bridges.friction(pilot) / width**2
    # Smoothing bends the ends; inside, 64 segments of 20 000 samples know the friction to a few percent.
    inside = (middle > 0.15) & (middle < 0.85)
    np.testing.assert_allclose(density[inside], growing(middle[inside]), rtol=0.12)
    exact = (2 / 9) * (4**1.5 - 1) * math.sqrt(50.0)  # integral of sqrt(50 (1 + 3 l))
    assert bridges.thermodynamic_length(pilot) == pytest.approx(exact, rel=0.03)


def test_friction_counts_what_segments_share():
    # Fully correlated segments scatter more in sum than alone: the total variance is what counts.
    common = np.random.default_rng(0).standard_normal(5_000)
    lambdas = np.linspace(0, 1, 9)
    work = np.tile(common / 8, (8, 1))
    pilot = Pilot(lambdas, np.full(8, 10), np.full(8, 0.5), np.full(8, 0.85), work, 0.0)
    # var = 1 in 80 stages: L^2 = 80 var / 2.
    assert bridges.thermodynamic_length(pilot) ** 2 == pytest.approx(40 * common.var(), rel=0.02)


def test_friction_is_positive_whatever_the_pilot_saw():
    work = np.zeros((16, 100))
    pilot = Pilot(np.linspace(0, 1, 17), np.full(16, 4), np.full(16, 0.5), np.ones(16), work, 0.0)
    schedule = bridges.schedule_from(pilot, 40)
    assert np.isfinite(schedule.lambdas).all() and schedule.counts.sum() == 40
    work = np.random.default_rng(0).standard_normal((16, 8))  # eight samples: shares below zero
    assert (bridges.friction(pilot._replace(work=work)) > 0).all()


@pytest.mark.parametrize("stages", [1, 5, 32, 33, 1_000])
def test_schedules_have_the_stages_asked_for(stages):
    schedule = bridges.schedule_from(synthetic_pilot(growing), stages)
    assert schedule.counts.sum() == stages and (schedule.counts > 0).all()
    assert schedule.lambdas[0] == 0 and schedule.lambdas[-1] == 1
    assert (np.diff(schedule.lambdas) > 0).all()
    assert len(schedule.step_sizes) == len(schedule.counts) == len(schedule.lambdas) - 1
    np.testing.assert_allclose(schedule.step_sizes, 0.5, rtol=1e-9)


def test_stages_lie_at_equal_thermodynamic_distance():
    schedule = bridges.schedule_from(synthetic_pilot(growing), 3_200)
    per_stage = np.diff(schedule.lambdas) / schedule.counts
    middle = 0.5 * (schedule.lambdas[1:] + schedule.lambdas[:-1])
    distance = per_stage * np.sqrt(growing(middle))
    np.testing.assert_allclose(distance, distance.mean(), rtol=0.1)


def test_step_sizes_follow_the_pilot():
    def steps(lam):
        return np.exp(-0.3 - lam + 0.4 * lam**2)

    schedule = bridges.schedule_from(synthetic_pilot(growing, steps), 640)
    middle = 0.5 * (schedule.lambdas[1:] + schedule.lambdas[:-1])
    np.testing.assert_allclose(schedule.step_sizes, steps(middle), rtol=1e-6)


class Medium:
    """Plays the part of the samples for a `Pace`: a difference that scatters, and an acceptance."""

    def __init__(self, spread, acceptance, n=256):
        rng = np.random.default_rng(0)
        self.difference = spread * rng.standard_normal(n)
        self.acceptance = acceptance
        self.work, self.accepted = np.zeros(n), np.ones(n)

    def cross(self, pace, limit=5_000):
        segments = []
        while not pace.arrived:
            assert len(segments) < limit
            segment = pace.next(self.difference)
            self.work = self.work + self.difference * float(segment.stop - segment.start)
            self.accepted = self.accepted + self.acceptance(float(segment.step_size)) * int(segment.count)
            pace.learn(self.work, self.accepted)
            segments.append(segment)
        return segments


def test_a_pace_crosses_from_zero_to_one_without_gaps():
    medium = Medium(5.0, lambda h: 0.85)
    pace = Pace()
    segments = medium.cross(pace)
    assert segments[0].start == 0 and segments[-1].stop == 1
    assert all(a.stop == b.start for a, b in itertools.pairwise(segments))
    # A switch scatters the work by a quarter of kT: 5 kT takes about twenty switches, but none beyond 1/64.
    switches = [float(s.stop - s.start) / int(s.count) for s in segments[:-1]]
    assert max(switches) <= 1 / 64 + 1e-12
    stormy = Medium(50.0, lambda h: 0.85)
    switches = [float(s.stop - s.start) / int(s.count) for s in stormy.cross(Pace())[:-1]]
    assert np.allclose(switches, 0.25 / 50.0, rtol=0.2)
    pilot = pace.pilot(0.125)
    assert pilot.lost == 0.125 and pilot.work.shape == (len(segments), 256)
    np.testing.assert_allclose(pilot.work.sum(axis=0), medium.work, atol=1e-9)
    np.testing.assert_allclose(pilot.acceptance, 0.85, atol=1e-9)


def test_a_pace_finds_the_step_size_of_its_acceptance():
    medium = Medium(20.0, lambda h: math.exp(-0.5 * h))  # 0.85 at h = 0.325
    steps = [float(s.step_size) for s in medium.cross(Pace())]
    assert steps[-1] == pytest.approx(-2 * math.log(bridges.ACCEPTANCE), rel=0.05)
    # Where every step is accepted the step size stops at less than a quarter turn.
    steps = [float(s.step_size) for s in Medium(20.0, lambda h: 1.0).cross(Pace())]
    assert steps[-1] < math.pi / 2


def test_a_pace_loses_patience():
    # Such a spread would take 400 000 stages at a quarter of kT each.
    segments = Medium(1e5, lambda h: 0.85).cross(Pace(), limit=2_000)
    assert segments[-1].stop == 1


def test_a_pace_takes_the_stages_that_the_scatter_asks_for():
    for spread, stages in ((2.0, 8), (6.0, 36), (50.0, 96)):
        segments = Medium(spread, lambda h: 0.85).cross(Pace(stages=(8, 96)))
        assert segments[0].start == 0 and segments[-1].stop == 1
        assert sum(int(s.count) for s in segments) == pytest.approx(stages, rel=0.2)
        widths = [float(s.stop - s.start) / int(s.count) for s in segments]
        np.testing.assert_allclose(widths, widths[0])


def test_a_pace_looks_at_finite_samples_only():
    medium = Medium(5.0, lambda h: 0.85)
    medium.difference[:40] = np.inf
    medium.difference[40:50] = np.nan
    segment = Pace().next(medium.difference)
    assert 0 < float(segment.stop) < 1


def test_a_pace_follows_a_schedule():
    schedule = SCHEDULES["uneven"]
    segments = Medium(5.0, lambda h: 0.85).cross(Pace(schedule))
    np.testing.assert_allclose([s.stop for s in segments], schedule.lambdas[1:])
    np.testing.assert_array_equal([s.count for s in segments], schedule.counts)
    np.testing.assert_allclose([s.step_size for s in segments], schedule.step_sizes)
    # Too many rejections shorten the steps that come after.
    segments = Medium(5.0, lambda h: 0.6).cross(Pace(schedule))
    assert segments[0].step_size == schedule.step_sizes[0]
    assert segments[2].step_size < 0.8 * schedule.step_sizes[2]
