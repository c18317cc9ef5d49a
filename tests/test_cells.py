"""Cells as a stranger may leave them: a value of the wrong type is an error that names the file, or does no harm."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit.errors import EvaluationError
from embedkit.evaluation import Cell, Report
from embedkit.evaluation.bench_page import write_reports
from embedkit.evaluation.cells import read_cell, write_cell
from embedkit.evaluation.suites import Suite, SuiteBackbone, SuiteData, SuiteProtocol

NAME = "net--pets--few"
WRONG: list[Any] = [
    None, True, -1, 7, 0.5, 1e308, 10**400, "5", [], ["x"], [1, 2], {"x": 1}, {"1": None}, float("nan"), float("inf"),
]  # fmt: skip


def suite() -> Suite:
    protocol = SuiteProtocol("few", "mteb-image")
    return Suite("Pets", (SuiteBackbone("net", "resnet18"),), (SuiteData("pets", "x", split="y"),), (protocol,))


def cell() -> Cell:
    """A few-shot cell with everything that pages and tables look at."""
    n, classes = 8, ["cat", "dog"]
    true = np.arange(n) % 2
    predicted = np.where(np.arange(n) < 3, 1 - true, true)
    arrays = {
        "ids": np.array([f"{row}.jpg" for row in range(n)]), "true": true, "predicted": predicted,
        "correct": np.linspace(0, 1, n), "confidence": np.linspace(0.9, 0.5, n),
    }  # fmt: skip
    part = {"rows": n, "classes": 2, "rows_per_class": {"cat": 4, "dog": 4}, "path": "x.h5"}
    shots = {"1": {"top1": 0.5, "top1_interval": [0.4, 0.6], "values": [0.4, 0.6], "rows": 2},
             "16": {"top1": 0.6, "top1_interval": [0.5, 0.7], "values": [0.6, 0.6], "rows": 8}}  # fmt: skip
    metrics = {"top1": 0.6, "top1_interval": [0.5, 0.7], "shots": shots, "per_class": {"cat": 0.5, "dog": None}}
    leaks = {"test_rows": 1, "train_rows": 1, "exact_pairs": 1, "near_pairs": 0, "dropped": 0}
    inputs = {"train": part, "test": part, "unseen_classes": {"emu": 1}, "leaks": leaks}
    speed = {"images_per_second": 9.5, "load": 0.5, "what": "sample", "images": 64, "seconds": 6.5, "device": "cpu"}
    facts = {"parameters": 10**6, "dim": 8, "speed": speed, "seconds": 1.5, "versions": {"embedkit": "1"}}
    report = Report(metrics, {"task": "class", "C": 1.0, "chosen": {"C": 1.0}}, inputs, classes, arrays)
    return Cell(NAME, "net", "pets", "few", {"digest": "0" * 64}, report, "", facts)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to each value within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*at, key)
        yield from places(one, (*at, key))


def shown(folder: Path) -> str:
    """Return the table of the cell as it is there, after everything else was made of it, too."""
    found = read_cell(folder, NAME)
    assert found is not None
    json.dumps(found.to_dict(), allow_nan=False)
    return write_reports(suite(), [found], folder, command="embedkit bench", seconds=1.0)


def test_any_value_of_a_wrong_type_is_an_error_with_the_file_or_does_no_harm(tmp_path: Path) -> None:
    write_cell(tmp_path, cell())
    path = tmp_path / f"{NAME}.json"
    text, refused, tried = path.read_text(), set(), set()
    for *before, last in places(json.loads(text)):
        for wrong in WRONG:
            values = json.loads(text)
            inner = values
            for key in before:
                inner = inner[key]
            inner[last] = wrong
            path.write_text(json.dumps(values))
            tried.add(last)
            try:
                shown(tmp_path)
            except EvaluationError as error:
                assert str(path) in str(error) and "its suite measures it again" in str(error)
                refused.add(last)
    assert len(tried) > 40
    assert {"images_per_second", "shots", "unseen_classes", "top1_interval", "classes", "dim", "values"} <= refused


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("ids", np.arange(8)),
        ("ids", np.array(["a.jpg"])),
        ("ids", np.array([["a.jpg"] * 2] * 8)),
        ("true", np.zeros((8, 2), dtype=int)),
        ("true", np.full(8, 2)),
        ("predicted", np.full(8, -1)),
        ("predicted", np.zeros(8)),
        ("correct", np.array(["yes"] * 8)),
        ("correct", np.full(8, np.nan)),
        ("correct", np.zeros(8, dtype=complex)),
        ("confidence", np.zeros((8, 1))),
        ("confidence", None),
        ("correct", None),
        ("true", None),
    ],
)
def test_predictions_of_a_wrong_shape_or_type_are_refused(name: str, array: Any, tmp_path: Path) -> None:
    written = cell()
    assert written.report is not None
    if array is None:
        del written.report.predictions[name]
    else:
        written.report.predictions[name] = array
    write_cell(tmp_path, written)
    if name == "confidence" and array is None:  # Not all heads have it.
        assert "16-shot top1" in shown(tmp_path)
        return
    with pytest.raises(EvaluationError, match=f"{NAME}.json is no cell of a suite, or is damaged"):
        read_cell(tmp_path, NAME)


def test_arrays_that_are_none_are_refused_even_with_their_hash(tmp_path: Path) -> None:
    write_cell(tmp_path, cell())
    arrays, path = tmp_path / f"{NAME}.npz", tmp_path / f"{NAME}.json"
    whole, text = arrays.read_bytes(), path.read_text()
    random = np.random.default_rng(0)
    refused = 0
    for number in range(200):
        data = bytearray(whole if number % 4 else whole[: random.integers(len(whole))])
        for at in random.integers(0, max(1, len(data)), size=random.integers(1, 9)) if data else ():
            data[at] ^= 1 << random.integers(8)
        arrays.write_bytes(data)
        path.write_text(text.replace(*(hashlib.sha256(one).hexdigest() for one in (whole, bytes(data)))))
        try:
            shown(tmp_path)
        except EvaluationError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_a_cell_is_a_file(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.json").mkdir()
    with pytest.raises(EvaluationError, match="is no file of at most"):
        read_cell(tmp_path, NAME)
    if hasattr(os, "mkfifo"):
        (tmp_path / f"{NAME}.json").rmdir()
        os.mkfifo(tmp_path / f"{NAME}.json")
        with pytest.raises(EvaluationError, match="is no file of at most"):
            read_cell(tmp_path, NAME)


def test_the_column_of_a_few_shot_protocol_says_its_shots(tmp_path: Path) -> None:
    write_cell(tmp_path, cell())
    table = shown(tmp_path)
    assert table.splitlines()[1].split() == ["backbone", "few", "16-shot", "top1", "images/s", "parameters"]
    assert "few 16-shot top1" in (tmp_path / "table.md").read_text()
    assert "few<small>16-shot top1</small>" in (tmp_path / "report.html").read_text()
    header, line = (tmp_path / "table.csv").read_text().splitlines()
    values = dict(zip(header.split(","), line.split(","), strict=True))
    assert (values["metric"], values["shots"], values["value"]) == ("top1", "16", "0.6")


def test_the_best_is_called_chosen_wherever_it_is_marked(tmp_path: Path) -> None:
    write_cell(tmp_path, cell())
    words = "The best was chosen on these very test rows"
    assert words in shown(tmp_path)
    assert words in (tmp_path / "table.md").read_text() and words in (tmp_path / "report.html").read_text()
