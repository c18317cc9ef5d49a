"""What a search found: scores and rows, and the images behind them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import MissingExtraError
from embedkit.index.pictures import image_path
from embedkit.store import Store
from embedkit.store.format import decode_texts
from embedkit.text import counted

if TYPE_CHECKING:
    import pandas

SCORE_NAMES = {"cosine": "cosine similarity", "ip": "inner product", "l2": "distance"}

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Hit:
    """One neighbour: its place (from 1), score, row, id, class, and file where the root is known."""

    rank: int
    score: float
    row: int
    id: str
    label: str | None
    path: Path | None


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult:
    """What a search found.

    Iterating gives one list of `Hit` for each query; for a single query it gives the hits themselves. In a notebook it
    shows itself as thumbnails with their scores.

    Attributes
    ----------
    scores : array of shape (q, k)
        Similarities, falling; distances, rising, where the metric is "l2". NaN where a query found fewer than k.
    rows : array of shape (q, k)
        Rows of the store; -1 where a query found fewer than k.
    store : Store
        What was searched in.
    single : bool
        Whether one query was asked for by itself, and not in a list.
    metric : str
        What the scores are: "cosine", "ip" or "l2".

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Index, Store
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     writer.append([[1, 0], [2, 2], [0, 3]], ["a.jpg", "b.jpg", "c.jpg"], labels=["cat", "cat", "dog"])
    ...     writer.finalise()
    >>> found = Index.build(Store.open(f"{folder.name}/s.h5")).search(np.array([[0, 1], [1, 0.1]]), k=2)
    >>> found.ids.tolist(), found.labels.tolist()
    ([['c.jpg', 'b.jpg'], ['a.jpg', 'b.jpg']], [['dog', 'cat'], ['cat', 'cat']])
    >>> [(hit.rank, hit.id, round(hit.score, 3)) for hit in found.hits(0)]
    [(1, 'c.jpg', 1.0), (2, 'b.jpg', 0.707)]
    >>> folder.cleanup()
    """

    scores: Scores
    rows: Rows
    store: Store
    single: bool = False
    metric: str = "cosine"

    @cached_property
    def ids(self) -> npt.NDArray[np.object_]:
        """Id of every hit as objects of shape (q, k); None where a query found fewer than k."""
        return _laid_out(self.rows, self._ids_of(self.rows[self.rows >= 0]))

    @cached_property
    def labels(self) -> npt.NDArray[np.object_] | None:
        """Class of every hit as objects of shape (q, k), None where it has none; None when the store has no labels."""
        if self.store.labels is None:
            return None
        return _laid_out(self.rows, self._labels_of(self.rows[self.rows >= 0]))

    def hits(self, query: int = 0, count: int | None = None) -> list[Hit]:
        """Return the neighbours of one query, best first: all of them, or the first `count`."""
        found = np.flatnonzero(self.rows[query] >= 0)[:count]
        rows, scores = self.rows[query][found], self.scores[query][found].tolist()
        ids, labels = self._ids_of(rows), self._labels_of(rows)
        return [
            Hit(rank, score, row, id, label, image_path(self.store, id))
            for rank, (score, row, id, label) in enumerate(
                zip(scores, rows.tolist(), ids, labels, strict=True), start=1
            )
        ]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.hits()) if self.single else (self.hits(query) for query in range(len(self)))

    def __len__(self) -> int:
        return int((self.rows[0] >= 0).sum()) if self.single else len(self.rows)

    def __repr__(self) -> str:
        queries = "1 query" if len(self.rows) == 1 else f"{len(self.rows):,} queries"
        hits = counted(int((self.rows >= 0).sum()), "hit")
        return f"<SearchResult of {queries}: {hits} in {self.store.path}, {SCORE_NAMES[self.metric]}>"

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with a line for each hit: query (from 0), rank, score, row, id, label and path.

        Raises
        ------
        MissingExtraError
            When pandas is not installed: ``pip install 'embedkit[pandas]'``.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("pandas", "pandas") from error

        query, column = np.nonzero(self.rows >= 0)
        rows = self.rows[query, column]
        ids = self._ids_of(rows)
        paths = (image_path(self.store, id) for id in ids)
        texts = {
            "id": ids,
            "label": self._labels_of(rows),
            "path": [None if path is None else os.fspath(path) for path in paths],
        }
        numbers = {"query": query, "rank": column + 1, "score": self.scores[query, column], "row": rows}
        return pandas.DataFrame(numbers | {name: pandas.Series(values, dtype=object) for name, values in texts.items()})

    def _repr_html_(self) -> str:
        from embedkit.index.page import result_strip

        return result_strip(self)

    # The ids of a store are never all decoded for the few that are shown.
    def _ids_of(self, rows: Rows) -> list[str]:
        return decode_texts(self.store.images.ids[rows])

    def _labels_of(self, rows: Rows) -> list[str | None]:
        if self.store.labels is None:
            return [None] * len(rows)
        classes = self.store.classes
        return [classes[code] if code >= 0 else None for code in self.store.labels[rows].tolist()]


def padded(found: Sequence[tuple[Scores, Rows]]) -> tuple[Scores, Rows]:
    """Return what each query found as one array of scores and one of rows, as wide as the longest.

    Parameters
    ----------
    found : sequence of (array of shape (m,), array of shape (m,))
        Scores and rows of each query, of different lengths.

    Returns
    -------
    scores : array of shape (q, k)
        float32, NaN behind the last one of a query.
    rows : array of shape (q, k)
        int64, -1 there.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.index.results import padded
    >>> scores, rows = padded([(np.float32([0.9]), np.array([4])), (np.float32([0.8, 0.7]), np.array([1, 2]))])
    >>> rows.tolist()
    [[4, -1], [1, 2]]
    """
    k = max((len(rows) for _, rows in found), default=0)
    all_scores = np.full((len(found), k), np.nan, dtype=np.float32)
    all_rows = np.full((len(found), k), -1, dtype=np.int64)
    for query, (scores, rows) in enumerate(found):
        all_scores[query, : len(rows)], all_rows[query, : len(rows)] = scores, rows
    return all_scores, all_rows


def _laid_out(rows: Rows, values: Sequence[str | None]) -> npt.NDArray[np.object_]:
    laid_out = np.full(rows.shape, None, dtype=object)
    laid_out[rows >= 0] = values
    return laid_out
