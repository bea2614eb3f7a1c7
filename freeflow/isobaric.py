"""Crystals at constant pressure: the target with its measure, Gaussian references that include the strain.

Configurations are `freeflow.cells.Strained`. White coordinates z have the rows of the displacements and two more, which
hold up to six coordinates of the strain; those that the cell's motion does not use stay zero. docs/gibbs.md derives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.cells import (
    CELL_MOTIONS,
    LARGEST_STRETCH,
    STRAIN_ROWS,
    CellMotion,
    Strained,
    coordinates_of,
    deformation,
    log_shape_measure,
    log_volume_change,
    strain_of,
    within_reach,
)
from freeflow.random_numbers import standard_normal
from freeflow.references import CellGaussian, DisplacementFit, Gaussian, GaussianCrystal, far_wider, gaussian_crystal
from freeflow.types import Crystal, Ensemble, Key, Numeric, Scalar, System, ThermodynamicState

# Strain by which curvatures are found from differences, and by which the mean moves in one step at most.
_DIFFERENCE, _LONGEST_STEP = 2e-3, 0.03
# Curvatures of the strain below this fraction of the mean one are lifted to it, to start an iteration from.
_SOFTEST = 0.05


def isobaric_ensemble(
    energy: Callable[[Array, Array], Array],
    n_atoms: int,
    volume: float,
    motion: CellMotion,
    reach: float | None = None,
) -> Ensemble:
    """exp(-beta [U - U_ref + p (V - V_ref)]) with the measure of the cell, of displacements and strain.

    Args:
        energy: U - U_ref of displacements (n_atoms, 3) in the reference cell and a deformation (3, 3) [energy].
        n_atoms: Number of atoms.
        volume: Of the reference cell, V_ref [length**3].
        motion: What the cell may do.
        reach: If given, the ensemble ends where an atom is further than this from its site, both in the reference
            cell [length], and where the cell is stretched by more than `LARGEST_STRETCH`.
    """

    def reduced_potential(x: Strained, state: ThermodynamicState) -> Scalar:
        u, strain = x
        growth = log_volume_change(strain)
        enthalpy = energy(u, deformation(strain)) + state.pressure * volume * jnp.expm1(growth)
        value = state.beta * enthalpy - log_measure(strain, n_atoms, motion)
        if reach is None:
            return value
        inside = (jnp.max(jnp.sum(u * u, axis=1)) < reach**2) & within_reach(strain, LARGEST_STRETCH)
        return jnp.where(inside, value, jnp.inf)

    return Ensemble(reduced_potential)


def log_measure(strain: Float[Array, "3 3"], n_atoms: int, motion: CellMotion) -> Scalar:
    """ln of the ensemble's measure per volume of displacements and orthonormal strain coordinates [1].

    V^(N-1) from scaled displacements, V from the centre of mass, and one more V from dV = V d(ln V).
    """
    value = (n_atoms + 1) * log_volume_change(strain)
    # Diagonal strains commute: their measure is flat.
    return value + log_shape_measure(strain) if motion.n_strains == 6 else value


def energy_alone(system: System) -> Callable[[Strained], Scalar]:
    """U of one configuration, less that of the lattice in the reference cell [energy].

    Infinite where the ensemble of the system, whose cell moves, ends.
    """
    assert system.cell_motion is not None
    motion = CELL_MOTIONS[system.cell_motion]

    def energy(x: Strained) -> Scalar:
        alone = ThermodynamicState(jnp.float64(1.0), jnp.float64(0.0))
        return system.target.reduced_potential(x, alone) + log_measure(x.strain, system.n_atoms, motion)

    return energy


def cell_constant(volume: float, thermal_wavelength: float) -> float:
    """What the cell adds to beta G outside the integral over orthonormal strain coordinates [kT].

    dV = V d(ln V), the trace of the strain is sqrt(3) times its first coordinate, and volumes are in units of Lambda^3.
    """
    return -math.log(math.sqrt(3.0) * volume / thermal_wavelength**3)


# ----------------------------------------------------------------------------- references


def isobaric_crystal(crystal: Crystal, motion: CellMotion) -> GaussianCrystal:
    """Functions of Gaussians of displacements and strain; their parameters have a `cell`."""
    fixed = gaussian_crystal(crystal)
    n, k = crystal.n_atoms, motion.n_strains
    used = (np.arange(3 * STRAIN_ROWS) < k).reshape(STRAIN_ROWS, 3)

    def cast(x: Numeric, like: Array) -> Array:
        return jnp.asarray(x).astype(like.dtype)

    def colour(parameters: Gaussian, z: Array) -> Strained:
        cell = _cell(parameters)
        apart = cast(cell.root, z) @ z[n:].reshape(-1)[:k]
        u = fixed.colour(parameters, z[:n]) + cast(cell.inner, z) @ apart
        return Strained(u, strain_of(motion, cast(cell.strain, z) + apart))

    def whiten(parameters: Gaussian, x: Strained) -> Array:
        (u, strain), cell = x, _cell(parameters)
        apart = coordinates_of(motion, strain) - cast(cell.strain, strain)
        white = jnp.zeros(3 * STRAIN_ROWS, u.dtype).at[:k].set(cast(cell.inverse_root, strain) @ apart)
        rest = fixed.whiten(parameters, u - cast(cell.inner, u) @ apart)
        return jnp.concatenate([rest, white.reshape(STRAIN_ROWS, 3)])

    def colour_gradient(parameters: Gaussian, gradient: Strained) -> Array:
        centre = jnp.zeros((n + STRAIN_ROWS, 3), gradient.displacements.dtype)
        return jax.vjp(lambda z: colour(parameters, z), centre)[1](gradient)[0]

    def noise(key: Key, dtype: Any) -> Array:
        z = standard_normal(key, (n + STRAIN_ROWS, 3), dtype)
        centred = z[:n] - jnp.mean(z[:n], axis=0, keepdims=True)
        return jnp.concatenate([centred, jnp.where(used, z[n:], 0)])

    return GaussianCrystal(crystal, colour, whiten, colour_gradient, noise, n_strains=k)


def in_unit_cell(displacements: Gaussian, motion: CellMotion) -> Gaussian:
    """Displacements with a cell of unit variance: parameters to compile for."""
    k = motion.n_strains
    inner = np.zeros((*np.shape(displacements.mean), k))
    return displacements._replace(cell=CellGaussian(np.zeros(k), np.eye(k), np.eye(k), inner))


def _cell(parameters: Gaussian) -> CellGaussian:
    assert parameters.cell is not None
    return parameters.cell


def mean_strain(system: System, gaussian: Gaussian) -> Float[np.ndarray, "3 3"]:
    """Mean strain of a system's reference; zero for a fixed cell."""
    if system.cell_motion is None or gaussian.cell is None:
        return np.zeros((3, 3))
    return np.tensordot(gaussian.cell.strain, CELL_MOTIONS[system.cell_motion].basis, 1)


