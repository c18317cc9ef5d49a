from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import embedkit as ek
from embedkit.backbones import bundled as box
from embedkit.cli import main
from embedkit.finetuning.distillation.students import make_student
from embedkit.spec import BUNDLED, Preprocessing

ROOT = Path(__file__).parents[1]
BOX = Path(str(files("embedkit.backbones") / BUNDLED))


@pytest.fixture(scope="module")
def nano() -> ek.Backbone:
    return ek.Backbone.load("nano", device="cpu")


@pytest.fixture
def other_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another package to look for the box in, with a copy of it that may be changed."""
    package = tmp_path / "another" / "backbones"
    shutil.copytree(BOX, package / BUNDLED)
    monkeypatch.setattr(box, "files", lambda name: package)
    return package / BUNDLED


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_the_box_holds_weights_licence_and_what_a_reader_wants_to_know(nano: ek.Backbone) -> None:
    facts = json.loads((BOX / "backbone.json").read_text())
    assert (BOX / "model.safetensors").stat().st_size <= 6_000_000
    tensors = load_file(BOX / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float16}
    assert (facts["dim"], facts["weights_sha256"]) == (nano.dim, nano.spec.weights_sha256)
    assert facts["digest"] == nano.spec.digest
    assert tuple(facts["pretrained_cfg"]["input_size"][1:]) == nano.preprocessing.img_size
    assert facts["licence"] and facts["training"]["images"] and facts["training"]["recipe"] and facts["quality"]
    assert facts["training"]["teachers"] and facts["training"]["initialised_from"]
    assert "Apache License" in (BOX / "LICENSE").read_text() and "MIT License" in (BOX / "LICENSE").read_text()
    assert str(Path.home()) not in json.dumps(facts) and "/tmp/" not in json.dumps(facts)


def test_it_computes_in_float32_and_its_digest_does_not_depend_on_the_file_format(
    nano: ek.Backbone, tmp_path: Path
) -> None:
    assert nano.spec.precision == "float32"
    shutil.copytree(BOX, tmp_path / "copy")
    wide = {name: tensor.float() for name, tensor in load_file(BOX / "model.safetensors").items()}
    save_file(wide, tmp_path / "copy" / "model.safetensors")
    values = json.loads((BOX / "backbone.json").read_text())
    (tmp_path / "copy" / "backbone.json").write_text(json.dumps({**values, "files": {}}))
    assert ek.Backbone.load(tmp_path / "copy").spec == nano.spec


def test_it_is_what_is_loaded_where_nothing_is_said(nano: ek.Backbone) -> None:
    assert ek.Backbone.load().spec == nano.spec
    assert nano.recipe == {"model": "nano"} and repr(nano).startswith("<Backbone nano (")
    assert ek.Backbone.load("nano", img_size=64).recipe == {"model": "nano", "img_size": [64, 64]}


def test_loading_it_touches_no_network(offline: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import socket, numpy as np, embedkit as ek\n"
        "print(ek.Backbone.load('nano').embed(np.zeros((80, 80, 3), np.uint8)).shape)\n"
        "try:\n    socket.create_connection(('example.com', 80))\nexcept RuntimeError as error:\n    print(error)"
    )
    offline["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    done = subprocess.run([sys.executable, "-c", code], env=offline, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"({ek.Backbone.load().dim},)", "this test allows no network"]


def test_extract_takes_it_and_says_so_in_one_line(photos: Path, tmp_path: Path, nano: ek.Backbone) -> None:
    silent = invoke("extract", photos, "-o", tmp_path / "s.h5")
    (line,) = [line for line in silent.stderr.splitlines() if line.startswith("no -m")]
    assert "nano" in line and "-m vit_small_patch14_dinov2.lvd142m" in line and "embedkit models" in line
    assert "no -m" not in silent.stdout
    assert f"backbone   nano ({nano.spec.backbone})\n" in invoke("info", tmp_path / "s.h5").stdout
    invoke("search", tmp_path / "s.h5", "--id", "cat/1.jpg", "--html", tmp_path / "near.html")
    assert f"nano ({nano.spec.backbone})" in (tmp_path / "near.html").read_text()
    assert ek.Store.open(tmp_path / "s.h5").digest == nano.spec.digest
    named = invoke("extract", photos, "-o", tmp_path / "s.h5", "-m", "nano")
    assert "no -m" not in named.stderr and "nothing to compute" in named.stdout
    assert invoke("extract", photos, "-o", tmp_path / "s.h5", "-q").stderr == ""
    assert "no -m" in invoke("extract", photos, "-o", tmp_path / "s.h5", "--dry-run").stderr
    assert "no -m" in invoke("finetune", photos, "--dry-run").stderr


def test_the_store_of_one_folder_has_a_name_by_itself(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    invoke("extract", photos, "-q")
    assert len(ek.Store.open(tmp_path / "photos.h5")) == 24
    for sources in ([photos, photos / "cat"], [photos / "cat" / "1.jpg"]):
        assert "name the store with -o" in invoke("extract", *sources, code=2).stderr
    assert "no such" in invoke("extract", tmp_path / "misspelt", code=1).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.h5"]


def test_in_python_it_may_be_left_out(photos: Path, tmp_path: Path, nano: ek.Backbone) -> None:
    assert ek.estimate(photos, tmp_path / "p.h5").images == 24
    store = ek.extract(photos, tmp_path / "p.h5")
    assert store.digest == nano.spec.digest and store.recipe == {"model": "nano"}


def test_a_store_finds_it_again_from_anywhere(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ek.extract(photos, tmp_path / "p.h5")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    index = ek.Index.build(ek.Store.open(tmp_path / "p.h5"))
    assert index.search(photos / "cat" / "3.jpg", k=1).ids == [["cat/3.jpg"]]


def test_another_nano_is_refused_and_the_old_ones_folder_may_be_named(
    photos: Path, tmp_path: Path, other_box: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(other_box, old)
    store = ek.extract(photos, tmp_path / "p.h5")
    tensors = load_file(other_box / "model.safetensors")
    tensors["conv_stem.weight"][0] *= 2
    save_file(tensors, other_box / "model.safetensors")
    values = json.loads((other_box / "backbone.json").read_text())
    (other_box / "backbone.json").write_text(json.dumps({**values, "files": {}}))
    with pytest.raises(ek.SpecMismatchError, match=r"the nano of this embedkit is not the one(.|\n)*weights_sha256"):
        ek.Backbone.reload(store.spec, store.recipe)
    with pytest.raises(ek.SpecMismatchError, match="was made otherwise"):
        ek.extract(photos, tmp_path / "p.h5")
    assert ek.Backbone.reload(store.spec, store.recipe, model=old).spec == store.spec


def test_the_name_is_never_what_lies_in_the_working_folder(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, nano: ek.Backbone
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "nano"
    folder.mkdir()
    for suffix in (".json", ".safetensors"):
        shutil.copy(tiny_backbone.with_suffix(suffix), folder / f"tiny{suffix}")
    with caplog.at_level("INFO", logger="embedkit"):
        assert ek.Backbone.load("nano").spec == nano.spec
    assert "what lies here by that name is ./nano" in caplog.text
    for path in ("./nano", folder, Path("nano")):
        backbone = ek.Backbone.load(path)
        assert backbone.spec.backbone == "test_resnet" and backbone.recipe["model"] == str(folder)


def test_a_box_that_is_missing_or_damaged_says_what_to_do(other_box: Path, photos: Path) -> None:
    with pytest.raises(ek.BackboneError, match="drop --arch"):
        ek.Backbone.load("nano", arch="resnet18")
    (other_box / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ek.BackboneError, match="not the file that its sidecar describes"):
        ek.Backbone.load("nano")
    (other_box / "model.safetensors").unlink()
    with pytest.raises(ek.BackboneError, match=r"lacks the backbone nano: .*safetensors is missing; install embedkit"):
        ek.Backbone.load("nano")
    assert "lacks the backbone nano" in invoke("extract", photos, "-o", other_box / "s.h5", code=1).stderr
    assert "nano" not in [model.name for model in ek.list_models("nano")]


def test_models_lists_it_first_and_a_slip_finds_it(nano: ek.Backbone) -> None:
    first = ek.list_models()[0]
    assert (first.name, first.dim, first.img_size) == ("nano", nano.dim, nano.preprocessing.img_size[0])
    assert 0 < (first.parameters or 0) <= 3_000_000
    assert invoke("models", "nan?", "--json").stdout.count("\n") == 1
    with pytest.raises(ek.BackboneError, match=r"did you mean.*nano"):
        ek.Backbone.load("nanno")


def test_it_can_go_on_learning_as_a_student(nano: ek.Backbone) -> None:
    student = make_student("nano", Preprocessing(), device="cpu")
    assert not student.fresh and student.spec == nano.spec


def test_the_committed_recipe_is_one_that_distill_reads(
    tiny_backbone: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["mobilenetv1_100.tf_qat_in1k", "mobilenetv2_100.tf_qat_in1k", "regnetx_002.pycls_in1k"]
    (tmp_path / "weights").mkdir()
    for seed, name in enumerate([*names, "tf_mobilenetv3_small_100.tf_in1k"]):
        for suffix in (".json", ".safetensors"):
            shutil.copy(tiny_backbone.with_suffix(suffix), tmp_path / "weights" / f"{name}{suffix}")
        values = json.loads((tmp_path / "weights" / f"{name}.json").read_text())
        values["pretrained_cfg"]["crop_pct"] = 0.9 - seed / 100  # Four backbones and not one.
        (tmp_path / "weights" / f"{name}.json").write_text(json.dumps(values))
    monkeypatch.setenv("EMBEDKIT_DATA", str(tmp_path))
    invoke(
        "distill", photos, "--config", ROOT / "configs" / "nano.yaml", "-o", tmp_path / "run", "--epochs", 1,
        "--img-size", 32, "-q",
    )  # fmt: skip
    said = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert len(said["parents"]) == 4 and said["recipe"]["freeze_norm"] and said["recipe"]["model_ema"] == 0.999
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "run" / "model.safetensors").values()}
    assert torch.float16 in dtypes and torch.float32 not in dtypes


def test_the_demo_needs_no_network_and_no_other_data(offline: dict[str, str], tmp_path: Path) -> None:
    offline.pop("EMBEDKIT_DATA", None)
    offline["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", "--output", tmp_path / "demo", "--limit", "80"],
        env=offline, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    store = ek.Store.open(tmp_path / "demo" / "demo.h5")
    assert len(store) == 82 and store.classes == [str(digit) for digit in range(10)] and not store.failures
    assert f"store: {tmp_path / 'demo' / 'demo.h5'}\npage:  {tmp_path / 'demo' / 'search.html'}" in done.stdout
    assert "top1" in done.stdout and "http" not in (tmp_path / "demo" / "search.html").read_text()
