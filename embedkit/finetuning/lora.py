"""Low-rank adapters: small matrices that learn beside frozen weights, and are worked into them at the end."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import torch
from torch import nn

from embedkit.backbones.network import Network
from embedkit.errors import FinetuneError, MissingExtraError

_SCALE = 2  # alpha / rank: the update counts twice, as in the paper's code for most tasks.


def add_adapters(network: Network, rank: int, *, seed: int = 0) -> None:
    """Put an adapter beside every linear layer of a transformer.

    The network answers as before: one of an adapter's two matrices is zero at first.

    Parameters
    ----------
    network : Network
        Is changed.
    rank : int
        Of the adapters.
    seed : int, default 0
        Draws the other matrix.

    Raises
    ------
    FinetuneError
        When the network has no linear layers, as convolutional ones mostly do.
    MissingExtraError
        Without peft.

    Notes
    -----
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021: W x becomes W x + (alpha / r) B A x, with A of
    shape (r, d_in) and B of (d_out, r).
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora")
    layers = [name for name, module in network.model.named_modules() if type(module) is nn.Linear]
    if not layers:
        raise FinetuneError("adapters go beside linear layers, and this backbone has none: lora is for transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of libraries that peft imports and we do not use.
        from peft import LoraConfig, inject_adapter_in_model
    config = LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=layers)
    device = network.scale.device
    network.cpu()  # Where the same seed draws the same numbers on every machine.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, network.model)
    network.to(device)


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def merged(network: Network) -> nn.Module:
    """Return a network's model with its adapters worked into the weights: a plain timm model again.

    Parameters
    ----------
    network : Network
        It is left as it is.

    Returns
    -------
    nn.Module
        A copy, or the network's own model where it has no adapters.
    """
    if not any(is_adapter(name) for name, _ in network.named_parameters()):
        return network.model
    model = copy.deepcopy(network.model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    return model
