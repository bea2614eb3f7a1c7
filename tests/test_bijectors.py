"""Bijectors: inverses, log dets against autodiff, identities, seams and edges; in float64 and float32.

Rounding is judged by condition: an inverse may be wrong by the rounding of its input over the local
slope, and no bound on slopes holds for a spline of wild parameters.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from freeflow.bijectors import (
    affine,
    at,
    augmented_coupling,
    axis_coupling,
    chain,
    circular_spline,
    compose,
    coupling,
    elementwise,
    identity,
    interval_spline,
    inverse_rational_quadratic,
    invert,
    laps,
    leaf_coupling,
    line_spline,
    mean_free,
    moebius,
    rational_quadratic,
    repeat,
    scaled,
    shift,
    sinh_arcsinh,
    whitened,
    wrap,
)
from freeflow.types import Bijector, Network, ThermodynamicState

pytestmark = pytest.mark.code("brief")

STATE = ThermodynamicState(np.float64(1.0), np.float64(0.0))
DTYPES = ("float64", "float32")

# name: (map, lower, upper, number of bins); maps without ends get an interval to draw numbers from.
MAPS = {
    "interval spline": (interval_spline(5, -0.1, 0.2), -0.1, 0.2, 5),
    "line spline": (line_spline(4, 1.5), -1.5, 1.5, 4),
    "one bin": (line_spline(1, 0.3), -0.3, 0.3, 1),
    "circular spline": (circular_spline(6), 0.0, 1.0, 6),
    "affine": (affine(), -2.0, 2.0, 1),
    "moebius": (moebius(-1.0, 2.0), -1.0, 2.0, 1),
    "sinh-arcsinh": (sinh_arcsinh(0.7), -2.0, 2.0, 1),
    "rotated circle": (compose(shift(), circular_spline(3, -0.5, 0.5)), -0.5, 0.5, 3),
}
CIRCLES = [name for name in MAPS if "circ" in name or name == "moebius"]
N = 400  # numbers per call, one shape for every test: each map compiles once per precision


@functools.cache
def compiled(name):
    """Forward and inverse, each: (values, slopes by autodiff, gradients of all that comes out)."""

    def with_derivatives(function):
        def everything(raw, x):
            values, slopes = jax.jvp(lambda x: function(raw, x), (x,), (jnp.ones_like(x),))
            return values, slopes, jax.grad(lambda raw, x: sum(map(jnp.sum, function(raw, x))), (0, 1))(raw, x)

        return jax.jit(everything)

    mapping = MAPS[name][0]
    return with_derivatives(mapping.forward), with_derivatives(mapping.inverse)


def numbers(name, seed, dtype, margin=0.5):
    """Random numbers around a map's domain, and wherever rounding or branches could hurt."""
    _, lower, upper, n_bins = MAPS[name]
    knots = np.linspace(lower, upper, n_bins + 1).astype(dtype)
    knots = np.concatenate([knots, [np.asarray(lower, dtype), np.asarray(upper, dtype)]]).astype(dtype)
    special = np.concatenate(
        [
            knots,
            np.nextafter(knots, np.asarray(np.inf, dtype)),
            np.nextafter(knots, np.asarray(-np.inf, dtype)),
            np.array([0, 1e-6, -1e-6, 1e-30, -1e-30], dtype),
        ]
    )
    rest = np.random.default_rng(seed).uniform(lower - margin, upper + margin, N - len(special))
    return jnp.asarray(np.concatenate([special, rest]), dtype)


def random_raw(name, seed, dtype, scale):
    """Parameters of their own for every number; scale 0 for the identity."""
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, (N, MAPS[name][0].n_parameters)), dtype)


