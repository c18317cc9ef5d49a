"""The processor, and who uses it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from embedkit.diagnosis.findings import OK, WARN, Finding
from embedkit.machine import processor_facts

_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON"}
_BF16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "ARM"}


def processor() -> Iterator[Finding]:
    """Find what the processor can do, and what that means for the ways to run a network."""
    facts = processor_facts()
    flags, name = frozenset(facts.get("flags", facts.get("Features", "")).split()), facts.get("model name", "")
    vectors = [text for flag, text in _VECTORS.items() if flag in flags]
    bf16 = [text for flag, text in _BF16.items() if flag in flags]
    parts = [name or platform.processor() or platform.machine()]
    if flags:
        parts.append(f"vectors: {', '.join(vectors) or 'none'}")
        parts.append(f"bf16 by {bf16[0]}: --precision bf16 saves time" if bf16 else "no bf16: fp32 is the fastest")
    narrow = bool(flags) and platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags
    advice = "without AVX2, networks run several times slower; a virtual machine must let its host's processor through"
    yield Finding("processor", WARN if narrow else OK, "; ".join(parts), advice if narrow else "")
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    if limit:
        text = f"ATEN_CPU_CAPABILITY={limit} keeps torch from using what the processor has"
        yield Finding("processor limit", WARN, text, "unset ATEN_CPU_CAPABILITY")


def threads() -> Iterator[Finding]:
    """Find how many threads may run, how many will, and whether others run too."""
    import torch

    from embedkit.backbones import usable_processors

    usable, all_there = usable_processors(), os.cpu_count() or 1
    allowed, named = _quota(), {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    text = f"{usable} of {all_there} processors are usable, torch uses {torch.get_num_threads()}"
    if allowed is not None and allowed < usable:
        advice = f"this container may use {allowed:g} of them at a time: give extract -j {max(1, int(allowed))}"
        yield Finding("threads", WARN, text, advice)
    elif max([torch.get_num_threads(), *map(int, filter(str.isdecimal, named.values()))]) > usable:
        yield Finding("threads", WARN, text, f"more threads than processors: set OMP_NUM_THREADS={usable}")
    else:
        yield Finding("threads", OK, text)
    if named:
        text = ", ".join(f"{name}={value}" for name, value in named.items())
        yield Finding("thread variables", OK, f"{text}; extract has its own -j and --threads")
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        busy = load > usable + 0.5
        advice = "other programs use the processors; extraction will be slower, and the rates below too low"
        yield Finding("load", WARN if busy else OK, f"{load:.1f} on {usable} processors", advice if busy else "")


_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _quota() -> float | None:
    """Return how many processors a cgroup allows, in either version of cgroups."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                Path("/sys/fs/cgroup/cpu", f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        except (OSError, ValueError):
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None  # "max"
