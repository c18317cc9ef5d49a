"""Which rows of which store are trained on and which are tested on, and with what labels."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.store import Store

# The names under which data sets publish their test part, in order of preference.
TEST_SPLITS = ("test", "val", "validation")


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
        The class name of each row.
    failures : int
        Images that belong here and could not be read at extraction.
    """

    store: Store
    rows: npt.NDArray[np.int64]
    names: npt.NDArray[np.str_]
    failures: int

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
        names, counts = np.unique(self.names, return_counts=True)
        return {
            "path": os.fspath(self.store.path),
            "content_id": self.store.content_id,
            "rows": len(self.rows),
            "classes": len(names),
            "rows_per_class": dict(zip(names.tolist(), counts.tolist(), strict=True)),
            "failures": self.failures,
        }


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
    """

    path: Path
    parts: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Split:
        """Read a CSV file whose header names the columns path, split and, optionally, label.

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
        if header.count("path") != 1 or header.count("split") != 1 or header.count("label") > 1:
            raise EvaluationError(
                f"{path}: the first line must name one column path, one split and at most one label; "
                f"found {', '.join(map(repr, header)) or 'an empty line'}"
            )
        columns = [header.index(name) for name in ("path", "split", "label") if name in header]
        split = cls(path, {}, {} if "label" in header else None)
        for values in reader:
            if not values:
                continue  # An empty line, such as one at the end.
            if len(values) != len(header):
                raise EvaluationError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {len(header)} columns; "
                    "quote values that contain a comma"
                )
            split._add(reader.line_num, *(values[column] for column in columns))
        if not split.parts:
            raise EvaluationError(f"{path} has a header and no rows")
        return split

    def _add(self, line: int, id: str, part: str, label: str = "") -> None:
        if not id or not part:
            raise EvaluationError(f"{self.path}, line {line}: an empty {'split' if id else 'path'}; fill it in")
        before = (self.parts.setdefault(id, part), label)
        if self.labels is not None:
            before = (before[0], self.labels.setdefault(id, label))
        if before != (part, label):
            found = f"{before[0]!r} and {part!r}" if before[0] != part else f"the labels {before[1]!r} and {label!r}"
            raise EvaluationError(f"{self.path}, line {line}: {id!r} is listed twice, in {found}; keep one of them")

    def test_part(self, train: str, test: str | None) -> str:
        """Return the name of the part to test on, after checking that both parts exist and differ.

        Raises
        ------
        EvaluationError
            When a part has no rows or both are the same.
        """
        counts = Counter(self.parts.values())
        found = "the file has " + ", ".join(f"{name!r} ({count} rows)" for name, count in counts.most_common(10))
        if train not in counts:
            raise EvaluationError(f"{self.path} has no rows of the split {train!r}; {found}; name one as train_split")
        if test is None:
            test = next((name for name in TEST_SPLITS if name in counts and name != train), None)
            if test is None:
                raise EvaluationError(
                    f"{self.path} has no split named {', '.join(TEST_SPLITS)}; {found}; name one as test_split"
                )
        if test not in counts:
            raise EvaluationError(f"{self.path} has no rows of the split {test!r}; {found}; name one as test_split")
        if test == train:
            raise EvaluationError(f"{self.path}: train and test are both the split {train!r}; name another; {found}")
        return test


def whole_store(store: Store) -> Part:
    """Return all rows of a labelled store.

    Raises
    ------
    EvaluationError
        When the store is empty, has no labels, or has rows without one.
    """
    rows = np.arange(len(store), dtype=np.int64)
    _require_rows(store, rows, "the store is empty")
    return Part(store, rows, _stored_names(store, rows), len(store.failures))


def split_store(
    store: Store, split: Split, train_split: str, test_split: str | None
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
        rows have no label.
    """
    test_split = split.test_part(train_split, test_split)
    _require_rows(store, np.arange(len(store)), "the store is empty")
    of_rows = np.array([split.parts.get(id, "") for id in store.ids])
    train, test = (_part(store, split, name, np.flatnonzero(of_rows == name)) for name in (train_split, test_split))
    others = Counter(of_rows.tolist())
    left_out = {
        "not_in_split": others.pop("", 0),
        "other_splits": {name: others[name] for name in sorted(others) if name not in (train_split, test_split)},
    }
    return train, test, left_out


def _part(store: Store, split: Split, name: str, rows: npt.NDArray[np.int64]) -> Part:
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
    labels = split.labels
    if labels is None:
        return Part(store, rows, _stored_names(store, rows), len(failed))
    _require_labels(split.path, ids, lambda row: bool(labels[ids[row]]), "fill in the label column or drop the lines")
    return Part(store, rows, np.array([labels[id] for id in ids]), len(failed))


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
