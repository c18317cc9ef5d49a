"""Duplicates: groups of rows whose images are the same, or nearly so."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit.index.duplicates.grouping import Forest, Rows, firsts_of, same_content, same_embedding
from embedkit.index.duplicates.sketches import Plan, Sketch, plan, scores_of, tiles
from embedkit.index.duplicates.thresholds import Threshold, checked_threshold, choose_threshold
from embedkit.index.exact import Gallery
from embedkit.index.pictures import image_path
from embedkit.store import Store
from embedkit.store.format import decode_texts
from embedkit.text import counted

log = logging.getLogger("embedkit")

LONG_SECONDS = 60.0
LARGE_BYTES = 1 << 30

Progress = Callable[[int, int], None]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Member:
    """One image of a group.

    Attributes
    ----------
    row, id, label : int, str, str or None
        As in the store.
    similarity : float
        Cosine similarity to the image to keep.
    exact : bool
        Whether it has the same content hash as the image to keep.
    bytes : int
        Size of the image file when it was read.
    path : Path or None
        The file, where the root is known; of a box or a frame the file that it is in.
    """

    row: int
    id: str
    label: str | None
    similarity: float
    exact: bool
    bytes: int
    path: Path | None


@dataclass(frozen=True, eq=False, repr=False)
class Group:
    """Images that show the same; the first is the one to keep.

    Attributes
    ----------
    store : Store
        Theirs.
    rows, similarities, exact : arrays of shape (m,)
        Rows of the store, and how alike each and the first one are; see `Member`.
    """

    store: Store
    rows: Rows
    similarities: npt.NDArray[np.float32]
    exact: Flags

    def __repr__(self) -> str:
        return f"<Group of {counted(len(self), 'image')} of {self.store.path}, to keep: {self[0].id!r}>"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Member]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Member:
        row = int(self.rows[number])
        (id,) = decode_texts(self.store.images.ids[row : row + 1])
        return Member(
            row, id, self._label(row), float(self.similarities[number]), bool(self.exact[number]),
            int(self.store.images.sizes[row]), image_path(self.store, id),
        )  # fmt: skip

    @property
    def labels(self) -> list[str]:
        """The classes that its images have; when there are two, one of them is wrong."""
        if self.store.labels is None:
            return []
        codes = np.unique(self.store.labels[self.rows])
        return [self.store.classes[code] for code in codes.tolist() if code >= 0]

    def _label(self, row: int) -> str | None:
        code = -1 if self.store.labels is None else int(self.store.labels[row])
        return self.store.classes[code] if code >= 0 else None


@dataclass(frozen=True, eq=False, repr=False)
class Duplicates:
    """What `find_duplicates` found: a sequence of `Group`, the largest first.

    Attributes
    ----------
    store : Store
        What was searched.
    threshold : Threshold
        The least similarity of a near duplicate.
    rows : array of shape (m,)
        Rows of all groups, one group after the other, the row to keep first in each.
    starts : array of shape (groups + 1,)
        Where each group begins in `rows`, and where the last one ends.
    similarities, exact : arrays of shape (m,)
        How alike each row and the row to keep of its group are, and whether their content hashes are the same.
    """

    store: Store
    threshold: Threshold
    rows: Rows
    starts: Rows
    similarities: npt.NDArray[np.float32]
    exact: Flags

    def __repr__(self) -> str:
        found = f"{counted(len(self), 'group')} of {counted(len(self.rows), 'image')}"
        return f"<Duplicates in {self.store.path}: {found}, threshold {self.threshold.value:.4f}>"

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Group:
        if not -len(self) <= number < len(self):
            raise IndexError(f"group {number} of {len(self)}")
        part = slice(self.starts[number % len(self)], self.starts[number % len(self) + 1])
        return Group(self.store, self.rows[part], self.similarities[part], self.exact[part])

    def __iter__(self) -> Iterator[Group]:
        return (self[number] for number in range(len(self)))

    @property
    def superfluous(self) -> Rows:
        """Rows that can go: duplicates of the row to keep of their group, and not only of another one's duplicates."""
        can_go = self.exact | (self.similarities >= self.threshold.value)
        can_go[self.starts[:-1]] = False
        return self.rows[can_go]


