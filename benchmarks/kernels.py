"""Energy and force evaluations per second: batched kernels against LAMMPS, and jax-md if installed.

All in one run, one after the other, so that the ratios mean something on a shared machine. LAMMPS computes in float64,
on one core: a displaced crystal on a fixed neighbour list, forces and energy over and over (`run 500 pre no post no`
without any fix), so that neither integration nor list building counts. freeflow computes a batch. Everyone's list
reaches as far as that of an estimate, three standard deviations of a pair's distance beyond the cutoff, and
displacements are as large as in the harmonic crystal. Rates are per second of CPU time, so that threads do not flatter
anyone.

    python benchmarks/kernels.py --help
"""

import argparse
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from freeflow import double_precision, load, references
from freeflow.geometry import neighbour_table
from freeflow.potentials import energy_and_gradient, force_constants

SYSTEMS = ("lj_fcc_256", "mw_cubic_64", "mw_cubic_512")
SKIN = 3.0  # standard deviations of a pair's distance, as in freeflow.preparation


Once = Callable[[], int]  # evaluates, and says how often
ROUNDS = 8
TIMES = 10  # evaluations of a batch per call; jax-md's take long enough for one


def one_core() -> None:
    """Stay on one core, so that no thread waits for another one: rates are those of a core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def per_cpu_second(ways: dict[Any, Once], seconds: float) -> dict[Any, float]:
    """Evaluations per second of CPU time of several ways, by turns; the best turn of each.

    What else runs on the machine takes caches and clock away for seconds at a time. Ways that take turns meet the same.
    """
    for once in ways.values():
        once()  # compiles
    rates = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for name, once in ways.items():
            count, begin = 0, time.process_time()
            while time.process_time() - begin < seconds / ROUNDS:
                count += once()
            rates[name] = max(rates[name], count / (time.process_time() - begin))
    return rates


def amplitude(system) -> float:
    """Root mean square displacement along one direction in the harmonic crystal [length]."""
    table = neighbour_table(system.crystal, 1.0001 * system.potential.cutoff)
    columns = force_constants(system.potential, table, system.crystal.site_of[0])
    blocks = references.harmonic_blocks(system.crystal, columns, float(system.state.beta))
    return references.root_mean_square(system.crystal, blocks)


def skin(system) -> float:
    """How far lists reach beyond the cutoff [length]."""
    return SKIN * np.sqrt(2) * amplitude(system)


def displaced(system, batch: int) -> np.ndarray:
    u = np.random.default_rng(0).standard_normal((batch, system.n_atoms, 3)) * amplitude(system)
    return u - u.mean(axis=1, keepdims=True)


def repeatedly(evaluate: Callable[[Any], tuple[Any, Any]], u: Any, times: int) -> Once:
    """Evaluate a batch over and over in one compiled loop, as an estimate does and LAMMPS does here.

    Memory is taken once for all evaluations. Between two of them displacements move a little along the gradient, so
    that none can be left out.
    """

    def step(_, carry):
        u, total = carry
        energy, gradient = evaluate(u)
        return u - 1e-6 * gradient, total + energy

    start = jnp.zeros_like(jax.eval_shape(evaluate, u)[0])
    repeated = jax.jit(lambda u: jax.lax.fori_loop(0, times, step, (u, start)))

    def once() -> int:
        jax.block_until_ready(repeated(u))
        return len(u) * times

    return once


def freeflow_way(system, batch: int, dtype: str = "float32") -> Once:
    """Batches by freeflow's kernels."""
    table = neighbour_table(system.crystal, system.potential.cutoff + skin(system))
    with double_precision():
        evaluate = jax.vmap(energy_and_gradient(system.potential, table, dtype))
        repeated = repeatedly(evaluate, jnp.asarray(displaced(system, batch), dtype), TIMES)

    def once() -> int:
        with double_precision():
            return repeated()

    return once


