"""Results: what is left of a run: a backbone, its head, its store, and what they are worth."""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone
from embedkit.errors import FinetuneError
from embedkit.evaluation.benching import versions
from embedkit.evaluation.leaks import Leaks
from embedkit.evaluation.reports import Report
from embedkit.evaluation.speeds import machine_name
from embedkit.extraction import embed_batches
from embedkit.finetuning.blocks import list_states
from embedkit.finetuning.comparison import BeforeAfter, classifier_report, compare_stores
from embedkit.finetuning.examples import Examples
from embedkit.finetuning.job import Job
from embedkit.finetuning.layers import as_estimator
from embedkit.finetuning.report_page import Account, run_page
from embedkit.finetuning.saving import save_backbone
from embedkit.finetuning.training.checkpoints import forget
from embedkit.finetuning.training.distributed import World
from embedkit.finetuning.training.history import History
from embedkit.finetuning.training.losses import METRIC_LOSSES
from embedkit.finetuning.warmup import warm_up
from embedkit.heads import save_head
from embedkit.index.duplicates.grouping import copies_among
from embedkit.store import Store
from embedkit.store.locking import now
from embedkit.text import counted

Rows = npt.NDArray[np.float32]

log = logging.getLogger("embedkit")


def conclude(
    job: Job,
    before: Store | None,
    leaks: dict[str, Leaks],
    warmup: dict[str, Any],
    history: History,
    *,
    reextract: bool,
) -> None:
    """Save what was learned, embed again, compare, and write the report; the state is needed no more.

    Parameters
    ----------
    job : Job
        Its trainee has the best epoch's weights.
    before : Store, optional
        Of the frozen backbone; without it nothing is compared.
    leaks : dict of str to Leaks
        Pictures that a part shares with the training part, for the report.
    warmup : dict
        How the head was fitted at first, for the report.
    history : History
        The epochs.
    reextract : bool
        Whether the images are embedded again.
    """
    # A run that was resumed has spent the time of all its epochs.
    spent = sum(row.seconds for row in history.epochs)
    job.seconds["training"] = round(max(job.seconds.get("training", 0.0), spent), 3)
    states = [asdict(state) for state in list_states(job.trainee, job.recipe)]
    _save(job, history)
    alone = replace(job, world=World())  # The other processes wait.
    adapted, after = job.adapted(), None
    if reextract:
        with job.stage("embedding again", f"{counted(len(job.listing.files), 'image')} by the adapted backbone"):
            after = alone.embed(adapted, job.folder.after, "embedding again", before)
    trained = _judged(job, adapted, before, after)
    comparison = None
    if before is not None:
        with job.stage("comparison", f"on {counted(len(job.division.test), 'image')} of {job.division.test.name}"):
            comparison = _compared(job, before, after, trained, judged=history.judged)
        log.info("%s", comparison.verdict)
    found = {failure.id: failure.reason for failure in job.listing.failures} | job.failures
    for store in (after, before):  # Stores say it in the extraction's own words.
        found |= {} if store is None else {failure.id: failure.error for failure in store.failures}
    failures = [f"{id}: {found[id]}" for id in sorted(found, key=os.fsencode)]
    account = Account(
        job.folder.path.name or "fine-tuning", _parent(job.backbone), job.recipe, job.division.summary(), warmup,
        history, comparison, leaks, failures, states, job.seconds, _circumstances(job),
    )  # fmt: skip
    job.folder.write_report(account.to_dict(), run_page(account, after or before))
    forget(job.folder.path)


def _save(job: Job, history: History) -> None:
    best, spec = history.best, job.backbone.spec
    save_backbone(
        job.folder.path, job.trainee.network, spec, classes=job.classes, parents=[spec], recipe=job.recipe.to_dict(),
        metrics={} if best is None else {name: value for name, value in best.metrics.items() if math.isfinite(value)},
        information={**job.identity, "epoch": history.best_epoch, "parts": job.division.summary()},
    )  # fmt: skip


def _parent(backbone: Backbone) -> dict[str, str]:
    spec = backbone.spec
    return {"name": spec.name, "digest": spec.digest, "weights_sha256": spec.weights_sha256}


def _judged(job: Job, adapted: Backbone, before: Store | None, after: Store | None) -> Report:
    """Save the head, and return what the trained network says about the images that are compared on."""
    recipe, division = job.recipe, job.division
    if recipe.loss in METRIC_LOSSES:  # Nothing has fitted it yet.
        kind = "probe" if recipe.head == "linear" else "sgd"
        x, codes, ids = _embeddings(job, adapted, after, division.train)
        known = before if after is None else after
        groups = None if known is None else copies_among(known, np.array([known.index_of(id) for id in ids]))
        warm_up(job.trainee, x, codes, replace(recipe, warmup=kind, from_scratch=False), groups=groups)
    head = as_estimator(job.trainee.head)
    information = {"made_by": "finetune", "digest": adapted.spec.digest, "recipe": adapted.recipe, "seed": recipe.seed}
    save_head(job.folder.head, head, classes=job.classes, spec=adapted.spec, information=information)
    x, codes, ids = _embeddings(job, adapted, after, division.test)
    return classifier_report(ids, codes, head.predict_proba(x), job.classes, seed=recipe.seed)


def _embeddings(
    job: Job, adapted: Backbone, after: Store | None, part: Examples
) -> tuple[Rows, npt.NDArray[np.int64], list[str]]:
    """Return embeddings, codes and ids of the images of a part that can be read."""
    codes = dict(zip(part.ids, part.codes.tolist(), strict=True))
    if after is not None:
        stored = set(after.ids)
        ids = [id for id in codes if id in stored]
        x = after.rows(ids=ids)
    else:
        ids, rows = [], []
        listing = replace(job.listing, files=part.entries, failures=[])
        for batch in embed_batches(listing, adapted, workers=job.workers):
            ids += [entry.id for entry in batch.items]
            rows.append(batch.embeddings)
            job.failures.update({entry.id: error.reason for entry, error in batch.failures})
        x = np.concatenate(rows)
    if not ids:
        raise FinetuneError(f"no image of the part {part.name!r} can be read any more")
    return x, np.array([codes[id] for id in ids], dtype=np.int64), ids


def _compared(job: Job, before: Store, after: Store | None, trained: Report, *, judged: bool) -> BeforeAfter:
    division = job.division
    names = (division.train.name, division.val.name, division.test.name)
    # A head that nobody trained beside the network is a probe already.
    fitted = None if job.recipe.loss in METRIC_LOSSES and after is not None else trained
    found = compare_stores(
        before, after, os.fspath(job.folder.split), names, trained=fitted, seed=job.recipe.seed,
        progress=lambda line: log.info("%s", line),
    )  # fmt: skip
    chosen = found.chosen_on and judged  # Without an epoch, or its validation, there was none to choose.
    return replace(found, chosen_on=chosen, after=trained if found.after is None else found.after)


def _circumstances(job: Job) -> dict[str, str]:
    return {
        "command": _command(),
        "device": str(job.backbone.device), "processes": str(job.world.size), "machine": machine_name(),
        "finished": now(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }  # fmt: skip


def _command() -> str:
    """Return what was typed, where that was a command of ours."""
    program = Path(sys.argv[0])
    ours = program.stem == "embedkit" or (program.parent.name, program.stem) == ("embedkit", "__main__")
    return shlex.join(["embedkit", *sys.argv[1:]]) if ours else ""
