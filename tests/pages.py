"""Blocks of code in README, docs and examples."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
_BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Code between fences; with a title it is a file beside the others."""

    language: str
    title: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page, in their order."""
    return [Block(*found) for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def shell_lines(page: Path) -> Iterator[list[str]]:
    """Every line of a page's shell blocks as words, without comments."""
    for block in blocks_of(page):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
