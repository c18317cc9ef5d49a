"""From what a user calls a model to a timm network with its weights and its configuration."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from embedkit.backbones.bundled import bundled_sidecar
from embedkit.backbones.catalogue import closest
from embedkit.backbones.timm_import import import_timm
from embedkit.errors import BackboneError
from embedkit.spec import BUNDLED

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
MAX_JSON_BYTES = 64 << 20  # A million class names.
# These would have timm read other files than the one that is named and checked.
_OF_THE_LOADER = (
    "cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_strict",  # Or layers without weights would be random ones.
)  # fmt: skip
MAX_SIDE = 1 << 13  # Pixels of a crop that a sidecar may ask for; timm's largest are 1,024.
_OURS = "backbone.json"
_RUN = "embedkit-finetuning"  # What the recipe.json of a run says that it is.
_FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

log = logging.getLogger("embedkit")


@dataclass(frozen=True)
class Source:
    """Where a network comes from: a timm name alone, or an architecture with a weight file."""

    arch: str
    arch_kwargs: dict[str, Any]
    weights: Path | None = None
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)  # Of `Backbone.load`, as an adapted folder wants them.
    is_projected: bool = False  # Whether timm's classifier is a projection, and its output the embedding.
    name: str = ""  # What stands for the weight file everywhere, whatever its place on this machine.


def resolve(model: str | os.PathLike[str], arch: str | None, arch_kwargs: Mapping[str, Any] | None) -> Source:
    """Find what `model` names: the backbone in the box, a weight file, a folder, a JSON sidecar, or a timm name."""
    kwargs = dict(arch_kwargs or {})
    if model == BUNDLED:  # A text: a path object is a path, whatever its name.
        return _from_box(arch, kwargs)
    model = os.fspath(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_sidecar(_sidecar_in(path), arch, kwargs)
    if path.suffix == ".json" and path.is_file():
        return _from_sidecar(path, arch, kwargs)
    if path.suffix in WEIGHT_SUFFIXES and path.is_file():
        sidecar = path.with_suffix(".json")
        if arch is None and sidecar.is_file():
            return _from_sidecar(sidecar, None, kwargs, weights=path)
        if arch is None:
            raise BackboneError(
                f"{path} holds weights only; name their architecture with --arch (arch=), such as --arch resnet50"
            )
        return Source(arch, kwargs, path)
    beside = path.with_name(path.name + ".json")
    if beside.is_file():
        return _from_sidecar(beside, arch, kwargs)
    if _looks_like_path(model, path):
        raise BackboneError(f"{model}: no such file or folder, and it is not a timm name either")
    if arch is not None:
        raise BackboneError(f"--arch {arch} describes a weight file, but {model!r} is a timm name; drop --arch")
    return Source(model, kwargs)


def build(source: Source, img_size: tuple[int, int] | None) -> nn.Module:
    """Create the network of a source with its weights, and without its classifier unless that is a projection."""
    kwargs = _of_architecture(source.arch_kwargs)
    _require_known(source.arch)
    if img_size is not None and takes_size(source.arch):
        kwargs["img_size"] = img_size  # Resamples position embeddings.
    model = _from_hub(source.arch, kwargs) if source.weights is None else _from_file(source, kwargs)
    if getattr(model, "num_classes", 0) and not source.is_projected:
        model.reset_classifier(0)  # type: ignore[operator]
    return model


def build_untrained(
    arch: str, arch_kwargs: Mapping[str, Any], img_size: tuple[int, int], drop_path: float
) -> nn.Module:
    """Create the network of an architecture with timm's own random weights, as torch's generator draws them."""
    _require_known(arch)
    kwargs = _of_architecture(arch_kwargs)
    if takes_size(arch):
        kwargs["img_size"] = img_size
    if drop_path:
        kwargs["drop_path_rate"] = drop_path
    try:
        model: nn.Module = import_timm().create_model(arch, pretrained=False, num_classes=0, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise BackboneError(f"{arch} cannot be built with {kwargs}: {_excerpt(error)}") from error
    return model


def _of_architecture(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments, which may come from a stranger's sidecar, unless some are for timm's loader."""
    for name in kwargs:
        if name in _OF_THE_LOADER:
            raise BackboneError(
                f"{name} is no argument of an architecture: weights are named by -m, and by nothing else"
            )
    return dict(kwargs)


