"""Several listings as one, and some entries of a listing."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.sources.entries import Entries, Entry, Listing, Renamed, by_bytes, classes_of, leaves_root
from embedkit.sources.failing import find_flaw, quoted
from embedkit.text import counted

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Joined(Entries):
    """Entries of several listings, whose ids begin with the listing's name where it has one."""

    names: Sequence[str]
    listings: Sequence[Listing]
    which: npt.NDArray[np.int32]
    numbers: Numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def entry(self, number: int) -> Entry:
        which = self.which[number]
        entry = self.listings[which].files[int(self.numbers[number])]
        return Renamed(self.names[which] + entry.id, entry) if self.names[which] else entry


@dataclass(frozen=True)
class _Some(Entries):
    """Some entries of others, by their numbers."""

    entries: Sequence[Entry]
    numbers: Numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def entry(self, number: int) -> Entry:
        return self.entries[int(self.numbers[number])]


def join(listings: Mapping[str, Listing]) -> Listing:
    """Return several listings as one, in which every id begins with the name of its listing.

    Parameters
    ----------
    listings : mapping of str to Listing
        By their names, which are parts of a path and no way out of it.

    Returns
    -------
    Listing
        An image keeps the class that it has in its own listing.

    Raises
    ------
    ImageError
        When ids cannot begin with a name, or two images have one id.

    Examples
    --------
    >>> from embedkit.sources import ImageFile, Listing, join
    >>> spring = Listing("spring", [ImageFile("1.jpg", "spring/1.jpg")], [], [], 0)
    >>> autumn = Listing("autumn", [ImageFile("1.jpg", "autumn/1.jpg")], [], [], 0)
    >>> [file.id for file in join({"spring": spring, "autumn": autumn}).files]
    ['autumn/1.jpg', 'spring/1.jpg']
    """
    for name in listings:
        require_name(name, name)
    joined = _united(list(listings.items()), _common_root([part.root for part in listings.values()]))
    return replace(
        joined, sources={name: part.root for name, part in listings.items() if part.has_paths}, has_paths=False
    )


def require_name(name: str, source: str) -> str:
    """Return what the ids of a source begin with, or raise when they would lead out of their root."""
    if find_flaw(name, "name") or leaves_root(name) or not {"", "."}.isdisjoint(name.split("/")):
        reason = f"ids cannot begin with {quoted(name)}; call the source otherwise: NAME={source}"
        raise ImageError(source, reason, "refused")
    return name


def unite(listings: Sequence[Listing]) -> Listing:
    """Return several listings of one source, such as its images and the frames of its videos, as one."""
    return _united([("", listing) for listing in listings], listings[0].root)


def _united(named: Sequence[tuple[str, Listing]], root: Path | str) -> Listing:
    names, parts = [f"{name}/" if name else "" for name, _ in named], [part for _, part in named]
    which = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.files) for part in parts])
    numbers = np.concatenate([np.arange(len(part.files)) for part in parts]).astype(np.int64)
    ids = [os.fsencode(name + id) for name, part in zip(names, parts, strict=True) for id in ids_of(part.files)]
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    for left, right in itertools.pairwise(order.tolist()):
        if ids[left] == ids[right]:  # Possible where names hold slashes.
            reason = "two sources have an image of this id; name them otherwise"
            raise ImageError(os.fsdecode(ids[left]), reason, "refused")
    failures = [
        ImageError(name + failure.id, failure.reason, failure.kind)
        for name, part in zip(names, parts, strict=True)
        for failure in part.failures
    ]
    return Listing(
        root=root,
        files=_Joined(names, parts, which[order], numbers[order]),
        classes=classes_of(itertools.chain.from_iterable(part.classes for part in parts)),
        failures=sorted(failures, key=by_bytes),
        ignored=sum(part.ignored for part in parts),
    )


