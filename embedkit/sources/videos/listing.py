"""Images that are frames of videos, at a rate."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.sources.entries import Entries, Listing, by_bytes, classes_of, first_folder, require_inside
from embedkit.sources.videos.containers import Video, VideoFile, failure_of, import_av
from embedkit.sources.videos.decoders import Decoders
from embedkit.sources.videos.rates import Rate

# Without .ts, which is TypeScript more often than MPEG; a video that is named itself may be called anything.
VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf",
    ".ogv", ".vob", ".webm", ".wmv",
)  # fmt: skip
_FEW_FRAMES = 10_000  # As many are listed of any video, however small its file.
_BYTES_A_FRAME = 32  # And one more for each of so many bytes: what claims to hold more is a lie or a still.
_SIGN = "#t="
_DURATION = re.compile(r"([0-9]{1,6}):([0-9]{1,2}):([0-9]{1,2}(?:\.[0-9]{1,12})?)")  # Of Matroska: 00:00:04.000000000


class VideoFrame(NamedTuple):
    """An image that is the frame of a video which is shown at a time."""

    id: str
    label: str | None
    file: VideoFile
    time: Fraction
    step: Fraction
    decoders: Decoders

    def status(self) -> tuple[int, int]:
        """Return size and modification time of the video as it was listed: no other one is read."""
        return self.file.size, self.file.mtime_ns

    def read(self) -> npt.NDArray[np.uint8]:
        """Return its pixels, upright."""
        try:
            return self.decoders.read(self.file, self.id, self.time, self.step)
        except ImageError as error:  # A frame may have been tried on the way to another.
            raise (error if error.id == self.id else ImageError(self.id, error.reason, error.kind)) from None


@dataclass(frozen=True)
class _Frames(Entries):
    """The frames of some videos."""

    videos: Sequence[str]
    files: Sequence[VideoFile]
    ends: npt.NDArray[np.int64]  # How many frames there are up to the end of each.
    times: npt.NDArray[np.int64]
    rate: Rate
    shaped: bool
    decoders: Decoders

    def __len__(self) -> int:
        return len(self.times)

    def entry(self, number: int) -> VideoFrame:
        which = int(np.searchsorted(self.ends, number, side="right"))
        video, time = self.videos[which], int(self.times[number])
        return VideoFrame(
            f"{video}{_SIGN}{self.rate.text(time)}", first_folder(video) if self.shaped else None, self.files[which],
            Fraction(time, self.rate.unit), 1 / self.rate.fps, self.decoders,
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
    root, rate = os.fspath(root), Rate.of(fps)
    import_av()
    # A frame's id begins with its video's, so this is the order of the frames.
    ordered = sorted(videos, key=lambda video: os.fsencode(video + _SIGN))
    failures: list[ImageError] = []
    found: list[_Found] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="embedkit-videos") as pool:
        for one in pool.map(lambda video: _look(root, video, rate), ordered):
            if isinstance(one, ImageError):
                failures.append(one)
                continue
            if one.claimed > one.taken:
                reason = f"it claims {one.claimed:,} frames at this rate; only the first {one.taken:,} are listed"
                failures.append(ImageError(one.id, reason, "too-large"))
            found.append(one)
    times = [rate.times(one.taken) for one in found]
    return Listing(
        Path(root),
        _Frames(
            [one.id for one in found], [one.file for one in found], np.cumsum(list(map(len, times)), dtype=np.int64),
            np.concatenate([np.empty(0, dtype=np.int64), *times]), rate, shaped, Decoders(),
        ),
        classes_of(first_folder(one.id) for one in found) if shaped else [],
        sorted(failures, key=by_bytes),
        0,
    )  # fmt: skip


class _Found(NamedTuple):
    """A video, how many frames are taken of it, and how many it claims to have."""

    id: str
    file: VideoFile
    taken: int
    claimed: int


def _look(root: str, id: str, rate: Rate) -> _Found | ImageError:
    """Return how many frames are taken of a video, or why none is."""
    try:
        if _SIGN in require_inside(id):
            raise ImageError(id, f"a video whose name holds {_SIGN!r} would share ids with another", "refused")
        video = Video(os.path.join(root, id), id)
        try:
            most = _most_frames(video.status)
            count = rate.count(_seconds(video))
            if count > most:
                count = rate.count(_measured(video))
            return _Found(id, video.file, min(count, most), count)
        finally:
            video.close()
    except ImageError as error:
        return error
    except Exception as error:
        return failure_of(error, id)


def _most_frames(status: os.stat_result) -> int:
    """Return how many frames a file can hold; holes hold none, where the file system knows them."""
    used = getattr(status, "st_blocks", 0) * 512 or status.st_size
    return max(_FEW_FRAMES, min(used, status.st_size) // _BYTES_A_FRAME)


def _seconds(video: Video) -> Fraction:
    """Return how long a video is."""
    stream, start = video.stream, video.start * video.time_base
    if stream.duration is not None:
        return Fraction(max(0, stream.duration * stream.time_base))
    if said := _DURATION.fullmatch(stream.metadata.get("DURATION", "")):
        return max(Fraction(0), int(said[1]) * 3600 + int(said[2]) * 60 + Fraction(said[3]) - start)
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
