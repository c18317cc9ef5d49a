"""Index: nearest neighbours over a store.

An index is derived data: it knows the store's spec, and refuses a query that was embedded otherwise.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone
from embedkit.errors import EmbeddingShapeError, StoreFormatError
from embedkit.index.results import SearchResult
from embedkit.store import Store


class Index:
    """Exact cosine neighbours over a store, made by `Index.build`.

    Attributes
    ----------
    store : Store
        What is searched in.
    """

    store: Store

    def __init__(self) -> None:
        raise TypeError("build an index with Index.build(store)")

    @classmethod
    def build(cls, store: Store | str | os.PathLike[str], *, backbone: Backbone | None = None) -> Index:
        """Build an exact index.

        Parameters
        ----------
        store : Store or path-like
            What to search in. Its rows are normalised to unit length in memory, 4 * n * d bytes.
        backbone : Backbone, optional
            What embeds queries that are images; by default the store's own, loaded when first needed.

        Returns
        -------
        Index
            Ready to search.

        Raises
        ------
        SpecMismatchError
            When `backbone` is not what made the store, naming the fields that differ.
        StoreNotFoundError, StoreFormatError
            As `Store.open`.

        Examples
        --------
        >>> import embedkit as ek
        >>> index = ek.Index.build("photos.h5")  # doctest: +SKIP
        >>> [hit.id for hit in index.search("query.jpg", k=3)]  # doctest: +SKIP
        ['beach/12.jpg', 'beach/7.jpg', 'sea/3.jpg']
        """
        index = cls.__new__(cls)
        index.store = store if isinstance(store, Store) else Store.open(store)
        if backbone is not None:
            index.store.spec.require_same(backbone.spec, f"this backbone did not make {index.store.path}")
            index.backbone = backbone
        index._faiss = faiss.IndexFlatIP(index.store.dim)
        for block in index.store.iter_blocks():
            index._faiss.add(_unit(block))
        return index

    _faiss: Any

    @cached_property
    def backbone(self) -> Backbone:
        """What embeds queries that are images: the store's own backbone."""
        return Backbone.reload(self.store.spec, self.store.recipe)

    def __len__(self) -> int:
        return len(self.store)

    def search(self, queries: Any, k: int = 10) -> SearchResult:
        """Find the k nearest rows of each query by cosine similarity.

        Parameters
        ----------
        queries : path, PIL image, array, vector, row, or a list of them
            A path or image is embedded by the store's own backbone. An array of integers of shape (h, w, 3) is an
            image; floats of shape (d,) or (q, d) are embeddings; an integer is a row of the store.
        k : int, default 10
            Neighbours; all rows when the store has fewer. A row of the store finds itself.

        Returns
        -------
        SearchResult
            With ``scores`` and ``rows`` of shape (q, k).

        Raises
        ------
        ImageError
            For a query that cannot be read.
        EmbeddingShapeError
            When vectors have another width than the store.
        IndexError
            When a row does not exist.
        StoreFormatError
            When the store has embeddings that are not finite.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        vectors, single = self._embed(queries)
        scores, rows = self._faiss.search(_unit(vectors), min(k, len(self)))
        if (rows < 0).any():  # So faiss says that it found fewer than it was asked for.
            raise StoreFormatError(
                f"{self.store.path} has embeddings that are not finite; find them with: embedkit verify"
            )
        return SearchResult(scores, rows, self.store, single)

    def _embed(self, queries: Any) -> tuple[npt.NDArray[np.float32], bool]:
        if isinstance(queries, np.ndarray) and queries.ndim == 2 and queries.dtype.kind == "f":
            return self._vectors(queries), False
        if not isinstance(queries, list | tuple):
            return self._embed_one(queries), True
        if queries and all(_is_image(query) for query in queries):
            return self.backbone.embed(queries), False
        none = np.empty((0, self.store.dim), dtype=np.float32)
        return np.concatenate([none, *map(self._embed_one, queries)]), False

    def _embed_one(self, query: Any) -> npt.NDArray[np.float32]:
        """Return the embedding of one query, of shape (1, d)."""
        if isinstance(query, int | np.integer):
            if not 0 <= query < len(self):
                raise IndexError(f"row {query} does not exist; {self.store.path} has {len(self)} rows")
            return self.store.rows([int(query)])
        if _is_image(query):
            return self.backbone.embed([query])
        return self._vectors(np.asarray(query)[None])

    def _vectors(self, vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if vectors.ndim != 2 or vectors.shape[1] != self.store.dim:
            raise EmbeddingShapeError(
                f"{self.store.path} holds embeddings of width {self.store.dim}, the query has shape {vectors.shape[1:]}"
            )
        if not np.isfinite(vectors).all():
            raise EmbeddingShapeError("the query holds infinities or NaN; a cosine similarity needs finite numbers")
        return np.asarray(vectors, dtype=np.float32)


def _is_image(query: object) -> bool:
    return not isinstance(query, int | np.integer) and (not isinstance(query, np.ndarray) or query.ndim > 1)


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return vectors of length 1; a zero vector stays zero and is similar to nothing."""
    unit = np.array(vectors, dtype=np.float32, order="C")
    faiss.normalize_L2(unit)
    return unit
