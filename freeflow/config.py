"""Schema of system.yaml: strict, frozen, units on the way in.

A file is read once and checked once. Every problem is one line that names the file, the line, the
key and, where there is one, the nearest valid word. Importing this module does not start JAX.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from freeflow.errors import InputError
from freeflow.units import UNIT_STYLES, UnitStyle, unit_style

if TYPE_CHECKING:
    from freeflow.potentials import Potential
    from freeflow.types import Crystal, FlowPlan, Plan, Published, System, TrainingPlan, TrajectoryPlan

MAX_FILE_BYTES = 1_000_000
MAX_CELLS = 100_000
MAX_DEPTH = 20

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


# --------------------------------------------------------------------------- schema


def _wrong(message: str, key: tuple[str, ...] = ()) -> PydanticCustomError:
    # Braces would be read as a template; user text goes in as a value.
    return PydanticCustomError("freeflow", "{message}", {"message": message, "key": key})


def _three(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise _wrong(f"expected three whole numbers like [2, 2, 2], got {_show(value)}")
    return tuple(value)


def _few_cells(repeats: tuple[int, int, int]) -> tuple[int, int, int]:
    cells = repeats[0] * repeats[1] * repeats[2]
    if cells > MAX_CELLS:
        raise _wrong(f"{cells} repeated cells are more than the {MAX_CELLS} that fit in memory")
    return repeats


def _stages(value: Any) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1_000_000):
        return value
    raise _wrong(f"expected auto or a whole number from 1 to 1000000, got {_show(value)}")


def _line_of_text(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise _wrong(f"expected one line of printable text, got {_show(value)}")
    return value


Repeat = Annotated[int, Field(ge=1, le=MAX_CELLS)]
Repeats = Annotated[tuple[Repeat, Repeat, Repeat], BeforeValidator(_three), AfterValidator(_few_cells)]
Text = Annotated[str, Field(max_length=1000), AfterValidator(_line_of_text)]


class Section(BaseModel):
    """A mapping of the file: exact types, finite numbers, no other keys, no changes afterwards."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class _PotentialSection(Section):
    nearest_image_only: bool = Field(
        default=False,
        description="take the nearest image alone, even where the cutoff reaches beyond half the box",
    )

    def parameters(self) -> dict[str, Any]:
        """Every number of the potential, defaults and presets filled in, under the file's keys."""
        return self.model_dump(by_alias=True, exclude={"kind", "preset", "nearest_image_only"})

    @property
    def sigma_length(self) -> float:
        """The potential's length scale [length]."""
        return self.parameters()["sigma"]


class LennardJones(_PotentialSection):
    """12-6 potential; `shift` moves the energy at the cutoff to zero."""

    kind: Literal["lennard_jones"]
    epsilon: PositiveFloat = Field(default=1.0, description="[energy]")
    sigma: PositiveFloat = Field(default=1.0, description="[length]")
    cutoff: PositiveFloat = Field(description="[length]")
    shift: bool = True

    def build(self) -> Potential:
        """The potential as functions."""
        from freeflow.potentials import lennard_jones

        return lennard_jones(**self.parameters())


class WeeksChandlerAndersen(_PotentialSection):
    """The repulsive part of the 12-6 potential, cut at its minimum."""

    kind: Literal["wca"]
    epsilon: PositiveFloat = Field(default=1.0, description="[energy]")
    sigma: PositiveFloat = Field(default=1.0, description="[length]")

    def build(self) -> Potential:
        """The potential as functions."""
        from freeflow.potentials import wca

        return wca(**self.parameters())


class StillingerWeber(_PotentialSection):
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

    def build(self) -> Potential:
        """The potential as functions."""
        from freeflow.potentials import stillinger_weber

        numbers = self.parameters()
        return stillinger_weber(lam=numbers.pop("lambda"), **numbers)


