"""Streaming: training rows that stay in their store, for heads that read them block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluation.splits import Part
from embedkit.heads import MeanHead, WeightedKNN, stream_ridge
from embedkit.heads.neighbours import KnownNeighbours
from embedkit.index import Gallery

STREAMED = ("ridge", "mean")
MEMORY_BYTES = 1 << 28  # Embeddings that take less are read once, and held.
BLOCK = 4096


class StoredRows:
    """The embeddings of a part as a float32 matrix that is read when it is sliced.

    Parameters
    ----------
    part : Part
        Whose.

    Examples
    --------
    >>> from embedkit import Store
    >>> from embedkit.evaluation.splits import whole_store
    >>> from embedkit.evaluation.streaming import StoredRows
    >>> x = StoredRows(whole_store(Store.open("train.h5")))  # doctest: +SKIP
    >>> x[:4096]  # doctest: +SKIP
    array([...], dtype=float32)
    """

    dtype = np.dtype(np.float32)

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return len(self), self.part.store.dim

    def __getitem__(self, rows: Any) -> Any:
        """Return the numbers of a slice, or, for a mask or ascending numbers, the rows that stay where they are."""
        if isinstance(rows, slice):
            return self.part.take(np.arange(len(self))[rows]).embeddings()
        return StoredRows(self.part.take(rows))


def is_streamed(head: str, part: Part) -> bool:
    """Return whether a head is fitted to a part without holding its embeddings: one of `STREAMED`, and many rows."""
    n, d = len(part.rows), part.store.dim
    return head in STREAMED and part.task == "class" and n >= 2 * d and 4 * n * d > MEMORY_BYTES


def fit_streamed(head: str, x: StoredRows, y: npt.NDArray[Any], parameters: dict[str, float]) -> Any:
    """Fit one of `STREAMED` with its parameters to stored rows and their class names."""
    classes = np.unique(y)
    blocks = ((x[start : start + BLOCK], y[start : start + BLOCK]) for start in range(0, len(x), BLOCK))
    if head == "ridge":
        ((_, ridge),) = stream_ridge(blocks, classes.tolist(), [parameters.get("regularisation", 100.0)]).items()
        return ridge
    mean = MeanHead()
    for rows, labels in blocks:
        mean.partial_fit(rows, labels, classes=classes)
    return mean


def search_streamed(
    x: StoredRows, y: npt.NDArray[Any], queries: npt.NDArray[np.float32], *, k: int, temperature: float
) -> KnownNeighbours:
    """Return the k-NN head of stored rows for these queries, which it is asked about by number."""
    part = x.part
    keep = np.zeros(len(part.store), dtype=np.bool_)
    keep[part.rows] = True
    scores, rows = Gallery(part.store).search(queries, k, keep=keep)
    # It votes by labels alone: a column of zeros stands for the embeddings.
    voters = WeightedKNN(k=k, temperature=temperature).fit(np.zeros((len(y), 1), dtype=np.float32), y)
    return KnownNeighbours(voters, scores, np.searchsorted(part.rows, rows), k)
