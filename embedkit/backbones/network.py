"""From uint8 crops to embeddings, as one module that an engine may run, freeze or compile."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from embedkit.backbones.pooling import Taps, pooled
from embedkit.spec import Preprocessing

if TYPE_CHECKING:
    from embedkit.backbones.backbone import Backbone


class Network(nn.Module):
    """A timm network with the normalisation before it and the poolings behind it.

    Parameters
    ----------
    model : nn.Module
        Without its classifier.
    preprocessing : Preprocessing
        Its `mean` and `std`, applied in float32 whatever the model computes in.
    pools : sequence of str
        As `pooled` takes them.
    views : sequence of str
        As `check_views` takes them; the embeddings of all views of an image are averaged.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, pools: Sequence[str], views: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.model, self.preprocessing, self.pools, self.views = model, preprocessing, tuple(pools), tuple(views)
        self._taps = Taps(model, self.pools)
        self.engines: dict[tuple[Any, ...], Any] = {}
        self.copies: dict[str, Network] = {}  # In other precisions.
        self.pixels = whole_size(preprocessing, views)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", (1 / (255 * std)).expand(3, 1, 1).contiguous(), persistent=False)
        self.register_buffer("shift", (-mean / std).expand(3, 1, 1).contiguous(), persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        """Copy the model, and nothing that was built or is being collected for the original."""
        network = Network(copy.deepcopy(self.model, memo), self.preprocessing, self.pools, self.views)
        memo[id(self)] = network.to(self.scale.device)
        network.training = self.training
        return network

    def forward(self, crops: Tensor) -> tuple[Tensor, ...]:
        """Return float32 embeddings of shape (b, d), one for each pooling, for crops (b, 3, h, w) of uint8.

        With the view ``five-crop`` they are larger by 1 / crop_pct: the centre of the resized image.
        """
        whole = torch.addcmul(self.shift, crops.float(), self.scale)
        x = _cut(whole, self.preprocessing.img_size, "center")
        dtype = next((weight.dtype for weight in self.model.parameters()), x.dtype)
        views = [x, *(view for name in self.views for view in _view(whole, x, name))]
        found = [pooled(self.model, view.to(dtype), self.pools, self._taps) for view in views]
        if not self.views:
            return tuple(embeddings.float() for embeddings in found[0])
        return tuple(torch.stack([each.float() for each in views]).mean(0) for views in zip(*found, strict=True))


def check_views(views: Sequence[str]) -> None:
    """Raise ValueError unless these are views.

    ``flip`` is the mirror image, ``five-crop`` the four corners beside the centre, and ``scale:S`` the crop resized.
    """
    for view in views:
        kind, _, value = view.partition(":")
        try:
            good = view in ("flip", "five-crop") or (kind == "scale" and 0.1 <= float(value) <= 4)
        except ValueError:
            good = False
        if not good:
            raise ValueError(
                f"{view!r} is no view; choose flip, five-crop, or scale:S with S between 0.1 and 4, such as scale:0.7"
            )
    if len(set(views)) < len(views):
        raise ValueError(f"the same view twice: {', '.join(views)}")


def whole_size(preprocessing: Preprocessing, views: Sequence[str]) -> Preprocessing:
    """Return the preprocessing of the pixels that these views need: for ``five-crop`` what lies around the crop too."""
    if "five-crop" not in views:
        return preprocessing
    height, width = (math.floor(side / preprocessing.crop_pct) for side in preprocessing.img_size)
    return replace(preprocessing, img_size=(height, width), crop_pct=1.0)


def _view(whole: Tensor, x: Tensor, name: str) -> list[Tensor]:
    if name == "flip":
        return [x.flip(-1)]
    if name == "five-crop":
        size = (int(x.shape[2]), int(x.shape[3]))
        return [_cut(whole, size, corner) for corner in ("top left", "top right", "bottom left", "bottom right")]
    side = [round(int(length) * float(name.partition(":")[2])) for length in x.shape[2:]]
    return [nn.functional.interpolate(x, size=side, mode="bilinear", antialias=True)]


def _cut(x: Tensor, size: tuple[int, int], where: str) -> Tensor:
    down, right = int(x.shape[2]) - size[0], int(x.shape[3]) - size[1]
    if (down, right) == (0, 0):
        return x
    top = round(down / 2) if where == "center" else down * where.startswith("bottom")
    left = round(right / 2) if where == "center" else right * where.endswith("right")
    return x[:, :, top : top + size[0], left : left + size[1]]


def count_parameters(backbone: Backbone) -> int:
    """Return how many trained numbers a backbone has, without the classifier that it was trained with."""
    return sum(parameter.numel() for parameter in backbone._passes.model.parameters())
