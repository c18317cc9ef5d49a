"""From a store to the files of other programs."""

from __future__ import annotations

import csv
import importlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from embedkit.errors import MissingExtraError, StoreExistsError, StoreFormatError
from embedkit.spec import canonical_json
from embedkit.store import durable
from embedkit.store.matrix import Matrix
from embedkit.store.reader import Store

log = logging.getLogger("embedkit")

Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Take the progress and say nothing."""


def ranges(count: int, row_bytes: int, rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the row behind the last of blocks of at most `rows` rows and about `most` bytes."""
    rows = min(rows, max(1, most // row_bytes))
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


NPY_FORMAT = "embedkit-npy"
_BLOCK_BYTES = 8 << 20
# Parquet's readers take a row group at a time.
_GROUP_BYTES = 64 << 20
_GROUP_ROWS = 65536


def export(
    store: Store, output: str | os.PathLike[str], *, overwrite: bool = False, progress: Progress | None = None
) -> list[Path]:
    """Write a store's rows to a file of another format, chosen by the suffix of its name.

    ================ ===================================================================================
    ``.parquet``     ids, labels, sizes, times, hashes, embeddings and layers as columns; provenance
    ``.lance``       the same columns as a Lance dataset, which is a folder
    ``.safetensors`` the same as tensors; provenance
    ``.npy``         embeddings, with everything but layers in a JSON file of the same name beside it
    ``.csv``         ids, labels and embeddings; no provenance, and numbers as text
    ================ ===================================================================================

    Rows are streamed, and nothing has the output's name before it is complete. Images that failed are not exported. A
    store opened with a layer is exported with that layer's embeddings alone. Of an output that is a symbolic link, the
    file that it leads to is written.

    Parameters
    ----------
    store : Store
    output : path-like
        The file to write.
    overwrite : bool, default False
        Whether files that exist may be replaced.
    progress : callable, optional
        Called with the number of rows written and of all rows.

    Returns
    -------
    list of Path
        What was written, links followed: one file, or for ``.npy`` two.

    Raises
    ------
    StoreExistsError
        When an output exists and `overwrite` is false, or when it is not an earlier export.
    StoreFormatError
        When the suffix is none of these, or when the format cannot hold an id or a class name that is not UTF-8.
    MissingExtraError
        When pyarrow or Lance is not installed.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.store import StoreWriter
    >>> from embedkit.store.exporting import export
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/pets.h5", spec) as writer:
    ...     writer.append(np.eye(2), ["cat/1.jpg", "dog/1.jpg"])
    ...     writer.finalise()
    >>> [path.name for path in export(Store.open(f"{folder.name}/pets.h5"), f"{folder.name}/pets.npy")]
    ['pets.npy', 'pets.json']
    >>> np.load(f"{folder.name}/pets.npy").tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    >>> folder.cleanup()
    """
    target = Path(os.path.realpath(output) if os.path.islink(output) else output)
    try:
        write = _WRITERS[target.suffix.lower()]
    except KeyError:
        raise StoreFormatError(f"{target}: a store can be exported to {', '.join(_WRITERS)}") from None
    targets = [target, target.with_suffix(".json")] if write is _write_npy else [target]
    for path in targets:
        _refuse(store, path, overwrite)
    if store.layer is None and store.layers and write in (_write_npy, _write_csv):
        log.warning(
            "%s does not hold the layers of %s; open the store with each layer and export that: %s",
            target, store.path, ", ".join(store.layers),
        )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    write(store, target, progress or silent)
    return targets


def optional(module: str, package: str, extra: str) -> Any:
    """Import a module that not everybody has installed, or say how to install it."""
    try:
        importlib.import_module(module.partition(".")[0])
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, extra) from error


def _refuse(store: Store, path: Path, overwrite: bool) -> None:
    """Raise StoreExistsError when `path` is taken by something that must not be replaced."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise StoreExistsError(f"{path} exists already; choose another name or pass --overwrite (overwrite=True)")
    if path.exists() and path.samefile(store.path):
        raise StoreExistsError(f"{path} is the store itself; choose another name")
    if path.suffix.lower() == ".lance":
        if not (path / "_versions").is_dir():
            raise StoreExistsError(f"{path} exists and is not a Lance dataset; choose another name")
    elif path.is_dir():
        raise StoreExistsError(f"{path} is a folder; choose another name")
    elif path.suffix == ".json" and NPY_FORMAT.encode() not in _beginning(path):
        raise StoreExistsError(f"{path} exists and does not come from an export; choose another name")


def _beginning(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except FileNotFoundError:  # A link to nowhere.
        return NPY_FORMAT.encode()


def _matrices(store: Store) -> dict[str, Matrix]:
    """Return where the embeddings to export lie, under the empty name, and the layers."""
    found = store.matrices
    return found if store.layer is None else {"": found[store.layer]}


def _provenance(store: Store) -> dict[str, Any]:
    if store.layer is None:
        return store.provenance
    recipe = {"recipe": store.recipe} if store.recipe else {}
    return {"identity": store.spec.to_dict(), "information": {**store.information, **recipe}}


def _labels(store: Store, start: int, stop: int) -> list[str | None]:
    if store.labels is None:
        return [None] * (stop - start)
    return [store.classes[code] if code >= 0 else None for code in store.labels[start:stop].tolist()]


def _stream(matrices: Sequence[Matrix], dtype: npt.DTypeLike, progress: Progress) -> Iterator[npt.NDArray[Any]]:
    """Yield all rows of one matrix after the other."""
    done, total = 0, sum(map(len, matrices))
    for matrix in matrices:
        for start, stop in ranges(len(matrix), matrix.row_bytes, _GROUP_ROWS, _BLOCK_BYTES):
            yield np.ascontiguousarray(matrix.read(start, stop), dtype=dtype)
            done += stop - start
            progress(done, total)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file to write, and wait on the way out until the disk has it."""
    with os.fdopen(durable.create(path), "wb") as file:
        yield file
        file.flush()
        durable.sync(file.fileno())


@contextmanager
def _published(target: Path) -> Iterator[BinaryIO]:
    """Open a new file to write that gets its name when it is complete."""
    with durable.aside(target.parent) as path:
        with _new_file(path) as file:
            yield file
        durable.publish_over(path, target)


def _write_npy(store: Store, target: Path, progress: Progress) -> None:
    matrix, notes = _matrices(store)[""], target.with_suffix(".json")
    with durable.aside(target.parent) as rows_path, durable.aside(target.parent) as notes_path:
        with _new_file(rows_path) as file:
            header = {"descr": matrix.dtype.str, "fortran_order": False, "shape": matrix.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in _stream([matrix], matrix.dtype, progress):
                file.write(block.data)
        with _new_file(notes_path) as file:
            _write_notes(file, store)
        # Whatever interrupts the next lines, rows never meet the notes of other rows.
        notes.unlink(missing_ok=True)
        durable.publish_over(rows_path, target)
        durable.publish_over(notes_path, notes)


def _write_notes(file: BinaryIO, store: Store) -> None:
    images = store.images
    file.write(f'{{"format": "{NPY_FORMAT}",\n"provenance": {canonical_json(_provenance(store))}'.encode())
    columns: dict[str, Any] = {
        "classes": store.classes, "ids": store.ids, "labels": store.labels, "content_sha256": images.content_sha256,
        "sizes": images.sizes, "mtimes_ns": images.mtimes_ns,
    }  # fmt: skip
    for name, column in columns.items():
        file.write(f',\n"{name}": '.encode())
        if column is None:
            file.write(b"null")
            continue
        # A piece at a time: the text of a long column takes several times the memory of the column.
        for start in range(0, max(1, len(column)), _GROUP_ROWS):
            piece = column[start : start + _GROUP_ROWS]
            if name == "content_sha256":
                piece = [row.tobytes().hex() for row in piece]
            text = json.dumps(piece.tolist() if isinstance(piece, np.ndarray) else piece)
            file.write((("[" if start == 0 else ", ") + text[1:-1]).encode())
        file.write(b"]")
    file.write(b"}\n")


def _write_safetensors(store: Store, target: Path, progress: Progress) -> None:
    matrices, images = _matrices(store), store.images
    # The widest numbers first, so that each tensor lies where its numbers may be mapped.
    columns: dict[str, npt.NDArray[Any]] = {
        "sizes": images.sizes.astype("<u8"), "mtimes_ns": images.mtimes_ns.astype("<i8"),
    }  # fmt: skip
    behind: dict[str, npt.NDArray[Any]] = {
        "content_sha256": images.content_sha256,
        "ids": np.ascontiguousarray(images.ids).view(np.uint8).reshape(len(images), images.ids.dtype.itemsize),
    }
    metadata = {"embedkit": canonical_json(_provenance(store))}
    if store.labels is not None:
        behind = {"labels": store.labels.astype("<i4"), **behind}
        metadata["classes"] = json.dumps(store.classes)
    facts = {name: (column.dtype, column.shape) for name, column in columns.items()}
    for name, matrix in matrices.items():
        facts[f"layers/{name}" if name else "embeddings"] = (np.dtype("<f4"), matrix.shape)
    facts |= {name: (column.dtype, column.shape) for name, column in behind.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in facts.items():
        start, end = end, end + dtype.itemsize * int(np.prod(shape, dtype=object))
        kind = {"f": "F", "i": "I", "u": "U"}[dtype.kind]
        header[name] = {
            "dtype": f"{kind}{8 * dtype.itemsize}", "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _published(target) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns.values():
            file.write(column.data)
        for block in _stream(list(matrices.values()), "<f4", progress):
            file.write(block.data)
        for column in behind.values():
            file.write(np.ascontiguousarray(column).data)


def _write_csv(store: Store, target: Path, progress: Progress) -> None:
    matrix = _matrices(store)[""]
    with _published(target) as file:
        # Ids are written as they are, bytes that are not UTF-8 and signs that a spreadsheet takes for a formula too.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        try:
            writer = csv.writer(text)
            writer.writerow(["id", "label", *(f"e{column}" for column in range(matrix.shape[1]))])
            for start, stop in ranges(len(matrix), matrix.row_bytes, _GROUP_ROWS, _BLOCK_BYTES):
                labels = _labels(store, start, stop)
                block = matrix.read(start, stop).astype(np.float32)
                for id, label, row in zip(store.ids[start:stop], labels, block, strict=True):
                    # As text of the type itself: the shortest that reads back as the same float32.
                    writer.writerow([id, label or "", *row.astype("U32").tolist()])
                progress(stop, len(matrix))
        finally:
            text.detach()


def _write_parquet(store: Store, target: Path, progress: Progress) -> None:
    pyarrow, parquet = (optional(name, "pyarrow", "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    columns = arrow_schema(pyarrow, store, target.suffix)
    # A dictionary pays for labels only, and on ids and embeddings it costs memory.
    dictionary = ["label"] if store.labels is not None else False
    with (
        _published(target) as file,
        parquet.ParquetWriter(file, columns, use_dictionary=dictionary, write_page_checksum=True) as writer,
    ):
        for batch in arrow_batches(pyarrow, store, columns, _GROUP_BYTES, progress):
            writer.write_table(pyarrow.Table.from_batches([batch]), row_group_size=_GROUP_ROWS)


def _write_lance(store: Store, target: Path, progress: Progress) -> None:
    lance = optional("lance", "pylance", "lance")
    pyarrow = optional("pyarrow", "pyarrow", "lance")
    columns = arrow_schema(pyarrow, store, target.suffix)
    made, old = (target.parent / durable.aside_name() for _ in range(2))
    try:
        batches = arrow_batches(pyarrow, store, columns, _BLOCK_BYTES, progress)
        lance.write_dataset(pyarrow.RecordBatchReader.from_batches(columns, batches), os.fspath(made))
        for folder, _, names in os.walk(made):
            for name in names:
                handle = os.open(os.path.join(folder, name), os.O_RDWR)
                try:
                    durable.sync(handle)
                finally:
                    os.close(handle)
            durable.sync_folder(Path(folder))
        if target.exists():
            os.replace(target, old)  # No rename puts one folder in the place of another that has files.
        try:
            durable.publish_over(made, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    finally:
        for leftover in (made, old):
            shutil.rmtree(leftover, ignore_errors=True)


def arrow_schema(pyarrow: Any, store: Store, holder: str) -> Any:
    """Return the Arrow schema of a store; Arrow's text is UTF-8, so this is where other ids are refused."""
    for kind, texts in (("id", store.ids), ("class", store.classes)):
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise StoreFormatError(
                    f"the {kind} {text!r} of {store.path} is not UTF-8, and {holder} holds nothing else; export to "
                    ".npy or .safetensors"
                ) from None
    fields = [("id", pyarrow.string()), *([("label", pyarrow.string())] if store.labels is not None else [])]
    fields += [("size", pyarrow.uint64()), ("mtime_ns", pyarrow.int64()), ("content_sha256", pyarrow.binary(32))]
    for name, matrix in _matrices(store).items():
        fields.append((f"layer:{name}" if name else "embedding", pyarrow.list_(pyarrow.float32(), matrix.shape[1])))
    return pyarrow.schema(fields, metadata={b"embedkit": canonical_json(_provenance(store)).encode()})


def arrow_batches(pyarrow: Any, store: Store, columns: Any, most: int, progress: Progress) -> Iterator[Any]:
    """Yield a store's rows as Arrow record batches of about `most` bytes."""
    matrices, images = _matrices(store), store.images
    row_bytes = 4 * sum(matrix.shape[1] for matrix in matrices.values()) + 256
    for start, stop in ranges(len(store), row_bytes, _GROUP_ROWS, most):
        hashes = pyarrow.py_buffer(np.ascontiguousarray(images.content_sha256[start:stop]).tobytes())
        arrays = [
            pyarrow.array(store.ids[start:stop], pyarrow.string()),
            *([pyarrow.array(_labels(store, start, stop), pyarrow.string())] if store.labels is not None else []),
            pyarrow.array(images.sizes[start:stop]),
            pyarrow.array(images.mtimes_ns[start:stop]),
            pyarrow.FixedSizeBinaryArray.from_buffers(pyarrow.binary(32), stop - start, [None, hashes]),
        ]
        for matrix in matrices.values():
            block = np.ascontiguousarray(matrix.read(start, stop), dtype=np.float32)
            arrays.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block.reshape(-1)), matrix.shape[1]))
        yield pyarrow.record_batch(arrays, schema=columns)
        progress(stop, len(store))


_WRITERS: dict[str, Callable[[Store, Path, Progress], None]] = {
    ".parquet": _write_parquet,
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
    ".csv": _write_csv,
    ".lance": _write_lance,
}
