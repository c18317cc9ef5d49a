"""What a training run did, epoch by epoch."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embedkit.store.durable import aside, publish_over, write_durably

_MOST = 1 << 53


@dataclass(frozen=True)
class EpochRow:
    """One epoch.

    Parameters
    ----------
    epoch : int
        From 1.
    loss : float
        Mean over the training images, while the weights moved.
    metrics : mapping of str to float
        Of the validation behind it; empty without one.
    rates : mapping of str to float
        The mean learning rate of each group.
    images : int
        That were learned from, in all processes.
    failed : int
        That could not be read since the process began.
    seconds : float
        What it took, without the validation.
    batch_size : int
        Images that passed through the network at once.
    skipped : int
        Updates that were left out because fp16 overflowed.
    """

    epoch: int
    loss: float
    metrics: Mapping[str, float]
    rates: Mapping[str, float]
    images: int
    failed: int
    seconds: float
    batch_size: int
    skipped: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochRow:
        """Return a row of JSON values, which may come from a stranger: whatever is no number is an error.

        Of a metric alone, NaN and infinity are numbers.
        """
        metrics = {str(name): float(value) for name, value in values["metrics"].items()}
        rates = {str(name): _finite(value) for name, value in values["rates"].items()}
        return cls(
            _count(values["epoch"]), _finite(values["loss"]), metrics, rates, _count(values["images"]),
            _count(values["failed"]), _finite(values["seconds"]), _count(values["batch_size"]),
            _count(values["skipped"]),
        )  # fmt: skip

    @property
    def images_per_second(self) -> float:
        """Training images a second."""
        return self.images / self.seconds if self.seconds else 0.0


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a number that an epoch ends with")
    return number


def _count(value: Any) -> int:
    number = int(value)
    if not 0 <= number <= _MOST:
        raise ValueError(f"{number} is not a number of things in an epoch")
    return number


@dataclass(frozen=True)
class History:
    """A run.

    Parameters
    ----------
    epochs : tuple of EpochRow
        In order.
    best_epoch : int
        The one whose weights were kept; 0 when no epoch was run.
    stopped : str, default ""
        Why it ended early; empty when it did not.
    """

    epochs: tuple[EpochRow, ...] = field(default=())
    best_epoch: int = 0
    stopped: str = ""

    @property
    def best(self) -> EpochRow | None:
        """The row of the epoch whose weights were kept."""
        return self.epochs[self.best_epoch - 1] if self.best_epoch else None

    @property
    def judged(self) -> bool:
        """Whether a validation chose that epoch; otherwise it is the last one, or there was none."""
        return self.best is not None and bool(self.best.metrics)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """Return what `to_dict` wrote; raise what Python raises where that cannot be."""
        rows, best = tuple(EpochRow.from_dict(row) for row in values["epochs"]), int(values["best_epoch"])
        if [row.epoch for row in rows] != list(range(1, len(rows) + 1)) or best not in range(len(rows) + 1):
            raise ValueError("its epochs are not in order")
        return cls(rows, best, str(values["stopped"]))


@dataclass(frozen=True)
class Moment:
    """How far a run is.

    Parameters
    ----------
    epoch, epochs : int
        The one that is under way, from 1, and all.
    images, total : int
        Training images that it is through with, as its updates go, and all there are.
    loss : float
        Mean since the epoch began.
    images_per_second : float
        Since the epoch began.
    seconds_left : float
        Of the whole run, validations included, should it go on to the end.
    """

    epoch: int
    epochs: int
    images: int
    total: int
    loss: float
    images_per_second: float
    seconds_left: float


def write_epochs(path: str | os.PathLike[str], rows: Sequence[EpochRow]) -> None:
    """Write a CSV with a line an epoch, in place of the one that is there, durably.

    Parameters
    ----------
    path : path-like
        Such as ``epochs.csv``.
    rows : sequence of EpochRow
        In order.
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    groups = list(dict.fromkeys(name for row in rows for name in row.rates))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["epoch", "loss", *(f"val_{name}" for name in metrics), "images", "failed", "seconds", "images_per_second",
         "batch_size", "skipped", *(f"lr {name}" for name in groups)]
    )  # fmt: skip
    for row in rows:
        writer.writerow(
            [row.epoch, row.loss, *(row.metrics.get(name, "") for name in metrics), row.images, row.failed,
             round(row.seconds, 3), round(row.images_per_second, 2), row.batch_size, row.skipped,
             *(row.rates.get(name, "") for name in groups)]
        )  # fmt: skip
    target = Path(path)
    with aside(target.parent) as temporary:
        write_durably(temporary, text.getvalue().encode())
        publish_over(temporary, target)
