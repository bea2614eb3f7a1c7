"""Force constants of a crystal: second derivatives of the energy at the lattice.

Radial functions are differentiated by JAX, twice, in one small program; how they add up to a Hessian is linear
algebra of a few bonds, and is done here in NumPy. Differentiating a kernel instead would mean compiling it once more,
for one evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from freeflow.geometry import NeighbourTable
from freeflow.potentials.core import RUN_ONCE, Potential, RadialFn, run_once
from freeflow.types import in_double_precision

# Moments of a bond d are radial functions times the monomials 1, xx, xy, xz, yy, yz, zz, x, y, z.
_SECOND = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
_N_MOMENTS = 10


class _Radial(NamedTuple):
    """A function of the squared distance r^2, and its derivatives with respect to that; arrays of one shape."""

    value: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray


class _Star(NamedTuple):
    """An atom and the bonds that start from it."""

    centre: int
    partners: np.ndarray  # (n_bonds,)
    bonds: np.ndarray  # (n_bonds, 3) [length]


class _Derivatives(NamedTuple):
    """Moments of bonds, and their derivatives with respect to the bond vector; a leading axis for the bonds."""

    value: np.ndarray  # (n_bonds, 10)
    first: np.ndarray  # (n_bonds, 10, 3)
    second: np.ndarray  # (n_bonds, 10, 3, 3)


@in_double_precision
def force_constants(
    potential: Potential, table: NeighbourTable, atoms: np.ndarray
) -> Float[np.ndarray, "n_atoms 3 n_columns"]:
    """Columns of the Hessian at the lattice for the three directions of each of `atoms`, exact to rounding.

    Returns:
        Second derivatives (n_atoms, 3, 3 len(atoms)) of the energy [energy/length**2].
    """
    partners, bonds = _bonds_of_atoms(table)
    near = _squares(bonds) < (1.5 * table.radius) ** 2
    functions, centres, weight = (potential.pair,), np.asarray(atoms), potential.weight
    if weight is not None:
        # An atom's displacement changes the moments of its own and those of its neighbours.
        centres = np.unique(np.concatenate([atoms, partners[atoms][near[atoms]]]))
        functions += weight, lambda r2: weight(r2) / r2, lambda r2: weight(r2) / jnp.sqrt(r2)
    pair, *weights = _radial(functions, _squares(bonds[centres]))
    columns = np.zeros((len(partners), 3, len(atoms), 3))
    for row, centre in enumerate(centres):
        kept = near[centre]
        star = _Star(centre, partners[centre][kept], bonds[centre][kept])
        for k in np.flatnonzero(atoms == centre):
            curvature = _hessian(_Radial(*(part[row][kept] for part in pair)), star.bonds)
            np.subtract.at(columns[:, :, k], star.partners, curvature)
            columns[centre, :, k] += curvature.sum(axis=0)
        if weights:
            moments = _moments([_Radial(*(part[row][kept] for part in f)) for f in weights], star.bonds)
            _add_triplets(columns, potential.cosine, star, moments, atoms)
    return columns.reshape(len(partners), 3, -1)


def _bonds_of_atoms(table: NeighbourTable) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours (n_atoms, 2 n_slots) and the ways there (n_atoms, 2 n_slots, 3) [length]; places without a pair are
    far away."""
    offset = table.offset.copy()
    if table.empty is not None:
        offset[table.empty] = [1e3 * table.radius, 0.0, 0.0]
    back = -np.take_along_axis(offset, table.source[:, :, None], axis=1)
    return np.concatenate([table.partner, table.source]).T, np.moveaxis(np.concatenate([offset, back]), 0, 1)


def _squares(d: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", d, d)


def _radial(functions: tuple[RadialFn, ...], r2: np.ndarray) -> list[_Radial]:
    """Functions of r^2 with two derivatives at the given points."""

    def all_of_them(r2: Array) -> list[tuple[Array, Array, Array]]:
        one = jnp.ones_like(r2)

        def twice(f: RadialFn) -> tuple[Array, Array, Array]:
            (value, slope), (_, curvature) = jax.jvp(lambda x: jax.jvp(f, (x,), (one,)), (r2,), (one,))
            return value, slope, curvature

        return [twice(f) for f in functions]

    return [_Radial(*parts) for parts in run_once(all_of_them, r2, options=RUN_ONCE)]


def _hessian(f: _Radial, d: np.ndarray) -> np.ndarray:
    """Second derivatives (..., 3, 3) of f(d.d) with respect to the vector d."""
    return 2 * f.slope[..., None, None] * np.eye(3) + 4 * f.curvature[..., None, None] * d[..., None] * d[..., None, :]


def _monomials(d: np.ndarray) -> _Derivatives:
    """Monomials of bond vectors (n, 3): those of M0, of M2 as xx, xy, xz, yy, yz, zz, and of M1."""
    value, first = np.ones((len(d), _N_MOMENTS)), np.zeros((len(d), _N_MOMENTS, 3))
    second = np.zeros((len(d), _N_MOMENTS, 3, 3))
    for c, (a, b) in enumerate(_SECOND, start=1):
        value[:, c] = d[:, a] * d[:, b]
        first[:, c, a] += d[:, b]
        first[:, c, b] += d[:, a]
        second[:, c, a, b] += 1
        second[:, c, b, a] += 1
    value[:, 7:] = d
    first[:, 7:] = np.eye(3)
    return _Derivatives(value, first, second)


def _moments(radial: list[_Radial], d: np.ndarray) -> _Derivatives:
    """Moments of bonds (n, 3) from g, g / r^2 and g / r: products of radial functions and monomials."""
    which = np.array([0] + [1] * 6 + [2] * 3)
    f = _Radial(*(np.stack(parts, axis=-1)[:, which] for parts in zip(*radial, strict=True)))
    slope = 2 * f.slope[:, :, None] * d[:, None]
    curvature = _hessian(f, np.broadcast_to(d[:, None], (*f.value.shape, 3)))
    p = _monomials(d)
    crossed = slope[..., None] * p.first[..., None, :]
    return _Derivatives(
        f.value * p.value,
        slope * p.value[..., None] + f.value[..., None] * p.first,
        curvature * p.value[..., None, None]
        + crossed
        + np.swapaxes(crossed, -1, -2)
        + f.value[..., None, None] * p.second,
    )


def _add_triplets(columns: np.ndarray, cosine: float, star: _Star, m: _Derivatives, atoms: np.ndarray) -> None:
    """Add what the energy M.metric.M / 2 of one atom's moments M gives to the columns of `atoms`."""
    centre, to, _ = star
    metric = np.array([cosine * cosine, 1, 2, 2, 1, 2, 1, -2 * cosine, -2 * cosine, -2 * cosine])
    bent = np.einsum("c,bcij->bij", metric * m.value.sum(axis=0), m.second)
    for k in np.flatnonzero((atoms == centre) | np.isin(atoms, to)):
        # How much longer a bond gets per displacement of the column's atom.
        stretch = (to == atoms[k]).astype(float) - (centre == atoms[k])
        through = metric[:, None] * np.einsum("b,bcj->cj", stretch, m.first)
        pull = stretch[:, None, None] * bent + np.einsum("bci,cj->bij", m.first, through)
        np.add.at(columns[:, :, k], to, pull)
        columns[centre, :, k] -= pull.sum(axis=0)
