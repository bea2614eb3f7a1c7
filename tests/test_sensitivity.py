"""What must not matter: batch size, precision of the kernels, seed, number of stages, by which way an estimate goes.

Estimates that differ in one of these alone must agree within their error bars. Every variant has a seed of its own, so
that they are independent, and chi^2 of all about their weighted mean raises a false alarm once in a million runs of a
test. Error bars are small: a crystal's variant that is off by 4e-3 kT per atom is noticed.

Devices and processes change not even the last bit: tests/test_team.py; nor do cores: tests/test_pipeline.py and
tests/test_switching.py. Many seeds: tests/test_calibration.py.
"""

import functools

import numpy as np
import pytest
from scipy.stats import chi2

import freeflow as ff
from benchmarks.calibration import compiled_once, pooled
from freeflow import pipeline, solvation, switching
from freeflow.estimators import bar, fep, record
from freeflow.solvation import estimate_difference

pytestmark = pytest.mark.code("users")

FALSE_ALARM = 1e-6
ICE = {
    "batches of 64": {"batch": 64},
    "float64": {"precision": "float64"},
    "48 stages": {"bridge": 48},
    "harmonic reference": {"reference": "harmonic"},
    "bar, 48 stages": {"estimator": "bar", "bridge": 48},
}
MORE = {
    "300 stages": {"bridge": 300},
    "another seed": {},
    "batches of 16": {"batch": 16},
    "bar": {"estimator": "bar"},
    "bar, float64": {"estimator": "bar", "precision": "float64"},
}
LARGER = {
    "lj_fcc_32": {"150 stages": {"bridge": 150}, "600 stages": {"bridge": 600}, "einstein": {"reference": "einstein"}},
    "mw_cubic_64": {
        "flow": {"flow": {"checkpoint": "shipped"}},
        "flow, 16 stages": {"flow": {"checkpoint": "shipped"}, "bridge": 16},
    },
}
SOLUTION = {
    "name": "small",
    "units": "lj",
    "temperature": 2.0,
    "solution": {
        "box_length": 2.4,
        "solvent": {"count": 4, "potential": {"kind": "lennard_jones"}},
        "solute": {"kind": "wca", "sigma": [1.0, 1.1]},
    },
}


def agree(answers):
    """Whether (value, error) by name differ by chance alone; prints what it sees."""
    mean, error, found = pooled(list(answers.values()))
    for name, (value, its_error) in answers.items():
        print(f"{name:20s} {value:.5f}({its_error:.5f})  {(value - mean) / its_error:+.2f}")
    print(f"mean {mean:.5f}({error:.5f}), chi^2 {found:.1f} of {len(answers) - 1}")
    return found < chi2.isf(FALSE_ALARM, len(answers) - 1)


def crystals(name, variants, target_error):
    """beta F and its error [kT] of the variants of an estimate."""
    system, answers = ff.load(name), {}
    fitting_batch = pipeline.fitting_batch
    with compiled_once():
        for seed, (variant, options) in enumerate({"as it is": {}, **variants}.items()):
            options = {"target_error": target_error, "seed": seed, "max_samples": 100_000, **options}
            batch = options.pop("batch", None)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "fitting_batch", (lambda *_, b=batch: b) if batch else fitting_batch)
                found = ff.estimate(system, **options)
            assert found.status == "converged", (variant, found.warnings)
            answers[variant] = found.beta_f, found.beta_f_std_error
    return answers


def test_crystals():
    few = {variant: ICE[variant] for variant in ("float64", "bar, 48 stages")}
    assert agree(crystals("mw_cubic_8", few, 2e-3))


@pytest.mark.slow
def test_more_of_crystals():
    assert agree(crystals("mw_cubic_8", ICE, 2e-3))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LARGER)
def test_larger_crystals(name):
    too_short = {"48 stages", "bar, 48 stages"} if name == "lj_fcc_32" else set()
    few = {variant: options for variant, options in ICE.items() if variant not in too_short}
    assert agree(crystals(name, {**few, **MORE, **LARGER[name]}, 3e-4))


def solutions(variants, target_error):
    """F_B - F_A and its error [kT] of variants of a journey."""
    problem, answers = ff.load(SOLUTION), {}
    for seed, (variant, options) in enumerate({"as it is": {}, **variants}.items()):
        options = dict(options)
        method = options.pop("method", "bridge")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(switching, "_WORK_VARIANCE", options.pop("variance", switching._WORK_VARIANCE))
            patch.setattr(solvation, "_FRAMES", 2**13)  # of half as many BAR has an error that just misses the target
            patch.setattr(solvation, "Fluid", functools.partial(switching.Fluid, **options))
            found = estimate_difference(
                problem, methods=(method,), target_error=target_error, seed=seed, max_samples=50_000
            )
        assert found.status == "converged", (variant, found.best.reasons)
        answers[variant] = found.delta_f, found.delta_f_std_error
    return answers


@pytest.mark.slow
def test_solutions():
    with compiled_once():
        assert agree(solutions({"batches of 32": {"batch": 32}, "slower": {"variance": 0.5}}, 0.02))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_solutions_by_every_way():
    ways = {method: {"method": method} for method in ("bar", "lbar", "escort", "mbar")}
    more = {"batches of 16": {"batch": 16}, "float64": {"dtype": "float64"}, "slower": {"variance": 0.3}}
    with compiled_once():
        assert agree(solutions({**ways, **more, "faster": {"variance": 6.0}}, 0.01))


def test_the_order_and_the_number_of_equal_samples_do_not_matter():
    """Estimators see a set: what they say does not depend on its order, nor on the scale of the energy's zero."""
    rng = np.random.default_rng(0)
    forward, reverse = rng.normal(0.5, 1.0, 2000), rng.normal(0.5, 1.0, 3000)
    for estimator in (fep, bar):
        plain = estimator(record(forward, reverse))
        shuffled = estimator(record(rng.permutation(forward), rng.permutation(reverse)))
        shifted = estimator(record(forward + 1e4, reverse - 1e4))
        np.testing.assert_allclose(shuffled, plain, rtol=1e-9)
        np.testing.assert_allclose(shifted.delta_f - 1e4, plain.delta_f, atol=1e-8)
        np.testing.assert_allclose(shifted.std_error, plain.std_error, rtol=1e-7)
