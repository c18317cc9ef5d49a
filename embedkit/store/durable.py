"""Files that survive a power cut: written aside, made durable, and only then given their name."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPARE_BYTES = 1 << 20
ASIDE = ".tmp-"


def aside_name() -> str:
    """Return a file name that no other writer uses, and that tells a leftover from a file."""
    return f"{ASIDE}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """Yield a path for a file in the making, and remove what is left of it on the way out."""
    path = folder / aside_name()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def create(path: Path) -> int:
    """Return a descriptor of a new file to write."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a new file and wait until the disk has it.

    After an error the file is worthless, and so is another fsync of it: the kernel reports a lost page once.
    """
    with naming(path):
        handle = create(path)
        try:
            write_all(handle, data)
            sync(handle)
        finally:
            os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system name the file that they are about."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write every byte: one call may write fewer than it was given, and says so only in its result."""
    view = memoryview(data)
    view = view.cast("B") if view.nbytes else memoryview(b"")
    while len(view):
        view = view[os.write(handle, view[: 1 << 30]) :]


def sync(handle: int) -> None:
    """Wait until the disk has a file's bytes."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)  # There, fsync leaves the bytes in the drive's own cache.
    else:
        os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries, without which a new name may vanish."""
    if os.name == "nt":
        return  # Windows has no handle for a folder; its renames are journalled.
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def publish_new(source: Path, target: Path) -> bool:
    """Give a durable file its name unless that name is taken, durably; return whether it was free."""
    free = True
    try:
        os.link(source, target)
    except FileExistsError:
        free = False
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        os.replace(source, target)  # This file system has no links.
    sync_folder(target.parent)
    return free


def publish_over(source: Path, target: Path) -> None:
    """Give a durable file its name, in place of the file that has it, durably."""
    os.replace(source, target)
    sync_folder(target.parent)


def publish_made(source: Path, target: Path) -> None:
    """Give a file that another library wrote its name, durably, with the permissions of any new file there.

    Some libraries make files for their owner alone, whatever the umask says.
    """
    with aside(target.parent) as usual, naming(target):
        handle = create(usual)  # Asking the umask itself would change it for all threads.
        try:
            os.chmod(source, stat.S_IMODE(os.fstat(handle).st_mode))
        finally:
            os.close(handle)
        with source.open("rb+") as file:
            sync(file.fileno())
    publish_over(source, target)


def free_bytes(folder: Path) -> int:
    """Return how many bytes may still be written below a folder."""
    return shutil.disk_usage(folder).free


def reserve(handle: int, path: Path, size: int) -> None:
    """Make sure that a file can grow to `size` bytes before hours of copying, not in the middle of them.

    Raises
    ------
    OSError
        ENOSPC, naming the file, with what is needed and what is free.
    """
    free = free_bytes(path.parent) + os.fstat(handle).st_blocks * 512
    if free < size + SPARE_BYTES:
        reason = f"{os.strerror(errno.ENOSPC)}: {size + SPARE_BYTES:,} bytes are needed and {free:,} are free"
        raise OSError(errno.ENOSPC, reason, os.fspath(path.parent))
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise OSError(error.errno, error.strerror, os.fspath(path)) from error


__all__ = [
    "ASIDE", "aside", "aside_name", "create", "free_bytes", "naming", "publish_made", "publish_new", "publish_over",
    "reserve", "sync", "sync_folder", "write_all", "write_durably",
]  # fmt: skip
