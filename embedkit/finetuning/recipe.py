"""Recipe: every setting of a training run."""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from embedkit.errors import FinetuneError
from embedkit.finetuning.feeding.augmentation import PRESETS, Augmentation

WARMUPS = ("auto", "probe", "sgd", "none")
SCHEDULES = ("constant", "cosine", "exponential", "step", "plateau", "one-cycle")
LOSSES = ("cross-entropy", "supcon", "arcface", "triplet")
AMP_DTYPES = ("fp32", "bf16", "fp16")
_LARGEST = 1 << 53  # Up to which every whole number is a float, too.
MAX_UNITS = 1 << 20  # Of a hidden layer: beyond it is a slip of the finger, or a stranger's.


@dataclass(frozen=True)
class Recipe:
    """Every setting of a training run that moves its numbers.

    Two runs with equal recipes, images and backbones end in the same weights on one machine. Names are timm's.

    Parameters
    ----------
    head : str, default "linear"
        ``linear``, or ``mlp:UNITS`` for a hidden layer with ReLU.
    warmup : {"auto", "probe", "sgd", "none"}, default "auto"
        How the head is fitted on the frozen body's stored embeddings: by the linear probe, by gradient steps, or not
        at all; "auto" takes the probe for a linear head and steps for an MLP.
    head_epochs : int, default 30
        Passes over the stored embeddings of a warm-up by steps; more of a small store, until there were 200 updates.
    unfreeze : str, default "all"
        What learns after the warm-up beside the head: ``all``, ``none``, ``last-N`` blocks, or a pattern (several with
        commas between them) of module or parameter names, such as ``blocks.5*`` or ``*norm*``.
    gradual : int, default 0
        Epochs between one block's thaw and the next's, from the head to the input; 0 thaws everything at once.
    freeze_norm : bool, default True
        Whether batch normalisation keeps its pretrained statistics; its weights learn all the same. Not from scratch.
    from_scratch : bool, default False
        Whether the network starts from timm's own random weights.
    lora : int, default 0
        Rank of the low-rank adapters that learn in place of the weights; 0 trains the weights themselves.
    drop_path : float, default 0.0
        Chance that a residual branch is skipped, at the last block; it grows from 0 at the first.
    epochs : int, default 10
        Passes over the training images.
    batch_size : int, default 32
        Images of a forward pass.
    grad_accum_steps : int, default 1
        Batches whose gradients make one step.
    opt : str, default "adamw"
        A name of timm.optim, such as sgd, adamw, adam, rmsprop or lamb.
    momentum : float, default 0.9
        Of optimisers that have it.
    body_lr, head_lr : float, default 3e-4 and 1e-3
        Learning rates of the last block and of the head.
    layer_decay : float, default 0.75
        Each block's learning rate as a share of that of the block behind it; 1 gives all blocks one rate, which they
        always have from scratch.
    weight_decay : float, default 0.05
        Of weights; norms and biases have none.
    sched : {"constant", "cosine", "exponential", "step", "plateau", "one-cycle"}, default "cosine"
        How learning rates move.
    warmup_epochs : float, default 1.0
        Epochs over which they rise at first.
    decay_rate : float, default 0.1
        What exponential reaches at the end of the run, and by what step and plateau multiply.
    decay_epochs : int, default 3
        Epochs between two steps, or that plateau waits.
    min_lr : float, default 0.0
        Floor, as a share of each group's rate.
    clip_grad : float, default 1.0
        Largest norm of the gradient; 0 clips nothing.
    smoothing : float, default 0.0
        Share of each label that is spread over all classes.
    loss : {"cross-entropy", "supcon", "arcface", "triplet"}, default "cross-entropy"
        What is minimised.
    balance : bool, default False
        Whether every class is seen equally often.
    model_ema : float, default 0.0
        Decay of a moving average of the weights, for each step; 0 keeps none.
    amp_dtype : {"fp32", "bf16", "fp16"}, default "fp32"
        Number format of the products.
    grad_checkpointing : bool, default False
        Whether activations are computed twice to save memory.
    patience : int, default 0
        Epochs without a better validation before it stops; 0 never does.
    metric : str, default "top1"
        What the best epoch is chosen by, on validation images.
    seed : int, default 0
        Draws everything that is drawn.
    augmentation : Augmentation, default "light" of `embedkit.finetuning.feeding.augmentation.PRESETS`
        How training images are varied.

    Raises
    ------
    FinetuneError
        When a setting is not one of its values, or two contradict each other.

    Examples
    --------
    >>> from embedkit.finetuning.recipe import Recipe
    >>> recipe = Recipe(unfreeze="last-2", body_lr=1e-4)
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    """

    head: str = "linear"
    warmup: str = "auto"
    head_epochs: int = 30
    unfreeze: str = "all"
    gradual: int = 0
    freeze_norm: bool = True
    from_scratch: bool = False
    lora: int = 0
    drop_path: float = 0.0

    epochs: int = 10
    batch_size: int = 32
    grad_accum_steps: int = 1
    opt: str = "adamw"
    momentum: float = 0.9
    body_lr: float = 3e-4
    head_lr: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    sched: str = "cosine"
    warmup_epochs: float = 1.0
    decay_rate: float = 0.1
    decay_epochs: int = 3
    min_lr: float = 0.0
    clip_grad: float = 1.0
    smoothing: float = 0.0
    loss: str = "cross-entropy"
    balance: bool = False
    model_ema: float = 0.0
    amp_dtype: str = "fp32"
    grad_checkpointing: bool = False
    patience: int = 0
    metric: str = "top1"
    seed: int = 0
    augmentation: Augmentation = PRESETS["light"]

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise FinetuneError(f"{name} must be {_WORDS[kind]}; got {reprlib.repr(value)}")
        if not isinstance(self.augmentation, Augmentation):
            raise FinetuneError(f"augmentation must be an Augmentation; got {self.augmentation!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise FinetuneError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name, (text, fits) in _RANGES.items():
            value = getattr(self, name)
            most, words = (_LARGEST, "no larger than 2^53") if _KINDS[name] is int else (sys.float_info.max, "finite")
            if not (fits(value) and value <= most):
                limit = f"{text}, and {words}" if fits(value) else text
                raise FinetuneError(f"{name} must be {limit}; got {reprlib.repr(value)}")
        hidden_units(self.head)
        _check_pairs(self)

    @property
    def warmup_kind(self) -> str:
        """How the head is fitted, "auto" decided: "probe", "sgd" or "none"."""
        if self.warmup != "auto":
            return self.warmup
        return "none" if self.from_scratch else "probe" if self.head == "linear" else "sgd"

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as JSON values."""
        values = dataclasses.asdict(self)
        values["augmentation"] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in values["augmentation"].items()
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from what `to_dict` returned; settings that are absent have their defaults.

        Raises
        ------
        FinetuneError
            When a setting is unknown (with the closest one) or its value is none. The values may come from a stranger.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("augmentation", {}), Mapping):
            raise FinetuneError("a recipe is an object of settings, and so is its augmentation")
        _check_names(values, cls)
        varied = values.get("augmentation", {})
        _check_names(varied, Augmentation)
        varied = {name: tuple(value) if isinstance(value, list) else value for name, value in varied.items()}
        try:
            whole = {"augmentation": Augmentation(**varied)} if "augmentation" in values else {}
            return cls(**{**values, **whole})
        except TypeError as error:
            raise FinetuneError(f"a recipe has a setting of the wrong type: {error}") from error


def hidden_units(head: str) -> int:
    """Return the units of a head's hidden layer, 0 for a linear head.

    Parameters
    ----------
    head : str
        As in `Recipe`.

    Raises
    ------
    FinetuneError
        When there is no such head.

    Examples
    --------
    >>> from embedkit.finetuning.recipe import hidden_units
    >>> hidden_units("mlp:512")
    512
    """
    if head == "linear":
        return 0
    found = re.fullmatch(r"mlp:([1-9][0-9]{0,6})", head)
    if found is None or int(found[1]) > MAX_UNITS:
        raise FinetuneError(f"there is no head {head!r}; choose linear, or mlp:UNITS such as mlp:512")
    return int(found[1])


_KINDS: dict[str, type] = {
    each.name: {"str": str, "int": int, "float": float, "bool": bool}[str(each.type)]
    for each in dataclasses.fields(Recipe)
    if each.name != "augmentation"
}
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_CHOICES = {"warmup": WARMUPS, "sched": SCHEDULES, "loss": LOSSES, "amp_dtype": AMP_DTYPES}

_NATURAL: tuple[str, Callable[[float], bool]] = ("at least 1", lambda value: value >= 1)
_COUNT: tuple[str, Callable[[float], bool]] = ("0 or more", lambda value: value >= 0)
_SHARE: tuple[str, Callable[[float], bool]] = ("from 0 to below 1", lambda value: 0 <= value < 1)
_FACTOR: tuple[str, Callable[[float], bool]] = ("above 0 and at most 1", lambda value: 0 < value <= 1)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "head_epochs": _NATURAL, "gradual": _COUNT, "lora": _COUNT, "drop_path": _SHARE, "epochs": _COUNT,
    "batch_size": _NATURAL, "grad_accum_steps": _NATURAL, "momentum": _SHARE, "body_lr": _COUNT, "head_lr": _COUNT,
    "layer_decay": _FACTOR, "weight_decay": _COUNT, "warmup_epochs": _COUNT, "decay_rate": _FACTOR,
    "decay_epochs": _NATURAL, "min_lr": _SHARE, "clip_grad": _COUNT, "smoothing": _SHARE, "model_ema": _SHARE,
    "patience": _COUNT, "seed": ("from 0 to 2^32 - 1", lambda value: 0 <= value < 1 << 32),
}  # fmt: skip


def _check_pairs(recipe: Recipe) -> None:
    """Raise unless settings that depend on each other agree."""
    if recipe.warmup == "probe" and recipe.head != "linear":
        raise FinetuneError(f"a probe is linear and cannot warm up the head {recipe.head}; choose warmup sgd")
    last = recipe.unfreeze.removeprefix("last-")
    if not recipe.unfreeze.strip() or (last != recipe.unfreeze and re.fullmatch("[1-9][0-9]{0,5}", last) is None):
        raise FinetuneError(f"unfreeze must be all, none, last-N or a pattern of names; got {recipe.unfreeze!r}")
    if recipe.from_scratch and (recipe.unfreeze != "all" or recipe.gradual or recipe.lora):
        raise FinetuneError("a network from scratch must learn everything: drop unfreeze, gradual and lora")
    if recipe.from_scratch and recipe.warmup in ("probe", "sgd"):
        raise FinetuneError("a network from scratch has no embeddings to warm a head up on; choose warmup none")
    if recipe.gradual and recipe.unfreeze == "none":
        raise FinetuneError("gradual thaws one block after the other, and none is to learn; drop one of the two")
    varied = recipe.augmentation
    if varied.mixup_off_epoch and not (varied.mixup or varied.cutmix):
        raise FinetuneError("mixup_off_epoch ends what does not begin; give mixup or cutmix, or drop it")
    if varied.mix_prob != Augmentation.mix_prob and not (varied.mixup or varied.cutmix):
        raise FinetuneError("mix_prob is the chance of what does not come; give mixup or cutmix, or drop it")
    if recipe.head_epochs != Recipe.head_epochs and recipe.warmup_kind != "sgd" and recipe.loss == "cross-entropy":
        raise FinetuneError("head_epochs are of a warm-up by steps, and none is made; choose warmup sgd, or drop them")
    if recipe.sched != "one-cycle" and 0 < recipe.epochs < recipe.warmup_epochs:
        raise FinetuneError(
            f"learning rates that rise for {recipe.warmup_epochs:g} epochs never arrive in {recipe.epochs}; "
            "choose fewer warmup_epochs"
        )
    if recipe.loss != "cross-entropy" and recipe.unfreeze == "none":
        raise FinetuneError(
            f"loss {recipe.loss} compares embeddings, which a frozen body does not change; unfreeze some"
        )
    if recipe.lora and recipe.unfreeze == "none":
        raise FinetuneError("adapters in a frozen network learn nothing; drop lora, or unfreeze none")


def _check_names(values: Mapping[str, Any], kind: type) -> None:
    known = [each.name for each in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise FinetuneError(f"there is no setting {name!r}{f'; did you mean {close[0]}?' if close else ''}")
