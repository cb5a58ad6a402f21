"""The GPU benchmark, rehearsed on the CPU: what it counts, what it leaves out, and that it ends with its JSON."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_limits.py"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, Any]]:
    """The script's modules, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_clock
        import gpu_limits
        import gpu_points
        import gpu_serving
        import gpu_subjects
        import gpu_verdicts
        import gpu_work

        found = (gpu_clock, gpu_limits, gpu_points, gpu_serving, gpu_subjects, gpu_verdicts, gpu_work)
        yield {module.__name__: module for module in found}
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False, cwd=BENCHMARKS.parents[1]
    )


def test_a_rehearsal_measures_and_ends_with_json() -> None:
    done = run("--device", "cpu", "--tiny", "--section", "ceilings", "--section", "encoder")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["not_measured"] == {}
    encoder = document["encoder"]
    assert [row["batch"] for row in encoder["by_batch_size"]] == [1, 8, 32, 64, 128]
    assert all(row["samples_per_s"] > 0 and row["share_of_floor"] > 0 for row in encoder["by_batch_size"])
    assert [row["batch"] for row in encoder["graphs_against_plain"]] == [1, 8, 32]
    (agreement,) = encoder["agreement_with_fp32_on_the_cpu"]
    assert 0 < agreement["distance"] < agreement["distance_bound"]
    assert agreement["passes"] is True
    assert encoder["planned_per_s"] >= encoder["planned_one_batch_under_way_per_s"] > 0
    assert encoder["lanes_times_faster"] > 0
    rates = [encoder["planned_per_s"], *(row["samples_per_s"] for row in encoder["by_batch_size"])]
    assert encoder["in_process_per_s"] == max(rates)
    found = {(row["model"], row["what"]): row["verdict"] for row in document["verdicts"]}
    assert found["encoder", "samples/s in process"] == "shown"
    assert found["encoder", "distance from fp32 on the CPU"] == "met"
    assert found["encoder", "served / in process"] == "open"
    assert {document["machine"][key] for key in ("date", "command", "processor", "cores")}.isdisjoint({None, ""})


def test_what_the_budget_does_not_allow_is_said(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = modules["gpu_limits"]
    document = {"not_measured": {}}
    console = limits.Console(width=120)

    def run(name: str, *, left_s: float, needed_s: float = 0, limit_s: float = 60) -> None:
        deadline = time.monotonic() + left_s
        limits._run(name, None, document, console, deadline=deadline, needed_s=needed_s, limit_s=limit_s)

    run("encoder", left_s=5, needed_s=60)
    assert document["not_measured"] == {"encoder": "5 s were left of the budget, and it takes about 60"}

    def handle_everything(name: str, bench: object) -> None:
        """As what computes batches does."""
        for _ in range(2):
            with contextlib.suppress(Exception):
                time.sleep(30)

    monkeypatch.setattr(limits, "_measure", handle_everything)
    started = time.monotonic()
    run("images", left_s=0.2)
    run("formats-images", left_s=60, limit_s=0.2)
    assert time.monotonic() - started < 20
    assert document["not_measured"]["images"] == "it did not end within 0 s"
    assert document["not_measured"]["formats-images"] == "it did not end within 0 s"
    monkeypatch.setattr(limits, "_measure", lambda name, bench: 1 / 0)
    run("ceilings", left_s=5)
    assert document["not_measured"]["ceilings"] == "it failed: ZeroDivisionError: division by zero"
    monkeypatch.setattr(limits, "_measure", lambda name, bench: "these packages are not installed: torchserve")
    run("serve-encoder", left_s=5)
    assert "serve-encoder: not measured: these packages are not installed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses_in_one_sentence() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "torch finds no CUDA GPU here; run this where one is, or rehearse with --device cpu --tiny"
    )


def test_the_full_models_are_not_for_a_cpu() -> None:
    done = run("--device", "cpu")
    assert (done.returncode, done.stderr.strip()) == (1, "the full models take a CPU hours; add --tiny")


