"""Images in datasets of Hugging Face's: saved in a folder, or on the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError, MissingExtraError
from embedkit.images import MAX_BYTES, read_bytes
from embedkit.sources.datasets.arrow_columns import ImageColumn, find_image_column, find_label_column, read_labels
from embedkit.sources.entries import GONE, Entries, Listing, by_bytes, classes_of, inside, require_inside, status_of
from embedkit.sources.failing import find_flaw, is_encodable, quoted
from embedkit.sources.folders import find_files

_MAX_JSON_BYTES = 64 << 20
_HUB_SECONDS = 5.0
_DIGITS = 8
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}\.parquet")


class DatasetImage(NamedTuple):
    """An image in a row of a dataset."""

    id: str
    label: str | None
    size: int
    row: int
    split: _Split

    def status(self) -> tuple[int, int]:
        """Return the size of the image, and a number that stands for the version of the dataset."""
        path = None if self.size else self.split.path(self.row)
        return (self.size, self.split.stamp) if path is None else self.split.outside_status(path)

    def read(self) -> bytes:
        """Return the bytes of the image, as they were stored."""
        return self.split.read(self.row, self.id)

    def __repr__(self) -> str:
        return f"DatasetImage(id={self.id!r}, label={self.label!r})"


@dataclass(frozen=True, eq=False, repr=False)
class _Split:
    """What is read of one split.

    `homes` are the folders that the dataset may name files in, and the first is where relative names begin.
    """

    column: ImageColumn
    stamp: int
    homes: Sequence[str]

    def path(self, row: int) -> str | None:
        return self.column.path(row)

    def outside_status(self, path: str) -> tuple[int, int]:
        """Return the status of a file that a row names."""
        try:
            return status_of(self._file(path, ""))
        except ImageError:
            return GONE

    def read(self, row: int, id: str) -> bytes:
        """Return the bytes of a row's image."""
        data = self.column.data(row)
        if data is None:
            return read_bytes(self._file(self.path(row) or "", id), id)
        return data

    def _file(self, path: str, id: str) -> str:
        """Return the file that a row names, or refuse it: a stranger's dataset may name any file of this machine."""
        if "\0" in path:  # Which the system would not even look for.
            raise ImageError(id, f"the row holds no image but {quoted(path)}, which no file is called", "refused")
        real = os.path.realpath(os.path.join(self.homes[0], path))
        homes = tuple(os.path.join(os.path.realpath(home), "") for home in self.homes)
        if not real.startswith(homes):
            reason = f"the row holds no image but names a file outside of the dataset, {quoted(path)}"
            raise ImageError(id, reason, "refused")
        return real


@dataclass(frozen=True, eq=False, repr=False)
class _DatasetImages(Entries):
    """Images of the splits of a dataset."""

    splits: Sequence[_Split]
    classes: Sequence[str]
    ids: Sequence[str]
    numbers: npt.NDArray[np.int64]  # (n, 4): split, row, size, class or -1.

    def __len__(self) -> int:
        return len(self.ids)

    def entry(self, number: int) -> DatasetImage:
        split, row, size, code = self.numbers[number].tolist()
        return DatasetImage(self.ids[number], None if code < 0 else self.classes[code], size, row, self.splits[split])


