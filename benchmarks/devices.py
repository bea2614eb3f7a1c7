"""The same estimate on one core and on all: sampling's wall time, and whether the work values are the same bit by bit.

Each runs in a process of its own that is kept to its cores (or, with `--gpus`, sees so many GPUs), one after the other.

    python benchmarks/devices.py --help
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_JOB = """
import json, os, sys
where, name, samples, stages = sys.argv[1:]
if where and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(core) for core in where.split(",")})
import freeflow as ff
found = ff.estimate(name, target_error=1e-9, max_samples=int(samples), bridge=int(stages))
print(json.dumps({"seconds": found.wall_seconds["sampling"], "work": [float(w).hex() for w in found.work.forward]}))
"""


def sampling(cores: list[int] | None, name: str, samples: int, stages: int, gpus: str | None = None) -> dict:
    """Seconds of sampling by the clock, and the work values in full, from a process on these cores or GPUs."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = dict(os.environ, PYTHONPATH=path)
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    where = "" if cores is None else ",".join(map(str, cores))
    command = [sys.executable, "-c", _JOB, where, name, str(samples), str(stages)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def strong_scaling(name: str, samples: int, stages: int, gpus: int = 0) -> list[tuple[int, float, bool]]:
    """For one, two, four, ... cores or GPUs: how many, seconds, and whether all work values are those of the first."""
    there = [] if gpus else sorted(os.sched_getaffinity(0))
    counts = _doubling(gpus or len(there))
    runs = [
        sampling(there[:n] or None, name, samples, stages, ",".join(map(str, range(n))) if gpus else None)
        for n in counts
    ]
    return [(n, run["seconds"], run["work"] == runs[0]["work"]) for n, run in zip(counts, runs, strict=True)]


def _doubling(most: int) -> list[int]:
    counts = [1]
    while 2 * counts[-1] <= most:
        counts.append(2 * counts[-1])
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="?", default="mw_cubic_64", help="a shipped system (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2048, help="to draw (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=100, help="of the bridge (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=0, help="so many GPUs instead of cores")
    arguments = parser.parse_args()
    rows = strong_scaling(arguments.system, arguments.samples, arguments.stages, arguments.gpus)
    print(f"{'GPUs' if arguments.gpus else 'cores':>6}{'sampling':>12}{'speed':>8}  work values")
    for n, seconds, same in rows:
        print(f"{n:>6}{seconds:>10.2f} s{rows[0][1] / seconds:>8.2f}  {'the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