def test_work_is_counted(modules: dict[str, Any]) -> None:
    count_work = modules["gpu_work"].count_work
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6))
    work = count_work(module, torch.ones((1, 3), dtype=torch.int64))
    assert work.flops == 3 * 2 * 4 * 6
    assert work.weight_bytes == 4 * (4 * 6 + 6)  # the embedding is looked up, not read
    ids, embedded, out = 3 * 8, 3 * 4 * 4, 3 * 6 * 4
    assert work.activation_bytes == ids + embedded + embedded + out
    assert work.bytes(2) == work.weight_bytes + 2 * work.activation_bytes
    assert work.floor_s(2, flops_per_s=1e12, bytes_per_s=1.0) == work.bytes(2)
    assert work.floor_s(2, flops_per_s=1.0, bytes_per_s=1e12) == 2 * work.flops


def test_attention_is_counted(modules: dict[str, Any]) -> None:
    """Two matrix products of [T, D / H] by [D / H, T] a head, whatever kernel computes them."""
    tokens, heads, width = 5, 2, 8

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    work = modules["gpu_work"].count_work(Attention(), torch.randn(1, heads, tokens, width))
    assert work.flops == heads * 2 * (2 * tokens * tokens * width)


def test_a_resnet_50_is_as_large_as_it_should_be(modules: dict[str, Any]) -> None:
    subject = modules["gpu_subjects"].build_subjects(tiny=False)["images"]
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from gpu_resnet import build_resnet
    finally:
        sys.path.remove(str(BENCHMARKS))
    with torch.device("meta"):
        model = build_resnet(**{**subject.config, "num_classes": 1000}).eval()
        flops = modules["gpu_work"].count_work(model, torch.empty(1, 3, 224, 224)).flops
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032  # torchvision's resnet50
    assert flops == pytest.approx(2 * 4.089e9, rel=0.01)


def test_lengths_are_a_mix_within_their_bounds(modules: dict[str, Any]) -> None:
    subject = modules["gpu_subjects"].build_subjects(tiny=False)["encoder"]
    lengths = sorted(len(sample["input_ids"]) for sample in subject.samples(1000, seed=1))
    assert lengths[0] == 16
    assert lengths[-1] == 256
    assert 58 <= lengths[500] <= 70
    again = subject.samples(3, seed=1)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(again, subject.samples(3, seed=1), strict=True))


def load(modules: dict[str, Any], *, ms: list[float], cpu: float = 0.1, faults: int = 0) -> Any:
    from serving_load import Load

    return Load(
        seconds=array("d", [value / 1e3 for value in ms]),
        faults=Counter({"timed out": faults} if faults else {}),
        elapsed_s=2.0,
        client_cpu_share=cpu,
    )


@pytest.mark.parametrize(
    ("slow", "cpu", "faults", "valid", "kept"),
    [
        (1.0, 0.1, 0, True, True),
        (40.0, 0.1, 0, True, False),
        (1.0, 0.95, 0, False, False),
        (1.0, 0.1, 1, True, False),
    ],
)
def test_a_rate_counts_when_answers_come_in_time(
    modules: dict[str, Any], slow: float, cpu: float, faults: int, valid: bool, kept: bool
) -> None:
    loads = [load(modules, ms=[1.0] * 97 + [slow] * 3), load(modules, ms=[1.0] * 97 + [slow] * 3, cpu=cpu)]
    loads[0].faults = load(modules, ms=[], faults=faults).faults
    row = modules["gpu_serving"].judged(loads, rate=100.0, slo_ms=15.0)
    assert (row["valid"], row["kept"]) == (valid, kept)
    assert row["requests_per_s"] == pytest.approx(100.0)
    assert math.isclose(row["p99_ms"], slow)


def test_a_rate_without_an_answer_is_not_kept(modules: dict[str, Any]) -> None:
    row = modules["gpu_serving"].judged([load(modules, ms=[])], rate=1.0, slo_ms=15.0)
    assert row["p99_ms"] is None
    assert row["kept"] is False


