"""Frames as displacements from the sites of a crystal: translation, labels, and atoms that have left."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial import KDTree

from freeflow.errors import InputError
from freeflow.geometry import face_distances, is_orthorhombic, nearest_neighbour_distance
from freeflow.types import Crystal

MELTED = 0.1  # share of atoms off their sites from which on a frame has melted
UNKNOWN_SPECIES = {"", "X", "VS"}  # names of no element: ASE's and mdtraj's
_BLOCK = 64  # frames that are fitted together: they stay in the cache
_ANCHORS = 3  # atoms that are tried for the translation


def formula(species: Sequence[str]) -> str:
    """Species and how many of each, as text."""
    return " ".join(f"{name}{count}" for name, count in sorted(Counter(species).items()))


class Aligned(NamedTuple):
    """Frames as displacements from the sites; row s of a frame belongs to site s."""

    displacements: Float[np.ndarray, "n_frames n_atoms 3"]  # mean-free [length]
    order: Int[np.ndarray, "n_frames n_atoms"]  # order[f, s]: the atom of the file on site s
    n_off: Int[np.ndarray, " n_frames"]  # atoms at least half a nearest-neighbour distance from their site

    @property
    def sound(self) -> Bool[np.ndarray, " n_frames"]:
        """Frames of the labelled crystal, which the system's target ensemble is made of."""
        return self.n_off == 0

    @property
    def melted(self) -> Bool[np.ndarray, " n_frames"]:
        """Frames with a tenth of the atoms, and two at least, off their sites."""
        return self.n_off >= _melt(self.order.shape[1])

    @property
    def hopped(self) -> Bool[np.ndarray, " n_frames"]:
        """Frames where some atom is off its site but the crystal is there."""
        return ~self.sound & ~self.melted


def _melt(n_atoms: int) -> float:
    return max(2.0, MELTED * n_atoms)


class _Fit(NamedTuple):
    displacements: np.ndarray
    order: np.ndarray  # (n_atoms,)
    n_off: np.ndarray

    def better(self, other: _Fit) -> bool:
        """Whether this fit of one frame has fewer atoms off their sites, or clearly smaller displacements."""
        if self.n_off[0] != other.n_off[0]:
            return bool(self.n_off[0] < other.n_off[0])
        # Labels that differ by a lattice translation are equally good, and no reason to change.
        return float(np.sum(self.displacements**2)) < 0.999 * float(np.sum(other.displacements**2))


def to_displacements(
    positions: Float[np.ndarray, "n_frames n_atoms 3"],
    crystal: Crystal,
    species: Sequence[str] | None = None,
    guess: Int[np.ndarray, " n_atoms"] | None = None,
) -> Aligned:
    """Mean-free displacements from the sites, whatever the translation, wrapping and order of the atoms.

    With known labels nothing is searched: displacements from an atom's own site relative to those of one
    atom are free of the translation, their minimum images are free of wrapping, and their mean is taken
    off. Labels that differ by a lattice translation are as good, and come out the same way. A
    frame where this puts an atom off its site, and the first if there is no guess, is labelled anew: atoms go
    to their nearest sites for the last known translation and for those that put one atom on each site of its kind in
    one primitive cell (all others differ by lattice translations). The least sum of squared displacements wins; if no
    translation gives one atom to every site, the Hungarian algorithm does. Labels that serve are kept for the next
    frame. Where labelling fails frame after frame, as in a melt, it is
    tried less and less often, up to every 64th frame; such frames are flagged anyway.

    Args:
        positions: Wrapped or not, drifting or not [length]; in the orientation of the crystal's cell.
        crystal: The perfect crystal.
        species: Chemical symbol of every atom; atoms then stay on sites of their kind. None, or
            unknown symbols on either side: any atom may sit on any site.
        guess: Order to try first, such as the last one of the previous chunk; by default 0, 1, 2, ...

    Raises:
        InputError: If the frames do not have the crystal's atoms, or not finite coordinates.
    """
    sites = _sites_of(crystal, species)
    n_frames, n_atoms, _ = positions.shape
    if n_atoms != crystal.n_atoms:
        raise InputError(f"frames of {n_atoms} atoms do not fit a crystal of {crystal.n_atoms}")
    if not np.isfinite(positions).all():
        raise InputError("frames hold coordinates that are not finite numbers")
    displacements = np.empty((n_frames, n_atoms, 3))
    orders, n_off = np.empty((n_frames, n_atoms), np.int32), np.empty(n_frames, int)
    order = sites.first_order() if guess is None else np.asarray(guess)
    melt = _melt(n_atoms)
    frame, size, failures, waiting = 0, _BLOCK, 0, 0
    while frame < n_frames:
        last = min(frame + size, n_frames)
        fit = _fit(positions[frame:last], order, sites)
        displacements[frame:last], orders[frame:last], n_off[frame:last] = fit.displacements, order, fit.n_off
        relabelled = False
        suspects = fit.n_off > 0
        # Labels nobody vouches for must be the best, not just possible.
        suspects[:1] |= frame == 0 and guess is None
        for k in np.flatnonzero(suspects):
            if waiting:
                waiting -= 1
                continue
            old = _Fit(fit.displacements[k : k + 1], order, fit.n_off[k : k + 1])
            at = frame + k
            # With a few atoms off, the translation is right.
            new = _labelled(positions[at], old, sites, everywhere=not 0 < n_off[at] < melt)
            displacements[at], orders[at], n_off[at] = new.displacements[0], new.order, new.n_off[0]
            if new is old and not n_off[at]:
                continue
            if n_off[at]:
                failures += 1
                waiting = min(2 ** (failures - 1), 64) if failures > 4 else 0
            else:
                # What follows is seen with these labels, a few frames at first: each may have its own.
                order, frame, size, failures, relabelled = new.order, at + 1, 1, 0, True
                break
        if not relabelled:
            frame, size = last, min(2 * size, _BLOCK)
    return Aligned(displacements, orders, n_off)


