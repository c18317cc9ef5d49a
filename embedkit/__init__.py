"""embedkit turns folders of images into embeddings and makes them useful.

A store is a file that says what produced it, and everything downstream reads stores and nothing else.
The public names below are imported on first use, so that ``import embedkit`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedkit.backbones import Backbone, list_models
    from embedkit.errors import (
        BackboneError,
        EmbeddingShapeError,
        EmbedkitError,
        EvaluationError,
        FinetuneError,
        ImageError,
        MissingExtraError,
        SpecMismatchError,
        StoreBusyError,
        StoreExistsError,
        StoreFormatError,
        StoreNotFoundError,
    )
    from embedkit.evaluation import Report, compare, comparison_table, predict, probe, read_suite, run_suite
    from embedkit.extraction import estimate, extract
    from embedkit.finetuning import Augmentation, Distillation, Recipe, distill, finetune
    from embedkit.index import Index, cluster, find_duplicates, find_outliers, retrieval_report
    from embedkit.sources import list_images
    from embedkit.spec import EmbeddingSpec, Preprocessing
    from embedkit.store import Store

__version__ = "0.1.0"

__all__ = [
    "Augmentation",
    "Backbone",
    "BackboneError",
    "Distillation",
    "EmbeddingShapeError",
    "EmbeddingSpec",
    "EmbedkitError",
    "EvaluationError",
    "FinetuneError",
    "ImageError",
    "Index",
    "MissingExtraError",
    "Preprocessing",
    "Recipe",
    "Report",
    "SpecMismatchError",
    "Store",
    "StoreBusyError",
    "StoreExistsError",
    "StoreFormatError",
    "StoreNotFoundError",
    "__version__",
    "cluster",
    "compare",
    "comparison_table",
    "distill",
    "estimate",
    "extract",
    "find_duplicates",
    "find_outliers",
    "finetune",
    "list_images",
    "list_models",
    "predict",
    "probe",
    "read_suite",
    "retrieval_report",
    "run_suite",
]

_ROOMS = {
    "Augmentation": "finetuning",
    "Backbone": "backbones",
    "Distillation": "finetuning",
    "EmbeddingSpec": "spec",
    "Index": "index",
    "Preprocessing": "spec",
    "Recipe": "finetuning",
    "Report": "evaluation",
    "Store": "store",
    "cluster": "index",
    "compare": "evaluation",
    "comparison_table": "evaluation",
    "distill": "finetuning",
    "estimate": "extraction",
    "extract": "extraction",
    "find_duplicates": "index",
    "find_outliers": "index",
    "finetune": "finetuning",
    "list_images": "sources",
    "list_models": "backbones",
    "predict": "evaluation",
    "probe": "evaluation",
    "read_suite": "evaluation",
    "retrieval_report": "index",
    "run_suite": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'embedkit' has no attribute {name!r}")
    room = importlib.import_module(f"embedkit.{_ROOMS.get(name, 'errors')}")
    value = globals()[name] = getattr(room, name)
    return value


def __dir__() -> list[str]:
    return __all__
