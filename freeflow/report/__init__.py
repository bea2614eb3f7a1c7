"""Reports for the eye: one HTML page with figures and tables, and the numbers behind every figure as CSV.

A page needs nothing but itself: no scripts, fonts or pictures from elsewhere. Text from the user's
files is escaped by construction, see `markup.Markup`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freeflow.comparison import Comparison
from freeflow.report.drawing import plain_style, unit_symbol
from freeflow.report.markup import Markup, html_table, join, tag, verdict_box, warning_list, write_page
from freeflow.report.of_comparisons import distribution_plot, file_energy_plot, profile_plot, series_plot
from freeflow.report.of_estimates import overlap_plot, reverse_inefficiency, running_plot, weights_plot, work_plot
from freeflow.result import Result, format_with_error, in_words


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
    with plain_style():
        g = reverse_inefficiency(result)
        plots = [
            work_plot(result),
            weights_plot(result, g),
            running_plot(result, g),
            overlap_plot(result, g),
            result.profile and profile_plot(result.profile, result.system.units),
        ]
        return write_page(
            path, result.system.name, _estimate_head(result), plots, _small_print(result, result.provenance)
        )


def write_comparison_report(comparison: Comparison, path: str | os.PathLike[str]) -> list[Path]:
    """Write a comparison of model and trajectory as an HTML page with CSV files; as `write_estimate_report`."""
    units, series = comparison.system.units, comparison.series
    with plain_style():
        g = reverse_inefficiency(comparison.result)
        plots = [
            distribution_plot(
                comparison.energy, "energy", "Energy per atom", "potential energy per atom", unit_symbol(units.energy)
            ),
            profile_plot(comparison.profile, units),
            distribution_plot(
                comparison.displacement,
                "displacement",
                "Mean squared displacement",
                "mean squared displacement from the sites",
                f"{unit_symbol(units.length)}²",
            ),
            comparison.volume
            and distribution_plot(
                comparison.volume, "volume", "Volume", "volume per atom", f"{unit_symbol(units.length)}³"
            ),
            series_plot(series, comparison.start, comparison.system.n_atoms, units),
            work_plot(comparison.result),
            running_plot(comparison.result, g),
            overlap_plot(comparison.result, g),
            file_energy_plot(series, units),
        ]
        details = tag("details", tag("summary", "The free energy in detail"), _tables(comparison.result))
        foot = _small_print(comparison.result, comparison.provenance)
        return write_page(path, comparison.system.name, _comparison_head(comparison), plots, join([details, foot]))


def _title(result: Result) -> Markup:
    return join([tag("h1", result.system.name), tag("p", in_words(result.system), class_="what")])


def _tables(result: Result) -> Markup:
    sections = (tag("section", tag("h2", title), html_table(rows)) for title, rows in result.sections() if rows)
    return tag("div", *sections, class_="tables")


def _estimate_head(result: Result) -> Markup:
    value = format_with_error(result.beta_f_per_atom, result.beta_f_per_atom_std_error)
    return join(
        [
            _title(result),
            tag("p", f"βF / N = {value} kT per atom", class_="headline"),
            verdict_box(result.status, result.verdict),
            warning_list(result.warnings),
            _tables(result),
        ]
    )


def _comparison_head(comparison: Comparison) -> Markup:
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
    path = tag("p", series.path, class_="what")
    frames = tag("section", tag("h2", "Trajectory and model"), path, html_table(facts))
    title = tag("h2", f"β{comparison.symbol} / N [kT per atom]")
    energies = tag("section", title, html_table(comparison.free_energies))
    return join(
        [
            _title(result),
            tag("p", f"Model against trajectory: β{comparison.symbol} / N = {both} kT per atom", class_="headline"),
            verdict_box(comparison.verdict, comparison.sentence),
            warning_list(comparison.warnings),
            tag("section", tag("h2", "Checks"), html_table(checks, heads), class_="checks"),
            tag("div", frames, energies, class_="tables"),
        ]
    )


def _small_print(result: Result, provenance: Mapping[str, Any]) -> Markup:
    """Versions in a line, and the input with every default behind a click."""
    provenance = {"config": result.system.config, **result.provenance, **provenance}
    simple = [f"{key} {value}" for key, value in provenance.items() if isinstance(value, str | int | float)]
    parts = [tag("p", "Made by " + ", ".join(simple) + ".")] if simple else []
    if provenance.get("config"):
        text = json.dumps(provenance["config"], indent=2, default=str, ensure_ascii=False)
        parts.append(tag("details", tag("summary", "Input, with every default"), tag("pre", text)))
    return tag("footer", *parts)


def _p_value(p: float) -> str:
    if math.isnan(p):
        return ""
    return f"{p:.2g}" if p >= 1e-3 else f"{p:.0e}" if p > 0 else "0"
