"""Cells, lattice translations and neighbour tables; host-side, NumPy, float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import KDTree

from freeflow.errors import InputError
from freeflow.types import Crystal

MAX_NEIGHBOURS = 10_000  # of an atom; a neighbour table takes 40 bytes and a look in Python for each
MAX_PAIRS = 40_000_000
_MANY = 800  # atoms, from which on the order in which they are visited matters; see docs/speed.md


class Lattice(NamedTuple):
    """Conventional cell of a named lattice, for a nearest-neighbour-free scale: cell in units of a."""

    cell: np.ndarray  # (3, 3) rows, in units of the lattice constant a
    basis: np.ndarray  # (n_basis, 3) fractional
    description: str
    kinds: tuple[int, ...] = ()  # which of the species a basis atom is; empty: one species


_SQRT3 = np.sqrt(3.0)
_IDEAL = np.sqrt(8.0 / 3.0)  # ideal c/a of hexagonal close packing and of wurtzite
_FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
# Hexagonal ice: the oxygen sublattice of ice Ih with ideal tetrahedra, in the orthorhombic cell
# a x sqrt(3) a x sqrt(8/3) a. Bonds along c are 3/8 c long; the first layer pair sits at 0 and
# 1/8 c below, the second is its mirror image, shifted.
_HEXAGONAL_ICE = np.array(
    [
        [0.0, 0.0, 1 / 16],
        [0.5, 0.5, 1 / 16],
        [0.0, 1 / 3, 15 / 16],
        [0.5, 5 / 6, 15 / 16],
        [0.0, 0.0, 7 / 16],
        [0.5, 0.5, 7 / 16],
        [0.0, 1 / 3, 9 / 16],
        [0.5, 5 / 6, 9 / 16],
    ]
)

LATTICES = {
    "sc": Lattice(np.eye(3), np.zeros((1, 3)), "simple cubic, 1 atom per cubic cell"),
    "bcc": Lattice(np.eye(3), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), "body-centred cubic, 2 atoms per cubic cell"),
    "fcc": Lattice(np.eye(3), _FCC, "face-centred cubic, 4 atoms per cubic cell"),
    "hcp": Lattice(
        np.array([[1, 0, 0], [-0.5, _SQRT3 / 2, 0], [0, 0, _IDEAL]]),
        np.array([[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]),
        "hexagonal close-packed, ideal c/a, 2 atoms per hexagonal cell",
    ),
    "diamond": Lattice(np.eye(3), np.concatenate([_FCC, _FCC + 0.25]), "diamond, 8 atoms per cubic cell"),
    "hexagonal_ice": Lattice(
        np.diag([1.0, _SQRT3, _IDEAL]), _HEXAGONAL_ICE, "hexagonal ice, ideal c/a, 8 atoms per orthorhombic cell"
    ),
    "rocksalt": Lattice(
        np.eye(3), np.concatenate([_FCC, _FCC + 0.5]), "rock salt, 8 atoms per cubic cell", (0, 0, 0, 0, 1, 1, 1, 1)
    ),
    "cesium_chloride": Lattice(
        np.eye(3), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), "cesium chloride, 2 atoms per cubic cell", (0, 1)
    ),
    "zincblende": Lattice(
        np.eye(3), np.concatenate([_FCC, _FCC + 0.25]), "zinc blende, 8 atoms per cubic cell", (0, 0, 0, 0, 1, 1, 1, 1)
    ),
}


def face_distances(cell: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, " 3"]:
    """Distances between opposite faces of a cell [length]."""
    return 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)


def is_orthorhombic(cell: Float[np.ndarray, "3 3"]) -> bool:
    """Whether the lattice vectors lie along x, y and z."""
    return bool(np.allclose(cell, np.diag(np.diag(cell)), atol=1e-9 * np.abs(cell).max()))


# ------------------------------------------------------------------ lattice translations


def smith_form(matrix: Int[np.ndarray, "3 3"]) -> tuple[Int[np.ndarray, " 3"], Int[np.ndarray, "3 3"]]:
    """Smith normal form U M V = diag(d): the orders d and the unimodular V.

    With M the rows of a supercell in a primitive basis, integer rows n modulo the rows of M are
    n @ V modulo d: the translations of the supercell as a product of cyclic groups.

    Raises:
        ValueError: If the matrix is singular.
    """
    m = [[int(value) for value in row] for row in matrix]  # Python integers do not overflow
    if round(np.linalg.det(np.asarray(matrix, float))) == 0:
        raise ValueError("a singular matrix has no Smith form with finite orders")
    v = np.eye(3, dtype=object)
    a = np.array(m, dtype=object)
    for k in range(3):
        while True:
            # The smallest non-zero entry of the remaining block becomes the pivot.
            block = [(abs(a[i, j]), i, j) for i in range(k, 3) for j in range(k, 3) if a[i, j] != 0]
            _, i, j = min(block)
            a[[k, i]] = a[[i, k]]
            a[:, [k, j]] = a[:, [j, k]]
            v[:, [k, j]] = v[:, [j, k]]
            for i in range(k + 1, 3):
                a[i] -= (a[i, k] // a[k, k]) * a[k]
            for j in range(k + 1, 3):
                quotient = a[k, j] // a[k, k]
                a[:, j] -= quotient * a[:, k]
                v[:, j] -= quotient * v[:, k]
            if all(a[i, k] == 0 and a[k, i] == 0 for i in range(k + 1, 3)):
                break
    return np.array([abs(a[k, k]) for k in range(3)], dtype=int), np.array(v, dtype=int)


class Translations(NamedTuple):
    """The translations of a periodic crystal as a finite abelian group."""

    primitive: np.ndarray  # (3, 3) rows: primitive lattice vectors [length]
    basis: np.ndarray  # (n_basis, 3) positions of the basis atoms [length]
    group: np.ndarray  # (3,) orders of the cyclic groups
    to_group: np.ndarray  # (3, 3) integer: n @ to_group modulo group

    def locate(self, positions: Float[np.ndarray, "n 3"], tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """Translation (flat, C order over `group`) and basis atom of each position.

        Raises:
            InputError: If a position is further than `tolerance` [length] from every site.
        """
        inverse = np.linalg.inv(self.primitive)
        # Folding into [0, 1) must not put a site near 1 and its twin near 0 apart: the tree is periodic.
        fold = lambda x: np.where(x - np.floor(x) >= 1.0, 0.0, x - np.floor(x))  # noqa: E731
        tree = KDTree(fold(self.basis @ inverse), boxsize=1.0)
        _, b = tree.query(fold(positions @ inverse))
        steps = (positions - self.basis[b]) @ inverse
        n = np.rint(steps)
        off = np.linalg.norm((steps - n) @ self.primitive, axis=1)
        if off.max() > tolerance:
            raise InputError(f"atom {int(off.argmax())} lies {off.max():.3g} away from the nearest site of its lattice")
        t = (n.astype(int) @ self.to_group) % self.group
        return np.asarray(np.ravel_multi_index(tuple(t.T), tuple(self.group))), np.asarray(b)


# ------------------------------------------------------------------ neighbour tables


class NeighbourTable(NamedTuple):
    """Fixed half neighbour list of a crystal, cut into slots that are permutations of the atoms.

    In slot s atom i has the partner `partner[s, i]` at lattice separation `offset[s, i]`, and is
    itself the partner of `source[s, i]`. Every pair within `radius` stands in exactly one slot,
    so a force found once is added to one atom and fetched by the other: no scatter, no pair
    evaluated twice. Places without a pair hold a separation far outside the cutoff. With `box`
    set, separations are wrapped into it at run time and `empty` marks places without a pair.
    Kernels that go through memory do well to visit the atoms in `order`.
    """

    partner: np.ndarray  # (n_slots, n_atoms) int
    source: np.ndarray  # (n_slots, n_atoms) int
    offset: np.ndarray  # (n_slots, n_atoms, 3) [length]
    radius: float  # all pairs up to this lattice distance are in the table [length]
    box: np.ndarray | None = None  # (3,) only with nearest images
    empty: np.ndarray | None = None  # (n_slots, n_atoms) bool, only with nearest images
    order: np.ndarray | None = None  # (n_atoms,) int: layer by layer; None: few atoms, any order will do

    @property
    def n_pairs(self) -> int:
        far = np.linalg.norm(self.offset, axis=-1) > 1.5 * self.radius
        return int((~far).sum()) if self.empty is None else int((~self.empty).sum())


def primitive_bonds(crystal: Crystal, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bonds of the atoms of one primitive cell up to `radius` [length], which stand for all.

    Returns:
        The atom (n_bonds,) that a bond starts from, the one that it leads to, and the way there (n_bonds, 3).

    Raises:
        InputError: If there are too many to hold.
    """
    _require_few(crystal, radius)
    # A vector's component along a lattice vector is at most its length over the distance of the faces.
    reach = np.floor(radius / face_distances(crystal.cell) + 0.5 + 1e-9).astype(int)
    images = (np.indices(tuple(2 * reach + 1)).reshape(3, -1).T - reach) @ crystal.cell
    inverse = np.linalg.inv(crystal.cell)
    bonds = []
    for atom in crystal.site_of[0]:
        apart = crystal.sites - crystal.sites[atom]
        apart -= np.rint(apart @ inverse) @ crystal.cell
        for image in images:
            away = apart + image
            length = np.einsum("ij,ij->i", away, away)
            near = np.flatnonzero((length <= radius**2) & (length > 0))
            bonds.append((np.full(len(near), atom), near, away[near]))
    first, second, separation = (np.concatenate(parts) for parts in zip(*bonds, strict=True))
    return first, second, separation


