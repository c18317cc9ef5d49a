"""Stores as data frames and Arrow tables."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from embedkit import EmbeddingSpec, MissingExtraError, Store
from embedkit.store import StoreWriter


@pytest.fixture
def store(tmp_path: Path) -> Store:
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    with StoreWriter(tmp_path / "s.h5", spec) as writer:
        writer.append(
            [[1, 2], [3, 4]], ["b", "a"], sizes=[10, 20], mtimes_ns=[10**9, 2 * 10**9], labels=["cat", None],
            content_sha256=[b"b" * 32, b"a" * 32],
        )  # fmt: skip
        writer.finalise()
    return Store.open(tmp_path / "s.h5")


def test_pandas_has_a_row_for_each_id(store: Store) -> None:
    pandas = pytest.importorskip("pandas")
    frame = store.to_pandas()
    assert frame.index.tolist() == ["a", "b"] and frame.index.name == "id"
    assert frame.loc["b", "label"] == "cat" and pandas.isna(frame.loc["a", "label"])
    assert frame["size"].tolist() == [20, 10] and frame.loc["a", "modified"] == pandas.Timestamp(2, unit="s", tz="UTC")
    assert frame.loc["a", "content_sha256"] == (b"a" * 32).hex()
    wide = store.to_pandas(embeddings=True)
    assert np.array_equal(wide[["e0", "e1"]].to_numpy(), store.embeddings)


def test_arrow_has_embeddings_and_provenance(store: Store) -> None:
    pytest.importorskip("pyarrow")
    table = store.to_arrow()
    assert table.column("id").to_pylist() == ["a", "b"] and table.column("label").to_pylist() == [None, "cat"]
    assert table.column("embedding").to_pylist() == [[3, 4], [1, 2]]
    assert b"resnet18" in table.schema.metadata[b"embedkit"]


def test_a_missing_package_is_named_with_its_extra(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pandas", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'embedkit\[pandas\]'"):
        store.to_pandas()
    with pytest.raises(MissingExtraError, match=r"pip install 'embedkit\[parquet\]'"):
        store.to_arrow()
