"""From files to systems: read once, checked once.

Importing this module does not start JAX.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from freeflow.compiler import require_devices
from freeflow.config.estimates import EstimateSection
from freeflow.config.problems import validate
from freeflow.config.schema import SystemSection
from freeflow.config.solutions import DifferenceSection, SolutionFileSection
from freeflow.config.words import KeyPath, nearest, show, show_path
from freeflow.config.yaml_lines import Dumper, parse
from freeflow.errors import InputError

if TYPE_CHECKING:
    from freeflow.solutions import Solution
    from freeflow.types import Crystal, DifferencePlan, Plan, StateSeries, System

MAX_FILE_BYTES = 1_000_000


def load(source: str | Path | Mapping[str, Any]) -> System | Solution | StateSeries:
    """Read and check a system, and make the problem it describes.

    Args:
        source: Path of a system.yaml, the name of a system that ships with freeflow, or the same
            content as a mapping.

    Returns:
        A `System` if it describes a crystal, a `StateSeries` if in several states, a `Solution` if it has
        a section `solution`.

    Raises:
        InputError: If anything is wrong with it; one line that says where.
    """
    label, folder, section = read(source)
    require_devices()
    try:
        return _solution(section, folder) if isinstance(section, SolutionFileSection) else _crystals(section, folder)
    except InputError as error:
        raise type(error)(f"{label}: {error}") from error


def load_crystal(source: str | Path | Mapping[str, Any]) -> System:
    """The same where only a crystal will do.

    Raises:
        InputError: If it is a solution or a series, or anything is wrong with it.
    """
    return crystal_only(load(source))


def crystal_only(problem: System | Solution | StateSeries) -> System:
    """The problem itself, if it is a crystal at one temperature.

    Raises:
        InputError: If it is a solution or a series.
    """
    from freeflow.types import StateSeries, System

    if isinstance(problem, StateSeries):
        what = "temperatures" if len(problem.pressures) < 2 else "states"
        raise InputError(
            f"{problem.name}: {problem.n_states} {what}; this works at one only "
            "(estimate and compare-phases take series)"
        )

    if not isinstance(problem, System):
        raise InputError(f"{problem.name}: a solution; this works for crystals only (freeflow estimate takes both)")
    return problem


def series_of(system: System, temperatures: Sequence[float], pressures: Sequence[float] = ()) -> StateSeries:
    """The crystal at these temperatures and, where its cell moves, pressures, both in ascending order.

    Args:
        system: A crystal; where its cell moves, its own pressure counts if none is given.
        temperatures: In the unit style's unit.
        pressures: In the unit style's unit.
    """
    from freeflow.crystals import at_state
    from freeflow.types import StateSeries

    own = () if system.cell_motion is None else (system.pressure,)
    t, p = tuple(sorted(set(temperatures))), tuple(sorted(set(pressures))) or own
    return StateSeries(at_state(system, t[0], p[0] if p else None), t, p)


def _crystals(section: SystemSection, folder: Path) -> System | StateSeries:
    many = {key: getattr(section, key) for key in ("temperature", "pressure")}
    if not any(isinstance(value, tuple) for value in many.values()):
        return _system(section, folder)
    several = {
        key: value if isinstance(value, tuple) else () if value is None else (value,) for key, value in many.items()
    }
    one = section.model_copy(update={key: min(values) for key, values in several.items() if values})
    return series_of(_system(one, folder), several["temperature"], several["pressure"])


def _system(section: SystemSection, folder: Path) -> System:
    from freeflow.crystals import crystal_system

    assert not isinstance(section.temperature, tuple) and not isinstance(section.pressure, tuple)
    crystal, config = _crystal(section, folder), with_absolute_paths(section.resolved(), folder)
    wavelength, config = _wavelength(section, crystal, config)
    return crystal_system(
        name=section.name,
        crystal=crystal,
        potential=section.potential.build(folder, section.units),
        units=section.unit_style,
        temperature=section.temperature,
        thermal_wavelength=wavelength,
        nearest_image_only=section.potential.nearest_image_only,
        plan=section.estimate.plan(folder),
        published=section.published and section.published.record(),
        config=config,
        pressure=(section.pressure or 0.0) * section.unit_style.pressure_unit,
        cell_motion=section.cell_motion,
    )


def _wavelength(
    section: SystemSection, crystal: Crystal, config: dict[str, Any]
) -> tuple[float | dict[str, float], dict[str, Any]]:
    """The thermal wavelength, and the resolved file with the masses that it came from."""
    from freeflow.crystals import masses_of, require_all_species, wavelengths_from_masses

    assert not isinstance(section.temperature, tuple)
    given = section.resolved_wavelength
    if given is not None:
        return given, config
    masses = dict(section.masses) if section.masses else masses_of(crystal)
    require_all_species("masses", masses, crystal)
    order = list(type(section).model_fields)
    filled = {**config, "masses": masses}
    wavelengths = wavelengths_from_masses(masses, section.unit_style, section.temperature)
    return wavelengths, {key: filled[key] for key in order if key in filled}


def _solution(section: SolutionFileSection, folder: Path) -> Solution:
    from freeflow.solutions import PublishedDifference, solution

    what, values = section.solution, with_absolute_paths(section.resolved(), folder)
    pair = what.solvent.potential
    return solution(
        name=section.name,
        n_solvent=what.solvent.count,
        box_length=what.box_length,
        units=section.unit_style,
        temperature=section.temperature,
        solute=what.solute.kind,
        sigma=what.solute.sigma,
        solute_epsilon=what.solute.epsilon,
        epsilon=pair.epsilon,
        diameter=pair.sigma,
        cutoff=pair.cutoff,
        shift=pair.shift,
        plan=section.estimate.plan(folder),
        published=section.published and PublishedDifference(**section.published.model_dump()),
        config=values,
    )


def read(source: str | Path | Mapping[str, Any]) -> tuple[str, Path, SystemSection | SolutionFileSection]:
    """Read and check a system file without making anything of it.

    Returns:
        What to call the source in messages, the folder that relative paths start at, the content.

    Raises:
        InputError: If it cannot be read, or anything is wrong with it; one line that says where.
    """
    if isinstance(source, Mapping):
        return "system", Path(), _checked(source, "system", {})
    if not isinstance(source, str | Path):
        raise InputError(f"a system is a path, a name or a mapping, not {show(source)}")
    path = _find(source)
    label = show_path(path)
    data, lines = parse(_read_text(path, label), label)
    return label, path.parent, _checked(data, label, lines)


def _checked(data: Mapping[str, Any], label: str, lines: Mapping[KeyPath, int]) -> SystemSection | SolutionFileSection:
    return validate(SolutionFileSection if "solution" in data else SystemSection, data, label, lines)


def revise(plan: Plan, **changes: Any) -> Plan:
    """The plan with some of its values replaced, checked like the file's `estimate` section.

    Raises:
        InputError: If there is no such value or it is impossible; the message starts with its name.
    """
    from freeflow.types import FlowPlan, TrajectoryPlan

    values = {**vars(plan), **changes}
    bridge, flow, trajectory = (values.pop(name) for name in ("bridge", "flow", "trajectory"))
    values["bridge"] = None if bridge is None else {"stages": bridge}
    values["flow"] = flow.values() if isinstance(flow, FlowPlan) else flow
    values["trajectory"] = dict(vars(trajectory)) if isinstance(trajectory, TrajectoryPlan) else trajectory
    if changes.get("trajectory") is not None and "estimator" not in changes:
        values["estimator"] = "bar"
    return validate(EstimateSection, values, "", {}, ("estimate",)).plan()


def revise_difference(plan: DifferencePlan, **changes: Any) -> DifferencePlan:
    """The same for the plan of a difference of two states."""
    return validate(DifferenceSection, {**plan.values(), **changes}, "", {}, ("estimate",)).plan()


def dump(values: Mapping[str, Any]) -> str:
    """The text of a system.yaml with these values; reading it gives them back."""
    return yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


class ShippedSystem(NamedTuple):
    """One line of the list of systems that come with freeflow."""

    name: str
    description: str
    beta_f_per_atom: float | None
    std_error: float | None
    source: str
    delta_f: float | None = None  # of solutions, with the same error and source


def shipped() -> list[ShippedSystem]:
    """The systems that come with freeflow, by name; the description is the file's first comment."""
    systems = []
    for name, path in _shipped_files().items():
        text = path.read_text(encoding="utf-8")
        comment = text.partition("\n")[0].lstrip("# ") if text.startswith("#") else ""
        published = read(path)[2].published
        values = {} if published is None else published.model_dump()
        known = {"beta_f_per_atom": None, "std_error": None, "source": "", **values}
        systems.append(ShippedSystem(name, comment, **known))
    return systems


