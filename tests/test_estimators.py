"""FEP, BAR and MBAR against known answers and pymbar, and their diagnostics against planted faults.

Random checks bound a binomial count at a false-alarm rate of 1e-6 each unless they say otherwise.
"""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom, genpareto

from freeflow import estimators as est
from freeflow.errors import InputError, PrecisionError
from freeflow.estimators import bar, diagnose, fep, mbar, record, reliability
from freeflow.types import Estimate, double_precision

PYMBAR = """
import sys, numpy as np, pymbar
from pymbar.timeseries import statistical_inefficiency
d = np.load(sys.argv[1])
m = pymbar.MBAR(d["u_kn"], d["n_k"], solver_protocol="robust")
r = m.compute_free_energy_differences()
b = pymbar.bar(d["w_f"], d["w_r"], relative_tolerance=1e-14)
two = pymbar.MBAR(d["two_state"], [len(d["w_f"]), len(d["w_r"])])
np.savez(sys.argv[2], f_k=r["Delta_f"][0], std_error=r["dDelta_f"], overlap=m.compute_overlap()["matrix"],
         bar=b["Delta_f"], bar_error=b["dDelta_f"], scalar=two.compute_overlap()["scalar"],
         g=statistical_inefficiency(d["series"]))
"""


def gaussian_work(rng, n_forward, n_reverse=0, variance=1.0, delta_f=0.0):
    """Work that satisfies Crooks's theorem: mean delta_f + variance / 2 and -delta_f + variance / 2."""
    spread = np.sqrt(variance)
    forward = rng.normal(delta_f + variance / 2, spread, n_forward)
    return record(forward, rng.normal(variance / 2 - delta_f, spread, n_reverse))


def soft_mode_work(rng, n, softness):
    """Work between oscillators of variance 1 and `softness`: k = 1 - 1 / softness, and delta_f = 0."""
    x = rng.normal(size=n)
    return record(0.5 * x**2 * (1 / softness - 1) + 0.5 * np.log(softness))


def assert_coverage(estimates, truth, probability=0.95):
    """Of the error bars scaled to 95 %, at the false-alarm rate of this file."""
    covered = sum(abs(e.delta_f - truth) < 1.96 * e.std_error for e in estimates)
    low, high = binom.interval(1 - 1e-6, len(estimates), probability)
    assert low <= covered <= high


# ------------------------------------------------------------------ FEP and BAR


def test_fep_of_two_values_by_hand():
    e = fep(record([0.0, np.log(3.0)]))
    assert e.delta_f == pytest.approx(-np.log(2 / 3), abs=1e-15)
    # Weights 1 and 1/3: mean 2/3, variance 2/9, relative variance of the mean 1/4.
    assert e.std_error == pytest.approx(0.5, abs=1e-15)
    assert e.ess_fraction == pytest.approx((4 / 3) ** 2 / (10 / 9) / 2, abs=1e-15)


def test_exact_discrete_states():
    # u_A = 0 on 4 points, u_B = 0, 1, 2, 3: every point once from A is the exact average over A, and
    # B in its exact proportions (1 : 2 : 4 : 8 with u_B = -k ln 2) makes BAR exact too.
    u_b = -np.log(2.0) * np.arange(4)
    truth = -np.log(np.mean(np.exp(-u_b)))
    assert fep(record(u_b)).delta_f == pytest.approx(truth, abs=1e-14)
    reverse = np.repeat(-u_b, [1, 2, 4, 8])
    for copies in (1, 3):
        assert bar(record(np.repeat(u_b, copies), reverse)).delta_f == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_harmonic_oscillators(shift):
    rng = np.random.default_rng(1)
    k = 4.0
    x, y = rng.normal(size=40_000), rng.normal(size=10_000) / np.sqrt(k)
    work = record(0.5 * (k - 1) * x**2 + shift, -0.5 * (k - 1) * y**2 - shift)
    truth = 0.5 * np.log(k) + shift
    for e in (fep(work), bar(work)):
        assert abs(e.delta_f - truth) < 4.9 * e.std_error  # 1e-6
        assert 0 < e.std_error < 0.02
    assert bar(work).std_error < fep(work).std_error


