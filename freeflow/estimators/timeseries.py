"""Series that remember their past: how many independent samples they hold, and where equilibrium begins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from freeflow.estimators.two_state import Samples, samples_of

_STARTS = 50  # candidates for the end of equilibration


class Equilibration(NamedTuple):
    """Where a series has forgotten its start, and what is left of it."""

    start: int  # first sample to keep
    inefficiency: float  # g of what is kept
    effective_samples: float  # (n - start) / g


def statistical_inefficiency(series: Samples) -> float:
    """Statistical inefficiency g >= 1 of a stationary series (n,): n / g of its values are independent.

    g = 1 + 2 sum_t (1 - t / n) C(t), the normalised autocorrelation summed over a window that ends
    at its first crossing of zero, after a lag of 3 at least. A constant series has g = 1. Measured on
    autoregressive series of 30, 100, 300 and 2000 times g values: relative standard errors of 40, 32,
    25 and 8 %, and up to 7 % too large on average; of white noise 19, 18, 10 and 6 % too large.

    References: Chodera, Swope, Pitera, Seok and Dill, J. Chem. Theory Comput. 3, 26 (2007).
    """
    from scipy.fft import irfft, next_fast_len, rfft

    x = np.asarray(samples_of(series, "series"))
    n = x.size
    if n < 3 or np.ptp(x) == 0:
        return 1.0
    padded = next_fast_len(2 * n, real=True)
    spectrum = np.asarray(rfft(x - x.mean(), padded))
    sums = np.asarray(irfft(np.abs(spectrum) ** 2, padded))[:n]
    lag = np.arange(1, n - 1)
    correlation = (sums[1 : n - 1] / (n - lag)) / (sums[0] / n)
    crossed = np.flatnonzero((correlation <= 0) & (lag > 3))
    end = crossed[0] if crossed.size else lag.size
    return float(max(1.0, 1 + 2 * np.sum(correlation[:end] * (1 - lag[:end] / n))))


def chain_correlation(series: np.ndarray) -> tuple[np.ndarray, float]:
    """Autocorrelation (n,) of a stationary number of several chains (n, n_chains), and its inefficiency g >= 1.

    Deviations are from the mean of all chains, so that a short series does not mistake its own mean for
    the ensemble's. g = 1 + 2 sum_t C(t) up to the first crossing of zero.
    """
    from scipy.fft import irfft, next_fast_len, rfft

    x = np.asarray(series, np.float64) - np.mean(series)
    n = len(x)
    padded = next_fast_len(2 * n, real=True)
    spectrum = np.asarray(rfft(x, padded, axis=0))
    sums = np.asarray(irfft(np.abs(spectrum) ** 2, padded, axis=0))[:n].sum(axis=1)
    if not sums[0] > 0:
        return (np.arange(n) == 0).astype(float), 1.0
    correlation = sums / (n - np.arange(n)) * n / sums[0]
    crossed = np.flatnonzero(correlation <= 0)
    return correlation, float(max(1.0, 1 + 2 * correlation[1 : crossed[0] if crossed.size else n].sum()))


def equilibrated(series: Samples) -> Equilibration:
    """Start of the equilibrated part of a series (n,): where the effective samples after it are most.

    Fifty starts are tried, evenly over the first nine tenths. A start in the second half says that
    the series is too short to tell: most of it looks like the way to equilibrium.

    References: Chodera, J. Chem. Theory Comput. 12, 1799 (2016).
    """
    x = np.asarray(samples_of(series, "series"))
    starts = np.unique(np.linspace(0, 0.9 * x.size, min(_STARTS, x.size), endpoint=False).astype(int))
    answers = []
    for start in starts:
        g = statistical_inefficiency(x[start:])
        answers.append(Equilibration(int(start), g, (x.size - start) / g))
    # The first of equals: nothing is thrown away without a gain.
    return max(answers, key=lambda answer: answer.effective_samples)
