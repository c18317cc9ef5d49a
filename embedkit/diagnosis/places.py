"""Where files are written, and where weights come from."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from embedkit.diagnosis.findings import FAIL, OK, WARN, Finding, gigabytes

_LEAST_BYTES = 1e9
_HUB_SECONDS = 3.0
# Of these, a lock or a rename may not be what it is on a disk.
_NETWORK = re.compile(
    r"nfs|cifs|smb|9p|afs|ceph|lustre|gpfs|beegfs|gluster|davfs|fuse\.(sshfs|s3fs|gcsfuse|rclone|blobfuse|juicefs)"
)


def folders() -> Iterator[Finding]:
    """Find how much room there is where embedkit writes."""
    yield _folder("working folder", Path.cwd(), WARN, "change to a folder that you may write, or name one with -o")
    yield _folder("temporary files", Path(tempfile.gettempdir()), FAIL, "set TMPDIR to a folder that you may write")
    yield _folder("hub cache", _hub_cache(), WARN, "set HF_HOME to a folder that you may write")


def _folder(name: str, folder: Path, without: str, advice: str) -> Finding:
    there = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    kind, free = _file_system(there), shutil.disk_usage(there).free
    text = f"{folder}, {kind}, {gigabytes(free)} free"
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, without, f"{text}, not writable", advice)
    if free < _LEAST_BYTES:
        return Finding(name, WARN, text, "make room: a store takes about 4 bytes x width x images")
    if _NETWORK.match(kind) and name == "working folder":
        advice = "a network file system is slower, and its locks may not keep other machines out: write to a local disk"
        return Finding(name, WARN, text, advice)
    return Finding(name, OK, text)


def _hub_cache() -> Path:
    """Return where the hub's client keeps what it loads, by the variables that it reads."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on, where Linux tells."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "file system unknown"
    real, found = os.path.realpath(folder), ("", "file system unknown")
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split()[4])
        inside = real == mounted or real.startswith(os.path.join(mounted, ""))
        if inside and len(mounted) >= len(found[0]):
            found = mounted, after.split()[0]
    return found[1]


def locks() -> Iterator[Finding]:
    """Find whether a lock in the working folder keeps others out."""
    from embedkit.store.locking import Lock, holder

    base = Path.cwd() if os.access(Path.cwd(), os.W_OK) else Path(tempfile.gettempdir())
    advice = "two runs could write one store at a time here: write stores to a local disk"
    try:
        with tempfile.TemporaryDirectory(prefix=".embedkit-doctor-", dir=base) as folder:
            with Lock(Path(folder, "lock.parts")):
                held = holder(Path(folder, "lock.parts"))
            freed = holder(Path(folder, "lock.parts"))
    except OSError as error:
        yield Finding("locks", FAIL, f"{base}: {error.strerror or error}", advice)
        return
    if held is None or freed is not None:
        yield Finding("locks", FAIL, f"{base}: a lock that is held does not show", advice)
    else:
        yield Finding("locks", OK, f"{base}: a lock keeps other processes out")


def hub() -> Iterator[Finding]:
    """Find whether the hub can be reached, from where weights are loaded by name."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        advice = "unset HF_HUB_OFFLINE to load models by name that are not in the hub cache"
        yield Finding("hub", WARN, "not asked, because of HF_HUB_OFFLINE", advice)
        return
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    answers: list[str] = []
    # A thread, for a name that cannot be looked up knows no time limit.
    asking = threading.Thread(target=lambda: answers.append(_answer(address)), daemon=True)
    asking.start()
    asking.join(_HUB_SECONDS + 0.5)
    problem = answers[0] if answers else f"no answer in {_HUB_SECONDS:g} s"
    if not problem:
        yield Finding("hub", OK, f"{address} answers")
        return
    advice = "without it, use nano (comes with embedkit), models of the hub cache (HF_HUB_OFFLINE=1 saves the waiting) "
    advice += "or weight files: -m FILE --arch NAME; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT"
    yield Finding("hub", WARN, f"{address} cannot be reached: {problem}", advice)


def _answer(address: str) -> str:
    """Return why an address does not answer; nothing when it does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_HUB_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return ""  # It says no, so it is there.
    except (OSError, ValueError) as error:
        return " ".join(str(getattr(error, "reason", error)).split())
