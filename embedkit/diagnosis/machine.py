"""Memory, open files and GPUs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from embedkit.diagnosis.findings import FAIL, OK, WARN, Finding, gigabytes
from embedkit.machine import available_memory

_LEAST_MEMORY, _LEAST_FILES = 2e9, 256


def memory() -> Iterator[Finding]:
    """Find how much memory is available."""
    free = available_memory()
    if free is None:
        yield Finding("memory", OK, "this system does not say what is available")
        return
    little = free < _LEAST_MEMORY
    advice = "large networks and photographs need more: close other programs, or give extract -j 1 and -b 1"
    yield Finding("memory", WARN if little else OK, f"{gigabytes(free)} available", advice if little else "")


def open_files() -> Iterator[Finding]:
    """Find how many files a process may have open."""
    if sys.platform == "win32":
        yield Finding("open files", OK, "no limit that matters")
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < _LEAST_FILES
    text = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} at a time"
    advice = f"run `ulimit -n {min(4096, hard) if hard > 0 else 4096}` first: many stores or archives need more"
    yield Finding("open files", WARN if few else OK, text, advice if few else "")


def gpus() -> Iterator[Finding]:
    """Find the GPUs that torch can use, and those that it cannot."""
    import torch

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    driver = _nvidia_driver()
    if available:
        built = (torch.version.cuda and f"CUDA {torch.version.cuda}") or f"ROCm {torch.version.hip}"
        for number in range(torch.cuda.device_count()):
            yield _gpu(number, f"{built}, driver {driver or 'unknown'}")
    elif torch.backends.mps.is_available():
        yield Finding("gpu", OK, "Apple's, by MPS: --device mps")
    elif driver is None:
        yield Finding("gpu", OK, "none; the processor does the work")
    elif torch.version.cuda is None:
        text = f"NVIDIA driver {driver}, but torch {torch.__version__} is built for processors only"
        yield Finding(
            "gpu", WARN, text, "install torch and torchvision for CUDA: https://pytorch.org/get-started/locally"
        )
    else:
        said = " ".join(str(complaints[-1].message).split())[:200] if complaints else "no device is visible"
        text = f"NVIDIA driver {driver}, but torch built for CUDA {torch.version.cuda} cannot use it: {said}"
        advice = "update the driver, or install a torch for an older CUDA; see that CUDA_VISIBLE_DEVICES is not empty"
        yield Finding("gpu", WARN, text, advice)


def _gpu(number: int, built: str) -> Finding:
    """Try one GPU with a product that is known."""
    import torch

    name = f"gpu {number}"
    try:
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = f"{facts.name}, {gigabytes(free)} of {gigabytes(total)} free, {built}"
        ones = torch.ones(64, 64, device=f"cuda:{number}")
        if float((ones @ ones).sum()) != 64.0**3:
            return Finding(
                name, FAIL, f"{text}; it computes wrong numbers", "use --device cpu, and have the GPU checked"
            )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        advice = (
            "this torch may have no code for this GPU, or others use it: install another torch, or use --device cpu"
        )
        return Finding(name, FAIL, reason, advice)
    little = free < _LEAST_MEMORY
    return Finding(name, WARN if little else OK, text, "other programs fill its memory" if little else "")


def _nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver, or None where there is none."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
        return next((word for word in line.split() if word[:1].isdigit() and "." in word), "unknown")
    except (OSError, IndexError):
        pass
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if line.strip()), None)
