"""A run in the making: what it holds while it trains, and how that is kept on disk and found again."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from embedkit.errors import FinetuneError
from embedkit.finetuning.blocks import Block
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.training.averages import Average
from embedkit.finetuning.training.checkpoints import (
    LAST,
    best_path,
    check_identity,
    load_state,
    pack_optimiser,
    remove_leftovers,
    save_state,
    state_folder,
    unpack_optimiser,
)
from embedkit.finetuning.training.distributed import World
from embedkit.finetuning.training.history import History, write_epochs
from embedkit.finetuning.training.optimisers import make_optimiser, parameter_groups
from embedkit.finetuning.training.schedules import Plateau
from embedkit.finetuning.training.steps import is_out_of_memory

if TYPE_CHECKING:
    from embedkit.finetuning.trainee import Trainee

log = logging.getLogger("embedkit")

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_STEPS = 6  # After a restore: within them an optimiser has looked at all that it keeps, lookahead's in the sixth.


@dataclass
class Run:
    """What a run holds while it trains."""

    trainee: Trainee
    criterion: nn.Module
    recipe: Recipe
    blocks: Sequence[Block]
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    world: World
    device: torch.device
    state: Path
    identity: dict[str, Any]
    at_once: int  # Images that pass through the network together; fewer once memory ran out.
    plateau: Plateau = field(default_factory=Plateau)
    best_score: float = -math.inf
    history: History = field(default_factory=History)
    validating: float = 0.0  # Seconds of the last validation.

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that an optimiser may move."""
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]

    def context(self) -> AbstractContextManager[object]:
        """Open the precision that the network computes in."""
        dtype = _HALF.get(self.recipe.amp_dtype)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


def identity_of(identity: Mapping[str, Any], recipe: Recipe, world: World) -> dict[str, Any]:
    """Return all that must agree for a run to be resumed."""
    return {**identity, "recipe": asdict(recipe), "processes": world.size}


def begin(
    trainee: Trainee, recipe: Recipe, folder: Path, blocks: Sequence[Block], criterion: nn.Module,
    identity: Mapping[str, Any], world: World, device: torch.device,
) -> Run:  # fmt: skip
    """Return a run that is ready to train, after the epochs that are on disk already."""
    trainee.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    criterion.to(device)
    if recipe.grad_checkpointing:
        _checkpoint_gradients(trainee)
    optimiser = make_optimiser(parameter_groups(trainee, blocks, recipe, criterion), recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp_dtype == "fp16")
    state = state_folder(folder)
    run = Run(
        trainee, criterion, recipe, blocks, optimiser, scaler, None, world, device, state,
        identity_of(identity, recipe, world), recipe.batch_size,
    )  # fmt: skip
    state.mkdir(parents=True, exist_ok=True)
    world.share_values(trainee)
    world.share_values(criterion)
    if recipe.model_ema:
        run.average = Average(trainee, recipe.model_ema)
    if (state / LAST).exists():
        _restore(run)
        if world.first:  # A kill may have come between the state and its table.
            write_epochs(folder / "epochs.csv", run.history.epochs)
        log.info("goes on after epoch %d of %d", len(run.history.epochs), recipe.epochs)
    return run


def _checkpoint_gradients(trainee: Trainee) -> None:
    try:
        trainee.network.model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise FinetuneError("this backbone cannot checkpoint its gradients; leave --grad-checkpointing out") from error


def keep(run: Run, best: Mapping[str, Tensor]) -> None:
    """Write the state: first the best weights, under a name of their own, then what refers to them."""
    if best:
        save_state(best_path(run.state, run.history.best_epoch), best, {"identity": run.identity})
    tensors, packed = pack_optimiser(run.optimiser)
    tensors |= {f"trainee.{name}": value for name, value in run.trainee.state_dict().items()}
    tensors |= {f"criterion.{name}": value for name, value in run.criterion.state_dict().items()}
    if run.average is not None:
        tensors |= {f"average.{name}": value for name, value in run.average.values.items()}
    facts = {
        "identity": run.identity, "history": run.history.to_dict(), "optimiser": packed, "at_once": run.at_once,
        "scaler": run.scaler.state_dict(), "updates": run.average.updates if run.average else 0,
        "plateau": asdict(run.plateau), "best_score": None if run.best_score == -math.inf else run.best_score,
    }  # fmt: skip
    save_state(run.state / LAST, tensors, facts)
    remove_leftovers(run.state, run.history.best_epoch)
    write_epochs(run.state.parent / "epochs.csv", run.history.epochs)


def _restore(run: Run) -> None:
    path = run.state / LAST
    tensors, facts = load_state(path)
    check_identity(path, facts["identity"], run.identity)
    with _fitting(path):
        run.trainee.load_state_dict(_named(tensors, "trainee."))
        run.criterion.load_state_dict(_named(tensors, "criterion."))
        unpack_optimiser(run.optimiser, tensors, facts["optimiser"])
        if run.average is not None:
            run.average.load(_named(tensors, "average."), max(0, int(facts["updates"])))
        _restore_scale(run.scaler, facts["scaler"])
        run.history = History.from_dict(facts["history"])
        run.at_once, run.plateau = max(1, int(facts["at_once"])), Plateau.from_dict(facts["plateau"])
        run.best_score = -math.inf if facts["best_score"] is None else float(facts["best_score"])
    _watch_first_steps(run.optimiser, path)


def _restore_scale(scaler: torch.amp.GradScaler, found: Mapping[str, Any]) -> None:
    """Let fp16's losses be scaled as they were; how the scale moves is not read from a file."""
    if not scaler.is_enabled():
        return
    scale, steps = float(found["scale"]), int(found["_growth_tracker"])
    if not (math.isfinite(scale) and scale > 0 and 0 <= steps < scaler.get_growth_interval()):
        raise ValueError(f"its losses are scaled by {scale!r} since {steps!r} updates")
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": steps})


def _watch_first_steps(optimiser: torch.optim.Optimizer, path: Path) -> None:
    """Name the file where an optimiser cannot go on from what it was given, which only its steps find out."""
    step, left = optimiser.step, _FIRST_STEPS

    @wraps(step)
    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            optimiser.step = step  # type: ignore[method-assign]
        with _fitting(path):
            return step(*arguments, **options)

    optimiser.step = watched  # type: ignore[method-assign]


def load_best(run: Run) -> None:
    """Give the trainee the best epoch's weights, and set it to evaluation mode."""
    run.trainee.eval()
    if not run.history.best_epoch:
        return
    path = best_path(run.state, run.history.best_epoch)
    if not path.exists():
        raise FinetuneError(f"{path} is missing; remove the folder {run.state} to begin the run again")
    tensors, facts = load_state(path)
    check_identity(path, facts["identity"], run.identity)
    with _fitting(path):
        run.trainee.load_state_dict(_named(tensors, "trainee."))
    run.world.share_values(run.trainee)


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Name the file where what was read does not fit."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError, ArithmeticError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise FinetuneError(
            f"{path} does not fit this run ({error}); remove the folder {path.parent} to begin the run again"
        ) from error


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
