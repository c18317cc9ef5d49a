"""The tables and the page of a suite: what they say, and that they need and betray nothing else."""

from __future__ import annotations

import csv
import html.parser
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import embedkit as ek
from embedkit.evaluation import Cell, Report
from embedkit.evaluation.bench_page import Circumstances, bench_page, write_reports
from embedkit.evaluation.charts import Point, reliability_chart, scatter_chart
from embedkit.evaluation.standings import csv_table, markdown_table, rank_cells, text_table
from embedkit.evaluation.suites import Suite, SuiteBackbone, SuiteData, SuiteProtocol

EVIL = "<script>alert(1)</script>\"'&\x1b[31m\n*_|"
RUN = Circumstances(f"embedkit bench {EVIL}", "a machine", "2026-01-01T00:00:00+00:00", 1.5, {"embedkit": "1"})


def report(wrong: int, n: int = 200, classes: Sequence[str] = ("cat", "dog"), ids: Sequence[str] = ()) -> Report:
    """Return what a head found that takes the first rows for the next class, and is the surer the earlier they are."""
    c = len(classes)
    true = np.arange(n) % c
    predicted = np.where(np.arange(n) < wrong, (true + 1) % c, true)
    correct = predicted == true
    per_class = {name: float(correct[true == code].mean()) for code, name in enumerate(classes)}
    part = {"rows": n, "classes": c, "rows_per_class": {}, "path": "x.h5", "content_id": "0" * 64, "failures": 0}
    metrics = {"top1": 1 - wrong / n, "top1_interval": [0.5, 1.0], "per_class": per_class, "ece": 0.1}
    arrays = {
        "ids": np.array(ids or [f"{number}.jpg" for number in range(n)]), "true": true, "predicted": predicted,
        "correct": correct, "confidence": np.linspace(0.99, 0.5, n, dtype=np.float32),
    }  # fmt: skip
    inputs = {"train": part, "test": part, "unseen_classes": {}}
    return Report(metrics, {"protocol": "default", "task": "class", "C": 0.1}, inputs, list(classes), arrays)


def suite_of(names: Sequence[str], data: str = "pets") -> Suite:
    backbones = tuple(SuiteBackbone(name, "resnet18") for name in names)
    return Suite("Pets", backbones, (SuiteData(data, "x", split="y"),), (SuiteProtocol("default", "default"),))


def cells_of(suite: Suite, reports: Sequence[Report | None]) -> list[Cell]:
    speed = {"what": "sample", "images": 64, "seconds": 1.0}
    return [
        Cell(
            plan.name, plan.backbone.name, plan.data.name, plan.protocol.name, {}, found,
            "" if found else f"no such file {EVIL}",
            {"parameters": 10**6 * (number + 1), "dim": 8, "speed": {**speed, "images_per_second": 10.0 + number}}
            if found else {},
        )
        for number, (plan, found) in enumerate(zip(suite.plans, reports, strict=True))
    ]  # fmt: skip


def page_of(suite: Suite, cells: Sequence[Cell], folder: Path, **options: Any) -> str:
    return bench_page(suite, rank_cells(suite, cells), folder, RUN, **options)


