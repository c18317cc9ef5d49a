from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from embedkit import (
    Backbone,
    EmbeddingSpec,
    EvaluationError,
    Index,
    SpecMismatchError,
    Store,
    StoreFormatError,
    extract,
    list_images,
)
from embedkit.cli import main
from embedkit.index import retrieval
from embedkit.index.ranking import first_ranks, first_rows
from embedkit.index.retrieval import retrieval_report
from embedkit.store import StoreWriter

PAIRS = {
    "precision_at_1": "precision@1",
    "r_precision": "R-precision",
    "mean_average_precision_at_r": "mAP@R",
    "mean_reciprocal_rank": "MRR",
}


def make_store(
    path: Path,
    embeddings: Any,
    labels: Sequence[str | None] | None,
    ids: Sequence[str] | None = None,
    contents: Sequence[str] | None = None,
    backbone: str = "resnet18",
) -> Store:
    embeddings = np.asarray(embeddings, dtype=np.float32)
    ids = ids or [f"{path.stem}{row:05}.jpg" for row in range(len(embeddings))]
    hashes = [hashlib.sha256(text.encode()).digest() for text in contents or ids]
    spec = EmbeddingSpec(backbone=backbone, weights_sha256="ab" * 32, dim=embeddings.shape[1])
    with StoreWriter(path, spec) as writer:
        writer.append(embeddings, ids, labels=labels, content_sha256=hashes if contents != [] else None)
        writer.finalise()
    return Store.open(path)


def their_metrics(queries: Store, gallery: Store | None = None) -> dict[str, float]:
    """What pytorch-metric-learning finds, with a neighbour search by numpy in float64."""
    torch = pytest.importorskip("torch")
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")

    def nearest(query: Any, k: int, reference: Any, includes_query: bool) -> Any:
        left, right = (part.numpy().astype(np.float64) for part in (query, reference))
        scores = left @ right.T / np.linalg.norm(right, axis=1)
        if includes_query:
            np.fill_diagonal(scores, -np.inf)
        return None, torch.from_numpy(np.argsort(-scores, axis=1, kind="stable")[:, :k])

    found = calculator.AccuracyCalculator(include=tuple(PAIRS), device=torch.device("cpu"), knn_func=nearest)
    codes = [name_codes(queries)] + ([] if gallery is None else [name_codes(gallery)])
    arguments = [queries.load(), codes[0]] + ([] if gallery is None else [gallery.load(), codes[1]])
    return {PAIRS[name]: value for name, value in found.get_accuracy(*arguments).items()}


def name_codes(store: Store) -> Any:
    assert store.labels is not None
    return np.array([int(store.classes[code][1:]) for code in store.labels])


def random_store(path: Path, n: int, seed: int, c: int = 7) -> Store:
    random = np.random.default_rng(seed)
    codes = random.choice(c, n, p=random.dirichlet(np.full(c, 2.0)))
    centres = np.random.default_rng(99).standard_normal((9, 12))
    vectors = centres[codes] * 0.7 + random.standard_normal((n, 12))
    return make_store(path, vectors, [f"c{code}" for code in codes])


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_those_of_pytorch_metric_learning(tmp_path: Path, seed: int) -> None:
    queries = random_store(tmp_path / "q.h5", 150, seed)
    gallery = random_store(tmp_path / "g.h5", 230, seed + 50, c=9)
    alone = retrieval_report(queries, exclude_self=True).metrics
    crossed = retrieval_report(queries, gallery).metrics
    for ours, theirs in ((alone, their_metrics(queries)), (crossed, their_metrics(queries, gallery))):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-7)
        assert theirs["mAP@R"] > 0.1  # There was something to find.