@dataclass(frozen=True)
class IsobaricFit:
    """A Gaussian crystal in a Gaussian cell on its way to the fixed point; see `freeflow.references.FitStep`."""

    displacements: DisplacementFit
    motion: CellMotion
    precision: np.ndarray  # (n_strains, n_strains) of the strain coordinates
    strain: np.ndarray  # (n_strains,)
    inner: np.ndarray  # (n_atoms, 3, n_strains) [length]
    frozen: bool = False  # displacements stay as they are

    def gaussian(self) -> Gaussian:
        """The Gaussian."""
        displacements = self.displacements.gaussian()
        root, inverse = _power(self.precision, -0.5), _power(self.precision, 0.5)
        # Displacements follow the strain by a shear of the whole space, which has determinant 1.
        log_det = np.float64(displacements.log_det + np.linalg.slogdet(root)[1])
        return displacements._replace(log_det=log_det, cell=CellGaussian(self.strain, root, inverse, self.inner))

    def noise(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """White z (n, n_atoms + 2, 3)."""
        rows = np.zeros((n, 3 * STRAIN_ROWS))
        rows[:, : self.motion.n_strains] = rng.standard_normal((n, self.motion.n_strains))
        return np.concatenate([self.displacements.noise(rng, n), rows.reshape(n, STRAIN_ROWS, 3)], axis=1)

    def improved(self, z: np.ndarray, gradient: np.ndarray) -> tuple[IsobaricFit, float]:
        """As for displacements alone: the strain's own block, its mean, and how displacements follow the strain."""
        n, k = self.displacements.crystal.n_atoms, self.motion.n_strains
        displacements, gain = self.displacements.improved(z[:, :n], gradient[:, :n])
        z_s, g_s = (x[:, n:].reshape(len(z), -1)[:, :k] for x in (z, gradient))
        turn = strain_operations(self.displacements.crystal, self.motion)
        root, inverse = _power(self.precision, 0.5), _power(self.precision, -0.5)

        product = (g_s - z_s).T @ z_s / len(z)
        product = _average(turn, root @ (0.5 * (product + product.T)) @ root)
        values, vectors = np.linalg.eigh(inverse @ product @ inverse)
        bounded = (vectors * np.clip(values, -0.6, 1.5)) @ vectors.T
        precision = root @ (np.eye(k) + bounded) @ root

        slope = turn.mean(axis=0) @ g_s.mean(axis=0)
        step = -inverse @ slope
        step *= min(1.0, _LONGEST_STEP / max(float(np.linalg.norm(step)), 1e-300))
        # The displacements' mean gradient per unit of strain, that they go after; <z z_s> is known to vanish.
        pulled = np.einsum("sni,sk->nik", (gradient - z)[:, :n], z_s) / len(z)
        answer = self._periodic(pulled, turn)
        gain += 0.25 * (values**2).sum() + 0.5 * (slope**2).sum()
        gain += 0.5 * (_whitened(self.displacements, answer) ** 2).sum()
        better = replace(
            self,
            displacements=self.displacements if self.frozen else displacements,
            precision=precision,
            strain=self.strain + step,
            inner=self.inner - answer @ root,
        )
        return better, float(gain)

    def widened(self, z: np.ndarray) -> tuple[IsobaricFit, int]:
        """See `freeflow.references.FitStep`; displacements also follow the strains that are widened."""
        n, k = self.displacements.crystal.n_atoms, self.motion.n_strains
        turn = strain_operations(self.displacements.crystal, self.motion)
        strains = z[:, n:].reshape(len(z), -1)[:, :k]
        mean = turn.mean(axis=0) @ strains.mean(axis=0)
        apart = strains - mean
        values, vectors = np.linalg.eigh(_average(turn, apart.T @ apart / len(z)))
        wide = far_wider(values, len(z))
        axes = vectors[:, wide]
        followed = np.einsum("sni,sk->nik", z[:, :n], apart @ axes / values[wide]) @ axes.T / len(z)
        answer = self._periodic(followed, turn)
        rest = z[:, :n] - np.einsum("nik,sk->sni", _whitened(self.displacements, answer), apart)
        displacements, n_wide = self.displacements.widened(rest)
        if not wide.any() and not n_wide:
            return self, 0
        root, inverse = _power(self.precision, 0.5), _power(self.precision, -0.5)
        inside = (vectors / np.where(wide, values, 1.0)) @ vectors.T
        wider = replace(
            self,
            displacements=displacements,
            precision=root @ inside @ root,
            strain=self.strain + inverse @ mean,
            inner=self.inner + answer @ root,
        )
        return wider, n_wide + int(wide.sum())

    def _periodic(self, pulled: np.ndarray, turn: np.ndarray) -> np.ndarray:
        """Displacements of the basis atoms per strain that answer whitened gradients (n_atoms, 3, n_strains)."""
        fit = self.displacements
        steps = np.stack([fit.periodic_step(pulled[:, :, j]) for j in range(pulled.shape[2])], axis=2)
        total = np.zeros_like(steps)
        for rotation, image, turned in zip(fit.crystal.operations, fit.crystal.operation_sites, turn, strict=True):
            total[image] += np.einsum("ab,nbk,jk->naj", rotation, steps, turned, optimize=True)
        return total / len(turn)


def start_fit(
    crystal: Crystal,
    motion: CellMotion,
    blocks: np.ndarray,
    gradients: Callable[[Gaussian, np.ndarray], np.ndarray],
    isotropic: bool = False,
    frozen: bool = False,
) -> IsobaricFit:
    """Where the iteration starts: the harmonic crystal, and the curvature of the lattice's enthalpy in strain.

    Args:
        crystal: The reference crystal.
        motion: What the cell may do.
        blocks: Harmonic precision of the displacements [1/length**2].
        gradients: Gradient with respect to z of a batch of z, under a Gaussian.
        isotropic: Keep every atom's precision a multiple of the unit matrix.
        frozen: Leave the displacements' precision as it is.
    """
    n, k = crystal.n_atoms, motion.n_strains
    displacements = DisplacementFit.start(crystal, blocks, isotropic)
    fit = IsobaricFit(displacements, motion, np.eye(k), np.zeros(k), np.zeros((n, 3, k)), frozen)
    z = np.zeros((2 * k, n + STRAIN_ROWS, 3))
    for j in range(k):
        z[2 * j, n + j // 3, j % 3], z[2 * j + 1, n + j // 3, j % 3] = _DIFFERENCE, -_DIFFERENCE
    g = gradients(fit.gaussian(), z)
    slope = (g[::2] - g[1::2]) / (2 * _DIFFERENCE)  # (n_strains, n_atoms + 2, 3)
    turn = strain_operations(crystal, motion)
    pulled = np.moveaxis(slope[:, :n], 0, 2)
    inner = -fit._periodic(pulled, turn)
    curvature = slope[:, n:].reshape(k, -1)[:, :k]
    # Displacements that follow the strain make it softer: A^-1 inner is what they whiten to.
    curvature = curvature - np.einsum("nik,nij->kj", pulled, _whitened(displacements, -inner))
    return replace(fit, precision=_lifted(_average(turn, 0.5 * (curvature + curvature.T))), inner=inner)


def _whitened(fit: DisplacementFit, displacements: np.ndarray) -> np.ndarray:
    """P^(1/2) times periodic displacements (n_atoms, 3, n_strains)."""
    site_of = fit.crystal.site_of
    first = displacements[site_of[0]].reshape(-1, displacements.shape[2])
    everywhere = np.empty_like(displacements)
    everywhere[site_of] = (fit.root_precision[0].real @ first).reshape(1, site_of.shape[1], 3, -1)
    return everywhere


def strain_operations(crystal: Crystal, motion: CellMotion) -> np.ndarray:
    """How the crystal's rotations turn strain coordinates (n_operations, n_strains, n_strains)."""
    turned = np.einsum("oab,kbc,odc->okad", crystal.operations, motion.basis, crystal.operations, optimize=True)
    return np.einsum("jad,okad->ojk", motion.basis, turned, optimize=True)


def _average(turn: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("oij,jk,olk->il", turn, matrix, turn, optimize=True) / len(turn)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def _lifted(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(np.abs(values), _SOFTEST * np.abs(values).mean())) @ vectors.T
