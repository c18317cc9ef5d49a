"""Teachers: backbones whose embeddings are extracted once, so that no student waits for them again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone
from embedkit.errors import FinetuneError
from embedkit.extraction import Progress, extract
from embedkit.sources import Listing
from embedkit.store import Store

log = logging.getLogger("embedkit")


Teacher = str | os.PathLike[str] | Backbone


def load_teachers(teachers: Teacher | Sequence[Teacher], *, device: str = "auto") -> list[Backbone]:
    """Load teachers, all of them before any work is done.

    Parameters
    ----------
    teachers : str, path-like or Backbone, or a sequence of them
        As `Backbone.load` takes them, or loaded.
    device : str, default "auto"
        Where they are loaded to.

    Returns
    -------
    list of Backbone

    Raises
    ------
    FinetuneError
        When there is no teacher, the same one twice, or they turn photographs differently.
    BackboneError
        When one cannot be loaded.
    """
    named = [teachers] if isinstance(teachers, str | os.PathLike | Backbone) else list(teachers)
    if not named:
        raise FinetuneError("a student needs a teacher; name one with --teacher")
    found: list[Backbone] = []
    for name in named:
        backbone = name if isinstance(name, Backbone) else Backbone.load(name, device=device)
        if any(backbone.spec == other.spec for other in found):
            raise FinetuneError(f"the teacher {backbone.spec.backbone} is named twice; each counts once")
        if found and backbone.preprocessing.exif != found[0].preprocessing.exif:
            raise FinetuneError("one teacher applies EXIF orientation and another does not; load them alike")
        found.append(backbone)
    return found


def embed_views(
    views: Listing,
    teachers: Sequence[Backbone],
    folder: str | os.PathLike[str],
    *,
    kind: str = "",
    workers: int | None = None,
    progress: Callable[[str, Progress], None] | None = None,
) -> list[Store]:
    """Embed views by every teacher, each into a store of its own, or bring its store up to date.

    A run that was stopped goes on where it was; what a store has is not computed again, so one folder serves every
    student of these teachers and images, with any views.

    Parameters
    ----------
    views : Listing
        As `list_views` makes them.
    teachers : sequence of Backbone
    folder : path-like
        Of the stores, which are named after backbone, digest and `kind`.
    kind : str, optional
        What `name_views` calls the views.
    workers : int, optional
        As for `extract`.
    progress : callable, optional
        Called with a teacher's name and how far its extraction is.

    Returns
    -------
    list of Store
        In the order of the teachers.

    Raises
    ------
    EmbedkitError
        Whatever `extract` raises.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    stores = []
    for teacher in teachers:
        log.info("teacher: %s", teacher.description)
        report = None if progress is None else partial(progress, teacher.spec.backbone)
        stores.append(extract(views, _place(teacher, folder, kind), teacher, workers=workers, progress=report))
    return stores


def open_stores(teachers: Sequence[Backbone], folder: str | os.PathLike[str], kind: str = "") -> list[Store]:
    """Open what `embed_views` has made in this folder."""
    return [Store.open(_place(teacher, folder, kind)) for teacher in teachers]


def common_ids(stores: Sequence[Store]) -> npt.NDArray[np.bytes_]:
    """Return the ids that all stores have, as bytes, sorted: a teacher may fail where another does not."""
    found: npt.NDArray[np.bytes_] = stores[0].images.ids
    for store in stores[1:]:
        found = np.intersect1d(found, store.images.ids, assume_unique=True)
    return found


def _place(teacher: Backbone, folder: str | os.PathLike[str], kind: str) -> Path:
    return Path(folder, f"{teacher.spec.backbone}-{teacher.spec.digest[:12]}{kind}.h5")
