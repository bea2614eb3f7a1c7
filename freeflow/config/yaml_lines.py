"""YAML with the line of every key, by the safe loader."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from freeflow.config.words import KeyPath, one_line, show, show_key
from freeflow.errors import InputError

MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans (1e-4 is a number, `no` is a word); no aliases, anchors or tags."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own name)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self._refuse("anchors and aliases (& and *) are not allowed; write the value out", event)
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._refuse(f"tags ({show(tag)}) are not allowed", event)
        if self.depth > MAX_DEPTH:
            self._refuse("nested too deeply", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    @staticmethod
    def _refuse(problem: str, event: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_Loader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    list("-+0123456789."),
)


class Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: its words for numbers, lists on one line, no aliases."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def represent_sequence(  # noqa: D102
        self, tag: str, sequence: Any, flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: D102
        return True


def parse(text: str, label: str) -> tuple[Any, dict[KeyPath, int]]:
    """Plain values, and the line of every key.

    Raises:
        InputError: If it is empty, no valid YAML, or no mapping.
    """
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise InputError(f"{label}: the file is empty")
        data = _plain(node, (), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}" if mark else label
        problem = error.problem or "not valid YAML"
        if problem.startswith("but ") and error.context:
            problem = f"{error.context}, {problem}"
        raise InputError(f"{where}: {one_line(problem)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{label}:{line}: not text (character #x{ord(text[error.position]):04x})") from None
    if not isinstance(data, dict):
        raise InputError(f"{label}:{lines[()]}: expected keys and values (name: ...), got {show(data)}")
    return data, lines


def _plain(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return dict(_items(node, path, lines))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), lines) for i, item in enumerate(node.value)]
    text = node.value
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT and len(text) < 300:
        return int(text)
    if node.tag in {_INT, _FLOAT}:
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return text


def _items(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int]) -> Iterator[tuple[str, Any]]:
    for key_node, value_node in node.value:
        mark = key_node.start_mark
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=mark)
        inner = (*path, key_node.value)
        if inner in lines:
            problem = f"{show_key(inner)}: given twice (first on line {lines[inner]})"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        lines[inner] = mark.line + 1
        yield key_node.value, _plain(value_node, inner, lines)
