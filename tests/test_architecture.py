"""The plan of the house, kept by reading the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import embedkit

PACKAGE = Path(embedkit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import the rooms in its row, and nothing else of embedkit's.
MAY_IMPORT = {
    "errors": set(),
    "text": set(),
    "machine": set(),
    "spec": {"errors"},
    "images": {"errors", "spec"},
    "sources": {"errors", "text", "images"},
    "backbones": {"errors", "spec", "images"},
    "store": {"errors", "spec"},
    "extraction": {"errors", "spec", "text", "images", "sources", "backbones", "store"},
    "index": {"errors", "spec", "text", "images", "sources", "backbones", "store"},
    "heads": {"errors", "machine", "spec", "store", "index"},
    "evaluation": {
        "errors", "spec", "text", "images", "sources", "backbones", "store", "extraction", "index", "heads", "machine",
    },
    "diagnosis": {
        "errors", "spec", "images", "sources", "backbones", "store", "extraction", "index", "heads", "machine",
    },
    "finetuning": {
        "errors", "spec", "text", "images", "sources", "backbones", "store", "extraction", "index", "heads",
        "evaluation", "machine",
    },
    "cli": {
        "errors", "spec", "text", "images", "sources", "backbones", "store", "extraction", "index", "heads",
        "evaluation", "finetuning", "diagnosis",
    },
}  # fmt: skip
ONLY_USER = {
    "PIL": "images",
    "simplejpeg": "images",
    "pillow_heif": "images",
    "pillow_jxl": "images",
    "openvino": "backbones",
    "timm": "backbones and finetuning",
    "torchvision": "backbones and finetuning",
    "h5py": "store",
    "faiss": "index",
    "sklearn": "heads",
    "pyarrow": "store and sources",
    "pandas": "store and index",
    "lance": "store",
    "aiohttp": "sources",
    "av": "sources",
    "datasets": "sources",
    "fsspec": "sources",
    "peft": "finetuning",
    "pytorch_metric_learning": "finetuning",
    "threadpoolctl": "diagnosis",
    "click": "cli",
    "tqdm": "cli",
    "yaml": "evaluation and finetuning",
}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from names if node.module == "embedkit" else iter([node.module or ""])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way_and_each_library_has_one_user(file: Path) -> None:
    room = room_of(file)
    for name in imports_of(file):
        top, _, rest = name.partition(".")
        if top in ONLY_USER:
            assert room in ONLY_USER[top].split(" and "), f"{file} imports {name}, which belongs to {ONLY_USER[top]}/"
        used = rest.partition(".")[0]
        if top == "embedkit" and room not in ("__init__", "__main__", used) and used != "__version__":
            assert used in MAY_IMPORT[room], f"{file} imports {name}"


def test_every_room_is_in_the_plan() -> None:
    assert {room_of(file) for file in FILES} - {"__init__", "__main__"} == MAY_IMPORT.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_file_holds_one_idea(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 450
    assert file.stem not in ("utils", "helpers", "common", "misc")
    assert file.stem not in embedkit.__all__
