"""Protocols: recipes that make two probes comparable, each a frozen dataclass whose docstring says the recipe.

A protocol sees training rows only; whatever it chooses, it chooses on rows that it holds out of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.evaluation.scoring import Jury
from embedkit.evaluation.streaming import StoredRows, search_streamed
from embedkit.evaluation.targets import Training, require_classes
from embedkit.evaluation.tuning import fit_tuned, fresh
from embedkit.heads import (
    C_GRID,
    HEADS,
    LeastSquares,
    WeightedKNN,
    fit_logistic,
    fit_quietly,
    logistic_regression,
    sweep_logistic,
)
from embedkit.heads.choosing import is_predictor
from embedkit.heads.folding import hold_out
from embedkit.heads.neighbours import KnownNeighbours
from embedkit.heads.plain import plain_logistic

Progress = Callable[[str], None]
Fitted = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class Protocol:
    """What every protocol has: the number of seeds and shots, and a version.

    The version stands beside each definition. It goes up by one with every change of the protocol, its heads or their
    solvers after which the same rows may give another number, and with no other: suites use a cell of an earlier run
    again only where it is the same.
    """

    version: ClassVar[int]
    tasks: ClassVar[tuple[str, ...]] = ("class",)
    shots: ClassVar[tuple[int, ...]] = ()  # Of a protocol that is few-shot by itself.
    seeds: ClassVar[int] = 1

    def fit(self, rows: Training, *, seed: int, progress: Progress, device: str = "cpu") -> Fitted:
        """Fit the protocol's head.

        Parameters
        ----------
        rows : Training
            The training rows.
        seed : int
            Draws what is drawn.
        progress : callable
            Called with one line of text at each step.
        device : str, default "cpu"
            Where to fit, in torch's words; of protocols that run on devices.

        Returns
        -------
        estimator : estimator
            Fitted to all rows; it takes embeddings as they are stored.
        choice : dict
            What was chosen on held-out rows and how, as JSON values.
        """
        raise NotImplementedError

    @property
    def head_name(self) -> str:
        """What an estimate of memory calls the head."""
        return "logistic"

    def runs_on_devices(self, task: str) -> bool:
        """Return whether the head for a task can be fitted elsewhere than on the CPU."""
        return False

    def jury(self, estimator: Any, rows: Training, queries: npt.NDArray[Any]) -> Jury:
        """Return what is scored on the test rows: the fitted head, and others beside it that are never chosen from."""
        return Jury(estimator, {}, queries, queries)

    def settings(self) -> dict[str, Any]:
        """Return the protocol's fields, which a report repeats."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class Default(Protocol):
    """What we recommend: standardisation and logistic regression, its penalty chosen by log-loss, and a k-NN beside it.

    A stratified fifth of the training rows is held out; the C of the lowest log-loss on it wins, and the head is fitted
    anew to all rows. Standardised, because then one short grid of C serves every backbone: raw embeddings differ in
    scale by orders of magnitude, which is why published grids span eleven decades. By log-loss, because accuracy on a
    few hundred rows moves in steps of chance. Beside it stands DINO's weighted k-NN, which fits nothing: where the two
    disagree on which backbone is better, the difference lies in the head.

    Another head takes the place of logistic regression by name or as an estimator: the names choose one number of
    theirs on the same held-out rows (see `embedkit.evaluation.tuning`), an estimator is fitted as it is.

    Parameters
    ----------
    C_grid : tuple of float
        Penalties of logistic regression to choose from, in scikit-learn's convention.
    fraction : float
        Share of the training rows on which they are compared.
    k, temperature
        Of the k-NN head.
    head : str or estimator
        What takes the place of logistic regression.
    """

    version: ClassVar[int] = 1
    tasks: ClassVar[tuple[str, ...]] = ("class", "multi-label", "regression")

    C_grid: tuple[float, ...] = C_GRID
    fraction: float = 0.2
    k: int = 20
    temperature: float = 0.07
    head: Any = None

    def fit(self, rows: Training, *, seed: int, progress: Progress, device: str = "cpu") -> Fitted:
        """Fit the head, see `Protocol.fit`."""
        head = self.head if self.head is not None else "ridge" if rows.task == "regression" else "logistic"
        if not isinstance(head, str):
            return fresh(head).fit(rows.x, rows.y), {"head": type(head).__name__}
        if head not in HEADS:
            raise EvaluationError(f"there is no head {head!r}; known: {', '.join(map(repr, HEADS))}")
        if head != "logistic":
            estimator, choice = fit_tuned(
                head, rows, fraction=self.fraction, seed=seed, progress=progress, device=device
            )
            return estimator, {"head": head, **choice}
        if rows.task == "regression":
            raise EvaluationError("logistic regression predicts classes; for numbers take the head ridge, knn or mlp")
        held = hold_out(len(rows.x), self.fraction, seed, strata=rows.strata, groups=rows.groups)
        estimator, choice = fit_logistic(
            rows.x, rows.y, held_out=held, C_grid=self.C_grid, device=device, progress=progress
        )
        return estimator, {"head": head, **choice}

    @property
    def head_name(self) -> str:
        """The head's own name, or its type's."""
        head = "logistic" if self.head is None else self.head
        return head if isinstance(head, str) else type(head).__name__

    def runs_on_devices(self, task: str) -> bool:
        """Return True for logistic regression and the perceptron."""
        return self.head_name in ("logistic", "mlp") and (self.head is not None or task != "regression")

    def jury(self, estimator: Any, rows: Training, queries: npt.NDArray[Any]) -> Jury:
        """Return the head, and for classes the k-NN head beside it."""
        if rows.task != "class":
            return Jury(estimator, {}, queries, queries)
        if isinstance(rows.x, StoredRows):
            known = search_streamed(rows.x, rows.y, queries, k=self.k, temperature=self.temperature)
            return Jury(estimator, {"knn": known}, queries, np.arange(len(queries)))
        knn = WeightedKNN(k=self.k, temperature=self.temperature).fit(rows.x, rows.y)
        return Jury(estimator, {"knn": knn}, queries, queries)

    def settings(self) -> dict[str, Any]:
        """Return the fields that matter, without an estimator, which JSON cannot hold."""
        values = super().settings()
        del values["head"]
        return values


