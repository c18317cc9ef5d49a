"""Images through a backbone in order and in bounded memory, for those who want no store."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone, Batch, Steps, in_batches, stream, usable_processors
from embedkit.extraction.computing import read_entry, sample_crops
from embedkit.sources import Entry, Listing

Embedded: TypeAlias = Batch[Entry, npt.NDArray[np.float32]]


def embed_batches(
    listing: Listing, backbone: Backbone, *, batch_size: int | None = None, workers: int | None = None
) -> Generator[Embedded, None, None]:
    """Embed the images of a listing batch by batch, in their order.

    The engine is chosen as `extract` chooses it: a long listing gets the fastest whose numbers are those of eager
    float32.

    Parameters
    ----------
    listing : Listing
        Its own failures are not repeated.
    backbone : Backbone
        What embeds.
    batch_size : int, optional
        Images a forward pass; by default 8 on a processor, and 256 on a GPU.
    workers : int, optional
        Worker threads; by default one for each usable processor.

    Yields
    ------
    Batch
        The entries that were embedded, their embeddings of shape (b, d), and the entries that failed with the reason.
    """
    size, workers, count = batch_size or backbone.batch_size, workers or usable_processors(), len(listing.files)
    crops = sample_crops(listing.files, backbone) if count > 4 * size else []
    engine = backbone.choose_engine(crops, count, batch_size=size, workers=workers).engine
    steps = Steps(
        read_entry, lambda data, entry: backbone.pixels(data, id=entry.id),
        lambda crops: backbone.run(engine, crops, ())[""],
    )  # fmt: skip
    batches = in_batches(iter(listing.files), engine.batch_size)
    accelerator = backbone.device.type != "cpu"
    with closing(stream(batches, steps, workers=workers, accelerator=accelerator)) as done:
        yield from done
