from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit import EmbeddingSpec, Store, StoreExistsError, StoreFormatError, StoreNotFoundError
from embedkit.store import StoreWriter
from embedkit.store.assembling import Content, Gather, Header, write_store
from embedkit.store.exporting import export
from embedkit.store.importing import import_embeddings

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=3)
IDS = ["dir/é.jpg", "line\nbreak.jpg", "plain.jpg", "with space.jpg", "😀.png"]
ROWS = np.random.default_rng(0).standard_normal((5, 3), dtype=np.float32)
OURS = [".npy", ".parquet", ".safetensors"]


def write(path: Path, ids: list[str], **columns: Any) -> Store:
    embeddings = np.random.default_rng(len(ids)).standard_normal((len(ids), 3), dtype=np.float32)
    with StoreWriter(path, SPEC, information={"root": "/data", "recipe": {"pool": "avg"}}) as writer:
        writer.append(embeddings, ids, **columns)
        writer.finalise()
    return Store.open(path)


def labelled(path: Path, ids: list[str]) -> Store:
    count = len(ids)
    return write(
        path, ids, labels=[["b", "a", None][row % 3] for row in range(count)], mtimes_ns=list(range(-1, count - 1)),
        sizes=[2**40 + row for row in range(count)], content_sha256=[bytes([row % 256] * 32) for row in range(count)],
    )  # fmt: skip


def npy(folder: Path, rows: Any = ROWS, name: str = "e.npy") -> Path:
    np.save(folder / name, rows)
    return folder / name


def txt(folder: Path, ids: list[str] | None = None) -> Path:
    ids = [f"{row}.jpg" for row in range(5)] if ids is None else ids
    (folder / "names.txt").write_bytes("".join(f"{id}\n" for id in ids).encode("utf-8", "surrogateescape"))
    return folder / "names.txt"


def parquet(path: Path, /, **columns: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)
    return path


def bring(source: Path, folder: Path, **options: Any) -> Store:
    return import_embeddings(source, folder / "imported.h5", **options)


def refused(source: Path, folder: Path, match: str, **options: Any) -> None:
    before = sorted(os.listdir(folder))
    with pytest.raises(StoreFormatError, match=match):
        bring(source, folder, **options)
    assert sorted(os.listdir(folder)) == before


