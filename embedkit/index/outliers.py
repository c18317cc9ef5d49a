"""Outliers: the rows of a store that are far from their nearest neighbours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.index.estimating import announce
from embedkit.index.exact import Gallery, Progress
from embedkit.index.pictures import image_path
from embedkit.store import Store
from embedkit.text import counted

if TYPE_CHECKING:
    from embedkit.index.neighbours import Index

BLOCK_BYTES = 128 << 20  # Of the embeddings that are searched with at a time.

Rows = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outlier:
    """One row: its place (from 1), id, class, file where the root is known, and how far it is from its neighbours."""

    rank: int
    row: int
    id: str
    label: str | None
    path: Path | None
    distance: float
    z_score: float
    nearest: str


@dataclass(frozen=True, eq=False, repr=False)
class Outliers:
    """How far every row is from its neighbours, the farthest first.

    Attributes
    ----------
    store : Store
        What was looked at.
    k : int
        Neighbours of each row.
    within_class : bool
        Whether only rows of the same class counted as neighbours.
    rows : array of int of shape (m,)
        Rows of the store, the most outlying first.
    distances : array of shape (m,)
        Mean cosine distance, 1 - similarity, to the k nearest other rows.
    z_scores : array of shape (m,)
        By how many robust standard deviations a distance is above the median of all rows, or with `within_class` above
        the median of its class. Beyond 3.5 is commonly called an outlier.
    nearest : array of int of shape (m,)
        The nearest other row of each.
    """

    store: Store
    k: int
    within_class: bool
    rows: Rows
    distances: Numbers
    z_scores: Numbers
    nearest: Rows

    def __repr__(self) -> str:
        among = "of its class" if self.within_class else "of the store"
        return f"<Outliers of {self.store.path}: {counted(len(self), 'image')}, by {self.k} neighbours {among}>"

    def __len__(self) -> int:
        return len(self.rows)

    def top(self, n: int | None = None) -> Iterator[Outlier]:
        """Yield the n most outlying rows, or all."""
        store, ids, labels = self.store, self.store.ids, self.store.labels
        columns = (column[:n].tolist() for column in (self.rows, self.distances, self.z_scores, self.nearest))
        for rank, (row, distance, z_score, nearest) in enumerate(zip(*columns, strict=True), start=1):
            code = -1 if labels is None else int(labels[row])
            label = store.classes[code] if code >= 0 else None
            yield Outlier(
                rank, row, ids[row], label, image_path(store, ids[row]), distance, z_score, ids[nearest]
            )  # fmt: skip


def find_outliers(
    store: Store | str | os.PathLike[str],
    k: int = 10,
    *,
    within_class: bool = False,
    index: Index | None = None,
    progress: Progress | None = None,
) -> Outliers:
    """Find the rows of a store that are far from their nearest neighbours.

    Parameters
    ----------
    store : Store or path-like
        What to look at.
    k : int, default 10
        Neighbours of each row, itself excluded; all where there are fewer.
    within_class : bool, default False
        Look for neighbours among rows of the same class only: what stands out is odd for its class, or has the wrong
        label. Rows without a label, and those alone in their class, are left out.
    index : Index, optional
        An index of the store that finds the neighbours faster; their distances are computed exactly all the same.
    progress : callable, optional
        Called with the rows that were measured and their number.

    Returns
    -------
    Outliers
        Every row, the most outlying first; equal ones in the order of their rows.

    Raises
    ------
    EvaluationError
        When no row has a neighbour, or the index is one of another store.
    StoreFormatError
        When an embedding is not finite.
    ValueError
        When `k` is below 1, or `index` is given with `within_class`.

    Notes
    -----
    The mean distance to the k nearest neighbours is Angiulli and Pizzuti's weight, "Fast outlier detection in high
    dimensional spaces", 2002. The robust z-score is (x - median) / (1.4826 MAD), Iglewicz and Hoaglin, "How to detect
    and handle outliers", 1993; where more than half of the distances are equal, the mean absolute deviation times
    1.2533 takes the place of the denominator. Without an index, n x n x d multiplications are made.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec
    >>> from embedkit.index.outliers import find_outliers
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     writer.append([[1, 0], [1, 0.1], [1, 0.2], [-1, 0]], ["a.jpg", "b.jpg", "c.jpg", "odd.jpg"])
    ...     writer.finalise()
    >>> [(one.id, round(one.distance, 3)) for one in find_outliers(f"{folder.name}/s.h5", k=2).top(2)]
    [('odd.jpg', 1.988), ('a.jpg', 0.012)]
    >>> folder.cleanup()
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if index is not None and within_class:
        raise ValueError("an index finds neighbours of every class: within_class goes without one")
    opened = store if isinstance(store, Store) else Store.open(store)
    if index is not None and index.store.content_id != opened.content_id:
        raise EvaluationError(f"the index is one of {index.store.path}, and not of {opened.path}")
    distances = np.full(len(opened), np.nan)
    nearest = np.full(len(opened), -1, dtype=np.int64)
    groups = _classes(opened) if within_class else [np.arange(len(opened))]
    _announce(opened, groups, index)
    gallery, done, total = Gallery(opened), 0, sum(map(len, groups))
    size = max(1, BLOCK_BYTES // (4 * opened.dim))
    if progress is not None:
        progress(0, total)
    for group in groups:
        keep = None
        if within_class:
            keep = np.zeros(len(opened), dtype=np.bool_)
            keep[group] = True
        for start in range(0, len(group), size):
            block = group[start : start + size]
            vectors = opened.rows(block)
            if index is None:
                scores, found = gallery.search(vectors, k + 1, keep=keep, progress=_share(progress, done, block, total))
            else:
                found = np.ascontiguousarray(index.search(vectors, k=k + 1).rows)
                lengths = gallery.norms[block][:, None]
                vectors = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
                scores = gallery.scores(gallery.prepared(vectors), found)
            distances[block], nearest[block] = _mean_distances(block, scores, found, k)
            done += len(block)
            if progress is not None:
                progress(done, total)
    rows = np.flatnonzero(np.isfinite(distances))
    if not len(rows):
        raise EvaluationError(f"no row of {opened.path} has a neighbour to measure its distance to")
    z_scores = np.full(len(opened), np.nan)
    for group in groups:
        measured = group[np.isfinite(distances[group])]
        z_scores[measured] = robust_z_scores(distances[measured])
    rows = rows[np.lexsort((rows, -distances[rows], -z_scores[rows] if within_class else np.zeros(len(rows))))]
    return Outliers(opened, k, within_class, rows, distances[rows], z_scores[rows], nearest[rows])


def robust_z_scores(values: Numbers) -> Numbers:
    """Return by how many robust standard deviations each value is above the median.

    Parameters
    ----------
    values : array of shape (n,)

    Returns
    -------
    array of shape (n,)
        Zero for all where all values are equal.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.index.outliers import robust_z_scores
    >>> robust_z_scores(np.array([1.0, 2.0, 3.0, 4.0, 10.0])).round(2).tolist()
    [-1.35, -0.67, 0.0, 0.67, 4.72]
    """
    if not len(values):
        return values
    away = values - np.median(values)
    # Both factors make the spread that of a standard deviation where values are normal.
    spread = 1.4826 * np.median(np.abs(away)) or 1.2533 * np.mean(np.abs(away))
    return away / spread if spread > 0 else np.zeros_like(values)


def _mean_distances(own: Rows, scores: npt.NDArray[np.float32], found: Rows, k: int) -> tuple[Numbers, Rows]:
    """Return the mean distance of rows to the first k found that are others, NaN without any, and the first of them."""
    others = (found >= 0) & (found != own[:, None])
    others &= np.cumsum(others, axis=1) <= k
    counts = others.sum(axis=1)
    sums = np.where(others, 1 - scores.astype(np.float64), 0).sum(axis=1)
    means = np.divide(sums, counts, out=np.full(len(own), np.nan), where=counts > 0)
    first = np.take_along_axis(found, others.argmax(axis=1)[:, None], axis=1)[:, 0]
    return means, np.where(counts > 0, first, -1)


def _classes(store: Store) -> list[Rows]:
    """Return the rows of each class that has some."""
    if store.labels is None:
        raise EvaluationError(f"{store.path} has no labels; leave within_class (--by-class) out")
    order = np.argsort(store.labels, kind="stable")
    order = order[store.labels[order] >= 0]
    cuts = np.flatnonzero(np.diff(store.labels[order])) + 1
    return [group for group in np.split(order, cuts) if len(group)]


def _announce(store: Store, groups: list[Rows], index: Index | None) -> None:
    if index is None and len(store):
        pairs = sum(len(group) ** 2 for group in groups)
        memory = 4 * BLOCK_BYTES if len(store) * store.dim * 4 > BLOCK_BYTES else 4 * len(store) * store.dim * 4
        announce(pairs // len(store), len(store), store.dim, memory)


def _share(progress: Progress | None, done: int, block: Rows, total: int) -> Progress | None:
    """Return a progress over rows that moves while one block is compared with the gallery."""
    if progress is None:
        return None
    return lambda compared, all: progress(done + len(block) * compared // (all + 1), total)
