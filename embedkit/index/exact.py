"""Gallery: the rows of a store to search in exactly, block by block and without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import faiss
import numpy as np
import numpy.typing as npt

from embedkit.errors import StoreFormatError
from embedkit.index.whitening import Whitening
from embedkit.store import Store

METRICS = ("cosine", "ip", "l2")
GALLERY_BLOCK = 8192  # Rows: 40 MB of a wide float32 store.
QUERY_BLOCK = 1024
PRODUCTS = 1 << 21  # Together: 8 MB, which stay in the cache until the heaps have seen them.
READ_NUMBERS = 1 << 24  # Of embeddings that have to be turned into float32 to be scored: 64 MB.
FEW_OPERATIONS = 1 << 21  # To wake a thread after a product takes longer than to look at so many numbers.

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


class Gallery:
    """The rows of a store, searched by comparing every one of them.

    The store is read block by block, once for all queries, with a heap of k for each of them: neither the gallery nor
    the products have to fit into memory.

    Parameters
    ----------
    store : Store
        What to search in.
    metric : str, default "cosine"
        "cosine" similarity, "ip" (inner product), or "l2", the Euclidean distance.
    whitening : Whitening, optional
        Compares whitened embeddings. The store is read as it is all the same: the query is transformed instead.

    Raises
    ------
    ValueError
        When there is no such metric, or it is not "cosine" with a whitening.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.index import Gallery
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     writer.append([[1, 0], [2, 2], [0, 3]], ["a.jpg", "b.jpg", "c.jpg"])
    ...     writer.finalise()
    >>> scores, rows = Gallery(Store.open(f"{folder.name}/s.h5")).search(np.float32([[0, 1]]), k=2)
    >>> rows.tolist(), [[round(float(score), 3) for score in scores[0]]]
    ([[2, 1]], [[1.0, 0.707]])
    >>> folder.cleanup()
    """

    def __init__(self, store: Store, metric: str = "cosine", whitening: Whitening | None = None) -> None:
        if metric not in METRICS:
            raise ValueError(f"there is no metric {metric!r}; known: {', '.join(map(repr, METRICS))}")
        if whitening is not None and metric != "cosine":
            raise ValueError(f"whitened embeddings are compared by cosine similarity, not by {metric!r}")
        self.store = store
        self.metric = metric
        self.whitening = whitening

    def __len__(self) -> int:
        return len(self.store)

    @cached_property
    def norms(self) -> Vectors:
        """Length of every embedding as it is compared, of shape (n,).

        Raises
        ------
        StoreFormatError
            When an embedding is not finite.
        """
        norms = np.empty(len(self), dtype=np.float32)
        done = 0
        for block in self.store.iter_blocks(GALLERY_BLOCK):
            compared = block if self.whitening is None else self.whitening.apply(block)
            norms[done : done + len(block)] = np.sqrt(np.einsum("nd,nd->n", compared, compared))
            done += len(block)
        if not np.isfinite(norms).all():
            raise StoreFormatError(
                f"{self.store.path} has embeddings that are not finite, or too long to be compared; find them with: "
                "embedkit verify"
            )
        return norms

    def count_bytes(self, q: int, k: int) -> int:
        """Return about how much memory a search takes for the k best rows of q queries, however large the store is."""
        wide = 4 * self.store.dim
        products = 4 * (PRODUCTS if self._is_mapped else min(q, QUERY_BLOCK) * GALLERY_BLOCK)
        return 2 * q * wide + 36 * q * (k + 8) + products + GALLERY_BLOCK * wide + 16 * len(self)

    def search(
        self, queries: Vectors, k: int, *, keep: npt.NDArray[np.bool_] | None = None, progress: Progress | None = None
    ) -> tuple[Vectors, Rows]:
        """Return the k best rows of each query, best first.

        Parameters
        ----------
        queries : array of shape (q, d)
            float32, finite, of any length.
        k : int
            How many; all where there are fewer.
        keep : array of bool of shape (n,), optional
            The rows to search in.
        progress : callable, optional
            Called with the rows that were compared and their number.

        Returns
        -------
        scores : array of shape (q, k)
            Similarities, falling; with "l2" distances, rising. Equal ones stand in the order of their rows. They are
            computed for each pair by itself, so that they do not depend on what else is searched for; with a whitening,
            up to rounding.
        rows : array of shape (q, k)
            Rows of the store.
        """
        return self.search_placed(self.placed(queries), k, keep=keep, progress=progress)

    def search_placed(
        self, placed: Vectors, k: int, *, keep: npt.NDArray[np.bool_] | None = None, progress: Progress | None = None
    ) -> tuple[Vectors, Rows]:
        """Search as `search` does, with queries that `placed` returned."""
        chosen = None if keep is None or keep.all() else np.flatnonzero(keep)
        total = len(self) if chosen is None else len(chosen)
        queries = self.prepared(placed)
        k = min(k, total)
        if not k or not len(queries):
            return np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
        # A few more than asked for, because products round otherwise than the scores in the end.
        heaps = _Heaps(len(queries), min(k + 8, total))
        done = 0
        for rows, scales, block in self._blocks(chosen, len(queries)):
            many = self.metric == "cosine" and len(queries) > block.shape[1]
            compared = self._scaled(block, scales) if many else block
            for first in range(0, len(queries), QUERY_BLOCK):
                part = queries[first : first + QUERY_BLOCK]
                heaps.add(first, self._likeness(part, compared, None if many else scales), rows)
            done += len(rows)
            if progress is not None:
                progress(done, total)
        return best(self.scores(queries, heaps.rows), heaps.rows, k, rising=self.metric == "l2")

    def within(
        self, queries: Vectors, radius: float, *, keep: npt.NDArray[np.bool_] | None = None
    ) -> list[tuple[Vectors, Rows]]:
        """Return scores and rows of everything as near as `radius`, best first, for each query.

        `radius` is the least similarity, or with "l2" the largest distance. The other parameters are as in `search`.
        """
        return self.within_placed(self.placed(queries), radius, keep=keep)

    def within_placed(
        self, placed: Vectors, radius: float, *, keep: npt.NDArray[np.bool_] | None = None
    ) -> list[tuple[Vectors, Rows]]:
        """Do as `within`, with queries that `placed` returned."""
        chosen = None if keep is None or keep.all() else np.flatnonzero(keep)
        queries = self.prepared(placed)
        found: list[list[Rows]] = [[] for _ in queries]
        squares = np.einsum("qd,qd->q", queries, queries)
        least = squares - min(max(radius, 0.0), 1e18) ** 2 if self.metric == "l2" else np.full(len(queries), radius)
        for rows, scales, block in self._blocks(chosen, len(queries)):
            for first in range(0, len(queries), QUERY_BLOCK):
                part = slice(first, first + QUERY_BLOCK)
                bounds = least[part] - self._slack(np.sqrt(squares[part]), rows)
                near = self._likeness(queries[part], block, scales) >= bounds[:, None]
                for query in np.flatnonzero(near.any(axis=1)):
                    found[first + query].append(rows[near[query]])
        return [
            self._near(query, np.concatenate([np.empty(0, dtype=np.int64), *near]), radius)
            for query, near in zip(queries, found, strict=True)
        ]

    def _slack(self, lengths: Vectors, rows: Rows) -> Vectors:
        """Return how far the likeness of some rows and queries of these lengths may be off by rounding."""
        longest = self.norms[rows].max(initial=0)
        if self.metric == "cosine":
            return np.full(len(lengths), 1e-5 if self.whitening is None else 1e-3, dtype=np.float32)
        slack: Vectors = 1e-5 * (lengths * longest if self.metric == "ip" else (lengths + longest) ** 2)
        return slack

    def _near(self, query: Vectors, rows: Rows, radius: float) -> tuple[Vectors, Rows]:
        scores = self.scores(query[None], rows[None])
        near = scores <= radius if self.metric == "l2" else scores >= radius
        scores, rows = best(scores[near][None], rows[near[0]][None], int(near.sum()), rising=self.metric == "l2")
        return scores[0], rows[0]

    def scores(self, queries: Vectors, rows: Rows) -> Vectors:
        """Return how alike each query and each of its rows are.

        Parameters
        ----------
        queries : array of shape (q, d)
            As `prepared` returns them.
        rows : array of shape (q, k)
            Rows of the store; -1 for none.

        Returns
        -------
        array of shape (q, k)
            Similarities, or distances with "l2"; the worst there is where a row is -1.
        """
        scores = np.empty(rows.shape, dtype=np.float32)
        if self._is_mapped:
            wide, high = max(1, rows.shape[1]), max(1, len(rows))
        else:
            wide = max(1, READ_NUMBERS // queries.shape[1])
            high = max(1, wide // max(1, rows.shape[1]))
        for top in range(0, len(rows), high):
            for left in range(0, rows.shape[1], wide):
                part = np.s_[top : top + high, left : left + wide]
                scores[part] = self._scored(queries[part[0]], np.ascontiguousarray(rows[part]))
        return scores

    def _scored(self, queries: Vectors, rows: Rows) -> Vectors:
        vectors, places = self._memory(rows)
        scores = np.empty(rows.shape, dtype=np.float32)
        compute = faiss.fvec_L2sqr_by_idx if self.metric == "l2" else faiss.fvec_inner_products_by_idx
        with _threads_for(rows.size * queries.shape[1]):
            compute(
                faiss.swig_ptr(scores), faiss.swig_ptr(queries), faiss.swig_ptr(vectors), faiss.swig_ptr(places),
                queries.shape[1], len(queries), rows.shape[1],
            )  # fmt: skip
        if self.metric == "l2":
            np.sqrt(scores, out=scores)
        elif self.metric == "cosine":
            if self.whitening is not None:
                scores -= np.einsum("qd,d->q", queries, self.whitening.mean)[:, None]
            scores *= self._scales[rows]
            np.clip(scores, -1, 1, out=scores)
        scores[rows < 0] = np.inf if self.metric == "l2" else -np.inf
        return scores

    def placed(self, vectors: Vectors) -> Vectors:
        """Return embeddings as they are compared: whitened, and of length 1 for cosine similarities.

        Zero vectors stay zero, and are similar to nothing.
        """
        if self.whitening is not None:
            placed = self.whitening.apply(np.asarray(vectors, dtype=np.float32))
        else:
            placed = np.array(vectors, dtype=np.float32, order="C")
        if self.metric == "cosine":
            faiss.normalize_L2(placed)
        return placed

    def prepared(self, placed: Vectors) -> Vectors:
        """Return what is multiplied with the embeddings as they are stored, for queries that `placed` returned."""
        # With a whitening A and its mean m, a(q)'A (x - m) = (A'a(q))'x - (A'a(q))'m.
        return placed if self.whitening is None else placed @ self.whitening.matrix

    def _memory(self, rows: Rows) -> tuple[Vectors, Rows]:
        """Return float32 vectors in memory, and where among them the vectors of `rows` lie."""
        if self._is_mapped:
            return self.store.embeddings, rows
        wanted, places = np.unique(rows, return_inverse=True)
        return self.store.rows(np.maximum(wanted, 0)), places.reshape(rows.shape)

    @cached_property
    def _is_mapped(self) -> bool:
        """Whether the embeddings lie in the file as FAISS reads them."""
        embeddings = self.store.embeddings
        return embeddings.dtype == np.float32 and embeddings.flags.c_contiguous and embeddings.flags.aligned

    def _likeness(self, queries: Vectors, block: Vectors, scales: Vectors | None) -> Vectors:
        """Return what ranks a block's rows as the metric does, larger for what is nearer, of shape (q, b)."""
        products: Vectors = queries @ block.T
        if scales is None:
            return products
        if self.whitening is not None:
            products -= (queries @ self.whitening.mean)[:, None]
        if self.metric == "cosine":
            products *= scales
        elif self.metric == "l2":
            # -|q - x|^2 = 2 q x - |x|^2 - |q|^2, where |q|^2 is the same for every x.
            products *= 2
            products -= scales
        return products

    def _scaled(self, block: Vectors, scales: Vectors) -> Vectors:
        """Return a block whose products are cosines: for many queries cheaper than to scale the products."""
        centred = block if self.whitening is None else block - self.whitening.mean
        scaled: Vectors = centred * scales[:, None]
        return scaled

    @cached_property
    def _scales(self) -> Vectors:
        """What products are multiplied by (cosine) or lessened by (l2), of shape (n,)."""
        norms = self.norms
        return norms * norms if self.metric == "l2" else np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)

    @cached_property
    def _numbers(self) -> Rows:
        return np.arange(len(self))

    def _blocks(self, chosen: Rows | None, queries: int) -> Iterator[tuple[Rows, Vectors, Vectors]]:
        """Yield rows, their scales and their embeddings as float32.

        Where the embeddings are mapped, a block costs no memory, and for few queries neither do its products.
        """
        if chosen is None:
            step = max(1, PRODUCTS // max(1, min(queries, QUERY_BLOCK))) if self._is_mapped else GALLERY_BLOCK
            for number, block in enumerate(self.store.iter_blocks(step)):
                part = slice(number * step, number * step + len(block))
                yield self._numbers[part], self._scales[part], block
        else:
            for start in range(0, len(chosen), GALLERY_BLOCK):
                rows = chosen[start : start + GALLERY_BLOCK]
                yield rows, self._scales[rows], self.store.rows(rows)


def nearest_rows(queries: Vectors, gallery: Vectors, k: int) -> tuple[Vectors, Rows]:
    """Return the k rows of a matrix in memory whose inner product with each query is largest.

    Parameters
    ----------
    queries, gallery : arrays of float32 of shapes (q, d) and (n, d)
        Rows of length 1 have their cosine similarity as inner product.
    k : int
        How many; all rows where there are fewer.

    Returns
    -------
    products, rows : arrays of shape (q, min(k, n))
        Best first. FAISS takes the products block by block, and of equal ones any may come first.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.index.exact import nearest_rows
    >>> nearest_rows(np.float32([[1, 0]]), np.float32([[0, 1], [1, 0], [2, 0]]), k=2)[1].tolist()
    [[2, 1]]
    """
    queries, gallery = (np.ascontiguousarray(matrix, dtype=np.float32) for matrix in (queries, gallery))
    k = min(k, len(gallery))
    if not k or not len(queries):
        return np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
    with _threads_for(len(queries) * gallery.size):
        products, rows = faiss.knn(queries, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)
    return products, rows


class _Heaps:
    """The k largest values of every query so far, and the rows that they are of."""

    def __init__(self, q: int, k: int) -> None:
        self.values = np.empty((q, k), dtype=np.float32)
        self.rows = np.empty((q, k), dtype=np.int64)
        self._heaps = faiss.float_minheap_array_t()
        self._heaps.nh, self._heaps.k = q, k
        self._heaps.val, self._heaps.ids = faiss.swig_ptr(self.values), faiss.swig_ptr(self.rows)
        self._heaps.heapify()

    def add(self, first: int, values: Vectors, rows: Rows) -> None:
        """Add values of shape (q, b) for the queries from `first` on; `rows` are those of the b columns."""
        q, b = values.shape
        with _threads_for(values.size):
            self._heaps.addn_with_ids(b, faiss.swig_ptr(values), faiss.swig_ptr(rows), 0, first, q)


@contextmanager
def _threads_for(operations: int) -> Iterator[None]:
    """Do a little work in this thread alone: to wake the others after a matrix product takes milliseconds."""
    if operations > FEW_OPERATIONS:
        yield
        return
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # Of this thread only: OpenMP keeps the number for each.
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def best(scores: Vectors, rows: Rows, k: int, *, rising: bool) -> tuple[Vectors, Rows]:
    """Return the k best of each line, the lower row first where scores are equal."""
    order = np.lexsort((rows, scores if rising else -scores))[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