def needs(suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")


# --- What we exported


@pytest.mark.parametrize("suffix", OURS)
@pytest.mark.parametrize("count", [0, 1, 5, 5000])
def test_an_export_becomes_the_store_that_it_was(tmp_path: Path, suffix: str, count: int) -> None:
    needs(suffix)
    store = labelled(tmp_path / "s.h5", IDS if count == 5 else [f"{row:05}.jpg" for row in range(count)])
    found = bring(export(store, tmp_path / f"s{suffix}")[0], tmp_path)
    assert found.content_id == store.content_id and found.spec == store.spec and found.ids == store.ids
    assert np.array_equal(found.embeddings, store.embeddings)
    assert np.array_equal(found.content_sha256, store.content_sha256)
    assert np.array_equal(found.images.sizes, store.images.sizes)
    assert np.array_equal(found.images.mtimes_ns, store.images.mtimes_ns)
    assert found.root == store.root and found.recipe == store.recipe


@pytest.mark.parametrize("suffix", OURS)
def test_a_store_without_labels_comes_back_without(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    store = write(tmp_path / "s.h5", IDS)
    found = bring(export(store, tmp_path / f"s{suffix}")[0], tmp_path)
    assert found.labels is None and found.content_id == store.content_id


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_ids_and_classes_that_are_not_utf8_come_back(tmp_path: Path, suffix: str) -> None:
    store = write(tmp_path / "s.h5", ["broken\udcff.jpg"], labels=["class\udcfe"])
    found = bring(export(store, tmp_path / f"s{suffix}")[0], tmp_path)
    assert (found.ids, found.classes) == (["broken\udcff.jpg"], ["class\udcfe"])
    assert found.content_id == store.content_id


@pytest.mark.parametrize("suffix", OURS)
@pytest.mark.parametrize("others", [[], ["a.jpg"]])
def test_a_folder_called_like_a_drive_comes_back(tmp_path: Path, suffix: str, others: list[str]) -> None:
    needs(suffix)
    store = write(tmp_path / "s.h5", ["C:/1.jpg", "C:/2.jpg", *others])
    found = bring(export(store, tmp_path / f"s{suffix}")[0], tmp_path)
    assert found.ids == store.ids and found.content_id == store.content_id and found.root == store.root


def test_an_altered_export_with_absolute_ids_is_refused(tmp_path: Path) -> None:
    source = export(write(tmp_path / "s.h5", ["dir/a.jpg"]), tmp_path / "s.npy")[0]
    notes = source.with_suffix(".json")
    notes.write_text(notes.read_text().replace("dir/a.jpg", "/etc/passwd"))
    refused(source, tmp_path, "row 0 has the id '/etc/passwd', which leads out of its folder")


@pytest.mark.parametrize("suffix", OURS)
def test_layers_are_left_out_with_a_warning(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    needs(suffix)
    main = write(tmp_path / "main.h5", IDS)
    gather = Gather([main.matrices[""]], np.zeros(5, dtype=np.int64), np.arange(5), 3)
    content = Content(main.images, main.failed, None, [], gather, {"deep": gather})
    write_store(tmp_path / "s.h5", Header(SPEC, "run", "2026", {"deep": SPEC}), content)
    source = export(Store.open(tmp_path / "s.h5"), tmp_path / f"s{suffix}")[0]
    caplog.clear()
    found = bring(source, tmp_path)
    assert found.layers == {} and found.content_id == main.content_id
    assert "layers, which are not imported: deep" in caplog.text


@pytest.mark.parametrize("suffix", OURS)
def test_an_export_needs_no_name_and_no_names(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    source = export(write(tmp_path / "s.h5", IDS), tmp_path / f"s{suffix}")[0]
    names = txt(tmp_path)
    refused(source, tmp_path, "leave out the name", name="mine")
    refused(source, tmp_path, "leave out the names", names=names)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"dim":3', '"dim":4', "width 4"),
        ('"backbone":', '"backbones":', "spec is incomplete"),
        ('"identity":', '"identities":', "no 'identity'"),
        ('"sizes": [', '"sizes": [0, ', "columns do not all have 5 rows"),
        ('"sizes": [0', '"sizes": [-1', "a size that no file has"),
        ('"sizes": [0', '"sizes": [0.5', "something else"),
        ('"mtimes_ns": [0', '"mtimes_ns": [9223372036854775808', "a time that no file has"),
        ('"content_sha256": ["00', '"content_sha256": ["', "not 32 bytes"),
        ('"labels": null', '"labels": [7, 0, 0, 0, 0]', "name no class"),
        ('"root":"/data"', '"root":NaN', "cannot be read"),
        ('"root":"/data"', '"root":"' + "x" * 70_000 + '"', "provenance has"),
        ('"ids": [', '"ids": [1.5, ', "not text"),
        ('"format": "embedkit-npy"', '"format": "embedkit-npy', "cannot be read"),
    ],
)
def test_altered_notes_are_refused(tmp_path: Path, old: str, new: str, match: str) -> None:
    source, notes = export(write(tmp_path / "s.h5", IDS), tmp_path / "s.npy")
    text = notes.read_text()
    assert old in text
    notes.write_text(text.replace(old, new, 1))
    refused(source, tmp_path, match)


# --- What others made


def test_an_array_with_names_is_of_unknown_provenance(tmp_path: Path) -> None:
    found = bring(npy(tmp_path), tmp_path, names=txt(tmp_path))
    assert np.array_equal(found.embeddings, ROWS) and found.ids == [f"{row}.jpg" for row in range(5)]
    assert (found.spec.backbone, found.spec.pool, found.spec.weights_sha256) == ("imported", "unknown", "0" * 64)
    assert found.information["imported_from"] == "e.npy" and found.information["provenance"] == "unknown"


def test_imports_of_one_name_may_be_compared_and_unnamed_ones_never(tmp_path: Path) -> None:
    one, two = npy(tmp_path, ROWS, "1.npy"), npy(tmp_path, ROWS + 1, "2.npy")
    names = txt(tmp_path)

    def digest(source: Path, name: str | None = None) -> str:
        return bring(source, tmp_path, names=names, name=name, overwrite=True).digest

    assert digest(one, "dino") == digest(two, "dino") != digest(one, "clip")
    assert digest(one) != digest(two)


def test_the_tag_of_an_unnamed_import_is_the_hash_of_its_numbers(tmp_path: Path) -> None:
    found = bring(npy(tmp_path, ROWS.astype(np.float64)), tmp_path, names=txt(tmp_path))
    assert found.spec.tag == f"unnamed-{hashlib.sha256(ROWS.tobytes()).hexdigest()[:16]}"


@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floats_of_every_format_and_order_become_float32(tmp_path: Path, dtype: str, order: Any) -> None:
    rows = np.asarray(np.random.default_rng(1).standard_normal((5000, 3)), dtype=dtype, order=order)
    found = bring(npy(tmp_path, rows), tmp_path, names=txt(tmp_path, [f"{row:05}" for row in range(5000)]))
    assert found.dtype == np.float32 and np.array_equal(found.embeddings, rows.astype(np.float32))


def test_progress_counts_both_passes_of_an_unnamed_import(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    bring(npy(tmp_path), tmp_path, names=txt(tmp_path), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 10), (10, 10)]


def test_an_array_without_names_asks_for_them(tmp_path: Path) -> None:
    refused(npy(tmp_path), tmp_path, "give a file of names")


def test_a_json_file_of_another_purpose_beside_an_array_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps([f"{row}.jpg" for row in range(5)]))
    assert len(bring(npy(tmp_path), tmp_path, names=tmp_path / "e.json")) == 5


def test_names_in_text_keep_bytes_that_are_not_utf8_and_lose_line_ends(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfa\xff.jpg\r\nb c.jpg\r\n\xf0\x9f\x98\x80\n1\n2")
    found = bring(npy(tmp_path), tmp_path, names=tmp_path / "names.txt")
    assert set(found.ids) == {"a\udcff.jpg", "b c.jpg", "😀", "1", "2"}


@pytest.mark.parametrize("column", ["id", "path", "image_path", "file_name", "filename"])
@pytest.mark.parametrize(("suffix", "comma"), [(".csv", ","), (".tsv", "\t")])
def test_names_in_a_table_bring_labels(tmp_path: Path, column: str, suffix: str, comma: str) -> None:
    lines = [["x", column, "label"], *([str(row), f"{row}.jpg", "ab"[row % 2] if row else ""] for row in range(5))]
    (tmp_path / f"n{suffix}").write_text("".join(comma.join(line) + "\n" for line in lines))
    found = bring(npy(tmp_path), tmp_path, names=tmp_path / f"n{suffix}")
    assert found.labels is not None and found.labels.tolist() == [-1, 1, 0, 1, 0] and found.classes == ["a", "b"]


def test_names_come_from_parquet(tmp_path: Path) -> None:
    names = parquet(tmp_path / "n.parquet", filename=[f"{row}.jpg" for row in range(5)], label=[*"abab", None])
    found = bring(npy(tmp_path), tmp_path, names=names)
    assert found.ids == [f"{row}.jpg" for row in range(5)] and found.class_counts() == {"a": 2, "b": 2}


def test_a_table_without_a_column_of_ids_is_refused(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("a,b\n1,2\n")
    refused(npy(tmp_path), tmp_path, r"n\.csv.*none of its columns \['a', 'b'\]", names=tmp_path / "n.csv")
    (tmp_path / "n.csv").write_text("")
    refused(npy(tmp_path), tmp_path, r"n\.csv.*none of its columns", names=tmp_path / "n.csv")


@pytest.mark.parametrize("text", ["{}", "[1.5]", '["a', '{"format": "embedkit-npy"}', "[" * 100_000])
def test_names_that_are_no_list_of_texts_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "n.json").write_text(text)
    refused(npy(tmp_path), tmp_path, r"n\.json", names=tmp_path / "n.json")


@pytest.mark.parametrize("rows", ["embeddings", "features", "arr_0"])
@pytest.mark.parametrize("ids", ["ids", "paths", "filenames", "names"])
def test_npz_holds_rows_and_ids(tmp_path: Path, rows: str, ids: str) -> None:
    np.savez_compressed(tmp_path / "e.npz", **{rows: ROWS, ids: np.array(IDS)})
    found = bring(tmp_path / "e.npz", tmp_path)
    assert found.ids == IDS and np.array_equal(found.embeddings, ROWS)
    assert sorted(os.listdir(tmp_path)) == ["e.npz", "imported.h5"]


def test_npz_may_be_transposed_and_have_ids_as_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", features=np.asfortranarray(ROWS), ids=np.array([os.fsencode(id) for id in IDS]))
    found = bring(tmp_path / "e.npz", tmp_path)
    assert found.ids == IDS and np.array_equal(found.embeddings, ROWS)


def test_npz_without_ids_takes_a_file_of_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", ROWS)
    refused(tmp_path / "e.npz", tmp_path, "ids, paths, filenames or names")
    assert len(bring(tmp_path / "e.npz", tmp_path, names=txt(tmp_path))) == 5


def test_npz_with_ids_that_need_unpickling_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", features=ROWS, ids=np.array(IDS, dtype=object))
    refused(tmp_path / "e.npz", tmp_path, "never unpickled")


def test_npz_that_unpacks_to_something_enormous_is_refused(tmp_path: Path) -> None:
    shape, zeros = (5, 60_000_000), bytes(1 << 20)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(tmp_path / "e.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        left = 4 * shape[0] * shape[1]
        while left:
            left -= file.write(zeros[:left])
    refused(tmp_path / "e.npz", tmp_path, "would unpack to 1,200,000,128", names=txt(tmp_path))


def test_npz_whose_sizes_do_not_agree_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", embeddings=ROWS, ids=np.array(IDS[:4]))
    refused(tmp_path / "e.npz", tmp_path, "expected 5 texts")
    np.savez(tmp_path / "e.npz", embeddings=ROWS, ids=np.array(["a", "", "b", "c", "d"]))
    refused(tmp_path / "e.npz", tmp_path, "empty texts")
    np.savez(tmp_path / "e.npz", other=ROWS)
    refused(tmp_path / "e.npz", tmp_path, "embeddings, features or arr_0")


@pytest.mark.parametrize("kind", ["fixed", "list", "large", "half", "double"])
def test_parquet_of_others_has_a_column_of_lists(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    kinds = {
        "fixed": pa.list_(pa.float32(), 3), "list": pa.list_(pa.float32()), "large": pa.large_list(pa.float32()),
        "half": pa.list_(pa.float16()), "double": pa.list_(pa.float64(), 3),
    }  # fmt: skip
    vectors = pa.array(list(ROWS.astype(np.float16) if kind == "half" else ROWS), kinds[kind])
    source = parquet(tmp_path / "e.parquet", path=IDS, vector=vectors, caption=["x"] * 5, label=list("ababa"))
    found = bring(source, tmp_path)
    assert found.ids == IDS and found.class_counts() == {"a": 3, "b": 2}
    assert np.array_equal(found.embeddings, ROWS.astype(np.float16) if kind == "half" else ROWS)


def test_parquet_of_many_rows_and_row_groups_keeps_their_order(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = np.random.default_rng(2).standard_normal((10_000, 4), dtype=np.float32)
    table = pa.table({"id": [f"{row:05}" for row in range(10_000)], "embedding": list(rows)})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=3000)
    found = bring(tmp_path / "e.parquet", tmp_path)
    assert np.array_equal(found.embeddings, rows)


def test_parquet_from_pandas_may_have_numbers_for_ids(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame({"id": range(5), "embedding": list(ROWS)}).to_parquet(tmp_path / "e.parquet")
    found = bring(tmp_path / "e.parquet", tmp_path)
    assert found.ids == list("01234") and np.array_equal(found.embeddings, ROWS)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"id": list("ab"), "x": [1.0, 2.0]}, "one column of lists of floats"),
        ({"id": list("ab"), "x": [[1.0], [2.0]], "y": [[1.0], [2.0]]}, "one column of lists of floats"),
        ({"name": list("ab"), "embedding": [[1.0], [2.0]]}, "none of its columns"),
        ({"id": list("ab"), "embedding": [[1.0], [2.0, 3.0]]}, "row 1 has no embedding of width 1"),
        ({"id": list("ab"), "embedding": [[1.0], None]}, "row 1 has no embedding of width 1"),
        ({"id": list("ab"), "embedding": [None, [1.0]]}, "how wide embeddings are"),
        ({"id": list("ab"), "embedding": [[1.0], [None]]}, "missing numbers"),
        ({"id": ["a", None], "embedding": [[1.0], [2.0]]}, "row 1 has no id"),
        ({"id": [0.5, 1.5], "embedding": [[1.0], [2.0]]}, "is not text"),
    ],
)
def test_parquet_that_does_not_fit_is_refused(tmp_path: Path, columns: dict[str, Any], match: str) -> None:
    refused(parquet(tmp_path / "e.parquet", **columns), tmp_path, match)


def test_a_folder_of_thingsvision_is_imported(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    npy(tmp_path / "t", name="features.npy")
    (tmp_path / "t" / "file_names.txt").write_text("".join(f"/data/x/{row}.jpg\n" for row in range(5)))
    found = bring(tmp_path / "t", tmp_path)
    assert found.root == Path("/data/x") and found.ids == [f"{row}.jpg" for row in range(5)]
    assert found.information["imported_from"] == "t"


def test_a_folder_of_thingsvision_that_lacks_something_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    refused(folder, tmp_path, "no features.npy")
    (folder / "features.hdf5").write_bytes(b"x")
    refused(folder, tmp_path, r"has features\.hdf5: save the features as \.npy")
    npy(folder, name="features.npy")
    refused(folder, tmp_path, "no file_names.txt")


def clip(folder: Path, shards: dict[str, int]) -> Path:
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, rows in shards.items():
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", np.full((rows, 2), int(number), dtype=np.float16))
        paths = [f"/images/{int(number):02}-{row}.jpg" for row in range(rows)]
        parquet(folder / "metadata" / f"metadata_{number}.parquet", image_path=paths, caption=["x"] * rows)
    return folder


def test_a_folder_of_clip_retrieval_is_imported_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    found = bring(clip(tmp_path / "c", {str(number): 2 for number in range(12)}), tmp_path)
    assert found.embeddings[:, 0].tolist() == [number for number in range(12) for _ in range(2)]
    assert found.ids[-1] == "11-1.jpg" and found.root == Path("/images")


def test_clip_retrieval_numbers_may_have_leading_zeros(tmp_path: Path) -> None:
    assert len(bring(clip(tmp_path / "c", {"0009": 1, "0010": 3}), tmp_path)) == 4


def test_clip_retrieval_with_a_missing_shard_is_refused(tmp_path: Path) -> None:
    source = clip(tmp_path / "c", {"0": 1, "1": 1})
    (source / "metadata" / "metadata_1.parquet").unlink()
    refused(source, tmp_path, "number 1 is alone")
    (tmp_path / "d" / "img_emb").mkdir(parents=True)
    refused(tmp_path / "d", tmp_path, "there are none")


def test_clip_retrieval_shards_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    source = clip(tmp_path / "c", {"0": 2, "1": 2})
    np.save(source / "img_emb" / "img_emb_1.npy", np.zeros((3, 2), dtype=np.float16))
    refused(source, tmp_path, r"img_emb_1\.npy has 3 rows of width 2, expected 2")
    np.save(source / "img_emb" / "img_emb_1.npy", np.zeros((2, 4), dtype=np.float16))
    refused(source, tmp_path, "rows of width 4, expected 2 as in .* of width 2")
    np.save(source / "img_emb" / "img_emb_01.npy", np.zeros((2, 2), dtype=np.float16))
    refused(source, tmp_path, "the same number")


def test_clip_retrieval_without_image_paths_is_refused(tmp_path: Path) -> None:
    source = clip(tmp_path / "c", {"0": 2})
    parquet(source / "metadata" / "metadata_0.parquet", key=list("ab"))
    refused(source, tmp_path, r"metadata_0\.parquet.*image_path")


# --- Ids and numbers


@pytest.mark.parametrize(
    ("ids", "root", "expected"),
    [
        (["/a/b/1.jpg", "/a/c/2.jpg"], "/a", ["b/1.jpg", "c/2.jpg"]),
        (["/a/b/1.jpg"], "/a/b", ["1.jpg"]),
        (["/1.jpg", "/a/2.jpg"], "/", ["1.jpg", "a/2.jpg"]),
        (["C:\\a\\b\\1.jpg", "C:\\a\\2.jpg"], "C:\\a", ["2.jpg", "b/1.jpg"]),
    ],
)
def test_absolute_ids_become_relative_to_their_common_folder(
    tmp_path: Path, ids: list[str], root: str, expected: list[str]
) -> None:
    found = bring(npy(tmp_path, ROWS[: len(ids)]), tmp_path, names=txt(tmp_path, ids))
    assert found.ids == expected and found.information["root"] == root


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (["a.jpg", "b.jpg"], "has 5 rows, and 2 names"),
        (["a", "b", "c", "b", "a"], "row 3 has the id 'b' that row 1 has"),
        (["a", "b", "", "d", "e"], "row 2 has no id"),
        (["a", "b", "x/../../c", "d", "e"], "row 2 has the id 'x/../../c', which leads out"),
        (["a", "b", "x\\..\\c", "d", "e"], "row 2 has the id .* which leads out"),
        (["/a", "b", "c", "d", "e"], "row 1 'b'"),
        (["/a", "/b", "C:\\c", "/d", "/e"], "some ids are absolute and others are not"),
        (["C:\\a", "D:\\b", "C:\\c", "C:\\d", "C:\\e"], "no folder in common"),
        (["/x/../a", "/b", "/c", "/d", "/e"], "row 0 .* leads out"),
        (["/x/a", "/x//a", "/x/c", "/x/d", "/x/e"], "row 1 has the id 'a' that row 0 has"),
        (["a\0b", "b", "c", "d", "e"], "row 0 has a NUL"),
        (["a" * 4097, "b", "c", "d", "e"], "row 0 has .* more than 4096 bytes"),
        (["é", "\udcc3\udca9", "c", "d", "e"], "row 1 has the id 'é' that row 0 has"),
    ],
)
def test_ids_that_no_store_may_have_are_refused(tmp_path: Path, ids: list[str], match: str) -> None:
    refused(npy(tmp_path), tmp_path, match, names=txt(tmp_path, ids))


