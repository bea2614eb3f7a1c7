"""What a system.yaml may say: strict, frozen, with units and bounds. Importing this module does not start JAX."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from freeflow.config.words import describe, show
from freeflow.cores import n_cores
from freeflow.errors import InputError
from freeflow.units import PASCALS, UnitStyle, pressure_in, unit_style

if TYPE_CHECKING:
    from freeflow.potentials import External, Potential, SpeciesPairs
    from freeflow.types import DifferencePlan, FlowPlan, Plan, Published, TrainingPlan, TrajectoryPlan

MAX_CELLS = 100_000
_SHORTEST = 1e-100  # cutoff whose inverse can be squared

# Parameters in the units that they were published in, under `units`.
STILLINGER_WEBER_PRESETS: dict[str, dict[str, Any]] = {
    # Molinero and Moore, J. Phys. Chem. B 113, 4008 (2009).
    "mw": {
        "units": "real",
        "epsilon": 6.189,
        "sigma": 2.3925,
        "a": 1.8,
        "lambda": 23.15,
        "gamma": 1.2,
        "cos_theta0": -1 / 3,
        "A": 7.049556277,
        "B": 0.6022245584,
        "p": 4.0,
        "q": 0.0,
    },
    # Stillinger and Weber, Phys. Rev. B 31, 5262 (1985).
    "silicon": {
        "units": "metal",
        "epsilon": 2.1683,
        "sigma": 2.0951,
        "a": 1.8,
        "lambda": 21.0,
        "gamma": 1.2,
        "cos_theta0": -1 / 3,
        "A": 7.049556277,
        "B": 0.6022245584,
        "p": 4.0,
        "q": 0.0,
    },
}


def _wrong(message: str, key: tuple[str, ...] = ()) -> PydanticCustomError:
    # Braces would be read as a template; user text goes in as a value.
    return PydanticCustomError("freeflow", "{message}", {"message": message, "key": key})


def _three(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise _wrong(f"expected three whole numbers like [2, 2, 2], got {show(value)}")
    return tuple(value)


def _few_cells(repeats: tuple[int, int, int]) -> tuple[int, int, int]:
    cells = repeats[0] * repeats[1] * repeats[2]
    if cells > MAX_CELLS:
        raise _wrong(f"{cells} repeated cells are more than the {MAX_CELLS} that fit in memory")
    return repeats


def _stages(value: Any) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1_000_000):
        return value
    raise _wrong(f"expected auto or a whole number from 1 to 1000000, got {show(value)}")


def _line_of_text(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise _wrong(f"expected one line of printable text, got {show(value)}")
    return value


_RANGE = re.compile(r"([^:]+):([^:]+):([^:]+)")
MAX_STATES = 1000  # of a series


def _range(text: str) -> tuple[float, ...] | None:
    """The numbers of START:STOP:STEP, STOP included; None if it holds none, or more than `MAX_STATES`."""
    try:
        start, stop, step = (float(part) for part in text.split(":"))
        steps = (stop - start) / step
    except (ValueError, ZeroDivisionError):
        raise _wrong(f"expected START:STOP:STEP in numbers, such as 100:300:25, got {show(text)}") from None
    if not 0 <= steps < MAX_STATES:
        return None
    return tuple(start + k * step for k in range(int(steps + 1e-9) + 1))


def temperature_range(value: Any) -> Any:
    """START:STOP:STEP as a list of numbers, STOP included; anything else as it is."""
    if not isinstance(value, str) or _RANGE.fullmatch(value) is None:
        return tuple(value) if isinstance(value, list) else value
    numbers = _range(value)
    if numbers is None or min(numbers) <= 0:
        raise _wrong(f"{show(value)} holds no temperatures above 0, or more than {MAX_STATES}")
    return numbers


class _Pressure(NamedTuple):
    """A pressure as it was written: without a unit it is in that of the style."""

    value: float
    unit: str | None = None


def _pressures(value: Any) -> Any:
    """One `_Pressure` or several; a range may end in a unit."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if not 0 < len(value) <= MAX_STATES:
            raise _wrong(f"expected 1 to {MAX_STATES} pressures, got {len(value)}")
        return tuple(_one_pressure(one) for one in value)
    text, _, unit = value.strip().partition(" ") if isinstance(value, str) else ("", "", "")
    if _RANGE.fullmatch(text) is None:
        return _one_pressure(value)
    numbers = _range(text)
    if numbers is None:
        raise _wrong(f"{show(value)} holds no pressures, or more than {MAX_STATES}")
    return tuple(_one_pressure(f"{number!r} {unit}" if unit else number) for number in numbers)


