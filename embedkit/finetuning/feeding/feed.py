"""Feed: training batches, decoded and varied in threads while the network is at work."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedkit.backbones import Batch, Steps, in_batches, stream, usable_processors
from embedkit.errors import FinetuneError, ImageError
from embedkit.extraction.computing import read_entry
from embedkit.finetuning.feeding.mixing import mix_batch
from embedkit.finetuning.feeding.ordering import count_steps, epoch_order, in_steps, shard_of
from embedkit.finetuning.feeding.policies import policy_of
from embedkit.finetuning.feeding.transforms import read_variant
from embedkit.finetuning.recipe import Recipe
from embedkit.images import MAX_PIXELS, Region, read_crop
from embedkit.sources import Entry
from embedkit.spec import Preprocessing

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]
Box = tuple[int, int, int, int]

# Every chance has a generator of its own, told apart by its first number. What is drawn for one moves no other.
_ORDER, _IMAGE, _MIX = 1, 2, 3


def chances_of(seed: int, epoch: int, row: int, repeat: int = 0) -> np.random.Generator:
    """Return what an image's variant is drawn from.

    Parameters
    ----------
    seed : int
        The recipe's.
    epoch : int
        From 1.
    row : int
        Which of a feed's entries it is.
    repeat : int, default 0
        How often it has come before in this epoch.
    """
    return np.random.default_rng([_IMAGE, seed, epoch, row, repeat])


@dataclass(frozen=True)
class TrainBatch:
    """Images to learn from.

    Attributes
    ----------
    pixels : Tensor of shape (b, 3, h, w)
        uint8, channels last in memory.
    codes : Tensor of shape (b,)
        int64, the classes; -1 where there are none.
    targets : Tensor of shape (b, c) or None
        float32: the shares of the classes where images were mixed, or what the feed was told to give.
    rows : Tensor of shape (b,)
        int64: which of the feed's entries these are.
    """

    pixels: Tensor
    codes: Tensor
    targets: Tensor | None
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)


class _Place(NamedTuple):
    """One image's turn in an epoch."""

    row: int
    repeat: int  # How often it has come before in this epoch.


