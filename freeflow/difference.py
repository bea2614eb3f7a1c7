"""Answers to one two-state problem by several methods, side by side: value, error bar, cost, verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from freeflow.documents import JSON_VERSION, Document, plain, print_lines, print_verdict
from freeflow.result import format_with_error
from freeflow.types import DifferencePlan, Work

if TYPE_CHECKING:
    from freeflow.solutions import Solution

Status = Literal["converged", "target_not_reached", "unreliable", "interrupted"]
METHODS: Mapping[str, str] = {
    "fep": "exponential average from A alone, no map",
    "bar": "acceptance ratio from A and B, no map",
    "radial": "acceptance ratio after Jarzynski's radial map",
    "lfep": "exponential average after a learned map",
    "lbar": "acceptance ratio after a learned map",
    "bridge": "switching the solute from A to B and back",
    "escort": "switching, with a fitted field that moves the solvent along",
    "mbar": "states between A and B, all sampled",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What one method says of F_B - F_A [kT]."""

    method: str
    delta_f: float
    std_error: float  # NaN: not estimable
    reasons: tuple[str, ...]  # why not to trust it; empty if there is no reason
    n_samples: tuple[int, int]  # of A and B, that the estimate was made from
    energy_evaluations: int  # spent for this method, the samples that it shares with others included
    wall_seconds: float
    work: Work | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # overlap, stages, frames for training ...
    how: str = ""  # one line, where there is something to say

    @property
    def reliable(self) -> bool:
        return not self.reasons and math.isfinite(self.delta_f) and math.isfinite(self.std_error)