@dataclass(frozen=True)
class DinoKNN(Protocol):
    """DINO's k-NN: rows at unit length, the k most similar vote with exp(s / T), T = 0.07, k = 20.

    Nothing is fitted and nothing chosen: the script reports k of 10, 20, 100 and 200, and its help and paper name 20 as
    the best, so top1 here is that of k = 20, and the others stand in "by_k".

    Source: facebookresearch/dino, ``eval_knn.py`` (Caron et al., ICCV 2021, appendix F). DINOv2's ``eval/knn.py``
    normalises the votes over the largest k before it cuts them off; that changes no ranking of classes and so no
    accuracy. Its images: resize 256 bicubic, centre crop 224, the CLS token after the last norm, which is for the
    store to have (``extract --preset published``).

    Deviations: none in the numbers. The script divides the test rows into 100 chunks and fails below 100 of them; ours
    does not. Where fewer than k training rows exist, all vote.

    Parameters
    ----------
    k, temperature
        What top1 is of.
    ks : tuple of int
        All that are reported.
    """

    version: ClassVar[int] = 1

    k: int = 20
    temperature: float = 0.07
    ks: tuple[int, ...] = (10, 20, 100, 200)

    def fit(self, rows: Training, *, seed: int, progress: Progress, device: str = "cpu") -> Fitted:
        """Keep the rows, see `Protocol.fit`."""
        head = WeightedKNN(k=self.k, temperature=self.temperature).fit(rows.x, rows.y)
        return head, {"head": "knn", "chosen": {"k": min(self.k, len(rows.x)), "T": self.temperature}}

    @property
    def head_name(self) -> str:
        """What an estimate of memory calls the head."""
        return "knn"

    def jury(self, estimator: Any, rows: Training, queries: npt.NDArray[Any]) -> Jury:
        """Return the heads of all k, over one search."""
        scores, nearest = estimator.search(queries, max(self.k, *self.ks))
        heads = {str(k): KnownNeighbours(estimator, scores, nearest, k) for k in (self.k, *self.ks)}
        numbers = np.arange(len(queries))
        return Jury(heads.pop(str(self.k)), heads, numbers, numbers)