def test_ids_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text(json.dumps(["\ud800", "b", "c", "d", "e"]))
    refused(npy(tmp_path), tmp_path, "row 0 has '.ud800', which is no text", names=tmp_path / "n.json")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("name", [None, "dino"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float, name: str | None) -> None:
    rows = ROWS.astype(np.float64)
    rows[3, 1] = value
    refused(npy(tmp_path, rows), tmp_path, r"e\.npy: row 3 \('3.jpg'\)", names=txt(tmp_path), name=name)


# --- Damage and hostility


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (ROWS[0], r"\(rows, width\)"),
        (ROWS[None], r"\(rows, width\)"),
        (ROWS[:, :0], r"\(rows, width\)"),
        (ROWS.astype(np.int8), "holds int8"),
        (ROWS.astype(np.complex64), "holds complex64"),
        (np.array([[object()]], dtype=object), "never unpickled"),
        (np.zeros(5, dtype=[("a", "f4")]), "embeddings are floats"),
    ],
)
def test_arrays_that_are_no_embeddings_are_refused(tmp_path: Path, rows: Any, match: str) -> None:
    refused(npy(tmp_path, rows), tmp_path, match, names=txt(tmp_path))


def ours(suffix: str) -> Callable[[Path], Path]:
    return lambda folder: export(write(folder / "s.h5", IDS), folder / f"s{suffix}")[0]


