from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from embedkit import ImageError
from embedkit.sources import Listing
from embedkit.sources.archives.catalogues import _Namesakes
from embedkit.sources.archives.listing import list_archive
from embedkit.sources.archives.members import Member, Place
from embedkit.sources.entries import require_inside

Members = dict[str, bytes]


def info(name: str, size: int = 0, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size = size
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def add(archive: tarfile.TarFile, name: str, data: bytes = b"x", **fields: object) -> None:
    archive.addfile(info(name, len(data), **fields), io.BytesIO(data))


def make(path: Path, members: Members, format: int = tarfile.PAX_FORMAT, **fields: object) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members.items():
            add(archive, name, data, **fields)
    return path


def contents(listing: Listing) -> dict[str, object]:
    return {file.id: file.read() for file in listing.files}


def failures(listing: Listing) -> list[tuple[str, str]]:
    return [(failure.id, failure.kind) for failure in listing.failures]


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_members_are_read_where_they_lie(tmp_path: Path, format: int) -> None:
    members = {
        "b.jpg": b"B" * 512, "a/z.PNG": b"Z" * 513, "a/deep/x.jpeg": b"X", "Ä.jpg": b"umlaut", "a-b.tif": bytes(2000),
        "line\nbreak.gif": b"G", "d" * 90 + "/" + "n" * 95 + ".jpg": b"long",
    }  # fmt: skip
    others = {
        "notes.txt": b"",
        "x.json": b"{}",
        ".hidden.jpg": b"x",
        "a/._x.jpg": b"x",
        "__MACOSX/a.jpg": b"x",
        ".g/x.jpg": b"x",
    }
    listing = list_archive(make(tmp_path / "x.tar", members | others, format))
    assert contents(listing) == members
    assert [file.id for file in listing.files] == sorted(members, key=os.fsencode)
    assert (listing.ignored, listing.failures, listing.classes) == (6, [], [])
    assert listing.root == tmp_path / "x.tar"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_bytes_keep_them(tmp_path: Path, format: int) -> None:
    long, bare = "d/" * 300 + "x.jpg", "caf\udce9.jpg"
    listing = list_archive(make(tmp_path / "x.tar", {long: b"1", bare: b"2"}, format))
    assert contents(listing) == {long: b"1", bare: b"2"}
    assert os.fsencode(listing.files[0].id) == b"caf\xe9.jpg"


def test_dots_and_doubled_slashes_mean_nothing(tmp_path: Path) -> None:
    listing = list_archive(make(tmp_path / "x.tar", {"./a/1.jpg": b"1", "././b//2.jpg": b"2", "c/./3.jpg": b"3"}))
    assert contents(listing) == {"a/1.jpg": b"1", "b/2.jpg": b"2", "c/3.jpg": b"3"}
    assert [file.label for file in listing.files] == listing.classes == ["a", "b", "c"]


def test_the_last_of_several_members_with_one_name_wins(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "a.jpg", b"old")
        add(archive, "b.jpg", b"file")
        add(archive, "./a.jpg", b"new!")
        archive.addfile(info("b.jpg", type=tarfile.SYMTYPE, linkname="a.jpg"))
    listing = list_archive(path)
    assert contents(listing) == {"a.jpg": b"new!"}
    assert failures(listing) == [("b.jpg", "refused")]


def test_hard_links_are_what_they_name(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(info("forward.jpg", type=tarfile.LNKTYPE, linkname="./z/last.jpg"))
        add(archive, "a.jpg", b"first", mtime=1000)
        archive.addfile(info("b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"))
        add(archive, "a.jpg", b"second")  # In unpacking, it would not touch the link.
        add(archive, ".store/4711", b"hidden")
        archive.addfile(info("c.jpg", type=tarfile.LNKTYPE, linkname=".store/4711"))
        archive.addfile(info("chain.jpg", type=tarfile.LNKTYPE, linkname="b.jpg"))
        archive.addfile(info("loop.jpg", type=tarfile.LNKTYPE, linkname="loop.jpg"))
        archive.addfile(info("lost.jpg", type=tarfile.LNKTYPE, linkname="/etc/passwd"))
        archive.addfile(info("up.jpg", type=tarfile.LNKTYPE, linkname="../x.jpg"))
        add(archive, "z/last.jpg", b"last")
    listing = list_archive(path)
    assert contents(listing) == {
        "a.jpg": b"second", "b.jpg": b"first", "c.jpg": b"hidden", "chain.jpg": b"first", "forward.jpg": b"last",
        "z/last.jpg": b"last",
    }  # fmt: skip
    assert failures(listing) == [("loop.jpg", "missing"), ("lost.jpg", "missing"), ("up.jpg", "missing")]
    assert "'/etc/passwd', which the archive does not have" in listing.failures[1].reason


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "good.jpg")
        add(archive, "empty.jpg", b"")
        archive.addfile(info("link.jpg", type=tarfile.SYMTYPE, linkname="good.jpg"))
        archive.addfile(info("pipe.jpg", type=tarfile.FIFOTYPE))
        archive.addfile(info("disk.jpg", type=tarfile.BLKTYPE))
        archive.addfile(info("folder.jpg", type=tarfile.DIRTYPE))
        archive.addfile(info("full.jpg", type=tarfile.DIRTYPE))
        add(archive, "full.jpg/1.jpg")
        archive.addfile(info("plain/", type=tarfile.DIRTYPE))
    listing = list_archive(path)
    assert list(contents(listing)) == ["full.jpg/1.jpg", "good.jpg"]
    assert failures(listing) == [
        ("disk.jpg", "not-an-image"), ("empty.jpg", "empty"), ("folder.jpg", "not-an-image"), ("link.jpg", "refused"),
        ("pipe.jpg", "not-an-image"),
    ]  # fmt: skip
    assert listing.ignored == 0


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "./../x.jpg", "//x.jpg"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    listing = list_archive(make(tmp_path / "x.tar", {name: b"x", "good.jpg": b"x"}))
    assert [file.id for file in listing.files] == ["good.jpg"]
    (failure,) = listing.failures
    assert failure.kind == "refused" and failure.id == require_inside(failure.id) and failure.id.endswith("x.jpg")


def test_names_with_nul_and_endless_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "good.jpg")
        add(archive, "plain.jpg", pax_headers={"path": "a\0b.jpg"})
        add(archive, "x" * 10_000 + ".jpg")
    listing = list_archive(path)
    assert failures(listing) == [("a%00b.jpg", "refused"), ("x" * 4096, "refused")]


