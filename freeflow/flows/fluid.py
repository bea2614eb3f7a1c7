"""Maps of a fluid around a solute that grows: a velocity field of the solvent, integrated along the way.

A field v(x) moves all atoms while the solute goes from A to B, dx/dl = v. It is exactly permutation-equivariant,
periodic, and as symmetric as the cube, and made of three layers:

- what every atom does by itself: away from the solute's images, and along the gradients of cubic waves in the box;
- what neighbours do to it: where they would come closer or part, each gives way along the bond,
  v_i += sum_j a(r) n [n . (w(x_j) - w(x_i))], with n the bond's direction and w a field of cubic waves;
- the same once more with what this gives in place of w: a push is handed on to the next neighbour.

The field is linear in its parameters, some eighty numbers. Its divergence is a pair sum too, and costs what v costs.

Which field? On the way the density exp(-u_l) / Z_l is carried exactly where du_l/dl = const + div v - v . grad u_l,
and what is left over is work that the map still costs (Vaikuntanathan and Jarzynski, PRL 100, 190601, 2008). Its
variance over samples of A and B, or of states between them, is quadratic in the parameters: the best ones follow from
linear algebra in seconds (`fit`), and no map is integrated.

`torus_flow` is the flow of Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020): circular splines of some axes given
the others, with a transformer as conditioner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from freeflow.bijectors import chain, whitened
from freeflow.errors import InputError
from freeflow.flows.atomic_solids import axis_flow
from freeflow.types import Bijector, Key, Params, Scalar, ThermodynamicState

# Wave vectors in units of 2 pi / L, one of each star.
_WAVES = ((1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 0, 0), (2, 1, 0), (2, 1, 1))
_PAIR_CENTRES, _PAIR_START, _PAIR_SPACING, _PAIR_END = 6, 0.90, 0.11, 1.75  # in core diameters; the end at most
_HOP_CENTRES, _HOP_START, _HOP_SPACING = 2, 1.06, 0.17
_SHELL_CENTRES = 13
_PARTNERS = 32  # of an atom, at most; a dense liquid has 14 within reach
_ALL_ATOMS = 400  # up to so many, all of them are partners without being looked up
_AXES = {"waves": 1, "shells": 1, "pairs": 1, "neighbours": 2, "hops": 3}  # of a parameter


@dataclass(frozen=True)
class FieldShape:
    """What a field's functions know of the system."""

    box_length: float  # [length]
    shell_start: float  # centre of the first shell around the solute [length]
    shell_spacing: float  # and width of each [length]
    core: float  # diameter of the solvent's core [length]
    hops: bool = True

    @property
    def shell_end(self) -> float:
        """Where shells end: up to here the nearest solute and the next one along each axis are all there are."""
        return self.box_length / math.sqrt(2)

    @property
    def pair_end(self) -> float:
        """Where neighbours no longer matter to each other [length].

        Not beyond half the box: there the nearest image of a partner becomes another one, and what had not ended would
        jump. A map with a jump tears the liquid or folds it, and no log det tells.
        """
        return min(_PAIR_END * self.core, self.box_length / 2)


def field_shape(box_length: float, radii: tuple[float, float], core: float, hops: bool = True) -> FieldShape:
    """Functions that resolve the surface of a solute of these radii, and the solvent's first shell.

    Args:
        box_length: Edge of the cubic box [length].
        radii: Of the solute in A and B [length].
        core: Distance at which a pair of solvent atoms has about 1 kT [length].
        hops: Whether pushes are handed on to the next neighbour.

    Raises:
        InputError: If a length is impossible.
    """
    if not (box_length > 0 and core > 0):
        raise InputError(f"map: box edge {box_length:g} and core diameter {core:g} must be positive")
    if not 0 <= min(radii) <= max(radii) < box_length / math.sqrt(2):
        raise InputError(f"map: solute radii {radii[0]:g} and {radii[1]:g} do not fit into a box of {box_length:g}")
    end = box_length / math.sqrt(2)
    # The field must vanish at the solute's centre, where it has no direction.
    start = max(0.92 * min(radii), 0.2 * end)
    return FieldShape(float(box_length), start, (0.98 * end - start) / _SHELL_CENTRES, float(core), hops)


