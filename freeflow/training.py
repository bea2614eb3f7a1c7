"""Losses, the trainer as pure functions, and the loop that runs it.

A flow is trained on the generalised work itself: its mean over fresh samples of the reference is the
reverse Kullback-Leibler divergence up to a constant, and an upper bound of the free energy. That
takes no data. With configurations of the target there are the forward divergence and the sum of both.

Step k draws its random numbers from (seed, k) alone, and all else that it needs is in a `TrainState`:
training that was cut off and goes on is the same, bit for bit, as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from freeflow.errors import FreeflowError, InputError
from freeflow.estimators.diagnostics import effective_sample_size
from freeflow.flows import Flow, starting_from
from freeflow.references import Gaussian
from freeflow.types import (
    Configuration,
    Ensemble,
    Key,
    Numeric,
    Params,
    Scalar,
    System,
    ThermodynamicState,
    TrainingPlan,
)

DEFAULT_STEPS = 2_000
_STREAM = 0x666C6F77  # keeps training away from the random numbers of an estimate with the same seed
_WILD = 10.0  # work so many spreads above the median counts by its logarithm
_WARM_UP = (1 / 20, 100)  # of the horizon, steps at most
_MEMORY = 0.98  # of the usual gradient norm
_EVALUATIONS = 30  # in a whole run
_FEWEST_BETWEEN = 10  # steps from one evaluation to the next
_EVALUATION_SAMPLES = 256
_CALL_SECONDS = 0.5  # steps are handed to the device in pieces of about this length
_TIMING_SECONDS = 1.0

Frames = Any  # configurations of the target in the flow's coordinates, stacked on a leading axis
WorkFn = Callable[[Params, Any, ThermodynamicState], Scalar]
LossFn = Callable[[Params, Array, Frames, ThermodynamicState], Scalar]  # (params, keys, frames, state) [kT]

# ------------------------------------------------------------------------------ work of one sample


def forward_work(flow: Flow, target: Ensemble) -> WorkFn:
    """Work of carrying one sample of the reference to `target`, `(params, key, state) -> w` [kT].

    The sample takes the precision of `state.beta`.
    """

    def work(params: Params, key: Key, state: ThermodynamicState) -> Scalar:
        x = flow.reference.sample(key, state)
        y, log_det = flow.bijector.forward(params, x, state)
        return target.reduced_potential(y, state) - flow.reference.reduced_potential(x, state) - log_det

    return work


def path_work(flow: Flow, target: Ensemble) -> WorkFn:
    """The same number as `forward_work` with another gradient: through the sample's path alone.

    The flow's density is evaluated by its inverse, with parameters held fixed. What that leaves out of
    the gradient has mean zero, and the gradient's variance vanishes where the flow is exact. It takes up to
    twice the time, and pays: after 23 s on two cores the residual flow of mw_cubic_64 had a work variance of
    0.50 instead of 1.43 kT^2.

    References: Roeder, Wu and Duvenaud, NeurIPS (2017); Vaitl, Nicoli, Nakajima and Kessel, Mach.
        Learn.: Sci. Technol. 3, 045006 (2022).
    """

    def work(params: Params, key: Key, state: ThermodynamicState) -> Scalar:
        y, _ = flow.bijector.forward(params, flow.reference.sample(key, state), state)
        x, log_det = flow.bijector.inverse(jax.lax.stop_gradient(params), y, state)
        return target.reduced_potential(y, state) - flow.reference.reduced_potential(x, state) + log_det

    return work


def reverse_work(flow: Flow, target: Ensemble) -> WorkFn:
    """Work of carrying one sample of `target` back to the reference, `(params, y, state) -> w` [kT]."""

    def work(params: Params, y: Configuration, state: ThermodynamicState) -> Scalar:
        x, log_det = flow.bijector.inverse(params, y, state)
        return flow.reference.reduced_potential(x, state) - target.reduced_potential(y, state) - log_det

    return work


# ------------------------------------------------------------------------------ losses of one batch


def tamed(work: Float[Array, " n"]) -> Float[Array, " n"]:
    """Work of a batch [kT] with what is wildly large replaced by its logarithm.

    Linear up to t, ten spreads above the median, and t + ln(1 + w - t) above: value and slope are
    continuous. The spread is the root mean square deviation of the half below the median, at least
    1 kT: it does not see the clashes that it is there to tame.
    """
    median = jnp.median(work)
    below = jnp.minimum(work - median, 0.0)
    spread = jnp.maximum(jnp.sqrt(2 * jnp.mean(below * below)), 1.0)
    top = jax.lax.stop_gradient(median + _WILD * spread)
    return jnp.where(work > top, top + jnp.log1p(jnp.maximum(work - top, 0.0)), work)


def reverse_kl(flow: Flow, path_gradient: bool = False) -> LossFn:
    """Mean work of fresh reference samples: the LFEP loss, KL(flow || target) up to a constant.

    References: Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020).
    """
    one = (path_work if path_gradient else forward_work)(flow, flow.training_target)

    def loss(params: Params, keys: Array, frames: Frames, state: ThermodynamicState) -> Scalar:
        return jnp.mean(tamed(jax.vmap(one, (None, 0, None))(params, keys, state)))

    return loss


def forward_kl(flow: Flow) -> LossFn:
    """Mean of u_A(f^-1(y)) - ln|det df^-1/dy| over frames of the target: KL(target || flow) up to a constant.

    That is maximum likelihood; the energy of the target is not asked for.
    """
    one = reverse_work(flow, Ensemble(lambda y, state: jnp.zeros((), state.beta.dtype)))

    def loss(params: Params, keys: Array, frames: Frames, state: ThermodynamicState) -> Scalar:
        return jnp.mean(tamed(jax.vmap(one, (None, 0, None))(params, frames, state)))

    return loss


def lbar(flow: Flow) -> LossFn:
    """Mean forward work of reference samples plus mean reverse work of frames: the LBAR loss.

    It is the sum of both divergences, without the unknown constant: 0 where the flow is exact.

    References: Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020).
    """
    there = reverse_kl(flow)
    back = reverse_work(flow, flow.training_target)

    def loss(params: Params, keys: Array, frames: Frames, state: ThermodynamicState) -> Scalar:
        reverse = jax.vmap(back, (None, 0, None))(params, frames, state)
        return there(params, keys, frames, state) + jnp.mean(tamed(reverse))

    return loss


LOSSES: Mapping[str, Callable[[Flow], LossFn]] = {
    "reverse_kl": reverse_kl,
    "path_gradient": lambda flow: reverse_kl(flow, path_gradient=True),
    "forward_kl": forward_kl,
    "lbar": lbar,
}
FROM_FRAMES = {"forward_kl", "lbar"}


class Family(NamedTuple):
    """States in which one set of parameters is trained: a crystal at several temperatures."""

    flow: Flow
    gaussians: Gaussian  # of each state, stacked
    states: ThermodynamicState  # stacked


def over_states(families: Sequence[Family], loss: Callable[[Flow], LossFn]) -> LossFn:
    """Mean loss of all states of all families; each state has the same share of the batch, and frames have no part."""
    n_states = sum(len(family.states.beta) for family in families)

    def mean(params: Params, keys: Array, frames: Frames, state: ThermodynamicState) -> Scalar:
        each = len(keys) // n_states
        total, first = jnp.zeros(()), 0
        for family in families:
            n = len(family.states.beta)
            own = keys[first * each : (first + n) * each].reshape(n, each)
            first += n

            def one(gaussian: Gaussian, at: ThermodynamicState, some: Array, flow: Flow = family.flow) -> Scalar:
                return loss(starting_from(flow, gaussian))(params, some, None, at)

            total = total + jnp.sum(jax.vmap(one)(family.gaussians, _cast(family.states, state.beta.dtype.name), own))
        return total / n_states

    return mean


def works_of(family: Family, params: Params, seed: int, n_samples: int = 256) -> Float[np.ndarray, "n_states n"]:
    """Forward work of fresh samples in every state of a family [kT], in float64.

    Args:
        family: The states of one flow.
        params: Its parameters.
        seed: Of the random numbers.
        n_samples: In every state.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), _STREAM + 1), n_samples)

    @jax.jit
    def works(gaussian: Gaussian, state: ThermodynamicState) -> Array:
        flow = starting_from(family.flow, gaussian)
        one = forward_work(flow, flow.target)
        return jax.lax.map(lambda key: one(_cast(params, "float64"), key, state), keys, batch_size=32)

    n = len(family.states.beta)
    stacked = [jax.tree.map(lambda leaf, k=k: leaf[k], (family.gaussians, family.states)) for k in range(n)]
    return np.stack([np.asarray(works(gaussian, state)) for gaussian, state in stacked])


