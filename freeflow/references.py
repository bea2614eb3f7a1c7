"""Reference ensembles of crystals: Gaussians with exact partition function, density and samples.

Displacements u of a crystal, with their mean over the atoms fixed, are written u = mean + A z with
z white and A = P^(-1/2) symmetric; P is the precision matrix. Lattice translations make P
block-circulant, so that everything is a product over wave vectors of matrices of 3 n_basis rows:
O(N log N) by FFT. A crystal without repeats has one wave vector and dense matrices; it takes the
same road.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.errors import InputError, UnstableCrystalError
from freeflow.geometry import site_indices
from freeflow.random_numbers import standard_normal
from freeflow.types import Configuration, Crystal, Ensemble, Key, Numeric, Scalar, ThermodynamicState

# Below this many coordinates a dense matrix beats the FFT on CPU.
_DENSE_COORDINATES = 400
# Modes whose squared frequency is below this fraction of the mean one count as unstable.
_STABILITY = 1e-6
# Iterations stop when the next one promises to lower the KL bound by less than this [kT, and per atom], or by not
# much more after one that did not: part of what is promised is noise, which grows with the crystal.
_NEGLIGIBLE_GAIN = 0.02, 2e-5
_SMALL_GAIN = 0.5, 1e-3
# Variance of a white coordinate in the target, beyond what chance gives, from which on a mode counts as far too narrow.
_FAR_WIDER = 2.0


class CellGaussian(NamedTuple):
    """A Gaussian of the coordinates of a cell's strain, and how displacements follow them; see `freeflow.isobaric`."""

    strain: Float[Numeric, " n_strains"]  # mean
    root: Float[Numeric, "n_strains n_strains"]  # white coordinates to the strain's, symmetric
    inverse_root: Float[Numeric, "n_strains n_strains"]
    inner: Float[Numeric, "n_atoms 3 n_strains"]  # mean displacement per unit of a strain coordinate [length]


class Gaussian(NamedTuple):
    """Parameters of a Gaussian crystal; arrays, so that refitting compiles nothing anew."""

    mean: Float[Numeric, "n_atoms 3"]  # displacement of the Gaussian's centre from the sites [length]
    root: Numeric  # A: z to displacements, dense (3N, 3N) or per wave vector [length]
    inverse_root: Numeric  # its inverse [1/length]
    log_det: Scalar  # ln det A on the centre-of-mass-free space, and of the cell's map
    cell: CellGaussian | None = None  # where the cell moves


@dataclass(frozen=True)
class GaussianCrystal:
    """The functions of a Gaussian crystal; parameters come as an argument.

    `colour` and `whiten` are one linear map and its inverse; A is symmetric, so `colour_gradient`
    needs no transpose.
    """

    crystal: Crystal
    # White z has a row for every atom, and more where the cell moves; configurations are displacements (n_atoms, 3), or
    # freeflow.cells.Strained.
    colour: Callable[[Gaussian, Float[Array, "rows 3"]], Configuration]
    whiten: Callable[[Gaussian, Configuration], Float[Array, "rows 3"]]
    colour_gradient: Callable[[Gaussian, Configuration], Float[Array, "rows 3"]]
    noise: Callable[[Key, Any], Float[Array, "rows 3"]]  # (key, dtype) -> white, mean-free
    truncated: Callable[[Key, Any], Float[Array, "n 3"]] | None = None  # where samples are not plain noise
    n_strains: int = 0  # coordinates of the cell, beside the displacements

    def log_normalisation(self, parameters: Gaussian) -> Scalar:
        """ln of the integral of exp(-|z|^2 / 2) over configurations."""
        n_coordinates = 3 * (self.crystal.n_atoms - 1) + self.n_strains
        return 0.5 * n_coordinates * math.log(2 * math.pi) + parameters.log_det

    def launch(self, key: Key, dtype: Any) -> Float[Array, "n 3"]:
        """White z of a sample of the reference."""
        return (self.truncated or self.noise)(key, dtype)

    def ensemble(self, parameters: Gaussian) -> Ensemble:
        """exp(-|z|^2 / 2), whose integral over mean-free displacements is known exactly."""

        def reduced_potential(u: Array, state: ThermodynamicState) -> Array:
            z = self.whiten(parameters, u)
            return 0.5 * jnp.sum(z * z)

        def sample(key: Key, state: ThermodynamicState) -> Array:
            return self.colour(parameters, self.launch(key, parameters.mean.dtype))

        def log_partition(state: ThermodynamicState) -> Scalar:
            return self.log_normalisation(parameters)

        return Ensemble(reduced_potential, sample, log_partition)