# ------------------------------------------------------------------------- elementwise maps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("name", MAPS)
def test_elementwise_inverse_and_derivative(name, scale, dtype):
    (forward, inverse), eps = compiled(name), float(jnp.finfo(dtype).eps)
    for seed in range(3):
        x, raw = numbers(name, seed, dtype), random_raw(name, seed, dtype, scale)
        (y, log_derivative), (slope, curvature), _ = forward(raw, x)
        (back, back_log), (back_slope, _), _ = inverse(raw, y)
        assert y.dtype == log_derivative.dtype == back.dtype == back_log.dtype == jnp.dtype(dtype)
        # Backwards stable, whatever the slopes: f(f^-1(x)) is x up to the rounding of what it went through.
        (source, source_log), _, _ = inverse(raw, x)
        (there, _), _, _ = forward(raw, source)
        size = 1 + jnp.abs(x) + jnp.abs(source)
        assert float(jnp.max(jnp.abs(there - x) / (size * (1 + jnp.exp(-source_log))))) < 20 * eps
        # Where the slope is no less than 1/30 the numbers themselves agree.
        good = slope > 1 / 30
        assert float(jnp.mean(good)) > 0.25
        tolerance = {"float64": 1e-10, "float32": 3e-5}[dtype]
        assert float(jnp.max(jnp.where(good, jnp.abs(back - x), 0))) < tolerance
        # The log derivative is that of autodiff, and the inverse has the opposite one.
        sensitivity = 1 + jnp.abs(curvature) * (1 + 1 / slope)
        for value in (jnp.log(slope), -back_log, -jnp.log(back_slope)):
            wrong = jnp.abs(value - log_derivative) / sensitivity
            assert float(jnp.max(jnp.where(good, wrong, 0))) < 500 * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAPS)
def test_zero_parameters_are_the_identity(name, dtype):
    x, eps = numbers(name, 0, dtype), float(jnp.finfo(dtype).eps)
    for function in compiled(name):
        (y, log_derivative), _, _ = function(jnp.zeros((N, MAPS[name][0].n_parameters), dtype), x)
        np.testing.assert_allclose(y, x, rtol=0, atol=8 * eps)
        np.testing.assert_allclose(log_derivative, 0, atol=20 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAPS)
def test_elementwise_maps_increase(name, dtype):
    _, lower, upper, _ = MAPS[name]
    x = jnp.linspace(lower - 0.2, upper + 0.2, N, dtype=dtype)
    for seed in range(5):
        raw = jnp.broadcast_to(random_raw(name, seed, dtype, 1.5)[:1], (N, MAPS[name][0].n_parameters))
        for function in compiled(name):
            y = function(raw, x)[0][0]
            assert float(jnp.min(jnp.diff(y))) > -4 * float(jnp.finfo(dtype).eps)
            assert float(y[-1] - y[0]) > 0.05  # not by standing still


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("raw_kind", ["zero", "random", "huge", "huge random", "tiny"])
def test_values_and_gradients_are_finite(name, raw_kind, dtype):
    # Some may grow: the affine map by exp(3), sinh-arcsinh to the power of e.
    top = {"affine": 1e30, "sinh-arcsinh": 1e12}.get(name, float(jnp.finfo(dtype).max))
    far = jnp.asarray([1e6, -1e6, 1e9, -1e9, 1e30, -1e30, 3e7 + 0.3, -1.7e7, top, -top], dtype)
    x = jnp.concatenate([numbers(name, 0, dtype)[: N - len(far)], jnp.clip(far, -top, top)])
    scales = {"zero": 0.0, "random": 3.0, "huge": 0.0, "huge random": 1e6, "tiny": 1e-30}
    raw = random_raw(name, 0, dtype, scales[raw_kind])
    if raw_kind == "huge":
        raw = jnp.where(jnp.arange(raw.shape[1]) % 3 == 0, 1e6, -1e6).astype(dtype)[None] * jnp.ones_like(raw)
    names = ["y", "log derivative", "dy/dx", "d log derivative/dx", "gradient raw", "gradient x"]
    for direction, function in zip(("forward", "inverse"), compiled(name), strict=True):
        for what, value in zip(names, jax.tree.leaves(function(raw, x)), strict=True):
            bad = np.flatnonzero(~np.isfinite(np.asarray(value)).reshape(N, -1).all(axis=1))
            assert bad.size == 0, f"{direction} {what} is not finite at x = {x[bad]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["interval spline", "line spline", "one bin"])
