"""Whether error bars hold: many estimates of one number with different seeds, against a value that is far better known.

    python -m benchmarks calibration [FAMILY ...] [--replicas 100] [--json OUT] [--table OUT] [--records FOLDER]
    python -m benchmarks calibration --few          # FEP and BAR against the number of samples
    python -m benchmarks calibration --corrections  # what known remedies of FEP's bias would bring
    python -m benchmarks calibration --published    # every shipped system that has a published value
    python -m benchmarks calibration --collect --json OUT --table OUT   # figures of all that is on record
    python -m benchmarks calibration --from FIGURES.json --table OUT    # the tables again

A replica is a whole `freeflow.estimate` (or `estimate_difference`) with a seed of its own: reference, trial crossings,
stopping rule, error bar and verdict. What is compiled serves all replicas of a family. Every replica is a line of
FOLDER/FAMILY.jsonl; a run that is begun again goes on with what is missing. Molecular dynamics comes from a Langevin
integrator here, one trajectory per replica, through files as a user's would.

OUT of --table may be a page with the lines `<!-- calibration -->` and `<!-- end -->`: what stands between is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- calibration -->", "<!-- end -->"
ONE_SIGMA, TWO_SIGMA = math.erf(1 / math.sqrt(2)), math.erf(2 / math.sqrt(2))
FIRST_SEED = 1000  # of replicas; references have seeds of their own
REFERENCE_SEED = 900_000


class Replica(NamedTuple):
    """One estimate."""

    seed: int
    value: float  # [kT, total]
    std_error: float
    reliable: bool  # whether the estimate did not call itself unreliable
    reached: bool  # whether its target error was reached
    n_samples: int
    evaluations: int
    cpu_seconds: float


class Known(NamedTuple):
    """What replicas are held against."""

    value: float  # [kT, total]
    std_error: float
    how: str


@dataclass(frozen=True)
class Family:
    """Estimates of one kind."""

    system: str  # a key of SYSTEMS
    options: Mapping[str, Any] = field(default_factory=dict)  # of the plan
    trajectory: bool = False  # whether frames of molecular dynamics are given
    method: str | None = None  # of a solution


# ------------------------------------------------------------------------------ what is estimated

_LJ_SHORT = {
    "units": "lj",
    "potential": {"kind": "lennard_jones", "cutoff": 1.4},
    "crystal": {"lattice": "fcc", "repeats": [2, 2, 2], "number_density": 1.28},
}
SYSTEMS: dict[str, str | dict[str, Any]] = {
    "mw_cubic_8": "mw_cubic_8",
    "lj_fcc_32": "lj_fcc_32",
    # Near its equilibrium volume, so that no replica moves the cell that things are compiled for.
    "lj_pressure": {
        **_LJ_SHORT,
        "name": "lj_pressure",
        "temperature": 1.0,
        "pressure": 20.0,
        "cell_motion": "isotropic",
        "potential": {"kind": "lennard_jones", "cutoff": 1.5},
        "crystal": {"lattice": "fcc", "repeats": [2, 2, 2], "number_density": 1.16},
    },
    "solution": {
        "name": "solution",
        "units": "lj",
        "temperature": 2.0,
        "solution": {
            "box_length": 2.6,
            "solvent": {"count": 8, "potential": {"kind": "lennard_jones"}},
            "solute": {"kind": "wca", "sigma": [1.0, 1.1]},
        },
    },
}
_SHIPPED = {"checkpoint": "shipped"}
FAMILIES: dict[str, Family] = {
    "fep": Family("mw_cubic_8", {"target_error": 4e-3}),
    "fep-harmonic": Family("mw_cubic_8", {"target_error": 4e-4, "reference": "harmonic"}),
    "fep-lj": Family("lj_fcc_32", {"target_error": 1.5e-3}),
    "bar": Family("mw_cubic_8", {"target_error": 4e-3, "estimator": "bar"}),
    "bar-md": Family("mw_cubic_8", {"target_error": 2e-3, "estimator": "bar", "bridge": None}, trajectory=True),
    "bar-md-lj": Family("lj_fcc_32", {"target_error": 1.5e-3, "estimator": "bar"}, trajectory=True),
    "lfep": Family("mw_cubic_8", {"target_error": 2e-4, "flow": _SHIPPED, "bridge": None}),
    "lbar": Family(
        "mw_cubic_8", {"target_error": 4e-4, "flow": _SHIPPED, "bridge": None, "estimator": "bar"}, trajectory=True
    ),
    "gibbs": Family("lj_pressure", {"target_error": 1.5e-3}),
    "solvation-bar": Family("solution", method="bar"),
    "solvation-lbar": Family("solution", method="lbar"),
    "solvation-bridge": Family("solution", method="bridge"),
    "solvation-escort": Family("solution", method="escort"),
}
# Estimates of a solution share chains and frames, so that all methods of a replica come from one call.
_SOLVATION = {"target_error": 0.03, "max_samples": 1024}
_FRAMES = {"mw_cubic_8": 400, "lj_fcc_32": 600}  # of molecular dynamics
_STEP = {"mw_cubic_8": 0.03, "lj_fcc_32": 0.004}  # [length], with kT and masses 1
_MOST = 20_000  # samples
_EVERY, _SETTLING = 8, 400  # steps between frames, and before the first


# ------------------------------------------------------------------------------ replicas in one process


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Estimates of one system in this context share what is compiled; all else is done anew for each.

    They may differ in seed, reference, bridge, batch and precision, but not in temperature or flow. (A learned map's
    unit of length, which it takes from samples of its reference, is that of the first estimate. Any map is exact.)
    """
    from freeflow import preparation, switching
    from freeflow.potentials import binding
    from freeflow.work import BridgeSampler

    compiled, constants, switches = {}, {}, {}

    class Sharing(BridgeSampler):
        def compile(self, name, like, device=None):
            place = self.device if device is None else device
            bare = self.coordinates is preparation.PLAIN
            key = name, place.id, bare, self.batch, self._launch_dtype, self.recipe.crystal.cell.tobytes()
            if key not in compiled:
                compiled[key] = super().compile(name, like, device)
                compiled[key].result()
            return compiled[key]

    def force_constants(potential, table, atoms, *rest, real=binding.force_constants):
        key = id(potential), table.offset.tobytes()
        if key not in constants:
            constants[key] = real(potential, table, atoms, *rest)
        return constants[key]

    def switch(solution, *rest, real=switching.switch):
        key = id(solution), *rest
        if key not in switches:
            switches[key] = real(solution, *rest)
        return switches[key]

    with (
        mock.patch.object(preparation, "BridgeSampler", Sharing),
        mock.patch.object(binding, "force_constants", force_constants),
        mock.patch.object(switching, "switch", switch),
    ):
        yield