def zipped(folder: Path) -> Path:
    np.savez_compressed(folder / "e.npz", features=ROWS, ids=np.array(IDS))
    return folder / "e.npz"


MAKERS = {".npy": ours(".npy"), ".parquet": ours(".parquet"), ".safetensors": ours(".safetensors"), ".npz": zipped}


@pytest.mark.parametrize("suffix", MAKERS)
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    source = MAKERS[suffix](tmp_path)
    data = source.read_bytes()
    for length in [*range(0, len(data), 97), len(data) - 1]:
        source.write_bytes(data[:length])
        refused(source, tmp_path, source.name)


@pytest.mark.parametrize("suffix", MAKERS)
def test_a_file_of_changed_bytes_is_refused_or_read_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    source = MAKERS[suffix](tmp_path)
    data = source.read_bytes()
    random = np.random.default_rng(3)
    for _ in range(60):
        changed = bytearray(data)
        changed[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        source.write_bytes(changed)
        try:
            bring(source, tmp_path, overwrite=True)
        except StoreFormatError as error:
            assert source.name in str(error)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet", ".safetensors"])
def test_garbage_is_refused(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    names = txt(tmp_path)
    (tmp_path / f"e{suffix}").write_bytes(b"garbage" * 50)
    refused(tmp_path / f"e{suffix}", tmp_path, f"e{suffix} cannot be read", names=names)


def tensors(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "length", "match"),
    [
        ({}, 10_000, "header would have 10,000 bytes"),
        ({}, 2**63, "header would have"),
        ({}, None, "not exported by embedkit"),
        (b"[" * 50_000, None, "cannot be read"),
        (b'{"a": 1, "a": 2}', None, "a name twice"),
        ([], None, "cannot be read"),
        ({"__metadata__": {"embedkit": "{}"}}, None, "its tensors have 0 bytes, 24 are there"),
        ({"embeddings": entry(0, 999, [2, 3])}, None, "does not lie where it should"),
        ({"embeddings": entry(0, 24, [2, 3]), "ids": entry(12, 24, [2, 6], "U8")}, None, "does not lie where"),
        ({"embeddings": entry(-24, 0, [2, 3])}, None, "does not lie where it should"),
        ({"embeddings": entry(0, 24, [-2, -3])}, None, "does not lie where it should"),
        ({"embeddings": entry(0, 24, [2, 3], "F99")}, None, "F99"),
        ({"embeddings": entry(0, 24, [6])}, None, "cannot be read"),
        ({"embeddings": entry(0, 24, [3, 2], "I32")}, None, "not float32"),
        ({"embeddings": entry(0, 24, [2, 3])}, None, "no 'ids'"),
        ({"embeddings": entry(0, 16, [2, 2]), "ids": entry(16, 24, [4, 2], "U8")}, None, "ids is U8 of shape"),
        ({"embeddings": {"dtype": "F32"}}, None, "data_offsets"),
        ({"embeddings": 7}, None, "cannot be read"),
    ],
)
def test_hostile_safetensors_headers_are_refused(tmp_path: Path, header: Any, length: int | None, match: str) -> None:
    if isinstance(header, dict) and header:
        header = {"__metadata__": {"embedkit": "{}"}, **header}
    refused(tensors(tmp_path / "e.safetensors", header, bytes(24), length), tmp_path, match)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"e\.npy does not exist"):
        bring(tmp_path / "e.npy", tmp_path)
    with pytest.raises(StoreNotFoundError, match=r"n\.txt does not exist"):
        bring(npy(tmp_path), tmp_path, names=tmp_path / "n.txt")


@pytest.mark.parametrize("name", ["e.pt", "e.pkl", "e.h5", "e"])
def test_an_unknown_suffix_lists_what_is_supported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / name, tmp_path, r"\.npy .*\.npz, \.parquet, \.safetensors")


def test_names_of_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    (tmp_path / "n.yaml").write_text("x")
    refused(npy(tmp_path), tmp_path, r"names come from \.txt", names=tmp_path / "n.yaml")


def test_an_existing_store_is_replaced_only_when_asked(tmp_path: Path) -> None:
    source, names = npy(tmp_path), txt(tmp_path)
    first = bring(source, tmp_path, names=names)
    with pytest.raises(StoreExistsError):
        bring(source, tmp_path, names=names)
    assert bring(source, tmp_path, names=names, name="new", overwrite=True).digest != first.digest


def test_a_source_is_not_replaced_by_its_own_import(tmp_path: Path) -> None:
    source = npy(tmp_path)
    with pytest.raises(StoreExistsError, match="in its own place"):
        import_embeddings(source, source, names=txt(tmp_path), overwrite=True)
