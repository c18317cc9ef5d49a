"""Searching: candidates where an index pays, every row where it does not, and scores of the store's own embeddings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedkit.index.coarse import Coarse
from embedkit.index.estimating import announce
from embedkit.index.exact import Gallery, Rows, Vectors, best

FEW_ROWS = 20_000  # A filter that keeps no more is searched exactly: that takes less than the index does.
CANDIDATES = 1 << 22  # Of a block of queries, so that memory stays bounded for any number of them.
LONG = 1e12  # Multiplications of an exact search, above which it says what it takes.
EXPANDED = 256  # Queries whose neighbours are in memory together.

Mask = npt.NDArray[np.bool_]


def nearest(
    gallery: Gallery,
    coarse: Coarse | None,
    placed: Vectors,
    k: int,
    *,
    settings: tuple[int | None, int],
    keep: Mask | None = None,
) -> tuple[Vectors, Rows]:
    """Return the scores and rows of the k nearest of each query, best first; rows are -1 where there are fewer.

    `placed` are queries as `Gallery.placed` returns them, `settings` the effort and the refine of a measurement.
    """
    few = keep is not None and int(keep.sum()) <= FEW_ROWS
    if coarse is None or not k or few or 4 * k > len(coarse) or (keep is not None and not coarse.takes_filters):
        if len(placed) * len(gallery) * placed.shape[1] >= LONG:
            announce(len(placed), len(gallery), placed.shape[1], gallery.count_bytes(len(placed), k))
        return gallery.search_placed(placed, k, keep=keep)
    effort, refine = settings
    scores, rows = (np.empty((len(placed), k), dtype=kind) for kind in (np.float32, np.int64))
    step = max(1, CANDIDATES // (k * refine))
    for start in range(0, len(placed), step):
        part = slice(start, start + step)
        scores[part], rows[part] = found_rows(coarse, gallery, placed[part], k, effort, refine, keep)
    # An inverted file may look into lists that have too few rows, a graph may end in a corner.
    short = np.flatnonzero((rows < 0).any(axis=1))
    if len(short):
        exact_scores, exact_rows = gallery.search_placed(placed[short], k, keep=coarse.alive(keep, len(gallery)))
        rows[short], scores[short] = -1, np.inf if gallery.metric == "l2" else -np.inf
        width = exact_rows.shape[1]
        scores[short, :width], rows[short, :width] = exact_scores, exact_rows
    return scores, rows


def found_rows(
    coarse: Coarse,
    gallery: Gallery,
    placed: Vectors,
    k: int,
    effort: int | None,
    refine: int,
    keep: Mask | None = None,
) -> tuple[Vectors, Rows]:
    """Return the k best of the candidates that an index names, compared exactly; rows are -1 where it named too few."""
    rows = coarse.candidates(placed, k * refine, effort, keep)
    return best(gallery.scores(gallery.prepared(placed), rows), rows, k, rising=gallery.metric == "l2")


def expand(gallery: Gallery, placed: Vectors, scores: Vectors, rows: Rows, alpha: float) -> Vectors:
    """Return queries with what they found added to them: q + sum over i of max(s_i, 0)^alpha x_i, at length 1."""
    weights = np.where(rows >= 0, np.maximum(scores, 0), 0) ** np.float32(alpha)
    expanded = np.empty_like(placed)
    for start in range(0, len(placed), EXPANDED):
        part = slice(start, start + EXPANDED)
        around = gallery.placed(gallery.store.rows(np.maximum(rows[part], 0).ravel()))
        added = np.einsum("qk,qkd->qd", weights[part], around.reshape(*rows[part].shape, -1))
        expanded[part] = placed[part] + added
    lengths = np.linalg.norm(expanded, axis=1, keepdims=True)
    np.divide(expanded, lengths, out=expanded, where=lengths > 0)
    return expanded
