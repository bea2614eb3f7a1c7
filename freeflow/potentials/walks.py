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

# Numbers per component that need no tiles, and in a tile: many enough for a call to be worth it, few enough for the
# caches.
_WHOLE, _TILE = 2**14, 6000
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
# An energy of an atom's shares, fields that the second pass wants to know at both ends, and what its shares begin with.
Finish = Callable[[Parts], tuple[Array, Parts, Parts]]


class Pass(NamedTuple):
    """What is to be done with every pair."""

    visit: Visit
    n_own: int  # of what atoms keep
    n_shares: int  # of what both ends get


class Sums(NamedTuple):
    """What a walk finds."""

    own: Parts  # of what atoms keep, over all of them, in the widest precision that JAX has switched on (batch,)
    shares: Parts  # of what both ends get, by atoms (n_rows, batch)


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

    @abstractmethod
    def once(self, each: Pass, x: Sequence[Array], common: Parts = (), rest: np.ndarray | None = None) -> Sums:
        """Sums over all pairs.

        A visit sees a pair from either end. What atoms keep must be the same from both: on which of the two it is
        booked is up to the walk.

        Args:
            each: What to do with a pair.
            x: What `rows` made of the displacements [length].
            common: Arrays (batch,) that visits want to know besides.
            rest: What is taken off the first of what atoms keep before it is added up (n_atoms,).
        """

    @abstractmethod
    def twice(
        self,
        first: Pass,
        finish: Finish,
        second: Pass,
        x: Sequence[Array],
        common: Parts = (),
        rest: np.ndarray | None = None,
    ) -> Sums:
        """Sums over all pairs that depend on sums over the pairs of either end.

        Args:
            first: What to do with a pair in the first pass.
            finish: What to make of its shares. The energy goes to the first of what the atom keeps.
            second: What to do in the second pass, which knows the fields. What atoms keep of it follows that of the
                first pass.
            x: As for `once`, and so are the rest.
            common: See there.
            rest: See there.
        """


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

        Rows are odd, tiles no multiple of eight: arrays whose bytes are a multiple of a memory page, as those of 64 or
        512 atoms are, lie in the same lines of the caches one and all, and drive each other out.
        """
        n_atoms = self._table.partner.shape[1]
        if n_atoms * batch <= _WHOLE:
            return 1, n_atoms | 1
        n_rows = max(1, round(_TILE / batch)) | 1
        n_tiles = -(-n_atoms // n_rows)
        return n_tiles + (n_tiles % 8 == 0), n_rows

    def rows(self, u: Array) -> list[Array]:
        """In the table's order, filled up to whole tiles with whatever atom's."""
        n_atoms, _, batch = u.shape
        order = np.arange(n_atoms) if self._table.order is None else self._table.order
        order = np.pad(order, (0, int(np.prod(self._shape(batch))) - n_atoms)).astype(np.int32)
        return [u[:, a][order] for a in range(3)]

    def atoms(self, rows: Array) -> Array:
        """Back in the order of the atoms, without what was filled up."""
        return rows[: self._table.partner.shape[1]] if self._row_of is None else rows[self._row_of]

    def once(self, each: Pass, x: Sequence[Array], common: Parts = (), rest: np.ndarray | None = None) -> Sums:
        """One loop over the tiles."""
        batch = x[0].shape[1]
        shape = self._shape(batch)
        visits, book = self._visits(each, x, common, shape), self._book(rest, shape, x[0].dtype)

        def visited(tile: Array, sums: Sums) -> Sums:
            own, shares = visits(tile)
            return Sums(book(sums.own, own, tile), _put(sums.shares, shares, tile))

        blank = Sums(_nothing(each.n_own, batch), _blank(each.n_shares, x[0], *shape))
        sums = _loop(shape[0], visited, blank)
        return sums._replace(shares=tuple(part.reshape(-1, batch) for part in sums.shares))

    def twice(
        self,
        first: Pass,
        finish: Finish,
        second: Pass,
        x: Sequence[Array],
        common: Parts = (),
        rest: np.ndarray | None = None,
    ) -> Sums:
        """One loop over the tiles after the other; the second writes over what it begins with."""
        batch = x[0].shape[1]
        shape = self._shape(batch)
        n_fields = len(jax.eval_shape(finish, (x[0],) * first.n_shares)[1])
        gather, book = self._visits(first, x, common, shape), self._book(rest, shape, x[0].dtype)
        push = self._visits(second, x, common, shape, n_fields)

        def gathered(tile: Array, carry: tuple[Parts, Sums]) -> tuple[Parts, Sums]:
            fields, (kept, shares) = carry
            own, sums = gather(tile)
            energy, found, begin = finish(sums)
            kept = book(kept, (own[0] + energy, *own[1:]), tile)
            return _put(fields, found, tile), Sums(kept, _put(shares, begin, tile))

        blank = _blank(n_fields + second.n_shares, x[0], *shape)
        start = blank[:n_fields], Sums(_nothing(first.n_own, batch), blank[n_fields:])
        fields, (own, shares) = _loop(shape[0], gathered, start)
        fields = tuple(field.reshape(-1, batch) for field in fields)

        def pushed(tile: Array, sums: Sums) -> Sums:
            own, shares = push(tile, fields, _get(sums.shares, tile))
            return Sums(_added(sums.own, own), _put(sums.shares, shares, tile))

        more, shares = _loop(shape[0], pushed, Sums(_nothing(second.n_own, batch), shares))
        return Sums((*own, *more), tuple(part.reshape(-1, batch) for part in shares))

    def _book(self, rest: np.ndarray | None, shape: tuple[int, int], dtype: Any) -> Callable[..., Parts]:
        """A function that adds what a tile's atoms keep to what all have kept, less what they would at rest."""
        if rest is None:
            return lambda kept, own, tile: _added(kept, own)
        rest = rest if self._table.order is None else rest[self._table.order]
        by_tiles = jnp.asarray(np.pad(rest, (0, int(np.prod(shape)) - len(rest))).reshape(shape), dtype)

        def book(kept: Parts, own: Parts, tile: Array) -> Parts:
            return _added(kept, (own[0] - _get(by_tiles, tile)[:, None], *own[1:]))

        return book

    def _visits(
        self,
        each: Pass,
        x: Sequence[Array],
        common: Parts,
        shape: tuple[int, int],
        n_fields: int = 0,
    ) -> Callable[..., tuple[Parts, Parts]]:
        """A function that visits the pairs of one tile's atoms.

        It takes the number of the tile, the fields of all atoms and what shares in the tile begin with, (n_rows,
        batch) each, and returns what atoms keep and their shares.
        """
        batch = x[0].shape[1]
        together = _together(each, x[0], n_fields, common)
        tables = self._tables(shape, max(1, together))
        by_tiles = tuple(part.reshape(*shape, batch) for part in x)
        common = tuple(row[None, None] for row in common)
        offsets = [jnp.asarray(component) for component in self._offsets]

        def visits(tile: Array, fields: Parts = (), begin: Parts = ()) -> tuple[Parts, Parts]:
            start, slots_of_tile = _get((by_tiles, tables), tile)
            zeros, rows = jnp.zeros_like(start[0]), tile * shape[1] + np.arange(shape[1], dtype=np.int32)

            def bond(slots: _Slots) -> tuple[list[Array], Array]:
                d = [offsets[a][slots.offset][..., None] + x[a][slots.partner] - start[a][None] for a in range(3)]
                if self._box is not None:
                    d = [d[a] - self._box[a] * jnp.round(d[a] / self._box[a]) for a in range(3)]
                r2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
                return d, r2 if slots.empty is None else jnp.where(slots.empty[..., None], self._nowhere, r2)

            def more(sums: Parts, slots: _Slots) -> Parts:
                d, r2 = bond(slots)
                partner = slots.partner.astype(np.int32)
                # Fields of the tile are read where they stand: what is the same in all turns would be copied. No
                # partner's number is negative, but XLA does not know.
                here = tuple(field[rows + (partner[0] >> 31)][None] for field in fields)
                there = tuple(field[partner] for field in fields)
                own, shares = each.visit(Pair(d, r2, here, there, common))
                parts = [jnp.broadcast_to(part, r2.shape) for part in (*own, *shares)]
                if not together:
                    return tuple(total + part[0] for total, part in zip(sums, parts, strict=True))
                parts = [jnp.concatenate([total[None], part]) for total, part in zip(sums, parts, strict=True)]
                nothing = [np.zeros((), part.dtype) for part in parts]
                return tuple(
                    jax.lax.reduce(parts, nothing, lambda a, b: [p + q for p, q in zip(a, b, strict=True)], (0,))
                )

            def step(carry: tuple[Parts, tuple[_Slots, ...]], after: tuple[_Slots, ...]) -> tuple[Any, None]:
                sums, now = carry
                for slots in now:
                    sums = more(sums, slots)
                return (sums, after), None

            now = jax.tree.map(lambda values: values[0], slots_of_tile)
            after = jax.tree.map(lambda values: jnp.roll(values, -1, axis=0), slots_of_tile)
            sums = (*(zeros,) * each.n_own, *(begin or (zeros,) * each.n_shares))
            sums = jax.lax.scan(step, (sums, now), after)[0][0]
            # What atoms keep is booked half at either end.
            return tuple(0.5 * part for part in sums[: each.n_own]), sums[each.n_own :]

        return visits

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
            if values.dtype != bool:  # numbers as short as they can be: tables take as much memory as positions
                values = values.astype(np.min_scalar_type(values.max()))
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

    def once(self, each: Pass, x: Sequence[Array], common: Parts = (), rest: np.ndarray | None = None) -> Sums:
        """One kernel."""
        own, shares = self._visited(each, x, common)
        return Sums(_total(own, rest), shares)

    def twice(
        self,
        first: Pass,
        finish: Finish,
        second: Pass,
        x: Sequence[Array],
        common: Parts = (),
        rest: np.ndarray | None = None,
    ) -> Sums:
        """Two kernels; what the first one's sums are made into never leaves the registers."""
        fields: Parts = ()

        def finished(own: Parts, sums: Parts) -> tuple[Parts, Parts]:
            nonlocal fields
            energy, fields, begin = finish(sums)
            return (own[0] + energy, *own[1:]), (*fields, *begin)

        own, shares = self._visited(first, x, common, finish=finished)
        fields, begin = shares[: len(fields)], shares[len(fields) :]
        more, shares = self._visited(second, x, common, fields, begin)
        return Sums((*_total(own, rest), *_total(more)), shares)

    def _visited(
        self,
        each: Pass,
        x: Sequence[Array],
        common: Parts,
        fields: Parts = (),
        begin: Parts = (),
        finish: Callable[[Parts, Parts], tuple[Parts, Parts]] = lambda own, shares: (own, shares),
    ) -> tuple[Parts, Parts]:
        """What atoms keep and their shares, after `finish`, (n_atoms, batch) each."""
        from jax.experimental import pallas
        from jax.experimental.pallas import triton

        (n_atoms, batch), dtype = x[0].shape, x[0].dtype
        block, warps = _shape(batch, dtype.itemsize)
        filled = -batch % block

        def kernel(counts, partner, offset, places, firsts, others, shared, *results):
            atom, samples = pallas.program_id(1), pallas.ds(pallas.program_id(0) * block, block)
            start, here = [place[atom, samples] for place in places], tuple(field[atom, samples] for field in others)
            row = tuple(field[samples] for field in shared)

            def step(k, carry):
                other = partner[atom, k]
                d = [offset[atom, k, a] + place[other, samples] - start[a] for a, place in enumerate(places)]
                if self._box is not None:
                    d = [d[a] - edge * jnp.floor(d[a] / edge + 0.5) for a, edge in enumerate(self._box)]
                r2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
                own, shares = each.visit(Pair(d, r2, here, tuple(field[other, samples] for field in others), row))
                # What atoms keep is booked half at either end.
                more = (*(0.5 * part for part in own), *shares)
                return tuple(total + part for total, part in zip(carry, more, strict=True))

            zeros = jnp.zeros_like(start[0])
            sums = tuple(first[atom, samples] for first in firsts) or (zeros,) * each.n_shares
            sums = jax.lax.fori_loop(jnp.int32(0), counts[atom], step, (*(zeros,) * each.n_own, *sums))
            own, sums = finish(sums[: each.n_own], sums[each.n_own :])
            for result, total in zip(results, (*own, *sums), strict=True):
                result[atom, samples] = total

        kinds = jax.eval_shape(finish, (x[0],) * each.n_own, (x[0],) * each.n_shares)
        arguments = (list(x), begin, fields, common)
        if filled:
            arguments = jax.tree.map(lambda part: jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, filled)]), arguments)
        sums = pallas.pallas_call(
            kernel,
            grid=((batch + filled) // block, n_atoms),
            out_shape=(jax.ShapeDtypeStruct((n_atoms, batch + filled), dtype),) * sum(map(len, kinds)),
            compiler_params=triton.CompilerParams(num_warps=warps),
            interpret=jax.default_backend() == "cpu",
        )(self._counts, self._partner, self._offset, *arguments)
        sums = tuple(part[:, :batch] for part in sums) if filled else tuple(sums)
        return sums[: len(kinds[0])], sums[len(kinds[0]) :]


def _widest() -> np.dtype:
    """The widest precision that JAX has switched on."""
    return jax.dtypes.canonicalize_dtype("float64")


def _nothing(number: int, batch: int) -> Parts:
    """What atoms have kept before any is visited."""
    return tuple(jnp.zeros(batch, _widest()) for _ in range(number))


def _added(kept: Parts, own: Parts) -> Parts:
    """What all atoms have kept, with that of some (n_some, batch)."""
    return tuple(total + jnp.sum(part, axis=0, dtype=_widest()) for total, part in zip(kept, own, strict=True))


def _total(own: Parts, rest: np.ndarray | None = None) -> Parts:
    """What all atoms keep, from that of each (n_atoms, batch), less what the first of it would be at rest."""
    if rest is not None:
        own = (own[0] - jnp.asarray(rest, own[0].dtype)[:, None], *own[1:])
    return _added(_nothing(len(own), own[0].shape[1]) if own else (), own)


def _blank(number: int, like: Array, n_tiles: int, n_rows: int) -> Parts:
    """Arrays (n_tiles, n_rows, batch) of numbers that nobody reads.

    The numbers differ: because of equal ones XLA makes one array and copies it for all others.
    """
    shape = (n_tiles, n_rows, like.shape[1])
    return tuple(jnp.full(shape, k, like.dtype) for k in range(number))


def _loop(times: int, body: Callable[[Array, Any], Any], start: Any) -> Any:
    """`jax.lax.fori_loop` from 0, with numbers of 32 bits: with longer ones rows are not found as soon."""
    return jax.lax.fori_loop(0, times, lambda number, carry: body(number.astype(np.int32), carry), start)


def _get(parts: Any, tile: Array) -> Any:
    """Of arrays by tiles those of one tile."""
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, tile, keepdims=False), parts)


def _put(into: Parts, parts: Parts, tile: Array) -> Parts:
    """Arrays by tiles with those of one tile replaced."""
    return tuple(
        jax.lax.dynamic_update_index_in_dim(whole, part, tile, 0) for whole, part in zip(into, parts, strict=True)
    )


def _together(each: Pass, x: Array, n_fields: int, common: Parts) -> int:
    """Slots that one loop may visit; 0 if one is too many, and XLA's own loops are faster than one without vectors."""
    single: Any = jax.ShapeDtypeStruct((), x.dtype)
    fields, common = (single,) * n_fields, (single,) * len(common)
    visit = jax.make_jaxpr(each.visit)(Pair([single] * 3, single, fields, fields, common))
    length = _length(visit.jaxpr, single.dtype.itemsize // 4)
    if (single.dtype == np.float64 and common) or x.shape[1] < _SHORTEST:
        return 0
    n_sums = each.n_own + each.n_shares
    return next((slots for slots, most in _TOGETHER if length + 2 * n_sums <= most), 0)


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
