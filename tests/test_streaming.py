"""Streaming: training rows that stay in their store give the numbers of those that are held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedkit import EmbeddingSpec, EvaluationError, probe
from embedkit.evaluation import streaming
from embedkit.evaluation.splits import Part
from embedkit.store import Store, StoreWriter

CLASSES = ("daisy", "rose", "tulip")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    random = np.random.default_rng(0)
    codes = np.arange(900) % 3
    x = (random.normal(size=(3, 8))[codes] + random.normal(size=(900, 8))).astype(np.float32)
    with StoreWriter(tmp_path / "s.h5", EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=8)) as writer:
        writer.append(x, [f"{row:03}.jpg" for row in range(900)], labels=[CLASSES[code] for code in codes])
        writer.finalise()
    return Store.open(tmp_path / "s.h5")


@pytest.fixture
def split(tmp_path: Path) -> Path:
    lines = [f"{row:03}.jpg,{'test' if row % 7 == 3 else 'train'}" for row in range(900)]
    (tmp_path / "split.csv").write_text("path,split\n" + "\n".join(lines) + "\n")
    return tmp_path / "split.csv"


@pytest.mark.parametrize("head", streaming.STREAMED)
def test_rows_that_stay_in_the_store_give_the_same_report(
    store: Store, split: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = probe(store, split=split, head=head)
    monkeypatch.setattr(streaming, "MEMORY_BYTES", 0)
    monkeypatch.setattr(streaming, "BLOCK", 100)
    read: list[int] = []
    embeddings = Part.embeddings
    monkeypatch.setattr(Part, "embeddings", lambda part: (read.append(len(part.rows)), embeddings(part))[1])
    streamed = probe(store, split=split, head=head)
    # The test rows, and blocks of training rows; of ridge also those of its sweep, of which there are few here.
    assert len(read) > 8 and sorted(read)[len(read) // 2] == 100
    assert streamed.metrics == held.metrics and streamed.parameters == held.parameters
    for name in ("predicted", "knn", "true"):
        np.testing.assert_array_equal(streamed.predictions[name], held.predictions[name])
    np.testing.assert_allclose(
        streamed.head.decision_function(store.load()), held.head.decision_function(store.load()), rtol=1e-3, atol=1e-4
    )


def test_what_needs_all_rows_holds_them(store: Store, split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MEMORY_BYTES", 0)
    for arguments in ({"shots": 3, "head": "mean"}, {"folds": 2, "head": "ridge"}, {"head": "lda"}):
        place = {} if "folds" in arguments else {"split": split}
        assert probe(store, **place, **arguments).metrics["top1"] > 0.4  # type: ignore[arg-type]


def test_rows_that_are_not_finite_are_named_when_they_stream_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "MEMORY_BYTES", 0)
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    x[4, 0] = 12345
    with StoreWriter(tmp_path / "s.h5", EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)) as writer:
        writer.append(x, [f"{row:03}.jpg" for row in range(20)], labels=["a", "b"] * 10)
        writer.finalise()
    data = (tmp_path / "s.h5").read_bytes().replace(np.float32(12345).tobytes(), np.float32(np.nan).tobytes())
    (tmp_path / "broken.h5").write_bytes(data)
    with pytest.raises(EvaluationError, match=r"broken.h5: 1 embeddings have values that are not finite.*'004.jpg'"):
        probe(tmp_path / "broken.h5", tmp_path / "s.h5", head="mean")
