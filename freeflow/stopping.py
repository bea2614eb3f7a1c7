"""When to stop drawing samples: a sequential rule that does not stop by luck."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import numpy as np

from freeflow.errors import InputError
from freeflow.estimators import Estimator, fep, record, require_float64
from freeflow.types import Work

_GROWTH = 2.0  # at most, from one look to the next
_SLACK = 1.02  # so that the look at the planned size is the last one
_CAUTION = 2.0  # at most so much more than the error bar itself asks for


@dataclass(frozen=True)
class StoppingRule:
    """Draw independent samples until the standard error is small enough [kT, total].

    A rule that watches the error bar and stops when it first dips below the target stops too
    early: an average of exponentials that has missed its large weights has both a wrong value and
    a small error bar. So the rule looks only at sizes that were planned at the look before, at
    most twice as large, and plans with the larger of two variances: that of the weights, and, for
    one-sided work, the one that they would have if the work were Gaussian, exp(s^2) - 1, which
    hardly depends on the rare large weights. The second may ask for no more than twice the samples
    that the first does.

    Which samples to draw depends only on the samples seen. Sizes count forward samples; with
    two-sided work both directions are to grow by the same factor.
    """

    target_error: float  # one standard error [kT]
    max_samples: int
    min_samples: int = 512  # fewer give error bars that are too small where the work varies by 1.5 kT

    def __post_init__(self) -> None:
        if not self.target_error > 0:
            raise InputError(f"target_error must be positive, got {self.target_error} kT")
        if self.max_samples < 1 or self.min_samples < 2:
            raise InputError(
                f"max_samples must be at least 1 and min_samples at least 2, got {self.max_samples}, {self.min_samples}"
            )

    def further(self, work: Work | np.ndarray, estimator: Estimator = fep) -> int:
        """How many more samples to draw now; 0 means stop.

        Also 0 when `max_samples` have been drawn, or when the error bar is NaN because a work
        value is: more samples would not mend that.
        """
        work = _as_work(work)
        n = len(work.forward)
        first = min(self.min_samples, self.max_samples)
        if n < first:
            return first - n
        need = self._need(work, estimator)
        if not need > n or n >= self.max_samples:
            return 0
        return math.ceil(min(_SLACK * need, _GROWTH * n, self.max_samples)) - n

    def predicted_samples(self, work: Work | np.ndarray, estimator: Estimator = fep) -> int:
        """How many samples, with those seen, the target error will take; not limited by `max_samples`."""
        work = _as_work(work)
        n = len(work.forward)
        need = self._need(work, estimator) if n >= 2 else math.nan
        return max(n, self.min_samples, math.ceil(need) if math.isfinite(need) else 0)

    def _need(self, work: Work, estimator: Estimator) -> float:
        """Planned number of samples; NaN if the error bar is not estimable."""
        n = len(work.forward)
        need = n * (float(estimator(work).std_error) / self.target_error) ** 2
        if len(work.reverse) == 0:
            need = min(max(need, _gaussian_variance(work.forward) / self.target_error**2), _CAUTION * need)
        return need


def _gaussian_variance(work: jax.Array | np.ndarray) -> float:
    """Relative variance that exp(-w) would have if the work were Gaussian, exp(s^2) - 1.

    Clashes give a long tail of large work that does no harm, so what lies more than three
    standard deviations above the median, judged by the half below it, is pulled in.
    """
    w = np.asarray(work)
    w = w[np.isfinite(w)]  # infinite work has weight 0
    if len(w) < 2:
        return float("nan")
    deviation = w - np.median(w)
    spread = np.sqrt(2 * np.mean(np.minimum(deviation, 0.0) ** 2))
    return float(np.expm1(min(np.var(np.minimum(deviation, 3 * spread)), 700.0)))


def _as_work(work: Work | np.ndarray) -> Work:
    return work if isinstance(work, Work) else record(require_float64(work))
