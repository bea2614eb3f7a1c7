"""Cost per atom of one energy and force evaluation as crystals grow: flat, if the kernels are linear in N.

Batched float32 kernels, with as many configurations at a time as an estimate takes (`--fixed-batch` sets it). Times are
CPU time of the process.

    python benchmarks/scaling.py --help
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from freeflow.compiler import prefer_fast_code
from freeflow.config import STILLINGER_WEBER_PRESETS
from freeflow.crystals import lattice_crystal
from freeflow.geometry import neighbour_table
from freeflow.potentials import energy_and_gradient, lennard_jones, stillinger_weber
from freeflow.preparation import batch_size

MW = {("lam" if k == "lambda" else k): v for k, v in STILLINGER_WEBER_PRESETS["mw"].items() if k != "units"}
CASES = {  # lattice, number density, potential, repeats of the cubic cell
    "mW, cubic ice": ("diamond", 0.033567184, stillinger_weber(**MW), (4, 5, 8, 10, 16)),
    "LJ, fcc": ("fcc", 1.28, lennard_jones(cutoff=2.7), (5, 6, 8, 10, 12, 20)),
}


def microseconds_per_atom(lattice, density, potential, repeats, batch, seconds) -> tuple[int, float, float]:
    """Atoms, CPU time per atom and evaluation [us], and the seconds that set-up and compilation took."""
    begin = time.perf_counter()
    crystal = lattice_crystal(lattice, (repeats,) * 3, number_density=density)
    table = neighbour_table(crystal, 1.1 * potential.cutoff)
    n = crystal.n_atoms
    batch = batch or batch_size(potential, n)
    u = np.random.default_rng(0).standard_normal((batch, n, 3)) * 0.04 * density ** (-1 / 3)
    u = jnp.asarray(u, jnp.float32)
    evaluate = jax.jit(jax.vmap(energy_and_gradient(potential, table, "float32")))
    jax.block_until_ready(evaluate(u))
    set_up = time.perf_counter() - begin
    best = np.inf
    for _ in range(3):
        count, begin = 0, time.process_time()
        while time.process_time() - begin < seconds / 3:
            jax.block_until_ready(evaluate(u))
            count += batch
        best = min(best, (time.process_time() - begin) / count)
    return n, 1e6 * best / n, set_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds per size (default: %(default)s)")
    parser.add_argument(
        "--largest", type=int, default=8000, help="leave out more atoms than this (default: %(default)s)"
    )
    parser.add_argument("--fixed-batch", type=int, default=None, help="configurations at a time, whatever the size")
    arguments = parser.parse_args()
    prefer_fast_code()
    print(f"CPU time of one energy and force evaluation, float32, {jax.default_backend()}")
    for name, (lattice, density, potential, all_repeats) in CASES.items():
        print(f"{name:<16}{'atoms':>8}{'us/atom':>10}{'set-up s':>10}")
        rows = []
        for repeats in all_repeats:
            atoms = repeats**3 * {"diamond": 8, "fcc": 4}[lattice]
            if atoms > arguments.largest:
                continue
            settings = (repeats, arguments.fixed_batch, arguments.seconds)
            rows.append(microseconds_per_atom(lattice, density, potential, *settings))
            print(f"{'':<16}{rows[-1][0]:>8}{rows[-1][1]:>10.4f}{rows[-1][2]:>10.1f}", flush=True)
        if len(rows) > 1:
            print(f"{'':<16}per-atom cost at {rows[-1][0]} over {rows[0][0]} atoms: {rows[-1][1] / rows[0][1]:.2f}")


if __name__ == "__main__":
    main()