def _crystal(section: SystemSection, folder: Path) -> Crystal:
    from freeflow.crystals import lattice_crystal, structure_crystal

    if section.structure is not None:
        return structure_crystal(folder / section.structure.file, section.structure.repeats)
    assert section.crystal is not None
    crystal = section.crystal
    return lattice_crystal(
        crystal.lattice,
        crystal.repeats,
        number_density=crystal.number_density,
        lattice_constant=crystal.lattice_constant,
        species=crystal.species,
    )


def with_absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A resolved file whose paths hold wherever it is read again."""

    def fix(section: Any, *keys: str) -> None:
        for key in keys:
            if section and section.get(key) is not None:
                section[key] = str((folder / section[key]).absolute())

    fix(values.get("potential"), "folder")
    fix(values.get("structure"), "file")
    estimate = values["estimate"]
    if (estimate.get("flow") or {}).get("checkpoint", "shipped") != "shipped":
        fix(estimate["flow"], "checkpoint")
    fix(estimate.get("trajectory"), "file", "topology")
    files = values.get("solution", {}).get("trajectories", {})
    for state in files:
        files[state] = [str((folder / file).absolute()) for file in files[state]]
    return values


def _shipped_files() -> dict[str, Path]:
    package = Path(__file__).parents[1]
    inside = package / "systems"  # in a wheel; beside the package in a source checkout
    folder = inside if inside.is_dir() else package.parent / "systems"
    by_number = sorted(
        folder.glob("*.yaml"), key=lambda path: (re.sub(r"\d+", "", path.stem), len(path.stem), path.stem)
    )
    return {path.stem: path for path in by_number}


def _find(source: str | Path) -> Path:
    names = _shipped_files()
    text = str(source)
    if isinstance(source, str) and source in names:
        return names[source]
    path = Path(source)
    try:
        exists = path.exists()
    except (OSError, ValueError):
        exists = False
    if exists:
        return path
    if isinstance(source, Path) or "/" in text or path.suffix in {".yaml", ".yml"}:
        near = nearest(path.stem, list(names))
        hint = f"; a system called {near} ships with freeflow" if near else ""
        raise InputError(f"{show_path(path)}: no such file{hint}")
    near = nearest(text, list(names))
    hint = f"did you mean {near}?" if near else "'freeflow systems' lists what ships"
    raise InputError(f"no file and no shipped system called {show(text)}; {hint}")


def _read_text(path: Path, label: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except IsADirectoryError:
        raise InputError(f"{label}: is a directory; give the system.yaml in it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{label}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{label}: larger than {MAX_FILE_BYTES} bytes; this is no system.yaml")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{label}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x})") from None
