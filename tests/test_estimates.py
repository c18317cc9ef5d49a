"""Estimates: memory is told before it is missing."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from embedkit.evaluation.estimates import estimate_memory, warn_of_memory
from embedkit.machine import available_memory

FIT = """
import re
import numpy as np
from embedkit.heads import fit_logistic
def memory(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1])
def fit(n):
    x = np.empty((n, 256), dtype=np.float32)
    for start in range(0, n, 1000):
        x[start:start + 1000] = np.random.default_rng(start).random((1000, 256), dtype=np.float32)
    fit_logistic(x, np.arange(n) % 4, C_grid=(1e-4,), max_iter=3)
fit(1000)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # The peak begins anew: imports have one of their own.
fit(80_000)
print(memory("VmHWM") - before)
"""


def test_a_head_that_copies_no_rows_needs_little_beside_them() -> None:
    for head in ("ridge", "mean"):
        needed = estimate_memory(10_000_000, 512, 10, head=head)
        assert 4 * 512e7 < needed < 1.02 * 4 * 512e7
    assert estimate_memory(10_000_000, 512, 10) > 1.9 * 4 * 512e7


def test_the_matrix_is_the_least_that_is_needed() -> None:
    for head in ("logistic", "knn", "svm", "lda", "mlp", "RandomForestClassifier"):
        assert estimate_memory(1_000_000, 768, 1000, head=head) > 2 * 4 * 768e6


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are in kilobytes on Linux")
def test_the_estimate_is_what_a_fit_takes() -> None:
    done = subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True, check=True)
    taken, estimated = int(done.stdout), estimate_memory(80_000, 256, 4)
    assert 0.6 * estimated < taken < 1.5 * estimated


def test_what_does_not_fit_is_told_with_what_helps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="embedkit"):
        assert warn_of_memory(1_000_000, 768, 1000, available=4_000_000_000)
    assert "need about 6.4 GB" in caplog.text and "4.0 GB are available" in caplog.text
    assert "--head ridge or --head mean" in caplog.text


def test_what_fits_is_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert not warn_of_memory(1000, 64, 10)
    assert not warn_of_memory(1_000_000, 768, 1000, available=64_000_000_000)
    assert not caplog.records


def test_nothing_is_advised_that_does_not_fit_either(caplog: pytest.LogCaptureFixture) -> None:
    assert warn_of_memory(1_000_000, 768, 1000, available=1_000_000)
    assert "--head ridge" not in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is available")
def test_linux_says_what_is_available() -> None:
    free = available_memory()
    assert free is not None and free > 1_000_000
