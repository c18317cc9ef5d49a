from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from embedkit import ImageError
from embedkit.sources import Listing
from embedkit.sources.archives.listing import list_archive

DATA = bytes(range(256)) * 40


def make(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def contents(listing: Listing) -> dict[str, object]:
    return {file.id: file.read() for file in listing.files}


def failures(listing: Listing) -> list[tuple[str, str]]:
    return [(failure.id, failure.kind) for failure in listing.failures]


def read_failure(path: Path) -> ImageError:
    (file,) = list_archive(path).files
    with pytest.raises(ImageError) as caught:
        file.read()
    assert caught.value.id == file.id
    return caught.value


def changed(path: Path, old: bytes, new: bytes, last: bool = True) -> None:
    data = path.read_bytes()
    at = data.rfind(old) if last else data.find(old)
    assert at >= 0 and len(old) == len(new)
    path.write_bytes(data[:at] + new + data[at + len(old) :])


def directory_field(path: Path, offset: int, layout: str, value: int) -> None:
    """Change a field of the only member's entry in the directory."""
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, data.rfind(b"PK\1\2") + offset, value)
    path.write_bytes(data)


MEMBERS = {"b.jpg": DATA, "a/z.PNG": b"Z", "Ä.jpg": b"umlaut", "日本/x.gif": b"G" * 70_000}


def test_members_are_read_where_they_lie(tmp_path: Path) -> None:
    others = {"notes.txt": b"", "__MACOSX/._b.jpg": b"x", "a/.hidden.jpg": b"x"}
    for path in (
        make(tmp_path / "d.zip", MEMBERS | others),
        make(tmp_path / "s.zip", MEMBERS | others, zipfile.ZIP_STORED),
    ):
        listing = list_archive(path)
        assert contents(listing) == MEMBERS
        assert [file.id for file in listing.files] == sorted(MEMBERS, key=os.fsencode)
        assert (listing.ignored, listing.failures) == (3, [])


def test_large_archives_with_their_own_fields_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        zipfile, "ZIP64_LIMIT", 100
    )  # Of the writer: all sizes and places are written as zip64 has them.
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = make(tmp_path / "x.zip", MEMBERS)
    assert b"PK\6\6" in path.read_bytes() and contents(list_archive(path)) == MEMBERS


def test_what_was_put_before_and_behind_an_archive_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(b"#!/bin/sh\n" + make(tmp_path / "inner", MEMBERS).read_bytes())
    assert contents(list_archive(path)) == MEMBERS
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a comment with PK\5\6 in it"
    assert contents(list_archive(path)) == MEMBERS


def test_names_are_utf8_where_they_say_so_and_else_of_the_first_pcs(tmp_path: Path) -> None:
    path = make(tmp_path / "x.zip", {"caf_.jpg": b"x"})
    for at in (b"PK\3\4", b"PK\1\2"):
        changed(path, b"caf_.jpg", b"caf\x82.jpg", last=at == b"PK\1\2")
    assert [file.id for file in list_archive(path).files] == ["café.jpg"]
    unmarked = make(tmp_path / "mac.zip", {"ca__.jpg": b"x"})
    changed(unmarked, b"ca__.jpg", "caé.jpg".encode())  # From Unix, and not marked.
    assert [file.id for file in list_archive(unmarked).files] == ["caé.jpg"]
    marked = make(tmp_path / "marked.zip", {"é.jpg": b"x"})
    changed(marked, "é.jpg".encode(), b"\xe9e.jpg")
    assert os.fsencode(list_archive(marked).files[0].id) == b"\xe9e.jpg"


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.jpg", DATA)
        archive.writestr("empty.jpg", b"")
        archive.writestr("folder.jpg/", b"")
        archive.writestr("full.jpg/", b"")
        archive.writestr("full.jpg/1.jpg", b"x")
        for name, mode in (("link.jpg", stat.S_IFLNK), ("pipe.jpg", stat.S_IFIFO)):
            special = zipfile.ZipInfo(name)
            special.create_system, special.external_attr = 3, (mode | 0o644) << 16
            archive.writestr(special, b"/etc/passwd")
        archive.writestr("bzip.jpg", DATA, zipfile.ZIP_BZIP2)
        archive.writestr("lzma.jpg", DATA, zipfile.ZIP_LZMA)
        archive.writestr("../up.jpg", b"x")
        archive.writestr("/root.jpg", b"x")
    listing = list_archive(path)
    assert list(contents(listing)) == ["full.jpg/1.jpg", "good.jpg"]
    assert failures(listing) == [
        ("%2E%2E/up.jpg", "refused"), ("%2Froot.jpg", "refused"), ("bzip.jpg", "unsupported"), ("empty.jpg", "empty"),
        ("folder.jpg", "not-an-image"), ("link.jpg", "refused"), ("lzma.jpg", "unsupported"),
        ("pipe.jpg", "not-an-image"),
    ]  # fmt: skip
    assert "(bzip2)" in listing.failures[2].reason


