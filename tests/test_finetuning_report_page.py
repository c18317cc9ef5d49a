import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from embedkit.evaluation.charts import Line, line_chart
from embedkit.finetuning.comparison import BeforeAfter, Change, classifier_report
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.report_page import WARMUP_TOP1, Account, run_page
from embedkit.finetuning.training.history import EpochRow, History

CLASSES = ["cat", "<b>dog</b>"]


class Tags(HTMLParser):
    """Checks that tags are closed, and keeps what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br", "circle", "path", "rect", "meter"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("circle", "path", "rect", "meter"):
            assert self.open.pop() == tag


def account(epochs: int = 3) -> Account:
    rng = np.random.default_rng(0)
    true = np.arange(40) % 2
    scores = rng.dirichlet([1, 1], 40)
    sure = np.eye(2)[true] * 0.9 + 0.05
    ids = [f"{row}<i>.jpg" for row in range(40)]
    before, after = (
        classifier_report(ids, true, scores, CLASSES),
        classifier_report(ids[::-1], true[::-1], sure[::-1], CLASSES),
    )
    change = Change("classifier", before.metrics["top1"], 1.0, [0.1, 0.5], 0.001, 0.004, "McNemar's exact test", 40)
    part = {"split": "val", "images": 40, "by_class": {CLASSES[0]: 20, CLASSES[1]: 20}}
    rows = tuple(
        EpochRow(n, 1 / n, {"top1": n / 4, "loss": 2 / n}, {"stem": 1e-6 * n, "head": 1e-3}, 80, 0, 2.0, 16)
        for n in range(1, epochs + 1)
    )
    images = {"train": part, "val": part, "test": part, "left_out": 3}
    return Account(
        "flowers & friends", {"name": "resnet18"}, Recipe(body_lr=0.25), images,
        {"warm-up": "probe", WARMUP_TOP1: 0.125}, History(rows, min(2, epochs)),
        BeforeAfter([change], "val", True, before, after),
        parameters=[{"name": "stem", "frozen": 1234, "trainable": 0, "from_epoch": 0}], seconds={"training": 6.0},
    )  # fmt: skip


def read(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open in ([], ["html"]), tags.open
    return tags


def test_the_page_is_whole_self_contained_and_escaped() -> None:
    page = run_page(account())
    tags = read(page)
    assert "script" not in tags.seen and all(link.startswith("data:") for link in tags.links)
    assert "flowers &amp; friends" in page and "<b>dog</b>" not in page and "<i>.jpg" not in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_says_what_came_of_it_and_shows_what_changed() -> None:
    given = account()
    page = run_page(given)
    assert "fine-tuning helped: classifier rose." in page and "that flatters what is after" in page
    found = given.comparison
    assert found is not None and found.before is not None
    wrong = int((~found.before.predictions["correct"]).sum())
    assert f"{wrong} images right now, and wrong before" in page and "0 images wrong now, and right before" in page
    assert page.count("was ") >= min(wrong, 24)
    assert "Dashed: epoch 2, the best by top1" in page and "<b>0.25</b>" in page and "1,234" in page
    assert "3 images were left out" in page and "validation top1, 0: 0.125" in page


def test_words_in_tables_stay_whole_in_a_narrow_window() -> None:
    page = run_page(account())
    breaking = re.findall(r"([^{}]+){[^{}]*overflow-wrap: anywhere", page)
    assert breaking and not any(re.search(r"\b(td|th|table)\b", selectors) for selectors in breaking)
    assert ".w { min-width: 11em; }" in page and ".wide { overflow-x: auto; }" in page
    assert "<td class=w>classifier" in page and "<td class=w>McNemar" in page


def test_what_was_adapted_is_told_from_what_came_of_it() -> None:
    page = run_page(replace(account(), parent={"name": "resnet18", "weights_sha256": "ab" * 32}))
    assert "<dt>parent&#x27;s name</dt><dd>resnet18</dd>" in page
    assert f"<dt>parent&#x27;s weights sha256</dt><dd>{'ab' * 32}</dd>" in page


def test_a_run_without_epochs_or_comparison_has_a_page() -> None:
    bare = account(epochs=0)
    page = run_page(Account(bare.title, bare.parent, bare.recipe, bare.images, {}, History()))
    read(page)
    assert "the head alone was fitted" in page and "Not compared" in page


def test_the_account_is_json() -> None:
    values = json.loads(json.dumps(account().to_dict()))
    assert values["comparison"]["verdict"] == "fine-tuning helped: classifier rose"
    assert values["history"]["epochs"][1]["rates"]["stem"] == pytest.approx(2e-6)
    assert values["after"]["top1"] == 1.0 and values["recipe"]["body_lr"] == 0.25


def test_numbers_that_are_none_end_neither_page_nor_json() -> None:
    given = account()
    rows = tuple(replace(row, metrics={"top1": math.nan, "loss": math.inf}) for row in given.history.epochs)
    broken = replace(given, history=History(rows, 1))
    assert broken.to_dict()["history"]["epochs"][0]["metrics"] == {"top1": None, "loss": None}
    json.dumps(broken.to_dict(), allow_nan=False)
    page = run_page(broken)
    read(page)
    assert "<circle" in page  # The training loss.


def test_curves_lie_where_their_values_are() -> None:
    chart = line_chart([Line("a", [(1, 0.5), (2, 1.0), (3, 0.75)], 0)], "epoch", "value", mark=2)
    circles = [tuple(map(float, one)) for one in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]
    (x1, y1), (x2, y2), (x3, y3) = circles
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and y3 == pytest.approx((y1 + y2) / 2, abs=0.2) and y2 < y1
    assert f"M{x2:.1f}" in chart


def test_a_logarithmic_axis_has_no_place_for_zero() -> None:
    chart = line_chart([Line("rate", [(1, 0.0), (2, 1e-4), (3, 1e-3)], 0)], "epoch", "rate", logarithmic=True)
    assert chart.count("<circle") == 2 and "1e-04" in chart and "1e-03" in chart
    assert "<circle" not in line_chart([Line("rate", [(1, 0.0)], 0)], "epoch", "rate", logarithmic=True)


def test_pictures_come_from_the_store(flowers: Path, tmp_path: Path) -> None:
    from embedkit.spec import EmbeddingSpec
    from embedkit.store import Store, StoreWriter

    ids = sorted(path.relative_to(flowers).as_posix() for path in (flowers / "daisy").glob("*.jpg"))[:4]
    with StoreWriter(
        tmp_path / "s.h5",
        EmbeddingSpec(backbone="x", weights_sha256="ab" * 32, dim=2),
        information={"root": str(flowers)},
    ) as writer:
        writer.append(np.eye(4, 2), ids, labels=["daisy"] * 4)
        writer.finalise()
    true = np.array([0, 0, 1, 1])
    wrong, right = (classifier_report(ids, true, scores, CLASSES) for scores in (np.eye(2)[1 - true], np.eye(2)[true]))
    given = account()
    found = BeforeAfter([], "val", False, wrong, right)
    page = run_page(
        Account(given.title, {}, Recipe(), given.images, {}, given.history, found), Store.open(tmp_path / "s.h5")
    )
    read(page)
    assert page.count("data:image/jpeg;base64,") >= 4
