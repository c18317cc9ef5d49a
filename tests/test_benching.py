"""Benching: what is measured, what is used again, and what becomes of a run that is killed or fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedkit as ek
from embedkit.errors import EvaluationError
from embedkit.evaluation import PROTOCOLS, Cell, read_suite, run_suite
from embedkit.evaluation.benching import head_device, state_of
from embedkit.evaluation.cells import read_cell
from embedkit.evaluation.speeds import machine_name
from embedkit.evaluation.suites import Suite


@pytest.fixture
def world(tmp_path: Path, photos: Path, tiny_backbone: Path, other_backbone: Path) -> Path:
    """A folder with pictures, their split, two backbones, and a suite of them."""
    photos = shutil.copytree(photos, tmp_path / "photos")
    rows = [f"{kind}/{n}.jpg,{'train' if n <= 8 else 'test'}" for kind in ("cat", "dog") for n in range(1, 13)]
    (photos / "split.csv").write_text("\n".join(["path,split", *rows]) + "\n")
    write_suite(tmp_path, backbones=[tiny_backbone, other_backbone])
    return tmp_path


def write_suite(folder: Path, *, backbones: list[Any], protocols: str = "[default]", more: str = "") -> None:
    lines = "\n".join(f"  - {backbone}" for backbone in backbones)
    text = f"name: Pets\nbackbones:\n{lines}\ndata:\n  - images: photos\n    split: photos/split.csv\n{more}"
    (folder / "pets.yaml").write_text(f"{text}protocols: {protocols}\n")


def read(world: Path) -> Suite:
    return read_suite(world / "pets.yaml")


def run(world: Path, **options: Any) -> tuple[list[Cell], str]:
    """Run the suite, and return its cells and what was said."""
    said: list[str] = []
    cells = run_suite(read(world), world / "run", said.append, **options)
    return cells, "\n".join(said)


def times(world: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (world / "run").rglob("*.*") if path.is_file()}


def test_every_cell_is_measured_and_kept(world: Path) -> None:
    cells, _ = run(world)
    assert [cell.name for cell in cells] == ["tiny--photos--default", "other--photos--default"]
    assert not any(cell.reused or cell.error for cell in cells)
    for cell in cells:
        assert cell.report is not None
        store = ek.Store.open(world / "run" / "stores" / f"{cell.backbone}--photos.h5")
        plain = ek.probe(store, split=world / "photos" / "split.csv")
        assert cell.report.metrics == plain.metrics
        assert cell.key["digest"] == store.digest and cell.key["train"] == store.content_id
        kept = read_cell(world / "run" / "cells", cell.name)
        assert kept is not None and kept.report is not None
        assert kept.report.to_dict() == plain.to_dict()
        assert (kept.report.predictions["predicted"] == plain.predictions["predicted"]).all()
        assert kept.report.predictions["ids"].tolist() == plain.predictions["ids"].tolist()


def test_a_cell_says_what_was_timed_and_how_large_the_backbone_is(world: Path) -> None:
    facts = run(world)[0][0].facts
    speed = facts["speed"]
    # 24 images are too few to time, so all of them were extracted once more for that.
    assert (speed["what"], speed["images"], speed["device"]) == ("sample", 24, "cpu")
    assert 24 / speed["images_per_second"] == pytest.approx(speed["seconds"], abs=0.001)
    assert speed["machine"] == machine_name()
    import timm

    model = timm.create_model("test_resnet", num_classes=0)
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["versions"]["embedkit"] == ek.__version__
    assert not list((world / "run" / "stores").glob(".*"))


def test_what_is_still_true_is_used_again(world: Path) -> None:
    first, _ = run(world)
    before = times(world)
    second, said = run(world)
    assert all(cell.reused for cell in second)
    assert said.count("nothing has changed") == 2
    for one, other in zip(first, second, strict=True):
        assert one.report is not None and other.report is not None
        assert one.report.to_dict() == other.report.to_dict()
        assert one.facts["speed"] == other.facts["speed"]
    kept = {name: mtime for name, mtime in times(world).items() if not name.endswith(".speed.json")}
    assert kept == {name: mtime for name, mtime in before.items() if not name.endswith(".speed.json")}


def new_picture(world: Path) -> None:
    shutil.copy(world / "photos" / "cat" / "1.jpg", world / "photos" / "cat" / "more.jpg")


def other_split(world: Path) -> None:
    path = world / "photos" / "split.csv"
    path.write_text(path.read_text().replace("cat/8.jpg,train", "cat/8.jpg,test"))


def other_parameters(world: Path) -> None:
    path = world / "pets.yaml"
    path.write_text(path.read_text().replace("[default]", "[{protocol: default, name: default, seed: 5}]"))


def other_pixels(world: Path) -> None:
    path = world / "pets.yaml"
    text = path.read_text()
    line = next(line for line in text.splitlines() if line.endswith("tiny.json"))
    path.write_text(text.replace(line, f"  - {{name: tiny, model: {line[4:]}, crop_pct: 0.5}}"))


@pytest.mark.parametrize(
    ("change", "again", "words"),
    [
        (new_picture, 2, "train differ"),
        (other_split, 2, "split_sha256 differ"),
        (other_parameters, 2, "parameters differ"),
        (other_pixels, 1, "digest, train differ"),
    ],
)
def test_a_cell_whose_inputs_changed_is_measured_again(
    change: Callable[[Path], None], again: int, words: str, world: Path
) -> None:
    run(world)
    change(world)
    cells, said = run(world)
    assert sum(not cell.reused for cell in cells) == again
    assert said.count(words) == again
    if change is other_pixels:
        assert "tiny--photos.h5 is made again" in said and "crop_pct: 0.9 != 0.5" in said
        store = ek.Store.open(world / "run" / "stores" / "tiny--photos.h5")
        assert store.spec.preprocessing.crop_pct == 0.5
    assert all(cell.reused for cell in run(world)[0])


def test_a_protocol_of_another_version_is_measured_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(world)
    monkeypatch.setattr(type(PROTOCOLS["default"]), "version", PROTOCOLS["default"].version + 1)
    assert [state_of(world / "run", plan) for plan in read(world).plans] == ["stale", "stale"]
    cells, said = run(world)
    assert not any(cell.reused for cell in cells) and said.count("protocol_version differ") == 2
    assert {cell.facts["versions"]["embedkit"] for cell in cells} == {ek.__version__}
    assert all(cell.reused for cell in run(world)[0])


def test_another_version_of_embedkit_alone_measures_nothing_again(world: Path) -> None:
    run(world)
    for path in (world / "run" / "cells").glob("*.json"):
        path.write_text(path.read_text().replace(f'"embedkit": "{ek.__version__}"', '"embedkit": "0.0.0"'))
    cells = run(world)[0]
    assert all(cell.reused for cell in cells)
    assert {cell.facts["versions"]["embedkit"] for cell in cells} == {"0.0.0"}  # Of what measured it.


@pytest.mark.parametrize(
    ("protocol", "device", "where"),
    [
        ("default", "auto", "cpu"),
        ("default", "cpu", "cpu"),
        ("default", "cuda:1", "cuda:1"),
        ("dinov2-logreg", "cuda", "cuda"),
        ("clip-lbfgs", "cuda", "cuda"),
        ("dino-knn", "cuda", "cpu"),
        ("mteb-image", "cuda", "cpu"),
        ("{protocol: default, head: mlp}", "cuda", "cuda"),
        ("{protocol: default, head: ridge}", "cuda", "cpu"),
        ("{protocol: default, target: multi-label}", "cuda", "cuda"),
        ("{protocol: default, target: regression}", "cuda", "cpu"),
    ],
)
def test_a_gpu_that_is_named_is_also_the_heads_that_can_use_it(
    protocol: str, device: str, where: str, tmp_path: Path
) -> None:
    write_suite(tmp_path, backbones=["resnet18"], protocols=f"[{protocol}]")
    assert head_device(read(tmp_path).plans[0], device) == where


def test_the_device_of_a_protocol_wins_and_is_told(world: Path, tiny_backbone: Path) -> None:
    write_suite(world, backbones=[tiny_backbone], protocols="[{protocol: default, device: 'cuda:99'}, dino-knn]")
    cells, _ = run(world, device="cpu")
    assert "cannot be fitted on the device 'cuda:99'" in cells[0].error
    assert cells[1].report is not None and cells[1].report.parameters["device"] == "cpu"


def test_folds_pass_over_the_test_part(world: Path, tiny_backbone: Path) -> None:
    more = "    test_split: test\n"
    write_suite(
        world, backbones=[tiny_backbone], protocols="[{protocol: default, name: folds, folds: 2}, default]", more=more
    )
    folds, plain = run(world)[0]
    assert folds.report is not None and plain.report is not None, (folds.error, plain.error)
    assert (len(folds.report.predictions["ids"]), len(plain.report.predictions["ids"])) == (16, 8)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_a_damaged_cell_is_measured_again(suffix: str, world: Path) -> None:
    first, _ = run(world)
    path = world / "run" / "cells" / f"{first[0].name}.{suffix}"
    path.write_bytes(path.read_bytes()[:-20])
    assert state_of(world / "run", read(world).plans[0]) == "damaged"
    cells, said = run(world)
    assert [cell.reused for cell in cells] == [False, True]
    assert f"{first[0].name} is measured again" in said


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("report", "classes"), [1, 2]),
        (("report", "classes"), ["cat"]),
        (("report", "metrics"), {}),
        (("report", "inputs"), None),
        (("report",), "x"),
        (("parameters",), "many"),
        (("speed",), {"images_per_second": "fast"}),
        (("key",), 7),
        (("format",), 99),
    ],
)
def test_a_cell_that_says_nonsense_is_refused(place: tuple[str, ...], value: Any, world: Path) -> None:
    name = run(world, only="tiny")[0][0].name
    path = world / "run" / "cells" / f"{name}.json"
    values = json.loads(path.read_text())
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match="damaged"):
        read_cell(path.parent, name)


def test_a_failing_backbone_takes_no_other_along(world: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    write_suite(world, backbones=[tmp_path / "absent.json", tiny_backbone])
    cells, _ = run(world)
    assert "no such file" in cells[0].error and cells[0].report is None
    assert not cells[1].error
    assert [state_of(world / "run", plan) for plan in read(world).plans] == ["failed", "done"]


def test_what_was_measured_stays_when_the_backbone_is_gone_for_a_while(world: Path, tiny_backbone: Path) -> None:
    mine = world / "mine"
    shutil.copytree(tiny_backbone.parent, mine)
    write_suite(world, backbones=[mine / "tiny.json"])
    run(world)
    mine.rename(world / "away")
    assert run(world)[0][0].error
    (world / "away").rename(mine)
    assert run(world)[0][0].reused


def test_a_failing_protocol_says_why(world: Path, tiny_backbone: Path) -> None:
    write_suite(world, backbones=[tiny_backbone], protocols="[{protocol: default, name: a, seed: -1}, default]")
    cells, _ = run(world)
    assert "seed" in cells[0].error and not cells[1].error


def test_only_some_cells(world: Path) -> None:
    assert [cell.backbone for cell in run(world, only="OTHER")[0]] == ["other"]
    cells, said = run(world, only="tiny-*-default")
    assert [cell.backbone for cell in cells] == ["tiny", "other"]  # The other is shown as it was left.
    assert "other" not in said
    with pytest.raises(EvaluationError, match="'thing'; they are tiny--photos--default"):
        run(world, only="thing")


def test_a_cell_of_another_backbone_or_folder_is_not_shown_as_it_was_left(world: Path, other_backbone: Path) -> None:
    run(world)
    suite = (world / "pets.yaml").read_text()
    line = next(line for line in suite.splitlines() if line.endswith("tiny.json"))
    (world / "pets.yaml").write_text(suite.replace(line, f"  - {{name: tiny, model: {other_backbone}}}"))
    assert [state_of(world / "run", plan) for plan in read(world).plans] == ["stale", "done"]
    assert [cell.backbone for cell in run(world, only="other")[0]] == ["other"]
    (world / "pets.yaml").write_text(suite.replace("images: photos", "name: photos\n    images: pictures"))
    assert [state_of(world / "run", plan) for plan in read(world).plans] == ["stale", "stale"]
    (world / "photos").rename(world / "pictures")
    (world / "pets.yaml").write_text((world / "pets.yaml").read_text().replace("photos/split", "pictures/split"))
    assert all(cell.reused for cell in run(world)[0])
    assert [state_of(world / "run", plan) for plan in read(world).plans] == ["done", "done"]


def test_a_cell_with_a_label_that_training_lacks_is_used_again(world: Path, tiny_backbone: Path) -> None:
    lines = (world / "photos" / "split.csv").read_text().splitlines()[1:]
    labelled = [f"{line},{line[:3]};{'zinnia' if line.endswith('test') else 'any'}" for line in lines]
    (world / "photos" / "split.csv").write_text("\n".join(["path,split,label", *labelled]) + "\n")
    write_suite(world, backbones=[tiny_backbone], protocols="[{protocol: default, target: multi-label}]")
    assert not run(world)[0][0].error
    assert run(world)[0][0].reused


def test_train_and_test_folders(world: Path, tiny_backbone: Path) -> None:
    for part, numbers in (("train", range(1, 9)), ("val", range(9, 13))):
        for kind in ("cat", "dog"):
            (world / "parts" / part / kind).mkdir(parents=True)
            for number in numbers:
                shutil.copy(world / "photos" / kind / f"{number}.jpg", world / "parts" / part / kind)
    more = "  - {name: parts, train: parts/train, test: parts/val}\n"
    write_suite(world, backbones=[tiny_backbone], more=more)
    one, two = run(world)[0]
    assert one.report is not None and two.report is not None
    assert np.array_equal(one.report.predictions["correct"], two.report.predictions["correct"])
    assert two.key["test"] == ek.Store.open(world / "run" / "stores" / "tiny--parts--test.h5").content_id


SCRIPT = """
import sys, time
from embedkit.evaluation import read_suite, run_suite
def extracting(name, now):
    print("extracting", name, "kept", now.kept, "safe", now.committed > 0, flush=True)
    time.sleep(0.1)  # So that parts are written meanwhile.
