"""The answer with error bar, diagnostics and verdict; units on the way out.

Importing this module does not start JAX.
"""

from __future__ import annotations

import io
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from freeflow.documents import (
    JSON_VERSION,
    Document,
    plain,
    print_lines,
    print_verdict,
    require_writable,
    write_atomically,
)
from freeflow.errors import InputError

if TYPE_CHECKING:
    from freeflow.types import Plan, System, Work

Status = Literal["converged", "target_not_reached", "unreliable", "interrupted"]
EXIT_STATUS: dict[Status, int] = {"converged": 0, "target_not_reached": 3, "unreliable": 3, "interrupted": 130}


class Scale(NamedTuple):
    """Where a diagnostic is good, and where it is still fair; poor lies beyond."""

    good: float
    fair: float

    def word(self, value: float) -> str:
        """Good, fair or poor."""
        sign = 1 if self.good < self.fair else -1
        if sign * value <= sign * self.good:
            return "good"
        return "fair" if sign * value <= sign * self.fair else "poor"


# A rough reading of single numbers; `estimators.reliability` weighs them together and decides the status. The
# limits of "fair" are the most lenient that it has, so that "poor" does not stand beside "converged".
ESS_FRACTION = Scale(good=0.1, fair=0.01)
PARETO_K = Scale(good=0.5, fair=0.9)
OVERLAP = Scale(good=0.1, fair=0.03)
LARGEST_WEIGHT_SHARE = Scale(good=0.05, fair=0.2)
Z_SCORE = Scale(good=2.0, fair=4.0)
BOOTSTRAP_RATIO = Scale(good=1.25, fair=1.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result(Document):
    """A free energy, how it came about and how far to trust it.

    Energies are in kT and belong to the whole crystal unless their name says per atom. NaN stands
    for what could not be estimated or does not apply.
    """

    system: System
    plan: Plan  # the one that was carried out
    estimator: str
    delta_f: float  # of the work part
    delta_f_std_error: float
    components: Mapping[str, float]  # contributions to beta F, in the order to print; "work" carries the error
    beta_f: float
    beta_f_std_error: float
    work: Work
    n_samples: int
    energy_evaluations: Mapping[str, int]  # reference, tuning, sampling, checks
    wall_seconds: Mapping[str, float]  # total, compile, reference, sampling
    status: Status
    ess_fraction: float
    pareto_k: float = math.nan
    overlap: float | None = None  # of forward and reverse work; needs both
    largest_weight_share: float = math.nan
    drift_z: float = math.nan  # first against second half, in standard errors
    hysteresis_z: float | None = None  # forward against reverse, in standard errors; needs both
    bootstrap_std_error: float = math.nan  # of beta_f
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    trajectory: Mapping[str, Any] | None = None  # what the samples of the target were taken from
    profile: Any = None  # freeflow.observers.Profile: g(r) of the target, where it was asked for
    observed: Any = None  # what an observer made of the forward samples, one row each
    cell: Any = None  # freeflow.observers.CellAverage, where the cell moves
    pilot: Any = None  # freeflow.bridge.Pilot: the trial crossing that the bridge was made after, if there was one

    _width: ClassVar[int] = 100

    def __post_init__(self) -> None:
        terms = list(self.components.values())
        size = sum(abs(term) for term in terms)
        if not math.isnan(self.beta_f) and not abs(math.fsum(terms) - self.beta_f) <= 1e-9 * max(1.0, size):
            raise ValueError(f"the components add up to {math.fsum(terms)}, not to beta F = {self.beta_f}")

    @property
    def n_atoms(self) -> int:
        return self.system.n_atoms

    @property
    def quantity(self) -> str:
        """Helmholtz's free energy, or Gibbs's where the cell moves: `beta_f` is the one or the other, in kT."""
        return self.system.quantity

    @property
    def symbol(self) -> str:
        """F or G."""
        return "F" if self.system.cell_motion is None else "G"

    @property
    def beta_f_per_atom(self) -> float:
        return self.beta_f / self.n_atoms

    @property
    def beta_f_per_atom_std_error(self) -> float:
        return self.beta_f_std_error / self.n_atoms

    def write_u_nk(self, path: str | os.PathLike[str]) -> None:
        """Write the work as a table of reduced potentials of two states, which alchemlyb and pymbar take.

        State 0 is the reference and 1 the target. A forward sample has the row (0, w), a reverse one, of the target,
        (w, 0), in kT; of each sample only the difference counts. With the ending .parquet it is one for
        `alchemlyb.parsing.parquet.extract_u_nk`, otherwise CSV with the columns time, fep-lambda, 0.0, 1.0.

        Raises:
            InputError: If .parquet is wanted and pandas or pyarrow is not installed.
            FreeflowError: If it cannot be written.
        """
        forward, reverse = ([float(w) for w in part] for part in self.work)
        rows = [(float(time), 0.0, 0.0, w) for time, w in enumerate(forward)]
        rows += [(float(time), 1.0, w, 0.0) for time, w in enumerate(reverse)]
        if str(path).endswith(".parquet"):
            write_atomically(path, _parquet(rows, self.system.temperature))
        else:
            lines = [f"{time:.0f},{state},{u_0!r},{u_1!r}" for time, state, u_0, u_1 in rows]
            write_atomically(path, "\n".join(["time,fep-lambda,0.0,1.0", *lines]) + "\n")

    @property
    def exit_status(self) -> int:
        """What the command line returns for this result."""
        return EXIT_STATUS[self.status]

    @property
    def z_score(self) -> float:
        """Difference from the published value in combined standard errors; NaN if there is none."""
        published = self.system.published
        if published is None:
            return math.nan
        combined = math.hypot(self.beta_f_per_atom_std_error, published.std_error or 0.0)
        return (self.beta_f_per_atom - published.beta_f_per_atom) / combined if combined > 0 else math.nan

    @property
    def summary(self) -> str:
        """One line: the value per atom in kT, its error in parentheses, and the verdict."""
        value = format_with_error(self.beta_f_per_atom, self.beta_f_per_atom_std_error)
        return f"{value} {self.status.replace('_', ' ')}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract, version 1; None where nothing applies."""
        units, kt, published = self.system.units, self.system.kt, self.system.published
        forward, reverse = (int(part.shape[0]) for part in self.work)
        values = {
            "version": JSON_VERSION,
            "system": self.system.name,
            "n_atoms": self.n_atoms,
            "quantity": self.quantity,
            "beta_f": self.beta_f,
            "beta_f_std_error": self.beta_f_std_error,
            "beta_f_per_atom": self.beta_f_per_atom,
            "beta_f_per_atom_std_error": self.beta_f_per_atom_std_error,
            "free_energy": {"value": self.beta_f * kt, "std_error": self.beta_f_std_error * kt, "unit": units.energy},
            "components": self.components,
            "work": {"delta_f": self.delta_f, "std_error": self.delta_f_std_error},
            "estimator": self.estimator,
            "n_samples": self.n_samples,
            "n_forward": forward,
            "n_reverse": reverse,
            "target_error": self.plan.target_error,
            "ess_fraction": self.ess_fraction,
            "pareto_k": self.pareto_k,
            "overlap": self.overlap,
            "diagnostics": {
                "largest_weight_share": self.largest_weight_share,
                "drift_z": self.drift_z,
                "hysteresis_z": self.hysteresis_z,
                "bootstrap_std_error": self.bootstrap_std_error,
            },
            "energy_evaluations": sum(self.energy_evaluations.values()),
            "energy_evaluations_by_phase": self.energy_evaluations,
            "wall_seconds": {key: self.wall_seconds.get(key) for key in ("total", "compile", "reference", "sampling")},
            "status": self.status,
            "warnings": self.warnings,
            "trajectory": self.trajectory,
            "published": published
            and {
                "beta_f_per_atom": published.beta_f_per_atom,
                "std_error": published.std_error,
                "z_score": self.z_score,
                "source": published.source,
            },
            "temperature": {"value": self.system.temperature, "unit": units.temperature},
            "boltzmann": {"value": units.boltzmann, "unit": _boltzmann_unit(self.system)},
            "thermal_wavelength": {
                "value": self.system.thermal_wavelength,
                "unit": units.length,
                "by_species": dict(self.system.wavelengths),
            },
            "provenance": dict.fromkeys(("freeflow", "jax", "device", "seed", "config"))
            | {"seed": self.plan.seed, "config": self.system.config}
            | dict(self.provenance),
        }
        if self.system.cell_motion is not None:
            values |= self._under_pressure()
        return plain(values)

    def _under_pressure(self) -> dict[str, Any]:
        """What the JSON document has besides where the cell moves."""
        units, cell = self.system.units, self.cell
        names = ("beta_f", "beta_f_std_error", "beta_f_per_atom", "beta_f_per_atom_std_error")
        volume = cell and {"value": cell.volume.mean, "std_error": cell.volume.std_error, "spread": cell.volume_spread}
        vectors = cell and {"value": cell.vectors.mean, "std_error": cell.vectors.std_error}
        return {
            **{name.replace("beta_f", "beta_g", 1): getattr(self, name) for name in names},
            "pressure": {"value": self.system.pressure, "unit": units.pressure},
            "cell_motion": self.system.cell_motion,
            "volume": volume and {**volume, "unit": f"{units.length}^3"},
            "cell": vectors and {**vectors, "unit": units.length},
        }

    def render(self, console: Console) -> None:
        """Print the table with error bars and verdict."""
        heads = [("bold", self.system.name), ("", in_words(self.system))]
        for style, line in heads:
            console.print(Text(line, style=style))
        for title, rows in self.sections():
            console.print()
            console.print(Text(title, style="bold"))
            table = Table.grid(padding=(0, 3, 0, 0))
            for _ in range(3):
                table.add_column(overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in (f"  {row[0]}", *row[1:])))
            console.print(table)
        print_lines(console, "Warnings", self.warnings)
        print_verdict(console, self.verdict, self.status == "converged")

    @property
    def verdict(self) -> str:
        """The outcome in one plain sentence."""
        error, target = f"{self.beta_f_per_atom_std_error:.1e}", f"{self.plan.target_error:.1e}"
        if self.status == "converged":
            return f"Converged: one standard error is {error} kT per atom; the target was {target}."
        if self.status == "target_not_reached":
            return (
                f"Target not reached: one standard error is {error} kT per atom; the target was {target}. "
                "More samples would help."
            )
        if self.status == "interrupted":
            done = _count(self.n_samples)
            return f"Interrupted after {done} samples; the target of {target} kT per atom was not reached."
        reason = self.warnings[0] if self.warnings else "the diagnostics are poor"
        return f"Not reliable: {reason}"

    # ----------------------------------------------------------------------- the table, as text

    def sections(self) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
        """Titles and rows of the table, as text."""
        kt, energy, symbol = self.system.kt, self.system.units.energy, self.symbol
        yield (
            "Helmholtz free energy" if symbol == "F" else "Gibbs free energy",
            [
                (
                    f"beta {symbol} / N",
                    format_with_error(self.beta_f_per_atom, self.beta_f_per_atom_std_error),
                    "kT per atom",
                ),
                (f"beta {symbol}", format_with_error(self.beta_f, self.beta_f_std_error), "kT"),
                (symbol, format_with_error(self.beta_f * kt, self.beta_f_std_error * kt), energy),
                (
                    f"{symbol} / N",
                    format_with_error(self.beta_f_per_atom * kt, self.beta_f_per_atom_std_error * kt),
                    f"{energy} per atom",
                ),
            ],
        )
        yield f"Contributions to beta {symbol}, in kT: of the crystal, and per atom", self._contributions()
        if self.cell is not None:
            yield "Cell", self._cell()
        yield "Convention", self._convention()
        yield f"Diagnostics ({self.estimator.upper()})", self._diagnostics()
        if self.system.published is not None:
            yield "Published", self._comparison()
        yield "Cost", self._cost()

    def _contributions(self) -> list[tuple[str, str, str]]:
        whole, each = self.beta_f_std_error, self.beta_f_per_atom_std_error
        terms = {**self.components, "sum": self.beta_f}
        with_error = {"work", "sum"}
        totals = _column(terms, whole, with_error)
        per_atom = _column({name: value / self.n_atoms for name, value in terms.items()}, each, with_error)
        return list(zip(terms, totals, per_atom, strict=True))

    def _cell(self) -> list[tuple[str, str, str]]:
        units, (volume, spread, vectors) = self.system.units, self.cell
        mean, error = float(volume.mean), float(volume.std_error)
        rows = [
            ("pressure", f"{self.system.pressure:.10g} {units.pressure}", f"{self.system.cell_motion} cell"),
            (
                "volume",
                format_with_error(mean, error),
                f"{units.length}^3, fluctuates by {spread:.3g}",
            ),
            (
                "volume / N",
                format_with_error(mean / self.n_atoms, error / self.n_atoms),
                f"{units.length}^3",
            ),
        ]
        if self.system.cell_motion == "isotropic":
            return rows
        for name, *edge in zip("abc", vectors.mean.tolist(), vectors.std_error.tolist(), strict=True):
            parts = ", ".join(format_with_error(x, e) if e > 0 else f"{x:.6g}" for x, e in zip(*edge, strict=True))
            rows.append((name, f"[{parts}]", units.length))
        return rows

    def _convention(self) -> list[tuple[str, str, str]]:
        units = self.system.units
        measure = [] if self.cell is None else [("volumes", "in units of Lambda^3; docs/gibbs.md", "")]
        return [
            *measure,
            ("labels", "atoms belong to their sites; permutations not counted", ""),
            ("centre of mass", "free in the box", ""),
            ("Lambda", f"{self.system.thermal_wavelength:.10g} {units.length}", _by_species(self.system)),
            ("k_B", f"{units.boltzmann:.10g} {_boltzmann_unit(self.system)}", ""),
            ("kT", f"{self.system.kt:.10g} {units.energy}", ""),
        ]

    def _diagnostics(self) -> list[tuple[str, str, str]]:
        share, halves, directions = self.largest_weight_share, self.drift_z, self.hysteresis_z
        rows = [
            ("effective sample size", self.ess_fraction, ESS_FRACTION, f"{100 * self.ess_fraction:.3g} %"),
            ("Pareto k", self.pareto_k, PARETO_K, f"{self.pareto_k:.2f}"),
            ("largest weight", share, LARGEST_WEIGHT_SHARE, f"{100 * share:.2g} %"),
            ("first against second half", abs(halves), Z_SCORE, f"{halves:+.1f} standard errors"),
        ]
        if self.overlap is not None:
            rows.append(("overlap", self.overlap, OVERLAP, f"{self.overlap:.3f}"))
        if directions is not None:
            rows.append(("forward against reverse", abs(directions), Z_SCORE, f"{directions:+.1f} standard errors"))
        table = [(name, text, scale.word(value)) for name, value, scale, text in rows if not math.isnan(value)]
        bootstrap, analytic = self.bootstrap_std_error, self.beta_f_std_error
        if math.isfinite(bootstrap) and bootstrap > 0 and analytic > 0:
            ratio = bootstrap / analytic
            text = f"{bootstrap / self.n_atoms:.2g} kT per atom"
            table.append(("bootstrap error", text, BOOTSTRAP_RATIO.word(max(ratio, 1 / ratio))))
        return table

    def _comparison(self) -> list[tuple[str, str, str]]:
        published = self.system.published
        assert published is not None
        value, error = published.beta_f_per_atom, published.std_error
        combined = math.hypot(self.beta_f_per_atom_std_error, error or 0.0)
        difference = self.beta_f_per_atom - value
        z = self.z_score
        text = f"{value:.10g}" if error is None else format_with_error(value, error)
        rows = [(f"beta {self.symbol} / N", text, published.source)]
        apart = "" if math.isnan(z) else f"{z:+.1f} combined standard errors"
        rows.append(("difference", format_with_error(difference, combined), apart))
        return rows

    def _cost(self) -> list[tuple[str, str, str]]:
        evaluations = ", ".join(f"{name} {_count(n)}" for name, n in self.energy_evaluations.items() if n)
        parts = {name: seconds for name, seconds in self.wall_seconds.items() if name != "total"}
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in parts.items() if not math.isnan(value))
        forward, reverse = (int(part.shape[0]) for part in self.work)
        return [
            ("energy evaluations", _count(sum(self.energy_evaluations.values())), evaluations),
            ("samples", _count(self.n_samples), f"{_count(forward)} forward, {_count(reverse)} reverse"),
            ("wall time", f"{self.wall_seconds.get('total', math.nan):.1f} s", seconds),
        ]


