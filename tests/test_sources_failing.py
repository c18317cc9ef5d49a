from __future__ import annotations

import asyncio
import errno
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import embedkit as ek
from embedkit import ImageError
from embedkit.sources.entries import require_inside
from embedkit.sources.failing import find_flaw, harmless, quoted
from embedkit.sources.remote.listing import list_remote
from embedkit.sources.remote.transfers import Patience, _told

fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
aiohttp = pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

QUICK = Patience(tries=2, delay=0.01, timeout=5.0)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("cat/1.jpg", "cat/1.jpg"),
        ("caf\udce9.jpg", "caf\udce9.jpg"),
        ("a..b/..c.jpg", "a..b/..c.jpg"),
        ("/etc/x.jpg", "%2Fetc/x.jpg"),
        ("//x.jpg", "%2F/x.jpg"),
        ("../../x.jpg", "%2E%2E/%2E%2E/x.jpg"),
        ("a/..", "a/%2E%2E"),
        ("a\0b.jpg", "a%00b.jpg"),
        ("\ud83c.jpg", r"\ud83c.jpg"),
        ("", "%"),
    ],
)
def test_what_leads_out_becomes_an_id_that_stays(name: str, id: str) -> None:
    assert harmless(name) == require_inside(id) == id
    id.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("text", ["ro\0se", "\ud83c", "x" * 4097, "é" * 2049])
def test_what_a_store_cannot_hold_is_named_in_one_short_line(text: str) -> None:
    flaw = find_flaw(text, "class")
    assert flaw and "class" in flaw and len(flaw) < 300 and flaw.isprintable()


def test_what_a_store_can_hold_has_no_flaw() -> None:
    assert not any(find_flaw(text, "class") for text in ("rose", "caf\udce9", "two\nlines", "x" * 4096, ""))


def test_a_text_is_shown_in_one_line_and_cut() -> None:
    assert quoted("a\n\0b" + "x" * 300, 10) == r"'a\n\x00bxxxxxx'..."


# --- Names of objects and links


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def test_objects_called_as_no_file_is_are_failures(
    memory: fsspec.AbstractFileSystem, photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    memory.pipe_file("/p/a.jpg", (photos / "cat" / "1.jpg").read_bytes())
    for name in ("/b.jpg", "c\0.jpg", "\ud83c.jpg", "d/../../e.jpg"):
        memory.store[f"/p/{name}"] = memory.store["/p/a.jpg"]
    listing = list_remote("memory://p")
    assert [image.id for image in listing.files] == ["a.jpg"]
    assert [(failure.id, failure.kind) for failure in listing.failures] == [
        ("%2Fb.jpg", "refused"), (r"\ud83c.jpg", "refused"), ("c%00.jpg", "refused"),
        ("d/%2E%2E/%2E%2E/e.jpg", "refused"),
    ]  # fmt: skip
    store = ek.extract(listing, tmp_path / "a.h5", ek.Backbone.load(str(tiny_backbone)))
    assert [failure.id for failure in store.failures] == [failure.id for failure in listing.failures]


def test_a_file_url_has_the_limit_of_bytes_too(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"12345")
    for url in (tmp_path.as_uri(), (tmp_path / "1.jpg").as_uri()):
        (image,) = list_remote(url, max_bytes=4).files
        with pytest.raises(ImageError) as caught:
            image.read()
        assert caught.value.kind == "too-large"


# --- Failures of networks


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_server_that_is_not_there_is_told_in_plain_words() -> None:
    port = closed_port()
    with pytest.raises(ImageError) as caught:
        list_remote(f"http://127.0.0.1:{port}/photos/", patience=QUICK)
    assert caught.value.reason == f"cannot connect to 127.0.0.1:{port} (connection refused); tried 2 times"


def test_a_server_that_hangs_up_and_one_without_tls_are_told_in_plain_words() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pass

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    where = f"127.0.0.1:{server.server_address[1]}"
    try:
        for url, reason in (
            (f"http://{where}/p/", "the server closed the connection; tried 2 times"),
            (f"https://{where}/p/", f"cannot speak TLS with {where}; tried 2 times"),
        ):
            with pytest.raises(ImageError) as caught:
                list_remote(url, patience=QUICK)
            assert (caught.value.reason, caught.value.kind) == (reason, "unreadable")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_name_that_no_server_has_is_told() -> None:
    async def ask() -> None:
        async with aiohttp.ClientSession() as session:
            await session.get("http://nowhere.invalid/")

    with pytest.raises(aiohttp.ClientConnectorError) as caught:
        asyncio.run(ask())
    assert _told(caught.value) == "the server nowhere.invalid cannot be found"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "connection refused"),
        (ConnectionResetError(errno.ECONNRESET, "reset by peer"), "the server closed the connection"),
        (ConnectionError("nothing came"), "nothing came"),
        (ssl.SSLCertVerificationError(1, "verify failed"), "the certificate of the server cannot be trusted"),
        (socket.gaierror(-2, "Name or service not known"), "the server cannot be found"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError(), "RuntimeError"),
    ],
)  # fmt: skip
def test_errors_of_networks_are_told_in_plain_words(error: Exception, told: str) -> None:
    assert _told(error) == told
