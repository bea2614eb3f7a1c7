"""Free energies of the crystals in these folders by another road: Frenkel and Ladd's, without freeflow.

Hybrid Monte Carlo samples u_l = (1 - l) u_Einstein + l u for several l between an Einstein crystal and the crystal,
with the centre of mass fixed, and MBAR joins them (Shirts and Chodera, J. Chem. Phys. 129, 124105, 2008). Energies come
from the JAX functions beside the system files. The error bar is the scatter over groups of independent chains.

    python examples/frenkel_ladd.py copper_300 --check-ase
    python examples/frenkel_ladd.py salt --sweeps 400
"""

import argparse
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

HERE = Path(__file__).parent
BOLTZMANN = 8.617333262e-5  # [eV/K]
FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
MASSES = {"Cu": 63.546, "Na": 22.98976928, "Cl": 35.45}
# Lattice constant [angstrom], cubic cells along an edge, temperature [K], folder and module.
CASES = {
    "copper_300": (3.61, 3, 300.0, "emt_copper", "emt"),
    "copper_1000": (3.66, 3, 1000.0, "emt_copper", "emt"),
    "salt": (5.5, 2, 300.0, "salt", "salt"),
}
LAMBDAS = np.array([0.0, 0.02, 0.07, 0.14, 0.23, 0.33, 0.44, 0.55, 0.66, 0.77, 0.87, 0.95, 1.0])
# Chains, groups of them for the error bar, leapfrog steps of a sweep, sweeps of a block, blocks to settle in.
CHAINS, GROUPS, LEAPS, BLOCK, WARM_UP = 32, 8, 6, 20, 4


def wavelength(mass: float, kt: float) -> float:
    """h / sqrt(2 pi m kT) [angstrom] for a mass in dalton and kT in eV."""
    joule = 1.602176634e-19 * kt
    return 6.62607015e-34 / math.sqrt(2 * math.pi * mass * 1.66053906660e-27 * joule) * 1e10


