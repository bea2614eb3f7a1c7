"""`freeflow sample`: configurations of a crystal, from Monte Carlo at its state or from the model with weights.

Monte Carlo is the bridge's own generalised hybrid kernel, kept at the target: many chains that start as samples of
the reference, are annealed to the target, and wait there until equilibrium is seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.text import Text

from freeflow import bridge as bridges
from freeflow import team
from freeflow.bridge import Pilot, Schedule, Segment
from freeflow.cells import Strained, stretches
from freeflow.documents import JSON_VERSION, Document, write_atomically
from freeflow.errors import InputError, LostCrystalError
from freeflow.estimators import chain_correlation, effective_sample_size, equilibrated, record
from freeflow.estimators.diagnostics import diagnose, reliability
from freeflow.estimators.two_state import fep
from freeflow.interrupts import looks
from freeflow.observers import observed_crystal
from freeflow.pipeline import settled
from freeflow.preparation import Clock, Progress, Report, Run, learned_flow, tune, with_reference
from freeflow.references import Fit, Gaussian
from freeflow.result import provenance
from freeflow.trajectories import energies, require_writable, rows_of, write
from freeflow.types import Plan, System, double_precision
from freeflow.work import Crowd, completed, systematic_resample

_MAX_BYTES = 8e9
_CHAIN = 8  # frames of a chain that are worth its way to equilibrium
_MAX_BATCHES = 16
_STRIDE = 8  # steps between two looks at the energies
_FIRST_LOOKS, _MAX_LOOKS = 32, 4096
_APART = 2.0  # samples of a chain, in statistical inefficiencies of the energy
_LONG = 10.0  # looks at equilibrium, in statistical inefficiencies, that tell these
_ANNEALING = (64, 512)  # stages from the reference to the target, at least and at most
_UNEVEN = 0.05  # scatter of the energies that the kernel missed from which on samples are resampled [kT]
_LOST = 0.01  # share of samples with an atom off its site above which there is no crystal to speak of


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampling(Document):
    """Configurations of the target, and how independent they are.

    Frames of Monte Carlo come chain after chain, each in the order of time.
    """

    system: System
    plan: Plan
    method: str  # mcmc | weighted | resampled
    # From the sites, float32; where the cell moves in the reference cell, that of `system` [length].
    displacements: Float[np.ndarray, "n n_atoms 3"]
    strains: Float[np.ndarray, "n 3 3"] | None  # logarithmic, of the cells; None if the cell is fixed
    energies: Float[np.ndarray, " n"]  # [energy]
    work: Float[np.ndarray, " n"] | None  # of weighted samples [kT]; their log weights are -work
    effective_samples: float
    facts: Mapping[str, Any]  # what the method found out on the way
    energy_evaluations: int
    wall_seconds: Mapping[str, float]
    status: Literal["complete", "unreliable", "interrupted"]
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> Float[np.ndarray, "n 3 3"] | None:
        """Lattice vectors of every configuration in rows; None if the cell is fixed [length]."""
        return None if self.strains is None else self.system.crystal.cell @ stretches(self.strains)

    @property
    def volumes(self) -> Float[np.ndarray, " n"] | None:
        """Of every configuration; None if the cell is fixed [length^3]."""
        cells = self.cells
        return None if cells is None else np.abs(np.linalg.det(cells))

    @property
    def exit_status(self) -> int:
        """What the command line returns."""
        return {"complete": 0, "unreliable": 3, "interrupted": 130}[self.status]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract of sampling, version 1."""
        return {
            "version": JSON_VERSION,
            "system": self.system.name,
            "n_atoms": self.system.n_atoms,
            "method": self.method,
            "n_samples": len(self.displacements),
            "effective_samples": self.effective_samples,
            **self.facts,
            "energy_evaluations": self.energy_evaluations,
            "wall_seconds": self.wall_seconds["total"],
            "status": self.status,
            "warnings": list(self.warnings),
            "files": [str(file) for file in self.files],
            "provenance": dict(self.provenance),
        }

    @property
    def summary(self) -> str:
        """One line: how many samples, how many they are worth, and where they are."""
        place = f" in {self.files[0]}" if self.files else ""
        return f"{len(self.displacements)} samples, {self.effective_samples:.0f} effective, {self.status}{place}"

    def render(self, console: Console) -> None:
        """Print the table."""
        console.print(Text(str(self)))

    def __str__(self) -> str:
        rows = [
            ("samples", str(len(self.displacements)), _METHODS[self.method]),
            ("effective samples", f"{self.effective_samples:.0f}", ""),
            *(
                (name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value), "")
                for name, value in self.facts.items()
            ),
            ("energy evaluations", str(self.energy_evaluations), ""),
            ("wall time", f"{self.wall_seconds['total']:.1f} s", ""),
            *(("file" if k == 0 else "", str(file), "") for k, file in enumerate(self.files)),
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [self.system.name, ""]
        lines += [f"  {name:<{widths[0]}}   {value:<{widths[1]}}   {note}".rstrip() for name, value, note in rows]
        if self.warnings:
            lines += ["", "Warnings", *(f"  {warning}" for warning in self.warnings)]
        return "\n".join(lines)


