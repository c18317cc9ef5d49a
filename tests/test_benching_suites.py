"""Suites: what a YAML file may say, and what is said of one that says something else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embedkit.errors import EvaluationError
from embedkit.evaluation import read_suite
from embedkit.evaluation.suites import MAX_BYTES, Suite, file_name

CONFIGS = Path(__file__).parents[1] / "configs"
SUITES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "nano")  # That one is for distill.

WHOLE = """\
name: Two nets
backbones:
  - resnet18.a1_in1k
  - name: DINOv2 S/14
    model: vit_small_patch14_dinov2.lvd142m
    img_size: 224
    crop_pct: 0.875
data:
  - name: pets
    images: pets
    split: pets/split.csv
    test_split: val
  - train: birds/train
    test: birds/val
    name: birds
protocols:
  - default
  - protocol: default
    name: other draw
    seed: 7
"""

REST = "backbones: [a]\ndata: [{images: x, split: y}]\nprotocols: [default]\n"


def read(folder: Path, text: str, **places: Path) -> Suite:
    (folder / "suite.yaml").write_text(text, encoding="utf-8")
    return read_suite(folder / "suite.yaml", places)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(EvaluationError) as error:
        read(folder, text)
    assert "suite.yaml" in str(error.value)
    return str(error.value)


def test_a_suite_says_what_it_combines(tmp_path: Path) -> None:
    suite = read(tmp_path, WHOLE)
    assert suite.name == "Two nets"
    assert [backbone.name for backbone in suite.backbones] == ["resnet18.a1_in1k", "DINOv2 S/14"]
    assert suite.backbones[1].options == {"img_size": 224, "crop_pct": 0.875}
    pets, birds = suite.data
    assert (pets.train, pets.test, pets.split) == (str(tmp_path / "pets"), None, str(tmp_path / "pets/split.csv"))
    assert pets.test_split == "val"
    assert (birds.train, birds.test) == (str(tmp_path / "birds/train"), str(tmp_path / "birds/val"))
    assert suite.protocols[1].parameters == {"seed": 7}
    assert len(suite.plans) == 8
    assert suite.plans[5].name == "DINOv2-S-14--pets--other-draw"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("name: Two nets", "nmae: Two nets", 1, "'nmae'; did you mean 'name'?"),
        ("    crop_pct", "    crop_pcnt", 7, "'crop_pcnt'; did you mean 'crop_pct'?"),
        ("    test_split", "    testsplit", 12, "'testsplit'; did you mean 'test_split'?"),
        ("    seed: 7", "    sed: 7", 20, "'sed'; did you mean 'seed'?"),
        ("  - default", "  - defualt", 17, "'defualt'; did you mean 'default'?"),
        ("    img_size: 224", "    img_size: 224\n    img_size: 518", 7, "img_size is there twice"),
        ("    model: vit_small_patch14_dinov2.lvd142m\n", "", 4, "names its model"),
        ("    split: pets/split.csv\n", "    test: pets\n", 11, "test does not go with images"),
        ("    test: birds/val\n", "", 13, "names its test"),
        ("    crop_pct: 0.875", "    crop_pct: .nan", 7, "JSON"),
        ("    img_size: 224", "    img_size: 2024-01-01", 6, "JSON"),
        ("    name: birds", "    name: 7", 15, "name is a text; got 7"),
        ("  - resnet18.a1_in1k", "  - ${NETS}/a.json", 3, "--data NETS=FOLDER, or set EMBEDKIT_NETS"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    assert old in WHOLE
    message = refusal(tmp_path, WHOLE.replace(old, new, 1))
    assert words in message
    assert f"line {line}:" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "mapping"),
        ("backbones: [a]\ndata: [{images: x, split: y}]\n", "names protocols"),
        ("backbones: []\ndata: [{images: x, split: y}]\nprotocols: [default]\n", "backbones is empty"),
        ("backbones: a\ndata: []\nprotocols: []\n", "backbones is a list"),
        ("backbones: [a]\ndata: [{images: x}]\nprotocols: [default]\n", "neither test nor split"),
        ("backbones: [a/b.json, a_b]\ndata: {\n", "not a YAML file"),
        ("backbones: [!!python/name:os.system x]\ndata: [{images: x, split: y}]\nprotocols: [default]\n", "YAML"),
        ("name: &a [x]\nbackbones: *a\n", "line 2: a suite has no aliases"),
        ("name: " + "[" * 5000 + "]" * 5000, "more than 20 levels"),
        ("name: x\n" + "#" * MAX_BYTES, "larger than a suite may be"),
        ("name: 2024-13-45\n" + REST, "line 1: a value is a text"),
        ("name: " + "1" * 5000 + "\n" + REST, "line 1: a value is a text"),
        ("name: !!bool maybe\n" + REST, "line 1: a value is a text"),
    ],
)
def test_what_is_no_suite_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(EvaluationError, match="not a YAML file"):
        read_suite(tmp_path / "suite.yaml")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_suite(tmp_path / "absent.yaml")


def test_names_that_files_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, WHOLE.replace("name: DINOv2 S/14", "name: ResNet18.A1_in1k"))
    assert "'resnet18.a1_in1k' and 'ResNet18.A1_in1k'" in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[a]", "[resnet18, {model: resnet18, img_size: 128}]"),
        ("[a]", "[{name: a, model: b}, {name: a, model: c}]"),
        ("[{images: x, split: y}]", "[{images: pets, split: y}, {images: more/pets, split: y}]"),
        ("[default]", "[default, {protocol: default, shots: 5}]"),
    ],
)
def test_two_of_one_name_are_refused(tmp_path: Path, old: str, new: str) -> None:
    assert "would have one name" in refusal(tmp_path, REST.replace(old, new))


def test_a_home_that_nobody_has_is_a_folder_like_others(tmp_path: Path) -> None:
    (data,) = read(tmp_path, REST.replace("images: x", "images: ~nobody-has-this-name/x")).data
    assert data.train == str(tmp_path / "~nobody-has-this-name/x")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("a--b", "a-b"),
        ("...", "unnamed"),
        ("é" * 9, "unnamed"),
        ("x" * 99, "x" * 60),
    ],
)
def test_no_name_leaves_the_folder(name: str, file: str) -> None:
    assert file_name(name) == file


def test_places_come_from_the_call_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = WHOLE.replace("images: pets\n", "images: ${DATA}/pets\n")
    monkeypatch.setenv("EMBEDKIT_DATA", str(tmp_path / "environment"))
    assert read(tmp_path, text).data[0].train == str(tmp_path / "environment" / "pets")
    assert read(tmp_path, text, DATA=tmp_path / "call").data[0].train == str(tmp_path / "call" / "pets")


def test_urls_and_datasets_stay_as_they_are(tmp_path: Path) -> None:
    text = WHOLE.replace("train: birds/train", "train: https://example.org/a.tar").replace("birds/val", "dataset:birds")
    birds = read(tmp_path, text).data[1]
    assert (birds.train, birds.test) == ("https://example.org/a.tar", "dataset:birds")


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_our_own_suites_can_be_read_and_say_how_they_are_run(path: Path, tmp_path: Path) -> None:
    suite = read_suite(path, {"DATA": tmp_path})
    assert suite.plans
    text = path.read_text(encoding="utf-8")
    assert f"embedkit bench configs/{path.name}" in text
    assert ".." not in text.replace("...", "")
    assert all(str(tmp_path) in data.train for data in suite.data)


def test_the_suite_of_the_guide_can_be_read(tmp_path: Path) -> None:
    guide = (CONFIGS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", guide, flags=re.DOTALL)
    suite = read(tmp_path, text, DATA=tmp_path)
    assert len(suite.plans) == 12 and suite.protocols[1].name == "few-shot"