def list_dataset(
    name_or_folder: str | os.PathLike[str],
    *,
    split: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Listing:
    """List the images of a Hugging Face dataset without decoding any.

    The bytes are read as they were stored, and no code of the dataset is ever run.

    An id is the split, where the dataset has splits, and the name of the file that was stored, where every row of the
    split has one of its own; otherwise the row's number, ``train/00000012``. So ids do not depend on the splits that
    are chosen, and rows that are added at the end change no number; but a first file name that occurs twice turns all
    names of its split into numbers.

    Parameters
    ----------
    name_or_folder : str or path-like
        A folder that ``save_to_disk`` wrote, a folder of parquet files, or a name on the hub such as
        ``org/name``, which is downloaded into Hugging Face's cache. Parquet files are copied there too, as arrow.
    split : str, optional
        The only split to list; by default all of them.
    config : str, optional
        The configuration of a dataset on the hub; of a folder of parquet files the folder below it.
    image_column, label_column : str, optional
        By default the only columns of images and of classes.
    max_bytes : int
        The largest image that is read.

    Returns
    -------
    Listing
        Sorted by the bytes of the ids. An image's status is its size and a number that stands for the dataset's
        fingerprint: when anything in a split changes, all of its images count as changed.

    Raises
    ------
    ImageError
        When it cannot be opened, has no such split or column, or no image.
    MissingExtraError
        When datasets is not installed.
    """
    if os.path.isdir(name_or_folder):
        root: Path | str = Path(name_or_folder)
        found, homes = _open_folder(Path(name_or_folder), config), [os.fspath(name_or_folder)]
    else:
        name = os.fspath(name_or_folder)
        root = f"dataset:{name}" + (f":{config}" if config else "")
        found, homes = _open_hub(name, config)
    if split is not None and split not in found:
        names = ", ".join(sorted(filter(None, found))) or "it has none"
        raise ImageError(os.fspath(root), f"no split {split!r}; its splits: {names}", "missing")
    chosen = {key: found[key] for key in sorted(found) if split in (None, key)}
    failures: list[ImageError] = []
    images = _images(os.fspath(root), chosen, homes, (image_column, label_column), max_bytes, failures)
    if not images and not failures:
        raise ImageError(os.fspath(root), "it has no rows", "missing")
    return Listing(root, images, list(images.classes), sorted(failures, key=by_bytes), 0)


def is_dataset_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder was written by ``save_to_disk``.

    Examples
    --------
    >>> from embedkit.sources.datasets.listing import is_dataset_folder
    >>> is_dataset_folder(".")
    False
    """
    have = {name: os.path.isfile(os.path.join(path, name)) for name in _FILES}
    return have["dataset_dict.json"] or (have["state.json"] and have["dataset_info.json"])


_FILES = ("dataset_dict.json", "state.json", "dataset_info.json")


def parse_dataset(source: str) -> tuple[str, str | None]:
    """Split what the command line calls a dataset into its name or folder, and its configuration.

    Examples
    --------
    >>> from embedkit.sources.datasets.listing import parse_dataset
    >>> parse_dataset("dataset:org/flowers"), parse_dataset("dataset:org/flowers:small")
    (('org/flowers', None), ('org/flowers', 'small'))
    """
    name = source.removeprefix("dataset:")
    if os.path.exists(name):
        return name, None
    name, _, config = name.partition(":")
    return name, config or None


def _import_datasets() -> Any:
    """Return the package."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets") from error
    return datasets


def _open_folder(folder: Path, config: str | None) -> dict[str, Any]:
    """Return the splits of a folder; of one without splits, itself under no name."""
    datasets = _import_datasets()
    if not is_dataset_folder(folder):
        return _open_parquet(inside(folder, config) if config else folder)
    if config:
        raise ImageError(os.fspath(folder), "a saved dataset has no configurations", "missing")
    parts = {"": folder}
    if (folder / "dataset_dict.json").is_file():
        names = _json(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_part(name) for name in names):
            raise ImageError(os.fspath(folder / "dataset_dict.json"), "it does not say what its splits are")
        parts = {name: inside(folder, name) for name in names}
    load = datasets.Dataset.load_from_disk
    return {
        name: _opened(os.fspath(part), partial(load, os.fspath(part), keep_in_memory=False))
        for name, part in parts.items()
        if _has_files(part, folder)
    }


def _is_part(name: str) -> bool:
    """Return whether a path may have a part of this name."""
    return "/" not in name and find_flaw(name, "split") is None


def _has_files(part: Path, folder: Path) -> bool:
    """Return whether a saved split has rows; raise when it lacks a file, or names one outside of the dataset."""
    files = _json(part / "state.json").get("_data_files")
    told = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    names = [name for name in told if isinstance(name, str) and is_encodable(name)]
    if not isinstance(files, list) or len(names) < len(files):
        raise ImageError(os.fspath(part / "state.json"), "it does not say where the data are")
    home = os.path.join(os.path.realpath(folder), "")
    for name in (*names, "dataset_info.json"):
        path = inside(part, name)
        if not os.path.realpath(path).startswith(home):
            raise ImageError(os.fspath(path), "a symbolic link out of the dataset", "refused")
        if not path.is_file():
            raise ImageError(os.fspath(path), "a file of the dataset is missing", "missing")
    return bool(files)