@pytest.mark.parametrize("kept_from", range(8))
def test_the_highest_rate_that_keeps_the_slo_is_found_by_halves(modules: dict[str, Any], kept_from: int) -> None:
    rates = [70.0, 60.0, 50.0, 40.0, 30.0, 20.0, 10.0]
    kept = set(rates[kept_from:])
    tried = modules["gpu_serving"].slo_search(rates, lambda rate: {"requests_per_s": rate, "kept": rate in kept})
    assert max((row["requests_per_s"] for row in tried if row["kept"]), default=None) == max(kept, default=None)
    assert len(tried) <= 3
    assert modules["gpu_serving"].slo_search([], lambda rate: {}) == []


def test_a_section_that_was_served_has_its_ratios(modules: dict[str, Any]) -> None:
    serving, points = modules["gpu_serving"], modules["gpu_points"]
    subject = modules["gpu_subjects"].build_subjects(tiny=True)["images"]
    labels = {"1 worker": 100, "2 workers": 180, "stock_fp32": 20, "stock_bf16": 40}
    rounds = [{label: load(modules, ms=[1.0] * count) for label, count in labels.items()} for _ in range(2)]
    rounds[1]["1 worker"] = load(modules, ms=[1.0] * 150)
    row = {"requests_per_s": 80.0, "valid": True, "kept": True}
    tried = [row, {**row, "requests_per_s": 95.0, "kept": False}, {**row, "requests_per_s": 70.0}]
    limit = points.Limit(in_process_per_s=100.0, bare_module_per_s=200.0)
    found = serving.summary(subject, limit, rounds=rounds, best="2 workers", tried=tried)
    assert (found["served_per_s"], found["served_of_in_process"], found["served_of_bare_module"]) == (90, 0.9, 0.45)
    assert (found["times_stock_fp32"], found["times_stock_bf16"]) == (9.0, 4.5)
    assert (found["slo_per_s"], found["slo_of_in_process"], found["slo_limited_by_the_client"]) == (80.0, 0.8, None)
    assert [line["served_by"] for line in found["closed_loop"]] == list(labels)
    none = serving.summary(
        subject, limit, rounds=rounds, best="1 worker", tried=[{**row, "valid": False, "kept": False}]
    )
    assert (none["slo_per_s"], none["slo_of_in_process"], none["slo_limited_by_the_client"]) == (None, None, True)

    verdicts = {
        line["what"]: (line["wanted"], line["verdict"])
        for line in modules["gpu_verdicts"].verdicts({"serve-images": found})
        if line["model"] == "images"
    }
    assert verdicts["served / in process"] == (">= 0.9", "met")
    assert verdicts["rate with p99 <= 15 ms / in process"] == (">= 0.85", "short")
    assert verdicts["times stock TorchServe in fp32"] == (">= 5", "met")
    assert verdicts["samples/s in process"] == (None, "open")


@pytest.mark.parametrize(
    ("found", "verdict"), [(0.05, "met"), (0.1, "met"), (0.11, "short"), (math.nan, "short"), (None, "open")]
)
def test_a_distance_should_be_small(modules: dict[str, Any], found: float | None, verdict: str) -> None:
    agreement = {"distance": found, "distance_bound": 0.1, "agreement": 1.0, "agreement_bound": 0.995}
    rows = modules["gpu_verdicts"].verdicts({"encoder": {"agreement_with_fp32_on_the_cpu": [agreement]}})
    assert [row["verdict"] for row in rows if row["what"].startswith("distance")] == [verdict, "open"]


def test_what_json_has_no_number_for_is_null(modules: dict[str, Any]) -> None:
    document = {"a": [math.nan, 1.5, {"b": math.inf}], "c": "NaN", "d": 2}
    assert modules["gpu_limits"].finite(document) == {"a": [None, 1.5, {"b": None}], "c": "NaN", "d": 2}


@pytest.mark.parametrize(("cores", "counts"), [(1, [1, 2]), (2, [1, 2]), (8, [1, 2, 4]), (16, [1, 4, 8])])
def test_a_gpu_is_served_by_few_processes_and_by_many(modules: dict[str, Any], cores: int, counts: list[int]) -> None:
    subject = modules["gpu_subjects"].build_subjects(tiny=False)["encoder"]
    assert [way.workers for way in modules["gpu_serving"].ways(subject, cores=cores, tiny=False)] == counts
