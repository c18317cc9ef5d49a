from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import embedkit as ek
from embedkit import ImageError
from embedkit.images import read_image
from embedkit.sources.datasets.listing import is_dataset_folder, list_dataset, parse_dataset

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
PLAIN = datasets.Features(image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")})


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 1), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(number_of: int, **columns: list[Any]) -> Any:
    """Return a dataset of images without names."""
    images = [{"bytes": png(number), "path": None} for number in range(number_of)]
    return made({"image": images} | columns)


def made(columns: dict[str, list[Any]], **features: Any) -> Any:
    dataset = datasets.Dataset.from_dict(columns)
    for name, feature in ({"image": datasets.Image()} | features).items():
        dataset = dataset.cast_column(name, feature)
    return dataset


def failure(call: Callable[[], object]) -> tuple[str, str, str]:
    with pytest.raises(ImageError) as caught:
        call()
    return caught.value.id, caught.value.reason, caught.value.kind


def test_rows_are_images_under_their_numbers_and_read_as_they_were_stored(tmp_path: Path) -> None:
    rows(12).save_to_disk(tmp_path / "d", num_shards=5)
    listing = list_dataset(tmp_path / "d")
    assert [image.id for image in listing.files] == [f"{number:08d}" for number in range(12)]
    assert [image.read() for image in listing.files] == [png(number) for number in range(12)]
    assert [image.status()[0] for image in listing.files] == [len(png(number)) for number in range(12)]
    assert (listing.root, listing.classes, listing.failures) == (tmp_path / "d", [], [])


def test_splits_are_folders_whether_one_or_all_are_listed(tmp_path: Path) -> None:
    datasets.DatasetDict(train=rows(3), test=rows(2)).save_to_disk(tmp_path / "d")
    everything = [image.id for image in list_dataset(tmp_path / "d").files]
    assert everything == ["test/00000000", "test/00000001", "train/00000000", "train/00000001", "train/00000002"]
    assert [image.id for image in list_dataset(tmp_path / "d", split="test").files] == everything[:2]
    assert failure(lambda: list_dataset(tmp_path / "d", split="dev"))[1] == "no split 'dev'; its splits: test, train"


def test_classes_have_their_names_in_every_split(tmp_path: Path) -> None:
    kinds = datasets.ClassLabel(names=["dog", "cat", "axolotl"])
    images = [{"bytes": png(number), "path": None} for number in range(4)]
    train = made({"image": images, "label": [0, 1, -1, None]}, label=kinds)
    test = made({"image": images[:1], "label": [1]}, label=kinds)
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "d")
    listing = list_dataset(tmp_path / "d")
    assert [image.label for image in listing.files] == ["cat", "dog", "cat", None, None]
    assert listing.classes == ["cat", "dog"]


def test_a_column_that_is_named_gives_the_classes(tmp_path: Path) -> None:
    rows(3, species=["cat", None, "ant"], count=[3, 3, None], share=[0.5, 0.1, 0.2]).save_to_disk(tmp_path / "d")
    assert [image.label for image in list_dataset(tmp_path / "d", label_column="species").files] == ["cat", None, "ant"]
    assert [image.label for image in list_dataset(tmp_path / "d", label_column="count").files] == ["3", "3", None]
    assert [image.label for image in list_dataset(tmp_path / "d").files] == [None, None, None]
    assert failure(lambda: list_dataset(tmp_path / "d", label_column="share"))[2] == "refused"
    assert failure(lambda: list_dataset(tmp_path / "d", label_column="none"))[2] == "missing"


