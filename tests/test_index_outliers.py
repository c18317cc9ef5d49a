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

from embedkit import EmbeddingSpec, EvaluationError, Index, Store, StoreFormatError
from embedkit.cli import main
from embedkit.index import outliers
from embedkit.index.outliers import find_outliers, robust_z_scores
from embedkit.store import StoreWriter


def make_store(
    path: Path, embeddings: Any, labels: Sequence[str | None] | None = None, ids: Sequence[str] | None = None
) -> Store:
    embeddings = np.asarray(embeddings, dtype=np.float32)
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=embeddings.shape[1])
    with StoreWriter(path, spec, information={"root": "/photos"}) as writer:
        writer.append(embeddings, ids or [f"{row:05}.jpg" for row in range(len(embeddings))], labels=labels)
        writer.finalise()
    return Store.open(path)


def brute_force(vectors: np.ndarray, k: int) -> np.ndarray:
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    distances = 1 - unit @ unit.T
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, :k].mean(axis=1)


def test_distances_are_those_of_numpy_and_blocks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
    store = make_store(tmp_path / "s.h5", vectors)
    found = find_outliers(store, 7)
    expected = brute_force(vectors, 7)
    np.testing.assert_allclose(found.distances, expected[found.rows], atol=1e-6)
    assert (np.diff(found.distances) <= 0).all() and sorted(found.rows) == list(range(400))
    np.testing.assert_allclose(found.z_scores, robust_z_scores(expected)[found.rows], atol=1e-4)
    monkeypatch.setattr(outliers, "BLOCK_BYTES", 33 * 4 * 16)
    seen: list[tuple[int, int]] = []
    again = find_outliers(store, 7, progress=lambda done, total: seen.append((done, total)))
    assert again.rows.tolist() == found.rows.tolist() and again.nearest.tolist() == found.nearest.tolist()
    assert seen[0] == (0, 400) and seen[-1] == (400, 400) and seen == sorted(seen) and len(seen) > 13


def test_an_index_finds_the_same(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).standard_normal((150, 8)).astype(np.float32)
    store = make_store(tmp_path / "s.h5", vectors)
    found = find_outliers(store, 5, index=Index.build(store))
    np.testing.assert_allclose(found.distances, brute_force(vectors, 5)[found.rows], atol=1e-6)
    other = make_store(tmp_path / "t.h5", vectors[:20])
    with pytest.raises(EvaluationError, match="the index is one of"):
        find_outliers(other, index=Index.build(store))
    with pytest.raises(ValueError, match="within_class goes without"):
        find_outliers(store, within_class=True, index=Index.build(store))


def test_copies_are_near_and_a_row_is_not_its_own_neighbour(tmp_path: Path) -> None:
    # More copies than neighbours: a row must be left out even where it is not among what is found for it.
    vectors = np.concatenate([np.tile([1.0, 0, 0], (30, 1)), [[0, 1, 0], [0, 0.9, 0.5]]])
    found = find_outliers(make_store(tmp_path / "s.h5", vectors), 3)
    by_row = dict(zip(found.rows.tolist(), found.distances.tolist(), strict=True))
    assert all(by_row[row] == pytest.approx(0, abs=1e-6) for row in range(30))
    assert by_row[30] == pytest.approx((1 - 0.9 / np.hypot(0.9, 0.5) + 1 + 1) / 3, abs=1e-6)
    assert (found.rows != found.nearest).all()


