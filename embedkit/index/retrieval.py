"""Retrieval: how well the rows of one store find rows of the same class in another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.index.estimating import announce
from embedkit.index.exact import GALLERY_BLOCK, Gallery, Progress
from embedkit.index.ranking import Mask, Rows, first_ranks, first_rows, ranked_metrics, ranking_scores
from embedkit.store import Store
from embedkit.store.tables import lookup
from embedkit.text import printable

if TYPE_CHECKING:
    from embedkit.index.neighbours import Index

BLOCK_BYTES = 256 << 20  # Of what a block of queries needs beside the stores.
BLOCK_QUERIES = 1024
RANK_BYTES = 60  # What a query needs for each rank that counts.
SHOWN_CLASSES = 20
NAME_WIDTH = 30

Values = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class RetrievalReport:
    """How well queries find rows of their own class.

    Parameters
    ----------
    metrics : dict
        Fractions in [0, 1], the mean over all queries: "recall@k" and "precision@k" for each k, "mAP@R", "R-precision"
        and "MRR".
    per_class : dict
        The same for each class that was measured, its "queries", and "relevant": the rows of the gallery that are of
        that class.
    inputs : dict
        What was measured: paths, content ids and digest of the stores, counts of rows, the metric that ranked, whether
        each query was excluded itself, and how many queries were left out and why.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def class_means(self) -> dict[str, float]:
        """The mean over classes of each metric: rare classes count as much as frequent ones."""
        found = self.per_class.values()
        return {name: float(np.mean([one[name] for one in found])) for name in self.metrics}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        names = ("metrics", "class_means", "per_class", "inputs")
        values: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in names}, allow_nan=False))
        return values

    def to_text(self) -> str:
        """Return the report as plain text for a terminal, class names with their control characters escaped."""
        deepest = f"precision@{max(self.inputs['ks'])}"
        shown = [name for name in self.metrics if not name.startswith("precision@") or name == deepest]
        names = list(self.per_class)
        if len(names) > SHOWN_CLASSES:
            names = sorted(names, key=lambda name: self.per_class[name]["mAP@R"])[:SHOWN_CLASSES]
        rows = [["", *shown, "queries", "relevant"]]
        rows.append(["all queries", *_fractions(self.metrics, shown), f"{self.inputs['measured']:,}", ""])
        rows.append(["mean of classes", *_fractions(self.class_means, shown), "", ""])
        for name in names:
            found = self.per_class[name]
            rows.append([_name(name), *_fractions(found, shown), f"{found['queries']:,}", f"{found['relevant']:,}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        sides = "<" + ">" * len(widths)
        table = [
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False)).rstrip()
            for row in rows
        ]
        if len(names) < len(self.per_class):
            table.append(f"(the {len(names)} classes of lowest mAP@R, of {len(self.per_class):,})")
        return "\n".join([*table, "", *self._notes()]) + "\n"

    def _notes(self) -> list[str]:
        """Return the lines that say what was measured and what was not."""
        inputs = self.inputs
        lines = [
            f"{part:<8} {inputs[part]['rows']:,} rows  {printable(inputs[part]['path'])}"
            for part in ("queries", "gallery")
        ]
        for name, text in (
            ("unlabelled", "no label"),
            ("without_relevant", "a class of which the gallery has no other row"),
        ):
            if inputs["left_out"][name]:
                lines.append(f"left out {inputs['left_out'][name]:,} of the queries: {text}")
        if inputs["exclude_self"]:
            lines.append(f"excluded {inputs['excluded']:,} pairs of a query and its own image")
        elif inputs["shared_ids"] or inputs["shared_content"]:
            lines.append("every query that is in the gallery finds itself: --exclude-self leaves that out")
        return lines


def _name(text: str) -> str:
    """Return a class name fit for a table."""
    escaped = printable(text)
    return escaped if len(escaped) <= NAME_WIDTH else escaped[: NAME_WIDTH - 3] + "..."


def _fractions(values: dict[str, float], names: Sequence[str]) -> list[str]:
    return [f"{values[name]:.4f}" for name in names]


