"""Checkpoint files: a flow's parameters, what they belong to, and how they came about.

One file in the safetensors format: named arrays, and a description in JSON. It opens on any device, is
written whole or not at all, and is refused with one clear line where it does not fit. Reading it runs
no code from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from freeflow import flows
from freeflow.crystals import at_temperature
from freeflow.documents import write_atomically
from freeflow.errors import InputError
from freeflow.flows.core import Flow
from freeflow.geometry import face_distances
from freeflow.potentials import External, Potential, SpeciesPairs
from freeflow.references import Gaussian
from freeflow.types import Crystal, Params, System, double_precision

FORMAT = "freeflow flow"
VERSION = 1
FILE_NAME = "checkpoint.safetensors"
SHIPPED = "shipped"
_PARAMETERS, _STATE, _REFERENCE = "parameters", "state", "reference"  # groups of arrays
RANGES = {"temperature": "temperatures", "number_density": "number_densities"}  # options of conditional flows
_COMPLEX = "~complex"  # the format has no complex double: pairs of real numbers, on a last axis of 2


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `arrays` are named group/leaf, see `flatten`."""

    architecture: str
    options: Mapping[str, Any]  # plain values that rebuild the flow
    transferable: bool  # to other numbers of atoms
    system: Mapping[str, Any]  # fingerprint
    arrays: Mapping[str, np.ndarray]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)  # settings, metrics, seconds; empty if not resumable


class _Misfit(InputError):
    """Parameters of another structure or shape than the flow's."""


# ------------------------------------------------------------------------------ arrays and their names


def flatten(group: str, tree: Any) -> dict[str, np.ndarray]:
    """Leaves of a pytree as NumPy arrays, named by their group and their way through the tree.

    Raises:
        ValueError: If two leaves share a name.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {_name(group, path): np.asarray(leaf, order="C") for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError(f"leaves of {group} share a name")
    return named


def restore(arrays: Mapping[str, np.ndarray], group: str, like: Any) -> Any:
    """The pytree that `flatten` took apart; `like` has its structure, shapes and dtypes.

    Raises:
        InputError: If a leaf is missing, left over, of another shape or dtype, or not finite.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [_name(group, path) for path, _ in leaves]
    extra = sorted({name for name in arrays if name.startswith(f"{group}/")} - set(names))
    missing = [name for name in names if name not in arrays]
    if missing or extra:
        what = f"{missing[0]} is missing" if missing else f"{extra[0]} has no place in this flow"
        raise _Misfit(f"its parameters do not fit the flow: {what}")
    for name, (_, wanted) in zip(names, leaves, strict=True):
        found = arrays[name]
        if (found.shape, found.dtype) != (tuple(wanted.shape), np.dtype(wanted.dtype)):
            raise _Misfit(
                f"its parameters do not fit the flow: {name} is {found.dtype} {list(found.shape)}, "
                f"not {np.dtype(wanted.dtype)} {list(wanted.shape)}"
            )
        if np.issubdtype(found.dtype, np.inexact) and not np.isfinite(found).all():
            raise InputError(f"{name} holds numbers that are not finite")
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in names])


def _name(group: str, path: Any) -> str:
    return "/".join(part for part in (group, jax.tree_util.keystr(path, simple=True, separator="/")) if part)


# ------------------------------------------------------------------------------ files


