"""From rows that lie here and there to one finished store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import StoreFormatError
from embedkit.spec import EmbeddingSpec, canonical_json
from embedkit.store import durable
from embedkit.store import format as schema
from embedkit.store.matrix import Matrix
from embedkit.store.tables import Failures, Images
from embedkit.store.verification import verify

_BUFFERS = 4


@dataclass(frozen=True)
class Header:
    """What a store says of itself: the specs of its embeddings and layers, and the run that made it."""

    spec: EmbeddingSpec
    run_id: str
    created: str
    layers: Mapping[str, EmbeddingSpec] = field(default_factory=dict)
    information: Mapping[str, Any] = field(default_factory=dict)

    def provenance(self) -> str:
        """Return the canonical JSON that is kept in the store."""
        values: dict[str, Any] = {
            "identity": self.spec.to_dict(),
            "information": {**self.information, "created": self.created},
        }
        if self.layers:
            values["layers"] = {name: spec.to_dict() for name, spec in self.layers.items()}
        text = canonical_json(values)
        if len(text) > schema.MAX_PROVENANCE_BYTES:
            raise ValueError(
                f"the provenance has {len(text):,} bytes; a store keeps at most {schema.MAX_PROVENANCE_BYTES:,}"
            )
        return text


class Gather:
    """The rows of a matrix to be: row i is row ``rows[i]`` of ``sources[which[i]]``."""

    def __init__(self, sources: Sequence[Matrix], which: npt.NDArray[Any], rows: npt.NDArray[Any], dim: int) -> None:
        self.sources, self.which, self.rows = sources, which, rows
        self.shape = (len(rows), dim)
        self.dtype = np.dtype("<f4")

    def read(self, start: int, stop: int, out: npt.NDArray[np.float32]) -> None:
        """Fill an array with rows start to stop."""
        which, rows = self.which[start:stop], self.rows[start:stop]
        cuts = np.flatnonzero((np.diff(which) != 0) | (np.diff(rows) != 1)) + 1
        if len(cuts) < 64:
            for low, high in pairwise([0, *cuts.tolist(), stop - start]):
                self._copy(self.sources[which[low]], int(rows[low]), out[low:high])
        else:
            for source in np.unique(which).tolist():
                chosen = which == source
                # A new map each time: one that stays keeps a file open, and there may be thousands of sources.
                out[chosen] = replace(self.sources[source]).map[rows[chosen]]

    def _copy(self, source: Matrix, start: int, out: npt.NDArray[np.float32]) -> None:
        if source.dtype == self.dtype:
            source.read(start, start + len(out), out)
        else:
            out[...] = source.read(start, start + len(out))
        if source.passing:
            source.forget(start, start + len(out))


@dataclass(frozen=True)
class Content:
    """The rows of a store to be, sorted by the bytes of their ids.

    Attributes
    ----------
    images : Images
    failures : Failures
    labels : int32 array of shape (n,), or None
        Codes into `classes`, -1 for none.
    classes : sequence of str
    embeddings : Gather
    layers : mapping of str to Gather
        Of the same rows.
    """

    images: Images
    failures: Failures
    labels: npt.NDArray[np.int32] | None
    classes: Sequence[str]
    embeddings: Gather
    layers: Mapping[str, Gather] = field(default_factory=dict)


def publish(path: Path, folder: Path, header: Header, content: Content) -> None:
    """Write a store aside in a folder of the same file system, and give it its name in place of whatever has it."""
    with durable.aside(folder) as aside, durable.naming(path):
        write_store(aside, header, content)
        durable.publish_over(aside, path)


def write_store(path: Path, header: Header, content: Content) -> None:
    """Write a store, make it durable and verify it, all under a name of its own.

    Raises
    ------
    OSError
        When the disk is full (said before the copy begins) or fails.
    StoreFormatError
        When what was written does not read back.
    """
    columns = _columns(content)
    matrices: dict[str, Gather] = {"embeddings": content.embeddings}
    matrices |= {f"layers/{name}": rows for name, rows in content.layers.items()}
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {name: (rows.shape, rows.dtype) for name, rows in matrices.items()}
    shapes |= {name: (column.shape, column.dtype) for name, column in columns.items()}
    blocks = -(-len(content.images) // schema.BLOCK_ROWS)
    shapes |= {f"checksums/{name}": ((blocks, 32), np.dtype("u1")) for name in matrices}
    hashes = dict.fromkeys(shapes, schema.NO_HASH)
    pieces = schema.lay_out(shapes, _attributes(header, shapes, hashes))
    handle = durable.create(path)
    try:
        durable.reserve(handle, path, pieces.size)
        for name, rows in matrices.items():
            os.lseek(handle, pieces.offsets[name], os.SEEK_SET)
            columns[f"checksums/{name}"] = _copy_rows(handle, rows)
        for name, column in columns.items():
            hashes[name] = schema.sha256_of(column)
            os.lseek(handle, pieces.offsets[name], os.SEEK_SET)
            durable.write_all(handle, np.ascontiguousarray(column).data)
        for name in matrices:
            hashes[name] = hashes[f"checksums/{name}"]
        for offset, data in schema.lay_out(shapes, _attributes(header, shapes, hashes)).metadata:
            os.lseek(handle, offset, os.SEEK_SET)
            durable.write_all(handle, data)
        os.ftruncate(handle, pieces.size)
        with ThreadPoolExecutor(1, thread_name_prefix="embedkit-sync") as pool:
            synced = pool.submit(durable.sync, handle)  # The disk writes while the processor hashes.
            problems = verify(path)
            synced.result()
    finally:
        os.close(handle)
    for problem in problems:
        raise StoreFormatError(f"{path} does not read back as it was written, the disk or memory is faulty: {problem}")


def _columns(content: Content) -> dict[str, schema.Array]:
    columns = {name: getattr(content.images, name) for name in ("ids", "sizes", "mtimes_ns", "content_sha256")}
    labels, classes = narrowed(content.labels, content.classes)
    if labels is not None:
        columns["labels"], columns["label_names"] = labels, schema.encode_texts(classes)
    columns |= content.failures.datasets()
    return {name: _narrow(column) if column.dtype.kind == "S" else column for name, column in columns.items()}


def narrowed(labels: npt.NDArray[np.int32] | None, classes: Sequence[str]) -> tuple[schema.Array | None, list[str]]:
    """Return labels with those classes only that some row has, sorted by their bytes."""
    if labels is None or not (labels >= 0).any():
        return None, []
    used = sorted(np.unique(labels[labels >= 0]).tolist(), key=lambda code: os.fsencode(classes[code]))
    codes = np.full(len(classes) + 1, -1, dtype="<i4")  # The last one is what -1 becomes: -1.
    codes[used] = np.arange(len(used))
    return codes[labels], [classes[code] for code in used]


def _narrow(texts: schema.Array) -> schema.Array:
    """Return texts in the narrowest type that holds them, so that equal texts are equal bytes."""
    width = int(np.char.str_len(texts).max()) if len(texts) else 0
    return texts.astype(f"S{max(1, width)}")


def _copy_rows(handle: int, rows: Gather) -> schema.Array:
    """Write rows where the file stands, and return the SHA-256 of each block.

    Hashing takes longer than copying, so it has threads of its own, and a few buffers go round.
    """
    digests: list[Future[bytes]] = []
    buffers = [np.empty((schema.BLOCK_ROWS, rows.shape[1]), dtype=rows.dtype) for _ in range(_BUFFERS)]
    with ThreadPoolExecutor(2, thread_name_prefix="embedkit-hash") as pool:
        for number, start in enumerate(range(0, rows.shape[0], schema.BLOCK_ROWS)):
            if number >= _BUFFERS:
                digests[number - _BUFFERS].result()  # Its buffer is free again.
            stop = min(start + schema.BLOCK_ROWS, rows.shape[0])
            block = buffers[number % _BUFFERS][: stop - start]
            rows.read(start, stop, block)
            digests.append(pool.submit(_sha256, block.data))
            durable.write_all(handle, block.data)
    return np.frombuffer(b"".join(digest.result() for digest in digests), dtype=np.uint8).reshape(-1, 32)


def _sha256(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _attributes(
    header: Header, shapes: Mapping[str, tuple[tuple[int, ...], Any]], hashes: Mapping[str, str]
) -> dict[str, schema.Attributes]:
    facts = [(name, np.dtype(shapes[name][1]).str, shapes[name][0], hashes[name]) for name in schema.identity(shapes)]
    attributes: dict[str, schema.Attributes] = {name: {"sha256": sha256} for name, sha256 in hashes.items()}
    for name in hashes:
        if name.startswith("checksums/"):
            attributes[name] = {"sha256": hashes[name], "block_rows": schema.BLOCK_ROWS, "algorithm": "sha256"}
    attributes[""] = {
        "format": schema.FORMAT,
        "schema_version": schema.SCHEMA_VERSION,
        "provenance": header.provenance(),
        "digest": header.spec.digest,
        "content_id": schema.content_id(header.spec.digest, facts),
        "run_id": header.run_id,
        "created": header.created,
    }
    for name, spec in {"embeddings": header.spec, **{f"layers/{n}": spec for n, spec in header.layers.items()}}.items():
        # Copies for people who look at the file with other programs.
        attributes[name] = {"sha256": hashes[name], "backbone": spec.backbone, "pooling": spec.pool}
    return attributes
