from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embedkit import ImageError
from embedkit.sources.videos import containers, decoders
from embedkit.sources.videos.listing import VIDEO_SUFFIXES, VideoFrame, list_video, list_videos
from embedkit.sources.videos.rates import Rate

av = pytest.importorskip("av")

BITS, BLOCK = 12, 16
Pixels = npt.NDArray[np.uint8]


def picture(number: int) -> Pixels:
    """A frame that says its number in black and white, under a red stripe."""
    pixels = np.zeros((4 * BLOCK, BITS * BLOCK, 3), dtype=np.uint8)
    pixels[:BLOCK, :, 0] = 255
    for bit in range(BITS):
        if number >> bit & 1:
            pixels[BLOCK:, bit * BLOCK : (bit + 1) * BLOCK] = 255
    return pixels


def number_in(pixels: Pixels) -> int:
    row = pixels[5 * BLOCK // 2, BLOCK // 2 :: BLOCK, 1] > 128
    return int((row << np.arange(BITS)).sum())


def make(
    path: Path, count: int = 60, *, fps: int = 10, codec: str = "mpeg4", gop: int = 12, stamps: list[int] | None = None,
    container: dict[str, str] | None = None, bframes: int = 0, format: str | None = None, **options: str,
) -> Path:  # fmt: skip
    with av.open(os.fspath(path), "w", format=format, options=container or {}) as video:
        stream = video.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = BITS * BLOCK, 4 * BLOCK, "yuv420p"
        stream.gop_size, stream.options = gop, options
        stream.codec_context.max_b_frames = bframes
        clock = 1000 if codec != "mpeg2video" else fps  # MPEG-2 knows a few rates only.
        stream.codec_context.time_base = Fraction(1, clock)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = stamps[number] if stamps else number * clock // fps
            frame.time_base = Fraction(1, clock)
            video.mux(stream.encode(frame))
        video.mux(stream.encode(None))
    return path


def numbers(path: Path, fps: float | str = 1) -> dict[str, int]:
    return {frame.id: number_in(np.asarray(frame.read())) for frame in list_video(path, fps).files}


def frames_of(path: Path, fps: float | str = 1) -> list[VideoFrame]:
    """The frames of a video in the order of time."""
    frames = [frame for frame in list_video(path, fps).files if isinstance(frame, VideoFrame)]
    return sorted(frames, key=lambda frame: frame.time)


def decoded(path: Path) -> Callable[[Fraction], int]:
    """Decode a video from its first frame to its last, and return what is shown at a time."""
    with av.open(os.fspath(path)) as video:
        stream = video.streams.video[0]
        frames = [
            (frame.pts - stream.start_time, number_in(frame.to_ndarray(format="rgb24")))
            for frame in video.decode(stream)
        ]
        tick = stream.time_base
    return lambda time: [number for _, number in takewhile(lambda one: one[0] * tick <= time + tick / 2, frames)][-1]


def failures_of(path: Path, fps: float = 1) -> tuple[list[int], list[tuple[str, str]]]:
    """The frames that can be read, and why the others cannot, both in the order of time."""
    good, bad = [], []
    for frame in frames_of(path, fps):
        try:
            good.append(number_in(np.asarray(frame.read())))
        except ImageError as error:
            assert error.id == frame.id
            bad.append((error.kind, error.reason))
    return good, bad


@pytest.mark.parametrize(
    ("fps", "ids"),
    [
        (1, ["0.0", "1.0", "2.0"]),
        (2, ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5"]),
        (4, ["0.00", "0.25"]),
        (3, ["0.000", "0.334", "0.667", "1.000"]),
        ("30000/1001", ["0.000", "0.034", "0.067", "0.101"]),
        (0.5, ["0.0", "2.0"]),
        (0.4, ["0.0", "2.5"]),
    ],
)
def test_an_id_ends_in_the_seconds_with_as_many_decimals_as_the_rate_needs(
    fps: float | str, ids: list[str], tmp_path: Path
) -> None:
    found = [frame.id for frame in list_video(make(tmp_path / "clip.mp4", 30), fps).files]
    assert found[: len(ids)] == [f"clip.mp4#t={id}" for id in ids]


def test_ids_are_sorted_by_bytes_and_unique(tmp_path: Path) -> None:
    found = [frame.id for frame in list_video(make(tmp_path / "clip.mp4", 250), 7).files]
    assert len(set(found)) == len(found) == 175
    assert found == sorted(found, key=os.fsencode)
    assert found.index("clip.mp4#t=10.000") < found.index("clip.mp4#t=2.000")


CONTAINERS = [
    ("mp4", "mpeg4", 0), ("mp4", "libx264", 3), ("mkv", "libx264", 3), ("mov", "mpeg4", 2), ("avi", "mpeg4", 0),
    ("mts", "libx264", 3), ("mpg", "mpeg2video", 2), ("flv", "flv", 0), ("webm", "libvpx", 0), ("ogv", "libtheora", 0),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "codec", "bframes"), CONTAINERS)
def test_each_frame_is_the_one_that_is_shown_at_its_time(suffix: str, codec: str, bframes: int, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    fps = 25 if suffix == "mpg" else 10
    format = "mpegts" if suffix == "mts" else None
    path = make(tmp_path / f"clip.{suffix}", 13 * fps, fps=fps, codec=codec, bframes=bframes, format=format)
    for rate in (1, fps):
        expected = decoded(path)
        assert numbers(path, rate) == {frame.id: expected(frame.time) for frame in frames_of(path, rate)}
    if suffix != "mpg":  # Its time stamps are not the ones that were given.
        assert numbers(path) == {f"{path.name}#t={second}.0": second * fps for second in range(13)}
        assert sorted(numbers(path, fps).values()) == list(range(13 * fps))


def test_frames_of_an_open_group_are_those_of_the_whole_video(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mkv", 120, codec="libx264", bframes=3, gop=10, **{"x264-params": "open-gop=1"})
    frames = list(list_video(path, 10).files)
    random.Random(0).shuffle(frames)
    for frame in frames:
        assert number_in(np.asarray(frame.read())) == round(frame.time * 10)  # type: ignore[attr-defined]


def test_the_last_frame_that_has_begun_is_shown_when_the_rate_varies(tmp_path: Path) -> None:
    stamps = [0, 100, 200, 2900, 3000, 3050, 7900, 8000]
    path = make(tmp_path / "clip.mkv", 8, stamps=stamps)
    assert list(numbers(path).values()) == [0, 2, 2, 4, 5, 5, 5, 5, 7]
    assert numbers(path, 10)["clip.mkv#t=2.9"] == 3


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    stamps = [5000 + 100 * number for number in range(30)]
    for name in ("clip.mkv", "clip.mp4", "clip.mts"):
        path = make(tmp_path / name, 30, stamps=stamps, format="mpegts" if name == "clip.mts" else None)
        assert numbers(path) == {f"{name}#t=0.0": 0, f"{name}#t=1.0": 10, f"{name}#t=2.0": 20}


def test_a_video_that_does_not_say_how_long_it_is_is_measured(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.webm", 35, codec="libvpx", container={"live": "1"})
    with av.open(os.fspath(path)) as video:
        assert video.duration is None
    assert list(numbers(path).values()) == [0, 10, 20, 30]


@pytest.mark.parametrize(("suffix", "codec"), [("flv", "flv"), ("mkv", "mpeg4")])
def test_frames_end_with_the_picture_where_the_sound_lasts_a_little_longer(
    suffix: str, codec: str, tmp_path: Path
) -> None:
    path = tmp_path / f"clip.{suffix}"
    with av.open(os.fspath(path), "w") as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = BITS * BLOCK, 4 * BLOCK, "yuv420p"
        voice = file.add_stream("aac", rate=44100)
        for number in range(20):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        file.mux(stream.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100 * 24 // 10), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        file.mux(voice.encode(frame))
        file.mux(voice.encode(None))
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"NOTATION"))
    assert sorted(numbers(path, 10).values()) == list(range(20))


def turned(path: Path, name: str, matrix: tuple[int, ...]) -> Path:
    """Copy an MP4 with another display matrix."""
    data, one = bytearray(path.read_bytes()), 1 << 16
    start = data.find(b"tkhd") + 44
    a, b, c, d = matrix
    data[start : start + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    other = path.with_name(name)
    other.write_bytes(data)
    return other


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda pixels: pixels),
        ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),  # A phone held upright: a quarter clockwise.
        ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2)),
        ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda pixels: pixels.swapaxes(0, 1)),
    ],
)
def test_frames_are_upright(matrix: tuple[int, ...], turn: Any, tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", 20)
    lying = [frame.read() for frame in list_video(path).files]
    for frame, pixels in zip(list_video(turned(path, "turned.mp4", matrix)).files, lying, strict=True):
        np.testing.assert_array_equal(np.asarray(frame.read()), turn(np.asarray(pixels)))


def test_several_threads_read_the_right_frames_from_few_decoders(tmp_path: Path) -> None:
    paths = [make(tmp_path / f"{name}.mp4", 130, codec="mpeg4", gop=300 if name == "long" else 12)
             for name in ("long", "short")]  # fmt: skip
    listing = list_videos(tmp_path, [path.name for path in paths], 10)
    frames = [frame for frame in listing.files if isinstance(frame, VideoFrame)]
    shuffled = frames.copy()
    random.Random(1).shuffle(shuffled)
    for order in (frames, shuffled[:60]):
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda frame: number_in(frame.read()), order))
        assert found == [round(frame.time * 10) for frame in order]
    pool_of_decoders = frames[0].decoders
    assert len(pool_of_decoders._decoders) <= 6
    before = open_files(paths)
    pool_of_decoders.close()
    assert (before > 0, open_files(paths)) == (True, 0)
    assert number_in(frames[0].read()) == 0


