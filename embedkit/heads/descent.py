"""Descent: L-BFGS on the logistic loss of a design, warm-started from one penalty to the next."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from embedkit.heads.design import ROWS, Design

MEMORY = 30  # Pairs of steps and gradients that L-BFGS remembers, from one penalty to the next.
MEMORY_BYTES = 512 << 20  # What the pairs may take.
ARMIJO = 1e-4
LINE_TRIES = 25
FEW_CLASSES = 32  # Up to here products are up to three times as fast with classes along the first axis.
# Losses come from float32 logits: a change below this, beside it and as a share of it, may be rounding.
ROUNDING = 1e-6
FLAT = 0.8  # A slope of at most this share of the first is progress.


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights of one penalty, and how good they are.

    Parameters
    ----------
    weights : tensor of shape (r, c)
        In the design's coordinates.
    bias : tensor of shape (c,)
        Of the centred rows.
    curvature : tensor of shape (c,)
        Mean of p (1 - p) over the rows.
    gradient : float
        Largest entry of the gradient of the objective by the weights of the centred embeddings and by the biases.
    iterations : int
        Steps taken.
    converged : bool
        Whether `gradient` is within the tolerance.
    pairs : tuple of pairs of tensors of shape (r + 1, c)
        Steps and the changes of the loss's gradient along them. The penalty's part is left out, so that they hold for
        every penalty.
    loss : float, optional
        Mean loss, without the penalty's part; None where it is not known.
    slopes : tensor of shape (r + 1, c), optional
        Its gradient.
    """

    weights: torch.Tensor
    bias: torch.Tensor
    curvature: torch.Tensor
    gradient: float = float("inf")
    iterations: int = 0
    converged: bool = False
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    loss: float | None = None
    slopes: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """The rows of a design with what is to be predicted of them.

    Parameters
    ----------
    design : Design
        The rows.
    targets : tensor
        int64 codes of shape (n,): one class a row, softmax. Or float32 0 and 1 of shape (n, c): c questions a row, a
        sigmoid each.
    classes : int
        Number of columns of the weights, c.
    """

    design: Design
    targets: torch.Tensor
    classes: int

    def start(self) -> Solution:
        """Return weights of zero."""
        like = self.design.rows
        share = 1 / self.classes if self.targets.ndim == 1 else 0.5
        return Solution(
            like.new_zeros(like.shape[1], self.classes),
            like.new_zeros(self.classes),
            like.new_full((self.classes,), share * (1 - share)),
        )

    def losses(
        self, weights: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the mean loss, its gradients by weights and by bias, and the curvature, block by block."""
        rows = self.design.rows
        n, few = len(rows), self.classes <= FEW_CLASSES
        loss = torch.zeros((), dtype=torch.float64, device=rows.device)
        if few:
            weights = weights.T.contiguous().T
        by_weights, by_bias, curvature = torch.zeros_like(weights), torch.zeros_like(bias), torch.zeros_like(bias)
        for start in range(0, n, ROWS):
            block, targets = rows[start : start + ROWS], self.targets[start : start + ROWS]
            logits = torch.addmm(bias[:, None], weights.T, block.T).T if few else torch.addmm(bias, block, weights)
            if targets.ndim == 1:
                places = targets[:, None]
                norms = logits.logsumexp(dim=1, keepdim=True)
                loss += (norms - logits.gather(1, places)).sum(dtype=torch.float64)
                shares = logits.sub_(norms).exp_()
                sums = shares.sum(dim=0)
                curvature += sums - torch.linalg.vector_norm(shares, dim=0).square_()
                shares.scatter_add_(1, places, shares.new_full((), -1.0).expand(len(shares), 1))
            else:
                loss += (torch.nn.functional.softplus(logits) - targets * logits).sum(dtype=torch.float64)
                shares = logits.sigmoid_()
                curvature += shares.sum(dim=0) - torch.linalg.vector_norm(shares, dim=0).square_()
                shares.sub_(targets)
            by_weights.addmm_(block.T, shares)
            by_bias += shares.sum(dim=0)
        return loss / n, by_weights.div_(n), by_bias.div_(n), curvature.div_(n)


def solve(problem: Problem, C: float, start: Solution, *, max_iter: int, tol: float) -> Solution:
    """Minimise the mean loss plus ``|weights|^2 / (2 C n)``, from a solution for another C.

    The objective is scikit-learn's, and so is what counts as converged: no entry of the gradient is above `tol`.

    Coordinates are scaled by the root of the curvature that the start lets expect, in which L-BFGS needs few steps:
    the Hessian is about ``curvature * spectrum + 1 / (C n)``.
    """
    penalty = 1 / (C * len(problem.design.rows))
    spread = torch.cat([problem.design.spectrum, problem.design.spectrum.new_ones(1)])[:, None]
    ridge = torch.full_like(spread, penalty)
    ridge[-1] = 0  # The bias is not penalised.
    scale = (spread * start.curvature.clamp_min(1e-6) + ridge).clamp_min(1e-12).sqrt_()
    curvature = start.curvature

    def evaluate(point: torch.Tensor) -> tuple[float, torch.Tensor]:
        nonlocal curvature
        natural = point / scale
        loss, by_weights, by_bias, curvature = problem.losses(natural[:-1], natural[-1])
        gradient = torch.cat([by_weights, by_bias[None]]).add_(natural * ridge)
        return float(loss) + cost(natural), gradient.div_(scale)

    def cost(natural: torch.Tensor) -> float:
        return 0.5 * penalty * float(torch.linalg.vector_norm(natural[:-1], dtype=torch.float64)) ** 2

    def small(gradient: torch.Tensor) -> bool:
        natural = gradient * scale
        # Turning the gradient back is not free. Its largest entry is about four times as large as the usual one.
        usual = float(torch.linalg.vector_norm(natural[:-1], dim=0).max()) / problem.design.width**0.5
        return 2 * usual <= tol and problem.design.largest(natural) <= tol

    natural = torch.cat([start.weights, start.bias[None]])
    point = natural * scale
    if start.loss is None or start.slopes is None:
        value, gradient = evaluate(point)
    else:
        value, gradient = start.loss + cost(natural), torch.addcmul(start.slopes, natural, ridge).div_(scale)
    if small(gradient):  # Of this penalty, too.
        largest = problem.design.largest(gradient * scale)
        return dataclasses.replace(start, gradient=largest, iterations=0, converged=True)
    pairs: Pairs = deque(maxlen=max(5, min(MEMORY, MEMORY_BYTES // (8 * point.numel()))))
    for change, bend in start.pairs:
        _remember(pairs, change * scale, torch.addcmul(bend, change, ridge).div_(scale))
    (point, value, gradient), iterations = _descend(evaluate, small, (point, value, gradient), pairs, max_iter)
    natural, largest = point / scale, problem.design.largest(gradient * scale)
    kept = tuple((change / scale, torch.addcmul(bend * scale, change / scale, -ridge)) for change, bend, _ in pairs)
    loss, slopes = value - cost(natural), torch.addcmul(gradient * scale, natural, -ridge)
    return Solution(natural[:-1], natural[-1], curvature, largest, iterations, largest <= tol, kept, loss, slopes)


Evaluate = Callable[[torch.Tensor], tuple[float, torch.Tensor]]
Pairs = deque[tuple[torch.Tensor, torch.Tensor, float]]
Place = tuple[torch.Tensor, float, torch.Tensor]  # A point, the value there, and the gradient.


def _remember(pairs: Pairs, change: torch.Tensor, bend: torch.Tensor) -> None:
    """Keep a step with the change of the gradient along it, if they tell a curvature."""
    if (product := _dot(change, bend)) > 1e-10 * _dot(bend, bend):
        pairs.append((change, bend, product))


def _descend(
    evaluate: Evaluate,
    small: Callable[[torch.Tensor], bool],
    start: Place,
    pairs: Pairs,
    max_iter: int,
) -> tuple[Place, int]:
    """Return the last place and the number of L-BFGS steps, which end at a small gradient."""
    point, value, gradient = start
    iteration = 0
    while iteration < max_iter and not small(gradient):
        step = _direction(gradient, pairs)
        slope = -_dot(gradient, step)
        if not slope < 0:
            pairs.clear()
            step, slope = gradient.clone(), -_dot(gradient, gradient)
        found = _search(evaluate, point, step, value, slope)
        if found is None or torch.equal(found[0], point):  # float32 has no better point this way.
            if not pairs:
                break
            pairs.clear()
            continue
        new_point, new_value, new_gradient = found
        _remember(pairs, new_point - point, new_gradient - gradient)
        point, value, gradient = new_point, new_value, new_gradient
        iteration += 1
    return (point, value, gradient), iteration


def _search(evaluate: Evaluate, point: torch.Tensor, step: torch.Tensor, value: float, slope: float) -> Place | None:
    """Return the first point against `step` that is enough of an improvement, trying the whole step first."""
    length = 1.0
    for _ in range(LINE_TRIES):
        new_point = point - length * step
        new_value, new_gradient = evaluate(new_point)
        new_slope = -_dot(new_gradient, step)
        lower = new_value <= value + ARMIJO * length * slope
        # Near the minimum float32 cannot tell losses apart, but slopes (the approximate condition of Hager and Zhang,
        # 2005). The loss is convex: while it still falls at the new point it has fallen all the way.
        level = new_value <= value + ROUNDING * (1 + abs(value))
        if lower or new_slope <= 0 or (level and new_slope <= FLAT * -slope):
            return new_point, new_value, new_gradient
        # The minimum of the parabola through both slopes, within bounds.
        length *= min(max(0.1, slope / (slope - new_slope)), 0.5)
    return None


def _direction(gradient: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return the inverse Hessian, as the pairs tell it, times the gradient: the two-loop recursion."""
    step = gradient.clone()
    factors = []
    for change, bend, product in reversed(pairs):
        factor = _dot(change, step) / product
        factors.append(factor)
        step.sub_(bend, alpha=factor)
    if pairs:
        _, bend, product = pairs[-1]
        step.mul_(product / _dot(bend, bend))
    for (change, bend, product), factor in zip(pairs, reversed(factors), strict=True):
        step.add_(change, alpha=factor - _dot(bend, step) / product)
    return step


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))
