import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from embedkit.cli import main
from embedkit.heads import load_head
from embedkit.spec import EmbeddingSpec
from embedkit.store import Store, StoreWriter

DIM = 4


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    codes = np.arange(60) % 2
    x = 2 * np.eye(DIM)[codes] + rng.normal(size=(60, DIM))
    labels = np.array(["cat", "dog"])[codes]
    labels[4] = "dog"  # A cat.
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=DIM)
    with StoreWriter(tmp_path / "pets.h5", spec) as writer:
        writer.append(x.astype(np.float32), [f"{row:02}.jpg" for row in range(60)], labels=labels.tolist())
        writer.finalise()
    return tmp_path / "pets.h5"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    lines = [f"{row:02}.jpg,{'test' if row >= 40 else 'train'},{row % 2 + row / 100}" for row in range(60)]
    (tmp_path / "split.csv").write_text("path,split,target\n" + "\n".join(lines) + "\n")
    return tmp_path / "split.csv"


def probed(*arguments: object) -> dict[str, dict[str, object]]:
    values: dict[str, dict[str, object]] = json.loads(run("probe", *arguments, "--json", "-q").stdout)
    return values


def test_protocols_shots_seeds_and_heads_are_passed_on(store: Path, split: Path) -> None:
    few = probed(store, "--split", split, "--shots", "4,1", "--seeds", 2, "--protocol", "bigvision-fewshot")
    assert few["parameters"]["shots"] == [1, 4] and few["parameters"]["seeds"] == 2
    assert few["parameters"]["protocol"] == "bigvision-fewshot"
    ridge = probed(store, "--split", split, "--head", "ridge", "--seed", 3, "--drop-leaks")
    assert ridge["parameters"]["head"] == "ridge" and ridge["parameters"]["seed"] == 3
    assert "r2" in probed(store, "--split", split, "--target", "regression")["metrics"]


def test_folds_need_no_test(store: Path) -> None:
    assert probed(store, "--folds", 3)["parameters"]["folds"] == 3
    assert "got neither; folds=5" in run("probe", store, code=1).stderr


def test_a_head_is_saved_and_read_again(store: Path, split: Path, tmp_path: Path) -> None:
    result = run("probe", store, "--split", split, "--save", tmp_path / "pets.head")
    assert f"head: {tmp_path / 'pets.head'}" in result.stderr and "linear top1" in result.stdout
    saved = load_head(tmp_path / "pets.head")
    assert saved.classes == ["cat", "dog"] and saved.spec == Store.open(store).spec and saved.task == "class"
    assert saved.information["protocol"] == "default" and saved.information["rows"] == 40
    answers = saved.estimator.predict(Store.open(store).load())
    assert np.mean(answers == np.array(["cat", "dog"])[np.arange(60) % 2]) > 0.8


def test_suspects_are_listed_instead_of_scores(store: Path, split: Path) -> None:
    text = run("probe", store, "--suspects", "-q").stdout
    assert "look wrong" in text
    found = json.loads(run("probe", store, "--suspects", "--split", split, "--json", "-q").stdout)
    assert found["judged"] == 40


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--suspects", "--shots", "1"), "--suspects does not go with '--shots'"),
        (("--suspects", "--drop-leaks"), "--suspects does not go with '--drop-leaks'"),
        (("--suspects", "--each"), "--suspects does not go with '--each'"),
        (("--suspects", "--train-split", "val"), "--suspects does not go with '--train-split'"),
        (("--each", "--layer", "avg"), "--each does not go with '--layer'"),
        (("--each", "--save", "x"), "--each does not go with '--save'"),
        (("--shots", "1,two"), "is not one number or several"),
        (("--folds", "1"), "'--folds'"),
        (("--target", "colour"), "'--target'"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(store: Path, arguments: tuple[str, ...], named: str) -> None:
    assert named in run("probe", store, *arguments, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--folds", "3", "--drop-leaks"), "drop_leaks goes without them"),
        (("--folds", "3", "--shots", "2"), "shots go with classes and without folds"),
        (("--folds", "3", "--train-split", "val"), "name parts of a split file"),
        (("--folds", "3", "--split", "SPLIT", "--test-split", "val"), "drop test_split, or the folds"),
        (("--folds", "3", "--head", "forest"), "there is no head 'forest'"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    store: Path, split: Path, arguments: tuple[str, ...], named: str
) -> None:
    given = (split if argument == "SPLIT" else argument for argument in arguments)
    assert named in run("probe", store, *given, code=1).stderr


def test_each_needs_layers(store: Path, split: Path) -> None:
    assert "has no layers to rank" in run("probe", store, "--split", split, "--each", code=1).stderr
