"""Time embedkit against the scripts and tools that people use, on the same images, network and processors.

    python benchmarks/extract_speed.py FOLDER [--model mobilenetv2_100 ...] [--rounds 3] [--images 400] [--large 0]

Every method runs in a process of its own, one after the other and round after round (A B C A B C ...). Counted are the
seconds and CPU seconds of the job alone, from the first file to the last written row, with all child processes, and
the peak memory; loading Python and the network is left out for all of them. Peers see `--images` images spread over the
folder, for their rate does not depend on how many there are; embedkit sees the whole folder (or `--own` images), and
pays from it for choosing an engine. Weights are random: speed does not depend on them. A peer whose package is absent
is skipped, and the table says so. The result is written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
# transformers' own networks of the same shape.
HUGGING_FACE = {"mobilenetv2_100": "MobileNetV2", "resnet50": "ResNet", "vit_small_patch16_224": "ViT"}


def torch_parts(model: str) -> tuple[Any, Any, Any]:
    """Return torch, the network without its classifier, and timm's transform for it."""
    import torch

    from embedkit.backbones import import_timm

    timm = import_timm()
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(network)
    return torch, network, timm.data.create_transform(**config, is_training=False)


def naive(model: str, files: list[str], output: Path) -> Callable[[], None]:
    """(a) One image after the other."""
    from PIL import Image

    torch, network, transform = torch_parts(model)

    def job() -> None:
        with torch.inference_mode():
            rows = [network(transform(Image.open(file).convert("RGB")).unsqueeze(0)).numpy() for file in files]
        np.save(output, np.concatenate(rows))

    return job


class Files:
    """A torch data set of image files."""

    def __init__(self, files: list[str], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        from PIL import Image

        return self.transform(Image.open(self.files[number]).convert("RGB"))


def loader(
    model: str, files: list[str], output: Path, *, channels_last: bool = False, kept: bool = False
) -> Callable[[], None]:
    """(b) DataLoader with two workers and timm's transform, as most scripts have it."""
    torch, network, transform = torch_parts(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)

    def job() -> None:
        from contextlib import nullcontext

        from embedkit.backbones.allocator import kept_memory

        with torch.inference_mode(), kept_memory() if kept else nullcontext():
            batches = torch.utils.data.DataLoader(Files(files, transform), batch_size=32, num_workers=2)
            rows = [network(batch.to(memory_format=layout)).numpy() for batch in batches]
        np.save(output, np.concatenate(rows))

    return job


def timm_inference(model: str, files: list[str], output: Path) -> Callable[[], None]:
    """(c) timm's own loader, as its inference.py has it."""
    torch, network, _ = torch_parts(model)
    from embedkit.backbones import import_timm

    timm = import_timm()
    config = timm.data.resolve_model_data_config(network)

    def job() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for number, file in enumerate(files):
                (Path(folder) / f"{number:06}.jpg").symlink_to(file)
            data = timm.data.create_dataset("", root=folder)
            batches = timm.data.create_loader(
                data, batch_size=32, use_prefetcher=False, num_workers=2, device=torch.device("cpu"), **config
            )
            with torch.inference_mode():
                rows = [network(batch).numpy() for batch, _ in batches]
        np.save(output, np.concatenate(rows))

    return job


def thingsvision_like(model: str, files: list[str], output: Path) -> Callable[[], None]:
    """(d) What thingsvision does: no worker processes, a hook on a layer of the whole network. Not its package."""
    torch, _, transform = torch_parts(model)
    from embedkit.backbones import import_timm

    network = import_timm().create_model(model).eval()
    found: list[Any] = []
    pool = getattr(network, "global_pool", None)  # Transformers have a name there.
    layer = pool if isinstance(pool, torch.nn.Module) else network.fc_norm
    layer.register_forward_hook(lambda module, inputs, result: found.append(result.detach().flatten(1)))

    def job() -> None:
        batches = torch.utils.data.DataLoader(Files(files, transform), batch_size=32, num_workers=0)
        rows = []
        with torch.no_grad():
            for batch in batches:
                network(batch)
                rows.append(found.pop().numpy())
        np.save(output, np.concatenate(rows))

    return job


def img2vec(model: str, files: list[str], output: Path) -> Callable[[], None]:
    """(e) img2vec_pytorch with lists of 32; it knows no timm network."""
    if model != "resnet50":
        raise ImportError("img2vec has no such network")
    torch_parts(model)
    import torch
    from img2vec_pytorch import Img2Vec
    from PIL import Image
    from torchvision.models import resnet50
    from torchvision.transforms import v2

    tool = Img2Vec.__new__(Img2Vec)  # Its constructor downloads weights.
    tool.device, tool.layer_output_size, tool.model_name = torch.device("cpu"), 2048, "resnet50"
    tool.model = resnet50().eval()
    tool.extraction_layer = tool.model.avgpool
    steps = [v2.ToImage(), v2.ToDtype(torch.float, scale=True), v2.Resize((224, 224)), v2.Normalize([0.5], [0.5])]
    tool.transforms = v2.Compose(steps)

    def job() -> None:
        rows = []
        for start in range(0, len(files), 32):
            rows.append(tool.get_vec([Image.open(file).convert("RGB") for file in files[start : start + 32]]))
        np.save(output, np.concatenate(rows))

    return job


def hugging_face(model: str, files: list[str], output: Path) -> Callable[[], None]:
    """(f) transformers' pipeline, one image at a time, which is its default and its fastest."""
    torch_parts(model)
    import transformers

    name = HUGGING_FACE[model]
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536} if name == "ViT" else {}
    network = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    processor = transformers.ViTImageProcessor()
    pipe = transformers.pipeline("image-feature-extraction", model=network, image_processor=processor, pool=True)

    def job() -> None:
        np.save(output, np.concatenate([np.array(pipe(file)).reshape(1, -1) for file in files]))

    return job


