"""Keeps freed memory in the process while a network runs on the processor.

A forward pass allocates and frees tens of megabytes at every layer. glibc takes blocks of that size from the kernel
and gives them back at once, so the kernel clears every page anew: on small networks that costs more than the network.
Told to keep them, glibc hands the same pages out again, and not one number changes. Linux with glibc only; elsewhere,
and with ``EMBEDKIT_MALLOC=system`` in the environment, nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# Of <malloc.h>: no block comes from mmap, the heap is not trimmed and grows in steps, and all threads share one heap.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20, _ARENA_MAX: 1}
_DEFAULTS = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 128 << 10, _ARENA_MAX: 0}

_lock = threading.Lock()
_users = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory inside; the last to leave gives it back to the system."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _set(_KEEPING)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(_DEFAULTS)


def _set(options: dict[int, int]) -> None:
    libc = _glibc()
    if libc is not None:
        for option, value in options.items():
            libc.mallopt(option, value)
        if options is _DEFAULTS:
            libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    if os.environ.get("EMBEDKIT_MALLOC") == "system" or platform.libc_ver()[0] != "glibc":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt.argtypes, libc.malloc_trim.argtypes = (ctypes.c_int, ctypes.c_int), (ctypes.c_size_t,)
    except (OSError, AttributeError):
        return None
    return libc