def open_files(paths: list[Path]) -> int:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    wanted = {os.fspath(path) for path in paths}
    return sum(os.path.realpath(f"/proc/self/fd/{fd}") in wanted for fd in os.listdir("/proc/self/fd"))


def test_no_file_stays_open_when_a_listing_is_gone(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", 30)
    for frame in list_video(path).files:
        frame.read()
    del frame
    assert open_files([path]) == 0


@pytest.mark.parametrize(("suffix", "container"), [("mp4", {"movflags": "faststart"}), ("mkv", {}), ("avi", {})])
def test_of_a_video_cut_short_the_frames_before_the_cut_are_read(
    suffix: str, container: dict[str, str], tmp_path: Path
) -> None:
    path = make(tmp_path / f"clip.{suffix}", 200, container=container)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    good, bad = failures_of(path, 2)
    assert good == list(range(0, 5 * len(good), 5))
    assert 10 < len(good) < 40
    if suffix != "avi":  # AVI's reader counts what is there.
        assert len(good) + len(bad) == 40
        assert {kind for kind, _ in bad} == {"truncated"}
        assert {reason[:48] for _, reason in bad} == {"the video breaks off: its last frame is at " + bad[0][1][43:48]}


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damage_costs_the_frames_up_to_the_next_key_frame_and_is_the_same_in_any_order(
    codec: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "clip.mp4", 200, codec=codec, gop=20, container={"movflags": "faststart"})
    with av.open(os.fspath(path)) as video:
        packets = [(packet.pos, packet.size) for packet in video.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for pos, size in packets[85:95]:
        data[pos : pos + size] = b"\xff" * size
    path.write_bytes(data)
    outcomes = []
    for seed in (None, 0, 1):
        frames = list(list_video(path, 10).files)
        if seed is not None:
            random.Random(seed).shuffle(frames)
        outcome = {}
        for frame in frames:
            try:
                outcome[frame.id] = hashlib.sha256(np.asarray(frame.read()).tobytes()).hexdigest()
                number = round(frame.time * 10)  # type: ignore[attr-defined]
                assert number_in(np.asarray(frame.read())) == number
                assert number < 86 or number >= 100
            except ImageError as error:
                assert error.kind == "damaged"
                outcome[frame.id] = error.reason
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert 10 <= sum(" " in value for value in outcomes[0].values()) <= 20


def test_what_is_no_video_is_one_failure(tmp_path: Path) -> None:
    make(tmp_path / "good.mp4", 10)
    (tmp_path / "text.mp4").write_text("nothing of the kind")
    (tmp_path / "empty.mp4").touch()
    data = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])  # Its index is at the end.
    os.mkfifo(tmp_path / "pipe.mp4")
    sound(tmp_path / "sound.mp4")
    names = sorted(path.name for path in tmp_path.iterdir())
    listing = list_videos(tmp_path, [*names, "gone.mp4", "../up.mp4", "x#t=1.mp4"])
    assert [frame.id for frame in listing.files] == ["good.mp4#t=0.0"]
    assert [(failure.id, failure.kind) for failure in listing.failures] == [
        ("../up.mp4", "refused"), ("cut.mp4", "not-an-image"), ("empty.mp4", "empty"), ("gone.mp4", "missing"),
        ("pipe.mp4", "not-an-image"), ("sound.mp4", "not-an-image"), ("text.mp4", "not-an-image"),
        ("x#t=1.mp4", "refused"),
    ]  # fmt: skip
    with pytest.raises(ImageError, match=r"sound\.mp4: there is no video in it"):
        list_video(tmp_path / "sound.mp4")