def _json(path: Path) -> Mapping[str, Any]:
    """Read a small file that says what a dataset is."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ImageError(os.fspath(path), f"more than {_MAX_JSON_BYTES:,} bytes, the limit", "too-large")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ImageError):
            raise
        kind = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise ImageError(os.fspath(path), "a file of the dataset cannot be read", kind) from error
    if not isinstance(found, dict):
        raise ImageError(os.fspath(path), "it holds something else than a dataset has here")
    return found


def _open_parquet(folder: Path) -> dict[str, Any]:
    """Return the splits of a folder of parquet files, told by names such as ``train-00000-of-00002.parquet``."""
    files: dict[str, list[str]] = {}
    for id in find_files(folder, (".parquet",)).ids if folder.is_dir() else ():
        shard = _SHARD.fullmatch(id.rpartition("/")[2])
        files.setdefault(shard[1] if shard else "train", []).append(os.fspath(folder / id))
    if not files:
        raise ImageError(os.fspath(folder), "neither a saved dataset nor a folder of parquet files", "missing")
    load = _import_datasets().load_dataset
    return dict(_opened(os.fspath(folder), partial(load, "parquet", data_files=files)))


def _open_hub(name: str, config: str | None) -> tuple[dict[str, Any], list[str]]:
    """Return the splits of a dataset on the hub, and the folders of the cache that its files lie in."""
    datasets = _import_datasets()
    if not _NAME.fullmatch(name) or ".." in name:
        raise ImageError(name, "no such folder, and no name of a dataset on the hub", "missing")
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if not HF_HUB_OFFLINE:
        try:  # The package itself tries for half a minute.
            HfApi().dataset_info(name, timeout=_HUB_SECONDS)
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403, 404):
                raise ImageError(
                    name, f"no such folder, and no such dataset on the hub for this user ({status}); "
                    "`hf auth login` opens private ones", "missing",
                ) from None  # fmt: skip
        except Exception as error:
            raise ImageError(
                name, f"no such folder, and the hub cannot be reached ({type(error).__name__}); HF_HUB_OFFLINE=1 uses "
                "what was downloaded before", "unreadable",
            ) from None  # fmt: skip
    found = dict(_opened(name, partial(datasets.load_dataset, name, config)))
    repository = os.path.join(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    return found, [repository, os.fspath(datasets.config.DOWNLOADED_DATASETS_PATH)]


def _opened(name: str, opening: Callable[[], Any]) -> Any:
    """Return what the package opens; whatever it finds wrong is an ImageError."""
    try:
        return opening()
    except Exception as error:  # The package, pyarrow and the hub have errors of many kinds.
        told = " ".join(str(error).split())[:300]
        if type(error) is ConnectionError:
            told = "the hub cannot be reached, and it was not downloaded before; name a folder, or go online once"
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise ImageError(name, f"the dataset cannot be opened: {told or type(error).__name__}", kind) from error


def _images(
    name: str, found: Mapping[str, Any], homes: Sequence[str], columns: tuple[str | None, str | None], max_bytes: int,
    failures: list[ImageError],
) -> _DatasetImages:  # fmt: skip
    """Make the images of some splits; rows without one are failures."""
    splits, ids, labels, tables = [], [], [], []
    for number, (key, dataset) in enumerate(found.items()):
        where = f"{name}: split {key}" if key else name
        column = ImageColumn.of(dataset, find_image_column(dataset, columns[0], where), where)
        splits.append(_Split(column, _stamp(dataset), homes))
        named = _ids(f"{require_inside(key)}/" if key else "", column)
        good = np.ones(len(named), dtype=bool)
        told = read_labels(dataset, find_label_column(dataset, columns[1], where), where)
        for row, reason, kind in (*column.flaws(max_bytes), *_flaws(told)):
            if good[row]:
                failures.append(ImageError(named[row], reason, kind))
            good[row] = False
        rows = np.flatnonzero(good)
        ids += [named[row] for row in rows.tolist()]
        labels += [told[row] for row in rows.tolist()] if told else [None] * len(rows)
        tables.append(np.stack([np.full(len(rows), number), rows, column.sizes[rows]], axis=1))
    classes = classes_of(labels)
    codes = {label: code for code, label in enumerate(classes)}
    order = sorted(range(len(ids)), key=lambda place: os.fsencode(ids[place]))
    coded = np.array([-1 if label is None else codes[label] for label in labels], dtype=np.int64)
    table = np.concatenate([np.concatenate(tables or [np.empty((0, 3))]), coded[:, None]], axis=1).astype(np.int64)[
        order
    ]
    return _DatasetImages(splits, classes, [ids[place] for place in order], table)


def _flaws(labels: Sequence[str | None]) -> Iterator[tuple[int, str, str]]:
    """Yield row, reason and kind of what has a class that a store cannot hold."""
    flaws = {label: find_flaw(label, "class") for label in {*labels} if label is not None}
    if any(flaws.values()):
        for row, label in enumerate(labels):
            if label is not None and (flaw := flaws[label]):
                yield row, flaw, "refused"


def _ids(prefix: str, column: ImageColumn) -> list[str]:
    """Return the ids of rows: the names of files where each has one of its own, otherwise numbers."""
    rows = len(column.absent)
    digits = max(_DIGITS, len(str(rows)))
    ids = []
    for row, (path, absent) in enumerate(zip(column.paths(), column.absent.tolist(), strict=True)):
        name = f"{row:0{digits}d}" if absent else _file_name(path)
        if not name:
            break
        ids.append(prefix + name)
    if len(ids) == rows == len(set(ids)):
        return ids
    return [f"{prefix}{row:0{digits}d}" for row in range(rows)]


def _file_name(path: str | None) -> str:
    """Return a stored path as an id, or nothing where it is none; of an absolute one the last part."""
    if not path or "\\" in path or "://" in path:
        return ""
    path = path.rpartition("/")[2] if path.startswith("/") else path
    if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
        return ""
    return path


def _stamp(dataset: Any) -> int:
    """Return a number that stands for the content of a split: of its fingerprint and the sizes of its files."""
    sizes: Iterable[int] = (status_of(file["filename"])[0] for file in dataset.cache_files)
    told = f"{dataset._fingerprint} {sorted(sizes)}".encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "big") >> 1
