"""The answer as text and as JSON."""

import dataclasses
import io
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_results import fake_result, fake_system
from rich.console import Console

from freeflow.documents import require_writable
from freeflow.errors import FreeflowError
from freeflow.result import BOOTSTRAP_RATIO, ESS_FRACTION, format_with_error, provenance
from freeflow.types import Plan, Published, Work
from freeflow.units import unit_style

GOLDEN = Path(__file__).parent / "golden"
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-25.163112, 9e-5, "-25.16311(9)"),
        (3.1079812, 2.8e-4, "3.10798(28)"),
        (33.4468, 0.0051, "33.447(5)"),
        (-25.16306, 2e-4, "-25.16306(20)"),
        (3.14159, 0.0095, "3.142(10)"),
        (3.14159, 0.00949, "3.142(9)"),
        (3.14159, 0.95, "3.1(1.0)"),
        (3.14159, 0.996, "3.1(1.0)"),
        (3.14159, 0.0296, "3.14(3)"),
        (3.14159, 0.0294, "3.142(29)"),
        (33.56, 1.16, "33.6(1.2)"),
        (-94.64, 3.4, "-95(3)"),
        (3.1, 9.96, "3(10)"),
        (123.4, 45.0, "123(45)"),
        (1234.6, 678.0, "1235(678)"),
        (1e10, 3e9, "1e+10 +- 3e+09"),
        (1.5, 1e-20, "1.5 +- 1e-20"),
        (-1e-5, 0.1, "0.00(10)"),
        (0.0, 0.02, "0.000(20)"),
        (-0.0, 0.5, "0.0(5)"),
        (1.5, 0.0, "1.5(0)"),
        (-25.16311, NAN, "-25.16311(?)"),
        (1.5, INF, "1.5(inf)"),
        (NAN, 0.1, "not estimable"),
        (-INF, 0.1, "-inf"),
        (NAN, NAN, "not estimable"),
        (np.float32(1.5), np.float64(0.25), "1.50(25)"),
        (1, 1, "1.0(1.0)"),
    ],
)
def test_errors_in_parentheses(value, error, text):
    assert format_with_error(float(value), float(error)) == text


def test_a_negative_error_is_a_mistake():
    with pytest.raises(ValueError, match="cannot be negative"):
        format_with_error(1.0, -0.1)


def test_table_golden():
    assert str(fake_result()) + "\n" == (GOLDEN / "result_table.txt").read_text()


def test_table_of_an_unreliable_two_sided_result_golden():
    result = fake_result(
        system=fake_system(units=unit_style("lj"), temperature=2.0, published=Published(-25.2)),
        status="unreliable",
        warnings=("the two states overlap by 2.0 % only; put states or stages between them", "[bold]second[/bold]"),
        estimator="bar",
        work=Work(np.zeros(100), np.zeros(90)),
        n_samples=190,
        overlap=0.02,
        hysteresis_z=5.2,
        beta_f_std_error=NAN,
        pareto_k=NAN,
        wall_seconds={"total": 1.0},
    )
    assert str(result) + "\n" == (GOLDEN / "result_table_unreliable.txt").read_text()


def test_the_table_does_not_depend_on_the_terminal(monkeypatch):
    plain = str(fake_result())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    assert str(fake_result()) == plain
    assert plain.isascii()


def test_colours_on_a_terminal():
    sheet = io.StringIO()
    fake_result().render(Console(file=sheet, force_terminal=True, color_system="standard", width=100))
    assert "\x1b[32mgood" in sheet.getvalue()


@pytest.mark.parametrize(
    ("status", "exit_status", "verdict"),
    [
        ("converged", 0, "Converged: one standard error is 9.0e-05 kT per atom; the target was 1.0e-04."),
        (
            "target_not_reached",
            3,
            "Target not reached: one standard error is 9.0e-05 kT per atom; the target was 1.0e-04. "
            "More samples would help.",
        ),
        ("unreliable", 3, "Not reliable: too few"),
        ("interrupted", 130, "Interrupted after 5 120 samples; the target of 1.0e-04 kT per atom was not reached."),
    ],
)
def test_verdicts(status, exit_status, verdict):
    result = fake_result(status=status, warnings=("too few",) if status == "unreliable" else ())
    assert (result.exit_status, result.verdict) == (exit_status, verdict)
    assert result.summary == "-25.16310(9) " + status.replace("_", " ")


def test_words_of_diagnostics():
    assert [ESS_FRACTION.word(x) for x in (0.5, 0.1, 0.05, 0.001)] == ["good", "good", "fair", "poor"]
    assert [BOOTSTRAP_RATIO.word(x) for x in (1.0, 1.4, 2.0)] == ["good", "fair", "poor"]


def test_a_lost_component_is_noticed():
    components = {"lattice energy": -1993.25, "reference": 221.8113, "work": 3.0, "centre of mass": -7.0}
    with pytest.raises(ValueError, match="components add up to"):
        fake_result(components=components)


def test_z_score_combines_both_errors():
    result = fake_result()
    expected = (-1610.4387 / 64 + 25.16306) / math.hypot(0.00576 / 64, 2e-4)
    assert result.z_score == pytest.approx(expected, rel=1e-12)
    no_error = fake_result(system=fake_system(published=Published(-25.0)))
    assert no_error.z_score == pytest.approx((-1610.4387 / 64 + 25.0) / (0.00576 / 64))
    assert math.isnan(fake_result(beta_f_std_error=NAN).z_score)
    assert math.isnan(fake_result(system=fake_system(published=None)).z_score)


