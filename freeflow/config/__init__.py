"""system.yaml: strict, units on the way in.

A file is read once and checked once. Every problem is one line that names the file, the line, the
key and, where there is one, the nearest valid word. Importing this package does not start JAX.
`schema` says what a file may say (with `potentials`, `estimates`, `solutions` and `values`), `problems` what is wrong
with one, `files` makes systems of them.
"""

from freeflow.config.estimates import AtomicSolidsSection, EstimateSection, ResidualSection
from freeflow.config.files import (
    ShippedSystem,
    crystal_only,
    dump,
    load,
    load_crystal,
    read,
    revise,
    revise_difference,
    series_of,
    shipped,
    with_absolute_paths,
)
from freeflow.config.potentials import STILLINGER_WEBER_PRESETS
from freeflow.config.schema import SystemSection
from freeflow.config.values import temperature_range
from freeflow.config.words import nearest, printable, suggest

__all__ = [
    "STILLINGER_WEBER_PRESETS",
    "AtomicSolidsSection",
    "EstimateSection",
    "ResidualSection",
    "ShippedSystem",
    "SystemSection",
    "crystal_only",
    "dump",
    "load",
    "load_crystal",
    "nearest",
    "printable",
    "read",
    "revise",
    "revise_difference",
    "series_of",
    "shipped",
    "suggest",
    "temperature_range",
    "with_absolute_paths",
]