def test_perfect_transport_has_no_error():
    work = record(np.full(7, 1.25), np.full(3, -1.25))
    for e in (fep(work), bar(work)):
        assert e.delta_f == pytest.approx(1.25, abs=1e-13)
        assert e.std_error == pytest.approx(0.0, abs=1e-14)
        assert e.ess_fraction == pytest.approx(1.0)
    d = diagnose(work, "bar")
    assert d.overlap == pytest.approx(1.0)
    assert est.pareto_k(np.zeros(100)) == 0.0


@pytest.mark.parametrize("variance", [0.05, 1.0])
def test_error_bars_are_calibrated(variance):
    rng = np.random.default_rng(2)
    works = [gaussian_work(rng, 2000, 700, variance, delta_f=1.0) for _ in range(300)]
    assert_coverage([fep(w) for w in works], 1.0)
    assert_coverage([bar(w) for w in works], 1.0)
    halved = [Estimate(e.delta_f, 0.5 * e.std_error, e.ess_fraction) for e in map(fep, works)]
    with pytest.raises(AssertionError):
        assert_coverage(halved, 1.0)


def test_reverse_work_has_its_own_sign():
    rng = np.random.default_rng(3)
    work = gaussian_work(rng, 4000, 2000, 1.0, delta_f=3.0)
    assert abs(bar(work).delta_f - 3.0) < 4.9 * bar(work).std_error
    wrong = record(work.forward, -np.asarray(work.reverse))
    assert abs(bar(wrong).delta_f - 3.0) > 10 * bar(wrong).std_error
    assert reliability(diagnose(work, "bar"), bar(work)) == ()
    assert any("forward and reverse" in r for r in reliability(diagnose(wrong, "bar"), bar(wrong)))


def test_correlated_samples_need_their_inefficiency():
    rng = np.random.default_rng(4)
    works = [gaussian_work(rng, 800, 200, 1.0) for _ in range(150)]
    repeated = [record(w.forward, np.repeat(np.asarray(w.reverse), 10)) for w in works]
    assert_coverage([bar(w, inefficiency=(1.0, 10.0)) for w in repeated], 0.0)
    assert bar(works[0]).delta_f == pytest.approx(bar(repeated[0], (1.0, 10.0)).delta_f, abs=1e-12)
    with pytest.raises(AssertionError):
        assert_coverage([bar(w) for w in repeated], 0.0)
    with pytest.raises(InputError, match="at least 1"):
        bar(works[0], inefficiency=(0.5, 1.0))


def test_bar_converges_where_the_states_hardly_overlap():
    work = record([1000.0, 1001.0], [1000.0, 1003.0, 999.0])
    e = bar(work)
    c = float(e.delta_f) - np.log(2 / 3)
    left = np.sum(np.exp(-np.logaddexp(0, np.asarray(work.forward) - c) + 1000))
    right = np.sum(np.exp(-np.logaddexp(0, np.asarray(work.reverse) + c) + 1000))
    assert left == pytest.approx(right, rel=1e-9)
    assert any("overlap" in reason for reason in reliability(diagnose(work, "bar"), e))


def test_few_invalid_and_imprecise_samples():
    assert np.isnan(fep(record([1.0])).std_error)
    assert np.isnan(bar(record([1.0], [-1.0, -1.1])).std_error)
    for estimator, work in ((fep, record([])), (bar, record([1.0, 2.0])), (bar, record([], [1.0]))):
        with pytest.raises(InputError, match="zero samples"):
            estimator(work)
    with pytest.raises(InputError, match="shape"):
        fep(record(np.zeros((3, 2))))
    for bad in (np.zeros(3, np.float32), jnp.zeros(3, jnp.float32)):
        for estimator in (fep, bar):
            with pytest.raises(PrecisionError):
                estimator(record(bad, bad))
    with pytest.raises(PrecisionError):
        jax.vmap(fep)(record(jnp.zeros((2, 3), jnp.float32)[:, :], jnp.zeros((2, 0), jnp.float32)))
    for estimator in (fep, bar):
        e = estimator(record([0.0, np.nan, 1.0], [0.5, 0.1]))
        assert np.isnan(e.delta_f) and np.isnan(e.std_error)
    work = record([0.0, np.nan, 1.0])
    assert reliability(diagnose(work), fep(work)) == ("1 of 3 work values are NaN or minus infinity",)
    with pytest.raises(InputError, match="no estimator 'far'"):
        diagnose(work, "far")


