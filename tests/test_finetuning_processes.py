"""Training in processes of its own: killed at any moment, and several at once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("test_finetuning_training.py")
KILLS = int(os.environ.get("EMBEDKIT_KILLS", "6"))
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def end_of(folder: Path, rank: int = 0) -> dict[str, Tensor]:
    return load_file(folder / f"end-{rank}.safetensors")


def rows_of(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / f"history-{rank}.json").read_text())["epochs"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


class Trainer:
    """A process that has loaded everything, and forks a child for each run."""

    def __init__(self, backbone: Path, photos: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, backbone, photos], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate(timeout=60)

    def train(self, folder: Path, changes: dict[str, Any], updates: int = 10**6, delay: float = 0.0) -> int:
        """Train, and kill so many seconds after so many updates; return the exit status."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([os.fspath(folder), changes]), file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        while (line := self.process.stdout.readline()) and not line.startswith("end"):
            updates -= 1
            if updates == 0:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
        return int(line.split()[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a run is a fork, and this system has none")
def test_a_run_killed_at_any_moment_ends_in_the_weights_and_figures_of_an_unbroken_one(
    tiny_backbone: Path, photos: Path, tmp_path: Path
) -> None:
    changes = {"epochs": 5, "batch_size": 4, "model_ema": 0.9, "patience": 4}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    draw, statuses = random.Random(0), []
    with Trainer(tiny_backbone, photos) as trainer:
        assert trainer.train(whole, changes) == 0
        for _ in range(KILLS):
            # Three updates are an epoch; some milliseconds behind the third, the state is being written.
            updates, delay = draw.choice([1, 2, 3, 3, 3, 4]), draw.random() * 0.03
            statuses.append(trainer.train(broken, changes, updates, delay))
        assert trainer.train(broken, changes) == 0
    assert signal.SIGKILL in statuses
    left, right = end_of(whole), end_of(broken)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert rows_of(whole) == rows_of(broken)
    left, right = (load_file(folder / "state" / "last.safetensors") for folder in (whole, broken))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert len(list((broken / "state").iterdir())) == 2


WAITING = """
import os, sys, torch
from torch.distributed import distributed_c10d
from embedkit.finetuning.training.distributed import join_world

with join_world() as world:
    world.wait()
    group = distributed_c10d._get_default_group()
    os.write(1, b"%d " % group._get_backend(torch.device("cpu")).options._timeout.days)
    if world.rank == 1:
        sys.exit("the other dies")
    world.wait()
"""


def test_a_process_waits_for_days_but_not_for_one_that_died(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "the other dies" in done.stderr
    assert done.stdout.split() == ["20", "20"]


def test_two_processes_train_as_one_with_the_double_batch(tiny_backbone: Path, photos: Path, tmp_path: Path) -> None:
    def run(launcher: list[str], folder: Path, changes: dict[str, Any]) -> None:
        done = subprocess.run(
            [sys.executable, *launcher, SCRIPT, tiny_backbone, photos, folder, json.dumps(changes)], env=ENVIRONMENT,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    # 12 images in steps of 10: a last batch of 6 and 6, whose halves are 3 and 3. One process runs out of memory.
    run([], tmp_path / "one", {"batch_size": 10})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(torchrun, tmp_path / "two", {"batch_size": 5, "narrow": 1})
    one, two, other = end_of(tmp_path / "one"), end_of(tmp_path / "two"), end_of(tmp_path / "two", rank=1)
    for name, value in two.items():
        assert torch.equal(value, other[name])
        torch.testing.assert_close(one[name.replace("head.inside.", "head.")], value, rtol=1e-3, atol=1e-5)
    rows = rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), rows_of(tmp_path / "two", rank=1)
    for left, right, behind in zip(*rows, strict=True):
        assert (left["images"], right["images"], right["batch_size"], behind["batch_size"]) == (12, 12, 5, 1)
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-3) and right["loss"] == behind["loss"]
        assert left["metrics"] == pytest.approx(right["metrics"], rel=1e-3) and right["metrics"] == behind["metrics"]