def choose(
    listing: Listing,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    shard: tuple[int, int] | None = None,
) -> Listing:
    """Return some of the images of a listing.

    Parameters
    ----------
    listing : Listing
    include, exclude : sequence of str
        Patterns with ``*``, ``?`` and ``[...]``. One without a slash is compared with the file's name, any other with
        the whole id, in which ``*`` stands for slashes too. An image is taken when it matches one of `include`, if
        there are any, and none of `exclude`.
    limit : int, optional
        Take the first so many, by their ids.
    sample : int, optional
        Take so many at random. Which ones depends on `seed` and the ids alone, so that most of them are taken again
        after images have come and gone.
    seed : int, default 0
        Of the sample.
    shard : tuple of int, optional
        ``(i, n)``: take the i-th of n shards, 1 <= i <= n. An image's shard depends on its id and n alone, so every
        image is in one shard, and stays there whatever comes and goes.

    Returns
    -------
    Listing
        `include`, `exclude` and `shard` choose first, then `sample`, then `limit`. Failures are chosen like images; a
        sample and a limit leave them out.

    Raises
    ------
    ImageError
        When nothing is left.

    Examples
    --------
    >>> from embedkit.sources import ImageFile, Listing, choose
    >>> files = [ImageFile(id, id) for id in ("a/1.jpg", "a/2.png", "b/3.jpg")]
    >>> listing = Listing(".", files, [], [], 0)
    >>> [file.id for file in choose(listing, include=["*.jpg"], exclude=["b/*"]).files]
    ['a/1.jpg']
    """
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard i of n must have 1 <= i <= n, got {shard[0]} of {shard[1]}")
    if any(count is not None and count < 1 for count in (limit, sample)):
        raise ValueError("limit and sample must be at least 1")
    tests: list[Callable[[str], bool]] = []
    if include or exclude:
        tests.append(_matching(include, exclude))
    if shard is not None:
        index, count = shard
        tests.append(lambda id: zlib.crc32(os.fsencode(id)) % count == index - 1)
    if not tests and limit is None and sample is None:
        return listing
    ids = ids_of(listing.files)
    kept = np.array([k for k, id in enumerate(ids) if all(test(id) for test in tests)], dtype=np.int64)
    failures = [failure for failure in listing.failures if all(test(failure.id) for test in tests)]
    if sample is not None:
        kept = _sampled(listing.files, kept, sample, seed)
    kept = kept[:limit]
    if limit is not None or sample is not None:
        failures = []
    if not len(kept) and not failures:
        raise ImageError(os.fspath(listing.root), _nothing_chosen(listing.files, include), "missing")
    files = _Some(listing.files, kept)
    classes = classes_of(file.label for file in files) if listing.classes else []
    return replace(listing, files=files, classes=classes, failures=failures)


def _nothing_chosen(entries: Sequence[Entry], include: Sequence[str]) -> str:
    """Return why nothing is chosen, with what patterns are compared with."""
    reason = f"none of its {counted(len(entries), 'image')} is chosen"
    if len(entries):
        reason += f"; their ids are such as {quoted(entries[0].id)}"
    plain = next((pattern for pattern in include if not set("*?[").intersection(pattern)), None)
    if plain is not None:
        whole = "whole ids" if "/" in plain else "whole names of files"
        reason += f"; {quoted(plain)} is compared with {whole}, and {quoted(plain.rstrip('/') + '/*')} takes a folder"
    return reason


def ids_of(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the ids of entries."""
    return (entry.id for entry in entries)


def _matching(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    wanted, unwanted = _any_of(include), _any_of(exclude)
    return lambda id: (not include or wanted(id)) and not unwanted(id)


def _any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether an id matches one of some patterns."""
    whole = [pattern for pattern in patterns if "/" in pattern]
    names = [pattern for pattern in patterns if "/" not in pattern]
    nothing = r"(?!)"
    match_whole, match_name = (
        re.compile("|".join(map(fnmatch.translate, some)) or nothing).match for some in (whole, names)
    )
    return lambda id: bool(match_whole(id) or match_name(id.rpartition("/")[2]))


def _sampled(entries: Sequence[Entry], kept: Numbers, count: int, seed: int) -> Numbers:
    """Return the `count` whose ids have the smallest keyed hashes."""
    key = str(seed).encode()
    hashes = [
        hashlib.blake2b(os.fsencode(entries[number].id), digest_size=8, key=key).digest() for number in kept.tolist()
    ]
    smallest = np.argsort(np.frombuffer(b"".join(hashes), dtype=">u8"), kind="stable")[:count]
    return np.sort(kept[smallest])


def _common_root(roots: Sequence[Path | str]) -> Path | str:
    """Return the deepest folder above several sources; of sources elsewhere, their names."""
    texts = [os.fspath(root) for root in roots]
    if any("://" in text for text in texts):
        return ", ".join(texts)
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(text)) for text in texts]))
