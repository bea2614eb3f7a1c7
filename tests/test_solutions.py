"""Energies of a solvent around a solute, against LAMMPS and sums written out; frames; impossible input."""

import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freeflow import solutions
from freeflow.errors import InputError
from freeflow.solutions import direct_work, lennard_jones_solute, read_frames, solution, wca_solute
from freeflow.units import UNIT_STYLES

REFDATA = Path(__file__).resolve().parents[2] / "shared" / "refdata" / "solvation"
needs_data = pytest.mark.skipif(not REFDATA.is_dir(), reason="reference data are not here")
LJ = UNIT_STYLES["lj"]


def published():
    """The solvation problem of Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020)."""
    temperature = 300 * 0.001987204 / 0.1854
    return solution("wca", 125, 22.28 / 3.542, LJ, temperature, "wca", (9.2 / 3.542, 10.075 / 3.542))


def small(n=7, radii=(1.2, 1.7), solute="wca", temperature=2.0, box=3.4, **options):
    """A few atoms; the larger solute reaches beyond half the box."""
    return solution("small", n, box, LJ, temperature, solute, radii, **options)


def positions(seed, n=7, box=3.4):
    """Atoms half a box from the solute and from each other, more or less, in any image."""
    rng = np.random.default_rng(seed)
    grid = np.array(list(itertools.product(range(2), repeat=3)))[1:]
    x = (rng.permutation(grid)[:n] + rng.uniform(-0.2, 0.2, (n, 3))) * box / 2
    return x + box * rng.integers(-2, 3, (n, 3))


def written_out(problem, x, radius, epsilon=1.0, solute_cutoff=None):
    """U by loops over pairs and over 125 images of the solute."""
    box, cutoff = problem.box_length, problem.solvent.cutoff

    def pair(r, size, depth, cut):
        at_cut = (size / cut) ** 12 - (size / cut) ** 6
        return 4 * depth * ((size / r) ** 12 - (size / r) ** 6 - at_cut) if r < cut else 0.0

    total = 0.0
    for i, j in itertools.combinations(range(len(x)), 2):
        d = x[i] - x[j]
        total += pair(np.linalg.norm(d - box * np.round(d / box)), 1.0, epsilon, cutoff)
    if radius > 0:
        reach = 2 ** (1 / 6) * radius if solute_cutoff is None else solute_cutoff
        home = x - box * np.round(x / box)
        for shift in itertools.product(range(-2, 3), repeat=3):
            for r in np.linalg.norm(home + box * np.array(shift), axis=1):
                total += pair(r, radius, 1.0, reach)
    return total


@needs_data
@pytest.mark.parametrize("which", ["A", "B"])
def test_energies_are_those_of_lammps(which):
    """LAMMPS writes six decimals of beta U, and positions to eight digits."""
    problem = published()
    x = read_frames(REFDATA / f"ensemble_{which}.lammpstrj", problem, stop=200)
    table = np.loadtxt(REFDATA / f"energies_{which}.csv", delimiter=",", skiprows=1)[:200]
    for column, ensemble in ((2, problem.a), (3, problem.b)):
        u = jax.jit(jax.vmap(ensemble.reduced_potential, (0, None)))(x, problem.state)
        np.testing.assert_allclose(u, table[:, column], rtol=0, atol=2e-6)


@pytest.mark.parametrize("n", [1, 6, 7])
def test_energy_is_the_sum_over_pairs_and_images(n):
    problem, radii = small(n), [0.0, 1.2, 1.7, 1.7]
    x = np.array([positions(seed, n) for seed in range(4)])
    u = jax.vmap(problem.reduced_potential, (0, 0, None))(jnp.asarray(x), jnp.array(radii), problem.state)
    expected = [written_out(problem, row, radius) / 2.0 for row, radius in zip(x, radii, strict=True)]
    np.testing.assert_allclose(u, expected, rtol=1e-10, atol=1e-12)


def test_the_next_image_matters_here():
    """The test above would not see a missing image if no atom met two."""
    problem, x = small(), positions(0)
    home = x - problem.box_length * np.round(x / problem.box_length)
    shifts = problem.box_length * np.array(list(itertools.product(range(-1, 2), repeat=3)))
    met = np.linalg.norm(home[:, None] + shifts, axis=2) < problem.reach
    assert (met.sum(axis=1) >= 2).any()


def test_lennard_jones_solute_is_cut_where_the_solvent_is():
    problem = small(solute="lennard_jones", radii=(0.8, 1.1))
    x = positions(3)
    u = jax.jit(problem.b.reduced_potential)(jnp.asarray(x), problem.state)
    np.testing.assert_allclose(u, written_out(problem, x, 1.1, solute_cutoff=1.7) / 2.0, rtol=1e-10)


