"""What every flow consists of, and the energies that it trains on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.geometry import nearest_neighbour_distance
from freeflow.potentials import Potential, map_pairs, on_crystal
from freeflow.references import Gaussian, GaussianCrystal
from freeflow.types import (
    Bijector,
    Configuration,
    Ensemble,
    Params,
    Scalar,
    System,
    ThermodynamicState,
    in_double_precision,
)

# A pair this far above its energy in the lattice [kT] never meets: training may see any finite energy there.
_CORE = 50.0


@dataclass(frozen=True)
class Flow:
    """A learned map from a normalised reference to a crystal, in coordinates of its own.

    With x a reference sample and y, log_det = bijector.forward(params, x, state), the work is
    target.u(y) - reference.u(x) - log_det, and its exponential average gives ln Z_flow of the target
    in the flow's coordinates. ln Z_u of mean-free displacements is ln Z_flow + log_measure.
    """

    architecture: str  # the name of its builder
    options: Mapping[str, Any]  # plain values that rebuild it, every default filled in
    reference: Ensemble  # normalised; samples take the dtype of state.beta
    target: Ensemble  # the system's target, exact
    training_target: Ensemble  # the same with finite energies and gradients everywhere, in float32
    bijector: Bijector  # reference coordinates to target coordinates
    log_measure: float
    displacements: Callable[[Configuration], Float[Array, "n_atoms 3"]]  # of target coordinates; mean-free [length]
    coordinates: Callable[[Float[Array, "n_atoms 3"]], Configuration]  # the inverse of `displacements`
    transferable: bool  # parameters do not depend on the number of atoms
    # The reference in whitened coordinates, for bridges: colour(gaussian, launch(key)) is one of its samples, and
    # the ensemble of `recipe` has the partition function of ln Z_u, log_measure included.
    recipe: GaussianCrystal
    gaussian: Gaussian


def pulled_back(flow: Flow, params: Params, target: Ensemble) -> Ensemble:
    """A target seen from the reference's side of a flow: u(f(x)) - ln|det df/dx|.

    Its free energy is that of the target. A bridge to it anneals in the flow's latent space, and
    switching to it at once is targeted free energy perturbation (Jarzynski, PRE 65, 046122, 2002).

    Args:
        flow: The map.
        params: Its parameters; they are cast to the precision of the configuration.
        target: Ensemble of mean-free displacements (n_atoms, 3) [length].
    """

    def reduced_potential(x: Configuration, state: ThermodynamicState) -> Scalar:
        cast = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(x.dtype), params)
        y, log_det = flow.bijector.forward(cast, x, state)
        return target.reduced_potential(flow.displacements(y), state) - log_det

    return Ensemble(reduced_potential)


def training_ensemble(system: System, dtype: str = "float32") -> Ensemble:
    """The system's target for gradient descent: finite everywhere, and exact wherever a crystal goes.

    It has no end beyond which the energy is infinite, and pairs repel with a bounded force where they come
    closer than a thermal crystal ever brings them. Configurations are displacements (n_atoms, 3) [length].
    """
    spacing = nearest_neighbour_distance(system.crystal)
    soft = map_pairs(lambda pair: softened(pair, _core_radius(pair, system.kt, spacing)), system.potential)
    # A flow starts near the lattice; neighbours up to here bring an atom back that leaves its site.
    energy = on_crystal(soft, system.crystal, system.nearest_image_only).relative(spacing, dtype)

    def reduced_potential(u: Array, state: ThermodynamicState) -> Array:
        return state.beta * energy(u)

    return Ensemble(reduced_potential)


@in_double_precision
def _core_radius(potential: Potential, kt: float, spacing: float) -> float:
    """Largest distance at which a pair has `_CORE` kT more than nearest neighbours in the lattice [length]."""
    r = np.linspace(0.0, spacing, 2001)[1:]
    with jax.ensure_compile_time_eval():
        energies = np.asarray(potential.pair(jnp.asarray(r * r)))
    high = r[~(energies < energies[-1] + _CORE * kt)]
    return float(high[-1]) if len(high) else 0.0


@in_double_precision
def softened(potential: Potential, radius: float) -> Potential:
    """The same potential, with pairs closer than `radius` [length] on the tangent in r^2: a bounded core."""
    if radius <= 0:
        return potential
    start = radius**2
    with jax.ensure_compile_time_eval():
        slope = float(jax.grad(lambda r2: potential.pair(r2))(jnp.asarray(start)))

    def pair(r2: Array) -> Array:
        outside = jnp.maximum(r2, jnp.asarray(start, r2.dtype))
        return potential.pair(outside) + jnp.asarray(slope, r2.dtype) * (r2 - outside)

    return dataclasses.replace(potential, pair=pair)
