"""Energies that are not ours: any JAX function of positions and cell, any ASE calculator.

Neither is known to have a cutoff, so displacements are evaluated as positions in the whole cell, in float64, and the
energy of the lattice is taken off. Both are looked at before they are used (`require_sound`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.errors import InputError
from freeflow.geometry import nearest_neighbour_distance
from freeflow.potentials.deformed import DeformedEnergy, differentiable
from freeflow.potentials.host import Job, shared_pool
from freeflow.types import Crystal, Numeric, double_precision, in_double_precision
from freeflow.user_code import in_one_line, load_object

# Positions (batch, n_atoms, 3) -> energies (batch,) and gradients (batch, n_atoms, 3).
EvaluateBatch = Callable[[Array], tuple[Array, Array]]
# The same in cells (batch, 3, 3) of their own; and virials (batch, 3, 3), derivatives with respect to strain.
EvaluateInCells = Callable[[Array, Array], tuple[Array, Array, Array]]

_MEMORY = 2**28  # bytes that a batch of a Python function may need besides its results
_STEP = 4e-3  # displacement for finite differences of forces, in nearest-neighbour distances
# Random displacements that a potential is looked at with, in nearest-neighbour distances.
_DISPLACEMENT = 0.02


class Evaluator(NamedTuple):
    """An external energy on one crystal."""

    evaluate: EvaluateBatch
    evaluate_in_cells: EvaluateInCells
    hessian_columns: Callable[[np.ndarray], np.ndarray] | None  # exact ones, where they can be had
    require: Callable[[], None]  # raises what went wrong outside JAX


@dataclass(frozen=True)
class External:
    """A potential that is given as a whole."""

    name: str
    evaluator: Callable[[Crystal], Evaluator]
    on_host: bool  # evaluated by other processes, not by JAX
    values: Mapping[str, Any] = field(default_factory=dict)  # what it is known by
    cutoff: None = None  # not known
    _made: dict[int, tuple[Crystal, Evaluator]] = field(default_factory=dict, repr=False, compare=False)

    def on(self, crystal: Crystal) -> Evaluator:
        """The same on a crystal; made once."""
        if id(crystal) not in self._made:
            self._made[id(crystal)] = (crystal, self.evaluator(crystal))
        return self._made[id(crystal)][1]


# ------------------------------------------------------------------------------ Python functions


def python_potential(function: str, arguments: Mapping[str, Any], folder: str | Path) -> External:
    """An energy from a JAX function `(positions, cell, **arguments) -> energy`.

    Args:
        function: `module:name`. Positions (n_atoms, 3) and cell (3, 3), rows, are float64 arrays; what it returns is a
            float64 number [energy]. If it has a parameter `species`, it is told the chemical symbols.
        arguments: Passed on by name.
        folder: Where the module may lie, if it is not installed.

    Raises:
        InputError: If it cannot be found.
    """
    code = load_object(function, folder)

    def evaluator(crystal: Crystal) -> Evaluator:
        told = {"species": crystal.species} if _takes_species(code) else {}
        cell = np.array(crystal.cell)

        def in_cell(positions: Array, cell: Array) -> Array:
            return code(positions, cell, **arguments, **told)

        def energy(positions: Array) -> Array:
            return in_cell(positions, jnp.asarray(cell))

        def strained(positions: Array, cell: Array) -> tuple[Array, Array, Array]:
            value, (by_positions, by_cell) = jax.value_and_grad(in_cell, (0, 1))(positions, cell)
            return value, by_positions, by_positions.T @ positions + by_cell.T @ cell

        n_bytes = _require_traceable(energy, crystal, function)
        both = jax.value_and_grad(energy)
        at_once = int(np.clip(_MEMORY // max(n_bytes, 1), 1, 1024))

        def evaluate(positions: Array) -> tuple[Array, Array]:
            if len(positions) <= at_once:
                return jax.vmap(both)(positions)
            return jax.lax.map(both, positions, batch_size=at_once)

        def evaluate_in_cells(positions: Array, cells: Array) -> tuple[Array, Array, Array]:
            if len(positions) <= at_once:
                return jax.vmap(strained)(positions, cells)
            return jax.lax.map(lambda one: strained(*one), (positions, cells), batch_size=at_once)

        return Evaluator(
            evaluate, evaluate_in_cells, lambda atoms: _autodiff_columns(energy, crystal, atoms), lambda: None
        )

    return External(function, evaluator, False, {"function": function, "arguments": dict(arguments)})


def _takes_species(code: Callable[..., Any]) -> bool:
    try:
        return "species" in inspect.signature(code).parameters
    except (TypeError, ValueError):  # callables without a signature
        return False


@in_double_precision
def _require_traceable(energy: Callable[[Array], Array], crystal: Crystal, name: str) -> int:
    """Bytes that one evaluation with forces needs; an error of one line if JAX cannot trace it."""
    like = jax.ShapeDtypeStruct(crystal.sites.shape, "float64")
    try:
        result = jax.eval_shape(energy, like)
        shapes = [leaf.shape for leaf in jax.tree.leaves(result)]
        if shapes != [()]:
            told = "nothing" if not shapes else ", ".join(str(shape) for shape in shapes)
            raise InputError(f"potential: {name} must return one number, not arrays of shape {told}")
        if result.dtype != np.dtype("float64"):
            raise InputError(
                f"potential: {name} returns {result.dtype}; it must compute in float64, as its positions are"
            )
        compiled = jax.jit(jax.value_and_grad(energy)).lower(like).compile()
    except InputError:
        raise
    except Exception as error:  # whatever the user's function happens to raise
        raise InputError(f"potential: {name} cannot be traced by JAX: {in_one_line(error)}") from None
    analysis = compiled.memory_analysis()
    return int(getattr(analysis, "temp_size_in_bytes", 0))


@in_double_precision
def _autodiff_columns(energy: Callable[[Array], Array], crystal: Crystal, atoms: np.ndarray) -> np.ndarray:
    gradient = jax.grad(energy)
    sites = jnp.asarray(crystal.sites)
    column = jax.jit(lambda direction: jax.jvp(gradient, (sites,), (direction,))[1])
    return np.stack([np.asarray(column(direction)) for direction in _directions(crystal, atoms)], axis=2)


def _directions(crystal: Crystal, atoms: np.ndarray) -> list[np.ndarray]:
    """Unit displacements (n_atoms, 3) of each of the atoms along x, y and z."""
    units = []
    for atom in atoms:
        for axis in range(3):
            unit = np.zeros(crystal.sites.shape)
            unit[atom, axis] = 1.0
            units.append(unit)
    return units


# ------------------------------------------------------------------------------ ASE calculators


def ase_potential(
    calculator: str,
    arguments: Mapping[str, Any],
    folder: str | Path,
    workers: int,
    unit: float = 1.0,
) -> External:
    """An energy from an ASE calculator, evaluated by processes that each have one of their own.

    Args:
        calculator: `module:factory`, such as "ase.calculators.emt:EMT".
        arguments: Of the factory, by name.
        folder: Where the module may lie, if it is not installed.
        workers: Number of processes.
        unit: One eV, which ASE computes in [energy]; lengths are angstrom in either. With lj units 1: epsilon and
            sigma stand for eV and angstrom.
    """

    def evaluator(crystal: Crystal) -> Evaluator:
        job = Job(calculator, dict(arguments), str(folder), crystal.species, crystal.cell, crystal.sites)
        pool = shared_pool(job, workers)

        def evaluate(positions: Array) -> tuple[Array, Array]:
            shapes = positions.shape[:1], positions.shape
            return _outside(pool.evaluate, unit, shapes, positions)  # pyright: ignore[reportReturnType]

        def evaluate_in_cells(positions: Array, cells: Array) -> tuple[Array, Array, Array]:
            shapes = positions.shape[:1], positions.shape, cells.shape
            return _outside(pool.evaluate_in_cells, unit, shapes, positions, cells)  # pyright: ignore[reportReturnType]

        return Evaluator(evaluate, evaluate_in_cells, None, pool.require)

    return External(calculator, evaluator, True, {"calculator": calculator, "arguments": dict(arguments)})


def _outside(
    function: Callable[..., tuple[np.ndarray, ...]], unit: float, shapes: tuple[tuple[int, ...], ...], *given: Array
) -> tuple[Array, ...]:
    """What a function on the host makes of float64 arrays, times `unit`.

    XLA's threads, which callbacks run in, do not know that double precision is switched on, and would round what passes
    to float32. So numbers go to and fro as pairs of whole numbers.
    """

    def call(*words: Any) -> tuple[np.ndarray, ...]:
        numbers = function(*(np.ascontiguousarray(word).view(np.float64)[..., 0] for word in words))
        return tuple((unit * part)[..., None].view(np.uint32) for part in numbers)

    result = tuple(jax.ShapeDtypeStruct((*shape, 2), "uint32") for shape in shapes)
    words = jax.pure_callback(call, result, *(jax.lax.bitcast_convert_type(part, jnp.uint32) for part in given))
    return tuple(jax.lax.bitcast_convert_type(word, jnp.float64) for word in words)


# ------------------------------------------------------------------------------ on a crystal


def relative_energy(potential: External, crystal: Crystal) -> Callable[[Array], Array]:
    """U(u) - U(0) of displacements (n_atoms, 3) [energy]; differentiable once, and vmap evaluates batches."""
    evaluate, sites = potential.on(crystal).evaluate, np.asarray(crystal.sites)
    at_rest = lattice_energy_of(potential, crystal)

    def batched(u: Float[Array, "batch n_atoms 3"]) -> tuple[Array, Array]:
        energies, gradients = evaluate(jnp.asarray(sites)[None] + u.astype("float64"))
        return energies - at_rest, gradients.astype(u.dtype)

    @jax.custom_batching.custom_vmap
    def one(u):
        energies, gradients = batched(u[None])
        return energies[0], gradients[0]

    @one.def_vmap
    def _(_axis_size, _in_batched, u):
        return batched(u), (True, True)

    @jax.custom_vjp
    def energy(u):
        return one(u)[0]

    def backward(gradient, cotangent):
        return ((cotangent * gradient).astype(gradient.dtype),)

    energy.defvjp(one, backward)
    return energy


def deformed_external(potential: External, crystal: Crystal) -> DeformedEnergy:
    """The same of displacements and a deformation F of the crystal: see `freeflow.potentials.deformed_energy`."""
    evaluate, sites, cell = potential.on(crystal).evaluate_in_cells, np.asarray(crystal.sites), np.array(crystal.cell)
    at_rest = lattice_energy_of(potential, crystal)

    def batched(u: Numeric, f: Numeric) -> tuple[Array, Array, Array]:
        f64 = f.astype("float64")
        turned = jnp.swapaxes(f64, 1, 2)
        positions = (jnp.asarray(sites)[None] + u.astype("float64")) @ turned
        energies, gradients, virials = evaluate(positions, jnp.asarray(cell)[None] @ turned)
        by_f = virials @ jnp.swapaxes(jnp.linalg.inv(f64), 1, 2)
        return energies - at_rest, (gradients @ f64).astype(u.dtype), by_f.astype(f.dtype)

    return differentiable(batched)


def lattice_energy_of(potential: External, crystal: Crystal) -> float:
    """Energy of the perfect lattice [energy]."""
    return float(evaluated(potential, crystal, np.zeros((1, *crystal.sites.shape)))[0][0])


@in_double_precision
def evaluated(
    potential: External, crystal: Crystal, displacements: Float[np.ndarray, "n n_atoms 3"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n n_atoms 3"]]:
    """Energies [energy] and gradients [energy/length] of some displacements, here and now.

    Raises:
        InputError: If a function fails.
        CalculatorError: If a calculator does.
    """
    evaluator = potential.on(crystal)
    with jax.ensure_compile_time_eval():
        energies, gradients = jax.jit(evaluator.evaluate)(jnp.asarray(crystal.sites[None] + displacements))
        found = np.asarray(energies), np.asarray(gradients)
    evaluator.require()
    return found


def force_constants_of(potential: External, crystal: Crystal, atoms: np.ndarray) -> Float[np.ndarray, "n_atoms 3 n"]:
    """Hessian columns at the lattice, exact where JAX can have them, else from central differences of forces."""
    exact = potential.on(crystal).hessian_columns
    if exact is not None:
        try:
            return exact(atoms)
        except (TypeError, NotImplementedError, ValueError):  # derivatives that were written by hand end at the first
            pass
    h = _STEP * nearest_neighbour_distance(crystal)
    units = np.array(_directions(crystal, atoms))
    _, gradients = evaluated(potential, crystal, np.concatenate([h * units, -h * units]))
    plus, minus = np.split(gradients, 2)
    return np.moveaxis((plus - minus) / (2 * h), 0, 2)


# ------------------------------------------------------------------------------ looking at it


def require_sound(potential: External, crystal: Crystal, kt: float) -> None:
    """Whether an external energy can be a crystal's, at the lattice and at displaced configurations.

    It must be finite with finite forces, change by nothing when all atoms move together, when an atom moves by a
    lattice vector and when equal atoms change places, and its forces must be its slope. Seven evaluations.

    Args:
        potential: What to look at.
        crystal: Where.
        kt: The thermal energy [energy]: violations well below it do no harm.

    Raises:
        InputError: If it does not hold, saying what; one line.
        CalculatorError: If a calculator fails.
    """
    name, rng = potential.name, np.random.default_rng(0)
    spacing = nearest_neighbour_distance(crystal)
    u = _DISPLACEMENT * spacing * rng.standard_normal(crystal.sites.shape)
    together = u + 0.37 * spacing * rng.standard_normal(3)
    around = u.copy()
    steps = rng.integers(-1, 2, crystal.sites.shape)
    around += steps @ crystal.cell
    swapped, kinds = u.copy(), np.array(crystal.species)
    twins = np.flatnonzero(kinds == kinds[0])[:2]
    if len(twins) == 2:
        x = (crystal.sites + u)[twins[::-1]]
        swapped[twins] = x - crystal.sites[twins]
    direction = rng.standard_normal(u.shape)
    h = 5e-4 * spacing
    many = np.stack([0 * u, u, together, around, swapped, u + h * direction, u - h * direction])
    energies, gradients = evaluated(potential, crystal, many)
    for k, where in ((0, "at the lattice"), (1, "where atoms are displaced")):
        if not math.isfinite(energies[k]):
            raise InputError(f"potential: {name} gives no finite energy {where}; check cell, density and units")
        if not np.isfinite(gradients[k]).all():
            raise InputError(f"potential: {name} gives no finite forces {where}")
    allowed = 0.01 * kt + 1e-6 * abs(energies[1])
    for k, what in (
        (2, "when all atoms move together: it must not depend on where the crystal stands"),
        (3, "when atoms move by lattice vectors: it must be periodic in its cell"),
        (4, "when two equal atoms change places"),
    ):
        if not abs(energies[k] - energies[1]) <= allowed:
            change = energies[k] - energies[1]
            raise InputError(f"potential: {name} changes by {change:.3g} ({change / kt:.2g} kT) {what}")
    slope = (energies[5] - energies[6]) / (2 * h)
    expected = float(np.sum(gradients[1] * direction))
    noise = 1e-9 * abs(energies[1]) / h  # rounding of the energies
    size = float(np.linalg.norm(gradients[1])) * float(np.linalg.norm(direction)) / math.sqrt(direction.size)
    if abs(slope - expected) > 0.05 * size + noise:
        raise InputError(
            f"potential: the forces of {name} are not the slope of its energy ({expected:.4g}, {slope:.4g})"
        )


_STRAIN, _STRAINED = 1e-4, 0.02  # for differences of energies; where `require_sound_strained` looks


def require_sound_strained(potential: External, crystal: Crystal, kt: float, basis: Float[np.ndarray, "n 3 3"]) -> None:
    """Whether an external energy is a crystal's as the cell is strained. Four evaluations.

    It must be periodic in the strained cell, and its virial must be its slope.

    Args:
        potential: What to look at.
        crystal: Where.
        kt: The thermal energy [energy].
        basis: Strains that the cell takes.

    Raises:
        InputError: If it is not; one line.
        CalculatorError: If a calculator fails.
    """
    rng = np.random.default_rng(1)
    u = _DISPLACEMENT * nearest_neighbour_distance(crystal) * rng.standard_normal(crystal.sites.shape)
    strain = np.tensordot(rng.uniform(0.5, 1.0, len(basis)), basis, 1)
    size = np.array([_STRAINED, _STRAINED, _STRAINED + _STRAIN, _STRAINED - _STRAIN])
    f = np.eye(3) + size[:, None, None] * strain
    cells, positions = crystal.cell @ f, (crystal.sites + u) @ f
    positions[1] += rng.integers(-1, 2, u.shape) @ cells[1]
    evaluator = potential.on(crystal)
    with double_precision(), jax.ensure_compile_time_eval():
        found = jax.jit(evaluator.evaluate_in_cells)(jnp.asarray(positions), jnp.asarray(cells))
        energies, _, virials = (np.asarray(part) for part in found)
    evaluator.require()
    if not abs(energies[1] - energies[0]) <= 0.01 * kt + 1e-6 * abs(energies[0]):
        raise InputError(
            f"potential: {potential.name} is not periodic in a strained cell; it must follow its cell to be put under "
            "pressure"
        )
    # dU along 1 + t e is tr(W (1 + t e)^-1 e).
    along = np.linalg.solve(f[0], strain)
    slope, expected = (energies[2] - energies[3]) / (2 * _STRAIN), float(np.sum(virials[0] * along))
    allowed = 0.05 * float(np.linalg.norm(virials[0]) * np.linalg.norm(along)) / 3
    if not abs(slope - expected) <= allowed + 1e-9 * abs(energies[0]) / _STRAIN + 0.1 * kt:
        raise InputError(
            f"potential: the stress of {potential.name} is not the slope of its energy as the cell is strained "
            f"({expected:.4g}, {slope:.4g}); it must follow its cell to be put under pressure"
        )
