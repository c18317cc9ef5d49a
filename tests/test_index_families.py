"""Approximate indexes: every kind of them, chosen or named, filtered, extended, and held to its promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from embedkit import EmbeddingSpec, EvaluationError, Index, Store, StoreFormatError
from embedkit.index import searching
from embedkit.index.coarse import expected_bytes
from embedkit.index.exact import Gallery
from embedkit.index.families import list_factories
from embedkit.store import StoreWriter

Array = npt.NDArray[np.float32]

FACTORIES = [
    "HNSW16", "HNSW16_SQ8", "IVF16,Flat", "IVF16_HNSW32,Flat", "PCA16,IVF16,PQ8x4fs", "OPQ8_32,IVF16,PQ16x4fs", "SQ8",
    "SQ4", "PQ8x4", "PQ8x4fs", "LSH", "ITQ,LSH", "L2norm,Flat", "RaBitQ", "IVF16,RaBitQfs", "RR16,IVF16,SQ4",
    "IVF16,PQ8x4fs,RFlat", "PQ8x4fs,Refine(SQ8)", "IMI2x4,Flat", "Pad64,Flat", "IVF16,PQ8x4fsr",
]  # fmt: skip


def make_store(path: Path, embeddings: Array, ids: list[str] | None = None) -> Store:
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=embeddings.shape[1])
    path.unlink(missing_ok=True)
    with StoreWriter(path, spec) as writer:
        writer.append(embeddings, ids or [f"{row:06}.jpg" for row in range(len(embeddings))])
        writer.finalise()
    return Store.open(path)


class Mixture:
    """Points around centres of very different weights, as photographs of many subjects are."""

    def __init__(self, dim: int, centres: int = 200, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.centres = self.random.standard_normal((centres, dim)) * 1.2
        self.weights = self.random.dirichlet(np.full(centres, 0.5))

    def draw(self, n: int) -> Array:
        chosen = self.random.choice(len(self.centres), n, p=self.weights)
        noise = self.random.standard_normal((n, self.centres.shape[1])) * 0.5
        return (self.centres[chosen] + noise).astype(np.float32)


def share_found(index: Index, exact: Index, queries: Array, where: Any = None) -> float:
    """Recall by score, so that ties count."""
    ours, theirs = (one.search(queries, k=10, where=where).scores for one in (index, exact))
    worst = theirs[:, -1:]
    return float((ours <= worst if index.metric == "l2" else ours >= worst).mean())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("small") / "s.h5", Mixture(32, 40).draw(3000))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Array]:
    """A store of 20,000 rows, and queries from the same mixture that are not in it."""
    mixture = Mixture(48)
    return make_store(tmp_path_factory.mktemp("large") / "s.h5", mixture.draw(20_000)), mixture.draw(2000)


def test_every_family_that_is_tried_can_be_built() -> None:
    for n in (1000, 20_000, 5_000_000):
        for dim in (8, 31, 64, 200, 1280):
            for metric in ("cosine", "ip", "l2"):
                factories = list_factories(n, dim, metric)
                assert len(set(factories)) == len(factories) > 2
                for name in factories:
                    assert faiss.index_factory(dim, name).d == dim
                    assert not (metric == "ip" and "PCA" in name)


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_factory_is_searched_filtered_updated_and_opened(
    small: Store, factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "FEW_ROWS", 20)  # So that filters reach FAISS.
    path, vectors = tmp_path / "s.h5", small.load()
    index = Index.build(make_store(path, vectors[:2000]), factory)
    assert index.factory == factory and [one.factory for one in index.measurements] == ["Flat", factory]
    queries, keep = vectors[1000:1030], np.arange(2000) % 4 == 1
    found = index.search(queries, k=10)
    scores = Gallery(index.store).scores(Gallery(index.store).placed(queries), found.rows)
    assert found.scores.tobytes() == scores.tobytes()  # Of the store's own embeddings, however coarse the index is.
    assert (np.diff(found.scores) <= 0).all() and (found.rows[:, 0] == np.arange(1000, 1030)).mean() > 0.4
    filtered = index.search(queries, k=10, where=keep)
    assert keep[filtered.rows].all() and filtered.rows.shape == (30, 10)
    few = index.search(queries, k=10, where=np.arange(5))
    assert (np.sort(few.rows, axis=1) == np.arange(5)).all()
    # Rows 0 to 499 go, rows 2000 to 2999 are new.
    make_store(path, vectors[500:], small.ids[500:])
    assert index.add() == 1000 and (index.missing, index.gone, len(index)) == (0, 500, 2500)
    after = index.search(vectors[[*range(500), *range(2400, 2500)]], k=10)
    assert ((after.rows >= 0) & (after.rows < 2500)).all()
    assert (after.rows[500:, 0] == np.arange(1900, 2000)).mean() > 0.4
    index.save(tmp_path / "i")
    again = Index.open(tmp_path / "i").search(vectors[::50], k=10)
    assert (again.rows == index.search(vectors[::50], k=10).rows).all()


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_every_family_of_the_choice_reaches_its_recall(small: Store, metric: str) -> None:
    queries = Mixture(32, 40, seed=0).draw(3300)[3000:]  # What the mixture of the store would have drawn next.
    exact = Index.build(small, metric=metric)
    for factory in list_factories(len(small), 32, metric):
        index = Index.build(small, factory, metric, recall=0.9)
        assert index.chosen is not None and index.chosen.ann_recall >= 0.9
        assert share_found(index, exact, queries) > 0.86, factory
        assert share_found(index, exact, queries, where=np.arange(3000) % 2 == 0) > 0.8, factory


@pytest.mark.parametrize("recall", [0.8, 0.95, 0.99])
def test_a_promised_recall_holds_on_queries_that_were_not_seen(large: tuple[Store, Array], recall: float) -> None:
    store, queries = large
    index = Index.build(store, recall=recall)
    assert index.chosen is not None and index.chosen.ann_recall >= recall
    assert index.measurements[0].factory == "Flat" and index.measurements[0].ann_recall == 1
    # Both are samples: 2,000 queries here, 1,000 there.
    assert share_found(index, Index.build(store), queries) > recall - 0.01


def test_limits_are_kept_or_the_error_lists_what_was_measured(large: tuple[Store, Array]) -> None:
    store, queries = large
    said: list[str] = []
    index = Index.build(store, recall=0.9, max_memory=20_000 * 40, max_latency=1.0, progress=said.append)
    assert index.chosen is not None and index.chosen.bytes_per_row * len(store) <= 20_000 * 40
    assert index.chosen.seconds <= 1 and share_found(index, Index.build(store), queries) > 0.88
    assert any("MB at most while it is built" in line for line in said)
    for wish, words in (
        ({"factory": "PCA2,IVF16,PQ1x4fs", "recall": 1.0}, "a recall of 1; measured"),
        ({"factory": "HNSW32", "recall": 0.5, "max_memory": 1000}, "a recall of 0.5 and 1,000 bytes"),
        ({"factory": "IVF64,Flat", "max_latency": 1e-9}, "1e-06 ms a query"),
    ):
        with pytest.raises(EvaluationError, match=words) as caught:
            Index.build(store, **wish)  # type: ignore[arg-type]
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == 2 and "Flat refine 1: recall@10 1.0000" in lines[0] and wish["factory"] in lines[1]
    with pytest.raises(EvaluationError, match=r"keeps to a recall of 0\.9 and 1e-06 ms a query; measured:\n  Flat"):
        Index.build(store, recall=0.9, max_latency=1e-9)


@pytest.mark.parametrize("n", [0, 1, 5, 50, 999])
def test_a_tiny_store_is_searched_exactly_whatever_the_wish(tmp_path: Path, n: int) -> None:
    store = make_store(tmp_path / "s.h5", Mixture(16).draw(n))
    index = Index.build(store, recall=0.99)
    assert index.factory == "Flat" and index.chosen is not None and index.chosen.ann_recall == 1
    assert index.search(np.ones(16), k=3).rows.shape == (1, min(3, n))
    index.save(tmp_path / "i")
    assert Index.open(tmp_path / "i").chosen == index.chosen
    if n < 20:
        with pytest.raises(EvaluationError, match=f"has {n} rows: too few to measure"):
            Index.build(store, "HNSW16", recall=0.9)
        assert len(Index.build(store, "HNSW16").search(np.ones(16), k=3)) == min(3, n)
    else:
        assert Index.build(store, "HNSW16").search(store.rows([3]), k=2).rows[0, 0] == 3


@pytest.mark.parametrize("kind", ["constant", "duplicates", "zeros"])
def test_rows_that_are_alike_are_no_obstacle(tmp_path: Path, kind: str) -> None:
    points = Mixture(16).draw(1200)
    vectors = {"constant": np.ones_like(points), "duplicates": points[np.arange(1200) % 30], "zeros": points * 0}[kind]
    index = Index.build(make_store(tmp_path / "s.h5", vectors), recall=0.9)
    assert index.chosen is not None and index.chosen.ann_recall >= 0.9
    best = index.search(points[:20], k=10)
    theirs = Index.build(index.store).search(points[:20], k=10)
    np.testing.assert_allclose(best.scores, theirs.scores, atol=1e-3 if kind != "duplicates" else 0.5)
    assert Index.build(index.store, "HNSW16").search(points[:3], k=40).rows.shape == (3, 40)


@pytest.mark.parametrize("factory", ["HNSW16", "Flat"])
def test_rows_that_are_not_finite_are_found_before_anything_is_built(tmp_path: Path, factory: str) -> None:
    vectors = Mixture(8).draw(1100)
    vectors[700, 3] = 77
    store = make_store(tmp_path / "s.h5", vectors)
    path = store.path
    path.write_bytes(path.read_bytes().replace(np.float32(77).tobytes(), np.float32("nan").tobytes()))
    with pytest.raises(StoreFormatError, match=r"s\.h5 has embeddings that are not finite"):
        Index.build(path, factory, recall=0.9)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Nonsense", "could not parse"), ("", "could not parse"), ("IDMap,Flat", "cannot add rows"),
        ("NSG16", "does not support incremental addition"), ("IVF4096,Flat", "cannot train"),
        ("PQ7x4fs", r"FAISS makes no index|cannot train"),
    ],
)  # fmt: skip
def test_a_factory_that_cannot_be_is_refused(small: Store, factory: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Index.build(small, factory)


@pytest.mark.parametrize("factory", ["IVF16,Flat", "PCA16,IVF16,PQ8x4fs", "RR16,IVF16,RaBitQfs"])
def test_a_seed_makes_the_same_index_again(small: Store, factory: str) -> None:
    first, again, other = (
        faiss.serialize_index(Index.build(small, factory, seed=seed)._coarse.index)  # type: ignore[union-attr]
        for seed in (3, 3, 4)
    )
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("whiten", [None, 12])
def test_an_index_of_whitened_embeddings_keeps_its_promise(large: tuple[Store, Array], whiten: int | None) -> None:
    store, queries = large
    index = Index.build(store, "HNSW16", recall=0.95, whiten=whiten, expansion=(5, 2.0))
    exact = Index.build(store, whiten=whiten, expansion=(5, 2.0))
    assert share_found(index, exact, queries[:500]) > 0.9


@pytest.mark.parametrize("factory", ["HNSW32", "IVF128,Flat", "PCA16,IVF128,PQ8x4fs", "IVF128,SQ8", "RaBitQ"])
def test_memory_is_told_before_building(large: tuple[Store, Array], factory: str) -> None:
    store, _ = large
    index = Index.build(store, factory)
    assert index._coarse is not None
    size, most = expected_bytes(index.gallery, factory, len(store))
    assert size == pytest.approx(index._coarse.count_bytes(), rel=0.25) and size < most


def test_k_of_many_candidates_is_searched_within_bounds(small: Store) -> None:
    index = Index.build(small, "IVF16,Flat", recall=0.9)
    exact = Index.build(small)
    queries = small.rows([1, 2, 3])
    for k in (700, 760, 3000, 5000):
        found = index.search(queries, k=k)
        assert found.rows.shape == (3, min(k, 3000)) and (found.rows >= 0).all()
        assert len(np.unique(found.rows[0])) == min(k, 3000)
    assert (index.search(queries, k=3000).rows == exact.search(queries, k=3000).rows).all()


def test_filters_work_beside_what_other_libraries_do_to_faiss(small: Store) -> None:
    code = (
        "import sys; import faiss.contrib.torch_utils; from embedkit import Index, Store;"
        "index = Index.build(Store.open(sys.argv[1]), 'IVF16,Flat', recall=0.9);"
        "print(index.search([500], k=1, where=range(300, 3000)).rows.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, small.path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[500]]"
