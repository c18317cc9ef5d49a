"""Rows that cannot be used: each costs itself alone, and says which image it is about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import embedkit as ek
from embedkit import ImageError
from embedkit.sources import list_manifest


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogateescape")
    return path


def test_a_broken_line_is_a_failure_and_the_others_are_images(tmp_path: Path) -> None:
    lines = ["path,label", "a.jpg,cat", "b.jpg,cat,dog", '"c.jpg,cat', "d.jpg,ox", "e.jpg"]
    listing = list_manifest(write(tmp_path / "m.csv", *lines))
    assert [(file.id, file.label) for file in listing.files] == [("a.jpg", "cat"), ("d.jpg", "ox")]
    assert [(failure.id, failure.kind) for failure in listing.failures] == [
        ("m.csv#line=3", "damaged"), ("m.csv#line=4", "damaged"), ("m.csv#line=6", "damaged"),
    ]  # fmt: skip
    lines = ['{"path": "a.jpg"}', '{"path": "b.jpg', '{"path": "c.jpg"}']
    listing = list_manifest(write(tmp_path / "m.jsonl", *lines))
    assert [file.id for file in listing.files] == ["a.jpg", "c.jpg"]
    assert [(failure.id, failure.kind) for failure in listing.failures] == [("m.jsonl#line=2", "damaged")]


def test_a_table_of_broken_lines_only_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path,label", *["a.jpg;cat"] * 3000)
    with pytest.raises(ImageError) as caught:
        list_manifest(path)
    assert caught.value.id == os.fspath(path) and caught.value.kind == "damaged"
    assert caught.value.reason.startswith("none of 1,000 rows can be used; the first: m.csv#line=2: 1 value for 2 col")


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("photos/x.jpg", '"50,50,-10,10"', "photos/x.jpg: a box from 50,50 to -10,10 holds nothing"),
        ("photos/x.jpg", '"1,2,3"', "photos/x.jpg: a box has 4 numbers, not 3: '1,2,3'"),
        ('"line\nbreak.jpg"', '"1,2,3"', r"line\nbreak.jpg: a box has 4 numbers, not 3: '1,2,3'"),
        ("x" * 300, "1", f"{'x' * 200}: a box has 4 numbers, not 1: '1'"),
    ],
)  # fmt: skip
def test_a_bad_box_names_its_image(tmp_path: Path, name: str, row: str, reason: str) -> None:
    listing = list_manifest(write(tmp_path / "m.csv", "path,box", f"{name},{row}", "good.jpg,"))
    assert [failure.reason for failure in listing.failures] == [reason]


def test_a_bad_class_and_a_bad_id_name_their_image(tmp_path: Path) -> None:
    lines = [r'{"path": "a.jpg", "id": "1", "label": "ro\u0000se"}', '{"path": "b.jpg", "id": "../2"}',
             r'{"path": "c.jpg", "id": "3", "label": "\ud83c"}', '{"path": "d.jpg", "id": "4"}']  # fmt: skip
    listing = list_manifest(write(tmp_path / "m.jsonl", *lines))
    assert [file.id for file in listing.files] == ["4"]
    assert [failure.reason for failure in listing.failures] == [
        r"a.jpg: a class has no NUL: 'ro\x00se'", "b.jpg: '../2': this id points out of its root",
        r"c.jpg: '\ud83c' is no text that a class can have",
    ]  # fmt: skip


def test_a_store_has_the_good_rows_and_the_bad_ones(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    path = write(tmp_path / "m.csv", "path,label", "cat/1.jpg,cat", "cat/2.jpg", "dog/1.jpg,dog")
    store = ek.extract(list_manifest(path, root=photos), tmp_path / "m.h5", ek.Backbone.load(str(tiny_backbone)))
    assert store.ids == ["cat/1.jpg", "dog/1.jpg"]
    assert [(failure.id, failure.kind) for failure in store.failures] == [("m.csv#line=3", "damaged")]
