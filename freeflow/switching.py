"""Switching between the two states of a solution, and a fluid's own Monte Carlo.

Both are the same journey: Langevin steps (partly refreshed velocities, then one kick-drift-kick step) while the
solute's radius and the temperature go from one value to another. Its work is the change of the total energy less the
heat that the refreshments let in,

    w = u(x_K; l_K) + |v_K|^2 / 2 - u(x_0; l_0) - |v_0|^2 / 2 - sum of the refreshments' changes of |v|^2 / 2,

so that the error of a finite time step is part of the work ("shadow work"), Crooks's theorem holds exactly whatever
the step, and energies are needed at the two ends alone. No step is rejected on the way: rejections turn velocities
around, which made the way four times as long. From a state to itself the journey is a Monte Carlo move, accepted with
probability min(1, e^-w).

A journey may be escorted: where lambda jumps, a map carries the atoms along, and the logarithm of its Jacobian counts
as heat that it let in. Velocities stay as they are.

Velocities are in units in which kT and the masses are 1, and the time step is a length.

References: Jarzynski, PRE 56, 5018 (1997); Crooks, PRE 60, 2721 (1999); Sivak, Chodera and Crooks, PRX 3, 011007
(2013), for the shadow work; Vaikuntanathan and Jarzynski, PRL 100, 190601 (2008), for the escort; Nilmeier, Crooks,
Minh and Chodera, PNAS 108, E1009 (2011), for the move.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from freeflow import bridge as bridges
from freeflow.errors import InputError
from freeflow.estimators import chain_correlation, equilibrated, mbar, record, statistical_inefficiency
from freeflow.geometry import LATTICES
from freeflow.random_numbers import standard_normal
from freeflow.solutions import Solution
from freeflow.types import Key, Work, double_precision
from freeflow.work import n_workers, systematic_resample

R = TypeVar("R")
# (n, 3, batch) [length], span of lambda -> positions that went along, log dets (batch,)
Carry = Callable[[Array, Any], tuple[Array, Array]]

REFRESHMENT = 0.02  # share of the kinetic energy that one step draws anew; see docs/method.md
_MOVE = 32  # steps of a Monte Carlo move
_ACCEPTANCE = 0.9  # of such moves, aimed at by the step size
_PIECE = 256  # steps of a journey between two chances to stop
_PILOT_PIECES, _PILOT_STAGES = 16, 16  # of a trial journey, and stages in each piece
_FLOWN_APART = 100.0  # work above the usual by which a journey is lost [kT]
_WORK_VARIANCE = 3.0  # of a journey [kT^2]: the acceptance ratio wastes little up to here
_STAGES = (32, 20_000)
_FIRST_LOOKS, _MAX_LOOKS, _LONG = 32, 2048, 10.0  # at equilibrium, in moves; and in inefficiencies
_SETTLING = 32  # moves in which the first step size is found
_FOLLOWING = 64  # steps from one state to the next
RELAXATION = 32  # steps between two legs of an escorted journey; see docs/solutions.md


class Walkers(NamedTuple):
    """A batch on its way, the batch innermost."""

    x: Float[Array, "n 3 batch"]  # [length]
    v: Float[Array, "n 3 batch"]
    pull: Float[Array, "n 3 batch"]  # gradient of the solvent's energy [energy/length]
    heat: Float[Array, " batch"]  # what refreshments let in so far [kT], float64


class Way(NamedTuple):
    """A course in one direction."""

    start: float  # lambda at which walkers are launched
    stages: Float[np.ndarray, " n_stages"]  # lambda of every step
    end: float  # lambda at which they arrive


class Course(NamedTuple):
    """A way from A to B, and the time step [length]."""

    lambdas: Float[np.ndarray, " n"]  # 0 at the start, then that of every stage
    step: float
    carry: Carry | None = None  # an escort: what moves atoms along wherever lambda changes

    @property
    def n_stages(self) -> int:
        """Langevin steps on the way."""
        return len(self.lambdas) - 1

    @property
    def forward(self) -> Way:
        """From A to B: lambda changes, then a step follows."""
        return Way(0.0, self.lambdas[1:], 1.0)

    @property
    def reverse(self) -> Way:
        """The same stages backwards: first the step, then lambda changes.

        Backwards a step would end with its refreshment instead of beginning with it. With fresh velocities at the
        start both are one and the same: the first refreshment does nothing, nor would the last.
        """
        return Way(1.0, self.lambdas[:0:-1], 0.0)


@dataclass(frozen=True)
class Switch:
    """Pure functions of a batch; lambda = 0 is state A and 1 is state B.

    `launch(key, x)` gives positions (n, 3, batch) fresh velocities. `pull(x)` is the gradient of the solvent's energy.
    `travel(key, walkers, lambdas, steps, count)` takes
    `count` Langevin steps of this length, step k at `lambdas[k]`. `energies(x, lambdas)` is the reduced potential
    (n_states, batch) in float64 and `energy(x, lam)` that of one state. `move(key, x, u, lam, step)` is a Monte Carlo
    move, which returns positions, reduced potentials, and who moved.
    """

    launch: Callable[[Key, Array], Walkers]
    pull: Callable[[Array], Array]
    travel: Callable[[Key, Walkers, Array, Any, Any], Walkers]
    energies: Callable[[Array, Array], Array]
    energy: Callable[[Array, Any], Array]
    move: Callable[[Key, Array, Array, Any, Any], tuple[Array, Array, Array]]


def switch(solution: Solution, dtype: str = "float32", refreshment: float = REFRESHMENT) -> Switch:
    """Journeys between the states of a solution; forces in `dtype`, work in float64 whatever it is."""
    fast, exact = solution.kernels(dtype), solution.kernels("float64")
    (r_a, r_b), (beta_a, beta_b) = solution.radii, solution.betas
    kept, renewed = np.asarray(math.sqrt(1 - refreshment), dtype), np.asarray(math.sqrt(refreshment), dtype)

    def at(lam: Any) -> tuple[Any, Any]:
        return r_a + lam * (r_b - r_a), beta_a + lam * (beta_b - beta_a)

    def launch(key: Key, x: Array) -> Walkers:
        # Wrapped, so that float32 keeps its digits.
        x = (x - solution.box_length * jnp.round(x / solution.box_length)).astype(dtype)
        v = standard_normal(key, x.shape, dtype)
        return Walkers(x, v, fast.solvent(x)[1], jnp.zeros(x.shape[2], jnp.float64))

    def travel(key: Key, walkers: Walkers, lambdas: Array, step: Any, count: Any) -> Walkers:
        h = jnp.asarray(step, dtype)

        def at_stage(k: Any) -> tuple[Array, Array]:
            radius, beta = at(lambdas[k])
            return radius.astype(dtype), 0.5 * h * jnp.asarray(beta).astype(dtype)

        def stage(k: Any, carried: Any) -> Any:
            now, (radius, half) = carried
            v = kept * now.v + renewed * standard_normal(jax.random.fold_in(key, k), now.v.shape, dtype)
            heat = now.heat + kinetic(v) - kinetic(now.v)
            v = v - half * (now.pull + fast.solute(now.x, radius)[1])
            x = now.x + h * v
            pull = fast.solvent(x)[1]
            v = v - half * (pull + fast.solute(x, radius)[1])
            # Numbers that every atom needs travel with the loop: looked up where they are used, XLA would look them
            # up atom by atom, which costs 40 % of the speed.
            return Walkers(x, v, pull, heat), at_stage(k + 1)

        return jax.lax.fori_loop(0, count, stage, (walkers, at_stage(0)))[0]

    def energies(x: Array, lambdas: Array) -> Array:
        x = x.astype("float64")
        alone = exact.solvent(x)[0]

        def one(lam: Array) -> Array:
            radius, beta = at(lam)
            return beta * (alone + exact.solute(x, radius)[0])

        return jax.lax.map(one, lambdas)

    def energy(x: Array, lam: Any) -> Array:
        return energies(x, jnp.asarray(lam)[None])[0]

    def move(key: Key, x: Array, u: Array, lam: Any, step: Any) -> tuple[Array, Array, Array]:
        key_v, key_travel, key_accept = jax.random.split(key, 3)
        start = launch(key_v, x)
        end = travel(key_travel, start, jnp.full(_MOVE, lam), step, _MOVE)
        u_new = energy(end.x, lam)
        work = u_new - u + kinetic(end.v) - kinetic(start.v) - end.heat
        # NaN compares false: a journey into nonsense is rejected.
        accept = -work > jnp.log(jax.random.uniform(key_accept, work.shape, jnp.float64))
        return jnp.where(accept, end.x.astype(x.dtype), x), jnp.where(accept, u_new, u), accept

    return Switch(launch, lambda x: fast.solvent(x)[1], travel, energies, energy, move)


def kinetic(v: Float[Array, "n 3 batch"]) -> Float[Array, " batch"]:
    """Kinetic energy [kT]."""
    return 0.5 * jnp.sum(v * v, axis=(0, 1), dtype=jnp.float64)


# --------------------------------------------------------------------------- tuning


def even_course(n_stages: int, step: float) -> Course:
    """Stages evenly spaced in lambda."""
    return Course(np.linspace(0.0, 1.0, n_stages + 1), step)


def escorted_course(carry: Carry, n_legs: int, step: float, relaxation: int = RELAXATION) -> Course:
    """Legs of equal length over which a map carries the atoms, with Langevin steps between them.

    Args:
        carry: Carries a batch over a leg.
        n_legs: How many.
        step: Of time, of the Langevin steps.
        relaxation: Langevin steps after every leg.
    """
    return Course(np.concatenate([[0.0], np.repeat(np.arange(1, n_legs) / n_legs, relaxation)]), step, carry)


def course_from(pilot: bridges.Pilot, n_stages: int) -> Course:
    """Stages at equal thermodynamic distance, found from a trial journey."""
    distance = np.concatenate([[0.0], np.cumsum(np.sqrt(bridges.friction(pilot)))])
    lambdas = np.interp(np.linspace(0.0, 1.0, n_stages + 1), distance / distance[-1], pilot.lambdas)
    return Course(lambdas, float(pilot.step_sizes[0]))


def stages_for(pilot: bridges.Pilot, variance: float = _WORK_VARIANCE) -> int:
    """Stages over which work varies by so much [kT^2]: a slow journey dissipates L^2 / K, half its work's variance."""
    return int(np.clip(2 * bridges.thermodynamic_length(pilot) ** 2 / variance, *_STAGES))


