"""Which of two crystals is stable: the difference of their free energies, and where it changes sign."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freeflow.config import series_of
from freeflow.errors import InputError
from freeflow.preparation import Progress, Report
from freeflow.result import EXIT_STATUS, JSON_VERSION, Status, format_with_error, plain, write_atomically
from freeflow.series import as_series, estimate_series
from freeflow.thermodynamics import SeriesResult, write_figure
from freeflow.types import Plan, System, TemperatureSeries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEED_B = 0x6232  # keeps the random numbers of the second phase apart
_LOST_CROSSINGS = 0.05  # share of resamples without a crossing above which there is none to speak of
_RESOLVED = 2.0  # standard errors


class Crossing(NamedTuple):
    """Where two free energies are equal."""

    temperature: float
    std_error: float
    below: str  # name of the phase that is stable below


@dataclass(frozen=True, kw_only=True, eq=False)
class PhaseComparison:
    """Free energies of two crystals, b against a, per atom and at the same temperatures."""

    a: SeriesResult
    b: SeriesResult
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def temperatures(self) -> np.ndarray:
        return self.a.temperatures

    @property
    def difference(self) -> Float[np.ndarray, " n_states"]:
        """beta F / N of b less that of a [kT per atom]."""
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
    def crossing(self) -> Crossing | None:
        """Where the difference changes sign, by linear interpolation; None if it does not, or not surely.

        Of several the one of the largest change. Its error is the spread over resamples of both series.
        """
        found = _zero(self.temperatures, self.difference)
        if found is None:
            return None
        resampled = [_zero(self.temperatures, row) for row in self.replicas.T]
        known = [t for t in resampled if t is not None]
        if len(known) < (1 - _LOST_CROSSINGS) * max(len(resampled), 1):
            return None
        k = int(np.searchsorted(self.temperatures, found)) - 1
        below = self.a if self.difference[max(k, 0)] > 0 else self.b
        return Crossing(found, float(np.std(known, ddof=1)), below.system.name)

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
        """Name of the phase that is stable at a temperature; None if that is not resolved."""
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
        unit = self.a.system.units.temperature
        if self.crossing is not None:
            at = format_with_error(self.crossing.temperature, self.crossing.std_error)
            return f"{self.crossing.below} is stable below {at} {unit}, the other phase above."
        names = {self.stable(k) for k in range(len(self.temperatures))}
        if len(names) == 1 and None not in names:
            return f"{names.pop()} is stable at every temperature looked at."
        if names == {None}:
            bound = float(np.max(np.abs(self.difference) + _RESOLVED * self.std_error))
            return f"Not resolved: the phases differ by less than {bound:.1e} kT per atom (two standard errors)."
        return "Not resolved everywhere: smaller errors would tell which phase is stable."

    @property
    def summary(self) -> str:
        """One line: the verdict."""
        return self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract, version 1; None where nothing applies."""
        rows = [
            {
                "temperature": t,
                "delta_beta_f_per_atom": d,
                "delta_beta_f_per_atom_std_error": e,
                "delta_f_per_atom": d * s.kt,
                "delta_f_per_atom_std_error": e * s.kt,
                "stable": self.stable(k),
            }
            for k, (t, d, e, s) in enumerate(
                zip(self.temperatures, self.difference, self.std_error, self.a.states, strict=True)
            )
        ]
        return plain(
            {
                "version": JSON_VERSION,
                "quantity": "helmholtz_free_energy_difference_of_phases",
                "phases": [self.a.system.name, self.b.system.name],
                "n_atoms": [self.a.n_atoms, self.b.n_atoms],
                "series": rows,
                "crossing": self.crossing and self.crossing._asdict(),
                "units": {"temperature": self.a.system.units.temperature, "f": self.a.system.units.energy},
                "status": self.status,
                "verdict": self.verdict,
                "warnings": (*self.warnings, *self.a.warnings, *self.b.warnings),
                "energy_evaluations": sum(sum(p.energy_evaluations.values()) for p in (self.a, self.b)),
                "wall_seconds": {"total": sum(p.wall_seconds.get("total", math.nan) for p in (self.a, self.b))},
                "details": [self.a.to_dict(), self.b.to_dict()],
            }
        )

    def json_text(self) -> str:
        """The JSON document, ending in a line feed."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON document; the file is there whole or not at all."""
        write_atomically(path, self.json_text())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the differences as a table, one temperature to a line; the heads say the units."""
        units = self.a.system.units
        heads = (
            f"temperature [{units.temperature}]",
            "delta_beta_f_per_atom [kT]",
            "delta_beta_f_per_atom_std_error [kT]",
            f"delta_f_per_atom [{units.energy}]",
            f"delta_f_per_atom_std_error [{units.energy}]",
            "stable",
        )
        rows = [
            [str(value or "") if value is None else str(value) for value in row.values()]
            for row in self.to_dict()["series"]
        ]
        write_atomically(path, "\n".join([",".join(heads), *(",".join(row) for row in rows)]) + "\n")

    def __str__(self) -> str:
        sheet = io.StringIO()
        self.render(Console(file=sheet, width=120, color_system=None, force_terminal=False))
        return "\n".join(line.rstrip() for line in sheet.getvalue().splitlines())

    def render(self, console: Console) -> None:
        """Print the table of differences and the verdict."""
        units, (a, b) = self.a.system.units, (self.a, self.b)
        console.print(Text(f"{b.system.name} against {a.system.name}", style="bold"))
        console.print(f"{a.n_atoms} atoms (a) and {b.n_atoms} atoms (b)")
        console.print()
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        heads = (
            f"T [{units.temperature}]",
            "a: beta F / N",
            "b: beta F / N",
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
                    console.print(Text(f"  {name}, {s.temperature:g} {units.temperature}: {reason}", style="yellow"))
        for warning in self.warnings:
            console.print(Text(f"  {warning}", style="yellow"))
        console.print()
        console.print(Text(self.verdict, style="bold green" if self.status == "converged" else "bold red"))

    def write_plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the difference over temperature with its error and the crossing: .png, .pdf or .svg."""
        write_figure(path, self._figure())

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        unit, t = self.a.system.units.temperature, self.temperatures
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0.0, color="#777777", linewidth=1)
        axes.errorbar(
            t, self.difference, self.std_error, marker="o", markersize=4, linewidth=1, capsize=3, color="#0072B2"
        )
        if self.crossing is not None:
            at, error = self.crossing.temperature, self.crossing.std_error
            axes.axvspan(at - error, at + error, color="#D55E00", alpha=0.3, linewidth=0)
            axes.axvline(at, color="#D55E00", label=f"crossing at {format_with_error(at, error)} {unit}")
            axes.legend(frameon=False)
        axes.set_xlabel(f"temperature [{unit}]")
        axes.set_ylabel("βΔF / N [kT per atom]")
        axes.set_title(f"{self.b.system.name} less {self.a.system.name}; bars are one standard error", fontsize=10)
        axes.grid(alpha=0.3)
        return figure


