"""What JAX and XLA are asked for: flags that must be set before JAX starts, and devices that must be there."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from freeflow.errors import InputError

# Loops that write several arrays at once: the bond moments of a three-body potential share their reads and
# exponentials. Loops over few bytes compiled as all others are: XLA's own way with them, with JAX 0.12, knows no
# vectors, and kernels take ten times as long.
# Vectors as wide as the processor's, not half of that; on others the compiler takes what there is.
CPU_FLAGS = (
    "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true,xla_cpu_small_while_loop_byte_threshold=0",
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


def require_devices() -> None:
    """Find out at once whether the devices that JAX_PLATFORMS asks for are here; start JAX.

    Raises:
        InputError: If they are not.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # the latter for CUDA where JAX was installed without it
        asked = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME", "")
        if not asked:
            raise
        raise InputError(
            f"JAX_PLATFORMS={asked}: there is no such device, or JAX was installed without it "
            "(pip install 'freeflow[cuda]' for NVIDIA GPUs); unset it to take what there is"
        ) from None