def crystal(a: float, repeats: int, folder: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Sites, cell and species of some cubic cells."""
    basis, kinds = (
        (FCC, ["Cu"] * 4)
        if folder == "emt_copper"
        else (
            np.concatenate([FCC, FCC + 0.5]),
            ["Na"] * 4 + ["Cl"] * 4,
        )
    )
    shifts = np.indices((repeats,) * 3).reshape(3, -1).T
    return a * (shifts[:, None] + basis[None]).reshape(-1, 3), repeats * a * np.eye(3), kinds * repeats**3


def sampler(energy, spring, kt, n):
    """Functions that start chains, and that move them by `BLOCK` sweeps at any lambda.

    Coordinates are in units of the springs' Gaussian; a sweep is a trajectory of `LEAPS` leapfrog steps.
    """
    scale = math.sqrt(kt / spring)

    def reduced(z, lam):
        parts = 0.5 * jnp.sum(z * z), energy(scale * z) / kt
        return (1 - lam) * parts[0] + lam * parts[1], parts

    def free(z):
        return z - jnp.mean(z, axis=0, keepdims=True)

    def slope(z, lam):
        (u, parts), force = jax.value_and_grad(reduced, has_aux=True)(z, lam)
        return u, parts, free(force)

    def sweep(state, key, lam, step):
        z, u, parts, force = state
        key_v, key_h, key_a = jax.random.split(key, 3)
        v = free(jax.random.normal(key_v, z.shape))
        h = step * jax.random.uniform(key_h, minval=0.8, maxval=1.2)

        def leap(_, now):
            x, p, u, parts, f = now
            p = p - 0.5 * h * f
            x = x + h * p
            u, parts, f = slope(x, lam)
            return x, p - 0.5 * h * f, u, parts, f

        x, p, new_u, new_parts, f = jax.lax.fori_loop(0, LEAPS, leap, (z, v, u, parts, force))
        rise = new_u - u + 0.5 * jnp.sum(p * p) - 0.5 * jnp.sum(v * v)
        accept = jnp.log(jax.random.uniform(key_a)) < -rise
        moved, stayed = (x, new_u, new_parts, f), (z, u, parts, force)
        kept = jax.tree.map(lambda new, old: jnp.where(accept, new, old), moved, stayed)
        return kept, (kept[2], accept)

    @jax.jit
    def start(key, lam):
        def one(key):
            z = free(jax.random.normal(key, (n, 3)))
            return z, *slope(z, lam)

        return jax.vmap(one)(jax.random.split(key, CHAINS))

    @jax.jit
    def block(key, states, lam, step):
        def one(key, state):
            return jax.lax.scan(lambda state, key: sweep(state, key, lam, step), state, jax.random.split(key, BLOCK))

        return jax.vmap(one)(jax.random.split(key, CHAINS), states)

    return start, block


def chains(key, start, block, lam, sweeps):
    """Energies [kT] of samples at one lambda, (CHAINS, sweeps) each: of the springs, and of the crystal."""
    key_start, *keys = jax.random.split(key, 1 + WARM_UP + sweeps // BLOCK)
    states, step, drawn, rates = start(key_start, lam), 0.2, [], []
    for k, key_block in enumerate(keys):
        states, (parts, accepted) = block(key_block, states, lam, step)
        rate = float(np.mean(accepted))
        if k < WARM_UP:  # the step size follows the acceptance while the chains settle
            step *= math.exp(0.8 * (rate - 0.8))
        else:
            drawn.append([np.asarray(part) for part in parts])
            rates.append(rate)
    print(f"  lambda {lam:.2f}: step {step:.2f}, acceptance {np.mean(rates):.2f}", flush=True)
    return [np.concatenate(part, axis=1) for part in zip(*drawn, strict=True)]


def mbar(einstein: np.ndarray, full: np.ndarray) -> float:
    """Free energy from the first to the last lambda [kT]; energies (n_lambdas, n_samples), as they were drawn."""
    n = einstein.shape[1]
    u = (1 - LAMBDAS)[:, None] * einstein.reshape(-1) + LAMBDAS[:, None] * full.reshape(-1)
    f = np.zeros(len(LAMBDAS))
    for _ in range(2000):
        new = -logsumexp(-u - logsumexp(f[:, None] - u + math.log(n), axis=0), axis=1)
        new -= new[0]
        if np.abs(new - f).max() < 1e-9:
            break
        f = new
    return float(f[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--sweeps", type=int, default=200, help="samples of every chain at every lambda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-ase", action="store_true", help="compare the function with ASE's EMT first")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    a, repeats, temperature, folder, module = CASES[arguments.case]
    sys.path.insert(0, str(HERE / folder))
    code = __import__(module)
    sites, cell, species = crystal(a, repeats, folder)
    n, kt = len(sites), BOLTZMANN * temperature
    if folder == "emt_copper":
        at = lambda x: code.energy(x, jnp.asarray(cell))  # noqa: E731
    else:
        at = lambda x: code.energy(x, jnp.asarray(cell), species)  # noqa: E731
    lattice = float(jax.jit(at)(jnp.asarray(sites)))
    if arguments.check_ase:
        compare_with_ase(at, sites, cell)
    # Einstein springs: the curvature that an atom feels alone, softened as its neighbours move with it.
    curvature = jax.jit(lambda x: jax.jvp(jax.grad(at), (x,), (jnp.zeros_like(x).at[0, 0].set(1.0),))[1][0, 0])
    spring = 0.6 * float(curvature(jnp.asarray(sites)))
    keys = jax.random.split(jax.random.key(arguments.seed), len(LAMBDAS))
    energy = lambda u: at(jnp.asarray(sites) + u) - lattice  # noqa: E731
    start, block = sampler(energy, spring, kt, n)
    drawn = [chains(key, start, block, lam, arguments.sweeps) for key, lam in zip(keys, LAMBDAS, strict=True)]
    einstein, full = (np.stack(part) for part in zip(*drawn, strict=True))  # (n_lambdas, CHAINS, sweeps)
    groups = [mbar(*(part[:, g::GROUPS].reshape(len(LAMBDAS), -1) for part in (einstein, full))) for g in range(GROUPS)]
    difference = mbar(*(part.reshape(len(LAMBDAS), -1) for part in (einstein, full)))
    error = float(np.std(groups, ddof=1)) / math.sqrt(GROUPS)
    # ln Z of the springs on the centre-of-mass-free space, then the constants of the convention.
    log_z = 1.5 * (n - 1) * math.log(2 * math.pi * kt / spring)
    volume = float(np.linalg.det(cell))
    momenta = sum(3 * math.log(wavelength(MASSES[name], kt)) for name in species)
    beta_f = lattice / kt - log_z + difference - 0.5 * math.log(n) - math.log(volume) + momenta
    evaluations = len(LAMBDAS) * CHAINS * LEAPS * BLOCK * (WARM_UP + arguments.sweeps // BLOCK)
    print(f"beta F / N = {beta_f / n:.6f} +- {error / n:.6f}, {evaluations} evaluations")


def compare_with_ase(at, sites, cell) -> None:
    """Largest difference of energies and forces over some displaced crystals."""
    from ase import Atoms
    from ase.calculators.emt import EMT

    atoms, rng = Atoms(f"Cu{len(sites)}", positions=sites, cell=cell, pbc=True), np.random.default_rng(0)
    atoms.calc = EMT(asap_cutoff=True)
    both = jax.jit(jax.value_and_grad(at))
    worst = np.zeros(2)
    for _ in range(5):
        x = sites + 0.1 * rng.standard_normal(sites.shape)
        atoms.set_positions(x)
        energy, gradient = both(jnp.asarray(x))
        apart = abs(atoms.get_potential_energy() - float(energy)), np.abs(atoms.get_forces() + gradient).max()
        worst = np.maximum(worst, apart)
    print(f"  ASE: energies differ by {worst[0]:.1e} eV, forces by {worst[1]:.1e} eV/angstrom at most")


if __name__ == "__main__":
    main()
