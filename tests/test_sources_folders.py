from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from embedkit import ImageError
from embedkit.sources import inside, list_folder


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def ids(root: Path, *, follow_links: bool = False) -> list[str]:
    return [file.id for file in list_folder(root, follow_links=follow_links).files]


def test_images_are_found_at_any_depth_and_sorted_by_their_bytes(tmp_path: Path) -> None:
    names = [
        "b.jpg",
        "a/z.PNG",
        "a/deep/er/x.jpeg",
        "Ä.jpg",
        "ä/1.webp",
        "a-b.tif",
        "with space.jpg",
        "line\nbreak.gif",
    ]
    touch(tmp_path, *names, "notes.txt", "a/.hidden.jpg", ".git/x.jpg", "noext")
    listing = list_folder(tmp_path)
    assert [file.id for file in listing.files] == sorted(names, key=os.fsencode)
    assert all(os.path.samefile(file.path, tmp_path / file.id) for file in listing.files)
    assert listing.ignored == 4
    assert listing.failures == []


def test_the_class_is_the_first_folder_so_that_equal_leaf_names_never_merge(tmp_path: Path) -> None:
    touch(tmp_path, "a/cat/1.jpg", "b/cat/1.jpg", "b/dog/1.jpg")
    listing = list_folder(tmp_path)
    assert [file.label for file in listing.files] == ["a", "b", "b"]
    assert listing.classes == ["a", "b"]


def test_an_image_in_the_folder_itself_means_no_classes(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "2.jpg")
    listing = list_folder(tmp_path)
    assert [file.label for file in listing.files] == [None, None]
    assert listing.classes == []


def test_what_is_called_an_image_and_is_none_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "good.jpg", "full.jpg/inside.jpg")
    (tmp_path / "empty.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    listing = list_folder(tmp_path)
    assert [file.id for file in listing.files] == ["full.jpg/inside.jpg", "good.jpg"]
    assert [(failure.id, failure.reason, failure.kind) for failure in listing.failures] == [
        ("broken.jpg", "broken symbolic link to nowhere", "missing"),
        ("empty.jpg", "a folder, not an image", "not-an-image"),
        ("pipe.jpg", "not a regular file but a named pipe", "not-an-image"),
    ]


def test_links_are_followed_and_cycles_end(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/1.jpg", "root/own/2.jpg")
    root = tmp_path / "root"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "own" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    (root / "own" / "up").symlink_to(root)
    (root / "self").symlink_to("self")
    assert ids(root, follow_links=True) == ["linked/1.jpg", "own/2.jpg", "own/link.jpg"]


def test_links_out_of_the_folder_are_refused_unless_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/1.jpg", "root-beside/3.jpg", "root/own/2.jpg")
    root = tmp_path / "root"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "beside").symlink_to(tmp_path / "root-beside")  # Whose name begins as the root's.
    (root / "link.jpg").symlink_to("../elsewhere/1.jpg")
    (root / "within.jpg").symlink_to("own/2.jpg")
    (root / "again").symlink_to("own")
    (tmp_path / "door").symlink_to(root)
    listing = list_folder(tmp_path / "door")
    assert [file.id for file in listing.files] == ["again/2.jpg", "own/2.jpg", "within.jpg"]
    assert [(failure.id, failure.kind) for failure in listing.failures] == [
        ("beside", "refused"), ("link.jpg", "refused"), ("linked", "refused"),
    ]  # fmt: skip
    assert "--follow-links" in listing.failures[1].reason and "../elsewhere/1.jpg" in listing.failures[1].reason


def test_names_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb"):
        pass
    (id,) = ids(tmp_path)
    assert os.fsencode(id) == b"caf\xe9.jpg"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read any folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    (tmp_path / "locked").chmod(0)
    listing = list_folder(tmp_path)
    (tmp_path / "locked").chmod(0o700)
    (failure,) = listing.failures
    assert str(failure) == "locked: the folder cannot be read: Permission denied" and failure.kind == "permission"


def test_no_folder_a_file_and_a_folder_without_images_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such folder"):
        list_folder(tmp_path / "missing")
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    with pytest.raises(ImageError, match="is a file; name the folder"):
        list_folder(tmp_path / "x.png")
    touch(tmp_path, "empty/notes.txt")
    with pytest.raises(ImageError, match=r"no images in it \(1 other files\); images are called .*\.jpg"):
        list_folder(tmp_path / "empty")


@pytest.mark.parametrize("id", ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "..", "", "a\0b.jpg"])
def test_an_id_never_leaves_its_root(tmp_path: Path, id: str) -> None:
    with pytest.raises(ImageError, match="points out of its root"):
        inside(tmp_path, id)


def test_an_ordinary_id_is_joined(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/..b/c d.jpg") == tmp_path / "a" / "..b" / "c d.jpg"
