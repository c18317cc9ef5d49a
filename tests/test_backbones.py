from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from embedkit import Backbone, BackboneError, ImageError, SpecMismatchError, list_models
from embedkit.backbones import import_timm

REAL = "mobilenetv2_100.tf_in1k"


def test_timm_imports_beside_a_torch_that_cannot_load_torchvisions_operators() -> None:
    # In a fresh process, and twice: the declaration must not clash with itself or with real operators.
    code = "from embedkit.backbones.timm_import import import_timm as i; i.cache_clear(); i(); i.cache_clear(); i()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_sidecar_says_everything(tiny_backbone: Path) -> None:
    backbone = Backbone.load(tiny_backbone)
    assert (backbone.spec.backbone, backbone.spec.tag) == ("test_resnet", "")
    assert backbone.preprocessing.mean == (0.5, 0.4, 0.3) and backbone.preprocessing.img_size == (64, 64)
    assert backbone.dim == backbone.embed(np.zeros((80, 80, 3), np.uint8)).shape[0] == backbone.spec.dim


def test_the_same_weights_have_one_spec_whatever_file_they_come_from(tiny_backbone: Path, tmp_path: Path) -> None:
    state = load_file(tiny_backbone.with_suffix(".safetensors"))
    values = json.loads(tiny_backbone.read_text())
    expected = Backbone.load(tiny_backbone).spec

    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "x.pth")
    options: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "img_size": 64}
    options |= {"interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "center"}
    assert Backbone.load(tmp_path / "x.pth", arch="test_resnet", **options).spec == expected

    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"architecture": "test_resnet", "pretrained_cfg": values["pretrained_cfg"]}
    (folder / "config.json").write_text(json.dumps(config))
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    save_file(headless, folder / "model.safetensors")
    assert Backbone.load(folder).spec == expected
    assert Backbone.load(str(tiny_backbone)[: -len(".json")]).spec == expected
    assert Backbone.load(tiny_backbone.with_suffix(".safetensors")).spec == expected


def test_other_weights_pixels_or_pooling_give_another_spec(tiny_backbone: Path, tmp_path: Path) -> None:
    state = load_file(tiny_backbone.with_suffix(".safetensors"))
    state["conv1.0.weight" if "conv1.0.weight" in state else "conv1.weight"][0] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    (tmp_path / "other.json").write_text(tiny_backbone.read_text())
    specs = [
        Backbone.load(tiny_backbone),
        Backbone.load(tmp_path / "other.json"),
        Backbone.load(tiny_backbone, crop_pct=1.0),
        Backbone.load(tiny_backbone, pool="max"),
        Backbone.load(tiny_backbone, exif=False),
    ]
    assert len({backbone.spec.digest for backbone in specs}) == 5


def test_a_checkpoint_that_does_not_fit_is_refused_not_half_loaded(tiny_backbone: Path, tmp_path: Path) -> None:
    state = load_file(tiny_backbone.with_suffix(".safetensors"))
    name = "layer1.0.conv1.weight"
    del state[name]
    save_file(state, tmp_path / "lacking.safetensors")
    with pytest.raises(BackboneError, match=f"does not fit test_resnet(.|\n)*{name}"):
        Backbone.load(tmp_path / "lacking.safetensors", arch="test_resnet")
    with pytest.raises(BackboneError, match="does not fit"):
        Backbone.load(tiny_backbone.with_suffix(".safetensors"), arch="test_vit")


def test_a_pickled_object_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "owned",)

    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BackboneError, match=r"evil\.pth is not a readable weight file"):
        Backbone.load(tmp_path / "evil.pth", arch="test_resnet")
    assert not (tmp_path / "owned").exists()


