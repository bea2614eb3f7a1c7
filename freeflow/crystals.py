"""From plain values to a crystal System: lattices, structure files, constants of the convention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from freeflow.errors import InputError
from freeflow.geometry import (
    LATTICES,
    NeighbourTable,
    Translations,
    face_distances,
    nearest_image_table,
    nearest_neighbour_distance,
    neighbour_table,
    smith_form,
)
from freeflow.potentials import Potential, atomic_energies_at_rest, bind
from freeflow.symmetries import crystal_operations, primitive_cell
from freeflow.types import Crystal, Ensemble, Plan, Published, System, ThermodynamicState
from freeflow.units import UnitStyle

# Sites closer than this fraction of the mean spacing to a symmetric position are put onto it.
_SYMMETRY_TOLERANCE = 1e-4


def lattice_crystal(
    lattice: str,
    repeats: tuple[int, int, int],
    number_density: float | None = None,
    lattice_constant: float | None = None,
) -> Crystal:
    """Repeats of the conventional cell of a named lattice.

    Args:
        lattice: A name in `freeflow.geometry.LATTICES`.
        repeats: How often the conventional cell is repeated along its three vectors.
        number_density: Atoms per volume [1/length**3]; this or
        lattice_constant: Edge a of the conventional cell [length].

    Raises:
        InputError: If the lattice is unknown, or its size is not given exactly once, or not positive.
    """
    if lattice not in LATTICES:
        raise InputError(f"crystal.lattice: no lattice {lattice!r}; use one of {', '.join(LATTICES)}")
    if (number_density is None) == (lattice_constant is None):
        raise InputError("crystal: give either number_density or lattice_constant")
    if min(repeats) < 1:
        raise InputError(f"crystal.repeats: {list(repeats)} gives no crystal; every repeat must be at least 1")
    shape = LATTICES[lattice]
    if number_density is not None:
        if not number_density > 0:
            raise InputError(f"crystal.number_density: must be positive, got {number_density:g}")
        lattice_constant = (len(shape.basis) / (abs(np.linalg.det(shape.cell)) * number_density)) ** (1 / 3)
    if not (lattice_constant is not None and lattice_constant > 0):
        raise InputError(f"crystal.lattice_constant: must be positive, got {lattice_constant}")
    cell = shape.cell * lattice_constant
    return _repeated(cell, shape.basis @ cell, ("X",) * len(shape.basis), repeats, shape.description)


def structure_crystal(file: str | Path, repeats: tuple[int, int, int] = (1, 1, 1)) -> Crystal:
    """A crystal from any structure file that ASE reads.

    Raises:
        InputError: If the file is missing, unreadable, not periodic, or holds no atoms.
    """
    import ase.io

    path = Path(file)
    if not path.is_file():
        raise InputError(f"structure.file: no file {path}")
    try:
        atoms = ase.io.read(path)
    except Exception as error:  # ASE's readers raise whatever their format happens to raise
        reason = str(error).strip().splitlines()
        raise InputError(
            f"structure.file: ASE cannot read {path} ({type(error).__name__}{': ' + reason[0] if reason else ''})"
        ) from None
    if isinstance(atoms, list):
        atoms = atoms[-1]
    if len(atoms) == 0:
        raise InputError(f"structure.file: {path} holds no atoms")
    cell = np.array(atoms.cell.array, dtype=float)
    positions = np.array(atoms.positions, dtype=float)
    if not np.isfinite(cell).all() or not np.isfinite(positions).all():
        raise InputError(f"structure.file: {path} holds positions or cell vectors that are not finite numbers")
    # Some formats know a cell but not whether it repeats; one that says "not along c" means a slab.
    if abs(np.linalg.det(cell)) < 1e-9 or (atoms.pbc.any() and not atoms.pbc.all()):
        raise InputError(f"structure.file: {path} has no periodic cell; a crystal needs three lattice vectors")
    species = tuple(atoms.get_chemical_symbols())
    if min(repeats) < 1:
        raise InputError(f"structure.repeats: {list(repeats)} gives no crystal; every repeat must be at least 1")
    return _repeated(cell, positions, species, repeats, f"structure {path.name}")


def _repeated(
    cell: np.ndarray, positions: np.ndarray, species: tuple[str, ...], repeats: tuple[int, int, int], description: str
) -> Crystal:
    """Repeat a cell, and find the translations and rotations of the periodic crystal that results."""
    shifts = np.indices(repeats).reshape(3, -1).T @ cell
    sites = (shifts[:, None] + positions[None]).reshape(-1, 3)
    all_species = species * len(shifts)
    supercell = np.array(repeats)[:, None] * cell
    spacing = (abs(np.linalg.det(cell)) / len(positions)) ** (1 / 3)
    _refuse_coinciding(supercell, sites, spacing)
    tolerance = _SYMMETRY_TOLERANCE * spacing
    primitive, basis = primitive_cell(cell, positions, species, tolerance)
    orders, to_group = smith_form(np.rint(supercell @ np.linalg.inv(primitive)).astype(int))
    translations = Translations(primitive, basis, orders, to_group)
    t, b = translations.locate(sites, 10 * tolerance)
    site_of = np.full((int(np.prod(orders)), len(basis)), -1)
    site_of[t, b] = np.arange(len(sites))
    if (site_of < 0).any():
        raise InputError("the crystal's translations do not map it onto itself; check the structure for missing atoms")
    # Put every site exactly where its translation puts it, so that one bond vector serves all cells.
    inverse = np.linalg.inv(primitive)
    sites = np.rint((sites - basis[b]) @ inverse) @ primitive + basis[b]
    rotations, operation_sites = crystal_operations(
        cell, positions, species, supercell, sites, site_of, translations, tolerance
    )
    return Crystal(
        cell=supercell,
        sites=sites,
        species=all_species,
        group=(int(orders[0]), int(orders[1]), int(orders[2])),
        site_of=site_of,
        operations=rotations,
        operation_sites=operation_sites,
        description=description,
    )


def _refuse_coinciding(cell: np.ndarray, sites: np.ndarray, spacing: float) -> None:
    from vesin import NeighborList

    # In units of the spacing: a density in the wrong unit must not reach the neighbour list's own limits.
    (near,) = NeighborList(cutoff=0.05, full_list=False).compute(
        points=sites / spacing, box=cell / spacing, periodic=True, quantities="i"
    )
    if len(near):
        raise InputError(f"structure: {len(near)} pairs of atoms (the first with atom {int(near[0])}) share one place")


def crystal_system(
    name: str,
    crystal: Crystal,
    potential: Potential,
    units: UnitStyle,
    temperature: float,
    thermal_wavelength: float,
    nearest_image_only: bool = False,
    plan: Plan | None = None,
    published: Published | None = None,
    config: Mapping[str, Any] | None = None,
) -> System:
    """The Helmholtz free energy problem of one crystal at one temperature.

    Configurations are displacements from the sites with their mean fixed at zero; the target's
    reduced potential is beta (U - U(lattice)). The constants follow the Frenkel-Ladd / Polson
    convention (Polson et al., J. Chem. Phys. 112, 5339, 2000) with fixed labelling:
    beta F = beta U(lattice) - ln[sqrt(N) (V / Lambda^3) Z_u / Lambda^(3 (N - 1))].

    Args:
        name: Name to report.
        crystal: The perfect crystal.
        potential: The potential energy.
        units: Unit style of every number here.
        temperature: In the unit style's unit.
        thermal_wavelength: Lambda [length].
        nearest_image_only: Evaluate every pair once, at its nearest image (the papers' small boxes).
        plan: How to estimate, if not by default.
        published: A value to compare with.
        config: Everything resolved, for provenance.

    Raises:
        InputError: If the state is impossible, or the cutoff exceeds half the box without
            `nearest_image_only`, or the energy of the lattice is not finite.
    """
    if not temperature > 0:
        raise InputError(f"temperature: must be positive, got {temperature:g} {units.temperature}")
    if not thermal_wavelength > 0:
        raise InputError(f"thermal_wavelength: must be positive, got {thermal_wavelength:g} {units.length}")
    if crystal.n_atoms < 2:
        raise InputError("crystal.repeats: a crystal needs at least 2 atoms; repeat the cell")
    half = face_distances(crystal.cell).min() / 2
    if nearest_image_only:
        table = nearest_image_table(crystal)
    elif potential.cutoff > half:
        raise InputError(
            f"potential.cutoff: the cutoff {potential.cutoff:g} {units.length} exceeds half the box ({half:.6g}); "
            "repeat the cell more often, or set potential.nearest_image_only: true to see each pair once"
        )
    else:
        # Wide enough for every displacement that still counts as this crystal: see target_ensemble.
        table = neighbour_table(crystal, potential.cutoff + nearest_neighbour_distance(crystal))
    beta = 1.0 / (units.boltzmann * temperature)
    at_rest = atomic_energies_at_rest(potential, table)
    energy_of_lattice = float(at_rest.sum())
    if not math.isfinite(energy_of_lattice):
        raise InputError("potential: the energy of the perfect lattice is not a finite number; check density and units")
    n = crystal.n_atoms
    constants = {
        "lattice energy": beta * energy_of_lattice,
        "centre of mass": -0.5 * math.log(n) - math.log(crystal.volume / thermal_wavelength**3),
        "thermal wavelength": 3 * (n - 1) * math.log(thermal_wavelength),
    }
    return System(
        name=name,
        target=target_ensemble(potential, table, reach=0.5 * nearest_neighbour_distance(crystal), at_rest=at_rest),
        state=ThermodynamicState(np.float64(beta), np.float64(0.0)),
        constants=constants,
        units=units,
        temperature=temperature,
        crystal=crystal,
        potential=potential,
        nearest_image_only=nearest_image_only,
        thermal_wavelength=thermal_wavelength,
        plan=plan or Plan(),
        published=published,
        config=config or {},
    )


def at_temperature(system: System, temperature: float) -> System:
    """The same crystal at another temperature; kernels that are compiled serve it too.

    Args:
        system: A crystal.
        temperature: In the unit style's unit.

    Raises:
        InputError: If the temperature is not positive.
    """
    if not temperature > 0:
        raise InputError(f"temperature: must be positive, got {temperature:g} {system.units.temperature}")
    if temperature == system.temperature:
        return system
    energy_of_lattice = system.constants["lattice energy"] * system.kt
    beta = 1.0 / (system.units.boltzmann * temperature)
    return replace(
        system,
        temperature=temperature,
        state=system.state._replace(beta=np.float64(beta)),
        constants={**system.constants, "lattice energy": beta * energy_of_lattice},
        published=None,
        config={**system.config, "temperature": temperature} if system.config else system.config,
    )


def target_ensemble(
    potential: Potential,
    table: NeighbourTable,
    dtype: str = "float64",
    reach: float | None = None,
    at_rest: np.ndarray | None = None,
) -> Ensemble:
    """exp(-beta (U - U(lattice))) of displacements.

    Args:
        potential: The potential energy.
        table: Neighbours that the kernel sees.
        dtype: Precision of the kernel.
        reach: If given, the ensemble ends where an atom is further than this from its site
            [length]. Half the nearest-neighbour distance bounds the labelled crystal: an atom that
            far has left its site. A table that holds all pairs up to the cutoff plus twice the
            reach misses no pair inside.
        at_rest: Energies of the atoms in the perfect lattice (n_atoms,) [energy], if they are known already.
    """
    energy = bind(potential, table, dtype, at_rest)

    def reduced_potential(u: Array, state: ThermodynamicState) -> Array:
        value = state.beta * energy(u)
        if reach is None:
            return value
        return jnp.where(jnp.max(jnp.sum(u * u, axis=1)) < reach**2, value, jnp.inf)

    return Ensemble(reduced_potential=reduced_potential)
