"""Prints how fast a folder is embedded here, and how far that is from the limit of this machine.

    python benchmarks/extract_rate.py [IMAGES MODEL]

Without arguments it uses $EMBEDKIT_DATA or ../shared/data: the flower photographs and a MobileNetV2. Reading, decoding
and cropping are timed alone on one thread, then the network alone on ready pixels with the engine that the extraction
chose. With perfect overlap, w workers would embed w / (decode + forward) images a second: what `extract` reaches of
that is its efficiency. All of it runs in one process, because only ratios of one run can be trusted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import embedkit as ek
from embedkit.backbones import usable_processors
from embedkit.backbones.streaming import with_threads
from embedkit.sources import list_folder

SAMPLE = 256
ROUNDS = 3


def main() -> None:
    root = Path(os.environ.get("EMBEDKIT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    images = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "flowers"
    model = sys.argv[2] if len(sys.argv) > 2 else str(root / "weights" / "mobilenetv2_100.tf_in1k.json")
    if not images.is_dir():
        sys.exit(f"{images} does not exist; name a folder of images and a model, or set EMBEDKIT_DATA")
    backbone = ek.Backbone.load(model)
    files = list_folder(images).files
    sample = files[:: max(1, len(files) // SAMPLE)][:SAMPLE]
    workers = usable_processors()
    print(f"{backbone.description}; {len(files):,} images, {workers} workers")
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as name:
            ek.extract(images, Path(name, "store.h5"), backbone, report=Path(name, "run.json"))
            report = json.loads(Path(name, "run.json").read_text())
        engine, rate = report["engine"], report["measured"]["images_per_second"]
        decode, forward = with_threads(1, lambda engine=engine: alone(backbone, [file.path for file in sample], engine))  # type: ignore[misc]
        limit = workers / (decode + forward)
        print(
            f"engine {engine}: decode {1e3 * decode:.2f} ms + forward {1e3 * forward:.2f} ms on one thread, so "
            f"at most {limit:.1f} images/s; extract {rate:.1f} images/s, efficiency {rate / limit:.2f}"
        )


def alone(backbone: ek.Backbone, files: list[str], engine: str) -> tuple[float, float]:
    """Return what decoding and the forward pass of an image take, each alone."""
    started = time.perf_counter()
    crops = [backbone.pixels(Path(file).read_bytes()) for file in files]
    decode = (time.perf_counter() - started) / len(crops)
    chosen = backbone.choose_engine(crops[:16], len(crops), engine=engine).engine
    chosen(crops[:16])
    started = time.perf_counter()
    for start in range(0, len(crops), chosen.batch_size):
        chosen(crops[start : start + chosen.batch_size])
    return decode, (time.perf_counter() - started) / len(crops)


if __name__ == "__main__":
    main()
