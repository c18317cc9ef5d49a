"""How long listing a folder of a million images takes, and how much memory: python benchmarks/listing_speed.py.

The files are empty, for a listing opens none. Each measurement is a process of its own, so that its peak memory is its
own; the same walk by pathlib and by os.walk stand beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = {
    "embedkit": "from embedkit.sources import list_folder\nfound = len(list_folder(root).files)",
    "embedkit, statuses": (
        "from embedkit.sources import list_folder\nfound = sum(1 for file in list_folder(root).files if file.status())"
    ),
    "os.walk, sorted": (
        "found = len(sorted(os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names"
        " if name.lower().endswith(('.jpg', '.png'))))"
    ),
    "pathlib.rglob, sorted": "from pathlib import Path\nfound = len(sorted(Path(root).rglob('*.jpg')))",
}
CODE = """
import json, os, resource, sys, time
root = sys.argv[1]
started = time.perf_counter()
{}
seconds = time.perf_counter() - started
print(json.dumps([found, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        shapes = {"one folder": 1, "1,000 folders": 1000}
        for shape, folders in shapes.items():
            root = Path(folder, str(folders))
            for number in range(folders):
                (root / f"class_{number:04}").mkdir(parents=True)
            for number in range(count):
                (root / f"class_{number % folders:04}" / f"photograph_{number:08}.jpg").touch()
            print(f"{count:,} files in {shape}")
            for method, code in METHODS.items():
                done = subprocess.run(
                    [sys.executable, "-c", CODE.format(code), root], check=True, capture_output=True, text=True
                )
                found, seconds, peak = json.loads(done.stdout)
                print(f"  {method:<24} {found:>10,} found {seconds:>7.2f} s {peak / 1e6:>7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
