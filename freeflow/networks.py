"""Haiku networks as (init, apply); the one place that imports Haiku, and not before a network is made.

Every network takes the arrays of one configuration and follows their dtype: parameters are made in
the inputs' dtype, and parameters cast to float64 evaluate in float64. The last layer starts at
zero, so that a map which it parameterises starts as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from freeflow.types import Network


def _network(body: Callable[..., Array]) -> Network:
    import haiku as hk

    transformed = hk.without_apply_rng(hk.transform(body))
    return Network(transformed.init, transformed.apply)


def _zero_linear(out_size: int) -> Callable[[Array], Array]:
    import haiku as hk

    return hk.Linear(out_size, w_init=jnp.zeros, name="out")


def _flat(x: Array) -> Array:
    """Features of every atom in one row: (n_atoms, ...) to (n_atoms, n_features)."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def mlp(width: int, depth: int, out_size: int) -> Network:
    """Multilayer perceptron on the last axis, zero at initialisation.

    Args:
        width: Units of each hidden layer.
        depth: Number of hidden layers; 0 gives a linear map.
        out_size: Size of the output's last axis.
    """

    def body(h: Array) -> Array:
        return _zero_linear(out_size)(_hidden(h, width, depth))

    return _network(body)


def _hidden(h: Array, width: int, depth: int) -> Array:
    import haiku as hk

    return hk.nets.MLP([width] * depth, activation=jax.nn.silu, activate_final=True, name="hidden")(h) if depth else h


def fourier_features(x: Float[Array, " *shape"], n_frequencies: int) -> Float[Array, "*shape features"]:
    """sin and cos of 2 pi k x for k = 1 ... n_frequencies, sines first; periodic in x with period 1."""
    k = jnp.asarray(np.arange(1, n_frequencies + 1), x.dtype)
    # Multiples of x lose digits in proportion to k: fold x into one period first.
    angle = (2 * math.pi) * ((x - jnp.round(x))[..., None] * k.reshape((1,) * x.ndim + (n_frequencies,)))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def transformer(n_blocks: int, width: int, n_heads: int, out_shape: Sequence[int], n_frequencies: int) -> Network:
    """Permutation-equivariant conditioner of Wirnsberger et al. 2022, zero at initialisation.

    Fourier features of each atom's coordinates, a linear embedding, `n_blocks` blocks of multi-head
    self-attention over the atoms and a two-layer perceptron (Vaswani et al. 2017, normalising
    before each), and a linear map to the output. Atoms carry no label, so that permuted atoms
    give permuted outputs.

    Args:
        n_blocks: Number of blocks.
        width: Size of the embedding, a multiple of `n_heads`.
        n_heads: Attention heads.
        out_shape: What each atom gets.
        n_frequencies: Fourier features per coordinate and phase.

    Returns:
        A network of fractional coordinates (n_atoms, ...) that returns (n_atoms, *out_shape).

    Raises:
        ValueError: If `width` is not a multiple of `n_heads`.

    References: Wirnsberger et al., Mach. Learn.: Sci. Technol. 3, 025009 (2022), section 3.2.
    """
    import haiku as hk

    if width % n_heads:
        raise ValueError(f"width must be a multiple of the {n_heads} heads, got {width}")
    # Each residual branch adds to the stream; this keeps its variance bounded at initialisation.
    branch = hk.initializers.VarianceScaling(1.0 / max(1, 2 * n_blocks))

    def normalised(h: Array, name: str) -> Array:
        return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True, name=name)(h)

    def attention(h: Array, name: str) -> Array:
        projected = hk.Linear(3 * width, w_init=hk.initializers.VarianceScaling(1.0), name=f"{name}_qkv")(h)
        query, key, value = (
            part.reshape(len(h), n_heads, width // n_heads) for part in jnp.split(projected, 3, axis=-1)
        )
        logits = jnp.einsum("ihd,jhd->hij", query, key) / math.sqrt(width // n_heads)
        mixed = jnp.einsum("hij,jhd->ihd", jax.nn.softmax(logits, axis=-1), value)
        return hk.Linear(width, w_init=branch, name=f"{name}_out")(_flat(mixed))

    def perceptron(h: Array, name: str) -> Array:
        h = hk.Linear(2 * width, w_init=hk.initializers.VarianceScaling(2.0), name=f"{name}_in")(h)
        return hk.Linear(width, w_init=branch, name=f"{name}_out")(jax.nn.gelu(h))

    def body(x: Array) -> Array:
        features = _flat(fourier_features(x, n_frequencies))
        h = hk.Linear(width, w_init=hk.initializers.VarianceScaling(1.0), name="embedding")(features)
        for block in range(n_blocks):
            h = h + attention(normalised(h, f"block{block}_norm1"), f"block{block}_attention")
            h = h + perceptron(normalised(h, f"block{block}_norm2"), f"block{block}_perceptron")
        out = _zero_linear(math.prod(out_shape))(normalised(h, "norm"))
        return out.reshape(len(x), *out_shape)

    return _network(body)


def local(
    neighbours: Int[np.ndarray, "n_centres n_neighbours"], width: int, depth: int, out_shape: Sequence[int]
) -> Network:
    """One perceptron for all atoms, on what their neighbours do; zero at initialisation.

    An atom sees its neighbours' values relative to their mean, its cage, in the order of its row
    of the table; so nothing changes when everything is shifted by a constant. Columns of the table
    should mean the same direction for every atom. Parameters do not depend on the number of atoms,
    and the cost grows in proportion to it.

    Args:
        neighbours: Indices into the first axis of the input, a row for every atom that is a centre.
        width: Units of each hidden layer.
        depth: Number of hidden layers.
        out_shape: What each centre gets.

    Returns:
        A network of `x` (n_atoms, ...) and any number of further features (n_centres, ...), which
        enter as they are; it returns (n_centres, *out_shape).
    """
    table = np.asarray(neighbours)

    def body(x: Array, *own: Array) -> Array:
        around = x[table]
        around = around - jnp.mean(around, axis=1, keepdims=True)
        h = jnp.concatenate([_flat(around), *(_flat(feature) for feature in own)], axis=-1)
        out = _zero_linear(math.prod(out_shape))(_hidden(h, width, depth))
        return out.reshape(len(table), *out_shape)

    return _network(body)