_METHODS: Mapping[str, str] = {
    "mcmc": "Monte Carlo at the system's state; chain after chain",
    "weighted": "of the model, independent; to be weighted by exp(-work)",
    "resampled": "of the model, drawn by their weights; repeats are possible",
}


def sample(
    system: System | str | Path | dict[str, Any],
    n_samples: int,
    output: str | Path | None = None,
    plan: Plan | None = None,
    progress: Report | None = None,
    *,
    method: str = "mcmc",
    **changes: Any,
) -> Sampling:
    """Draw configurations of a crystal at its state, and write them as a trajectory if wanted.

    Under a pressure each has a cell of its own.

    Args:
        system: A system, or what `freeflow.load` makes one from.
        n_samples: How many.
        output: Trajectory to write, in any format that `freeflow.trajectories.write` knows; a table of energies (and
            weights) goes beside it, with the ending .csv.
        plan: Reference, flow, bridge, seed; the system's own plan by default.
        progress: Called now and then with what is going on.
        method: "mcmc": chains of generalised hybrid Monte Carlo, equal weights. "weighted": independent samples that
            went over the bridge or through the flow, with weights. "resampled": the same, drawn by their weights.
        **changes: Values of the plan to replace.

    Raises:
        InputError: If the system, the plan or the output cannot be used.
        LostCrystalError: If no sample is this crystal.
        KeyboardInterrupt: If interrupted before any sample was complete.
    """
    system, plan = settled(system, plan, {"estimator": "fep", "trajectory": None, **changes})
    if n_samples < 1:
        raise InputError(f"n_samples: at least one is needed, got {n_samples}")
    if method not in _METHODS:
        raise InputError(f"method: no method {method!r}; use one of {', '.join(_METHODS)}")
    if 12.0 * n_samples * system.n_atoms > _MAX_BYTES:
        raise InputError(
            f"n_samples: {n_samples} of {system.n_atoms} atoms do not fit in memory; draw fewer, with several seeds"
        )
    if output is not None:
        require_writable(output, system)
    report, clock = progress or (lambda _: None), Clock()
    with double_precision():
        flow = learned_flow(system, plan, report)
        with with_reference(system, plan, flow, report) as (run, fit):
            system = run.system  # a cell that moves may have been given another reference
            clock.lap("reference")
            if method == "mcmc":
                drawn = _monte_carlo(run, fit.gaussian, n_samples, report)
            else:
                drawn = _from_model(run, fit, n_samples, report, resample=method == "resampled")
            evaluations = sum(run.sampler.energy_evaluations.values())
    clock.lap("sampling")
    u, strains = _parts(drawn.configurations)
    report(Progress("energies", None, f"of {len(u)} samples"))
    potential, files = energies(system, _joined(u.astype(float), strains)), []
    if output is not None:
        report(Progress("writing", None, str(output)))
        files = write(output, system, u, potential, strains)
        files.append(_table(Path(output), system, drawn, potential))
    return Sampling(
        system=system,
        plan=plan,
        method=method,
        displacements=u,
        strains=strains,
        work=drawn.work,
        effective_samples=drawn.effective_samples,
        facts=drawn.facts,
        status=drawn.status,
        warnings=(*drawn.warnings, *run.warnings),
        energies=potential,
        energy_evaluations=evaluations + len(potential),
        wall_seconds=clock.seconds(),
        files=tuple(files),
        provenance=provenance(system, plan),
    )


class _Drawn(NamedTuple):
    configurations: np.ndarray | Strained  # displacements (n, n_atoms, 3) float32, with strains where the cell moves
    work: np.ndarray | None
    effective_samples: float
    facts: dict[str, Any]
    status: Literal["complete", "unreliable", "interrupted"]
    warnings: tuple[str, ...]


