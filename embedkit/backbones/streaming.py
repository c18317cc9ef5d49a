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
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """What became of some consecutive items: embeddings of shape (len(items), d), and the items that failed."""

    items: list[Item]
    embeddings: npt.NDArray[np.float32]
    failures: list[tuple[Item, ImageError]]


def stream(
    items: Iterable[Item],
    pixels: Callable[[Item], Pixels],
    embed: Callable[[Sequence[Pixels]], npt.NDArray[np.float32]],
    *,
    batch_size: int = 32,
    workers: int | None = None,
) -> Iterator[Batch[Item]]:
    """Embed a stream of items in order.

    Parameters
    ----------
    items : iterable
        Anything that `pixels` understands; it is read only a few batches ahead.
    pixels : callable
        Returns an item's crop as uint8 of shape (h, w, 3), or raises ImageError. Called in worker threads, because
        decoders let go of the interpreter lock.
    embed : callable
        Returns the embeddings (b, d) of b crops, which may be none. Called in the caller's thread.
    batch_size : int, default 32
        Images a forward pass.
    workers : int, optional
        Decoding threads; by default one for each usable processor.

    Yields
    ------
    Batch
        Until the items end. A failed item takes no other item along.
    """
    source = iter(items)
    with ThreadPoolExecutor(workers or usable_processors(), thread_name_prefix="embedkit-decode") as pool:
        waiting: deque[tuple[Item, Future[Pixels]]] = deque()

        def refill() -> None:
            # One batch is on its way through the network while the next is being decoded.
            for item in itertools.islice(source, 2 * batch_size - len(waiting)):
                waiting.append((item, pool.submit(pixels, item)))

        try:
            refill()
            while waiting:
                good: list[Item] = []
                crops: list[Pixels] = []
                failures: list[tuple[Item, ImageError]] = []
                while waiting and len(good) < batch_size:
                    item, future = waiting.popleft()
                    try:
                        crops.append(future.result())
                        good.append(item)
                    except ImageError as error:
                        failures.append((item, error))
                refill()
                yield Batch(good, embed(crops), failures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def usable_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
