"""Views: squares of an image that a teacher and its student look at together, each at a size of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from embedkit.errors import FinetuneError, ImageError
from embedkit.images import Data, Region, upright_size
from embedkit.sources import Entry, Listing
from embedkit.sources.entries import Entries

MAX_VIEWS = 99


class View(NamedTuple):
    """One view of an image: the whole of it, or a square that its number draws."""

    id: str
    entry: Entry
    number: int
    smallest: float
    seed: int

    @property
    def label(self) -> str | None:
        """The class of the image."""
        return self.entry.label

    def status(self) -> tuple[int, int]:
        """Return size and modification time of the image."""
        return self.entry.status()

    def read(self) -> Data:
        """Read the image, or the square of it."""
        data = self.entry.read()
        size = upright_size(data) if self.number else None
        if size is None:  # What cannot be opened is for the decoder to explain.
            return data
        left, top, side = square_of(self.entry.id, size, self.number, self.smallest, self.seed)
        if isinstance(data, np.ndarray):
            return np.ascontiguousarray(data[top : top + side, left : left + side])
        whole, (right, down) = (data.data, data.box[:2]) if isinstance(data, Region) else (data, (0, 0))
        return Region(whole, (left + right, top + down, left + right + side, top + down + side))


def square_of(id: str, size: tuple[int, int], number: int, smallest: float, seed: int) -> tuple[int, int, int]:
    """Return left, top and side of the square that a view shows of an image of this width and height.

    It covers from `smallest` to all of the largest square in the image, and lies anywhere. Nothing but the arguments
    draws it, so that teacher and student, and a run that was resumed, look at the same pixels.

    Examples
    --------
    >>> from embedkit.finetuning.distillation.views import square_of
    >>> left, top, side = square_of("cat/1.jpg", (640, 480), 1, 0.25, 0)
    >>> 240 <= side <= 480 and left + side <= 640 and top + side <= 480
    True
    """
    name = f"{seed} {number} {id}".encode("utf-8", "surrogateescape")
    drawn = np.frombuffer(hashlib.blake2b(name, digest_size=24).digest(), dtype="<u8") / 2**64
    width, height = size
    share = smallest + (1 - smallest) * float(drawn[0])
    side = max(1, round(min(width, height) * share**0.5))
    return int((width - side + 1) * float(drawn[1])), int((height - side + 1) * float(drawn[2])), side


@dataclass(frozen=True)
class _Views(Entries):
    """All views of some images: first every image whole, then every image's first square, and so on."""

    files: Sequence[Entry]
    views: int
    smallest: float
    seed: int

    def __len__(self) -> int:
        return self.views * len(self.files)

    def entry(self, number: int) -> View:
        view, row = divmod(number, len(self.files))
        entry = self.files[row]
        return View(view_id(entry.id, view), entry, view, self.smallest, self.seed)


def view_id(id: str, number: int) -> str:
    """Return what the view of an image is called in a store of several views."""
    return f"{number:02d}/{id}"


def image_id(view: str) -> str:
    """Return the id of the image that a view of several is of."""
    return view.partition("/")[2]


def name_views(views: int, smallest: float, seed: int) -> str:
    """Return what tells stores of these views from others, in a file's name; nothing for whole images.

    Examples
    --------
    >>> from embedkit.finetuning.distillation.views import name_views
    >>> name_views(4, 0.3, 0), name_views(1, 0.3, 0)
    ('-4-views-of-0.3-seed-0', '')
    """
    return "" if views == 1 else f"-{views}-views-of-{float(smallest)}-seed-{seed}"


def list_views(listing: Listing, views: int, smallest: float = 0.3, seed: int = 0) -> Listing:
    """Return a listing of several views of each image: the whole image, and squares drawn by chance.

    Parameters
    ----------
    listing : Listing
        The images.
    views : int
        Views of each; with one, the listing is returned as it is.
    smallest : float, default 0.3
        The least share of the largest square in an image that a view shows.
    seed : int, default 0
        Draws the squares.

    Returns
    -------
    Listing
        Of ids such as ``01/cat/1.jpg``, in the order of views, and of images within each.

    Raises
    ------
    FinetuneError
        When there is no such number of views, or no such share.
    """
    check_views(views, smallest)
    if views == 1:
        return listing
    failures = [ImageError(view_id(failure.id, 0), failure.reason, failure.kind) for failure in listing.failures]
    files = _Views(listing.files, views, smallest, seed)
    return replace(listing, files=files, failures=failures, has_paths=False)


def check_views(views: int, smallest: float) -> None:
    """Raise FinetuneError unless there is such a number of views, and such a share."""
    if not 1 <= views <= MAX_VIEWS or not 0 < smallest <= 1:
        raise FinetuneError(
            f"an image has from 1 to {MAX_VIEWS} views, whose squares are a share above 0 and at most 1; "
            f"got {views} views of {smallest:g}"
        )