def takes_size(arch: str) -> bool:
    """Return whether an architecture is built for one size of image; others take any, and no such option."""
    config = import_timm().get_pretrained_cfg(arch) if ":" not in arch else None
    return config is None or bool(config.fixed_input_size)


def weights_sha256(model: nn.Module) -> str:
    """Return a hash over the tensors in name order, the same for the same weights in any file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue  # A training counter: it moves no number, and some converters drop it.
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{array.dtype}:{tuple(array.shape)}\n".encode())
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()


def _from_box(arch: str | None, kwargs: dict[str, Any]) -> Source:
    """Return the backbone in the box. Nothing in the working folder takes its place: stores know it by name."""
    if arch is not None:
        raise BackboneError(f"--arch {arch} describes a weight file, but {BUNDLED} comes with embedkit; drop --arch")
    if os.path.lexists(BUNDLED):
        log.info("%s is the backbone in the box; what lies here by that name is ./%s", BUNDLED, BUNDLED)
    return replace(_from_sidecar(bundled_sidecar(), None, kwargs), name=BUNDLED)


def _sidecar_in(folder: Path) -> Path:
    for name in (_OURS, "config.json"):
        if (folder / name).is_file():
            return folder / name
    sidecars = sorted(folder.glob("*.json"))
    if len(sidecars) == 1:
        return sidecars[0]
    if not sidecars:
        raise BackboneError(f"{folder} holds no backbone: expected a JSON sidecar beside a .safetensors file")
    choices = "\n".join(f"  {sidecar}" for sidecar in sidecars)
    raise BackboneError(f"{folder} holds {len(sidecars)} backbones; name one of them:\n{choices}")


def _from_sidecar(path: Path, arch: str | None, kwargs: dict[str, Any], weights: Path | None = None) -> Source:
    """Read a sidecar: our own words, or those of timm's `config.json`."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{path} is not a readable JSON sidecar: {error}") from error
    found = values.get("timm_architecture") or values.get("architecture") if isinstance(values, dict) else None
    if not isinstance(found, str):
        if isinstance(values, dict) and values.get("format") == _RUN and not (path.parent / _OURS).is_file():
            raise BackboneError(
                f"{path.parent} holds an unfinished run and no backbone yet; the finetune or distill command that "
                "began it goes on when it is given again"
            )
        raise BackboneError(f'{path} names no architecture; expected a key "architecture" with a timm name')
    saved = values.get("timm_kwargs") or values.get("model_args") or {}
    config = values.get("pretrained_cfg") or {}
    if not isinstance(saved, dict) or not isinstance(config, dict):
        raise BackboneError(f"{path}: model_args and pretrained_cfg must be JSON objects")
    defaults = values.get("load_defaults") or {}
    if not isinstance(defaults, dict):
        raise BackboneError(f"{path}: load_defaults must be a JSON object")
    _check_config(path, config)
    weights = weights or _weights_beside(path, values)
    _check_sha256(weights, values)
    return Source(arch or found, {**saved, **kwargs}, weights, config, defaults, values.get("projected") is True)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise unless a sidecar's configuration, which may come from a stranger, says numbers where they are read."""

    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def is_size(value: object) -> bool:
        sides = value if isinstance(value, list) and len(value) == 3 else [0]
        return all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides)

    def are_numbers(value: object) -> bool:
        return isinstance(value, list) and len(value) in (1, 3) and all(map(is_number, value))

    def is_name(value: object) -> bool:
        return all(isinstance(name, str) for name in (value if isinstance(value, list) else [value]))

    checks: dict[str, Callable[[object], bool]] = {
        "input_size": is_size, "test_input_size": is_size, "mean": are_numbers, "std": are_numbers,
        "crop_pct": is_number, "test_crop_pct": is_number, "first_conv": is_name, "classifier": is_name,
    }  # fmt: skip
    for name, fits in checks.items():
        if config.get(name) is not None and not fits(config[name]):
            raise BackboneError(f"{path}: pretrained_cfg says {name}: {str(config[name])[:80]!r}, which cannot be")