def embedkit(
    model: str,
    files: list[str],
    output: Path,
    *,
    precision: str = "fp32",
    engine: str = "auto",
    decode: str = "standard",
) -> Callable[[], None]:
    """Embedkit, with a durable store at the end."""
    import torch
    from safetensors.torch import save_file

    import embedkit as ek

    _, network, _ = torch_parts(model)
    weights = output.with_suffix(".safetensors")
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, weights)
    backbone = ek.Backbone.load(weights, arch=model, precision=precision, decode=decode)
    del network, torch

    def job() -> None:
        report = output.with_suffix(".json")
        ek.extract(files, output.with_suffix(".h5"), backbone, engine=engine, report=report)
        found = json.loads(report.read_text())
        print(json.dumps({"engine": found["engine"], **found["measured"]}), file=sys.stderr)

    return job


METHODS: dict[str, Callable[[str, list[str], Path], Callable[[], None]]] = {
    "embedkit": embedkit,
    "embedkit eager": lambda *job: embedkit(*job, engine="eager"),
    "embedkit graph": lambda *job: embedkit(*job, engine="graph"),
    "embedkit fast": lambda *job: embedkit(*job, decode="fast"),
    "embedkit bf16": lambda *job: embedkit(*job, precision="bf16"),
    "a naive": naive,
    "b DataLoader": loader,
    "b channels last": lambda *job: loader(*job, channels_last=True),
    "b kept memory": lambda *job: loader(*job, kept=True),
    "b tuned": lambda *job: loader(*job, channels_last=True, kept=True),
    "c timm": timm_inference,
    "d thingsvision's loop": thingsvision_like,
    "e img2vec": img2vec,
    "f Hugging Face": hugging_face,
}


def run_one(method: str, model: str, files: list[str], output: Path) -> None:
    """Run one job in this process and print what it took."""
    warnings.simplefilter("ignore")
    job = METHODS[method](model, files, output)
    started, cpu = time.perf_counter(), cpu_seconds()
    job()
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak * 1024, "images": len(files)}))


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def measure(method: str, model: str, files: list[str]) -> dict[str, Any] | str:
    """Run one job in a new process, and return what it took or why it could not run."""
    # Threads that spin while they wait would count as work.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "files").write_text("\n".join(files))
        command = [sys.executable, __file__, folder, "--one", method, "--model", model]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:120] if done.stderr.strip() else f"exit {done.returncode}"
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    notes = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"engine"')]
    return {**found, **({"report": notes[-1]} if notes else {})}


