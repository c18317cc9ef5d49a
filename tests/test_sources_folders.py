from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    (root / "again").symlink_to("own")  # What lies in there is in the listing anyway.
    (tmp_path / "door").symlink_to(root)
    listing = list_folder(tmp_path / "door")
    assert [file.id for file in listing.files] == ["own/2.jpg", "within.jpg"]
    assert [(failure.id, failure.kind) for failure in listing.failures] == [
        ("beside", "refused"), ("link.jpg", "refused"), ("linked", "refused"),
    ]  # fmt: skip
    assert "--follow-links" in listing.failures[1].reason and "../elsewhere/1.jpg" in listing.failures[1].reason


def ladder(root: Path, steps: int) -> None:
    """Folders each of which has two links to the next: 2 ** (steps - 1) ways to the image in the last."""
    touch(root, *(f"{step:02}/notes.txt" for step in range(steps)), f"{steps - 1:02}/1.jpg")
    for step in range(steps - 1):
        for name in ("a", "b"):
            (root / f"{step:02}" / name).symlink_to(f"../{step + 1:02}")


def test_many_ways_to_a_folder_list_it_once(tmp_path: Path) -> None:
    ladder(tmp_path / "root", 40)
    assert ids(tmp_path / "root") == ids(tmp_path / "root", follow_links=True) == ["39/1.jpg"]
    ladder(tmp_path / "out", 40)
    (tmp_path / "own").mkdir()
    for name in ("x", "y"):
        (tmp_path / "own" / name).symlink_to("../out/00")
    assert ids(tmp_path / "own", follow_links=True) == ["x" + "/a" * 39 + "/1.jpg"]


def test_of_several_links_to_a_folder_the_first_by_its_id_is_followed(tmp_path: Path) -> None:
    touch(tmp_path, "out/sub/1.jpg", "out/2.jpg", "root/3.jpg", "root/.cache/4.jpg", "root/.cache/sub/5.jpg")
    root = tmp_path / "root"
    for name, target in [("c", "../out"), ("b", "../out"), ("a", "../out/sub"), ("up", ".."), ("z", ".cache")]:
        (root / name).symlink_to(target)
    (root / "y").symlink_to(".cache")  # Hidden, and so not in the listing under its own name.
    assert ids(root) == ["3.jpg", "y/4.jpg", "y/sub/5.jpg"]
    assert ids(root, follow_links=True) == ["3.jpg", "a/1.jpg", "b/2.jpg", "y/4.jpg", "y/sub/5.jpg"]


def test_one_entry_that_cannot_be_looked_at_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    while len(os.getcwd()) < 3900:  # To where the next folder has no path that the system takes.
        name = "x" * min(250, 3900 - len(os.getcwd()))
        os.mkdir(name)
        os.chdir(name)
    deep = Path.cwd().relative_to(tmp_path).as_posix()
    for number in range(40):
        Path(f"{number:02}.jpg").touch()
    for name in ("w", "y", "z"):
        os.mkdir(name * 250)
        Path(name * 250, "lost.jpg").touch()
    listing = list_folder(tmp_path)
    assert [file.id for file in listing.files] == [f"{deep}/{number:02}.jpg" for number in range(40)]
    assert [(failure.id, failure.kind, failure.reason) for failure in listing.failures] == [
        (f"{deep}/{name * 250}", "unreadable", "the folder cannot be read: File name too long") for name in "wyz"
    ]


def test_what_goes_away_meanwhile_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "kept.jpg", "gone/1.jpg", "gone.jpg/1.jpg", "file/1.jpg")
    (tmp_path / "link.jpg").symlink_to("nowhere")
    scan = os.scandir

    @contextmanager
    def scan_slowly(folder: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scan(folder) as entries:
            listed = list(entries)
        if (tmp_path / "link.jpg").is_symlink():
            for name in ("gone", "gone.jpg", "file"):
                (tmp_path / name / "1.jpg").unlink()
                (tmp_path / name).rmdir()
            (tmp_path / "link.jpg").unlink()
            (tmp_path / "file").touch()
        yield iter(listed)

    monkeypatch.setattr(os, "scandir", scan_slowly)
    listing = list_folder(tmp_path)
    assert ([file.id for file in listing.files], listing.failures) == (["kept.jpg"], [])


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
    (tmp_path / "locked").rename(tmp_path / "locked.jpg")  # Called like an image, too.
    (tmp_path / "locked.jpg").chmod(0)
    listing, locked = list_folder(tmp_path), tmp_path / "locked.jpg"
    assert [(failure.id, failure.kind) for failure in listing.failures] == [("locked.jpg", "permission")]
    with pytest.raises(ImageError, match=r"locked\.jpg: the folder cannot be read: Permission denied") as caught:
        list_folder(locked)
    locked.chmod(0o700)
    assert (caught.value.id, caught.value.kind) == (os.fspath(locked), "permission")


def test_no_folder_a_file_and_a_folder_without_images_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such folder"):
        list_folder(tmp_path / "missing")
    with pytest.raises(ImageError, match="no such folder"):
        list_folder("a\0b")
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
