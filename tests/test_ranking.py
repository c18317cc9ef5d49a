"""Ranking: layers of a store probed alike, the best first, and only real differences called real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from embedkit import EmbeddingSpec, EvaluationError
from embedkit.cli import main
from embedkit.evaluation.ranking import rank_layers
from embedkit.store import Inventory, Run
from embedkit.store.parts import Rows
from embedkit.store.tables import Failures, Images


def layered(path: Path, embeddings: dict[str, np.ndarray], labels: list[str]) -> Path:
    """Write a store of several layers; the empty name is its own embeddings."""
    ids = [f"{number:04}.jpg" for number in range(len(labels))]
    classes = sorted(set(labels))
    specs = {
        name: EmbeddingSpec("resnet18", "ab" * 32, rows.shape[1], pool=name or "default")
        for name, rows in embeddings.items()
    }
    zeros = np.zeros(len(ids), dtype=np.int64)
    images = Images.of(ids, zeros, zeros, [bytes(32)] * len(ids))
    inventory = Inventory(
        images.ids, zeros, zeros, np.array([classes.index(label) for label in labels], dtype=np.int32), classes, []
    )
    layers = {name: spec for name, spec in specs.items() if name}
    with Run(path, specs[""], layers=layers, information={}) as run:
        update = run.prepare(inventory, lambda numbers: iter(()), part_size=lambda count: count, batch_size=8)
        run.writer(0, Rows(images, Failures.of([], [], []), embeddings))
        run.finalise(update)
    return path


def worlds(tmp_path: Path) -> tuple[Path, Path]:
    """Return a training and a test store with a good layer, an equally good one, and noise."""
    random = np.random.default_rng(0)
    paths = []
    for name, count in (("train", 120), ("test", 90)):
        codes = np.arange(count) % 3
        good = np.eye(3)[codes] + 0.3 * random.normal(size=(count, 3))
        layers = {"": random.normal(size=(count, 4)), "good:avg": good, "twin:avg": np.hstack([2 * good, good])}
        rows = {layer: values.astype(np.float32) for layer, values in layers.items()}
        paths.append(layered(tmp_path / f"{name}.h5", rows, [f"class {code}" for code in codes]))
    return paths[0], paths[1]


def test_the_best_layer_is_first_and_only_noise_is_really_behind(tmp_path: Path) -> None:
    lines: list[str] = []
    ranking = rank_layers(*worlds(tmp_path), progress=lines.append)
    assert ranking.best.name in ("good:avg", "twin:avg") and ranking.best.comparison is None
    second, last = ranking.layers[1:]
    assert (last.name, last.layer, last.dim) == ("default", None, 4)
    assert last.comparison is not None and second.comparison is not None
    assert last.comparison.real and last.comparison.difference > 0.3
    assert not second.comparison.real
    assert len(lines) == 3 and lines[1] == "layer 2 of 3: good:avg, 3 numbers a row"


def test_a_ranking_is_a_table_and_json(tmp_path: Path) -> None:
    ranking = rank_layers(*worlds(tmp_path))
    text = ranking.to_text().splitlines()
    assert text[0].split()[:2] == ["layer", "width"] and len(text) == 6
    assert "*" not in text[1] and "*" in text[3]
    assert text[5].startswith("The best was chosen on these very test rows, so its number is a little too high")
    values = json.loads(json.dumps(ranking.to_dict()))
    assert [one["name"] for one in values["layers"]] == [one.name for one in ranking.layers]
    assert values["layers"][2]["comparison"]["real"] is True
    assert values["note"].startswith("the best was chosen on these very test rows")


def test_the_command_ranks_too(tmp_path: Path) -> None:
    command = ["probe", *map(str, worlds(tmp_path)), "--each", "-q"]
    shown, lines = (CliRunner().invoke(main, [*command, *more]).stdout for more in ([], ["--json"]))
    assert "chosen on these very test rows" in shown and "chosen on these very test rows" in json.loads(lines)["note"]
    assert [one["name"] for one in json.loads(lines)["layers"]][2] == "default"


def test_stores_without_layers_or_with_others_are_refused(tmp_path: Path) -> None:
    train, _ = worlds(tmp_path)
    rows = np.eye(4, dtype=np.float32)
    plain = layered(tmp_path / "plain.h5", {"": rows}, ["class 0", "class 1"] * 2)
    with pytest.raises(EvaluationError, match="no layers to rank; extract with --layers"):
        rank_layers(plain)
    with pytest.raises(EvaluationError, match=r"lacks layers of .*: good:avg, twin:avg"):
        rank_layers(train, plain)
