"""Third-party architectures through the export; ``tests/benchmarks/architectures.py`` takes all of them everywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the architectures are those of transformers, which is not installed")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),  # of libraries about each other
]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FP32_AND_INT8 = ("torchscript fp32", "torchscript int8", "onnx fp32", "onnx int8")


@pytest.fixture(scope="module")
def architectures() -> Iterator[ModuleType]:
    """The benchmark as a module; its factories are importable while it is."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import architectures as benchmark

        yield benchmark
    finally:
        sys.path.remove(str(BENCHMARKS))


def outcomes(architectures: ModuleType, folder: Path, name: str, *columns: str) -> dict[str, Any]:
    known = {**architectures.ARCHITECTURES, **architectures.AWKWARD}
    subject = architectures.Subject(name, known[name], folder)
    wanted = [column for column in architectures.COLUMNS if column[0] in columns]
    return {result.column: result for result in architectures.run(subject, wanted)}


@pytest.fixture
def quick(architectures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions in this process: importing transformers takes longer than all they do."""
    monkeypatch.setattr("export.candidate.convert_in_fresh_process", architectures.convert_in_this_process)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["convnext", "distilbert", "clip-text"])
def test_an_architecture_passes_and_is_right(architectures: ModuleType, tmp_path: Path, name: str) -> None:
    results = outcomes(architectures, tmp_path, name, *FP32_AND_INT8)
    assert {
        column: (one.outcome, one.reason if one.outcome != "passed" else "") for column, one in results.items()
    } == {column: ("passed", "") for column in FP32_AND_INT8}
    # That something was compared, and that int8 is int8.
    assert results["torchscript int8"].noise > 1e-3
    assert results["onnx int8"].noise > 1e-3


def test_the_factory_is_found_by_a_fresh_process(architectures: ModuleType, tmp_path: Path) -> None:
    results = outcomes(architectures, tmp_path, "vit", "torchscript fp32")
    assert results["torchscript fp32"].outcome == "passed", results["torchscript fp32"].reason


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("takes-mapping", "the model fails in fp32 on an example of the signature's inputs"),
        ("none-first", "the model's output 'scores' is 'NoneType', not a tensor"),
        ("halves", "the model's output 'scores' is float16, and the signature says float32"),
        ("branches-on-data", "batching of the checkpoint"),
        ("branches-on-size", "parity"),
        ("counts-calls", "parity"),
        ("coupled", "let the model compute each on its own"),
        ("always-drops", "parity"),
        ("squeezes", "has the shape [3] for a batch of 1"),
        ("logarithm", "NaN"),
        ("batch-second", "'state'"),
        ("unmasked", "mask padding in the model"),
    ],
)
def test_what_cannot_be_right_is_refused(architectures: ModuleType, tmp_path: Path, name: str, reason: str) -> None:
    (result,) = outcomes(architectures, tmp_path, name, "torchscript fp32").values()
    assert result.outcome in ("refused", "not possible")
    assert reason in result.reason


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name",
    ["keyword-only", "dataclass", "none-last", "dtypes", "scalars", "two-axes", "strided", "in-place", "identity"],
)
def test_awkward_modules_pass_and_are_right(architectures: ModuleType, tmp_path: Path, name: str) -> None:
    (result,) = outcomes(architectures, tmp_path, name, "torchscript fp32").values()
    assert (result.outcome, result.reason) == ("passed", "")
