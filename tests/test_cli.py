from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import embedkit as ek
from embedkit.cli import main
from embedkit.cli.printing import failures, status_line
from embedkit.store import Images, Inventory, Run, StoreWriter


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [os.fspath(part) if isinstance(part, Path) else str(part) for part in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def store(photos: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "photos.h5"
    run("extract", photos, "-o", path, "-m", tiny_backbone)
    return path


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("extract", ek.extract),
        ("extract", ek.Backbone.load),
        ("extract", ek.list_images),
        ("index", ek.Index.build),
        ("search", ek.Index.search),
        ("dedupe", ek.find_duplicates),
        ("retrieve", ek.retrieval_report),
        ("outliers", ek.find_outliers),
        ("cluster", ek.cluster),
        ("probe", ek.probe),
        ("predict", ek.predict),
        ("bench", ek.run_suite),
        ("models", ek.list_models),
    ],
)
def test_defaults_are_those_of_the_function(command: str, function: Callable[..., Any]) -> None:
    signature = inspect.signature(function).parameters
    compared = 0
    for option in main.commands[command].params:
        if isinstance(option, click.Option) and option.name in signature and not option.required:
            if signature[option.name].default is inspect.Parameter.empty:
                continue  # The command finds a value of its own, as for -o.
            default = option.get_default(click.Context(main.commands[command]))
            empty = default in (None, ()) or "UNSET" in repr(default).upper()
            expected = signature[option.name].default
            assert (None if empty else default) == (None if expected == () else expected), option.name
            compared += 1
    assert compared or command == "models"


