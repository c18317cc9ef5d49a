"""The examination: one probe after the other, in a process that may crash or hang over any of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TextIO

from embedkit.diagnosis import machine, places, processors, rehearsal, software
from embedkit.diagnosis.findings import FAIL, WARN, Finding

# Light ones first: what is known before something crashes helps to tell why.
PROBES: dict[str, Callable[[], Iterable[Finding]]] = {
    "packages": software.packages,
    "extras": software.extras,
    "processor": processors.processor,
    "memory": machine.memory,
    "open files": machine.open_files,
    "folders": places.folders,
    "hub": places.hub,
    "libraries": software.libraries,
    "torchvision": software.torchvision,
    "runtimes": software.runtimes,
    "threads": processors.threads,
    "gpu": machine.gpus,
    "decoders": software.decoders,
    "isolation": rehearsal.isolation,
    "locks": places.locks,
    "self-test": rehearsal.selftest,
}
_SECONDS = 40.0
# With the very modules of this process, in their order: the working folder may hold anything.
_START = "import sys; sys.path[:] = sys.argv[2:]; from embedkit.diagnosis.examination import probe; probe(sys.argv[1])"


def examine(probes: Sequence[str] | None = None, *, seconds: float = _SECONDS) -> Iterator[Finding]:
    """Look at this machine and try embedkit on it; takes about ten seconds and needs no network.

    Parameters
    ----------
    probes : sequence of str, optional
        Which ones of `PROBES`; by default all.
    seconds : float, default 40
        How long all of them may take, and any one half of it.

    Yields
    ------
    Finding
        As they come. A probe that raises, hangs, or crashes its process is a finding too, and the others go on.

    Examples
    --------
    >>> from embedkit.diagnosis import examine
    >>> [finding.name for finding in examine(["open files"])]
    ['open files']
    """
    left, deadline = list(PROBES if probes is None else probes), time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        ended = yield from _examined(left, seconds / 2, deadline)
        if ended:
            yield Finding(left[0], FAIL, ended, _ADVICE.get(left[0], _ADVICE_FOR_ALL))
            del left[0]
    for name in left:
        yield Finding(name, WARN, "not looked at, since the others took too long", "see to what failed, and try again")


_ADVICE_FOR_ALL = "install embedkit into a fresh virtual environment, and report this line if it stays"
_ADVICE = {
    "libraries": "the libraries do not get on with one another: install embedkit into a fresh virtual environment, "
    "with all packages from pip or all from conda; on macOS, two copies of libomp may be the reason",
}


def _examined(left: list[str], most: float, deadline: float) -> Generator[Finding, None, str]:
    """Yield what a process finds, dropping each probe that is done, and return how the process ended early."""
    try:
        process = subprocess.Popen(
            [sys.executable or "python", "-c", _START, json.dumps(left), *sys.path],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
        )  # fmt: skip
    except OSError as error:
        return f"Python cannot be started: {error}"
    late = threading.Event()
    seconds = most

    def kill() -> None:
        late.set()
        process.kill()

    with process:
        assert process.stdout is not None
        try:
            while True:
                seconds = max(0.1, min(most, deadline - time.monotonic()))
                watch = threading.Timer(seconds, kill)
                watch.daemon = True
                watch.start()
                try:
                    line = process.stdout.readline()
                finally:
                    watch.cancel()
                if not line.endswith("\n"):
                    break
                found = json.loads(line)
                if found is None:
                    del left[0]
                else:
                    yield Finding(**found)
        except BaseException:
            process.kill()
            raise
    if not left:
        return ""
    if late.is_set():
        return f"it hangs: nothing came of it in {seconds:.0f} s"
    status = process.returncode
    return f"it ended its process ({f'signal {-status}' if status < 0 else f'exit code {status}'})"


def probe(names: str) -> None:
    """Run probes, given as a JSON list, and write each finding as a line of JSON, with a null after each probe."""
    # What the libraries print goes to where the errors go; the findings have a stream of their own.
    with open(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for name in json.loads(names):
            _tell(out, name)
        out.flush()
    os._exit(0)  # No library's own farewell is part of a probe.


def _tell(out: TextIO, name: str) -> None:
    try:
        for finding in PROBES[name]():
            print(json.dumps(asdict(finding)), file=out, flush=True)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        finding = Finding(name, FAIL, reason[:500], _ADVICE.get(name, _ADVICE_FOR_ALL))
        print(json.dumps(asdict(finding)), file=out, flush=True)
    print("null", file=out, flush=True)
