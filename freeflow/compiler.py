"""What XLA is asked for on CPU: flags that must be set before JAX starts, so whoever owns the process sets them."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Loops that write several arrays at once: the ten bond moments of a three-body potential share their reads and
# exponentials. Versions of XLA that do so by themselves ignore the option.
# Vectors as wide as the processor's, not half of that; on others the compiler takes what there is.
CPU_FLAGS = (
    "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true",
    "--xla_cpu_prefer_vector_width=512",
)


def prefer_fast_code(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add `CPU_FLAGS` to XLA_FLAGS; flags that are there already win.

    XLA reads the variable once, when JAX's first device is asked for. Later changes do nothing.
    """
    flags = environment.get("XLA_FLAGS", "").split()
    there = {flag.partition("=")[0] for flag in flags}
    added = [flag for flag in CPU_FLAGS if flag.partition("=")[0] not in there]
    environment["XLA_FLAGS"] = " ".join([*flags, *added])
