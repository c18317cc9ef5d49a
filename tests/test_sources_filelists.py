from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path

import pytest

from embedkit import ImageError
from embedkit.sources import ImageFile, list_files, list_folder, list_named


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def ids_in(path: Path, content: bytes) -> list[str]:
    """Return the ids of the images that a list of this content names."""
    return [file.id for file in list_named(write(path, content)).files]


def test_ids_are_relative_to_the_deepest_folder_that_holds_all() -> None:
    listing = list_files(["/data/b/2.jpg", Path("/data/a/1.jpg"), "/data/a/deep/3.jpg"])
    assert listing.root == Path("/data")
    assert [file.id for file in listing.files] == ["a/1.jpg", "a/deep/3.jpg", "b/2.jpg"]
    assert listing.files[1].path == "/data/a/deep/3.jpg"  # type: ignore[attr-defined]
    assert (listing.classes, listing.failures, listing.ignored, listing.files[0].label) == ([], [], 0, None)


@pytest.mark.parametrize(
    ("paths", "root", "ids"),
    [
        (["/data/1.jpg"], "/data", ["1.jpg"]),
        (["/data/a", "/data/a/1.jpg"], "/data", ["a", "a/1.jpg"]),
        (["/data/ab/1.jpg", "/data/abc/1.jpg"], "/data", ["ab/1.jpg", "abc/1.jpg"]),
        (["/1.jpg", "/data/2.jpg"], "/", ["1.jpg", "data/2.jpg"]),
        (["//data//x/../1.jpg", "/data/./2.jpg"], "/data", ["1.jpg", "2.jpg"]),
    ],
)
def test_the_deepest_folder_is_one_of_whole_names(paths: list[str], root: str, ids: list[str]) -> None:
    listing = list_files(paths)
    assert listing.root == Path(root)
    assert [file.id for file in listing.files] == ids
    assert [file.path for file in listing.files] == [os.path.join(root, id) for id in ids]  # type: ignore[attr-defined]


def test_names_are_sorted_by_their_bytes_undecodable_ones_too() -> None:
    names = [b"/d/\xff.jpg", "/d/\uffff.jpg".encode(), "/d/\U0001f33b.jpg".encode(), b"/d/a.jpg", "/d/é.jpg".encode()]
    listing = list_files(map(os.fsdecode, names))
    assert [os.fsencode(file.id) for file in listing.files] == sorted(name[3:] for name in names)


def test_no_name_and_a_name_twice_are_errors() -> None:
    with pytest.raises(ImageError, match="the list of images: it is empty"):
        list_files([])
    with pytest.raises(ImageError) as caught:
        list_files(["/d/2.jpg", "/d/a/1.jpg", "/d/3.jpg", "/d/b/../a/1.jpg"])
    assert str(caught.value) == "the list of images: '/d/a/1.jpg' is in the list twice, as names 2 and 4"
    assert caught.value.kind == "refused"


def test_a_root_keeps_ids_as_they_are_whatever_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write(tmp_path / "names", b"photos/cat/1.jpg\nphotos/cat/2.jpg\n")
    monkeypatch.chdir(tmp_path)
    assert [file.id for file in list_named(names).files] == ["1.jpg", "2.jpg"]
    for root in ("photos", tmp_path / "photos", "./x/../photos/"):
        listing = list_named(names, root=root)
        assert [file.id for file in listing.files] == ["cat/1.jpg", "cat/2.jpg"]
        assert listing.root == tmp_path / "photos"
    write(names, b"photos/cat/1.jpg\nphotos-2/1.jpg\n")
    with pytest.raises(
        ImageError, match=r"names: it names '.*photos-2/1\.jpg', which is not below '.*photos'"
    ) as caught:
        list_named(names, root="photos")
    assert caught.value.kind == "refused" and "relative names are below the working folder" in caught.value.reason


def test_what_no_file_can_be_called_is_a_failure_under_its_number() -> None:
    listing = list_files(["/d/00000001", "a\0b.jpg", "/d/\ud800.jpg", "/d/b.jpg", "x" * 5000])
    assert [file.id for file in listing.files] == ["00000001", "b.jpg"]
    assert [(failure.id, failure.kind) for failure in listing.failures] == [
        ("00000001#1", "refused"), ("00000002", "refused"), ("00000004", "refused"),
    ]  # fmt: skip
    assert all(failure.reason.isprintable() and len(failure.reason) < 300 for failure in listing.failures)
    assert list_files(["a\0b"]).failures[0].id == "00000000"


@pytest.mark.parametrize(
    "content",
    [
        b"/d/a.jpg\n/d/b c.jpg\n",
        b"/d/a.jpg\n/d/b c.jpg",
        b"/d/a.jpg\r\n\r\n\n/d/b c.jpg\r\n",
        b"\xef\xbb\xbf/d/a.jpg\n/d/b c.jpg\n",
        b"/d/a.jpg\0/d/b c.jpg\0",
        b"/d/a.jpg\0\0/d/b c.jpg",
    ],
    ids=["newlines", "no last newline", "windows", "byte order mark", "print0", "no last nul"],
)
def test_a_list_has_a_name_on_each_line_or_ends_each_with_a_nul(tmp_path: Path, content: bytes) -> None:
    assert ids_in(tmp_path / "list", content) == ["a.jpg", "b c.jpg"]


