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
from freeflow.potentials.core import RUN_ONCE, Potential, atomic_energies_at_rest, with_slope
from freeflow.potentials.walks import Pair, Parts, Pass
from freeflow.types import Numeric

DeformedEnergy = Callable[[Float[Array, "n 3"], Float[Array, "3 3"]], Float[Array, ""]]

# Components of a symmetric matrix that are summed.
_UPPER = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))


class _Sums(NamedTuple):
    """What a kernel finds."""

    energy: Array  # (batch,) in the widest precision, relative to the undeformed lattice
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
    make = _pairs if potential.weight is None else _triplets
    kernel = make(potential, table, dtype, atomic_energies_at_rest(potential, table, RUN_ONCE))

    def batched(u: Float[Array, "n 3 batch"], f: Float[Array, "3 3 batch"]) -> tuple[Array, Array, Array]:
        deformation = f.astype(dtype)
        sums = kernel(u.astype(dtype), deformation)
        by_u = jnp.stack(
            [_along(deformation[:, a, None], [sums.gradient[:, b] for b in range(3)]) for a in range(3)], axis=1
        )
        # dU/dF = sum dU/dd (F^-1 d)^T, from the virial sum dU/dd d^T.
        by_f = jnp.einsum("abk,cbk->ack", sums.virial, _inverse(deformation))
        return sums.energy, by_u.astype(u.dtype), by_f.astype(f.dtype)

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


def _matrix(upper: Sequence[Array]) -> Array:
    """Symmetric matrices (3, 3, batch) from their components (batch,)."""
    total = dict(zip(_UPPER, upper, strict=True))
    return jnp.stack([jnp.stack([total[min(a, b), max(a, b)] for b in range(3)]) for a in range(3)])


_Kernel = Callable[[Array, Array], _Sums]


def _pairs(potential: Potential, table: NeighbourTable, dtype: str, rest: np.ndarray) -> _Kernel:
    """Pair potentials; energies of atoms less those at rest (n_atoms,)."""
    walk = walks.walk(table, dtype)

    def visit(pair: Pair) -> tuple[Parts, Parts]:
        d, r2 = _deformed(pair)
        value, slope = with_slope(potential.pair, r2)
        pull = tuple(-2 * slope * component for component in d)
        return (value, *_virial(pull, d)), pull

    def kernel(u: Array, f: Array) -> _Sums:
        (energy, *virial), gradient = walk.once(Pass(visit, 7, 3), walk.rows(u), _entries(f), rest)
        return _Sums(energy, walk.vectors(gradient), _matrix(virial).astype(dtype))

    return kernel


def _triplets(potential: Potential, table: NeighbourTable, dtype: str, rest: np.ndarray) -> _Kernel:
    """Pairs and bond moments; the energy is that of `Potential`, the two passes are those of the undeformed kernel."""
    assert potential.weight is not None
    weight, of_pair, cosine = potential.weight, potential.pair, np.asarray(potential.cosine, dtype)
    walk = walks.walk(table, dtype)

    def gather(pair: Pair) -> tuple[Parts, Parts]:
        d, r2 = _deformed(pair)
        value, slope = with_slope(of_pair, r2)
        pull = tuple(-2 * slope * component for component in d)
        return (value, *_virial(pull, d)), (*moments.of_bond(weight(r2), d, jnp.sqrt(r2) / r2), *pull)

    def finish(sums: Parts) -> tuple[Array, Parts, Parts]:
        energy, by = moments.energy_of(sums[:9], cosine)
        return energy, by, sums[9:]

    def push(pair: Pair) -> tuple[Parts, Parts]:
        d, r2 = _deformed(pair)
        pull = moments.gradient_on_start(pair.here, pair.there, d, jnp.sqrt(r2) / r2, with_slope(weight, r2))
        return _virial(pull, d), pull

    def kernel(u: Array, f: Array) -> _Sums:
        sums = walk.twice(Pass(gather, 7, 12), finish, Pass(push, 6, 3), walk.rows(u), _entries(f), rest)
        (energy, *virials), gradient = sums
        virial = [a + b for a, b in zip(virials[:6], virials[6:], strict=True)]
        return _Sums(energy, walk.vectors(gradient), _matrix(virial).astype(dtype))

    return kernel


def _virial(pull: Parts, d: Sequence[Array]) -> Parts:
    """Components of what a pair adds to the virial, from the gradient on its start."""
    return tuple(-pull[a] * d[b] for a, b in _UPPER)
