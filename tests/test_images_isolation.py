from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedkit.errors import FAILURE_KINDS, EmbedkitError, ImageError
from embedkit.images import DECODERS, Isolated, Region, read_crop
from embedkit.spec import Preprocessing

SMALL = Preprocessing(img_size=(8, 8))
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the decoders of this file use signals")


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Isolated]]:
    """Makes an Isolated whose decoder does what the bytes say."""
    monkeypatch.syspath_prepend(str(HERE))
    made: list[Isolated] = []

    def make(seconds: float = 60.0, memory_bytes: int = 1 << 30) -> Isolated:
        made.append(Isolated(SMALL, seconds=seconds, memory_bytes=memory_bytes, function="bad_decoders:obey"))
        return made[-1]

    yield make
    for isolated in made:
        isolated.close()


def pid_of(read: Isolated) -> int:
    return int.from_bytes(read(b"hello")[0, 0].tobytes(), "little")


def failure(read: Isolated, order: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read(order, id="a/b.jpg")
    assert caught.value.id == "a/b.jpg" and caught.value.kind in FAILURE_KINDS
    return caught.value


def gone(pid: int, within: float = 30.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            # Whoever is left without a parent waits as a zombie where nobody collects it.
            state = Path(f"/proc/{pid}/stat")
            if state.parent.parent.joinpath("self").exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("decoder", DECODERS.values())
def test_a_crop_is_that_of_read_crop_in_every_bit(photos: Path, decoder: str) -> None:
    preprocessing = Preprocessing(img_size=(48, 64), decoder=decoder)
    paths = sorted(photos.rglob("*.jpg"))[:3]
    pixels = np.random.default_rng(0).integers(0, 65536, (50, 70, 3), dtype=np.uint16)
    with Isolated(preprocessing) as read:
        for source in [*paths, paths[0].read_bytes(), pixels, pixels[::2, ::3, 0]]:
            assert (read(source) == read_crop(source, preprocessing)).all()


def test_a_failure_is_that_of_read_crop(photos: Path, tmp_path: Path) -> None:
    whole = next(photos.rglob("*.jpg")).read_bytes()
    with Isolated(SMALL) as read:
        for source in [b"", b"no image", whole[:2000], np.zeros((2, 2, 7)), tmp_path / "none.jpg", tmp_path]:
            with pytest.raises(ImageError) as expected:
                read_crop(source, SMALL)
            with pytest.raises(ImageError) as found:
                read(source)
            assert (found.value.reason, found.value.kind) == (expected.value.reason, expected.value.kind)
        with pytest.raises(TypeError, match="bytes, a Region or an array, not int"):
            read(7)


def test_a_region_arrives_as_one(bad: Callable[..., Isolated]) -> None:
    assert bad()(Region(b"sleep", (1, 2, 3, 4)))[0, :5, 0].tolist() == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("order", [b"sleep", b"loop", b"signal SIGSTOP"])
def test_a_decoder_that_hangs_costs_its_image_only(bad: Callable[..., Isolated], order: bytes) -> None:
    read = bad(seconds=1.5)
    before = pid_of(read)
    error = failure(read, order)
    assert (error.reason, error.kind) == ("took longer than 1.5 s to decode", "timeout")
    assert gone(before) and pid_of(read) != before


@pytest.mark.parametrize(
    ("order", "how"), [(b"signal SIGSEGV", "signal 11"), (b"signal SIGKILL", "signal 9"), (b"exit 3", "exit code 3")]
)
def test_a_decoder_that_ends_its_process_costs_its_image_only(
    bad: Callable[..., Isolated], order: bytes, how: str
) -> None:
    read = bad()
    error = failure(read, order)
    assert (error.reason, error.kind) == (f"the decoder ended its process ({how})", "timeout")
    assert pid_of(read)


def test_an_image_is_not_blamed_for_a_child_that_another_one_hurt(bad: Callable[..., Isolated]) -> None:
    read = bad()
    before = pid_of(read)
    assert read(b"hurt").shape == (8, 8, 3)
    assert pid_of(read) != before


def test_a_decoder_that_closes_the_connection_is_ended(bad: Callable[..., Isolated]) -> None:
    read = bad()
    before = pid_of(read)
    assert failure(read, b"close").reason == "the decoder ended its process (it stopped answering)"
    assert gone(before)


def test_a_stopped_child_is_too_late_even_for_a_large_file(bad: Callable[..., Isolated]) -> None:
    read = bad(seconds=1.0)
    before = pid_of(read)
    os.kill(before, signal.SIGSTOP)
    assert failure(read, b"hello " + bytes(8 << 20)).kind == "timeout"
    assert gone(before) and pid_of(read) != before


def test_a_child_killed_between_images_costs_none(bad: Callable[..., Isolated]) -> None:
    read = bad()
    before = pid_of(read)
    os.kill(before, signal.SIGKILL)
    assert gone(before) and pid_of(read) != before


def test_interrupting_is_for_the_parent(bad: Callable[..., Isolated]) -> None:
    read = bad()
    before = pid_of(read)
    assert os.getsid(before) != os.getsid(0)
    os.kill(before, signal.SIGINT)
    assert pid_of(read) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux keeps the limit")
def test_a_decoder_that_takes_too_much_memory_fails(bad: Callable[..., Isolated]) -> None:
    read = bad(memory_bytes=256 << 20)
    before = pid_of(read)
    assert read(b"allocate 100000000").shape == (8, 8, 3)
    assert failure(read, b"allocate 1000000000").kind == "too-large"
    assert pid_of(read) == before


def test_an_exception_of_whatever_kind_is_a_failure(bad: Callable[..., Isolated]) -> None:
    read = bad()
    before = pid_of(read)
    error = failure(read, b"raise two\nlines \x1b[2J" + b"\xc2\x80" * 100_000)
    assert error.kind == "damaged"
    assert error.reason.startswith("cannot be decoded: two lines ?[2J") and len(error.reason) <= 500
    assert pid_of(read) == before


def frame(word: int, length: int, rest: bytes = b"") -> bytes:
    return struct.pack("<BI", word, length) + rest


def failed(**values: object) -> bytes:
    text = json.dumps(values).encode()
    return frame(2, len(text), text)


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff" * 100, frame(1, 1 << 31), frame(1, 191), frame(0, 0), frame(2, 1 << 31), frame(2, 2, b"\xff\xff"),
        frame(2, 4000, b"[" * 4000), frame(2, 2, b"[]"), failed(reason="so", kind="none"),
        failed(reason=1, kind="empty"), failed(kind="empty"), failed(reason="so", kind=["empty"]),
    ],
    ids=lambda answer: answer[:16].hex(),
)  # fmt: skip
def test_nonsense_from_a_child_is_not_believed(bad: Callable[..., Isolated], answer: bytes) -> None:
    read = bad()
    before = pid_of(read)
    error = failure(read, b"write " + answer.hex().encode())
    assert (error.reason, error.kind) == ("the decoder answered with neither pixels nor a reason", "damaged")
    assert gone(before)


