"""Which engine a job gets: the fastest that returns the numbers of eager float32, tried on the job's own images."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from embedkit.backbones.engines import ENGINES, Embeddings, Engine, Pixels
from embedkit.backbones.network import Network
from embedkit.errors import BackboneError

MIN_COSINE = 0.99999  # Below it, on any image, an engine that should be exact is none.
_GAIN = 1.05  # Less than that is noise.
_ROUNDS = 2
# A compiler may cost a quarter of what the network would take without it: it mostly saves more than a third. It takes
# about five passes and a third of a second: measured on mobilenetv2_100, resnet50 and vit_small_patch16_224.
_BUDGET, _BUILD_PASSES, _BUILD_SECONDS, _COMPILE_SECONDS = 1 / 4, 5, 0.3, 60

log = logging.getLogger("embedkit")


@dataclass(frozen=True)
class Trial:
    """One engine that was tried.

    Attributes
    ----------
    engine : str
    seconds : float
        Best time of a pass, on one thread.
    images_per_second : float
        Of that pass.
    min_cosine, mean_cosine : float
        Between its embeddings and those of eager float32, over the images that it was tried with.
    build_seconds : float
        To make it.
    dropped : str
        Why it is no candidate; empty for one that is.
    """

    engine: str
    seconds: float = 0.0
    images_per_second: float = 0.0
    min_cosine: float = 1.0
    mean_cosine: float = 1.0
    build_seconds: float = 0.0
    dropped: str = ""


@dataclass(frozen=True)
class Choice:
    """An engine, and what it was chosen from."""

    engine: Engine
    trials: tuple[Trial, ...]
    reason: str

    @property
    def trial(self) -> Trial:
        """How the chosen engine did."""
        return next(trial for trial in self.trials if trial.engine == self.engine.name)


def choose(
    network: Network,
    crops: Sequence[Pixels],
    count: int,
    *,
    engine: str = "auto",
    batch_size: int = 8,
    precision: str = "fp32",
    workers: int = 1,
) -> Choice:
    """Choose the engine for a job as `Backbone.choose_engine` says, in a thread that computes as its workers will."""
    if engine not in ("auto", *ENGINES):
        raise BackboneError(f"unknown engine {engine!r}; choose auto or one of {', '.join(ENGINES)}")
    device = network.scale.device
    workers = workers if device.type == "cpu" else 1
    if not crops:  # Nothing to try them on.
        name, reason = ("eager", "short job") if engine == "auto" else (engine, "named")
        return Choice(built(network, name, batch_size, precision, workers), (Trial(name),), reason)
    plain = built(network, "eager", batch_size, precision)
    passes = count / workers / batch_size
    if device.type != "cpu":
        _timed(plain, _batch(crops, batch_size))  # The first pass sets up the device's libraries.
    seconds = _timed(plain, _batch(crops, batch_size))  # Cold, an estimate that costs a short job next to nothing.
    tried = _worth_trying(device, seconds, passes) if engine == "auto" else [engine] if engine != "eager" else []
    reason = "named" if engine != "auto" else "fastest" if tried else "short job"
    if not tried and precision == "fp32":
        return Choice(plain, (Trial("eager", seconds, batch_size / seconds),), reason)

    def attempt(name: str, precision: str) -> tuple[Engine | None, Sequence[Embeddings], Trial]:
        return _trial(name, partial(built, network, name, batch_size, precision, workers), crops, expected, precision)

    expected: Sequence[Embeddings] = []
    reference, expected, first = attempt("eager", "fp32")
    if reference is None:
        raise BackboneError(first.dropped)
    trials, engines = [first], {"eager": reference}
    if precision != "fp32":
        lower, _, trial = attempt("eager", precision)
        if lower is None:
            raise BackboneError(f"this backbone cannot compute in {precision}: {trial.dropped}")
        trials, engines = [trial], {"eager": lower}
    for name in tried:
        if engine == "auto" and name == "openvino" and not _pays(trials, passes):
            continue
        found, _, trial = attempt(name, precision)
        trials.append(trial)
        if found is not None:
            engines[name] = found
        elif engine == name:
            raise BackboneError(f"the engine {name} cannot run this backbone: {trial.dropped}")
        else:
            log.info("engine %s is left out: %s", name, trial.dropped)
    good = {trial.engine: trial.seconds for trial in trials if not trial.dropped}
    best = min(good, key=lambda name: good[name] * (_GAIN if name != "eager" else 1.0))
    chosen = engines[engine if engine in engines else best]
    if chosen.name != "compile":
        _forget(network, "compile")  # Its recording holds on to a GPU's memory.
    return Choice(chosen, tuple(trials), reason)


def built(network: Network, name: str, batch_size: int, precision: str, workers: int = 1) -> Engine:
    """Return an engine, built once for a network: what a compiler makes is never given back."""
    options = {"threads": workers} if name == "openvino" else {}
    # A graph keeps the number of threads that it was built with.
    key = (name, batch_size, precision, torch.get_num_threads() if name == "graph" else 0, *options.values())
    if key not in network.engines:
        network.engines[key] = ENGINES[name](network, batch_size, precision, **options)
    engine: Engine = network.engines[key]
    return engine


def _forget(network: Network, name: str) -> None:
    for key in [key for key in network.engines if key[0] == name]:
        del network.engines[key]


def _worth_trying(device: torch.device, seconds: float, passes: float) -> list[str]:
    """Return the engines to try beside eager for a job of so many passes."""
    if device.type == "cuda":
        # A GPU's compiler takes a minute or two, whatever the network.
        return ["compile"] if passes * seconds * _BUDGET > _COMPILE_SECONDS else []
    build = _BUILD_SECONDS + _BUILD_PASSES * seconds
    if device.type != "cpu" or build > passes * seconds * _BUDGET:
        return []
    names = ["graph"] if torch.backends.mkldnn.is_available() else []  # type: ignore[no-untyped-call]
    return names + (["openvino"] if importlib.util.find_spec("openvino") else [])


def _pays(trials: Sequence[Trial], passes: float) -> bool:
    """Return whether OpenVINO may pay: beside a graph that works it gains a tenth, and it takes longer to build."""
    best = min(trial.seconds for trial in trials if not trial.dropped)
    budget = _BUDGET / 4 if len([trial for trial in trials if not trial.dropped]) > 1 else _BUDGET
    return 1.5 + _BUILD_PASSES * trials[0].seconds <= passes * best * budget


def _trial(
    name: str,
    build: Callable[[], Engine],
    crops: Sequence[Pixels],
    expected: Sequence[Embeddings],
    precision: str,
) -> tuple[Engine | None, Sequence[Embeddings], Trial]:
    """Build an engine, time it and compare it; None with the reason when it is no candidate."""
    try:
        started = time.perf_counter()
        engine = build()
        found = engine(crops)
        built = time.perf_counter() - started
        batch = _batch(crops, engine.batch_size)
        seconds = min(_timed(engine, batch) for _ in range(_ROUNDS))
    except Exception as error:  # Compilers fail in ways of their own; whatever it is, this one is no candidate.
        return None, [], Trial(name, dropped=" ".join(f"{type(error).__name__}: {error}".split())[:200])
    trial = Trial(name, seconds, engine.batch_size / seconds, build_seconds=built)
    if not all(np.isfinite(embeddings).all() for embeddings in found):
        text = "it returned infinities or NaN for real pixels; are these its own weights"
        text += "?" if precision == "fp32" else f", and small enough for {precision}?"
        return None, [], replace(trial, dropped=text)
    cosines = np.concatenate([_cosine(left, right) for left, right in zip(found, expected or found, strict=True)])
    trial = replace(trial, min_cosine=float(cosines.min()), mean_cosine=float(cosines.mean()))
    if precision == "fp32" and trial.min_cosine < MIN_COSINE:
        return None, [], replace(trial, dropped=f"its embeddings differ, cosine {trial.min_cosine:.7f}")
    return engine, found, trial


def _batch(crops: Sequence[Pixels], batch_size: int) -> list[Pixels]:
    """Return a whole batch of some images, so that every engine is timed doing the same."""
    return list(itertools.islice(itertools.cycle(crops), batch_size))


def _timed(engine: Engine, crops: Sequence[Pixels]) -> float:
    started = time.perf_counter()
    engine(crops)
    return time.perf_counter() - started


def _cosine(left: Embeddings, right: Embeddings) -> npt.NDArray[np.float64]:
    """Return the cosine of each pair of rows; 1 for two rows of zeros."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = np.where((a == b).all(axis=1), 1.0, 0.0)
    return np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), same)
