"""Presets: where timm's defaults for some weights are not those of the numbers that were published with them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from embedkit.spec import EmbeddingSpec

PRESETS = ("default", "published")

log = logging.getLogger("embedkit")


@dataclass(frozen=True)
class Published:
    """How the published numbers of some weights were measured, as far as timm's defaults differ.

    Parameters
    ----------
    names : str
        Regular expression of timm's names, with their tags.
    source : str
        Where the published evaluation is written down.
    facts : mapping
        Arguments of `Backbone.load` that decide the pixels.
    arch_kwargs : mapping
        Keyword arguments of the architecture.
    """

    names: str
    source: str
    facts: Mapping[str, Any]
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)


_CLIP = "openai/CLIP, clip/clip.py and clip/model.py"

# Read in the repositories that are named. timm 1.0 says for these: DINOv2 518 px and the whole image, DINO, MAE and the
# smaller CLIPs a crop of 0.9, and GELU for CLIP's transformers.
TABLE = (
    Published(
        r"vit_\w+_patch14(_reg4)?_dinov2(\.lvd142m)?",
        "facebookresearch/dinov2, dinov2/data/transforms.py",
        {"img_size": (224, 224), "crop_pct": 0.875, "interpolation": "bicubic"},
    ),
    Published(
        r"vit_\w+_patch\d+_224\.dino",
        "facebookresearch/dino, eval_knn.py",
        {"crop_pct": 0.875, "interpolation": "bicubic"},
    ),
    Published(
        r"vit_\w+_patch\d+_224\.mae",
        "facebookresearch/mae, main_linprobe.py",
        {"crop_pct": 0.875, "interpolation": "bicubic"},
    ),
    Published(r"vit_\w+_clip_quickgelu_\d+\.openai", _CLIP, {"crop_pct": 1.0, "interpolation": "bicubic"}),
    Published(
        r"vit_\w+_clip_(?!quickgelu)\d+\.openai",
        _CLIP,
        {"crop_pct": 1.0, "interpolation": "bicubic"},
        {"act_layer": "quick_gelu"},
    ),
    Published(r"resnet\w+_clip(_gap)?\.openai", _CLIP, {"crop_pct": 1.0, "interpolation": "bicubic"}),
)


def find_published(name: str) -> Published | None:
    """Return how the numbers of a timm name were published, or None when nothing is known to differ.

    Parameters
    ----------
    name : str
        With its tag; ``hf-hub:OWNER/`` may stand before it.

    Examples
    --------
    >>> from embedkit.backbones.presets import find_published
    >>> find_published("vit_small_patch16_224.dino").facts["crop_pct"]
    0.875
    >>> find_published("resnet50.a1_in1k") is None
    True
    """
    plain = name.rpartition("/")[2]
    return next((one for one in TABLE if re.fullmatch(one.names, plain)), None)


def apply_preset(
    preset: str, name: str, facts: Mapping[str, Any], arch_kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill in what a preset says and nobody has chosen.

    Parameters
    ----------
    preset : {"default", "published"}
        "default" leaves everything as it is.
    name : str
        timm's name of the weights.
    facts : mapping
        Arguments of `Backbone.load`; None for what nobody has chosen.
    arch_kwargs : mapping
        Keyword arguments of the architecture that somebody has chosen.

    Returns
    -------
    facts, arch_kwargs : dict
        What was chosen, then what the preset says.
    """
    published = find_published(name) if preset == "published" else None
    if published is None:
        if preset == "published":
            log.info("%s: no published evaluation is known to differ from timm's defaults; they are used", name)
        return dict(facts), dict(arch_kwargs)
    filled = {key: published.facts.get(key) if value is None else value for key, value in facts.items()}
    return filled, {**published.arch_kwargs, **arch_kwargs}


def find_differences(spec: EmbeddingSpec, recipe: Mapping[str, Any] | None = None) -> list[str]:
    """Return how embeddings differ from those whose numbers were published, one line for each fact.

    Parameters
    ----------
    spec : EmbeddingSpec
        Of a backbone or a store.
    recipe : mapping, optional
        Of the same; it may name the tag of weights that came from a file.

    Returns
    -------
    list of str
        Empty when nothing is known to differ.

    Examples
    --------
    >>> from embedkit import EmbeddingSpec, Preprocessing
    >>> from embedkit.backbones.presets import find_differences
    >>> pixels = Preprocessing(img_size=(518, 518), crop_pct=1.0)
    >>> find_differences(EmbeddingSpec("vit_small_patch14_dinov2", "ab" * 32, 384, "lvd142m", preprocessing=pixels))
    ['img_size is 518 x 518, published 224 x 224', 'crop_pct is 1, published 0.875']
    """
    published = find_published(_name(spec, recipe or {}))
    if published is None:
        return []
    found = {key: getattr(spec.preprocessing, key) for key in published.facts}
    differing = [(key, found[key], value) for key, value in published.facts.items() if not _same(found[key], value)]
    given = spec.arch_kwargs
    differing += [
        (key, given.get(key, "timm's"), value)
        for key, value in published.arch_kwargs.items()
        if str(given.get(key, "")).replace("_", "") != value.replace("_", "")  # quickgelu is quick_gelu.
    ]
    return [f"{key} is {_text(value)}, published {_text(wanted)}" for key, value, wanted in differing]


def log_differences(spec: EmbeddingSpec, recipe: Mapping[str, Any] | None = None) -> None:
    """Say once in a process how embeddings differ from those whose numbers were published."""
    differences = find_differences(spec, recipe)
    if differences:
        name = _name(spec, recipe or {})
        published = find_published(name)
        assert published is not None
        _say(f"{name}: {'; '.join(differences)} ({published.source}); --preset published sets it right")


@lru_cache(maxsize=256)
def _say(line: str) -> None:
    log.info("%s", line)


def _name(spec: EmbeddingSpec, recipe: Mapping[str, Any]) -> str:
    """Return timm's name of the weights, with a tag as far as one is known."""
    arch = recipe.get("arch")
    if not spec.tag and isinstance(arch, str) and arch.partition(".")[0] == spec.backbone:
        return arch
    return spec.name


def _same(found: Any, wanted: Any) -> bool:
    return bool(abs(found - wanted) < 1e-6) if isinstance(wanted, float) else bool(found == wanted)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
