"""The stopping rule: cost, coverage of the final error bar, and limits."""

import numpy as np
import pytest
from scipy.stats import binom

from freeflow.errors import InputError, PrecisionError
from freeflow.estimators import bar, fep, record
from freeflow.stopping import StoppingRule


def run(rule, draw, batch=1):
    """Draw work until the rule is satisfied, in whole batches."""
    work = np.zeros(0)
    while more := rule.further(work):
        work = np.concatenate([work, draw(-(-more // batch) * batch)])
    return work


@pytest.mark.parametrize("variance", [0.05, 0.5, 1.0, 1.5])
def test_coverage_and_cost(variance):
    """95 % of the intervals cover, within 1.5 %; a count outside is a false alarm of 1e-6."""
    rng = np.random.default_rng(1)
    ideal, n_replicas, covered, cost = 1200, 500, 0, 0
    rule = StoppingRule(target_error=float(np.sqrt(np.expm1(variance) / ideal)), max_samples=10**6)
    for _ in range(n_replicas):
        w = run(rule, lambda n: rng.normal(variance / 2, np.sqrt(variance), n))
        e = fep(record(w))
        assert e.std_error <= rule.target_error
        covered += abs(e.delta_f) < 1.96 * e.std_error
        cost += len(w) / n_replicas
    low = binom.ppf(1e-6, n_replicas, 0.935)
    high = binom.isf(1e-6, n_replicas, 0.965)
    assert low <= covered <= high
    assert cost < 1.25 * ideal


def test_halved_error_bars_would_fail_the_coverage_test():
    rng = np.random.default_rng(2)
    rule = StoppingRule(target_error=0.03, max_samples=10**6)
    estimates = [fep(record(run(rule, lambda n: rng.normal(0.25, 0.5**0.5, n)))) for _ in range(300)]
    covered = sum(abs(e.delta_f) < 1.96 * 0.5 * e.std_error for e in estimates)
    assert covered < binom.ppf(1e-6, 300, 0.935)


def test_easy_work_stops_at_the_minimum():
    rng = np.random.default_rng(3)
    rule = StoppingRule(target_error=0.1, max_samples=10**5, min_samples=300)
    assert rule.further(np.zeros(0)) == 300
    assert rule.further(rng.normal(0, 0.1, 299)) == 1
    assert rule.further(rng.normal(0, 0.1, 300)) == 0
    assert rule.further(np.full(300, 2.0)) == 0
    assert len(run(rule, lambda n: rng.normal(0, 0.1, n), batch=128)) == 384


def test_plans_depend_only_on_the_samples_and_grow_at_most_twofold():
    work = np.random.default_rng(4).normal(0.5, 1.0, 600)
    rule = StoppingRule(target_error=0.001, max_samples=10**7)
    assert rule.further(work) == rule.further(work) == 600
    near = StoppingRule(target_error=0.9 * float(fep(record(work)).std_error), max_samples=10**7)
    assert 0 < near.further(work) < 600
    assert len(work) + near.further(work) >= near.predicted_samples(work)


def test_a_target_out_of_reach_ends_at_the_most_samples():
    rng = np.random.default_rng(5)
    draw = lambda n: rng.normal(0.5, 1.0, n)  # noqa: E731
    rule = StoppingRule(target_error=0.002, max_samples=5000)
    seen = draw(600)
    # (e - 1) / 0.002^2 = 430 000; its error bar from 600 samples is a factor of 2.
    assert 200_000 < rule.predicted_samples(seen) < 1_500_000
    assert len(run(rule, draw)) == 5000
    assert rule.predicted_samples(np.zeros(0)) == rule.min_samples
    assert StoppingRule(target_error=1.0, max_samples=50).further(np.zeros(0)) == 50


def test_large_harmless_work_costs_little():
    rng = np.random.default_rng(6)
    # One in ten samples clashes: weight zero, infinite work.
    draw = lambda n: np.where(rng.random(n) < 0.1, np.inf, rng.normal(0.1, 0.3, n))  # noqa: E731
    rule = StoppingRule(target_error=0.01, max_samples=10**6)
    ideal = (np.exp(0.09) / 0.9 - 1) / 0.01**2
    assert len(run(rule, draw)) < 2.2 * ideal


def test_nan_stops_and_bad_input_is_refused():
    rule = StoppingRule(target_error=0.01, max_samples=10**5)
    assert rule.further(np.full(600, np.nan)) == 0
    for arguments in ((0.0, 100), (float("nan"), 100), (0.1, 0)):
        with pytest.raises(InputError):
            StoppingRule(*arguments)
    with pytest.raises(InputError):
        StoppingRule(0.1, 100, min_samples=1)
    with pytest.raises(PrecisionError):
        rule.further(np.zeros(600, np.float32))


def test_two_sided_work():
    rng = np.random.default_rng(7)
    rule = StoppingRule(target_error=0.02, max_samples=10**6)
    forward, reverse = np.zeros(0), np.zeros(0)
    while more := rule.further(record(forward, reverse), bar):
        forward = np.concatenate([forward, rng.normal(2.0, 1.0, more)])
        reverse = np.concatenate([reverse, rng.normal(-1.0, 1.0, more)])
    e = bar(record(forward, reverse))
    assert e.std_error <= 0.02
    assert abs(e.delta_f - 1.5) < 4.9 * e.std_error
    assert len(forward) < 1.3 * len(forward) * (e.std_error / 0.02) ** 2
