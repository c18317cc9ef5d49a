from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from embedkit import EmbeddingSpec, MissingExtraError, Store, StoreExistsError, StoreFormatError
from embedkit.spec import canonical_json
from embedkit.store import StoreWriter
from embedkit.store.assembling import Content, Gather, Header, write_store
from embedkit.store.exporting import export

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=3)
IDS = ["=plain.jpg", "dir/é.jpg", "line\nbreak.jpg", "with space.jpg", "😀.png"]
SUFFIXES = [".parquet", ".npy", ".safetensors", ".csv", ".lance"]


def write(path: Path, ids: list[str], **columns: Any) -> Store:
    embeddings = np.random.default_rng(len(ids)).standard_normal((len(ids), 3), dtype=np.float32)
    with StoreWriter(path, SPEC, information={"root": "/data"}) as writer:
        writer.append(embeddings, ids, **columns)
        writer.finalise()
    return Store.open(path)


def labelled(path: Path) -> Store:
    return write(
        path, IDS, labels=["b", "a", None, "b", "é"], sizes=[2**40, 2, 3, 4, 5], mtimes_ns=[-1, 2, 3, 4, 5],
        content_sha256=[bytes([row] * 32) for row in range(5)],
    )  # fmt: skip


def layered(path: Path) -> Store:
    main = write(path.with_name("main.h5"), IDS)
    deep = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2, pool="deep")
    with StoreWriter(path.with_name("deep.h5"), deep) as writer:
        writer.append(np.arange(10).reshape(5, 2), IDS)
        writer.finalise()
    first, rows = np.zeros(5, dtype=np.int64), np.arange(5)
    embeddings = Gather([main.matrices[""]], first, rows, 3)
    layer = Gather([Store.open(path.with_name("deep.h5")).matrices[""]], first, rows, 2)
    content = Content(main.images, main.failed, None, [], embeddings, {"deep": layer})
    write_store(path, Header(SPEC, "run", "2026", {"deep": deep}, {"recipe": {"pool": "default"}}), content)
    return Store.open(path)


def names(store: Store) -> list[str | None]:
    assert store.labels is not None
    return [store.classes[code] if code >= 0 else None for code in store.labels]


def needs(suffix: str) -> None:
    if suffix in (".parquet", ".lance"):
        pytest.importorskip("pyarrow")
    if suffix == ".lance":
        pytest.importorskip("lance")


def test_parquet_has_every_column_of_the_store(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    store = labelled(tmp_path / "s.h5")
    assert export(store, tmp_path / "s.parquet") == [tmp_path / "s.parquet"]
    table = parquet.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["id", "label", "size", "mtime_ns", "content_sha256", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    assert table.schema.field("content_sha256").type == pa.binary(32)
    assert table["id"].to_pylist() == store.ids
    assert table["label"].to_pylist() == names(store)
    assert table["size"].to_pylist() == store.images.sizes.tolist()
    assert table["mtime_ns"].to_pylist() == store.images.mtimes_ns.tolist()
    assert table["content_sha256"].to_pylist() == [row.tobytes() for row in store.content_sha256]
    assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype=np.float32), store.embeddings)


