from __future__ import annotations

import bz2
import gc
import gzip
import hashlib
import io
import logging
import lzma
import os
import pickle
import random
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import embedkit as ek
from embedkit import ImageError
from embedkit.sources import Listing, content_sha256, list_folder, temporaries
from embedkit.sources.archives import descriptors
from embedkit.sources.archives.listing import find_entry, list_archive


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def contents(listing: Listing) -> dict[str, object]:
    return {file.id: file.read() for file in listing.files}


def refusal(path: Path) -> ImageError:
    with pytest.raises(ImageError) as caught:
        list_archive(path)
    return caught.value


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is nowhere to count open files")

WAYS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "tar": make_tar,
    "tar.gz": lambda path, members: make_tar(path, members, "w:gz"),
    "tar.bz2": lambda path, members: make_tar(path, members, "w:bz2"),
    "tar.xz": lambda path, members: make_tar(path, members, "w:xz"),
    "zip": make_zip,
}


@pytest.fixture(scope="module")
def some_flowers(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("some") / "flowers"
    for kind in sorted(path for path in flowers.iterdir() if path.is_dir()):
        (folder / kind.name).mkdir(parents=True)
        for image in sorted(kind.iterdir())[:8]:
            shutil.copy(image, folder / kind.name)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_real_images_are_the_same_from_a_folder_and_from_every_archive(
    some_flowers: Path, tmp_path: Path, way: str
) -> None:
    folder = list_folder(some_flowers)
    members = {file.id: Path(file.path).read_bytes() for file in reversed(folder.files)}  # type: ignore[attr-defined]
    listing = list_archive(WAYS[way](tmp_path / f"flowers.{way}", members))
    assert len(listing.files) == 40 and listing.classes == folder.classes
    for ours, theirs in zip(listing.files, folder.files, strict=True):
        assert (ours.id, ours.label, ours.status()[0]) == (theirs.id, theirs.label, theirs.status()[0])
        assert content_sha256(ours.read()) == content_sha256(theirs.read())


def test_stores_of_a_folder_and_of_every_archive_have_the_same_content(
    some_flowers: Path, tmp_path: Path, tiny_backbone: Path
) -> None:
    backbone = ek.Backbone.load(tiny_backbone)
    first = ek.extract(some_flowers, tmp_path / "folder.h5", backbone, engine="eager")
    members = {path.relative_to(some_flowers).as_posix(): path.read_bytes() for path in some_flowers.glob("*/*")}
    bad = {"../up.jpg": b"x", "/%2E%2E/up.jpg": b"x", "daisy/empty.jpg": b""}
    for way in ("tar", "tar.gz", "zip"):
        listing = list_archive(WAYS[way](tmp_path / f"flowers.{way}", members | bad))
        store = ek.extract(listing, tmp_path / f"{way}.h5", backbone, engine="eager")
        assert store.content_id == first.content_id
        assert [failure.id for failure in listing.failures] == [failure.id for failure in store.failures]
        # Nothing is read again.
        assert ek.extract(listing, tmp_path / f"{way}.h5", backbone).content_id == first.content_id


@pytest.mark.parametrize("way", ["tar", "zip"])
def test_samples_have_the_labels_that_lie_beside_them(tmp_path: Path, way: str) -> None:
    members = {
        "a/000.cls": b"7", "a/000.jpg": b"x", "a/000.json": b"{}", "a/000.left.png": b"y",
        "a/001.jpg": b"x", "a/001.txt": b"a cat", "a/001.cls": b" big dog\n",
        "a/002.jpg": b"x",
        "a/003.jpg": b"x", "a/003.cls": b"\xff",
        "a/004.jpg": b"x", "a/004.cls": b"7" * 1025,
        "b/000.jpg": b"x", "b/000.cls": b"10",
        "b/009.cls": b"no image has it",
    }  # fmt: skip
    listing = list_archive(WAYS[way](tmp_path / f"x.{way}", members))
    assert {file.id: file.label for file in listing.files} == {
        "a/000.jpg": "7", "a/000.left.png": "7", "a/001.jpg": "big dog", "a/002.jpg": None, "a/003.jpg": None,
        "a/004.jpg": None, "b/000.jpg": "10",
    }  # fmt: skip
    assert listing.classes == ["10", "7", "big dog"]
    assert [(failure.id, failure.kind) for failure in listing.failures] == [
        ("a/003.cls", "damaged"), ("a/004.cls", "too-large"),
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["tar", "zip"])
def test_a_sample_is_one_whatever_stands_between_its_members(tmp_path: Path, way: str) -> None:
    members = {"a.cls": b"rose", "a.d/x.jpg": b"1", "a.jpg": b"2", "b.cls": b"li\0ly", "b.jpg": b"3", "c.a.cls": b"1st"}
    listing = list_archive(WAYS[way](tmp_path / f"x.{way}", members | {"c.cls": b"2nd", "c.jpg": b"4"}))
    assert [(file.id, file.label) for file in listing.files] == [
        ("a.d/x.jpg", None), ("a.jpg", "rose"), ("b.jpg", None), ("c.jpg", "1st"),
    ]  # fmt: skip
    assert [(str(failure), failure.kind) for failure in listing.failures] == [
        (r"b.cls: a label has no NUL: 'li\x00ly'", "refused")
    ]


def test_labels_without_images_are_no_images(tmp_path: Path) -> None:
    assert refusal(make_tar(tmp_path / "x.tar", {"000.cls": b"7", "001.cls": b""})).kind == "damaged"
    assert refusal(make_tar(tmp_path / "y.tar", {"000.cls": b"7"})).kind == "missing"


def test_an_image_at_the_top_means_no_classes(tmp_path: Path) -> None:
    listing = list_archive(make_tar(tmp_path / "x.tar", {"cat/1.jpg": b"x", "2.jpg": b"x"}))
    assert [file.label for file in listing.files] == [None, None] and listing.classes == []


@pytest.mark.parametrize("way", WAYS)
def test_the_kind_is_told_by_the_bytes_and_not_by_the_name(tmp_path: Path, way: str) -> None:
    assert contents(list_archive(WAYS[way](tmp_path / "photos", {"1.jpg": b"x"}))) == {"1.jpg": b"x"}


@pytest.mark.parametrize(
    ("data", "reason", "kind"),
    [
        (b"", "the file is empty", "empty"),
        (b"7z\xbc\xaf\x27\x1c...", "7z archives are not read", "unsupported"),
        (b"Rar!\x1a\7...", "RAR archives are not read", "unsupported"),
        (b"\xff\xd8\xff" * 500, "no tar or zip archive", "not-an-image"),
        (b"%PDF-1.7\n", "no tar or zip archive but a PDF document", "not-an-image"),
        (b"Dear sir,\n" * 99, "no tar or zip archive but a text", "not-an-image"),
        (gzip.compress(b"text" * 1000), "no tar archive in it", "unsupported"),
        (bz2.compress(b""), "no images in it", "missing"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "Zstandard", "unsupported"),
    ],
)
def test_what_is_no_archive_is_told(tmp_path: Path, data: bytes, reason: str, kind: str) -> None:
    if reason == "Zstandard" and sys.version_info >= (3, 14):
        pytest.skip("this Python reads Zstandard")
    path = tmp_path / "x"
    path.write_bytes(data)
    error = refusal(path)
    assert reason in error.reason and error.kind == kind and str(path) in error.id


def test_a_zip_archive_by_its_name_alone_is_told_or_read_as_what_it_is(tmp_path: Path) -> None:
    fake, zipped = tmp_path / "fake.zip", make_zip(tmp_path / "x.zip", {"1.jpg": b"x"}).read_bytes()
    for way in ("tar", "tar.gz"):
        assert contents(list_archive(WAYS[way](fake, {"1.jpg": b"x"}))) == {"1.jpg": b"x"}
    fake.write_bytes(b"MZ\x90\0" + b"program" * 99 + zipped)
    assert contents(list_archive(fake)) == {"1.jpg": b"x"}  # One that unpacks itself.
    for body, reason, kind in [
        (b"Dear sir,\n" * 99, "no tar or zip archive but a text", "not-an-image"),
        (b"", "the file is empty", "empty"),
        (zipped[:-20], "its end is missing, where a zip archive has its directory", "truncated"),
    ]:
        fake.write_bytes(body)
        assert (refusal(fake).reason, refusal(fake).kind) == (reason, kind)


def test_no_file_a_folder_and_a_pipe_are_told_apart(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    assert refusal(tmp_path / "none.tar").kind == "missing"
    assert "a folder" in refusal(tmp_path).reason
    assert "no regular file" in refusal(tmp_path / "pipe.tar").reason


MEMBERS = {f"{n}.jpg": random.Random(n).randbytes(4000) for n in range(50)}


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
def test_several_compressed_files_in_a_row_are_one_and_garbage_after_them_is_passed_over(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    tar = make_tar(tmp_path / "x.tar", MEMBERS).read_bytes()
    path = tmp_path / "x.tgz"
    path.write_bytes(compress(tar[:70_001]) + bytes(5000) + compress(tar[70_001:]) + b"\0\0garbage")
    listing = list_archive(path)
    assert contents(listing) == MEMBERS and listing.failures == []


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
def test_what_unpacks_to_much_at_once_comes_out_whole(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    members = {"large.jpg": b"1" * (5 << 20), "last.jpg": b"2" * 3_000_001}
    path = tmp_path / "x.tgz"
    path.write_bytes(compress(make_tar(tmp_path / "x.tar", members).read_bytes()))
    assert contents(list_archive(path)) == members


@pytest.mark.parametrize("way", ["tar.gz", "tar.bz2", "tar.xz"])
def test_of_a_compressed_archive_that_breaks_off_the_whole_members_are_listed(tmp_path: Path, way: str) -> None:
    members = {f"{n:04}.jpg": random.Random(n).randbytes(20_000) for n in range(100)}
    path = WAYS[way](tmp_path / f"x.{way}", members)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 9 // 10])
    listing = list_archive(path)
    assert 20 < len(listing.files) < 100
    assert all(file.read() == members[file.id] for file in listing.files)
    failed = {failure.id: failure.kind for failure in listing.failures}
    assert failed.pop(f"x.{way}") == "truncated" and len(failed) < len(listing.failures) < 3
    path.write_bytes(whole[: len(whole) * 8 // 10] + bytes(100) + whole[len(whole) * 8 // 10 :])
    assert any(failure.kind == "damaged" for failure in list_archive(path).failures)


@needs_proc
def test_a_bomb_is_stopped_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = make_tar(tmp_path / "x.tgz", {"zeros.bin": bytes(50 << 20), "a.jpg": b"x"}, "w:gz")
    gc.collect()
    before = open_files()
    with pytest.raises(ImageError, match="unpacks to more than 10,000,000 bytes") as caught:
        list_archive(path, max_unpacked_bytes=10_000_000)
    assert caught.value.kind == "too-large"
    monkeypatch.setattr(temporaries, "FREE_BYTES", 1 << 62)
    assert "TMPDIR names another folder" in refusal(path).reason
    del caught
    gc.collect()
    assert os.listdir(tmp_path) == ["x.tgz"] and open_files() == before


def test_unpacking_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_tar(tmp_path / "x.tgz", {"a.jpg": b"x"}, "w:gz")
    with caplog.at_level(logging.INFO, "embedkit"):
        list_archive(path)
    assert f"unpacking x.tgz ({path.stat().st_size:,} bytes)" in caplog.text and "to 10,240 bytes" in caplog.text


@pytest.mark.parametrize("way", WAYS)
def test_threads_read_at_the_same_time(tmp_path: Path, way: str) -> None:
    members = {f"{n}.jpg": random.Random(n).randbytes(50_000) for n in range(60)}
    files = list_archive(WAYS[way](tmp_path / f"x.{way}", members)).files
    with ThreadPoolExecutor(8) as pool:
        for data, file in zip(pool.map(lambda file: file.read(), list(files) * 10), list(files) * 10, strict=True):
            assert data == members[file.id]


@needs_proc
@pytest.mark.parametrize("way", WAYS)
def test_a_listing_that_is_gone_keeps_nothing_open(tmp_path: Path, way: str) -> None:
    gc.collect()
    before = open_files()
    listing = list_archive(WAYS[way](tmp_path / f"x.{way}", {"1.jpg": b"x"}))
    entry = listing.files[0]
    del listing
    assert entry.read() == b"x" and open_files() == before + 1
    del entry
    gc.collect()
    assert open_files() == before


@needs_proc
def test_of_many_archives_only_some_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MOST_OPEN", 5)
    gc.collect()
    before = open_files()
    paths = [make_tar(tmp_path / f"{n}.tar", {"1.jpg": b"%d" % n}) for n in range(30)]
    monkeypatch.chdir(tmp_path)
    files = [list_archive(path.name).files[0] for path in paths]
    monkeypatch.chdir("/")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda file: file.read(), files * 20)) == [b"%d" % n for n in range(30)] * 20
    assert before < open_files() <= before + 5
    pool.shutdown()


@pytest.mark.parametrize("way", ["tar", "zip"])
def test_an_archive_that_was_written_to_meanwhile_is_not_read(tmp_path: Path, way: str) -> None:
    path = WAYS[way](tmp_path / f"x.{way}", {"1.jpg": b"x"})
    (file,) = list_archive(path).files
    with path.open("ab") as appended:
        appended.write(b"more")
    with pytest.raises(ImageError, match=r"1\.jpg: the archive has changed since it was listed") as caught:
        file.read()
    assert caught.value.kind == "unreadable"  # So that the next run tries again.


@pytest.mark.parametrize("way", ["tar", "zip"])
def test_an_entry_of_a_file_goes_to_other_processes(tmp_path: Path, way: str) -> None:
    path = WAYS[way](tmp_path / f"x.{way}", {"1.jpg": b"x"})
    (file,) = list_archive(path).files
    sent = pickle.dumps(file)
    assert pickle.loads(sent).read() == b"x" and pickle.loads(sent).status() == file.status()
    other = WAYS[way](tmp_path / f"other.{way}", {"1.jpg": b"y"})
    os.utime(other, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)
    with pytest.raises(ImageError, match="has changed since it was listed") as caught:
        pickle.loads(sent).read()
    assert caught.value.kind == "unreadable"
    path.unlink()
    with pytest.raises(ImageError, match="no such file"):
        pickle.loads(sent).read()


def test_an_archive_called_like_its_member_fails_under_another_name(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "1.jpg", {"1.jpg": b"x"})
    path.write_bytes(path.read_bytes()[:1024] + b"rest")
    (failure,) = list_archive(path).failures
    assert failure.id == "1.jpg!" and failure.kind == "truncated"


def test_one_image_is_found_by_its_id(tmp_path: Path) -> None:
    listing = list_archive(make_tar(tmp_path / "x.tar", {"ä.jpg": b"1", "a/1.jpg": b"2", "caf\udce9.jpg": b"3"}))
    assert [find_entry(listing, id).read() for id in ("ä.jpg", "a/1.jpg", "caf\udce9.jpg")] == [b"1", b"2", b"3"]
    for id in ("", "a", "z.jpg"):
        with pytest.raises(ImageError, match="no such image"):
            find_entry(listing, id)


def mutant(data: bytes, numbers: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(numbers.choice([1, 3, 30])):
        at = numbers.randrange(len(changed))
        match numbers.randrange(4):
            case 0:
                changed[at] ^= 1 << numbers.randrange(8)
            case 1:
                changed[at : at + 8] = numbers.choice([bytes(8), b"\xff" * 8, numbers.randbytes(8)])
            case 2:
                del changed[at : at + numbers.choice([1, 512, 5000])]
            case 3:
                other = numbers.randrange(len(changed))
                changed[at:at] = changed[other : other + numbers.choice([1, 512, 3000])]
    return bytes(changed[: numbers.randrange(1, len(changed) + 1)] if numbers.random() < 0.3 else changed) or b"x"


@pytest.mark.parametrize("way", WAYS)
def test_mutated_archives_raise_nothing_but_image_errors(tmp_path: Path, way: str) -> None:
    members = {f"{'d' * n}/{n}.jpg": random.Random(n).randbytes(100 * n) for n in range(1, 140, 12)}
    members |= {"ä/x.jpg": b"x" * 3000, "ä/x.cls": b"label"}
    whole = WAYS[way](tmp_path / f"x.{way}", members).read_bytes()
    known = {hashlib.sha256(data).digest() for data in members.values()}
    numbers, path = random.Random(way), tmp_path / f"mutant.{way}"
    listed = read = 0
    for _ in range(150):
        path.unlink(missing_ok=True)
        path.write_bytes(mutant(whole, numbers))
        try:
            listing = list_archive(path)
        except ImageError:
            continue
        listed += 1
        for file in listing.files:
            try:
                data = file.read()
            except ImageError:
                continue
            assert isinstance(data, bytes) and len(data) == file.status()[0]
            read += content_sha256(data) in known
    # Of a compressed archive as small as this, hardly anything outlives a change.
    assert way not in ("tar", "zip") or (listed > 50 and read > 300)
