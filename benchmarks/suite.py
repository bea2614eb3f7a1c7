"""The measures of the suite: each takes the case's size and returns figures, ratios within one process.

Times are CPU seconds of the process, threads and compilation included where a user would wait for them. What is
compared with is run here and now, beside freeflow, never quoted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "frenkel_ladd"))


class Figure(NamedTuple):
    """One ratio; larger is better unless `limit` bounds it from above."""

    measure: str
    case: str
    ratio: float
    at_least: float | None  # what it should reach
    aim: float | None
    details: dict[str, float]  # the two numbers behind the ratio, and what else was seen
    limit: float | None = None  # what it should not exceed


def kernels(quick: bool) -> list[Figure]:
    """Energy and force evaluations per CPU second, batches of 128, against LAMMPS and jax-md."""
    from benchmarks import kernels as script
    from freeflow import load

    script.one_core()
    figures = []
    for name in script.SYSTEMS:
        found = script.rates(load(name), 128, 2.0 if quick else 6.0)
        floor = 1.5 if name.startswith("lj") else 1.8
        for other, dtype, wanted in (
            ("LAMMPS", "float32", (floor, 4.0)),
            ("jax-md", "float32", (20, 40)),
            ("LAMMPS", "float64", (None, None)),
        ):
            if other in found:
                numbers = {"freeflow per CPU s": found[dtype], f"{other} per CPU s": found[other]}
                ratio = found[dtype] / found[other]
                figures.append(Figure(f"kernel, freeflow / {other}", f"{name}, {dtype}", ratio, *wanted, numbers))
    return figures


def scaling(quick: bool) -> list[Figure]:
    """Cost per atom of an evaluation in crystals of thousands of atoms over one of hundreds."""
    from benchmarks import scaling as script
    from benchmarks.kernels import one_core

    one_core()
    figures = []
    for name, (*_, repeats) in script.CASES.items():
        sizes = (repeats[0], repeats[-2] if quick else repeats[-1])
        found = script.microseconds_per_atom(name, sizes, 1.5 if quick else 4.5)
        (n, few), (m, many) = found.items()
        numbers = {f"us per atom at {n}": few, f"us per atom at {m}": many}
        figures.append(
            Figure("cost per atom, large / small", f"{name}, {m} / {n}", many / few, None, 1.1, numbers, 1.3)
        )
    return figures


def stages(quick: bool) -> list[Figure]:
    """Cost per atom of a whole stage of a bridge in a crystal of thousands of atoms over one of hundreds."""
    from benchmarks import stages as script
    from benchmarks.kernels import one_core

    one_core()
    sizes = [script.ice(script.REPEATS[0]), script.ice(script.REPEATS[-2 if quick else -1])]
    (few, small), (many, large) = script.microseconds_per_atom(sizes, 1.5 if quick else 4.5).items()
    return [
        Figure(
            "cost of a stage per atom, large / small",
            f"{many} / {few}, {piece}",
            large[piece] / small[piece],
            None,
            None,
            {f"us per atom, {few}": small[piece], f"us per atom, {many}": large[piece]},
            1.3 if piece == "whole stage" else None,
        )
        for piece in small
    ]


def estimators(quick: bool) -> list[Figure]:
    """BAR on as many forward as reverse work values, CPU time of pymbar over freeflow's."""
    import pymbar

    from freeflow.estimators import bar
    from freeflow.types import Work

    figures, rng = [], np.random.default_rng(0)
    for n in (10**3, 10**4, 10**5, 10**6):
        # Gaussian work that obeys Crooks: mean +-delta_f + variance / 2.
        half = n // 2
        w_f, w_r = rng.normal(1.5 + 0.5, 1.0, half), rng.normal(-1.5 + 0.5, 1.0, half)
        ours = _cpu_seconds(lambda w_f=w_f, w_r=w_r: bar(Work(w_f, w_r)), 3)
        theirs = _cpu_seconds(lambda w_f=w_f, w_r=w_r: pymbar.bar(w_f, w_r), 3)
        difference = abs(float(bar(Work(w_f, w_r)).delta_f) - float(pymbar.bar(w_f, w_r)["Delta_f"]))
        numbers = {"freeflow CPU s": ours, "pymbar CPU s": theirs, "difference kT": difference}
        wanted = (3.0, 10.0) if n == 10**6 else (None, None)
        figures.append(Figure("BAR, pymbar / freeflow", f"{n} work values", theirs / ours, *wanted, numbers))
    return figures


