"""verify: whether every byte of a store is as it was written, and whether it says what a store may say."""

from __future__ import annotations

import hashlib
import itertools
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.errors import StoreFormatError, StoreNotFoundError
from embedkit.store import format as schema
from embedkit.store.hdf5 import Dataset, Layout, LayoutError, read_layout
from embedkit.store.matrix import ReadOnlyFile
from embedkit.store.reader import Store
from embedkit.store.tables import is_id

_READ_BYTES = 1 << 22
_ROWS_AT_ONCE = 65536
_TASKS_AT_ONCE = 256


@dataclass(frozen=True)
class Problem:
    """Damage that `verify` found.

    Attributes
    ----------
    where : str
        The dataset, "metadata", or "gap": bytes between the two that nobody reads.
    error : str
        What is wrong with it.
    rows : tuple of int, optional
        First damaged row and the row behind the last one, for damage that is confined to some rows.
    """

    where: str
    error: str
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        rows = "" if self.rows is None else f" rows {self.rows[0]}:{self.rows[1]}"
        return f"{self.where}{rows}: {self.error}"


def verify(
    path: str | os.PathLike[str] | Store, *, threads: int = 2, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Compare every byte of a store with the checksums that were written with it.

    Each byte is checked once: the metadata against HDF5's checksums, the datasets against their SHA-256, and the gaps
    between them against zero. The HDF5 library is not involved, so that no damage can hang or crash it.

    A stranger can make checksums that match. So a store without damage must also say what a store may say: embeddings
    are finite, ids are sorted, unique, and paths that stay below their folder, and labels name classes. Time grows
    with the size of the file, whatever is in it.

    Parameters
    ----------
    path : path-like or Store
        The store; of one that is open the open file, whatever has its name by now.
    threads : int, default 2
        Hashing threads. One reaches about 1 GB/s.
    progress : callable, optional
        Called with bytes done and bytes in all.

    Returns
    -------
    list of Problem
        Empty when the store is as it was written. Damaged embeddings are named by rows, to the block of 4,096.

    Raises
    ------
    StoreNotFoundError
        When there is no such file.

    Examples
    --------
    >>> from embedkit.store import verify
    >>> for problem in verify("photos.h5"):  # doctest: +SKIP
    ...     print(problem)
    embeddings rows 8192:12288: its SHA-256 does not match
    """
    file = path.matrices[""].file if isinstance(path, Store) else _opened(Path(path))
    try:
        layout = read_layout(file.read, file.size, checksums=True)
        problems = [*_gaps(file, layout), *_facts(file.path, layout)]
    except LayoutError as error:
        return [Problem("metadata", str(error))]
    tasks = _tasks(file, layout, problems)
    total, done = sum(dataset.nbytes for dataset in layout.datasets.values()), 0
    with ThreadPoolExecutor(threads, thread_name_prefix="embedkit-verify") as pool:
        # Some at a time: a file has any number of blocks.
        while batch := list(itertools.islice(tasks, _TASKS_AT_ONCE)):
            for task, wrong in zip(batch, pool.map(_Task.check, batch), strict=True):
                done += task.length
                if wrong:
                    problems.append(Problem(task.where, wrong, task.rows))
                if progress is not None:
                    progress(done, total)
    return problems or list(_meaning(file, layout))


def _opened(path: Path) -> ReadOnlyFile:
    if not path.is_file():
        raise StoreNotFoundError(f"{path} does not exist; there is nothing to verify")
    return ReadOnlyFile(path, keep=True)


@dataclass(frozen=True)
class _Task:
    """Some bytes to hash, and what the hash should be; rows of embeddings have numbers of some type too."""

    file: ReadOnlyFile
    where: str
    offset: int
    length: int
    expected: bytes
    rows: tuple[int, int] | None = None
    numbers: np.dtype[Any] | None = None

    def check(self) -> str:
        """Return what is wrong with the bytes, and an empty text when nothing is."""
        sha256, finite = hashlib.sha256(), True
        for start in range(0, self.length, _READ_BYTES):
            data = self.file.read(self.offset + start, min(_READ_BYTES, self.length - start))
            sha256.update(data)
            if self.numbers is not None and finite:
                whole = len(data) // self.numbers.itemsize  # Somebody may have cut the file short just now.
                finite = bool(np.isfinite(np.frombuffer(data, self.numbers, whole)).all())
        if sha256.digest() != self.expected:
            return "its SHA-256 does not match"
        return "" if finite else "it has infinities or NaN, and embeddings are finite"


def _tasks(file: ReadOnlyFile, layout: Layout, problems: list[Problem]) -> Iterator[_Task]:
    for name, dataset in layout.datasets.items():
        try:
            expected = bytes.fromhex(str(dataset.attributes["sha256"]))
        except (KeyError, ValueError):
            problems.append(Problem(name, "it has no checksum"))
            continue
        if name != "embeddings" and not name.startswith("layers/"):
            yield _Task(file, name, dataset.offset, dataset.nbytes, expected)
            continue
        checksums = layout.datasets.get(f"checksums/{name}")
        if checksums is None or checksums.attributes.get("sha256") != dataset.attributes["sha256"]:
            problems.append(Problem(name, "its checksum is not that of its blocks' checksums"))
        if checksums is not None:
            yield from _blocks(file, name, dataset, checksums, problems)


def _blocks(
    file: ReadOnlyFile, name: str, dataset: Dataset, checksums: Dataset, problems: list[Problem]
) -> Iterator[_Task]:
    rows = dataset.shape[0] if dataset.shape else 0
    expected = (schema.BLOCK_ROWS, (-(-rows // schema.BLOCK_ROWS), 32), "|u1")
    found = (checksums.attributes.get("block_rows"), checksums.shape, checksums.dtype.str)
    # Blocks of another size could be so many that a small file takes gigabytes to verify.
    if found != expected:
        problems.append(Problem(name, f"its blocks' checksums are {found} for {rows} rows, expected {expected}"))
        return
    digests = file.array(checksums.offset, checksums.shape, checksums.dtype)
    row_bytes = dataset.nbytes // max(1, rows)
    for number, start in enumerate(range(0, rows, schema.BLOCK_ROWS)):
        stop = min(start + schema.BLOCK_ROWS, rows)
        yield _Task(
            file, name, dataset.offset + start * row_bytes, (stop - start) * row_bytes,
            digests[number].tobytes(), (start, stop), dataset.dtype,
        )  # fmt: skip


def _gaps(file: ReadOnlyFile, layout: Layout) -> Iterator[Problem]:
    """Yield a problem for bytes between the parts of the file that are not zero.

    Parts that overlap are an error: a small file could have its bytes hashed any number of times.
    """
    extents = [*layout.blocks, *((d.offset, d.offset + d.nbytes) for d in layout.datasets.values() if d.nbytes)]
    position = 0
    for start, stop in [*sorted(extents), (file.size, file.size)]:
        if start < position:
            raise LayoutError(f"two parts of the file claim byte {start}")
        for at in range(position, start, _READ_BYTES):
            if file.read(at, min(_READ_BYTES, start - at)).strip(b"\0"):
                yield Problem("gap", f"there is something in the gap at bytes {position}:{start}")
                break
        position = max(position, stop)


def _facts(path: Path, layout: Layout) -> Iterator[Problem]:
    """Yield a problem for a header or datasets that `Store.open` refuses, and for a content id that does not follow."""
    try:
        _, spec, layers = schema.read_header(path, layout.attributes)
        schema.check_columns(path, layout.datasets, spec, layers)
    except StoreFormatError as error:
        yield Problem("metadata", str(error).removeprefix(f"{path}: "))
        return
    facts = []
    for name in schema.identity(layout.datasets):
        dataset = layout.datasets[name]
        facts.append((name, dataset.dtype.str, dataset.shape, str(dataset.attributes.get("sha256"))))
    if layout.attributes.get("content_id") != schema.content_id(spec.digest, facts):
        yield Problem("metadata", "its content id is not that of its columns")


def _meaning(file: ReadOnlyFile, layout: Layout) -> Iterator[Problem]:
    """Yield a problem for ids, kinds and labels that no store has; their datasets are there, in the right shape."""
    ids, failed = layout.datasets["ids"], layout.datasets["failures/ids"]
    for name, dataset in (("ids", ids), ("failures/ids", failed)):
        for block in _blocks_of(file, dataset, overlap=1):
            error = _wrong_ids(block)
            if error:
                yield Problem(name, error)
                return
    for id in _in_both(file, ids, failed):
        yield Problem("ids", f"{os.fsdecode(id)!r} is both a row and a failure")
    if "failures/kinds" in layout.datasets:
        for kinds in _blocks_of(file, layout.datasets["failures/kinds"]):
            if not all(map(schema.is_kind, set(kinds.tolist()))):
                yield Problem("failures/kinds", "it has what is no kind: a word of 1 to 32 printable ASCII characters")
                break
    if "labels" in layout.datasets:
        yield from _labels(file, layout.datasets["labels"], layout.datasets["label_names"])


def _blocks_of(file: ReadOnlyFile, column: Dataset, overlap: int = 0) -> Iterator[schema.Array]:
    """Yield a column a block at a time, each after the first with the last row of the one before if they overlap."""
    for start in range(0, column.shape[0], _ROWS_AT_ONCE):
        first, stop = max(0, start - overlap), min(start + _ROWS_AT_ONCE, column.shape[0])
        yield file.array(column.offset + first * column.dtype.itemsize, (stop - first,), column.dtype)


def _wrong_ids(ids: schema.Array) -> str:
    """Return what is wrong with some ids, and an empty text when nothing is."""
    if (ids[1:] <= ids[:-1]).any():
        return "they are not sorted by their bytes and unique"
    for id in ids.tolist():
        if not is_id(id):
            return f"{os.fsdecode(id)!r} is not a path that stays below its folder"
    return ""


def _in_both(file: ReadOnlyFile, ids: Dataset, failed: Dataset) -> Iterator[bytes]:
    """Yield the first of the ids that are among the failures too, if there are any; both are sorted."""
    failures = file.array(failed.offset, failed.shape, failed.dtype)
    for block in _blocks_of(file, ids) if len(failures) else ():
        rows = set(block.tolist())
        start, stop = bisect_left(failures, block[0]), bisect_right(failures, block[-1])
        for low in range(start, stop, _ROWS_AT_ONCE):
            common = rows.intersection(failures[low : min(low + _ROWS_AT_ONCE, stop)].tolist())
            if common:
                yield min(common)
                return


def _labels(file: ReadOnlyFile, labels: Dataset, names: Dataset) -> Iterator[Problem]:
    used = np.zeros(names.shape[0], dtype=bool)
    for codes in _blocks_of(file, labels):
        if codes.min() < -1 or codes.max() >= len(used):
            yield Problem("labels", f"it has codes that name none of {len(used)} classes")
            return
        used[codes[codes >= 0]] = True
    if not used.all():
        yield Problem("label_names", "it has classes that are the label of no row")
    if any((block[1:] <= block[:-1]).any() for block in _blocks_of(file, names, overlap=1)):
        yield Problem("label_names", "they are not sorted by their bytes and unique")
