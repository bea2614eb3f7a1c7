"""A process with one ASE calculator: positions in, energies and forces out; see freeflow.potentials.host.

It is started as `python -m freeflow.ase_worker` and speaks pickles over its standard input and output, so that the
program that starts it needs no guarded main module. It ends when its input does, also when its parent was killed.
"""

from __future__ import annotations

import os
import pickle
import signal
from typing import Any, BinaryIO

import numpy as np

from freeflow.user_code import in_one_line, load_object

_STRAIN = 1e-4  # for differences of energies


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with os.fdopen(os.dup(0), "rb") as incoming, os.fdopen(os.dup(1), "wb") as outgoing:
        os.dup2(2, 1)  # what a calculator prints must not get between the answers
        try:
            calculate = _calculator(pickle.load(incoming))
        except Exception as error:
            _send(outgoing, ("failed", str(error) or in_one_line(error)))
            return
        _send(outgoing, ("ready", None))
        while True:
            try:
                positions, cells = pickle.load(incoming)
            except EOFError:
                return
            try:
                cells = [None] * len(positions) if cells is None else cells
                _send(outgoing, ("done", [calculate(x, cell) for x, cell in zip(positions, cells, strict=True)]))
            except Exception as error:
                _send(outgoing, ("failed", in_one_line(error)))


def _calculator(job: dict[str, Any]) -> Any:
    """A function of positions (n_atoms, 3) and a cell (3, 3) [angstrom], or None where the cell is fixed.

    It returns energy [eV], forces [eV/angstrom], and the virial (3, 3) [eV] if there is a cell, otherwise None.
    """
    from ase import Atoms

    factory = load_object(job["calculator"], job["folder"])
    try:
        calculator = factory(**job["arguments"])
    except Exception as error:
        raise RuntimeError(f"{job['calculator']} cannot be made: {in_one_line(error)}") from None
    if not hasattr(calculator, "get_property"):
        raise RuntimeError(f"{job['calculator']} makes a {type(calculator).__name__}, which is no ASE calculator")
    atoms = Atoms(job["species"], cell=job["cell"], pbc=True, positions=job["sites"])
    atoms.calc = calculator

    def energy_here() -> float:
        # Electronic smearing: forces belong to the free energy of the electrons, where a calculator knows it.
        energy = calculator.results.get("free_energy") if hasattr(calculator, "results") else None
        return float(atoms.get_potential_energy() if energy is None else energy)

    def calculate(positions: Any, cell: Any) -> tuple[float, Any, Any]:
        if cell is not None:
            atoms.set_cell(cell)
        atoms.set_positions(positions)
        forces = atoms.get_forces()
        return energy_here(), forces.copy(), None if cell is None else _virial(atoms)

    return calculate


def _virial(atoms: Any) -> np.ndarray:
    """Derivative of the energy with respect to strain (3, 3) [eV]; by differences if the calculator has no stress."""
    from ase.calculators.calculator import PropertyNotImplementedError

    try:
        return atoms.get_volume() * atoms.get_stress(voigt=False)
    except (NotImplementedError, PropertyNotImplementedError):
        pass
    virial, cell, positions = np.empty((3, 3)), atoms.cell.array.copy(), atoms.positions.copy()
    for a in range(3):
        for b in range(a + 1):
            energies = []
            for sign in (1, -1):
                strained = np.eye(3)
                strained[a, b] += sign * _STRAIN / 2
                strained[b, a] += sign * _STRAIN / 2
                atoms.set_cell(cell @ strained)
                atoms.set_positions(positions @ strained)
                energies.append(atoms.get_potential_energy())
            virial[a, b] = virial[b, a] = (energies[0] - energies[1]) / (2 * _STRAIN)
    atoms.set_cell(cell)
    atoms.set_positions(positions)
    return virial


def _send(outgoing: BinaryIO, message: Any) -> None:
    pickle.dump(message, outgoing, protocol=pickle.HIGHEST_PROTOCOL)
    outgoing.flush()


if __name__ == "__main__":
    main()
