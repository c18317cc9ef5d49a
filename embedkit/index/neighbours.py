"""Index: nearest neighbours over a store.

An index is derived data: it knows the store's spec, refuses a query that was embedded otherwise, and says when the
store has rows that it lacks.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedkitError, StoreFormatError
from embedkit.index import files
from embedkit.index.choosing import Measurement, Wish, choose
from embedkit.index.coarse import Coarse, extend
from embedkit.index.exact import Gallery, Rows, Vectors
from embedkit.index.families import EXACT
from embedkit.index.filters import Where, drop_own, mask_of
from embedkit.index.queries import embed_queries
from embedkit.index.results import SearchResult, padded
from embedkit.index.searching import expand, nearest
from embedkit.index.whitening import Whitening, fit_whitening
from embedkit.spec import EmbeddingSpec
from embedkit.store import Store

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
        index._coarse, index._folder = coarse, None
        index.factory = EXACT if coarse is None else coarse.factory
        index.chosen, index.measurements = chosen, tried
        index.expansion = None
        index.missing = index.gone = 0
        return index

    gallery: Gallery
    expansion: tuple[int, float] | None
    _coarse: Coarse | None
    _folder: Path | None  # Where FAISS's file is mapped from.

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
            Bytes that the index may take, beside the store.
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
            opened.spec.require_same(backbone.spec, f"this backbone did not make {opened.path}")
        whitening = None if whiten is None else fit_whitening(opened, whiten, seed=seed)
        gallery = Gallery(opened, metric, whitening)
        if factory == EXACT and wish == Wish():
            index = cls._made(gallery, None, None, [])
        else:
            named = None if factory == EXACT else factory
            index = cls._made(gallery, *choose(gallery, named, wish, seed=seed, say=progress or _silent))
        index.expansion = expansion
        if backbone is not None:
            index.backbone = backbone
        return index

    @classmethod
    def open(cls, path: str | os.PathLike[str], store: Store | str | os.PathLike[str] | None = None) -> Index:
        """Open an index that `save` wrote; FAISS's file is mapped, not read.

        Parameters
        ----------
        path : path-like
            The folder of the index.
        store : Store or path-like, optional
            Its store, when it has moved.

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
            When the store was embedded otherwise than when the index was built.
        """
        folder = Path(os.path.abspath(path))
        saved = files.load(folder)
        facts = saved.facts
        try:
            spec = EmbeddingSpec.from_dict(facts["spec"])
            layer = facts["layer"]
            opened = store if isinstance(store, Store) else Store.open(_store_path(folder, facts, store), layer=layer)
            opened.spec.require_same(spec, f"{opened.path} is not what {folder} was built from")
            index = cls._from(saved, opened)
        except EmbedkitError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise StoreFormatError(f"{folder / files.NAME} is damaged: {error!r}; build the index again") from error
        if saved.path is not None:
            index._folder = folder
        if opened.content_id != facts.get("content_id"):
            index._follow(opened, saved.arrays["keys"])
        return index

    @classmethod
    def _from(cls, saved: files.Saved, store: Store) -> Index:
        facts, arrays = saved.facts, saved.arrays
        whitening = Whitening(arrays["mean"], arrays["matrix"]) if "mean" in arrays else None
        if whitening is not None and (
            whitening.mean.shape != (store.dim,) or whitening.matrix.shape[1:] != (store.dim,)
        ):
            raise ValueError("the whitening has another width")
        gallery = Gallery(store, facts["metric"], whitening)
        tried = [Measurement(**one) for one in facts["measurements"]]
        chosen = None if facts["chosen"] is None else Measurement(**facts["chosen"])
        coarse = None
        if saved.index is not None:
            width = store.dim if whitening is None else whitening.dim
            if saved.index.d != width or (len(store) and arrays["rows"].max(initial=-1) >= facts["rows"]):
                raise ValueError("FAISS's file is of another width")
            coarse = Coarse(saved.index, arrays["rows"], str(facts["factory"]))
        index = cls._made(gallery, coarse, chosen, tried)
        index.expansion = (
            None if facts["expansion"] is None else (int(facts["expansion"][0]), float(facts["expansion"][1]))
        )
        return index

    def _follow(self, store: Store, keys: files.Keys) -> Rows:
        """Let the entries of the index stand for the rows of a changed store; return the rows that it lacks."""
        if self._coarse is None:
            return np.empty(0, dtype=np.int64)
        rows, missing = files.rows_of(keys, store)
        self._coarse = dataclasses.replace(self._coarse, rows=rows)
        self.missing, self.gone = len(missing), int((rows < 0).sum())
        if self.missing or self.gone:
            _log.warning(
                "%s has changed since this index was built: %s of its rows are missing here and are not found, "
                "%s have gone; bring it up to date with index.add(), or embedkit index --update",
                store.path, f"{self.missing:,}", f"{self.gone:,}",
            )  # fmt: skip
        return missing

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
        """
        folder, store = Path(os.path.abspath(path)), self.store
        facts = {
            "store": os.fspath(store.path),
            "layer": store.layer,
            "digest": store.digest,
            "spec": store.spec.to_dict(),
            "content_id": store.content_id,
            "rows": len(store),
            "metric": self.metric,
            "factory": self.factory,
            "expansion": self.expansion,
            "chosen": None if self.chosen is None else dataclasses.asdict(self.chosen),
            "measurements": [dataclasses.asdict(one) for one in self.measurements],
        }
        arrays: dict[str, npt.NDArray[Any]] = {"rows": np.empty(0, dtype=np.int64), "keys": np.empty((0, 16), np.uint8)}
        coarse = self._coarse
        if coarse is not None:
            keys = np.zeros((len(coarse), 16), dtype=np.uint8)
            here = coarse.rows >= 0
            keys[here] = files.row_keys(store, coarse.rows[here])
            arrays |= {"rows": coarse.rows, "keys": keys}
        if self.gallery.whitening is not None:
            arrays |= {"mean": self.gallery.whitening.mean, "matrix": self.gallery.whitening.matrix}
        files.save(folder, facts, arrays, None if coarse is None else coarse.index)
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
        say = progress or _silent
        opened = store if isinstance(store, Store) else Store.open(store or self.store.path, layer=self.store.layer)
        opened.spec.require_same(self.store.spec, f"{opened.path} was embedded otherwise than this index")
        gallery = Gallery(opened, self.metric, self.gallery.whitening)
        if self._coarse is not None:
            coarse = self._coarse
            if self._folder is not None:  # FAISS adds to what it has read, not to what it has mapped.
                saved = files.load(self._folder, mapped=False)
                keys, coarse = saved.arrays["keys"], Coarse(saved.index, coarse.rows, coarse.factory)
            else:
                keys = np.zeros((len(coarse), 16), dtype=np.uint8)
                keys[coarse.rows >= 0] = files.row_keys(self.store, coarse.rows[coarse.rows >= 0])
            rows, missing = files.rows_of(keys, opened)
            say(f"{len(missing):,} rows to add, {int((rows < 0).sum()):,} entries have gone")
            self._coarse = extend(Coarse(coarse.index, rows, coarse.factory), gallery, missing)
            self._folder = None
        else:
            missing = np.arange(len(self.store), max(len(opened), len(self.store)))
        self.store, self.gallery = opened, gallery
        self.missing, self.gone = 0, 0 if self._coarse is None else int((self._coarse.rows < 0).sum())
        return len(missing)

    @property
    def metric(self) -> str:
        """What scores are: "cosine", "ip" or "l2"."""
        return self.gallery.metric

    @cached_property
    def backbone(self) -> Backbone:
        """What embeds queries that are images: the store's own backbone."""
        from embedkit.backbones import Backbone

        return Backbone.reload(self.store.spec, self.store.recipe)

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
            Leave out the query itself: the row it is, or the rows with the same content as an image file.

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
    if expansion is not None and (expansion[0] < 1 or expansion[1] < 0 or metric != "cosine"):
        raise ValueError(
            f"query expansion takes a number of neighbours, an alpha of 0 or more, and cosine; got {expansion}"
        )


def _silent(line: str) -> None:
    """Take a line of progress and say nothing."""


def _store_path(folder: Path, facts: dict[str, Any], given: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """Return where the store is: as given, where it was, or beside the index, when both were moved together."""
    if given is not None or os.path.exists(facts["store"]):
        return given or str(facts["store"])
    beside = folder.parent / Path(facts["store"]).name
    return beside if beside.exists() else str(facts["store"])
