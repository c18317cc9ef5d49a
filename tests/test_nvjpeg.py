"""JPEGs that a device decodes and resizes. Here the device is a processor, and libjpeg-turbo stands for nvJPEG."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
import torch
from PIL import Image

from embedkit import Backbone, BackboneError, ImageError, Preprocessing
from embedkit.backbones import nvjpeg
from embedkit.backbones.nvjpeg import DeviceDecoder, nvjpeg_decoder, resized
from embedkit.images import DECODERS, read_crop

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def decode(data: torch.Tensor) -> torch.Tensor:
    try:
        pixels = simplejpeg.decode_jpeg(data.numpy().tobytes(), "RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def photograph(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return something with soft and sharp edges, and grain."""
    random = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9) + np.cos(y / 5), np.sin((x + y) / 31), np.cos(x * y / 4000)], axis=2)
    noisy = 128 + 50 * waves + random.normal(0, 8, (height, width, 3))
    noisy[height // 3 : height // 2, width // 4 : width // 2] = 250
    return np.clip(noisy, 0, 255).astype(np.uint8)


def jpeg(pixels: npt.NDArray[np.uint8], **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("mode", nvjpeg.MODES)
@pytest.mark.parametrize(
    ("height", "width"), [(480, 640), (640, 480), (100, 90), (1500, 2000), (2000, 300), (224, 224)]
)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_crop_is_pillows_to_a_level_here_and_there(height: int, width: int, mode: str, crop_mode: str) -> None:
    pixels = Preprocessing(interpolation=mode, crop_mode=crop_mode)
    data = jpeg(photograph(height, width))
    decoder = DeviceDecoder(decode, CPU, mode)
    found = read_crop(data, pixels, resizer=decoder)
    expected = read_crop(data, Preprocessing(interpolation=mode, crop_mode=crop_mode, decoder=DECODERS["exact"]))
    difference = np.abs(found.astype(int) - expected)
    assert found.shape == expected.shape == (224, 224, 3)
    # Pillow takes the columns of the narrowest first.
    assert difference.max() <= 3 and difference.mean() < (0.3 if width == 300 else 0.07)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photograph(300, 500), exif=exif.tobytes())
    found = read_crop(data, Preprocessing(), resizer=DeviceDecoder(decode, CPU, "bicubic"))
    expected = read_crop(data, Preprocessing(decoder=DECODERS["exact"]))
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.001


def test_embeddings_hardly_move(photos: Path, tiny_backbone: Path) -> None:
    backbone = Backbone.load(tiny_backbone, device="cpu", decode="exact")
    decoder = DeviceDecoder(decode, CPU, backbone.preprocessing.interpolation)
    files = sorted(photos.glob("*/*"))
    exact = backbone.embed_pixels([backbone.pixels(path) for path in files])
    ours = backbone.embed_pixels([read_crop(path, backbone.preprocessing, resizer=decoder) for path in files])
    cosine = (exact * ours).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(ours, axis=1)
    assert cosine.min() > 0.9999


def test_what_the_device_will_not_take_goes_the_standard_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def count(data: torch.Tensor) -> torch.Tensor:
        taken.append(len(data))
        return decode(data)

    decoder, plain = DeviceDecoder(count, CPU, "bicubic"), Preprocessing()
    pixels = photograph(300, 400)
    data = jpeg(pixels)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    for other in (png.getvalue(), cmyk.getvalue(), pixels, Image.fromarray(pixels)):
        assert np.array_equal(read_crop(other, plain, resizer=decoder), read_crop(other, plain))
    assert taken == []
    with pytest.raises(ImageError, match=r"a\.jpg: .*truncated"):
        read_crop(data[: len(data) // 2], plain, id="a.jpg", resizer=decoder)
    assert taken == []
    read_crop(data + b"\0" * 20, plain, resizer=decoder)  # As some cameras leave them.
    assert len(taken) == 1
    monkeypatch.setattr(nvjpeg, "MAX_PIXELS", 300 * 400 - 1)
    assert np.array_equal(read_crop(data, plain, resizer=decoder), read_crop(data, plain)) and len(taken) == 1


@pytest.mark.parametrize("error", [RuntimeError("nvjpegDecode failed: 2"), torch.OutOfMemoryError("no memory")])
def test_a_device_that_fails_costs_no_image(error: Exception) -> None:
    def fail(data: torch.Tensor) -> torch.Tensor:
        raise error

    data = jpeg(photograph(300, 400))
    for broken in (fail, lambda data: decode(data)[:, :-1]):  # An error, and other pixels than the header says.
        found = read_crop(data, Preprocessing(), resizer=DeviceDecoder(broken, CPU, "bicubic"))
        assert np.array_equal(found, read_crop(data, Preprocessing()))


def test_threads_share_a_decoder() -> None:
    files = [jpeg(photograph(200 + number, 300)) for number in range(12)]
    decoder, plain = DeviceDecoder(decode, CPU, "bilinear"), Preprocessing(interpolation="bilinear")
    expected = [read_crop(data, plain, resizer=decoder) for data in files]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda data: read_crop(data, plain, resizer=decoder), files))
    assert all(np.array_equal(left, right) for left, right in zip(found, expected, strict=True))


def test_rounding_is_to_the_nearest_and_stays_in_range() -> None:
    checks = torch.zeros((3, 64, 64), dtype=torch.uint8)
    checks[:, 16:48, 16:48] = 255
    found = resized(checks, (150, 150), "bicubic")  # It overshoots at edges.
    assert found.dtype == torch.uint8 and found.min() == 0 and found.max() == 255
    assert resized(checks, (64, 64), "bicubic") is checks


def test_without_a_gpu_it_is_an_error_before_anything_is_computed(tiny_backbone: Path) -> None:
    with pytest.raises(BackboneError, match="--decode gpu needs an NVIDIA GPU, and this backbone is on cpu"):
        Backbone.load(tiny_backbone, device="cpu", decode="gpu")
    with pytest.raises(BackboneError, match="cannot resize lanczos, only bilinear and bicubic"):
        nvjpeg_decoder(torch.device("cuda"), Preprocessing(interpolation="lanczos"))
    if not torch.cuda.is_available():
        with pytest.raises(BackboneError, match=r"--decode gpu.* torchvision.*--decode standard needs nothing"):
            nvjpeg_decoder(torch.device("cuda"), Preprocessing())


@needs_gpu
def test_a_gpu_decodes_as_a_processor_does_but_for_its_colours(photos: Path, tiny_backbone: Path) -> None:
    backbone = Backbone.load(tiny_backbone, device="cuda", decode="gpu")
    plain = Backbone.load(tiny_backbone, device="cuda")
    files = sorted(photos.glob("*/*"))
    found, expected = backbone.embed(files), plain.embed(files)
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.99
    assert backbone.spec.preprocessing.decoder == DECODERS["gpu"] != plain.spec.preprocessing.decoder
