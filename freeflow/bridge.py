"""Stochastic transport: annealed Monte Carlo between a Gaussian reference and a target.

The path is u_l = (1 - l) u_A + l u_B in the reference's whitened coordinates z, where u_A is
|z|^2 / 2, so that one step size suits all modes. Every stage switches l and then takes one step
of generalised hybrid Monte Carlo: partly refreshed velocities, one kick-turn-kick step, a
Metropolis test. One stage costs one energy and gradient.

References: Jarzynski, PRE 56, 5018 (1997); Neal, Stat. Comput. 11, 125 (2001); Horowitz, Phys.
Lett. B 268, 247 (1991); Shahbaba et al., Stat. Comput. 24, 339 (2014) for the splitting; Crooks,
PRE 60, 2721 (1999) for the reverse process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from freeflow.references import Gaussian, GaussianCrystal
from freeflow.types import Configuration, Ensemble, Key, Move, Numeric, Scalar, ThermodynamicState, Transport

# Share of the velocity that survives a refreshment; see docs/method.md for the measurement.
_PERSISTENCE = math.sqrt(0.7)
_LARGEST_STEP = 1.4  # a quarter turn forgets the position altogether, and more turns it back
ACCEPTANCE = 0.85  # aimed at by the step size

# A first pilot feels its way: so many stages per segment, switches that scatter the work by no
# more than so many kT and are never longer than so much, and patience for so many segments.
_FEELER, _SWITCH_SPREAD, _LARGEST_SWITCH, _PATIENCE = 4, 0.25, 1 / 64, 500
_FIRST_STEP = 0.5


class Schedule(NamedTuple):
    """How the bridge is crossed: segments of equally spaced stages with one step size each."""

    lambdas: Float[Numeric, " n_segments+1"]  # from 0 to 1
    step_sizes: Float[Numeric, " n_segments"]  # time steps in whitened coordinates
    counts: Int[Numeric, " n_segments"]  # stages per segment


class BridgeParams(NamedTuple):
    """Where a bridge starts and how it is crossed."""

    gaussian: Gaussian
    schedule: Schedule


class Walker(NamedTuple):
    """Where one sample stands on the bridge."""

    z: Float[Array, "n_atoms 3"]
    velocity: Float[Array, "n_atoms 3"]
    u_b: Scalar  # target's reduced potential at z
    gradient: Float[Array, "n_atoms 3"]  # of u_b with respect to z
    work: Scalar  # done so far [kT], float64
    accepted: Scalar  # number of accepted steps
    stage: Int[Array, ""]  # stages taken; numbers the random draws


class Segment(NamedTuple):
    """One piece of a schedule, in the direction of travel."""

    start: Float[Numeric, "*segments"]  # a number, or one for each of a stack of segments
    stop: Float[Numeric, "*segments"]
    step_size: Float[Numeric, "*segments"]
    count: Int[Numeric, "*segments"]


@dataclass(frozen=True)
class Bridge(Transport):
    """A transport that can also be crossed piece by piece.

    `launch` draws a walker from the reference; `forward_segment` and `reverse_segment` move it
    along a `Segment`. `forward` and `reverse` do the same over the whole schedule.
    """

    launch: Callable[[Key], Walker]
    forward_segment: Callable[[Gaussian, Key, Walker, Segment, ThermodynamicState], Walker]
    reverse_segment: Callable[[Gaussian, Key, Walker, Segment, ThermodynamicState], Walker]


def bridge(recipe: GaussianCrystal, target: Ensemble, dtype: str = "float32") -> Bridge:
    """Annealed transport from a Gaussian crystal to `target`.

    Args:
        recipe: Functions of the reference's Gaussians.
        target: Ensemble of displacements whose reduced potential the stages evaluate. It may be
            cheaper than the ensemble that the work is measured against (float32, fewer
            neighbours): the work then ends with the switch from one to the other, and the estimate
            stays exact.
        dtype: Precision of the walkers; work is accumulated in float64.
    """

    def potential(gaussian: Gaussian, z: Array, state: ThermodynamicState) -> tuple[Array, Array]:
        return jax.value_and_grad(lambda z: target.reduced_potential(recipe.colour(gaussian, z), state))(z)

    def harmonic(z: Array) -> Array:
        return 0.5 * jnp.sum(jnp.square(z), dtype=jnp.float64)

    def step(gaussian, key, walker: Walker, lam, h, state) -> Walker:
        """One GHMC step that leaves u_lambda invariant."""
        key_noise, key_accept = jax.random.split(jax.random.fold_in(key, walker.stage))
        noise = recipe.noise(key_noise, dtype)
        velocity = _PERSISTENCE * walker.velocity + math.sqrt(1 - _PERSISTENCE**2) * noise
        # Kick, turn, kick: the Gaussian part of u_lambda, |z|^2 / 2 at every lambda, is integrated
        # exactly by a rotation, and only the remainder lambda (u_B - |z|^2 / 2) kicks.
        push = (0.5 * h * lam).astype(dtype)
        cosine, sine = jnp.cos(h).astype(dtype), jnp.sin(h).astype(dtype)
        kicked = velocity - push * (walker.gradient - walker.z)
        z = cosine * walker.z + sine * kicked
        u_b, gradient = potential(gaussian, z, state)
        moved = cosine * kicked - sine * walker.z - push * (gradient - z)

        def hamiltonian(u_b, z, v):
            # lam * u_b with lam = 0 must not turn an infinite energy into NaN.
            return (1 - lam) * harmonic(z) + jnp.where(lam > 0, lam * u_b, 0.0) + harmonic(v)

        rise = hamiltonian(u_b, z, moved) - hamiltonian(walker.u_b, walker.z, velocity)
        # NaN compares false: a step into nonsense is rejected.
        accept = -rise > jnp.log(jax.random.uniform(key_accept, dtype=jnp.float32))
        choose = lambda new, old: jnp.where(accept, new, old)  # noqa: E731
        return Walker(
            z=choose(z, walker.z),
            velocity=choose(moved, -velocity),
            u_b=choose(u_b, walker.u_b),
            gradient=choose(gradient, walker.gradient),
            work=walker.work,
            accepted=walker.accepted + accept,
            stage=walker.stage + 1,
        )

    def switch(walker: Walker, change: Array) -> Walker:
        increment = jnp.where(change != 0, change * (walker.u_b - harmonic(walker.z)), 0.0)
        return walker._replace(work=walker.work + increment)

    def along(segment: Segment, k: Array) -> Array:
        return segment.start + (segment.stop - segment.start) * (k / jnp.maximum(segment.count, 1))

    def forward_segment(gaussian, key, walker, segment, state) -> Walker:
        def stage(k, walker):
            lam = along(segment, k + 1)
            return step(gaussian, key, switch(walker, lam - along(segment, k)), lam, segment.step_size, state)

        return jax.lax.fori_loop(0, segment.count, stage, walker)

    def reverse_segment(gaussian, key, walker, segment, state) -> Walker:
        """The same stages backwards: first the step, then the switch."""

        def stage(k, walker):
            lam = along(segment, k)
            return switch(step(gaussian, key, walker, lam, segment.step_size, state), along(segment, k + 1) - lam)

        return jax.lax.fori_loop(0, segment.count, stage, walker)

    def at(z: Array, key: Key) -> Walker:
        # The first step, of size zero, fetches energy and gradient through the one compiled loop.
        zero = jnp.zeros((), jnp.float64)
        velocity = recipe.noise(jax.random.fold_in(key, 2**32 - 1), dtype)  # far from every stage number
        return Walker(z, velocity, zero, jnp.zeros_like(z), zero, zero, jnp.zeros((), jnp.int32))

    def launch(key: Key) -> Walker:
        return at(recipe.launch(jax.random.fold_in(key, 2**32 - 2), dtype), key)

    def cross(params: BridgeParams, key: Key, x: Configuration, state: ThermodynamicState, forward: bool) -> Move:
        gaussian = params.gaussian
        move = forward_segment if forward else reverse_segment
        z0 = recipe.whiten(gaussian, x).astype(dtype)
        walker = start = move(gaussian, key, at(z0, key), fetch_segment(), state)

        def body(walker, segment):
            return move(gaussian, key, walker, segment, state), None

        walker, _ = jax.lax.scan(body, walker, segments_of(params.schedule, forward))
        y = recipe.colour(gaussian, walker.z.astype(jnp.float64))
        # heat = change of the bridge's own potential - work, at either end of lambda.
        change = walker.u_b - harmonic(z0) if forward else harmonic(walker.z) - start.u_b
        # A sample that was switched into a wall did infinite work, wherever it is now.
        return Move(y, jnp.where(jnp.isposinf(walker.work), -jnp.inf, change - walker.work))

    def init(key, x, state):
        raise NotImplementedError("a bridge's parameters come from bridge.tune")

    return Bridge(
        init=init,
        forward=lambda params, key, x, state: cross(params, key, x, state, True),
        reverse=lambda params, key, x, state: cross(params, key, x, state, False),
        launch=launch,
        forward_segment=forward_segment,
        reverse_segment=reverse_segment,
    )


def fetch_segment() -> Segment:
    """A stage of step size zero: it moves nothing, and fetches energy and gradient.

    It stands at lambda = 0 whichever way the journey goes: there the energy that the walker does
    not know yet has no say in whether the step is accepted.
    """
    return Segment(np.float64(0.0), np.float64(0.0), np.float64(0.0), np.int32(1))


def segments_of(schedule: Schedule, forward: bool = True) -> Segment:
    """All segments of a schedule, stacked, in the direction of travel."""
    forwards = Segment(schedule.lambdas[:-1], schedule.lambdas[1:], schedule.step_sizes, schedule.counts)
    if forward:
        return forwards
    return Segment(*(x[::-1] for x in (forwards.stop, forwards.start, forwards.step_size, forwards.count)))


# ----------------------------------------------------------------------------- tuning


class Pilot(NamedTuple):
    """What a trial crossing taught: per segment, and per sample where said."""

    lambdas: np.ndarray  # (n_segments + 1,)
    counts: np.ndarray  # (n_segments,)
    step_sizes: np.ndarray  # (n_segments,)
    acceptance: np.ndarray  # (n_segments,)
    work: np.ndarray  # (n_segments, n_samples), work done in each segment [kT]
    lost: float  # share of the samples in which an atom left its site
    arrivals: np.ndarray | None = None  # (n_arrived, rows, 3) white z of the others, where they ended


class Pace:
    """Chooses the segments of a pilot as it goes, and step sizes that keep the acceptance near its aim.

    Without a schedule it takes short switches where the work would scatter, never long ones. With
    a schedule it follows that, correcting the step sizes. If told how many stages there may be, at least and at
    most, it takes as many, evenly spaced, as the scatter of the work of switching at once asks for.
    """

    def __init__(self, schedule: Schedule | None = None, stages: tuple[int, int] | None = None):
        self.lam = 0.0
        self._schedule = schedule
        self._stages = stages
        self._factor = 1.0
        self._accepted = np.ones(1)  # of the step that fetched the energy
        self._work = np.zeros(1)
        self._segments: list[Segment] = []
        self._rows: list[tuple[float, np.ndarray]] = []

    @property
    def arrived(self) -> bool:
        return self.lam >= 1.0

    def next(self, difference: np.ndarray) -> Segment:
        """The next segment, from every sample's u_B - u_A where it stands now."""
        if self._schedule is None and self._stages is not None:
            self._schedule = even_schedule(int(np.clip(_scatter(difference) ** 2, *self._stages)))
        segment = self._feel(difference) if self._schedule is None else self._follow(self._schedule)
        self._segments.append(segment)
        self.lam = float(segment.stop)
        return segment

    def _follow(self, schedule: Schedule) -> Segment:
        planned = Segment(*(part[len(self._rows)] for part in segments_of(schedule)))
        return planned._replace(step_size=np.float64(min(planned.step_size * self._factor, _LARGEST_STEP)))

    def _feel(self, difference: np.ndarray) -> Segment:
        switch = min(_LARGEST_SWITCH, _SWITCH_SPREAD / max(_scatter(difference), 1e-9))
        if len(self._rows) >= _PATIENCE:  # crossing takes too long: hurry, and let the schedule mend it
            switch *= 2.0 ** (1 + (len(self._rows) - _PATIENCE) / 20)
        stop = self.lam + _FEELER * switch
        stop = 1.0 if stop > 1.0 - 0.5 * _FEELER * switch else stop
        step = min(_FIRST_STEP * self._factor, _LARGEST_STEP)
        return Segment(np.float64(self.lam), np.float64(stop), np.float64(step), np.int32(_FEELER))

    def learn(self, work: np.ndarray, accepted: np.ndarray) -> None:
        """Book a segment from every sample's total work and accepted steps so far."""
        stages = int(self._segments[-1].count)
        share = float(np.mean(accepted - self._accepted)) / stages
        self._rows.append((share, work - self._work))
        self._work, self._accepted = work, accepted
        # Four stages of a hundred samples know the acceptance to 0.02; longer segments deserve no more.
        self._factor *= math.exp(0.8 * (share - ACCEPTANCE))

    def pilot(self, lost: float) -> Pilot:
        """All that was booked; `lost` is the share of samples that did not arrive as crystals."""
        shares, works = (np.array(column) for column in zip(*self._rows, strict=True))
        _, stops, steps, counts = (np.array(column) for column in zip(*self._segments, strict=True))
        return Pilot(np.concatenate([[0.0], stops]), counts, steps, shares, works, lost)