def test_outside_the_ends_nothing_happens(name, dtype):
    _, lower, upper, _ = MAPS[name]
    ends = np.asarray([lower, upper], dtype)
    out = np.nextafter(ends, np.asarray([-np.inf, np.inf], dtype))
    x = jnp.asarray(np.concatenate([out, [-1e6, 1e6, 1e30], ends]), dtype)
    n_outside = len(x) - 2
    x = jnp.concatenate([x, x[:1] * jnp.ones(N - len(x), dtype)])
    for function in compiled(name):
        (y, log_derivative), _, _ = function(random_raw(name, 3, dtype, 2.0), x)
        assert (y[:n_outside] == x[:n_outside]).all() and (log_derivative[:n_outside] == 0).all()
        ends = slice(n_outside, n_outside + 2)
        if name == "interval spline":  # its own slopes hold at its ends
            np.testing.assert_allclose(y[ends], x[ends], rtol=4 * float(jnp.finfo(dtype).eps))
            assert (jnp.abs(log_derivative[ends]) > 1e-3).all()
        else:
            assert (y[ends] == x[ends]).all() and (log_derivative[ends] == 0).all()


@pytest.mark.parametrize("name", ["line spline", "one bin"])
def test_the_line_spline_has_a_continuous_derivative(name):
    _, lower, upper, _ = MAPS[name]
    x = jnp.asarray(np.where(np.arange(N) % 2, lower + 1e-12, upper - 1e-12))
    (_, log_derivative), _, _ = compiled(name)[0](random_raw(name, 4, "float64", 1.0), x)
    np.testing.assert_allclose(log_derivative, 0, atol=1e-7)


