"""Any potential on a crystal: what the jobs ask of it, whatever kind it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float

from freeflow.geometry import NeighbourTable, nearest_image_table, neighbour_table
from freeflow.potentials.core import Potential, atomic_energies_at_rest, bind
from freeflow.potentials.curvature import force_constants
from freeflow.potentials.deformed import DeformedEnergy, deformed_energy
from freeflow.potentials.external import (
    External,
    deformed_external,
    force_constants_of,
    lattice_energy_of,
    relative_energy,
)
from freeflow.potentials.species import Pair, SpeciesPairs
from freeflow.types import Crystal, Numeric

RelativeEnergy = Callable[[Array], Array]  # displacements (n_atoms, 3) -> U(u) - U(0) [energy]


@dataclass(frozen=True)
class CrystalEnergy:
    """A potential on one crystal."""

    # (reach, dtype) -> energy relative to the lattice, differentiable once. It misses no pair whose distance changes
    # by up to `reach` [length].
    relative: Callable[[float, str], RelativeEnergy]
    # (stretch, reach, dtype) -> the same of displacements and a deformation of the cell. It misses no pair of sites up
    # to stretch times the cutoff plus reach [length].
    deformed: Callable[[float, float, str], DeformedEnergy]
    lattice_energy: Callable[[], float]  # of the perfect lattice [energy]
    # Hessian columns at the lattice (n_atoms, 3, 3 n) for n given atoms [energy/length**2], and what they cost in
    # evaluations of energy and forces.
    force_constants: Callable[[Any], Float[Numeric, "n_atoms 3 n_columns"]]
    evaluations_per_column: int = 2
    require: Callable[[], None] = lambda: None  # raises what went wrong outside JAX, which lets nothing out
    on_host: bool = False  # evaluated by processes of their own


def on_crystal(potential: Any, crystal: Crystal, nearest_image_only: bool = False) -> CrystalEnergy:
    """What the jobs ask of a potential on a crystal.

    Args:
        potential: A `Potential`, `SpeciesPairs` or `External`.
        crystal: Whose sites displacements start from.
        nearest_image_only: Evaluate every pair once, at its nearest image (the papers' small boxes).

    Raises:
        InputError: If the potential is not for these species.
    """
    if isinstance(potential, External):
        return _from_external(potential, crystal)
    if isinstance(potential, SpeciesPairs):
        terms = potential.of(crystal.species)
        return _sum([_from_tables(term, crystal, nearest_image_only, pair) for pair, term in terms.items()])
    return _from_tables(potential, crystal, nearest_image_only)


def _from_tables(
    potential: Potential, crystal: Crystal, nearest_image_only: bool, between: Pair | None = None
) -> CrystalEnergy:
    def table(reach: float) -> NeighbourTable:
        if nearest_image_only:
            return nearest_image_table(crystal, between)
        return neighbour_table(crystal, potential.cutoff + reach, between)

    margin = 1e-4 * potential.cutoff  # so that rounding loses no pair at the cutoff

    @functools.cache
    def at_rest() -> np.ndarray:
        return atomic_energies_at_rest(potential, table(margin))

    return CrystalEnergy(
        relative=lambda reach, dtype: bind(potential, table(reach), dtype, at_rest()),
        deformed=lambda stretch, reach, dtype: deformed_energy(
            potential, table((stretch - 1) * potential.cutoff + reach), dtype
        ),
        lattice_energy=lambda: float(at_rest().sum()),
        force_constants=lambda atoms: force_constants(potential, table(margin), atoms),
    )


def _from_external(potential: External, crystal: Crystal) -> CrystalEnergy:
    evaluator = potential.on(crystal)
    return CrystalEnergy(
        relative=lambda reach, dtype: relative_energy(potential, crystal),
        deformed=lambda stretch, reach, dtype: deformed_external(potential, crystal),
        lattice_energy=lambda: lattice_energy_of(potential, crystal),
        force_constants=lambda atoms: force_constants_of(potential, crystal, atoms),
        require=evaluator.require,
        on_host=potential.on_host,
    )


def _sum(terms: list[CrystalEnergy]) -> CrystalEnergy:
    def relative(reach: float, dtype: str) -> RelativeEnergy:
        energies = [term.relative(reach, dtype) for term in terms]
        return lambda u: sum((energy(u) for energy in energies[1:]), energies[0](u))

    def deformed(stretch: float, reach: float, dtype: str) -> DeformedEnergy:
        energies = [term.deformed(stretch, reach, dtype) for term in terms]
        return lambda u, f: sum((energy(u, f) for energy in energies[1:]), energies[0](u, f))

    return CrystalEnergy(
        relative=relative,
        deformed=deformed,
        lattice_energy=lambda: math.fsum(term.lattice_energy() for term in terms),
        force_constants=lambda atoms: np.sum([term.force_constants(atoms) for term in terms], axis=0),
    )


def many_body(potential: Any) -> bool:
    """Whether an atom's energy depends on more than the distances to its neighbours, one by one."""
    if isinstance(potential, External):
        return True  # for all that is known
    return not isinstance(potential, SpeciesPairs) and potential.weight is not None


def map_pairs(change: Callable[[Potential], Potential], potential: Any) -> Any:
    """The potential with every function of pairs changed."""
    if isinstance(potential, SpeciesPairs):
        return SpeciesPairs(potential.name, {pair: change(term) for pair, term in potential.terms.items()})
    return potential if isinstance(potential, External) else change(potential)
