"""A result with round numbers, for tests of how results are shown."""

import dataclasses

import numpy as np

from freeflow.result import Result
from freeflow.types import Crystal, Ensemble, Plan, Published, System, ThermodynamicState, Work
from freeflow.units import unit_style


@dataclasses.dataclass(frozen=True)
class FakePotential:
    name: str = "Stillinger-Weber"
    cutoff: float = 4.3065


def fake_system(**changes):
    n = 64
    crystal = Crystal(
        cell=12.4 * np.eye(3),
        sites=np.zeros((n, 3)),
        species=("X",) * n,
        group=(1, 1, 1),
        site_of=np.arange(n)[None],
        operations=np.eye(3)[None],
        operation_sites=np.arange(n)[None],
        description="diamond, 2 x 2 x 2 cells",
    )
    values = {
        "name": "mw_cubic_64",
        "target": Ensemble(lambda u, state: 0.0),
        "state": ThermodynamicState(np.float64(2.5), np.float64(0.0)),
        "constants": {"lattice energy": -1993.25, "centre of mass": -7.0, "thermal wavelength": 165.0},
        "units": unit_style("real"),
        "temperature": 200.0,
        "crystal": crystal,
        "potential": FakePotential(),
        "thermal_wavelength": 2.3925,
        "plan": Plan(),
        "published": Published(-25.16306, 2e-4, "Wirnsberger et al. 2022, MBAR"),
        "config": {"name": "mw_cubic_64", "estimate": {"seed": 0, "flow": None}},
    }
    return System(**{**values, **changes})


def fake_result(system=None, **changes):
    system = system or fake_system()
    beta_f = -1610.4387
    components = {
        "lattice energy": -1993.25,
        "reference": 221.8113,
        "work": 3.0,
        "centre of mass": -7.0,
        "thermal wavelength": 165.0,
    }
    values = {
        "system": system,
        "plan": system.plan,
        "estimator": "fep",
        "delta_f": 3.0,
        "delta_f_std_error": 0.00576,
        "components": components,
        "beta_f": beta_f,
        "beta_f_std_error": 0.00576,
        "work": Work(np.zeros(5120), np.zeros(0)),
        "n_samples": 5120,
        "energy_evaluations": {"reference": 4096, "tuning": 2048, "sampling": 256000, "checks": 0},
        "wall_seconds": {"total": 30.13, "compile": 8.0, "reference": 3.0, "sampling": 19.1},
        "status": "converged",
        "ess_fraction": 0.8123,
        "pareto_k": 0.1,
        "largest_weight_share": 0.0021,
        "drift_z": -0.4,
        "bootstrap_std_error": 0.0059,
        "provenance": {"freeflow": "0.1.0", "jax": "0.10.1", "device": "cpu"},
    }
    return Result(**{**values, **changes})