class CrystalSection(Section):
    """Atoms on a repeated lattice."""

    lattice: Literal["sc", "bcc", "fcc", "hcp", "diamond", "hexagonal_ice"]
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


class ResidualSection(_TrainedFlowSection):
    """Couplings of the sites of a crystal, by colours; see freeflow.flows.residual for the defaults."""

    architecture: Literal["residual"]
    n_sweeps: PositiveInt | None = None
    width: PositiveInt | None = None
    depth: PositiveInt | None = None
    colour_distance: PositiveFloat | None = Field(default=None, description="in nearest-neighbour distances")
    reach: PositiveFloat | None = Field(default=None, description="in nearest-neighbour distances")
    scale: PositiveFloat | None = Field(default=None, description="[length]")


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


def _kind_of_flow(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return "checkpoint" if "checkpoint" in value else _text_or_none(value.get("architecture"))
    return getattr(value, "architecture", "checkpoint" if isinstance(value, StoredFlowSection) else None)


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


FlowSection = Annotated[
    Annotated[StoredFlowSection, Tag("checkpoint")]
    | Annotated[ResidualSection, Tag("residual")]
    | Annotated[AtomicSolidsSection, Tag("atomic_solids")],
    Discriminator(_kind_of_flow),
]


def _frames(value: str) -> str:
    found = re.fullmatch(r"(\d{0,15}):(\d{0,15})(?::(\d{0,15}))?", value)
    if found is None:
        raise _wrong(f"expected START:STOP:STRIDE in whole numbers, such as 100: or ::2, got {_show(value)}")
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


class SystemSection(Section):
    """The whole of system.yaml."""

    name: Annotated[Text, Field(max_length=100)]
    units: Literal["lj", "real", "metal"]
    temperature: PositiveFloat = Field(description="[K], or [epsilon/k_B] in lj units")
    boltzmann: PositiveFloat | None = Field(default=None, description="replaces the unit style's k_B")
    potential: Annotated[LennardJones | StillingerWeber | WeeksChandlerAndersen, Field(discriminator="kind")]
    crystal: CrystalSection | None = None
    structure: StructureSection | None = None
    thermal_wavelength: PositiveFloat | None = Field(default=None, description="[length]; the potential's sigma")
    estimate: EstimateSection = EstimateSection()
    published: PublishedSection | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SystemSection:
        if self.crystal is not None and self.structure is not None:
            raise _wrong("give crystal or structure, not both", ("structure",))
        if self.crystal is None and self.structure is None:
            raise _wrong("give crystal (a named lattice) or structure (a file)")
        preset = self.potential.preset if isinstance(self.potential, StillingerWeber) else None
        if preset is not None and (native := STILLINGER_WEBER_PRESETS[preset]["units"]) != self.units:
            message = f"{preset} is in units {native} ({_describe(native)}), but this file's units are {self.units}"
            raise _wrong(message, ("potential", "preset"))
        return self

    @property
    def unit_style(self) -> UnitStyle:
        """Units, with the file's own Boltzmann constant if it gives one."""
        return unit_style(self.units, self.boltzmann)

    @property
    def resolved_wavelength(self) -> float:
        """Thermal wavelength [length]: the potential's sigma unless given."""
        return self.potential.sigma_length if self.thermal_wavelength is None else self.thermal_wavelength

    def resolved(self) -> dict[str, Any]:
        """Plain values with every default filled in; loading them again gives the same system."""
        values = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        values["boltzmann"] = self.unit_style.boltzmann
        values["thermal_wavelength"] = self.resolved_wavelength
        small_box = values["potential"].pop("nearest_image_only")
        values["potential"] |= {**self.potential.parameters(), "nearest_image_only": small_box}
        values["estimate"] = self.estimate.model_dump(mode="json", by_alias=True)
        flow = values["estimate"]["flow"] or {}
        for option in [name for name, value in flow.items() if value is None]:
            del flow[option]
        return {key: values[key] for key in type(self).model_fields if key in values}


_SECTIONS: dict[tuple[str, ...], type[Section]] = {
    (): SystemSection,
    ("crystal",): CrystalSection,
    ("structure",): StructureSection,
    ("estimate",): EstimateSection,
    ("estimate", "bridge"): BridgeSection,
    ("estimate", "trajectory"): TrajectorySection,
    ("estimate", "flow", "training"): TrainingSection,
    ("published",): PublishedSection,
}
_POTENTIALS: dict[str, type[_PotentialSection]] = {
    "lennard_jones": LennardJones,
    "stillinger_weber": StillingerWeber,
    "wca": WeeksChandlerAndersen,
}
_FLOWS: dict[str, type[Section]] = {
    "checkpoint": StoredFlowSection,
    "residual": ResidualSection,
    "atomic_solids": AtomicSolidsSection,
}


# --------------------------------------------------------------------------- from files to systems


def load(source: str | Path | Mapping[str, Any]) -> System:
    """Read and check a system, and make the problem it describes.

    Args:
        source: Path of a system.yaml, the name of a system that ships with freeflow, or the same
            content as a mapping.

    Raises:
        InputError: If anything is wrong with it; one line that says where.
    """
    label, folder, section = read(source)
    from freeflow.crystals import crystal_system

    try:
        return crystal_system(
            name=section.name,
            crystal=_crystal(section, folder),
            potential=section.potential.build(),
            units=section.unit_style,
            temperature=section.temperature,
            thermal_wavelength=section.resolved_wavelength,
            nearest_image_only=section.potential.nearest_image_only,
            plan=section.estimate.plan(folder),
            published=section.published and section.published.record(),
            config=_with_absolute_paths(section.resolved(), folder),
        )
    except InputError as error:
        raise type(error)(f"{label}: {error}") from error


def read(source: str | Path | Mapping[str, Any]) -> tuple[str, Path, SystemSection]:
    """Read and check a system file without making anything of it.

    Returns:
        What to call the source in messages, the folder that relative paths start at, the content.
    """
    if isinstance(source, Mapping):
        return "system", Path(), _validate(SystemSection, source, "system", {})
    if not isinstance(source, str | Path):
        raise InputError(f"a system is a path, a name or a mapping, not {_show(source)}")
    path = _find(source)
    label = _show_path(path)
    data, lines = _parse(_read_text(path, label), label)
    return label, path.parent, _validate(SystemSection, data, label, lines)


def revise(plan: Plan, **changes: Any) -> Plan:
    """The plan with some of its values replaced, checked like the file's `estimate` section.

    Raises:
        InputError: If there is no such value or it is impossible; the message starts with its name.
    """
    from freeflow.types import FlowPlan, TrajectoryPlan

    values = {**vars(plan), **changes}
    bridge, flow, trajectory = (values.pop(name) for name in ("bridge", "flow", "trajectory"))
    values["bridge"] = None if bridge is None else {"stages": bridge}
    values["flow"] = flow.values() if isinstance(flow, FlowPlan) else flow
    values["trajectory"] = dict(vars(trajectory)) if isinstance(trajectory, TrajectoryPlan) else trajectory
    if changes.get("trajectory") is not None and "estimator" not in changes:
        values["estimator"] = "bar"
    return _validate(EstimateSection, values, "", {}, ("estimate",)).plan()


def dump(values: Mapping[str, Any]) -> str:
    """The text of a system.yaml with these values; reading it gives them back."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class ShippedSystem(NamedTuple):
    """One line of the list of systems that come with freeflow."""

    name: str
    description: str
    beta_f_per_atom: float | None
    std_error: float | None
    source: str


def shipped() -> list[ShippedSystem]:
    """The systems that come with freeflow, by name; the description is the file's first comment."""
    systems = []
    for name, path in _shipped_files().items():
        text = path.read_text(encoding="utf-8")
        comment = text.partition("\n")[0].lstrip("# ") if text.startswith("#") else ""
        published = read(path)[2].published
        value = (published.beta_f_per_atom, published.std_error, published.source) if published else (None, None, "")
        systems.append(ShippedSystem(name, comment, *value))
    return systems


def nearest(word: str, valid: Sequence[str]) -> str | None:
    """The valid word that `word` was probably meant to be."""
    folded = {name.casefold(): name for name in valid}
    near = difflib.get_close_matches(word.casefold(), list(folded), n=1, cutoff=0.6)
    longer = [name for name in folded if len(word) >= 3 and name.startswith(word.casefold())]
    found = near or longer
    return folded[found[0]] if found else None


def suggest(word: str, valid: Sequence[str]) -> str:
    """A hint to put behind "unknown ...": the nearest valid word, or all of them."""
    near = nearest(word, valid)
    return f"did you mean {near}?" if near else f"use one of {', '.join(valid)}"


def _crystal(section: SystemSection, folder: Path) -> Crystal:
    from freeflow.crystals import lattice_crystal, structure_crystal

    if section.structure is not None:
        return structure_crystal(folder / section.structure.file, section.structure.repeats)
    assert section.crystal is not None
    crystal = section.crystal
    return lattice_crystal(
        crystal.lattice,
        crystal.repeats,
        number_density=crystal.number_density,
        lattice_constant=crystal.lattice_constant,
    )


def _with_absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    if "structure" in values:
        values["structure"]["file"] = str((folder / values["structure"]["file"]).absolute())
    flow = values["estimate"]["flow"] or {}
    if flow.get("checkpoint", "shipped") != "shipped":
        flow["checkpoint"] = str((folder / flow["checkpoint"]).absolute())
    trajectory = values["estimate"]["trajectory"] or {}
    for key in [key for key in ("file", "topology") if trajectory.get(key)]:
        trajectory[key] = str((folder / trajectory[key]).absolute())
    return values


def _shipped_files() -> dict[str, Path]:
    package = Path(__file__).parent
    inside = package / "systems"  # in a wheel; beside the package in a source checkout
    folder = inside if inside.is_dir() else package.parent / "systems"
    by_number = sorted(
        folder.glob("*.yaml"), key=lambda path: (re.sub(r"\d+", "", path.stem), len(path.stem), path.stem)
    )
    return {path.stem: path for path in by_number}


def _find(source: str | Path) -> Path:
    names = _shipped_files()
    text = str(source)
    if isinstance(source, str) and source in names:
        return names[source]
    path = Path(source)
    try:
        exists = path.exists()
    except (OSError, ValueError):
        exists = False
    if exists:
        return path
    if isinstance(source, Path) or "/" in text or path.suffix in {".yaml", ".yml"}:
        near = nearest(path.stem, list(names))
        hint = f"; a system called {near} ships with freeflow" if near else ""
        raise InputError(f"{_show_path(path)}: no such file{hint}")
    near = nearest(text, list(names))
    hint = f"did you mean {near}?" if near else "'freeflow systems' lists what ships"
    raise InputError(f"no file and no shipped system called {_show(text)}; {hint}")


def _read_text(path: Path, label: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except IsADirectoryError:
        raise InputError(f"{label}: is a directory; give the system.yaml in it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{label}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{label}: larger than {MAX_FILE_BYTES} bytes; this is no system.yaml")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{label}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x})") from None


