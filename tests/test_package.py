"""The package as a whole: its names, its version, and what importing it does not do."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import freeflow

ROOT = Path(__file__).parent.parent


def test_importing_freeflow_loads_nothing_heavy():
    code = "import sys, freeflow; print(sorted({'jax', 'numpy', 'scipy', 'ase', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        # Help, lists and bad input appear at once.
        ("from freeflow.cli import main", {"jax", "numpy", "scipy", "ase", "rich", "spglib"}),
        # The road to an estimate loads what every estimate needs.
        (
            "import freeflow.pipeline",
            {"scipy.stats", "scipy.optimize", "haiku", "optax", "ase", "mdtraj", "matplotlib", "pandas", "spglib"},
        ),
    ],
)
def test_heavy_modules_are_imported_where_they_are_used(statement, unwanted):
    code = f"import sys; {statement}; print(sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_every_module_leaves_the_flags_of_jax_alone():
    code = (
        "import jax; before = dict(jax.config.values); import freeflow; "
        "[getattr(freeflow, name) for name in freeflow.__all__]; "
        "print({k: v for k, v in jax.config.values.items() if before.get(k, v) != v})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{}"


@pytest.mark.parametrize("name", freeflow.__all__)
def test_public_names_exist(name):
    assert name in dir(freeflow)
    assert getattr(freeflow, name) is not None


def test_other_names_do_not():
    with pytest.raises(AttributeError, match="no attribute 'estimat'"):
        freeflow.estimat  # noqa: B018


def test_version_is_the_same_everywhere():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == declared
    assert freeflow.__version__ == declared
