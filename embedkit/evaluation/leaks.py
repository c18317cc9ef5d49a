"""Leaks: pictures of the test part that are in the training part too, byte for byte or nearly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluation.splits import Part
from embedkit.index import Gallery
from embedkit.index.duplicates.grouping import same_content
from embedkit.index.duplicates.leaks import similar_pairs
from embedkit.text import counted, printable

# Measured on 3,670 photographs of flowers with four small backbones: a picture saved twice has 0.992 and more, brighter
# copies have 0.97 to 0.99 (median) and mirror images 0.95 to 0.98. The most similar other photograph has 0.64 to 0.87
# (median). Of the pairs between train and val above 0.95, all seven that four wide backbones listed were one picture or
# one flower taken twice; a fifth, 368 wide, listed 25, with fourteen lookalikes up to 0.96. Copies that are cropped,
# shrunk to half or saved at a low quality may have less than 0.95, and are missed.
THRESHOLD = 0.95

LISTED = 1000
BLOCK = 1024

Rows = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Leak:
    """One picture of the test part that the training part has too.

    Parameters
    ----------
    test_id, train_id : str
        Ids of the two.
    test_name, train_name : str
        Their classes; where they differ, one of them is wrong.
    similarity : float
        Cosine of their embeddings; 1 for files of the same bytes.
    exact : bool
        Whether the files have the same bytes.
    """

    test_id: str
    train_id: str
    test_name: str
    train_name: str
    similarity: float
    exact: bool


@dataclass(frozen=True, eq=False)
class Leaks:
    """The pictures that a training and a test part share.

    Parameters
    ----------
    pairs : list of Leak
        The first 1,000 of them: files of the same bytes, then the others by falling similarity.
    exact, near : int
        Number of pairs of the same bytes, and of pairs that are alike.
    test_rows : array of int of shape (m,)
        Which rows of the test part have a copy in training: positions in ``test.rows``.
    drop : array of int of shape (k,)
        Which rows of the training part have a copy in the test part: positions in ``train.rows``. Without them the test
        is honest.
    tested : int
        Number of test rows.
    threshold : float
        Cosine from which two pictures count as alike.
    """

    pairs: list[Leak]
    exact: int
    near: int
    test_rows: Rows = field(repr=False)
    drop: Rows = field(repr=False)
    tested: int
    threshold: float

    def summary(self) -> dict[str, Any]:
        """Return the counts as JSON values, and the first 20 pairs."""
        return {
            "exact_pairs": self.exact,
            "near_pairs": self.near,
            "test_rows": len(self.test_rows),
            "train_rows": len(self.drop),
            "threshold": self.threshold,
            "pairs": [dict(vars(pair)) for pair in self.pairs[:20]],
        }

    def to_text(self, shown: int = 10) -> str:
        """Return a line that counts them, and one for each of the first pairs."""
        if not self.pairs:
            return f"no picture of the test part is in train, nor one alike (cosine {self.threshold:g})"
        lines = [
            f"{len(self.test_rows):,} of {counted(self.tested, 'test row')} have a copy in train: "
            f"{counted(self.exact, 'pair')} of the same bytes, {self.near:,} alike (cosine {self.threshold:g} or more)",
            f"--drop-leaks leaves {counted(len(self.drop), 'training row')} out",
        ]
        for pair in self.pairs[:shown]:
            kind = "same bytes" if pair.exact else f"{pair.similarity:.4f}"
            names = "" if pair.test_name == pair.train_name else f"  {pair.test_name!r} and {pair.train_name!r}"
            lines.append(f"  {kind:<10}  {printable(pair.test_id)}  =  {printable(pair.train_id)}{printable(names)}")
        more = self.exact + self.near - shown
        return "\n".join([*lines, f"  ... and {more:,} more"] if more > 0 else lines)


def find_leaks(
    train: Part, test: Part, *, threshold: float | None = THRESHOLD, progress: Progress | None = None
) -> Leaks:
    """Find the pictures that a training and a test part share.

    Files of the same bytes are known by their SHA-256, which a store keeps. Pictures that are alike are found by
    comparing every test embedding with every training embedding, as `embedkit.index.find_leaks` does: none is missed,
    and most pairs are told apart by a few of their coordinates. That one names a few copies of each picture in two
    stores; this one counts all of them in two parts, because whatever is counted can be left out of training.

    Parameters
    ----------
    train, test : Part
        Of the same store or of two that were embedded alike.
    threshold : float, default 0.95
        Cosine similarity from which two pictures count as alike. What a value means depends on the backbone: look at
        the listed pairs. None looks for the same bytes only, which takes no time.
    progress : callable, optional
        Called with how many test rows are compared, and how many there are.

    Returns
    -------
    Leaks

    Raises
    ------
    ValueError
        When `threshold` is not in (0, 1].
    StoreFormatError
        When pictures that are alike are looked for and an embedding of either store is not finite.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.evaluation.leaks import find_leaks
    >>> from embedkit.evaluation.splits import whole_store
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> for name, rows in (("train.h5", [[1, 0], [0, 1]]), ("test.h5", [[1, 0.01], [1, 1]])):
    ...     with StoreWriter(f"{folder.name}/{name}", spec) as writer:
    ...         writer.append(rows, ["a", "b"], labels=["cat", "dog"])
    ...         writer.finalise()
    >>> parts = [whole_store(Store.open(f"{folder.name}/{name}")) for name in ("train.h5", "test.h5")]
    >>> leaks = find_leaks(*parts)
    >>> leaks.drop.tolist(), leaks.pairs[0].test_id, round(leaks.pairs[0].similarity, 4)
    ([0], 'a', 1.0)
    >>> folder.cleanup()
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"the threshold is a cosine above 0 and at most 1, got {threshold}")
    contents = same_content([train.store, test.store])
    codes = contents[train.rows], contents[len(train.store) + test.rows]
    same, alike = (_Pairs(len(train.rows), len(test.rows)) for _ in range(2))
    for pairs in _same_bytes(*codes):
        same.add(*pairs, np.ones(len(pairs[0]), dtype=np.float32))
    if threshold is not None:
        for rows, others, scores in _alike(train, test, threshold, progress):
            copies = (codes[0][rows] == codes[1][others]) & (codes[0][rows] >= 0)  # Those are counted already.
            alike.add(rows[~copies], others[~copies], scores[~copies])
    found = [(*pair, True) for pair in same.best()] + [(*pair, False) for pair in alike.best()]
    return Leaks(
        pairs=[_leak(train, test, *pair) for pair in found[:LISTED]],
        exact=same.count,
        near=alike.count,
        test_rows=np.flatnonzero(same.tested | alike.tested),
        drop=np.flatnonzero(same.trained | alike.trained),
        tested=len(test.rows),
        threshold=1.0 if threshold is None else threshold,
    )


