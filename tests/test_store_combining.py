"""Merging and selecting: new stores of rows that lie in others."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from embedkit import EmbeddingSpec, EvaluationError, SpecMismatchError, Store, StoreExistsError, StoreFormatError
from embedkit.cli import main
from embedkit.store import StoreWriter, matching, named, verify

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=3)


def write(
    path: Path,
    contents: dict[str, str],
    *,
    labels: list[str] | None = None,
    mtime: int = 1,
    failures: tuple[str, ...] = (),
    spec: EmbeddingSpec = SPEC,
) -> Store:
    """Write a store whose embeddings and hashes follow from what each file is said to contain."""
    with StoreWriter(path, spec, information={"root": "/photos"}) as writer:
        rows = [np.frombuffer(text.encode().ljust(3)[:3], dtype=np.uint8) for text in contents.values()]
        writer.append(
            np.array(rows, dtype=np.float32).reshape(-1, 3), list(contents),
            content_sha256=[text.encode().ljust(32) for text in contents.values()], labels=labels,
            mtimes_ns=[mtime] * len(contents),
        )  # fmt: skip
        for id in failures:
            writer.fail(id, "the end is missing", "truncated")
        writer.finalise()
    return Store.open(path)


def test_a_merge_is_the_store_of_all_the_images(tmp_path: Path) -> None:
    one = write(tmp_path / "1.h5", {"b": "b", "d": "d"}, labels=["x", "y"], failures=("f", "c"))
    two = write(tmp_path / "2.h5", {"a": "a", "c": "c"}, labels=["z", "x"], failures=("e",))
    merged = Store.merge([one, two], tmp_path / "merged.h5")
    whole = write(tmp_path / "whole.h5", dict(zip("abcd", "abcd", strict=True)), labels=list("zxxy"))
    assert merged.content_id == whole.content_id and verify(merged.path) == []
    # c was embedded elsewhere.
    assert [(failure.id, failure.kind) for failure in merged.failures] == [("e", "truncated"), ("f", "truncated")]
    assert merged.information["merged_from"]["first"] == [one.content_id, two.content_id]
    assert merged.information["merged_from"]["count"] == 2 and merged.root == Path("/photos")


def test_kinds_of_failures_and_their_absence_are_merged(tmp_path: Path) -> None:
    data = Path(__file__).parent / "data"
    merged = Store.merge([data / "store-v1.h5", data / "store-v1-kinds.h5"], tmp_path / "s.h5", on_conflict="first")
    kinds = [(failure.id, failure.kind) for failure in merged.failures]
    assert kinds == [("a b/0.jpg", "truncated"), ("z.jpg", "unknown")] and verify(merged) == []
    assert merged.select(tmp_path / "t.h5", [0]).failures == []


def test_merging_a_store_with_itself_or_alone_changes_nothing(tmp_path: Path) -> None:
    one = write(tmp_path / "1.h5", {"a": "a", "b": "b"}, labels=["x", "y"])
    assert Store.merge([one, one], tmp_path / "twice.h5").content_id == one.content_id
    assert Store.merge([one.path], tmp_path / "alone.h5").content_id == one.content_id


def test_conflicts_are_an_error_unless_a_rule_is_named(tmp_path: Path) -> None:
    old = write(tmp_path / "old.h5", {"a": "a", "b": "old"}, mtime=1)
    new = write(tmp_path / "new.h5", {"b": "new"}, mtime=2)
    with pytest.raises(StoreExistsError, match=r"1 ids stand for.*'b' in .*old\.h5 and .*new\.h5.*--on-conflict"):
        Store.merge([old, new], tmp_path / "m.h5")
    assert not (tmp_path / "m.h5").exists()
    for stores in ([old, new], [new, old]):
        newest = Store.merge(stores, tmp_path / "m.h5", on_conflict="newest", overwrite=True)
        assert np.array_equal(newest.rows(ids=["b"]), new.rows(ids=["b"]))
        first = Store.merge(stores, tmp_path / "m.h5", on_conflict="first", overwrite=True)
        assert np.array_equal(first.rows(ids=["b"]), stores[0].rows(ids=["b"]))
    with pytest.raises(ValueError, match="on_conflict is one of error, first, newest"):
        Store.merge([old], tmp_path / "x.h5", on_conflict="last")


def test_labels_that_differ_are_a_conflict(tmp_path: Path) -> None:
    one = write(tmp_path / "1.h5", {"a": "a"}, labels=["x"])
    two = write(tmp_path / "2.h5", {"a": "a"}, labels=["y"])
    with pytest.raises(StoreExistsError, match="labels"):
        Store.merge([one, two], tmp_path / "m.h5")


def test_stores_of_different_backbones_are_not_merged(tmp_path: Path) -> None:
    one = write(tmp_path / "1.h5", {"a": "a"})
    two = write(tmp_path / "2.h5", {"b": "b"}, spec=EmbeddingSpec(backbone="vit", weights_sha256="ab" * 32, dim=3))
    with pytest.raises(SpecMismatchError, match="backbone: 'resnet18' != 'vit'"):
        Store.merge([one, two], tmp_path / "m.h5")


def test_damage_is_not_copied_under_new_checksums(tmp_path: Path) -> None:
    store = write(tmp_path / "1.h5", {"a": "a", "b": "b"})
    data = bytearray(store.path.read_bytes())
    data[store.matrices[""].offset] ^= 1
    store.path.write_bytes(data)
    damaged = Store.open(store.path)
    with pytest.raises(StoreFormatError, match="rows 0:2"):
        Store.merge([damaged], tmp_path / "m.h5")
    with pytest.raises(StoreFormatError, match="rows 0:2"):
        damaged.select(tmp_path / "m.h5", [0])
    assert sorted(os.listdir(tmp_path)) == ["1.h5"]


def test_a_selection_holds_the_rows_and_says_where_they_come_from(tmp_path: Path) -> None:
    store = write(tmp_path / "1.h5", dict(zip("abcd", "abcd", strict=True)), labels=list("xyxz"), failures=("f",))
    chosen = store.select(tmp_path / "2.h5", [3, 0, 0])
    assert chosen.ids == ["a", "d"] and chosen.classes == ["x", "z"] and chosen.failures == []
    assert np.array_equal(chosen.embeddings, store.embeddings[[0, 3]]) and chosen.spec == store.spec
    assert chosen.information["selected_from"] == store.content_id
    assert store.select(tmp_path / "3.h5", np.ones(4, dtype=bool)).content_id == store.content_id
    for nothing in ([], np.zeros(4, dtype=bool)):
        with pytest.raises(EvaluationError, match=r"no row of .* is chosen; choose one of its 4 rows"):
            store.select(tmp_path / "4.h5", nothing)
    with pytest.raises(IndexError):
        store.select(tmp_path / "5.h5", [4])
    with pytest.raises(StoreExistsError):
        store.select(tmp_path / "2.h5", [0])


def test_patterns_choose_by_label_and_id(tmp_path: Path) -> None:
    store = write(tmp_path / "1.h5", {"2023/a": "a", "2024/b": "b", "2024/c": "c"}, labels=["cat", "cat", "dog"])
    assert matching(store, ["label=cat"]).tolist() == [True, True, False]
    assert matching(store, ["label=cat", "id=2024/*"]).tolist() == [False, True, False]
    assert matching(store, ["label=[cd]*"]).all()
    for bad, message in [("label=cow", "its labels are cat, dog"), ("id=x*", "2023/a"), ("cat", "label=PATTERN")]:
        with pytest.raises(EvaluationError, match=message):
            matching(store, [bad])
    with pytest.raises(EvaluationError, match=r"matches all of 'label=dog', 'id=2023/\*', though each alone"):
        matching(store, ["label=dog", "id=2023/*"])
    with pytest.raises(EvaluationError, match=r"no id is named; name some that .* has, such as"):
        named(store, [])


def test_images_of_unknown_content_are_not_called_different(tmp_path: Path) -> None:
    def unhashed(name: str, label: str) -> Store:
        with StoreWriter(tmp_path / name, SPEC) as writer:
            writer.append(np.eye(3)[:1], ["a"], labels=[label])
            writer.finalise()
        return Store.open(tmp_path / name)

    one, two = unhashed("1.h5", "x"), write(tmp_path / "2.h5", {"a": "a"}, labels=["x"])
    for stores in ([one, two], [one, one]):
        with pytest.raises(StoreExistsError, match=r"1 ids may stand for different images: there is no content hash"):
            Store.merge(stores, tmp_path / "m.h5")
    with pytest.raises(StoreExistsError, match="1 ids stand for different images or labels"):
        Store.merge([one, unhashed("3.h5", "y")], tmp_path / "m.h5")
    assert len(Store.merge([one, two], tmp_path / "m.h5", on_conflict="first")) == 1


def test_thousands_of_stores_fit_into_the_provenance(tmp_path: Path) -> None:
    one = write(tmp_path / "1.h5", {"a": "a"})
    merged = Store.merge([one] * 1100, tmp_path / "m.h5")
    assert merged.content_id == one.content_id
    assert merged.information["merged_from"]["count"] == 1100 and len(merged.information["merged_from"]["first"]) == 8


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Return what lets this process open so many more files, and no more."""
    resource = pytest.importorskip("resource")
    if not os.path.isdir("/dev/fd"):
        pytest.skip("nothing tells which files are open")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more: int) -> None:
        gc.collect()
        taken = {int(name) for name in os.listdir("/dev/fd")}
        free = (number for number in itertools.count() if number not in taken)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, more, None)), hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_merge_needs_no_more_than_one_open_file_a_store(tmp_path: Path, limit_files: Callable[[int], None]) -> None:
    ids = [f"{number:04}" for number in range(700)]
    paths = [write(tmp_path / f"{k}.h5", {id: id for id in ids[k::70]}).path for k in range(70)]  # Rows take turns.
    limit_files(100)
    assert Store.merge(paths, tmp_path / "m.h5").ids == ids
    limit_files(50)
    with pytest.raises(OSError, match=r"only \d+ of 70 stores can be open at once here; raise the limit.*ulimit -n"):
        Store.merge(paths, tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_what_is_copied_is_what_was_verified(tmp_path: Path) -> None:
    store = write(tmp_path / "1.h5", {"a": "a", "b": "b"})
    data = bytearray(store.path.read_bytes())
    data[store.matrices[""].offset] ^= 1
    (tmp_path / "damaged.h5").write_bytes(data)
    damaged = Store.open(tmp_path / "damaged.h5")
    os.replace(store.path, damaged.path)  # The name now stands for a sound store, the open file does not.
    assert verify(damaged.path) == [] and verify(damaged) != []
    with pytest.raises(StoreFormatError, match="rows 0:2"):
        damaged.select(tmp_path / "m.h5", [0])
    with pytest.raises(StoreFormatError, match="rows 0:2"):
        Store.merge([damaged], tmp_path / "m.h5")


def test_the_commands_merge_select_verify_and_tell_the_status(tmp_path: Path) -> None:
    def run(*arguments: object, code: int = 0, input: str | None = None) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=input)
        assert result.exit_code == code, result.output
        return result.output

    one = write(tmp_path / "1.h5", {"a/1.jpg": "1"}, labels=["a"]).path
    two = write(tmp_path / "2.h5", {"b/2.jpg": "2", "b/3.jpg": "3"}, labels=["b", "b"]).path
    both = tmp_path / "both.h5"
    assert "3 x 3 float32, 2 classes" in run("merge", one, two, "-o", both)
    assert "exists already" in run("merge", one, two, "-o", both, code=1)
    assert run("status", both) == f"{both}: finished; the store has 3 rows\n"
    assert run("status", tmp_path / "no.h5") == f"{tmp_path / 'no.h5'}: none\n"
    assert "every byte is as it was written" in run("verify", both)
    assert "2 x 3" in run("select", both, "-o", tmp_path / "b.h5", "--where", "label=b")
    assert "1 x 3" in run("select", both, "-o", tmp_path / "c.h5", "--ids", "-", input="a/1.jpg\n")
    assert "lacks 1 of 2 ids" in run(
        "select", both, "-o", tmp_path / "d.h5", "--ids", "-", input="a/1.jpg\nx\n", code=1
    )
    (tmp_path / "split.csv").write_text("path,split\na/1.jpg,train\nb/2.jpg,val\ngone.jpg,val\n")
    assert "1 x 3" in run("select", both, "-o", tmp_path / "d.h5", "--split", tmp_path / "split.csv", "val")
    assert "say which rows" in run("select", both, "-o", tmp_path / "e.h5", code=2)
    data = bytearray(both.read_bytes())
    data[Store.open(both).matrices[""].offset] ^= 1
    both.write_bytes(data)
    assert "embeddings rows 0:3: its SHA-256 does not match" in run("verify", one, both, code=1)
