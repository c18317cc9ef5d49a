"""Backbone: what turns images into embeddings."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from embedkit.backbones.loading import Source, build, resolve, weights_sha256
from embedkit.backbones.pooling import check_pool, pooled
from embedkit.backbones.streaming import in_batches, stream
from embedkit.backbones.timm_import import import_timm
from embedkit.errors import BackboneError, ImageError
from embedkit.images import CROP_MODES, INTERPOLATIONS, crop, read_image
from embedkit.spec import EmbeddingSpec, Preprocessing


class Backbone:
    """A frozen timm network without its classifier, with its preprocessing and its spec.

    Made by `Backbone.load`.

    Attributes
    ----------
    spec : EmbeddingSpec
        The facts that fix the numbers.
    recipe : dict
        The arguments of `Backbone.load` that make this backbone again; a store keeps them.
    device : torch.device
        Where the network runs.
    """

    spec: EmbeddingSpec
    recipe: dict[str, Any]
    device: torch.device

    def __init__(self) -> None:
        raise TypeError("load a backbone with Backbone.load(model)")

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        arch: str | None = None,
        arch_kwargs: Mapping[str, Any] | None = None,
        img_size: int | Sequence[int] | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        interpolation: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pool: str = "default",
        exif: bool = True,
        device: str = "auto",
    ) -> Backbone:
        """Load a backbone.

        Parameters
        ----------
        model : str or path-like
            A timm name, best with its tag (weights from the hub or timm's local cache); a weight file (.safetensors,
            or .pth read without unpickling objects); a JSON sidecar that says architecture, keyword arguments and
            preprocessing; or a folder that holds one.
        arch : str, optional
            timm architecture of a weight file. With a tag, that tag's preprocessing is used.
        arch_kwargs : mapping, optional
            Keyword arguments of the architecture, such as ``{"pad_type": "same"}``.
        img_size, crop_pct, crop_mode, interpolation, mean, std : optional
            Replace single facts of the preprocessing that the weights were trained with. `img_size` is one side or
            (height, width), in pixels.
        pool : str, default "default"
            One of default, avg, max, cls and flatten, or ``MODULE:POOL`` for the output of a module inside the network,
            such as ``layer3:avg``.
            The model's own pooling, because that is what its weights were trained with. The others pool the last
            feature map or tokens.
        exif : bool, default True
            Whether EXIF orientation is applied. Phones store photographs sideways; published protocols mostly
            ignored that.
        device : str, default "auto"
            "auto" takes the first GPU, otherwise the processor; any torch device is taken at its word.

        Returns
        -------
        Backbone
            In evaluation mode, its embedding width measured by a forward pass.

        Raises
        ------
        BackboneError
            When the model is unknown (with the closest names), its weights cannot be had (with how to work offline),
            do not fit the architecture, or an option makes no sense for it.

        Examples
        --------
        >>> import embedkit as ek
        >>> backbone = ek.Backbone.load("vit_small_patch14_dinov2.lvd142m", img_size=224)  # doctest: +SKIP
        >>> backbone.embed("query.jpg").shape  # doctest: +SKIP
        (384,)
        """
        check_pool(pool)
        source = resolve(os.fspath(model), arch, arch_kwargs)
        size = _size(img_size)
        network = build(source, size)
        overrides: dict[str, Any] = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
        overrides |= {"mean": mean, "std": std, "input_size": None if size is None else (3, *size)}
        backbone = cls.__new__(cls)
        backbone.device = _device(device)
        backbone._network = network.eval().requires_grad_(False)
        preprocessing = _preprocessing(network, overrides, exif)
        backbone._set_up(preprocessing, pool, source)
        where = os.path.abspath(os.path.expanduser(model)) if source.weights else os.fspath(model)
        backbone.recipe = _without_defaults(
            model=where, arch=arch, arch_kwargs=dict(arch_kwargs or {}), img_size=size, crop_pct=crop_pct,
            crop_mode=crop_mode, interpolation=interpolation, mean=mean, std=std, pool=pool, exif=exif,
        )  # fmt: skip
        return backbone

    @classmethod
    def reload(
        cls,
        spec: EmbeddingSpec,
        recipe: Mapping[str, Any],
        *,
        model: str | os.PathLike[str] | None = None,
        device: str = "auto",
    ) -> Backbone:
        """Load the backbone that a store was made with, and prove that it is the same one.

        Parameters
        ----------
        spec : EmbeddingSpec
            The store's ``spec``.
        recipe : mapping
            The store's ``recipe``. It may come from a stranger: only `spec` is believed.
        model : str or path-like, optional
            Where the weights are now, when they have moved since.
        device : str, default "auto"
            As for `load`.

        Returns
        -------
        Backbone
            Its spec equals `spec`.

        Raises
        ------
        BackboneError
            When the recipe names no model, or the weights cannot be had.
        SpecMismatchError
            When what was loaded is another backbone, naming the fields that differ.
        """
        known = inspect.signature(cls.load).parameters.keys() - {"device"}
        arguments = {name: value for name, value in recipe.items() if name in known}
        if model is not None:
            arguments["model"] = os.fspath(model)
        if spec.backbone == "imported":
            raise BackboneError(
                "these embeddings were imported and do not say what made them, so no image can be embedded alike; "
                "search with embeddings or rows"
            )
        if not isinstance(arguments.get("model"), str):
            raise BackboneError("the store does not say where its backbone came from; name it with -m MODEL (model=)")
        try:
            backbone = cls.load(**arguments, device=device)
        except BackboneError as error:
            raise BackboneError(f"{error}\nIf the weights have moved, say where they are with -m MODEL") from error
        spec.require_same(backbone.spec, f"{arguments['model']} is not the backbone that made the store")
        return backbone

    _network: nn.Module

    def _set_up(self, preprocessing: Preprocessing, pool: str, source: Source) -> None:
        sha256 = weights_sha256(self._network)
        # Interleaved channels are how decoded pixels lie in memory, and the faster layout for convolutions.
        self._network = self._network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        config = getattr(self._network, "pretrained_cfg", {})
        self._pool, self.preprocessing = pool, preprocessing
        self._layer_dims: dict[str, int] = {}
        self._mean = torch.tensor(preprocessing.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=self.device).view(3, 1, 1)
        try:
            dim = self._forward(np.zeros((1, *preprocessing.img_size, 3), dtype=np.uint8), [pool])[0].shape[1]
        except (RuntimeError, AssertionError) as error:
            raise BackboneError(
                f"{source.arch} cannot embed {preprocessing.img_size[0]} x {preprocessing.img_size[1]} pixels: {error}"
            ) from error
        self.spec = EmbeddingSpec(
            backbone=str(config.get("architecture") or source.arch.partition(".")[0]),
            tag="" if source.weights else str(config.get("tag") or ""),
            arch_kwargs=source.arch_kwargs,
            weights_sha256=sha256,
            pool=pool,
            dim=dim,
            preprocessing=preprocessing,
        )

    def __repr__(self) -> str:
        return f"<Backbone {self.description}>"

    @property
    def dim(self) -> int:
        """Width of the embedding."""
        return self.spec.dim

    @property
    def description(self) -> str:
        """One line for people: name, width, pixels, device."""
        pixels, name = self.preprocessing, f"{self.spec.backbone}.{self.spec.tag}".rstrip(".")
        height, width = pixels.img_size
        return (
            f"{name}, {self.dim} wide, {height} x {width} px ({pixels.crop_mode} crop {pixels.crop_pct:g}, "
            f"{pixels.interpolation}), {self.spec.pool} pooling, on {self.device}"
        )

    def embed(self, images: Any, *, batch_size: int = 32, workers: int | None = None) -> npt.NDArray[np.float32]:
        """Embed one image or many.

        Parameters
        ----------
        images : path, bytes, PIL image, array, or a sequence of them
            An array is one image of shape (h, w) or (h, w, c), or many of shape (n, h, w, c).
        batch_size : int, default 32
            Images a forward pass.
        workers : int, optional
            Decoding threads; by default one for each usable processor.

        Returns
        -------
        array of shape (d,) or (n, d)
            float32, not normalised; (d,) for a single image.

        Raises
        ------
        ImageError
            For the first image that cannot be read, naming it.

        Examples
        --------
        >>> import embedkit as ek
        >>> backbone = ek.Backbone.load("resnet18.a1_in1k")  # doctest: +SKIP
        >>> backbone.embed(["a.jpg", "b.jpg"]).shape  # doctest: +SKIP
        (2, 512)
        """
        single = isinstance(images, str | bytes | os.PathLike) or _is_pil(images) or getattr(images, "ndim", 4) < 4
        parts = [np.empty((0, self.dim), dtype=np.float32)]
        pixels = partial(self.pixels, id=None)
        items = [images] if single else images
        for batch in stream(in_batches(items, batch_size), pixels, self.embed_pixels, workers=workers):
            if batch.failures:
                raise batch.failures[0][1]
            parts.append(batch.embeddings)
        embeddings = np.concatenate(parts)
        return embeddings[0] if single else embeddings

    def pixels(self, source: Any, *, id: str | None = None) -> npt.NDArray[np.uint8]:
        """Return the crop that the network sees, before scaling, as uint8 of shape (h, w, 3).

        Parameters
        ----------
        source : path, bytes, PIL image or array
            One image.
        id : str, optional
            What an error calls it.

        Raises
        ------
        ImageError
            When it cannot be read.
        """
        image = read_image(source, id=id, exif=self.preprocessing.exif)
        try:
            return crop(image, self.preprocessing)
        except ImageError as error:  # The crop knows pixels only, not whose they are.
            name = id or (os.fspath(source) if isinstance(source, str | os.PathLike) else error.id)
            raise ImageError(name, error.reason) from error

    def embed_pixels(self, crops: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Embed crops that `pixels` made, in one forward pass.

        Parameters
        ----------
        crops : sequence of arrays of shape (h, w, 3)
            uint8.

        Returns
        -------
        array of shape (len(crops), d)
            float32.

        Raises
        ------
        BackboneError
            When the network returns infinities or NaN: its weights are damaged or of another model.
        """
        return self.embed_layers(crops, ())[""]

    def embed_layers(
        self, crops: Sequence[npt.NDArray[np.uint8]], layers: Sequence[str]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Embed crops in several ways in one forward pass.

        Parameters
        ----------
        crops : sequence of arrays of shape (h, w, 3)
            uint8, as `pixels` makes them.
        layers : sequence of str
            Poolings as `load` takes them, such as ``avg`` or ``layer3:avg``.

        Returns
        -------
        dict of str to array of shape (len(crops), d)
            float32: the backbone's own embedding under the empty name, and each layer under its own.

        Raises
        ------
        BackboneError
            As `embed_pixels`; and when the network has no such layer.
        """
        pools = [self._pool, *layers]
        if not crops:
            return {name: np.empty((0, self.layer_spec(name).dim), dtype=np.float32) for name in ("", *layers)}
        found = self._forward(np.stack(crops), pools)
        if not all(np.isfinite(embeddings).all() for embeddings in found):
            raise BackboneError(
                f"{self.spec.backbone} returned infinities or NaN for real pixels; are these its weights, undamaged?"
            )
        return dict(zip(("", *layers), found, strict=True))

    def layer_spec(self, layer: str) -> EmbeddingSpec:
        """Return the spec of one of `embed_layers`: that of this backbone with another pooling.

        Raises
        ------
        BackboneError
            When the network has no such layer.
        """
        if layer and layer not in self._layer_dims:
            check_pool(layer)
            zeros = np.zeros((1, *self.preprocessing.img_size, 3), dtype=np.uint8)
            self._layer_dims[layer] = self._forward(zeros, [layer])[0].shape[1]
        return replace(self.spec, pool=layer, dim=self._layer_dims[layer]) if layer else self.spec

    def _forward(self, crops: npt.NDArray[np.uint8], pools: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """Return embeddings of shape (b, d) for crops of shape (b, h, w, 3), one array for each pooling."""
        count = len(crops)
        if count == 1:
            # Alone, an image goes through other routines of the processor's library, and its last bits differ.
            crops = np.concatenate([crops, crops])
        batch = torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2)  # (b, 3, h, w), channels last
        with torch.inference_mode():
            # The same three operations in the same order as timm's transform, so that every bit agrees.
            x = batch.float().div_(255.0).sub_(self._mean).div_(self._std)
            return [found[:count].float().cpu().numpy() for found in pooled(self._network, x, pools)]


def _size(img_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if img_size is None:
        return None
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < 1:
        raise BackboneError(f"img_size is one side or (height, width) in pixels, got {img_size}")
    return int(sides[0]), int(sides[1])


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(f"device {device!r} cannot be used: {reason}; only --device auto chooses") from error
    return found


def _preprocessing(network: nn.Module, overrides: Mapping[str, Any], exif: bool) -> Preprocessing:
    """Return the preprocessing that the weights were trained with, and the facts that were overridden."""
    arguments = {name: value for name, value in overrides.items() if value is not None}
    for name in ("mean", "std"):
        if name in arguments and len(arguments[name]) not in (1, 3):
            raise BackboneError(f"--{name} takes one number or three, got {len(arguments[name])}")
    config = import_timm().data.resolve_model_data_config(network, args=arguments)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise BackboneError(f"this backbone takes {channels} channels; embedkit embeds RGB images")
    if config["crop_mode"] not in CROP_MODES:
        raise BackboneError(f"unknown crop mode {config['crop_mode']!r}; choose one of {', '.join(CROP_MODES)}")
    if config["interpolation"] not in INTERPOLATIONS:
        raise BackboneError(
            f"unknown interpolation {config['interpolation']!r}; choose one of {', '.join(INTERPOLATIONS)}"
        )
    mean, std = (tuple(float(value) for value in config[name]) for name in ("mean", "std"))
    crop_pct = float(config["crop_pct"])
    if not 0 < crop_pct <= 1 or not all(math.isfinite(value) for value in mean) or min(std) <= 0:
        raise BackboneError(f"crop_pct must be in (0, 1] and std positive, got {crop_pct}, {std}")
    return Preprocessing(
        img_size=(height, width), crop_pct=crop_pct, crop_mode=config["crop_mode"],
        interpolation=config["interpolation"], mean=mean, std=std, exif=exif,
    )  # fmt: skip


def _without_defaults(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that differ from those of `Backbone.load`, as JSON values."""
    defaults: dict[str, Any] = {"pool": "default", "exif": True, "arch_kwargs": {}}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    return {name: value for name, value in plain.items() if value != defaults.get(name)}


def _is_pil(value: object) -> bool:
    # By name: this room does not import Pillow.
    return any(kind.__module__.startswith("PIL.") for kind in type(value).__mro__)