@pytest.mark.parametrize("name", CIRCLES)
def test_circular_maps_are_periodic_and_smooth_at_the_seam(name):
    _, lower, upper, _ = MAPS[name]
    period = upper - lower
    raw = random_raw(name, 5, "float64", 1.0)
    x = jnp.asarray(np.random.default_rng(5).uniform(lower, upper, N))
    for function in compiled(name):
        (y, log_derivative), _, _ = function(raw, x)
        for turns in (-3, 1, 1000):
            (moved, moved_log), _, _ = function(raw, x + turns * period)
            np.testing.assert_allclose(moved, y + turns * period, rtol=0, atol=1e-9)
            np.testing.assert_allclose(moved_log, log_derivative, atol=1e-8)
        seam = jnp.full_like(x, upper)
        (before, log_before), (after, log_after) = (function(raw, seam + step)[0] for step in (-1e-12, 1e-12))
        np.testing.assert_allclose(before, after, rtol=0, atol=1e-9)
        np.testing.assert_allclose(log_before, log_after, atol=1e-6)
        assert float(jnp.max(jnp.abs(log_before))) > 0.1  # slopes at the seam are free
        if name != "rotated circle":  # without a shift, the beginning stays
            np.testing.assert_allclose(function(raw, jnp.full_like(x, lower))[0][0], lower, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_laps_and_wrap(dtype):
    x = jnp.asarray([-0.25, 0.0, -1e-30, 0.999, 1.0, 7.5, -1e6, 1e30, -1e30], dtype)
    position, offset = laps(x, 0.0, 1.0)
    np.testing.assert_allclose(position + offset, x, rtol=1e-7, atol=1e-29)
    assert ((position >= 0) & (position <= 1)).all()
    np.testing.assert_allclose(wrap(x)[:6], [0.75, 0, 0, 0.999, 0, 0.5], atol=1e-7)
    assert ((wrap(x) >= 0) & (wrap(x) < 1)).all()
    np.testing.assert_allclose(wrap(jnp.asarray([0.75, -0.75], dtype), -0.5, 0.5), [-0.25, 0.25])


# ---------------------------------------------------------------------- known answers


def textbook_spline(x, widths, heights, slopes):
    """Durkan et al., arXiv:1906.04032, section 3.1, one number at a time."""
    knots, values = np.concatenate([[0], np.cumsum(widths)]), np.concatenate([[0], np.cumsum(heights)])
    k = min(max(np.searchsorted(knots, x, side="right") - 1, 0), len(widths) - 1)
    xi, s = (x - knots[k]) / widths[k], heights[k] / widths[k]
    d0, d1 = slopes[k], slopes[k + 1]
    denominator = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
    y = values[k] + heights[k] * (s * xi**2 + d0 * xi * (1 - xi)) / denominator
    return y, np.log(s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / denominator**2)


def unit_splines(seed, n, n_bins):
    rng = np.random.default_rng(seed)
    widths, heights = rng.dirichlet(np.full(n_bins, 2.0), (2, n))
    return rng.uniform(size=n), widths, heights, 10 ** rng.uniform(-3, 3, (n, n_bins + 1))


@pytest.mark.code("users")
def test_rational_quadratic_against_the_textbook():
    x, widths, heights, slopes = unit_splines(0, 200, 5)
    x[:3] = [0, 1, widths[2, 0]]
    expected = np.array([textbook_spline(*one) for one in zip(x, widths, heights, slopes, strict=True)])
    y, log_derivative = jax.jit(rational_quadratic)(*map(jnp.asarray, (x, widths, heights, slopes)))
    np.testing.assert_allclose(y, expected[:, 0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(log_derivative, expected[:, 1], atol=1e-9)


@pytest.mark.code("users")
def test_single_precision_inverse_loses_no_digits():
    """The quadratic formula as it stands loses half the digits where slopes at the knots are far apart."""
    y, widths, heights, slopes = (np.float32(a) for a in unit_splines(1, 4000, 4))
    inverse = jax.jit(inverse_rational_quadratic)
    rough, _ = inverse(*map(jnp.asarray, (y, widths, heights, slopes)))
    exact, log_derivative = inverse(*(jnp.asarray(a, jnp.float64) for a in (y, widths, heights, slopes)))
    wrong = jnp.abs(rough - exact) / (1 + jnp.exp(log_derivative))
    assert float(jnp.max(jnp.where(log_derivative < math.log(100), wrong, 0))) < 1e-6


def test_raw_parameters_are_softmax_and_softplus():
    n_bins, min_bin, min_slope = 4, 0.02, 0.01
    rng = np.random.default_rng(2)
    raw, x = rng.normal(size=(50, 3 * n_bins + 1)), rng.uniform(-1, 3, 50)

    def sizes(r):
        return min_bin + (1 - n_bins * min_bin) * np.exp(r) / np.exp(r).sum()

    mapping = interval_spline(n_bins, -1.0, 3.0, min_bin, min_slope)
    y, log_derivative = map(np.asarray, jax.jit(mapping.forward)(raw, x))
    for one, at_x, at_y, log_slope in zip(raw, x, y, log_derivative, strict=True):
        slopes = min_slope + np.log1p(np.exp(one[8:]) * np.expm1(1 - min_slope))
        unit, expected = textbook_spline((at_x + 1) / 4, sizes(one[:4]), sizes(one[4:8]), slopes)
        assert float(at_y) == pytest.approx(4 * unit - 1, abs=1e-12)
        assert float(log_slope) == pytest.approx(expected, abs=1e-11)


def test_moebius_against_complex_numbers():
    """Rezende et al., arXiv:2002.02428, section 2.1: (1 - |w|^2) / |z - w|^2 (z - w) - w, then turned."""
    rng = np.random.default_rng(3)
    theta, raw = rng.uniform(0, 2 * np.pi, 100), rng.normal(size=(100, 2))
    w = 0.99 * (raw @ [1, 1j]) / np.sqrt(1 + (raw**2).sum(axis=1))

    def h(z):
        return (1 - abs(w) ** 2) / abs(z - w) ** 2 * (z - w) - w

    y, log_derivative = jax.jit(moebius(0.0, 2 * np.pi).forward)(raw, theta)
    z = np.exp(1j * theta)
    np.testing.assert_allclose(np.exp(1j * np.asarray(y)), h(z) / h(np.ones(100)), atol=1e-12)
    np.testing.assert_allclose(log_derivative, np.log((1 - abs(w) ** 2) / abs(z - w) ** 2), atol=1e-12)


def test_affine_and_shift():
    y, log_derivative = affine(bound=2.0).forward(jnp.asarray([[0.5, -1.0]]), jnp.asarray([3.0]))
    s = 2 * math.tanh(0.25)
    np.testing.assert_allclose([y[0], log_derivative[0]], [3 * math.exp(s) - 1, s])
    y, log_derivative = shift().forward(jnp.asarray([[0.25]]), jnp.asarray([3.0]))
    np.testing.assert_allclose([y[0], log_derivative[0]], [3.25, 0])


def test_sinh_arcsinh_against_its_formula():
    """Jones and Pewsey, Biometrika 96, 761 (2009), with soft bounds; y runs like x to the power of exp(t)."""
    width, bound, raw = 2.0, 0.8, np.array([0.6, -1.5])
    skew, t = bound * np.tanh(raw / bound)
    x = np.array([-3.0, -0.1, 0.0, 2.0, 1e9, 1e10])
    mapping, raws = sinh_arcsinh(width, bound), jnp.asarray(np.tile(raw, (len(x), 1)))
    y, log_derivative = mapping.forward(raws, jnp.asarray(x))
    inner = np.arcsinh(x / width)
    np.testing.assert_allclose(y, width * np.sinh(np.exp(t) * inner + skew), rtol=1e-12)
    slope = np.exp(t) * np.cosh(np.exp(t) * inner + skew) / np.sqrt(1 + (x / width) ** 2)
    np.testing.assert_allclose(log_derivative, np.log(slope), atol=1e-12)
    assert math.log10(y[-1] / y[-2]) == pytest.approx(math.exp(t), abs=1e-9)


def test_compose_applies_the_first_map_first():
    raw, x = jnp.asarray([[2.0, 0.3, 0.1]]), jnp.asarray([0.5])
    y, _ = compose(shift(), affine()).forward(raw, x)
    assert float(y[0]) == pytest.approx(2.5 * math.exp(3 * math.tanh(0.1)) + 0.1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: interval_spline(0),
        lambda: interval_spline(4, 1.0, 1.0),
        lambda: circular_spline(20, min_bin=0.05),
        lambda: line_spline(4, 1.0, min_slope=1.0),
        lambda: line_spline(4, -1.0),
        lambda: moebius(1.0, 0.0),
        lambda: moebius(max_radius=1.0),
        lambda: scaled([1.0, 0.0]),
        lambda: scaled(np.inf),
        lambda: repeat(identity(), 0),
        lambda: axis_coupling(toy_network(2, 3), shift(), (0, 1, 2)),
        lambda: axis_coupling(toy_network(2, 3), shift(), ()),
        lambda: axis_coupling(toy_network(2, 3), shift(), (3,)),
        lambda: axis_coupling(toy_network(2, 3), shift(), (0, 0)),
        lambda: leaf_coupling(toy_network(3, 3), shift(), "x", "x"),
    ],
)
def test_impossible_maps_are_refused(build):
    with pytest.raises(ValueError):
        build()


# -------------------------------------------------------------------------- configurations


def toy_network(n_in, n_out, scale=0.2):
    """Two layers; every atom sees the one before it."""

    def init(key, h):
        a, b, c = jax.random.split(key, 3)
        return {
            "own": jax.random.normal(a, (n_in, 8), h.dtype),
            "other": jax.random.normal(b, (n_in, 8), h.dtype),
            "out": scale * jax.random.normal(c, (8, n_out), h.dtype),
        }

    def apply(params, h):
        return jnp.tanh(h @ params["own"] + jnp.roll(h, 1, axis=0) @ params["other"]) @ params["out"]

    return Network(init, apply)


SPLINE = line_spline(4, 3.0)
TORUS = compose(circular_spline(3), shift())
AXIS = axis_coupling(toy_network(2, SPLINE.n_parameters), SPLINE, (1,))
TWO_AXES = axis_coupling(toy_network(1, 2 * TORUS.n_parameters), TORUS, (2, 0))
# Where the elementwise map does not matter, one that compiles fast.
STRETCH = chain(
    axis_coupling(toy_network(2, 2), affine(), (0,)),
    axis_coupling(toy_network(1, 4), affine(), (2, 1)),
)


def cage_coupling():
    """Translation-equivariant: even atoms move relative to the mean of the odd ones, given their differences."""

    def split(x):
        cage = jnp.mean(x[1::2], axis=0, keepdims=True)
        return x[::2] - cage, x[1::2]

    def merge(moved, frozen):
        cage = jnp.mean(frozen, axis=0, keepdims=True)
        return jnp.stack([moved + cage, frozen], axis=1).reshape(-1, 3)

    inner = toy_network(3, 6)
    differences = Network(
        lambda key, h: inner.init(key, h - jnp.roll(h, 1, axis=0)),
        lambda params, h: inner.apply(params, h - jnp.roll(h, 1, axis=0)),
    )
    return coupling(differences, affine(), split, merge)


def flip():
    """Swaps the roles of even and odd atoms; equivariant, volume-preserving."""

    def turn(params, x, state):
        return x[::-1], jnp.zeros((), x.dtype)

    return Bijector(lambda key, x, state: (), turn, turn)


CAGE = chain(cage_coupling(), flip(), cage_coupling())
MIXING = np.linalg.qr(np.random.default_rng(9).normal(size=(12, 12)))[0] * np.linspace(0.5, 2, 12)


def linear(matrix):
    return lambda x: (jnp.asarray(matrix, x.dtype) @ x.reshape(-1)).reshape(x.shape)


def random_params(bijector, x, seed, scale=0.3):
    """Parameters of the right shapes for any bijector, those that start as the identity included."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda x: bijector.init(jax.random.key(0), x, STATE), x)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype), shapes)


def array(rng):
    return rng.normal(size=(4, 3))


def six_atoms(rng):
    return rng.normal(size=(6, 3))


def named(rng):
    return {"auxiliary": rng.normal(size=(4, 3)), "box": rng.normal(), "x": rng.normal(size=(4, 3))}


BIJECTORS = {
    "identity": (identity(), named),
    "scaled": (scaled([[2.0, -0.5, 3.0]], 0.25), array),
    "elementwise": (elementwise(affine()), array),
    "shared elementwise": (elementwise(TORUS, shared_axes=(0,)), array),
    "one axis": (AXIS, array),
    "two axes": (TWO_AXES, array),
    "chain": (chain(STRETCH, scaled(0.7), STRETCH), array),
    "invert": (invert(STRETCH), array),
    "repeat": (repeat(STRETCH, 3), array),
    "at": (at("x", STRETCH), named),
    "whitened": (whitened(STRETCH, linear(MIXING), linear(np.linalg.inv(MIXING))), array),
    "cage": (CAGE, six_atoms),
    "augmented": (augmented_coupling(toy_network(3, 6), affine()), named),
}


def configuration(name, seed, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), BIJECTORS[name][1](np.random.default_rng(seed)))


@functools.cache
def compiled_bijector(bijector):
    """Jacobian of forward, what forward gives, and the inverse of that."""

    def everything(params, x):
        flat, unravel = ravel_pytree(x)

        def forward(v):
            y, log_det = bijector.forward(params, unravel(v), STATE)
            return ravel_pytree(y)[0], (y, log_det)

        jacobian, (y, log_det) = jax.jacfwd(forward, has_aux=True)(flat)
        return jacobian, (y, log_det), bijector.inverse(params, y, STATE)

    return jax.jit(everything)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BIJECTORS)
def test_bijector_inverse_and_log_det(name, dtype):
    """float32 to 2e-4: slopes below one magnify rounding in the inverse."""
    bijector, atol = BIJECTORS[name][0], {"float64": 1e-10, "float32": 2e-4}[dtype]
    for seed in range(3):
        x = configuration(name, seed, dtype)
        params = random_params(bijector, x, seed)
        jacobian, (y, log_det), (back, back_log_det) = compiled_bijector(bijector)(params, x)
        assert log_det.dtype == back_log_det.dtype == jnp.dtype(dtype)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), y) == jax.tree.map(lambda a: (a.shape, a.dtype), x)
        expected = np.linalg.slogdet(np.asarray(jacobian, np.float64))[1]
        assert float(log_det) == pytest.approx(expected, abs=atol)
        assert float(back_log_det) == pytest.approx(-expected, abs=atol)
        assert (abs(expected) > 1e-2) == (name != "identity")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), back, x)


def test_scaled():
    y, log_det = scaled([[2.0, -0.5, 3.0]], 0.25).forward((), jnp.ones((4, 3)), STATE)
    np.testing.assert_allclose(y, np.tile([2.25, -0.25, 3.25], (4, 1)))
    assert float(log_det) == pytest.approx(4 * math.log(3))
    x, back_log_det = scaled([[2.0, -0.5, 3.0]], 0.25).inverse((), y, STATE)
    np.testing.assert_allclose(x, np.ones((4, 3)))
    assert float(back_log_det) == pytest.approx(-4 * math.log(3))


def test_an_empty_chain_is_the_identity():
    x = jnp.ones((2, 3), jnp.float32)
    y, log_det = chain().forward(chain().init(jax.random.key(0), x, STATE), x, STATE)
    assert (y == x).all() and log_det == 0 and log_det.dtype == x.dtype


def test_chain_applies_the_first_map_first():
    both = chain(scaled(2.0), scaled(1.0, 1.0))
    assert float(both.forward(((), ()), jnp.asarray(3.0), STATE)[0]) == 7
    assert float(both.inverse(((), ()), jnp.asarray(7.0), STATE)[0]) == 3


def test_repeat_is_a_chain_with_the_same_parameters():
    x = configuration("one axis", 0, "float64")
    layer, n = axis_coupling(toy_network(2, 2), affine(), (0,)), 3
    repeated, chained = repeat(layer, n), chain(layer, layer, layer)
    stacked = repeated.init(jax.random.key(1), x, STATE)
    params = tuple(jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(n))
    assert not np.allclose(params[0]["own"], params[1]["own"])
    for direction in ("forward", "inverse"):
        y, log_det = getattr(repeated, direction)(stacked, x, STATE)
        expected, expected_log_det = getattr(chained, direction)(params, x, STATE)
        np.testing.assert_allclose(y, expected, atol=1e-12)
        assert float(log_det) == pytest.approx(float(expected_log_det), abs=1e-12)
        assert abs(float(log_det)) > 1e-2


def test_chain_draws_parameters_of_its_own_for_each_layer():
    layer = axis_coupling(toy_network(2, 2), affine(), (0,))
    first, second = chain(layer, layer).init(jax.random.key(1), configuration("one axis", 0, "float64"), STATE)
    assert not np.allclose(first["own"], second["own"])


def test_repeat_without_parameters():
    twice = repeat(scaled(2.0), 5)
    y, log_det = twice.forward(twice.init(jax.random.key(0), jnp.ones(3), STATE), jnp.ones(3), STATE)
    np.testing.assert_allclose(y, 32)
    assert float(log_det) == pytest.approx(15 * math.log(2))


@pytest.mark.parametrize(("name", "moving"), [("one axis", [1]), ("two axes", [0, 2])])
def test_axis_coupling_leaves_the_frozen_axes_untouched(name, moving):
    x, layer = configuration(name, 1, "float64"), BIJECTORS[name][0]
    _, (y, _), (back, _) = compiled_bijector(layer)(random_params(layer, x, 1), x)
    assert list(np.flatnonzero((y != x).any(axis=0))) == moving
    frozen = [axis for axis in range(3) if axis not in moving]
    assert (back[:, frozen] == x[:, frozen]).all()


def test_leaf_coupling_moves_one_leaf():
    x, layer = configuration("augmented", 1, "float64"), leaf_coupling(toy_network(3, 6), affine(), "x", "auxiliary")
    y, _ = layer.forward(random_params(layer, x, 0), x, STATE)
    assert (y["auxiliary"] == x["auxiliary"]).all() and y["box"] == x["box"] and (y["x"] != x["x"]).all()


def test_augmented_coupling_moves_both_copies():
    x, layer = configuration("augmented", 2, "float64"), BIJECTORS["augmented"][0]
    y, _ = layer.forward(random_params(layer, x, 0), x, STATE)
    assert (y["x"] != x["x"]).all() and (y["auxiliary"] != x["auxiliary"]).all() and y["box"] == x["box"]


@pytest.mark.parametrize("name", ["one axis", "two axes"])
def test_couplings_start_as_the_identity_with_a_zero_network(name):
    inner, n_in, axes = {"one axis": (SPLINE, 2, (1,)), "two axes": (TORUS, 1, (0, 2))}[name]
    layer = axis_coupling(toy_network(n_in, len(axes) * inner.n_parameters, scale=0.0), inner, axes)
    x = configuration(name, 3, "float64")
    y, log_det = jax.jit(layer.forward)(layer.init(jax.random.key(0), x, STATE), x, STATE)
    np.testing.assert_allclose(y, x, atol=1e-14)
    assert abs(float(log_det)) < 1e-13


def test_shared_elementwise_parameters_do_not_know_the_number_of_atoms():
    layer = elementwise(affine(), shared_axes=(0,))
    raw = layer.init(jax.random.key(0), jnp.ones((4, 3)), STATE)
    assert raw.shape == (1, 3, 2)
    raw = raw + jnp.arange(1, 3)[None, None] / 10
    few, many = (layer.forward(raw, jnp.full((n, 3), 0.3), STATE) for n in (1, 5))
    np.testing.assert_allclose(many[0], np.tile(few[0], (5, 1)))
    assert float(many[1]) == pytest.approx(5 * float(few[1]))


# ---------------------------------------------------------------------------- mean-free


def mean_free_basis(n_atoms):
    """Orthonormal columns (3 n, 3 (n - 1)) that span configurations of zero mean."""
    helmert = np.linalg.svd(np.ones((1, n_atoms)))[2][1:]
    return np.kron(helmert.T, np.eye(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_free_log_det_is_that_of_the_subspace(dtype):
    bijector, atol = mean_free(CAGE), {"float64": 1e-10, "float32": 2e-4}[dtype]
    q = mean_free_basis(6)
    for seed in range(3):
        x = configuration("cage", seed, dtype)
        x = x - jnp.mean(x, axis=0, keepdims=True)
        params = random_params(bijector, x, seed)
        jacobian, (y, log_det), (back, back_log_det) = compiled_bijector(bijector)(params, x)
        expected = np.linalg.slogdet(q.T @ np.asarray(jacobian, np.float64) @ q)[1]
        assert abs(expected) > 1e-2
        assert float(log_det) == pytest.approx(expected, abs=atol)
        assert float(back_log_det) == pytest.approx(-expected, abs=atol)
        np.testing.assert_allclose(jnp.mean(y, axis=0), 0, atol=10 * float(jnp.finfo(dtype).eps))
        np.testing.assert_allclose(back, x, atol=atol)
        drift = jnp.mean(compiled_bijector(CAGE)(params, x)[1][0], axis=0)
        assert float(jnp.max(jnp.abs(drift))) > 1e-3  # there is a mean to remove


def test_the_cage_coupling_is_translation_equivariant():
    x, c = configuration("cage", 5, "float64"), jnp.asarray([[0.3, -0.2, 0.7]])
    params = random_params(CAGE, x, 0)
    y, log_det = CAGE.forward(params, x, STATE)
    moved, moved_log_det = CAGE.forward(params, x + c, STATE)
    np.testing.assert_allclose(moved, y + c, atol=1e-12)
    assert float(moved_log_det) == pytest.approx(float(log_det), abs=1e-10)
