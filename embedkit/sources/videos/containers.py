"""Videos as files: the container, the stream in it that is watched, and whether it is the file that was listed."""

from __future__ import annotations

import io
import math
import os
import stat
import weakref
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

from embedkit.errors import ImageError, MissingExtraError
from embedkit.images.formats import MAX_PIXELS
from embedkit.text import printable

# The containers that are read. Others, such as playlists and "concat", name further files and URLs and open them.
FORMATS = "mov,matroska,avi,mpeg,mpegts,flv,asf,ogg,mxf"
_HALF = Fraction(1, 2)


def import_av() -> ModuleType:
    """Return PyAV."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise MissingExtraError("av", "video") from error
    return av


class VideoFile(NamedTuple):
    """The file of a video, and what tells it from another one that comes to its place."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> VideoFile:
        """Return a file as its status describes it."""
        return cls(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Video:
    """An open video: its container, and the stream in it that is watched.

    It is read through a file object of ours, and FFmpeg may open no other file or URL on its account. Where it is known
    which file was listed, no other is read.
    """

    def __init__(self, path: str, id: str, listed: VideoFile | None = None) -> None:
        self.av, self.id = import_av(), id
        self._descriptor = file = _open(path, id)
        self._finalizer = weakref.finalize(self, file.close)
        self.status = os.fstat(file.fileno())
        self.file = listed or VideoFile.of(path, self.status)
        limit = {"max_pixels": str(MAX_PIXELS)}
        try:
            self.require_unchanged()
            self.container = self.av.open(
                file, "r", container_options={"format_whitelist": FORMATS, "protocol_whitelist": "none"},
                options=limit, io_open=_refuse, metadata_errors="replace", buffer_size=1 << 17,
            )  # fmt: skip
            self.stream = self._watched()
        except Exception as error:
            file.close()
            raise (error if isinstance(error, ImageError) else self._unopened(error)) from None
        self.stream.codec_context.options = limit
        self.stream.thread_type = "SLICE"  # Threads for frames would tell of damage late, and hold many frames.
        self.start: int = self.stream.start_time or 0
        self.time_base: Fraction = self.stream.time_base

    def stamp(self, time: Fraction) -> int:
        """Return the time stamp at a time after the beginning, rounded as those of the frames are."""
        return self.start + math.floor(time / self.time_base + _HALF)

    def require_unchanged(self) -> None:
        """Raise when the open file is not the one that was listed, or is no longer as it was."""
        if VideoFile.of(self.file.path, os.fstat(self._descriptor.fileno())) != self.file:
            raise ImageError(self.id, "the video has changed since it was listed; run again", "unreadable")

    def close(self) -> None:
        """Close the video and its file."""
        self.container.close()
        self._finalizer()

    def _watched(self) -> Any:
        """Return the stream to watch: not the cover of an album."""
        streams = [stream for stream in self.container.streams.video if "attached_pic" not in str(stream.disposition)]
        if not streams:
            raise ImageError(self.id, "there is no video in it", "not-an-image")
        best = self.container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None or not stream.time_base:
            raise ImageError(self.id, "FFmpeg has no decoder for its video", "unsupported")
        if stream.width * stream.height > MAX_PIXELS:
            reason = f"{stream.width} x {stream.height} pixels are more than {MAX_PIXELS:,}"
            raise ImageError(self.id, reason, "too-large")
        return stream

    def _unopened(self, error: Exception) -> ImageError:
        reason = "cannot be opened as a video: it is something else, cut short, or of a format that is not read"
        kind = "unreadable" if isinstance(error, OSError) else "not-an-image"
        return ImageError(self.id, reason, kind)


def _open(path: str, id: str) -> io.FileIO:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # Opening a named pipe would wait for its other end.
            raise ImageError(id, "not a regular file", "not-an-image")
        file = io.FileIO(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise ImageError(id, "no such file", "missing") from error
        raise failure_of(error, id) from error
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError(id, "no file can be called so", "missing") from error
    if not os.fstat(file.fileno()).st_size:
        file.close()
        raise ImageError(id, "the file is empty", "empty")
    return file


def failure_of(error: Exception, id: str) -> ImageError:
    """Return what is wrong with an image when something else fails than FFmpeg on the video: the disk, the memory."""
    if isinstance(error, OSError):
        kind = "permission" if isinstance(error, PermissionError) else "unreadable"
        return ImageError(id, error.strerror or type(error).__name__, kind)
    reason = " ".join(f"it cannot be decoded: {type(error).__name__}: {error}".split())
    return ImageError(id, printable(reason), "unreadable" if isinstance(error, MemoryError) else "damaged")


def _refuse(url: str, flags: int, options: dict[str, str]) -> None:
    raise PermissionError("a video may not open other files")
