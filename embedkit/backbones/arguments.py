"""From what a user asks of a backbone to what it is made of."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from embedkit.backbones.engines import DTYPES
from embedkit.backbones.network import check_views
from embedkit.backbones.presets import PRESETS
from embedkit.backbones.timm_import import import_timm
from embedkit.errors import BackboneError
from embedkit.images import CROP_MODES, DECODERS, INTERPOLATIONS, TRUNCATED
from embedkit.spec import BUNDLED, EmbeddingSpec, Preprocessing

_DEFAULTS: dict[str, Any] = {
    "pool": "default", "exif": True, "arch_kwargs": {}, "decode": "standard", "precision": "fp32", "views": [],
    "icc": False, "truncated": "fail",
}  # fmt: skip
PRECISIONS = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}


def check_choices(
    decode: str, precision: str, views: Sequence[str], truncated: str, preset: str, max_pixels: int
) -> None:
    """Raise BackboneError unless these are things that a backbone can do."""
    choices = (
        ("decode", decode, DECODERS), ("precision", precision, DTYPES), ("truncated", truncated, TRUNCATED),
        ("preset", preset, PRESETS),
    )  # fmt: skip
    for name, value, known in choices:
        if value not in known:
            raise BackboneError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    if max_pixels < 1:
        raise BackboneError(f"max_pixels is a number of pixels, got {max_pixels}")
    try:
        check_views([views] if isinstance(views, str) else views)
    except ValueError as error:
        raise BackboneError(str(error)) from error


def with_defaults(said: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `load`, where nothing was said as the model's own sidecar has it.

    Raises
    ------
    BackboneError
        When the sidecar, which may come from a stranger, says something else, or with a value of another type.
    """
    chosen = dict(said)
    for name, value in own.items():
        plain = _DEFAULTS.get(name)
        sides = name == "img_size" and isinstance(value, list) and all(type(side) is int for side in value)
        if name not in said or not (sides or type(value) is type(plain)):
            raise BackboneError(f"the sidecar's load_defaults may hold {', '.join(said)}, and says {name}: {value!r}")
        if said[name] == plain:
            chosen[name] = value
    return chosen


def numeric_choices(spec: EmbeddingSpec) -> dict[str, Any]:
    """Return the arguments of `load` that a spec decides, whatever a recipe says."""
    decoders = {value: name for name, value in DECODERS.items()}
    precisions = {value: name for name, value in PRECISIONS.items()}
    chosen = {
        "decode": decoders.get(spec.preprocessing.decoder), "precision": precisions.get(spec.precision),
        "views": tuple(spec.views), "icc": spec.preprocessing.icc, "truncated": spec.preprocessing.truncated,
    }  # fmt: skip
    return {name: value for name, value in chosen.items() if value is not None}


def reload_arguments(
    spec: EmbeddingSpec, recipe: Mapping[str, Any], known: Iterable[str], model: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """Return the arguments of `load` for the backbone that a store was made with."""
    arguments = {name: value for name, value in recipe.items() if name in known}
    arguments |= numeric_choices(spec)
    if model is not None:
        arguments["model"] = model
    if spec.backbone == "imported":
        raise BackboneError(
            "these embeddings were imported and do not say what made them, so no image can be embedded alike; "
            "search with embeddings or rows"
        )
    if not isinstance(arguments.get("model"), str | os.PathLike):
        raise BackboneError("the store does not say where its backbone came from; name it with -m MODEL (model=)")
    return arguments


def mismatch(model: str | os.PathLike[str]) -> str:
    """Return what is said when a model that was loaded again has become another one."""
    if model != BUNDLED:
        return f"{os.fspath(model)} is not the backbone that made the store"
    return (
        f"the {BUNDLED} of this embedkit is not the one that made the store: its weights or its preprocessing have "
        f"changed between versions; name the folder of the old one ({BUNDLED}/ in that version's package) with -m, or "
        "extract the images again into another store"
    )


def image_size(img_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return height and width of one side or two."""
    if img_size is None:
        return None
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < 1:
        raise BackboneError(f"img_size is one side or (height, width) in pixels, got {img_size}")
    return int(sides[0]), int(sides[1])


def usable_device(device: str) -> torch.device:
    """Return a device that is there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(f"device {device!r} cannot be used: {reason}; only --device auto chooses") from error
    return found


def device_names(devices: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of devices, of which there may be several.

    Parameters
    ----------
    devices : str or sequence of str
        Names, or one text with commas between them. ``cuda:all`` stands for every GPU.

    Raises
    ------
    BackboneError
        When one of several is not there, or they are of different kinds: those agree to rounding only.

    Examples
    --------
    >>> from embedkit.backbones import device_names
    >>> device_names("cpu,cpu")
    ('cpu', 'cpu')
    """
    given = devices.split(",") if isinstance(devices, str) else devices
    count = torch.cuda.device_count()
    names: list[str] = []
    for name in (name.strip() for name in given):
        if name == "cuda:all" and not count:
            raise BackboneError("device 'cuda:all' cannot be used: there is no GPU; only --device auto chooses")
        names += [f"cuda:{index}" for index in range(count)] if name == "cuda:all" else [name]
    if len(names) < 2 and isinstance(devices, str):
        return tuple(names)  # `usable_device` judges it.
    for name in names:
        kind, _, index = name.partition(":")
        if not (name == "cpu" or (kind == "cuda" and index.isdecimal())):
            raise BackboneError(f"{name!r} cannot be one of several devices; they are cpu, cuda:0, cuda:1, ...")
        if kind == "cuda" and int(index) >= count:
            raise BackboneError(f"device {name!r} cannot be used: there {_are(count)}; only --device auto chooses")
    if len({name.partition(":")[0] for name in names}) > 1:
        raise BackboneError(f"several devices are of one kind, got {', '.join(names)}")
    return tuple(names)


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count or 'no'} GPU{'s' * (count != 1)}"


def preprocessing_of(
    network: nn.Module, size: tuple[int, int] | None, overrides: Mapping[str, Any], decode: str, **reading: Any
) -> Preprocessing:
    """Return the preprocessing that the weights were trained with, the facts that were overridden, how files are read.

    `reading` holds the fields of a Preprocessing that no network decides: exif, icc and truncated.
    """
    arguments = {name: value for name, value in overrides.items() if value is not None}
    for name in ("mean", "std"):
        if name in arguments and len(arguments[name]) not in (1, 3):
            raise BackboneError(f"--{name} takes one number or three, got {len(arguments[name])}")
    if size is not None:
        arguments["input_size"] = (3, *size)
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
        interpolation=config["interpolation"], mean=mean, std=std, decoder=DECODERS[decode],
        **reading,
    )  # fmt: skip


def without_defaults(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that differ from those of `Backbone.load`, as JSON values."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    return {name: value for name, value in plain.items() if value != _DEFAULTS.get(name)}