# ------------------------------------------------------------------------------ the trainer


class TrainState(NamedTuple):
    """All that the next step depends on, besides the seed."""

    params: Params
    average: Params  # running average of `params`: what is evaluated and used
    moments: Any  # of the optimiser
    usual_norm: Scalar  # running average of the gradient's norm; 0 before the first step
    step: Int[Numeric, ""]  # steps taken
    horizon: Int[Numeric, ""]  # steps after which the learning rate is zero
    skipped: Int[Numeric, ""]  # steps left out because loss or gradient were not finite
    used: Int[Numeric, ""]  # other steps since the last evaluation
    loss: Scalar  # their sum [kT]


@dataclass(frozen=True)
class Trainer:
    """Training as pure functions, to be called inside `double_precision`.

    `step(state, frames)` is one step, `advance(state, n, frames)` n of them in one call;
    `evaluate(params, k)` is the work (n_samples,) [kT] of fresh samples that belong to step k, against
    the exact target and in float64. Frames are None where the loss needs none.
    """

    init: Callable[[], TrainState]
    step: Callable[[TrainState, Frames], TrainState]
    advance: Callable[[TrainState, Int[Numeric, ""], Frames], TrainState]
    evaluate: Callable[[Params, Int[Numeric, ""]], Float[Array, " n_samples"]]


