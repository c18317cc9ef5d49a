"""Which rows of which store are trained on and which are tested on, and with what labels."""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.index.duplicates.grouping import copies_among
from embedkit.store import Store

# The names under which data sets publish their test part, in order of preference.
TEST_SPLITS = ("test", "val", "validation")

# What is read off the embeddings: one class an image, any number of labels an image, or a number.
TASKS = ("class", "multi-label", "regression")


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a store with their class names.

    Parameters
    ----------
    store : Store
        Where the rows lie.
    rows : array of int of shape (n,)
        Ascending row numbers.
    names : array of str of shape (n,)
        The class name of each row; with several labels a row, those with ``;`` between them; empty for regression.
    failures : int
        Images that belong here and could not be read at extraction.
    task : str
        One of `TASKS`.
    targets : array of float64 of shape (n,), optional
        The number to predict for each row, with regression.
    """

    store: Store
    rows: npt.NDArray[np.int64]
    names: npt.NDArray[np.str_]
    failures: int
    task: str = "class"
    targets: npt.NDArray[np.float64] | None = None

    def take(self, positions: npt.NDArray[Any]) -> Part:
        """Return the part of some of its rows; `positions` are ascending positions in `rows`, or a mask of them."""
        targets = None if self.targets is None else self.targets[positions]
        return replace(self, rows=self.rows[positions], names=self.names[positions], targets=targets)

    def groups(self) -> npt.NDArray[np.int64] | None:
        """Return a number for each row, the same for byte-identical pictures; None where there are no such pictures."""
        return copies_among(self.store, self.rows)

    def embeddings(self) -> npt.NDArray[np.float32]:
        """Return the embeddings of the rows, float32 of shape (n, d).

        Raises
        ------
        EvaluationError
            When some are infinite or not a number.
        """
        # Most often a part is a whole store, which loads faster than it gathers.
        x = self.store.load() if len(self.rows) == len(self.store) else self.store.rows(self.rows)
        broken = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if len(broken):
            raise EvaluationError(
                f"{self.store.path}: {len(broken)} embeddings have values that are not finite, such as those of "
                f"{_some([self.store.ids[row] for row in self.rows[broken[:3]]], len(broken))}; "
                "extract them again, with precision float32 if it was a narrower one"
            )
        return x

    def summary(self) -> dict[str, Any]:
        """Return what a report says about the part, as JSON values."""
        single = self.names if self.task == "class" else [name for names in label_sets(self.names) for name in names]
        names, counts = np.unique(np.asarray(single, dtype=np.str_), return_counts=True)
        summary = {
            "path": os.fspath(self.store.path),
            "content_id": self.store.content_id,
            "layer": self.store.layer,
            "rows": len(self.rows),
            "classes": len(names),
            "rows_per_class": dict(zip(names.tolist(), counts.tolist(), strict=True)),
            "failures": self.failures,
        }
        if self.targets is not None:
            summary["targets"] = {name: float(getattr(self.targets, name)()) for name in ("min", "mean", "max", "std")}
        return summary


@dataclass(frozen=True)
class Split:
    """A split file: the part and, optionally, the label of each path.

    Parameters
    ----------
    path : Path
        The file.
    parts : dict of str to str
        ``{path of the image: name of its part}``.
    labels : dict of str to str, optional
        ``{path of the image: class name}``, an empty name for none; None when the file has no label column.
    targets : dict of str to float, optional
        ``{path of the image: number to predict}``, None when the file has no target column.
    """

    path: Path
    parts: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] | None = None
    targets: dict[str, float] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Split:
        """Read a CSV file whose header names the columns path and split, and optionally label and target.

        Parameters
        ----------
        path : path-like
            The file, in UTF-8. Its paths are ids of a store, character for character.

        Returns
        -------
        Split
            What the file says.

        Raises
        ------
        EvaluationError
            When the file cannot be read, lacks a column or a value, or contradicts itself about a path.
        """
        try:
            # utf-8-sig, because spreadsheets write a byte order mark; surrogateescape, as file names are decoded.
            with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                return cls._parse(Path(path), csv.reader(file))
        except OSError as error:
            raise EvaluationError(f"the split file {path} cannot be read: {error.strerror or error}") from error
        except csv.Error as error:
            raise EvaluationError(f"the split file {path} is not a CSV file: {error}") from error

    @classmethod
    def _parse(cls, path: Path, reader: Any) -> Split:
        header: list[str] = next(reader, [])
        columns = {name: header.index(name) for name in ("path", "split", "label", "target") if name in header}
        if not {"path", "split"} <= columns.keys() or any(header.count(name) > 1 for name in columns):
            raise EvaluationError(
                f"{path}: the first line must name one column path, one split and at most one label and one target; "
                f"found {', '.join(map(repr, header)) or 'an empty line'}"
            )
        split = cls(path, {}, {} if "label" in header else None, {} if "target" in header else None)
        for values in reader:
            if not values:
                continue  # An empty line, such as one at the end.
            if len(values) != len(header):
                raise EvaluationError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {len(header)} columns; "
                    "quote values that contain a comma"
                )
            split._add(reader.line_num, {name: values[column] for name, column in columns.items()})
        if not split.parts:
            raise EvaluationError(f"{path} has a header and no rows")
        return split

    def _add(self, line: int, values: dict[str, str]) -> None:
        id, where = values["path"], f"{self.path}, line {line}"
        if not id or not values["split"]:
            raise EvaluationError(f"{where}: an empty {'split' if id else 'path'}; fill it in")
        given: dict[str, Any] = {"split": values["split"], "label": values.get("label"), "target": None}
        known: dict[str, Any] = {**given, "split": self.parts.setdefault(id, values["split"])}
        if self.labels is not None:
            known["label"] = self.labels.setdefault(id, values["label"])
        if self.targets is not None:
            given["target"] = _number(values["target"], where)
            known["target"] = self.targets.setdefault(id, given["target"])
        for name, plural in (("split", ""), ("label", "the labels "), ("target", "the targets ")):
            if known[name] != given[name]:
                found = f"{plural}{known[name]!r} and {given[name]!r}"
                raise EvaluationError(f"{where}: {id!r} is listed twice, in {found}; keep one of them")

    def require(self, name: str, advice: str = "name one as train_split") -> None:
        """Raise an `EvaluationError` that says which parts there are when a part has no rows."""
        if name not in self.parts.values():
            raise EvaluationError(f"{self.path} has no rows of the split {name!r}; {self._found()}; {advice}")

    def _found(self) -> str:
        counts = Counter(self.parts.values()).most_common(10)
        return "the file has " + ", ".join(f"{name!r} ({count} rows)" for name, count in counts)

    def test_part(self, train: str, test: str | None) -> str:
        """Return the name of the part to test on, after checking that both parts exist and differ.

        Raises
        ------
        EvaluationError
            When a part has no rows or both are the same.
        """
        self.require(train)
        names = set(self.parts.values())
        if test is None:
            test = next((name for name in TEST_SPLITS if name in names and name != train), None)
            if test is None:
                raise EvaluationError(
                    f"{self.path} has no split named {', '.join(TEST_SPLITS)}; {self._found()}; name one as test_split"
                )
        self.require(test, "name one as test_split")
        if test == train:
            raise EvaluationError(
                f"{self.path}: train and test are both the split {train!r}; name another; {self._found()}"
            )
        return test


def split_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a split file's bytes; raise EvaluationError when it cannot be read."""
    try:
        return hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
    except OSError as error:
        raise EvaluationError(f"the split file {path} cannot be read: {error.strerror or error}") from error