def _require_few(crystal: Crystal, radius: float) -> None:
    """Refuse what would take all memory, or for ever."""
    per_atom = crystal.n_atoms / crystal.volume * 4 / 3 * math.pi * radius**3
    images = float(np.prod(2 * (radius / face_distances(crystal.cell)) + 1))
    if per_atom > MAX_NEIGHBOURS or per_atom * crystal.n_atoms / 2 > MAX_PAIRS or images > MAX_PAIRS:
        raise InputError(
            f"an atom has {per_atom:.3g} neighbours within {radius:.4g}, in {images:.3g} images of the cell; at most "
            f"{MAX_NEIGHBOURS} and {MAX_PAIRS:.0e} pairs in all can be held: are the cutoff and the density right?"
        )


def neighbour_table(crystal: Crystal, radius: float, between: tuple[str, str] | None = None) -> NeighbourTable:
    """All pairs of sites, periodic images included, up to `radius` [length]; of two species only, if asked."""
    n_basis = crystal.site_of.shape[1]
    translation, basis = site_indices(crystal)
    # Of the two directions of a bond keep one.
    first, second, separation = primitive_bonds(crystal, radius)
    kept = _leading(separation)
    if between is not None:
        kept &= _are_between(crystal, first, second, between)
    first, second, separation = first[kept], second[kept], separation[kept]
    order = np.lexsort((*np.round(separation, 6).T, basis[second], basis[first]))
    bonds = [(int(basis[first[k]]), int(basis[second[k]]), int(second[k]), separation[k]) for k in order]

    far = np.array([1e3 * radius, 0.0, 0.0])
    partner, offset = [], []
    for matching in _matchings([(a, b) for a, b, _, _ in bonds], n_basis):
        of_basis = {bonds[k][0]: bonds[k] for k in matching}
        free = iter(sorted(set(range(n_basis)) - {bonds[k][1] for k in matching}))
        to, apart = np.empty(crystal.n_atoms, int), np.empty((crystal.n_atoms, 3))
        for a in range(n_basis):
            _, b, j, vector = of_basis.get(a) or (a, (empty := next(free)), crystal.site_of[0, empty], far)
            here = crystal.site_of[:, a]
            to[here] = crystal.site_of[_shifted(crystal.group, int(translation[j])), b]
            apart[here] = vector
        partner.append(to)
        offset.append(apart)
    if not partner:  # an ideal gas: no pair within reach
        partner, offset = [np.arange(crystal.n_atoms)], [np.tile(far, (crystal.n_atoms, 1))]
    partner_of = np.array(partner)
    order = _layer_by_layer(crystal) if crystal.n_atoms >= _MANY else None
    return NeighbourTable(partner_of, np.argsort(partner_of, axis=1), np.array(offset), radius, order=order)