@dataclass(frozen=True)
class Dinov2LogReg(Protocol):
    """DINOv2's logistic regression: 45 values of C on a random tenth of the training rows, refitted to all.

    C = 10^linspace(-6, 5, 45), an L2 penalty, embeddings as they are (neither standardised nor at unit length), at most
    1,000 iterations. The C of the highest top-1 on the tenth wins, the smaller of equals, and the head is fitted to all
    training rows with it.

    Source: facebookresearch/dinov2, ``dinov2/eval/log_regression.py`` (Oquab et al., 2023). Its images: resize 224,
    centre crop 224.

    Deviations: our L-BFGS in float32 in place of cuML's quasi-Newton in float64, stopped at a gradient of 1e-4 in place
    of 1e-12, which float32 cannot reach (see `embedkit.heads.LogisticHead`), each C started from the solution of the
    one before it; the tenth is drawn by numpy in place of torch, and byte-identical pictures stay on one side.

    Parameters
    ----------
    decades : tuple of float
        Exponents of the first and the last C.
    values : int
        Number of values.
    fraction : float
        Share of the training rows on which they are compared.
    max_iter : int
        Limit on the iterations of each fit.
    """

    version: ClassVar[int] = 1

    decades: tuple[float, float] = (-6.0, 5.0)
    values: int = 45
    fraction: float = 0.1
    max_iter: int = 1000

    def fit(self, rows: Training, *, seed: int, progress: Progress, device: str = "cpu") -> Fitted:
        """Choose C and fit, see `Protocol.fit`."""
        grid = tuple(float(C) for C in 10 ** np.linspace(*self.decades, self.values))
        held = hold_out(len(rows.x), self.fraction, seed, groups=rows.groups)
        # Drawn from all rows, whatever their class.
        advice = "take the protocol 'default', which holds out a share of each class"
        require_classes(rows.y, ~held, "beside the tenth of the rows that is held out", advice)
        estimator, choice = fit_logistic(
            rows.x, rows.y, held_out=held, C_grid=grid, criterion="accuracy", standardise=False,
            max_iter=self.max_iter, device=device, progress=progress,
        )  # fmt: skip
        return estimator, {"head": "logistic", **choice}

    def runs_on_devices(self, task: str) -> bool:
        """Return True."""
        return True


@dataclass(frozen=True)
class ClipLBFGS(Protocol):
    """CLIP's linear probe: logistic regression, its L2 strength found by halving steps around the best.

    The strengths 1e-6, 1e-4, ..., 1e6 are tried on held-out training rows; then the two strengths one decade beside the
    best, half a decade beside the best so far, a quarter, and an eighth, which is the paper's resolution of eight steps
    a decade. The head is refitted to all training rows with the best. Embeddings as they are, L-BFGS, at most 1,000
    iterations.

    Source: Radford et al., "Learning transferable visual models from natural language supervision", 2021, appendix A.3.
    CLIP's ViTs are probed before their projection, which is for the store to have.

    Deviations: the paper takes a data set's own validation part where there is one; here a stratified fifth of the
    training rows is held out always. Of equal accuracies the stronger penalty wins, which the paper leaves open. Our
    L-BFGS finds scikit-learn's solution to a gradient of 1e-4 in float32, each fit started from the one before it in
    order of strength. C is 1 / strength.

    Parameters
    ----------
    strengths : tuple of float
        Where the search begins, two decades apart.
    halvings : int
        How often the step is halved: four leave an eighth of a decade.
    fraction : float
        Share of the training rows that is held out.
    max_iter : int
        Limit on the iterations of each fit.
    """

    version: ClassVar[int] = 1

    strengths: tuple[float, ...] = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
    halvings: int = 4
    fraction: float = 0.2
    max_iter: int = 1000

    def fit(self, rows: Training, *, seed: int, progress: Progress, device: str = "cpu") -> Fitted:
        """Search C and fit, see `Protocol.fit`."""
        held = hold_out(len(rows.x), self.fraction, seed, strata=rows.strata, groups=rows.groups)
        scores: dict[float, float] = {}
        unconverged: list[float] = []
        grid, step = [1 / strength for strength in self.strengths], 2.0
        widest = min(grid), max(grid)
        for _ in range(self.halvings + 1 if held.any() else 0):
            found, failed = sweep_logistic(
                rows.x, rows.y, held, sorted(grid), standardise=False, criterion="accuracy",
                max_iter=self.max_iter, device=device, progress=progress,
            )  # fmt: skip
            scores.update(found)
            unconverged += failed
            best = min(scores, key=lambda C: (-scores[C], C))
            step /= 2
            grid = [C for C in (best * 10**-step, best * 10**step) if widest[0] <= C <= widest[1]]
        C = min(scores, key=lambda C: (-scores[C], C)) if scores else 1.0
        head = logistic_regression(C, max_iter=self.max_iter, standardise=False, device=device)
        choice = {"C": C, "C_scores": dict(sorted(scores.items())), "held_out_rows": int(held.sum())}
        converged = fit_quietly(head, rows.x, rows.y)
        return head, {"head": "logistic", **choice, "converged": converged, "C_not_converged": unconverged}

    def runs_on_devices(self, task: str) -> bool:
        """Return True."""
        return True


