"""Two phases against each other: differences, their correlated errors, and where they cross."""

import json
from pathlib import Path

import numpy as np
import pytest

import freeflow as ff
from freeflow import phases
from freeflow.config import load, series_of
from freeflow.errors import InputError
from freeflow.phases import PhaseComparison
from freeflow.thermodynamics import SeriesResult, StateResult

T = np.array([100.0, 150.0, 200.0, 250.0])
N = 8


def made_up(values, errors, seed, status="converged", shared=True, slopes=None):
    """A series of these values per atom, with resamples that move together or one by one, and perhaps known slopes."""
    system = load("mw_cubic_8")
    slopes = np.full(len(T), np.nan) if slopes is None else slopes
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((1 if shared else len(T), 2000)) * np.array(errors)[:, None] * N
    states = tuple(
        StateResult(
            temperature=t,
            kt=t * system.units.boltzmann,
            beta_f=value * N,
            beta_f_std_error=error * N,
            energy=-slope * t**2 * system.units.boltzmann * N,  # d(beta F) / dT = -U / kT^2
            energy_std_error=0.0,
            plain_energy=0.0,
            plain_energy_std_error=1.0,
            entropy=0.0,
            entropy_std_error=1.0,
            heat_capacity=0.0,
            heat_capacity_std_error=1.0,
            helmholtz_z=0.0,
            anchors_z=0.0,
            n_anchors=1,
            status=status,
            reasons=() if status == "converged" else ("made up",),
        )
        for t, value, error, slope in zip(
            T, values, errors, np.full(len(T), np.nan) if slopes is None else slopes, strict=True
        )
    )
    return SeriesResult(
        system=system,
        plan=system.plan,
        states=states,
        anchors=((150.0, None),),
        replicas=np.array(values)[:, None] * N + noise,
        energy_evaluations={"sampling": 10},
        wall_seconds={"total": 1.0},
    )


def line(t0, slope):
    return slope * (T - t0)


def test_difference_and_error():
    found = PhaseComparison(a=made_up(line(0, 0.01), [3e-3] * 4, 0), b=made_up(line(0, 0.02), [4e-3] * 4, 1))
    np.testing.assert_allclose(found.difference, 0.01 * T, atol=1e-12)
    np.testing.assert_allclose(found.std_error, 5e-3)
    assert found.crossings == ()
    assert found.stable(0) == "mw_cubic_8" and "at every temperature" in found.verdict


def test_crossing_with_its_error():
    """Delta = 1e-3 (T - 180): the error of T is that of Delta over the slope, 3e-3 / 1e-3 = 3 K."""
    found = PhaseComparison(a=made_up(0 * T, [1e-9] * 4, 0), b=made_up(line(180.0, 1e-3), [3e-3] * 4, 1))
    (crossing,) = found.crossings
    assert crossing.temperature == pytest.approx(180.0)
    assert crossing.std_error == pytest.approx(3.0, rel=0.1)
    assert crossing.below == found.b.system.name
    assert found.exit_status == 0 and "180(3) K" in found.verdict


def test_curved_differences_cross_where_their_slopes_say():
    """A cubic is found as it is; a straight line between 150 and 200 K would put its zero at 157.5 K, not at 165."""
    root, curve = 165.0, lambda t: (t - 165.0) * (1e-3 + 2e-5 * (t - 165.0))
    slopes = 1e-3 + 4e-5 * (T - root)
    found = PhaseComparison(
        a=made_up(0 * T, [1e-9] * 4, 0, slopes=0 * T), b=made_up(curve(T), [1e-4] * 4, 1, slopes=slopes)
    )
    (crossing,) = found.crossings
    assert crossing.temperature == pytest.approx(root, abs=1e-6)
    assert crossing.std_error == pytest.approx(1e-4 / 1e-3, rel=0.15)


def under_pressure(slope, at, errors, seed):
    """A grid of two temperatures and four pressures, with beta G = slope (p - at(T)) per atom and made-up resamples."""
    system = load({**load("mw_cubic_64").config, "published": None, "pressure": 0.0})
    rng, n, states = np.random.default_rng(seed), system.n_atoms, []
    for p in PRESSURES:
        for t in T[:2]:
            zeros = dict.fromkeys(
                ("energy", "plain_energy", "entropy", "heat_capacity", "helmholtz_z", "anchors_z"), 0.0
            )
            ones = {f"{name}_std_error": 1.0 for name in ("energy", "plain_energy", "entropy", "heat_capacity")}
            states.append(
                StateResult(
                    temperature=t,
                    pressure=p,
                    kt=t * system.units.boltzmann,
                    beta_f=slope * (p - at[t]) * n,
                    beta_f_std_error=errors * n,
                    **zeros,
                    **ones,
                    n_anchors=1,
                    status="converged",
                    reasons=(),
                )
            )
    noise = rng.standard_normal((1, 2000)) * errors * n
    return SeriesResult(
        system=system,
        plan=system.plan,
        states=tuple(states),
        anchors=((100.0, 0.0),),
        replicas=np.array([state.beta_f for state in states])[:, None] + noise,
        energy_evaluations={"sampling": 10},
        wall_seconds={"total": 1.0},
    )