def gaussian_crystal(crystal: Crystal) -> GaussianCrystal:
    """Functions of Gaussians that share the crystal's lattice translations."""
    apply = _dense if _is_dense(crystal) else _circulant(crystal)

    def colour(parameters: Gaussian, z: Array) -> Array:
        return apply(parameters.root, z) + jnp.asarray(parameters.mean).astype(z.dtype)

    def whiten(parameters: Gaussian, u: Array) -> Array:
        return apply(parameters.inverse_root, u - jnp.asarray(parameters.mean).astype(u.dtype))

    def colour_gradient(parameters: Gaussian, gradient: Array) -> Array:
        return apply(parameters.root, gradient)

    def noise(key: Key, dtype: Any) -> Array:
        z = standard_normal(key, (crystal.n_atoms, 3), dtype)
        return z - jnp.mean(z, axis=0, keepdims=True)

    return GaussianCrystal(crystal, colour, whiten, colour_gradient, noise)


def _is_dense(crystal: Crystal) -> bool:
    return 3 * crystal.n_atoms <= _DENSE_COORDINATES or len(crystal.site_of) == 1


def _dense(matrix: Numeric, x: Array) -> Array:
    return (jnp.asarray(matrix).astype(x.dtype) @ x.reshape(-1)).reshape(x.shape)


def _circulant(crystal: Crystal) -> Callable[[Numeric, Array], Array]:
    """Product with a block-circulant matrix given by its half spectrum (3b, 3b, m1, m2, m3//2+1)."""
    group, n_basis = crystal.group, crystal.site_of.shape[1]
    site_of = crystal.site_of.reshape(-1)
    place_of = np.argsort(site_of)

    def apply(spectrum: Numeric, x: Array) -> Array:
        grid = jnp.moveaxis(x[site_of].reshape(*group, 3 * n_basis), -1, 0)
        waves = jnp.fft.rfftn(grid, axes=(1, 2, 3))
        factor = jnp.asarray(spectrum).astype(waves.dtype)
        # A sum of elementwise products: matrices of 3 b rows are too small for a matrix product.
        mixed = sum(factor[:, k] * waves[k][None] for k in range(3 * n_basis))
        back = jnp.fft.irfftn(mixed, s=group, axes=(1, 2, 3))
        return jnp.moveaxis(back, 0, -1).reshape(-1, 3)[place_of].astype(x.dtype)

    return apply


# --------------------------------------------------------------------- precision matrices


class Instability(NamedTuple):
    """Modes that the Gaussian cannot hold."""

    count: int
    lowest: float  # most negative eigenvalue over the mean eigenvalue
    wave: tuple[int, int, int]  # where, in units of the reciprocal vectors of the translation group


def _spectrum(crystal: Crystal, blocks: np.ndarray) -> np.ndarray:
    """Hermitian matrices (n_translations, 3b, 3b), one for each wave vector."""
    n_basis, n_translations = blocks.shape[:2]
    grid = np.moveaxis(blocks, 1, 0).reshape(*crystal.group, n_basis, n_basis, 3, 3)
    waves = np.conj(np.fft.fftn(grid, axes=(0, 1, 2))).reshape(n_translations, n_basis, n_basis, 3, 3)
    matrix = waves.transpose(0, 1, 3, 2, 4).reshape(n_translations, 3 * n_basis, 3 * n_basis)
    return 0.5 * (matrix + np.conj(matrix.transpose(0, 2, 1)))


