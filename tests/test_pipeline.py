"""Whole estimates of small systems: right, reproducible, honestly billed, and through the command line.

Random tests fix their seeds. Four standard errors raise one false alarm in 16 000 per comparison;
there are about a dozen here.
"""

import json
import math

import numpy as np
import pytest

import freeflow as ff
from freeflow import cli, preparation, work
from freeflow.errors import InputError

LOOSE = {"target_error": 0.004, "max_samples": 5_000}
PUBLISHED_8 = (-25.8652, 3e-4)  # Wirnsberger et al. 2022, flow


@pytest.fixture(scope="module")
def small():
    return ff.load("mw_cubic_8")


@pytest.fixture(scope="module")
def default(small):
    """The plainest estimate, with what it reported on the way."""
    reports = []
    return ff.estimate(small, progress=reports.append, seed=5, **LOOSE), reports


def far(result, value, error):
    return abs(result.beta_f_per_atom - value) / math.hypot(result.beta_f_per_atom_std_error, error)


@pytest.fixture(scope="module")
def variants(small):
    """The same free energy, a different way each time."""
    ways = {
        "harmonic": {"reference": "harmonic"},
        "einstein": {"reference": "einstein"},
        "no bridge": {"bridge": None, "target_error": 0.01},
        "bar": {"estimator": "bar"},
        "float64": {"precision": "float64"},
        "forty stages": {"bridge": 40},
    }
    return {name: ff.estimate(small, seed=7, **{**LOOSE, **way}) for name, way in ways.items()}


