"""Cell: one backbone on one data set by one protocol, and the two files that keep what was measured.

``NAME.json`` says what was measured, of what and when; ``NAME.npz`` holds the predictions. Either is written aside and
renamed, and the first has the hash of the second, so that a kill at any moment leaves a whole cell or none.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.evaluation.reports import Report
from embedkit.store.durable import aside, publish_over, write_durably

Predictions = dict[str, npt.NDArray[Any]]

FORMAT = 1
_REPORT = ("metrics", "parameters", "inputs", "classes")
MAX_JSON_BYTES = 256 << 20
MAX_ARRAY_BYTES = 2 << 30


@dataclass(frozen=True, eq=False)
class Cell:
    """What became of one combination of a suite.

    Parameters
    ----------
    name : str
        That of its files.
    backbone, data, protocol : str
        What tables call them.
    key : dict
        The inputs: what must be the same for the cell to be used again. Empty for one that failed.
    report : Report, optional
        What the probe found, without its head; None for one that failed.
    error : str
        Why it failed; empty otherwise.
    facts : dict
        Beside the report: "parameters" and "dim" of the backbone, "speed" (see `embedkit.evaluation.speeds`),
        "seconds" that the probe took, "finished", "versions".
    reused : bool
        Whether it comes from an earlier run.
    """

    name: str
    backbone: str
    data: str
    protocol: str
    key: dict[str, Any] = field(default_factory=dict)
    report: Report | None = None
    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    reused: bool = False

    @property
    def images_per_second(self) -> float | None:
        """How fast the backbone was on the data set's images; None when nothing measured it."""
        speed = self.facts.get("speed")
        return None if not isinstance(speed, dict) else float(speed["images_per_second"])

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the predictions as JSON values, for the cell's file and for ``--json``."""
        return {
            "name": self.name, "backbone": self.backbone, "data": self.data, "protocol": self.protocol,
            "status": "failed" if self.report is None else "done", "error": self.error, "key": self.key, **self.facts,
            "report": None if self.report is None else self.report.to_dict(),
        }  # fmt: skip


def write_cell(folder: Path, cell: Cell) -> None:
    """Write a cell's files, the predictions first."""
    values = {"format": FORMAT, **cell.to_dict()}
    if cell.report is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **dict[str, Any](cell.report.predictions))
        values["predictions_sha256"] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        write_whole(folder / f"{cell.name}.npz", buffer.getbuffer())
    write_whole(folder / f"{cell.name}.json", json.dumps(values, indent=1, allow_nan=False).encode())


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is there whole or as it was before, whatever ends this process."""
    with aside(path.parent) as temporary:
        write_durably(temporary, data)
        publish_over(temporary, path)


def read_cell(folder: Path, name: str) -> Cell | None:
    """Return a cell that an earlier run has written, None where there is none.

    Raises
    ------
    EvaluationError
        When its files are damaged, of another format, or do not belong together.
    """
    path = folder / f"{name}.json"
    try:
        return _cell(*_contents(folder, name))
    except FileNotFoundError:
        return None
    # json, zipfile and numpy raise whatever a stranger's bytes make them do.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | AttributeError) else error
        raise EvaluationError(
            f"{path} is no cell of a suite, or is damaged: {reason}; its suite measures it again"
        ) from error


def _contents(folder: Path, name: str) -> tuple[dict[str, Any], Predictions | None]:
    """Return what the two files of a cell hold."""
    path = folder / f"{name}.json"
    values = json.loads(_bytes(path, MAX_JSON_BYTES), parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    if values["format"] != FORMAT or values["name"] != name:
        raise ValueError(f"it is of the format {values['format']!r} and the cell {values['name']!r}")
    if values["report"] is None:
        return values, None
    data = _bytes(folder / f"{name}.npz", MAX_ARRAY_BYTES)
    if hashlib.sha256(data).hexdigest() != values["predictions_sha256"]:
        raise ValueError(f"{name}.npz is not the file that was written with it")
    size = sum(member.file_size for member in zipfile.ZipFile(io.BytesIO(data)).infolist())
    if size > MAX_ARRAY_BYTES:
        raise ValueError(f"{name}.npz holds {size:,} bytes, which are too many")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return values, {key: arrays[key] for key in arrays.files}


def _bytes(path: Path, most: int) -> bytes:
    """Return the content of a file, unless it is none or too large."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        raise ValueError(f"{path.name} is no file of at most {most >> 20} MiB")
    return path.read_bytes()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    if abs(value := float(text)) == float("inf"):
        raise ValueError(f"{text} is too large a number")
    return value


