"""Files of an index: saved whole or not at all, read with suspicion, and never silently stale."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from embedkit import (
    Backbone,
    EmbeddingSpec,
    Index,
    SpecMismatchError,
    Store,
    StoreFormatError,
    StoreNotFoundError,
    extract,
)
from embedkit.index import files
from embedkit.store import StoreWriter

Array = npt.NDArray[Any]
SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=12)


def make_store(
    path: Path,
    embeddings: Array,
    ids: list[str],
    contents: list[bytes] | None = None,
    labels: Any = None,
    spec: Any = SPEC,
) -> Store:
    path.unlink(missing_ok=True)
    with StoreWriter(path, spec) as writer:
        writer.append(embeddings, ids, content_sha256=contents, labels=labels)
        writer.finalise()
    return Store.open(path)


def vectors_of(n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, 12)).astype(np.float32)


def names_of(rows: Any) -> list[str]:
    return [f"{row:04}.jpg" for row in rows]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "s.h5", vectors_of(600), names_of(range(600)))


@pytest.fixture
def saved(store: Store, tmp_path: Path) -> Path:
    return Index.build(store, "IVF8,Flat", recall=0.9).save(tmp_path / "i")


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF8,Flat", "PCA8,IVF8,PQ4x4fs", "SQ8"])
def test_what_is_saved_is_what_is_opened(store: Store, tmp_path: Path, factory: str) -> None:
    index = Index.build(store, factory, whiten=10, expansion=(3, 1.5))
    folder = index.save(tmp_path / "deep" / "i")
    opened = Index.open(folder)
    assert (opened.factory, opened.metric, opened.expansion) == (factory, "cosine", (3, 1.5))
    assert opened.chosen == index.chosen and opened.measurements == index.measurements
    ours, theirs = (one.search(vectors_of(40, 1), k=7) for one in (opened, index))
    assert (ours.rows == theirs.rows).all() and ours.scores.tobytes() == theirs.scores.tobytes()
    facts = json.loads((folder / "index.json").read_text())
    assert facts["digest"] == SPEC.digest and EmbeddingSpec.from_dict(facts["spec"]) == SPEC
    assert (facts["rows"], facts["metric"], facts["content_id"]) == (600, "cosine", store.content_id)
    assert facts["measurements"] == [dataclasses.asdict(one) for one in index.measurements]
    found = sorted(path.suffix for path in folder.iterdir() if path.name != "lock")
    assert found == [".json", ".safetensors"] if factory == "Flat" else [".faiss", ".json", ".safetensors"]
    if factory != "Flat":  # FAISS itself reads it.
        assert faiss.read_index(str(next(folder.glob("*.faiss")))).ntotal == 600
    opened.save(folder)
    assert (Index.open(folder).search(vectors_of(40, 1), k=7).rows == theirs.rows).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_index_is_mapped_and_not_read(store: Store, tmp_path: Path) -> None:
    index = Index.open(Index.build(store, "IVF8,Flat").save(tmp_path / "i"))
    name = next((tmp_path / "i").glob("*.faiss")).name
    assert name in Path("/proc/self/maps").read_text() and len(index) == 600


def test_an_index_and_its_store_move_together(store: Store, saved: Path, tmp_path: Path) -> None:
    expected = Index.open(saved).search(3).rows
    there = tmp_path / "elsewhere"
    there.mkdir()
    shutil.move(saved, there / "i")
    assert (Index.open(there / "i").search(3).rows == expected).all()  # The store is where it was.
    shutil.move(store.path, there / "s.h5")
    assert (Index.open(there / "i").search(3).rows == expected).all()
    (there / "s.h5").rename(tmp_path / "other.h5")
    assert (Index.open(there / "i", tmp_path / "other.h5").search(3).rows == expected).all()
    with pytest.raises(StoreNotFoundError, match=r"s\.h5 does not exist"):
        Index.open(there / "i")


def change(path: Path, name: str, value: Any) -> None:
    facts = json.loads(path.read_text())
    place = facts
    *outer, last = name.split(".")
    for part in outer:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "other"), ("version", 2), ("version", None), ("files", []), ("files", {}), ("store", 0),
        ("store", None), ("layer", 3), ("spec", {}), ("spec", None), ("rows", -1), ("rows", "600"), ("rows", True),
        ("metric", "dot"), ("metric", "ip"), ("metric", None), ("factory", "Flat"), ("factory", 3),
        ("expansion", [0, 1]), ("expansion", [1]), ("expansion", [3, float("nan")]), ("expansion", "ab"),
        ("chosen", {}), ("chosen", 3), ("chosen.effort", 0), ("chosen.effort", 1 << 40), ("chosen.effort", 1.5),
        ("chosen.refine", 0), ("chosen.refine", -3), ("chosen.refine", 1 << 40), ("chosen.more", 1),
        ("chosen.seconds", float("inf")), ("measurements", None), ("measurements", [3]), ("content_id", None),
        ("files.rows", None), ("files.rows.name", "../rows.safetensors"), ("files.rows.name", "index.json"),
        ("files.vectors.bytes", -1), ("files.vectors.bytes", None), ("files.vectors.fingerprint", "00"),
        ("files.vectors", 3),
    ],
)  # fmt: skip
def test_facts_that_cannot_be_are_a_named_error(saved: Path, name: str, value: Any) -> None:
    change(saved / "index.json", name, value)
    with pytest.raises(StoreFormatError, match=r"[/\\]i[/\\](index\.json|vectors-)"):
        Index.open(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": ' * 100_000, '{"format": 1' + "0" * 5000 + "}", "\xff"])
def test_a_damaged_json_is_a_named_error(saved: Path, text: str) -> None:
    (saved / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreFormatError, match=r"index\.json"):
        Index.open(saved)
    (saved / "index.json").unlink()
    with pytest.raises(StoreNotFoundError, match="embedkit index STORE"):
        Index.open(saved)


def test_damaged_and_exchanged_data_files_are_a_named_error(store: Store, saved: Path, tmp_path: Path) -> None:
    other = Index.build(store, "IVF8,Flat", seed=1).save(tmp_path / "o")
    for kind in ("vectors", "rows"):
        path, theirs = (next(folder.glob(f"{kind}-*")) for folder in (saved, other))
        data = path.read_bytes()
        damages: list[Callable[[], Any]] = [
            lambda path=path, data=data: path.write_bytes(data[:-1]),
            lambda path=path: path.write_bytes(b""),
            lambda path=path, data=data: path.write_bytes(b"\0" * len(data)),
            lambda path=path, data=data: path.write_bytes(data[:100] + b"\xff" * 50 + data[150:]),
            lambda path=path: path.unlink(),
        ]  # type: ignore[misc]
        if kind == "vectors":
            damages.append(lambda path=path, theirs=theirs: path.write_bytes(theirs.read_bytes()))  # type: ignore[misc]
        for damage in damages:
            damage()
            with pytest.raises(StoreFormatError, match=kind):
                Index.open(saved)
            path.write_bytes(data)
    assert Index.open(saved).search(3).rows[0, 0] == 3


def sign(folder: Path, kind: str) -> None:
    """Make the JSON agree with a data file, as somebody would who means harm."""
    path = next(folder.glob(f"{kind}-*"))
    change(folder / "index.json", f"files.{kind}", files._entry(path))


@pytest.mark.parametrize(
    ("name", "change_rows"),
    [
        ("rows", lambda rows: rows + 1), ("rows", lambda rows: rows - 2), ("rows", lambda rows: rows * 0),
        ("rows", lambda rows: rows + (1 << 60)), ("rows", lambda rows: rows[:-1]),
        ("rows", lambda rows: rows.astype(np.int32)), ("rows", lambda rows: rows.astype(np.float64)),
        ("rows", lambda rows: rows[:, None]), ("keys", lambda keys: keys[:-1]), ("keys", lambda keys: keys[:, :8]),
        ("mean", lambda _: np.zeros(12, dtype=np.float32)), ("matrix", lambda _: np.zeros((3, 5), dtype=np.float32)),
    ],
)  # fmt: skip
def test_rows_that_the_store_does_not_have_are_refused(
    saved: Path, name: str, change_rows: Callable[[Array], Array]
) -> None:
    path = next(saved.glob("rows-*"))
    arrays = load_file(path)
    arrays[name] = np.ascontiguousarray(change_rows(arrays.get(name, np.empty(0))))
    save_file(arrays, path)
    sign(saved, "rows")
    with pytest.raises(StoreFormatError, match=r"[/\\]i[/\\ ]"):
        Index.open(saved)


@pytest.mark.parametrize(
    "other",
    [
        lambda: faiss.IndexFlatL2(5), lambda: faiss.IndexFlatL2(12), lambda: faiss.IndexFlatIP(12),
        lambda: faiss.index_factory(12, "IVF8,Flat"), lambda: faiss.index_factory(12, "PQ4x4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("filled", [False, True])
def test_another_index_of_faiss_is_refused(saved: Path, other: Callable[[], Any], filled: bool) -> None:
    index = other()
    if filled and index.is_trained:
        index.add(np.zeros((600, index.d), dtype=np.float32))
    same = index.ntotal == 600 and index.d == 12 and index.metric_type == faiss.METRIC_L2
    faiss.write_index(index, str(next(saved.glob("vectors-*"))))
    sign(saved, "vectors")
    if same:
        Index.open(saved).search(np.ones(12))  # Coarser than it should be, and no worse.
    else:
        with pytest.raises(StoreFormatError, match="build the index again"):
            Index.open(saved)


def test_an_index_refuses_a_store_and_queries_that_were_embedded_otherwise(
    photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_backbone.with_suffix(".safetensors"))
    save_file({name: tensor * 1.001 for name, tensor in state.items()}, tmp_path / "tiny.safetensors")
    (tmp_path / "tiny.json").write_text(tiny_backbone.read_text())
    own = Backbone.load(tiny_backbone)
    store = extract(photos, tmp_path / "photos.h5", own)
    folder = Index.build(store).save(tmp_path / "i")
    for number, (other, field) in enumerate(
        (
            (Backbone.load(tiny_backbone, crop_pct=1.0), "preprocessing.crop_pct"),
            (Backbone.load(tmp_path / "tiny.json"), "weights_sha256"),
            (Backbone.load(tiny_backbone, pool="max"), "pool"),
        )
    ):
        theirs = extract(photos, tmp_path / f"{number}.h5", other)
        index = Index.open(folder)
        for refused in (
            lambda other=other: Index.open(folder, backbone=other),
            lambda theirs=theirs: Index.open(folder, theirs),
            lambda theirs=theirs, index=index: index.add(theirs),
            lambda other=other, index=index: setattr(index, "backbone", other),
        ):
            with pytest.raises(SpecMismatchError) as caught:
                refused()
            assert list(caught.value.differences) == [field]
    assert Index.open(folder, backbone=own).search(photos / "cat" / "3.jpg").hits()[0].id == "cat/3.jpg"


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF8,Flat", "SQ8"])
def test_a_changed_store_is_noticed_and_followed(
    tmp_path: Path, factory: str, caplog: pytest.LogCaptureFixture
) -> None:
    vectors, ids = vectors_of(700), names_of(range(700))
    contents = [f"{row}".encode().rjust(32) for row in range(700)]
    path = tmp_path / "s.h5"
    first = slice(0, 600)
    folder = Index.build(make_store(path, vectors[first], ids[first], contents[first]), factory).save(tmp_path / "i")
    labels = ["a"] * 600
    make_store(path, vectors[first], ids[first], contents[first], labels)
    with caplog.at_level(logging.WARNING, "embedkit"):
        index = Index.open(folder)
    assert not caplog.records and (index.missing, index.gone) == (0, 0)  # Other labels are no other rows.
    assert index.search(3, where="label=a").rows[0, 0] == 3
    # 50 rows go, 100 are new, 10 have another content under their old id.
    contents[590:600] = [b"changed".rjust(32)] * 10
    vectors[590:600] = vectors_of(10, 9)
    part = slice(50, 700)
    changed = make_store(path, vectors[part], ids[part], contents[part])
    with caplog.at_level(logging.WARNING, "embedkit"):
        index = Index.open(folder)
    exact = Index.build(changed)
    if factory != "Flat":
        assert (index.missing, index.gone) == (110, 60) and "110 of its rows are missing" in caplog.text
        assert "60 have gone" in caplog.text and "embedkit index --update" in caplog.text
        stale = index.search(vectors[::7], k=5).rows
        assert ((stale >= 0) & (stale < 540)).all()
        index.save(tmp_path / "stale")  # A stale index stays stale when it is saved.
        assert (Index.open(tmp_path / "stale").missing, Index.open(tmp_path / "stale").gone) == (110, 60)
        assert Index.open(tmp_path / "stale").add() == 110
        assert index.add() == 110
    assert (index.missing, index.gone) == (0, 0 if factory == "Flat" else 60)
    index.save(folder)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "embedkit"):
        again = Index.open(folder)
    assert not caplog.records and again.missing == 0
    for one in (index, again):
        found, theirs = (each.search(vectors[::5], k=10) for each in (one, exact))
        assert (found.scores >= theirs.scores[:, -1:]).mean() > (0.5 if factory == "IVF8,Flat" else 0.9)
        assert {f"{row:04}.jpg" for row in range(50)}.isdisjoint(found.ids.ravel())
        assert (one.search(vectors[::5], k=649).rows >= 0).all()
        own = one.search(vectors[590:600], k=1)
        assert own.ids.ravel().tolist() == ids[590:600] and (own.scores > 0.999).all()
    assert again.add() == 0


def test_an_exact_index_counts_what_an_update_brought(tmp_path: Path) -> None:
    vectors = vectors_of(30)
    index = Index.build(make_store(tmp_path / "s.h5", vectors[:20], names_of(range(20))))
    make_store(tmp_path / "s.h5", vectors[10:], names_of(range(10, 30)))
    assert index.add() == 10 and index.search(vectors[25]).ids[0, 0] == "0025.jpg"


def test_an_index_that_was_replaced_meanwhile_is_not_mixed_with_the_new_one(store: Store, saved: Path) -> None:
    index = Index.open(saved)
    Index.build(store, "HNSW16", metric="l2").save(saved)
    assert index.search(5).rows[0, 0] == 5
    with pytest.raises(StoreFormatError, match="was replaced since it was opened; open it again"):
        index.add()


def test_an_addition_that_is_interrupted_leaves_a_working_index(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedkit.index import coarse

    index = Index.build(store, "HNSW16")
    grown = make_store(tmp_path / "t.h5", np.concatenate([store.load(), vectors_of(100, 5)]), names_of(range(700)))
    monkeypatch.setattr(coarse, "GALLERY_BLOCK", 30)
    blocks = iter([grown.rows, grown.rows, None])

    def rows(*wanted: Any) -> Any:
        return next(blocks)(*wanted)  # type: ignore[misc]

    monkeypatch.setattr(grown, "rows", rows)
    with pytest.raises(TypeError):
        index.add(grown)
    assert index.search(store.rows([7]), k=3).rows[0, 0] == 7
    with pytest.raises(ValueError, match="was interrupted; call add"):
        index.save(tmp_path / "i")
    assert index.add(Store.open(grown.path)) == 100
    index = Index.open(index.save(tmp_path / "i"))
    assert (index.search(vectors_of(100, 5), k=1).rows[:, 0] == np.arange(600, 700)).all()


def test_a_foreign_folder_is_left_alone(store: Store, tmp_path: Path) -> None:
    index = Index.build(store)
    for name, content in (("photo.jpg", "x"), ("index.json", '{"pages": 3}'), ("index.json", "[]")):
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / name).write_text(content)
        with pytest.raises(StoreFormatError, match="theirs is something else than an index"):
            index.save(tmp_path / "theirs")
        assert (tmp_path / "theirs" / name).read_text() == content and len(list((tmp_path / "theirs").iterdir())) == 1
    with pytest.raises(StoreFormatError, match="something else"):
        index.save(store.path)
    assert index.save(tmp_path / "empty" / "new").is_dir()


WRITER = """
import sys
import numpy as np
from embedkit import Index, Store
from embedkit.index import files
folder, stores = sys.argv[1], sys.argv[2:]
indexes = [Index.build(store, "IVF8,Flat") for store in stores]
print("ready", flush=True)
while True:
    for index in indexes:
        index.save(folder)