def learning_rate(plan: TrainingPlan, step: Int[Numeric, ""], horizon: Int[Numeric, ""]) -> Scalar:
    """Linear warm-up over a twentieth of the horizon, at most 100 steps, times a cosine to zero."""
    k, end = jnp.asarray(step, "float32"), jnp.maximum(jnp.asarray(horizon, "float32"), 1.0)
    rise = jnp.minimum((k + 1) / jnp.clip(_WARM_UP[0] * end, 1.0, _WARM_UP[1]), 1.0)
    return plan.learning_rate * rise * 0.5 * (1 + jnp.cos(math.pi * jnp.minimum(k / end, 1.0)))


def trainer(
    flow: Flow,
    state: ThermodynamicState,
    plan: TrainingPlan,
    seed: int,
    dtype: str = "float32",
    families: Sequence[Family] = (),
) -> Trainer:
    """Adam on a loss of the flow.

    The batch is spread over all local devices. A gradient longer than `plan.clip` times its usual
    norm is cut to that; one that is not finite is skipped, and counted.

    Args:
        flow: What to train.
        state: Where in the phase diagram.
        plan: How. The batch is rounded up to a multiple of the devices.
        seed: Of initial parameters, batches and evaluations.
        dtype: Of parameters and of the samples in training.
        families: States to train in, if these are several; `state` is where the flow is evaluated on the way.

    Raises:
        InputError: If there is no such loss, or it cannot be used with several states.
    """
    if plan.loss not in LOSSES:
        raise InputError(f"training.loss: no loss {plan.loss!r}; use one of {', '.join(LOSSES)}")
    n_states = sum(len(family.states.beta) for family in families)
    if families and plan.loss in FROM_FRAMES:
        raise InputError(f"training.loss: {plan.loss} learns from frames of one state; use path_gradient or reverse_kl")
    if n_states > plan.batch_size:
        raise InputError(
            f"training.batch_size: at least one sample in each of {n_states} states, got {plan.batch_size}"
        )
    loss = over_states(families, LOSSES[plan.loss]) if families else LOSSES[plan.loss](flow)
    import optax

    optimiser = optax.scale_by_adam()
    root = jax.random.fold_in(jax.random.key(seed), _STREAM)
    key_init, key_step, key_evaluation = (jax.random.fold_in(root, stream) for stream in range(3))
    batch = _whole_batch(plan)

    def init() -> TrainState:
        at = _cast(state, dtype)
        params = _cast(flow.bijector.init(key_init, flow.reference.sample(key_init, at), at), dtype)
        none, nought = jnp.zeros((), "int32"), jnp.zeros((), "float32")
        return TrainState(
            params=params,
            average=params,
            moments=optimiser.init(params),
            usual_norm=nought,
            step=none,
            horizon=none,
            skipped=none,
            used=none,
            loss=jnp.zeros((), "float64"),
        )

    def step(old: TrainState, frames: Frames) -> TrainState:
        key_batch, key_frames = jax.random.split(jax.random.fold_in(key_step, old.step))
        keys = _spread(jax.random.split(key_batch, batch))
        some = _drawn(key_frames, frames, batch, dtype) if plan.loss in FROM_FRAMES else None
        value, gradient = jax.value_and_grad(loss)(old.params, keys, some, _cast(state, dtype))
        norm = optax.tree.norm(gradient)
        sound = jnp.isfinite(value) & jnp.isfinite(norm)
        limit = jnp.where(old.usual_norm > 0, plan.clip * old.usual_norm, norm)
        shrink = jnp.where(norm > limit, limit / norm, 1.0)
        updates, moments = optimiser.update(jax.tree.map(lambda g: g * shrink, gradient), old.moments)
        rate = learning_rate(plan, old.step, old.horizon)
        params = jax.tree.map(lambda p, change: p - rate * change, old.params, updates)
        share = jnp.minimum(plan.average, (1 + old.step) / (10 + old.step))  # a young average forgets fast
        fresh = jnp.minimum(norm, limit)
        new = old._replace(
            params=params,
            average=jax.tree.map(lambda mean, p: share * mean + (1 - share) * p, old.average, params),
            moments=moments,
            usual_norm=jnp.where(old.usual_norm > 0, _MEMORY * old.usual_norm + (1 - _MEMORY) * fresh, fresh),
            used=old.used + 1,
            loss=old.loss + value,
        )
        new = jax.tree.map(lambda a, b: jnp.where(sound, a, b).astype(b.dtype), new, old)
        return new._replace(step=old.step + 1, skipped=old.skipped + jnp.where(sound, 0, 1).astype("int32"))

    def advance(old: TrainState, steps: Int[Numeric, ""], frames: Frames) -> TrainState:
        # As many rounds as it is told at run time: however the steps are cut up, they are the same code.
        return jax.lax.fori_loop(0, steps, lambda _, at: step(at, frames), old)

    def evaluate(params: Params, index: Int[Numeric, ""]) -> Array:
        one = forward_work(flow, flow.target)
        keys = jax.random.split(jax.random.fold_in(key_evaluation, index), (-(-_EVALUATION_SAMPLES // batch), batch))

        def work(some: Array) -> Array:
            return jax.vmap(one, (None, 0, None))(_cast(params, "float64"), _spread(some), _cast(state, "float64"))

        return jax.lax.map(work, keys).reshape(-1)

    return Trainer(init, step, advance, evaluate)


def _whole_batch(plan: TrainingPlan) -> int:
    """The plan's batch, rounded up to a multiple of the local devices."""
    devices = jax.local_device_count()
    return -(-plan.batch_size // devices) * devices


def _cast(tree: Any, dtype: str) -> Any:
    """Floating point leaves in another precision; the rest as it is."""

    def cast(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _spread(keys: Array) -> Array:
    """Keys of a batch (n,), one share for each local device."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return keys
    mesh = Mesh(np.array(devices), ("samples",))
    return jax.lax.with_sharding_constraint(keys, NamedSharding(mesh, PartitionSpec("samples")))


def _drawn(key: Key, frames: Frames, batch: int, dtype: str) -> Frames:
    """A batch of frames, drawn with replacement."""
    index = jax.random.randint(key, (batch,), 0, jax.tree.leaves(frames)[0].shape[0])
    return _cast(jax.tree.map(lambda leaf: leaf[index], frames), dtype)


# ------------------------------------------------------------------------------ what evaluations say

Metrics = dict[str, Any]  # of one evaluation; a line of metrics.jsonl


class Baseline(NamedTuple):
    """What leads from work to the free energy of a crystal."""

    constant: float  # beta F - delta F [kT]
    n_atoms: int


def baseline(flow: Flow, constants: Mapping[str, float], n_atoms: int, state: ThermodynamicState) -> Baseline:
    """The constant that the mean forward work is added to for an upper bound of beta F [kT].

    Args:
        flow: Whose reference the work starts from.
        constants: Contributions outside the integral, as in `System` [kT].
        n_atoms: Of the crystal.
        state: Where in the phase diagram.
    """
    log_partition = float(flow.reference.log_partition(state))
    return Baseline(math.fsum(constants.values()) - log_partition - flow.log_measure, n_atoms)


def measure(work: Float[np.ndarray, " n"], base: Baseline) -> Metrics:
    """What the work of fresh samples [kT] says: the Gibbs-Bogoliubov bound of beta F, and the weights.

    Samples of infinite work, in which an atom has left its site, have weight 0. They are counted, and
    left out of the bound. What cannot be estimated is None.
    """
    found = np.isfinite(work)
    metrics: Metrics = {"lost_fraction": float(1 - found.mean()), "ess_fraction": 0.0}
    metrics |= dict.fromkeys(("bound_per_atom", "bound_std_error", "work_variance"))
    if found.sum() > 1:
        finite, n = work[found], base.n_atoms
        metrics["ess_fraction"] = effective_sample_size(np.where(found, -work, -np.inf)) / len(work)
        metrics["bound_per_atom"] = (base.constant + float(finite.mean())) / n
        metrics["bound_std_error"] = float(finite.std(ddof=1)) / math.sqrt(len(finite)) / n
        metrics["work_variance"] = float(finite.var(ddof=1))
    return metrics


def on_plateau(metrics: Sequence[Metrics], min_gain: float) -> bool:
    """Whether training has stopped gaining: `min_gain` [kT, whole crystal], 0 for never.

    The losses that training saw between evaluations are averaged over the last ten stretches, a third
    of a full run, and over the ten before. The rule says stop where the gain plus two standard errors
    is below `min_gain`. Noise is what remains of a window about its own straight line.
    """
    losses = np.array([line["training_loss"] for line in metrics if line["training_loss"] is not None])
    window = _EVALUATIONS // 3
    if min_gain <= 0 or len(losses) < 2 * window:
        return False
    before, last = losses[-2 * window : -window], losses[-window:]
    error = math.hypot(_scatter(before), _scatter(last)) / math.sqrt(window)
    return bool(before.mean() - last.mean() + 2 * error < min_gain)


def _scatter(values: np.ndarray) -> float:
    """Standard deviation of a drifting series about its own straight line."""
    k = np.arange(len(values))
    rest = values - np.polyval(np.polyfit(k, values, 1), k)
    return math.sqrt(float(rest @ rest) / (len(values) - 2))


# ------------------------------------------------------------------------------ the loop


class Compiled(NamedTuple):
    """A trainer's two programs, compiled, with the frames put in."""

    advance: Callable[[TrainState, int], TrainState]
    evaluate: Callable[[Params, int], np.ndarray]


def compile_trainer(trainer: Trainer, frames: Frames = None) -> Compiled:
    """Compile now, so that later times are those of running."""
    frames = jax.tree.map(jnp.asarray, frames)
    like, number = jax.eval_shape(trainer.init), jax.ShapeDtypeStruct((), np.dtype("int32"))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)  # not weakly typed
    advance = jax.jit(trainer.advance).lower(like, number, frames).compile()
    evaluate = jax.jit(trainer.evaluate).lower(like.average, number).compile()
    return Compiled(
        lambda state, steps: jax.block_until_ready(advance(state, np.int32(steps), frames)),
        lambda params, index: np.asarray(evaluate(params, np.int32(index))),
    )


class Session(NamedTuple):
    """Training as it stands; with the flow, all that a checkpoint holds."""

    state: TrainState
    metrics: tuple[Metrics, ...] = ()
    seconds: float = 0.0  # spent so far, in earlier sessions too


class Limits(NamedTuple):
    """What ends a session before its horizon; it can be taken up again."""

    deadline: float = math.inf  # of `time.monotonic()`
    max_step: float = math.inf


Ending = Literal["finished", "plateau", "time_limit", "step_limit", "interrupted"]


def begin(
    trainer: Trainer, compiled: Compiled, plan: TrainingPlan, base: Baseline, budget_ends: float = math.inf
) -> Session:
    """A new session: initial parameters, their evaluation, and the horizon.

    The horizon is `plan.max_steps`, or the steps that fit, by a measured time of one step, before
    `budget_ends`, of `time.monotonic()`; the fewer where there are both, 2000 where there is neither.

    Args:
        trainer: Makes the steps.
        compiled: The same, compiled.
        plan: How long.
        base: Leads from work to the free energy.
        budget_ends: When training must be over, by `time.monotonic()`.
    """
    state = jax.block_until_ready(jax.jit(trainer.init)())
    begun = time.monotonic()
    work = compiled.evaluate(state.average, 0)
    evaluation_seconds = time.monotonic() - begun
    horizon = plan.max_steps or (DEFAULT_STEPS if math.isinf(budget_ends) else 2**31 - 1)
    if math.isfinite(budget_ends):
        each = _seconds_per_step(compiled, state)
        left = budget_ends - time.monotonic() - (_EVALUATIONS + 1) * evaluation_seconds
        horizon = min(horizon, max(int(left / each), _FEWEST_BETWEEN))
    state = state._replace(horizon=jnp.asarray(horizon, "int32"))
    seconds = time.monotonic() - begun
    return Session(state, (_line(state, measure(work, base), plan, seconds),), seconds)


def _seconds_per_step(compiled: Compiled, state: TrainState) -> float:
    """Wall time of one step; the steps taken to find it are forgotten."""
    steps = 1
    while True:
        begun = time.perf_counter()
        compiled.advance(state, steps)
        elapsed = time.perf_counter() - begun
        if elapsed >= _TIMING_SECONDS / 2:
            return elapsed / steps
        steps = max(2 * steps, min(8 * steps, int(steps * _TIMING_SECONDS / elapsed)))


def interval(horizon: int) -> int:
    """Steps from one evaluation to the next."""
    return max(_FEWEST_BETWEEN, -(-horizon // _EVALUATIONS))


def run(
    session: Session,
    compiled: Compiled,
    plan: TrainingPlan,
    base: Baseline,
    limits: Limits = Limits(),  # noqa: B008  (immutable)
    watch: Callable[[Session], None] = lambda _: None,
) -> tuple[Session, Ending]:
    """Train until the horizon, a plateau, a limit, or Ctrl-C.

    Evaluations stand at fixed steps, so that a plateau does not depend on where sessions began.

    Args:
        session: Where to begin.
        compiled: The trainer, compiled.
        plan: How to train.
        base: For the bound.
        limits: When to end before the horizon.
        watch: Called with where things stand, about twice a second and after every evaluation.

    Raises:
        FreeflowError: If no step of a stretch between two evaluations was finite.
    """
    begun = time.monotonic() - session.seconds
    horizon = int(session.state.horizon)
    every = interval(horizon)
    piece, pace = 1, math.inf
    try:
        while True:
            state, k = session.state, int(session.state.step)
            if session.metrics[-1]["step"] < k and (k % every == 0 or k >= horizon):
                if int(state.used) == 0:
                    raise FreeflowError(
                        f"training: none of the last {every} steps had a finite energy and gradient; "
                        "try a lower learning rate, or another architecture"
                    )
                work = compiled.evaluate(state.average, k)
                seconds = time.monotonic() - begun
                line = _line(state, measure(work, base), plan, seconds)
                fresh = state._replace(used=jnp.zeros_like(state.used), loss=jnp.zeros_like(state.loss))
                session = Session(fresh, (*session.metrics, line), seconds)
                watch(session)
            if k >= horizon:
                return session, "finished"
            if on_plateau(session.metrics, plan.min_gain):
                return session, "plateau"
            if k >= limits.max_step:
                return session, "step_limit"
            if time.monotonic() >= limits.deadline:
                return session, "time_limit"
            steps = int(min(piece, every - k % every, horizon - k, limits.max_step - k))
            before = time.monotonic()
            state = compiled.advance(session.state, steps)
            session = session._replace(state=state, seconds=time.monotonic() - begun)
            pace = min(pace, (time.monotonic() - before) / steps)
            piece = max(int(_CALL_SECONDS / pace), 1)
            watch(session)
    except KeyboardInterrupt:  # what was complete is kept: sessions are replaced, never changed
        return session, "interrupted"


def _line(state: TrainState, measured: Metrics, plan: TrainingPlan, seconds: float) -> Metrics:
    used = int(state.used)
    return {
        "step": int(state.step),
        "seconds": round(seconds, 3),
        **measured,
        "training_loss": float(state.loss) / used if used else None,
        "learning_rate": float(learning_rate(plan, np.asarray(state.step), np.asarray(state.horizon))),
        "gradient_norm": float(state.usual_norm),
        "skipped_steps": int(state.skipped),
    }


def frames_of(flow: Flow, displacements: Float[np.ndarray, "n_frames n_atoms 3"]) -> Frames:
    """Samples of the target in the coordinates that a flow trains in, in float32; to be called in double precision."""
    return _cast(jax.vmap(flow.coordinates)(jnp.asarray(displacements)), "float32")


def train_flow(
    flow: Flow,
    system: System,
    plan: TrainingPlan,
    seed: int,
    watch: Callable[[Session], None] = lambda _: None,
    frames: Frames = None,
) -> Session:
    """Train from the beginning to the end of the schedule, in memory; to be called in double precision.

    Args:
        flow: What to train.
        system: What it is for.
        plan: How.
        seed: Of the random numbers.
        watch: Told of every evaluation.
        frames: Samples of the target, for losses that need them.

    Raises:
        KeyboardInterrupt: If interrupted: half a training is of no use to the estimate that waits for it.
    """
    begun = time.monotonic()
    made = trainer(flow, system.state, plan, seed)
    compiled = compile_trainer(made, frames)
    base = baseline(flow, system.constants, system.n_atoms, system.state)
    ends = math.inf if plan.max_minutes is None else begun + 60 * plan.max_minutes
    session = begin(made, compiled, plan, base, ends)
    session, ending = run(session, compiled, plan, base, watch=watch)
    if ending == "interrupted":
        raise KeyboardInterrupt
    return session


def energy_evaluations(session: Session, plan: TrainingPlan) -> int:
    """Energies, and gradients with them, that training has evaluated."""
    batch = _whole_batch(plan)
    tests = -(-_EVALUATION_SAMPLES // batch) * batch
    return int(session.state.step) * batch + len(session.metrics) * tests
