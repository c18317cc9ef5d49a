"""Embeds scikit-learn's digit scans with a real backbone, then probes and searches them, all by the command line.

Run by ``make demo``. Everything it writes lies in demo-output/.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parents[1]
OUTPUT = HERE / "demo-output"
SIDECAR = "mobilenetv2_100.tf_in1k.json"


def find_weights() -> Path:
    """Return the sidecar of a real backbone, or say what is missing."""
    places = [HERE.parent / "shared" / "data"]
    if os.environ.get("EMBEDKIT_DATA"):
        places.insert(0, Path(os.environ["EMBEDKIT_DATA"]))
    for place in places:
        if (place / "weights" / SIDECAR).is_file():
            return place / "weights" / SIDECAR
    looked = "\n".join(f"  {place / 'weights' / SIDECAR}" for place in places)
    sys.exit(
        f"The demo needs the weights of a backbone, and found none at\n{looked}\n"
        "Set EMBEDKIT_DATA to a folder that has them as weights/NAME.json with weights/NAME.safetensors.\n"
        "With a network, any timm name works without them:\n"
        "  .venv/bin/embedkit extract photos/ -o photos.h5 -m mobilenetv3_small_100.lamb_in1k"
    )


def write_digits(folder: Path, split: Path) -> int:
    """Write 1,797 scans of handwritten digits as PNG files, every fifth of each digit for testing."""
    shutil.rmtree(folder, ignore_errors=True)
    scans, digits = load_digits(return_X_y=True)
    with split.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "split"])
        written: Counter[int] = Counter()
        for number, (scan, digit) in enumerate(zip(scans, digits.tolist(), strict=True)):
            path = folder / str(digit) / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.rint(scan.reshape(8, 8) * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(path)
            rows.writerow([path.relative_to(folder).as_posix(), "test" if written[digit] % 5 == 0 else "train"])
            written[digit] += 1
    return len(scans)


def run(*arguments: str | Path) -> None:
    """Run an embedkit command as a user would, and stop where it does."""
    texts = [os.path.relpath(part) if isinstance(part, Path) else part for part in arguments]
    print("\n$ embedkit", " ".join(texts), flush=True)
    subprocess.run([sys.executable, "-m", "embedkit", *texts], check=True)


def main() -> None:
    """Run the demo."""
    weights = find_weights()
    OUTPUT.mkdir(exist_ok=True)
    digits, split, store, page = (OUTPUT / name for name in ("digits", "split.csv", "digits.h5", "search.html"))
    print(f"wrote {write_digits(digits, split):,} scans of handwritten digits to {os.path.relpath(digits)}")
    run("extract", digits, "-o", store, "-m", weights, "--overwrite")
    run("extract", digits, "-o", store, "-m", weights)
    run("info", store)
    run("verify", store)
    run("probe", store, "--split", split, "--quiet")
    run("search", store, sorted((digits / "3").iterdir())[0], "-k", "8", "--html", page)
    print(f"\nstore: {store}\npage:  {page}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