def save(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a file of that name is replaced by a whole one or stays as it was.

    Raises:
        FreeflowError: If it cannot be written.
    """
    arrays = {}
    for name, array in checkpoint.arrays.items():
        if np.iscomplexobj(array):
            name, array = name + _COMPLEX, np.stack([np.real(array), np.imag(array)], axis=-1)
        arrays[name] = np.asarray(array, order="C")
    described = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint) if f.name != "arrays"}
    content = json.dumps(described, default=_plain)
    metadata = {"format": FORMAT, "version": str(VERSION), "content": content, "sha256": _digest(content, arrays)}
    write_atomically(path, safetensors.numpy.save(arrays, metadata))


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint from a file, or from the folder of a training run.

    Raises:
        InputError: If it is no checkpoint, damaged, or of a newer format.
    """
    place = Path(path)
    if place.is_dir():
        place = place / FILE_NAME
    try:
        with safetensors.safe_open(place, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path}: not a checkpoint of freeflow")
            version = int(metadata.get("version", 0))
            if version > VERSION:
                raise InputError(
                    f"{path}: made by a newer freeflow (format {version}, this one reads {VERSION}); update freeflow"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        content = metadata["content"]
        if metadata["sha256"] != _digest(content, arrays):
            raise InputError(f"{path}: the checkpoint is damaged: its content does not match its checksum")
        described = json.loads(content)
        checkpoint = Checkpoint(arrays={}, **described)
    except FileNotFoundError:
        raise InputError(f"{path}: no checkpoint there") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"{path}: not a checkpoint, or cut short or damaged ({what[:120]})") from None
    for name in [name for name in arrays if name.endswith(_COMPLEX)]:
        real = arrays.pop(name)
        arrays[name.removesuffix(_COMPLEX)] = real[..., 0] + 1j * real[..., 1]
    return dataclasses.replace(checkpoint, arrays=arrays)


def parameters_only(checkpoint: Checkpoint) -> Checkpoint:
    """The small form, for use and not for resuming: the averaged parameters alone.

    The reference is left out too: it is fitted anew wherever the flow is used.
    """
    arrays = {
        f"{_PARAMETERS}/{name}": array
        for prefix in (f"{_PARAMETERS}/", f"{_STATE}/average/")
        for name, array in _under(prefix, checkpoint.arrays).items()
    }
    return dataclasses.replace(checkpoint, arrays=arrays, training={})


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _digest(content: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.asarray(arrays[name], order="C").tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no word for."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


# ------------------------------------------------------------------------------ what system a flow is for


def fingerprint(system: System) -> dict[str, Any]:
    """What a flow depends on of its system, as plain values.

    How pairs are counted in a small box (`nearest_image_only`) is left out: it goes with the number
    of atoms, and an estimate is exact with any flow.
    """
    crystal, potential = system.crystal, system.potential
    declared = dict(system.config.get("potential", {}))
    named = {
        key: value
        for key, value in declared.items()
        if key not in {"preset", "nearest_image_only", "folder", "workers"}
    }
    least = math.gcd(*Counter(crystal.species).values())
    return {
        "name": system.name,
        "units": system.units.name,
        "boltzmann": system.units.boltzmann,
        "potential": {**_numbers(potential), **named},
        "potential_values": _potential_values(system),
        **_state(system),
        "species": {symbol: n // least for symbol, n in sorted(Counter(crystal.species).items())},
        "lattice": crystal.description,
        "surroundings": surroundings(crystal),
        "n_atoms": system.n_atoms,
        "cell": crystal.cell.tolist(),
    }


def _state(system: System) -> dict[str, float]:
    return {"temperature": system.temperature, "number_density": system.n_atoms / system.crystal.volume}


def _numbers(potential: Any) -> dict[str, Any]:
    """What any potential is known by."""
    if isinstance(potential, External):
        return {"name": potential.name, **potential.values}
    found = {"name": potential.name, "cutoff": potential.cutoff}
    return {**found, "cosine": potential.cosine} if isinstance(potential, Potential) else found


def _potential_values(system: System) -> list[float]:
    """Numbers that tell potentials without named parameters apart."""
    with double_precision():
        if isinstance(system.potential, SpeciesPairs):
            terms = system.potential.terms
            return [value for pair in sorted(terms) for value in _radial_values(terms[pair], system.kt)]
        if isinstance(system.potential, External):
            return [system.constants["lattice energy"] / system.n_atoms]
        return _radial_values(system.potential, system.kt)


def _radial_values(potential: Potential, kt: float) -> list[float]:
    """Energies [kT] of pairs and strengths of triplets at some distances."""
    r2 = jnp.square(potential.cutoff * jnp.linspace(0.3, 0.95, 14))
    pairs = np.asarray(potential.pair(r2)) / kt
    weights = np.zeros(0) if potential.weight is None else np.asarray(potential.weight(r2))
    return [float(value) for value in np.nan_to_num(np.concatenate([pairs, weights]))]


def surroundings(crystal: Crystal) -> list[float]:
    """Mean number of neighbours in soft shells around an atom, whatever the size of the box.

    Shells are Gaussian windows of width 0.1 at 0.7, 0.8, ..., 2.2 mean spacings (V/N)^(1/3): they tell
    fcc from hcp and cubic from hexagonal ice, and do not jump with the last digit of a distance.
    """
    spacing = (crystal.volume / crystal.n_atoms) ** (1 / 3)
    centres, width = np.arange(0.7, 2.25, 0.1), 0.1
    reach = (centres[-1] + 5 * width) * spacing
    images = np.ceil(reach / face_distances(crystal.cell)).astype(int) + 1
    steps = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in images), indexing="ij"), axis=-1).reshape(-1, 3)
    total = np.zeros(len(centres))
    for atom in crystal.site_of[0]:
        apart = crystal.sites - crystal.sites[atom]
        for shift in steps @ crystal.cell:
            r = np.linalg.norm(apart + shift, axis=1) / spacing
            near = r[(r > 1e-6) & (r < reach / spacing)]
            total += np.exp(-0.5 * ((near[:, None] - centres) / width) ** 2).sum(axis=0)
    return [float(value) for value in total / len(crystal.site_of[0])]