def no_motion(shape: FieldShape) -> dict[str, np.ndarray]:
    """Parameters of the field that moves nothing, in float64."""
    sizes = {
        "waves": (len(_WAVES),),
        "shells": (_SHELL_CENTRES,),
        "pairs": (_PAIR_CENTRES,),
        "neighbours": (_PAIR_CENTRES, len(_WAVES)),
    }
    if shape.hops:
        sizes["hops"] = (_HOP_CENTRES, _HOP_CENTRES, len(_WAVES))
    return {name: np.zeros(size) for name, size in sizes.items()}


# ------------------------------------------------------------------------------ functions of one atom


class _Waves(NamedTuple):
    """Cubic waves at every atom: first and second derivatives, stacked over wave vectors."""

    gradient: Array  # (n_waves, 3, n, batch)
    hessian: Array  # (n_waves, 6, n, batch); xx, yy, zz, yz, xz, xy


def _waves(x: Float[Array, "3 n batch"], box_length: float) -> _Waves:
    """Sums of cos(h x) cos(k y) cos(l z) over permutations of (h, k, l), scaled to gradients of about one."""
    q = 2 * math.pi / box_length
    cos, sin = [jnp.ones_like(x), jnp.cos(q * x)], [jnp.zeros_like(x), jnp.sin(q * x)]
    cos.append(2 * cos[1] * cos[1] - 1)
    sin.append(2 * sin[1] * cos[1])
    gradients, hessians = [], []
    for star in _WAVES:
        members = sorted(set(itertools.permutations(star)))
        scale = 1 / (q * math.sqrt(len(members) * sum(h * h for h in star)))
        gradient: list[Any] = [0.0] * 3
        hessian: list[Any] = [0.0] * 6
        for member in members:
            c = [cos[h][axis] for axis, h in enumerate(member)]
            s = [-q * h * sin[h][axis] for axis, h in enumerate(member)]
            for axis in range(3):
                j, k = (axis + 1) % 3, (axis + 2) % 3
                rest = scale * c[j] * c[k]
                gradient[axis] = gradient[axis] + s[axis] * rest
                hessian[axis] = hessian[axis] - (q * member[axis]) ** 2 * c[axis] * rest
                hessian[3 + axis] = hessian[3 + axis] + scale * c[axis] * s[j] * s[k]
        gradients.append(jnp.stack(gradient))
        hessians.append(jnp.stack(hessian))
    return _Waves(jnp.stack(gradients), jnp.stack(hessians))


def _bumps(
    r: Float[Array, "n batch"], n: int, start: float, spacing: float, end: float
) -> tuple[Float[Array, "k n batch"], Float[Array, "k n batch"]]:
    """Gaussians on an even grid, smoothly cut off at `end`, and their derivatives; r must not exceed `end`."""
    t = ((r - start) / spacing)[None] - jnp.arange(n, dtype=r.dtype)[:, None, None]
    rest = (1 - (r / end) ** 2)[None]
    value = jnp.exp(-t * t) * rest * rest
    return value * rest, value * (-2 / spacing * t * rest - (6 / end**2) * r[None])


def _shells(x: Float[Array, "3 n batch"], weights: Array, shape: FieldShape) -> tuple[Array, Array]:
    """Away from the solute: velocity (3, n, batch) and divergence (n, batch); weights are (n_shells, 1, 1 or batch)."""
    box, end = shape.box_length, shape.shell_end
    near = x - box * jnp.round(x / box)
    velocity, divergence = jnp.zeros_like(x), jnp.zeros_like(x[0])
    for axis in (None, 0, 1, 2):
        d = near
        if axis is not None:  # the next image along an axis
            d = d - jnp.stack([box * jnp.where(near[k] < 0, -1.0, 1.0) * (k == axis) for k in range(3)]).astype(x.dtype)
        r2 = jnp.sum(d * d, axis=0)
        inside = r2 < end**2
        r = jnp.sqrt(jnp.where(inside, jnp.maximum(r2, (1e-3 * end) ** 2), end**2))
        values, slopes = _bumps(r, _SHELL_CENTRES, shape.shell_start, shape.shell_spacing, end)
        speed, slope = jnp.sum(weights * values, axis=0), jnp.sum(weights * slopes, axis=0)
        velocity = velocity + (speed / r)[None] * d
        divergence = divergence + slope + 2 * speed / r
    return velocity, divergence


