"""Measures how far every mode is from timm's transform with eager float32: cosine, and neighbours in common.

    python benchmarks/fidelity.py [--images 500]

Uses $EMBEDKIT_DATA or ../shared/data: photographs and the weights of real networks, because random weights forgive
more. The reference is written with timm and Pillow alone. The table is written to benchmarks/results/fidelity.md.
fp16 is left to GPUs: processors without it take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import embedkit as ek
from embedkit.backbones import ENGINES, import_timm, usable_processors
from embedkit.backbones.streaming import with_threads

MODES: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, "eager"),
    "--decode exact": ({"decode": "exact"}, "eager"),
    "--decode fast": ({"decode": "fast"}, "eager"),
    "graph": ({"decode": "exact"}, "graph"),
    "openvino": ({"decode": "exact"}, "openvino"),
    "--precision bf16, eager": ({"precision": "bf16"}, "eager"),
    "--precision bf16, openvino": ({"precision": "bf16"}, "openvino"),
}
Embeddings = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="of other photographs")
    parser.add_argument("--name", default="fidelity", help="of the file in benchmarks/results/")
    arguments = parser.parse_args()
    data = Path(os.environ.get("EMBEDKIT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not data.is_dir():
        sys.exit(f"{data} does not exist; set EMBEDKIT_DATA to a folder with weights/ and photographs")
    every = sorted((arguments.folder or data / "flowers").rglob("*.jpg"))
    files = every[:: max(1, len(every) // arguments.images)][: arguments.images]
    lines = [
        f"# Fidelity on {len(files)} photographs of {(arguments.folder or data / 'flowers').name}", "",
        "Against timm's transform and eager float32. Overlap: share of the ten nearest neighbours in common.", "",
        "| weights | mode | cosine mean | cosine min | top-10 overlap |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for sidecar in sorted((data / "weights").glob("*.json")):
        expected = reference(sidecar, files)
        for mode, (options, engine) in MODES.items():
            try:
                found = embed(ek.Backbone.load(sidecar, **options), files, engine)
            except ek.BackboneError as error:
                lines.append(f"| {sidecar.stem} | {mode} | {error} | | |")
                continue
            cosines = (unit(found) * unit(expected)).sum(1)
            overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(near(found), near(expected), strict=True)])
            lines.append(f"| {sidecar.stem} | {mode} | {cosines.mean():.6f} | {cosines.min():.6f} | {overlap:.4f} |")
            print(lines[-1], flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{arguments.name}.md").write_text("\n".join(lines) + "\n")


def reference(sidecar: Path, files: list[Path]) -> Embeddings:
    """Embed by timm and Pillow, one image at a time."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    timm = import_timm()
    values = json.loads(sidecar.read_text())
    config = values["pretrained_cfg"]
    network = timm.create_model(values["timm_architecture"], num_classes=0, **values["timm_kwargs"]).eval()
    network.load_state_dict(load_file(sidecar.with_suffix(".safetensors")), strict=False)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config), is_training=False)

    def run() -> Embeddings:
        with torch.inference_mode():
            rows = [network(transform(Image.open(file).convert("RGB")).unsqueeze(0)).numpy() for file in files]
        return np.concatenate(rows)

    return with_threads(usable_processors(), run)


def embed(backbone: ek.Backbone, files: list[Path], engine: str) -> Embeddings:
    """Embed by one engine, taken at its word."""
    if engine not in ENGINES:
        raise ek.BackboneError(f"no engine {engine}")
    crops = [backbone.pixels(file) for file in files]
    chosen = backbone.choose_engine(crops[:8], len(crops), engine=engine).engine
    return with_threads(usable_processors(), lambda: backbone.run(chosen, crops, ()))[""]


def unit(rows: Embeddings) -> npt.NDArray[np.float64]:
    """Return rows of length one."""
    wide = rows.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def near(rows: Embeddings) -> npt.NDArray[np.int64]:
    """Return the ten nearest others of every row."""
    scores = unit(rows) @ unit(rows).T
    np.fill_diagonal(scores, -2)
    return np.argsort(-scores, axis=1)[:, :10]


if __name__ == "__main__":
    main()
