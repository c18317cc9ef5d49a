"""From feature maps or tokens to one vector an image."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from embedkit.errors import BackboneError

POOLS = ("default", "avg", "max", "gem", "cls", "flatten", "none")
_GEM_POWER, _GEM_FLOOR = 3.0, 1e-6  # Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation, 2018.


def whole_name(model: nn.Module, pool: str) -> str:
    """Return what a pooling is called in full: POOL, or MODULE:POOL for one inside the network.

    MODULE may also be the number of one of timm's feature levels, such as -1 for the last, and avg may be left out.

    Raises
    ------
    BackboneError
        When there is no such pooling, or no such level.
    """
    if pool in POOLS:
        return pool
    module, colon, kind = pool.rpartition(":") if ":" in pool else (pool, ":", "avg")
    if kind not in POOLS or kind == "default" or not module:
        raise BackboneError(
            f"unknown pooling {pool!r}; choose one of {', '.join(POOLS)}, or MODULE:POOL such as layer3:avg"
        )
    if module.removeprefix("-").isdecimal():
        levels = [level["module"] for level in getattr(model, "feature_info", [])]
        if not -len(levels) <= int(module) < len(levels):
            raise BackboneError(f"this backbone has {len(levels)} feature levels, and none is number {module}")
        module = levels[int(module)]
    elif ":" not in pool and module not in dict(model.named_modules()):
        raise BackboneError(
            f"unknown pooling {pool!r}; choose one of {', '.join(POOLS)}, or name a module, such as layer3:avg"
        )
    return f"{module}{colon}{kind}"


class Taps:
    """What modules inside a network return, kept apart for every thread that runs it."""

    def __init__(self, model: nn.Module, pools: Sequence[str]) -> None:
        self._seen = threading.local()
        for name in sorted({pool.rpartition(":")[0] for pool in pools} - {""}):
            _module(model, name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        seen = self._seen

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if getattr(seen, "outputs", None) is not None:  # Otherwise another network is using the same model.
                # A copy, because the next module may work in place.
                seen.outputs[name] = output.clone() if isinstance(output, Tensor) else output

        return hook

    @contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        """Give the outputs of the modules by their names, once the network has run."""
        outputs = self._seen.outputs = {}
        try:
            yield outputs
        finally:
            self._seen.outputs = None


def pooled(model: nn.Module, pixels: Tensor, pools: Sequence[str], taps: Taps) -> list[Tensor]:
    """Return embeddings of shape (b, d), one for each pooling, for normalised pixels of shape (b, 3, h, w).

    ``default`` is the model as timm ends it without a classifier. The others work on `forward_features`, or on what
    the module before the colon returns: a feature map (b, c, h, w), or tokens (b, t, d), where avg and max leave out
    class and register tokens. ``flatten`` is all of it in one row, ``none`` the tokens alone, or the positions of a
    feature map, row by row, one behind the other. The network runs once for all of them.
    """
    with taps.open() as seen:
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
            # In float32: the cubes of gem do not fit into half of the bits.
            output = seen[module] if module else features
            layout = getattr(_module(model, module) if module else model, "output_fmt", None)
            layout = str(layout or getattr(model, "output_fmt", "NCHW"))
            found.append(_pool(model, output.float() if isinstance(output, Tensor) else output, layout, kind))
    return found


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in model.named_modules() if known and known.count(".") <= name.count(".")]
        raise BackboneError(
            f"this backbone has no module {name!r}; it has {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
        ) from None


def _pool(model: nn.Module, output: Any, layout: str, kind: str) -> Tensor:
    if isinstance(output, Tensor) and output.ndim == 4:
        features = output
        if layout.endswith("NHWC"):
            features = features.permute(0, 3, 1, 2)
        tokens, prefix = features.flatten(2).transpose(1, 2), 0  # (b, h*w, c)
    else:
        tokens = features = _checked(output, 3)
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
        if tokens.shape[1] == patches:
            prefix = 0  # What stands before the class token joins them.
    if kind == "flatten":
        return features.flatten(1)
    if kind == "none":
        return tokens[:, prefix:].flatten(1)
    if kind == "gem":  # (mean of x^p)^(1/p): between avg (p = 1) and max (p = infinity).
        powers = tokens[:, prefix:].clamp(min=_GEM_FLOOR).pow(_GEM_POWER)
        return powers.mean(1).pow(1 / _GEM_POWER)
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