# ------------------------------------------------------------------------------ the field


def _mixed(weights: Array, fields: Array) -> Array:
    """Fields (n_waves, c, n, batch) in proportions (..., n_waves, 1 or batch): (..., c, n, batch)."""
    spread = weights[..., :, None, None, :]
    return jnp.sum(spread * fields.reshape((1,) * (spread.ndim - fields.ndim) + fields.shape), axis=-4)


def _dot(n: list[Array], v: Float[Array, "*k 3 n batch"]) -> Float[Array, "*k n batch"]:
    """n . v for one bond of every atom and any number of vectors; `n` is three of (..., n, batch)."""
    return n[0] * v[..., 0, :, :] + n[1] * v[..., 1, :, :] + n[2] * v[..., 2, :, :]


def _times(h: Float[Array, "*k 6 n batch"], n: list[Array]) -> list[Array]:
    """H n for symmetric matrices, six components each: xx, yy, zz, yz, xz, xy."""
    xx, yy, zz, yz, xz, xy = (h[..., c, :, :] for c in range(6))
    return [xx * n[0] + xy * n[1] + xz * n[2], xy * n[0] + yy * n[1] + yz * n[2], xz * n[0] + yz * n[1] + zz * n[2]]


def _quadratic(n: list[Array], h: Float[Array, "*k 6 n batch"]) -> Float[Array, "*k n batch"]:
    """n . H n."""
    return sum((a * b for a, b in zip(n, _times(h, n), strict=True)), jnp.zeros((), h.dtype))


def partners(x: Float[Array, "3 n batch"], shape: FieldShape) -> tuple[Int[Array, "slots n batch"], Array]:
    """Nearest atoms of every atom, and by how much the nearest one left out is out of reach (batch,) [length].

    All other atoms are listed, and the slack is infinite, if they fit.
    """
    n, batch = x.shape[1:]
    if n == 1:
        return jnp.zeros((0, n, batch), "int32"), jnp.full(batch, jnp.inf, x.dtype)
    d = x[:, :, None, :] - x[:, None, :, :]
    d = d - shape.box_length * jnp.round(d / shape.box_length)
    r2 = jnp.where(jnp.eye(n, dtype=bool)[:, :, None], jnp.inf, jnp.sum(d * d, axis=0))
    nearest, index = jax.lax.top_k(-jnp.moveaxis(r2, 2, 0), min(n - 1, _PARTNERS))
    if n - 1 <= _PARTNERS:
        slack = jnp.full(batch, jnp.inf, x.dtype)
    else:
        slack = jnp.min(jnp.sqrt(-nearest[:, :, -1]), axis=1) - shape.pair_end
    return jnp.transpose(index, (2, 1, 0)), jax.lax.stop_gradient(slack)


class _Pair(NamedTuple):
    """All atoms and one partner of each: bonds from partner to atom, within reach."""

    n: Float[Array, "3 n batch"]  # unit vector
    inverse_r: Float[Array, "n batch"]
    values: Float[Array, "k n batch"]
    slopes: Float[Array, "k n batch"]
    hop_values: Float[Array, "h n batch"]
    hop_slopes: Float[Array, "h n batch"]


def _pair(x: Float[Array, "3 n batch"], partner: Float[Array, "3 n batch"], shape: FieldShape) -> _Pair:
    box, end = shape.box_length, shape.pair_end
    d = x - partner
    d = d - box * jnp.round(d / box)
    # Guarded: beyond the end every function is zero; atoms that meet have a finite gradient.
    r = jnp.sqrt(jnp.clip(jnp.sum(d * d, axis=0), (0.1 * shape.core) ** 2, end**2))
    grid = _PAIR_CENTRES, _PAIR_START * shape.core, _PAIR_SPACING * shape.core, end
    hop_grid = _HOP_CENTRES, _HOP_START * shape.core, _HOP_SPACING * shape.core, end
    return _Pair(d / r[None], 1 / r, *_bumps(r, *grid), *_bumps(r, *hop_grid))


