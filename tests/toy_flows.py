"""Small flows with known answers, for tests of training and of checkpoints."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from fake_results import fake_system

from freeflow import references
from freeflow.flows.core import Flow, training_ensemble
from freeflow.training import Baseline
from freeflow.types import Bijector, Ensemble, ThermodynamicState

STATE = ThermodynamicState(np.float64(1.0), np.float64(0.0))
CENTRE, WIDTH = np.array([0.3, -0.2, 0.1]), np.array([0.5, 1.5, 0.8])
BASE = Baseline(-1.5 * math.log(2 * math.pi), 3)  # beta F = -ln Z of the target: no other constants
LOG_PARTITION = 1.5 * math.log(2 * math.pi) + float(np.log(WIDTH).sum())
EXACT = {"log_width": np.log(WIDTH).astype("float32"), "centre": CENTRE.astype("float32")}


def affine():
    def forward(params, x, state):
        return jnp.exp(params["log_width"]) * x + params["centre"], jnp.sum(params["log_width"])

    def inverse(params, y, state):
        return (y - params["centre"]) / jnp.exp(params["log_width"]), -jnp.sum(params["log_width"])

    return Bijector(lambda key, x, state: {"log_width": 0 * x, "centre": 0 * x}, forward, inverse)


def gaussian_flow(quartic=0.0, training_target=None):
    """Three numbers: a standard normal reference, a normal (or quartic) target, an affine map between."""

    def target(y, state):
        z = (y - jnp.asarray(CENTRE, y.dtype)) / jnp.asarray(WIDTH, y.dtype)
        return state.beta * jnp.sum(0.5 * z**2 + quartic * z**4)

    def sample(key, state):
        return jax.random.normal(key, (3,), jnp.asarray(state.beta).dtype)

    crystal = fake_system().crystal  # bridges are not for this one
    return Flow(
        architecture="toy",
        options={},
        reference=Ensemble(lambda x, state: 0.5 * jnp.sum(x**2), sample, lambda state: 1.5 * math.log(2 * math.pi)),
        target=Ensemble(target),
        training_target=Ensemble(training_target or target),
        bijector=affine(),
        log_measure=0.0,
        displacements=lambda y: y,
        coordinates=lambda u: u,
        transferable=True,
        recipe=references.gaussian_crystal(crystal),
        gaussian=references.Gaussian(np.zeros((64, 3)), np.eye(192), np.eye(192), np.float64(0.0)),
    )


def isotropic(crystal, width=0.12):
    """Independent Gaussians of this width [length]."""
    n_translations, n_basis = crystal.site_of.shape
    blocks = np.zeros((n_basis, n_translations, n_basis, 3, 3))
    for b in range(n_basis):
        blocks[b, 0, b] = np.eye(3) / width**2
    return references.gaussian_from_blocks(crystal, blocks)


def fit_gaussian(system, plan, report):
    """Stands in for the pipeline's, and fits nothing."""
    return references.Fit(isotropic(system.crystal), 0, math.nan, 0)


def residual(system, gaussian, *, width=1):
    """A crystal's flow with `width` parameters, whose sum scales all displacements."""
    own = references.gaussian_crystal(system.crystal).ensemble(gaussian)

    def scaled(params, x, sign):
        log_scale = sign * jnp.sum(params["log_scale"])
        return jnp.exp(log_scale) * x, 3 * (system.n_atoms - 1) * log_scale

    bijector = Bijector(
        lambda key, x, state: {"log_scale": jnp.zeros(width, x.dtype)},
        lambda params, x, state: scaled(params, x, 1),
        lambda params, y, state: scaled(params, y, -1),
    )

    def sample(key, state):
        return own.sample(key, state).astype(jnp.asarray(state.beta).dtype)

    return Flow(
        architecture="residual",
        options={"width": width},
        reference=Ensemble(own.reduced_potential, sample, own.log_partition),
        target=system.target,
        training_target=training_ensemble(system),
        bijector=bijector,
        log_measure=0.0,
        displacements=lambda y: y,
        coordinates=lambda u: u,
        transferable=True,
        recipe=references.gaussian_crystal(system.crystal),
        gaussian=gaussian,
    )


def clock(monkeypatch, module, seconds_per_step=0.01):
    """Time that passes only where a fake compiled trainer says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(
        module, "time", SimpleNamespace(monotonic=lambda: now.seconds, perf_counter=lambda: now.seconds)
    )
    return now
