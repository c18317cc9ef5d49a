"""Keeps float32 what its name says while a network runs on a GPU.

There, PyTorch rounds the inputs of float32 convolutions to ten bits (TF32) unless it is told not to. A store that says
float32 was computed in float32, so it is told, for as long as a pass takes. Matrix products are left alone: they are
exact unless somebody asks PyTorch for something else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_restore: list[Callable[[], None]] = []  # Of the first who came.


@contextmanager
def whole_float32(device: torch.device) -> Iterator[None]:
    """Have convolutions computed in float32; the last to leave restores what was before. Of GPUs only."""
    global _inside
    if device.type != "cuda":
        yield
        return
    with _lock:
        _inside += 1
        if _inside == 1:
            _restore.append(_without_tf32())
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore.pop()()


def _without_tf32() -> Callable[[], None]:
    """Switch TF32 off for convolutions, and return what restores the switch."""
    cudnn: Any = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # Somebody uses the newer switches, and the two kinds must not be mixed.
        precision = cudnn.conv.fp32_precision
        cudnn.conv.fp32_precision = "ieee"
        return lambda: setattr(cudnn.conv, "fp32_precision", precision)
    cudnn.allow_tf32 = False
    return lambda: setattr(cudnn, "allow_tf32", before)