def field(
    params: Params, x: Float[Array, "3 n batch"], shape: FieldShape, around: Int[Array, "slots n batch"] | None
) -> tuple[Array, Array]:
    """Velocities (3, n, batch) [length per unit of the way] and their divergences (batch,).

    Args:
        params: As `no_motion`; each array may have a trailing axis of the batch, for parameters of every sample's own.
        x: Positions relative to the solute, any image [length].
        shape: Of the field.
        around: Partners of every atom; all that are within reach. None for all other atoms: for a field without hops
            only, and twice as fast as finding and looking up partners among 125 atoms.
    """
    own = {name: jnp.asarray(value, x.dtype) for name, value in params.items()}
    own = {name: value if value.ndim > _AXES[name] else value[..., None] for name, value in own.items()}
    waves = _waves(x, shape.box_length)
    velocity, divergence = _shells(x, own["shells"][:, None, :], shape)
    velocity = velocity + _mixed(own["waves"], waves.gradient)
    divergence = divergence + jnp.sum(_mixed(own["waves"], waves.hessian)[:3], axis=0)
    w, w_hessian = (_mixed(own["neighbours"], part) for part in waves)  # (n_pairs, 3 | 6, n, batch)
    pushes = own["pairs"][:, None, :]
    if around is None:
        more = _all_give_way(x, w, w_hessian, pushes, shape)
        return velocity + more[0], jnp.sum(divergence + more[1], axis=0)

    def of(a: Array, partner: Array) -> Array:
        return jnp.take_along_axis(a, partner.reshape((1,) * (a.ndim - 2) + partner.shape), axis=-2)

    def give_way(carry: tuple[Array, Array], partner: Array) -> tuple[Any, None]:
        pair = _pair(x, of(x, partner), shape)
        n = [c[None] for c in pair.n]
        f = _dot(n, of(w, partner) - w) + pushes
        along = jnp.sum(pair.values * f, axis=0)
        spread = (pair.slopes + 2 * pair.values * pair.inverse_r[None]) * f - pair.values * _quadratic(n, w_hessian)
        return (carry[0] + along[None] * pair.n, carry[1] + jnp.sum(spread, axis=0)), None

    (velocity, divergence), _ = jax.lax.scan(give_way, (velocity, divergence), around)
    if not shape.hops:
        return velocity, jnp.sum(divergence, axis=0)
    hop_w, hop_hessian = (_mixed(own["hops"], part) for part in waves)  # (n_hops, n_hops, 3 | 6, n, batch)

    def gather_pushes(carry: tuple[Array, Array], partner: Array) -> tuple[Any, None]:
        pair = _pair(x, of(x, partner), shape)
        n = [c[None, None] for c in pair.n]
        delta = of(hop_w, partner) - hop_w
        f = _dot(n, delta)
        a, slope = pair.hop_values[None], pair.hop_slopes[None]
        # Symmetric part of the derivative of a(r) n (n . delta) with respect to the atom's own position.
        bend = a * pair.inverse_r[None, None]
        pulled = _times(hop_hessian, n)
        half = [0.5 * jnp.sum(bend * delta[:, :, c] - a * pulled[c], axis=1) for c in range(3)]
        bonded, round_about = jnp.sum((slope - 2 * bend) * f, axis=1), jnp.sum(bend * f, axis=1)
        n = [c[None] for c in pair.n]
        strain = [
            bonded * n[i] * n[j] + half[i] * n[j] + half[j] * n[i] + (round_about if i == j else 0) for i, j in _SIX
        ]
        push = jnp.sum(a * f, axis=1)[:, None] * pair.n[None]
        return (carry[0] + push, carry[1] + jnp.stack(strain, axis=1)), None

    start = jnp.zeros_like(hop_w[:, 0]), jnp.zeros_like(hop_hessian[:, 0])
    (push, strain), _ = jax.lax.scan(gather_pushes, start, around)  # (n_hops, 3 | 6, n, batch)

    def hand_on(carry: tuple[Array, Array], partner: Array) -> tuple[Any, None]:
        pair = _pair(x, of(x, partner), shape)
        n = [c[None] for c in pair.n]
        b = pair.hop_values
        f = _dot(n, of(push, partner) - push)
        # How the partner's push changes with this atom's position, along the bond, less the atom's own.
        both = [c[None] for c in n]
        back = _dot(both, hop_w - of(hop_w, partner))
        change = pair.hop_slopes[None] * back + pair.hop_values[None] * _quadratic(both, hop_hessian)
        change = jnp.sum(change, axis=1) - _quadratic(n, strain)
        spread = (pair.hop_slopes + 2 * b * pair.inverse_r[None]) * f + b * change
        along = jnp.sum(b * f, axis=0)
        return (carry[0] + along[None] * pair.n, carry[1] + jnp.sum(spread, axis=0)), None

    (velocity, divergence), _ = jax.lax.scan(hand_on, (velocity, divergence), around)
    return velocity, jnp.sum(divergence, axis=0)


