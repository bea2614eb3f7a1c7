"""Series of temperatures: one set of samples at many, derivatives, and the checks that hold them together."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import freeflow as ff
from freeflow import carrying, cli, pipeline, references, series
from freeflow.bridge import Pilot
from freeflow.config import crystal_only, load
from freeflow.crystals import at_temperature
from freeflow.errors import InputError
from freeflow.geometry import neighbour_table
from freeflow.observers import observed_crystal
from freeflow.potentials import force_constants
from freeflow.preparation import Clock
from freeflow.types import StateSeries, double_precision

TEMPERATURES = (150.0, 175.0, 200.0, 225.0)
TARGET = 4e-3


@pytest.fixture(scope="module")
def ice():
    """Eight molecules of cubic ice, whose published value at 200 K is -25.8652(3)."""
    return StateSeries(at_temperature(load("mw_cubic_8"), TEMPERATURES[0]), TEMPERATURES)


@pytest.fixture(scope="module")
def result(ice):
    return ff.estimate_series(ice, target_error=TARGET)


def test_every_temperature_reaches_the_target(result):
    assert result.status == "converged" and result.exit_status == 0
    assert [state.temperature for state in result.states] == list(TEMPERATURES)
    assert all(state.beta_f_std_error <= TARGET * 8 for state in result.states)
    assert 1 <= len(result.anchors) < len(TEMPERATURES)


def test_published_value(result):
    state = result.states[2]
    z = (state.beta_f / 8 + 25.8652) / math.hypot(state.beta_f_std_error / 8, 3e-4)
    assert abs(z) < 4.5  # one false alarm in 10^5


def test_a_temperature_that_is_no_anchor_agrees_with_an_estimate_of_its_own(ice, result):
    k = next(k for k, t in enumerate(TEMPERATURES) if t not in result.anchors)
    alone = ff.estimate(at_temperature(ice.system, TEMPERATURES[k]), target_error=TARGET, seed=7)
    state = result.states[k]
    assert abs(alone.beta_f - state.beta_f) < 4.5 * math.hypot(alone.beta_f_std_error, state.beta_f_std_error)


def test_entropy_is_minus_the_slope_of_the_free_energy(result):
    """Finite differences of the table, whose steps cost an error of third order, against S from U and F."""
    kt = np.array([state.kt for state in result.states])
    f = np.array([state.beta_f for state in result.states]) * kt
    entropy = np.array([state.entropy for state in result.states])  # [k], and kT is the temperature
    slope = -(f[2:] - f[:-2]) / (kt[2:] - kt[:-2])
    np.testing.assert_allclose(slope, entropy[1:-1], atol=0.15)  # of about -36; errors of F enter with 0.04


def test_derivative_and_average_of_the_energy_agree(result):
    """Gibbs and Helmholtz; and the derivative is the sharper one."""
    assert all(abs(state.helmholtz_z) < 4 for state in result.states)
    assert all(state.energy_std_error < state.plain_energy_std_error for state in result.states)


def test_a_lost_log_det_is_caught(ice, monkeypatch):
    """Without 3 (N - 1) ln s the derivative of beta F is 3 (N - 1) / (2 beta) off the mean energy."""
    carried = carrying.FixedCell.carried

    def faulty(carrier, temperature, *rest, **how):
        found = carried(carrier, temperature, *rest, **how)
        return found._replace(work=found.work + 1.5 * 7 * math.log(temperature / carrier.system.temperature))

    monkeypatch.setattr(carrying.FixedCell, "carried", faulty)
    two = StateSeries(ice.system, TEMPERATURES[:2])
    found = ff.estimate_series(two, target_error=0.02)
    assert found.status == "unreliable"
    assert any("off the derivative" in reason for state in found.states for reason in state.reasons)


def test_close_to_zero_every_crystal_is_harmonic():
    """Known answer: beta F of the harmonic crystal at every temperature, 3/2 (N - 1) k of heat capacity."""
    system = load("mw_cubic_64")
    n, cold = system.n_atoms, (0.5, 1.0, 2.0)  # K
    found = ff.estimate_series(StateSeries(at_temperature(system, cold[0]), cold), target_error=1e-3)
    table = neighbour_table(system.crystal, 1.0001 * system.potential.cutoff)
    columns = force_constants(system.potential, table, system.crystal.site_of[0])
    recipe = references.gaussian_crystal(system.crystal)
    for state, t in zip(found.states, cold, strict=True):
        at = at_temperature(system, t)
        blocks = references.harmonic_blocks(system.crystal, columns, float(at.state.beta))
        with double_precision():
            gaussian = references.gaussian_from_blocks(system.crystal, blocks)
            exact = -float(recipe.ensemble(gaussian).log_partition(at.state)) - at.log_prefactor
        # The first anharmonic term is of order T: 0.07 kT per atom at 200 K.
        assert abs(state.beta_f - exact) / n < 1e-3
        assert state.heat_capacity == pytest.approx(1.5 * (n - 1), rel=4e-3)
        lattice = at.constants["lattice energy"] * at.kt
        assert state.energy - lattice == pytest.approx(1.5 * (n - 1) * at.kt, rel=4e-3)


def test_resamples_know_that_neighbours_share_samples(result):
    """Temperatures of one anchor move together, far more than their error bars would let them by chance."""
    correlation = np.corrcoef(result.replicas)
    assert correlation[0, 1] > 0.5
    spread = result.replicas.std(axis=1, ddof=1)
    errors = np.array([state.beta_f_std_error for state in result.states])
    np.testing.assert_allclose(spread, errors, rtol=0.4)  # 200 resamples: 5 % each, and the weights' own noise


# ------------------------------------------------------------------------------ from files and the command line


def test_files_give_series():
    values = {**load("mw_cubic_8").config, "temperature": [250, 150.0, 200, 200.0]}
    found = load(values)
    assert isinstance(found, StateSeries)
    assert found.temperatures == (150.0, 200.0, 250.0)
    assert found.system.temperature == 150.0 and float(found.system.state.beta) * found.system.kt == pytest.approx(1)
    assert load({**values, "temperature": "100:200:25"}).temperatures == (100.0, 125.0, 150.0, 175.0, 200.0)
    again = load(dict(found.config))
    assert again.temperatures == found.temperatures


@pytest.mark.parametrize(
    ("temperature", "complaint"),
    [
        ("100:200:0", "temperature: expected START:STOP:STEP"),
        ("200:100:10", "temperature: '200:100:10' holds no temperatures"),
        ("a:b:c", "temperature: expected START:STOP:STEP"),
        ("1:1e9:1", "temperature: '1:1e9:1' holds no temperatures above 0, or more than 1000"),
        ([], "temperature"),
        ([100.0, -1.0], "temperature.1: must be greater than 0"),
        ([100.0, "hot"], "temperature.1: expected a number"),
    ],
)
def test_impossible_series_are_refused(temperature, complaint):
    with pytest.raises(InputError) as error:
        load({**load("mw_cubic_8").config, "temperature": temperature})
    assert complaint in str(error.value).replace("[1]", ".1")


# ------------------------------------------------------------------------------ where the cell moves

UNDER_PRESSURE = {
    "name": "lj_under_pressure",
    "units": "lj",
    "temperature": [0.8, 1.0],
    "pressure": "16:24:4",
    "potential": {"kind": "lennard_jones", "cutoff": 1.5},
    "crystal": {"lattice": "fcc", "repeats": [2, 2, 2], "number_density": 1.15},
    "estimate": {"target_error": 5e-3},
}


@pytest.fixture(scope="module")
def grid():
    return ff.estimate_series(UNDER_PRESSURE)


def test_states_under_pressure_share_an_anchor(grid):
    assert grid.status == "converged" and grid.quantity == "gibbs_free_energy"
    states = [(s.temperature, s.pressure) for s in grid.states]
    assert states == [(t, p) for p in (16.0, 20.0, 24.0) for t in (0.8, 1.0)]
    assert len(grid.anchors) < len(states)
    assert all(abs(s.helmholtz_z) < 4 and abs(s.volume_z) < 4 for s in grid.states)
    assert all(s.volume_std_error < s.plain_volume_std_error for s in grid.states)


def test_gibbs_free_energies_agree_with_estimates_of_their_own(grid):
    corner = grid.states[0]
    assert (corner.temperature, corner.pressure) not in grid.anchors
    alone = ff.estimate({**UNDER_PRESSURE, "temperature": 0.8, "pressure": 16.0}, seed=9)
    assert abs(alone.beta_f - corner.beta_f) < 4.5 * math.hypot(alone.beta_f_std_error, corner.beta_f_std_error)
    volume = alone.cell.volume
    assert abs(volume.mean - corner.volume) < 4.5 * math.hypot(volume.std_error, corner.volume_std_error)


def test_differences_of_the_table_are_its_derivatives(grid):
    """G over pressure against V, by Simpson's rule, which is exact to the fourth order in 20 % of the pressure."""
    g, v = (np.array([getattr(s, name) for s in grid.states[1::2]]) for name in ("beta_f", "volume"))
    assert (g[2] - g[0]) * grid.states[1].kt == pytest.approx(8 / 6 * (v[0] + 4 * v[1] + v[2]), abs=0.15)  # of 220


