"""The commands `index` and `search INDEX`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from embedkit import EmbeddingSpec, Store
from embedkit.cli import main
from embedkit.store import StoreWriter


def make_store(path: Path, first: int, last: int) -> Store:
    vectors = np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32)[first:last]
    path.unlink(missing_ok=True)
    with StoreWriter(path, EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=16)) as writer:
        rows = range(first, last)
        writer.append(vectors, [f"{row:04}.jpg" for row in rows], labels=["ab"[row % 2] for row in rows])
        writer.finalise()
    return Store.open(path)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "s.h5", 0, 1500).path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_an_index_is_built_searched_and_updated(store: Path) -> None:
    built = run("index", store, "--factory", "IVF8,Flat", "--recall", "0.5")
    folder = store.with_suffix(".index")
    assert built.exit_code == 0, built.output
    assert "recall@10" in built.stdout and "* IVF8,Flat" in built.stdout and "1,500 rows, IVF8,Flat" in built.stdout
    assert "MB at most while it is built" in built.stderr
    found = run("search", folder, "--id", "0007.jpg", "-k", "3", "--where", "label=b", "--json")
    hits = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.exit_code == 0 and "0007.jpg" in found.stdout and hits
    alone = run("search", folder, "--id", "0007.jpg", "--where", "label=b", "--exclude-self", "--plain")
    assert alone.exit_code == 0 and "0007.jpg" not in alone.stdout
    near = run("search", folder, "--id", "0007.jpg", "--radius", "0.999", "--plain")
    assert near.stdout.splitlines() == ["0007.jpg"]
    make_store(store, 100, 1600)
    stale = run("search", folder, "--id", "0107.jpg", "--plain")
    assert "100 of its rows are missing" in stale.stderr and stale.exit_code == 0
    updated = run("index", store, "--update")
    assert updated.exit_code == 0 and "100 rows added; 100 rows of the index gone from the store" in updated.stderr
    assert run("search", folder, "--id", "1550.jpg", "-k", "1", "--plain").stdout.splitlines() == ["1550.jpg"]


def test_json_has_what_was_measured(store: Path, tmp_path: Path) -> None:
    built = run("index", store, "-o", tmp_path / "i", "--factory", "SQ8", "--json")
    values = json.loads(built.stdout)
    assert values["rows"] == 1500 and values["chosen"]["factory"] == "SQ8" and len(values["measured"]) == 2
    exact = json.loads(run("index", store, "-o", tmp_path / "e", "--json").stdout)
    assert exact["chosen"] is None and exact["measured"] == []


def test_errors_have_exit_codes(store: Path, tmp_path: Path) -> None:
    assert run("index", store, "-o", tmp_path / "i").exit_code == 0
    again = run("index", store, "-o", tmp_path / "i")
    assert again.exit_code == 1 and "--update" in again.stderr and "--overwrite" in again.stderr
    assert run("index", store, "-o", tmp_path / "i", "--overwrite").exit_code == 0
    for arguments in (["--factory", "Nonsense"], ["--whiten", "17"], ["--recall", "1.5"], ["--max-memory", "2Q"],
                      ["--max-latency", "0ms"], ["--expand", "10"], ["--metric", "l2", "--whiten", "4"]):  # fmt: skip
        assert run("index", store, "-o", tmp_path / "n", *arguments).exit_code == 2, arguments
    unkept = run("index", store, "-o", tmp_path / "n", "--factory", "SQ8", "--max-memory", "10")
    assert unkept.exit_code == 1 and "keeps to 10 bytes; measured:" in unkept.stderr and "SQ8" in unkept.stderr
    assert run("index", store, "-o", tmp_path / "missing", "--update").exit_code == 1
    (tmp_path / "i" / "index.json").write_text("{")
    broken = run("search", tmp_path / "i", "--id", "0001.jpg")
    assert broken.exit_code == 1 and "index.json is damaged" in broken.stderr


def test_limits_alone_mean_a_recall_of_99_percent(store: Path) -> None:
    built = run("index", store, "--max-memory", "2GB", "--json")
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["chosen"]["ann_recall"] >= 0.99


def test_update_takes_no_options_of_building(store: Path) -> None:
    run("index", store, "--factory", "SQ8")
    refused = run("index", store, "--update", "--factory", "HNSW32")
    assert refused.exit_code == 2 and "--update keeps" in refused.stderr


def test_nothing_is_built_where_it_cannot_be_written(store: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refused = run("index", store, "-o", tmp_path / "other", "--overwrite", "--factory", "SQ8")
    assert refused.exit_code == 1 and "something else than an index" in refused.stderr
    assert "building" not in refused.stderr


def test_a_search_that_finds_nothing_says_so(store: Path) -> None:
    assert "nothing found" in run("search", store, "--id", "0007.jpg", "--where", "id=zz*").stdout
    slip = run("search", store, "--id", "0007.jpg", "--where", "id=000")
    assert slip.exit_code == 1 and "'id=000*'" in slip.stderr