"""

READER = """
import sys, time
import numpy as np
from embedkit import Index
folder, until = sys.argv[1], time.monotonic() + float(sys.argv[2])
answers = set()
count = 0
while time.monotonic() < until:
    index = Index.open(folder)
    found = index.search(np.ones(12), k=5)
    answers.add((index.store.path.name, tuple(found.ids[0])))
    count += 1
print(count, *sorted(" ".join([name, *ids]) for name, ids in answers), sep="\\n")
"""


def run(script: str, *arguments: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def two_stores(tmp_path: Path) -> list[Store]:
    return [
        make_store(
            tmp_path / f"{number}.h5", vectors_of(600, number), names_of(range(600 * number, 600 * number + 600))
        )
        for number in (1, 2)
    ]


def test_two_readers_and_one_writer_do_not_disturb_each_other(two_stores: list[Store], tmp_path: Path) -> None:
    folder = tmp_path / "i"
    expected = set()
    for store in two_stores:
        Index.build(store, "IVF8,Flat").save(folder)
        found = Index.open(folder).search(np.ones(12), k=5)
        expected.add(" ".join([store.path.name, *found.ids[0]]))
    writer = run(WRITER, folder, *(store.path for store in two_stores))
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        readers = [run(READER, folder, 2.5) for _ in range(2)]
        for reader in readers:
            out, errors = reader.communicate(timeout=60)
            assert reader.returncode == 0, errors
            count, *answers = out.splitlines()
            assert int(count) > 5 and set(answers) == expected
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.communicate()


@pytest.mark.skipif(os.name == "nt", reason="kills with a signal")
def test_a_writer_that_is_killed_leaves_an_index(two_stores: list[Store], tmp_path: Path) -> None:
    folder, dice = tmp_path / "i", random.Random(0)
    for number in range(4):
        writer = run(WRITER, folder, *(store.path for store in two_stores))
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(dice.uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        if files.is_index(folder):
            index = Index.open(folder)
            assert index.search(np.ones(12), k=5).rows.shape == (1, 5) and index.missing == 0
        else:
            assert number == 0
    for torn in ("lock", ".tmp-host-1-2", "vectors-" + "0" * 32 + ".faiss"):  # Killed before there was an index.
        (tmp_path / "n").mkdir(exist_ok=True)
        (tmp_path / "n" / torn).write_bytes(b"{}")
    for place in (folder, tmp_path / "n"):
        Index.build(two_stores[0], "IVF8,Flat").save(place)
        assert Index.open(place).search(0).rows[0, 0] == 0
        names = {path.suffix for path in place.iterdir()} - {""}
        assert names == {".faiss", ".json", ".safetensors"} and len(list(place.glob("*-*"))) == 2
