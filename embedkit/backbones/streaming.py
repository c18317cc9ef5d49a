"""The pipeline: decode in threads, forward in batches, in order, in bounded memory."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError

Item = TypeVar("Item")
Output = TypeVar("Output")
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Batch(Generic[Item, Output]):
    """What became of a batch: the items that were embedded and their embeddings, and the items that failed."""

    items: list[Item]
    embeddings: Output
    failures: list[tuple[Item, ImageError]]


def stream(
    batches: Iterable[Sequence[Item]],
    pixels: Callable[[Item], Pixels],
    embed: Callable[[Sequence[Pixels]], Output],
    *,
    workers: int | None = None,
) -> Iterator[Batch[Item, Output]]:
    """Embed a stream of batches in order.

    Parameters
    ----------
    batches : iterable of sequences
        Of anything that `pixels` understands; read only a batch ahead. An item that fails leaves its batch smaller,
        and every other batch as it is: which images share a pass depends on nothing but this argument.
    pixels : callable
        Returns an item's crop as uint8 of shape (h, w, 3), or raises ImageError. Called in worker threads, because
        decoders let go of the interpreter lock.
    embed : callable
        Returns the embeddings of b crops, which may be none. Called in the caller's thread.
    workers : int, optional
        Decoding threads; by default one for each usable processor.

    Yields
    ------
    Batch
        One for each of `batches`.
    """
    source = iter(batches)
    with ThreadPoolExecutor(workers or usable_processors(), thread_name_prefix="embedkit-decode") as pool:
        waiting: deque[list[tuple[Item, Future[Pixels]]]] = deque()

        def refill() -> None:
            # One batch is on its way through the network while the next is being decoded.
            for batch in itertools.islice(source, 2 - len(waiting)):
                waiting.append([(item, pool.submit(pixels, item)) for item in batch])

        try:
            refill()
            while waiting:
                good: list[Item] = []
                crops: list[Pixels] = []
                failures: list[tuple[Item, ImageError]] = []
                for item, future in waiting.popleft():
                    try:
                        crops.append(future.result())
                        good.append(item)
                    except ImageError as error:
                        failures.append((item, error))
                refill()
                yield Batch(good, embed(crops), failures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def in_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Yield items in lists of `batch_size`, the last one shorter."""
    source = iter(items)
    while batch := list(itertools.islice(source, batch_size)):
        yield batch


def usable_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
