"""Maps of a fluid: symmetries, inverse, log det and divergence against autodiff, and fields with known answers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freeflow.bijectors.radial import analytic_radial
from freeflow.errors import InputError
from freeflow.flows import fluid
from freeflow.flows.fluid import Rates, field, field_shape, fit, fluid_map, journey, no_motion, numbers_of, params_of
from freeflow.types import ThermodynamicState

pytestmark = pytest.mark.code("brief")

STATE = ThermodynamicState(np.float64(1.0), np.float64(0.0))
L, RADII, CORE = 4.0, (1.2, 1.4), 0.9
SHAPES = {hops: field_shape(L, RADII, CORE, hops) for hops in (True, False)}
SHAPE = SHAPES[True]
EXACT = fluid_map(SHAPE, steps=24, dtype="float64")
TORUS = fluid.torus_flow(L, analytic_radial(L, RADII), n_layers=1, n_blocks=1, width=8, n_heads=2, n_bins=4)


def positions(seed=0, n=5):
    """A few atoms near a corner of the box, all of them neighbours, some across its faces."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(1.2, 2.8, (n, 3)))


def wild(shape=SHAPE, scale=0.05, seed=0):
    rng = np.random.default_rng(seed)  # NumPy compiles nothing
    return {name: jnp.asarray(scale * rng.standard_normal(leaf.shape)) for name, leaf in no_motion(shape).items()}


def wild_torus(seed=0):
    rng = np.random.default_rng(seed)
    params = INIT["torus"](jax.random.key(seed), positions(), STATE)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.3 * rng.standard_normal(leaf.shape)), params)


# Parameters are made inside the tests, in float64.
MAPS = {"fluid": (EXACT, wild), "torus": (TORUS, wild_torus)}


@jax.jit
def at_once(params, x):
    """Velocities (n, 3) and the divergence of one configuration (n, 3)."""
    batch = x.T[:, :, None]
    v, divergence = field(params, batch, SHAPE, fluid.partners(batch, SHAPE)[0])
    return v[:, :, 0].T, divergence[0]


@jax.jit
def jacobian_at_once(params, x):
    return jax.jacfwd(lambda flat: at_once(params, flat.reshape(x.shape))[0].ravel())(x.ravel())


# One compiled function for all that the tests ask of a map.
INIT = {name: jax.jit(bijector.init) for name, bijector in (("fluid", EXACT), ("torus", TORUS))}
FORWARD = {name: jax.jit(bijector.forward) for name, bijector in (("fluid", EXACT), ("torus", TORUS))}
INVERSE = {name: jax.jit(bijector.inverse) for name, bijector in (("fluid", EXACT), ("torus", TORUS))}


@pytest.mark.parametrize("name", ["waves", "shells", "pairs", "neighbours", "hops"])
def test_divergence_against_autodiff(name):
    params = {key: value if key == name else 0 * value for key, value in wild(scale=1.0).items()}
    x = positions(1)
    divergence, jacobian = at_once(params, x)[1], jacobian_at_once(params, x)
    assert abs(float(divergence)) > 1e-3
    np.testing.assert_allclose(divergence, jnp.trace(jacobian), rtol=1e-10)


@pytest.mark.parametrize("name", MAPS)
def test_inverse_undoes_the_map(name):
    params, x = MAPS[name][1](), positions(2)
    y, log_det = FORWARD[name](params, x, STATE)
    back, inverse_log_det = INVERSE[name](params, y, STATE)
    assert float(jnp.max(jnp.abs(y - x))) > 0.05
    np.testing.assert_allclose(back, x, atol=1e-7)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_log_det_against_autodiff(name):
    bijector, params = MAPS[name][0], MAPS[name][1]()
    x = positions(3)
    log_det = FORWARD[name](params, x, STATE)[1]
    column = jax.jit(lambda t: jax.jvp(lambda z: bijector.forward(params, z, STATE)[0], (x,), (t,))[1])
    jacobian = np.stack([np.ravel(column(t.reshape(x.shape))) for t in jnp.eye(x.size)])
    assert abs(float(log_det)) > 0.05
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_labels_and_images_do_not_matter(name):
    params = MAPS[name][1]()
    x, rng = positions(4), np.random.default_rng(0)
    order, images = rng.permutation(len(x)), L * rng.integers(-2, 3, x.shape)
    forward = FORWARD[name]
    y, log_det = forward(params, x, STATE)
    for moved, expected in [(x[order], y[order]), (x + images, y + images)]:
        there, same = forward(params, moved, STATE)
        np.testing.assert_allclose(there, expected, atol=1e-9)
        np.testing.assert_allclose(same, log_det, atol=1e-9)


