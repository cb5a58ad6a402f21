"""`torchport compare` with real servers: torchport's, stock TorchServe, and FastAPI in an environment made for it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

PICTURES = ("--pictures", "24x20")
SHORT = ("--users", "1,4", "--duration", "1", "--warm-up", "0.5", "--rounds", "2")
# Inherited by everything that the comparison starts.
MARK = {"TORCHPORT_TEST_COMPARE": secrets.token_hex(16)}


@pytest.fixture(scope="module")
def comparison(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("compare")
    peers = ("--reference", str(archives["torchscript"]), "--peers", "torchserve,fastapi")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torchport",
            "compare",
            str(archives["onnx"]),
            *peers,
            *PICTURES,
            *SHORT,
            "--out",
            out,
            "--json",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **MARK},
        check=False,
    )
    assert done.stdout, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert "invalid_reasons" in document, document
    assert done.returncode == (0 if document["ok"] else 1)
    # This machine may be busy with other tests: that the client was held up is no fault of ours, anything else is.
    assert [reason for reason in document["invalid_reasons"] if "the client" not in reason] == []
    return document


def test_every_system_answers_rightly_in_every_round(comparison: dict[str, Any]) -> None:
    results = json.loads(Path(comparison["results"]).read_bytes())
    assert list(results["systems"]) == ["torchport", "torchserve", "fastapi"]
    for system in results["systems"].values():
        assert system["failure"] is None
        assert set(system["users"]) == {"1", "4"}
        for cell in system["users"].values():
            assert cell["failed"] == 0
            assert cell["requests"] > 0
            assert 0 < cell["lowest_rps"] <= cell["rps"] <= cell["highest_rps"]
            assert cell["p50_ms"] <= cell["p99_ms"]
    assert [visit["round"] for visit in results["rounds"]] == [0] * 6 + [1] * 6
    # There and back.
    assert [visit["system"] for visit in results["rounds"][::2]] == [
        *("torchport", "torchserve", "fastapi"),
        *("fastapi", "torchserve", "torchport"),
    ]


def test_it_says_what_was_compared_with_what(comparison: dict[str, Any]) -> None:
    results = json.loads(Path(comparison["results"]).read_bytes())
    assert (results["archive"]["format"], results["reference"]["format"]) == ("onnx", "torchscript")
    assert {"fastapi", "uvicorn", "torchserve", "torch"} <= set(results["versions"])
    assert all(value > 0 for value in results["limits_per_s"].values())
    assert results["requests"].startswith("64 generated JPEG photographs, 24 x 20")
    page = Path(comparison["report"]).read_text(encoding="utf-8")
    assert "FastAPI" in page
    assert page.count("<svg") == 4


def test_it_says_where_the_time_goes(comparison: dict[str, Any]) -> None:
    results = json.loads(Path(comparison["results"]).read_bytes())
    ours = [visit for visit in results["rounds"] if visit["system"] == "torchport"]
    for visit in ours:
        assert set(visit["stages_ms"]) == {"decode", "wait", "compute", "encode"}
        assert visit["stages_ms"]["decode"] > 0
        assert visit["cpu_ms"]["java"] > 0
    assert all(sum(visit["cpu_ms"].values()) > 0 for visit in results["rounds"])
    assert results["systems"]["fastapi"]["users"]["1"]["added_ms"] is not None


def test_nothing_is_left_running(comparison: dict[str, Any]) -> None:
    assert comparison["systems"]
    (name,) = MARK
    left = [process for process in psutil.process_iter() if mark_of(process, name) == MARK[name]]
    assert [" ".join(process.cmdline()) for process in left] == []


def mark_of(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None
