"""Three-body energies through moments of an atom's bonds: the arithmetic that all kernels of triplets share.

See `freeflow.potentials.Potential` for the formula. Ten moments stand in a row: M0; M2 as xx, xy, xz, yy, yz, zz; M1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array

# Even moments are the same seen from either end of a bond, the first one is opposite.
PARITY = (1,) * 7 + (-1,) * 3


def of_bond(g: Array, n: Sequence[Array]) -> tuple[Array, ...]:
    """The ten moments of one bond of every atom, of weight g and direction n."""
    nx, ny, nz = n
    gx, gy, gz = g * nx, g * ny, g * nz
    return g, gx * nx, gx * ny, gx * nz, gy * ny, gy * nz, gz * nz, gx, gy, gz


def energy_of(moments: Sequence[Array], cosine: Any) -> tuple[Array, tuple[Array, ...]]:
    """Energy of every atom's moments, and its derivatives by these, with M2 as a symmetric matrix; `cosine` is c."""
    m0, xx, xy, xz, yy, yz, zz, mx, my, mz = moments
    m1_m1 = mx * mx + my * my + mz * mz
    m2_m2 = xx * xx + yy * yy + zz * zz + 2 * (xy * xy + xz * xz + yz * yz)
    energy = 0.5 * (m2_m2 - 2 * cosine * m1_m1 + cosine * cosine * m0 * m0)
    return energy, (cosine * cosine * m0, xx, xy, xz, yy, yz, zz, *(-2 * cosine * m for m in (mx, my, mz)))


def gradient_on_start(
    here: Sequence[Array],
    there: Sequence[Array],
    d: Sequence[Array],
    inverse_r: Array,
    slope: Array,
    weight: tuple[Array, Array],
) -> tuple[Array, Array, Array]:
    """Gradient of the energy on the atom that a bond starts from, through that bond.

    Args:
        here: Derivatives of the energy by the ten moments of the atom.
        there: By those of the one at the other end: a bond enters the moments of both.
        d: The bond, from the one to the other, by component [length].
        inverse_r: One over its length [1/length].
        slope: d(pair energy)/d(r^2).
        weight: g and dg/d(r^2).
    """
    (nx, ny, nz), (g, g_slope) = [component * inverse_r for component in d], weight
    s0, sxx, sxy, sxz, syy, syz, szz, sx, sy, sz = (
        one + sign * other for one, other, sign in zip(here, there, PARITY, strict=True)
    )
    tx = sxx * nx + sxy * ny + sxz * nz
    ty = sxy * nx + syy * ny + syz * nz
    tz = sxz * nx + syz * ny + szz * nz
    s_n, n_t = sx * nx + sy * ny + sz * nz, tx * nx + ty * ny + tz * nz
    # dg/dr = 2 r dg/d(r^2); the rest turns the bond.
    along = 2 * (slope + g_slope * (s0 + s_n + n_t)) - g * inverse_r * inverse_r * (s_n + 2 * n_t)
    turn = g * inverse_r
    return (
        -(along * d[0] + turn * (sx + 2 * tx)),
        -(along * d[1] + turn * (sy + 2 * ty)),
        -(along * d[2] + turn * (sz + 2 * tz)),
    )
