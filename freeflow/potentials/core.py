"""A potential on a crystal: energies and gradients of displacements, one or a batch at a time.

Kernels see arrays (n_atoms, 3, batch) with the batch innermost and walk over the slots of a
`NeighbourTable`. Users see a function of one configuration; a custom batching rule hands a whole
vmap to the kernel, and a custom derivative uses the kernel's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.geometry import NeighbourTable
from freeflow.potentials import moments, walks
from freeflow.potentials.walks import Pair, Parts, Pass
from freeflow.types import in_double_precision

RadialFn = Callable[[Array], Array]  # of squared distances or of distances; elementwise


@dataclass(frozen=True)
class Potential:
    """Pair energies plus, for three-body potentials, moments of the bonds around every atom.

    The energy is sum over pairs of pair(r^2), plus the sum over atoms of
    strength/2 [M2:M2 - 2 c M1.M1 + c^2 M0^2] with the bond moments M0 = sum g, M1 = sum g n,
    M2 = sum g n n^T of the unit bond vectors n. That expands strength/2 sum_jk g_j g_k
    (n_j.n_k - c)^2, so that a triple sum costs no more than a pair sum. The j = k terms are
    taken off again in `pair`.
    """

    name: str
    cutoff: float  # [length]
    pair: RadialFn  # squared distance -> energy, 0 beyond the cutoff
    weight: RadialFn | None = None  # g: squared distance -> sqrt(strength) g(r); 0 beyond the cutoff
    cosine: float = 0.0  # c


def with_slope(f: RadialFn, r2: Array) -> tuple[Array, Array]:
    """f and df/d(r^2), by forward mode: the kernel needs no hand-written derivative."""
    return jax.jvp(f, (r2,), (jnp.ones_like(r2),))


# Displacements (n_atoms, 3, batch) -> energies (batch,) in the widest precision, gradient (n_atoms, 3, batch).
Kernel = Callable[[Array], tuple[Array, Array]]


def _kernel(potential: Potential, table: NeighbourTable, dtype: Any, rest: np.ndarray) -> Kernel:
    """That of the potential; energies are relative to those of atoms at rest (n_atoms,)."""
    if potential.weight is not None:
        return _triplet_kernel(potential, potential.weight, table, dtype, rest)
    return pair_kernel(potential, table, dtype, rest)


def pair_kernel(potential: Potential, table: NeighbourTable, dtype: Any, rest: np.ndarray | None = None) -> Kernel:
    """Pair potentials, along the device's walk.

    Args:
        potential: What to evaluate [energy].
        table: Neighbours; pairs outside it are not seen.
        dtype: Precision of the kernel.
        rest: Energies of the atoms at rest (n_atoms,) [energy], which are taken off; nothing, if there are none.
    """
    walk = walks.walk(table, dtype)

    def push(pair: Pair) -> tuple[Parts, Parts]:
        energy, slope = with_slope(potential.pair, pair.r2)
        return (energy,), tuple(-2 * slope * component for component in pair.d)

    def pairs(u: Array) -> tuple[Array, Array]:
        (energy,), gradient = walk.once(Pass(push, 1, 3), walk.rows(u), rest=rest)
        return energy, walk.vectors(gradient)

    return pairs


def _triplet_kernel(
    potential: Potential, weight: RadialFn, table: NeighbourTable, dtype: Any, rest: np.ndarray | None
) -> Kernel:
    """Pairs and bond moments, along the device's walk."""
    walk = walks.walk(table, dtype)
    cosine = np.asarray(potential.cosine, dtype)

    def gather(pair: Pair) -> tuple[Parts, Parts]:
        energy, slope = with_slope(potential.pair, pair.r2)
        bond = moments.of_bond(weight(pair.r2), pair.d, jnp.sqrt(pair.r2) / pair.r2)
        return (energy,), (*bond, *(-2 * slope * component for component in pair.d))

    def finish(sums: Parts) -> tuple[Array, Parts, Parts]:
        energy, by = moments.energy_of(sums[:9], cosine)
        return energy, by, sums[9:]

    def push(pair: Pair) -> tuple[Parts, Parts]:
        return (), moments.gradient_on_start(
            pair.here, pair.there, pair.d, jnp.sqrt(pair.r2) / pair.r2, with_slope(weight, pair.r2)
        )

    def pairs_and_triplets(u: Array) -> tuple[Array, Array]:
        sums = walk.twice(Pass(gather, 1, 12), finish, Pass(push, 0, 3), walk.rows(u), rest=rest)
        (energy,), gradient = sums
        return energy, walk.vectors(gradient)

    return pairs_and_triplets


EnergyAndGradient = Callable[[Float[Array, "n 3"]], tuple[Float[Array, ""], Float[Array, "n 3"]]]


