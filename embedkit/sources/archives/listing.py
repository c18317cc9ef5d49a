"""Images in tar and zip archives, read in place."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES
from embedkit.images.signatures import recognise
from embedkit.sources.archives.catalogues import Catalogue, Columns
from embedkit.sources.archives.descriptors import SharedFile, reason_of
from embedkit.sources.archives.members import Member, Place
from embedkit.sources.archives.spools import is_compressed, unpack
from embedkit.sources.archives.tars import BLOCK, begins_tar, next_header, walk_tar
from embedkit.sources.archives.zips import has_directory, is_zip, read_member, walk_zip
from embedkit.sources.entries import Entries, Entry, Listing, by_bytes, have_folders
from embedkit.sources.folders import SUFFIXES
from embedkit.sources.remote.downloads import download
from embedkit.sources.remote.ranges import RangedFile, Readable, ReadAhead, open_ranged
from embedkit.sources.remote.transfers import is_remote, local_path, public_url

ARCHIVE_SUFFIXES = (
    ".tar", ".tar.bz2", ".tar.gz", ".tar.xz", ".tar.zst", ".tbz", ".tbz2", ".tgz", ".txz", ".tzst", ".zip",
)  # fmt: skip

log = logging.getLogger("embedkit")

_OTHERS = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "RAR", b"\x04\x22\x4d\x18": "LZ4", b"\x1f\x9d": "compress"}


@dataclass(frozen=True)
class _Archive(Entries):
    """Images in an archive."""

    file: Readable
    is_zip: bool
    columns: Columns
    shaped: bool

    def __len__(self) -> int:
        return len(self.columns.ids)

    def entry(self, number: int) -> _Image:
        return _Image(self.columns.ids[number], self.columns.label(number, self.shaped), self, number)


class _Image(NamedTuple):
    id: str
    label: str | None
    archive: _Archive
    number: int

    def status(self) -> tuple[int, int]:
        places = self.archive.columns.places
        return int(places["size"][self.number]), int(places["time_ns"][self.number])

    def read(self) -> bytes:
        try:
            self.archive.file.require_unchanged()
            return _reader(self.archive.file, self.archive.is_zip)(self.archive.columns.place(self.number), self.id)
        except OSError as error:
            raise ImageError(self.id, *reason_of(error)) from error
        except ImageError as error:
            if error.id == self.id:
                raise
            raise ImageError(self.id, error.reason, error.kind) from error  # The archive's own, under its URL.


def list_archive(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, max_unpacked_bytes: int | None = None
) -> Listing:
    """List the images in a tar or zip archive without unpacking it.

    Its first bytes tell what kind of archive it is, not its name. A tar archive's headers are read through once; of a
    zip archive, its directory. A compressed tar archive has no places to read from, so it is first unpacked whole into
    a temporary file, which has no name and goes with the listing; ``TMPDIR`` says where.

    Of an archive behind a URL, parts are asked for as they are needed, and nothing is kept. Only when its server gives
    whole files alone it is downloaded first, into such a temporary file.

    Names decide which members are images, as in a folder: see `SUFFIXES`. Hidden members and ``__MACOSX`` are left out.
    When no image lies at the top, an image's class is its first folder. Where images have members beside them that end
    in ``.cls``, the class is the text of that of the same sample, which is the name up to the first dot after the
    folders, as WebDataset has it.

    Of members with the same name the last wins, as in unpacking. A hard link is the image that it names. A symbolic
    link and a name that leads out of the archive are failures.

    Parameters
    ----------
    path : path-like
        The archive, or its URL.
    max_bytes : int, default 3 * 178_956_970
        What an image may have; a larger one is a failure.
    max_unpacked_bytes : int, optional
        What a compressed tar archive may unpack to; by default a gigabyte and a hundred times its size.

    Returns
    -------
    Listing
        Sorted by the bytes of the ids. The time of an image is that of the member to the second; the digits below stand
        for its content: of a zip archive's member its checksum, of a tar archive's member the checksum of its end.
        Where a tar archive's members have no times of their own, the digits stand for the whole archive, too, so that
        an update reads them again when it is another one.

    Raises
    ------
    ImageError
        When it cannot be opened, is no archive, or has no image in it.

    Examples
    --------
    >>> import pathlib, tempfile, zipfile
    >>> from embedkit.sources import list_archive
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name, "photos.zip")
    >>> with zipfile.ZipFile(path, "w") as archive:
    ...     archive.writestr("cat/1.jpg", b"...")
    >>> [(image.id, image.label, image.read()) for image in list_archive(path).files]
    [('cat/1.jpg', 'cat', b'...')]
    >>> folder.cleanup()
    """
    source = local_path(os.fspath(path))
    shown = public_url(source) if is_remote(source) else source
    file = located = _located(source)
    ahead: Readable = ReadAhead(file) if isinstance(file, RangedFile) else file
    try:
        walked, zipped, problems = _opened(ahead, shown, max_unpacked_bytes)
        file = file if walked is ahead else walked
        catalogue = Catalogue(os.path.basename(file.path), _reader(walked, zipped), max_bytes)
        for problem in problems:
            catalogue.take(problem)
        _take_all(catalogue, lambda: walk_zip(walked) if zipped else walk_tar(walked, is_cut=bool(problems)))
    except OSError as error:
        raise ImageError(shown, *reason_of(error)) from error
    columns = catalogue.columns()
    if not zipped:  # Whose members have checksums.
        columns = columns.stamped(_stamp(located))
    failures = catalogue.failures
    if not columns.ids and not catalogue.has_images:
        if failures:
            raise ImageError(shown, failures[0].reason, failures[0].kind)
        reason = f"no images in it ({catalogue.ignored:,} other files); images are called {' '.join(SUFFIXES)}"
        raise ImageError(shown, reason, "missing")
    files = _Archive(file, zipped, columns, shaped=have_folders(columns.ids))
    return Listing(shown if is_remote(source) else Path(source), files, columns.classes(), failures, catalogue.ignored)


def find_entry(listing: Listing, id: str) -> Entry:
    """Return one image of a listing by its id.

    Raises
    ------
    ImageError
        When there is none of this id.

    Examples
    --------
    >>> from embedkit.sources import ImageFile, Listing, find_entry
    >>> listing = Listing("photos", [ImageFile("1.jpg", "photos/1.jpg")], [], [], 0)
    >>> find_entry(listing, "1.jpg").id
    '1.jpg'
    """
    at = bisect_left(listing.files, os.fsencode(id), key=by_bytes)
    if at == len(listing.files) or listing.files[at].id != id:
        raise ImageError(id, f"no such image in {os.fspath(listing.root)}", "missing")
    return listing.files[at]


def _located(source: str) -> Readable:
    """Open an archive where it is, or download it where it cannot be read at places."""
    if not is_remote(source):
        return SharedFile(source)
    if file := open_ranged(source):
        return file
    with tempfile.TemporaryFile(buffering=0) as whole:
        log.info("%s: its server gives whole files only", public_url(source))
        download(source, cast(BinaryIO, whole))
        return SharedFile(public_url(source), os.dup(whole.fileno()))


def _opened(file: Readable, path: str, most_bytes: int | None) -> tuple[Readable, bool, list[Member]]:
    """Return the archive to read, whether it is a zip archive, and what was wrong with unpacking it."""
    called = path.lower()
    if is_zip(file):
        return file, True, []
    if is_compressed(file):
        unpacked, problem = unpack(file, most_bytes=most_bytes)
        return unpacked, False, [problem] if problem else []
    head = file.read_at(0, BLOCK)
    if not head:
        raise ImageError(path, "the file is empty", "empty")
    if begins_tar(head) or (called.endswith(".tar") and next_header(file, BLOCK) < file.size):
        return file, False, []
    if called.endswith(".zip") and has_directory(file):  # One that unpacks itself begins as a program.
        return file, True, []
    for magic, other in _OTHERS.items():
        if head.startswith(magic):
            raise ImageError(path, f"{other} archives are not read; tar and zip archives are", "unsupported")
    raise ImageError(path, f"no tar or zip archive{_likeness(head)}", "not-an-image")


def _likeness(head: bytes) -> str:
    """Return what a file is by its first bytes, as the end of a reason."""
    found = recognise(head)
    return f" but {found[0].removeprefix('not an image but ').partition(';')[0]}" if found else ""


def _stamp(file: Readable) -> int:
    """Return what that stands for the state of an archive, or for this listing where nothing tells states apart."""
    if not file.version:
        return time.time_ns()
    return int.from_bytes(hashlib.sha256(f"{file.size} {file.version}".encode()).digest()[:8], "big")


def _take_all(catalogue: Catalogue, walk: Callable[[], Iterator[Member]]) -> None:
    try:
        for member in walk():
            catalogue.take(member)
        catalogue.resolve(walk())
    except OSError as error:  # What is listed so far may well be read.
        catalogue.take(Member.fault(b"", *reason_of(error)))


def _reader(file: Readable, zipped: bool) -> Callable[[Place, str], bytes]:
    """Return what reads a member."""
    if zipped:
        return lambda place, id: read_member(file, place, id)
    return lambda place, id: _read_plainly(file, place, id)


def _read_plainly(file: Readable, place: Place, id: str) -> bytes:
    data = file.read_at(place.offset, place.size)
    if len(data) < place.size:
        raise ImageError(id, f"{len(data):,} of its {place.size:,} bytes are there", "truncated")
    return data
