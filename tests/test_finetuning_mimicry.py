"""Mimicry: the distance between what a student says and what its teachers say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from embedkit.errors import FinetuneError
from embedkit.finetuning.distillation.mimicry import Mimicry, validate_mimicry
from embedkit.finetuning.distillation.students import make_student, with_projection
from embedkit.finetuning.feeding.feed import Feed, TrainBatch
from embedkit.finetuning.recipe import Recipe
from embedkit.sources import list_images
from embedkit.spec import Preprocessing
from tests.conftest import write_photos

# Two teachers of width 2; the student hits the first and misses the second by a right angle.
SAID = torch.tensor([[3.0, 0.0, 0.0, 2.0]])
WANTED = torch.tensor([[1.0, 0.0, 1.0, 0.0]])


def batch_of(targets: Tensor) -> SimpleNamespace:
    return SimpleNamespace(codes=torch.zeros(len(targets), dtype=torch.int64), targets=targets)


def test_the_cosine_leaves_lengths_free_and_counts_teachers_alike() -> None:
    assert float(Mimicry([2, 2])(SAID, SAID, batch_of(WANTED))) == pytest.approx((0 + 1) / 2)
    assert float(Mimicry([2, 2])(100 * SAID, SAID, batch_of(WANTED))) == pytest.approx(0.5)
    assert float(Mimicry([1, 3])(SAID, SAID, batch_of(WANTED))) == pytest.approx((0 + 1) / 2)


def test_the_squared_error_is_a_mean_over_directions_then_teachers() -> None:
    assert float(Mimicry([2, 2], "mse")(SAID, SAID, batch_of(WANTED))) == pytest.approx((4 / 2 + 5 / 2) / 2)
    assert float(Mimicry([1, 3], "mse")(SAID, SAID, batch_of(WANTED))) == pytest.approx((4 + 5 / 3) / 2)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_parts_of_a_batch_add_up(kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    said, wanted = (torch.randn(6, 5, generator=random) for _ in range(2))
    criterion = Mimicry([2, 3], kind)
    parts = [criterion(said[span], said[span], batch_of(wanted[span])) for span in (slice(0, 4), slice(4, 6))]
    assert criterion.adds_up
    assert torch.allclose(criterion(said, said, batch_of(wanted)), parts[0] * 4 / 6 + parts[1] * 2 / 6)


def test_there_is_no_other_distance() -> None:
    with pytest.raises(FinetuneError, match="cosine, mse"):
        Mimicry([2], "manhattan")


@pytest.mark.parametrize("size", [2, 5])
def test_validation_has_a_cosine_for_each_teacher_and_the_loss_of_the_criterion(size: int) -> None:
    trainee = with_projection(make_student("test_resnet", Preprocessing(), img_size=32, device="cpu"), 4)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=random)
    wanted = torch.randn(5, 4, generator=random)
    rows = torch.arange(5)
    spans = [slice(start, start + size) for start in range(0, 5, size)]
    feed = SimpleNamespace(
        validation=lambda: [TrainBatch(pixels[span], rows[span], None, rows[span]) for span in spans]
    )
    criterion = Mimicry([1, 3], "mse")
    found = validate_mimicry(trainee, feed, lambda numbers: wanted.numpy()[numbers], criterion)  # type: ignore[arg-type]
    with torch.no_grad():
        said = trainee(pixels)
    first, second = (
        cosine_similarity(said[:, span], wanted[:, span], dim=1).mean() for span in (slice(1), slice(1, 4))
    )
    assert found == {
        "cosine": pytest.approx(float(first + second) / 2, abs=1e-5), "cosine_1": pytest.approx(float(first), abs=1e-5),
        "cosine_2": pytest.approx(float(second), abs=1e-5),
        "loss": pytest.approx(float(criterion(said, said, batch_of(wanted))), rel=1e-4),
    }  # fmt: skip


@pytest.mark.parametrize("readable", [1, 0])
def test_a_batch_that_cannot_be_read_is_no_part_of_the_validation(tmp_path: Path, readable: int) -> None:
    photos = write_photos(tmp_path / "photos", per_class=2)
    entries = list(list_images(photos).files)
    for entry in entries[readable:]:
        (photos / entry.id).write_bytes(b"no image")
    student = make_student("test_resnet", Preprocessing(), img_size=32, device="cpu")
    feed = Feed(entries, None, student.spec.preprocessing, Recipe(batch_size=1), workers=1)
    found = validate_mimicry(
        with_projection(student, 4), feed, lambda rows: torch.ones(len(rows), 4).numpy(), Mimicry([4])
    )
    assert len(feed.failures) == len(entries) - readable
    assert found.keys() == ({"cosine", "loss"} if readable else set())