# --------------------------------------------------------------------------- many chains


class StoppedError(Exception):
    """Somebody asked the threads to end."""


class Journey(NamedTuple):
    """What a batch of journeys came to."""

    works: Float[np.ndarray, "n_stops batch"]  # up to every stop, the last one being the end [kT]
    x: Float[Array, "n 3 batch"]  # where they ended


class Equilibration(NamedTuple):
    """What chains at one state showed before the first sample was taken."""

    moves: int  # spent on the way
    start: int  # move at which equilibration ended
    inefficiency: float  # of the energy [moves]
    acceptance: float
    step: float  # time step [length]
    reached: bool


class Samples(NamedTuple):
    """Samples of one state, in the order of time."""

    x: Float[np.ndarray, "n_rounds n_chains n 3"]  # float32 [length]
    u: Float[np.ndarray, "n_rounds n_chains"]  # reduced potential [kT]

    @property
    def frames(self) -> Float[np.ndarray, "n_frames n 3"]:
        """Chain after chain: consecutive blocks are next to independent."""
        return np.swapaxes(self.x, 0, 1).reshape(-1, *self.x.shape[2:])

    @property
    def inefficiency(self) -> float:
        """Of the energy, in samples."""
        return chain_correlation(self.u)[1]


class Staged(NamedTuple):
    """What samples of several states along the way came to."""

    lambdas: Float[np.ndarray, " n_states"]
    n_k: Int[np.ndarray, " n_states"]  # samples of each
    f_k: Float[np.ndarray, " n_states"]  # free energies relative to A [kT]
    raw_error: Float[np.ndarray, "n_states n_states"]  # MBAR's, as if samples were independent
    inefficiencies: Float[np.ndarray, " n_states"]
    warnings: tuple[str, ...]

    @property
    def delta_f(self) -> float:
        """F_B - F_A [kT]."""
        return float(self.f_k[-1])

    @property
    def std_error(self) -> float:
        """Of `delta_f`, with the samples' memory on the safe side [kT]."""
        return float(self.raw_error[0, -1] * math.sqrt(self.inefficiencies.max()))


