"""Flags for XLA: added where missing, effective where they stand before JAX starts."""

import os
import re
import subprocess
import sys
import textwrap

import pytest

from freeflow.compiler import CPU_FLAGS, prefer_fast_code


def test_flags_are_added_once():
    environment = {}
    prefer_fast_code(environment)
    assert environment["XLA_FLAGS"].split() == list(CPU_FLAGS)
    prefer_fast_code(environment)
    assert environment["XLA_FLAGS"].split() == list(CPU_FLAGS)


def test_flags_of_the_user_win():
    mine = "--xla_cpu_prefer_vector_width=256 --xla_force_host_platform_device_count=2"
    environment = {"XLA_FLAGS": mine}
    prefer_fast_code(environment)
    assert environment["XLA_FLAGS"] == f"{mine} {CPU_FLAGS[0]}"


def test_importing_freeflow_is_enough_and_loads_no_jax():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    code = "import sys, os, freeflow; print(os.environ['XLA_FLAGS'], 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [*CPU_FLAGS, "False"]


PROGRAMS = textwrap.dedent("""
    import freeflow
    import jax
    import jax.numpy as jnp
    from freeflow.geometry import neighbour_table
    from freeflow.potentials import energy_and_gradient
    from freeflow.random_numbers import standard_normal
    for name, radius in (("lj_fcc_256", 1.5), ("mw_cubic_512", 4.5)):
        system = freeflow.load(name)
        evaluate = jax.vmap(energy_and_gradient(system.potential, neighbour_table(system.crystal, radius), "float32"))
        with freeflow.double_precision():  # as estimates have it
            lowered = jax.jit(evaluate).lower(jnp.zeros((128, system.n_atoms, 3), "float32"))
        print(lowered.compile().as_text())
        print("====")
    keys = jax.random.split(jax.random.key(0), 16)
    numbers = jax.vmap(lambda key: standard_normal(key, (512, 3), "float32"))
    print(jax.jit(numbers).lower(keys).compile().as_text())
""")


@pytest.fixture(scope="module")
def programs():
    """What XLA makes with the flags that users have: of two kernels with several tiles, and of random numbers."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", PROGRAMS], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.split("====")


KERNELS = pytest.mark.parametrize("kernel", [0, 1], ids=["pairs", "triplets"])


@KERNELS
def test_loops_of_kernels_are_compiled_as_others_are(programs, kernel):
    """XLA marks those that it would compile in its way for loops over few bytes, without vectors."""
    assert "while(" in programs[kernel]
    assert "small_call" not in programs[kernel]


@KERNELS
def test_sums_of_kernels_are_not_copied(programs, kernel):
    """Sums of all tiles at once: as results of `jax.lax.map` they began as copies of zeros."""
    of_tiles = r"f32\[(?!1,)\d+,(?!3,)\d+,128\]"
    assert re.search(rf"{of_tiles}\S* fusion\(", programs[kernel])
    assert not re.search(rf"= {of_tiles}\S* copy\(", programs[kernel])


def test_random_bits_are_made_in_a_loop_of_their_own(programs):
    """Together with the logarithm that makes normal numbers of them, it would go without vectors."""
    loops = programs[2].split("\n\n")
    assert sum("xor(" in loop for loop in loops) == 1
    assert sum("log-plus-one(" in loop for loop in loops) == 1
    assert not any("xor(" in loop and "log-plus-one(" in loop for loop in loops)


KERNEL = textwrap.dedent("""
    import sys
    import os
    import freeflow
    if sys.argv[1] == "plain":
        del os.environ["XLA_FLAGS"]  # JAX has not started
    import jax
    import numpy as np
    from freeflow.geometry import neighbour_table
    from freeflow.potentials import energy_and_gradient
    system = freeflow.load("mw_cubic_64")
    table = neighbour_table(system.crystal, 1.15 * system.potential.cutoff)
    u = 0.05 * np.random.default_rng(0).standard_normal((16, 64, 3))
    with freeflow.double_precision():
        energy, gradient = jax.jit(jax.vmap(energy_and_gradient(system.potential, table)))(u)
    np.savez(sys.argv[2], energy=energy, gradient=gradient)
""")


@pytest.mark.slow
def test_flags_change_no_result(tmp_path):
    """The process must be a new one: flags count before JAX's first device only."""
    import numpy as np

    found = []
    for mode in ("plain", "fast"):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        out = tmp_path / f"{mode}.npz"
        subprocess.run([sys.executable, "-c", KERNEL, mode, str(out)], env=environment, check=True)
        found.append(np.load(out))
    np.testing.assert_allclose(found[1]["energy"], found[0]["energy"], rtol=1e-12)
    np.testing.assert_allclose(found[1]["gradient"], found[0]["gradient"], atol=1e-11)
