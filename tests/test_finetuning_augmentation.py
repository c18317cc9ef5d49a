from __future__ import annotations

import base64
import random as shared
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embedkit import Preprocessing
from embedkit.backbones import import_timm
from embedkit.errors import FinetuneError, ImageError
from embedkit.finetuning.feeding.augmentation import PRESETS, Augmentation
from embedkit.finetuning.feeding.feed import Feed
from embedkit.finetuning.feeding.policies import Policy
from embedkit.finetuning.feeding.samples_page import write_samples
from embedkit.finetuning.feeding.transforms import read_variant, vary
from embedkit.finetuning.recipe import Recipe
from embedkit.images import DECODERS, read_crop, read_image, thumbnail
from embedkit.sources import ImageFile, list_images

SQUARE = Preprocessing(img_size=(64, 64), interpolation="bilinear", decoder=DECODERS["standard"])
POLICIES = ("rand-m9-mstd0.5", "rand-m5-n3-inc1-mstdinf", "original-mstd0.5", "v0", "3a", "augmix-m5-w2")


def noise(height: int = 64, width: int = 64) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hflip": 1.5}, "hflip must be between 0 and 1, not 1.5"),
        ({"hue": 0.6}, "hue must be between 0 and 0.5"),
        ({"rotation": -1.0}, "rotation must be between 0 and 180"),
        ({"mixup": float("nan")}, r"mixup must be between 0 and 1e\+06, not nan"),
        ({"mixup": float("inf")}, r"mixup must be between 0 and 1e\+06, not inf"),
        ({"cutmix": 10**400}, r"cutmix must be between 0 and 1e\+06, not 1000"),
        ({"mixup_off_epoch": -1}, "mixup_off_epoch must be between 0 and"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale is two shares, the smaller one first"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_ratio": (2.0, float("inf"))}, "crop_ratio"),
        ({"aa": "random-m9"}, "aa is timm's text"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneError, match=message):
        Augmentation(**settings)


def test_the_default_and_the_preset_none_vary_nothing() -> None:
    assert PRESETS["none"] == Augmentation() and list(PRESETS) == ["none", "light", "medium", "heavy"]
    data = noise(90, 120)
    assert np.array_equal(read_variant(data, SQUARE, PRESETS["none"], generator(1)), read_crop(data, SQUARE))


@pytest.mark.parametrize("preset", ["light", "medium", "heavy"])
def test_a_variant_depends_on_its_generator_alone(preset: str) -> None:
    data = noise(90, 120)
    one, same, other = (read_variant(data, SQUARE, PRESETS[preset], generator(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert one.shape == (64, 64, 3) and one.dtype == np.uint8


def test_flips_alone_move_the_crop_of_the_evaluation() -> None:
    data = noise(90, 120)
    plain = read_crop(data, SQUARE)
    assert np.array_equal(read_variant(data, SQUARE, Augmentation(hflip=1.0), generator(0)), plain[:, ::-1])
    assert np.array_equal(read_variant(data, SQUARE, Augmentation(vflip=1.0), generator(0)), plain[::-1])


def test_brightness_scales_and_channel_shifts_add_within_their_bounds() -> None:
    grey = np.full((8, 8, 3), 100, dtype=np.uint8)
    levels = [int(vary(grey, SQUARE, Augmentation(brightness=0.4), generator(seed))[0, 0, 0]) for seed in range(99)]
    assert 59 <= min(levels) < 70 and 130 < max(levels) <= 140
    shifted = [vary(grey, SQUARE, Augmentation(channel_shift=0.1), generator(seed))[0, 0] for seed in range(99)]
    assert 74 <= np.min(shifted) < 80 and 120 < np.max(shifted) <= 126
    assert any(len(set(each.tolist())) == 3 for each in shifted)
    white = vary(np.full((4, 4, 3), 250, dtype=np.uint8), SQUARE, Augmentation(channel_shift=1.0), generator(2))
    assert set(np.unique(white)) <= {0, 255} | set(range(1, 255))


@pytest.mark.parametrize("setting", ["contrast", "saturation", "hue"])
def test_each_colour_setting_changes_colours_and_nothing_else(setting: str) -> None:
    photo = noise()
    changed = vary(photo, SQUARE, Augmentation(**{setting: 0.3}), generator(1))
    assert not np.array_equal(changed, photo) and changed.shape == photo.shape
    # An even grey has neither contrast nor colour; torchvision cuts off what is behind the point.
    grey = np.full((8, 8, 3), 100, dtype=np.uint8)
    varied = vary(grey, SQUARE, Augmentation(**{setting: 0.3}), generator(1))
    assert np.ptp(varied) == 0 and abs(int(varied[0, 0, 0]) - 100) <= 1


def test_an_erased_part_is_one_rectangle_of_noise() -> None:
    shares = []
    for seed in range(60):
        plain = np.full((64, 64, 3), 7, dtype=np.uint8)
        erased = vary(plain, SQUARE, Augmentation(reprob=1.0), generator(seed))
        changed = (erased != 7).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        inside = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert inside.mean() > 0.97 and (plain == 7).all()
        shares.append(inside.size / changed.size)
    assert min(shares) > 0.015 and max(shares) < 0.35 and len(set(shares)) > 30
    some = [vary(noise(), SQUARE, Augmentation(reprob=0.25), generator(seed)) for seed in range(200)]
    assert 0.15 < np.mean([not np.array_equal(each, noise()) for each in some]) < 0.35


@pytest.mark.parametrize("text", POLICIES)
def test_a_policy_does_what_timm_does_with_the_same_seeds(text: str) -> None:
    import_timm()
    from timm.data import auto_augment
    from torchvision.transforms.v2.functional import to_pil_image

    policy = Policy(text, SQUARE)
    settings = {"translate_const": 28, "img_mean": (124, 116, 104), "interpolation": 2}  # 2 is bilinear.
    make = (
        auto_augment.rand_augment_transform if text.startswith("rand")
        else auto_augment.augment_and_mix_transform if text.startswith("augmix")
        else auto_augment.auto_augment_transform
    )  # fmt: skip
    timms = make(text, settings)
    state = shared.getstate(), np.random.get_state()
    try:
        for seed in range(12):
            found = policy(noise(), generator(seed))
            drawn = int(generator(seed).integers(2**32))
            shared.seed(drawn)
            np.random.seed(drawn)
            assert np.array_equal(found, np.asarray(timms(to_pil_image(noise()))))
    finally:
        shared.setstate(state[0])
        np.random.set_state(state[1])


@pytest.mark.parametrize("text", POLICIES)
def test_a_policy_leaves_the_process_its_chances_and_is_the_same_in_any_thread(text: str) -> None:
    policy = Policy(text, SQUARE)
    before = shared.getstate(), np.random.get_state()
    alone = [policy(noise(), generator(seed)) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: policy(noise(), generator(seed)), range(24)))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    assert shared.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1][1])
    assert len({each.tobytes() for each in alone}) > 8


