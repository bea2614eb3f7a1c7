"""`freeflow compare`: a trajectory against the model, what both say of the same crystal, and whether they agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.special import ndtr

from freeflow.cells import CELL_MOTIONS, Strained
from freeflow.documents import JSON_VERSION, Document, print_lines, print_verdict
from freeflow.estimators import diagnose, effective_sample_size, fep, record, reliability
from freeflow.observables import (
    Average,
    RadialDistribution,
    Test,
    common_edges,
    difference,
    histogram,
    kolmogorov_smirnov,
    largest_difference,
    radial_distribution,
    time_average,
    weighted_average,
)
from freeflow.observers import Profile, observed_crystal, observer, profile
from freeflow.pipeline import carried_out, read_trajectory, settled
from freeflow.preparation import Clock, Progress, Report
from freeflow.result import Result, format_with_error
from freeflow.trajectories import Equilibrium, FrameSeries, energies
from freeflow.types import Plan, System, TrajectoryPlan

Verdict = Literal["agree", "disagree", "inconclusive"]
FALSE_ALARMS = 1e-3  # chance that some check fails though trajectory and model are the same
_FEWEST = 20.0  # effective samples of the model; fewer tell nothing
_PAIRS = 3e8  # of atoms whose distances are looked at in frames
_FEWEST_PROFILES = 200  # frames for g(r)
_ROUNDED = 64  # frames that are rounded once more, to see what rounding does to their energy


class Check(NamedTuple):
    """One question put to model and trajectory."""

    name: str  # "mean energy"
    model: str  # what the model says, as text with error bar and unit
    md: str  # what the trajectory says
    statistic: str  # "z = +1.2", "KS = 0.03"
    p_value: float  # chance of a difference as large or larger if both are the same; NaN: not estimable
    passed: bool | None  # None: could not be told


class Distribution(NamedTuple):
    """Histogram of a number per configuration, from model and trajectory."""

    edges: np.ndarray  # (n_bins + 1,)
    model: Average  # (n_bins,) probability densities
    md: Average
    model_mean: Average  # ()
    md_mean: Average


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison(Document):
    """What importance-weighted samples of the model and the frames of a trajectory say."""

    system: System
    plan: Plan
    series: FrameSeries  # all frames
    start: int  # first frame that is used: equilibration ends there
    inefficiency: float  # statistical inefficiency g of the energies from there on
    result: Result  # BAR from forward work and the reverse work of the frames
    fep_per_atom: Average  # beta F / N from the forward work alone [kT]
    energy: Distribution  # potential energy per atom [energy]
    displacement: Distribution  # mean squared displacement [length^2]
    profile: Profile
    checks: tuple[Check, ...]
    verdict: Verdict
    reason: str  # one sentence
    volume: Distribution | None = None  # per atom, where the cell moves [length^3]
    warnings: tuple[str, ...] = ()
    wall_seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_atoms(self) -> int:
        return self.system.n_atoms

    @property
    def exit_status(self) -> int:
        """What the command line returns."""
        return 0 if self.verdict == "agree" else 3

    @property
    def summary(self) -> str:
        """One line: the verdict and its reason."""
        return f"{self.verdict}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract of comparisons, version 1; None where nothing applies."""
        series = self.series
        return {
            "version": JSON_VERSION,
            "system": self.system.name,
            "n_atoms": self.n_atoms,
            "verdict": self.verdict,
            "reason": self.reason,
            "checks": [{**check._asdict(), "p_value": _finite(check.p_value)} for check in self.checks],
            "energy_per_atom": {**_both(self.energy), "unit": self.system.units.energy},
            "mean_squared_displacement": {**_both(self.displacement), "unit": f"{self.system.units.length}^2"},
            **self._volumes(),
            "free_energy": {
                "fep": _plain(self.fep_per_atom),
                "bar": {
                    "value": _finite(self.result.beta_f_per_atom),
                    "std_error": _finite(self.result.beta_f_per_atom_std_error),
                },
                "unit": "kT per atom",
            },
            "trajectory": {
                "file": series.path,
                "n_frames": series.n_frames,
                "n_melted": int(series.melted.sum()),
                "n_hopped": int(series.hopped.sum()),
                "equilibrated_from": self.start,
                "inefficiency": self.inefficiency,
                "energies": series.energy_comparison.verdict,
            },
            "estimate": self.result.to_dict(),
            "wall_seconds": dict(self.wall_seconds),
            "warnings": list(self.warnings),
        }

    def _volumes(self) -> dict[str, Any]:
        if self.volume is None:
            return {}
        return {"volume_per_atom": {**_both(self.volume), "unit": f"{self.system.units.length}^3"}}

    @property
    def facts(self) -> list[tuple[str, str, str]]:
        """What there is to know of the trajectory and the model: name, value, remark."""
        series, n = self.series, self.series.n_frames
        lost = int(series.melted.sum()), int(series.hopped.sum())
        used = int(series.sound[self.start :].sum())
        forward = np.asarray(self.result.work.forward)
        return [
            ("frames", str(n), f"{lost[0]} melted, {lost[1]} with an atom off its site"),
            ("used", str(used), f"from frame {self.start} on"),
            ("independent", f"{used / self.inefficiency:.0f}", f"statistical inefficiency {self.inefficiency:.3g}"),
            ("energies in the file", "", series.energy_comparison.verdict),
            ("model samples", str(len(forward)), f"{_effective(forward):.0f} effective"),
        ]

    @property
    def symbol(self) -> str:
        """Of the free energy: G where the cell moves."""
        return _symbol(self.system)

    @property
    def free_energies(self) -> list[tuple[str, str, str]]:
        """beta F / N, or G, in kT per atom as the model alone, model and frames, and the literature have it."""
        result, published = self.result, self.system.published
        both = format_with_error(result.beta_f_per_atom, result.beta_f_per_atom_std_error)
        rows = [
            ("FEP", _text(self.fep_per_atom), "model alone"),
            ("BAR", both, f"with the reverse work of {len(result.work.reverse)} frames"),
        ]
        if published is not None:
            error = math.nan if published.std_error is None else published.std_error
            rows.append(("published", format_with_error(published.beta_f_per_atom, error), published.source))
        return rows

    def render(self, console: Console) -> None:
        """Print the tables and the verdict."""
        console.print(Text(f"{self.system.name} against {self.series.path}", style="bold"))
        for title, heads, rows in self._tables():
            console.print()
            console.print(Text(title, style="bold"))
            table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=bool(heads))
            for head in heads or [""] * len(rows[0]):
                table.add_column(Text(head), overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in (f"  {row[0]}", *row[1:])))
            console.print(table)
        print_lines(console, "Warnings", self.warnings)
        print_verdict(console, self.sentence, self.verdict == "agree")

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        return f"{self.verdict.capitalize()}: {self.reason}"

    def _tables(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        yield "Trajectory and model", (), [*self.facts]
        checks = [
            (check.name, check.model, check.md, check.statistic, _p_text(check.p_value), _WORDS[check.passed])
            for check in self.checks
        ]
        yield "Checks", ("", "model", "trajectory", "statistic", "p", ""), checks
        yield f"beta {self.symbol} / N, in kT per atom", (), [*self.free_energies]


_STYLES = {"agree": "green", "disagree": "bold red", "not told": "yellow"}
_WORDS: Mapping[bool | None, str] = {True: "agree", False: "disagree", None: "not told"}


def _p_text(p: float) -> str:
    if math.isnan(p):
        return ""
    return f"{p:.2g}" if p >= 1e-12 else "< 1e-12"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(average: Average) -> dict[str, float | None]:
    return {"value": _finite(float(average.mean)), "std_error": _finite(float(average.std_error))}


def _both(distribution: Distribution) -> dict[str, Any]:
    return {"model": _plain(distribution.model_mean), "trajectory": _plain(distribution.md_mean)}


def _effective(work: np.ndarray) -> float:
    """Kish's effective number of samples of weight exp(-work)."""
    return effective_sample_size(-work) if np.isfinite(work).any() else 0.0


# ------------------------------------------------------------------------------ the job


def compare(
    system: System | str | Path | dict[str, Any],
    trajectory: str | Path | TrajectoryPlan,
    plan: Plan | None = None,
    progress: Report | None = None,
    *,
    topology: str | Path | None = None,
    frames: str = ":",
    sigma: Literal["angstrom", "nm"] | None = None,
    **changes: Any,
) -> Comparison:
    """Whether the frames of a trajectory are samples of a system, as weighted samples of the model see it.

    Compared are mean and distribution of the energy and of the mean squared displacement, g(r), the free energy from
    forward and from reverse work, and the energies in the file with recomputed ones. Under a pressure also mean and
    distribution of the volume, and the mean shape of the cell if it changes. Error bars of the trajectory
    allow for correlation. With `FALSE_ALARMS` shared among the checks, that is how often a sound trajectory fails.

    Args:
        system: A system, or what `freeflow.load` makes one from.
        trajectory: A file that `freeflow.trajectories.read` reads; or all of what follows about it as one record.
        plan: How to sample the model; the system's own plan by default.
        progress: Called now and then with what is going on.
        topology: A file with the topology, checked against the system; no format needs one.
        frames: START:STOP:STRIDE of the frames to use, as in Python.
        sigma: What one sigma is stored as, where lj units meet a file without a cell.
        **changes: Values of the plan to replace, such as `target_error=1e-4` [kT per atom].

    Raises:
        InputError: If the system, the plan or the file cannot be used.
        LostCrystalError: If no frame is this crystal.
        KeyboardInterrupt: If interrupted before any sample was complete.
    """
    if isinstance(trajectory, TrajectoryPlan):
        what = trajectory
    else:
        name = None if topology is None else str(topology)
        what = TrajectoryPlan(str(Path(trajectory).absolute()), name, frames, sigma)
    system, plan = settled(system, plan, {"trajectory": what, "estimator": "bar", **changes})
    assert plan.trajectory is not None
    report, clock = progress or (lambda _: None), Clock()
    found = read_trajectory(system, plan.trajectory, report)
    clock.lap("trajectory")
    if system.cell_motion is None:
        distribution = radial_distribution(system.crystal)
        result = carried_out(system, plan, report, clock, found, observer(system, distribution))
    else:  # which reference cell arrivals are relative to is known in the end
        result = carried_out(system, plan, report, clock, found, observed_crystal)
        found = found.in_reference(system.crystal, result.system.crystal)
        system = result.system
        distribution = radial_distribution(system.crystal)
        report(Progress("comparing", None, "energies"))
        result = replace(result, observed=observer(system, distribution)(result.observed))
    report(Progress("comparing", None, "radial distribution functions"))
    compared = _compared(system, plan, found, result, distribution)
    clock.lap("observables")
    return Comparison(**compared, wall_seconds=clock.seconds(), provenance=result.provenance)


def _compared(
    system: System, plan: Plan, found: Equilibrium, result: Result, distribution: RadialDistribution
) -> dict[str, Any]:
    series, n_atoms, units = found.series, system.n_atoms, system.units
    forward, used = np.asarray(result.work.forward), found.used
    log_weights, effective = -forward, _effective(forward)
    warnings = list(found.remarks)
    raised, rounding = _rounding(system, found)
    if rounding:
        warnings.append(rounding)
    warnings += [text for text in result.warnings if not text.startswith("trajectory: ")]
    pairs = [
        ("energy", "per atom", units.energy, result.observed.energy / n_atoms, (series.energies - raised) / n_atoms),
        (
            "mean squared displacement",
            "",
            f"{units.length}^2",
            result.observed.displacement,
            series.mean_squared_displacements,
        ),
    ]
    volumes = series.volumes(system.crystal)
    if volumes is not None:
        of_model = system.crystal.volume * np.exp(np.trace(result.observed.strain, axis1=1, axis2=2))
        pairs.append(("volume", "per atom", f"{units.length}^3", of_model / n_atoms, volumes / n_atoms))
    distributions, asked = [], []
    for name, per, unit, of_model, of_frames in pairs:
        g = found.inefficiency_of(of_frames)
        ours, theirs = weighted_average(of_model, log_weights), time_average(of_frames[used], g)
        n = int(used.sum()) / g
        edges = common_edges(of_model, log_weights, of_frames[used])
        bins = histogram(of_model, edges, log_weights=log_weights), histogram(of_frames[used], edges, inefficiency=g)
        distributions.append(Distribution(edges, *bins, ours, theirs))
        apart = difference(ours, effective, theirs, n)
        mean = name if name.startswith("mean") else f"mean {name}"
        texts = tuple(f"{_text(average)} {unit}" for average in (ours, theirs))
        asked.append((f"{mean} {per}".strip(), *texts, f"z = {apart.statistic:+.1f}", apart))
        spread = kolmogorov_smirnov(of_model, log_weights, of_frames[used], g)
        sizes = f"{effective:.0f} effective", f"{n:.0f} effective"
        asked.append((f"distribution of the {name}", *sizes, f"KS = {spread.statistic:.3f}", spread))
    if series.strains is not None and (shape := _shapes(system, result, found, effective)) is not None:
        asked.append(shape)
    shape, apart = _profiles(result, found, distribution, effective)
    where = f"up to {distribution.edges[-1]:.4g} {units.length}"
    asked.append(("g(r)", where, where, f"largest z = {apart.statistic:.1f}", apart))
    answer = fep(record(forward))
    constants = result.beta_f - result.delta_f
    alone = Average(*(np.asarray(x) for x in ((constants + answer.delta_f) / n_atoms, answer.std_error / n_atoms)))
    asked.append(_free_energies(result, alone))
    limit = FALSE_ALARMS / len(asked)
    checks = [
        Check(*texts, p_value=test.p_value, passed=None if math.isnan(test.p_value) else test.p_value >= limit)
        for *texts, test in asked
    ]
    if series.energy_comparison.agrees is not None:
        checks.append(_file_energies(found))
    weak = reliability(diagnose(record(forward), seed=plan.seed), answer)
    verdict, reason = _verdict(checks, found, effective, weak)
    return {
        "system": system,
        "plan": plan,
        "series": series,
        "start": found.start,
        "inefficiency": found.inefficiency,
        "result": result,
        "fep_per_atom": alone,
        "energy": distributions[0],
        "displacement": distributions[1],
        "volume": distributions[2] if len(distributions) > 2 else None,
        "profile": shape,
        "checks": tuple(checks),
        "verdict": verdict,
        "reason": reason,
        "warnings": tuple(
            dict.fromkeys([*warnings, *(w for w in result.warnings if not w.startswith("trajectory: "))])
        ),
    }


def _symbol(system: System) -> str:
    return "F" if system.cell_motion is None else "G"


def _text(average: Average) -> str:
    return format_with_error(float(average.mean), float(average.std_error))


def _shapes(
    system: System, result: Result, found: Equilibrium, effective: float
) -> tuple[str, str, str, str, Test] | None:
    """Whether the mean shape of the cell is the same; None if it does not change."""
    assert system.cell_motion is not None and found.series.strains is not None
    shapes = CELL_MOTIONS[system.cell_motion].basis[1:]  # the first one is the volume's
    if not len(shapes):
        return None
    of_model, of_frames = (
        np.tensordot(x, shapes, ((1, 2), (1, 2))) for x in (result.observed.strain, found.series.strains)
    )
    g = max(found.inefficiency_of(values) for values in of_frames.T)
    n = int(found.used.sum()) / g
    ours, theirs = weighted_average(of_model, -np.asarray(result.work.forward)), time_average(of_frames[found.used], g)
    apart = largest_difference(ours, effective, theirs, n)
    said = f"{len(shapes)} strains"
    return "mean shape of the cell", said, said, f"largest z = {apart.statistic:.1f}", apart


def _profiles(
    result: Result, found: Equilibrium, distribution: RadialDistribution, effective: float
) -> tuple[Profile, Test]:
    """g(r) from model and frames, and whether they differ in any bin."""
    model = profile(distribution, result.observed.counts, np.asarray(result.work.forward))
    per_frame = max(float(result.observed.counts.sum(axis=1).max(initial=1.0)), 1.0)
    x, thinned = found.frames(max(_FEWEST_PROFILES, int(_PAIRS / per_frame)))
    g = max(1.0, thinned)
    strains = np.asarray(x.strain) if isinstance(x, Strained) else None
    u = np.asarray(x.displacements) if isinstance(x, Strained) else x
    md = time_average(distribution.normalise(distribution.count(u, strains)), g)
    return model._replace(md=md), largest_difference(model.model, effective, md, len(u) / g)


def _free_energies(result: Result, alone: Average) -> tuple[str, str, str, str, Test]:
    """Whether forward work, reverse work and both together give one free energy."""
    if result.hysteresis_z is None or math.isnan(result.hysteresis_z):
        # One side alone is too few samples for an error bar to rely on: forward against both, which share it.
        error = math.hypot(float(alone.std_error), result.beta_f_per_atom_std_error)
        z, times = (float(alone.mean) - result.beta_f_per_atom) / error if error > 0 else math.nan, 1
    else:
        z, times = result.hysteresis_z, 2  # the largest of up to three, one of which follows from the others
    p = min(1.0, times * 2 * float(ndtr(-abs(z)))) if not math.isnan(z) else math.nan
    both = format_with_error(result.beta_f_per_atom, result.beta_f_per_atom_std_error)
    said = "not estimable" if math.isnan(z) else f"z = {z:+.1f}"
    return f"beta {_symbol(result.system)} / N: FEP against BAR", f"{_text(alone)} kT", f"{both} kT", said, Test(z, p)


def _file_energies(found: Equilibrium) -> Check:
    """Whether the energies in the file are those of the potential, up to a constant."""
    comparison = found.series.energy_comparison
    said = f"within {comparison.max_deviation:.2g}" if comparison.agrees else "differ"
    passed = bool(comparison.agrees) or bool(comparison.offset)
    return Check("energies in the file", "recomputed", f"{comparison.n_frames} frames", said, math.nan, passed)


def _rounding(system: System, found: Equilibrium) -> tuple[float, str]:
    """By how much the file's rounding of positions raises energies on average [energy], and words if it matters."""
    x, _ = found.frames(_ROUNDED)
    u = np.asarray(x.displacements) if isinstance(x, Strained) else x
    if not found.series.resolution > 0 or len(u) < 2:
        return 0.0, ""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, u.shape) * found.series.resolution
    noise -= noise.mean(axis=1, keepdims=True)

    def at(u: np.ndarray) -> np.ndarray:
        return energies(system, x._replace(displacements=u) if isinstance(x, Strained) else u)

    # Noise and its opposite: forces cancel, and what is left is curvature.
    rise = 0.5 * (at(u + noise) + at(u - noise)) - at(u)
    rise = rise[np.isfinite(rise)]
    raised, error = float(rise.mean()), float(rise.std() / math.sqrt(len(rise)))
    spread = float(found.series.energies[found.used].std() / math.sqrt(found.effective))
    if raised < 2 * error or raised < 0.1 * spread:
        return 0.0, ""
    unit = system.units.energy
    return raised, (
        f"the file rounds positions to {found.series.resolution:.2g} {system.units.length}, which raises energies by "
        f"{raised:.2g} {unit} on average; that was taken off"
    )


