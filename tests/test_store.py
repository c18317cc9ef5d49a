from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from embedkit import (
    EmbeddingShapeError,
    EmbeddingSpec,
    ImageError,
    Store,
    StoreBusyError,
    StoreExistsError,
    StoreFormatError,
    StoreNotFoundError,
)
from embedkit.errors import FAILURE_KINDS
from embedkit.store import Failure, Failures, StoreWriter

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=3)
ODD_IDS = ["plain.jpg", "with space.jpg", "dir/é.jpg", "😀.png", "broken\udcff.jpg", "line\nbreak.jpg"]


def write(path: Path, ids: list[str], embeddings: np.ndarray, **columns: object) -> Store:
    with StoreWriter(path, SPEC, overwrite=True) as writer:
        writer.append(embeddings, ids, **columns)  # type: ignore[arg-type]
        writer.finalise()
    return Store.open(path)


def embeddings_for(ids: list[str]) -> np.ndarray:
    return np.arange(len(ids) * 3, dtype=np.float32).reshape(-1, 3)


def test_every_column_is_sorted_by_the_bytes_of_the_ids(tmp_path: Path) -> None:
    embeddings = embeddings_for(ODD_IDS)
    hashes = [hashlib.sha256(os.fsencode(id)).digest() for id in ODD_IDS]
    store = write(tmp_path / "s.h5", ODD_IDS, embeddings, labels=list("abcabc"), content_sha256=hashes)
    assert store.ids == sorted(ODD_IDS, key=os.fsencode)
    assert store.labels is not None
    for row, id in enumerate(store.ids):
        given = ODD_IDS.index(id)
        assert np.array_equal(store.embeddings[row], embeddings[given])
        assert store.classes[store.labels[row]] == "abcabc"[given]
        assert store.content_sha256[row].tobytes() == hashes[given]
        assert store.index_of(id) == row


def test_rows_load_and_blocks_agree_with_the_map(tmp_path: Path) -> None:
    ids = [f"{i:05}.jpg" for i in range(5000)]
    embeddings = np.random.default_rng(0).standard_normal((5000, 3), dtype=np.float32)
    store = write(tmp_path / "s.h5", ids, embeddings)
    assert np.array_equal(store.embeddings, embeddings)
    assert np.array_equal(store.load(), embeddings)
    assert np.array_equal(np.concatenate(list(store.iter_blocks(999))), embeddings)
    assert np.array_equal(store.rows([4999, 0, 4999]), embeddings[[4999, 0, 4999]])
    with pytest.raises(ValueError, match="read-only"):
        store.embeddings[0] = 0


def test_the_file_is_schema_v1(tmp_path: Path) -> None:
    ids = [f"{i:05}.jpg" for i in range(5000)]
    embeddings = np.random.default_rng(0).standard_normal((5000, 3), dtype=np.float32)
    write(tmp_path / "s.h5", ids, embeddings, labels=["a"] * 5000)
    with h5py.File(tmp_path / "s.h5") as file:
        assert (file.attrs["format"], file.attrs["schema_version"]) == (b"embedkit-store", 1)
        assert set(file) == {
            "embeddings", "ids", "sizes", "mtimes_ns", "content_sha256", "labels", "label_names", "failures",
            "checksums",
        }  # fmt: skip
        assert set(file["failures"]) == {"ids", "errors", "sizes", "mtimes_ns"}
        assert file["embeddings"].id.get_offset() % 64 == 0 and file["embeddings"].id.get_offset() % 4096 != 0
        blocks = [hashlib.sha256(embeddings[i : i + 4096].tobytes()).digest() for i in range(0, 5000, 4096)]
        assert file["checksums/embeddings"][()].tobytes() == b"".join(blocks)
        assert file["embeddings"].attrs["sha256"].decode() == hashlib.sha256(b"".join(blocks)).hexdigest()

        def check(name: str, item: h5py.HLObject) -> None:
            if isinstance(item, h5py.Dataset):
                assert item.chunks is None, name
                if name != "embeddings":
                    assert item.attrs["sha256"].decode() == hashlib.sha256(item[()].tobytes()).hexdigest(), name
            for value in item.attrs.values():
                assert isinstance(value, bytes | np.bytes_ | np.integer), name

        file.visititems(check)


