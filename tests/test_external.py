"""Potentials that are not ours: Python functions and ASE calculators, against known answers and our own kernels."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeflow as ff
from freeflow.cli import main
from freeflow.crystals import energy_of, lattice_crystal
from freeflow.errors import CalculatorError, InputError
from freeflow.potentials import ase_potential, lennard_jones, on_crystal, python_potential
from freeflow.potentials.external import evaluated
from freeflow.trajectories import energies

# Modules that stand beside the system file, as a user would write them.
MODULE = """
import os
import numpy as np
import jax
import jax.numpy as jnp


def lattice_springs(positions, cell, spacing=1.0, stiffness=1.0):
    # Every pair is drawn to the nearest vector of a simple cubic lattice: an Einstein crystal, with its centre free.
    d = positions[:, None] - positions[None]
    d = d - spacing * jnp.round(d / spacing)
    return 0.25 * stiffness / len(positions) * jnp.sum(d * d)


def lj(positions, cell, cutoff, species=None):
    assert species is not None
    box = jnp.diag(cell)[None, None]
    d = positions[:, None] - positions[None]
    d = d - box * jnp.round(d / box)
    r2 = jnp.sum(d * d, axis=-1) + 1e9 * jnp.eye(len(positions))
    s6, c6 = r2**-3, cutoff**-6
    return 2 * jnp.sum(jnp.where(r2 < cutoff**2, s6 * s6 - s6 - (c6 * c6 - c6), 0.0))


@jax.custom_vjp
def by_hand(positions, cell):
    return lj(positions, cell, 1.4, "X")


def forwards(positions, cell):
    value, slope = jax.value_and_grad(lj)(positions, cell, 1.4, "X")
    return value, (np.asarray(slope) if isinstance(slope, np.ndarray) else slope, cell)


by_hand.defvjp(forwards, lambda kept, c: (c * kept[0], jnp.zeros_like(kept[1])))

two_numbers = lambda x, cell: jnp.sum(x, axis=0)
single = lambda x, cell: lj(x, cell, 1.4, "X").astype("float32")
nowhere = lambda x, cell: lj(x, cell, 1.4, "X") / 0.0
with_numpy = lambda x, cell: np.sum(np.asarray(x))
tied = lambda x, cell: lj(x, cell, 1.4, "X") + 100 * jnp.sum(jnp.sin(x))
open_box = lambda x, cell: lj(x, 100 * cell, 1.4, "X")
labelled = lambda x, cell: lj(x, cell, 1.4, "X") * (2 + jnp.cos(2 * jnp.pi * (x[0, 0] - x[2, 0]) / cell[0, 0]))
hidden = lambda x, cell: lj(jax.lax.stop_gradient(x), cell, 1.4, "X") + 0.5 * lj(x, cell, 1.4, "X")
number = 3.0


from ase.calculators.lj import LennardJones


class Dies(LennardJones):
    def calculate(self, atoms=None, properties=("energy",), changes=()):
        print("a calculator may print what it likes")
        super().calculate(atoms, properties, changes)
        if np.ptp(atoms.positions - atoms.positions.round(9)) > 0 and self.parameters.get("how"):
            if self.parameters["how"] == "exit":
                os._exit(7)
            raise RuntimeError("no convergence\\nafter 100 steps")


class NoStress(LennardJones):
    implemented_properties = ["energy", "energies", "forces", "free_energy"]

    def __init__(self):
        super().__init__(rc=1.4)


cut = lambda: LennardJones(rc=1.4)


def unwilling():
    raise ValueError("no licence")


