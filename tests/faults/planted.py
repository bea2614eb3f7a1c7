"""Plant one fault after another in a copy of the numerical core, and see whether the fast tests catch it.

    python tests/faults/planted.py            # all of them
    python tests/faults/planted.py log_det    # those whose name has this word

Each fault is one replacement of text. The tests that should notice are run until their first failure; a fault that
none of them notices, or whose text is no longer there, makes the exit status 1. Nothing but the copy is changed.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """A piece of the package, what it is to be instead, and where that should be noticed."""

    name: str
    file: str
    text: str
    instead: str
    tests: str


FAULTS = [
    Fault("log_det of a chain is that of its first map", "bijectors/core.py",
          "functools.reduce(jnp.add, log_dets)", "log_dets[0]", "test_bijectors.py -k chain"),
    Fault("log_det of an inverse has the wrong sign", "bijectors/core.py",
          "return (y - b) / a, -log_det", "return (y - b) / a, log_det", "test_bijectors.py -k scaled"),
    Fault("log_det of an inverse lacks a term", "bijectors/core.py",
          "log_cosh(inner) - log_cosh(outer) - t", "log_cosh(inner) - log_cosh(outer)", "test_bijectors.py -k sinh"),
    Fault("log_det of the reference is dropped", "references.py",
          "math.log(2 * math.pi) + parameters.log_det", "math.log(2 * math.pi)", "test_references.py"),
    Fault("error bar of FEP is halved", "estimators/two_state.py",
          "std_error = np.sqrt(", "std_error = 0.5 * np.sqrt(", "test_estimators.py"),
    Fault("error bar of BAR forgets correlation", "estimators/two_state.py",
          "variance += g * np.sum", "variance += np.sum", "test_estimators.py"),
    Fault("BAR mixes up its sides", "estimators/two_state.py",
          "c - log_means[0] + log_means[1]", "c + log_means[0] - log_means[1]", "test_estimators.py"),
    Fault("correlation counts once, not twice", "estimators/timeseries.py",
          "1 + 2 * np.sum(", "1 + np.sum(", "test_timeseries.py"),
    Fault("N term of the centre of mass has the wrong sign", "crystals.py",
          "-0.5 * math.log(n) - math.log(crystal.volume", "0.5 * math.log(n) - math.log(crystal.volume",
          "test_crystals.py test_references.py"),
    Fault("reverse work of the bridge has the wrong sign", "bridge.py",
          "along(segment, k + 1) - lam)", "lam - along(segment, k + 1))", "test_bridge.py -k crooks"),
    Fault("a rejected step keeps its velocity", "bridge.py",
          "choose(moved, -velocity)", "choose(moved, velocity)", "test_bridge.py -k invariant"),
    Fault("a step is accepted whatever the energy", "bridge.py",
          "accept = -rise >", "accept = 0 * rise >", "test_bridge.py -k invariant"),
    Fault("the neighbour table is that of the lattice at rest", "potentials/binding.py",
          "crystal, potential.cutoff + reach", "crystal, potential.cutoff", "test_potentials.py -k within_the_cutoff"),
    Fault("a pair has one sign at both of its ends", "potentials/walks.py",
          "[distinct, -distinct, nowhere]", "[distinct, distinct, nowhere]", "test_potentials.py"),
    Fault("a moment of bonds is no longer the trace", "potentials/moments.py",
          "m0 = xx + yy + zz", "m0 = xx + yy", "test_potentials.py"),
    Fault("forces stand in the order of the walk", "potentials/walks.py",
          "rows[self._row_of]", "rows[self._table.order]", "test_potentials.py -k any_order"),
    Fault("a tile forgets what its sums begin with", "potentials/walks.py",
          "begin or (zeros,)", "(zeros,)", "test_potentials.py"),
    Fault("energies at rest are those of other tiles", "potentials/walks.py",
          "_get(by_tiles, tile)[:, None]", "_get(by_tiles, 0 * tile)[:, None]", "test_potentials.py"),
    Fault("random numbers are rotated by one bit less", "random_numbers.py",
          "np.uint32(32 - r)", "np.uint32(31 - r)", "test_random_numbers.py"),
    Fault("pieces of random numbers begin at the first", "random_numbers.py",
          "some(key, first, count)", "some(key, np.uint32(0), count)", "test_random_numbers.py"),
    Fault("the slots of the second turn are those of the first", "potentials/walks.py",
          "lambda values, turn=turn: values[:, :, turn]", "lambda values, turn=turn: values[:, :, 0]",
          "test_potentials.py -k ways"),
    Fault("three-body forces forget those of pairs", "potentials/core.py",
          "energy, by, sums[9:]", "energy, by, tuple(0 * part for part in sums[9:])",
          "test_potentials.py"),
    Fault("the measure of the volume lacks a power", "isobaric.py",
          "(n_atoms + 1) * log_volume_change", "n_atoms * log_volume_change", "test_isobaric.py"),
    Fault("the constant of the cell lacks a factor", "isobaric.py",
          "math.sqrt(3.0) * volume", "volume", "test_isobaric.py -k volume"),
    Fault("a flipped bit in a checkpoint passes", "checkpoints.py",
          'if metadata["sha256"] != ', 'if "" == ', "test_checkpoints.py -k wrong_byte"),
]  # fmt: skip


def caught(fault: Fault, folder: Path) -> bool | None:
    """Whether the tests fail with the fault; None if its text is not there once."""
    path = folder / "freeflow" / fault.file
    sound = path.read_text(encoding="utf-8")
    if sound.count(fault.text) != 1:
        return None
    path.write_text(sound.replace(fault.text, fault.instead), encoding="utf-8")
    try:
        tests = [f"tests/{word}" if word.endswith(".py") else word for word in fault.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        status = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    finally:
        path.write_text(sound, encoding="utf-8")
    return status == 1


def main(words: list[str]) -> int:
    """Plant the faults whose names have one of the words; all of them by default."""
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="freeflow-planted-") as place:
        folder = Path(place)
        for name in ("freeflow", "tests", "systems"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "CITATION.cff", "README.md"):
            shutil.copy(ROOT / name, folder)
        for fault in chosen:
            begin = time.monotonic()
            found = caught(fault, folder)
            missed += found is not True
            outcome = {True: "caught", False: "MISSED", None: "NOT PLANTED"}[found]
            print(f"{outcome:<12} {fault.name} ({fault.tests}, {time.monotonic() - begin:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
