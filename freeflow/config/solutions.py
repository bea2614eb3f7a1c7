"""What a system.yaml of a solution may say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from freeflow.config.values import FileSection, NonNegative, Section, Text, as_tuple, wrong
from freeflow.config.words import show

if TYPE_CHECKING:
    from freeflow.types import DifferencePlan


def _half_box(value: Any) -> float | str:
    if value == "half_box" or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
        return value
    raise wrong(f"expected a length or half_box, got {show(value)}")


def _two(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise wrong(f"expected two numbers, [A, B], got {show(value)}")
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

    A: Annotated[tuple[Text, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    B: Annotated[tuple[Text, ...], BeforeValidator(as_tuple), Field(min_length=1)]


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

    methods: Annotated[tuple[Method, ...], BeforeValidator(as_tuple), Field(min_length=1)] = ("bridge",)
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


class SolutionFileSection(FileSection):
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