WAYS = ["harmonic", "einstein", "no bridge", "bar", "float64", "forty stages"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_meets_the_published_value(variants, way):
    result = variants[way]
    assert result.status == "converged"
    assert result.beta_f_per_atom_std_error <= result.plan.target_error
    assert far(result, *PUBLISHED_8) < 4


def test_the_default_way_meets_the_published_value(default):
    result, _ = default
    assert result.exit_status == 0 and not result.warnings
    assert abs(result.z_score) < 4 and abs(result.z_score) == pytest.approx(far(result, *PUBLISHED_8))


def test_a_larger_crystal_meets_the_published_value():
    result = ff.estimate("mw_cubic_64", target_error=0.003, max_samples=2_000, seed=1)
    assert result.status == "converged" and abs(result.z_score) < 4
    assert result.beta_f_per_atom_std_error < 0.003


def test_a_lennard_jones_crystal_is_between_its_bounds():
    result = ff.estimate("lj_fcc_32", target_error=0.01, max_samples=2_000, seed=2)
    assert result.status == "converged" and math.isnan(result.z_score)
    # The reference bounds the work from above (Gibbs-Bogoliubov), and leaves little of it.
    assert abs(result.components["work"] / 32) < 0.5


@pytest.mark.parametrize("way", WAYS)
def test_components_add_up(variants, way):
    result = variants[way]
    assert math.fsum(result.components.values()) == pytest.approx(result.beta_f, rel=1e-12)
    assert result.components["work"] == result.delta_f
    assert result.components["lattice energy"] == pytest.approx(8 * -12.377985 / result.system.kt, rel=1e-3)
    assert {"lattice energy", "reference", "work", "centre of mass", "thermal wavelength"} == set(result.components)


def test_precisions_agree(variants, default):
    # Stages in float32 and in float64 carry different samples to the same value.
    other = variants["float64"]
    assert other.plan.precision == "float64" and default[0].plan.precision == "float32"
    assert far(other, default[0].beta_f_per_atom, default[0].beta_f_per_atom_std_error) < 4


def test_evaluations_are_billed_by_the_schedule(variants):
    result = variants["forty stages"]
    n = result.n_samples
    assert result.energy_evaluations["sampling"] == n * (40 + 1)
    assert result.energy_evaluations["checks"] >= n  # and the pilots' arrivals
    assert result.energy_evaluations["tuning"] > 0 and result.energy_evaluations["reference"] > 256
    without = variants["no bridge"]
    assert without.energy_evaluations["sampling"] == without.n_samples
    assert without.energy_evaluations["tuning"] == without.energy_evaluations["checks"] == 0
    two_way = variants["bar"]
    assert len(two_way.work.reverse) == len(two_way.work.forward) == two_way.n_samples
    assert two_way.energy_evaluations["checks"] >= 2 * two_way.n_samples
    assert two_way.overlap is not None and variants["harmonic"].overlap is None


def test_the_same_seed_gives_the_same_numbers(monkeypatch, small, default):
    first, _ = default
    monkeypatch.setattr(work, "n_workers", lambda: 3)
    again = ff.estimate(small, seed=5, **LOOSE)
    np.testing.assert_array_equal(again.work.forward, first.work.forward)
    assert again.beta_f == first.beta_f and again.beta_f_std_error == first.beta_f_std_error
    assert again.energy_evaluations == first.energy_evaluations


def test_another_seed_gives_other_numbers(default, variants):
    assert default[0].plan.seed != variants["forty stages"].plan.seed
    assert not np.isin(default[0].work.forward, variants["forty stages"].work.forward).any()


def test_progress_tells_phases_in_order(default):
    _, reports = default
    assert all(isinstance(report, preparation.Progress) for report in reports)
    phases = list(dict.fromkeys(report.phase for report in reports))
    assert phases == ["reference", "tuning", "sampling"]
    assert all(report.fraction is None or 0 <= report.fraction <= 1 for report in reports)
    assert all("\n" not in report.text for report in reports)


def test_wall_times_are_shares_of_the_total(default):
    seconds = default[0].wall_seconds
    assert all(seconds[name] >= 0 for name in ("total", "compile", "reference", "tuning", "sampling"))
    assert seconds["reference"] + seconds["tuning"] + seconds["sampling"] <= seconds["total"] + 1e-6


def test_bar_needs_a_bridge(small):
    with pytest.raises(InputError, match="bar needs samples of the target"):
        ff.estimate(small, estimator="bar", bridge=None)


@pytest.mark.parametrize("change", [{"sead": 1}, {"target_error": 0.0}, {"max_samples": 1}, {"reference": "debye"}])
def test_impossible_changes_are_refused(small, change):
    with pytest.raises(InputError):
        ff.estimate(small, **change)


CONTRACT = {
    "version", "system", "n_atoms", "quantity", "beta_f", "beta_f_std_error", "beta_f_per_atom",
    "beta_f_per_atom_std_error", "free_energy", "estimator", "n_samples", "ess_fraction", "pareto_k", "overlap",
    "energy_evaluations", "wall_seconds", "status", "warnings", "published", "provenance",
}  # fmt: skip


def test_the_command_line_writes_the_contract(capsys, tmp_path, monkeypatch, default):
    monkeypatch.setattr(preparation, "enable_compilation_cache", lambda folder: None)  # keep the tests' own
    path = tmp_path / "out.json"
    arguments = ["estimate", "mw_cubic_8", "--target-error", "0.004", "--max-samples", "5000", "--seed", "5"]
    status = cli.main([*arguments, "--json", str(path), "--quiet"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "") and out.endswith(" converged\n") and out.count("\n") == 1
    values = json.loads(path.read_text())
    assert set(values) >= CONTRACT
    assert values["version"] == 1 and values["system"] == "mw_cubic_8" and values["n_atoms"] == 8
    assert values["quantity"] == "helmholtz_free_energy" and values["status"] == "converged"
    # The library gives the same numbers, bit for bit.
    result = default[0]
    assert values["beta_f"] == result.beta_f and values["beta_f_std_error"] == result.beta_f_std_error
    assert values["beta_f_per_atom"] == values["beta_f"] / 8
    assert values["free_energy"]["unit"] == "kcal/mol"
    assert values["free_energy"]["value"] == pytest.approx(values["beta_f"] * 0.0019872067 * 200)
    assert values["energy_evaluations"] == sum(result.energy_evaluations.values())
    assert set(values["wall_seconds"]) == {"total", "compile", "reference", "sampling"}
    assert set(values["published"]) >= {"beta_f_per_atom", "std_error", "z_score"}
    assert set(values["provenance"]) >= {"freeflow", "jax", "device", "seed", "config"}
    config = values["provenance"]["config"]
    assert values["provenance"]["seed"] == config["estimate"]["seed"] == 5
    # What stands in the provenance is a system again, and repeats the run.
    again = ff.load(config)
    assert again.plan == result.plan and again.n_atoms == 8
