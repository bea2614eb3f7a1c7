"""What maps and switching gain on the solvation problem, and whether their error bars hold.

    python benchmarks/solvation.py draw --frames 24576 frames.npz   # samples of both states, by Monte Carlo
    python benchmarks/solvation.py ratio --frames 3600 frames.npz    # variance of BAR over that of mapped BAR
    python benchmarks/solvation.py subsets --frames 600 frames.npz   # spread of estimates over reported errors
    python benchmarks/solvation.py journeys --target-error 0.006     # an escorted run from scratch, and its chains

`ratio` and `subsets`: all ways see the same frames; the frames that a map carries have not taught it (two folds).
Subsets are whole chains, which are independent of each other. Figures do not depend on the machine, times do.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np

import freeflow as ff
from freeflow.bijectors import identity
from freeflow.bijectors.radial import analytic_radial
from freeflow.estimators import bar, record
from freeflow.learned_maps import learn
from freeflow.map_training import folds, work_of_frames
from freeflow.solvation import estimate_difference
from freeflow.switching import Fluid, memory
from freeflow.types import Work, double_precision

WAYS = ("bar", "radial", "lbar")


def draw(problem, n_frames, seed, path, n_batches=4):
    """Samples of A and B, (n_chains, n_rounds, n, 3) each, two inefficiencies of the energy apart."""
    states = {}
    with double_precision(), Fluid(problem, seed) as fluid:
        for k, name in enumerate("ab"):
            chains, found = fluid.equilibrate(float(k), n_batches, 1000 * k)
            rounds = math.ceil(n_frames / len(chains))
            samples = fluid.sample(chains, rounds, math.ceil(2 * found.inefficiency))
            states[name] = np.swapaxes(samples.x, 0, 1)
    np.savez(path, **states)


def estimates(problem, chains_a, chains_b):
    """(delta_f, std_error) of every way from chains (n_chains, n_rounds, n, 3), and the share of the variance of du/dl
    that the fields leave."""
    state, left, n_chains = problem.state, [], len(chains_a)
    a, b = (chains.reshape(-1, *chains.shape[2:]) for chains in (chains_a, chains_b))
    works = {
        "bar": work_of_frames(identity(), (), problem.a, problem.b, a, b, state),
        "radial": work_of_frames(
            analytic_radial(problem.box_length, problem.radii), (), problem.a, problem.b, a, b, state
        ),
    }
    parts = []
    for some_a, some_b in zip(folds(a, 2, n_chains), folds(b, 2, n_chains), strict=True):
        found = learn(problem, "field", some_a, some_b, None)
        if found.fitted is not None:
            left.append(found.fitted.left_over[1])
        parts.append(
            work_of_frames(found.bijector, found.params, problem.a, problem.b, some_a.estimate, some_b.estimate, state)
        )
    works["lbar"] = Work(*(np.concatenate(side) for side in zip(*parts, strict=True)))
    found = {}
    for name, work in works.items():
        answer = bar(work, tuple(memory(np.asarray(side).reshape(n_chains, -1).T) for side in work))
        found[name] = (float(answer.delta_f), float(answer.std_error))
    return found, left


def frames(path):
    """Chains of A and B, (n_chains, n_rounds, n, 3) each."""
    with np.load(path) as stored:
        return [stored[name] for name in "ab"]


def thinned(chains, n_frames):
    """Every how-manyth frame of all chains, about so many."""
    rounds = max(2, n_frames // len(chains))
    return chains[:, :: max(1, chains.shape[1] // rounds)][:, :rounds]


def ratio(problem, path, n_frames):
    """All ways on the same frames."""
    a, b = (thinned(chains, n_frames) for chains in frames(path))
    found, left = estimates(problem, a, b)
    for name, (value, error) in found.items():
        gain = (found["bar"][1] / error) ** 2
        n = a.shape[0] * a.shape[1]
        print(f"{n} frames of each: {name:6} {value:.4f} +- {error:.4f} kT, variance of bar / this {gain:.1f}")
    print(f"fields leave {', '.join(f'{share:.3f}' for share in left)} of the variance of du/dl")


def judge(name, values, errors):
    """Whether estimates scatter by as much as they say."""
    values, errors = np.array(values), np.array(errors)
    spread, rms = float(np.std(values, ddof=1)), math.sqrt(np.mean(errors**2))
    print(
        f"{name:6} {len(values)} subsets: mean {values.mean():.4f}, spread {spread:.4f}, reported {rms:.4f} kT: "
        f"ratio {spread / rms:.2f} (known to {1 / math.sqrt(2 * len(values) - 2):.0%})"
    )


def subsets(problem, path, number, n_frames):
    """Disjoint subsets, of different chains: their estimates scatter by as much as they say."""
    a, b = frames(path)
    each = len(a) // number
    rows = []
    for k in range(number):
        own = slice(k * each, (k + 1) * each)
        rows.append([estimates(problem, *(thinned(c[own], n_frames) for c in (a, b)))[0][name] for name in WAYS])
        print(f"{k + 1}: " + ", ".join(f"{v:.3f} +- {e:.3f}" for v, e in rows[-1]), flush=True)
    for name, some in zip(WAYS, np.moveaxis(np.array(rows), 0, 2), strict=True):
        judge(name, *some)


def journeys(problem, method, target, seed, number):
    """One estimate from scratch, and those of subsets of its chains."""
    begun = time.monotonic(), time.process_time()
    result = estimate_difference(
        problem, methods=(method,), target_error=target, seed=seed, max_samples=10**6, progress=None
    )
    answer = result.answers[0]
    wall, cpu = time.monotonic() - begun[0], time.process_time() - begun[1]
    print(
        f"{method} {answer.delta_f:.4f} +- {answer.std_error:.4f} kT, {answer.n_samples[0]} + {answer.n_samples[1]} "
        f"journeys, {answer.energy_evaluations:.3g} evaluations, {wall:.0f} s, {cpu:.0f} s of processor time"
    )
    n_chains = answer.facts["chains"]
    sides = [np.asarray(side).reshape(-1, n_chains) for side in answer.work]
    rows = []
    for own in np.array_split(np.arange(n_chains), number):
        some = [side[:, own] for side in sides]
        found = bar(record(*(side.ravel() for side in some)), tuple(memory(side) for side in some))
        rows.append((float(found.delta_f), float(found.std_error)))
    judge(method, *np.array(rows).T)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("draw", "ratio", "subsets", "journeys"))
    parser.add_argument("path", nargs="?", default="frames.npz", help="drawn to, or read")
    parser.add_argument("--system", default="solvation_wca")
    parser.add_argument("--frames", type=int, default=3600, help="of each state, or in each subset")
    parser.add_argument("--number", type=int, default=20, help="of subsets")
    parser.add_argument("--method", default="escort", choices=("bridge", "escort"), help="of journeys")
    parser.add_argument("--target-error", type=float, default=0.02, help="of journeys [kT]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args()
    problem = ff.load(options.system)
    if options.job == "draw":
        draw(problem, options.frames, options.seed, options.path)
        return
    if options.job == "journeys":
        journeys(problem, options.method, options.target_error, options.seed, options.number)
        return
    with double_precision():
        if options.job == "ratio":
            ratio(problem, options.path, options.frames)
        else:
            subsets(problem, options.path, options.number, options.frames)


if __name__ == "__main__":
    main()
