"""Learned maps of every kind, from exact samples of one atom around a solute."""

import math

import numpy as np
import pytest
from test_map_training import around_a_solute, drawn, log_partition

from freeflow.errors import InputError
from freeflow.estimators import bar
from freeflow.learned_maps import learn, training_for
from freeflow.map_training import MapPlan, folds, work_of_frames
from freeflow.types import LearnedMap, Work

PLAN = MapPlan(max_minutes=None, max_steps=12, looks=2, batch_size=8)


@pytest.fixture(scope="module")
def one_atom():
    problem = around_a_solute(1)
    parts = [folds(drawn(problem, k, 1200, seed=5), 2) for k in (0, 1)]
    return problem, parts, log_partition(problem, 0) - log_partition(problem, 1)


@pytest.mark.parametrize(
    "kind", ["field", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("radial", "torus"))]
)
def test_pooled_work_of_the_folds_gives_the_exact_answer(one_atom, kind):
    problem, (a, b), exact = one_atom
    works = []
    for k in range(2):
        found = learn(problem, kind, a[k], b[k], None if kind == "field" else PLAN)
        assert found.frames == ((480, 480), (120, 120))
        assert found.untouched is False and found.energy_evaluations > 0
        works.append(
            work_of_frames(
                found.bijector, found.params, problem.a, problem.b, a[k].estimate, b[k].estimate, problem.state
            )
        )
    answer = bar(Work(*(np.concatenate(side) for side in zip(*works, strict=True))))
    # Four standard errors: one false alarm in 16 000 for each kind.
    assert abs(float(answer.delta_f) - exact) < 4 * float(answer.std_error) + 1e-3
    assert 0 < float(answer.std_error) < 0.05


def test_time_is_shared_by_the_folds():
    assert training_for(LearnedMap("field"), "lbar", 0) is None
    assert training_for(LearnedMap("torus", max_minutes=0.0), "lbar", 0) is None
    assert training_for(LearnedMap("radial", folds=4), "lfep", 3).max_minutes == 0.5
    plan = training_for(LearnedMap("field", folds=2, max_minutes=6.0), "lfep", 3, max_minutes=1.0)
    assert (plan.max_minutes, plan.loss, plan.seed) == (0.5, "lfep", 3)
    assert math.isclose(training_for(LearnedMap("torus", folds=2, max_minutes=6.0), "lbar", 0).max_minutes, 3.0)


def test_a_radial_map_needs_solutes_that_fit():
    with pytest.raises(InputError, match="radii"):
        problem = around_a_solute(1, radii=(1.2, 2.1))
        learn(problem, "radial", *(folds(np.zeros((20, 1, 3)), 2)[0] for _ in "AB"), None)
