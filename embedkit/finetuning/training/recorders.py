"""Recorders: the run's figures in TensorBoard and in Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from embedkit.errors import MissingExtraError
from embedkit.finetuning.training.history import EpochRow


class Recorder(Protocol):
    """Takes every epoch's row."""

    def begin(self, rows: Sequence[EpochRow]) -> None:
        """Take the rows that a resumed run has already."""

    def record(self, row: EpochRow) -> None:
        """Take one row."""

    def close(self) -> None:
        """Be done."""


class TensorBoardRecorder:
    """Writes event files for TensorBoard.

    Parameters
    ----------
    folder : path-like
        Of the run; the files go to ``tensorboard/`` in it.

    Raises
    ------
    MissingExtraError
        When TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard") from error
        self._make, self._folder = SummaryWriter, Path(folder) / "tensorboard"
        self._writer: SummaryWriter | None = None

    def begin(self, rows: Sequence[EpochRow]) -> None:
        """Open the files; what a killed process wrote of epochs that are run again is left out of the curves."""
        self._writer = self._make(os.fspath(self._folder), purge_step=len(rows) + 1 if rows else None)

    def record(self, row: EpochRow) -> None:
        """Write one epoch's figures."""
        assert self._writer is not None
        for name, value in figures(row):
            self._writer.add_scalar(name, value, row.epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


class WandbRecorder:
    """Sends the figures to Weights & Biases, or keeps them in ``wandb/`` for ``wandb sync``.

    Parameters
    ----------
    folder : path-like
        Of the run.
    project : str
        Of Weights & Biases.
    settings : mapping of str to JSON values
        Of the run, for its page.
    offline : bool, default False
        Whether nothing is sent. ``WANDB_MODE=offline`` says the same.

    Raises
    ------
    MissingExtraError
        When wandb is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], project: str, settings: Mapping[str, Any], *, offline: bool = False
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("wandb", "wandb") from error
        self._wandb, self._folder, self._project = wandb, Path(folder), project
        self._run: Any = None
        self._settings, self._offline = dict(settings), offline

    def begin(self, rows: Sequence[EpochRow]) -> None:
        """Open the run, with the epochs that it has already."""
        self._run = self._wandb.init(
            project=self._project, name=self._folder.name, dir=os.fspath(self._folder), config=self._settings,
            mode="offline" if self._offline else None,
        )  # fmt: skip
        for row in rows:
            self.record(row)

    def record(self, row: EpochRow) -> None:
        """Send one epoch's figures."""
        assert self._run is not None
        self._run.log(dict(figures(row)), step=row.epoch)

    def close(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.finish()


def figures(row: EpochRow) -> Iterator[tuple[str, float]]:
    """Yield an epoch's figures by their names in a chart: train/, val/ and lr/."""
    yield "train/loss", row.loss
    yield "train/images_per_second", row.images_per_second
    yield from ((f"val/{name}", value) for name, value in row.metrics.items())
    yield from ((f"lr/{name}", rate) for name, rate in row.rates.items())
