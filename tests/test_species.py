"""Crystals of several species: energies against sums over pairs, constants, reading the file."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeflow as ff
from freeflow.crystals import crystal_system, energy_of, lattice_crystal
from freeflow.errors import InputError
from freeflow.geometry import LATTICES
from freeflow.potentials import SpeciesPairs, born_mayer, lennard_jones, on_crystal
from freeflow.units import UNIT_STYLES, thermal_wavelength_of

pytestmark = pytest.mark.code("brief")

TERMS = {
    ("Cl", "Cl"): born_mayer(A=0.2, rho=0.3, sigma=3.2, C=4.0, cutoff=5.5),
    ("Cl", "Na"): born_mayer(A=0.6, rho=0.32, sigma=2.6, C=20.0, cutoff=5.0),
    ("Na", "Na"): lennard_jones(0.03, 2.4, cutoff=4.5),
}
SALT = """
name: salt
units: metal
temperature: 300.0
potential:
  kind: lennard_jones
  cutoff: 6.0
  pairs:
    Na-Na: {epsilon: 0.02, sigma: 2.9}
    Cl-Na: {epsilon: 0.30, sigma: 2.5, cutoff: 7.0}
    Cl-Cl: {epsilon: 0.02, sigma: 3.4}
crystal: {lattice: rocksalt, species: [Na, Cl], repeats: [3, 3, 3], lattice_constant: 5.5}
"""


def rock_salt(repeats=(2, 2, 3), constant=5.6):
    return lattice_crystal("rocksalt", repeats, lattice_constant=constant, species=("Na", "Cl"))


def brute_force(terms, crystal, u):
    """Sum over all pairs and images, in plain NumPy."""
    x, total = crystal.sites + u, 0.0
    steps = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing="ij"), -1).reshape(-1, 3) @ crystal.cell
    for i in range(len(x)):
        for j in range(len(x)):
            r2 = ((x[j] + steps - x[i]) ** 2).sum(axis=1)
            pair = terms[tuple(sorted((crystal.species[i], crystal.species[j])))]
            near = r2[(r2 > 1e-9) & (r2 < pair.cutoff**2)]
            total += 0.5 * float(np.sum(pair.pair(jnp.asarray(near))))
    return total


def test_in_a_deformed_cell_the_energy_is_that_of_the_deformed_crystal():
    potential, stretch = SpeciesPairs("born_mayer", TERMS), 1.02
    small, large = (on_crystal(potential, rock_salt((2, 2, 2), a)) for a in (5.6, 5.6 * stretch))
    energy = small.deformed(1.1, 1.0, "float64")
    at_rest = jnp.zeros((64, 3))
    found = float(energy(at_rest, stretch * jnp.eye(3)))
    assert found == pytest.approx(large.lattice_energy() - small.lattice_energy(), rel=1e-9)
    assert float(energy(at_rest, jnp.eye(3))) == pytest.approx(0, abs=1e-12)


def test_energies_are_sums_over_pairs_of_species():
    crystal = rock_salt((2, 2, 2), 5.6)
    potential = SpeciesPairs("born_mayer", TERMS)
    energy = on_crystal(potential, crystal)
    u = 0.15 * np.random.default_rng(0).standard_normal((crystal.n_atoms, 3))
    u -= u.mean(axis=0)
    rest, moved = (brute_force(TERMS, crystal, x) for x in (np.zeros_like(u), u))
    assert energy.lattice_energy() == pytest.approx(rest, rel=1e-12)
    relative = jax.jit(energy.relative(2.0, "float64"))
    assert float(relative(jnp.asarray(u))) == pytest.approx(moved - rest, rel=1e-11)
    both = jax.jit(jax.vmap(relative))(jnp.asarray([u, 0 * u]))
    np.testing.assert_allclose(both, [moved - rest, 0.0], atol=1e-10)
    slope_at = jax.jit(jax.grad(relative))
    gradient = slope_at(jnp.asarray(u))
    direction = np.random.default_rng(1).standard_normal(u.shape)
    h = 1e-5
    slope = (relative(jnp.asarray(u + h * direction)) - relative(jnp.asarray(u - h * direction))) / (2 * h)
    assert float(jnp.sum(gradient * direction)) == pytest.approx(float(slope), rel=1e-6)
    columns = energy.force_constants(crystal.site_of[0])
    along = np.zeros_like(u)
    along[crystal.site_of[0, 1], 2] = h
    forces = [slope_at(jnp.asarray(s * along)) for s in (1, -1)]
    np.testing.assert_allclose(columns[:, :, 5], (forces[0] - forces[1]) / (2 * h), atol=1e-5)


def test_equal_terms_are_one_potential():
    """Two species that interact alike are one species, in energy and free energy constants."""
    lj = lennard_jones(cutoff=2.2)
    salt = lattice_crystal("rocksalt", (3, 3, 3), number_density=1.0, species=("A", "B"))
    plain = lattice_crystal("sc", (6, 6, 6), number_density=1.0)
    both = SpeciesPairs("lennard_jones", {("A", "A"): lj, ("A", "B"): lj, ("B", "B"): lj})
    one = on_crystal(lj, plain).lattice_energy()
    assert on_crystal(both, salt).lattice_energy() == pytest.approx(one, rel=1e-12)
    nearest = [on_crystal(p, c, True).lattice_energy() for p, c in ((both, salt), (lj, plain))]
    assert nearest[0] == pytest.approx(nearest[1], rel=1e-12)
    systems = [
        crystal_system("x", c, p, UNIT_STYLES["lj"], 1.0, w)
        for c, p, w in ((salt, both, {"A": 0.5, "B": 2.0}), (plain, lj, 1.0))
    ]
    assert systems[0].thermal_wavelength == pytest.approx(1.0)  # the geometric mean
    assert systems[0].log_prefactor == pytest.approx(systems[1].log_prefactor, rel=1e-12)


def test_constants_of_two_species():
    """beta F = ... - ln[sqrt(N) V Z_u / (L_Na^(3 N_Na) L_Cl^(3 N_Cl))]: momenta count atom by atom."""
    crystal, wavelengths = rock_salt(), {"Na": 0.21, "Cl": 0.17}
    system = crystal_system("x", crystal, SpeciesPairs("p", TERMS), UNIT_STYLES["metal"], 300.0, wavelengths)
    n = crystal.n_atoms
    momenta = 3 * (n / 2) * (math.log(0.21) + math.log(0.17))
    expected = system.constants["lattice energy"] - 0.5 * math.log(n) - math.log(crystal.volume) + momenta
    assert system.log_prefactor == pytest.approx(-expected, rel=1e-12)


def test_thermal_wavelengths():
    # 17.458 angstrom / sqrt(M T), with M in g/mol and T in K, is how textbooks write it.
    expected = 17.458 / math.sqrt(39.948 * 300.0)
    assert thermal_wavelength_of(39.948, UNIT_STYLES["metal"], 300.0) == pytest.approx(expected, rel=1e-4)
    metal, real = (thermal_wavelength_of(35.45, UNIT_STYLES[name], 250.0) for name in ("metal", "real"))
    assert metal == pytest.approx(real, rel=1e-6)  # LAMMPS's k_B in real units is rounded
    with pytest.raises(InputError, match="Planck"):
        thermal_wavelength_of(1.0, UNIT_STYLES["lj"], 1.0)


@pytest.mark.parametrize("name", ["rocksalt", "cesium_chloride", "zincblende"])
def test_lattices_of_two_kinds(name):
    crystal = lattice_crystal(name, (2, 2, 2), lattice_constant=5.0, species=("Na", "Cl"))
    assert crystal.site_of.shape[1] == 2
    first, second = (crystal.sites[np.array(crystal.species) == kind] for kind in ("Na", "Cl"))
    assert len(first) == len(second) == 4 * len(LATTICES[name].basis)
    near = np.linalg.norm((crystal.sites - crystal.sites[0] + 5.0) % 10.0 - 5.0, axis=1)
    shell = np.isclose(near, np.sort(near)[1])
    assert {crystal.species[i] for i in np.flatnonzero(shell)} == {"Cl"}
    assert shell.sum() == {"rocksalt": 6, "cesium_chloride": 8, "zincblende": 4}[name]
    with pytest.raises(InputError, match="2 kinds of atoms, but 1"):
        lattice_crystal(name, (2, 2, 2), lattice_constant=5.0)


def test_the_repulsive_wall_behind_the_barrier():
    pair = born_mayer(A=100.0, rho=0.3, C=1.0, cutoff=8.0).pair
    r = np.linspace(0.01, 7.9, 4000)
    energy = np.asarray(pair(jnp.asarray(r**2)))
    well = int(np.argmin(energy))
    assert r[well] > 1.0 and (np.diff(energy[:well]) < 0).all()  # no hole to fall into
    assert float(pair(jnp.asarray(64.0))) == 0.0
    slope = jax.vmap(jax.grad(pair))(jnp.asarray(r**2))
    assert np.isfinite(slope).all()
    r = 2.0
    unshifted = born_mayer(A=100.0, rho=0.3, sigma=0.5, C=50.0, D=3.0, cutoff=8.0, shift=False).pair
    assert float(unshifted(jnp.asarray(r * r))) == pytest.approx(100 * math.exp(-1.5 / 0.3) - 50 / r**6 + 3 / r**8)
    assert pair(jnp.float32(9.0)).dtype == unshifted(jnp.float32(9.0)).dtype == jnp.float32
    with pytest.raises(InputError, match="attracts"):
        born_mayer(A=1e-6, rho=0.3, C=50.0, cutoff=8.0)


# ------------------------------------------------------------------ the file


def load(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    return ff.load(tmp_path / "s.yaml")


def test_a_salt_is_read(tmp_path):
    system = load(tmp_path, SALT)
    assert system.n_atoms == 216 and system.crystal.site_of.shape == (108, 2)
    assert system.potential.terms["Cl", "Na"].cutoff == 7.0
    assert system.config["masses"] == {"Na": pytest.approx(22.99, abs=1e-3), "Cl": pytest.approx(35.45, abs=0.01)}
    assert system.wavelengths["Na"] > system.wavelengths["Cl"]
    again = ff.load(system.config)
    assert again.constants == system.constants and again.config == system.config
    assert energy_of(again).lattice_energy() == pytest.approx(system.constants["lattice energy"] * system.kt)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    Na-Na: {epsilon: 0.02, sigma: 2.9}\n", "", "s.yaml: potential.pairs: no pair Na-Na"),
        ("Na-Na:", "K-K:", "s.yaml: potential.pairs: no pair Na-Na"),
        ("  pairs:\n", "  pairs:\n    K-K: {epsilon: 1.0, sigma: 1.0}\n", "K-K is no pair of this crystal"),
        ("  pairs:\n", "  pairs:\n    Na-Cl: {epsilon: 1.0, sigma: 1.0}\n", "are the same pair"),
        ("epsilon: 0.02, sigma: 2.9", "epsilom: 0.02, sigma: 2.9", "s.yaml:9: potential.pairs.Na-Na.epsilom: unknown"),
        ("epsilon: 0.02, sigma: 2.9", "epsilon: 0.02", "s.yaml:9: potential.pairs.Na-Na.sigma: missing"),
        ("cutoff: 6.0", "cutoff: 6.0\n  sigma: 1.0", "s.yaml:8: potential.sigma: pairs has these numbers"),
        ("Na-Na", "sodium", "expected two species such as Na-Cl"),
        ("[Na, Cl]", "[Na]", "crystal.species: rocksalt has 2 kinds of atoms, but 1"),
        ("[Na, Cl]", "[Na, chlorine]", "expected a chemical symbol"),
        ("units: metal", "units: lj", "lj units know no Planck constant"),
        ("temperature: 300.0", "temperature: 300.0\nmasses: {Na: 23.0}", "masses: none given for Cl"),
        ("temperature: 300.0", "temperature: 300.0\nthermal_wavelength: {Na: 1.0, Cl: 1.0, K: 1.0}", "K is no species"),
        ("temperature: 300.0", "temperature: 300.0\nthermal_wavelength: [1.0]", "one for every species"),
        ("temperature: 300.0", "temperature: 300.0\nmasses: {Na: 1.0}\nthermal_wavelength: 1.0", "not both"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, old, new, message):
    assert old in SALT
    with pytest.raises(InputError) as error:
        load(tmp_path, SALT.replace(old, new, 1))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_born_mayer_of_one_species(tmp_path):
    text = SALT[: SALT.index("potential:")] + "masses: {Ne: 20.0}\n"
    text += "crystal: {lattice: fcc, species: Ne, repeats: [3, 3, 3], lattice_constant: 4.4}\n"
    good = text + "potential: {kind: born_mayer, A: 1000.0, rho: 0.25, C: 5.0, cutoff: 6.0}\n"
    system = load(tmp_path, good)
    assert system.potential.name == "born_mayer" and system.config["masses"] == {"Ne": 20.0}
    with pytest.raises(InputError, match="missing A, rho"):
        load(tmp_path, text + "potential: {kind: born_mayer, cutoff: 6.0}\n")
