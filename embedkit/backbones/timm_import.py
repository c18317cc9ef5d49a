"""Imports timm where torchvision's compiled operators cannot load.

torchvision from PyPI is linked against CUDA. Beside a CPU-only torch its library does not load, and ``import
torchvision`` then fails while it registers shapes for two operators that nobody defined. timm needs nothing of
torchvision but its transforms, so declaring those two operators is enough; calling them still fails, as it should.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@cache
def import_timm() -> ModuleType:
    """Return timm, imported with torchvision's missing operators declared."""
    _declare_missing_operators()
    return importlib.import_module("timm")


def _declare_missing_operators() -> None:
    package = importlib.util.find_spec("torchvision")
    for folder in package.submodule_search_locations or [] if package else []:
        for library in sorted(Path(folder).glob("_C*.so")) + sorted(Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            except OSError:
                continue
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library().define(schema)  # type: ignore[no-untyped-call]


@cache
def _library() -> torch.library.Library:
    # Kept for the life of the process: a collected library takes its definitions along.
    return torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