# --------------------------------------------------------------------------- JSON

CONTRACT = {  # DESIGN: JSON version 1
    "version": int,
    "system": str,
    "n_atoms": int,
    "quantity": str,
    "beta_f": float,
    "beta_f_std_error": float,
    "beta_f_per_atom": float,
    "beta_f_per_atom_std_error": float,
    "free_energy": {"value": float, "std_error": float, "unit": str},
    "estimator": str,
    "n_samples": int,
    "ess_fraction": float,
    "pareto_k": float,
    "overlap": type(None),
    "energy_evaluations": int,
    "wall_seconds": {"total": float, "compile": float, "reference": float, "sampling": float},
    "status": str,
    "warnings": list,
    "published": {"beta_f_per_atom": float, "std_error": float, "z_score": float},
    "provenance": {"freeflow": str, "jax": str, "device": str, "seed": int, "config": dict},
}


def check(contract, values):
    for key, kind in contract.items():
        if isinstance(kind, dict):
            check(kind, values[key])
        else:
            assert type(values[key]) is kind, key


def test_json_contract():
    values = json.loads(fake_result().json_text())
    check(CONTRACT, values)
    assert values["version"] == 1
    assert values["quantity"] == "helmholtz_free_energy"
    assert values["beta_f"] == -1610.4387
    assert values["beta_f_per_atom"] == pytest.approx(-25.1631046875, rel=1e-14)
    assert values["free_energy"]["value"] == pytest.approx(-1610.4387 * 200 * 0.0019872067, rel=1e-14)
    assert values["free_energy"]["std_error"] == pytest.approx(0.00576 * 200 * 0.0019872067, rel=1e-14)
    assert values["free_energy"]["unit"] == "kcal/mol"
    assert values["beta_f_per_atom_std_error"] == 0.00576 / 64
    assert values["energy_evaluations"] == 262144
    assert sum(values["components"].values()) == pytest.approx(values["beta_f"])
    assert list(values["components"]) == ["lattice energy", "reference", "work", "centre of mass", "thermal wavelength"]
    assert values["provenance"]["config"]["name"] == "mw_cubic_64"


def test_json_holds_nothing_but_plain_finite_values():
    result = fake_result(
        system=fake_system(published=None),
        beta_f_std_error=NAN,
        pareto_k=NAN,
        drift_z=INF,
        energy_evaluations={"sampling": 3},
        wall_seconds={"total": 1.0, "sampling": NAN},
        provenance={"array": np.arange(3), "scalar": np.float64(NAN), "path": Path("a"), "integer": np.int64(4)},
    )
    values = result.to_dict()
    assert values == json.loads(json.dumps(values, allow_nan=False))
    for key in ("beta_f_std_error", "beta_f_per_atom_std_error", "pareto_k", "overlap", "published"):
        assert values[key] is None
    assert values["free_energy"]["std_error"] is None
    assert values["diagnostics"]["drift_z"] is None
    assert values["wall_seconds"] == {"total": 1.0, "compile": None, "reference": None, "sampling": None}
    assert values["provenance"]["array"] == [0, 1, 2]
    assert (values["provenance"]["scalar"], values["provenance"]["integer"]) == (None, 4)
    assert values["provenance"]["freeflow"] is None and values["provenance"]["seed"] == 0


def test_provenance_records_the_plan_that_was_carried_out():
    plan = dataclasses.replace(Plan(), seed=7, bridge=None)
    values = provenance(fake_system(), plan)
    check(CONTRACT["provenance"], values)
    assert values["seed"] == values["config"]["estimate"]["seed"] == 7
    assert values["config"]["estimate"]["bridge"] is None
    assert values["config"]["estimate"]["flow"] is None
    assert values["device"].startswith(("cpu", "gpu", "tpu"))


def test_to_json_replaces_the_file_whole(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    fake_result().to_json(path)
    assert json.loads(path.read_text())["system"] == "mw_cubic_64"
    assert os.listdir(tmp_path) == ["out.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_to_json_follows_links(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real.json")
    fake_result().to_json(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real.json").is_file()


def test_to_json_does_not_replace_devices():
    fake_result().to_json("/dev/null")
    assert not Path("/dev/null").is_file()


def test_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FreeflowError, match=r"out.json: cannot be written: No space left on device$"):
        fake_result().to_json(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_device():
    with pytest.raises(FreeflowError, match="/dev/full: cannot be written: No space left on device"):
        fake_result().to_json("/dev/full")


def test_places_that_cannot_be_written_are_known_beforehand(tmp_path):
    for path, reason in [
        (tmp_path / "no" / "out.json", "No such file or directory"),
        (tmp_path, "it is a directory"),
        (tmp_path / "a\0b", "embedded null"),
    ]:
        with pytest.raises(FreeflowError, match=f"cannot be written: .*{reason}"):
            require_writable(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FreeflowError, match="Not a directory"):
        require_writable(tmp_path / "file" / "out.json")
    require_writable(tmp_path / "out.json")
    require_writable("/dev/null")
    assert os.listdir(tmp_path) == ["file"]


def test_importing_result_does_not_start_jax():
    code = "import sys, freeflow.result; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_result_prints_itself_in_a_notebook_too(monkeypatch):
    """There rich would show the table by itself, and `print(result)` an empty line."""
    plain = str(fake_result())
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(fake_result()) == plain
    assert "beta F / N" in plain
