"""Warm-up: fitting the head to stored embeddings, while the body is frozen and no image is decoded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from embedkit.errors import FinetuneError
from embedkit.finetuning.layers import fold_scaler, load_estimator
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.trainee import Trainee
from embedkit.heads import fit_logistic
from embedkit.heads.folding import hold_out

Rows = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.int64]
Progress = Callable[[str], None]

_FRACTION = 0.2  # Of the rows, to choose C by.
_ROWS = 256  # Of a step.
_LEAST_STEPS = 200  # Small training sets are seen more often than `head_epochs` times.


@dataclass(frozen=True)
class WarmUp:
    """How a head was fitted.

    Attributes
    ----------
    kind : str
        "probe", "sgd" or "none".
    rows : int
        Embeddings that it was fitted to.
    seconds : float
    top1 : float
        Share of those rows that it gets right; NaN without a fit.
    choice : dict
        JSON values: what a probe chose and by what, or the loss of each pass.
    """

    kind: str
    rows: int = 0
    seconds: float = 0.0
    top1: float = float("nan")
    choice: dict[str, Any] = field(default_factory=dict)


def warm_up(
    trainee: Trainee,
    x: Rows,
    codes: Codes,
    recipe: Recipe,
    *,
    groups: Codes | None = None,
    progress: Progress | None = None,
) -> WarmUp:
    """Fit a trainee's head to embeddings of its frozen body.

    The probe is logistic regression on standardised rows, the strength of its penalty chosen on held-out ones of them;
    the standardisation is then worked into the head. So ``head(embed(image))`` is the probe's answer.

    Parameters
    ----------
    trainee : Trainee
        Its head is changed, its body is not read.
    x : array of shape (n, d)
        Embeddings of training images, as the frozen body makes them.
    codes : array of int of shape (n,)
        Their classes, 0 to c - 1. Every class has a row.
    recipe : Recipe
        Of which warmup, head, head_epochs, head_lr, weight_decay, smoothing, balance and seed are read.
    groups : array of int of shape (n,), optional
        Rows of equal numbers show the same picture: they are held out together.
    progress : callable, optional
        Called with one line of text for each value of the penalty, or each few passes.

    Returns
    -------
    WarmUp

    Raises
    ------
    FinetuneError
        When the rows are not as wide as the embedding, or a class has none.

    Notes
    -----
    With ``balance`` the logarithm of each class's share is taken from its bias afterwards: of two equally good answers
    the head then gives neither because it is frequent (Menon et al., Long-tail learning via logit adjustment, 2021).

    Examples
    --------
    >>> found = warm_up(trainee, store.embeddings[rows], codes, Recipe())  # doctest: +SKIP
    >>> found.choice["C"]  # doctest: +SKIP
    0.01
    """
    kind = recipe.warmup_kind
    if kind == "none":
        return WarmUp("none")
    _check(trainee.head, x, codes)
    say = progress or (lambda text: None)
    started = time.perf_counter()
    if kind == "probe":
        held = hold_out(len(x), _FRACTION, recipe.seed, strata=codes, groups=groups)
        probe, choice = fit_logistic(x, codes, seed=recipe.seed, held_out=held, progress=say)
        load_estimator(trainee.head, probe)
    else:
        choice = _fit_by_steps(trainee.head, x, codes, recipe, say)
    if recipe.balance:
        _forget_shares(trainee.head, codes)
    seconds = time.perf_counter() - started
    return WarmUp(kind, len(x), seconds, _top1(trainee.head, x, codes), choice)


def _check(head: nn.Module, x: Rows, codes: Codes) -> None:
    linear = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    width, classes = linear[0].in_features, linear[-1].out_features
    if x.ndim != 2 or x.shape[1] != width or codes.shape != (len(x),):
        raise FinetuneError(
            f"the head takes {width} numbers a row, and got rows of shape {x.shape} with {codes.shape} classes; "
            "were these embeddings made by this backbone?"
        )
    if not np.isfinite(x).all():
        raise FinetuneError("some of these embeddings are infinite or NaN; make them anew with embedkit extract")
    missing = np.setdiff1d(np.arange(classes), codes)
    if len(missing) or codes.min() < 0 or codes.max() >= classes:
        raise FinetuneError(
            f"the head tells {classes} classes apart; each needs a training embedding with its number, and "
            f"{len(missing)} have none"
        )


def _fit_by_steps(head: nn.Module, x: Rows, codes: Codes, recipe: Recipe, say: Progress) -> dict[str, Any]:
    """Fit layers to standardised rows by AdamW, whose rate falls as a cosine, and work the standardisation in."""
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    scale[scale <= 1e-12 * np.abs(mean)] = 1  # Of a column that never changes.
    device = next(head.parameters()).device
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in head.parameters() if weight.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in head.parameters() if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=recipe.head_lr)
    batches = -(-len(x) // _ROWS)
    epochs = max(recipe.head_epochs, -(-_LEAST_STEPS // batches))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    random = np.random.default_rng(recipe.seed)
    losses = []
    for epoch in range(1, epochs + 1):
        total = 0.0
        order = random.permutation(len(x))
        for start in range(0, len(x), _ROWS):
            rows = order[start : start + _ROWS]
            z = torch.as_tensor(((x[rows] - mean) / scale).astype(np.float32), device=device)  # (b, d)
            y = torch.as_tensor(codes[rows], device=device)
            optimiser.zero_grad()
            loss = functional.cross_entropy(head(z), y, label_smoothing=recipe.smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / len(x))
        if epoch % 10 == 0 or epoch == epochs:
            say(f"head, epoch {epoch} of {epochs}: loss {losses[-1]:.4f}")
    fold_scaler(next(layer for layer in head.modules() if isinstance(layer, nn.Linear)), mean, scale)
    return {"epochs": epochs, "losses": losses}


def _forget_shares(head: nn.Module, codes: Codes) -> None:
    last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    shares = np.bincount(codes, minlength=last.out_features) / len(codes)
    with torch.no_grad():
        last.bias.sub_(torch.as_tensor(np.log(shares), dtype=last.bias.dtype, device=last.bias.device))


def _top1(head: nn.Module, x: Rows, codes: Codes) -> float:
    device = next(head.parameters()).device
    right = 0
    with torch.inference_mode():
        for start in range(0, len(x), 8192):
            rows = torch.as_tensor(x[start : start + 8192].astype(np.float32), device=device)
            right += int((head(rows).argmax(1).cpu().numpy() == codes[start : start + 8192]).sum())
    return right / len(x)
