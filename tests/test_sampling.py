"""Built-in sampling: Monte Carlo and weighted samples have the target's averages, and are honest about what they are.

Random tests fix their seeds. Four standard errors raise one false alarm in 16 000 per comparison; there are
about ten here.
"""

import csv
import json
import math

import numpy as np
import pytest

import freeflow as ff
from freeflow import sampling, trajectories
from freeflow.errors import InputError, LostCrystalError
from freeflow.estimators import chain_correlation
from freeflow.observables import mean_squared_displacement, time_average, weighted_average

N = 1500


@pytest.fixture(scope="module")
def small():
    return ff.load("mw_cubic_8")


@pytest.fixture(scope="module")
def drawn(small, tmp_path_factory):
    """Samples of each kind, with their files and reports."""
    folder, found = tmp_path_factory.mktemp("samples"), {}
    for method, name in (("mcmc", "a.extxyz"), ("weighted", "b.xtc"), ("resampled", "c.h5")):
        reports = []
        found[method] = (
            sampling.sample(small, N, folder / name, progress=reports.append, method=method, seed=3),
            reports,
        )
    return found


def averages(result):
    """Mean energy per atom [kT] and mean squared displacement, with error bars."""
    energy = result.energies * float(result.system.state.beta) / result.system.n_atoms
    values = np.stack([energy, mean_squared_displacement(result.displacements.astype(float))], axis=1)
    if result.work is not None:
        return weighted_average(values, -result.work)
    return time_average(values, len(values) / result.effective_samples)


@pytest.mark.parametrize("other", ["weighted", "resampled"])
def test_monte_carlo_and_model_have_the_same_averages(drawn, other):
    a, b = averages(drawn["mcmc"][0]), averages(drawn[other][0])
    assert np.all(np.abs(a.mean - b.mean) < 4 * np.hypot(a.std_error, b.std_error))
    # Not for want of precision: the weights matter, and so does temperature.
    assert np.all(b.std_error < 0.05 * b.mean.__abs__())


@pytest.mark.slow
def test_monte_carlo_forgets_its_reference(small, drawn):
    """From an Einstein crystal, which is far from the target, come the same averages."""
    other = averages(sampling.sample(small, N, reference="einstein", seed=9))
    usual = averages(drawn["mcmc"][0])
    assert np.all(np.abs(other.mean - usual.mean) < 4 * np.hypot(other.std_error, usual.std_error))


def test_monte_carlo_knows_the_virial_of_a_harmonic_solid(small):
    """At 2 K the crystal is harmonic: 3 (N - 1) / 2 kT of energy above the lattice, with a variance of as much."""
    cold = ff.load({**small.config, "name": "cold", "temperature": 2.0, "published": None})
    result = sampling.sample(cold, N, seed=1)
    above = result.energies * float(cold.state.beta) - cold.constants["lattice energy"]
    expected = 1.5 * (cold.n_atoms - 1)
    error = math.sqrt(expected / result.effective_samples)
    assert abs(above.mean() - expected) < 4 * error + 0.01 * expected  # of anharmonicity at 2 K at most
    assert above.var() == pytest.approx(expected, rel=0.25)


def test_chains_say_how_long_they_remember(drawn):
    result, reports = drawn["mcmc"]
    facts = result.facts
    assert facts["steps_between_samples"] >= facts["inefficiency_of_energy_in_steps"]
    assert facts["steps_before_first_sample"] > facts["equilibration_steps"]
    assert 1 <= facts["inefficiency_of_samples"] < 2
    assert 0.7 < facts["acceptance"] < 0.95
    assert result.effective_samples == pytest.approx(N / facts["inefficiency_of_samples"])
    rounds = N // facts["chains"]
    # Chain after chain: within a chain neighbours may be alike, across chains they are independent.
    _, g = chain_correlation(result.energies[: rounds * facts["chains"]].reshape(facts["chains"], -1).T)
    assert g < 2
    assert {"tuning", "annealing", "equilibration", "sampling", "writing"} <= {report.phase for report in reports}


def test_frames_come_chain_after_chain(small, monkeypatch):
    """One step apart, neighbours in the file are alike, unless they belong to different chains."""
    monkeypatch.setattr(sampling, "_APART", 0.0)
    result = sampling.sample(small, 64 * 16, seed=1)
    chains = result.facts["chains"]
    energy = result.energies.reshape(chains, -1) - result.energies.mean()
    along, across = (energy[:, 1:] * energy[:, :-1]).mean(), (energy[1:, 0] * energy[:-1, -1]).mean()
    assert result.facts["steps_between_samples"] == 1
    assert along > 0.3 * energy.var()
    assert abs(across) < 5 * energy.var() / np.sqrt(chains)


