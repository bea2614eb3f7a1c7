"""Unit styles, named as in LAMMPS."""

from __future__ import annotations

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

    def with_boltzmann(self, value: float | None) -> UnitStyle:
        """The same style with another Boltzmann constant."""
        return self if value is None else replace(self, boltzmann=value)


UNIT_STYLES = {
    "lj": UnitStyle("lj", "epsilon", "sigma", "epsilon/k_B", 1.0),
    # LAMMPS's constant, which the published mW values were computed with; 0.001987204 would
    # shift them by 4e-5 per atom.
    "real": UnitStyle("real", "kcal/mol", "angstrom", "K", 0.0019872067),
    # CODATA 2018.
    "metal": UnitStyle("metal", "eV", "angstrom", "K", 8.617333262e-5),
}


def unit_style(name: str, boltzmann: float | None = None) -> UnitStyle:
    """The unit style called `name`.

    Raises:
        InputError: If there is no such style.
    """
    if name not in UNIT_STYLES:
        raise InputError(f"units: no style {name!r}; use one of {', '.join(UNIT_STYLES)}")
    return UNIT_STYLES[name].with_boltzmann(boltzmann)