def _all_give_way(
    x: Float[Array, "3 n batch"],
    w: Float[Array, "k 3 n batch"],
    hessian: Float[Array, "k 6 n batch"],
    pushes: Float[Array, "k 1 own"],
    shape: FieldShape,
) -> tuple[Array, Array]:
    """What all other atoms do to every atom: velocities and divergences (n, batch).

    Step s pairs atom i with atom i + s modulo n, as the solvent's kernel does. Sums are written out by component,
    so that the compiler makes one loop of them.
    """
    n, box, end = x.shape[1], shape.box_length, shape.pair_end
    start, spacing = _PAIR_START * shape.core, _PAIR_SPACING * shape.core
    twice, w_twice = jnp.concatenate([x, x], axis=1), jnp.concatenate([w, w], axis=2)

    def meet(carry: tuple[Array, Array], shift: Array) -> tuple[Any, None]:
        there = jax.lax.dynamic_slice_in_dim(twice, shift, n, axis=1)
        w_there = jax.lax.dynamic_slice_in_dim(w_twice, shift, n, axis=2)
        d = [x[a] - there[a] for a in range(3)]
        d = [part - box * jnp.round(part / box) for part in d]
        # Guarded as in `_pair`.
        r = jnp.sqrt(jnp.clip(d[0] * d[0] + d[1] * d[1] + d[2] * d[2], (0.1 * shape.core) ** 2, end**2))
        inverse_r = 1 / r
        bond = [part * inverse_r for part in d]
        t, rest = (r - start) / spacing, 1 - (r / end) ** 2
        # A Gaussian from its neighbour on the grid: exp(-(t - k)^2) = exp(-(t - k + 1)^2) exp(2 t) exp(1 - 2 k).
        bump, growth = jnp.exp(-t * t) * rest * rest, jnp.exp(2 * t)
        along, spread = jnp.zeros_like(r), jnp.zeros_like(r)
        for k in range(_PAIR_CENTRES):
            if k:
                bump = bump * growth * math.exp(1 - 2 * k)
            value, slope = bump * rest, bump * (-2 / spacing * (t - k) * rest - (6 / end**2) * r)
            f = pushes[k]
            for a in range(3):
                f = f + bond[a] * (w_there[k, a] - w[k, a])
            along = along + value * f
            spread = spread + (slope + 2 * value * inverse_r) * f - value * _quadratic(bond, hessian[k])
        return (carry[0] + jnp.stack([along * part for part in bond]), carry[1] + spread), None

    nothing = jnp.zeros_like(x), jnp.zeros_like(x[0])
    return jax.lax.scan(meet, nothing, jnp.arange(1, n))[0]


_SIX = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


# ------------------------------------------------------------------------------ the map


