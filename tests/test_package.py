"""The package as a whole: its names, its version, and what importing it does not do."""

import ast
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


def test_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all("name" in author or "family-names" in author for author in citation["authors"])


# ------------------------------------------------------------------------------ docstrings

SOURCES = sorted((ROOT / "freeflow").rglob("*.py"))


def public_functions(tree):
    """Functions of a module and methods of its classes that others may call; not those inside functions."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from ((f, False) for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, True


def raised(function):
    """Names of the errors that the function itself raises for its callers; what a `try` holds may be caught there."""
    found, nodes = set(), list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Try) and node.handlers:
            nodes += [*node.handlers, *node.orelse, *node.finalbody]
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func))
        nodes += ast.iter_child_nodes(node)
    return {name for name in found if name.endswith("Error")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_complete(path):
    """The first line is a sentence, errors are named, and four arguments or more are explained.

    Commands explain themselves by their options.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function, of_module in public_functions(tree):
        if any("command" in ast.unparse(decorator) for decorator in function.decorator_list):
            continue
        text = ast.get_docstring(function)
        where = f"{path.name}:{function.lineno} {function.name}"
        if text is None:  # the linter says where that may be
            continue
        assert text.split("\n\n")[0].rstrip()[-1] in ".:", where
        if function.name != "unavailable":  # it stands for functions that raise
            errors = text[text.find("Raises:") :] if "Raises:" in text else ""
            assert all(name in errors or "errors as in" in text for name in raised(function)), where
        if of_module and len(function.args.args + function.args.kwonlyargs) >= 4:
            assert "Args:" in text or "arguments" in text.lower(), where