def sound(path: Path) -> None:
    with av.open(os.fspath(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "RTSPtextrtsp://127.0.0.1:9/{}",
        "<MPD><Period><BaseURL>{}</BaseURL></Period></MPD>",
    ],
)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.ffconcat"])
def test_a_file_never_has_another_one_opened(text: str, name: str, tmp_path: Path) -> None:
    other = make(tmp_path / "other.mp4", 10)
    path = tmp_path / name
    for target in (other.name, os.fspath(other), f"file:{other}", "/etc/passwd", "http://127.0.0.1:9/x.mp4"):
        path.write_text(text.format(target))
        with pytest.raises(ImageError, match="cannot be opened as a video") as caught:
            list_video(path)
        assert caught.value.kind == "not-an-image"


def test_a_movie_that_refers_to_another_file_does_not_have_it_opened(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mov", 10)
    data = bytearray(path.read_bytes())
    at = data.find(b"dref") + 12
    assert data[at + 4 : at + 8] == b"url "
    data[at + 8 : at + 12] = bytes(4)  # The flag that the media are in this very file.
    path.write_bytes(data)
    for frame in list_video(path).files:
        assert number_in(np.asarray(frame.read())) == 0


def test_a_header_cannot_claim_a_billion_seconds(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mkv", 20)
    data = bytearray(path.read_bytes())
    at = data.find(b"\x44\x89\x88") + 3  # The segment's duration.
    data[at : at + 8] = struct.pack(">d", 1e12)
    data = data.replace(b"00:00:02.", b"99999999.")
    path.write_bytes(data)
    assert list(numbers(path).values()) == [0, 10]


def test_of_two_frames_an_age_apart_not_every_second_is_listed(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mkv", 2, stamps=[0, 1_000_000_000], codec="ffv1")
    listing = list_video(path)
    assert len(listing.files) == 10_000
    (failure,) = listing.failures
    assert (failure.id, failure.kind) == ("clip.mkv", "too-large")
    assert "only the first 10,000 are listed" in failure.reason
    assert number_in(np.asarray(listing.files[-1].read())) == 0


@pytest.mark.parametrize("seconds", ["1e0999999999", "9" * 12, "1/0000000000", "-1.000000000"])
def test_a_duration_that_is_none_is_not_worked_out(seconds: str, tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mkv", 20)
    data = path.read_bytes()
    assert data.count(b"00:00:02.000000000") == 1
    path.write_bytes(data.replace(b"00:00:02.000000000", f"00:00:{seconds}".encode()))
    assert list(numbers(path).values()) == [0, 10]


def test_a_hole_in_a_file_holds_no_frames(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mkv", 2, stamps=[0, 1_000_000_000], codec="ffv1")
    os.truncate(path, 100 << 20)
    if os.stat(path).st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no holes")
    assert len(list_video(path).files) == 10_000


def test_a_frame_whose_pixels_cannot_be_converted_is_one_failure(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(os.fspath(path), "w") as video:
        stream = video.add_stream("rawvideo", rate=1)
        stream.width, stream.height, stream.pix_fmt = BITS * BLOCK, 4 * BLOCK, "yuv420p"
        video.mux(stream.encode(av.VideoFrame.from_ndarray(picture(1), format="rgb24")))
        video.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.count(b"I420") == 1
    path.write_bytes(data.replace(b"I420", b"RGB\x04"))
    (frame,) = list_video(path).files
    with pytest.raises(ImageError, match="FFmpeg does not convert its pixels, rgb4, to RGB") as caught:
        frame.read()
    assert (caught.value.id, caught.value.kind) == (frame.id, "unsupported")
    with pytest.raises(ImageError, match="yaf32le"):  # On which FFmpeg aborts.
        decoders._upright(av.VideoFrame(16, 16, "yaf32le"), "x")


class FailingDisk(io.FileIO):
    """A disk that cannot be read behind a place, until it is mended."""

    broken_from = 1 << 40

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() + (size or 0) > FailingDisk.broken_from:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size) or b""


def test_a_disk_that_fails_costs_the_frames_that_it_fails_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "clip.mkv", codec="rawvideo")
    assert path.stat().st_size > 1_000_000  # The first piece that is read is not all of it.
    monkeypatch.setattr(containers.io, "FileIO", FailingDisk)
    frames = frames_of(path)
    monkeypatch.setattr(FailingDisk, "broken_from", path.stat().st_size // 2)
    assert number_in(np.asarray(frames[0].read())) == 0
    with pytest.raises(ImageError, match="Input/output error") as caught:
        frames[-1].read()
    assert (caught.value.id, caught.value.kind) == (frames[-1].id, "unreadable")
    monkeypatch.setattr(FailingDisk, "broken_from", 1 << 40)
    assert number_in(np.asarray(frames[-1].read())) == 50


def test_no_frame_of_another_file_is_taken_for_one_that_was_listed(tmp_path: Path) -> None:
    path, other = make(tmp_path / "clip.mp4", 60), make(tmp_path / "other.mp4", 60, gop=5)
    old, new = path.stat(), other.stat()
    frames = frames_of(path)
    sent = pickle.dumps(frames[1])
    assert number_in(np.asarray(frames[0].read())) == 0
    other.replace(path)
    assert number_in(np.asarray(frames[1].read())) == 10  # Of the old file, which is still open...
    assert frames[1].status() == (old.st_size, old.st_mtime_ns) != (new.st_size, new.st_mtime_ns)
    for frame in (pickle.loads(sent), frames[2]):
        frame.decoders.close()
        with pytest.raises(ImageError, match="has changed since it was listed; run again") as caught:
            frame.read()
        assert (caught.value.id, caught.value.kind) == (frame.id, "unreadable")
    assert [frame.status() for frame in frames_of(path)] == [(new.st_size, new.st_mtime_ns)] * 6


def test_a_video_that_is_written_over_gives_no_frame_until_it_is_listed_again(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", 60)
    frames = frames_of(path)
    frames[0].read()
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    with pytest.raises(ImageError, match="has changed since it was listed"):
        frames[1].read()
    os.truncate(path, len(data) // 2)
    with pytest.raises(ImageError, match="has changed since it was listed"):
        frames[-1].read()
    path.write_bytes(data)
    assert number_in(np.asarray(frames_of(path)[-1].read())) == 50


def test_a_frame_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.avi", 5)
    data = bytearray(path.read_bytes())
    at = data.find(b"strf") + 8
    assert struct.unpack("<ii", data[at + 4 : at + 12]) == (BITS * BLOCK, 4 * BLOCK)
    data[at + 4 : at + 12] = struct.pack("<ii", 30_000, 30_000)
    path.write_bytes(data)
    try:
        listing = list_video(path)
    except ImageError as error:
        assert error.kind == "too-large"
    else:  # FFmpeg believes the stream rather than the container.
        assert np.asarray(listing.files[0].read()).shape == picture(0).shape


def test_labels_are_the_first_folders_and_the_status_is_the_files(tmp_path: Path) -> None:
    for name in ("cat/1.mp4", "dog/deep/2.mp4", "cat/1.mp4 b.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make(tmp_path / name, 20)
    listing = list_videos(tmp_path, ["dog/deep/2.mp4", "cat/1.mp4 b.mp4", "cat/1.mp4"], shaped=True)
    ids = [frame.id for frame in listing.files]
    assert ids == sorted(ids, key=os.fsencode)
    assert [(frame.id, frame.label) for frame in listing.files][::2] == [
        ("cat/1.mp4 b.mp4#t=0.0", "cat"), ("cat/1.mp4#t=0.0", "cat"), ("dog/deep/2.mp4#t=0.0", "dog"),
    ]  # fmt: skip
    assert listing.classes == ["cat", "dog"]
    status = os.stat(tmp_path / "cat/1.mp4")
    assert listing.files[2].status() == (status.st_size, status.st_mtime_ns)
    shutil.rmtree(tmp_path / "cat")
    assert listing.files[2].status() == (status.st_size, status.st_mtime_ns)
    with pytest.raises(ImageError) as caught:
        listing.files[2].read()
    assert (caught.value.id, caught.value.kind) == ("cat/1.mp4#t=0.0", "missing")


@pytest.mark.parametrize("fps", [0, -1, "x", "1/0", "1e999999999", "1//2", 1e9, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(fps: float | str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="fps is a number") as caught:
        list_video(tmp_path / "clip.mp4", fps)
    assert caught.value.id == f"--fps {fps}" and caught.value.kind == "refused"


@pytest.mark.parametrize("fps", ["1", "7", "0.4", "30000/1001", "29.97", 1 / 3, "1/86400", "1000"])
def test_times_are_those_of_exact_arithmetic_in_the_order_of_their_texts(fps: float | str) -> None:
    rate = Rate.of(fps)
    expected = [-(-number * rate.unit * rate.fps.denominator // rate.fps.numerator) for number in range(12_345)]
    assert rate.times(12_345).tolist() == sorted(expected, key=rate.text)


def test_suffixes_are_sorted_and_lower_case() -> None:
    assert list(VIDEO_SUFFIXES) == sorted({suffix.lower() for suffix in VIDEO_SUFFIXES})


def test_reading_in_the_order_of_ids_decodes_every_frame_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, seen = decoders._moments, []

    def counted(*args: Any, **options: Any) -> Iterator[Any]:
        for moment in decode(*args, **options):
            seen.append(moment.at)
            yield moment

    monkeypatch.setattr(decoders, "_moments", counted)
    path = make(tmp_path / "clip.mp4", 1150, gop=10)
    for frame in list_video(path, 2).files:  # 0.0 to 9.5, 10.0, 100.0, 100.5 ...
        assert number_in(np.asarray(frame.read())) == round(frame.time * 10)  # type: ignore[attr-defined]
    assert 1140 <= len(set(seen)) <= len(seen) <= 1190
