"""Which images lie below a folder, what they are called, and what their classes are."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, overload

from embedkit.errors import ImageError

SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm",
    ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip


class ImageFile(NamedTuple):
    """An image to read: its id, its path for the operating system, and its class where it has one."""

    id: str
    path: str
    label: str | None = None


@dataclass(frozen=True)
class _Below(Sequence[ImageFile]):
    """Images below a folder, without a path and a label for each in memory: there may be a hundred million."""

    root: str
    ids: list[str]
    shaped: bool

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, at: int) -> ImageFile: ...

    @overload
    def __getitem__(self, at: slice) -> list[ImageFile]: ...

    def __getitem__(self, at: int | slice) -> ImageFile | list[ImageFile]:
        return [self._file(id) for id in self.ids[at]] if isinstance(at, slice) else self._file(self.ids[at])

    def _file(self, id: str) -> ImageFile:
        return ImageFile(id, os.path.join(self.root, id), id.partition("/")[0] if self.shaped else None)


@dataclass(frozen=True)
class Listing:
    """What `list_images` found.

    Attributes
    ----------
    root : Path
        The folder.
    files : sequence of ImageFile
        Sorted by the bytes of their ids.
    classes : list of str
        Sorted; empty when the folder has no class folders.
    failures : list of (str, str)
        Id and reason of what is called like an image and cannot be one.
    ignored : int
        Files that are not called like images, or are hidden.
    """

    root: Path
    files: Sequence[ImageFile]
    classes: list[str]
    failures: list[tuple[str, str]]
    ignored: int


def list_images(root: str | os.PathLike[str]) -> Listing:
    """List the images below a folder without opening any.

    Names decide: see `SUFFIXES`. Hidden files are left out, links are followed, and a link back to a folder above
    itself is not followed again. When no image lies in the folder itself, an image's class is the first folder below
    it, so ``a/cat`` and ``b/cat`` are never taken for one class: theirs are ``a`` and ``b``.

    Parameters
    ----------
    root : path-like
        The folder.

    Returns
    -------
    Listing
        Sorted by the bytes of the ids.

    Raises
    ------
    ImageError
        When there is no such folder, or no image in it.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from embedkit.images import list_images
    >>> folder = tempfile.TemporaryDirectory()
    >>> (pathlib.Path(folder.name) / "cat").mkdir()
    >>> (pathlib.Path(folder.name) / "cat" / "1.jpg").touch()
    >>> [(file.id, file.label) for file in list_images(folder.name).files]
    [('cat/1.jpg', 'cat')]
    >>> folder.cleanup()
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file; name the folder that holds the images" if root.exists() else "no such folder: it is missing"
        raise ImageError(os.fspath(root), what)
    walk = _Walk()
    walk.run(os.fspath(root))
    ids = sorted(walk.ids, key=os.fsencode)
    files = _Below(os.fspath(root), ids, shaped=bool(ids) and all("/" in id for id in ids))
    failures = walk.failures + _barren(walk.image_named_folders, ids)
    if not files and not failures:
        raise ImageError(
            os.fspath(root), f"no images in it ({walk.ignored:,} other files); images are called {' '.join(SUFFIXES)}"
        )
    classes = sorted({id.partition("/")[0] for id in ids}, key=os.fsencode) if files.shaped else []
    return Listing(root, files, classes, sorted(failures, key=lambda failure: os.fsencode(failure[0])), walk.ignored)


def list_files(paths: Iterable[str | os.PathLike[str]]) -> Listing:
    """List images that are named one by one, whatever they are called.

    Parameters
    ----------
    paths : iterable of path-like
        In any order.

    Returns
    -------
    Listing
        Below the deepest folder that holds them all, without classes.

    Raises
    ------
    ImageError
        When there is none, or one is named twice.
    """
    absolute = [os.path.abspath(os.fspath(path)) for path in paths]
    if not absolute:
        raise ImageError("the list of images", "it is empty")
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    files = [ImageFile(Path(os.path.relpath(path, root)).as_posix(), path) for path in absolute]
    files.sort(key=lambda file: os.fsencode(file.id))
    for left, right in pairwise(files):
        if left.id == right.id:
            raise ImageError(left.path, "it is in the list twice")
    return Listing(Path(root), files, [], [], 0)


def status_of(path: str) -> tuple[int, int]:
    """Return size and modification time in nanoseconds; of a file that is gone, what no file has."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, -1
    return status.st_size, status.st_mtime_ns


def _barren(folders: list[str], ids: list[str]) -> list[tuple[str, str]]:
    """Return, as failures, the folders called like images that hold none."""
    if not folders:
        return []
    holding = {id[:end] for id in ids for end, sign in enumerate(id) if sign == "/"}
    return [(folder, "a folder, not an image") for folder in folders if folder not in holding]


class _Walk:
    """A walk over a folder, with a stack of our own: folders may lie deeper than Python recurses."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.failures: list[tuple[str, str]] = []
        self.image_named_folders: list[str] = []
        self.ignored = 0

    def run(self, root: str) -> None:
        top = os.stat(root)
        stack: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(root, "", ((top.st_dev, top.st_ino),))]
        while stack:
            folder, prefix, above = stack.pop()
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                self.failures.append((prefix.rstrip("/") or folder, f"the folder cannot be read: {error.strerror}"))
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    self.ignored += 1
                elif _is_folder(entry):
                    status = entry.stat()
                    here = (status.st_dev, status.st_ino)
                    if is_image_name(entry.name):
                        self.image_named_folders.append(prefix + entry.name)
                    if here not in above:
                        stack.append((entry.path, f"{prefix}{entry.name}/", (*above, here)))
                else:
                    self._file(entry, prefix + entry.name)

    def _file(self, entry: os.DirEntry[str], id: str) -> None:
        if not is_image_name(entry.name):
            self.ignored += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            self.failures.append((id, f"broken symbolic link to {os.readlink(entry.path)}"))
        elif entry.is_file():
            self.ids.append(id)
        else:
            kind = stat.filemode(os.stat(entry.path).st_mode)[0]
            self.failures.append((id, f"not a regular file but a {_KINDS.get(kind, 'special file')}"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # A link to itself.


_KINDS = {"p": "named pipe", "s": "socket", "b": "device", "c": "device"}


def is_image_name(name: str) -> bool:
    """Return whether a file of this name counts as an image."""
    return name.lower().endswith(SUFFIXES)


def inside(root: str | os.PathLike[str], id: str) -> Path:
    """Join an id from a stranger to a root, without ever leaving it.

    Raises
    ------
    ImageError
        When the id is absolute, climbs with ``..``, or holds a NUL.

    Examples
    --------
    >>> from embedkit.images import inside
    >>> inside("/photos", "cat/1.jpg").as_posix()
    '/photos/cat/1.jpg'
    """
    parts = id.split("/")
    if not id or "\0" in id or ".." in parts or os.path.isabs(id) or (os.name == "nt" and ("\\" in id or ":" in id)):
        raise ImageError(id, "this id points out of its root")
    return Path(root, *parts)