def _one_pressure(value: Any) -> _Pressure:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return _Pressure(float(value))
    number, _, unit = value.strip().partition(" ") if isinstance(value, str) else ("", "", "")
    with contextlib.suppress(ValueError):
        if unit.strip() in PASCALS and math.isfinite(float(number)):
            return _Pressure(float(number), unit.strip())
    raise _wrong(f"expected a number, or one with a unit ({', '.join(PASCALS)}) like 1 kbar, got {show(value)}")


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list | tuple) else "one"


Temperatures = Annotated[
    Annotated[PositiveFloat, Tag("one")]
    | Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=MAX_STATES), Tag("many")],
    Discriminator(_one_or_many),
    BeforeValidator(temperature_range),
]
Repeat = Annotated[int, Field(ge=1, le=MAX_CELLS)]
Repeats = Annotated[tuple[Repeat, Repeat, Repeat], BeforeValidator(_three), AfterValidator(_few_cells)]


def _symbol(value: str) -> str:
    if not re.fullmatch(r"[A-Z][a-z]{0,2}", value):
        raise _wrong(f"expected a chemical symbol such as Cu, got {show(value)}")
    return value


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


NonNegative = Annotated[float, Field(ge=0)]
Species = Annotated[str, AfterValidator(_symbol)]
Text = Annotated[str, Field(max_length=1000), AfterValidator(_line_of_text)]


class Section(BaseModel):
    """A mapping of the file: exact types, finite numbers, no other keys, no changes afterwards."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class PotentialSection(Section):
    """What all potentials have."""

    nearest_image_only: bool = Field(
        default=False,
        description="take the nearest image alone, even where the cutoff reaches beyond half the box",
    )

    def parameters(self) -> dict[str, Any]:
        """Every number of the potential, defaults and presets filled in, under the file's keys."""
        return self.model_dump(by_alias=True, exclude={"kind", "preset", "nearest_image_only"})

    @property
    def sigma_length(self) -> float | None:
        """The potential's length scale [length], where it has one."""
        return self.parameters()["sigma"]


