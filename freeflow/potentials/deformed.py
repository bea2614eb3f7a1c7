"""Energies of a crystal in a deformed cell: every separation d of the reference cell becomes F d.

The kernels walk over the same neighbour tables as those of `freeflow.potentials.core`, and return the virial
beside the forces: the derivative with respect to F costs six sums of products per bond, and no further evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.geometry import NeighbourTable
from freeflow.potentials import moments, walks
from freeflow.potentials.core import RUN_ONCE, Potential, run_once, with_slope
from freeflow.potentials.walks import Pair, Parts
from freeflow.types import Numeric, in_double_precision

DeformedEnergy = Callable[[Float[Array, "n 3"], Float[Array, "3 3"]], Float[Array, ""]]

# Components of a symmetric matrix that are summed.
_UPPER = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))


class _Sums(NamedTuple):
    """What a kernel finds."""

    energy: Array  # (n_atoms, batch), booked on the atoms
    gradient: Array  # (n_atoms, 3, batch) with respect to positions in the deformed cell
    virial: Array  # (3, 3, batch): sum over bonds of dU/dd d^T, symmetric


def deformed_energy(potential: Potential, table: NeighbourTable, dtype: str = "float64") -> DeformedEnergy:
    """U of displacements u and a deformation F, less U of the undeformed lattice; differentiable once in both.

    An atom at X + u of the reference cell is at F (X + u) of the deformed one, and the cell's vectors h are F h.

    Args:
        potential: What to evaluate [energy].
        table: Neighbours in the reference cell; pairs outside it are not seen.
        dtype: Precision of the kernel; atomic energies are summed in the widest precision that JAX has switched on.

    Returns:
        A function of displacements (n_atoms, 3) [length] and a matrix (3, 3); vmap reaches the batched kernel.

    Raises:
        ValueError: If the table takes nearest images at run time, in a box of fixed size.
    """
    if table.box is not None:
        raise ValueError("nearest images are those of one fixed box; it cannot be deformed")
    kernel = _pairs(potential, table, dtype) if potential.weight is None else _triplets(potential, table, dtype)
    at_rest = _at_rest(kernel, table)

    def batched(u: Float[Array, "n 3 batch"], f: Float[Array, "3 3 batch"]) -> tuple[Array, Array, Array]:
        deformation = f.astype(dtype)
        sums = kernel(u.astype(dtype), deformation)
        relative = sums.energy - np.asarray(at_rest, dtype)[:, None]
        total = jnp.sum(relative, axis=0, dtype=jax.dtypes.canonicalize_dtype("float64"))
        by_u = jnp.stack(
            [_along(deformation[:, a, None], [sums.gradient[:, b] for b in range(3)]) for a in range(3)], axis=1
        )
        # dU/dF = sum dU/dd (F^-1 d)^T, from the virial sum dU/dd d^T.
        by_f = jnp.einsum("abk,cbk->ack", sums.virial, _inverse(deformation))
        return total, by_u.astype(u.dtype), by_f.astype(f.dtype)

    def one_batch(u: Numeric, f: Numeric) -> tuple[Array, Array, Array]:
        total, by_u, by_f = batched(jnp.moveaxis(u, 0, -1), jnp.moveaxis(f, 0, -1))
        return total, jnp.moveaxis(by_u, -1, 0), jnp.moveaxis(by_f, -1, 0)

    return differentiable(one_batch)


def differentiable(batched: Callable[[Array, Array], tuple[Array, Array, Array]]) -> DeformedEnergy:
    """An energy from a function of batches (batch, n_atoms, 3), (batch, 3, 3) that returns the gradients, too.

    It is differentiable once in both, and vmap evaluates whole batches.
    """

    @jax.custom_batching.custom_vmap
    def one(u, f):
        energy, by_u, by_f = batched(u[None], f[None])
        return energy[0], by_u[0], by_f[0]

    @one.def_vmap
    def _(axis_size, in_batched, u, f):
        u, f = (
            x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_batched in zip((u, f), in_batched, strict=True)
        )
        return batched(u, f), (True, True, True)

    @jax.custom_vjp
    def energy(u, f):
        return one(u, f)[0]

    def forward(u, f):
        value, *gradients = one(u, f)
        return value, gradients

    def backward(gradients, cotangent):
        return tuple((cotangent * gradient).astype(gradient.dtype) for gradient in gradients)

    energy.defvjp(forward, backward)
    return energy


@in_double_precision
def _at_rest(kernel: Callable[[Array, Array], _Sums], table: NeighbourTable) -> np.ndarray:
    """Energy (n_atoms,) that a kernel books on every atom of the perfect lattice."""
    rest, unit = np.zeros((table.partner.shape[1], 3, 1)), np.eye(3)[:, :, None]
    return run_once(lambda u, f: kernel(u, f).energy, rest, unit, options=RUN_ONCE)[:, 0]  # compiles no forces


def _inverse(f: Array) -> Array:
    """Inverses of matrices (3, 3, batch), by cofactors."""
    rows = [jnp.cross(f[(a + 1) % 3], f[(a + 2) % 3], axis=0) for a in range(3)]
    return jnp.stack(rows, axis=1) / jnp.sum(f[0] * rows[0], axis=0)[None, None]


def _along(row: Sequence[Array] | Array, d: list[Array]) -> Array:
    """Product of a matrix's row, three arrays over the batch, with vectors given by components."""
    return row[0] * d[0] + row[1] * d[1] + row[2] * d[2]


