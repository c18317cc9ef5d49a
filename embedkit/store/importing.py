"""From the files of other programs to a store."""

from __future__ import annotations

import hashlib
import logging
import ntpath
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import StoreExistsError, StoreFormatError
from embedkit.spec import EmbeddingSpec
from embedkit.store.assembling import Header
from embedkit.store.exporting import Progress, silent
from embedkit.store.format import MAX_ID_BYTES
from embedkit.store.reader import Store
from embedkit.store.sources import Source, open_source
from embedkit.store.vectors import reading
from embedkit.store.writer import StoreWriter, refuse_existing

log = logging.getLogger("embedkit")

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def import_embeddings(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    names: str | os.PathLike[str] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Store:
    r"""Make a store from embeddings in another format.

    What `export` wrote as ``.npy``, ``.parquet`` or ``.safetensors`` becomes the store that it was: same spec, labels
    and hashes, and the same ``content_id`` where there were no layers. Anything else is of unknown provenance and says
    so: its spec has the backbone "imported", and it may be compared with embeddings imported under the same `name`.

    Rows are streamed and converted to float32, and nothing is ever unpickled.

    Parameters
    ----------
    source : path-like
        A ``.npy``, ``.npz``, ``.parquet`` or ``.safetensors`` file, or a folder that thingsvision or clip-retrieval
        wrote.
    output : path-like
        The store to make.
    names : path-like, optional
        What the rows are called, where `source` does not say so: a ``.txt`` with one id a line, a ``.json`` list, or a
        ``.csv``, ``.tsv`` or ``.parquet`` with a column id, path, image_path, file_name or filename, and maybe label.
    name : str, optional
        What made the embeddings, in your words: two imports with the same name and width may be compared. Without it
        an import compares with nothing but itself.
    overwrite : bool, default False
        Whether a store that exists at `output` may be replaced.
    progress : callable, optional
        Called with the number of rows done and of all rows; rows that have to be read twice count twice.

    Returns
    -------
    Store
        The new store, opened. Absolute ids have become relative to the folder they have in common, its ``root``.

    Raises
    ------
    StoreNotFoundError
        When `source` or `names` does not exist.
    StoreExistsError
        When `output` exists and `overwrite` is false.
    StoreFormatError
        When `source` or `names` cannot be read or do not fit, or a row has numbers or an id that no store may have.
    MissingExtraError
        When a Parquet file is to be read and pyarrow is not installed.

    Examples
    --------
    >>> import numpy as np, pathlib, tempfile
    >>> from embedkit.store.importing import import_embeddings
    >>> folder = tempfile.TemporaryDirectory()
    >>> np.save(f"{folder.name}/features.npy", np.eye(2))
    >>> _ = pathlib.Path(f"{folder.name}/names.txt").write_text("/data/cat.jpg\n/data/dog.jpg\n")
    >>> store = import_embeddings(
    ...     f"{folder.name}/features.npy", f"{folder.name}/pets.h5", names=f"{folder.name}/names.txt", name="my-model"
    ... )
    >>> store.ids, store.root.as_posix(), store.spec.backbone, store.spec.tag
    (['cat.jpg', 'dog.jpg'], '/data', 'imported', 'my-model')
    >>> folder.cleanup()
    """
    path, target = Path(source), Path(os.path.realpath(output))
    refuse_existing(target, overwrite)
    if path.is_file() and target.exists() and path.samefile(target):
        raise StoreExistsError(f"{path} cannot become the store in its own place; choose another name")
    with ExitStack() as stack:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = open_source(path, None if names is None else Path(names), target.parent, stack)
        ids, root = _checked_ids(found)
        _check_columns(found)
        unnamed = found.provenance is None and not name
        report, total = progress or silent, len(ids) * (2 if unnamed else 1)
        if found.provenance is not None:
            spec, information = _restored(found, name)
        else:
            tag = name or f"unnamed-{_digest(found, ids, report, total)[:16]}"
            spec, information = _declared(found, tag)
        if root is not None:
            information["root"] = root
        with reading(path):
            Header(spec, "", "", information=information).provenance()  # Too long? Better known before the copy.
        with StoreWriter(target, spec, information=information, overwrite=overwrite) as writer:
            for start, block in _finite(found, ids, report, total - len(ids), total):
                stop = start + len(block)
                writer.append(
                    block,
                    ids[start:stop],
                    sizes=found.sizes and found.sizes[start:stop],
                    mtimes_ns=found.mtimes_ns and found.mtimes_ns[start:stop],
                    content_sha256=found.content_sha256 and found.content_sha256[start:stop],
                    labels=found.labels and found.labels[start:stop],
                )
            writer.finalise()
    return Store.open(target)


def _restored(source: Source, name: str | None) -> tuple[EmbeddingSpec, dict[str, Any]]:
    """Return spec and information as they were in the store that was exported."""
    if name:
        raise StoreFormatError(f"{source.path} says itself what made it; leave out the name {name!r}")
    with reading(source.path):
        try:
            spec = EmbeddingSpec.from_dict(source.provenance["identity"])
        except StoreFormatError as error:
            raise StoreFormatError(f"{source.path}: {error}") from error
        if spec.dim != source.vectors.dim:
            raise ValueError(f"its spec says width {spec.dim}, its rows have width {source.vectors.dim}")
        information = dict(source.provenance.get("information", {}))
        layers = sorted(source.provenance.get("layers", {}))
    if layers:
        log.warning("%s has layers, which are not imported: %s", source.path, ", ".join(layers))
    return spec, information


def _declared(source: Source, tag: str) -> tuple[EmbeddingSpec, dict[str, Any]]:
    """Return spec and information of embeddings that nothing is known of."""
    spec = EmbeddingSpec(backbone="imported", tag=tag, weights_sha256="0" * 64, dim=source.vectors.dim, pool="unknown")
    return spec, {"imported_from": Path(os.path.abspath(source.path)).name, "provenance": "unknown"}


def _digest(source: Source, ids: list[str], progress: Progress, total: int) -> str:
    """Return the SHA-256 of all embeddings as float32, in the order of the source."""
    digest = hashlib.sha256()
    for _, rows in _finite(source, ids, progress, 0, total):
        digest.update(rows.data)
    return digest.hexdigest()


def _finite(
    source: Source, ids: list[str], progress: Progress, done: int, total: int
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Yield the number of the first row and the rows of every block as float32, each of them finite."""
    start = 0
    for block in source.vectors.blocks():
        with np.errstate(all="ignore"):  # What is too large for float32 becomes infinite, and that is found below.
            rows = np.ascontiguousarray(block, dtype="<f4")
        wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(wrong):
            row = start + int(wrong[0])
            raise StoreFormatError(
                f"{source.path}: row {row} ({ids[row]!r}) has numbers that are not finite in float32"
            )
        yield start, rows
        start += len(rows)
        progress(done + start, total)
    if start != len(ids):
        raise StoreFormatError(f"{source.path} was to have {len(ids)} rows, and {start} could be read")


def _checked_ids(source: Source) -> tuple[list[str], str | None]:
    """Return ids that a store may have, and the folder that they were absolute in."""
    if len(source.ids) != source.vectors.count:
        raise StoreFormatError(f"{source.path} has {source.vectors.count} rows, and {len(source.ids)} names for them")
    ids = [_checked(source, row, id) for row, id in enumerate(source.ids)]
    # The ids of a store are relative as they are, even below a folder that is called "C:".
    ids, root = (ids, None) if source.provenance is not None else _relative(source, ids)
    first: dict[bytes, int] = {}
    for row, id in enumerate(ids):
        before = first.setdefault(os.fsencode(id), row)
        if before != row:
            raise StoreFormatError(f"{source.path}: row {row} has the id {id!r} that row {before} has; ids are unique")
    return ids, root


def _checked(source: Source, row: int, id: str | None) -> str:
    where = f"{source.path}: row {row}"
    if not id:
        raise StoreFormatError(f"{where} has no id")
    _check_text(where, id)
    # Whoever joins the id and a folder must stay in that folder; absolute ids of others become relative to theirs.
    if ".." in re.split(r"[/\\]", id) or (source.provenance is not None and id.startswith("/")):
        raise StoreFormatError(f"{where} has the id {id!r}, which leads out of its folder")
    return id


def _check_text(where: str, text: str) -> None:
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise StoreFormatError(f"{where} has {text!r}, which is no text") from None
    if b"\0" in encoded or len(encoded) > MAX_ID_BYTES:
        raise StoreFormatError(f"{where} has a NUL character or more than {MAX_ID_BYTES} bytes: {text[:50]!r}")


def _relative(source: Source, ids: list[str]) -> tuple[list[str], str | None]:
    """Return absolute ids as relative to the folder that they have in common, and that folder."""
    windows = [bool(_WINDOWS.match(id)) for id in ids]
    absolute = [on_windows or id.startswith("/") for id, on_windows in zip(ids, windows, strict=True)]
    if not any(absolute):
        return ids, None
    if not all(absolute) or len(set(windows)) > 1:
        row = (absolute if not all(absolute) else windows).index(False)
        raise StoreFormatError(
            f"{source.path}: some ids are absolute and others are not, such as row {row} {ids[row]!r}"
        )
    if not windows[0]:
        root = posixpath.commonpath([posixpath.dirname(id) for id in ids])
        return [posixpath.relpath(id, root) for id in ids], root
    try:
        root = ntpath.commonpath([ntpath.dirname(id) for id in ids])
    except ValueError as error:
        raise StoreFormatError(f"{source.path}: its ids have no folder in common: {error}") from error
    return [ntpath.relpath(id, root).replace("\\", "/") for id in ids], root


def _check_columns(source: Source) -> None:
    """Make sure that whatever else the rows have fits into a store."""
    count = source.vectors.count
    columns: tuple[list[Any] | None, ...] = (source.labels, source.sizes, source.mtimes_ns, source.content_sha256)
    if any(column is not None and len(column) != count for column in columns):
        raise StoreFormatError(f"{source.path}: its columns do not all have {count} rows")
    for row, label in enumerate(source.labels or ()):
        if label is not None:
            _check_text(f"{source.path}: the label of row {row}", label)
    if not all(0 <= size < 2**64 for size in source.sizes or ()):
        raise StoreFormatError(f"{source.path} has a size that no file has")
    if not all(-(2**63) <= time < 2**63 for time in source.mtimes_ns or ()):
        raise StoreFormatError(f"{source.path} has a time that no file has")
    if not all(isinstance(digest, bytes) and len(digest) == 32 for digest in source.content_sha256 or ()):
        raise StoreFormatError(f"{source.path} has a content_sha256 that is not 32 bytes")