def compare(model: str, every: list[str], some: list[str], methods: list[str], rounds: int) -> dict[str, Any]:
    """Run the methods in turn and return what each took in every round."""
    taken: dict[str, Any] = {method: [] for method in methods}
    for number in range(rounds):
        for method in methods:
            if isinstance(taken[method], str):
                continue
            found = measure(method, model, every if method.startswith("embedkit") else some)
            if isinstance(found, str):
                taken[method] = found
                print(f"{model:24} {method:24} skipped: {found}", flush=True)
                continue
            taken[method].append(found)
            rates = found["images"] / found["seconds"], found["images"] / found["cpu_seconds"]
            engine = found.get("report", {}).get("engine", "")
            peak = f"{found['peak_bytes'] / 1e9:5.2f} GB"
            line = f"{rates[0]:8.1f} images/s {rates[1]:8.1f} a CPU second {peak} {engine}"
            print(f"{model:24} {method:24} round {number} {line}", flush=True)
    return taken


def table(model: str, taken: dict[str, Any]) -> str:
    """Return the ratios of embedkit to every peer, in CPU seconds and in seconds an image, as a markdown table."""

    def cost(run: dict[str, Any], what: str) -> float:
        return float(run[what] / run["images"])

    lines = [
        f"## {model}", "",
        "| method | images/s | images a CPU second | peak | CPU ratio to embedkit (each round) | time ratio |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    ours = taken["embedkit"]
    for method, runs in taken.items():
        if isinstance(runs, str):
            lines.append(f"| {method} | skipped: {runs} | | | | |")
            continue
        pairs = list(zip(runs, ours, strict=False))
        cpu = [cost(run, "cpu_seconds") / cost(own, "cpu_seconds") for run, own in pairs]
        wall = [cost(run, "seconds") / cost(own, "seconds") for run, own in pairs]
        rate = statistics.median(1 / cost(run, "seconds") for run in runs)
        rate_cpu = statistics.median(1 / cost(run, "cpu_seconds") for run in runs)
        peak = max(run["peak_bytes"] for run in runs) / 1e9
        spread = ", ".join(f"{value:.2f}" for value in cpu)
        lines.append(
            f"| {method} | {rate:.1f} | {rate_cpu:.1f} | {peak:.2f} GB | **{statistics.median(cpu):.2f}** ({spread}) | "
            f"{statistics.median(wall):.2f} |"
        )
    return "\n".join(lines) + "\n"


def large_photographs(files: list[str], count: int, folder: Path) -> list[str]:
    """Make 12-megapixel JPEGs out of small ones: mosaics with a sensor's noise, which a plain enlargement lacks."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        path = folder / f"{number:04}.jpg"
        made.append(str(path))
        if path.exists():
            continue
        random = np.random.default_rng(number)
        canvas = Image.new("RGB", (4000, 3000))
        for cell in range(12):
            tile = Image.open(files[(number * 12 + cell) % len(files)]).convert("RGB").resize((1000, 1000))
            canvas.paste(tile, (cell % 4 * 1000, cell // 4 * 1000))
        noise = random.normal(0, 4, (3000, 4000, 1)).astype(np.float32)
        pixels = np.clip(np.asarray(canvas, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    return made


def main() -> None:
    """Compare on the models asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", nargs="+", default=["mobilenetv2_100", "resnet50", "vit_small_patch16_224"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=400, help="for the peers")
    parser.add_argument("--own", type=int, help="for embedkit; by default all of the folder")
    parser.add_argument("--large", type=int, default=0, help="make this many 12-megapixel photographs and use those")
    parser.add_argument("--name", default="extract_speed", help="of the files in benchmarks/results/")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        files = (arguments.folder / "files").read_text().splitlines()
        run_one(arguments.one, arguments.model[0], files, arguments.folder / "out.npy")
        return
    every = sorted(
        str(path.resolve()) for path in arguments.folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
    )
    if arguments.large:
        every = large_photographs(every, arguments.large, Path(tempfile.gettempdir()) / "embedkit-12mp")
    every = every[:: max(1, len(every) // (arguments.own or len(every)))][: arguments.own]
    some = every[:: max(1, len(every) // arguments.images)][: arguments.images]
    machine = (
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} processors, {platform.system()}"
    )
    kind = "12-megapixel photographs" if arguments.large else f"images of {arguments.folder.name}"
    text = [f"# embedkit and its peers\n\n{machine}; {len(every):,} {kind}, {len(some):,} for the peers\n"]
    results: dict[str, Any] = {"machine": machine, "images": len(every), "models": {}}
    for model in arguments.model:
        results["models"][model] = compare(model, every, some, arguments.methods, arguments.rounds)
        text.append(table(model, results["models"][model]))
        print(text[-1], flush=True)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / f"{arguments.name}.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
