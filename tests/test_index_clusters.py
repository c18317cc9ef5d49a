from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_limits

from embedkit import EmbeddingSpec, EvaluationError, Store, StoreFormatError
from embedkit.cli import main
from embedkit.index import clusters
from embedkit.index.clusters import cluster
from embedkit.store import StoreWriter


def make_store(path: Path, embeddings: Any, labels: Sequence[str | None] | None = None) -> Store:
    embeddings = np.asarray(embeddings, dtype=np.float32)
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=embeddings.shape[1])
    with StoreWriter(path, spec) as writer:
        writer.append(embeddings, [f"{row:05}.jpg" for row in range(len(embeddings))], labels=labels)
        writer.finalise()
    return Store.open(path)


def planted(path: Path, k: int, n: int, *, noise: float = 0.03, d: int = 24) -> Store:
    """n rows around k directions, of any length, labelled by their direction."""
    random = np.random.default_rng(k)
    codes = random.integers(0, k, n)
    vectors = random.standard_normal((k, d))[codes] / np.sqrt(d) + random.standard_normal((n, d)) * noise
    return make_store(path, vectors * random.uniform(0.5, 20, (n, 1)), [f"c{code}" for code in codes])


@pytest.mark.parametrize("k", [3, 7, 37, 73])
def test_auto_finds_the_planted_number(tmp_path: Path, k: int) -> None:
    found = cluster(planted(tmp_path / "s.h5", k, 4000))
    assert len(found) == k and found.purity == 1 and found.nmi == pytest.approx(1)
    assert k in [candidate.k for candidate in found.candidates]


def test_a_given_number_is_kept_and_agrees_with_scikit_learn(tmp_path: Path) -> None:
    store = planted(tmp_path / "s.h5", 6, 900, noise=0.3)
    found = cluster(store, 10)
    assert store.labels is not None
    assert len(found) == 10 and found.sizes.sum() == 900 and not found.candidates
    assert found.nmi == pytest.approx(normalized_mutual_info_score(store.labels, found.assignments))
    most = [np.bincount(store.labels[found.assignments == number]).max() for number in range(10)]
    assert found.purity == pytest.approx(sum(most) / 900) and 0.2 < found.purity < 1


def test_what_is_said_of_clusters_is_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = planted(tmp_path / "s.h5", 5, 500, noise=0.2)
    monkeypatch.setattr(clusters, "BLOCK_BYTES", 4 * 5 * 17)  # Blocks of 17 rows.
    seen: list[tuple[int, int]] = []
    found = cluster(store, 5, progress=lambda done, total: seen.append((done, total)))
    unit = store.load() / np.linalg.norm(store.load(), axis=1, keepdims=True)
    likeness = unit @ found.centres.T
    np.testing.assert_allclose(np.linalg.norm(found.centres, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found.similarities, likeness.max(1), atol=1e-5)
    assert (found.assignments == likeness.argmax(1)).mean() > 0.99
    assert (np.diff(found.sizes) <= 0).all() and (np.bincount(found.assignments) == found.sizes).all()
    for number, medoid in enumerate(found.medoids):
        rows = np.flatnonzero(found.assignments == number)
        assert medoid == rows[found.similarities[rows].argmax()]
        assert found.mean_similarities[number] == pytest.approx(found.similarities[rows].mean())
    assert seen[0] == (0, 500) and seen[-1] == (500, 500) and len(seen) == 31


def test_it_is_trained_on_a_sample_and_assigns_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = planted(tmp_path / "s.h5", 4, 3000)
    monkeypatch.setattr(clusters, "SAMPLE_BYTES", 200 * 4 * store.dim)
    trained: list[int] = []
    plain = clusters._centres

    def watched(vectors: Any, k: int, seed: int, *others: int) -> Any:
        trained.append(len(vectors))
        return plain(vectors, k, seed, *others)

    monkeypatch.setattr(clusters, "_centres", watched)
    found = cluster(store, 4)
    assert trained == [200] and len(found.assignments) == 3000 and found.purity == 1


def test_few_different_rows_give_few_clusters(tmp_path: Path) -> None:
    copies = make_store(tmp_path / "s.h5", np.repeat(np.eye(3), [5, 4, 3], axis=0))
    found = cluster(copies, 8)
    assert found.sizes.tolist() == [5, 4, 3] and found.medoids.tolist() == [0, 5, 9]
    assert found.purity is None and found.nmi is None
    same = make_store(tmp_path / "t.h5", np.ones((50, 4)))
    assert cluster(same).sizes.tolist() == [50] and cluster(same, 50).sizes.tolist() == [50]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 45])
