from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import embedkit as ek
from embedkit import ImageError
from embedkit.images import Region
from embedkit.sources import Listing, content_sha256, list_folder, list_manifest


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogateescape")
    return path


def listed(listing: Listing) -> list[tuple[str, str | None]]:
    return [(file.id, file.label) for file in listing.files]


def failed(listing: Listing) -> list[tuple[str, str]]:
    return [(failure.id, failure.kind) for failure in listing.failures]


def refused(path: Path, **options: Any) -> str:
    """Return why a manifest as a whole cannot be listed."""
    with pytest.raises(ImageError) as caught:
        list_manifest(path, **options)
    assert caught.value.id == os.fspath(path)
    assert caught.value.kind in ("damaged", "empty", "missing", "refused", "unsupported", "not-an-image")
    return caught.value.reason


def save(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Write a table of the kind that its name says."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
    elif path.suffix == ".jsonl":
        write(path, *(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows(rows)
    return path


def facts(listing: Listing) -> list[tuple[str, str | None, tuple[int, int], bytes]]:
    """Return all that a store would keep of a listing."""
    return [(file.id, file.label, file.status(), content_sha256(file.read())) for file in listing.files]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_manifest_of_a_folder_is_the_folder(tmp_path: Path, photos: Path, suffix: str) -> None:
    folder = list_folder(photos)
    rows = [(file.id, file.label) for file in reversed(folder.files)]
    listing = list_manifest(save(tmp_path / f"m{suffix}", ["path", "label"], rows), root=photos)
    assert facts(listing) == facts(folder)
    assert (listing.root, listing.classes, listing.failures, listing.ignored) == (photos, ["cat", "dog"], [], 0)


def test_a_manifest_of_real_flowers_is_the_folder(flowers: Path) -> None:
    folder, listing = list_folder(flowers), list_manifest(flowers / "split.csv")
    assert len(listing.files) == 3670
    assert listing.classes == folder.classes
    assert listed(listing) == listed(folder)
    for number in range(0, 3670, 50):
        assert listing.files[number].read() == folder.files[number].read()
        assert listing.files[number].status() == folder.files[number].status()
    parts = [list_manifest(flowers / "split.csv", split=name) for name in ("train", "val")]
    assert sorted(file.id for part in parts for file in part.files) == sorted(file.id for file in folder.files)


def test_a_store_of_a_manifest_is_that_of_the_folder(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    backbone = ek.Backbone.load(str(tiny_backbone))
    rows = [(file.label, os.fspath(photos / file.id)) for file in reversed(list_folder(photos).files)]
    manifest = list_manifest(save(tmp_path / "m.csv", ["class", "image"], rows), root=photos)
    stores = [
        ek.extract(source, tmp_path / f"{name}.h5", backbone) for name, source in (("f", photos), ("m", manifest))
    ]
    assert stores[0].content_id == stores[1].content_id


def test_entries_are_a_sequence_sorted_by_the_bytes_of_their_ids(tmp_path: Path) -> None:
    names = ["b.jpg", "a/2.jpg", "a-b.jpg", "Ä.jpg", "\udcff.jpg", "\uffff.jpg", "\U0001f33b.jpg", "B.jpg"]
    rows = [f"{name},{number}" for number, name in enumerate(names)]
    listing = list_manifest(write(tmp_path / "m.csv", "path,label", *rows))
    expected = sorted(names, key=os.fsencode)
    assert listed(listing) == [(name, str(names.index(name))) for name in expected]
    assert listing.files[-1].id == expected[-1]
    assert [file.id for file in listing.files[2:5]] == expected[2:5]
    with pytest.raises(IndexError):
        listing.files[len(names)]


# --- Columns


@pytest.mark.parametrize(
    "name", ["path", "image", "Image Path", "FILE", "file_name", "filename", "img-path", "filepath"]
)
def test_columns_are_found_by_their_usual_names(tmp_path: Path, name: str) -> None:
    for label in ("label", "Class", "category", "target", "class_name", "species", "labels", "Categories", "tags"):
        assert listed(list_manifest(write(tmp_path / "m.csv", f"x,{label},{name}", "1,cat,a.jpg"))) == [
            ("a.jpg", "cat")
        ]


def test_columns_that_are_named_come_first(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path,where,label,genus,id", "x,a.jpg,y,rosa,7")
    assert listed(list_manifest(path, columns={"path": "where", "label": "genus"})) == [("7", "rosa")]
    assert listed(list_manifest(path, columns={"label": "", "id": ""})) == [("x", None)]


@pytest.mark.parametrize(
    ("header", "options", "reason"),
    [
        ("image,file,x", {}, "several columns could be the path: 'image', 'file'; choose one: --columns path=image"),
        ("path,label,species", {}, "several columns could be the label: 'label', 'species'; choose one: --columns "
                                   "label=label, or none: --columns label="),
        ("path,id,key", {}, "could be the id: 'id', 'key'"),
        ("path,box,bbox", {}, "could be the box: 'box', 'bbox'"),
        ("path,box,x0,y0,x1,y1", {}, "could be the box: 'box', 'x0,y0,x1,y1'; choose one: --columns box=box"),
        ("path,x0,y0,x1,y1,x2,y2", {}, "could be the box: 'x0,y0,x1,y1', 'x1,y1,x2,y2'"),
        ("a.jpg,cat", {}, "no column is called like a path (path, image, imagepath, file, filename, filepath, img, "
                          "imgpath); there are 'a.jpg', 'cat'; name one: --columns path=COLUMN"),
        ("path,label", {"split": "train"}, "no column is called like a split (split, set, subset, partition); "),
        ("path,set,split", {"split": "train"}, "could be the split: 'set', 'split'"),
        ("path,x", {"columns": {"label": "genus"}}, "no column is called 'genus', named for the label; there are "
                                                   "'path', 'x'"),
        ("path,x", {"columns": {"box": "a,b,c,d"}}, "no column is called 'a', named for the box"),
        ("path,x,y", {"columns": {"box": "x,y"}}, "a box has one column or four, not 2: 'x', 'y'"),
        ("path,label,label", {}, "two columns are called 'label'"),
        ("path,path", {}, "two columns are called 'path'"),
    ],
)  # fmt: skip
def test_doubts_about_columns_are_errors(tmp_path: Path, header: str, options: Any, reason: str) -> None:
    path = write(tmp_path / "m.csv", header, ",".join("x" * (header.count(",") + 1)))
    assert reason in refused(path, **options)


def test_columns_that_are_not_read_may_be_in_doubt(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path,set,split,note,note", "a.jpg,,,x,y")
    assert listed(list_manifest(path)) == [("a.jpg", None)]


def test_many_columns_are_not_all_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", ",".join(f"column{number}" for number in range(500)))
    assert len(refused(path)) < 600


def test_unknown_roles_and_formats_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path", "a.jpg")
    assert "columns for path, id, label, split, box, not for colour" in refused(path, columns={"colour": "path"})
    with pytest.raises(ValueError, match="box_format is one of xyxy, xywh, got 'yxyx'"):
        list_manifest(path, box_format="yxyx")


# --- Rows


def test_empty_tables_are_errors(tmp_path: Path) -> None:
    assert "is empty" in refused(write(tmp_path / "m.csv"))
    assert "has columns and no rows" in refused(write(tmp_path / "m.csv", "path,label"))
    assert "no such file" in refused(tmp_path / "gone.csv")
    assert "is no table" in refused(write(tmp_path / "m.txt"))


def test_numbers_are_classes_and_nothing_is_none(tmp_path: Path) -> None:
    lines = ['{"path": "a", "label": 10}', '{"path": "b", "label": 9.0}', '{"path": "c", "label": null}',
             '{"path": "d"}', '{"path": "e", "label": ""}', '{"path": "f", "label": true}']  # fmt: skip
    listing = list_manifest(write(tmp_path / "m.jsonl", *lines))
    assert listed(listing) == [("a", "10"), ("b", "9"), ("c", None), ("d", None), ("e", None), ("f", "true")]
    assert listing.classes == ["10", "9", "true"]
    assert list_manifest(write(tmp_path / "m.csv", "path,label", "a,", "b,")).classes == []


def test_several_labels_in_a_row_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", '{"path": "a", "labels": 1, "label": "x"}', '{"path": "b", "label": ["x", "y"]}')
    reason = "holds several values, not one text or number; name another: --columns label=COLUMN, or none: --columns "
    assert refused(path) == f"line 2: the column 'label' {reason}label="
    assert listed(list_manifest(path, columns={"label": ""})) == [("a", None), ("b", None)]
    path = write(tmp_path / "m.jsonl", '{"path": "a", "labels": "x"}', '{"path": "b", "labels": ["x", "y"]}')
    assert refused(path) == f"line 2: the column 'labels' {reason}label="


def test_parquet_with_nulls(tmp_path: Path) -> None:
    rows = [("a.jpg", 1, None), (None, 2, [1.0, 2.0, 3.0, 4.0]), ("c.jpg", None, [1.0, 2.0, 3.0, 4.0])]
    listing = list_manifest(save(tmp_path / "m.parquet", ["path", "label", "bbox"], rows))
    assert listed(listing) == [("a.jpg", "1"), ("c.jpg#xywh=1,2,2,2", None)]
    assert [str(failure) for failure in listing.failures] == ["m.parquet#row=2: it names no path"]


def test_a_split_takes_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path,split,label", "a,train,x", "b,test,y", "../c,test,z", "d,train,x", "e,,")
    assert listed(list_manifest(path, split="train")) == [("a", "x"), ("d", "x")]
    listing = list_manifest(path, split="test")
    assert (listed(listing), listing.classes, len(listing.failures)) == ([("b", "y")], ["y"], 1)
    assert len(list_manifest(path).files) == 4
    assert refused(path, split="val") == (
        "no rows of the split 'val'; it has 'train' (2 rows), 'test' (2 rows), none (1 rows)"
    )


def test_the_same_path_twice_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path,key,n", "b.jpg,1,1", "a.jpg,2,1", "c.jpg,3,2", "./a.jpg,4,3")
    assert listed(list_manifest(path)) == [("1", None), ("2", None), ("3", None), ("4", None)]
    assert refused(path, columns={"id": ""}) == (
        "lines 3 and 5 both name 'a.jpg'; keep one of them, or name a column of ids: --columns id=COLUMN"
    )
    assert refused(path, columns={"id": "n"}) == (
        "lines 2 and 3 have the same n '1'; name another column of ids, or none: --columns id="
    )


def test_an_id_of_its_own_is_kept_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "z.jpg").write_bytes(b"zed")
    (tmp_path / "y.jpg").write_bytes(b"why")
    lines = ['{"id": 2, "path": "y.jpg", "label": "b"}', '{"id": 10, "path": "z.jpg", "label": "a"}']
    listing = list_manifest(write(tmp_path / "m.jsonl", *lines))
    assert [(file.id, file.label, file.read()) for file in listing.files] == [("10", "a", b"zed"), ("2", "b", b"why")]


@pytest.mark.parametrize(
    ("id", "kind"),
    [("", "missing"), ("../x", "refused"), ("/etc/passwd", "refused"), ("a\0b", "refused"), ("x" * 4097, "refused"),
     ("\ud800", "refused"), ("é" * 2049, "refused")],
)  # fmt: skip
def test_an_id_that_a_store_cannot_hold_is_a_bad_row(tmp_path: Path, id: str, kind: str) -> None:
    lines = [json.dumps({"id": id, "path": "a.jpg"}), '{"id": "good", "path": "a.jpg"}']
    listing = list_manifest(write(tmp_path / "m.jsonl", *lines))
    assert (listed(listing), failed(listing)) == ([("good", None)], [("m.jsonl#line=1", kind)])
    assert len(listing.failures[0].reason) < 400 and "\n" not in listing.failures[0].reason


@pytest.mark.parametrize("label", ["\ud800", "a\0b", "x" * 4097])
def test_a_class_that_a_store_cannot_hold_is_a_bad_row(tmp_path: Path, label: str) -> None:
    lines = [json.dumps({"label": label, "path": "a.jpg"}), '{"label": "good", "path": "b.jpg"}']
    listing = list_manifest(write(tmp_path / "m.jsonl", *lines))
    assert (listed(listing), failed(listing)) == ([("b.jpg", "good")], [("m.jsonl#line=1", "refused")])
    assert listing.classes == ["good"]


def test_the_name_of_a_bad_row_is_no_images(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path", "../x.jpg", "m.csv#line=2")
    assert "has the id 'm.csv#line=2', that of a bad row" in refused(path)


def test_when_no_row_is_good_the_first_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path", *(f"/elsewhere/{number}.jpg" for number in range(5000)))
    reason = refused(path)
    assert reason.startswith("none of 1,000 rows can be used; the first: m.csv#line=2: '/elsewhere/0.jpg' is not be")
    assert reason.endswith("--root")


# --- Paths


def test_paths_are_relative_to_the_manifest_or_to_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "lists" / "m.csv", "path", "1.jpg", "./a//2.jpg", "a/./3.jpg")
    for folder in (tmp_path / "lists", tmp_path / "images"):
        (folder / "a").mkdir(parents=True, exist_ok=True)
        for name in ("1.jpg", "a/2.jpg", "a/3.jpg"):
            (folder / name).write_text(folder.name + name)
    monkeypatch.chdir(path.parent)
    expected = ["1.jpg", "a/2.jpg", "a/3.jpg"]
    for given, root, name in (
        (path, None, "lists"), (Path("m.csv"), None, "lists"), (path, "../images", "images"), (path, ".", "lists"),
    ):  # fmt: skip
        listing = list_manifest(given, root=root)
        assert [(file.id, file.read()) for file in listing.files] == [(id, (name + id).encode()) for id in expected]


def test_absolute_paths_below_the_root_are_relative_ones(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.jpg").write_bytes(b"one")
    (tmp_path / "door").symlink_to(root)
    for named in (root, tmp_path / "door"):
        for written in {named, root}:
            path = write(tmp_path / "m.csv", "path", f"/{written}//a/1.jpg")
            (image,) = list_manifest(path, root=named).files
            assert (image.id, image.read()) == ("a/1.jpg", b"one")


def test_what_is_not_below_the_root_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (tmp_path / "images-beside").mkdir()
    write(root / "good.jpg", "x")
    paths = ["../x.jpg", "a/../good.jpg", "..", f"{tmp_path}/images-beside/1.jpg", "/etc/passwd", f"{root}/../x.jpg",
             "https://example.org/1.jpg", ".", str(root), f"{root}/", "x" * 5000, "good.jpg"]  # fmt: skip
    listing = list_manifest(write(tmp_path / "m.csv", "path", *paths), root=root)
    assert listed(listing) == [("good.jpg", None)]
    reasons = {failure.id: (failure.kind, failure.reason) for failure in listing.failures}
    assert len(reasons) == len(paths) - 1
    assert reasons["m.csv#line=2"] == (
        "refused", "'../x.jpg' climbs with ..; write it relative to one folder, and name that: --root",
    )  # fmt: skip
    assert reasons["m.csv#line=6"] == (
        "refused", f"'/etc/passwd' is not below {root}; name the folder that it is below: --root",
    )  # fmt: skip
    assert "is a URL" in reasons["m.csv#line=8"][1]
    assert [reasons[f"m.csv#line={line}"][0] for line in (3, 4, 5, 7, 9, 12)] == [
        "refused", "refused", "refused", "refused", "not-an-image", "refused",
    ]  # fmt: skip
    assert all("\n" not in reason and len(reason) < 500 for _, reason in reasons.values())


def test_links_out_of_the_root_are_never_opened_unless_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write(tmp_path / "images-beside" / "secret.jpg", "secret")
    write(root / "good.jpg", "good")
    (root / "out.jpg").symlink_to("../images-beside/secret.jpg")
    (root / "folder").symlink_to(tmp_path / "images-beside")
    (root / "within.jpg").symlink_to("good.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    names = ["folder/secret.jpg", "good.jpg", "out.jpg", "self.jpg", "within.jpg"]
    path = write(tmp_path / "m.csv", "path", *names)
    found: dict[str, bytes | str] = {}
    for image in list_manifest(path, root=root).files:
        try:
            found[image.id] = bytes(image.read())  # type: ignore[arg-type]
        except ImageError as error:
            assert error.id == image.id
            found[image.id] = error.kind
    assert found == {
        "folder/secret.jpg": "refused", "good.jpg": b"good\n", "out.jpg": "refused", "self.jpg": "unreadable",
        "within.jpg": b"good\n",
    }  # fmt: skip
    with pytest.raises(ImageError, match=r"a symbolic link out of the folder, to .*--follow-links follows it"):
        list_manifest(path, root=root).files[2].read()
    followed = list_manifest(path, root=root, follow_links=True)
    assert (followed.files[0].read(), followed.files[2].read()) == (b"secret\n", b"secret\n")


def test_a_root_that_is_no_folder_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path", "a.jpg")
    with pytest.raises(ImageError, match=r"gone: no such folder; the root of a manifest"):
        list_manifest(path, root=tmp_path / "gone")
    with pytest.raises(ImageError, match=r"m\.csv: is a file; the root of a manifest"):
        list_manifest(path, root=path)


def test_what_is_no_file_fails_when_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    write(tmp_path / "large.jpg", "12345")
    path = write(tmp_path / "m.csv", "path", "pipe.jpg", "gone.jpg", "large.jpg", "a\\gone.jpg", '"name\nx"')
    kinds = {}
    for image in list_manifest(path, max_bytes=5).files:
        with pytest.raises(ImageError) as caught:
            image.read()
        kinds[image.id] = caught.value.kind
        if "\\" in image.id:
            assert "folders end with /" in caught.value.reason
    assert kinds == {"pipe.jpg": "not-an-image", "gone.jpg": "missing", "large.jpg": "too-large",
                     "a\\gone.jpg": "missing", "name\nx": "missing"}  # fmt: skip
    assert list_manifest(path).files[1].status() == (0, -1)


# --- Boxes


@pytest.mark.parametrize(
    ("columns", "values", "options"),
    [
        (["box"], ["10 20 40 60"], {}),
        (["BBox"], ["[10, 20, 40, 60]"], {}),
        (["bbox"], [[10, 20, 40, 60]], {}),
        (["bbox"], [[10.0, 20.0, 30.0, 40.0]], {"box_format": "xywh"}),
        (["bbox_xywh"], [[10, 20, 30, 40]], {}),
        (["bbox_xywh"], [[10, 20, 40, 60]], {"box_format": "xyxy"}),
        (["x0", "y0", "x1", "y1"], [10, 20, 40, 60], {}),
        (["x1", "y1", "x2", "y2"], [10, 20, 40, 60], {}),
        (["y1", "x1", "y2", "x2"], [20, 10, 60, 40], {}),
        (["left", "top", "right", "bottom"], [10, 20, 40, 60], {}),
        (["x_min", "y_min", "x_max", "y_max"], [10, 20, 40, 60], {}),
        (["x", "y", "w", "h"], [10, 20, 30, 40], {}),
        (["x", "y", "width", "height"], [10, 20, 30, 40], {}),
        (["a", "b", "c", "d"], [10, 20, 40, 60], {"columns": {"box": "a, b, c, d"}}),
        (["region"], ["10 20 40 60"], {"columns": {"box": "region"}}),
        (["a,b"], ["10 20 40 60"], {"columns": {"box": "a,b"}}),
    ],
)
def test_boxes_are_found_as_people_write_them(
    tmp_path: Path, columns: list[str], values: list[Any], options: Any
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"whole")
    for suffix in (".jsonl", ".csv"):
        path = save(tmp_path / f"m{suffix}", ["path", *columns], [["a.jpg", *values]])
        (image,) = list_manifest(path, **options).files
        assert image.id == "a.jpg#xywh=10,20,30,40"
        assert image.read() == Region(b"whole", (10, 20, 40, 60))


def test_boxes_of_one_image_are_images_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    lines = ["a.jpg,cat,0 0 9 9", "a.jpg,dog,5 5 9 9", "a.jpg,,", "b.jpg,cat,0 0 9 9"]
    listing = list_manifest(write(tmp_path / "m.csv", "path,label,box", *lines))
    assert listed(listing) == [
        ("a.jpg", None), ("a.jpg#xywh=0,0,9,9", "cat"), ("a.jpg#xywh=5,5,4,4", "dog"), ("b.jpg#xywh=0,0,9,9", "cat"),
    ]  # fmt: skip
    assert listing.files[0].read() == b"a"
    assert listing.files[2].read() == Region(b"a", (5, 5, 9, 9))
    assert len({content_sha256(file.read()) for file in listing.files[:3]}) == 3


def test_a_column_of_paths_may_be_the_ids_of_boxes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    path = write(tmp_path / "m.csv", "path,box", "./a.jpg,0 0 9 9", "b.jpg,")
    listing = list_manifest(path, columns={"id": "path"})
    assert [file.id for file in listing.files] == ["a.jpg", "b.jpg"]
    assert listing.files[0].read() == Region(b"a", (0, 0, 9, 9))


def test_the_same_box_twice_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path,box", "a.jpg,0 0 9 9", "a.jpg,0 0 9.1 9")
    assert refused(path).startswith("lines 2 and 3 both name 'a.jpg#xywh=0,0,9,9'")


def test_a_bad_box_costs_its_row_and_names_the_line(tmp_path: Path) -> None:
    lines = ['{"path": "a", "box": [1, 2, 3]}', '{"path": "a", "box": [9, 9, 1, 1]}', '{"path": "a", "box": "0 0 5 5"}']
    listing = list_manifest(write(tmp_path / "m.jsonl", *lines))
    assert [file.id for file in listing.files] == ["a#xywh=0,0,5,5"]
    assert [str(failure) for failure in listing.failures] == [
        "m.jsonl#line=1: a: a box has 4 numbers, not 3: [1, 2, 3]",
        "m.jsonl#line=2: a: a box from 9,9 to 1,1 holds nothing; if 1,1 is its size, say --box-format xywh",
    ]
    assert {failure.kind for failure in listing.failures} == {"damaged"}


def test_another_box_under_the_same_id_has_another_status(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")

    def status(box: str) -> tuple[int, int]:
        return list_manifest(write(tmp_path / "m.csv", "path,id,box", f"a.jpg,7,{box}")).files[0].status()

    assert status("0 0 5 5") == status("0 0 5 5") != status("0 0 5 6")
    assert status("0 0 5 5") != status("")
    (tmp_path / "a.jpg").unlink()
    assert status("0 0 5 5") == (0, -1)
