"""Maps of the circle: rotations and Moebius transformations.

A circle is the interval [lower, upper) with its ends joined. Maps are *lifted* to the line, that is
f(x + period) = f(x) + period: an input outside the interval keeps its number of laps, so that maps are
smooth across the seam and their inverses exact; `wrap` forgets the laps where a position is wanted.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from freeflow.bijectors.core import Elementwise


def laps(x: Float[Array, "*n"], lower: float, upper: float) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Split x into a position on the circle [lower, upper) and the offset of its laps: x = position + offset.

    Rounding may put a position on `upper`. Where x is so large that rounding exceeds the period, the
    position is lost: it is `lower`, and the offset the rest.
    """
    period = upper - lower
    near = jnp.abs(x) < period / float(jnp.finfo(x.dtype).eps)
    offset = jax.lax.stop_gradient(jnp.where(near, period * jnp.floor((x - lower) / period), x - lower))
    return x - offset, offset


def wrap(x: Float[Array, "*n"], lower: float = 0.0, upper: float = 1.0) -> Float[Array, "*n"]:
    """Position on the circle [lower, upper)."""
    position = laps(x, lower, upper)[0]
    return jnp.where((position >= lower) & (position < upper), position, lower)


def moebius(lower: float = 0.0, upper: float = 1.0, max_radius: float = 0.99) -> Elementwise:
    """Moebius transformation of the circle that keeps `lower` in place; two parameters.

    With the circle as the unit circle of the complex plane, z = exp(i theta), it is
    z -> (z - w) / (1 - conj(w) z), turned back so that z = 1 stays (Rezende et al.,
    arXiv:2002.02428, section 2.1). Its factors are z (1 - w / z) / conj(1 - w / z), so that the angle
    grows by 2 arg(1 - w / z), which never leaves (-pi, pi) and needs no case distinction. The inverse
    is the same map with -w.

    Args:
        lower: Where the circle begins.
        upper: Where it ends, and begins again.
        max_radius: Bound on |w|: the raw parameters are a vector r of the plane, and
            w = max_radius r / sqrt(1 + r^2).

    Raises:
        ValueError: If the circle is empty or `max_radius` does not lie between 0 and 1.
    """
    if not upper > lower:
        raise ValueError(f"the circle [{lower}, {upper}) is empty")
    if not 0 < max_radius < 1:
        raise ValueError(f"the centre's largest radius must lie between 0 and 1, got {max_radius}")
    unit = (upper - lower) / (2 * math.pi)  # of x, per radian

    def centre(raw: Array) -> Array:
        return max_radius * raw / jnp.sqrt(1 + jnp.sum(raw * raw, axis=-1, keepdims=True))

    def half_turn(w: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Half the angle that is added to exp(i theta): arg(1 - w exp(-i theta)), and that number."""
        real = 1 - (w[..., 0] * cos + w[..., 1] * sin)
        imaginary = w[..., 0] * sin - w[..., 1] * cos
        return jnp.atan2(imaginary, real), real, imaginary

    def turn(w: Array, theta: Array) -> tuple[Array, Array]:
        angle, real, imaginary = half_turn(w, jnp.cos(theta), jnp.sin(theta))
        log_derivative = jnp.log1p(-jnp.sum(w * w, axis=-1)) - jnp.log(real * real + imaginary * imaginary)
        return 2 * angle, log_derivative

    def at_lower(w: Array) -> Array:
        return 2 * jnp.atan2(-w[..., 1], 1 - w[..., 0])

    def forward(raw: Array, x: Array) -> tuple[Array, Array]:
        position, start = laps(x, lower, upper)
        w = centre(raw)
        angle, log_derivative = turn(w, (position - lower) / unit)
        return position + unit * (angle - at_lower(w)) + start, log_derivative

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        position, start = laps(y, lower, upper)
        w = centre(raw)
        turned = (position - lower) / unit + at_lower(w)
        angle, log_derivative = turn(-w, turned)
        return lower + unit * (turned + angle) + start, log_derivative

    return Elementwise(2, forward, inverse)
