"""What sections of a system.yaml are made of: numbers with bounds, ranges, pressures with units, names."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PositiveFloat, Tag
from pydantic_core import PydanticCustomError

from freeflow.config.words import show
from freeflow.units import PASCALS, UnitStyle, unit_style

MAX_CELLS = 100_000


def wrong(message: str, key: tuple[str, ...] = ()) -> PydanticCustomError:
    """An error for pydantic; `key` is where, below the section that raises it."""
    # Braces would be read as a template; user text goes in as a value.
    return PydanticCustomError("freeflow", "{message}", {"message": message, "key": key})


def _three(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise wrong(f"expected three whole numbers like [2, 2, 2], got {show(value)}")
    return tuple(value)


def _few_cells(repeats: tuple[int, int, int]) -> tuple[int, int, int]:
    cells = repeats[0] * repeats[1] * repeats[2]
    if cells > MAX_CELLS:
        raise wrong(f"{cells} repeated cells are more than the {MAX_CELLS} that fit in memory")
    return repeats


def _line_of_text(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise wrong(f"expected one line of printable text, got {show(value)}")
    return value


_RANGE = re.compile(r"([^:]+):([^:]+):([^:]+)")
MAX_STATES = 1000  # of a series


def _range(text: str) -> tuple[float, ...] | None:
    """The numbers of START:STOP:STEP, STOP included; None if it holds none, or more than `MAX_STATES`."""
    try:
        start, stop, step = (float(part) for part in text.split(":"))
        steps = (stop - start) / step
    except (ValueError, ZeroDivisionError):
        raise wrong(f"expected START:STOP:STEP in numbers, such as 100:300:25, got {show(text)}") from None
    if not 0 <= steps < MAX_STATES:
        return None
    return tuple(start + k * step for k in range(int(steps + 1e-9) + 1))


def temperature_range(value: Any) -> Any:
    """START:STOP:STEP as a list of numbers, STOP included; anything else as it is."""
    if not isinstance(value, str) or _RANGE.fullmatch(value) is None:
        return tuple(value) if isinstance(value, list) else value
    numbers = _range(value)
    if numbers is None or min(numbers) <= 0:
        raise wrong(f"{show(value)} holds no temperatures above 0, or more than {MAX_STATES}")
    return numbers


class Pressure(NamedTuple):
    """A pressure as it was written: without a unit it is in that of the style."""

    value: float
    unit: str | None = None


def pressures(value: Any) -> Any:
    """One `Pressure` or several; a range may end in a unit."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if not 0 < len(value) <= MAX_STATES:
            raise wrong(f"expected 1 to {MAX_STATES} pressures, got {len(value)}")
        return tuple(_one_pressure(one) for one in value)
    text, _, unit = value.strip().partition(" ") if isinstance(value, str) else ("", "", "")
    if _RANGE.fullmatch(text) is None:
        return _one_pressure(value)
    numbers = _range(text)
    if numbers is None:
        raise wrong(f"{show(value)} holds no pressures, or more than {MAX_STATES}")
    return tuple(_one_pressure(f"{number!r} {unit}" if unit else number) for number in numbers)


def _one_pressure(value: Any) -> Pressure:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return Pressure(float(value))
    number, _, unit = value.strip().partition(" ") if isinstance(value, str) else ("", "", "")
    with contextlib.suppress(ValueError):
        if unit.strip() in PASCALS and math.isfinite(float(number)):
            return Pressure(float(number), unit.strip())
    raise wrong(f"expected a number, or one with a unit ({', '.join(PASCALS)}) like 1 kbar, got {show(value)}")


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
        raise wrong(f"expected a chemical symbol such as Cu, got {show(value)}")
    return value


def as_tuple(value: Any) -> Any:
    """A list as a tuple, a text on its own as one of one; anything else as it is."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


NonNegative = Annotated[float, Field(ge=0)]
Species = Annotated[str, AfterValidator(_symbol)]
Text = Annotated[str, Field(max_length=1000), AfterValidator(_line_of_text)]


class Section(BaseModel):
    """A mapping of the file: exact types, finite numbers, no other keys, no changes afterwards."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class FileSection(Section):
    """What files of crystals and of solutions have in common."""

    name: Annotated[Text, Field(max_length=100)]
    units: Literal["lj", "real", "metal"]
    temperature: Any
    boltzmann: PositiveFloat | None = Field(default=None, description="replaces the unit style's k_B")

    @property
    def unit_style(self) -> UnitStyle:
        """Units, with the file's own Boltzmann constant if it gives one."""
        return unit_style(self.units, self.boltzmann)
