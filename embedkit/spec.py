"""EmbeddingSpec: the facts that fix the numbers, and their digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedkit.errors import SpecMismatchError, StoreFormatError

BUNDLED = "nano"  # The backbone in the box: its architecture with other weights is another one, so it has a name.


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the pixels that a backbone sees.

    The steps are timm's evaluation transform: resize, centre crop, scale to [0, 1], subtract `mean`, divide by `std`.

    Parameters
    ----------
    img_size : tuple of int
        Height and width of the crop, in pixels.
    crop_pct : float
        Share of the resized image that the crop keeps: the image is resized to ``floor(img_size / crop_pct)``.
    crop_mode : {"center", "squash", "border"}
        Whether the short side is fitted, both sides are stretched, or the long side is fitted and the rest is filled
        with `mean`.
    interpolation : str
        Pillow's name of the resampling filter: nearest, bilinear, bicubic, lanczos, box or hamming.
    mean, std : tuple of float
        Per channel, for pixels in [0, 1].
    exif : bool
        Whether the EXIF orientation is applied. Photographs taken with a turned phone need it; many published
        protocols did without.
    alpha : str
        What transparent pixels become. Always ``"white"``: the image is laid over white paper.
    decoder : str
        What decodes and resizes: "pillow", or what `embedkit.Backbone.load` calls ``decode="standard"`` or "fast".
    icc : bool
        Whether embedded colour profiles are applied. Most published protocols did without.
    truncated : {"fail", "pad"}
        Whether an image whose end is missing is a failure, or is embedded with grey or black where pixels are missing.
    """

    img_size: tuple[int, int] = (224, 224)
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    exif: bool = True
    alpha: str = "white"
    decoder: str = "pillow"
    icc: bool = False
    truncated: str = "fail"


@dataclass(frozen=True)
class EmbeddingSpec:
    """Everything that decides the numbers of an embedding, and nothing else.

    Two embeddings may be compared exactly when their specs are equal; `digest` is the short proof. Versions of
    libraries, devices and batch sizes are not in it: they move numbers by rounding only.

    Parameters
    ----------
    backbone : str
        timm architecture, without a tag.
    tag : str
        timm's tag of the pretrained weights, or an empty string for weights from a file.
    arch_kwargs : mapping
        Keyword arguments of the architecture, JSON values only.
    weights_sha256 : str
        Over the backbone's tensors in name order, so the same weights in another file format agree.
    pool : str
        "default" for the model's own pooling, or what `embedkit.Backbone.load` takes otherwise.
    dim : int
        Width of the embedding, measured by a forward pass.
    preprocessing : Preprocessing
        How images become pixels.
    precision : str
        Number format of the forward pass.
    views : tuple of str
        Further views of each image that are averaged with the plain one, such as ``flip``.
    tokens : int
        With the pooling "none", how many vectors of ``dim // tokens`` numbers lie in each row; otherwise 0.

    Examples
    --------
    >>> from embedkit import EmbeddingSpec
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=512)
    >>> spec == EmbeddingSpec.from_dict(spec.to_dict())
    True
    >>> len(spec.digest)
    64
    """

    backbone: str
    weights_sha256: str
    dim: int
    tag: str = ""
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pool: str = "default"
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    precision: str = "float32"
    views: tuple[str, ...] = ()
    tokens: int = 0

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 of the spec's canonical JSON, as 64 hexadecimal digits."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Architecture and tag, as timm writes them."""
        return f"{self.backbone}.{self.tag}".rstrip(".")

    def name_of(self, recipe: Mapping[str, Any]) -> str:
        """Return what people call the backbone that a recipe loads: its name, after that of the one in the box."""
        return f"{BUNDLED} ({self.name})" if recipe.get("model") == BUNDLED else self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        values: dict[str, Any] = json.loads(canonical_json(dataclasses.asdict(self)))
        for name in ("views", "tokens"):  # They came later: specs without them keep their digests.
            if not values[name]:
                del values[name]
        for name in ("icc", "truncated"):
            if values["preprocessing"][name] == getattr(Preprocessing, name):
                del values["preprocessing"][name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EmbeddingSpec:
        """Build a spec from what `to_dict` returned.

        Raises
        ------
        StoreFormatError
            When fields are missing, unknown or of the wrong type. The values may come from a stranger's file.
        """
        try:
            pixels = dict(values["preprocessing"])
            for name in ("img_size", "mean", "std"):
                pixels[name] = tuple(pixels[name])
            views = tuple(str(view) for view in values.get("views", ()))
            spec = cls(**{**values, "preprocessing": Preprocessing(**pixels), "views": views})
        except (KeyError, TypeError, ValueError) as error:
            raise StoreFormatError(f"the embedding spec is incomplete or has unknown fields: {error}") from error
        whole = isinstance(spec.dim, int) and isinstance(spec.tokens, int) and spec.tokens >= 0
        if not whole or not isinstance(spec.backbone, str) or (spec.tokens and spec.dim % spec.tokens):
            raise StoreFormatError(
                "the embedding spec has fields of the wrong type: dim must be an integer, a multiple of tokens where "
                "there are any, and backbone text"
            )
        return spec

    def differences(self, other: EmbeddingSpec) -> dict[str, tuple[Any, Any]]:
        """Return ``{field: (own, other's)}`` for every field that differs."""
        # With the fields that `to_dict` leaves out, whose values are what somebody chose all the same.
        left, right = (flat(json.loads(canonical_json(dataclasses.asdict(spec)))) for spec in (self, other))
        names = sorted(left.keys() | right.keys())
        return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}

    def require_same(self, other: EmbeddingSpec, message: str) -> None:
        """Raise unless `other` equals this spec.

        Parameters
        ----------
        other : EmbeddingSpec
            The spec to compare with.
        message : str
            What was about to be compared; it opens the error.

        Raises
        ------
        SpecMismatchError
            Naming every field that differs.
        """
        if self.digest != other.digest:
            raise SpecMismatchError(message, self.differences(other))


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII only, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            fields.update(flat(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = value
    return fields
