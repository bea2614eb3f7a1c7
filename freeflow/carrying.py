"""Samples of a crystal in one state, carried to another by a map that would be exact if the crystal were harmonic.

In a fixed cell that is u -> s u with s = sqrt(beta_0 / beta). Where the cell moves it changes with the state, and the
force constants with the cell: displacements u and coordinates c of the strain go to

    u' = A A_0^-1 u,    c' = m + s (c - m_0),

A A_0^-1 carrying the harmonic crystal in the mean cell m_0 at beta_0 to that in the mean cell m at beta (m and m_0 are
coordinates of strains of one reference cell). Any m makes a sound map; a good one makes its work vary little. It is the
weighted mean of the carried samples, found anew for every state from what is known of the nearest one: a few numbers
from many samples, which bias the free energy by the order of 1/n kT, as the exponential average itself does.
docs/series.md has the formulas.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow import references
from freeflow.cells import CELL_MOTIONS, Strained, coordinates_of, log_volume_change, strain_of
from freeflow.crystals import at_state
from freeflow.errors import FreeflowError
from freeflow.geometry import nearest_neighbour_distance
from freeflow.isobaric import energy_alone, log_measure, strain_operations
from freeflow.references import Gaussian
from freeflow.result import Result
from freeflow.trajectories import energies
from freeflow.trajectories.recomputed import batch_size, in_batches
from freeflow.types import Scalar, ThermodynamicState, double_precision

_SETTLED, _ROUNDS = 0.25, 5  # shift of the mean cell, in standard deviations, that is not worth another round
_LONGEST = 4.0  # standard deviations that the mean cell moves in one round
_STEP = 2e-3  # displacement for differences of forces, in nearest-neighbour distances
_PRESSURE_STEP = 0.05  # of beta times the volume's spread, for derivatives with respect to pressure


class Carried(NamedTuple):
    """Samples in the state that they were carried to; what is not there has infinite work."""

    work: Float[np.ndarray, " n"]  # generalised, of crossing and map together [kT]
    enthalpy: Float[np.ndarray, " n"]  # U + p V, relative to the lattice in the reference cell [energy]
    volume: Float[np.ndarray, " n"]  # NaN in a fixed cell [length**3]


class FixedCell:
    """Samples of an estimate in a fixed cell; it must have been told to keep what `observed_crystal` returns."""

    def __init__(self, result: Result):
        self._result, self.system, self.pressure_step = result, result.system, 0.0
        self._u: np.ndarray = result.observed
        self.energy_evaluations = 0
        self._energy = self._relative_energies(self._u)

    def __len__(self) -> int:
        return len(self._u)

    def carried(self, temperature: float, pressure: float | None = None, near: bool = False) -> Carried:
        """The samples at another temperature."""
        state = at_state(self.system, temperature, pressure).state
        beta_0, beta = float(self.system.state.beta), float(state.beta)
        scale = math.sqrt(beta_0 / beta)
        energy = self._relative_energies(self._u * np.float32(scale))
        # The map is by the number that float32 holds: its logarithm counts 3 (N - 1) times.
        stretch = 3 * (self.system.n_atoms - 1) * math.log(float(np.float32(scale)))
        crossed = self._result.work.forward
        with np.errstate(invalid="ignore"):
            work = crossed + beta * energy - beta_0 * self._energy - stretch
        # Off the crystal before or after: it cannot be reached from there.
        lost = ~np.isfinite(energy) | ~np.isfinite(self._energy) | np.isposinf(crossed)
        return Carried(np.where(lost, np.inf, work), energy, np.full(len(energy), math.nan))

    def _relative_energies(self, u: np.ndarray) -> np.ndarray:
        self.energy_evaluations += len(u)
        inside = np.asarray(np.isfinite(u).all(axis=(1, 2)))
        with double_precision():
            found = energies(self.system, np.where(inside[:, None, None], u, np.float32(0.0)).astype(np.float64))
        return np.where(inside, found - self.system.constants["lattice energy"] * self.system.kt, np.inf)


class _Known(NamedTuple):
    """What is known of the cell in a state."""

    temperature: float
    pressure: float
    mean: Float[np.ndarray, " n_strains"]
    spread: Float[np.ndarray, " n_strains"]
    by_beta: Float[np.ndarray, " n_strains"]  # slope of the mean at constant pressure [energy]
    by_pressure: Float[np.ndarray, " n_strains"]  # and at constant beta [length**3/energy]


class _Map(NamedTuple):
    """Two harmonic crystals and cells; arrays, so that no state compiles anything anew."""

    whiten: Gaussian
    colour: Gaussian
    mean_before: Float[np.ndarray, " n_strains"]
    mean: Float[np.ndarray, " n_strains"]
    scale: np.float64


class MovingCell:
    """The same of an estimate at constant pressure, whose cell moves."""

    def __init__(self, result: Result):
        self._result, self.system = result, result.system
        assert self.system.cell_motion is not None
        self._motion = CELL_MOTIONS[self.system.cell_motion]
        self._x: Strained = result.observed
        self.energy_evaluations = 0
        crystal = self.system.crystal
        self._recipe = references.gaussian_crystal(crystal)
        # What the crystal's operations leave alone: the mean strain of a cubic crystal has no shape.
        self._symmetric = strain_operations(crystal, self._motion).mean(axis=0)
        self._energy_alone = energy_alone(self.system)
        self._evaluate = jax.jit(jax.vmap(self._mapped, (None, 0)))
        self._gradient = jax.jit(jax.vmap(jax.grad(self._lattice_energy), (0, None)))

        self._measure: np.ndarray = np.asarray(jax.vmap(self._log_measure)(self._x.strain))
        coordinates = np.tensordot(self._x.strain, self._motion.basis, ((1, 2), (1, 2)))
        volume = crystal.volume * np.exp(np.trace(self._x.strain, axis1=1, axis2=2))
        work = np.asarray(result.work.forward)
        self._mean_before = self._symmetric @ self._average(coordinates, work)
        identity = self._map(self._mean_before, float(self.system.state.beta))
        self._energy = self._evaluated(identity)[0]
        own = self._enthalpy(self._energy, volume, float(self.system.state.pressure))
        state = self.system.temperature, self.system.pressure
        self._known = [self._look(*state, self._mean_before, coordinates, own, volume, work)]
        spread = math.sqrt(self._average((volume - self._average(volume, work)) ** 2, work))
        self._spread = float(self.system.state.beta) * spread  # of beta V [length**3/energy]
        self.pressure_step = _PRESSURE_STEP / self._spread / self.system.units.pressure_unit  # [unit of the style]

    def __len__(self) -> int:
        return len(self._measure)

    def carried(self, temperature: float, pressure: float | None = None, near: bool = False) -> Carried:
        """The samples in another state.

        Args:
            temperature: In the unit style's unit.
            pressure: In the unit style's unit; that of the samples by default.
            near: Take the mean cell as it follows from the nearest known state, for derivatives.
        """
        pressure = self.system.pressure if pressure is None else pressure
        state = at_state(self.system, temperature, pressure).state
        mean, spread = self._foreseen(temperature, pressure)
        for _ in range(1 if near else _ROUNDS):
            energy, coordinates, volume, work = self._at(state, mean)
            if near:
                break
            shift = self._symmetric @ self._average(coordinates, work) - mean
            if not (np.abs(shift) / spread).max() >= _SETTLED:
                break
            mean = mean + _shortened(shift, spread)
        enthalpy = self._enthalpy(energy, volume, float(state.pressure))
        if not near:
            self._known.append(self._look(temperature, pressure, mean, coordinates, enthalpy, volume, work))
        return Carried(work, enthalpy, volume)

    def _foreseen(self, temperature: float, pressure: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean cell and its spread, to first order from the nearest known state."""
        k, unit = self.system.units.boltzmann, self.system.units.pressure_unit
        beta = 1 / (k * temperature)

        def apart(known: _Known) -> tuple[float, float]:
            return beta - 1 / (k * known.temperature), (pressure - known.pressure) * unit

        def distance(known: _Known) -> float:
            by_beta, by_pressure = apart(known)
            return abs(by_beta / beta) * math.sqrt(1.5 * self.system.n_atoms) + abs(by_pressure) * self._spread

        nearest = min(self._known, key=distance)
        by_beta, by_pressure = apart(nearest)
        step = self._symmetric @ (by_beta * nearest.by_beta + by_pressure * nearest.by_pressure)
        return nearest.mean + _shortened(step, nearest.spread), nearest.spread

    def _look(
        self,
        temperature: float,
        pressure: float,
        mapped_to: np.ndarray,
        coordinates: np.ndarray,
        enthalpy: np.ndarray,
        volume: np.ndarray,
        work: np.ndarray,
    ) -> _Known:
        """How the mean cell, which samples were mapped to, follows beta and pressure in a state, from fluctuations."""
        beta, mean = 1 / (self.system.units.boltzmann * temperature), self._average(coordinates, work)
        off = coordinates - mean

        def covariance(other: np.ndarray) -> np.ndarray:
            return self._average(off * (other - self._average(other, work))[:, None], work)

        spread = np.sqrt(self._average(off**2, work))
        return _Known(
            temperature,
            pressure,
            mapped_to,  # not the mean itself: maps of neighbours then differ from this one's by little
            spread,
            -covariance(np.where(np.isfinite(enthalpy), enthalpy, 0.0)),
            -beta * covariance(volume),
        )

    @staticmethod
    def _average(values: np.ndarray, work: np.ndarray) -> Any:
        """Of the target of samples of this work; of all samples if none is there."""
        least = np.min(work)
        weights = np.exp(least - work) if np.isfinite(least) else np.ones(len(work))
        values = np.where(np.reshape(weights, (-1,) + (1,) * (values.ndim - 1)) > 0, values, 0.0)
        return np.tensordot(weights, values, 1) / weights.sum()

    def _enthalpy(self, energy: np.ndarray, volume: np.ndarray, pressure: float) -> np.ndarray:
        return energy + pressure * (volume - self.system.crystal.volume)

    def _at(self, state: ThermodynamicState, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Energy, strain coordinates, volume and work of samples whose mean cell is moved to `mean`."""
        beta_0, pressure_0 = float(self.system.state.beta), float(self.system.state.pressure)
        beta, pressure = float(state.beta), float(state.pressure)
        there = self._map(mean, beta)
        energy, measure, coordinates, growth = self._evaluated(there)
        volume = self.system.crystal.volume * np.exp(growth)
        before = self.system.crystal.volume * np.exp(np.trace(self._x.strain, axis1=1, axis2=2))
        n_stretched = self._motion.n_strains
        log_det = float(there.colour.log_det - there.whiten.log_det) + n_stretched * math.log(there.scale)
        crossed = np.asarray(self._result.work.forward)
        with np.errstate(invalid="ignore"):
            u = beta * self._enthalpy(energy, volume, pressure) - measure
            u_0 = beta_0 * self._enthalpy(self._energy, before, pressure_0) - self._measure
            work = crossed + u - u_0 - log_det
        lost = ~np.isfinite(energy) | ~np.isfinite(self._energy) | np.isposinf(crossed)
        return energy, coordinates, volume, np.where(lost, np.inf, work)

    def _map(self, mean: np.ndarray, beta: float) -> _Map:
        beta_0 = float(self.system.state.beta)
        before, after = self._harmonic(self._mean_before, beta_0), self._harmonic(mean, beta)
        if before is None or after is None:  # the lattice is no minimum of the energy: one scale for all modes
            before, after = self._springs(beta_0), self._springs(beta)
        return _Map(before, after, self._mean_before, mean, np.float64(math.sqrt(beta_0 / beta)))

    def _harmonic(self, mean: np.ndarray, beta: float) -> Gaussian | None:
        """The harmonic crystal in a cell; None if its lattice is not stable."""
        crystal = self.system.crystal
        h = _STEP * nearest_neighbour_distance(crystal)
        atoms = crystal.site_of[0]
        units = np.zeros((3 * len(atoms), crystal.n_atoms, 3))
        units[np.arange(3 * len(atoms)), np.repeat(atoms, 3), np.tile(np.arange(3), len(atoms))] = h
        with double_precision():
            gradients = np.asarray(self._gradient(np.concatenate([units, -units]), mean))
        self.energy_evaluations += 2 * len(units)
        plus, minus = np.split(gradients, 2)
        columns = np.moveaxis((plus - minus) / (2 * h), 0, 2)
        try:
            blocks = references.harmonic_blocks(crystal, columns, beta)
            return references.gaussian_from_blocks(crystal, blocks)
        except FreeflowError:
            return None

    def _springs(self, beta: float) -> Gaussian:
        n_translations, n_basis = self.system.crystal.site_of.shape
        blocks = np.zeros((n_basis, n_translations, n_basis, 3, 3))
        blocks[range(n_basis), 0, range(n_basis)] = beta * np.eye(3)
        return references.gaussian_from_blocks(self.system.crystal, blocks)

    # ------------------------------------------------------------------ of one sample

    def _log_measure(self, strain: Array) -> Array:
        return log_measure(strain, self.system.n_atoms, self._motion)

    def _lattice_energy(self, u: Array, mean: Array) -> Array:
        return self._energy_alone(Strained(u, strain_of(self._motion, mean)))

    def _mapped(self, there: _Map, x: Strained) -> tuple[Array, Array, Array, Scalar]:
        u = self._recipe.colour(there.colour, self._recipe.whiten(there.whiten, x.displacements))
        before = coordinates_of(self._motion, x.strain)
        coordinates = jnp.asarray(there.mean) + there.scale * (before - there.mean_before)
        strain = strain_of(self._motion, coordinates)
        energy = self._energy_alone(Strained(u, strain))
        return energy, self._log_measure(strain), coordinates, log_volume_change(strain)

    def _evaluated(self, there: _Map) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        self.energy_evaluations += len(self)
        u, strain = self._x

        def evaluate(rows: np.ndarray) -> tuple[Array, ...]:
            return self._evaluate(there, Strained(u[rows].astype(np.float64), strain[rows]))

        return in_batches(evaluate, np.arange(len(self)), batch_size(self.system))


def _shortened(step: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """A step of the mean cell, not longer than `_LONGEST` standard deviations."""
    return step * min(1.0, _LONGEST / max(float((np.abs(step) / spread).max()), 1e-300))


Carrier = FixedCell | MovingCell


def carrier(result: Result) -> Carrier:
    """What carries the samples of an estimate to other states."""
    with double_precision():
        return FixedCell(result) if result.system.cell_motion is None else MovingCell(result)
