"""What maps and switching gain on the solvation problem, and whether their error bars hold.

    python benchmarks/solvation.py draw --frames 24576 frames.npz   # samples of both states, by Monte Carlo
    python benchmarks/solvation.py ratio --frames 3600 frames.npz    # variance of BAR over that of mapped BAR
    python benchmarks/solvation.py subsets --frames 600 frames.npz   # spread of estimates over reported errors

All ways see the same frames; the frames that a map carries have not taught it (two folds). Energies and fields are on
the CPU; figures do not depend on the machine.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

import freeflow as ff
from freeflow.bijectors import identity
from freeflow.bijectors.radial import analytic_radial
from freeflow.estimators import bar
from freeflow.learned_maps import learn
from freeflow.map_training import folds, work_of_frames
from freeflow.switching import Fluid
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


def estimates(problem, a, b):
    """(delta_f, std_error) of every way, and the share of the variance of du/dl that the fields leave."""
    state, left = problem.state, []
    works = {
        "bar": work_of_frames(identity(), (), problem.a, problem.b, a, b, state),
        "radial": work_of_frames(
            analytic_radial(problem.box_length, problem.radii), (), problem.a, problem.b, a, b, state
        ),
    }
    parts = []
    for some_a, some_b in zip(folds(a, 2), folds(b, 2), strict=True):
        found = learn(problem, "field", some_a, some_b, None)
        if found.fitted is not None:
            left.append(found.fitted.left_over[1])
        parts.append(
            work_of_frames(found.bijector, found.params, problem.a, problem.b, some_a.estimate, some_b.estimate, state)
        )
    works["lbar"] = Work(*(np.concatenate(side) for side in zip(*parts, strict=True)))
    answers = {name: bar(work) for name, work in works.items()}
    return {name: (float(answer.delta_f), float(answer.std_error)) for name, answer in answers.items()}, left


def frames(path):
    """Frames of A and B, chain after chain."""
    with np.load(path) as stored:
        return [stored[name].reshape(-1, *stored[name].shape[2:]) for name in "ab"]


def thinned(x, n_frames):
    """Every how-manyth frame, of all chains."""
    return x[:: max(1, len(x) // n_frames)][:n_frames]


def ratio(problem, path, n_frames):
    """All ways on the same frames."""
    a, b = (thinned(x, n_frames) for x in frames(path))
    found, left = estimates(problem, a, b)
    for name, (value, error) in found.items():
        gain = (found["bar"][1] / error) ** 2
        print(f"{len(a)} frames of each: {name:6} {value:.4f} +- {error:.4f} kT, variance of bar / this {gain:.1f}")
    print(f"fields leave {', '.join(f'{share:.3f}' for share in left)} of the variance of du/dl")


def subsets(problem, path, number, n_frames):
    """Disjoint subsets, of different chains: their estimates scatter by as much as they say."""
    a, b = (thinned(x, number * n_frames) for x in frames(path))
    rows = []
    for some_a, some_b in zip(np.array_split(a, number), np.array_split(b, number), strict=True):
        rows.append([estimates(problem, some_a, some_b)[0][name] for name in WAYS])
        print(f"{len(rows)}: " + ", ".join(f"{v:.3f} +- {e:.3f}" for v, e in rows[-1]), flush=True)
    values, errors = np.moveaxis(np.array(rows), -1, 0)
    for name, some, reported in zip(WAYS, values.T, errors.T, strict=True):
        spread, rms = float(np.std(some, ddof=1)), math.sqrt(np.mean(reported**2))
        print(f"{name:6} spread {spread:.4f}, reported {rms:.4f} kT: ratio {spread / rms:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("draw", "ratio", "subsets"))
    parser.add_argument("path", help="frames.npz: drawn to, or read")
    parser.add_argument("--system", default="solvation_wca")
    parser.add_argument("--frames", type=int, default=3600, help="of each state, or in each subset")
    parser.add_argument("--number", type=int, default=20, help="of subsets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problem = ff.load(options.system)
    if options.job == "draw":
        draw(problem, options.frames, options.seed, options.path)
        return
    with double_precision():
        if options.job == "ratio":
            ratio(problem, options.path, options.frames)
        else:
            subsets(problem, options.path, options.number, options.frames)


if __name__ == "__main__":
    main()