@pytest.mark.parametrize("text", ["rand-q7", "v0-m3", "augmix-q3"])
def test_what_timm_does_not_understand_is_said(text: str) -> None:
    with pytest.raises(FinetuneError, match=f"timm does not understand --aa '{text}'"):
        Policy(text, SQUARE)


def test_the_page_of_samples_shows_each_setting_and_asks_no_network(photos: Path, tmp_path: Path) -> None:
    files = list_images(photos).files
    codes = np.array([int(file.label == "dog") for file in files])
    recipe = Recipe(augmentation=replace(PRESETS["heavy"], rotation=10.0))
    write_samples(tmp_path / "page.html", files, SQUARE, recipe, codes=codes)
    page = (tmp_path / "page.html").read_text()
    for words in (
        "All together",
        "One at a time",
        "mixup",
        "cutmix",
        "rotation 10",
        "aa rand-m9-mstd0.5",
        "cat/",
        "dog/",
    ):
        assert words in page
    assert page.count("<img") == 6 * 8 + 2 * 2 * 6 + 5 * 8
    assert "http" not in page and "<script" not in page
    write_samples(tmp_path / "again.html", files, SQUARE, recipe, codes=codes)
    assert (tmp_path / "again.html").read_text() == page


def test_the_page_of_samples_passes_over_what_cannot_be_read_and_escapes_names(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    files = list_images(photos).files
    bad = ImageFile("bad.jpg", str(tmp_path / "bad.jpg"), "cat")
    odd = ImageFile("<b>.jpg", files[0].path, "<i>")  # type: ignore[attr-defined]
    write_samples(tmp_path / "page.html", [bad, odd], SQUARE, Recipe(augmentation=Augmentation()))
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;.jpg" in page and "<b>" not in page and "<i>" not in page and "nothing is varied" in page
    with pytest.raises(ImageError, match="bad"):
        write_samples(tmp_path / "page.html", [bad], SQUARE, Recipe())


def test_the_page_of_samples_shows_what_the_first_epoch_does(photos: Path, tmp_path: Path) -> None:
    files = list(list_images(photos).files)[:4]
    recipe = Recipe(batch_size=4, augmentation=replace(PRESETS["medium"], hflip=0.5))
    write_samples(tmp_path / "page.html", files, SQUARE, recipe)
    page = (tmp_path / "page.html").read_text()
    for epoch in (1, 2):
        (batch,) = Feed(files, None, SQUARE, recipe, workers=1).epoch(epoch)
        for crop in batch.pixels.permute(0, 2, 3, 1).numpy():
            picture = thumbnail(read_image(np.ascontiguousarray(crop)), 144)
            assert base64.b64encode(picture).decode() in page


@pytest.mark.parametrize("place", ["missing/page.html", "folder"])
def test_a_page_that_cannot_be_written_is_named_itself(photos: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(FinetuneError, match=r"cannot be written: .*; name a file in a folder that exists") as caught:
        write_samples(tmp_path / place, list(list_images(photos).files)[:1], SQUARE, Recipe())
    assert str(tmp_path / place) in str(caught.value) and ".tmp-" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
