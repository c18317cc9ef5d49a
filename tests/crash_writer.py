"""A writer to crash, and the recording of what it does to files.

It is one run over 40 images whose embeddings follow from their bytes, and needs no torch. As a program it is given the
store, what to make of it and, perhaps, that it is to wait once it has begun.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.errors import ImageError
from embedkit.spec import EmbeddingSpec
from embedkit.store import Failures, Images, Inventory, Rows, Run

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=3)
TARGET = "s.h5"
PART_ROWS, BATCH_ROWS = 8, 4

Operation = tuple[Any, ...]


def images(generation: str) -> dict[str, tuple[bytes, int]]:
    """Return content and modification time by id: 40 images, or what became of them later."""
    world = {f"{number:02}.jpg": (f"picture {number:02}, first".encode(), 1000 + number) for number in range(40)}
    world["13.jpg"] = world["31.jpg"] = (b"broken", 1)
    if generation == "shrink":  # Nothing is to be computed, so no plan is ever written down.
        return {id: image for id, image in world.items() if id[0] != "2"}
    if generation == "update":
        for number in (0, 1, 17, 18, 19, 38):  # Changed.
            world[f"{number:02}.jpg"] = (f"picture {number:02}, later".encode(), 2000 + number)
        world |= {f"new {number:02}.jpg": (f"picture {number:02}, new".encode(), 3000) for number in range(12)}
        world["moved.jpg"] = world.pop("05.jpg")
        world["06.jpg"] = (world["06.jpg"][0], 4000)  # Touched: another time, the same bytes.
        for id in ("07.jpg", "08.jpg", "39.jpg"):
            del world[id]
        world["31.jpg"] = (b"mended", 2)
    return world


def perform(target: Path, generation: str, say: Callable[[str], None]) -> None:
    """Make or update the store, and say what was computed, which part is durable, and that all is done."""
    world = images(generation)
    ids = sorted(world)
    inventory = Inventory(
        np.array([id.encode() for id in ids]),
        np.array([len(world[id][0]) for id in ids]),
        np.array([world[id][1] for id in ids]),
    )
    with Run(target, SPEC) as run:
        update = run.prepare(
            inventory,
            lambda numbers: [(number, hashlib.sha256(world[ids[number]][0]).digest()) for number in numbers],
            part_size=lambda count: PART_ROWS,
            batch_size=BATCH_ROWS,
        )
        for part in run.parts.values():
            for id in [*part.images.ids.tolist(), *part.failures.ids.tolist()]:
                say(f"kept {id.decode()}")  # What is kept counts as committed from the first moment on.
        say("begun")
        for number in update.todo:
            part = [id.decode() for id in update.plan.part(number).tolist()]
            for id in part:
                say(f"computed {id}")
            run.write(number, _rows({id: world[id] for id in part}))
            say(f"ack {number}")
        run.finalise(update)
    say("done")


def _rows(part: dict[str, tuple[bytes, int]]) -> Rows:
    good = {id: image for id, image in part.items() if image[0] != b"broken"}
    bad = {id: image for id, image in part.items() if id not in good}
    hashes = [hashlib.sha256(content).digest() for content, _ in good.values()]
    embeddings = np.array([list(sha256[:3]) for sha256 in hashes], dtype=np.float32).reshape(-1, 3)
    return Rows(
        Images.of(list(good), [len(content) for content, _ in good.values()], [t for _, t in good.values()], hashes),
        Failures.of(
            [ImageError(id, "truncated", "truncated") for id in bad], [6] * len(bad), [time for _, time in bad.values()]
        ),
        {"": embeddings},
    )


# The recording.

# With a question mark, for some machines lack some.
_CALLS = (
    "?open,?openat,?openat2,?creat,?write,?writev,?pwrite64,?pwritev,?pwritev2,?sendfile,?copy_file_range,"
    "?rename,?renameat,?renameat2,?link,?linkat,?unlink,?unlinkat,?symlink,?mkdir,?mkdirat,?rmdir,"
    "?fsync,?fdatasync,?truncate,?ftruncate,?fallocate,?close,?lseek,?dup,?dup2,?dup3,?fcntl,?execve"
)
_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)")


def why_not() -> str:
    """Return why nothing can be recorded here, or nothing."""
    if not shutil.which("strace"):
        return "strace is not installed"
    command = ["strace", "-f", "-o", os.devnull, "-e", f"trace={_CALLS}", "true"]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"strace cannot trace here: {done.stderr.strip()[-200:]}" if done.returncode else ""


def record(root: Path, target: str, generation: str) -> list[Operation]:
    """Run the writer under strace, and return what it did below `root`."""
    trace = root.with_name(f"{root.name}.trace")
    writer = [sys.executable, __file__, os.fspath(root / target), generation]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["strace", "-f", "-xx", "-s", str(1 << 24), "-o", os.fspath(trace), "-e", f"trace={_CALLS}", *writer]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    operations = list(parse(trace.read_text().splitlines(), os.fspath(root)))
    said = [operation[1] for operation in operations if operation[0] == "say"]
    assert said == done.stdout.splitlines()
    trace.unlink()
    return operations


def parse(lines: Iterable[str], root: str) -> Iterator[Operation]:
    """Yield the operations of a trace that concern a folder, with paths relative to it."""
    unfinished: dict[str, str] = {}
    foreign: set[str] = set()
    writer = ""
    for line in lines:
        pid = line.split(" ", 1)[0]
        writer = writer or pid
        if "execve(" in line and pid != writer:
            foreign.add(pid)  # Another program, say uname, that something asked for on import.
        if pid in foreign:
            continue
        if line.endswith("<unfinished ...>"):
            unfinished[pid] = line.removesuffix("<unfinished ...>")
            continue
        if "resumed>" in line:
            line = unfinished.pop(pid) + line.split("resumed>", 1)[1]
        match = _LINE.match(line)
        if match is None or match[4].startswith("-"):
            continue  # A signal, an exit, or a call that failed.
        call, arguments, result = match[2], match[3], int(match[4])
        texts = [bytes.fromhex(text.replace("\\x", "")) for text in re.findall(r'"((?:\\x..)*)"', arguments)]
        yield from _operation(call, arguments.split(", "), texts, result, root.encode())


def _operation(call: str, arguments: list[str], texts: list[bytes], result: int, root: bytes) -> Iterator[Operation]:
    first = arguments[0]
    if call == "write" and first == "1":
        yield from (("say", line) for line in texts[0].decode().splitlines())
    elif call == "write":
        assert len(texts[0]) >= result, "strace cut a buffer short"
        yield "write", int(first), texts[0][:result]
    elif call in ("fsync", "fdatasync", "close"):
        yield "close" if call == "close" else "sync", int(first)
    elif call == "ftruncate":
        yield "resize", int(first), int(arguments[1])
    elif call == "fallocate":
        yield "allocate", int(first), int(arguments[2]) + int(arguments[3])
    elif call == "lseek":
        yield "seek", int(first), result
    elif call in ("dup", "dup2", "dup3") or (call == "fcntl" and "F_DUPFD" in arguments[1]):
        yield "dup", int(first), result
    elif texts and all(text == root or text.startswith(root + b"/") for text in texts):
        assert first == "AT_FDCWD" or not call.endswith(("at", "at2")), "paths below a descriptor are not understood"
        kind = "rmdir" if "AT_REMOVEDIR" in arguments[-1] else call.removesuffix("2").removesuffix("at")
        assert kind in ("open", "rename", "link", "unlink", "mkdir", "rmdir"), f"{call} is not understood"
        paths = [os.fsdecode(text[len(root) + 1 :]) for text in texts]
        if kind == "open":
            yield "open", result, paths[0], arguments[2 if call == "openat" else 1]
        else:
            yield kind, *paths
    else:
        assert call not in ("writev", "pwrite64", "pwritev", "pwritev2", "sendfile", "copy_file_range"), call


def _main(target: str, generation: str, wait: str = "") -> None:
    """Run the writer; one that is to wait says that it has begun, and goes on when its input ends."""
    waiting = bool(wait)

    def say(text: str) -> None:
        nonlocal waiting
        os.write(1, f"{text}\n".encode())
        if waiting:
            sys.stdin.read()
            waiting = False

    perform(Path(target), generation, say)


if __name__ == "__main__":
    _main(*sys.argv[1:])
