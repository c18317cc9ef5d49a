"""Coarse: a FAISS index that names candidates, which the gallery then compares exactly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from embedkit.index.exact import GALLERY_BLOCK, Gallery, Rows, Vectors

TRAINING_ROWS = 50_000
ROWS_A_LIST = 64  # To train an inverted file with: FAISS warns below 39, and more than this changes little.


@dataclass(frozen=True, eq=False)
class Coarse:
    """A FAISS index over rows of a store, and which row each of its entries is.

    Attributes
    ----------
    index
        FAISS's own index, of vectors as `Gallery.placed` returns them.
    rows : array of shape (entries,)
        Row of the store for each entry; -1 for one that has gone.
    factory : str
        FAISS's name of it.
    """

    index: Any
    rows: Rows
    factory: str

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def has_gone(self) -> bool:
        """Whether an entry's row is not in the store any more."""
        return bool((self.rows < 0).any())

    def candidates(
        self, placed: Vectors, k: int, effort: int | None, keep: npt.NDArray[np.bool_] | None = None
    ) -> Rows:
        """Return rows near each query, of shape (q, k), in FAISS's order; -1 where it found no more.

        Parameters
        ----------
        placed : array of shape (q, m)
            Queries as `Gallery.placed` returns them.
        k : int
            How many.
        effort : int, optional
            ``nprobe`` of an inverted file, ``efSearch`` of a graph.
        keep : array of bool of shape (n,), optional
            Rows of the store to search in.

        Raises
        ------
        RuntimeError
            FAISS's, when an index of this kind takes no filter.
        """
        selector = None
        if keep is not None or self.has_gone:
            alive = self.rows >= 0 if keep is None else (self.rows >= 0) & keep[self.rows]
            bits = np.packbits(alive, bitorder="little")  # FAISS reads it as long as it searches.
            selector = faiss.IDSelectorBitmap(bits)
        parameters = _parameters(self.index, effort, selector)
        _, entries = self.index.search(placed, k, params=parameters)
        return np.where(entries >= 0, self.rows[entries], -1)

    def alive(self, keep: npt.NDArray[np.bool_] | None, n: int) -> npt.NDArray[np.bool_]:
        """Return which of the n rows of the store have an entry, and are kept."""
        alive = np.zeros(n, dtype=np.bool_)
        alive[self.rows[self.rows >= 0]] = True
        return alive if keep is None else alive & keep

    def takes_filters(self) -> bool:
        """Return whether FAISS can restrict this kind of index to some entries: not where flat codes are packed."""
        kind = type(_innermost(self.index)).__name__
        return kind.startswith(("IndexIVF", "IndexHNSW")) or "FastScan" not in kind

    def count_bytes(self) -> int:
        """Return how large FAISS's file of it is."""
        total = 0

        def count(data: bytes) -> None:
            nonlocal total
            total += len(data)

        faiss.write_index(self.index, faiss.BufferedIOWriter(faiss.PyCallbackIOWriter(count), 1 << 20))
        return total


def train(gallery: Gallery, factory: str, rows: Rows, *, seed: int = 0) -> Coarse:
    """Return an empty index of a FAISS factory string, trained on a sample of some rows.

    Raises
    ------
    ValueError
        When FAISS does not know such a factory, or there are too few rows for it.
    """
    product = gallery.metric == "ip"
    width = gallery.store.dim if gallery.whitening is None else gallery.whitening.dim
    try:
        # Of vectors of length 1, distances rank as cosines do; unlike products they survive a PCA, which is centred.
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT if product else faiss.METRIC_L2)
    except RuntimeError as error:
        raise ValueError(f"FAISS makes no index of {factory!r} for width {width}: {_reason(error)}") from None
    if not index.is_trained:
        lists = max(map(int, re.findall(r"IVF(\d+)", factory)), default=0)
        sample = min(len(rows), max(TRAINING_ROWS, ROWS_A_LIST * lists))
        chosen = np.random.default_rng(seed).choice(rows, sample, replace=False)
        chosen.sort()
        try:
            index.train(gallery.placed(gallery.store.rows(chosen)))
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot train {factory!r} on {sample:,} rows: {_reason(error)}") from None
    return Coarse(index, np.empty(0, dtype=np.int64), factory)


def extend(
    coarse: Coarse, gallery: Gallery, rows: Rows, *, progress: Callable[[int, int], None] | None = None
) -> Coarse:
    """Add rows of the store to an index, in place, and return it with what its entries are."""
    for start in range(0, len(rows), GALLERY_BLOCK):
        block = rows[start : start + GALLERY_BLOCK]
        coarse.index.add(gallery.placed(gallery.store.rows(block)))
        if progress is not None:
            progress(start + len(block), len(rows))
    return Coarse(coarse.index, np.concatenate([coarse.rows, rows]), coarse.factory)


def effort_name(index: Any) -> str | None:
    """Return what FAISS calls the parameter that trades speed for recall; None where there is none."""
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return "nprobe"
    return "efSearch" if isinstance(inner, faiss.IndexHNSW) else None


def effort_limit(index: Any) -> int:
    """Return the effort beyond which more finds no more."""
    inner = _innermost(index)
    return int(inner.nlist) if isinstance(inner, faiss.IndexIVF) else int(inner.ntotal)


def _innermost(index: Any) -> Any:
    found = faiss.downcast_index(index)
    while isinstance(found, faiss.IndexPreTransform | faiss.IndexRefine):
        found = faiss.downcast_index(found.index if isinstance(found, faiss.IndexPreTransform) else found.base_index)
    return found


def _parameters(index: Any, effort: int | None, selector: Any) -> Any:
    """Return FAISS's search parameters for an index and what it is made of; None where nothing has to be said."""
    found = faiss.downcast_index(index)
    if effort is None and selector is None:
        return None
    given = {} if selector is None else {"sel": selector}
    if isinstance(found, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(found.index, effort, selector), **given)
    if isinstance(found, faiss.IndexRefine):
        return faiss.IndexRefineSearchParameters(
            k_factor=found.k_factor, base_index_params=_parameters(found.base_index, effort, selector), **given
        )
    if isinstance(found, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=effort or found.hnsw.efSearch, **given)
    if isinstance(found, faiss.IndexIVFRaBitQ | faiss.IndexIVFRaBitQFastScan):
        return faiss.IVFRaBitQSearchParameters(nprobe=effort or found.nprobe, qb=found.qb, **given)
    if isinstance(found, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=effort or found.nprobe, **given)
    return faiss.SearchParameters(**given) if given else None


def _reason(error: RuntimeError) -> str:
    """Return what FAISS says, without where in its source it says so."""
    return str(error).rpartition("Error: ")[2].strip().replace("\n", " ")