def _whole(text: str) -> int:
    if len(text) > 18:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _cell(values: dict[str, Any], predictions: Predictions | None) -> Cell:
    """Return a cell of what its files say, which a stranger may have written."""
    said = {name: values[name] for name in ("name", "backbone", "data", "protocol", "error")}
    if not all(isinstance(value, str) for value in said.values()) or not isinstance(values["key"], dict):
        raise ValueError("its names are no texts")
    known = {"format", "status", "key", "report", "predictions_sha256", *said}
    facts = {name: value for name, value in values.items() if name not in known}
    for name in ("parameters", "dim", "seconds"):
        if not _is_number(facts.get(name, 0)):
            raise ValueError(f"{name} is no number")
    speed = facts.get("speed")
    if speed is not None and not (isinstance(speed, dict) and _is_number(speed["images_per_second"])):
        raise ValueError("its speed is no number")
    report = None
    if predictions is not None:
        report = Report(**{name: values["report"][name] for name in _REPORT}, predictions=predictions)
        _check(report)
        _check_predictions(report)
    return Cell(**said, key=values["key"], report=report, facts=facts, reused=True)


def _is_number(value: object, least: float = 0.0, most: float = 1e300) -> bool:
    """Return whether a JSON value is a number that can be counted and drawn with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _check(report: Report) -> None:
    """Raise ValueError unless pages and tables can be made of what a report says."""
    if not all(isinstance(part, dict) for part in (report.metrics, report.parameters, report.inputs)):
        raise ValueError("its metrics, parameters or inputs are no mappings")
    metric, value, interval = report.headline
    _check_value(value, interval, -1e300 if metric == "r2" else 0.0)
    for shots, one in report.metrics.get("shots", {}).items():
        if not shots.isdigit() or not isinstance(one["values"], list):
            raise ValueError("its shots are no numbers of rows with a value of each seed")
        _check_value(one["top1"], one["top1_interval"], 0.0)
    if not isinstance(report.metrics.get("per_class", {}), dict):
        raise ValueError("its per_class is no mapping of classes to values")
    if not isinstance(report.inputs.get("unseen_classes", {}), dict):
        raise ValueError("its unseen_classes are no mapping of classes to rows")
    if not isinstance(report.classes, list) or not all(isinstance(name, str) for name in report.classes):
        raise ValueError("its classes are no texts")


def _check_value(value: object, interval: Sequence[Any], least: float) -> None:
    sound = len(interval) == 2 and all(_is_number(number, least, 1 + 1e-6) for number in (value, *interval))
    if not sound or interval[0] > interval[1]:
        raise ValueError("a metric is no number of at most 1 with an interval")


def _check_predictions(report: Report) -> None:
    """Raise ValueError unless the predictions are of the kind and the shape that the task has."""
    found, c = report.predictions, len(report.classes)
    n, several = len(found["ids"]), report.task == "multi-label"
    needed = {"class": ("correct",), "multi-label": ("scores",), "regression": ()}[report.task]
    for name in {"true", "predicted", *needed} | ({"confidence"} & found.keys()):
        array = found[name]
        # A label that no training row had scores minus infinity.
        sound = np.isfinite(array) | np.isneginf(array) if name == "scores" else np.isfinite(array)
        if array.shape != ((n, c) if several else (n,)) or array.dtype.kind not in "biuf" or not sound.all():
            raise ValueError(f"{name} are not {n} numbers, one for each id")
    if found["ids"].shape != (n,) or found["ids"].dtype.kind != "U":
        raise ValueError("its ids are no texts")
    if report.task == "class":
        codes = np.concatenate([found["true"], found["predicted"]])
        if codes.dtype.kind not in "iu" or (n and not 0 <= codes.min() <= codes.max() < c):
            raise ValueError("its predictions have codes that name no class")
