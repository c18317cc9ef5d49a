"""Path: the solutions of logistic regression from one penalty to the next."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.heads.devices import require_device, threads_for
from embedkit.heads.labels import encode

if TYPE_CHECKING:  # torch is imported when something is fitted: predicting does without.
    import torch

    from embedkit.heads.descent import Solution
    from embedkit.heads.design import Design

Array = npt.NDArray[Any]
CRITERIA = ("log-loss", "accuracy")
# A likelihood of zero in float32 counts as the least that float32 can tell from zero.
WORST_LOSS = -float(np.log(np.finfo(np.float32).tiny))


@dataclass(frozen=True, eq=False)
class Start:
    """Where a path may begin: another path's classes, weights (c, d), directions, and the rest of its solution."""

    classes: Array
    weights: Array
    solution: Solution
    directions: torch.Tensor | None


class Path:
    """Some rows of a matrix with their labels, and a solution that moves along values of C.

    Parameters
    ----------
    x : array of shape (n, d)
        Embeddings.
    y : array of shape (n,) or (n, c)
        Labels, or 0 and 1 for several labels a row.
    kept : array of int
        The rows to fit to.
    standardise : bool
        Whether columns are scaled by the kept rows.
    device : str
        Where to compute.
    start : Start, optional
        The solution of other rows like these, to begin with where the classes are the same.

    Attributes
    ----------
    labels : Labels
        Of the kept rows.
    solution : Solution
        Of the last C; zero weights at first.
    work : float
        Multiplications of one product of rows and weights.
    """

    def __init__(
        self,
        x: Array,
        y: Array,
        kept: npt.NDArray[np.int64],
        *,
        standardise: bool,
        device: str = "cpu",
        start: Start | None = None,
    ) -> None:
        require_device(device)
        import torch

        from embedkit.heads.descent import Problem
        from embedkit.heads.design import Design

        self.labels = encode(y[kept])
        self.standardise = standardise
        self.work = float(len(kept)) * x.shape[1] * self.labels.columns
        directions = None if start is None else start.directions
        with threads_for(self.work):
            self.design: Design = Design.of(x, kept, standardise=standardise, device=device, directions=directions)
        self.problem = Problem(self.design, torch.as_tensor(self.labels.targets, device=device), self.labels.columns)
        self.solution: Solution = self.problem.start()
        if start is not None and np.array_equal(self.labels.classes, start.classes):
            self.solution = dataclasses.replace(start.solution, weights=self.design.contract(start.weights))
        self._dtype = np.float64 if x.dtype == np.float64 else np.float32

    def step(self, C: float, *, max_iter: int, tol: float) -> bool:
        """Move the solution to another C; return whether it converged."""
        from embedkit.heads.descent import solve

        with threads_for(self.work):
            self.solution = solve(self.problem, C, self.solution, max_iter=max_iter, tol=tol)
        return self.solution.converged

    def state(self) -> Start:
        """Return the solution in terms that do not depend on the rows."""
        solution = dataclasses.replace(self.solution, pairs=(), loss=None, slopes=None)
        design = self.design
        return Start(self.labels.classes, design.expand(solution.weights), solution, design.directions)

    def weights(self) -> tuple[Array, Array]:
        """Return weights (c, d) and intercepts (c,), for standardised rows where these are."""
        weights = self.design.expand(self.solution.weights)
        bias = self.solution.bias.cpu().numpy().astype(np.float64)
        if not self.standardise:  # The solver's rows are centred, those that a head sees are not.
            bias = bias - np.einsum("cd,d->c", weights, self.design.mean)
        return weights.astype(self._dtype), bias.astype(self._dtype)


class HeldOut:
    """Rows that a path is judged by.

    Parameters
    ----------
    path : Path
        What is judged.
    x, y : arrays
        As those of `Path`.
    rows : array of int
        The rows to judge by.
    criterion : str
        One of `CRITERIA`.
    """

    def __init__(self, path: Path, x: Array, y: Array, rows: npt.NDArray[np.int64], criterion: str) -> None:
        if criterion not in CRITERIA:
            raise EvaluationError(f"there is no criterion {criterion!r}; known: {', '.join(map(repr, CRITERIA))}")
        import torch

        self.path, self.criterion = path, criterion
        with threads_for(path.work):
            self.rows = path.design.project(x, rows)
        codes = path.labels.codes_of(y[rows])
        self.codes = torch.as_tensor(codes, device=self.rows.device)

    def __len__(self) -> int:
        return len(self.rows)

    def score(self) -> float:
        """Return the mean log-loss, or the share of right answers; a class that no kept row has is never right."""
        with threads_for(self.path.work):
            return self._score()

    def _score(self) -> float:
        import torch

        solution = self.path.solution
        total = 0.0
        for start in range(0, len(self.rows), 8192):
            codes = self.codes[start : start + 8192]
            rows = self.rows[start : start + 8192]
            logits = torch.addmm(solution.bias[:, None], solution.weights.T, rows.T).T
            if codes.ndim == 1 and logits.shape[1] == 1:
                logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
            right, losses = (_several if codes.ndim == 2 else _single)(logits, codes)
            values = right if self.criterion == "accuracy" else losses.clamp_max(WORST_LOSS)
            total += float(values.sum(dtype=torch.float64))
        return total / self.codes.numel()


def _single(logits: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each row is right, and its loss, for one class a row; the code -1 is of no class."""
    right = logits.argmax(dim=1) == codes
    chosen = logits.gather(1, codes.clamp_min(0)[:, None])[:, 0]
    return right, (logits.logsumexp(dim=1) - chosen).masked_fill(codes < 0, WORST_LOSS)


def _several(logits: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each label of each row is right, and its loss."""
    from torch.nn.functional import softplus

    return (logits > 0) == (codes > 0.5), softplus(logits) - codes * logits