def langevin(system: Any, n_chains: int, seed: int, n_frames: int, step: float) -> np.ndarray:
    """Displacements (n_chains, n_frames, n_atoms, 3) of Langevin chains that start from the lattice [length].

    BAOAB, whose positions are exact in a harmonic crystal whatever the step (Leimkuhler and Matthews, Appl. Math. Res.
    Express 2013, 34). kT and masses are 1, so that time is a length; the mean displacement stays zero.
    """
    import jax
    import jax.numpy as jnp

    from freeflow.crystals import energy_of
    from freeflow.geometry import nearest_neighbour_distance
    from freeflow.types import double_precision

    with double_precision():
        reach = nearest_neighbour_distance(system.crystal)
        energy, beta = energy_of(system).relative(reach, "float32"), float(system.state.beta)
        force = jax.vmap(jax.grad(lambda u: -beta * energy(u)))
        shape = (n_chains, system.n_atoms, 3)
        kept = 0.95  # of the velocity at every step

        def one(carry, key):
            u, v, f = carry
            v = v + 0.5 * step * f
            u = u + 0.5 * step * v
            noise = jax.random.normal(key, shape, "float32")
            v = kept * v + math.sqrt(1 - kept**2) * (noise - noise.mean(axis=1, keepdims=True))
            u = u + 0.5 * step * v
            u = u - u.mean(axis=1, keepdims=True)
            f = force(u)
            return (u, v + 0.5 * step * f, f), None

        @jax.jit
        def frame(carry, key):
            return jax.lax.scan(one, carry, jax.random.split(key, _EVERY))[0]

        start = jnp.zeros(shape, "float32")
        carry, frames = (start, start, force(start)), []
        for k in range(_SETTLING // _EVERY + n_frames):
            carry = frame(carry, jax.random.fold_in(jax.random.key(seed), k))
            frames.append(np.asarray(carry[0], float))
        return np.swapaxes(np.array(frames[_SETTLING // _EVERY :]), 0, 1)


def crystal_replicas(family: Family, seeds: Sequence[int]) -> Iterator[Replica]:
    """Estimates of a crystal."""
    import freeflow as ff
    from freeflow.trajectories import write

    system = ff.load(SYSTEMS[family.system])
    frames = None
    if family.trajectory and seeds:
        # Seeds of one call are chains of one batch; the batch's own seed makes calls independent.
        frames = langevin(system, len(seeds), seeds[0], _FRAMES[family.system], _STEP[family.system])
    with compiled_once(), tempfile.TemporaryDirectory() as folder:
        for k, seed in enumerate(seeds):
            options = {"max_samples": _MOST, **family.options}
            if frames is not None:
                file = Path(folder) / "md.extxyz"
                write(file, system, frames[k])
                options["trajectory"] = str(file)
            begun = time.process_time()
            found = ff.estimate(system, seed=seed, **options)
            yield Replica(
                seed,
                found.beta_f,
                found.beta_f_std_error,
                found.status not in {"unreliable", "interrupted"},
                found.beta_f_std_error <= system.n_atoms * found.plan.target_error,
                found.n_samples,
                int(sum(found.energy_evaluations.values())),
                time.process_time() - begun,
            )


def solution_replicas(methods: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Replica]]:
    """Estimates of the solution by several methods."""
    import freeflow as ff
    from freeflow.solvation import estimate_difference

    problem = ff.load(SYSTEMS["solution"])
    with compiled_once():
        for seed in seeds:
            begun = time.process_time()
            found = estimate_difference(problem, methods=tuple(methods), seed=seed, **_SOLVATION)
            cpu = time.process_time() - begun
            yield {
                answer.method: Replica(
                    seed,
                    answer.delta_f,
                    answer.std_error,
                    answer.reliable,
                    answer.std_error <= found.plan.target_error,
                    sum(answer.n_samples),
                    answer.energy_evaluations,
                    cpu / len(methods),
                )
                for answer in found.answers
            }


# How the values that replicas are held against are found: plans, with target errors far below the replicas'.
_BETTER: dict[str, tuple[dict[str, Any], ...]] = {
    "mw_cubic_8": (
        {"target_error": 2.5e-5, "bridge": 256},
        {"target_error": 3e-5, "flow": _SHIPPED, "bridge": None},
    ),
    "lj_fcc_32": ({"target_error": 8e-5, "estimator": "bar"}, {"target_error": 2e-4}),
    "lj_pressure": ({"target_error": 1.2e-4, "estimator": "bar"}, {"target_error": 2e-4}),
    "solution": ({"target_error": 1e-3, "methods": ("bridge",)}, {"target_error": 1e-3, "methods": ("escort",)}),
}


def known(name: str) -> Known:
    """The value of a system, from several estimates with far smaller error bars, which must agree.

    Raises:
        RuntimeError: If they do not, or one is not to be relied on.
    """
    import freeflow as ff
    from freeflow.solvation import estimate_difference

    system, estimate = ff.load(SYSTEMS[name]), estimate_difference if name == "solution" else ff.estimate
    pairs = []
    for k, options in enumerate(_BETTER[name]):
        found = estimate(system, seed=REFERENCE_SEED + k, max_samples=10**6, **options)
        if found.status != "converged":
            raise RuntimeError(f"{name}: the reference run {options} is {found.status}: {found.warnings}")
        if name == "solution":
            pairs.append((found.delta_f, found.delta_f_std_error))
        else:
            pairs.append((found.beta_f, found.beta_f_std_error))
    value, error, chi2 = pooled(pairs)
    if chi2 > 3.5**2 * (len(pairs) - 1):
        raise RuntimeError(f"{name}: reference runs contradict each other: {pairs}")
    return Known(value, error, f"{pairs}, chi^2 {chi2:.2f}")


def pooled(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Weighted mean of (value, error), its error, and chi^2."""
    values, errors = np.array(pairs).T
    weights = errors**-2 / np.sum(errors**-2)
    mean = float(weights @ values)
    return mean, float(np.sum(errors**-2) ** -0.5), float(np.sum(((values - mean) / errors) ** 2))


# ------------------------------------------------------------------------------ records, so that nothing is run twice


def stored(file: Path) -> list[dict[str, Any]]:
    """What stands in a file of records; a last line that was cut off does not count."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def note(file: Path, record: Mapping[str, Any]) -> None:
    """Append a record, on a line of its own whatever a killed run left there."""
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a") as out:
        out.write("\n" * torn + json.dumps(record) + "\n")


def replicas_of(names: Sequence[str], n: int, folder: Path) -> None:
    """Run what is missing of `n` replicas of every family."""
    for name in names:
        family = FAMILIES[name]
        if family.method is None:
            seeds = _missing(folder / f"{name}.jsonl", n)
            for replica in crystal_replicas(family, seeds):
                note(folder / f"{name}.jsonl", replica._asdict())
            print(f"{name}: {len(seeds)} replicas more", file=sys.stderr, flush=True)
    together = {method: name for name in names if (method := FAMILIES[name].method) is not None}
    if together:
        missing = set[int]().union(*(_missing(folder / f"{name}.jsonl", n) for name in together.values()))
        for answers in solution_replicas(list(together), sorted(missing)):
            for method, replica in answers.items():
                file = folder / f"{together[method]}.jsonl"
                if replica.seed in _missing(file, n):
                    note(file, replica._asdict())


def _missing(file: Path, n: int) -> list[int]:
    there = {record["seed"] for record in stored(file)}
    return [seed for seed in range(FIRST_SEED, FIRST_SEED + n) if seed not in there]


def known_of(name: str, folder: Path) -> Known:
    """The value of a system, found if it is not on record."""
    file = folder / "known.jsonl"
    for record in stored(file):
        if record["system"] == name:
            return Known(record["value"], record["std_error"], record["how"])
    found = known(name)
    note(file, {"system": name, **found._asdict()})
    return found


# ------------------------------------------------------------------------------ figures


def figures_of(name: str, replicas: Sequence[Mapping[str, Any]], value: Known) -> dict[str, Any]:
    """Coverage, bias and spread of the replicas of a family that do not call themselves unreliable."""
    sound = [replica for replica in replicas if replica["reliable"]]
    figures: dict[str, Any] = {
        "family": name,
        "system": FAMILIES[name].system,
        "options": {**FAMILIES[name].options, **({"method": m} if (m := FAMILIES[name].method) else {})},
        "replicas": len(replicas),
        "unreliable": len(replicas) - len(sound),
        "short_of_target": sum(not replica["reached"] for replica in replicas),
        "known": value.value,
        "known_std_error": value.std_error,
        "std_error": float(np.median([replica["std_error"] for replica in replicas])),
        "cpu_seconds": float(np.median([replica["cpu_seconds"] for replica in replicas])),
        "evaluations": float(np.median([replica["evaluations"] for replica in replicas])),
    }
    for label, some in (("", sound), ("all_", replicas)):
        z = scores(some, value)
        figures |= {f"{label}{key}": number for key, number in coverage(z).items()}
    # The error of the known value is common to all replicas.
    common = value.std_error / math.hypot(value.std_error, figures["std_error"])
    figures["mean_z_std_error"] = math.hypot(figures["rms_z"] / math.sqrt(max(len(sound), 1)), common)
    return figures


def scores(replicas: Sequence[Mapping[str, Any]], value: Known) -> np.ndarray:
    """(estimate - known) / combined standard error."""
    return np.array([(r["value"] - value.value) / math.hypot(r["std_error"], value.std_error) for r in replicas])


def coverage(z: np.ndarray) -> dict[str, float]:
    """Shares of z scores within one and two standard errors, their mean and root mean square."""
    if not z.size:
        return dict.fromkeys(("within_1", "within_2", "mean_z", "rms_z"), math.nan)
    within = [float(np.mean(np.abs(z) < k)) for k in (1, 2)]
    return {
        "within_1": within[0],
        "within_2": within[1],
        "mean_z": float(z.mean()),
        "rms_z": float(np.sqrt((z**2).mean())),
    }


def undercovers(figures: Mapping[str, Any]) -> bool:
    """Whether intervals hold the known value more rarely than they say, by three standard deviations of chance."""
    n = figures["replicas"] - figures["unreliable"]
    return any(
        figures[key] < nominal - 3 * math.sqrt(nominal * (1 - nominal) / max(n, 1))
        for key, nominal in (("within_1", ONE_SIGMA), ("within_2", TWO_SIGMA))
    )


# ------------------------------------------------------------------------------ few samples

_SIZES = (32, 64, 128, 256, 512, 1024)
_DRAWS = 2000
_POOL = 20_000


def few_samples(folder: Path) -> list[dict[str, Any]]:
    """Bias and coverage of FEP and BAR against the number of samples (of each side).

    Work is Gaussian, whose free energy difference is known (0), or drawn with replacement from crossings of
    mw_cubic_8's bridge, whose "true" value is then that of the whole pool.
    """
    import freeflow as ff
    from freeflow.estimators import bar, fep, record

    rng = np.random.default_rng(1)
    pool = folder / "pool.npz"
    if not pool.exists():
        found = ff.estimate("mw_cubic_8", estimator="bar", bridge=96, target_error=1e-9, max_samples=_POOL, seed=7)
        np.savez(pool, forward=found.work.forward, reverse=found.work.reverse)
    with np.load(pool) as arrays:
        forward, reverse = arrays["forward"], arrays["reverse"]

    def gaussian(variance: float) -> Callable[[int], Any]:
        return lambda n: record(*(rng.normal(variance / 2, math.sqrt(variance), n) for _ in range(2)))

    whole = record(forward, reverse)
    sources: dict[str, tuple[Callable[[int], Any], Callable[[Any], float]]] = {
        "Gaussian, variance 0.3": (gaussian(0.3), lambda _: 0.0),
        "Gaussian, variance 1": (gaussian(1.0), lambda _: 0.0),
        "Gaussian, variance 3": (gaussian(3.0), lambda _: 0.0),
        f"mw_cubic_8, 96 stages, variance {np.var(forward[np.isfinite(forward)]):.2g}": (
            lambda n: record(rng.choice(forward, n), rng.choice(reverse, n)),
            lambda estimator: float(estimator(whole).delta_f),
        ),
    }
    rows = []
    for source, (draw, truth) in sources.items():
        for name, estimator in (("fep", fep), ("bar", bar)):
            true = truth(estimator)
            for n in _SIZES:
                answers = np.array([(a.delta_f, a.std_error) for a in (estimator(draw(n)) for _ in range(_DRAWS))])
                z = (answers[:, 0] - true) / answers[:, 1]
                bias, spread = float(np.mean(answers[:, 0]) - true), float(np.std(answers[:, 0]))
                rows.append(
                    {
                        "work": source,
                        "estimator": name,
                        "n": n,
                        "bias": bias,
                        "bias_std_error": spread / math.sqrt(_DRAWS),
                        "spread": spread,
                        "std_error": float(np.sqrt(np.mean(answers[:, 1] ** 2))),
                        **coverage(z),
                    }
                )
    return rows


def halved(work: Any) -> tuple[float, float]:
    """FEP less half its squared error bar, the first order of a logarithm's bias: (value, error) [kT]."""
    from freeflow.estimators import fep

    answer = fep(work)
    return float(answer.delta_f - answer.std_error**2 / 2), float(answer.std_error)


def jackknife(work: Any) -> tuple[float, float]:
    """The jackknife's value and error of FEP, one sample left out at a time [kT].

    References: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11.
    """
    w = np.asarray(work.forward)
    n, lowest = len(w), w.min()
    weights = np.exp(lowest - w)
    whole = lowest - math.log(weights.mean())
    without = lowest - np.log((weights.sum() - weights) / (n - 1))
    return n * whole - (n - 1) * float(without.mean()), math.sqrt((n - 1) * float(without.var()))


def corrections() -> list[dict[str, Any]]:
    """Bias, spread and coverage of FEP and of remedies, from the same sets of Gaussian work."""
    from freeflow.estimators import fep, record

    def plain(work: Any) -> tuple[float, float]:
        answer = fep(work)
        return float(answer.delta_f), float(answer.std_error)

    ways = {
        "fep": plain,
        "less half its squared error bar": halved,
        "fep, the jackknife's error bar": lambda work: (plain(work)[0], jackknife(work)[1]),
        "jackknife": jackknife,
    }
    rng = np.random.default_rng(1)
    rows = []
    for variance in (1.0, 3.0):
        for n in (_SIZES[0], _SIZES[-1]):
            sets = [record(rng.normal(variance / 2, math.sqrt(variance), n)) for _ in range(2 * _DRAWS)]
            for name, way in ways.items():
                value, error = np.array([way(work) for work in sets]).T
                rows.append(
                    {
                        "variance": variance,
                        "n": n,
                        "way": name,
                        "bias": float(value.mean()),  # the difference is 0
                        "spread": float(value.std()),
                        "std_error": float(np.mean(error)),
                        "within_2": coverage(value / error)["within_2"],
                    }
                )
    return rows


# ------------------------------------------------------------------------------ against the literature

# Command lines of `freeflow estimate`: every shipped system with a published value.
PUBLISHED: tuple[str, ...] = (
    "mw_cubic_8 --checkpoint shipped --target-error 2e-4",
    "mw_cubic_64 --target-error 1e-4",
    "mw_cubic_64 --checkpoint shipped --stages none --target-error 5e-5",
    "mw_cubic_216 --checkpoint shipped --target-error 5e-5",
    "mw_cubic_512 --checkpoint shipped --target-error 5e-5",
    "mw_hexagonal_64 --target-error 1e-4",
    "mw_hexagonal_64 --checkpoint shipped --target-error 1e-4",
    "mw_hexagonal_216 --target-error 1e-4",
    "mw_hexagonal_512 --checkpoint shipped --target-error 5e-5",
    "lj_fcc_256 --target-error 3e-4",
    "lj_fcc_500 --target-error 3e-4",
    "solvation_wca --methods escort --target-error 0.04",
)


def against_published(folder: Path) -> list[dict[str, Any]]:
    """Run the command lines that are not on record; their values beside the published ones."""
    import subprocess

    file = folder / "published.jsonl"
    done = {record["command"] for record in stored(file)}
    for command in PUBLISHED:
        if command in done:
            continue
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "result.json"
            run = [sys.executable, "-m", "freeflow", "estimate", *command.split(), "--quiet", "--json", str(out)]
            subprocess.run(run, cwd=ROOT, check=False)
            if not out.exists():
                print(f"calibration: no result of {command}", file=sys.stderr)
                continue
            values = json.loads(out.read_text())
        which = "delta_f" if values["quantity"] == "free_energy_difference" else "beta_f_per_atom"
        published = values["published"]
        note(
            file,
            {
                "command": command,
                "system": values["system"],
                "quantity": which,
                "value": values[which],
                "std_error": values[f"{which}_std_error"],
                "published": published[which],
                "published_std_error": published["std_error"],
                "z": published["z_score"],
                "status": values["status"],
            },
        )
    rows = {record["command"]: record for record in stored(file)}
    return [rows[command] for command in PUBLISHED if command in rows]


# ------------------------------------------------------------------------------ tables


def tables(found: Mapping[str, Any]) -> str:
    """All tables in Markdown, from the figures alone."""
    parts = []
    if families := found.get("families"):
        nominal = f"within 1 s.e. ({ONE_SIGMA:.1%}) | within 2 s.e. ({TWO_SIGMA:.1%})"
        parts.append(
            f"| family | error bar [kT] | replicas | unreliable | {nominal} | mean z | rms z | CPU s each |\n"
            "|---|---|---|---|---|---|---|---|---|\n" + "".join(map(_family_line, families))
        )
    if rows := found.get("few_samples"):
        header = "| work | estimator | " + " | ".join(f"n = {n}" for n in _SIZES) + " |\n"
        parts.append(header + "|---|---|" + "---|" * len(_SIZES) + "\n" + "".join(_few_lines(rows)))
    if rows := found.get("corrections"):
        parts.append(
            "| variance | n | way | bias [kT] | spread [kT] | mean error bar [kT] | within 2 s.e. |\n"
            "|---|---|---|---|---|---|---|\n" + "".join(map(_correction_line, rows))
        )
    if rows := found.get("published"):
        parts.append(
            "| `freeflow estimate ...` | result | published | z | |\n|---|---|---|---|---|\n"
            + "".join(map(_published_line, rows))
        )
    return "\n".join(parts)


def _family_line(f: Mapping[str, Any]) -> str:
    n = f["replicas"] - f["unreliable"]
    shares = [
        f"{f[key]:.1%} ± {math.sqrt(nominal * (1 - nominal) / max(n, 1)):.1%}"
        for key, nominal in (("within_1", ONE_SIGMA), ("within_2", TWO_SIGMA))
    ]
    mean = f"{f['mean_z']:+.2f} ± {f['mean_z_std_error']:.2f}"
    cells = [
        f"`{f['family']}`",
        f"{f['std_error']:.2g}",
        f"{f['replicas']}",
        f"{f['unreliable']}",
        *shares,
        mean,
        f"{f['rms_z']:.2f}",
        f"{f['cpu_seconds']:.1f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def _few_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    kinds = dict.fromkeys((row["work"], row["estimator"]) for row in rows)
    for work, estimator in kinds:
        mine = {row["n"]: row for row in rows if (row["work"], row["estimator"]) == (work, estimator)}
        cells = [f"{mine[n]['bias'] / mine[n]['spread']:+.2f}, {mine[n]['within_2']:.1%}" for n in _SIZES]
        yield f"| {work} | {estimator} | {' | '.join(cells)} |\n"


def _correction_line(row: Mapping[str, Any]) -> str:
    numbers = f"{row['bias']:+.4f} | {row['spread']:.4f} | {row['std_error']:.4f} | {row['within_2']:.1%}"
    return f"| {row['variance']:g} | {row['n']} | {row['way']} | {numbers} |\n"


def _published_line(row: Mapping[str, Any]) -> str:
    from freeflow.result import format_with_error

    ours = format_with_error(row["value"], row["std_error"])
    theirs = format_with_error(row["published"], row["published_std_error"])
    status = "" if row["status"] == "converged" else row["status"].replace("_", " ")
    return f"| `{row['command']}` | {ours} | {theirs} | {row['z']:+.1f} | {status} |\n"


def put(text: str, page: Path) -> None:
    """Write the tables to a file, or between the marks of a page that has them."""
    old = page.read_text() if page.exists() else ""
    if BEGIN in old and END in old:
        before, rest = old.split(BEGIN, 1)
        text = before + BEGIN + "\n\n" + text + "\n" + END + rest.split(END, 1)[1]
    page.write_text(text)


# ------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--replicas", type=int, default=100, help="of every family (100)")
    parser.add_argument("--records", type=Path, default=ROOT / "build" / "calibration", help="folder of the records")
    parser.add_argument("--published", action="store_true", help="shipped systems against the literature instead")
    parser.add_argument("--few", action="store_true", help="FEP and BAR from few samples instead")
    parser.add_argument("--corrections", action="store_true", help="remedies of FEP's bias from few samples instead")
    parser.add_argument("--collect", action="store_true", help="run nothing; figures of everything that is on record")
    parser.add_argument("--from", dest="figures", type=Path, help="a JSON file of figures to make the tables from")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--table", type=Path, help="markdown file, or page with marks, to write the tables to")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.families) - set(FAMILIES))
    if unknown:
        print(f"benchmarks: no family {unknown[0]!r}; there are {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    if options.replicas < 1:
        print(f"benchmarks: --replicas must be at least 1, got {options.replicas}", file=sys.stderr)
        return 2
    found = json.loads(options.figures.read_text()) if options.figures else measured(options)
    print(tables(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.table:
        put(tables(found), options.table)
    return 1 if any(undercovers(figures) for figures in found.get("families", ())) else 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for, from the records and from what is run now."""
    from benchmarks.__main__ import versions

    folder: Path = options.records
    folder.mkdir(parents=True, exist_ok=True)
    names = options.families or list(FAMILIES)
    found: dict[str, Any] = {"versions": versions()}
    if options.few or options.collect:
        file = folder / "few_samples.json"
        if not options.collect:
            file.write_text(json.dumps(few_samples(folder)))
        found["few_samples"] = json.loads(file.read_text()) if file.exists() else []
    if options.corrections:
        found["corrections"] = corrections()
    if options.published or options.collect:
        found["published"] = stored(folder / "published.jsonl") if options.collect else against_published(folder)
    if not (options.few or options.published or options.corrections):
        if not options.collect:
            replicas_of(names, options.replicas, folder)
        on_record = {name: stored(folder / f"{name}.jsonl") for name in names}
        found["families"] = [
            figures_of(name, replicas, known_of(FAMILIES[name].system, folder))
            for name, replicas in on_record.items()
            if replicas
        ]
    return found