# --------------------------------------------------------------------------- YAML, with line numbers

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans (1e-4 is a number, `no` is a word); no aliases, anchors or tags."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own name)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self._refuse("anchors and aliases (& and *) are not allowed; write the value out", event)
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._refuse(f"tags ({_show(tag)}) are not allowed", event)
        if self.depth > MAX_DEPTH:
            self._refuse("nested too deeply", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    @staticmethod
    def _refuse(problem: str, event: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_Loader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: its words for numbers, lists on one line, no aliases."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _parse(text: str, label: str) -> tuple[Any, dict[KeyPath, int]]:
    """Plain values, and the line of every key."""
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise InputError(f"{label}: the file is empty")
        data = _plain(node, (), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}" if mark else label
        problem = error.problem or "not valid YAML"
        if problem.startswith("but ") and error.context:
            problem = f"{error.context}, {problem}"
        raise InputError(f"{where}: {_one_line(problem)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{label}:{line}: not text (character #x{ord(text[error.position]):04x})") from None
    if not isinstance(data, dict):
        raise InputError(f"{label}:{lines[()]}: expected keys and values (name: ...), got {_show(data)}")
    return data, lines


def _plain(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return dict(_items(node, path, lines))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), lines) for i, item in enumerate(node.value)]
    text = node.value
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT and len(text) < 300:
        return int(text)
    if node.tag in {_INT, _FLOAT}:
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return text