def _parts(configurations: np.ndarray | Strained) -> tuple[np.ndarray, np.ndarray | None]:
    """Displacements and strains."""
    if isinstance(configurations, Strained):
        return np.asarray(configurations.displacements), np.asarray(configurations.strain)
    return configurations, None


def _joined(u: np.ndarray, strains: np.ndarray | None) -> np.ndarray | Strained:
    return u if strains is None else Strained(u, strains)  # pyright: ignore[reportArgumentType]


def _table(output: Path, system: System, drawn: _Drawn, potential: np.ndarray) -> Path:
    """Energies, volumes where they change, and what the weights follow from, one row per frame."""
    columns = {"frame": np.arange(len(potential)), f"energy [{system.units.energy}]": potential}
    _, strains = _parts(drawn.configurations)
    if strains is not None:
        volumes = system.crystal.volume * np.exp(np.trace(strains, axis1=1, axis2=2))
        columns[f"volume [{system.units.length}^3]"] = volumes
    if drawn.work is not None:
        lightest = drawn.work[np.isfinite(drawn.work)].min(initial=math.inf)
        weights = np.exp(np.minimum(lightest - drawn.work, 0.0))
        columns |= {"work [kT]": drawn.work, "weight": weights / weights.sum()}
    rows = [",".join(columns), *(",".join(f"{x:.12g}" for x in row) for row in zip(*columns.values(), strict=True))]
    path = output.with_name(output.name + ".csv")
    write_atomically(path, "\n".join(rows) + "\n")
    return path


# ------------------------------------------------------------------------------ Monte Carlo


class _Equilibrium(NamedTuple):
    """What chains at the target showed before the first sample was taken."""

    steps: int  # spent on the way
    start: int  # step at which equilibration ended
    inefficiency: float  # of the energy [steps]
    correlation: np.ndarray  # of the energy, every `_STRIDE` steps
    reached: bool