def _scatter(difference: np.ndarray) -> float:
    """Standard deviation of u_B - u_A without its far tail: a reference's overlaps must not stall a pilot."""
    low, high = np.quantile(difference[np.isfinite(difference)], [0.16, 0.84])
    return 0.5 * float(high - low)


def even_schedule(stages: int, n_segments: int = 16) -> Schedule:
    """Stages at equal distances in lambda, with a step size to begin with."""
    n_segments = min(n_segments, stages)
    cuts = np.linspace(0, stages, n_segments + 1).round().astype(np.int32)
    return Schedule(cuts / stages, np.full(n_segments, _FIRST_STEP), np.diff(cuts))


def friction(pilot: Pilot) -> np.ndarray:
    """Squared thermodynamic length of every pilot segment [kT * stages].

    A slow crossing dissipates var(work)/2, and a segment's share of the variance is its work's
    covariance with the whole; it falls as one over the number of stages. Shares are smoothed over
    neighbouring segments: a pilot of a hundred samples knows each to no more than some 20 %.
    """
    centred = pilot.work - pilot.work.mean(axis=1, keepdims=True)
    total = centred.sum(axis=0)
    share = (centred * total).mean(axis=1)
    width = np.diff(pilot.lambdas)
    density = share * pilot.counts / np.maximum(width, 1e-12) ** 2
    # Smooth in lambda, weighted by width, and keep away from zero and below.
    middle = 0.5 * (pilot.lambdas[1:] + pilot.lambdas[:-1])
    kernel = np.exp(-0.5 * ((middle[:, None] - middle[None]) / 0.08) ** 2) * width[None]
    smooth = kernel @ density / kernel.sum(axis=1)
    floor = 0.1 * max(float((density * width).sum()), 1e-12)
    return 0.5 * np.maximum(smooth, floor) * width**2


