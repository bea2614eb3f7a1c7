"""Words for people: the nearest valid one, and values on one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freeflow.units import UNIT_STYLES

KeyPath = tuple[str | int, ...]


def nearest(word: str, valid: Sequence[str]) -> str | None:
    """The valid word that `word` was probably meant to be."""
    folded = {name.casefold(): name for name in valid}
    near = difflib.get_close_matches(word.casefold(), list(folded), n=1, cutoff=0.6)
    longer = [name for name in folded if len(word) >= 3 and name.startswith(word.casefold())]
    found = near or longer
    return folded[found[0]] if found else None


def suggest(word: str, valid: Sequence[str]) -> str:
    """A hint to put behind "unknown ...": the nearest valid word, or all of them."""
    near = nearest(word, valid)
    return f"did you mean {near}?" if near else f"use one of {', '.join(valid)}"


def describe(units: str) -> str:
    """The units of a style: energy, length, temperature."""
    style = UNIT_STYLES[units]
    return ", ".join(dict.fromkeys([style.energy, style.length, style.temperature]))


def show_word(word: str) -> str:
    """A key as it is, or quoted if it is odd."""
    return word if re.fullmatch(r"[\w-]{1,40}", word) else show(word)


def show_path(path: Path) -> str:
    """A path as it is, or quoted if it is odd."""
    return str(path) if str(path).isprintable() else repr(str(path))


def show(value: Any) -> str:
    """A value in an error message: short, and on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a number too large to show"
    return text if len(text) <= 60 else f"{text[:50]}..."


def one_line(text: str) -> str:
    """The same words with single blanks between them."""
    return " ".join(text.split())


def show_key(path: KeyPath) -> str:
    """Where a key stands, as in estimate.flow."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{show_word(key)}" for key in path)
    return text.removeprefix(".")


def printable(text: str) -> str:
    """The same text with what would not show, or would command the terminal, spelled out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
