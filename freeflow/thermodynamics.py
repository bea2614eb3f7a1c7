"""What a series of temperatures comes to: numbers with error bars, table, CSV, plot and verdict.

Importing this module does not start JAX.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freeflow.result import EXIT_STATUS, JSON_VERSION, Status, format_with_error, in_words, plain, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from freeflow.types import Plan, System

_COLOURS = {"converged": "green", "target_not_reached": "yellow", "interrupted": "yellow"}


class Functions(NamedTuple):
    """Thermodynamic functions of a crystal at one temperature; scalars, or one row for every resample.

    With a fixed thermal wavelength all of them are configurational: the motion adds 3N/2 kT to the energy and 3N/2 k
    to the heat capacity.
    """

    beta_f: Any  # [kT]
    energy: Any  # d(beta F) / d beta [energy]
    plain_energy: Any  # average of U over the samples [energy]
    entropy: Any  # beta U - beta F [k]
    heat_capacity: Any  # -beta^2 d^2(beta F) / d beta^2 [k]


@dataclass(frozen=True, kw_only=True)
class StateResult:
    """One temperature; of the whole crystal. NaN: not estimable."""

    temperature: float
    kt: float  # [energy]
    beta_f: float  # [kT]
    beta_f_std_error: float
    energy: float  # from the derivative of beta F [energy]
    energy_std_error: float
    plain_energy: float  # the average of U [energy]
    plain_energy_std_error: float
    entropy: float  # [k]
    entropy_std_error: float
    heat_capacity: float  # at constant volume [k]
    heat_capacity_std_error: float
    helmholtz_z: float  # Gibbs-Helmholtz: derivative against average, in standard errors
    anchors_z: float  # largest difference of two anchors, in standard errors; NaN for one
    n_anchors: int
    status: Status
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesResult:
    """Thermodynamic functions of a crystal along a series of temperatures."""

    system: System
    plan: Plan
    states: tuple[StateResult, ...]  # by ascending temperature
    anchors: tuple[float, ...]  # temperatures that were crossed to, in this order
    replicas: np.ndarray  # (n_states, n_resamples) beta F of resamples, which knows their correlations [kT]
    energy_evaluations: Mapping[str, int]
    wall_seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    interrupted: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quantity: str = "helmholtz_free_energy"

    @property
    def n_atoms(self) -> int:
        return self.system.n_atoms

    @property
    def temperatures(self) -> np.ndarray:
        return np.array([state.temperature for state in self.states])

    @property
    def status(self) -> Status:
        """The worst of all temperatures."""
        if self.interrupted:
            return "interrupted"
        found = {state.status for state in self.states}
        return next((s for s in ("unreliable", "target_not_reached") if s in found), "converged")  # pyright: ignore[reportReturnType]

    @property
    def exit_status(self) -> int:
        """What the command line returns for this result."""
        return EXIT_STATUS[self.status]

    @property
    def summary(self) -> str:
        """One line: how many temperatures, and the verdict."""
        return f"{len(self.states)} temperatures {self.status.replace('_', ' ')}"

    @property
    def verdict(self) -> str:
        """The outcome in one plain sentence."""
        target, n = f"{self.plan.target_error:.1e}", len(self.states)
        worst = max((s.beta_f_std_error / self.n_atoms for s in self.states), default=math.nan)
        done = sum(state.status == "converged" for state in self.states)
        if self.status == "converged":
            return f"Converged at {n} temperatures: standard errors up to {worst:.1e} kT per atom; target {target}."
        if self.status == "interrupted":
            return f"Interrupted: {done} of {n} temperatures have an error of {target} kT per atom or less."
        if self.status == "unreliable":
            bad = next(state for state in self.states if state.status == "unreliable")
            return f"Not reliable: at {self._degrees(bad.temperature)}: {bad.reasons[0]}"
        return f"Target not reached: {done} of {n} temperatures have an error of {target} kT per atom or less."

    def _degrees(self, temperature: float) -> str:
        return f"{temperature:g} {self.system.units.temperature}"

    # ----------------------------------------------------------------------- numbers for machines

    def rows(self) -> Iterator[dict[str, Any]]:
        """The states, per atom and in plain values."""
        n, names = self.n_atoms, ("energy", "plain_energy", "entropy", "heat_capacity")
        for s in self.states:
            values = {"temperature": s.temperature}
            values |= {"beta_f_per_atom": s.beta_f / n, "beta_f_per_atom_std_error": s.beta_f_std_error / n}
            values |= {"f_per_atom": s.beta_f * s.kt / n, "f_per_atom_std_error": s.beta_f_std_error * s.kt / n}
            for name in names:
                values[f"{name}_per_atom"] = getattr(s, name) / n
                values[f"{name}_per_atom_std_error"] = getattr(s, f"{name}_std_error") / n
            yield values | {"helmholtz_z": s.helmholtz_z, "n_anchors": s.n_anchors, "status": s.status}

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract, version 1; None where nothing applies."""
        units = self.system.units
        reasons = [list(state.reasons) for state in self.states]
        return plain(
            {
                "version": JSON_VERSION,
                "system": self.system.name,
                "n_atoms": self.n_atoms,
                "quantity": self.quantity,
                "series": [{**row, "reasons": why} for row, why in zip(self.rows(), reasons, strict=True)],
                "units": {
                    "temperature": units.temperature,
                    "f": units.energy,
                    "energy": units.energy,
                    "entropy": "k_B",
                    "heat_capacity": "k_B",
                },
                "anchors": self.anchors,
                "target_error": self.plan.target_error,
                "energy_evaluations": sum(self.energy_evaluations.values()),
                "energy_evaluations_by_phase": self.energy_evaluations,
                "wall_seconds": dict(self.wall_seconds),
                "status": self.status,
                "warnings": self.warnings,
                "provenance": self.provenance,
            }
        )

    def json_text(self) -> str:
        """The JSON document, ending in a line feed."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON document; the file is there whole or not at all."""
        write_atomically(path, self.json_text())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the states as a table, one line each; the heads say the units."""
        units = self.system.units
        unit = {"temperature": units.temperature, "f": units.energy, "energy": units.energy, "beta_f": "kT"}
        unit |= {"plain_energy": units.energy, "entropy": "k_B", "heat_capacity": "k_B"}

        def head(name: str) -> str:
            found = unit.get(name.removesuffix("_std_error").removesuffix("_per_atom"))
            return name if found is None else f"{name} [{found}]"

        rows = list(self.rows())
        lines = [",".join(head(name) for name in rows[0])] if rows else []
        lines += [",".join(str(value) for value in row.values()) for row in rows]
        write_atomically(path, "\n".join(lines) + "\n")

    # ----------------------------------------------------------------------- for the eye

    def __str__(self) -> str:
        sheet = io.StringIO()
        self.render(Console(file=sheet, width=130, color_system=None, force_terminal=False))
        return "\n".join(line.rstrip() for line in sheet.getvalue().splitlines())

    def render(self, console: Console) -> None:
        """Print the table with error bars and verdict."""
        n, units = self.n_atoms, self.system.units
        console.print(Text(self.system.name, style="bold"))
        console.print(Text(in_words(self.system).rpartition(",")[0] or in_words(self.system)))
        console.print()
        heads = (
            f"T [{units.temperature}]",
            "beta F / N [kT]",
            f"F / N [{units.energy}]",
            f"U / N [{units.energy}]",
            "S / N [k_B]",
            "C_V / N [k_B]",
            "Gibbs-Helmholtz",
            "",
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for k, head in enumerate(heads):
            table.add_column(Text(head), justify="left" if k == len(heads) - 1 else "right", overflow="fold")
        for s in self.states:
            word = s.status.replace("_", " ")
            table.add_row(
                f"{s.temperature:g}",
                format_with_error(s.beta_f / n, s.beta_f_std_error / n),
                format_with_error(s.beta_f * s.kt / n, s.beta_f_std_error * s.kt / n),
                format_with_error(s.energy / n, s.energy_std_error / n),
                format_with_error(s.entropy / n, s.entropy_std_error / n),
                format_with_error(s.heat_capacity / n, s.heat_capacity_std_error / n),
                "-" if math.isnan(s.helmholtz_z) else f"z = {s.helmholtz_z:+.1f}",
                Text(word, style=_COLOURS.get(s.status, "bold red")),
            )
        console.print(table)
        console.print()
        evaluations, seconds = sum(self.energy_evaluations.values()), self.wall_seconds.get("total", math.nan)
        anchors = ", ".join(f"{t:g}" for t in self.anchors)
        for text in (
            "U, S and C_V are configurational, at fixed Lambda and volume.",
            "Gibbs-Helmholtz: d(beta F)/d(beta) against the average of U, in standard errors.",
            f"Anchors at {anchors} {units.temperature}; {evaluations:.2g} energy evaluations, {seconds:.1f} s.",
        ):
            console.print(Text(text))
        reasons = [f"{self._degrees(s.temperature)}: {reason}" for s in self.states for reason in s.reasons]
        for title, lines in (("Why not reliable", reasons), ("Warnings", self.warnings)):
            if lines:
                console.print()
                console.print(Text(title, style="bold"))
                for line in lines:
                    console.print(Text(f"  {line}", style="yellow"))
        console.print()
        console.print(Text(self.verdict, style="bold green" if self.status == "converged" else "bold red"))

    def write_plot(self, path: str | os.PathLike[str]) -> None:
        """Draw free energy, energy, entropy and heat capacity over temperature: .png, .pdf or .svg."""
        write_figure(path, self._figure())

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        n, units, t = self.n_atoms, self.system.units, self.temperatures
        kt = np.array([s.kt for s in self.states])

        def column(name: str) -> np.ndarray:
            return np.array([getattr(s, name) for s in self.states]) / n

        panels = (
            (f"F / N [{units.energy}]", column("beta_f") * kt, column("beta_f_std_error") * kt),
            (f"U / N [{units.energy}]", column("energy"), column("energy_std_error")),
            ("S / N [k$_B$]", column("entropy"), column("entropy_std_error")),
            ("C$_V$ / N [k$_B$]", column("heat_capacity"), column("heat_capacity_std_error")),
        )
        figure = Figure(figsize=(8.0, 6.0), layout="constrained")
        for axes, (label, values, errors) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
            axes.errorbar(t, values, errors, marker="o", markersize=3, linewidth=1, capsize=2, color="#0072B2")
            axes.set_ylabel(label)
            axes.ticklabel_format(useOffset=False)
            axes.grid(alpha=0.3)
        for axes in figure.axes[2:]:
            axes.set_xlabel(f"temperature [{units.temperature}]")
        figure.suptitle(
            f"{self.system.name}: configurational functions at constant volume; bars are one standard error", fontsize=9
        )
        return figure


def write_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure in the format of its ending; the file is there whole or not at all.

    Raises:
        InputError: If the ending is none that can be drawn.
        FreeflowError: If it cannot be written.
    """
    from freeflow.errors import InputError

    ending = os.path.splitext(os.fspath(path))[1].lstrip(".").lower() or "png"
    if ending not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{os.fspath(path)}: no figures end in .{ending}; use .png, .pdf or .svg")
    sheet = io.BytesIO()
    figure.savefig(sheet, format=ending, dpi=150)
    write_atomically(path, sheet.getvalue())
