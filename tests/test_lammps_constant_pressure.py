"""Frames of another program at constant pressure, against weighted samples with cells of their own.

LAMMPS's `fix npt` moves the cell of a small Lennard-Jones crystal; volumes, energies, g(r) and G must agree. Sound
trajectories fail one time in 1000; there are two. Total momentum is zero there, which shifts the mean volume by 1 % of
its spread: less than the error bars tell.
"""

import numpy as np
import pytest
from lammps_oracle import _import_lammps, _lennard_jones, _setup, require_lammps

from freeflow import comparison
from freeflow.config import load

require_lammps()
pytestmark = pytest.mark.slow

LJ = {
    "name": "lj_npt",
    "units": "lj",
    "temperature": 1.0,
    "pressure": 20.0,
    "potential": {"kind": "lennard_jones", "cutoff": 2.0},
    "crystal": {"lattice": "fcc", "repeats": [3, 3, 3], "number_density": 1.12},
    "estimate": {"target_error": 1e-3},
}


def npt(system, motion, path, steps=200_000, every=200, seed=5):
    """A run with Nose-Hoover chains, a tenth of which goes before the dump; returns volumes and energies per atom."""
    lmp = _import_lammps().lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    t, p, n = system.temperature, system.pressure, system.n_atoms
    seen = []
    try:
        lmp.commands_list(_setup(system.crystal.cell, "lj", 1))
        lmp.create_atoms(n, None, [1] * n, (system.crystal.sites + 1e-3).ravel().tolist())
        lmp.commands_list(
            [
                *_lennard_jones({"cutoff": system.potential.cutoff}, 1),
                "timestep 0.002",
                f"velocity all create {2 * t} {seed} mom yes rot no",
                f"fix move all npt temp {t} {t} 0.2 {motion} {p} {p} 1.0",
                "thermo_modify norm no",
                f"run {steps // 10}",
                f'dump frames all custom {every} "{path}" id type xu yu zu',
                'dump_modify frames format float "%.10g"',
            ]
        )
        for _ in range(steps // every):
            lmp.command(f"run {every} post no")
            seen.append((lmp.get_thermo("vol") / n, lmp.get_thermo("pe") / n))
    finally:
        lmp.close()
    return np.array(seen)


@pytest.mark.parametrize(("motion", "fix"), [("isotropic", "iso"), ("orthorhombic", "aniso")])
def test_fix_npt_agrees(motion, fix, tmp_path):
    system = load({**LJ, "cell_motion": motion})
    seen = npt(system, fix, tmp_path / "npt.lammpstrj")
    found = comparison.compare(system, tmp_path / "npt.lammpstrj", frames="1:", seed=1)
    print(found)
    assert found.verdict == "agree", found.reason
    # What LAMMPS says of its own frames.
    assert float(found.volume.md_mean.mean) == pytest.approx(seen[:, 0].mean(), rel=1e-3)
    assert float(found.energy.md_mean.mean) == pytest.approx(seen[:, 1].mean(), rel=1e-2)
    for one in (found.volume, found.energy):
        error = np.hypot(one.model_mean.std_error, one.md_mean.std_error)
        assert abs(one.model_mean.mean - one.md_mean.mean) < 4 * error
    assert found.volume.md_mean.std_error < 3e-4 * found.volume.md_mean.mean
