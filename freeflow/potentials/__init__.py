"""Potentials: factories of energies, and the kernels that evaluate them on a crystal."""

from freeflow.potentials.binding import CrystalEnergy, RelativeEnergy, many_body, map_pairs, on_crystal
from freeflow.potentials.core import (
    Potential,
    atomic_energies_at_rest,
    bind,
    energy_and_gradient,
    lattice_energy,
)
from freeflow.potentials.curvature import force_constants
from freeflow.potentials.deformed import deformed_energy
from freeflow.potentials.external import (
    External,
    ase_potential,
    python_potential,
    require_sound,
    require_sound_strained,
)
from freeflow.potentials.pair import lennard_jones, wca
from freeflow.potentials.species import SpeciesPairs, born_mayer
from freeflow.potentials.three_body import stillinger_weber

__all__ = [
    "CrystalEnergy",
    "External",
    "Potential",
    "RelativeEnergy",
    "SpeciesPairs",
    "ase_potential",
    "atomic_energies_at_rest",
    "bind",
    "born_mayer",
    "deformed_energy",
    "energy_and_gradient",
    "force_constants",
    "lattice_energy",
    "lennard_jones",
    "many_body",
    "map_pairs",
    "on_crystal",
    "python_potential",
    "require_sound",
    "require_sound_strained",
    "stillinger_weber",
    "wca",
]
