"""The exceptions that embedkit raises on purpose.

Every one of them is an :class:`EmbedkitError`, and each leaf also inherits the builtin that a caller would guess::

    EmbedkitError
    ├─ StoreNotFoundError(FileNotFoundError)   there is no store at this path
    ├─ StoreExistsError(FileExistsError)       there is one already, and nobody asked to replace it
    ├─ StoreBusyError(BlockingIOError)         another process is writing it
    ├─ StoreFormatError(ValueError)            not a store, a newer one, or a damaged one
    ├─ SpecMismatchError(ValueError)           two sets of embeddings that must not be compared
    ├─ BackboneError(ValueError)               an unknown model, or weights that cannot be had or do not fit
    ├─ ImageError(ValueError)                  an image that cannot be read
    ├─ EmbeddingShapeError(ValueError)         vectors of another width
    ├─ EvaluationError(ValueError)             labels or a split from which no honest number can be made
    ├─ FinetuneError(ValueError)               a recipe, a run folder or a training run that cannot go on
    └─ MissingExtraError(ImportError)          an optional package that is not installed

A message says what was found, what was expected and what to do next. The command line turns an EmbedkitError into one
line and exit code 1; any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


class EmbedkitError(Exception):
    """Base class of every error that embedkit raises on purpose."""


class StoreNotFoundError(EmbedkitError, FileNotFoundError):
    """There is no store at this path."""


class StoreExistsError(EmbedkitError, FileExistsError):
    """A store exists already at the path where one was to be written."""


class StoreBusyError(EmbedkitError, BlockingIOError):
    """Another process is writing the store.

    Parameters
    ----------
    path : path-like
        The store.
    pid, host : int, str
        The process, 0 when it could not be told.

    Attributes
    ----------
    path, pid, host
        As passed in.
    """

    def __init__(self, path: str | os.PathLike[str], pid: int, host: str) -> None:
        self.path, self.pid, self.host = os.fspath(path), pid, host
        who = f"process {pid} on {host}" if pid else "another process"
        super().__init__(
            f"{self.path} is being written by {who}; wait for it, or stop it and run the same command again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreBusyError, (self.path, self.pid, self.host)


class StoreFormatError(EmbedkitError, ValueError):
    """The file is not an embedkit store, is newer than this embedkit, or is damaged."""


class SpecMismatchError(EmbedkitError, ValueError):
    """Two sets of embeddings were made differently and must not be compared.

    Parameters
    ----------
    message : str
        What was about to be compared.
    differences : mapping of str to tuple
        ``{field: (left, right)}`` for every field of the specs that differs.

    Attributes
    ----------
    differences : dict of str to tuple
        As passed in.
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        self.differences = dict(differences)
        fields = "".join(
            # A name may come from a stranger's file, and must not begin another line.
            f"\n  {name if name.isprintable() else repr(name)}: {left!r} != {right!r}"
            for name, (left, right) in self.differences.items()
        )
        super().__init__(f"{message}; these fields differ:{fields}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_mismatch, (str(self), self.differences)


def _rebuild_mismatch(message: str, differences: dict[str, tuple[Any, Any]]) -> SpecMismatchError:
    error = SpecMismatchError.__new__(SpecMismatchError)
    error.args = (message,)
    error.differences = differences
    return error


class BackboneError(EmbedkitError, ValueError):
    """The backbone is unknown, its weights cannot be had, or they do not fit its architecture."""


FAILURE_KINDS = (
    "missing",  # no such file
    "permission",  # the system does not let us read it
    "unreadable",  # the disk, the network or the archive fails
    "empty",  # no bytes
    "not-an-image",  # bytes of something else, a folder, a device
    "unsupported",  # an image of a kind that is not read
    "truncated",  # the end is missing
    "damaged",  # a decoder gives up
    "too-large",  # more pixels or bytes than the limit
    "timeout",  # takes longer than the limit, or ends its process
    "refused",  # a name or a link that leaves its root
)


class ImageError(EmbedkitError, ValueError):
    """An image cannot be read.

    Parameters
    ----------
    id : str
        The image's id or path.
    reason : str
        Why it cannot be read, in one line.
    kind : str, default "damaged"
        One of `FAILURE_KINDS`, for programs and for counting.

    Attributes
    ----------
    id, reason, kind : str
        As passed in.
    """

    def __init__(self, id: str, reason: str, kind: str = "damaged") -> None:
        self.id = id
        self.reason = reason
        self.kind = kind
        super().__init__(id, reason, kind)

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class EmbeddingShapeError(EmbedkitError, ValueError):
    """Vectors do not have the width that is needed."""


class EvaluationError(EmbedkitError, ValueError):
    """Labels or a split from which no honest number can be made."""


class FinetuneError(EmbedkitError, ValueError):
    """A recipe makes no sense, a folder holds another run, or training cannot go on."""


class MissingExtraError(EmbedkitError, ImportError):
    """A package is needed that embedkit installs only on demand.

    Parameters
    ----------
    package : str
        What cannot be imported.
    extra : str
        The extra that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"this needs {package}, which is not installed: pip install 'embedkit[{extra}]'")

    def __reduce__(self) -> tuple[Any, ...]:
        return MissingExtraError, (self.package, self.extra)
