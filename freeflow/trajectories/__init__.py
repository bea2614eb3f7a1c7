"""Trajectories of other programs as samples of a crystal.

`files` streams frames, `alignment` turns them into displacements from the sites, `recomputed`
gives their energies in the system's own potential, and `series` does all of it in one pass. `equilibrium` says
which frames are samples of the target.
"""

from freeflow.trajectories.alignment import Aligned, to_displacements
from freeflow.trajectories.equilibrium import Equilibrium, equilibrium
from freeflow.trajectories.files import Box, Frames, read, topology
from freeflow.trajectories.recomputed import EnergyComparison, compare_energies, energies, energy_precision, rows_of
from freeflow.trajectories.series import FrameSeries, frame_series
from freeflow.trajectories.writing import require_writable, write

__all__ = [
    "Aligned",
    "Box",
    "EnergyComparison",
    "Equilibrium",
    "FrameSeries",
    "Frames",
    "compare_energies",
    "energies",
    "energy_precision",
    "equilibrium",
    "frame_series",
    "read",
    "require_writable",
    "rows_of",
    "to_displacements",
    "topology",
    "write",
]