def test_four_lines_of_h5py_read_it(tmp_path: Path) -> None:
    write(tmp_path / "s.h5", ["b.jpg", "é.jpg"], embeddings_for(["b", "e"]))
    file = h5py.File(tmp_path / "s.h5", "r")
    ids = file["ids"].asstr()[:]
    embeddings = file["embeddings"][:]
    assert ids.tolist() == ["b.jpg", "é.jpg"] and embeddings.shape == (2, 3)
    file.close()


def test_content_id_depends_on_content_alone(tmp_path: Path) -> None:
    embeddings = embeddings_for(ODD_IDS)
    one = write(tmp_path / "1.h5", ODD_IDS, embeddings, mtimes_ns=[1] * 6)
    two = write(tmp_path / "2.h5", ODD_IDS[::-1], embeddings[::-1], mtimes_ns=[2] * 6)
    assert one.content_id == two.content_id and one.run_id != two.run_id
    assert write(tmp_path / "3.h5", ODD_IDS, embeddings + 1).content_id != one.content_id
    assert write(tmp_path / "4.h5", ODD_IDS, embeddings, labels=list("aaaaab")).content_id != one.content_id


def test_failures_are_kept_apart_with_their_reasons(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        writer.append(embeddings_for(["a"]), ["a.jpg"])
        writer.fail("z.jpg", "the end is missing", "truncated")
        writer.fail("c.jpg", "a decoder gave up")
        writer.fail("b\udcff.jpg", "the file is empty", "empty", size=0, mtime_ns=5)
        with pytest.raises(ValueError, match="'corrupt' is no kind of failure; expected one of missing, permission"):
            writer.fail("d.jpg", "?", "corrupt")
        writer.finalise()
    store = Store.open(tmp_path / "s.h5")
    assert store.failures == [
        Failure("b\udcff.jpg", "the file is empty", "empty"),
        Failure("c.jpg", "a decoder gave up", "damaged"),
        Failure("z.jpg", "the end is missing", "truncated"),
    ]
    assert store.summary()["failures"][0] == {"id": "b\udcff.jpg", "kind": "empty", "error": "the file is empty"}
    assert len(store) == 1
    with h5py.File(store.path) as file:
        assert file["failures/kinds"].asstr()[:].tolist() == ["empty", "damaged", "truncated"]
        assert file["failures/kinds"].dtype == "S9" and file["failures/kinds"].chunks is None


def test_failures_have_kinds_that_a_store_may_have() -> None:
    made_up = ["", "two words", "é", "\ud800", "a\0b", "x" * 33, "damaged"]
    known = [*FAILURE_KINDS, "later"]
    errors = [ImageError(f"{number}.jpg", "?", kind) for number, kind in enumerate([*made_up, *known])]
    failures = Failures.of(errors, [0] * len(errors), [0] * len(errors))
    assert [failure.kind for failure in failures.listed()] == ["damaged"] * len(made_up) + known


def test_an_empty_store_is_a_store(tmp_path: Path) -> None:
    store = write(tmp_path / "s.h5", [], np.empty((0, 3)))
    assert (len(store), store.ids, store.embeddings.shape, store.load().shape) == (0, [], (0, 3), (0, 3))
    assert store.labels is None and store.classes == [] and store.class_counts() == {}


def test_nothing_appears_before_finalise_and_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        writer.append(embeddings_for(["a"]), ["a.jpg"])
        assert os.listdir(tmp_path) == ["s.h5.parts"]
        raise RuntimeError
    with pytest.raises(ValueError, match="two rows have the id"), StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        writer.append(embeddings_for(["a", "a"]), ["a.jpg", "a.jpg"])
        writer.finalise()
    assert os.listdir(tmp_path) == []


def test_an_existing_store_is_replaced_only_when_asked_and_open_maps_keep_the_old_rows(tmp_path: Path) -> None:
    old = write(tmp_path / "s.h5", ["a.jpg"], np.ones((1, 3)))
    kept = old.embeddings
    with pytest.raises(StoreExistsError, match="--overwrite"):
        StoreWriter(tmp_path / "s.h5", SPEC)
    with pytest.raises(StoreExistsError, match="folder"):
        StoreWriter(tmp_path, SPEC, overwrite=True)
    new = write(tmp_path / "s.h5", ["a.jpg"], np.zeros((1, 3)))
    assert kept.sum() == 3 and new.embeddings.sum() == 0


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s.h5", SPEC) as writer, pytest.raises(EmbeddingShapeError, match=r"width 3.*\(1, 4\)"):
        writer.append(np.ones((1, 4)), ["a.jpg"])


def _ids_of(store: Store) -> list[str]:
    return store.ids


def test_a_store_pickles_by_path_into_spawned_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = write(Path("s.h5"), ["a.jpg"], np.ones((1, 3)))
    assert pickle.loads(pickle.dumps(store)).ids == ["a.jpg"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_ids_of, [store]) == [["a.jpg"]]


def _sum_of(store: Store) -> float:
    return float(store.rows([0, 1]).sum() + store.embeddings.sum() + store.load().sum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Later Pythons warn of forks beside threads.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_workers_read_at_once_without_disturbing_one_another(tmp_path: Path) -> None:
    store = write(tmp_path / "s.h5", ["a.jpg", "b.jpg"], np.ones((2, 3)))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_sum_of, [store] * 40) == [18.0] * 40


def test_an_open_store_stays_itself_when_another_takes_its_name(tmp_path: Path) -> None:
    old = write(tmp_path / "s.h5", ["a.jpg", "b.jpg"], np.ones((2, 3)))
    pickled = pickle.dumps(old)
    write(tmp_path / "s.h5", ["c.jpg"], np.zeros((1, 3)), labels=["x"])
    assert old.ids == ["a.jpg", "b.jpg"] and old.rows([1]).tolist() == [[1, 1, 1]]
    assert old.load().sum() == 6 and old.labels is None
    with pytest.raises(StoreFormatError, match="was replaced by another store"):
        pickle.loads(pickled)


def test_rows_by_id_from_the_end_and_out_of_range(tmp_path: Path) -> None:
    store = write(tmp_path / "s.h5", ["a.jpg", "b.jpg"], np.arange(6).reshape(2, 3))
    assert store.rows(ids=["b.jpg", "a.jpg", "b.jpg"]).tolist() == [[3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert store.rows([-1]).tolist() == [[3, 4, 5]] and store.rows([]).shape == (0, 3)
    for outside in (2, -3):
        with pytest.raises(IndexError, match=f"row {outside} does not exist"):
            store.rows([outside])
    with pytest.raises(KeyError):
        store.rows(ids=["c.jpg"])
    with pytest.raises(TypeError):
        store.rows()


def test_load_fills_arrays_of_other_types_and_layouts(tmp_path: Path) -> None:
    embeddings = np.random.default_rng(0).standard_normal((5000, 3), dtype=np.float32)
    store = write(tmp_path / "s.h5", [f"{number:04}" for number in range(5000)], embeddings)
    assert np.array_equal(store.load(np.float64), embeddings.astype(np.float64))
    assert np.array_equal(store.load(np.float16), embeddings.astype(np.float16))
    out = np.empty((5000, 3), dtype=np.float32)
    assert store.load(out=out) is out and np.array_equal(out, embeddings)
    strided = np.empty((3, 5000), dtype=np.float32).T
    assert np.array_equal(store.load(out=strided), embeddings)
    with pytest.raises(EmbeddingShapeError, match=r"shape \(5000, 3\), the array to fill \(3, 5000\)"):
        store.load(out=np.empty((3, 5000), dtype=np.float32))


def test_a_writer_refuses_a_store_that_another_process_writes(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        with pytest.raises(StoreBusyError), StoreWriter(tmp_path / "s.h5", SPEC):
            pass
        writer.append(np.ones((1, 3)), ["a"])
        writer.finalise()
    assert os.listdir(tmp_path) == ["s.h5"]


def test_provenance_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for length, fits in ((50_000, True), (62_000, False)):
        with StoreWriter(tmp_path / "s.h5", SPEC, information={"note": "x" * length}, overwrite=True) as writer:
            writer.append(np.ones((1, 3)), ["a"])
            if fits:
                writer.finalise()
            else:
                with pytest.raises(ValueError, match="a store keeps at most"):
                    writer.finalise()
        assert Store.open(tmp_path / "s.h5").information["note"] == "x" * 50_000


def test_open_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"missing\.h5 does not exist"):
        Store.open(tmp_path / "missing.h5")
    with pytest.raises(StoreNotFoundError, match="is a folder"):
        Store.open(tmp_path)
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(StoreFormatError, match="HDF5"):
        Store.open(tmp_path / "text.h5")
    with pytest.raises(StoreNotFoundError, match=r"is a folder; name a store in it, such as text\.h5"):
        Store.open(tmp_path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.ones(3)
    with pytest.raises(StoreFormatError, match="not an embedkit store"):
        Store.open(tmp_path / "other.h5")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.attrs.__setitem__("schema_version", 2), "schema version 2"),
        (lambda file: file.attrs.__setitem__("provenance", np.bytes_(b"{}")), "provenance"),
        (lambda file: file.attrs.__setitem__("digest", np.bytes_(b"0" * 64)), "digest"),
        (lambda file: file.__delitem__("ids"), "ids"),
        (lambda file: file.__delitem__("embeddings"), "embeddings"),
    ],
)
def test_open_refuses_an_altered_store(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path / "s.h5", ["a.jpg"], np.ones((1, 3)))
    with h5py.File(tmp_path / "s.h5", "r+", libver=("v108", "v108")) as file:
        damage(file)  # type: ignore[operator]
    with pytest.raises(StoreFormatError, match=message):
        Store.open(tmp_path / "s.h5")


def test_open_refuses_columns_of_another_length_and_a_chunked_matrix(tmp_path: Path) -> None:
    write(tmp_path / "s.h5", ["a.jpg"], np.ones((1, 3)))
    with h5py.File(tmp_path / "s.h5", "r+", libver=("v108", "v108")) as file:
        del file["sizes"]
        file["sizes"] = np.zeros(2, dtype="<u8")
    with pytest.raises(StoreFormatError, match=r"/sizes is uint64 of shape \(2,\) for 1 rows"):
        Store.open(tmp_path / "s.h5")
    write(tmp_path / "s.h5", ["a.jpg"], np.ones((1, 3)))
    with h5py.File(tmp_path / "s.h5", "r+", libver=("v108", "v108")) as file:
        del file["embeddings"]
        file.create_dataset("embeddings", data=np.ones((1, 3), dtype="<f4"), chunks=(1, 3))
    with pytest.raises(StoreFormatError, match="not contiguous"):
        Store.open(tmp_path / "s.h5")


def test_open_refuses_a_truncated_file(tmp_path: Path) -> None:
    ids = [f"{i}.jpg" for i in range(5000)]
    write(tmp_path / "s.h5", ids, np.ones((5000, 3)))
    with (tmp_path / "s.h5").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(StoreFormatError):
        Store.open(tmp_path / "s.h5")