def test_parquet_has_the_provenance_in_its_metadata(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    store = labelled(tmp_path / "s.h5")
    export(store, tmp_path / "s.parquet")
    metadata = parquet.read_schema(tmp_path / "s.parquet").metadata
    assert metadata[b"embedkit"].decode() == canonical_json(store.provenance)


def test_parquet_of_a_store_without_labels_has_no_label_column(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    export(write(tmp_path / "s.h5", IDS), tmp_path / "s.parquet")
    assert "label" not in parquet.read_schema(tmp_path / "s.parquet").names


def test_parquet_row_groups_stay_below_their_bound(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    store = write(tmp_path / "s.h5", [f"{row:06}" for row in range(70_000)])
    export(store, tmp_path / "s.parquet")
    with parquet.ParquetFile(tmp_path / "s.parquet") as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    assert rows == [65536, 70_000 - 65536]


def test_npy_is_an_array_with_its_columns_beside_it(tmp_path: Path) -> None:
    store = labelled(tmp_path / "s.h5")
    assert export(store, tmp_path / "s.npy") == [tmp_path / "s.npy", tmp_path / "s.json"]
    assert np.array_equal(np.load(tmp_path / "s.npy"), store.embeddings)
    notes = json.loads((tmp_path / "s.json").read_text())
    assert notes["format"] == "embedkit-npy" and notes["provenance"] == store.provenance
    assert notes["ids"] == store.ids and notes["classes"] == store.classes
    assert store.labels is not None and notes["labels"] == store.labels.tolist()
    assert notes["sizes"] == store.images.sizes.tolist() and notes["mtimes_ns"] == store.images.mtimes_ns.tolist()
    assert notes["content_sha256"] == [row.tobytes().hex() for row in store.content_sha256]


def test_npy_of_many_rows_is_written_in_blocks(tmp_path: Path) -> None:
    store = write(tmp_path / "s.h5", [f"{row:06}" for row in range(70_000)])
    calls: list[tuple[int, int]] = []
    export(store, tmp_path / "s.npy", progress=lambda done, total: calls.append((done, total)))
    assert np.array_equal(np.load(tmp_path / "s.npy"), store.embeddings)
    assert json.loads((tmp_path / "s.json").read_text())["ids"] == store.ids
    assert calls == [(65536, 70_000), (70_000, 70_000)]


def test_safetensors_reads_back_with_its_own_library(tmp_path: Path) -> None:
    store = labelled(tmp_path / "s.h5")
    export(store, tmp_path / "s.safetensors")
    tensors = load_file(tmp_path / "s.safetensors")
    assert set(tensors) == {"embeddings", "labels", "content_sha256", "sizes", "mtimes_ns", "ids"}
    assert np.array_equal(tensors["embeddings"], store.embeddings)
    assert np.array_equal(tensors["labels"], store.labels) and tensors["labels"].dtype == np.int32
    assert np.array_equal(tensors["content_sha256"], store.content_sha256)
    assert np.array_equal(tensors["sizes"], store.images.sizes)
    assert np.array_equal(tensors["mtimes_ns"], store.images.mtimes_ns)
    assert [row.tobytes().rstrip(b"\0").decode() for row in tensors["ids"]] == store.ids


def test_safetensors_has_provenance_and_classes_as_metadata(tmp_path: Path) -> None:
    from safetensors import safe_open

    store = labelled(tmp_path / "s.h5")
    export(store, tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert metadata == {"embedkit": canonical_json(store.provenance), "classes": json.dumps(store.classes)}


def test_csv_has_the_shortest_numbers_that_read_back(tmp_path: Path) -> None:
    store = labelled(tmp_path / "s.h5")
    export(store, tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "label", "e0", "e1", "e2"]
    assert [row[0] for row in rows] == store.ids
    assert [row[1] for row in rows] == [name or "" for name in names(store)]
    assert np.array_equal(np.array([row[2:] for row in rows], dtype=np.float32), store.embeddings)
    assert rows[0][2] == str(store.embeddings[0, 0])


def test_csv_keeps_the_bytes_of_ids_that_are_not_utf8(tmp_path: Path) -> None:
    export(write(tmp_path / "s.h5", ["broken\udcff.jpg"]), tmp_path / "s.csv")
    assert b"broken\xff.jpg" in (tmp_path / "s.csv").read_bytes()


def test_lance_has_the_same_columns_as_parquet(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    parquet = pytest.importorskip("pyarrow.parquet")
    store = labelled(tmp_path / "s.h5")
    export(store, tmp_path / "s.parquet")
    assert export(store, tmp_path / "s.lance") == [tmp_path / "s.lance"]
    assert lance.dataset(str(tmp_path / "s.lance")).to_table().equals(parquet.read_table(tmp_path / "s.parquet"))


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors", ".lance"])
def test_layers_are_exported_beside_the_embeddings(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    store = layered(tmp_path / "s.h5")
    export(store, tmp_path / f"s{suffix}")
    if suffix == ".safetensors":
        found = load_file(tmp_path / "s.safetensors")["layers/deep"]
    elif suffix == ".parquet":
        import pyarrow.parquet

        found = np.array(pyarrow.parquet.read_table(tmp_path / "s.parquet")["layer:deep"].to_pylist())
    else:
        import lance

        found = np.array(lance.dataset(str(tmp_path / "s.lance")).to_table()["layer:deep"].to_pylist())
    assert np.array_equal(found, Store.open(tmp_path / "s.h5", layer="deep").embeddings)


@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_formats_without_layers_say_so(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    export(layered(tmp_path / "s.h5"), tmp_path / f"s{suffix}")
    assert "does not hold the layers" in caplog.text and "deep" in caplog.text


def test_a_store_opened_with_a_layer_is_exported_as_that_layer(tmp_path: Path) -> None:
    layered(tmp_path / "s.h5")
    store = Store.open(tmp_path / "s.h5", layer="deep")
    export(store, tmp_path / "s.npy")
    assert np.array_equal(np.load(tmp_path / "s.npy"), store.embeddings)
    provenance = json.loads((tmp_path / "s.json").read_text())["provenance"]
    assert provenance["identity"] == store.spec.to_dict() and "layers" not in provenance


@pytest.mark.parametrize("suffix", [".parquet", ".lance"])
@pytest.mark.parametrize("where", ["id", "class"])
def test_arrow_formats_refuse_text_that_is_not_utf8(tmp_path: Path, suffix: str, where: str) -> None:
    needs(suffix)
    odd = "broken\udcff.jpg"
    store = write(tmp_path / "s.h5", [odd if where == "id" else "a.jpg"], labels=[odd if where == "class" else "a"])
    with pytest.raises(StoreFormatError, match=rf"{where} 'broken\\udcff.jpg'.*not UTF-8.*npy"):
        export(store, tmp_path / f"s{suffix}")
    assert os.listdir(tmp_path) == ["s.h5"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_store_is_exported(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    assert all(path.exists() for path in export(write(tmp_path / "s.h5", []), tmp_path / f"s{suffix}"))


def test_an_empty_safetensors_reads_back_with_its_own_library(tmp_path: Path) -> None:
    export(write(tmp_path / "s.h5", []), tmp_path / "s.safetensors")
    assert load_file(tmp_path / "s.safetensors")["embeddings"].shape == (0, 3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_existing_output_is_replaced_only_when_asked(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    few, many = write(tmp_path / "few.h5", IDS[:2]), write(tmp_path / "many.h5", IDS)
    export(few, tmp_path / f"s{suffix}")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(StoreExistsError, match="overwrite"):
        export(many, tmp_path / f"s{suffix}")
    export(many, tmp_path / f"s{suffix}", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == before
    if suffix == ".npy":
        assert len(np.load(tmp_path / "s.npy")) == len(IDS)


def test_a_json_file_of_another_purpose_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"timm_architecture": "resnet18"}')
    with pytest.raises(StoreExistsError, match="does not come from an export"):
        export(write(tmp_path / "s.h5", IDS), tmp_path / "s.npy", overwrite=True)
    assert not (tmp_path / "s.npy").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_of_another_purpose_is_never_replaced(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"s{suffix}").mkdir()
    with pytest.raises(StoreExistsError):
        export(write(tmp_path / "s.h5", IDS), tmp_path / f"s{suffix}", overwrite=True)


def test_a_store_is_not_replaced_by_its_own_export(tmp_path: Path) -> None:
    store = write(tmp_path / "s.npy", IDS)
    with pytest.raises(StoreExistsError, match="the store itself"):
        export(store, tmp_path / "s.npy", overwrite=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_interrupted_export_leaves_nothing_and_keeps_the_old_one(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    store = write(tmp_path / "s.h5", IDS)
    written = export(store, tmp_path / f"s{suffix}")
    before = {path: path.read_bytes() for path in written if path.is_file()}
    listing = sorted(os.listdir(tmp_path))

    def stop(done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises((RuntimeError, OSError), match="stop"):
        export(store, tmp_path / f"s{suffix}", overwrite=True, progress=stop)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(os.listdir(tmp_path)) == listing


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_followed(tmp_path: Path, suffix: str, there: bool) -> None:
    needs(suffix)
    store, real, link = write(tmp_path / "s.h5", IDS), tmp_path / "real" / f"r{suffix}", tmp_path / f"s{suffix}"
    real.parent.mkdir()
    link.symlink_to(real)
    if there:
        export(write(tmp_path / "few.h5", IDS[:2]), real)
    written = export(store, link, overwrite=there)
    assert link.is_symlink() and written[0] == real
    assert sorted(real.parent.iterdir()) == sorted(written)
    if suffix == ".npy":
        assert np.load(link).shape == (5, 3)


def test_an_unknown_suffix_lists_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match=r"\.parquet, \.npy, \.safetensors, \.csv, \.lance"):
        export(write(tmp_path / "s.h5", IDS), tmp_path / "s.pkl")


@pytest.mark.parametrize(
    ("suffix", "module", "extra"), [(".parquet", "pyarrow", "parquet"), (".lance", "lance", "lance")]
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str, extra: str
) -> None:
    store = write(tmp_path / "s.h5", IDS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"embedkit\[{extra}\]"):
        export(store, tmp_path / f"s{suffix}")
    assert os.listdir(tmp_path) == ["s.h5"]
