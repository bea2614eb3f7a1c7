"""What a system.yaml may say under `estimate`, of a crystal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from freeflow.config.values import Section, Text, wrong
from freeflow.config.words import show

if TYPE_CHECKING:
    from freeflow.types import FlowPlan, Plan, TrainingPlan, TrajectoryPlan


def _stages(value: Any) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1_000_000):
        return value
    raise wrong(f"expected auto or a whole number from 1 to 1000000, got {show(value)}")


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
        raise wrong(f"expected the lowest and the highest, got {show(value)}")
    return tuple(value)


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] < value[1]:
        raise wrong(f"the first must be below the second, got {show(list(value))}")
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
        raise wrong(f"expected START:STOP:STRIDE in whole numbers, such as 100: or ::2, got {show(value)}")
    start, stop, stride = found.groups()
    if stride and int(stride) == 0:
        raise wrong("the stride must be at least 1")
    if stop and int(stop) <= int(start or 0):
        raise wrong(f"no frames lie in {value}")
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
                raise wrong("fep makes no use of a trajectory; use bar", ("estimator",))
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
