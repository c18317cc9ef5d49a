"""What runs in a child process of `isolation`: it is told what to call, and calls it for one image after the other."""

from __future__ import annotations

import base64
import importlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.images.isolation import ANSWER, CROP, FAILED, MAX_FAILURE_BYTES, READY, REQUEST
from embedkit.images.pixels import DECODERS
from embedkit.images.regions import Region
from embedkit.spec import Preprocessing

_GRACE_SECONDS = 1.0
_MOST_TEXT = MAX_FAILURE_BYTES // 8  # A sign takes up to six bytes as JSON, and the kind a few.


def serve() -> None:
    """Serve the parent that started this process until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # The parent may have left it ignored.
    orders = json.loads(sys.stdin.buffer.readline())
    # A thread, since a decoder may be at work when the parent is killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    parent = _socket(orders["socket"])
    facts: dict[str, Any] = orders["preprocessing"]
    facts = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in facts.items()}
    preprocessing = Preprocessing(**facts)
    module, _, name = orders["function"].partition(":")
    function = partial(getattr(importlib.import_module(module), name), max_pixels=int(orders["max_pixels"]))
    if preprocessing.decoder != DECODERS["exact"]:
        import torch  # Now, rather than in the time of the first image.

        torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # What a decoder complains of has no limit, and it says so in its error too.
    os.close(nowhere)
    _limit(orders["memory_bytes"])
    parent.sendall(ANSWER.pack(READY, 0))
    while (source := _next(parent)) is not None:
        _alarm(orders["seconds"] + _GRACE_SECONDS)
        word, found = _answer(function, source, preprocessing)
        _alarm(0)
        parent.sendall(ANSWER.pack(word, len(found)))
        parent.sendall(found)
        del source, found
    os._exit(0)


def _answer(function: Callable[..., Any], source: Any, preprocessing: Preprocessing) -> tuple[int, bytes | memoryview]:
    try:
        crop: npt.NDArray[np.uint8] = np.ascontiguousarray(function(source, preprocessing), dtype=np.uint8)
        return CROP, crop.data.cast("B")
    except Exception as error:  # Whatever a decoder raises for a stranger's file, it costs this image only.
        reason, kind = _reason(error)
        return FAILED, json.dumps({"reason": reason[:_MOST_TEXT], "kind": kind}).encode()


def _reason(error: Exception) -> tuple[str, str]:
    cause: BaseException | None = error
    while cause is not None:
        # torch has no error of its own for it.
        if isinstance(cause, MemoryError) or "DefaultCPUAllocator" in str(cause):
            return "needs more memory to decode than one image may take", "too-large"
        cause = cause.__context__
    if isinstance(error, ImageError):
        return error.reason, error.kind
    return f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}", "damaged"


def _next(parent: socket.socket) -> Any:
    """Return what the parent asks the crop of, or None when it is gone."""
    head = _receive(parent, REQUEST.size)
    if head is None:
        return None
    text_bytes, data_bytes = REQUEST.unpack(head)
    text, data = _receive(parent, text_bytes), _receive(parent, data_bytes)
    if text is None or data is None:
        return None
    about = json.loads(text)
    if "dtype" in about:
        return np.frombuffer(data, dtype=about["dtype"]).reshape(about["shape"])
    return Region(bytes(data), tuple(about["box"])) if "box" in about else bytes(data)


def _receive(parent: socket.socket, count: int) -> bytearray | None:
    data = bytearray(count)
    left = memoryview(data)
    while len(left):
        got = parent.recv_into(left)
        if got == 0:
            return None
        left = left[got:]
    return data


def _socket(shared: int | str) -> socket.socket:
    if sys.platform == "win32":
        return socket.fromshare(base64.b64decode(shared))
    return socket.socket(fileno=int(shared))


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


def _alarm(seconds: float) -> None:
    """End this process after so many seconds, whatever it does then: the parent that would kill it may be gone."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit(memory_bytes: int) -> None:
    """Let this process take so much memory more than it has, and leave no core behind."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        if most == resource.RLIM_INFINITY or limit < most:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):
        pass  # This system keeps no such limit; its own killer is what remains.