def journey(
    params: Params, x: Float[Array, "3 n batch"], shape: FieldShape, span: Any, steps: int
) -> tuple[Array, Array]:
    """Displacements (3, n, batch) over a span of the way, and log dets (batch,): Runge and Kutta's fourth order.

    A log det is NaN where atoms move so far in one step that a list of partners might have missed one.

    Args:
        params: Of the field.
        x: Where the atoms are, relative to the solute [length].
        shape: Of the field.
        span: How much of the way, negative for the way back.
        steps: Of the integrator.
    """
    h = jnp.asarray(span / steps, x.dtype)
    ahead, shares = jnp.asarray([0.0, 0.5, 0.5, 1.0], x.dtype), jnp.asarray([1.0, 2.0, 2.0, 1.0], x.dtype) / 6
    nowhere, nothing = jnp.zeros_like(x), jnp.zeros_like(x[0, 0])

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        moved, log_det = carry
        here = x + moved
        few = x.shape[1] <= _ALL_ATOMS and not shape.hops
        around, slack = (None, jnp.full(x.shape[2], jnp.inf, x.dtype)) if few else partners(here, shape)

        def stage(carry: tuple[Array, Array, Array, Array], part: tuple[Array, Array]) -> tuple[Any, None]:
            v, moved, log_det, slack = carry
            ahead, share = part
            away = ahead * h * v
            furthest = jnp.sqrt(jnp.max(jnp.sum(away * away, axis=0), axis=0))
            # No number is better than a wrong one.
            log_det = jnp.where(2 * furthest < slack, log_det, jnp.nan)
            v, divergence = field(params, here + away, shape, around)
            return (v, moved + share * h * v, log_det + share * h * divergence, slack), None

        (_, moved, log_det, _), _ = jax.lax.scan(stage, (nowhere, moved, log_det, slack), (ahead, shares))
        return (moved, log_det), None

    return jax.lax.scan(step, (nowhere, nothing), None, length=steps)[0]


@lru_cache(maxsize=16)  # one and the same map again: what is compiled for it serves all folds
def fluid_map(shape: FieldShape, steps: int = 3, span: float = 1.0, dtype: str = "float32") -> Bijector:
    """The map of (n, 3) positions [length] that a field makes: the identity at first, and A to B when fitted.

    The inverse goes the same way backwards. Both, and the log det, are exact up to the error of the integration:
    with three steps, and in float32, 0.0002 kT in the work of the published solvation problem.

    Args:
        shape: Of the field.
        steps: Of the integration.
        span: How much of the way; less than 1 ends before B, more goes beyond.
        dtype: That the field is evaluated in; displacements are added in the precision of the positions.

    Raises:
        InputError: If there is no step.
    """
    if steps < 1:
        raise InputError(f"map.steps: must be at least 1, got {steps}")

    def batched(params: Params, x: Array, way: float) -> tuple[Array, Array]:
        # (n, 3, batch), any image: wrapped, so that float32 keeps its digits.
        near = jnp.swapaxes(x - shape.box_length * jnp.round(x / shape.box_length), 0, 1).astype(dtype)
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        moved, log_det = journey(cast, near, shape, way, steps)
        return x + jnp.swapaxes(moved, 0, 1).astype(x.dtype), log_det.astype(x.dtype)

    def along(way: float) -> Callable[[Params, Array, ThermodynamicState], tuple[Array, Scalar]]:
        @jax.custom_batching.custom_vmap
        def one(params, x):
            y, log_det = batched(params, x[:, :, None], way)
            return y[:, :, 0], log_det[0]

        @one.def_vmap
        def _(axis_size, in_batched, params, x):
            # Parameters of every sample's own have the batch innermost too.
            params = jax.tree.map(lambda leaf, own: jnp.moveaxis(leaf, 0, -1) if own else leaf, params, in_batched[0])
            x = x if in_batched[1] else jnp.broadcast_to(x, (axis_size, *x.shape))
            y, log_det = batched(params, jnp.moveaxis(x, 0, -1), way)
            return (jnp.moveaxis(y, -1, 0), log_det), (True, True)

        return lambda params, x, state: one(params, x)

    def init(key: Key, x: Array, state: ThermodynamicState) -> Params:
        return {name: jnp.asarray(leaf, x.dtype) for name, leaf in no_motion(shape).items()}

    return Bijector(init, along(span), along(-span))


def carrier(params: Params, shape: FieldShape, dtype: str = "float32") -> Callable[[Array, Any], tuple[Array, Array]]:
    """What takes batches (n, 3, batch) along while lambda changes by a small span: positions and log dets (batch,).

    One step of the integration, so that a span and the same span back undo each other to fifth order.
    """
    cast = {name: jnp.asarray(leaf, dtype) for name, leaf in params.items()}

    def carry(x: Array, span: Any) -> tuple[Array, Array]:
        near = jnp.swapaxes(x - shape.box_length * jnp.round(x / shape.box_length), 0, 1).astype(dtype)
        moved, log_det = journey(cast, near, shape, span, 1)
        return x + jnp.swapaxes(moved, 0, 1).astype(x.dtype), log_det

    return carry


