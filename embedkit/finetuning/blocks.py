"""Blocks: a network's parameters in the groups that timm sees in it, from the input to the output."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field

from embedkit.backbones import import_timm
from embedkit.errors import FinetuneError
from embedkit.finetuning.lora import is_adapter
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.trainee import Trainee
from embedkit.finetuning.training.losses import METRIC_LOSSES

_BODY = "network.model."
_NAMED = 3  # Parts of a block that its name has room for.


@dataclass(frozen=True)
class Block:
    """Parameters of a network that are frozen, thawed and slowed down together.

    Attributes
    ----------
    name : str
        The modules that they lie in, such as ``layer4.1`` or ``blocks.6.0 + conv_head + bn2``. Each is a pattern that
        names it.
    depth : int
        How many blocks lie between this one and the head; 0 for the last.
    parameters : tuple of str
        Names as in ``trainee.named_parameters()``.
    """

    name: str
    depth: int
    parameters: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class BlockState:
    """A row of the table of what learns: a block, or the head.

    Attributes
    ----------
    name : str
    frozen, trainable : int
        Numbers that stay as they are to the end, and numbers that learn.
    from_epoch : int
        The first epoch in which they learn; 0 for never.
    """

    name: str
    frozen: int
    trainable: int
    from_epoch: int


def blocks_of(trainee: Trainee) -> tuple[Block, ...]:
    """Return the blocks of a trainee's body, from the input to the output, without the head.

    They are the groups of timm's layer decay: a stem, then one block for each residual block or transformer layer. A
    norm behind the last one belongs to it. Only parameters that the embedding depends on are in them.

    Parameters
    ----------
    trainee : Trainee

    Returns
    -------
    tuple of Block

    Examples
    --------
    >>> [block.name for block in blocks_of(trainee)]  # doctest: +SKIP
    ['conv1 + bn1', 'layer1.0', 'layer2.0', 'layer3.0', 'layer4.0']
    """
    model = trainee.network.model
    names = [name.removeprefix(_BODY) for name in trainee.body]
    if hasattr(model, "group_matcher"):
        matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
        numbers: dict[str, int] = import_timm().models.group_parameters(model, matcher, reverse=True)
    else:  # Each child is a block.
        children = [name for name, _ in model.named_children()]
        numbers = {name: children.index(name.partition(".")[0]) + 1 if "." in name else 0 for name in names}
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(numbers[name], []).append(name)
    ordered = [groups[number] for number in sorted(groups)]
    if len(ordered) > 1 and all(trainee.get_parameter(_BODY + name).ndim <= 1 for name in ordered[-1]):
        norms = ordered.pop()
        ordered[-1] += norms
    named = zip(_names(ordered), ordered, strict=True)
    return tuple(
        Block(text, len(ordered) - place, tuple(_BODY + name for name in names))
        for place, (text, names) in enumerate(named, 1)
    )


def trainable_at(blocks: Sequence[Block], recipe: Recipe, epoch: int) -> frozenset[str]:
    """Return the names of the body's parameters that learn in an epoch.

    Parameters
    ----------
    blocks : sequence of Block
        As `blocks_of` returns them.
    recipe : Recipe
        Of which unfreeze, gradual and lora are read. ``gradual`` thaws the block next to the head first, and one more
        every so many epochs.
    epoch : int
        The first is 1.

    Returns
    -------
    frozenset of str

    Raises
    ------
    FinetuneError
        When ``unfreeze`` names nothing in these blocks.
    """
    thawed = (names for names, first in _thaws(blocks, recipe) if first <= epoch)
    return frozenset().union(*thawed)


def set_trainable(trainee: Trainee, blocks: Sequence[Block], recipe: Recipe, epoch: int) -> None:
    """Freeze and thaw a trainee's parts for an epoch, the first of which is 1, and set it to training mode."""
    trainee.set_trainable(trainable_at(blocks, recipe, epoch))
    trainee.train()


