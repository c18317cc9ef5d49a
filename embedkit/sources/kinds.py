"""What kind of source a name stands for."""

from __future__ import annotations

import os
import stat

from embedkit.errors import ImageError
from embedkit.sources.archives import ARCHIVE_SUFFIXES
from embedkit.sources.datasets import is_dataset_folder
from embedkit.sources.folders import SUFFIXES, is_called
from embedkit.sources.remote import is_remote, public_url
from embedkit.sources.tables import TABLES
from embedkit.sources.videos import VIDEO_SUFFIXES

DATASET = "dataset:"  # What the name of one on the hub begins with.
KINDS = {
    "folder": "a folder",
    "archive": "an archive",
    "table": "a table",
    "dataset": "a dataset",
    "video": "a video",
    "image": "an image",
    "list": "a list of image files",
    "URL": "a URL of images",
}
_BY_NAME = {"table": TABLES, "archive": ARCHIVE_SUFFIXES, "video": VIDEO_SUFFIXES, "image": SUFFIXES}


def kind_of(source: str) -> str:
    """Return what kind of source a name stands for, one of `KINDS`; nothing behind a URL is asked.

    Raises
    ------
    ImageError
        When nothing is called so, or it is of no kind.

    Examples
    --------
    >>> from embedkit.sources.kinds import kind_of
    >>> [kind_of(name) for name in ("s3://bucket/photos", "https://host/photos.tar", "dataset:org/name")]
    ['URL', 'archive', 'dataset']
    """
    if source.startswith(DATASET):
        return "dataset"
    if is_remote(source):
        return next((kind for kind in ("table", "archive") if is_called(public_url(source), _BY_NAME[kind])), "URL")
    if _is_folder(source):
        return "dataset" if is_dataset_folder(source) else "folder"
    kind = _kind_of_name(source)
    if kind is None:
        reason = (
            "is a file, but no archive, table, video or image by its name, such as .tar, .zip, .csv, .parquet, .mp4 "
            "or .jpg; --files-from takes a list of images"
        )
        raise ImageError(source, reason, "unsupported")
    return kind


def _is_folder(source: str) -> bool:
    """Return whether a source of this machine is a folder, or raise when nothing is called so."""
    try:
        return stat.S_ISDIR(os.stat(source).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # The last of what cannot be a name.
        may_be_a_folder = _kind_of_name(source) in (None, "image")
        raise ImageError(source, f"no such file{' or folder' if may_be_a_folder else ''}", "missing") from error
    except OSError as error:
        kind = "permission" if isinstance(error, PermissionError) else "unreadable"
        raise ImageError(source, f"cannot be looked at: {error.strerror}", kind) from error


def _kind_of_name(name: str) -> str | None:
    return next((kind for kind, suffixes in _BY_NAME.items() if is_called(name, suffixes)), None)
