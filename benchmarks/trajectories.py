"""How fast trajectories are read, evaluated and compared.

    python benchmarks/trajectories.py [--frames 20000] [NAME ...]

Frames are made by `freeflow.sample`, repeated as often as needed, and written as DCD. Reading and aligning, energies,
g(r) and the whole pass are timed one after the other in one process; figures are frames per second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import freeflow as ff
from freeflow import trajectories
from freeflow.observables import radial_distribution


def rate(n_frames, job):
    """Frames per second of a job, the second time it is done."""
    job()
    begun = time.perf_counter()
    job()
    return n_frames / (time.perf_counter() - begun)


def measure(name, n_frames, folder):
    system = ff.load(name)
    few = ff.sample(system, min(n_frames, 1000), seed=1).displacements.astype(float)
    u = np.resize(few, (n_frames, *few.shape[1:]))
    path = folder / f"{name}.dcd"
    trajectories.write(path, system, u)
    shells, some = radial_distribution(system.crystal), few[:500]

    def read():
        guess = None
        for frames in trajectories.read(path, system):
            guess = trajectories.to_displacements(frames.positions, system.crystal, guess=guess).order[-1]

    rates = {
        "read and align": rate(n_frames, read),
        "energies": rate(len(few), lambda: trajectories.energies(system, few)),
        "g(r)": rate(len(some), lambda: shells.count(some)),
        "whole pass": rate(n_frames, lambda: trajectories.frame_series(path, system)),
    }
    print(f"{name:<18}" + "".join(f"{what} {value:>9.0f}   " for what, value in rates.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["mw_cubic_64", "lj_fcc_256", "mw_cubic_512"])
    parser.add_argument("--frames", type=int, default=5000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names:
            measure(name, options.frames, Path(folder))


if __name__ == "__main__":
    main()
