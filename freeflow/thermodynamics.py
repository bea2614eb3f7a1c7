"""What a series of states comes to: numbers with error bars, table, CSV, plot and verdict.

Importing this module does not start JAX.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freeflow.documents import (
    JSON_VERSION,
    Document,
    csv_text,
    plain,
    print_lines,
    print_verdict,
    write_atomically,
)
from freeflow.result import EXIT_STATUS, Status, format_with_error, in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from freeflow.types import Plan, System

_COLOURS = {"converged": "green", "target_not_reached": "yellow", "interrupted": "yellow"}


class Functions(NamedTuple):
    """Thermodynamic functions of a crystal in one state; scalars, or one row for every resample.

    In a fixed cell F, U and C_V; where the cell moves G, H = U + pV, C_p and V, under the same names. With a fixed
    thermal wavelength all of them are configurational: the motion adds 3N/2 kT to the energy and 3N/2 k to the heat
    capacity.
    """

    beta_f: Any  # [kT]
    energy: Any  # d(beta F) / d beta [energy]
    plain_energy: Any  # average of U over the samples [energy]
    entropy: Any  # beta U - beta F [k]
    heat_capacity: Any  # -beta^2 d^2(beta F) / d beta^2 [k]
    volume: Any  # dG / dp; NaN in a fixed cell [length**3]
    plain_volume: Any  # average of V over the samples [length**3]


N_FUNCTIONS = len(Functions._fields)


@dataclass(frozen=True, kw_only=True)
class StateResult:
    """One state; of the whole crystal. NaN: not estimable."""

    temperature: float
    pressure: float | None = None  # in the unit style's unit; None in a fixed cell
    kt: float  # [energy]
    beta_f: float  # beta G where the cell moves [kT]
    beta_f_std_error: float
    energy: float  # from the derivative of beta F, or H from that of beta G [energy]
    energy_std_error: float
    plain_energy: float  # the average of U, or U + pV [energy]
    plain_energy_std_error: float
    entropy: float  # [k]
    entropy_std_error: float
    heat_capacity: float  # at constant volume, or pressure [k]
    heat_capacity_std_error: float
    volume: float = math.nan  # dG / dp [length**3]
    volume_std_error: float = math.nan
    plain_volume: float = math.nan  # the average of V [length**3]
    plain_volume_std_error: float = math.nan
    volume_z: float = math.nan  # derivative against average, in standard errors
    helmholtz_z: float  # Gibbs-Helmholtz: derivative against average, in standard errors
    anchors_z: float  # largest difference of two anchors, in standard errors; NaN for one
    n_anchors: int
    status: Status
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesResult(Document):
    """Thermodynamic functions of a crystal along a series of states."""

    system: System
    plan: Plan
    states: tuple[StateResult, ...]  # by ascending pressure, then temperature
    anchors: tuple[tuple[float, float | None], ...]  # temperature and pressure of states crossed to, in this order
    replicas: np.ndarray  # (n_states, n_resamples) beta F of resamples, which knows their correlations [kT]
    energy_evaluations: Mapping[str, int]
    wall_seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    interrupted: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quantity: str = "helmholtz_free_energy"

    _width: ClassVar[int] = 150

    @property
    def n_atoms(self) -> int:
        return self.system.n_atoms

    @property
    def temperatures(self) -> np.ndarray:
        """Of every state."""
        return np.array([state.temperature for state in self.states])

    @property
    def pressures(self) -> np.ndarray:
        """Of every state, in the unit style's unit; NaN in a fixed cell."""
        return np.array([math.nan if state.pressure is None else state.pressure for state in self.states])

    @property
    def moves(self) -> bool:
        """Whether these are Gibbs free energies of a cell that moves."""
        return self.system.cell_motion is not None

    @property
    def status(self) -> Status:
        """The worst of all states."""
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
        """One line: how many states, and the verdict."""
        return f"{self._many(len(self.states))} {self.status.replace('_', ' ')}"

    def _many(self, n: int) -> str:
        return f"{n} {'temperatures' if len(set(self.temperatures)) == len(self.states) else 'states'}"

    @property
    def verdict(self) -> str:
        """The outcome in one plain sentence."""
        target, many = f"{self.plan.target_error:.1e}", self._many(len(self.states))
        worst = max((s.beta_f_std_error / self.n_atoms for s in self.states), default=math.nan)
        done = sum(state.status == "converged" for state in self.states)
        if self.status == "converged":
            return f"Converged at {many}: standard errors up to {worst:.1e} kT per atom; target {target}."
        if self.status == "interrupted":
            return f"Interrupted: {done} of {many} have an error of {target} kT per atom or less."
        if self.status == "unreliable":
            bad = next(state for state in self.states if state.status == "unreliable")
            return f"Not reliable: at {self._degrees(bad.temperature, bad.pressure)}: {bad.reasons[0]}"
        return f"Target not reached: {done} of {many} have an error of {target} kT per atom or less."

    def _degrees(self, temperature: float, pressure: float | None) -> str:
        units = self.system.units
        at = f"{temperature:g} {units.temperature}"
        return at if pressure is None else f"{at}, {pressure:g} {units.pressure}"

    # ----------------------------------------------------------------------- numbers for machines

    @property
    def _names(self) -> dict[str, str]:
        """Fields of a state and what machines know them by."""
        if not self.moves:
            same = ("energy", "plain_energy", "entropy", "heat_capacity")
            return {"beta_f": "beta_f", "f": "f"} | {name: name for name in same}
        names = {"beta_f": "beta_g", "f": "g", "energy": "enthalpy", "plain_energy": "plain_enthalpy"}
        return names | {name: name for name in ("entropy", "heat_capacity", "volume", "plain_volume")}

    def rows(self) -> Iterator[dict[str, Any]]:
        """The states, per atom and in plain values."""
        for s in self.states:
            values: dict[str, Any] = {"temperature": s.temperature}
            if self.moves:
                values["pressure"] = s.pressure
            for field_name, name in self._names.items():
                factor, source = (s.kt, "beta_f") if field_name == "f" else (1.0, field_name)
                for end in ("", "_std_error"):
                    values[f"{name}_per_atom{end}"] = getattr(s, source + end) * factor / self.n_atoms
            values["helmholtz_z"] = s.helmholtz_z
            if self.moves:
                values["volume_z"] = s.volume_z
            yield values | {"n_anchors": s.n_anchors, "status": s.status}

    @property
    def _units(self) -> dict[str, str]:
        """Units of the columns, by their names."""
        units, names = self.system.units, self._names
        unit = {"temperature": units.temperature, names["f"]: units.energy, names["energy"]: units.energy}
        unit |= {"entropy": "k_B", "heat_capacity": "k_B"}
        if self.moves:
            unit |= {"pressure": units.pressure, "volume": f"{units.length}^3"}
        return unit

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract, version 1; None where nothing applies."""
        reasons = [list(state.reasons) for state in self.states]
        return plain(
            {
                "version": JSON_VERSION,
                "system": self.system.name,
                "n_atoms": self.n_atoms,
                "quantity": self.quantity,
                "series": [{**row, "reasons": why} for row, why in zip(self.rows(), reasons, strict=True)],
                "units": self._units,
                "anchors": [t for t, _ in self.anchors] if not self.moves else self.anchors,
                "target_error": self.plan.target_error,
                "energy_evaluations": sum(self.energy_evaluations.values()),
                "energy_evaluations_by_phase": self.energy_evaluations,
                "wall_seconds": dict(self.wall_seconds),
                "status": self.status,
                "warnings": self.warnings,
                "provenance": self.provenance,
            }
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the states as a table, one line each; the heads say the units."""
        units = self._units | {self._names["beta_f"]: "kT"}
        write_atomically(path, csv_text(list(self.rows()), units))

    # ----------------------------------------------------------------------- for the eye

    def render(self, console: Console) -> None:
        """Print the table with error bars and verdict."""
        units, symbols = self.system.units, ("G", "H", "p") if self.moves else ("F", "U", "V")
        console.print(Text(self.system.name, style="bold"))
        console.print(Text(in_words(self.system).partition(f", {self.system.temperature:g} ")[0]))
        console.print()
        heads = [
            f"T\n[{units.temperature}]",
            *([f"p\n[{units.pressure}]"] if self.moves else []),
            f"beta {symbols[0]} / N\n[kT]",
            f"{symbols[0]} / N\n[{units.energy}]",
            f"{symbols[1]} / N\n[{units.energy}]",
            "S / N\n[k_B]",
            f"C_{symbols[2]} / N\n[k_B]",
            *([f"V / N\n[{units.length}^3]"] if self.moves else []),
            "Gibbs-\nHelmholtz",
            *(["dG/dp"] if self.moves else []),
            "",
        ]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for k, head in enumerate(heads):
            table.add_column(Text(head), justify="left" if k == len(heads) - 1 else "right", overflow="fold")
        for s in self.states:
            table.add_row(*self._cells(s), Text(s.status.replace("_", " "), style=_COLOURS.get(s.status, "bold red")))
        console.print(table)
        console.print()
        evaluations, seconds = sum(self.energy_evaluations.values()), self.wall_seconds.get("total", math.nan)
        anchors = "; ".join(self._degrees(*state) for state in self.anchors)
        held, f, u = ("pressure", "G", "U + pV") if self.moves else ("volume", "F", "U")
        for text in (
            f"{symbols[1]}, S and C_{symbols[2]} are configurational, at fixed Lambda and {held}.",
            f"Gibbs-Helmholtz: d(beta {f})/d(beta) against the average of {u}, in standard errors.",
            *(["dG/dp: the derivative, which is V here, against the average of V."] if self.moves else []),
            f"Anchors at {anchors}; {evaluations:.2g} energy evaluations, {seconds:.1f} s.",
        ):
            console.print(Text(text))
        reasons = [f"{self._degrees(s.temperature, s.pressure)}: {reason}" for s in self.states for reason in s.reasons]
        print_lines(console, "Why not reliable", reasons)
        print_lines(console, "Warnings", self.warnings)
        print_verdict(console, self.verdict, self.status == "converged")

    def _cells(self, s: StateResult) -> Iterator[str]:
        """A state's row of the table."""

        def told(value: float, error: float) -> str:
            return format_with_error(value / self.n_atoms, error / self.n_atoms)

        yield f"{s.temperature:g}"
        if s.pressure is not None:
            yield f"{s.pressure:g}"
        yield told(s.beta_f, s.beta_f_std_error)
        yield told(s.beta_f * s.kt, s.beta_f_std_error * s.kt)
        yield told(s.energy, s.energy_std_error)
        yield told(s.entropy, s.entropy_std_error)
        yield told(s.heat_capacity, s.heat_capacity_std_error)
        if self.moves:
            yield told(s.volume, s.volume_std_error)
        for z in (s.helmholtz_z, *([s.volume_z] if self.moves else [])):
            yield "-" if math.isnan(z) else f"z = {z:+.1f}"

    def write_plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the thermodynamic functions over temperature, or over pressure if there are more: .png, .pdf or .svg."""
        write_figure(path, self._figure())

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        n, units = self.n_atoms, self.system.units
        kt = np.array([s.kt for s in self.states])

        def column(name: str, factor: Any = 1.0) -> tuple[np.ndarray, np.ndarray]:
            value, error = (np.array([getattr(s, name + end) for s in self.states]) for end in ("", "_std_error"))
            return value * factor / n, error * factor / n

        symbols = ("G", "H", "p") if self.moves else ("F", "U", "V")
        panels = [
            (f"{symbols[0]} / N [{units.energy}]", *column("beta_f", kt)),
            (f"{symbols[1]} / N [{units.energy}]", *column("energy")),
            ("S / N [k$_B$]", *column("entropy")),
            (f"C$_{symbols[2]}$ / N [k$_B$]", *column("heat_capacity")),
        ]
        if self.moves:
            panels.append((f"V / N [{units.length}$^3$]", *column("volume")))
        columns = 2 if len(panels) == 4 else 3
        figure = Figure(figsize=(4.0 * columns, 6.0), layout="constrained")
        label, x, lines = lines_of(self)
        every = list(figure.subplots(2, columns, sharex=True).flat)
        for axes, (title, values, errors) in zip(every, panels, strict=False):
            for name, at in lines:
                axes.errorbar(
                    x[at], values[at], errors[at], marker="o", markersize=3, linewidth=1, capsize=2, label=name
                )
            axes.set_ylabel(title)
            axes.ticklabel_format(useOffset=False)
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        for axes in every[len(panels) :]:
            axes.remove()
        if len(lines) > 1:
            figure.axes[0].legend(frameon=False, fontsize=7)
        held = "pressure" if self.moves else "volume"
        figure.suptitle(
            f"{self.system.name}: configurational functions at constant {held}; bars are one standard error", fontsize=9
        )
        return figure


def lines_of(series: SeriesResult) -> tuple[str, np.ndarray, list[tuple[str, np.ndarray]]]:
    """The states as lines to draw or to look for crossings along.

    Returns:
        What runs along a line, with its unit; its value in every state; of every line its name and its states.
    """
    t, p, units = series.temperatures, series.pressures, series.system.units
    along_p = series.moves and len(set(p)) > 1
    kinds = (t, "T", units.temperature) if along_p else (p, "p", units.pressure)
    x, label = (p, f"pressure [{units.pressure}]") if along_p else (t, f"temperature [{units.temperature}]")
    if not series.moves:
        return label, x, [("", np.arange(len(t)))]
    held, symbol, unit = kinds
    return label, x, [(f"{symbol} = {value:g} {unit}", np.flatnonzero(held == value)) for value in sorted(set(held))]


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