def test_small_stores_are_clustered_too(tmp_path: Path, n: int) -> None:
    store = make_store(tmp_path / "s.h5", np.random.default_rng(0).standard_normal((n, 3)))
    assert cluster(store).sizes.sum() == n
    assert cluster(store, n).sizes.tolist() == [1] * n  # As many clusters as rows.
    assert cluster(store, 1).sizes.tolist() == [n]


def test_zero_vectors_are_like_nothing(tmp_path: Path) -> None:
    vectors = np.concatenate([np.repeat(np.eye(2), 5, axis=0), np.zeros((2, 2))])
    found = cluster(make_store(tmp_path / "s.h5", vectors), 2)
    assert found.similarities[10:].tolist() == [0, 0] and np.isfinite(found.centres).all()


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.h5", np.eye(3))
    for k in (0, 4, -1, "many", True, 2.0):
        with pytest.raises(EvaluationError, match='k must be "auto" or a number from 1 to the 3 rows'):
            cluster(store, k)  # type: ignore[arg-type]
    vectors = np.ones((4, 2), dtype=np.float32)
    vectors[2, 0] = 77
    path = make_store(tmp_path / "n.h5", vectors).path
    path.write_bytes(path.read_bytes().replace(np.float32(77).tobytes(), np.float32("nan").tobytes()))
    with pytest.raises(StoreFormatError, match="not finite"):
        cluster(path, 2)


def test_more_clusters_than_are_ever_chosen_can_be_asked_for(tmp_path: Path) -> None:
    store = planted(tmp_path / "s.h5", 300, 1500, d=64)
    found = cluster(store, 300)
    # No seeds are searched for so many, so that not all of the planted ones are found.
    assert 270 <= len(found) <= 300 and found.purity is not None and found.purity > 0.85
    assert (cluster(store, 300).assignments == found.assignments).all()


def test_an_empty_store_has_no_clusters(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="is empty"):
        cluster(make_store(tmp_path / "s.h5", np.empty((0, 4)), []))


def test_only_labelled_rows_count_for_purity(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.h5", np.repeat(np.eye(2), 3, axis=0), ["a", "a", None, "b", None, None])
    assert cluster(store, 2).purity == 1 and cluster(store, 1).purity == pytest.approx(2 / 3)


def test_a_seed_gives_the_same_clusters_with_one_thread_and_two(tmp_path: Path) -> None:
    path = planted(tmp_path / "s.h5", 12, 4000, noise=0.25, d=96).path
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(cluster(path, 12, seed=3))
    assert (found[0].assignments == found[1].assignments).all() and (found[0].medoids == found[1].medoids).all()
    assert (cluster(path, 12, seed=3).assignments == cluster(path, 12, seed=3).assignments).all()
    assert (cluster(path, 12, seed=3).assignments != cluster(path, 12, seed=4).assignments).any()


def test_the_command_prints_every_form(tmp_path: Path) -> None:
    store = planted(tmp_path / "s.h5", 3, 300)
    found = cluster(store)
    result = CliRunner().invoke(main, ["cluster", str(store.path)])
    assert result.exit_code == 0 and "3 clusters of 300 images" in result.stdout and "purity 1.0000" in result.stdout
    assert store.ids[found.medoids[0]] in result.stdout
    values = json.loads(CliRunner().invoke(main, ["cluster", str(store.path), "-k", "3", "--json"]).stdout)
    assert [one["size"] for one in values["clusters"]] == found.sizes.tolist() and values["k"] == 3
    assert values["clusters"][0]["label_share"] == 1
    text = CliRunner().invoke(main, ["cluster", str(store.path), "--csv"]).stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["cluster"]) for row in rows] == found.assignments.tolist()
    assert [row["id"] for row in rows] == store.ids
    for options in (["-k", "0"], ["-k", "some"], ["-k", "301"], ["--json", "--csv"]):
        assert CliRunner().invoke(main, ["cluster", str(store.path), *options]).exit_code == 2


def test_one_cluster_is_not_clusters(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.h5", np.eye(4)[:1])
    assert repr(cluster(store, 1)) == f"<Clusters of {store.path}: 1 cluster of 1 image, seed 0>"
    assert "1 cluster of 1 image, seed 0" in CliRunner().invoke(main, ["cluster", str(store.path)]).stdout
