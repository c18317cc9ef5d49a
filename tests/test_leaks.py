"""Leaks: pictures on both sides of a split are found, counted and left out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from embedkit import EmbeddingSpec, Store
from embedkit.evaluation.leaks import find_leaks
from embedkit.evaluation.splits import Part, whole_store
from embedkit.store import StoreWriter


def part(path: Path, x: object, contents: list[str] | None = None, labels: list[str] | None = None) -> Part:
    rows = np.asarray(x, dtype=np.float32)
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=rows.shape[1])
    hashes = None if contents is None else [hashlib.sha256(text.encode()).digest() for text in contents]
    with StoreWriter(path, spec) as writer:
        ids = [f"{number:06}.jpg" for number in range(len(rows))]
        writer.append(rows, ids, content_sha256=hashes, labels=labels or ["cat"] * len(rows))
        writer.finalise()
    return whole_store(Store.open(path))


def test_files_of_the_same_bytes_are_exact_and_not_counted_twice(tmp_path: Path) -> None:
    train = part(tmp_path / "a.h5", [[1, 0], [0, 1], [0, 2]], ["x", "y", "y"])
    test = part(tmp_path / "b.h5", [[0, 1], [-1, 0]], ["y", "z"], ["dog", "dog"])
    found = find_leaks(train, test)
    assert (found.exact, found.near, found.drop.tolist(), found.test_rows.tolist()) == (2, 0, [1, 2], [0])
    assert [(one.train_id, one.test_id, one.exact) for one in found.pairs] == [
        ("000001.jpg", "000000.jpg", True), ("000002.jpg", "000000.jpg", True),
    ]  # fmt: skip
    assert "'dog' and 'cat'" in found.to_text()


def test_lookalikes_equal_brute_force_across_blocks(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2100, 9)).astype(np.float32), random.normal(size=(23, 9)).astype(np.float32)
    seen: list[tuple[int, int]] = []
    found = find_leaks(
        part(tmp_path / "a.h5", x), part(tmp_path / "b.h5", y), threshold=0.9,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y)]
    cosines = unit[0] @ unit[1].T
    rows, others = np.nonzero(cosines >= 0.9)
    assert 10 < found.near == len(rows) < 1000
    assert found.drop.tolist() == sorted(set(rows.tolist()))
    assert found.test_rows.tolist() == sorted(set(others.tolist()))
    assert [pair.similarity for pair in found.pairs] == pytest.approx(sorted(cosines[rows, others], reverse=True))
    assert seen[-1] == (23, 23)


def test_parts_of_one_store_are_told_in_their_own_positions(tmp_path: Path) -> None:
    both = part(tmp_path / "a.h5", [[9, 0, 0], [0, 1, 0], [0, 0, 0], [2, 0, 0], [0, 0, 1], [1, 0.01, 0]])
    train, test = both.take(np.array([1, 2, 3])), both.take(np.array([4, 5]))
    found = find_leaks(train, test)
    assert (found.drop.tolist(), found.test_rows.tolist(), found.near) == ([2], [1], 1)
    assert [(pair.train_id, pair.test_id) for pair in found.pairs] == [("000003.jpg", "000005.jpg")]


def test_what_has_no_bytes_or_no_length_is_like_nothing(tmp_path: Path) -> None:
    # Rows of arrays have no hash: zeros stand for it, and are not the same picture.
    rows = [[0, 0], [0, 0], [1, 0]]
    found = find_leaks(part(tmp_path / "a.h5", rows), part(tmp_path / "b.h5", rows))
    assert (found.exact, found.near, found.drop.tolist()) == (0, 1, [2])


def test_without_a_threshold_only_bytes_count(tmp_path: Path) -> None:
    train, test = part(tmp_path / "a.h5", [[1, 0]], ["x"]), part(tmp_path / "b.h5", [[1, 0]], ["y"])
    assert find_leaks(train, test, threshold=None).to_text().startswith("no picture of the test part is in train")
    assert find_leaks(train, test).near == 1
    with pytest.raises(ValueError, match=r"above 0 and at most 1, got 1\.5"):
        find_leaks(train, test, threshold=1.5)


def test_many_pairs_are_counted_and_some_are_listed(tmp_path: Path) -> None:
    grey = np.ones((60, 2))
    train, test = part(tmp_path / "a.h5", grey, ["grey"] * 60), part(tmp_path / "b.h5", grey[:50], ["grey"] * 50)
    found = find_leaks(train, test)
    assert (found.exact, len(found.pairs), len(found.drop)) == (3000, 1000, 60)
    assert found.summary()["exact_pairs"] == 3000 and len(found.summary()["pairs"]) == 20
    assert found.to_text().endswith("and 2,990 more")
