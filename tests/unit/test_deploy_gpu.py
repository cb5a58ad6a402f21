"""GPUs as the driver tells of them, and the metrics that TorchServe reads."""

from __future__ import annotations

import ctypes
import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import gpu
from deploy.configuration import METRICS_CONFIG
from deploy.gpu import Gpu, collector_command, metric_lines, read_gpus, read_gpus_in_time

# What TorchServe 0.12.0's frontend parses a metric with (org.pytorch.serve.metrics.Metric).
METRIC = re.compile(
    r"\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?"
)
# Plays the child that asks the driver's library, with a library of two GPUs.
CHILD = """\
import ctypes, runpy, time

class Library:
    def nvmlDeviceGetCount_v2(self, count):
        {what}
        count._obj.value = 2
        return 0

    def __getattr__(self, name):
        return lambda *arguments: 0

ctypes.CDLL = lambda name: Library()
runpy.run_path({file!r}, run_name="__main__")
"""
FILE = gpu.__file__
SILENT = f"exec {shlex.quote(sys.executable)} -c 'import time; time.sleep(300)'"
TWO = [
    Gpu(index=0, name="NVIDIA H200", utilisation_percent=37.0, memory_used_mib=1024.0, memory_total_mib=143771.0),
    Gpu(index=1, name="NVIDIA H200 MIG", utilisation_percent=None, memory_used_mib=None, memory_total_mib=None),
]


@pytest.fixture
def without_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library of the driver; returns a folder that is alone on the PATH, with the shell in it."""
    monkeypatch.setattr(gpu, "_LIBRARIES", ("libtorchport-has-no-such.so",))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put_nvidia_smi(folder: Path, script: str) -> None:
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    command.chmod(0o755)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Has the driver's library do something in the child, before it answers; there is one."""

    def put(what: str) -> None:
        monkeypatch.setattr(gpu, "_LIBRARIES", ("libnvidia-ml.so.1",))
        script = tmp_path / "child.py"
        script.write_text(CHILD.format(what=what, file=FILE), encoding="utf-8")
        monkeypatch.setattr(gpu, "__file__", str(script))

    return put


class Nvml:
    """The driver's library with one GPU, each of whose functions may fail, or be lacking."""

    def __init__(self, *failing: str, lacks: str | None = None) -> None:
        self.failing = failing
        self.lacks = lacks
        self.shut_down = False

    def __getattr__(self, name: str) -> Any:
        if name == self.lacks:
            raise AttributeError(f"undefined symbol: {name}")

        def call(*arguments: Any) -> int:
            if name in self.failing:
                return 3
            if name == "nvmlDeviceGetCount_v2":
                arguments[0]._obj.value = 1
            elif name == "nvmlDeviceGetName":
                arguments[1].value = b"NVIDIA H200"
            elif name == "nvmlDeviceGetUtilizationRates":
                arguments[1]._obj.gpu = 37
            elif name == "nvmlDeviceGetMemoryInfo":
                arguments[1]._obj.used, arguments[1]._obj.total = 1 << 30, 4 << 30
            elif name == "nvmlShutdown":
                self.shut_down = True
            return 0

        return call


def test_the_drivers_library_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert read_gpus() == [
        Gpu(index=0, name="NVIDIA H200", utilisation_percent=37.0, memory_used_mib=1024.0, memory_total_mib=4096.0)
    ]
    assert library.shut_down


def test_what_the_library_cannot_say_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMemoryInfo"))
    (found,) = read_gpus()
    assert (found.name, found.utilisation_percent, found.memory_used_mib) == ("NVIDIA H200", None, None)


@pytest.mark.parametrize("failing", ["nvmlInit_v2", "nvmlDeviceGetCount_v2"])
def test_a_library_that_does_not_work_leaves_it_to_nvidia_smi(
    without_driver: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    monkeypatch.setattr(gpu, "_LIBRARIES", ("libnvidia-ml.so.1",))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(failing))
    put_nvidia_smi(without_driver, "echo '0, NVIDIA H200, 5, 10, 100'")
    assert [found.name for found in read_gpus()] == ["NVIDIA H200"]


@pytest.mark.parametrize("lacks", ["nvmlInit_v2", "nvmlDeviceGetUtilizationRates", "nvmlShutdown"])
def test_a_library_that_lacks_a_function_leaves_it_to_nvidia_smi(
    without_driver: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    monkeypatch.setattr(gpu, "_LIBRARIES", ("libnvidia-ml.so.1",))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(lacks=lacks))
    put_nvidia_smi(without_driver, "echo '0, NVIDIA H200, 5, 10, 100'")
    assert [found.utilisation_percent for found in read_gpus()] == [5]


def test_nvidia_smi_is_read(without_driver: Path) -> None:
    put_nvidia_smi(
        without_driver,
        "echo 'Warning: something'\necho '0, NVIDIA H200, 37, 1024, 143771'\n"
        "echo '1, NVIDIA H200 MIG, [N/A], [N/A], [N/A]'",
    )
    assert read_gpus() == TWO
    assert read_gpus_in_time() == TWO


