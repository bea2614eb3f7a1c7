"""Kernels on a GPU against what the device can do: its memory's and its arithmetic's rates, measured here and now.

Energy and forces of batches, checked against float64 on the CPU first; a wrong kernel ends the run. Then, by the
two-numbers method, the least time that an evaluation could take: either the bytes that must move (positions in,
energies and forces out, each once) or the operations that must be done (every pair within the cutoff once), whichever
takes longer, over the measured time. The operations that were done, skin and both ends counted, over the
device's rate tell how busy it was.

    python benchmarks/gpu.py [--seconds S] [--json OUT]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from freeflow import load
from freeflow.config import STILLINGER_WEBER_PRESETS
from freeflow.crystals import lattice_crystal
from freeflow.flows.core import softened
from freeflow.geometry import NeighbourTable, nearest_image_table, neighbour_table
from freeflow.potentials import Potential, deformed_energy, energy_and_gradient, lennard_jones, stillinger_weber, walks
from freeflow.potentials.species import born_mayer
from freeflow.preparation import batch_size
from freeflow.types import double_precision

_WORDS = STILLINGER_WEBER_PRESETS["mw"]
MW = stillinger_weber(**{("lam" if k == "lambda" else k): v for k, v in _WORDS.items() if k != "units"})
LJ = lennard_jones(cutoff=2.7)
CASES = (  # potential, lattice, number density, repeats of the cubic cell
    ("LJ", LJ, "fcc", 1.28, (4, 5, 8, 20)),
    ("mW", MW, "diamond", 0.033567184, (2, 4, 10, 16)),
)
SKIN = {"LJ": 1.1, "mW": 1.12}  # reach of the neighbour list over the cutoff, about an estimate's
# Arithmetic of one bond, in mW of both passes together, as it is traced: square roots and exponentials count once,
# comparisons as much as products.
OPERATIONS = {"LJ": 41, "mW": 222}
ALLOWED = {"float32": 1e-4, "float64": 1e-12}  # of forces and energies, relative


def seconds_per_call(function: Callable, *arguments, seconds: float) -> float:
    """The best of three averages."""
    jax.block_until_ready(function(*arguments))
    best = np.inf
    for _ in range(3):
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds / 3:
            for _ in range(4):
                out = function(*arguments)
            jax.block_until_ready(out)
            count += 4
        best = min(best, (time.perf_counter() - begin) / count)
    return best


def ceilings(seconds: float) -> dict[str, float]:
    """Bytes per second that a copy moves, and operations per second of chains of multiply-adds."""
    x = jnp.arange(2**28, dtype=jnp.float32)
    found = {"bytes": 2 * 4 * len(x) / seconds_per_call(jax.jit(lambda x: x + 1), x, seconds=seconds)}

    def chains(x):
        y = [x, x + 1, x + 2, x + 3]
        for _ in range(128):
            y = [a * x + b for a, b in zip(y, (y[1], y[2], y[3], y[0]), strict=True)]
        return sum(y)

    for dtype in ("float32", "float64"):
        x = jnp.linspace(0.1, 0.2, 2**25, dtype=dtype)
        found[dtype] = 2 * 4 * 128 * len(x) / seconds_per_call(jax.jit(chains), x, seconds=seconds)
    return found


def displaced(n_atoms: int, spacing: float, batch: int) -> np.ndarray:
    u = np.random.default_rng(0).standard_normal((batch, n_atoms, 3)) * 0.04 * spacing
    return u - u.mean(axis=1, keepdims=True)


def strays(potential: Potential, table: NeighbourTable, u: np.ndarray, dtype: str, deformation=None) -> float:
    """Largest relative deviation of the device's energies and forces from the CPU's, in float64."""

    def evaluate(dtype: str, u):
        if deformation is None:
            return jax.jit(jax.vmap(energy_and_gradient(potential, table, dtype)))(u)
        f = jnp.broadcast_to(jnp.asarray(deformation, u.dtype), (len(u), 3, 3))
        energy, (by_u, by_f) = jax.jit(jax.vmap(jax.value_and_grad(deformed_energy(potential, table, dtype), (0, 1))))(
            u, f
        )
        return energy, jnp.concatenate([by_u.reshape(len(u), -1), by_f.reshape(len(u), -1)], axis=1)

    found = [np.asarray(part, float) for part in evaluate(dtype, jnp.asarray(u, dtype))]
    usual, walks.walk = walks.walk, walks.ByTiles
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            exact = [np.asarray(part) for part in evaluate("float64", jnp.asarray(u, "float64"))]
    finally:
        walks.walk = usual
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, exact, strict=True))


def accuracy() -> bool:
    """Whether all kinds of kernels give what they should."""
    ice, fcc = (
        lattice_crystal("diamond", (2, 2, 2), number_density=0.033567184),
        lattice_crystal("fcc", (4, 4, 4), number_density=1.28),
    )
    small = load("lj_fcc_32")
    strain = np.eye(3) + 0.02 * np.random.default_rng(1).standard_normal((3, 3))
    cases = {
        "LJ": (LJ, neighbour_table(fcc, 1.1 * LJ.cutoff), 0.9, None),
        "LJ, soft core": (softened(LJ, 0.85), neighbour_table(fcc, 1.1 * LJ.cutoff), 0.9, None),
        "LJ, nearest images": (small.potential, nearest_image_table(small.crystal), 0.9, None),
        "LJ, deformed": (LJ, neighbour_table(fcc, 1.2 * LJ.cutoff), 0.9, strain),
        "Born-Mayer": (born_mayer(1e3, 0.2, C=0.1, cutoff=2.0), neighbour_table(fcc, 2.2), 0.9, None),
        "mW": (MW, neighbour_table(ice, 1.12 * MW.cutoff), 3.1, None),
        "mW, deformed": (MW, neighbour_table(ice, 1.2 * MW.cutoff), 3.1, strain),
    }
    well = True
    for name, (potential, table, spacing, deformation) in cases.items():
        for dtype, allowed in ALLOWED.items():
            for batch in (1, 5, 96):  # odd ones are filled up
                u = displaced(table.partner.shape[1], spacing, batch)
                stray = strays(potential, table, u, dtype, deformation)
                well &= stray < allowed
                if batch == 96 or not stray < allowed:
                    print(
                        f"{name:<20}{dtype:<9}batch {batch:<4}strays {stray:.1e}{'' if stray < allowed else '  WRONG'}",
                        flush=True,
                    )
    return well


def rates(limits: dict[str, float], seconds: float) -> list[dict]:
    """Evaluations per second, and how far from the least time they are."""
    rows = []
    print(f"{'case':<12}{'dtype':<9}{'batch':>6}{'evaluations/s':>15}{'ps/atom':>9}{'of floor':>10}{'busy':>7}")
    for name, potential, lattice, density, all_repeats in CASES:
        for repeats in all_repeats:
            crystal = lattice_crystal(lattice, (repeats,) * 3, number_density=density)
            n, batch = crystal.n_atoms, batch_size(potential, crystal.n_atoms)
            table = neighbour_table(crystal, SKIN[name] * potential.cutoff)
            listed = table.n_pairs
            near = neighbour_table(crystal, potential.cutoff).n_pairs
            for dtype in ("float32", "float64"):
                evaluate = jax.jit(jax.vmap(energy_and_gradient(potential, table, dtype)))
                u = jnp.asarray(displaced(n, density ** (-1 / 3), batch), dtype)
                took = seconds_per_call(evaluate, u, seconds=seconds) / batch
                width = 4 if dtype == "float32" else 8
                floor = max(n * (3 + 4) * width / limits["bytes"], near * OPERATIONS[name] / limits[dtype])
                busy = 2 * listed * OPERATIONS[name] / took / limits[dtype]
                rows.append(
                    {
                        "case": f"{name} {n}",
                        "dtype": dtype,
                        "batch": batch,
                        "evaluations_per_second": 1 / took,
                        "floor_over_time": floor / took,
                        "busy": busy,
                    }
                )
                head = f"{name + ' ' + str(n):<12}{dtype:<9}{batch:>6}{1 / took:>15.0f}"
                print(f"{head}{1e12 * took / n:>9.0f}{floor / took:>10.2f}{busy:>7.2f}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="per figure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    if jax.default_backend() == "cpu":
        print("benchmarks/gpu.py: JAX sees no GPU here", file=sys.stderr)
        return 2
    device = jax.devices()[0].device_kind
    with double_precision():
        if not accuracy():
            return 1
        limits = ceilings(arguments.seconds)
        print(f"{device}, JAX {jax.__version__}: {limits['bytes'] / 1e12:.2f} TB/s, {limits['float32'] / 1e12:.1f} and "
              f"{limits['float64'] / 1e12:.1f} TFLOP/s in float32 and float64")  # fmt: skip
        rows = rates(limits, arguments.seconds)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"device": device, "jax": jax.__version__, "limits": limits, "kernels": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
