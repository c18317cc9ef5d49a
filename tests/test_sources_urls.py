"""Archives and tables behind URLs."""

from __future__ import annotations

import http.server
import io
import os
import random
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import embedkit as ek
from embedkit import Backbone, ImageError, list_images
from embedkit.images import Region
from embedkit.sources import Listing, list_archive, list_manifest, temporaries
from embedkit.sources.remote.downloads import download
from embedkit.sources.remote.ranges import ReadAhead, open_ranged
from embedkit.sources.remote.transfers import Patience

fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

QUICK = Patience(delay=0.01, timeout=5.0)
MEMBERS = {
    f"{'cat' if number % 2 else 'dog'}/{number:02}.jpg": random.Random(number).randbytes(100 + 40_000 * (number % 3))
    for number in range(20)
}
LATEST = list(MEMBERS)[-1]


class Server:
    """A web server of this machine that gives files, in parts or whole."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.failing: list[int] = []
        self.tag = "one"
        self.is_ranged = True
        self.says_length = True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                server.answer(self, "")

            def do_GET(self) -> None:
                server.asked.append((self.path, self.headers["Range"]))
                server.answer(self, self.headers["Range"] or "")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda request, address: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler, wanted: str) -> None:
        body = self.files.get(handler.path.partition("?")[0])
        if body is None or (handler.command == "GET" and self.failing):
            return handler.send_error(404 if body is None else self.failing.pop())
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        is_part = self.is_ranged and wanted != ""
        piece = body[int(start) : int(end) + 1] if is_part else body
        handler.send_response(206 if is_part else 200)
        if is_part:
            handler.send_header("Content-Range", f"bytes {start}-{int(start) + len(piece) - 1}/{len(body)}")
        if self.says_length:
            handler.send_header("Content-Length", str(len(piece)))
        handler.send_header("ETag", f'"{self.tag}"')
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(piece)
        return None

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def as_tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for time, (name, data) in enumerate(members.items(), 1):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), time
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def as_zip(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


ARCHIVES = {
    "x.tar": as_tar(MEMBERS),
    "x.tgz": as_tar(MEMBERS, "w:gz"),
    "x.zip": as_zip(MEMBERS),
    "stored.zip": as_zip(MEMBERS, zipfile.ZIP_STORED),
}


def contents(listing: Listing) -> dict[str, object]:
    return {file.id: file.read() for file in listing.files}


def refusals(listing: Listing) -> dict[str, tuple[str, str]]:
    return {failure.id: (failure.reason, failure.kind) for failure in listing.failures}


@pytest.mark.parametrize("is_ranged", [True, False])
@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_behind_a_url_is_that_of_this_machine(
    server: Server, tmp_path: Path, name: str, is_ranged: bool
) -> None:
    server.files[f"/{name}"] = ARCHIVES[name]
    server.is_ranged = is_ranged
    (tmp_path / name).write_bytes(ARCHIVES[name])
    here, there = list_archive(tmp_path / name), list_archive(f"{server.url}/{name}")
    assert contents(there) == contents(here) == MEMBERS
    # The latest of all times tells nothing by itself; and of what was downloaded whole, nobody knows the version.
    times = {file.id: (file.status(), other.status()) for file, other in zip(here.files, there.files, strict=True)}
    assert [id for id, (one, two) in times.items() if one != two] == ([] if "zip" in name else [LATEST])
    assert (there.classes, there.failures, there.root) == (["cat", "dog"], [], f"{server.url}/{name}")
    # Of a server that gives parts, never the whole; of another, once, after it was asked for a part.
    assert is_ranged == all(wanted for _, wanted in server.asked)
    assert is_ranged or len(server.asked) == 2


def test_headers_of_small_members_are_read_many_at_a_time(server: Server) -> None:
    server.files["/x.tar"] = as_tar({f"{number}.jpg": b"x" * (number % 900 + 1) for number in range(10_000)})
    listing = list_archive(f"{server.url}/x.tar")
    assert len(listing.files) == 10_000
    assert len(server.asked) < 20


def test_what_lies_between_headers_of_large_members_is_not_read(server: Server) -> None:
    server.files["/x.tar"] = as_tar({f"{number}.jpg": bytes(3 << 20) for number in range(8)})
    assert len(list_archive(f"{server.url}/x.tar").files) == 8
    assert len(server.asked) < 16
    lengths = [int(end) - int(start) for _, wanted in server.asked for start, end in [(wanted or "")[6:].split("-")]]
    assert sum(lengths) < 1 << 20


def test_labels_beside_images_cost_no_requests_of_their_own(server: Server) -> None:
    samples = {f"{number}.{suffix}": data for number in range(300) for suffix, data in (("cls", b"7"), ("jpg", b"x"))}
    server.files["/x.tar"] = as_tar(samples)
    listing = list_archive(f"{server.url}/x.tar")
    assert {file.label for file in listing.files} == {"7"} and len(server.asked) < 10


@pytest.mark.parametrize("name", ["x.tar", "x.zip", "stored.zip"])
def test_an_image_in_an_archive_is_one_request(server: Server, name: str) -> None:
    server.files[f"/{name}"] = ARCHIVES[name]
    files = list_archive(f"{server.url}/{name}").files
    server.asked.clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda file: file.read(), files)) == [MEMBERS[file.id] for file in files]
    assert len(server.asked) == len(MEMBERS)


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_an_archive_that_changes_gives_failures_and_no_other_pixels(server: Server, name: str) -> None:
    server.files[f"/{name}"] = ARCHIVES[name]
    first, second, *_ = list_archive(f"{server.url}/{name}").files
    assert first.read() == MEMBERS[first.id]
    server.tag = "two"
    with pytest.raises(ImageError, match="has changed") as caught:
        second.read()
    assert (caught.value.id, caught.value.kind) == (second.id, "unreadable")
    server.tag, server.is_ranged = "one", False
    with pytest.raises(ImageError, match="now gives the whole") as caught:
        second.read()
    del server.files[f"/{name}"]
    with pytest.raises(ImageError) as caught:
        second.read()
    assert (caught.value.id, caught.value.kind) == (second.id, "missing")


def test_an_object_that_changes_gives_failures(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/b/x.tar", ARCHIVES["x.tar"])
    listing = list_images("memory://b/x.tar")
    assert contents(listing) == MEMBERS
    memory.pipe_file("/b/x.tar", ARCHIVES["x.tar"])
    with pytest.raises(ImageError, match="has changed"):
        listing.files[0].read()


def test_parts_are_asked_for_again(server: Server) -> None:
    server.files["/x"] = body = random.Random(0).randbytes(100_000)
    server.failing = [503]
    file = open_ranged(f"{server.url}/x?key=1", patience=QUICK)
    assert file and file.size == len(body) and file.path == f"{server.url}/x"
    server.failing = [500, 503]
    assert file.read_at(99_000, 5000) == body[99_000:]
    assert file.read_at(100_000, 10) == file.read_at(200_000, 10) == b""
    server.failing = [500] * 9
    with pytest.raises(ImageError, match="answers 500") as caught:
        file.read_at(0, 10)
    assert caught.value.id == file.path and "key" not in repr(file)


def test_reading_ahead_gives_the_same_bytes(memory: fsspec.AbstractFileSystem) -> None:
    body = random.Random(0).randbytes(3_000_000)
    memory.pipe_file("/x", body)
    file = open_ranged("memory://x")
    assert file
    ahead, chance = ReadAhead(file), random.Random(1)
    places = [(chance.randrange(3_100_000), chance.choice([0, 1, 512, 70_000])) for _ in range(200)]
    for offset, size in [*places, *sorted(places)]:
        assert ahead.read_at(offset, size) == body[offset : offset + size]


def test_an_empty_archive_is_named(server: Server, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/x.tar", b"")
    server.files |= {"/x.tar": b"no archive" * 100, "/x.zip": b"PK\3\4"}
    for url, reason in [
        ("memory://x.tar", "the file is empty"), (f"{server.url}/x.tar", "no tar or zip archive but a text"),
        (f"{server.url}/x.zip", "its end is missing"), (f"{server.url}/none.tar", "missing"),
    ]:  # fmt: skip
        with pytest.raises(ImageError, match=reason) as caught:
            list_images(url)
        assert caught.value.id == url


def test_a_download_has_limits(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/x.tar"] = ARCHIVES["x.tar"]
    server.is_ranged = False
    for says_length in (True, False):
        server.says_length = says_length
        with pytest.raises(ImageError, match="more than 1,000 bytes") as caught:
            download(f"{server.url}/x.tar", io.BytesIO(), max_bytes=1000)
        assert caught.value.kind == "too-large"
    monkeypatch.setattr(temporaries, "FREE_BYTES", 1 << 62)
    with pytest.raises(ImageError, match="no room to download"):
        list_archive(f"{server.url}/x.tar")


def test_shards_behind_urls_have_names_of_their_own(server: Server) -> None:
    for number in range(2):
        server.files[f"/s/{number:03}.tar"] = as_tar({"cat/1.jpg": b"%d" % number})
    listing = list_images(f"{server.url}/s/{{000..001}}.tar?key=1")
    assert contents(listing) == {"000/cat/1.jpg": b"0", "001/cat/1.jpg": b"1"}
    assert listing.sources == {f"{number:03}": f"{server.url}/s/{number:03}.tar" for number in range(2)}
    assert all(path.endswith("?key=1") for path, _ in server.asked)


def test_rows_of_a_table_behind_a_url_lie_below_its_folder(server: Server) -> None:
    other = Server()
    try:
        rows = ["a b.jpg,x", f"{server.url}/t/c%20d.jpg,y", f"{server.url.upper()}/t/e/./f.jpg,x",
                f"{server.url}/up.jpg,x", "../up.jpg,x", "/up.jpg,x", f"{other.url}/t/1.jpg,x", "http://169.254.169.254/1.jpg,x",
                f"{server.url}/t/a%2Fb.jpg,x", f"{server.url}/t/%2e%2e/up.jpg,x", f"{server.url}/t/1.jpg?key=1,x",
                f"{server.url.replace('//', '//me@')}/t/1.jpg,x", "file:///etc/passwd,x", "http://[,x"]  # fmt: skip
        server.files["/t/x.csv"] = "\n".join(["path,label", *rows]).encode()
        server.files |= {f"/t/{name}": name.encode() for name in ("a%20b.jpg", "c%20d.jpg", "e/f.jpg")}
        listing = list_images(f"{server.url}/t/x.csv")
        assert contents(listing) == {"a b.jpg": b"a%20b.jpg", "c d.jpg": b"c%20d.jpg", "e/f.jpg": b"e/f.jpg"}
        assert [file.label for file in listing.files] == ["x", "y", "x"] and listing.root == f"{server.url}/t/"
        assert {id: kind for id, (_, kind) in refusals(listing).items()} == {
            f"x.csv#line={line}": "refused" for line in range(5, 16)
        }
        assert not other.asked
    finally:
        other.close()


def test_a_table_of_this_machine_may_list_urls_below_a_root(server: Server, tmp_path: Path) -> None:
    server.files |= {"/p/1.jpg": b"one", "/p/2.jpg": b"two"}
    (tmp_path / "x.csv").write_text(f"url,caption\n{server.url}/p/1.jpg,a\n{server.url}/p/2.jpg,b\n")
    assert contents(list_images(tmp_path / "x.csv", root=f"{server.url}/p")) == {"1.jpg": b"one", "2.jpg": b"two"}
    assert contents(list_images(tmp_path / "x.csv", root=f"{server.url}/")) == {"p/1.jpg": b"one", "p/2.jpg": b"two"}
    with pytest.raises(ImageError, match="name the one that all images are below"):
        list_images(tmp_path / "x.csv")
    for root in ("http://", "memory://"):
        with pytest.raises(ImageError, match="names no place"):
            list_images(tmp_path / "x.csv", root=root)


def test_a_table_of_objects(memory: fsspec.AbstractFileSystem) -> None:
    table = b"path,id,box\n1.jpg,x,\nmemory://b/t/2.jpg,y,\nmemory://b/3.jpg,z,\nmemory://b/t/../3.jpg,v,\n"
    memory.pipe({"/b/t/x.csv": table + b'2.jpg,w,"[0, 0, 2, 2]"\n', "/b/t/1.jpg": b"one", "/b/t/2.jpg": b"two"})
    listing = list_images("memory://b/t/x.csv")
    assert contents(listing) == {"w": Region(b"two", (0, 0, 2, 2)), "x": b"one", "y": b"two"}
    assert {kind for _, kind in refusals(listing).values()} == {"refused"} and len(listing.failures) == 2
    before = [file.status() for file in listing.files]
    assert len(set(before)) == 3
    memory.pipe_file("/b/t/2.jpg", b"TWO")
    after = [file.status() for file in list_images("memory://b/t/x.csv").files]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, False]


def test_a_row_is_read_from_its_url_when_it_is_wanted(server: Server) -> None:
    server.files |= {"/x.csv": b"path\n1.jpg\n2.jpg\n", "/1.jpg": b"one"}
    first, second = list_images(f"{server.url}/x.csv", max_bytes=2).files
    assert {path for path, _ in server.asked} <= {"/x.csv", "/2.jpg"}  # fsspec asks twice for what is not there.
    for image, kind in ((first, "too-large"), (second, "missing")):
        with pytest.raises(ImageError) as caught:
            image.read()
        assert (caught.value.id, caught.value.kind) == (image.id, kind)


def test_a_table_that_cannot_be_used_is_named_by_its_url(server: Server) -> None:
    server.files |= {"/x.csv": b"", "/y.jsonl": b"[1]", "/z.parquet": b"PAR1"}
    for name in ("x.csv", "y.jsonl", "z.parquet", "none.csv"):
        with pytest.raises(ImageError) as caught:
            list_manifest(f"{server.url}/{name}?key=1")
        assert caught.value.id == f"{server.url}/{name}" and "key=1" not in str(caught.value)


def test_a_file_url_is_a_file_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "t" / "1.jpg").write_bytes(b"one")
    (tmp_path / "t" / "2.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "t" / "x.csv").write_text("path\n1.jpg\n2.jpg\n")
    (tmp_path / "t" / "x.tar").write_bytes(ARCHIVES["x.tar"])
    first, second = list_images((tmp_path / "t" / "x.csv").as_uri()).files
    assert first.read() == b"one"
    with pytest.raises(ImageError, match="symbolic link"):
        second.read()
    listing = list_images((tmp_path / "t" / "x.tar").as_uri())
    assert os.fspath(listing.root) == os.fspath(tmp_path / "t" / "x.tar") and contents(listing) == MEMBERS


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.zip", "x.csv"])
def test_a_store_does_not_depend_on_where_the_images_lie(
    server: Server, photos: Path, tiny_backbone: Path, tmp_path: Path, name: str
) -> None:
    backbone = Backbone.load(tiny_backbone)
    images = {path.relative_to(photos).as_posix(): path.read_bytes() for path in photos.glob("*/*.*")}
    rows = "".join(f"{id},{id.partition('/')[0]}\n" for id in images)
    server.files = {f"/{id}": data for id, data in images.items()}
    server.files |= {"/x.tar": as_tar(images), "/x.tgz": as_tar(images, "w:gz"), "/x.zip": as_zip(images)}
    server.files["/x.csv"] = f"path,label\n{rows}".encode()
    expected = ek.extract(photos, tmp_path / "a.h5", backbone)
    found = ek.extract(list_images(f"{server.url}/{name}"), tmp_path / "b.h5", backbone)
    assert found.content_id == expected.content_id and found.ids == expected.ids and found.failures == []
    changes: list[object] = []
    again = list_images(f"{server.url}/{name}")
    ek.extract(again, tmp_path / "b.h5", backbone, progress=lambda progress: changes.append(progress.changes))
    assert changes[-1] == ek.store.Changes(unchanged=24)