@dataclass(frozen=True, kw_only=True, eq=False)
class DifferenceResult(Document):
    """The free energy difference of two states, by every method that was asked for."""

    problem: Solution
    plan: DifferencePlan
    answers: tuple[Answer, ...]  # in the order of the plan
    wall_seconds: Mapping[str, float]
    samples: Mapping[str, Any]  # where the samples of A and B came from
    warnings: tuple[str, ...] = ()
    interrupted: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quantity: str = "free_energy_difference"

    @property
    def best(self) -> Answer:
        """The reliable answer with the smallest error bar; the first one if none is reliable."""
        return min((a for a in self.answers if a.reliable), key=lambda a: a.std_error, default=self.answers[0])

    @property
    def delta_f(self) -> float:
        return self.best.delta_f

    @property
    def delta_f_std_error(self) -> float:
        return self.best.std_error

    @property
    def status(self) -> Status:
        if self.interrupted:
            return "interrupted"
        if not self.best.reliable:
            return "unreliable"
        return "converged" if self.best.std_error <= self.plan.target_error else "target_not_reached"

    @property
    def exit_status(self) -> int:
        """What the command line returns for this result."""
        return {"converged": 0, "target_not_reached": 3, "unreliable": 3, "interrupted": 130}[self.status]

    @property
    def z_score(self) -> float:
        """Difference from the published value in combined standard errors; NaN if there is none."""
        published = self.problem.published
        if published is None:
            return math.nan
        combined = math.hypot(self.delta_f_std_error, published.std_error or 0.0)
        return (self.delta_f - published.delta_f) / combined if combined > 0 else math.nan

    def efficiency(self, answer: Answer) -> float:
        """How many times less an error bar costs than with `bar`, in energy evaluations; NaN without such an answer."""
        bar = next((a for a in self.answers if a.method == "bar"), None)
        if bar is None or not (answer.std_error > 0 and bar.std_error > 0):
            return math.nan
        return bar.std_error**2 * bar.energy_evaluations / (answer.std_error**2 * max(answer.energy_evaluations, 1))

    @property
    def summary(self) -> str:
        """One line: the best value in kT with its error, the method, and the verdict."""
        value = format_with_error(self.delta_f, self.delta_f_std_error)
        return f"{value} {self.best.method} {self.status.replace('_', ' ')}"

    @property
    def verdict(self) -> str:
        """The outcome in one plain sentence."""
        best, error, target = self.best, f"{self.delta_f_std_error:.2g}", f"{self.plan.target_error:g}"
        if self.status == "converged":
            return f"Converged ({best.method}): one standard error is {error} kT; the target was {target}."
        if self.status == "target_not_reached":
            return f"Target not reached ({best.method}): one standard error is {error} kT; the target was {target}."
        if self.status == "interrupted":
            return "Interrupted; this is what was found so far."
        reason = best.reasons[0] if best.reasons else "no finite answer or error bar"
        return f"Not reliable ({best.method}): {reason}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names of the JSON contract, version 1; None where nothing applies."""
        units, published, best = self.problem.units, self.problem.published, self.best
        answers = [
            {
                "method": a.method,
                "delta_f": a.delta_f,
                "delta_f_std_error": a.std_error,
                "reliable": a.reliable,
                "reasons": a.reasons,
                "how": a.how,
                "n_samples": list(a.n_samples),
                "energy_evaluations": a.energy_evaluations,
                "wall_seconds": a.wall_seconds,
                "efficiency": self.efficiency(a),
                **a.facts,
            }
            for a in self.answers
        ]
        return plain(
            {
                "version": JSON_VERSION,
                "system": self.problem.name,
                "n_atoms": self.problem.n_solvent,
                "quantity": self.quantity,
                "delta_f": self.delta_f,
                "delta_f_std_error": self.delta_f_std_error,
                "free_energy": {
                    "value": self.delta_f * self.problem.kt,
                    "std_error": self.delta_f_std_error * self.problem.kt,
                    "unit": units.energy,
                },
                "estimator": best.method,
                "n_samples": sum(best.n_samples),
                "target_error": self.plan.target_error,
                "overlap": best.facts.get("overlap"),
                "energy_evaluations": best.energy_evaluations,
                "wall_seconds": dict(self.wall_seconds),
                "status": self.status,
                "warnings": self.warnings,
                "methods": answers,
                "samples": self.samples,
                "published": published
                and {
                    "delta_f": published.delta_f,
                    "std_error": published.std_error,
                    "z_score": self.z_score,
                    "source": published.source,
                },
                "provenance": self.provenance,
            }
        )

    def render(self, console: Console) -> None:
        """Print the table of methods and the verdict."""
        problem = self.problem
        (a, b), length = problem.radii, problem.units.length
        at = " and ".join(f"{t:g}" for t in dict.fromkeys(problem.temperatures))
        console.print(Text(problem.name, style="bold"))
        console.print(
            f"{problem.n_solvent} solvent atoms, {problem.solute.kind} solute of {a:.5g} (A) and {b:.5g} {length} (B), "
            f"{at} {problem.units.temperature}"
        )
        for name, text in self.samples.items():
            console.print(Text(f"{name}: {text}"))
        console.print()
        heads = ("method", "F_B - F_A [kT]", "samples", "evaluations", "time", "efficiency", "", "")
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for k, head in enumerate(heads):
            table.add_column(Text(head), justify="left" if k in {0, 1, 6, 7} else "right", overflow="fold")
        for answer in self.answers:
            ratio = self.efficiency(answer)
            table.add_row(
                f"  {answer.method}",
                format_with_error(answer.delta_f, answer.std_error),
                " + ".join(str(n) for n in answer.n_samples if n),
                f"{answer.energy_evaluations:.2g}",
                f"{answer.wall_seconds:.1f} s",
                "" if math.isnan(ratio) else f"{ratio:.3g}",
                Text("reliable", style="green") if answer.reliable else Text("not reliable", style="bold red"),
                METHODS[answer.method],
            )
        published = self.problem.published
        if published is not None:
            error = math.nan if published.std_error is None else published.std_error
            value = format_with_error(published.delta_f, error)
            table.add_row("  published", value, "", "", "", "", "", published.source)
        console.print(table)
        notes = [f"{answer.method}: {reason}" for answer in self.answers for reason in answer.reasons]
        ways = [f"{answer.method}: {answer.how}" for answer in self.answers if answer.how]
        print_lines(console, "How", ways, "")
        print_lines(console, "Why not reliable", notes)
        print_lines(console, "Warnings", self.warnings)
        print_verdict(console, self.verdict, self.status == "converged")