def test_a_lost_log_det_is_caught_under_pressure(monkeypatch):
    """Without the determinant of the displacements' map the enthalpy is 3 (N - 1) / 2 kT off its mean."""
    springs = carrying.MovingCell._springs
    monkeypatch.setattr(carrying.MovingCell, "_harmonic", lambda self, mean, beta: None)
    lost = lambda self, beta: springs(self, beta)._replace(log_det=np.float64(0.0))  # noqa: E731
    monkeypatch.setattr(carrying.MovingCell, "_springs", lost)
    found = ff.estimate_series({**UNDER_PRESSURE, "pressure": 20.0}, target_error=2e-2)
    assert found.status == "unreliable"
    assert any("off the derivative of beta G" in reason for state in found.states for reason in state.reasons)


@pytest.mark.slow
def test_a_map_to_the_state_itself_changes_nothing():
    system = load({**UNDER_PRESSURE, "temperature": 1.0, "pressure": 20.0, "cell_motion": "triclinic"})
    plan = replace(system.plan, bridge=None, max_samples=128)
    result = pipeline.carried_out(system, plan, lambda _: None, Clock(), observe=observed_crystal)
    moving = carrying.carrier(result)
    here = moving.carried(1.0, 20.0, near=True)
    np.testing.assert_allclose(here.work, result.work.forward, atol=1e-6)
    there = moving.carried(1.0, 21.0)
    assert np.isfinite(there.work).mean() > 0.9
    assert there.volume.mean() < here.volume.mean() - 0.1


