"""What comes out: progress, tables, JSON and lines on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from freeflow import config
from freeflow.errors import FreeflowError

if TYPE_CHECKING:
    from freeflow.comparison import Comparison
    from freeflow.difference import DifferenceResult
    from freeflow.preparation import Progress
    from freeflow.result import Result
    from freeflow.sampling import Sampling
    from freeflow.solutions import Solution
    from freeflow.training_run import TrainingResult
    from freeflow.types import StateSeries, System

LINE_EVERY_SECONDS = 10.0


@contextlib.contextmanager
def progress_reports(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A function to report progress to: a bar on a terminal, otherwise a line now and then."""
    if quiet or sys.stderr is None:
        yield None
        return
    if not sys.stderr.isatty():
        last = -LINE_EVERY_SECONDS

        def line(progress: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_EVERY_SECONDS:
                last = time.monotonic()
                say(f"freeflow: {progress.phase}: {_done(progress)}{progress.text}")

        yield line
        return

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, text="")

        def show(progress: Any) -> None:
            total = None if progress.fraction is None else 1.0
            bar.update(
                task,
                description=escape(progress.phase),
                total=total,
                completed=progress.fraction or 0.0,
                text=escape(progress.text),
            )

        yield show


def _done(progress: Any) -> str:
    return "" if progress.fraction is None else f"{100 * progress.fraction:.0f} %, "


def print_result(
    result: Result | DifferenceResult | TrainingResult | Sampling | Comparison, json_path: str | None, quiet: bool
) -> None:
    """Print a result as a table, a line (quiet) or JSON (a path of -), and write its JSON where that is wanted."""
    if json_path == "-":
        print_text(result.json_text().rstrip("\n"))
        return
    if quiet:
        print_text(result.summary)
    elif sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console

        result.render(Console())
    else:
        print_text(str(result))
    if json_path is not None:
        flush()
        result.to_json(json_path)


def print_table(result: Any, csv: str | None, plot: str | None, json_path: str | None, quiet: bool) -> int:
    """Print and write the result of a series or of phases.

    Args:
        result: A table with an exit status.
        csv: Where to write it as CSV.
        plot: Where to draw it.
        json_path: Where to write it as JSON.
        quiet: Whether to print one line only.

    Returns:
        The exit status.
    """
    if csv is not None:
        result.to_csv(csv)
    if plot is not None:
        result.write_plot(plot)
    print_result(result, json_path, quiet)
    return result.exit_status


class Lines:
    """Progress of many runs: what has ended at once, how the others stand now and then."""

    def __init__(self, n_runs: int):
        self._n_runs, self._n_ended = n_runs, 0
        self._last: dict[str, float] = {}

    def __call__(self, told: Any) -> None:
        """Say what was told, if it is time."""
        if told.outcome is not None:
            self._n_ended += 1
            state = "done before" if told.recalled else told.outcome.status
            say(f"freeflow: {self._n_ended} of {self._n_runs}: {told.name}: {state}, {told.text}")
        elif time.monotonic() - self._last.get(told.name, -LINE_EVERY_SECONDS) >= LINE_EVERY_SECONDS:
            self._last[told.name] = time.monotonic()
            say(f"freeflow: {told.name}: {told.text}")


def facts_of(system: System | Solution | StateSeries) -> Iterator[tuple[str, Any]]:
    """What follows from a system file: names, with units, and values."""
    from freeflow.solutions import Solution
    from freeflow.types import StateSeries

    if isinstance(system, StateSeries):
        yield "temperatures", len(system.temperatures)
        if system.pressures:
            yield "pressures", len(system.pressures)
        system = system.system

    units, n = system.units, system.n_atoms
    if isinstance(system, Solution):
        yield "atoms of the solvent", n
        yield f"number density of the solvent [1/{units.length}^3]", f"{n / system.box_length**3:.8g}"
        yield f"solvent's cutoff [{units.length}]", f"{system.solvent.cutoff:.8g}"
        yield f"reach of the larger solute [{units.length}]", f"{system.reach:.8g}"
        yield f"kT of A [{units.energy}]", f"{system.kt:.10g}"
        return
    crystal = system.crystal
    yield "atoms", n
    if crystal.description:
        yield "crystal", crystal.description
    yield (
        f"cell [{units.length}]",
        ", ".join("[" + ", ".join(f"{x:.6g}" for x in row) + "]" for row in crystal.cell.tolist()),
    )
    yield f"number density [1/{units.length}^3]", f"{n / crystal.volume:.8g}"
    if system.cell_motion is not None:
        yield "cell and density", "where the search for the equilibrium cell starts"
        pressure = float(system.state.pressure)
        yield f"pressure [{units.energy}/{units.length}^3]", f"{pressure:.10g}"
        yield "beta p V at this density, of beta G [kT per atom]", f"{system.constants['pressure'] / n:.8g}"
    if system.potential.cutoff is not None:
        yield f"cutoff [{units.length}]", f"{system.potential.cutoff:.8g}"
    if len(set(system.wavelengths)) > 1 or "masses" in system.config:
        for name, value in system.wavelengths.items():
            yield f"thermal wavelength of {name} [{units.length}]", f"{value:.8g}"
    yield f"kT [{units.energy}]", f"{system.kt:.10g}"
    if "lattice energy" in system.constants:
        yield f"lattice energy [{units.energy} per atom]", f"{system.constants['lattice energy'] * system.kt / n:.8g}"


def print_text(text: str) -> None:
    """To stdout; a full disk is an error like any other.

    Raises:
        FreeflowError: If it cannot be written.
    """
    with _printing():
        click.echo(text)


def flush() -> None:
    """Have written what was printed.

    Raises:
        FreeflowError: If that cannot be, as on a full disk.
    """
    with _printing():
        if sys.stdout is not None:
            sys.stdout.flush()


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise FreeflowError(f"cannot write the output: {error.strerror}") from None


def drop_output() -> None:
    """Let the interpreter's last flush go nowhere, instead of failing again on its way out."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str, status: int) -> int:
    """One line on stderr about what is wrong; returns the exit status."""
    say("freeflow: error: " + config.printable(" ".join(message.split())))
    return status


def say(line: str) -> None:
    """A line on stderr, if there is one."""
    with contextlib.suppress(OSError):
        click.echo(line, err=True)
