"""Embeds scikit-learn's digit scans and photographs with the backbone in the box, then probes and searches them.

Run by ``make demo``, all by the command line, without a network. Everything it writes lies in demo-output/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

OUTPUT = Path(__file__).resolve().parents[1] / "demo-output"


def write_digits(folder: Path, limit: int | None) -> int:
    """Write scans of handwritten digits as PNG files, a folder for each digit: 1,797, or the first few of them."""
    scans, digits = load_digits(return_X_y=True)
    for number, (scan, digit) in enumerate(zip(scans[:limit], digits[:limit].tolist(), strict=True)):
        path = folder / str(digit) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(scan.reshape(8, 8) * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return len(scans[:limit])


def write_photographs(folder: Path) -> int:
    """Write scikit-learn's sample photographs as JPEG files."""
    folder.mkdir(parents=True)
    photographs = load_sample_images()
    for name, pixels in zip(photographs.filenames, photographs.images, strict=True):
        Image.fromarray(pixels).save(folder / Path(name).name, quality=95)
    return len(photographs.images)


def run(*arguments: str | Path) -> None:
    """Run an embedkit command as a user would, and stop where it does."""
    texts = [os.path.relpath(part) if isinstance(part, Path) else part for part in arguments]
    print("\n$ embedkit", " ".join(texts), flush=True)
    subprocess.run([sys.executable, "-m", "embedkit", *texts], check=True)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Embed, probe and search scikit-learn's pictures.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for everything that is written")
    parser.add_argument("--limit", type=int, help="take only the first digits")
    choices = parser.parse_args()
    output = choices.output
    digits, photographs = output / "digits", output / "photographs"
    store, labelled, page = output / "demo.h5", output / "digits.h5", output / "search.html"
    for folder in (digits, photographs):
        shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {write_digits(digits, choices.limit):,} scans of handwritten digits to {os.path.relpath(digits)}")
    print(f"wrote {write_photographs(photographs)} photographs to {os.path.relpath(photographs)}")
    run("extract", digits, photographs, "-o", store, "--overwrite")
    run("extract", digits, photographs, "-o", store)  # Nothing has changed: nothing is computed.
    run("info", store)
    run(
        "select", store, "-o", labelled, "--where", "id=digits/*", "--overwrite", "--quiet"
    )  # Photographs have no label.
    run("probe", labelled, "--folds", "5", "--quiet")
    run("search", store, sorted((digits / "3").iterdir())[0], "-k", "8", "--html", page)
    print(f"\nstore: {store}\npage:  {page}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
