"""What retrieval metrics are made of: galleries in the order of their scores, and the numbers that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.index.exact import GALLERY_BLOCK, Gallery

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def ranking_scores(gallery: Gallery, queries: Scores) -> Scores:
    """Return what ranks every row of a gallery for each query, larger for what is nearer.

    Parameters
    ----------
    gallery : Gallery
        Of g rows.
    queries : array of shape (q, d)
        As they are stored: how long a query is does not change its ranking.

    Returns
    -------
    array of shape (q, g)
        Numbers that order the rows of a query as the metric does.
    """
    scores = np.empty((len(queries), len(gallery)), dtype=np.float32)
    start = 0
    for block in gallery.store.iter_blocks(GALLERY_BLOCK):
        part, norms = scores[:, start : start + len(block)], gallery.norms[start : start + len(block)]
        np.matmul(queries, block.T, out=part)
        if gallery.metric == "cosine":
            part *= np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
        elif gallery.metric == "l2":
            # |q - x|^2 = |q|^2 - 2 (q x - |x|^2 / 2), and |q| is the same for all rows.
            part -= norms * norms / 2
        start += len(block)
    return scores


def first_rows(scores: Scores, k: int) -> Rows:
    """Return the k rows of largest score of each query, the lower row first where scores are equal.

    Parameters
    ----------
    scores : array of shape (q, g)
        Without NaN.
    k : int
        At most g.

    Returns
    -------
    array of shape (q, k)

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.index.ranking import first_rows
    >>> first_rows(np.float32([[0.5, 0.9, 0.5, 0.5]]), 3).tolist()
    [[1, 0, 2]]
    """
    chosen = np.empty((len(scores), k), dtype=np.int64)
    for line, values in zip(chosen, scores, strict=True):
        line[:] = _largest(values, k)
    # Score and row as one integer: a single fast sort orders by both. Adding 0 makes -0 the 0 that it equals.
    bits = (np.take_along_axis(scores, chosen, axis=1) + np.float32(0)).view(np.uint32)
    falling = np.where(bits >> 31, bits, ~(bits | np.uint32(1 << 31)))
    keys = np.sort(falling.astype(np.uint64) << np.uint64(32) | chosen.astype(np.uint64), axis=1)
    rows: Rows = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return rows


def _largest(values: Scores, k: int) -> Rows:
    """Return the k places of the largest values in no order; of equal ones at the edge, the first places."""
    g = len(values)
    if k == g:
        return np.arange(g)
    found: Rows = np.argpartition(values, g - k)[g - k :]
    edge = values[found].min()
    if np.count_nonzero(values >= edge) > k:
        above = np.flatnonzero(values > edge)
        found = np.concatenate([above, np.flatnonzero(values == edge)[: k - len(above)]])
    return found


def first_ranks(scores: Scores, relevant: Mask) -> npt.NDArray[np.float64]:
    """Return the rank, from 1, of each query's first relevant row, in the order of `first_rows`; both (q, g)."""
    held = np.where(relevant, scores, np.float32(-np.inf))
    row = held.argmax(axis=1)[:, None]
    best = np.take_along_axis(scores, row, axis=1)
    before = (scores > best).sum(axis=1) + ((scores == best) & (np.arange(scores.shape[1]) < row)).sum(axis=1)
    ranks: npt.NDArray[np.float64] = before + 1.0
    return ranks


def ranked_metrics(
    relevant: Mask, counts: Rows, first: npt.NDArray[np.float64], ks: Sequence[int]
) -> dict[str, npt.NDArray[Any]]:
    """Return the metrics of each query.

    Parameters
    ----------
    relevant : array of bool of shape (q, k)
        Whether the row of each rank is relevant; k reaches to the largest of `ks` and of `counts`, or to the last row.
    counts : array of int of shape (q,)
        R: how many rows of the gallery are relevant, at least 1.
    first : array of shape (q,)
        Rank of the first relevant row, from 1; infinite where none was found.
    ks : sequence of int
        Depths of recall and precision.

    Returns
    -------
    dict
        An array of shape (q,) for each metric, fractions in [0, 1].

    Notes
    -----
    With rel(i) = 1 where the row of rank i is relevant, and P(i) = (rel(1) + ... + rel(i)) / i:

    recall@k = 1 if any of rel(1) ... rel(k), else 0; precision@k = P(k); R-precision = P(R);
    mAP@R = (P(1) rel(1) + ... + P(R) rel(R)) / R; MRR = 1 / (the first i with rel(i) = 1).

    Musgrave, Belongie and Lim, "A metric learning reality check", ECCV 2020, section 2.3, for mAP@R and R-precision;
    Jegou, Douze and Schmid, "Product quantization for nearest neighbor search", 2011, for recall@k; Voorhees, "The
    TREC-8 question answering track report", 1999, for MRR.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.index.ranking import ranked_metrics
    >>> found = ranked_metrics(np.array([[False, True, True]]), np.array([2]), np.array([2.0]), [3])
    >>> {name: round(float(value[0]), 3) for name, value in found.items()}
    {'recall@3': 1.0, 'precision@3': 0.667, 'mAP@R': 0.25, 'R-precision': 0.5, 'MRR': 0.5}
    """
    ranks = np.arange(1, relevant.shape[1] + 1)
    hits = np.cumsum(relevant, axis=1, dtype=np.int32)
    within = relevant & (ranks <= counts[:, None])
    return {
        **{f"recall@{k}": (first <= k).astype(np.float64) for k in ks},
        **{f"precision@{k}": hits[:, min(k, len(ranks)) - 1] / k for k in ks},
        "mAP@R": np.where(within, hits / ranks, 0).sum(axis=1) / counts,
        "R-precision": within.sum(axis=1) / counts,
        "MRR": 1 / first,
    }
