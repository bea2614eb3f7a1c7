"""The suite's table and the conventional baseline that it compares with."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

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
