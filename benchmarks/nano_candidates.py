"""Compare small backbones with the one in the box and its teachers: size, speed, and what their embeddings are worth.

    python benchmarks/nano_candidates.py nano small-96=weights/tf_mobilenetv3_small_100.tf_in1k.json@96 \
        v2=weights/mobilenetv2_100.tf_qat_in1k.json@224 --baseline v2 \
        --flowers data/flowers --digits demo-output/digits --tiny data/tiny-imagenet -o runs/candidates

A candidate is NAME=MODEL@PIXELS; the name may be left out for nano, the pixels for a model's own size.

What a candidate is worth is measured once and kept in OUTPUT: a run that was stopped goes on, and one with more
candidates computes those. Flowers: fit on train, scored on val by its split.csv; recall@1 is that of val in train.
Digits, as the demo writes them: five folds. Tiny-ImageNet: fit on train/, scored on val/; recall@1 is that of val in
itself.

Speed is measured anew, for all candidates together: every round takes the same flowers through reading, decoding and
the network of each candidate in turn, and ratios to the baseline are taken within a round. Processor milliseconds are
of all threads, and mean more than images a second where other processes are busy. Set GOMP_SPINCOUNT=0 there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import embedkit as ek
from embedkit.backbones import Steps, in_batches, stream, usable_processors
from embedkit.backbones.network import count_parameters
from embedkit.evaluation.speeds import machine_name


@dataclass(frozen=True)
class Candidate:
    """What one row of the table is about."""

    name: str
    backbone: ek.Backbone

    @property
    def parameters(self) -> int:
        """Numbers that were learned."""
        return count_parameters(self.backbone)


def candidate(text: str) -> Candidate:
    """Return what NAME=MODEL@PIXELS says."""
    name, _, given = text.rpartition("=")
    model, _, pixels = given.rpartition("@") if given.rpartition("@")[2].isdecimal() else (given, "", "")
    backbone = ek.Backbone.load(model, img_size=int(pixels) if pixels else None, device="cpu")
    return Candidate(name or Path(model).stem, backbone)


def worth(each: Candidate, folders: dict[str, Path | None], output: Path) -> dict[str, float]:
    """Return the figures of a candidate's embeddings, measured now or by an earlier run."""
    kept = output / f"{each.name}.json"
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    figures: dict[str, float] = known.get("figures", {}) if known.get("digest") == each.backbone.spec.digest else {}
    for data, measure in (("flowers", on_flowers), ("digits", on_digits), ("tiny", on_tiny)):
        folder = folders[data]
        if folder is not None and f"{data}_linear" not in figures:
            print(f"{each.name}: {data}", flush=True)
            found = measure(each, folder, output)
            figures |= {f"{data}_{name}": float(value) for name, value in found.items()}
            values = {"digest": each.backbone.spec.digest, "figures": figures}
            kept.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return figures


def embedded(each: Candidate, images: Path, store: Path) -> ek.Store:
    """Return the store of a folder by a candidate; what an earlier one of the name left is replaced."""
    stale = store.exists() and ek.Store.open(store).digest != each.backbone.spec.digest
    return ek.extract(images, store, each.backbone, overwrite=stale)


def on_flowers(each: Candidate, folder: Path, output: Path) -> dict[str, float]:
    """Return probe, k-NN and recall@1 on the photographs of flowers."""
    store = embedded(each, folder, output / f"{each.name}-flowers.h5")
    with (folder / "split.csv").open(newline="", encoding="utf-8") as file:
        split = {row["path"]: row["split"] for row in csv.DictReader(file)}
    parts = [
        store.select(
            output / f"{each.name}-{part}.h5", np.array([split[id] == part for id in store.ids]), overwrite=True
        )
        for part in ("val", "train")
    ]
    found = ek.probe(store, split=folder / "split.csv").metrics
    recall = ek.retrieval_report(*parts, ks=(1,)).metrics["recall@1"]
    return {"linear": found["top1"], "knn": found["knn_top1"], "recall": recall}


def on_digits(each: Candidate, folder: Path, output: Path) -> dict[str, float]:
    """Return the probe of five folds on scans of digits."""
    return {"linear": ek.probe(embedded(each, folder, output / f"{each.name}-digits.h5"), folds=5).metrics["top1"]}


def on_tiny(each: Candidate, folder: Path, output: Path) -> dict[str, float]:
    """Return probe, k-NN and recall@1 on Tiny-ImageNet's classes."""
    train, val = (embedded(each, folder / part, output / f"{each.name}-tiny-{part}.h5") for part in ("train", "val"))
    found = ek.probe(train, val).metrics
    recall = ek.retrieval_report(val, ks=(1,), exclude_self=True).metrics["recall@1"]
    return {"linear": found["top1"], "knn": found["knn_top1"], "recall": recall}


