"""The run report: what was chosen, what it measured, and one hint."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from typing import Any

import torch

from embedkit.backbones import Choice
from embedkit.extraction.computing import Job
from embedkit.extraction.progress import Measured, Progress


def write_report(
    path: str | os.PathLike[str], progress: Progress, job: Job | None, choice: Choice | None, cpu_seconds: float
) -> None:
    """Write as JSON what a run did, how fast, and why not faster."""
    measured = progress.measured
    report: dict[str, Any] = {
        "images": {
            "total": progress.total, "failed": progress.failed, "kept": progress.kept,
            "computed": progress.done - progress.kept,
        },
        "changes": dataclasses.asdict(progress.changes),
        "measured": {**_rounded(dataclasses.asdict(measured)), "cpu_seconds": round(cpu_seconds, 3)},
        "peak_memory_bytes": peak_memory(),
        "hint": "" if job is None else hint(measured, job),
    }  # fmt: skip
    if job is not None:
        report["workers"], report["threads"] = job.workers, job.threads
        report["batch_size"] = job.engine.batch_size
        report["engine"] = job.engine.name
        report["precision"] = job.backbone.spec.precision
        report["decoder"] = job.backbone.preprocessing.decoder
        report["device"], report["devices"] = str(job.backbone.device), list(job.devices)
    if choice is not None:
        report["chosen_because"] = choice.reason
        report["trials"] = [_rounded(dataclasses.asdict(trial), 9) for trial in choice.trials]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
        file.write("\n")


def hint(measured: Measured, job: Job) -> str:
    """Return what a run waited for most, and what would help."""
    shares = {name: getattr(measured, name) for name in ("read", "decode", "forward", "wait")}
    if job.backbone.device.type != "cpu" and measured.forward > 0.5:
        shares = {"forward": measured.forward}  # Decoders that wait for a busy GPU are as it should be.
    most = max(shares, key=lambda name: shares[name])
    share = f"{100 * shares[most]:.0f} % of the time"
    if most == "read":
        return f"read-bound, {share}: the images come slowly; a local disk, or more --workers to wait side by side"
    if most == "decode":
        return f"decode-bound, {share}: smaller copies of large photographs, --decode fast, or more processors"
    if most == "wait":
        return f"workers waited {share}: for other programs on this machine, or for the disk that the store is on"
    if job.backbone.device.type != "cpu":
        return f"forward-bound, {share}: the GPU is busy; --precision fp16 where it may cost accuracy, or a larger one"
    help_ = [] if job.engine.name == "openvino" or _has_openvino() else ["the extra embedkit[openvino]"]
    if job.backbone.spec.precision == "float32" and _has_bf16():
        help_.append("--precision bf16 where it may cost accuracy")
    return f"forward-bound, {share}: {', '.join([*help_, 'a GPU'])}, or a smaller model"


def engine_line(choice: Choice, job: Job) -> str:
    """Return the one line that says what was chosen."""
    trial, decoder = choice.trial, job.backbone.preprocessing.decoder
    eager = next((other for other in choice.trials if other.engine == "eager"), trial)
    parts = [
        *([f"a process on each of {', '.join(job.devices)}"] if job.devices else []),
        f"{job.workers} worker{'s' * (job.workers > 1)} with {job.threads} thread{'s' * (job.threads > 1)} each",
        f"{job.engine.batch_size} images a pass", decoder,
    ]  # fmt: skip
    if trial.seconds and (job.backbone.spec.precision != "float32" or trial.engine != "eager"):
        parts.append(f"cosine to eager float32 at least {trial.min_cosine:.7f}, mean {trial.mean_cosine:.7f}")
    if trial.engine != "eager" and trial.seconds:
        parts.append(f"{eager.seconds / trial.seconds:.2f} times as fast as eager")
    return f"engine {trial.engine}: {', '.join(parts)}"


def peak_memory() -> int | None:
    """Return the most bytes of memory that this process has had; None where the system does not say."""
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rounded(values: dict[str, Any], digits: int = 4) -> dict[str, Any]:
    return {name: round(value, digits) if isinstance(value, float) else value for name, value in values.items()}


def _has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _has_bf16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
