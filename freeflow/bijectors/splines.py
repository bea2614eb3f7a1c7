"""Monotonic rational-quadratic splines (Durkan et al., arXiv:1906.04032), elementwise.

Three domains: an interval; the line, where the tails are the identity; and the circle, where the
derivative is periodic (Rezende et al., arXiv:2002.02428). Raw parameters are unconstrained and those
of the identity are zero: bins of equal size, and a slope of one at every knot.

Bins are picked by comparing with all knots and summing over a one-hot selection: a dozen bins fit in a
vector register, and nothing is gathered. In a bin, with s its mean slope, d0 and d1 the slopes at its
ends and t in [0, 1] the place within it, all terms below are written as sums of positive numbers, so
that single precision loses no digits to cancellation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from freeflow.bijectors.circle import laps
from freeflow.bijectors.core import Elementwise

MIN_BIN = 1e-3
MIN_SLOPE = 1e-3


class _Bin(NamedTuple):
    """The bin that holds a number: its lower left corner, its size, and the slopes at its ends."""

    left: Array
    bottom: Array
    width: Array
    height: Array
    slope_left: Array
    slope_right: Array


def rational_quadratic(
    x: Float[Array, "*n"],
    widths: Float[Array, "*n k"],
    heights: Float[Array, "*n k"],
    slopes: Float[Array, "*n k+1"],
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Spline from [0, 1] onto itself, and the logarithm of its derivative.

    Args:
        x: Numbers in [0, 1]; rounding beyond the ends is harmless.
        widths: Sizes of the bins along x; positive, their sum is one.
        heights: Sizes of the bins along y, likewise.
        slopes: Derivatives at the knots; positive.
    """
    return _rise(x, _bin_of(x, widths, widths, heights, slopes))


