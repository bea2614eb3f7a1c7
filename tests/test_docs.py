"""What README and docs say works: their system files load, their commands exist, their Python compiles."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from freeflow import cli
from freeflow.config import read

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{k}")
        for page in PAGES
        for k, (kind, block) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if kind == language
    ]


def commands():
    found = []
    for parameter in blocks("sh"):
        for line in parameter.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["freeflow"]:
                found.append(pytest.param(words[1:], id=" ".join(words)))
    return found


@pytest.mark.parametrize("text", blocks("yaml"))
def test_system_files_are_valid(text):
    values = yaml.safe_load(text)
    if {"name", "units", "temperature"} <= set(values):
        read(values)


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words):
    """Parsed and not carried out: names of commands, options and choices are checked by the real parser."""
    command = cli.cli.commands[words[0]]
    if "..." in words:
        return
    context = command.make_context(words[0], list(words[1:]), resilient_parsing=False)
    assert isinstance(context, click.Context)


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles(text):
    compile(text, "docs", "exec")


def test_there_is_something_to_check():
    assert len(commands()) > 15 and len(blocks("yaml")) >= 3


def test_every_json_key_is_documented():
    from fake_results import fake_result

    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in text for key in fake_result().to_dict())


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page}: {target}"