@dataclass(frozen=True)
class _Task:
    """Queries and a gallery: class codes of both in one numbering, and which pairs are one image."""

    queries: Store
    gallery: Store
    classes: list[str]
    query_codes: Rows
    gallery_codes: Rows
    own: tuple[Rows, Rows]  # Query rows, rising, and the gallery rows that are to be left out for them.
    counts: Rows  # R of every query.

    def own_rows(self, rows: Rows) -> tuple[Rows, Rows]:
        """Return lines, places in `rows`, and the gallery rows to leave out there; `rows` rise."""
        first, last = np.searchsorted(self.own[0], rows, "left"), np.searchsorted(self.own[0], rows, "right")
        lines = np.repeat(np.arange(len(rows)), last - first)
        places = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)] or [np.empty(0, np.int64)])
        return lines, self.own[1][places.astype(np.int64)]

    def relevant(self, rows: Rows, found: Rows) -> Mask:
        """Return whether what was found for query rows, of shape (q, k), is of their class; -1 is not."""
        relevant: Mask = (found >= 0) & (self.gallery_codes[found] == self.query_codes[rows][:, None])
        return relevant


def retrieval_report(
    queries: Store | str | os.PathLike[str],
    gallery: Store | str | os.PathLike[str] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    metric: str = "cosine",
    exclude_self: bool | None = None,
    index: Index | None = None,
    progress: Progress | None = None,
) -> RetrievalReport:
    """Measure how well every row of one store finds rows of its class in another.

    Parameters
    ----------
    queries : Store or path-like
        What to search with.
    gallery : Store or path-like, optional
        What to search in; by default the queries, or the store of `index`.
    ks : sequence of int, default (1, 5, 10)
        Depths of recall and precision.
    metric : str, default "cosine"
        What ranks the gallery: "cosine", "ip" or "l2". An index ranks by its own.
    exclude_self : bool, optional
        Whether to leave each query's own image out of what it finds. It must be said when the two stores share images
        or ids. The own image is the gallery's row of the same id, unless its file is known to be another one; where
        there is none, rows with the same content.
    index : Index, optional
        Measured instead of the exact order: what it does not find counts as not found.
    progress : callable, optional
        Called with the queries that were measured and their number.

    Returns
    -------
    RetrievalReport
        With ``metrics``, ``per_class`` and ``inputs``. Queries without a label, and those of whose class the gallery
        has no other row, are left out and counted.

    Raises
    ------
    SpecMismatchError
        When the two stores were not made alike.
    EvaluationError
        When there are no labels, no query can be measured, or `exclude_self` has to be said.
    ValueError
        When `ks` holds no depth or one below 1, or there is no such metric.

    Notes
    -----
    The formulas and their sources stand at `embedkit.index.ranking.ranked_metrics`, and docs/retrieval.md explains
    them. Equal scores rank by row. Exact ranking takes q x g x d multiplications, and 256 MiB beside the stores, or
    what a single query needs where that is more.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.index.retrieval import retrieval_report
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     vectors = [[1, 0], [0.9, 0.1], [0, 1], [0.8, 0.2]]
    ...     writer.append(vectors, ["a1", "a2", "b1", "b2"], labels=["a", "a", "b", "b"])
    ...     writer.finalise()
    >>> report = retrieval_report(f"{folder.name}/s.h5", exclude_self=True)
    >>> report.metrics["recall@1"], round(report.metrics["MRR"], 3)
    (0.75, 0.833)
    >>> folder.cleanup()
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers from 1 on, got {list(ks)}")
    ks = sorted(set(ks))
    query_store, gallery_store = _opened(queries, gallery, index)
    shared = _shared(query_store, gallery_store)
    _require_choice(query_store, gallery_store, exclude_self, shared)
    task = _task(query_store, gallery_store, bool(exclude_self))
    rows = np.flatnonzero(task.counts > 0)
    inputs: dict[str, Any] = {
        "queries": _described(query_store),
        "gallery": _described(gallery_store),
        "digest": query_store.digest,
        "metric": metric if index is None else index.metric,
        "search": "exact" if index is None else index.factory,
        "whitened_to": None if index is None or index.gallery.whitening is None else index.gallery.whitening.dim,
        "expansion": None if index is None else index.expansion,
        "ks": ks,
        "exclude_self": bool(exclude_self),
        "excluded": len(task.own[0]),
        "shared_ids": shared[0],
        "shared_content": shared[1],
        "measured": len(rows),
        "left_out": {
            "unlabelled": int((task.query_codes < 0).sum()),
            "without_relevant": int(((task.query_codes >= 0) & (task.counts <= 0)).sum()),
        },
    }
    if not len(rows):
        raise EvaluationError(
            f"no query of {query_store.path} can be measured: {inputs['left_out']['unlabelled']:,} have no label, and "
            f"{inputs['left_out']['without_relevant']:,} are of classes of which {gallery_store.path} has no other row"
        )
    blocks = _exactly(task, Gallery(gallery_store, metric), rows, ks) if index is None else _by(index, task, rows, ks)
    parts, done = [], 0
    if progress is not None:
        progress(0, len(rows))
    for block in blocks:
        parts.append(block)
        done += len(block["MRR"])
        if progress is not None:
            progress(done, len(rows))
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    metrics = {name: float(value.mean()) for name, value in values.items()}
    return RetrievalReport(metrics, _by_class(task, rows, values), inputs)


def _opened(queries: Any, gallery: Any, index: Index | None) -> tuple[Store, Store]:
    """Return the stores to search with and in, which were made alike."""
    query_store = queries if isinstance(queries, Store) else Store.open(queries)
    if gallery is None:
        gallery = query_store if index is None else index.store
    gallery_store = gallery if isinstance(gallery, Store) else Store.open(gallery)
    query_store.spec.require_same(
        gallery_store.spec, f"{query_store.path} and {gallery_store.path} were not made alike, and cannot be compared"
    )
    if index is not None and index.store.content_id != gallery_store.content_id:
        raise EvaluationError(f"the index is one of {index.store.path}, and not of {gallery_store.path}")
    for store in (query_store, gallery_store):
        if store.labels is None:
            raise EvaluationError(f"{store.path} has no labels; retrieval is measured by classes")
    return query_store, gallery_store


def _shared(queries: Store, gallery: Store) -> tuple[int, int]:
    """Return how many queries' ids, and how many queries' contents, the gallery has too."""
    if _same(queries, gallery):
        return len(queries), len(queries)
    ids = int((lookup(gallery.images.ids, queries.images.ids) >= 0).sum())
    own, theirs = _hashes(queries), _hashes(gallery)
    return ids, int((np.isin(own, theirs) & _known(queries)).sum())


def _require_choice(queries: Store, gallery: Store, exclude_self: bool | None, shared: tuple[int, int]) -> None:
    if exclude_self is None and any(shared):
        if _same(queries, gallery):
            what = f"queries and gallery are the same {len(queries):,} rows of {queries.path}"
        else:
            what = (
                f"of {len(queries):,} queries of {queries.path}, {shared[0]:,} have ids that {gallery.path} has too, "
                f"and {shared[1]:,} are the same files as rows of it"
            )
        raise EvaluationError(
            f"{what}: an image that finds itself is no evidence. Say exclude_self=True (--exclude-self) to leave each "
            "query's own image out of what it finds, or exclude_self=False (--include-self) to count it"
        )


def _same(queries: Store, gallery: Store) -> bool:
    return queries.content_id == gallery.content_id and np.array_equal(queries.images.ids, gallery.images.ids)


def _hashes(store: Store) -> npt.NDArray[Any]:
    """Return the content hash of every row as one sortable value."""
    return np.ascontiguousarray(store.content_sha256).view("S32")[:, 0]


def _known(store: Store) -> Mask:
    """Return which rows have a content hash; imported embeddings have none."""
    return np.asarray(store.content_sha256.any(axis=1))


def _own_images(queries: Store, gallery: Store) -> tuple[Rows, Rows]:
    """Return pairs of query rows, rising, and gallery rows that are the same image."""
    if _same(queries, gallery):
        return np.arange(len(queries)), np.arange(len(queries))
    if not len(gallery):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    at = lookup(gallery.images.ids, queries.images.ids)
    own, theirs = _hashes(queries), _hashes(gallery)
    unknown = ~_known(queries) | ~_known(gallery)[at]
    named = (at >= 0) & (unknown | (own == theirs[at]))
    rest = np.flatnonzero(~named & _known(queries))
    order = np.argsort(theirs, kind="stable")
    first = np.searchsorted(theirs, own[rest], "left", sorter=order)
    last = np.searchsorted(theirs, own[rest], "right", sorter=order)
    copies = [order[a:b] for a, b in zip(first, last, strict=True)]
    left = np.concatenate([np.flatnonzero(named), np.repeat(rest, last - first)])
    right = np.concatenate([at[named], *copies])
    rising = np.argsort(left, kind="stable")
    return left[rising], right[rising].astype(np.int64)


def _task(queries: Store, gallery: Store, exclude_self: bool) -> _Task:
    """Match classes by name, and count what is relevant to each query."""
    assert queries.labels is not None and gallery.labels is not None
    code = {name: number for number, name in enumerate(queries.classes)}
    # One entry more, so that the label -1 stays -1.
    translation = np.array([*(code.get(name, -1) for name in gallery.classes), -1], dtype=np.int64)
    gallery_codes = translation[gallery.labels]
    nobody = np.empty(0, dtype=np.int64)
    own = _own_images(queries, gallery) if exclude_self else (nobody, nobody)
    sizes = np.bincount(gallery_codes[gallery_codes >= 0], minlength=len(queries.classes) + 1)
    counts = np.where(queries.labels >= 0, sizes[queries.labels], 0)
    same = gallery_codes[own[1]] == queries.labels[own[0]]
    counts -= np.where(queries.labels >= 0, np.bincount(own[0][same], minlength=len(queries)), 0)
    return _Task(queries, gallery, queries.classes, queries.labels, gallery_codes, own, counts)


def _exactly(task: _Task, gallery: Gallery, rows: Rows, ks: Sequence[int]) -> Iterator[Values]:
    """Yield the metrics of blocks of queries, each compared with every row of the gallery."""
    g = len(gallery)
    deepest = min(g, max(max(ks), int(task.counts.max())))
    query_bytes = 5 * g + RANK_BYTES * deepest
    size = max(1, min(BLOCK_QUERIES, len(rows), BLOCK_BYTES // query_bytes))
    announce(len(rows), g, task.gallery.dim, size * query_bytes + 4 * GALLERY_BLOCK * task.gallery.dim)
    Gallery(task.queries).norms  # noqa: B018  # Raises when an embedding is not finite.
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        scores = ranking_scores(gallery, task.queries.rows(block))
        lines, own = task.own_rows(block)
        scores[lines, own] = -np.inf
        counts = task.counts[block]
        found = first_rows(scores, min(g, max(max(ks), int(counts.max()))))
        relevant = task.relevant(block, found) & (np.take_along_axis(scores, found, axis=1) > -np.inf)
        first = relevant.argmax(axis=1) + 1.0
        late = np.flatnonzero(~relevant.any(axis=1))
        for some in np.array_split(late, 1 + len(late) * 64 * g // BLOCK_BYTES):
            same = task.gallery_codes == task.query_codes[block[some]][:, None]
            first[some] = first_ranks(scores[some], same & (scores[some] > -np.inf))
        yield ranked_metrics(relevant, counts, first, ks)


def _by(index: Index, task: _Task, rows: Rows, ks: Sequence[int]) -> Iterator[Values]:
    """Yield the metrics of blocks of queries as an index answers them."""
    g = len(task.gallery)
    most = int(np.bincount(task.own[0]).max(initial=0))
    deepest = min(g, max(max(ks), int(task.counts.max())) + most)
    size = max(1, min(BLOCK_QUERIES, BLOCK_BYTES // (RANK_BYTES * deepest)))
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        counts = task.counts[block]
        depth = min(g, max(max(ks), int(counts.max())) + most)
        found = np.array(index.search(task.queries.rows(block), k=depth).rows)
        lines, own = task.own_rows(block)
        for line, row in zip(lines.tolist(), own.tolist(), strict=True):
            found[line][found[line] == row] = -1
        # What is left out moves to the end, and the others move up.
        found = np.take_along_axis(found, np.argsort(found < 0, axis=1, kind="stable"), axis=1)
        relevant = task.relevant(block, found)
        first = np.where(relevant.any(axis=1), relevant.argmax(axis=1) + 1.0, np.inf)
        yield ranked_metrics(relevant, counts, first, ks)


def _by_class(task: _Task, rows: Rows, values: Values) -> dict[str, dict[str, float]]:
    """Return the mean of each metric over the queries of each class."""
    c = len(task.classes)
    codes = task.query_codes[rows]
    numbers = np.bincount(codes, minlength=c)
    sizes = np.bincount(task.gallery_codes[task.gallery_codes >= 0], minlength=c)
    sums = {name: np.bincount(codes, weights=value, minlength=c) for name, value in values.items()}
    return {
        task.classes[code]: {
            **{name: float(total[code] / numbers[code]) for name, total in sums.items()},
            "queries": int(numbers[code]),
            "relevant": int(sizes[code]),
        }
        for code in np.flatnonzero(numbers).tolist()
    }


def _described(store: Store) -> dict[str, Any]:
    return {"path": os.fspath(store.path), "content_id": store.content_id, "rows": len(store)}
