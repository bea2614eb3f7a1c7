"""Normal numbers: JAX's own, bit for bit."""

import jax
import numpy as np
import pytest

from freeflow.random_numbers import standard_normal


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5, 3), (2, 3, 7), (3000, 3)])
@pytest.mark.parametrize("n_keys", [0, 1, 4, 7])
def test_they_are_those_of_jax(n_keys, shape, dtype):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(2**32 - 5), 7), 7)[:n_keys]
    found = jax.jit(jax.vmap(lambda key: standard_normal(key, shape, dtype)))(keys)
    np.testing.assert_array_equal(found, jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys))
    assert found.dtype == dtype


def test_keys_by_twos_and_threes():
    keys = jax.random.split(jax.random.key(5), (2, 3))
    found = jax.vmap(jax.vmap(lambda key: standard_normal(key, (5, 3), "float32")))(keys)
    np.testing.assert_array_equal(found[1, 2], jax.random.normal(keys[1, 2], (5, 3), "float32"))


def test_long_arrays_have_no_repeats_and_are_those_of_jax():
    key = jax.random.key(3)
    found = np.asarray(jax.jit(lambda: standard_normal(key, (70_000,), "float64"))())
    np.testing.assert_array_equal(found, jax.random.normal(key, (70_000,), "float64"))
    assert len(np.unique(found)) == 70_000


def test_keys_of_another_generator_are_left_to_jax():
    key = jax.random.key(3, impl="rbg")
    np.testing.assert_array_equal(standard_normal(key, (5,), "float32"), jax.random.normal(key, (5,), "float32"))
