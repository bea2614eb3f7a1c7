"""From plain values to a `Solution`: a solvent in a periodic box around one fixed solute, in two states.

Configurations are positions of the solvent relative to the solute, (n_solvent, 3) [length]; any periodic image will do.
State A becomes state B as the solute's radius R, and perhaps the temperature, change:

    u(x; R) = beta [U_solvent(x) + sum over atoms i and images m of V_R(|x_i + m L|)].

The free energy difference is F_B - F_A = -ln(Z_B / Z_A) [kT], both integrals over the positions of the solvent in the
box. Solvent pairs meet at their nearest image; the solute is seen at every image within its reach, as LAMMPS does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freeflow.errors import InputError
from freeflow.geometry import NeighbourTable
from freeflow.potentials import Potential, lennard_jones, walks
from freeflow.potentials.core import pair_kernel
from freeflow.trajectories import Box, read
from freeflow.types import Ensemble, Numeric, Scalar, ThermodynamicState, Work, double_precision, in_double_precision
from freeflow.units import UnitStyle

Radius = Numeric | float
EnergyAndGradient = Callable[[Float[Array, "n 3"]], tuple[Float[Array, ""], Float[Array, "n 3"]]]
_WCA_REACH = 2 ** (1 / 6)
_HIGH = 1e3  # solute's energy above which a frame cannot be of this solute [kT]


@dataclass(frozen=True)
class Solute:
    """A solute that any radius makes another one of: `energy(r2, radius)` [energy], elementwise, 0 beyond the reach."""

    kind: str
    energy: Callable[[Array, Radius], Array]
    reach: Callable[[float], float]  # radius -> where the potential ends [length]


class PublishedDifference(NamedTuple):
    """A free energy difference from the literature to compare with."""

    delta_f: float  # F_B - F_A [kT]
    std_error: float | None = None
    source: str = ""


def wca_solute(epsilon: float = 1.0) -> Solute:
    """Weeks-Chandler-Andersen repulsion, 4 epsilon [(R/r)^12 - (R/r)^6 + 1/4] up to 2^(1/6) R; nothing at R = 0."""

    def energy(r2, radius):
        inside = r2 < _WCA_REACH**2 * radius**2
        # Guarded before the division: the branch not taken must be finite, and its gradient too.
        s2 = radius**2 / jnp.where(inside, r2, 1.0)
        s6 = s2 * s2 * s2
        return jnp.where(inside, 4 * epsilon * (s6 * s6 - s6 + 0.25), 0.0)

    return Solute("wca", energy, lambda radius: _WCA_REACH * radius)


def lennard_jones_solute(epsilon: float = 1.0, *, cutoff: float, shift: bool = True) -> Solute:
    """Truncated 12-6 potential of diameter R, 4 epsilon [(R/r)^12 - (R/r)^6]; nothing at R = 0."""

    def energy(r2, radius):
        inside = r2 < cutoff**2
        s6 = (radius**2 / jnp.where(inside, r2, 1.0)) ** 3
        at_cutoff = (radius / cutoff) ** 12 - (radius / cutoff) ** 6 if shift else 0.0
        return jnp.where(inside, 4 * epsilon * (s6 * s6 - s6 - at_cutoff), 0.0)

    return Solute("lennard_jones", energy, lambda _: cutoff)


# --------------------------------------------------------------------------- energies


_TABLED = 1000  # atoms of a solvent whose pairs all stand in a table on CPU; the threads of a GPU know no other way


class Kernels(NamedTuple):
    """Energies (batch,) [energy] and their gradients (n, 3, batch) [energy/length] of a batch of configurations.

    Positions are (n, 3, batch), with the batch innermost; any image will do. Energies are summed in the widest
    precision that JAX has switched on.
    """

    solvent: Callable[[Array], tuple[Array, Array]]
    solute: Callable[[Array, Radius], tuple[Array, Array]]  # for any radius up to the larger one


def _solvent_kernel(potential: Potential, n: int, box_length: float, dtype: str) -> Callable[[Array], Any]:
    """All pairs at their nearest images."""
    if n > _TABLED and not walks.has_threads():
        return _without_table(potential, n, box_length, dtype)
    return pair_kernel(potential, _all_pairs(n, box_length), dtype)


def _without_table(potential: Potential, n: int, box_length: float, dtype: str) -> Callable[[Array], Any]:
    """The same in memory O(n), at half the speed.

    Step s pairs atom i with atom i + s modulo n: a slice of an array that holds the atoms twice, and no index is
    looked up. A pair is evaluated from both of its ends, which costs less than sending its force to the other one.
    """
    box = np.asarray(box_length, dtype)

    def kernel(x: Array) -> tuple[Array, Array]:
        twice = jnp.concatenate([x, x])

        def meet(shift, carry):
            energy, gradient = carry
            d = jax.lax.dynamic_slice_in_dim(twice, shift, n) - x
            d = d - box * jnp.round(d / box)
            r2 = d[:, 0] * d[:, 0] + d[:, 1] * d[:, 1] + d[:, 2] * d[:, 2]
            more, slope = jax.jvp(potential.pair, (r2,), (jnp.ones_like(r2),))
            return energy + more, gradient - 2 * slope[:, None] * d

        zero = jnp.zeros_like(x)
        energy, gradient = jax.lax.fori_loop(1, n, meet, (zero[:, 0], zero))
        return 0.5 * _total(energy), gradient

    return kernel


def _all_pairs(n: int, box_length: float) -> NeighbourTable:
    """Every pair once, at its nearest image: step s pairs atom i with atom i + s modulo n, half way round."""
    atoms, steps = np.arange(n), np.arange(1, max(n // 2, 1) + 1)[:, None]
    partner, source = (atoms + steps) % n, (atoms - steps) % n
    # Of an even number, those half way round meet twice; a single atom meets itself.
    empty = (2 * steps == n) & (atoms >= n // 2) | (n == 1)
    box = np.full(3, box_length)
    return NeighbourTable(partner, source, np.zeros((*partner.shape, 3)), box_length, box, empty)


def _solute_kernel(solute: Solute, box_length: float, reach: float, dtype: str) -> Callable[[Array, Radius], Any]:
    """The solute at its nearest image and, where it reaches further than half the box, the next one along each axis."""
    box = np.asarray(box_length, dtype)

    def kernel(x: Array, radius: Radius) -> tuple[Array, Array]:
        r = jnp.asarray(radius).astype(dtype)

        def meet(r2: Array) -> tuple[Array, Array]:
            return jax.jvp(lambda r2: solute.energy(r2, r), (r2,), (jnp.ones_like(r2),))

        near = [x[:, a] - box * jnp.round(x[:, a] / box) for a in range(3)]
        r2 = near[0] * near[0] + near[1] * near[1] + near[2] * near[2]
        energy, slope = meet(r2)
        if reach <= box_length / 2:
            return _total(energy), 2 * slope[:, None] * jnp.stack(near, axis=1)
        further = [meet(_next_image(r2, d, box)) for d in near]
        slope = slope + sum(s for _, s in further)
        pull = [slope * d - box * jnp.sign(d) * s for d, (_, s) in zip(near, further, strict=True)]
        return _total(energy + sum(e for e, _ in further)), 2 * jnp.stack(pull, axis=1)

    return kernel


def _next_image(r2: Array, along: Array, box: Any) -> Array:
    """Squared distances from the image one box further along an axis: r^2 - d^2 + (L - |d|)^2."""
    return r2 + box * (box - 2 * jnp.abs(along))


def _total(energy: Array) -> Array:
    # Inside double_precision this is float64, outside it is what JAX allows.
    return jnp.sum(energy, axis=0, dtype=jax.dtypes.canonicalize_dtype("float64"))


def _one_at_a_time(kernel: Callable[[Array], tuple[Array, Array]], dtype: str) -> EnergyAndGradient:
    """A kernel as a function of one configuration (n, 3), whose vmap reaches the kernel."""

    def batched(x: Float[Array, "n 3 batch"]) -> tuple[Array, Array]:
        energy, gradient = kernel(x.astype(dtype))
        return energy, gradient.astype(x.dtype)

    @jax.custom_batching.custom_vmap
    def one(x):
        energy, gradient = batched(x[:, :, None])
        return energy[0], gradient[:, :, 0]

    @one.def_vmap
    def _(_axis_size, _in_batched, x):
        energy, gradient = batched(jnp.moveaxis(x, 0, -1))
        return (energy, jnp.moveaxis(gradient, -1, 0)), (True, True)

    return one


def _differentiable(evaluate: EnergyAndGradient) -> Callable[[Float[Array, "n 3"]], Float[Array, ""]]:
    """The energy alone, differentiable once."""

    @jax.custom_vjp
    def energy(x):
        return evaluate(x)[0]

    def backward(gradient, cotangent):
        return ((cotangent * gradient).astype(gradient.dtype),)

    energy.defvjp(evaluate, backward)
    return energy


# --------------------------------------------------------------------------- the problem


@dataclass(frozen=True, eq=False)
class Solution:
    """A solvent around a fixed solute in two states, A and B."""

    name: str
    n_solvent: int
    box_length: float  # [length]
    solvent: Potential
    diameter: float  # sigma of the solvent's atoms [length]
    solute: Solute
    radii: tuple[float, float]  # of the solute in A and B [length]
    units: UnitStyle
    temperatures: tuple[float, float]  # in A and B; in the unit style's unit
    plan: Any = None
    published: PublishedDifference | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # everything resolved, for provenance

    @property
    def n_atoms(self) -> int:
        """Atoms that move: the solvent."""
        return self.n_solvent

    @property
    def temperature(self) -> float:
        """Of state A."""
        return self.temperatures[0]

    @property
    def kt(self) -> float:
        """Thermal energy of state A [energy]."""
        return self.units.boltzmann * self.temperature

    @property
    def betas(self) -> tuple[float, float]:
        """1/kT in A and B [1/energy]."""
        cold, hot = (1.0 / (self.units.boltzmann * t) for t in self.temperatures)
        return cold, hot

    @property
    def state(self) -> ThermodynamicState:
        """Of state A; B's unless the temperatures differ."""
        return ThermodynamicState(np.float64(self.betas[0]), np.float64(0.0))

    @property
    def reach(self) -> float:
        """Where the potential of the larger solute ends [length]."""
        return max(self.solute.reach(radius) for radius in self.radii)

    def kernels(self, dtype: str = "float64") -> Kernels:
        """Energies and gradients of batches, in kernels of this precision."""
        return Kernels(
            _solvent_kernel(self.solvent, self.n_solvent, self.box_length, dtype),
            _solute_kernel(self.solute, self.box_length, self.reach, dtype),
        )

    @cached_property
    def solvent_energy(self) -> Callable[[Float[Array, "n 3"]], Float[Array, ""]]:
        """Energy of the solvent alone at one configuration [energy], in float64; differentiable once."""
        return _differentiable(_one_at_a_time(self.kernels().solvent, "float64"))

    def solute_energy(self, x: Float[Array, "n 3"], radius: Radius) -> Scalar:
        """Energy between solvent and solute at one configuration [energy], in the precision of x."""
        box = self.box_length
        near = x - box * jnp.round(x / box)
        r2 = jnp.sum(near * near, axis=1, keepdims=True)
        if self.reach > box / 2:
            r2 = jnp.concatenate([r2, _next_image(r2, near, box)], axis=1)
        return jnp.sum(self.solute.energy(r2, radius))

    def reduced_potential(self, x: Float[Array, "n 3"], radius: Radius, state: ThermodynamicState) -> Scalar:
        """beta [U_solvent + U_solute] at one configuration, with a solute of any radius up to the larger one."""
        return state.beta * (self.solvent_energy(x) + self.solute_energy(x, radius))

    def _ensemble(self, which: int) -> Ensemble:
        # The state that is handed in is A's; B's temperature stands in a fixed ratio to it.
        ratio, radius = self.betas[which] / self.betas[0], self.radii[which]

        def reduced_potential(x: Array, state: ThermodynamicState) -> Array:
            return ratio * self.reduced_potential(x, radius, state)

        return Ensemble(reduced_potential)

    @cached_property
    def a(self) -> Ensemble:
        """State A; `reduced_potential(x, state)` with state A's beta."""
        return self._ensemble(0)

    @cached_property
    def b(self) -> Ensemble:
        """State B; `reduced_potential(x, state)` with state A's beta, whatever B's temperature is."""
        return self._ensemble(1)