def _verdict(checks: list[Check], found: Equilibrium, effective: float, weak: tuple[str, ...]) -> tuple[Verdict, str]:
    failed = [check for check in checks if check.passed is False]
    if weak or effective < _FEWEST:
        why = weak[0] if weak else f"only {effective:.1f} effective samples"
        return "inconclusive", f"the model is not sampled well enough to compare with: {why}"
    if failed:
        worst = min(failed, key=lambda check: check.p_value if math.isfinite(check.p_value) else 0.0)
        others = f", and {len(failed) - 1} of the other checks" if len(failed) > 1 else ""
        if math.isnan(worst.p_value):
            return "disagree", f"{found.series.energy_comparison.verdict}{others}"
        numbers = f"{worst.statistic}, p {_p_text(worst.p_value)}".replace("p <", "p <")
        return "disagree", f"{worst.name} differs ({numbers}){others}"
    if found.faults:
        melted = float((~found.series.sound).mean()) > 0.5
        return "disagree" if melted else "inconclusive", found.faults[0]
    told, silent = (sum(check.passed is outcome for check in checks) for outcome in (True, None))
    if silent:
        return "inconclusive", f"{silent} of {len(checks)} checks could not be told; the others passed"
    return "agree", f"all {told} checks passed; a sound trajectory fails one time in {1 / FALSE_ALARMS:.0f}"
