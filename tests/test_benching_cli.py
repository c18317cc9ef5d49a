"""`embedkit bench`: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from embedkit.cli import main


@pytest.fixture
def suite(tmp_path: Path, photos: Path, tiny_backbone: Path) -> Path:
    """A suite of one small backbone on two classes of pictures."""
    shutil.copytree(photos, tmp_path / "data" / "photos")
    rows = [f"{kind}/{n}.jpg,{'train' if n <= 8 else 'test'}" for kind in ("cat", "dog") for n in range(1, 13)]
    (tmp_path / "data" / "split.csv").write_text("\n".join(["path,split", *rows]) + "\n")
    (tmp_path / "pets.yaml").write_text(
        f"backbones: [{tiny_backbone}]\n"
        "data: [{images: '${DATA}/photos', split: '${DATA}/split.csv'}]\n"
        "protocols: [dino-knn, bigvision-fewshot]\n"
    )
    return tmp_path / "pets.yaml"


def bench(suite: Path, *arguments: object, code: int = 0) -> Result:
    names = ["bench", suite, "--data", f"DATA={suite.parent / 'data'}", "-o", suite.parent / "run", *arguments]
    result = CliRunner().invoke(main, [os.fspath(one) if isinstance(one, Path) else str(one) for one in names])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_bench_prints_a_table_and_writes_three_files(suite: Path) -> None:
    result = bench(suite)
    assert result.stdout.splitlines()[0] == "photos"
    assert "dino-knn top1" in result.stdout and "bigvision-fewshot 25-shot top1" in result.stdout
    assert "tiny--photos--dino-knn: top1" in result.stderr
    assert all((suite.parent / "run" / name).stat().st_size for name in ("table.md", "table.csv", "report.html"))
    page = (suite.parent / "run" / "report.html").read_text()
    assert "dino-knn: top1 " in page and "bigvision-fewshot: 25-shot top1 " in page


def test_bench_prints_json_lines(suite: Path) -> None:
    first, second = (json.loads(line) for line in bench(suite, "--json", "-q").stdout.splitlines())
    assert (first["name"], second["protocol"]) == ("tiny--photos--dino-knn", "bigvision-fewshot")
    assert first["status"] == "done" and 0 <= first["report"]["metrics"]["top1"] <= 1


def test_a_dry_run_measures_nothing(suite: Path) -> None:
    result = bench(suite, "--dry-run")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["tiny--photos--dino-knn", "missing"],
        ["tiny--photos--bigvision-fewshot", "missing"],
    ]
    assert not (suite.parent / "run").exists()
    bench(suite, "--only", "knn")
    lines = [json.loads(line) for line in bench(suite, "--dry-run", "--json").stdout.splitlines()]
    assert [line["state"] for line in lines] == ["done", "missing"]


def test_a_suite_with_a_cell_that_failed_ends_with_3(suite: Path) -> None:
    suite.write_text(suite.read_text().replace("backbones: [", "backbones: [absent.json, "))
    result = bench(suite, code=3)
    assert "failed: absent--photos--dino-knn: " in result.stderr
    assert "absent    failed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data", "DATA"], 2, "NAME=PATH"),
        (["--data", "a b=c"], 2, "NAME=PATH"),
        (["--only", "nothing"], 1, "no cell is like 'nothing'"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], code: int, words: str, suite: Path) -> None:
    assert words in bench(suite, *arguments, code=code).stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are sent on POSIX only")
def test_ctrl_c_ends_a_run_that_goes_on_later(suite: Path) -> None:
    command = [sys.executable, "-m", "embedkit", "bench", os.fspath(suite), "-o", os.fspath(suite.parent / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "EMBEDKIT_DATA": str(suite.parent / "data")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "tiny--photos: extracting" in line:
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list((suite.parent / "run").rglob(".*-*"))  # Nothing half-made is left.
    bench(suite)