def find_duplicates(
    store: Store | str | os.PathLike[str], *, threshold: float | str = "auto", progress: Progress | None = None
) -> Duplicates:
    """Find the images of a store that are there more than once, exactly or nearly.

    Exact duplicates have the same content hash, near ones a cosine similarity of at least `threshold`. Groups are what
    such pairs connect, directly or by way of others. Memory stays bounded: about 4 * n * (m + 1) bytes for the first m
    coordinates of n rows, where m is at most 256, and some 100 bytes a row.

    Parameters
    ----------
    store : Store or path-like
        What to search.
    threshold : float or "auto", default "auto"
        The least similarity of near duplicates; "auto" chooses it from the distances between neighbours, see
        `choose_threshold`.
    progress : callable, optional
        Called with the rows that were compared and their number; first for the threshold when it is chosen.

    Returns
    -------
    Duplicates
        The groups, the largest first. In each, the one to keep comes first: the largest file, of equal ones the
        oldest, then the first by id.

    Raises
    ------
    ValueError
        When the threshold is no similarity.
    StoreNotFoundError, StoreFormatError
        As `Store.open`, and when an embedding is not finite.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.index.duplicates.groups import find_duplicates
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     writer.append([[1, 0], [0, 2], [1, 0.1]], ["a.jpg", "b.jpg", "c.jpg"], sizes=[10, 10, 20])
    ...     writer.finalise()
    >>> [[member.id for member in group] for group in find_duplicates(f"{folder.name}/s.h5", threshold=0.97)]
    [['c.jpg', 'a.jpg']]
    >>> folder.cleanup()

    Notes
    -----
    Every pair is compared, and none is missed: most by an upper bound of their similarity that takes few of their
    coordinates, as `embedkit.index.duplicates.sketches` explains, the others by all of them. Boxes of one image, and
    frames of one video, have hashes of their own: they are exact duplicates only of the same box of the same file, or
    the same pixels. A zero vector is similar to nothing.
    """
    store = store if isinstance(store, Store) else Store.open(store)
    wanted = None if threshold == "auto" else checked_threshold(float(threshold))
    gallery = Gallery(store)
    found = wanted or choose_threshold(gallery, progress=progress)
    contents = same_content([store])
    forest = Forest(len(store))
    forest.join(np.arange(len(store)), firsts_of(contents))
    firsts = same_embedding(store)
    alike = (firsts != np.arange(len(store))) & (gallery.norms > 0)
    forest.join(np.flatnonzero(alike), firsts[alike])
    rows = np.flatnonzero(~alike & (gallery.norms > 0))
    _join_near(forest, gallery, rows, found.value, progress)
    return _grouped(store, gallery, forest, contents, found)


def _join_near(forest: Forest, gallery: Gallery, rows: Rows, least: float, progress: Progress | None) -> None:
    pairs = len(rows) ** 2 / 2
    chosen = plan(gallery, rows, gallery, rows, least)
    announce(chosen, pairs, len(rows))
    done = 0
    for tile in tiles(Sketch(gallery, rows, chosen.axes), None, least):
        left, right = tile.left, tile.right
        # One pair of each row first: where many are alike, these connect nearly all of them, and the rest is known.
        for few in (np.unique(left, return_index=True)[1], np.unique(right, return_index=True)[1], slice(None)):
            open_still = forest.apart(left[few], right[few])
            some, others = left[few][open_still], right[few][open_still]
            near = scores_of(gallery, gallery, some, others) >= least
            forest.join(some[near], others[near])
        done += tile.pairs
        if progress is not None:
            progress(min(len(rows), round(len(rows) * done / max(1, pairs))), len(rows))


def announce(chosen: Plan, pairs: float, rows: int) -> None:
    """Say how long a comparison takes, and how much memory, where that is much."""
    seconds = pairs * chosen.seconds_per_pair
    if seconds > LONG_SECONDS:
        log.info(
            f"comparing {pairs:,.0f} pairs takes about {seconds / 60:,.0f} minutes; the time grows with their number, "
            "and a higher threshold or fewer rows (embedkit select) shorten it"
        )
    bytes = rows * (100 + (0 if chosen.axes is None else 4 * chosen.axes.shape[1]))
    if bytes > LARGE_BYTES:
        log.info(f"this takes about {bytes / 1e9:,.1f} GB of memory, and the store stays on disk")


def _grouped(store: Store, gallery: Gallery, forest: Forest, contents: Rows, threshold: Threshold) -> Duplicates:
    roots = forest.roots(np.arange(len(store)))
    counts = np.bincount(roots, minlength=len(store))
    rows = np.flatnonzero(counts[roots] > 1)
    images, groups = store.images, roots[rows]
    # What a store keeps as the time of a box has the box mixed in, and orders nothing.
    times = np.where(np.char.find(images.ids[rows], b"#xywh=") >= 0, 0, images.mtimes_ns[rows])
    # Larger groups first; in a group the larger, older file. The complement of a size falls as the size rises.
    order = np.lexsort((rows, times, ~images.sizes[rows], groups, -counts[groups]))
    rows, groups = rows[order], groups[order]
    begins = np.flatnonzero(np.diff(groups, prepend=-1))
    starts = np.append(begins, len(rows))
    keep = np.repeat(rows[begins], np.diff(starts))
    similarities = scores_of(gallery, gallery, np.minimum(keep, rows), np.maximum(keep, rows))
    exact = (contents[keep] == contents[rows]) & (contents[rows] >= 0) | (keep == rows)
    return Duplicates(store, threshold, rows, starts, similarities, exact)
