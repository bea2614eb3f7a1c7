"""Coupling layers: one part of a configuration moves, given the other, which stays (Dinh et al., arXiv:1605.08803).

A conditioner `Network` sees the frozen part only, so that the Jacobian is triangular and the log det
is the sum of the elementwise map's log derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from freeflow.bijectors.core import Elementwise, chain
from freeflow.types import Bijector, Configuration, Key, Network, Params, Scalar, ThermodynamicState


def coupling(
    network: Network,
    elementwise: Elementwise,
    split: Callable[[Configuration], tuple[Array, Configuration]],
    merge: Callable[[Array, Configuration], Configuration],
) -> Bijector:
    """Move one part of a configuration by an elementwise map, given the rest.

    Args:
        network: `apply(params, frozen)` gives the raw parameters of the moving part: an array of
            moving.size * n_parameters numbers whose order is that of shape (*moving.shape, n_parameters).
            Where it gives zeros the layer is the identity.
        elementwise: Map of the numbers that move.
        split: Configuration to (moving array, frozen). The moving array may be taken relative to something
            that depends on the frozen part alone: that leaves the log det as it is.
        merge: Inverse of `split`.
    """

    def init(key: Key, x: Configuration, state: ThermodynamicState) -> Params:
        return network.init(key, split(x)[1])

    def apply(mapping: Any, params: Params, x: Configuration) -> tuple[Configuration, Scalar]:
        moving, frozen = split(x)
        raw = network.apply(params, frozen).reshape(*moving.shape, elementwise.n_parameters)
        moved, log_derivative = mapping(raw, moving)
        return merge(moved, frozen), jnp.sum(log_derivative)

    def forward(params: Params, x: Configuration, state: ThermodynamicState) -> tuple[Configuration, Scalar]:
        return apply(elementwise.forward, params, x)

    def inverse(params: Params, y: Configuration, state: ThermodynamicState) -> tuple[Configuration, Scalar]:
        return apply(elementwise.inverse, params, y)

    return Bijector(init, forward, inverse)


def axis_coupling(network: Network, elementwise: Elementwise, axes: Sequence[int], n_axes: int = 3) -> Bijector:
    """Coupling of an array (n_atoms, n_axes) that moves some coordinate axes of all atoms, given the others.

    This is the split of Wirnsberger et al., arXiv:2111.08696: a permutation-equivariant conditioner
    makes an equivariant layer.

    Args:
        network: From the frozen coordinates (n_atoms, n_axes - n_moving), axes in ascending order,
            to (n_atoms, n_moving * n_parameters).
        elementwise: Map of the coordinates that move.
        axes: Which axes move.
        n_axes: Number of axes.

    Raises:
        ValueError: If no axis moves, none is frozen, or one does not exist or stands there twice.
    """
    moving = sorted(axes)
    frozen = [axis for axis in range(n_axes) if axis not in moving]
    if sorted([*moving, *frozen]) != list(range(n_axes)) or not moving or not frozen:
        raise ValueError(f"axes {tuple(axes)} do not split the {n_axes} axes into a moving and a frozen part")
    home = [[*moving, *frozen].index(axis) for axis in range(n_axes)]

    def columns(x: Array, of: Sequence[int]) -> Array:
        return jnp.stack([x[:, axis] for axis in of], axis=1)  # static slices: cheaper than a gather

    def split(x: Array) -> tuple[Array, Array]:
        return columns(x, moving), columns(x, frozen)

    def merge(moved: Array, rest: Array) -> Array:
        return columns(jnp.concatenate([moved, rest], axis=1), home)

    return coupling(network, elementwise, split, merge)


def leaf_coupling(network: Network, elementwise: Elementwise, moving: str, frozen: str) -> Bijector:
    """Coupling of a configuration of named arrays: the whole of one leaf moves, given another leaf.

    Args:
        network: From the frozen leaf (n_atoms, 3), say, to (n_atoms, 3 * n_parameters).
        elementwise: Map of the leaf that moves.
        moving: Name of the leaf that moves.
        frozen: Name of the leaf that the network sees. Other leaves pass through unseen.

    Raises:
        ValueError: If the leaves are the same.
    """
    if moving == frozen:
        raise ValueError(f"leaf {moving!r} cannot both move and be frozen")

    def split(x: Configuration) -> tuple[Array, Configuration]:
        return x[moving], x

    def merge(moved: Array, x: Configuration) -> Configuration:
        return {**x, moving: moved}

    seen = Network(
        lambda key, x: network.init(key, x[frozen]),
        lambda params, x: network.apply(params, x[frozen]),
    )
    return coupling(seen, elementwise, split, merge)


def augmented_coupling(
    network: Network, elementwise: Elementwise, leaf: str = "x", auxiliary: str = "auxiliary"
) -> Bijector:
    """Move {"x": (n, 3), "auxiliary": (n, 3)}: first x given its auxiliary copy, then the copy given the new x.

    All three coordinates of an atom move at once (Huang et al., arXiv:2002.07101). Both halves use the
    network with parameters of their own; the parameters are a pair.

    Args:
        network: From (n, 3) to (n, 3 * n_parameters); both halves use it.
        elementwise: Map of the numbers that move.
        leaf: Name of the configuration's leaf.
        auxiliary: Name of its auxiliary copy.

    Raises:
        ValueError: If the names are the same.
    """
    return chain(
        leaf_coupling(network, elementwise, moving=leaf, frozen=auxiliary),
        leaf_coupling(network, elementwise, moving=auxiliary, frozen=leaf),
    )
