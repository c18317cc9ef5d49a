"""Sketches: a few coordinates of every embedding that bound all cosine similarities from above.

An orthogonal transform changes no inner product. Split the coordinates of two unit vectors after it into the first m
and the rest, a = (a1, a2) and b = (b1, b2): by the inequality of Cauchy and Schwarz,

    cos(a, b) = <a1, b1> + <a2, b2> <= <a1, b1> + |a2| |b2|

so a pair whose right side is below a threshold is below it, whatever the other coordinates are. With |a2| as one more
coordinate the right side is an inner product of m + 1 numbers. The principal axes put as much of the vectors' length as
possible into the first m coordinates, which leaves little room between the two sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedkit.index.exact import Gallery

WIDTHS = (32, 64, 128, 256)
SAMPLE = 4096
BLOCK = 1024
SLACK = 1e-5  # For what scores round otherwise than exact numbers.

Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Axes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tile:
    """Pairs that may be similar enough, and how many pairs were looked at for them: all of two blocks of rows."""

    left: Rows
    right: Rows
    pairs: int


class Sketch:
    """The sketch of some rows of a store.

    Parameters
    ----------
    gallery : Gallery
        The store.
    rows : array of shape (n,)
        Which rows.
    axes : array of shape (d, m), optional
        Orthonormal columns, the first of `principal_axes`. Without them nothing is kept in memory: the unit vectors
        themselves are read from the store when they are needed.
    """

    def __init__(self, gallery: Gallery, rows: Rows, axes: Axes | None) -> None:
        self.gallery, self.rows, self.axes = gallery, rows, axes
        self.width = gallery.store.dim if axes is None else axes.shape[1]
        self._kept: Vectors | None = None
        if axes is not None:
            self._kept = np.empty((len(rows), axes.shape[1] + 1), dtype=np.float32)
            for start in range(0, len(rows), BLOCK):
                self._kept[start : start + BLOCK] = _sketched(unit(gallery, rows[start : start + BLOCK]), axes)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def block(self) -> int:
        """How many rows are compared at a time; more of them where they are read again and again."""
        return 512 if self.axes is not None else 2048

    def vectors(self, start: int, stop: int) -> Vectors:
        """Return what bounds the similarities of rows from `start` to `stop`, of shape (stop - start, m + 1)."""
        if self._kept is not None:
            return self._kept[start:stop]
        return unit(self.gallery, self.rows[start:stop]).astype(np.float32)


def unit(gallery: Gallery, rows: Rows) -> npt.NDArray[np.float64]:
    """Return embeddings of length 1 as float64; zero vectors stay zero."""
    vectors = gallery.store.rows(rows).astype(np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    # What the exact scores take for zero is zero here too.
    lengths[(lengths == 0) | (gallery.norms[rows] == 0)] = np.inf
    vectors /= lengths[:, None]
    return vectors


def _sketched(vectors: npt.NDArray[np.float64], axes: Axes) -> npt.NDArray[np.float64]:
    first = vectors @ axes
    left = np.einsum("nd,nd->n", vectors, vectors) - np.einsum("nm,nm->n", first, first)
    # Never shorter than it is: a root makes much of what a difference loses.
    return np.column_stack([first, np.sqrt(np.maximum(left, 0) + 1e-12)])


def principal_axes(gallery: Gallery, rows: Rows) -> Axes:
    """Return orthonormal directions, of shape (d, d), along which a sample of the rows is longest first."""
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLE])
    vectors = unit(gallery, chosen)
    axes: Axes = np.linalg.eigh(vectors.T @ vectors)[1][:, ::-1]
    return np.ascontiguousarray(axes)


def tiles(left: Sketch, right: Sketch | None, least: float) -> Iterator[Tile]:
    """Yield the pairs whose similarity may be `least` or more, in bounded memory.

    Parameters
    ----------
    left : Sketch
        Rows to compare.
    right : Sketch, optional
        With the rows of another one, sketched along the same axes; without it, with one another, each pair once with
        the lower row first.
    least : float
        Cosine similarity.

    Yields
    ------
    Tile
        Every pair that reaches `least` is in one of them; most others are in none.
    """
    other = left if right is None else right
    high, wide = left.block, 2048
    memory = np.empty(high * wide, dtype=np.float32)
    bound = least - SLACK - (other.width + 1) * 2.0**-23  # Products of float32 round, the wider the more.
    for top in range(0, len(left), high):
        rows = left.vectors(top, min(top + high, len(left)))
        for start in range(0 if right is not None else top - top % wide, len(other), wide):
            columns = other.vectors(start, min(start + wide, len(other)))
            bounds = memory[: len(rows) * len(columns)].reshape(len(rows), len(columns))
            np.matmul(rows, columns.T, out=bounds)
            row, column = divmod(np.flatnonzero(bounds >= bound), len(columns))
            row, column = row + top, column + start
            if right is None:
                once = row < column
                row, column = row[once], column[once]
            yield Tile(left.rows[row], other.rows[column], bounds.size)


def scores_of(left: Gallery, right: Gallery, rows: Rows, others: Rows) -> Vectors:
    """Return the similarity of each pair of a row of `left` and a row of `right`, as a search returns it."""
    scores = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        few, places = np.unique(rows[part], return_inverse=True)
        queries = right.prepared(right.placed(left.store.rows(few)))[places.reshape(-1)]
        scores[part] = right.scores(queries, others[part, None])[:, 0]
    return scores


@dataclass(frozen=True)
class Plan:
    """How two sets of rows are compared: along which axes (None: all of the vectors), and what a pair costs then."""

    axes: Axes | None
    seconds_per_pair: float


def plan(left: Gallery, left_rows: Rows, right: Gallery, right_rows: Rows, least: float) -> Plan:
    """Choose how many coordinates to keep, by trying on a sample of the rows how long each number of them takes."""
    if len(left_rows) * len(right_rows) <= SAMPLE**2:
        return Plan(None, 0.0)  # Done sooner than planned.
    random = np.random.default_rng(1)
    rows, others = (np.sort(random.permutation(found)[: SAMPLE // 2]) for found in (left_rows, right_rows))
    axes = principal_axes(right, right_rows)
    pair_seconds = _seconds_of_scores(left, right, random.choice(rows[:256], 1024), random.choice(others, 1024))
    plans = []
    for width in (*(width for width in WIDTHS if 2 * width <= left.store.dim), None):
        chosen = None if width is None else axes[:, :width]
        one, two = Sketch(left, rows, chosen), Sketch(right, others, chosen)
        started = time.perf_counter()
        survivors = sum(len(tile.left) for tile in tiles(one, two, least))
        seconds = time.perf_counter() - started + survivors * pair_seconds
        plans.append(Plan(chosen, seconds / (len(rows) * len(others))))
    return min(plans, key=lambda plan: plan.seconds_per_pair)


def _seconds_of_scores(left: Gallery, right: Gallery, rows: Rows, others: Rows) -> float:
    scores_of(left, right, rows[:64], others[:64])  # The first time reads the lengths of all rows.
    started = time.perf_counter()
    scores_of(left, right, rows, others)
    return (time.perf_counter() - started) / len(rows)
