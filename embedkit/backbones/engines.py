"""The ways to run a network. Each returns the same numbers, to rounding; `choosing` finds the fastest that does."""

from __future__ import annotations

import copy
import importlib.util
import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from embedkit.backbones.float32 import whole_float32
from embedkit.backbones.network import Network
from embedkit.backbones.padding import with_fixed_padding
from embedkit.errors import BackboneError

Pixels = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]

log = logging.getLogger("embedkit")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Engine:
    """A way to run a network: a batch of crops goes in, an array for each pooling comes out.

    Attributes
    ----------
    name : str
        One of `ENGINES`.
    network : Network
    run : callable
        Takes uint8 of shape (batch_size, h, w, 3); safe to call from several threads at once.
    batch_size : int
        Images a pass.
    fixed : bool
        Whether every pass must have that many, so that a shorter batch is padded. Otherwise only one image alone is:
        it would go through other routines of the processor's library. So which images share a pass moves no bit.
    """

    name: str
    network: Network
    run: Callable[[Pixels], Sequence[Embeddings]]
    batch_size: int
    fixed: bool = True
    _buffers: threading.local = field(default_factory=threading.local)

    def __call__(self, crops: Sequence[Pixels]) -> list[Embeddings]:
        """Return an array of shape (len(crops), d) for each pooling."""
        found = [self._pass(crops[start : start + self.batch_size]) for start in range(0, len(crops), self.batch_size)]
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _pass(self, crops: Sequence[Pixels]) -> list[Embeddings]:
        shape = (self.batch_size if self.fixed else max(2, len(crops)), *crops[0].shape)
        batch = getattr(self._buffers, "batch", None)
        device = _device(self.network)
        if batch is None or batch.shape != shape:
            # A GPU fetches from pinned memory by itself. It is written again when the embeddings are back, so never
            # while it is being fetched.
            pinned = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
            batch = self._buffers.batch = pinned.numpy()
        np.stack(list(crops), out=batch[: len(crops)])
        with torch.inference_mode(), whole_float32(device):
            return [np.array(found[: len(crops)]) for found in self.run(batch)]


def in_precision(network: Network, precision: str) -> Network:
    """Return the network itself, or a copy that computes in half of the bits."""
    if precision == "fp32":
        return network
    if precision not in network.copies:
        model = copy.deepcopy(network.model).to(DTYPES[precision])
        lower = Network(model, network.preprocessing, network.pools, network.views)
        network.copies[precision] = lower.to(_device(network)).eval()
    return network.copies[precision]


def eager(network: Network, batch_size: int, precision: str = "fp32") -> Engine:
    """Run layer after layer, as PyTorch does by itself."""
    network = in_precision(network, precision)
    return Engine("eager", network, _sparing(network, network), batch_size, fixed=False)


def graph(network: Network, batch_size: int, precision: str = "fp32") -> Engine:
    """Freeze the network into one graph whose convolutions, additions and activations oneDNN fuses; processor only."""
    _require_processor("graph", network)
    network = in_precision(network, precision)
    example = _planes(np.zeros((batch_size, *network.pixels.img_size, 3), dtype=np.uint8), network)
    with _fusing, warnings.catch_warnings(), torch.no_grad():
        fused = torch.jit.onednn_fusion_enabled()  # type: ignore[no-untyped-call]
        warnings.simplefilter("ignore")  # TorchScript is no longer developed; nothing newer is as fast here.
        torch.jit.enable_onednn_fusion(True)
        try:
            fixed = with_fixed_padding(network, example)
            traced = torch.jit.freeze(torch.jit.trace(fixed, example, check_trace=False))  # type: ignore[no-untyped-call]
            for _ in range(2):
                traced(example)  # It is compiled in its first passes.
        finally:
            torch.jit.enable_onednn_fusion(fused)
    return Engine("graph", network, lambda batch: _numpy(traced(_planes(batch, network))), batch_size)


def compiled(network: Network, batch_size: int, precision: str = "fp32") -> Engine:
    """Compile the network to kernels of its own; a GPU records them once and replays them without Python."""
    network = in_precision(network, precision)
    module = torch.compile(network, dynamic=False)
    if _device(network).type == "cuda":
        return Engine("compile", network, _recorded(module, network, batch_size), batch_size)
    return Engine("compile", network, lambda batch: _numpy(module(_planes(batch, network))), batch_size)


