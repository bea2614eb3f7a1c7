"""Pair potentials of crystals with several species: one term for every two of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement

import jax.numpy as jnp
import numpy as np

from freeflow.errors import InputError
from freeflow.potentials.core import Potential

Pair = tuple[str, str]  # two species in alphabetical order


@dataclass(frozen=True)
class SpeciesPairs:
    """A sum of pair potentials, each between two species and with a cutoff of its own."""

    name: str
    terms: Mapping[Pair, Potential]

    @property
    def cutoff(self) -> float:
        """The longest of all [length]."""
        return max(term.cutoff for term in self.terms.values())

    def of(self, species: Iterable[str]) -> dict[Pair, Potential]:
        """The terms of a crystal of these species.

        Raises:
            InputError: If a pair of them has no term, or a term names a species that the crystal lacks.
        """
        present = sorted(set(species))
        wanted = list(combinations_with_replacement(present, 2))
        holds = f"the crystal holds {' and '.join(present)}"
        for pair in wanted:
            if pair not in self.terms:
                raise InputError(f"potential.pairs: no pair {'-'.join(pair)}; {holds}")
        for pair in self.terms:
            if pair not in wanted:
                raise InputError(f"potential.pairs: {'-'.join(pair)} is no pair of this crystal; {holds}")
        return {pair: self.terms[pair] for pair in wanted}


def born_mayer(
    A: float,
    rho: float,
    sigma: float = 0.0,
    C: float = 0.0,
    D: float = 0.0,
    cutoff: float = 10.0,
    shift: bool = True,
) -> Potential:
    """Born, Mayer and Huggins without charges: A exp((sigma - r)/rho) - C/r^6 + D/r^8 (LAMMPS's `born`).

    With sigma = D = 0 it is the Buckingham potential. The attraction -C/r^6 wins over any exponential at short
    distance; below the top of the barrier in front of that, where no physical state is, the energy goes on along a
    wall that rises.

    Args:
        A: Strength of the repulsion [energy].
        rho: Its range [length].
        sigma: Distance at which it is A [length].
        C: Strength of the attraction [energy length^6].
        D: Strength of the next term [energy length^8].
        cutoff: Where the potential ends [length].
        shift: Whether the energy is shifted to zero at the cutoff.

    Raises:
        InputError: If there is no barrier: it attracts at all distances.
    """

    def bare(r2, exp, sqrt):
        inverse6 = 1 / (r2 * r2 * r2)
        return A * exp((sigma - sqrt(r2)) / rho) - C * inverse6 + D * inverse6 / r2

    # Plain numbers from here on: NumPy's would make float64 of a float32 kernel.
    at_cutoff = float(bare(np.float64(cutoff) ** 2, np.exp, np.sqrt)) if shift else 0.0
    r2 = np.linspace(0.02, 1.0, 5000) ** 2 * cutoff**2
    energies = bare(r2, np.exp, np.sqrt)
    # The innermost point from which the energy falls outwards.
    falls = np.flatnonzero(np.diff(energies) < 0)
    if not len(falls):
        raise InputError(f"potential: born_mayer with A {A:g}, rho {rho:g}, C {C:g} attracts at all distances")
    top = float(r2[falls[0]])
    height, wall = float(energies[falls[0]]), 10.0 * (abs(float(energies[falls[0]])) + A) / top

    def pair(r2):
        inside = r2 < cutoff**2
        outside_wall = jnp.maximum(jnp.where(inside, r2, cutoff**2), jnp.asarray(top, r2.dtype))
        regular = bare(outside_wall, jnp.exp, jnp.sqrt)
        # Continuous: at the top both are `height`.
        energy = jnp.where(r2 > top, regular, height + wall * (top - r2))
        return jnp.where(inside, energy - at_cutoff, 0.0)

    return Potential("born_mayer", cutoff, pair)
