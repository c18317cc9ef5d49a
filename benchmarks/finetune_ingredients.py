"""What each ingredient of fine-tuning is worth: the same images, one ingredient more a row, several seeds.

    python benchmarks/finetune_ingredients.py IMAGES SPLIT.csv MODEL OUTPUT [--seeds 0,1,2] [--epochs 6]
        [--only last-block,all] [--device cpu] [--more "--workers 4"]

Every row is `embedkit finetune` with the options that the table names, in a folder of its own below OUTPUT; all share
the embeddings of the frozen backbone. A run that is there already is not repeated, and one that was killed goes on, so
the same command may be given until the table is whole. The table is printed as Markdown, and is in OUTPUT/table.md.

Nothing is chosen by these numbers: the rows and their settings are fixed here, and within a run only the epoch is
chosen on the validation part.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import embedkit as ek

# Each row but the first adds to the one before it.
COMMON = ("--batch-size", "16", "--body-lr", "3e-4", "--augment", "none")
ROWS = {
    "warm-up": ("--epochs", "0"),
    "last-block": ("--unfreeze", "last-1", "--layer-decay", "1", "--head-lr", "3e-4"),
    "all": ("--layer-decay", "1", "--head-lr", "3e-4"),
    "differential": ("--layer-decay", "1", "--head-lr", "1e-3"),
    "decay": ("--layer-decay", "0.75", "--head-lr", "1e-3"),
    "augmentation": ("--layer-decay", "0.75", "--head-lr", "1e-3", "--augment", "light"),
    "mixing": (
        "--layer-decay", "0.75", "--head-lr", "1e-3", "--augment", "light", "--mixup", "0.2", "--cutmix", "1",
    ),
}  # fmt: skip
SAID = {
    "warm-up": "warm-up only",
    "last-block": "the last block learns",
    "all": "all blocks, one learning rate",
    "differential": "+ a rate of its own for the head",
    "decay": "+ rates that fall from block to block",
    "augmentation": "+ augmentation",
    "mixing": "+ MixUp and CutMix",
}


def run(row: str, seed: int, arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Return the report of one run, which is made where it is not there yet."""
    folder = Path(arguments.output) / f"{row}-{seed}"
    if not (folder / "report.json").exists():
        command = [
            sys.executable, "-m", "embedkit", "finetune", arguments.images, "-m", arguments.model, "-o", str(folder),
            "--split", arguments.split, "--store", str(store), "--epochs", str(arguments.epochs), *COMMON, *ROWS[row],
            "--seed", str(seed), "--device", arguments.device, *shlex.split(arguments.more),
        ]  # fmt: skip
        print(shlex.join(command[1:]), file=sys.stderr, flush=True)
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode not in (0, 3):
            raise SystemExit(f"{folder}: this run ended in an error")
    values: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return values


def cells(row: str, reports: list[dict[str, Any]]) -> list[str]:
    """Return a line of the table: the mean over the seeds, and the least and the greatest."""
    found = [{change["name"]: change for change in report["comparison"]["changes"]} for report in reports]

    def spread(name: str) -> str:
        values = [changes[name]["after"] for changes in found]
        return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"

    real = sum(changes["classifier"]["real"] and changes["classifier"]["difference"] > 0 for changes in found)
    # Of the epochs: a run that was resumed has them all, and the time of its last part alone.
    minutes = min(sum(epoch["seconds"] for epoch in report["history"]["epochs"]) for report in reports) / 60
    options = shlex.join(ROWS[row])
    measures = [spread(name) for name in ("classifier", "k-NN", "recall@1")]
    return [SAID[row], f"`{options}`", *measures, f"{real} of {len(reports)}", f"{minutes:.1f}"]


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("images", "split", "model", "output"):
        parser.add_argument(name)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--more", default="", help="options for every run")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    store = output / "frozen.h5"
    ek.extract(arguments.images, store, ek.Backbone.load(arguments.model, device=arguments.device))
    header = ["", "options", "top1", "k-NN", "recall@1", "real gain", "least minutes"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in arguments.only.split(","):
        reports = [run(row, int(seed), arguments, store) for seed in arguments.seeds.split(",")]
        if len(lines) == 2:
            frozen = {change["name"]: change["before"] for change in reports[0]["comparison"]["changes"]}
            values = [f"{frozen[name]:.4f}" for name in ("classifier", "k-NN", "recall@1")]
            lines.append("| " + " | ".join(["frozen, linear probe", "", *values, "", ""]) + " |")
        lines.append("| " + " | ".join(cells(row, reports)) + " |")
        (output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
