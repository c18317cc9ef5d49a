"""A real extraction, killed with SIGKILL at random moments and started again until it is done.

EMBEDKIT_KILLS=200 kills that often.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

KILLS = int(os.environ.get("EMBEDKIT_KILLS", "15"))
IMAGES, BATCH = 60, 4

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="an attempt is a fork, and this system has none")


@dataclass
class Attempt:
    """What became of one: exit status (negative for a signal), (done, committed, kept) of each report, and seconds."""

    status: int
    reports: list[list[int]]
    seconds: float
    last_report: float
    error: str


class Nursery:
    """A process that has loaded the backbone, and forks a child for each attempt: loading takes seconds."""

    def __init__(self, backbone: Path) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, os.fspath(backbone)], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def extract(self, images: Path, output: Path, seconds: float = 60, *, once_computed: bool = False) -> Attempt:
        """Extract, and kill after so many seconds; they count from the start, or from when all is computed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([str(images), str(output), seconds, once_computed]), file=self.process.stdin, flush=True)
        attempt = Attempt(*json.loads(self.process.stdout.readline()))
        assert attempt.status in (0, -signal.SIGKILL), attempt.error
        return attempt

    def close(self) -> None:
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in two classes, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("kill") / "images"
    chance = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / ("cat" if number % 2 else "dog") / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (72, 96, 3), dtype=np.uint8)).save(path)
        if number in (7, 42):
            path.write_bytes(path.read_bytes()[:500])
    return folder


@pytest.fixture(scope="module")
def fewer(images: Path) -> Path:
    """A third of them, and others that are gone or different later."""
    folder = images.with_name("fewer")
    for path in sorted(images.rglob("*.jpg"))[::3]:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / path.parent.name)
    shutil.copy2(images / "cat" / "03.jpg", folder / "cat" / "05.jpg")
    shutil.copy2(images / "cat" / "03.jpg", folder / "cat" / "gone.jpg")
    return folder


@pytest.fixture(scope="module")
def nursery(tiny_backbone: Path) -> Iterator[Nursery]:
    nursery = Nursery(tiny_backbone)
    yield nursery
    nursery.close()


def parts_of(output: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of each part of an unfinished run."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in output.parent.glob(f"{output.name}.parts/part-*.h5")
    }


def rows_of(output: Path) -> int:
    """Return how many images the parts of an unfinished run have settled."""
    from embedkit.store.parts import read_parts

    folder = output.with_name(f"{output.name}.parts")
    note = json.loads((folder / "run.json").read_bytes()) if (folder / "run.json").exists() else {"digest": ""}
    parts = read_parts(folder, note["digest"]).values() if folder.is_dir() else []
    return sum(len(part.images) + len(part.failures) for part in parts)


@pytest.mark.parametrize("kind", ["fresh", "update"])
def test_an_extraction_that_is_killed_again_and_again(
    kind: str, nursery: Nursery, images: Path, fewer: Path, tmp_path: Path
) -> None:
    from embedkit import Store
    from embedkit.store import verify

    base = tmp_path / "base.h5"
    if kind == "update":
        assert nursery.extract(fewer, base).status == 0

    def begin(name: str) -> Path:
        if base.exists():
            shutil.copy(base, tmp_path / name)
        return tmp_path / name

    undisturbed = begin("undisturbed.h5")
    whole = nursery.extract(images, undisturbed)
    assert whole.status == 0
    expected = Store.open(undisturbed)
    unknown = IMAGES - whole.reports[0][2]
    chance = random.Random(kind)
    kills = stores = kills_at_the_end = 0
    while kills < KILLS:
        output = begin(f"{stores}.h5")
        before = output.read_bytes() if output.exists() else None
        committed = 0
        while True:
            parts, rows, published = parts_of(output), rows_of(output), _bytes(output) != before
            late = chance.random() < 0.25
            seconds = chance.uniform(0, whole.seconds - whole.last_report if late else whole.seconds * 0.8)
            attempt = nursery.extract(images, output, seconds if kills < KILLS else 60, once_computed=late)
            for done, now, kept in attempt.reports:
                assert now >= committed, "what was committed is not any more"
                assert kept == (IMAGES if published else IMAGES - unknown + rows), "parts were there and not kept"
                assert done >= now
                committed = now
            batches = -(-(IMAGES - attempt.reports[0][2]) // BATCH) if attempt.reports else 0
            assert len(attempt.reports) <= 2 + batches, "more was computed than was missing"
            if attempt.status == 0:
                break
            kills += 1
            kills_at_the_end += committed == IMAGES
            assert _bytes(output) == before or verify(output) == []
            if _bytes(output) == before:
                left = parts_of(output)
                assert left.items() >= parts.items(), "a part was written again"
                assert rows_of(output) + IMAGES - unknown >= committed
        stores += 1
        store = Store.open(output)
        assert verify(output) == [] and not output.with_name(f"{output.name}.parts").exists()
        assert store.content_id == expected.content_id and store.ids == expected.ids
        assert store.embeddings.tobytes() == expected.embeddings.tobytes()
        assert store.labels is not None and expected.labels is not None
        assert store.labels.tolist() == expected.labels.tolist() and store.classes == expected.classes
        assert store.failures == expected.failures and len(store.failures) == 2
    print(f"{kind}: {kills} kills, {kills_at_the_end} of them when all was computed, {stores} stores")
    assert stores and kills >= KILLS


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


# In the nursery.


def _nursery(backbone: str) -> None:
    import torch

    torch.set_num_threads(1)  # Threads would not live in a fork.
    import embedkit.extraction

    embedkit.extraction.SECONDS_A_PART = 0.0  # So that a part is one batch, and a short run has many.
    loaded = embedkit.Backbone.load(backbone)
    for line in sys.stdin:
        print(json.dumps(_attempt(loaded, *json.loads(line))), flush=True)


def _attempt(backbone: object, images: str, output: str, seconds: float, once_computed: bool) -> list[object]:
    """Fork a child that extracts, kill it in time, and return what an `Attempt` holds."""
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(backbone, images, output, writing)
    os.close(writing)
    kill_at = None if once_computed else started + seconds
    heard, last_report = b"", 0.0
    while True:
        now = time.monotonic()
        if kill_at is not None and now >= kill_at:
            os.kill(child, signal.SIGKILL)  # Not waited for yet, so no other process can have its number.
            kill_at = None
        ready, _, _ = select.select([reading], [], [], None if kill_at is None else kill_at - now)
        if ready:
            data = os.read(reading, 1 << 16)
            if not data:
                break
            heard += data
            last_report = time.monotonic() - started
            if once_computed and heard.splitlines()[-1].split()[1] == str(IMAGES).encode():
                once_computed, kill_at = False, time.monotonic() + seconds
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = heard.decode().splitlines()
    reports = [[int(word) for word in line.split()] for line in lines] if status in (0, -signal.SIGKILL) else []
    return [status, reports, time.monotonic() - started, last_report, "" if reports else heard.decode()]


def _child(backbone: object, images: str, output: str, writing: int) -> None:
    import embedkit

    def progress(now: embedkit.extraction.Progress) -> None:
        os.write(writing, f"{now.done} {now.committed} {now.kept}\n".encode())

    try:
        embedkit.extract(images, output, backbone, batch_size=BATCH, workers=1, progress=progress)
    except BaseException:
        os.write(writing, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _nursery(*sys.argv[1:])
