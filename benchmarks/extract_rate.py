"""Prints how fast a folder is embedded here, and where the time goes.

    python benchmarks/extract_rate.py IMAGES MODEL

Without arguments it uses $EMBEDKIT_DATA or ../shared/data: 1,000 flower photographs and a MobileNetV2. The reading,
decoding and cropping are timed alone on one thread, the network alone on ready pixels, and both together as `extract`
runs them; all of it in one process, because only ratios of one run can be trusted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import embedkit as ek
from embedkit.images import list_images

LIMIT = 1000


def main() -> None:
    root = Path(os.environ.get("EMBEDKIT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    images = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "flowers"
    model = sys.argv[2] if len(sys.argv) > 2 else str(root / "weights" / "mobilenetv2_100.tf_in1k.json")
    if not images.is_dir():
        sys.exit(f"{images} does not exist; name a folder of images and a model, or set EMBEDKIT_DATA")
    backbone = ek.Backbone.load(model)
    files = list_images(images).files
    files = files[:: max(1, len(files) // LIMIT)][:LIMIT]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "images")
        for file in files:
            link = folder / file.id
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(file.path).resolve())

        started = time.perf_counter()
        crops = [backbone.pixels(file.path) for file in files[:200]]
        decode = len(crops) / (time.perf_counter() - started)
        started = time.perf_counter()
        for start in range(0, len(crops), 32):
            backbone.embed_pixels(crops[start : start + 32])
        forward = len(crops) / (time.perf_counter() - started)
        started, cpu = time.perf_counter(), time.process_time()
        ek.extract(folder, Path(name, "store.h5"), backbone)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(f"{backbone.description}; {len(files)} images")
    print(f"decode and crop, one thread  {decode:8.1f} images/s")
    print(f"network, all threads         {forward:8.1f} images/s")
    print(
        f"extract                      {len(files) / seconds:8.1f} images/s, {cpu / len(files) * 1e3:.1f} CPU ms/image"
    )


if __name__ == "__main__":
    main()