@pytest.mark.parametrize(
    ("pressure", "complaint"),
    [
        ("1:2:0", "pressure: expected START:STOP:STEP"),
        ("2:1:1", "pressure: '2:1:1' holds no pressures"),
        ("0:10:5 kbar", "pressure: a number in epsilon/sigma^3 is expected"),
        ([1.0, "high"], "pressure: expected a number, or one with a unit"),
        ([], "pressure: expected 1 to 1000 pressures"),
    ],
)
def test_impossible_pressures_are_refused(pressure, complaint):
    with pytest.raises(InputError) as error:
        load({**UNDER_PRESSURE, "pressure": pressure})
    assert complaint in str(error.value)


def test_ranges_of_pressure_take_units():
    found = load({**load("mw_cubic_64").config, "published": None, "pressure": "0:2:1 kbar"})
    assert found.pressures == pytest.approx((0, 1e8 / 101325, 2e8 / 101325))
    assert load(dict(found.config)).pressures == found.pressures


def test_longest_stretch_of_a_grid():
    """Of a grid of 3 x 4 the middle of what hangs together, across rows."""
    nothing = np.zeros(0)
    done = series.Reach(carrying.Carried(nothing, nothing, nothing), 0.0, 0.5, ())
    table = [[done] for _ in range(12)]
    for k in (0, 2, 3, 6, 7, 10, 11):
        table[k] = []
    assert series._next_anchor(table, 1.0, dict.fromkeys(range(12), 0), (3, 4)) == 7
    assert series._stretches([0, 2, 3, 6, 7, 10, 11], (3, 4)) == [[0], [2, 3, 6, 7, 10, 11]]