def _recorded(
    module: Callable[[torch.Tensor], Sequence[torch.Tensor]], network: Network, batch_size: int
) -> Callable[[Pixels], list[Embeddings]]:
    """Return a runner that replays one recorded pass.

    Recorded here and not by torch.compile's own mode for it, which keeps its recordings for the thread that made them:
    one thread chooses an engine, and others run it.
    """
    device = _device(network)
    with torch.inference_mode(), torch.cuda.device(device), whole_float32(device):
        crops = torch.zeros((batch_size, *network.pixels.img_size, 3), dtype=torch.uint8, device=device)
        crops = crops.permute(0, 3, 1, 2)
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(3):
                module(crops)  # It is compiled, and the libraries settle on their ways.
        main.wait_stream(side)
        recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recording, stream=side, capture_error_mode="thread_local"):
            results = module(crops)
    alone = threading.Lock()

    def run(batch: Pixels) -> list[Embeddings]:
        planes = _planes(batch, network)
        with alone, torch.cuda.device(device):
            crops.copy_(planes)
            recording.replay()
            found = [embeddings.clone() for embeddings in results]  # The next pass writes to the same place.
        return _numpy(found)

    return run


def openvino(network: Network, batch_size: int, precision: str = "fp32", threads: int = 1) -> Engine:
    """Run the network in OpenVINO, one stream for each of `threads`; processor only."""
    _require_processor("openvino", network)
    if importlib.util.find_spec("openvino") is None:
        raise BackboneError("the engine openvino needs a package that is not here: pip install 'embedkit[openvino]'")
    if precision == "fp16":
        raise BackboneError("OpenVINO computes fp16 as bf16 on processors")
    import openvino as ov

    example = torch.zeros((batch_size, *network.pixels.img_size, 3), dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(_ChannelsLast(network), example, check_trace=False)  # type: ignore[no-untyped-call]
        model = ov.convert_model(traced, example_input=example, input=[tuple(example.shape)])
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads, "ENABLE_CPU_PINNING": False,
    }  # fmt: skip
    program = ov.Core().compile_model(model, "CPU", options)
    requests = threading.local()

    def run(batch: Pixels) -> Sequence[Embeddings]:
        if not hasattr(requests, "own"):
            requests.own = program.create_infer_request()
        requests.own.infer([batch], share_inputs=True)
        return [requests.own.get_output_tensor(number).data for number in range(len(network.pools))]

    return Engine("openvino", network, run, batch_size)


ENGINES: dict[str, Callable[..., Engine]] = {
    "eager": eager, "graph": graph, "openvino": openvino, "compile": compiled,
}  # fmt: skip


_fusing = threading.Lock()  # Whether TorchScript fuses is a switch for the whole process.


def _require_processor(name: str, network: Network) -> None:
    if _device(network).type != "cpu":
        raise BackboneError(f"the engine {name} runs on processors only, and this backbone is on {_device(network)}")


class _ChannelsLast(torch.nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, crops: torch.Tensor) -> Any:
        return self.network(crops.permute(0, 3, 1, 2))


def _planes(batch: Pixels, network: Network) -> torch.Tensor:
    """Return crops as the network takes them, (b, 3, h, w), channels last in memory."""
    device = _device(network)
    crops = torch.from_numpy(batch)
    crops = _uploaded(crops, device) if device.type == "cuda" else crops.to(device)
    return crops.permute(0, 3, 1, 2)


def _uploaded(crops: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send crops to a GPU beside what it computes for another thread; what follows there waits for them."""
    if getattr(_uploads, "device", None) != device:
        _uploads.device, _uploads.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    main = torch.cuda.current_stream(device)
    with torch.cuda.stream(_uploads.stream):
        sent = crops.to(device, non_blocking=True)
    main.wait_stream(_uploads.stream)
    sent.record_stream(main)
    return sent


_uploads = threading.local()


def _sparing(module: Callable[[torch.Tensor], Sequence[torch.Tensor]], network: Network) -> Any:
    """Return a runner that halves its batches for good once they do not fit into a GPU's memory."""
    limit: int | None = None

    def attempt(batch: Pixels, step: int) -> list[Embeddings] | None:
        try:
            parts = [_numpy(module(_planes(batch[k : k + step], network))) for k in range(0, len(batch), step)]
        except torch.OutOfMemoryError:
            if step == 1:
                raise
            return None  # Out of here, for the error holds on to all that the pass had allocated.
        return parts[0] if len(parts) == 1 else [np.concatenate(each) for each in zip(*parts, strict=True)]

    def run(batch: Pixels) -> list[Embeddings]:
        nonlocal limit
        while True:
            step = min(limit or len(batch), len(batch))
            found = attempt(batch, step)
            if found is not None:
                return found
            half = step // 2
            limit = min(limit or half, half)  # Two threads may find out at once.
            torch.cuda.empty_cache()
            log.warning("%s images do not fit into the memory of %s; going on with %s", step, _device(network), limit)

    return run


def _device(network: Network) -> torch.device:
    return network.scale.device


def _numpy(found: Sequence[torch.Tensor]) -> list[Embeddings]:
    return [embeddings.cpu().numpy() for embeddings in found]
