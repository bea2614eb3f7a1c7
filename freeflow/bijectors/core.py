"""Bijectors and how to combine them; elementwise maps whose parameters come from outside.

A `Bijector` maps one configuration and owns its parameters. An `Elementwise` map takes every number
of an array by itself, with raw parameters that a conditioner network, or a parameter array, hands it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.types import Bijector, Configuration, Key, Params, Scalar, ThermodynamicState

Numbers = np.ndarray | Array | Sequence[Any] | float

# --------------------------------------------------------------------- elementwise maps


@dataclass(frozen=True)
class Elementwise:
    """An increasing map of every number of an array by itself; raw parameters of zero give the identity.

    `forward(raw, x) -> (y, log_derivative)` with raw (*x.shape, n_parameters), unconstrained;
    `inverse(raw, y) -> (x, log_derivative)`. The log derivative is that of the direction just applied.
    """

    n_parameters: int  # raw parameters per number
    forward: Callable[[Float[Array, "*n p"], Float[Array, "*n"]], tuple[Float[Array, "*n"], Float[Array, "*n"]]]
    inverse: Callable[[Float[Array, "*n p"], Float[Array, "*n"]], tuple[Float[Array, "*n"], Float[Array, "*n"]]]


def affine(bound: float = 3.0) -> Elementwise:
    """x exp(s) + shift: two parameters, s = bound tanh(raw / bound) and the shift itself.

    The bound keeps one wild parameter from overflowing an exponential; near zero s is the parameter.
    """

    def log_scale(raw: Array) -> Array:
        return bound * jnp.tanh(raw[..., 0] / bound)

    def forward(raw: Array, x: Array) -> tuple[Array, Array]:
        s = log_scale(raw)
        return x * jnp.exp(s) + raw[..., 1], s

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        s = log_scale(raw)
        return (y - raw[..., 1]) * jnp.exp(-s), -s

    return Elementwise(2, forward, inverse)


def sinh_arcsinh(width: float = 1.0, bound: float = 1.0) -> Elementwise:
    """width sinh(exp(t) arcsinh(x / width) + skew): skewness and tails of a density, in closed form both ways.

    Two parameters, bounded softly: skew and t are bound tanh(raw / bound).

    Args:
        width: Where the map leaves its linear regime, in units of x.
        bound: Of both: tails run like a power of x between exp(-bound) and exp(bound).

    References: Jones and Pewsey, Biometrika 96, 761 (2009).
    """

    def bounded(raw: Array) -> tuple[Array, Array]:
        return bound * jnp.tanh(raw[..., 0] / bound), bound * jnp.tanh(raw[..., 1] / bound)

    def log_cosh(a: Array) -> Array:
        return jnp.abs(a) + jnp.log1p(jnp.exp(-2 * jnp.abs(a))) - math.log(2)  # without overflow

    def forward(raw: Array, x: Array) -> tuple[Array, Array]:
        skew, t = bounded(raw)
        inner = jnp.arcsinh(x / width)
        outer = jnp.exp(t) * inner + skew
        return width * jnp.sinh(outer), t + log_cosh(outer) - log_cosh(inner)

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        skew, t = bounded(raw)
        outer = jnp.arcsinh(y / width)
        inner = (outer - skew) * jnp.exp(-t)
        return width * jnp.sinh(inner), log_cosh(inner) - log_cosh(outer) - t

    return Elementwise(2, forward, inverse)


def shift() -> Elementwise:
    """x + raw, on the line or on the circle lifted to it: one parameter, in units of x."""

    def forward(raw: Array, x: Array) -> tuple[Array, Array]:
        return x + raw[..., 0], jnp.zeros_like(x)

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        return y - raw[..., 0], jnp.zeros_like(y)

    return Elementwise(1, forward, inverse)


def compose(*maps: Elementwise) -> Elementwise:
    """Apply elementwise maps in turn, first the first; their raw parameters stand in the same order."""
    ends = list(itertools.accumulate(m.n_parameters for m in maps))
    parts = [(m, slice(end - m.n_parameters, end)) for m, end in zip(maps, ends, strict=True)]

    def forward(raw: Array, x: Array) -> tuple[Array, Array]:
        total = jnp.zeros_like(x)
        for m, part in parts:
            x, log_derivative = m.forward(raw[..., part], x)
            total = total + log_derivative
        return x, total

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        total = jnp.zeros_like(y)
        for m, part in reversed(parts):
            y, log_derivative = m.inverse(raw[..., part], y)
            total = total + log_derivative
        return y, total

    return Elementwise(sum(m.n_parameters for m in maps), forward, inverse)


# ------------------------------------------------------------------------- combinators


def identity() -> Bijector:
    """Leave the configuration alone."""

    def apply(params: Params, x: Configuration, state: ThermodynamicState) -> tuple[Configuration, Scalar]:
        return x, jnp.zeros((), jnp.result_type(*jax.tree.leaves(x)))

    return Bijector(lambda key, x, state: (), apply, apply)


def chain(*bijectors: Bijector) -> Bijector:
    """Apply bijectors in turn, first the first; parameters are a tuple.

    All of them see configurations of one structure: `init` shows each the same x.
    """
    if not bijectors:
        return identity()

    def init(key: Key, x: Configuration, state: ThermodynamicState) -> Params:
        keys = jax.random.split(key, len(bijectors))
        return tuple(b.init(k, x, state) for b, k in zip(bijectors, keys, strict=True))

    def through(steps: Sequence[tuple[Any, Params]], x: Configuration, state: ThermodynamicState) -> Any:
        log_dets = []
        for mapping, params in steps:
            x, log_det = mapping(params, x, state)
            log_dets.append(log_det)
        return x, functools.reduce(jnp.add, log_dets)

    def forward(params: Params, x: Configuration, state: ThermodynamicState) -> tuple[Configuration, Scalar]:
        return through([(b.forward, p) for b, p in zip(bijectors, params, strict=True)], x, state)

    def inverse(params: Params, y: Configuration, state: ThermodynamicState) -> tuple[Configuration, Scalar]:
        steps = [(b.inverse, p) for b, p in zip(bijectors, params, strict=True)]
        return through(steps[::-1], y, state)

    return Bijector(init, forward, inverse)


def repeat(inner: Bijector, n: int) -> Bijector:
    """Apply one bijector n times, each time with its own parameters, compiled once.

    Parameters are those of `inner` with a leading axis of n, first the first.

    Raises:
        ValueError: If n is less than one.
    """
    if n < 1:
        raise ValueError(f"a bijector is repeated at least once, got {n}")

    def init(key: Key, x: Configuration, state: ThermodynamicState) -> Params:
        return jax.vmap(lambda k: inner.init(k, x, state))(jax.random.split(key, n))

    def through(mapping: Any, params: Params, x: Configuration, state: ThermodynamicState, reverse: bool) -> Any:
        # Parameters without arrays (those of `identity`) do not tell the scan its length.
        x, log_dets = jax.lax.scan(lambda x, p: mapping(p, x, state), x, params, length=n, reverse=reverse)
        return x, jnp.sum(log_dets)

    def forward(params: Params, x: Configuration, state: ThermodynamicState) -> tuple[Configuration, Scalar]:
        return through(inner.forward, params, x, state, reverse=False)

    def inverse(params: Params, y: Configuration, state: ThermodynamicState) -> tuple[Configuration, Scalar]:
        return through(inner.inverse, params, y, state, reverse=True)

    return Bijector(init, forward, inverse)


def invert(inner: Bijector) -> Bijector:
    """The same map in the opposite direction."""
    return Bijector(inner.init, inner.inverse, inner.forward)


def at(leaf: str, inner: Bijector) -> Bijector:
    """Act on one named part of a configuration; the rest passes through."""

    def init(key: Key, x: Configuration, state: ThermodynamicState) -> Params:
        return inner.init(key, x[leaf], state)

    def apply(mapping: Any, params: Params, x: Configuration, state: ThermodynamicState) -> Any:
        y, log_det = mapping(params, x[leaf], state)
        return {**x, leaf: y}, log_det

    return Bijector(init, functools.partial(apply, inner.forward), functools.partial(apply, inner.inverse))


# ---------------------------------------------------------------------- linear algebra


def scaled(factor: Numbers, offset: Numbers = 0.0) -> Bijector:
    """factor * x + offset, with numbers or arrays that broadcast to x: a change of units, say.

    Raises:
        ValueError: If a factor is zero or not finite.
    """
    scale, start = np.asarray(factor, float), np.asarray(offset, float)
    if not (np.isfinite(scale).all() and (scale != 0).all()):
        raise ValueError("a factor of zero, or one that is not finite, cannot be undone")

    def constants(x: Array) -> tuple[Array, Array, Scalar]:
        # In float64 on the host, so that a sum of many logarithms keeps its digits.
        log_det = np.sum(np.broadcast_to(np.log(np.abs(scale)), x.shape))
        a, b = (jnp.asarray(np.broadcast_to(c, x.shape), x.dtype) for c in (scale, start))
        return a, b, jnp.asarray(log_det, x.dtype)

    def forward(params: Params, x: Array, state: ThermodynamicState) -> tuple[Array, Scalar]:
        a, b, log_det = constants(x)
        return a * x + b, log_det

    def inverse(params: Params, y: Array, state: ThermodynamicState) -> tuple[Array, Scalar]:
        a, b, log_det = constants(y)
        return (y - b) / a, -log_det

    return Bijector(lambda key, x, state: (), forward, inverse)


def whitened(
    inner: Bijector,
    colour: Callable[[Configuration], Configuration],
    whiten: Callable[[Configuration], Configuration],
) -> Bijector:
    """A bijector of whitened coordinates z as one of x: y = colour(inner(whiten(x))).

    Args:
        inner: Acts on z.
        colour: z to x; linear, or linear plus a constant.
        whiten: The inverse of `colour`. Their log dets are constants that cancel, so nobody needs
            to know them; a map that is not linear would need its own.
    """

    def init(key: Key, x: Configuration, state: ThermodynamicState) -> Params:
        return inner.init(key, whiten(x), state)

    def apply(mapping: Any, params: Params, x: Configuration, state: ThermodynamicState) -> Any:
        z, log_det = mapping(params, whiten(x), state)
        return colour(z), log_det

    return Bijector(init, functools.partial(apply, inner.forward), functools.partial(apply, inner.inverse))


def mean_free(inner: Bijector) -> Bijector:
    """A translation-equivariant bijector of (n_atoms, 3), restricted to configurations of zero mean.

    It applies `inner` and removes the mean; the inverse does the same with the inverse of `inner`,
    which is right because f(x + c) = f(x) + c also holds for it. The log det is that of the map of
    the mean-free subspace onto itself, in an orthonormal basis, and equals inner's: its Jacobian maps
    uniform translations onto themselves, so that in a basis of mean-free directions and translations
    it is block triangular, with the identity as the block of the translations.

    Args:
        inner: Must be equivariant, f(x + c) = f(x) + c for every translation c of all atoms;
            nothing here can check it, `freeflow`'s tests do for the bijectors that claim it.
    """

    def apply(mapping: Any, params: Params, x: Array, state: ThermodynamicState) -> tuple[Array, Scalar]:
        y, log_det = mapping(params, x, state)
        return y - jnp.mean(y, axis=0, keepdims=True), log_det

    return Bijector(inner.init, functools.partial(apply, inner.forward), functools.partial(apply, inner.inverse))


def elementwise(mapping: Elementwise, shared_axes: tuple[int, ...] = ()) -> Bijector:
    """An elementwise map of an array with learned parameters of its own, the identity at first.

    Args:
        mapping: The elementwise map.
        shared_axes: Axes along which all numbers share parameters: (0,) for one map per Cartesian
            axis and all atoms, which then knows neither their number nor their labels.
    """

    def init(key: Key, x: Array, state: ThermodynamicState) -> Array:
        shared = {axis % x.ndim for axis in shared_axes}
        shape = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
        return jnp.zeros((*shape, mapping.n_parameters), x.dtype)

    def apply(function: Any, raw: Array, x: Array, state: ThermodynamicState) -> tuple[Array, Scalar]:
        y, log_derivative = function(jnp.broadcast_to(raw, (*x.shape, mapping.n_parameters)), x)
        return y, jnp.sum(log_derivative)

    return Bijector(init, functools.partial(apply, mapping.forward), functools.partial(apply, mapping.inverse))