def test_metrics_of_photographs_equal_those_of_pytorch_metric_learning(
    flowers: Path, weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    names = sorted(path.name for path in flowers.iterdir() if path.is_dir())
    for number, name in enumerate(names):
        (folder / f"c{number}").mkdir(parents=True)
        for photo in sorted((flowers / name).glob("*.jpg"))[:60]:
            (folder / f"c{number}" / photo.name).symlink_to(photo)
    backbone = Backbone.load(weights / "tf_mobilenetv3_small_100.tf_in1k.json")
    store = extract(list_images(folder, follow_links=True), tmp_path / "photos.h5", backbone)
    assert len(store) == 60 * len(names) == 300
    half = np.arange(len(store)) % 2 == 0
    queries, gallery = store.select(tmp_path / "q.h5", half), store.select(tmp_path / "g.h5", ~half)
    for ours, theirs in (
        (retrieval_report(store, exclude_self=True), their_metrics(store)),
        (retrieval_report(queries, gallery), their_metrics(queries, gallery)),
    ):
        assert {name: ours.metrics[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
        assert theirs["precision@1"] > 0.7


def test_metrics_can_be_checked_by_eye(tmp_path: Path) -> None:
    # By angle: the query at 0 degrees finds a, b, a, b, a, the one at 90 degrees the reverse.
    angles = np.radians([10, 20, 30, 40, 50])
    gallery = make_store(tmp_path / "g.h5", np.stack([np.cos(angles), np.sin(angles)], 1), ["a", "b", "a", "b", "a"])
    queries = make_store(tmp_path / "q.h5", [[2, 0], [0, 3]], ["a", "b"])
    report = retrieval_report(queries, gallery, ks=[1, 2])
    a, b = report.per_class["a"], report.per_class["b"]
    assert a["recall@1"] == 1 and a["precision@2"] == 0.5 and a["MRR"] == 1
    assert a["R-precision"] == pytest.approx(2 / 3) and a["mAP@R"] == pytest.approx((1 + 2 / 3) / 3)
    assert b["recall@1"] == 0 and b["recall@2"] == 1 and b["MRR"] == 0.5
    assert b["R-precision"] == 0.5 and b["mAP@R"] == pytest.approx((1 / 2) / 2)
    assert (a["queries"], a["relevant"], b["relevant"]) == (1, 3, 2)
    assert report.metrics["mAP@R"] == pytest.approx((a["mAP@R"] + b["mAP@R"]) / 2)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_rankings_are_those_of_numpy_and_blocks_change_nothing(
    tmp_path: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = random_store(tmp_path / "s.h5", 300, 3)
    vectors, codes = store.load().astype(np.float64), store.labels
    assert codes is not None
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = {
        "cosine": unit @ unit.T,
        "ip": vectors @ vectors.T,
        "l2": -((vectors[:, None] - vectors[None]) ** 2).sum(2),
    }[metric]
    np.fill_diagonal(scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :-1]
    hits = codes[order] == codes[:, None]
    whole = retrieval_report(store, metric=metric, exclude_self=True, ks=(1, 4))
    assert whole.metrics["recall@4"] == pytest.approx(hits[:, :4].any(1).mean())
    assert whole.metrics["precision@4"] == pytest.approx(hits[:, :4].mean())
    assert whole.metrics["MRR"] == pytest.approx((1 / (hits.argmax(1) + 1)).mean())
    monkeypatch.setattr(retrieval, "BLOCK_QUERIES", 7)
    seen: list[tuple[int, int]] = []
    parts = retrieval_report(
        store, metric=metric, exclude_self=True, ks=(1, 4), progress=lambda done, total: seen.append((done, total))
    )
    assert parts.metrics == pytest.approx(whole.metrics, abs=1e-6)
    assert seen[0] == (0, 300) and seen[-1] == (300, 300) and len(seen) > 40


def test_equal_scores_rank_by_row() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(-3, 4, (40, 60)).astype(np.float32)
    scores[scores == 0] *= random.choice([-1, 1], (scores == 0).sum()).astype(np.float32)  # Zeros of both signs.
    expected = np.argsort(-scores, axis=1, kind="stable")
    for k in (1, 5, 59, 60):
        assert (first_rows(scores, k) == expected[:, :k]).all()
    relevant = random.random((40, 60)) < 0.1
    relevant[:, 7] = True
    ranked = np.take_along_axis(relevant, expected, axis=1)
    assert (first_ranks(scores, relevant) == ranked.argmax(axis=1) + 1).all()


def test_a_first_hit_beyond_the_ranks_that_are_kept_still_counts(tmp_path: Path) -> None:
    angles = np.radians(np.arange(1, 81))
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    gallery = make_store(tmp_path / "g.h5", vectors, ["other"] * 69 + ["own"] + ["other"] * 10)
    report = retrieval_report(make_store(tmp_path / "q.h5", [[1, 0]], ["own"]), gallery, ks=[1])
    assert report.metrics["MRR"] == pytest.approx(1 / 70) and report.metrics["mAP@R"] == 0


def test_whether_queries_find_themselves_has_to_be_said(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((6, 4))
    labels = ["a", "a", "a", "b", "b", "b"]
    store = make_store(tmp_path / "s.h5", vectors, labels)
    with pytest.raises(EvaluationError, match=r"the same 6 rows.*exclude_self=True"):
        retrieval_report(store)
    assert retrieval_report(store, exclude_self=False).metrics["recall@1"] == 1
    assert retrieval_report(store, exclude_self=True).metrics["recall@1"] < 1
    # Two of the files under other ids, and one id that stands for another file.
    ids = [store.ids[5], *(f"copy{row}.jpg" for row in range(5))]
    other = make_store(
        tmp_path / "o.h5", vectors[[0, 0, 1, 2, 3, 4]], labels, ids, ["new", *store.ids[:2], "x", "y", "z"]
    )
    with pytest.raises(EvaluationError, match=r"of 6 queries.* 1 have ids .* 2 are the same files"):
        retrieval_report(store, other)
    report = retrieval_report(store, other, exclude_self=True)
    assert report.inputs["excluded"] == 2 and report.inputs["shared_ids"] == 1 and report.inputs["shared_content"] == 2


def test_rows_without_hashes_are_themselves_by_id(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((4, 3))
    ids = ["1", "2", "3", "4"]
    queries = make_store(tmp_path / "q.h5", vectors, ["a", "a", "b", "b"], ids, [])
    gallery = make_store(tmp_path / "g.h5", vectors[::-1], ["a", "a", "b", "b"], ids, ["p", "q", "r", "s"])
    report = retrieval_report(queries, gallery, exclude_self=True)
    assert report.inputs["excluded"] == 4 and report.inputs["shared_content"] == 0


def test_classes_are_matched_by_name_and_lone_queries_are_left_out(tmp_path: Path) -> None:
    queries = make_store(tmp_path / "q.h5", np.eye(4), ["b", "only here", None, "a"])
    gallery = make_store(tmp_path / "g.h5", np.eye(4)[[3, 0, 1, 2]], ["a", "b", "only there", None])
    report = retrieval_report(queries, gallery, ks=[1])
    assert report.metrics["recall@1"] == 1 and set(report.per_class) == {"a", "b"}
    assert report.inputs["left_out"] == {"unlabelled": 1, "without_relevant": 1} and report.inputs["measured"] == 2
    lone = make_store(tmp_path / "l.h5", np.eye(3), ["x", "y", "z"])
    with pytest.raises(EvaluationError, match="3 are of classes of which"):
        retrieval_report(lone, exclude_self=True)
    nothing = make_store(tmp_path / "n.h5", np.empty((0, 3)), [])
    for first, second in ((lone, nothing), (nothing, lone), (nothing, nothing)):
        with pytest.raises(EvaluationError, match=r"can be measured|has no labels"):
            retrieval_report(first, second, exclude_self=True)


def test_k_beyond_the_gallery_counts_missing_rows_as_wrong(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.h5", np.eye(3) + 0.1, ["a", "a", "a"])
    report = retrieval_report(store, ks=[10], exclude_self=True)
    assert report.metrics["precision@10"] == pytest.approx(0.2) and report.metrics["recall@10"] == 1
    assert report.metrics["R-precision"] == 1


def test_an_index_is_measured_by_what_it_finds(tmp_path: Path) -> None:
    store = random_store(tmp_path / "s.h5", 200, 5)
    exact = retrieval_report(store, exclude_self=True, ks=(1, 5))
    by_index = retrieval_report(store, index=Index.build(store), exclude_self=True, ks=(1, 5))
    assert by_index.metrics == pytest.approx(exact.metrics, abs=1e-6)
    assert by_index.per_class.keys() == exact.per_class.keys()
    with pytest.raises(EvaluationError, match="the index is one of"):
        retrieval_report(store, random_store(tmp_path / "t.h5", 20, 6), index=Index.build(store))


def test_stores_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.h5", np.eye(2), ["a", "a"])
    with pytest.raises(SpecMismatchError, match="backbone"):
        retrieval_report(store, make_store(tmp_path / "t.h5", np.eye(2), ["a", "a"], backbone="resnet50"))
    with pytest.raises(EvaluationError, match="no labels"):
        retrieval_report(store, make_store(tmp_path / "u.h5", np.eye(2), None))
    with pytest.raises(ValueError, match="ks must be"):
        retrieval_report(store, ks=(0, 1), exclude_self=True)
    with pytest.raises(ValueError, match="no metric 'dot'"):
        retrieval_report(store, metric="dot", exclude_self=True)


def test_embeddings_that_are_not_finite_are_named(tmp_path: Path) -> None:
    vectors = np.ones((4, 2), dtype=np.float32)
    vectors[2, 0] = 77
    store = make_store(tmp_path / "s.h5", vectors, ["a"] * 4)
    raw = store.path.read_bytes()
    store.path.write_bytes(raw.replace(np.float32(77).tobytes(), np.float32("nan").tobytes()))
    with pytest.raises(StoreFormatError, match="not finite"):
        retrieval_report(store.path, exclude_self=True)


def test_the_command_prints_what_the_library_finds(tmp_path: Path) -> None:
    store = random_store(tmp_path / "s.h5", 90, 8)
    report = retrieval_report(store, ks=(1, 3), exclude_self=True)
    found = CliRunner().invoke(main, ["retrieve", str(store.path), "-k", "3,1", "--exclude-self", "--json"])
    assert found.exit_code == 0 and json.loads(found.stdout) == report.to_dict()
    text = CliRunner().invoke(main, ["retrieve", str(store.path), "--include-self"]).stdout
    assert "recall@10" in text and "--exclude-self leaves that out" in text and "c3 " in text
    refused = CliRunner().invoke(main, ["retrieve", str(store.path)])
    assert refused.exit_code == 1 and "--exclude-self" in refused.stderr
    assert CliRunner().invoke(main, ["retrieve", str(store.path), "-k", "1,x"]).exit_code == 2


def test_the_command_measures_an_index(tmp_path: Path) -> None:
    store = random_store(tmp_path / "s.h5", 90, 8)
    index = Index.build(store, metric="l2")
    index.save(tmp_path / "s.index")
    command = ["retrieve", str(store.path), "--index", str(tmp_path / "s.index"), "--exclude-self", "--json"]
    found = CliRunner().invoke(main, command)
    expected = retrieval_report(store, index=index, exclude_self=True).to_dict()
    assert found.exit_code == 0 and json.loads(found.stdout) == expected
    assert expected["inputs"]["metric"] == "l2"
    refused = CliRunner().invoke(main, [*command, "--metric", "ip"])
    assert refused.exit_code == 2 and "an index ranks by its own" in refused.stderr
