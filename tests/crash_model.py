"""What is left on a disk when a writer is killed or the power fails, at any moment of a recorded run.

`states` replays on a `Disk` what `crash_writer.record` recorded, and a disk says what a reader finds after a kill
(everything that was done) and after a power cut (what was synced, and some of the rest).
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

PAGE = 4096

Tree = dict[str, Union[bytes, "Tree"]]
Operation = tuple[Any, ...]


@dataclass
class Said:
    """What writers have said so far."""

    acknowledged: set[str] = field(default_factory=set)
    computed: list[str] = field(default_factory=list)
    done: bool = False

    def __call__(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word == "computed":
            self.computed.append(rest)
        elif word == "kept":
            self.acknowledged.add(rest)
        elif word == "ack":
            self.acknowledged |= set(self.computed)
        self.done = word == "done"


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""

    def after_power_cut(self, chance: random.Random | None) -> bytes:
        """Return the synced bytes with some of the pages written since, or with none of them."""
        if chance is None or self.data == self.synced:
            return self.synced
        size = chance.choice([len(self.synced), len(self.data)])
        old, new = (bytes(data).ljust(size, b"\0") for data in (self.synced, self.data))
        return b"".join(chance.choice([old, new])[at : min(at + PAGE, size)] for at in range(0, size, PAGE))


@dataclass(eq=False)
class Folder:
    entries: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(eq=False)
class Change:
    """An entry that a folder got, or lost; a rename's loss reaches the disk after its gain, synced or not."""

    folder: Folder
    name: str
    node: File | Folder | None
    after: Change | None = None

    def apply(self, entries: dict[str, File | Folder]) -> None:
        if self.node is None:
            entries.pop(self.name, None)
        else:
            entries[self.name] = self.node


class Disk:
    """A file system that knows what of it is synced. Strict: an entry is so only once its folder is."""

    def __init__(self, tree: Tree) -> None:
        self.root = self._load(tree)
        self.pending: list[Change] = []
        self.opened: dict[int, tuple[File | Folder, list[int]]] = {}  # Node and position, which dup shares.

    def _load(self, tree: Tree) -> Folder:
        nodes = {
            name: self._load(content) if isinstance(content, dict) else File(bytearray(content), content)
            for name, content in tree.items()
        }
        return Folder(dict(nodes), dict(nodes))

    def after_kill(self) -> Tree:
        return _tree(self.root, lambda folder: folder.entries, lambda file: bytes(file.data))

    def after_power_cut(self, chance: random.Random | None) -> Tree:
        """Return what is synced, with some unsynced pages and the first few unsynced changes of folders.

        The changes are the first of all, or the first of each folder. Without `chance` nothing unsynced survives.
        """
        entries: dict[Folder, dict[str, File | Folder]] = {}
        for change in self._survivors(chance):
            change.apply(entries.setdefault(change.folder, dict(change.folder.synced)))
        return _tree(
            self.root, lambda folder: entries.get(folder, folder.synced), lambda file: file.after_power_cut(chance)
        )

    def _survivors(self, chance: random.Random | None) -> list[Change]:
        if chance is None:
            return []
        if chance.random() < 0.5:
            return self.pending[: chance.randint(0, len(self.pending))]
        survivors: list[Change] = []
        lost: set[Folder] = set()
        for change in self.pending:
            gone = change.after in self.pending and change.after not in survivors
            if change.folder not in lost and not gone and chance.random() < 0.7:
                survivors.append(change)
            else:
                lost.add(change.folder)
        return survivors

    def _sync_folder(self, folder: Folder) -> None:
        for change in list(self.pending):
            if change.folder is folder and change.after not in self.pending:
                change.apply(folder.synced)
                self.pending.remove(change)

    def _change(self, path: str, node: File | Folder | None, after: Change | None = None) -> Change:
        *parents, name = path.split("/")
        change = Change(self._find(parents), name, node, after)
        change.apply(change.folder.entries)
        self.pending.append(change)
        return change

    def _find(self, names: list[str]) -> Any:
        node: Any = self.root
        for name in names:
            node = node.entries[name]
        return node

    def do(self, operation: Operation) -> bool:
        """Do what was recorded, and return whether that changed anything a kill would leave."""
        kind, *values = operation
        if kind == "open":
            handle, path, flags = values
            assert "O_TRUNC" not in flags and "O_APPEND" not in flags, "not understood"
            *parents, name = path.split("/")
            created = "O_CREAT" in flags and name not in self._find(parents).entries
            if created:
                self._change(path, File())
            self.opened[handle] = (self._find([*parents, name] if path else []), [0])
            return created
        if kind in ("link", "rename"):
            source, target = values
            gain = self._change(target, self._find(source.split("/")))
            if kind == "rename":
                self._change(source, None, gain)
            return True
        if kind in ("unlink", "rmdir", "mkdir"):
            self._change(values[0], Folder() if kind == "mkdir" else None)
            return True
        if values[0] not in self.opened:  # A file elsewhere.
            return False
        node, position = self.opened[values[0]]
        if kind == "write":
            node.data.extend(bytes(max(0, position[0] - len(node.data))))
            node.data[position[0] : position[0] + len(values[1])] = values[1]
            position[0] += len(values[1])
        elif kind == "resize":
            del node.data[values[1] :]
            node.data.extend(bytes(values[1] - len(node.data)))
        elif kind == "allocate":
            node.data.extend(bytes(max(0, values[1] - len(node.data))))
        elif kind == "seek":
            position[0] = values[1]
        elif kind == "dup":
            self.opened[values[1]] = self.opened[values[0]]
        elif kind == "close":
            del self.opened[values[0]]
        elif isinstance(node, Folder):
            self._sync_folder(node)
        else:
            node.synced = bytes(node.data)
        return kind in ("write", "resize", "allocate")


def _tree(folder: Folder, entries: Callable[[Folder], dict[str, File | Folder]], data: Callable[[File], bytes]) -> Tree:
    return {
        name: data(node) if isinstance(node, File) else _tree(node, entries, data)
        for name, node in entries(folder).items()
    }


@dataclass
class State:
    """A disk after some operations; `new` says whether the last one changed what a kill leaves, or acknowledged it."""

    number: int
    disk: Disk
    said: Said
    kind: str
    new: bool


def states(disk: Disk, operations: Iterable[Operation], said: Said | None = None) -> Iterator[State]:
    """Yield the disk before the first operation, and after each one; always the same, so copy what is to be kept."""
    said = said or Said()
    yield State(0, disk, said, "", True)
    for number, operation in enumerate(operations, 1):
        if operation[0] == "say":
            said(operation[1])
            new = operation[1].startswith(("begun", "ack", "done"))
        else:
            new = disk.do(operation)
        yield State(number, disk, said, operation[0], new)


def torn(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Cut each write in half: the kernel may have done one half of it when the writer is killed."""
    for operation in operations:
        if operation[0] == "write" and len(operation[2]) > 1:
            half = len(operation[2]) // 2
            yield from (("write", operation[1], data) for data in (operation[2][:half], operation[2][half:]))
        else:
            yield operation


def continued(state: State) -> tuple[Disk, Said]:
    """Return copies of disk and words for a recording that goes on where the writer was killed."""
    disk, said = copy.deepcopy(state.disk), copy.deepcopy(state.said)
    disk.opened.clear()
    return disk, said


# Trees on the real file system.


def read_tree(folder: Path) -> Tree:
    return {path.name: read_tree(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a folder hold just this; what was there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(content, folder / name)
        else:
            (folder / name).write_bytes(content)
