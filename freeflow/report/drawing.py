"""What figures are drawn with: colours, panels, bins, and thinning of long curves."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from freeflow.observables import Average
from freeflow.result import format_with_error

if TYPE_CHECKING:  # imported when there is something to draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which differ to every eye and in grey.
MODEL, MD, PUBLISHED, GREY, ALARM = "#0072B2", "#D55E00", "#009E73", "#777777", "#B3261E"
MAX_POINTS = 2000  # of a curve; more make the page large and the picture no better
_SYMBOLS = {"epsilon": "ε", "sigma": "\N{GREEK SMALL LETTER SIGMA}", "angstrom": "Å"}


class Plot(NamedTuple):
    """A figure, and the numbers that it shows."""

    name: str  # part of the CSV file's name
    title: str
    figure: Figure
    caption: str
    columns: Mapping[str, Iterable[Any]]  # of the CSV file, all of one length


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
def plain_style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's settings; they are global, so one page at a time."""
    import matplotlib.style

    with _LOCK, matplotlib.style.context(["default", _STYLE]):
        yield


def panels(*heights: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other that share the x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, sum(heights) + 0.3), layout="constrained", facecolor="white")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    return figure, list(axes[:, 0])


def draw_legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.2, columnspacing=1.2)


def draw_steps(axes: Axes, edges: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Draw a histogram.

    Args:
        axes: Where.
        edges: Of the bins, (n + 1,).
        values: Of the bins, (n,).
        colour: Of line and filling.
        label: For the legend.
    """
    axes.stairs(values, edges, color=colour, label=label, linewidth=1.5)
    axes.stairs(values, edges, color=colour, fill=True, alpha=0.18, linewidth=0)


def draw_error_bars(axes: Axes, x: np.ndarray, values: np.ndarray, errors: np.ndarray, colour: str) -> None:
    """Draw error bars.

    Args:
        axes: Where.
        x: Of the bars, (n,).
        values: Their middles, (n,).
        errors: One standard error, (n,); none is drawn where it is NaN.
        colour: Of the bars.
    """
    axes.errorbar(x, values, yerr=np.nan_to_num(errors), fmt="none", ecolor=colour, elinewidth=1.1)


def draw_line(axes: Axes, value: float, error: float, colour: str, label: str | None, across: bool = False) -> None:
    """Draw a straight line with one standard error on either side.

    Args:
        axes: Where.
        value: At which the line stands; if it is not finite, nothing is drawn.
        error: One standard error; no band if it is not finite.
        colour: Of line and band.
        label: For the legend.
        across: Lying, not upright.
    """
    line, span = (axes.axhline, axes.axhspan) if across else (axes.axvline, axes.axvspan)
    if math.isfinite(value):
        line(value, color=colour, linestyle="--", linewidth=1.2, label=label)
        if math.isfinite(error):
            span(value - error, value + error, color=colour, alpha=0.18, linewidth=0)


def drawable(values: Any) -> np.ndarray:
    """Values that can be drawn: squares of larger ones overflow."""
    array = np.asarray(values, float)
    return array[np.abs(array) < 1e100]


def bin_edges(*samples: np.ndarray) -> np.ndarray:
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


def density_in(x: np.ndarray, edges: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Probability density of x in bins, of which those beyond are part too, and its standard error."""
    w = np.ones(len(x)) if weights is None else weights
    scale = w.sum() * np.diff(edges)
    sums, squares = np.histogram(x, edges, weights=w)[0], np.histogram(x, edges, weights=w**2)[0]
    return sums / scale, np.sqrt(squares) / scale


def bin_centres(edges: np.ndarray) -> np.ndarray:
    """Middles of bins."""
    return 0.5 * (edges[1:] + edges[:-1])


def evenly_spaced(n: int, most: int = MAX_POINTS) -> np.ndarray:
    """Numbers from 0 to n - 1, evenly spaced and at most so many."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)) if n else np.empty(0, int)


def extremes(values: np.ndarray, most: int = MAX_POINTS) -> np.ndarray:
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


def unit_symbol(unit: str) -> str:
    """A unit as it is written in print."""
    return _SYMBOLS.get(unit, unit)


def grouped(n: int) -> str:
    """A whole number with its digits in threes."""
    return f"{n:,}".replace(",", " ")


def in_percent(share: float) -> str:
    """A share in per cent, or unknown."""
    return "unknown" if math.isnan(share) else f"{100 * share:.3g} %"


def in_brackets(average: Average) -> str:
    """A mean with its standard error in brackets."""
    return format_with_error(float(average.mean), float(average.std_error))