@contextmanager
def lammps_way(system) -> Iterator[Once]:
    """Force computations of LAMMPS on a fixed list."""
    import tempfile

    import lammps_oracle

    lj = system.name.startswith("lj")
    positions = system.crystal.sites + displaced(system, 1)[0]
    n = system.n_atoms
    with tempfile.TemporaryDirectory() as folder:
        lmp = lammps_oracle._import_lammps().lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
        try:
            lmp.commands_list(lammps_oracle._setup(system.crystal.cell, system.units.name, 1))
            fractional = (positions @ np.linalg.inv(system.crystal.cell)) % 1.0
            lmp.create_atoms(n, list(range(1, n + 1)), [1] * n, (fractional @ system.crystal.cell).ravel().tolist())
            if lj:
                pair = lammps_oracle._lennard_jones({"cutoff": system.potential.cutoff, "shift": True}, 1)
            else:
                pair = lammps_oracle._stillinger_weber(lammps_oracle.MW, Path(folder))
            lmp.commands_list(
                [
                    *pair,
                    f"neighbor {skin(system)} bin",
                    "neigh_modify every 1000000 delay 1000000 check no",
                    "thermo_modify norm no",
                    "thermo 1",  # energies at every step, as freeflow computes them
                    "thermo_style custom step pe",
                    "run 0",
                ]
            )

            def once() -> int:  # atoms stay where they are: no fix moves them
                lmp.command("run 500 pre no post no")
                return 500

            yield once
        finally:
            lmp.close()


def jax_md_way(system, batch: int) -> Once:
    """jax-md's energy on a fixed list, by autodiff and vmap, float32."""
    from jax_md import energy, partition, space

    box = jnp.asarray(np.diag(system.crystal.cell), jnp.float32)
    displacement, _ = space.periodic(box)
    cutoff = system.potential.cutoff
    if system.name.startswith("lj"):
        neighbours, function = energy.lennard_jones_neighbor_list(
            displacement, box, r_onset=0.999 * cutoff, r_cutoff=cutoff, dr_threshold=skin(system),
            format=partition.OrderedSparse,
        )  # fmt: skip
    else:
        import lammps_oracle

        mw = {"lam" if k == "lambda" else k: v for k, v in lammps_oracle.MW.items()}
        few = {k: mw[k] for k in ("sigma", "A", "B", "lam", "gamma", "epsilon")}
        neighbours, function = energy.stillinger_weber_neighbor_list(
            displacement, box, cutoff=cutoff, dr_threshold=skin(system), **few
        )
    warnings.filterwarnings("ignore", "Explicitly requested dtype float64")  # jax-md sums in what is switched on
    sites = jnp.asarray(system.crystal.sites, jnp.float32)
    table = neighbours.allocate(sites)
    evaluate = jax.vmap(jax.value_and_grad(lambda u: function(sites + u, neighbor=table)))
    return repeatedly(evaluate, jnp.asarray(displaced(system, batch), jnp.float32), 1)


def rates(system, batch: int, seconds: float) -> dict[str, float]:
    """Evaluations per CPU second: freeflow in either precision, and LAMMPS and jax-md where they are installed."""
    with lammps_way(system) if have_lammps() else nullcontext() as lammps:
        ways = {dtype: freeflow_way(system, batch, dtype) for dtype in ("float32", "float64")}
        if lammps is not None:
            ways["LAMMPS"] = lammps
        if importlib.util.find_spec("jax_md") is not None:
            ways["jax-md"] = jax_md_way(system, batch)
        return per_cpu_second(ways, seconds)


def have_lammps() -> bool:
    """Whether LAMMPS can be loaded."""
    import lammps_oracle

    try:
        lammps_oracle._import_lammps()
    except (ImportError, OSError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=SYSTEMS, help="shipped systems (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="configurations at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds per figure (default: %(default)s)")
    arguments = parser.parse_args()
    one_core()
    print(f"evaluations of energy and forces per CPU second, batch {arguments.batch}, {jax.default_backend()}")
    columns = ("float32", "float64", "LAMMPS", "jax-md")
    print(f"{'system':<16}" + "".join(f"{column:>12}" for column in columns) + f"{'float32/LAMMPS':>18}")
    for name in arguments.systems:
        found = rates(load(name), arguments.batch, arguments.seconds)
        row = "".join(f"{found[c]:>12.0f}" if c in found else f"{'-':>12}" for c in columns)
        ratio = f"{found['float32'] / found['LAMMPS']:>18.2f}" if "LAMMPS" in found else f"{'-':>18}"
        print(f"{name:<16}{row}{ratio}", flush=True)


if __name__ == "__main__":
    main()
