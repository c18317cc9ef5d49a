"""Examples: which labelled images are trained on, which choose the epoch, and which are compared on."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.evaluation.cells import write_whole
from embedkit.evaluation.leaks import THRESHOLD, Leaks, find_leaks
from embedkit.evaluation.probing import MOST_PRODUCTS
from embedkit.evaluation.splits import Split, split_part
from embedkit.sources import Entries, Entry, Listing
from embedkit.store import Store
from embedkit.text import counted

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Taken(Entries):
    """Some entries of a listing, by their numbers."""

    files: Sequence[Entry]
    numbers: Codes

    def __len__(self) -> int:
        return len(self.numbers)

    def entry(self, number: int) -> Entry:
        """Return one of those that were taken."""
        return self.files[int(self.numbers[number])]


@dataclass(frozen=True, eq=False)
class Examples:
    """The images of one part, with their classes.

    Parameters
    ----------
    name : str
        What the split calls the part.
    entries : sequence of Entry
        The n images, sorted by the bytes of their ids.
    codes : array of int64 of shape (n,)
        Code k means ``classes[k]`` of the `Division`.
    """

    name: str
    entries: Sequence[Entry]
    codes: Codes

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def ids(self) -> list[str]:
        """Ids of the images."""
        return [entry.id for entry in self.entries]

    def without(self, ids: set[str]) -> Examples:
        """Return the examples that are not of these ids."""
        kept = np.array([entry.id not in ids for entry in self.entries], dtype=np.bool_)
        return replace(self, entries=Taken(self.entries, np.flatnonzero(kept)), codes=self.codes[kept])


@dataclass(frozen=True, eq=False)
class Division:
    """Labelled images, divided into parts.

    Parameters
    ----------
    listing : Listing
        All images, those of no part too.
    classes : list of str
        Names of the classes of the training part, sorted.
    train : Examples
        What is learned from.
    val : Examples
        What the best epoch is chosen on.
    test : Examples
        What before and after are compared on: `val` itself where the split has no third part.
    made : bool
        Whether the split was made here, and not given.
    left_out : int
        Images of the listing that have no class or are in none of the parts.
    """

    listing: Listing
    classes: list[str]
    train: Examples
    val: Examples
    test: Examples
    made: bool
    left_out: int = 0

    @property
    def parts(self) -> list[Examples]:
        """The two or three parts."""
        return [self.train, self.val] if self.test is self.val else [self.train, self.val, self.test]

    @property
    def sha256(self) -> str:
        """SHA-256 of what `write` writes: equal for the same images, classes and parts."""
        return hashlib.sha256(self._csv()).hexdigest()

    def without(self, ids: Iterable[str]) -> Division:
        """Return the division without some images, such as those that cannot be read.

        Raises
        ------
        EvaluationError
            When a part is left without images, or a class without any to train on.
        """
        gone = set(ids)
        if gone.isdisjoint(id for part in self.parts for id in part.ids):
            return self
        train, val = self.train.without(gone), self.val.without(gone)
        test = val if self.test is self.val else self.test.without(gone)
        for part in (train, val, test):
            if not len(part):
                raise EvaluationError(f"no image of the part {part.name!r} can be read")
        empty = np.flatnonzero(np.bincount(train.codes, minlength=len(self.classes)) == 0)
        if len(empty):
            raise EvaluationError(f"no training image of the class {self.classes[empty[0]]!r} can be read")
        return replace(self, train=train, val=val, test=test)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the split as CSV with the columns path, label and split, as `embedkit probe --split` reads it."""
        write_whole(Path(path), self._csv())

    def split(self, path: str | os.PathLike[str]) -> Split:
        """Return the split as `Split.read` returns it of the file that `write` wrote at `path`."""
        rows = list(self._rows())
        return Split(Path(path), {id: part for id, _, part in rows}, {id: label for id, label, _ in rows})

    def summary(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        counted_parts = {
            role: {"split": part.name, "images": len(part), "by_class": self._by_class(part)}
            for role, part in (("train", self.train), ("val", self.val), ("test", self.test))
        }
        return {"classes": len(self.classes), "made": self.made, "left_out": self.left_out, **counted_parts}

    def to_text(self) -> str:
        """Return the counts as one line."""
        parts = ", ".join(f"{counted(len(part), 'image')} in {part.name}" for part in self.parts)
        made = "split made by class" if self.made else "split"
        left = f"; {self.left_out:,} left out" if self.left_out else ""
        return f"{made}: {parts}, {counted(len(self.classes), 'class')}{left}"

    def _by_class(self, part: Examples) -> dict[str, int]:
        counts = np.bincount(part.codes, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        found = (
            (entry.id, self.classes[code], part.name)
            for part in self.parts
            for entry, code in zip(part.entries, part.codes.tolist(), strict=True)
        )
        yield from sorted(found, key=lambda row: os.fsencode(row[0]))

    def _csv(self) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label", "split"])
        writer.writerows(self._rows())
        return text.getvalue().encode("utf-8", "surrogateescape")


def leaks_across(division: Division, store: Store, split: str | os.PathLike[str]) -> dict[str, Leaks]:
    """Return, for each part that is not trained on, the pictures that are in the training part too.

    Parameters
    ----------
    division : Division
        What is trained on, and what is not.
    store : Store
        Its embeddings tell pictures that are alike, where comparing all pairs takes minutes at most.
    split : path-like
        What errors call the split file.
    """
    read = division.split(split)
    train = split_part(store, read, division.train.name)
    found = {}
    for part in division.parts[1:]:
        other = split_part(store, read, part.name)
        near = len(train.rows) * len(other.rows) * store.dim <= MOST_PRODUCTS
        found[part.name] = find_leaks(train, other, threshold=THRESHOLD if near else None)
    return found
