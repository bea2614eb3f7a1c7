"""The oracle itself is checked first: known lattice energies, finite differences, other frames."""

import numpy as np
import pytest
from lammps_oracle import MW, SILICON, lammps_energy_forces, require_lammps

pytestmark = pytest.mark.code("users")

require_lammps()

LJ = {"cutoff": 2.7, "shift": True}
FCC = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
DIAMOND = np.concatenate([FCC, FCC + 0.25])


def cubic(basis, repeats, number_density):
    """Cell and positions of a conventional cubic cell, repeated."""
    length = (len(basis) / number_density) ** (1 / 3)
    corners = np.stack(np.meshgrid(*3 * [np.arange(repeats)], indexing="ij"), -1).reshape(-1, 1, 3)
    return length * repeats * np.eye(3), length * (corners + basis).reshape(-1, 3)


def crystal(style):
    """The two states of Wirnsberger et al., Mach. Learn.: Sci. Technol. 3, 025009 (2022)."""
    if style == "lj":
        return *cubic(FCC, 4, 1.28), LJ, "lj"
    return *cubic(DIAMOND, 2, 0.033567184), MW, "real"


def displaced(positions, size, seed=0):
    return positions + size * np.random.default_rng(seed).standard_normal(positions.shape)


@pytest.mark.parametrize(
    ("style", "energy_per_atom"),
    [("lj", -6.303226), ("sw", -12.377985)],  # [epsilon], [kcal/mol]
)
def test_lattice_energy(style, energy_per_atom):
    cell, sites, params, units = crystal(style)
    energy, forces = lammps_energy_forces(cell, sites, style, params, units)
    assert energy / len(sites) == pytest.approx(energy_per_atom, abs=6e-7)
    np.testing.assert_allclose(forces, 0, atol=1e-9)


def test_shift_is_the_energy_at_the_cutoff():
    cell, sites = 20 * np.eye(3), np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 4.2]])
    bare = 4 * (1.2**-12 - 1.2**-6)
    shift = 4 * (2.7**-12 - 2.7**-6)
    assert lammps_energy_forces(cell, sites, "lj", LJ | {"shift": False}, "lj")[0] == pytest.approx(bare, rel=1e-13)
    assert lammps_energy_forces(cell, sites, "lj", LJ, "lj")[0] == pytest.approx(bare - shift, rel=1e-13)


def test_types_have_their_own_parameters():
    cell, sites = 20 * np.eye(3), np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 4.2], [1.0, 2.0, 8.0]])
    params = LJ | {"shift": False, "pairs": {(1, 2): {"epsilon": 0.5, "sigma": 1.1}}}
    energy, _ = lammps_energy_forces(cell, sites, "lj", params, "lj", types=[1, 2, 1])
    assert energy == pytest.approx(2 * ((1.1 / 1.2) ** 12 - (1.1 / 1.2) ** 6), rel=1e-13)


def test_silicon_trimer_with_a_right_angle():
    r = 1.2
    corner = SILICON["sigma"] * np.array([[0, 0, 0], [r, 0, 0], [0, r, 0]])
    legs = 2 * 7.049556277 * (0.6022245584 * r**-4 - 1) * np.exp(1 / (r - 1.8))
    hypotenuse = 7.049556277 * (0.6022245584 * (r * 2**0.5) ** -4 - 1) * np.exp(1 / (r * 2**0.5 - 1.8))
    decay = np.exp(1.2 / (r - 1.8)), np.exp(1.2 / (r * 2**0.5 - 1.8))
    right = (0 + 1 / 3) ** 2 * decay[0] ** 2
    acute = 2 * (0.5**0.5 + 1 / 3) ** 2 * decay[0] * decay[1]
    energy, _ = lammps_energy_forces(20 * np.eye(3), corner + 5, "sw", SILICON, "metal")
    assert energy == pytest.approx(2.1683 * (legs + hypotenuse + 21 * (right + acute)), rel=1e-12)


# So little in LJ that no pair crosses the cutoff, where the force jumps.
@pytest.mark.parametrize(("style", "size", "step"), [("lj", 0.005, 1e-5), ("sw", 0.1, 1e-4)])
def test_forces_are_minus_the_gradient(style, size, step):
    cell, sites, params, units = crystal(style)
    positions = displaced(sites, size)
    _, forces = lammps_energy_forces(cell, positions, style, params, units)
    direction = np.random.default_rng(1).standard_normal(positions.shape)
    ahead, behind = (
        lammps_energy_forces(cell, positions + sign * step * direction, style, params, units)[0] for sign in (1, -1)
    )
    assert (ahead - behind) / (2 * step) == pytest.approx(-np.sum(forces * direction), rel=1e-6)


@pytest.mark.parametrize("style", ["lj", "sw"])
@pytest.mark.parametrize(
    "other_vectors",
    [
        [[1, 1, 0], [0, 1, 0], [0, 0, 1]],  # sheared by a whole lattice vector
        [[1, 0, 0], [0, 1, 0], [1, -1, 1]],
        [[0, 1, 0], [1, 0, 0], [0, 0, 1]],  # left-handed
    ],
)
def test_other_cells_of_the_same_lattice_agree(style, other_vectors):
    cell, sites, params, units = crystal(style)
    positions = displaced(sites, 0.02 * cell[0, 0] / 4)
    energy, forces = lammps_energy_forces(cell, positions, style, params, units)
    other_energy, other_forces = lammps_energy_forces(
        np.array(other_vectors) @ cell, positions + cell[1], style, params, units
    )
    assert other_energy == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(other_forces, forces, atol=1e-9 * np.abs(forces).max())


@pytest.mark.parametrize("style", ["lj", "sw"])
def test_a_rotated_crystal_has_rotated_forces(style):
    cell, sites, params, units = crystal(style)
    positions = displaced(sites, 0.02 * cell[0, 0] / 4)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((3, 3)))
    energy, forces = lammps_energy_forces(cell, positions, style, params, units)
    rotated_energy, rotated_forces = lammps_energy_forces(cell @ rotation, positions @ rotation, style, params, units)
    assert rotated_energy == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(rotated_forces, forces @ rotation, atol=1e-9 * np.abs(forces).max())


def test_nothing_is_left_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    cell, sites, params, units = crystal("sw")
    lammps_energy_forces(cell, sites, "sw", params, units)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
