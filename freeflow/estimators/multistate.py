"""Free energies of many states at once from their reduced potentials (MBAR)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_softmax
from jax.scipy.special import logsumexp

from freeflow.errors import InputError
from freeflow.estimators.two_state import Samples, require_float64
from freeflow.types import in_double_precision

_MAX_ITERATIONS = 1000
_SMALLEST_BUFFER = 1 << 12  # one size for most runs: compiling takes longer than computing


class MBAREstimate(NamedTuple):
    """Free energies of K states in kT, relative to the first."""

    f_k: jax.Array  # (K,), f_k[0] = 0
    std_error: jax.Array  # (K, K), of f_k[j] - f_k[i]
    overlap: jax.Array  # (K, K), rows sum to 1: probability that a sample of i could be one of j


@in_double_precision
def mbar(u_kn: Samples, n_k: np.ndarray | list[int] | tuple[int, ...]) -> MBAREstimate:
    """Multistate Bennett acceptance ratio [kT].

    Newton's method, or a step of the self-consistent iteration wherever that reduces the gradient
    more. States without samples are allowed, and get their free energy by reweighting. The samples
    must be independent.

    Args:
        u_kn: Reduced potential of every sample in every state, shape (K, N), in any order of samples.
        n_k: Number of samples drawn from each state, shape (K,); they add up to N.

    Raises:
        InputError: If the shapes disagree, there are zero samples, a value is NaN or minus
            infinity, or the iteration does not converge because some states do not overlap.
        PrecisionError: If the potentials are not float64.

    References: Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008), eqs 11, 8 and D6; overlap:
        Klimovich, Shirts and Mobley, J. Comput. Aided Mol. Des. 29, 397 (2015).
    """
    u = np.asarray(require_float64(u_kn, "u_kn"))
    counts = np.asarray(n_k)
    if u.ndim != 2 or counts.shape != u.shape[:1] or counts.sum() != u.shape[1] or np.any(counts < 0):
        raise InputError(f"u_kn of shape {u.shape} needs n_k of shape (K,) adding up to N, got {counts.tolist()}")
    if u.shape[1] == 0:
        raise InputError("u_kn holds zero samples: nothing to estimate from")
    if np.any(np.isnan(u) | np.isneginf(u)) or not np.all(np.isfinite(u[counts > 0]).any(axis=0)):
        raise InputError("u_kn holds NaN, minus infinity, or a sample that no sampled state allows")
    # Only differences between states matter: taking out the smallest keeps their digits.
    buffer, valid = _padded(u - np.min(u, axis=0))
    sampled = counts > 0
    n_sampled = counts[sampled].astype(np.float64)
    if sampled.sum() > 1:
        f_sampled, converged = _solve(buffer[sampled], valid, n_sampled)
        if not bool(converged):
            raise InputError("mbar did not converge: some states do not overlap; add states between them")
    else:
        f_sampled = np.zeros(1)
    # As NumPy arrays: outside `double_precision` JAX silently turns the result of `f_k - 1.0` into float32.
    return jax.device_get(_finish(buffer, valid, counts.astype(np.float64), buffer[sampled], n_sampled, f_sampled))


def _padded(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of u (K, N) filled up to a power of four, so that few sizes are compiled, and (1, n) which are data."""
    size = _SMALLEST_BUFFER
    while size < u.shape[1]:
        size *= 4
    buffer = np.zeros((len(u), size))
    buffer[:, : u.shape[1]] = u
    return buffer, np.arange(size)[None] < u.shape[1]


@jax.jit
def _solve(u: jax.Array, valid: jax.Array, n: jax.Array) -> tuple[jax.Array, Any]:
    """Free energies (K,) of the sampled states, and whether the iteration converged."""

    def responsibilities(f):
        return jnp.where(valid, jnp.exp(log_softmax(jnp.log(n)[:, None] + f[:, None] - u, axis=0)), 0.0)

    def gradient_norm(f):
        norm = jnp.linalg.norm(responsibilities(f).sum(axis=1) - n)
        return jnp.where(jnp.isnan(norm), jnp.inf, norm)

    def improve(state):
        f, _, iteration = state
        p = responsibilities(f)
        total = p.sum(axis=1)
        hessian = jnp.diag(total) - p @ p.T
        # The common shift of all f_k is free: keep the first at zero.
        newton = f - jnp.concatenate([jnp.zeros(1), jnp.linalg.solve(hessian[1:, 1:], (total - n)[1:])])
        iterated = f - jnp.log(total / n)
        iterated = iterated - iterated[0]
        new = jnp.where(gradient_norm(newton) <= gradient_norm(iterated), newton, iterated)
        return new, jnp.max(jnp.abs(new - f)), iteration + 1

    def unfinished(state):
        f, step, iteration = state
        return (step > 1e-12 * (1 + jnp.max(jnp.abs(f)))) & (iteration < _MAX_ITERATIONS)

    f, _, iteration = jax.lax.while_loop(unfinished, improve, (jnp.zeros_like(n), jnp.inf, 0))
    return f, iteration < _MAX_ITERATIONS


@jax.jit
def _finish(u, valid, n, u_sampled, n_sampled, f_sampled) -> MBAREstimate:
    """All states from the sampled ones: free energies, covariance and overlap."""
    log_mixture = logsumexp(jnp.log(n_sampled)[:, None] + f_sampled[:, None] - u_sampled, axis=0)
    log_weights = jnp.where(valid, -u - log_mixture[None, :], -jnp.inf)
    f = -logsumexp(log_weights, axis=1)
    weights = jnp.exp(log_weights + f[:, None])
    gram = weights @ weights.T
    # Eq. D6. Its middle matrix has eigenvalues in [0, 1], exactly one of them zero (the common
    # shift), which the pseudo-inverse must drop and rounding must not revive.
    squares, vectors = jnp.linalg.eigh(gram)
    root = vectors * jnp.sqrt(jnp.maximum(squares, 0.0))[None, :]
    middle = jnp.eye(len(n)) - root.T @ (n[:, None] * root)
    theta = root @ jnp.linalg.pinv(middle, rtol=1e-12, hermitian=True) @ root.T
    variance = jnp.diag(theta)[:, None] + jnp.diag(theta)[None, :] - 2 * theta
    return MBAREstimate(f - f[0], jnp.sqrt(jnp.maximum(variance, 0.0)), gram * n[None, :])
