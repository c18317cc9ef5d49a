"""One writer for each store: a lock that the kernel lets go of when its holder dies."""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from embedkit.errors import StoreBusyError
from embedkit.store.durable import ASIDE, sync_folder, write_all

# Long enough for another process that only looks whether the lock is held.
_PATIENCE_SECONDS = 0.5


def parts_folder(path: Path) -> Path:
    """Return the folder where a store is made before it has its name."""
    return path.with_name(f"{path.name}.parts")


@dataclass(frozen=True)
class Holder:
    """The process that writes a store now."""

    pid: int
    host: str
    since: str


class Lock:
    """Holds ``FOLDER/lock`` while it is entered.

    The folder is made, files that a killed holder left in the making are removed from it, and it goes with the lock
    when nothing else is in it.

    Raises
    ------
    StoreBusyError
        When another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "lock"
        self._handle = -1

    def __enter__(self) -> Lock:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._acquire():
            if time.monotonic() > deadline:
                other = holder(self.folder)
                path = self.folder.with_name(self.folder.name.removesuffix(".parts"))
                raise StoreBusyError(path, other.pid if other else 0, other.host if other else "")
            time.sleep(0.02)
        return self

    def _acquire(self) -> bool:
        missing = [one for one in (self.folder, *self.folder.parents) if not one.is_dir()]
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
        for one in [self.folder, *missing]:
            sync_folder(one.parent)  # An earlier run may have been killed between the two.
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            return False  # The last holder removed the folder just now.
        if not _lock(handle, exclusive=True) or not self._is_current(handle):
            os.close(handle)
            return False
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
        try:
            os.ftruncate(handle, 0)
            write_all(handle, json.dumps(note).encode())
            for leftover in self.folder.glob(f"{ASIDE}*"):
                if leftover.is_file():
                    leftover.unlink()
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def _is_current(self, handle: int) -> bool:
        """Return whether the locked file still has its name: its folder may have been removed meanwhile."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if os.listdir(self.folder) == ["lock"]:
                if os.name == "nt":
                    self._close()  # Windows removes no open file.
                self.path.unlink()
                self.folder.rmdir()
                sync_folder(self.folder.parent)
        finally:
            self._close()

    def _close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def holder(folder: Path) -> Holder | None:
    """Return who holds the lock of a folder, or None."""
    try:
        handle = os.open(folder / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        if _lock(handle, exclusive=False):
            return None
        try:
            note = json.loads(os.read(handle, 4096))
            return Holder(int(note["pid"]), str(note["host"]), str(note["since"]))
        except (ValueError, KeyError, TypeError):
            return Holder(0, "unknown", "")  # Caught between taking the lock and signing it.
    finally:
        os.close(handle)


def _lock(handle: int, *, exclusive: bool) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def now() -> str:
    """Return the time in UTC, as stores and locks write it down."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
