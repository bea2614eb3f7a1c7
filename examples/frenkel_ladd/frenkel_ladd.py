"""The conventional way: Frenkel-Ladd thermodynamic integration over an Einstein crystal, by MBAR.

The same kernels, the same constants and the same convention as `freeflow estimate`, so that the two differ in nothing
but the method. Sixteen states u_l = (1 - l) u_Einstein + l u_crystal are sampled side by side by hybrid Monte Carlo
with plain leapfrog trajectories; what is left of the samples after their correlation is taken out goes into MBAR.

    python examples/frenkel_ladd/frenkel_ladd.py mw_cubic_64 --target-error 1e-3

References: Frenkel and Ladd, J. Chem. Phys. 81, 3188 (1984); Polson, Trizac, Pronk and Frenkel, J. Chem. Phys. 112,
5339 (2000) for the fixed centre of mass; Duane et al., Phys. Lett. B 195, 216 (1987); Shirts and Chodera, J. Chem.
Phys. 129, 124105 (2008).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import freeflow as ff
from freeflow import references
from freeflow.errors import FreeflowError, InputError
from freeflow.estimators import chain_correlation, mbar
from freeflow.geometry import nearest_neighbour_distance, neighbour_table
from freeflow.potentials import energy_and_gradient, force_constants
from freeflow.types import System, double_precision

N_STATES = 16
CHAINS = 8  # of every state
LEAPFROG = 8  # steps of a trajectory, an energy and gradient each
ACCEPTANCE = 0.75  # aimed at by the step size while the chains equilibrate
EQUILIBRATION = 150  # trajectories
ROUND = 100  # trajectories between looks at the error bar
MOST_INDEPENDENT = 4096  # samples of a state that MBAR is given
# More states near the Einstein crystal, whose atoms may overlap.
SPACING = 1.5


class Answer(NamedTuple):
    """Free energy of a crystal and what it cost."""

    beta_f_per_atom: float  # [kT]
    std_error: float  # MBAR's, of independent samples [kT]
    evaluations: int  # of energy and gradient, equilibration included
    equilibration: int  # of these
    cpu_seconds: float  # without compilation
    inefficiency: np.ndarray  # (n_states,) trajectories per independent sample
    acceptance: np.ndarray  # (n_states,)
    converged: bool


class Chains(NamedTuple):
    """Where the walkers stand; all states' chains in one batch."""

    x: jax.Array  # (n_walkers, n_atoms, 3) mean-free displacements in units of the springs' width
    u: jax.Array  # (n_walkers,) reduced potential of the crystal at x
    gradient: jax.Array  # (n_walkers, n_atoms, 3) of u with respect to x
    accepted: jax.Array  # (n_walkers,)


def spring_width(system: System) -> float:
    """Root mean square displacement along one direction in the harmonic crystal [length]: the best springs' width."""
    table = neighbour_table(system.crystal, 1.0001 * system.potential.cutoff)
    columns = force_constants(system.potential, table, system.crystal.site_of[0])
    blocks = references.harmonic_blocks(system.crystal, columns, float(system.state.beta))
    return references.root_mean_square(system.crystal, blocks)


