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
from embedkit.store.exporting import Progress
from embedkit.store.format import MAX_ID_BYTES
from embedkit.store.reader import Store
from embedkit.store.sources import Source, Texts, open_source, reading
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
    """Make a store from embeddings in another format.

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
    >>> _ = pathlib.Path(f"{folder.name}/names.txt").write_text("/data/cat.jpg\\n/data/dog.jpg\\n")
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
        _check_columns(found, ids)
        step = _Steps(len(ids), progress)
        if found.provenance is None:
            spec, information = _declared(found, ids, name, step)
        elif name is not None:
            raise StoreFormatError(f"{path} says itself what made it; leave out the name {name!r}")
        else:
            spec, information = _restored(found)
        if root is not None:
            information["root"] = root
        with reading(path):
            Header(spec, "", "", information=information).provenance()
        with StoreWriter(target, spec, information=information, overwrite=overwrite) as writer:
            for start, block in _finite(found, ids):
                stop = start + len(block)
                writer.append(
                    block,
                    ids[start:stop],
                    sizes=found.sizes and found.sizes[start:stop],
                    mtimes_ns=found.mtimes_ns and found.mtimes_ns[start:stop],
                    content_sha256=found.content_sha256 and found.content_sha256[start:stop],
                    labels=found.labels and found.labels[start:stop],
                )
                step(len(block))
            writer.finalise()
    return Store.open(target)
