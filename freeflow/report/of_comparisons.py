"""Figures of a model beside a trajectory: distributions, g(r), and the frames."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from freeflow.comparison import Distribution
from freeflow.observables import Average
from freeflow.observers import Profile
from freeflow.report.drawing import (
    ALARM,
    GREY,
    MAX_POINTS,
    MD,
    MODEL,
    Plot,
    bin_centres,
    draw_error_bars,
    draw_legend,
    draw_line,
    draw_steps,
    drawable,
    evenly_spaced,
    extremes,
    grouped,
    in_brackets,
    panels,
    unit_symbol,
)
from freeflow.trajectories import FrameSeries
from freeflow.trajectories.recomputed import OTHER_ENERGIES
from freeflow.units import UnitStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def distribution_plot(distribution: Distribution, name: str, title: str, quantity: str, unit: str) -> Plot:
    """Draw the histograms of model and trajectory.

    Args:
        distribution: Both of them.
        name: Of the plot, part of the CSV file's name.
        title: Of the plot.
        quantity: On the x axis.
        unit: Of the quantity, as printed.
    """
    edges, model, md = distribution.edges, distribution.model, distribution.md
    width = np.diff(edges)
    figure, (axes,) = panels(3.4)
    for average, mean, text, colour, offset in (
        (model, distribution.model_mean, "model", MODEL, -0.12),
        (md, distribution.md_mean, "MD", MD, 0.12),  # side by side, so that no bar hides another
    ):
        draw_steps(axes, edges, average.mean, colour, text)
        draw_error_bars(axes, bin_centres(edges) + offset * width, average.mean, average.std_error, colour)
        draw_line(axes, float(mean.mean), float(mean.std_error), colour, None)
    inverse = f"1/{unit}" if "/" not in unit else f"1/({unit})"
    axes.set(xlabel=f"{quantity} [{unit}]", ylabel=f"probability density [{inverse}]", xlim=(edges[0], edges[-1]))
    axes.set_ylim(bottom=0)
    draw_legend(axes)
    means = ", ".join(
        f"{text} {in_brackets(mean)}"
        for text, mean in (("model", distribution.model_mean), ("MD", distribution.md_mean))
    )
    caption = f"Bars are one standard error; dashed lines are the means: {means}."
    return Plot(name, title, figure, caption, {"low": edges[:-1], "high": edges[1:], **_model_and_md(model, md)})


def profile_plot(profile: Profile, units: UnitStyle) -> Plot:
    """Radial distribution function, and below it the difference of model and trajectory."""
    edges, model, md = profile.edges, profile.model, profile.md
    r, length = bin_centres(edges), unit_symbol(units.length)
    figure, (top, *below) = panels(3.0) if md is None else panels(2.8, 1.3)
    _curve_with_band(top, r, model, MODEL, "model", width=1.5 if md is None else 3.5)
    columns = {f"low [{units.length}]": edges[:-1], f"high [{units.length}]": edges[1:], **_model_and_md(model, md)}
    caption = "Radial distribution function of the crystal from weighted samples"
    if md is not None:
        _curve_with_band(top, r, md, MD, "MD", width=1.2)
        error = np.hypot(model.std_error, md.std_error)
        known = error > 0
        z = np.where(known, (model.mean - md.mean) / np.where(known, error, 1.0), math.nan)
        below[0].axhspan(-2, 2, color=GREY, alpha=0.18, linewidth=0)
        below[0].plot(r, z, color="black", marker=".", markersize=3, linewidth=0.7)
        reach = max(3.5, 1.1 * float(np.max(np.abs(drawable(z)), initial=0.0)))
        below[0].set(ylim=(-reach, reach), ylabel="(model - MD)\n/ error")
        columns["difference in standard errors"] = z
        caption += " and from the trajectory. Below: their difference in standard errors; the band is 2 on either side"
    top.set(ylabel="g(r)", xlim=(edges[0], edges[-1]))
    top.set_ylim(bottom=0)
    (below[0] if below else top).set_xlabel(f"distance [{length}]")
    draw_legend(top)
    return Plot("rdf", "Radial distribution function", figure, f"{caption}. Shaded: one standard error.", columns)


def _model_and_md(model: Average, md: Average | None) -> dict[str, np.ndarray]:
    columns = {"model": model.mean, "model standard error": model.std_error}
    return columns if md is None else columns | {"MD": md.mean, "MD standard error": md.std_error}


def _curve_with_band(axes: Axes, x: np.ndarray, average: Average, colour: str, label: str, width: float) -> None:
    """A curve with one standard error on either side."""
    axes.plot(x, average.mean, color=colour, label=label, linewidth=width, alpha=0.45 if width > 2 else 1.0)
    low, high = average.mean - average.std_error, average.mean + average.std_error
    axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)


def series_plot(series: FrameSeries, start: int, n_atoms: int, units: UnitStyle) -> Plot | None:
    """Draw energy and mean squared displacement, frame by frame; None without frames.

    Args:
        series: The frames.
        start: First frame after equilibration.
        n_atoms: What energies are divided by.
        units: Of energies and lengths.
    """
    if series.n_frames == 0:
        return None
    sound = np.asarray(series.sound)
    energy = np.where(sound, series.energies, math.nan) / n_atoms
    spread = np.where(sound, series.mean_squared_displacements, math.nan)
    lost = np.flatnonzero(~sound)
    lost = lost[evenly_spaced(len(lost), 400)]
    half = MAX_POINTS // 2
    shown = np.unique(np.concatenate([extremes(energy, half), extremes(spread, half), lost]))
    figure, both = panels(1.9, 1.9)
    labels = (
        f"energy per atom\n[{unit_symbol(units.energy)}]",
        f"mean squared\ndisplacement [{unit_symbol(units.length)}²]",
    )
    for axes, values, label in zip(both, (energy, spread), labels, strict=True):
        mine = shown[np.isfinite(values[shown])]
        axes.plot(
            mine,
            values[mine],
            color=MD,
            linewidth=0.5 if len(mine) > 500 else 0.9,
            marker="." if len(mine) < 60 else "",
            label="frames",
        )
        axes.set_ylabel(label)
        if start > 0:
            axes.axvspan(0, start, color=GREY, alpha=0.2, linewidth=0, label="left out: equilibration")
            axes.axvline(start, color=GREY, linewidth=1)
        if len(lost):
            level = np.full(len(lost), 0.03)
            axes.plot(
                lost,
                level,
                color=ALARM,
                marker="x",
                markersize=4,
                linestyle="",
                transform=axes.get_xaxis_transform(),
                label="not of this crystal",
                clip_on=False,
            )
    both[1].set(xlabel="frame", xlim=(-0.01 * series.n_frames, 1.01 * series.n_frames))
    both[1].locator_params(axis="x", nbins=6)
    draw_legend(both[0])
    n_lost = int(np.sum(~sound))
    caption = f"{grouped(series.n_frames)} frames; equilibrium from frame {grouped(start)} on. "
    caption += f"{grouped(n_lost)} frames with an atom off its site are marked at the bottom. " if n_lost else ""
    caption += f"Lows and highs of {grouped(len(shown))} frames are drawn." if len(shown) < series.n_frames else ""
    columns = {
        "frame": shown,
        f"energy per atom [{units.energy}]": energy[shown],
        f"mean squared displacement [{units.length}^2]": spread[shown],
        "sound": sound[shown].astype(int),
    }
    return Plot("series", "Trajectory", figure, caption.strip(), columns)


def file_energy_plot(series: FrameSeries, units: UnitStyle) -> Plot | None:
    """Energies in the file against recomputed ones."""
    comparison = series.energy_comparison
    factor = OTHER_ENERGIES.get(units.name, {}).get(comparison.unit, 1.0)
    theirs = factor * np.asarray(series.file_energies, float)
    ours = np.asarray(series.energies, float)
    known = np.flatnonzero(np.isfinite(theirs) & np.isfinite(ours))
    if not len(known):
        return None
    difference = (theirs - ours)[known]
    some = extremes(difference)
    shown = known[some]
    figure, (axes,) = panels(2.6)
    precision, offset = comparison.precision, comparison.offset or 0.0
    if precision > 0:
        axes.axhspan(
            offset - precision, offset + precision, color=GREY, alpha=0.2, linewidth=0, label="explained by rounding"
        )
    (line,) = axes.plot(shown, difference[some], color=MD, label="file - recomputed", linewidth=0.6)
    if len(some) == len(difference):
        line.set(linestyle="", marker=".", markersize=3)
    axes.set(xlabel="frame", ylabel=f"difference [{unit_symbol(units.energy)}]")
    if not np.ptp(difference) and not precision > 0:
        size = 1e-9 * max(1.0, float(np.abs(ours[known]).max()))
        axes.set_ylim(difference[0] - size, difference[0] + size)
    draw_legend(axes)
    caption = f"Total energies of {grouped(len(known))} frames in the file less those of the model's potential: "
    caption += f"{comparison.verdict}."
    columns = {
        "frame": shown,
        f"in the file [{units.energy}]": theirs[shown],
        f"recomputed [{units.energy}]": ours[shown],
        f"difference [{units.energy}]": difference[some],
    }
    return Plot("file_energies", "Energies in the file", figure, caption, columns)