def solution(
    name: str,
    n_solvent: int,
    box_length: float,
    units: UnitStyle,
    temperature: float | tuple[float, float],
    solute: str,
    sigma: tuple[float, float],
    *,
    solute_epsilon: float = 1.0,
    epsilon: float = 1.0,
    diameter: float = 1.0,
    cutoff: float | str = "half_box",
    shift: bool = True,
    plan: Any = None,
    published: PublishedDifference | None = None,
    config: Mapping[str, Any] | None = None,
) -> Solution:
    """A Lennard-Jones solvent around a fixed solute, from plain values.

    Args:
        name: Name to report.
        n_solvent: Number of solvent atoms.
        box_length: Edge of the cubic box [length].
        units: Unit style of every number here.
        temperature: Of both states, or of A and B.
        solute: "wca" or "lennard_jones"; the latter is cut where the solvent is.
        sigma: Radius R of the solute in A and in B [length]; 0 is no solute.
        solute_epsilon: Depth of the solute's potential [energy].
        epsilon: Depth of the solvent's [energy].
        diameter: The solvent's sigma [length].
        cutoff: Where the solvent's potential ends [length], or "half_box".
        shift: Whether energies are shifted to zero at the cutoff.
        plan: How to estimate.
        published: A value to compare with.
        config: Everything resolved, for provenance.

    Raises:
        InputError: If a number is impossible, or a potential reaches too far for the box.
    """
    pair = (temperature, temperature) if isinstance(temperature, int | float) else temperature
    if n_solvent < 1:
        raise InputError(f"solution.solvent.count: at least one atom is needed, got {n_solvent}")
    if not (box_length > 0 and math.isfinite(box_length)):
        raise InputError(f"solution.box_length: must be positive, got {box_length:g} {units.length}")
    for t in pair:
        if not (t > 0 and math.isfinite(t)):
            raise InputError(f"temperature: must be positive, got {t:g} {units.temperature}")
    for radius in sigma:
        if not (radius >= 0 and math.isfinite(radius)):
            raise InputError(f"solution.solute.sigma: must be 0 or positive, got {radius:g} {units.length}")
    half = box_length / 2
    ends = half if cutoff == "half_box" else float(cutoff)
    if not 0 < ends <= half * (1 + 1e-12):
        raise InputError(
            f"solution.solvent.potential.cutoff: {ends:g} {units.length} is not between 0 and half the box ({half:.6g})"
        )
    if solute not in {"wca", "lennard_jones"}:
        raise InputError(f"solution.solute.kind: no solute {solute!r}; use wca or lennard_jones")
    kind = (
        wca_solute(solute_epsilon)
        if solute == "wca"
        else lennard_jones_solute(solute_epsilon, cutoff=ends, shift=shift)
    )
    reach = max(kind.reach(radius) for radius in sigma)
    if reach > box_length / math.sqrt(2):
        raise InputError(
            f"solution.solute.sigma: the solute reaches {reach:.6g} {units.length}, beyond the box edge / sqrt(2) "
            f"({box_length / math.sqrt(2):.6g}); use a larger box"
        )
    return Solution(
        name=name,
        n_solvent=n_solvent,
        box_length=float(box_length),
        solvent=lennard_jones(epsilon, diameter, ends, shift),
        diameter=float(diameter),
        solute=kind,
        radii=(float(sigma[0]), float(sigma[1])),
        units=units,
        temperatures=(float(pair[0]), float(pair[1])),
        plan=plan,
        published=published,
        config=config or {},
    )


