"""The suite's table and the conventional baseline that it compares with."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import calibration
from freeflow.estimators import record

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def frenkel_ladd(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "frenkel_ladd"))
    import frenkel_ladd

    return frenkel_ladd


def test_table_of_figures():
    from benchmarks.__main__ import table
    from benchmarks.suite import Figure

    lines = table(
        [
            Figure("a / b", "this", 3.14159, 2.0, 4.0, {"a": 31415.9, "b": 1e-4}),
            Figure("large / small", "that", 1.05, None, 1.1, {}, limit=1.3),
        ]
    ).splitlines()
    assert lines[2] == "| a / b | this | 3.14 | 2 | 4 | a 31416, b 0.0001 |"
    assert lines[3] == "| large / small | that | 1.05 | at most 1.3 | 1.1 |  |"


def test_unknown_measure_is_an_error(monkeypatch, capsys):
    from benchmarks import __main__ as suite

    monkeypatch.setattr(sys, "argv", ["benchmarks", "kernel"])
    assert suite.main() == 2
    assert "kernel" in capsys.readouterr().err


def test_mbar_of_correlated_series_knows_its_error(frenkel_ladd):
    """Two harmonic ends whose difference is known, chains that remember: 40 replicas, one false alarm in 1e6."""
    states = np.linspace(0, 1, frenkel_ladd.N_STATES)
    stiffness, memory, dimension = 2.0, 0.8, 12
    rng = np.random.default_rng(5)
    scores = []
    for _ in range(40):
        shape = (600, frenkel_ladd.N_STATES, frenkel_ladd.CHAINS, dimension)
        noise = rng.standard_normal(shape)
        x = np.empty(shape)
        x[0] = noise[0]
        for t in range(1, len(x)):
            x[t] = memory * x[t - 1] + math.sqrt(1 - memory**2) * noise[t]
        x /= np.sqrt(1 - states + states * stiffness)[:, None, None]
        einstein = 0.5 * (x**2).sum(axis=3).reshape(600, -1)
        value, error, inefficiency = frenkel_ladd.combine([(einstein, stiffness * einstein)], states)
        scores.append((value - 0.5 * dimension * math.log(stiffness)) / error)
    assert np.all(inefficiency > 2)  # squares of a memory of 0.8: 1 + 2 * 0.64 / 0.36 = 4.6
    assert abs(np.mean(scores)) < 4.9 / math.sqrt(40)
    assert 0.5 < np.std(scores) < 1.6


@pytest.mark.slow
def test_frenkel_ladd_agrees_with_an_estimate(frenkel_ladd):
    import freeflow as ff

    system = ff.load(
        {
            "name": "small",
            "units": "lj",
            "temperature": 1.0,
            "potential": {"kind": "lennard_jones", "cutoff": 1.4},
            "crystal": {"lattice": "fcc", "repeats": [2, 2, 2], "number_density": 1.28},
        }
    )
    answer = frenkel_ladd.frenkel_ladd(system, 5e-3, tell=lambda _: None)
    exact = ff.estimate(system, target_error=1e-3)
    assert answer.converged
    apart = answer.beta_f_per_atom - exact.beta_f_per_atom
    assert abs(apart) < 4.9 * math.hypot(answer.std_error, exact.beta_f_per_atom_std_error)


def test_frenkel_ladd_refuses_nearest_images(frenkel_ladd, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["frenkel_ladd.py", "mw_cubic_8"])
    assert frenkel_ladd.main() == 2
    assert "nearest images" in capsys.readouterr().err


# ------------------------------------------------------------------------------ calibration


def replicas(z, error=1.0, reliable=True):
    known = {"reached": True, "n_samples": 10, "evaluations": 100, "cpu_seconds": 0.5, "reliable": reliable}
    return [{"seed": k, "value": 5.0 + error * x, "std_error": error, **known} for k, x in enumerate(z)]


def test_figures_of_replicas():
    some = [*replicas([0.5, -0.5, 1.5, -2.5]), *replicas([9.0], reliable=False)]
    found = calibration.figures_of("fep", some, calibration.Known(5.0, 0.0, ""))
    assert (found["replicas"], found["unreliable"]) == (5, 1)
    assert (found["within_1"], found["within_2"]) == (0.5, 0.75)
    assert (found["all_within_1"], found["all_within_2"]) == (0.4, 0.6)
    assert found["mean_z"] == pytest.approx(-0.25)
    assert found["rms_z"] == pytest.approx(1.5)
    assert found["mean_z_std_error"] == pytest.approx(1.5 / 2)


def test_the_known_value_has_an_error_too():
    some, known = replicas([1.0] * 100), calibration.Known(5.0, 0.75, "")
    found = calibration.figures_of("fep", some, known)
    assert found["mean_z"] == pytest.approx(1 / 1.25)
    # Its error is that of all replicas alike, and does not average out.
    assert found["mean_z_std_error"] == pytest.approx(math.hypot(0.08, 0.6))


def test_undercoverage_is_told_from_chance():
    rng = np.random.default_rng(0)
    known = calibration.Known(5.0, 0.0, "")
    for scale, wanted in ((1.0, False), (0.7, False), (1.5, True)):
        found = calibration.figures_of("fep", replicas(scale * rng.standard_normal(400)), known)
        assert calibration.undercovers(found) is wanted


def test_the_jackknife_leaves_out_one_sample_at_a_time():
    w = np.random.default_rng(3).normal(0.5, 1.0, 6)
    without = [-np.log(np.mean(np.exp(-np.delete(w, k)))) for k in range(6)]
    value, error = calibration.jackknife(record(w))
    assert value == pytest.approx(-6 * np.log(np.mean(np.exp(-w))) - 5 * np.mean(without))
    assert error == pytest.approx(np.sqrt(5 * np.var(without)))


def test_a_line_cut_off_does_not_count_and_is_run_again(tmp_path):
    file = tmp_path / "fep.jsonl"
    for replica in replicas([0.0, 1.0, 2.0]):
        calibration.note(file, {**replica, "seed": replica["seed"] + calibration.FIRST_SEED})
    assert calibration._missing(file, 5) == [calibration.FIRST_SEED + 3, calibration.FIRST_SEED + 4]
    file.write_text(file.read_text()[:-20])
    assert calibration._missing(file, 3) == [calibration.FIRST_SEED + 2]
    calibration.note(file, {"seed": calibration.FIRST_SEED + 2})
    assert calibration._missing(file, 3) == []


def test_pooled_values():
    value, error, chi2 = calibration.pooled([(1.0, 0.1), (2.0, 0.2)])
    assert value == pytest.approx(1.2) and error == pytest.approx(0.1 / math.sqrt(1.25))
    assert chi2 == pytest.approx((0.2 / 0.1) ** 2 + (0.8 / 0.2) ** 2)


def test_no_such_family(capsys):
    assert calibration.main(["lbra"]) == 2
    assert "lbra" in capsys.readouterr().err


def test_the_page_shows_the_figures_that_are_kept():
    found = json.loads((calibration.RESULTS / "calibration.json").read_text())
    page = (ROOT / "docs" / "calibration.md").read_text()
    kept = page.split(calibration.BEGIN)[1].split(calibration.END)[0]
    assert kept.strip() == calibration.tables(found).strip()
    assert {figures["family"] for figures in found["families"]} <= set(calibration.FAMILIES)
    for figures in found["families"]:  # what undercovers is said to do so
        assert calibration.undercovers(figures) == (f"`{figures['family']}` undercovers" in page)


def test_tables_go_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{calibration.BEGIN}\nold\n{calibration.END}\nafter\n")
    calibration.put("new\n", page)
    assert page.read_text() == f"before\n{calibration.BEGIN}\n\nnew\n\n{calibration.END}\nafter\n"
    calibration.put("alone\n", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == "alone\n"
