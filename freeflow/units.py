"""Unit styles, named as in LAMMPS."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from freeflow.errors import InputError


@dataclass(frozen=True)
class UnitStyle:
    """Units of a system.yaml; freeflow computes in them and never converts between styles."""

    name: str
    energy: str
    length: str
    temperature: str
    boltzmann: float  # [energy/temperature]
    pressure: str
    pressure_unit: float  # one unit of pressure [energy/length**3]

    def with_boltzmann(self, value: float | None) -> UnitStyle:
        """The same style with another Boltzmann constant."""
        return self if value is None else replace(self, boltzmann=value)


UNIT_STYLES = {
    "lj": UnitStyle("lj", "epsilon", "sigma", "epsilon/k_B", 1.0, "epsilon/sigma^3", 1.0),
    # LAMMPS's constants; the Boltzmann constant is the one that the published mW values were computed
    # with; 0.001987204 would shift them by 4e-5 per atom.
    "real": UnitStyle("real", "kcal/mol", "angstrom", "K", 0.0019872067, "atm", 1 / 68568.415),
    # CODATA 2018.
    "metal": UnitStyle("metal", "eV", "angstrom", "K", 8.617333262e-5, "bar", 1 / 1.602176634e6),
}


def unit_style(name: str, boltzmann: float | None = None) -> UnitStyle:
    """The unit style called `name`.

    Raises:
        InputError: If there is no such style.
    """
    if name not in UNIT_STYLES:
        raise InputError(f"units: no style {name!r}; use one of {', '.join(UNIT_STYLES)}")
    return UNIT_STYLES[name].with_boltzmann(boltzmann)


# CODATA 2018, exact but for the dalton.
_PLANCK, _DALTON = 6.62607015e-34, 1.66053906660e-27  # [J s], [kg]
_JOULES = {"real": 4184.0 / 6.02214076e23, "metal": 1.602176634e-19}  # in a unit of energy
_ANGSTROM = 1e-10


def thermal_wavelength_of(mass: float, units: UnitStyle, temperature: float) -> float:
    """Thermal de Broglie wavelength h / sqrt(2 pi m kT) [length].

    Args:
        mass: Of one atom [dalton].
        units: Unit style; its Boltzmann constant counts.
        temperature: In the style's unit.

    Raises:
        InputError: In reduced units, which know no Planck constant.
    """
    if units.name not in _JOULES:
        raise InputError(
            f"thermal_wavelength: {units.name} units know no Planck constant to find it from masses; give it"
        )
    kt = units.boltzmann * temperature * _JOULES[units.name]
    return _PLANCK / math.sqrt(2 * math.pi * mass * _DALTON * kt) / _ANGSTROM


# One eV, the unit of ASE, in the energy of a style; in reduced units the numbers stay as they are.
ELECTRON_VOLT = {"lj": 1.0, "real": _JOULES["metal"] / _JOULES["real"], "metal": 1.0}


# Units in which a pressure may be written out [Pa], and those that the styles are in.
PASCALS = {"Pa": 1.0, "kPa": 1e3, "MPa": 1e6, "GPa": 1e9, "bar": 1e5, "kbar": 1e8, "Mbar": 1e11, "atm": 101325.0}


def pressure_in(style: UnitStyle, value: float, unit: str) -> float:
    """A pressure, given in one of `PASCALS`, in the style's own unit.

    Raises:
        InputError: If the unit is none of these, or the style is without dimension.
    """
    if style.pressure not in PASCALS:
        raise InputError(f"pressure: a number in {style.pressure} is expected in units {style.name}, not {unit}")
    if unit not in PASCALS:
        raise InputError(f"pressure: no unit {unit!r}; use one of {', '.join(PASCALS)}")
    return value * PASCALS[unit] / PASCALS[style.pressure]
