"""From plain values to a crystal System: lattices, structure files, constants of the convention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from freeflow.cells import CELL_MOTIONS, LARGEST_STRETCH, CellMotion, deformation
from freeflow.errors import InputError
from freeflow.geometry import (
    LATTICES,
    Translations,
    face_distances,
    is_orthorhombic,
    nearest_neighbour_distance,
    smith_form,
)
from freeflow.isobaric import cell_constant, isobaric_ensemble
from freeflow.potentials import (
    CrystalEnergy,
    External,
    Potential,
    RelativeEnergy,
    SpeciesPairs,
    on_crystal,
    require_sound,
    require_sound_strained,
)
from freeflow.symmetries import crystal_operations, primitive_cell
from freeflow.types import Crystal, Ensemble, Plan, Published, System, ThermodynamicState, double_precision
from freeflow.units import UnitStyle, thermal_wavelength_of

# Sites closer than this fraction of the mean spacing to a symmetric position are put onto it.
_SYMMETRY_TOLERANCE = 1e-4


def lattice_crystal(
    lattice: str,
    repeats: tuple[int, int, int],
    number_density: float | None = None,
    lattice_constant: float | None = None,
    species: Sequence[str] = ("X",),
) -> Crystal:
    """Repeats of the conventional cell of a named lattice.

    Args:
        lattice: A name in `freeflow.geometry.LATTICES`.
        repeats: How often the conventional cell is repeated along its three vectors.
        number_density: Atoms per volume [1/length**3]; this or
        lattice_constant: Edge a of the conventional cell [length].
        species: Chemical symbol of the atoms, or of each kind of them in lattices of several kinds.

    Raises:
        InputError: If the lattice is unknown, or its size is not given exactly once, or not positive, or its atoms
            are of another number of kinds.
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
    kinds = shape.kinds or (0,) * len(shape.basis)
    if len(species) != max(kinds) + 1:
        many = f"{max(kinds) + 1} kinds of atoms"
        raise InputError(f"crystal.species: {lattice} has {many}, but {len(species)} are named; give e.g. [Na, Cl]")
    return _repeated(cell, shape.basis @ cell, tuple(species[kind] for kind in kinds), repeats, shape.description)


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


