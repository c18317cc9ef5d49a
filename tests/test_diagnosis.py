from __future__ import annotations

import http.server
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import embedkit
from embedkit.cli import main
from embedkit.diagnosis import Finding, examine
from embedkit.diagnosis.examination import PROBES
from embedkit.diagnosis.findings import STATES

# An import of these, and not a mock, is what a broken installation breaks.
BROKEN = {
    "raises": "raise ImportError('libopenblas.so:\\ncannot open shared object file')",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "import time; time.sleep(1000)",
    "prints": "import os; print('not a finding'); os.write(1, b'null\\n'); raise ImportError('no')",
}


def found(*probes: str, seconds: float = 60.0) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(probes, seconds=seconds)}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Makes FAISS a package that does what the parameter says."""
    (tmp_path / "faiss.py").write_text(BROKEN[request.param])
    monkeypatch.syspath_prepend(str(tmp_path))
    return str(request.param)


def test_a_whole_examination_looks_at_everything_and_fails_nowhere() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    findings = [Finding(**json.loads(line)) for line in result.stdout.splitlines()]
    assert result.exit_code == 0, result.output
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names)
    assert {"embedkit", "python", "torch", "processor", "threads", "memory", "gpu", "locks", "hub"} <= {
        "gpu" if name.startswith("gpu") else name for name in names
    }
    for finding in findings:
        assert finding.state in STATES and finding.found and "\n" not in finding.found
        assert finding.state == "ok" or finding.advice, finding
    tried = next(finding.found for finding in findings if finding.name == "self-test")
    assert "200 images embedded, verified and found" in tried and "images/s" in tried


@pytest.mark.skipif(os.name == "nt", reason="there are no signals")
@pytest.mark.parametrize("broken", ["crashes"], indirect=True)
def test_a_crash_is_a_line_and_the_others_go_on(broken: str) -> None:
    lines = found("libraries", "open files", "runtimes", "memory")
    assert list(lines) == ["libraries", "open files", "runtimes", "memory"]
    assert lines["libraries"].state == lines["runtimes"].state == "fail"
    assert lines["libraries"].found == "it ended its process (signal 11)"
    assert "fresh virtual environment" in lines["libraries"].advice
    assert lines["memory"].state != "fail"


@pytest.mark.parametrize("broken", ["raises", "prints"], indirect=True)
def test_an_exception_is_a_line_with_its_reason(broken: str) -> None:
    lines = found("libraries", "open files")
    reason = "libopenblas.so: cannot open shared object file" if broken == "raises" else "no"
    assert (lines["libraries"].state, lines["libraries"].found) == ("fail", f"ImportError: {reason}")
    assert list(lines) == ["libraries", "open files"]


@pytest.mark.parametrize("broken", ["hangs"], indirect=True)
def test_a_hang_is_a_line_and_takes_no_more_than_its_time(broken: str) -> None:
    started = time.monotonic()
    lines = found("libraries", "runtimes", "self-test", "memory", seconds=6.0)
    assert time.monotonic() - started < 60
    assert lines["libraries"].found == "it hangs: nothing came of it in 3 s"
    assert [line.state for line in lines.values()] == ["fail", "fail", "warn", "warn"]
    assert "the others took too long" in lines["memory"].found


@pytest.mark.parametrize("broken", ["raises"], indirect=True)
def test_the_exit_code_tells_failures_from_warnings(broken: str) -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "\nfail  libraries           ImportError: libopenblas.so: cannot open" in result.stdout
    assert "  -> the libraries do not get on with one another" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(" failed") and "Traceback" not in result.output


def test_packages_are_compared_with_what_embedkit_requires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"embedkit-{embedkit.__version__}.dist-info"
    folder.mkdir()
    requires = [
        "numpy>=1.0", "torch<99,>=98.5", "no-such-package>=1.2", "h5py", "tomli>=1; python_version < '3.0'",
        "timm>=1.0; extra == 'two'", 'no-such-extra>=3 ; extra == "two"', "pillow>=9 ; extra == 'one'",
        "nothing; extra == 'dev'",
    ]  # fmt: skip
    lines = ["Metadata-Version: 2.1", "Name: embedkit", f"Version: {embedkit.__version__}"]
    (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    states = {name: (finding.state, finding.advice) for name, finding in found("packages", "extras").items()}
    assert states == {
        "embedkit": ("ok", ""), "python": ("ok", ""), "numpy": ("ok", ""), "h5py": ("ok", ""),
        "torch": ("warn", "pip install 'torch>=98.5'"),
        "no-such-package": ("fail", "pip install 'no-such-package>=1.2'"),
        "extra one": ("ok", ""), "extra two": ("ok", ""),
    }  # fmt: skip
    lines = {name: finding.found for name, finding in found("extras").items()}
    assert lines["extra two"] == "not installed: pip install 'embedkit[two]'"
    assert lines["extra one"].startswith("pillow ")


@pytest.mark.skipif(os.name == "nt" or Path("/proc/driver/nvidia").exists(), reason="needs a system without the driver")
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch for processors only")
def test_a_torch_without_cuda_beside_an_nvidia_driver_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("gpu")["gpu"].state == "ok"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.10\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpu = found("gpu")["gpu"]
    assert gpu.state == "warn" and gpu.found.startswith("NVIDIA driver 570.86.10, but torch")
    assert "pytorch.org" in gpu.advice


def test_more_threads_than_processors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "512")
    lines = found("threads")
    assert lines["threads"].state == "warn" and "set OMP_NUM_THREADS=" in lines["threads"].advice
    assert "OMP_NUM_THREADS=512" in lines["thread variables"].found


@contextmanager
def limited(name: str, value: int) -> Iterator[None]:
    import resource

    which = getattr(resource, name)
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


@pytest.mark.skipif(os.name == "nt", reason="there are no such limits")
def test_few_open_files_are_told() -> None:
    with limited("RLIMIT_NOFILE", 128):
        files = found("open files")["open files"]
    assert (files.state, files.found) == ("warn", "128 at a time") and "ulimit -n" in files.advice
    assert found("open files")["open files"].found != "128 at a time"


@pytest.mark.skipif(os.name == "nt", reason="there are no such limits")
def test_a_self_test_that_cannot_write_fails_in_one_line() -> None:
    with limited("RLIMIT_FSIZE", 30_000):
        line = found("self-test")["self-test"]
    assert line.state == "fail" and "File too large" in line.found and line.advice


def test_locks_are_tried_in_the_working_folder_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    lines = found("locks", "folders")
    assert lines["locks"].state == "ok" and str(tmp_path) in lines["locks"].found
    assert str(tmp_path) in lines["working folder"].found and "GB free" in lines["working folder"].found
    assert str(tmp_path / "not" / "there" / "hub") in lines["hub cache"].found
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_the_type_of_a_file_system_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    assert ", tmpfs, " in found("folders")["temporary files"].found


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_hub_that_answers_is_there_whatever_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            assert found("hub")["hub"].state == "ok"
        finally:
            server.shutdown()
            thread.join()


def test_a_hub_that_is_silent_or_gone_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HF_HUB_OFFLINE" in found("hub")["hub"].found
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        line = found("hub")["hub"]
    assert line.state == "warn" and line.found.startswith(f"{address} cannot be reached: ")
    line = found("hub")["hub"]
    assert line.state == "warn" and "refused" in line.found.lower()
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert found("hub")["hub"].state == "warn"


def test_a_probe_that_is_not_there_is_a_failure() -> None:
    assert found("none")["none"] == Finding("none", "fail", "KeyError: 'none'", found("none")["none"].advice)
    assert "none" not in PROBES and sys.executable
