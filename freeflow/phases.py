"""Which of two crystals is stable: the difference of their free energies, and where it changes sign."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.optimize import brentq

from freeflow.config import series_of
from freeflow.documents import JSON_VERSION, Document, csv_text, plain, print_verdict, write_atomically
from freeflow.errors import InputError
from freeflow.preparation import Progress, Report
from freeflow.result import EXIT_STATUS, Status, format_with_error
from freeflow.series import as_series, estimate_series
from freeflow.thermodynamics import SeriesResult, lines_of, write_figure
from freeflow.types import Plan, StateSeries, System

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEED_B = 0x6232  # keeps the random numbers of the second phase apart
_LOST_CROSSINGS = 0.05  # share of resamples without a crossing above which there is none to speak of
_RESOLVED = 2.0  # standard errors


class Crossing(NamedTuple):
    """Where two free energies are equal, along temperature or along pressure."""

    along: str  # temperature | pressure
    temperature: float
    pressure: float | None  # None in a fixed cell
    std_error: float  # of that which runs
    below: str  # name of the phase that is stable below

    @property
    def value(self) -> float:
        """Of that which runs."""
        return self.pressure if self.along == "pressure" and self.pressure is not None else self.temperature


@dataclass(frozen=True, kw_only=True, eq=False)
class PhaseComparison(Document):
    """Free energies of two crystals, b against a, per atom and in the same states."""

    a: SeriesResult
    b: SeriesResult
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def temperatures(self) -> np.ndarray:
        """Of every state."""
        return self.a.temperatures

    @property
    def pressures(self) -> np.ndarray:
        """Of every state; NaN in fixed cells."""
        return self.a.pressures

    @property
    def difference(self) -> Float[np.ndarray, " n_states"]:
        """beta F / N, or beta G / N, of b less that of a [kT per atom]."""
        return self._per_atom(self.b) - self._per_atom(self.a)

    @property
    def std_error(self) -> Float[np.ndarray, " n_states"]:
        """Of `difference`; errors at neighbouring temperatures are correlated, see `replicas`."""
        errors = [[s.beta_f_std_error / phase.n_atoms for s in phase.states] for phase in (self.a, self.b)]
        return np.hypot(*np.array(errors))

    @property
    def replicas(self) -> Float[np.ndarray, "n_states n_resamples"]:
        """The difference from resamples of both phases, which are independent of each other."""
        return self.b.replicas / self.b.n_atoms - self.a.replicas / self.a.n_atoms

    @staticmethod
    def _per_atom(phase: SeriesResult) -> np.ndarray:
        return np.array([state.beta_f / phase.n_atoms for state in phase.states])

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """Where the difference changes sign along each line of states, by cubic interpolation.

        A line is the series of temperatures at one pressure, or that of pressures at one temperature if there are
        several pressures. Where it does not change sign, or not surely, there is none; of several places it is that
        of the largest change. The slopes in the states are known from volumes or energies. Errors are the spread over
        resamples of both series.
        """
        label, x, lines = lines_of(self.a)
        found = [self._crossing(label.partition(" ")[0], x[at], at) for _, at in lines]
        return tuple(crossing for crossing in found if crossing is not None)

    def _crossing(self, along: str, x: np.ndarray, at: np.ndarray) -> Crossing | None:
        slopes, errors = (part[at] for part in self._slopes(along))
        place = _zero(x, self.difference[at], slopes)
        if place is None:
            return None
        replicas = self.replicas[at].T
        # How slopes and differences scatter together is not known; slopes matter far less.
        scattered = slopes + errors * np.random.default_rng(0).standard_normal(replicas.shape)
        resampled = [_zero(x, *rows) for rows in zip(replicas, scattered, strict=True)]
        known = [value for value in resampled if value is not None]
        if len(known) < (1 - _LOST_CROSSINGS) * max(len(resampled), 1):
            return None
        k = at[max(int(np.searchsorted(x, place)) - 1, 0)]
        below = self.a if self.difference[k] > 0 else self.b
        here = self.a.states[k]
        t, p = (here.temperature, place) if along == "pressure" else (place, here.pressure)
        return Crossing(along, t, p, float(np.std(known, ddof=1)), below.system.name)

    def _slopes(self, along: str) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of `difference` with respect to what runs, in its unit, and their errors; NaN where unknown.

        d(beta G) / dp = beta V, and d(beta F) / dT = -U / kT^2, with H in the place of U where the cell moves.
        """

        def of(phase: SeriesResult, end: str = "") -> np.ndarray:
            if along == "pressure":
                unit = phase.system.units.pressure_unit
                values = [getattr(s, f"volume{end}") * unit / s.kt for s in phase.states]
            else:
                values = [-getattr(s, f"energy{end}") / (s.kt * s.temperature) for s in phase.states]
            return np.array(values) / phase.n_atoms

        return of(self.b) - of(self.a), np.hypot(of(self.b, "_std_error"), of(self.a, "_std_error"))

    @property
    def status(self) -> Status:
        """The worse of both."""
        order: tuple[Status, ...] = ("interrupted", "unreliable", "target_not_reached", "converged")
        return min((self.a.status, self.b.status), key=order.index)

    @property
    def exit_status(self) -> int:
        """What the command line returns for this result."""
        return EXIT_STATUS[self.status]

    def stable(self, k: int) -> str | None:
        """Name of the phase that is stable in a state; None if that is not resolved."""
        difference, error = float(self.difference[k]), float(self.std_error[k])
        if not abs(difference) > _RESOLVED * error:
            return None
        return (self.a if difference > 0 else self.b).system.name

    @property
    def verdict(self) -> str:
        """The outcome in one plain sentence."""
        if self.status in ("unreliable", "interrupted"):
            worse = self.a if self.a.status == self.status else self.b
            return f"{worse.system.name}: {worse.verdict}"
        if crossings := self.crossings:
            first = crossings[0]
            told = [self._told(crossing, len(crossings) > 1) for crossing in crossings]
            return f"{first.below} is stable below {', '.join(told)}, the other phase above."
        names = {self.stable(k) for k in range(len(self.temperatures))}
        if len(names) == 1 and None not in names:
            what = "state" if self.a.moves else "temperature"
            return f"{names.pop()} is stable at every {what} looked at."
        if names == {None}:
            bound = float(np.max(np.abs(self.difference) + _RESOLVED * self.std_error))
            return f"Not resolved: the phases differ by less than {bound:.1e} kT per atom (two standard errors)."
        return "Not resolved everywhere: smaller errors would tell which phase is stable."

    def _told(self, crossing: Crossing, one_of_many: bool) -> str:
        """Where a crossing is, in words."""
        units = self.a.system.units
        unit = units.pressure if crossing.along == "pressure" else units.temperature
        at = f"{format_with_error(crossing.value, crossing.std_error)} {unit}"
        if not one_of_many:
            return at
        if crossing.along == "pressure":
            return f"{at} at {crossing.temperature:g} {units.temperature}"
        return f"{at} at {crossing.pressure:g} {units.pressure}"

    @property
    def summary(self) -> str:
        """One line: the verdict."""
        return self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract, version 1; None where nothing applies."""
        f = self._symbol
        rows = [
            {
                "temperature": s.temperature,
                **({"pressure": s.pressure} if self.a.moves else {}),
                f"delta_beta_{f}_per_atom": d,
                f"delta_beta_{f}_per_atom_std_error": e,
                f"delta_{f}_per_atom": d * s.kt,
                f"delta_{f}_per_atom_std_error": e * s.kt,
                "stable": self.stable(k),
            }
            for k, (d, e, s) in enumerate(zip(self.difference, self.std_error, self.a.states, strict=True))
        ]
        crossings, units = [crossing._asdict() for crossing in self.crossings], self.a.system.units
        unit = {"temperature": units.temperature, f: units.energy}
        return plain(
            {
                "version": JSON_VERSION,
                "quantity": f"{self.a.quantity}_difference_of_phases",
                "phases": [self.a.system.name, self.b.system.name],
                "n_atoms": [self.a.n_atoms, self.b.n_atoms],
                "series": rows,
                "crossing": crossings[0] if crossings else None,
                "crossings": crossings,
                "units": unit | ({"pressure": units.pressure} if self.a.moves else {}),
                "status": self.status,
                "verdict": self.verdict,
                "warnings": (*self.warnings, *self.a.warnings, *self.b.warnings),
                "energy_evaluations": sum(sum(p.energy_evaluations.values()) for p in (self.a, self.b)),
                "wall_seconds": {"total": sum(p.wall_seconds.get("total", math.nan) for p in (self.a, self.b))},
                "details": [self.a.to_dict(), self.b.to_dict()],
            }
        )

    @property
    def _symbol(self) -> str:
        return "g" if self.a.moves else "f"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the differences as a table, one state to a line; the heads say the units."""
        units, f = self.a.system.units, self._symbol
        known = {"temperature": units.temperature, "pressure": units.pressure}
        known |= {f"delta_beta_{f}": "kT", f"delta_{f}": units.energy}
        write_atomically(path, csv_text(self.to_dict()["series"], known))

    def render(self, console: Console) -> None:
        """Print the table of differences and the verdict."""
        units, (a, b) = self.a.system.units, (self.a, self.b)
        console.print(Text(f"{b.system.name} against {a.system.name}", style="bold"))
        console.print(f"{a.n_atoms} atoms (a) and {b.n_atoms} atoms (b)")
        console.print()
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        heads = (
            f"T [{units.temperature}]",
            *([f"p [{units.pressure}]"] if a.moves else []),
            f"a: beta {self._symbol.upper()} / N",
            f"b: beta {self._symbol.upper()} / N",
            "b - a [kT]",
            f"b - a [{units.energy}]",
            "stable",
        )
        for k, head in enumerate(heads):
            table.add_column(Text(head), justify="left" if k == len(heads) - 1 else "right", overflow="fold")
        for k, (p, q) in enumerate(zip(a.states, b.states, strict=True)):
            d, e = float(self.difference[k]), float(self.std_error[k])
            table.add_row(
                f"{p.temperature:g}",
                *([f"{p.pressure:g}"] if a.moves else []),
                format_with_error(p.beta_f / a.n_atoms, p.beta_f_std_error / a.n_atoms),
                format_with_error(q.beta_f / b.n_atoms, q.beta_f_std_error / b.n_atoms),
                format_with_error(d, e),
                format_with_error(d * p.kt, e * p.kt),
                Text(self.stable(k) or "not resolved", style="" if self.stable(k) else "yellow"),
            )
        console.print(table)
        for name, phase in (("a", a), ("b", b)):
            for s in phase.states:
                for reason in s.reasons:
                    at = f"{s.temperature:g} {units.temperature}"
                    at += f", {s.pressure:g} {units.pressure}" if a.moves else ""
                    console.print(Text(f"  {name}, {at}: {reason}", style="yellow"))
        for warning in self.warnings:
            console.print(Text(f"  {warning}", style="yellow"))
        print_verdict(console, self.verdict, self.status == "converged")

    def write_plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the difference over temperature or pressure with its error and crossings: .png, .pdf or .svg."""
        write_figure(path, self._figure())

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        label, x, lines = lines_of(self.a)
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0.0, color="#777777", linewidth=1)
        for name, at in lines:
            d, e = self.difference[at], self.std_error[at]
            axes.errorbar(x[at], d, e, marker="o", markersize=4, linewidth=1, capsize=3, label=name)
        for crossing in self.crossings:
            at, error = crossing.value, crossing.std_error
            axes.axvspan(at - error, at + error, color="#D55E00", alpha=0.3, linewidth=0)
            axes.axvline(at, color="#D55E00", label=f"crossing at {self._told(crossing, len(lines) > 1)}")
        if self.crossings or len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        axes.set_xlabel(label)
        axes.set_ylabel(f"βΔ{self._symbol.upper()} / N [kT per atom]")
        axes.set_title(f"{self.b.system.name} less {self.a.system.name}; bars are one standard error", fontsize=10)
        axes.grid(alpha=0.3)
        return figure


def _zero(x: np.ndarray, difference: np.ndarray, slopes: np.ndarray) -> float | None:
    """Where a difference changes sign; of several places the one of the largest change.

    Between two states it is the cubic with the slopes there (Hermite's); a straight line where they are not known.
    """
    if not np.isfinite(difference).all():
        return None
    left, right = difference[:-1], difference[1:]
    changes = np.flatnonzero(left * right < 0)
    if not len(changes):
        return None
    k = changes[np.argmax(np.abs(right - left)[changes])]
    width, f, g = x[k + 1] - x[k], difference[k : k + 2], slopes[k : k + 2]
    if not np.isfinite(g).all():
        return float(x[k] + width * f[0] / (f[0] - f[1]))

    def cubic(t: float) -> float:
        line = f[0] + t * (f[1] - f[0])
        chord = (f[1] - f[0]) / width
        return line + t * (1 - t) * width * ((1 - t) * (g[0] - chord) - t * (g[1] - chord))

    return float(x[k] + width * brentq(cubic, 0.0, 1.0))  # pyright: ignore[reportArgumentType, reportOperatorIssue]


def compare_phases(
    a: System | StateSeries | str | Path | dict[str, Any],
    b: System | StateSeries | str | Path | dict[str, Any],
    temperatures: Sequence[float] | None = None,
    progress: Report | None = None,
    **changes: Any,
) -> PhaseComparison:
    """Free energies of two crystals of one substance in the same states, and which is stable where.

    Args:
        a: The first phase; a system, a series, or what `freeflow.load` makes one from.
        b: The second phase.
        temperatures: Where to compare; by default where the files say, which must then be the same, as pressures must.
        progress: Called now and then with what is going on.
        **changes: Values of both plans to replace, such as `target_error=1e-4` [kT per atom].

    Raises:
        InputError: If a phase cannot be used, or the two do not describe one substance in the same units.
        KeyboardInterrupt: If interrupted before there was anything to compare.
    """
    report = progress or (lambda _: None)
    phases = [as_series(phase) for phase in (a, b)]
    if temperatures is not None:
        phases = [series_of(phase.system, temperatures, phase.pressures) for phase in phases]
    _require_comparable(*phases)
    results = []
    for k, phase in enumerate(phases):
        plan: Plan = phase.system.plan
        seed = int(changes.get("seed", plan.seed))
        own = {**changes, "seed": seed if k == 0 else seed ^ _SEED_B}

        def tell(at: Progress, name: str = phase.name) -> None:
            report(at._replace(text=f"{name}, {at.text}"))

        results.append(estimate_series(phase, plan, tell, **own))
    return PhaseComparison(a=results[0], b=results[1], warnings=_remarks(*results))


def _require_comparable(a: StateSeries, b: StateSeries) -> None:
    s, t = a.system, b.system
    for what, of_a, of_b in (
        ("units", s.units, t.units),
        ("thermal_wavelength", s.thermal_wavelength, t.thermal_wavelength),
        ("cell_motion", s.cell_motion, t.cell_motion),
        ("temperature", a.temperatures, b.temperatures),
        ("pressure", a.pressures, b.pressures),
    ):
        if of_a != of_b:
            hint = f"; give both with --{what}" if what in ("temperature", "pressure") else ""
            raise InputError(f"{what}: {a.name} and {b.name} differ: {_show(of_a)} and {_show(of_b)}{hint}")
    if s.config.get("potential") != t.config.get("potential"):
        raise InputError(f"potential: {a.name} and {b.name} have different ones; phases of one substance share it")


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" for v in value[:4]) + (", ..." if len(value) > 4 else "")
    if value is None or isinstance(value, str):
        return value or "a fixed cell"
    return getattr(value, "name", None) or f"{value:g}"


def _remarks(a: SeriesResult, b: SeriesResult) -> tuple[str, ...]:
    remarks = []
    if a.n_atoms != b.n_atoms:
        remarks.append(f"{a.n_atoms} and {b.n_atoms} atoms: free energies per atom depend on size; compare equal sizes")
    density = [p.n_atoms / p.system.crystal.volume for p in (a, b)]
    if not a.moves and abs(density[0] / density[1] - 1) > 1e-6:
        remarks.append(
            f"number densities {density[0]:.6g} and {density[1]:.6g} differ: at one pressure the phase of lower "
            "Gibbs free energy is stable, not that of lower F"
        )
    return tuple(remarks)
