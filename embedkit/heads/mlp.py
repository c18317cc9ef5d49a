"""A perceptron of one hidden layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from embedkit.errors import EvaluationError
from embedkit.heads.devices import require_device
from embedkit.heads.labels import encode

Array = npt.NDArray[Any]
LEAST_STEPS = 200  # Small training sets are seen more often than `epochs` times.


class _MLP(BaseEstimator):  # type: ignore[misc]
    """What both perceptrons have: standardised rows, one hidden layer of ReLU, AdamW falling as a cosine."""

    def __init__(
        self,
        hidden: int = 512,
        weight_decay: float = 1e-4,
        learning_rate: float = 1e-3,
        epochs: int = 30,
        batch_size: int = 256,
        random_state: int | None = 0,
        device: str = "cpu",
    ) -> None:
        self.hidden = hidden
        self.weight_decay = weight_decay
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.random_state = random_state
        self.device = device

    def _train(self, rows: Array, targets: Array, outputs: int, loss: str) -> None:
        """Fit the four arrays of weights to targets: codes (n,), or float32 (n, outputs)."""
        if self.hidden < 1 or self.epochs < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise EvaluationError("hidden, epochs, batch_size and learning_rate must be above 0")
        require_device(self.device)
        import torch
        from torch.nn import functional

        self.mean_, self.scale_ = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
        self.scale_[self.scale_ <= 1e-12 * np.abs(self.mean_)] = 1
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        layers = [(rows.shape[1], self.hidden), (self.hidden, outputs)]
        weights = []
        for size, width in layers:
            bound = (6 / size) ** 0.5 if width == self.hidden else size**-0.5
            weights.append((torch.rand(size, width, generator=generator) * 2 - 1).mul_(bound))
            weights.append(torch.zeros(width))
        parameters = [weight.to(self.device).requires_grad_() for weight in weights]
        optimiser = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        batches = -(-len(rows) // self.batch_size)
        epochs = max(self.epochs, -(-LEAST_STEPS // batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
        measures: dict[str, Callable[..., torch.Tensor]] = {
            "softmax": functional.cross_entropy,
            "sigmoid": functional.binary_cross_entropy_with_logits,
            "square": functional.mse_loss,
        }
        for _ in range(epochs):
            order = torch.randperm(len(rows), generator=generator).numpy()
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                x = torch.as_tensor(self._standardised(rows[chosen]), device=self.device)
                hidden = torch.addmm(parameters[1], x, parameters[0]).relu()
                logits = torch.addmm(parameters[3], hidden, parameters[2])
                optimiser.zero_grad()
                measures[loss](logits, torch.as_tensor(targets[chosen], device=self.device)).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
        arrays = [parameter.detach().cpu().numpy() for parameter in parameters]
        self.hidden_coef_, self.hidden_intercept_, self.coef_, self.intercept_ = arrays

    def _standardised(self, rows: Array) -> Array:
        scaled: Array = ((rows - self.mean_) / self.scale_).astype(np.float32)
        return scaled

    def _outputs(self, X: npt.ArrayLike) -> Array:
        check_is_fitted(self)
        queries = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        outputs = [
            np.maximum(
                self._standardised(queries[start : start + 8192]) @ self.hidden_coef_ + self.hidden_intercept_, 0
            )
            @ self.coef_
            + self.intercept_
            for start in range(0, len(queries), 8192)
        ]
        return np.concatenate(outputs)


class MLPHead(ClassifierMixin, _MLP):  # type: ignore[misc]
    """Perceptron of one hidden layer that predicts a class, or several labels a row.

    Parameters
    ----------
    hidden : int, default 512
        Units of the hidden layer, with ReLU.
    weight_decay : float, default 1e-4
        Of AdamW.
    learning_rate : float, default 1e-3
        At first; it falls to 0 as a cosine.
    epochs : int, default 30
        How often rows are seen; more often where that makes fewer than 200 steps.
    batch_size : int, default 256
        Rows of a step.
    random_state : int, default 0
        Draws first weights and the order of rows.
    device : str, default "cpu"
        Where to compute, in torch's words.

    Attributes
    ----------
    classes_ : array of shape (c,)
        The labels seen in `fit`, sorted; column numbers with several labels a row.

    Examples
    --------
    >>> from embedkit.heads import MLPHead
    >>> head = MLPHead(hidden=8).fit([[0.0], [1.0], [2.0], [3.0]], ["low", "low", "high", "high"])
    >>> head.predict([[0.2], [2.8]]).tolist()
    ['low', 'high']
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> MLPHead:
        """Fit to rows of shape (n, d) and labels of shape (n,), or 0 and 1 of shape (n, c).

        Raises
        ------
        EvaluationError
            When there are fewer than two classes, or a parameter makes no sense.
        ValueError
            When `X` is not a finite matrix or `y` does not fit it.
        """
        rows, labels = validate_data(self, X, y, dtype=[np.float32, np.float64], multi_output=True)
        coded = encode(labels)
        self.classes_, self.multi_label_ = coded.classes, coded.several
        self._train(rows, coded.codes, len(coded.classes), "sigmoid" if coded.several else "softmax")
        return self

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Return the probability of each class or label, of shape (q, c)."""
        logits = self._outputs(X).astype(np.float64)
        if self.multi_label_:
            chances: Array = 0.5 * (1 + np.tanh(0.5 * logits))
            return chances
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        proportions: Array = shares / shares.sum(axis=1, keepdims=True)
        return proportions

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the likeliest label of each row, or 0 and 1 of shape (q, c) for several labels a row."""
        logits = self._outputs(X)
        labels: Array = (logits > 0).astype(np.int64) if self.multi_label_ else self.classes_[logits.argmax(axis=1)]
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MLPRegressor(RegressorMixin, _MLP):  # type: ignore[misc]
    """Perceptron of one hidden layer that predicts a number; its parameters are those of `MLPHead`.

    Attributes
    ----------
    centre_, spread_ : float
        Mean and standard deviation of the numbers seen in `fit`.
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> MLPRegressor:
        """Fit to rows of shape (n, d) and numbers of shape (n,); see `MLPHead.fit`."""
        rows, numbers = validate_data(self, X, y, dtype=[np.float32, np.float64], y_numeric=True)
        numbers = numbers.astype(np.float64)
        self.centre_, self.spread_ = float(numbers.mean()), float(numbers.std()) or 1.0
        self._train(rows, ((numbers - self.centre_) / self.spread_).astype(np.float32)[:, None], 1, "square")
        return self

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the number of each row."""
        numbers: Array = self._outputs(X)[:, 0].astype(np.float64) * self.spread_ + self.centre_
        return numbers
