"""The forward passes of one network: with several poolings, each built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from embedkit.backbones.choosing import built
from embedkit.backbones.engines import Engine
from embedkit.backbones.network import Network
from embedkit.backbones.pooling import whole_name
from embedkit.errors import BackboneError
from embedkit.spec import Preprocessing


@dataclass(frozen=True)
class Passes:
    """What a network's passes have in common, and those that were built already.

    Attributes
    ----------
    model : nn.Module
        timm's network, on its device.
    device : torch.device
    preprocessing : Preprocessing
        Of what the network sees.
    crop_size : tuple of int
        Height and width of what is read, which the views may crop once more.
    views : tuple of str
    precision : str
    """

    model: nn.Module
    device: torch.device
    preprocessing: Preprocessing
    crop_size: tuple[int, int]
    views: tuple[str, ...]
    precision: str
    _networks: dict[tuple[str, ...], Network] = field(default_factory=dict)
    _widths: dict[str, tuple[int, int]] = field(default_factory=dict)

    def network(self, pools: Sequence[str]) -> Network:
        """Return the network that ends in some poolings."""
        whole = tuple(whole_name(self.model, pool) for pool in pools)
        if whole not in self._networks:
            network = Network(self.model, self.preprocessing, whole, self.views)
            self._networks[whole] = network.to(self.device).eval()
        return self._networks[whole]

    def eager(self, pools: Sequence[str]) -> Engine:
        """Return the engine that needs no choosing."""
        return built(self.network(pools), "eager", 32, self.precision)

    def first_width(self, pool: str, arch: str) -> tuple[int, int]:
        """Return what `width` returns, or say that this architecture takes no images of this size."""
        try:
            return self.width(pool)
        except (RuntimeError, AssertionError) as error:
            height, width = self.preprocessing.img_size
            raise BackboneError(f"{arch} cannot embed {height} x {width} pixels: {error}") from error

    def width(self, pool: str) -> tuple[int, int]:
        """Return the width of a row, and how many tokens it holds when it is not pooled."""
        if pool not in self._widths:
            blank = np.zeros((*self.crop_size, 3), dtype=np.uint8)
            dim = self.eager([pool])([blank])[0].shape[1]
            module, colon, kind = pool.rpartition(":")
            self._widths[pool] = dim, dim // self.width(f"{module}{colon}avg")[0] if kind == "none" else 0
        return self._widths[pool]


def finite(found: Sequence[npt.NDArray[np.float32]], name: str) -> Sequence[npt.NDArray[np.float32]]:
    """Return embeddings, none of which may be infinite or NaN."""
    if not all(np.isfinite(embeddings).all() for embeddings in found):
        raise BackboneError(f"{name} returned infinities or NaN for real pixels; are these its weights, undamaged?")
    return found
