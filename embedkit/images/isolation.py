"""Decoding in processes of their own: a decoder that hangs or crashes costs one image, and not the run."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from embedkit.errors import FAILURE_KINDS, EmbedkitError, ImageError
from embedkit.images.decoding import BYTES_A_PIXEL, read_bytes
from embedkit.images.formats import MAX_PIXELS
from embedkit.images.regions import Region
from embedkit.spec import Preprocessing

Pixels = npt.NDArray[np.uint8]
_Request: TypeAlias = "Sequence[bytes | memoryview]"

# What goes over the socket, and `child` holds the other end of it. A request is the length of its description (JSON),
# the length of its bytes, and both of these. An answer is one of three words, the length of what follows, and that.
REQUEST = struct.Struct("<IQ")
ANSWER = struct.Struct("<BI")
READY, CROP, FAILED = 0, 1, 2
MAX_FAILURE_BYTES = 4096
_MAX_REASON = 500
_START_SECONDS = 120.0
_SINGLE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# With the very modules of this process, in their order: the working folder may hold a stranger's numpy.py.
_START = "import sys; sys.path[:] = sys.argv[1:]; from embedkit.images.child import serve; serve()"


class Isolated:
    """Reads crops as `embedkit.images.read_crop` does, bit for bit, in child processes.

    Every thread that calls it borrows one child, which is started when there is none to borrow. A child that takes too
    long is killed, and the next image gets a fresh one; an image over which a used child ends its process is tried once
    more in a fresh one. A child is limited in time and memory, and of its answers nothing is believed but the pixels
    and the text of a reason. It is no sandbox: what takes a child over may do what the user may.

    Parameters
    ----------
    preprocessing : Preprocessing
        What the crops are made for.
    seconds : float, default 30
        How long an image may take.
    max_pixels : int, default 178956970
        As for `read_crop`.
    memory_bytes : int, default 4 GiB
        How much memory an image may take, where the system keeps such a limit: Linux does.
    function : str, default "embedkit.images.pixels:read_crop"
        What the children call, as ``module:function``.

    Raises
    ------
    EmbedkitError
        On the first call, when a child process cannot be started.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit import Preprocessing
    >>> from embedkit.images import Isolated
    >>> with Isolated(Preprocessing(img_size=(32, 32)), seconds=10) as read:
    ...     read(np.zeros((48, 64, 3), dtype=np.uint8)).shape
    (32, 32, 3)
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        seconds: float = 30.0,
        max_pixels: int = MAX_PIXELS,
        memory_bytes: int = 4 << 30,
        function: str = "embedkit.images.pixels:read_crop",
    ) -> None:
        self.preprocessing, self.seconds, self._max_bytes = preprocessing, seconds, BYTES_A_PIXEL * max_pixels
        self._orders = {
            "function": function, "preprocessing": asdict(preprocessing), "seconds": seconds,
            "memory_bytes": memory_bytes, "max_pixels": max_pixels,
        }  # fmt: skip
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._closed = False

    def __enter__(self) -> Isolated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, source: Any, *, id: str | None = None) -> Pixels:
        """Read an image and return what a backbone sees of it; safe to call from several threads at once.

        Parameters
        ----------
        source : path, bytes, Region or array
            As for `read_crop`.
        id : str, optional
            What an error calls the image; by default its path.

        Returns
        -------
        array of shape (h, w, 3)
            uint8, with (h, w) == `preprocessing.img_size`.

        Raises
        ------
        ImageError
            As from `read_crop`; of the kind "timeout" when the decoder took too long or ended its process.
        EmbedkitError
            When a child process cannot be started.
        """
        if isinstance(source, str | os.PathLike):
            id = os.fspath(source) if id is None else id
            source = read_bytes(source, id, self._max_bytes)
        name, request, child = "image" if id is None else id, _request(source), self._borrow()
        if child.answered:
            try:
                return self._asked(child, request, name)
            except _EndedError:  # An image before this one may have hurt it.
                child = _Child(self._orders)
        try:
            return self._asked(child, request, name)
        except _EndedError as how:
            raise ImageError(name, f"the decoder ended its process ({how})", "timeout") from None

    def close(self) -> None:
        """End the children, those at work when they are done."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for child in idle:
            child.end()

    def _asked(self, child: _Child, request: _Request, id: str) -> Pixels:
        try:
            found = child.ask(request, self.preprocessing.img_size, self.seconds, id)
        except BaseException:  # Whatever happened, its next answer might be that to this question.
            child.end()
            raise
        self._give_back(child)
        if isinstance(found, ImageError):
            raise found
        return found

    def _borrow(self) -> _Child:
        while True:
            with self._lock:
                if self._closed:
                    raise ValueError("this Isolated is closed")
                child = self._idle.pop() if self._idle else None
            if child is None:
                return _Child(self._orders)
            if child.waits():
                return child
            child.end()  # It died when nobody asked it anything; no image is to blame.

    def _give_back(self, child: _Child) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(child)
                return
        child.end()


class _Child:
    """One child process, and our end of its socket."""

    def __init__(self, orders: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        self._socket, self.answered = ours, False
        with theirs, tempfile.TemporaryFile() as log:
            try:
                self._process = _started(theirs, log)
            except OSError as error:
                ours.close()
                raise EmbedkitError(f"no process for decoding can be started: {error}") from error
            try:
                assert self._process.stdin is not None
                orders = {**orders, "socket": _shared(theirs, self._process.pid)}
                self._process.stdin.write(json.dumps(orders).encode() + b"\n")
                self._process.stdin.flush()  # It stays open: its end tells the child that we are gone.
                if sys.platform != "win32":
                    theirs.close()  # Then a child that dies is an end of file.
                if self._answer(time.monotonic() + _START_SECONDS) != (READY, 0):
                    raise _NonsenseError
            except (OSError, EOFError, _NonsenseError) as error:
                how = "it takes too long" if isinstance(error, TimeoutError) else _how_ended(self.end())
                self.end()
                raise EmbedkitError(f"the process for decoding does not start: {_last_line(log) or how}") from error
            except BaseException:
                self.end()
                raise

    def ask(self, request: _Request, size: tuple[int, int], seconds: float, id: str) -> Pixels | ImageError:
        """Return a crop, or why there is none; raise ImageError or _EndedError when that cost the child."""
        deadline = time.monotonic() + seconds
        try:
            for part in request:
                self._socket.settimeout(_left(deadline))
                self._socket.sendall(part)
            word, length = self._answer(deadline)
            self.answered = True
            if word == CROP and length == size[0] * size[1] * 3:
                crop = np.empty((*size, 3), dtype=np.uint8)
                self._receive(crop.data.cast("B"), deadline)
                return crop
            if word != FAILED or length > MAX_FAILURE_BYTES:
                raise _NonsenseError
            text = bytearray(length)
            self._receive(memoryview(text), deadline)
            return ImageError(id, *_failure(text))
        except TimeoutError:
            self._kill()
            raise ImageError(id, f"took longer than {seconds:g} s to decode", "timeout") from None
        except (OSError, EOFError):
            raise _EndedError(_how_ended(self.end())) from None
        except _NonsenseError:
            self._kill()
            raise ImageError(id, "the decoder answered with neither pixels nor a reason", "damaged") from None

    def waits(self) -> bool:
        """Return whether the child lives and has said nothing since it was last asked."""
        if self._process.poll() is not None:
            return False
        self._socket.setblocking(False)
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def end(self) -> int | None:
        """End the child, and return its exit status where it ended by itself."""
        self._socket.close()
        try:
            return self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._kill()
            return None
        finally:
            if self._process.stdin is not None:
                with suppress(OSError):
                    self._process.stdin.close()

    def _kill(self) -> None:
        with suppress(OSError):
            if sys.platform == "win32":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)  # With whatever it started.
        with suppress(subprocess.TimeoutExpired):  # A process that waits for a dead disk cannot be killed.
            self._process.wait(5.0)

    def _answer(self, deadline: float) -> tuple[int, int]:
        head = bytearray(ANSWER.size)
        self._receive(memoryview(head), deadline)
        word, length = ANSWER.unpack(head)
        return word, length

    def _receive(self, into: memoryview, deadline: float) -> None:
        while len(into):
            self._socket.settimeout(_left(deadline))
            count = self._socket.recv_into(into)
            if count == 0:
                raise EOFError
            into = into[count:]


class _NonsenseError(Exception):
    """An answer that is none."""


class _EndedError(Exception):
    """A child ended its process; the text says how."""


def _request(source: Any) -> _Request:
    """Return what asks for the crop of a source."""
    about: dict[str, Any] = {}
    if isinstance(source, Region):
        about["box"] = [int(side) for side in source.box]
        source = source.data
    elif isinstance(source, np.ndarray):
        about = {"shape": source.shape, "dtype": source.dtype.str}
        source = np.ascontiguousarray(source).reshape(-1).view(np.uint8).data
    elif not isinstance(source, bytes):
        raise TypeError(f"an image is decoded from bytes, a Region or an array, not {type(source).__name__}")
    text = json.dumps(about).encode()
    return [REQUEST.pack(len(text), len(source)) + text, source]


def _failure(answer: bytearray) -> tuple[str, str]:
    """Return the reason and the kind that a child gives, which may be anything."""
    try:
        found = json.loads(answer.decode())
        reason, kind = found["reason"], found["kind"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _NonsenseError from None
    if not isinstance(reason, str) or kind not in FAILURE_KINDS:
        raise _NonsenseError
    text = " ".join(reason.split())[:_MAX_REASON]
    return "".join(sign if sign.isprintable() else "?" for sign in text), kind


def _started(theirs: socket.socket, log: BinaryIO) -> subprocess.Popen[bytes]:
    """Start a child. Ctrl-C is ours alone, so it gets a session of its own."""
    if not sys.executable:
        raise EmbedkitError("no process for decoding can be started: this Python does not know its own program")
    windows = sys.platform == "win32"
    return subprocess.Popen(
        [sys.executable, "-c", _START, *sys.path],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, **dict.fromkeys(_SINGLE, "1")},
        pass_fds=() if windows else (theirs.fileno(),), start_new_session=not windows,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )  # fmt: skip


def _shared(theirs: socket.socket, pid: int) -> int | str:
    """Return what a child finds its end of the socket by."""
    if sys.platform == "win32":
        return base64.b64encode(theirs.share(pid)).decode()
    return theirs.fileno()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _how_ended(status: int | None) -> str:
    if status is None:
        return "it stopped answering"
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def _last_line(log: BinaryIO) -> str:
    """Return the last line that a process wrote, such as the error that ended it."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
    lines = log.read().decode(errors="replace").split("\n")
    return next((" ".join(line.split())[:_MAX_REASON] for line in reversed(lines) if line.strip()), "")
