"""How training images are varied."""

from __future__ import annotations

from dataclasses import dataclass


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
        The epoch from which nothing is mixed any more; 0 mixes to the end.

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
