"""Networks: symmetries, dtypes, and nothing at initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freeflow.networks import fourier_features, local, mlp, transformer

pytestmark = pytest.mark.code("brief")

RING = (np.arange(6)[:, None] + np.array([-1, 1])) % 6  # neighbours of six atoms on a ring
SMALL = transformer(2, 8, 2, (2, 5), 3)


def randomised(params, seed=0, scale=0.5):
    """The parameters with noise on every number, zeros of the last layer included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + jnp.asarray(scale * rng.standard_normal(p.shape), p.dtype), params)


def positions(n_atoms, n_axes, dtype="float64", seed=1):
    return np.random.default_rng(seed).random((n_atoms, n_axes)).astype(dtype)


NETWORKS = {
    "mlp": (mlp(8, 2, 3), (positions(6, 2),)),
    "linear": (mlp(8, 0, 3), (positions(6, 2),)),
    "transformer": (SMALL, (positions(6, 2),)),
    "local": (local(RING, 8, 1, (3, 2)), (positions(6, 3), positions(6, 2, seed=2))),
}


def compiled(name, dtype="float64"):
    """init and apply of a network, and its inputs."""
    network, inputs = NETWORKS[name]
    return jax.jit(network.init), jax.jit(network.apply), tuple(jnp.asarray(x, dtype) for x in inputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_start_at_zero_and_can_leave_it(name):
    init, apply, inputs = compiled(name)
    params = init(jax.random.key(0), *inputs)
    np.testing.assert_array_equal(apply(params, *inputs), 0.0)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, *inputs))))(params)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 0.1
    assert (jnp.abs(apply(randomised(params), *inputs)) > 0).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_follow_the_inputs_dtype(name):
    init, apply, single = compiled(name, "float32")
    params = init(jax.random.key(0), *single)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    params = randomised(params)
    out = apply(params, *single)
    assert out.dtype == np.float32
    wide = apply(jax.tree.map(lambda p: p.astype("float64"), params), *(x.astype("float64") for x in single))
    assert wide.dtype == np.float64
    np.testing.assert_allclose(out, wide, rtol=1e-4, atol=1e-5)
    assert np.abs(out - wide).max() > 0  # evaluated in float64, not only converted


def test_fourier_features_are_sines_then_cosines():
    got = fourier_features(jnp.array([[0.0, 0.25]]), 2)
    np.testing.assert_allclose(got, [[[0, 0, 1, 1], [1, 0, 0, -1]]], atol=1e-15)


def test_fourier_features_keep_their_digits_many_periods_away():
    x = jnp.asarray(positions(5, 3, "float32"))
    np.testing.assert_allclose(fourier_features(x + 8, 24), fourier_features(x, 24), atol=24 * 2 * np.pi * 5e-7)


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_transformer_is_permutation_equivariant(seed):
    init, apply, _ = compiled("transformer")
    x = jnp.asarray(positions(6, 2, seed=seed))
    params = randomised(init(jax.random.key(0), x))
    order = jax.random.permutation(jax.random.key(seed), 6)
    out = apply(params, x)
    assert out.shape == (6, 2, 5)
    np.testing.assert_allclose(apply(params, x[order]), out[order], atol=1e-12)


def test_transformer_lets_every_atom_see_every_other():
    init, apply, (x,) = compiled("transformer")
    params = randomised(init(jax.random.key(0), x))
    seen = jax.jit(jax.jacobian(lambda x: apply(params, x).sum(axis=(1, 2))))(x)
    assert (jnp.abs(seen).max(axis=2) > 1e-9).all()


def test_transformer_is_periodic():
    init, apply, (x,) = compiled("transformer")
    params = randomised(init(jax.random.key(0), x))
    laps = np.arange(12.0).reshape(6, 2) - 5
    np.testing.assert_allclose(apply(params, x + laps), apply(params, x), atol=1e-12)


def test_transformer_refuses_heads_that_do_not_divide_its_width():
    with pytest.raises(ValueError, match="multiple of the 3 heads"):
        transformer(1, 8, 3, (1,), 1)


def test_local_sees_its_neighbours_alone_and_no_common_shift():
    init, apply, (x, own) = compiled("local")
    params = randomised(init(jax.random.key(0), x, own))
    out = apply(params, x, own)
    assert out.shape == (6, 3, 2)
    np.testing.assert_allclose(apply(params, x + jnp.array([[3.0, -1.0, 2.0]]), own), out, atol=1e-12)
    seen = jax.jit(jax.jacobian(lambda x: apply(params, x, own).sum(axis=(1, 2))))(x)  # (centre, atom, axis)
    expected = np.zeros((6, 6), bool)
    expected[np.arange(6)[:, None], RING] = True
    np.testing.assert_array_equal(np.abs(seen).max(axis=2) > 1e-9, expected)


def test_local_parameters_serve_any_number_of_atoms():
    init, apply, (x, own) = compiled("local")
    params = randomised(init(jax.random.key(0), x, own))
    twice = (np.arange(12)[:, None] + np.array([-1, 1])) % 12
    # Two turns of the same ring: every atom sees what it saw before.
    out = jax.jit(local(twice, 8, 1, (3, 2)).apply)(params, jnp.tile(x, (2, 1)), jnp.tile(own, (2, 1)))
    np.testing.assert_allclose(out, jnp.tile(apply(params, x, own), (2, 1, 1)), atol=1e-12)