class Switches(NamedTuple):
    """Work of many journeys, round after round of all chains."""

    forward: Float[np.ndarray, "n_rounds n_chains"]  # [kT]
    reverse: Float[np.ndarray, "n_rounds n_chains"]

    @property
    def work(self) -> Work:
        """All of it, as estimators take it."""
        return record(self.forward.ravel(), self.reverse.ravel())

    @property
    def inefficiency(self) -> tuple[float, float]:
        """Statistical inefficiencies of forward and reverse work: rounds of one chain remember each other."""
        return memory(self.forward), memory(self.reverse)


def memory(work: Float[np.ndarray, "n_rounds n_chains"]) -> float:
    """Statistical inefficiency of the work of chains, lost journeys left aside.

    These, of infinite or of immense work, have weight 0 in an average; in a correlation they would outweigh all others.
    They count as no farther than six standard deviations, as the quartiles tell these, from the median.
    """
    finite = work[np.isfinite(work)]
    if len(work) < 3 or not finite.size:
        return 1.0
    low, usual, high = np.percentile(finite, (25, 50, 75))
    far = 6 * 0.7413 * (high - low)  # of a normal distribution the quartiles are 1.349 standard deviations apart
    near = np.clip(work - usual, -far, far) if far > 0 else np.minimum(work, finite.max()) - usual
    return statistical_inefficiency(near[:, 0]) if near.shape[1] == 1 else chain_correlation(near)[1]


