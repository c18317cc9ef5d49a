"""The head as layers that learn beside a network, and as an estimator that is fitted to embeddings and saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from embedkit.finetuning.recipe import hidden_units
from embedkit.heads import LogisticHead, MLPHead

Array = npt.NDArray[Any]
_DEVIATION = 0.01  # Of a new head's weights: nearly even answers at first, whatever the width.


def make_layers(head: str, width: int, classes: int, *, seed: int = 0) -> nn.Module:
    """Return the layers of a new head.

    Parameters
    ----------
    head : str
        ``linear``, or ``mlp:UNITS`` for a hidden layer of so many units with ReLU.
    width : int
        Of the embedding.
    classes : int
        What is told apart.
    seed : int, default 0
        Draws the weights.

    Returns
    -------
    nn.Module
        ``nn.Linear``, or ``nn.Sequential`` of a linear layer, ReLU, and another linear layer.

    Raises
    ------
    FinetuneError
        When there is no such head.

    Examples
    --------
    >>> from embedkit.finetuning.layers import make_layers
    >>> sum(parameter.numel() for parameter in make_layers("mlp:512", 7 * 7 * 512, 5).parameters())
    12848133
    """
    hidden = hidden_units(head)
    with torch.random.fork_rng(devices=[]):  # The process's own numbers are not used up.
        torch.default_generator.manual_seed(seed)
        last = nn.Linear(hidden or width, classes)
        nn.init.normal_(last.weight, std=_DEVIATION)
        nn.init.zeros_(last.bias)
        if not hidden:
            return last
        first = nn.Linear(width, hidden)
        nn.init.kaiming_uniform_(first.weight, nonlinearity="relu")
        nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.ReLU(), last)


def load_estimator(layers: nn.Module, estimator: Any) -> None:
    """Give layers the weights of a fitted estimator, so that both answer alike.

    Standardisation is no layer: it is worked into the first one, exactly but for rounding.

    Parameters
    ----------
    layers : nn.Module
        As `make_layers` makes them.
    estimator : Pipeline, LogisticHead or MLPHead
        Fitted to codes 0, 1, ..., classes - 1. A pipeline is a scaler before a logistic regression.

    Notes
    -----
    With z = (x - mean) / scale, the answer w . z + b is (w / scale) . x + (b - (w / scale) . mean). A regression of two
    classes has one row of weights, and its answer is the difference of two logits: they get half of it each.
    """
    if isinstance(estimator, MLPHead):
        first, _, last = layers.children()
        scale, mean = estimator.scale_, estimator.mean_
        _fold(first, estimator.hidden_coef_.T, estimator.hidden_intercept_, mean, scale)
        _copy(last, estimator.coef_.T, estimator.intercept_)
        return
    regression: LogisticHead = estimator["regression"] if hasattr(estimator, "named_steps") else estimator
    weights, bias = regression.coef_.astype(np.float64), regression.intercept_.astype(np.float64)
    if len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    scaler = estimator.named_steps.get("scaler") if hasattr(estimator, "named_steps") else None
    mean, scale = (0.0, 1.0) if scaler is None else (scaler.mean_, scaler.scale_)
    _fold(layers, weights, bias, mean, scale)


def as_estimator(layers: nn.Module) -> LogisticHead | MLPHead:
    """Return layers as a head that can be saved: `embedkit.heads.save_head` writes it, and predicting needs no torch.

    Parameters
    ----------
    layers : nn.Module
        As `make_layers` makes them, of two classes or more.

    Returns
    -------
    LogisticHead or MLPHead
        Its labels are the codes 0, 1, ..., classes - 1.

    Examples
    --------
    >>> from embedkit.finetuning.layers import as_estimator, make_layers
    >>> as_estimator(make_layers("linear", 8, 3)).predict_proba([[0.0] * 8]).shape
    (1, 3)
    """
    linear = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)]
    weights, biases = zip(*((_numbers(layer.weight), _numbers(layer.bias)) for layer in linear), strict=True)
    classes = np.arange(len(biases[-1]))
    if len(linear) == 1:
        coef, intercept = weights[0], biases[0]
        if len(classes) == 2:  # One row for two classes, as scikit-learn has it.
            coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
        head = LogisticHead()
        head.coef_, head.intercept_, head.classes_ = coef, intercept, classes
        head.multi_label_, head.n_features_in_ = False, coef.shape[1]
        head.n_iter_, head.gradient_norm_, head.converged_ = 0, 0.0, True
        return head
    perceptron = MLPHead(hidden=len(biases[0]))
    width = weights[0].shape[1]
    perceptron.mean_, perceptron.scale_ = np.zeros(width), np.ones(width)
    perceptron.hidden_coef_, perceptron.hidden_intercept_ = np.ascontiguousarray(weights[0].T), biases[0]
    perceptron.coef_, perceptron.intercept_ = np.ascontiguousarray(weights[1].T), biases[1]
    perceptron.classes_, perceptron.multi_label_, perceptron.n_features_in_ = classes, False, width
    return perceptron


def fold_scaler(layer: nn.Module, mean: Array | float, scale: Array | float) -> None:
    """Work a standardisation into the linear layer that has learnt behind it."""
    assert isinstance(layer, nn.Linear)
    weights, bias = (_numbers(values).astype(np.float64) for values in (layer.weight, layer.bias))
    _fold(layer, weights, bias, mean, scale)


def _fold(layer: nn.Module, weights: Array, bias: Array, mean: Array | float, scale: Array | float) -> None:
    folded = weights.astype(np.float64) / scale
    _copy(layer, folded, bias - (folded * mean).sum(axis=1))


def _copy(layer: nn.Module, weights: Array, bias: Array) -> None:
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weights))
        layer.bias.copy_(torch.as_tensor(bias))


def _numbers(values: Tensor) -> Array:
    array: Array = values.detach().cpu().numpy().copy()
    return array
