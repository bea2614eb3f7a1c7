"""The potentials beside the examples: against ASE's calculator, and against our kernels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

import freeflow as ff
from freeflow.crystals import energy_of, lattice_crystal
from freeflow.user_code import load_object

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_copper_of_the_example_is_that_of_ase():
    crystal = lattice_crystal("fcc", (3, 3, 3), lattice_constant=3.61, species=("Cu",))
    energy = load_object("emt:energy", EXAMPLES / "emt_copper")
    x = crystal.sites + 0.1 * np.random.default_rng(0).standard_normal(crystal.sites.shape)
    atoms = Atoms(crystal.species, positions=x, cell=crystal.cell, pbc=True, calculator=EMT(asap_cutoff=True))
    value, slope = jax.value_and_grad(energy)(jnp.asarray(x), jnp.asarray(crystal.cell))
    assert float(value) == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(-slope, atoms.get_forces(), atol=1e-9)


def test_salt_of_the_example_is_that_of_the_kernel():
    system = ff.load(EXAMPLES / "salt" / "system.yaml")
    energy = load_object("salt:energy", EXAMPLES / "salt")
    crystal = system.crystal
    u = 0.1 * np.random.default_rng(0).standard_normal(crystal.sites.shape)
    rest, moved = (
        float(energy(jnp.asarray(crystal.sites + x), jnp.asarray(crystal.cell), crystal.species)) for x in (0 * u, u)
    )
    ours = energy_of(system)
    assert ours.lattice_energy() == pytest.approx(rest, rel=1e-12)
    assert float(ours.relative(2.0, "float64")(jnp.asarray(u))) == pytest.approx(moved - rest, rel=1e-10)
