"""A process with one ASE calculator: positions in, energies and forces out; see freeflow.potentials.host.

It is started as `python -m freeflow.ase_worker` and speaks pickles over its standard input and output, so that the
program that starts it needs no guarded main module. It ends when its input does, also when its parent was killed.
"""

from __future__ import annotations

import os
import pickle
import signal
from typing import Any, BinaryIO

from freeflow.user_code import in_one_line, load_object


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
                positions = pickle.load(incoming)
            except EOFError:
                return
            try:
                _send(outgoing, ("done", [calculate(x) for x in positions]))
            except Exception as error:
                _send(outgoing, ("failed", in_one_line(error)))


def _calculator(job: dict[str, Any]) -> Any:
    """A function of positions (n_atoms, 3) [angstrom] that returns energy [eV] and forces [eV/angstrom]."""
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

    def calculate(positions: Any) -> tuple[float, Any]:
        atoms.set_positions(positions)
        forces = atoms.get_forces()
        # Electronic smearing: forces belong to the free energy of the electrons, where a calculator knows it.
        energy = calculator.results.get("free_energy") if hasattr(calculator, "results") else None
        return float(atoms.get_potential_energy() if energy is None else energy), forces.copy()

    return calculate


def _send(outgoing: BinaryIO, message: Any) -> None:
    pickle.dump(message, outgoing, protocol=pickle.HIGHEST_PROTOCOL)
    outgoing.flush()


if __name__ == "__main__":
    main()
