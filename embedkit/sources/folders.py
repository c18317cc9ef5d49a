"""Images that are files below a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES
from embedkit.sources.entries import (
    Entries,
    ImageFile,
    Listing,
    by_bytes,
    classes_of,
    first_folder,
    have_folders,
)

# Those of raw files and drawings too: they are images to whoever has them, so each is named as a failure.
SUFFIXES = (
    ".apng", ".arw", ".avif", ".avifs", ".bmp", ".cr2", ".cr3", ".cur", ".dds", ".dib", ".dng", ".gif", ".heic",
    ".heics", ".heif", ".heifs", ".hif", ".icns", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg",
    ".jpf", ".jpg", ".jpx", ".jxl", ".mpo", ".nef", ".orf", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm",
    ".psd", ".qoi", ".raf", ".rw2", ".sgi", ".svg", ".svgz", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip


@dataclass(frozen=True)
class _Below(Entries):
    """Images below a folder."""

    root: str
    ids: Sequence[str]
    shaped: bool
    max_bytes: int

    def __len__(self) -> int:
        return len(self.ids)

    def entry(self, number: int) -> ImageFile:
        id = self.ids[number]
        label = first_folder(id) if self.shaped else None
        return ImageFile(id, os.path.join(self.root, id), label, self.max_bytes)


def list_folder(root: str | os.PathLike[str], *, follow_links: bool = False, max_bytes: int = MAX_BYTES) -> Listing:
    """List the images below a folder without opening any.

    Names decide: see `SUFFIXES`. Hidden files are left out. When no image lies in the folder itself, an image's class
    is the first folder below it, so ``a/cat`` and ``b/cat`` are never taken for one class: theirs are ``a`` and ``b``.

    Parameters
    ----------
    root : path-like
        The folder.
    follow_links : bool, default False
        Whether symbolic links that lead out of the folder are followed. In a folder from a stranger they may lead
        anywhere, so each is a failure by default. Links inside the folder are always followed, except back to a folder
        above themselves.
    max_bytes : int, default 536870910
        A larger file is a failure.

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
    >>> from embedkit.sources import list_folder
    >>> folder = tempfile.TemporaryDirectory()
    >>> (pathlib.Path(folder.name) / "cat").mkdir()
    >>> (pathlib.Path(folder.name) / "cat" / "1.jpg").touch()
    >>> [(file.id, file.label) for file in list_folder(folder.name).files]
    [('cat/1.jpg', 'cat')]
    >>> folder.cleanup()
    """
    root = Path(root)
    if not root.is_dir():
        if root.exists():
            raise ImageError(os.fspath(root), "is a file; name the folder that holds the images", "not-an-image")
        raise ImageError(os.fspath(root), "no such folder", "missing")
    walk = find_files(root, SUFFIXES, follow_links=follow_links)
    files = _Below(os.fspath(root), walk.ids, have_folders(walk.ids), max_bytes)
    if not files and not walk.failures:
        raise ImageError(
            os.fspath(root),
            f"no images in it ({walk.ignored:,} other files); images are called {' '.join(SUFFIXES)}",
            "missing",
        )
    classes = classes_of(map(first_folder, walk.ids)) if files.shaped else []
    return Listing(root, files, classes, walk.failures, walk.ignored)


def is_called(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a name ends in one of some suffixes, in whatever case."""
    return name.lower().endswith(suffixes)


@dataclass(frozen=True)
class Found:
    """The files below a folder that are called in a certain way.

    Attributes
    ----------
    ids : list of str
        Paths relative to the folder, sorted by their bytes.
    failures : list of ImageError
        What is called so and is no file that may be read.
    ignored : int
        Other files, and hidden ones.
    """

    ids: list[str]
    failures: list[ImageError]
    ignored: int