class Feed:
    """Training batches of some images, the same for the same seed and epoch whatever decodes them.

    Images are read and decoded by the extraction pipeline in worker threads, a few batches ahead of the network.
    Without augmentation a batch holds, bit for bit, the crops that the extraction sees. Chances are drawn from the
    recipe's seed, the epoch and the row alone, so that they depend neither on threads nor on what else is in the batch.

    Parameters
    ----------
    entries : sequence of Entry
        The images.
    codes : array of shape (n,), optional
        int64, the class of each.
    preprocessing : Preprocessing
        The backbone's.
    recipe : Recipe
        Its `augmentation`, `batch_size`, `balance` and `seed`.
    classes : int, optional
        How many there are; by default one more than the largest code.
    workers : int, optional
        Threads that decode; by default one for each usable processor.
    rank, world : int, default 0, 1
        Which of how many processes this is. Each sees its part of every step.
    targets : callable, optional
        Takes rows of shape (b,) and the epoch, and returns what the batch's `targets` are, of shape (b, c), float32.
        Nothing is mixed then.
    boxes : callable, optional
        Takes a row and the epoch, and returns the part of the image that is taken for the whole, as `Region` has it,
        or None.
    batches : callable, optional
        Takes the epoch and returns a sequence of arrays, the rows of each step, where a loss wants them chosen.
    max_pixels : int, default 178956970
        Larger images are refused.

    Attributes
    ----------
    failures : list of ImageError
        Images that could not be read so far, each once. They are missing from their batches, and nothing takes their
        place.

    Raises
    ------
    FinetuneError
        When there are no images, not a code for each, or timm does not understand the policy.

    Examples
    --------
    >>> import embedkit as ek
    >>> from embedkit.finetuning import Recipe
    >>> from embedkit.finetuning.feeding.feed import Feed
    >>> feed = Feed(listing.files, codes, backbone.preprocessing, Recipe())  # doctest: +SKIP
    >>> next(feed.epoch(1)).pixels.shape  # doctest: +SKIP
    torch.Size([32, 3, 224, 224])
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        codes: Rows | None,
        preprocessing: Preprocessing,
        recipe: Recipe,
        *,
        classes: int | None = None,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        targets: Callable[[Rows, int], npt.NDArray[np.float32]] | None = None,
        boxes: Callable[[int, int], Box | None] | None = None,
        batches: Callable[[int], Sequence[Rows]] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not len(entries):
            raise FinetuneError("there are no images to feed a network with")
        if codes is not None and len(codes) != len(entries):
            raise FinetuneError(f"{len(entries)} images cannot have {len(codes)} classes; expected one for each")
        if not 0 <= rank < world:
            raise FinetuneError(f"there is no process {rank} among {world}, which are counted from 0")
        if recipe.augmentation.aa:
            policy_of(recipe.augmentation.aa, preprocessing)  # What timm does not understand is said at once.
        self.entries, self.preprocessing, self.recipe = entries, preprocessing, recipe
        self.codes = np.full(len(entries), -1) if codes is None else np.asarray(codes, dtype=np.int64)
        self.classes = classes or max(0, int(self.codes.max()) + 1)
        self.workers = workers or usable_processors()
        self.rank, self.world, self.max_pixels = rank, world, max_pixels
        self._targets, self._boxes, self._batches = targets, boxes, batches
        self._failures: dict[str, ImageError] = {}

    @property
    def failures(self) -> list[ImageError]:
        """Images that could not be read so far, sorted by their ids."""
        return sorted(self._failures.values(), key=lambda error: os.fsencode(error.id))

    @property
    def steps(self) -> int:
        """How many batches an epoch has."""
        return self._extent[0]

    @property
    def images(self) -> int:
        """How many images an epoch has, in all processes; such as one view of each."""
        return self._extent[1]

    @cached_property
    def _extent(self) -> tuple[int, int]:
        if self._batches is not None:
            first = self._batches(1)
            return len(first), sum(map(len, first))
        return count_steps(len(self.entries), self.recipe.batch_size, self.world), len(self.entries)

    def epoch(self, number: int) -> Generator[TrainBatch, None, None]:
        """Yield the batches of an epoch, counted from 1.

        A batch is smaller by the images that cannot be read, and empty when it has no others: every process yields as
        many batches as the others do.
        """
        augmentation, seed = self.recipe.augmentation, self.recipe.seed

        def decode(data: Any, place: _Place) -> Pixels:
            random = chances_of(seed, number, place.row, place.repeat)
            id = self.entries[place.row].id
            return read_variant(data, self.preprocessing, augmentation, random, id=id, max_pixels=self.max_pixels)

        mixes = augmentation.mixes and self._targets is None and not 0 < augmentation.mixup_off_epoch <= number
        with closing(self._stream(self._places(number), decode, number)) as batches:
            for step, batch in enumerate(batches):
                codes, targets, pixels = torch.from_numpy(self.codes[_rows(batch)]), None, batch.embeddings
                if self._targets is not None:
                    targets = torch.from_numpy(self._targets(_rows(batch), number))
                elif mixes:
                    random = np.random.default_rng([_MIX, seed, number, step, self.rank])
                    pixels, targets = mix_batch(pixels, codes, self.classes, augmentation, random)
                yield TrainBatch(pixels, codes, targets, torch.from_numpy(_rows(batch)))

    def validation(self) -> Generator[TrainBatch, None, None]:
        """Yield the plain crops of this process's images, in the order of their rows."""

        def decode(data: Any, place: _Place) -> Pixels:
            return read_crop(data, self.preprocessing, id=self.entries[place.row].id, max_pixels=self.max_pixels)

        rows = shard_of(np.arange(len(self.entries)), self.rank, self.world)
        places = in_batches((_Place(row, 0) for row in rows.tolist()), self.recipe.batch_size)
        with closing(self._stream(places, decode, 0)) as batches:
            for batch in batches:
                found = _rows(batch)
                yield TrainBatch(
                    batch.embeddings, torch.from_numpy(self.codes[found]), None, torch.from_numpy(found)
                )  # fmt: skip

    def _places(self, number: int) -> Iterator[list[_Place]]:
        """Yield the images of this process's batches."""
        seen = np.zeros(len(self.entries), dtype=np.int32)
        for step in self._steps(number):
            places = []
            for row in step.tolist():
                places.append(_Place(row, int(seen[row])))
                seen[row] += 1
            yield places[self.rank * len(places) // self.world : (self.rank + 1) * len(places) // self.world]

    def _steps(self, number: int) -> Iterable[Rows]:
        if self._batches is not None:
            return self._batches(number)
        random = np.random.default_rng([_ORDER, self.recipe.seed, number])
        order = epoch_order(self.codes, random, balance=self.recipe.balance)
        return in_steps(order, self.recipe.batch_size, self.world)

    def _stream(
        self, places: Iterator[list[_Place]], decode: Callable[[Any, _Place], Pixels], number: int
    ) -> Generator[Batch[_Place, Tensor], None, None]:
        """Yield batches of pixels in order, and remember what could not be read."""

        def read(place: _Place) -> Any:
            data = read_entry(self.entries[place.row])
            box = None if self._boxes is None else self._boxes(place.row, number)
            return data if box is None or not isinstance(data, bytes) else Region(data, box)

        # As for an accelerator: the threads decode, and whoever asks for the batches has the network.
        with closing(stream(places, Steps(read, decode, self._tensor), workers=self.workers, accelerator=True)) as all:
            for batch in all:
                for place, error in batch.failures:
                    id = self.entries[place.row].id
                    self._failures[id] = error if error.id == id else ImageError(id, error.reason, error.kind)
                yield batch

    def _tensor(self, crops: Sequence[Pixels]) -> Tensor:
        """Return crops as one tensor of shape (b, 3, h, w), channels last in memory."""
        pixels = np.empty((len(crops), *self.preprocessing.img_size, 3), dtype=np.uint8)
        if crops:
            np.stack(list(crops), out=pixels)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _rows(batch: Batch[_Place, Tensor]) -> Rows:
    return np.array([place.row for place in batch.items], dtype=np.int64)