def test_an_anchor_of_few_samples_that_is_not_to_be_trusted_is_made_anew(ice, monkeypatch):
    """With the target's own error, that is; one that had this error and is not to be trusted is final."""
    asked, target, nothing = [], 8 * TARGET, np.zeros(0)

    def anchor(system, plan, error, number, report, pilot):
        asked.append(error)
        status = "converged" if error <= target else "unreliable"
        return series.Anchor(SimpleNamespace(status=status, pilot=None), None)

    def reaches(anchor, *_):
        reasons = () if anchor.result.status == "converged" else ("made up",)
        return [series.Reach(carrying.Carried(nothing, nothing, nothing), 0.0, asked[-1], reasons)]

    monkeypatch.setattr(series, "_anchor", anchor)
    monkeypatch.setattr(series, "_reaches", reaches)
    monkeypatch.setattr(series, "_missing", lambda row, target: 1.5 * target)
    rows, answer = (
        [],
        series.SeriesResult(
            system=ice.system,
            plan=ice.system.plan,
            states=(),
            anchors=(),
            replicas=nothing,
            energy_evaluations={},
            wall_seconds={},
        ),
    )
    monkeypatch.setattr(series, "_result", lambda *known: rows.extend(known[4]) or answer)
    ff.estimate_series(StateSeries(ice.system, TEMPERATURES[:1]), target_error=TARGET)
    (row,) = rows
    assert asked == [1.5 * target, target]
    assert [bool(reach.reasons) for reach in row] == [True, False]


def test_anchors_take_the_trial_crossing_of_the_nearest_one(ice):
    pilots = [Pilot(*[np.full(1, float(k))] * 5, 0.0) for k in range(2)]
    near = zip(TEMPERATURES, (pilots[0], None, pilots[1]), strict=False)
    anchors = [
        series.Anchor(SimpleNamespace(system=at_temperature(ice.system, t), pilot=pilot), None) for t, pilot in near
    ]
    assert series._pilot([], ice.system) is None and series._pilot(anchors[1:2], ice.system) is None
    assert series._pilot(anchors, at_temperature(ice.system, 168.0)) is pilots[0]
    assert series._pilot(anchors, at_temperature(ice.system, 225.0)) is pilots[1]


def test_a_series_is_no_single_crystal(ice):
    with pytest.raises(InputError, match="4 temperatures"):
        crystal_only(ice)
    with pytest.raises(InputError, match="fep"):
        ff.estimate_series(ice, estimator="bar")


def test_on_the_command_line(tmp_path, capsys):
    out = [str(tmp_path / name) for name in ("s.json", "s.csv", "s.png")]
    words = ["estimate", "mw_cubic_8", "--temperature", "190,200,210", "--target-error", "1e-2"]
    status = cli.main([*words, "--json", out[0], "--csv", out[1], "--plot", out[2], "--no-cache"])
    text = capsys.readouterr().out
    assert status == 0 and "Converged at 3 temperatures" in text
    with open(out[0], encoding="utf-8") as file:
        values = json.load(file)
    assert values["version"] == 1 and values["status"] == "converged"
    assert [row["temperature"] for row in values["series"]] == [190.0, 200.0, 210.0]
    with open(out[1], encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert len(lines) == 4 and lines[0].startswith("temperature [K],beta_f_per_atom [kT]")
    assert float(lines[2].split(",")[1]) == values["series"][1]["beta_f_per_atom"]
    with open(out[2], "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["estimate", "mw_cubic_8", "--temperature", "hot"], "'hot' is no temperature"),
        (["estimate", "mw_cubic_8", "--temperature", "0"], "'0' is no temperature"),
        (["estimate", "mw_cubic_8", "--temperature", "100,200", "--estimator", "bar"], "--estimator"),
        (["estimate", "mw_cubic_8", "--csv", "x.csv"], "--csv: mw_cubic_8 is no series"),
        (["estimate", "solvation_wca", "--temperature", "3"], "--temperature: solvation_wca is a solution"),
        (["estimate", "solvation_wca", "--pressure", "3"], "--pressure: solvation_wca is a solution"),
        (["estimate", "mw_cubic_64", "--pressure", "1 kbra"], "--pressure: expected a number, or one with a unit"),
        (["estimate", "mw_cubic_8", "--pressure", "1"], "nearest_image_only works in a fixed cell only"),
        (["sample", "mw_cubic_8", "-n", "2", "-o", "x.xtc", "--temperature", "3"], "no such option --temperature"),
        (["compare-phases", "mw_cubic_64", "lj_fcc_256"], "units: mw_cubic_64 and lj_fcc_256 differ"),
        (["compare-phases", "mw_cubic_64", "silicon_diamond_64"], "units"),
    ],
)
def test_bad_command_lines(words, complaint, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error and "\n" not in error