@pytest.mark.parametrize("name", ["a\0", "\ud83c"])
def test_a_class_that_a_store_cannot_hold_costs_its_rows(
    tmp_path: Path, photos: Path, tiny_backbone: Path, name: str
) -> None:
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted((photos / "cat").iterdir())[:3]]
    dataset = made({"image": images, "label": [0, 1, 0]}, label=datasets.ClassLabel(names=["a", "b"]))
    dataset.save_to_disk(tmp_path / "d")
    path = tmp_path / "d" / "dataset_info.json"
    info = json.loads(path.read_text())
    info["features"]["label"]["names"] = ["a", name]
    path.write_text(json.dumps(info))
    listing = list_dataset(tmp_path / "d")
    assert [(image.id, image.label) for image in listing.files] == [("00000000", "a"), ("00000002", "a")]
    assert [(error.id, error.kind) for error in listing.failures] == [("00000001", "refused")]
    assert "class" in listing.failures[0].reason and listing.failures[0].reason.isprintable()
    store = ek.extract(listing, tmp_path / "d.h5", ek.Backbone.load(str(tiny_backbone)))
    assert (store.classes, len(store.failures)) == (["a"], 1)


def test_which_column_is_meant_has_to_be_said_when_there_are_several(tmp_path: Path) -> None:
    images = [{"bytes": png(1), "path": None}]
    other = [{"bytes": png(2), "path": None}]
    kinds = datasets.ClassLabel(names=["a", "b"])
    columns = {"image": images, "mask": other, "fine": [0], "coarse": [1]}
    made(columns, mask=datasets.Image(), fine=kinds, coarse=kinds).save_to_disk(tmp_path / "d")
    assert (
        "several columns of images; name one of its columns: image, mask"
        in failure(lambda: list_dataset(tmp_path / "d"))[1]
    )
    assert (
        "several columns of classes; name one of them: fine, coarse"
        in failure(lambda: list_dataset(tmp_path / "d", image_column="mask"))[1]
    )
    (image,) = list_dataset(tmp_path / "d", image_column="mask", label_column="coarse").files
    assert (image.read(), image.label) == (png(2), "b")
    assert "no column of images" in failure(lambda: list_dataset(_saved(tmp_path / "e", {"x": [1]})))[1]
    assert failure(lambda: list_dataset(tmp_path / "e", image_column="x"))[2] == "not-an-image"


def _saved(folder: Path, columns: dict[str, list[Any]]) -> Path:
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (["b/2.png", "a/1.png"], ["a/1.png", "b/2.png"]),
        (["/home/ada/2.png", "/home/bob/1.png"], ["1.png", "2.png"]),
        (["/home/ada/1.png", "/home/bob/1.png"], None),
        (["1.png", "1.png"], None),
        (["1.png", None], None),
        (["1.png", "../2.png"], None),
        (["1.png", "a//2.png"], None),
        (["1.png", "hf://datasets/2.png"], None),
    ],
)
def test_file_names_are_ids_where_each_row_has_its_own(
    tmp_path: Path, paths: list[str | None], ids: list[str] | None
) -> None:
    images = [{"bytes": png(number), "path": path} for number, path in enumerate(paths)]
    # Images proper are saved without the folders of their paths.
    datasets.Dataset.from_dict({"image": images}, features=PLAIN).save_to_disk(tmp_path / "d")
    listing = list_dataset(tmp_path / "d")
    assert [image.id for image in listing.files] == (ids or ["00000000", "00000001"])
    # Sorted, and still each the image of its row.
    assert [image.read() for image in listing.files] == ([png(1), png(0)] if ids else [png(0), png(1)])


def test_rows_without_an_image_are_failures_under_their_numbers(tmp_path: Path) -> None:
    images = [
        {"bytes": png(0), "path": "a.png"},
        None,
        {"bytes": b"", "path": "c.png"},
        {"bytes": png(3) * 9, "path": "d.png"},
    ]
    made({"image": images, "label": list("abcd")}).save_to_disk(tmp_path / "d")
    listing = list_dataset(tmp_path / "d", label_column="label", max_bytes=200)
    assert [(image.id, image.label) for image in listing.files] == [("a.png", "a")]
    assert [(error.id, error.kind) for error in listing.failures] == [
        ("00000001", "empty"), ("c.png", "empty"), ("d.png", "too-large"),
    ]  # fmt: skip
    assert listing.classes == ["a"]


