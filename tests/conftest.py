"""Fixtures: real data where it is at hand, small worlds of our own where it is not."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before anything imports the hub client: tests reach no network and see no cache but their own.
_HUB = tempfile.TemporaryDirectory()
os.environ.update(HF_HOME=_HUB.name, HF_HUB_OFFLINE="1")

HUB_MODEL = "mobilenetv3_small_050.lamb_in1k"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights, from $EMBEDKIT_DATA or beside the checkout."""
    named = os.environ.get("EMBEDKIT_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is absent: {folder} does not exist (set EMBEDKIT_DATA)")
    return folder


@pytest.fixture(scope="session")
def flowers(shared_data: Path) -> Path:
    """3,670 photographs in five classes."""
    return shared_data / "flowers"


@pytest.fixture(scope="session")
def weights(shared_data: Path) -> Path:
    """Five real ImageNet backbones with JSON sidecars."""
    return shared_data / "weights"


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON sidecar of a small network with random weights."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.json", seed=0)


@pytest.fixture(scope="session")
def other_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON sidecar of the same small network with other random weights."""
    return write_backbone(tmp_path_factory.mktemp("other") / "other.json", seed=1)


def write_backbone(path: Path, seed: int) -> Path:
    """Write a small network with random weights, and the JSON sidecar that says how it is used."""
    import torch
    from safetensors.torch import save_file

    from embedkit.backbones import import_timm

    torch.manual_seed(seed)
    model = import_timm().create_model("test_resnet", num_classes=10)
    save_file(model.state_dict(), path.with_suffix(".safetensors"))
    config = {
        "input_size": [3, 64, 64], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear",
        "crop_pct": 0.9, "crop_mode": "center", "num_classes": 10,
    }  # fmt: skip
    path.write_text(json.dumps({"timm_architecture": "test_resnet", "pretrained_cfg": config}))
    return path


@pytest.fixture(scope="session")
def hub_cache() -> str:
    """A timm name whose (random) weights lie in the hub client's local cache."""
    import torch
    from safetensors.torch import save_file

    from embedkit.backbones import import_timm

    repository = Path(_HUB.name, "hub", f"models--timm--{HUB_MODEL}")
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(0)
    save_file(import_timm().create_model(HUB_MODEL.partition(".")[0]).state_dict(), snapshot / "model.safetensors")
    return HUB_MODEL


def write_photos(folder: Path, per_class: int = 12) -> Path:
    """Write noisy reddish cats and bluish dogs, so that any network tells them apart."""
    random = np.random.default_rng(0)
    for name, channel in (("cat", 0), ("dog", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(1, per_class + 1):
            pixels = random.integers(0, 60, (72, 96, 3), dtype=np.uint8)
            pixels[..., channel] += np.uint8(150)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 readable pictures in two classes. Not to be changed."""
    return write_photos(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture
def readme_world(tmp_path: Path, hub_cache: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the README's snippets assume, made the working folder."""
    photos = write_photos(tmp_path / "photos")
    (tmp_path / "query.jpg").write_bytes((photos / "cat" / "1.jpg").read_bytes())
    rows = [f"{kind}/{n}.jpg,{'train' if n <= 8 else 'test'}" for kind in ("cat", "dog") for n in range(1, 13)]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An environment whose Pythons refuse sockets of the internet, with an empty cache of the hub."""
    code = (
        "import socket\n"
        "class Refused(socket.socket):\n"
        "    def __init__(self, family=socket.AF_INET, *arguments, **options):\n"
        "        if family in (-1, socket.AF_INET, socket.AF_INET6):\n"
        "            raise RuntimeError('this test allows no network')\n"
        "        super().__init__(family, *arguments, **options)\n"
        "def refused(*arguments, **options):\n"
        "    raise RuntimeError('this test allows no network')\n"
        "socket.socket, socket.getaddrinfo, socket.create_connection = Refused, refused, refused\n"
    )
    (tmp_path / "refusing").mkdir()
    (tmp_path / "refusing" / "sitecustomize.py").write_text(code)
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**others, "PYTHONPATH": str(tmp_path / "refusing"), "HF_HOME": str(tmp_path / "hub")}
