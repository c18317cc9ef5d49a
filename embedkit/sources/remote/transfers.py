"""Transfers from places that fail now and then: what is tried again, what is given up, and what may be told."""

from __future__ import annotations

import asyncio
import io
import os
import random
import re
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from embedkit.errors import ImageError, MissingExtraError

WEB = ("http", "https")
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # In whose URLs a container stands before the @, and no secret.
_WAIT_AT_MOST = 60.0  # Seconds, whatever a server asks for.
_PIECE = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for, and how often it is asked.

    Attributes
    ----------
    tries : int, default 4
        How often, before the last error counts.
    delay : float, default 0.5
        Seconds before the second try; about twice as many before each further one.
    timeout : float, default 30
        Seconds that a web server may be silent. A whole download may take ten times as long.
    """

    tries: int = 4
    delay: float = 0.5
    timeout: float = 30.0

    def pause(self, tried: int, error: Exception) -> float:
        """Return the seconds to wait after some tries; chance keeps many readers from coming back together."""
        wanted = getattr(error, "headers", None)
        after = wanted.get("Retry-After", "") if isinstance(wanted, Mapping) else ""
        seconds = self.delay * 2.0 ** (tried - 1) * random.uniform(0.5, 1.5)
        return min(max(seconds, float(after) if after.isascii() and after.isdigit() else 0.0), _WAIT_AT_MOST)


@dataclass(frozen=True)
class Place:
    """A filesystem of fsspec's, and how it is asked."""

    fs: Any
    patience: Patience
    web: bool

    def ask(self, id: str, call: Callable[[], T]) -> T:
        """Return what a call gives, tried again while that may help; otherwise raise ImageError under an id."""
        tried = 0
        while True:
            tried += 1
            try:
                return call()
            except ImageError:
                raise
            except Exception as error:  # Each kind of place has errors of its own.
                kind, reason, again = _verdict(error, self.patience)
                if not again or tried >= self.patience.tries:
                    times = f"; tried {tried} times" if tried > 1 else ""
                    failure, wait = ImageError(id, reason + times, kind), 0.0
                else:
                    failure, wait = None, self.patience.pause(tried, error)
            if failure is not None:
                raise failure  # Outside of the handler: the error's own text may hold a signed URL.
            time.sleep(wait)

    def fetch(self, path: str, id: str, size: int | None, max_bytes: int) -> bytes:
        """Return the bytes of a file, which are never more than the limit."""
        if size is not None and size > max_bytes:
            raise too_large(id, size, max_bytes)
        # What a web server says of a size binds it to nothing.
        streamed = self.web or size is None
        data = self.ask(id, lambda: self._stream(path, id, max_bytes) if streamed else self.fs.cat_file(path))
        if not data:
            raise ImageError(id, "the file is empty", "empty")
        return bytes(data)

    def _stream(self, path: str, id: str, max_bytes: int) -> bytes:
        buffer = _Bounded(id, max_bytes)
        if self.web:
            self.fs.get_file(path, buffer)
        else:
            with self.fs.open(path, "rb") as file:
                shutil.copyfileobj(file, buffer, _PIECE)
        return buffer.getvalue()


class _Bounded(io.BytesIO):
    """A buffer that refuses to grow over a limit, and so ends an endless download."""

    def __init__(self, id: str, max_bytes: int) -> None:
        super().__init__()
        self.id, self.max_bytes = id, max_bytes

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self.max_bytes:
            raise too_large(self.id, None, self.max_bytes)
        return super().write(data)


def too_large(id: str, size: int | None, max_bytes: int) -> ImageError:
    """Return the failure of a file over the limit."""
    found = "more than" if size is None else f"{size:,} bytes, and the limit is"
    return ImageError(id, f"{found} {max_bytes:,}{' bytes, the limit' if size is None else ''}", "too-large")


def connect(url: str, patience: Patience, storage_options: Mapping[str, Any] | None) -> tuple[Place, str]:
    """Return the place of a URL, and what the place calls it."""
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError("fsspec", "remote") from error

    name, protocol = public_url(url), url.partition("://")[0].lower()
    if "::" in url:
        raise ImageError(name, "a URL within a URL; name one place", "unsupported")
    options = dict(storage_options or {})
    if protocol in WEB:
        options = _web_options(patience) | options
    try:
        fs, path = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        kind, reason = "unsupported", f"{protocol}:// needs another package: {_line(error)}"
    except ValueError as error:
        kind, reason = "unsupported", f"no place that fsspec knows: {_line(error)}"
    except Exception as error:
        kind, reason, _ = _verdict(error, patience)
    else:
        return Place(fs, patience, protocol in WEB), path
    raise ImageError(name, reason, kind)


