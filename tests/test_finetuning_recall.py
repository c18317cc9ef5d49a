"""Recall@1 of validation images among themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from embedkit.finetuning.feeding.feed import TrainBatch
from embedkit.finetuning.training.recall import validate_recall

# Angles on the circle, in degrees, and classes: the nearest of 0 is 10, and so on.
ANGLES, CODES = [0, 10, 90, 95, 180, 270], [0, 0, 1, 0, 1, 2]


class Circle(nn.Module):
    """Embeds a picture whose first number is an angle as a point on the circle, of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3)

    def embed(self, pixels: Tensor) -> Tensor:
        angles = torch.deg2rad(pixels[:, 0, 0, 0])
        return torch.stack([angles.cos(), angles.sin()], dim=1) * (1 + angles[:, None])


def feed_of(angles: list[int], codes: list[int], size: int) -> SimpleNamespace:
    def validation() -> list[TrainBatch]:
        pixels = torch.tensor(angles, dtype=torch.float32).reshape(-1, 1, 1, 1)
        rows = torch.arange(len(codes))
        spans = [slice(start, start + size) for start in range(0, len(codes), size)]
        return [TrainBatch(pixels[span], torch.tensor(codes)[span], None, rows[span]) for span in spans]

    return SimpleNamespace(validation=validation)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_recall_counts_images_whose_nearest_other_is_of_their_class(size: int) -> None:
    # 0 and 10 find each other; 90 finds 95 and 95 finds 90, of other classes; 180 finds 95; 270 is alone in its class.
    found = validate_recall(Circle(), feed_of(ANGLES, CODES, size))  # type: ignore[arg-type]
    assert found == {"recall@1": pytest.approx(2 / 5)}


def test_recall_of_images_that_are_all_alone_is_no_number() -> None:
    assert validate_recall(Circle(), feed_of([0, 90], [0, 1], 2)) == {}  # type: ignore[arg-type]
    assert validate_recall(Circle(), feed_of([], [], 2)) == {}  # type: ignore[arg-type]
