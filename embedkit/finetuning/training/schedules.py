"""Learning rates over a run: one factor for all groups, so that each keeps its ratio to the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedkit.finetuning.recipe import Recipe

_RISE, _START, _END = 0.3, 1 / 25, 1e-4  # Of one-cycle: share of the run that it rises in, its first and last factor.


def rate_factor(recipe: Recipe, step: int, steps: int) -> float:
    """Return what every learning rate is multiplied with at one step.

    Parameters
    ----------
    recipe : Recipe
        Its `sched`, `epochs`, `warmup_epochs`, `decay_rate`, `decay_epochs` and `min_lr`.
    step : int
        Updates of the weights before this one, in the whole run.
    steps : int
        Updates in an epoch.

    Returns
    -------
    float
        In (0, 1]; never below `min_lr` once the warm-up is over. Of ``plateau`` only the warm-up: what the validation
        adds to it is a `Plateau`.

    Notes
    -----
    ``cosine`` is half a cosine from the end of the warm-up to the end of the run (Loshchilov and Hutter, SGDR, 2017),
    ``exponential`` falls by `decay_rate` over the same stretch, ``step`` by `decay_rate` every `decay_epochs` epochs.
    ``one-cycle`` brings its own warm-up: it rises along a cosine in the first 30 % of the run, from 1/25, and falls to
    1/10,000 (Smith and Topin, Super-Convergence, 2018, as PyTorch's OneCycleLR does it).

    Examples
    --------
    >>> recipe = Recipe(epochs=3, warmup_epochs=1.0, sched="cosine")
    >>> [round(rate_factor(recipe, step, steps=2), 2) for step in range(6)]
    [0.33, 0.67, 1.0, 0.85, 0.5, 0.15]
    """
    total = max(1, recipe.epochs * steps)
    if recipe.sched == "one-cycle":
        return max(recipe.min_lr, _one_cycle(step, total))
    rising = recipe.warmup_epochs * steps
    if step < rising:
        return min(1.0, (step + 1) / (rising + 1))
    share = min(1.0, (step - rising) / max(1.0, total - rising))
    if recipe.sched == "cosine":
        return recipe.min_lr + (1 - recipe.min_lr) * _half_cosine(share)
    if recipe.sched == "exponential":
        return max(recipe.min_lr, float(recipe.decay_rate**share))
    if recipe.sched == "step":
        return max(recipe.min_lr, float(recipe.decay_rate ** (step // (steps * recipe.decay_epochs))))
    return 1.0


def _half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _one_cycle(step: int, total: int) -> float:
    top = _RISE * total
    if step < top:
        return 1 - (1 - _START) * _half_cosine(step / top)
    return _END + (1 - _END) * _half_cosine((step - top) / max(1.0, total - 1 - top))


@dataclass(frozen=True)
class Plateau:
    """What ``plateau`` knows after an epoch.

    Parameters
    ----------
    factor : float, default 1.0
        What the learning rates are multiplied with, beside the warm-up.
    best : float or None
        The best score so far.
    waited : int, default 0
        Epochs since then, or since the last fall.
    """

    factor: float = 1.0
    best: float | None = None
    waited: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plateau:
        """Return a state of JSON values, which may come from a stranger: whatever is no number is an error."""
        best = values["best"]
        return cls(float(values["factor"]), None if best is None else float(best), int(values["waited"]))

    def after(self, score: float, recipe: Recipe) -> Plateau:
        """Return the state after another epoch: more than `decay_epochs` without a better one, and the rates fall.

        Parameters
        ----------
        score : float
            Of the validation, greater is better.
        recipe : Recipe
            Its `decay_epochs`, `decay_rate` and `min_lr`.

        Examples
        --------
        >>> state = Plateau()
        >>> for score in (0.5, 0.6, 0.6, 0.6):
        ...     state = state.after(score, Recipe(decay_epochs=1, decay_rate=0.1))
        >>> state
        Plateau(factor=0.1, best=0.6, waited=0)
        """
        if self.best is None or score > self.best:
            return Plateau(self.factor, score, 0)
        if self.waited < recipe.decay_epochs:
            return Plateau(self.factor, self.best, self.waited + 1)
        return Plateau(max(recipe.min_lr, self.factor * recipe.decay_rate), self.best, 0)
