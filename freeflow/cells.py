"""How a cell may change: logarithmic strains, the deformations they stand for, and their measure.

A cell h (rows are lattice vectors) of an isobaric ensemble is h = h_ref F with a symmetric positive F = exp(s):
rotations of the whole crystal are taken out by the polar decomposition. The symmetric matrix s, the logarithmic
strain, is a sum of orthonormal matrices with one coordinate each; see docs/gibbs.md for the measure.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.types import Scalar

# Rows that six strain coordinates take among rows of three.
STRAIN_ROWS = 2
# Terms of the exponential's series: the next one is below 1e-15 for strains up to LARGEST_STRETCH in all directions.
_TERMS = 12
# |logarithm of the stretch| along any direction at which the cell is no longer that of the crystal.
LARGEST_STRETCH = 0.15


class CellMotion(NamedTuple):
    """Strains that a cell takes."""

    name: str
    basis: np.ndarray  # (n_strains, 3, 3) symmetric, orthonormal: tr(B_j B_k) = 1 if j = k, else 0

    @property
    def n_strains(self) -> int:
        return len(self.basis)


def _basis(n_strains: int) -> np.ndarray:
    stretches = [np.eye(3) / math.sqrt(3), np.diag([1, -1, 0]) / math.sqrt(2), np.diag([1, 1, -2]) / math.sqrt(6)]
    shears = []
    for a, b in ((1, 2), (0, 2), (0, 1)):
        shears.append(np.zeros((3, 3)))
        shears[-1][a, b] = shears[-1][b, a] = 1 / math.sqrt(2)
    return np.array([*stretches, *shears])[:n_strains]


CELL_MOTIONS = {
    "isotropic": CellMotion("isotropic", _basis(1)),  # the volume alone
    "orthorhombic": CellMotion("orthorhombic", _basis(3)),  # three edges, at right angles
    "triclinic": CellMotion("triclinic", _basis(6)),  # any cell
}


class Strained(NamedTuple):
    """A crystal in a cell that has changed: atoms at (X + u) exp(strain), X the sites of the reference cell."""

    displacements: Float[Array, "n_atoms 3"]  # u, mean-free, in the reference cell [length]
    strain: Float[Array, "3 3"]  # symmetric


def strain_of(motion: CellMotion, coordinates: Float[Array, " n_strains"]) -> Float[Array, "3 3"]:
    """The strain with given coordinates in the motion's basis."""
    return jnp.tensordot(coordinates, jnp.asarray(motion.basis, coordinates.dtype), 1)


def coordinates_of(motion: CellMotion, strain: Float[Array, "3 3"]) -> Float[Array, " n_strains"]:
    """Coordinates of a strain; what lies outside the motion's basis is lost."""
    return jnp.tensordot(jnp.asarray(motion.basis, strain.dtype), strain, 2)


def deformation(strain: Float[Array, "3 3"]) -> Float[Array, "3 3"]:
    """exp(strain), by its series in Horner's form: exact to rounding for the strains of crystals."""
    unit = jnp.eye(3, dtype=strain.dtype)
    total = unit
    for k in range(_TERMS, 0, -1):
        total = unit + (strain @ total) / k
    return total


def log_volume_change(strain: Float[Array, "3 3"]) -> Scalar:
    """ln(V / V_ref), the trace."""
    return jnp.trace(strain)


def log_shape_measure(strain: Float[Array, "3 3"]) -> Scalar:
    """ln of the density of cell shapes per volume of orthonormal strain coordinates.

    The measure of cells that no choice of the reference cell changes is dh / det(h)^3. Written as a rotation times
    exp(s), it is the product over pairs of eigenvalues of s of sinh(d) / d, d their difference (Helgason, Groups and
    Geometric Analysis, theorem I.5.8). Each factor is expanded, ln(sinh d / d) = d^2/6 - d^4/180 + d^6/2835 - ..., and
    the sums over the three differences, which add up to zero, are invariants of the traceless part of s. What is left
    out is below 1e-8 up to LARGEST_STRETCH.
    """
    traceless = strain - jnp.trace(strain) / 3 * jnp.eye(3, dtype=strain.dtype)
    square = traceless @ traceless
    second, third = jnp.trace(square), jnp.trace(square @ traceless)
    # With a + b + c = 0: sum a^4 = (sum a^2)^2 / 2 and sum a^6 = (sum a^2)^3 / 4 + 3 (abc)^2; (abc)^2 is the
    # discriminant.
    d2 = 3 * second
    discriminant = 0.5 * second**3 - 3 * third**2
    return d2 / 6 - 0.5 * d2**2 / 180 + (0.25 * d2**3 + 3 * discriminant) / 2835


def within_reach(strain: Float[Array, "3 3"], largest: float = LARGEST_STRETCH) -> Array:
    """Whether no direction is stretched or compressed by more than exp(largest).

    largest - s and largest + s must be positive definite; the leading minors tell, without eigenvalues.
    """
    unit = largest * jnp.eye(3, dtype=strain.dtype)

    def positive(m: Array) -> Array:
        second = m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]
        third = jnp.sum(m[0] * jnp.cross(m[1], m[2]))
        return (m[0, 0] > 0) & (second > 0) & (third > 0)

    return positive(unit - strain) & positive(unit + strain)


# ------------------------------------------------------------------------------ cells of many frames, in NumPy


def strains_between(
    reference: Float[np.ndarray, "3 3"], cells: Float[np.ndarray, "n_frames 3 3"]
) -> Float[np.ndarray, "n_frames 3 3"]:
    """Strains s of cells h = h_ref exp(s) R, however R turns or mirrors them."""
    deformed = np.linalg.solve(reference, cells)
    values, axes = np.linalg.eigh(deformed @ np.swapaxes(deformed, 1, 2))
    return np.einsum("fak,fk,fbk->fab", axes, 0.5 * np.log(values), axes, optimize=True)


def stretches(strains: Float[np.ndarray, "n_frames 3 3"]) -> Float[np.ndarray, "n_frames 3 3"]:
    """Deformations exp(s)."""
    values, axes = np.linalg.eigh(strains)
    return np.einsum("fak,fk,fbk->fab", axes, np.exp(values), axes, optimize=True)


def strains_in_another_cell(
    strains: Float[np.ndarray, "n_frames 3 3"], deformed: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "n_frames 3 3"]:
    """Strains of the same cells relative to the reference cell h_ref E, for symmetric and positive E.

    Atoms at (X + u) F are at (X E + u E) E^-1 F: displacements become u E, and the strain is that of E^-1 F without
    its rotation.
    """
    return strains_between(deformed, stretches(strains))