def difference(made_for: Mapping[str, Any], wanted: Mapping[str, Any], any_size: bool) -> str | None:
    """The first key in which two fingerprints differ, in words; None if a flow for one suits the other.

    Names do not count, nor the names of lattices: structures do. Without `any_size`, the number of
    atoms and the cell must be the same too.
    """
    for key in ("units", "boltzmann", "temperature", "number_density", "species"):
        if not _same(made_for[key], wanted[key]):
            return f"{key}: the flow is for {_show(made_for[key])}, this system has {_show(wanted[key])}"
    mine, other = made_for["potential"], wanted["potential"]
    if mine["name"] != other["name"]:
        return f"potential: the flow is for {mine['name']}, this system has {other['name']}"
    for key in sorted(mine.keys() & other.keys()):
        if not _same(mine[key], other[key]):
            return f"potential.{key}: the flow is for {_show(mine[key])}, this system has {_show(other[key])}"
    if not _same(made_for["potential_values"], wanted["potential_values"]):
        return "potential: its energies are not those that the flow is for"
    if not _same(made_for["surroundings"], wanted["surroundings"], 1e-4):
        names = f"the flow is for {made_for['lattice']!r}, this system is {wanted['lattice']!r}"
        return f"lattice: {names}" if made_for["lattice"] != wanted["lattice"] else "lattice: another structure"
    if not any_size:
        if made_for["n_atoms"] != wanted["n_atoms"]:
            return (
                f"n_atoms: the flow is for {made_for['n_atoms']}, this system has {wanted['n_atoms']}; "
                "this architecture does not carry over to other sizes"
            )
        if not _same(made_for["cell"], wanted["cell"], 1e-6):
            return "cell: the flow is for a box of another shape"
    return None


def apart(checkpoint: Checkpoint, system: System, any_size: bool, own: Mapping[str, Any] | None = None) -> str | None:
    """What keeps a flow from a system, in words; None if it suits. A conditional flow suits a range of states.

    Args:
        checkpoint: What was read.
        system: What the flow is to be used for.
        any_size: Whether the number of atoms may differ.
        own: The system's fingerprint, if it is known already.
    """
    ranges = {key: checkpoint.options.get(name) for key, name in RANGES.items()}
    wanted = dict(fingerprint(system) if own is None else own)
    for key, ends in ranges.items():
        if ends is not None and not ends[0] * (1 - 1e-8) <= wanted[key] <= ends[1] * (1 + 1e-8):
            return f"{key}: the flow is for {ends[0]:.8g} to {ends[1]:.8g}, this system has {_show(wanted[key])}"
    if ranges["temperature"] is not None:  # energies are compared in kT
        wanted = fingerprint(at_temperature(system, checkpoint.system["temperature"]))
    if ranges["number_density"] is not None:
        wanted["number_density"] = checkpoint.system["number_density"]
    return difference(checkpoint.system, wanted, any_size)


def _same(a: Any, b: Any, tolerance: float = 1e-8) -> bool:
    if isinstance(a, bool | str | Mapping) or isinstance(b, bool | str | Mapping):
        return a == b
    first, second = np.asarray(a, float), np.asarray(b, float)
    return first.shape == second.shape and np.allclose(first, second, rtol=tolerance, atol=tolerance)


