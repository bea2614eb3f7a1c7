"""Under a pressure: frames with cells of their own are written, read, drawn and compared.

Random tests fix their seeds. Four standard errors raise one false alarm in 16 000 per comparison, of which there are
six; a comparison of a sound trajectory fails one time in 1000, and there are two.
"""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeflow as ff
from freeflow import cli, comparison, sampling, trajectories
from freeflow.cells import CELL_MOTIONS, Strained, stretches
from freeflow.config import load
from freeflow.crystals import crystal_system
from freeflow.errors import InputError
from freeflow.isobaric import energy_alone
from freeflow.observables import radial_distribution, time_average, weighted_average
from freeflow.types import double_precision

N = 800
LJ = {
    "name": "lj_under_pressure",
    "units": "lj",
    "temperature": 1.0,
    "pressure": 20.0,
    "potential": {"kind": "lennard_jones", "cutoff": 1.45},
    # The equilibrium cell is found: 1.15.
    "crystal": {"lattice": "fcc", "repeats": [2, 2, 2], "number_density": 1.10},
    "estimate": {"target_error": 3e-3},
}


def crystal(motion="isotropic", **changes):
    return load({**LJ, "cell_motion": motion, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("frames")


def configurations(system, n=6, seed=0):
    """Made-up frames: displacements of a few per cent, strains of a few per cent in all ways that the cell has."""
    rng, motion = np.random.default_rng(seed), CELL_MOTIONS[system.cell_motion]
    u = 0.03 * rng.normal(size=(n, system.n_atoms, 3))
    strains = np.tensordot(0.02 * rng.normal(size=(n, motion.n_strains)), motion.basis, 1)
    return u - u.mean(axis=1, keepdims=True), strains


def in_fixed_cell(system, strain):
    """The same crystal in one of its cells, fixed."""
    f = stretches(strain[None])[0]
    deformed = replace(system.crystal, cell=system.crystal.cell @ f, sites=system.crystal.sites @ f)
    return crystal_system("fixed", deformed, system.potential, system.units, system.temperature, 1.0), f


# ------------------------------------------------------------------------------ frames and files


@pytest.mark.parametrize("motion", ["isotropic", "orthorhombic", "triclinic"])
@pytest.mark.parametrize("kind", ["extxyz", "traj", "lammpstrj", "xtc", "dcd", "trr", "h5"])
def test_frames_come_back_with_their_cells(kind, motion, folder):
    """Whatever the format does to the cell: most turn it, in every frame another way."""
    system = crystal(motion)
    u, strains = configurations(system)
    trajectories.write(folder / f"a.{kind}", system, u, strains=strains)
    (frames,) = trajectories.read(folder / f"a.{kind}", system)
    rounding = 1e-2 if kind == "xtc" else 1e-5
    np.testing.assert_allclose(frames.strains, strains, atol=1e-6)
    np.testing.assert_allclose(frames.cells, system.crystal.cell @ stretches(strains), atol=1e-5)
    found = trajectories.to_displacements(frames.positions, system.crystal)
    np.testing.assert_allclose(found.displacements, u, atol=rounding)


@pytest.mark.parametrize("turn", [False, True], ids=["as written", "turned"])
def test_frames_of_a_cell_that_drifts_and_turns(turn, folder):
    """Atoms wrapped, moved and shuffled, cells turned with them: the same displacements and strains."""
    import ase.io
    from scipy.spatial.transform import Rotation

    system, rng = crystal("triclinic"), np.random.default_rng(3)
    u, strains = configurations(system)
    images = []
    for k, f in enumerate(stretches(strains)):
        rotation = Rotation.random(random_state=k).as_matrix() if turn else np.eye(3)
        order = rng.permutation(system.n_atoms)
        cell, x = system.crystal.cell @ f @ rotation, ((system.crystal.sites + u[k]) @ f @ rotation)[order]
        images.append(ase.Atoms("X" * system.n_atoms, x + rng.normal(size=3), cell=cell, pbc=True))
        images[-1].wrap()
    ase.io.write(folder / "turned.extxyz", images)
    (frames,) = trajectories.read(folder / "turned.extxyz", system)
    found = trajectories.to_displacements(frames.positions, system.crystal)
    np.testing.assert_allclose(frames.strains, strains, atol=1e-6)
    # Labels that differ by a lattice translation are as good: distances from sites are then those of others.
    ours, theirs = (np.sort(np.linalg.norm(x, axis=2), axis=1) for x in (u, found.displacements))
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_energies_and_distances_are_those_in_the_frames_own_cell():
    """Of a crystal that is built in that cell, fixed; g(r) by its definition with the frame's volume."""
    system = crystal("triclinic")
    u, strains = configurations(system, 4)
    with double_precision():
        found = trajectories.energies(system, Strained(u, strains))
    shells = radial_distribution(system.crystal, n_bins=40)
    ours = shells.normalise(shells.count(u, strains))
    for k in range(len(u)):
        fixed, f = in_fixed_cell(system, strains[k])
        assert trajectories.energies(fixed, u[k : k + 1] @ f)[0] == pytest.approx(found[k], rel=1e-9)
        same = replace(shells, crystal=fixed.crystal)
        theirs = same.normalise(same.count(u[k : k + 1] @ f))[0]
        # A pair on the edge of a bin may fall to either side.
        assert np.abs(np.cumsum(ours[k] - theirs)).max() < 0.02 * np.cumsum(theirs).max()
        np.testing.assert_allclose(ours[k].sum(), theirs.sum(), rtol=2e-3)
    far = shells.count(8 * u, strains)  # atoms off their sites are searched for
    assert np.isfinite(far).all() and far.sum() > 0


def test_another_reference_cell_changes_nothing(folder):
    """Energies, volumes and the density of the ensemble but for its constants."""
    system = crystal("triclinic")
    u, strains = configurations(system, 8)
    trajectories.write(folder / "b.traj", system, u, strains=strains)
    series = trajectories.frame_series(folder / "b.traj", system)
    other = crystal("triclinic", crystal={**LJ["crystal"], "number_density": 1.2})
    moved = series.in_reference(system.crystal, other.crystal)
    np.testing.assert_allclose(moved.volumes(other.crystal), series.volumes(system.crystal), rtol=1e-12)
    values = []
    with double_precision():
        for one, frames in ((system, series), (other, moved)):
            x = frames.configurations(np.arange(8))
            values.append(np.asarray(jax.jit(jax.vmap(one.target.reduced_potential, (0, None)))(x, one.state)))
            np.testing.assert_allclose(trajectories.energies(one, x), series.energies, rtol=1e-9)
    np.testing.assert_allclose(np.diff(values[1]), np.diff(values[0]), atol=1e-7)


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("motion", "change", "complaint"),
    [
        (
            "isotropic",
            lambda f: 0 * f + 0.01 * np.eye(3),
            "the cell is the same in all 8 frames: a run at constant vol",
        ),
        (
            "isotropic",
            lambda f: f + np.diag([0.01, -0.01, 0.0]),
            "has another shape than the system's 3.07552 x 3.07552 x 3.07552 sigma, and cell_motion: isotropic",
        ),
        ("isotropic", lambda f: f + 0.35 * np.eye(3), "stretched by less than 35%"),
        ("orthorhombic", lambda f: f + 0.01 * (1 - np.eye(3)), "orthorhombic does not change it; triclinic would"),
        ("triclinic", lambda f: f * np.eye(3), "the cell changes in fewer ways than cell_motion: triclinic lets it"),
    ],
)
def test_cells_that_do_not_fit(motion, change, complaint, folder):
    system = crystal(motion)
    n = 8 if motion != "triclinic" else 20
    u, strains = configurations(system, n)
    trajectories.write(folder / "c.extxyz", system, u, strains=change(strains))
    with pytest.raises(InputError) as error:
        trajectories.frame_series(folder / "c.extxyz", system)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_a_cell_out_of_its_range_is_no_sample(folder):
    system = crystal("triclinic")
    u, strains = configurations(system, 20)
    strains[3] = np.diag([0.16, -0.08, -0.08])
    trajectories.write(folder / "far.traj", system, u, strains=strains)
    series = trajectories.frame_series(folder / "far.traj", system)
    assert list(np.flatnonzero(~series.sound)) == [3] == list(np.flatnonzero(series.hopped))
    assert np.isinf(series.energies[3]) and np.isfinite(series.energies[series.sound]).all()
    assert 3 not in series.kept


def test_frames_without_cells_are_refused(folder):
    system = crystal()
    u, strains = configurations(system)
    trajectories.write(folder / "d.extxyz", system, u, strains=strains)
    text = (folder / "d.extxyz").read_text().replace("Lattice=", "Nothing=")
    (folder / "d.extxyz").write_text(text)
    with pytest.raises(InputError, match="frame 0: there is no cell; under a pressure every frame needs its own"):
        list(trajectories.read(folder / "d.extxyz", system))


def test_formats_of_one_cell_are_refused(folder):
    with pytest.raises(InputError, match="PDB files hold one cell for all frames"):
        sampling.sample(crystal(), 10, folder / "e.pdb")


# ------------------------------------------------------------------------------ drawn and compared


@pytest.fixture(scope="module")
def drawn(folder):
    return sampling.sample(crystal(), N, folder / "mc.extxyz", seed=3)


@pytest.fixture(scope="module")
def sound(drawn, folder):
    return comparison.compare(crystal(), folder / "mc.extxyz", seed=4)


def test_drawn_frames_have_cells_of_their_own(drawn):
    assert drawn.status == "complete" and drawn.facts["acceptance"] > 0.7
    assert drawn.cells.shape == (N, 3, 3) and drawn.displacements.shape == (N, 32, 3)
    np.testing.assert_allclose(np.linalg.det(drawn.cells), drawn.volumes, rtol=1e-12)
    rows = np.genfromtxt(drawn.files[-1], delimiter=",", names=True)
    np.testing.assert_allclose(rows["volume_sigma3"], drawn.volumes, rtol=1e-9)
    (frames,) = trajectories.read(drawn.files[0], drawn.system)
    np.testing.assert_allclose(np.linalg.det(frames.cells), drawn.volumes, rtol=1e-6)


def test_the_mean_pressure_is_the_one_asked_for(drawn):
    """kT (N + 1) / V less dU/dV at fixed scaled displacements has the mean p, by parts: without V^N it has not."""
    system, u, strains = drawn.system, np.asarray(drawn.displacements, float), drawn.strains
    alone = energy_alone(system)
    with double_precision():
        energy = lambda growth, u, strain: alone(Strained(u, strain + growth / 3 * jnp.eye(3)))  # noqa: E731
        slopes = np.asarray(jax.jit(jax.vmap(jax.grad(energy), (None, 0, 0)))(0.0, u, strains))
    found = time_average((system.kt * (32 + 1) - slopes) / drawn.volumes, N / drawn.effective_samples)
    assert abs(found.mean - 20.0) < 4 * found.std_error
    assert found.std_error < 0.5 * system.kt / drawn.volumes.mean() * 32


@pytest.mark.slow
@pytest.mark.parametrize("method", ["weighted", "resampled"])
def test_weights_and_chains_agree_on_volume_and_energy(drawn, method):
    weighted = sampling.sample(crystal(), N, method=method, seed=5)
    values = [np.stack([x.volumes / 32, x.energies / 32], axis=1) for x in (drawn, weighted)]
    ours = time_average(values[0], N / drawn.effective_samples)
    log_weights = np.zeros(N) if weighted.work is None else -weighted.work
    theirs = weighted_average(values[1], log_weights)
    error = theirs.std_error * math.sqrt(N / weighted.effective_samples if weighted.work is None else 1.0)
    assert np.all(np.abs(ours.mean - theirs.mean) < 4 * np.hypot(ours.std_error, error))


def test_a_sound_trajectory_agrees(sound):
    assert sound.verdict == "agree", sound.reason
    names = [check.name for check in sound.checks]
    assert "mean volume per atom" in names and "distribution of the volume" in names
    assert "beta G / N: FEP against BAR" in names
    said = json.loads(sound.json_text())
    assert said["volume_per_atom"]["unit"] == "sigma^3"
    assert said["volume_per_atom"]["model"]["value"] == pytest.approx(0.8695, abs=4e-3)
    assert said["estimate"]["quantity"] == "gibbs_free_energy"
    assert "beta G / N" in str(sound)


def test_bar_with_frames_and_the_model_alone_have_the_same_g(sound):
    z = (float(sound.fep_per_atom.mean) - sound.result.beta_f_per_atom) / float(sound.fep_per_atom.std_error)
    assert abs(z) < 4
    assert sound.result.estimator == "bar" and len(sound.result.work.reverse) > 100


def test_cells_that_are_too_large_disagree(drawn, sound, folder):
    """By a fifth of their spread: seen in the volumes, though not in what atoms do in them."""
    shift = 0.2 * np.trace(drawn.strains, axis1=1, axis2=2).std() / 3 * np.eye(3)
    trajectories.write(folder / "larger.traj", drawn.system, drawn.displacements, strains=drawn.strains + shift)
    found = trajectories.equilibrium(trajectories.frame_series(folder / "larger.traj", drawn.system))
    system = sound.system
    found = found.in_reference(drawn.system.crystal, system.crystal)
    again = comparison._compared(system, sound.plan, found, sound.result, radial_distribution(system.crystal))
    verdicts = {check.name: check.passed for check in again["checks"]}
    assert again["verdict"] == "disagree" and not verdicts["mean volume per atom"]


@pytest.mark.slow
def test_a_trajectory_under_another_pressure_disagrees(drawn, folder, capsys, tmp_path):
    """On the command line, with a report."""
    import yaml

    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**LJ, "pressure": 21.0}))
    words = ["compare", str(tmp_path / "s.yaml"), str(folder / "mc.extxyz"), "--report", str(tmp_path / "r.html")]
    assert cli.main([*words, "--no-cache", "--quiet"]) == 3
    assert capsys.readouterr().out.startswith("disagree")
    assert "Volume" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_a_flexible_cell_agrees_with_itself(folder):
    """All six strains, and a trajectory that stands for a program that turns the cell in every frame."""
    system = crystal("triclinic", temperature=0.5)  # at 1.0 so small a crystal nearly flows
    sampling.sample(system, 600, folder / "tri.lammpstrj", seed=1)
    found = comparison.compare(system, folder / "tri.lammpstrj", seed=2)
    assert found.verdict == "agree", found.reason
    assert "mean shape of the cell" in [check.name for check in found.checks]
    alone = ff.estimate(system, seed=7)
    error = math.hypot(alone.beta_f_std_error, found.result.beta_f_std_error)
    assert abs(alone.beta_f - found.result.beta_f) < 4 * error
