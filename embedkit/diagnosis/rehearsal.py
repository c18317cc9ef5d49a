"""The things themselves, tried out: a small extraction from beginning to end, and decoding in another process."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from embedkit.diagnosis.findings import FAIL, OK, WARN, Finding

if TYPE_CHECKING:
    from embedkit.extraction import Progress

_IMAGES, _HEIGHT, _WIDTH, _SIDE = 200, 480, 640, 128
# On one thread of a processor of the last ten years an image of this size takes 2 to 5 ms to decode, and this network
# about 2 ms; more than this is no fault of the machine's age.
_MOST_DECODE_MS, _MOST_FORWARD_MS = 20.0, 30.0


def selftest() -> Iterator[Finding]:
    """Embed made-up photographs by a small network of random weights, verify the store, and search in it."""
    from embedkit.backbones import Backbone
    from embedkit.extraction import extract
    from embedkit.index import Index
    from embedkit.store import verify

    states: list[Progress] = []
    with tempfile.TemporaryDirectory(prefix="embedkit-doctor-") as place:
        folder = Path(place)
        _write_photos(folder / "photos")
        backbone = Backbone.load(_write_backbone(folder), device="cpu")
        store = extract(folder / "photos", folder / "photos.h5", backbone, engine="eager", progress=states.append)
        problems = [str(problem) for problem in verify(folder / "photos.h5")]
        rows = [0, len(store.ids) // 2, len(store.ids) - 1]
        result = Index.build(store).search(rows, 1)
        lost = [store.ids[row] for row, found in zip(rows, result.rows[:, 0].tolist(), strict=True) if row != found]
        if store.failures or len(store.ids) != _IMAGES:
            problems.append(f"{len(store.failures)} of {_IMAGES} images failed")
        if lost:
            problems.append(f"a search for {lost[0]} does not find it")
    if problems:
        advice = "memory, disk or a library is at fault: run it again, then in a fresh virtual environment"
        yield Finding("self-test", FAIL, "; ".join(problems), advice)
        return
    yield _judged(states[-1])


def isolation() -> Iterator[Finding]:
    """Decode an image in a process of its own."""
    import numpy as np

    from embedkit.images import DECODERS, Isolated, read_crop
    from embedkit.spec import Preprocessing

    preprocessing = Preprocessing(decoder=DECODERS["standard"])
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    started = time.perf_counter()
    with Isolated(preprocessing, seconds=10) as read:
        alike = (read(pixels) == read_crop(pixels, preprocessing)).all()
    text = f"a process for decoding starts in {time.perf_counter() - started:.1f} s"
    if alike:
        yield Finding("isolation", OK, text)
    else:
        yield Finding(
            "isolation", FAIL, f"{text}, and returns other pixels", "do without --isolate, and report this line"
        )


def _judged(end: Progress) -> Finding:
    from embedkit.backbones import usable_processors

    measured = end.measured
    each = 1000 * usable_processors() * measured.seconds / _IMAGES
    decode, forward = each * measured.decode, each * measured.forward
    text = f"{_IMAGES} images embedded, verified and found, {measured.images_per_second:.0f} images/s "
    text += f"({decode:.1f} ms to decode, {forward:.1f} ms to compute)"
    slow = [name for name, ms, most in (
        ("decoding", decode, _MOST_DECODE_MS), ("computing", forward, _MOST_FORWARD_MS),
    ) if ms > most]  # fmt: skip
    if not slow:
        return Finding("self-test", OK, text)
    advice = "other programs, a processor that saves power, or one that is emulated (see processor and load above)"
    return Finding("self-test", WARN, f"{text}; {' and '.join(slow)} is slow", advice)


def _write_photos(folder: Path) -> None:
    import numpy as np

    from embedkit.images import read_image, thumbnail

    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(_IMAGES):
        tiles = random.integers(0, 240, (_HEIGHT // 40, _WIDTH // 40, 3), dtype=np.uint8)
        pixels = tiles.repeat(40, axis=0).repeat(40, axis=1)
        pixels += random.integers(0, 16, (_HEIGHT, _WIDTH, 1), dtype=np.uint8)
        (folder / f"{number}.jpg").write_bytes(thumbnail(read_image(pixels), _WIDTH))


def _write_backbone(folder: Path) -> Path:
    """Write a network with random weights, and return its sidecar."""
    import torch
    from safetensors.torch import save_file

    from embedkit.backbones import import_timm

    torch.manual_seed(0)
    save_file(import_timm().create_model("test_resnet", num_classes=10).state_dict(), folder / "small.safetensors")
    config = {"input_size": [3, _SIDE, _SIDE], "num_classes": 10, "crop_pct": 0.875, "interpolation": "bicubic"}
    path = folder / "small.json"
    path.write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": config}), encoding="utf-8")
    return path
