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
COMPARING = ("supcon", "triplet")  # They compare a batch's images with one another, and ArcFace with its prototypes.
LEAST_COMPARED = 8  # Images that a comparing loss needs at once: several of a class, and others to tell them from.

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

    Attributes
    ----------
    adds_up : bool
        Whether the mean of a batch is that of its parts' means: not where its images are compared with one another.

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
        self.adds_up = name not in COMPARING
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
        As for `CrossEntropy`; of the losses of metric learning, `class_batches` balances the batches instead.

    Returns
    -------
    CrossEntropy or MetricLoss
        Called with outputs (b, c), embeddings (b, d) and the batch; its parameters, if it has any, learn too.

    Raises
    ------
    FinetuneError
        When the recipe mixes pictures or smooths labels for a loss that compares whole pictures, warms up a head that
        such a loss does not train, or gives it too few pictures to compare.
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
    if recipe.warmup in ("probe", "sgd"):
        raise FinetuneError(
            f"--loss {recipe.loss} trains no head that could be warmed up, and fits one at the end; "
            "leave --warmup at auto"
        )
    if recipe.loss in COMPARING and recipe.batch_size < LEAST_COMPARED:
        raise FinetuneError(
            f"--loss {recipe.loss} compares the images of a batch, and {recipe.batch_size} are too few; "
            f"choose a --batch-size of {LEAST_COMPARED} or more"
        )
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
