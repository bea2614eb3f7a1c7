"""Sums over the pairs of a neighbour table: by tiles of atoms on CPU, by threads on a GPU.

A kernel says what an atom keeps of a pair and what both ends get of it; the walk visits all pairs and adds up. Which
walk a kernel takes is decided where it is traced, by JAX's default device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from freeflow.geometry import NeighbourTable

Parts = tuple[Array, ...]

# Numbers per component in a tile: many enough for a call to be worth it, few enough for the caches. Half as many from
# `_FAR` numbers per component on, when whole arrays do not fit into the nearest caches.
_TILE, _SMALL_TILE, _FAR = 2**13, 2**12, 2**16
# Slots that one loop visits, by the length of a visit up to which the compiler was seen to unroll so many.
_TOGETHER = ((3, 50), (2, 100), (1, 260))
_SHORTEST = 4  # rows of samples that vectors are made of
# Instructions that functions become in float32, half of what they do in float64; others are one each.
_INSTRUCTIONS = {"exp": 25, "log": 25, "tanh": 25, "pow": 50}
# What a thread of the GPU kernel holds of an array [bytes], threads in a warp, and warps of a program at most.
_EACH, _WARP, _WARPS = 16, 32, 4


class Pair(NamedTuple):
    """Pairs of atoms, one for every element of arrays of one shape."""

    d: list[Array]  # from the atom to its partner, by component [length]
    r2: Array  # its square [length**2]
    here: Parts  # fields of the atom
    there: Parts  # and of its partner
    common: Parts  # what all atoms of a sample share


# What the atom keeps of a pair, and what it shares. Elementwise arithmetic only: the shapes are those of the walk.
Visit = Callable[[Pair], tuple[Parts, Parts]]
Finish = Callable[[Parts], Parts]


class Task(NamedTuple):
    """What is to be summed; see `Walk.total`."""

    visit: Visit
    x: Sequence[Array]
    n_sums: int
    begin: Parts  # nothing, if sums begin with zeros
    n_own: int
    fields: Parts
    common: Parts
    finish: Finish


class Walk(ABC):
    """A way to visit all pairs of a table."""

    @abstractmethod
    def rows(self, u: Array) -> list[Array]:
        """Components of displacements (n_atoms, 3, batch) as the walk wants them, (n_rows, batch) each.

        Which row is which atom's is up to the walk, see `atoms`. Rows may be more than atoms; those have no pairs.
        """

    @abstractmethod
    def atoms(self, rows: Array) -> Array:
        """Arrays (n_rows, ...) by atoms (n_atoms, ...)."""

    def vectors(self, components: Sequence[Array]) -> Array:
        """Vectors (n_atoms, 3, batch) of components (n_rows, batch) each, as `rows` makes them."""
        return self.atoms(jnp.stack(components, axis=1))

    def total(
        self,
        visit: Visit,
        x: Sequence[Array],
        sums: int | Parts,
        n_own: int = 0,
        fields: Parts = (),
        common: Parts = (),
        finish: Finish = lambda sums: sums,
    ) -> Parts:
        """Sums over the pairs, (n_rows, batch) each: what atoms keep, then what they share.

        Args:
            visit: What an atom keeps of a pair, and what both ends get of it. It sees a pair from either end. What
                atoms keep must be the same from both: on which of the two it is booked is up to the walk.
            x: What `rows` made of the displacements [length].
            sums: How many there are, or what they begin with.
            n_own: How many of them atoms keep.
            fields: Arrays (n_rows, batch) that `visit` wants to know at both ends.
            common: Arrays (batch,) that it wants to know besides.
            finish: What to make of an atom's sums, as many; elementwise arithmetic, too.
        """
        n_sums, begin = (sums, ()) if isinstance(sums, int) else (len(sums), sums)
        return self._sums(Task(visit, x, n_sums, begin, n_own, fields, common, finish))

    @abstractmethod
    def _sums(self, task: Task) -> Parts:
        """What `finish` made of the sums."""


def walk(table: NeighbourTable, dtype: Any) -> Walk:
    """The walk for JAX's default device."""
    return ByThreads(table, dtype) if has_threads() else ByTiles(table, dtype)


def has_threads() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.default_backend() == "gpu"


class _Slots(NamedTuple):
    """Slots of a neighbour table, or a few of them."""

    partner: Any  # (..., n_atoms)
    offset: Any  # (..., n_atoms, 3) for threads; which of a list of them (..., n_atoms) for tiles
    empty: Any  # (..., n_atoms), or None


