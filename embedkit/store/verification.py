"""verify: whether every byte of a store is as it was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from embedkit.errors import StoreFormatError, StoreNotFoundError
from embedkit.spec import EmbeddingSpec
from embedkit.store import format as schema
from embedkit.store.hdf5 import Dataset, Layout, LayoutError, read_layout
from embedkit.store.matrix import ReadOnlyFile
from embedkit.store.reader import Store

_READ_BYTES = 1 << 22


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
        problems = [*_gaps(file, layout), *_facts(layout)]
    except LayoutError as error:
        return [Problem("metadata", str(error))]
    except StoreFormatError as error:
        return [Problem("metadata", str(error))]
    tasks = list(_tasks(file, layout, problems))
    total, done = sum(task.length for task in tasks), 0
    with ThreadPoolExecutor(threads, thread_name_prefix="embedkit-verify") as pool:
        for task, sha256 in zip(tasks, pool.map(lambda task: task.hash(), tasks), strict=True):
            done += task.length
            if sha256 != task.expected:
                problems.append(Problem(task.where, "its SHA-256 does not match", task.rows))
            if progress is not None:
                progress(done, total)
    return problems or _order(file, layout)


def _opened(path: Path) -> ReadOnlyFile:
    if not path.is_file():
        raise StoreNotFoundError(f"{path} does not exist; there is nothing to verify")
    return ReadOnlyFile(path, keep=True)


@dataclass(frozen=True)
class _Task:
    """Some bytes to hash, and what the hash should be."""

    file: ReadOnlyFile
    where: str
    offset: int
    length: int
    expected: bytes
    rows: tuple[int, int] | None = None

    def hash(self) -> bytes:
        sha256 = hashlib.sha256()
        for start in range(0, self.length, _READ_BYTES):
            sha256.update(self.file.read(self.offset + start, min(_READ_BYTES, self.length - start)))
        return sha256.digest()


def _tasks(file: ReadOnlyFile, layout: Layout, problems: list[Problem]) -> Iterator[_Task]:
    for name, dataset in layout.datasets.items():
        try:
            expected = bytes.fromhex(str(dataset.attributes["sha256"]))
        except (KeyError, ValueError):
            problems.append(Problem(name, "it has no checksum"))
            continue
        checksums = layout.datasets.get(f"checksums/{name}")
        if checksums is None:
            yield _Task(file, name, dataset.offset, dataset.nbytes, expected)
            continue
        if checksums.attributes.get("sha256") != dataset.attributes["sha256"]:
            problems.append(Problem(name, "its checksum is not that of its blocks' checksums"))
        yield from _blocks(file, name, dataset, checksums, problems)


def _blocks(
    file: ReadOnlyFile, name: str, dataset: Dataset, checksums: Dataset, problems: list[Problem]
) -> Iterator[_Task]:
    block_rows, rows = checksums.attributes.get("block_rows"), dataset.shape[0]
    if not isinstance(block_rows, int) or block_rows < 1 or checksums.shape != (-(-rows // block_rows), 32):
        problems.append(Problem(name, f"its blocks' checksums have shape {checksums.shape} for {rows} rows"))
        return
    digests = file.array(checksums.offset, checksums.shape, checksums.dtype)
    row_bytes = dataset.nbytes // max(1, rows)
    for number, start in enumerate(range(0, rows, block_rows)):
        stop = min(start + block_rows, rows)
        yield _Task(
            file, name, dataset.offset + start * row_bytes, (stop - start) * row_bytes,
            digests[number].tobytes(), (start, stop),
        )  # fmt: skip


def _gaps(file: ReadOnlyFile, layout: Layout) -> Iterator[Problem]:
    """Yield a problem for overlapping parts of the file and for bytes between them that are not zero."""
    extents = [*layout.blocks, *((d.offset, d.offset + d.nbytes) for d in layout.datasets.values() if d.nbytes)]
    position = 0
    for start, stop in [*sorted(extents), (file.size, file.size)]:
        if start < position:
            yield Problem("metadata", f"two parts of the file claim byte {start}")
        for at in range(position, start, _READ_BYTES):
            if file.read(at, min(_READ_BYTES, start - at)).strip(b"\0"):
                yield Problem("gap", f"there is something in the gap at bytes {position}:{start}")
                break
        position = max(position, stop)


def _facts(layout: Layout) -> Iterator[Problem]:
    """Yield a problem for each root attribute that does not follow from the rest."""
    attributes, datasets = layout.attributes, layout.datasets
    if (attributes.get("format"), attributes.get("schema_version")) != (schema.FORMAT, schema.SCHEMA_VERSION):
        yield Problem("metadata", f"it is not an embedkit store of schema {schema.SCHEMA_VERSION}")
        return
    try:
        spec = EmbeddingSpec.from_dict(json.loads(str(attributes.get("provenance")))["identity"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        yield Problem("metadata", f"its provenance cannot be read: {error}")
        return
    if attributes.get("digest") != spec.digest:
        yield Problem("metadata", "its digest is not that of its spec")
    facts = []
    for name in schema.identity(datasets):
        dataset = datasets[name]
        facts.append((name, dataset.dtype.str, dataset.shape, str(dataset.attributes.get("sha256"))))
    if attributes.get("content_id") != schema.content_id(spec.digest, facts):
        yield Problem("metadata", "its content id is not that of its columns")


def _order(file: ReadOnlyFile, layout: Layout) -> list[Problem]:
    """Return a problem when the ids are not sorted and unique."""
    dataset = layout.datasets.get("ids")
    if dataset is None:
        return [Problem("ids", "it is missing")]
    ids = file.array(dataset.offset, dataset.shape, dataset.dtype)
    return [Problem("ids", "they are not sorted by their bytes and unique")] if (ids[1:] <= ids[:-1]).any() else []