def test_encrypted_members_are_named(tmp_path: Path) -> None:
    path = make(tmp_path / "x.zip", {"a.jpg": DATA, "z.jpg": DATA})
    directory_field(path, 8, "<H", 1)
    listing = list_archive(path)
    assert failures(listing) == [("z.jpg", "unsupported")] and listing.failures[0].reason == "encrypted"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_last_of_several_members_with_one_name_wins(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"old")
        archive.writestr("a.jpg", b"new!")
    assert contents(list_archive(path)) == {"a.jpg": b"new!"}


def test_a_member_that_lies_about_its_size_costs_itself(tmp_path: Path) -> None:
    path = make(tmp_path / "more.zip", {"a.jpg": DATA})
    directory_field(path, 24, "<I", 100)
    failure = read_failure(path)
    assert failure.kind == "damaged" and "more than the 100 bytes" in failure.reason
    path = make(tmp_path / "less.zip", {"a.jpg": DATA})
    directory_field(path, 24, "<I", len(DATA) + 1)
    assert read_failure(path).kind == "truncated"
    path = make(tmp_path / "stored.zip", {"a.jpg": DATA, "b.jpg": DATA}, zipfile.ZIP_STORED)
    directory_field(path, 24, "<I", len(DATA) + 1)
    assert failures(list_archive(path)) == [("b.jpg", "damaged")]
    path = make(tmp_path / "huge.zip", {"a.jpg": DATA, "b.jpg": DATA})
    directory_field(path, 24, "<I", 0xFFFFFFFE)
    assert failures(list_archive(path)) == [("b.jpg", "too-large")]


def test_a_bomb_is_read_no_further_than_its_size_allows(tmp_path: Path) -> None:
    path = make(tmp_path / "x.zip", {"a.jpg": bytes(200 << 20)})
    directory_field(path, 24, "<I", 1000)
    assert path.stat().st_size < 1 << 20 and read_failure(path).kind == "damaged"
    assert failures(list_archive(make(path, {"a.jpg": bytes(1 << 20), "b.jpg": b"x"}), max_bytes=1000)) == [
        ("a.jpg", "too-large")
    ]


def test_damage_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = make(tmp_path / "x.zip", {"a.jpg": DATA}, zipfile.ZIP_STORED)
    changed(path, b"\x10\x11\x12", b"\x10\xff\x12")
    assert "checksum" in read_failure(path).reason
    path = make(tmp_path / "y.zip", {"a.jpg": os.urandom(5000)})
    data = bytearray(path.read_bytes())
    data[60:2000] = b"\xff" * 1940
    path.write_bytes(data)
    assert read_failure(path).kind == "damaged"


def test_members_that_lie_elsewhere_are_named(tmp_path: Path) -> None:
    path = make(tmp_path / "x.zip", {"a.jpg": DATA, "b.jpg": b"b"})
    directory_field(path, 42, "<I", 0x7FFFFFFF)
    assert failures(list_archive(path)) == [("b.jpg", "damaged")]
    path = make(tmp_path / "y.zip", {"a.jpg": DATA})
    directory_field(path, 42, "<I", 3)
    assert "no member where its directory says" in read_failure(path).reason


def test_an_archive_without_its_end_is_told(tmp_path: Path) -> None:
    path = make(tmp_path / "x.zip", MEMBERS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ImageError, match="its end is missing") as caught:
        list_archive(path)
    assert caught.value.kind == "truncated"


def test_of_a_directory_that_breaks_off_the_members_before_are_listed(tmp_path: Path) -> None:
    path = make(tmp_path / "x.zip", {"a.jpg": b"a", "b.jpg": b"b"})
    changed(path, b"PK\1\2", b"PX\1\2")
    listing = list_archive(path)
    assert contents(listing) == {"a.jpg": b"a"}
    assert failures(listing) == [("x.zip", "damaged")] and "after 1 of 2" in listing.failures[0].reason


def test_more_members_than_old_archives_can_count(tmp_path: Path) -> None:
    path = make(tmp_path / "x.zip", {f"{n}.jpg": b"%d" % n for n in range(66_000)}, zipfile.ZIP_STORED)
    listing = list_archive(path)
    assert len(listing.files) == 66_000 and listing.failures == []
    assert all(file.read() == file.id.removesuffix(".jpg").encode() for file in listing.files[::1000])


def test_a_status_is_the_time_as_if_in_utc_and_the_checksum(tmp_path: Path) -> None:
    def status(data: bytes, *more: str) -> tuple[int, int]:
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            for name in ("a.jpg", *more):
                archive.writestr(zipfile.ZipInfo(name, (2001, 9, 9, 1, 46, 40)), data)
        (tmp_path / "x.zip").write_bytes(target.getvalue())
        return list_archive(tmp_path / "x.zip").files[0].status()

    assert status(b"one")[0] == 3 and status(b"one")[1] // 10**9 == 1_000_000_000
    assert status(b"one") != status(b"two")
    assert status(b"one") == status(b"one", "b.jpg")


def test_impossible_times_are_no_obstacle(tmp_path: Path) -> None:
    path = make(tmp_path / "x.zip", {"a.jpg": b"x"})
    for value in (0, 0xFFFFFFFF):
        directory_field(path, 12, "<I", value)
        assert list_archive(path).files[0].status()[1] >= 315_532_800 * 10**9
