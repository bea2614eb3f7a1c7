"""Reports for the eye: one HTML page with figures and tables, and the numbers behind every figure as CSV.

A page needs nothing but itself: no scripts, fonts or pictures from elsewhere. Text from the user's
files is escaped by construction, see `_Markup`.
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
import math
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import expit, log_expit

from freeflow.comparison import Comparison, Distribution
from freeflow.documents import write_atomically
from freeflow.estimators import bar, fep, record
from freeflow.estimators.two_state import bennett_shift
from freeflow.observables import Average
from freeflow.observers import Profile
from freeflow.result import Result, format_with_error, in_words
from freeflow.trajectories import FrameSeries
from freeflow.trajectories.recomputed import OTHER_ENERGIES
from freeflow.types import Work
from freeflow.units import UnitStyle

if TYPE_CHECKING:  # imported when there is something to draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which differ to every eye and in grey.
_MODEL, _MD, _PUBLISHED, _GREY, _ALARM = "#0072B2", "#D55E00", "#009E73", "#777777", "#B3261E"
_MAX_POINTS = 2000  # of a curve; more make the page large and the picture no better
_RUNNING_POINTS = 20
_SYMBOLS = {"epsilon": "ε", "sigma": "\N{GREEK SMALL LETTER SIGMA}", "angstrom": "Å"}
_VERDICTS = {  # colour and mark
    "converged": ("good", "\u2713"),
    "target_not_reached": ("fair", "!"),
    "unreliable": ("poor", "\u2717"),
    "interrupted": ("fair", "!"),
    "agree": ("good", "\u2713"),
    "disagree": ("poor", "\u2717"),
    "inconclusive": ("fair", "?"),
}


class Plot(NamedTuple):
    """A figure, and the numbers that it shows."""

    name: str  # part of the CSV file's name
    title: str
    figure: Figure
    caption: str
    columns: Mapping[str, Iterable[Any]]  # of the CSV file, all of one length


def write_estimate_report(result: Result, path: str | os.PathLike[str]) -> list[Path]:
    """Write an estimate as an HTML page, and what its figures show as CSV files in the same folder.

    Args:
        result: Any that `pipeline.estimate` gives, however poor.
        path: Of the page; a CSV file is called <stem>.<plot>.csv.

    Returns:
        The files written, the page first.

    Raises:
        FreeflowError: If a file cannot be written.
    """
    with _plain_style():
        g = _inefficiency(result)
        plots = [
            _work_plot(result),
            _weights_plot(result, g),
            _running_plot(result, g),
            _overlap_plot(result, g),
            result.profile and _profile_plot(result.profile, result.system.units),
        ]
        return _write(path, result.system.name, _estimate_head(result), plots, _small_print(result, result.provenance))


def write_comparison_report(comparison: Comparison, path: str | os.PathLike[str]) -> list[Path]:
    """Write a comparison of model and trajectory as an HTML page with CSV files; as `write_estimate_report`."""
    units, series = comparison.system.units, comparison.series
    with _plain_style():
        g = _inefficiency(comparison.result)
        plots = [
            _distribution_plot(
                comparison.energy, "energy", "Energy per atom", "potential energy per atom", _symbol(units.energy)
            ),
            _profile_plot(comparison.profile, units),
            _distribution_plot(
                comparison.displacement,
                "displacement",
                "Mean squared displacement",
                "mean squared displacement from the sites",
                f"{_symbol(units.length)}²",
            ),
            comparison.volume
            and _distribution_plot(
                comparison.volume, "volume", "Volume", "volume per atom", f"{_symbol(units.length)}³"
            ),
            _series_plot(series, comparison.start, comparison.system.n_atoms, units),
            _work_plot(comparison.result),
            _running_plot(comparison.result, g),
            _overlap_plot(comparison.result, g),
            _file_energy_plot(series, units),
        ]
        details = _tag("details", _tag("summary", "The free energy in detail"), _tables(comparison.result))
        foot = _small_print(comparison.result, comparison.provenance)
        return _write(path, comparison.system.name, _comparison_head(comparison), plots, _join([details, foot]))


# ------------------------------------------------------------------------- the page


class _Markup(str):
    """Text that is HTML already; `_tag` escapes any other."""


def _join(parts: Iterable[str]) -> _Markup:
    return _Markup("\n".join(part if isinstance(part, _Markup) else html.escape(part) for part in parts))


def _tag(name: str, *content: str, **attributes: str | None) -> _Markup:
    """An HTML element; `class_` stands for class, attributes that are None are left out."""
    texts = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = "".join(f' {key}="{html.escape(value)}"' for key, value in texts.items())
    body = "".join(part if isinstance(part, _Markup) else html.escape(part) for part in content)
    return _Markup(f"<{name}{head}>{body}</{name}>")


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


def _write(
    path: str | os.PathLike[str], name: str, head: _Markup, plots: Sequence[Plot | None], foot: _Markup
) -> list[Path]:
    page = Path(path)
    drawn = [plot for plot in plots if plot is not None]
    alone = page.exists() and not page.is_file()  # a pipe has no neighbours
    files = {} if alone else {plot.name: page.with_name(f"{page.stem}.{plot.name}.csv") for plot in drawn}
    figures = [_figure(plot, files.get(plot.name)) for plot in drawn]
    figures = figures or [_tag("p", "There is nothing to draw: no sample has finite work.")]
    body = _tag("main", head, _tag("div", *figures, class_="figures"), foot)
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    top = _Markup(f"{meta}{_tag('title', f'{name} - freeflow')}<style>{_CSS}</style>")
    document = _tag("html", _tag("head", top), _tag("body", body), lang="en")
    for plot in drawn:
        if plot.name in files:
            write_atomically(files[plot.name], _csv(plot.columns))
    write_atomically(page, f"<!DOCTYPE html>\n{document}\n")
    return [page, *files.values()]


def _figure(plot: Plot, file: Path | None) -> _Markup:
    caption: list[str] = [plot.caption]
    if file is not None:
        # "./" keeps a file name with a colon from being taken for a protocol.
        link = _tag("a", file.name, href=f"./{urllib.parse.quote(file.name)}", download=file.name)
        caption += [" Numbers: ", link, "."]
    return _tag("figure", _tag("h2", plot.title), _svg(plot), _tag("figcaption", *caption))


def _svg(plot: Plot) -> _Markup:
    """The figure as an <svg> element whose identifiers no other figure of the page has."""
    sheet = io.StringIO()
    plot.figure.savefig(sheet, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = sheet.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height|xmlns(:\w+)?)="[^"]*"', "", head)
    label = html.escape(f"{plot.title}: {plot.caption}")
    return _Markup(f'{head} role="img" aria-label="{label}">{rest}')


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
_GRADES = {word: word for word in ("good", "fair", "poor")} | {"agree": "good", "disagree": "poor", "not told": "fair"}
_NUMBER = re.compile(r"[+-]?\d[\d ]*(\.\d+)?(\([^)]*\))?")


def _table(rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> _Markup:
    """A table whose first column names the rows; columns of numbers stand right, at the point where they can."""
    columns = [[cell.strip() for cell in column] for column in zip(*rows, strict=True)]
    numeric = [i > 0 and all(map(_numeric, column)) and any(column) for i, column in enumerate(columns)]
    for i, column in enumerate(columns):
        if numeric[i] and all(_NUMBER.fullmatch(cell) for cell in column):
            columns[i] = _at_the_point(column)
    body = []
    for row in zip(*columns, strict=True):
        cells = [_tag("th", row[0], scope="row")]
        for cell, number in zip(row[1:], numeric[1:], strict=True):
            cells.append(_tag("td", cell, class_="number" if number else _GRADES.get(cell)))
        body.append(_tag("tr", *cells))
    head = [
        _tag("th", text, scope="col", class_="number" if number else None)
        for text, number in zip(heads, numeric, strict=False)
    ]
    parts = [_tag("thead", _tag("tr", *head))] if heads else []
    return _tag("div", _tag("table", *parts, _tag("tbody", *body)), class_="scroll")


def _numeric(cell: str) -> bool:
    """Whether a cell may stand in a column of numbers, units and signs included."""
    return cell in ("", "not estimable") or bool(re.match(r"[+-]?\d", cell))


def _at_the_point(cells: Sequence[str]) -> list[str]:
    """Numbers filled up with spaces on the right, so that their decimal points stand below each other."""
    ends = [len(cell) - (cell.index(".") if "." in cell else len(cell.split("(")[0])) for cell in cells]
    return [cell + " " * (max(ends) - end) for cell, end in zip(cells, ends, strict=True)]


def _verdict(kind: str, text: str) -> _Markup:
    grade, mark = _VERDICTS.get(kind, ("fair", "?"))
    return _tag("p", f"{mark} {text}", class_=f"verdict {grade}", role="status")


def _warnings(texts: Sequence[str]) -> _Markup:
    return _tag("ul", *(_tag("li", text) for text in texts), class_="warnings") if texts else _Markup()


def _title(result: Result) -> _Markup:
    return _join([_tag("h1", result.system.name), _tag("p", in_words(result.system), class_="what")])


def _tables(result: Result) -> _Markup:
    sections = (_tag("section", _tag("h2", title), _table(rows)) for title, rows in result.sections() if rows)
    return _tag("div", *sections, class_="tables")


def _estimate_head(result: Result) -> _Markup:
    value = format_with_error(result.beta_f_per_atom, result.beta_f_per_atom_std_error)
    return _join(
        [
            _title(result),
            _tag("p", f"βF / N = {value} kT per atom", class_="headline"),
            _verdict(result.status, result.verdict),
            _warnings(result.warnings),
            _tables(result),
        ]
    )


def _comparison_head(comparison: Comparison) -> _Markup:
    result, series, units = comparison.result, comparison.series, comparison.system.units
    both = format_with_error(result.beta_f_per_atom, result.beta_f_per_atom_std_error)
    outcomes = {True: "agree", False: "disagree", None: "not told"}
    checks = [
        (check.name, outcomes[check.passed], check.model, check.md, check.statistic, _p_value(check.p_value))
        for check in comparison.checks
    ]
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in comparison.wall_seconds.items() if name != "total")
    facts = [
        *comparison.facts,
        ("positions", f"{series.resolution:.2g}", f"{units.length}, to which the file rounds them"),
        ("wall time", f"{comparison.wall_seconds.get('total', math.nan):.1f} s", seconds),
    ]
    heads = ("check", "outcome", "model", "MD", "statistic", "p-value")
    return _join(
        [
            _title(result),
            _tag("p", f"Model against trajectory: β{comparison.symbol} / N = {both} kT per atom", class_="headline"),
            _verdict(comparison.verdict, comparison.sentence),
            _warnings(comparison.warnings),
            _tag("section", _tag("h2", "Checks"), _table(checks, heads), class_="checks"),
            _tag(
                "div",
                _tag(
                    "section", _tag("h2", "Trajectory and model"), _tag("p", series.path, class_="what"), _table(facts)
                ),
                _tag(
                    "section", _tag("h2", f"β{comparison.symbol} / N [kT per atom]"), _table(comparison.free_energies)
                ),
                class_="tables",
            ),
        ]
    )


def _small_print(result: Result, provenance: Mapping[str, Any]) -> _Markup:
    """Versions in a line, and the input with every default behind a click."""
    provenance = {"config": result.system.config, **result.provenance, **provenance}
    simple = [f"{key} {value}" for key, value in provenance.items() if isinstance(value, str | int | float)]
    parts = [_tag("p", "Made by " + ", ".join(simple) + ".")] if simple else []
    if provenance.get("config"):
        text = json.dumps(provenance["config"], indent=2, default=str, ensure_ascii=False)
        parts.append(_tag("details", _tag("summary", "Input, with every default"), _tag("pre", text)))
    return _tag("footer", *parts)


def _with_error(average: Average) -> str:
    return format_with_error(float(average.mean), float(average.std_error))


def _count(n: int) -> str:
    return f"{n:,}".replace(",", " ")


def _p_value(p: float) -> str:
    if math.isnan(p):
        return ""
    return f"{p:.2g}" if p >= 1e-3 else f"{p:.0e}" if p > 0 else "0"


def _symbol(unit: str) -> str:
    return _SYMBOLS.get(unit, unit)


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{100 * share:.3g} %"


# ------------------------------------------------------------------------- drawing

_LOCK = threading.Lock()
_STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.5,
    "svg.hashsalt": "freeflow",
}


@contextmanager
def _plain_style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's settings; they are global, so one page at a time."""
    import matplotlib.style

    with _LOCK, matplotlib.style.context(["default", _STYLE]):
        yield


