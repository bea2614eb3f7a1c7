"""What results have in common: they print as a table and write themselves as JSON; files are there whole or not at all.

Importing this module does not start JAX.
"""

from __future__ import annotations

import io
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.text import Text

from freeflow.errors import FreeflowError

JSON_VERSION = 1  # of the contract that `to_dict` keeps


class Document:
    """A result that can be printed and written; what it holds is the business of the class that inherits this."""

    _width: ClassVar[int] = 120  # of the table as plain text

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract."""
        raise NotImplementedError

    def render(self, console: Console) -> None:
        """Print the table."""
        raise NotImplementedError

    def json_text(self) -> str:
        """The JSON document, ending in a line feed."""
        return json.dumps(plain(self.to_dict()), indent=2, allow_nan=False) + "\n"

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON document; the file is there whole or not at all.

        Raises:
            FreeflowError: If it cannot be written.
        """
        write_atomically(path, self.json_text())

    def __str__(self) -> str:
        sheet = io.StringIO()
        # In a notebook rich would show the table itself, and leave the sheet empty.
        plainly: Any = {"color_system": None, "force_terminal": False, "force_jupyter": False}
        self.render(Console(file=sheet, width=self._width, **plainly))
        return "\n".join(line.rstrip() for line in sheet.getvalue().splitlines())


def print_lines(console: Console, title: str, lines: Iterable[str], style: str = "yellow") -> None:
    """A title and indented lines below it; nothing where there are none.

    Args:
        console: Where to print.
        title: Of the lines.
        lines: One sentence each.
        style: Of the lines, a word of rich.
    """
    lines = list(lines)
    if lines:
        console.print()
        console.print(Text(title, style="bold"))
        for line in lines:
            console.print(Text(f"  {line}", style=style))


def print_verdict(console: Console, verdict: str, good: bool) -> None:
    """The last line of a table."""
    console.print()
    console.print(Text(verdict, style="bold green" if good else "bold red"))


def csv_text(rows: Sequence[Mapping[str, Any]], units: Mapping[str, str]) -> str:
    """Rows of one shape as a table of comma-separated values, whose heads say the units that are known.

    Args:
        rows: Values by name.
        units: By name, without the endings `_per_atom` and `_std_error`, or the beginning `plain_`.
    """

    def head(name: str) -> str:
        unit = units.get(name.removesuffix("_std_error").removesuffix("_per_atom").removeprefix("plain_"))
        return name if unit is None else f"{name} [{unit}]"

    lines = [",".join(head(name) for name in rows[0])] if rows else []
    lines += [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
    return "\n".join(lines) + "\n"


def plain(value: Any) -> Any:
    """What JSON can hold: plain Python, and None for numbers that it has no word for."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # NumPy and JAX
        return plain(value.tolist())
    return str(value)


# ------------------------------------------------------------------------------ files


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file, text in UTF-8, whole or not at all: into a neighbour first, then renamed.

    Raises:
        FreeflowError: If it cannot be written; nothing is left behind.
    """
    target = _real(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        if target.exists() and not target.is_file():  # a pipe or a device cannot be replaced
            target.write_bytes(data)
            return
        neighbour = _neighbour(target)
        try:
            with neighbour.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            neighbour.replace(target)
        finally:
            neighbour.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FreeflowError(f"{path}: cannot be written: {reason}") from None


def require_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work, not after it, whether `write_atomically` can write there.

    Raises:
        FreeflowError: If it cannot.
    """
    target = _real(path)
    if target.is_dir():
        raise FreeflowError(f"{path}: cannot be written: it is a directory")
    if target.exists() and not target.is_file():
        return
    probe = _neighbour(target)
    try:
        probe.open("x").close()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FreeflowError(f"{path}: cannot be written: {reason}") from None


def _neighbour(target: Path) -> Path:
    """A new name beside the target's, short enough for any file system."""
    start = os.fsdecode(os.fsencode(target.name)[:100])
    return target.with_name(f".{start}.{uuid.uuid4().hex[:8]}.tmp")


def _real(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to; a link is written through, not replaced."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise FreeflowError(f"{path!r}: cannot be written: {error}") from None
