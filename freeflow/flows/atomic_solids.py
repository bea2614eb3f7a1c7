"""The atomic-solids flow: permutation-equivariant circular splines on the torus.

Wirnsberger et al., Mach. Learn.: Sci. Technol. 3, 025009 (2022). Atom 0 stays on its site. The other
atoms have fractional coordinates relative to it, (n_atoms - 1, 3), with period 1. They start as
independent Gaussians around their sites, truncated to balls that do not overlap, and pass through
coupling layers that move some coordinate axes of all atoms, given the others.

Labelled samples serve for unlabelled crystals: the map treats the atoms alike and the reference's balls
stay disjoint under it, so that relabelling both ends changes neither energy nor density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import erf

from freeflow.bijectors import axis_coupling, chain, circular_spline, compose, repeat, shift
from freeflow.errors import InputError
from freeflow.flows.core import Flow, training_ensemble
from freeflow.geometry import face_distances, nearest_neighbour_distance
from freeflow.networks import transformer
from freeflow.references import Gaussian, GaussianCrystal
from freeflow.types import (
    Bijector,
    Crystal,
    Ensemble,
    Key,
    Scalar,
    Symmetry,
    System,
    ThermodynamicState,
    in_double_precision,
)


def atomic_solids(
    system: System,
    *,
    n_layers: int = 4,
    n_blocks: int = 2,
    width: int = 32,
    n_heads: int = 2,
    n_bins: int = 8,
    n_frequencies: int = 8,
    stddev: float | None = None,
) -> Flow:
    """The flow of Wirnsberger et al. 2022 for one crystal.

    The defaults suit eight atoms and minutes of training; the papers' models have 24 layers of width 256,
    16 bins, and up to 24 frequencies (for 512 atoms). Compilation does not grow with the layers.

    Args:
        system: What the flow is for.
        n_layers: Layers; each moves every axis once, and they take the axes in turn.
        n_blocks: Blocks of the transformer that conditions each coupling.
        width: Its embedding, a multiple of `n_heads`.
        n_heads: Its attention heads.
        n_bins: Bins of the circular splines.
        n_frequencies: Fourier features per coordinate and phase.
        stddev: Width of the reference's Gaussians along each axis [length]; by default that of the
            Einstein crystal with the lowest bound on the free energy.

    Raises:
        InputError: If an option is impossible.
    """
    crystal = system.crystal
    sizes = {
        "n_layers": n_layers,
        "n_blocks": n_blocks,
        "width": width,
        "n_heads": n_heads,
        "n_bins": n_bins,
        "n_frequencies": n_frequencies,
    }
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"flow.{name}: must be at least 1, got {value}")
    if width % n_heads:
        raise InputError(f"flow.width: must be a multiple of the {n_heads} heads, got {width}")
    # Inside this radius rounding a fractional coordinate finds the nearest image, skewed cells included.
    radius = 0.5 * min(nearest_neighbour_distance(system.crystal), float(face_distances(crystal.cell).min()))
    if stddev is None:
        stddev = einstein_width(system)
    if not stddev > 0:
        raise InputError(f"flow.stddev: must be positive, got {stddev}")
    displacements, coordinates = torus_coordinates(crystal)
    train = training_ensemble(system)

    def in_flow_coordinates(target: Ensemble) -> Ensemble:
        return Ensemble(lambda y, state: target.reduced_potential(displacements(y), state))

    n = crystal.n_atoms
    reference = truncated_gaussians(crystal, float(stddev), radius)
    # Positions relative to atom 0 have the Jacobian n^(3/2) with respect to an orthonormal basis of the
    # mean-free displacements; fractional ones another 1/V for each atom that moves.
    log_measure = (n - 1) * math.log(crystal.volume) - 1.5 * math.log(n)
    recipe, gaussian = _whitened(crystal, reference, float(stddev), radius, log_measure, system.state)
    return Flow(
        architecture="atomic_solids",
        options={**sizes, "stddev": float(stddev)},
        reference=reference,
        target=in_flow_coordinates(system.target),
        training_target=in_flow_coordinates(train),
        bijector=axis_flow(**sizes),
        log_measure=log_measure,
        displacements=displacements,
        coordinates=coordinates,
        # Nothing in the parameters counts atoms, but frequencies and splines know the box.
        transferable=False,
        recipe=recipe,
        gaussian=gaussian,
    )


def _whitened(
    crystal: Crystal, reference: Ensemble, stddev: float, radius: float, log_measure: float, state: ThermodynamicState
) -> tuple[GaussianCrystal, Gaussian]:
    """The truncated Gaussians as functions of white z (n_atoms - 1, 3); bridges end where a sphere does."""
    sites = _relative_sites(crystal)
    to_fractional, to_white = stddev * np.linalg.inv(crystal.cell), crystal.cell / stddev
    n_others = crystal.n_atoms - 1

    def colour(parameters: Gaussian, z: Array) -> Array:
        # Outside its sphere a sample is none: NaN there gives an energy that no step accepts.
        inside = jnp.sum(z * z, axis=1, keepdims=True) <= (1 + 1e-5) * (radius / stddev) ** 2
        return jnp.asarray(sites, z.dtype) + jnp.where(inside, z, jnp.nan) @ jnp.asarray(to_fractional, z.dtype)

    def whiten(parameters: Gaussian, x: Array) -> Array:
        return _from_sites(x, sites) @ jnp.asarray(to_white, x.dtype)

    def colour_gradient(parameters: Gaussian, gradient: Array) -> Array:
        return gradient @ jnp.asarray(to_fractional.T, gradient.dtype)

    def noise(key: Key, dtype: Any) -> Array:
        return jax.random.normal(key, (n_others, 3), dtype)

    def truncated(key: Key, dtype: Any) -> Array:
        at = ThermodynamicState(*(jnp.asarray(value, dtype) for value in state))
        return _from_sites(reference.sample(key, at), sites) @ jnp.asarray(to_white, dtype)

    nothing = np.zeros((0, 0))
    log_z = float(reference.log_partition(state)) + log_measure
    log_det = np.float64(log_z - 1.5 * n_others * math.log(2 * math.pi))
    gaussian = Gaussian(np.zeros((crystal.n_atoms, 3)), nothing, nothing, log_det)
    return GaussianCrystal(crystal, colour, whiten, colour_gradient, noise, truncated), gaussian


# ------------------------------------------------------------------------------ bijector


def axis_flow(n_layers: int, n_blocks: int, width: int, n_heads: int, n_bins: int, n_frequencies: int) -> Bijector:
    """Equivariant map of (n_atoms, 3) fractional coordinates, lifted from the torus; the identity at first.

    A layer moves the last axis given the other two, then these given the last, each by a circular spline
    and a shift, and hands the axes on in turn. See `atomic_solids` for the arguments.
    """
    mapping = compose(circular_spline(n_bins), shift())

    def couple(axes: tuple[int, ...]) -> Bijector:
        network = transformer(n_blocks, width, n_heads, (len(axes), mapping.n_parameters), n_frequencies)
        return axis_coupling(network, mapping, axes)

    layer = chain(couple((2,)), couple((0, 1)), _turn_axes(1))
    return chain(repeat(layer, n_layers), _turn_axes(-n_layers))


def _turn_axes(by: int) -> Bijector:
    """The coordinate axes, cyclically handed on."""

    def turned(x: Array, steps: int) -> tuple[Array, Scalar]:
        order = [(axis - steps) % 3 for axis in range(3)]
        return jnp.stack([x[:, axis] for axis in order], axis=1), jnp.zeros((), x.dtype)

    return Bijector(
        lambda key, x, state: (),
        lambda params, x, state: turned(x, by),
        lambda params, y, state: turned(y, -by),
    )


# ------------------------------------------------------------------------------ coordinates


def torus_coordinates(crystal: Crystal) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """From fractional positions of atoms 1, 2, ... relative to atom 0 to mean-free displacements, and back.

    Positions may be anywhere: every atom belongs to the nearest image of its own site.
    """
    sites = _relative_sites(crystal)

    def displacements(y: Float[Array, "others 3"]) -> Float[Array, "n 3"]:
        moved = _from_sites(y, sites) @ jnp.asarray(crystal.cell, y.dtype)
        u = jnp.concatenate([jnp.zeros((1, 3), y.dtype), moved])
        return u - jnp.mean(u, axis=0, keepdims=True)

    def coordinates(u: Float[Array, "n 3"]) -> Float[Array, "others 3"]:
        relative = u[1:] - u[:1]
        return jnp.asarray(sites, u.dtype) + relative @ jnp.asarray(np.linalg.inv(crystal.cell), u.dtype)

    return displacements, coordinates


def _relative_sites(crystal: Crystal) -> np.ndarray:
    """Fractional positions (n_atoms - 1, 3) in [0, 1) of the other sites relative to that of atom 0."""
    relative = (crystal.sites[1:] - crystal.sites[:1]) @ np.linalg.inv(crystal.cell)
    relative = np.round(relative, 12)  # a site at 0 must not turn up at 1
    return relative - np.floor(relative)


def _from_sites(y: Array, sites: np.ndarray) -> Array:
    """Fractional displacements from the nearest images of the sites."""
    away = y - jnp.asarray(sites, y.dtype)
    return away - jnp.round(away)


def position_symmetries(crystal: Crystal) -> tuple[Symmetry, Symmetry]:
    """Random labels and a random place in the box, for positions (n_atoms, 3) [length] made from samples.

    Neither changes the work of a sample: labels and place are counted by the constants outside the
    integral. Only atoms of one species exchange their labels.
    """
    species = np.unique(np.array(crystal.species), return_inverse=True)[1]

    def permute(key: Key, positions: Array) -> Array:
        # A random order of all atoms, sorted into species, lists each species at random.
        shuffled = jax.random.permutation(key, crystal.n_atoms)
        by_species = shuffled[jnp.argsort(jnp.asarray(species)[shuffled], stable=True)]
        return positions[by_species[np.argsort(np.argsort(species, kind="stable"))]]

    def translate(key: Key, positions: Array) -> Array:
        cell = jnp.asarray(crystal.cell, positions.dtype)
        fractional = positions @ jnp.asarray(np.linalg.inv(crystal.cell), positions.dtype)
        moved = fractional + jax.random.uniform(key, (1, 3), positions.dtype)
        return (moved - jnp.floor(moved)) @ cell

    return Symmetry("relabelling", permute), Symmetry("uniform translation", translate)


# ------------------------------------------------------------------------------ reference


def truncated_gaussians(crystal: Crystal, stddev: float, radius: float) -> Ensemble:
    """Independent Gaussians around the sites, each cut off on a sphere, in torus coordinates.

    Args:
        crystal: Sites and cell; atom 0 stays at rest.
        stddev: Of the full Gaussians along each axis [length].
        radius: Of the spheres; at most half of what separates two sites [length].
    """
    sites, n_others = _relative_sites(crystal), crystal.n_atoms - 1
    end = radius / stddev
    inside = _chi3_cdf_host(end)
    log_volume = math.log(crystal.volume)

    def reduced_potential(x: Array, state: ThermodynamicState) -> Scalar:
        d = _from_sites(x, sites) @ jnp.asarray(crystal.cell / stddev, x.dtype)
        r2 = jnp.sum(d * d, axis=1)
        # A sample on the sphere may be rounded across it.
        slack = 1 + 16 * float(jnp.finfo(x.dtype).eps) / (stddev / np.abs(crystal.cell).max()) / end
        return jnp.where(jnp.max(r2, initial=0.0) <= (slack * end) ** 2, 0.5 * jnp.sum(r2), jnp.inf)

    def sample(key: Key, state: ThermodynamicState) -> Array:
        dtype = jnp.asarray(state.beta).dtype
        direction_key, radius_key = jax.random.split(key)
        z = jax.random.normal(direction_key, (n_others, 3), dtype)
        direction = z / jnp.linalg.norm(z, axis=1, keepdims=True)
        r = _inverse_chi3_cdf(inside * jax.random.uniform(radius_key, (n_others, 1), dtype), end)
        to_fractional = jnp.asarray(stddev * np.linalg.inv(crystal.cell), dtype)
        return jnp.asarray(sites, dtype) + (r * direction) @ to_fractional

    def log_partition(state: ThermodynamicState) -> float:
        each = 1.5 * math.log(2 * math.pi * stddev**2) + math.log(inside) - log_volume
        return n_others * each

    return Ensemble(reduced_potential, sample, log_partition)


def _chi3_cdf_host(r: float) -> float:
    """Probability that a standard normal vector in three dimensions is shorter than r."""
    return float(erf(r / math.sqrt(2)) - math.sqrt(2 / math.pi) * r * math.exp(-0.5 * r * r))


def _inverse_chi3_cdf(probability: Array, end: float) -> Array:
    """Length below `end` that a standard normal vector stays under with this probability.

    Bisection, one step for each bit: as exact as the distribution function itself, and of fixed length.
    """

    def cdf(r: Array) -> Array:
        return jax.lax.erf(r / math.sqrt(2)) - math.sqrt(2 / math.pi) * r * jnp.exp(-0.5 * r * r)

    def halve(_, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        above = cdf(middle) < probability
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    steps = int(jnp.finfo(probability.dtype).nmant) + 2
    low, high = jax.lax.fori_loop(0, steps, halve, (jnp.zeros_like(probability), jnp.full_like(probability, end)))
    return 0.5 * (low + high)


@in_double_precision
def einstein_width(system: System, n_samples: int = 256, seed: int = 0) -> float:
    """Standard deviation [length] of the independent Gaussians with the lowest bound on the free energy.

    Atom 0 rests, the others have the same width s; the bound is <u> - 3 (n_atoms - 1) ln s up to a
    constant. Samples are the same for every s, so that the bound is a smooth function.
    """
    from scipy.optimize import minimize_scalar

    crystal, target = system.crystal, training_ensemble(system)
    half = np.random.default_rng(seed).standard_normal((n_samples // 2, crystal.n_atoms, 3))
    half[:, 0] = 0.0
    noise = np.concatenate([half, -half])
    noise -= noise.mean(axis=1, keepdims=True)
    freedom = 3 * (crystal.n_atoms - 1)

    @jax.jit
    def mean_energy(log_width: Scalar) -> Scalar:
        energies = jax.vmap(target.reduced_potential, (0, None))(jnp.exp(log_width) * noise, system.state)
        return jnp.mean(energies)

    spacing = nearest_neighbour_distance(system.crystal)
    best = minimize_scalar(
        lambda log_width: float(mean_energy(log_width)) - freedom * log_width,
        bounds=(math.log(1e-4 * spacing), math.log(0.25 * spacing)),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(np.exp(best.x))
