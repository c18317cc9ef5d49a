"""Images that a table lists, with what it says about each: id, class, split and box."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES
from embedkit.sources.entries import Entries, Entry, Listing, classes_of
from embedkit.sources.failing import quoted
from embedkit.sources.filelists import sorting_key
from embedkit.sources.remote.transfers import is_remote, local_path
from embedkit.sources.tables.boxes import BOX_FORMATS, Box, fragment, read_box
from embedkit.sources.tables.columns import Columns, choose_columns
from embedkit.sources.tables.links import downloaded, folder_url, open_root
from embedkit.sources.tables.roots import FolderRoot, Root, check_text, checked_id
from embedkit.sources.tables.rows import HOPELESS, BadRowError, Table, open_table, text_of, wrong
from embedkit.text import printable


@dataclass(frozen=True)
class _Rows(Entries):
    """The images of a manifest, in columns."""

    root: Root
    ids: list[str]
    paths: list[str] | None  # Where the ids do not say them.
    codes: npt.NDArray[np.int32] | None
    classes: list[str]
    boxes: npt.NDArray[np.int32] | None  # Empty ones where a row has none.
    looks: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def entry(self, number: int) -> Entry:
        code = -1 if self.codes is None else self.codes[number]
        label = None if code < 0 else self.classes[code]
        look = None if self.looks is None else (int(self.looks[number, 0]), int(self.looks[number, 1]))
        return self.root.image(self.ids[number], self.path(number), label, self.box(number), look)

    def path(self, number: int) -> str:
        """Return the path of a row below the root."""
        if self.paths is not None:
            return self.paths[number]
        id, box = self.ids[number], self.box(number)
        return id if box is None else id.removesuffix(fragment(box))

    def box(self, number: int) -> Box | None:
        """Return the box of a row that has one."""
        if self.boxes is None:
            return None
        left, top, right, bottom = self.boxes[number].tolist()
        return (left, top, right, bottom) if right > left else None


def list_manifest(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    box_format: str | None = None,
    follow_links: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Listing:
    """List the images that a table names: CSV, TSV, JSON lines or Parquet.

    Each row is an image. Its columns are found by what they are usually called, such as ``image_path``, ``class`` or
    ``bbox``, in any case; where that leaves a doubt, `columns` settles it. A row that cannot be used, such as one whose
    path leads out of the root or that has a value too many, is a failure that is called after its line:
    ``flowers.csv#line=7``.

    Parameters
    ----------
    path : path-like
        The manifest: ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson`` or ``.parquet``; or its URL.
    root : path-like, optional
        The folder, or the URL, that paths are relative to and lie below; by default the manifest's own. Below a URL,
        rows may name whole URLs, too. No row makes this machine ask another server.
    columns : mapping of str to str, optional
        The columns of ``path``, ``id``, ``label``, ``split`` and ``box``, as far as they are to be named. A box may
        have four: ``{"box": "x0,y0,x1,y1"}``. An empty name means that there is no such column.
    split : str, optional
        Take the rows of this split only.
    box_format : {"xyxy", "xywh"}, optional
        Boxes are left, top, right, bottom in pixels of the upright image, of which right and bottom are the first
        outside; or left, top, width, height. By default the names of the columns decide, and a column ``box`` or
        ``bbox`` is the former.
    follow_links : bool, default False
        Whether symbolic links that lead out of the root are followed. This is looked at when an image is read.
    max_bytes : int
        A larger file is a failure.

    Returns
    -------
    Listing
        An image's id is its path relative to the root, that of a box ``1.jpg#xywh=left,top,width,height``, or what a
        column of ids says.

    Raises
    ------
    ImageError
        When the table cannot be read, has not the columns, or gives two rows the same id.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from embedkit.sources import list_manifest
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = pathlib.Path(folder.name) / "flowers.csv"
    >>> _ = file.write_text("image,genus" + chr(10) + "a/1.jpg,rosa")
    >>> [(image.id, image.label) for image in list_manifest(file, columns={"label": "genus"}).files]
    [('a/1.jpg', 'rosa')]
    >>> folder.cleanup()
    """
    if box_format not in (None, *BOX_FORMATS):
        raise ValueError(f"box_format is one of {', '.join(BOX_FORMATS)}, got {box_format!r}")
    with _reading(path, root, columns, split is not None, box_format, follow_links, max_bytes) as reading:
        reading.split = split
        return reading.listing()


def manifest_parts(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, str] | None:
    """Return the split of each row that names one, by its id in `list_manifest`; None without a column of splits.

    Raises
    ------
    ImageError
        When the table cannot be read, or has not the columns.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from embedkit.sources.tables import manifest_parts
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = pathlib.Path(folder.name) / "flowers.csv"
    >>> _ = file.write_text("image,set" + chr(10) + "a/1.jpg,train" + chr(10) + "a/2.jpg,")
    >>> manifest_parts(file)
    {'a/1.jpg': 'train'}
    >>> folder.cleanup()
    """
    with _reading(path, root, columns, None, None, False, MAX_BYTES) as reading:
        if reading.columns.split is None:
            return None
        reading.listing()
        return {id: part for id, part in zip(reading.ids, reading.parts, strict=True) if part is not None}


@contextmanager
def _reading(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None, columns: Mapping[str, str] | None,
    split: bool | None, box_format: str | None, follow_links: bool, max_bytes: int,
) -> Iterator[_Reading]:  # fmt: skip
    """Open a table here or behind a URL, and choose its columns."""
    source = local_path(os.fspath(path))
    place = _root(source, None if root is None else local_path(os.fspath(root)), follow_links, max_bytes)
    with downloaded(source) if is_remote(source) else nullcontext(Path(source)) as file:
        table = open_table(file)
        yield _Reading(table, choose_columns(table, columns or {}, box_format, split=split), place)


def _root(source: str, root: str | None, follow_links: bool, max_bytes: int) -> Root:
    """Return where the images of a manifest lie."""
    if root is None and is_remote(source):
        root = folder_url(source)
    if root is not None and is_remote(root):
        return open_root(root, max_bytes)
    folder = Path(source).parent if root is None else Path(root)
    if not folder.is_dir() and root is not None:
        reason, kind = ("is a file", "not-an-image") if folder.exists() else ("no such folder", "missing")
        raise ImageError(os.fspath(folder), f"{reason}; the root of a manifest is the folder of its images", kind)
    return FolderRoot(folder, follow_links, max_bytes)


class _Reading:
    """Reads a table into columns; each of a million rows takes little more than its path."""

    def __init__(self, table: Table, columns: Columns, root: Root) -> None:
        self.table, self.columns, self.root = table, columns, root
        self.split: str | None = None  # The only one whose rows are taken.
        self.parts: list[str | None] = []
        self.ids: list[str] = []
        self.paths: list[str] = []
        self.lines, self.codes, self.boxes = array("q"), array("i"), array("i")
        self.classes: dict[str, int] = {}
        self.splits: Counter[str | None] = Counter()
        self.failures: list[ImageError] = []

    def listing(self) -> Listing:
        """Read all rows."""
        for line, values in self.table.rows(self.columns.names):
            try:
                self._add(line, values)
            except BadRowError as bad:
                self._fail(line, bad)
        self._require_rows()
        order = self._order()
        classes = classes_of(self.classes)
        rank = {name: number for number, name in enumerate(classes)}
        ranks = np.array([rank[name] for name in self.classes] + [-1], dtype=np.int32)  # The last one is that of -1.
        take = order.tolist()
        files = _Rows(
            self.root,
            [self.ids[k] for k in take],
            [self.paths[k] for k in take] if self.paths else None,
            ranks[np.frombuffer(self.codes, dtype=np.int32)[order]] if classes else None,
            classes,
            np.frombuffer(self.boxes, dtype=np.int32).reshape(-1, 4)[order] if self.columns.box else None,
        )
        files = replace(files, looks=self.root.look(map(files.path, range(len(files)))))
        failures = sorted(self.failures, key=lambda bad: os.fsencode(bad.id))
        return Listing(self.root.name, files, classes, failures, 0, has_paths=not self.paths)

    def _add(self, line: int, values: Sequence[Any] | BadRowError) -> None:
        if isinstance(values, BadRowError):
            raise values
        columns = self.columns
        if columns.split is not None:
            part = self._text(line, "split", values[columns.split])
            self.splits[part] += 1
            if self.split is not None and part != self.split:
                return
        else:
            part = None
        named = self._text(line, "path", values[0])
        if named is None:
            raise BadRowError("it names no path", "missing")
        path = self.root.relative(named)
        label = None if columns.label is None else self._text(line, "label", values[columns.label])
        own = self._text(line, "id", values[columns.id]) if columns.id else path
        try:
            box = self._box(values) if columns.box else None
            if label is not None and label not in self.classes:
                check_text(label, "class")
            if columns.id is not None:  # The path itself may be the id, that of a box too.
                id = checked_id(own)
            else:
                id = path if box is None else checked_id(path + fragment(box))
        except BadRowError as bad:
            reason, kind = bad.args
            raise BadRowError(f"{printable(path[:200])}: {reason}", kind) from bad
        if columns.id is not None:
            self.paths.append(path)
        self.ids.append(id)
        if columns.split is not None:
            self.parts.append(part)
        self.lines.append(line)
        if columns.box:
            self.boxes.extend(box or (0, 0, 0, 0))
        self.codes.append(-1 if label is None else self.classes.setdefault(label, len(self.classes)))

    def _text(self, line: int, role: str, value: Any) -> str | None:
        if type(value) is str:
            return value or None
        try:
            return text_of(value)
        except ValueError as error:
            column = self.columns.names[self.columns.at(role)]
            raise wrong(
                self.table.path,
                f"{self.table.unit} {line:,}: the column {quoted(column)} {error}; name another: --columns "
                f"{role}=COLUMN{', or none: --columns ' + role + '=' if role in ('id', 'label') else ''}",
                "unsupported",
            ) from error

    def _box(self, values: Sequence[Any]) -> Box | None:
        try:
            return read_box([values[column] for column in self.columns.box], self.columns.box_format)
        except ValueError as error:
            raise BadRowError(str(error), "damaged") from error

    def _fail(self, line: int, bad: BadRowError) -> None:
        self.failures.append(ImageError(f"{self.table.path.name}#{self.table.unit}={line}", *bad.args))
        if len(self.failures) == HOPELESS and not self.ids:
            self._require_rows()

    def _require_rows(self) -> None:
        if self.ids:
            return
        if self.failures:
            first = self.failures[0]
            count = f"{len(self.failures):,}"
            raise wrong(self.table.path, f"none of {count} rows can be used; the first: {first}", first.kind)
        if self.splits:
            found = ", ".join(
                f"{'none' if name is None else quoted(name)} ({count:,} rows)"
                for name, count in self.splits.most_common(10)
            )
            raise wrong(self.table.path, f"no rows of the split {quoted(self.split or '')}; it has {found}", "empty")
        raise wrong(self.table.path, "has columns and no rows", "empty")

    def _order(self) -> npt.NDArray[np.int64]:
        """Return the rows in the order of their ids' bytes, none of which there may be twice."""
        ids, key = self.ids, sorting_key(self.ids)
        order = sorted(range(len(ids)), key=ids.__getitem__ if key is None else lambda k: os.fsencode(ids[k]))
        for left, right in pairwise(order):
            if ids[left] == ids[right]:
                raise self._twice(ids[left], *sorted((self.lines[left], self.lines[right])))
        if twice := {failure.id for failure in self.failures}.intersection(ids):
            raise wrong(self.table.path, f"a row has the id {quoted(min(twice))}, that of a bad row", "refused")
        return np.array(order, dtype=np.int64)

    def _twice(self, id: str, first: int, second: int) -> ImageError:
        where = f"{self.table.unit}s {first:,} and {second:,}"
        if self.columns.id is None:
            reason = f"{where} both name {quoted(id)}; keep one of them, or name a column of ids: --columns id=COLUMN"
        else:
            column = self.columns.names[self.columns.id]
            reason = f"{where} have the same {column} {quoted(id)}; name another column of ids, or none: --columns id="
        return wrong(self.table.path, reason, "refused")