def _items(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int]) -> Iterator[tuple[str, Any]]:
    for key_node, value_node in node.value:
        mark = key_node.start_mark
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=mark)
        inner = (*path, key_node.value)
        if inner in lines:
            problem = f"{_show_key(inner)}: given twice (first on line {lines[inner]})"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        lines[inner] = mark.line + 1
        yield key_node.value, _plain(value_node, inner, lines)


# --------------------------------------------------------------------------- errors in plain words


class _Problem(NamedTuple):
    path: KeyPath
    message: str
    explains: str | None = None  # a missing key that this one was probably meant to be


def _validate(model: Any, data: Any, label: str, lines: Mapping[KeyPath, int], prefix: tuple[str, ...] = ()) -> Any:
    if not prefix and "solution" in data:
        problem = _Problem(("solution",), "solvation free energies are not available yet; describe a crystal")
        raise InputError(_message([problem], label, lines))
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [_problem(details, data, prefix) for details in error.errors(include_url=False)]
    explained = {(*problem.path[:-1], problem.explains) for problem in problems if problem.explains}
    problems = [problem for problem in problems if problem.path not in explained]
    # What is there comes before what is missing: a word that cannot be guessed may be the missing one.
    problems.sort(key=lambda problem: (problem.message.startswith("missing"), _line(problem.path, lines)))
    raise InputError(_message(problems, label, lines))


