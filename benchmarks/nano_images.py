"""Gather the public images that nano learned from, out of clones of four repositories, for embedkit distill.

    git clone https://github.com/seshuad/IMagenet clones/IMagenet
    git clone https://github.com/ndb796/Scene-Classification-Dataset-Split clones/Scene-Classification-Dataset-Split
    git clone https://github.com/EliSchwartz/imagenet-sample-images clones/imagenet-sample-images
    git clone https://github.com/alexeygrigorev/clothing-dataset-small clones/clothing-dataset-small
    python benchmarks/nano_images.py clones images

writes images/photos: squares of the photographs, the largest one in the middle of each and others drawn by chance, all
192 pixels wide, since a student that sees 112 pixels needs no more. Everything else is used where it lies; the command
to go on with is printed. Flowers judge nano, so the two among the ImageNet samples are left out.

The squares that nano itself learned from were drawn in the same way from another random stream.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, QUALITY = 192, 90
SQUARES = {"imagenet-sample-images": 12, "clothing-dataset-small": 4}
LEFT_OUT = ("n11939491_daisy", "n12057211_yellow_lady's_slipper")
IN_PLACE = {
    "train": "IMagenet/tiny-imagenet-200/train",
    "test": "IMagenet/tiny-imagenet-200/test",
    "scenes": "Scene-Classification-Dataset-Split",
}
SUFFIXES = {".jpg", ".jpeg", ".png"}


def boxes(name: str, width: int, height: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the square in the middle, and others of 0.3 to 1 of its area, the same ones for a name every time."""
    random = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    for number in range(count):
        side = min(width, height)
        if number:
            side = max(1, int(side * random.uniform(0.3, 1.0) ** 0.5))
            left, top = (int(random.integers(0, room + 1)) for room in (width - side, height - side))
        else:
            left, top = (width - side) // 2, (height - side) // 2
        yield left, top, left + side, top + side


def write_squares(clone: Path, output: Path, count: int) -> int:
    """Write the squares of every photograph of a clone, and return how many there are."""
    output.mkdir(parents=True, exist_ok=True)
    written = 0
    for path in sorted(clone.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.stem.startswith(LEFT_OUT):
            continue
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        width, height = image.size
        for number, box in enumerate(boxes(path.stem, width, height, count)):
            square = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)
            square.save(output / f"{path.stem}-{number}.jpg", quality=QUALITY)
            written += 1
    return written


def main() -> None:
    """Write the squares, and print the command."""
    parser = argparse.ArgumentParser(description="Gather the public images that nano learned from.")
    parser.add_argument("clones", type=Path, help="folder of the clones")
    parser.add_argument("output", type=Path, help="folder for the squares of photographs")
    choices = parser.parse_args()
    for needed in (*IN_PLACE.values(), *SQUARES):
        if not (choices.clones / needed).is_dir():
            parser.error(f"{choices.clones / needed} is missing; the head of this file says what to clone")
    for name, count in SQUARES.items():
        written = write_squares(choices.clones / name, choices.output / "photos" / name, count)
        print(f"{name}: {written:,} squares", flush=True)
    sources = [f"{role}={choices.clones / folder}" for role, folder in IN_PLACE.items()]
    named = " ".join([*sources, f"photos={choices.output / 'photos'}"])
    print(f"embedkit distill --config configs/nano.yaml {named} -o runs/nano")


if __name__ == "__main__":
    main()
