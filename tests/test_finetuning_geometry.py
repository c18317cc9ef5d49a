"""Where a training crop lies, and what is cut out there."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from embedkit import Preprocessing
from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.feeding.geometry import View, draw_view, enough_for, take_view
from embedkit.images import DECODERS, crop, frame_of, read_image

SQUARE = Preprocessing(img_size=(48, 48), crop_pct=1.0, interpolation="bilinear", decoder=DECODERS["standard"])
WHOLE = (0.0, 0.0, 1.0, 1.0)
Pixels = npt.NDArray[np.uint8]


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """Return red that grows to the right, and green that grows downwards."""
    across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return np.rint(np.stack([255 * across, 255 * down, np.full_like(across, 90)], axis=2)).astype(np.uint8)


def test_a_quarter_turn_moves_every_pixel_and_changes_none() -> None:
    pixels = noise(48, 48)
    turned = take_view(pixels, View(WHOLE, (0.0, -1.0, 1.0, 0.0, 0.0, 0.0)), SQUARE)
    assert np.array_equal(turned, np.rot90(pixels))


def test_a_shift_brings_in_the_mirror_image_of_what_is_there() -> None:
    pixels = noise(48, 48)
    shifted = take_view(pixels, View(WHOLE, (1.0, 0.0, 0.0, 1.0, 3.0, 5.0)), SQUARE)
    beyond = np.pad(pixels, ((0, 5), (0, 3), (0, 0)), mode="symmetric")
    assert np.array_equal(shifted, beyond[5:, 3:])


def test_around_a_crop_with_borders_lies_the_mean() -> None:
    preprocessing = replace(SQUARE, crop_mode="border", mean=(0.2, 0.4, 0.6))
    shifted = take_view(noise(48, 48), View(WHOLE, (1.0, 0.0, 0.0, 1.0, 8.0, 0.0)), preprocessing)
    assert np.array_equal(shifted[:, -8:], np.broadcast_to([51, 102, 153], (48, 8, 3)))
    assert np.array_equal(shifted[:, :-8], noise(48, 48)[:, 8:])


def test_mirrored_and_flipped_views_are_what_they_say() -> None:
    pixels = noise(48, 48)
    assert np.array_equal(take_view(pixels, View(WHOLE, mirrored=True), SQUARE), pixels[:, ::-1])
    assert np.array_equal(take_view(pixels, View(WHOLE, flipped=True), SQUARE), pixels[::-1])


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(120, 200), (200, 120), (400, 400), (30, 40)])
def test_a_view_that_is_hardly_turned_is_the_crop_of_the_evaluation(mode: str, size: tuple[int, int]) -> None:
    preprocessing = replace(SQUARE, crop_mode=mode, crop_pct=0.8, mean=(0.1, 0.5, 0.3))
    pixels = smooth(*size)
    view = View(frame_of(*size, preprocessing), (1.0, 1e-9, 0.0, 1.0, 0.0, 0.0))
    assert not view.is_straight
    wanted = crop(read_image(pixels), preprocessing).astype(int)
    difference = np.abs(take_view(pixels, view, preprocessing) - wanted)
    assert difference.mean() < 1.5


def test_a_turn_is_about_the_middle_and_by_the_angle_that_was_drawn() -> None:
    augmentation = Augmentation(rotation=30.0)
    pixels = smooth(96, 96)
    for seed in range(8):
        view = draw_view(96, 96, SQUARE, augmentation, np.random.default_rng(seed))
        angle = math.atan2(view.turn[2], view.turn[0])
        assert abs(angle) <= math.radians(30)
        found = take_view(pixels, view, SQUARE).astype(float)
        assert found[23:25, 23:25, :2].mean() == pytest.approx(127.5, abs=2)
        # Along a row of the crop, red grows by the cosine of the angle and green by its sine.
        middle = found[16:32, 16:32, :2]
        step = 255 / 48
        assert np.diff(middle[..., 0], axis=1).mean() == pytest.approx(step * math.cos(angle), abs=0.15)
        assert np.diff(middle[..., 1], axis=1).mean() == pytest.approx(step * math.sin(angle), abs=0.15)


@pytest.mark.parametrize("zoom", [0.5, 1.0, 2.0])
def test_a_zoom_shows_more_or_less_of_the_image(zoom: float) -> None:
    view = View(WHOLE, (1 / zoom, 1e-9, 0.0, 1 / zoom, 0.0, 0.0))
    found = take_view(smooth(200, 200), view, SQUARE).astype(float)
    assert np.diff(found[20:28, 20:28, 0], axis=1).mean() == pytest.approx(255 / 48 / zoom, rel=0.05)


def test_a_random_box_keeps_to_its_scale_and_ratio_and_to_the_image() -> None:
    augmentation = Augmentation(crop_scale=(0.2, 0.6), crop_ratio=(0.8, 1.5))
    areas, lefts = [], []
    for seed in range(300):
        height, width = 300, 500
        top, left, bottom, right = draw_view(height, width, SQUARE, augmentation, np.random.default_rng(seed)).box
        assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
        down, across = (bottom - top) * height, (right - left) * width
        areas.append(down * across / (height * width))
        lefts.append(left)
        assert 0.79 < across / down < 1.52
    assert 0.19 < min(areas) < 0.25 and 0.55 < max(areas) < 0.61 and 0.37 < np.mean(areas) < 0.43
    assert min(lefts) < 0.02 and max(lefts) > 0.4


def test_a_long_and_thin_image_gives_its_middle() -> None:
    for height, width in ((10, 1000), (1000, 10), (1, 1)):
        augmentation = Augmentation(crop_scale=(0.9, 0.95))
        top, left, bottom, right = draw_view(height, width, SQUARE, augmentation, np.random.default_rng(0)).box
        assert top + bottom == pytest.approx(1, abs=0.02) and left + right == pytest.approx(1, abs=0.02)
        assert take_view(noise(height, width), View((top, left, bottom, right)), SQUARE).shape == (48, 48, 3)


def test_what_is_enough_is_two_pixels_for_each_of_the_crop() -> None:
    half = View((0.25, 0.25, 0.75, 0.75))
    assert enough_for(half, 4000, 3000, SQUARE) == (192, 192)
    assert enough_for(half, 100, 90, SQUARE) == (100, 90)
    zoomed = replace(half, turn=(0.5, 0.0, 0.0, 0.5, 0.0, 0.0))
    assert enough_for(zoomed, 4000, 3000, SQUARE) == (384, 384)


def test_the_scale_at_which_an_image_was_decoded_changes_its_crop_hardly() -> None:
    large, small = smooth(400, 600), smooth(200, 300)
    augmentation = Augmentation(crop_scale=(0.3, 0.8), rotation=20.0, shear=10.0, zoom=0.2)
    for seed in range(6):
        view = draw_view(400, 600, SQUARE, augmentation, np.random.default_rng(seed))
        crops = [take_view(pixels, view, SQUARE).astype(int) for pixels in (large, small)]
        assert np.abs(crops[0] - crops[1]).mean() < 1.5


def test_chances_come_as_often_as_they_are_asked_for() -> None:
    augmentation = Augmentation(hflip=0.3, vflip=0.7, shift=0.1)
    views = [draw_view(64, 64, SQUARE, augmentation, np.random.default_rng(seed)) for seed in range(400)]
    assert 0.23 < np.mean([view.mirrored for view in views]) < 0.37
    assert 0.63 < np.mean([view.flipped for view in views]) < 0.77
    assert max(abs(view.turn[4]) for view in views) == pytest.approx(4.8, abs=0.2)
