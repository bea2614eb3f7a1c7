"""Free energy differences from work: exponential average and acceptance ratio.

A plus infinity of work is a sample that cannot reach the other state: it counts, with weight 0.
A NaN makes the answer NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.nn import log_sigmoid
from jax.scipy.special import logsumexp

from freeflow.errors import InputError, PrecisionError
from freeflow.types import Estimate, Work, in_double_precision

Samples = jax.Array | np.ndarray | Sequence[float]
Estimator = Callable[[Work], Estimate]

_SMALLEST_BUFFER = 1 << 12  # one size for most runs: compiling takes longer than computing
_MAX_ITERATIONS = 200


def require_float64(values: Samples, name: str = "work") -> jax.Array | np.ndarray:
    """`values` unchanged if they are float64; lists and integers are converted.

    Raises:
        PrecisionError: If they are floating point numbers of any other precision, whose digits
            are already lost. An empty array has none to lose.
    """
    dtype = getattr(values, "dtype", None)
    if isinstance(values, jax.Array | np.ndarray) and dtype == np.float64:
        return values
    if dtype is None or np.issubdtype(dtype, np.integer) or np.size(values) == 0:
        return np.asarray(values, np.float64)
    raise PrecisionError(f"{name} is {dtype}: estimators need float64; compute it inside double_precision()")


def samples_of(values: Samples, name: str) -> jax.Array | np.ndarray:
    """`values` as float64 of shape (n,) with n > 0.

    Raises:
        InputError: If there are zero samples, or more than one axis.
        PrecisionError: See `require_float64`.
    """
    array = require_float64(values, name)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {array.shape}: one value per sample is needed, shape (n,)")
    if array.size == 0:
        raise InputError(f"{name} holds zero samples: nothing to estimate from")
    return array


def padded(*arrays: jax.Array | np.ndarray) -> tuple[Any, Any]:
    """Arrays (n_i,) as rows of a buffer filled up to a power of four, and the mask of what is data.

    Sampling calls the estimators with ever more samples: without this each call would compile.
    Inside somebody else's `jit` or `vmap` the shapes are fixed already and little is added.
    """
    longest = max(len(array) for array in arrays)
    if any(isinstance(array, Tracer) for array in arrays):
        rows = jnp.stack([jnp.pad(array, (0, longest - len(array))) for array in arrays])
        return rows, np.stack([np.arange(longest) < len(array) for array in arrays])
    size = _SMALLEST_BUFFER
    while size < longest:
        size *= 4
    buffer, valid = np.zeros((len(arrays), size)), np.zeros((len(arrays), size), bool)
    for row, mask, array in zip(buffer, valid, arrays, strict=True):
        row[: len(array)], mask[: len(array)] = array, True
    return buffer, valid


def released(tree: Any) -> Any:
    """`tree` with NumPy arrays for JAX ones, unless they are being traced.

    Outside `double_precision` JAX silently turns the result of `delta_f - 1.0` into float32.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.device_get(tree)


def record(forward: Any, reverse: Any = None) -> Work:
    """Work from NumPy arrays, which the record's annotations (JAX arrays) do not mention."""
    return Work(forward, np.zeros(0) if reverse is None else reverse)  # pyright: ignore[reportArgumentType]


@in_double_precision
def fep(work: Work) -> Estimate:
    """Exponential average -ln <exp(-w)> of the forward work [kT]; needs no reverse work.

    The standard error is the delta method's, sqrt(1/ess - 1/n), times sqrt(n / (n - 1)), which
    makes the variance of the weights unbiased: without it two samples would claim 0.71 of their
    error bar. It is NaN for one sample, and 0 only if all the work values are equal.

    Raises:
        InputError: If there are zero samples.
        PrecisionError: If the work is not float64.

    References: Zwanzig, J. Chem. Phys. 22, 1420 (1954); Jarzynski, PRL 78, 2690 (1997).
    """
    buffer, valid = padded(samples_of(work.forward, "forward work"))
    return released(_fep(buffer[0], valid[0]))


@jax.jit
def _fep(w: jax.Array, valid: jax.Array) -> Estimate:
    n = valid.sum()
    log_weights = jnp.where(valid, -w, -jnp.inf)
    top = jnp.max(log_weights)
    top = jnp.where(jnp.isinf(top), 0.0, top)
    weights = jnp.exp(log_weights - top)
    mean = weights.sum() / n
    deviation = jnp.where(valid, weights / mean - 1, 0.0)
    std_error = jnp.sqrt(jnp.sum(deviation**2) / (n * (n - 1)))
    return Estimate(-(top + jnp.log(mean)), std_error, weights.sum() ** 2 / jnp.sum(weights**2) / n)


