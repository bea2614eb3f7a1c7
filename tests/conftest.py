"""What every test shares: shapes checked, float64, rank promotion an error, programs that compile quickly, a cache."""

import os

# XLA reports processor features that are none at every load of cached code.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jaxtyping
import pytest
from jax._src import compiler  # nothing public sets an option for every program

# What the fast tests ask of XLA. Compiling took most of their time, and the programs do not run for long: these are
# ready in half the time, and as fast to a tenth or so. The second is what XLA does unless told, as users have it.
QUICK_CODE, USERS_CODE = {"xla_backend_optimization_level": 1}, {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 12):  # later ones have no such option, and XLA ends the process for it
    QUICK_CODE["xla_cpu_use_fusion_emitters"], USERS_CODE["xla_cpu_use_fusion_emitters"] = False, True

# And instead of freeflow's own flags: loops that write several arrays are beyond what those programs are made with.
QUICK_FLAGS = {
    **QUICK_CODE,
    "xla_backend_extra_options": "xla_cpu_small_while_loop_byte_threshold=0",
    "xla_cpu_prefer_vector_width": 256,
}

# Before anything imports freeflow: from here on every call checks its shapes and types.
jaxtyping.install_import_hook("freeflow", "beartype.beartype")


def pytest_configure(config):
    """Keep compiled kernels with this checkout's test cache, never in the user's own; ask for quick code.

    Slow tests run for long and get the code that users have, as do all in `pytest -m "slow or not slow"`.
    """
    if config.option.markexpr == "not slow":
        # Before JAX's first device, for this process and for those that tests start. What is set already wins.
        flags = os.environ.get("XLA_FLAGS", "")
        added = [f"--{name}={str(value).lower()}" for name, value in QUICK_FLAGS.items() if name not in flags]
        os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *added])
    folder = str(config.rootpath / ".pytest_cache" / "jax")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for command lines that tests start
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


compile_options = compiler.get_compile_options


def users_options(*arguments, env_options_overrides=None, **rest):
    """What JAX asks of XLA for one program, as if there were no `QUICK_CODE`."""
    return compile_options(*arguments, env_options_overrides=USERS_CODE | (env_options_overrides or {}), **rest)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Switch between kinds of code, before fixtures of any scope.

    Tests marked `code("users")` compile as users do: what the compiled numbers are is their subject. Programs of those
    marked `code("brief")` run for milliseconds and are hardly optimised at all, which saves half of the rest.
    """
    mark = item.get_closest_marker("code")
    kind = "quick" if mark is None else mark.args[0]
    if kind == "users" and compiler.get_compile_options is compile_options:
        jax.clear_caches()  # of what earlier tests compiled
    compiler.get_compile_options = users_options if kind == "users" else compile_options
    jax.config.update("jax_disable_most_optimizations", kind == "brief")


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