def _monte_carlo(run: Run, gaussian: Gaussian, n: int, report: Report) -> _Drawn:
    sampler = run.sampler
    pilot = sampler.pilot(gaussian, lambda lam: report(Progress("tuning", lam, "trial crossing")))
    n_batches = int(np.clip(-(-n // (_CHAIN * sampler.batch)), 1, _MAX_BATCHES))
    crowd = Crowd(sampler, gaussian, range(n_batches), "tuning")
    annealing = _annealing(pilot)
    for segment in _pieces(annealing):
        crowd.move(segment, "tuning")
        report(Progress("annealing", float(segment.stop), f"{len(crowd)} chains on their way to the target"))
    step = float(annealing.step_sizes[-1])
    found = _equilibrate(crowd, step, report)
    interval = max(1, math.ceil(_APART * found.inefficiency))
    rounds = -(-n // len(crowd))
    before, taken, status = crowd.read("accepted"), [], "complete"
    try:
        while len(taken) < rounds:
            crowd.move(_stay(step, interval), "sampling")
            taken.append((observed_crystal(crowd.displacements()), crowd.corrections()))
            report(
                Progress(
                    "sampling", len(taken) / rounds, f"{len(taken) * len(crowd)} samples, one every {interval} steps"
                )
            )
    except KeyboardInterrupt:
        sampler.stop()
        if not taken:
            raise
        status = "interrupted"
    acceptance = float(np.mean(crowd.read("accepted") - before)) / (len(taken) * interval)
    # (rounds, chains, ...) to chain after chain.
    configurations, missed = jax.tree.map(
        lambda *rounds: np.swapaxes(np.stack(rounds), 0, 1).reshape(-1, *rounds[0].shape[1:])[:n], *taken
    )
    lost = ~np.isfinite(missed)
    warnings = []
    if lost.all():
        raise LostCrystalError("in every sample an atom left its site: there is no such crystal at this state")
    if lost.any() or np.std(missed) > _UNEVEN:
        # The kernel's neighbour list and precision gave other weights than the target's.
        chosen = systematic_resample(-missed, np.random.default_rng(run.plan.seed))
        configurations = rows_of(configurations, chosen)
        warnings.append(
            f"{len(chosen) - len(np.unique(chosen))} samples are repeats: they stand for some that had left the crystal"
        )
    melted = float(lost.mean()) > _LOST
    if melted:
        warnings.insert(
            0, f"in {lost.mean():.0%} of the samples an atom left its site: the crystal melts or its atoms hop here"
        )
    if not found.reached:
        warnings.insert(0, f"no equilibrium was seen in {found.steps} steps")
    if status == "complete" and (melted or not found.reached):
        status = "unreliable"
    every = max(1, interval // _STRIDE)
    later = found.correlation[every::every]
    g = (
        1.0 + 2.0 * float(later[: np.argmax(later <= 0)].sum())
        if (later <= 0).any()
        else 1.0 + 2.0 * float(later.sum())
    )
    facts = {
        "chains": len(crowd),
        "equilibration_steps": found.start,
        "steps_before_first_sample": int(annealing.counts.sum()) + found.steps + interval,
        "steps_between_samples": interval,
        "inefficiency_of_energy_in_steps": found.inefficiency,
        "inefficiency_of_samples": g,
        "acceptance": acceptance,
    }
    return _Drawn(configurations, None, len(missed) / g, facts, status, tuple(warnings))


def _annealing(pilot: Pilot) -> Schedule:
    return bridges.schedule_from(pilot, int(np.clip(bridges.thermodynamic_length(pilot) ** 2, *_ANNEALING)))


def _pieces(schedule: Schedule) -> list[Segment]:
    whole = bridges.segments_of(schedule)
    return [Segment(*(np.asarray(part[k]) for part in whole)) for k in range(len(whole.count))]


def _stay(step: float, count: int) -> Segment:
    """Steps at the target."""
    return Segment(np.float64(1.0), np.float64(1.0), np.float64(step), np.int32(count))


def _equilibrate(crowd: Crowd, step: float, report: Report) -> _Equilibrium:
    """Stay at the target until the chains' mean energy is stationary, and for long enough to know its correlation."""
    seen: list[np.ndarray] = []
    looks = _FIRST_LOOKS
    while True:
        while len(seen) < looks:
            crowd.move(_stay(step, _STRIDE), "tuning")
            seen.append(crowd.read("u_b"))
            text = f"{len(crowd)} chains, {len(seen) * _STRIDE} steps"
            report(Progress("equilibration", len(seen) / looks, text))
        series = np.array(seen)
        start = equilibrated(series.mean(axis=1)).start
        correlation, g = chain_correlation(series[start:])
        reached = start <= looks / 2 and looks - start >= _LONG * g
        if reached or looks >= _MAX_LOOKS:
            return _Equilibrium(looks * _STRIDE, start * _STRIDE, g * _STRIDE, correlation, reached)
        looks *= 2


# ------------------------------------------------------------------------------ the model


def _from_model(run: Run, fit: Fit, n: int, report: Report, resample: bool) -> _Drawn:
    """Independent samples that crossed the bridge or came through the flow."""
    sampler = run.sampler
    crossing = tune(run, fit, report)
    stages, moved = int(crossing.schedule.counts.sum()), 0

    def on_segment(evaluations: int) -> None:  # called from the sampling threads; a lost update would dent the bar
        nonlocal moved
        moved += evaluations

    jobs = sampler.cross(crossing.params, range(-(-n // sampler.batch)), on_segment, observe=observed_crystal)
    status = "complete"
    try:
        for _ in looks(jobs):
            report(Progress("sampling", min(moved / (n * max(stages, 1)), 0.99), f"{n} samples over {stages} stages"))
    except KeyboardInterrupt:
        sampler.stop()
        status = "interrupted"
    arrived = team.gathered(completed(jobs))
    if not arrived:
        raise KeyboardInterrupt
    work = np.concatenate([part.forward for part in arrived])[:n]
    # What is nowhere has no weight either.
    drawn = jax.tree.map(lambda *parts: np.nan_to_num(np.concatenate(parts)[:n]), *(part.observed for part in arrived))
    weights = record(work)
    answer = fep(weights)
    reasons = reliability(diagnose(weights, seed=run.plan.seed), answer)
    if status == "complete" and reasons:
        status = "unreliable"
    effective = effective_sample_size(-work) if np.isfinite(work).any() else 0.0
    facts: dict[str, Any] = {"stages": stages, "ess_fraction": float(answer.ess_fraction)}
    if not resample:
        return _Drawn(drawn, work, effective, facts, status, tuple(reasons))
    chosen = systematic_resample(-work, np.random.default_rng(run.plan.seed))
    facts["distinct"] = len(np.unique(chosen))
    return _Drawn(rows_of(drawn, chosen), None, effective, facts, status, tuple(reasons))