def test_errors_say_what_to_do(tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(BackboneError, match=match):
            Backbone.load(*args, **kwargs)

    refused("did you mean.*resnet50", "resnet5O")
    refused("timm has no weights 'nope' for resnet18; it has: .*a1_in1k", "resnet18.nope")
    refused("no such file", tmp_path / "missing.safetensors")
    refused("name their architecture with --arch", _bare(tiny_backbone, tmp_path))
    (tmp_path / "empty").mkdir()
    refused("holds no backbone", tmp_path / "empty")
    refused("cannot be used", tiny_backbone, device="cuda:99")
    refused("unknown pooling 'best'", tiny_backbone, pool="best")
    refused("class token", tiny_backbone, pool="cls")
    refused("five-crop needs a crop smaller than the image", tiny_backbone, views=["five-crop"], crop_pct=1.0)
    refused("'spin' is no view", tiny_backbone, views=["spin"])
    refused("unknown decode 'blind'; choose one of standard, exact, fast, gpu", tiny_backbone, decode="blind")
    refused("unknown precision 'int4'", tiny_backbone, precision="int4")
    refused("unknown crop mode 'zoom'", tiny_backbone, crop_mode="zoom")
    refused("unknown interpolation 'magic'", tiny_backbone, interpolation="magic")
    refused("--mean takes one number or three", tiny_backbone, mean=(0.1, 0.2))
    refused("does not fit", tiny_backbone, arch_kwargs={"surprise": 1})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("To work offline(.|\n)*--arch mobilenetv3_small_075.lamb_in1k", "mobilenetv3_small_075.lamb_in1k")


def _bare(tiny_backbone: Path, tmp_path: Path) -> Path:
    target = tmp_path / "bare.safetensors"
    target.write_bytes(tiny_backbone.with_suffix(".safetensors").read_bytes())
    return target


def test_a_sidecar_cannot_reach_out_of_its_folder_and_its_hash_is_checked(tiny_backbone: Path, tmp_path: Path) -> None:
    values = json.loads(tiny_backbone.read_text())
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(tiny_backbone.with_suffix(".safetensors").read_bytes())
    inside = tmp_path / "inside"
    inside.mkdir()
    for weights in ("../outside.safetensors", str(outside)):
        (inside / "x.json").write_text(json.dumps(values | {"weights": weights}))
        with pytest.raises(BackboneError, match="weights are missing"):
            Backbone.load(inside / "x.json")
    (inside / "x.safetensors").write_bytes(outside.read_bytes())
    (inside / "x.json").write_text(json.dumps(values | {"files": {"x.safetensors": {"sha256": "0" * 64}}}))
    with pytest.raises(BackboneError, match="is not the file that its sidecar describes"):
        Backbone.load(inside / "x.json")


def normalised(crops: Any, backbone: Backbone) -> torch.Tensor:
    pixels = backbone.preprocessing
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pixels.mean, pixels.std))
    return (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std


def test_poolings_are_what_they_say(tiny_backbone: Path) -> None:
    timm = import_timm()
    crops = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    plain = Backbone.load(tiny_backbone)
    model = timm.create_model("test_resnet", num_classes=0).eval()
    model.load_state_dict(load_file(tiny_backbone.with_suffix(".safetensors")), strict=False)
    x = normalised(crops, plain)
    with torch.inference_mode():
        features = model.forward_features(x).numpy()  # (2, c, h, w)
    expected = {"avg": features.mean((2, 3)), "max": features.max((2, 3)), "flatten": features.reshape(2, -1)}
    expected["gem"] = (np.clip(features, 1e-6, None) ** 3).mean((2, 3)) ** (1 / 3)
    for pool, embeddings in expected.items():
        found = Backbone.load(tiny_backbone, pool=pool).embed_pixels(list(crops))
        np.testing.assert_allclose(found, embeddings, atol=1e-5)


def test_token_poolings_leave_the_class_token_out_or_take_it_alone(tmp_path: Path) -> None:
    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    crops = np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8)

    def embed(pool: str) -> Any:
        backbone = Backbone.load(tmp_path / "vit.safetensors", arch="test_vit", pool=pool)
        embed.backbone = backbone  # type: ignore[attr-defined]
        return backbone.embed_pixels(list(crops))

    found = {pool: embed(pool) for pool in ("cls", "avg", "max", "flatten")}
    x = normalised(crops, embed.backbone)  # type: ignore[attr-defined]
    with torch.inference_mode():
        tokens = model.forward_features(x).numpy()  # (2, 1 + patches, d)
    np.testing.assert_allclose(found["cls"], tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["avg"], tokens[:, 1:].mean(1), atol=1e-5)
    np.testing.assert_allclose(found["max"], tokens[:, 1:].max(1), atol=1e-5)
    np.testing.assert_allclose(found["flatten"], tokens.reshape(2, -1), atol=1e-5)