def test_bytes_of_something_else_are_read_and_left_to_the_decoder(tmp_path: Path) -> None:
    made({"image": [{"bytes": b"no image", "path": None}]}).save_to_disk(tmp_path / "d")
    (image,) = list_dataset(tmp_path / "d").files
    assert image.read() == b"no image"
    with pytest.raises(ImageError, match="not an image"):
        read_image(image.read(), id=image.id)


def test_a_row_may_name_files_of_its_dataset_only(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(7))
    (tmp_path / "d-beside").mkdir()
    (tmp_path / "d-beside" / "x.png").write_bytes(png(7))
    folder = tmp_path / "d"
    names = [
        "own.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "gone.png", "../d-beside/x.png", "",
        "own\0.png",
    ]  # fmt: skip
    images = [{"bytes": None, "path": name} for name in names]
    # Not cast by the package, which would take in what lies at the paths while it saves.
    datasets.Dataset.from_dict({"image": images}, features=PLAIN).save_to_disk(folder)
    (folder / "own.png").write_bytes(png(1))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    files = list_dataset(folder).files
    assert [image.id for image in files] == [f"{row:08d}" for row in range(8)]
    assert files[0].read() == png(1)
    assert files[0].status() == ((folder / "own.png").stat().st_size, (folder / "own.png").stat().st_mtime_ns)
    assert [failure(files[row].read)[2] for row in (1, 2, 3, 5, 6, 7)] == ["refused"] * 6
    assert "secret.png" in failure(files[1].read)[1] and r"own\x00.png" in failure(files[7].read)[1]
    assert [files[row].status() for row in (1, 2, 3, 4, 7)] == [(0, -1)] * 5
    assert "missing" in failure(files[4].read)[1]


def test_a_changed_dataset_has_another_status_and_an_unchanged_one_the_same(tmp_path: Path) -> None:
    rows(2).save_to_disk(tmp_path / "d")
    before = [image.status() for image in list_dataset(tmp_path / "d").files]
    assert before == [image.status() for image in list_dataset(tmp_path / "d").files]
    made({"image": [{"bytes": png(number), "path": None} for number in (1, 0)]}).save_to_disk(tmp_path / "d")
    after = [image.status() for image in list_dataset(tmp_path / "d").files]
    assert {stamp for _, stamp in before}.isdisjoint(stamp for _, stamp in after)


def test_many_threads_read_at_a_time(tmp_path: Path) -> None:
    rows(600).save_to_disk(tmp_path / "d", num_shards=7)
    files = list_dataset(tmp_path / "d").files
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: files[number % 600].read(), range(6000)))
    assert found == [png(number % 600) for number in range(6000)]


def parquet(path: Path, dataset: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)


def test_folders_of_parquet_files_have_the_splits_of_their_names(tmp_path: Path) -> None:
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows(2))
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows(1))
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows(1))
    listing = list_dataset(tmp_path)
    ids = ["test/00000000", "train/00000000", "train/00000001", "train/00000002"]
    assert {image.id: image.read() for image in listing.files} == dict(
        zip(ids, [png(0), png(0), png(1), png(0)], strict=True)
    )
    assert len(list_dataset(tmp_path, config="data", split="test").files) == 1
    assert failure(lambda: list_dataset(tmp_path, config="..")) == ("..", "this id points out of its root", "refused")


