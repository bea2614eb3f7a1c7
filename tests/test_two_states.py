"""Other problems of two states, against molecular dynamics and against sums of stages. All of it is slow.

Four combined standard errors raise a false alarm once in 16 000 times.
"""

import itertools
import math

import lammps_oracle
import numpy as np
import pytest

from freeflow import solvation
from freeflow.estimators import statistical_inefficiency

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


def test_a_solute_from_a_point_is_the_sum_of_its_stages():
    """Insertion at once, by switching, against growth in two stages, the second one without switching."""
    sizes, n, box = (0.0, 0.7, 1.0), 30, 3.65
    once = solvation.estimate_difference(
        liquid(n, box, 2.0, [sizes[0], sizes[-1]]), methods=("bridge",), target_error=0.05, seed=4
    )
    stages = [
        solvation.estimate_difference(
            liquid(n, box, 2.0, [a, b]), methods=("bridge" if a == 0 else "bar",), target_error=0.05, seed=5
        )
        for a, b in itertools.pairwise(sizes)
    ]
    assert all(stage.best.reliable for stage in stages)
    total = sum(stage.delta_f for stage in stages)
    error = math.hypot(*(stage.delta_f_std_error for stage in stages))
    for answer in once.answers:
        print(answer.method, answer.delta_f, answer.std_error, "stages", total, error)
        assert answer.reliable, answer.method
        assert abs(answer.delta_f - total) < 4 * math.hypot(answer.std_error, error), answer.method
