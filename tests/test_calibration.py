"""Error bars of whole estimates: how often they hold the true value, over independent seeds."""

import math
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import chi2

import freeflow as ff
from benchmarks.calibration import compiled_once

N_SLOW, N_FAST = 400, 12
TARGET_ERROR = 0.004  # [kT per atom]
CHEAP, SHARP = 2e-4, 2.5e-5  # of the value that estimates are held against


class Scores(NamedTuple):
    """Estimates with seeds of their own against one value that is better known."""

    z: np.ndarray  # (estimate - exact) / combined standard error
    share: float  # of the exact value's error in the scores: it is common to all, and averages out in none
    weights: list[np.ndarray]  # of every estimate's samples, in units of their exact mean
    statuses: list[str]


@pytest.fixture(scope="module")
def estimates():
    """Full estimates of one system with the seeds asked for, against a value with the target error asked for.

    What is compiled serves every seed, so the runs share it; all else is done afresh for each.
    """
    system = ff.load("mw_cubic_8")

    def scores(seeds, exact_target: float) -> Scores:
        exact = ff.estimate(system, target_error=exact_target, max_samples=10**6, seed=10_000)
        assert exact.status == "converged"
        results = [ff.estimate(system, target_error=TARGET_ERROR, max_samples=5_000, seed=seed) for seed in seeds]
        assert all(result.status in {"converged", "unreliable"} for result in results)
        error = np.array([math.hypot(result.beta_f_std_error, exact.beta_f_std_error) for result in results])
        off = np.array([result.beta_f - exact.beta_f for result in results])
        weights = [
            np.exp(result.delta_f - off_one - np.asarray(result.work.forward))
            for result, off_one in zip(results, off, strict=True)
        ]
        share = float(np.mean(exact.beta_f_std_error / error))
        return Scores(off / error, share, weights, [result.status for result in results])

    with compiled_once():
        yield scores


def expected_mean(weights: list[np.ndarray]) -> tuple[float, float]:
    """Mean z of unbiased estimates whose weights have a true mean of 1, to order 1/sqrt(n), and its standard error.

    A mean of skewed weights and its error bar are correlated: samples that missed large weights are low and look
    sharper. Student's t of n samples has therefore the mean -skewness / (2 sqrt n) (Hall, The Bootstrap and Edgeworth
    Expansion, 1992). By ln(1 + x) = x - x^2 / 2 and an error bar divided by the mean, z is -t - c t^2 / (2 sqrt n)
    where c is the weights' relative standard deviation, so that <z> = (skewness - c) / (2 sqrt n).
    The moments are those of all samples together; the error is the jackknife's over the estimates.
    """
    sums = np.array([[len(w), np.sum((w - 1) ** 2), np.sum((w - 1) ** 3)] for w in weights])
    root_n = float(np.mean([math.sqrt(len(w)) for w in weights]))

    def shift(total: np.ndarray) -> float:
        spread = math.sqrt(total[1] / total[0])
        return (total[2] / total[0] / spread**3 - spread) / (2 * root_n)

    whole = sums.sum(axis=0)
    without = np.array([shift(whole - one) for one in sums])
    return shift(whole), math.sqrt((len(sums) - 1) * without.var())


@pytest.mark.slow
@pytest.mark.timeout(3600)  # some eight minutes of one core
def test_error_bars_of_estimates_are_calibrated(estimates):
    z, share, weights, statuses = estimates(range(1000, 1000 + N_SLOW), SHARP)
    covered, spread = int((np.abs(z) < 1.96).sum()), float(z.std())
    expected, uncertainty = expected_mean(weights)
    print(f"covered {covered / N_SLOW:.3f}, spread {spread:.3f}, max {np.abs(z).max():.2f}")
    print(f"mean {z.mean():+.3f}, expected of skewed weights {expected:+.3f}({uncertainty:.3f}), share {share:.3f}")
    assert share < 0.1
    assert 0.91 <= covered / N_SLOW <= 0.98
    assert 0.9 <= spread <= 1.15
    # One false alarm in 16 000.
    assert abs(z.mean() - expected) < 4 * math.hypot(1 / math.sqrt(N_SLOW), share, uncertainty)
    assert abs(expected) < 0.3  # a bias that is explained is one all the same
    assert statuses.count("converged") >= 0.95 * N_SLOW


def test_a_few_error_bars_hold(estimates):
    # One false alarm in 1e6 for each of the two, if the scores are normal with the correlation share^2.
    z, share, *_ = estimates(range(N_FAST), CHEAP)
    low, high = chi2.interval(1 - 1e-6, N_FAST - 1)
    assert low < ((z - z.mean()) ** 2).sum() / (1 - share**2) < high
    assert abs(z.mean()) < 4.9 * math.hypot(1 / math.sqrt(N_FAST), share)
