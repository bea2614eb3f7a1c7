"""Three-body energies through moments of an atom's bonds: the arithmetic that all kernels of triplets share.

See `freeflow.potentials.Potential` for the formula. Nine moments stand in a row: M2 as xx, xy, xz, yy, yz, zz; M1. The
directions are unit vectors, so that M0 is the trace of M2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array

# Even moments are the same seen from either end of a bond, the first one is opposite.
PARITY = (1,) * 6 + (-1,) * 3


def of_bond(g: Array, d: Sequence[Array], inverse_r: Array) -> tuple[Array, ...]:
    """The nine moments of one bond of every atom.

    Args:
        g: Its weight.
        d: Its components [length].
        inverse_r: One over its length [1/length].
    """
    x, y, z = d
    g1 = g * inverse_r
    g2 = g1 * inverse_r
    return g2 * x * x, g2 * x * y, g2 * x * z, g2 * y * y, g2 * y * z, g2 * z * z, g1 * x, g1 * y, g1 * z


def energy_of(moments: Sequence[Array], cosine: Any) -> tuple[Array, tuple[Array, ...]]:
    """Energy of every atom's moments, and its derivatives by these, with M2 as a symmetric matrix; `cosine` is c."""
    xx, xy, xz, yy, yz, zz, mx, my, mz = moments
    m0 = xx + yy + zz
    m1_m1 = mx * mx + my * my + mz * mz
    m2_m2 = xx * xx + yy * yy + zz * zz + 2 * (xy * xy + xz * xz + yz * yz)
    energy = 0.5 * (m2_m2 - 2 * cosine * m1_m1 + cosine * cosine * m0 * m0)
    by_m0 = cosine * cosine * m0
    return energy, (xx + by_m0, xy, xz, yy + by_m0, yz, zz + by_m0, *(-2 * cosine * m for m in (mx, my, mz)))


def gradient_on_start(
    here: Sequence[Array],
    there: Sequence[Array],
    d: Sequence[Array],
    inverse_r: Array,
    weight: tuple[Array, Array],
) -> tuple[Array, Array, Array]:
    """Gradient of the moments' energy on the atom that a bond starts from, through that bond.

    With S1 and S2 the derivatives by M1 and M2, of both ends, the bond's energy is g/r S1.d + g/r^2 d.S2.d.

    Args:
        here: Derivatives of the energy by the nine moments of the atom.
        there: By those of the one at the other end: a bond enters the moments of both.
        d: The bond, from the one to the other, by component [length].
        inverse_r: One over its length [1/length].
        weight: g and dg/d(r^2).
    """
    (x, y, z), (g, g_slope) = d, weight
    sxx, sxy, sxz, syy, syz, szz, sx, sy, sz = (
        one + sign * other for one, other, sign in zip(here, there, PARITY, strict=True)
    )
    tx = sxx * x + sxy * y + sxz * z
    ty = sxy * x + syy * y + syz * z
    tz = sxz * x + syz * y + szz * z
    s_d, d_t = sx * x + sy * y + sz * z, x * tx + y * ty + z * tz
    g1 = g * inverse_r
    inverse_r2 = inverse_r * inverse_r
    g2, slope1 = g * inverse_r2, g_slope * inverse_r - 0.5 * g1 * inverse_r2
    slope2 = g_slope * inverse_r2 - g2 * inverse_r2
    along = 2 * (slope1 * s_d + slope2 * d_t)
    return (
        -(along * x + g1 * sx + 2 * g2 * tx),
        -(along * y + g1 * sy + 2 * g2 * ty),
        -(along * z + g1 * sz + 2 * g2 * tz),
    )
