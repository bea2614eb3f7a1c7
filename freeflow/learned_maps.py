"""Maps that learn from frames of the two states of a solution, and whose frames they carry.

Frames are cut into folds, blocks of time or whole chains. The map that carries the frames of one fold has learned from
the other folds and from nothing else, so that all frames are estimated from, and none by a map that has seen it.
Each map on its own obeys Crooks's theorem on the frames that it carries, and so does the pooled work of them all:
a mixture of work distributions whose ratios forward to reverse are one and the same function is such a pair again.

References: Chernozhukov et al., Econometrics Journal 21, C1 (2018), for cross-fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from freeflow.bijectors.radial import analytic_radial, radial_spline
from freeflow.flows.fluid import fluid_map, torus_flow
from freeflow.map_training import FittedMap, Look, MapPlan, Parts, TrainedMap, fit_map, shape_for, train_map
from freeflow.solutions import Solution
from freeflow.types import Bijector, LearnedMap, Params

_HOPS = False  # a field that hands pushes on takes four times as long and leaves no less work; see docs/solutions.md
# How long, by default, and how a map of each kind trains on work; a field has been fitted before.
_TRAINING: Mapping[str, MapPlan] = {
    "field": MapPlan(max_minutes=0.0, learning_rate=1e-3, batch_size=16),
    "radial": MapPlan(max_minutes=2.0, learning_rate=5e-3, batch_size=32),
    "torus": MapPlan(max_minutes=2.0, learning_rate=1e-3, batch_size=16),
}


class Learned(NamedTuple):
    """A map, and what it learned from."""

    bijector: Bijector
    params: Params
    frames: tuple[tuple[int, int], tuple[int, int]]  # to learn from and to stop on, of A and B each
    fitted: FittedMap | None
    trained: TrainedMap | None
    kind: str

    @property
    def energy_evaluations(self) -> int:
        """Spent on learning."""
        return sum(part.energy_evaluations for part in (self.fitted, self.trained) if part is not None)

    @property
    def steps(self) -> int:
        """Of training on work."""
        return 0 if self.trained is None else self.trained.steps

    @property
    def untouched(self) -> bool:
        """Whether there was no time for a first step, with nothing fitted before: the map is as it was made."""
        return self.fitted is None and self.steps == 0


def training_for(choice: LearnedMap, loss: str, seed: int, max_minutes: float | None = None) -> MapPlan | None:
    """How one of the maps trains on work, or None where it does not.

    Args:
        choice: Of the map; its minutes are those of all folds together.
        loss: "lfep" or "lbar".
        seed: Of the random numbers.
        max_minutes: That are left, for all folds.
    """
    plan = replace(_TRAINING[choice.kind], loss=loss, seed=seed)
    if choice.max_minutes is not None:
        plan = replace(plan, max_minutes=choice.max_minutes)
    if plan.max_minutes is None:  # so many steps
        return plan
    minutes = plan.max_minutes if max_minutes is None else min(plan.max_minutes, max_minutes)
    return replace(plan, max_minutes=minutes / choice.folds) if plan.max_minutes > 0 else None


def learn(
    solution: Solution,
    kind: str,
    a: Parts,
    b: Parts | None,
    training: MapPlan | None,
    watch: Callable[[Look], None] = lambda _: None,
) -> Learned:
    """A map that has learned from the parts to train and to stop on; call it in double precision.

    Args:
        solution: The problem.
        kind: "field": a velocity field, fitted by linear algebra; "radial": the analytic radial map, then a spline that
            depends on the direction; "torus": the analytic radial map, then circular splines. Without two solutes, a
            torus map begins with no motion.
        a: Frames of A.
        b: Frames of B, or None to learn from A alone.
        training: On work, after what was fitted.
        watch: Called now and then while training on work.

    Raises:
        InputError: If the map cannot be made for this solution.
    """
    fitted = None
    if kind == "field":
        shape = shape_for(solution, _HOPS)
        bijector, fitted = fluid_map(shape), fit_map(solution, a, b, shape)
    elif kind == "radial":
        bijector = radial_spline(solution.box_length, solution.radii, domain="box", width=16)
    else:
        between = min(solution.radii) > 0 and max(solution.radii) < solution.box_length / 2
        start = analytic_radial(solution.box_length, solution.radii) if between else None
        bijector = torus_flow(solution.box_length, start)
    params = None if fitted is None else fitted.params
    if training is None and fitted is not None:
        return Learned(bijector, params, fitted.frames, fitted, None, kind)
    training = training or MapPlan(loss="lfep" if b is None else "lbar", max_minutes=0.0)
    trained = train_map(bijector, solution.a, solution.b, a, b, solution.state, training, watch=watch, params=params)
    return Learned(bijector, trained.params, trained.frames, fitted, trained, kind)