def list_states(trainee: Trainee, recipe: Recipe) -> list[BlockState]:
    """Return what learns and what does not, block by block, with the head as the last row.

    Parameters
    ----------
    trainee : Trainee
        Is left as it is.
    recipe : Recipe
        As for `trainable_at`.

    Returns
    -------
    list of BlockState
        Parameters that the embedding does not depend on are not counted.

    Examples
    --------
    >>> for row in list_states(trainee, recipe):  # doctest: +SKIP
    ...     print(row.name, row.frozen, row.trainable)
    """
    blocks = blocks_of(trainee)
    sizes = {name: parameter.numel() for name, parameter in trainee.named_parameters()}
    rows = []
    for block, (names, first) in zip(blocks, _thaws(blocks, recipe), strict=True):
        whole = sum(sizes[name] for name in block.parameters)
        learns = bool(names) and first <= recipe.epochs
        trainable = sum(sizes[name] for name in names) if learns else 0
        rows.append(BlockState(block.name, whole - trainable, trainable, first if learns else 0))
    head = sum(size for name, size in sizes.items() if name.startswith("head."))
    if recipe.loss in METRIC_LOSSES:  # One is fitted afterwards, to what the network then says.
        return [*rows, BlockState("head", head, 0, 0)]
    return [*rows, BlockState("head", 0, head, 1)]


def _thaws(blocks: Sequence[Block], recipe: Recipe) -> list[tuple[frozenset[str], int]]:
    """Return what learns of each block, which may be nothing, and from which epoch on."""
    chosen = [_chosen(block, recipe) for block in blocks]
    lost = None if any(chosen) or recipe.unfreeze == "none" else recipe.unfreeze
    for pattern in _patterns(recipe):
        if not any(_matches(name.removeprefix(_BODY), pattern) for block in blocks for name in block.parameters):
            lost = pattern
    if lost is not None:
        raise FinetuneError(
            f"--unfreeze {lost} names nothing in this backbone; its blocks are: "
            f"{', '.join(block.name for block in blocks)}; a pattern is the name of a module or parameter, and * "
            "stands for anything, such as blocks.5* or *norm*"
        )
    # Blocks of which nothing learns take no turn.
    return [(names, 1 + recipe.gradual * sum(map(bool, chosen[place + 1 :]))) for place, names in enumerate(chosen)]


def _chosen(block: Block, recipe: Recipe) -> frozenset[str]:
    """Return the parameters of a block that a recipe unfreezes at some time."""
    unfreeze, last = recipe.unfreeze, recipe.unfreeze.removeprefix("last-")
    names = [name for name in block.parameters if not recipe.lora or is_adapter(name)]
    if unfreeze == "none" or (last != unfreeze and last.isdecimal() and block.depth >= int(last)):
        return frozenset()
    if unfreeze == "all" or (last != unfreeze and last.isdecimal()):
        return frozenset(names)
    patterns = _patterns(recipe)
    return frozenset(name for name in names if any(_matches(name.removeprefix(_BODY), each) for each in patterns))


def _patterns(recipe: Recipe) -> list[str]:
    """Return the patterns of names that a recipe unfreezes by."""
    if recipe.unfreeze in ("all", "none") or recipe.unfreeze.startswith("last-"):
        return []
    return [pattern.strip() for pattern in recipe.unfreeze.split(",")]


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern names a parameter or a module that it lies in."""
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in _prefixes(name))


def _names(groups: Sequence[Sequence[str]]) -> list[str]:
    """Return the modules that make up each group: the largest in which nothing of another group lies."""
    owners: dict[str, set[int]] = {}
    for number, names in enumerate(groups):
        for name in names:
            for prefix in _prefixes(name):
                owners.setdefault(prefix, set()).add(number)
    texts = []
    for names in groups:
        modules: dict[str, list[str]] = {}
        for name in names:
            whole = next((prefix for prefix in _prefixes(name) if len(owners[prefix]) == 1), name)
            modules.setdefault(whole, []).append(name)
        found = [_shared(inside) for inside in modules.values()]
        more = f" + {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        texts.append(" + ".join(found[:_NAMED]) + more)
    return texts


def _shared(names: Sequence[str]) -> str:
    """Return the innermost module in which all of these parameters lie, or the one parameter of a network's own."""
    paths = [name.split(".") for name in names]
    low, high = min(paths), max(paths)  # All others lie between these two.
    length = next((place for place, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low) - 1)
    return ".".join(low[: max(1, length)])


def _prefixes(name: str) -> list[str]:
    """Return the modules that a parameter lies in, from the outermost, and itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