def sampler(system: System, width: float, lambdas: np.ndarray) -> tuple[Callable, Callable]:
    """`start(key)` and `run(chains, steps, key, n)`, which returns chains and (n, n_walkers) energies of both ends."""
    reach = min(4 * math.sqrt(2.0) * width, nearest_neighbour_distance(system.crystal))
    table = neighbour_table(system.crystal, system.potential.cutoff + reach)
    evaluate = jax.vmap(energy_and_gradient(system.potential, table, "float32"))
    beta, n_walkers = float(system.state.beta), len(lambdas)
    lam = jnp.asarray(lambdas, "float32")[:, None, None]

    def crystal(x):
        energy, gradient = evaluate(x * np.float32(width))
        return beta * energy, (beta * width * gradient).astype("float32")

    def white(key):
        z = jax.random.normal(key, (n_walkers, system.n_atoms, 3), "float32")
        return z - z.mean(axis=1, keepdims=True)

    def square(x):
        return 0.5 * jnp.sum(jnp.square(x), axis=(1, 2), dtype="float64")

    def start(key):
        # Half as wide as the Einstein crystal: no two atoms on top of each other.
        x = 0.5 * white(key)
        return Chains(x, *crystal(x), jnp.zeros(n_walkers))

    def trajectory(chains, step, key):
        h = step.astype("float32")[:, None, None]
        key_v, key_a, key_h = jax.random.split(key, 3)
        h = h * jax.random.uniform(key_h, (n_walkers, 1, 1), "float32", 0.8, 1.2)  # no resonances

        def force(x, gradient):
            return (1 - lam) * x + lam * gradient

        def leapfrog(_, moving):
            x, v, _, gradient = moving
            v = v - 0.5 * h * force(x, gradient)
            x = x + h * v
            u, gradient = crystal(x)
            return x, v - 0.5 * h * force(x, gradient), u, gradient

        v = white(key_v)
        x, v_new, u, gradient = jax.lax.fori_loop(0, LEAPFROG, leapfrog, (chains.x, v, chains.u, chains.gradient))
        mixed = lambda x, u: (1 - lambdas) * square(x) + jnp.where(lambdas > 0, lambdas * u, 0.0)  # noqa: E731
        rise = mixed(x, u) + square(v_new) - mixed(chains.x, chains.u) - square(v)
        accept = -rise > jnp.log(jax.random.uniform(key_a, (n_walkers,)))
        wide = accept[:, None, None]
        return Chains(
            jnp.where(wide, x, chains.x),
            jnp.where(accept, u, chains.u),
            jnp.where(wide, gradient, chains.gradient),
            chains.accepted + accept,
        )

    def run(chains, step, key, n):
        def body(chains, key):
            chains = trajectory(chains, step, key)
            return chains, (square(chains.x), chains.u)

        return jax.lax.scan(body, chains, jax.random.split(key, n))

    return jax.jit(start), jax.jit(run, static_argnums=3)