def thermodynamic_length(pilot: Pilot) -> float:
    """L: a crossing in K stages at constant thermodynamic speed dissipates L^2 / K [kT]."""
    return float(np.sqrt(friction(pilot)).sum())


def schedule_from(pilot: Pilot, stages: int, n_segments: int = 32) -> Schedule:
    """Stages at equal thermodynamic distance, in segments, with step sizes from the pilot's acceptance."""
    distance = np.concatenate([[0.0], np.cumsum(np.sqrt(friction(pilot)))])
    n_segments = min(n_segments, stages)
    cuts = np.linspace(0.0, stages, n_segments + 1).round().astype(np.int32)
    lambdas = np.interp(cuts / stages, distance / distance[-1], pilot.lambdas)
    lambdas[0], lambdas[-1] = 0.0, 1.0
    middle = 0.5 * (pilot.lambdas[1:] + pilot.lambdas[:-1])
    # The logarithm of the step size is smooth in lambda; a quadratic takes out the controller's noise.
    degree = 2 if len(middle) > 6 else 0
    fit = np.polynomial.Polynomial.fit(middle, np.log(pilot.step_sizes), degree, w=np.sqrt(np.diff(pilot.lambdas)))
    steps = np.exp(fit(0.5 * (lambdas[1:] + lambdas[:-1])))
    return Schedule(lambdas, steps, np.diff(cuts))