class _Pairs:
    """Counts pairs, keeps the best of them, and which of so many rows they are of."""

    def __init__(self, trained: int, tested: int) -> None:
        self.count = 0
        self.trained, self.tested = np.zeros(trained, dtype=np.bool_), np.zeros(tested, dtype=np.bool_)
        self._rows = np.empty((0, 2), dtype=np.int64)
        self._scores = np.empty(0, dtype=np.float32)

    def add(self, rows: Rows, others: Rows, scores: npt.NDArray[np.float32]) -> None:
        """Add pairs of positions in the training part and in the test part."""
        if not len(rows):
            return
        self.count += len(rows)
        self.trained[rows] = self.tested[others] = True
        pairs = np.concatenate([self._rows, np.stack([rows, others], axis=1)])
        scores = np.concatenate([self._scores, scores])
        best = np.lexsort((pairs[:, 0], pairs[:, 1], -scores))[:LISTED]
        self._rows, self._scores = pairs[best], scores[best]

    def best(self) -> list[tuple[int, int, float]]:
        """Return position in training, position in test and similarity of the most similar pairs."""
        return [
            (row, other, score) for (row, other), score in zip(self._rows.tolist(), self._scores.tolist(), strict=True)
        ]


def _leak(train: Part, test: Part, row: int, other: int, similarity: float, exact: bool) -> Leak:
    return Leak(
        test.store.ids[test.rows[other]], train.store.ids[train.rows[row]], str(test.names[other]),
        str(train.names[row]), min(1.0, similarity), exact,
    )  # fmt: skip


def _same_bytes(train: Rows, test: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Yield the pairs of equal content, some test rows after the other."""
    order = np.argsort(train, kind="stable")
    known = np.flatnonzero(test >= 0)
    for first in range(0, len(known), BLOCK):
        others = known[first : first + BLOCK]
        starts, ends = (np.searchsorted(train, test[others], side, sorter=order) for side in ("left", "right"))
        for other, start, end in zip(others.tolist(), starts.tolist(), ends.tolist(), strict=True):
            if start < end:
                yield order[start:end], np.full(end - start, other)


def _alike(
    train: Part, test: Part, threshold: float, progress: Progress | None
) -> Iterator[tuple[Rows, Rows, npt.NDArray[np.float32]]]:
    """Yield the pairs whose cosine reaches a threshold, and the cosines, some at a time."""
    gallery = Gallery(train.store)
    tested = gallery if test.store is train.store else Gallery(test.store)
    places, others = (_places(part) for part in (train, test))
    chosen = [part.rows[one.norms[part.rows] > 0] for part, one in ((test, tested), (train, gallery))]
    for other, row, cosines in similar_pairs(tested, chosen[0], gallery, chosen[1], threshold, progress=progress):
        yield places[row], others[other], cosines


def _places(part: Part) -> Rows:
    """Return where in a part each row of its store stands; -1 for those that it lacks."""
    places = np.full(len(part.store), -1, dtype=np.int64)
    places[part.rows] = np.arange(len(part.rows))
    return places
