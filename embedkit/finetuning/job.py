"""Job: what all stages of a run know."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from embedkit.backbones import Backbone
from embedkit.extraction import Progress, extract
from embedkit.finetuning.blocks import Block
from embedkit.finetuning.examples import Division
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.run_folder import RunFolder
from embedkit.finetuning.trainee import Trainee
from embedkit.finetuning.training.distributed import World
from embedkit.finetuning.training.history import Moment
from embedkit.sources import Listing
from embedkit.store import Store

Watcher = Callable[[str, "Progress | Moment"], None]

log = logging.getLogger("embedkit")


@dataclass(frozen=True, eq=False)
class Job:
    """What all stages of a run know.

    Parameters
    ----------
    backbone : Backbone
        What is adapted.
    recipe : Recipe
        Every setting.
    division : Division
        The images.
    folder : RunFolder
        Where everything goes.
    world : World
        The processes that train together.
    workers : int, optional
        Threads that decode.
    watch : callable
        Called with the name of a stage and how far it is.
    trainee : Trainee
        The copy that learns.
    blocks : sequence of Block
        Of the trainee.
    criterion : nn.Module
        What is made small.
    identity : mapping of str to str
        What decides the weights beside the recipe.
    seconds : dict of str to float
        How long each stage took.
    failures : dict of str to str
        Why images could not be read, by their ids.
    """

    backbone: Backbone
    recipe: Recipe
    division: Division
    folder: RunFolder
    world: World
    workers: int | None
    watch: Watcher
    trainee: Trainee
    blocks: Sequence[Block]
    criterion: nn.Module
    identity: Mapping[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def listing(self) -> Listing:
        """All images."""
        return self.division.listing

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.division.classes

    @contextmanager
    def stage(self, name: str, line: str) -> Iterator[None]:
        """Say what comes, and take its time."""
        if self.world.first:
            log.info("%s: %s", name, line)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.world.wait()

    def embed(self, backbone: Backbone, path: Path, stage: str, parent: Store | None = None) -> Store:
        """Return the store of all images, which the first process makes."""
        if self.world.first:
            extract(
                self.listing, path, backbone, workers=self.workers, parent=parent,
                progress=lambda state: self.watch(stage, state),
            )  # fmt: skip
        self.wait()
        return Store.open(path)

    def adapted(self) -> Backbone:
        """Load the backbone that was saved."""
        device, max_pixels = str(self.backbone.device), self.backbone.max_pixels
        return Backbone.load(self.folder.path, device=device, max_pixels=max_pixels)
