"""What a system.yaml may say under `potential`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from freeflow.config.values import NonNegative, Section, Text, wrong
from freeflow.config.words import show
from freeflow.cores import n_cores
from freeflow.errors import InputError

if TYPE_CHECKING:
    from freeflow.potentials import External, Potential, SpeciesPairs

_SHORTEST = 1e-100  # cutoff whose inverse can be squared

# What both presets have of the form that Stillinger and Weber gave it.
_SHARED: dict[str, Any] = {
    "a": 1.8,
    "gamma": 1.2,
    "cos_theta0": -1 / 3,
    "A": 7.049556277,
    "B": 0.6022245584,
    "p": 4.0,
    "q": 0.0,
}
# Parameters in the units that they were published in, under `units`.
STILLINGER_WEBER_PRESETS: dict[str, dict[str, Any]] = {
    # Molinero and Moore, J. Phys. Chem. B 113, 4008 (2009).
    "mw": {"units": "real", "epsilon": 6.189, "sigma": 2.3925, "lambda": 23.15, **_SHARED},
    # Stillinger and Weber, Phys. Rev. B 31, 5262 (1985).
    "silicon": {"units": "metal", "epsilon": 2.1683, "sigma": 2.0951, "lambda": 21.0, **_SHARED},
}


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
            raise wrong(f"expected two species such as Na-Cl, got {show(key)}")
        twin = found.setdefault(tuple(sorted(key.split("-"))), key)
        if twin != key:
            raise wrong(f"{twin} and {key} are the same pair")
    return value


class PairsSection(PotentialSection):
    """Pair potentials with one set of numbers, or with one for every two species under `pairs`."""

    @model_validator(mode="after")
    def _either(self) -> PairsSection:
        own = self._own()
        if self._by_pair is None:
            missing = [name for name in own if name in self._needed and getattr(self, name) is None]
            if missing:
                raise wrong(f"missing {', '.join(missing)}; give the numbers here, or for every two species in pairs")
        elif given := [name for name in own if name in self.model_fields_set]:
            raise wrong("pairs has these numbers for every two species; give it here or there", (given[0],))
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
            raise wrong(f"missing {', '.join(missing)}; give every parameter, or a preset ({known})")
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
        raise wrong(f"expected module:name, got {show(value)}")
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
