"""What a system.yaml may say: strict, frozen, with units and bounds. Importing this module does not start JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, PositiveFloat, model_validator

from freeflow.config.estimates import (
    AtomicSolidsSection,
    BridgeSection,
    EstimateSection,
    ResidualSection,
    StoredFlowSection,
    TrainingSection,
    TrajectorySection,
)
from freeflow.config.potentials import (
    STILLINGER_WEBER_PRESETS,
    AseCalculator,
    BornMayer,
    BornMayerPair,
    LennardJones,
    LennardJonesPair,
    PotentialSection,
    PythonFunction,
    StillingerWeber,
    WeeksChandlerAndersen,
)
from freeflow.config.solutions import (
    DifferenceSection,
    MapSection,
    PublishedDifferenceSection,
    SoluteSection,
    SolutionFileSection,
    SolutionSection,
    SolventPotentialSection,
    SolventSection,
    TrajectoriesSection,
)
from freeflow.config.values import (
    FileSection,
    Pressure,
    Repeats,
    Section,
    Species,
    Temperatures,
    Text,
    as_tuple,
    pressures,
    wrong,
)
from freeflow.config.words import describe, show
from freeflow.errors import InputError
from freeflow.units import pressure_in

if TYPE_CHECKING:
    from freeflow.types import Published


class CrystalSection(Section):
    """Atoms on a repeated lattice."""

    lattice: Literal["sc", "bcc", "fcc", "hcp", "diamond", "hexagonal_ice", "rocksalt", "cesium_chloride", "zincblende"]
    species: Annotated[tuple[Species, ...], BeforeValidator(as_tuple), Field(min_length=1)] = Field(
        default=("X",), description="chemical symbol, or one for each kind of atom"
    )
    repeats: Repeats = Field(description="of the conventional cell")
    number_density: PositiveFloat | None = Field(default=None, description="[1/length**3]")
    lattice_constant: PositiveFloat | None = Field(default=None, description="edge of the conventional cell [length]")

    @model_validator(mode="after")
    def _one_size(self) -> CrystalSection:
        if self.number_density is None and self.lattice_constant is None:
            raise wrong("give number_density or lattice_constant")
        if self.number_density is not None and self.lattice_constant is not None:
            raise wrong("give number_density or lattice_constant, not both")
        return self


class StructureSection(Section):
    """Atoms from a file that ASE reads; a relative path starts at the folder of the system file."""

    file: Text
    repeats: Repeats = (1, 1, 1)


class PublishedSection(Section):
    """A value from the literature to compare with."""

    beta_f_per_atom: float
    std_error: PositiveFloat | None = None
    source: Annotated[str, Field(max_length=1000)] = ""

    def record(self) -> Published:
        """The same as the record that a System carries."""
        from freeflow.types import Published

        return Published(self.beta_f_per_atom, self.std_error, self.source)


def _number_or_by_species(value: Any) -> Any:
    if value is None or isinstance(value, dict) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise wrong(f"expected a number, or one for every species such as {{Na: 0.2, Cl: 0.17}}, got {show(value)}")


class SystemSection(FileSection):
    """The whole of system.yaml of a crystal."""

    temperature: Temperatures = Field(
        description="[K], or [epsilon/k_B] in lj units; a list or START:STOP:STEP is a series"
    )
    pressure: Annotated[float | tuple[float, ...] | None, PlainValidator(pressures, str | float | list[float])] = Field(
        default=None,
        description="makes it a Gibbs free energy [epsilon/sigma^3, atm in real units, bar in metal ones, or with "
        "a unit, such as 1 kbar]; a list or START:STOP:STEP is a series",
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
            raise wrong("give crystal or structure, not both", ("structure",))
        if self.crystal is None and self.structure is None:
            raise wrong("give crystal (a named lattice) or structure (a file)")
        if self.masses is not None and self.thermal_wavelength is not None:
            raise wrong("give masses or thermal_wavelength, not both", ("masses",))
        preset = self.potential.preset if isinstance(self.potential, StillingerWeber) else None
        if preset is not None and (native := STILLINGER_WEBER_PRESETS[preset]["units"]) != self.units:
            message = f"{preset} is in units {native} ({describe(native)}), but this file's units are {self.units}"
            raise wrong(message, ("potential", "preset"))
        return self._under_pressure()

    def _under_pressure(self) -> SystemSection:
        if self.pressure is None:
            if self.cell_motion is not None:
                raise wrong("a cell moves under a pressure; give pressure, too (it may be 0)", ("cell_motion",))
            return self
        if self.estimate.flow is not None:
            raise wrong("for crystals in a fixed cell only; leave it out, or the pressure", ("estimate", "flow"))
        try:
            pressure = self._in_unit_of_style(self.pressure)
        except InputError as error:
            raise wrong(str(error).removeprefix("pressure: "), ("pressure",)) from None
        return self.model_copy(update={"pressure": pressure, "cell_motion": self.cell_motion or "isotropic"})

    def _in_unit_of_style(self, pressure: Any) -> Any:
        if isinstance(pressure, Pressure):
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
