"""The account of a distillation: what report.json and the page say, and what a judge adds to them later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from embedkit.finetuning.distillation.page import distillation_page
from embedkit.finetuning.distillation.views import image_id
from embedkit.finetuning.run_folder import RunFolder
from embedkit.spec import EmbeddingSpec
from embedkit.store import Store

FAILURES = 1000  # That report.json names.


def describe_backbone(spec: EmbeddingSpec) -> dict[str, Any]:
    """Return what an account says of a backbone."""
    return {
        "name": spec.name, "dim": spec.dim, "digest": spec.digest,
        "img_size": list(spec.preprocessing.img_size), "weights_sha256": spec.weights_sha256,
    }  # fmt: skip


def list_failures(stores: Sequence[Store], views: int) -> dict[str, Any]:
    """Return which images a teacher could not read, and the names of the stores that say so."""
    found: dict[str, str] = {}
    for store in stores:
        for failure in store.failures:
            found.setdefault(failure.id if views == 1 else image_id(failure.id), failure.error)
    return {
        "failed": len(found),
        "failures": [f"{id}: {error}" for id, error in found.items()][:FAILURES],
        "failed_in": [store.path.name for store in stores if store.failures],
    }


def write_account(folder: RunFolder, account: Mapping[str, Any]) -> None:
    """Write the account as a page and as JSON, which ends the run."""
    folder.write_report(account, distillation_page(account))


def record_judgement(output: str | os.PathLike[str], judgement: Mapping[str, Any]) -> dict[str, Any]:
    """Add a judgement to the account of a finished run, in place of an earlier one.

    Parameters
    ----------
    output : path-like
        The run's folder.
    judgement : mapping
        As `embedkit.finetuning.distillation.judging.verdict_dict` returns it.

    Returns
    -------
    dict
        The whole account.

    Raises
    ------
    FinetuneError
        When no account is there.
    StoreBusyError
        When another process is at work in the folder.
    """
    folder = RunFolder(output)
    with folder.lock():
        account = {**folder.read_report(), "judgement": dict(judgement)}
        write_account(folder, account)
    return account
