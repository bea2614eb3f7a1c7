"""Normal numbers: JAX's own, bit for bit."""

import jax
import numpy as np
import pytest

from freeflow import random_numbers
from freeflow.random_numbers import standard_normal


@pytest.fixture(params=["as it is", "written out"])
def way(request, monkeypatch):
    """What this version of JAX gets, and what later ones get."""
    if request.param == "written out":
        monkeypatch.setattr(random_numbers, "_FROM", (0, 0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (2, 3, 7)])
@pytest.mark.usefixtures("way")
def test_they_are_those_of_jax(shape, dtype):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(2**32 - 5), 7), 4)
    found = jax.jit(jax.vmap(lambda key: standard_normal(key, shape, dtype)))(keys)
    np.testing.assert_array_equal(found, jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys))
    assert found.dtype == dtype


@pytest.mark.usefixtures("way")
def test_long_arrays_have_no_repeats_and_are_those_of_jax():
    key = jax.random.key(3)
    found = np.asarray(jax.jit(lambda: standard_normal(key, (70_000,), "float64"))())
    np.testing.assert_array_equal(found, jax.random.normal(key, (70_000,), "float64"))
    assert len(np.unique(found)) == 70_000


@pytest.mark.usefixtures("way")
def test_keys_of_another_generator_are_left_to_jax():
    key = jax.random.key(3, impl="rbg")
    np.testing.assert_array_equal(standard_normal(key, (5,), "float32"), jax.random.normal(key, (5,), "float32"))
