"""Puts a distilled student into the package as the backbone in the box: its weights in float16, and its model card.

    python benchmarks/nano_bundle.py runs/nano --command "embedkit distill --config configs/nano.yaml ..." \
        --quality flowers_val_linear_top1=0.86 --quality digits_five_folds_linear_top1=0.97

writes embedkit/backbones/nano/{model.safetensors, backbone.json}. Loaded, they are the student that was judged when the
run saved float16 itself (precision: fp16); then the digests agree, and otherwise this says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import embedkit as ek
from embedkit.backbones.network import count_parameters

HERE = Path(__file__).resolve().parents[1]
BOX = HERE / "embedkit" / "backbones" / "nano"
MOST_BYTES = 6_000_000

LICENCE = "Apache-2.0; with parts under MIT, whose notice is in the LICENSE beside this file"
INITIALISED_FROM = "tf_mobilenetv3_small_100.tf_in1k (ImageNet-1k; weilly0912/ATU_Model_Zoo, dequantised, MIT)"
DATA = [
    {"name": "Tiny-ImageNet, train", "source": "seshuad/IMagenet on GitHub", "terms": "ImageNet's: research only"},
    {"name": "Tiny-ImageNet, test", "source": "seshuad/IMagenet on GitHub", "terms": "ImageNet's: research only"},
    {"name": "scenes", "source": "ndb796/Scene-Classification-Dataset-Split on GitHub", "terms": "CC0"},
    {
        "name": "squares of ImageNet samples, without daisy and lady's slipper",
        "source": "EliSchwartz/imagenet-sample-images on GitHub", "terms": "ImageNet's: research only",
    },
    {"name": "squares of clothes", "source": "alexeygrigorev/clothing-dataset-small on GitHub", "terms": "CC0"},
]  # fmt: skip


def half(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors in float16, none of which may overflow."""
    halves = {name: value.half() if value.is_floating_point() else value for name, value in values.items()}
    for name, value in halves.items():
        if not torch.isfinite(value).all():
            raise SystemExit(f"{name} does not fit into float16; nothing is written")
    return {name: value.contiguous() for name, value in halves.items()}


def card(run: dict[str, Any], backbone: ek.Backbone, weights: Path, command: str, quality: dict[str, float]) -> Any:
    """Return the sidecar of the box: what loads the weights, then what a reader wants to know of them."""
    loading = ("format", "version", "architecture", "num_classes", "num_features", "model_args", "pretrained_cfg")
    return {
        "name": "nano",
        **{name: run[name] for name in (*loading, "load_defaults") if name in run},
        **({"projected": True} if run.get("projected") else {}),
        "weights": "model.safetensors",
        "files": {
            "model.safetensors": {
                "bytes": weights.stat().st_size, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            }
        },
        "dim": backbone.dim,
        "parameters": count_parameters(backbone),
        "weights_sha256": backbone.spec.weights_sha256,
        "digest": backbone.spec.digest,
        "licence": LICENCE,
        "training": {
            "initialised_from": INITIALISED_FROM, "images": DATA, "command": command, "config": "configs/nano.yaml",
            "teachers": run.get("parents", []), "recipe": run.get("recipe", {}),
            "information": run.get("information", {}),
        },
        "quality": {**run.get("metrics", {}), **quality},
        "embedkit": run.get("embedkit", ek.__version__),
    }  # fmt: skip


def main() -> None:
    """Write the box."""
    parser = argparse.ArgumentParser(description="Put a distilled student into the package as nano.")
    parser.add_argument("run", type=Path, help="folder that embedkit distill wrote")
    parser.add_argument("--command", default="see docs/nano.md", help="the whole command that made it")
    parser.add_argument("--quality", action="append", default=[], metavar="NAME=VALUE", help="a measured figure")
    choices = parser.parse_args()
    quality = {name: float(value) for name, _, value in (one.partition("=") for one in choices.quality)}
    run = json.loads((choices.run / "backbone.json").read_text(encoding="utf-8"))
    judged = ek.Backbone.load(choices.run, device="cpu")
    BOX.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BOX.parent) as place:
        fresh = Path(place, "model.safetensors")
        save_file(half(load_file(choices.run / run.get("weights", "model.safetensors"))), fresh)
        fresh.chmod(0o644)
        if fresh.stat().st_size > MOST_BYTES:
            raise SystemExit(f"{fresh.stat().st_size:,} bytes of weights are more than {MOST_BYTES:,}")
        Path(place, "backbone.json").write_text(json.dumps({**run, "weights": fresh.name, "files": {}}))
        backbone = ek.Backbone.load(place, device="cpu")
        values = card(run, backbone, fresh, choices.command, quality)
        fresh.replace(BOX / fresh.name)
    (BOX / "backbone.json").write_text(json.dumps(values, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    nano = ek.Backbone.load("nano", device="cpu")
    print(f"{BOX}: {nano.description}, digest {nano.spec.digest}")
    if nano.spec != judged.spec:
        print("The run's weights are float32: what was judged is not quite what lies in the box. Judge nano again.")


if __name__ == "__main__":
    main()
