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

    @classmethod
    def of(cls, index: Any, rows: Rows, factory: str, gallery: Gallery) -> Coarse:
        """Return an index that was read from a file, whose entries are these rows of a gallery.

        Raises
        ------
        ValueError
            When they cannot be.
        """
        width = gallery.store.dim if gallery.whitening is None else gallery.whitening.dim
        if index.d != width:
            raise ValueError(f"FAISS's file is of width {index.d} instead of {width}")
        known = rows[rows >= 0]
        if rows.min(initial=-1) < -1 or rows.max(initial=-1) >= len(gallery) or len(np.unique(known)) != len(known):
            raise ValueError(f"its entries are not rows of the {len(gallery):,} that the store has")
        return cls(index, rows, factory)

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
            FAISS's, when an index of this kind takes no filter and there is one.
        """
        selector = None
        if keep is not None or (self.has_gone and self.takes_filters):
            alive = self.rows >= 0 if keep is None else (self.rows >= 0) & keep[self.rows]
            bits = np.packbits(alive, bitorder="little")  # FAISS reads it as long as it searches.
            selector = faiss.IDSelectorBitmap(bits)
        parameters = _parameters(self.index, effort, selector)
        _, entries = _search(self.index, placed, min(k, max(1, len(self))), parameters)
        if not len(self):
            return np.full(entries.shape, -1)
        known = (entries >= 0) & (entries < len(self))  # A file may say anything.
        return np.where(known, self.rows[np.where(known, entries, 0)], -1)

    def alive(self, keep: npt.NDArray[np.bool_] | None, n: int) -> npt.NDArray[np.bool_]:
        """Return which of the n rows of the store have an entry, and are kept."""
        alive = np.zeros(n, dtype=np.bool_)
        alive[self.rows[self.rows >= 0]] = True
        return alive if keep is None else alive & keep

    @cached_property
    def takes_filters(self) -> bool:
        """Whether FAISS can restrict this kind of index to some entries: tried once, for its documents do not say."""
        anything = faiss.IDSelectorBitmap(np.full((len(self) + 7) // 8, 255, dtype=np.uint8))
        query = np.zeros((1, self.index.d), dtype=np.float32)
        try:
            _search(self.index, query, 1, _parameters(self.index, None, anything))
        except RuntimeError:
            return False
        # Packed flat codes are searched without a word, and without the filter.
        return "FastScan" not in (kind := type(_innermost(self.index)).__name__) or kind.startswith("IndexIVF")

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
    index = _empty(gallery, factory)
    if not index.is_trained:
        sample = _sample(factory, len(rows))
        chosen = np.random.default_rng(seed).choice(rows, sample, replace=False)
        chosen.sort()
        try:
            index.train(gallery.placed(gallery.store.rows(chosen)))
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot train {factory!r} on {sample:,} rows: {_reason(error)}") from None
    return Coarse(index, np.empty(0, dtype=np.int64), factory)


def expected_bytes(gallery: Gallery, factory: str, n: int) -> tuple[int, int]:
    """Return about how much memory an index of n rows takes, and how much at most while it is built.

    Raises
    ------
    ValueError
        When FAISS does not know such a factory.
    """
    index = _empty(gallery, factory)
    size = _size(index, n)
    sample = GALLERY_BLOCK if index.is_trained else _sample(factory, n)
    # What grows is copied to a place of twice its size, and a sample is there as it is stored and as it is compared.
    return size, 2 * size + 8 * sample * gallery.store.dim


def extend(
    coarse: Coarse, gallery: Gallery, rows: Rows, *, progress: Callable[[int, int], None] | None = None
) -> Coarse:
    """Add rows of the store to an index, in place, and return it with what its entries are.

    Raises
    ------
    ValueError
        When an index of this kind takes no rows, or none beside its first.
    """
    # What an addition left behind that was interrupted stands for nothing.
    lost = np.full(coarse.index.ntotal - len(coarse.rows), -1, dtype=np.int64)
    for start in range(0, len(rows), GALLERY_BLOCK):
        block = rows[start : start + GALLERY_BLOCK]
        try:
            coarse.index.add(gallery.placed(gallery.store.rows(block)))
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot add rows to {coarse.factory!r}: {_reason(error)}") from None
        if progress is not None:
            progress(start + len(block), len(rows))
    return Coarse(coarse.index, np.concatenate([coarse.rows, lost, rows]), coarse.factory)


def effort_name(index: Any) -> str | None:
    """Return what FAISS calls the parameter that trades speed for recall; None where there is none."""
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return "nprobe"
    return "efSearch" if isinstance(inner, faiss.IndexHNSW) else None


def is_lossless(index: Any) -> bool:
    """Return whether an index compares whole vectors, so that more candidates than asked for find nothing better."""
    found = faiss.downcast_index(index)
    return isinstance(found, faiss.IndexHNSWFlat | faiss.IndexIVFFlat | faiss.IndexFlat)


def effort_limit(index: Any) -> int:
    """Return the effort beyond which more finds no more."""
    inner = _innermost(index)
    return int(inner.nlist) if isinstance(inner, faiss.IndexIVF) else int(inner.ntotal)


def _empty(gallery: Gallery, factory: str) -> Any:
    width = gallery.store.dim if gallery.whitening is None else gallery.whitening.dim
    # Of vectors of length 1, distances rank as cosines do; unlike products they survive a PCA, which is centred.
    metric = faiss.METRIC_INNER_PRODUCT if gallery.metric == "ip" else faiss.METRIC_L2
    try:
        return faiss.index_factory(width, factory, metric)
    except RuntimeError as error:
        raise ValueError(f"FAISS makes no index of {factory!r} for width {width}: {_reason(error)}") from None


def _sample(factory: str, n: int) -> int:
    """Return how many rows an index is trained on."""
    lists = max(map(int, re.findall(r"IVF(\d{1,9})", factory)), default=0)
    return min(n, max(TRAINING_ROWS, ROWS_A_LIST * lists))


def _size(index: Any, n: int) -> int:
    """Return about how many bytes n rows take: codes, numbers, links and centroids."""
    found = faiss.downcast_index(index)
    if isinstance(found, faiss.IndexPreTransform):
        return _size(found.index, n)
    if isinstance(found, faiss.IndexRefine):
        return _size(found.base_index, n) + _size(found.refine_index, n)
    if isinstance(found, faiss.IndexHNSW):
        return _size(found.storage, n) + n * (4 * int(found.hnsw.nb_neighbors(0)) + 16)
    if isinstance(found, faiss.IndexIVF):
        return n * (int(found.code_size) + 8) + 4 * int(found.nlist) * int(found.d)
    return n * int(getattr(found, "code_size", 4 * found.d))


def _search(index: Any, placed: Vectors, k: int, parameters: Any) -> tuple[Vectors, Rows]:
    # faiss.contrib.torch_utils, which other libraries import, puts a search without parameters in its place.
    search = getattr(index, "search_numpy", index.search)
    scores, entries = search(placed, k, params=parameters)
    return scores, entries


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
    return re.split(r"Error: | at /\S+:\d+: ", str(error))[-1].strip().replace("\n", " ")
