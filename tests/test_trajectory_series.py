"""A whole trajectory in one pass, against the same steps taken one by one. Random frames fix their seeds."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import freeflow as ff
from freeflow.errors import InputError
from freeflow.geometry import nearest_neighbour_distance
from freeflow.trajectories import (
    compare_energies,
    energies,
    energy_precision,
    frame_series,
    read,
    to_displacements,
    write,
)

REFDATA = Path(__file__).resolve().parents[2] / "shared" / "refdata"


@pytest.fixture(scope="module")
def ice():
    return ff.load("mw_cubic_64")


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven frames of ice at a time."""
    monkeypatch.setattr("freeflow.trajectories.files._CHUNK", 7 * 3 * 64)


def displacements(system, n_frames, seed=0):
    size = 0.05 * nearest_neighbour_distance(system.crystal)
    u = np.random.default_rng(seed).normal(0, size, (n_frames, system.n_atoms, 3))
    return u - u.mean(axis=1, keepdims=True)


def eventful(system, n_frames):
    """A crystal in which one atom hops at frame 5 and back, and which melts from frame 20 to 27."""
    u = displacements(system, n_frames)
    rng = np.random.default_rng(1)
    u[5, 9] += [0.0, 0.0, 0.8 * nearest_neighbour_distance(system.crystal)]
    u[20:28] += rng.uniform(-0.5, 0.5, (8, system.n_atoms, 3)) * np.diag(system.crystal.cell)
    return u


def test_one_pass_gives_what_its_steps_give(ice, small_chunks, tmp_path):
    u = eventful(ice, 40)
    ours = energies(ice, u)
    write(tmp_path / "a.extxyz", ice, u, ours)
    done = []
    series = frame_series(tmp_path / "a.extxyz", ice, progress=done.append)
    assert done == [7, 14, 21, 28, 35, 40] and series.n_frames == 40 and series.path == str(tmp_path / "a.extxyz")
    np.testing.assert_array_equal(np.flatnonzero(series.hopped), [5])
    np.testing.assert_array_equal(np.flatnonzero(series.melted), np.arange(20, 28))
    sound = np.setdiff1d(np.arange(40), [5, *range(20, 28)])
    np.testing.assert_array_equal(np.flatnonzero(series.sound), sound)
    assert series.n_off[5] == 1 and (series.n_off[sound] == 0).all()
    np.testing.assert_allclose(series.energies[sound], ours[sound], rtol=1e-8)
    assert np.isinf(series.energies[~series.sound]).all()
    # The file has none of frames that are not of the crystal: theirs are infinite.
    np.testing.assert_array_equal(np.isfinite(series.file_energies), series.sound)
    assert series.energy_comparison.agrees and series.energy_comparison.n_frames == len(sound)
    np.testing.assert_allclose(
        series.mean_squared_displacements[sound], np.sum(u[sound] ** 2, axis=(1, 2)) / 64, rtol=1e-6
    )
    np.testing.assert_array_equal(series.kept, sound)
    np.testing.assert_allclose(series.displacements, u[sound], rtol=0, atol=2e-8)
    assert series.resolution == pytest.approx(1e-8)


@pytest.mark.parametrize(
    ("room", "every"), [(40, 1), (39, 1), (31, 1), (30, 2), (16, 2), (10, 4), (4, 8), (3, 16), (1, 64)]
)
def test_kept_frames_are_evenly_spaced(ice, small_chunks, tmp_path, room, every):
    u = eventful(ice, 40)
    write(tmp_path / "a.traj", ice, u)
    series = frame_series(tmp_path / "a.traj", ice, max_coordinates=room * 3 * 64 + 191)
    expected = np.array([k for k in range(0, 40, every) if series.sound[k]])
    assert len(expected) <= room
    np.testing.assert_array_equal(series.kept, expected)
    np.testing.assert_allclose(series.displacements, u[expected], rtol=0, atol=1e-12)
    assert len(series.energies) == 40


def test_part_of_a_file(ice, small_chunks, tmp_path):
    u = displacements(ice, 30)
    write(tmp_path / "a.dcd", ice, u)
    series = frame_series(
        tmp_path / "a.dcd", ice, tmp_path / "a.topology.pdb", start=3, stop=28, stride=2, sigma="angstrom"
    )
    taken = np.arange(3, 28, 2)
    np.testing.assert_array_equal(series.kept, np.arange(len(taken)))
    np.testing.assert_allclose(series.displacements, u[taken], rtol=0, atol=4e-6)
    assert np.isnan(series.file_energies).all() and series.energy_comparison.agrees is None
    (frames,) = read(tmp_path / "a.dcd", ice, start=3, stop=28, stride=2, chunk=99)
    assert series.resolution == frames.resolution


