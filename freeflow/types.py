"""Words shared by everyone: records that pass through jit and vmap, and recipes made of functions.

Records are NamedTuples of arrays. Recipes are frozen dataclasses of pure functions of one
configuration; they are closed over and never traced. Batching happens once, at the edge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float

from freeflow.errors import InputError, UnavailableError
from freeflow.units import UnitStyle

Configuration = Any  # any pytree of arrays; displacements (n_atoms, 3) for crystals
Params = Any
# Records are made of either: NumPy on the host, JAX inside transformations. Static checkers know no
# type that stands for both and computes with both; the tests check it at run time.
if TYPE_CHECKING:
    Numeric = Any
else:
    Numeric = jax.Array | np.ndarray | np.generic
Scalar = Float[Numeric, ""]
Key = Array
Device = Any  # a jax.Device, which is a class to Python only

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def double_precision() -> Iterator[None]:
    """Context in which JAX computes in float64: the one place where freeflow switches x64 on.

    It is local to the thread and leaves the process-wide flag alone. Kernels that run in float32
    ask for float32 explicitly inside it, and get all of its digits: by default GPUs multiply
    matrices of float32 with ten bits.
    """
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def in_double_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run `function` inside `double_precision`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with double_precision():
            return function(*args, **kwargs)

    return wrapped


# --------------------------------------------------------------------------- records


class ThermodynamicState(NamedTuple):
    """Where in the phase diagram; may be traced."""

    beta: Scalar  # [1/energy]
    pressure: Scalar  # [energy/volume]


class Work(NamedTuple):
    """Generalised work u_B(y) - u_A(x) - log_ratio [kT]; see DESIGN, section 1.

    `reverse` is the work of the reverse process, B to A, with its own sign: for a perfect transport
    forward = delta_f and reverse = -delta_f.
    """

    forward: Float[Numeric, " n_forward"]  # samples of A carried to B
    reverse: Float[Numeric, " n_reverse"]  # samples of B carried to A; may be empty


class Estimate(NamedTuple):
    """F_B - F_A in kT. `std_error` is NaN where it is not estimable, never 0."""

    delta_f: Scalar
    std_error: Scalar
    ess_fraction: Scalar


class Move(NamedTuple):
    """What a transport returns: where the configuration went, and its log ratio."""

    configuration: Configuration
    log_ratio: Scalar


# --------------------------------------------------------------------------- recipes


def unavailable(*_: Any, **__: Any) -> Any:
    """Stand-in for a function that an ensemble or a transport does not have."""
    raise UnavailableError("this ensemble or transport has no such function: nothing was given to sample or normalise")


@dataclass(frozen=True)
class Ensemble:
    """A distribution exp(-u)/Z: reference, target or stored samples."""

    reduced_potential: Callable[[Configuration, ThermodynamicState], Scalar]
    sample: Callable[[Key, ThermodynamicState], Configuration] = unavailable
    log_partition: Callable[[ThermodynamicState], Scalar] = unavailable


@dataclass(frozen=True)
class Transport:
    """Carries samples of A to B: `forward(params, key, x, state) -> Move`; `reverse` goes back.

    A flow ignores the key and returns its log det; a bridge uses it and returns its heat; a
    composition adds the log ratios.
    """

    init: Callable[[Key, Configuration, ThermodynamicState], Params]
    forward: Callable[[Params, Key, Configuration, ThermodynamicState], Move]
    reverse: Callable[[Params, Key, Configuration, ThermodynamicState], Move]


@dataclass(frozen=True)
class Bijector:
    """An invertible map: `forward(params, x, state) -> (y, log_det)`, `inverse` undoes it."""

    init: Callable[[Key, Configuration, ThermodynamicState], Params]
    forward: Callable[[Params, Configuration, ThermodynamicState], tuple[Configuration, Scalar]]
    inverse: Callable[[Params, Configuration, ThermodynamicState], tuple[Configuration, Scalar]]


@dataclass(frozen=True)
class Network:
    """A conditioner: `apply(params, *inputs)` is one array, `init(key, *inputs)` draws its parameters.

    Inputs are those of one configuration; only their shapes and dtypes matter to `init`.
    """

    init: Callable[..., Params]
    apply: Callable[..., Array]


@dataclass(frozen=True)
class Symmetry:
    """A random element of a group that leaves the target invariant: `act(key, x) -> x`."""

    name: str
    act: Callable[[Key, Configuration], Configuration]


@dataclass(frozen=True)
class TrainingPlan:
    """How to train a flow: the `training:` section of system.yaml with every default filled in."""

    loss: str = "path_gradient"  # path_gradient | reverse_kl; forward_kl | lbar with samples of the target
    max_steps: int | None = None  # where the learning rate ends at zero; neither of the two: 2000 steps
    max_minutes: float | None = None  # all of it, compilation and reference included
    batch_size: int = 32
    learning_rate: float = 4e-3  # at its highest
    clip: float = 4.0  # gradients are cut to so many times their usual norm
    average: float = 0.99  # share of the past in the running average of parameters at every step; 0 for none
    min_gain: float = 0.01  # a plateau: a third of the run lowers the bound by less [kT, total]; 0 to go on anyway


@dataclass(frozen=True)
class FlowPlan:
    """A learned flow: one from a file, or one to train."""

    checkpoint: str | None = None  # path, or "shipped"
    architecture: str | None = None  # residual | atomic_solids, if there is no checkpoint
    options: Mapping[str, Any] = field(default_factory=dict)  # of the architecture, where not by default
    training: TrainingPlan = field(default_factory=TrainingPlan)

    def values(self) -> dict[str, Any]:
        """Plain values as under `estimate.flow` in system.yaml."""
        if self.checkpoint is not None:
            return {"checkpoint": self.checkpoint}
        return {"architecture": self.architecture, **self.options, "training": dict(vars(self.training))}


@dataclass(frozen=True)
class TrajectoryPlan:
    """Frames of another program that stand for samples of the target."""

    file: str
    topology: str | None = None  # checked against the system; no format needs one
    frames: str = ":"  # START:STOP:STRIDE, as in Python
    sigma: str | None = None  # angstrom | nm: what one sigma is stored as, if lj units and no cell in the file

    @property
    def slice(self) -> dict[str, int | None]:
        """`start`, `stop` and `stride` as `freeflow.trajectories.read` takes them."""
        start, stop, stride, *_ = [*self.frames.split(":"), "", ""]
        return {"start": int(start or 0), "stop": int(stop) if stop else None, "stride": int(stride or 1)}


@dataclass(frozen=True)
class Plan:
    """How to estimate: the `estimate:` section of system.yaml with every default filled in."""

    reference: str = "self_consistent"  # einstein | harmonic | self_consistent
    bridge: int | str | None = "auto"  # number of stages, "auto", or None for no bridge
    estimator: str = "fep"  # fep | bar
    target_error: float = 1e-4  # one standard error [kT per atom]
    max_samples: int = 100_000
    seed: int = 0
    precision: str = "float32"  # of the energy kernels; estimators are always float64
    flow: FlowPlan | None = None  # a learned map between the reference and the bridge
    trajectory: TrajectoryPlan | None = None  # where the samples of the target for bar come from; else from the bridge


@dataclass(frozen=True)
class LearnedMap:
    """The map that `lfep` and `lbar` learn from frames."""

    kind: str = "field"  # field | radial | torus
    folds: int = 2  # parts of the frames; a map that learns from the others carries each
    max_minutes: float | None = None  # of training on work, in all; by default none for a field, and 2 for the others


@dataclass(frozen=True)
class DifferencePlan:
    """How to estimate the difference of two states: the `estimate:` section with every default filled in."""

    methods: tuple[str, ...] = ("bridge",)  # fep | bar | radial | lfep | lbar | bridge | escort | mbar
    target_error: float = 0.05  # one standard error [kT]
    max_samples: int = 100_000  # of each state
    max_minutes: float | None = None  # of all methods together
    map: LearnedMap = field(default_factory=LearnedMap)
    seed: int = 0

    def values(self) -> dict[str, Any]:
        """Plain values as under `estimate` in system.yaml."""
        return {**vars(self), "map": dict(vars(self.map))}


@dataclass(frozen=True)
class Published:
    """A value from the literature to compare with."""

    beta_f_per_atom: float
    std_error: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Crystal:
    """A perfect crystal: sites on a repeated lattice, and its translations as a finite group.

    The translations that map the periodic crystal onto itself form a product of up to three
    cyclic groups of orders `group`. Site `site_of[t, b]` is basis atom b moved by translation t,
    t in C order over `group`. Without repeats, `group` is (1, 1, 1) and every atom is basis.
    """

    cell: np.ndarray  # (3, 3), rows are the lattice vectors of the periodic box [length]
    sites: np.ndarray  # (n_atoms, 3) [length]
    species: tuple[str, ...]  # chemical symbol per atom; "X" where there is none
    group: tuple[int, int, int]
    site_of: np.ndarray  # (n_translations, n_basis) int
    operations: np.ndarray  # (n_ops, 3, 3) proper and improper rotations of the point group
    operation_sites: np.ndarray  # (n_ops, n_atoms) int: operation o maps site i onto this site
    description: str = ""

    @property
    def n_atoms(self) -> int:
        return len(self.sites)

    @property
    def volume(self) -> float:
        return float(abs(np.linalg.det(self.cell)))


@dataclass(frozen=True)
class System:
    """What is to be estimated: beta F or beta G, -ln Z of `target` plus the constants outside the integral.

    `constants` names each contribution to it [kT] that stands outside the integral over
    configurations (lattice energy, centre of mass, thermal wavelength); their sum is
    -`log_prefactor`.
    """

    name: str
    target: Ensemble  # of displacements, or of freeflow.cells.Strained where the cell moves
    state: ThermodynamicState
    constants: Mapping[str, float]
    units: UnitStyle
    temperature: float  # in the unit style's own unit (K, or epsilon/k_B)
    crystal: Crystal
    potential: Any  # freeflow.potentials.Potential, SpeciesPairs or External
    thermal_wavelength: float  # geometric mean over the atoms [length]
    nearest_image_only: bool = False
    cell_motion: str | None = None  # isotropic | orthorhombic | triclinic; None for a fixed cell
    plan: Plan = field(default_factory=Plan)
    published: Published | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # everything resolved, for provenance
    wavelengths: Mapping[str, float] = field(default_factory=dict)  # thermal wavelength of every species [length]
    energy: Any = None  # freeflow.potentials.CrystalEnergy of the potential on the crystal, which knows it at rest

    @property
    def n_atoms(self) -> int:
        return self.crystal.n_atoms

    @property
    def kt(self) -> float:
        """Thermal energy in the unit style's energy unit."""
        return self.units.boltzmann * self.temperature

    @property
    def pressure(self) -> float:
        """In the unit style's own unit; 0 for a fixed cell."""
        return float(self.state.pressure) / self.units.pressure_unit

    @property
    def quantity(self) -> str:
        """What is estimated, by its name in results."""
        return "helmholtz_free_energy" if self.cell_motion is None else "gibbs_free_energy"

    def require_fixed_cell(self, what: str) -> None:
        """Refuse what has not been made for cells that move.

        Raises:
            InputError: If the cell moves.
        """
        if self.cell_motion is not None:
            raise InputError(f"pressure: {what} crystals in a fixed cell only; leave it out to have one")

    @property
    def log_prefactor(self) -> float:
        return -sum(self.constants.values())


@dataclass(frozen=True)
class StateSeries:
    """One crystal at several temperatures, or pressures, or both: a grid of states, temperatures run fastest."""

    system: System  # in the first of them
    temperatures: tuple[float, ...]  # ascending, in the unit style's own unit
    pressures: tuple[float, ...] = ()  # the same; empty for a fixed cell

    @property
    def name(self) -> str:
        return self.system.name

    @property
    def n_states(self) -> int:
        return len(self.temperatures) * max(len(self.pressures), 1)

    @property
    def states(self) -> list[tuple[float, float | None]]:
        """Temperature and pressure of every state; no pressure in a fixed cell."""
        return [(t, p) for p in self.pressures or (None,) for t in self.temperatures]

    @property
    def config(self) -> Mapping[str, Any]:
        """Everything resolved, for provenance."""
        several = {"temperature": list(self.temperatures)}
        if self.pressures:
            several["pressure"] = list(self.pressures)
        return {**self.system.config, **several}
