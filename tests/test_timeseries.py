"""Correlated series: their inefficiency, their error bars, and where equilibrium begins.

Known answer: x' = a x + noise has g = (1 + a) / (1 - a). Random tests fix their seeds; binomial bounds
raise one false alarm in 10^6 each, there are three of them.
"""

import subprocess
import sys

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import binom

from freeflow.errors import InputError
from freeflow.estimators import equilibrated, statistical_inefficiency

# pymbar changes JAX's settings for the whole process: it runs in one of its own.
PYMBAR = """
import sys
import numpy as np
from pymbar.timeseries import detect_equilibration, statistical_inefficiency
x = np.load(sys.argv[1])
print(statistical_inefficiency(x), *detect_equilibration(x, fast=False, nskip=int(sys.argv[2])))
"""


def autoregressive(seed, n, a, n_series=1):
    """Stationary series (n_series, n) of variance 1."""
    noise = np.random.default_rng(seed).normal(size=(n_series, n))
    noise[:, 1:] *= np.sqrt(1 - a**2)
    return lfilter([1.0], [1.0, -a], noise, axis=1)


def within(hits, n, probability):
    low, high = binom.interval(1 - 1e-6, n, probability)
    return low <= hits <= high


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9])
def test_known_inefficiency(a):
    """Estimates of 200 series are right on average within five standard errors and the bias of the window.

    For white noise the bias is upwards: the estimate is never below 1.
    """
    g = (1 + a) / (1 - a)
    found = np.array([statistical_inefficiency(x) for x in autoregressive(1, int(2000 * g), a, 200)])
    assert np.mean(found) == pytest.approx(g, rel=0.03 if a else 0.08)
    assert np.std(found) / g < 0.25


def test_error_bars_of_means_are_calibrated():
    x = autoregressive(2, 3000, 0.8, 500)
    g = np.array([statistical_inefficiency(series) for series in x])
    z = x.mean(axis=1) / np.sqrt(g * x.var(axis=1) / x.shape[1])
    assert within(np.sum(np.abs(z) < 1.96), 500, 0.94)  # g is a little small on average
    assert not within(np.sum(np.abs(z * np.sqrt(g)) < 1.96), 500, 0.94)


def test_equilibration_is_found():
    x = autoregressive(3, 2000, 0.8, 100)
    quiet = [equilibrated(series) for series in x]
    # Little of a stationary series is thrown away, and not many a time.
    assert np.median([answer.start for answer in quiet]) <= 0.1 * 2000
    assert np.mean([answer.effective_samples for answer in quiet]) > 0.9 * 2000 / 9
    drifting = x + 8 * np.exp(-np.arange(2000) / 60)
    for answer in map(equilibrated, drifting):
        assert 100 < answer.start < 1000
        assert 2 < answer.inefficiency < 30
        assert answer.effective_samples == pytest.approx((2000 - answer.start) / answer.inefficiency)
    # A series that never settles keeps its tail only, or says that it holds next to nothing.
    assert equilibrated(np.linspace(0, 1, 2000) + 1e-3 * x[0]).effective_samples < 20


def test_series_that_say_nothing():
    assert equilibrated(np.ones(30)) == (0, 1.0, 30.0)
    assert equilibrated([1.0]) == (0, 1.0, 1.0)
    with pytest.raises(InputError, match="zero samples"):
        equilibrated([])


def test_as_pymbar_has_it(tmp_path):
    x = autoregressive(4, 1000, 0.9)[0] + 5 * np.exp(-np.arange(1000) / 50)
    np.save(tmp_path / "x.npy", x)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PYMBAR, str(tmp_path / "x.npy"), "18"],
        capture_output=True,
        text=True,
        check=True,
    )
    g, start, g_after, n_effective = map(float, run.stdout.split())
    assert statistical_inefficiency(x) == pytest.approx(g, rel=1e-9)
    # pymbar counts one sample more: (n - start + 1) / g.
    assert equilibrated(x) == pytest.approx((start, g_after, n_effective * (1000 - start) / (1001 - start)), rel=1e-6)
