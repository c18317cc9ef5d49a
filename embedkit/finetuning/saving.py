"""Saving: an adapted network as a folder of JSON and weights, usable wherever a backbone is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from embedkit import __version__
from embedkit.backbones.copies import sidecar_values, timm_config
from embedkit.backbones.network import Network
from embedkit.errors import FinetuneError
from embedkit.finetuning.lora import merged
from embedkit.spec import EmbeddingSpec
from embedkit.store.durable import aside, naming, publish_made

FORMAT, VERSION = "embedkit-backbone", 1
SIDECAR, TIMM_CONFIG, WEIGHTS = "backbone.json", "config.json", "model.safetensors"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


def save_backbone(
    folder: str | os.PathLike[str],
    network: Network,
    spec: EmbeddingSpec,
    *,
    classes: Sequence[str] = (),
    parents: Sequence[EmbeddingSpec] = (),
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    information: Mapping[str, Any] | None = None,
    precision: str = "fp32",
) -> None:
    """Write a network as a folder that `Backbone.load` and timm read.

    The folder gets ``model.safetensors``, ``backbone.json`` with everything that is known of it, and ``config.json``
    with timm's part of that, for ``timm.create_model("local-dir:FOLDER")``. Each file is replaced at once, the weights
    first: between them ``backbone.json`` names other weights by their hash, and loading says so.

    Parameters
    ----------
    folder : path-like
        Made where it is missing; files of these three names are replaced, all others left alone.
    network : Network
        Low-rank adapters are worked into a copy of its weights; it is left as it is.
    spec : EmbeddingSpec
        Of a backbone with the same architecture, preprocessing and pooling: mostly the one that was adapted.
    classes : sequence of str, optional
        Names of the classes that it was trained on.
    parents : sequence of EmbeddingSpec, optional
        Of the backbones that it comes from: the one that was adapted, or its teachers.
    recipe, metrics, information : mapping, optional
        JSON values to keep: every setting, what was measured, and anything else.
    precision : {"fp32", "fp16"}, default "fp32"
        Number format of the file. Half the bits take half the room; the backbone computes in float32 either way.

    Raises
    ------
    FinetuneError
        When weights are infinite or NaN, do not fit into the precision, or a value is none of JSON's.

    Examples
    --------
    >>> save_backbone("runs/flowers", trainee.network, backbone.spec, parents=[backbone.spec])  # doctest: +SKIP
    >>> ek.Backbone.load("runs/flowers").dim  # doctest: +SKIP
    1280
    """
    folder = Path(folder)
    model = merged(network)
    tensors = _tensors(model.state_dict(), precision, folder)
    described = sidecar_values(spec, model)
    values = {
        "format": FORMAT,
        "version": VERSION,
        **described,
        "weights": WEIGHTS,
        "classes": [str(name) for name in classes],
        "parents": [{"digest": parent.digest, "spec": parent.to_dict()} for parent in parents],
        "recipe": dict(recipe or {}),
        "metrics": dict(metrics or {}),
        "information": dict(information or {}),
        "embedkit": __version__,
    }
    _json(values)  # What cannot be written is found out before anything is.
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with aside(folder) as fresh:
        try:
            save_file(tensors, fresh)
        except SafetensorError as error:
            raise FinetuneError(f"{folder / WEIGHTS} cannot be written: {error}") from error
        files = {WEIGHTS: {"bytes": fresh.stat().st_size, "sha256": _sha256(fresh)}}
        publish_made(fresh, folder / WEIGHTS)
    for name, content in ((TIMM_CONFIG, timm_config(described)), (SIDECAR, {**values, "files": files})):
        with aside(folder) as fresh:
            fresh.write_bytes(_json(content))
            publish_made(fresh, folder / name)


def _tensors(state: Mapping[str, torch.Tensor], precision: str, folder: Path) -> dict[str, torch.Tensor]:
    """Return tensors as they are written, each in memory of its own."""
    if precision not in PRECISIONS:
        raise FinetuneError(f"unknown precision {precision!r} of a file; choose one of {', '.join(PRECISIONS)}")
    tensors: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, value in state.items():
        written = value.to(PRECISIONS[precision]) if value.is_floating_point() else value
        if not torch.isfinite(written).all():
            reason = "infinite or NaN" if not torch.isfinite(value).all() else f"too large for {precision}"
            raise FinetuneError(f"{folder} is not written: the weights {name} are {reason}; did training diverge?")
        tensor = written.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in places else tensor  # Two names may stand for the same weights.
        places.add(place)
    return tensors


def _json(values: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(values, indent=1, ensure_ascii=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise FinetuneError(f"a backbone is described by JSON values only: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
