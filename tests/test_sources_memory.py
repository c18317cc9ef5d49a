from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from embedkit import ImageError
from embedkit.sources import ImageFile, Listing, content_sha256
from embedkit.sources.memory import list_memory


def grey(value: int, height: int = 4, width: int = 6) -> np.ndarray[Any, Any]:
    return np.full((height, width, 3), value, dtype=np.uint8)


def read(listing: Listing) -> list[tuple[str, str | None, Any]]:
    """Id, label, and the grey of each image or why there is none."""
    found: list[tuple[str, str | None, Any]] = []
    for file in listing.files:
        try:
            data = file.read()
        except ImageError as error:
            assert error.id == file.id
            found.append((file.id, file.label, error.kind))
        else:
            assert isinstance(data, np.ndarray)
            assert (data.dtype, data.shape[2]) == (np.uint8, 3)
            found.append((file.id, file.label, int(data[0, 0, 0])))
    return found


class Greys(Dataset[Any]):
    """Images 0, 1, 2... as dataset items."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.loaded = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        self.loaded += 1
        if isinstance(self.items[number], Exception):
            raise self.items[number]
        return self.items[number]


def test_a_list_of_images_is_numbered_in_its_order() -> None:
    images = [grey(1), Image.fromarray(grey(2)), torch.from_numpy(grey(3)).permute(2, 0, 1), grey(4)[..., 0]]
    listing = list_memory(images)
    assert read(listing) == [(f"0000000{at}", None, at + 1) for at in range(4)]
    assert (listing.root, listing.classes, listing.failures) == ("list", [], [])


def test_an_array_or_tensor_of_images_is_a_sequence_of_them() -> None:
    assert [grey for *_, grey in read(list_memory(np.stack([grey(7), grey(9)])))] == [7, 9]
    tensors = torch.stack([torch.from_numpy(grey(value)).permute(2, 0, 1) for value in (7, 9)])
    assert [grey for *_, grey in read(list_memory(tensors))] == [7, 9]


@pytest.mark.parametrize(
    "image", [grey(1), grey(1)[..., 0], torch.zeros(3, 4, 4), Image.new("RGB", (2, 2)), "a.jpg", b"x"]
)
def test_one_image_is_no_list_of_them(image: Any) -> None:
    with pytest.raises(ImageError, match="put it into a list"):
        list_memory(image)


def test_a_mapping_gives_the_ids(tmp_path: Path) -> None:
    Image.fromarray(grey(30)).save(tmp_path / "c.png")
    listing = list_memory({"b/2.png": grey(20), "a": (grey(10), "first"), 3: tmp_path / "c.png", "up": None})
    assert [(file.id, file.label) for file in listing.files] == [
        ("00000003", None), ("a", "first"), ("b/2.png", None), ("up", None)
    ]  # fmt: skip
    assert listing.files[0].read() == (tmp_path / "c.png").read_bytes()


def test_tuples_that_begin_with_a_str_are_ids_and_others_images_with_labels() -> None:
    items = [
        ("z", grey(1)), ("y", grey(2), "cat"), (grey(3), "dog"), (grey(4), "dog", "more"),
        {"image": grey(5), "label": "cat", "id": "x"}, [grey(6), None],
    ]  # fmt: skip
    expected = [
        ("00000002", "dog", 3), ("00000003", "dog", 4), ("00000005", None, 6), ("x", "cat", 5),
        ("y", "cat", 2), ("z", None, 1),
    ]  # fmt: skip
    for images in (items, tuple(items), iter(items), Greys(items)):
        listing = list_memory(images)
        assert read(listing) == expected
        assert listing.classes == ["cat", "dog"]


def test_numbers_as_labels_are_sorted_like_numbers_and_minus_one_is_none() -> None:
    labels = [10, torch.tensor(2), np.int64(0), -1, {"boxes": []}]
    listing = list_memory([(grey(at), label) for at, label in enumerate(labels)])
    assert [file.label for file in listing.files] == ["10", "02", "00", None, None]
    assert listing.classes == ["00", "02", "10"]


def test_a_dataset_is_read_lazily_and_its_targets_and_classes_spare_a_pass() -> None:
    dataset = Greys([(grey(at), at % 2) for at in range(5)])
    dataset.targets, dataset.classes = torch.tensor([0, 1, 0, 1, 0]), ["cat", ("dog", "hound")]  # type: ignore[attr-defined]
    listing = list_memory(dataset)
    assert dataset.loaded == 1
    assert read(listing) == [(f"{at:08d}", ["cat", "dog, hound"][at % 2], at) for at in range(5)]
    some = list_memory(Subset(Subset(dataset, [4, 3, 2]), [2, 1]))
    assert read(some) == [("00000000", "cat", 2), ("00000001", "dog, hound", 3)]
    assert some.classes == ["cat", "dog, hound"]


def test_a_dataset_without_targets_is_passed_through_for_its_labels() -> None:
    dataset = Greys([(grey(1), "cat"), OSError("disk\nfails"), (grey(3), "dog")])
    listing = list_memory(dataset)
    assert read(listing) == [("00000000", "cat", 1), ("00000001", None, "unreadable"), ("00000002", "dog", 3)]
    with pytest.raises(ImageError, match="00000001: OSError: disk fails"):
        listing.files[1].read()
    plain = Greys([grey(1), grey(2)])
    list_memory(plain)
    assert plain.loaded == 1


@pytest.mark.parametrize(
    ("image", "kind", "reason"),
    [
        (None, "not-an-image", "None, where an image was expected"),
        (3.5, "not-an-image", "a float is no image"),
        ({"picture": 1}, "not-an-image", "a dict without 'image'; it has 'picture'"),
        (grey(1).astype(np.int64), "unsupported", "an array of int64 is no image"),
        (np.zeros((4, 4, 7), np.uint8), "unsupported", "shape (4, 4, 7)"),
        (torch.randn(3, 8, 8) - 5, "unsupported", "floats must lie in [0, 1]"),
        (b"", "empty", "no bytes"),
        (torch.zeros(4, 4).to_sparse(), "unsupported", "this Tensor cannot be made an array: TypeError: can't convert"),
        (
            torch.zeros(3, 4, 4, device="meta"),
            "unsupported",
            "this Tensor cannot be made an array: NotImplementedError",
        ),
    ],
)
def test_what_is_no_image_is_a_failure_with_its_reason(image: Any, kind: str, reason: str) -> None:
    for images in ([grey(1), image], {"00000001": image}, Greys([grey(1), image])):
        bad = list_memory(images).files[-1]
        with pytest.raises(ImageError) as caught:
            bad.read()
        assert (caught.value.id, caught.value.kind) == ("00000001", kind)
        assert reason in caught.value.reason and "\n" not in caught.value.reason
    listing = list_memory(iter([grey(1), image, grey(2)]))
    assert read(listing) == [("00000000", None, 1), ("00000002", None, 2)]
    assert [(bad.id, bad.kind) for bad in listing.failures] == [("00000001", kind)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", ["first", "last", "none"])
def test_tensors_of_any_layout(dtype: torch.dtype, channels: str) -> None:
    tensor = torch.zeros((4, 6, 3), dtype=dtype)
    tensor[1, 2] = 255 if dtype == torch.uint8 else 1
    tensor = {"first": tensor.permute(2, 0, 1), "last": tensor, "none": tensor[..., 0]}[channels]
    pixels = np.asarray(list_memory([tensor]).files[0].read())
    assert pixels.shape == (4, 6, 3)
    assert [pixels[1, 2].tolist(), int(pixels.sum())] == [[255] * 3, 765]


def test_an_iterator_is_kept_in_a_file_and_not_in_memory(tmp_path: Path) -> None:
    made: list[int] = []

    def images() -> Iterator[Any]:
        for at in range(300):
            made.append(at)
            yield (f"{at % 7}/{at}", grey(at % 256, 3 + at % 5, 2 + at % 3), str(at % 7))

    listing = list_memory(images())
    assert len(made) == len(listing.files) == 300
    assert [file.id for file in listing.files] == sorted(f"{at % 7}/{at}" for at in range(300))

    def check(file: Any) -> None:
        at = int(file.id.partition("/")[2])
        np.testing.assert_array_equal(file.read(), grey(at % 256, 3 + at % 5, 2 + at % 3))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, list(listing.files) * 3))
    encoded = b"bytes of a file"
    assert list_memory(iter([encoded, grey(1)])).files[0].read() == encoded


def test_the_file_of_an_iterator_is_closed_with_its_listing() -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    listing = list_memory(iter([grey(1)]))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del listing
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_iterator_that_fails_is_not_taken_for_a_shorter_one() -> None:
    def images() -> Iterator[Any]:
        yield grey(1)
        raise RuntimeError("the camera is gone")

    with pytest.raises(ImageError, match="generator: it ends after 1 images with RuntimeError: the camera is gone"):
        list_memory(images())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(grey(1), 0), (grey(2), 1)])

    def __len__(self) -> int:
        return 2


def test_iterable_datasets_and_loaders_without_batches_are_iterated() -> None:
    assert read(list_memory(Stream())) == [("00000000", "0", 1), ("00000001", "1", 2)]
    assert read(list_memory(DataLoader(Stream(), batch_size=None))) == [("00000000", "0", 1), ("00000001", "1", 2)]
    images = Greys([grey(1), grey(2)])
    assert read(list_memory(DataLoader(images, batch_size=None))) == [("00000000", None, 1), ("00000001", None, 2)]


@pytest.mark.parametrize(
    "items", [[torch.zeros(3, 4, 4)] * 4, [(torch.zeros(3, 4, 4), 1)] * 4, [{"image": torch.zeros(3, 4, 4)}] * 4]
)
def test_batches_are_refused_with_what_to_do(items: list[Any]) -> None:
    for loader in (DataLoader(Greys(items), batch_size=2), DataLoader(Greys(items), batch_size=1)):
        with pytest.raises(ImageError, match="pass the dataset itself"):
            list_memory(loader)


def test_paths_are_listed_as_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        Image.fromarray(grey(1)).save(tmp_path / name)
    paths = [tmp_path / "b.png", tmp_path / "a.png"]
    for images in (paths, tuple(map(str, paths)), iter(paths)):
        assert [file.id for file in list_memory(images).files] == ["a.png", "b.png"]
    with pytest.raises(ImageError, match="it begins with paths, and then has a ndarray"):
        list_memory([*paths, grey(1)])
    for images in ([*map(str, paths), "a\0b.png", "\ud800b.png"], iter([*paths, "a\0b.png", "\ud800b.png"])):
        listing = list_memory(images)
        assert [file.id for file in listing.files] == ["a.png", "b.png"]
        assert [bad.id for bad in listing.failures] == ["00000002", "00000003"]


def test_ids_are_unique_and_stay_inside() -> None:
    with pytest.raises(ImageError, match="a: two images have this id"):
        list_memory([("a", grey(1)), ("b", grey(1)), ("a", grey(2))])
    with pytest.raises(ImageError, match="00000001: two images have this id"):
        list_memory(iter([("00000001", grey(1)), grey(2)]))
    for images in ([("../a", grey(1)), ("b", grey(2))], iter([("../a", grey(1)), ("b", grey(2))])):
        listing = list_memory(images)
        assert read(listing) == [("b", None, 2)]
        (bad,) = listing.failures
        assert (bad.id, bad.kind) == ("00000000", "refused")
        assert bad.reason == "its id points out of its root: '../a'"


def test_an_id_that_none_can_be_costs_one_image() -> None:
    names = ["../x.png", "", "", "a", "a\0", "\ud800.png", "x" * 5000, "caf\udce9", -1, 10**9, 10**5000, 1.5, b"b", 0]
    items = [{"id": name, "image": grey(at)} for at, name in enumerate(names)]
    for images in (items, iter(items), Greys(items)):
        listing = list_memory(images)
        assert read(listing) == [("00000000", None, 13), ("a", None, 3), ("caf\udce9", None, 7)]
        # The first one's number is the id of the last.
        refused = ["00000000#1", *(f"{number:08}" for number in (1, 2, 4, 5, 6, 8, 9, 10, 11, 12))]
        assert [bad.id for bad in listing.failures] == refused
        assert {bad.kind for bad in listing.failures} == {"refused"}
        assert all(bad.reason.isprintable() and len(bad.reason) < 300 for bad in listing.failures)
    assert read(list_memory({"\ud800": grey(1), "b": grey(2)})) == [("b", None, 2)]


@pytest.mark.parametrize("label", ["ro\0se", "\ud800", "x" * 5000])
def test_a_label_that_no_class_can_have_costs_its_images(label: str) -> None:
    items = [("a", grey(1), label), ("b", grey(2), "rose"), ("c", grey(3)), ("d", grey(4), label)]
    for images in (items, iter(items), Greys(items)):
        listing = list_memory(images)
        assert read(listing) == [("b", "rose", 2), ("c", None, 3)] and listing.classes == ["rose"]
        assert [(bad.id, bad.kind) for bad in listing.failures] == [("a", "refused"), ("d", "refused")]
        assert "class" in listing.failures[0].reason and listing.failures[0].reason.isprintable()
    dataset = Greys([grey(1), grey(2), grey(3)])
    dataset.targets, dataset.classes = [0, 1, 0], ["rose", label]  # type: ignore[attr-defined]
    listing = list_memory(dataset)
    assert read(listing) == [("00000000", "rose", 1), ("00000002", "rose", 3)] and listing.classes == ["rose"]
    assert [bad.id for bad in listing.failures] == ["00000001"]


def test_a_number_beyond_all_classes_is_no_label() -> None:
    assert [file.label for file in list_memory([(grey(1), 10**5000), (grey(2), 3)]).files] == [None, "3"]


def test_images_in_memory_say_why_they_stay_there() -> None:
    for images, reason in (([grey(1)], "in the memory of this process"), (iter([grey(1)]), "from an iterator")):
        with pytest.raises(TypeError, match=reason):
            pickle.dumps(list_memory(images).files[0])


def test_a_listing_says_in_a_line_what_it_has() -> None:
    listing = list_memory([("a", grey(1), "x"), ("b", grey(2), "y"), ("../c", grey(3))], name="three")
    assert repr(listing) == "Listing('three', images=2, classes=2, failures=1)"


@pytest.mark.parametrize("images", [[], (), {}, iter([]), Greys([]), np.zeros((0, 4, 4, 3), np.uint8)])
def test_nothing_is_an_error(images: Any) -> None:
    with pytest.raises(ImageError, match="it is empty"):
        list_memory(images)


def test_no_status_is_that_of_an_earlier_listing_and_content_is_known_again() -> None:
    first, second = list_memory([grey(1), grey(2)]), list_memory([grey(1), grey(3)])
    assert first.files[0].status() == first.files[1].status() != second.files[0].status()
    assert content_sha256(first.files[0].read()) == content_sha256(second.files[0].read())
    assert content_sha256(first.files[1].read()) != content_sha256(second.files[1].read())


def test_a_lazily_opened_picture_is_upright_and_may_be_in_the_list_twice(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.arange(3 * 40 * 60, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8))
    image.save(tmp_path / "a.png", exif=exif)
    for _ in range(20):
        with Image.open(tmp_path / "a.png") as lazy:
            listing = list_memory([lazy] * 8)
            with ThreadPoolExecutor(8) as pool:
                for pixels in pool.map(lambda file: file.read(), listing.files):
                    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(image), -1))


def test_the_files_of_an_image_folder_are_read_themselves(tmp_path: Path) -> None:
    from embedkit.backbones import import_timm

    import_timm()
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("dog/1.png", "cat/2.png", "cat/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(grey(len(name))).save(tmp_path / name)
    folder = datasets.ImageFolder(tmp_path, transform=lambda image: image.resize((1, 1)))
    listing = list_memory(folder)
    assert [(file.id, file.label) for file in listing.files] == [
        ("cat/1.png", "cat"),
        ("cat/2.png", "cat"),
        ("dog/1.png", "dog"),
    ]
    assert all(isinstance(file, ImageFile) for file in listing.files)
    assert listing.files[2].read() == (tmp_path / "dog/1.png").read_bytes()
    assert (listing.root, listing.classes) == (tmp_path, ["cat", "dog"])
    some = list_memory(Subset(folder, [2, 0]))
    assert [(file.id, file.label) for file in some.files] == [("cat/1.png", "cat"), ("dog/1.png", "dog")]
    own = datasets.ImageFolder(tmp_path, loader=lambda path: grey(len(path)))
    assert [file.id for file in list_memory(own).files] == ["00000000", "00000001", "00000002"]
    assert [file.label for file in list_memory(own).files] == ["cat", "cat", "dog"]
