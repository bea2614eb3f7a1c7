"""Other problems of two states, against molecular dynamics and against Widom's insertion. All of it is slow.

Four combined standard errors raise a false alarm once in 16 000 times.
"""

import math

import jax
import jax.numpy as jnp
import lammps_oracle
import numpy as np
import pytest

import freeflow as ff
from freeflow import solvation
from freeflow.estimators import statistical_inefficiency
from freeflow.switching import Fluid
from freeflow.types import double_precision

pytestmark = pytest.mark.slow


def liquid(n, box, temperature, sigma):
    return {
        "name": "liquid",
        "units": "lj",
        "temperature": temperature,
        "solution": {
            "box_length": box,
            "solvent": {"count": n, "potential": {"kind": "lennard_jones"}},
            "solute": {"kind": "wca", "sigma": sigma},
        },
    }


def mean_energy(n, box, temperature, steps, seed):
    """<U> of a Lennard-Jones liquid, cut and shifted at half the box, by Langevin dynamics in LAMMPS; and its error."""
    lmp = lammps_oracle._import_lammps().lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    cells = math.ceil((n / 4) ** (1 / 3))
    try:
        lmp.commands_list(
            [
                "units lj",
                f"lattice fcc {4 * (cells / box) ** 3:.17g}",
                f"region cell block 0 {cells} 0 {cells} 0 {cells}",
                "create_box 1 cell",
                "create_atoms 1 box",
                f"delete_atoms random count {4 * cells**3 - n} yes all NULL {seed}" if 4 * cells**3 > n else "",
                "mass 1 1.0",
                f"pair_style lj/cut {box / 2:.17g}",
                "pair_coeff 1 1 1.0 1.0",
                "pair_modify shift yes",
                f"velocity all create {temperature} {seed}",
                "fix move all nve",
                f"fix heat all langevin {temperature} {temperature} 1.0 {seed}",
                "timestep 0.003",
                "thermo_modify norm no",
                "run 5000",
            ]
        )
        u = []
        for _ in range(steps // 50):
            lmp.command("run 50 pre no post no")
            u.append(lmp.get_thermo("pe"))
    finally:
        lmp.close()
    return float(np.mean(u)), float(np.std(u) * math.sqrt(statistical_inefficiency(np.array(u)) / len(u)))


def test_a_cooled_liquid_agrees_with_the_energies_of_lammps():
    """d(beta F)/d(beta) = <U>, by Gauss's rule with three temperatures, which is exact to the fifth power."""
    lammps_oracle.require_lammps()
    n, box, temperatures = 32, 3.6, (2.0, 1.5)
    nodes, weights = np.polynomial.legendre.leggauss(3)
    first, last = (1 / t for t in temperatures)
    betas = first + (last - first) * (nodes + 1) / 2
    found = [mean_energy(n, box, 1 / beta, 60_000, 7 + k) for k, beta in enumerate(betas)]
    scale = (last - first) / 2
    expected = scale * sum(w * u for w, (u, _) in zip(weights, found, strict=True))
    error = scale * math.hypot(*(w * e for w, (_, e) in zip(weights, found, strict=True)))
    problem = liquid(n, box, list(temperatures), [0.0, 0.0])
    result = solvation.estimate_difference(problem, methods=("bridge",), target_error=0.03, seed=3)
    for answer in result.answers:
        print(answer.method, answer.delta_f, answer.std_error, "LAMMPS", expected, error)
        assert answer.reliable, answer.method
        assert abs(answer.delta_f - expected) < 4 * math.hypot(answer.std_error, error), answer.method


def widom(problem, radius, n_rounds, points, seed):
    """-ln <exp(-beta U)> of putting a solute anywhere into samples of the pure solvent, and its error from chains."""
    kernels, rng = problem.kernels(), np.random.default_rng(seed)
    with double_precision(), Fluid(problem, seed) as fluid:
        chains, found = fluid.equilibrate(0.0, 2, 0)
        x = fluid.sample(chains, n_rounds, math.ceil(found.inefficiency)).frames
        energy = jax.jit(lambda x: kernels.solute(x, jnp.float64(radius))[0])
        inserted = np.zeros(len(x))
        for _ in range(points):
            anywhere = problem.box_length * rng.random((len(x), 1, 3))
            inserted += np.exp(-problem.betas[0] * np.asarray(energy(np.moveaxis(x + anywhere, 0, -1)))) / points
    each = inserted.reshape(len(chains), -1).mean(axis=1)  # chains are independent
    mean = each.mean()
    return -math.log(mean), each.std(ddof=1) / math.sqrt(len(each)) / mean


@pytest.mark.parametrize(("radius", "method"), [(0.6, "bar"), (0.9, "bridge")])
def test_a_solute_from_a_point_costs_what_widom_says(radius, method):
    """Growth at the centre of the box, and insertion anywhere, are one and the same: all places are alike."""
    problem = ff.load(liquid(30, 3.65, 2.0, [0.0, radius]))
    expected, error = widom(problem, radius, 16, 200, 9)
    found = solvation.estimate_difference(problem, methods=(method,), target_error=0.05, seed=4)
    answer = found.answers[0]
    print(method, answer.delta_f, answer.std_error, "Widom", expected, error)
    assert error < 0.03
    assert answer.reliable
    assert answer.std_error < 0.06
    assert abs(answer.delta_f - expected) < 4 * math.hypot(answer.std_error, error)