def _message(problems: Sequence[_Problem], label: str, lines: Mapping[KeyPath, int]) -> str:
    path, message, _ = problems[0]
    where = [f"{label}:{_line(path, lines)}" if lines else label, _show_key(path), message]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _one_line(": ".join(part for part in where if part)) + more


def _line(path: KeyPath, lines: Mapping[KeyPath, int]) -> int:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _problem(details: ErrorDetails, data: Any, prefix: tuple[str, ...]) -> _Problem:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    path = _path(details["loc"], data, prefix)
    if kind == "extra_forbidden":
        return _unknown_key(path, data, prefix)
    if kind == "missing":
        if path == ("units",):
            styles = ", ".join(f"{name} ({_describe(name)})" for name in UNIT_STYLES)
            return _Problem(path, f"missing; choose {styles}")
        return _Problem(path, "missing")
    if kind in {"union_tag_not_found", "union_tag_invalid"} and (*prefix, *path) == ("estimate", "flow"):
        return _wrong_flow(path, value)
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        given = value.get("kind") if isinstance(value, Mapping) else None
        known = list(_POTENTIALS)
        if given is None:
            return _Problem((*path, "kind"), f"missing; use one of {', '.join(known)}")
        return _Problem((*path, "kind"), f"unknown potential {_show(given)}; {suggest(str(given), known)}")
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        return _Problem(path, f"unknown value {_show(value)}; {suggest(str(value), known)}")
    if kind in {"model_type", "model_attributes_type"}:
        keys = ", ".join(["kind", "..."] if path == ("potential",) else _keys(_section(prefix + path, data)))
        return _Problem(path, f"expected a section with the keys {keys}, got {_show(value)}")
    if kind == "freeflow":
        return _Problem((*path, *context["key"]), context["message"])
    return _Problem(path, f"{_plain_words(kind, context) or details['msg']}, got {_show(value)}")


