"""What training makes small: cross-entropy with any targets, and the losses of metric learning."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from embedkit.errors import FinetuneError, MissingExtraError
from embedkit.finetuning.recipe import LOSSES, Recipe

METRIC_LOSSES = tuple(name for name in LOSSES if name != "cross-entropy")

# As their authors chose them, for embeddings of length one.
_TEMPERATURE, _MARGIN, _SCALE, _ARC_DEGREES = 0.1, 0.2, 64.0, 28.6


class Answers(Protocol):
    """What a loss reads of a batch.

    Attributes
    ----------
    codes : Tensor of shape (b,)
        int64.
    targets : Tensor of shape (b, c), or None
        float32: the share of each class in mixed pictures, or whatever else is to be hit.
    """

    @property
    def codes(self) -> Tensor:
        """Class code of every picture."""
        ...

    @property
    def targets(self) -> Tensor | None:
        """What is to be hit where codes do not say it."""
        ...


class CrossEntropy(nn.Module):
    """Cross-entropy of logits with codes, or with the shares of classes that mixed pictures have.

    Parameters
    ----------
    smoothing : float, default 0.0
        Share of the certainty that is spread over all classes.
    class_weights : array of shape (c,), optional
        What a picture of each class counts. The mean is over pictures and not over weights, so that the parts of a
        batch add up to the whole of it.
    """

    adds_up = True  # The mean of a batch is that of its parts' means, weighted by their images.
    weights: Tensor | None

    def __init__(self, smoothing: float = 0.0, class_weights: npt.NDArray[Any] | None = None) -> None:
        super().__init__()
        self.smoothing = smoothing
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, outputs: Tensor, embeddings: Tensor, batch: Answers) -> Tensor:
        """Return the mean loss () of logits (b, c)."""
        wanted = batch.codes if batch.targets is None else batch.targets
        losses = nn.functional.cross_entropy(
            outputs, wanted, weight=self.weights, label_smoothing=self.smoothing, reduction="none"
        )
        return losses.sum() / max(1, len(losses))


class MetricLoss(nn.Module):
    """A loss of pytorch-metric-learning over the embeddings of a batch, which the head takes no part in.

    Parameters
    ----------
    name : str
        One of `METRIC_LOSSES`.
    classes, dim : int
        Number of classes and width of the embedding.
    seed : int, default 0
        Of the prototypes that ArcFace learns.

    Raises
    ------
    MissingExtraError
        When pytorch-metric-learning is not installed.

    Notes
    -----
    Khosla et al., Supervised Contrastive Learning, 2020, with a temperature of 0.1. Deng et al., ArcFace, 2019, with a
    margin of 28.6 degrees and a scale of 64. Schroff et al., FaceNet, 2015: triplets whose negative lies no further
    than the margin, 0.2, behind the positive.
    """

    def __init__(self, name: str, classes: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        try:
            from pytorch_metric_learning import losses, miners
        except ImportError as error:
            raise MissingExtraError("pytorch-metric-learning", "metric") from error
        self._miner: Any = None
        self.loss: nn.Module
        if name == "supcon":
            self.loss = losses.SupConLoss(temperature=_TEMPERATURE)
        elif name == "arcface":
            self.loss = losses.ArcFaceLoss(classes, dim, margin=_ARC_DEGREES, scale=_SCALE)
            (prototypes,) = self.loss.parameters()
            random = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                prototypes.copy_(torch.randn(dim, classes, generator=random) * dim**-0.5)
        else:
            self.loss = losses.TripletMarginLoss(margin=_MARGIN)
            self._miner = miners.TripletMarginMiner(margin=_MARGIN, type_of_triplets="semihard")

    def forward(self, outputs: Tensor, embeddings: Tensor, batch: Answers) -> Tensor:
        """Return the mean loss () of embeddings (b, d)."""
        triplets = None if self._miner is None else self._miner(embeddings, batch.codes)
        loss: Tensor = self.loss(embeddings, batch.codes, triplets)
        return loss


def make_criterion(
    recipe: Recipe, classes: int, dim: int, *, class_weights: npt.NDArray[Any] | None = None
) -> CrossEntropy | MetricLoss:
    """Return what a recipe makes small.

    Parameters
    ----------
    recipe : Recipe
        Of which loss, smoothing and seed are read.
    classes, dim : int
        Number of classes and width of the embedding.
    class_weights : array of shape (c,), optional
        As for `CrossEntropy`; the losses of metric learning have classes balanced in each batch instead.

    Returns
    -------
    CrossEntropy or MetricLoss
        Called with outputs (b, c), embeddings (b, d) and the batch; its parameters, if it has any, learn too.

    Raises
    ------
    FinetuneError
        When the recipe mixes pictures or smooths labels for a loss that compares whole pictures.
    MissingExtraError
        When a package is needed that is not installed.

    Examples
    --------
    >>> import torch
    >>> from types import SimpleNamespace
    >>> from embedkit.finetuning.training.losses import make_criterion
    >>> from embedkit.finetuning.recipe import Recipe
    >>> criterion = make_criterion(Recipe(), classes=2, dim=8)
    >>> batch = SimpleNamespace(codes=torch.tensor([0, 1]), targets=None)
    >>> round(float(criterion(torch.zeros(2, 2), torch.zeros(2, 8), batch)), 4)  # log 2
    0.6931
    """
    if recipe.loss == "cross-entropy":
        return CrossEntropy(recipe.smoothing, class_weights)
    if recipe.augmentation.mixup or recipe.augmentation.cutmix:
        raise FinetuneError(f"--loss {recipe.loss} compares whole pictures; leave --mixup and --cutmix at 0")
    if recipe.smoothing:
        raise FinetuneError(f"--loss {recipe.loss} has no labels to smooth; leave --smoothing at 0")
    if classes < 2:
        raise FinetuneError(f"--loss {recipe.loss} needs two classes at least, and there is {classes}")
    return MetricLoss(recipe.loss, classes, dim, recipe.seed)


def balanced_weights(codes: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """Return what a picture of each class counts, so that all classes count alike and the mean picture counts 1.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.finetuning.training.losses import balanced_weights
    >>> balanced_weights(np.array([0, 0, 0, 1, 2, 2]), 3).round(2)
    array([0.67, 2.  , 1.  ], dtype=float32)
    """
    counts = np.bincount(codes, minlength=classes)
    present = counts > 0
    weights = np.zeros(classes, dtype=np.float32)
    weights[present] = len(codes) / (present.sum() * counts[present])
    return weights


def class_batches(
    codes: npt.NDArray[np.int64], batch_size: int, *, images_a_class: int = 4, seed: int = 0, epoch: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each batch of an epoch, of which every class has several.

    A loss that compares pictures learns nothing from a class that is in its batch once. Each row is in one batch an
    epoch; what is left of the classes at its end comes in batches of fewer classes.

    Parameters
    ----------
    codes : array of shape (n,)
        Class code of every row.
    batch_size : int
        Rows of a batch, rounded down to whole groups of a class; at least two groups.
    images_a_class : int, default 4
        Rows of a group.
    seed, epoch : int
        Draw it; nothing else does.

    Returns
    -------
    list of arrays of shape (b,)
        int64.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.finetuning.training.losses import class_batches
    >>> codes = np.repeat([0, 1, 2], 4)
    >>> [np.bincount(codes[rows]).tolist() for rows in class_batches(codes, 12, images_a_class=4)]
    [[4, 4, 4]]
    """
    random = np.random.default_rng([seed, epoch])
    queues = {code: random.permutation(np.flatnonzero(codes == code)) for code in np.unique(codes).tolist()}
    # Groups of each class, one round after the other: a batch then has as many different classes as it has groups.
    rounds = max((-(-len(rows) // images_a_class) for rows in queues.values()), default=0)
    groups: list[npt.NDArray[np.int64]] = []
    for number in range(rounds):
        span = slice(number * images_a_class, (number + 1) * images_a_class)
        found = [rows[span] for rows in queues.values() if len(rows[span])]
        groups += [found[place] for place in random.permutation(len(found)).tolist()]
    together = max(2, batch_size // images_a_class)
    starts = list(range(0, len(groups), together))
    if len(starts) > 1 and len(groups) - starts[-1] < 2:
        starts.pop()  # One class alone is nothing to compare with: it joins the batch before.
    return [np.concatenate(groups[start:stop]) for start, stop in zip(starts, [*starts[1:], len(groups)], strict=True)]
