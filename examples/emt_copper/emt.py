"""Effective medium theory of copper as a JAX function: numbers and cutoffs of ASE's EMT(asap_cutoff=True).

Formulas: Jacobsen, Stoltze and Norskov, Surf. Sci. 366, 394 (1996). Energies in eV, lengths in angstrom.
"""

import math

import jax.numpy as jnp

BOHR = 0.5291772105638411  # as ASE computes it from CODATA 2014
# Cohesive energy, radius of the neutral sphere, pair energy, and decay constants.
E0, S0, V0 = -3.51, 2.67 * BOHR, 2.476
ETA2, KAPPA, LAMBDA = 1.652 / BOHR, 2.740 / BOHR, 1.906 / BOHR
BETA = 1.809  # nearest-neighbour distance over s0 in fcc, as ASE rounds it
# The contributions are cut off smoothly between third and fourth neighbours.
CUTOFF = BETA * S0 * 0.5 * (math.sqrt(3) + 2.0)
STEEPNESS = math.log(9999.0) / (CUTOFF * 4.0 / (math.sqrt(3) + 2.0) - CUTOFF)
LISTED = 1.045 * CUTOFF  # pairs further apart are left out, as with `asap_cutoff`


def _smooth(r):
    return 1.0 / (1.0 + jnp.exp(STEEPNESS * (r - CUTOFF)))


def _shells(decay):
    """Sum over the first three fcc shells that makes a perfect crystal's contribution equal to one."""
    total = 0.0
    for shell, count in enumerate((12, 6, 24), 1):
        r = S0 * BETA * math.sqrt(shell)
        total += count * math.exp(-decay(r)) / (12 * (1.0 + math.exp(STEEPNESS * (r - CUTOFF))))
    return total


GAMMA1 = _shells(lambda r: ETA2 * (r - BETA * S0))
GAMMA2 = _shells(lambda r: KAPPA * (r / BETA - S0))


def energy(positions, cell):
    """Energy of copper atoms; the box must be orthorhombic and wider than twice the cutoff."""
    box = jnp.diag(cell)[None, None]
    apart = positions[:, None] - positions[None]
    apart = apart - box * jnp.round(apart / box)
    itself = jnp.eye(len(positions), dtype=bool)
    # The distance of an atom from itself is put far away before the root, whose slope at 0 is infinite.
    r2 = jnp.where(itself, (2 * LISTED) ** 2, jnp.sum(apart * apart, axis=-1))
    r = jnp.sqrt(r2)
    near = (r2 < LISTED**2) & ~itself
    weight = jnp.where(near, _smooth(r), 0.0)
    density = jnp.sum(jnp.exp(-ETA2 * (r - BETA * S0)) * weight, axis=1) / GAMMA1
    pairs = -0.5 * V0 * jnp.sum(jnp.exp(-KAPPA * (r / BETA - S0)) * weight, axis=1) / GAMMA2
    # Change of the neutral sphere's radius that gives this density in a perfect crystal.
    x = -jnp.log(density / 12.0) / (BETA * ETA2)
    cohesion = E0 * ((1.0 + LAMBDA * x) * jnp.exp(-LAMBDA * x) - 1.0)
    return jnp.sum(pairs + cohesion + 6.0 * V0 * jnp.exp(-KAPPA * x))