def test_infinite_work_is_a_sample_of_weight_zero():
    assert fep(record([0.0, 0.0, np.inf, np.inf])).delta_f == pytest.approx(np.log(2))
    # Half of A's volume is forbidden in B; all of B is allowed in A.
    assert bar(record([0.0, np.inf] * 50, [0.0] * 80)).delta_f == pytest.approx(np.log(2))


@pytest.mark.parametrize("immense", [1e10, 1e88, 1e300])
def test_immense_work_is_infinite_work(immense):
    """A journey that flew apart: its work must not leave so much room for Bennett's constant that it is not found."""
    rng = np.random.default_rng(0)
    forward, reverse = rng.normal(0.5, 1.0, 600), rng.normal(0.5, 1.0, 500)
    for lost in (forward, reverse):
        lost[:3] = immense * np.array([1.0, 1e-3, 1e-6])
        kept = [np.where(w > 1e3, np.inf, w) for w in (forward, reverse)]
        for g in ((1.0, 1.0), (3.0, 1.0)):
            np.testing.assert_allclose(bar(record(forward, reverse), g), bar(record(*kept), g), rtol=1e-9)


def test_traced_and_padded_answers_agree():
    rng = np.random.default_rng(5)
    works = [gaussian_work(rng, 300, 200) for _ in range(3)]
    with double_precision():
        batch = record(jnp.stack([w.forward for w in works]), jnp.stack([w.reverse for w in works]))
        for estimator in (fep, bar):
            together = jax.vmap(estimator)(batch)
            for i, w in enumerate(works):
                np.testing.assert_allclose([x[i] for x in together], estimator(w), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ MBAR, and pymbar


def test_mbar_of_two_states_is_bar():
    work = gaussian_work(np.random.default_rng(6), 500, 300, 2.0, delta_f=-0.7)
    u = np.zeros((2, 800))
    u[1] = np.concatenate([work.forward, -np.asarray(work.reverse)])
    both = mbar(u, [500, 300])
    assert both.f_k[1] == pytest.approx(bar(work).delta_f, abs=1e-12)
    assert both.std_error[0, 1] == pytest.approx(bar(work).std_error, rel=0.01)
    assert both.overlap[0, 1] + both.overlap[1, 0] == pytest.approx(est.overlap(work), abs=1e-10)
    # Energies are relative: a shift per sample changes nothing, one per state only that state.
    shifted = mbar(u + 1e3 * np.sin(np.arange(800)) + [[0.0], [500.0]], [500, 300])
    assert shifted.f_k[1] - 500.0 == pytest.approx(both.f_k[1], abs=1e-9)


def test_mbar_refuses_impossible_input():
    with pytest.raises(InputError, match="adding up"):
        mbar(np.zeros((2, 5)), [2, 2])
    with pytest.raises(InputError, match="zero samples"):
        mbar(np.zeros((2, 0)), [0, 0])
    with pytest.raises(InputError, match="NaN"):
        mbar(np.full((2, 4), np.nan), [2, 2])
    with pytest.raises(PrecisionError):
        mbar(np.zeros((2, 4), np.float32), [2, 2])


@pytest.mark.skipif(importlib.util.find_spec("pymbar") is None, reason="pymbar is not installed")
def test_pymbar_agrees(tmp_path):
    rng = np.random.default_rng(7)
    # In a process of its own: pymbar switches all of JAX to 64 bits.
    stiffness, centre = np.array([1, 2, 4, 8, 0.3]), np.array([0, 0.3, 0.5, 0, 0.2])
    n_k = np.array([300, 0, 200, 500, 100])
    x = np.concatenate([rng.normal(c, k**-0.5, n) for k, c, n in zip(stiffness, centre, n_k, strict=True)])
    offset = np.array([0, 1000, -300, 5, 2])[:, None]
    u_kn = 0.5 * stiffness[:, None] * (x - centre[:, None]) ** 2 + offset
    work = gaussian_work(rng, 700, 400, 1.5, delta_f=1.2)
    w_f, w_r = np.asarray(work.forward), np.asarray(work.reverse)
    two_state = np.stack([np.zeros(1100), np.concatenate([w_f, -w_r])])
    series = np.convolve(rng.normal(size=1500), np.exp(-np.arange(50) / 8), "same")
    np.savez(tmp_path / "in.npz", u_kn=u_kn, n_k=n_k, w_f=w_f, w_r=w_r, two_state=two_state, series=series)
    command = [sys.executable, "-c", PYMBAR, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, capture_output=True)
    theirs, ours = np.load(tmp_path / "out.npz"), mbar(u_kn, n_k)
    np.testing.assert_allclose(ours.f_k, theirs["f_k"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(ours.std_error, theirs["std_error"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.overlap, theirs["overlap"], rtol=0, atol=1e-8)
    assert bar(work).delta_f == pytest.approx(theirs["bar"].item(), abs=1e-10)
    assert bar(work).std_error == pytest.approx(theirs["bar_error"].item(), rel=2 / 400)  # n - 1 for n
    assert est.overlap(work) == pytest.approx(theirs["scalar"].item(), abs=1e-9)
    assert est.statistical_inefficiency(series) == pytest.approx(theirs["g"].item(), rel=1e-9)


# ------------------------------------------------------------------ diagnostics


def test_weights_by_hand():
    log_w = np.log([1.0, 1.0, 2.0]) - 800
    assert est.effective_sample_size(log_w) == pytest.approx(16 / 6)
    assert est.largest_weight_share(log_w) == pytest.approx(0.5)
    assert est.effective_sample_size(np.zeros(9)) == 9
    assert est.overlap(record([1.0, 2.0])) is None
    assert est.hysteresis(record([1.0, 2.0])) is None
    assert est.statistical_inefficiency(np.ones(50)) == 1.0


@pytest.mark.parametrize("k", [0.2, 0.7, 1.0])
def test_pareto_k_of_pareto_weights(k):
    rng = np.random.default_rng(8)
    n = 20_000
    log_w = np.log(genpareto.rvs(k, size=n, random_state=rng) + 1 / k)
    # Standard error (1 + k) / sqrt(m) of m = 3 sqrt(n) tail points, 4.9 of which mean 1e-6.
    margin = 4.9 * (1 + k) / np.sqrt(3 * np.sqrt(n))
    assert abs(est.pareto_k(log_w) - k) < margin
    assert abs(est.hill_k(log_w) - k) < margin


def test_pareto_k_with_ties_and_few_weights():
    rng = np.random.default_rng(9)
    assert np.isnan(est.pareto_k(rng.normal(size=20)))
    rounded = np.round(rng.normal(0, 0.3, 1000), 1)
    k = est.pareto_k(rounded)
    assert np.isnan(k) or -1 < k < 0.7
    assert np.isnan(est.pareto_k(np.where(np.arange(1000) < 2, 1.0, 0.0)))
    assert np.isnan(est.pareto_k([np.nan] * 50))


def test_bootstrap_agrees_with_the_analytic_error():
    rng = np.random.default_rng(10)
    work = gaussian_work(rng, 1500, 600, 0.7)
    for estimator in (fep, bar):
        # 200 resamples give the error bar to 5 %; 4.9 of which mean 1e-6.
        exact = float(estimator(work).std_error)
        assert est.bootstrap(estimator, work, 0) == pytest.approx(exact, rel=0.25)
        assert est.bootstrap(estimator, work, jax.random.key(1)) == pytest.approx(exact, rel=0.25)
        assert est.bootstrap(estimator, work, 0) == est.bootstrap(estimator, work, 0)
        generic = est.bootstrap(lambda w, e=estimator: e(w), work, 0)
        assert generic == pytest.approx(exact, rel=0.25)
    assert np.isnan(est.bootstrap(fep, record([1.0]), 0))
    thinned = est.bootstrap(bar, work, 0, inefficiency=(4.0, 9.0))
    assert thinned == pytest.approx(float(bar(work, (4.0, 9.0)).std_error), rel=0.25)


def test_drift_sees_a_run_that_has_not_settled():
    rng = np.random.default_rng(11)
    z = [est.drift(gaussian_work(rng, 1000)) for _ in range(200)]
    assert np.max(np.abs(z)) < 6
    assert np.std(z) == pytest.approx(1.0, abs=4.9 / np.sqrt(400))
    settling = record(np.concatenate([rng.normal(1.5, 1, 500), rng.normal(0.5, 1, 500)]))
    reasons = reliability(diagnose(settling), fep(settling))
    assert any("half" in reason for reason in reasons)


def test_healthy_runs_raise_no_alarm():
    rng = np.random.default_rng(12)
    alarms, n_rounds = 0, 10
    cases = [(v, n) for v in (0.02, 0.3, 1.0) for n in (200, 600, 4000)]
    for variance, n in cases * n_rounds:
        work = gaussian_work(rng, n, n // 2, variance, delta_f=2.0)
        alarms += bool(reliability(diagnose(work), fep(work)))
        alarms += bool(reliability(diagnose(work, "bar"), bar(work)))
    # The promised rate is 1e-3; more than this many of 180 would refute it at 1e-6.
    assert alarms <= binom.isf(1e-6, 2 * n_rounds * len(cases), 1e-3)


@pytest.mark.parametrize(
    ("softness", "n", "rate"), [(100.0, 500, 0.8), (10.0, 500, 0.6), (10.0, 2000, 0.97), (4.0, 10_000, 0.9)]
)
def test_a_soft_mode_is_caught(softness, n, rate):
    # The trap: a biased answer with a small error bar. `rate` is what is promised.
    rng = np.random.default_rng(13)
    works = [soft_mode_work(rng, n, softness) for _ in range(60)]
    caught = sum(bool(reliability(diagnose(w), fep(w))) for w in works)
    assert caught >= binom.ppf(1e-6, 60, rate)


def test_bar_may_be_sound_where_one_sided_averages_are_not():
    rng = np.random.default_rng(15)
    works = [gaussian_work(rng, 1000, 1000, 6.0) for _ in range(100)]
    assert sum(bool(reliability(diagnose(w, "bar"), bar(w))) for w in works) <= binom.isf(1e-6, 100, 1e-3)
    assert sum(bool(reliability(diagnose(w), fep(w))) for w in works) > 90


def test_planted_faults_are_named():
    rng = np.random.default_rng(14)
    w = rng.normal(0.5, 1.0, 1000)
    w[17] = -8.0
    assert any("of the weight" in reason for reason in reliability(diagnose(record(w)), fep(record(w))))
    work = gaussian_work(rng, 2000)
    e = fep(work)
    halved = Estimate(e.delta_f, 0.5 * e.std_error, e.ess_fraction)
    assert any("bootstrap" in reason for reason in reliability(diagnose(work), halved))
    one = record([1.0])
    assert "error bar" in reliability(diagnose(one), fep(one))[0]
    wide = gaussian_work(rng, 2000, variance=20.0)
    assert any("effective samples" in reason for reason in reliability(diagnose(wide), fep(wide)))


def test_bounded_weights_have_no_heavy_tail():
    """Hardly any work, but a few samples that gain much of it: BAR's weights stay within a factor of two."""
    rng = np.random.default_rng(8)
    work = record(*(1e-3 * rng.standard_normal((2, 4000)) - 1e-3 * rng.pareto(1.0, (2, 4000))))
    found = diagnose(work, "bar")
    assert found.pareto_k > 0.7 and found.overlap > 0.9
    assert not any("heavy" in reason for reason in reliability(found, bar(work)))
