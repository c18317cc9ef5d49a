"""Times an epoch of fine-tuning beside its peers, in one run, each in a process of its own.

    python benchmarks/finetune_speed.py IMAGES WEIGHTS.json [--images 192] [--rounds 3] [--batch-size 32]
        [--train-norm] [--spin] [--peers plain,timm,timm-nhwc] [--markdown FILE]

IMAGES is a folder of classes, WEIGHTS a sidecar as `embedkit.Backbone.load` takes it. The sides train the same network
from the same weights on the same files, in batches of one size, with RandomResizedCrop and mirror images,
cross-entropy, and AdamW for all weights:

- embedkit: `embedkit.finetuning.training.loop.train`, as `embedkit finetune` runs it;
- plain: torchvision's ImageFolder and transforms, a DataLoader with a worker for each processor, and the loop of every
  tutorial;
- timm: what timm's train.py does: its dataset, its loader with the prefetcher, its optimiser and its step;
- timm-nhwc: the same with ``--channels-last``.

The statistics of batch normalisation are frozen on every side, or learn on every side with ``--train-norm``. Each
round runs every side in turn; an epoch to warm up comes before the one that is timed. Ratios are taken within a round,
so that what else a machine does weighs on all sides alike; on a busy one the processor's seconds say more than the
clock. Threads that wait do not spin, on any side, unless ``--spin`` is given: beside other work it would cost
those most that wait most.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SCALE, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)
RATE, DECAY = 1e-4, 0.05
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
EPOCHS = 2  # The first one warms up.


def take_images(source: Path, target: Path, count: int) -> int:
    """Copy so many images, of each class alike, into a folder of classes; return how many there are."""
    folders = sorted(folder for folder in source.iterdir() if folder.is_dir())
    taken = 0
    for folder in folders:
        (target / folder.name).mkdir()
        for file in sorted(folder.glob("*.jpg"))[: count // len(folders)]:
            shutil.copyfile(file, target / folder.name / file.name)
            taken += 1
    return taken


def processor_seconds() -> float:
    """Return the processor's seconds of this process and of its workers that still run."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def embedkit(images: Path, weights: Path, options: argparse.Namespace) -> dict[str, float]:
    import numpy as np

    from embedkit import Backbone
    from embedkit.finetuning.blocks import blocks_of
    from embedkit.finetuning.feeding.augmentation import Augmentation
    from embedkit.finetuning.feeding.feed import Feed
    from embedkit.finetuning.recipe import Recipe
    from embedkit.finetuning.trainee import make_trainee
    from embedkit.finetuning.training.loop import train
    from embedkit.finetuning.training.losses import make_criterion
    from embedkit.sources import list_images

    listing = list_images(images)
    codes = np.array([listing.classes.index(str(file.label)) for file in listing.files])
    backbone = Backbone.load(weights, device=options.device)
    recipe = Recipe(
        epochs=EPOCHS, batch_size=options.batch_size, opt="adamw", body_lr=RATE, head_lr=RATE, layer_decay=1.0,
        weight_decay=DECAY, sched="constant", warmup_epochs=0, clip_grad=0, freeze_norm=not options.train_norm,
        augmentation=Augmentation(crop_scale=SCALE, crop_ratio=RATIO, hflip=0.5),
    )  # fmt: skip
    trainee = make_trainee(backbone, len(listing.classes), recipe)
    feed = Feed(listing.files, codes, backbone.preprocessing, recipe)
    used: list[float] = []

    def note(trainee: nn.Module) -> dict[str, float]:
        used.append(processor_seconds())
        return {"top1": 0.0}

    with tempfile.TemporaryDirectory() as folder:
        criterion = make_criterion(recipe, len(listing.classes), backbone.dim)
        history = train(
            trainee, feed, recipe, folder, blocks=blocks_of(trainee), criterion=criterion, validate=note, identity={}
        )
    return {"seconds": history.epochs[-1].seconds, "processor": used[-1] - used[-2]}


