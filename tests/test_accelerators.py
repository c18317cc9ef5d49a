"""What GPUs run, as far as a processor can run it too."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedkit import Backbone, ImageError, Preprocessing
from embedkit.backbones import ENGINES, Steps, import_timm, in_batches, stream
from embedkit.backbones.choosing import choose
from embedkit.backbones.engines import _sparing, eager
from embedkit.backbones.float32 import whole_float32
from embedkit.backbones.network import Network


def network(name: str = "test_resnet", size: int = 64, pools: tuple[str, ...] = ("default", "layer2:avg")) -> Network:
    torch.manual_seed(0)
    model = import_timm().create_model(name, num_classes=0).eval().requires_grad_(False)
    return Network(model, Preprocessing(img_size=(size, size)), pools).eval()


def crops(count: int, size: int = 64) -> list[npt.NDArray[np.uint8]]:
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


class Small:
    """A network on a device whose memory holds so many images."""

    def __init__(self, network: Network, most: int) -> None:
        self.network, self.most, self.sizes = network, most, []  # type: ignore[var-annotated]

    def __call__(self, planes: torch.Tensor) -> Sequence[torch.Tensor]:
        self.sizes.append(len(planes))
        if len(planes) > self.most:
            raise torch.OutOfMemoryError(f"{len(planes)} images")
        found: Sequence[torch.Tensor] = self.network(planes)
        return found


def test_a_batch_that_does_not_fit_is_halved_for_good(caplog: pytest.LogCaptureFixture) -> None:
    net, images = network(), np.stack(crops(22))
    small = Small(net, 6)
    run = _sparing(small, net)
    with torch.inference_mode():
        for _ in range(2):
            for found, expected in zip(run(images), eager(net, 22)(list(images)), strict=True):
                np.testing.assert_allclose(found, expected, atol=1e-5)
    assert small.sizes == [22, 11, 5, 5, 5, 5, 2, 5, 5, 5, 5, 2]
    assert "22 images do not fit into the memory of cpu; going on with 11" in caplog.text
    assert "11 images do not fit" in caplog.text and caplog.text.count("do not fit") == 2
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError, match="1 images"):
        _sparing(Small(net, 0), net)(images)


def test_nothing_of_a_pass_that_did_not_fit_is_held_when_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    held: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(Activations.alive > 0))

    class Activations:
        alive = 0

        def __init__(self) -> None:
            Activations.alive += 1

        def __del__(self) -> None:
            Activations.alive -= 1

    def run(planes: torch.Tensor) -> Sequence[torch.Tensor]:
        held.append(Activations.alive > 0)
        activations = Activations()
        if len(planes) > 2:
            raise torch.OutOfMemoryError("no")
        found: Sequence[torch.Tensor] = net(planes)
        del activations
        return found

    with torch.inference_mode():
        _sparing(run, net)(np.stack(crops(8)))
    assert held == [False] * len(held) and len(held) == 8


def test_decoders_that_feed_return_what_workers_return(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "cat", tmp_path / "images")
    for name in ("0.jpg", "5x.jpg"):
        (tmp_path / "images" / name).write_text("no image")
    files = sorted((tmp_path / "images").glob("*")) + sorted((photos / "dog").glob("*")) * 5
    backbone = Backbone.load(tiny_backbone, device="cpu")
    steps = Steps(
        lambda path: path.read_bytes(), lambda data, path: backbone.pixels(data, id=path.name), backbone.embed_pixels
    )
    threads = torch.get_num_threads()

    def run(accelerator: bool) -> list[tuple[list[Path], npt.NDArray[np.float32], list[str]]]:
        batches = stream(in_batches(files, 20), steps, workers=3, accelerator=accelerator)
        return [(b.items, b.embeddings, [str(error) for _, error in b.failures]) for b in batches]

    for fed, worked in zip(run(True), run(False), strict=True):
        assert fed[0] == worked[0] and fed[2] == worked[2]
        assert np.array_equal(fed[1], worked[1])
    assert torch.get_num_threads() == threads


def test_decoders_use_one_thread_each_and_an_error_ends_all_of_them() -> None:
    counts: set[int] = set()

    def decode(data: object, item: int) -> npt.NDArray[np.uint8]:
        counts.add(torch.get_num_threads())
        if item == 13:
            raise ImageError("13", "unlucky")
        if item == 77:
            raise MemoryError("a bug, or no memory")
        return np.zeros((2, 2, 3), dtype=np.uint8)

    steps = Steps(lambda item: item, decode, len)
    seen = []
    with pytest.raises(MemoryError):
        for batch in stream(in_batches(range(200), 20), steps, workers=4, accelerator=True):
            seen.append((len(batch.items), len(batch.failures), batch.embeddings))
    assert seen == [(19, 1, 19), (20, 0, 20), (20, 0, 20)] and counts == {1}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embedkit-")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of a part of itself.
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_returns_the_numbers_of_eager_in_every_thread() -> None:
    net, images = network(), crops(11)
    expected = eager(net, 4)(images)
    choice = choose(net, images, 1, engine="compile", batch_size=4)
    assert choice.engine.name == "compile" and choice.trial.min_cosine > 0.99999
    with ThreadPoolExecutor(2) as pool:  # Others than the one that compiled it.
        for found in pool.map(choice.engine, [images, images]):
            for left, right in zip(found, expected, strict=True):
                np.testing.assert_allclose(left, right, atol=1e-5 * np.abs(right).max())
    choose(net, images, 1, engine="eager", batch_size=4)
    assert any(key[0] == "compile" for key in net.engines)


def test_without_images_a_named_engine_is_built_and_not_tried() -> None:
    choice = choose(network(), [], 1, engine="graph", batch_size=4)
    assert choice.engine.name == choice.trial.engine == "graph" and choice.trial.seconds == 0
    assert len(choice.engine(crops(5))[0]) == 5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_pixels_and_weights_stay_channels_last(tiny_backbone: Path, precision: str) -> None:
    backbone = Backbone.load(tiny_backbone, device="cpu", precision=precision)
    engine = backbone._passes.eager(["default"])
    layouts: list[bool] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        assert inputs[0].dtype == next(module.parameters()).dtype

    convolutions = [
        module
        for module in engine.network.model.modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1) and module.in_channels > 1
    ]
    for convolution in convolutions:
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
        convolution.register_forward_pre_hook(look)
    engine(crops(4))
    assert layouts and all(layouts)


def test_float32_is_whole_while_anybody_computes_on_a_gpu() -> None:
    cudnn, cuda = torch.backends.cudnn, torch.device("cuda")
    before = cudnn.allow_tf32
    with whole_float32(torch.device("cpu")):
        assert cudnn.allow_tf32 == before
    left, entered = threading.Event(), threading.Event()

    def other() -> None:
        with whole_float32(cuda):
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with whole_float32(cuda):
        thread.start()
        entered.wait()
        assert not cudnn.allow_tf32
    assert not cudnn.allow_tf32
    left.set()
    thread.join()
    assert cudnn.allow_tf32 == before
    assert set(ENGINES) == {"eager", "graph", "openvino", "compile"}
