"""Differences of two states through the job, the file and the command line.

Random tests fix their seeds. Four standard errors raise one false alarm in 16 000 per comparison; there are about ten.
"""

import json
import math

import numpy as np
import pytest

import freeflow as ff
from freeflow import cli, preparation, solvation
from freeflow.config import revise_difference
from freeflow.difference import METHODS, Answer, DifferenceResult
from freeflow.errors import InputError
from freeflow.solutions import Solution
from freeflow.types import DifferencePlan

BOX = 5.0
SMALL = {
    "name": "small",
    "units": "lj",
    "temperature": 2.0,
    "solution": {
        "box_length": BOX,
        "solvent": {"count": 1, "potential": {"kind": "lennard_jones"}},
        "solute": {"kind": "wca", "sigma": [1.2, 1.5]},
    },
}


@pytest.fixture(scope="module")
def exact():
    """One solvent atom: F = -ln of the integral of exp(-beta WCA) over the box, by quadrature on a fine grid."""
    edges = (np.arange(240) + 0.5) / 240 * BOX / 2
    r2 = sum(np.meshgrid(*(edges**2,) * 3, indexing="ij"))

    def free_energy(radius):
        s6 = (radius**2 / r2) ** 3
        u = np.where(r2 < 2 ** (1 / 3) * radius**2, 4 * (s6 * s6 - s6 + 0.25), 0.0)
        return -math.log(np.mean(np.exp(-u / 2.0)))

    return free_energy(1.5) - free_energy(1.2)


@pytest.fixture(scope="module")
def result():
    methods = ["fep", "bar", "radial", "lfep", "lbar", "bridge", "escort", "mbar"]
    return solvation.estimate_difference(SMALL, methods=methods, target_error=0.02, max_samples=2000, seed=1)


def test_every_method_meets_quadrature(result, exact):
    assert [answer.method for answer in result.answers] == list(METHODS)
    for answer in result.answers:
        assert answer.reliable, answer.method
        assert 0 < answer.std_error < 0.05
        # The grid is good to 1e-3.
        assert abs(answer.delta_f - exact) < 4 * math.hypot(answer.std_error, 1e-3), answer.method


def test_a_map_that_is_exact_has_no_spread(result):
    """The radial map makes one atom's free volume one into the other's: only the soft edge of the solute is left."""
    answers = {answer.method: answer for answer in result.answers}
    assert answers["radial"].std_error < 0.7 * answers["bar"].std_error
    assert answers["radial"].facts["overlap"] > answers["bar"].facts["overlap"]


