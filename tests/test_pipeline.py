"""From real photographs to a report, with real weights."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

import embedkit as ek


def test_flowers_are_embedded_searched_and_probed(flowers: Path, weights: Path, tmp_path: Path) -> None:
    with (flowers / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::12]  # 306 photographs, all classes and both parts
    for row in rows:
        link = tmp_path / "photos" / row["path"]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(flowers / row["path"])
    (tmp_path / "split.csv").write_text("path,split\n" + "".join(f"{row['path']},{row['split']}\n" for row in rows))
    store = ek.extract(
        ek.list_images(tmp_path / "photos", follow_links=True), tmp_path / "s.h5",
        ek.Backbone.load(weights / "mobilenetv2_100.tf_in1k.json"),
    )  # fmt: skip
    assert len(store) == len(rows) and store.failures == [] and len(store.classes) == 5

    index = ek.Index.build(store)
    for id in store.ids[::60]:
        hits = list(index.search(flowers / id, k=5))
        assert hits[0].id == id and hits[0].score == pytest.approx(1, abs=1e-5)
    labels = store.labels
    assert labels is not None
    nearest = index.search(store.load(), k=2).rows[:, 1]
    assert (labels[nearest] == labels).mean() > 0.6  # chance is 0.2

    report = ek.probe(store, split=tmp_path / "split.csv")
    assert report.metrics["top1"] > 0.7
    low, high = report.metrics["top1_interval"]
    assert low <= report.metrics["top1"] <= high
    assert np.sum(report.metrics["confusion"]) == sum(row["split"] == "val" for row in rows)
