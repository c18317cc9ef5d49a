"""No kill, power cut or full disk loses what was acknowledged, and the store that comes out in the end is the same.

A real run is recorded once. Each test replays it up to some moment, lays out what a crash then would have left, and
runs the same command again. EMBEDKIT_CRASH_STATES=N tries N power cuts, EMBEDKIT_CRASH_STATES=all every moment too.
"""

from __future__ import annotations

import copy
import errno
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, os.path.dirname(__file__))  # --import-mode=importlib leaves it out.

import crash_model
import crash_writer
from crash_model import Disk, Operation, Said, State, Tree
from crash_writer import TARGET, perform

from embedkit import Store, StoreBusyError
from embedkit.store import verify

_WISH = os.environ.get("EMBEDKIT_CRASH_STATES", "60")
EVERYTHING = _WISH == "all"
POWER_CUTS = 2000 if EVERYTHING else int(_WISH)

# What is there, and what is then run.
SCENARIOS = {"fresh": ("", "first"), "update": ("first", "update"), "shrink": ("first", "shrink")}


@dataclass
class Recording:
    """A run from beginning to end: what there was, what it did, and the store that it made."""

    before: Tree
    generation: str
    operations: list[Operation]
    final: bytes
    content_id: str


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: a test of what is synced need not wait for a disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="module")
def strace() -> None:
    reason = crash_writer.why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module", params=SCENARIOS)
def before(request: pytest.FixtureRequest, scratch: Path) -> tuple[Tree, str]:
    """The files there are before a run, and which one it is."""
    first, then = SCENARIOS[request.param]
    folder = scratch / f"before-{request.param}"
    folder.mkdir()
    if first:
        perform(folder / TARGET, first, Said())
    return crash_model.read_tree(folder), then


@pytest.fixture(scope="module")
def recording(before: tuple[Tree, str], scratch: Path, strace: None) -> Recording:
    folder = scratch / f"recorded-{before[1]}"
    crash_model.write_tree(before[0], folder)
    operations = crash_writer.record(folder, TARGET, before[1])
    assert os.listdir(folder) == [TARGET] and verify(folder / TARGET) == []
    final = (folder / TARGET).read_bytes()
    return Recording(*before, operations, final, Store.open(folder / TARGET).content_id)