@pytest.mark.parametrize("script", [None, "echo 'NVIDIA-SMI has failed' >&2; exit 9", "true"])
def test_without_a_driver_there_is_no_gpu(without_driver: Path, script: str | None) -> None:
    if script is not None:
        put_nvidia_smi(without_driver, script)
    assert read_gpus() == []
    assert read_gpus_in_time() == []


def test_the_collector_goes_on_without_a_silent_nvidia_smi_that_cannot_even_be_killed(
    without_driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[subprocess.Popen[str]] = []
    kill = subprocess.Popen.kill

    def survive(process: subprocess.Popen[str]) -> None:
        killed.append(process)

    monkeypatch.setattr(subprocess.Popen, "kill", survive)
    monkeypatch.setattr(gpu, "_TIMEOUT_S", 0.5)
    put_nvidia_smi(without_driver, SILENT)
    began = time.monotonic()
    assert read_gpus() == []
    assert 0.5 <= time.monotonic() - began < 30  # of 300 s
    (process,) = killed
    kill(process)
    process.communicate()


class TestInTime:
    def test_the_library_is_asked_in_a_child(self, without_driver: Path, child: Callable[[str], None]) -> None:
        child("pass")
        put_nvidia_smi(without_driver, "echo '0, another, 5, 10, 100'")
        assert [(found.index, found.utilisation_percent) for found in read_gpus_in_time()] == [(0, 0.0), (1, 0.0)]

    @pytest.mark.parametrize("what", ["time.sleep(300)", "__import__('os').abort()", "return 3"])
    def test_what_the_library_does_to_the_child_leaves_it_to_nvidia_smi(
        self, without_driver: Path, child: Callable[[str], None], what: str
    ) -> None:
        child(what)
        put_nvidia_smi(without_driver, "echo '0, NVIDIA H200, 5, 10, 100'")
        assert [found.name for found in read_gpus_in_time(2)] == ["NVIDIA H200"]

    def test_a_library_that_is_another_has_no_say(self, without_driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "_LIBRARIES", ("libc.so.6",))
        put_nvidia_smi(without_driver, "echo '0, NVIDIA H200, 5, 10, 100'")
        assert [found.name for found in read_gpus_in_time()] == ["NVIDIA H200"]

    @pytest.mark.parametrize(
        ("what", "script"),
        [("time.sleep(300)", SILENT), ("time.sleep(300)", "exit 9"), ("time.sleep(300)", None), ("return 3", SILENT)],
    )
    def test_a_driver_that_does_not_answer_is_not_taken_for_none(
        self, without_driver: Path, child: Callable[[str], None], what: str, script: str | None
    ) -> None:
        child(what)
        if script is not None:
            put_nvidia_smi(without_driver, script)
        with pytest.raises(TimeoutError, match=r"^NVIDIA's driver has not answered within 1 s$"):
            read_gpus_in_time(1)


def test_metrics_are_what_the_frontend_parses_and_what_is_declared() -> None:
    lines = list(metric_lines(TWO, host="machine", timestamp_s=1_800_000_000))
    assert lines[0] == "GPUUtilization.Percent:37.00|#Level:Host,device_id:0|#hostname:machine,1800000000"
    declared = {
        metric["name"]: metric
        for metric in yaml.safe_load(METRICS_CONFIG.read_text(encoding="utf-8"))["ts_metrics"]["gauge"]
    }
    found = set()
    for line in lines:
        match = METRIC.fullmatch(line)
        assert match is not None, line
        found.add(match[1])
        assert declared[match[1]]["unit"] == match[2]
        names = [pair.partition(":")[0] for pair in match[4].split(",")]
        assert [*names, "Hostname"] == declared[match[1]]["dimensions"]
    assert found == {"GPUUtilization", "GPUMemoryUtilization", "GPUMemoryUsed"}
    assert len(lines) == 3  # nothing of the one that cannot say


def test_the_collector_says_what_workers_hold_and_leaves_out_who_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "read_gpus", list)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{os.getpid()},999999999,x\n"))
    gpu.main([])
    first, worker = capsys.readouterr().out.splitlines()
    assert first == ""
    pid, _, held = worker.partition(":")
    assert (pid, int(held) > 1 << 20) == (str(os.getpid()), True)


def test_the_collector_starts_anywhere_without_torch(tmp_path: Path) -> None:
    """TorchServe starts it in a folder of its own, with what it splits at spaces."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *collector_command().split()],
        cwd=tmp_path,
        input=f"{os.getpid()}\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].startswith(f"{os.getpid()}:")
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_a_path_with_a_space_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "__file__", "/home/a user/deploy/gpu.py")
    assert collector_command() == "-P -m deploy.gpu"