# --------------------------------------------------------------------------- frames


def read_frames(
    path: str | Path,
    solution: Solution,
    *,
    solute: int = 0,
    start: int = 0,
    stop: int | None = None,
    stride: int = 1,
    sigma: str | None = None,
) -> Float[np.ndarray, "n_frames n 3"]:
    """Positions of the solvent relative to the solute, from any trajectory that `freeflow.trajectories` reads [length].

    Args:
        path: Trajectory of the solvent and the solute, n_solvent + 1 atoms.
        solution: What the frames are meant to be samples of, in either state.
        solute: Number of the solute among the atoms, from 0; LAMMPS dumps are sorted by atom id.
        start: First frame, from 0.
        stop: Frame to stop before.
        stride: Read every so many frames.
        sigma: "angstrom" or "nm": what one sigma is stored as, if in lj units the file has no cell.

    Raises:
        InputError: If the file cannot be used: another cell or number of atoms, or an atom that is not the solute.
    """
    if not 0 <= solute <= solution.n_solvent:
        raise InputError(f"{path}: no atom {solute}; atoms are counted from 0 to {solution.n_solvent}")
    box = Box(solution.n_solvent + 1, solution.box_length * np.eye(3), solution.units)
    chunks = read(path, box, start=start, stop=stop, stride=stride, sigma=sigma)  # pyright: ignore[reportArgumentType]
    frames = []
    for chunk in chunks:
        apart = chunk.positions - chunk.positions[:, solute, None]
        frames.append(np.delete(apart, solute, axis=1))
    x = np.concatenate(frames)
    with double_precision():
        # The smaller solute leaves room in samples of either state.
        kernel = jax.jit(solution.kernels().solute)
        energy = solution.betas[0] * np.asarray(kernel(np.moveaxis(x, 0, -1), np.float64(min(solution.radii)))[0])
    blocked = np.flatnonzero(~(energy < _HIGH))
    if len(blocked):
        frame, much = start + stride * blocked[0], energy[blocked[0]]
        raise InputError(
            f"{path}: in {len(blocked)} of {len(x)} frames solvent stands inside the solute (frame {frame}, {much:.3g} "
            f"kT); is atom {solute} the solute?"
        )
    return x


@in_double_precision
def direct_work(
    solution: Solution, frames_a: Float[np.ndarray, "n_a n 3"], frames_b: Float[np.ndarray, "n_b n 3"]
) -> Work:
    """Work of calling samples of A samples of B as they stand, and the other way round [kT]: for plain FEP and BAR."""

    @jax.jit
    def difference(x: Array) -> Array:
        u_a, u_b = (side.reduced_potential(x, solution.state) for side in (solution.a, solution.b))
        return u_b - u_a

    of = lambda frames: np.asarray(jax.lax.map(difference, np.asarray(frames, float), batch_size=64))  # noqa: E731
    return Work(of(frames_a), -of(frames_b))
