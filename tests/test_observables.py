"""Averages, tests of two samples, histograms and radial distributions of crystals.

Random tests fix their seeds. "One false alarm in 1e6" is for each check, if all is well.
"""

import functools
import json
import math
from pathlib import Path

import ase.build
import mdtraj
import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import binom, ks_2samp, ttest_ind

import freeflow as ff
from freeflow.crystals import lattice_crystal, structure_crystal
from freeflow.errors import InputError
from freeflow.estimators import effective_sample_size, statistical_inefficiency
from freeflow.observables import (
    Average,
    common_edges,
    difference,
    histogram,
    kolmogorov_smirnov,
    largest_difference,
    mean_squared_displacement,
    radial_distribution,
    time_average,
    weighted_average,
)
from freeflow.trajectories import read, to_displacements

REFDATA = Path(__file__).resolve().parents[2] / "shared" / "refdata"
EDGES = np.linspace(-3, 3, 31)


def weighted(rng, n, correlation):
    """Standard normal values (n,) and log weights of variance 1; the weighted mean is the correlation."""
    log_weights = rng.normal(size=n)
    return correlation * log_weights + math.sqrt(1 - correlation**2) * rng.normal(size=n), log_weights


def series(rng, n, g):
    """Autoregressive series (n,), standard normal, of statistical inefficiency g."""
    phi = (g - 1) / (g + 1)
    noise = rng.normal(size=n) * math.sqrt(1 - phi**2)
    noise[0] = rng.normal()
    return lfilter([1.0], [1.0, -phi], noise)


def same(a, b, rtol=1e-12):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol)


# ------------------------------------------------------------------ averages


def test_equal_weights_are_the_plain_mean():
    v = np.random.default_rng(0).normal(size=(50, 3))
    mean, error, _ = weighted_average(v, np.full(50, -1234.5))
    np.testing.assert_allclose(mean, v.mean(axis=0))
    np.testing.assert_allclose(error, v.std(axis=0, ddof=1) / math.sqrt(50))
    same(time_average(v, 1.0), weighted_average(v, np.zeros(50)))


def test_weighted_average_by_leaving_out():
    # The jackknife as defined: one sample left out at a time.
    v, log_w = weighted(np.random.default_rng(1), 30, 0.6)
    left_out = [np.average(np.delete(v, i), weights=np.exp(np.delete(log_w, i))) for i in range(30)]
    mean, error, _ = weighted_average(v, log_w)
    assert mean == pytest.approx(np.average(v, weights=np.exp(log_w)))
    around_mean = 29 / 30 * np.sum((np.array(left_out) - mean) ** 2)
    assert error == pytest.approx(math.sqrt(around_mean))


def test_columns_are_averaged_one_by_one():
    rng = np.random.default_rng(2)
    v, log_w = rng.normal(size=(40, 3)), rng.normal(size=40)
    together, series_together = weighted_average(v, log_w), time_average(v, 3.0)
    for k in range(3):
        same([field[k] for field in together], weighted_average(v[:, k], log_w))
        same([field[k] for field in series_together], time_average(v[:, k], 3.0))
    assert weighted_average(v[:, 0], log_w).mean.shape == ()


def test_samples_without_weight():
    v, log_w = weighted(np.random.default_rng(3), 100, 0.0)
    bad = np.array([math.nan, math.inf, 1e300, 7.0])
    padded = np.concatenate([v, bad]), np.concatenate([log_w, np.full(4, -math.inf)])
    mean, error, _ = weighted_average(*padded)
    plain = weighted_average(v, log_w)
    assert mean == plain.mean
    # They are samples all the same: only the factor (n - 1) / n sees them.
    assert error == pytest.approx(plain.std_error * math.sqrt(103 / 104 / (99 / 100)))
    with_nan = weighted_average(np.append(v, math.nan), np.append(log_w, 0.0))
    assert np.isnan(with_nan.mean) and np.isnan(with_nan.std_error)


def test_no_error_bar_from_no_data():
    for lonely in (
        weighted_average(np.array([2.0]), np.array([0.0])),
        weighted_average(np.array([2.0, 5.0]), np.array([0.0, -math.inf])),
        weighted_average(np.full(9, 2.0), np.linspace(-1, 1, 9)),
        time_average(np.array([2.0, 2.0]), 1.0),
        time_average(np.array([1.0, 3.0]), 2.0),
    ):
        assert lonely.mean == pytest.approx(2.0) and np.isnan(lonely.std_error)
    for nothing in (
        weighted_average(np.ones(3), np.full(3, -math.inf)),
        weighted_average(np.ones(2), np.array([0.0, math.nan])),
        time_average(np.zeros(0), 1.0),
        weighted_average(np.zeros((0, 4)), np.zeros(0)),
    ):
        assert np.isnan(nothing.mean).all() and np.isnan(nothing.std_error).all()
    empty_bin = weighted_average(np.array([[0.0, 1.0], [0.0, 2.0]]), np.zeros(2))
    assert np.isnan(empty_bin.std_error).tolist() == [True, False]


