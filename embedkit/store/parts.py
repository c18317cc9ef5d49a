"""Part files: some rows of an unfinished store, written once, named by their own hash."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.store import durable
from embedkit.store import format as schema
from embedkit.store.hdf5 import LayoutError, read_layout
from embedkit.store.matrix import Matrix, ReadOnlyFile
from embedkit.store.tables import Failures, Images

PART_FORMAT = "embedkit-part"
_NAME = re.compile(r"part-(\d{6,})\.([0-9a-f]{16})\.h5")
_HASH_DIGITS = 16
_READ_BYTES = 1 << 22

log = logging.getLogger("embedkit")


@dataclass(frozen=True)
class Rows:
    """Some images, embedded or failed; `matrices` has the embeddings under the empty name, and the layers."""

    images: Images
    failures: Failures
    matrices: Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Part:
    """A part file that was found whole."""

    path: Path
    sequence: int
    images: Images
    failures: Failures
    matrices: Mapping[str, Matrix]


@dataclass(frozen=True)
class PartWriter:
    """Writes the parts of one run; another process may hold one, while this one holds the lock.

    Attributes
    ----------
    folder : Path
    digest : str
        Of the specs of the run.
    run_id : str
    """

    folder: Path
    digest: str
    run_id: str

    def __call__(self, number: int, rows: Rows) -> None:
        """Write one part durably."""
        write_part(self.folder, number, self.digest, self.run_id, rows)

    def sweep(self) -> None:
        """Remove what writers left in the making that were killed. Nobody may be writing."""
        for leftover in self.folder.glob(f"{durable.ASIDE}*"):
            leftover.unlink(missing_ok=True)


def write_part(folder: Path, sequence: int, digest: str, run_id: str, rows: Rows) -> Path:
    """Write one part durably: when this returns, its rows survive a power cut.

    A part is written once: where another writer was faster, its file stands and ours is dropped.
    """
    data = _encode(sequence, digest, run_id, rows)
    name = f"part-{sequence:06}.{hashlib.sha256(data).hexdigest()[:_HASH_DIGITS]}.h5"
    with durable.aside(folder) as path:
        durable.write_durably(path, data)
        durable.publish_new(path, folder / name)
    return folder / name


def _encode(sequence: int, digest: str, run_id: str, rows: Rows) -> memoryview:
    """Return a part file's bytes: the same datasets as in a store, without checksums, for its name is one."""
    datasets: dict[str, npt.NDArray[Any]] = {
        f"layers/{name}" if name else "embeddings": np.ascontiguousarray(matrix, dtype="<f4")
        for name, matrix in rows.matrices.items()
    }
    datasets |= vars(rows.images) | rows.failures.datasets()
    pieces = schema.lay_out(
        {name: (data.shape, data.dtype) for name, data in datasets.items()},
        {
            "": {
                "format": PART_FORMAT, "schema_version": schema.SCHEMA_VERSION, "digest": digest, "run_id": run_id,
                "sequence": sequence,
            }
        },
    )  # fmt: skip
    file = np.zeros(pieces.size, dtype=np.uint8)
    for name, data in datasets.items():
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        file[pieces.offsets[name] : pieces.offsets[name] + len(flat)] = flat
    for offset, block in pieces.metadata:
        file[offset : offset + len(block)] = np.frombuffer(block, dtype=np.uint8)
    return file.data


def part_number(name: str) -> int | None:
    """Return the number of the part that a file of that name is; None when it is none."""
    named = _NAME.fullmatch(name)
    return None if named is None else int(named[1])


def read_parts(folder: Path, digest: str, known: Mapping[str, Part] | None = None) -> dict[str, Part]:
    """Return the whole parts in a folder by file name, in the order of their numbers.

    A part whose bytes do not match its name is renamed ``.bad`` and warned about; its rows are computed again.
    Those in `known` were whole when they were last looked at, and are not read again.
    """
    names = sorted((name for name in os.listdir(folder) if _NAME.fullmatch(name)), key=lambda name: (len(name), name))
    new = [name for name in names if name not in (known or {})]
    parts = dict(known or {})
    with ThreadPoolExecutor(2, thread_name_prefix="embedkit-parts") as pool:
        found = pool.map(lambda name: _read_part(folder / name, digest), new)
        for name, part in zip(new, found, strict=True):
            if isinstance(part, Part):
                parts[name] = part
            else:
                log.warning("%s is set aside, its rows are computed again: %s", folder / name, part)
                os.replace(folder / name, folder / f"{name}.bad")
    return {name: parts[name] for name in names if name in parts}


def _read_part(path: Path, digest: str) -> Part | str:
    """Return a part, or what is wrong with it."""
    named = _NAME.fullmatch(path.name)
    assert named is not None
    file = ReadOnlyFile(path, keep=False)
    sha256, size = hashlib.sha256(), file.size
    for start in range(0, size, _READ_BYTES):
        sha256.update(file.read(start, _READ_BYTES))
    if sha256.hexdigest()[:_HASH_DIGITS] != named[2]:
        return "its bytes do not match its name"
    try:
        layout = read_layout(file.read, size)
        attributes, datasets = layout.attributes, layout.datasets
        expected = {"format": PART_FORMAT, "schema_version": schema.SCHEMA_VERSION, "digest": digest}
        for name, value in expected.items():
            if attributes.get(name) != value:
                return f"its {name} is {attributes.get(name)!r}, expected {value!r}"

        def column(name: str) -> npt.NDArray[Any]:
            return file.array(datasets[name].offset, datasets[name].shape, datasets[name].dtype)

        images = Images(*(column(name) for name in ("ids", "sizes", "mtimes_ns", "content_sha256")))
        failures = Failures.read(column, datasets)
        if len(failures.kinds) != len(failures) or not all(map(schema.is_kind, set(failures.kinds.tolist()))):
            return "its /failures/kinds are not one short word for each failure"
        matrices = {}
        for name, found in datasets.items():
            if name == "embeddings" or name.startswith("layers/"):
                if found.shape[:1] != (len(images),):
                    return f"/{name} has shape {found.shape} for {len(images)} rows"
                shape = (found.shape[0], found.shape[1])
                layer = "" if name == "embeddings" else name.removeprefix("layers/")
                matrices[layer] = Matrix(file, found.offset, shape, found.dtype, passing=True)
        return Part(path, int(named[1]), images, failures, matrices)
    except (LayoutError, KeyError, IndexError) as error:
        return f"it is not a part file: {error}"
