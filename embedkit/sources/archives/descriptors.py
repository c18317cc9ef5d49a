"""Files that several threads read at a time, and of which there may be more than the system lets be open."""

from __future__ import annotations

import errno
import os
import stat
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from embedkit.errors import ImageError

MOST_OPEN = 64

_CHANGED = "the archive has changed since it was listed"
_lock = threading.Lock()
_opened: deque[weakref.ref[SharedFile]] = deque()


class SharedFile:
    """A file that is read at places, by several threads at a time.

    It is opened when it is first read. Of many such files the ones opened last stay open, and the others are opened
    again when their turn comes.

    Parameters
    ----------
    path : path-like
        The file.
    descriptor : int, optional
        Of a file that is open already and has no name; it is closed with this object.

    Attributes
    ----------
    path : str
        Absolute, so that it is found again from another working folder; of a file without a name, what it is called.
    size : int
        In bytes.
    version : str
        What tells it from another file of this name, or from this one once it is written to; nothing of a file without
        a name.

    Raises
    ------
    ImageError
        When it cannot be opened, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str], descriptor: int | None = None) -> None:
        self._named = descriptor is None
        self.path = os.path.abspath(os.fspath(path)) if self._named else os.fspath(path)
        self._handle = None if descriptor is None else _Handle(descriptor)
        try:
            # Looked at before it is opened: opening a pipe waits for somebody who writes to it.
            status = os.stat(self.path) if self._handle is None else os.fstat(self._handle.descriptor)
            if not stat.S_ISREG(status.st_mode):
                what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise ImageError(os.fspath(path), f"{what}, not an archive", "not-an-image")
            self._identity = _identity(status)
            self.size = status.st_size
            self.version = f"{status.st_size} {status.st_mtime_ns}" if self._named else ""
            self._opened()
        except OSError as error:
            raise ImageError(os.fspath(path), *reason_of(error)) from error

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._named:
            raise TypeError("a temporary file cannot be sent to another process")
        return _reopened, (self.path, self.version, self._identity)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, or as many as there are before the end."""
        handle = self._handle or self._opened()
        data = _read_at(handle.descriptor, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        while data and sum(map(len, parts)) < size:  # A file system may hand out less than it has.
            read = sum(map(len, parts))
            data = _read_at(handle.descriptor, size - read, offset + read)
            parts.append(data)
        return b"".join(parts)

    def require_unchanged(self) -> None:
        """Raise OSError when somebody has written to the file since it was first opened."""
        handle = self._handle or self._opened()
        if _identity(os.fstat(handle.descriptor)) != self._identity:
            raise OSError(errno.ESTALE, _CHANGED)

    def _opened(self) -> _Handle:
        with _lock:
            handle = self._handle
            if handle is None:
                descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                handle = self._handle = _Handle(descriptor)
                _opened.append(weakref.ref(self))
            while len(_opened) > MOST_OPEN:
                oldest = _opened.popleft()()
                if oldest is not None:
                    oldest._handle = None
        if _identity(os.fstat(handle.descriptor)) != self._identity:
            raise OSError(errno.ESTALE, _CHANGED)
        return handle


class _Handle:
    """An open descriptor, closed when the last thread that reads it lets go of it."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    # The argument is there for the end of the interpreter, when modules are emptied.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)


def reason_of(error: OSError) -> tuple[str, str]:
    """Return the reason and the kind of failure of a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return "no such file", "missing"
    kind = "permission" if isinstance(error, PermissionError) else "unreadable"
    return error.strerror or type(error).__name__, kind


def _reopened(path: str, version: str, identity: tuple[int, ...]) -> SharedFile:
    """Return a file as another process has listed it; when it is another one by now, reading says so."""
    file = SharedFile.__new__(SharedFile)
    file.path, file.version, file.size = path, version, identity[2]
    file._named, file._handle, file._identity = True, None, identity
    return file


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


if hasattr(os, "pread"):
    _read_at = os.pread
else:  # Windows: one place to read from for all threads.
    _seeking = threading.Lock()

    def _read_at(descriptor: int, size: int, offset: int, /) -> bytes:
        with _seeking:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)
