"""Options of how a network learns, which fine-tuning and distillation share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from embedkit.errors import FinetuneError


@contextmanager
def naming_options(**others: str) -> Iterator[None]:
    """Let errors about settings be wrong usage that calls them as they are typed.

    Parameters
    ----------
    **others : str
        Options of settings that no option is named after.
    """
    try:
        yield
    except FinetuneError as error:
        ctx = click.get_current_context(silent=True)
        params = [] if ctx is None else ctx.command.params
        names = {str(each.name): each.opts[-1] for each in params if isinstance(each, click.Option)}
        raise click.UsageError(_as_typed(str(error), {**names, **others})) from error


def _as_typed(text: str, names: Mapping[str, str]) -> str:
    """Return a message with options in place of settings: words of our own names, others where they are its subject."""
    for name, option in names.items():
        text = re.sub(rf"^(the augmentation's )?{name}(?= (must|is)\b)", option, text)
        if "_" in name:
            text = re.sub(rf"\b{name}\b", option, text)
    return text


@contextmanager
def saying_that_it_goes_on() -> Iterator[None]:
    """Let Ctrl-C say that a run is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on after the last whole epoch") from None


def learning_options(
    *, epochs: int, batch_size: int, body_lr: float, head_lr: float, head: str, layer_decay: float, weight_decay: float
) -> list[Callable[..., Any]]:
    """Return the options with these defaults, in the order of the help; `head` names what `head_lr` is the rate of."""
    return [
        click.option("--epochs", type=int, default=epochs, show_default=True, help="Passes over the training images."),
        click.option(
            "-b", "--batch-size", type=int, default=batch_size, show_default=True,
            help="Images a pass, of each process.",
        ),
        click.option(
            "--grad-accum-steps", type=int, default=1, show_default=True, help="Batches that make one update."
        ),
        click.option("--opt", default="adamw", show_default=True, help="A name of timm.optim: sgd, adamw, lamb, ..."),
        click.option("--momentum", type=float, default=0.9, show_default=True, help="Where the optimiser has it."),
        click.option(
            "--body-lr", type=float, default=body_lr, show_default=True, help="Learning rate of the last block."
        ),
        click.option("--head-lr", type=float, default=head_lr, show_default=True, help=f"Learning rate of {head}."),
        click.option(
            "--layer-decay", type=float, default=layer_decay, show_default=True,
            help="Each block's rate as a share of that of the block behind it.",
        ),
        click.option(
            "--weight-decay", type=float, default=weight_decay, show_default=True, help="Not of norms and biases."
        ),
        click.option(
            "--sched", default="cosine", show_default=True,
            type=click.Choice(["constant", "cosine", "exponential", "step", "plateau", "one-cycle"]),
            help="How learning rates move.",
        ),
        click.option("--warmup-epochs", type=float, default=1.0, show_default=True, help="While learning rates rise."),
        click.option("--min-lr", type=float, default=0.0, show_default=True, help="Floor, as a share of each rate."),
        click.option("--clip-grad", type=float, default=1.0, show_default=True, help="Largest gradient norm; 0: any."),
        click.option(
            "--model-ema", type=float, default=0.0, show_default=True, help="Decay of averaged weights; 0: none."
        ),
        click.option("--drop-path", type=float, default=0.0, show_default=True, help="Chance to skip the last branch."),
        click.option(
            "--amp-dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
            help="Number format of the products while training.",
        ),
        click.option("--patience", type=int, default=0, show_default=True, help="Epochs without gain before it stops."),
        click.option("--seed", type=int, default=0, show_default=True, help="Draws everything that is drawn."),
    ]  # fmt: skip
