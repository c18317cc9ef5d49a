"""Cell: one backbone on one data set by one protocol, and the two files that keep what was measured.

``NAME.json`` says what was measured, of what and when; ``NAME.npz`` holds the predictions. Either is written aside and
renamed, and the first has the hash of the second, so that a kill at any moment leaves a whole cell or none.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.evaluation.reports import Report
from embedkit.store.durable import aside, publish_over, write_durably

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
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT or values["name"] != name:
            raise ValueError(f"it is of the format {values['format']!r} and the cell {values['name']!r}")
        predictions = None if values["report"] is None else _predictions(folder, name, values["predictions_sha256"])
        return _cell(values, predictions)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, OSError, RecursionError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path} is no cell of a suite, or is damaged: {error}") from error


def _predictions(folder: Path, name: str, sha256: str) -> dict[str, npt.NDArray[Any]]:
    data = (folder / f"{name}.npz").read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{name}.npz is not the file that was written with it")
    size = sum(member.file_size for member in zipfile.ZipFile(io.BytesIO(data)).infolist())
    if size > MAX_ARRAY_BYTES:
        raise ValueError(f"{name}.npz holds {size:,} bytes, which are too many")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _cell(values: Mapping[str, Any], predictions: dict[str, npt.NDArray[Any]] | None) -> Cell:
    """Return a cell of what its files say, which a stranger may have written."""
    said = {name: values[name] for name in ("name", "backbone", "data", "protocol", "error")}
    if not all(isinstance(value, str) for value in said.values()) or not isinstance(values["key"], dict):
        raise ValueError("its names are no texts")
    known = {"format", "status", "key", "report", "predictions_sha256", *said}
    facts = {name: value for name, value in values.items() if name not in known}
    for name in ("parameters", "dim", "seconds"):
        if not isinstance(facts.get(name, 0), int | float):
            raise ValueError(f"{name} is no number")
    report = None
    if predictions is not None:
        report = Report(**{name: values["report"][name] for name in _REPORT}, predictions=predictions)
        _check(report)
    cell = Cell(**said, key=values["key"], report=report, facts=facts, reused=True)
    if not 0 <= (cell.images_per_second or 0) < float("inf"):
        raise ValueError("its speed is no number")
    return cell


def _check(report: Report) -> None:
    """Raise ValueError unless pages and tables can be made of a report."""
    if not all(isinstance(part, dict) for part in (report.metrics, report.parameters, report.inputs)):
        raise ValueError("its metrics, parameters or inputs are no mappings")
    _, value, interval = report.headline
    if not all(isinstance(number, int | float) for number in (value, *interval)) or len(interval) != 2:
        raise ValueError("its headline is no number with an interval")
    if not isinstance(report.classes, list) or not all(isinstance(name, str) for name in report.classes):
        raise ValueError("its classes are no texts")
    n = len(report.predictions["ids"])
    for name in ("true", "predicted", "correct", "confidence", "scores"):
        array = report.predictions.get(name, np.zeros(n))
        # A label that no training row had scores minus infinity.
        sound = np.isfinite(array) | np.isneginf(array) if name == "scores" else np.isfinite(array)
        if len(array) != n or array.dtype.kind not in "biuf" or not sound.all():
            raise ValueError(f"{name} are not {n} numbers, one for each id")
    if report.task == "class":
        codes = np.concatenate([report.predictions["true"], report.predictions["predicted"]])
        if codes.dtype.kind not in "iu" or (n and not 0 <= codes.min() <= codes.max() < len(report.classes)):
            raise ValueError("its predictions have codes that name no class")