def test_all_atoms_as_partners_are_as_good_as_a_list():
    shape = SHAPES[False]
    x = jnp.stack([positions(seed, n=9).T for seed in range(3)], axis=-1)
    by_list = jax.jit(lambda params: field(params, x, shape, fluid.partners(x, shape)[0]))
    by_all = jax.jit(lambda params: field(params, x, shape, None))
    for params in (wild(shape), {k: jnp.stack([v, 2 * v, -v], axis=-1) for k, v in wild(shape).items()}):
        for one, other in zip(by_list(params), by_all(params), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hops", [True, False])
def test_a_field_has_no_jump_where_the_nearest_image_becomes_another_one(hops):
    """Neither in a box so small that half of it is within reach: a jump tears the liquid, which no log det tells."""
    shape = field_shape(2.6, (1.0, 1.1), 0.95, hops)
    assert shape.pair_end == 1.3 < fluid._PAIR_END * shape.core
    rng = np.random.default_rng(8)
    x = rng.uniform(-1.3, 1.3, (3, 3, 20))
    x[0, 1] = x[0, 0] + 1.3  # the first two of three atoms are half a box apart
    sides = [jnp.asarray(x + np.eye(3)[0][:, None, None] * np.eye(3)[1][:, None] * shift) for shift in (-1e-7, 1e-7)]
    ways = [lambda params, x: field(params, x, shape, fluid.partners(x, shape)[0])]
    ways += [] if hops else [lambda params, x: field(params, x, shape, None)]
    for way in map(jax.jit, ways):
        (left, left_divergence), (right, right_divergence) = (way(wild(shape, scale=1.0), x) for x in sides)
        np.testing.assert_allclose(left, right, atol=1e-4)
        np.testing.assert_allclose(left_divergence, right_divergence, atol=1e-3)


def test_a_field_is_as_symmetric_as_the_cube():
    x, params = positions(5), wild(scale=1.0)
    v, divergence = at_once(params, x)
    for turn in ([[0, -1, 0], [0, 0, 1], [1, 0, 0]], [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]):
        turned, same = at_once(params, x @ np.array(turn))
        np.testing.assert_allclose(turned, v @ np.array(turn), atol=1e-10)
        np.testing.assert_allclose(same, divergence, rtol=1e-10)


def test_pushes_between_neighbours_leave_their_centre_alone_and_fade_with_distance():
    """The third law: pair terms alone, without what atoms do by themselves, move no centre of mass."""
    params = {key: value * (key in ("pairs", "neighbours", "hops")) for key, value in wild(scale=1.0).items()}
    v, _ = at_once(params, positions(6))
    np.testing.assert_allclose(v.sum(axis=0), 0, atol=1e-12)
    assert float(jnp.abs(v).max()) > 0.1
    apart = jnp.asarray([[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1.0]])  # 2 is 2.2 core diameters
    np.testing.assert_allclose(at_once(params, apart)[0], 0, atol=1e-30)


def test_a_batch_is_its_samples_one_by_one_with_parameters_of_their_own_too():
    x = jnp.stack([positions(seed) for seed in range(3)])
    bijector, params = fluid_map(SHAPE, steps=2, dtype="float64"), wild()
    forward = jax.jit(bijector.forward)
    alone = [forward(params, one, STATE) for one in x]
    shared = jax.jit(jax.vmap(bijector.forward, (None, 0, None)))(params, x, STATE)
    own = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
    each = jax.jit(jax.vmap(bijector.forward, (0, 0, None)))(own, x, STATE)
    for y, log_det in (shared, each):
        np.testing.assert_allclose(y, np.stack([a for a, _ in alone]), atol=1e-12)
        np.testing.assert_allclose(log_det, np.stack([b for _, b in alone]), atol=1e-12)


@pytest.mark.slow
def test_single_precision_is_held_to_double():
    x = positions(7)
    (y, log_det), (z, rounded) = (
        fluid_map(SHAPE, dtype=dtype).forward(wild(), x, STATE) for dtype in ("float64", "float32")
    )
    assert z.dtype == np.float64
    np.testing.assert_allclose(z, y, atol=2e-6)
    np.testing.assert_allclose(rounded, log_det, atol=2e-5)


@pytest.mark.slow
def test_lists_of_partners_leave_nobody_out_or_say_so(monkeypatch):
    rng = np.random.default_rng(8)
    x = jnp.asarray(rng.uniform(0, L, (3, 60, 2)))
    params = wild(scale=0.01)
    listed, log_det = journey(params, x, SHAPE, 1.0, 4)
    monkeypatch.setattr(fluid, "_PARTNERS", 59)
    everybody, exact = journey(params, x, SHAPE, 1.0, 4)
    np.testing.assert_allclose(listed, everybody, atol=1e-10)
    np.testing.assert_allclose(log_det, exact, atol=1e-10)
    monkeypatch.setattr(fluid, "_PARTNERS", 6)
    assert np.isnan(journey(params, x, SHAPE, 1.0, 4)[1]).all()


def test_halves_of_the_way_make_the_whole():
    x, params = positions(9), wild()
    half = fluid_map(SHAPE, steps=12, span=0.5, dtype="float64")
    middle, first = half.forward(params, x, STATE)
    end, second = half.forward(params, middle, STATE)
    whole, log_det = FORWARD["fluid"](params, x, STATE)
    np.testing.assert_allclose(end, whole, atol=1e-12)
    np.testing.assert_allclose(first + second, log_det, atol=1e-12)


def test_a_new_map_is_the_identity():
    """The torus behind Jarzynski's radial map, which has no parameters."""
    x = positions()
    for name, (expected, its_log_det) in {
        "fluid": (x, 0.0),
        "torus": jax.jit(analytic_radial(L, RADII).forward)((), x, STATE),
    }.items():
        y, log_det = FORWARD[name](INIT[name](jax.random.key(0), x, STATE), x, STATE)
        np.testing.assert_allclose(y, expected, atol=1e-12)
        np.testing.assert_allclose(log_det, its_log_det, atol=1e-12)


@pytest.mark.slow
def test_gradients_of_the_work_reach_every_parameter_and_are_finite_where_atoms_meet():
    x = jnp.stack([positions(10), positions(10).at[1].set(positions(10)[0]), positions(11).at[0].set(0.0)])
    bijector = fluid_map(SHAPE, steps=1)

    def loss(params):
        y, log_det = jax.vmap(bijector.forward, (None, 0, None))(params, x, STATE)
        return jnp.sum(y**2) - jnp.sum(log_det)

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(wild())):
        assert np.isfinite(leaf).all() and (np.abs(leaf) > 0).all()


