"""Images that are frames of videos, at a rate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.sources.entries import Entries, Listing, by_bytes, classes_of, first_folder, require_inside, status_of
from embedkit.sources.videos.decoders import Decoders, Video, import_av

# Without .ts, which is TypeScript more often than MPEG; a video that is named itself may be called anything.
VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf",
    ".ogv", ".vob", ".webm", ".wmv",
)  # fmt: skip
_FEW_FRAMES = 10_000  # As many are listed of any video, however small its file.
_BYTES_A_FRAME = 32  # And one more for each of so many bytes: what claims to hold more is a lie or a still.
_SIGN = "#t="


class _Rate(NamedTuple):
    """Frames a second, and the decimals with which their times are written."""

    fps: Fraction
    decimals: int

    @classmethod
    def of(cls, fps: float | str | Fraction) -> _Rate:
        """Return a rate whose times are written exactly where six decimals do, and in milliseconds or finer if not."""
        try:
            rate = Fraction(str(fps))  # 29.97 is what it says, and not the nearest binary number.
        except (ValueError, ZeroDivisionError):
            rate = Fraction(0)
        if not Fraction(1, 86_400) <= rate <= 1000:
            raise ValueError(f"fps is a number above 0, from a frame a day to 1000 a second, got {fps!r}")
        exact = next((places for places in range(1, 7) if (10**places / rate).denominator == 1), None)
        return cls(rate, exact or (3 if rate <= 100 else 6))

    @property
    def unit(self) -> int:
        """Return how often a second is divided."""
        return int(10**self.decimals)

    def count(self, seconds: Fraction) -> int:
        """Return how many frames are taken of a video."""
        return max(1, ceil(seconds * self.fps))

    def times(self, count: int) -> npt.NDArray[np.int64]:
        """Return the times of the first frames in units, sorted as their texts are.

        They are rounded up, so that a player which is sent to that time shows that frame.
        """
        times = [-(-number * self.unit * self.fps.denominator // self.fps.numerator) for number in range(count)]
        texts = np.array([self.text(time) for time in times], dtype="S")
        return np.array(times, dtype=np.int64)[np.argsort(texts, kind="stable")]

    def text(self, time: int) -> str:
        """Return a time in seconds."""
        return f"{time // self.unit}.{time % self.unit:0{self.decimals}d}"


class VideoFrame(NamedTuple):
    """An image that is the frame of a video which is shown at a time."""

    id: str
    label: str | None
    path: str
    time: Fraction
    step: Fraction
    decoders: Decoders

    def status(self) -> tuple[int, int]:
        """Return size and modification time of the video."""
        return status_of(self.path)

    def read(self) -> npt.NDArray[np.uint8]:
        """Return its pixels, upright."""
        try:
            return self.decoders.read(self.path, self.id, self.time, self.step)
        except ImageError as error:  # A frame may have been tried on the way to another.
            raise (error if error.id == self.id else ImageError(self.id, error.reason, error.kind)) from None


@dataclass(frozen=True)
class _Frames(Entries):
    """The frames of some videos."""

    root: str
    videos: Sequence[str]
    ends: npt.NDArray[np.int64]  # How many frames there are up to the end of each.
    times: npt.NDArray[np.int64]
    rate: _Rate
    shaped: bool
    decoders: Decoders

    def __len__(self) -> int:
        return len(self.times)

    def entry(self, number: int) -> VideoFrame:
        video = self.videos[int(np.searchsorted(self.ends, number, side="right"))]
        time = int(self.times[number])
        return VideoFrame(
            f"{video}{_SIGN}{self.rate.text(time)}", first_folder(video) if self.shaped else None,
            os.path.join(self.root, video), Fraction(time, self.rate.unit), 1 / self.rate.fps, self.decoders,
        )  # fmt: skip


def list_video(path: str | os.PathLike[str], fps: float | str | Fraction = 1) -> Listing:
    """List frames of a video, without decoding any.

    Parameters
    ----------
    path : path-like
        The video.
    fps : number or str, default 1
        Frames a second, such as 1, 0.2 or "30000/1001". The frame of a time is the one that a player shows then: the
        last that has begun. Times count from the first frame.

    Returns
    -------
    Listing
        Without classes. An id ends in its time in seconds, ``clip.mp4#t=12.0``, rounded up in its last decimal. All
        times of a rate have as many decimals: as many as they need, up to six, and otherwise three.

    Raises
    ------
    ImageError
        When there is no such file, or no video in it.
    MissingExtraError
        When PyAV is not installed.

    Examples
    --------
    >>> from embedkit.sources.videos.listing import list_video
    >>> [frame.id for frame in list_video("clip.mp4", fps=2).files]  # doctest: +SKIP
    ['clip.mp4#t=0.0', 'clip.mp4#t=0.5', 'clip.mp4#t=1.0']
    """
    path = os.path.abspath(path)
    listing = list_videos(os.path.dirname(path), [os.path.basename(path)], fps)
    if not listing.files:
        raise ImageError(path, listing.failures[0].reason, listing.failures[0].kind)
    return listing


def list_videos(
    root: str | os.PathLike[str], videos: Sequence[str], fps: float | str | Fraction = 1, *, shaped: bool = False
) -> Listing:
    """List frames of the videos below a folder, without decoding any; each video is opened to see how long it is.

    Parameters
    ----------
    root : path-like
        The folder.
    videos : sequence of str
        Paths relative to it.
    fps : number or str, default 1
        See `list_video`.
    shaped : bool, default False
        Whether the class of a frame is the first folder of its video.

    Returns
    -------
    Listing
        A video that cannot be opened is one failure. Of one that claims to be longer than its file can be, not all
        frames are listed, and that is a failure too.

    Raises
    ------
    MissingExtraError
        When PyAV is not installed.
    """
    root, rate = os.fspath(root), _Rate.of(fps)
    import_av()
    # A frame's id begins with its video's, so this is the order of the frames.
    ordered = sorted(videos, key=lambda video: os.fsencode(video + _SIGN))
    failures: list[ImageError] = []
    found: list[tuple[str, int]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="embedkit-videos") as pool:
        for video, count in zip(ordered, pool.map(lambda video: _count(root, video, rate), ordered), strict=True):
            if isinstance(count, ImageError):
                failures.append(count)
                continue
            most = _most_frames(os.path.join(root, video))
            if count > most:
                reason = f"it claims {count:,} frames at this rate; only the first {most:,} are listed"
                failures.append(ImageError(video, reason, "too-large"))
            found.append((video, min(count, most)))
    times = [rate.times(count) for _, count in found]
    return Listing(
        Path(root),
        _Frames(
            root, [video for video, _ in found], np.cumsum([count for _, count in found], dtype=np.int64),
            np.concatenate([np.empty(0, dtype=np.int64), *times]), rate, shaped, Decoders(),
        ),
        classes_of(first_folder(video) for video, _ in found) if shaped else [],
        sorted(failures, key=by_bytes),
        0,
    )  # fmt: skip


def _most_frames(path: str) -> int:
    return max(_FEW_FRAMES, status_of(path)[0] // _BYTES_A_FRAME)


def _count(root: str, id: str, rate: _Rate) -> int | ImageError:
    """Return how many frames are taken of a video, or why none is."""
    try:
        if _SIGN in require_inside(id):
            raise ImageError(id, f"a video whose name holds {_SIGN!r} would share ids with another", "refused")
        path = os.path.join(root, id)
        video = Video(path, id)
        try:
            count = rate.count(_seconds(video))
            if count > _most_frames(path):
                count = rate.count(_measured(video))
            return count
        finally:
            video.close()
    except ImageError as error:
        return error


def _seconds(video: Video) -> Fraction:
    """Return how long a video is."""
    stream, start = video.stream, video.start * video.time_base
    if stream.duration is not None:
        return Fraction(max(0, stream.duration * stream.time_base))
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")  # Of Matroska: 00:00:04.000000000
    minutes, _, seconds = rest.partition(":")
    try:
        return max(Fraction(0), int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds) - start)
    except (ValueError, ZeroDivisionError):
        pass
    # The longest of its streams, which may be another, or nothing at all.
    longest = Fraction(video.container.duration or 0, video.av.time_base) - start
    if longest <= 0:
        return _measured(video)
    measured = _measured(video, video.start + int(longest / video.time_base))
    return measured if longest - 1 <= measured else longest


def _measured(video: Video, near: int | None = None) -> Fraction:
    """Return when the last frame ends; the file is read, from near a time stamp if given, but nothing decoded."""
    end = video.start
    with suppress(video.av.error.FFmpegError):  # What cannot seek is still where it was opened.
        video.container.seek(video.start if near is None else near, stream=video.stream)
    with suppress(video.av.error.FFmpegError):  # Where it breaks off.
        for packet in video.container.demux(video.stream):
            if packet.pts is not None:
                end = max(end, packet.pts + (packet.duration or 0))
    return (end - video.start) * video.time_base
