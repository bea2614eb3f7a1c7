"""Training of a map between two sampled ensembles, from frames of one or both.

Frames are cut into three parts by time: those that training sees, those that tell it when to stop, and those that the
estimate is made from, which neither ever sees; or into folds, each of which is the last of these parts once.
What is minimised is work: its mean over frames of A, or that plus the mean work back over frames of B, which is the sum
of both Kullback-Leibler divergences.

References: Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020), for both losses.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from freeflow.errors import FreeflowError, InputError
from freeflow.flows.fluid import FieldShape, Rates, field_shape, fit, offered, params_of
from freeflow.solutions import Solution
from freeflow.training import tamed
from freeflow.types import Bijector, Ensemble, Key, Numeric, Params, Scalar, ThermodynamicState, Work, double_precision
from freeflow.work import n_workers

Frames = Float[np.ndarray, "n_frames n_atoms 3"]
WorkFn = Callable[[Params, Array, ThermodynamicState], Scalar]

_CALL_SECONDS = 0.5  # steps are handed to the device in pieces of about this length
_WARM_UP = 0.03  # of the whole training, in which the learning rate rises
_MEMORY = 0.98  # of the usual gradient norm
_FEWEST_BETWEEN = 10  # steps from one look at the held-out frames to the next
_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_STREAM = 0x6D617073  # keeps training away from other random numbers of the same seed


# ------------------------------------------------------------------------------ who sees which frames


class Parts(NamedTuple):
    """Frames of one ensemble, cut at two moments in time."""

    train: Frames
    stop: Frames
    estimate: Frames

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.train), len(self.stop), len(self.estimate)


def folds(frames: Frames, n_folds: int, n_chains: int = 1, stop: float = 0.2) -> tuple[Parts, ...]:
    """Every block of frames to estimate from once, with all the other frames to train and to stop on.

    Args:
        frames: Chain after chain, all of equal length, each in the order in which it was sampled.
        n_folds: Blocks. They are whole chains where there are chains enough, and of equal length otherwise.
        n_chains: Independent chains.
        stop: Share of the other frames to stop on, the last of them.

    Raises:
        InputError: If a part would be empty.
    """
    unit = len(frames) // n_chains if n_chains >= n_folds else 1
    cuts = [unit * round(k * (len(frames) // unit) / n_folds) for k in range(n_folds)] + [len(frames)]
    parts = []
    for begin, end in itertools.pairwise(cuts):
        others = np.concatenate([frames[:begin], frames[end:]])
        first = round((1 - stop) * len(others))
        parts.append(Parts(others[:first], others[first:], frames[begin:end]))
    if min(min(part.counts) for part in parts) < 2:
        raise InputError(
            f"estimate.map.folds: {len(frames)} frames in {n_folds} folds leave fewer than two to train, stop or "
            "estimate from"
        )
    return tuple(parts)


# ------------------------------------------------------------------------------ work


def there(bijector: Bijector, a: Ensemble, b: Ensemble) -> WorkFn:
    """Work of carrying one frame of A to B [kT]."""

    def work(params: Params, x: Array, state: ThermodynamicState) -> Scalar:
        y, log_det = bijector.forward(params, x, state)
        return b.reduced_potential(y, state) - a.reduced_potential(x, state) - log_det

    return work


def back(bijector: Bijector, a: Ensemble, b: Ensemble) -> WorkFn:
    """Work of carrying one frame of B to A [kT]."""

    def work(params: Params, y: Array, state: ThermodynamicState) -> Scalar:
        x, log_det = bijector.inverse(params, y, state)
        return a.reduced_potential(x, state) - b.reduced_potential(y, state) - log_det

    return work


def work_of_frames(
    bijector: Bijector,
    params: Params,
    a: Ensemble,
    b: Ensemble,
    frames_a: Float[np.ndarray, "n_a n_atoms 3"],
    frames_b: Float[np.ndarray, "n_b n_atoms 3"],
    state: ThermodynamicState,
    batch: int = 64,
) -> Work:
    """Forward work of frames of A and reverse work of frames of B [kT], in float64; to be called in double precision.

    Either may be none, of shape (0, n_atoms, 3). Frames of infinite energy after the map have infinite work.

    Args:
        bijector: Carries A to B.
        params: Its parameters.
        a: The one state.
        b: The other.
        frames_a: Samples of A [length].
        frames_b: Samples of B.
        state: Where in the phase diagram.
        batch: Frames that are carried together.
    """
    params = _cast(params, "float64")

    def works(way: Callable[[Bijector, Ensemble, Ensemble], WorkFn], frames: Frames) -> np.ndarray:
        if not len(frames):
            return np.zeros(0)
        over_batch = _works_of_batch(way, bijector, a, b)
        return _in_batches(lambda part: (over_batch(params, part, state),), frames.astype("float64"), batch)[0]

    return Work(works(there, frames_a), works(back, frames_b))


@lru_cache(maxsize=16)
def _works_of_batch(
    way: Callable[[Bijector, Ensemble, Ensemble], WorkFn], bijector: Bijector, a: Ensemble, b: Ensemble
) -> Callable[[Params, Array, ThermodynamicState], Array]:
    """Compiled once for all folds and for both states: compiling takes longer than a few thousand frames."""
    return jax.jit(jax.vmap(way(bijector, a, b), (None, 0, None)))


def _in_batches(function: Callable[[Any], tuple[Any, ...]], frames: Frames, batch: int) -> tuple[np.ndarray, ...]:
    """Results of a compiled function of batches for all frames, side by side on all cores, in float64."""
    # The last batch is filled up with its last frame: one shape compiles once.
    whole = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % batch, axis=0)])

    def in_this_thread(part: np.ndarray) -> tuple[np.ndarray, ...]:
        with double_precision():  # it is switched on per thread
            return tuple(np.asarray(result, np.float64) for result in function(part))

    first, *others = np.split(whole, len(whole) // batch)
    # The first one compiles, alone: the threads would each compile for themselves.
    found = [in_this_thread(first)]
    with ThreadPoolExecutor(n_workers(), thread_name_prefix="freeflow") as threads:
        found += threads.map(in_this_thread, others)
    return tuple(np.concatenate(results)[: len(frames)] for results in zip(*found, strict=True))


# ------------------------------------------------------------------------------ fields, by linear algebra


class FittedMap(NamedTuple):
    """The parameters of a `freeflow.flows.fluid` map, and how they came about."""

    params: Params
    left_over: tuple[float, float]  # share of the variance of du/dl that the field leaves, of both parts of the frames
    ridge: float
    frames: tuple[tuple[int, int], tuple[int, int]]  # to fit and to choose the penalty by, of A and B each
    energy_evaluations: int
    seconds: float


def rates(solution: Solution, lam: float, frames: Frames, shape: FieldShape, batch: int = 32) -> Rates:
    """What frames of a state on the straight way from A (0) to B (1) ask of a field; call it in double precision.

    Args:
        solution: The problem.
        lam: The state: radius and beta are (1 - lam) times those of A plus lam times those of B.
        frames: Samples of that state [length].
        shape: Of the field.
        batch: Frames at once.
    """
    of_batch, at = _rates_of_batch(solution, shape), np.float64(lam)
    near = frames - solution.box_length * np.round(frames / solution.box_length)  # so that float32 keeps its digits
    return Rates(*_in_batches(lambda part: of_batch(part, at), near.astype("float64"), batch))


@lru_cache(maxsize=16)
def _rates_of_batch(solution: Solution, shape: FieldShape) -> Callable[[Array, Any], tuple[Array, Array]]:
    """`rates` of frames (batch, n, 3) at a place on the way; compiled once for all folds."""
    kernels = solution.kernels("float32")
    (r_a, r_b), (beta_a, beta_b) = solution.radii, solution.betas

    def of_batch(frames: Float[Array, "batch n 3"], lam: Scalar) -> tuple[Array, Array]:
        radius, beta = r_a + lam * (r_b - r_a), beta_a + lam * (beta_b - beta_a)
        x = jnp.moveaxis(frames, 0, -1).astype("float32")

        def solute(r: Array) -> Array:
            return kernels.solute(x, r)[0].astype("float64")

        at = jnp.asarray(radius, "float64")
        u_solvent, pull = kernels.solvent(x)
        u_solute, growth = jax.jvp(solute, (at,), (jnp.ones_like(at),))
        gradient = beta * (pull + kernels.solute(x, at)[1])
        wanted = (beta_b - beta_a) * (u_solvent + u_solute) + beta * (r_b - r_a) * growth
        x, gradient = (jnp.swapaxes(part, 0, 1).astype("float32") for part in (x, gradient))
        return wanted, offered(x, gradient, shape)

    return jax.jit(of_batch)


def shape_for(solution: Solution, hops: bool = True) -> FieldShape:
    """The shape of fields for a solution; see `freeflow.flows.fluid.field_shape`.

    Raises:
        InputError: If the solutes are too large for the box.
    """
    return field_shape(solution.box_length, solution.radii, solvent_core(solution), hops)


def solvent_core(solution: Solution) -> float:
    """Distance below which a pair of solvent atoms has 1 kT or more; of ideal ones, that of neighbours [length]."""
    r = np.linspace(0.0, solution.solvent.cutoff, 4001)[1:]
    energy = np.asarray(solution.solvent.pair(jnp.asarray(r * r)), np.float64)
    high = r[energy >= solution.kt]
    return float(high[-1]) if len(high) else 0.8 * solution.box_length / solution.n_solvent ** (1 / 3)


def fit_map(solution: Solution, frames_a: Parts, frames_b: Parts | None, shape: FieldShape) -> FittedMap:
    """The field that leaves least work, from frames of A and B, or of A alone; call it in double precision.

    The penalty on large parameters is the one by which the frames to stop on, which the fit does not see, are left
    with least. The parts to estimate from are never read.

    Args:
        solution: The two states.
        frames_a: Of A: to train on, to stop on, to estimate from.
        frames_b: The same of B; None to learn from A alone.
        shape: Of the field.
    """
    begun = time.monotonic()
    states = [(0.0, frames_a)] if frames_b is None else [(0.0, frames_a), (1.0, frames_b)]
    train, stop = ([rates(solution, lam, part[k], shape) for lam, part in states] for k in (0, 1))

    def left_over(states: list[Rates], numbers: np.ndarray) -> float:
        return float(np.mean([state.left_over(numbers) for state in states]))

    tried = [(ridge, fit(train, ridge)) for ridge in _RIDGES]
    ridge, numbers = min(tried, key=lambda one: left_over(stop, one[1]))
    return FittedMap(
        params=params_of(numbers, shape),
        left_over=(left_over(train, numbers), left_over(stop, numbers)),
        ridge=ridge,
        frames=_counts([part for _, part in states]),
        energy_evaluations=sum(len(state.wanted) for state in [*train, *stop]),
        seconds=time.monotonic() - begun,
    )


# ------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class MapPlan:
    """How to train a map. It ends at `max_steps` or `max_minutes`, whichever comes first, or when it overfits."""

    loss: str = "lbar"  # lfep: from frames of A alone
    max_minutes: float | None = 5.0
    max_steps: int | None = None
    batch_size: int = 16  # frames of each ensemble
    learning_rate: float = 1e-3  # at its highest
    clip: float = 3.0  # gradients are cut to so many times their usual norm
    average: float = 0.99  # share of the past in the running average of parameters
    looks: int = 40  # at the frames held out, in a whole training
    patience: int = 10  # looks without a new lowest loss after which training ends
    seed: int = 0


Ending = Literal["finished", "overfitting", "interrupted"]


class Look(NamedTuple):
    """Where training stands at one look at the frames held out."""

    step: int
    seconds: float
    training_loss: float | None  # mean since the look before [kT]; None at the start
    held_out_loss: float  # [kT]


class TrainedMap(NamedTuple):
    """The parameters of the lowest held-out loss, and how they came about."""

    params: Params
    looks: tuple[Look, ...]
    best: Look
    steps: int
    skipped: int  # steps left out because loss or gradient were not finite
    frames: tuple[tuple[int, int], tuple[int, int]]  # to train on and to stop on, of A and B each
    energy_evaluations: int
    seconds: float
    ending: Ending


class _State(NamedTuple):
    params: Params
    average: Params
    moments: Any
    usual_norm: Scalar
    step: Int[Numeric, ""]
    skipped: Int[Numeric, ""]
    used: Int[Numeric, ""]  # since the last look
    loss: Scalar  # their sum [kT]


def train_map(
    bijector: Bijector,
    a: Ensemble,
    b: Ensemble,
    frames_a: Parts,
    frames_b: Parts | None,
    state: ThermodynamicState,
    plan: MapPlan,
    augment: Callable[[Key, Array], Array] | None = None,
    watch: Callable[[Look], None] = lambda _: None,
    dtype: str = "float32",
    params: Any = None,
) -> TrainedMap:
    """Train by Adam on work, until the budget is spent or the held-out frames say stop; call it in double precision.

    The parts to estimate from are never read. Wild work counts by its logarithm; a gradient longer than `plan.clip`
    times its usual norm is cut, one that is not finite is skipped.

    Args:
        bijector: Forward is A to B.
        a: State A; its energy is evaluated on frames and on what the map makes of frames of B.
        b: State B.
        frames_a: Of A.
        frames_b: Of B; `lfep` needs none.
        state: Where in the phase diagram.
        plan: How.
        augment: A random symmetry of both ensembles, applied to every frame anew: (key, x) -> x.
        watch: Called after every look.
        dtype: Of parameters and frames in training.
        params: Where to begin; by default the bijector's own start.

    Raises:
        InputError: If the loss needs frames that are missing, or there is no end.
        FreeflowError: If no step of a stretch between two looks was finite.
    """
    if plan.loss not in ("lfep", "lbar"):
        raise InputError(f"training.loss: no loss {plan.loss!r}; use lfep or lbar")
    if plan.loss == "lbar" and frames_b is None:
        raise InputError("training.loss: lbar needs frames of B too; use lfep")
    if plan.max_steps is None and plan.max_minutes is None:
        raise InputError("training: give max_steps or max_minutes, or it never ends")
    sides = [(there(bijector, a, b), frames_a)]
    if plan.loss == "lbar" and frames_b is not None:
        sides.append((back(bijector, a, b), frames_b))
    begun = time.monotonic()
    machine = _compiled(bijector, sides, _cast(state, dtype), plan, augment, dtype, params)
    training = _run(machine, plan, begun, watch)
    n_held_out = sum(len(parts.stop) for _, parts in sides)
    return training._replace(
        frames=_counts([part for _, part in sides]),
        energy_evaluations=2 * (training.steps * plan.batch_size * len(sides) + len(training.looks) * n_held_out),
        seconds=time.monotonic() - begun,
    )


def _counts(parts: Sequence[Parts]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Frames to train and to stop on, of A and B each; none of B if there is one part."""
    train, stop, _ = zip(*(part.counts for part in parts), strict=True)
    return (train[0], sum(train[1:])), (stop[0], sum(stop[1:]))