@dataclass(frozen=True)
class BigVisionFewShot(Protocol):
    """big_vision's few-shot probe: ridge regression onto -1 and 1 from 1, 5, 10 and 25 rows a class, three seeds.

    Embeddings are standardised by (x - mean) / (std + 1e-5) of the few rows, a constant column of 100 is the bias, and
    the L2 penalty is 2^10. Nothing is chosen. Rows of a class are the first of ``default_rng(seed).permutation``, for
    the seeds 0, 1 and 2, so that fewer shots are among more.

    Source: google-research/big_vision, ``evaluators/fewshot_lsr.py`` and ``configs/common_fewshot.py``. Its images:
    resize 256, crop 224, values in [-1, 1], the ``pre_logits``. Its headline on ImageNet is that of 10 shots; here top1
    is that of the most shots, and "shots" has all.

    Deviations: float64 and a direct solution of the same normal equations in place of float32 and an
    eigendecomposition; the order of the store's rows in place of that of TFDS, so other rows are drawn.

    Parameters
    ----------
    regularisation : float
        The L2 penalty.
    bias : float
        The constant column.
    """

    version: ClassVar[int] = 1
    shots: ClassVar[tuple[int, ...]] = (1, 5, 10, 25)
    seeds: ClassVar[int] = 3

    regularisation: float = 1024.0
    bias: float = 100.0

    def fit(self, rows: Training, *, seed: int, progress: Progress, device: str = "cpu") -> Fitted:
        """Solve, see `Protocol.fit`."""
        head = LeastSquares(regularisation=self.regularisation, bias=self.bias).fit(rows.x, rows.y)
        return head, {"head": "least squares", "chosen": {"l2": self.regularisation}}


@dataclass(frozen=True)
class MtebImage(Protocol):
    """MTEB's image classification: 16 rows a class, logistic regression as scikit-learn has it, five experiments.

    C = 1, at most 100 iterations, embeddings as they are; the mean over the experiments counts. Nothing is chosen, and
    100 iterations are often too few to converge, which is part of the recipe.

    Source: embeddings-benchmark/mteb, ``AbsTaskImageClassification`` with ``logRegClassificationEvaluator``. It reads
    truncated images (``extract --truncated pad``).

    Deviations: the rows of each class are drawn from one numpy generator a seed, not by shuffling all rows anew in each
    experiment from the last order: the same distribution, other rows.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty.
    max_iter : int
        Limit on the iterations.
    """

    version: ClassVar[int] = 1
    shots: ClassVar[tuple[int, ...]] = (16,)
    seeds: ClassVar[int] = 5

    C: float = 1.0
    max_iter: int = 100

    def fit(self, rows: Training, *, seed: int, progress: Progress, device: str = "cpu") -> Fitted:
        """Fit, see `Protocol.fit`."""
        head = plain_logistic(self.C, max_iter=self.max_iter)
        return head, {"head": "logistic", "C": self.C, "converged": fit_quietly(head, rows.x, rows.y)}


PROTOCOLS: dict[str, Protocol] = {
    "default": Default(),
    "dino-knn": DinoKNN(),
    "dinov2-logreg": Dinov2LogReg(),
    "clip-lbfgs": ClipLBFGS(),
    "bigvision-fewshot": BigVisionFewShot(),
    "mteb-image": MtebImage(),
}


def find_protocol(name: str, head: Any = None) -> Protocol:
    """Return a protocol by name, the default one with another head where there is one.

    Raises
    ------
    EvaluationError
        When there is no such protocol, a published one is to have another head, or the head is none.
    """
    if name not in PROTOCOLS:
        raise EvaluationError(f"there is no protocol {name!r}; known: {', '.join(map(repr, sorted(PROTOCOLS)))}")
    protocol = PROTOCOLS[name]
    if head is None:
        return protocol
    if not isinstance(protocol, Default):
        raise EvaluationError(f"the protocol {name!r} has a head of its own; another one goes with 'default'")
    if not isinstance(head, str) and not is_predictor(head):
        what = f"the class {head.__name__}" if isinstance(head, type) else f"an object of type {type(head).__name__}"
        raise EvaluationError(
            f"a head is one of {', '.join(HEADS)}, or an object of a scikit-learn classifier or regressor; got {what}"
        )
    return dataclasses.replace(protocol, head=head)