class Chains:
    """Chains of Monte Carlo moves at one place on the way from A to B, in batches."""

    def __init__(self, fluid: Fluid, lam: float, step: float, x: list[Array], first: int):
        self.fluid, self.lam, self.step = fluid, lam, step
        self.x, self.first = x, first
        self.u = fluid.each(lambda part: fluid.energy(part, lam), self.x)
        self.moves = self.accepted = 0

    def __len__(self) -> int:
        return len(self.x) * self.fluid.batch

    def move(self, purpose: str) -> None:
        """One move of every chain."""

        def one(k: int, x: Array, u: Array) -> Any:
            return self.fluid.moved(self.fluid.key(self.first + k), x, u, self.lam, self.step, purpose)

        rows = self.fluid.each(one, range(len(self.x)), self.x, self.u)
        self.x, self.u, accepted = map(list, zip(*rows, strict=True))
        self.moves += 1
        self.accepted += float(np.mean([np.mean(part) for part in accepted]))

    def energies(self) -> Float[np.ndarray, " n_chains"]:
        """Reduced potentials [kT]."""
        return np.concatenate([np.asarray(part) for part in self.u])

    def positions(self) -> Float[np.ndarray, "n_chains n 3"]:
        """Where the chains stand [length], in float64."""
        return np.concatenate([np.moveaxis(np.asarray(part, np.float64), -1, 0) for part in self.x])


