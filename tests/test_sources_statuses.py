"""What an update goes by: another content has another status, and what is the same keeps its own."""

from __future__ import annotations

import http.server
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import embedkit as ek
from embedkit import ImageError
from embedkit.sources import Listing, list_archive, list_folder, list_manifest, list_remote

fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

Members = dict[str, tuple[bytes, int]]


def picture(colour: str) -> bytes:
    """Return a BMP file: of every colour as large, and with the same white at its beginning and its end."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste(colour, (16, 16, 48, 48))
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


RED, BLUE = picture("red"), picture("blue")


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def silent() -> Iterator[tuple[str, dict[str, bytes]]]:
    """The URL of a web server that says nothing of versions, and its files."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            body = files.get(self.path)
            if body is None:
                return self.send_error(404)
            first, _, last = (self.headers["Range"] or "").removeprefix("bytes=").partition("-")
            piece = body[int(first) : int(last) + 1] if last else body
            self.send_response(206 if last else 200)
            if last:
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(piece)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(piece)
            return None

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", files
    server.shutdown()
    thread.join()
    server.server_close()


def as_tar(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (data, time) in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), time
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def statuses(listing: Listing) -> dict[str, tuple[int, int]]:
    return {file.id: file.status() for file in listing.files}


def updated(tmp_path: Path, backbone: Path, before: Callable[[], Listing], after: Callable[[], Listing]) -> bool:
    """Return whether an update from one listing to another gives the store of the latter."""
    network = ek.Backbone.load(str(backbone))
    old = ek.extract(before(), tmp_path / "a.h5", network).embeddings[:]
    found = ek.extract(after(), tmp_path / "a.h5", network).embeddings[:]
    fresh = ek.extract(after(), tmp_path / "b.h5", network).embeddings[:]
    assert not np.array_equal(old, fresh)
    return np.array_equal(found, fresh)


# --- Tables


def rows(folder: Path, *lines: str) -> Listing:
    (folder / "m.csv").write_text("".join(line + "\n" for line in lines))
    return list_manifest(folder / "m.csv")


def two(folder: Path) -> None:
    """Write two pictures that only their names and their content tell apart."""
    for name, data in (("red.bmp", RED), ("blue.bmp", BLUE)):
        (folder / name).write_bytes(data)
        os.utime(folder / name, (1, 1))


def test_an_id_that_names_another_file_has_another_status(tmp_path: Path, tiny_backbone: Path) -> None:
    two(tmp_path)
    before = statuses(rows(tmp_path, "id,path", "1,red.bmp", "2,blue.bmp"))
    after = statuses(rows(tmp_path, "id,path", "1,blue.bmp", "2,red.bmp"))
    assert before.keys() == after.keys() and not set(before.items()) & set(after.items())
    assert before == statuses(rows(tmp_path, "path,id", "./red.bmp,1", "blue.bmp,2"))
    assert updated(
        tmp_path, tiny_backbone, lambda: rows(tmp_path, "id,path", "1,red.bmp", "2,blue.bmp"),
        lambda: rows(tmp_path, "id,path", "1,blue.bmp", "2,red.bmp"),
    )  # fmt: skip


def test_an_id_that_is_the_path_has_the_status_of_the_file(tmp_path: Path) -> None:
    two(tmp_path)
    folder = statuses(list_folder(tmp_path))
    assert statuses(rows(tmp_path, "path", "red.bmp", "blue.bmp")) == folder
    assert statuses(rows(tmp_path, "path,id", "red.bmp,red.bmp", "blue.bmp,blue.bmp")) == folder
    assert statuses(rows(tmp_path, "path,id", "gone.bmp,7")) == {"7": (0, -1)}


def test_an_id_with_another_box_of_another_file_has_another_status(tmp_path: Path) -> None:
    two(tmp_path)
    lines = ["red.bmp,7,", "red.bmp,7,0 0 9 9", "red.bmp,7,0 0 9 8", "blue.bmp,7,", "blue.bmp,7,0 0 9 9"]
    found = [statuses(rows(tmp_path, "path,id,box", line))["7"] for line in lines]
    assert len(set(found)) == len(lines) and all(-(2**63) <= time_ns < 2**63 for _, time_ns in found)


def test_an_id_that_names_another_url_has_another_status(memory: fsspec.AbstractFileSystem) -> None:
    made = memory.store
    memory.pipe({"/t/red.bmp": RED, "/t/blue.bmp": BLUE})
    made["/t/blue.bmp"].created = made["/t/red.bmp"].created  # As of servers whose versions are time and size.
    found = []
    for text in ("path,id\nred.bmp,7", "path,id\nblue.bmp,7", "path,id\nred.bmp,red.bmp", "path\nred.bmp"):
        memory.pipe_file("/t/m.csv", text.encode())
        found += statuses(list_manifest("memory://t/m.csv")).values()
    assert found[0] != found[1] and found[2] == found[3]


# --- Archives