class Reader(html.parser.HTMLParser):
    """Collects what a page loads, and notices tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "link", "img", "br", "p", "dt", "dd"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("p", "dt", "dd"):
            assert self.open.pop() == tag


def check(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert all(address.startswith("data:") for address in reader.loaded)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(reader.tags)
    assert "url(" not in page and "@import" not in page and "\x1b" not in page
    return reader


def test_the_best_is_marked_and_differences_that_the_rows_do_not_prove() -> None:
    suite = suite_of(["best", "close", "behind", "gone"])
    standing = rank_cells(suite, cells_of(suite, [report(2), report(3), report(40), None]))[0]
    marks = [place.mark for _, (place,) in standing.rows if place is not None]
    assert marks == ["best", "even", "behind", ""]
    best = standing.best("default")
    assert best is not None and best.cell.backbone == "best"
    # 38 rows are wrong in one only, and all of them in the same one: twice 2^-38, and one of two tests.
    assert standing.column("default")[2].p_value == pytest.approx(2 * 2 * 0.5**38)


def test_backbones_on_other_rows_are_not_called_equal() -> None:
    suite = suite_of(["best", "other"])
    ids = [f"other/{number}.jpg" for number in range(200)]
    standing = rank_cells(suite, cells_of(suite, [report(2), report(3, ids=ids)]))[0]
    assert [place.mark for place in standing.column("default")] == ["best", "unknown"]
    assert "0.9850 [0.5000, 1.0000] ?" in text_table([standing])


def test_tables_for_people_and_for_programs() -> None:
    suite = suite_of(["best", "a|b", "gone"], data="pets *and* birds")
    standings = rank_cells(suite, cells_of(suite, [report(2), report(40), None]))
    text = text_table(standings)
    assert re.search(r"^best +0\.9900 \[0\.5000, 1\.0000\] \* +10\.0 +1\.00 M$", text, flags=re.MULTILINE)
    assert re.search(r"^gone +failed +- +-$", text, flags=re.MULTILINE)
    markdown = markdown_table(suite, standings)
    assert "## pets \\*and\\* birds" in markdown
    assert "| best | 0.9900 [0.5000, 1.0000] **best** | 10.0 | 1.00 M |" in markdown
    assert "| a\\|b | 0.8000 [0.5000, 1.0000] | 11.0 | 2.00 M |" in markdown
    rows = list(csv.DictReader(csv_table(standings).splitlines()))
    assert [row["mark"] for row in rows] == ["best", "behind", ""]
    assert float(rows[1]["value"]) == 0.8 and float(rows[1]["images_per_second"]) == 11.0
    assert rows[2]["value"] == "" and rows[2]["error"].startswith("no such file")


def test_nothing_on_the_page_is_taken_for_a_tag(tmp_path: Path) -> None:
    suite = suite_of([EVIL, "plain", "gone"], data=EVIL + "data")
    ids = [f"{number}{EVIL}.jpg" for number in range(200)]
    reports = [report(5, classes=[EVIL, "b"], ids=ids), report(6, classes=[EVIL, "b"], ids=ids), None]
    page = page_of(suite, cells_of(suite, reports), tmp_path)
    check(page)
    assert "alert(1)&lt;/script&gt;" in page and "<script" not in page


def test_the_page_has_what_it_promises(tmp_path: Path) -> None:
    suite = suite_of(["one", "two"])
    page = page_of(suite, cells_of(suite, [report(30), report(4)]), tmp_path)
    reader = check(page)
    assert reader.tags.count("svg") == 4  # Accuracy against images/s and against parameters, and two of reliability.
    assert page.index("two, default: top1 0.9800") < page.index("one, default: top1 0.8500")
    assert page.count("<details open>") == 1
    assert "images/s" in page and "parameters, millions" in page
    assert "How it was run" in page and "a machine" in page
    # The surest error comes first, and it is the first row.
    assert page.index("0.jpg") < page.index("1.jpg")


@pytest.mark.parametrize(("load", "said"), [(0.1, 0), (None, 0), (1e6, 1)])
def test_rates_of_a_busy_machine_are_called_so(load: float | None, said: int, tmp_path: Path) -> None:
    suite = suite_of(["one"])
    (cell,) = cells_of(suite, [report(4)])
    cell.facts["speed"]["load"] = load
    assert page_of(suite, [cell], tmp_path).count("these rates are too low") == said


def test_errors_come_with_their_pictures_as_long_as_there_is_room(tmp_path: Path, tiny_backbone: Path) -> None:
    for number in range(30):
        (tmp_path / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (8 * number, 0, 0)).save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png")
    store = ek.extract(tmp_path / "photos", tmp_path / "stores" / "one--pets.h5", ek.Backbone.load(tiny_backbone))
    (tmp_path / "photos" / "a" / "0.png").unlink()
    suite = suite_of(["one"])
    (cell,) = cells_of(suite, [report(4, n=30, ids=store.ids)])
    cell.key["train"] = store.content_id
    page = page_of(suite, [cell], tmp_path)
    assert page.count("data:image/jpeg;base64,") == 3
    assert page.count('<div class="missing">') == 1
    check(page)
    page = page_of(suite, [cell], tmp_path, pictures=2)
    assert page.count("data:image/jpeg;base64,") == 1
    assert "2 pictures left out: a page holds 2." in page
    cell.key["train"] = "0" * 64
    assert "its store is not there any more" in page_of(suite, [cell], tmp_path)


def test_many_classes_and_cells_do_not_make_a_page_endless(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(300)]
    suite = suite_of([f"net {number}" for number in range(70)])
    page = page_of(suite, cells_of(suite, [report(100, n=600, classes=names)] * 70), tmp_path)
    check(page)
    assert page.count("<details") == 60
    assert "10 cells are left out here" in page
    assert "260 classes with higher values are left out" in page
    assert "The matrix of 300 classes is left out" in page
    assert len(page) < 4_000_000


@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_other_tasks_have_their_own_page(task: str, tmp_path: Path) -> None:
    n = 20
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {"ids": np.array([f"{row}.jpg" for row in range(n)])}
    if task == "multi-label":
        scores = random.random((n, 2))
        true = random.integers(0, 2, (n, 2))
        arrays |= {"true": true, "predicted": (scores > 0.5).astype(int), "scores": scores}
        metrics = {"mAP": 0.6, "mAP_interval": [0.5, 0.7], "per_class": {"a": 0.5, "b": None}}
    else:
        true = random.normal(size=n)
        arrays |= {"true": true, "predicted": true + np.arange(n)}
        metrics = {"r2": 0.6, "r2_interval": [0.5, 0.7], "mae": 9.5, "mae_interval": [8.0, 9.9]}
    classes = ["a", "b"] if task == "multi-label" else []
    suite = suite_of(["one"])
    found = Report(metrics, {"task": task}, {"unseen_classes": {}}, classes, arrays)
    page = page_of(suite, cells_of(suite, [found]), tmp_path)
    check(page)
    if task == "regression":
        assert "MAE 9.5000" in page and page.index("19.jpg") < page.index("18.jpg")
    else:
        assert "average precision" in page and "Worst errors" not in page


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag == "text"]


def test_a_chart_is_well_formed_and_says_its_points() -> None:
    points = [Point(f"net {n} <&>", 10.0 * (n + 1), 0.8 + n / 50, 0.7, 0.97, n, f"title {n} <") for n in range(5)]
    svg = scatter_chart(points, "images/s", "top1", (0.0, 1.0))
    root = ElementTree.fromstring(svg)
    titles = [element.text for element in root.iter() if element.tag == "title"]
    assert titles == [f"title {n} <" for n in range(5)]
    circles = [element for element in root.iter() if element.tag == "circle"]
    across = [float(circle.get("cx", "")) for circle in circles]
    down = [float(circle.get("cy", "")) for circle in circles]
    assert across == sorted(across) and down == sorted(down, reverse=True)
    assert {"images/s", "top1", "20", "50"} <= set(texts(svg))
    assert sum("net" in text for text in texts(svg)) == 5


@pytest.mark.parametrize(("x", "y"), [(1.0, 0.0), (1e9, 1.0), (1e-3, 0.5)])
def test_a_chart_of_one_point_has_axes(x: float, y: float) -> None:
    svg = scatter_chart([Point("one", x, y, y, y, 0, "")], "x", "y", (0.0, 1.0))
    assert "nan" not in svg and "inf" not in svg
    assert len(texts(svg)) >= 6


def test_reliability_shows_each_bin() -> None:
    confidence = np.array([0.99, 0.99, 0.99, 0.99, 0.51, 0.51])
    svg = reliability_chart(confidence, np.array([True, True, True, False, True, True]), bins=10)
    titles = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag == "title"]
    assert titles == [
        "0.50 to 0.60: 2 rows, stated 0.510, right 1.000",
        "0.90 to 1.00: 4 rows, stated 0.990, right 0.750",
    ]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium here")
def test_a_browser_draws_the_page_and_asks_the_network_nothing(tmp_path: Path) -> None:
    import subprocess

    suite = suite_of(["one", "two"])
    text = write_reports(suite, cells_of(suite, [report(30), report(4)]), tmp_path, command="embedkit bench", seconds=1)
    assert "0.9800" in text and (tmp_path / "table.md").exists() and (tmp_path / "table.csv").exists()
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
         f"--log-net-log={tmp_path / 'net.json'}", (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.count("</details>") == 2
    assert "CONSOLE" not in done.stderr
    asked = set(re.findall(r'"url":"(https?://[^/"]+)', (tmp_path / "net.json").read_text(errors="replace")))
    assert not {host for host in asked if not re.search(r"\.(google|googleapis|gvt1)\.com$", host)}  # Chromium's own.
