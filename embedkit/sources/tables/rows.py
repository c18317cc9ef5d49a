"""Rows of the tables that people keep: CSV, TSV, JSON lines and Parquet, read from front to back."""

from __future__ import annotations

import csv
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from embedkit.errors import ImageError, MissingExtraError
from embedkit.sources.filelists import unopened

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
HOPELESS = 1000  # So many bad rows before the first good one are a mistake in the command.

_MAX_LINE = 16 << 20  # Characters; a file without line breaks would otherwise be read as a whole.
_MAX_COLUMNS = 10_000
_BATCH_ROWS = 8192
_SIGNS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}


class BadRowError(Exception):
    """A row that cannot be used: why, and of what kind."""


Rows = Iterator[tuple[int, Sequence[Any] | BadRowError]]


@dataclass(frozen=True)
class Table:
    """A table that is read row by row.

    Attributes
    ----------
    path : Path
        The file.
    columns : list of str
        What its columns are called.
    unit : str
        What its rows are counted in: "line" or "row".
    rows : callable
        Called with the names of some columns, it yields the number of each row, from 1, and its values: texts of CSV
        and TSV, of the other kinds what they hold, None where they hold nothing. Or what is wrong with a row that has
        none; the others are not lost with it.
    """

    path: Path
    columns: list[str]
    unit: str
    rows: Callable[[Sequence[str]], Rows]