@pytest.mark.parametrize(
    ("n", "correlation", "share"), [(160, 0.0, 0.66), (160, 1.0, 0.63), (1000, 0.0, 0.68), (1000, 1.0, 0.66)]
)
def test_weighted_error_bars_are_calibrated(n, correlation, share):
    # The shares are those of the docstring, measured with 10 000 replicas; one false alarm in 1e6 here.
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(1000):
        mean, error, _ = weighted_average(*weighted(rng, n, correlation))
        covered += abs(mean - correlation) < error
    low, high = binom.interval(1 - 1e-6, 1000, share)
    assert low <= covered <= high


@pytest.mark.parametrize("g", [1, 5])
def test_time_error_bars_are_calibrated(g):
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(500):
        mean, error, _ = time_average(series(rng, 400, g), float(g))
        covered += abs(mean) < error
    low, high = binom.interval(1 - 1e-6, 500, 0.68)
    assert low <= covered <= high


# ------------------------------------------------------------------ tests


def test_difference_is_welch():
    rng = np.random.default_rng(6)
    x, y = rng.normal(0, 1, 12), rng.normal(0.8, 3, 25)
    a, b = (Average(np.asarray(v.mean()), np.asarray(v.std(ddof=1) / math.sqrt(len(v)))) for v in (x, y))
    z, p = difference(a, 12.0, b, 25.0)
    expected = ttest_ind(x, y, equal_var=False)
    assert (z, p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
    assert difference(b, 25.0, a, 12.0) == (pytest.approx(-z), pytest.approx(p))
    # Averages that know of fewer degrees of freedom than there are samples are less sure.
    assert difference(weighted_average(x, np.zeros(12)), 12.0, time_average(y, 1.0), 25.0).p_value > p
    unknown = difference(a, 12.0, Average(np.asarray(0.0), np.asarray(math.nan)), 25.0)
    assert np.isnan(unknown.statistic) and np.isnan(unknown.p_value)


def test_largest_difference_corrects_for_the_number_of_bins():
    a = Average(np.array([0.0, 3.0, 1.0, 5.0]), np.array([1.0, 1.0, 1.0, math.nan]))
    b = Average(np.array([0.0, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 1.0]))
    z, p = largest_difference(a, 1e6, b, 1e6)
    one = difference(Average(a.mean[1], a.std_error[1]), 1e6, Average(b.mean[1], b.std_error[1]), 1e6)
    assert z == pytest.approx(3 / math.sqrt(2)) == pytest.approx(one.statistic)
    assert p == pytest.approx(1 - (1 - one.p_value) ** 3)
    none = Average(np.zeros(4), np.full(4, math.nan))
    assert np.isnan(largest_difference(none, 1e6, b, 1e6).p_value)


def test_an_error_bar_too_good_to_be_true_does_not_count():
    # One sample in the bin where nine are expected: by itself its error bar says 9 +- 0 against 1 +- 1.
    a, b = (Average(np.array([m]), np.array([s]), np.array([d])) for m, s, d in ((0.01, 0.01, 1.0), (0.09, 0.001, 1e4)))
    z, _ = largest_difference(a, 100.0, b, 1e4)
    assert z == pytest.approx(0.08 / math.hypot(0.001, 0.01))
    z, p = largest_difference(a._replace(mean=np.array([1e-4]), std_error=np.array([1e-4])), 100.0, b, 1e4)
    assert z == pytest.approx(0.0899 / math.hypot(0.001, 0.01))  # 0.001 * sqrt(1e4 / 100)
    assert p < 1e-6


def test_kolmogorov_smirnov_is_scipys_without_weights():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=800), rng.normal(0.1, 1, 1000)
    statistic, p = kolmogorov_smirnov(x, np.full(800, 3.0), y, 1.0)
    expected = ks_2samp(x, y)
    assert statistic == pytest.approx(expected.statistic, abs=1e-12)
    assert p == pytest.approx(expected.pvalue, rel=0.2)


