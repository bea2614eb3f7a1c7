"""FEP, BAR, MBAR and how far to trust them; float64 throughout.

`two_state` turns work into free energies, `multistate` reduced potentials; `timeseries` counts
independent samples; `diagnostics` says whether the answer and its error bar can be believed.
"""

from freeflow.estimators.diagnostics import (
    Diagnostics,
    bootstrap,
    diagnose,
    drift,
    effective_sample_size,
    hill_k,
    hysteresis,
    largest_weight_share,
    overlap,
    pareto_k,
    reliability,
)
from freeflow.estimators.multistate import MBAREstimate, mbar
from freeflow.estimators.timeseries import (
    Equilibration,
    chain_correlation,
    equilibrated,
    statistical_inefficiency,
)
from freeflow.estimators.two_state import ESTIMATORS, Estimator, bar, fep, record, require_float64

__all__ = [
    "ESTIMATORS",
    "Diagnostics",
    "Equilibration",
    "Estimator",
    "MBAREstimate",
    "bar",
    "bootstrap",
    "chain_correlation",
    "diagnose",
    "drift",
    "effective_sample_size",
    "equilibrated",
    "fep",
    "hill_k",
    "hysteresis",
    "largest_weight_share",
    "mbar",
    "overlap",
    "pareto_k",
    "record",
    "reliability",
    "require_float64",
    "statistical_inefficiency",
]