def test_parameters_come_back_from_a_row():
    for shape in SHAPES.values():
        params = wild(shape)
        back = params_of(numbers_of(params), shape)
        assert {name: leaf.shape for name, leaf in back.items()} == {n: leaf.shape for n, leaf in params.items()}
        for name in params:
            np.testing.assert_array_equal(back[name], params[name])


@pytest.mark.slow
def test_what_a_field_offers_is_its_own_rate():
    """The columns, times the parameters, are div v - v . grad u of that field; their order is that of a row."""
    x = jnp.stack([positions(seed).T for seed in (12, 13)], axis=-1)
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))
    params = wild(scale=1.0)
    columns = fluid.offered(x, gradient, SHAPE)
    v, divergence = field(params, x, SHAPE, fluid.partners(x, SHAPE)[0])
    expected = divergence - jnp.sum(v * gradient, axis=(0, 1))
    np.testing.assert_allclose(columns @ numbers_of(params), expected, rtol=1e-9)


def test_fit_finds_the_field_that_made_the_rates():
    rng = np.random.default_rng(0)
    functions = [rng.normal(size=(300, 7)) * np.arange(1, 8) for _ in range(2)]
    truth = rng.normal(size=7)
    states = [Rates(some @ truth + 5.0 * k, some) for k, some in enumerate(functions)]
    found = fit(states, 1e-12)
    # States differ by a constant, the slope of their free energy, which no field is asked to explain.
    np.testing.assert_allclose(found, truth, atol=0.2)
    assert all(state.left_over(found) < 0.02 for state in states)
    assert np.abs(fit(states, 10.0)).sum() < 0.2 * np.abs(truth).sum()


@pytest.mark.slow
def test_an_ideal_gas_in_a_wave_is_carried_by_the_field_that_its_density_asks_for():
    """One atom in u_l = -ln(1 + l e cos(q x)): along x, v = -(e / q) sin(q x) / (1 + l e cos(q x)) is exact.

    At l = 0 that is a wave of the field; the work to first order in l is nothing.
    """
    rng, e, q = np.random.default_rng(1), 0.3, 2 * math.pi / L
    x = rng.uniform(-L / 2, L / 2, (3, 1, 500))
    wanted = -e * np.cos(q * x).sum(axis=(0, 1))  # sum over axes: the cubic wave (1, 0, 0), u = 0 at l = 0
    shape = SHAPES[False]
    functions = np.asarray(fluid.offered(jnp.asarray(x), jnp.zeros(x.shape), shape))
    found = params_of(fit([Rates(wanted, functions)], 1e-10), shape)
    v = field(found, jnp.asarray(x), shape, fluid.partners(jnp.asarray(x), shape)[0])[0]
    np.testing.assert_allclose(v, -(e / q) * np.sin(q * x), atol=2e-3 * e / q)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [((0.0, RADII, CORE), "box edge"), ((L, RADII, 0.0), "core"), ((L, (1.0, 2.9), CORE), "fit into")],
)
def test_impossible_shapes_are_refused(arguments, complaint):
    with pytest.raises(InputError, match=complaint):
        field_shape(*arguments)


def test_a_map_needs_steps():
    with pytest.raises(InputError, match="steps"):
        fluid_map(SHAPE, steps=0)
