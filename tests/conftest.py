"""What every test shares: shapes checked, float64, rank promotion an error, a compile cache."""

import os

# XLA reports processor features that are none at every load of cached code.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jaxtyping
import pytest

# Before anything imports freeflow: from here on every call checks its shapes and types.
jaxtyping.install_import_hook("freeflow", "beartype.beartype")


def pytest_configure(config):
    """Keep compiled kernels with this checkout's test cache, never in the user's own."""
    folder = str(config.rootpath / ".pytest_cache" / "jax")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for command lines that tests start
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True, scope="session")
def strict_jax():
    """Tests run in float64, and rank promotion is an error.

    It lasts the whole session, so that fixtures of any scope see it.
    """
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def jax_defaults(request):
    """Tests marked `jax_defaults` see JAX's flags as users have them."""
    if request.node.get_closest_marker("jax_defaults") is None:
        yield
        return
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
