"""Several devices: a process for each computes parts of the plan, and this one hands them out.

The processes hold no lock and decide nothing. Each asks for a part when it needs one, so that a slow device holds
nobody back, writes it durably under the lock of the process that started it, and says so. One that dies loses what it
had not written: that goes to another one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import torch

from embedkit.backbones import Backbone
from embedkit.errors import BackboneError
from embedkit.extraction.computing import Job, News, NumberedPart, compute_parts
from embedkit.sources.entries import Entries
from embedkit.sources.videos.decoders import Decoders
from embedkit.spec import EmbeddingSpec
from embedkit.store import PartWriter

log = logging.getLogger("embedkit")


@dataclass(frozen=True)
class Assignment:
    """All that a process needs to know before it asks for parts.

    Attributes
    ----------
    device : str
    spec, recipe
        Of the backbone, which it loads for itself.
    layers : tuple of str
    engine : str
        Chosen by the process that started it, so that all of them compute the same bits.
    batch_size, workers, threads, max_pixels : int
    time_limit : float or None
    write : PartWriter
    log_level : int
    """

    device: str
    spec: EmbeddingSpec
    recipe: Mapping[str, Any]
    layers: tuple[str, ...]
    engine: str
    batch_size: int
    workers: int
    threads: int
    max_pixels: int
    time_limit: float | None
    write: PartWriter
    log_level: int


@dataclass(frozen=True)
class _Shared:
    """What many images refer to, such as their listing: it is sent once, and called by its number from then on."""

    number: int
    data: bytes


# What a process says, beside `News`.


@dataclass(frozen=True)
class _Question:
    """May I have another part? With `patient`, the answer may wait until there is one, or never will be."""

    patient: bool


@dataclass(frozen=True)
class _Line:
    level: int
    text: str


@dataclass(frozen=True)
class _Failure:
    error: BaseException
    trace: str


@dataclass(frozen=True)
class _End:
    status: int


def compute_on_devices(parts: Iterator[NumberedPart], job: Job, write: PartWriter) -> Generator[News, None, None]:
    """Compute parts in a process for each device of a job.

    Raises
    ------
    BackboneError
        When all of the processes have died. What they wrote is kept.
    """
    desk, events = _Desk(parts), queue.SimpleQueue[tuple[_Process, Any]]()
    plan = Assignment(
        "", job.backbone.spec, job.backbone.recipe, job.layers, job.engine.name, job.engine.batch_size, job.workers,
        job.threads, job.backbone.max_pixels, job.backbone.time_limit, write, log.getEffectiveLevel(),
    )  # fmt: skip
    processes: list[_Process] = []
    torch.cuda.empty_cache()  # What choosing the engine took of the first GPU.
    try:
        for device in job.devices:
            processes.append(_Process(device, plan, desk, events))
        yield from _told(events, len(processes))
        if not desk.finished:
            raise BackboneError(
                f"the processes of all devices have ended ({', '.join(map(str, processes))}) before the work has; what "
                "they wrote is kept, and the same command goes on from there"
            )
    finally:
        desk.close()
        for process in processes:
            process.end()
        write.sweep()


def _told(events: queue.SimpleQueue[tuple[_Process, Any]], alive: int) -> Iterator[News]:
    """Yield the news of all processes until the last of them has ended."""
    while alive:
        process, event = events.get()
        if isinstance(event, News):
            yield event
        elif isinstance(event, _Line):
            log.log(event.level, "%s: %s", process.device, event.text)
        elif isinstance(event, _Failure):
            raise event.error from RuntimeError(f"in the process of {process.device}:\n{event.trace}")
        else:
            alive -= 1
            if event.status:
                log.warning("the process of %s; %s", process, f"{alive} go on" if alive else "it was the last")


class _Desk:
    """Hands out parts, and takes back those of processes that died."""

    def __init__(self, parts: Iterator[NumberedPart]) -> None:
        self._parts = parts
        self._returned: deque[NumberedPart] = deque()
        self._taken: dict[int, tuple[object, NumberedPart]] = {}
        self._counted: dict[int, tuple[int, int]] = {}  # Images, and failures among them.
        self._changed = threading.Condition()
        self._closed = False

    def take(self, taker: object, *, patient: bool) -> NumberedPart | None:
        """Return the next part, or None when there is none now; with patience, when there never will be."""
        with self._changed:
            while not self._closed:
                part = self._returned.popleft() if self._returned else next(self._parts, None)
                if part is not None:
                    self._taken[part[0]] = taker, part
                    return part
                if not patient or not self._taken:
                    return None
                self._changed.wait()
        return None

    def note(self, news: News) -> None:
        """Note what has been computed and written of the parts that are taken."""
        with self._changed:
            images, failures = self._counted.get(news.part, (0, 0))
            self._counted[news.part] = images + news.images, failures + len(news.failures)
            for number in news.written:
                self._taken.pop(number, None)
                self._counted.pop(number, None)
            self._changed.notify_all()

    def give_back(self, taker: object) -> News:
        """Take back what a process has not written, and return what is therefore not computed after all."""
        with self._changed:
            lost = [part for owner, part in self._taken.values() if owner is taker]
            counted = [self._counted.pop(number, (0, 0)) for number, _ in lost]
            for part in lost:
                del self._taken[part[0]]
            self._returned.extendleft(reversed(lost))
            self._changed.notify_all()
        return News(images=-sum(images for images, _ in counted), forgotten=sum(failures for _, failures in counted))

    @property
    def finished(self) -> bool:
        """Whether every part was handed out and written."""
        with self._changed:
            return not self._taken and not self._returned and next(self._parts, None) is None

    def close(self) -> None:
        """Send home whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Process:
    """A process, and the thread that talks to it."""

    def __init__(self, device: str, plan: Assignment, desk: _Desk, events: queue.SimpleQueue[Any]) -> None:
        self.device, self._desk, self._events = device, desk, events
        environment = dict(os.environ)
        kind, _, index = device.partition(":")
        if kind == "cuda":
            # It sees this GPU alone, under the name of the first: libraries touch whatever GPU comes first.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)].strip() if visible else index
        self._plan = replace(plan, device=kind)
        # Not `multiprocessing`, which runs the caller's script again. A session of its own, so that Ctrl-C reaches this
        # process alone, which ends the others: they end when their standard input does.
        self._popen = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
        )  # fmt: skip
        self._shared: dict[int, tuple[int, object]] = {}  # The objects too, so that no other one gets their addresses.
        self._thread = threading.Thread(target=self._talk, name=f"embedkit-{device}", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return f"{self.device} ended with status {self._popen.returncode}"

    def _talk(self) -> None:
        try:
            self._send(self._plan)
            while (message := self._receive()) is not None:
                if isinstance(message, _Question):
                    self._send(self._desk.take(self, patient=message.patient))
                    continue
                if isinstance(message, News):
                    self._desk.note(message)
                self._events.put((self, message))
        except BaseException as error:  # An image that cannot be sent, or a listing that fails.
            self._events.put((self, _Failure(error, traceback.format_exc())))
        status = self._popen.wait()
        self._events.put((self, self._desk.give_back(self)))
        self._events.put((self, _End(status)))

    def _send(self, message: object) -> None:
        self._write(self._encoded(message))

    def _encoded(self, message: object) -> bytes:
        buffer = io.BytesIO()
        _Pickler(buffer, message, self._share).dump(message)
        return buffer.getvalue()

    def _share(self, thing: object) -> int:
        """Return the number of something shared, which the process has got before it reads of it."""
        if id(thing) not in self._shared:
            number = len(self._shared)
            self._shared[id(thing)] = number, thing
            self._write(pickle.dumps(_Shared(number, self._encoded(thing))))
        return self._shared[id(thing)][0]

    def _write(self, data: bytes) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has died, which the next message does not come from.
            self._popen.stdin.write(data)
            self._popen.stdin.flush()

    def _receive(self) -> object:
        assert self._popen.stdout is not None
        try:
            return pickle.load(self._popen.stdout)  # From our own child; None at its end.
        except (EOFError, pickle.UnpicklingError):
            return None  # Cut short: it was killed while it spoke.

    def end(self) -> None:
        """End the process, which loses what it has not written, and wait for it."""
        self._popen.kill()
        self._thread.join()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class _Pickler(pickle.Pickler):
    """Puts the numbers of shared things in their place."""

    def __init__(self, file: BinaryIO, root: object, share: Callable[[object], int]) -> None:
        super().__init__(file)
        self._root, self._share = root, share

    def persistent_id(self, thing: object) -> int | None:
        """Return the number of what is shared, and None for all else."""
        return self._share(thing) if isinstance(thing, Entries | Decoders) and thing is not self._root else None


class _Unpickler(pickle.Unpickler):
    """Finds shared things by their numbers."""

    def __init__(self, file: BinaryIO, shared: Mapping[int, Any]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, number: int) -> Any:
        """Return the shared thing of a number."""
        return self._shared[number]


# In the process of a device.


def serve() -> None:
    """Compute parts for the process that started this one, as long as it has any and is there."""
    channel = _Channel(os.fdopen(os.dup(1), "wb"), sys.stdin.buffer)
    os.dup2(2, 1)  # What libraries print does not get between the messages.
    try:
        assignment = channel.receive()
        log.setLevel(assignment.log_level)
        log.propagate = False
        log.addHandler(_Relay(channel.send))
        with contextlib.ExitStack() as stack:
            job = _job(assignment, stack)
            while (part := channel.ask(patient=True)) is not None:
                for news in compute_parts(_following(part, channel), job, assignment.write):
                    channel.send(news)
    except BaseException as error:
        channel.send(_Failure(_sendable(error), traceback.format_exc()))
    os._exit(0)  # The listener is in the middle of a read, which an ordinary end would wait for.


def _job(assignment: Assignment, stack: contextlib.ExitStack) -> Job:
    backbone = Backbone.reload(
        assignment.spec, assignment.recipe, device=assignment.device, max_pixels=assignment.max_pixels
    )
    if assignment.time_limit is not None:
        backbone = stack.enter_context(backbone.isolated(assignment.time_limit))
    choice = backbone.choose_engine(
        [], 1, layers=assignment.layers, engine=assignment.engine, batch_size=assignment.batch_size,
        workers=assignment.workers, threads=assignment.threads,
    )  # fmt: skip
    return Job(backbone, assignment.layers, choice.engine, assignment.workers, assignment.threads)


def _following(part: NumberedPart | None, channel: _Channel) -> Iterator[NumberedPart]:
    while part is not None:
        yield part
        part = channel.ask(patient=False)


@dataclass
class _Channel:
    """The way to the process that started this one, which ends when that does."""

    out: BinaryIO
    into: BinaryIO
    _inbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        shared: dict[int, Any] = {}
        while True:
            try:
                message = _Unpickler(self.into, shared).load()
                if isinstance(message, _Shared):
                    shared[message.number] = _Unpickler(io.BytesIO(message.data), shared).load()
                else:
                    self._inbox.put(message)
            except EOFError:
                os._exit(1)  # Nobody is there any more, whatever is going on here.
            except Exception as error:  # An image of a class that is not to be had here.
                self._inbox.put(error)
                return

    def receive(self) -> Any:
        """Return the next message."""
        message = self._inbox.get()
        if isinstance(message, Exception):
            raise message
        return message

    def send(self, message: object) -> None:
        """Send a message, from any thread."""
        with self._lock:
            self.out.write(pickle.dumps(message))
            self.out.flush()

    def ask(self, *, patient: bool) -> NumberedPart | None:
        """Ask for a part."""
        self.send(_Question(patient))
        part: NumberedPart | None = self.receive()
        return part


class _Relay(logging.Handler):
    """Sends what the library logs."""

    def __init__(self, send: Callable[[object], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self._send(_Line(record.levelno, record.getMessage()))


def _sendable(error: BaseException) -> BaseException:
    """Return an error, or one that says the same where it does not survive the way."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # Classes may define what they like.
        pass
    return BackboneError(f"{type(error).__name__}: {error}")
