"""Frames out of videos: the one that is shown at a time, from a few open decoders that many readers share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.images.formats import MAX_PIXELS
from embedkit.sources.videos.containers import Video, VideoFile, failure_of

OPEN_DECODERS = 6  # Ids sort like text, so that readers alternate between as many places as seconds have digits.
_KEPT = 8  # Frames that a decoder has passed and another reader is about to ask for.
_PATIENCE = Fraction(1)  # Seconds that a decoder goes on rather than seeks, until it knows better.
_BACK = (0, 1, 5, 30)  # Seconds that a seek tries further back when it came out too late.


class _Moment(NamedTuple):
    """A frame, the time stamp from which it is shown, and what is known against it."""

    at: int
    frame: Any
    after_gap: bool  # What was to be shown before it is damaged.
    damaged: bool


def _moments(video: Video, *, sought: bool) -> Iterator[_Moment]:
    """Decode from where the file stands to its end, or to where it breaks off.

    After a seek and after damage it begins at the next key frame, without what is shown before and refers further back.
    """
    codec, failure = video.stream.codec_context, video.av.error.FFmpegError
    waiting, gap, tainted, first, last = sought, False, False, None, video.start
    packets: Iterator[Any] = video.container.demux(video.stream)
    while True:
        frames: list[Any] = []
        try:
            packet = next(packets, None)
            if packet is None:
                return
            is_end = packet.dts is None and not packet.size
            if not is_end and (not packet.size or (waiting and not packet.is_keyframe)):
                continue  # An empty packet, of AVI, says that nothing changes.
            if waiting and not is_end:
                waiting, first = False, packet.pts
        except failure:
            packet = None  # The file breaks off here.
        broken = packet is None or packet.is_corrupt
        try:
            frames = [] if packet is None or packet.is_corrupt else packet.decode()
        except failure:
            broken = True
        for frame in _drained(codec, failure) if broken else frames:
            at = frame.pts if frame.pts is not None else frame.dts if frame.dts is not None else last + 1
            if first is not None and at < first:
                continue
            tainted = frame.is_corrupt or (tainted and not frame.key_frame)
            last = at
            yield _Moment(at, frame, gap, tainted)
            gap = False
        if packet is None:
            return
        if broken:
            codec.flush_buffers()
            waiting = gap = True


def _drained(codec: Any, failure: type[Exception]) -> list[Any]:
    """Return the frames that the decoder holds back."""
    try:
        return list(codec.decode(None))
    except failure:
        return []


@dataclass
class _Clip:
    """What its decoders have learned of a video."""

    file: VideoFile
    id: str
    patience: Fraction = _PATIENCE
    end: tuple[int, int] | None = None  # Of the last frame there is: from when it is shown, and until when.


class _Decoder:
    """One place in a video, from where decoding goes on."""

    def __init__(self, clip: _Clip) -> None:
        self.clip = clip
        self.lock = threading.Lock()
        # These three belong to the pool: where the place will be when everybody is served, who waits, what is kept.
        self.goal, self.users, self.promised = Fraction(-1), 0, OrderedDict[Fraction, None]()
        self._kept: OrderedDict[Fraction, Any] = OrderedDict()
        self._video: Video | None = None
        self._now: _Moment | None = None
        self._ahead: _Moment | None = None
        self._moments: Iterator[_Moment] = iter(())

    def close(self) -> None:
        """Close the video."""
        self._moments, self._now, self._ahead = iter(()), None, None
        self._kept.clear()
        if self._video is not None:
            self._video.close()
            self._video = None

    def read(self, time: Fraction, passed: Sequence[Fraction]) -> Any:
        """Return the frame that is shown at a time, and keep those that are shown at some times on the way there."""
        if time not in self._kept:
            for earlier in passed:
                if earlier not in self._kept and not self._is_behind(earlier):
                    self._kept[earlier] = self._attempt(earlier)
            self._kept[time] = self._attempt(time)
        found = self._kept.pop(time)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        if self._video is not None:  # Looked at after decoding: what was written meanwhile may be in the frame.
            self._video.require_unchanged()
        if isinstance(found, ImageError):
            raise found
        return found

    def _attempt(self, time: Fraction) -> Any:
        try:
            return self._shown(time)
        except ImageError as error:
            return error
        except Exception as error:
            self.close()  # Decoding would not go on from here.
            return failure_of(error, self.clip.id)

    def _is_behind(self, time: Fraction) -> bool:
        return self._video is not None and self._now is not None and self._video.stamp(time) < self._now.at

    def _shown(self, time: Fraction) -> Any:
        video = self._video or self._rewind()
        target, a_second = video.stamp(time), int(1 / video.time_base)
        if self.clip.end is not None and target >= self.clip.end[1]:
            raise self._ended(video)
        here = video.start if self._now is None else self._now.at
        if target < here or (target - here) * video.time_base > self.clip.patience:
            video = self._seek(video, target)
        self._advance(target)
        now, ahead = self._now, self._ahead
        if now is None and ahead is not None and not ahead.after_gap and ahead.at - target <= a_second:
            now = ahead  # Nothing is shown before the first frame.
        if ahead is None and now is not None:
            self.clip.end = (now.at, now.at + int(now.frame.duration or a_second))
            if target >= self.clip.end[1]:
                raise self._ended(video)
        lost = ahead is not None and ahead.after_gap and (now is None or target >= now.at + (now.frame.duration or 1))
        if now is None or now.damaged or lost:
            raise ImageError(self.clip.id, "this part of the video is damaged", "damaged")
        return now.frame

    def _ended(self, video: Video) -> ImageError:
        last, _ = self.clip.end or (video.start, 0)
        seconds = float((last - video.start) * video.time_base)
        return ImageError(self.clip.id, f"the video breaks off: its last frame is at {seconds:.3f} s", "truncated")

    def _advance(self, target: int) -> None:
        """Go on until the next frame is one too late."""
        while self._ahead is None or self._ahead.at <= target:
            self._now, self._ahead = self._ahead or self._now, None
            self._ahead = next(self._moments, None)
            if self._ahead is None:
                return

    def _seek(self, video: Video, target: int) -> Video:
        """Go to a key frame before a time stamp; to the very first frame where none is found."""
        before = None if self._now is None else self._now.at
        for seconds in _BACK:
            at = target - int(seconds / video.time_base)
            if at <= video.start:
                break
            try:
                video.container.seek(at, stream=video.stream)
            except video.av.error.FFmpegError:
                break
            self._moments, self._now = _moments(video, sought=True), None
            self._ahead = next(self._moments, None)
            if self._ahead is not None and (self._ahead.at <= target or self._ahead.after_gap):
                if before is not None and self._ahead.at <= before <= target:  # Going on would have been shorter.
                    self.clip.patience = max(self.clip.patience, 2 * (target - self._ahead.at) * video.time_base)
                return video
        return self._rewind()

    def _rewind(self) -> Video:
        if self._video is not None:
            self._video.close()
        self._video, self._moments, self._now, self._ahead = None, iter(()), None, None
        self._video = Video(self.clip.file.path, self.clip.id, self.clip.file)
        self._moments = _moments(self._video, sought=False)
        return self._video


class Decoders:
    """A few open decoders for the frames of many videos, shared by threads.

    Readers that go through the ids in their order are served from as many places as seconds have digits (2.0 comes
    after 19.0), each of which only goes forward, so that no frame is decoded twice. A place seeks where a key frame is
    nearer than going on.

    Parameters
    ----------
    limit : int
        How many stay open.
    """

    def __init__(self, limit: int = OPEN_DECODERS) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._decoders: list[_Decoder] = []  # The longest unused first.

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoders, (self._limit,)  # Another process opens its own.

    def read(self, file: VideoFile, id: str, time: Fraction, step: Fraction) -> npt.NDArray[np.uint8]:
        """Return the frame that is shown at a time, where others a step apart are read at about the same time.

        Raises
        ------
        ImageError
            When the video is damaged there, has ended, cannot be opened, or is another file than was listed.
        """
        decoder, passed = self._claim(file, id, time, step)
        try:
            with decoder.lock:
                frame = decoder.read(time, passed)
        finally:
            self._release(decoder, time)
        return _upright(frame, id)

    def close(self) -> None:
        """Close all videos; reading opens them again."""
        with self._lock:
            idle = [decoder for decoder in self._decoders if not decoder.users]
            self._decoders = [decoder for decoder in self._decoders if decoder.users]
        for decoder in idle:
            decoder.close()

    def _claim(self, file: VideoFile, id: str, time: Fraction, step: Fraction) -> tuple[_Decoder, list[Fraction]]:
        with self._lock:
            own = [decoder for decoder in self._decoders if decoder.clip.file == file]
            decoder = next((decoder for decoder in own if time in decoder.promised), None)
            passed: list[Fraction] = []
            if decoder is None:
                behind = max((one for one in own if one.goal <= time), key=lambda one: one.goal, default=None)
                if behind is not None and time - behind.goal <= behind.clip.patience:
                    times = (time - count * step for count in range(_KEPT, 0, -1))
                    decoder, passed = behind, [earlier for earlier in times if earlier > behind.goal]
                elif behind is not None and not behind.users and time - behind.goal <= 2 * step:
                    decoder = behind
                else:
                    decoder = self._free(own[0].clip if own else _Clip(file, id))
                decoder.goal = time
                decoder.promised.update(dict.fromkeys(passed))
            decoder.users += 1
            if decoder in self._decoders:
                self._decoders.remove(decoder)
            self._decoders.append(decoder)
            return decoder, passed

    def _free(self, clip: _Clip) -> _Decoder:
        """Return a decoder that nobody uses, at any place."""
        idle = [decoder for decoder in self._decoders if not decoder.users]
        if len(self._decoders) < self._limit or not idle:
            return _Decoder(clip)
        if idle[0].clip is clip:
            return idle[0]
        self._decoders.remove(idle[0])
        idle[0].close()
        return _Decoder(clip)

    def _release(self, decoder: _Decoder, time: Fraction) -> None:
        with self._lock:
            decoder.users -= 1
            decoder.promised.pop(time, None)
            while len(decoder.promised) > _KEPT:
                decoder.promised.popitem(last=False)
            if len(self._decoders) > self._limit and not decoder.users:
                self._decoders.remove(decoder)
                decoder.close()


def _upright(frame: Any, id: str) -> npt.NDArray[np.uint8]:
    """Return the pixels of a frame as its display matrix turns and mirrors them."""
    if frame.width * frame.height > MAX_PIXELS:
        raise ImageError(id, f"{frame.width} x {frame.height} pixels are more than {MAX_PIXELS:,}", "too-large")
    try:
        if frame.format.name.startswith("yaf32"):  # Converting these ends the process.
            raise ValueError
        pixels: npt.NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    except MemoryError as error:
        raise failure_of(error, id) from error
    except Exception as error:
        reason = f"FFmpeg does not convert its pixels, {frame.format.name}, to RGB"
        raise ImageError(id, reason, "unsupported") from error
    for datum in frame.side_data:
        if datum.type.name == "DISPLAYMATRIX":
            right, across, _, down_across, down = np.frombuffer(bytes(datum), dtype="=i4")[:5].tolist()
            if abs(across) > abs(right):  # Columns become rows.
                pixels, right, down = pixels.swapaxes(0, 1), down_across, across
            pixels = pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
    return np.ascontiguousarray(pixels)
