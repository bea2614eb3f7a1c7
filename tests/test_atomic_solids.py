"""The atomic-solids flow: known free energies, exact densities, symmetries, Jacobians."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from scipy.spatial.transform import Rotation

from freeflow import load
from freeflow.crystals import crystal_system, lattice_crystal
from freeflow.errors import InputError
from freeflow.flows import atomic_solids, position_symmetries, softened
from freeflow.flows.atomic_solids import einstein_width, torus_coordinates, truncated_gaussians
from freeflow.geometry import nearest_neighbour_distance, neighbour_table
from freeflow.potentials import force_constants, lennard_jones
from freeflow.types import Ensemble, ThermodynamicState
from freeflow.units import UNIT_STYLES

pytestmark = pytest.mark.code("brief")

TINY = {"n_layers": 2, "n_blocks": 1, "width": 8, "n_heads": 2, "n_bins": 4, "n_frequencies": 2}
STATE = ThermodynamicState(np.float64(1), np.float64(0))
SINGLE = ThermodynamicState(np.float32(1), np.float32(0))


@functools.cache
def crystal_of(name):
    """An orthorhombic crystal of 8 atoms and a hexagonal one of 36."""
    lattice, repeats = {"cubic": ("diamond", (1, 1, 1)), "hexagonal": ("hcp", (3, 3, 2))}[name]
    return lattice_crystal(lattice, repeats, number_density=1.1)


@functools.cache
def system_of(name):
    """Lennard-Jones nearest neighbours; what binds matters to few of these tests."""
    spacing = nearest_neighbour_distance(crystal_of(name))
    potential = lennard_jones(sigma=0.9 * spacing, cutoff=1.05 * spacing)
    return crystal_system(name, crystal_of(name), potential, UNIT_STYLES["lj"], 0.1, 1.0)


def with_springs(system, stiffness):
    """The system with springs between atom 0 and all others in place of its potential, and its ln Z_u."""
    n = system.n_atoms
    laplacian = np.eye(n) * np.where(np.arange(n) == 0, n - 1, 1.0)
    laplacian[0, 1:] = laplacian[1:, 0] = -1.0

    def reduced_potential(u, state):
        return 0.5 * stiffness * jnp.sum(u * (laplacian @ u))

    # In an orthonormal basis of mean-free displacements; the zero eigenvalue is the mean.
    eigenvalues = np.linalg.eigvalsh(stiffness * laplacian)
    assert abs(eigenvalues[0]) < 1e-9 * eigenvalues[-1]
    log_z = 1.5 * np.log(2 * np.pi / eigenvalues[1:]).sum()
    return dataclasses.replace(system, target=Ensemble(reduced_potential)), log_z


def randomised(params, scale, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + jnp.asarray(scale * rng.standard_normal(p.shape), p.dtype), params)


@functools.cache
def untrained_flow(n_layers):
    """A flow, parameters to begin with, and its maps, compiled."""
    flow = atomic_solids(system_of("cubic"), **{**TINY, "stddev": 0.03, "n_layers": n_layers})
    x = jnp.asarray(np.random.default_rng(0).random((7, 3)))
    params = jax.jit(flow.bijector.init)(jax.random.key(1), x, STATE)
    return flow, params, jax.jit(flow.bijector.forward), jax.jit(flow.bijector.inverse)


def tiny_flow(scale=0.1, n_layers=2):
    """The same, parameters with noise."""
    flow, params, forward, inverse = untrained_flow(n_layers)
    return flow, randomised(params, scale), forward, inverse


def samples(flow, n, state=STATE, seed=2):
    return jax.jit(jax.vmap(flow.reference.sample, (0, None)))(jax.random.split(jax.random.key(seed), n), state)


def modulo_one(difference):
    return difference - np.round(difference)


# ------------------------------------------------------------------------- free energies


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), [("cubic", 0.003), ("hexagonal", 0.0005)])
def test_exponential_average_gives_a_known_free_energy(name, scale):
    """Measure, cell, truncation and log det together, whatever the parameters; 5 sigma, 1 in 10^6."""
    # The spheres end where the springs leave one atom in 10^5.
    stddev = nearest_neighbour_distance(crystal_of(name)) / 10.5
    system, log_z = with_springs(system_of(name), 1.1 / stddev**2)
    flow = atomic_solids(system, **TINY, stddev=stddev)
    start = jax.jit(flow.bijector.init)(jax.random.key(1), samples(flow, 1)[0], STATE)

    def work(params, key):
        x = flow.reference.sample(key, STATE)
        y, log_det = flow.bijector.forward(params, x, STATE)
        return flow.target.reduced_potential(y, STATE) - flow.reference.reduced_potential(x, STATE) - log_det

    works = jax.jit(jax.vmap(work, (None, 0)))
    keys = jax.random.split(jax.random.key(3), 4096)
    spread = []
    for params in (start, randomised(start, scale)):
        weights = np.exp(-np.asarray(works(params, keys)))
        estimate = math.log(weights.mean()) + flow.reference.log_partition(STATE) + flow.log_measure
        std_error = weights.std() / weights.mean() / math.sqrt(len(weights))
        assert abs(estimate - log_z) < 5 * std_error
        spread.append(std_error)
    assert 0 < 1.2 * spread[0] < spread[1] < 0.05


def test_springs_of_the_references_width_leave_no_noise():
    stddev = 0.03
    system, log_z = with_springs(system_of("hexagonal"), 1 / stddev**2)
    flow = atomic_solids(system, **TINY, stddev=stddev)
    x = samples(flow, 8)
    w = [flow.target.reduced_potential(y, STATE) - flow.reference.reduced_potential(y, STATE) for y in x]
    np.testing.assert_allclose(w, 0.0, atol=1e-9)
    assert flow.reference.log_partition(STATE) + flow.log_measure == pytest.approx(log_z, abs=1e-9)


# ------------------------------------------------------------------------- reference


@pytest.mark.parametrize("end", [0.5, 1.5, 4.0, 9.0])
def test_truncated_gaussians_are_normalised(end):
    crystal, stddev = crystal_of("hexagonal"), 0.04
    reference = truncated_gaussians(crystal, stddev, end * stddev)
    one, _ = quad(lambda r: 4 * math.pi * r**2 * math.exp(-0.5 * (r / stddev) ** 2), 0, end * stddev, epsabs=0)
    n = crystal.n_atoms
    assert reference.log_partition(STATE) == pytest.approx((n - 1) * math.log(one / crystal.volume), rel=1e-9)


@pytest.mark.parametrize("state", [STATE, SINGLE])
@pytest.mark.parametrize("end", [1.0, 5.0])
def test_truncated_gaussians_are_sampled_exactly(end, state):
    """Kolmogorov-Smirnov tests of lengths and directions, one false alarm in 10^5 each, seed fixed."""
    crystal, stddev = crystal_of("hexagonal"), 0.04
    reference = truncated_gaussians(crystal, stddev, end * stddev)
    keys = jax.random.split(jax.random.key(4), 1000)
    x = jax.jit(jax.vmap(reference.sample, (0, None)))(keys, state)
    assert x.dtype == state.beta.dtype
    assert np.isfinite(jax.vmap(reference.reduced_potential, (0, None))(x, state)).all()
    sites = ((crystal.sites - crystal.sites[0]) @ np.linalg.inv(crystal.cell))[1:]
    d = modulo_one(np.asarray(x, float) - sites) @ crystal.cell / stddev
    r = np.linalg.norm(d, axis=-1)
    assert r.max() <= end * (1 + 1e-4)
    chi3 = stats.chi(3)
    assert stats.kstest(r.ravel(), lambda r: chi3.cdf(r) / chi3.cdf(end)).pvalue > 1e-5
    turned = (d / r[..., None]) @ Rotation.from_euler("xyz", [0.3, 0.5, 0.7]).as_matrix()
    for component in np.moveaxis(turned, -1, 0):  # of a random direction: uniform in (-1, 1)
        assert stats.kstest(component.ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-5
    # Neighbours in the list know nothing of each other.
    assert stats.pearsonr(r[:, :-1].ravel(), r[:, 1:].ravel()).pvalue > 1e-5


def test_reference_ends_at_its_spheres():
    crystal = crystal_of("hexagonal")
    reference = truncated_gaussians(crystal, 0.04, 0.1)
    _, coordinates = torus_coordinates(crystal)
    u = np.zeros((crystal.n_atoms, 3))
    for length, inside in [(0.0999, True), (0.1001, False)]:
        u[3] = length * np.array([0.6, 0.0, -0.8])
        value = reference.reduced_potential(coordinates(jnp.asarray(u)), STATE)
        assert np.isfinite(value) == inside
        if inside:
            assert value == pytest.approx(0.5 * (length / 0.04) ** 2, rel=1e-9)


def test_default_width_is_the_einstein_crystals_at_low_temperature():
    """There the bound is lowest where 1/s^2 is beta times the mean curvature; half a percent of noise."""
    crystal = lattice_crystal("fcc", (2, 2, 2), number_density=1.0)
    system = crystal_system("cold", crystal, lennard_jones(cutoff=1.5), UNIT_STYLES["lj"], 1e-5, 1.0)
    table = neighbour_table(crystal, 1.5)
    curvature = np.trace(force_constants(system.potential, table, np.array([0]))[0]) / 3
    assert einstein_width(system) == pytest.approx(math.sqrt(1e-5 / curvature), rel=0.02)


# ------------------------------------------------------------------------- bijector


def test_flow_starts_as_the_identity():
    flow, params, forward, _ = tiny_flow(scale=0.0)
    x = samples(flow, 1)[0]
    y, log_det = forward(params, x, STATE)
    np.testing.assert_allclose(y, x, atol=1e-12)
    assert abs(log_det) < 1e-12


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_flow_is_permutation_equivariant_and_periodic(seed):
    _, params, forward, _ = tiny_flow()
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.random((7, 3)))
    y, log_det = forward(params, x, STATE)
    order, laps = rng.permutation(7), rng.integers(-3, 4, (7, 3))
    moved, moved_log_det = forward(params, x[order] + laps, STATE)
    np.testing.assert_allclose(moved, y[order] + laps, atol=1e-11)
    np.testing.assert_allclose(moved_log_det, log_det, atol=1e-10)


@pytest.mark.parametrize("n_layers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_log_det_is_that_of_the_jacobian(n_layers):
    _, params, forward, _ = tiny_flow(n_layers=n_layers)
    x = jnp.asarray(np.random.default_rng(5).random((7, 3)))
    y, log_det = forward(params, x, STATE)
    jacobian = jax.jit(jax.jacobian(lambda x: forward(params, x, STATE)[0]))(x).reshape(21, 21)
    sign, expected = np.linalg.slogdet(jacobian)
    assert sign == 1
    assert np.abs(y - x).max() > 0.05  # far from the identity
    np.testing.assert_allclose(log_det, expected, atol=1e-10)
    # Every coordinate listens to every other one, after enough layers.
    assert n_layers < 3 or (np.abs(jacobian) > 1e-12).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 5e-6)])
def test_round_trip(dtype, tolerance):
    _, params, forward, inverse = tiny_flow()
    state = STATE if dtype == "float64" else SINGLE
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    x = jnp.asarray(np.random.default_rng(6).random((7, 3)), dtype)
    y, log_det = forward(params, x, state)
    back, back_log_det = inverse(params, y, state)
    assert y.dtype == back.dtype == log_det.dtype == dtype
    np.testing.assert_allclose(back, x, atol=tolerance)
    np.testing.assert_allclose(back_log_det, -log_det, atol=20 * tolerance)


def test_layers_compile_once():
    """What the compiler gets must not grow with the number of layers."""

    def size(n_layers):
        bijector = atomic_solids(system_of("cubic"), **{**TINY, "stddev": 0.03, "n_layers": n_layers}).bijector
        x = jax.ShapeDtypeStruct((7, 3), "float64")
        params = jax.eval_shape(bijector.init, jax.random.key(1), x, STATE)
        return len(jax.jit(bijector.forward).lower(params, x, STATE).as_text())

    assert size(6) < 1.1 * size(3)


# ------------------------------------------------------------------------- coordinates


@pytest.mark.parametrize("name", ["cubic", "hexagonal"])
def test_coordinates_and_displacements_undo_each_other(name):
    crystal = crystal_of(name)
    displacements, coordinates = torus_coordinates(crystal)
    rng = np.random.default_rng(7)
    u = 0.05 * rng.standard_normal((crystal.n_atoms, 3))
    u -= u.mean(axis=0)
    y = coordinates(jnp.asarray(u))
    np.testing.assert_allclose(displacements(y + rng.integers(-2, 3, y.shape)), u, atol=1e-12)
    # They are positions in the cell, atom 0 at the origin.
    positions = crystal.sites + u
    relative = (positions[1:] - positions[0]) @ np.linalg.inv(crystal.cell)
    np.testing.assert_allclose(modulo_one(y - relative), 0.0, atol=1e-12)


@pytest.mark.parametrize("name", ["mw_cubic_8", "lj_fcc_32"])
def test_targets_are_the_systems(name):
    system = load(name)
    flow = atomic_solids(system, **TINY)
    spacing = nearest_neighbour_distance(system.crystal)
    u = 0.02 * spacing * np.random.default_rng(8).standard_normal((system.n_atoms, 3))
    u = jnp.asarray(u - u.mean(axis=0))
    y = flow.coordinates(u)
    exact = system.target.reduced_potential(u, system.state)
    assert float(exact) > 1
    assert flow.target.reduced_potential(y, system.state) == pytest.approx(float(exact), rel=1e-9)
    assert flow.training_target.reduced_potential(y, system.state) == pytest.approx(float(exact), rel=1e-4)
    # An atom that has left its site ends the crystal, but not the training.
    left = flow.coordinates(u.at[2, 0].add(0.6 * spacing))
    assert flow.target.reduced_potential(left, system.state) == np.inf
    assert np.isfinite(flow.training_target.reduced_potential(left, system.state))


@pytest.mark.parametrize("name", [pytest.param("mw_cubic_8", marks=pytest.mark.slow), "lj_fcc_32"])
def test_training_energies_and_gradients_are_finite_where_atoms_overlap(name):
    flow = atomic_solids(load(name), **TINY)
    state = load(name).state
    evaluate = jax.jit(jax.value_and_grad(lambda y: flow.training_target.reduced_potential(y, state)))
    at_rest = flow.coordinates(jnp.zeros((load(name).n_atoms, 3)))
    lowest, _ = evaluate(at_rest)
    assert abs(float(lowest)) < 1e-3
    for apart in (0.1, 0.01, 1e-3):  # in units of the box, between atoms 1 and 2
        value, gradient = evaluate(at_rest.at[2].set(at_rest[1] + apart / math.sqrt(3)).astype("float32"))
        assert 10 < float(value) < 1e5
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1


def test_softened_potentials_have_a_bounded_tangent_core():
    hard, soft = lennard_jones(cutoff=2.5), softened(lennard_jones(cutoff=2.5), 0.8)
    r2 = jnp.array([0.64, 0.7, 1.0, 5.0, 7.0])
    np.testing.assert_allclose(soft.pair(r2), hard.pair(r2), rtol=1e-12)
    inside = jnp.array([0.0, 0.1, 0.3])
    slope = jax.grad(hard.pair)(0.64)
    np.testing.assert_allclose(soft.pair(inside), hard.pair(0.64) + slope * (inside - 0.64), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.grad(soft.pair))(inside), slope, rtol=1e-12)
    assert soft.pair(jnp.float32(0.1)).dtype == np.float32
    assert softened(hard, 0.0) is hard


# ------------------------------------------------------------------------- symmetries, options


def test_position_symmetries_relabel_within_species_and_translate():
    crystal = dataclasses.replace(crystal_of("cubic"), species=("Na", "Cl") * 4)
    relabel, translate = position_symmetries(crystal)
    positions = jnp.asarray(crystal.sites)
    orders = []
    for key in jax.random.split(jax.random.key(9), 40):
        moved = relabel.act(key, positions)
        order = np.linalg.norm(moved[:, None] - positions[None], axis=-1).argmin(axis=1)
        np.testing.assert_array_equal(positions[order], moved)
        assert (np.array(crystal.species)[order] == crystal.species).all()
        orders.append(tuple(order))
    assert len(set(orders)) > 30  # of 576
    fractional = translate.act(jax.random.key(10), positions) @ np.linalg.inv(crystal.cell)
    assert ((fractional >= 0) & (fractional < 1)).all()
    moved = modulo_one(fractional - positions @ np.linalg.inv(crystal.cell))
    np.testing.assert_allclose(modulo_one(moved - moved[:1]), 0.0, atol=1e-12)
    assert np.abs(moved[0]).max() > 0.01


def test_options_rebuild_the_flow():
    flow = atomic_solids(system_of("cubic"), **TINY)
    assert flow.architecture == "atomic_solids"
    again = atomic_solids(system_of("cubic"), **json.loads(json.dumps(flow.options)))
    assert again.options == flow.options
    x = samples(flow, 2)
    np.testing.assert_array_equal(samples(again, 2), x)
    shapes = [jax.eval_shape(f.bijector.init, jax.random.key(0), x[0], STATE) for f in (flow, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "flow.n_layers: must be at least 1"),
        ({"width": 9}, "flow.width: must be a multiple of the 2 heads"),
        ({"stddev": -0.1}, "flow.stddev: must be positive"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        atomic_solids(system_of("cubic"), **{**TINY, **options})
