"""Enthalpies at rest of diamond and beta-tin silicon (Stillinger-Weber) over pressure: python static.py."""

import jax
import jax.numpy as jnp
import numpy as np

import freeflow as ff
from freeflow.crystals import energy_of

GIGAPASCAL = 1 / 160.2176634  # [eV/angstrom^3]


def curve(name, shapes):
    """Volumes and energies per atom, the latter the lowest of the shapes, ln(c/a) apart from the file's cell."""
    system = ff.load(f"{name}.yaml").system
    crystal, energy = system.crystal, energy_of(system)
    with ff.double_precision():
        deformed = energy.deformed(1.3, 0.5, "float64")
        batch = jax.jit(jax.vmap(lambda f: deformed(jnp.zeros((crystal.n_atoms, 3)), f)))
        growth = np.linspace(-0.25, 0.2, 181)
        axes = np.stack([growth[:, None] / 3 - shapes / 3] * 2 + [growth[:, None] / 3 + 2 * shapes / 3], axis=-1)
        f = np.exp(axes).reshape(-1, 3, 1) * np.eye(3)
        energies = (np.asarray(batch(f)) + energy.lattice_energy()).reshape(len(growth), -1).min(axis=1)
    return crystal.volume * np.exp(growth) / crystal.n_atoms, energies / crystal.n_atoms


diamond, tin = curve("diamond", np.zeros(1)), curve("beta_tin", np.linspace(-0.15, 0.15, 121))
for pressure in range(0, 25, 2):
    enthalpy = [np.min(energy + pressure * GIGAPASCAL * volume) for volume, energy in (diamond, tin)]
    print(f"{pressure:3d} GPa   H(beta-tin) - H(diamond) = {enthalpy[1] - enthalpy[0]:+.4f} eV per atom")
