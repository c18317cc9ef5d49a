"""Exact search: what numpy finds, whatever the metric, the store and the size of a batch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from embedkit import EmbeddingShapeError, EmbeddingSpec, Index, Store, StoreFormatError
from embedkit.index import METRICS, Gallery, exact, searching
from embedkit.index.whitening import Whitening, fit_whitening
from embedkit.store import StoreWriter

Array = npt.NDArray[Any]


def make_store(path: Path, embeddings: Array, dtype: str = "float32") -> Store:
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=embeddings.shape[1])
    with StoreWriter(path, spec) as writer:
        writer.append(embeddings, [f"{row:06}.jpg" for row in range(len(embeddings))])
        writer.finalise()
    if dtype != "float32":  # The format allows it, for other writers than ours.
        with h5py.File(path, "r+", libver=("v108", "v108")) as file:
            del file["embeddings"]
            file.create_dataset("embeddings", data=embeddings.astype(dtype))
    return Store.open(path)


def their_scores(queries: Array, gallery: Array, metric: str) -> Array:
    queries, gallery = queries.astype(np.float64), gallery.astype(np.float64)
    if metric == "l2":
        return np.array([np.sqrt(((gallery - query) ** 2).sum(axis=1)) for query in queries])
    if metric == "cosine":
        queries, gallery = (
            np.divide(x, length, out=np.zeros_like(x), where=length > 0)
            for x in (queries, gallery)
            for length in [np.linalg.norm(x, axis=1, keepdims=True)]
        )
    return queries @ gallery.T


def assert_nearest(found: tuple[Array, Array], theirs: Array, k: int, metric: str, atol: float = 2e-5) -> None:
    """Hold scores equal to the k best of all scores, and every row equal to the score beside it."""
    scores, rows = found
    best = np.sort(theirs, axis=1)[:, :k] if metric == "l2" else -np.sort(-theirs, axis=1)[:, :k]
    assert scores.shape == rows.shape == best.shape
    np.testing.assert_allclose(scores, best, atol=atol, rtol=2e-5)
    np.testing.assert_allclose(np.take_along_axis(theirs, rows, axis=1), scores, atol=atol, rtol=2e-5)
    assert all(len(set(line)) == len(line) for line in rows.tolist())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("metric", METRICS)
def test_search_equals_numpy(tmp_path: Path, metric: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "GALLERY_BLOCK", 512)
    monkeypatch.setattr(exact, "PRODUCTS", 512 * 16)
    monkeypatch.setattr(exact, "QUERY_BLOCK", 16)
    monkeypatch.setattr(exact, "READ_NUMBERS", 700)
    random = np.random.default_rng(1)
    store = make_store(tmp_path / "s.h5", random.standard_normal((3000, 20)) + 0.3, dtype)
    queries = (5 * random.standard_normal((40, 20))).astype(np.float32)
    theirs = their_scores(queries, store.load(), metric)
    gallery = Gallery(store, metric)
    seen: list[tuple[int, int]] = []
    found = gallery.search(queries, 10, progress=lambda done, total: seen.append((done, total)))
    assert_nearest(found, theirs, 10, metric)
    assert seen[0] == (512, 3000) and seen[-1] == (3000, 3000)
    for share in (0.001, 0.5):
        keep = random.random(3000) < share
        scores, rows = gallery.search(queries, 10, keep=keep)
        k = min(10, int(keep.sum()))
        assert k and keep[rows].all()
        place = np.cumsum(keep) - 1
        assert_nearest((scores, place[rows]), theirs[:, keep], k, metric)
    nothing = gallery.search(queries, 10, keep=np.zeros(3000, dtype=np.bool_))
    assert nothing[0].shape == nothing[1].shape == (40, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_radius_finds_what_numpy_finds(
    tmp_path: Path, metric: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "GALLERY_BLOCK", 300)
    monkeypatch.setattr(exact, "PRODUCTS", 300 * 9)
    random = np.random.default_rng(2)
    store = make_store(tmp_path / "s.h5", 30 * random.standard_normal((1500, 12)) + 10, dtype)
    queries = (30 * random.standard_normal((9, 12))).astype(np.float32)
    theirs = their_scores(queries, store.load(), metric)
    gallery = Gallery(store, metric)
    for share in (0.0, 0.01, 0.4, 1.0):
        radius = float(np.quantile(theirs, share if metric == "l2" else 1 - share)) + (1e-3 if share in (0, 1) else 0)
        near = theirs <= radius if metric == "l2" else theirs >= radius
        for query, (scores, rows) in enumerate(gallery.within(queries, radius)):
            differ = np.setxor1d(rows, np.flatnonzero(near[query]))
            np.testing.assert_allclose(theirs[query, differ], radius, rtol=1e-5, atol=1e-4)  # On the edge itself.
            assert (np.diff(scores) >= 0).all() if metric == "l2" else (np.diff(scores) <= 0).all()
            np.testing.assert_allclose(scores, theirs[query, rows], rtol=2e-5, atol=2e-3)
    keep = np.arange(1500) % 3 == 0
    far = 1e30 if metric == "l2" else -1e30
    assert all(sorted(rows.tolist()) == list(range(1500)) for _, rows in gallery.within(queries, far))
    assert [len(rows) for _, rows in gallery.within(queries, far, keep=keep)] == [500] * 9
    assert [len(rows) for _, rows in gallery.within(queries, -far)] == [0] * 9


def test_a_radius_misses_nothing_where_products_cancel(tmp_path: Path) -> None:
    # Far from the origin |q|^2 + |x|^2 - 2qx loses what the distance is made of.
    random = np.random.default_rng(3)
    vectors = (1000 + random.standard_normal((400, 16))).astype(np.float32)
    store = make_store(tmp_path / "s.h5", vectors)
    for queries in (vectors[:5], vectors[:5] / 2):
        theirs = their_scores(queries, vectors, "l2")
        radius = float(np.median(theirs))
        found = Gallery(store, "l2").within(queries, radius)
        assert [len(rows) for _, rows in found] == pytest.approx((theirs <= radius).sum(axis=1), abs=2)


def test_equal_scores_stand_in_the_order_of_rows(tmp_path: Path) -> None:
    vectors = np.tile(np.eye(3, 8, dtype=np.float32), (4, 1))
    for metric in METRICS:
        gallery = Gallery(make_store(tmp_path / f"{metric}.h5", vectors), metric)
        scores, rows = gallery.search(vectors[:1] + vectors[1:2] / 2, 12)
        assert rows.tolist() == [[0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]]
        assert len(set(scores[0].tolist())) == 3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("metric", METRICS)
def test_one_query_and_many_have_the_same_scores_bit_for_bit(tmp_path: Path, metric: str, dtype: str) -> None:
    random = np.random.default_rng(4)
    store = make_store(tmp_path / "s.h5", random.standard_normal((2000, 33)), dtype)
    queries = random.standard_normal((500, 33), dtype=np.float32)
    gallery = Gallery(store, metric)
    scores, rows = gallery.search(queries, 7)
    for number in (0, 1, 250, 499):
        alone = gallery.search(queries[number : number + 1], 7)
        assert alone[0].tobytes() == scores[number].tobytes() and (alone[1][0] == rows[number]).all()


def test_few_rows_and_zero_vectors(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.h5", np.array([[0, 0, 0], [3, 0, 0], [0, 0, -2]], dtype=np.float32))
    for metric in METRICS:
        gallery = Gallery(store, metric)
        queries = np.array([[0, 0, 0], [1, 0, 1]], dtype=np.float32)
        assert_nearest(gallery.search(queries, 99), their_scores(queries, store.load(), metric), 3, metric)
        assert gallery.search(queries[:0], 5)[0].shape == (0, 3)
    empty = make_store(tmp_path / "e.h5", np.empty((0, 3), dtype=np.float32))
    assert Gallery(empty).search(queries, 5)[1].shape == (2, 0)
    assert [len(rows) for _, rows in Gallery(empty, "l2").within(queries, 1.0)] == [0, 0]
    assert Index.build(empty).search(queries).rows.shape == (2, 0)
    with pytest.raises(ValueError, match="no metric 'dot'; known: 'cosine', 'ip', 'l2'"):
        Gallery(store, "dot")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", ["nan", "inf", "3e38"])
def test_embeddings_that_cannot_be_compared_are_an_error(tmp_path: Path, metric: str, value: str) -> None:
    vectors = np.ones((4, 3), dtype=np.float32)
    vectors[2, 1] = 77
    store = make_store(tmp_path / "s.h5", vectors)
    store.path.write_bytes(store.path.read_bytes().replace(np.float32(77).tobytes(), np.float32(value).tobytes()))
    index = Index.build(store.path, metric=metric)
    with pytest.raises(StoreFormatError, match=r"s\.h5 has embeddings that are not finite"):
        index.search(np.ones(3), k=2)
    with pytest.raises(StoreFormatError, match="not finite"):
        index.search(np.ones(3), radius=0.5)
    with pytest.raises(EmbeddingShapeError):
        index.search(np.array([1.0, float("inf"), 0]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_whitening_equals_numpy_on_whitened_vectors(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(5)
    turned = random.standard_normal((24, 24)) * np.geomspace(1, 0.05, 24)
    store = make_store(tmp_path / "s.h5", random.standard_normal((2500, 24)) @ turned + 2, dtype)
    vectors = store.load().astype(np.float64)
    values, directions = np.linalg.eigh(np.cov(vectors.T, bias=True))
    matrix = (directions / np.sqrt(values)).T[::-1][:9]
    whitened = (vectors - vectors.mean(axis=0)) @ matrix.T
    np.testing.assert_allclose(np.cov(whitened.T, bias=True), np.eye(9), atol=1e-6)
    queries = vectors[:30].astype(np.float32) + random.standard_normal((30, 24)).astype(np.float32)
    theirs = their_scores((queries - vectors.mean(axis=0)) @ matrix.T, whitened, "cosine")
    index = Index.build(store, whiten=9)
    found = index.search(queries, k=10)
    assert_nearest((found.scores, found.rows), theirs, 10, "cosine", atol=1e-4)
    near = index.search(queries, radius=0.8)
    assert (near.rows >= 0).sum() == pytest.approx((theirs >= 0.8).sum(), abs=2)
    whitening = fit_whitening(store, 9)
    signs = np.sign((whitening.matrix * matrix).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(whitening.matrix * signs, matrix, rtol=1e-2, atol=1e-2 * np.abs(matrix).max())


def test_whitening_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    flat = np.random.default_rng(0).standard_normal((50, 2)) @ np.eye(2, 5)
    store = make_store(tmp_path / "s.h5", flat)
    with pytest.raises(ValueError, match="vary in 2 directions; cannot whiten to 3"):
        Index.build(store, whiten=3)
    with pytest.raises(ValueError, match="width 5; cannot whiten to 6"):
        Index.build(store, whiten=6)
    with pytest.raises(ValueError, match="cosine similarity, not by 'l2'"):
        Index.build(store, metric="l2", whiten=2)
    with pytest.raises(ValueError, match="does not fit width 5"):
        Whitening.of(np.zeros(4, dtype=np.float32), np.zeros((2, 5), dtype=np.float32), 5)


@pytest.mark.parametrize(("count", "alpha"), [(1, 0.0), (10, 3.0), (400, 1.5)])
def test_query_expansion_equals_its_formula(
    tmp_path: Path, count: int, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "EXPANDED", 5)
    random = np.random.default_rng(6)
    store = make_store(tmp_path / "s.h5", random.standard_normal((300, 16)) + 0.2)
    queries = random.standard_normal((12, 16)).astype(np.float32)
    unit = store.load() / np.linalg.norm(store.load(), axis=1, keepdims=True)
    expanded = []
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        similarity = unit @ query
        nearest = np.argsort(-similarity)[:count]
        expanded.append(query + np.maximum(similarity[nearest], 0) ** alpha @ unit[nearest])
    theirs = their_scores(np.array(expanded), unit, "cosine")
    found = Index.build(store, expansion=(count, alpha)).search(queries, k=20)
    assert_nearest((found.scores, found.rows), theirs, 20, "cosine")


@pytest.mark.parametrize(
    "options",
    [
        {"recall": 0.0}, {"recall": 1.1}, {"recall": float("nan")}, {"expansion": (0, 1.0)},
        {"expansion": (3, float("nan"))}, {"expansion": (3, -1.0)}, {"expansion": (3, 1.0), "metric": "ip"},
        {"max_memory": 0}, {"max_latency": -1.0}, {"max_latency": float("nan")},
    ],
)  # fmt: skip
def test_options_out_of_their_range_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"recall is|expansion takes|limits are"):
        Index.build(make_store(tmp_path / "s.h5", np.eye(3, dtype=np.float32)), **options)


def test_sums_of_vectors_are_queries(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    vectors = random.standard_normal((200, 10)).astype(np.float32)
    index = Index.build(make_store(tmp_path / "s.h5", vectors))
    a, b, c = index.store.rows([3, 50, 120])
    found = index.search(a + b - c, k=200)
    assert len(found) == 200 and found.single
    assert_nearest((found.scores, found.rows), their_scores((a + b - c)[None], vectors, "cosine"), 200, "cosine")
    assert not np.isin([3], index.search([3], k=199, exclude_self=True).rows).any()
    assert index.search(a, k=5, exclude_self=True).rows[0, 0] == 3  # A vector is nobody's.
    with pytest.raises(ValueError, match="radius must be a number"):
        index.search(a, radius=float("nan"))


@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_threads_share_an_index(tmp_path: Path, factory: str) -> None:
    random = np.random.default_rng(8)
    index = Index.build(make_store(tmp_path / "s.h5", random.standard_normal((3000, 16))), factory)
    batches = [random.standard_normal((40, 16)).astype(np.float32) for _ in range(30)]
    keep = np.arange(3000) % 2 == 0
    tasks: list[Callable[[], Any]] = [lambda x=x, keep=keep: index.search(x, k=5, where=keep) for x in batches]  # type: ignore[misc]
    tasks += [lambda x=x: index.search(x, k=5) for x in batches]  # type: ignore[misc]
    expected = [task() for task in tasks]
    fresh = Index.build(index.store, factory)  # Nothing is cached yet, so that the threads compute it together.
    index = fresh if factory == "Flat" else index
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(lambda task: task(), tasks), expected, strict=True):
            assert (ours.rows == theirs.rows).all() and ours.scores.tobytes() == theirs.scores.tobytes()