def test_a_wrong_label_stands_out_within_its_class_only(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    vectors = np.repeat(np.eye(4)[:2], 40, axis=0) + random.standard_normal((80, 4)) * 0.05
    labels: list[str | None] = ["cat"] * 40 + ["dog"] * 40
    labels[10] = "dog"
    store = make_store(tmp_path / "s.h5", vectors, labels)
    within = find_outliers(store, 5, within_class=True)
    assert within.rows[0] == 10 and within.z_scores[0] > 50
    assert find_outliers(store, 5).rows[0] != 10
    first = next(within.top(1))
    assert (first.rank, first.id, first.label, first.path) == (1, "00010.jpg", "dog", Path("/photos/00010.jpg"))
    # Compared with dogs only.
    expected = brute_force(vectors[[10, *range(40, 80)]].astype(np.float32), 5)[0]
    assert first.distance == pytest.approx(expected, abs=1e-6)


def test_rows_without_anybody_to_compare_with_are_left_out(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.h5", np.eye(5), ["a", "a", "alone", None, "a"])
    assert sorted(find_outliers(store, within_class=True).rows) == [0, 1, 4]
    assert len(find_outliers(store)) == 5
    with pytest.raises(EvaluationError, match="no row of"):
        find_outliers(make_store(tmp_path / "one.h5", np.eye(1)))
    with pytest.raises(EvaluationError, match="no row of"):
        find_outliers(make_store(tmp_path / "none.h5", np.empty((0, 4))))
    with pytest.raises(EvaluationError, match="has no labels"):
        find_outliers(make_store(tmp_path / "bare.h5", np.eye(3)), within_class=True)
    with pytest.raises(ValueError, match="k must be at least 1"):
        find_outliers(store, 0)


def test_a_zero_vector_is_far_from_everything(tmp_path: Path) -> None:
    found = find_outliers(make_store(tmp_path / "s.h5", [[1, 0], [1, 0.1], [0, 0], [1, 0.2]]), 2)
    assert found.rows[0] == 2 and found.distances[0] == 1


def test_scores_are_robust_and_never_divide_by_nothing() -> None:
    values = np.array([0.0, 1, 2, 3, 4, 1000])
    # Median 2.5, deviations 2.5 1.5 0.5 0.5 1.5 997.5, their median 1.5.
    assert robust_z_scores(values)[-1] == pytest.approx(997.5 / (1.4826 * 1.5))
    assert robust_z_scores(np.ones(5)).tolist() == [0] * 5
    mostly_equal = robust_z_scores(np.array([1.0, 1, 1, 1, 2]))
    assert np.isfinite(mostly_equal).all() and mostly_equal[-1] == pytest.approx(1 / (1.2533 * 0.2))


def test_embeddings_that_are_not_finite_are_named(tmp_path: Path) -> None:
    vectors = np.ones((4, 2), dtype=np.float32)
    vectors[2, 0] = 77
    path = make_store(tmp_path / "s.h5", vectors).path
    path.write_bytes(path.read_bytes().replace(np.float32(77).tobytes(), np.float32("nan").tobytes()))
    with pytest.raises(StoreFormatError, match="not finite"):
        find_outliers(path)


def test_the_command_prints_every_form(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).standard_normal((30, 4)) * 0.1 + [1, 0, 0, 0]
    vectors[4] = [-1, 0, 0, 0]
    ids = [f"{row:02},\n=1.jpg" for row in range(30)]
    path = str(make_store(tmp_path / "s.h5", vectors, ["a", "b"] * 15, ids).path)

    def run(*options: str) -> Any:
        result = CliRunner().invoke(main, ["outliers", path, *options])
        assert result.exit_code == 0, result.output
        return result

    table = run("--top", "2")
    assert table.stdout.splitlines()[1].split()[0] == "1" and r"04,\n=1.jpg" in table.stdout.splitlines()[1]
    assert len(table.stdout.splitlines()) == 3 and "of 30 images have a z above 3.5" in table.stderr
    lines = [json.loads(line) for line in run("--json", "--top", "0").stdout.splitlines()]
    assert len(lines) == 30 and lines[0]["id"] == ids[4] and lines[0]["z_score"] > 3.5
    rows = list(csv.DictReader(io.StringIO(run("--csv", "--by-class").stdout, newline="")))
    assert len(rows) == 20 and rows[0]["id"] == ids[4] and rows[0]["label"] == "a"
    assert run("--plain", "--top", "1").stdout_bytes == f"/photos/{ids[4]}\n".encode()
    assert CliRunner().invoke(main, ["outliers", path, "--json", "--plain"]).exit_code == 2


def test_outliers_say_in_a_line_what_they_are(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.h5", np.eye(4), ["a", "a", "b", "b"])
    assert repr(find_outliers(store, 2)) == f"<Outliers of {store.path}: 4 images, by 2 neighbours of the store>"
    by_class = find_outliers(store, 2, within_class=True)
    assert repr(by_class) == f"<Outliers of {store.path}: 4 images, by 2 neighbours of its class>"
