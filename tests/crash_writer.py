"""A writer to crash: one run over 40 images whose embeddings follow from their bytes. It needs no torch.

As a program it is given the store, what to make of it and, perhaps, that it is to wait once it has begun.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from embedkit.spec import EmbeddingSpec
from embedkit.store import Failures, Images, Inventory, Rows, Run

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=3)
TARGET = "s.h5"
PART_ROWS, BATCH_ROWS = 8, 4


def images(generation: str) -> dict[str, tuple[bytes, int]]:
    """Return content and modification time by id: 40 images, or what became of them later."""
    world = {f"{number:02}.jpg": (f"picture {number:02}, first".encode(), 1000 + number) for number in range(40)}
    world["13.jpg"] = world["31.jpg"] = (b"broken", 1)
    if generation == "shrink":  # Nothing is to be computed, so no plan is ever written down.
        return {id: image for id, image in world.items() if id[0] != "2"}
    if generation == "update":
        for number in (0, 1, 17, 18, 19, 38):  # Changed.
            world[f"{number:02}.jpg"] = (f"picture {number:02}, later".encode(), 2000 + number)
        world |= {f"new {number:02}.jpg": (f"picture {number:02}, new".encode(), 3000) for number in range(12)}
        world["moved.jpg"] = world.pop("05.jpg")
        world["06.jpg"] = (world["06.jpg"][0], 4000)  # Touched: another time, the same bytes.
        for id in ("07.jpg", "08.jpg", "39.jpg"):
            del world[id]
        world["31.jpg"] = (b"mended", 2)
    return world


def perform(target: Path, generation: str, say: Callable[[str], None]) -> None:
    """Make or update the store, and say what was computed, which part is durable, and that all is done."""
    world = images(generation)
    ids = sorted(world)
    inventory = Inventory(
        np.array([id.encode() for id in ids]),
        np.array([len(world[id][0]) for id in ids]),
        np.array([world[id][1] for id in ids]),
    )
    with Run(target, SPEC) as run:
        update = run.prepare(
            inventory,
            lambda numbers: [(number, hashlib.sha256(world[ids[number]][0]).digest()) for number in numbers],
            part_size=lambda count: PART_ROWS,
            batch_size=BATCH_ROWS,
        )
        for part in run.parts.values():
            for id in [*part.images.ids.tolist(), *part.failures.ids.tolist()]:
                say(f"kept {id.decode()}")  # What is kept counts as committed from the first moment on.
        say("begun")
        for number in update.todo:
            part = [id.decode() for id in update.plan.part(number).tolist()]
            for id in part:
                say(f"computed {id}")
            run.write(number, _rows({id: world[id] for id in part}))
            say(f"ack {number}")
        run.finalise(update)
    say("done")


def _rows(part: dict[str, tuple[bytes, int]]) -> Rows:
    good = {id: image for id, image in part.items() if image[0] != b"broken"}
    bad = {id: image for id, image in part.items() if id not in good}
    hashes = [hashlib.sha256(content).digest() for content, _ in good.values()]
    embeddings = np.array([list(sha256[:3]) for sha256 in hashes], dtype=np.float32).reshape(-1, 3)
    return Rows(
        Images.of(list(good), [len(content) for content, _ in good.values()], [t for _, t in good.values()], hashes),
        Failures.of(list(bad), ["truncated"] * len(bad), [6] * len(bad), [time for _, time in bad.values()]),
        {"": embeddings},
    )


@dataclass
class Said:
    """What writers have said so far."""

    acknowledged: set[str] = field(default_factory=set)
    computed: list[str] = field(default_factory=list)
    done: bool = False

    def __call__(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word == "computed":
            self.computed.append(rest)
        elif word == "kept":
            self.acknowledged.add(rest)
        elif word == "ack":
            self.acknowledged |= set(self.computed)
        self.done = word == "done"


def _main(target: str, generation: str, wait: str = "") -> None:
    """Run the writer; one that is to wait says that it has begun, and goes on when its input ends."""
    waiting = bool(wait)

    def say(text: str) -> None:
        nonlocal waiting
        os.write(1, f"{text}\n".encode())
        if waiting:
            sys.stdin.read()
            waiting = False

    perform(Path(target), generation, say)


if __name__ == "__main__":
    _main(*sys.argv[1:])