def _geometric_mean(values: Sequence[float]) -> float:
    """Of numbers that are often all the same, and then exactly that number."""
    if len(set(values)) == 1:
        return values[0]
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


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
    potential: Potential | SpeciesPairs | External,
    units: UnitStyle,
    temperature: float,
    thermal_wavelength: float | Mapping[str, float],
    nearest_image_only: bool = False,
    plan: Plan | None = None,
    published: Published | None = None,
    config: Mapping[str, Any] | None = None,
    pressure: float = 0.0,
    cell_motion: str | None = None,
) -> System:
    """The free energy problem of one crystal at one temperature: Helmholtz's, or Gibbs's where the cell moves.

    Configurations are displacements from the sites with their mean fixed at zero; the target's
    reduced potential is beta (U - U(lattice)). The constants follow the Frenkel-Ladd / Polson
    convention (Polson et al., J. Chem. Phys. 112, 5339, 2000) with fixed labelling:
    beta F = beta U(lattice) - ln[sqrt(N) (V / Lambda^3) Z_u / Lambda^(3 (N - 1))]. With several species
    the constraint is still on the plain mean of the displacements, so that masses enter through the
    wavelengths alone, and Lambda is their geometric mean over the atoms (docs/potentials.md). At constant
    pressure the strain is part of the configuration, relative to the crystal's cell, and volumes count in
    units of Lambda^3 (docs/gibbs.md).

    Args:
        name: Name to report.
        crystal: The perfect crystal.
        potential: The potential energy.
        units: Unit style of every number here.
        temperature: In the unit style's unit.
        thermal_wavelength: Lambda [length], of all atoms or by species.
        nearest_image_only: Evaluate every pair once, at its nearest image (the papers' small boxes).
        plan: How to estimate, if not by default.
        published: A value to compare with.
        config: Everything resolved, for provenance.
        pressure: Of a cell that moves [energy/length**3].
        cell_motion: A name in `freeflow.cells.CELL_MOTIONS`; None for a fixed cell.

    Raises:
        InputError: If the state is impossible, or the cutoff exceeds half the box without
            `nearest_image_only`, or the energy of the lattice is not finite.
    """
    if not temperature > 0:
        raise InputError(f"temperature: must be positive, got {temperature:g} {units.temperature}")
    wavelengths = _by_species(thermal_wavelength, crystal, units)
    mean_wavelength = _geometric_mean([wavelengths[name] for name in crystal.species])
    if crystal.n_atoms < 2:
        raise InputError("crystal.repeats: a crystal needs at least 2 atoms; repeat the cell")
    half = face_distances(crystal.cell).min() / 2
    if nearest_image_only and not is_orthorhombic(crystal.cell):
        raise InputError("nearest_image_only works in orthorhombic cells only; use a larger box instead")
    if potential.cutoff is not None and potential.cutoff > half and not nearest_image_only:
        raise InputError(
            f"potential.cutoff: the cutoff {potential.cutoff:g} {units.length} exceeds half the box ({half:.6g}); "
            "repeat the cell more often, or set potential.nearest_image_only: true to see each pair once"
        )
    beta = 1.0 / (units.boltzmann * temperature)
    if isinstance(potential, External):
        require_sound(potential, crystal, 1.0 / beta)
    energy = on_crystal(potential, crystal, nearest_image_only)
    energy_of_lattice = energy.lattice_energy()
    if not math.isfinite(energy_of_lattice):
        raise InputError("potential: the energy of the perfect lattice is not a finite number; check density and units")
    spacing = nearest_neighbour_distance(crystal)
    n = crystal.n_atoms
    constants = {
        "lattice energy": beta * energy_of_lattice,
        "centre of mass": -0.5 * math.log(n) - math.log(crystal.volume / mean_wavelength**3),
        "thermal wavelength": 3 * (n - 1) * math.log(mean_wavelength),
    }
    if cell_motion is None:
        # The energy is good for every displacement that still counts as this crystal.
        target = crystal_ensemble(energy.relative(spacing, "float64"), reach=0.5 * spacing)
    else:
        motion = _motion(cell_motion, crystal, nearest_image_only)
        if isinstance(potential, External):
            require_sound_strained(potential, crystal, 1.0 / beta, motion.basis)
        # Every pair of the ensemble, which ends at half the spacing and at the largest stretch.
        deformed = energy.deformed(math.exp(LARGEST_STRETCH), spacing, "float64")
        target = isobaric_ensemble(deformed, n, crystal.volume, motion, reach=0.5 * spacing)
        constants["pressure"] = beta * pressure * crystal.volume
        constants["cell"] = cell_constant(crystal.volume, mean_wavelength)
    return System(
        name=name,
        target=target,
        state=ThermodynamicState(np.float64(beta), np.float64(pressure)),
        constants=constants,
        units=units,
        temperature=temperature,
        crystal=crystal,
        potential=potential,
        nearest_image_only=nearest_image_only,
        cell_motion=cell_motion,
        thermal_wavelength=mean_wavelength,
        wavelengths=wavelengths,
        energy=energy,
        plan=plan or Plan(),
        published=published,
        config=config or {},
    )


