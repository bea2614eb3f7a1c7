"""Gibbs free energies against F + pV, and mean volumes against molecular dynamics at constant pressure.

python benchmarks/gibbs.py consistency mw_cubic_64 --pressure "1 kbar" --motion isotropic
python benchmarks/gibbs.py lammps mw_cubic_64 --pressure "1 kbar" --steps 400000     (of 10 fs; `fix npt`)
"""

import argparse
import contextlib
import math
import sys
import tempfile
from pathlib import Path

import numpy as np

import freeflow
from freeflow.cells import CELL_MOTIONS
from freeflow.config.files import read


def described(name, pressure, motion):
    """A system's own description at constant pressure."""
    values = read(name)[2].resolved()
    with contextlib.suppress(ValueError):
        pressure = float(pressure)
    return {key: value for key, value in values.items() if key != "published"} | {
        "pressure": pressure,
        "cell_motion": motion,
    }


def log_density(coordinates, weights, rng, n_bootstrap=200):
    """ln of the density of weighted samples (n, k) at their mean, and its error.

    A Gaussian with the sample's covariance, times what third and fourth cumulants along its axes change at the mean
    (Gram and Charlier): 1 + excess kurtosis / 8 in each direction.
    """

    def at_mean(x, w):
        w = w / w.sum()
        centred = x - w @ x
        covariance = (centred * w[:, None]).T @ centred
        white = centred @ np.linalg.inv(np.linalg.cholesky(covariance)).T
        kurtosis = w @ white**4 - 3
        k = x.shape[1]
        return -0.5 * k * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(covariance)[1] + np.log1p(kurtosis / 8).sum()

    n = len(weights)
    spread = [at_mean(coordinates[i], weights[i]) for i in (rng.integers(0, n, n) for _ in range(n_bootstrap))]
    return at_mean(coordinates, weights), float(np.std(spread))


def consistency(options):
    values = described(options.system, options.pressure, options.motion)
    estimate = {"target_error": options.target_error, "seed": options.seed, "max_samples": options.max_samples}
    g = freeflow.estimate(values, **estimate)
    print(g)
    system, motion = g.system, CELL_MOTIONS[options.motion]
    weights = np.exp(-np.asarray(g.work.forward) + np.min(g.work.forward))
    sound = weights > 0
    coordinates = np.einsum("kab,nab->nk", motion.basis, g.observed)[sound]
    mean = weights[sound] @ coordinates / weights[sound].sum()
    strain = np.tensordot(mean, motion.basis, 1)
    # The mean cell, made symmetric: a crystal that stays cubic has the same F in all of them.
    growth = float(np.trace(strain))
    volume = system.crystal.volume * math.exp(growth)
    log_rho, log_rho_error = log_density(coordinates, weights[sound], np.random.default_rng(0))
    log_measure = math.log(math.sqrt(3) * volume / system.thermal_wavelength**3)
    fixed = {key: value for key, value in values.items() if key not in {"pressure", "cell_motion", "published"}}
    fixed["crystal"] = {**fixed["crystal"], "number_density": system.n_atoms / volume}
    fixed["crystal"].pop("lattice_constant", None)
    f = freeflow.estimate(fixed, **estimate)
    pv = float(system.state.beta) * float(system.state.pressure) * volume
    n = system.n_atoms
    other = (f.beta_f + pv + log_rho - log_measure) / n
    error = math.hypot(f.beta_f_std_error, log_rho_error) / n
    apart = math.hypot(error, g.beta_f_per_atom_std_error)
    rows = {
        "beta G / N": (g.beta_f_per_atom, g.beta_f_per_atom_std_error),
        "beta F / N": (f.beta_f_per_atom, f.beta_f_per_atom_std_error),
        "beta p V / N": (pv / n, 0.0),
        "fluctuation / N": ((log_rho - log_measure) / n, log_rho_error / n),
        "sum of the last three": (other, error),
        "difference": (g.beta_f_per_atom - other, apart),
        "<V> / N": (g.cell.volume.mean / n, g.cell.volume.std_error / n),
    }
    for name, (value, its_error) in rows.items():
        print(f"{name:<24}{value:.6f} +- {its_error:.6f}")
    for name, result in (("G", g), ("F", f)):
        evaluations = sum(result.energy_evaluations.values())
        print(f"{name}: {result.status}, {result.wall_seconds['total']:.0f} s, {evaluations} evaluations")


def lammps(options):
    """Mean volume of mW by `fix npt`; its momentum is zero, so that V has one power less than in the ensemble."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import lammps_oracle

    from freeflow.estimators import statistical_inefficiency

    system = freeflow.load(described(options.system, options.pressure, "isotropic"))
    pressure, t = float(system.state.pressure) / system.units.pressure_unit, system.temperature
    motion = {"isotropic": "iso", "orthorhombic": "aniso", "triclinic": "tri"}[options.motion]
    crystal, volumes = system.crystal, []
    with tempfile.TemporaryDirectory() as folder:
        lmp = lammps_oracle._import_lammps().lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
        lmp.commands_list(lammps_oracle._setup(crystal.cell, system.units.name, 1))
        lmp.create_atoms(system.n_atoms, None, [1] * system.n_atoms, crystal.sites.ravel().tolist())
        lmp.commands_list(
            [
                *(["change_box all triclinic"] if motion == "tri" else []),
                *lammps_oracle._stillinger_weber(lammps_oracle.MW, Path(folder)),
                "mass * 18.015",
                "timestep 10.0",
                f"velocity all create {2 * t} {options.seed + 4711} mom yes rot no",
                f"fix move all npt temp {t} {t} 500.0 {motion} {pressure:.10g} {pressure:.10g} 3000.0",
                "run 20000",
            ]
        )
        while len(volumes) < options.steps // 50:
            lmp.command("run 50 post no")
            volumes.append(lmp.get_thermo("vol") / system.n_atoms)
        lmp.close()
    v = np.array(volumes)
    g = statistical_inefficiency(v)
    shift = v.var() / v.mean()  # of the mean by one power of V
    print(f"<V> / N {v.mean():.4f} +- {v.std() * math.sqrt(g / len(v)):.4f}, spread {v.std():.4f}; with the power that")
    print(f"is missing {v.mean() + shift:.4f}; {len(v) / g:.0f} independent of {len(v)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("consistency")
    one.add_argument("system")
    one.add_argument("--pressure", default="0")
    one.add_argument("--motion", default="isotropic", choices=list(CELL_MOTIONS))
    one.add_argument("--target-error", type=float, default=1e-4)
    one.add_argument("--max-samples", type=int, default=100_000)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=consistency)
    two = commands.add_parser("lammps")
    two.add_argument("system")
    two.add_argument("--pressure", default="0")
    two.add_argument("--motion", default="isotropic", choices=list(CELL_MOTIONS))
    two.add_argument("--steps", type=int, default=400_000)
    two.add_argument("--seed", type=int, default=0)
    two.set_defaults(run=lammps)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
