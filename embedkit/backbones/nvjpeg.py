"""JPEGs decoded and resized on a GPU, by nvJPEG through torchvision.

The small picture comes back to the processor, so the pipeline is the same with and without it: cropping, batching and
sending cost what they always do. That takes 260 kB there and 150 kB back for each image, a hundredth of what PCI
Express carries at ten thousand images a second, while the twelve million pixels of a photograph never cross it.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedkit.backbones.timm_import import import_timm
from embedkit.errors import BackboneError
from embedkit.images import read_image, thumbnail
from embedkit.spec import Preprocessing

MODES = ("bilinear", "bicubic")
MAX_PIXELS = 64_000_000  # Larger ones take a gigabyte on the GPU, which has better to do with it.
_AT_A_TIME = 2  # Images on the GPU, whatever the number of workers; the decoder takes one at a time anyway.
_END, _TAIL = b"\xff\xd9", 64  # A whole JPEG ends with this, but for a few bytes that cameras leave behind it.


class DeviceDecoder:
    """Decodes JPEGs and resizes them on a device.

    Parameters
    ----------
    decode : callable
        Takes the bytes of a JPEG as a tensor of uint8 and returns its pixels on the device, of shape (3, h, w), or
        raises RuntimeError.
    device : torch.device
    mode : str
        One of `MODES`.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], device: torch.device, mode: str) -> None:
        self.decode, self.device, self.mode = decode, device, mode
        self._turn = threading.BoundedSemaphore(_AT_A_TIME)
        self._streams = threading.local()

    def __call__(
        self, data: bytes, shape: tuple[int, int], size: tuple[int, int], lying: bool
    ) -> npt.NDArray[np.uint8] | None:
        """Return a JPEG resized to height and width `size`; None when the processor has to judge the file.

        `shape` is what its header says; both are as the pixels lie in the file, which may be on their side.
        """
        if shape[0] * shape[1] > MAX_PIXELS or data.rfind(_END, max(0, len(data) - _TAIL)) < 0:
            return None  # nvJPEG fills what is missing of a truncated file with grey, and says nothing.
        try:
            with self._turn, torch.inference_mode(), self._aside():
                pixels = self.decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
                if tuple(pixels.shape) != (3, *shape):
                    return None
                return np.ascontiguousarray(resized(pixels, size, self.mode, lying).permute(1, 2, 0).cpu().numpy())
        except RuntimeError:  # Of a kind that nvJPEG does not know, or no memory is left.
            return None

    def _aside(self) -> Any:
        """Have a thread use a stream of its own.

        torchvision writes pixels to fresh memory without asking what still reads it. On the network's own stream that
        may be what the network has let go of and has not finished with. Memory belongs to the stream that it was taken
        on, and here nothing is let go of before the picture is back.
        """
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._streams.own)


def resized(pixels: Tensor, size: tuple[int, int], mode: str, lying: bool = False) -> Tensor:
    """Return pixels (3, h, w) of uint8 resized with an antialiasing filter: each row, then each column, as by Pillow.

    When they lie on their side, their columns are the rows. Of some tall images Pillow takes the columns first; there a
    grey level differs here and there.
    """
    height, width = (int(side) for side in pixels.shape[1:])
    for step in ((size[0], width) if lying else (height, size[1]), size):
        if tuple(pixels.shape[1:]) != step:
            smooth = torch.nn.functional.interpolate(pixels[None].float(), size=step, mode=mode, antialias=True)
            pixels = smooth[0].round_().clamp_(0, 255).to(torch.uint8)
    return pixels


def nvjpeg_decoder(device: torch.device, preprocessing: Preprocessing) -> DeviceDecoder:
    """Return the decoder of a GPU, once it has decoded a picture.

    Raises
    ------
    BackboneError
        When there is no such GPU, torchvision's decoder does not load, or it cannot resize in this way.
    """
    instead = "; --decode standard needs nothing of the kind"
    if device.type != "cuda":
        raise BackboneError(f"--decode gpu needs an NVIDIA GPU, and this backbone is on {device}{instead}")
    if preprocessing.interpolation not in MODES:
        raise BackboneError(
            f"--decode gpu cannot resize {preprocessing.interpolation}, only {' and '.join(MODES)}{instead}"
        )
    import_timm()  # Makes torchvision importable.
    try:
        decode_jpeg = importlib.import_module("torchvision.io").decode_jpeg
    except (ImportError, RuntimeError, AttributeError) as error:
        raise BackboneError(
            f"--decode gpu needs torchvision's JPEG decoder, which cannot be had: {error}{instead}"
        ) from error
    decoder = DeviceDecoder(
        lambda data: decode_jpeg(data, mode="RGB", device=str(device)), device, preprocessing.interpolation
    )
    sample = thumbnail(read_image(np.full((32, 48, 3), 128, dtype=np.uint8)), 48)
    try:
        with torch.inference_mode():
            decoder.decode(torch.frombuffer(bytearray(sample), dtype=torch.uint8)).cpu()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(f"--decode gpu: torchvision cannot decode on {device}: {reason}{instead}") from error
    return decoder
