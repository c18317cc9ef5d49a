"""The pipeline: read, decode, forward, in order, in bounded memory."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from embedkit.backbones.allocator import kept_memory
from embedkit.errors import ImageError

if TYPE_CHECKING:
    from embedkit.backbones.backbone import Backbone
    from embedkit.backbones.engines import Engine

Item = TypeVar("Item")
Output = TypeVar("Output")
Pixels = npt.NDArray[np.uint8]

_FEEDERS = 2  # Threads that run an accelerator.
_CHUNK = 8  # Images that one thread decodes for an accelerator before it looks for work again.


@dataclass
class Seconds:
    """Where the time of threads went.

    Attributes
    ----------
    read, decode, forward : float
        Summed over the threads that did it.
    """

    read: float = 0.0
    decode: float = 0.0
    forward: float = 0.0

    def add(self, other: Seconds) -> None:
        """Add another one."""
        self.read += other.read
        self.decode += other.decode
        self.forward += other.forward


@dataclass(frozen=True)
class Batch(Generic[Item, Output]):
    """What became of a batch: the items that were embedded and their embeddings, and the items that failed."""

    items: list[Item]
    embeddings: Output
    failures: list[tuple[Item, ImageError]]
    seconds: Seconds


@dataclass(frozen=True)
class Steps(Generic[Item, Output]):
    """What is done to every item.

    Attributes
    ----------
    read : callable
        Returns what an item's pixels are made of, mostly bytes, or raises ImageError.
    decode : callable
        Takes that and the item, and returns the crop as uint8 of shape (h, w, 3), or raises ImageError.
    forward : callable
        Returns the embeddings of b crops, which may be none.
    """

    read: Callable[[Item], Any]
    decode: Callable[[Any, Item], Pixels]
    forward: Callable[[Sequence[Pixels]], Output]


@dataclass
class _Decoded(Generic[Item]):
    items: list[Item] = field(default_factory=list)
    crops: list[Pixels] = field(default_factory=list)
    failures: list[tuple[Item, ImageError]] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)


def stream(
    batches: Iterable[Sequence[Item]],
    steps: Steps[Item, Output],
    *,
    workers: int,
    threads: int = 1,
    accelerator: bool = False,
) -> Generator[Batch[Item, Output], None, None]:
    """Embed a stream of batches in order.

    On a processor every worker takes a batch through all steps by itself, with `threads` threads for each layer of the
    network: nothing waits for anything, and the crops stay in the cache of the core that made them. For an accelerator
    the workers decode and two more threads feed it.

    Parameters
    ----------
    batches : iterable of sequences
        Read only as far ahead as the workers need. An item that fails leaves its batch smaller, and every other batch
        as it is: which images share a pass depends on nothing but this argument.
    steps : Steps
        Called in worker threads: decoders and networks let go of the interpreter lock.
    workers : int
        Worker threads.
    threads : int, default 1
        Threads that a worker's forward pass may use.
    accelerator : bool, default False
        Whether the forward pass runs elsewhere than on the processor.

    Yields
    ------
    Batch
        One for each of `batches`.
    """
    submit, close = _for_accelerator(steps, workers) if accelerator else _for_processor(steps, workers, threads)
    source = iter(batches)
    waiting: deque[Future[Batch[Item, Output]]] = deque()
    # Deep enough that a slow batch at the head, a few large photographs, does not leave the other workers idle.
    depth = 2 + _FEEDERS if accelerator else 3 * workers + 1
    with kept_memory():
        try:
            waiting.extend(submit(batch) for batch in itertools.islice(source, depth))
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(submit(batch) for batch in itertools.islice(source, 1))
                yield done
        finally:
            close()


def _for_processor(steps: Steps[Item, Output], workers: int, threads: int) -> Any:
    """Return a function that takes a batch through all steps in one worker, and one that ends the workers."""
    restore = _keep_thread_count()
    pool = ThreadPoolExecutor(
        workers, thread_name_prefix="embedkit-worker", initializer=torch.set_num_threads, initargs=(threads,)
    )

    def work(batch: Sequence[Item]) -> Batch[Item, Output]:
        return _forward(steps, _decoded(steps, batch))

    def close() -> None:
        pool.shutdown(wait=True, cancel_futures=True)
        restore()

    return lambda batch: pool.submit(work, batch), close


def _for_accelerator(steps: Steps[Item, Output], workers: int) -> Any:
    """Return a function that has a batch decoded by the workers and then fed, and one that ends all of them."""
    restore = _keep_thread_count()
    # Each decoder resizes with one thread, as there is a decoder for every processor.
    options: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
    decoders = ThreadPoolExecutor(workers, thread_name_prefix="embedkit-decode", **options)
    # While one waits for the accelerator, the other puts the next batch together and sends it.
    feeders = ThreadPoolExecutor(_FEEDERS, thread_name_prefix="embedkit-forward", **options)

    def feed(chunks: list[Future[_Decoded[Item]]]) -> Batch[Item, Output]:
        whole: _Decoded[Item] = _Decoded()
        for chunk in chunks:
            part = chunk.result()
            whole.items += part.items
            whole.crops += part.crops
            whole.failures += part.failures
            whole.seconds.add(part.seconds)
        return _forward(steps, whole)

    def submit(batch: Sequence[Item]) -> Future[Batch[Item, Output]]:
        chunks = [decoders.submit(_decoded, steps, batch[k : k + _CHUNK]) for k in range(0, len(batch), _CHUNK)]
        return feeders.submit(feed, chunks)

    def close() -> None:
        decoders.shutdown(wait=True, cancel_futures=True)
        feeders.shutdown(wait=True, cancel_futures=True)
        restore()

    return submit, close


def _decoded(steps: Steps[Item, Output], batch: Sequence[Item]) -> _Decoded[Item]:
    done: _Decoded[Item] = _Decoded()
    clock = time.perf_counter
    for item in batch:
        started = read = clock()
        try:
            source = steps.read(item)
            read = clock()
            done.crops.append(steps.decode(source, item))
            done.items.append(item)
        except ImageError as error:
            done.failures.append((item, error))
        done.seconds.read += read - started
        done.seconds.decode += clock() - read
    return done


def _forward(steps: Steps[Item, Output], done: _Decoded[Item]) -> Batch[Item, Output]:
    started = time.perf_counter()
    embeddings = steps.forward(done.crops)
    done.seconds.forward += time.perf_counter() - started
    return Batch(done.items, embeddings, done.failures, done.seconds)


def embed_many(backbone: Backbone, items: Any, batch_size: int, workers: int | None) -> npt.NDArray[np.float32]:
    """Return the embeddings of a sequence of images, of shape (n, d); the first that cannot be read is an error."""
    processors = usable_processors()
    workers = workers or processors
    count = len(items) if hasattr(items, "__len__") else None  # An iterator may have any number.
    if count is not None:
        workers = max(1, min(workers, -(-count // batch_size)))  # Few images: more threads for each instead.
    threads = max(1, processors // workers)
    forward = backbone.embed_pixels
    if count is not None and count > batch_size * workers:
        sample = [backbone.pixels(image) for image in itertools.islice(items, batch_size)]
        choice = backbone.choose_engine(sample, count, batch_size=batch_size, workers=workers, threads=threads)
        forward = partial(_run_by, backbone, choice.engine)
    steps = Steps(lambda image: image, lambda image, _: backbone.pixels(image), forward)
    accelerator = backbone.device.type != "cpu"
    parts = [np.empty((0, backbone.dim), dtype=np.float32)]
    for batch in stream(
        in_batches(items, batch_size), steps, workers=workers, threads=threads, accelerator=accelerator,
    ):  # fmt: skip
        if batch.failures:
            raise batch.failures[0][1]
        parts.append(batch.embeddings)
    return np.concatenate(parts)


def is_one_image(images: object) -> bool:
    """Return whether something is an image, and not several."""
    # PIL images by name: this room does not import Pillow.
    pil = any(kind.__module__.startswith("PIL.") for kind in type(images).__mro__)
    return pil or isinstance(images, str | bytes | os.PathLike) or getattr(images, "ndim", 4) < 4


def _run_by(backbone: Backbone, engine: Engine, crops: Sequence[Pixels]) -> npt.NDArray[np.float32]:
    return backbone.run(engine, crops, ())[""]


def in_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Yield items in lists of `batch_size`, the last one shorter."""
    source = iter(items)
    while batch := list(itertools.islice(source, batch_size)):
        yield batch


def with_threads(threads: int, work: Callable[[], Output]) -> Output:
    """Return what `work` returns in a thread of its own whose network passes use `threads` threads."""
    restore = _keep_thread_count()
    with kept_memory(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            return pool.submit(work).result()
        finally:
            restore()


_lock = threading.Lock()
_counts: list[int] = []  # What torch's number of threads was when the first of those who change it came, for each.


def _keep_thread_count() -> Callable[[], None]:
    """Return a function that restores torch's number of threads, which workers set for all threads to come."""
    with _lock:
        _counts.append(_counts[0] if _counts else torch.get_num_threads())

    def restore() -> None:
        with _lock:
            before = _counts.pop()
            if not _counts:
                torch.set_num_threads(before)

    return restore


def usable_processors() -> int:
    """Return how many processors this process may use: those it is bound to, and no more than its cgroup allows."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count