def test_a_vision_transformer_takes_another_input_size(tmp_path: Path) -> None:
    timm = import_timm()
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    backbone = Backbone.load(tmp_path / "vit.safetensors", arch="test_vit", img_size=96)
    assert backbone.preprocessing.img_size == (96, 96) and backbone.embed(Image.new("RGB", (50, 70))).shape == (64,)


def test_embed_takes_paths_images_arrays_or_a_mix(tiny_backbone: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    backbone = Backbone.load(tiny_backbone)
    one = backbone.embed(tmp_path / "a.png")
    assert one.shape == (backbone.dim,) and one.dtype == np.float32
    many = backbone.embed([tmp_path / "a.png", str(tmp_path / "a.png"), image, pixels])
    assert many.shape == (4, backbone.dim)
    np.testing.assert_allclose(many, np.repeat(one[None], 4, axis=0), atol=1e-6)
    np.testing.assert_allclose(backbone.embed(np.stack([pixels, pixels])), many[:2], atol=1e-6)
    np.testing.assert_allclose(backbone.embed((tmp_path / "a.png").read_bytes()), one, atol=1e-6)
    assert backbone.embed([]).shape == (0, backbone.dim)
    several = dict.fromkeys(range(40), image)
    assert backbone.embed(several.values(), batch_size=4).shape == (40, backbone.dim)  # Neither list nor iterator.
    (tmp_path / "bad.jpg").write_text("no")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        backbone.embed([image, tmp_path / "bad.jpg"])


def test_batch_size_and_order_do_not_change_the_numbers(tiny_backbone: Path) -> None:
    backbone = Backbone.load(tiny_backbone)
    images = list(np.random.default_rng(0).integers(0, 256, (37, 70, 70, 3), dtype=np.uint8))
    together = backbone.embed(images, batch_size=32)
    np.testing.assert_allclose(backbone.embed(images, batch_size=1), together, atol=1e-5)
    order = np.random.default_rng(1).permutation(37)
    np.testing.assert_allclose(backbone.embed([images[i] for i in order]), together[order], atol=1e-5)


def test_reload_makes_the_same_backbone_or_says_what_differs(tiny_backbone: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_backbone, crop_pct=0.8, pool="avg", exif=False)
    recipe = json.loads(json.dumps(backbone.recipe))
    assert Backbone.reload(backbone.spec, recipe).spec == backbone.spec
    with pytest.raises(SpecMismatchError) as caught:
        Backbone.reload(backbone.spec, recipe | {"crop_pct": 0.9})
    assert caught.value.differences == {"preprocessing.crop_pct": (0.8, 0.9)}
    with pytest.raises(BackboneError, match="moved"):
        Backbone.reload(backbone.spec, recipe | {"model": str(tmp_path / "gone.json")})
    assert Backbone.reload(backbone.spec, recipe | {"model": "/gone.json"}, model=tiny_backbone).spec == backbone.spec
    with pytest.raises(BackboneError, match="does not say where"):
        Backbone.reload(backbone.spec, {})


def test_damaged_weights_do_not_give_embeddings(tiny_backbone: Path, tmp_path: Path) -> None:
    state = load_file(tiny_backbone.with_suffix(".safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in state.items()}, tmp_path / "nan.safetensors")
    with pytest.raises(BackboneError, match="infinities or NaN"):
        Backbone.load(tmp_path / "nan.safetensors", arch="test_resnet").embed(Image.new("RGB", (9, 9)))


def test_the_hub_cache_is_used_without_a_network(hub_cache: str) -> None:
    backbone = Backbone.load(hub_cache)
    assert f"{backbone.spec.backbone}.{backbone.spec.tag}" == hub_cache
    bare = Backbone.load(hub_cache.partition(".")[0])
    assert bare.spec == backbone.spec  # A bare name resolves to its first tag, and the spec says which.


def test_list_models_knows_names_sizes_and_widths() -> None:
    (info,) = list_models("mobilenetv3_small_100.lamb_in1k")
    assert (info.name, info.img_size, info.dim) == ("mobilenetv3_small_100.lamb_in1k", 224, 1024)
    assert info.parameters == pytest.approx(1.5e6, rel=0.05)
    assert {info.name.partition(".")[0] for info in list_models("resnet18*")} >= {"resnet18", "resnet18d"}
    assert len(list_models()) > 1000
    with pytest.raises(BackboneError, match="did you mean"):
        list_models("mobilenetv9")


@pytest.fixture(scope="module")
def real(weights: Path) -> Any:
    values = json.loads((weights / f"{REAL}.json").read_text())
    config = {**values["pretrained_cfg"], "file": str(weights / f"{REAL}.safetensors")}
    config |= {"input_size": tuple(config["input_size"]), "hf_hub_id": None, "url": None}
    timm = import_timm()
    model = timm.create_model(
        values["timm_architecture"], pretrained=True, pretrained_cfg_overlay=config, **values["timm_kwargs"]
    )
    return model.eval()


def test_the_classifier_on_an_embedding_gives_the_models_logits(real: Any, weights: Path, flowers: Path) -> None:
    timm = import_timm()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(real), is_training=False)
    paths = sorted(flowers.glob("*/*.jpg"))[::600]
    backbone = Backbone.load(weights / f"{REAL}.json", decode="exact")
    with torch.inference_mode():
        logits = real(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))
        ours = real.get_classifier()(torch.from_numpy(backbone.embed(paths)))
    np.testing.assert_allclose(ours.numpy(), logits.numpy(), atol=2e-4)
    assert (ours.argmax(1) == logits.argmax(1)).all()


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("mobilenetv1_100.tf_qat_in1k", 1024),
        ("mobilenetv2_100.tf_in1k", 1280),
        ("mobilenetv2_100.tf_qat_in1k", 1280),
        ("regnetx_002.pycls_in1k", 368),
        ("tf_mobilenetv3_small_100.tf_in1k", 1024),
    ],
)
def test_every_real_weight_file_loads_with_its_measured_width(weights: Path, name: str, dim: int) -> None:
    assert Backbone.load(weights / f"{name}.json").dim == dim


