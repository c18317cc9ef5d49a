"""`embedkit bench`, killed with SIGKILL at random moments and started again until it is done.

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
from pathlib import Path
from typing import Any

import pytest

KILLS = int(os.environ.get("EMBEDKIT_KILLS", "12"))

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="an attempt is a fork, and this system has none")


class Nursery:
    """A process that has loaded torch and the command, and forks a child for each attempt: loading takes seconds."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def bench(self, suite: Path, output: Path, seconds: float = 60) -> tuple[int, float]:
        """Run the command, kill it after so many seconds, and return its exit status and how long it ran."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([str(suite), str(output), seconds]), file=self.process.stdin, flush=True)
        status, taken, error = json.loads(self.process.stdout.readline())
        assert status in (0, -signal.SIGKILL), error
        return status, taken

    def close(self) -> None:
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def cells_of(output: Path) -> dict[str, Any]:
    """Return what cells say, without where, when and how fast."""
    from embedkit.evaluation.cells import read_cell

    found = {}
    for path in sorted((output / "cells").glob("*.json")):
        cell = read_cell(path.parent, path.stem)
        assert cell is not None and cell.report is not None, "a cell was left in part"
        predictions = {name: array.tolist() for name, array in cell.report.predictions.items()}
        report = json.dumps(cell.report.to_dict()).replace(str(output), "")
        found[cell.name] = (cell.key, report, predictions)
    return found


def test_a_bench_that_is_killed_again_and_again(
    nursery: Nursery, photos: Path, tiny_backbone: Path, other_backbone: Path, tmp_path: Path
) -> None:
    rows = [f"{kind}/{n}.jpg,{'train' if n <= 8 else 'test'}" for kind in ("cat", "dog") for n in range(1, 13)]
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *rows]) + "\n")
    suite = tmp_path / "pets.yaml"
    suite.write_text(
        f"backbones: [{tiny_backbone}, {other_backbone}]\ndata: [{{images: photos, split: split.csv}}]\n"
        "protocols: [default, mteb-image]\n"
    )
    status, seconds = nursery.bench(suite, tmp_path / "undisturbed")
    expected = cells_of(tmp_path / "undisturbed")
    assert status == 0 and len(expected) == 4
    chance, kills, runs, between = random.Random(0), 0, 0, 0
    while kills < KILLS:
        output, kept = tmp_path / f"run {runs}", set[str]()
        while True:
            limit = chance.uniform(0, seconds * 0.9) if kills < KILLS else 60.0
            status, _ = nursery.bench(suite, output, limit)
            now = cells_of(output)
            assert kept <= now.keys(), "a cell that was measured is not there any more"
            assert all(expected[name] == cell for name, cell in now.items())
            kept = set(now)
            if status == 0:
                break
            kills += 1
            between += 0 < len(now) < 4
        assert cells_of(output) == expected
        tables = [(folder / "table.csv").read_text() for folder in (output, tmp_path / "undisturbed")]
        assert len(tables[0].splitlines()) == len(tables[1].splitlines()) == 5
        names = {path.name for path in output.rglob("*") if path.is_file()}
        assert names == {path.name for path in (tmp_path / "undisturbed").rglob("*") if path.is_file()}
        runs += 1
    print(f"{kills} kills, {between} of them between the first and the last cell, {runs} runs")
    assert runs and kills >= KILLS


# In the nursery.


def _nursery() -> None:
    import torch

    torch.set_num_threads(1)  # Threads would not live in a fork.
    import embedkit.evaluation.bench_page
    import embedkit.extraction
    from embedkit.backbones import import_timm

    import_timm()
    embedkit.extraction.SECONDS_A_PART = 0.0  # So that a part is one batch, and a short run has many.
    for line in sys.stdin:
        print(json.dumps(_attempt(*json.loads(line))), flush=True)


def _attempt(suite: str, output: str, seconds: float) -> list[object]:
    """Fork a child that runs the command, kill it in time, and return its status, seconds and error."""
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(suite, output, writing)
    os.close(writing)
    # The pipe closes when the child ends.
    if not select.select([reading], [], [], seconds)[0]:
        os.kill(child, signal.SIGKILL)  # Not waited for yet, so no other process can have its number.
    error = b""
    while data := os.read(reading, 1 << 16):
        error += data
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [status, time.monotonic() - started, error.decode()]


def _child(suite: str, output: str, writing: int) -> None:
    from embedkit.cli import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        main(["bench", suite, "-o", output, "-q", "-j", "1"], standalone_mode=False)
    except BaseException as error:
        if getattr(error, "exit_code", getattr(error, "code", 1)):
            os.write(writing, traceback.format_exc().encode())
            os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _nursery()
