"""Trainee: a backbone's network with a new head, whose parts can be frozen."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from embedkit.backbones import Backbone
from embedkit.backbones.copies import fresh_network, trainable_network
from embedkit.backbones.network import Network
from embedkit.errors import FinetuneError
from embedkit.finetuning.layers import make_layers
from embedkit.finetuning.lora import add_adapters
from embedkit.finetuning.recipe import Recipe


class Trainee(nn.Module):
    """A network that is being adapted, and a head upon its embedding.

    Everything but the head is frozen at first: `set_trainable` says otherwise.

    Parameters
    ----------
    network : Network
        With one pooling.
    head : nn.Module
        From embeddings (b, d) to (b, c): logits, or whatever a loss wants.
    freeze_norm : bool, default True
        Whether the running statistics of batch normalisation stay as they are, those of unfrozen parts too.

    Attributes
    ----------
    network, head, freeze_norm
        As passed in.
    body : tuple of str
        Names of the network's parameters that the embedding depends on, from input to output. The others, such as
        layers behind a pooling inside the network, are never trained and never counted.
    """

    def __init__(self, network: Network, head: nn.Module, *, freeze_norm: bool = True) -> None:
        super().__init__()
        self.network, self.head, self.freeze_norm = network, head, freeze_norm
        self.body = _taking_part(network)
        self._training_modules: frozenset[str] = frozenset()
        self.set_trainable(())

    def embed(self, crops: Tensor) -> Tensor:
        """Return embeddings of shape (b, d) for crops (b, 3, h, w), uint8 or float of the same range."""
        embeddings: Tensor = self.network(crops)[0]
        return embeddings

    def forward(self, crops: Tensor) -> Tensor:
        """Return what the head says, of shape (b, c), for crops (b, 3, h, w)."""
        answers: Tensor = self.head(self.embed(crops))
        return answers

    def set_trainable(self, names: Collection[str]) -> None:
        """Make these parameters of the body trainable, and freeze all others of it; the head is always trainable.

        Frozen parts are in evaluation mode from now on, whatever `train` says: their batch normalisation keeps its
        statistics, and nothing in them is dropped by chance.

        Parameters
        ----------
        names : collection of str
            Some of `body`.
        """
        wanted = set(names)
        assert wanted <= set(self.body), wanted - set(self.body)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in wanted or name.startswith("head."))
        self._training_modules = _modules_of(self.network, wanted)
        self.train(self.training)

    def train(self, mode: bool = True) -> Trainee:
        """Set the mode of the parts that are not frozen; frozen ones stay in evaluation mode."""
        super().train(mode)
        for name, module in self.network.named_modules(prefix="network"):
            frozen = name not in self._training_modules or (self.freeze_norm and isinstance(module, _BatchNorm))
            module.training = mode and not frozen
        return self


def make_trainee(backbone: Backbone, classes: int, recipe: Recipe) -> Trainee:
    """Return a copy of a backbone's network with a new head, as a recipe wants them.

    Parameters
    ----------
    backbone : Backbone
        Is left as it is.
    classes : int
        What the head tells apart.
    recipe : Recipe
        Of which head, from_scratch, drop_path, lora, freeze_norm and seed are read.

    Returns
    -------
    Trainee
        On the backbone's device, in evaluation mode, with a frozen body.

    Raises
    ------
    FinetuneError
        When the recipe asks for what this backbone cannot do.

    Examples
    --------
    >>> trainee = make_trainee(backbone, 5, Recipe(head="mlp:512"))  # doctest: +SKIP
    >>> trainee(crops).shape  # doctest: +SKIP
    torch.Size([32, 5])
    """
    spec = backbone.spec
    if spec.views or spec.precision != "float32":
        raise FinetuneError(
            "a backbone is adapted on plain views in fp32: leave --tta, --scales and --precision out "
            "(in Python views= and precision=)"
        )
    if recipe.from_scratch:
        network = fresh_network(
            spec.backbone, spec.preprocessing, pool=spec.pool, arch_kwargs=spec.arch_kwargs, seed=recipe.seed,
            drop_path=recipe.drop_path,
        )  # fmt: skip
    else:
        network = trainable_network(backbone, drop_path=recipe.drop_path)
    if recipe.lora:
        add_adapters(network, recipe.lora, seed=recipe.seed)
    head = make_layers(recipe.head, backbone.dim, classes, seed=recipe.seed)
    # Random weights come with no statistics that were worth keeping.
    trainee = Trainee(network, head, freeze_norm=recipe.freeze_norm and not recipe.from_scratch)
    return trainee.to(backbone.device).eval()


def check_statistics(network: Network, recipe: Recipe) -> None:
    """Refuse batches of a single image where batch normalisation is to learn its statistics.

    Parameters
    ----------
    network : Network
        What is to learn.
    recipe : Recipe
        Of which batch_size, unfreeze, freeze_norm and from_scratch are read.

    Raises
    ------
    FinetuneError
        When there is no such thing as those statistics.
    """
    learned = recipe.from_scratch or (not recipe.freeze_norm and recipe.unfreeze != "none")
    if recipe.batch_size == 1 and learned and any(isinstance(module, _BatchNorm) for module in network.modules()):
        other = "" if recipe.from_scratch else ", or --freeze-norm"
        raise FinetuneError(
            f"batch normalisation learns no statistics of a single image; choose a --batch-size of 2 or more{other}"
        )


def _taking_part(network: Network) -> tuple[str, ...]:
    """Return the names of the parameters that a gradient reaches from the embedding of one picture."""
    before = [parameter.requires_grad for parameter in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    height, width = network.pixels.img_size
    crop = torch.arange(3 * height * width, device=network.scale.device).remainder(256).to(torch.uint8)
    try:
        network.eval().requires_grad_(True)
        with torch.enable_grad():
            embedding = network(crop.view(1, 3, height, width))[0]
        named = dict(network.named_parameters(prefix="network"))
        found = torch.autograd.grad(embedding.sum(), list(named.values()), allow_unused=True)
    finally:
        for parameter, wanted in zip(network.parameters(), before, strict=True):
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode
    return tuple(name for name, gradient in zip(named, found, strict=True) if gradient is not None)


def _modules_of(network: Network, names: Collection[str]) -> frozenset[str]:
    """Return the names of the modules that hold one of these parameters somewhere within, or belong to one that does.

    A module without parameters, such as a dropout, belongs to the module before it in the same parent: it works on
    what that one returns.
    """
    holders = {name.rpartition(".")[0] for name in names}
    live = {
        ".".join(parts[:end]) for parts in (name.split(".") for name in holders) for end in range(1, len(parts) + 1)
    }
    before: dict[str, bool] = {}
    for name, module in network.named_modules(prefix="network"):
        parent = name.rpartition(".")[0]
        bare = next(module.parameters(), None) is None
        if bare and before.get(parent, parent in live):
            live.add(name)
        before[parent] = name in live
    return frozenset(live)