def _entries(f: Array) -> Parts:
    """A batch of deformations (3, 3, batch) as what all atoms of a sample share."""
    return tuple(f[a, b] for a in range(3) for b in range(3))


def _deformed(pair: Pair) -> tuple[list[Array], Array]:
    """Separations F d of pairs in the deformed cell, and their squares [length, length**2]."""
    d = [_along(pair.common[3 * a : 3 * a + 3], pair.d) for a in range(3)]
    return d, d[0] * d[0] + d[1] * d[1] + d[2] * d[2]


def _matrix(upper: Parts) -> Array:
    """Symmetric matrices (3, 3, batch) from sums booked on atoms (n_atoms, batch)."""
    total = {index: jnp.sum(part, axis=0) for index, part in zip(_UPPER, upper, strict=True)}
    return jnp.stack([jnp.stack([total[min(a, b), max(a, b)] for b in range(3)]) for a in range(3)])


def _pairs(potential: Potential, table: NeighbourTable, dtype: str) -> Callable[[Array, Array], _Sums]:
    """Pair potentials."""
    walk = walks.walk(table, dtype)

    def visit(pair: Pair) -> tuple[Parts, Parts]:
        d, r2 = _deformed(pair)
        value, slope = with_slope(potential.pair, r2)
        pull = [-2 * slope * component for component in d]
        return (value, *(-pull[a] * d[b] for a, b in _UPPER)), tuple(pull)

    def kernel(u: Array, f: Array) -> _Sums:
        sums = walk.total(visit, walk.rows(u), 10, n_own=7, common=_entries(f))
        energy, virial, gradient = sums[0], sums[1:7], sums[7:]
        return _Sums(walk.atoms(energy), walk.vectors(gradient), _matrix(virial))

    return kernel


def _triplets(potential: Potential, table: NeighbourTable, dtype: str) -> Callable[[Array, Array], _Sums]:
    """Pairs and bond moments; the energy is that of `Potential`, the two passes are those of the undeformed kernel."""
    assert potential.weight is not None
    weight, of_pair, cosine = potential.weight, potential.pair, np.asarray(potential.cosine, dtype)
    walk = walks.walk(table, dtype)

    def gather(pair: Pair) -> tuple[Parts, Parts]:
        d, r2 = _deformed(pair)
        value, slope = with_slope(of_pair, r2)
        pull = [-2 * slope * component for component in d]
        bond = moments.of_bond(weight(r2), d, jnp.sqrt(r2) / r2)
        return (value, *(-pull[a] * d[b] for a, b in _UPPER)), (*bond, *pull)

    def finish(sums: Parts) -> Parts:
        of_triplets, by = moments.energy_of(sums[7:16], cosine)
        return sums[0] + of_triplets, *sums[1:7], *by, *sums[16:]

    def push(pair: Pair) -> tuple[Parts, Parts]:
        d, r2 = _deformed(pair)
        pull = moments.gradient_on_start(pair.here, pair.there, d, jnp.sqrt(r2) / r2, with_slope(weight, r2))
        return tuple(-pull[a] * d[b] for a, b in _UPPER), pull

    def kernel(u: Array, f: Array) -> _Sums:
        x, entries = walk.rows(u), _entries(f)
        energy, *sums = walk.total(gather, x, 19, n_own=7, common=entries, finish=finish)
        sums, by = (*sums[:6], *sums[15:]), tuple(sums[6:15])
        sums = walk.total(push, x, sums, n_own=6, fields=by, common=entries)
        return _Sums(walk.atoms(energy), walk.vectors(sums[6:]), _matrix(sums[:6]))

    return kernel
