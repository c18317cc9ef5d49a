"""How fast a backbone is on a data set, measured on the machine at hand, and what was timed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedkit.backbones import Backbone, usable_processors
from embedkit.evaluation.cells import write_whole
from embedkit.evaluation.leftovers import folder_aside
from embedkit.extraction import extract
from embedkit.machine import processor_facts
from embedkit.sources import list_images
from embedkit.store import Store
from embedkit.store.locking import now

SAMPLE = 256
_FEWEST = 64  # A shorter extraction says little of a long one.


@dataclass(frozen=True)
class Speed:
    """A measured rate.

    Parameters
    ----------
    images_per_second : float
        From the files to the embeddings: reading, decoding, resizing and the forward pass.
    images : int
        How many were timed.
    seconds : float
        How long that took, without loading the backbone and trying engines.
    what : {"extraction", "sample"}
        Whether the extraction of the data set was timed, or a random sample of its images that was extracted for that.
    engine, device : str
        What computed.
    workers, batch_size : int
        Threads, and images a forward pass.
    machine : str
        See `machine_name`.
    digest : str
        Of the backbone's spec.
    measured : str
        When, as ISO 8601.
    load : float, optional
        Processes that wanted to run, on average over the last minute: above the processors there are, other programs
        took a part of them. None where the system does not tell.
    """

    images_per_second: float
    images: int
    seconds: float
    what: str
    engine: str
    device: str
    workers: int
    batch_size: int
    machine: str
    digest: str
    measured: str
    load: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def machine_name() -> str:
    """Return the processor, how many of them this process may use, and the system."""
    name = processor_facts().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {usable_processors()} usable of {os.cpu_count()}, {platform.system()}"


def speed_of_run(report: Mapping[str, Any], what: str, digest: str) -> Speed | None:
    """Return what an extraction's report says of its speed; None where it computed nothing."""
    measured, computed = report["measured"], report["images"]["computed"]
    if not computed or "engine" not in report:
        return None
    return Speed(
        images_per_second=round(computed / max(measured["seconds"], 1e-9), 3), images=computed,
        seconds=round(measured["seconds"], 3), what=what, engine=report["engine"], device=report["device"],
        workers=report["workers"], batch_size=report["batch_size"], machine=machine_name(), digest=digest,
        measured=now(),
        load=round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    )  # fmt: skip


def find_speed(
    path: Path, timed: Speed | None, images: str, store: Store, backbone: Backbone, workers: int | None
) -> Speed:
    """Return the speed of a backbone on a data set: of this run, of an earlier one on this machine, or of a sample.

    Parameters
    ----------
    path : Path
        The file that keeps it from run to run.
    timed : Speed, optional
        What this run's extraction measured.
    images : str
        The source of the images, for a sample.
    store : Store
        What was extracted of them; it says the engine.
    backbone : Backbone
        What is timed.
    workers : int, optional
        As for `embedkit.extract`.
    """
    if timed is None or timed.images < _FEWEST:
        found = _read_speed(path, backbone)
        timed = found or _time_sample(images, store, backbone, workers, path.parent) or timed
    assert timed is not None
    write_whole(path, json.dumps(timed.to_dict(), indent=1).encode())
    return timed


def _read_speed(path: Path, backbone: Backbone) -> Speed | None:
    """Return what an earlier run measured, if it did so with this backbone, on this machine and device."""
    try:
        speed = Speed(**json.loads(path.read_bytes()[: 1 << 20]))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    here = (backbone.spec.digest, machine_name(), str(backbone.device))
    numbers = (speed.images_per_second, speed.seconds, speed.images)
    sound = all(isinstance(number, int | float) and 0 < number < float("inf") for number in numbers)
    return speed if sound and (speed.digest, speed.machine, speed.device) == here else None


def _time_sample(images: str, store: Store, backbone: Backbone, workers: int | None, folder: Path) -> Speed | None:
    """Extract a random sample with the engine that made the store, and return how fast that was."""
    listing = list_images(images, sample=SAMPLE)
    with folder_aside(folder) as place:
        report = place / "report.json"
        engine = str(store.information.get("engine", "auto"))
        extract(listing, place / "sample.h5", backbone, engine=engine, workers=workers, report=report)
        return speed_of_run(json.loads(report.read_bytes()), "sample", backbone.spec.digest)
