from __future__ import annotations

import numpy as np
import pytest
import torch

from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.feeding.mixing import cut_box, draw_box, mix_batch


def marked(count: int, height: int = 23, width: int = 31) -> torch.Tensor:
    """Return images each pixel of which says whose it is."""
    values = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return values.expand(count, 3, height, width).clone(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_a_cutmix_label_weighs_the_area_that_was_kept(kind: str) -> None:
    clipped = 0
    for seed in range(200):
        pixels = marked(5) if kind == "uint8" else marked(5).float()
        before = torch.arange(5)
        mixed, targets = mix_batch(pixels, before, 5, Augmentation(cutmix=1.0), np.random.default_rng(seed))
        assert targets is not None and mixed.dtype == pixels.dtype
        shares = torch.stack([(mixed[:, 0] == owner).float().mean((1, 2)) for owner in range(5)], dim=1)
        torch.testing.assert_close(targets, shares, rtol=0, atol=1e-6)
        rows = np.flatnonzero((mixed[0, 0] != 0).any(1).numpy())
        clipped += len(rows) > 0 and (rows[0] == 0 or rows[-1] == 22)
    assert clipped > 20  # Boxes at the borders, of which only a part lies inside.


def test_a_box_has_the_area_that_was_drawn_unless_it_is_clipped() -> None:
    for seed in range(50):
        top, left, bottom, right = draw_box(100, 200, 0.75, np.random.default_rng(seed))
        assert 0 <= top <= bottom <= 100 and 0 <= left <= right <= 200
        if top > 0 and bottom < 100 and left > 0 and right < 200:
            assert (bottom - top) * (right - left) == 0.25 * 100 * 200
    everything, share = cut_box(marked(2), torch.tensor([1, 0]), (0, 0, 23, 31))
    assert share == 0 and (everything[0] == 1).all() and (everything[1] == 0).all()


def test_mixup_adds_pixels_and_labels_by_the_same_share() -> None:
    codes = torch.tensor([0, 1, 2, 1])
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=random)
        mixed, targets = mix_batch(pixels.clone(), codes, 3, Augmentation(mixup=0.4), np.random.default_rng(seed))
        assert targets is not None
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        # A share and the partners that explain the labels explain the pixels.
        own = targets[0, 0]
        partners = [
            other for other in range(1, 4)
            if (torch.lerp(pixels[other].float(), pixels[0].float(), float(own)) - mixed[0]).abs().max() < 0.51
        ]  # fmt: skip
        assert len(partners) == 1 and float(targets[0, codes[partners[0]]]) == pytest.approx(1 - float(own), abs=1e-6)


def test_nobody_is_mixed_with_itself() -> None:
    for count in range(2, 9):
        codes = torch.arange(count)
        augmentation = Augmentation(mixup=5.0)
        _, targets = mix_batch(marked(count), codes, count, augmentation, np.random.default_rng(count))
        assert targets is not None
        assert ((targets > 0).sum(1) == 2).all() and ((targets > 0).sum(0) == 2).all()


def test_mixing_is_left_to_chance_and_to_batches_of_two() -> None:
    half = Augmentation(mixup=1.0, cutmix=1.0, mix_prob=0.5)
    found = []
    for seed in range(300):
        mixed, targets = mix_batch(marked(3), torch.arange(3), 3, half, np.random.default_rng(seed))
        if targets is None:
            assert torch.equal(mixed, marked(3))
            found.append("none")
        else:
            found.append("cutmix" if mixed[0].unique().numel() == 2 else "other")
    assert 110 < found.count("none") < 190 and found.count("cutmix") > 40 and found.count("other") > 40
    alone, targets = mix_batch(marked(1), torch.arange(1), 3, Augmentation(mixup=1.0), np.random.default_rng(0))
    assert targets is None and torch.equal(alone, marked(1))


def test_the_same_generator_mixes_alike_and_keeps_the_layout() -> None:
    augmentation = Augmentation(mixup=1.0, cutmix=1.0)
    one, other = (
        mix_batch(marked(6), torch.arange(6), 6, augmentation, np.random.default_rng(seed)) for seed in (7, 7)
    )
    assert torch.equal(one[0], other[0]) and one[1] is not None and torch.equal(one[1], other[1])  # type: ignore[arg-type]
    assert one[0].is_contiguous(memory_format=torch.channels_last)