def test_a_folder_of_several_backbones_asks_which(weights: Path) -> None:
    with pytest.raises(BackboneError, match="holds 5 backbones; name one of them"):
        Backbone.load(weights)


def test_real_batches_agree_whatever_their_size(weights: Path, flowers: Path) -> None:
    paths = sorted(flowers.glob("*/*.jpg"))[::110]
    backbone = Backbone.load(weights / f"{REAL}.json")
    np.testing.assert_allclose(backbone.embed(paths, batch_size=1), backbone.embed(paths, batch_size=32), atol=1e-4)


def test_profiles_and_padding_are_recorded_and_come_back_and_the_limit_is_not(tiny_backbone: Path) -> None:
    plain = Backbone.load(tiny_backbone)
    other = Backbone.load(tiny_backbone, icc=True, truncated="pad", max_pixels=10_000)
    assert other.spec.digest != plain.spec.digest
    assert other.preprocessing.icc and other.preprocessing.truncated == "pad"
    assert {"icc", "truncated", "max_pixels"} & plain.recipe.keys() == set()
    assert other.recipe["icc"] is True and "max_pixels" not in other.recipe
    # A recipe may come from a stranger, and raises no limit.
    again = Backbone.reload(other.spec, {**other.recipe, "max_pixels": 10**12})
    assert again.spec == other.spec and again.max_pixels == plain.max_pixels == 178_956_970
    with pytest.raises(ImageError, match="200 x 100 pixels are more than the limit of 10,000"):
        other.embed(Image.new("RGB", (200, 100)))
    assert Backbone.load(tiny_backbone, max_pixels=10_000).spec == plain.spec
    for options, reason in (({"truncated": "no"}, "unknown truncated 'no'"), ({"max_pixels": 0}, "number of pixels")):
        with pytest.raises(BackboneError, match=reason):
            Backbone.load(tiny_backbone, **options)