class ByTiles(Walk):
    """Visits every pair from both of its ends, tile by tile of atoms and a few slots at a time, in one loop each.

    Every component is an array (n_rows, batch) of its own, so that all arithmetic runs along the batch. XLA on CPU
    puts what two results need into an array of its own and then reads it again, step by step of the arithmetic, which
    takes longer than all of it. What a single operation consumes it evaluates in one loop, and summing several
    quantities over a few slots, and over what there is already, is a single operation. Its loop goes by vectors if the
    compiler unrolls the slots, which it does for few, and knows that nothing it reads is written: tables must stand in
    arrays of their own, so the next slots travel through the carry.
    """

    def __init__(self, table: NeighbourTable, dtype: Any):
        # A crystal has few different offsets: with a number for each, slots take half the memory.
        distinct, which = _distinct(table.offset, 1e-12 * table.radius)
        self._table, self._slots = table, _both_ends(table, which, which + len(distinct))
        self._row_of = None if table.order is None else np.argsort(table.order).astype(np.int32)
        if self._row_of is not None:
            self._slots = jax.tree.map(lambda values: values[:, table.order], self._slots)
            self._slots = self._slots._replace(partner=self._row_of[self._slots.partner])
        # And one for slots that are filled up, farther away than any.
        nowhere = np.full((1, 3), 1e3 * table.radius)
        self._offsets = np.concatenate([distinct, -distinct, nowhere]).T.astype(dtype)
        self._box = None if table.box is None else np.asarray(table.box, dtype)
        self._nowhere = np.asarray(1e6 * table.radius**2, dtype)
        self._ready: dict[Any, Any] = {}  # tables that passes share

    def _shape(self, batch: int) -> tuple[int, int]:
        """Tiles, and rows of each.

        Both are odd: arrays whose bytes are a multiple of a memory page, as those of 64 or 512 atoms are, lie in the
        same lines of the caches one and all, and drive each other out.
        """
        n_atoms = self._table.partner.shape[1]
        tile = _TILE if n_atoms * batch < _FAR else _SMALL_TILE
        n_tiles = int(np.clip(round(n_atoms * batch / tile), 1, n_atoms)) | 1
        return n_tiles, -(-n_atoms // n_tiles) | 1

    def rows(self, u: Array) -> list[Array]:
        """In the table's order, filled up to whole tiles."""
        n_atoms, _, batch = u.shape
        u = u if self._table.order is None else u[self._table.order]
        fill = int(np.prod(self._shape(batch))) - n_atoms
        return [jnp.pad(u[:, a], ((0, fill), (0, 0))) for a in range(3)]

    def atoms(self, rows: Array) -> Array:
        """Back in the order of the atoms, without what was filled up."""
        return rows[: self._table.partner.shape[1]] if self._row_of is None else rows[self._row_of]

    def _sums(self, task: Task) -> Parts:
        batch = task.x[0].shape[1]
        shape = self._shape(batch)
        together = _together(task)
        tables = self._tables(shape, max(1, together))
        x, fields, begin = (
            tuple(part.reshape(*shape, batch) for part in parts) for parts in (task.x, task.fields, task.begin)
        )

        def visited(tile: Array, results: Parts) -> Parts:
            start, here, slots, first = jax.tree.map(
                lambda part: jax.lax.dynamic_index_in_dim(part, tile, keepdims=False), (x, fields, tables, results)
            )
            zeros = (jnp.zeros_like(start[0]),) * task.n_sums
            first = first if begin else zeros
            sums = self._walked(task, start, here, (*zeros[: task.n_own], *first[task.n_own :]), slots, together)
            # What atoms keep is booked half at either end.
            own = (part + 0.5 * more for part, more in zip(first[: task.n_own], sums, strict=False))
            sums = task.finish((*own, *sums[task.n_own :]))
            return tuple(
                jax.lax.dynamic_update_index_in_dim(result, part, tile, 0)
                for result, part in zip(results, sums, strict=True)
            )

        # The loop writes over what sums begin with, or over numbers that nobody reads. They differ, because of equal
        # ones XLA makes one array and copies it for all others, as the zeros that results of `jax.lax.map` start from.
        blank = tuple(jnp.full_like(x[0], number) for number in range(task.n_sums))
        sums = jax.lax.fori_loop(0, shape[0], visited, begin or blank)
        return tuple(part.reshape(-1, batch) for part in sums)

    def _walked(
        self, task: Task, start: Parts, here: Parts, sums: Parts, tables: tuple[_Slots, ...], together: int
    ) -> Parts:
        """Sums of a tile with what the slots of its tables give."""
        common = tuple(row[None, None] for row in task.common)
        start, here = (tuple(part[None] for part in parts) for parts in (start, here))
        offsets = [jnp.asarray(component) for component in self._offsets]

        def bond(slots: _Slots) -> tuple[list[Array], Array]:
            d = [offsets[a][slots.offset][..., None] + task.x[a][slots.partner] - start[a] for a in range(3)]
            if self._box is not None:
                d = [d[a] - self._box[a] * jnp.round(d[a] / self._box[a]) for a in range(3)]
            r2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
            return d, r2 if slots.empty is None else jnp.where(slots.empty[..., None], self._nowhere, r2)

        def more(sums: Parts, slots: _Slots) -> Parts:
            d, r2 = bond(slots)
            own, shares = task.visit(Pair(d, r2, here, tuple(field[slots.partner] for field in task.fields), common))
            parts = [jnp.broadcast_to(part, r2.shape) for part in (*own, *shares)]
            if not together:
                return tuple(total + part[0] for total, part in zip(sums, parts, strict=True))
            parts = [jnp.concatenate([total[None], part]) for total, part in zip(sums, parts, strict=True)]
            zeros = [np.zeros((), part.dtype) for part in parts]
            return tuple(jax.lax.reduce(parts, zeros, lambda a, b: [p + q for p, q in zip(a, b, strict=True)], (0,)))

        def step(carry: tuple[Parts, tuple[_Slots, ...]], after: tuple[_Slots, ...]) -> tuple[Any, None]:
            sums, now = carry
            for slots in now:
                sums = more(sums, slots)
            return (sums, after), None

        now = jax.tree.map(lambda values: values[0], tables)
        after = jax.tree.map(lambda values: jnp.roll(values, -1, axis=0), tables)
        return jax.lax.scan(step, (sums, now), after)[0][0]

    def _tables(self, shape: tuple[int, int], together: int) -> tuple[_Slots, _Slots]:
        """Slots of even and of odd turns; leading axes are tiles, turns, and the slots of a turn.

        There are two turns to a step of the loop: the second writes where the first has read, and nothing need be
        copied.
        """
        if (shape, together) in self._ready:
            return self._ready[shape, together]
        n_slots, n_atoms = self._slots.partner.shape
        fill: Any = [(0, -n_slots % (2 * together)), (0, shape[0] * shape[1] - n_atoms)]

        def of_turns(values: np.ndarray, nothing: Any) -> np.ndarray:
            values = np.pad(values, fill, constant_values=nothing)
            return np.moveaxis(values.reshape(-1, 2, together, *shape), 3, 0)

        slots = _Slots(
            of_turns(self._slots.partner, 0),
            of_turns(self._slots.offset, self._offsets.shape[1] - 1),
            None if self._slots.empty is None else of_turns(self._slots.empty, True),
        )
        even, odd = (jax.tree.map(lambda values, turn=turn: values[:, :, turn], slots) for turn in range(2))
        self._ready[shape, together] = even, odd
        return even, odd


class ByThreads(Walk):
    """Visits every pair from both of its ends, in one kernel for a GPU (Pallas, by way of Triton).

    A program finishes one atom of a block of samples: it goes through the atom's pairs with all sums in registers,
    reads rows of positions and fields that neighbouring programs read, too, and writes its sums once. A loop over
    slots outside of the kernel would move all sums through memory for every slot; see docs/speed.md.
    """

    def __init__(self, table: NeighbourTable, dtype: Any):
        slots = _both_ends(table, table.offset.astype(dtype), -table.offset.astype(dtype))
        real = ~slots.empty if slots.empty is not None else np.linalg.norm(slots.offset, axis=-1) <= 1.5 * table.radius
        # Pairs first: a program goes through as many as its atom has.
        order = np.argsort(~real.T, axis=1, kind="stable")
        self._counts = real.sum(axis=0).astype(np.int32)
        order = order[:, : max(1, self._counts.max())]
        self._partner = np.take_along_axis(slots.partner.T, order, axis=1)
        self._offset = np.take_along_axis(np.swapaxes(slots.offset, 0, 1), order[..., None], axis=1)
        # Plain numbers: a kernel holds no arrays but its arguments.
        self._box = None if table.box is None else [float(edge) for edge in table.box]

    def rows(self, u: Array) -> list[Array]:
        """One for every atom."""
        return [u[:, a] for a in range(3)]

    def atoms(self, rows: Array) -> Array:
        """Rows are those of the atoms."""
        return rows

    def _sums(self, task: Task) -> Parts:
        from jax.experimental import pallas
        from jax.experimental.pallas import triton

        (n_atoms, batch), dtype = task.x[0].shape, task.x[0].dtype
        block, warps = _shape(batch, dtype.itemsize)
        filled = -batch % block

        def kernel(counts, partner, offset, places, begin, others, shared, *results):
            atom, samples = pallas.program_id(1), pallas.ds(pallas.program_id(0) * block, block)
            start, here = [place[atom, samples] for place in places], tuple(field[atom, samples] for field in others)
            row = tuple(field[samples] for field in shared)

            def step(k, carry):
                other = partner[atom, k]
                d = [offset[atom, k, a] + place[other, samples] - start[a] for a, place in enumerate(places)]
                if self._box is not None:
                    d = [d[a] - edge * jnp.floor(d[a] / edge + 0.5) for a, edge in enumerate(self._box)]
                r2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
                own, shares = task.visit(Pair(d, r2, here, tuple(field[other, samples] for field in others), row))
                # What atoms keep is booked half at either end.
                more = (*(0.5 * part for part in own), *shares)
                return tuple(total + part for total, part in zip(carry, more, strict=True))

            sums = tuple(first[atom, samples] for first in begin) or (jnp.zeros_like(start[0]),) * task.n_sums
            sums = task.finish(jax.lax.fori_loop(jnp.int32(0), counts[atom], step, sums))
            for result, total in zip(results, sums, strict=True):
                result[atom, samples] = total

        n_results = len(jax.eval_shape(task.finish, (task.x[0],) * task.n_sums))
        arguments = (list(task.x), task.begin, task.fields, task.common)
        if filled:
            arguments = jax.tree.map(lambda part: jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, filled)]), arguments)
        sums = pallas.pallas_call(
            kernel,
            grid=((batch + filled) // block, n_atoms),
            out_shape=(jax.ShapeDtypeStruct((n_atoms, batch + filled), dtype),) * n_results,
            compiler_params=triton.CompilerParams(num_warps=warps),
            interpret=jax.default_backend() == "cpu",
        )(self._counts, self._partner, self._offset, *arguments)
        return tuple(part[:, :batch] for part in sums) if filled else tuple(sums)


def _together(task: Task) -> int:
    """Slots that one loop may visit; 0 if one is too many, and XLA's own loops are faster than one without vectors."""
    single: Any = jax.ShapeDtypeStruct((), task.x[0].dtype)
    fields, common = ((single,) * len(parts) for parts in (task.fields, task.common))
    visit = jax.make_jaxpr(task.visit)(Pair([single] * 3, single, fields, fields, common))
    length = _length(visit.jaxpr, single.dtype.itemsize // 4)
    if (single.dtype == np.float64 and common) or task.x[0].shape[1] < _SHORTEST:
        return 0
    return next((slots for slots, most in _TOGETHER if length + 2 * task.n_sums <= most), 0)


def _length(jaxpr: Any, precision: int) -> int:
    """About how many instructions a visit becomes; precision is 1 for float32, 2 for float64."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inner = [part for part in inner if hasattr(part, "eqns")]
        if inner:
            total += sum(_length(part, precision) for part in inner)
        else:
            total += precision * _INSTRUCTIONS.get(equation.primitive.name, 0) or 1
    return total


def _shape(batch: int, width: int) -> tuple[int, int]:
    """Samples of a program, the largest power of two that divides the batch, within limits; and its warps."""
    each = _EACH // width
    block = int(np.clip(batch & -batch, _WARP, _WARPS * _WARP * each))
    return block, max(1, block // (_WARP * each))


def _distinct(vectors: np.ndarray, resolution: float) -> tuple[np.ndarray, np.ndarray]:
    """Those vectors (..., 3) that differ, (n_distinct, 3), and which of them stands where, (...)."""
    flat = vectors.reshape(-1, 3)
    steps = np.rint(flat / resolution)
    # Neighbouring atoms often have the same offset in a slot: only the first of a run is looked at.
    heads = np.flatnonzero(np.append(True, np.any(steps[1:] != steps[:-1], axis=1)))
    code = np.zeros(len(heads), np.int64)
    for component in steps[heads].T:
        _, of_component = np.unique(component, return_inverse=True)
        _, first, code = np.unique(code * len(heads) + of_component, return_index=True, return_inverse=True)
    # Numbered as they come, so that those of neighbours lie close together.
    code = np.argsort(np.argsort(first))[code].astype(np.int32)
    which = np.repeat(code, np.diff(heads, append=len(flat)))
    return flat[heads[np.sort(first)]], which.reshape(vectors.shape[:-1])


def _both_ends(table: NeighbourTable, offset: np.ndarray, back: np.ndarray) -> _Slots:
    """The table's slots, and after them every pair as the partner sees it: what offsets are from there is `back`."""

    def seen_from_partner(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, table.source.reshape(table.source.shape + (1,) * (values.ndim - 2)), axis=1)

    empty = None if table.empty is None else np.concatenate([table.empty, seen_from_partner(table.empty)])
    offset = np.concatenate([offset, seen_from_partner(back)])
    return _Slots(np.concatenate([table.partner, table.source]).astype(np.int32), offset, empty)
