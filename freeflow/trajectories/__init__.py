"""Trajectories of other programs as samples of a crystal.

`files` streams frames, `alignment` turns them into displacements from the sites, and `recomputed`
gives their energies in the system's own potential.
"""

from freeflow.trajectories.alignment import Aligned, to_displacements
from freeflow.trajectories.files import Frames, read, topology
from freeflow.trajectories.recomputed import EnergyComparison, compare_energies, energies, energy_precision

__all__ = [
    "Aligned",
    "EnergyComparison",
    "Frames",
    "compare_energies",
    "energies",
    "energy_precision",
    "read",
    "to_displacements",
    "topology",
]