def test_part_of_a_series(ice, small_chunks, tmp_path):
    u = eventful(ice, 40)
    write(tmp_path / "a.extxyz", ice, u, energies(ice, u))
    whole = frame_series(tmp_path / "a.extxyz", ice, max_coordinates=25 * 3 * 64)
    part, alone = whole.part(12, 36), frame_series(tmp_path / "a.extxyz", ice, start=12, stop=36)
    for name in ("energies", "file_energies", "sound", "melted", "hopped", "n_frames"):
        np.testing.assert_array_equal(getattr(part, name), getattr(alone, name))
    # Labels of a melt are as good as any.
    spread, expected = (some.mean_squared_displacements[alone.sound] for some in (part, alone))
    np.testing.assert_array_equal(spread, expected)
    np.testing.assert_array_equal(part.kept, [0, 2, 4, 6, 16, 18, 20, 22])
    np.testing.assert_allclose(part.displacements, u[12 + part.kept], rtol=0, atol=2e-8)


def test_labels_carry_over_from_chunk_to_chunk(ice, small_chunks, tmp_path):
    """Frames in another order, melted where a chunk ends: what comes after keeps the labels of before."""
    u = displacements(ice, 30)
    order = np.random.default_rng(4).permutation(64)
    x = ice.crystal.sites + u
    x[10:14] = np.random.default_rng(5).random((4, 64, 3)) * np.diag(ice.crystal.cell)
    shuffled = x[:, order] - ice.crystal.sites
    write(tmp_path / "a.traj", ice, shuffled)
    series = frame_series(tmp_path / "a.traj", ice)
    np.testing.assert_array_equal(np.flatnonzero(series.melted), np.arange(10, 14))
    whole = to_displacements(ice.crystal.sites + shuffled, ice.crystal)
    np.testing.assert_allclose(series.displacements, whole.displacements[series.sound], rtol=0, atol=1e-12)


def test_a_trajectory_without_a_sound_frame(ice, tmp_path):
    x = np.random.default_rng(6).random((5, 64, 3)) * np.diag(ice.crystal.cell)
    write(tmp_path / "a.traj", ice, x - ice.crystal.sites, np.arange(5.0))
    series = frame_series(tmp_path / "a.traj", ice)
    assert series.melted.all() and not series.sound.any()
    assert series.kept.shape == (0,) and series.displacements.shape == (0, 64, 3)
    assert series.energy_comparison.agrees is None and series.energy_comparison.n_frames == 0


def test_what_cannot_be_done(ice, tmp_path):
    with pytest.raises(InputError, match=r"a.dcd: no such file"):
        frame_series(tmp_path / "a.dcd", ice)
    write(tmp_path / "a.dcd", ice, displacements(ice, 3))
    with pytest.raises(InputError, match="max_coordinates: 191 hold no frame of 64 atoms"):
        frame_series(tmp_path / "a.dcd", ice, max_coordinates=191)
    raw = (tmp_path / "a.dcd").read_bytes()
    (tmp_path / "a.dcd").write_bytes(raw[:-100])
    with pytest.raises(InputError, match=r"a.dcd: the file ends inside frame 2"):
        frame_series(tmp_path / "a.dcd", ice)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Five times the frames, the same memory: numbers per frame, kept frames and one chunk or two."""
    system = ff.load("mw_cubic_8")
    monkeypatch.setattr("freeflow.trajectories.files._CHUNK", 200 * 24)
    peaks = []
    for n_frames in (1000, 5000):
        write(tmp_path / "a.dcd", system, np.tile(displacements(system, 500), (n_frames // 500, 1, 1)))
        frame_series(tmp_path / "a.dcd", system, stop=400)  # compiled
        of_this = []
        for _ in range(3):  # threads of tests before may allocate beside it, too
            gc.collect()
            tracemalloc.start()
            series = frame_series(tmp_path / "a.dcd", system, max_coordinates=24 * 512)
            of_this.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        peaks.append(min(of_this))
        assert series.n_frames == n_frames and 256 < len(series.kept) <= 512
    frame, extra = 24 * 8, 4000 * 100  # at most 100 bytes of numbers for each of 4000 frames more
    assert peaks[1] - peaks[0] < extra < 4000 * frame


@pytest.mark.skipif(not REFDATA.is_dir(), reason="the reference trajectories are not part of the repository")
@pytest.mark.parametrize(
    ("name", "file"),
    [("lj_fcc_256", "traj.extxyz.gz"), ("mw_cubic_216", "traj_lossy.xtc"), ("mw_cubic_64", "traj.lammpstrj")],
)
def test_reference_trajectories(name, file):
    """LAMMPS's energies of the same frames."""
    system = ff.load(name)
    lammps = np.loadtxt(REFDATA / name / "energies.csv", delimiter=",")[:100, 1]
    series = frame_series(REFDATA / name / file, system, stop=100)
    assert series.n_frames == 100 and series.sound.all() and len(series.kept) == 100
    precision = energy_precision(system, series.displacements, series.resolution)
    assert compare_energies(lammps, series.energies, precision, system.units).agrees
    assert series.energy_comparison.agrees is (True if "extxyz" in file else None)
    assert series.energy_comparison.precision == precision
