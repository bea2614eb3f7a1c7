"""Radial maps around a fixed solute in a periodic box: solvent shells move outward, directions stay.

A map takes every atom by itself: positions (n, 3) relative to the solute [length]. Along its direction an atom moves
between the solute and an end: the sphere that fits the box, beyond which nothing moves, or the surface of
the box itself. With v = (r / end)^3, a fraction of volume, a map is an increasing function of v on [0, 1]; since
directions stay, an atom's Jacobian is dv'/dv. Atoms are moved as their images in the box are, and keep their
own image.

References: Jarzynski, Phys. Rev. E 65, 046122 (2002), section V.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from freeflow.bijectors.core import chain
from freeflow.bijectors.splines import interval_spline
from freeflow.errors import InputError
from freeflow.networks import mlp
from freeflow.types import Bijector, Key, Params, Scalar, ThermodynamicState

Domain = Literal["sphere", "box"]
# (v, end, directions (n, 3)) -> v', ln dv'/dv
Along = Callable[[Array, Array, Array], tuple[Array, Array]]

_DEPTH = 0.6  # a spline begins at this fraction of B's excluded volume, where no sample ever is


def analytic_radial(box_length: float, radii: tuple[float, float], domain: Domain = "sphere") -> Bijector:
    """Jarzynski's map between solutes of radii R_A and R_B: shells outside R_A become shells outside R_B.

    r'^3 - R_B^3 is proportional to r^3 - R_A^3 up to the end, which stays in place: all of the free volume along a
    direction shrinks by one factor. Inside R_A, where no sample is, r'^3 is proportional to r^3, so that the
    map is invertible everywhere.

    Args:
        box_length: Edge L of the cubic box, with the solute at its centre [length].
        radii: Of the solute in A and B [length], between 0 and L/2.
        domain: Where the map ends: "sphere", L/2 from the solute, or "box", up to sqrt(3) L/2.

    Raises:
        InputError: If a radius or the box is impossible, or the domain unknown.
    """
    _check(box_length, radii, domain)

    def between(first: float, second: float) -> Along:
        def along(v: Array, end: Array, _: Array) -> tuple[Array, Array]:
            start, stop = (first / end) ** 3, (second / end) ** 3
            outer = (1 - stop) / (1 - start)
            inner = jnp.full_like(v, (second / first) ** 3)
            below = v < start
            # Above, written from the end, where the map joins what stays in place.
            return jnp.where(below, inner * v, 1 - outer * (1 - v)), jnp.log(jnp.where(below, inner, outer))

        return along

    there, back = between(radii[0], radii[1]), between(radii[1], radii[0])

    def forward(params: Params, x: Array, state: ThermodynamicState) -> tuple[Array, Scalar]:
        return _radially(x, box_length, domain, there)

    def inverse(params: Params, y: Array, state: ThermodynamicState) -> tuple[Array, Scalar]:
        return _radially(y, box_length, domain, back)

    return Bijector(lambda key, x, state: (), forward, inverse)


def radial_spline(
    box_length: float, radii: tuple[float, float], n_bins: int = 12, domain: Domain = "sphere", width: int = 0
) -> Bijector:
    """The analytic map, then a learned increasing function of the volume within a shell; the identity at first.

    Args:
        box_length: As for `analytic_radial`.
        radii: As for `analytic_radial`.
        n_bins: Bins of the rational-quadratic spline between about 0.84 R_B and the end.
        domain: As for `analytic_radial`.
        width: Units of a network that makes the spline depend on the direction, as the cubic box does;
            0 for one function of the distance.

    Raises:
        InputError: If an argument is impossible.
    """
    if n_bins < 1:
        raise InputError(f"map.n_bins: must be at least 1, got {n_bins}")
    analytic = analytic_radial(box_length, radii, domain)
    spline = interval_spline(n_bins)
    network = mlp(width, 2, spline.n_parameters) if width else None

    def init(key: Key, x: Array, state: ThermodynamicState) -> Params:
        params = {"shared": jnp.zeros(spline.n_parameters, x.dtype)}
        if network is not None:
            params["directional"] = network.init(key, _cubic_invariants(x))
        return params

    def learned(params: Params, inverse: bool) -> Along:
        def along(v: Array, end: Array, direction: Array) -> tuple[Array, Array]:
            raw = jnp.broadcast_to(params["shared"], (*v.shape, spline.n_parameters))
            if network is not None:
                raw = raw + network.apply(params["directional"], _cubic_invariants(direction))
            start = _DEPTH * (radii[1] / end) ** 3
            t, log_slope = (spline.inverse if inverse else spline.forward)(raw, (v - start) / (1 - start))
            inside = v > start  # numbers below the spline stay as they are, to the last bit
            return jnp.where(inside, start + (1 - start) * t, v), jnp.where(inside, log_slope, 0)

        return along

    def forward(params: Params, x: Array, state: ThermodynamicState) -> tuple[Array, Scalar]:
        return _radially(x, box_length, domain, learned(params, inverse=False))

    def inverse(params: Params, y: Array, state: ThermodynamicState) -> tuple[Array, Scalar]:
        return _radially(y, box_length, domain, learned(params, inverse=True))

    return chain(analytic, Bijector(init, forward, inverse))


def _check(box_length: float, radii: tuple[float, float], domain: str) -> None:
    if not (box_length > 0 and math.isfinite(box_length)):
        raise InputError(f"map: the box edge must be positive, got {box_length:g}")
    for radius in radii:
        if not 0 < radius < box_length / 2:
            raise InputError(
                f"map: a radial map needs solute radii above 0 and below half the box ({box_length / 2:.6g}), "
                f"got {radius:g}"
            )
    if domain not in {"sphere", "box"}:
        raise InputError(f"map.domain: no domain {domain!r}; use sphere or box")


def _radially(
    x: Float[Array, "n 3"], box_length: float, domain: Domain, along: Along
) -> tuple[Float[Array, "n 3"], Scalar]:
    """Move every atom along its direction from the nearest image of the solute; and the log det of it all."""
    home = box_length * jnp.round(x / box_length)
    near = x - home
    half, tiny = 0.5 * box_length, 1e-6 * box_length
    # Guarded: on top of the solute there is no direction, but all maps are linear there and need none.
    r2 = jnp.sum(near * near, axis=1)
    r = jnp.sqrt(jnp.where(r2 > tiny**2, r2, tiny**2))
    direction = near / r[:, None]
    if domain == "sphere":
        end = jnp.full_like(r, half)
    else:
        end = half / jnp.maximum(jnp.max(jnp.abs(direction), axis=1), 1 / math.sqrt(3))
    v = (r / end) ** 3
    inside = v < 1
    v = jnp.where(inside, v, 0.5)
    moved, log_slope = along(v, end, direction)
    # What does not move is returned as it came, not rounded.
    y = jnp.where(inside[:, None], home + jnp.cbrt(moved / v)[:, None] * near, x)
    return y, jnp.sum(jnp.where(inside, log_slope, 0))


def _cubic_invariants(x: Float[Array, "n 3"]) -> Float[Array, "n 2"]:
    """Two numbers of a direction that no rotation or reflection of the cube changes, about -1 to 1."""
    squares = x * x
    squares = squares / jnp.maximum(jnp.sum(squares, axis=1, keepdims=True), 1e-12)
    # Sum of fourth powers, 1/3 to 1; product of squares, 0 to 1/27.
    fourth, sixth = jnp.sum(squares * squares, axis=1), squares[:, 0] * squares[:, 1] * squares[:, 2]
    return jnp.stack([3 * fourth - 2, 54 * sixth - 1], axis=1)
