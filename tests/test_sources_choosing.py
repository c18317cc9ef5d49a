from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from embedkit import ImageError, list_images
from embedkit.sources import Listing, choose, join, list_folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two folders with classes, and a broken link in the first."""
    for name in ("train/cat/1.jpg", "train/cat/2.PNG", "train/dog/1.jpg", "test/cat/1.jpg", "test/fox/9.gif"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "train" / "dog" / "gone.jpg").symlink_to("nowhere")
    return tmp_path


def many(count: int) -> Listing:
    from embedkit.sources import ImageFile

    files = [ImageFile(f"{number:05}.jpg", f"/{number:05}.jpg") for number in range(count)]
    return Listing(".", files, [], [], 0)


def ids(listing: Listing) -> list[str]:
    return [file.id for file in listing.files]


def test_several_folders_are_one_listing_in_which_nothing_is_confused(world: Path) -> None:
    listing = list_images(world / "train", world / "test")
    assert ids(listing) == ["test/cat/1.jpg", "test/fox/9.gif", "train/cat/1.jpg", "train/cat/2.PNG", "train/dog/1.jpg"]
    assert [file.label for file in listing.files] == ["cat", "fox", "cat", "cat", "dog"]
    assert listing.classes == ["cat", "dog", "fox"] and listing.root == world
    assert [file.read() for file in listing.files] == [file.id.encode() for file in listing.files]
    assert [file.status()[0] for file in listing.files] == [len(file.id) for file in listing.files]
    assert [failure.id for failure in listing.failures] == ["train/dog/gone.jpg"]
    assert listing.sources == {"train": world / "train", "test": world / "test"}


def test_a_name_may_be_given_and_must_be_of_one_source(world: Path) -> None:
    (world / "more").mkdir()
    (world / "train").rename(world / "more" / "test")
    with pytest.raises(ImageError, match="two sources are called test; call one otherwise: NAME="):
        list_images(world / "test", world / "more" / "test")
    listing = list_images(world / "test", f"b={world / 'more' / 'test'}")
    assert ids(listing)[0] == "b/cat/1.jpg" and ids(listing)[-1] == "test/fox/9.gif"
    assert ids(list_images(f"x={world / 'test'}")) == ["x/cat/1.jpg", "x/fox/9.gif"]


def test_a_folder_whose_name_holds_an_equals_sign_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a=b").mkdir()
    (tmp_path / "a=b" / "1.jpg").touch()
    monkeypatch.chdir(tmp_path)
    assert ids(list_images("a=b")) == ["1.jpg"] == ids(list_images(tmp_path / "a=b"))


def test_image_files_one_by_one_need_no_folder(world: Path) -> None:
    listing = list_images(world / "train" / "cat" / "1.jpg", world / "test" / "fox" / "9.gif")
    assert ids(listing) == ["test/fox/9.gif", "train/cat/1.jpg"] and listing.classes == []


def test_names_with_slashes_that_collide_are_refused(world: Path) -> None:
    with pytest.raises(ImageError, match=r"train/cat/1\.jpg: two sources"):
        join({"train": list_folder(world / "train"), "train/cat": list_folder(world / "train" / "cat")})


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.jpg"], [], ["cat/1.jpg", "dog/1.jpg"]),
        (["*.jpg", "*.PNG"], ["1.*"], ["cat/2.PNG"]),
        (["cat/*"], [], ["cat/1.jpg", "cat/2.PNG"]),
        ([], ["*/1.jpg"], ["cat/2.PNG"]),
        (["[12].*"], ["dog/*"], ["cat/1.jpg", "cat/2.PNG"]),
        ([], ["*.jp"], ["cat/1.jpg", "cat/2.PNG", "dog/1.jpg"]),
    ],
)
def test_patterns_choose_by_name_or_by_id(
    world: Path, include: list[str], exclude: list[str], expected: list[str]
) -> None:
    listing = list_images(world / "train", include=include, exclude=exclude)
    assert ids(listing) == expected
    assert listing.classes == sorted({id.partition("/")[0] for id in expected})


def test_failures_are_chosen_like_images(world: Path) -> None:
    assert [failure.id for failure in list_images(world / "train", include=["dog/*"]).failures] == ["dog/gone.jpg"]
    assert list_images(world / "train", include=["cat/*"]).failures == []
    assert list_images(world / "train", limit=1).failures == []


def test_nothing_chosen_is_an_error(world: Path) -> None:
    with pytest.raises(ImageError) as caught:
        list_images(world / "train", include=["*.tif"])
    assert caught.value.reason == "none of its 3 images is chosen; their ids are such as 'cat/1.jpg'"
    with pytest.raises(ImageError, match=r"; 'cat' is compared with whole names of files, and 'cat/[*]' takes"):
        list_images(world / "train", include=["*.tif", "cat"])
    with pytest.raises(ImageError, match=r"; 'x/cat/' is compared with whole ids, and 'x/cat/[*]' takes a folder"):
        list_images(world / "train", include=["x/cat/"])


@pytest.mark.parametrize("name", ["..", ".", "", "a/../b", "a//b", "/a", "a\0b", "\ud800", "x" * 5000])
def test_no_name_leads_ids_out_of_their_root(world: Path, name: str) -> None:
    with pytest.raises(ImageError, match="ids cannot begin with") as caught:
        join({name: list_folder(world / "train")})
    assert caught.value.kind == "refused"
    if "/" not in name and name:
        with pytest.raises(ImageError, match=r"ids cannot begin with .*; call the source otherwise: NAME="):
            list_images(f"{name}={world / 'train'}", world / "test")


def test_a_url_without_a_name_needs_one(world: Path) -> None:
    with pytest.raises(ImageError, match=r"https://host/\.\.: ids cannot begin with '\.\.'") as caught:
        list_images("https://ada:secret@host/..?signature=0", world / "test")
    assert "secret" not in str(caught.value) and "signature" not in str(caught.value)


def test_a_limit_takes_the_first_and_a_sample_takes_any() -> None:
    listing = many(1000)
    assert ids(choose(listing, limit=3)) == ["00000.jpg", "00001.jpg", "00002.jpg"]
    sample = ids(choose(listing, sample=100, seed=1))
    assert sample == sorted(sample) and len(set(sample)) == 100
    assert sample == ids(choose(listing, sample=100, seed=1)) != ids(choose(listing, sample=100, seed=2))
    middle = np.mean([int(id[:5]) for id in sample])
    assert 400 < middle < 600  # Five standard errors on either side.
    assert ids(choose(listing, sample=2000)) == ids(listing)


def test_most_of_a_sample_stays_when_images_come_and_go() -> None:
    before, after = set(ids(choose(many(1000), sample=100))), set(ids(choose(many(1100), sample=100)))
    assert len(before & after) > 80


def test_shards_are_a_partition_that_new_images_do_not_change() -> None:
    parts = [set(ids(choose(many(1000), shard=(index, 4)))) for index in range(1, 5)]
    assert sum(map(len, parts)) == 1000 and set.union(*parts) == set(ids(many(1000)))
    assert min(map(len, parts)) > 180
    assert parts[0] <= set(ids(choose(many(2000), shard=(1, 4))))
    sampled = choose(many(1000), shard=(2, 4), sample=10, limit=5)
    assert len(sampled.files) == 5 and set(ids(sampled)) <= parts[1]


@pytest.mark.parametrize("wrong", [{"shard": (0, 4)}, {"shard": (5, 4)}, {"limit": 0}, {"sample": -1}])
def test_impossible_choices_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        choose(many(10), **wrong)  # type: ignore[arg-type]


def test_ids_of_odd_bytes_are_chosen_like_others(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb"):
        pass
    (tmp_path / "line\nbreak.jpg").touch()
    listing = list_images(tmp_path, include=["*.jpg"], sample=2)
    assert [os.fsencode(id) for id in ids(listing)] == [b"caf\xe9.jpg", b"line\nbreak.jpg"]
    assert len(ids(list_images(tmp_path, exclude=["line*"]))) == 1


def test_entries_are_a_sequence(world: Path) -> None:
    files = list_images(world / "train", world / "test").files
    assert files[-1].id == files[4].id == "train/dog/1.jpg"
    assert [file.id for file in files[3:]] == ["train/cat/2.PNG", "train/dog/1.jpg"]
    with pytest.raises(IndexError):
        files[5]
