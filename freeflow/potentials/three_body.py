"""Three-body potentials of Stillinger-Weber form."""

from __future__ import annotations

import math

import jax
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

    @jax.custom_jvp
    def radial(r2):
        """sigma/r and sigma/(r - cutoff), the latter as if just inside beyond its pole."""
        r = jnp.sqrt(r2)
        return sigma * (r / r2), sigma / jnp.minimum(r - cutoff, -1e-3 * sigma)

    @radial.defjvp
    def _slopes(at, change):
        # Powers of what is there already: roots and divisions are what these kernels spend their time with.
        s, decay = radial(*at)
        stretch = (0.5 / sigma**2) * s * change[0]  # dr / sigma
        return (s, decay), (-(s * s) * stretch, -(decay * decay) * stretch)

    def inside(r2, value):
        return jnp.where(r2 < (cutoff - 1e-3 * sigma) ** 2, value, 0.0)

    def weight(r2):
        return inside(r2, scale * jnp.exp(gamma * radial(r2)[1]))

    def pair(r2):
        s, decay = radial(r2)
        two_body = A * epsilon * (B * _power(s, p) - _power(s, q)) * jnp.exp(decay)
        # The moments count every bond with itself, at both of its ends; theta is 0 there.
        itself = lam * epsilon * (1 - cos_theta0) ** 2 * jnp.exp(gamma * decay) ** 2
        return inside(r2, two_body - itself)

    return Potential("stillinger_weber", cutoff, pair, weight, cos_theta0)


def _power(s, exponent: float):
    """s**exponent; whole exponents by multiplication, which is faster and exact at 0."""
    return s ** int(exponent) if exponent == int(exponent) else s**exponent
