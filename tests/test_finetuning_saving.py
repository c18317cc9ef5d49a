"""Adapted backbones as folders: what comes back is what was saved, in embedkit and in timm."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import embedkit as ek
from embedkit.backbones import Backbone, import_timm
from embedkit.backbones.copies import fresh_network
from embedkit.errors import BackboneError, FinetuneError, SpecMismatchError
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.run_folder import RunFolder
from embedkit.finetuning.saving import save_backbone
from embedkit.finetuning.trainee import make_trainee
from embedkit.finetuning.training.checkpoints import LAST, save_state
from embedkit.spec import EmbeddingSpec, Preprocessing


def write_vit(folder: Path, size: int = 96) -> Backbone:
    pixels = Preprocessing(img_size=(size, size), crop_pct=0.9, interpolation="bilinear")
    network = fresh_network("test_vit", pixels, seed=3)
    spec = EmbeddingSpec("test_vit", "", 64, preprocessing=pixels)
    save_backbone(folder, network, spec)
    return Backbone.load(folder, device="cpu")


def test_an_adapted_folder_loads_as_it_was_trained(tiny_backbone: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "pool": "layer3:gem", "img_size": 48, "crop_pct": 0.8, "crop_mode": "border", "interpolation": "bicubic",
        "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "exif": False, "icc": True, "truncated": "pad",
        "decode": "exact",
    }  # fmt: skip
    parent = Backbone.load(tiny_backbone, device="cpu", **options)
    trainee = make_trainee(parent, 2, Recipe())
    with torch.no_grad():
        trainee.network.model.conv1[0].weight.mul_(1.5)
    save_backbone(tmp_path / "run", trainee.network, parent.spec, parents=[parent.spec])
    adapted = Backbone.load(tmp_path / "run", device="cpu")
    assert parent.spec.differences(adapted.spec).keys() == {"weights_sha256"}
    crops = adapted.noise(3)
    expected = trainee.embed(torch.as_tensor(np.stack(crops)).permute(0, 3, 1, 2)).detach().numpy()
    assert np.abs(adapted.embed_pixels(crops) - expected).max() < 1e-5
    assert not np.allclose(parent.embed_pixels(crops), expected, atol=1e-2)


def test_what_is_asked_for_wins_over_the_folder(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu", pool="flatten", img_size=48)
    save_backbone(tmp_path, make_trainee(parent, 2, Recipe()).network, parent.spec)
    adapted = Backbone.load(tmp_path, device="cpu", pool="max", img_size=64)
    assert (adapted.spec.pool, adapted.preprocessing.img_size) == ("max", (64, 64))


def test_position_embeddings_keep_the_size_that_they_were_trained_at(tmp_path: Path) -> None:
    backbone = write_vit(tmp_path / "small", size=96)
    assert backbone.preprocessing.img_size == (96, 96)
    held = load_file(tmp_path / "small" / "model.safetensors")["pos_embed"]
    trainee = make_trainee(backbone, 2, Recipe())
    assert torch.equal(trainee.network.model.pos_embed, held)
    larger = Backbone.load(tmp_path / "small", img_size=128, device="cpu")
    assert larger.preprocessing.img_size == (128, 128)
    save_backbone(tmp_path / "large", make_trainee(larger, 2, Recipe()).network, larger.spec)
    again = Backbone.load(tmp_path / "large", device="cpu")
    assert again.spec == larger.spec
    assert np.array_equal(again.embed_pixels(again.noise(2)), larger.embed_pixels(again.noise(2)))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_timm_reads_the_folder(tiny_backbone: Path, tmp_path: Path, kind: str) -> None:
    if kind == "vit":
        backbone = write_vit(tmp_path)
    else:
        parent = Backbone.load(tiny_backbone, device="cpu")
        save_backbone(tmp_path, make_trainee(parent, 2, Recipe()).network, parent.spec)
        backbone = Backbone.load(tmp_path, device="cpu")
    timm = import_timm()
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"][1:]) == backbone.preprocessing.img_size
    assert data["mean"] == pytest.approx(backbone.preprocessing.mean)
    crops = torch.as_tensor(np.stack(backbone.noise(2))).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        found = model((crops - mean) / std).numpy()
    assert np.abs(found - backbone.embed_pixels(backbone.noise(2))).max() < 1e-5


def test_the_folder_says_everything(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    recipe = Recipe(unfreeze="last-2")
    save_backbone(
        tmp_path, make_trainee(parent, 2, recipe).network, parent.spec, classes=["cat", "dog"], parents=[parent.spec],
        recipe=recipe.to_dict(), metrics={"top1": 0.9}, information={"images": 24},
    )  # fmt: skip
    values = json.loads((tmp_path / "backbone.json").read_text())
    assert values["format"] == "embedkit-backbone" and values["version"] == 1
    assert values["classes"] == ["cat", "dog"] and values["metrics"] == {"top1": 0.9}
    assert values["information"] == {"images": 24} and values["embedkit"] == ek.__version__
    assert values["parents"][0]["digest"] == parent.spec.digest
    assert EmbeddingSpec.from_dict(values["parents"][0]["spec"]) == parent.spec
    assert Recipe.from_dict(values["recipe"]) == recipe


def test_a_store_finds_its_adapted_backbone_again(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, pool="flatten", device="cpu")
    save_backbone(tmp_path / "run", make_trainee(parent, 2, Recipe()).network, parent.spec)
    adapted = Backbone.load(tmp_path / "run", device="cpu")
    store = ek.extract(photos, tmp_path / "photos.h5", adapted)
    found = Backbone.reload(store.spec, store.recipe, device="cpu")
    assert found.spec == adapted.spec
    (tmp_path / "run").rename(tmp_path / "moved")
    assert Backbone.reload(store.spec, store.recipe, model=tmp_path / "moved", device="cpu").spec == adapted.spec
    with pytest.raises(SpecMismatchError, match="weights_sha256"):
        save_backbone(tmp_path / "other", fresh_network("test_resnet", parent.preprocessing, seed=9), parent.spec)
        Backbone.reload(store.spec, store.recipe, model=tmp_path / "other", device="cpu")


def test_half_precision_takes_half_the_room(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    network = make_trainee(parent, 2, Recipe()).network
    for precision in ("fp32", "fp16"):
        save_backbone(tmp_path / precision, network, parent.spec, precision=precision)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("fp32", "fp16")]
    assert sizes[1] < 0.55 * sizes[0]
    half = Backbone.load(tmp_path / "fp16", device="cpu")
    assert half.spec.precision == "float32" and network.model.conv1[0].weight.dtype == torch.float32
    assert np.allclose(half.embed_pixels(half.noise(2)), parent.embed_pixels(half.noise(2)), atol=1e-2)


def test_a_folder_is_replaced_file_by_file(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    (tmp_path / "epochs.csv").write_text("mine")
    for seed in (1, 2):
        network = fresh_network("test_resnet", parent.preprocessing, seed=seed)
        save_backbone(tmp_path, network, parent.spec)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "backbone.json", "config.json", "epochs.csv", "model.safetensors",
    ]  # fmt: skip
    found = Backbone.load(tmp_path, device="cpu")
    with torch.no_grad():
        expected = network(torch.as_tensor(np.stack(found.noise(2))).permute(0, 3, 1, 2))[0].numpy()
    assert np.allclose(found.embed_pixels(found.noise(2)), expected, atol=1e-6)


def test_weights_are_as_readable_as_everything_beside_them(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    network = make_trainee(parent, 2, Recipe()).network
    before = os.umask(0o027)
    try:
        save_backbone(tmp_path / "run", network, parent.spec)
        save_state(tmp_path / "run" / LAST, {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir()}
    assert modes == dict.fromkeys(["model.safetensors", "backbone.json", "config.json", LAST], 0o640)


def test_an_unfinished_run_is_no_backbone_and_says_how_it_becomes_one(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").claim(Recipe(), {"backbone": "a"})
    for named in (tmp_path / "run", tmp_path / "run" / "recipe.json"):
        with pytest.raises(BackboneError, match=r"run holds an unfinished run .* goes on when it is given again"):
            Backbone.load(named)
    write_vit(tmp_path / "run")
    assert Backbone.load(tmp_path / "run").dim == 64
    with pytest.raises(BackboneError, match="names no architecture"):
        Backbone.load(tmp_path / "run" / "recipe.json")


def test_weights_of_another_run_are_noticed(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    for seed, name in enumerate(("one", "two")):
        network = fresh_network("test_resnet", parent.preprocessing, seed=seed)
        save_backbone(tmp_path / name, network, parent.spec)
    (tmp_path / "two" / "model.safetensors").replace(tmp_path / "one" / "model.safetensors")
    with pytest.raises(BackboneError, match="is not the file that its sidecar describes"):
        Backbone.load(tmp_path / "one")


def test_diverged_weights_are_not_written(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    network = make_trainee(parent, 2, Recipe()).network
    for value, precision, reason in (
        (float("nan"), "fp32", "infinite or NaN"), (1e6, "fp16", "too large for fp16"),
    ):  # fmt: skip
        with torch.no_grad():
            network.model.conv1[0].weight[0, 0, 0, 0] = value
        with pytest.raises(FinetuneError, match=rf"conv1\.0\.weight are {reason}"):
            save_backbone(tmp_path / "run", network, parent.spec, precision=precision)
    assert not (tmp_path / "run").exists()


def test_only_json_describes_a_backbone(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    network = make_trainee(parent, 2, Recipe()).network
    for metrics in ({"top1": float("nan")}, {"top1": np.float32(1)}):
        with pytest.raises(FinetuneError, match="JSON values only"):
            save_backbone(tmp_path / "run", network, parent.spec, metrics=metrics)
    with pytest.raises(FinetuneError, match="choose one of fp32, fp16"):
        save_backbone(tmp_path / "run", network, parent.spec, precision="int8")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ([], "load_defaults must be a JSON object"),
        ({"device": "cuda"}, "may hold img_size, pool, decode, exif, icc, truncated, and says device: 'cuda'"),
        ({"pool": 3}, "says pool: 3"),
        ({"pool": "nonsense"}, "unknown pooling 'nonsense'"),
        ({"exif": "no"}, "says exif: 'no'"),
        ({"img_size": "huge"}, "says img_size: 'huge'"),
        ({"img_size": [64, 64, 64]}, "img_size is one side or"),
        ({"img_size": [-1, 64]}, "img_size is one side or"),
        ({"decode": "magic"}, "unknown decode 'magic'"),
        ({"truncated": "guess"}, "unknown truncated 'guess'"),
    ],
)
def test_a_strangers_folder_is_refused_by_name(
    tiny_backbone: Path, tmp_path: Path, defaults: Any, message: str
) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    save_backbone(tmp_path, make_trainee(parent, 2, Recipe()).network, parent.spec)
    values = json.loads((tmp_path / "backbone.json").read_text())
    (tmp_path / "backbone.json").write_text(json.dumps({**values, "load_defaults": defaults or 5}))
    with pytest.raises(BackboneError, match="(?s)" + message):
        Backbone.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_cfg": {"classifier": 5}}, r"backbone\.json: pretrained_cfg says classifier: '5'"),
        ({"pretrained_cfg": {"input_size": "large"}}, "says input_size: 'large'"),
        ({"pretrained_cfg": {"input_size": [3, 1000000, 1000000]}}, "says input_size: "),
        ({"pretrained_cfg": {"mean": "abc"}}, "says mean: 'abc'"),
        ({"pretrained_cfg": {"std": [True, 1, 1]}}, "says std: "),
        ({"pretrained_cfg": {"crop_pct": "most"}}, "says crop_pct: 'most'"),
        ({"model_args": {"global_pool": "deep"}}, "does not fit test_resnet"),
        ({"architecture": "hf-hub:somebody/network"}, "does not fit hf-hub:somebody/network"),
    ],
)
def test_a_strangers_configuration_is_refused_by_name(
    tiny_backbone: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    save_backbone(tmp_path, make_trainee(parent, 2, Recipe()).network, parent.spec)
    values = json.loads((tmp_path / "backbone.json").read_text())
    (tmp_path / "backbone.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(BackboneError, match=message):
        Backbone.load(tmp_path, device="cpu")


def test_weights_with_two_names_are_written_twice(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    network = make_trainee(parent, 2, Recipe()).network
    network.model.layer1[0].bn2.weight = network.model.layer1[0].bn1.weight
    save_backbone(tmp_path, network, parent.spec)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["layer1.0.bn1.weight"], found["layer1.0.bn2.weight"])
    assert Backbone.load(tmp_path, device="cpu").dim == parent.dim


def test_a_full_disk_leaves_what_was_there(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    network = make_trainee(parent, 2, Recipe()).network
    save_backbone(tmp_path, network, parent.spec)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        network.model.conv1[0].weight.mul_(2)
    room = len(before["model.safetensors"]) // 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(FinetuneError, match=r"model\.safetensors cannot be written"):
            save_backbone(tmp_path, network, parent.spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["checkpoint_path", "cache_dir", "pretrained_cfg_overlay", "pretrained_strict"])
def test_a_strangers_folder_names_no_other_file(tiny_backbone: Path, tmp_path: Path, name: str) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    save_backbone(tmp_path, make_trainee(parent, 2, Recipe()).network, parent.spec)
    values = json.loads((tmp_path / "backbone.json").read_text())
    (tmp_path / "backbone.json").write_text(json.dumps({**values, "model_args": {name: "/etc/passwd"}}))
    with pytest.raises(BackboneError, match=f"{name} is no argument of an architecture"):
        Backbone.load(tmp_path, device="cpu")


def test_a_strangers_sidecar_is_of_a_sensible_size_and_depth(tiny_backbone: Path, tmp_path: Path) -> None:
    parent = Backbone.load(tiny_backbone, device="cpu")
    save_backbone(tmp_path, make_trainee(parent, 2, Recipe()).network, parent.spec)
    sidecar = tmp_path / "backbone.json"
    sidecar.write_text('{"a":' * 100_000)
    with pytest.raises(BackboneError, match="is not a readable JSON sidecar"):
        Backbone.load(tmp_path, device="cpu")
    with sidecar.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(BackboneError, match="larger than 64 MiB"):
        Backbone.load(tmp_path, device="cpu")
