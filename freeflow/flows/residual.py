"""The `residual` flow: what a Gaussian crystal leaves over, learned by coupling layers between colours of sites.

Sites are coloured so that an atom's near neighbours carry other colours. A layer moves the atoms of one
colour, each as a whole three-vector, given its frozen neighbours relative to their mean, the cage. It sees
displacements in real space: whitened coordinates would hide the bonds. What it does to an atom is
an affine map about a centre that the network predicts, with full 3 x 3 shear, and a sinh-arcsinh
map of each component for skewness and tails; all of it in closed form, both ways. Parameters belong
to colours and not to atoms, so that they fit any number of repeats.

A conditional flow serves a range of temperatures and densities with one set of parameters: its networks are told
where in the range they are, and lengths are scaled by sqrt(T), the growth of a harmonic crystal's displacements. The
reference is fitted anew in each state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.bijectors import mean_free, sinh_arcsinh
from freeflow.errors import InputError
from freeflow.flows.core import Flow, training_ensemble
from freeflow.geometry import nearest_neighbour_distance
from freeflow.networks import mlp
from freeflow.potentials import many_body
from freeflow.references import Gaussian, GaussianCrystal, gaussian_crystal
from freeflow.symmetries import site_colours
from freeflow.types import (
    Bijector,
    Crystal,
    Ensemble,
    Key,
    Params,
    Scalar,
    System,
    ThermodynamicState,
    double_precision,
)

# Atoms of one colour are further apart than this, and neighbours up to here are seen, in units of the
# shortest distance between sites. Three-body energies tie next neighbours together.
_FIRST_SHELL, _SECOND_SHELL = 1.05, 1.7
_CAGE = 1.15  # neighbours this much further away than the nearest still belong to the cage
_LOG_SCALE = 2.0  # bound of the logarithm of a scale
_RAW = 18  # raw parameters of an atom's map: centre 3, shift 3, log scales 3, shears 3, sinh-arcsinh 6
_TAIL = 2.0  # where sinh-arcsinh leaves the linear regime, in units of the displacement from the cage


class Layer(NamedTuple):
    """Who moves in a layer, and what it sees; stacked over layers along the first axis."""

    atoms: Any  # (n_moving,)
    neighbours: Any  # (n_moving, n_neighbours)
    bonds: Any  # (n_neighbours, 3) from site to neighbouring site, the same for every atom of the colour
    cage: Any  # (n_neighbours,) weights of the cage; they sum to one
    present: Any  # (n_neighbours,) 0 for a place without a neighbour


def residual(
    system: System,
    gaussian: Gaussian,
    *,
    n_sweeps: int = 4,
    width: int = 48,
    depth: int = 2,
    colour_distance: float | None = None,
    reach: float | None = None,
    scale: float | None = None,
    temperatures: Sequence[float] | None = None,
    number_densities: Sequence[float] | None = None,
) -> Flow:
    """Local flow on top of a Gaussian crystal; the identity before it is trained.

    Args:
        system: What the flow is for.
        gaussian: The reference.
        n_sweeps: How often each colour moves.
        width: Units of the networks' hidden layers.
        depth: Number of hidden layers.
        colour_distance: Atoms of one colour are further apart than this, in units of the shortest distance
            between sites; by default 1.05, or 1.7 for three-body potentials.
        reach: Neighbours up to here are seen, in the same units; by default the same.
        scale: Unit of displacements from the cage [length], at the geometric mean of the temperatures; by default
            their spread in the reference.
        temperatures: Lowest and highest that one set of parameters serves; none for the system's own alone.
        number_densities: Lowest and highest [1/length^3]; none for the system's own alone.

    Raises:
        InputError: If an option is impossible, or the system's own state is outside the ranges.
    """
    crystal = system.crystal
    place = conditioning(system, temperatures, number_densities)
    shell = _SECOND_SHELL if many_body(system.potential) else _FIRST_SHELL
    colour_distance = shell if colour_distance is None else colour_distance
    reach = shell if reach is None else reach
    for name, value in {"n_sweeps": n_sweeps, "width": width, "depth": depth}.items():
        if value < 1:
            raise InputError(f"flow.{name}: must be at least 1, got {value}")
    for name, value in {"colour_distance": colour_distance, "reach": reach}.items():
        if not 1.0 < value <= 4.0:
            raise InputError(f"flow.{name}: must be above 1 and at most 4 nearest-neighbour distances, got {value:g}")
    layers = sweep(crystal, colour_distance, reach)
    recipe = gaussian_crystal(crystal)
    exact = recipe.ensemble(gaussian)
    if scale is None:
        scale = float(f"{_spread(exact, layers, system.state) / float(place.growth(system.state)):.3g}")
    if not scale > 0:
        raise InputError(f"flow.scale: must be positive, got {scale}")

    ranges = {"temperatures": temperatures, "number_densities": number_densities}
    return Flow(
        architecture="residual",
        options={
            **{name: [float(end) for end in ends] for name, ends in ranges.items() if ends is not None},
            "n_sweeps": n_sweeps,
            "width": width,
            "depth": depth,
            "colour_distance": float(colour_distance),
            "reach": float(reach),
            "scale": float(scale),
        },
        reference=_reference(recipe, gaussian),
        target=system.target,
        training_target=training_ensemble(system),
        bijector=mean_free(colour_flow(layers, n_sweeps, width, depth, float(scale), place)),
        log_measure=0.0,
        displacements=lambda u: u,
        coordinates=lambda u: u,
        transferable=True,
        recipe=recipe,
        gaussian=gaussian,
    )


def _reference(recipe: GaussianCrystal, gaussian: Gaussian) -> Ensemble:
    exact = recipe.ensemble(gaussian)

    def sample(key: Key, state: ThermodynamicState) -> Array:
        return recipe.colour(gaussian, recipe.noise(key, jnp.asarray(state.beta).dtype))

    return Ensemble(exact.reduced_potential, sample, exact.log_partition)


def starting_from(flow: Flow, gaussian: Gaussian) -> Flow:
    """The same flow from another Gaussian, that of another temperature; it may be traced."""
    return dataclasses.replace(flow, reference=_reference(flow.recipe, gaussian), gaussian=gaussian)


# ------------------------------------------------------------------------------ where in the phase diagram


class Conditioning(NamedTuple):
    """What a flow is told of the state that it is used in."""

    n_features: int
    features: Callable[[ThermodynamicState], Array]  # (n_features,), from -1 to 1 in the range
    growth: Callable[[ThermodynamicState], Array | float]  # of all lengths, 1 in the middle of the range


def conditioning(
    system: System, temperatures: Sequence[float] | None = None, number_densities: Sequence[float] | None = None
) -> Conditioning:
    """Logarithms of temperature and density, scaled to the ranges that a flow serves; nothing without ranges.

    Raises:
        InputError: If a range is none, or the system is outside.
    """
    density = system.n_atoms / system.crystal.volume
    own = {"temperatures": (temperatures, system.temperature), "number_densities": (number_densities, density)}
    for name, (ends, value) in own.items():
        if ends is None:
            continue
        if len(ends) != 2 or not 0 < ends[0] < ends[1] < math.inf:
            raise InputError(f"flow.{name}: give the lowest and the highest, both positive, got {list(ends)}")
        if not ends[0] * (1 - 1e-9) <= value <= ends[1] * (1 + 1e-9):
            raise InputError(f"flow.{name}: {value:.8g}, the system's own, is not between {ends[0]:g} and {ends[1]:g}")

    def scaled(logarithm: Any, ends: Sequence[float]) -> Any:
        low, high = math.log(ends[0]), math.log(ends[1])
        return (2 * logarithm - low - high) / (high - low)

    def features(state: ThermodynamicState) -> Array:
        beta = jnp.asarray(state.beta)
        found = []
        if temperatures is not None:
            found.append(scaled(-jnp.log(beta * system.units.boltzmann), temperatures))
        if number_densities is not None:
            found.append(jnp.full((), scaled(math.log(density), number_densities), beta.dtype))
        return jnp.stack(found)

    def growth(state: ThermodynamicState) -> Array | float:
        if temperatures is None:
            return 1.0
        middle = system.units.boltzmann * math.sqrt(temperatures[0] * temperatures[1])
        return jnp.sqrt(1 / (jnp.asarray(state.beta) * middle))

    return Conditioning((temperatures is not None) + (number_densities is not None), features, growth)


_ONE_STATE = Conditioning(0, lambda state: jnp.zeros(0), lambda state: 1.0)


# ------------------------------------------------------------------------------ the map


def colour_flow(
    layers: Layer, n_sweeps: int, width: int, depth: int, scale: float, place: Conditioning = _ONE_STATE
) -> Bijector:
    """`n_sweeps` times through all colours, on displacements (n_atoms, 3); translation-equivariant.

    Parameters are stacked over the layers, which compile as one.

    Args:
        layers: What every layer moves and sees.
        n_sweeps: How often all colours are gone through.
        width: Units of each hidden layer of the networks.
        depth: Number of hidden layers.
        scale: Unit of displacements [length].
        place: What a conditional flow is told of the state.
    """
    n_layers = n_sweeps * len(layers.atoms)
    every = Layer(*(np.concatenate([leaf] * n_sweeps) for leaf in layers))
    n_features = 4 * layers.neighbours.shape[-1] + place.n_features
    nonlinear, linear = mlp(width, depth, _RAW), mlp(width, 0, 3)
    tails = sinh_arcsinh(_TAIL)

    def init(key: Key, u: Array, state: ThermodynamicState) -> Params:
        features = jnp.zeros(n_features, u.dtype)

        def one(key: Key) -> Params:
            return {"nonlinear": nonlinear.init(key, features), "linear": linear.init(key, features)}

        return jax.vmap(one)(jax.random.split(key, n_layers))

    def conditions(params: Params, u: Array, layer: Layer, state: ThermodynamicState) -> tuple[Array, Array, Any]:
        """Cage (n_moving, 3), raw parameters (n_moving, _RAW) from what is frozen, and the unit of length."""
        unit = jnp.asarray(scale * place.growth(state), u.dtype)
        around = u[layer.neighbours]
        cage = jnp.einsum("k,ikd->id", jnp.asarray(layer.cage, u.dtype), around)
        apart = (around - cage[:, None]) * jnp.asarray(layer.present, u.dtype)[None, :, None]
        bonds = jnp.asarray(layer.bonds, u.dtype)
        stretch = _length(bonds[None] + apart) - _length(bonds)[None]
        features = jnp.concatenate([apart.reshape(len(apart), -1), stretch], axis=1) / unit
        if place.n_features:
            told = jnp.broadcast_to(place.features(state).astype(u.dtype), (len(apart), place.n_features))
            features = jnp.concatenate([features, told], axis=1)
        raw = nonlinear.apply(params["nonlinear"], features)
        return cage, raw.at[:, :3].add(linear.apply(params["linear"], features)), unit

    def forward_layer(params: Params, u: Array, layer: Layer, state: ThermodynamicState) -> tuple[Array, Array]:
        cage, raw, unit = conditions(params, u, layer, state)
        centre, shift, log_scale, shear, shape = _parts(raw)
        x = (u[layer.atoms] - cage) / unit - centre
        x = _sheared(jnp.exp(log_scale), shear, x)
        x, log_slope = tails.forward(shape, x)
        moved = cage + unit * (x + centre + shift)
        return u.at[layer.atoms].set(moved, unique_indices=True), jnp.sum(log_scale) + jnp.sum(log_slope)

    def inverse_layer(params: Params, u: Array, layer: Layer, state: ThermodynamicState) -> tuple[Array, Array]:
        cage, raw, unit = conditions(params, u, layer, state)
        centre, shift, log_scale, shear, shape = _parts(raw)
        x = (u[layer.atoms] - cage) / unit - centre - shift
        x, log_slope = tails.inverse(shape, x)
        x = _unsheared(jnp.exp(log_scale), shear, x)
        moved = cage + unit * (x + centre)
        return u.at[layer.atoms].set(moved, unique_indices=True), jnp.sum(log_slope) - jnp.sum(log_scale)

    def through(step: Any, reverse: bool) -> Any:
        def apply(params: Params, u: Array, state: ThermodynamicState) -> tuple[Array, Scalar]:
            def one(carry: tuple[Array, Array], layer: tuple[Params, Layer]) -> tuple[tuple[Array, Array], None]:
                u, log_det = step(layer[0], carry[0], layer[1], state)
                return (u, carry[1] + log_det), None

            (u, log_det), _ = jax.lax.scan(one, (u, jnp.zeros((), u.dtype)), (params, every), reverse=reverse)
            return u, log_det

        return apply

    return Bijector(init, through(forward_layer, False), through(inverse_layer, True))


def _length(v: Float[Array, "*n 3"]) -> Float[Array, "*n"]:
    # Guarded: two atoms in one place must not turn a gradient into NaN.
    return jnp.sqrt(jnp.maximum(jnp.sum(v * v, axis=-1), 1e-12))


def _parts(raw: Float[Array, "n 18"]) -> tuple[Array, Array, Array, Array, Array]:
    centre, shift, log_scale, shear = (raw[:, k : k + 3] for k in (0, 3, 6, 9))
    # The bound keeps one wild parameter from overflowing an exponential.
    return centre, shift, _LOG_SCALE * jnp.tanh(log_scale / _LOG_SCALE), shear, raw[:, 12:].reshape(-1, 3, 2)


def _sheared(scale: Array, shear: Array, x: Array) -> Array:
    """Upper triangular matrix with diagonal `scale` times x, for every atom."""
    return jnp.stack(
        [
            scale[:, 0] * x[:, 0] + shear[:, 0] * x[:, 1] + shear[:, 1] * x[:, 2],
            scale[:, 1] * x[:, 1] + shear[:, 2] * x[:, 2],
            scale[:, 2] * x[:, 2],
        ],
        axis=1,
    )


def _unsheared(scale: Array, shear: Array, y: Array) -> Array:
    """Inverse of `_sheared`, by back substitution."""
    x2 = y[:, 2] / scale[:, 2]
    x1 = (y[:, 1] - shear[:, 2] * x2) / scale[:, 1]
    x0 = (y[:, 0] - shear[:, 0] * x1 - shear[:, 1] * x2) / scale[:, 0]
    return jnp.stack([x0, x1, x2], axis=1)


# ------------------------------------------------------------------------------ who moves, given whom


def sweep(crystal: Crystal, colour_distance: float, reach: float) -> Layer:
    """One layer for each colour of the crystal's sites, stacked.

    Args:
        crystal: The crystal.
        colour_distance: As for `residual`.
        reach: As for `residual`.

    Raises:
        InputError: If an atom has no neighbour of another colour within reach.
    """
    from vesin import NeighborList

    shortest = nearest_neighbour_distance(crystal)
    colours = site_colours(crystal, colour_distance * shortest)
    # Far enough to find the cage of a site whose own neighbours are further away than the shortest bond, and a
    # shell that lies exactly at the reach, whichever way its distance is rounded.
    i, j, bond = NeighborList(cutoff=1.001 * max(reach, 2.0) * shortest, full_list=True).compute(
        points=crystal.sites, box=crystal.cell, periodic=True, quantities="ijD"
    )
    kept = colours[i] != colours[j]
    i, j, bond = i[kept], j[kept], bond[kept]
    length = np.linalg.norm(bond, axis=1)
    nearest = np.full(crystal.n_atoms, np.inf)
    np.minimum.at(nearest, i, length)
    if not np.isfinite(nearest).all():
        alone = int(np.argmax(~np.isfinite(nearest)))
        raise InputError(f"flow.colour_distance: atom {alone} has no near neighbour of another colour; lower it")
    seen = length < (1 + 1e-6) * np.maximum(reach * shortest, _CAGE * nearest[i])
    # Directions in one order for all atoms of a colour, and for every size of the crystal. What is rounded lies
    # away from halves: coordinates with few decimals must not depend on their last bit.
    near, far = (np.floor(1000 * part / shortest + 1 / math.pi) for part in (bond, length))
    order = np.lexsort((*near.T[::-1], far, i))
    order = order[seen[order]]
    most = int(np.bincount(i[order], minlength=crystal.n_atoms).max())
    layers = []
    for colour in range(colours.max() + 1):
        atoms = np.flatnonzero(colours == colour)
        mine = [order[i[order] == atom] for atom in atoms]
        n = len(mine[0])
        fill = most - n
        table = np.array([j[row] for row in mine])
        around = bond[mine[0]]
        weight = (np.linalg.norm(around, axis=1) < _CAGE * nearest[atoms[0]]).astype(float)
        layers.append(
            Layer(
                atoms.astype(np.int32),
                np.concatenate([table, np.repeat(table[:, :1], fill, axis=1)], axis=1).astype(np.int32),
                np.concatenate([around, np.repeat(around[:1], fill, axis=0)]),
                np.concatenate([weight / weight.sum(), np.zeros(fill)]),
                np.concatenate([np.ones(n), np.zeros(fill)]),
            )
        )
    return Layer(*(np.stack(leaves) for leaves in zip(*layers, strict=True)))


def _spread(reference: Ensemble, layers: Layer, state: ThermodynamicState, n_samples: int = 64) -> float:
    """Root mean square displacement of an atom from its cage along one direction [length]."""
    with double_precision(), jax.ensure_compile_time_eval():
        u = np.asarray(
            jax.vmap(lambda key: reference.sample(key, state))(jax.random.split(jax.random.key(0), n_samples))
        )
    square = [
        np.mean((u[:, atoms] - np.einsum("k,sikd->sid", cage, u[:, neighbours])) ** 2)
        for atoms, neighbours, cage in zip(layers.atoms, layers.neighbours, layers.cage, strict=True)
    ]
    return math.sqrt(float(np.mean(square)))
