"""Presets: timm's defaults against what published numbers were measured with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit.backbones import Backbone, find_differences, import_timm
from embedkit.backbones.presets import TABLE, find_published, log_differences
from embedkit.errors import BackboneError
from embedkit.extraction import extract
from embedkit.spec import EmbeddingSpec, Preprocessing

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}
DINO, CLIP, DINOV2 = "vit_small_patch16_224.dino", "vit_base_patch32_clip_224.openai", "vit_small_patch14_dinov2"


def weight_file(folder: Path, arch: str) -> Path:
    """Write the weights of a very small network of some architecture."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = import_timm().create_model(arch.partition(".")[0], num_classes=0, **SMALL)
    save_file(model.state_dict(), folder / "small.safetensors")
    return folder / "small.safetensors"


def load(path: Path, arch: str, **options: Any) -> Backbone:
    kwargs = {**SMALL, **options.pop("arch_kwargs", {})}
    return Backbone.load(path, arch=arch, arch_kwargs=kwargs, device="cpu", **options)


def test_every_line_of_the_table_is_about_names_that_timm_has_and_changes_them() -> None:
    timm = import_timm()
    named = {name: find_published(name) for name in timm.list_models(pretrained=True)}
    for line in TABLE:
        names = [name for name, found in named.items() if found is line]
        assert names, line.names
        for name in names:
            config = timm.get_pretrained_cfg(name)
            height, width = config.input_size[1:]
            pixels = Preprocessing(
                img_size=(height, width), crop_pct=config.crop_pct, interpolation=config.interpolation
            )
            spec = EmbeddingSpec(config.architecture, "ab" * 32, 8, tag=config.tag, preprocessing=pixels)
            changed = line.facts.get("crop_pct") != config.crop_pct or bool(line.arch_kwargs)
            assert bool(find_differences(spec)) == changed, name


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("hf-hub:timm/vit_base_patch14_reg4_dinov2.lvd142m", True),
        (DINOV2, True),
        ("vit_small_patch16_224.augreg_in21k", False),
        ("vit_small_patch16_224", False),
        ("vit_base_patch32_clip_224.laion2b", False),
        ("vit_base_patch32_clip_224.openai_ft_in1k", False),
        ("resnet50x4_clip.openai", True),
    ],
)
def test_only_the_weights_of_the_published_numbers_are_known(name: str, known: bool) -> None:
    assert (find_published(name) is not None) == known


def test_published_sets_the_preprocessing_and_the_store_comes_back_the_same(tmp_path: Path) -> None:
    path = weight_file(tmp_path, DINO)
    default, published = (load(path, DINO, preset=preset) for preset in ("default", "published"))
    assert default.preprocessing.crop_pct == 0.9
    assert published.preprocessing.crop_pct == 0.875
    assert find_differences(default.spec, default.recipe) == ["crop_pct is 0.9, published 0.875"]
    assert find_differences(published.spec, published.recipe) == []
    again = Backbone.reload(published.spec, published.recipe, device="cpu")
    assert again.spec == published.spec


def test_what_is_chosen_wins_over_the_preset_and_is_told(tmp_path: Path) -> None:
    backbone = load(weight_file(tmp_path, DINO), DINO, preset="published", crop_pct=1.0)
    assert backbone.preprocessing.crop_pct == 1.0
    assert find_differences(backbone.spec, backbone.recipe) == ["crop_pct is 1, published 0.875"]


def test_published_clip_computes_with_quick_gelu(tmp_path: Path) -> None:
    path = weight_file(tmp_path, CLIP)
    plain, published = load(path, CLIP), load(path, CLIP, preset="published")
    quick = load(path, "vit_base_patch32_clip_quickgelu_224", crop_pct=1.0)
    assert find_differences(plain.spec, plain.recipe) == [
        "crop_pct is 0.9, published 1", "act_layer is timm's, published quick_gelu",
    ]  # fmt: skip
    assert find_differences(published.spec, published.recipe) == []
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    embeddings = [backbone.embed(pixels) for backbone in (plain, published, quick)]
    np.testing.assert_array_equal(embeddings[1], embeddings[2])
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-4


def test_extract_says_once_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = load(weight_file(tmp_path, DINO), DINO)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (240, 240), "red").save(tmp_path / "photos" / "1.png")
    log_differences.__globals__["_say"].cache_clear()
    with caplog.at_level(logging.INFO, logger="embedkit"):
        for name in ("a.h5", "b.h5"):
            extract(tmp_path / "photos", tmp_path / name, backbone)
    said = [record.getMessage() for record in caplog.records if "published" in record.getMessage()]
    assert said == [
        f"{DINO}: crop_pct is 0.9, published 0.875 (facebookresearch/dino, eval_knn.py); "
        "--preset published sets it right"
    ]


def test_an_unknown_preset_is_an_error(tiny_backbone: Path) -> None:
    with pytest.raises(BackboneError, match="unknown preset 'paper'; choose one of default, published"):
        Backbone.load(tiny_backbone, preset="paper")


def test_published_says_when_it_knows_nothing(tiny_backbone: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="embedkit"):
        backbone = Backbone.load(tiny_backbone, preset="published", device="cpu")
    assert backbone.spec == Backbone.load(tiny_backbone, device="cpu").spec
    assert "no published evaluation is known" in caplog.text