PRESSURES = (0.0, 1000.0, 2000.0, 4000.0)


def test_coexistence_pressures_with_their_errors():
    """Delta = 1e-4 (p - p0) crosses zero at p0, one for every temperature; its error is 3e-3 / 1e-4 = 30 atm."""
    a = under_pressure(0.0, dict.fromkeys(T, 0.0), 1e-9, 0)
    found = PhaseComparison(a=a, b=under_pressure(1e-4, {100.0: 1370.0, 150.0: 2900.0}, 3e-3, 1))
    assert [crossing.along for crossing in found.crossings] == ["pressure"] * 2
    assert [crossing.temperature for crossing in found.crossings] == [100.0, 150.0]
    assert [crossing.pressure for crossing in found.crossings] == pytest.approx([1370.0, 2900.0])
    assert [crossing.std_error for crossing in found.crossings] == pytest.approx([30.0, 30.0], rel=0.1)
    assert {crossing.below for crossing in found.crossings} == {found.b.system.name}
    assert "1370(30) atm at 100 K, 2900(30) atm at 150 K" in found.verdict
    beyond = PhaseComparison(a=a, b=under_pressure(1e-4, {100.0: 1370.0, 150.0: 5000.0}, 3e-3, 1))
    assert [crossing.temperature for crossing in beyond.crossings] == [100.0]


def test_errors_of_neighbours_matter():
    """If the two ends of the segment move one by one, the crossing is known better than if they move together."""
    one, other = (
        PhaseComparison(a=made_up(0 * T, [1e-9] * 4, 0), b=made_up(line(175.0, 1e-3), [3e-3] * 4, 1, shared=shared))
        .crossings[0]
        .std_error
        for shared in (True, False)
    )
    assert other == pytest.approx(one / np.sqrt(2), rel=0.15)


def test_noise_is_no_crossing():
    found = PhaseComparison(a=made_up(0 * T, [1e-9] * 4, 0), b=made_up(line(180.0, 1e-5), [3e-3] * 4, 1))
    assert found.crossings == () and "Not resolved" in found.verdict
    assert found.stable(1) is None


def test_the_worse_phase_decides():
    found = PhaseComparison(a=made_up(0 * T, [1e-3] * 4, 0, "unreliable"), b=made_up(0 * T, [1e-3] * 4, 1))
    assert found.status == "unreliable" and found.exit_status == 3 and "made up" in found.verdict


def test_numbers_for_machines(tmp_path):
    found = PhaseComparison(a=made_up(0 * T, [1e-9] * 4, 0), b=made_up(line(180.0, 1e-3), [3e-3] * 4, 1))
    found.to_json(tmp_path / "p.json")
    values = json.loads((tmp_path / "p.json").read_text())
    assert values["version"] == 1 and values["crossing"]["temperature"] == pytest.approx(180.0)
    assert len(values["series"]) == 4 and values["details"][0]["series"][0]["temperature"] == 100.0
    found.to_csv(tmp_path / "p.csv")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0].startswith("temperature [K],delta_beta_f_per_atom [kT]") and len(lines) == 5
    found.write_plot(tmp_path / "p.svg")
    assert "crossing at" in (tmp_path / "p.svg").read_text() or (tmp_path / "p.svg").stat().st_size > 5000
    assert "180(3) K" in str(found)


@pytest.mark.slow
def test_a_phase_against_itself_is_zero():
    """Other random numbers, one crystal: zero within four standard errors, one false alarm in 10^4 a temperature."""
    system = load("mw_cubic_8")
    found = ff.compare_phases(system, system, (190.0, 210.0), target_error=1e-2)
    assert found.status == "converged"
    assert (np.abs(found.difference) < 4 * found.std_error).all()
    assert (found.difference != 0).all()


def test_phases_of_different_substances_are_refused():
    other = load({**load("mw_cubic_8").config, "potential": {**load("mw_cubic_8").config["potential"], "lambda": 24.0}})
    with pytest.raises(InputError, match="potential"):
        phases.compare_phases(load("mw_cubic_8"), other)
    with pytest.raises(InputError, match="temperature"):
        phases.compare_phases(load("mw_cubic_8"), load({**load("mw_cubic_8").config, "temperature": [100.0, 200.0]}))


@pytest.mark.slow
def test_silicon_changes_from_diamond_to_beta_tin():
    """The example at its coexistence; beta-tin's cell distorts either way, unknown to the fitted reference."""
    folder = Path(__file__).parents[1] / "examples" / "silicon"
    a, b = (
        series_of(load(folder / f"{name}.yaml").system, (300.0,), (1.3e5, 1.6e5)) for name in ("diamond", "beta_tin")
    )
    found = phases.compare_phases(a, b, target_error=4e-3, max_samples=256)
    assert found.status == "converged"
    (crossing,) = found.crossings
    assert crossing.below == "silicon_diamond"
    assert crossing.std_error < 200.0  # bar
    assert abs(crossing.value - 141_892) < 4.5 * np.hypot(crossing.std_error, 16)  # of five states, at 1e-3
    # Without the wider reference one state of beta-tin took ten million.
    assert sum(found.b.energy_evaluations.values()) < 8_000_000
