"""What README and docs say works: system files load, commands exist, Python runs, links lead somewhere."""

import ast
import contextlib
import io
import re
import sys
import tomllib

import click
import numpy as np
import pytest
import yaml
from fake_results import fake_result
from pages import PAGES, ROOT, blocks_of, name_of, shell_lines

from freeflow import cli
from freeflow.config import read
from freeflow.config.schema import SystemSection
from freeflow.config.solutions import SolutionFileSection
from freeflow.geometry import LATTICES

LANGUAGES = {"json", "python", "sh", "text", "yaml"}
# Python that runs an estimate or two; the others take seconds all together.
SLOW = {"docs/extend/potential.md", *(f"docs/howto/{name}.md" for name in (
    "check_md", "flows", "phases", "reference_ensemble", "series", "solvation"
))}  # fmt: skip
# Python that is told in passing: it names files that are not there, or runs for long.
NOT_RUN = {"README.md", "docs/speed.md"}
# What fragments of files are completed with, so that they can be checked.
CRYSTAL = {
    "name": "fragment",
    "units": "metal",
    "temperature": 300.0,
    "potential": {"kind": "lennard_jones", "cutoff": 2.5},
    "crystal": {"lattice": "fcc", "repeats": [4, 4, 4], "lattice_constant": 1.5},
}
SOLUTION = {
    "name": "fragment",
    "units": "lj",
    "temperature": 1.0,
    "solution": {"box_length": 6.0, "solvent": {"count": 10}, "solute": {"sigma": [1.0, 1.1]}},
}


def blocks(language):
    return [
        pytest.param(block.text, id=f"{name_of(page)}-{k}")
        for page in PAGES
        for k, block in enumerate(blocks_of(page))
        if block.language == language
    ]


def lines():
    return (words for page in PAGES for words in shell_lines(page))


def commands():
    """What follows `freeflow` in shell blocks, also behind launchers."""
    cases = {}
    for words in lines():
        if "freeflow" in words and words[0] in {"freeflow", "srun", "taskset"}:
            words = words[words.index("freeflow") + 1 :]
            cases[" ".join(words)] = words
    return [pytest.param(words, id=text) for text, words in cases.items()]


# ------------------------------------------------------------------------------ files and commands


def completed(values):
    """A whole file from a fragment of one: what it does not say is filled in."""
    if {"name", "units", "temperature"} <= set(values):
        return values
    if not set(values) <= set(SystemSection.model_fields) | set(SolutionFileSection.model_fields):
        values = {"estimate": values}
    estimate = values.get("estimate", {})
    whole = SOLUTION if "solution" in values or {"methods", "map"} & set(estimate) else CRYSTAL
    if "structure" in values:
        whole = {key: value for key, value in whole.items() if key != "crystal"}
    return {**whole, **values}


@pytest.mark.parametrize("text", blocks("yaml"))
def test_system_files_are_valid(text):
    read(completed(yaml.safe_load(text)))


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words):
    """Parsed and not carried out: names of commands, options and choices are checked by the real parser."""
    if words == ["--version"]:
        return
    command = cli.cli.commands[words[0]]
    context = command.make_context(words[0], list(words[1:]), resilient_parsing=False)
    assert isinstance(context, click.Context)


def test_other_commands_exist():
    """Targets of make, extras of pip, scripts and modules."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in lines():
        if words[0] == "make":
            assert next(w for w in words[1:] if "=" not in w) in targets, words
        if words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[(.+)\]", words[-1]):
                assert extra in extras, words
        if words[0] == "python" and words[1].endswith(".py"):
            places = (ROOT, *ROOT.glob("examples"), *ROOT.glob("examples/*"))
            assert any((place / words[1]).is_file() for place in places), words


def test_blocks_have_a_known_language():
    for page in PAGES:
        assert {block.language for block in blocks_of(page)} <= LANGUAGES, name_of(page)


# ------------------------------------------------------------------------------ Python


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles(text):
    compile(text, "docs", "exec")


def test_names_of_the_package_exist():
    """`ff.name` and `from freeflow... import name` in every block, also of pages that are not run here."""
    import importlib

    for parameter in blocks("python"):
        for node in ast.walk(ast.parse(parameter.values[0])):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ff":
                assert hasattr(importlib.import_module("freeflow"), node.attr), (parameter.id, node.attr)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "freeflow":
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), (parameter.id, name.name)


def pages_with_python():
    names = [name_of(page) for page in PAGES if any(b.language == "python" and not b.title for b in blocks_of(page))]
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in names
        if name not in NOT_RUN and not name.startswith("examples")
    ]


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """An empty folder to run a page in; what it imports from there, or adds to the lattices, is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, lattices = set(sys.modules), dict(LATTICES)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    LATTICES.clear()
    LATTICES.update(lattices)


@pytest.mark.jax_defaults
@pytest.mark.parametrize("name", pages_with_python())
def test_python_runs(name, clean):
    """The blocks of a page in turn, in one namespace; those with a title are files beside them."""
    namespace = {"__name__": "docs"}
    for kind, title, text in blocks_of(ROOT / name):
        if title:
            (clean / title).write_text(text, encoding="utf-8")
        elif kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, name, "exec"), namespace)


def test_there_is_something_to_check():
    assert len(commands()) > 40 and len(blocks("yaml")) > 20 and len(pages_with_python()) > 10


# ------------------------------------------------------------------------------ the site


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

    def targets(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from targets(part)

    listed = list(targets(config["nav"]))
    assert len(listed) == len(set(listed))
    assert {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")} <= set(listed)


def test_links_lead_somewhere():
    made = {"reference/keys.md", "reference/commands.md", "reference/api.md"}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto")) and target not in made:
                assert (page.parent / target).exists(), f"{page}: {target}"


# ------------------------------------------------------------------------------ JSON

DOCUMENTS = ("result", "difference", "thermodynamics", "phases", "comparison", "sampling", "training_run")


def keys_of(module):
    """Keys of the dictionaries that the JSON functions of a module write out."""
    tree = ast.parse((ROOT / "freeflow" / f"{module}.py").read_text(encoding="utf-8"))
    makers = {"to_dict", "rows", "_names", "_under_pressure", "_volumes"}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in makers:
            for node in ast.walk(function):
                if isinstance(node, ast.Dict):
                    yield from (key.value for key in node.keys if isinstance(key, ast.Constant))


@pytest.mark.parametrize("module", DOCUMENTS)
def test_every_json_key_is_documented(module):
    keys = set(keys_of(module))
    assert len(keys) > 4
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    # A series calls its columns otherwise inside than outside; these are all named.
    assert not {key for key in keys if f"`{key}`" not in text}


def test_lines_of_many_runs_and_of_training_are_documented():
    from freeflow.comparison import Check
    from freeflow.many_runs import Outcome
    from freeflow.phases import Crossing
    from freeflow.training import Baseline, measure

    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    named = (*Outcome._fields, *Crossing._fields, *Check._fields, *measure(np.zeros(4), Baseline(0.0, 2)))
    assert not {key for key in named if f"`{key}`" not in text}


def test_every_key_of_a_result_is_documented():
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in text for key in fake_result().to_dict())
