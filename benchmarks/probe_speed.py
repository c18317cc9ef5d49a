"""Times the choice of a penalty beside its peers, in one run, each in a process of its own: seconds, memory, choice.

    python benchmarks/probe_speed.py STORE.h5 [--rows 20000] [--folds 1] [--values 45]
        [--peers sklearn,clip,dinov2]

The sides see the same standardised float32 rows and the same folds, and try the same 45 values of C, 10^-6 to 10^5
(or fewer, where a peer would take hours):

- embedkit: `embedkit.heads.fit_logistic`; with several folds `sweep_logistic` for each, and a fit to all rows;
- sklearn: LogisticRegressionCV with its L-BFGS, 1,000 iterations at most;
- dinov2: DINOv2's procedure as it is described, with scikit-learn in place of cuML: a LogisticRegression for each C,
  each from zero, in float64;
- clip: CLIP_benchmark's linear probe as it is described: rows of length 1, AdamW at a rate of 0.1 falling as a cosine,
  batches of 512, 10 epochs, 7 weight decays of 97 first and then the neighbours at 8, 4, 2 and 1 steps.

Of each side the wall clock and the processor's seconds are told: on a shared machine only the second can be trusted.
Memory is read from /proc, so this runs on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit import Store

Array = npt.NDArray[Any]
Folds = list[tuple[Array, Array]]
Grid = list[float]


def read(path: str, rows: int | None, folds: int) -> tuple[Array, Array, Folds, Array, Array]:
    """Return training rows and codes, folds of them, and test rows and codes that nothing is chosen on."""
    store = Store.open(path)
    assert store.labels is not None
    shuffled = np.random.default_rng(0).permutation(len(store))
    test = np.sort(shuffled[: len(store) // 5][:10000])
    train = np.sort(shuffled[len(store) // 5 :][:rows])
    x, queries = store.embeddings[train], store.embeddings[test]
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1
    for block in (x, queries):
        block -= mean
        block /= scale
    parts = np.random.default_rng(1).permutation(len(x)) % max(folds, 10)
    chosen = [(np.flatnonzero(parts != part), np.flatnonzero(parts == part)) for part in range(folds)]
    return x, store.labels[train], chosen, queries, store.labels[test]


def ours(x: Array, y: Array, folds: Folds, grid: Grid) -> tuple[Callable[[Array], Array], dict[str, Any]]:
    from embedkit.heads import fit_logistic, logistic_regression, sweep_logistic

    if len(folds) == 1:
        mask = np.zeros(len(x), dtype=np.bool_)
        mask[folds[0][1]] = True
        best, choice = fit_logistic(x, y, held_out=mask, C_grid=grid, criterion="accuracy", standardise=False)
        told = {"C": choice["C"], "scores": list(choice["C_scores"].values())}
        return best.predict, {**told, "not_converged": len(choice["C_not_converged"])}
    scores, losses = np.zeros(len(grid)), []
    for _, held in folds:
        mask = np.zeros(len(x), dtype=np.bool_)
        mask[held] = True
        found, unconverged = sweep_logistic(x, y, mask, grid, standardise=False, criterion="accuracy")
        scores += np.array([found[C] for C in grid]) / len(folds)
        losses.append(len(unconverged))
    C = grid[int(scores.argmax())]
    head = logistic_regression(C, standardise=False).fit(x, y)
    return head.predict, {"C": C, "scores": scores.round(5).tolist(), "not_converged": losses}


def scikit_learn(x: Array, y: Array, folds: Folds, grid: Grid) -> tuple[Callable[[Array], Array], dict[str, Any]]:
    from sklearn.linear_model import LogisticRegressionCV

    head = LogisticRegressionCV(Cs=grid, cv=folds, max_iter=1000, scoring="accuracy", l1_ratios=(0,)).fit(x, y)
    scores = np.asarray(next(iter(head.scores_.values())) if isinstance(head.scores_, dict) else head.scores_)
    scores = scores.reshape(len(folds), len(grid)).mean(axis=0)
    return head.predict, {"C": float(np.ravel(head.C_)[0]), "scores": scores.round(5).tolist()}


def dinov2(x: Array, y: Array, folds: Folds, grid: Grid) -> tuple[Callable[[Array], Array], dict[str, Any]]:
    from sklearn.linear_model import LogisticRegression

    wide, scores = x.astype(np.float64), []
    kept, held = folds[0]
    for C in grid:
        head = LogisticRegression(C=C, max_iter=1000).fit(wide[kept], y[kept])
        scores.append(float(np.mean(head.predict(wide[held]) == y[held])))
    C = grid[int(np.argmax(scores))]
    return LogisticRegression(C=C, max_iter=1000).fit(wide, y).predict, {"C": C, "scores": scores}


def clip(x: Array, y: Array, folds: Folds, grid: Grid) -> tuple[Callable[[Array], Array], dict[str, Any]]:
    import torch

    decays, classes = np.logspace(-6, 2, 97), int(y.max()) + 1
    unit, codes = torch.nn.functional.normalize(torch.from_numpy(x)), torch.from_numpy(y.astype(np.int64))
    kept, held = (torch.from_numpy(part) for part in folds[0])

    def fitted(rows: torch.Tensor, decay: float) -> torch.nn.Linear:
        torch.manual_seed(0)
        layer = torch.nn.Linear(x.shape[1], classes)
        steps = 10 * -(-len(rows) // 512)
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(10):
            for batch in rows[torch.randperm(len(rows))].split(512):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(layer(unit[batch]), codes[batch]).backward()
                optimiser.step()
                schedule.step()
        return layer

    scores: dict[int, float] = {}

    def judge(place: int) -> None:
        if 0 <= place < 97 and place not in scores:
            layer = fitted(kept, float(decays[place]))
            with torch.no_grad():
                right = layer(unit[held]).argmax(dim=1) == codes[held]
            scores[place] = float(right.float().mean())

    for place in range(0, 97, 16):
        judge(place)
    for span in (8, 4, 2, 1):
        peak = max(scores, key=lambda place: scores[place])
        judge(peak - span)
        judge(peak + span)
    best = max(scores, key=lambda place: scores[place])
    layer = fitted(torch.arange(len(x)), float(decays[best]))

    def predict(queries: Array) -> Array:
        with torch.no_grad():
            logits = layer(torch.nn.functional.normalize(torch.from_numpy(queries)))
        codes: Array = logits.argmax(dim=1).numpy()
        return codes

    return predict, {"weight_decay": float(decays[best]), "fits": len(scores) + 1, "scores": [scores[best]]}


SIDES = {"embedkit": ours, "sklearn": scikit_learn, "dinov2": dinov2, "clip": clip}


def memory(name: str) -> int:
    """Return bytes of memory that Linux says this process has: VmRSS now, or VmHWM at most since it was last reset."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(rf"{name}:\s+(\d+) kB", file.read())
    assert found is not None
    return 1024 * int(found[1])


