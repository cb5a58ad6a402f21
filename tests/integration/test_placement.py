"""Where TorchServe's workers run, if it believes in GPUs: a stand-in for nvidia-smi tells it of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from deploy.archive_copy import change_settings
from deploy.ports import Ports
from deploy.server import TorchServe
from export.archive import open_archive

from .conftest import READY_TIMEOUT_S

# What TorchServe 0.12.0 asks: which GPUs there are, and what one of them is doing.
NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *index*memory.total*) for gpu in {gpus}; do echo "$gpu, GPU, 0, 0, 1"; done ;;
  *index*) printf '%s\\n' index {gpus} ;;
  *) printf 'utilization.gpu [%%], utilization.memory [%%], memory.used [MiB]\\n3 %%, 4 %%, 5 MiB\\n' ;;
esac
"""


@pytest.fixture
def models(archives: dict[str, Path], tmp_path: Path) -> list[Path]:
    """Archives whose workers ask for a GPU, and compute on the CPU all the same."""
    copies = []
    for path in archives.values():
        copies.append(Path(shutil.copy(path, tmp_path)))
        change_settings(copies[-1], [lambda config: {**config, "deviceType": "gpu"}])
    return copies


@pytest.mark.parametrize(
    ("gpus", "visible", "scheduling", "workers", "places"),
    [
        ("0 1", None, "continuous", None, ["1 worker on GPU 0", "1 worker on GPU 1"]),
        # Numbers count from 0 among those that are visible.
        ("0 1 2 3", "2,3", "continuous", 2, ["1 worker on GPU 0, 1 worker on GPU 1"] * 2),
        ("0 1", None, "batches", 3, ["2 workers on GPU 0, 1 worker on GPU 1", "1 worker on GPU 0, 2 workers on GPU 1"]),
    ],
)
def test_workers_are_spread_over_the_gpus(
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: str,
    visible: str | None,
    scheduling: str,
    workers: int | None,
    places: list[str],
) -> None:
    command = tmp_path / "bin" / "nvidia-smi"
    command.parent.mkdir()
    command.write_text(NVIDIA_SMI.format(gpus=gpus), encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("deploy.gpu._LIBRARIES", ())
    for module in ("configuration", "archive_copy"):
        monkeypatch.setattr(f"deploy.{module}.runs_on_gpu", lambda path: True)
    opened = [open_archive(path) for path in models]
    with TorchServe(opened, Ports.free(), workers=workers, scheduling=scheduling) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        assert [server.places[archive.name] for archive in opened] == places