def energy_and_gradient(
    potential: Potential, table: NeighbourTable, dtype: str = "float64", at_rest: np.ndarray | None = None
) -> EnergyAndGradient:
    """U(u) - U(0) and its gradient of one set of displacements; vmap reaches the batched kernel.

    Args:
        potential: What to evaluate [energy].
        table: Neighbours; pairs outside it are not seen.
        dtype: Precision of the kernel. Atomic energies are relative to the lattice's and summed in
            the widest precision that JAX has switched on.
        at_rest: Energies of the atoms in the perfect lattice (n_atoms,) [energy], if they are known already.

    Returns:
        A function of displacements (n_atoms, 3) [length] that returns an energy [energy] and a
        gradient (n_atoms, 3) [energy/length].
    """
    rest = atomic_energies_at_rest(potential, table) if at_rest is None else at_rest

    def batched(u: Float[Array, "n 3 batch"]) -> tuple[Array, Array]:
        # Inside double_precision energies are summed in float64, outside it in what JAX allows.
        total, gradient = _kernel(potential, table, dtype, rest)(u.astype(dtype))
        return total, gradient.astype(u.dtype)

    @jax.custom_batching.custom_vmap
    def one(u):
        energy, gradient = batched(u[:, :, None])
        return energy[0], gradient[:, :, 0]

    @one.def_vmap
    def _(_axis_size, _in_batched, u):
        energy, gradient = batched(jnp.moveaxis(u, 0, -1))
        return (energy, jnp.moveaxis(gradient, -1, 0)), (True, True)

    return one


def bind(
    potential: Potential, table: NeighbourTable, dtype: str = "float64", at_rest: np.ndarray | None = None
) -> Callable[[Array], Array]:
    """Energy of one set of displacements relative to the lattice; differentiable once.

    See `energy_and_gradient` for the arguments.
    """
    evaluate = energy_and_gradient(potential, table, dtype, at_rest)

    @jax.custom_vjp
    def energy(u):
        return evaluate(u)[0]

    def forward(u):
        return evaluate(u)

    def backward(gradient, cotangent):
        return ((cotangent * gradient).astype(gradient.dtype),)

    energy.defvjp(forward, backward)
    return energy


# For code that runs once: it is compiled without optimisation, which takes half the time, and by XLA's older code
# generator, where there is one, which takes half of the rest.
RUN_ONCE: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def run_once(function: Callable[..., Any], *arguments: Any, options: dict[str, Any] | None = None) -> Any:
    """What a function of arrays returns, as NumPy arrays; also while something else is being traced.

    Args:
        function: Anything that JAX can trace.
        *arguments: Its arguments, NumPy arrays.
        options: For the compiler, such as `RUN_ONCE`; it need not know all of them.
    """
    compiled = _compiled(jax.jit(function).lower(*arguments), options or {})
    return jax.tree.map(np.asarray, compiled(*arguments))


def _compiled(lowered: Any, options: dict[str, Any]) -> Any:
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:  # versions of XLA know different ones
        known = {name: value for name, value in options.items() if f"'{name}'" not in str(error)}
        if len(known) == len(options) or "No such compile option" not in str(error):
            raise
        return _compiled(lowered, known)


def atomic_energies(potential: Potential, table: NeighbourTable, dtype: str = "float64") -> Callable[[Array], Array]:
    """A function of displacements (n_atoms, 3, batch) that returns the energies of atoms (n_atoms, batch) [energy].

    An atom has half the energy of its pairs, and that of its own bond moments.

    Args:
        potential: What to evaluate [energy].
        table: Neighbours; pairs outside it are not seen.
        dtype: Precision of the kernel.
    """
    walk = walks.walk(table, dtype)
    weight, cosine = potential.weight, np.asarray(potential.cosine, dtype)

    def visit(pair: Pair) -> tuple[Parts, Parts]:
        half = 0.5 * with_slope(potential.pair, pair.r2)[0]  # to the kernel's rounding
        if weight is None:
            return (), (half,)
        return (), (half, *moments.of_bond(weight(pair.r2), pair.d, jnp.sqrt(pair.r2) / pair.r2))

    def energies(u: Array) -> Array:
        half, *sums = walk.once(Pass(visit, 0, 1 if weight is None else 10), walk.rows(u)).shares
        return walk.atoms(half + moments.energy_of(sums, cosine)[0] if sums else half)

    return energies


@in_double_precision
def atomic_energies_at_rest(
    potential: Potential, table: NeighbourTable, options: dict[str, Any] | None = None
) -> Float[np.ndarray, " n_atoms"]:
    """Energies of the atoms of the perfect lattice [energy], see `atomic_energies`.

    They are the same for every table that holds all pairs within the cutoff.

    Args:
        potential: What to evaluate [energy].
        table: Neighbours; pairs outside it are not seen.
        options: For the compiler. Without any they are compiled as kernels are, to the same rounding: a lattice has
            exactly no energy relative to itself.
    """
    rest = np.zeros((table.partner.shape[1], 3, 1))
    return run_once(atomic_energies(potential, table), rest, options=options)[:, 0]


def lattice_energy(potential: Potential, table: NeighbourTable) -> float:
    """Energy of the perfect lattice [energy], in float64."""
    return float(atomic_energies_at_rest(potential, table).sum())
