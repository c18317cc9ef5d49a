"""Backbone: what turns images into embeddings."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from embedkit.backbones import arguments as given
from embedkit.backbones.choosing import Choice, choose
from embedkit.backbones.engines import Engine
from embedkit.backbones.loading import Source, build, resolve, weights_sha256
from embedkit.backbones.network import whole_size
from embedkit.backbones.nvjpeg import nvjpeg_decoder
from embedkit.backbones.passes import Passes, finite
from embedkit.backbones.pooling import whole_name
from embedkit.backbones.presets import apply_preset
from embedkit.backbones.reading import Reader
from embedkit.backbones.streaming import embed_many, is_one_image, with_threads
from embedkit.errors import BackboneError
from embedkit.images import MAX_PIXELS
from embedkit.spec import BUNDLED, EmbeddingSpec, Preprocessing


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
    _reader: Reader
    _passes: Passes

    def __init__(self) -> None:
        raise TypeError("load a backbone with Backbone.load(model)")

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] = BUNDLED,
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
        icc: bool = False,
        truncated: str = "fail",
        max_pixels: int = MAX_PIXELS,
        decode: str = "standard",
        precision: str = "fp32",
        views: Sequence[str] = (),
        preset: str = "default",
        device: str = "auto",
    ) -> Backbone:
        """Load a backbone.

        Parameters
        ----------
        model : str or path-like, default "nano"
            "nano", the small one in the box; a timm name, best with its tag (weights from the hub or timm's cache); a
            weight file (.safetensors, or .pth read without unpickling objects); a JSON sidecar that says architecture
            and preprocessing; or a folder that holds one, which is "./nano" where it has that name.
        arch : str, optional
            timm architecture of a weight file. With a tag, that tag's preprocessing is used.
        arch_kwargs : mapping, optional
            Keyword arguments of the architecture, such as ``{"pad_type": "same"}``.
        img_size, crop_pct, crop_mode, interpolation, mean, std : optional
            Replace single facts of the preprocessing that the weights were trained with. `img_size` is one side or
            (height, width), in pixels.
        pool : str, default "default"
            The model's own pooling: what its weights were trained with, those of an adapted folder too. avg, max, gem,
            cls, flatten and none (every token) work on the last feature map or tokens; ``MODULE:POOL`` on what a module
            inside returns, such as ``layer3:avg``, where MODULE may be the number of a feature level: ``-2:gem``.
        exif : bool, default True
            Whether EXIF orientation is applied: phones store photographs sideways. Most protocols ignored that.
        icc : bool, default False
            Whether embedded colour profiles are applied. Published protocols ignored those too.
        truncated : {"fail", "pad"}, default "fail"
            Whether an image whose end is missing is a failure, or is embedded with grey or black in its place.
        max_pixels : int, default 178956970
            Larger images are refused before they are decoded. Not in the spec: it moves no number.
        decode : {"standard", "exact", "fast", "gpu"}, default "standard"
            How pixels are decoded and resized. "standard" differs from timm's transform by one grey level on a few
            pixels in a thousand (cosine above 0.9999) and takes a third of the time; "exact" equals it bit for bit;
            "fast" decodes large JPEGs at a fraction of their size (cosine above 0.999); "gpu" has nvJPEG decode them.
        precision : {"fp32", "bf16", "fp16"}, default "fp32"
            Number format of the forward pass. Half the bits may take half the time, and move the numbers.
        views : sequence of str, optional
            More views of each image, whose embeddings are averaged with that of the plain one: ``flip`` for its mirror
            image, ``five-crop`` for the four corners, ``scale:0.7`` for a smaller one.
        preset : {"default", "published"}, default "default"
            What holds where nothing is given: timm's, or for DINO, DINOv2, MAE and CLIP the published evaluation's.
        device : str, default "auto"
            "auto" takes the first GPU, otherwise the processor; any torch device is taken at its word.

        Returns
        -------
        Backbone
            In evaluation mode.

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
        source = resolve(model, arch, arch_kwargs)
        said = {"img_size": img_size, "pool": pool, "decode": decode, "exif": exif, "icc": icc, "truncated": truncated}
        reading = given.with_defaults(said, source.defaults)
        img_size, pool, decode = (reading.pop(name) for name in ("img_size", "pool", "decode"))
        given.check_choices(decode, precision, views, reading["truncated"], preset, max_pixels)
        facts: dict[str, Any] = {"img_size": img_size, "crop_pct": crop_pct, "interpolation": interpolation}
        facts, kwargs = apply_preset(preset, source.arch, facts, arch_kwargs or {})
        size = given.image_size(facts.pop("img_size"))
        network = build(source := replace(source, arch_kwargs={**source.arch_kwargs, **kwargs}), size)
        facts |= {"crop_mode": crop_mode, "mean": mean, "std": std}
        backbone = cls.__new__(cls)
        backbone.device = given.usable_device(device)
        preprocessing = given.preprocessing_of(network, size, facts, decode, **reading)
        resizer = nvjpeg_decoder(backbone.device, preprocessing) if decode == "gpu" else None
        backbone._reader = Reader(whole_size(preprocessing, views), max_pixels, resizer)
        pool = whole_name(network, pool)
        backbone._set_up(network.eval().requires_grad_(False), preprocessing, pool, source, precision, tuple(views))
        where = source.name or (os.path.abspath(os.path.expanduser(model)) if source.weights else os.fspath(model))
        backbone.recipe = given.without_defaults(
            model=where, arch=arch, arch_kwargs=kwargs, img_size=size, **facts, pool=pool, **reading, decode=decode,
            precision=precision, views=tuple(views),
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
        max_pixels: int = MAX_PIXELS,
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
        device, max_pixels
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
        # What guards this machine is not for a stranger's recipe to say.
        known = inspect.signature(cls.load).parameters.keys() - {"device", "max_pixels"}
        arguments = given.reload_arguments(spec, recipe, known, model)
        try:
            backbone = cls.load(**arguments, device=device, max_pixels=max_pixels)
        except BackboneError as error:
            raise BackboneError(f"{error}\nIf the weights have moved, say where they are with -m MODEL") from error
        spec.require_same(backbone.spec, given.mismatch(arguments["model"]))
        return backbone

    def _set_up(
        self, network: nn.Module, preprocessing: Preprocessing, pool: str, source: Source, precision: str,
        views: tuple[str, ...],
    ) -> None:  # fmt: skip
        sha256 = weights_sha256(network)
        # Interleaved channels are how decoded pixels lie in memory, and the faster layout for convolutions.
        network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        config = getattr(network, "pretrained_cfg", {})
        self._pool, self.preprocessing, crop_size = pool, preprocessing, self._reader.preprocessing.img_size
        if "five-crop" in views and crop_size == preprocessing.img_size:
            raise BackboneError("five-crop needs a crop smaller than the image: --crop-pct below 1, such as 0.875")
        self._passes = Passes(network, self.device, preprocessing, crop_size, views, precision)
        dim, tokens = self._passes.first_width(pool, source.arch)
        self.spec = EmbeddingSpec(
            backbone=str(config.get("architecture") or source.arch.partition(".")[0]),
            tag="" if source.weights else str(config.get("tag") or ""),
            arch_kwargs=source.arch_kwargs,
            weights_sha256=sha256,
            pool=pool,
            dim=dim,
            preprocessing=preprocessing,
            precision=given.PRECISIONS[precision],
            views=views,
            tokens=tokens,
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
        pixels, name = self.preprocessing, self.spec.name_of(self.recipe)
        return (
            f"{name}, {self.dim} wide, {' x '.join(map(str, pixels.img_size))} px ({pixels.crop_mode} crop "
            f"{pixels.crop_pct:g}, {pixels.interpolation}), {self.spec.pool} pooling, on {self.device}"
        )

    def embed(
        self, images: Any, *, batch_size: int | None = None, workers: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Embed one image or many.

        Parameters
        ----------
        images : path, bytes, PIL image, array, or a sequence of them
            An array is one image of shape (h, w) or (h, w, c), or many of shape (n, h, w, c).
        batch_size : int, optional
            Images a forward pass; by default 8 on a processor, whose caches hold no more, and 256 on a GPU.
        workers : int, optional
            Threads; by default one for each usable processor.

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
        single = is_one_image(images)
        embeddings = embed_many(self, [images] if single else images, batch_size or self.batch_size, workers)
        return embeddings[0] if single else embeddings

    @property
    def batch_size(self) -> int:
        """Images a forward pass, where nobody asks for another number."""
        return 8 if self.device.type == "cpu" else 256

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
        return self._reader(source, id)

    @property
    def max_pixels(self) -> int:
        """The most pixels that an image may have."""
        return self._reader.max_pixels

    @property
    def time_limit(self) -> float | None:
        """How many seconds an image may take to decode; None without a limit, when it is not `isolated`."""
        return None if self._reader.isolated is None else self._reader.isolated.seconds

    @contextmanager
    def isolated(self, seconds: float = 30.0) -> Iterator[Backbone]:
        """Return this backbone as one that decodes in child processes, which end with the context.

        A decoder that takes longer than `seconds`, or crashes, then costs one image, of the kind "timeout".

        Raises
        ------
        BackboneError
            When its images are decoded on a GPU, which the child processes do not use.

        Examples
        --------
        >>> with backbone.isolated(seconds=10) as careful:  # doctest: +SKIP
        ...     store = ek.extract("photos/", "photos.h5", careful)
        """
        with self._reader.elsewhere(seconds) as reader:
            other = copy.copy(self)
            other._reader = reader
            yield other

    def embed_pixels(self, crops: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Return the embeddings of crops that `pixels` made, of shape (len(crops), d): those of `embed_layers`."""
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
            When the network has no such layer, or returns infinities or NaN: its weights are damaged or of another
            model.
        """
        return self.run(self._passes.eager([self._pool, *layers]), crops, layers)

    def run(
        self, engine: Engine, crops: Sequence[npt.NDArray[np.uint8]], layers: Sequence[str]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return what `embed_layers` returns, by an engine that `choose_engine` chose for these layers."""
        names = ("", *layers)
        if not crops:
            return {name: np.empty((0, self.layer_spec(name).dim), dtype=np.float32) for name in names}
        return dict(zip(names, finite(engine(crops), self.spec.backbone), strict=True))

    def choose_engine(
        self,
        crops: Sequence[npt.NDArray[np.uint8]],
        count: int,
        *,
        layers: Sequence[str] = (),
        engine: str = "auto",
        batch_size: int | None = None,
        workers: int = 1,
        threads: int = 1,
    ) -> Choice:
        """Choose how a job runs: the fastest way that returns the numbers of eager float32, tried on its own images.

        Parameters
        ----------
        crops : sequence of arrays of shape (h, w, 3)
            uint8: some images of the job. Without any, nothing is tried.
        count : int
            Images of the job. A short one does not wait for a compiler.
        layers : sequence of str, optional
            As for `embed_layers`.
        engine : str, default "auto"
            "auto", or one of eager, graph, openvino and compile by name.
        batch_size : int, optional
            Images a pass; by default `batch_size`.
        workers, threads : int, default 1
            Threads that will run it, and that each pass may use.

        Returns
        -------
        Choice

        Raises
        ------
        BackboneError
            When the network returns infinities or NaN, or a named engine cannot be had.
        """
        network = self._passes.network([self._pool, *layers])
        size = batch_size or self.batch_size
        return with_threads(threads, lambda: choose(
            network, crops, count, engine=engine, batch_size=size, precision=self._passes.precision, workers=workers,
        ))  # fmt: skip

    def layer_spec(self, layer: str) -> EmbeddingSpec:
        """Return the spec of one of `embed_layers`: that of this backbone with another pooling.

        Raises
        ------
        BackboneError
            When the network has no such layer.
        """
        if not layer:
            return self.spec
        pool = self.whole_name(layer)
        dim, tokens = self._passes.width(pool)
        return replace(self.spec, pool=pool, dim=dim, tokens=tokens)

    def whole_name(self, layer: str) -> str:
        """Return what a layer is called in full, such as ``blocks.8:avg`` for ``-4``.

        Raises
        ------
        BackboneError
            When the network has no such layer.
        """
        return whole_name(self._passes.model, layer)

    def noise(self, count: int) -> list[npt.NDArray[np.uint8]]:
        """Return crops of noise, the same every time, for when there is nothing else to try an engine on."""
        return list(np.random.default_rng(0).integers(0, 256, (count, *self._passes.crop_size, 3), dtype=np.uint8))