def _zero(t: np.ndarray, difference: np.ndarray) -> float | None:
    """Where a polygon changes sign; of several places the one of the largest change."""
    if not np.isfinite(difference).all():
        return None
    left, right = difference[:-1], difference[1:]
    changes = np.flatnonzero(left * right < 0)
    if not len(changes):
        return None
    k = changes[np.argmax(np.abs(right - left)[changes])]
    return float(t[k] + (t[k + 1] - t[k]) * left[k] / (left[k] - right[k]))


def compare_phases(
    a: System | TemperatureSeries | str | Path | dict[str, Any],
    b: System | TemperatureSeries | str | Path | dict[str, Any],
    temperatures: tuple[float, ...] | None = None,
    progress: Report | None = None,
    **changes: Any,
) -> PhaseComparison:
    """Free energies of two crystals of one substance at the same temperatures, and which is stable where.

    Args:
        a: The first phase; a system, a series, or what `freeflow.load` makes one from.
        b: The second phase.
        temperatures: Where to compare; by default where the files say, which must then be the same.
        progress: Called now and then with what is going on.
        **changes: Values of both plans to replace, such as `target_error=1e-4` [kT per atom].

    Raises:
        InputError: If a phase cannot be used, or the two do not describe one substance in the same units.
        KeyboardInterrupt: If interrupted before there was anything to compare.
    """
    report = progress or (lambda _: None)
    phases = [as_series(phase) for phase in (a, b)]
    if temperatures is not None:
        phases = [series_of(phase.system, temperatures) for phase in phases]
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


def _require_comparable(a: TemperatureSeries, b: TemperatureSeries) -> None:
    s, t = a.system, b.system
    for what, of_a, of_b in (
        ("units", s.units, t.units),
        ("thermal_wavelength", s.thermal_wavelength, t.thermal_wavelength),
        ("temperature", a.temperatures, b.temperatures),
    ):
        if of_a != of_b:
            hint = "; give both with --temperature" if what == "temperature" else ""
            raise InputError(f"{what}: {a.name} and {b.name} differ: {_show(of_a)} and {_show(of_b)}{hint}")
    if s.config.get("potential") != t.config.get("potential"):
        raise InputError(f"potential: {a.name} and {b.name} have different ones; phases of one substance share it")


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" for v in value[:4]) + (", ..." if len(value) > 4 else "")
    return getattr(value, "name", None) or f"{value:g}"


def _remarks(a: SeriesResult, b: SeriesResult) -> tuple[str, ...]:
    remarks = []
    if a.n_atoms != b.n_atoms:
        remarks.append(f"{a.n_atoms} and {b.n_atoms} atoms: free energies per atom depend on size; compare equal sizes")
    density = [p.n_atoms / p.system.crystal.volume for p in (a, b)]
    if abs(density[0] / density[1] - 1) > 1e-6:
        remarks.append(
            f"number densities {density[0]:.6g} and {density[1]:.6g} differ: at one pressure the phase of lower "
            "Gibbs free energy is stable, not that of lower F"
        )
    return tuple(remarks)
