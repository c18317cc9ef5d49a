"""The backbone in the box: a small one whose weights lie in the package, so that its name needs no network."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from embedkit.errors import BackboneError
from embedkit.spec import BUNDLED


def bundled_sidecar() -> Path:
    """Return the JSON sidecar of the backbone in the box, whose weights lie beside it.

    Raises
    ------
    BackboneError
        When the installation lacks it.
    """
    # A real folder: torch is never imported from inside an archive, so neither is this package.
    sidecar = Path(str(files("embedkit.backbones") / BUNDLED / "backbone.json"))
    for file in (sidecar, sidecar.with_name("model.safetensors")):
        if not file.is_file():
            raise BackboneError(
                f"this installation lacks the backbone {BUNDLED}: {file} is missing; "
                "install embedkit again, or name another backbone with -m MODEL"
            )
    return sidecar


def bundled_facts() -> dict[str, Any]:
    """Return what the sidecar says: what `Backbone.load` reads, and the model card's facts.

    Raises
    ------
    BackboneError
        When the installation lacks it, or it is damaged.
    """
    sidecar = bundled_sidecar()
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
        facts["parameters"], facts["dim"], facts["pretrained_cfg"]["input_size"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BackboneError(f"{sidecar} is damaged: {error}; install embedkit again") from error
    return dict(facts)
