"""Backbones: a timm network without its classifier, with its preprocessing and its spec.

The only room that uses timm. A backbone eats images, so it may use the images room; it knows nothing of stores.
"""

from embedkit.backbones.backbone import Backbone
from embedkit.backbones.catalogue import ModelInfo, list_models
from embedkit.backbones.streaming import Batch, in_batches, stream
from embedkit.backbones.timm_import import import_timm

__all__ = ["Backbone", "Batch", "ModelInfo", "import_timm", "in_batches", "list_models", "stream"]
