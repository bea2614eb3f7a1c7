"""Cost per atom of a bridge's stage and of what it is made of: random numbers, the reference's map, the kernel.

float32, with as many walkers at a time as an estimate takes (`--batch` sets it), on one core, by turns (see
kernels.py). Times are CPU time of the process. Crystals of mW cubic ice by default; systems may be named instead.

    python benchmarks/stages.py [SYSTEM ...]
    python benchmarks/stages.py --help
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernels import SKIN, Once, one_core, per_cpu_second
from freeflow import bridge, double_precision, load, references
from freeflow.crystals import crystal_ensemble, energy_of
from freeflow.preparation import batch_size

EACH_CALL, AT_LEAST = 3e6, 16  # atoms times walkers times stages of a compiled call, and stages; see scaling.py
REPEATS = (4, 10, 16)


def ice(repeats: int) -> Any:
    """mW cubic ice at 200 K, 8 repeats^3 molecules."""
    name = f"mw_cubic_{8 * repeats**3}"
    crystal = {"lattice": "diamond", "repeats": [repeats] * 3, "number_density": 0.033567184}
    potential = {"kind": "stillinger_weber", "preset": "mw"}
    return load({"name": name, "units": "real", "temperature": 200.0, "potential": potential, "crystal": crystal})


def ways(system: Any, batch: int | None = None) -> dict[str, Once]:
    """Functions that do one piece of a stage over and over; all return atoms times walkers times stages."""
    crystal, state, energy = system.crystal, system.state, energy_of(system)
    batch = batch or batch_size(system.potential, crystal.n_atoms)
    times = max(AT_LEAST, round(EACH_CALL / (batch * crystal.n_atoms)))
    blocks = references.harmonic_blocks(crystal, energy.force_constants(crystal.site_of[0]), float(state.beta))
    gaussian = jax.tree.map(jnp.asarray, references.gaussian_from_blocks(crystal, blocks))
    reach = SKIN * np.sqrt(2) * references.root_mean_square(crystal, blocks)
    recipe, target = references.gaussian_crystal(crystal), crystal_ensemble(energy.relative(reach, "float32"))
    crossing = bridge.bridge(recipe, target, "float32")
    keys = jax.random.split(jax.random.key(1), batch)
    segment = bridge.Segment(np.float64(0.5), np.float64(0.6), np.float64(0.3), np.int32(times))

    def colour(z: Any) -> Any:
        return jax.vmap(lambda z: recipe.colour(gaussian, z))(z)

    def noise(k: Any, z: Any) -> Any:
        return z + 1e-3 * jax.vmap(lambda key: recipe.noise(jax.random.fold_in(key, k), "float32"))(keys)

    def there_and_back(_: Any, z: Any) -> Any:
        u, transpose = jax.vjp(colour, z)
        return 0.5 * z + 1e-3 * transpose(u)[0]

    def kernel(_: Any, u_and_total: Any) -> Any:
        u, total = u_and_total
        values, gradient = jax.vmap(jax.value_and_grad(lambda u: target.reduced_potential(u, state)))(u)
        return u - 1e-7 * gradient, total + values

    def stages(walkers: Any) -> Any:
        return jax.vmap(lambda key, walker: crossing.forward_segment(gaussian, key, walker, segment, state))(
            keys, walkers
        )

    walkers = jax.vmap(crossing.launch)(keys)
    pieces = {
        "random numbers": (noise, walkers.z),
        "map and transpose": (there_and_back, walkers.z),
        "kernel": (kernel, (colour(walkers.z), jnp.zeros(batch))),
    }

    def repeated(piece: Any, start: Any) -> Once:
        run = jax.jit(lambda carry: jax.lax.fori_loop(0, times, piece, carry))
        return lambda: (jax.block_until_ready(run(start)), batch * crystal.n_atoms * times)[1]

    all_stages = jax.jit(stages)
    found = {name: repeated(*piece) for name, piece in pieces.items()}
    found["whole stage"] = lambda: (jax.block_until_ready(all_stages(walkers)), batch * crystal.n_atoms * times)[1]
    return found


def microseconds_per_atom(
    systems: Sequence[Any], seconds: float, batch: int | None = None
) -> dict[str, dict[str, float]]:
    """CPU time per atom and stage [us] by system and piece, by turns."""
    with double_precision():
        every = {(system.name, piece): once for system in systems for piece, once in ways(system, batch).items()}
        rates = per_cpu_second(every, seconds)
    found: dict[str, dict[str, float]] = {}
    for (name, piece), rate in rates.items():
        found.setdefault(name, {})[piece] = 1e6 / rate
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help="of crystals; mW cubic ice if none is named")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds per figure (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=None, help="walkers at a time, whatever the size")
    arguments = parser.parse_args()
    one_core()
    systems = [load(name) for name in arguments.systems] or [ice(repeats) for repeats in REPEATS]
    found = microseconds_per_atom(systems, arguments.seconds, arguments.batch)
    print(f"us per atom and stage, float32, {jax.default_backend()}, JAX {jax.__version__}")
    pieces = next(iter(found.values()))
    print(f"{'':<20}" + "".join(f"{piece:>20}" for piece in pieces))
    for name, row in found.items():
        print(f"{name:<20}" + "".join(f"{cost:>20.4f}" for cost in row.values()))


if __name__ == "__main__":
    main()
