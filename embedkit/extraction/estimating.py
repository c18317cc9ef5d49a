"""estimate: what an extraction would find, take and need, from a listing and a sample."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.backbones import Backbone, Steps, in_batches, stream, usable_processors
from embedkit.errors import BackboneError, ImageError
from embedkit.extraction.computing import read_entry
from embedkit.extraction.extracting import checked_layers, inventory_of, listed
from embedkit.extraction.reporting import peak_memory
from embedkit.images import Data, Header, read_header
from embedkit.sources import Entry, Listing
from embedkit.spec import BUNDLED
from embedkit.store import Store
from embedkit.store.knowledge import gather_known
from embedkit.store.knowledge import unchanged as unchanged_entries
from embedkit.store.tables import lookup

SAMPLE = 512
SECONDS = 10.0
_FRAGMENT = re.compile(r"#(t|xywh)=[0-9.,-]+$")  # Of a frame of a video, or a box.
_FACTS = 8 + 8 + 32 + 4 + 4  # A row's size, time, content hash and label, and its share of the checksums.


@dataclass(frozen=True)
class Estimate:
    """What an extraction would find, take and need.

    Attributes
    ----------
    images, ignored : int
        Images in the listing, and other files.
    unchanged, deleted : int
        Images that a store at the output has already, and rows of it that would go.
    failures : mapping of str to int
        What the listing alone shows to be no image, by kind.
    labels : mapping of str to int
        Images of each class.
    suffixes : mapping of str to int
        Images by the end of their names.
    image_bytes : int
        Size of all images.
    sampled : int
        Images that were read, from all over the listing.
    sample_failures : mapping of str to int
        Those of the sample that could not be read, by kind.
    formats : mapping of str to int
        File formats in the sample.
    pixels : tuple of int
        Smallest, median and largest number of pixels in the sample.
    images_per_second : float
        As measured on the sample, all steps and workers together.
    seconds : float
        What the images that are not in the store would take at that rate. A long run may find a faster engine than
        the eager one that is used here.
    store_bytes : int
        Size of the store.
    needed_bytes, free_bytes : int
        Space that the run needs until it is finished, and space there is.
    memory_bytes : int or None
        Most memory that this process has had while it did the sample.
    """

    images: int
    ignored: int
    unchanged: int
    deleted: int
    failures: dict[str, int]
    labels: dict[str, int]
    suffixes: dict[str, int]
    image_bytes: int
    sampled: int
    sample_failures: dict[str, int]
    formats: dict[str, int]
    pixels: tuple[int, int, int]
    images_per_second: float
    seconds: float
    store_bytes: int
    needed_bytes: int
    free_bytes: int
    memory_bytes: int | None


def estimate(
    images: Any,
    output: str | os.PathLike[str],
    backbone: Backbone | str = BUNDLED,
    *,
    layers: Sequence[str] = (),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Estimate:
    """Estimate what `extract` would find, take and need, without writing anything.

    The listing is counted whole. Up to 512 images from all over it go through the pipeline for about ten seconds.

    Parameters
    ----------
    images, output, backbone, layers, workers
        As for `extract`.
    progress : callable, optional
        Called with how many images of the sample are done, and how many there are.

    Returns
    -------
    Estimate

    Raises
    ------
    ImageError, BackboneError
        As `extract`.

    Examples
    --------
    >>> import embedkit as ek
    >>> ek.estimate("photos/", "photos.h5", "resnet18.a1_in1k").seconds  # doctest: +SKIP
    5400.0
    """
    listing = listed(images)
    output = Path(os.path.realpath(output))
    if not output.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder for the store", os.fspath(output.parent))
    if isinstance(backbone, str):
        backbone = Backbone.load(backbone)
    names = checked_layers(backbone, layers)
    unchanged, deleted = _compare(output, listing, backbone, names)
    count, id_bytes, total_bytes = len(listing.files), 0, 0
    labels: Counter[str] = Counter()
    suffixes: Counter[str] = Counter()
    for file in listing.files:
        id_bytes = max(id_bytes, len(os.fsencode(file.id)))  # Ids are stored at the length of the longest.
        total_bytes += max(0, file.status()[0])
        suffixes[os.path.splitext(_FRAGMENT.sub("", file.id))[1].lower()] += 1
        if file.label is not None:
            labels[file.label] += 1
    waiting = count - unchanged
    measured = _Measured()
    if waiting:
        measured = _measure(listing, backbone, names, workers or usable_processors(), progress)
    width = 4 * sum(backbone.layer_spec(layer).dim for layer in ("", *names))
    share = 1 - len(measured.failures) / max(1, measured.read)
    rows = round(count * share)
    sizes = sorted(header.width * header.height for header in measured.headers) or [0]
    store_bytes = rows * (width + id_bytes + _FACTS)
    return Estimate(
        images=count,
        ignored=listing.ignored,
        unchanged=unchanged,
        deleted=deleted,
        failures=dict(Counter(failure.kind for failure in listing.failures)),
        labels=dict(labels),
        suffixes=dict(suffixes.most_common()),
        image_bytes=total_bytes,
        sampled=measured.read,
        sample_failures=dict(Counter(failure.kind for failure in measured.failures)),
        formats=dict(Counter(header.format for header in measured.headers).most_common()),
        pixels=(sizes[0], sizes[len(sizes) // 2], sizes[-1]),
        images_per_second=measured.rate,
        seconds=waiting / measured.rate if measured.rate else 0.0,
        store_bytes=store_bytes,
        needed_bytes=2 * store_bytes,  # The parts stay until the store is whole.
        free_bytes=shutil.disk_usage(output.parent).free,
        memory_bytes=peak_memory(),
    )


def _compare(output: Path, listing: Listing, backbone: Backbone, layers: Sequence[str]) -> tuple[int, int]:
    """Return how many images a store at the output holds as they are, and how many of its rows would go."""
    if not output.exists():
        return 0, 0
    base = Store.open(output)
    base.spec.require_same(backbone.spec, f"{output} was made otherwise; choose another name, or replace it")
    if set(base.layers) != set(layers):
        raise BackboneError(f"{output} has the layers {', '.join(base.layers) or 'none'}; choose another name")
    images = inventory_of(listing)
    _, settled = unchanged_entries(gather_known(base, ()), images, retry_failed=False)
    return int(settled.sum()), int((lookup(images.ids, base.images.ids) < 0).sum())


@dataclass
class _Measured:
    """What was seen of a sample."""

    read: int = 0
    failures: list[ImageError] = field(default_factory=list)
    headers: list[Header] = field(default_factory=list)
    rate: float = 0.0


def _measure(
    listing: Listing,
    backbone: Backbone,
    layers: Sequence[str],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> _Measured:
    """Take a sample through the pipeline until the time is up."""
    measured = _Measured()
    total = min(SAMPLE, len(listing.files))
    chosen = np.linspace(0, len(listing.files) - 1, total).astype(int)
    # Not in their order, so that what is done when the time is up is from all over the listing.
    chosen = np.random.default_rng(0).permutation(chosen)
    end = time.perf_counter() + SECONDS

    def read(entry: Entry) -> Data:
        data = read_entry(entry)
        # A header may be what a decoder hangs on, and then this process is not the one to read it.
        header = read_header(data) if backbone.time_limit is None else None
        measured.headers += [] if header is None else [header]
        return data

    def batches() -> Iterator[list[Entry]]:
        for batch in in_batches((listing.files[number] for number in chosen.tolist()), backbone.batch_size):
            if time.perf_counter() > end:
                return
            yield batch

    steps = Steps(
        read, lambda data, entry: backbone.pixels(data, id=entry.id), lambda crops: backbone.embed_layers(crops, layers)
    )
    accelerator = backbone.device.type != "cpu"
    started, late, timed = time.perf_counter(), None, 0
    with closing(stream(batches(), steps, workers=workers, accelerator=accelerator)) as done:
        for number, batch in enumerate(done, start=1):
            size = len(batch.items) + len(batch.failures)
            measured.read += size
            measured.failures += [error for _, error in batch.failures]
            if number == workers:  # The first pass of each worker also sets up what the others use.
                late = time.perf_counter()
            elif late is not None:
                timed += size
            if progress is not None:
                progress(measured.read, total)
    now = time.perf_counter()
    if late is not None and timed:
        measured.rate = timed / (now - late)
    elif measured.read:
        measured.rate = measured.read / (now - started)
    return measured