def _pairs(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[tuple[str, ...], str] = {}
    for key in value:
        if not re.fullmatch(r"[A-Za-z]{1,3}-[A-Za-z]{1,3}", key):
            raise _wrong(f"expected two species such as Na-Cl, got {show(key)}")
        twin = found.setdefault(tuple(sorted(key.split("-"))), key)
        if twin != key:
            raise _wrong(f"{twin} and {key} are the same pair")
    return value


class PairsSection(PotentialSection):
    """Pair potentials with one set of numbers, or with one for every two species under `pairs`."""

    @model_validator(mode="after")
    def _either(self) -> PairsSection:
        own = self._own()
        if self._by_pair is None:
            missing = [name for name in own if name in self._needed and getattr(self, name) is None]
            if missing:
                raise _wrong(f"missing {', '.join(missing)}; give the numbers here, or for every two species in pairs")
        elif given := [name for name in own if name in self.model_fields_set]:
            raise _wrong("pairs has these numbers for every two species; give it here or there", (given[0],))
        return self

    _needed: ClassVar[tuple[str, ...]] = ()  # numbers without a default

    @property
    def _by_pair(self) -> Mapping[str, Any] | None:
        return self.pairs  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def _own(cls) -> list[str]:
        """Names of the numbers that may differ between pairs."""
        general = {"kind", "cutoff", "shift", "pairs", "nearest_image_only"}
        return [name for name in cls.model_fields if name not in general]

    def parameters(self) -> dict[str, Any]:
        """Every number of the potential, under the file's keys; of every pair, where they differ."""
        values = super().parameters()
        if self._by_pair is None:
            del values["pairs"]
            return values
        pairs = {
            name: {"cutoff": values["cutoff"], **section.model_dump(exclude_none=True)}
            for name, section in self._by_pair.items()
        }
        return {"cutoff": values["cutoff"], "shift": values["shift"], "pairs": pairs}

    @property
    def sigma_length(self) -> float | None:
        """The potential's length scale [length], where it has one."""
        return None if self._by_pair is not None else self.parameters()["sigma"] or None

    def build(self, folder: Path = Path(), units: str = "lj") -> Potential | SpeciesPairs:
        """The potential as functions."""
        from freeflow import potentials

        make = {"lennard_jones": potentials.lennard_jones, "born_mayer": potentials.born_mayer}[self._kind]
        values = self.parameters()
        if "pairs" not in values:
            return _with_numbers(make, values)
        terms = {
            (min(a, b), max(a, b)): _with_numbers(make, {**numbers, "shift": values["shift"]})
            for (a, b), numbers in ((name.split("-"), numbers) for name, numbers in values["pairs"].items())
        }
        return potentials.SpeciesPairs(self._kind, terms)

    @property
    def _kind(self) -> str:
        return self.kind  # pyright: ignore[reportAttributeAccessIssue]


def _with_numbers(make: Callable[..., Potential], numbers: dict[str, Any]) -> Potential:
    """The potential, if it has an energy at its cutoff."""
    import numpy as np

    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            if numbers["cutoff"] > _SHORTEST:
                return make(**numbers)
    except ArithmeticError:
        pass
    raise InputError(f"potential.cutoff: the energy at {numbers['cutoff']:g} is beyond numbers")


class LennardJonesPair(Section):
    """Numbers of one pair of species."""

    epsilon: PositiveFloat = Field(description="[energy]")
    sigma: PositiveFloat = Field(description="[length]")
    cutoff: PositiveFloat | None = Field(default=None, description="[length]; that of all pairs")


class LennardJones(PairsSection):
    """12-6 potential; `shift` moves the energy at the cutoff to zero."""

    kind: Literal["lennard_jones"]
    epsilon: PositiveFloat = Field(default=1.0, description="[energy]")
    sigma: PositiveFloat = Field(default=1.0, description="[length]")
    cutoff: PositiveFloat = Field(description="[length]")
    shift: bool = True
    pairs: Annotated[dict[str, LennardJonesPair], AfterValidator(_pairs), Field(min_length=1)] | None = None


class BornMayerPair(Section):
    """Numbers of one pair of species."""

    A: PositiveFloat = Field(description="[energy]")
    rho: PositiveFloat = Field(description="[length]")
    sigma: NonNegative = Field(default=0.0, description="[length]")
    C: NonNegative = Field(default=0.0, description="[energy length^6]")
    D: NonNegative = Field(default=0.0, description="[energy length^8]")
    cutoff: PositiveFloat | None = Field(default=None, description="[length]; that of all pairs")


class BornMayer(PairsSection):
    """A exp((sigma - r)/rho) - C/r^6 + D/r^8; Buckingham's where sigma and D are 0."""

    kind: Literal["born_mayer"]
    A: PositiveFloat | None = Field(default=None, description="[energy]")
    rho: PositiveFloat | None = Field(default=None, description="[length]")
    sigma: NonNegative = Field(default=0.0, description="[length]")
    C: NonNegative = Field(default=0.0, description="[energy length^6]")
    D: NonNegative = Field(default=0.0, description="[energy length^8]")
    cutoff: PositiveFloat = Field(description="[length]")
    shift: bool = Field(default=True, description="energy is shifted to zero at the cutoff")
    pairs: Annotated[dict[str, BornMayerPair], AfterValidator(_pairs), Field(min_length=1)] | None = None

    _needed: ClassVar[tuple[str, ...]] = ("A", "rho")


class WeeksChandlerAndersen(PotentialSection):
    """The repulsive part of the 12-6 potential, cut at its minimum."""

    kind: Literal["wca"]
    epsilon: PositiveFloat = Field(default=1.0, description="[energy]")
    sigma: PositiveFloat = Field(default=1.0, description="[length]")

    def build(self, folder: Path = Path(), units: str = "lj") -> Potential:
        """The potential as functions."""
        from freeflow.potentials import wca

        return wca(**self.parameters())


class StillingerWeber(PotentialSection):
    """Two- and three-body potential; a preset, changed where numbers are given, or every number."""

    kind: Literal["stillinger_weber"]
    preset: Literal["mw", "silicon"] | None = None
    epsilon: PositiveFloat | None = Field(default=None, description="[energy]")
    sigma: PositiveFloat | None = Field(default=None, description="[length]")
    a: float | None = Field(default=None, gt=0, description="cutoff in units of sigma")
    lam: float | None = Field(default=None, ge=0, alias="lambda")
    gamma: float | None = Field(default=None, gt=0)
    cos_theta0: float | None = Field(default=None, ge=-1, le=1)
    A: float | None = Field(default=None, gt=0)
    B: float | None = Field(default=None, ge=0)
    p: float | None = Field(default=None, gt=0)
    q: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> StillingerWeber:
        missing = [key for key, value in self.parameters().items() if value is None]
        if missing:
            known = ", ".join(STILLINGER_WEBER_PRESETS)
            raise _wrong(f"missing {', '.join(missing)}; give every parameter, or a preset ({known})")
        return self

    def parameters(self) -> dict[str, Any]:
        """Every number of the potential, the preset's where the file gives none."""
        given = super().parameters()
        preset = STILLINGER_WEBER_PRESETS[self.preset] if self.preset else {}
        return {key: preset.get(key) if value is None else value for key, value in given.items()}

    def build(self, folder: Path = Path(), units: str = "lj") -> Potential:
        """The potential as functions."""
        from freeflow.potentials import stillinger_weber

        numbers = self.parameters()
        return stillinger_weber(lam=numbers.pop("lambda"), **numbers)


def _reference(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", value):
        raise _wrong(f"expected module:name, got {show(value)}")
    return value


Reference = Annotated[Text, AfterValidator(_reference)]


class ExternalSection(Section):
    """What potentials that are not ours have; the file names code that is then run."""

    arguments: dict[str, Any] = Field(default={}, description="passed on by name")
    folder: Text = Field(default=".", description="of the module, from the system file's folder, if not installed")

    nearest_image_only: ClassVar[bool] = False
    sigma_length: ClassVar[None] = None

    def parameters(self) -> dict[str, Any]:
        """All that the file says of the potential, under its keys."""
        return self.model_dump(exclude={"kind"}, exclude_none=True)


class PythonFunction(ExternalSection):
    """Any JAX function of positions (n, 3) and cell (3, 3) that returns an energy."""

    kind: Literal["python"]
    function: Reference = Field(description="module:name")

    def build(self, folder: Path = Path(), units: str = "lj") -> External:
        """The potential as functions."""
        from freeflow.potentials import python_potential

        return python_potential(self.function, self.arguments, folder / self.folder)


class AseCalculator(ExternalSection):
    """Any ASE calculator, in processes of their own."""

    kind: Literal["ase"]
    calculator: Reference = Field(description="module:factory")
    workers: int | None = Field(default=None, ge=1, le=1000, description="processes; by default one per core")

    def build(self, folder: Path = Path(), units: str = "lj") -> External:
        """The potential as functions."""
        from freeflow.potentials import ase_potential
        from freeflow.units import ELECTRON_VOLT

        place, workers = (folder / self.folder).absolute(), self.workers or n_cores()
        return ase_potential(self.calculator, self.arguments, place, workers, ELECTRON_VOLT[units])


class CrystalSection(Section):
    """Atoms on a repeated lattice."""

    lattice: Literal["sc", "bcc", "fcc", "hcp", "diamond", "hexagonal_ice", "rocksalt", "cesium_chloride", "zincblende"]
    species: Annotated[tuple[Species, ...], BeforeValidator(_listed), Field(min_length=1)] = Field(
        default=("X",), description="chemical symbol, or one for each kind of atom"
    )
    repeats: Repeats = Field(description="of the conventional cell")
    number_density: PositiveFloat | None = Field(default=None, description="[1/length**3]")
    lattice_constant: PositiveFloat | None = Field(default=None, description="edge of the conventional cell [length]")

    @model_validator(mode="after")
    def _one_size(self) -> CrystalSection:
        if self.number_density is None and self.lattice_constant is None:
            raise _wrong("give number_density or lattice_constant")
        if self.number_density is not None and self.lattice_constant is not None:
            raise _wrong("give number_density or lattice_constant, not both")
        return self


class StructureSection(Section):
    """Atoms from a file that ASE reads; a relative path starts at the folder of the system file."""

    file: Text
    repeats: Repeats = (1, 1, 1)


class BridgeSection(Section):
    """Annealed transport between the reference and the crystal."""

    stages: Annotated[int | str, BeforeValidator(_stages)] = "auto"


class TrainingSection(Section):
    """How to train a flow; where neither steps nor minutes are given there are 2000 steps."""

    loss: Literal["path_gradient", "reverse_kl", "forward_kl", "lbar"] = Field(
        default="path_gradient", description="the last two learn from a trajectory"
    )
    max_steps: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_minutes: float | None = Field(default=None, gt=0, le=10**6, description="compilation included")
    batch_size: int = Field(default=32, ge=1, le=10**6)
    learning_rate: float = Field(default=4e-3, gt=0, le=1)
    clip: float = Field(default=4.0, gt=0, description="longest gradient, in units of its usual norm")
    average: float = Field(default=0.99, ge=0, lt=1, description="decay of the running average of parameters")
    min_gain: float = Field(default=0.01, ge=0, description="[kT] per third of the run; less is a plateau")

    def plan(self) -> TrainingPlan:
        """The same as the record that the trainer takes."""
        from freeflow.types import TrainingPlan

        return TrainingPlan(**self.model_dump())


class StoredFlowSection(Section):
    """A flow that was trained before."""

    checkpoint: Text = Field(description="file or folder of a run, from the system file's folder; or shipped")

    def plan(self, folder: Path) -> FlowPlan:
        """The same as the record that the pipeline takes."""
        from freeflow.types import FlowPlan

        path = self.checkpoint
        return FlowPlan(checkpoint=path if path == "shipped" else str((folder / path).absolute()))


class _TrainedFlowSection(Section):
    training: TrainingSection = TrainingSection()

    def plan(self, folder: Path) -> FlowPlan:
        """The same as the record that the pipeline takes; options that were not given are left to the builder."""
        from freeflow.types import FlowPlan

        values = self.model_dump(exclude={"architecture", "training"}, exclude_none=True)
        architecture: str = self.architecture  # pyright: ignore[reportAttributeAccessIssue]
        return FlowPlan(architecture=architecture, options=values, training=self.training.plan())


def _ends(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(f"expected the lowest and the highest, got {show(value)}")
    return tuple(value)


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] < value[1]:
        raise _wrong(f"the first must be below the second, got {show(list(value))}")
    return value


Ends = Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(_ends), AfterValidator(_rising)]


class ResidualSection(_TrainedFlowSection):
    """Couplings of the sites of a crystal, by colours; see freeflow.flows.residual for the defaults."""

    architecture: Literal["residual"]
    n_sweeps: PositiveInt | None = None
    width: PositiveInt | None = None
    depth: PositiveInt | None = None
    colour_distance: PositiveFloat | None = Field(default=None, description="in nearest-neighbour distances")
    reach: PositiveFloat | None = Field(default=None, description="in nearest-neighbour distances")
    scale: PositiveFloat | None = Field(default=None, description="[length]")
    temperatures: Ends | None = Field(default=None, description="lowest and highest, of a flow for a range of states")
    number_densities: Ends | None = Field(default=None, description="lowest and highest [1/length**3]")


class AtomicSolidsSection(_TrainedFlowSection):
    """Circular splines of fractional coordinates; see freeflow.flows.atomic_solids for the defaults."""

    architecture: Literal["atomic_solids"]
    n_layers: PositiveInt | None = None
    n_blocks: PositiveInt | None = None
    width: PositiveInt | None = None
    n_heads: PositiveInt | None = None
    n_bins: PositiveInt | None = None
    n_frequencies: PositiveInt | None = None
    stddev: PositiveFloat | None = Field(default=None, description="[length]")


def kind_of_flow(value: Any) -> str | None:
    """The key of `FLOWS` that a section is of; None if it does not say."""
    if isinstance(value, Mapping):
        return "checkpoint" if "checkpoint" in value else _text_or_none(value.get("architecture"))
    return getattr(value, "architecture", "checkpoint" if isinstance(value, StoredFlowSection) else None)


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


FlowSection = Annotated[
    Annotated[StoredFlowSection, Tag("checkpoint")]
    | Annotated[ResidualSection, Tag("residual")]
    | Annotated[AtomicSolidsSection, Tag("atomic_solids")],
    Discriminator(kind_of_flow),
]


def _frames(value: str) -> str:
    found = re.fullmatch(r"(\d{0,15}):(\d{0,15})(?::(\d{0,15}))?", value)
    if found is None:
        raise _wrong(f"expected START:STOP:STRIDE in whole numbers, such as 100: or ::2, got {show(value)}")
    start, stop, stride = found.groups()
    if stride and int(stride) == 0:
        raise _wrong("the stride must be at least 1")
    if stop and int(stop) <= int(start or 0):
        raise _wrong(f"no frames lie in {value}")
    return value


def _file_alone(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


class TrajectorySection(Section):
    """Frames of another program as samples of the target; a file name alone will do."""

    file: Text = Field(description="from the system file's folder")
    topology: Text | None = Field(default=None, description="checked against the system; no format needs one")
    frames: Annotated[str, Field(max_length=60), AfterValidator(_frames)] = Field(
        default=":", description="START:STOP:STRIDE, as in Python"
    )
    sigma: Literal["angstrom", "nm"] | None = Field(
        default=None, description="what one sigma is stored as, where lj units meet a file without a cell"
    )

    def plan(self, folder: Path) -> TrajectoryPlan:
        """The same as the record that the pipeline takes."""
        from freeflow.types import TrajectoryPlan

        topology = None if self.topology is None else str((folder / self.topology).absolute())
        return TrajectoryPlan(str((folder / self.file).absolute()), topology, self.frames, self.sigma)


class EstimateSection(Section):
    """How to estimate."""

    reference: Literal["einstein", "harmonic", "self_consistent"] = "self_consistent"
    flow: FlowSection | None = None
    bridge: BridgeSection | None = BridgeSection()
    estimator: Literal["fep", "bar"] = Field(default="fep", description="bar if there is a trajectory")
    trajectory: Annotated[TrajectorySection | None, BeforeValidator(_file_alone)] = None
    target_error: float = Field(default=1e-4, gt=0, description="one standard error [kT per atom]")
    max_samples: int = Field(default=100_000, ge=2, le=10**10)
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    precision: Literal["float32", "float64"] = "float32"

    @model_validator(mode="after")
    def _used(self) -> EstimateSection:
        if self.trajectory is not None and self.estimator == "fep":
            if "estimator" in self.model_fields_set:
                raise _wrong("fep makes no use of a trajectory; use bar", ("estimator",))
            return self.model_copy(update={"estimator": "bar"})
        return self

    def plan(self, folder: Path = Path()) -> Plan:
        """The same as the record that the pipeline takes; relative paths start at `folder`."""
        from freeflow.types import Plan

        values = self.model_dump(exclude={"flow", "bridge", "trajectory"})
        return Plan(
            bridge=self.bridge and self.bridge.stages,
            flow=self.flow and self.flow.plan(folder),
            trajectory=self.trajectory and self.trajectory.plan(folder),
            **values,
        )


class PublishedSection(Section):
    """A value from the literature to compare with."""

    beta_f_per_atom: float
    std_error: PositiveFloat | None = None
    source: Annotated[str, Field(max_length=1000)] = ""

    def record(self) -> Published:
        """The same as the record that a System carries."""
        from freeflow.types import Published

        return Published(self.beta_f_per_atom, self.std_error, self.source)


class _FileSection(Section):
    name: Annotated[Text, Field(max_length=100)]
    units: Literal["lj", "real", "metal"]
    temperature: Any
    boltzmann: PositiveFloat | None = Field(default=None, description="replaces the unit style's k_B")

    @property
    def unit_style(self) -> UnitStyle:
        """Units, with the file's own Boltzmann constant if it gives one."""
        return unit_style(self.units, self.boltzmann)


def _number_or_by_species(value: Any) -> Any:
    if value is None or isinstance(value, dict) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise _wrong(f"expected a number, or one for every species such as {{Na: 0.2, Cl: 0.17}}, got {show(value)}")


class SystemSection(_FileSection):
    """The whole of system.yaml of a crystal."""

    temperature: Temperatures = Field(
        description="[K], or [epsilon/k_B] in lj units; a list or START:STOP:STEP is a series"
    )
    pressure: Annotated[float | tuple[float, ...] | None, PlainValidator(_pressures, str | float | list[float])] = (
        Field(
            default=None,
            description="makes it a Gibbs free energy [epsilon/sigma^3, atm in real units, bar in metal ones, or with "
            "a unit, such as 1 kbar]; a list or START:STOP:STEP is a series",
        )
    )
    cell_motion: Literal["isotropic", "orthorhombic", "triclinic"] | None = Field(
        default=None, description="of a crystal under pressure; isotropic if there is a pressure"
    )
    potential: Annotated[
        LennardJones | StillingerWeber | WeeksChandlerAndersen | BornMayer | PythonFunction | AseCalculator,
        Field(discriminator="kind"),
    ]
    crystal: CrystalSection | None = None
    structure: StructureSection | None = None
    thermal_wavelength: Annotated[
        PositiveFloat | dict[Species, PositiveFloat] | None, BeforeValidator(_number_or_by_species)
    ] = Field(default=None, description="[length], one or by species; by default the potential's sigma, or from masses")
    masses: Annotated[dict[Species, PositiveFloat], Field(min_length=1)] | None = Field(
        default=None, description="[dalton], by species; by default standard atomic weights"
    )
    estimate: EstimateSection = EstimateSection()
    published: PublishedSection | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SystemSection:
        if self.crystal is not None and self.structure is not None:
            raise _wrong("give crystal or structure, not both", ("structure",))
        if self.crystal is None and self.structure is None:
            raise _wrong("give crystal (a named lattice) or structure (a file)")
        if self.masses is not None and self.thermal_wavelength is not None:
            raise _wrong("give masses or thermal_wavelength, not both", ("masses",))
        preset = self.potential.preset if isinstance(self.potential, StillingerWeber) else None
        if preset is not None and (native := STILLINGER_WEBER_PRESETS[preset]["units"]) != self.units:
            message = f"{preset} is in units {native} ({describe(native)}), but this file's units are {self.units}"
            raise _wrong(message, ("potential", "preset"))
        return self._under_pressure()

    def _under_pressure(self) -> SystemSection:
        if self.pressure is None:
            if self.cell_motion is not None:
                raise _wrong("a cell moves under a pressure; give pressure, too (it may be 0)", ("cell_motion",))
            return self
        if self.estimate.flow is not None:
            raise _wrong("for crystals in a fixed cell only; leave it out, or the pressure", ("estimate", "flow"))
        try:
            pressure = self._in_unit_of_style(self.pressure)
        except InputError as error:
            raise _wrong(str(error).removeprefix("pressure: "), ("pressure",)) from None
        return self.model_copy(update={"pressure": pressure, "cell_motion": self.cell_motion or "isotropic"})

    def _in_unit_of_style(self, pressure: Any) -> Any:
        if isinstance(pressure, _Pressure):
            value, unit = pressure
            return value if unit is None else pressure_in(self.unit_style, value, unit)
        return tuple(self._in_unit_of_style(one) for one in pressure)

    @property
    def resolved_wavelength(self) -> float | dict[str, float] | None:
        """Thermal wavelength [length]: the potential's sigma unless given; None where it follows from masses."""
        if self.masses is not None:
            return None
        return self.potential.sigma_length if self.thermal_wavelength is None else self.thermal_wavelength

    def resolved(self) -> dict[str, Any]:
        """Plain values with every default filled in; loading them again gives the same system."""
        values = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        values["boltzmann"] = self.unit_style.boltzmann
        if values.get("crystal", {}).get("species") == ["X"]:
            del values["crystal"]["species"]
        if self.resolved_wavelength is not None:
            values["thermal_wavelength"] = self.resolved_wavelength
        kind = {key: value for key, value in values["potential"].items() if key in {"kind", "preset"}}
        values["potential"] = {**kind, **self.potential.parameters()}
        if isinstance(self.potential, PotentialSection):
            values["potential"]["nearest_image_only"] = self.potential.nearest_image_only
        values["estimate"] = self.estimate.model_dump(mode="json", by_alias=True)
        flow = values["estimate"]["flow"] or {}
        for option in [name for name, value in flow.items() if value is None]:
            del flow[option]
        return {key: values[key] for key in type(self).model_fields if key in values}


# ------------------------------------------------------------------------------ solutions


def _half_box(value: Any) -> float | str:
    if value == "half_box" or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
        return value
    raise _wrong(f"expected a length or half_box, got {show(value)}")


def _two(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(f"expected two numbers, [A, B], got {show(value)}")
    return tuple(value)


def _one_or_two(value: Any) -> Any:
    return _two(value) if isinstance(value, list | tuple) else _two((value, value))


class SolventPotentialSection(Section):
    """12-6 potential between solvent atoms."""

    kind: Literal["lennard_jones"] = "lennard_jones"
    epsilon: PositiveFloat = Field(default=1.0, description="[energy]")
    sigma: PositiveFloat = Field(default=1.0, description="[length]")
    cutoff: Annotated[float | str, BeforeValidator(_half_box)] = "half_box"
    shift: bool = Field(default=True, description="energy is shifted to zero at the cutoff")


class SolventSection(Section):
    """What surrounds the solute."""

    count: int = Field(ge=1, le=100_000)
    potential: SolventPotentialSection = SolventPotentialSection()


class SoluteSection(Section):
    """One particle at the origin, which differs between the states."""

    kind: Literal["wca", "lennard_jones"] = "wca"
    epsilon: PositiveFloat = Field(default=1.0, description="[energy]")
    sigma: Annotated[tuple[NonNegative, NonNegative], BeforeValidator(_two)] = Field(
        description="of states A and B [length]; 0 is no solute"
    )


class TrajectoriesSection(Section):
    """Frames of both states, where they are not to be sampled here."""

    A: Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(min_length=1)]
    B: Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(min_length=1)]


class SolutionSection(Section):
    """A solute in a solvent, in a cubic periodic box."""

    box_length: PositiveFloat = Field(description="[length]")
    solvent: SolventSection
    solute: SoluteSection
    trajectories: TrajectoriesSection | None = None


Method = Literal["fep", "bar", "radial", "lfep", "lbar", "bridge", "escort", "mbar"]


def _kind_alone(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class MapSection(Section):
    """The map that lfep and lbar learn; its kind alone will do."""

    kind: Literal["field", "radial", "torus"] = "field"
    folds: int = Field(default=2, ge=2, le=20, description="parts of the frames; the others teach the map of each")
    max_minutes: float | None = Field(
        default=None, ge=0, le=10**6, description="of training on work; by default 0 for a field and 2 for the others"
    )


class DifferenceSection(Section):
    """How to estimate the difference of two states."""

    methods: Annotated[tuple[Method, ...], BeforeValidator(_listed), Field(min_length=1)] = ("bridge",)
    target_error: float = Field(default=0.05, gt=0, description="one standard error [kT]")
    max_samples: int = Field(default=100_000, ge=2, le=10**10, description="of each state")
    max_minutes: float | None = Field(default=None, gt=0, le=10**6)
    map: Annotated[MapSection, BeforeValidator(_kind_alone)] = MapSection()
    seed: int = Field(default=0, ge=0, le=2**32 - 1)

    def plan(self, folder: Path = Path()) -> DifferencePlan:
        """The same as the record that the job takes."""
        from freeflow.types import DifferencePlan, LearnedMap

        return DifferencePlan(**{**self.model_dump(), "map": LearnedMap(**self.map.model_dump())})


class PublishedDifferenceSection(Section):
    """A value from the literature to compare with."""

    delta_f: float = Field(description="F_B - F_A [kT]")
    std_error: PositiveFloat | None = None
    source: Annotated[str, Field(max_length=1000)] = ""


class SolutionFileSection(_FileSection):
    """The whole of system.yaml of a solution."""

    temperature: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(_one_or_two)] = Field(
        description="of both states, or [A, B] [K], or [epsilon/k_B] in lj units"
    )
    solution: SolutionSection
    estimate: DifferenceSection = DifferenceSection()
    published: PublishedDifferenceSection | None = None

    def resolved(self) -> dict[str, Any]:
        """Plain values with every default filled in; loading them again gives the same system."""
        values = self.model_dump(mode="json", exclude_none=True)
        values["boltzmann"] = self.unit_style.boltzmann
        order = ("name", "units", "temperature", "boltzmann", "solution", "estimate", "published")
        return {key: values[key] for key in order if key in values}


SECTIONS: dict[tuple[str, ...], type[Section]] = {
    (): SystemSection,
    ("crystal",): CrystalSection,
    ("structure",): StructureSection,
    ("estimate",): EstimateSection,
    ("estimate", "bridge"): BridgeSection,
    ("estimate", "trajectory"): TrajectorySection,
    ("estimate", "flow", "training"): TrainingSection,
    ("published",): PublishedSection,
}
SOLUTION_SECTIONS: dict[tuple[str, ...], type[Section]] = {
    (): SolutionFileSection,
    ("solution",): SolutionSection,
    ("solution", "solvent"): SolventSection,
    ("solution", "solvent", "potential"): SolventPotentialSection,
    ("solution", "solute"): SoluteSection,
    ("solution", "trajectories"): TrajectoriesSection,
    ("estimate",): DifferenceSection,
    ("estimate", "map"): MapSection,
    ("published",): PublishedDifferenceSection,
}
POTENTIALS: dict[str, type[Section]] = {
    "lennard_jones": LennardJones,
    "stillinger_weber": StillingerWeber,
    "wca": WeeksChandlerAndersen,
    "born_mayer": BornMayer,
    "python": PythonFunction,
    "ase": AseCalculator,
}
PAIRS: dict[str, type[Section]] = {"lennard_jones": LennardJonesPair, "born_mayer": BornMayerPair}
FLOWS: dict[str, type[Section]] = {
    "checkpoint": StoredFlowSection,
    "residual": ResidualSection,
    "atomic_solids": AtomicSolidsSection,
}