def _panels(*heights: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other that share the x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, sum(heights) + 0.3), layout="constrained", facecolor="white")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    return figure, list(axes[:, 0])


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.2, columnspacing=1.2)


def _steps(axes: Axes, edges: np.ndarray, values: np.ndarray, colour: str, label: str, fill: float = 0.18) -> None:
    axes.stairs(values, edges, color=colour, label=label, linewidth=1.5)
    axes.stairs(values, edges, color=colour, fill=True, alpha=fill, linewidth=0)


def _bars(axes: Axes, x: np.ndarray, values: np.ndarray, errors: np.ndarray, colour: str) -> None:
    axes.errorbar(x, values, yerr=np.nan_to_num(errors), fmt="none", ecolor=colour, elinewidth=1.1)


def _line_with_band(
    axes: Axes, value: float, error: float, colour: str, label: str | None, across: bool = False
) -> None:
    """A straight line, upright unless `across`, with one standard error on either side."""
    line, span = (axes.axhline, axes.axhspan) if across else (axes.axvline, axes.axvspan)
    if math.isfinite(value):
        line(value, color=colour, linestyle="--", linewidth=1.2, label=label)
        if math.isfinite(error):
            span(value - error, value + error, color=colour, alpha=0.18, linewidth=0)


def _finite(values: Any) -> np.ndarray:
    """Values that can be drawn: squares of larger ones overflow."""
    array = np.asarray(values, float)
    return array[np.abs(array) < 1e100]