def test_every_frame_is_estimated_from_once_and_the_other_fold_taught_its_map(result):
    answers = {answer.method: answer for answer in result.answers}
    lbar, plain = answers["lbar"], answers["bar"]
    assert lbar.n_samples == plain.n_samples and answers["lfep"].n_samples == (plain.n_samples[0], 0)
    halves = [plain.n_samples[0] // 2, plain.n_samples[1] // 2]
    for train, stop in zip(lbar.facts["frames_to_train"], lbar.facts["frames_to_stop"], strict=True):
        assert [sum(pair) for pair in zip(train, stop, strict=True)] == halves
    assert "none of which it carried" in str(result)


def test_costs_are_counted(result):
    answers = {answer.method: answer for answer in result.answers}
    assert all(answer.energy_evaluations > 1000 and answer.wall_seconds > 0 for answer in result.answers)
    lbar, plain = answers["lbar"], answers["bar"]
    # The same frames, and the same two energies of each; the fit of either fold looks at each frame of the other once.
    assert lbar.facts["training_evaluations"] == sum(lbar.n_samples)
    assert lbar.energy_evaluations == plain.energy_evaluations + sum(lbar.n_samples)
    assert result.efficiency(plain) == 1
    assert result.best.std_error == min(answer.std_error for answer in result.answers)


def small(name="lbar", **changes):
    """A run of one method from a few frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvation, "_BATCHES", 1)
        return solvation.estimate_difference(SMALL, methods=(name,), max_samples=600, **changes)


def test_no_time_to_train_is_said():
    found = small(map={"kind": "radial", "max_minutes": 1e-6})
    assert found.answers[0].facts["training_steps"] == [0, 0]
    assert any("before the first step" in warning for warning in found.warnings)


def test_text_and_json_say_the_same(result):
    said = json.loads(result.json_text())
    assert said["quantity"] == "free_energy_difference"
    assert said["delta_f"] == result.delta_f and said["delta_f_std_error"] == result.delta_f_std_error
    assert [row["method"] for row in said["methods"]] == [answer.method for answer in result.answers]
    assert said["provenance"]["config"]["solution"]["solvent"]["count"] == 1
    text = str(result)
    assert all(answer.method in text for answer in result.answers)
    assert text.splitlines()[-1].startswith("Converged")


def answer(method="bar", delta_f=1.0, std_error=0.1, reasons=()):
    return Answer(
        method=method,
        delta_f=delta_f,
        std_error=std_error,
        reasons=reasons,
        n_samples=(10, 10),
        energy_evaluations=100,
        wall_seconds=1.0,
    )


@pytest.mark.parametrize(
    ("answers", "status", "exit_status", "best"),
    [
        ([answer(std_error=0.01)], "converged", 0, "bar"),
        ([answer(std_error=0.2)], "target_not_reached", 3, "bar"),
        ([answer(std_error=0.01, reasons=("poor overlap",))], "unreliable", 3, "bar"),
        ([answer(std_error=math.nan)], "unreliable", 3, "bar"),
        ([answer("fep", std_error=1e-3, reasons=("no",)), answer("bridge", std_error=0.04)], "converged", 0, "bridge"),
    ],
)
def test_the_status_is_that_of_the_best_reliable_answer(answers, status, exit_status, best):
    plan = DifferencePlan(target_error=0.05)
    found = DifferenceResult(problem=ff.load(SMALL), plan=plan, answers=tuple(answers), wall_seconds={}, samples={})
    assert (found.status, found.exit_status, found.best.method) == (status, exit_status, best)
    assert json.loads(found.json_text())["status"] == status
    assert str(found)


def test_poor_overlap_is_not_trusted(monkeypatch):
    """A solute that takes a third of the box against hardly any: plain FEP among 16 atoms says that it cannot tell."""
    monkeypatch.setattr(solvation, "_BATCHES", 1)
    hard = {**SMALL, "solution": {**SMALL["solution"], "solvent": {"count": 16}, "solute": {"sigma": [0.5, 2.2]}}}
    found = solvation.estimate_difference(hard, methods=("fep",), max_samples=600)
    assert found.status == "unreliable" and found.exit_status == 3


def test_files_make_solutions(tmp_path):
    found = ff.load("solvation_wca")
    assert isinstance(found, Solution)
    assert found.n_solvent == 125 and found.published.delta_f == 33.4468
    assert found.plan == DifferencePlan()
    two = ff.load({**SMALL, "temperature": [2.0, 2.5]})
    assert two.temperatures == (2.0, 2.5)
    files = {"A": "a.dcd", "B": ["b1.dcd", "b2.dcd"]}
    text = ff.config.dump({**SMALL, "solution": {**SMALL["solution"], "trajectories": files}})
    (tmp_path / "s.yaml").write_text(text)
    where = ff.load(tmp_path / "s.yaml").config["solution"]["trajectories"]
    assert where == {"A": [str(tmp_path / "a.dcd")], "B": [str(tmp_path / "b1.dcd"), str(tmp_path / "b2.dcd")]}
    again = ff.load(ff.load(SMALL).config)
    assert again.config == ff.load(SMALL).config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solvnt": 1}, "solution.solvnt: unknown key; did you mean solvent?"),
        ({"solvent": {"count": 0}}, "solution.solvent.count: must be at least 1, got 0"),
        ({"solute": {"sigma": 1.0}}, r"solution.solute.sigma: expected two numbers, \[A, B\], got 1.0"),
        ({"solute": {"sigma": [1.0, 9.0]}}, "the solute reaches"),
        ({"map": "field"}, "solution.map: unknown key here; it belongs in section estimate"),
        ({"trajectories": {"A": "a.dcd"}}, "solution.trajectories.B: missing"),
        ({"solvent": {"count": 1, "potential": {"cutoff": 4.0}}}, "not between 0 and half the box"),
    ],
)
def test_bad_solutions_are_one_line(change, message):
    with pytest.raises(InputError, match=message) as error:
        ff.load({**SMALL, "solution": {**SMALL["solution"], **change}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"map": "feild"}, "estimate.map.kind: unknown value 'feild'; did you mean field?"),
        ({"map": {"kind": "field", "folds": 1}}, "estimate.map.folds: must be at least 2, got 1"),
        ({"map": {"steps": 3}}, "estimate.map.steps: unknown key"),
        ({"map": 3}, "estimate.map: expected a section with the keys kind, folds, max_minutes, got 3"),
    ],
)
def test_bad_maps_are_one_line(wanted, message):
    with pytest.raises(InputError, match=message) as error:
        ff.load({**SMALL, "estimate": wanted})
    assert "\n" not in str(error.value)


def test_a_map_is_chosen_by_its_name_or_in_full():
    for wanted in ("torus", {"kind": "torus", "folds": 3, "max_minutes": 1}):
        found = ff.load({**SMALL, "estimate": {"map": wanted}})
        assert found.plan.map.kind == "torus"
        assert ff.load(found.config).plan == found.plan
        assert revise_difference(found.plan, seed=4).map == found.plan.map


def test_radial_maps_need_two_solutes():
    point = {**SMALL, "solution": {**SMALL["solution"], "solute": {"sigma": [0.0, 1.2]}}}
    for changes in ({"methods": ("radial",)}, {"methods": ("lbar",), "map": "radial"}):
        with pytest.raises(InputError, match="needs two solutes"):
            solvation.estimate_difference(point, **changes)


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preparation, "enable_compilation_cache", lambda folder: None)
    (tmp_path / "s.yaml").write_text(ff.config.dump(SMALL))
    path = str(tmp_path / "s.yaml")
    command = ["estimate", path, "--methods", "bridge", "--target-error", "0.05", "--quiet"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.rstrip().endswith("bridge converged")
    for options, message in (
        (["--methods", "bar,baz"], "--methods[1]: unknown value 'baz'; did you mean bar?"),
        (["--map", "feild"], "Invalid value for '--map': 'feild' is not one of 'field', 'radial', 'torus'"),
        (["--stages", "3"], "--stages: small is a solution, which this is not for"),
    ):
        assert cli.main(["estimate", path, *options]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["validate", path]) == 0
    assert "box_length: 5.0" in capsys.readouterr().out
    for job in (["compare", path, "x.dcd"], ["sample", path, "-n", "3", "-o", str(tmp_path / "x.dcd")]):
        assert cli.main(job) == 2
        assert "a solution; this works for crystals only" in capsys.readouterr().err


def test_journeys_meet_atoms_softly():
    """Six atoms accept moves of 0.03 diameters, but on a long way without rejections some would fly apart."""
    for diameter, sigma, wanted in ((1.0, [0.5, 1.5], 0.02), (1.0, [0.0, 0.5], 0.015), (0.5, [0.5, 1.5], 0.01)):
        solvent = {"count": 6, "potential": {"kind": "lennard_jones", "sigma": diameter}}
        solution = {**SMALL["solution"], "solvent": solvent, "solute": {"kind": "wca", "sigma": sigma}}
        assert solvation._largest_step(ff.load({**SMALL, "solution": solution})) == pytest.approx(wanted)