cells = run_suite(read_suite(sys.argv[1]), sys.argv[2], lambda line: print(line, flush=True), extracting=extracting)
print("finished", sum(cell.reused for cell in cells), flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_run_that_is_killed_goes_on(world: Path) -> None:
    """Killed while images are embedded, while a cell is measured, and between two cells."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, os.fspath(world / "pets.yaml"), os.fspath(world / "run")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def killed_at(words: str) -> str:
        process, lines = start(), []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if words in line:
                process.kill()
                break
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, "".join(lines) + rest
        return "".join(lines)

    killed_at("extracting tiny--photos kept 0 safe True")
    assert ek.Store.status(world / "run" / "stores" / "tiny--photos.h5").committed > 0
    said = killed_at("tiny--photos--default: measuring")
    assert "tiny--photos kept 8" in said or "tiny--photos kept 16" in said  # What was safe was not embedded again.
    assert state_of(world / "run", read(world).plans[0]) == "missing"
    killed_at("other: loading")
    assert state_of(world / "run", read(world).plans[0]) == "done"
    output, _ = (process := start()).communicate(timeout=120)
    assert process.returncode == 0
    assert output.endswith("finished 1\n")
    undisturbed = run_suite(read(world), world / "undisturbed")
    for cell, other in zip(run(world)[0], undisturbed, strict=True):
        assert cell.reused and cell.report is not None and other.report is not None
        assert cell.report.metrics == other.report.metrics and cell.key == other.key
