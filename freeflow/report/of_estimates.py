"""Figures of an estimate: its work, weights, convergence and overlap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import expit, log_expit

from freeflow.estimators import bar, fep, record
from freeflow.estimators.two_state import bennett_shift
from freeflow.report.drawing import (
    GREY,
    MD,
    MODEL,
    PUBLISHED,
    Plot,
    bin_centres,
    bin_edges,
    density_in,
    draw_error_bars,
    draw_legend,
    draw_line,
    draw_steps,
    drawable,
    grouped,
    in_percent,
    panels,
)
from freeflow.result import Result, format_with_error
from freeflow.types import Work

_RUNNING_POINTS = 20


def _sides(result: Result) -> dict[str, np.ndarray]:
    """Forward and reverse work, if there are any."""
    parts = {"forward": result.work.forward, "reverse": result.work.reverse}
    return {name: np.asarray(values, float) for name, values in parts.items() if len(values)}


def work_plot(result: Result) -> Plot | None:
    """Distributions of forward work and of minus the reverse work, which cross at the free energy difference."""
    sides = _sides(result)
    shown = {name: sign * drawable(sides.get(name, ())) for name, sign in (("forward", 1), ("reverse", -1))}
    shown = {name: x for name, x in shown.items() if len(x)}
    if not shown:
        return None
    edges = bin_edges(*shown.values())
    columns: dict[str, Any] = {"low [kT]": edges[:-1], "high [kT]": edges[1:]}
    figure, (axes,) = panels(3.4)
    texts = []
    for name, x in shown.items():
        label, colour, sign = {"forward": ("forward", MODEL, 1), "reverse": ("minus reverse", MD, -1)}[name]
        density, error = density_in(x, edges)
        draw_steps(axes, edges, density, colour, f"{label} work")
        columns |= {f"{name} density [1/kT]": density, f"{name} standard error [1/kT]": error}
        text = f"{grouped(len(sides[name]))} samples {name}, mean {sign * np.mean(x):.4g} kT"
        text += f", variance {np.var(x, ddof=1):.3g} kT²" if len(x) > 1 else ""
        invalid = int(np.sum(np.isnan(sides[name]) | np.isneginf(sides[name])))
        for number, what in (
            (len(sides[name]) - len(x) - invalid, "with infinite work (an atom left its site) not shown"),
            (invalid, "without a valid work value"),
            (int(np.sum((x < edges[0]) | (x > edges[-1]))), "beyond the axis"),
        ):
            text += f", {grouped(number)} {what}" if number else ""
        texts.append(text)
    draw_line(axes, result.delta_f, result.delta_f_std_error, "black", "ΔF")
    axes.set(xlabel="work [kT]", ylabel="probability density [1/kT]", xlim=(edges[0], edges[-1]))
    draw_legend(axes)
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


def weights_plot(result: Result, g: float) -> Plot | None:
    """How much of the weight the heaviest samples carry."""
    columns: dict[str, list[Any]] = {"side": [], "share of samples": [], "share of weight": []}
    figure, (axes,) = panels(3.4)
    texts = []
    for name, log_weights in _log_weights(result, g).items():
        top = np.max(log_weights)
        if not np.isfinite(top):
            continue
        weights = np.sort(np.exp(log_weights - top))[::-1]
        n = len(weights)
        chosen = np.unique(np.geomspace(1, n, 400).round().astype(int))
        x, y = chosen / n, (np.cumsum(weights) / weights.sum())[chosen - 1]
        axes.plot(x, y, color=MODEL if name == "forward" else MD, label=f"{name} samples", marker="." if n < 2 else "")
        columns["side"] += [name] * len(x)
        columns["share of samples"] += x.tolist()
        columns["share of weight"] += y.tolist()
        k = max(1, round(n / 100))
        share = weights[:k].sum() / weights.sum()
        texts.append(f"The {k} heaviest of {grouped(n)} {name} samples carry {in_percent(share)} of the weight. ")
    if not texts:
        return None
    smallest = min(columns["share of samples"])
    even = np.geomspace(smallest, 1.0, 100) if smallest < 1 else np.ones(1)
    axes.plot(even, even, color=GREY, linestyle=":", label="all weights equal")
    axes.set(xscale="log", xlabel="share of the samples, heaviest first", ylabel="share of the weight", ylim=(0, 1.03))
    draw_legend(axes)
    kind = "weights exp(-work)" if len(texts) == 1 else "weights in BAR's averages"
    caption = f"Sum of the {kind}. {''.join(texts)}The closer to the dotted line, the better. "
    caption += f"Effective sample size {in_percent(result.ess_fraction)}"
    caption += f", Pareto k {result.pareto_k:.2f}" if math.isfinite(result.pareto_k) else ""
    share = result.largest_weight_share
    caption += f", largest weight {in_percent(share)}" if math.isfinite(share) else ""
    caption += ", on the worse side." if len(texts) > 1 else "."
    return Plot("weights", "Weights", figure, caption, columns)


def reverse_inefficiency(result: Result) -> float:
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


def running_plot(result: Result, g: float) -> Plot | None:
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
    spans = drawable(shown[:, :1] + np.nan_to_num(shown[:, 1:]) * np.array([[-1.0, 1.0]]))
    if not len(spans):
        return None
    figure, (axes,) = panels(3.4)
    draw_line(axes, value, error, "black", "all samples", across=True)
    for (estimates, errors), colour, marker, label in (
        (first.T, MODEL, "o", "first samples"),
        (last.T, MD, "s", "last samples"),
    ):
        axes.plot(100 * shares, estimates, color=colour, marker=marker, markersize=3.5, label=label)
        axes.fill_between(100 * shares, estimates - errors, estimates + errors, color=colour, alpha=0.2, linewidth=0)
    margin = 0.08 * (spans.max() - spans.min()) or 1e-3 * max(1.0, abs(float(spans[0])))
    low, high = spans.min() - margin, spans.max() + margin
    published = result.system.published
    if published is not None and low < published.beta_f_per_atom < high:
        draw_line(axes, published.beta_f_per_atom, published.std_error or 0.0, PUBLISHED, "published", across=True)
    axes.set(xlabel="share of the samples [%]", ylabel="βF / N [kT per atom]", xlim=(0, 101), ylim=(low, high))
    draw_legend(axes)
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


def overlap_plot(result: Result, g: float) -> Plot | None:
    """Distributions of the work of samples that the other state would claim, the same for both by Crooks' theorem."""
    sides = _sides(result)
    if len(sides) < 2 or any(np.isnan(w).any() or np.isneginf(w).any() for w in sides.values()):
        return None
    delta_f = result.delta_f if result.estimator == "bar" else float(bar(result.work).delta_f)
    if not math.isfinite(delta_f):
        return None
    shift = bennett_shift(result.work, delta_f, (1.0, g))
    finite = {name: drawable(w) for name, w in sides.items()}
    if not all(map(len, finite.values())):
        return None
    x = {"reference": finite["forward"], "crystal": -finite["reverse"]}
    weights = {"reference": expit(shift - x["reference"]), "crystal": expit(x["crystal"] - shift)}
    edges = bin_edges(*x.values())
    columns: dict[str, Any] = {"low [kT]": edges[:-1], "high [kT]": edges[1:]}
    figure, (axes,) = panels(3.4)
    for (name, values), colour, spread in zip(x.items(), (MODEL, MD), (1.0, math.sqrt(g)), strict=True):
        if not weights[name].any():
            return None
        density, independent = density_in(values, edges, weights[name])
        error = spread * independent
        draw_steps(axes, edges, density, colour, f"samples of the {name}")
        draw_error_bars(axes, bin_centres(edges), density, error, colour)
        columns |= {f"{name} density [1/kT]": density, f"{name} standard error [1/kT]": error}
    draw_line(axes, result.delta_f, result.delta_f_std_error, "black", "ΔF")
    axes.set(xlabel="work [kT]", ylabel="probability density [1/kT]", xlim=(edges[0], edges[-1]))
    draw_legend(axes)
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