def _edges(*samples: np.ndarray) -> np.ndarray:
    """Bins that show the bulk of every sample; far outliers lie beyond."""
    lows, highs, steps = [], [], []
    for x in samples:
        low, high = np.quantile(x, [0.005, 0.995])
        spread = high - low
        lows.append(max(x.min(), low - 0.5 * spread))
        highs.append(min(x.max(), high + 0.5 * spread))
        # Scott's rule, with the standard deviation that a Gaussian of this spread has.
        steps.append(3.5 * spread / 5.15 / np.cbrt(len(x)))
    low, high = min(lows), max(highs)
    size = max(1.0, abs(low), abs(high))
    if high - low <= 1e-9 * size:  # all the same
        low, high = low - 0.5 * size, high + 0.5 * size
    step = min((step for step in steps if step > 0), default=high - low)
    return np.linspace(low, high, int(np.clip((high - low) / step, 10, 100)) + 1)


def _density(x: np.ndarray, edges: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Probability density of x in bins, of which those beyond are part too, and its standard error."""
    w = np.ones(len(x)) if weights is None else weights
    scale = w.sum() * np.diff(edges)
    sums, squares = np.histogram(x, edges, weights=w)[0], np.histogram(x, edges, weights=w**2)[0]
    return sums / scale, np.sqrt(squares) / scale


def _centres(edges: np.ndarray) -> np.ndarray:
    return 0.5 * (edges[1:] + edges[:-1])


def _few(n: int, most: int = _MAX_POINTS) -> np.ndarray:
    """Numbers from 0 to n - 1, evenly spaced and at most so many."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)) if n else np.empty(0, int)


def _extremes(values: np.ndarray, most: int = _MAX_POINTS) -> np.ndarray:
    """Indices of a series' lows and highs, stretch by stretch: at most so many, and they draw the same curve."""
    if len(values) <= most:
        return np.arange(len(values))
    bounds = np.linspace(0, len(values), most // 2 + 1).astype(int)
    chosen = []
    for first, last in itertools.pairwise(bounds):
        finite = first + np.flatnonzero(np.isfinite(values[first:last]))
        if len(finite):
            chosen += [finite[np.argmin(values[finite])], finite[np.argmax(values[finite])]]
    return np.unique(np.array(chosen, int))


# ------------------------------------------------------------------------- figures of an estimate


def _sides(result: Result) -> dict[str, np.ndarray]:
    """Forward and reverse work, if there are any."""
    parts = {"forward": result.work.forward, "reverse": result.work.reverse}
    return {name: np.asarray(values, float) for name, values in parts.items() if len(values)}


def _work_plot(result: Result) -> Plot | None:
    """Distributions of forward work and of minus the reverse work, which cross at the free energy difference."""
    sides = _sides(result)
    shown = {name: sign * _finite(sides.get(name, ())) for name, sign in (("forward", 1), ("reverse", -1))}
    shown = {name: x for name, x in shown.items() if len(x)}
    if not shown:
        return None
    edges = _edges(*shown.values())
    columns: dict[str, Any] = {"low [kT]": edges[:-1], "high [kT]": edges[1:]}
    figure, (axes,) = _panels(3.4)
    texts = []
    for name, x in shown.items():
        label, colour, sign = {"forward": ("forward", _MODEL, 1), "reverse": ("minus reverse", _MD, -1)}[name]
        density, error = _density(x, edges)
        _steps(axes, edges, density, colour, f"{label} work")
        columns |= {f"{name} density [1/kT]": density, f"{name} standard error [1/kT]": error}
        text = f"{_count(len(sides[name]))} samples {name}, mean {sign * np.mean(x):.4g} kT"
        text += f", variance {np.var(x, ddof=1):.3g} kT²" if len(x) > 1 else ""
        invalid = int(np.sum(np.isnan(sides[name]) | np.isneginf(sides[name])))
        for number, what in (
            (len(sides[name]) - len(x) - invalid, "with infinite work (an atom left its site) not shown"),
            (invalid, "without a valid work value"),
            (int(np.sum((x < edges[0]) | (x > edges[-1]))), "beyond the axis"),
        ):
            text += f", {_count(number)} {what}" if number else ""
        texts.append(text)
    _line_with_band(axes, result.delta_f, result.delta_f_std_error, "black", "ΔF")
    axes.set(xlabel="work [kT]", ylabel="probability density [1/kT]", xlim=(edges[0], edges[-1]))
    _legend(axes)
    caption = "Work of carrying the reference to the crystal: " + "; ".join(texts) + ". "
    caption += "The narrower the distribution, the better. "
    if len(shown) == 2:
        caption += "The two distributions cross at the free energy difference. "
    caption += f"Dashed: {format_with_error(result.delta_f, result.delta_f_std_error)} kT."
    return Plot("work", "Work", figure, caption, columns)


def _log_weights(result: Result, g: float) -> dict[str, np.ndarray]:
    """Logarithms of the weights that enter the estimator, by direction."""
    sides = _sides(result)
    if result.estimator != "bar" or len(sides) < 2:
        return {"forward": -sides["forward"]} if "forward" in sides else {}
    shift = bennett_shift(result.work, result.delta_f, (1.0, g))
    return {"forward": log_expit(shift - sides["forward"]), "reverse": log_expit(-shift - sides["reverse"])}


def _weights_plot(result: Result, g: float) -> Plot | None:
    """How much of the weight the heaviest samples carry."""
    columns: dict[str, list[Any]] = {"side": [], "share of samples": [], "share of weight": []}
    figure, (axes,) = _panels(3.4)
    texts = []
    for name, log_weights in _log_weights(result, g).items():
        top = np.max(log_weights)
        if not np.isfinite(top):
            continue
        weights = np.sort(np.exp(log_weights - top))[::-1]
        n = len(weights)
        chosen = np.unique(np.geomspace(1, n, 400).round().astype(int))
        x, y = chosen / n, (np.cumsum(weights) / weights.sum())[chosen - 1]
        axes.plot(
            x, y, color=_MODEL if name == "forward" else _MD, label=f"{name} samples", marker="." if n < 2 else ""
        )
        columns["side"] += [name] * len(x)
        columns["share of samples"] += x.tolist()
        columns["share of weight"] += y.tolist()
        k = max(1, round(n / 100))
        share = weights[:k].sum() / weights.sum()
        texts.append(f"The {k} heaviest of {_count(n)} {name} samples carry {_percent(share)} of the weight. ")
    if not texts:
        return None
    smallest = min(columns["share of samples"])
    even = np.geomspace(smallest, 1.0, 100) if smallest < 1 else np.ones(1)
    axes.plot(even, even, color=_GREY, linestyle=":", label="all weights equal")
    axes.set(xscale="log", xlabel="share of the samples, heaviest first", ylabel="share of the weight", ylim=(0, 1.03))
    _legend(axes)
    kind = "weights exp(-work)" if len(texts) == 1 else "weights in BAR's averages"
    caption = f"Sum of the {kind}. {''.join(texts)}The closer to the dotted line, the better. "
    caption += f"Effective sample size {_percent(result.ess_fraction)}"
    caption += f", Pareto k {result.pareto_k:.2f}" if math.isfinite(result.pareto_k) else ""
    share = result.largest_weight_share
    caption += f", largest weight {_percent(share)}" if math.isfinite(share) else ""
    caption += ", on the worse side." if len(texts) > 1 else "."
    return Plot("weights", "Weights", figure, caption, columns)


def _inefficiency(result: Result) -> float:
    """Statistical inefficiency of the reverse work: the one that BAR's error bar is explained by."""
    work, error = result.work, result.delta_f_std_error
    if result.estimator != "bar" or not error > 0 or min(map(len, work)) < 2:
        return 1.0

    def excess(g: float) -> float:
        return float(bar(work, (1.0, g)).std_error) - error

    most = float(len(work.reverse))
    if not excess(1.0) < 0 < excess(most):  # NaN on either side too
        return 1.0
    return float(root_scalar(excess, bracket=(1.0, most), rtol=1e-6).root)


def _running_plot(result: Result, g: float) -> Plot | None:
    """The estimate from a growing part of the samples, in their order and against it."""
    n_atoms, sides = result.n_atoms, _sides(result)
    constants = math.fsum(term for name, term in result.components.items() if name != "work")
    two_sided = result.estimator == "bar"
    if "forward" not in sides or (two_sided and "reverse" not in sides):
        return None

    def answer(part: Callable[[np.ndarray, float], np.ndarray], share: float) -> tuple[float, float]:
        used = {name: part(values, share) for name, values in sides.items()}
        both = record(used["forward"], used.get("reverse"))
        estimate = bar(both, (1.0, g)) if two_sided else fep(both)
        value = (constants + float(estimate.delta_f)) / n_atoms
        return (value, float(estimate.std_error) / n_atoms) if math.isfinite(value) else (math.nan, math.nan)

    fewest = min(len(sides[name]) for name in (("forward", "reverse") if two_sided else ("forward",)))
    shares = np.arange(1, _RUNNING_POINTS + 1) / _RUNNING_POINTS
    shares = shares[np.round(shares * fewest) >= min(2, fewest)]
    first = np.array([answer(lambda x, share: x[: round(share * len(x))], share) for share in shares])
    last = np.array([answer(lambda x, share: x[len(x) - round(share * len(x)) :], share) for share in shares])
    value, error = result.beta_f_per_atom, result.beta_f_per_atom_std_error
    # The first few samples may be far off: the axis shows what comes after.
    shown = np.concatenate([np.array([(value, error)]), first[shares >= 0.1], last[shares >= 0.1]])
    spans = _finite(shown[:, :1] + np.nan_to_num(shown[:, 1:]) * np.array([[-1.0, 1.0]]))
    if not len(spans):
        return None
    figure, (axes,) = _panels(3.4)
    _line_with_band(axes, value, error, "black", "all samples", across=True)
    for (estimates, errors), colour, marker, label in (
        (first.T, _MODEL, "o", "first samples"),
        (last.T, _MD, "s", "last samples"),
    ):
        axes.plot(100 * shares, estimates, color=colour, marker=marker, markersize=3.5, label=label)
        axes.fill_between(100 * shares, estimates - errors, estimates + errors, color=colour, alpha=0.2, linewidth=0)
    margin = 0.08 * (spans.max() - spans.min()) or 1e-3 * max(1.0, abs(float(spans[0])))
    low, high = spans.min() - margin, spans.max() + margin
    published = result.system.published
    if published is not None and low < published.beta_f_per_atom < high:
        _line_with_band(
            axes, published.beta_f_per_atom, published.std_error or 0.0, _PUBLISHED, "published", across=True
        )
    axes.set(xlabel="share of the samples [%]", ylabel="βF / N [kT per atom]", xlim=(0, 101), ylim=(low, high))
    _legend(axes)
    columns = {
        "share": shares,
        "samples forward": [round(share * len(sides["forward"])) for share in shares],
        "first samples [kT per atom]": first[:, 0],
        "first samples standard error": first[:, 1],
        "last samples [kT per atom]": last[:, 0],
        "last samples standard error": last[:, 1],
    }
    caption = f"The estimate ({result.estimator.upper()}) from the first and from the last part of the samples"
    caption += " of both directions" if two_sided else ""
    caption += ", with one standard error, and from all of them (dashed). "
    caption += "It has converged where both curves stay within their errors of the dashed line."
    return Plot("running", "Running estimate", figure, caption, columns)


def _overlap_plot(result: Result, g: float) -> Plot | None:
    """Distributions of the work of samples that the other state would claim, the same for both by Crooks' theorem."""
    sides = _sides(result)
    if len(sides) < 2 or any(np.isnan(w).any() or np.isneginf(w).any() for w in sides.values()):
        return None
    delta_f = result.delta_f if result.estimator == "bar" else float(bar(result.work).delta_f)
    if not math.isfinite(delta_f):
        return None
    shift = bennett_shift(result.work, delta_f, (1.0, g))
    finite = {name: _finite(w) for name, w in sides.items()}
    if not all(map(len, finite.values())):
        return None
    x = {"reference": finite["forward"], "crystal": -finite["reverse"]}
    weights = {"reference": expit(shift - x["reference"]), "crystal": expit(x["crystal"] - shift)}
    edges = _edges(*x.values())
    columns: dict[str, Any] = {"low [kT]": edges[:-1], "high [kT]": edges[1:]}
    figure, (axes,) = _panels(3.4)
    for (name, values), colour, spread in zip(x.items(), (_MODEL, _MD), (1.0, math.sqrt(g)), strict=True):
        if not weights[name].any():
            return None
        density, independent = _density(values, edges, weights[name])
        error = spread * independent
        _steps(axes, edges, density, colour, f"samples of the {name}")
        _bars(axes, _centres(edges), density, error, colour)
        columns |= {f"{name} density [1/kT]": density, f"{name} standard error [1/kT]": error}
    _line_with_band(axes, result.delta_f, result.delta_f_std_error, "black", "ΔF")
    axes.set(xlabel="work [kT]", ylabel="probability density [1/kT]", xlim=(edges[0], edges[-1]))
    _legend(axes)
    matrix = _overlap_matrix(result.work, delta_f)
    rows = "; ".join(" ".join(f"{entry:.3f}" for entry in row) for row in matrix)
    caption = (
        "Work, each sample weighted by the chance that it is of the other state. Both curves are the same but for "
        f"chance if forward and reverse work fit together (Crooks). Overlap {1 - np.linalg.det(matrix):.3f}: 1 if the "
        f"states are the same, too little for BAR below 0.03. Overlap matrix (reference, crystal): {rows}."
    )
    return Plot("overlap", "Overlap", figure, caption, columns)


def _overlap_matrix(work: Work, delta_f: float) -> np.ndarray:
    """Overlap matrix (2, 2) of reference and crystal; rows add up to 1.

    References: Klimovich, Shirts and Mobley, J. Comput. Aided Mol. Des. 29, 397 (2015).
    """
    forward, reverse = np.asarray(work.forward), np.asarray(work.reverse)
    logit = bennett_shift(work, delta_f) - np.concatenate([forward, -reverse])
    both = float(np.sum(expit(logit) * expit(-logit)))
    a, b = both / len(forward), both / len(reverse)
    return np.array([[1 - a, a], [b, 1 - b]])


# ------------------------------------------------------------------------- figures of a comparison


def _distribution_plot(distribution: Distribution, name: str, title: str, quantity: str, unit: str) -> Plot:
    """Histograms of model and trajectory."""
    edges, model, md = distribution.edges, distribution.model, distribution.md
    width = np.diff(edges)
    figure, (axes,) = _panels(3.4)
    for average, mean, text, colour, offset in (
        (model, distribution.model_mean, "model", _MODEL, -0.12),
        (md, distribution.md_mean, "MD", _MD, 0.12),  # side by side, so that no bar hides another
    ):
        _steps(axes, edges, average.mean, colour, text)
        _bars(axes, _centres(edges) + offset * width, average.mean, average.std_error, colour)
        _line_with_band(axes, float(mean.mean), float(mean.std_error), colour, None)
    inverse = f"1/{unit}" if "/" not in unit else f"1/({unit})"
    axes.set(xlabel=f"{quantity} [{unit}]", ylabel=f"probability density [{inverse}]", xlim=(edges[0], edges[-1]))
    axes.set_ylim(bottom=0)
    _legend(axes)
    means = ", ".join(
        f"{text} {_with_error(mean)}"
        for text, mean in (("model", distribution.model_mean), ("MD", distribution.md_mean))
    )
    caption = f"Bars are one standard error; dashed lines are the means: {means}."
    return Plot(name, title, figure, caption, {"low": edges[:-1], "high": edges[1:], **_model_and_md(model, md)})


def _model_and_md(model: Average, md: Average | None) -> dict[str, np.ndarray]:
    columns = {"model": model.mean, "model standard error": model.std_error}
    return columns if md is None else columns | {"MD": md.mean, "MD standard error": md.std_error}


def _profile_plot(profile: Profile, units: UnitStyle) -> Plot:
    """Radial distribution function, and below it the difference of model and trajectory."""
    edges, model, md = profile.edges, profile.model, profile.md
    r, length = _centres(edges), _symbol(units.length)
    figure, (top, *below) = _panels(3.0) if md is None else _panels(2.8, 1.3)
    _curve_with_band(top, r, model, _MODEL, "model", width=1.5 if md is None else 3.5)
    columns = {f"low [{units.length}]": edges[:-1], f"high [{units.length}]": edges[1:], **_model_and_md(model, md)}
    caption = "Radial distribution function of the crystal from weighted samples"
    if md is not None:
        _curve_with_band(top, r, md, _MD, "MD", width=1.2)
        error = np.hypot(model.std_error, md.std_error)
        known = error > 0
        z = np.where(known, (model.mean - md.mean) / np.where(known, error, 1.0), math.nan)
        below[0].axhspan(-2, 2, color=_GREY, alpha=0.18, linewidth=0)
        below[0].plot(r, z, color="black", marker=".", markersize=3, linewidth=0.7)
        reach = max(3.5, 1.1 * float(np.max(np.abs(_finite(z)), initial=0.0)))
        below[0].set(ylim=(-reach, reach), ylabel="(model - MD)\n/ error")
        columns["difference in standard errors"] = z
        caption += " and from the trajectory. Below: their difference in standard errors; the band is 2 on either side"
    top.set(ylabel="g(r)", xlim=(edges[0], edges[-1]))
    top.set_ylim(bottom=0)
    (below[0] if below else top).set_xlabel(f"distance [{length}]")
    _legend(top)
    return Plot("rdf", "Radial distribution function", figure, f"{caption}. Shaded: one standard error.", columns)


def _curve_with_band(axes: Axes, x: np.ndarray, average: Average, colour: str, label: str, width: float) -> None:
    axes.plot(x, average.mean, color=colour, label=label, linewidth=width, alpha=0.45 if width > 2 else 1.0)
    low, high = average.mean - average.std_error, average.mean + average.std_error
    axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)


def _series_plot(series: FrameSeries, start: int, n_atoms: int, units: UnitStyle) -> Plot | None:
    """Energy and mean squared displacement, frame by frame."""
    if series.n_frames == 0:
        return None
    sound = np.asarray(series.sound)
    energy = np.where(sound, series.energies, math.nan) / n_atoms
    spread = np.where(sound, series.mean_squared_displacements, math.nan)
    lost = np.flatnonzero(~sound)
    lost = lost[_few(len(lost), 400)]
    half = _MAX_POINTS // 2
    shown = np.unique(np.concatenate([_extremes(energy, half), _extremes(spread, half), lost]))
    figure, panels = _panels(1.9, 1.9)
    labels = (f"energy per atom\n[{_symbol(units.energy)}]", f"mean squared\ndisplacement [{_symbol(units.length)}²]")
    for axes, values, label in zip(panels, (energy, spread), labels, strict=True):
        mine = shown[np.isfinite(values[shown])]
        axes.plot(
            mine,
            values[mine],
            color=_MD,
            linewidth=0.5 if len(mine) > 500 else 0.9,
            marker="." if len(mine) < 60 else "",
            label="frames",
        )
        axes.set_ylabel(label)
        if start > 0:
            axes.axvspan(0, start, color=_GREY, alpha=0.2, linewidth=0, label="left out: equilibration")
            axes.axvline(start, color=_GREY, linewidth=1)
        if len(lost):
            level = np.full(len(lost), 0.03)
            axes.plot(
                lost,
                level,
                color=_ALARM,
                marker="x",
                markersize=4,
                linestyle="",
                transform=axes.get_xaxis_transform(),
                label="not of this crystal",
                clip_on=False,
            )
    panels[1].set(xlabel="frame", xlim=(-0.01 * series.n_frames, 1.01 * series.n_frames))
    panels[1].locator_params(axis="x", nbins=6)
    _legend(panels[0])
    n_lost = int(np.sum(~sound))
    caption = f"{_count(series.n_frames)} frames; equilibrium from frame {_count(start)} on. "
    caption += f"{_count(n_lost)} frames with an atom off its site are marked at the bottom. " if n_lost else ""
    caption += f"Lows and highs of {_count(len(shown))} frames are drawn." if len(shown) < series.n_frames else ""
    columns = {
        "frame": shown,
        f"energy per atom [{units.energy}]": energy[shown],
        f"mean squared displacement [{units.length}^2]": spread[shown],
        "sound": sound[shown].astype(int),
    }
    return Plot("series", "Trajectory", figure, caption.strip(), columns)


def _file_energy_plot(series: FrameSeries, units: UnitStyle) -> Plot | None:
    """Energies in the file against recomputed ones."""
    comparison = series.energy_comparison
    factor = OTHER_ENERGIES.get(units.name, {}).get(comparison.unit, 1.0)
    theirs = factor * np.asarray(series.file_energies, float)
    ours = np.asarray(series.energies, float)
    known = np.flatnonzero(np.isfinite(theirs) & np.isfinite(ours))
    if not len(known):
        return None
    difference = (theirs - ours)[known]
    some = _extremes(difference)
    shown = known[some]
    figure, (axes,) = _panels(2.6)
    precision, offset = comparison.precision, comparison.offset or 0.0
    if precision > 0:
        axes.axhspan(
            offset - precision, offset + precision, color=_GREY, alpha=0.2, linewidth=0, label="explained by rounding"
        )
    (line,) = axes.plot(shown, difference[some], color=_MD, label="file - recomputed", linewidth=0.6)
    if len(some) == len(difference):
        line.set(linestyle="", marker=".", markersize=3)
    axes.set(xlabel="frame", ylabel=f"difference [{_symbol(units.energy)}]")
    if not np.ptp(difference) and not precision > 0:
        size = 1e-9 * max(1.0, float(np.abs(ours[known]).max()))
        axes.set_ylim(difference[0] - size, difference[0] + size)
    _legend(axes)
    caption = f"Total energies of {_count(len(known))} frames in the file less those of the model's potential: "
    caption += f"{comparison.verdict}."
    columns = {
        "frame": shown,
        f"in the file [{units.energy}]": theirs[shown],
        f"recomputed [{units.energy}]": ours[shown],
        f"difference [{units.energy}]": difference[some],
    }
    return Plot("file_energies", "Energies in the file", figure, caption, columns)
