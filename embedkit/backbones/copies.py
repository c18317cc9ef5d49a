"""Copies of a backbone's network that may be trained, and what a folder must say so that the result loads again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from embedkit.backbones.loading import build_untrained, takes_size
from embedkit.backbones.network import Network
from embedkit.backbones.pooling import whole_name
from embedkit.errors import BackboneError
from embedkit.images import DECODERS
from embedkit.spec import EmbeddingSpec, Preprocessing

if TYPE_CHECKING:
    from embedkit.backbones.backbone import Backbone

_FEW_CHANNELS = 16  # Seen to fail with 2 to 8, and not with 16.


def trainable_network(backbone: Backbone, *, drop_path: float = 0.0) -> Network:
    """Return a copy of a backbone's network, from plain crops to its embedding, with weights that may learn.

    Parameters
    ----------
    backbone : Backbone
        Is left as it is.
    drop_path : float, default 0.0
        Chance that a residual branch is skipped while training, where the architecture has it.

    Returns
    -------
    Network
        In float32, on the backbone's device, in evaluation mode.

    Raises
    ------
    BackboneError
        When its architecture has no drop path.

    Examples
    --------
    >>> network = trainable_network(backbone)  # doctest: +SKIP
    >>> network(crops)[0].shape  # doctest: +SKIP
    torch.Size([32, 1280])
    """
    own, spec = backbone._passes.model, backbone.spec
    model = copy.deepcopy(own)
    if drop_path:
        model = build_untrained(spec.backbone, spec.arch_kwargs, spec.preprocessing.img_size, drop_path)
        try:
            model.load_state_dict(own.state_dict())
        except RuntimeError as error:
            raise BackboneError(f"{spec.backbone} is built otherwise with drop path: {error}") from error
    return _channels_last(Network(model.requires_grad_(True), spec.preprocessing, (spec.pool,)).to(backbone.device))


def fresh_network(
    arch: str,
    preprocessing: Preprocessing,
    *,
    pool: str = "default",
    arch_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    drop_path: float = 0.0,
) -> Network:
    """Return a network with timm's own random weights.

    Parameters
    ----------
    arch : str
        timm architecture, without a tag.
    preprocessing : Preprocessing
        Of the pixels that it is to see.
    pool : str, default "default"
        As for `Backbone.load`.
    arch_kwargs : mapping, optional
        Keyword arguments of the architecture.
    seed : int, default 0
        Draws the weights; the generators of the process are left as they are.
    drop_path : float, default 0.0
        As for `trainable_network`.

    Returns
    -------
    Network
        In float32, on the processor, in evaluation mode.

    Raises
    ------
    BackboneError
        When timm knows no such architecture, or it takes no such arguments.

    Examples
    --------
    >>> from embedkit.backbones.copies import fresh_network
    >>> from embedkit.spec import Preprocessing
    >>> network = fresh_network("test_resnet", Preprocessing(img_size=(64, 64)), seed=1)
    >>> len(network.pools)
    1
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_untrained(arch, arch_kwargs or {}, preprocessing.img_size, drop_path)
    return _channels_last(Network(model, preprocessing, (whole_name(model, pool),)))


def sidecar_values(spec: EmbeddingSpec, model: nn.Module) -> dict[str, Any]:
    """Return what a sidecar must say so that `Backbone.load` makes a backbone like this from the model's weights.

    Parameters
    ----------
    spec : EmbeddingSpec
        Of a backbone with the same architecture, preprocessing and pooling. Its weights do not matter.
    model : nn.Module
        timm's network, without its classifier; one that it has is a projection, and its output the embedding.

    Returns
    -------
    dict
        JSON values: "architecture", "model_args", "pretrained_cfg", "load_defaults", and "projected" where it is.
    """
    width = int(getattr(model, "num_classes", 0) or 0)
    pixels, own = spec.preprocessing, getattr(model, "pretrained_cfg", {})
    defaults = {
        "pool": spec.pool,
        "decode": next(name for name, decoder in DECODERS.items() if decoder == pixels.decoder),
        "exif": pixels.exif,
        "icc": pixels.icc,
        "truncated": pixels.truncated,
    }
    if takes_size(spec.backbone):
        defaults["img_size"] = list(pixels.img_size)
    return {
        "architecture": spec.backbone,
        "num_classes": width,
        "num_features": getattr(model, "num_features", spec.dim),
        "model_args": dict(spec.arch_kwargs),
        "pretrained_cfg": {
            "input_size": [3, *pixels.img_size],
            "fixed_input_size": takes_size(spec.backbone),
            "interpolation": pixels.interpolation,
            "crop_pct": pixels.crop_pct,
            "crop_mode": pixels.crop_mode,
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "num_classes": width,
            "first_conv": _plain(own.get("first_conv")),
            "classifier": _plain(own.get("classifier")),
            "license": _plain(own.get("license")),
        },
        "load_defaults": defaults,
        **({"projected": True} if width else {}),
    }


def timm_config(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm reads of a sidecar: its ``config.json``, for ``create_model("local-dir:FOLDER")``."""
    config = {name: value for name, value in sidecar.items() if name != "load_defaults"}
    size = sidecar["load_defaults"].get("img_size")
    return config if size is None else {**config, "model_args": {**config["model_args"], "img_size": size}}


def _channels_last(network: Network) -> Network:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _is_unsafe(module):
            module.register_forward_pre_hook(partial(_every_nth, module.stride))
            module.stride = (1, 1)
    return network.eval()


def _is_unsafe(convolution: nn.Conv2d) -> bool:
    """Whether oneDNN 3.12 (PyTorch 2.13) writes its weight's gradient beyond the memory for it.

    RepVGG and MobileOne begin with one. To take every n-th pixel first, with a stride of 1, is the same function.
    """
    strided = convolution.kernel_size == (1, 1) and convolution.stride != (1, 1) and not any(convolution.padding)
    return strided and convolution.in_channels < _FEW_CHANNELS


def _every_nth(stride: tuple[int, ...], module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0][:, :, :: stride[0], :: stride[1]],)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