def test_files_hold_what_was_drawn(small, drawn):
    for result, _ in drawn.values():
        assert result.status == "complete" and result.exit_status == 0
        series = trajectories.frame_series(result.files[0], small)
        assert series.n_frames == N == len(result.displacements)
        rounding = trajectories.energy_precision(small, result.displacements.astype(float), series.resolution)
        np.testing.assert_allclose(series.energies, result.energies, atol=max(rounding, 1e-4))
        if result.method == "mcmc":
            assert series.energy_comparison.agrees
        with result.files[-1].open() as file:
            rows = list(csv.DictReader(file))
        energies = [float(row["energy [kcal/mol]"]) for row in rows]
        np.testing.assert_allclose(energies, result.energies, rtol=1e-9)
        if result.method == "weighted":
            weights = np.array([float(row["weight"]) for row in rows])
            np.testing.assert_allclose(weights, np.exp(-result.work) / np.exp(-result.work).sum(), rtol=1e-9)
    assert any(file.name == "b.topology.pdb" for file in drawn["weighted"][0].files)


def test_resampling_draws_by_the_weights(drawn):
    result, _ = drawn["resampled"]
    assert result.work is None
    assert 0.5 * N < result.facts["distinct"] < N
    _, repeats = np.unique(result.displacements.reshape(N, -1), axis=0, return_counts=True)
    assert len(repeats) == result.facts["distinct"]
    assert repeats.max() > 1


def test_a_seed_makes_the_samples(small):
    few = [sampling.sample(small, 70, seed=seed).displacements for seed in (5, 5, 6)]
    np.testing.assert_array_equal(few[0], few[1])
    assert not np.allclose(few[0], few[2])


def test_reports_are_for_people_and_machines(drawn):
    result, _ = drawn["mcmc"]
    said = json.loads(result.json_text())
    assert said["n_samples"] == N and said["method"] == "mcmc" and said["status"] == "complete"
    assert said["files"] == [str(file) for file in result.files]
    text = str(result)
    assert "equilibration steps" in text and str(result.files[0]) in text
    assert result.summary.startswith(f"{N} samples, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "at least one is needed"),
        ({"n_samples": 10, "method": "md"}, "no method 'md'; use one of mcmc, weighted, resampled"),
        ({"n_samples": 10**10}, "do not fit in memory"),
        ({"n_samples": 10, "output": "a.doc"}, "a.doc"),
        ({"n_samples": 10, "output": "/no/such/folder/a.xtc"}, "/no/such/folder"),
    ],
)
def test_bad_wishes_are_refused_before_any_work(small, arguments, message):
    with pytest.raises(InputError, match=message):
        sampling.sample(small, **arguments)


def test_a_crystal_that_melts_is_no_sample(small):
    """Far above its melting point the small crystal falls apart, and this is said."""
    hot = ff.load({**small.config, "name": "hot", "temperature": 3000.0, "published": None})
    try:
        result = sampling.sample(hot, 64)
    except LostCrystalError as error:
        assert "left its site" in str(error)
        assert error.exit_status == 3
    else:
        assert result.status == "unreliable" and result.exit_status == 3
        assert any("left its site" in warning for warning in result.warnings)


def test_ctrl_c_keeps_complete_rounds(small, monkeypatch):
    def interrupt(report):
        if report.phase == "sampling" and report.fraction > 0.2:
            raise KeyboardInterrupt

    result = sampling.sample(small, N, progress=interrupt)
    assert result.status == "interrupted" and result.exit_status == 130
    assert 0 < len(result.displacements) < N
    assert np.isfinite(result.energies).all()


def test_chain_correlation_of_known_chains():
    """AR(1) chains of coefficient 0.8: C(t) = 0.8^t, g = 9. The tolerance is five times the scatter over seeds."""
    rng = np.random.default_rng(4)
    noise, x = rng.normal(size=(400, 200)), np.zeros((400, 200))
    x[0] = rng.normal(size=200)
    for t in range(1, 400):
        x[t] = 0.8 * x[t - 1] + 0.6 * noise[t]
    correlation, g = chain_correlation(x)
    np.testing.assert_allclose(correlation[:6], 0.8 ** np.arange(6), atol=0.03)
    assert g == pytest.approx(9, rel=0.15)
    assert chain_correlation(np.ones((5, 3)))[1] == 1