def test_what_a_decoder_prints_goes_nowhere(bad: Callable[..., Isolated], capfd: pytest.CaptureFixture[str]) -> None:
    read = bad()
    assert read(b"print noise").shape == (8, 8, 3)
    assert capfd.readouterr() == ("", "")


def test_every_thread_has_a_child_and_closing_leaves_none(bad: Callable[..., Isolated]) -> None:
    orders = [b"hello"] * 40
    orders[5] = orders[20] = b"exit 1"
    orders[33] = b"sleep"
    with bad(seconds=3.0) as read, ThreadPoolExecutor(3) as pool:
        pids, failures = set(), []

        def one(number: int) -> None:
            try:
                pids.add(int.from_bytes(read(orders[number], id=str(number))[0, 0].tobytes(), "little"))
            except ImageError as error:
                failures.append(error.id)

        list(pool.map(one, range(40)))
    assert sorted(failures) == ["20", "33", "5"]
    assert 1 <= len(pids) <= 6 and os.getpid() not in pids
    assert all(gone(pid, within=0.1) for pid in pids)
    with pytest.raises(ValueError, match="closed"):
        read(b"hello")


def test_a_child_that_cannot_start_says_why() -> None:
    with Isolated(SMALL, function="embedkit.images.pixels:no_such") as read:
        for _ in range(2):
            with pytest.raises(EmbedkitError, match=r"does not start: AttributeError: .*no_such"):
                read(b"hello")
    with (
        Isolated(SMALL, function="os:_exit") as read,
        pytest.raises(ImageError, match="at most 1 argument"),
    ):
        read(b"hello")


@pytest.mark.parametrize("order", ["hello", "sleep", "loop"])
def test_a_child_ends_with_its_parent(tmp_path: Path, order: str) -> None:
    code = f"""
import sys, threading
sys.path.insert(0, {str(HERE)!r})
from embedkit.images import Isolated
from embedkit.spec import Preprocessing
read = Isolated(Preprocessing(img_size=(8, 8)), seconds=5, function="bad_decoders:obey")
print(int.from_bytes(read(b"hello")[0, 0].tobytes(), "little"), flush=True)
read({order.encode()!r})
threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path.cwd()) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        time.sleep(0.2)  # Until it is at work; it must end in any case.
        parent.kill()
    assert gone(child)