def test_kolmogorov_smirnov_of_weights_that_repeat():
    # A weight of 2 moves the distribution as two equal samples do.
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.5, 3.5, 3.6])
    weighted_twice = kolmogorov_smirnov(x, np.log([2.0, 1.0, 1.0, 2.0]), y, 1.0)
    assert weighted_twice.statistic == pytest.approx(ks_2samp([1, 1, 2, 3, 4, 4], y).statistic)
    worthless = kolmogorov_smirnov(
        np.append(x, [99, np.nan]), np.array([*np.log([2.0, 1.0, 1.0, 2.0]), -math.inf, -math.inf]), y, 1.0
    )
    assert worthless == weighted_twice
    assert np.isnan(kolmogorov_smirnov(x, np.zeros(4), np.array([1.0, math.nan]), 1.0).p_value)


CASES = [(160, 0.5, 200, 1), (160, 0.0, 2000, 5), (1000, 0.5, 200, 5), (1000, 1.0, 2000, 1), (1000, 0.0, 2000, 20)]


@functools.cache
def alarms(case, n, shift=0.0):
    """p-values (n, 3) of difference, largest difference and Kolmogorov and Smirnov; g of y is estimated."""
    n_x, correlation, n_y, g = case
    rng, found = np.random.default_rng(8), []
    for _ in range(n):
        x, log_w = weighted(rng, n_x, correlation)
        x, y = x - correlation, series(rng, n_y, g) + shift
        g_y, ess = statistical_inefficiency(y), effective_sample_size(log_w)
        sides = (weighted_average(x, log_w), ess, time_average(y, g_y), n_y / g_y)
        bins = (histogram(x, EDGES, log_w), ess, histogram(y, EDGES, inefficiency=g_y), n_y / g_y)
        found.append(
            (
                difference(*sides).p_value,
                largest_difference(*bins).p_value,
                kolmogorov_smirnov(x, log_w, y, g_y).p_value,
            )
        )
    return np.array(found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_samples_raise_few_alarms(case):
    # Up to 2 and 3 times the nominal rates: the docstrings say what was measured. One false alarm in 1e6.
    n = 250
    p = alarms(case, n)
    assert (np.sum(p < 1e-2, axis=0) <= binom.ppf(1 - 1e-6, n, 2e-2)).all()
    assert (np.sum(p < 1e-3, axis=0) <= binom.ppf(1 - 1e-6, n, 3e-3)).all()


def test_a_shift_is_found():
    # Half a standard deviation, 370 against 400 effective samples: seven standard errors.
    p = alarms((1000, 0.0, 2000, 5), 20, shift=0.5)
    assert (np.median(p[:, [0, 2]], axis=0) < 1e-6).all()


def columns(rng, shift):
    """p-value of the largest difference of 30 columns, of which one is shifted."""
    x, log_w = rng.normal(size=(1000, 30)), rng.normal(size=1000)
    y = np.stack([series(rng, 2000, 5) for _ in range(30)], axis=1)
    y[:, 3] += shift
    sides = weighted_average(x, log_w), effective_sample_size(log_w), time_average(y, 5.0), 400.0
    return largest_difference(*sides)


def test_one_shifted_column_is_found_and_none_invented():
    rng = np.random.default_rng(15)
    # One false alarm in 1e6.
    assert sum(columns(rng, 0.0).p_value < 1e-2 for _ in range(100)) <= binom.ppf(1 - 1e-6, 100, 1e-2)
    assert np.median([columns(rng, 0.5).p_value for _ in range(20)]) < 1e-5


# ------------------------------------------------------------------ histograms


@pytest.mark.parametrize("weights", [True, False])
def test_histogram_is_the_average_of_indicators(weights):
    v, log_w = weighted(np.random.default_rng(9), 300, 0.7)
    indicators = ((v[:, None] >= EDGES[:-1]) & (v[:, None] < EDGES[1:])) / np.diff(EDGES)
    if weights:
        same(histogram(v, EDGES, log_w), weighted_average(indicators, log_w), rtol=1e-10)
    else:
        same(histogram(v, EDGES, inefficiency=4.0), time_average(indicators, 4.0), rtol=1e-10)
    mean, error, _ = histogram(v, EDGES, log_w)
    assert np.isnan(error[mean == 0]).all() and (mean == 0).any()
    assert (mean @ np.diff(EDGES)) == pytest.approx(np.average(np.abs(v) < 3, weights=np.exp(log_w)))


def test_histogram_of_too_little():
    lonely = histogram(np.array([0.1, 5.0]), EDGES, np.array([0.0, -math.inf]))
    assert lonely.mean[15] == pytest.approx(5.0) and np.isnan(lonely.std_error).all()
    assert np.isnan(histogram(np.zeros(0), EDGES).mean).all()
    correlated = histogram(np.array([0.1, 0.3]), EDGES, inefficiency=2.0)
    assert correlated.mean[15] == pytest.approx(2.5) and np.isnan(correlated.std_error).all()


def test_common_edges_hold_the_bulk_of_both():
    rng = np.random.default_rng(10)
    x, y = np.append(rng.normal(0, 1, 2000), [1e6, math.inf]), np.append(rng.normal(4, 1, 500), [-1e5])
    log_w = np.append(np.zeros(2000), [-40.0, -math.inf])
    edges = common_edges(x, log_w, y, 20)
    assert len(edges) == 21 and np.all(np.diff(edges) > 0)
    assert -4.5 < edges[0] < -2.5 and 6.5 < edges[-1] < 8.5
    assert 10 <= len(common_edges(x, log_w, y)) - 1 <= 60
    one_value = common_edges(np.full(3, 2.0), None, np.full(2, 2.0))
    assert one_value[0] < 2.0 < one_value[-1]
    with pytest.raises(InputError, match="at least one finite value"):
        common_edges(np.array([math.nan]), np.zeros(1), np.zeros(0))


# ------------------------------------------------------------------ crystals


@pytest.fixture(scope="module")
def triclinic(tmp_path_factory):
    """The primitive cell of fcc, repeated."""
    file = tmp_path_factory.mktemp("triclinic") / "POSCAR"
    ase.io.write(file, ase.build.bulk("Cu", "fcc", a=1.5).repeat((3, 4, 3)), format="vasp")
    return structure_crystal(file)


@pytest.fixture
def crystal(request):
    return request.getfixturevalue("triclinic") if request.param == "triclinic" else lattice_crystal(*request.param)


def brute_force(crystal, u, edges):
    """Counts from the nearest of 125 images of every pair."""
    shifts = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) @ crystal.cell
    first, second = np.triu_indices(crystal.n_atoms, 1)
    counts = []
    for x in crystal.sites + u:
        d = x[second] - x[first]
        d -= np.floor(d @ np.linalg.inv(crystal.cell)) @ crystal.cell
        distances = np.linalg.norm(d[:, None] + shifts, axis=-1).min(axis=1)
        counts.append(np.histogram(distances, edges)[0])
    return np.array(counts, float)