def timed(candidates: Sequence[Candidate], files: Sequence[Path], rounds: int, engine: str) -> dict[str, list[Any]]:
    """Return (images a second, processor milliseconds an image) of every round, by candidate."""
    workers = usable_processors()
    sample = files[:: max(1, len(files) // 8)][:8]
    engines = {
        each.name: each.backbone.choose_engine(
            [each.backbone.pixels(file) for file in sample], 10 * len(files), engine=engine, batch_size=8,
            workers=workers, threads=1,
        ).engine
        for each in candidates
    }  # fmt: skip
    found: dict[str, list[Any]] = {each.name: [] for each in candidates}
    for number in range(rounds + 1):
        for each in candidates:
            forward = partial(each.backbone.run, engines[each.name], layers=())
            steps = Steps(Path.read_bytes, lambda data, _, of=each.backbone: of.pixels(data), forward)
            started, cpu = time.perf_counter(), time.process_time()
            with closing(stream(in_batches(files, 8), steps, workers=workers)) as batches:
                done = sum(len(batch.items) for batch in batches)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            if number:  # The first round warms up files, caches and engines.
                found[each.name].append((done / seconds, 1000 * cpu / done))
    print(f"engines: {', '.join(f'{name} {one.name}' for name, one in engines.items())}")
    return found


def table(candidates: Sequence[Candidate], figures: dict[str, Any], speeds: dict[str, Any], baseline: str) -> str:
    """Return the rows for people, in Markdown."""
    header = ["", "pixels", "width", "parameters", "MB in fp16", "images/s", "x", "CPU ms", "x"]
    names = [
        f"{data}_{name}"
        for data in ("flowers", "digits", "tiny")
        for name in ("linear", "knn", "recall")
        if any(f"{data}_{name}" in one for one in figures.values())
    ]
    rows = [[*header, *(name.replace("_", " ").replace("recall", "recall@1") for name in names)]]
    rows.append(["---"] * len(rows[0]))
    for each in candidates:
        rounds, base = speeds.get(each.name, []), speeds.get(baseline, [])
        pairs = list(zip(rounds, base, strict=True)) if base else []
        cells = ["", "", "", ""]
        if rounds:
            cells[0], cells[2] = (f"{statistics.median(one[k] for one in rounds):.{k + k}f}" for k in (0, 1))
        if pairs:
            cells[1] = f"{statistics.median(own[0] / other[0] for own, other in pairs):.2f}"
            cells[3] = f"{statistics.median(other[1] / own[1] for own, other in pairs):.2f}"
        side, width = each.backbone.preprocessing.img_size[0], each.backbone.dim
        rows.append([
            each.name, str(side), str(width), f"{each.parameters / 1e6:.2f} M", f"{each.parameters * 2 / 1e6:.1f}",
            *cells, *(f"{figures[each.name][name]:.3f}" if name in figures[each.name] else "" for name in names),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Compare small backbones with the one in the box and its teachers.")
    parser.add_argument("candidates", nargs="+", metavar="NAME=MODEL@PIXELS")
    parser.add_argument("--baseline", default="", metavar="NAME", help="whose speed is 1.00")
    parser.add_argument("--flowers", type=Path, help="folder with a folder for each class, and split.csv")
    parser.add_argument("--digits", type=Path, help="folder with a folder for each class: demo-output/digits")
    parser.add_argument("--tiny", type=Path, help="folder with train/ and val/")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for stores and figures")
    parser.add_argument("--images", type=int, default=400, help="photographs that speed is measured on; 0: not at all")
    parser.add_argument("--speed-images", type=Path, help="other photographs for that than the flowers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", default="graph", help="auto, eager, graph, openvino or compile")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    choices = parser.parse_args()
    candidates = [candidate(text) for text in choices.candidates]
    names = [each.name for each in candidates]
    if len(set(names)) < len(names) or (choices.baseline and choices.baseline not in names):
        parser.error(f"candidates have different names, and the baseline is one of them; got {', '.join(names)}")
    choices.output.mkdir(parents=True, exist_ok=True)
    folders = {name: getattr(choices, name) for name in ("flowers", "digits", "tiny")}
    figures = {each.name: worth(each, folders, choices.output) for each in candidates}
    speeds: dict[str, list[Any]] = {}
    pictures = choices.speed_images or choices.flowers
    if choices.images and pictures is not None:
        files = sorted(pictures.rglob("*.jpg"))
        files = files[:: max(1, len(files) // choices.images)][: choices.images]
        speeds = timed(candidates, files, choices.rounds, choices.engine)
        measured = {"machine": machine_name(), "engine": choices.engine, "images": len(files), "rounds": speeds}
        (choices.output / "speed.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    said = f"{machine_name()}; load {os.getloadavg()[0]:.1f}; engine {choices.engine}, {choices.rounds} rounds"
    text = (
        f"{table(candidates, figures, speeds, choices.baseline)}\n\n{said}; x: beside {choices.baseline or 'none'}.\n"
    )
    print(text)
    if choices.write:
        choices.write.write_text(f"# Candidates for the backbone in the box\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