def independent(einstein: np.ndarray, crystal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduced potentials (2, n) of samples of one state that are as good as independent, and the inefficiency.

    Args:
        einstein: (n, n_chains) series of the Einstein crystal's energy [kT].
        crystal: (n, n_chains) series of the crystal's energy [kT].
    """
    _, g = chain_correlation(np.clip(crystal - einstein, None, np.quantile(crystal - einstein, 0.99)))
    every = max(math.ceil(g), -(-einstein.size // MOST_INDEPENDENT))
    return np.stack([einstein[::every].ravel(), crystal[::every].ravel()]), np.float64(g)


def combine(series: list[tuple[np.ndarray, np.ndarray]], states: np.ndarray) -> tuple[float, float, np.ndarray]:
    """F(crystal) - F(Einstein), its standard error [kT], and every state's inefficiency."""
    einstein, crystal = (np.concatenate(parts).astype(np.float64) for parts in zip(*series, strict=True))
    parts = [
        independent(*(x.reshape(len(x), N_STATES, CHAINS)[:, k] for x in (einstein, crystal))) for k in range(N_STATES)
    ]
    both = np.concatenate([samples for samples, _ in parts], axis=1)
    u_kn = np.where(states[:, None] > 0, states[:, None] * both[1], 0.0) + (1 - states[:, None]) * both[0]
    answer = mbar(u_kn, [samples.shape[1] for samples, _ in parts])
    # Thinning by whole trajectories and the cap throw samples away; the error is of what was used.
    return float(answer.f_k[-1]), float(answer.std_error[0, -1]), np.array([g for _, g in parts])


def frenkel_ladd(
    system: System, target_error: float = 1e-3, max_evaluations: int = 20_000_000, seed: int = 0, tell: Callable = print
) -> Answer:
    """Free energy per atom [kT] until MBAR's error bar is small enough.

    Args:
        system: A crystal.
        target_error: One standard error [kT per atom].
        max_evaluations: Energy and gradient evaluations to spend at most.
        seed: Of the random numbers.
        tell: Told in a line what every round brought.

    Raises:
        InputError: If the system counts nearest images only, which the tables here do not.
    """
    if system.nearest_image_only:
        raise InputError(f"{system.name} counts nearest images only; this baseline counts all within the cutoff")
    n = system.n_atoms
    states = np.linspace(0.0, 1.0, N_STATES) ** SPACING
    width = spring_width(system)
    with double_precision():
        lambdas = np.repeat(states, CHAINS)
        start, run = sampler(system, width, lambdas)
        keys = iter(jax.random.split(jax.random.key(seed), 10_000))
        chains, steps = start(next(keys)), np.full(len(lambdas), 0.25)
        # Compiled before the clock starts.
        few = EQUILIBRATION // 15
        for length in (few, ROUND):
            jax.block_until_ready(run(chains, steps, next(keys), length))
        begin, per_trajectory = time.process_time(), len(lambdas) * LEAPFROG
        for _ in range(15):
            before = np.asarray(chains.accepted)
            chains, _ = run(chains, steps, next(keys), few)
            rate = ((np.asarray(chains.accepted) - before) / few).reshape(N_STATES, CHAINS).mean(axis=1)
            steps = steps * np.repeat(np.exp(0.7 * (rate - ACCEPTANCE)), CHAINS)
        spent = equilibration = len(lambdas) + 15 * few * per_trajectory
        chains = chains._replace(accepted=jnp.zeros(len(lambdas)))
        series: list[tuple[np.ndarray, np.ndarray]] = []
        error, rounds = math.inf, 1
        while error > target_error and spent + ROUND * per_trajectory <= max_evaluations:
            for _ in range(rounds):
                chains, energies = run(chains, steps, next(keys), ROUND)
                series.append(tuple(np.asarray(e) for e in energies))
                spent += ROUND * per_trajectory
            value, error, inefficiency = combine(series, states)
            error /= n
            log_z = 1.5 * (n - 1) * math.log(2 * math.pi * width**2)
            beta_f = (-float(system.log_prefactor) - log_z + value) / n
            tell(f"{spent:>10} evaluations: {beta_f:.5f} +- {error:.1e}, inefficiencies {inefficiency.min():.1f} to "
                 f"{inefficiency.max():.1f} trajectories")  # fmt: skip
            rounds = int(np.clip(math.ceil(len(series) * 0.5), 1, 20))
        acceptance = np.asarray(chains.accepted).reshape(N_STATES, CHAINS).mean(axis=1) / (ROUND * len(series))
    return Answer(
        beta_f,
        error,
        spent,
        equilibration,
        time.process_time() - begin,
        inefficiency,
        acceptance,
        error <= target_error,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="a shipped system or a file, as for `freeflow estimate`")
    parser.add_argument("--target-error", type=float, default=1e-3, help="kT per atom (default: %(default)s)")
    parser.add_argument("--max-evaluations", type=int, default=20_000_000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        system = ff.load(arguments.system)
        answer = frenkel_ladd(system, arguments.target_error, arguments.max_evaluations, arguments.seed)
    except FreeflowError as error:
        print(f"frenkel_ladd: {error}", file=sys.stderr)
        return error.exit_status
    print(f"beta F / N = {answer.beta_f_per_atom:.5f} +- {answer.std_error:.1e} kT, {answer.evaluations} evaluations")
    if system.published is not None:
        print(
            f"published: {system.published.beta_f_per_atom} +- {system.published.std_error}, {system.published.source}"
        )
    return 0 if answer.converged else 3


if __name__ == "__main__":
    sys.exit(main())
