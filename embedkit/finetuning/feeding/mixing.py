"""MixUp and CutMix: batches of images that are partly one another, and labels that say so."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from embedkit.finetuning.feeding.augmentation import Augmentation


def mix_batch(
    pixels: Tensor, codes: Tensor, classes: int, augmentation: Augmentation, random: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Mix the images of a batch with one another, where chance wants it.

    Parameters
    ----------
    pixels : Tensor of shape (b, 3, h, w)
        uint8 or floats. What CutMix changes, it changes in place.
    codes : Tensor of shape (b,)
        int64.
    classes : int
        How many there are.
    augmentation : Augmentation
        Its `mixup`, `cutmix` and `mix_prob`.
    random : numpy Generator
        What the chances are drawn from: one for the whole batch.

    Returns
    -------
    pixels : Tensor of shape (b, 3, h, w)
        Of the same type and layout.
    targets : Tensor of shape (b, c) or None
        float32, each row with the sum 1; None where nothing was mixed.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from embedkit.finetuning.feeding.augmentation import Augmentation
    >>> from embedkit.finetuning.feeding.mixing import mix_batch
    >>> photos, codes = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    >>> _, targets = mix_batch(photos, codes, 2, Augmentation(mixup=1.0), np.random.default_rng(0))
    >>> targets.sum(1)
    tensor([1., 1.])
    """
    kinds = [name for name in ("mixup", "cutmix") if getattr(augmentation, name)]
    if not kinds or len(codes) < 2 or random.random() >= augmentation.mix_prob:
        return pixels, None
    kind = kinds[random.integers(len(kinds))]
    alpha = getattr(augmentation, kind)
    share = float(random.beta(alpha, alpha))
    # Everybody's partner is the next one in a circle that is drawn: never oneself.
    circle = random.permutation(len(codes))
    partners = np.empty_like(circle)
    partners[circle] = np.roll(circle, 1)
    others = torch.from_numpy(partners)
    if kind == "mixup":
        pixels = _blended(pixels, pixels[others], share)
    else:
        box = draw_box(int(pixels.shape[2]), int(pixels.shape[3]), share, random)
        pixels, share = cut_box(pixels, others, box)
    return pixels, mixed_targets(codes, others, classes, share)


def draw_box(height: int, width: int, share: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the box that CutMix replaces, clipped at the borders.

    Parameters
    ----------
    height, width : int
        Of the crop.
    share : float
        Share of the area that would be kept if the box lay inside.
    random : numpy Generator
        What its centre is drawn from.

    Returns
    -------
    tuple of int
        Top, left, bottom and right; bottom and right are the first outside.

    Notes
    -----
    Yun et al., CutMix, 2019: the sides are those of the crop times sqrt(1 - share), the centre lies anywhere.
    """
    down, across = (round(side * (1 - share) ** 0.5) for side in (height, width))
    top, left = int(random.integers(height)) - down // 2, int(random.integers(width)) - across // 2
    return max(top, 0), max(left, 0), min(top + down, height), min(left + across, width)


def cut_box(pixels: Tensor, others: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, float]:
    """Replace a box of every image by what lies there in another one.

    Parameters
    ----------
    pixels : Tensor of shape (b, 3, h, w)
        Changed in place.
    others : Tensor of shape (b,)
        Whose pixels each image gets.
    box : tuple of int
        Top, left, bottom and right, inside of the crop.

    Returns
    -------
    pixels : Tensor of shape (b, 3, h, w)
    share : float
        Share of the area that was kept, which is the weight of the image's own label.
    """
    top, left, bottom, right = box
    pixels[:, :, top:bottom, left:right] = pixels[others, :, top:bottom, left:right]
    return pixels, 1 - (bottom - top) * (right - left) / (pixels.shape[2] * pixels.shape[3])


def mixed_targets(codes: Tensor, others: Tensor, classes: int, share: float) -> Tensor:
    """Return targets of shape (b, c) that give a share to each image's own class, and the rest to its partner's."""
    own = functional.one_hot(codes, classes).float()
    return share * own + (1 - share) * own[others]


def _blended(pixels: Tensor, partners: Tensor, share: float) -> Tensor:
    """Return weighted sums; those of whole numbers are rounded."""
    if pixels.is_floating_point():
        return torch.lerp(partners, pixels, share)
    return torch.lerp(partners.float(), pixels.float(), share).round_().to(pixels.dtype)