def _layer_by_layer(crystal: Crystal) -> np.ndarray:
    """Atoms (n_atoms,) by layers, in these by rows: what a row has as neighbours are rows of few layers."""
    x, y, z = np.round(crystal.sites @ np.linalg.inv(crystal.cell) % 1, 6).T % 1
    return np.lexsort((z, y, x))


def _are_between(crystal: Crystal, i: np.ndarray, j: np.ndarray, kinds: tuple[str, str]) -> np.ndarray:
    """Whether pairs of atoms are of these two species, one each."""
    a, b = (np.array(crystal.species) == kind for kind in kinds)
    return (a[i] & b[j]) | (b[i] & a[j])


def nearest_image_table(crystal: Crystal, between: tuple[str, str] | None = None) -> NeighbourTable:
    """Every pair of atoms once, with its nearest image found at run time; of two species only, if asked.

    This is what the papers' code does in boxes smaller than twice the cutoff; it is not the
    energy of the periodic crystal.

    Raises:
        InputError: If the cell is not orthorhombic, or holds too many atoms.
    """
    if crystal.n_atoms**2 / 2 > MAX_PAIRS:
        raise InputError(
            f"nearest_image_only pairs every atom with every other, too many to hold for {crystal.n_atoms} atoms; "
            "leave it out"
        )
    if not is_orthorhombic(crystal.cell):
        raise InputError("nearest_image_only works in orthorhombic cells only; use a larger box instead")
    n, box = crystal.n_atoms, np.diag(crystal.cell).copy()
    atoms = np.arange(n)
    shifts = np.arange(1, n // 2 + 1)
    partner = (atoms[None] + shifts[:, None]) % n
    offset = crystal.sites[partner] - crystal.sites[None]
    offset -= box * np.round(offset / box)
    # With an even number of atoms the last shift meets every pair twice.
    empty = np.broadcast_to((2 * shifts[:, None] == n) & (atoms[None] >= n // 2), partner.shape)
    if between is not None:
        empty = empty | ~_are_between(crystal, np.broadcast_to(atoms, partner.shape), partner, between)
    return NeighbourTable(
        partner, np.argsort(partner, axis=1), offset, float(np.linalg.norm(box) / 2), box, np.array(empty)
    )


def nearest_neighbour_distance(crystal: Crystal) -> float:
    """Shortest distance between two sites, periodic images included [length]."""
    # No packing of spheres is denser than fcc: some pair is closer than 2^(1/6) (V/N)^(1/3).
    _, _, separation = primitive_bonds(crystal, 1.2 * (crystal.volume / crystal.n_atoms) ** (1 / 3))
    return float(np.linalg.norm(separation, axis=1).min())


def site_indices(crystal: Crystal) -> tuple[np.ndarray, np.ndarray]:
    """Translation and basis atom of every site."""
    translation, basis = (np.empty(crystal.n_atoms, int) for _ in range(2))
    grid = np.indices(crystal.site_of.shape)
    translation[crystal.site_of], basis[crystal.site_of] = grid[0], grid[1]
    return translation, basis


def _shifted(group: tuple[int, int, int], by: int) -> np.ndarray:
    """Flat indices of all translations, each with translation `by` added."""
    steps = np.indices(group).reshape(3, -1).T + np.array(np.unravel_index(by, group))
    return np.asarray(np.ravel_multi_index(tuple((steps % group).T), group))


def _leading(vectors: np.ndarray) -> np.ndarray:
    """True for exactly one of v and -v: the one whose first component away from zero is positive."""
    rounded = np.round(vectors, 6)
    x, y, z = rounded.T
    return (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))


def _matchings(edges: list[tuple[int, int]], n: int) -> list[list[int]]:
    """Split the edges of a bipartite multigraph into matchings (as few as maximum matchings give)."""
    remaining = list(range(len(edges)))
    matchings = []
    while remaining:
        # One of each set of parallel edges takes part.
        by_ends = {edges[k]: k for k in reversed(remaining)}
        ends = np.array(list(by_ends))
        graph = csr_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(n, n))
        column_of = maximum_bipartite_matching(graph, perm_type="column")
        chosen = [by_ends[(row, int(column))] for row, column in enumerate(column_of) if column >= 0]
        matchings.append(chosen)
        taken = set(chosen)
        remaining = [k for k in remaining if k not in taken]
    return matchings
