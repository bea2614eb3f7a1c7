"""Free energy differences from work: exponential average and acceptance ratio.

A plus infinity of work is a sample that cannot reach the other state: it counts, with weight 0.
A NaN makes the answer NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from freeflow.errors import InputError, PrecisionError
from freeflow.types import Estimate, Work

Samples = jax.Array | np.ndarray | Sequence[float]
Estimator = Callable[[Work], Estimate]

_MAX_ITERATIONS = 200
_NEAR = 30.0  # kT that Bennett's constant may move by before exponentials are taken anew
_FEW = 1 << 12  # samples of a side that a first guess is made from


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


def _on_host(function: Callable[..., Estimate], *arrays: Any) -> Estimate:
    """What a NumPy function of arrays returns; inside somebody else's `jit` or `vmap` it is called back."""
    if any(isinstance(array, Tracer) for array in arrays):
        number = jax.ShapeDtypeStruct((), np.float64)
        return jax.pure_callback(function, Estimate(number, number, number), *arrays, vmap_method="sequential")
    return function(*arrays)


def record(forward: Any, reverse: Any = None) -> Work:
    """Work from NumPy arrays, which the record's annotations (JAX arrays) do not mention."""
    return Work(forward, np.zeros(0) if reverse is None else reverse)  # pyright: ignore[reportArgumentType]


def _square(x: np.ndarray) -> float:
    """x.x on one core: BLAS would wake others for it, which then wait in a loop."""
    return float(np.einsum("i,i->", x, x))


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
    return _on_host(_fep, samples_of(work.forward, "forward work"))


def _fep(work: Any) -> Estimate:
    w = np.asarray(work)
    n, top = len(w), -np.min(w)
    top = 0.0 if np.isinf(top) else top
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.exp(-w - top)
        mean = weights.mean()
        std_error = np.sqrt(np.sum((weights / mean - 1) ** 2) / (n * np.float64(n - 1)))
        return Estimate(-(top + np.log(mean)), std_error, weights.sum() ** 2 / _square(weights) / n)


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
    return _on_host(functools.partial(_bar, inefficiency=inefficiency), *sides)


class _Fermi:
    """Averages of the Fermi function f(x) = 1 / (1 + e^-x) at x = sign c - w over one side's work w, for many c.

    Exponentials are taken once, around some c; moving on from there costs a division per sample. With m the largest
    x or zero, whichever is less, it is e^-m f that is summed: nothing that counts underflows.
    """

    def __init__(self, w: np.ndarray, sign: float):
        self._w, self._sign = w, sign
        self._around = math.nan

    def scaled(self, c: float) -> tuple[np.ndarray, float]:
        """e^-m f of every sample, and m."""
        if not abs(c - self._around) < _NEAR:
            x = self._sign * c - self._w
            self._around, self._m = c, min(float(x.max()), 0.0)
            self._decay = np.exp(self._m - x)
        f = self._decay * math.exp(-self._sign * (c - self._around))
        f += math.exp(self._m)
        return np.divide(1.0, f, out=f), self._m

    def log_mean(self, c: float) -> tuple[float, float]:
        """Logarithm of the mean, and its slope with respect to x."""
        f, m = self.scaled(c)
        total = f.sum()
        return m + np.log(total / len(f)), 1 - math.exp(m) * _square(f) / total


def _bar(forward: Any, reverse: Any, inefficiency: tuple[float, float]) -> Estimate:
    sides = [np.asarray(forward), np.asarray(reverse)]
    sizes = [len(w) for w in sides]
    log_ratio = math.log(sizes[0] / inefficiency[0]) - math.log(sizes[1] / inefficiency[1])
    with np.errstate(all="ignore"):
        start = None
        if max(sizes) > 4 * _FEW:  # every so many of the samples tell where to look
            few = [w[:: max(1, len(w) // _FEW)] for w in sides]
            start = _bennett_constant([_Fermi(few[0], 1.0), _Fermi(few[1], -1.0)], log_ratio, _bracket(few, log_ratio))
        fermi = _Fermi(sides[0], 1.0), _Fermi(sides[1], -1.0)
        c = _bennett_constant(fermi, log_ratio, _bracket(sides, log_ratio), start)
        log_means, variance, fractions = [], 0.0, []
        for side, n, g in zip(fermi, sizes, inefficiency, strict=True):
            f, m = side.scaled(c)
            mean = f.mean()
            log_means.append(m + np.log(mean))
            variance += g * np.sum((f / mean - 1) ** 2) / (n * np.float64(n - 1))
            fractions.append(n * mean * mean / _square(f))
        return Estimate(c - log_means[0] + log_means[1], np.sqrt(variance), np.min(fractions))


def _bracket(sides: Sequence[np.ndarray], log_ratio: float) -> tuple[float, float]:
    """Where Bennett's constant must lie [kT]; bounds that the smallest work of each side sets.

    From C = -min w_R downwards the reverse mean is at least 1 / (2 n_R), since its largest term is at least 1/2, while
    the forward mean is at most e^(C - min w_F); and the other way round. Largest works have no say: those of a journey
    that flew apart, 1e80 kT and more, would leave too much room to find C in.
    """
    least = [float(np.min(w[np.isfinite(w)], initial=math.inf)) for w in sides]
    if not math.isfinite(min(least)):
        return math.nan, math.nan
    # A side without a finite work never outweighs the other, wherever C is.
    forward, reverse = (x if math.isfinite(x) else -other for x, other in zip(least, least[::-1], strict=True))
    n_f, n_r = (len(w) for w in sides)
    low = min(forward - log_ratio - math.log(2 * n_r), -reverse)
    high = max(-reverse - log_ratio + math.log(2 * n_f), forward)
    return low - 1, high + 1


def _bennett_constant(
    sides: Sequence[_Fermi], log_ratio: float, bracket: tuple[float, float], start: float | None = None
) -> float:
    """C with n_F <f(w_F - C)>_F = n_R <f(w_R + C)>_R, n ratio given as a logarithm, inside the bracket [kT]."""
    low, high = bracket
    c, step = 0.5 * (low + high) if start is None else start, high - low
    for _ in range(_MAX_ITERATIONS):
        # In logarithms, whose slope stays near 1 or 2 where the Fermi functions underflow.
        (left, left_slope), (right, right_slope) = (side.log_mean(c) for side in sides)
        error = log_ratio + left - right
        low, high = (c, high) if error < 0 else (low, c)
        newton = c - error / (left_slope + right_slope)
        # Newton while it stays inside the bracket and at least halves its step, else bisect.
        good = low < newton < high and abs(newton - c) < 0.5 * abs(step)
        new = newton if good else 0.5 * (low + high)
        c, step = new, new - c
        if not abs(step) > 1e-13 * (1 + abs(c)):
            break
    return c


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({"fep": fep, "bar": bar})


def bennett_shift(work: Work, delta_f: float, inefficiency: tuple[float, float] = (1.0, 1.0)) -> float:
    """The constant C of `bar` that belongs to its answer `delta_f` [kT]."""
    n_f, n_r = len(work.forward) / inefficiency[0], len(work.reverse) / inefficiency[1]
    return float(delta_f) - math.log(n_f / n_r)