def find_files(root: str | os.PathLike[str], suffixes: tuple[str, ...], *, follow_links: bool = False) -> Found:
    """Find the files below a folder whose names end in one of some suffixes."""
    walk = _Walk(os.fspath(root), suffixes, follow_links)
    walk.run()
    walk.ids.sort(key=os.fsencode)
    failures = sorted(walk.failures + _barren(walk.folders, walk.ids), key=by_bytes)
    return Found(walk.ids, failures, walk.ignored)


def _barren(folders: list[str], ids: list[str]) -> list[ImageError]:
    """Return, as failures, the folders called like images that hold none."""
    if not folders:
        return []
    holding = {id[:end] for id in ids for end, sign in enumerate(id) if sign == "/"}
    return [ImageError(folder, "a folder, not an image", "not-an-image") for folder in folders if folder not in holding]


class _Walk:
    """A walk over a folder, with a stack of our own: folders may lie deeper than Python recurses."""

    def __init__(self, root: str, suffixes: tuple[str, ...], follow_links: bool) -> None:
        self.root, self.suffixes, self.follow_links = root, suffixes, follow_links
        self.ids: list[str] = []
        self.failures: list[ImageError] = []
        self.folders: list[str] = []  # Those called like what is looked for.
        self.ignored = 0
        self._real = os.path.join(os.path.realpath(root), "")

    def run(self) -> None:
        top = os.stat(self.root)
        stack: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(self.root, "", ((top.st_dev, top.st_ino),))]
        while stack:
            folder, prefix, above = stack.pop()
            try:
                # One entry after the other: a folder may have a million.
                with os.scandir(folder) as entries:
                    for entry in entries:
                        below = self._take(entry, prefix, above)
                        if below is not None:
                            stack.append((entry.path, f"{prefix}{entry.name}/", below))
            except OSError as error:
                name = prefix.rstrip("/") or folder
                kind = "permission" if isinstance(error, PermissionError) else "unreadable"
                self.failures.append(ImageError(name, f"the folder cannot be read: {error.strerror}", kind))

    def _take(
        self, entry: os.DirEntry[str], prefix: str, above: tuple[tuple[int, int], ...]
    ) -> tuple[tuple[int, int], ...] | None:
        """Take a file in; of a folder to go on with, return the folders above what lies in it."""
        wanted = is_called(entry.name, self.suffixes)
        if entry.name.startswith("."):
            self.ignored += 1
        elif _is_folder(entry):
            if self._leads_out(entry):
                self._refuse(entry, prefix + entry.name)
                return None
            if wanted:
                self.folders.append(prefix + entry.name)
            status = entry.stat()
            here = (status.st_dev, status.st_ino)
            return None if here in above else (*above, here)
        elif wanted:
            self._file(entry, prefix + entry.name)
        else:
            self.ignored += 1
        return None

    def _file(self, entry: os.DirEntry[str], id: str) -> None:
        if entry.is_symlink() and not os.path.exists(entry.path):
            self.failures.append(ImageError(id, f"broken symbolic link to {os.readlink(entry.path)}", "missing"))
        elif self._leads_out(entry):
            self._refuse(entry, id)
        elif entry.is_file():
            self.ids.append(id)
        else:
            kind = _KINDS.get(stat.filemode(os.stat(entry.path).st_mode)[0], "special file")
            self.failures.append(ImageError(id, f"not a regular file but a {kind}", "not-an-image"))

    def _leads_out(self, entry: os.DirEntry[str]) -> bool:
        if self.follow_links or not entry.is_symlink():
            return False
        return not os.path.join(os.path.realpath(entry.path), "").startswith(self._real)

    def _refuse(self, entry: os.DirEntry[str], id: str) -> None:
        reason = f"a symbolic link out of the folder, to {os.readlink(entry.path)}; --follow-links follows it"
        self.failures.append(ImageError(id, reason, "refused"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # A link to itself.


_KINDS = {"p": "named pipe", "s": "socket", "b": "device", "c": "device"}
