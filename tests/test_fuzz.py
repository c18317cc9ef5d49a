"""A few hundred of the mutants that benchmarks/fuzz.py reads by the ten thousand."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from embedkit import ImageError, Preprocessing
from embedkit.errors import FAILURE_KINDS
from embedkit.images import DECODERS, read_crop

# Plugins warn of what they find in damaged files; embedkit's own filter for them is not seen by pytest.
pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    if not SCRIPT.exists():
        pytest.skip("the benchmarks are not here")
    specification = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(fuzz: ModuleType) -> list[tuple[str, bytes]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: list[tuple[str, bytes]] = fuzz.corpus([])
    return made


def test_mutants_are_read_or_refused_with_a_reason_and_nothing_else(
    fuzz: ModuleType, files: list[tuple[str, bytes]]
) -> None:
    kinds: Counter[str] = Counter()
    plain = Preprocessing((32, 32), decoder=DECODERS["standard"])
    ways = (plain, replace(plain, icc=True), replace(plain, truncated="pad"), replace(plain, decoder="pillow"))
    for number in range(400):
        name, data = fuzz.mutant(files, 1, number)
        try:
            pixels = read_crop(data, ways[number % 4], id=name, max_pixels=1_000_000)
        except ImageError as error:
            assert error.id == name and error.kind in FAILURE_KINDS and error.reason.isprintable()
            kinds[error.kind] += 1
        else:
            assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
            kinds["read"] += 1
    assert min(kinds[kind] for kind in ("read", "truncated", "damaged", "unsupported", "too-large")) > 2, kinds


def test_every_file_of_the_corpus_is_read_before_it_is_damaged(files: list[tuple[str, bytes]]) -> None:
    assert len(files) > 150
    for name, data in files:
        if name == "ICNS-P-0":
            continue  # Pillow writes it, but cannot read it.
        assert read_crop(data, Preprocessing((32, 32)), id=name).shape == (32, 32, 3)


def test_a_mutant_is_the_same_every_time_and_no_two_are(fuzz: ModuleType, files: list[tuple[str, bytes]]) -> None:
    mutants = [fuzz.mutant(files, 0, number) for number in range(50)]
    assert mutants == [fuzz.mutant(files, 0, number) for number in range(50)]
    assert len({data for _, data in mutants}) > 45
