"""From feature maps or tokens to one vector an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from embedkit.errors import BackboneError

POOLS = ("default", "avg", "max", "cls", "flatten")


def check_pool(pool: str) -> None:
    """Raise BackboneError unless this names a pooling: POOL, or MODULE:POOL for one inside the network."""
    module, colon, kind = pool.rpartition(":")
    if kind not in POOLS or (colon and (kind == "default" or not module)):
        raise BackboneError(
            f"unknown pooling {pool!r}; choose one of {', '.join(POOLS)}, or MODULE:POOL such as layer3:avg"
        )


def pooled(model: nn.Module, pixels: Tensor, pools: Sequence[str]) -> list[Tensor]:
    """Return embeddings of shape (b, d), one for each pooling, for normalised pixels of shape (b, 3, h, w).

    ``default`` is the model as timm ends it without a classifier. The others work on `forward_features`, or on what
    the module before the colon returns: a feature map (b, c, h, w), or tokens (b, t, d), where avg and max leave out
    class and register tokens. The network runs once for all of them.
    """
    seen: dict[str, Any] = {}
    with ExitStack() as hooks:
        for module in {pool.rpartition(":")[0] for pool in pools} - {""}:
            hooks.callback(_module(model, module).register_forward_hook(_keep(seen, module)).remove)
        if all(pool == "default" or ":" in pool for pool in pools):
            features, ended = None, model(pixels)
        else:
            features = model.forward_features(pixels)  # type: ignore[operator]
            ended = model.forward_head(features) if "default" in pools else None  # type: ignore[operator]
    found = []
    for pool in pools:
        module, _, kind = pool.rpartition(":")
        if pool == "default":
            found.append(_checked(ended, 2))
        elif module and module not in seen:
            raise BackboneError(f"the module {module!r} of this backbone takes no part in embedding")
        else:
            found.append(_pool(model, seen[module] if module else features, kind))
    return found


def _keep(seen: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[name] = output

    return hook


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in model.named_modules() if known and known.count(".") <= name.count(".")]
        raise BackboneError(
            f"this backbone has no module {name!r}; it has {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
        ) from None


def _pool(model: nn.Module, output: Any, kind: str) -> Tensor:
    if isinstance(output, Tensor) and output.ndim == 4:
        features = output
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        tokens, prefix = features.flatten(2).transpose(1, 2), 0  # (b, h*w, c)
    else:
        tokens = features = _checked(output, 3)
        prefix = int(getattr(model, "num_prefix_tokens", 0))
    if kind == "flatten":
        return features.flatten(1)
    if kind == "cls":
        if prefix == 0:
            raise BackboneError("this backbone has no class token; choose --pool avg or max, or its own (default)")
        return tokens[:, 0]
    return tokens[:, prefix:].mean(1) if kind == "avg" else tokens[:, prefix:].amax(1)


def _checked(output: object, ndim: int) -> Tensor:
    if isinstance(output, torch.Tensor) and output.ndim == ndim:
        return output
    found = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
    raise BackboneError(f"this backbone returns {found}; expected {ndim} dimensions: choose another --pool")