def test_a_nul_lets_names_hold_anything_else(tmp_path: Path) -> None:
    assert ids_in(tmp_path / "list", b"/d/two\nlines.jpg\0/d/cr\r\0/d/caf\xe9.jpg\0") == [
        "caf\udce9.jpg",
        "cr\r",
        "two\nlines.jpg",
    ]


def test_relative_names_lie_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "here" / "a" / "1.jpg", b"one")
    write(tmp_path / "elsewhere" / "list.txt", b"./a/1.jpg\na/2.jpg\n")
    monkeypatch.chdir(tmp_path / "here")
    listing = list_named("../elsewhere/list.txt")
    assert listing.root == tmp_path / "here" / "a"
    assert [file.id for file in listing.files] == ["1.jpg", "2.jpg"]
    monkeypatch.chdir(tmp_path)  # What is listed stays where it is.
    assert listing.files[0].read() == b"one"


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/d/2.jpg\n/d/1.jpg\n")))
    assert [file.id for file in list_named("-").files] == ["1.jpg", "2.jpg"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(ImageError, match=r"^standard input: it is empty"):
        list_named("-")


def test_a_list_may_come_through_a_pipe() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"/d/2.jpg\n/d/1.jpg\n")
    os.close(writing)
    assert [file.id for file in list_named(f"/dev/fd/{reading}").files] == ["1.jpg", "2.jpg"]
    os.close(reading)


def test_a_long_list_is_read_in_pieces(tmp_path: Path) -> None:
    names = [f"/d/{'folder' * 20}/{number:06d}.jpg" for number in range(20_000)]
    for end in ("\n", "\0", "\r\n"):
        content = end.join(names).encode()
        assert len(content) > 2_000_000  # More than one piece.
        assert ids_in(tmp_path / "list", content) == [name.rpartition("/")[2] for name in names]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\n\r\n\n", "it is empty"),
        (b"\xef\xbb\xbf", "it is empty"),
        ("/d/1.jpg\n".encode("utf-16"), "its text is UTF-16; save it as UTF-8"),
        (b"/d/1.jpg\n" + b"x" * 3_000_000, "line 2 is not the name of a file"),
        (b"/d/1.jpg\n" + b"x" * 5_000 + b"\n", "line 2 is not the name of a file"),
        (b"/d/1.jpg\n" * 200_000 + b"a\0b\n", "line 200,001 is not the name of a file"),
    ],
    ids=["nothing", "empty lines", "only a mark", "utf-16", "no line breaks", "a long line", "a late nul"],
)
def test_what_is_no_list_is_an_error_that_names_it(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        list_named(write(tmp_path / "list", content))
    assert caught.value.id == os.fspath(tmp_path / "list")


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file") as caught:
        list_named(tmp_path / "list")
    assert caught.value.kind == "missing"
    with pytest.raises(ImageError, match="Is a directory") as caught:
        list_named(tmp_path)
    assert caught.value.kind == "unreadable"


def test_what_is_named_and_is_no_file_fails_when_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    write(tmp_path / "empty.jpg", b"")
    write(tmp_path / "good.jpg", b"good")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    names = ["pipe.jpg", "folder.jpg", "empty.jpg", "good.jpg", "self.jpg", "gone.jpg"]
    found = {}
    for file in list_files(tmp_path / name for name in names).files:
        try:
            found[file.id] = file.read()
        except ImageError as error:
            assert error.id == file.id
            found[file.id] = error.kind
    assert found == {
        "empty.jpg": "empty",
        "folder.jpg": "not-an-image",
        "gone.jpg": "missing",
        "good.jpg": b"good",
        "pipe.jpg": "not-an-image",
        "self.jpg": "unreadable",
    }


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # A terabyte of nothing.
    (image,) = list_files([path]).files
    with pytest.raises(ImageError, match="1,099,511,627,776 bytes are more than the limit of 536,870,910") as caught:
        image.read()
    assert caught.value.kind == "too-large"
    small = write(tmp_path / "small.jpg", b"12345")
    assert list_files([small], max_bytes=5).files[0].read() == b"12345"
    with pytest.raises(ImageError, match="5 bytes are more than the limit of 4"):
        list_named(write(tmp_path / "list", os.fsencode(small)), max_bytes=4).files[0].read()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read any file")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "locked.jpg")
    path.chmod(stat.S_IWUSR)
    with pytest.raises(ImageError, match="not permitted") as caught:
        list_files([path]).files[0].read()
    assert caught.value.kind == "permission"


def test_the_status_of_a_file_changes_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "1.jpg", b"123")
    (image,) = list_files([path]).files
    assert image.status() == (3, path.stat().st_mtime_ns)
    path.unlink()
    assert image.status() == (0, -1)
    assert ImageFile("a", "a\0b").status() == ImageFile("a", "\ud800").status() == (0, -1)


def test_a_list_of_a_folders_files_is_the_folder(tmp_path: Path, photos: Path) -> None:
    listing = list_folder(photos)
    content = b"\0".join(os.fsencode(photos / file.id) for file in reversed(listing.files))
    named = list_named(write(tmp_path / "list", content))
    assert named.root == photos
    assert [(file.id, file.status(), file.read()) for file in named.files] == [
        (file.id, file.status(), file.read()) for file in listing.files
    ]
