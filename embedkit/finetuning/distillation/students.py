"""Students: the networks that distillation teaches, new ones or backbones that go on learning."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embedkit.backbones import Backbone
from embedkit.backbones.arguments import usable_device
from embedkit.backbones.copies import fresh_network, trainable_network
from embedkit.backbones.network import Network
from embedkit.errors import FinetuneError
from embedkit.finetuning.trainee import Trainee
from embedkit.spec import BUNDLED, EmbeddingSpec, Preprocessing


@dataclass(frozen=True, eq=False)
class Student:
    """A network that is to learn, and the facts that its folder will state.

    Attributes
    ----------
    network : Network
        In float32, in evaluation mode.
    spec : EmbeddingSpec
        Of its architecture, preprocessing and pooling; of its first weights too, where it began as a backbone.
    fresh : bool
        Whether its weights are random.
    """

    network: Network
    spec: EmbeddingSpec
    fresh: bool


def make_student(
    student: str | os.PathLike[str] | Backbone,
    pixels: Preprocessing,
    *,
    img_size: int | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    drop_path: float = 0.0,
    device: str = "auto",
) -> Student:
    """Return the network that is to be taught.

    Parameters
    ----------
    student : str, path-like or Backbone
        A bare timm architecture such as ``mobilenetv3_small_100`` begins with random weights. A backbone (a folder, a
        weight file, a timm name with its tag, or a loaded one) goes on from what it knows.
    pixels : Preprocessing
        A teacher's: a new network frames and scales its pixels alike, at its own size.
    img_size : int, optional
        Side of the crop, in pixels; by default 128 for a new network, and a backbone's own.
    arch_kwargs : mapping, optional
        Keyword arguments of a new architecture.
    seed : int, default 0
        Draws random weights.
    drop_path : float, default 0.0
        As for `Recipe`.
    device : str, default "auto"
        Where it learns.

    Returns
    -------
    Student

    Raises
    ------
    FinetuneError
        When a loaded backbone is to change its size, or computes in other than plain float32.
    BackboneError
        When there is no such architecture or backbone.
    """
    if not isinstance(student, Backbone) and not _has_weights(os.fspath(student)):
        return _fresh(os.fspath(student), pixels, img_size or 128, arch_kwargs or {}, seed, drop_path, device)
    if isinstance(student, Backbone):
        if img_size is not None or arch_kwargs:
            raise FinetuneError("a loaded student has its size and its arguments; load it with others instead")
        backbone = student
    else:
        backbone = Backbone.load(student, arch_kwargs=arch_kwargs, img_size=img_size, device=device)
    if backbone.spec.views or backbone.spec.precision != "float32":
        raise FinetuneError("a student learns on plain views in fp32: load it without views= and precision=")
    return Student(trainable_network(backbone, drop_path=drop_path), backbone.spec, fresh=False)


def with_projection(student: Student, width: int, *, freeze_norm: bool = False, seed: int = 0) -> Trainee:
    """Return a student with a linear map from its embedding to targets of a width."""
    projection = nn.Linear(student.spec.dim, width)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        projection.weight.copy_(torch.randn(projection.weight.shape, generator=random) * student.spec.dim**-0.5)
        projection.bias.zero_()
    return Trainee(student.network, projection.to(student.network.scale.device), freeze_norm=freeze_norm).eval()


def fit_projection(trainee: Trainee, embeddings: Tensor, targets: Tensor) -> None:
    """Give a student's projection the weights that reproduce targets best while the network stays as it is.

    A network that knows something would otherwise be led astray by a random map at first.

    Parameters
    ----------
    trainee : Trainee
        As `with_projection` makes it.
    embeddings, targets : Tensor of shape (n, d) and (n, m)
        Of the same images.

    Notes
    -----
    Ridge regression, with a penalty of a thousandth of the mean variance.
    """
    x, y = embeddings.double(), targets.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    products = (x - x_mean).T @ (x - x_mean)
    penalty = max(1e-12, 1e-3 * float(products.diagonal().mean()))
    weights = torch.linalg.solve(products + penalty * torch.eye(len(products)), (x - x_mean).T @ (y - y_mean))
    projection = trainee.head
    assert isinstance(projection, nn.Linear)
    with torch.no_grad():
        projection.weight.copy_(weights.T)
        projection.bias.copy_(y_mean - x_mean @ weights)


def keep_projection(student: Student, projection: nn.Module) -> Student:
    """Return a student whose embedding is what its projection says, as the classifier of timm's network.

    Parameters
    ----------
    student : Student
        Is left as it is.
    projection : nn.Module
        The linear map that learned with it.

    Returns
    -------
    Student

    Raises
    ------
    FinetuneError
        When the architecture ends otherwise than with a linear classifier upon its embedding.
    """
    assert isinstance(projection, nn.Linear)
    network, width = student.network, projection.out_features
    model = copy.deepcopy(network.model).cpu()
    try:
        model.reset_classifier(width)  # type: ignore[operator]
        classifier = model.get_classifier()  # type: ignore[operator]
        classifier.load_state_dict(projection.state_dict())
    except (AttributeError, RuntimeError) as error:
        raise FinetuneError(
            f"{student.spec.backbone} has no linear classifier to keep a projection in: {error}"
        ) from error
    projected = Network(model.eval(), network.preprocessing, network.pools)
    height, width_ = network.preprocessing.img_size
    crops = torch.arange(3 * height * width_).remainder(256).to(torch.uint8).view(1, 3, height, width_)
    with torch.no_grad():
        wanted = projection(network(crops.to(network.scale.device))[0]).cpu()
        if student.spec.pool != "default" or not torch.allclose(projected(crops)[0], wanted, rtol=1e-3, atol=1e-3):
            raise FinetuneError(
                f"the {student.spec.pool} pooling of {student.spec.backbone} is not what its classifier sees; leave "
                "--project out"
            )
    return Student(projected, replace(student.spec, dim=width), student.fresh)


def _has_weights(student: str) -> bool:
    """Return whether a student is named as a backbone with weights, and not as an architecture alone."""
    return (
        student == BUNDLED
        or Path(student).expanduser().exists()
        or any(sign in student for sign in (".", ":", "/", os.sep))
    )


def _fresh(
    arch: str, pixels: Preprocessing, img_size: int, arch_kwargs: Mapping[str, Any], seed: int, drop_path: float,
    device: str,
) -> Student:  # fmt: skip
    pixels = replace(pixels, img_size=(img_size, img_size))
    network = fresh_network(arch, pixels, arch_kwargs=arch_kwargs, seed=seed, drop_path=drop_path)
    with torch.no_grad():
        dim = int(network(torch.zeros(1, 3, img_size, img_size, dtype=torch.uint8))[0].shape[1])
    spec = EmbeddingSpec(
        backbone=arch, weights_sha256="", dim=dim, arch_kwargs=dict(arch_kwargs), pool=network.pools[0],
        preprocessing=pixels,
    )  # fmt: skip
    return Student(network.to(usable_device(device)), spec, fresh=True)