def archive(folder: Path, members: Members) -> Listing:
    (folder / "x.tar").write_bytes(as_tar(members))
    return list_archive(folder / "x.tar")


@pytest.mark.parametrize("times", [(0, 0), (946_684_800, 946_684_800), (5, 946_684_800)])
def test_members_without_times_of_their_own_are_read_again(
    tmp_path: Path, tiny_backbone: Path, times: tuple[int, int]
) -> None:
    first, last = times
    assert updated(
        tmp_path, tiny_backbone, lambda: archive(tmp_path, {"0.bmp": (BLUE, first), "1.bmp": (RED, last)}),
        lambda: archive(tmp_path, {"0.bmp": (BLUE, first), "1.bmp": (BLUE, last)}),
    )  # fmt: skip


def test_of_archives_with_times_only_the_latest_is_read_again_when_one_is_appended(tmp_path: Path) -> None:
    members = {f"{number:02}.bmp": (RED, 1000 + number) for number in range(20)}
    before = statuses(archive(tmp_path, members))
    assert [time_ns // 10**9 for _, time_ns in before.values()] == list(range(1000, 1020))
    after = statuses(archive(tmp_path, members | {"20.bmp": (BLUE, 2000)}))
    assert [id for id, status in before.items() if after[id] != status] == ["19.bmp"]
    changed = statuses(archive(tmp_path, members | {"07.bmp": (BLUE[:-1] + b"x", 1007)}))
    assert [id for id, status in before.items() if changed[id] != status] == ["07.bmp", "19.bmp"]


def test_times_that_many_members_share_tell_nothing(tmp_path: Path) -> None:
    members = {f"{number:02}.bmp": (RED, 1000 if number < 5 else 1000 + number) for number in range(40)}
    before = statuses(archive(tmp_path, members))
    after = statuses(archive(tmp_path, members | {"00.bmp": (BLUE, 1000)}))
    assert [id for id, status in before.items() if after[id] != status] == [f"{k:02}.bmp" for k in (0, 1, 2, 3, 4, 39)]


def test_an_archive_that_is_not_touched_has_the_same_status(tmp_path: Path) -> None:
    before = statuses(archive(tmp_path, {"1.bmp": (RED, 0)}))
    assert statuses(list_archive(tmp_path / "x.tar")) == before
    os.utime(tmp_path / "x.tar", (1, 1))
    assert statuses(list_archive(tmp_path / "x.tar")) != before


def test_an_archive_behind_a_url_without_versions_is_read_again(
    silent: tuple[str, dict[str, bytes]], memory: fsspec.AbstractFileSystem
) -> None:
    url, files = silent
    files["/x.tar"] = as_tar({"1.bmp": (RED, 0)})
    assert statuses(list_archive(f"{url}/x.tar")) != statuses(list_archive(f"{url}/x.tar"))
    memory.pipe_file("/x.tar", files["/x.tar"])
    assert statuses(list_archive("memory://x.tar")) == statuses(list_archive("memory://x.tar"))


def test_an_archive_behind_a_url_is_the_listed_one_in_other_processes(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/x.tar", as_tar({"1.bmp": (RED, 0)}))
    (image,) = list_archive("memory://x.tar").files
    sent = pickle.dumps(image)
    assert pickle.loads(sent).read() == RED
    memory.pipe_file("/x.tar", as_tar({"1.bmp": (BLUE, 0)}))
    with pytest.raises(ImageError, match="has changed since it was listed") as caught:
        pickle.loads(sent).read()
    assert caught.value.kind == "unreadable"


# --- URLs


def test_where_a_server_says_nothing_of_versions_a_change_of_the_same_size_is_noticed(
    silent: tuple[str, dict[str, bytes]], tmp_path: Path, tiny_backbone: Path
) -> None:
    url, files = silent

    def listed(data: bytes) -> Listing:
        files.update({"/p/": b'<a href="1.bmp">', "/p/1.bmp": data})
        return list_remote(f"{url}/p/")

    assert updated(tmp_path, tiny_backbone, lambda: listed(RED), lambda: listed(BLUE))
    files["/p/m.csv"] = b"path\n1.bmp\ngone.bmp\n"
    before, after = (statuses(list_manifest(f"{url}/p/m.csv")) for _ in range(2))
    assert before["1.bmp"] != after["1.bmp"] and before["gone.bmp"] != after["gone.bmp"]


def test_what_was_read_again_keeps_its_row(
    silent: tuple[str, dict[str, bytes]], tmp_path: Path, tiny_backbone: Path
) -> None:
    url, files = silent
    files.update({"/p/": b'<a href="1.bmp"><a href="2.bmp">', "/p/1.bmp": RED, "/p/2.bmp": BLUE})
    changes: list[object] = []
    for _ in range(2):
        ek.extract(
            list_remote(f"{url}/p/"), tmp_path / "a.h5", ek.Backbone.load(str(tiny_backbone)),
            progress=lambda progress: changes.append(progress.changes),
        )  # fmt: skip
    assert changes[-1] == ek.store.Changes(unchanged=2)