class Judge:
    """Runs the same command on what a crash left, and says what is wrong with the outcome."""

    def __init__(self, recording: Recording, scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.recording, self.caplog = recording, caplog
        self.folder = scratch / "state"
        self.tried = 0
        self.problems: list[str] = []

    def __call__(self, moment: str, tree: Tree, said: Said) -> None:
        self.tried += 1
        crash_model.write_tree(tree, self.folder)
        self.caplog.clear()
        try:
            problem = self._problem(tree, said)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problem = problem or "; ".join(record.getMessage() for record in self.caplog.records)
        if problem:
            self.problems.append(f"{moment}: {problem}; there was {_listing(tree)}")
        shutil.rmtree(self.folder)

    def _problem(self, tree: Tree, said: Said) -> str:
        target, final = self.folder / TARGET, self.recording.final
        if tree.get(TARGET) not in (self.recording.before.get(TARGET), final):
            return "the store is neither that of before nor the new one"
        if said.done and tree.get(TARGET) != final:
            return "the finished store is gone"
        again = Said()
        perform(target, self.recording.generation, again)
        lost = sorted(said.acknowledged.intersection(again.computed))
        if lost:
            return f"{len(lost)} acknowledged rows were computed again: {lost}"
        if os.listdir(self.folder) != [TARGET]:
            return f"leftovers: {_listing(crash_model.read_tree(self.folder))}"
        # The run's id and time are drawn anew as long as no run.json holds them.
        fixed = tree.get(TARGET) == final or "run.json" in tree.get(f"{TARGET}.parts", {})
        if fixed and target.read_bytes() != final:
            return "the store differs from that of an uninterrupted run"
        if Store.open(target).content_id != self.recording.content_id:
            return "the store's content differs from that of an uninterrupted run"
        return ""

    def verdict(self) -> None:
        count = len(self.problems)
        print(f"{self.tried} states, {count} problems")  # For who runs this with -s.
        assert self.tried and not count, f"{count} of {self.tried} states:\n" + "\n".join(
            self.problems[:: -(-count // 10)]
        )


@pytest.fixture
def judge(recording: Recording, scratch: Path, caplog: pytest.LogCaptureFixture) -> Judge:
    return Judge(recording, scratch, caplog)


def _listing(tree: Tree) -> list[str]:
    found: list[str] = []
    for name, content in sorted(tree.items()):
        if isinstance(content, dict):
            found += [f"{name}/", *(f"{name}/{below}" for below in _listing(content))]
        else:
            found.append(f"{name} ({len(content)})")
    return found


def test_the_model_ends_where_the_run_ended(recording: Recording) -> None:
    *_, state = crash_model.states(Disk(recording.before), recording.operations)
    assert state.said.done
    assert state.disk.after_kill() == state.disk.after_power_cut(None) == {TARGET: recording.final}


def test_every_moment_of_a_kill(recording: Recording, judge: Judge) -> None:
    for state in crash_model.states(Disk(recording.before), crash_model.torn(recording.operations)):
        if state.new:
            judge(f"killed after operation {state.number} ({state.kind})", state.disk.after_kill(), state.said)
    judge.verdict()


def moments_of(states: Iterable[State], count: int, chance: random.Random) -> list[int]:
    """Draw moments to cut the power at, from those behind which something is different."""
    return chance.choices([state.number for state in states if state.new or state.kind == "sync"], k=count)


def test_power_cuts(recording: Recording, judge: Judge) -> None:
    """With nothing but what is synced when that or what is acknowledged grows, with some of the rest at any moment."""
    chance = random.Random(0)
    moments = moments_of(crash_model.states(Disk(recording.before), recording.operations), POWER_CUTS, chance)
    for state in crash_model.states(Disk(recording.before), recording.operations):
        at = f"power cut after operation {state.number} ({state.kind})"
        if state.kind == "sync" or (state.kind == "say" and state.new) or (EVERYTHING and state.new):
            judge(f"{at}, only what was synced", state.disk.after_power_cut(None), state.said)
        for number in range(moments.count(state.number)):
            judge(f"{at}, {number}", state.disk.after_power_cut(chance), state.said)
    judge.verdict()


def test_a_power_cut_while_going_on_after_a_kill(recording: Recording, judge: Judge, scratch: Path) -> None:
    """A kill leaves what is not synced yet, and the next run must not build on that as if it were."""
    chance = random.Random(1)
    killed = [
        (state.number, state.kind, *crash_model.continued(state))
        for state in crash_model.states(Disk(recording.before), recording.operations)
        if state.new and state.kind in ("mkdir", "link", "rename")
    ]
    if not EVERYTHING:  # The first ones, the first part, the last part and the publication.
        killed = [*killed[:4], *killed[-2:]] if len(killed) > 6 else killed
    for number, kind, disk, said in killed:
        folder = scratch / "killed"
        crash_model.write_tree(disk.after_kill(), folder)
        operations = crash_writer.record(folder, TARGET, recording.generation)
        final = (folder / TARGET).read_bytes()
        shutil.rmtree(folder)
        if "run.json" not in disk.after_kill().get(f"{TARGET}.parts", {}):
            judge.recording = Recording(
                recording.before, recording.generation, operations, final, recording.content_id
            )  # Its run has an id of its own.
        elif final != recording.final:
            judge.problems.append(f"killed after operation {number} ({kind}): the next run's store differs")
        moments = moments_of(crash_model.states(copy.deepcopy(disk), operations), POWER_CUTS // 12, chance)
        for state in crash_model.states(disk, operations, said):
            at = f"killed after operation {number} ({kind}), power cut after {state.number} ({state.kind}) of the next"
            if state.kind in ("say", "sync", "unlink") and (state.new or state.kind == "sync"):
                judge(f"{at}, only what was synced", state.disk.after_power_cut(None), state.said)
            for _ in range(moments.count(state.number)):
                judge(at, state.disk.after_power_cut(chance), state.said)
        judge.recording = recording
    judge.verdict()


def test_a_power_cut_when_the_folder_of_the_store_is_new(scratch: Path, strace: None) -> None:
    folder = scratch / "new"
    folder.mkdir()
    operations = crash_writer.record(folder, f"sub/folder/{TARGET}", "first")
    lost = [
        f"after operation {state.number}"
        for state in crash_model.states(Disk({}), operations)
        if state.kind == "say" and state.new
        and not state.disk.after_power_cut(None).get("sub", {}).get("folder")  # type: ignore[union-attr, call-overload]
    ]  # fmt: skip
    assert not lost, f"the new folder, and all that was acknowledged in it, is gone {lost}"


class FullDisk:
    """Lets calls that need space fail from the k-th one on, or just that one, until it is lifted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, k: int, how: str) -> None:
        self.left, self.how = k, how
        self.hit = ""
        names = ("write", "posix_fallocate", "fsync", "link", "replace", "mkdir", "open")
        for name in filter(lambda name: hasattr(os, name), names):
            monkeypatch.setattr(os, name, self._failing(name, getattr(os, name)))

    def _failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            needs_space = not (
                (name == "open" and not arguments[1] & os.O_CREAT)
                or (name == "mkdir" and os.path.isdir(arguments[0]))
                or (name != "write" and self.how == "short writes")
            )
            if not needs_space:
                return real(*arguments, **options)
            self.left -= 1
            if self.left > 0 or (self.how != "for good" and self.left < 0):
                return real(*arguments, **options)
            self.hit = self.hit or name
            if self.how == "short writes" and len(arguments[1]) > 1:
                return real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if name == "write" and self.left == 0 and len(arguments[1]) > 1:
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])  # As much as there was room for.
            raise OSError(errno.EIO if name == "fsync" else errno.ENOSPC, "the disk is full")

        return call


@pytest.mark.parametrize("how", ["once", "for good", "short writes"])
def test_a_full_disk_at_every_call(
    how: str, before: tuple[Tree, str], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, generation = before
    folder = scratch / "full"
    crash_model.write_tree(tree, folder)
    perform(folder / TARGET, generation, Said())
    content_id = Store.open(folder / TARGET).content_id
    problems = []
    for k in itertools.count(1):
        crash_model.write_tree(tree, folder)
        said, error = Said(), None
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, k, how)
            try:
                perform(folder / TARGET, generation, said)
            except OSError as failure:
                error = failure
        if not disk.hit:
            break
        problem = _after_full(folder, tree, generation, said, error, how, content_id)
        if problem:
            problems.append(f"call {k} ({disk.hit}): {problem}")
    shutil.rmtree(folder)
    print(f"{k - 1} calls, {len(problems)} problems")
    assert k > 10 and not problems, "\n".join(problems)


def _after_full(
    folder: Path, tree: Tree, generation: str, said: Said, error: OSError | None, how: str, content_id: str
) -> str:
    """Return what is wrong after a disk was full, and after the same command has run again with space."""
    target = folder / TARGET
    if (how == "short writes") != (error is None):
        return f"the error was {error!r}"
    if error is not None and error.errno not in (errno.ENOSPC, errno.EIO):
        return f"the error was {error!r}"
    left = crash_model.read_tree(folder)
    if any(".tmp-" in name for name in _listing(left)):
        return f"half a file is left: {_listing(left)}"
    if left.get(TARGET) != tree.get(TARGET) and (
        verify(target) or Store.open(target).content_id != content_id
    ):  # A failure to sync comes after the new store has its name.
        return "the store is neither that of before nor the new one"
    again = Said()
    try:
        perform(target, generation, again)
    except Exception as failure:
        return f"running again: {type(failure).__name__}: {failure}"
    if said.acknowledged.intersection(again.computed):
        return "acknowledged rows were computed again"
    if os.listdir(folder) != [TARGET]:
        return f"leftovers: {_listing(crash_model.read_tree(folder))}"
    parts = left.get(f"{TARGET}.parts", {})
    if "run.json" not in parts:
        return "" if Store.open(target).content_id == content_id else "the store's content differs"
    # The same run, from its run.json, on a disk with space.
    final = target.read_bytes()
    plan = {name: content for name, content in parts.items() if name == "run.json" or name.startswith("ids-")}
    crash_model.write_tree(tree | {f"{TARGET}.parts": plan}, folder)
    perform(target, generation, Said())
    return "" if target.read_bytes() == final else "the store differs from that of an undisturbed run"


def test_a_second_writer_is_told_who_the_first_is(before: tuple[Tree, str], scratch: Path) -> None:
    """And changes nothing, neither in the store nor beside it."""
    tree, generation = before
    folder = scratch / "two"
    crash_model.write_tree(tree, folder)
    command = [sys.executable, crash_writer.__file__, os.fspath(folder / TARGET), generation, "wait"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdin is not None and first.stdout is not None
        first.stdout.readline()  # It has the lock, and has begun to compute where there is something to compute.
        there = crash_model.read_tree(folder)
        with pytest.raises(StoreBusyError, match=rf"\b{first.pid}\b") as caught:
            perform(folder / TARGET, generation, Said())
        assert caught.value.pid == first.pid
        assert crash_model.read_tree(folder) == there and there.get(TARGET) == tree.get(TARGET)
        first.stdin.close()
        first.stdout.read()
    assert first.returncode == 0 and os.listdir(folder) == [TARGET] and verify(folder / TARGET) == []
    shutil.rmtree(folder)


def test_a_writer_that_is_killed_leaves_no_lock(before: tuple[Tree, str], scratch: Path) -> None:
    tree, generation = before
    folder = scratch / "dead"
    crash_model.write_tree(tree, folder)
    command = [sys.executable, crash_writer.__file__, os.fspath(folder / TARGET), generation, "wait"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        first.kill()
    perform(folder / TARGET, generation, Said())
    assert os.listdir(folder) == [TARGET] and verify(folder / TARGET) == []
    shutil.rmtree(folder)
