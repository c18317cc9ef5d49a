"""What is installed, and whether it gets on with one another."""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from embedkit import __version__
from embedkit.diagnosis.findings import FAIL, OK, WARN, Finding

# What is told of an embedkit that runs from a folder, and so does not say what it requires.
_BASICS = ("torch", "timm", "numpy", "h5py", "faiss-cpu", "scikit-learn", "pillow", "simplejpeg", "safetensors")
_REQUIREMENT = re.compile(r"([\w.-]+)[^;<>=!~]*(?:[^;]*>=\s*([\w.]+))?[^;]*(?:;.*extra\s*==\s*[\"']([\w-]+)[\"'])?")


def packages() -> Iterator[Finding]:
    """Find the versions of embedkit, Python and what both stand on."""
    requires = _requirements()
    found = f"{__version__} in {Path(__file__).parents[1]}"
    if not requires:
        advice = "pip install it, so that the versions of its packages can be compared with those it needs"
        yield Finding("embedkit", WARN, f"{found}, which is not installed as a package", advice)
    else:
        yield Finding("embedkit", OK, found)
    text = f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform()})"
    old = sys.version_info < (3, 10)
    yield Finding("python", FAIL if old else OK, text, "install Python 3.10 or newer" if old else "")
    for name, least, extra in requires or [(name, "", "") for name in _BASICS]:
        if not extra:
            yield _package(name, least)


def _package(name: str, least: str) -> Finding:
    found, wanted = _version(name), f"{name}>={least}" if least else name
    if found is None:
        return Finding(name, FAIL, "not installed", f"pip install '{wanted}'")
    if least and _numbers(found) < _numbers(least):
        return Finding(name, WARN, f"{found}, older than embedkit was tried with", f"pip install '{wanted}'")
    return Finding(name, OK, found)


def extras() -> Iterator[Finding]:
    """Find which of embedkit's extras are there."""
    groups: dict[str, list[str]] = {}
    for name, _, extra in _requirements():
        if extra and extra != "dev":
            groups.setdefault(extra, []).append(name)
    for extra, names in sorted(groups.items()):
        versions = {name: _version(name) for name in names}
        if all(versions.values()):
            found = ", ".join(f"{name} {found}" for name, found in versions.items())
        else:
            found = f"not installed: pip install 'embedkit[{extra}]'"
        yield Finding(f"extra {extra}", OK, found)


def decoders() -> Iterator[Finding]:
    """Find which decoders of images there are."""
    from embedkit.images.formats import FORMATS
    from embedkit.images.versions import decoder_versions

    versions = decoder_versions()
    found = ", ".join(f"{name} {number or 'missing'}" for name, number in versions.items())
    missing = [name for name in ("libjpeg-turbo", "zlib") if not versions[name]]
    advice = f"this Pillow was built without {' and '.join(missing)}: pip install --force-reinstall pillow"
    yield Finding("decoders", FAIL if missing else OK, found, advice if missing else "")
    yield Finding("formats", OK, ", ".join(FORMATS))


def libraries() -> Iterator[Finding]:
    """Load every library that embedkit computes with into one process."""
    started = time.perf_counter()
    _load()
    seconds = time.perf_counter() - started
    slow = seconds > 15
    advice = "an installation on a network disk is slow to load: put it on a local one"
    yield Finding("libraries", WARN if slow else OK, f"load together, in {seconds:.1f} s", advice if slow else "")


def _load() -> None:
    import embedkit.backbones
    import embedkit.heads
    import embedkit.images
    import embedkit.index
    import embedkit.store

    embedkit.backbones.import_timm()


def torchvision() -> Iterator[Finding]:
    """Find whether torchvision is the one that belongs to this torch."""
    import torch

    from embedkit.backbones import import_timm

    found = _version("torchvision")
    if found is None:
        return
    import_timm()
    pinned = [re.search(r"^torch\b[^;]*==\s*([\d.]+)", line) for line in distribution("torchvision").requires or []]
    wanted = next((match[1] for match in pinned if match), None)
    here = torch.__version__.partition("+")[0]
    index = "" if torch.version.cuda else " --index-url https://download.pytorch.org/whl/cpu"
    if wanted is not None and wanted != here:
        text = f"{found}, which belongs to torch {wanted}; this is {here}"
        yield Finding("torchvision", WARN, text, f"pip install --upgrade torch torchvision{index}")
        return
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (NotImplementedError, RuntimeError, AttributeError):
        text = f"{found}, built for another torch than {torch.__version__}; embedkit works, other programs may not"
        yield Finding("torchvision", WARN, text, f"pip install --force-reinstall torchvision{index}")
    else:
        yield Finding("torchvision", OK, found)


def runtimes() -> Iterator[Finding]:
    """Find which libraries for threads and for linear algebra the others brought along."""
    import torch
    from threadpoolctl import threadpool_info

    _load()
    loaded = threadpool_info()
    openmp = [one for one in loaded if one["user_api"] == "openmp"]
    kinds = sorted({str(one["prefix"]) for one in openmp})
    text = ", ".join(f"{kind} x {sum(one['prefix'] == kind for one in openmp)}" for kind in kinds) or "none"
    # Of GNU's, several copies live together. Intel's and LLVM's are one another's double, and end or stop the process.
    clash = {"libiomp", "libomp"} <= set(kinds) or (sys.platform == "darwin" and len(openmp) > 1)
    advice = "install torch, faiss and scikit-learn from one source, all by pip or all by conda; KMP_DUPLICATE_LIB_OK "
    advice += "only hides it, and numbers may be wrong"
    yield Finding("openmp", WARN if clash else OK, text, advice if clash else "")
    names = [f"{one['internal_api']} {one['version']} ({one.get('architecture')})" for one in loaded]
    blas = sorted({name for name, one in zip(names, loaded, strict=True) if one["user_api"] == "blas"})
    for library, name in ((torch.backends.mkl, "MKL"), (torch.backends.mkldnn, "oneDNN")):
        blas += [f"{name} in torch"] if library.is_available() else []
    yield Finding("linear algebra", OK, ", ".join(blas) or "unknown")


def _requirements() -> list[tuple[str, str, str]]:
    """Return the packages that embedkit requires: name, least version, and the extra that asks for it."""
    try:
        lines = distribution("embedkit").requires or []
    except PackageNotFoundError:
        return []
    # Those for certain systems or Pythons only may rightly be absent.
    plain = [line for line in lines if ";" not in line or re.search(r";\s*extra\s*==\s*\S+\s*$", line)]
    found = [match.groups(default="") for match in map(_REQUIREMENT.match, plain) if match]
    return [(name, least, extra) for name, least, extra in found]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]
