from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit.errors import EvaluationError
from embedkit.evaluation.splits import Split
from embedkit.finetuning.dividing import divide, own_split
from embedkit.finetuning.examples import leaks_across
from embedkit.sources import ImageFile, Listing, list_images
from embedkit.spec import EmbeddingSpec
from embedkit.store import Store, StoreWriter

PETS = ("cat", "dog", "eel")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten files a class, no two of them equal but two of the cats."""
    for name in PETS:
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            content = f"{name} {3 if (name, number) == ('cat', 7) else number}"
            (tmp_path / "pets" / name / f"{number}.jpg").write_text(content)
    return tmp_path / "pets"


def split_file(path: Path, *lines: str, header: str = "path,split") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_a_fifth_of_each_class_is_held_out_and_copies_stay_together(folder: Path) -> None:
    sides = set()
    for seed in range(12):
        division = divide(list_images(folder), seed=seed)
        assert division.made and division.test is division.val and division.classes == list(PETS)
        assert np.bincount(division.train.codes).min() >= 7 and np.bincount(division.val.codes).min() >= 2
        assert not set(division.train.ids) & set(division.val.ids)
        assert len(division.train) + len(division.val) == 30
        copies = {"cat/3.jpg", "cat/7.jpg"}
        assert copies <= set(division.train.ids) or copies <= set(division.val.ids)
        sides.add(copies <= set(division.val.ids))
        assert all(
            entry.id.startswith(PETS[code])
            for entry, code in zip(division.val.entries, division.val.codes, strict=True)
        )
    assert sides == {True, False}


def test_a_class_too_small_to_hold_out_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "lonely").mkdir()
    (folder / "lonely" / "one.jpg").write_text("nothing like it")
    division = divide(list_images(folder))
    assert division.classes.index("lonely") not in division.val.codes
    assert "a class is too small to hold an image out of it, such as 'lonely'" in caplog.text


def test_equal_seeds_draw_equal_lots(folder: Path) -> None:
    one, same, other = (divide(list_images(folder), seed=seed) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256


def test_the_split_is_recorded_as_the_probe_reads_it(folder: Path, tmp_path: Path) -> None:
    division = divide(list_images(folder))
    division.write(tmp_path / "split.csv")
    read = Split.read(tmp_path / "split.csv")
    assert read == division.split(tmp_path / "split.csv")
    assert read.labels is not None and read.labels["eel/0.jpg"] == "eel"
    again = divide(list_images(folder), tmp_path / "split.csv")
    assert again.sha256 == division.sha256 and not again.made


def test_a_split_file_decides_parts_and_classes(folder: Path, tmp_path: Path) -> None:
    rows = [f"{name}/{n}.jpg,{('train', 'valid', 'test')[n % 3]},{name[0]}" for name in PETS for n in range(6)]
    split = split_file(tmp_path / "s.csv", *rows, header="path,split,label")
    division = divide(list_images(folder), split)
    assert division.classes == ["c", "d", "e"] and division.left_out == 12
    assert [part.name for part in division.parts] == ["train", "valid", "test"]
    assert division.train.ids == sorted(f"{name}/{n}.jpg" for name in PETS for n in (0, 3))
    assert division.test.codes.tolist() == [0, 0, 1, 1, 2, 2]
    two = divide(list_images(folder), split, val_split="test")
    assert two.test is two.val and two.val.name == "test"
    assert "6 images in valid" in division.to_text() and "12 left out" in division.to_text()


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["cat/1.jpg,train", "dog/1.jpg,train", "cat/99.jpg,val"], {}, "'cat/99.jpg'"),
        (["cat/1.jpg,train", "dog/1.jpg,train"], {}, "no split named val, valid, validation, test"),
        (["cat/1.jpg,train", "dog/1.jpg,val"], {}, "all training images are of the class 'cat'"),
        (["cat/1.jpg,train", "dog/1.jpg,train", "eel/1.jpg,val"], {}, r"no training image has: 'eel' \(1\)"),
        (["cat/1.jpg,a", "dog/1.jpg,a"], {}, "has no rows of the split 'train'"),
        (["cat/1.jpg,train", "dog/1.jpg,train", "cat/2.jpg,val"], {"val_split": "train"}, "is trained on"),
        (["cat/1.jpg,train", "dog/1.jpg,train", "cat/2.jpg,val"], {"test_split": "x"}, "--test-split"),
    ],
)
def test_splits_that_cannot_be_used_say_why(
    folder: Path, tmp_path: Path, lines: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        divide(list_images(folder), split_file(tmp_path / "s.csv", *lines), **options)


def test_images_without_classes_say_what_to_do(tmp_path: Path) -> None:
    files = [ImageFile(f"{n}.jpg", "") for n in range(4)]
    with pytest.raises(EvaluationError, match="a folder for each class"):
        divide(Listing("plain", files, [], [], 0))
    labelled = [ImageFile("a.jpg", "", "cat"), ImageFile("b.jpg", "", "dog")]
    with pytest.raises(EvaluationError, match="no class has two different images"):
        divide(Listing("few", labelled, ["cat", "dog"], [], 0))
    with pytest.raises(EvaluationError, match="go with a split file"):
        divide(Listing("few", labelled, ["cat", "dog"], [], 0), val_split="val")


def test_unlabelled_rows_are_left_out_and_counted() -> None:
    files = [ImageFile(f"{n}.jpg", "", ("cat", "dog", None)[n % 3]) for n in range(30)]
    division = divide(Listing("some", files, ["cat", "dog"], [], 0))
    assert division.left_out == 10 and len(division.train) + len(division.val) == 20


def test_images_that_cannot_be_read_leave_every_part(folder: Path) -> None:
    division = divide(list_images(folder))
    gone = {division.train.ids[0], division.val.ids[-1]}
    rest = division.without(gone)
    assert len(rest.train) == len(division.train) - 1 and len(rest.val) == len(division.val) - 1
    assert rest.test is rest.val and gone.isdisjoint(rest.train.ids + rest.val.ids)
    assert division.without(["somebody/else.jpg"]) is division
    with pytest.raises(EvaluationError, match="no training image of the class 'cat'"):
        division.without(id for id in division.train.ids if id.startswith("cat"))
    with pytest.raises(EvaluationError, match="no image of the part 'val'"):
        division.without(division.val.ids)


def test_pictures_on_both_sides_are_reported(folder: Path, tmp_path: Path) -> None:
    division = divide(list_images(folder), seed=0)
    x = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=16)
    ids = [entry.id for entry in division.listing.files]
    train, val = division.train.ids[4], division.val.ids[2]
    x[ids.index(val)] = 1.001 * x[ids.index(train)]
    with StoreWriter(tmp_path / "pets.h5", spec) as writer:
        writer.append(x, ids, labels=[id.partition("/")[0] for id in ids])
        writer.finalise()
    leaks = leaks_across(division, Store.open(tmp_path / "pets.h5"), "split.csv")
    assert list(leaks) == ["val"] and leaks["val"].near == 1 and leaks["val"].exact == 0
    assert (leaks["val"].pairs[0].train_id, leaks["val"].pairs[0].test_id) == (train, val)


def test_a_table_with_a_column_of_splits_is_divided_as_it_says(folder: Path, tmp_path: Path) -> None:
    rows = [(name, number, "val" if number % 5 == 0 else "train") for name in PETS for number in range(9)]
    lines = [f"{name}/{number}.jpg,{name},{part},web" for name, number, part in rows]
    table = split_file(tmp_path / "pets.csv", *lines, "cat/9.jpg,cat,,web", header="path,class,split,source")
    objects = [f'{{"file": "{name}/{number}.jpg", "label": "{name}", "set": "{part}"}}' for name, number, part in rows]
    other = split_file(tmp_path / "pets.jsonl", *objects[1:], header=objects[0])
    for path in (table, other):
        listing = list_images(path, root=folder)
        found = own_split(path, listing, root=folder)
        assert found is not None and len(found.parts) == 27
        division = divide(listing, found)
        assert not division.made and division.classes == list(PETS)
        assert (len(division.train), len(division.val)) == (21, 6)
        assert division.val.ids[:2] == ["cat/0.jpg", "cat/5.jpg"]
    few = list_images(table, root=folder, include=["cat/*", "dog/*"])
    assert divide(few, own_split(table, few, root=folder)).classes == ["cat", "dog"]


def test_a_table_whose_splits_are_unknown_is_not_divided_by_lot(folder: Path, tmp_path: Path) -> None:
    lines = [f"{name}/{number}.jpg,{name},fold{number % 3}" for name in PETS for number in range(9)]
    table = split_file(tmp_path / "pets.csv", *lines, header="path,label,split")
    listing = list_images(table, root=folder)
    found = own_split(table, listing, root=folder)
    with pytest.raises(EvaluationError, match=r"no rows of the split 'train'.*'fold0' \(9 rows\).*--columns split="):
        divide(listing, found)
    assert len(divide(listing, found, train_split="fold0", val_split="fold1").val) == 9
    assert own_split(table, listing, root=folder, columns={"split": ""}) is None


def test_what_names_no_splits_has_none(folder: Path, tmp_path: Path) -> None:
    listing = list_images(folder)
    for name, header in (("a.csv", "path,label"), ("b.csv", "path,label,split")):
        table = split_file(tmp_path / name, "cat/1.jpg,cat" + "," * (header.count(",") - 1), header=header)
        assert own_split(table, listing, root=folder) is None
    for images in (tmp_path / "missing.csv", [1], folder, "pets=pets.csv"):
        assert own_split(images, listing) is None


def test_classes_that_are_numbers_or_several_labels_are_noticed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [f"{name}/{number}.jpg" for name in PETS for number in range(9)]
    for name, label in (
        ("n", lambda k: str(k % 3 / 4)),
        ("s", lambda k: ("red", "red;round")[k % 2]),
        ("c", lambda k: str(k % 2)),
    ):
        split_file(tmp_path / f"{name}.csv", *(f"{id},{label(k)}" for k, id in enumerate(ids)), header="path,target")
    with pytest.raises(EvaluationError, match=r"the classes are numbers such as 0.25, and fine-tuning learns classes"):
        divide(list_images(tmp_path / "n.csv", root=folder))
    assert divide(list_images(tmp_path / "c.csv", root=folder)).classes == ["0", "1"] and not caplog.text
    divide(list_images(tmp_path / "s.csv", root=folder))
    assert "1 of 2 classes look like several labels, such as 'red;round'" in caplog.text
