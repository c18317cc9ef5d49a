from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedkit import ImageError
from embedkit.sources.remote.listing import Patience, list_remote, open_remote
from embedkit.sources.remote.transfers import public_url

fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

QUICK = Patience(delay=0.01, timeout=5.0)
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class World:
    """A web server of this machine, whose pages are bytes or functions that answer."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes | Answer] = {}
        self.asked: list[str] = []
        world = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                world.asked.append(self.path)
                self.answer()

            def answer(self) -> None:
                page = world.pages.get(self.path.partition("?")[0])
                if page is None:
                    self.send_error(404)
                elif isinstance(page, bytes):
                    send(self, page)
                else:
                    page(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def index(self, path: str, *links: str) -> None:
        self.pages[path] = "".join(f'<a href="{link}">x</a>' for link in links).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def send(handler: http.server.BaseHTTPRequestHandler, body: bytes, length: int | None = None, **headers: str) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def failure(call: Callable[[], object]) -> tuple[str, str, str]:
    with pytest.raises(ImageError) as caught:
        call()
    return caught.value.id, caught.value.reason, caught.value.kind


def only(world: World, name: str, patience: Patience = QUICK, **options: int) -> object:
    """Return what reading the one image at a path of a server gives."""
    (image,) = list_remote(f"{world.url}/{name}", patience=patience, **options).files  # type: ignore[arg-type]
    return image.read()


def test_objects_are_found_and_read_like_the_files_of_a_folder(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("cat/2.jpg", "cat/deep/1.PNG", "dog/ä.webp", "dog/.hidden.jpg", ".git/x.jpg", "notes.txt"):
        memory.pipe_file(f"/photos/{name}", name.encode())
    memory.pipe_file("/photos-beside/3.jpg", b"")
    listing = list_remote("memory://photos")
    assert [(image.id, image.label) for image in listing.files] == [
        ("cat/2.jpg", "cat"), ("cat/deep/1.PNG", "cat"), ("dog/ä.webp", "dog"),
    ]  # fmt: skip
    assert [image.read() for image in listing.files] == [image.id.encode() for image in listing.files]
    assert [image.status()[0] for image in listing.files] == [len(image.id.encode()) for image in listing.files]
    assert (listing.root, listing.classes, listing.ignored) == ("memory://photos", ["cat", "dog"], 3)


def test_a_changed_object_has_another_status_and_an_unchanged_one_the_same(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({"/photos/1.jpg": b"one", "/photos/2.jpg": b"two"})
    before = [image.status() for image in list_remote("memory://photos").files]
    memory.pipe_file("/photos/2.jpg", b"TWO")
    after = [image.status() for image in list_remote("memory://photos").files]
    assert before[0] == after[0] and before[1] != after[1]


def test_an_image_by_itself_is_a_listing_of_one(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe_file("/photos/cat/1.jpg", b"one")
    (tmp_path / "1.jpg").write_bytes(b"one")
    for url in ("memory://photos/cat/1.jpg", (tmp_path / "1.jpg").as_uri()):
        (image,) = list_remote(url).files
        assert (image.id, image.label, image.read()) == ("1.jpg", None, b"one")


def test_a_file_url_is_a_folder_of_this_machine_whose_links_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "1.jpg").write_bytes(b"one")
    (tmp_path / "secret.jpg").touch()
    (tmp_path / "root" / "2.jpg").symlink_to(tmp_path / "secret.jpg")
    listing = list_remote((tmp_path / "root").as_uri())
    assert [image.id for image in listing.files] == ["1.jpg"]
    assert [(error.id, error.kind) for error in listing.failures] == [("2.jpg", "refused")]


def test_names_that_climb_and_files_over_the_limit_are_failures(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({"/photos/a/1.jpg": b"12345", "/photos/big.jpg": b"123456"})
    memory.store["/photos/a/../../x.jpg"] = memory.store["/photos/a/1.jpg"]  # An object store has keys, not folders.
    listing = list_remote("memory://photos", max_bytes=5)
    assert [image.id for image in listing.files] == ["a/1.jpg"]
    assert [(error.id, error.kind) for error in listing.failures] == [
        ("a/%2E%2E/%2E%2E/x.jpg", "refused"), ("big.jpg", "too-large"),
    ]  # fmt: skip


def test_an_object_that_goes_after_the_listing_is_missing(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({"/photos/1.jpg": b"one", "/photos/2.jpg": b""})
    first, second = list_remote("memory://photos").files
    memory.rm("/photos/1.jpg")
    assert failure(first.read) == ("1.jpg", "the file is missing", "missing")
    assert failure(second.read) == ("2.jpg", "the file is empty", "empty")


@pytest.mark.parametrize(
    ("url", "reason", "kind"),
    [
        ("memory://nowhere", "nothing is there|is missing", "missing"),
        ("gopher://host/photos", "no place that fsspec knows", "unsupported"),
        ("zip::memory://x.zip", "a URL within a URL", "unsupported"),
        ("dropbox://photos", "needs another package", "unsupported"),
    ],
)
def test_what_cannot_be_listed_is_named(url: str, reason: str, kind: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        list_remote(url)
    assert (caught.value.id, caught.value.kind) == (url, kind)


def test_a_place_without_images_is_told_from_an_empty_one(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/photos/notes.txt", b"")
    assert failure(lambda: list_remote("memory://photos"))[1:] == ("no images there (1 other files)", "missing")


def test_index_pages_are_folders(world: World) -> None:
    world.index("/p/", "?C=N;O=D", "../", "/", "cat/", "dog/", "readme.txt", "#top", "mailto:a@b.c", "http://[", "cat/")
    world.index(
        "/p/cat/", f"{world.url}/p/cat/a%20b.jpg", "/p/cat/%E4.jpg", "//elsewhere.example/p/cat/x.jpg", "../../o.jpg"
    )
    world.index("/p/dog/", "100%25.jpg", "a%2Bb.jpg", ".hidden.jpg", ".git/", "../cat/a%20b.jpg")
    for path in ("/p/cat/a%20b.jpg", "/p/cat/%E4.jpg", "/p/dog/100%25.jpg", "/p/dog/a%2Bb.jpg"):
        world.pages[path] = path.encode()
    for root in ("/p", "/p/"):
        listing = list_remote(world.url + root, patience=QUICK)
        assert {image.id: image.read() for image in listing.files} == {
            "cat/a b.jpg": b"/p/cat/a%20b.jpg", "cat/\udce4.jpg": b"/p/cat/%E4.jpg",
            "dog/100%.jpg": b"/p/dog/100%25.jpg", "dog/a+b.jpg": b"/p/dog/a%2Bb.jpg",
        }  # fmt: skip
        assert (listing.classes, listing.failures, listing.ignored) == (["cat", "dog"], [], 3)
        assert [image.id for image in listing.files] == ["cat/a b.jpg", "cat/\udce4.jpg", "dog/100%.jpg", "dog/a+b.jpg"]


def test_an_index_page_leads_nowhere_else(world: World) -> None:
    world.index("/p/", "..%2fx.jpg", "%2e%2e/y.jpg", "a%2Fb.jpg", "%00.jpg", "/etc/z.jpg", "%2e%2e/", "1.jpg")
    world.pages["/p/1.jpg"] = b"one"
    listing = list_remote(f"{world.url}/p/", patience=QUICK)
    assert [image.id for image in listing.files] == ["1.jpg"]
    assert {(error.id, error.kind) for error in listing.failures} == {
        ("%2E%2E/", "refused"), ("..%2Fx.jpg", "refused"), ("%2E%2E/y.jpg", "refused"), ("a%2Fb.jpg", "refused"),
        ("%00.jpg", "refused"),
    }  # fmt: skip
    assert set(world.asked) == {"/p/"}


def test_folders_without_an_end_are_left(world: World) -> None:
    def deeper(handler: http.server.BaseHTTPRequestHandler) -> None:
        send(handler, b'<a href="on/"></a><a href="1.jpg"></a>')

    for depth in range(70):
        world.pages["/p/" + "on/" * depth] = deeper
    listing = list_remote(f"{world.url}/p/", patience=QUICK)
    assert len(listing.files) == 65
    assert [(error.id, error.kind) for error in listing.failures] == [("on/" * 65, "refused")]


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_listed(world: World) -> None:
    world.index("/p/", "gone/", "here/")
    world.index("/p/here/", "1.jpg")
    listing = list_remote(f"{world.url}/p/", patience=QUICK)
    assert [image.id for image in listing.files] == ["here/1.jpg"]
    assert [(error.id, error.reason, error.kind) for error in listing.failures] == [
        ("gone/", "the folder cannot be read: the file is missing", "missing")
    ]
    assert failure(lambda: list_remote(f"{world.url}/q/", patience=QUICK))[2] == "missing"


def test_what_a_server_says_of_a_version_is_the_status(world: World) -> None:
    tag = "one"
    world.pages["/1.jpg"] = lambda handler: send(handler, b"12345", ETag=tag)
    (before,) = list_remote(f"{world.url}/1.jpg").files
    (same,) = list_remote(f"{world.url}/1.jpg").files
    tag = "two"
    (after,) = list_remote(f"{world.url}/1.jpg").files
    assert before.status() == same.status() != after.status()
    assert before.status()[0] == after.status()[0] == 5


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_server_that_fails_twice_is_asked_again(world: World, status: int) -> None:
    failures = iter([status, status])

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        failing = next(failures, None) if handler.command == "GET" else None
        handler.send_error(failing) if failing else send(handler, b"one")

    world.pages["/1.jpg"] = answer
    assert only(world, "1.jpg") == b"one"
    assert world.asked == ["/1.jpg"] * 3


@pytest.mark.parametrize(
    ("status", "kind", "tries"),
    [(404, "missing", 1), (410, "missing", 1), (403, "permission", 1), (401, "permission", 1), (400, "unreadable", 1),
     (500, "unreadable", 4)],
)  # fmt: skip
def test_only_a_passing_failure_is_tried_again(world: World, status: int, kind: str, tries: int) -> None:
    asked: list[int] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.command == "HEAD":  # Which fsspec repeats as GET when it fails.
            return send(handler, b"")
        asked.append(status)
        return handler.send_error(status)

    world.pages["/1.jpg"] = answer
    id, reason, found = failure(lambda: only(world, "1.jpg"))
    assert (id, found, len(asked)) == ("1.jpg", kind, tries)
    if tries > 1:
        assert reason == "the server answers 500; tried 4 times"


def test_a_server_says_when_to_come_back() -> None:
    class Busy(Exception):
        def __init__(self, after: str) -> None:
            self.headers = {"Retry-After": after}

    patience = Patience(delay=0.01)
    assert patience.pause(1, Busy("7")) == 7.0
    assert patience.pause(1, Busy("86400")) == 60.0
    assert 0.02 <= patience.pause(3, Busy("Wed, 21 Oct 2015 07:28:00 GMT")) <= 0.06


def test_a_silent_server_is_given_up(world: World) -> None:
    over = threading.Event()

    def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.command == "HEAD":
            send(handler, b"12345")
        else:
            over.wait(30)

    world.pages["/1.jpg"] = silent
    patience = Patience(tries=2, delay=0.01, timeout=0.3)
    assert failure(lambda: only(world, "1.jpg", patience)) == (
        "1.jpg", "no answer within 0.3 seconds; tried 2 times", "unreadable",
    )  # fmt: skip
    over.set()


def test_no_server_at_all_is_unreadable(world: World) -> None:
    (image,) = list_remote(f"{world.url}/1.jpg", patience=QUICK).files
    world.server.server_close()
    reason = f"cannot connect to {world.url[7:]} (connection refused); tried 4 times"
    assert failure(image.read) == ("1.jpg", reason, "unreadable")


def test_a_body_shorter_than_announced_is_unreadable(world: World) -> None:
    world.pages["/1.jpg"] = lambda handler: send(handler, b"12345", length=500)
    reason = "the connection broke off before all had come; tried 4 times"
    assert failure(lambda: only(world, "1.jpg")) == ("1.jpg", reason, "unreadable")


def test_a_body_longer_than_announced_is_never_taken_for_an_image_of_that_length(world: World) -> None:
    world.pages["/1.jpg"] = lambda handler: send(handler, b"12345678", length=5)
    try:
        data = only(world, "1.jpg")
    except ImageError as error:  # Which of the two depends on the pieces in which it arrives.
        assert error.kind == "unreadable"
    else:
        assert data == b"12345"


@pytest.mark.parametrize("announced", [None, 5])
def test_an_endless_body_is_left_at_the_limit(world: World, announced: int | None) -> None:
    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.command == "HEAD" and announced:
            return send(handler, b"12345")
        handler.send_response(200)
        handler.end_headers()
        while handler.command == "GET":
            handler.wfile.write(b"x" * 65536)
        return None

    world.pages["/1.jpg"] = endless
    (image,) = list_remote(f"{world.url}/1.jpg", patience=QUICK, max_bytes=1_000_000).files
    assert failure(image.read) == ("1.jpg", "more than 1,000,000 bytes, the limit", "too-large")
    assert len(world.asked) - world.asked.count("") <= 2  # Not tried again: fsspec asks once for what HEAD leaves open.


def test_an_announced_giant_is_not_downloaded(world: World) -> None:
    world.pages["/1.jpg"] = lambda handler: send(handler, b"", length=10**12)
    listing = list_remote(f"{world.url}/1.jpg")
    assert not listing.files and not world.asked
    assert [(error.id, error.kind) for error in listing.failures] == [("1.jpg", "too-large")]


def test_secrets_are_sent_and_never_told(world: World) -> None:
    seen: list[tuple[str, str | None]] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        seen.append((handler.path, handler.headers["Authorization"]))
        if handler.path.startswith("/p/?"):
            send(handler, b'<a href="1.jpg"></a><a href="2.jpg"></a>')
        elif "2.jpg" in handler.path:
            handler.send_error(400, "no " + handler.path)
        else:
            send(handler, b"one")

    for path in ("/p/", "/p/1.jpg", "/p/2.jpg"):
        world.pages[path] = answer
    url = world.url.replace("://", "://ada:hunter2@") + "/p/?X-Signature=t%2Fk%3D"
    listing = list_remote(url, patience=QUICK)
    first, second = listing.files
    assert first.read() == b"one"
    told = [repr(listing), str(listing.root), repr(first)]
    with pytest.raises(ImageError) as caught:
        second.read()
    told += [str(caught.value), repr(caught.value), repr(caught.value.__context__), repr(caught.value.__cause__)]
    assert not [text for text in told if "hunter2" in text or "t%2Fk" in text or "t/k" in text]
    assert {path.partition("?")[2] for path, _ in seen} == {"X-Signature=t%2Fk%3D"}
    assert {secret for _, secret in seen} == {"Basic YWRhOmh1bnRlcjI="}
    assert listing.root == f"{world.url}/p/"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@host/a.jpg?X-Amz-Signature=1#f", "https://host/a.jpg"),
        ("https://u:p@host?token=1", "https://host"),
        ("s3://key:secret@bucket/a@b.jpg", "s3://bucket/a@b.jpg"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert public_url(url) == shown


def test_many_threads_read_at_a_time(world: World) -> None:
    world.index("/p/", *(f"{number}.jpg" for number in range(200)))
    meeting = threading.Barrier(4)  # Which four downloads must reach together.

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.command == "GET":
            meeting.wait(30)
        send(handler, handler.path.encode() * 1000)

    world.pages |= {f"/p/{number}.jpg": answer for number in range(200)}
    files = list_remote(f"{world.url}/p/", patience=QUICK).files
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: image.read(), files))
    assert found == [f"/p/{image.id}".encode() * 1000 for image in files]


def ranged(body: bytes, failures: list[int]) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked = handler.headers["Range"]
        if asked and failures:
            return handler.send_error(failures.pop())
        if not asked:
            return send(handler, body, Accept_Ranges="bytes")
        start, end = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        piece = body[start : end + 1]
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{start + len(piece) - 1}/{len(body)}")
        handler.send_header("Content-Length", str(len(piece)))
        handler.end_headers()
        handler.wfile.write(piece)
        return None

    return answer


def test_a_remote_file_is_sought_in_and_survives_failures(world: World) -> None:
    body = bytes(range(256)) * 40_000
    world.pages["/photos.tar"] = ranged(body, [503, 500])
    with open_remote(f"{world.url}/photos.tar", patience=QUICK) as file:
        assert file.seek(-300, io.SEEK_END) == len(body) - 300
        assert file.read() == body[-300:]
        file.seek(5_000_001)
        assert file.read(1000) == body[5_000_001:5_001_001]
        assert file.seek(10, io.SEEK_CUR) == file.tell() == 5_001_011
        file.seek(0)
        assert file.read() == body and file.read(1) == b""
        with pytest.raises(OSError, match="before the start"):
            file.seek(-1)


def test_a_remote_file_that_cannot_be_read_is_named(world: World, memory: fsspec.AbstractFileSystem) -> None:
    world.pages["/photos.tar"] = ranged(b"0123456789" * 10, [503] * 100)
    with open_remote(f"{world.url}/photos.tar?token=1", patience=QUICK) as file:
        assert failure(file.read) == (
            f"{world.url}/photos.tar", "the server answers 503; tried 4 times", "unreadable",
        )  # fmt: skip
    world.pages["/whole.tar"] = lambda handler: send(handler, b"0123456789", Accept_Ranges="none")
    assert failure(lambda: open_remote(f"{world.url}/whole.tar", patience=QUICK))[1:] == (
        "its server gives whole files only; download it first", "unsupported",
    )  # fmt: skip
    assert failure(lambda: open_remote(f"{world.url}/none.tar", patience=QUICK))[2] == "missing"
    assert failure(lambda: open_remote("memory://none.tar", patience=QUICK))[2] == "missing"


def test_pauses_grow() -> None:
    assert Patience(delay=1.0).pause(1, OSError()) <= 1.5 < 2.0 <= Patience(delay=1.0).pause(3, OSError())
