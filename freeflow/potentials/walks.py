"""Sums over the pairs of a neighbour table: slot by slot, by tiles of atoms where caches are small, or by GPU threads.

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

# Up to so many bytes of positions, fields and sums stay in caches while a walk goes through the slots; beyond, it goes
# by tiles of so many numbers per component.
_CACHED, _TILE = 2**23, 2**13
# What is shared is fetched at once if it is no more than so many quantities, in rows of no fewer samples.
_FEW, _LONG = 4, 32
# What a thread of the GPU kernel holds of an array [bytes], threads in a warp, and warps of a program at most.
_EACH, _WARP, _WARPS = 16, 32, 4


class Pair(NamedTuple):
    """Pairs of atoms, one for every element of arrays of one shape."""

    d: list[Array]  # from the atom to its partner, by component [length]
    r2: Array  # its square [length**2]
    r2_apart: Array  # the same, for what is better evaluated twice than kept; see `_Bonds`
    here: Parts  # fields of the atom
    there: Parts  # and of its partner
    common: Parts  # what all atoms of a sample share


# What the atom keeps of a pair, and what it shares. Elementwise arithmetic only: the shapes are those of the walk.
Visit = Callable[[Pair], tuple[Parts, Parts]]


class Task(NamedTuple):
    """What is to be summed; see `Walk.total`."""

    visit: Visit
    x: Sequence[Array]
    parity: tuple[int, ...]
    n_own: int
    fields: Parts
    common: Parts


class Walk(ABC):
    """A way to visit all pairs of a table."""

    def total(
        self,
        visit: Visit,
        x: Sequence[Array],
        parity: tuple[int, ...],
        n_own: int = 0,
        fields: Parts = (),
        common: Parts = (),
    ) -> tuple[Parts, Parts]:
        """Sums over the pairs, (n_atoms, batch) each.

        Args:
            visit: What an atom keeps of a pair, and what both ends get of it. Seen from the partner the former must
                be the same: on which of the two it is booked is up to the walk.
            x: Components of the displacements, (n_atoms, batch) each [length].
            parity: Signs of the shared quantities at the partner: +1, or -1 for what changes sign with the bond.
            n_own: How many quantities an atom keeps.
            fields: Arrays (n_atoms, batch) that `visit` wants to know at both ends.
            common: Arrays (batch,) that it wants to know besides.

        Returns:
            What atoms keep, and what they share.
        """
        sums = self._sums(Task(visit, x, parity, n_own, fields, common))
        return sums[:n_own], sums[n_own:]

    @abstractmethod
    def _sums(self, task: Task) -> Parts:
        """What atoms keep, then what they share."""


def walk(table: NeighbourTable, dtype: Any) -> Walk:
    """The walk for JAX's default device."""
    return ByThreads(table, dtype) if has_threads() else BySize(table, dtype)


def has_threads() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.default_backend() == "gpu"


class _Slots(NamedTuple):
    """Slots of a neighbour table as a loop reads them; leading axes stack slots, and tiles."""

    partner: Any  # (n_atoms,)
    source: Any  # (n_atoms,): whose partner an atom is
    offset: Any  # (n_atoms, 3)
    empty: Any  # (n_atoms,), or None


class _Bonds:
    """Separations of pairs, at nearest images where a table says so.

    XLA on CPU puts what two results need into an array of its own, step by step of the arithmetic, and reading and
    writing these takes longer than all of it. Behind a barrier it does not see that it evaluates something again.
    """

    def __init__(self, table: NeighbourTable, dtype: Any):
        self._box = None if table.box is None else np.asarray(table.box, dtype)
        self._nowhere = np.asarray(1e6 * table.radius**2, dtype)

    def between(self, there: Sequence[Array], here: Sequence[Array], slot: _Slots) -> tuple[list[Array], Array, Array]:
        """Components from atoms displaced by `here` to partners displaced by `there`, and their squares, twice."""
        d = [slot.offset[:, a, None] + there[a] - here[a] for a in range(3)]
        if self._box is not None:
            d = [d[a] - self._box[a] * jnp.round(d[a] / self._box[a]) for a in range(3)]
        return d, self._square(d, slot), self._square(jax.lax.optimization_barrier(d), slot)

    def _square(self, d: list[Array], slot: _Slots) -> Array:
        r2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
        return r2 if slot.empty is None else jnp.where(slot.empty[:, None], self._nowhere, r2)


