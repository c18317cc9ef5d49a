"""Figures of a run for TensorBoard and Weights & Biases, and its CSV."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from embedkit.errors import MissingExtraError
from embedkit.finetuning.training.history import EpochRow, History, write_epochs
from embedkit.finetuning.training.recorders import TensorBoardRecorder, WandbRecorder


def row(epoch: int, loss: float) -> EpochRow:
    return EpochRow(epoch, loss, {"top1": 0.5 + epoch / 10}, {"stem": 1e-4, "head": 1e-3}, 12, 0, 2.0, 8)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_gets_every_figure_and_forgets_epochs_that_are_run_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = TensorBoardRecorder(tmp_path)
    first.begin([])
    for each in (row(1, 3.0), row(2, 2.0), row(3, 9.0)):
        first.record(each)
    first.close()
    second = TensorBoardRecorder(tmp_path)  # The third epoch was never kept: the run goes on behind the second.
    second.begin([row(1, 3.0), row(2, 2.0)])
    second.record(row(3, 1.0))
    second.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert found["val/top1"] == [(1, pytest.approx(0.6)), (2, pytest.approx(0.7)), (3, pytest.approx(0.8))]
    assert found["lr/head"][0] == (1, pytest.approx(1e-3)) and found["train/images_per_second"][0] == (1, 6.0)


def test_weights_and_biases_keeps_a_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'embedkit[wandb]'")
    recorder = WandbRecorder(tmp_path, "embedkit-tests", {"epochs": 2}, offline=True)
    recorder.begin([row(1, 3.0)])
    recorder.record(row(2, 2.0))
    recorder.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(("package", "make"), [
    ("tensorboard", lambda folder: TensorBoardRecorder(folder)),
    ("wandb", lambda folder: WandbRecorder(folder, "project", {})),
])  # fmt: skip
def test_a_recorder_that_is_not_installed_names_its_extra(
    package: str, make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name for name in sys.modules if name.partition(".")[0] == package or "torch.utils.tensorboard" in name
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"embedkit\[{package}\]"):
        make(tmp_path)  # type: ignore[operator]


def test_the_csv_has_a_line_an_epoch_and_a_column_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "epochs.csv"
    write_epochs(path, [row(1, 3.0)])
    write_epochs(path, [row(1, 3.0), row(2, 2.5)])
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["epoch"], line["loss"], line["val_top1"], line["lr stem"]) for line in lines] == [
        ("1", "3.0", "0.6", "0.0001"), ("2", "2.5", "0.7", "0.0001"),
    ]  # fmt: skip
    assert lines[0]["images_per_second"] == "6.0" and [path.name for path in tmp_path.iterdir()] == ["epochs.csv"]


def test_a_history_comes_back_from_json() -> None:
    history = History((row(1, 3.0), row(2, 2.0)), best_epoch=2, stopped="why")
    assert History.from_dict(history.to_dict()) == history
    assert history.best == row(2, 2.0) and History().best is None
