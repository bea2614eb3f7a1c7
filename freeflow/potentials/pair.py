"""Pair potentials."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from freeflow.potentials.core import Potential


def lennard_jones(epsilon: float = 1.0, sigma: float = 1.0, cutoff: float = 2.5, shift: bool = True) -> Potential:
    """Truncated 12-6 potential, 4 epsilon [(sigma/r)^12 - (sigma/r)^6].

    Args:
        epsilon: Well depth [energy].
        sigma: Diameter [length].
        cutoff: Where the potential ends [length].
        shift: Whether the energy is shifted to zero at the cutoff (LAMMPS's `pair_modify shift`).
    """
    at_cutoff = (sigma / cutoff) ** 12 - (sigma / cutoff) ** 6 if shift else 0.0

    def powers(r2):
        # Far away nothing overflows, and two atoms in one place have no finite energy anyway.
        s2 = sigma**2 / r2
        return s2, s2 * s2 * s2

    @jax.custom_jvp
    def pair(r2):
        _, s6 = powers(r2)
        return jnp.where(r2 < cutoff**2, 4 * epsilon * (s6 * s6 - s6 - at_cutoff), 0.0)

    @pair.defjvp
    def _slope(at, change):
        (r2,) = at
        # One division for both, and half of the multiplications that autodiff would take.
        s2, s6 = powers(r2)
        slope = (-12 * epsilon / sigma**2) * s2 * (s6 * (2 * s6 - 1))
        return pair(r2), jnp.where(r2 < cutoff**2, slope, 0.0) * change[0]

    return Potential("lennard_jones", cutoff, pair)


def wca(epsilon: float = 1.0, sigma: float = 1.0) -> Potential:
    """Weeks-Chandler-Andersen: the repulsive part of 12-6, cut at its minimum and shifted to zero."""
    repulsive = lennard_jones(epsilon, sigma, 2 ** (1 / 6) * sigma, shift=True)
    return Potential("wca", repulsive.cutoff, repulsive.pair)
