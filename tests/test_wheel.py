"""What is built, and whether it works where only it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOX = "embedkit/backbones/nano"


def run(*arguments: str | os.PathLike[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    for package in ("build", "hatchling"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed, and without it nothing is built here (it is in the extra dev)")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    return folder


def test_wheel_and_source_hold_the_backbone_in_the_box_and_the_licences(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in ("model.safetensors", "backbone.json", "LICENSE"):
            assert archive.read(f"{BOX}/{name}") == (ROOT / BOX / name).read_bytes()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith(f".dist-info/licenses/{BOX}/LICENSE") for name in names)
    assert not any(name.endswith((".h5", ".jpg", ".png")) for name in names)
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"{BOX}/model.safetensors", f"{BOX}/backbone.json", f"{BOX}/LICENSE", "configs/nano.yaml"} <= inside


def test_a_fresh_environment_extracts_with_the_network_blocked(
    built: Path, photos: Path, offline: dict[str, str], tmp_path: Path
) -> None:
    # The dependencies are those of this environment, seen through a path file: two gigabytes less to load.
    place = tmp_path / "fresh"
    venv.create(place, with_pip=False, symlinks=os.name != "nt")
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    variables = {"base": str(place), "platbase": str(place)}
    packages = Path(sysconfig.get_path("purelib", scheme="venv", vars=variables))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    run(
        sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps", "--no-index", "--quiet",
        "--disable-pip-version-check", "--ignore-installed", wheel, folder=tmp_path,
    )  # fmt: skip
    where = run(
        programs / "python", "-c", "import embedkit; print(embedkit.__file__)", folder=tmp_path, environment=offline
    )
    assert Path(where.strip()).is_relative_to(packages)
    said = run(programs / "embedkit", "extract", photos, "-o", "photos.h5", folder=tmp_path, environment=offline)
    assert "24 images" in said and "2 classes, 0 failed" in said
