"""FittedHead: a head that knows which embeddings it was fitted to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from embedkit.spec import EmbeddingSpec


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A fitted estimator with what is needed to use it on other images.

    Methods, attributes and steps of the estimator (``head["scaler"]`` of a pipeline) are reached through it.

    Parameters
    ----------
    estimator : estimator
        Fitted to float32 embeddings; it predicts class names, 0 and 1 for each label, or numbers.
    classes : list of str
        Names of the classes or labels, in the order of its probabilities; empty for regression.
    spec : EmbeddingSpec
        How the embeddings were made.
    task : str
        "class", "multi-label" or "regression".
    information : dict
        JSON values for people: protocol, parameters, the store's content id, and the recipe of its backbone.
    """

    estimator: Any = field(repr=False)
    classes: list[str]
    spec: EmbeddingSpec
    task: str = "class"
    information: dict[str, Any] = field(default_factory=dict, repr=False)

    def predict(self, embeddings: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the estimator's predictions for embeddings of shape (n, d)."""
        predicted: npt.NDArray[Any] = self.estimator.predict(embeddings)
        return predicted

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the head as a folder of JSON and arrays, see `embedkit.heads.save_head`.

        Parameters
        ----------
        path : path-like
            The folder.
        """
        from embedkit.heads import save_head

        save_head(
            path,
            self.estimator,
            classes=self.classes,
            spec=self.spec,
            task=self.task,
            information=self.information,
        )

    def __getitem__(self, step: Any) -> Any:
        return self.estimator[step]

    def __getattr__(self, name: str) -> Any:
        # Not for private names: copying and unpickling look those up before there is an estimator.
        if name.startswith("_") or name == "estimator":
            raise AttributeError(name)
        return getattr(self.estimator, name)