def test_times_are_those_of_the_members_to_the_second(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "float.jpg", mtime=1_700_000_000.25)
        add(archive, "old.jpg", mtime=-5)
        add(archive, "whole.jpg", mtime=1_600_000_000)
        add(archive, "wild.jpg", pax_headers={"mtime": "9" * 12})
    listing = list_archive(path)
    seconds = [file.status()[1] // 10**9 for file in listing.files]
    assert seconds == [1_700_000_000, -5, 1_600_000_000, 2**63 // 10**9 - 1]
    base = make(tmp_path / "gnu.tar", {"a.jpg": b"x"}, tarfile.GNU_FORMAT, mtime=-5)
    assert list_archive(base).files[0].status()[1] // 10**9 == -5


def test_global_headers_have_a_time_for_all_and_no_name(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"mtime": "77", "path": "all.jpg"}) as archive:
        add(archive, "a.jpg")
        add(archive, "b.jpg", mtime=88.5)
    listing = list_archive(path)
    assert [(file.id, file.status()[1] // 10**9) for file in listing.files] == [("a.jpg", 77), ("b.jpg", 88)]


def test_huge_sizes_in_both_ways_of_writing_them(tmp_path: Path) -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        size = 9 << 30
        with open(path, "wb") as file:
            file.write(info("huge.bin", size).tobuf(format))
            file.seek(size, os.SEEK_CUR)
            file.write(info("late.jpg", 4).tobuf(format) + b"late".ljust(512, b"\0") + bytes(1024))
        listing = list_archive(path)
        assert contents(listing) == {"late.jpg": b"late"} and listing.failures == []


def test_files_larger_than_the_limit_are_named_and_not_read(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", {"big.jpg": bytes(1001), "fit.jpg": bytes(1000)})
    listing = list_archive(path, max_bytes=1000)
    assert [file.id for file in listing.files] == ["fit.jpg"]
    assert failures(listing) == [("big.jpg", "too-large")]
    assert "1,001 bytes; at most 1,000" in listing.failures[0].reason


def test_sparse_members_are_named_and_skipped(tmp_path: Path) -> None:
    old = bytearray(info("old.jpg", 512, type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    old[482] = 1  # The map goes on in another block.
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    path = tmp_path / "x.tar"
    sparse = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "new.jpg",
        "GNU.sparse.realsize": "9",
    }
    with open(path, "wb") as file:
        file.write(bytes(old) + bytes(512) + b"D" * 512)
        file.write(info("GNUSparseFile.1/new.jpg", 512, pax_headers=sparse).tobuf(tarfile.PAX_FORMAT) + b"E" * 512)
        file.write(info("good.jpg", 4).tobuf() + b"good".ljust(512, b"\0") + bytes(1024))
    listing = list_archive(path)
    assert contents(listing) == {"good.jpg": b"good"}
    assert failures(listing) == [("new.jpg", "unsupported"), ("old.jpg", "unsupported")]


def test_of_a_truncated_archive_the_whole_members_are_listed(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", {"a.jpg": b"a" * 1000, "b.jpg": b"b" * 1000}, tarfile.GNU_FORMAT)
    whole = path.read_bytes()
    path.write_bytes(whole[: 512 + 1024 + 512 + 700])
    listing = list_archive(path)
    assert contents(listing) == {"a.jpg": b"a" * 1000}
    assert failures(listing) == [("b.jpg", "truncated")]
    path.write_bytes(whole[: 512 + 1024 + 100])
    assert failures(list_archive(path)) == [("x.tar", "truncated")]
    path.write_bytes(whole[: 512 + 1024 + 512 + 1000])  # All is there but what fills the block.
    assert list(contents(list_archive(path))) == ["a.jpg", "b.jpg"]


def test_an_archive_that_is_cut_between_two_members_says_so(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", {f"{n}.jpg": b"x" * 1000 for n in range(9)}, tarfile.GNU_FORMAT)
    member, whole = 512 + 1024, path.read_bytes()
    path.write_bytes(whole[: 3 * member])
    listing = list_archive(path)
    assert list(contents(listing)) == ["0.jpg", "1.jpg", "2.jpg"]
    assert failures(listing) == [("x.tar", "truncated")]
    assert listing.failures[0].reason == (
        "the zeros that end an archive are missing: it was cut off, and members may be missing, too"
    )
    for zeros in (1, 512, 1024, 10_240):  # Writers have different habits.
        path.write_bytes(whole[: 9 * member] + bytes(zeros))
        assert len(list_archive(path).files) == 9 and not list_archive(path).failures
    path.write_bytes(whole + whole[: 9 * member])  # Joined, and the second one cut.
    assert failures(list_archive(path)) == [("x.tar", "truncated")]


def test_what_follows_a_damaged_header_is_found(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", {"a.jpg": b"a", "b.jpg": b"b" * 9000, "c.jpg": b"c"}, tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[1024] ^= 1  # The name of b.jpg.
    path.write_bytes(data)
    listing = list_archive(path)
    assert contents(listing) == {"a.jpg": b"a", "c.jpg": b"c"}
    assert failures(listing) == [("x.tar", "damaged")]
    assert "at byte 1,024" in listing.failures[0].reason


def test_archives_joined_with_cat_are_read_to_the_last_and_other_rests_are_not(tmp_path: Path) -> None:
    first = make(tmp_path / "1.tar", {"a.jpg": b"a"}).read_bytes()
    second = make(tmp_path / "2.tar", {"b.jpg": b"b"}).read_bytes()
    path = tmp_path / "x.tar"
    path.write_bytes(first + second + b"garbage" * 1000)
    listing = list_archive(path)
    assert contents(listing) == {"a.jpg": b"a", "b.jpg": b"b"} and listing.failures == []


def test_an_archive_in_an_archive_is_another_file(tmp_path: Path) -> None:
    inner = make(tmp_path / "inner.tar", {"in.jpg": b"in"}).read_bytes()
    listing = list_archive(make(tmp_path / "x.tar", {"inner.tar": inner, "out.jpg": b"out"}))
    assert contents(listing) == {"out.jpg": b"out"} and listing.ignored == 1


def test_rows_of_extended_headers_cost_no_more_than_their_bytes(tmp_path: Path) -> None:
    head = info("././@LongLink", 5, type=tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "x.tar"
    row = (head + b"a.jpg".ljust(512, b"\0")) * 20_000  # Deeper than Python calls.
    path.write_bytes(row + info("short", 1).tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0") + bytes(1024))
    assert contents(list_archive(path)) == {"a.jpg": b"x"}


def test_an_extended_header_that_is_too_large_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    head = info("pax", 2 << 20, type=tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(head + bytes(2 << 20) + info("a.jpg", 1).tobuf() + b"x".ljust(512, b"\0"))
    listing = list_archive(path)
    assert contents(listing) == {"a.jpg": b"x"} and failures(listing) == [("x.tar", "damaged")]


def test_old_archives_without_a_magic_are_read(tmp_path: Path) -> None:
    def block(name: bytes, size: int) -> bytes:
        head = struct.pack("100s8s8s8s12s12s8s356x", name, b"644", b"0", b"0", b"%o" % size, b"7", b" " * 8)
        return head.replace(b" " * 8, b"%06o\0 " % sum(head), 1)

    path = tmp_path / "x.tar"
    path.write_bytes(block(b"folder.jpg/", 0) + block(b"folder.jpg/a.jpg", 3) + b"old".ljust(512, b"\0") + bytes(1024))
    listing = list_archive(path)
    assert contents(listing) == {"folder.jpg/a.jpg": b"old"} and listing.failures == []


def test_an_empty_archive_and_one_without_images_are_told(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no images in it \(0 other files\)"):
        list_archive(make(tmp_path / "empty.tar", {}))
    with pytest.raises(ImageError, match=r"no images in it \(1 other files\)"):
        list_archive(make(tmp_path / "text.tar", {"a.txt": b""}))


def test_what_has_no_header_at_all_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for body, likeness in (
        (b"\1" * 5000, ""),
        (b"Dear sir,\n" * 500, " but a text"),
        (b"<html>404" * 99, " but a web"),
    ):
        path.write_bytes(body)
        with pytest.raises(ImageError, match=f"no tar or zip archive{likeness}") as caught:
            list_archive(path)
        assert caught.value.kind == "not-an-image"


def test_an_archive_whose_first_header_is_damaged_is_read_from_the_second_on(tmp_path: Path) -> None:
    path = make(tmp_path / "x.tar", {"a.jpg": b"a", "b.jpg": b"b"}, tarfile.GNU_FORMAT)
    path.write_bytes(b"?" + path.read_bytes()[1:])
    listing = list_archive(path)
    assert contents(listing) == {"b.jpg": b"b"} and failures(listing) == [("x.tar", "damaged")]


def test_a_name_that_is_refused_takes_no_image_along(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("%2Fa.jpg", "/a.jpg", "..", "../b.jpg", "%2E%2E/b.jpg", "/a.jpg"):
            add(archive, name, name.encode())
    listing = list_archive(path)
    assert contents(listing) == {"%2E%2E/b.jpg": b"%2E%2E/b.jpg", "%2Fa.jpg": b"%2Fa.jpg"}
    assert failures(listing) == [("%2E%2E/b.jpg!", "refused"), ("%2Fa.jpg!", "refused")]


def test_each_link_is_the_last_file_before_it_however_many_there_are(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(info("before.jpg", type=tarfile.LNKTYPE, linkname="t.jpg"))
        for number in range(300):
            add(archive, "t.jpg", b"%d" % number)
            if number % 3 == 0:
                archive.addfile(info(f"{number:03}.jpg", type=tarfile.LNKTYPE, linkname="t.jpg"))
    expected = {f"{number:03}.jpg": b"%d" % number for number in range(0, 300, 3)}
    assert contents(list_archive(path)) == expected | {"before.jpg": b"299", "t.jpg": b"299"}


def test_of_members_with_one_name_only_those_that_links_stand_for_are_kept() -> None:
    file = Member(b"t.jpg", Place(0, 1, 1, 0))
    namesakes = _Namesakes()
    for position in range(1, 1001):
        namesakes.add(position, file, position // 500)
    assert namesakes.positions == [499, 999, 1000]
    assert [namesakes.before(position)[0] for position in (500, 501, 1000, 1001, 9)] == [499, 499, 999, 1000, 1000]


def test_endless_names_and_targets_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.tgz"
    endless = "x/" * 200_000
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "good.jpg")
        for number in range(40):
            add(archive, f"{endless}{number}.cls", b"\xff\xfe")
            archive.addfile(info(f"{number}.jpg", type=tarfile.LNKTYPE, linkname=f"{endless}{number}"))
            archive.addfile(info("t.jpg", type=tarfile.LNKTYPE, linkname=f"{endless}{number}"))
            archive.addfile(info(f"t{number}.jpg", type=tarfile.LNKTYPE, linkname="t.jpg"))
    tracemalloc.start()
    listing = list_archive(path)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert [file.id for file in listing.files] == ["good.jpg"] and listing.ignored == 40
    assert kept < 1 << 20 and max(len(str(failure)) for failure in listing.failures) < 5000
    assert {failure.kind for failure in listing.failures} == {"refused", "missing"}