def _blocks(crystal: Crystal, spectrum: np.ndarray) -> np.ndarray:
    """Inverse of `_spectrum`."""
    n_translations, rows = spectrum.shape[:2]
    n_basis = rows // 3
    waves = spectrum.reshape(n_translations, n_basis, 3, n_basis, 3).transpose(0, 1, 3, 2, 4)
    grid = np.conj(waves).reshape(*crystal.group, n_basis, n_basis, 3, 3)
    real = np.fft.ifftn(grid, axes=(0, 1, 2)).real.reshape(n_translations, n_basis, n_basis, 3, 3)
    return np.moveaxis(real, 0, 1)


def symmetrised(crystal: Crystal, blocks: np.ndarray) -> np.ndarray:
    """Average of pair blocks (n_basis, n_translations, n_basis, 3, 3) over the crystal's point operations."""
    translation, basis = site_indices(crystal)
    steps = np.indices(crystal.group).reshape(3, -1).T
    total = np.zeros_like(blocks)
    for rotation, image in zip(crystal.operations, crystal.operation_sites, strict=True):
        first = image[crystal.site_of[0]]  # (b,): where the atoms of cell 0 go
        second = image[crystal.site_of]  # (t, b)
        apart = steps[translation[second]][None] - steps[translation[first]][:, None, None]  # (b, t, b, 3)
        t = np.ravel_multi_index(tuple(np.moveaxis(apart % np.array(crystal.group), -1, 0)), crystal.group)
        turned = rotation @ blocks @ rotation.T
        total[basis[first][:, None, None], t, basis[second][None]] += turned
    return total / len(crystal.operations)


def _mean_free_basis(n_basis: int) -> np.ndarray:
    """Orthonormal columns (3b, 3b - 3) without the three uniform translations."""
    uniform = np.kron(np.ones((n_basis, 1)), np.eye(3)) / math.sqrt(n_basis)
    full = np.linalg.qr(np.concatenate([uniform, np.eye(3 * n_basis)], axis=1))[0]
    return full[:, 3:]