def precision(quick: bool) -> list[Figure]:
    """What an error bar costs: Frenkel-Ladd with MBAR and the same kernels over freeflow."""
    from frenkel_ladd import frenkel_ladd

    import freeflow as ff
    from benchmarks import kernels as script
    from freeflow.types import FlowPlan

    figures = []
    for name, floor, aim in (("mw_cubic_64", 200, 500), ("lj_fcc_256", 10, 50)):
        system = ff.load(name)
        conventional = frenkel_ladd(system, 2e-3 if quick else 1e-3, tell=lambda _: None)
        # Errors fall as one over the square root of the cost, once the chains have settled.
        produced = conventional.evaluations - conventional.equilibration
        needed = conventional.equilibration + produced * (conventional.std_error / 1e-3) ** 2
        for way, flow in (("bridge", None), ("shipped flow", FlowPlan(checkpoint="shipped"))):
            found = ff.estimate(system, target_error=1e-3, flow=flow, max_samples=100_000)
            spent = sum(found.energy_evaluations.values())
            apart = found.beta_f_per_atom - conventional.beta_f_per_atom
            numbers = {
                "Frenkel-Ladd evaluations to 1e-3": needed,
                "freeflow evaluations": spent,
                "freeflow error": found.beta_f_per_atom_std_error,
                "difference in standard errors": apart
                / np.hypot(found.beta_f_per_atom_std_error, conventional.std_error),
                "freeflow reliable": float(found.status == "converged"),
            }
            measure = "evaluations to 1e-3, Frenkel-Ladd / freeflow"
            figures.append(Figure(measure, f"{name}, {way}", needed / spent, floor, aim, numbers))
        if name != "lj_fcc_256" or not script.have_lammps():
            continue
        with script.lammps_way(system) as once:
            lammps = script.per_cpu_second({"LAMMPS": once}, 1.5 if quick else 6.0)["LAMMPS"]
        begin = time.process_time()
        found = ff.estimate(system, target_error=3e-4 if quick else 1e-4, max_samples=100_000)
        ours = (time.process_time() - begin) * (found.beta_f_per_atom_std_error / 1e-4) ** 2
        theirs = (conventional.equilibration + produced * (conventional.std_error / 1e-4) ** 2) / lammps
        numbers = {
            "Frenkel-Ladd on LAMMPS CPU s": theirs,
            "freeflow CPU s": ours,
            "freeflow measured at": found.beta_f_per_atom_std_error,
        }
        figures.append(
            Figure("CPU time to 1e-4, Frenkel-Ladd on LAMMPS / freeflow", name, theirs / ours, 10, 50, numbers)
        )
    return figures


def _cpu_seconds(job: Callable[[], object], repeats: int) -> float:
    """CPU time of a job, the best of some, after one that compiles."""
    job()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        job()
        times.append(time.process_time() - begin)
    return min(times)


def devices(quick: bool) -> list[Figure]:
    """Strong scaling: sampling on one core over all, by the clock."""
    from benchmarks import devices as script

    rows = script.strong_scaling("mw_cubic_64", 1024 if quick else 4096, 100)
    figures = []
    for n, seconds, same in rows[1:]:
        numbers = {"seconds on one": rows[0][1], f"seconds on {n}": seconds, "same work values": float(same)}
        figures.append(Figure("strong scaling, one core / more", f"mw_cubic_64, {n} cores", rows[0][1] / seconds,
                              None, None, numbers))  # fmt: skip
    return figures


MEASURES: dict[str, Callable[[bool], list[Figure]]] = {
    "kernels": kernels,
    "scaling": scaling,
    "stages": stages,
    "estimators": estimators,
    "precision": precision,
    "devices": devices,
}
