"""Standard normal numbers: those of `jax.random.normal` bit for bit, sooner.

A stage of a bridge draws one for each coordinate. On CPU JAX has the rounds of its generator in a loop over arrays of
all numbers, which go to memory and back ten times; with JAX 0.12 they take longer than a Stillinger-Weber kernel.
Written out, all rounds are one loop over the numbers, in registers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as prng
from jaxtyping import Array

from freeflow.types import Key

# Threefry-2x32 with twenty rounds: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), table 2
# and section 3.3.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
# About how many numbers a turn of the loop makes: many enough for a turn to be worth it.
_PIECE = 2**14


def standard_normal(key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
    """What `jax.random.normal` returns, in float32 or float64.

    Keys of generators other than JAX's usual one are left to JAX, as are GPUs and arrays of 2^32 numbers or more.
    """
    threefry = jax.random.key_data(key).shape[-1:] == (2,)
    usual = threefry and jax.config.values["jax_threefry_partitionable"]
    if jax.default_backend() != "cpu" or math.prod(shape) >= 2**32 or not usual:
        return jax.random.normal(key, shape, dtype)
    return jax.random.normal(jax.random.wrap_key_data(jax.random.key_data(key), impl=_WRITTEN_OUT), shape, dtype)


def _threefry(key: tuple[Array, Array], counts: tuple[Array, Array]) -> tuple[Array, Array]:
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = counts[0] + keys[0], counts[1] + keys[1]
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(r)) | (y >> np.uint32(32 - r)))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def _bits(key: Array, width: int, shape: tuple[int, ...]) -> Array:
    """Random bits of fewer than 2^32 numbers, each 32 or 64 bits wide, as JAX's generator gives them.

    They are made piece by piece, in two pieces at least: XLA would put what makes normal numbers of them into the same
    loop over the numbers, were there not one around it, and it would go without vectors. A loop of one turn is none.
    """
    size = math.prod(shape)

    def some(key: Array, first: Any, count: int) -> Array:
        counts = first + jax.lax.iota(np.uint32, count)
        x, y = _threefry((key[0], key[1]), (jnp.zeros_like(counts), counts))
        return x ^ y if width == 32 else (x.astype("uint64") << np.uint64(32)) | y.astype("uint64")

    def all_of(key: Array) -> Array:
        count = -(-size // max(2, size // _PIECE))
        starts = np.arange(0, max(size, 1), max(count, 1), dtype=np.uint32)
        return jax.lax.map(lambda first: some(key, first, count), starts).reshape(-1)[:size]

    @jax.custom_batching.custom_vmap
    def one(key):
        return all_of(key)

    @one.def_vmap
    def _(n_keys, _in_batched, keys):
        if n_keys < 2:
            return jax.vmap(all_of)(keys), True
        # A turn makes the numbers of one key or of several, so that they stand where they belong.
        least = min(n_keys, max(2, n_keys * size // _PIECE))
        pieces = next(count for count in range(least, n_keys + 1) if n_keys % count == 0)
        rows = jax.lax.map(jax.vmap(lambda key: some(key, np.uint32(0), size)), keys.reshape(pieces, -1, 2))
        return rows.reshape(n_keys, size), True

    return one(key).reshape(shape)


_WRITTEN_OUT = prng.define_prng_impl(
    key_shape=prng.threefry_prng_impl.key_shape,
    seed=prng.threefry_prng_impl.seed,
    split=prng.threefry_prng_impl.split,
    fold_in=prng.threefry_prng_impl.fold_in,
    random_bits=_bits,
    name="threefry2x32_written_out",
    tag="threefry_written_out",
)
