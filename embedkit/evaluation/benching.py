"""Benching: every cell of a suite, measured once and kept; what is there already and still true is used again."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from embedkit import __version__
from embedkit.backbones import Backbone
from embedkit.backbones.network import count_parameters
from embedkit.errors import EmbedkitError, EvaluationError, SpecMismatchError, StoreExistsError, StoreFormatError
from embedkit.evaluation.cells import Cell, read_cell, write_cell
from embedkit.evaluation.leftovers import folder_aside, remove_leftovers
from embedkit.evaluation.probing import probe
from embedkit.evaluation.protocols import PROTOCOLS, find_protocol
from embedkit.evaluation.speeds import Speed, find_speed, speed_of_run
from embedkit.evaluation.splits import split_sha256
from embedkit.evaluation.suites import Plan, Suite, SuiteBackbone, SuiteData, file_name
from embedkit.extraction import Progress, extract
from embedkit.store import Store
from embedkit.store.locking import now
from embedkit.text import counted, say_nothing

log = logging.getLogger("embedkit")

_SECONDS_A_LINE = 10.0

Say = Callable[[str], None]
Extracting = Callable[[str, Progress], None]


def run_suite(
    suite: Suite,
    folder: str | os.PathLike[str],
    progress: Say | None = None,
    *,
    only: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    extracting: Extracting | None = None,
) -> list[Cell]:
    """Measure the cells of a suite, or what is missing of them.

    Below `folder` are ``stores/``, one store for each backbone and part of a data set, and ``cells/``, two files for
    each cell. Both survive a kill at any moment, and the same call goes on from there. Stores are brought up to date
    with their images. A cell is used again when its inputs are the same: the spec's digest, the content of the stores
    and of the split file, the protocol, its version and its parameters. Otherwise it is measured again, and said so.

    Parameters
    ----------
    suite : Suite
        What to measure; see `read_suite`.
    folder : path-like
        Where stores and cells are kept. It is made when it is not there.
    progress : callable, optional
        Called with one line of text at each step.
    only : str, optional
        Measure only the cells with this in their names, or with names like this pattern with ``*`` and ``?``. Others
        are returned where an earlier run has left them, and are not compared with their inputs.
    device : str, default "auto"
        As for `embedkit.Backbone.load`. With "cuda" or "cuda:N", heads that can be are fitted there too, unless their
        protocol in the suite names another device; with others, "auto" among them, they are fitted on the CPU.
    workers : int, optional
        As for `embedkit.extract`.
    extracting : callable, optional
        Called with the name of a store and a `Progress`, while images are embedded.

    Returns
    -------
    list of Cell
        In the suite's order. A cell that cannot be measured says why in its `error`, and takes no other cell along.

    Raises
    ------
    EvaluationError
        When no cell's name is like `only`.

    Examples
    --------
    >>> from embedkit.evaluation import read_suite, run_suite
    >>> cells = run_suite(read_suite("flowers.yaml"), "runs/flowers")  # doctest: +SKIP
    >>> cells[0].report.headline  # doctest: +SKIP
    ('top1', 0.9252, (0.9061, 0.9442))
    """
    chosen = {plan.name for plan in chosen_plans(suite, only)}
    bench = _Bench(Path(folder), progress or say_nothing, device, workers, extracting)
    found: dict[str, Cell] = {}
    for backbone in suite.backbones:
        plans = [plan for plan in suite.plans if plan.backbone is backbone and plan.name in chosen]
        found |= {cell.name: cell for cell in bench.measure(backbone, plans)} if plans else {}
    for plan in suite.plans:
        if plan.name not in found:
            kept = _kept(bench.cells, plan)
            found |= {} if kept is None else {plan.name: kept}
    return [found[plan.name] for plan in suite.plans if plan.name in found]


def chosen_plans(suite: Suite, only: str | None = None) -> list[Plan]:
    """Return the cells of a suite whose names are like a pattern.

    Raises
    ------
    EvaluationError
        When there is none.
    """
    if only is None:
        return suite.plans
    pattern = only if any(sign in only for sign in "*?[") else f"*{only}*"
    plans = [plan for plan in suite.plans if fnmatch.fnmatchcase(plan.name.casefold(), pattern.casefold())]
    if not plans:
        raise EvaluationError(f"no cell is like {only!r}; they are {', '.join(plan.name for plan in suite.plans[:8])}")
    return plans


def state_of(folder: str | os.PathLike[str], plan: Plan) -> str:
    """Return what is there of a cell: "done", "failed", "damaged" or "missing", or "stale" where the suite has changed.

    Whether the images or the backbone of one that is done have changed is found when the suite runs.
    """
    try:
        cell = read_cell(Path(folder, "cells"), plan.name)
    except EvaluationError:
        return "damaged"
    if cell is None or cell.report is None:
        return "missing" if cell is None else "failed"
    return "done" if _answers(cell, plan) else "stale"


def _kept(folder: Path, plan: Plan) -> Cell | None:
    """Return what an earlier run has left of a cell, as far as that can be told without its inputs."""
    try:
        cell = read_cell(folder, plan.name)
    except EvaluationError as error:
        log.warning("%s", error)
        return None
    return cell if cell is not None and _answers(cell, plan) else None


def _answers(cell: Cell, plan: Plan) -> bool:
    """Return whether a cell is of what the suite asks for, as far as that can be told without the inputs."""
    given = {"key": _asked(plan), "facts": _chosen(plan)}
    wanted: dict[str, dict[str, Any]] = json.loads(json.dumps(given))
    return wanted["key"].items() <= cell.key.items() and (not cell.key or wanted["facts"].items() <= cell.facts.items())


def _chosen(plan: Plan) -> dict[str, Any]:
    """Return what the suite says of the backbone and the images, whose names alone do not tell."""
    images = {"train": plan.data.train, "test": plan.data.test, "split": plan.data.split}
    return {"model": plan.backbone.model, "options": dict(plan.backbone.options), "images": images}


def _asked(plan: Plan) -> dict[str, Any]:
    """Return the inputs of a cell that the suite decides."""
    return {
        "protocol": plan.protocol.protocol,
        "protocol_version": PROTOCOLS[plan.protocol.protocol].version,
        "parameters": dict(plan.protocol.parameters),
        "train_split": plan.data.train_split,
        "test_split": plan.data.test_split,
    }


def head_device(plan: Plan, device: str) -> str:
    """Return where the head of a cell is fitted: on a GPU that was named, if it can be, and on the CPU otherwise."""
    given = plan.protocol.parameters
    recipe = find_protocol(plan.protocol.protocol, given.get("head"))
    on_gpu = device.startswith("cuda") and recipe.runs_on_devices(given.get("target", "class"))
    return device if on_gpu else "cpu"


@dataclass(frozen=True)
class _Inputs:
    """The stores of one backbone and data set, and how fast the backbone was on it."""

    train: Store
    test: Store | None
    split_sha256: str | None
    speed: Speed | None


@dataclass(frozen=True)
class _Bench:
    """Where a suite is measured, and how."""

    folder: Path
    say: Say
    device: str
    workers: int | None
    extracting: Extracting | None

    @property
    def cells(self) -> Path:
        return self.folder / "cells"

    @property
    def stores(self) -> Path:
        return self.folder / "stores"

    def measure(self, part: SuiteBackbone, plans: list[Plan]) -> list[Cell]:
        """Return the cells of one backbone, which is loaded once."""
        for folder in (self.cells, self.stores, self.folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        self.say(f"{part.name}: loading")
        try:
            backbone = Backbone.load(part.model, device=self.device, **part.options)
        except Exception as error:
            return [self.failed(plan, error) for plan in plans]
        cells = []
        for data in dict.fromkeys(plan.data for plan in plans):
            todo = [plan for plan in plans if plan.data is data]
            try:
                inputs = self.inputs(backbone, part, data)
            except Exception as error:
                cells += [self.failed(plan, error) for plan in todo]
                continue
            cells += [self.cell(plan, backbone, inputs) for plan in todo]
        return cells

    def inputs(self, backbone: Backbone, part: SuiteBackbone, data: SuiteData) -> _Inputs:
        """Bring the stores of one backbone and data set up to date."""
        name = f"{file_name(part.name)}--{file_name(data.name)}"
        train, timed = self.store(data.train, name if data.test is None else f"{name}--train", backbone)
        test = None if data.test is None else self.store(data.test, f"{name}--test", backbone)[0]
        path = self.stores / f"{name}.speed.json"
        speed = find_speed(path, timed, data.train, train, backbone, self.workers)
        return _Inputs(train, test, None if data.split is None else split_sha256(data.split), speed)

    def store(self, images: str, name: str, backbone: Backbone) -> tuple[Store, Speed | None]:
        """Return a store of these images by this backbone, and what its extraction measured."""
        path = self.stores / f"{name}.h5"
        with folder_aside(self.stores) as place:
            report = place / "report.json"

            def progress(now: Progress) -> None:
                if self.extracting is not None:
                    self.extracting(name, now)

            def make(overwrite: bool) -> Store:
                return extract(
                    images, path, backbone, workers=self.workers, overwrite=overwrite, report=report, progress=progress
                )

            try:
                store = make(overwrite=False)
            except (SpecMismatchError, StoreExistsError, StoreFormatError) as error:
                self.say(f"{path.name} is made again, for it cannot be used: {error}")
                store = make(overwrite=True)
            timed = speed_of_run(json.loads(report.read_bytes()), "extraction", backbone.spec.digest)
        if store.failures:
            self.say(f"{path.name}: {counted(len(store.failures), 'image')} could not be read")
        return store, timed

    def cell(self, plan: Plan, backbone: Backbone, inputs: _Inputs) -> Cell:
        """Return one cell: that of an earlier run when its inputs are the same, or a new one."""
        key = {
            "digest": inputs.train.digest,
            "train": inputs.train.content_id,
            "test": None if inputs.test is None else inputs.test.content_id,
            "split_sha256": inputs.split_sha256,
            **_asked(plan),
        }
        facts = {
            **_chosen(plan), "parameters": count_parameters(backbone), "dim": backbone.dim,
            "speed": None if inputs.speed is None else inputs.speed.to_dict(),
        }  # fmt: skip
        kept = self.earlier(plan, key)
        if kept is not None:
            self.say(f"{plan.name}: nothing has changed")
            # Named and timed as now: neither decides a number of the report.
            again = replace(kept, backbone=plan.backbone.name, data=plan.data.name, protocol=plan.protocol.name,
                            facts={**kept.facts, **facts})  # fmt: skip
            if not _answers(kept, plan):  # The same images or weights, which lie elsewhere now.
                write_cell(self.cells, again)
            return again
        self.say(f"{plan.name}: measuring")
        started = time.perf_counter()
        try:
            # Folds score the training part, whatever else the split file has.
            test_split = None if plan.protocol.parameters.get("folds") else plan.data.test_split
            parameters = {"device": head_device(plan, self.device), **plan.protocol.parameters}
            report = probe(
                inputs.train, inputs.test, split=plan.data.split, protocol=plan.protocol.protocol,
                train_split=plan.data.train_split, test_split=test_split,
                progress=self.now_and_then(plan.name), **parameters,
            )  # fmt: skip
        except Exception as error:
            return self.failed(plan, error)
        facts |= {"seconds": round(time.perf_counter() - started, 3), "finished": now(), "versions": versions()}
        cell = Cell(plan.name, plan.backbone.name, plan.data.name, plan.protocol.name, key, report, "", facts)
        write_cell(self.cells, cell)
        name, value, _ = report.headline
        copies = (report.inputs.get("leaks") or {}).get("test_rows", 0)
        leaks = f"; {counted(copies, 'test row')} with a copy in train" if copies else ""
        self.say(f"{plan.name}: {name} {value:.4f} in {facts['seconds']:.1f} s{leaks}")
        return cell

    def now_and_then(self, name: str) -> Say:
        """Return what passes on the lines of a probe, at most one in ten seconds: there are many cells."""
        last = time.monotonic()

        def pass_on(line: str) -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_A_LINE:
                self.say(f"{name}: {line}")
                last = time.monotonic()

        return pass_on

    def earlier(self, plan: Plan, key: Mapping[str, Any]) -> Cell | None:
        """Return the cell of an earlier run if it has these inputs, and say why where it has not."""
        try:
            cell = read_cell(self.cells, plan.name)
        except EvaluationError as error:
            self.say(f"{plan.name} is measured again: {error}")
            return None
        if cell is None or cell.report is None:
            return None
        other = [name for name in key if cell.key.get(name) != json.loads(json.dumps(key[name]))]
        if other:
            self.say(f"{plan.name} is measured again: {', '.join(other)} differ from those of the earlier run")
            return None
        return cell

    def failed(self, plan: Plan, error: Exception) -> Cell:
        """Record a cell that cannot be measured; what an earlier run measured stays, for it may be true again."""
        text, facts = str(error), {"finished": now(), "versions": versions()}
        if not isinstance(error, EmbedkitError | OSError):  # A bug of ours or of a library keeps its traceback.
            text = f"{type(error).__name__}: {text}"
            facts["traceback"] = "".join(traceback.format_exception(error))
        log.warning("%s failed: %s", plan.name, text)
        cell = Cell(plan.name, plan.backbone.name, plan.data.name, plan.protocol.name, {}, None, text, facts)
        if _kept(self.cells, plan) is None:
            write_cell(self.cells, cell)
        return cell


def versions() -> dict[str, str]:
    """Return the versions of what decides or computes numbers."""
    found = {"embedkit": __version__, "python": platform.python_version()}
    for package in ("timm", "torch", "scikit-learn", "numpy", "faiss-cpu", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
