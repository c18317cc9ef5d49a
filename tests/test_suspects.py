"""Suspects: planted wrong labels are found, right ones are left alone, and what cannot be judged is named."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit import EmbeddingSpec, EvaluationError, Store
from embedkit.evaluation.splits import Part, whole_store
from embedkit.evaluation.suspects import find_suspects
from embedkit.store import StoreWriter


def part(path: Path, x: Any, names: list[str], contents: list[str] | None = None) -> Part:
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=x.shape[1])
    hashes = None if contents is None else [hashlib.sha256(text.encode()).digest() for text in contents]
    with StoreWriter(path, spec) as writer:
        ids = [f"{number:04}.jpg" for number in range(len(x))]
        writer.append(x.astype(np.float32), ids, labels=names, content_sha256=hashes)
        writer.finalise()
    return whole_store(Store.open(path))


def clusters(rows: int, c: int, seed: int = 0) -> tuple[Any, list[str]]:
    """Return rows around c far corners, and the names of the corners."""
    random = np.random.default_rng(seed)
    codes = np.arange(rows) % c
    return 4 * np.eye(c)[codes] + random.normal(size=(rows, c)) * 0.5, [f"class {code}" for code in codes]


@pytest.mark.parametrize("c", [2, 12])
def test_planted_wrong_labels_are_found_with_the_right_class(tmp_path: Path, c: int) -> None:
    x, names = clusters(20 * c, c)
    wrong = {7: "class 0", 8 + c: "class 1"}
    right = {row: names[row] for row in wrong}
    assert all(names[row] != wrong[row] for row in wrong)
    for row, name in wrong.items():
        names[row], x[row] = name, 4 * np.eye(c)[row % c]  # What its true class looks like, and no unusual one of it.
    found = find_suspects(part(tmp_path / "s.h5", x, names), C=0.1)
    assert {one.id: (one.given, one.suggested) for one in found.found} == {
        f"{row:04}.jpg": (wrong[row], right[row]) for row in wrong
    }
    assert all(one.probability > one.given_probability for one in found.found)
    assert found.judged == 20 * c and "look wrong" in found.to_text()


def test_clean_labels_are_not_suspected_and_C_is_chosen(tmp_path: Path) -> None:
    found = find_suspects(part(tmp_path / "s.h5", *clusters(60, 3)))
    assert found.found == [] and found.C > 0
    assert found.to_text().startswith("0 of 60 labels look wrong")


def test_a_copy_with_another_label_does_not_vouch_for_it(tmp_path: Path) -> None:
    x, names = clusters(60, 3)
    x[1], names[1] = x[0], "class 1"  # Row 1 is row 0 once more: class 0 is right.
    contents = ["same", "same", *map(str, range(58))]
    found = find_suspects(part(tmp_path / "s.h5", x, names, contents), C=100.0)
    assert [(one.id, one.suggested) for one in found.found] == [("0001.jpg", "class 0")]
    assert found.contradictions == [{"0000.jpg": "class 0", "0001.jpg": "class 1"}]
    assert "the same picture with different labels: 0000.jpg (class 0), 0001.jpg (class 1)" in found.to_text()


def test_classes_with_few_rows_are_named_and_neither_judged_nor_suggested(tmp_path: Path) -> None:
    x, names = clusters(60, 3)
    names[0] = names[3] = "rare\n"
    found = find_suspects(part(tmp_path / "s.h5", x, names), C=0.1)
    assert found.small_classes == {"rare\n": 2} and found.judged == 58 and found.found == []
    assert r"1 class with fewer than 5 rows, not judged: rare\n (2)" in found.to_text()


def test_what_cannot_be_judged_at_all_is_an_error(tmp_path: Path) -> None:
    x, names = clusters(8, 2)
    whole = part(tmp_path / "s.h5", x, names)
    with pytest.raises(EvaluationError, match="0 classes of 2 with 5 rows or more"):
        find_suspects(whole)
    with pytest.raises(EvaluationError, match="at least two folds, got 1"):
        find_suspects(whole, folds=1)


def test_the_order_of_rows_with_equal_labels_does_not_change_who_is_suspected(tmp_path: Path) -> None:
    x, names = clusters(90, 3, seed=3)
    names[10] = "class 0"
    first = find_suspects(part(tmp_path / "a.h5", x, names), C=0.1, seed=0)
    second = find_suspects(part(tmp_path / "b.h5", x, names), C=0.1, seed=1)
    assert [one.id for one in first.found] == [one.id for one in second.found] == ["0010.jpg"]


def test_copies_do_not_choose_the_penalty(tmp_path: Path) -> None:
    """Labels are noise, and every picture is there twice: a head that remembers the one knows the other."""
    random = np.random.default_rng(0)
    x, names = (
        np.repeat(random.normal(size=(200, 60)), 2, axis=0),
        np.repeat(random.choice(["a", "b"], 200), 2).tolist(),
    )
    contents = [str(row // 2) for row in range(400)]
    known = find_suspects(part(tmp_path / "known.h5", x, names, contents))
    unknown = find_suspects(part(tmp_path / "unknown.h5", x, names))
    assert known.C <= 1e-3 and unknown.C >= 10 * known.C