SHAPES = [("fcc", (3, 3, 3), 1.0), ("hcp", (3, 3, 2), 1.0), ("sc", (2, 3, 4), 1.0), "triclinic"]


@pytest.mark.parametrize("crystal", SHAPES, indirect=True, ids=str)
@pytest.mark.parametrize("size", [0.01, 0.1, 0.5, 20.0])
def test_counts_are_exact_for_any_displacement(crystal, size):
    rdf = radial_distribution(crystal, 40)
    u = np.random.default_rng(11).normal(0, size, (3, crystal.n_atoms, 3))
    counts, expected = rdf.count(u), brute_force(crystal, u, rdf.edges)
    # In float32 a pair next to an edge may fall on the other side: about one in 1e5 pairs.
    assert np.abs(counts - expected).sum() <= 4
    assert expected.sum() > 10


def test_counts_of_a_short_range_and_many_frames():
    crystal = lattice_crystal("fcc", (4, 4, 4), 1.0)
    rdf = radial_distribution(crystal, 25, r_max=1.9)
    u = np.random.default_rng(12).normal(0, 0.05, (150, 256, 3))
    u[7] *= 30  # the one that is not listed
    u[9, 0], u[11, 5, 2] = math.nan, math.inf
    counts = rdf.count(u.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(counts).any(axis=1).nonzero()[0], [9, 11])
    some = [7, 149]
    assert np.abs(counts[some] - brute_force(crystal, u[some], rdf.edges)).sum() <= 4
    one_by_one = np.concatenate([rdf.count(u[k : k + 1]) for k in some])
    assert np.abs(counts[some] - one_by_one).sum() <= 4
    assert rdf.count(u[:0]).shape == (0, 25)