# ------------------------------------------------------------------------------ the best field


class Rates(NamedTuple):
    """What samples of one state on the way say about the field that it asks for [kT per unit of the way]."""

    wanted: Float[np.ndarray, " n"]  # du/dl
    offered: Float[np.ndarray, "n n_parameters"]  # div v - v . grad u of each of the field's functions

    def left_over(self, numbers: np.ndarray) -> float:
        """Share of the variance of du/dl that a field leaves."""
        return float(np.var(self.wanted - self.offered @ numbers) / max(np.var(self.wanted), 1e-300))


def offered(x: Float[Array, "3 n batch"], gradient: Float[Array, "3 n batch"], shape: FieldShape) -> Array:
    """div v - v . grad u of each function of the field (batch, n_parameters), in the order of `numbers_of`.

    The field is linear: the derivatives of one number by all parameters are all the numbers there are.
    """
    batch, around = x.shape[2], partners(x, shape)[0]
    start = {name: jnp.zeros((*value.shape, batch), x.dtype) for name, value in no_motion(shape).items()}

    def total(params: Params) -> Array:
        v, divergence = field(params, x, shape, around)
        return jnp.sum(divergence) - jnp.sum(v * gradient)

    found = jax.grad(total)(start)
    return jnp.concatenate([found[name].reshape(-1, batch) for name in sorted(found)]).T


def numbers_of(params: Params) -> np.ndarray:
    """All parameters in a row: arrays in the alphabetical order of their names."""
    return np.concatenate([np.asarray(params[name], np.float64).ravel() for name in sorted(params)])


def params_of(numbers: np.ndarray, shape: FieldShape) -> Params:
    """The inverse of `numbers_of`."""
    like = no_motion(shape)
    ends = np.cumsum([like[name].size for name in sorted(like)])
    parts = np.split(np.asarray(numbers, np.float64), ends[:-1])
    return {name: part.reshape(like[name].shape) for name, part in zip(sorted(like), parts, strict=True)}


def fit(rates: Sequence[Rates], ridge: float) -> np.ndarray:
    """Parameters in a row that leave the least variance of du/dl, over all states together.

    Args:
        rates: Of samples of states on the way; all have the same weight per sample.
        ridge: Penalty on each function's share, as a fraction of its own mean square.
    """
    wanted = np.concatenate([state.wanted - state.wanted.mean() for state in rates])
    functions = np.concatenate([state.offered for state in rates])
    # Their means are zero, by the divergence theorem: left as they are, they say how large the functions are.
    scale = np.sqrt(np.mean(functions**2, axis=0))
    scale = np.where(scale > 0, scale, 1.0)
    functions = functions / scale
    normal = functions.T @ functions / len(functions) + ridge * np.eye(functions.shape[1])
    return np.linalg.solve(normal, functions.T @ wanted / len(functions)) / scale


# ------------------------------------------------------------------------------ splines on the torus


def torus_flow(
    box_length: float,
    start: Bijector | None = None,
    *,
    n_layers: int = 2,
    n_blocks: int = 2,
    width: int = 32,
    n_heads: int = 2,
    n_bins: int = 8,
    n_frequencies: int = 4,
) -> Bijector:
    """A map of one's choice, then circular splines on the torus, which are the identity at first.

    Args:
        box_length: Edge of the cubic box [length].
        start: Of (n, 3) positions [length]; the identity by default.
        n_layers: Layers; each moves every axis once, given the others.
        n_blocks: Blocks of the transformer that conditions each coupling.
        width: Its embedding, a multiple of `n_heads`.
        n_heads: Its attention heads.
        n_bins: Bins of the circular splines.
        n_frequencies: Fourier features per coordinate and phase.

    References: Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020), section IV.
    """
    splines = axis_flow(n_layers, n_blocks, width, n_heads, n_bins, n_frequencies)
    inner = whitened(splines, lambda z: box_length * z, lambda x: x / box_length)
    return inner if start is None else chain(start, inner)
