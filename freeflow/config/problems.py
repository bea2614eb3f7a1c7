"""What is wrong with a file, in plain words: one line with file, line, key and the nearest valid word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from freeflow.config.estimates import EstimateSection, kind_of_flow
from freeflow.config.schema import FLOWS, PAIRS, POTENTIALS, SECTIONS, SOLUTION_SECTIONS, SystemSection
from freeflow.config.values import Section
from freeflow.config.words import KeyPath, describe, nearest, one_line, show, show_key, suggest
from freeflow.errors import InputError
from freeflow.units import UNIT_STYLES

_Sections = Mapping[tuple[str, ...], type[Section]]


class _Problem(NamedTuple):
    path: KeyPath
    message: str
    explains: str | None = None  # a missing key that this one was probably meant to be


def validate(model: Any, data: Any, label: str, lines: Mapping[KeyPath, int], prefix: tuple[str, ...] = ()) -> Any:
    """The data as the model has it.

    Args:
        model: The section's class.
        data: What the file says.
        label: What to call the file in messages; may be empty.
        lines: Line of every key, where they are known.
        prefix: Keys that lead to the section.

    Raises:
        InputError: One line about the first problem, with its line, and how many more there are.
    """
    sections = SECTIONS if model in {SystemSection, EstimateSection} else SOLUTION_SECTIONS
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [_problem(details, data, prefix, sections) for details in error.errors(include_url=False)]
    explained = {(*problem.path[:-1], problem.explains) for problem in problems if problem.explains}
    problems = [problem for problem in problems if problem.path not in explained]
    # What is there comes before what is missing: a word that cannot be guessed may be the missing one.
    problems.sort(key=lambda problem: (problem.message.startswith("missing"), _line(problem.path, lines)))
    raise InputError(_message(problems, label, lines))


def _message(problems: Sequence[_Problem], label: str, lines: Mapping[KeyPath, int]) -> str:
    path, message, _ = problems[0]
    where = [f"{label}:{_line(path, lines)}" if lines else label, show_key(path), message]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return one_line(": ".join(part for part in where if part)) + more


def _line(path: KeyPath, lines: Mapping[KeyPath, int]) -> int:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _problem(details: ErrorDetails, data: Any, prefix: tuple[str, ...], sections: _Sections) -> _Problem:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    path = _path(details["loc"], data, prefix)
    if kind == "extra_forbidden":
        return _unknown_key(path, data, prefix, sections)
    if kind == "missing":
        if path == ("units",):
            styles = ", ".join(f"{name} ({describe(name)})" for name in UNIT_STYLES)
            return _Problem(path, f"missing; choose {styles}")
        return _Problem(path, "missing")
    if kind in {"union_tag_not_found", "union_tag_invalid"} and (*prefix, *path) == ("estimate", "flow"):
        return _wrong_flow(path, value)
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        given = value.get("kind") if isinstance(value, Mapping) else None
        known = list(POTENTIALS)
        if given is None:
            return _Problem((*path, "kind"), f"missing; use one of {', '.join(known)}")
        return _Problem((*path, "kind"), f"unknown potential {show(given)}; {suggest(str(given), known)}")
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        return _Problem(path, f"unknown value {show(value)}; {suggest(str(value), known)}")
    if kind in {"model_type", "model_attributes_type"}:
        keys = ", ".join(["kind", "..."] if path == ("potential",) else _keys(_section(prefix + path, data, sections)))
        return _Problem(path, f"expected a section with the keys {keys}, got {show(value)}")
    if kind == "freeflow":
        return _Problem((*path, *context["key"]), context["message"])
    return _Problem(path, f"{_plain_words(kind, context) or details['msg']}, got {show(value)}")


def _plain_words(kind: str, context: Mapping[str, Any]) -> str | None:
    words = {
        "float_type": "expected a number",
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "bool_type": "expected true or false",
        "string_type": "expected text",
        "finite_number": "expected a finite number",
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "string_too_long": "must be at most {max_length} characters long",
    }
    bounds = {key: f"{number:g}" if isinstance(number, float) else number for key, number in context.items()}
    return words[kind].format(**bounds) if kind in words else None


def _wrong_flow(path: KeyPath, value: Any) -> _Problem:
    known = [name for name in FLOWS if name != "checkpoint"]
    if not isinstance(value, Mapping):
        return _Problem(path, f"expected a section with the keys checkpoint, or architecture, ..., got {show(value)}")
    if "architecture" in value:
        given = value["architecture"]
        return _Problem((*path, "architecture"), f"unknown value {show(given)}; {suggest(str(given), known)}")
    near = next((key for key in value if nearest(str(key), ["checkpoint", "architecture"])), None)
    if near is not None:
        hint = suggest(str(near), ["checkpoint", "architecture"])
        return _Problem((*path, near), f"unknown key; {hint}")
    return _Problem(path, f"give checkpoint (a trained flow) or architecture ({', '.join(known)})")


def _path(location: tuple[str | int, ...], data: Any, prefix: tuple[str, ...] = ()) -> KeyPath:
    """Pydantic's location without the names of union members that it puts behind the keys of unions."""
    unions = (("potential",), POTENTIALS), (("estimate", "flow"), FLOWS), (("temperature",), ("one", "many"))
    for union, members in unions:
        at = len(union) - len(prefix)
        if (*prefix, *location)[: len(union)] == union and len(location) > at and location[at] in members:
            location = (*location[:at], *location[at + 1 :])
    return location


def _unknown_key(path: KeyPath, data: Any, prefix: tuple[str, ...], sections: _Sections) -> _Problem:
    *parents, key = path
    section = (*prefix, *parents)
    if section == ("estimate", "flow") and key == "architecture":
        return _Problem(path, "give checkpoint or architecture, not both")
    valid = _keys(_section(section, data, sections))
    homes = [".".join(home) for home, model in sections.items() if home != section and str(key) in _keys(model)]
    if homes and nearest(str(key), valid) is None:
        place = f"in section {homes[0]}" if homes[0] else "at the top of the file"
        return _Problem(path, f"unknown key here; it belongs {place}")
    hint = suggest(str(key), valid)
    return _Problem(path, f"unknown key; {hint}", nearest(str(key), valid))


def _section(path: KeyPath, data: Any, sections: _Sections) -> type[Section]:
    if path[:2] == ("potential", "pairs"):
        return PAIRS[data["potential"]["kind"]]
    if path == ("potential",):
        return POTENTIALS[data["potential"]["kind"]]
    if path == ("estimate", "flow"):
        inner = data.get("estimate")
        flow = inner["flow"] if isinstance(inner, Mapping) and "flow" in inner else data["flow"]
        return FLOWS[kind_of_flow(flow) or "checkpoint"]
    return sections[tuple(str(key) for key in path)]


def _keys(model: type[Section]) -> list[str]:
    return sorted((field.alias or name for name, field in model.model_fields.items()), key="nearest_image_only".__eq__)
