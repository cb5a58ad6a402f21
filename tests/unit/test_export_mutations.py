"""A part of tests/benchmarks/mutations.py: faults of every kind are refused, and clean exports pass."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# One of each kind, by what it takes to see them; the benchmark has them all.
FAULTS = (
    ("one weight changed", "onnx", "fp32"),
    ("NaN in a weight", "torchscript", "fp32"),
    ("batch norm in training mode", "torchscript", "fp32"),
    ("transposed images", "onnx", "int8"),
    ("labels reversed", "onnx", "int8"),
    ("wrong mean", "onnx", "int8"),
    ("rows in another order", "torchscript", "int8"),
    ("int8 scale 1.5 times", "onnx", "int8"),
    ("inputs read as another unit", "torchscript", "int8"),
    ("mask ignored", "onnx", "fp32"),
    ("sign of one row", "torchscript", "fp32"),
)


@pytest.fixture(scope="module")
def mutations() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import mutations

    yield mutations
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def subjects(mutations: Any, scratch: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    runs = tmp_path_factory.mktemp("runs")
    mutations.train(runs, ("digits",))
    return mutations.Subjects(runs, scratch)


def test_the_catalogue_has_thirty_faults_and_more_clean_exports(mutations: Any) -> None:
    assert len({fault.name for fault in mutations.FAULTS}) >= 30
    assert len({(fault.format, fault.precision) for fault in mutations.FAULTS}) == 5
    assert len(mutations.clean_exports()) >= 30


@pytest.mark.parametrize(("name", "format", "precision"), FAULTS)
def test_a_fault_is_refused(
    mutations: Any, subjects: Any, scratch: Path, name: str, format: str, precision: str
) -> None:
    fault = next(
        one
        for one in mutations.FAULTS
        if (one.name, one.format, one.precision) == (name, format, precision) and one.subject != "tickets"
    )
    ((_, failed),) = mutations.run_faults(subjects, [fault], scratch)
    assert failed


@pytest.mark.parametrize("subject", ["digits", "mixer"])
def test_a_clean_export_passes(mutations: Any, subjects: Any, scratch: Path, subject: str) -> None:
    exports = [one for one in mutations.clean_exports() if one.subject == subject and one.seed in (None, 1)][:5]
    for clean, results in mutations.run_clean(subjects, exports, scratch):
        assert [result.detail for result in results if not result.passed] == [], clean