_STYLES = {"good": "green", "fair": "yellow", "poor": "bold red"}


def format_with_error(value: float, error: float) -> str:
    """A value with its standard error in parentheses, in units of the last digit: -25.16311(9).

    One digit of the error is kept, two where it starts with 1 or 2. Errors above 1 keep their
    decimal point, as in 33.6(1.2). An error that is not known is written (?).

    Raises:
        ValueError: If the error is negative.
    """
    value, error = float(value), float(error)
    if error < 0:
        raise ValueError(f"a standard error cannot be negative, got {error}")
    if math.isnan(value):
        return "not estimable"
    if math.isinf(value):
        return str(value)
    if not math.isfinite(error) or error == 0:
        return f"{value:.10g}({'?' if math.isnan(error) else f'{error:g}'})"
    if error >= 1e6 or error < 1e-15:
        return f"{value:.6g} +- {error:.1g}"
    decimals = _decimals(error)
    digits = Decimal(repr(error)).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)
    number = _fixed(value, decimals)
    if error < 1 and digits < 1:
        return f"{number}({int(digits.scaleb(decimals))})"
    return f"{number}({digits})"


def require_table_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work whether `Result.write_u_nk` can write there.

    Raises:
        InputError: If .parquet is wanted and pandas or pyarrow is not installed.
        FreeflowError: If the file cannot be written.
    """
    require_writable(path)
    if str(path).endswith(".parquet"):
        _parquet([], 1.0)


def _parquet(rows: Sequence[tuple[float, float, float, float]], temperature: float) -> bytes:
    try:
        import pandas
        import pyarrow  # noqa: F401  (what pandas writes with)
    except ImportError:
        raise InputError("parquet needs pandas and pyarrow: install freeflow[parquet], or write .csv") from None
    table = pandas.DataFrame(rows, columns=["time", "fep-lambda", 0.0, 1.0], dtype=float)
    table = table.set_index(["time", "fep-lambda"])
    table.attrs |= {"temperature": temperature, "energy_unit": "kT"}
    sheet = io.BytesIO()
    table.to_parquet(sheet, engine="pyarrow")
    return sheet.getvalue()


def provenance(system: System, plan: Plan) -> dict[str, Any]:
    """What it takes to repeat a run: versions, device, seed, and the input with every default."""
    estimate = {name: value for name, value in vars(plan).items() if name not in {"flow", "bridge", "trajectory"}}
    estimate["flow"] = plan.flow and plan.flow.values()
    estimate["trajectory"] = plan.trajectory and dict(vars(plan.trajectory))
    estimate["bridge"] = None if plan.bridge is None else {"stages": plan.bridge}
    estimate = {**dict(system.config.get("estimate", {})), **estimate}
    return {**environment(plan.seed), "config": {**system.config, "estimate": estimate}}


def environment(seed: int) -> dict[str, Any]:
    """Versions, device and seed of a run."""
    import jax
    import numpy as np

    device = jax.devices()[0]
    kind = getattr(device, "device_kind", device.platform)
    same = kind == device.platform
    return {
        "freeflow": _version("freeflow"),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.platform if same else f"{device.platform} ({kind})",
        "seed": seed,
    }


def _decimals(error: float) -> int:
    """How many decimal places an error bar leaves meaningful; never fewer than none."""
    exact = Decimal(repr(error))
    exponent = exact.adjusted()
    two = exact.quantize(Decimal(1).scaleb(exponent - 1), ROUND_HALF_UP).scaleb(1 - exponent)
    return max(0, 1 - exponent if two < 30 else -exponent)


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if not text.strip("-0.") else text


def _column(values: Mapping[str, float], error: float, with_error: set[str]) -> list[str]:
    """Numbers with as many decimals as the error allows, aligned at the point."""
    decimals = _decimals(error) if 1e-15 < error < 1e6 else 5
    texts = {name: "?" if math.isnan(value) else _fixed(value, decimals) for name, value in values.items()}
    width = max(map(len, texts.values()))
    pads = {name: " " * (width - len(text)) for name, text in texts.items()}
    if 1e-15 < error < 1e6:
        ends = {name: format_with_error(values[name], error)[len(text) :] for name, text in texts.items()}
    else:
        ends = dict.fromkeys(texts, "(?)" if math.isnan(error) else f" +- {error:.1g}" if error else "")
    known = {name for name in with_error if not math.isnan(values[name])}
    return [pads[name] + text + (ends[name] if name in known else "") for name, text in texts.items()]


def in_words(system: System) -> str:
    """A system in one line: crystal, size, potential, temperature."""
    crystal = system.crystal.description or "crystal"
    potential = getattr(system.potential, "name", "")
    at = f"{system.temperature:g} {system.units.temperature}"
    if system.cell_motion is not None:
        at += f", {system.pressure:g} {system.units.pressure}"
    return ", ".join(part for part in (crystal, f"{system.n_atoms} atoms", potential, at) if part)


def _by_species(system: System) -> str:
    """Thermal wavelengths where there are several; what stands beside it is their geometric mean over the atoms."""
    if len(set(system.wavelengths.values())) < 2:
        return ""
    return ", ".join(f"{name} {value:.6g}" for name, value in system.wavelengths.items())


def _boltzmann_unit(system: System) -> str:
    units = system.units
    return "in reduced units" if units.name == "lj" else f"{units.energy}/{units.temperature}"


def _count(n: int) -> str:
    return f"{n:,}".replace(",", " ")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
