"""Merging and selecting: new stores of rows that lie in others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from embedkit import EmbeddingSpec, EvaluationError, SpecMismatchError, Store, StoreExistsError, StoreFormatError
from embedkit.cli import main
from embedkit.store import StoreWriter, matching, verify

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
            writer.fail(id, "truncated")
        writer.finalise()
    return Store.open(path)


def test_a_merge_is_the_store_of_all_the_images(tmp_path: Path) -> None:
    one = write(tmp_path / "1.h5", {"b": "b", "d": "d"}, labels=["x", "y"], failures=("f", "c"))
    two = write(tmp_path / "2.h5", {"a": "a", "c": "c"}, labels=["z", "x"], failures=("e",))
    merged = Store.merge([one, two], tmp_path / "merged.h5")
    whole = write(tmp_path / "whole.h5", dict(zip("abcd", "abcd", strict=True)), labels=list("zxxy"))
    assert merged.content_id == whole.content_id and verify(merged.path) == []
    assert [failure.id for failure in merged.failures] == ["e", "f"]  # c was embedded elsewhere
    assert merged.information["merged_from"] == [one.content_id, two.content_id] and merged.root == Path("/photos")


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
    assert len(store.select(tmp_path / "4.h5", [])) == 0
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