def _weights_beside(sidecar: Path, values: Mapping[str, Any]) -> Path:
    named = values.get("weights")
    candidates = [named] if isinstance(named, str) else [sidecar.stem + suffix for suffix in WEIGHT_SUFFIXES]
    for name in [*candidates, *_FOLDER_WEIGHTS]:
        # The sidecar may come from a stranger: it can name a neighbour only.
        if name == os.path.basename(name) and (sidecar.parent / name).is_file():
            return sidecar.parent / name
    raise BackboneError(f"{sidecar}: its weights are missing; expected {candidates[0]} beside it")


def _check_sha256(weights: Path, values: Mapping[str, Any]) -> None:
    files = values.get("files")
    entry = files.get(weights.name) if isinstance(files, dict) else None
    expected = entry.get("sha256") if isinstance(entry, dict) else None
    if expected is None:
        return
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    if found.hexdigest() != expected:
        raise BackboneError(
            f"{weights} is not the file that its sidecar describes: "
            f"sha256 {found.hexdigest()[:16]}... found, {str(expected)[:16]}... expected; fetch it again"
        )


def _looks_like_path(model: str, path: Path) -> bool:
    if model.startswith("hf-hub:"):
        return False
    return path.suffix in (*WEIGHT_SUFFIXES, ".json") or "/" in model or os.sep in model or model.startswith(".")


def _require_known(name: str) -> None:
    if name.startswith("hf-hub:"):
        return
    timm = import_timm()
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise BackboneError(f"timm knows no model {name!r}{closest(name)}")
    tags = sorted(known.partition(".")[2] for known in timm.list_models(f"{arch}.*", pretrained=True))
    if tag and tag not in tags:
        raise BackboneError(f"timm has no weights {tag!r} for {arch}; it has: {', '.join(tags) or 'none'}")


def _from_hub(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    timm = import_timm()
    if ":" not in name and not timm.is_model_pretrained(name):
        raise BackboneError(f"timm has no pretrained weights for {name}{closest(name)}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **kwargs)
    except TypeError as error:
        raise BackboneError(f"{name} does not take these keyword arguments: {error}") from error
    except Exception as error:  # The hub client has no common base class for "cannot be reached".
        raise BackboneError(
            f"the weights of {name} are neither in the local cache nor to be had from the hub ({_first_line(error)}).\n"
            "To work offline, load them once where there is a network (they stay in the cache: set HF_HOME to its\n"
            "folder and HF_HUB_OFFLINE=1), or copy the weight file here and pass: "
            f"-m FILE.safetensors --arch {name.partition(':')[2] or name}.\n"
            f"{BUNDLED}, a small backbone, comes with embedkit: -m {BUNDLED}"
        ) from error
    return model


def _from_file(source: Source, kwargs: Mapping[str, Any]) -> nn.Module:
    """Load a weight file strictly: a tensor too many or too few is an error, never a random layer."""
    timm = import_timm()
    assert source.weights is not None
    try:
        state: dict[str, Tensor] = timm.models.load_state_dict(str(source.weights), weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds other things than named tensors")
    except Exception as error:  # safetensors, pickle and zip each have errors of their own.
        raise BackboneError(f"{source.weights} is not a readable weight file: {_first_line(error)}") from error
    config = timm.get_pretrained_cfg(source.arch)
    base = {} if config is None else {key: value for key, value in config.to_dict().items() if value is not None}
    overlay = {**base, **source.pretrained_cfg}
    classes = _class_count(state, overlay.get("classifier"))
    # The checkpoint's own number of classes makes timm load it strictly, through the architecture's key filter.
    overlay.update(num_classes=classes, label_offset=0, state_dict=state, custom_load=False, source=None)
    try:
        model: nn.Module = timm.create_model(
            source.arch.partition(".")[0], pretrained=True, pretrained_cfg=overlay, num_classes=classes, **kwargs
        )
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise BackboneError(f"{source.weights} does not fit {source.arch} {kwargs or ''}: {_excerpt(error)}") from error
    return model


def _class_count(state: Mapping[str, Tensor], classifier: object) -> int:
    names = [classifier] if isinstance(classifier, str) else list(classifier or [])  # type: ignore[call-overload]
    for name in names:
        if f"{name}.weight" in state:
            return int(state[f"{name}.weight"].shape[0])
    return 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _excerpt(error: BaseException, limit: int = 600) -> str:
    text = str(error).strip()
    return text if len(text) <= limit else text[:limit] + " ..."
