"""Adapting a backbone: stages, augmentation, the training loop, distillation."""