class Fluid:
    """The machinery of one solution: compiled pieces, threads, random keys, and what it all cost.

    Whatever the number of cores, batch b's n-th call of a compiled piece draws the same numbers.
    """

    def __init__(self, solution: Solution, seed: int = 0, batch: int | None = None, dtype: str = "float32"):
        self.solution, self.seed = solution, seed
        self.batch = batch or batch_size(solution.n_solvent)
        self.evaluations: Counter[str] = Counter()  # equilibration, tuning, sampling, switching, checks
        self.switch = switch(solution, dtype)
        self._calls: Counter[int] = Counter()
        self._carriers: dict[Carry, Callable[[Walkers, Any], Walkers]] = {}
        self._threads = ThreadPoolExecutor(n_workers(), thread_name_prefix="freeflow")
        self._launch, self._travel = jax.jit(self.switch.launch), jax.jit(self.switch.travel, donate_argnums=1)
        self._energy, self._move = jax.jit(self.switch.energy), jax.jit(self.switch.move)
        self._many_energies = jax.jit(self.switch.energies)
        self._stop, self._lock = threading.Event(), threading.Lock()

    def stop(self) -> None:
        """Ask journeys under way to end."""
        self._stop.set()

    def close(self) -> None:
        """Stop, and let go of the threads."""
        self.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Fluid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def each(self, function: Callable[..., R], *arguments: Iterable[Any]) -> list[R]:
        """Results of a function of batches, worked out side by side."""
        jobs = [self._threads.submit(_in_double_precision, function, *some) for some in zip(*arguments, strict=True)]
        return [job.result() for job in jobs]

    def key(self, index: int) -> Array:
        """The next random key of a batch."""
        self._calls[index] += 1
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), index), self._calls[index])

    def energy(self, x: Array, lam: float) -> Array:
        """Reduced potential (batch,) in float64 [kT]."""
        return jax.block_until_ready(self._energy(x, lam))

    def moved(self, key: Array, x: Array, u: Array, lam: float, step: float, purpose: str) -> Any:
        """A batch after one Monte Carlo move."""
        self._count(purpose, _MOVE + 2)
        return jax.block_until_ready(self._move(key, x, u, lam, step))

    def _count(self, purpose: str, stages: int) -> None:
        with self._lock:
            self.evaluations[purpose] += self.batch * stages

    # ----------------------------------------------------------------- equilibrium

    def packed(self, lam: float, n_batches: int, first: int) -> list[Array]:
        """Batches of configurations on lattice sites, (n, 3, batch), every one with vacancies of its own."""
        radius = self.solution.radii[0] + lam * (self.solution.radii[1] - self.solution.radii[0])
        rng = np.random.default_rng([self.seed, first])
        return [jnp.asarray(packed(self.solution, radius, self.batch, rng), jnp.float32) for _ in range(n_batches)]

    def equilibrate(
        self, lam: float, n_batches: int, first: int, watch: Callable[[str], None] = lambda _: None
    ) -> tuple[Chains, Equilibration]:
        """Chains from a packed start until their mean energy is stationary, and for long enough to know its memory."""
        spacing = (self.solution.box_length**3 / self.solution.n_solvent) ** (1 / 3)
        chains = Chains(self, lam, 0.002 * spacing, self.packed(lam, n_batches, first), first)
        for k in range(_SETTLING):
            before = chains.accepted
            chains.move("equilibration")
            # From below, and ever more carefully: a batch knows its acceptance to a few per cent.
            chains.step *= math.exp((chains.accepted - before - _ACCEPTANCE) * 24 / (6 + k))
            watch(f"{len(chains)} chains, step {chains.step:.3g}")
        chains.moves = chains.accepted = 0
        return chains, self._stay(chains, watch)

    def _stay(self, chains: Chains, watch: Callable[[str], None]) -> Equilibration:
        seen: list[np.ndarray] = []
        looks = _FIRST_LOOKS
        while True:
            while len(seen) < looks:
                chains.move("equilibration")
                seen.append(chains.energies())
                watch(f"{len(chains)} chains, {len(seen) * _MOVE} steps")
            series = np.array(seen)
            start = equilibrated(series.mean(axis=1)).start
            _, g = chain_correlation(series[start:])
            reached = start <= looks / 2 and looks - start >= _LONG * g
            if reached or looks >= _MAX_LOOKS:
                share = chains.accepted / chains.moves
                return Equilibration(looks, start, g, share, chains.step, reached)
            looks *= 2

    def sample(
        self, chains: Chains, n_rounds: int, interval: int, watch: Callable[[str], None] = lambda _: None
    ) -> Samples:
        """`n_rounds` samples of every chain, `interval` moves apart."""
        x, u = [], []
        for k in range(n_rounds):
            for _ in range(interval):
                chains.move("sampling")
            x.append(chains.positions().astype(np.float32))
            u.append(chains.energies())
            watch(f"{(k + 1) * len(chains)} samples, one every {interval * _MOVE} steps")
        return Samples(np.array(x), np.array(u))

    def staged(
        self,
        chains: Chains,
        lambdas: Float[np.ndarray, " n_states"],
        n_rounds: int,
        watch: Callable[[str], None] = lambda _: None,
    ) -> Staged:
        """Free energies along the way from samples of states between A and B (MBAR): the conventional baseline.

        Args:
            chains: In equilibrium at A; copies of them go from one state to the next, and come to equilibrium in each.
            lambdas: States, the first and the last being A and B.
            n_rounds: Samples of every chain in every state.
            watch: Told what is going on.

        Raises:
            InputError: If neighbouring states do not overlap.
        """
        rows, inefficiencies, warnings = [], [], []
        now = Chains(self, 0.0, chains.step, chains.x, chains.first + 2**10)
        for k, lam in enumerate(lambdas):
            tell = lambda text, k=k: watch(f"state {k + 1} of {len(lambdas)}: {text}")  # noqa: E731
            now = self._follow(now, float(lam))
            found = self._stay(now, tell)
            if not found.reached:
                warnings.append(f"state {k + 1} of {len(lambdas)}: no equilibrium was seen in {found.moves} moves")
            interval, part = max(1, math.ceil(found.inefficiency)), []
            for _ in range(n_rounds):
                for _ in range(interval):
                    now.move("sampling")
                part.append(np.concatenate(self.each(lambda x: self._energies(x, lambdas), now.x), axis=1))
                tell(f"{len(part) * len(now)} samples")
            u = np.array(part)  # (n_rounds, n_states, n_chains)
            # What MBAR weighs samples by are the differences along the way.
            inefficiencies.append(chain_correlation(u[:, -1] - u[:, 0])[1])
            rows.append(np.concatenate(part, axis=1))
        n_k = np.array([row.shape[1] for row in rows])
        answer = mbar(np.concatenate(rows, axis=1), n_k)
        return Staged(
            lambdas,
            n_k,
            np.asarray(answer.f_k),
            np.asarray(answer.std_error),
            np.array(inefficiencies),
            tuple(warnings),
        )

    def _energies(self, x: Array, lambdas: np.ndarray) -> np.ndarray:
        """Reduced potential (n_states, batch) in float64 [kT]."""
        self._count("checks", 1)
        return np.asarray(self._many_energies(x, lambdas))

    # ----------------------------------------------------------------- journeys

    def journey(
        self,
        x: Array,
        index: int,
        way: Way,
        step: float,
        purpose: str,
        stops: Sequence[int] = (),
        carry: Carry | None = None,
    ) -> Journey:
        """A batch (n, 3, batch) on its way, launched with fresh velocities.

        Args:
            x: Positions at the start [length].
            index: Number of the batch, which chooses the random numbers.
            way: The lambdas it goes through.
            step: Time step [length].
            purpose: What the evaluations are booked under.
            stops: Stages at which the work done so far is booked besides; without an escort only.
            carry: The escort, if there is one.

        Raises:
            StoppedError: If the threads were asked to end on the way.
        """

        def total(now: Walkers, lam: float) -> Array:
            return self.energy(now.x, lam) + kinetic(now.v) - now.heat

        if carry is not None:
            return self._escorted(x, index, way, step, purpose, carry)
        walkers, done, works = self._launch(self.key(index), x), 0, []
        before = total(walkers, way.start)
        for stop, lam in [*((stop, float(way.stages[stop - 1])) for stop in stops), (len(way.stages), way.end)]:
            while done < stop:
                if self._stop.is_set():
                    raise StoppedError
                count = min(_PIECE, stop - done)
                walkers = self._piece(walkers, index, way.stages[done : done + count], step, purpose)
                done += count
            works.append(np.asarray(total(walkers, lam) - before))
        return Journey(_work(np.array(works)), walkers.x)

    def _piece(self, walkers: Walkers, index: int, stages: np.ndarray, step: float, purpose: str) -> Walkers:
        """A few Langevin steps of a batch, at most `_PIECE`."""
        piece = np.zeros(_PIECE)
        piece[: len(stages)] = stages
        # Another key for every piece: within one, stages are told apart.
        walkers = jax.block_until_ready(self._travel(self.key(index), walkers, piece, step, len(stages)))
        self._count(purpose, len(stages))
        return walkers

    def _escorted(self, x: Array, index: int, way: Way, step: float, purpose: str, carry: Carry) -> Journey:
        """A journey whose walkers are carried along wherever lambda changes."""
        carried = self._carried(carry)
        walkers = self._launch(self.key(index), x)
        before = self.energy(walkers.x, way.start) + kinetic(walkers.v)
        here = way.start
        legs = [(lam, len(list(stages))) for lam, stages in itertools.groupby(way.stages.tolist())]
        for lam, n_steps in [*legs, (way.end, 0)]:
            if self._stop.is_set():
                raise StoppedError
            walkers = jax.block_until_ready(carried(walkers, np.float32(lam - here)))
            self._count(purpose, 1)
            here = lam
            for begin in range(0, n_steps, _PIECE):
                stages = np.full(min(_PIECE, n_steps - begin), lam)
                walkers = self._piece(walkers, index, stages, step, purpose)
        work = self.energy(walkers.x, way.end) + kinetic(walkers.v) - walkers.heat - before
        return Journey(_work(np.asarray(work)[None]), walkers.x)

    def _carried(self, carry: Carry) -> Callable[[Walkers, Any], Walkers]:
        """Compiled once for every map."""
        with self._lock:
            if carry not in self._carriers:

                def carried(walkers: Walkers, span: Array) -> Walkers:
                    x, log_det = carry(walkers.x, span)
                    return Walkers(x, walkers.v, self.switch.pull(x), walkers.heat + log_det)

                self._carriers[carry] = jax.jit(carried)
            return self._carriers[carry]

    def _journeys(
        self,
        chains: Chains,
        way: Way,
        step: float,
        purpose: str,
        stops: Sequence[int] = (),
        carry: Carry | None = None,
    ) -> list[Journey]:
        numbers = range(chains.first, chains.first + len(chains.x))
        return self.each(lambda x, k: self.journey(x, k, way, step, purpose, stops, carry), chains.x, numbers)

    def _follow(self, chains: Chains, lam: float) -> Chains:
        """The chains after a journey to another place on the way, those that came easily in place of the others."""
        stages = np.linspace(chains.lam, lam, _FOLLOWING + 1)[1:]
        ends = self._journeys(chains, Way(chains.lam, stages, lam), chains.step, "equilibration")
        rng = np.random.default_rng([self.seed, chains.first, int(2**20 * lam)])
        x = [end.x[:, :, systematic_resample(-end.works[-1], rng)] for end in ends]
        return Chains(self, lam, chains.step, x, chains.first)

    def across(self, chains: Chains, course: Course, purpose: str = "switching") -> Float[np.ndarray, " n_chains"]:
        """Work of one journey from every chain's place, at A or at B, to the other state [kT]; the chains stay."""
        way = course.forward if chains.lam == 0 else course.reverse
        journeys = self._journeys(chains, way, course.step, purpose, carry=course.carry)
        return np.concatenate([journey.works[-1] for journey in journeys])

    def across_from(
        self, frames: Float[np.ndarray, "m n 3"], course: Course, lam: float = 0.0, first: int = 2**20
    ) -> Float[np.ndarray, " m"]:
        """Work of one journey from each of some given samples of A (lam = 0) or B (lam = 1) to the other state [kT]."""
        n = len(frames)
        # The last batch is filled up with its last frame: one shape compiles once.
        whole = np.concatenate([frames, np.repeat(frames[-1:], -n % self.batch, axis=0)]).astype(float)
        parts = [jnp.asarray(np.moveaxis(part, 0, -1)) for part in np.split(whole, len(whole) // self.batch)]
        return self.across(Chains(self, lam, course.step, parts, first), course)[:n]

    def pilot(self, chains: Chains, course: Course) -> bridges.Pilot:
        """Trial journey of chains at A, with the work of every piece of it."""
        cuts = np.linspace(0, course.n_stages, _PILOT_PIECES + 1).round().astype(int)
        journeys = self._journeys(chains, course.forward, course.step, "tuning", cuts[1:-1].tolist())
        works = np.concatenate([journey.works for journey in journeys], axis=1)
        # A solute that comes out of a point may come out in an atom, which flies off. Such a journey is lost at any
        # speed, and does not tell how slow the others must be.
        kept = works[-1] < np.median(works[-1]) + _FLOWN_APART
        pieces = np.diff(works[:, kept], axis=0, prepend=0.0)
        ones = np.ones(_PILOT_PIECES)
        return bridges.Pilot(course.lambdas[cuts], np.diff(cuts), course.step * ones, ones, pieces, 0.0)


def packed(solution: Solution, radius: float, n: int, rng: np.random.Generator) -> Float[np.ndarray, "n_solvent 3 n"]:
    """Random choices of sites of an fcc lattice in the box that lie outside a solute [length].

    The lattice is the widest one that has sites enough.

    Args:
        solution: Box and number of solvent atoms.
        radius: Of the solute [length].
        n: How many choices.
        rng: Makes them.

    Raises:
        InputError: If there is no room.
    """
    basis = LATTICES["fcc"].basis
    for cells in range(1, 5 * math.ceil(solution.n_solvent ** (1 / 3)) + 5):
        sites = (np.indices((cells,) * 3).reshape(3, -1).T[:, None] + basis + 0.25).reshape(-1, 3) / cells - 0.5
        free = solution.box_length * sites[(sites**2).sum(axis=1) > (0.95 * radius / solution.box_length) ** 2]
        if len(free) >= solution.n_solvent:
            return np.stack([rng.permutation(free)[: solution.n_solvent] for _ in range(n)], axis=2)
    raise InputError(f"solution.box_length: {solution.n_solvent} atoms and the solute find no room in this box")


def _work(work: np.ndarray) -> np.ndarray:
    """What flew apart did more work than a number holds."""
    return np.nan_to_num(work, nan=np.inf, posinf=np.inf)


def batch_size(n_solvent: int) -> int:
    """Configurations that move together: enough to fill vector units, few enough for the cache."""
    if jax.default_backend() != "cpu":
        return int(np.clip(2 ** round(math.log2(2**17 / n_solvent)), 64, 8192))
    return int(np.clip(2 ** round(math.log2(2**13 / n_solvent)), 16, 64))


def _in_double_precision(function: Callable[..., R], *arguments: Any) -> R:
    """Double precision is switched on per thread."""
    with double_precision():
        return function(*arguments)