not_one = dict
"""
STATE = "units: lj\ntemperature: 0.4\nthermal_wavelength: 1.0\n"
FCC = "crystal: {lattice: fcc, repeats: [2, 2, 2], number_density: 1.2}\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("mine", None)
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]


def write(folder, potential, crystal=FCC, more=""):
    path = folder / "s.yaml"
    path.write_text(f"name: s\n{STATE}potential: {potential}\n{crystal}{more}")
    return path


# ------------------------------------------------------------------ Python functions


@pytest.mark.parametrize("reference", ["harmonic", "self_consistent"])
def test_an_einstein_crystal_has_its_exact_free_energy(folder, reference):
    """beta F = -ln[sqrt(N) V (2 pi / (beta k))^(3 (N - 1) / 2)] with Lambda = 1."""
    text = '{kind: python, function: "mine:lattice_springs", arguments: {spacing: 1.5, stiffness: 200.0}}'
    path = write(folder, text, "crystal: {lattice: sc, repeats: [3, 3, 3], lattice_constant: 1.5}\n")
    result = ff.estimate(str(path), reference=reference, bridge=None, max_samples=64)
    n, volume = 27, 4.5**3
    exact = -0.5 * math.log(n) - math.log(volume) - 1.5 * (n - 1) * math.log(2 * math.pi * 0.4 / 200.0)
    assert result.beta_f == pytest.approx(exact, abs=1e-6 if reference == "harmonic" else 1e-3)


def test_a_function_equals_the_built_in_kind(folder):
    crystal = lattice_crystal("fcc", (2, 2, 2), number_density=1.2)
    own = on_crystal(lennard_jones(cutoff=1.4), crystal)
    theirs = on_crystal(python_potential("mine:lj", {"cutoff": 1.4}, folder), crystal)
    assert theirs.lattice_energy() == pytest.approx(own.lattice_energy(), rel=1e-12)
    u = jnp.asarray(0.05 * np.random.default_rng(3).standard_normal((5, 32, 3)))
    a, b = (energy.relative(1.0, "float64") for energy in (own, theirs))
    (e_a, f_a), (e_b, f_b) = (jax.jit(jax.vmap(jax.value_and_grad(energy)))(u) for energy in (a, b))
    np.testing.assert_allclose(e_b, e_a, rtol=1e-10)
    np.testing.assert_allclose(f_b, f_a, rtol=1e-9, atol=1e-9)
    assert float(jax.jit(b)(u[0])) == pytest.approx(float(e_a[0]), rel=1e-10)
    exact = own.force_constants(np.arange(2))
    np.testing.assert_allclose(theirs.force_constants(np.arange(2)), exact, atol=1e-8)
    # Gradients that were written by hand have no second derivative: finite differences then.
    by_hand = on_crystal(python_potential("mine:by_hand", {}, folder), crystal)
    np.testing.assert_allclose(by_hand.force_constants(np.arange(1)), exact[:, :, :3], atol=2e-3 * np.abs(exact).max())


LJ_IN_CELL = [
    pytest.param(lambda folder: python_potential("mine:lj", {"cutoff": 1.4}, folder), 0.0, id="python"),
    pytest.param(lambda folder: ase_potential("mine:cut", {}, folder, 1), 0.0, id="ase"),
    pytest.param(lambda folder: ase_potential("mine:NoStress", {}, folder, 1), 1e-5, id="ase without stress"),
]


@pytest.mark.parametrize(("make", "rounding"), LJ_IN_CELL)
def test_in_a_deformed_cell_it_equals_the_built_in_kind(folder, make, rounding):
    """Energy, forces and the derivative with respect to F; of stretches, as the function knows no more."""
    crystal = lattice_crystal("fcc", (2, 2, 2), number_density=1.2)
    stretch = np.random.default_rng(2).uniform(-0.03, 0.03, (3, 3))
    u, f = 0.03 * np.random.default_rng(3).standard_normal((3, 32, 3)), np.eye(3) * (1 + stretch)[:, None]
    found = []
    for potential in (lennard_jones(cutoff=1.4), make(folder)):
        energy = on_crystal(potential, crystal).deformed(1.1, 1.0, "float64")
        value = jax.jit(jax.vmap(jax.value_and_grad(energy, (0, 1))))
        found.append(value(jnp.asarray(u), jnp.asarray(f)))
    (e, (by_u, by_f)), (other, (its_u, its_f)) = found
    np.testing.assert_allclose(other, e, rtol=1e-9)
    np.testing.assert_allclose(its_u, by_u, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(
        np.einsum("naa->na", its_f), np.einsum("naa->na", by_f), atol=1e-8 + rounding * np.abs(by_f).max()
    )


def test_a_pressure_needs_a_potential_that_follows_its_cell(folder):
    more = "pressure: 1.0\n"
    sound = '{kind: python, function: "mine:lj", arguments: {cutoff: 1.4}}'
    assert ff.load(write(folder, sound, more=more)).cell_motion == "isotropic"
    with pytest.raises(InputError, match="by_hand is not the slope of its energy as the cell is strained"):
        ff.load(write(folder, '{kind: python, function: "mine:by_hand"}', more=more))
    with pytest.raises(InputError, match="mine:lj is not periodic in a strained cell"):  # it knows no shear
        ff.load(write(folder, sound, more=more + "cell_motion: triclinic\n"))


def test_batches_that_need_much_memory_go_piece_by_piece(folder, monkeypatch):
    crystal = lattice_crystal("fcc", (2, 2, 2), number_density=1.2)
    u = 0.05 * np.random.default_rng(3).standard_normal((5, 32, 3))
    found = []
    for memory in (2**28, 1):
        monkeypatch.setattr("freeflow.potentials.external._MEMORY", memory)
        found.append(evaluated(python_potential("mine:lj", {"cutoff": 1.4}, folder), crystal, u))
    for whole, pieces in zip(*found, strict=True):
        np.testing.assert_allclose(pieces, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("two_numbers", "must return one number, not arrays of shape (3,)"),
        ("single", "returns float32; it must compute in float64"),
        ("nowhere", "gives no finite energy at the lattice"),
        ("with_numpy", "cannot be traced by JAX: TracerArrayConversionError"),
        ("tied", "when all atoms move together"),
        ("open_box", "when atoms move by lattice vectors: it must be periodic"),
        ("labelled", "when two equal atoms change places"),
        ("hidden", "are not the slope of its energy"),
        ("missing", "the module mine has no missing"),
        ("number", "mine:number is no function, but of type float"),
        ("lj", "cannot be traced by JAX: TypeError"),  # without its cutoff
    ],
)
def test_functions_that_will_not_do_are_refused(folder, capsys, function, message):
    path = write(folder, f'{{kind: python, function: "mine:{function}"}}')
    assert main(["validate", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("potential", "message"),
    [
        ('{kind: python, function: "nowhere_to_be:found"}', "no module nowhere_to_be, neither in"),
        ("{kind: python, function: mine}", "s.yaml:5: potential.function: expected module:name, got 'mine'"),
        ('{kind: python, function: "mine:lj", argument: {}}', "did you mean arguments?"),
        ('{kind: python, function: "broken:lj"}', "cannot import broken: ZeroDivisionError"),
        ('{kind: ase, calculator: "mine:missing"}', "the module mine has no missing"),
        ('{kind: ase, calculator: "mine:unwilling"}', "cannot be made: ValueError: no licence"),
        ('{kind: ase, calculator: "mine:not_one"}', "makes a dict, which is no ASE calculator"),
        ('{kind: ase, calculator: "mine:Dies", arguments: {rc: 1.4, how: exit}}', "died (exit status 7)"),
        ('{kind: ase, calculator: "mine:Dies", arguments: {rc: 1.4, how: raise}}', "RuntimeError: no convergence"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(folder, capfd, potential, message):
    (folder / "broken.py").write_text("1 / 0\n")
    assert main(["validate", str(write(folder, potential))]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("freeflow")]
    assert len(said) == 1 and message in said[0]


def test_a_system_is_found_again_from_its_resolved_file(folder):
    path = write(folder, '{kind: python, function: "mine:lj", arguments: {cutoff: 1.4}}')
    system = ff.load(path)
    again = ff.load(system.config)
    assert again.config == system.config and again.constants == system.constants
    assert system.potential.cutoff is None
    with pytest.raises(InputError, match="Planck constant"):
        ff.load({**{k: v for k, v in system.config.items() if k != "thermal_wavelength"}, "masses": {"X": 1.0}})


# ------------------------------------------------------------------ ASE calculators


@pytest.fixture(scope="module")
def ase_lj():
    return ase_potential("ase.calculators.lj:LennardJones", {"rc": 1.4}, ".", workers=2)


def test_a_calculator_equals_the_built_in_kind(ase_lj):
    crystal = lattice_crystal("fcc", (2, 2, 2), number_density=1.2)
    own, theirs = on_crystal(lennard_jones(cutoff=1.4), crystal), on_crystal(ase_lj, crystal)
    assert theirs.lattice_energy() == pytest.approx(own.lattice_energy(), rel=1e-12)
    u = jnp.asarray(0.05 * np.random.default_rng(3).standard_normal((5, 32, 3)))
    a, b = (energy.relative(1.0, "float64") for energy in (own, theirs))
    both = jax.jit(jax.vmap(jax.value_and_grad(b)))(u)
    np.testing.assert_allclose(both[0], jax.vmap(a)(u), rtol=1e-12)
    np.testing.assert_allclose(both[1], jax.vmap(jax.grad(a))(u), rtol=1e-10, atol=1e-10)
    exact = own.force_constants(np.arange(1))
    np.testing.assert_allclose(theirs.force_constants(np.arange(1)), exact, atol=2e-3 * np.abs(exact).max())


def test_double_precision_reaches_threads_of_xla(ase_lj):
    """Callbacks run in threads that know nothing of the switch; 1e-12 of a position would be lost in float32."""
    crystal = lattice_crystal("fcc", (2, 2, 2), number_density=1.2)
    u = np.zeros((1, 32, 3))
    u[0, 0, 0] = 0.1
    shifted = u.copy()
    shifted[0, 0, 0] += 1e-7
    (one,), (two,) = (evaluated(ase_lj, crystal, x)[0] for x in (u, shifted))
    slope = evaluated(ase_lj, crystal, u)[1][0, 0, 0]
    assert two - one == pytest.approx(1e-7 * slope, rel=1e-3)


def test_free_energies_are_those_of_the_built_in_kind(folder):
    """Reference, samples and estimate through calculators; both error bars are fair: one false alarm in 15 000."""
    ours = write(folder, "{kind: lennard_jones, cutoff: 1.4}")
    own = ff.estimate(str(ours), bridge=None, max_samples=8192, target_error=1e-5)
    theirs = write(folder, '{kind: ase, calculator: "ase.calculators.lj:LennardJones", arguments: {rc: 1.4}}')
    other = ff.estimate(str(theirs), bridge=None, max_samples=512, target_error=1e-5)
    assert other.energy_evaluations["reference"] < own.energy_evaluations["reference"] / 2
    apart = own.beta_f_per_atom - other.beta_f_per_atom
    assert abs(apart) < 4 * math.hypot(own.beta_f_per_atom_std_error, other.beta_f_per_atom_std_error)
    assert 0 < other.beta_f_per_atom_std_error < 1e-2


def test_a_calculator_that_fails_on_the_way_ends_the_run(folder):
    path = write(folder, '{kind: ase, calculator: "ase.calculators.lj:LennardJones", arguments: {rc: 1.4}, workers: 1}')
    system = ff.load(path)
    pool = system.potential.on(system.crystal).require.__self__
    (worker,) = pool._workers
    worker.kill()
    with pytest.raises(CalculatorError, match=r"died \(signal 9\)"):
        ff.estimate(system, bridge=None, max_samples=64)


def test_energies_of_frames(ase_lj):
    config = {
        "name": "s",
        "units": "lj",
        "temperature": 0.4,
        "thermal_wavelength": 1.0,
        "potential": {"kind": "ase", "calculator": "ase.calculators.lj:LennardJones", "arguments": {"rc": 1.4}},
        "crystal": {"lattice": "fcc", "repeats": [2, 2, 2], "number_density": 1.2},
    }
    built_in = {**config, "potential": {"kind": "lennard_jones", "cutoff": 1.4}}
    u = 0.03 * np.random.default_rng(5).standard_normal((3, 32, 3))
    found = [energies(ff.load(values), u) for values in (config, built_in)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-11)
    assert energy_of(ff.load(config)).on_host
