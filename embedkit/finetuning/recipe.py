"""Recipe: every setting of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from embedkit.finetuning.augmentation import Augmentation


@dataclass(frozen=True)
class Recipe:
    """Every setting of a training run that moves its numbers.

    Two runs with equal recipes, images and backbones end in the same weights on one machine.
    """

    # What is trained.
    head: str = "linear"  # linear | mlp:WIDTH
    warmup: str = "auto"  # auto | probe | sgd | none: how the head is fitted on the frozen body
    head_epochs: int = 30  # of an sgd warm-up over the store
    unfreeze: str = "all"  # all | none | last-N | PATTERN over timm's groups
    gradual: int = 0  # epochs between one block and the next; 0 unfreezes everything at once
    freeze_norm: bool = True  # BatchNorm statistics stay the pretrained ones
    from_scratch: bool = False
    lora: int = 0  # rank of adapters; 0 trains the weights themselves
    drop_path: float = 0.0

    # How.
    epochs: int = 10
    batch_size: int = 32
    grad_accum_steps: int = 1
    opt: str = "adamw"
    momentum: float = 0.9
    body_lr: float = 1e-4
    head_lr: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    sched: str = "cosine"  # constant | cosine | exponential | step | plateau | one-cycle
    warmup_epochs: float = 1.0
    decay_rate: float = 0.1  # of exponential (over the whole run), step and plateau
    decay_epochs: int = 3  # of step; the patience of plateau
    min_lr: float = 0.0  # as a share of each group's rate
    clip_grad: float = 1.0
    smoothing: float = 0.0
    loss: str = "cross-entropy"  # cross-entropy | supcon | arcface | triplet
    balance: bool = False
    model_ema: float = 0.0  # decay an update; 0 keeps none
    amp_dtype: str = "fp32"  # fp32 | bf16 | fp16
    grad_checkpointing: bool = False
    patience: int = 0  # epochs without a better validation before it stops; 0 never does
    metric: str = "top1"  # what the best epoch is chosen by, on validation rows
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
