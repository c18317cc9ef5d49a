"""Backbones: a timm network without its classifier, with its preprocessing and its spec.

The only room that uses timm. A backbone eats images, so it may use the images room; it knows nothing of stores.
"""

from embedkit.backbones.arguments import device_names
from embedkit.backbones.backbone import Backbone
from embedkit.backbones.catalogue import ModelInfo, list_models
from embedkit.backbones.choosing import Choice, Trial
from embedkit.backbones.engines import ENGINES, Engine
from embedkit.backbones.presets import find_differences, log_differences
from embedkit.backbones.streaming import Batch, Seconds, Steps, in_batches, stream, usable_processors
from embedkit.backbones.timm_import import import_timm

__all__ = [
    "ENGINES",
    "Backbone",
    "Batch",
    "Choice",
    "Engine",
    "ModelInfo",
    "Seconds",
    "Steps",
    "Trial",
    "device_names",
    "find_differences",
    "import_timm",
    "in_batches",
    "list_models",
    "log_differences",
    "stream",
    "usable_processors",
]
