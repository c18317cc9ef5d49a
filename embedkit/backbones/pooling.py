"""From the last feature map or tokens to one vector an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embedkit.errors import BackboneError

POOLS = ("default", "avg", "max", "cls", "flatten")


def pooled(model: nn.Module, pixels: Tensor, pool: str) -> Tensor:
    """Return embeddings of shape (b, d) for normalised pixels of shape (b, 3, h, w).

    ``default`` is the model as timm ends it without a classifier. The others work on `forward_features`: the last
    feature map (b, c, h, w), or the last tokens (b, t, d), where avg and max leave out class and register tokens.
    """
    if pool == "default":
        return _checked(model(pixels), 2)
    features = model.forward_features(pixels)  # type: ignore[operator]
    if isinstance(features, Tensor) and features.ndim == 4:
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        tokens, prefix = features.flatten(2).transpose(1, 2), 0  # (b, h*w, c)
    else:
        tokens = features = _checked(features, 3)
        prefix = int(getattr(model, "num_prefix_tokens", 0))
    if pool == "flatten":
        return features.flatten(1)
    if pool == "cls":
        if prefix == 0:
            raise BackboneError("this backbone has no class token; choose --pool avg or max, or its own (default)")
        return tokens[:, 0]
    return tokens[:, prefix:].mean(1) if pool == "avg" else tokens[:, prefix:].amax(1)


def _checked(output: object, ndim: int) -> Tensor:
    if isinstance(output, torch.Tensor) and output.ndim == ndim:
        return output
    found = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
    raise BackboneError(f"this backbone returns {found}; expected {ndim} dimensions: choose another --pool")
