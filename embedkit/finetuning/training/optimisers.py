"""Optimisers: every block of the body at its own learning rate, the head at another."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from embedkit.backbones import import_timm
from embedkit.errors import FinetuneError
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.training.checkpoints import pack_optimiser

if TYPE_CHECKING:
    from embedkit.finetuning.blocks import Block
    from embedkit.finetuning.trainee import Trainee

_TRIAL = ((4,), (4, 6), (4, 2, 3, 3))  # Shapes of a bias, of a layer's weights and of a convolution's.
_ON_ACCELERATORS = ("bnb", "fused")  # How optimisers are called that work nowhere else.


def parameter_groups(
    trainee: Trainee, blocks: Sequence[Block], recipe: Recipe, criterion: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Return the groups that an optimiser is made of, from the first block to the head.

    Parameters
    ----------
    trainee : Trainee
        The network and its head.
    blocks : sequence of Block
        Of the network, from its input to its end.
    recipe : Recipe
        Its `body_lr`, `layer_decay` (not from scratch), `head_lr` and `weight_decay`.
    criterion : nn.Module, optional
        A loss, whose parameters learn like the head's.

    Returns
    -------
    list of dict
        With ``params``, ``name``, ``base_lr`` (what the schedule multiplies), ``lr`` and ``weight_decay``. A block has
        two: what decays, and what does not.

    Notes
    -----
    A block's rate is ``body_lr * layer_decay ** depth``, where the depth of the last block is 0 (Howard and Ruder,
    ULMFiT, 2018). Biases, norms and all else of one dimension do not decay, nor what timm says must not, such as
    position embeddings.
    """
    named = dict(trainee.named_parameters())
    exempt = _never_decaying(trainee)
    decay = 1.0 if recipe.from_scratch else recipe.layer_decay  # Random blocks know nothing to be kept.
    rates = {
        name: (block.name, recipe.body_lr * decay ** (len(blocks) - 1 - place))
        for place, block in enumerate(blocks)
        for name in block.parameters
    }
    rates |= {f"head.{name}": ("head", recipe.head_lr) for name, _ in trainee.head.named_parameters()}
    # What the embedding does not depend on, such as a norm behind the pooling, is in no block and never learns.
    assert rates.keys() <= named.keys(), sorted(rates.keys() - named.keys())[:3]
    if criterion is not None:
        named |= {f"criterion.{name}": parameter for name, parameter in criterion.named_parameters()}
        rates |= {f"criterion.{name}": ("criterion", recipe.head_lr) for name, _ in criterion.named_parameters()}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, (block_name, rate) in rates.items():
        decays = named[name].ndim > 1 and name not in exempt
        group = groups.setdefault(
            (block_name, decays),
            {
                "params": [], "name": block_name, "lr": rate, "base_lr": rate,
                "weight_decay": recipe.weight_decay if decays else 0.0,
            },
        )  # fmt: skip
        group["params"].append(named[name])
    return list(groups.values())


def _never_decaying(trainee: Trainee) -> set[str]:
    found = set()
    for prefix, module in trainee.named_modules():
        if callable(names := getattr(module, "no_weight_decay", None)):
            found |= {f"{prefix}.{name}" for name in names()}
    return found


def make_optimiser(groups: list[dict[str, Any]], recipe: Recipe) -> Optimizer:
    """Return the optimiser that a recipe names.

    Parameters
    ----------
    groups : list of dict
        As `parameter_groups` makes them.
    recipe : Recipe
        Its `opt`, any name of ``timm.optim.list_optimizers()``, with ``lookahead_`` before it if you like, and its
        `momentum`, where the optimiser has one.

    Raises
    ------
    FinetuneError
        When there is no such optimiser here, or it cannot work with one backward pass an update.
    """
    check_optimiser(recipe)
    with _usable(recipe):
        return _created(groups, recipe)


def _created(groups: list[dict[str, Any]], recipe: Recipe) -> Optimizer:
    optimiser = import_module("timm.optim").create_optimizer_v2(
        groups, opt=recipe.opt, lr=recipe.head_lr, weight_decay=0.0, momentum=recipe.momentum
    )
    assert isinstance(optimiser, Optimizer)
    return optimiser


@contextmanager
def _usable(recipe: Recipe) -> Iterator[None]:
    """Name the optimiser where it cannot be made, such as one of another package, or where it cannot step."""
    try:
        yield
    except FinetuneError:
        raise
    except (ImportError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise FinetuneError(f"the optimiser {recipe.opt} cannot be used here: {error}; try adamw") from error


def check_optimiser(recipe: Recipe) -> None:
    """Refuse an optimiser that is none, before hours are spent on what it would continue.

    Parameters
    ----------
    recipe : Recipe
        Its `opt`.

    Raises
    ------
    FinetuneError
        When timm has no such optimiser, with the closest names, it needs second derivatives, or it cannot make a step
        here or be saved for a resumed run.
    """
    import_timm()
    optim = import_module("timm.optim")
    known: list[str] = optim.list_optimizers()
    name = recipe.opt.lower().removeprefix("lookahead_")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["sgd", "adamw", "rmsprop"]
        raise FinetuneError(f"no optimiser is called {recipe.opt!r}; timm's are many, such as {', '.join(near)}")
    if optim.get_optimizer_info(name).second_order:
        raise FinetuneError(f"{recipe.opt} needs derivatives of derivatives, which this loop does not make; try adamw")
    _try_out(recipe)


def _try_out(recipe: Recipe) -> None:
    """Let an optimiser make a step with small weights, and pack what it keeps, as after an epoch."""
    fast = recipe.opt.lower().removeprefix("lookahead_").startswith(_ON_ACCELERATORS)
    device = torch.device("cuda" if fast and torch.cuda.is_available() else "cpu")
    weights = [torch.linspace(-1, 1, math.prod(shape), device=device).reshape(shape) for shape in _TRIAL]
    with torch.random.fork_rng([]), warnings.catch_warnings(), _usable(recipe):
        warnings.simplefilter("ignore")  # The one that learns says it.
        groups = [
            {"params": [nn.Parameter(value)], "name": str(number), "base_lr": recipe.head_lr, "lr": recipe.head_lr}
            for number, value in enumerate(weights)
        ]
        optimiser = _created(groups, recipe)
        for group, value in zip(optimiser.param_groups, weights, strict=True):
            group["params"][0].grad = value.clone()
        optimiser.step()
        pack_optimiser(optimiser)


def set_rates(optimiser: Optimizer, factor: float) -> dict[str, float]:
    """Multiply every group's own learning rate with a factor, and return those of what learns, by the groups' names."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor
    learning = (group for group in optimiser.param_groups if any(each.requires_grad for each in group["params"]))
    return {group["name"]: group["lr"] for group in learning}
