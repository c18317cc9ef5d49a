"""Rows of the tables that people keep: CSV, TSV, JSON lines and Parquet, read from front to back."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from embedkit.errors import ImageError, MissingExtraError
from embedkit.sources.filelists import unopened

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
Rows = Iterator[tuple[int, Sequence[Any]]]

_MAX_LINE = 16 << 20  # Characters; a file without line breaks would otherwise be read as a whole.
_MAX_COLUMNS = 10_000
_BATCH_ROWS = 8192
_SIGNS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}


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
        and TSV, of the other kinds what they hold, None where they hold nothing.
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
        When there is no such file, it is of another kind, or its columns cannot be read; what is wrong further down is
        raised by `rows`, with the number of the line.

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
        header = next(_records(path, delimiter), (0, []))[1]
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
    raise ValueError(f"holds {type(value).__name__}, not one text or number")


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


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV file and the numbers of the lines that they end on, without empty lines."""
    with _lines(path) as lines:
        # Strict, since a quotation mark that is not closed would otherwise swallow rows.
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        line = 0
        try:
            for values in reader:
                line = reader.line_num
                if values:
                    yield line, values
        except csv.Error as error:
            reason = f"line {line + 1:,}: {error}; is a quotation mark left open?"
            raise wrong(path, reason) from error


def _csv_rows(path: Path, delimiter: str, wanted: Sequence[str]) -> Rows:
    records = _records(path, delimiter)
    header = next(records, (0, []))[1]
    at = [header.index(name) for name in wanted]
    for line, values in records:
        if len(values) != len(header):
            reason = f"{len(values)} values for {len(header)} columns; quote values that contain {_SIGNS[delimiter]}"
            raise wrong(path, f"line {line:,}: {reason}")
        yield line, [values[column] for column in at]


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise wrong(path, f"line {number:,} is not JSON: {error}") from error
            if not isinstance(found, dict):
                raise wrong(path, f'line {number:,} is not an object such as {{"path": "1.jpg"}}')
            yield number, found


def _json_columns(path: Path) -> list[str]:
    """Return the keys of all lines: one may first come up in the last."""
    columns: dict[str, None] = {}
    for number, found in _json_objects(path):
        columns.update(dict.fromkeys(found))
        if len(columns) > _MAX_COLUMNS:
            raise wrong(path, f"line {number:,}: there are more than {_MAX_COLUMNS:,} different keys", "too-large")
    return list(columns)


def _json_rows(path: Path, wanted: Sequence[str]) -> Rows:
    for number, found in _json_objects(path):
        yield number, [found.get(name) for name in wanted]


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
