"""Strains, deformations and the measure of cell shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm, expm_frechet

from freeflow.cells import (
    CELL_MOTIONS,
    LARGEST_STRETCH,
    coordinates_of,
    deformation,
    log_shape_measure,
    strain_of,
    within_reach,
)


def strains(n, size, seed=0):
    """Symmetric matrices whose largest eigenvalue has this modulus."""
    a = np.random.default_rng(seed).standard_normal((n, 3, 3))
    a = a + np.swapaxes(a, 1, 2)
    return size * a / np.abs(np.linalg.eigvalsh(a)).max(axis=1)[:, None, None]


@pytest.mark.parametrize("motion", CELL_MOTIONS.values(), ids=CELL_MOTIONS)
def test_bases_are_orthonormal_and_symmetric(motion):
    gram = np.einsum("jab,kab->jk", motion.basis, motion.basis)
    np.testing.assert_allclose(gram, np.eye(motion.n_strains), atol=1e-15)
    np.testing.assert_array_equal(motion.basis, np.swapaxes(motion.basis, 1, 2))
    # The first coordinate changes the volume, the others do not.
    np.testing.assert_allclose(np.trace(motion.basis, axis1=1, axis2=2), [np.sqrt(3)] + [0] * (motion.n_strains - 1))
    c = jnp.arange(1.0, 1 + motion.n_strains)
    np.testing.assert_allclose(coordinates_of(motion, strain_of(motion, c)), c, rtol=1e-14)


def test_deformation_is_the_exponential():
    for strain in strains(20, LARGEST_STRETCH):
        np.testing.assert_allclose(deformation(jnp.asarray(strain)), expm(strain), atol=2e-15)


def test_reach_is_that_of_the_eigenvalues():
    check = jax.jit(jax.vmap(within_reach))
    assert np.asarray(check(strains(200, LARGEST_STRETCH * (1 - 1e-6)))).all()
    assert not np.asarray(check(strains(200, LARGEST_STRETCH * (1 + 1e-6)))).any()
    assert not np.asarray(check(np.stack([0.2 * np.eye(3), -0.2 * np.eye(3), 0.5 * np.diag([1, 1, -1])]))).any()


def test_shape_measure_is_a_product_over_pairs_of_eigenvalues():
    for strain in strains(20, LARGEST_STRETCH):
        a, b, c = np.linalg.eigvalsh(strain)
        exact = sum(np.log(np.sinh(d) / d) for d in (b - a, c - b, c - a))
        assert float(log_shape_measure(jnp.asarray(strain))) == pytest.approx(exact, abs=1e-8)


def test_shape_measure_is_the_jacobian_of_the_polar_decomposition():
    """dh / det(h)^3 of h = R exp(s), with R in exponential coordinates at the identity."""
    motion = CELL_MOTIONS["triclinic"]
    generators = np.array([[[0, 0, 0], [0, 0, -1], [0, 1, 0]], [[0, 0, 1], [0, 0, 0], [-1, 0, 0]]])
    generators = np.concatenate([generators, [[[0, -1, 0], [1, 0, 0], [0, 0, 0]]]])

    def log_jacobian(strain):
        f = expm(strain)
        moved = [w @ f for w in generators] + [expm_frechet(strain, b, compute_expm=False) for b in motion.basis]
        return np.linalg.slogdet(np.reshape(moved, (9, 9)))[1] - 3 * np.log(np.linalg.det(f))

    at_rest = log_jacobian(np.zeros((3, 3)))
    for strain in strains(10, LARGEST_STRETCH, seed=1):
        exact = log_jacobian(strain) - at_rest
        assert float(log_shape_measure(jnp.asarray(strain))) == pytest.approx(exact, abs=1e-8)


def test_shape_measure_does_not_depend_on_the_reference_cell():
    """The integral of a function of the cell, taken around one reference cell or another: by Monte Carlo weights."""
    motion = CELL_MOTIONS["triclinic"]
    moved = expm(strains(1, 0.02, seed=2)[0])
    rng = np.random.default_rng(0)
    width = 0.02
    c = width * rng.standard_normal((200_000, 6))
    s = np.einsum("nk,kab->nab", c, motion.basis)
    measure = np.asarray(jax.jit(jax.vmap(log_shape_measure))(s))
    values, axes = np.linalg.eigh(s)
    metric = np.einsum("nak,nk,nbk->nab", axes, np.exp(2 * values), axes)  # h^T h, without the rotation

    def bump(metric):  # of the distance to a cell of its own
        return np.exp(-np.sum((metric - moved @ moved) ** 2, axis=(1, 2)) / (8 * width**2))

    log_q = -0.5 * (c**2).sum(axis=1) / width**2
    here = bump(metric) * np.exp(measure - log_q)
    there = bump(np.einsum("ab,nbc,cd->nad", moved, metric, moved)) * np.exp(measure - log_q)
    difference = here - there
    assert abs(difference.mean()) < 4.5 * difference.std() / np.sqrt(len(c))
    assert difference.std() / np.sqrt(len(c)) < 0.02 * here.mean()