def test_lattice_shells():
    # fcc: 12, 6, 24 and 12 neighbours at a sqrt(n / 2), n = 1 to 4.
    crystal = lattice_crystal("fcc", (5, 5, 5), 4.0)  # a = 1
    rdf = radial_distribution(crystal, 200, r_max=1.5)
    counts = rdf.count(np.zeros((1, 500, 3)))[0]
    shells = np.sqrt(np.arange(1, 5) / 2)
    at = [counts[np.abs(rdf.centres - r) < 0.01].sum() for r in shells]
    assert at == [500 * z / 2 for z in (12, 6, 24, 12)] and counts[rdf.centres < 1.45].sum() == sum(at)


def test_ideal_gas_is_flat():
    # Uniform positions: g(r) = 1 within five standard deviations of a count.
    crystal = lattice_crystal("sc", (4, 4, 4), 1.0)
    rdf = radial_distribution(crystal, 8)
    u = np.random.default_rng(13).uniform(0, 4, (200, 64, 3)) - crystal.sites
    counts = rdf.count(u)
    g, total = rdf.normalise(counts).mean(axis=0), counts.sum(axis=0)
    assert (np.abs(g - 1) < 5 / np.sqrt(total)).all()


def test_against_mdtraj():
    crystal = lattice_crystal("diamond", (2, 2, 2), 0.0336)
    rdf = radial_distribution(crystal, 100)
    u = np.random.default_rng(14).normal(0, 0.2, (50, 64, 3))
    made = mdtraj.Trajectory(np.asarray((crystal.sites + u) / 10, np.float32), None)
    made.unitcell_vectors = np.tile(np.asarray(crystal.cell / 10, np.float32), (50, 1, 1))
    pairs = np.stack(np.triu_indices(64, 1), axis=1)
    r, g = mdtraj.compute_rdf(made, pairs, r_range=(0, rdf.edges[-1] / 10), n_bins=100)
    np.testing.assert_allclose(rdf.centres, 10 * r, rtol=1e-5)
    # Both are float32: a pair or two of 1e5 next to the edges of narrow bins.
    one_pair = rdf.normalise(np.ones(100)) / 50
    assert (np.abs(rdf.normalise(rdf.count(u)).mean(axis=0) - g) < 3 * one_pair + 1e-4 * g).all()


@pytest.mark.parametrize(
    ("name", "file", "tolerance"),
    [("lj_fcc_256", "traj.extxyz.gz", 2e-4), ("mw_hexagonal_64", "traj.dcd", 2e-3), ("mw_cubic_216", "traj.dcd", 2e-4)],
)
def test_reference_data(name, file, tolerance):
    # As published with the data; what is left are pairs next to the edges of bins, and rounded numbers.
    if not (REFDATA / name).exists():
        pytest.skip("no reference data here")
    system = ff.load(name)
    reference = json.loads((REFDATA / name / "reference.json").read_text())
    x = np.concatenate([frames.positions for frames in read(REFDATA / name / file, system)])
    u = to_displacements(x, system.crystal).displacements
    rdf = radial_distribution(system.crystal)
    np.testing.assert_allclose(rdf.centres, reference["rdf"]["r"], atol=1e-6)
    np.testing.assert_allclose(rdf.normalise(rdf.count(u)).mean(axis=0), reference["rdf"]["g"], atol=tolerance)
    assert mean_squared_displacement(u).mean() == pytest.approx(reference["msd_from_lattice"], rel=1e-4)


def test_the_default_range_is_half_the_box_or_500_neighbours():
    small = lattice_crystal("fcc", (4, 4, 4), 1.28)
    assert radial_distribution(small).edges[-1] == pytest.approx(small.cell[0, 0] / 2)
    large = radial_distribution(lattice_crystal("sc", (12, 12, 12), 1.0))
    assert 4 / 3 * math.pi * large.edges[-1] ** 3 == pytest.approx(500)
    assert len(large.centres) == 150 == len(large.edges) - 1
    for kwargs, message in (
        ({"r_max": 3.0}, "at most 2.92"),
        ({"n_bins": 0}, "at least one bin"),
        ({"r_max": 0.0}, "r_max"),
    ):
        with pytest.raises(InputError, match=message):
            radial_distribution(small, **kwargs)
    with pytest.raises(InputError, match="do not fit a crystal of 256 atoms"):
        radial_distribution(small).count(np.zeros((2, 255, 3)))


def test_mean_squared_displacement():
    u = np.zeros((2, 4, 3), np.float32)
    u[1, :, 0], u[1, 0, 2] = 1.0, 2.0
    msd = mean_squared_displacement(u)
    assert msd.dtype == np.float64
    np.testing.assert_array_equal(msd, [0.0, 2.0])
