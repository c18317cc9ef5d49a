"""How training images are varied."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from embedkit.errors import FinetuneError

_AA = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")  # How timm's texts begin.


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied, so that a backbone learns the classes and not the photographs.

    Every chance is drawn from the run's seed, the epoch and the image alone: the same command sees the same pixels.

    Parameters
    ----------
    crop_scale : tuple of float, default (1.0, 1.0)
        Smallest and largest share of the image's area that RandomResizedCrop keeps; ``(1, 1)`` is the crop of the
        evaluation, without chance.
    crop_ratio : tuple of float, default (0.75, 1.3333333333333333)
        Smallest and largest ratio of that crop's width to its height.
    hflip : float, default 0.0
        Chance of a mirror image.
    vflip : float, default 0.0
        Chance of an image upside down.
    rotation : float, default 0.0
        Largest turn to either side, in degrees.
    zoom : float, default 0.0
        Largest change of scale to either side, as a share: 0.2 is 0.8 to 1.2.
    shear : float, default 0.0
        Largest shear to either side, in degrees.
    shift : float, default 0.0
        Largest shift to either side, as a share of the width and of the height.
    brightness, contrast, saturation : float, default 0.0
        Largest change to either side, as a share.
    hue : float, default 0.0
        Largest turn of the hue to either side, as a share of the circle; at most 0.5.
    channel_shift : float, default 0.0
        Largest amount added to each channel by itself, as a share of its range.
    aa : str, default ""
        timm's text for RandAugment, AutoAugment or AugMix, such as ``rand-m9-mstd0.5``.
    reprob : float, default 0.0
        Chance that a rectangle is erased.
    mixup, cutmix : float, default 0.0
        Alpha of the Beta distribution that MixUp and CutMix draw from; 0 leaves them out. With both, a batch takes one.
    mix_prob : float, default 1.0
        Chance that a batch is mixed, where it can be.
    mixup_off_epoch : int, default 0
        The epoch from which nothing is mixed any more, of epochs counted from 1; 0 mixes to the end.

    Raises
    ------
    FinetuneError
        When a chance lies outside of [0, 1], an amount has no meaning, or a value is of another kind.

    Examples
    --------
    >>> from embedkit.finetuning.feeding.augmentation import PRESETS, Augmentation
    >>> Augmentation(hflip=0.5).moves, Augmentation(rotation=10.0).moves
    (False, True)
    >>> PRESETS["light"]
    Augmentation(crop_scale=(0.5, 1.0), hflip=0.5)

    References
    ----------
    Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018. Yun et al., CutMix, 2019. Cubuk et al., RandAugment,
    2020. Zhong et al., Random Erasing Data Augmentation, 2020.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.0
    vflip: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    channel_shift: float = 0.0
    aa: str = ""
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mixup_off_epoch: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            word, fits = _KINDS[str(each.type)]
            value = getattr(self, each.name)
            if not fits(value):
                raise FinetuneError(f"the augmentation's {each.name} must be {word}; got {reprlib.repr(value)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # Of NaN too.
                raise FinetuneError(
                    f"the augmentation's {name} must be between {low:g} and {high:g}, not {reprlib.repr(value)}"
                )
        smallest, largest = self.crop_scale
        if not 0 < smallest <= largest <= 1:
            raise FinetuneError(f"crop_scale is two shares, the smaller one first, not {self.crop_scale!r}")
        narrow, wide = self.crop_ratio
        if not 0 < narrow <= wide < math.inf:
            raise FinetuneError(f"crop_ratio is two ratios, the smaller one first, not {self.crop_ratio!r}")
        if self.aa and self.aa.partition("-")[0] not in _AA:
            raise FinetuneError(
                f"aa is timm's text such as 'rand-m9-mstd0.5', and begins with one of {', '.join(_AA)}, not {self.aa!r}"
            )

    def __repr__(self) -> str:
        chosen = (f"{name}={value!r}" for name, value in vars(self).items() if value != getattr(Augmentation, name))
        return f"Augmentation({', '.join(chosen)})"

    @property
    def crops(self) -> bool:
        """Whether RandomResizedCrop cuts."""
        return self.crop_scale != (1.0, 1.0)

    @property
    def moves(self) -> bool:
        """Whether an image is turned, zoomed, sheared or shifted."""
        return any((self.rotation, self.zoom, self.shear, self.shift))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return bool(self.mixup or self.cutmix) and self.mix_prob > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "float": ("a number", _is_number),
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "tuple[float, float]": (
        "two numbers", lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))
    ),
}  # fmt: skip
_RANGES: dict[str, tuple[float, float]] = {
    "hflip": (0, 1), "vflip": (0, 1), "rotation": (0, 180), "zoom": (0, 0.9), "shear": (0, 80), "shift": (0, 1),
    "brightness": (0, 1), "contrast": (0, 1), "saturation": (0, 1), "hue": (0, 0.5), "channel_shift": (0, 1),
    "reprob": (0, 1), "mixup": (0, 1e6), "cutmix": (0, 1e6), "mix_prob": (0, 1),
    "mixup_off_epoch": (0, 1e9),
}  # fmt: skip

PRESETS: Mapping[str, Augmentation] = MappingProxyType(
    {
        "none": Augmentation(),
        "light": Augmentation(crop_scale=(0.5, 1.0), hflip=0.5),
        "medium": Augmentation(
            crop_scale=(0.25, 1.0), hflip=0.5, rotation=10.0, brightness=0.2, contrast=0.2, saturation=0.2
        ),
        "heavy": Augmentation(
            crop_scale=(0.08, 1.0), hflip=0.5, aa="rand-m9-mstd0.5", reprob=0.25, mixup=0.2, cutmix=1.0
        ),
    }
)
