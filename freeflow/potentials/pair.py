"""Pair potentials."""

from __future__ import annotations

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

    def pair(r2):
        inside = r2 < cutoff**2
        # Guarded before the powers: padding far outside must not overflow, nor its gradient.
        s2 = sigma**2 / jnp.where(inside, r2, cutoff**2)
        s6 = s2 * s2 * s2
        return jnp.where(inside, 4 * epsilon * (s6 * s6 - s6 - at_cutoff), 0.0)

    return Potential("lennard_jones", cutoff, pair)


def wca(epsilon: float = 1.0, sigma: float = 1.0) -> Potential:
    """Weeks-Chandler-Andersen: the repulsive part of 12-6, cut at its minimum and shifted to zero."""
    repulsive = lennard_jones(epsilon, sigma, 2 ** (1 / 6) * sigma, shift=True)
    return Potential("wca", repulsive.cutoff, repulsive.pair)