class _Machine(NamedTuple):
    start: _State
    advance: Callable[[_State, int, float], _State]
    held_out: Callable[[Params], float]


def _compiled(
    bijector: Bijector,
    sides: list[tuple[WorkFn, Parts]],
    state: ThermodynamicState,
    plan: MapPlan,
    augment: Callable[[Key, Array], Array] | None,
    dtype: str,
    params: Any,
) -> _Machine:
    """Training as two compiled functions with the frames put in."""
    import optax

    optimiser = optax.scale_by_adam()
    key_init, key_step = jax.random.split(jax.random.fold_in(jax.random.key(plan.seed), _STREAM))
    works = [one for one, _ in sides]

    def loss(params: Params, batches: list[Array]) -> Scalar:
        means = [
            jnp.mean(tamed(jax.vmap(one, (None, 0, None))(params, x, state)))
            for one, x in zip(works, batches, strict=True)
        ]
        return sum(means[1:], means[0])

    def step(old: _State, rate: Scalar, frames: list[Array]) -> _State:
        keys = jax.random.split(jax.random.fold_in(key_step, old.step), (len(frames), 2))
        batches = []
        for (key_draw, key_turn), some in zip(keys, frames, strict=True):
            x = some[jax.random.randint(key_draw, (plan.batch_size,), 0, len(some))]
            batches.append(x if augment is None else jax.vmap(augment)(jax.random.split(key_turn, len(x)), x))
        value, gradient = jax.value_and_grad(loss)(old.params, batches)
        norm = optax.tree.norm(gradient)
        sound = jnp.isfinite(value) & jnp.isfinite(norm)
        limit = jnp.where(old.usual_norm > 0, plan.clip * old.usual_norm, norm)
        shrink = jnp.where(norm > limit, limit / norm, 1.0)
        updates, moments = optimiser.update(jax.tree.map(lambda g: g * shrink, gradient), old.moments)
        params = jax.tree.map(lambda p, d: p - rate.astype(p.dtype) * d, old.params, updates)
        new = old._replace(
            params=params,
            average=jax.tree.map(lambda m, p: plan.average * m + (1 - plan.average) * p, old.average, params),
            moments=moments,
            usual_norm=jnp.where(old.usual_norm > 0, _MEMORY * old.usual_norm + (1 - _MEMORY) * norm * shrink, norm),
            used=old.used + 1,
            loss=old.loss + value,
        )
        new = jax.tree.map(lambda n, o: jnp.where(sound, n, o).astype(o.dtype), new, old)
        return new._replace(step=old.step + 1, skipped=old.skipped + jnp.where(sound, 0, 1).astype("int32"))

    @jax.jit
    def advance(old: _State, steps: Array, rate: Array, frames: list[Array]) -> _State:
        return jax.lax.fori_loop(0, steps, lambda _, at: step(at, rate, frames), old)

    @jax.jit
    def one_by_one(params: Params, frames: list[Array]) -> Scalar:
        means = [
            jnp.mean(tamed(jax.lax.map(lambda y, one=one: one(params, y, state), x, batch_size=plan.batch_size)))
            for one, x in zip(works, frames, strict=True)
        ]
        return sum(means[1:], means[0])

    train = [jnp.asarray(parts.train, dtype) for _, parts in sides]
    stop = [jnp.asarray(parts.stop, dtype) for _, parts in sides]
    if params is None:
        params = bijector.init(key_init, train[0][0], state)
    params = _cast(params, dtype)
    none = jnp.zeros((), "int32")
    nought = jnp.zeros((), "float64")
    start = _State(params, params, optimiser.init(params), nought.astype("float32"), none, none, none, nought)
    return _Machine(
        start,
        lambda old, steps, rate: jax.block_until_ready(advance(old, np.int32(steps), np.float32(rate), train)),
        lambda params: float(one_by_one(params, stop)),
    )