def inverse_rational_quadratic(
    y: Float[Array, "*n"],
    widths: Float[Array, "*n k"],
    heights: Float[Array, "*n k"],
    slopes: Float[Array, "*n k+1"],
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Inverse of `rational_quadratic`, and the logarithm of its own derivative.

    Args:
        y: Numbers in [0, 1].
        widths: As in `rational_quadratic`.
        heights: Likewise.
        slopes: Likewise.
    """
    return _descend(y, _bin_of(y, heights, widths, heights, slopes))


def _rise(x: Array, b: _Bin) -> tuple[Array, Array]:
    """From x to y within one bin."""
    t = _clamped((x - b.left) / b.width)
    s = b.height / b.width
    fraction, log_derivative = _evaluate(t, s, b.slope_left, b.slope_right)
    return b.bottom + b.height * fraction, log_derivative


def _descend(y: Array, b: _Bin) -> tuple[Array, Array]:
    """From y to x within one bin.

    The quadratic equation for t has the root t = 2 s eta / (2 s eta + g + r) with eta the
    height as a fraction of the bin's, g = d0 (1 - eta) - d1 eta and r^2 = g^2 + 4 s^2 eta (1 - eta).
    Where g is negative, (g + r) (r - g) = 4 s^2 eta (1 - eta) removes the difference of like numbers.
    """
    eta = _clamped((y - b.bottom) / b.height)
    s = b.height / b.width
    g = b.slope_left * (1 - eta) - b.slope_right * eta
    root = jnp.sqrt(g * g + 4 * s * s * eta * (1 - eta))
    left, right = 2 * s * eta, 2 * s * (1 - eta)
    size = root + jnp.where(g >= 0, g, -g)
    t = jnp.where(g >= 0, left, size) / (size + jnp.where(g >= 0, left, right))
    _, log_derivative = _evaluate(t, s, b.slope_left, b.slope_right)
    return b.left + b.width * t, -log_derivative


def _evaluate(t: Array, s: Array, d0: Array, d1: Array) -> tuple[Array, Array]:
    """Height within the bin as a fraction of the bin's, and the logarithm of the derivative."""
    mixed, rest = t * (1 - t), 1 - t
    denominator = s * (t * t + rest * rest) + (d0 + d1) * mixed
    fraction = (s * t * t + d0 * mixed) / denominator
    numerator = d1 * t * t + 2 * s * mixed + d0 * rest * rest
    return fraction, 2 * jnp.log(s / denominator) + jnp.log(numerator)


def _clamped(t: Array, lower: float = 0.0, upper: float = 1.0) -> Array:
    """T moved into [lower, upper], which only rounding makes it leave; the gradient is that of t."""
    return t + jax.lax.stop_gradient(jnp.clip(t, lower, upper) - t)


def _bin_of(x: Array, sizes: Array, widths: Array, heights: Array, slopes: Array) -> _Bin:
    """The bin of x, where `sizes` are those of the bins along x's own axis."""
    above = (x[..., None] >= jnp.cumsum(sizes, axis=-1)[..., :-1]).astype(x.dtype)  # inner knots
    one = jnp.ones_like(x)[..., None]
    before = jnp.concatenate([above, 0 * one], axis=-1)  # bins that lie wholly below x
    here = jnp.concatenate([one, above], axis=-1) - before

    def pick(of: Array, mask: Array = here) -> Array:
        return jnp.sum(mask * of, axis=-1)

    return _Bin(
        left=pick(widths, before),
        bottom=pick(heights, before),
        width=pick(widths),
        height=pick(heights),
        slope_left=pick(slopes[..., :-1]),
        slope_right=pick(slopes[..., 1:]),
    )


# --------------------------------------------------------------------- from raw parameters


def interval_spline(
    n_bins: int, lower: float = 0.0, upper: float = 1.0, min_bin: float = MIN_BIN, min_slope: float = MIN_SLOPE
) -> Elementwise:
    """Spline of an interval onto itself, 3 n_bins + 1 parameters; numbers outside stay where they are.

    Args:
        n_bins: Number of bins.
        lower: Where the interval begins.
        upper: Where it ends.
        min_bin: Least width and height of a bin, as a fraction of the interval.
        min_slope: Least derivative at a knot.

    Raises:
        ValueError: If the interval is empty or the least sizes are impossible.
    """
    return _spline(n_bins, n_bins + 1, lambda raw: raw, lower, upper, min_bin, min_slope, domain="interval")


def line_spline(n_bins: int, bound: float, min_bin: float = MIN_BIN, min_slope: float = MIN_SLOPE) -> Elementwise:
    """Spline of [-bound, bound] with slope one at the ends, 3 n_bins - 1 parameters; the identity outside.

    The map of the line is continuously differentiable. Arguments and errors as in `interval_spline`.
    """

    def raw_slopes_of(inner: Array) -> Array:
        zero = jnp.zeros_like(inner, shape=(*inner.shape[:-1], 1))  # raw zero is slope one
        return jnp.concatenate([zero, inner, zero], axis=-1)

    return _spline(n_bins, n_bins - 1, raw_slopes_of, -bound, bound, min_bin, min_slope, domain="line")


def circular_spline(
    n_bins: int, lower: float = 0.0, upper: float = 1.0, min_bin: float = MIN_BIN, min_slope: float = MIN_SLOPE
) -> Elementwise:
    """Spline of the circle [lower, upper), 3 n_bins parameters; its derivative is the same at both ends.

    It keeps `lower` in place: compose it with a `shift` to move that too. It is lifted to the line,
    f(x + period) = f(x) + period; see `freeflow.bijectors.circle`. Arguments and errors as in
    `interval_spline`.
    """

    def raw_slopes_of(distinct: Array) -> Array:
        return jnp.concatenate([distinct, distinct[..., :1]], axis=-1)

    return _spline(n_bins, n_bins, raw_slopes_of, lower, upper, min_bin, min_slope, domain="circle")


def _spline(
    n_bins: int,
    n_slopes: int,
    raw_slopes_of: Callable[[Array], Array],
    lower: float,
    upper: float,
    min_bin: float,
    min_slope: float,
    domain: Literal["interval", "line", "circle"],
) -> Elementwise:
    """A spline whose `n_slopes` raw slopes `raw_slopes_of` lays out over the n_bins + 1 knots."""
    if n_bins < 1:
        raise ValueError(f"a spline needs at least one bin, got {n_bins}")
    if not upper > lower:
        raise ValueError(f"the interval [{lower}, {upper}] is empty")
    if not 0 < n_bins * min_bin < 1:
        raise ValueError(f"{n_bins} bins of at least {min_bin} of the interval do not fit into it")
    if not 0 < min_slope < 1:
        raise ValueError(f"the least slope must lie between 0 and 1, got {min_slope}")
    length = upper - lower
    offset = math.log(math.expm1(1 - min_slope))  # where softplus is 1 - min_slope

    def sizes(raw: Array) -> Array:
        return min_bin + (1 - n_bins * min_bin) * jax.nn.softmax(raw, axis=-1)

    def slope(raw: Array) -> Array:
        return min_slope + jax.nn.softplus(raw + offset)

    def on_unit_interval(raw: Array, x: Array, inverse: bool) -> tuple[Array, Array]:
        widths, heights = sizes(raw[..., :n_bins]), sizes(raw[..., n_bins : 2 * n_bins])
        # Softplus is dear: pick the two raw slopes that count first.
        b = _bin_of(x, heights if inverse else widths, widths, heights, raw_slopes_of(raw[..., 2 * n_bins :]))
        b = b._replace(slope_left=slope(b.slope_left), slope_right=slope(b.slope_right))
        return (_descend if inverse else _rise)(x, b)

    def apply(raw: Array, x: Array, inverse: bool) -> tuple[Array, Array]:
        if domain == "circle":
            position, start = laps(x, lower, upper)
            t, log_derivative = on_unit_interval(raw, (position - lower) / length, inverse)
            return (lower + length * t) + start, log_derivative
        # Numbers outside never reach the spline, so that their gradients cannot spoil others. At the ends
        # the line takes its tails; an interval's own slopes hold up to and including its ends.
        inside = (x > lower) & (x < upper) if domain == "line" else (x >= lower) & (x <= upper)
        t, log_derivative = on_unit_interval(raw, (jnp.where(inside, x, lower) - lower) / length, inverse)
        y = _clamped(lower + length * t, lower, upper)
        return jnp.where(inside, y, x), jnp.where(inside, log_derivative, 0)

    def forward(raw: Array, x: Array) -> tuple[Array, Array]:
        return apply(raw, x, inverse=False)

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        return apply(raw, y, inverse=True)

    return Elementwise(2 * n_bins + n_slopes, forward, inverse)