def test_parquet_files_that_know_nothing_of_images_will_do(tmp_path: Path) -> None:
    images = {"image": [{"bytes": png(1), "path": "a/1.png"}]}
    parquet(tmp_path / "x.parquet", datasets.Dataset.from_dict(images, features=PLAIN))
    (image,) = list_dataset(tmp_path).files
    assert (image.id, image.read()) == ("train/a/1.png", png(1))
    parquet(tmp_path / "raw" / "x.parquet", datasets.Dataset.from_dict({"raw": [png(2)], "n": [1]}))
    (image,) = list_dataset(tmp_path / "raw", image_column="raw").files
    assert image.read() == png(2)
    (tmp_path / "raw" / "y.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    assert failure(lambda: list_dataset(tmp_path / "raw", image_column="raw"))[2] == "unreadable"


def test_a_missing_arrow_file_is_named(tmp_path: Path) -> None:
    rows(4).save_to_disk(tmp_path / "d", num_shards=2)
    (tmp_path / "d" / "data-00001-of-00002.arrow").unlink()
    id, reason, kind = failure(lambda: list_dataset(tmp_path / "d"))
    assert id.endswith("data-00001-of-00002.arrow") and (reason, kind) == (
        "a file of the dataset is missing",
        "missing",
    )


@pytest.mark.parametrize("kept", [0, 0.3, 0.7, 0.95])
def test_a_truncated_arrow_file_is_an_error_of_the_dataset(tmp_path: Path, kept: float) -> None:
    rows(40).save_to_disk(tmp_path / "d")
    (file,) = (tmp_path / "d").glob("*.arrow")
    os.truncate(file, int(file.stat().st_size * kept))
    id, reason, kind = failure(lambda: list_dataset(tmp_path / "d"))
    assert id == str(tmp_path / "d") and reason.startswith("the dataset cannot be opened") and kind == "unreadable"


def test_an_arrow_file_that_points_outside_of_itself_is_refused(tmp_path: Path) -> None:
    rows(40).save_to_disk(tmp_path / "d")
    (file,) = (tmp_path / "d").glob("*.arrow")
    data = file.read_bytes()
    offsets = np.cumsum([0] + [len(png(number)) for number in range(40)]).astype("<i4").tobytes()
    assert data.count(offsets) == 1
    file.write_bytes(data.replace(offsets, offsets[:80] + (2**31 - 1).to_bytes(4, "little") + offsets[84:]))
    assert "column image is damaged" in failure(lambda: list_dataset(tmp_path / "d"))[1]


def test_damaged_arrow_files_never_end_the_process(tmp_path: Path) -> None:
    rows(40, label=list("abcd") * 10).save_to_disk(tmp_path / "d")
    (file,) = (tmp_path / "d").glob("*.arrow")
    data, random = file.read_bytes(), np.random.default_rng(0)
    opened = refused = 0
    for _ in range(200):
        mutant = bytearray(data)
        for place in random.integers(0, len(data), 2):
            mutant[place] = random.integers(256)
        file.unlink()  # The last one may still be mapped.
        file.write_bytes(mutant)
        try:
            listing = list_dataset(tmp_path / "d", label_column="label")
            assert all(isinstance(image.read(), bytes) for image in listing.files)
            opened += 1
        except ImageError:
            refused += 1
    assert opened and refused


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("state.json", "{", "damaged"),
        ("state.json", "[]", "damaged"),
        ("state.json", "{}", "damaged"),
        ("state.json", "[" * 100_000, "damaged"),
        ("state.json", '{"_data_files": [{"filename": "../secret.arrow"}]}', "refused"),
        ("state.json", '{"_data_files": [{"filename": "/secret.arrow"}]}', "refused"),
        ("state.json", '{"_data_files": [{"filename": "link.arrow"}]}', "refused"),
        ("state.json", '{"_data_files": [{"filename": 7}]}', "damaged"),
        ("dataset_info.json", '{"features": {"image": {"_type": "Nonsense"}}}', "unreadable"),
        ("dataset_info.json", "7", "unreadable"),
        ("dataset_dict.json", '{"splits": [".."]}', "refused"),
        ("dataset_dict.json", '{"splits": ["a/../.."]}', "damaged"),
        ("dataset_dict.json", '{"splits": 7}', "damaged"),
        ("dataset_dict.json", '{"splits": ["\\ud83c"]}', "damaged"),
        ("state.json", '{"_data_files": [{"filename": "\\ud83c"}]}', "damaged"),
        ("state.json", '{"_data_files": [{"filename": "\\u0000"}]}', "refused"),
        ("dataset_dict.json", '{"splits": ["none"]}', "missing"),
    ],
)
def test_what_a_dataset_says_of_itself_is_not_believed(tmp_path: Path, name: str, text: str, kind: str) -> None:
    rows(2).save_to_disk(tmp_path / "d")
    (arrow,) = (tmp_path / "d").glob("*.arrow")
    (tmp_path / "secret.arrow").write_bytes(arrow.read_bytes())
    (tmp_path / "d" / "link.arrow").symlink_to(tmp_path / "secret.arrow")
    (tmp_path / "d" / name).write_text(text)
    assert failure(lambda: list_dataset(tmp_path / "d"))[2] == kind