def _web_options(patience: Patience) -> dict[str, Any]:
    """Return what fsspec's web client is told."""
    try:
        import aiohttp
    except ImportError as error:
        raise MissingExtraError("aiohttp", "remote") from error

    seconds = patience.timeout
    timeout = aiohttp.ClientTimeout(total=10 * seconds, sock_connect=seconds, sock_read=seconds)
    return {"encoded": True, "client_kwargs": {"timeout": timeout}}


def local_path(source: str) -> str:
    """Return the path that a ``file:`` URL stands for, and any other source as it is.

    A file of this machine is opened as such, whose links and kinds are looked at.

    Examples
    --------
    >>> from embedkit.sources.remote.transfers import local_path
    >>> local_path("s3://bucket/photos.tar")
    's3://bucket/photos.tar'
    """
    if source.partition("://")[0].lower() not in ("file", "local"):
        return source
    return connect(source, Patience(), None)[1]


def public_url(url: str) -> str:
    """Return a URL without what may be secret in it: the user, the password, and the query of a signed one.

    Parameters
    ----------
    url : str
        Of any protocol.

    Returns
    -------
    str
        Fit for a store, a log and a message.

    Examples
    --------
    >>> from embedkit.sources.remote.transfers import public_url
    >>> public_url("https://ada:secret@example.org/photos/?signature=0123")
    'https://example.org/photos/'
    """
    bare = url.partition("?")[0].partition("#")[0]
    scheme, sign, rest = bare.partition("://")
    host, slash, path = rest.partition("/")
    if scheme.lower() not in _CONTAINERS:
        host = host.rpartition("@")[2]
    return f"{scheme}{sign}{host}{slash}{path}"


def is_remote(source: str) -> bool:
    """Return whether a source is a URL.

    Examples
    --------
    >>> from embedkit.sources.remote.transfers import is_remote
    >>> is_remote("s3://bucket/photos"), is_remote("photos"), is_remote("C:/photos")
    (True, False, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def _verdict(error: Exception, patience: Patience) -> tuple[str, str, bool]:
    """Return the kind of a failure, its reason, and whether to try again."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "missing", "the file is missing", False
    if isinstance(error, PermissionError) or status in (401, 403):
        return "permission", "the server does not let us read it" + (f" ({status})" if status else ""), False
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return "not-an-image", "a folder, not an image", False
    if status is not None:
        return "unreadable", f"the server answers {status}", status >= 500 or status in (408, 425, 429)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "unreadable", f"no answer within {patience.timeout:g} seconds", True
    return "unreadable", _told(error), _is_passing(error)


def _told(error: Exception) -> str:
    """Return what went wrong on the way to a server, in words where the error's own are for programmers."""
    names = {kind.__name__ for kind in type(error).__mro__}
    host, port = getattr(error, "host", None), getattr(error, "port", None)
    where = f"{host}:{port}" if port else str(host or "the server")
    if isinstance(error, socket.gaierror) or "ClientConnectorDNSError" in names:
        return f"the server {host} cannot be found" if host else "the server cannot be found"
    if isinstance(error, ssl.CertificateError):
        return f"the certificate of {where} cannot be trusted"
    if isinstance(error, ssl.SSLError):
        return f"cannot speak TLS with {where}"
    number = error.errno if isinstance(error, OSError) else None
    if "ClientConnectorError" in names:
        return f"cannot connect to {where}" + (f" ({os.strerror(number).lower()})" if number else "")
    if names & {"ServerDisconnectedError", "ConnectionResetError", "BrokenPipeError"}:
        return "the server closed the connection"
    if "ClientPayloadError" in names:
        return "the connection broke off before all had come"
    if number:
        return os.strerror(number).lower()
    told = _line(error)
    if type(error) is ConnectionError and told:
        return told
    return f"{type(error).__name__}{': ' if told else ''}{told}"


def _is_passing(error: Exception) -> bool:
    """Return whether an error without a status may be a passing one: a connection that breaks, a body cut short."""
    if isinstance(error, OSError):
        return True
    classes = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return not isinstance(error, ValueError) and bool(
        classes & {"aiohttp.ClientError", "httpx.TransportError", "httpx2.TransportError", "botocore.BotoCoreError"}
    )


def _status(error: Exception) -> int | None:
    """Return the HTTP status that an error carries, wherever its package keeps it."""
    for place in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = str(getattr(place, name, None))
            if value.isdecimal() and 400 <= int(value) <= 599:
                return int(value)
    return None


def _line(error: Exception) -> str:
    """Return an error's text in one line of bearable length, without the secrets of the URLs in it."""
    text = re.sub(r"://[^/\s@]+@", "://", " ".join(str(error).split()))
    return re.sub(r"\?[^\s'\")]*", "", text)[:300]


def split_secrets(url: str) -> tuple[str, str, str]:
    """Return a web URL in three parts: the origin with its user, the path, and the query with its question mark."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}", parts.path, f"?{parts.query}" if parts.query else ""
