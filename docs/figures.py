"""Tables of pages on accuracy and cost, made from systems and benchmark results when the site is built.

A page says where its table belongs by the line `<!-- figures -->`.
"""

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from benchmarks.__main__ import table  # noqa: E402
from benchmarks.calibration import tables  # noqa: E402
from benchmarks.suite import Figure  # noqa: E402
from freeflow import config as systems  # noqa: E402
from freeflow.result import format_with_error  # noqa: E402

MARK = "<!-- figures -->"


def on_page_markdown(markdown, page, config, files):
    """Put the tables into their pages."""
    make = {"accuracy.md": accuracy, "cost.md": suite}.get(page.file.src_uri)
    return markdown if make is None else markdown.replace(MARK, make())


def suite() -> str:
    """What the benchmark suite measured, run by run."""
    parts = []
    for path in sorted(RESULTS.glob("suite*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        on = ", ".join(f"{name} {value}" for name, value in run["versions"].items() if value != "not installed")
        figures = table([Figure(**figure) for figure in run["figures"]]).strip()
        parts += [f"## {run['command']}", f"On {on}.", figures]
    return "\n\n".join([*parts, *gpu()])


def gpu() -> list[str]:
    """What `benchmarks/gpu.py` measured on a GPU."""
    path = RESULTS / "gpu.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = ["| case | | batch | evaluations per second |", "|---|---|---|---|"]
    for row in found["kernels"]:
        three_digits = float(f"{row['evaluations_per_second']:.3g}")
        rate = f"{three_digits:,.0f}".replace(",", " ")
        rows.append(f"| {row['case']} | {row['dtype']} | {row['batch']} | {rate} |")
    heading = "## python benchmarks/gpu.py"
    return [heading, f"On one {found['device']}, JAX {found['jax']}; see [Speed](speed.md#gpus).", "\n".join(rows)]


def accuracy() -> str:
    """Published values, and what estimates of them gave."""
    path = RESULTS / "calibration.json"
    ours = json.loads(path.read_text(encoding="utf-8")).get("published", []) if path.is_file() else []
    parts = [published()]
    if ours:
        parts += ["With z in combined standard errors:", tables({"published": ours}).strip()]
    return "\n\n".join(parts)


def published() -> str:
    """Published values of the systems that ship."""
    rows = ["| system | published | source |", "|---|---|---|"]
    for system in systems.shipped():
        value = system.beta_f_per_atom if system.delta_f is None else system.delta_f
        if value is not None:
            error = math.nan if system.std_error is None else system.std_error
            what = "beta F / N" if system.delta_f is None else "F_B - F_A"
            rows.append(f"| {system.name}, {what} [kT] | {format_with_error(value, error)} | {system.source} |")
    return "\n".join(rows)