def at_temperature(system: System, temperature: float) -> System:
    """The same crystal at another temperature, with the same Lambda; kernels that are compiled serve it too.

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
    beta = 1.0 / (system.units.boltzmann * temperature)
    scaled = {
        name: beta * system.kt * system.constants[name]
        for name in ("lattice energy", "pressure")
        if name in system.constants
    }
    return replace(
        system,
        temperature=temperature,
        state=system.state._replace(beta=np.float64(beta)),
        constants={**system.constants, **scaled},
        published=None,
        config={**_with_wavelengths(system), "temperature": temperature} if system.config else system.config,
    )


def at_pressure(system: System, pressure: float) -> System:
    """The same crystal under another pressure, with the same reference cell.

    Args:
        system: A crystal whose cell moves.
        pressure: In the unit style's unit.
    """
    if pressure == system.pressure:
        return system
    p = pressure * system.units.pressure_unit
    return replace(
        system,
        state=system.state._replace(pressure=np.float64(p)),
        constants={**system.constants, "pressure": float(system.state.beta) * p * system.crystal.volume},
        published=None,
        config={**system.config, "pressure": pressure} if system.config else system.config,
    )


def at_state(system: System, temperature: float, pressure: float | None) -> System:
    """The same crystal at another temperature and, where its cell moves, another pressure; see `at_temperature`."""
    moved = at_temperature(system, temperature)
    return moved if pressure is None else at_pressure(moved, pressure)


def _with_wavelengths(system: System) -> dict[str, Any]:
    """The resolved file with thermal wavelengths in the place of masses, which would give others elsewhere."""
    if "masses" not in system.config:
        return dict(system.config)
    values = {key: value for key, value in system.config.items() if key != "masses"}
    return {**values, "thermal_wavelength": dict(system.wavelengths)}


def _motion(name: str, crystal: Crystal, nearest_image_only: bool) -> CellMotion:
    if name not in CELL_MOTIONS:
        raise InputError(f"cell_motion: no motion {name!r}; use one of {', '.join(CELL_MOTIONS)}")
    if nearest_image_only:
        raise InputError("cell_motion: nearest_image_only works in a fixed cell only; use a larger box instead")
    if name == "orthorhombic" and not is_orthorhombic(crystal.cell):
        raise InputError("cell_motion: orthorhombic needs lattice vectors along x, y and z; use isotropic or triclinic")
    return CELL_MOTIONS[name]


def strained_system(system: System, strain: Float[np.ndarray, "3 3"]) -> System:
    """The same problem with another reference cell: lattice vectors and sites are deformed by exp(strain).

    The strain must be one that the crystal's point operations leave alone.
    """
    with double_precision():
        f = np.asarray(deformation(jnp.asarray(strain)))
    crystal = replace(system.crystal, cell=system.crystal.cell @ f, sites=system.crystal.sites @ f)
    return crystal_system(
        name=system.name,
        crystal=crystal,
        potential=system.potential,
        units=system.units,
        temperature=system.temperature,
        thermal_wavelength=system.wavelengths or system.thermal_wavelength,
        nearest_image_only=system.nearest_image_only,
        plan=system.plan,
        published=system.published,
        config=system.config,
        pressure=float(system.state.pressure),
        cell_motion=system.cell_motion,
    )


def crystal_ensemble(energy: RelativeEnergy, reach: float | None = None) -> Ensemble:
    """The same of an energy of displacements, relative to the lattice's."""

    def reduced_potential(u: Array, state: ThermodynamicState) -> Array:
        value = state.beta * energy(u)
        if reach is None:
            return value
        return jnp.where(jnp.max(jnp.sum(u * u, axis=1)) < reach**2, value, jnp.inf)

    return Ensemble(reduced_potential=reduced_potential)


def energy_of(system: System) -> CrystalEnergy:
    """A system's potential on its crystal."""
    return system.energy or on_crystal(system.potential, system.crystal, system.nearest_image_only)


def _by_species(wavelength: float | Mapping[str, float], crystal: Crystal, units: UnitStyle) -> dict[str, float]:
    """Thermal wavelength of every species of the crystal [length]."""
    present = list(dict.fromkeys(crystal.species))
    given: dict[str, float] = (
        dict(wavelength) if isinstance(wavelength, Mapping) else dict.fromkeys(present, wavelength)
    )
    require_all_species("thermal_wavelength", given, crystal)
    for value in given.values():
        if not value > 0:
            raise InputError(f"thermal_wavelength: must be positive, got {value:g} {units.length}")
    return given


def require_all_species(key: str, given: Mapping[str, float], crystal: Crystal) -> None:
    """Whether a number per species is there for those of the crystal, and for no others.

    Raises:
        InputError: If one is missing or one too many.
    """
    present = list(dict.fromkeys(crystal.species))
    holds = f"the crystal holds {' and '.join(present)}"
    for name in present:
        if name not in given:
            raise InputError(f"{key}: none given for {name}; {holds}")
    for name in given:
        if name not in present:
            raise InputError(f"{key}: {name} is no species of this crystal; {holds}")


def masses_of(crystal: Crystal) -> dict[str, float]:
    """Standard atomic weight of every species [dalton], as ASE has them (IUPAC 2016).

    Raises:
        InputError: If a species is no element.
    """
    from ase.data import atomic_masses, atomic_numbers

    found = {}
    for name in dict.fromkeys(crystal.species):
        number = atomic_numbers.get(name, 0)
        if number == 0:
            raise InputError(f"thermal_wavelength: missing; atoms called {name} have no mass to find it from")
        found[name] = float(atomic_masses[number])
    return found


def wavelengths_from_masses(masses: Mapping[str, float], units: UnitStyle, temperature: float) -> dict[str, float]:
    """h / sqrt(2 pi m kT) of every species [length]; masses in dalton.

    Raises:
        InputError: In reduced units, which know no Planck constant.
    """
    return {name: thermal_wavelength_of(mass, units, temperature) for name, mass in masses.items()}