class SlotBySlot(Walk):
    """Visits every pair once, slot by slot.

    Every component is an array (n_atoms, batch) of its own, so that all arithmetic runs along the batch. XLA on CPU
    joins the fetching of what a slot gives to the partners with the arithmetic that it comes from, and evaluates that
    twice. For few quantities this is cheaper than keeping them; many travel through the loop's carry and are fetched
    one slot later.
    """

    def __init__(self, table: NeighbourTable, dtype: Any):
        self._slots = _Slots(
            np.asarray(table.partner, np.int32),
            np.asarray(table.source, np.int32),
            np.asarray(table.offset, dtype),
            None if table.empty is None else np.asarray(table.empty),
        )
        self._bonds = _Bonds(table, dtype)

    def _sums(self, task: Task) -> Parts:
        visit, x, parity, n_own, fields, common = task
        rows = tuple(row[None] for row in common)
        zero = jnp.zeros_like(x[0])
        none = (zero,) * len(parity)

        def book(totals: Parts, shares: Parts, at: Any) -> Parts:
            return tuple(
                total + share + sign * share[at] for total, share, sign in zip(totals, shares, parity, strict=True)
            )

        def visited(own: Parts, slot: _Slots) -> tuple[Parts, Parts]:
            there = tuple(field[slot.partner] for field in fields)
            bond = self._bonds.between([place[slot.partner] for place in x], x, slot)
            more, shares = visit(Pair(*bond, fields, there, rows))
            return tuple(a + b for a, b in zip(own, more, strict=True)), shares

        def at_once(carry, slot):
            own, shares = visited(carry[0], slot)
            return (own, book(carry[1], shares, slot.source)), None

        def later(carry, now):
            (own, totals, shares), (slot, before) = carry, now
            totals = book(totals, shares, before)
            own, shares = visited(own, slot)
            return (own, totals, shares), None

        start = (zero,) * n_own
        if len(parity) <= _FEW and x[0].shape[1] >= _LONG:
            (own, totals), _ = jax.lax.scan(at_once, (start, none), self._slots, unroll=1 if fields else 2)
            return (*own, *totals)
        # Nothing comes before slot 0, whose atoms fetch nothing from where they like.
        before = np.concatenate([np.zeros_like(self._slots.source[:1]), self._slots.source[:-1]])
        (own, totals, shares), _ = jax.lax.scan(later, (start, none, none), (self._slots, before))
        return (*own, *book(totals, shares, self._slots.source[-1]))


