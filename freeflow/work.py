"""Forward and reverse generalised work; batches of samples on all cores."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array

from freeflow import bridge as bridges
from freeflow import team
from freeflow.bridge import Bridge, BridgeParams, Pilot, Schedule, Segment, Walker
from freeflow.cells import Strained
from freeflow.references import Gaussian, GaussianCrystal
from freeflow.types import Configuration, Device, Ensemble, Key, ThermodynamicState, Transport, double_precision

R = TypeVar("R")
# Of a pilot, at least: 128, but of large crystals so many atoms' worth, and not below 64.
_PILOT_SAMPLES, _PILOT_SAMPLES_LARGE, _PILOT_ATOMS = 128, 64, 2**19
# For code that takes little of a run's time: fewer optimisations, half the compilation.
_COMPILED_FAST: dict[str, Any] = {"xla_backend_optimization_level": 1}
OnSegment = Callable[[int], None]  # told the energy evaluations of every piece of the way


def forward_work(a: Ensemble, b: Ensemble, transport: Transport) -> Callable[..., Array]:
    """Work of carrying one sample of A to B, `(params, key, state) -> w` [kT].

    Reference: Jarzynski, PRE 65, 046122 (2002), for maps; PRE 56, 5018 (1997), for bridges.
    """

    def one(params: Any, key: Key, state: ThermodynamicState) -> Array:
        key_x, key_y = jax.random.split(key)
        x = a.sample(key_x, state)
        y, log_ratio = transport.forward(params, key_y, x, state)
        return b.reduced_potential(y, state) - a.reduced_potential(x, state) - log_ratio

    return one


def reverse_work(a: Ensemble, b: Ensemble, transport: Transport) -> Callable[..., Array]:
    """Work of carrying one given sample of B to A, `(params, key, y, state) -> w` [kT]."""

    def one(params: Any, key: Key, y: Any, state: ThermodynamicState) -> Array:
        x, log_ratio = transport.reverse(params, key, y, state)
        return a.reduced_potential(x, state) - b.reduced_potential(y, state) - log_ratio

    return one


# ------------------------------------------------------------------- crossing bridges in batches


class Crossing(NamedTuple):
    """A batch of samples that went over the bridge, and perhaps back."""

    forward: np.ndarray  # (batch,) [kT]
    reverse: np.ndarray  # (batch,) [kT], or (0,)
    parents: np.ndarray  # (batch,) which forward sample each reverse one came from, or (0,)
    correction: np.ndarray  # (batch,) last switch: exact target minus the bridge's cheap kernel [kT]
    acceptance: float  # mean over samples and stages
    observed: Any = None  # what `observe` made of the arrivals


class Coordinates(NamedTuple):
    """How configurations of a bridge's target and displacements from the sites follow from each other."""

    displacements: Callable[[Configuration], Array]  # (n_atoms, 3), mean-free [length]
    configuration: Callable[[Array], Configuration]  # the inverse


PLAIN = Coordinates(lambda x: x, lambda u: u)
# Displacements (batch, n_atoms, 3), or a batch of `freeflow.cells.Strained` -> arrays with one row per sample.
Observe = Callable[[Any], Any]


