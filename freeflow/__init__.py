"""Free energies of crystals, with error bars, in JAX.

Importing this package loads no other: names are looked up on first use, so JAX starts when it is
needed, and JAX's process-wide flags are left as they are. See `double_precision`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freeflow.comparison import Comparison, compare
    from freeflow.config import load
    from freeflow.pipeline import estimate
    from freeflow.result import Result
    from freeflow.sampling import Sampling, sample
    from freeflow.types import Crystal, Plan, System, double_precision

    __version__: str

__all__ = [
    "Comparison",
    "Crystal",
    "Plan",
    "Result",
    "Sampling",
    "System",
    "__version__",
    "compare",
    "double_precision",
    "estimate",
    "load",
    "sample",
]

_HOMES = {
    "Comparison": "freeflow.comparison",
    "Crystal": "freeflow.types",
    "Plan": "freeflow.types",
    "Result": "freeflow.result",
    "Sampling": "freeflow.sampling",
    "System": "freeflow.types",
    "compare": "freeflow.comparison",
    "double_precision": "freeflow.types",
    "estimate": "freeflow.pipeline",
    "load": "freeflow.config",
    "sample": "freeflow.sampling",
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
