"""Constant pressure: the measure of the cell, references with strain, and free energies that are known."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.linalg import expm

import freeflow
from freeflow.cells import CELL_MOTIONS, Strained, strain_of
from freeflow.crystals import lattice_crystal, strained_system
from freeflow.estimators import fep, record
from freeflow.isobaric import (
    IsobaricFit,
    cell_constant,
    isobaric_crystal,
    isobaric_ensemble,
    start_fit,
    strain_operations,
)
from freeflow.preparation import fit_reference, prepared
from freeflow.references import DisplacementFit, converged
from freeflow.types import ThermodynamicState

pytestmark = pytest.mark.code("brief")

MOTIONS = pytest.mark.parametrize("motion", CELL_MOTIONS.values(), ids=CELL_MOTIONS)


def state(beta=1.0, pressure=0.0):
    return ThermodynamicState(np.float64(beta), np.float64(pressure))


# ------------------------------------------------------------------ the measure


def log_ideal_gas(n_atoms, used):
    """ln of the integral over the volume of the ensemble without energy, at p = 1 and T = 1.

    `used` is the number of atoms that the ensemble is told of; displacements are held at zero.
    """
    motion, volume = CELL_MOTIONS["isotropic"], 1.02 * n_atoms
    ensemble = isobaric_ensemble(lambda u, f: jnp.zeros(()), used, volume, motion)
    rest = jnp.zeros((2, 3))
    reduced = jax.jit(lambda c: ensemble.reduced_potential(Strained(rest, strain_of(motion, c)), state(1, 1)))
    # The ensemble counts from p V_ref on, and the strain coordinate is ln(V / V_ref) / sqrt(3).
    value, _ = quad(lambda c: math.exp(-float(reduced(jnp.array([c])))), -0.3, 0.3, epsrel=1e-10, limit=200)
    return math.log(value) - cell_constant(volume, 1.0) + n_atoms * math.log(volume) - volume


def test_volume_integral_of_the_ideal_gas():
    """Integral dV V^N exp(-V) = N!; the peak is 0.05 wide in ln V, and the strain reaches ten times as far."""
    assert log_ideal_gas(400, 400) == pytest.approx(math.lgamma(401), abs=1e-8)


def test_a_lost_volume_factor_shows():
    """The same without V^N, or with V^(N-1): a planted fault must not pass."""
    for fewer in (0, 399):
        assert abs(log_ideal_gas(400, fewer) - math.lgamma(401)) > 1e-3


# ------------------------------------------------------------------ an elastic crystal, known in closed form

SPRING, STIFF = 400.0, 3e3  # of an atom [kT/length**2]; of a strain coordinate [kT]
ELASTIC = {  # lattice, repeats, motion, how far the basis atoms follow the shear [length]
    "isotropic": ("bcc", (2, 2, 2), "isotropic", 0.0),
    "orthorhombic": ("bcc", (2, 2, 2), "orthorhombic", 0.0),
    "triclinic": ("bcc", (2, 2, 2), "triclinic", 0.0),
    "inner strain": ("diamond", (1, 1, 1), "triclinic", 0.7),
}


def logarithm(f):
    """Of a matrix near the unit matrix."""
    apart = f - jnp.eye(3, dtype=f.dtype)
    total = jnp.zeros_like(f)
    for k in range(14, 0, -1):
        total = apart @ (jnp.eye(3, dtype=f.dtype) * (-1) ** (k + 1) / k + total)
    return total


@functools.cache
def elastic(name, n_counted=None):
    """Crystal, motion, ensemble and ln Z: atoms on springs in the deformed cell, and the cell on springs of its own.

    The bonds of diamond lie along (1, 1, 1): a shear moves the sublattices against each other, by symmetry along x
    where it mixes y and z. In w = F u - shift, which is mean-free, the integral over u is that of fixed springs times
    det F^(1 - N), so that exp(2 ln V) is left of the measure. The density of shapes is exp(|traceless strain|^2 / 2).
    """
    lattice, repeats, motion_name, follow = ELASTIC[name]
    crystal, motion = lattice_crystal(lattice, repeats, number_density=1.0), CELL_MOTIONS[motion_name]
    n, k = crystal.n_atoms, motion.n_strains
    sign = np.zeros((n, 1))
    if follow:
        sign[crystal.site_of[:, 0]], sign[crystal.site_of[:, 1]] = 1.0, -1.0

    def energy(u, f):
        strain = logarithm(f)
        shift = follow * sign.astype(u.dtype) * jnp.stack([strain[1, 2], strain[0, 2], strain[0, 1]])[None]
        return 0.5 * SPRING * jnp.sum((u @ f - shift) ** 2) + 0.5 * STIFF * jnp.sum(strain * strain)

    log_z = 1.5 * (n - 1) * math.log(2 * math.pi / SPRING) + 0.5 * math.log(2 * math.pi / STIFF) + 12 / (2 * STIFF)
    log_z += {1: 0.0, 3: math.log(2 * math.pi / STIFF), 6: 2.5 * math.log(2 * math.pi / (STIFF - 1))}[k]
    ensemble = isobaric_ensemble(energy, n if n_counted is None else n_counted, crystal.volume, motion)
    return crystal, motion, ensemble, log_z


def evaluator(recipe, ensemble):
    def one(gaussian, z):
        return jax.value_and_grad(lambda z: ensemble.reduced_potential(recipe.colour(gaussian, z), state()))(z)

    compiled = jax.jit(jax.vmap(one, (None, 0)))
    return lambda gaussian, z: tuple(np.asarray(part) for part in compiled(gaussian, jnp.asarray(z)))


@functools.cache
def fitted(name, n_counted=None):
    crystal, motion, ensemble, _ = elastic(name, n_counted)
    recipe = isobaric_crystal(crystal, motion)
    evaluate = evaluator(recipe, ensemble)
    n_basis, n_translations = crystal.site_of.shape[::-1]
    blocks = np.zeros((n_basis, n_translations, n_basis, 3, 3))
    for b in range(n_basis):
        blocks[b, 0, b] = 1.3 * SPRING * np.eye(3)
    start = start_fit(crystal, motion, blocks, lambda gaussian, z: evaluate(gaussian, z)[1])
    return recipe, evaluate, start, converged(recipe, start, evaluate, seed=0)


def log_z_from_work(recipe, evaluate, gaussian, seed=1, n=1024):
    keys = jax.random.split(jax.random.key(seed), n)
    z = np.asarray(jax.vmap(lambda key: recipe.noise(key, "float64"))(keys))
    answer = fep(record(evaluate(gaussian, z)[0] - 0.5 * (z**2).sum(axis=(1, 2))))
    return float(recipe.log_normalisation(gaussian)) - float(answer.delta_f), float(answer.std_error)


@pytest.mark.parametrize("name", ELASTIC)
def test_elastic_crystals_have_their_free_energy(name):
    recipe, evaluate, _, fit = fitted(name)
    value, error = log_z_from_work(recipe, evaluate, fit.gaussian)
    assert error < 0.02
    assert abs(value - elastic(name)[3]) < 4.5 * error  # one false alarm in 1e5


def test_a_lost_volume_factor_shows_in_a_crystal():
    name = "isotropic"
    recipe, evaluate, _, fit = fitted(name, n_counted=0)
    value, error = log_z_from_work(recipe, evaluate, fit.gaussian)
    assert abs(value - elastic(name)[3]) > 8 * error


def test_basis_atoms_follow_the_shear():
    """The lattice's own derivatives tell already; without them the reference would be far from the target."""
    crystal, motion, _, _ = elastic("inner strain")
    recipe, evaluate, _, fit = fitted("inner strain")
    blocks = np.zeros((2, 4, 2, 3, 3))
    blocks[[0, 1], 0, [0, 1]] = SPRING * np.eye(3)
    start = start_fit(crystal, motion, blocks, lambda gaussian, z: evaluate(gaussian, z)[1])
    assert recipe.n_strains == 6
    np.testing.assert_allclose(start.precision, STIFF * np.eye(6), rtol=2e-3, atol=1e-3 * STIFF)
    for inner in (start.inner, fit.gaussian.cell.inner):
        shear = inner[:, :, 3]  # of the coordinate that mixes y and z, sqrt(2) times the matrix element
        np.testing.assert_allclose(shear[crystal.site_of[:, 0]], [[0.7 / math.sqrt(2), 0, 0]] * 4, atol=0.06)
        np.testing.assert_allclose(shear.sum(axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(inner[:, :, :3], 0, atol=1e-12)  # by symmetry


def test_a_cubic_crystal_stays_cubic_in_the_mean():
    _, _, _, fit = fitted("triclinic")
    cell = fit.gaussian.cell
    assert abs(cell.strain[0]) > 0
    np.testing.assert_allclose(cell.strain[1:], 0, atol=1e-12)
    np.testing.assert_allclose(np.diag(cell.root)[3:], cell.root[5, 5], rtol=1e-9)
    np.testing.assert_allclose(cell.root[0, 1:], 0, atol=1e-12)


@pytest.mark.parametrize("name", ["orthorhombic", "inner strain"])
def test_a_strain_that_is_far_too_narrow_is_widened(name):
    """From samples of the elastic crystal, for a reference whose strains are six times too narrow and drag no atom."""
    recipe, _, start, fit = fitted(name)
    keys = jax.random.split(jax.random.key(2), 4096)
    samples = jax.vmap(lambda key: recipe.colour(fit.gaussian, recipe.noise(key, "float64")))(keys)
    narrow = dataclasses.replace(start, precision=36 * STIFF * np.eye(len(start.precision)), inner=0 * start.inner)

    def white(step):
        return np.asarray(jax.vmap(lambda x: recipe.whiten(step.gaussian(), x))(samples))

    wider, count = narrow.widened(white(narrow))
    assert count >= len(start.precision)
    expected = np.asarray(fit.gaussian.cell.inverse_root @ fit.gaussian.cell.inverse_root)
    np.testing.assert_allclose(wider.precision, expected, rtol=0.1, atol=0.08 * STIFF)
    np.testing.assert_allclose(wider.inner, fit.gaussian.cell.inner, atol=0.06)
    z = white(wider)
    assert wider.widened(z)[1] == 0
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=0.1)
    assert np.isfinite(np.asarray(wider.gaussian().log_det))


# ------------------------------------------------------------------ the reference's own map


def some_gaussian(crystal, motion):
    rng = np.random.default_rng(0)
    k = motion.n_strains
    blocks = np.zeros((1, crystal.n_atoms, 1, 3, 3))
    blocks[0, 0, 0] = 100 * np.eye(3)
    precision = 1e4 * np.eye(k) + 1e3 * np.ones((k, k))
    inner = rng.standard_normal((crystal.n_atoms, 3, k))
    step = IsobaricFit(
        DisplacementFit.start(crystal, blocks),
        motion,
        precision,
        0.01 * rng.standard_normal(k),
        inner - inner.mean(axis=0),
    )
    return step.gaussian()


@MOTIONS
def test_colour_and_whiten_are_inverses_with_this_determinant(motion):
    crystal = lattice_crystal("bcc", (1, 1, 2), number_density=1.0)
    recipe, gaussian = isobaric_crystal(crystal, motion), some_gaussian(crystal, motion)
    z = recipe.noise(jax.random.key(0), "float64")
    assert z.shape == (crystal.n_atoms + 2, 3)
    np.testing.assert_array_equal(np.asarray(z[crystal.n_atoms :]).reshape(-1)[motion.n_strains :], 0)
    x = recipe.colour(gaussian, z)
    np.testing.assert_allclose(x.displacements.mean(axis=0), 0, atol=1e-14)
    np.testing.assert_allclose(recipe.whiten(gaussian, x), z, atol=1e-10)

    n, k = crystal.n_atoms, motion.n_strains
    mean_free = np.linalg.qr(np.eye(n) - 1 / n)[0][:, : n - 1]  # (n, n - 1)
    mean_free -= mean_free.mean(axis=0)
    mean_free = np.linalg.svd(mean_free, full_matrices=False)[0]

    def coordinates(x):
        return jnp.concatenate([(mean_free.T @ x.displacements).reshape(-1), jnp.tensordot(motion.basis, x.strain, 2)])

    def white(y):
        rows = jnp.zeros(6).at[:k].set(y[3 * (n - 1) :]).reshape(2, 3)
        return jnp.concatenate([mean_free @ y[: 3 * (n - 1)].reshape(n - 1, 3), rows])

    jacobian = jax.jacfwd(lambda y: coordinates(recipe.colour(gaussian, white(y))))(jnp.zeros(3 * (n - 1) + k))
    assert float(np.linalg.slogdet(jacobian)[1]) == pytest.approx(float(gaussian.log_det), rel=1e-9)
    back = recipe.colour_gradient(gaussian, Strained(jnp.ones((n, 3)), jnp.ones((3, 3))))
    assert back.shape == z.shape


@MOTIONS
def test_operations_turn_strains_as_they_turn_the_crystal(motion):
    crystal = lattice_crystal("hcp" if motion.n_strains != 3 else "hexagonal_ice", (2, 2, 2), number_density=1.0)
    turn = strain_operations(crystal, motion)
    unit = np.tile(np.eye(motion.n_strains), (len(turn), 1, 1))
    np.testing.assert_allclose(turn @ np.swapaxes(turn, 1, 2), unit, atol=1e-9)
    # What all operations leave alone: the volume, and c/a in a hexagonal crystal (all edges in the orthorhombic cell).
    invariant = np.linalg.matrix_rank(turn.mean(axis=0), tol=1e-6)
    assert invariant == {"isotropic": 1, "orthorhombic": 3, "triclinic": 2}[motion.name]


# ------------------------------------------------------------------ the whole road

LJ = {
    "name": "lj_under_pressure",
    "units": "lj",
    "temperature": 1.0,
    "pressure": 20.0,
    "cell_motion": "isotropic",
    "potential": {"kind": "lennard_jones", "cutoff": 1.5},
    "crystal": {"lattice": "fcc", "repeats": [2, 2, 2], "number_density": 1.15},
    "estimate": {"target_error": 2e-3},
}


@functools.cache
def lj_result():
    return freeflow.estimate(LJ)


def test_a_gibbs_free_energy_and_its_report():
    result = lj_result()
    values = json.loads(result.json_text())
    assert values["quantity"] == "gibbs_free_energy" and values["status"] == "converged"
    for name in ("beta_f", "beta_f_std_error", "beta_f_per_atom", "beta_f_per_atom_std_error"):
        assert values[name.replace("beta_f", "beta_g", 1)] == values[name]
    assert values["pressure"] == {"value": 20.0, "unit": "epsilon/sigma^3"}
    assert values["cell_motion"] == "isotropic"
    volume, cell = values["volume"], np.array(values["cell"]["value"])
    assert 0 < volume["std_error"] < 0.02 * volume["value"] and volume["unit"] == "sigma^3"
    # <h>^3 is below <V>, by 2/3 of the relative variance.
    below = 1 - (2 / 3) * (volume["spread"] / volume["value"]) ** 2 / 2
    assert np.linalg.det(cell) == pytest.approx(below * volume["value"], rel=2e-3)
    text = str(result)
    for words in ("Gibbs free energy", "beta G / N", "20 epsilon/sigma^3", "isotropic cell", "units of Lambda^3"):
        assert words in text
    assert math.fsum(values["components"].values()) == pytest.approx(values["beta_g"])
    assert {"pressure", "cell"} <= set(values["components"])


def fluctuation_term(result):
    """kT ln of the density of volumes at the mean, in units of Lambda^3, and where that is."""
    weights = np.exp(-np.asarray(result.work.forward))
    volume = result.system.crystal.volume * np.exp(np.trace(result.observed, axis1=1, axis2=2))
    mean = weights @ volume / weights.sum()
    spread = math.sqrt(weights @ (volume - mean) ** 2 / weights.sum())
    kurtosis = weights @ (volume - mean) ** 4 / weights.sum() / spread**4 - 3
    return mean, math.log((1 + kurtosis / 8) / (math.sqrt(2 * math.pi) * spread)) + 3 * math.log(
        result.system.thermal_wavelength
    )


def test_it_is_the_helmholtz_free_energy_and_pv_and_the_fluctuation():
    result = lj_result()
    volume, fluctuation = fluctuation_term(result)
    fixed = {key: value for key, value in LJ.items() if key not in {"pressure", "cell_motion"}}
    other = freeflow.estimate({**fixed, "crystal": {**LJ["crystal"], "number_density": 32 / volume}})
    sample_error = 1 / math.sqrt(2 * len(result.work.forward))  # of the logarithm of the spread
    error = math.hypot(result.beta_f_std_error, other.beta_f_std_error, sample_error)
    assert abs(result.beta_f - (other.beta_f + 20.0 * volume + fluctuation)) < 4.5 * error
    assert error < 0.15


@pytest.mark.slow
def test_another_starting_density_gives_the_same():
    other = freeflow.estimate({**LJ, "crystal": {**LJ["crystal"], "number_density": 1.05}}, seed=1)
    result = lj_result()
    assert abs(result.beta_f - other.beta_f) < 4.5 * math.hypot(result.beta_f_std_error, other.beta_f_std_error)
    mine, its = result.cell.volume, other.cell.volume
    assert abs(mine.mean - its.mean) < 4.5 * math.hypot(mine.std_error, its.std_error)
    assert other.system.crystal.volume != pytest.approx(result.system.crystal.volume, rel=1e-6)


@pytest.mark.parametrize("reference", ["einstein", "harmonic"])
def test_other_references_know_the_cell_too(reference):
    system = freeflow.load({**LJ, "estimate": {"reference": reference}})
    with jax.enable_x64(True), prepared(system, system.plan) as run:
        fit = fit_reference(run, lambda _: None)
    assert fit.gaussian.cell is not None and float(fit.gaussian.cell.root[0, 0]) < 0.05


def test_a_strained_system_is_the_same_crystal_in_another_cell():
    system = freeflow.load(LJ)
    strain = 0.02 * np.eye(3)
    moved = strained_system(system, strain)
    np.testing.assert_allclose(moved.crystal.cell, system.crystal.cell @ expm(strain))
    assert moved.constants["pressure"] == pytest.approx(system.constants["pressure"] * math.exp(0.06))
    assert moved.constants["lattice energy"] != system.constants["lattice energy"]