def n_workers() -> int:
    """Batches in flight in this process: one for each of its GPUs, or one for each CPU core."""
    if jax.default_backend() != "cpu":
        return jax.local_device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class BridgeSampler:
    """Carries batches of samples over a bridge, on all cores or devices, and can be stopped between segments.

    Sample i of batch b depends on (seed, b, i) only: the number of cores, devices and processes changes nothing.
    Every thread has a device of its own, as far as they go; batches are dealt out to the processes of a team
    (`freeflow.team`), and what they come to is gathered.

    What is compiled serves every fit and every schedule, and is compiled in the background on demand: "launch" draws
    from the reference, "forward" and "reverse" move a batch along a segment, "exact" ends a crossing with the
    switch from the bridge's kernel to the exact target, "displacements" tells where walkers are, and "whiten" puts
    given displacements onto the bridge.
    """

    def __init__(
        self,
        recipe: GaussianCrystal,
        bridge: Bridge,
        target: Ensemble,
        state: ThermodynamicState,
        batch: int,
        seed: int,
        coordinates: Coordinates = PLAIN,
        workers: int | None = None,
        require: Callable[[], None] = lambda: None,
    ):
        self.recipe, self.bridge, self.target = recipe, bridge, target
        self.state, self.batch, self.seed, self.coordinates = state, batch, seed, coordinates
        self.workers = workers or n_workers()
        self._require = require  # raises what went wrong outside JAX, in another program that gives energies
        self.energy_evaluations: Counter[str] = Counter()  # training, reference, tuning, sampling, checks
        self.devices = jax.local_devices()
        self._place = threading.local()
        self._places = itertools.cycle(self.devices)
        self._threads = ThreadPoolExecutor(self.workers, "freeflow", self._take_place)
        self._compilers = ThreadPoolExecutor(2, thread_name_prefix="freeflow-compile")
        self._compiled: dict[tuple[str, int], Future[Any]] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._launch_dtype = jax.eval_shape(lambda: bridge.launch(jax.random.key(0))).z.dtype

    def _take_place(self) -> None:
        with self._lock:
            self._place.device = next(self._places)

    @property
    def device(self) -> Device:
        """Where this thread computes."""
        return getattr(self._place, "device", self.devices[0])

    def _on(self, device: Device, function: Callable[..., R], *arguments: Any) -> R:
        """Double precision and the default device are those of a thread."""
        with double_precision(), jax.default_device(device) if len(self.devices) > 1 else nullcontext():
            return function(*arguments)

    def _submit(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        return self._threads.submit(lambda: self._on(self.device, function, *arguments))

    def compile(self, name: str, like: Gaussian | None, device: Device | None = None) -> Future[Any]:
        """Begin to compile a piece for parameters shaped like `like`, unless that has begun already.

        It is compiled for a device, that of the calling thread if none is named. "launch" knows its shapes
        without `like`.
        """
        place = self.device if device is None else device
        with self._lock:
            key = name, place.id
            if key not in self._compiled:
                self._compiled[key] = self._compilers.submit(self._on, place, self._lower, name, like)
            return self._compiled[key]

    def prepare(self, names: Iterable[str], like: Gaussian) -> None:
        """Begin to compile pieces for every device that will want them."""
        for name in names:
            for device in self.devices[: self.workers]:
                self.compile(name, like, device)

    def _lower(self, name: str, like: Gaussian | None) -> Any:
        keys = jax.eval_shape(lambda: self.keys(0))
        if name == "launch":
            return jax.jit(jax.vmap(self.bridge.launch)).lower(keys).compile(_COMPILED_FAST)
        walker = jax.eval_shape(jax.vmap(self.bridge.launch), keys)
        if name == "exact":
            piece = jax.jit(jax.vmap(self._exact, (None, 0))).lower(like, walker)
        elif name == "displacements":
            piece = jax.jit(jax.vmap(self._displacements, (None, 0))).lower(like, walker.z)
        elif name == "whiten":
            given: Any = jax.ShapeDtypeStruct((self.batch, self.recipe.crystal.n_atoms, 3), "float64")
            if self.recipe.n_strains:
                given = Strained(given, jax.ShapeDtypeStruct((self.batch, 3, 3), "float64"))  # pyright: ignore[reportArgumentType]
            piece = jax.jit(jax.vmap(self._whiten, (None, 0))).lower(like, given)
        else:
            move = self.bridge.forward_segment if name == "forward" else self.bridge.reverse_segment
            over_batch = jax.jit(jax.vmap(move, (None, 0, 0, None, None)), donate_argnums=2)
            piece = over_batch.lower(like, keys, walker, bridges.fetch_segment(), self.state)
        return piece.compile()

    def _exact(self, gaussian: Gaussian, walker: Walker) -> Array:
        y = self.recipe.colour(gaussian, walker.z.astype("float64"))
        return self.target.reduced_potential(y, self.state) - walker.u_b

    def _displacements(self, gaussian: Gaussian, z: Array) -> Any:
        return self.coordinates.displacements(self.recipe.colour(gaussian, z.astype("float64")))

    def _whiten(self, gaussian: Gaussian, displacements: Any) -> Array:
        return self.recipe.whiten(gaussian, self.coordinates.configuration(displacements)).astype(self._launch_dtype)

    def each(self, function: Callable[..., R], *arguments: Iterable[Any]) -> list[R]:
        """Results of a function of batches, worked out side by side."""
        jobs = [self._submit(function, *some) for some in zip(*arguments, strict=True)]
        return [job.result() for job in jobs]

    def stop(self) -> None:
        """Ask batches in flight to end after their current segment."""
        self._stop.set()

    def close(self) -> None:
        """Stop, and let go of the threads."""
        self.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def keys(self, index: int) -> Array:
        """Random keys (batch,) of the samples of a batch."""
        return jax.random.split(jax.random.fold_in(jax.random.key(self.seed), index), self.batch)

    def move(
        self, name: str, gaussian: Gaussian, keys: Array, walker: Walker, segment: Segment, purpose: str
    ) -> Walker:
        """A batch along one segment, "forward" or "reverse"; evaluations are booked under `purpose`."""
        moved = self.compile(name, gaussian).result()(gaussian, keys, walker, segment, self.state)
        moved = jax.block_until_ready(moved)
        self._require()
        self._count(purpose, int(segment.count))
        return moved

    def correct(self, gaussian: Gaussian, walker: Walker, purpose: str = "checks") -> np.ndarray:
        """Exact target minus the kernel that a batch moves by (batch,) [kT]."""
        correction = np.asarray(self.compile("exact", gaussian).result()(gaussian, walker))
        self._require()
        self._count(purpose, 1)
        return correction

    def _count(self, purpose: str, stages: int) -> None:
        with self._lock:
            self.energy_evaluations[purpose] += self.batch * stages

    def launch(self, keys: Array) -> Walker:
        """Samples of the reference that know no energy yet."""
        return self.compile("launch", None).result()(keys)

    def launched(self, gaussian: Gaussian, keys: Array, purpose: str) -> Walker:
        """Samples of the reference, with energy and gradient."""
        return self.move("forward", gaussian, keys, self.launch(keys), bridges.fetch_segment(), purpose)

    def evaluate(self, gaussian: Gaussian, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Target's reduced potential (n,) and its gradient (n, n_atoms, 3) with respect to white z.

        The number of configurations must be a multiple of the batch.
        """
        keys = self.keys(0)

        def one(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            walker = self.launch(keys)._replace(z=jax.numpy.asarray(part, self._launch_dtype))
            walker = self.move("forward", gaussian, keys, walker, bridges.fetch_segment(), "reference")
            return np.asarray(walker.u_b), np.asarray(walker.gradient, np.float64)

        parts = team.share(np.split(z, len(z) // self.batch))
        energies, gradients = zip(*team.gathered(self.each(one, parts)), strict=True)
        return np.concatenate(energies), np.concatenate(gradients)

    def gradients(self, gaussian: Gaussian, z: np.ndarray) -> np.ndarray:
        """Gradient of the target's reduced potential with respect to any number of white z."""
        n = len(z)
        padded = np.concatenate([z, np.zeros((-n % self.batch, *z.shape[1:]))])
        return self.evaluate(gaussian, padded)[1][:n]

    def _walk(
        self, name: str, params: BridgeParams, keys: Array, walker: Walker, on_segment: OnSegment
    ) -> Walker | None:
        """Over all segments; None if asked to stop on the way."""
        segments = bridges.segments_of(params.schedule, name == "forward")
        for j in range(len(segments.count)):
            if self._stop.is_set():
                return None
            segment = Segment(*(np.asarray(part[j]) for part in segments))
            walker = self.move(name, params.gaussian, keys, walker, segment, "sampling")
            on_segment(self.batch * int(segment.count))
        return walker

    def displacements(self, gaussian: Gaussian, walker: Walker) -> Any:
        """Where walkers stand (batch, n_atoms, 3) [length], or what else their coordinates are, a batch of them."""
        return jax.tree.map(np.asarray, self.compile("displacements", gaussian).result()(gaussian, walker.z))

    def _cross(
        self, params: BridgeParams, index: int, settle: int, on_segment: OnSegment, observe: Observe | None
    ) -> Crossing | None:
        gaussian, keys = params.gaussian, self.keys(index)
        see = (lambda _: None) if observe is None else lambda walker: observe(self.displacements(gaussian, walker))
        if not len(params.schedule.counts):
            walker = self.launch(keys)
            work, nothing = self._switched(gaussian, walker), np.empty(0)
            return Crossing(work, nothing, nothing.astype(int), np.zeros(self.batch), 1.0, see(walker))
        walker = self.launched(gaussian, keys, "sampling")
        walker = self._walk("forward", params, keys, walker, on_segment)
        if walker is None:
            return None
        stages = int(params.schedule.counts.sum())
        acceptance = (float(np.mean(walker.accepted)) - 1) / max(stages, 1)
        correction = self.correct(gaussian, walker)
        forward, observed = np.asarray(walker.work) + correction, see(walker)
        nothing = np.empty(0)
        if not settle:
            return Crossing(forward, nothing, nothing.astype(int), correction, acceptance, observed)
        # Arrivals, resampled by their weights and left to settle, stand for samples of the target.
        rng = np.random.default_rng([self.seed, index])
        parents = systematic_resample(-forward, rng)
        walker = jax.tree.map(lambda leaf: leaf[parents], walker)
        end = Segment(np.float64(1), np.float64(1), np.asarray(params.schedule.step_sizes[-1]), np.int32(settle))
        walker = self.move("forward", gaussian, keys, walker, end, "sampling")
        on_segment(self.batch * settle)
        # They settled under the bridge's kernel; the same weights as on arrival make them the target's.
        departure = self.correct(gaussian, walker)
        again = systematic_resample(-departure, rng)
        walker, parents, departure = jax.tree.map(lambda leaf: leaf[again], (walker, parents, departure))
        walker = self._walk("reverse", params, keys, walker._replace(work=jax.numpy.zeros(self.batch)), on_segment)
        if walker is None:
            return None
        return Crossing(forward, np.asarray(walker.work) - departure, parents, correction, acceptance, observed)

    def _switched(self, gaussian: Gaussian, walker: Walker) -> np.ndarray:
        """Work of switching from the reference to the target at once [kT]; walkers know no energy yet."""
        z = np.asarray(walker.z, np.float64)
        return self.correct(gaussian, walker, "sampling") - 0.5 * (z**2).sum(axis=(1, 2))

    def _cross_back(self, params: BridgeParams, index: int, frames: Any, on_segment: OnSegment) -> np.ndarray | None:
        gaussian, keys, n = params.gaussian, self.keys(index), _count(frames)
        # The last batch is filled up with its last frame: one shape compiles once.
        rows = np.minimum(np.arange(self.batch), n - 1)
        whole = jax.tree.map(lambda part: np.asarray(part[rows], np.float64), frames)
        z = self.compile("whiten", gaussian).result()(gaussian, whole)
        walker = self.launch(keys)._replace(z=z)
        if not len(params.schedule.counts):
            # Displacements that the reference never gives, beyond where it ends, have infinite u_A.
            work = -self._switched(gaussian, walker)
            lost = np.isnan(np.asarray(z)).any(axis=(1, 2))
            return np.where(lost, np.nan, np.where(np.isfinite(work), work, np.inf))[:n]
        walker = self.move("forward", gaussian, keys, walker, bridges.fetch_segment(), "sampling")
        departure = self.correct(gaussian, walker)
        walker = self._walk("reverse", params, keys, walker, on_segment)
        return None if walker is None else (np.asarray(walker.work) - departure)[:n]

    def cross_back(
        self, params: BridgeParams, frames: Any, on_segment: OnSegment = lambda _: None
    ) -> list[Future[np.ndarray | None]]:
        """Begin to carry given samples of the target, batch by batch, to the reference.

        They are displacements (n, n_atoms, 3), or a batch of `freeflow.cells.Strained` where the cell moves. Each
        batch ends as the work of its frames [kT], or None if stopped. A process begins its share of them.
        """
        batches = [
            jax.tree.map(lambda part, first=first: part[first : first + self.batch], frames)
            for first in range(0, _count(frames), self.batch)
        ]
        return [
            # Far from the batches of the run, so that no random number serves twice.
            self._submit(self._cross_back, params, 3 * 2**29 + k, batch, on_segment)
            for k, batch in team.share(list(enumerate(batches)))
        ]

    def cross(
        self,
        params: BridgeParams,
        indices: Iterable[int],
        on_segment: OnSegment = lambda _: None,
        settle: int = 0,
        observe: Observe | None = None,
    ) -> list[Future[Crossing | None]]:
        """Begin to carry batches over the bridge; each ends as a `Crossing`, or None if stopped.

        A process begins its share of them; `team.gathered` brings together what they came to.

        Args:
            params: The fitted reference and the schedule.
            indices: Numbers of the batches; they choose the random numbers.
            on_segment: Told the energy evaluations of every piece of the way, from other threads.
            settle: If positive, stages that arrivals spend at the target before they go back.
            observe: Told the displacements of the arrivals, from other threads.
        """
        return [
            self._submit(self._cross, params, index, settle, on_segment, observe) for index in team.share(list(indices))
        ]

    def pilot(
        self,
        gaussian: Gaussian,
        on_segment: Callable[[float], None] = lambda _: None,
        schedule: Schedule | None = None,
        n_samples: int = _PILOT_SAMPLES,
        stages: tuple[int, int] | None = None,
    ) -> Pilot:
        """Trial crossing at its own pace (`freeflow.bridge.Pace`), in about so many stages, or along a schedule.

        Calls back with lambda.
        """
        enough = max(_PILOT_ATOMS // self.recipe.crystal.n_atoms, _PILOT_SAMPLES_LARGE)
        n_batches = max(2, -(-min(n_samples, enough) // self.batch))
        # Far from the batches of the run, so that no random number serves twice.
        first = 2**31 if schedule is None else 2**31 + n_batches
        crowd = Crowd(self, gaussian, range(first, first + n_batches), "tuning")
        pace = bridges.Pace(schedule, stages)
        while not pace.arrived and not self._stop.is_set():
            segment = pace.next(crowd.read("u_b") - 0.5 * (crowd.read("z") ** 2).sum(axis=(1, 2)))
            crowd.move(segment, "tuning")
            pace.learn(crowd.read("work"), crowd.read("accepted"))
            on_segment(pace.lam)
        arrived = np.isfinite(crowd.corrections())
        return pace.pilot(float(np.mean(~arrived)))._replace(arrivals=crowd.read("z")[arrived])


class Crowd:
    """Batches of walkers that move together, each on a core of its process, from samples of the reference on."""

    def __init__(self, sampler: BridgeSampler, gaussian: Gaussian, indices: Iterable[int], purpose: str):
        self._sampler, self._gaussian = sampler, gaussian
        indices = list(indices)
        self._n_walkers = len(indices) * sampler.batch
        self._keys = [sampler.keys(index) for index in team.share(indices)]
        self._walkers = sampler.each(lambda keys: sampler.launched(gaussian, keys, purpose), self._keys)

    def __len__(self) -> int:
        return self._n_walkers

    def move(self, segment: Segment, purpose: str) -> None:
        """Along one segment, forwards."""

        def one(keys: Array, walker: Walker) -> Walker:
            return self._sampler.move("forward", self._gaussian, keys, walker, segment, purpose)

        self._walkers = self._sampler.each(one, self._keys, self._walkers)

    def read(self, name: str) -> np.ndarray:
        """A number, or an array, of every walker, in float64."""
        return self._together([np.asarray(getattr(walker, name), np.float64) for walker in self._walkers])

    def corrections(self) -> np.ndarray:
        """Exact target minus the kernel that walkers move by [kT]; infinite where an atom left its site."""
        return self._together(self._sampler.each(lambda w: self._sampler.correct(self._gaussian, w), self._walkers))

    def displacements(self) -> Any:
        """Where walkers stand (n_walkers, n_atoms, 3) [length], with the strains of their cells if these move."""
        return self._together(
            self._sampler.each(lambda w: self._sampler.displacements(self._gaussian, w), self._walkers)
        )

    @staticmethod
    def _together(parts: list[Any]) -> Any:
        return jax.tree.map(lambda *some: np.concatenate(some), *team.gathered(parts))


def _count(frames: Any) -> int:
    """Rows of a tree of arrays."""
    return len(jax.tree.leaves(frames)[0])


def completed(jobs: Iterable[Future[R | None]], wait_for_all: bool = False) -> list[R]:
    """What jobs came to that were not stopped; those that have not begun are called off, unless told to wait."""
    jobs = list(jobs)
    for job in jobs if not wait_for_all else ():
        job.cancel()
    done = [job.result() for job in jobs if not job.cancelled()]
    return [result for result in done if result is not None]


def systematic_resample(log_weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices drawn with probabilities proportional to the weights, evenly (Kitagawa 1996)."""
    finite = np.where(np.isfinite(log_weights), log_weights, -np.inf)
    if not np.isfinite(finite).any():
        return np.arange(len(log_weights))
    weights = np.exp(finite - finite.max())
    edges = np.cumsum(weights) / weights.sum()
    return np.minimum(np.searchsorted(edges, (np.arange(len(edges)) + rng.random()) / len(edges)), len(edges) - 1)
