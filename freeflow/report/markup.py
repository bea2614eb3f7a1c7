"""HTML by construction: text is escaped unless it is markup already, and a page needs nothing but itself."""

from __future__ import annotations

import csv
import html
import io
import math
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freeflow.documents import write_atomically
from freeflow.report.drawing import Plot


class Markup(str):
    """Text that is HTML already; `tag` escapes any other."""


def join(parts: Iterable[str]) -> Markup:
    """Elements below each other."""
    return Markup("\n".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def tag(name: str, *content: str, **attributes: str | None) -> Markup:
    """An HTML element; `class_` stands for class, attributes that are None are left out."""
    texts = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = "".join(f' {key}="{html.escape(value)}"' for key, value in texts.items())
    body = "".join(part if isinstance(part, Markup) else html.escape(part) for part in content)
    return Markup(f"<{name}{head}>{body}</{name}>")


_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1c1c1c; font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .4rem; }
p { margin: .3rem 0; }
.what, figcaption { color: #555; overflow-wrap: anywhere; }
.headline { font-size: 1.5rem; margin: .9rem 0 .5rem; font-variant-numeric: tabular-nums; }
.verdict { border-left: .4rem solid; padding: .55rem 1rem; margin: .6rem 0; font-weight: 600; }
.verdict.good { background: #e9f5ec; } .verdict.fair { background: #fdf3dc; } .verdict.poor { background: #fbeaea; }
.good { color: #1b6e2f; } .fair { color: #825300; } .poor { color: #b3261e; font-weight: 600; }
.warnings { margin: .4rem 0; padding-left: 1.3rem; color: #825300; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 33rem), 1fr)); gap: 1.8rem 2.2rem;
  margin: 1.6rem 0; align-items: start; }
.tables { columns: 2 26rem; column-gap: 2.2rem; margin: 1.6rem 0; }
section { break-inside: avoid; margin-bottom: 1.5rem; }
.checks { margin-top: 1.6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .22rem .9rem .22rem 0; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 500; } thead th { color: #555; border-bottom: 1px solid #999; }
tr > :last-child { padding-right: 0; }
td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: pre; overflow-wrap: normal;
  font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .87rem; }
figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; margin-top: .3rem; overflow-wrap: anywhere; }
details { margin: 1.6rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .82rem; background: #f6f6f6; padding: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
footer { margin-top: 2rem; color: #555; font-size: .9rem; }
@media (min-width: 40rem) { th { white-space: nowrap; } }
@media print { main { max-width: none; padding: 0; } body { font-size: 10.5pt; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem 1.4rem; } .tables { columns: 1; }
  .scroll { overflow: visible; } table { font-size: 8.5pt; } .number { font-size: 8pt; white-space: pre-wrap; }
  figure, tr, .verdict { break-inside: avoid; } .verdict { print-color-adjust: exact; } }
"""


def write_page(
    path: str | os.PathLike[str], name: str, head: Markup, plots: Sequence[Plot | None], foot: Markup
) -> list[Path]:
    """Write a page, and beside it the numbers of every figure.

    Args:
        path: Of the page; numbers go to <stem>.<plot>.csv.
        name: Title of the page.
        head: What comes before the figures.
        plots: The figures; None is left out.
        foot: What comes after them.

    Returns:
        The files written, the page first.

    Raises:
        FreeflowError: If a file cannot be written.
    """
    page = Path(path)
    drawn = [plot for plot in plots if plot is not None]
    alone = page.exists() and not page.is_file()  # a pipe has no neighbours
    files = {} if alone else {plot.name: page.with_name(f"{page.stem}.{plot.name}.csv") for plot in drawn}
    figures = [_figure(plot, files.get(plot.name)) for plot in drawn]
    figures = figures or [tag("p", "There is nothing to draw: no sample has finite work.")]
    body = tag("main", head, tag("div", *figures, class_="figures"), foot)
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    top = Markup(f"{meta}{tag('title', f'{name} - freeflow')}<style>{_CSS}</style>")
    document = tag("html", tag("head", top), tag("body", body), lang="en")
    for plot in drawn:
        if plot.name in files:
            write_atomically(files[plot.name], _csv(plot.columns))
    write_atomically(page, f"<!DOCTYPE html>\n{document}\n")
    return [page, *files.values()]


def _figure(plot: Plot, file: Path | None) -> Markup:
    caption: list[str] = [plot.caption]
    if file is not None:
        # "./" keeps a file name with a colon from being taken for a protocol.
        link = tag("a", file.name, href=f"./{urllib.parse.quote(file.name)}", download=file.name)
        caption += [" Numbers: ", link, "."]
    return tag("figure", tag("h2", plot.title), _svg(plot), tag("figcaption", *caption))


def _svg(plot: Plot) -> Markup:
    """The figure as an <svg> element whose identifiers no other figure of the page has."""
    sheet = io.StringIO()
    plot.figure.savefig(sheet, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = sheet.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height|xmlns(:\w+)?)="[^"]*"', "", head)
    label = html.escape(f"{plot.title}: {plot.caption}")
    return Markup(f'{head} role="img" aria-label="{label}">{rest}')


def _csv(columns: Mapping[str, Iterable[Any]]) -> str:
    """Columns of one length as comma-separated values; floats with all their digits, NaN as nothing."""
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(columns)
    plain = [np.asarray(column).tolist() for column in columns.values()]
    for row in zip(*plain, strict=True):
        writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])
    return sheet.getvalue()


# Words that say how good something is.


# Words that say how good something is.
_GRADES = {word: word for word in ("good", "fair", "poor")} | {"agree": "good", "disagree": "poor", "not told": "fair"}
_NUMBER = re.compile(r"[+-]?\d[\d ]*(\.\d+)?(\([^)]*\))?")


def html_table(rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> Markup:
    """A table whose first column names the rows; columns of numbers stand right, at the point where they can."""
    columns = [[cell.strip() for cell in column] for column in zip(*rows, strict=True)]
    numeric = [i > 0 and all(map(_numeric, column)) and any(column) for i, column in enumerate(columns)]
    for i, column in enumerate(columns):
        if numeric[i] and all(_NUMBER.fullmatch(cell) for cell in column):
            columns[i] = _at_the_point(column)
    body = []
    for row in zip(*columns, strict=True):
        cells = [tag("th", row[0], scope="row")]
        for cell, number in zip(row[1:], numeric[1:], strict=True):
            cells.append(tag("td", cell, class_="number" if number else _GRADES.get(cell)))
        body.append(tag("tr", *cells))
    head = [
        tag("th", text, scope="col", class_="number" if number else None)
        for text, number in zip(heads, numeric, strict=False)
    ]
    parts = [tag("thead", tag("tr", *head))] if heads else []
    return tag("div", tag("table", *parts, tag("tbody", *body)), class_="scroll")


def _numeric(cell: str) -> bool:
    """Whether a cell may stand in a column of numbers, units and signs included."""
    return cell in ("", "not estimable") or bool(re.match(r"[+-]?\d", cell))


def _at_the_point(cells: Sequence[str]) -> list[str]:
    """Numbers filled up with spaces on the right, so that their decimal points stand below each other."""
    ends = [len(cell) - (cell.index(".") if "." in cell else len(cell.split("(")[0])) for cell in cells]
    return [cell + " " * (max(ends) - end) for cell, end in zip(cells, ends, strict=True)]


_VERDICTS = {  # colour and mark
    "converged": ("good", "\u2713"),
    "target_not_reached": ("fair", "!"),
    "unreliable": ("poor", "\u2717"),
    "interrupted": ("fair", "!"),
    "agree": ("good", "\u2713"),
    "disagree": ("poor", "\u2717"),
    "inconclusive": ("fair", "?"),
}


def verdict_box(kind: str, text: str) -> Markup:
    """The verdict in the colour of what it says."""
    grade, mark = _VERDICTS.get(kind, ("fair", "?"))
    return tag("p", f"{mark} {text}", class_=f"verdict {grade}", role="status")


def warning_list(texts: Sequence[str]) -> Markup:
    """Warnings, one point each; nothing if there are none."""
    return tag("ul", *(tag("li", text) for text in texts), class_="warnings") if texts else Markup()
