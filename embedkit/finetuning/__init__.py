"""Adapting a backbone: stages, augmentation, the training loop, distillation."""

from embedkit.finetuning.distillation.distilling import DISTILLING, Distillation, distill
from embedkit.finetuning.feeding.augmentation import PRESETS, Augmentation
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.stages import finetune

__all__ = ["DISTILLING", "PRESETS", "Augmentation", "Distillation", "Recipe", "distill", "finetune"]
