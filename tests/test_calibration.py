"""Error bars of whole estimates: how often they hold the true value, over independent seeds."""

import math

import numpy as np
import pytest
from scipy.stats import binom, chi2

import freeflow as ff
from benchmarks.calibration import compiled_once

N_SLOW, N_FAST = 400, 12
TARGET_ERROR = 0.004  # [kT per atom]


@pytest.fixture(scope="module")
def estimates():
    """z scores of full estimates of one system with the seeds asked for.

    What is compiled serves every seed, so the runs share it; all else is done afresh for each.
    """
    system = ff.load("mw_cubic_8")
    with compiled_once():
        exact = ff.estimate(system, target_error=2e-4, seed=10_000)
        assert exact.status == "converged"

        def scores(seeds):
            results = [ff.estimate(system, target_error=TARGET_ERROR, max_samples=5_000, seed=seed) for seed in seeds]
            assert all(result.status in {"converged", "unreliable"} for result in results)
            # The reference value's own error, 5 % of theirs at most, is part of the score.
            return np.array(
                [
                    (result.beta_f - exact.beta_f) / math.hypot(result.beta_f_std_error, exact.beta_f_std_error)
                    for result in results
                ]
            ), [result.status for result in results]

        yield scores


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_error_bars_of_estimates_are_calibrated(estimates):
    z, statuses = estimates(range(1000, 1000 + N_SLOW))
    covered, spread = int((np.abs(z) < 1.96).sum()), float(z.std())
    print(f"covered {covered / N_SLOW:.3f}, spread {spread:.3f}, mean {z.mean():+.3f}, max {np.abs(z).max():.2f}")
    assert 0.91 <= covered / N_SLOW <= 0.98
    assert 0.9 <= spread <= 1.15
    assert abs(z.mean()) < 4 / math.sqrt(N_SLOW)  # one false alarm in 16 000
    assert statuses.count("converged") >= 0.95 * N_SLOW


def test_a_few_error_bars_hold(estimates):
    # One false alarm in 1e6 for each of the three, if the scores are standard normal.
    z, _ = estimates(range(N_FAST))
    assert (np.abs(z) < 1.96).sum() >= binom.ppf(1e-6, N_FAST, 0.95)
    low, high = chi2.interval(1 - 1e-6, N_FAST)
    assert low < (z**2).sum() < high
    assert abs(z.mean()) < 4.9 / math.sqrt(N_FAST)
