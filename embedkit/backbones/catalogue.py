"""Which models timm knows, and the closest names to one that it does not."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import torch

from embedkit.backbones.bundled import bundled_facts
from embedkit.backbones.timm_import import import_timm
from embedkit.errors import BackboneError
from embedkit.spec import BUNDLED


@dataclass(frozen=True)
class ModelInfo:
    """One line of `embedkit models`; None where timm does not know."""

    name: str
    parameters: int | None
    img_size: int | None
    dim: int | None


def list_models(pattern: str | None = None, *, progress: Callable[[int, int], None] | None = None) -> list[ModelInfo]:
    """List the backbone in the box and timm's pretrained models.

    Parameters
    ----------
    pattern : str, optional
        A part of the name, or a pattern with ``*`` and ``?``. With a pattern the parameters and the embedding width
        are counted on the models' empty shapes, which takes about a tenth of a second each; without one there are
        some 1,600 models and only what timm's registry says is told.
    progress : callable, optional
        Called with (done, total).

    Returns
    -------
    list of ModelInfo
        The one in the box first, where it is not missing; timm's sorted by name.

    Raises
    ------
    BackboneError
        When nothing matches; it lists the closest names.

    Examples
    --------
    >>> import embedkit as ek
    >>> [model.dim for model in ek.list_models("resnet18.a1_in1k")]
    [512]
    """
    timm, sought = import_timm(), pattern or ""
    wildcard = sought if any(sign in sought for sign in "*?[") else f"*{sought}*"
    names = [name for name in known_names() if fnmatch.fnmatch(name, wildcard)]
    models = [one for one in _in_the_box() if fnmatch.fnmatch(one.name, wildcard)]
    if not names and not models:
        raise BackboneError(f"no timm model matches {sought!r}{closest(sought)}")
    shapes: dict[str, tuple[int | None, int | None]] = {}
    for done, name in enumerate(names):
        arch = name.partition(".")[0]
        if pattern is not None and arch not in shapes:
            shapes[arch] = _measure(arch)
        config = timm.get_pretrained_cfg(name)
        size = config.input_size[-1] if config and config.input_size else None
        parameters, dim = shapes.get(arch, (None, None))
        models.append(ModelInfo(name, parameters, size, dim))
        if progress is not None:
            progress(done + 1, len(names))
    return models


def _in_the_box() -> list[ModelInfo]:
    """Return the backbone in the box; nothing in an installation that lacks it, which loading it tells."""
    try:
        facts = bundled_facts()
    except BackboneError:
        return []
    return [ModelInfo(BUNDLED, facts["parameters"], facts["pretrained_cfg"]["input_size"][-1], facts["dim"])]


def known_names() -> list[str]:
    """Return every pretrained timm name with its tag, sorted."""
    return sorted(import_timm().list_models(pretrained=True))


def closest(name: str) -> str:
    """Return "; did you mean ...?" with the closest names, or where to find names."""
    timm = import_timm()
    names = [BUNDLED, *timm.list_models(), *known_names()]
    matches = difflib.get_close_matches(name, names, n=5, cutoff=0.6)
    return f"; did you mean {', '.join(matches)}?" if matches else "; see: embedkit models PATTERN"


def _measure(arch: str) -> tuple[int | None, int | None]:
    """Return parameters and embedding width of an architecture, without allocating its weights."""
    try:
        with torch.device("meta"):
            model = import_timm().create_model(arch, pretrained=False, num_classes=0)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None, None  # A few architectures compute with real values while they are built.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