def test_states_differ_in_radius_and_temperature():
    problem = small(temperature=(2.0, 3.0))
    x = positions(1)
    u_a, u_b = (jax.jit(side.reduced_potential)(jnp.asarray(x), problem.state) for side in (problem.a, problem.b))
    np.testing.assert_allclose(u_a, written_out(problem, x, 1.2) / 2.0, rtol=1e-10)
    np.testing.assert_allclose(u_b, written_out(problem, x, 1.7) / 3.0, rtol=1e-10)
    assert problem.betas == (0.5, 1 / 3)


def test_gradients_are_derivatives_and_batches_are_single_configurations():
    problem = small()
    x = jnp.asarray(np.array([positions(seed) for seed in range(4)]))
    one = jax.jit(lambda x: problem.b.reduced_potential(x, problem.state))
    u, gradient = jax.jit(jax.vmap(jax.value_and_grad(one)))(x)
    np.testing.assert_allclose(u, [one(row) for row in x], rtol=1e-10)
    rng = np.random.default_rng(0)
    for row, slope in zip(x, gradient, strict=True):
        direction = rng.normal(size=row.shape)
        h = 1e-5
        difference = (one(row + h * direction) - one(row - h * direction)) / (2 * h)
        np.testing.assert_allclose(np.sum(slope * direction), difference, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-12), ("float32", 2e-5)])
def test_kernels_of_batches_agree_with_the_energy(dtype, close):
    problem, radius = small(), 1.65
    x = np.array([positions(seed) for seed in range(5)])
    x = x - problem.box_length * np.round(x / problem.box_length)
    kernels, batch = problem.kernels(dtype), jnp.asarray(np.moveaxis(x, 0, -1), dtype)
    (solvent, pull), (solute, push) = kernels.solvent(batch), kernels.solute(batch, radius)
    assert solvent.dtype == solute.dtype == np.float64 and pull.dtype == push.dtype == dtype
    unit = problem.state._replace(beta=np.float64(1.0))
    one = jax.value_and_grad(lambda x: problem.reduced_potential(x, radius, unit))
    u, gradient = jax.jit(jax.vmap(one))(jnp.asarray(x))
    np.testing.assert_allclose(solvent + solute, u, rtol=10 * close)
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(np.moveaxis(np.asarray(pull + push), -1, 0), gradient, rtol=0, atol=10 * close * scale)


@pytest.mark.parametrize("n", [2, 6, 7])
def test_every_pair_of_solvent_atoms_counts_once_at_its_nearest_image(n):
    problem, x = small(n), positions(1, n)
    i, j = np.triu_indices(n, 1)
    d = x[i] - x[j]
    d -= problem.box_length * np.round(d / problem.box_length)
    pairs = problem.solvent.pair(jnp.asarray((d**2).sum(axis=1)))
    np.testing.assert_allclose(problem.kernels().solvent(jnp.asarray(x)[..., None])[0], [pairs.sum()], rtol=1e-12)


def test_many_solvent_atoms_do_without_a_table(monkeypatch):
    x = jnp.moveaxis(jnp.stack([positions(seed) for seed in range(3)]), 0, -1)
    energy, gradient = jax.jit(small().kernels().solvent)(x)
    monkeypatch.setattr(solutions, "_TABLED", 3)
    monkeypatch.setattr(solutions, "_all_pairs", None)
    again, pull = jax.jit(small().kernels().solvent)(x)
    np.testing.assert_allclose(again, energy, rtol=1e-12)
    np.testing.assert_allclose(pull, gradient, atol=1e-12 * float(jnp.abs(gradient).max()))


def test_energy_has_the_symmetries_of_the_box():
    problem, x = small(), positions(2)
    rng = np.random.default_rng(2)
    u = jax.jit(lambda x: problem.b.reduced_potential(x, problem.state))
    for image in (x[rng.permutation(7)], -x, x[:, [1, 2, 0]], x + 3.4 * rng.integers(-3, 4, x.shape)):
        np.testing.assert_allclose(u(image), u(x), rtol=1e-9)


def test_no_solute_has_no_energy_and_no_pull_even_at_its_centre():
    problem = small(1, radii=(0.0, 1.0))
    value, slope = jax.value_and_grad(lambda x: problem.a.reduced_potential(x, problem.state))(jnp.zeros((1, 3)))
    assert value == 0 and (slope == 0).all()
    energy, push = problem.kernels("float32").solute(jnp.zeros((1, 3, 2), "float32"), 0.0)
    assert (energy == 0).all() and (push == 0).all()