def _decompose(crystal: Crystal, spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (n_translations, 3b) and vectors; the three uniform translations get infinity."""
    values, vectors = np.linalg.eigh(spectrum)
    free = _mean_free_basis(spectrum.shape[1] // 3)
    uniform_free = np.linalg.eigh((free.T @ spectrum[0] @ free).real) if free.shape[1] else (np.empty(0), np.eye(0))
    values[0, :3], values[0, 3:] = np.inf, uniform_free[0]
    rest = free @ uniform_free[1]
    uniform = np.linalg.qr(np.concatenate([rest, np.eye(len(rest))], axis=1))[0][:, rest.shape[1] :][:, :3]
    vectors[0] = np.concatenate([uniform, rest], axis=1)
    return values, vectors


def instability(crystal: Crystal, blocks: np.ndarray) -> Instability | None:
    """The modes with negative or vanishing eigenvalues, if there are any."""
    values, _ = _decompose(crystal, _spectrum(crystal, blocks))
    finite = values[np.isfinite(values)]
    scale = np.abs(finite).mean() if finite.size else 1.0
    soft = values <= _STABILITY * scale
    if not soft.any():
        return None
    wave = np.unravel_index(int(np.argmin(values.min(axis=1))), crystal.group)
    return Instability(int(soft.sum()), float(values.min() / scale), (int(wave[0]), int(wave[1]), int(wave[2])))


def root_mean_square(crystal: Crystal, blocks: np.ndarray) -> float:
    """Displacement of an atom along one direction, root mean square over atoms and directions [length]."""
    values, _ = _decompose(crystal, _spectrum(crystal, _stabilised(crystal, blocks)))
    return math.sqrt((1.0 / values).sum() / (3 * crystal.n_atoms))  # infinite values add nothing


def gaussian_from_blocks(crystal: Crystal, blocks: np.ndarray, mean: np.ndarray | None = None) -> Gaussian:
    """The Gaussian with precision P, given by its blocks [1/length**2].

    Raises:
        UnstableCrystalError: If P is not positive definite on the mean-free space.
    """
    unstable = instability(crystal, blocks)
    if unstable is not None:
        modes = "mode" if unstable.count == 1 else "modes"
        raise UnstableCrystalError(
            f"the lattice is not a minimum of the energy: {unstable.count} imaginary {modes}, the strongest at wave "
            f"vector {unstable.wave} of {crystal.group} (squared frequency {unstable.lowest:.3g} of the mean); "
            "change density or structure, or use reference: self_consistent"
        )
    values, vectors = _decompose(crystal, _spectrum(crystal, blocks))

    def power(exponent: float) -> np.ndarray:
        scaled = np.where(np.isfinite(values), np.where(np.isfinite(values), values, 1.0) ** exponent, 0.0)
        return np.einsum("qik,qk,qjk->qij", vectors, scaled, np.conj(vectors), optimize=True)

    finite = values[np.isfinite(values)]
    return Gaussian(
        mean=np.zeros((crystal.n_atoms, 3)) if mean is None else mean,
        root=_factor(crystal, power(-0.5)),
        inverse_root=_factor(crystal, power(0.5)),
        log_det=np.float64(-0.5 * np.log(finite).sum()),
    )


def _factor(crystal: Crystal, matrices: np.ndarray) -> np.ndarray:
    """Matrices per wave vector (n_translations, 3b, 3b) as `_dense` or `_circulant` wants them."""
    rows = matrices.shape[1]
    if not _is_dense(crystal):
        half = crystal.group[2] // 2 + 1
        grid = matrices.reshape(*crystal.group, rows, rows)[:, :, :half]
        return np.moveaxis(grid, (3, 4), (0, 1)).copy()
    blocks = _blocks(crystal, matrices)  # (b, t, b', 3, 3), relative to cell 0
    n_translations = len(crystal.site_of)
    steps = np.indices(crystal.group).reshape(3, -1).T
    dense = np.empty((crystal.n_atoms, 3, crystal.n_atoms, 3))
    for s in range(n_translations):
        apart = np.ravel_multi_index(tuple(((steps - steps[s]) % crystal.group).T), crystal.group)
        rows_of = crystal.site_of[s]
        # (b, t, b', 3, 3) -> rows (b, 3), columns (t, b', 3)
        dense[rows_of[:, None, None], :, crystal.site_of[None]] = blocks[:, apart]
    return dense.reshape(3 * crystal.n_atoms, 3 * crystal.n_atoms)


# --------------------------------------------------------------------- the three references


def harmonic_blocks(crystal: Crystal, force_constants: np.ndarray, beta: float) -> np.ndarray:
    """Precision blocks beta H from the Hessian's columns of cell 0, (n_atoms, 3, 3 n_basis) [energy/length**2]."""
    n_basis = crystal.site_of.shape[1]
    columns = force_constants[crystal.site_of].reshape(*crystal.site_of.shape, 3, n_basis, 3)  # (t, b', j, b, i)
    return symmetrised(crystal, beta * columns.transpose(3, 0, 1, 4, 2))


def isotropic_blocks(crystal: Crystal, blocks: np.ndarray) -> np.ndarray:
    """Einstein crystal: every atom on its own spring, the mean curvature of its diagonal block."""
    alone = np.zeros_like(blocks)
    for b in range(blocks.shape[0]):
        alone[b, 0, b] = np.eye(3) * np.trace(blocks[b, 0, b]) / 3
    return alone


class Fit(NamedTuple):
    """A fitted reference and what it took."""

    gaussian: Gaussian
    energy_evaluations: int
    kl_bound: float  # <u_B - u_A> - ln Z_A under the reference: an upper bound of -ln Z_B [kT]
    iterations: int
    step: FitStep | None = None  # that the Gaussian came from; None where nothing was fitted


EvaluateFn = Callable[
    [Gaussian, Float[np.ndarray, "batch n 3"]],
    tuple[Float[np.ndarray, " batch"], Float[np.ndarray, "batch n 3"]],
]


def fit_self_consistent(
    recipe: GaussianCrystal,
    start: np.ndarray,
    evaluate: EvaluateFn,
    seed: int,
    isotropic: bool = False,
    n_samples: int = 256,
    max_iterations: int = 12,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> Fit:
    """The Gaussian q that minimises KL(q || target), from forces alone.

    At the minimum the precision is the Boltzmann-averaged Hessian, P = <d2 u>_q. By Stein's
    identity the whitened gradient g = A du/dx obeys <g z^T> = A <d2 u> A, the unit matrix at the
    fixed point. Only the anharmonic remainder g - z is averaged: the harmonic part, known
    exactly, would bring nothing but noise. Samples come as antithetic pairs; averages run over
    the samples, the lattice translations and the point group.

    Args:
        recipe: Functions of the crystal's Gaussians.
        start: Precision blocks to start from, (n_basis, n_translations, n_basis, 3, 3).
        evaluate: Reduced potential relative to the lattice, and its gradient with respect to z, of
            a batch of white z under a Gaussian.
        seed: For the samples.
        isotropic: Keep every atom's precision a multiple of the unit matrix (Einstein crystal).
        n_samples: Evaluations per iteration.
        max_iterations: When to give up improving.
        progress: Called with the iteration and the KL bound per atom.

    Raises:
        InputError: If energies or forces are not finite.
    """
    first = DisplacementFit.start(recipe.crystal, start, isotropic)
    return converged(recipe, first, evaluate, seed, n_samples, max_iterations, progress)


@runtime_checkable
class FitStep(Protocol):
    """A Gaussian on its way to the fixed point, immutable."""

    def gaussian(self) -> Any:
        """Parameters as the recipe takes them."""
        ...

    def noise(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """White z (n, rows, 3)."""
        ...

    def improved(self, z: np.ndarray, gradient: np.ndarray) -> tuple[Any, float]:
        """The next one, from samples and the target's gradient with respect to z, and the KL gain foreseen [kT]."""
        ...

    def widened(self, z: np.ndarray) -> tuple[Any, int]:
        """The one as wide as samples z of the target in modes that are far too narrow, and how many these are."""
        ...


@dataclass(frozen=True)
class DisplacementFit:
    """Precision and mean of a Gaussian crystal on their way to the fixed point."""

    crystal: Crystal
    blocks: np.ndarray  # (n_basis, n_translations, n_basis, 3, 3) [1/length**2]
    mean: np.ndarray  # (n_atoms, 3) [length]
    isotropic: bool = False  # every atom's precision is a multiple of the unit matrix

    @classmethod
    def start(cls, crystal: Crystal, blocks: np.ndarray, isotropic: bool = False) -> DisplacementFit:
        """From precision blocks, which need not be positive."""
        blocks = _stabilised(crystal, blocks)
        if isotropic:
            blocks = isotropic_blocks(crystal, blocks)
        return cls(crystal, blocks, np.zeros((crystal.n_atoms, 3)), isotropic)

    def gaussian(self) -> Gaussian:
        """The Gaussian."""
        return gaussian_from_blocks(self.crystal, self.blocks, self.mean)

    def noise(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """White z (n, n_atoms, 3), mean-free."""
        z = rng.standard_normal((n, self.crystal.n_atoms, 3))
        return z - z.mean(axis=1, keepdims=True)

    @functools.cached_property
    def root_precision(self) -> np.ndarray:
        """P^(1/2) (n_translations, 3b, 3b), zero on the uniform translations."""
        values, vectors = _decompose(self.crystal, _spectrum(self.crystal, self.blocks))
        root = np.where(np.isfinite(values), np.sqrt(np.where(np.isfinite(values), values, 0.0)), 0.0)
        return np.einsum("qik,qk,qjk->qij", vectors, root, np.conj(vectors), optimize=True)

    def periodic_step(self, g: np.ndarray) -> np.ndarray:
        """Displacement A <g> (n_atoms, 3) of the basis atoms that would take the mean force A^-1 <g> to zero."""
        return _uniform_newton(self.crystal, self.root_precision[0].real, g)

    def improved(self, z: np.ndarray, gradient: np.ndarray) -> tuple[DisplacementFit, float]:
        """See `FitStep`."""
        crystal, root = self.crystal, self.root_precision
        correction, gain = _correction(crystal, z, gradient - z, self.isotropic)
        blocks = _blocks(crystal, root @ (np.eye(root.shape[1]) + correction) @ root)
        if self.isotropic:
            blocks = isotropic_blocks(crystal, blocks)
        mean = self.mean - _symmetric_vector(crystal, self.periodic_step(gradient.mean(axis=0)))
        return replace(self, blocks=blocks, mean=mean), gain

    def widened(self, z: np.ndarray) -> tuple[DisplacementFit, int]:
        """See `FitStep`."""
        crystal, root = self.crystal, self.root_precision
        mean = _symmetric_vector(crystal, z.mean(axis=0))
        values, vectors = np.linalg.eigh(_covariance(crystal, z - mean, z - mean))
        wide = far_wider(values, len(z))
        if self.isotropic or not wide.any():
            return self, 0
        narrowing = 1 / np.where(wide, values, 1.0)
        inside = np.einsum("qik,qk,qjk->qij", vectors, narrowing, np.conj(vectors), optimize=True)
        moved = self.mean + _symmetric_vector(crystal, self.periodic_step(mean))
        return replace(self, blocks=_blocks(crystal, root @ inside @ root), mean=moved), int(wide.sum())


def converged(
    recipe: GaussianCrystal,
    step: FitStep,
    evaluate: EvaluateFn,
    seed: int,
    n_samples: int = 256,
    max_iterations: int = 12,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> Fit:
    """Iterate to the Gaussian that minimises KL(q || target); see `fit_self_consistent`.

    Args:
        recipe: The functions of the Gaussian.
        step: Makes the next Gaussian from the averages of one iteration.
        evaluate: Reduced potentials of white samples [kT], and their gradients.
        seed: Of the random numbers.
        n_samples: Per iteration, antithetic ones counted.
        max_iterations: After which it ends in any case.
        progress: Told the number of every iteration and its KL bound [kT per atom].

    Raises:
        InputError: If energies or forces near the lattice are not finite.
    """
    rng, n_atoms = np.random.default_rng(seed), recipe.crystal.n_atoms
    bounds: list[float] = []
    best: tuple[float, Any, FitStep] | None = None
    for iteration in range(max_iterations):
        gaussian = step.gaussian()
        half = step.noise(rng, n_samples // 2)
        z = np.concatenate([half, -half])
        u_b, g = evaluate(gaussian, z)
        if not np.isfinite(u_b).all() or not np.isfinite(g).all():
            raise InputError(
                "potential: energies or forces are not finite near the lattice; check density, temperature and units"
            )
        # <|z|^2> is known; pairing each energy with its own |z|^2 takes out most of the noise.
        excess = u_b - 0.5 * (z**2).sum(axis=(1, 2))
        bounds.append(float(excess.mean()) - recipe.log_normalisation(gaussian))
        progress(iteration, bounds[-1] / n_atoms)
        if best is None or bounds[-1] < best[0]:
            best = (bounds[-1], gaussian, step)
        step, gain = step.improved(z, g)
        noise = float(excess.std() / math.sqrt(n_samples / 2))
        negligible, small = (max(total, per_atom * n_atoms) for total, per_atom in (_NEGLIGIBLE_GAIN, _SMALL_GAIN))
        stalled = len(bounds) > 2 and bounds[-1] > bounds[-2] - 0.1 * noise and gain < small
        if stalled or gain < negligible:
            break
    assert best is not None
    bound, gaussian, step = best
    return Fit(gaussian, n_samples * len(bounds), bound, len(bounds), step)


def far_wider(values: np.ndarray, n_samples: int) -> np.ndarray:
    """Which eigenvalues (..., d) of a covariance of white coordinates are of modes far wider than the reference.

    Chance alone brings those of n samples of d coordinates up to (1 + sqrt(d / n))^2 (Marchenko and Pastur, Math. USSR
    Sb. 1, 457, 1967).
    """
    return values > _FAR_WIDER * (1 + math.sqrt(values.shape[-1] / n_samples)) ** 2


def _uniform_newton(crystal: Crystal, root_p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Displacement A <g> (n_atoms, 3) of the basis atoms that would take the mean force to zero."""
    step = np.linalg.pinv(root_p, hermitian=True) @ g[crystal.site_of].mean(axis=0).reshape(-1)
    everywhere = np.empty_like(g)
    everywhere[crystal.site_of] = step.reshape(1, -1, 3)
    return everywhere


def _correction(crystal: Crystal, z: np.ndarray, rest: np.ndarray, isotropic: bool) -> tuple[np.ndarray, float]:
    """Hermitian <rest z^T> per wave vector, kept from overshooting, and the KL gain it promises [kT]."""
    product = _covariance(crystal, rest, z)
    if isotropic:
        product = _spectrum(crystal, isotropic_blocks(crystal, _blocks(crystal, product)))
    values, vectors = np.linalg.eigh(product)
    gain = float(0.25 * (values**2).sum())
    bounded = np.clip(values, -0.6, 1.5)
    return np.einsum("qik,qk,qjk->qij", vectors, bounded, np.conj(vectors), optimize=True), gain


def _covariance(crystal: Crystal, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Hermitian part of <x y^T> per wave vector, averaged over the crystal's symmetry (n_translations, 3b, 3b)."""
    n, (n_translations, n_basis) = len(x), crystal.site_of.shape

    def waves(x: np.ndarray) -> np.ndarray:
        grid = x[:, crystal.site_of].reshape(n, *crystal.group, 3 * n_basis)
        return np.fft.fftn(grid, axes=(1, 2, 3)).reshape(n, n_translations, 3 * n_basis)

    product = np.einsum("nqi,nqj->qij", waves(x), np.conj(waves(y)), optimize=True) / (n * n_translations)
    blocks = _blocks(crystal, 0.5 * (product + np.conj(product.transpose(0, 2, 1))))
    return _spectrum(crystal, symmetrised(crystal, blocks))


def _symmetric_vector(crystal: Crystal, x: np.ndarray) -> np.ndarray:
    """Average of a displacement field (n_atoms, 3) over translations and point operations, mean-free."""
    periodic = np.empty_like(x)
    periodic[crystal.site_of] = x[crystal.site_of].mean(axis=0)[None]
    total = np.zeros_like(x)
    for rotation, image in zip(crystal.operations, crystal.operation_sites, strict=True):
        total[image] += periodic @ rotation.T
    total /= len(crystal.operations)
    return total - total.mean(axis=0)


def _stabilised(crystal: Crystal, blocks: np.ndarray) -> np.ndarray:
    """The same matrix with negative and vanishing eigenvalues lifted, to start an iteration from."""
    if instability(crystal, blocks) is None:
        return blocks
    values, vectors = _decompose(crystal, _spectrum(crystal, blocks))
    finite = np.isfinite(values)
    scale = np.abs(values[finite]).mean()
    lifted = np.where(finite, np.maximum(np.abs(np.where(finite, values, 0.0)), 0.05 * scale), 0.0)
    return _blocks(crystal, np.einsum("qik,qk,qjk->qij", vectors, lifted, np.conj(vectors), optimize=True))
