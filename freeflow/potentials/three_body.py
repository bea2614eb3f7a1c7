"""Three-body potentials of Stillinger-Weber form."""

from __future__ import annotations

import math

import jax.numpy as jnp

from freeflow.potentials.core import Potential


def stillinger_weber(
    epsilon: float,
    sigma: float,
    a: float,
    lam: float,
    gamma: float,
    cos_theta0: float,
    A: float,
    B: float,
    p: float,
    q: float,
) -> Potential:
    """Stillinger and Weber, Phys. Rev. B 31, 5262 (1985), with LAMMPS's names for the parameters.

    Pairs: A epsilon [B (sigma/r)^p - (sigma/r)^q] exp(sigma / (r - a sigma)). Triplets: lam epsilon
    (cos theta - cos_theta0)^2 exp(gamma sigma / (r_ij - a sigma)) exp(gamma sigma / (r_ik - a sigma)).

    Args:
        epsilon: Energy scale [energy].
        sigma: Length scale [length].
        a: Cutoff in units of sigma.
        lam: Strength of the triplets.
        gamma: Decay of the triplets.
        cos_theta0: Cosine of the preferred angle.
        A: Strength of the pairs.
        B: Strength of the pair repulsion.
        p: Exponent of the repulsion.
        q: Exponent of the attraction.
    """
    cutoff = a * sigma
    scale = math.sqrt(lam * epsilon)

    def radial(r2):
        inside = r2 < cutoff**2
        # 1/(r - cutoff) runs to minus infinity at the edge; the guard comes before the division
        # so that neither value nor slope meets 0 * inf in float32.
        r = jnp.sqrt(jnp.where(inside, r2, (0.5 * cutoff) ** 2))
        gap = jnp.minimum(r - cutoff, -1e-3 * sigma)
        return inside & (r - cutoff < -1e-3 * sigma), r, sigma / gap

    def weight(r2):
        inside, _, decay = radial(r2)
        return jnp.where(inside, scale * jnp.exp(gamma * decay), 0.0)

    def pair(r2):
        inside, r, decay = radial(r2)
        s = sigma / r
        two_body = A * epsilon * (B * _power(s, p) - _power(s, q)) * jnp.exp(decay)
        # The moments count every bond with itself, at both of its ends; theta is 0 there.
        itself = lam * epsilon * (1 - cos_theta0) ** 2 * jnp.exp(2 * gamma * decay)
        return jnp.where(inside, two_body - itself, 0.0)

    return Potential("stillinger_weber", cutoff, pair, weight, cos_theta0)


def _power(s, exponent: float):
    """s**exponent; whole exponents by multiplication, which is faster and exact at 0."""
    return s ** int(exponent) if exponent == int(exponent) else s**exponent