def test_extract_prints_one_line_and_keeps_progress_apart(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    result = run("extract", photos, "-o", tmp_path / "s.h5", "-m", tiny_backbone)
    assert result.stdout.count("\n") == 1
    assert "24 images x 96 float32, 2 classes, 0 failed" in result.stdout and "images/s" in result.stdout
    assert "backbone: test_resnet" in result.stderr and "24/24" in result.stderr
    quiet = run("extract", photos, "-o", tmp_path / "s.h5", "-m", tiny_backbone, "--overwrite", "-q")
    assert quiet.stderr == ""


def test_extract_passes_every_option_on(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    weights = tmp_path / "x.safetensors"
    shutil.copy(tiny_backbone.with_suffix(".safetensors"), weights)
    result = run(
        "extract", photos, "-o", tmp_path / "s.h5", "-m", weights, "--arch", "test_resnet", "--arch-kwargs",
        "drop_rate=0.0", "--img-size", "48,64", "--crop-pct", "0.8", "--crop-mode", "squash", "--interpolation",
        "lanczos", "--mean", "0.5", "--std", "0.1,0.2,0.3", "--pool", "max", "--no-exif", "--device", "cpu", "-b", 5,
        "-j", 1, "--decode", "exact", "--precision", "bf16", "--tta", "flip", "--scales", "1,0.5", "--json",
    )  # fmt: skip
    spec = json.loads(result.stdout)["spec"]
    assert spec["precision"] == "bfloat16" and spec["views"] == ["flip", "scale:0.5"]
    assert spec["pool"] == "max" and spec["arch_kwargs"] == {"drop_rate": 0.0}
    assert spec["preprocessing"] == {
        "img_size": [48, 64], "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "lanczos",
        "mean": [0.5, 0.5, 0.5], "std": [0.1, 0.2, 0.3], "exif": False, "alpha": "white", "decoder": "pillow",
    }  # fmt: skip


def test_how_files_are_read_is_chosen_on_the_command_line(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    whole = (photos / "cat" / "1.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[:-400])
    (root / "whole.jpg").write_bytes(whole)
    extract = ("extract", root, "-o", tmp_path / "s.h5", "-m", tiny_backbone, "--json", "--overwrite")
    assert "cut.jpg: its end is missing" in run(*extract, code=3).stderr
    padded = json.loads(run(*extract, "--truncated", "pad", "--icc", "--max-pixels", "7k").stdout)["spec"]
    assert padded["preprocessing"]["truncated"] == "pad" and padded["preprocessing"]["icc"] is True
    few = run(*extract, "--max-pixels", "6911", code=1)
    assert "96 x 72 pixels are more than the limit of 6,911" in few.stderr
    for wrong in ("0", "-1", "1.5M", "50 M", "M"):
        assert "is not a number such as" in run(*extract, f"--max-pixels={wrong}", code=2).stderr


def test_exit_codes_tell_some_failures_from_all(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(photos / "cat", root)
    (root / "bad\x1b[31m.jpg").write_text("no")
    result = run("extract", root, "-o", tmp_path / "s.h5", "-m", tiny_backbone, code=3)
    assert "1 failed" in result.stdout
    kind = ek.Store.open(tmp_path / "s.h5").failures[0].kind
    assert rf"  {kind}  bad\x1b[31m.jpg: not an image" in result.stderr and "\x1b[31m" not in result.output
    assert f"1 failed: 1 {kind}" in result.stderr and f"embedkit info {tmp_path / 's.h5'} --failures" in result.stderr
    info = run("info", tmp_path / "s.h5")
    assert r"bad\x1b[31m.jpg" in info.stdout and "\x1b" not in info.stdout
    shutil.rmtree(root)
    root.mkdir()
    (root / "bad.jpg").write_text("no")
    result = run("extract", root, "-o", tmp_path / "t.h5", "-m", tiny_backbone, code=1)
    assert "none of its 1 image could be read" in result.stderr and not (tmp_path / "t.h5").exists()


def test_errors_are_one_message_without_a_traceback(
    store: Path, photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for message, arguments in [
        ("missing.h5 does not exist", ["info", tmp_path / "missing.h5"]),
        ("no such file or folder", ["extract", tmp_path / "missing", "-o", tmp_path / "s.h5", "-m", tiny_backbone]),
        ("no images", ["extract", tmp_path / "empty", "-o", tmp_path / "s.h5", "-m", tiny_backbone]),
        ("did you mean", ["extract", photos, "-o", tmp_path / "s.h5", "-m", "resnet5O"]),
        ("the file is missing", ["search", store, tmp_path / "missing.jpg"]),
        ("not an embedkit store", ["info", _foreign(tmp_path)]),
        ("no timm model matches", ["models", "nothing-like-it"]),
        ("split", ["probe", store, "--split", tmp_path / "missing.csv"]),
    ]:
        result = run(*arguments, code=1)
        assert result.stderr.startswith(("error: ", "backbone: ")) and message in result.stderr, result.stderr
        assert "Traceback" not in result.output
    (tmp_path / "file").touch()
    blocked = run("extract", photos, "-o", tmp_path / "file" / "s.h5", "-m", tiny_backbone, code=1)
    assert re.search(r"error: .*file.*: (Not a directory|File exists)", blocked.stderr)
    page = run("search", store, "--id", "cat/1.jpg", "--html", tmp_path / "no" / "page.html", code=1)
    assert "page.html: No such file or directory" in page.stderr
    assert "name an image to search with" in run("search", store, code=2).stderr
    assert "has no id 'nope'" in run("search", store, "--id", "nope", code=2).stderr
    assert "is a folder" in run("extract", photos, "-o", tmp_path, "-m", tiny_backbone, code=1).stderr
    other = run("extract", photos, "-o", store, "-m", tiny_backbone, "--pool", "max", code=1)
    assert "pool: 'default' != 'max'" in other.stderr


def _foreign(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "foreign.h5", "w") as file:
        file["features"] = [1.0]
    return folder / "foreign.h5"


def test_info_counts_and_shows_how_to_read_the_file(store: Path) -> None:
    text = run("info", store).stdout
    for part in ("24 x 96 float32", "12  cat", "12  dog", "failures   0", "import h5py", "weights_sha256"):
        assert part in text
    values = json.loads(run("info", store, "--json").stdout)
    assert (values["rows"], values["dim"], values["classes"]) == (24, 96, {"cat": 12, "dog": 12})
    assert values["digest"] == ek.Store.open(store).digest


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    """A store of three kinds of failures, one of them in names that are hard to print."""
    spec = ek.EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    with StoreWriter(tmp_path / "failed.h5", spec) as writer:
        for number in range(1200):
            writer.fail(f"{number:04}.jpg", "the file is empty", "empty")
        writer.fail('odd, "\udce9".jpg', "the end, or\nmore", "truncated")
        writer.fail("\x1b[31m\nforged.jpg", "\x1b[31m\nforged", "truncated")
        writer.fail("x" * 90, "a named pipe", "not-an-image")
        writer.finalise()
    return tmp_path / "failed.h5"


def test_info_counts_failures_by_kind_and_shows_the_first_of_each(failed: Path) -> None:
    lines = run("info", failed).stdout.splitlines()
    assert lines[lines.index("  failures   1,203") + 1 :][:10] == [
        "        1,200  empty",
        *[f"               000{number}.jpg: the file is empty" for number in range(3)],
        "            2  truncated",
        r"               \x1b[31m\nforged.jpg: \x1b[31m\nforged",
        r'               odd, "\udce9".jpg: the end, or\nmore',
        "            1  not-an-image",
        f"               {'x' * 90}: a named pipe",
        "    ... and 1,197 more (--failures lists them)",
    ]
    summary = json.loads(run("info", failed, "--json").stdout)
    assert len(summary["failures"]) == 1203 and summary["failures"][-1]["kind"] == "not-an-image"


def test_info_lists_failures_as_a_table_csv_or_json_lines(failed: Path, store: Path) -> None:
    table = run("info", failed, "--failures").stdout.splitlines()
    assert len(table) == 1203 and "\x1b" not in "".join(table)
    assert table[0] == r"truncated     \x1b[31m\nforged.jpg".ljust(76) + r"\x1b[31m\nforged"
    assert {line.index("the file is empty") for line in table if line.startswith("empty")} == {76}
    assert table[-1] == f"not-an-image  {'x' * 90}  a named pipe"
    expected = [dataclasses.asdict(failure) for failure in ek.Store.open(failed).failures]
    lines = run("info", failed, "--failures", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == expected
    command = [sys.executable, "-m", "embedkit", "info", failed, "--failures", "--csv"]
    written = subprocess.run(command, check=True, stdout=-1).stdout
    text = io.StringIO(written.decode("utf-8", "surrogateescape"), newline="")
    assert list(csv.DictReader(text)) == expected and b'"odd, ""\xe9"".jpg",truncated,' in written
    assert run("info", store, "--failures").stdout == "" == run("info", store, "--failures", "--json").stdout
    assert run("info", store, "--failures", "--csv").stdout_bytes == b"id,kind,error\r\n"
    for wrong in (["--csv"], ["--failures", "--csv", "--json"]):
        assert "--csv goes with --failures" in run("info", store, *wrong, code=2).stderr


def test_the_summary_of_an_extraction_groups_failures_by_kind(failed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures(ek.Store.open(failed), quiet=True)
    assert capsys.readouterr().err == ""
    failures(ek.Store.open(failed), quiet=False)
    assert capsys.readouterr().err.splitlines() == [
        "1,203 failed: 1,200 empty, 2 truncated, 1 not-an-image",
        *[f"  empty         000{number}.jpg: the file is empty" for number in range(3)],
        r"  truncated     \x1b[31m\nforged.jpg: \x1b[31m\nforged",
        r'  truncated     odd, "\udce9".jpg: the end, or\nmore',
        f"  not-an-image  {'x' * 90}: a named pipe",
        f"embedkit info {failed} --failures lists them, and extract --retry-failed tries them again",
    ]


def test_a_store_of_any_number_of_kinds_is_summed_up(tmp_path: Path) -> None:
    errors = [ek.ImageError(f"{number:03}.jpg", "?", f"kind-{number:03}") for number in range(500)]
    spec = ek.EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    nothing = np.empty(0, dtype=np.int64)
    with Run(tmp_path / "s.h5", spec) as unfinished:
        there = Inventory(Images.empty().ids, nothing, nothing, failures=errors)
        update = unfinished.prepare(there, lambda numbers: [], part_size=lambda count: 8, batch_size=4)
        unfinished.finalise(update)
    text = run("info", tmp_path / "s.h5").stdout
    assert "kind-019" in text and "kind-020" not in text and "... and 480 more (--failures lists them)" in text
    assert len(run("info", tmp_path / "s.h5", "--failures").stdout.splitlines()) == 500


def test_what_a_file_says_is_printed_as_text(store: Path, tmp_path: Path) -> None:
    spec = ek.EmbeddingSpec(
        backbone="x\nforged", weights_sha256="\x1b[31m", dim=2, pool="\x1b[31m",
        arch_kwargs={"\x1b]0;title\x07\nforged": 1},
    )  # fmt: skip
    with StoreWriter(tmp_path / "s.h5", spec, information={"created": "\x1b[2J", "root": "\nforged"}) as writer:
        writer.append([[1, 2]], ["\x1b[31m\nforged"], labels=["\x1b[31m\nforged"])
        writer.fail("failed\nforged", "\x1b[31m\nforged")
        writer.finalise()
    for result in [
        run("info", tmp_path / "s.h5"),
        run("info", tmp_path / "s.h5", "--json"),
        run("info", tmp_path / "s.h5", "--failures"),
        run("info", tmp_path / "s.h5", "--failures", "--json"),
        run("search", tmp_path / "s.h5", "--id", "\x1b[31m\nforged"),
        run("merge", store, tmp_path / "s.h5", "-o", tmp_path / "m.h5", code=1),
        run("verify", tmp_path / "s.h5"),
    ]:
        assert "\x1b" not in result.output
        assert not any(line.startswith("forged") for line in result.output.splitlines())
    text = status_line(tmp_path / "s.h5", ek.store.Status("busy", 1, 2, 3, 4, "\x1b[31m", "\x1b[31m\nforged"))
    assert text.isprintable() and "process 4" in text


def test_verify_goes_on_behind_a_file_that_cannot_be_read(store: Path, tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("hello")
    result = run("verify", tmp_path / "missing.h5", tmp_path / "text.h5", store, tmp_path, code=1)
    assert (
        f"error: {tmp_path / 'missing.h5'} does not exist" in result.stderr and "is not an HDF5 file" in result.stdout
    )
    assert f"{store}: every byte is as it was written" in result.stdout
    lines = run("verify", tmp_path / "missing.h5", store, "--json", code=1).stdout.splitlines()
    assert [json.loads(line)["path"] for line in lines] == [str(store)]


def test_quiet_leaves_warnings_and_nothing_else(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "p")
    command = ["extract", tmp_path / "p", "-o", tmp_path / "s.h5", "-m", tiny_backbone]
    assert "comparing the content" in (run(*command) and run(*command, "--checksum")).stderr
    assert run(*command, "--checksum", "-q").stderr == ""
    (tmp_path / "s.h5.parts").mkdir()
    (tmp_path / "s.h5.parts" / "run.json").write_text("{")
    assert run(*command, "-q", "--checksum").stderr.startswith("warning: ")
    assert "comparing the content" in run(*command, "--checksum").stderr


def test_search_prints_a_table_json_lines_or_paths(store: Path, photos: Path, tmp_path: Path) -> None:
    query = photos / "cat" / "1.jpg"
    table = run("search", store, query, "-k", 3).stdout.splitlines()
    assert len(table) == 4 and "1.0000  cat  cat/1.jpg" in table[1]
    lines = [
        json.loads(line)
        for line in run("search", store, query, "--id", "dog/2.jpg", "-k", 2, "--json").stdout.splitlines()
    ]
    assert [(line["query"], line["rank"]) for line in lines] == [
        (str(query), 1), (str(query), 2), ("dog/2.jpg", 1), ("dog/2.jpg", 2),
    ]  # fmt: skip
    assert (
        lines[2]["id"] == "dog/2.jpg" and lines[2]["label"] == "dog" and lines[2]["path"] == str(photos / "dog/2.jpg")
    )
    plain = run("search", store, "--id", "dog/2.jpg", "-k", 2, "--plain").stdout.splitlines()
    assert plain[0] == str(photos / "dog" / "2.jpg") and len(plain) == 2
    run("search", store, query, "-k", 3, "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<img") == 4


def test_a_store_whose_weights_moved_says_so_and_takes_the_new_place(
    photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_backbone.parent, tmp_path / "old")
    run("extract", photos, "-o", tmp_path / "s.h5", "-m", tmp_path / "old" / "tiny.json")
    (tmp_path / "old").rename(tmp_path / "new")
    query = photos / "dog" / "1.jpg"
    assert "-m MODEL" in run("search", tmp_path / "s.h5", query, code=1).stderr
    assert "dog/1.jpg" in run("search", tmp_path / "s.h5", query, "-m", tmp_path / "new" / "tiny.json").stdout


def test_search_refuses_another_backbone_and_names_the_fields(store: Path, photos: Path, hub_cache: str) -> None:
    result = run("search", store, photos / "cat" / "1.jpg", "-m", hub_cache, code=1)
    assert "backbone: 'test_resnet' != 'mobilenetv3_small_050'" in result.stderr and "weights_sha256" in result.stderr


def test_probe_prints_a_report_or_one_json_object(store: Path, tmp_path: Path) -> None:
    rows = [f"{kind}/{n}.jpg,{'train' if n <= 8 else 'val'}" for kind in ("cat", "dog") for n in range(1, 13)]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *rows]))
    assert "linear top1" in run("probe", store, "--split", tmp_path / "split.csv").stdout
    wrong = run("select", store, "-o", tmp_path / "x.h5", "--split", tmp_path / "split.csv", "valid", code=2)
    assert "has no split 'valid'; it has 'train', 'val'" in wrong.stderr
    values = json.loads(run("probe", store, "--split", tmp_path / "split.csv", "--json").stdout)
    assert values["metrics"]["top1"] == 1.0 and len(values["metrics"]["top1_interval"]) == 2


def test_models_lists_what_matches() -> None:
    lines = run("models", "resnet18.a1_in1k").stdout.splitlines()
    assert lines[0].split() == ["name", "parameters", "pixels", "width"]
    assert lines[1].split() == ["resnet18.a1_in1k", "11.2", "M", "224", "512"]
    value = json.loads(run("models", "resnet18.a1_in1k", "--json").stdout)
    assert value == {"name": "resnet18.a1_in1k", "parameters": 11176512, "img_size": 224, "dim": 512}
    assert run("models").stdout.count("\n") > 1000


def test_names_that_are_not_utf8_pass_through_a_pipe_unchanged(
    photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    root = os.fsencode(tmp_path / "odd")
    os.mkdir(root)
    shutil.copy(photos / "cat" / "1.jpg", os.path.join(root, b"caf\xe9.jpg"))
    command = [sys.executable, "-m", "embedkit"]
    subprocess.run([*command, "extract", tmp_path / "odd", "-o", tmp_path / "s.h5", "-m", tiny_backbone], check=True)
    done = subprocess.run(
        [*command, "search", tmp_path / "s.h5", "--id", b"caf\xe9.jpg", "--plain"], check=True, stdout=-1
    )
    assert done.stdout == os.path.join(root, b"caf\xe9.jpg\n")
    table = subprocess.run([*command, "search", tmp_path / "s.h5", "--id", b"caf\xe9.jpg"], check=True, stdout=-1)
    assert b"caf\\udce9.jpg" in table.stdout


def test_ctrl_c_keeps_what_is_computed_and_exits_with_130(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    import signal

    root = tmp_path / "many"
    root.mkdir()
    for number in range(3000):
        os.link(photos / "cat" / "1.jpg", root / f"{number}.jpg")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "embedkit", "extract", root, "-o", tmp_path / "s.h5", "-m", tiny_backbone, "-j", "1",
            "--part-size", "32",
        ],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    while ek.Store.status(tmp_path / "s.h5").committed < 32:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 130 and b"interrupted" in rest and b"Traceback" not in rest
    assert sorted(os.listdir(tmp_path)) == ["many", "s.h5.parts"]
    assert b"the same command goes on from there" in rest
    assert "unfinished" in run("status", tmp_path / "s.h5").stdout
    resumed = run("extract", root, "-o", tmp_path / "s.h5", "-m", tiny_backbone)
    assert re.search(r"\d+ resumed, [\d,]+ new", resumed.stderr) and "3,000 images" in resumed.stdout, resumed.stderr
    assert run("status", tmp_path / "s.h5").stdout.endswith("finished; the store has 3,000 rows\n")


def test_the_second_ctrl_c_stops_at_once() -> None:
    import signal

    code = (
        "import time\nfrom embedkit.cli.group import _interruptible\n_interruptible()\nprint('ready', flush=True)\n"
        "try:\n    time.sleep(60)\nfinally:\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == b"\n" and b"Ctrl-C once more stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"") and process.returncode == 130


def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(
    photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    shutil.copytree(photos, root)
    (root / "cat" / "bad.jpg").write_text("no")
    (root / "cat" / "gone.png").symlink_to("nowhere")
    command = ("extract", root, "-o", tmp_path / "s.h5", "-m", tiny_backbone, "--dry-run")
    found = json.loads(run(*command, "--json").stdout)
    assert found["images"] == found["sampled"] == 25 and sum(found["suffixes"].values()) == 25
    assert found["labels"] == {"cat": 13, "dog": 12} and found["failures"] == {"missing": 1}
    assert sum(found["sample_failures"].values()) == 1 and sum(found["formats"].values()) == 24
    assert found["image_bytes"] == sum(path.stat().st_size for path in root.rglob("*.*") if path.is_file())
    assert found["images_per_second"] > 0 and found["seconds"] > 0
    text = run(*command).stdout
    assert "25" in text and "1 missing" in text and "images/s" in text
    assert sorted(os.listdir(tmp_path)) == ["images"]
    run("extract", root, "-o", tmp_path / "s.h5", "-m", tiny_backbone, code=3)
    size = (tmp_path / "s.h5").stat().st_size
    assert found["store_bytes"] < size < found["store_bytes"] + 100_000  # The rest is the file's own bookkeeping.


def test_a_dry_run_looks_at_the_store(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(photos, root)
    command = ("extract", root, "-o", tmp_path / "s.h5", "-m", tiny_backbone)
    run(*command)
    found = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert found["unchanged"] == 24 and found["seconds"] == found["sampled"] == found["deleted"] == 0
    assert "nothing to compute" in run(*command, "--dry-run").stdout
    (root / "cat" / "1.jpg").rename(root / "cat" / "first.jpg")
    found = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert (found["unchanged"], found["deleted"], found["sampled"]) == (23, 1, 24) and found["seconds"] > 0
    assert "preprocessing.exif" in run(*command, "--no-exif", "--dry-run", code=1).stderr
    missing = run("extract", root, "-o", tmp_path / "no" / "s.h5", "-m", tiny_backbone, "--dry-run", code=1)
    assert f"{tmp_path / 'no'}: no such folder for the store" in missing.stderr


def test_a_name_that_is_misspelt_costs_no_backbone(tmp_path: Path) -> None:
    result = run("extract", tmp_path / "fotos", "-o", tmp_path / "s.h5", "-m", "resnet50.a1_in1k", code=1)
    assert "fotos" in result.stderr and "backbone" not in result.stderr
    assert "--files-from" in run("extract", "-o", tmp_path / "s.h5", "-m", "resnet50.a1_in1k", code=2).stderr


def test_on_error_fail_and_max_failures_end_a_run(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(photos, root)
    (root / "cat" / "bad.jpg").write_text("no")
    command = ("extract", root, "-o", tmp_path / "s.h5", "-m", tiny_backbone)
    assert "cat/bad.jpg: not an image" in run(*command, "--on-error", "fail", code=1).stderr
    assert "1 of 25 images have failed, and 0 may" in run(*command, "--max-failures", "1%", code=1).stderr
    assert run(*command, "--max-failures", "5%", code=3).stdout and run(*command, "--max-failures", "1", code=3).stdout
    for wrong in ("150%", "-1", "0.5", "few"):
        assert "neither a number" in run(*command, "--max-failures", wrong, code=2).stderr


def test_extract_takes_several_folders_and_some_of_their_images(
    photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    command = ("extract", photos / "cat", f"hound={photos / 'dog'}", "-m", tiny_backbone, "--json", "-q")
    ids = run("extract", photos / "cat", f"hound={photos / 'dog'}", "-m", tiny_backbone, "-q", "-o", tmp_path / "a.h5")
    assert ids and {id.partition("/")[0] for id in ek.Store.open(tmp_path / "a.h5").ids} == {"cat", "hound"}
    options = ("--include", "cat/*", "--exclude", "1.jpg", "--shard", "1/1", "--sample", "5", "--seed", "3", "--limit")
    run(*command, "-o", tmp_path / "b.h5", *options, "4")
    store = ek.Store.open(tmp_path / "b.h5")
    listing = ek.list_images(photos / "cat", include=["*"], exclude=["1.jpg"])
    assert len(store) == 4 and {id.removeprefix("cat/") for id in store.ids} < {file.id for file in listing.files}
    hits = run("search", tmp_path / "a.h5", "--id", "hound/" + os.listdir(photos / "dog")[0], "-k", "1", "--plain")
    assert Path(hits.stdout.strip()).parent == photos / "dog"
