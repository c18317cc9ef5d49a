"""Index: nearest neighbours over a store.

An index is derived data: it knows the store's spec, refuses a query that was embedded otherwise, and says when the
store has rows that it lacks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import StoreFormatError
from embedkit.index import files
from embedkit.index.choosing import Measurement, Wish, choose
from embedkit.index.coarse import Coarse, extend
from embedkit.index.exact import Gallery, Rows, Vectors
from embedkit.index.facts import Facts
from embedkit.index.families import EXACT
from embedkit.index.filters import Where, drop_own, mask_of
from embedkit.index.queries import embed_queries
from embedkit.index.results import SearchResult, padded
from embedkit.index.searching import expand, nearest
from embedkit.index.whitening import fit_whitening
from embedkit.store import Store
from embedkit.text import say_nothing

if TYPE_CHECKING:
    from embedkit.backbones import Backbone

_log = logging.getLogger("embedkit")

Say = Callable[[str], None]


class Index:
    """Neighbours over a store, made by `Index.build` or `Index.open`.

    Whatever finds the candidates, scores are computed from the store's own embeddings, pair by pair.

    Attributes
    ----------
    store : Store
        What is searched in.
    metric : str
        "cosine", "ip" or "l2".
    factory : str
        FAISS's name of the index; "Flat" compares every row.
    chosen : Measurement or None
        What it was measured to do; None where nothing had to be measured.
    measurements : list of Measurement
        Everything that was tried.
    missing, gone : int
        Rows of the store that the index lacks, and entries that the store lacks: 0 until the store changes.
    """

    store: Store
    factory: str
    chosen: Measurement | None
    measurements: list[Measurement]
    missing: int
    gone: int

    def __init__(self) -> None:
        raise TypeError("build an index with Index.build(store), or open one with Index.open(path)")

    @classmethod
    def _made(
        cls, gallery: Gallery, coarse: Coarse | None, chosen: Measurement | None, tried: list[Measurement]
    ) -> Index:
        index = cls.__new__(cls)
        index.gallery, index.store = gallery, gallery.store
        index._coarse, index._mapped, index._backbone = coarse, None, None
        index.factory = EXACT if coarse is None else coarse.factory
        index.chosen, index.measurements = chosen, tried
        index.expansion = None
        index.missing = index.gone = 0
        return index

    gallery: Gallery
    expansion: tuple[int, float] | None
    _coarse: Coarse | None
    _mapped: Path | None  # FAISS's file, where it is mapped and not read.
    _backbone: Backbone | None

    @classmethod
    def build(
        cls,
        store: Store | str | os.PathLike[str],
        factory: str = EXACT,
        metric: str = "cosine",
        *,
        recall: float | None = None,
        max_memory: int | None = None,
        max_latency: float | None = None,
        whiten: int | None = None,
        expansion: tuple[int, float] | None = None,
        backbone: Backbone | None = None,
        seed: int = 0,
        progress: Say | None = None,
    ) -> Index:
        """Build an index.

        By default it is exact: every row is compared, read block by block from the store, so that nothing is built
        and nothing goes stale. With `recall`, FAISS's kinds of indexes are measured on held-out rows of the store, and
        the fastest that keeps to it is built.

        Parameters
        ----------
        store : Store or path-like
            What to search in.
        factory : str, default "Flat"
            FAISS's name of an index, such as "HNSW32" or "IVF1024,PQ64x4fs". With `recall`, its settings are chosen;
            without, FAISS's own are kept. "Flat" is exact, or with `recall` whatever is fastest.
        metric : str, default "cosine"
            "cosine", "ip" (inner product) or "l2" (Euclidean distance).
        recall : float, optional
            Share of the exact ten neighbours that has to be found.
        max_memory : int, optional
            Bytes that the index may take, beside the store. Without `recall`, that is 0.99 then.
        max_latency : float, optional
            Seconds that a single query may take.
        whiten : int, optional
            Width to which embeddings are reduced and whitened by a PCA before they are compared.
        expansion : (int, float), optional
            Alpha query expansion: how many neighbours are added to a query, weighted by their similarity to the power
            of alpha, before it is searched with again; (10, 3.0) is usual.
        backbone : Backbone, optional
            What embeds queries that are images; by default the store's own, loaded when first needed.
        seed : int, default 0
            Draws held-out rows and samples.
        progress : callable, optional
            Called with one line of text at each step.

        Returns
        -------
        Index
            Ready to search.

        Raises
        ------
        EvaluationError
            When nothing keeps to what was asked for, with all that was measured.
        SpecMismatchError
            When `backbone` is not what made the store, naming the fields that differ.
        StoreNotFoundError, StoreFormatError
            As `Store.open`, or when embeddings are not finite.
        ValueError
            When FAISS makes no such index, or an option is out of its range.

        Notes
        -----
        Radenovic, Tolias and Chum, "Fine-tuning CNN image retrieval with no human annotation", 2018 (alpha query
        expansion).

        Examples
        --------
        >>> import embedkit as ek
        >>> index = ek.Index.build("photos.h5")  # doctest: +SKIP
        >>> [hit.id for hit in index.search("query.jpg", k=3)]  # doctest: +SKIP
        ['beach/12.jpg', 'beach/7.jpg', 'sea/3.jpg']
        """
        opened = store if isinstance(store, Store) else Store.open(store)
        wish = Wish(recall, max_memory, max_latency)
        _check(wish, expansion, metric)
        if backbone is not None:
            _require_own(backbone, opened)
        whitening = None if whiten is None else fit_whitening(opened, whiten, seed=seed)
        gallery, say = Gallery(opened, metric, whitening), progress or say_nothing
        if factory == EXACT and wish == Wish():
            say(f"exact: nothing is built, and {gallery.count_bytes(1000, 10) / 1e6:,.0f} MB search for 1,000 queries")
            index = cls._made(gallery, None, None, [])
        else:
            named = None if factory == EXACT else factory
            index = cls._made(gallery, *choose(gallery, named, wish, seed=seed, say=say))
        index.expansion, index._backbone = expansion, backbone
        return index

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        store: Store | str | os.PathLike[str] | None = None,
        *,
        backbone: Backbone | None = None,
    ) -> Index:
        """Open an index that `save` wrote; FAISS's file is mapped, not read.

        Parameters
        ----------
        path : path-like
            The folder of the index.
        store : Store or path-like, optional
            Its store, when it has moved.
        backbone : Backbone, optional
            What embeds queries that are images; by default the store's own, loaded when first needed.

        Returns
        -------
        Index
            Ready to search. When the store has changed since, a warning says how many rows the index lacks, and rows
            that have gone are not found.

        Raises
        ------
        StoreNotFoundError
            When there is no index, or its store has gone.
        StoreFormatError
            When the index is damaged.
        SpecMismatchError
            When the store was embedded otherwise than when the index was built, or `backbone` did not make it.
        """
        folder = Path(os.path.abspath(path))
        saved = files.load(folder)
        facts, arrays = saved.facts, saved.arrays
        place = _store_path(folder, facts, store)
        opened = place if isinstance(place, Store) else Store.open(place, layer=facts.layer)
        opened.spec.require_same(facts.spec, f"{opened.path} is not what {folder} was built from")
        if backbone is not None:
            _require_own(backbone, opened)
        changed = opened.content_id != facts.content_id
        try:
            gallery = Gallery(opened, facts.metric, saved.whitening(opened.dim))
            coarse = None
            if saved.index is not None:
                rows = files.rows_of(arrays["keys"], opened)[0] if changed else arrays["rows"]
                coarse = Coarse.of(saved.index, rows, facts.factory, gallery)
        except ValueError as error:
            raise StoreFormatError(f"{folder} is damaged: {error}; build the index again") from error
        index = cls._made(gallery, coarse, facts.chosen, list(facts.measurements))
        index.expansion, index._mapped, index._backbone = facts.expansion, saved.path, backbone
        if coarse is not None:
            index.gone = int((coarse.rows < 0).sum())
            index.missing = len(opened) - len(coarse) + index.gone
            index._warn(changed)
        return index

    def _warn(self, changed: bool) -> None:
        """Say what an index lacks, and what has gone since it was saved."""
        if self.missing or (changed and self.gone):
            _log.warning(
                "%s has changed since this index was built: %s of its rows are missing here and are not found, "
                "%s have gone; bring it up to date with index.add(), or embedkit index --update",
                self.store.path, f"{self.missing:,}", f"{self.gone:,}",
            )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the index as a folder, and return it: FAISS's own file, the rows of its entries, and a JSON.

        The JSON has the store's spec and content id, the metric, and all measurements. Whoever opens the folder
        meanwhile finds the old index or the new one. The exact search needs no file of FAISS's: the store is its data.

        Raises
        ------
        StoreBusyError
            When another process is writing it.
        StoreFormatError
            When something else stands there.
        ValueError
            When adding to the index was interrupted.
        """
        folder, store = Path(os.path.abspath(path)), self.store
        facts = Facts(
            os.fspath(store.path), store.layer, store.spec, store.content_id, len(store), self.metric, self.factory,
            self.expansion, self.chosen, tuple(self.measurements),
        )  # fmt: skip
        arrays: dict[str, npt.NDArray[Any]] = {"rows": np.empty(0, dtype=np.int64), "keys": np.empty((0, 16), np.uint8)}
        coarse = self._coarse
        if coarse is not None and coarse.index.ntotal != len(coarse):
            raise ValueError("adding rows to this index was interrupted; call add() again before it is saved")
        if coarse is not None:
            arrays |= {"rows": coarse.rows, "keys": files.row_keys(store, coarse.rows)}
        if self.gallery.whitening is not None:
            arrays |= {"mean": self.gallery.whitening.mean, "matrix": self.gallery.whitening.matrix}
        written = files.save(folder, facts, arrays, None if coarse is None else coarse.index)
        if self._mapped is not None and self._mapped.parent == folder:
            self._mapped = written
        return folder

    def add(self, store: Store | str | os.PathLike[str] | None = None, *, progress: Say | None = None) -> int:
        """Append new and changed rows of an updated store, drop those that have gone, and return how many are new.

        Parameters
        ----------
        store : Store or path-like, optional
            The store as it is now; by default it is opened again at its path.
        progress : callable, optional
            Called with one line of text at each step.

        Raises
        ------
        SpecMismatchError
            When it was embedded otherwise.
        """
        say = progress or say_nothing
        opened = store if isinstance(store, Store) else Store.open(store or self.store.path, layer=self.store.layer)
        opened.spec.require_same(self.store.spec, f"{opened.path} was embedded otherwise than this index")
        gallery = Gallery(opened, self.metric, self.gallery.whitening)
        coarse, keys = self._read_again()
        rows, missing = files.rows_of(keys, opened)
        if coarse is not None:
            say(f"{len(missing):,} rows to add, {int((rows < 0).sum()):,} entries have gone")
            gallery.norms  # noqa: B018  Looks for what is not finite, before anything is added.
            coarse = extend(Coarse(coarse.index, rows, coarse.factory), gallery, missing)
            self.gone = int((coarse.rows < 0).sum())
        self._coarse, self._mapped, self.missing = coarse, None, 0
        self.store, self.gallery = opened, gallery
        return len(missing)

    def _read_again(self) -> tuple[Coarse | None, files.Keys]:
        """Return the index in memory, for FAISS adds nothing to what it has mapped, and what tells its rows apart."""
        coarse = self._coarse
        if coarse is None:
            return None, files.row_keys(self.store)
        if self._mapped is None:
            return coarse, files.row_keys(self.store, coarse.rows)
        saved = files.load(self._mapped.parent, mapped=False)
        if saved.path != self._mapped:
            raise StoreFormatError(f"{self._mapped.parent} was replaced since it was opened; open it again")
        return Coarse(saved.index, coarse.rows, coarse.factory), saved.arrays["keys"]

    @property
    def metric(self) -> str:
        """What scores are: "cosine", "ip" or "l2"."""
        return self.gallery.metric

    @property
    def backbone(self) -> Backbone:
        """What embeds queries that are images: the store's own backbone. No other can be set."""
        if self._backbone is None:
            from embedkit.backbones import Backbone

            self._backbone = Backbone.reload(self.store.spec, self.store.recipe)
        return self._backbone

    @backbone.setter
    def backbone(self, backbone: Backbone) -> None:
        _require_own(backbone, self.store)
        self._backbone = backbone

    def __len__(self) -> int:
        return len(self.store)

    def __repr__(self) -> str:
        return f"<Index {self.factory} of {self.store.path}: {len(self)} x {self.store.dim}, {self.metric}>"

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        where: Where | None = None,
        radius: float | None = None,
        exclude_self: bool = False,
    ) -> SearchResult:
        """Find the nearest rows of each query.

        Parameters
        ----------
        queries : path, id, row, image, vector, or a list of them
            A path or image is embedded by the store's own backbone. A string is a file where there is one, and
            otherwise an id of the store. An array of integers of shape (h, w, 3) is an image; floats of shape (d,) or
            (q, d) are embeddings, and may be sums of them; an integer is a row of the store.
        k : int, default 10
            Neighbours; all rows when the store has fewer.
        where : str, list of str, array, or set, optional
            The rows to search in: patterns such as "label=cat" or "id=2024/*", all of which must match, a mask of
            shape (n,), or rows. What is found is exact however few they are.
        radius : float, optional
            Instead of the k nearest, everything at least so similar ("l2": at most so far), by exact search. `k` does
            not count then.
        exclude_self : bool, default False
            Leave out the query itself: the row it is, or rows of the same content as a file. PIL images have none.

        Returns
        -------
        SearchResult
            With ``scores`` and ``rows`` of shape (q, k).

        Raises
        ------
        ImageError
            For a query that cannot be read, or a string that is neither a file nor an id.
        EmbeddingShapeError
            When vectors have another width than the store.
        IndexError
            When a row does not exist.
        EvaluationError
            When `where` names a label that the store does not have.
        StoreFormatError
            When the store has embeddings that are not finite.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if radius is not None and math.isnan(radius):
            raise ValueError("radius must be a number")
        found = embed_queries(queries, self.store, lambda: self.backbone)
        placed = self.gallery.placed(found.vectors)
        if self.expansion is not None:
            count, alpha = self.expansion
            placed = expand(self.gallery, placed, *self._nearest(placed, min(count, len(self))), alpha)
        keep = mask_of(where, self.store)
        own = found.own if exclude_self else []
        if radius is not None:
            scores, rows = drop_own(*padded(self.gallery.within_placed(placed, radius, keep=keep)), own)
        else:
            extra = max(map(len, own), default=0)
            scores, rows = drop_own(*self._nearest(placed, min(k + extra, len(self)), keep), own, k)
        return SearchResult(scores, rows, self.store, found.single, self.metric)

    def _nearest(self, placed: Vectors, k: int, keep: npt.NDArray[np.bool_] | None = None) -> tuple[Vectors, Rows]:
        return nearest(
            self.gallery, self._coarse, placed, k, keep=keep,
            settings=(None, 1) if self.chosen is None else (self.chosen.effort, self.chosen.refine),
        )  # fmt: skip


def _check(wish: Wish, expansion: tuple[int, float] | None, metric: str) -> None:
    if wish.recall is not None and not 0 < wish.recall <= 1:
        raise ValueError(f"recall is a fraction above 0 and at most 1, got {wish.recall!r}")
    if not all(most is None or most > 0 for most in (wish.max_memory, wish.max_latency)):
        raise ValueError(f"limits are above 0, got {wish.max_memory!r} bytes and {wish.max_latency!r} seconds")
    if expansion is not None and (expansion[0] < 1 or not 0 <= expansion[1] < math.inf or metric != "cosine"):
        raise ValueError(
            f"query expansion takes a number of neighbours, an alpha of 0 or more, and cosine; got {expansion}"
        )


def _require_own(backbone: Backbone, store: Store) -> None:
    store.spec.require_same(backbone.spec, f"this backbone did not make {store.path}")


def _store_path(
    folder: Path, facts: Facts, given: Store | str | os.PathLike[str] | None
) -> Store | str | os.PathLike[str]:
    """Return where the store is: as given, where it was, or beside the index, when both were moved together."""
    if given is not None:
        return given
    beside = folder.parent / Path(facts.store).name
    return beside if beside.exists() and not os.path.exists(facts.store) else facts.store
