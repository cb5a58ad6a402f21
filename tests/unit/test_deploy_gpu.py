"""GPUs as the driver tells of them, the metrics that TorchServe reads, and where its workers run."""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import gpu
from deploy.configuration import METRICS_CONFIG, gpu_properties
from deploy.errors import StartError
from deploy.gpu import Gpu, collector_command, gpu_of, metric_lines, placement, read_gpus, runs_on_gpu, usable_gpus

# What TorchServe 0.12.0's frontend parses a metric with (org.pytorch.serve.metrics.Metric).
METRIC = re.compile(
    r"\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?"
)
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


def archive(path: Path, device: str | None) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("signature.json", json.dumps({"artifact": {"device": device}} if device else {}))
    return path


class Nvml:
    """The driver's library with one GPU, each of whose functions may fail."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.shut_down = False

    def __getattr__(self, name: str) -> Any:
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


def test_nvidia_smi_is_read(without_driver: Path) -> None:
    put_nvidia_smi(
        without_driver,
        "echo 'Warning: something'\necho '0, NVIDIA H200, 37, 1024, 143771'\n"
        "echo '1, NVIDIA H200 MIG, [N/A], [N/A], [N/A]'",
    )
    assert read_gpus() == TWO


@pytest.mark.parametrize("script", [None, "echo 'NVIDIA-SMI has failed' >&2; exit 9", "true"])
def test_without_a_driver_there_is_no_gpu(without_driver: Path, script: str | None) -> None:
    if script is not None:
        put_nvidia_smi(without_driver, script)
    assert read_gpus() == []


@pytest.mark.parametrize(
    ("visible", "usable"), [(None, 2), ("0,1", 2), (" 1 ", 1), ("", 0), ("-1", 0), ("0,7,1", 1), ("5", 0)]
)
def test_as_many_gpus_are_used_as_cuda_shows(monkeypatch: pytest.MonkeyPatch, visible: str | None, usable: int) -> None:
    monkeypatch.setattr(gpu, "read_gpus", lambda: TWO)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert usable_gpus(environment) == usable


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
    gpu.main()
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


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False), (None, False)])
def test_an_archive_says_where_it_runs(tmp_path: Path, device: str | None, expected: bool) -> None:
    assert runs_on_gpu(archive(tmp_path / "a.mar", device)) is expected


def test_what_is_no_archive_runs_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.mar").write_bytes(b"an archive")
    assert not runs_on_gpu(tmp_path / "a.mar")
    assert not runs_on_gpu(tmp_path / "missing.mar")


def test_a_model_for_gpus_gets_all_of_them_and_their_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "read_gpus", lambda: TWO)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    models = {"text": archive(tmp_path / "text.mar", "cpu"), "images": archive(tmp_path / "images.mar", "cuda")}
    assert gpu_properties(models) == {
        "number_of_gpu": "2",
        "disable_system_metrics": "false",
        "system_metrics_cmd": collector_command(),
        "metric_time_interval": "15",
    }
    assert gpu_properties({"text": models["text"]}) == {"number_of_gpu": "0"}


def test_without_a_gpu_the_worker_is_left_to_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "read_gpus", list)
    assert gpu_properties({"images": archive(tmp_path / "images.mar", "cuda")}) == {}


def test_gpus_that_are_not_named_by_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2b,GPU-11")
    with pytest.raises(StartError, match=r"CUDA_VISIBLE_DEVICES is 'GPU-8f2b,GPU-11', .* such as CUDA_VISIBLE_DEV"):
        gpu_properties({"images": archive(tmp_path / "images.mar", "cuda")})


def worker(usage: str | None, *, on_gpu: bool = True) -> dict[str, object]:
    return {"id": "9000", "status": "READY", "gpu": on_gpu, **({} if usage is None else {"gpuUsage": usage})}


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (worker("gpuId::1 utilization.gpu [%]::3 % memory.used [MiB]::1024 MiB"), 1),
        (worker("gpuId::12"), 12),
        (worker("N/A", on_gpu=False), None),
        (worker("failed to obtained gpu usage"), None),
        (worker(None), None),
    ],
)
def test_torchserve_says_where_a_worker_runs(described: dict[str, object], expected: int | None) -> None:
    assert gpu_of(described) == expected


def test_placement_in_words() -> None:
    places = [worker(f"gpuId::{index} x") for index in (1, 0, 1)]
    assert placement(places) == "1 worker on GPU 0, 2 workers on GPU 1"
    assert placement([worker("N/A", on_gpu=False)]) == ""
