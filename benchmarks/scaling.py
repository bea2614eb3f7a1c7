"""Cost per atom of one energy and force evaluation as crystals grow: flat, if the kernels are linear in N.

Batched float32 kernels, with as many configurations at a time as an estimate takes (`--fixed-batch` sets it), on one
core, by turns (see kernels.py). Times are CPU time of the process.

    python benchmarks/scaling.py --help
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernels import Once, one_core, per_cpu_second, repeatedly
from freeflow.config import STILLINGER_WEBER_PRESETS
from freeflow.crystals import lattice_crystal
from freeflow.geometry import neighbour_table
from freeflow.potentials import Potential, energy_and_gradient, lennard_jones, stillinger_weber
from freeflow.preparation import batch_size

MW = {("lam" if k == "lambda" else k): v for k, v in STILLINGER_WEBER_PRESETS["mw"].items() if k != "units"}
# Atoms times samples times evaluations of a compiled call, and evaluations at least: memory is new at each call, an
# estimate makes one for many stages.
EACH_CALL, AT_LEAST = 3e6, 16
CASES = {  # lattice, number density, potential, repeats of the cubic cell
    "mW, cubic ice": ("diamond", 0.033567184, stillinger_weber(**MW), (4, 5, 8, 10, 16)),
    "LJ, fcc": ("fcc", 1.28, lennard_jones(cutoff=2.7), (5, 6, 8, 10, 12, 20)),
}


def way(lattice: str, density: float, potential: Potential, repeats: int, batch: int | None = None) -> tuple[int, Once]:
    """How many atoms, and a function that evaluates a batch and returns atoms times configurations."""
    crystal = lattice_crystal(lattice, (repeats,) * 3, number_density=density)
    table = neighbour_table(crystal, 1.1 * potential.cutoff)
    n = crystal.n_atoms
    batch = batch or batch_size(potential, n)
    u = np.random.default_rng(0).standard_normal((batch, n, 3)) * 0.04 * density ** (-1 / 3)
    u = jnp.asarray(u, jnp.float32)
    evaluate = jax.vmap(energy_and_gradient(potential, table, "float32"))
    evaluations = repeatedly(evaluate, u, max(AT_LEAST, round(EACH_CALL / (batch * n))))
    return n, lambda: n * evaluations()


def microseconds_per_atom(case: str, all_repeats: Sequence[int], seconds: float, batch: int | None = None) -> dict:
    """CPU time per atom and evaluation [us] by number of atoms, by turns."""
    lattice, density, potential, _ = CASES[case]
    ways = dict(way(lattice, density, potential, repeats, batch) for repeats in all_repeats)
    return {n: 1e6 / rate for n, rate in per_cpu_second(ways, seconds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds per size (default: %(default)s)")
    parser.add_argument(
        "--largest", type=int, default=8000, help="leave out more atoms than this (default: %(default)s)"
    )
    parser.add_argument("--fixed-batch", type=int, default=None, help="configurations at a time, whatever the size")
    arguments = parser.parse_args()
    one_core()
    print(f"CPU time of one energy and force evaluation, float32, {jax.default_backend()}")
    for name, (lattice, _, _, all_repeats) in CASES.items():
        per_cell = {"diamond": 8, "fcc": 4}[lattice]
        repeats = [r for r in all_repeats if r**3 * per_cell <= arguments.largest]
        found = microseconds_per_atom(name, repeats, arguments.seconds, arguments.fixed_batch)
        print(f"{name:<16}{'atoms':>8}{'us/atom':>10}{'ratio':>8}")
        for n, cost in found.items():
            print(f"{'':<16}{n:>8}{cost:>10.4f}{cost / next(iter(found.values())):>8.2f}", flush=True)


if __name__ == "__main__":
    main()