def _show(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def require_same_system(checkpoint: Checkpoint, system: System, any_size: bool | None = None) -> None:
    """Refuse a flow that was made for something else.

    Args:
        checkpoint: The flow.
        system: What it is to be used for.
        any_size: Whether other numbers of atoms will do; by default where the architecture allows it.

    Raises:
        InputError: Naming the first key that differs.
    """
    fits_any = checkpoint.transferable if any_size is None else any_size
    what = apart(checkpoint, system, fits_any)
    if what is not None:
        raise InputError(f"another system ({checkpoint.system['name']}): {what}")


# ------------------------------------------------------------------------------ from files to flows


def shipped(system: System, folder: Path | None = None) -> Path:
    """The file that ships with freeflow for the family of a system.

    Raises:
        InputError: If none does.
    """
    folder = folder or Path(__file__).parent / "shipped_flows"
    made_for = []
    own = fingerprint(system)
    for path in sorted(folder.glob("*.safetensors")):
        checkpoint = read(path)
        if apart(checkpoint, system, checkpoint.transferable, own) is None:
            return path
        made_for.append(path.stem)
    ships = f"there are flows for {', '.join(made_for)}" if made_for else "no flow ships with this version"
    raise InputError(f"no shipped flow for {system.name}: {ships}; freeflow train makes one")


def build_flow(system: System, architecture: str, options: Mapping[str, Any], gaussian: Callable[[], Gaussian]) -> Flow:
    """The flow of a named architecture.

    Args:
        system: What it is for.
        architecture: residual or atomic_solids.
        options: Of the architecture, where not by default.
        gaussian: Fits the reference; called by architectures that start from one.

    Raises:
        InputError: If there is no such architecture, or an option is impossible.
    """
    if architecture == "residual":
        return flows.residual(system, gaussian(), **options)
    if architecture == "atomic_solids":
        return flows.atomic_solids(system, **options)
    raise InputError(f"flow.architecture: no architecture {architecture!r} in this version")


def load_flow(system: System, source: str, gaussian: Callable[[], Gaussian]) -> tuple[Flow, Params]:
    """A flow from a checkpoint, ready for use on a system.

    The reference is the one that the flow was trained with, where the file has it and the crystal
    has the same size and is in the same state; else `gaussian` fits one.

    Args:
        system: What the flow is to be used for.
        source: A file, the folder of a training run, or "shipped".
        gaussian: Fits a reference, if need be.

    Raises:
        InputError: If the file is not one, or does not fit.
    """
    path = shipped(system) if source == SHIPPED else source
    checkpoint = read(path)
    try:
        require_same_system(checkpoint, system)
        flow = rebuild(checkpoint, system, gaussian)
        return flow, parameters(checkpoint, flow, system)
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None


def rebuild(checkpoint: Checkpoint, system: System, gaussian: Callable[[], Gaussian]) -> Flow:
    """The flow that a checkpoint describes.

    Args:
        checkpoint: What was read.
        system: What the flow is to be used for.
        gaussian: Fits a reference, where the checkpoint has none for this size and state.

    Raises:
        InputError: If the architecture is unknown, or does not suit the system.
    """
    own = ("n_atoms", system.n_atoms), *((key, value) for key, value in _state(system).items())
    stored = reference(checkpoint) if all(_same(checkpoint.system[key], value) for key, value in own) else None
    try:
        return build_flow(
            system, checkpoint.architecture, checkpoint.options, gaussian if stored is None else lambda: stored
        )
    except TypeError as error:  # an option that this version does not know
        raise InputError(f"architecture {checkpoint.architecture}: {error}") from None


def reference(checkpoint: Checkpoint, group: str = _REFERENCE) -> Gaussian | None:
    """The Gaussian that the flow was trained with, or several, stacked, of another group; None if not in the file."""
    stored = _under(f"{group}/", checkpoint.arrays)
    if not stored:
        return None
    return Gaussian(stored["mean"], stored["root"], stored["inverse_root"], np.asarray(stored["log_det"])[()])


def parameters(checkpoint: Checkpoint, flow: Flow, system: System) -> Params:
    """The parameters to use a flow with, on the default device and in the precision they were trained in.

    Raises:
        InputError: If they do not fit the flow.
    """
    with double_precision():
        small = parameters_only(checkpoint).arrays
        one = next((array for name, array in small.items() if name.startswith(_PARAMETERS)), np.zeros(0, "float32"))
        state = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(one.dtype), system.state)

        def init(key: Any) -> Params:
            return flow.bijector.init(key, flow.reference.sample(key, state), state)

        like = jax.eval_shape(init, jax.random.key(0))
        try:
            return restore(small, _PARAMETERS, like)
        except _Misfit:
            if checkpoint.system["n_atoms"] == system.n_atoms:
                raise
            raise InputError(
                f"made for {checkpoint.system['n_atoms']} atoms; the repeats of these {system.n_atoms} give the sites "
                "other colours, and its parameters do not fit; take other repeats, or train a flow for this size"
            ) from None