def _run(machine: _Machine, plan: MapPlan, begun: float, watch: Callable[[Look], None]) -> TrainedMap:
    """Steps and looks until an end; the parameters of the lowest held-out loss are kept."""
    budget = math.inf if plan.max_minutes is None else 60 * plan.max_minutes
    horizon = math.inf if plan.max_steps is None else plan.max_steps
    state, looks, pace = machine.start, [], math.inf
    best, ending = state.average, "finished"
    since = 0  # looks since the best
    try:
        while True:
            used = int(state.used)
            spent = time.monotonic() - begun
            loss = machine.held_out(state.average)
            look = Look(int(state.step), spent, float(state.loss) / used if used else None, loss)
            if looks and not used:
                raise FreeflowError(
                    f"map training: none of the last {look.step - looks[-1].step} steps had a finite work and "
                    "gradient; try a lower learning rate, or another map"
                )
            lowest = min((k.held_out_loss for k in looks), default=math.inf)
            if not looks or loss < lowest:
                best, since = state.average, 0
            else:
                since += 1
            looks.append(look)
            watch(look)
            progress = max(look.step / horizon, (time.monotonic() - begun) / budget)
            if progress >= 1 or since >= plan.patience:
                ending = "finished" if progress >= 1 else "overfitting"
                break
            state = state._replace(used=jnp.zeros_like(state.used), loss=jnp.zeros_like(state.loss))
            while int(state.step) < horizon:
                elapsed = time.monotonic() - begun
                step = int(state.step)
                progress = max(step / horizon, elapsed / budget)
                done = max((step - look.step) / horizon, (elapsed - spent) / budget)
                if step - look.step >= _FEWEST_BETWEEN and (done >= 1 / plan.looks or progress >= 1):
                    break
                # The first pieces are short, to find the pace; the very first compiles.
                piece = 1 if step < 3 else int(max(1, min(_CALL_SECONDS / pace, horizon / plan.looks)))
                piece = int(min(piece, horizon - step))
                before = time.monotonic()
                state = machine.advance(state, piece, _rate(plan, progress))
                if step:
                    pace = min(pace, (time.monotonic() - before) / piece)
    except KeyboardInterrupt:  # what was complete is kept
        ending = "interrupted"
        if not looks:
            raise
    return TrainedMap(
        params=best,
        looks=tuple(looks),
        best=min(looks, key=lambda k: k.held_out_loss),
        steps=int(state.step),
        skipped=int(state.skipped),
        frames=((0, 0), (0, 0)),
        energy_evaluations=0,
        seconds=0.0,
        ending=ending,
    )


def _rate(plan: MapPlan, progress: float) -> float:
    """Learning rate: a short rise, then a cosine to zero at the end of the budget."""
    return plan.learning_rate * min(1.0, (progress + 1e-3) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))


def _cast(tree: Any, dtype: str) -> Any:
    """Floating point leaves in another precision; the rest as it is."""

    def cast(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
