"""Radial maps: the analytic map's known answers, inverses, log dets against autodiff, seams of the box."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freeflow.bijectors.radial import analytic_radial, radial_spline
from freeflow.errors import InputError
from freeflow.types import ThermodynamicState

pytestmark = pytest.mark.code("brief")

STATE = ThermodynamicState(np.float64(1.0), np.float64(0.0))
L, RADII = 6.0, (2.2, 2.6)
MAPS = {
    "analytic, sphere": analytic_radial(L, RADII),
    "analytic, box": analytic_radial(L, RADII, "box"),
    "analytic, shrinking": analytic_radial(L, RADII[::-1], "box"),
    "spline, sphere": radial_spline(L, RADII, 5),
    "spline, box": radial_spline(L, RADII, 5, "box"),
    "spline by direction": radial_spline(L, RADII, 4, "box", width=6),
}
# Each is compiled once for all tests, which therefore have the same number of atoms.
N = 40
INIT, FORWARD, INVERSE = (
    {name: jax.jit(getattr(bijector, part)) for name, bijector in MAPS.items()}
    for part in ("init", "forward", "inverse")
)


def positions(seed, n=N, dtype="float64"):
    """Positions anywhere, several boxes away too; near the solute only outside half its radius."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-L / 2, L / 2, (20 * n, 3))
    x = x[np.linalg.norm(x, axis=1) > 1.1][:n] + L * rng.integers(-2, 3, (n, 3))
    return jnp.asarray(x, dtype)


def wild(name, seed=0, dtype="float64"):
    """Parameters away from those of the identity."""
    params = INIT[name](jax.random.key(seed), jnp.zeros((2, 3), dtype), STATE)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.7 * rng.standard_normal(leaf.shape), dtype), params)


def at_distance(r, direction):
    direction = np.asarray(direction, float)
    return jnp.asarray(np.outer(r, direction / np.linalg.norm(direction)))


def test_analytic_map_moves_the_surface_of_the_solute_and_keeps_the_end():
    r = np.array([RADII[0] + 1e-9, L / 2 - 1e-9, 0.5 * (RADII[0] + L / 2), L / 2 + 0.2, 1.1])
    y, log_det = MAPS["analytic, sphere"].forward((), at_distance(r, [1, -2, 2]), STATE)
    a, b, end = RADII[0] ** 3, RADII[1] ** 3, (L / 2) ** 3
    ratio = (end - b) / (end - a)
    middle = (b + ratio * (r[2] ** 3 - a)) ** (1 / 3)
    expected = [RADII[1], L / 2, middle, r[3], 1.1 * RADII[1] / RADII[0]]
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), expected, atol=3e-9)
    # Three atoms are compressed, one does not move, the last is pulled along with the surface.
    np.testing.assert_allclose(log_det, 3 * math.log(ratio) + math.log(b / a), rtol=1e-12)


def test_free_volume_of_the_box_is_mapped_onto_that_of_b():
    """The mean of the Jacobian over A's free volume is the ratio of free volumes; five standard errors."""
    rng = np.random.default_rng(3)
    x = rng.uniform(-L / 2, L / 2, (60_000, 3))
    x = jnp.asarray(x[np.linalg.norm(x, axis=1) > RADII[0]])
    for name in ("analytic, sphere", "analytic, box"):
        slopes = jax.jit(jax.vmap(lambda one, name=name: MAPS[name].forward((), one[None], STATE)[1]))(x)
        jacobian = np.exp(np.asarray(slopes))
        free = [L**3 - 4 / 3 * math.pi * radius**3 for radius in RADII]
        error = jacobian.std() / math.sqrt(len(jacobian))
        assert abs(jacobian.mean() - free[1] / free[0]) < 5 * error
        assert error < 2e-3


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_inverse_undoes_the_map(name, dtype):
    x, params = positions(1, dtype=dtype), wild(name, dtype=dtype)
    y, log_det = FORWARD[name](params, x, STATE)
    back, inverse_log_det = INVERSE[name](params, y, STATE)
    assert y.dtype == x.dtype and log_det.dtype == x.dtype
    np.testing.assert_allclose(back, x, atol=1e-10 if dtype == "float64" else 2e-3)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=1e-9 if dtype == "float64" else 5e-3, atol=5e-3)
    assert float(jnp.max(jnp.abs(y - x))) > 0.1


