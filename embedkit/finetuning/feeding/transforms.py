"""Training crops: an image as the evaluation sees it, varied by chance."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from embedkit.backbones import import_timm
from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.feeding.geometry import View, draw_view, enough_for, take_view
from embedkit.finetuning.feeding.policies import policy_of
from embedkit.images import MAX_PIXELS, read_crop, read_scaled
from embedkit.spec import Preprocessing

Pixels = npt.NDArray[np.uint8]

_ERASED_AREA = (0.02, 1 / 3)  # Smallest and largest share of the crop, and the ratio of the sides, as in the paper.
_ERASED_RATIO = 0.3
_TRIES = 10


def read_variant(
    source: Any,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    random: np.random.Generator,
    *,
    id: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Read an image and return one variant of its crop.

    Parameters
    ----------
    source : bytes, Region or array
        As for `embedkit.images.read_crop`.
    preprocessing : Preprocessing
        How the backbone's images become pixels.
    augmentation : Augmentation
        How they are varied. One that varies nothing gives the crop of the evaluation, bit for bit.
    random : numpy Generator
        What the chances are drawn from.
    id : str, optional
        What an error calls the image.
    max_pixels : int, default 178956970
        Larger images are refused.

    Returns
    -------
    array of shape (h, w, 3)
        uint8, with (h, w) == `preprocessing.img_size`.

    Raises
    ------
    ImageError
        When it cannot be read.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit import Preprocessing
    >>> from embedkit.finetuning.feeding.augmentation import PRESETS
    >>> from embedkit.finetuning.feeding.transforms import read_variant
    >>> photo = np.zeros((48, 64, 3), dtype=np.uint8)
    >>> pixels = Preprocessing(img_size=(32, 32))
    >>> read_variant(photo, pixels, PRESETS["medium"], np.random.default_rng(0)).shape
    (32, 32, 3)
    """
    places, colours = random.spawn(2)
    if augmentation.crops or augmentation.moves:
        drawn: list[View] = []

        def enough(height: int, width: int) -> tuple[int, int]:
            if not drawn:  # Another decoder that takes over sees the same image.
                drawn.append(draw_view(height, width, preprocessing, augmentation, places))
            return enough_for(drawn[0], height, width, preprocessing)

        pixels = read_scaled(source, preprocessing, enough, id=id, max_pixels=max_pixels)
        crop = take_view(pixels, drawn[0], preprocessing)
    else:
        crop = read_crop(source, preprocessing, id=id, max_pixels=max_pixels)
        if places.random() < augmentation.hflip:
            crop = crop[:, ::-1]
        if places.random() < augmentation.vflip:
            crop = crop[::-1]
    return vary(crop, preprocessing, augmentation, colours)


def vary(crop: Pixels, preprocessing: Preprocessing, augmentation: Augmentation, random: np.random.Generator) -> Pixels:
    """Vary a crop by a policy, vary its colours, and erase a part of it.

    Parameters
    ----------
    crop : array of shape (h, w, 3)
        uint8; it is left as it is.
    preprocessing : Preprocessing
        Its `mean` and `std` are those of the noise in an erased part.
    augmentation : Augmentation
        What is done.
    random : numpy Generator
        What the chances are drawn from.
    """
    if augmentation.aa:
        crop = policy_of(augmentation.aa, preprocessing)(crop, random)
    if augmentation.brightness or augmentation.contrast or augmentation.saturation or augmentation.hue:
        crop = _jittered(crop, augmentation, random)
    if augmentation.channel_shift:
        most = 255 * augmentation.channel_shift
        shifts = np.rint(random.uniform(-most, most, 3)).astype(np.int16)
        crop = np.clip(crop + shifts, 0, 255).astype(np.uint8)
    if random.random() < augmentation.reprob:
        crop = _erased(crop, preprocessing, random)
    return crop


def _jittered(crop: Pixels, augmentation: Augmentation, random: np.random.Generator) -> Pixels:
    """Change brightness, contrast, saturation and hue in an order drawn by lot, as torchvision's ColorJitter does."""
    functions = _colour_functions()
    planes = torch.from_numpy(np.require(crop, requirements=["C", "W"])).permute(2, 0, 1)
    for name in random.permutation(("brightness", "contrast", "saturation", "hue")).tolist():
        most = getattr(augmentation, name)
        if most:
            amount = random.uniform(-most, most)
            planes = functions[name](planes, amount if name == "hue" else 1 + amount)
    return np.asarray(planes.permute(1, 2, 0).numpy())


@cache
def _colour_functions() -> dict[str, Any]:
    import_timm()  # It makes torchvision importable beside any torch.
    from torchvision.transforms.v2 import functional

    return {
        "brightness": functional.adjust_brightness, "contrast": functional.adjust_contrast,
        "saturation": functional.adjust_saturation, "hue": functional.adjust_hue,
    }  # fmt: skip


def _erased(crop: Pixels, preprocessing: Preprocessing, random: np.random.Generator) -> Pixels:
    """Replace a rectangle by noise with the mean and spread of pixels (Zhong et al., 2020)."""
    height, width = crop.shape[:2]
    for _ in range(_TRIES):
        area = height * width * random.uniform(*_ERASED_AREA)
        ratio = math.exp(random.uniform(math.log(_ERASED_RATIO), -math.log(_ERASED_RATIO)))
        down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < down < height and 0 < across < width:
            top, left = random.integers(height - down + 1), random.integers(width - across + 1)
            noise = random.standard_normal((down, across, 3), dtype=np.float32)
            mean, std = (255 * np.array(values, dtype=np.float32) for values in (preprocessing.mean, preprocessing.std))
            crop = np.array(crop)
            crop[top : top + down, left : left + across] = np.clip(np.rint(noise * std + mean), 0, 255)
            return crop
    return crop
