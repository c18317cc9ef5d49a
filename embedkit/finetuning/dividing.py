"""Dividing labelled images: as a split says, or by lot."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError, ImageError
from embedkit.evaluation.splits import Split
from embedkit.finetuning.examples import Division, Examples, Taken
from embedkit.heads.folding import hold_out
from embedkit.sources import Entry, Listing, content_sha256
from embedkit.sources.kinds import kind_of
from embedkit.sources.tables import manifest_parts
from embedkit.text import counted

VAL_SHARE = 0.2  # Of each class, where no split is given.
VAL_SPLITS = ("val", "valid", "validation", "test")  # What split files call the part that chooses, the first first.

Codes = npt.NDArray[np.int64]

log = logging.getLogger("embedkit")


def own_split(
    images: Any,
    listing: Listing,
    *,
    root: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Split | None:
    """Return the split that a table of images has a column of.

    Parameters
    ----------
    images : Any
        What somebody calls their images.
    listing : Listing
        Those of them that are taken; its classes are those of the split, too.
    root, columns
        How the table was listed.

    Returns
    -------
    Split or None
        For `divide`; None where nothing says a split.

    Raises
    ------
    ImageError
        When several columns may be that of the splits.
    """
    if not isinstance(images, str | os.PathLike):
        return None
    try:
        if kind_of(os.fspath(images)) != "table":
            return None
    except ImageError:  # Of one that was listed under a name of its own, or of several.
        return None
    parts = manifest_parts(images, root=root, columns=columns)
    if not parts:
        return None
    return Split(Path(images), {entry.id: parts[entry.id] for entry in listing.files if entry.id in parts})


def divide(
    listing: Listing,
    split: Split | str | os.PathLike[str] | None = None,
    *,
    train_split: str = "train",
    val_split: str | None = None,
    test_split: str | None = None,
    seed: int = 0,
) -> Division:
    """Divide labelled images into parts: as a split file says, or by lot.

    Parameters
    ----------
    listing : Listing
        The images. Where the split file has a column label, its classes win over the listing's.
    split : Split or path-like, optional
        What `own_split` returned, or a CSV file as `embedkit.evaluation.Split.read` takes it. Without one, a fifth of
        each class is held out, at least one image where it has two; byte-identical images stay on one side.
    train_split : str, default "train"
        Which part of the split file to train on.
    val_split : str, optional
        Which part chooses the best epoch; by default the first of val, valid, validation and test that there is.
    test_split : str, optional
        Which part before and after are compared on; by default test, where there is one beside the other two, and
        otherwise the part that chooses.
    seed : int, default 0
        Draws the lots.

    Returns
    -------
    Division

    Raises
    ------
    EvaluationError
        When images have no classes, fewer than two are trained on, the file names images that are not listed or parts
        that it lacks, or a part has a class that is not trained on.

    Examples
    --------
    >>> from embedkit.finetuning.dividing import divide
    >>> from embedkit.sources import ImageFile, Listing
    >>> files = [ImageFile(f"{name}/{n}.jpg", "", name) for name in ("cat", "dog") for n in range(5)]
    >>> division = divide(Listing("pets", files, ["cat", "dog"], [], 0))
    >>> len(division.train), len(division.val), division.classes
    (8, 2, ['cat', 'dog'])
    """
    if split is None:
        if (train_split, val_split, test_split) != ("train", None, None):
            raise EvaluationError("names of parts go with a split file; name one with --split, or drop them")
        return _by_lot(listing, seed)
    read = split if isinstance(split, Split) else Split.read(split)
    names = _part_names(read, train_split, val_split, test_split)
    _require_listed(read, names, listing)
    labels = [
        (entry.label if read.labels is None else read.labels.get(entry.id))
        if read.parts.get(entry.id) in names
        else None
        for entry in listing.files
    ]
    parts = [read.parts.get(entry.id, "") for entry in listing.files]
    return _divided(listing, labels, np.array(parts or [""], dtype=np.str_)[: len(parts)], names, made=False)


def _by_lot(listing: Listing, seed: int) -> Division:
    labels = [entry.label for entry in listing.files]
    rows = np.flatnonzero([label is not None for label in labels])
    _, codes = np.unique(np.array([labels[row] for row in rows] or [""]), return_inverse=True)
    parts = np.full(len(labels), "", dtype="U5")
    if len(rows):
        groups = _copies([listing.files[row] for row in rows.tolist()])
        held = hold_out(len(rows), VAL_SHARE, seed, strata=codes.astype(np.int64), groups=groups)
        alone = np.setdiff1d(codes, codes[held])
        if len(alone):
            log.warning(
                "%s too small to hold an image out of it, such as %r; nothing says how well it is learned",
                "a class is" if len(alone) == 1 else f"{len(alone):,} classes are", labels[rows[codes == alone[0]][0]],
            )  # fmt: skip
        parts[rows] = np.where(held, "val", "train")
    return _divided(listing, labels, parts, ("train", "val", "val"), made=True)


def _copies(entries: Sequence[Entry]) -> Codes | None:
    """Return a number for each image, the same for those of the same bytes; None where no two are the same."""
    sizes = np.array([entry.status()[0] for entry in entries], dtype=np.int64)
    _, which, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    alike = np.flatnonzero(counts[which] > 1)  # Only files of one size can be equal.
    if len(alike) > 20_000:
        log.info("comparing the content of %s, so that copies stay together", counted(len(alike), "image"))
    groups, first = np.arange(len(entries), dtype=np.int64), dict[bytes, int]()
    for row in alike.tolist():
        try:
            groups[row] = first.setdefault(content_sha256(entries[row].read()), row)
        except ImageError:
            continue  # The extraction names it.
    return None if len(np.unique(groups)) == len(groups) else groups


def _part_names(split: Split, train: str, val: str | None, test: str | None) -> tuple[str, str, str]:
    """Return what the split file calls the parts to train on, to choose on and to compare on."""
    names = set(split.parts.values())
    split.require(train, "name one with --train-split, or have lots drawn: leave the split out, --columns split=")
    if val is None:
        val = next((name for name in VAL_SPLITS if name in names and name not in (train, test)), test)
    if val is None:
        found = ", ".join(map(repr, sorted(names)[:10]))
        raise EvaluationError(
            f"{split.path} has no split named {', '.join(VAL_SPLITS)}; it has {found}; name one with --val-split"
        )
    if test is None:
        test = "test" if "test" in names - {train} else val
    for name, option in ((val, "--val-split"), (test, "--test-split")):
        split.require(name, f"name one with {option}")
        if name == train:
            raise EvaluationError(f"{split.path}: {train!r} is trained on; name another split with {option}")
    return train, val, test


def _require_listed(split: Split, names: tuple[str, str, str], listing: Listing) -> None:
    wanted = {id for id, part in split.parts.items() if part in names}
    missing = wanted - {entry.id for entry in listing.files} - {failure.id for failure in listing.failures}
    if missing:
        example = f"; ids look like {listing.files[0].id!r}" if len(listing.files) else ""
        raise EvaluationError(
            f"{len(missing):,} of {counted(len(wanted), 'path')} in {split.path} are not among the images of "
            f"{listing.root}, such as {min(missing)!r}{example}"
        )


def _divided(
    listing: Listing, labels: list[str | None], parts: npt.NDArray[np.str_], names: tuple[str, str, str], made: bool
) -> Division:
    """Return the division of images with these labels and parts; empty and None stand for neither."""
    known = np.array([bool(label) for label in labels], dtype=np.bool_)
    inside = np.isin(parts, names)
    _require_labels(listing, labels, known, inside, made)
    classes = sorted({str(labels[row]) for row in np.flatnonzero(known & (parts == names[0])).tolist()})
    if len(classes) < 2:
        found = f"are of the class {classes[0]!r}" if classes else "have no class"
        raise EvaluationError(f"{listing.root}: all training images {found}; there must be at least two classes")
    _require_single(listing, classes)
    codes = {name: code for code, name in enumerate(classes)}

    def part(name: str) -> Examples:
        rows = np.flatnonzero(known & (parts == name))
        found = [str(labels[row]) for row in rows.tolist()]
        _require_known(name, found, codes)
        return Examples(name, Taken(listing.files, rows), np.array([codes[one] for one in found], dtype=np.int64))

    train, val = part(names[0]), part(names[1])
    if not len(val):
        raise EvaluationError(
            f"{listing.root}: no class has two different images, so none can be held out to choose the best epoch on"
        )
    test = val if names[2] == names[1] else part(names[2])
    return Division(listing, classes, train, val, test, made, int((~(known & inside)).sum()))


def _require_single(listing: Listing, classes: list[str]) -> None:
    """Raise where classes are numbers to predict, and warn where they look like several labels in one."""
    try:
        broken = [name for name in classes if not float(name).is_integer()]
    except (ValueError, OverflowError):  # Names, as they should be.
        broken = []
    if broken:
        raise EvaluationError(
            f"{listing.root}: the classes are numbers such as {broken[0]}, and fine-tuning learns classes; name "
            "another column with --columns label=NAME"
        )
    several = [name for name in classes if ";" in name]
    if several:
        log.warning(
            "%d of %d classes look like several labels, such as %r; each is learned as one class of its own",
            len(several), len(classes), several[0],
        )  # fmt: skip


def _require_labels(
    listing: Listing, labels: list[str | None], known: npt.NDArray[np.bool_], inside: npt.NDArray[np.bool_], made: bool
) -> None:
    """Raise when no image has a class, or one that a split file names has none."""
    bare = np.flatnonzero(inside & ~known)
    if not known.any():
        raise EvaluationError(
            f"{listing.root}: no image has a class; put the images into a folder for each class, name a table with a "
            "column label, or a split file with one (--split)"
        )
    if len(bare) and not made:
        raise EvaluationError(
            f"{counted(len(bare), 'image')} of the split have no class, such as {listing.files[int(bare[0])].id!r}; "
            "fill in the column label, or drop the lines"
        )


def _require_known(name: str, labels: list[str], codes: Mapping[str, int]) -> None:
    unseen = Counter(label for label in labels if label not in codes)
    if unseen:
        some = ", ".join(f"{label!r} ({count})" for label, count in unseen.most_common(5))
        raise EvaluationError(
            f"the split {name!r} has {counted(len(unseen), 'class')} that no training image has: {some}; "
            "move some of their images to the training part, or drop the lines"
        )
