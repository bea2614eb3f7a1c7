"""Free energies of crystals and solutions, with error bars, in JAX.

Importing this package loads no other: names are looked up on first use, so JAX starts when it is
needed. JAX's process-wide settings are left as they are, see `double_precision`; what XLA is asked for is added to
XLA_FLAGS, which counts if JAX has not started yet, see `freeflow.compiler`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from freeflow.compiler import prefer_fast_code

if TYPE_CHECKING:
    from freeflow.comparison import Comparison, compare
    from freeflow.config import load
    from freeflow.difference import DifferenceResult
    from freeflow.phases import PhaseComparison, compare_phases
    from freeflow.pipeline import estimate
    from freeflow.result import Result
    from freeflow.sampling import Sampling, sample
    from freeflow.series import estimate_series
    from freeflow.solutions import Solution
    from freeflow.solvation import estimate_difference
    from freeflow.thermodynamics import SeriesResult
    from freeflow.training_run import TrainingResult, train
    from freeflow.types import Crystal, Plan, StateSeries, System, double_precision

    __version__: str

prefer_fast_code()

__all__ = [
    "Comparison",
    "Crystal",
    "DifferenceResult",
    "PhaseComparison",
    "Plan",
    "Result",
    "Sampling",
    "SeriesResult",
    "Solution",
    "StateSeries",
    "System",
    "TrainingResult",
    "__version__",
    "compare",
    "compare_phases",
    "double_precision",
    "estimate",
    "estimate_difference",
    "estimate_series",
    "load",
    "sample",
    "train",
]

_HOMES = {
    "Comparison": "freeflow.comparison",
    "Crystal": "freeflow.types",
    "DifferenceResult": "freeflow.difference",
    "PhaseComparison": "freeflow.phases",
    "Plan": "freeflow.types",
    "Result": "freeflow.result",
    "Sampling": "freeflow.sampling",
    "SeriesResult": "freeflow.thermodynamics",
    "Solution": "freeflow.solutions",
    "StateSeries": "freeflow.types",
    "System": "freeflow.types",
    "TrainingResult": "freeflow.training_run",
    "compare": "freeflow.comparison",
    "compare_phases": "freeflow.phases",
    "double_precision": "freeflow.types",
    "estimate": "freeflow.pipeline",
    "estimate_difference": "freeflow.solvation",
    "estimate_series": "freeflow.series",
    "load": "freeflow.config",
    "sample": "freeflow.sampling",
    "train": "freeflow.training_run",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = importlib.import_module("importlib.metadata").version(__name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