def test_images_that_are_none_in_arrow_are_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "d", {"image": [1, 2]})
    info = json.loads((folder / "dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Image"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert failure(lambda: list_dataset(folder))[0].startswith(str(folder))


def test_a_class_that_does_not_exist_is_named(tmp_path: Path) -> None:
    rows(2, label=[0, 1]).cast_column("label", datasets.ClassLabel(names=["a", "b"])).save_to_disk(tmp_path / "d")
    path = tmp_path / "d" / "dataset_info.json"
    info = json.loads(path.read_text())
    info["features"]["label"]["names"] = ["a"]
    path.write_text(json.dumps(info))
    assert "row 1 of column label is of class 1, of 1 classes" in failure(lambda: list_dataset(tmp_path / "d"))[1]


def test_a_folder_is_told_to_be_a_dataset(tmp_path: Path) -> None:
    rows(1).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows(1)).save_to_disk(tmp_path / "several")
    assert is_dataset_folder(tmp_path / "one") and is_dataset_folder(tmp_path / "several")
    assert not is_dataset_folder(tmp_path) and not is_dataset_folder(tmp_path / "none")
    assert failure(lambda: list_dataset(tmp_path / "one", config="x"))[2] == "missing"


def test_no_rows_are_an_error(tmp_path: Path) -> None:
    datasets.DatasetDict(train=rows(2), test=rows(1)).save_to_disk(tmp_path / "d")
    # The package saves an empty split so, or fails to, according to its version.
    state = tmp_path / "d" / "test" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": []}))
    assert len(list_dataset(tmp_path / "d").files) == 2
    assert failure(lambda: list_dataset(tmp_path / "d" / "test"))[1:] == ("it has no rows", "missing")


@pytest.mark.parametrize("name", ["org/things", "things"])
def test_a_name_is_looked_for_offline_too_and_the_error_says_what_to_do(name: str) -> None:
    id, reason, kind = failure(lambda: list_dataset(name))
    assert (id, kind) == (name, "unreadable") and "name a folder, or go online once" in reason


@pytest.mark.parametrize("name", ["a/b/c", "../x", "/nowhere", "https://host/x", "a b", ""])
def test_what_is_no_name_is_not_sent_anywhere(name: str) -> None:
    assert failure(lambda: list_dataset(name))[1:] == ("no such folder, and no name of a dataset on the hub", "missing")


def test_an_unreachable_hub_is_told_at_once() -> None:
    code = "from embedkit.sources.datasets.listing import list_dataset; list_dataset('org/things')"
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "org/things: no such folder, and the hub cannot be reached (ConnectError); HF_HUB_OFFLINE=1" in told.stderr
    assert "Retry" not in told.stderr


def test_a_configuration_follows_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert parse_dataset("dataset:org/things:small") == ("org/things", "small")
    assert parse_dataset("org/things") == ("org/things", None)
    assert parse_dataset(f"dataset:{tmp_path / 'a:b'}") == (str(tmp_path / "a:b"), None)
