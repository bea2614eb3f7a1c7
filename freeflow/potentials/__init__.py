"""Potentials: factories of energies, and the kernels that evaluate them on a crystal."""

from freeflow.potentials.core import (
    Potential,
    atomic_energies_at_rest,
    bind,
    energy_and_gradient,
    force_constants,
    lattice_energy,
)
from freeflow.potentials.pair import lennard_jones, wca
from freeflow.potentials.three_body import stillinger_weber

__all__ = [
    "Potential",
    "atomic_energies_at_rest",
    "bind",
    "energy_and_gradient",
    "force_constants",
    "lattice_energy",
    "lennard_jones",
    "stillinger_weber",
    "wca",
]
