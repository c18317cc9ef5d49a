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

    Every folder is listed once. A link to a folder that lies inside the root adds nothing: what is in there is listed
    where it really is.

    Parameters
    ----------
    root : path-like
        The folder.
    follow_links : bool, default False
        Whether symbolic links that lead out of the folder are followed. In a folder from a stranger they may lead
        anywhere, so each is a failure by default. Of several links to one folder, the first by its id is followed.
        Links to files inside the root are images as any other.
    max_bytes : int, default 536870910
        A larger file is a failure.

    Returns
    -------
    Listing
        Sorted by the bytes of the ids. What goes away while the folder is looked through is not in it.

    Raises
    ------
    ImageError
        When there is no such folder, it cannot be read, or no image is in it.

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
    found = find_files(root, SUFFIXES, follow_links=follow_links)
    if not found.ids and not found.failures:
        raise without_images(root, found)
    return images_of(root, found.ids, found, max_bytes)


def images_of(root: str | os.PathLike[str], ids: Sequence[str], found: Found, max_bytes: int) -> Listing:
    """Return the listing of some of the files that were found below a folder, with all the failures."""
    files = _Below(os.fspath(root), ids, have_folders(ids), max_bytes)
    return Listing(
        Path(root), files, classes_of(map(first_folder, ids)) if files.shaped else [], found.failures, found.ignored
    )


def without_images(root: str | os.PathLike[str], found: Found, *hints: str) -> ImageError:
    """Return the failure of a folder that has no image, with what may be done about it."""
    names = f"images are called {' '.join(SUFFIXES)}"
    reason = "; ".join([f"no images in it ({found.ignored:,} other files)", *hints, names])
    return ImageError(os.fspath(root), reason, "missing")


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
        What is called so and is no file that may be read, and folders that cannot be read; no two of one id.
    ignored : int
        Other files, and hidden ones.
    noted : list of str
        Those among the other files that are called in another way that was asked for, in any order.
    """

    ids: list[str]
    failures: list[ImageError]
    ignored: int
    noted: list[str]


def find_files(
    root: str | os.PathLike[str], suffixes: tuple[str, ...], *, note: tuple[str, ...] = (), follow_links: bool = False
) -> Found:
    """Find the files below a folder whose names end in one of some suffixes, and note those that end in others.

    Raises
    ------
    ImageError
        When there is no such folder, or it cannot be read.
    """
    root = os.fspath(root)
    try:
        walk = _Walk(root, suffixes, note, follow_links)
        walk.run()
    except NotADirectoryError as error:
        raise ImageError(root, "is a file; name the folder that holds the images", "not-an-image") from error
    except (FileNotFoundError, ValueError) as error:  # The latter of what cannot be a name.
        raise ImageError(root, "no such folder", "missing") from error
    except OSError as error:
        kind = "permission" if isinstance(error, PermissionError) else "unreadable"
        raise ImageError(root, f"the folder cannot be read: {error.strerror}", kind) from error
    walk.ids.sort(key=os.fsencode)
    failures = [*walk.failures, *_barren(walk)]
    return Found(walk.ids, sorted(failures, key=by_bytes), walk.ignored, walk.noted)


def _barren(walk: _Walk) -> list[ImageError]:
    """Return, as failures, the folders called like images that hold none."""
    if not walk.folders:
        return []
    settled = {id[:end] for id in walk.ids for end, sign in enumerate(id) if sign == "/"}
    settled.update(failure.id for failure in walk.failures)
    return [ImageError(id, "a folder, not an image", "not-an-image") for id in walk.folders if id not in settled]


class _Walk:
    """A walk over a folder, with a stack of our own: folders may lie deeper than Python recurses."""

    def __init__(self, root: str, suffixes: tuple[str, ...], note: tuple[str, ...], follow_links: bool) -> None:
        self.root, self.suffixes, self.note, self.follow_links = root, suffixes, note, follow_links
        self.ids: list[str] = []
        self.failures: list[ImageError] = []
        self.folders: list[str] = []  # Those called like what is looked for.
        self.noted: list[str] = []
        self.ignored = 0
        self._real = os.path.join(os.path.realpath(root), "")
        self._links: list[str] = []  # To folders that are not on the way, which come when the others are done.
        self._walked: set[tuple[int, int]] = set()

    def run(self) -> None:
        self._descend("", remember=self.follow_links)
        while self._links:
            # The order of a folder's entries is nobody's choice, and ids must not depend on it.
            links, self._links = sorted(self._links, key=os.fsencode), []
            for link in links:
                self._descend(f"{link}/", remember=True)

    def _descend(self, prefix: str, *, remember: bool) -> None:
        """Walk over a folder and all below it, but not over one that is remembered."""
        stack = [(os.path.join(self.root, prefix), prefix)]
        while stack:
            folder, prefix = stack.pop()
            try:
                if remember and not self._is_new(folder):
                    continue
                # One entry after the other: a folder may have a million.
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if self._leads_on(entry, prefix):
                            stack.append((entry.path, f"{prefix}{entry.name}/"))
            except OSError as error:
                if not prefix:
                    raise
                self._fail(prefix.rstrip("/"), "the folder cannot be read", error)

    def _is_new(self, folder: str) -> bool:
        status = os.stat(folder)
        before = len(self._walked)
        self._walked.add((status.st_dev, status.st_ino))
        return len(self._walked) > before

    def _leads_on(self, entry: os.DirEntry[str], prefix: str) -> bool:
        """Take an entry in, and return whether it is a folder to go on with; its own trouble is not its folder's."""
        try:
            return self._take(entry, prefix + entry.name)
        except OSError as error:
            self._fail(prefix + entry.name, "it cannot be looked at", error)
            return False

    def _fail(self, id: str, what: str, error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):  # It went away since it was found.
            self.folders = [folder for folder in self.folders if folder != id]
            return
        kind = "permission" if isinstance(error, PermissionError) else "unreadable"
        self.failures.append(ImageError(id, f"{what}: {error.strerror}", kind))

    def _take(self, entry: os.DirEntry[str], id: str) -> bool:
        wanted = is_called(entry.name, self.suffixes)
        if entry.name.startswith("."):
            self.ignored += 1
        elif _is_folder(entry):
            if self._leads_out(entry):
                self._refuse(entry, id)
                return False
            if wanted:
                self.folders.append(id)
            if not entry.is_symlink():
                return True
            if not self._is_on_the_way(entry.path):
                self._links.append(id)
        elif wanted:
            self._file(entry, id)
        else:
            self.ignored += 1
            if is_called(entry.name, self.note):
                self.noted.append(id)
        return False

    def _is_on_the_way(self, path: str) -> bool:
        """Return whether a folder is met without any link: it lies inside the root, and not in a hidden folder."""
        real = os.path.join(os.path.realpath(path), "")
        return real.startswith(self._real) and not any(
            name.startswith(".") for name in real[len(self._real) :].split(os.sep)
        )

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