@in_double_precision
def bar(work: Work, inefficiency: tuple[float, float] = (1.0, 1.0)) -> Estimate:
    """Bennett's acceptance ratio from forward and reverse work, any number of each [kT].

    With f the Fermi function, C solves n_F <f(w_F - C)>_F = n_R <f(w_R + C)>_R, and then
    delta_f = C - ln <f(w_F - C)>_F + ln <f(w_R + C)>_R. The variance is the sum of the relative
    variances of the two averages: C is optimal, so its own noise enters only at second order.

    `ess_fraction` is Kish's, of the Fermi functions on the worse side: how evenly the samples
    contribute to the average that they enter.

    Args:
        work: Forward and reverse work, each with its own sign.
        inefficiency: Statistical inefficiency g >= 1 of the forward and reverse samples; n / g of
            them count, in the choice of C and in the error bar.

    Raises:
        InputError: If either direction has zero samples, or an inefficiency is below 1.
        PrecisionError: If the work is not float64.

    References: Bennett, J. Comput. Phys. 22, 245 (1976), eqs 8, 10 and 12; Shirts, Bair, Hooker
        and Pande, PRL 91, 140601 (2003).
    """
    if not all(g >= 1 for g in inefficiency):
        raise InputError(f"statistical inefficiencies must be at least 1, got {tuple(inefficiency)}")
    sides = samples_of(work.forward, "forward work"), samples_of(work.reverse, "reverse work")
    return released(_bar(*padded(*sides), np.asarray(inefficiency, np.float64)))


@jax.jit
def _bar(w: jax.Array, valid: jax.Array, g: jax.Array) -> Estimate:
    """`bar` of forward and reverse work, the rows of w (2, n)."""
    n = valid.sum(axis=1)
    log_ratio = jnp.log(n[0] / g[0]) - jnp.log(n[1] / g[1])
    sign = jnp.array([1.0, -1.0])

    def averages(c):
        """Logarithm of the mean Fermi function of each side, each sample's share in it, and its slope in c."""
        x = jnp.where(valid, sign[:, None] * c - w, -jnp.inf)
        log_fermi = log_sigmoid(x)
        log_sum = logsumexp(log_fermi, axis=1)
        share = jnp.exp(log_fermi - log_sum[:, None])
        return log_sum - jnp.log(n), share, jnp.sum(share * -jnp.expm1(log_fermi), axis=1)

    def unfinished(state):
        _, _, _, step, iteration, tolerance = state
        return (jnp.abs(step) > tolerance) & (iteration < _MAX_ITERATIONS)

    def improve(state):
        low, high, c, step, iteration, _ = state
        # In logarithms, whose slope stays near 1 or 2 where the Fermi functions underflow.
        log_mean, _, slope = averages(c)
        error = log_ratio + log_mean[0] - log_mean[1]
        low, high = jnp.where(error < 0, c, low), jnp.where(error < 0, high, c)
        newton = c - error / slope.sum()
        # Newton while it stays inside the bracket and at least halves its step, else bisect.
        good = (newton > low) & (newton < high) & (jnp.abs(newton - c) < 0.5 * jnp.abs(step))
        new = jnp.where(good, newton, 0.5 * (low + high))
        return low, high, new, new - c, iteration + 1, 1e-13 * (1 + jnp.abs(new))

    # Beyond the extreme works by ln(n_f + n_r) + |ln(n_f / n_r)| one side is sure to outweigh the other.
    finite, signed = valid & jnp.isfinite(w), sign[:, None] * w
    margin = jnp.log(n.sum()) + jnp.abs(log_ratio) + 1
    low = jnp.where(finite, signed, jnp.inf).min() - margin
    high = jnp.where(finite, signed, -jnp.inf).max() + margin
    start = (low, high, 0.5 * (low + high), high - low, 0, jnp.zeros_like(low))
    c = jax.lax.while_loop(unfinished, improve, start)[2]
    log_mean, share, _ = averages(c)
    deviation = jnp.where(valid, n[:, None] * share - 1, 0.0)
    variance = jnp.sum(deviation**2, axis=1) / (n * (n - 1))
    ess_fraction = 1 / (n * jnp.sum(share**2, axis=1))
    return Estimate(c - log_mean[0] + log_mean[1], jnp.sqrt(jnp.sum(g * variance)), ess_fraction.min())


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({"fep": fep, "bar": bar})


def bennett_shift(work: Work, delta_f: float, inefficiency: tuple[float, float] = (1.0, 1.0)) -> float:
    """The constant C of `bar` that belongs to its answer `delta_f` [kT]."""
    n_f, n_r = len(work.forward) / inefficiency[0], len(work.reverse) / inefficiency[1]
    return float(delta_f) - math.log(n_f / n_r)