def measure(side: str, path: str, rows: int | None, folds: int, values: int) -> dict[str, Any]:
    """Run one side in this process."""
    import sklearn.linear_model
    import torch

    import embedkit.heads

    assert embedkit.heads.HEADS and sklearn.linear_model.LogisticRegressionCV  # Imported before the clock starts.
    threads = torch.get_num_threads()
    x, y, chosen, queries, truth = read(path, rows, folds)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # The peak starts anew: reading the rows had one of its own.
    resting = memory("VmRSS")
    wall, processor = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predict, told = SIDES[side](x, y, chosen, [float(C) for C in 10 ** np.linspace(-6, 5, values)])
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = memory("VmHWM")
    accuracy = float(np.mean(predict(queries) == truth))
    matrix = {"rows": len(x), "dim": x.shape[1], "classes": len(np.unique(y)), "matrix_bytes": x.nbytes}
    return {
        "side": side, "seconds": wall, "processor_seconds": processor, "peak_bytes": peak, "resting_bytes": resting,
        "test_top1": accuracy, "threads": threads, **matrix, **told,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--folds", type=int, default=1, help="of 10, or of so many when there are more")
    parser.add_argument("--values", type=int, default=45, help="of C, from 10^-6 to 10^5")
    parser.add_argument("--peers", default="sklearn,clip,dinov2")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.store, options.rows, options.folds, options.values)))
        return
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    first: dict[str, Any] = {}
    for side in ("embedkit", *filter(None, options.peers.split(","))):
        command = [sys.executable, __file__, options.store, "--folds", str(options.folds), "--side", side]
        command += ["--values", str(options.values)]
        command += [] if options.rows is None else ["--rows", str(options.rows)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        first = first or told
        if side == "embedkit":
            print(
                f"{told['rows']} rows x {told['dim']}, {told['classes']} classes, {told['matrix_bytes'] / 1e6:.0f} MB"
            )
        ratios = (
            f"{told['seconds'] / first['seconds']:6.1f}x {told['processor_seconds'] / first['processor_seconds']:6.1f}x"
        )
        choice = f"C {told['C']:.3g}" if "C" in told else f"weight decay {told['weight_decay']:.3g}"
        above = (told["peak_bytes"] - told["resting_bytes"]) / 1e6
        print(
            f"{side:<9}{told['seconds']:8.1f} s {told['processor_seconds']:8.1f} cpu s {ratios}  peak "
            f"{told['peak_bytes'] / 1e6:6.0f} MB, {above:5.0f} MB above the rows  {choice:<22}"
            f"test top1 {told['test_top1']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