def open_table(path: str | os.PathLike[str]) -> Table:
    """Open a table of a kind that its name says.

    Raises
    ------
    ImageError
        When there is no such file, it is of another kind, or its columns cannot be read.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from embedkit.sources.tables.rows import open_table
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = pathlib.Path(folder.name) / "flowers.csv"
    >>> _ = file.write_text("path,label" + chr(10) + "1.jpg,rose")
    >>> open_table(file).columns, list(open_table(file).rows(["label"]))
    (['path', 'label'], [(2, ['rose'])])
    >>> folder.cleanup()
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise wrong(path, f"is no table; what is: {' '.join(TABLES)}", "unsupported")
    if path.exists() and not path.is_file():
        raise wrong(path, "is not a regular file", "unsupported")
    if suffix == ".parquet":
        return Table(path, _parquet_columns(path), "row", lambda wanted: _parquet_rows(path, wanted))
    if suffix in (".csv", ".tsv"):
        delimiter = "\t" if suffix == ".tsv" else _delimiter(path)
        header = _header(path, _records(path, delimiter))
        return Table(path, header, "line", lambda wanted: _csv_rows(path, delimiter, wanted))
    return Table(path, _json_columns(path), "line", lambda wanted: _json_rows(path, wanted))


def wrong(path: Path, reason: str, kind: str = "damaged") -> ImageError:
    """Return what is raised for a table as a whole."""
    return ImageError(os.fspath(path), reason, kind)


def text_of(value: Any) -> str | None:
    """Return a value of a table as text, None when it is empty.

    Raises
    ------
    ValueError
        For lists and whatever else is not one text or number.
    """
    if isinstance(value, str):
        return value or None
    if isinstance(value, bytes):
        return os.fsdecode(value) or None
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return None  # What Pandas makes of an empty field.
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    what = "several values" if isinstance(value, list | tuple) else "something else"
    raise ValueError(f"holds {what}, not one text or number")


# --- Text


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[str]]:
    """Open a file for its lines, none of which is longer than memory bears."""
    try:
        with open(path, "rb") as head:
            if head.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise wrong(path, "its text is UTF-16; save it as UTF-8", "unsupported")
        # utf-8-sig, because spreadsheets write a byte order mark; surrogateescape, as file names are decoded.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield _bounded(path, file)
    except OSError as error:
        raise unopened(os.fspath(path), error) from error


def _bounded(path: Path, file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        if len(line) == _MAX_LINE:
            raise wrong(path, f"line {number:,} has more than {_MAX_LINE:,} characters", "too-large")
        yield line


def _delimiter(path: Path) -> str:
    """Return what separates the columns: spreadsheets of countries with a decimal comma write semicolons."""
    with _lines(path) as lines:
        header = next((line for line in lines if line.strip()), "")
    return next((sign for sign in _SIGNS if sign in header), ",")


class _Replayed:
    """Lines of which those of the record that is being read can be had again."""

    def __init__(self, path: Path, lines: Iterator[str]) -> None:
        self.path, self.lines, self.number = path, lines, 0
        self.record: list[str] = []
        self._waiting: deque[str] = deque()
        self._length = 0

    def __iter__(self) -> _Replayed:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self.lines)
        self.number += 1
        self.record.append(line)
        self._length += len(line)
        if self._length > 2 * _MAX_LINE:
            reason = f"the record that ends on line {self.number:,} has more than {2 * _MAX_LINE:,} characters"
            raise wrong(self.path, reason, "too-large")
        return line

    def begin(self) -> None:
        """Begin the next record."""
        self.record.clear()
        self._length = 0

    def give_up_line(self) -> int:
        """Give up the first line of the record, go back to the one after it, and return its number."""
        again = self.record[1:]
        self._waiting.extendleft(reversed(again))
        self.number -= len(again)
        self.begin()
        return self.number


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str] | BadRowError]]:
    """Yield the records of a CSV file and the numbers of the lines that they end on, without empty lines.

    The first one says how many values there are. A line that is no such record costs itself alone, and not those that
    it swallows when it leaves a quotation mark open.
    """
    width = 0
    with _lines(path) as lines:
        replayed, ended = _Replayed(path, lines), False
        while not ended:
            # Strict, since a quotation mark that is not closed would otherwise swallow rows.
            reader = csv.reader(replayed, delimiter=delimiter, strict=True)
            try:
                for values in reader:
                    width = width or len(values)
                    if len(values) in (0, width):
                        if values:
                            yield replayed.number, values
                        replayed.begin()
                    else:
                        hint = f"quote values that contain {_SIGNS[delimiter]}"
                        if len(replayed.record) > 1:
                            hint = "is a quotation mark left open?"
                        count = "1 value" if len(values) == 1 else f"{len(values):,} values"
                        reason = f"{count} for {width:,} columns; {hint}"
                        yield replayed.give_up_line(), BadRowError(reason, "damaged")
                ended = True
            except csv.Error as error:
                reason = f"{error}; is a quotation mark left open?"
                yield replayed.give_up_line(), BadRowError(reason, "damaged")


def _header(path: Path, records: Iterator[tuple[int, list[str] | BadRowError]]) -> list[str]:
    """Return the first record, which names the columns."""
    line, header = next(records, (0, []))
    if isinstance(header, BadRowError):
        raise wrong(path, f"line {line:,}: {header.args[0]}")
    return header


def _csv_rows(path: Path, delimiter: str, wanted: Sequence[str]) -> Rows:
    records = _records(path, delimiter)
    header = _header(path, records)
    at = [header.index(name) for name in wanted]
    for line, values in records:
        yield line, values if isinstance(values, BadRowError) else [values[column] for column in at]


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRowError]]:
    with _lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                told = (
                    f"{error.msg}, at character {error.pos + 1:,}" if isinstance(error, json.JSONDecodeError) else error
                )
                yield number, BadRowError(f"not JSON: {told}", "damaged")
                continue
            is_object = isinstance(found, dict)
            yield number, found if is_object else BadRowError('not an object such as {"path": "1.jpg"}', "damaged")


def _json_columns(path: Path) -> list[str]:
    """Return the keys of all lines: one may first come up in the last."""
    columns: dict[str, None] = {}
    first, bad = "", 0
    for number, found in _json_objects(path):
        if isinstance(found, BadRowError):
            first, bad = first or f"line {number:,}: {found.args[0]}", bad + 1
            if bad == HOPELESS and not columns:
                break
            continue
        columns.update(dict.fromkeys(found))
        if len(columns) > _MAX_COLUMNS:
            raise wrong(path, f"line {number:,}: there are more than {_MAX_COLUMNS:,} different keys", "too-large")
    if first and not columns:
        raise wrong(path, f"none of {bad:,} lines can be used; the first: {first}")
    return list(columns)


def _json_rows(path: Path, wanted: Sequence[str]) -> Rows:
    for number, found in _json_objects(path):
        yield number, found if isinstance(found, BadRowError) else [found.get(name) for name in wanted]


# --- Parquet


_OPTIONS: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file; its pages are read as they are needed, so a row group may be of any size."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise unopened(os.fspath(path), error) from error
    try:
        with file, parquet.ParquetFile(file, **_OPTIONS) as table:
            yield table
    except Exception as error:  # Whatever a parser raises.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise wrong(path, f"is damaged, or not a Parquet file: {reason}") from error


def _parquet_columns(path: Path) -> list[str]:
    with _parquet(path) as table:
        return list(table.schema_arrow.names)


def _parquet_rows(path: Path, wanted: Sequence[str]) -> Rows:
    number = 1
    with _parquet(path) as table:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=list(wanted)):
            columns = [batch.column(batch.schema.get_field_index(name)).to_pylist() for name in wanted]
            yield from enumerate(zip(*columns, strict=True), number)
            number += len(batch)