def _number(text: str, where: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise EvaluationError(f"{where}: the target {text!r} is not a finite number")
    return value


def label_sets(names: npt.NDArray[np.str_]) -> list[list[str]]:
    """Return the labels of each row, from texts with ``;`` between them.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.splits import label_sets
    >>> label_sets(np.array(["cat; dog", "", "dog"]))
    [['cat', 'dog'], [], ['dog']]
    """
    return [[label for label in map(str.strip, text.split(";")) if label] for text in names.tolist()]


def whole_store(store: Store, task: str = "class") -> Part:
    """Return all rows of a labelled store.

    Parameters
    ----------
    store : Store
        Its class names are taken apart at ``;`` where the task is "multi-label".
    task : str, default "class"
        One of `TASKS`.

    Returns
    -------
    Part
        The rows.

    Raises
    ------
    EvaluationError
        When the store is empty, has no labels, or has rows without one, or the task is regression: a store has no
        numbers to predict.
    """
    rows = np.arange(len(store), dtype=np.int64)
    _require_rows(store, rows, "the store is empty")
    if task == "regression":
        raise EvaluationError(f"{store.path} has no numbers to predict; pass a split file with a column target")
    return Part(store, rows, _stored_names(store, rows), len(store.failures), task)


def training_part(store: Store, split: Split | None, train_split: str, task: str = "class") -> Part:
    """Return the rows to train on: those of one part of a split file, or without one all rows.

    Parameters, result and errors are those of `split_store` and `whole_store`.
    """
    return whole_store(store, task) if split is None else split_part(store, split, train_split, task)


def split_store(
    store: Store, split: Split, train_split: str, test_split: str | None, task: str = "class"
) -> tuple[Part, Part, dict[str, Any]]:
    """Return the rows of one store that a split file assigns to training and to testing.

    Parameters
    ----------
    store : Store
        Holds both parts.
    split : Split
        Assigns them. Its labels, where it has any, win over the store's.
    train_split : str
        Name of the part to train on.
    test_split : str, optional
        Name of the part to test on; by default the first of test, val and validation that the file has.
    task : str, default "class"
        One of `TASKS`.

    Returns
    -------
    train, test : Part
        The rows of either.
    left_out : dict
        "not_in_split": rows of the store that the file does not mention; "other_splits": ``{name: rows}``.

    Raises
    ------
    EvaluationError
        When the file names images that the store neither has nor failed to read, when a part has no rows, or when
        rows have no label or target.
    """
    test_split = split.test_part(train_split, test_split)
    train, test = (split_part(store, split, name, task) for name in (train_split, test_split))
    of_rows = [split.parts.get(id, "") for id in store.ids]
    others = Counter(of_rows)
    left_out = {
        "not_in_split": others.pop("", 0),
        "other_splits": {name: others[name] for name in sorted(others) if name not in (train_split, test_split)},
    }
    return train, test, left_out


def split_part(store: Store, split: Split, name: str, task: str = "class") -> Part:
    """Return the rows of one part of a split file; parameters and errors are those of `split_store`."""
    split.require(name)
    _require_rows(store, np.arange(len(store)), "the store is empty")
    rows = np.array([row for row, id in enumerate(store.ids) if split.parts.get(id) == name], dtype=np.int64)
    wanted = {id for id, part in split.parts.items() if part == name}
    failed = wanted & {failure.id for failure in store.failures}
    ids = [store.ids[row] for row in rows]
    missing = wanted.difference(ids, failed)
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(wanted)} paths of the split {name!r} in {split.path} are not in {store.path}: "
            f"{_some(sorted(missing)[:3], len(missing))}; the store's ids look like {store.ids[0]!r}"
        )
    _require_rows(store, rows, f"all {len(failed)} images of the split {name!r} in {split.path} failed at extraction")
    labels, targets = split.labels, split.targets
    if task == "regression":
        if targets is None:
            raise EvaluationError(f"{split.path} has no column target; regression needs a number for each path")
        numbers = np.array([targets[id] for id in ids])
        return Part(store, rows, np.full(len(rows), ""), len(failed), task, numbers)
    if labels is None:
        return Part(store, rows, _stored_names(store, rows), len(failed), task)
    if task == "class":  # Of several labels an image, an image may have none.
        advice = "fill in the label column or drop the lines"
        _require_labels(split.path, ids, lambda row: bool(labels[ids[row]]), advice)
    return Part(store, rows, np.array([labels[id] for id in ids]), len(failed), task)


def _stored_names(store: Store, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    if store.labels is None:
        raise EvaluationError(
            f"{store.path} has no labels; extract images that lie in one folder per class, "
            "or pass a split file with a label column"
        )
    codes = store.labels[rows]
    ids = [store.ids[row] for row in rows]
    _require_labels(
        store.path, ids, lambda row: bool(codes[row] >= 0), "leave them out or label them with a split file"
    )
    names: npt.NDArray[np.str_] = np.array(store.classes)[codes]
    return names


def _require_labels(path: Path, ids: Sequence[str], labelled: Callable[[int], bool], advice: str) -> None:
    bare = [id for row, id in enumerate(ids) if not labelled(row)]
    if bare:
        raise EvaluationError(f"{path}: {len(bare)} rows have no label: {_some(bare[:3], len(bare))}; {advice}")


def _require_rows(store: Store, rows: npt.NDArray[Any], reason: str) -> None:
    if not len(rows):
        raise EvaluationError(f"{store.path}: there are no rows to use: {reason}")


def _some(ids: Sequence[str], count: int) -> str:
    """Return the first ids, quoted, with dots when there are more."""
    return ", ".join(map(repr, ids)) + (", ..." if count > len(ids) else "")