@pytest.mark.parametrize("name", MAPS)
def test_log_det_against_autodiff(name):
    x, params = positions(2), wild(name)
    for mapping in (FORWARD[name], INVERSE[name]):
        jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda one, m=mapping: m(params, one[None], STATE)[0][0])))(x)
        np.testing.assert_allclose(mapping(params, x, STATE)[1], np.linalg.slogdet(jacobian)[1].sum(), rtol=1e-9)


@pytest.mark.parametrize("name", MAPS)
def test_every_image_and_every_label_and_every_turn_of_the_cube_is_treated_alike(name):
    x, params = positions(4), wild(name)
    y, log_det = FORWARD[name](params, x, STATE)
    rng = np.random.default_rng(0)
    order, images = rng.permutation(len(x)), L * rng.integers(-2, 3, x.shape)
    turn = np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]])
    for moved, expected in [(x[order], y[order]), (x + images, y + images), (x @ turn, y @ turn)]:
        there, same = FORWARD[name](params, moved, STATE)
        np.testing.assert_allclose(there, expected, atol=1e-9)
        np.testing.assert_allclose(same, log_det, rtol=1e-9)


@pytest.mark.parametrize("name", MAPS)
def test_the_map_is_continuous_across_the_surface_of_the_box(name):
    """Two sides of a face differ by an image; just inside the end an atom hardly moves."""
    rng = np.random.default_rng(5)
    x = rng.uniform(-L / 2, L / 2, (N, 3))
    x[:, 0] = L / 2
    step = np.array([[1e-9, 0, 0]])
    inner, outer = jnp.asarray(x - step), jnp.asarray(x + step)
    params = wild(name)
    (y, _), (z, _) = (FORWARD[name](params, side, STATE) for side in (inner, outer))
    np.testing.assert_allclose(y, z, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MAPS if "spline" in name])
def test_a_new_spline_is_the_analytic_map(name):
    params = INIT[name](jax.random.key(0), jnp.zeros((2, 3)), STATE)
    y, log_det = FORWARD[name](params, positions(6), STATE)
    expected, known = FORWARD["analytic, sphere" if "sphere" in name else "analytic, box"]((), positions(6), STATE)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(log_det, known, rtol=1e-9)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_are_finite_on_top_of_the_solute(name):
    params = wild(name)
    strange = [[0.0, 0.0, 0.0], [L, 0.0, -L], [1e-9, 0, 0], [1.0, 1.0, 1.0], [L / 2, L / 2, L / 2]]
    x = jnp.asarray(np.resize(strange, (N, 3)))

    def total(params, x):
        y, log_det = FORWARD[name](params, x, STATE)
        return jnp.sum(y * y) + log_det

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1)))(params, x)):
        assert np.isfinite(leaf).all()
    y, _ = FORWARD[name](params, x, STATE)
    np.testing.assert_allclose(INVERSE[name](params, y, STATE)[0], x, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((L, (0.0, 2.0)), "above 0"),
        ((L, (2.0, 3.0)), "below half the box"),
        ((L, (math.nan, 2.0)), "above 0"),
        ((0.0, (2.0, 2.1)), "box edge"),
    ],
)
def test_impossible_maps_are_refused(arguments, complaint):
    with pytest.raises(InputError, match=complaint):
        analytic_radial(*arguments)


def test_a_spline_needs_bins():
    with pytest.raises(InputError, match="n_bins"):
        radial_spline(L, RADII, 0)
