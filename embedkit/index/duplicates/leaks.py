"""Leaks: images of one store that are in another one too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedkit.index.duplicates.grouping import Rows, same_content, same_embedding
from embedkit.index.duplicates.groups import announce
from embedkit.index.duplicates.sketches import Sketch, plan, scores_of, tiles
from embedkit.index.duplicates.thresholds import Threshold, checked_threshold, choose_threshold
from embedkit.index.exact import Gallery
from embedkit.store import Store
from embedkit.text import counted

MOST = 10
FLUSH = 1 << 20  # Pairs.

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, repr=False)
class Leaks:
    """Pairs of a row of one store and a row of another one whose images are the same, or nearly so.

    Attributes
    ----------
    left, right : Store
        The stores.
    threshold : Threshold
        The least similarity of near duplicates.
    left_rows, right_rows : arrays of shape (p,)
        The rows of each pair: sorted by the left ones, the best pair of each first.
    scores : array of shape (p,)
        Cosine similarities.
    exact : array of bool of shape (p,)
        Whether the content hashes are the same.
    """

    left: Store
    right: Store
    threshold: Threshold
    left_rows: Rows
    right_rows: Rows
    scores: npt.NDArray[np.float32]
    exact: npt.NDArray[np.bool_]

    def __repr__(self) -> str:
        found = f"{counted(len(self.leaked), 'image')} in {counted(len(self), 'pair')}"
        return f"<Leaks of {self.left.path} in {self.right.path}: {found}, threshold {self.threshold.value:.4f}>"

    def __len__(self) -> int:
        return len(self.left_rows)

    @property
    def leaked(self) -> Rows:
        """The rows of the left store that are in the right one, each once."""
        return np.unique(self.left_rows)


def find_leaks(
    left: Store | str | os.PathLike[str],
    right: Store | str | os.PathLike[str],
    *,
    threshold: float | str = "auto",
    most: int = MOST,
    progress: Progress | None = None,
) -> Leaks:
    """Find the images of one store that are also in another one, exactly or nearly.

    Parameters
    ----------
    left, right : Store or path-like
        The stores, such as those of a test set and a training set.
    threshold : float or "auto", default "auto"
        The least cosine similarity of near duplicates; "auto" chooses it from how far from its neighbours in `right` a
        row of `left` is, see `choose_threshold`.
    most : int, default 10
        How many rows of `right` to name for each row of `left`: the exact ones, then the most similar.
    progress : callable, optional
        Called with the rows of `left` that were compared and their number; first with those of `right`, when the
        threshold is chosen.

    Returns
    -------
    Leaks
        The pairs. Of a row of `left` that is in `right`, one pair at least.

    Raises
    ------
    SpecMismatchError
        When the embeddings of the two stores must not be compared.
    ValueError
        When the threshold is no similarity, or `most` is below 1.
    StoreNotFoundError, StoreFormatError
        As `Store.open`, and when an embedding is not finite.

    Examples
    --------
    >>> from embedkit.index.duplicates.leaks import find_leaks
    >>> leaks = find_leaks("test.h5", "train.h5")  # doctest: +SKIP
    >>> [leaks.left.ids[row] for row in leaks.leaked]  # doctest: +SKIP
    ['cat/7.jpg']
    """
    left = left if isinstance(left, Store) else Store.open(left)
    right = right if isinstance(right, Store) else Store.open(right)
    left.spec.require_same(right.spec, f"{left.path} and {right.path} hold embeddings that must not be compared")
    wanted = None if threshold == "auto" else checked_threshold(float(threshold))
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    one, other = Gallery(left), Gallery(right)
    found = wanted or choose_threshold(other, one, progress=progress)
    contents = same_content([left, right])
    pairs = np.concatenate(
        [_exact_pairs(contents, len(left), most), _near_pairs(one, other, found.value, most, progress)]
    )
    rows, others = np.unique(pairs, axis=0).T
    scores = scores_of(one, other, rows, others)
    exact = (contents[rows] >= 0) & (contents[rows] == contents[len(left) + others])
    chosen = _best(rows, others, np.where(exact, 4 + scores, scores), most)
    return Leaks(left, right, found, rows[chosen], others[chosen], scores[chosen], exact[chosen])


def _exact_pairs(contents: Rows, split: int, most: int) -> Rows:
    """Return pairs of equal hashes, of shape (p, 2); the hashes from `split` on are those of the right store."""
    rows = np.flatnonzero(contents[:split] >= 0)
    places, others = _spread(contents[rows], contents[split:], most)
    return np.column_stack([rows[places], others])


def _near_pairs(left: Gallery, right: Gallery, least: float, most: int, progress: Progress | None) -> Rows:
    """Return pairs that are similar enough, of shape (p, 2)."""
    # Copies, number for number, are compared once, and named in the end for each of them.
    firsts, other_firsts = same_embedding(left.store), same_embedding(right.store)
    rows, others = (np.flatnonzero((first == np.arange(len(first))) & (gallery.norms > 0)) for first, gallery in (
        (firsts, left), (other_firsts, right)))  # fmt: skip
    found: list[tuple[Rows, Rows, npt.NDArray[np.float32]]] = [_NO_PAIRS]
    pending = 0
    for pairs in similar_pairs(left, rows, right, others, least, progress=progress):
        found.append(pairs)
        pending += len(pairs[0])
        if pending > FLUSH:
            found, pending = [_cut(found, most)], 0
    one, other, _ = _cut(found, most)
    places, other = _spread(other, other_firsts, most)
    one = one[places]
    # Of each left row at most so many, before its copies get them too.
    few = _best(one, other, np.zeros(len(one)), most * most)
    places, copies = _spread(one[few], firsts, None)
    return np.column_stack([copies, other[few][places]])


def similar_pairs(
    left: Gallery, rows: Rows, right: Gallery, others: Rows, least: float, *, progress: Progress | None = None
) -> Iterator[tuple[Rows, Rows, npt.NDArray[np.float32]]]:
    """Yield every pair of a row of one store and a row of another one whose similarity reaches a threshold.

    Parameters
    ----------
    left, right : Gallery
        The stores; of cosine similarities.
    rows, others : arrays of int
        Which of their rows, none of them a zero vector.
    least : float
        The threshold.
    progress : callable, optional
        Called with how many of `rows` were compared, and their number.

    Yields
    ------
    tuple of arrays of shape (p,)
        Rows of the left store, rows of the right store, and similarities: some pairs at a time, in no promised order.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit import Store
    >>> from embedkit.index import Gallery
    >>> from embedkit.index.duplicates.leaks import similar_pairs
    >>> one, other = (Gallery(Store.open(path)) for path in ("test.h5", "train.h5"))  # doctest: +SKIP
    >>> pairs = similar_pairs(one, np.arange(100), other, np.arange(len(other)), 0.95)  # doctest: +SKIP
    """
    if not len(rows) or not len(others):
        return
    pairs = len(rows) * len(others)
    chosen = plan(left, rows, right, others, least)
    announce(chosen, pairs, len(rows) + len(others))
    done = 0
    for tile in tiles(Sketch(left, rows, chosen.axes), Sketch(right, others, chosen.axes), least):
        scores = scores_of(left, right, tile.left, tile.right)
        near = scores >= least
        yield tile.left[near], tile.right[near], scores[near]
        done += tile.pairs
        if progress is not None:
            progress(len(rows) * done // pairs, len(rows))


_NO_PAIRS = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)


def _cut(
    found: list[tuple[Rows, Rows, npt.NDArray[np.float32]]], most: int
) -> tuple[Rows, Rows, npt.NDArray[np.float32]]:
    left, right, scores = (np.concatenate(column) for column in zip(*found, strict=True))
    chosen = _best(left, right, scores, most)
    return left[chosen], right[chosen], scores[chosen]


def _best(left: Rows, right: Rows, scores: npt.NDArray[np.floating], most: int) -> Rows:
    """Return which pairs have at most `most` better ones of the same left row: by left row, the best first."""
    order = np.lexsort((right, -scores, left))
    begins = np.flatnonzero(np.diff(left[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    return order[rank < most]


def _spread(wanted: Rows, values: Rows, most: int | None) -> tuple[Rows, Rows]:
    """Return where in `values` each wanted value stands, at most so often: places in `wanted`, and in `values`."""
    order = np.argsort(values, kind="stable")
    first, last = (np.searchsorted(values[order], wanted, side=side) for side in ("left", "right"))
    counts = last - first if most is None else np.minimum(last - first, most)
    places = np.repeat(np.arange(len(wanted)), counts)
    within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, order[first[places] + within]