def test_solutes_end_smoothly_at_their_reach():
    for solute, radius in ((wca_solute(), 1.3), (lennard_jones_solute(cutoff=1.6), 0.9)):
        reach = solute.reach(radius)
        near = solute.energy(jnp.array([(reach * (1 - 1e-9)) ** 2, (reach * (1 + 1e-9)) ** 2]), radius)
        np.testing.assert_allclose(near, 0, atol=1e-7)
        assert solute.energy(jnp.array(radius**2), radius) == pytest.approx(
            1.0 if solute.kind == "wca" else 0.1227, abs=1e-4
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 0}, "solution.solvent.count"),
        ({"box": -1.0}, "solution.box_length"),
        ({"box": math.nan}, "solution.box_length"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": (2.0, -1.0)}, "temperature"),
        ({"radii": (-0.1, 1.0)}, "solution.solute.sigma"),
        ({"radii": (1.0, 2.3)}, "beyond the box edge"),
        ({"solute": "wac"}, "use wca or lennard_jones"),
        ({"cutoff": 1.8}, "half the box"),
        ({"cutoff": 0.0}, "half the box"),
    ],
)
def test_impossible_problems_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        small(**change)


# --------------------------------------------------------------------------- frames


def dump(path, frames, box=3.4, solute=0):
    """A LAMMPS dump with the solute anywhere in space, atoms out of order."""
    rng = np.random.default_rng(9)
    lines = []
    for k, x in enumerate(frames):
        centre = rng.uniform(-1, 1, 3)
        rows = np.insert(x + centre, solute, centre, axis=0)
        lines += ["ITEM: TIMESTEP", str(k), "ITEM: NUMBER OF ATOMS", str(len(rows)), "ITEM: BOX BOUNDS pp pp pp"]
        lines += [f"{-box / 2} {box / 2}"] * 3 + ["ITEM: ATOMS id type xu yu zu"]
        lines += [f"{i + 1} 1 {a:.9f} {b:.9f} {c:.9f}" for i, (a, b, c) in reversed(list(enumerate(rows)))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("solute", [0, 3, 7])
def test_frames_are_relative_to_the_solute(tmp_path, solute):
    frames = np.array([positions(seed) for seed in range(6)])
    file = dump(tmp_path / "a.lammpstrj", frames, solute=solute)
    np.testing.assert_allclose(read_frames(file, small(), solute=solute), frames, atol=1e-8)
    np.testing.assert_allclose(read_frames(file, small(), solute=solute, start=1, stride=2), frames[1::2], atol=1e-8)


def test_frames_of_something_else_are_refused(tmp_path):
    frames = np.array([positions(seed) for seed in range(3)])
    file = dump(tmp_path / "a.lammpstrj", frames)
    with pytest.raises(InputError, match="8 atoms, but the system has 7"):
        read_frames(file, small(6))
    with pytest.raises(InputError, match="is not the system's"):
        read_frames(file, small(box=3.5))
    with pytest.raises(InputError, match="no atom 8"):
        read_frames(file, small(), solute=8)
    crowded = dump(tmp_path / "b.lammpstrj", np.where(np.arange(7)[:, None] == 2, frames % 3.4 * 0.1, frames))
    with pytest.raises(InputError, match="is atom 0 the solute"):
        read_frames(crowded, small())


@needs_data
def test_dcd_holds_the_same_frames_as_the_dump():
    problem = published()
    dumped, binary = (read_frames(REFDATA / f"ensemble_B.{kind}", problem, stop=20) for kind in ("lammpstrj", "dcd"))
    np.testing.assert_allclose(binary, dumped, atol=1e-6)
    with pytest.raises(InputError, match="is atom 5 the solute"):
        read_frames(REFDATA / "ensemble_B.dcd", problem, solute=5, stop=20)


def test_direct_work_is_the_difference_of_the_energies():
    problem = small(temperature=(2.0, 3.0))
    x = np.array([positions(seed) for seed in range(70)])  # more than one batch
    work = direct_work(problem, x, x[:2])
    u = [written_out(problem, x[-1], radius) / t for radius, t in ((1.2, 2.0), (1.7, 3.0))]
    np.testing.assert_allclose(work.forward[-1], u[1] - u[0], rtol=1e-9)
    np.testing.assert_allclose(work.reverse, -work.forward[:2], rtol=1e-12)
    assert work.forward.dtype == np.float64