def _plain_words(kind: str, context: Mapping[str, Any]) -> str | None:
    words = {
        "float_type": "expected a number",
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "bool_type": "expected true or false",
        "string_type": "expected text",
        "finite_number": "expected a finite number",
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "string_too_long": "must be at most {max_length} characters long",
    }
    bounds = {key: f"{number:g}" if isinstance(number, float) else number for key, number in context.items()}
    return words[kind].format(**bounds) if kind in words else None


def _wrong_flow(path: KeyPath, value: Any) -> _Problem:
    known = [name for name in _FLOWS if name != "checkpoint"]
    if not isinstance(value, Mapping):
        return _Problem(path, f"expected a section with the keys checkpoint, or architecture, ..., got {_show(value)}")
    if "architecture" in value:
        given = value["architecture"]
        return _Problem((*path, "architecture"), f"unknown value {_show(given)}; {suggest(str(given), known)}")
    near = next((key for key in value if nearest(str(key), ["checkpoint", "architecture"])), None)
    if near is not None:
        hint = suggest(str(near), ["checkpoint", "architecture"])
        return _Problem((*path, near), f"unknown key; {hint}")
    return _Problem(path, f"give checkpoint (a trained flow) or architecture ({', '.join(known)})")


def _path(location: tuple[str | int, ...], data: Any, prefix: tuple[str, ...] = ()) -> KeyPath:
    """Pydantic's location without the names of union members that it puts behind `potential` and `flow`."""
    for union, members in ((("potential",), _POTENTIALS), (("estimate", "flow"), _FLOWS)):
        at = len(union) - len(prefix)
        if (*prefix, *location)[: len(union)] == union and len(location) > at and location[at] in members:
            location = (*location[:at], *location[at + 1 :])
    return location


def _unknown_key(path: KeyPath, data: Any, prefix: tuple[str, ...]) -> _Problem:
    *parents, key = path
    section = (*prefix, *parents)
    if section == ("estimate", "flow") and key == "architecture":
        return _Problem(path, "give checkpoint or architecture, not both")
    valid = _keys(_section(section, data))
    homes = [".".join(home) for home, model in _SECTIONS.items() if home != section and str(key) in _keys(model)]
    if homes and nearest(str(key), valid) is None:
        place = f"in section {homes[0]}" if homes[0] else "at the top of the file"
        return _Problem(path, f"unknown key here; it belongs {place}")
    hint = suggest(str(key), valid)
    return _Problem(path, f"unknown key; {hint}", nearest(str(key), valid))


def _section(path: KeyPath, data: Any) -> type[Section]:
    if path == ("potential",):
        return _POTENTIALS[data["potential"]["kind"]]
    if path == ("estimate", "flow"):
        inner = data.get("estimate")
        flow = inner["flow"] if isinstance(inner, Mapping) and "flow" in inner else data["flow"]
        return _FLOWS[_kind_of_flow(flow) or "checkpoint"]
    return _SECTIONS[tuple(str(key) for key in path)]


def _keys(model: type[Section]) -> list[str]:
    return sorted((field.alias or name for name, field in model.model_fields.items()), key="nearest_image_only".__eq__)


def _describe(units: str) -> str:
    style = UNIT_STYLES[units]
    return ", ".join(dict.fromkeys([style.energy, style.length, style.temperature]))


def _show_key(path: KeyPath) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{_show_word(key)}" for key in path)
    return text.removeprefix(".")


def _show_word(word: str) -> str:
    return word if re.fullmatch(r"[\w-]{1,40}", word) else _show(word)


def _show_path(path: Path) -> str:
    return str(path) if str(path).isprintable() else repr(str(path))


def _show(value: Any) -> str:
    """A value in an error message: short, and on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a number too large to show"
    return text if len(text) <= 60 else f"{text[:50]}..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