class ByTiles(Walk):
    """Visits every pair from both of its ends, tile by tile of atoms.

    An atom that owes nothing to others is finished while its tile is in the cache. In large crystals reading and
    writing all sums for every slot costs more than evaluating pairs twice.
    """

    def __init__(self, table: NeighbourTable, dtype: Any):
        self._slots = _both_ends(table, dtype)
        self._bonds = _Bonds(table, dtype)

    def _sums(self, task: Task) -> Parts:
        visit, x, parity, n_own, fields, common = task
        n_atoms, batch = x[0].shape
        rows = tuple(row[None] for row in common)
        n_tiles = max(1, round(n_atoms * batch / _TILE))
        size = -(-n_atoms // n_tiles) | 1  # odd, as `_odd` says
        n_tiles = -(-n_atoms // size)
        # The last tile is filled up with its first atoms; what they give is cut off again.
        atoms = (np.arange(n_tiles * size) % n_atoms).reshape(n_tiles, size)

        def finish(tile: tuple[Array, _Slots]) -> Parts:
            here, slots = tile
            start, fixed = [place[here] for place in x], tuple(field[here] for field in fields)

            def step(carry, now):
                slot, begins = now
                bond = self._bonds.between([place[slot.partner] for place in x], start, slot)
                own, shares = visit(Pair(*bond, fixed, tuple(field[slot.partner] for field in fields), rows))
                more = (*(begins * part for part in own), *shares)
                return tuple(total + part for total, part in zip(carry, more, strict=True)), None

            none = (jnp.zeros_like(start[0]),) * (n_own + len(parity))
            # Two slots at a time: sums are read and written half as often; see docs/speed.md.
            return jax.lax.scan(step, none, (slots, begins), unroll=2)[0]

        # What atoms keep is booked where a pair begins, as slot by slot: energies at rest may come from there.
        begins = np.repeat(np.asarray([1, 0], x[0].dtype), len(self._slots.partner) // 2)
        slots = jax.tree.map(lambda values: np.moveaxis(values[:, atoms], 1, 0), self._slots)
        sums = jax.lax.map(finish, (atoms.astype(np.int32), slots))
        return tuple(part.reshape(-1, batch)[:n_atoms] for part in sums)


class BySize(Walk):
    """Slot by slot, or by tiles where that would leave the caches."""

    def __init__(self, table: NeighbourTable, dtype: Any):
        self._table, self._dtype = _odd(table), dtype

    def _sums(self, task: Task) -> Parts:
        n_atoms, n_rows = task.x[0].shape[0], self._table.partner.shape[1]

        def filled(parts: Sequence[Array]) -> Parts:
            return tuple(jnp.pad(part, ((0, n_rows - n_atoms), (0, 0))) for part in parts)

        rows = task._replace(x=filled(task.x), fields=filled(task.fields))
        arrays = len(task.x) + len(task.fields) + task.n_own + len(task.parity)
        kind = SlotBySlot if arrays * rows.x[0].nbytes <= _CACHED else ByTiles
        return tuple(part[:n_atoms] for part in kind(self._table, self._dtype)._sums(rows))


class ByThreads(Walk):
    """Visits every pair from both of its ends, in one kernel for a GPU (Pallas, by way of Triton).

    A program finishes one atom of a block of samples: it goes through the atom's pairs with all sums in registers,
    reads rows of positions and fields that neighbouring programs read, too, and writes its sums once. A loop over
    slots outside of the kernel would move all sums through memory for every slot; see docs/speed.md.
    """

    def __init__(self, table: NeighbourTable, dtype: Any):
        slots = _both_ends(table, dtype)
        real = ~slots.empty if slots.empty is not None else np.linalg.norm(slots.offset, axis=-1) <= 1.5 * table.radius
        # Pairs first: a program goes through as many as its atom has.
        order = np.argsort(~real.T, axis=1, kind="stable")
        self._counts = real.sum(axis=0).astype(np.int32)
        order = order[:, : max(1, self._counts.max())]
        self._partner = np.take_along_axis(slots.partner.T, order, axis=1)
        self._offset = np.take_along_axis(np.swapaxes(slots.offset, 0, 1), order[..., None], axis=1)
        # Plain numbers: a kernel holds no arrays but its arguments.
        self._box = None if table.box is None else [float(edge) for edge in table.box]

    def _sums(self, task: Task) -> Parts:
        visit, x, parity, n_own, fields, common = task
        from jax.experimental import pallas
        from jax.experimental.pallas import triton

        (n_atoms, batch), dtype, n_sums = x[0].shape, x[0].dtype, n_own + len(parity)
        block, warps = _shape(batch, dtype.itemsize)
        filled = -batch % block

        def kernel(counts, partner, offset, places, others, shared, *sums):
            atom, samples = pallas.program_id(1), pallas.ds(pallas.program_id(0) * block, block)
            start, here = [place[atom, samples] for place in places], tuple(field[atom, samples] for field in others)
            row = tuple(field[samples] for field in shared)

            def step(k, carry):
                other = partner[atom, k]
                d = [offset[atom, k, a] + place[other, samples] - start[a] for a, place in enumerate(places)]
                if self._box is not None:
                    d = [d[a] - edge * jnp.floor(d[a] / edge + 0.5) for a, edge in enumerate(self._box)]
                r2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
                own, shares = visit(Pair(d, r2, r2, here, tuple(field[other, samples] for field in others), row))
                # What atoms keep is booked half at either end.
                more = (*(0.5 * part for part in own), *shares)
                return tuple(total + part for total, part in zip(carry, more, strict=True))

            none = (jnp.zeros((block,), dtype),) * n_sums
            for reference, total in zip(sums, jax.lax.fori_loop(jnp.int32(0), counts[atom], step, none), strict=True):
                reference[atom, samples] = total

        arguments = (list(x), fields, common)
        if filled:
            arguments = jax.tree.map(lambda part: jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, filled)]), arguments)
        sums = pallas.pallas_call(
            kernel,
            grid=((batch + filled) // block, n_atoms),
            out_shape=(jax.ShapeDtypeStruct((n_atoms, batch + filled), dtype),) * n_sums,
            compiler_params=triton.CompilerParams(num_warps=warps),
            interpret=jax.default_backend() == "cpu",
        )(self._counts, self._partner, self._offset, *arguments)
        return tuple(part[:, :batch] for part in sums) if filled else tuple(sums)


def _odd(table: NeighbourTable) -> NeighbourTable:
    """The same table for an odd number of atoms: an atom without pairs joins an even number.

    Arrays whose bytes are a multiple of a memory page, as those of 64 or 512 atoms are, lie in the same lines of the
    caches one and all, and drive each other out: up to a third of the time.
    """
    n_slots, n_atoms = table.partner.shape
    if n_atoms % 2:
        return table

    def joined(values: np.ndarray, by: Any) -> np.ndarray:
        row = np.broadcast_to(np.asarray(by, values.dtype), (n_slots, 1, *values.shape[2:]))
        return np.concatenate([values, row], axis=1)

    empty = np.zeros((n_slots, n_atoms), bool) if table.empty is None else table.empty
    return table._replace(
        partner=joined(table.partner, n_atoms),
        source=joined(table.source, n_atoms),
        offset=joined(table.offset, [1e3 * table.radius, 0.0, 0.0]),
        empty=None if table.box is None else joined(empty, True),
    )


def _shape(batch: int, width: int) -> tuple[int, int]:
    """Samples of a program, the largest power of two that divides the batch, within limits; and its warps."""
    each = _EACH // width
    block = int(np.clip(batch & -batch, _WARP, _WARPS * _WARP * each))
    return block, max(1, block // (_WARP * each))


def _both_ends(table: NeighbourTable, dtype: Any) -> _Slots:
    """The table's slots, and after them every pair as the partner sees it."""

    def seen_from_partner(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, table.source.reshape(table.source.shape + (1,) * (values.ndim - 2)), axis=1)

    empty = None if table.empty is None else np.concatenate([table.empty, seen_from_partner(table.empty)])
    offset = np.concatenate([table.offset, -seen_from_partner(table.offset)]).astype(dtype)
    return _Slots(np.concatenate([table.partner, table.source]).astype(np.int32), None, offset, empty)