def network_of(weights: Path, classes: int, options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that all sides train, with a new classifier, and its preprocessing as timm says it."""
    from embedkit.backbones import import_timm

    timm = import_timm()
    facts = json.loads(weights.read_text())
    config = facts["pretrained_cfg"] | {
        "file": str(weights.with_suffix(".safetensors")),
        "hf_hub_id": None,
        "url": None,
    }
    config["input_size"] = tuple(config["input_size"])
    name = facts["timm_architecture"]
    model = timm.create_model(
        name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=config, **facts.get("timm_kwargs", {})
    )
    return model.to(options.device), timm.data.resolve_model_data_config(model)


def loop(
    model: nn.Module, optimiser: Any, loader: Iterable[tuple[Tensor, Tensor]], options: argparse.Namespace
) -> dict[str, float]:
    """Train for some epochs as every tutorial does, and return what the last one took."""
    loss_function = nn.CrossEntropyLoss().to(options.device)
    seconds, used = 0.0, 0.0
    for _ in range(EPOCHS):
        model.train()
        if not options.train_norm:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        seconds, used = -time.perf_counter(), -processor_seconds()
        for pixels, codes in loader:
            pixels, codes = pixels.to(options.device, non_blocking=True), codes.to(options.device, non_blocking=True)
            if options.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            loss = loss_function(model(pixels), codes)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        seconds, used = seconds + time.perf_counter(), used + processor_seconds()
    return {"seconds": seconds, "processor": used}


def plain(images: Path, weights: Path, options: argparse.Namespace) -> dict[str, float]:
    from embedkit.backbones import import_timm, usable_processors

    import_timm()  # It makes torchvision importable beside any torch.
    from torchvision import datasets, transforms

    model, config = network_of(weights, len(list(images.iterdir())), options)
    transform = transforms.Compose([
        transforms.RandomResizedCrop(config["input_size"][1:], SCALE, RATIO),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"]),
    ])  # fmt: skip
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(images), transform), options.batch_size, shuffle=True,
        num_workers=usable_processors(), persistent_workers=True, pin_memory=options.device != "cpu",
    )  # fmt: skip
    options.channels_last = False
    return loop(model, torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY), loader, options)


def timms(images: Path, weights: Path, options: argparse.Namespace, *, channels_last: bool) -> dict[str, float]:
    from embedkit.backbones import import_timm, usable_processors

    timm = import_timm()
    model, config = network_of(weights, len(list(images.iterdir())), options)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    options.channels_last = channels_last
    dataset = timm.data.create_dataset("", root=str(images), split="train", is_training=True)
    loader = timm.data.create_loader(
        dataset, input_size=config["input_size"], batch_size=options.batch_size, is_training=True, scale=SCALE,
        ratio=RATIO, hflip=0.5, color_jitter=None, interpolation=config["interpolation"], mean=config["mean"],
        std=config["std"], num_workers=usable_processors(), device=torch.device(options.device),
        pin_memory=options.device != "cpu",
    )  # fmt: skip
    import timm.optim

    optimiser = timm.optim.create_optimizer_v2(model, opt="adamw", lr=RATE, weight_decay=DECAY)
    found = loop(model, optimiser, loader, options)
    # Its training loader leaves out the last images that fill no batch.
    return found | {"images": len(loader) * options.batch_size}


SIDES: dict[str, Callable[..., dict[str, float]]] = {
    "embedkit": embedkit,
    "plain": plain,
    "timm": lambda *arguments: timms(*arguments, channels_last=False),
    "timm-nhwc": lambda *arguments: timms(*arguments, channels_last=True),
}


def report(rounds: list[dict[str, dict[str, float]]], options: argparse.Namespace, load: float) -> str:
    """Return what was measured as Markdown."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    norms = "learn" if options.train_norm else "are frozen"
    lines = [
        f"`{options.weights.stem}`, {options.images} images, batches of {options.batch_size}, statistics of batch "
        f"normalisation {norms}; {options.device}, {processors} processors, {torch.get_num_threads()} threads, PyTorch "
        f"{torch.__version__}, {platform.machine()}; load {load:.1f}; median of {len(rounds)} rounds, ratios within "
        "a round.",
        "",
        "| side | images/s | embedkit is faster by | processor ms an image | embedkit needs less by |",
        "|---|---|---|---|---|",
    ]
    for side in rounds[0]:
        speeds, costs = ([each[side][kind] for each in rounds] for kind in ("speed", "cost"))
        ratios = [each["embedkit"]["speed"] / each[side]["speed"] for each in rounds]
        shares = [each[side]["cost"] / each["embedkit"]["cost"] for each in rounds]
        lines.append(
            f"| {side} | {statistics.median(speeds):.1f} | {spread(ratios)} | {statistics.median(costs):.1f} | "
            f"{spread(shares)} |"
        )
    return "\n".join(lines)


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--train-norm", action="store_true")
    parser.add_argument("--spin", action="store_true", help="let threads that wait spin, as they do by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", default="plain,timm,timm-nhwc")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](options.source, options.weights, options)))
        return
    load, rounds = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder:
        options.images = take_images(options.source, Path(folder), options.images)
        for number in range(options.rounds):
            found = {}
            for side in ["embedkit", *filter(None, options.peers.split(","))]:
                command = [sys.executable, __file__, folder, str(options.weights), "--side", side, "--device"]
                command += [options.device, "--batch-size", str(options.batch_size)]
                command += ["--train-norm"] if options.train_norm else []
                environment = os.environ | ({} if options.spin else QUIET)
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                told = json.loads(done.stdout)
                images = told.get("images", options.images)
                found[side] = {"speed": images / told["seconds"], "cost": 1000 * told["processor"] / images}
                print(f"round {number + 1}: {side:10} {found[side]['speed']:7.1f} images/s, "
                      f"{found[side]['cost']:6.1f} processor ms an image", file=sys.stderr)  # fmt: skip
            rounds.append(found)
    text = report(rounds, options, load)
    print(text)
    if options.markdown:
        options.markdown.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