@dataclass(frozen=True, eq=False)
class _Sites:
    """The crystal as the search for labels sees it."""

    crystal: Crystal
    inverse: np.ndarray  # (3, 3) of the cell
    box: np.ndarray | None  # (3,) if the cell is orthorhombic
    limit: float  # half the nearest-neighbour distance [length]
    atom_kind: np.ndarray  # (n_atoms,)
    site_kind: np.ndarray  # (n_atoms,)

    def nearest_image(self, d: np.ndarray) -> np.ndarray:
        """Exact for vectors shorter than half the distance between faces of the cell."""
        if self.box is not None:
            return d - self.box * np.rint(d / self.box)
        return d - np.rint(d @ self.inverse) @ self.crystal.cell

    def first_order(self) -> np.ndarray:
        """Atoms on sites in the order of the file, kind by kind."""
        order = np.empty(len(self.site_kind), int)
        order[np.argsort(self.site_kind, kind="stable")] = np.argsort(self.atom_kind, kind="stable")
        return order

    @functools.cached_property
    def images(self) -> dict[int, tuple[KDTree, np.ndarray]]:
        """By kind: a tree of the sites in and around the cell, and which site each is."""
        crystal, reach = self.crystal, 4 * self.limit / face_distances(self.crystal.cell)
        folded = crystal.sites @ self.inverse
        folded -= np.floor(folded)
        n = np.ceil(reach).astype(int)
        shifts = np.stack(np.meshgrid(*(np.arange(-m, m + 1) for m in n), indexing="ij"), axis=-1).reshape(-1, 3)
        around = (folded[None] + shifts[:, None]).reshape(-1, 3)
        near = ((around >= -reach) & (around <= 1 + reach)).all(axis=1)
        around, site = around[near] @ crystal.cell, np.tile(np.arange(crystal.n_atoms), len(shifts))[near]
        kinds = np.unique(self.site_kind)
        return {int(k): (KDTree(around[of]), site[of]) for k in kinds for of in [self.site_kind[site] == k]}

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest site of its kind to every atom (n_atoms,), and the displacement from it (n_atoms, 3)."""
        folded = x @ self.inverse
        x = (folded - np.floor(folded)) @ self.crystal.cell
        site, d = np.empty(len(x), int), np.empty_like(x)
        for kind, (tree, index) in self.images.items():
            of = np.flatnonzero(self.atom_kind == kind)
            _, found = tree.query(x[of])
            site[of], d[of] = index[found], x[of] - tree.data[found]
        return site, d

    def assign(self, x: np.ndarray) -> np.ndarray:
        """Order of the atoms that makes the sum of squared displacements least (Hungarian algorithm)."""
        from scipy.optimize import linear_sum_assignment

        cost = np.empty((len(x), len(x)))
        for rows in np.array_split(np.arange(len(x)), -(-len(x) // 256)):
            cost[rows] = np.sum(self.nearest_image(x[rows, None] - self.crystal.sites[None]) ** 2, axis=2)
        # Far more than any sum of squares can save.
        cost[self.atom_kind[:, None] != self.site_kind[None]] = len(x) * (1.0 + cost.max())
        atom, site = linear_sum_assignment(cost)
        return atom[np.argsort(site)]


def _sites_of(crystal: Crystal, species: Sequence[str] | None) -> _Sites:
    n = crystal.n_atoms
    atom_kind = site_kind = np.zeros(n, int)
    if species is not None and not UNKNOWN_SPECIES & {*species, *crystal.species}:
        if Counter(species) != Counter(crystal.species):
            raise InputError(f"atoms {formula(species)} do not fit sites {formula(crystal.species)}")
        names = sorted(set(species))
        atom_kind, site_kind = (np.array([names.index(name) for name in side]) for side in (species, crystal.species))
    return _Sites(
        crystal=crystal,
        inverse=np.linalg.inv(crystal.cell),
        box=np.diag(crystal.cell).copy() if is_orthorhombic(crystal.cell) else None,
        limit=0.5 * nearest_neighbour_distance(crystal),
        atom_kind=atom_kind,
        site_kind=site_kind,
    )


def _fit(positions: np.ndarray, order: np.ndarray, sites: _Sites) -> _Fit:
    """Displacements of frames (n_frames, n_atoms, 3) with known labels."""
    d = positions[:, order] - sites.crystal.sites
    d = sites.nearest_image(d - d[:, :1])
    d -= d.mean(axis=1, keepdims=True)
    n_off = _count_off(d, sites)
    again = np.flatnonzero(n_off)
    if again.size:
        # The atom that everything was relative to may itself be far from its site.
        part = d[again]
        for _ in range(2):
            part = sites.nearest_image(part)
            part -= part.mean(axis=1, keepdims=True)
        d[again], n_off[again] = part, _count_off(part, sites)
    return _Fit(d, order, n_off)


def _count_off(d: np.ndarray, sites: _Sites) -> np.ndarray:
    return np.sum(np.einsum("fni,fni->fn", d, d) >= sites.limit**2, axis=1)


def _labelled(x: np.ndarray, old: _Fit, sites: _Sites, everywhere: bool) -> _Fit:
    """Labels for one frame (n_atoms, 3): the best found around the old translation, or `everywhere`.

    All translations of a search are compared: where layers are stacked as in hcp, a wrong one may keep every atom
    within reach of some site of its own.
    """
    perfect = sites.crystal.sites
    last_known = x[old.order[0]] - perfect[0] - old.displacements[0, 0]
    rounds = [[last_known]]
    if everywhere:
        anchors = dict.fromkeys(int(atom) for atom in np.linspace(0, len(x), _ANCHORS, endpoint=False))
        basis = sites.crystal.site_of[0]
        more = [[x[a] - perfect[b] for b in basis if sites.site_kind[b] == sites.atom_kind[a]] for a in anchors]
        rounds = [rounds[0] + more[0], *more[1:]]
    least, best, fit = math.inf, last_known, old
    for translations in rounds:
        for translation in translations:
            translation, site, cost = _settled(x, translation, sites)
            if cost < least:
                least, best = cost, translation
            if len(np.unique(site)) == len(x):
                new = _fit(x[None], np.argsort(site), sites)
                fit = new if new.better(fit) else fit
        # Other atoms are asked only if what the first one said leads nowhere.
        if not fit.n_off[0]:
            return fit
    order = np.full(len(x), -1)
    for _ in range(3):
        previous, order = order, sites.assign(x - best)
        new = _fit(x[None], order, sites)
        fit = new if new.better(fit) else fit
        if (order == previous).all():
            break
        best = x[order[0]] - perfect[0] - new.displacements[0, 0]
    return fit


def _settled(x: np.ndarray, translation: np.ndarray, sites: _Sites) -> tuple[np.ndarray, np.ndarray, float]:
    """Translation that centres atoms on their nearest sites, these sites, and the sum of squared distances."""
    site, d = sites.nearest(x - translation)
    shift = d.mean(axis=0)
    for _ in range(5):
        if np.linalg.norm(shift) < 1e-3 * sites.limit:
            break
        translation = translation + shift
        site, d = sites.nearest(x - translation)
        shift = d.mean(axis=0)
    return translation + shift, site, float(np.sum((d - shift) ** 2))
