"""A process for each of several devices, which here are processors: the same store, whatever becomes of them."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner

from embedkit import Backbone, BackboneError, ImageError, Store, extract
from embedkit.backbones import device_names
from embedkit.cli import main
from embedkit.extraction import Progress
from embedkit.extraction.computing import News
from embedkit.extraction.devices import _Desk
from embedkit.sources import Listing
from embedkit.sources.entries import Entries
from embedkit.sources.folders import list_folder
from embedkit.sources.videos.listing import list_video

TWO = ("cpu", "cpu")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the processes are found in /proc")


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return Backbone.load(tiny_backbone, device="cpu")


@pytest.fixture(scope="module")
def alone(photos: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store that one process makes."""
    return extract(photos, tmp_path_factory.mktemp("alone") / "s.h5", backbone, batch_size=4, layers=("max",))


def children(parent: int) -> list[int]:
    """Return the processes of devices that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = stat.with_name("cmdline").read_bytes()
        except OSError:
            continue  # It has ended meanwhile.
        if int(fields[1]) == parent and fields[0] != "Z" and b"embedkit.extraction.devices" in command:
            found.append(int(stat.parent.name))
    return sorted(found)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_several_processes_make_the_store_of_one(
    photos: Path, backbone: Backbone, alone: Store, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    together = extract(
        photos, tmp_path / "s.h5", backbone, batch_size=4, part_size=4, layers=("max",), devices=TWO, workers=2,
        progress=seen.append, report=tmp_path / "run.json",
    )  # fmt: skip
    assert together.content_id == alone.content_id and together.ids == alone.ids
    assert together.embeddings.tobytes() == alone.embeddings.tobytes()
    assert seen[-1].done == seen[-1].committed == seen[-1].total == 24
    assert [now.done for now in seen] == sorted(now.done for now in seen)
    assert seen[-1].measured.images_per_second > 0 and 0 < seen[-1].measured.forward < 1
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["devices"] == ["cpu", "cpu"] and report["workers"] == 1
    assert sorted(os.listdir(tmp_path)) == ["run.json", "s.h5"]


def test_unreadable_images_are_recorded_wherever_they_were_read(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    files = sorted(photos.glob("*/*"))[:10]
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    stores = [
        extract([*files, bad], tmp_path / f"{len(devices)}.h5", backbone, batch_size=2, part_size=2, devices=devices)
        for devices in ((), ("cpu",), TWO)
    ]
    assert len({store.content_id for store in stores}) == 1
    assert [failure.id.rpartition("/")[2] for failure in stores[2].failures] == ["bad.jpg"]


@needs_proc
def test_what_a_killed_process_had_begun_is_computed_by_another(
    photos: Path, backbone: Backbone, alone: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first: list[int] = []
    second: list[int] = []

    def stop_the_second() -> None:
        while len(found := children(os.getpid())) < 2:
            time.sleep(0.005)
        os.kill(found[1], signal.SIGSTOP)  # So the first one has taken every part that is taken.
        first.append(found[0])
        second.append(found[1])

    watch = threading.Thread(target=stop_the_second)
    seen: list[Progress] = []

    def kill_the_first(progress: Progress) -> None:
        seen.append(progress)
        if progress.done and first:
            watch.join()
            os.kill(first.pop(), signal.SIGKILL)
            os.kill(second[0], signal.SIGCONT)

    watch.start()
    store = extract(
        photos, tmp_path / "s.h5", backbone, batch_size=4, part_size=24, layers=("max",), devices=TWO,
        progress=kill_the_first,
    )  # fmt: skip
    watch.join()
    assert not first and store.content_id == alone.content_id
    assert seen[-1].done == seen[-1].committed == 24
    assert re.search(r"the process of cpu ended with status -9; 1 go on", caplog.text)
    assert os.listdir(tmp_path) == ["s.h5"] and children(os.getpid()) == []


@needs_proc
def test_when_all_processes_have_died_the_same_command_goes_on(
    photos: Path, backbone: Backbone, alone: Store, tmp_path: Path
) -> None:
    def kill_all(progress: Progress) -> None:
        if progress.committed >= 4:
            for child in children(os.getpid()):
                os.kill(child, signal.SIGKILL)

    options = {"batch_size": 4, "part_size": 4, "layers": ("max",), "workers": 2}
    with pytest.raises(BackboneError, match=r"processes of all devices have ended .*the same command goes on from"):
        extract(photos, tmp_path / "s.h5", backbone, devices=TWO, progress=kill_all, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "s.h5").exists()
    seen: list[Progress] = []
    store = extract(photos, tmp_path / "s.h5", backbone, devices=TWO, progress=seen.append, **options)  # type: ignore[arg-type]
    assert seen[0].changes.resumed >= 4 and store.content_id == alone.content_id


@needs_proc
def test_what_ends_the_run_ends_the_processes(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    running: list[int] = []

    def interrupt(progress: Progress) -> None:
        if progress.done:
            running.extend(children(os.getpid()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(photos, tmp_path / "s.h5", backbone, batch_size=4, part_size=4, devices=TWO, progress=interrupt)
    assert running and not any(is_running(child) for child in running)
    assert len(extract(photos, tmp_path / "s.h5", backbone, batch_size=4)) == 24


@needs_proc
def test_processes_end_with_the_one_that_started_them(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    # No guard around it: the script is not run again in the processes.
    script = (
        "import sys, time, embedkit\n"
        "def halt(progress):\n"
        "    if progress.done:\n"
        "        print('computing', flush=True)\n"
        "        time.sleep(600)\n"
        f"backbone = embedkit.Backbone.load({str(tiny_backbone)!r}, device='cpu')\n"
        f"images, output = {str(photos)!r}, {str(tmp_path / 's.h5')!r}\n"
        "embedkit.extract(images, output, backbone, devices=('cpu', 'cpu'), progress=halt)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"computing\n"
        running = children(parent.pid)
        parent.kill()
    deadline = time.monotonic() + 60
    while any(is_running(child) for child in running):
        assert time.monotonic() < deadline, "they outlived it"
        time.sleep(0.05)
    assert running


def test_what_goes_wrong_in_a_process_is_raised_here(
    photos: Path, tiny_backbone: Path, backbone: Backbone, tmp_path: Path
) -> None:
    moved = Backbone.load(tiny_backbone, device="cpu")
    moved.recipe = {**moved.recipe, "model": str(tmp_path / "gone.json")}
    with pytest.raises(BackboneError, match=r"gone\.json: no such file") as caught:
        extract(photos, tmp_path / "s.h5", moved, devices=TWO)
    assert "in the process of cpu" in str(caught.value.__cause__)
    assert children(os.getpid()) == [] and not (tmp_path / "s.h5").exists()


class Here:
    """An image of a class that the processes cannot import."""

    id, label = "a.jpg", None

    def status(self) -> tuple[int, int]:
        return 1, 1

    def read(self) -> bytes:
        return b"no image"


def test_images_that_cannot_be_sent_are_an_error(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("only_here")
    module.Here = Here  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "only_here", module)
    monkeypatch.setattr(Here, "__module__", "only_here")
    images = Listing(tmp_path, [Here()], [], [], 0)
    with pytest.raises(ModuleNotFoundError, match="only_here"):
        extract(images, tmp_path / "s.h5", backbone, devices=TWO)
    images.files[0].extra = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(BackboneError, match=r"cannot be sent to several devices: .*lambda"):
        extract(images, tmp_path / "s.h5", backbone, devices=TWO)
    assert children(os.getpid()) == []


def test_what_many_images_share_is_sent_once(photos: Path, backbone: Backbone, alone: Store, tmp_path: Path) -> None:
    folder = list_folder(photos)
    images = _Remembering(tmp_path / "pickled", folder.files)
    (tmp_path / "pickled").mkdir()
    listing = Listing(folder.root, images, folder.classes, [], 0)
    store = extract(
        listing, tmp_path / "s.h5", backbone, batch_size=4, part_size=4, layers=("max",), devices=TWO, workers=2
    )
    assert store.content_id == alone.content_id
    assert len(list((tmp_path / "pickled").iterdir())) <= 3  # Once for each process, and once to see that it can be.


class _Member(NamedTuple):
    """An image that knows where it is from."""

    id: str
    label: str | None
    number: int
    whole: _Remembering

    def status(self) -> tuple[int, int]:
        return self.whole.files[self.number].status()

    def read(self) -> Any:
        return self.whole.files[self.number].read()


@dataclass(frozen=True, eq=False)
class _Remembering(Entries):
    """Images whose listing leaves a file behind whenever it is pickled."""

    marks: Path
    files: Sequence[Any]

    def __len__(self) -> int:
        return len(self.files)

    def entry(self, number: int) -> _Member:
        return _Member(self.files[number].id, self.files[number].label, number, self)

    def __reduce__(self) -> tuple[Any, ...]:
        tempfile.mkstemp(dir=self.marks)
        return _Remembering, (self.marks, self.files)


def test_frames_of_a_video_are_read_in_every_process(backbone: Backbone, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        video = file.add_stream("mpeg4", rate=4)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for number in range(16):
            pixels = np.full((64, 64, 3), 15 * number, dtype=np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(video.encode())
    stores = [
        extract(
            list_video(tmp_path / "clip.mp4", fps=4), tmp_path / f"{len(devices)}.h5", backbone, batch_size=2,
            part_size=2, workers=2, devices=devices,
        )
        for devices in ((), TWO)
    ]  # fmt: skip
    assert len(stores[0]) == 16 and stores[0].content_id == stores[1].content_id


def test_devices_that_make_no_sense_are_refused(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    assert device_names("auto") == ("auto",) and device_names("cpu, cpu") == TWO and device_names(["cpu"]) == ("cpu",)
    for devices, message in (
        ("cpu,cuda:99", "there (is|are) .* GPU"), ("cpu,auto", "'auto' cannot be one of several"), ("cpu,,cpu", "''"),
    ):  # fmt: skip
        with pytest.raises(BackboneError, match=message):
            device_names(devices)
    with pytest.raises(BackboneError, match="cannot be one of several devices"):
        extract(photos, tmp_path / "s.h5", backbone, devices=["meta"])
    assert os.listdir(tmp_path) == []


def test_the_command_line_takes_several(photos: Path, tiny_backbone: Path, alone: Store, tmp_path: Path) -> None:
    arguments = ["extract", photos, "-o", tmp_path / "s.h5", "-m", tiny_backbone, "-b", 4, "--layers", "max"]
    result = CliRunner().invoke(main, [str(part) for part in [*arguments, "--device", "cpu,cpu"]])
    assert result.exit_code == 0, result.output
    assert "a process on each of cpu, cpu" in result.output
    assert Store.open(tmp_path / "s.h5").content_id == alone.content_id
    result = CliRunner().invoke(main, [str(part) for part in [*arguments, "--device", "cpu,cuda:99"]])
    assert result.exit_code == 1 and "device 'cuda:99' cannot be used" in result.output


def test_the_desk_hands_out_again_what_was_not_written() -> None:
    desk = _Desk(iter([(number, []) for number in range(4)]))
    assert [desk.take("a", patient=False), desk.take("b", patient=False)] == [(0, []), (1, [])]
    assert desk.take("a", patient=False) == (2, [])
    bad = ImageError("x", "y")
    for news in (News(0, 5, (bad,)), News(0, 3), News(2, 4, (bad, bad), written=(0,))):
        desk.note(news)
    lost = desk.give_back("a")
    assert (lost.images, lost.forgotten) == (-4, 2) and not desk.finished
    assert [desk.take("b", patient=True) for _ in range(2)] == [(2, []), (3, [])]
    assert desk.take("b", patient=False) is None
    waiting: list[object] = []
    thread = threading.Thread(target=lambda: waiting.append(desk.take("c", patient=True)))
    thread.start()
    desk.give_back("b")  # Parts 1, 2 and 3.
    thread.join()
    assert waiting == [(1, [])]
    desk.close()
    assert desk.take("c", patient=True) is None


def test_a_run_on_several_devices_says_so_and_warns_of_nothing(
    photos: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "embedkit"):
        extract(photos, tmp_path / "s.h5", backbone, devices=TWO, batch_size=4)
    assert "a process on each of cpu, cpu" in caplog.text
    assert not any(record.levelno >= logging.WARNING for record in caplog.records), caplog.text


def test_several_devices_decode_in_processes_of_their_own(
    photos: Path, backbone: Backbone, alone: Store, tmp_path: Path
) -> None:
    with backbone.isolated(seconds=60) as careful:
        store = extract(photos, tmp_path / "s.h5", careful, layers=("max",), devices=TWO, batch_size=4, part_size=4)
    assert store.content_id == alone.content_id and store.failures == []
