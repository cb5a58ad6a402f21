"""Provenance: enough to make an archive again, and nothing that differs between two who make it."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from export.archive import PROVENANCE_FILE, open_archive
from export.pipeline import ExportReport
from export.provenance import package_versions
from handlers.digests import file_sha256
from handlers.isa import cpu_isa


def test_an_archive_says_what_it_was_made_of(exported: Callable[[str], ExportReport], checkpoint: Path) -> None:
    archive = open_archive(exported("onnx").archive)
    provenance = archive.read_json(PROVENANCE_FILE)
    assert provenance["checkpoint"]["sha256"] == file_sha256(checkpoint)
    assert provenance["checkpoint"]["metrics"] == {"accuracy": 1.0, "loss": 0.1, "samples": 12}
    assert provenance["checkpoint"]["recipe"] == {"name": "brightness"}
    assert provenance["model"]["factory"] == "models.convnet:build_conv_classifier"
    assert provenance["model"]["config"] == {"in_channels": 1, "num_classes": 3, "widths": [4]}
    assert provenance["artifact"]["sha256"] == archive.digests["model.onnx"]
    assert provenance["artifact"]["method"] == "dynamo"
    assert [gate["passed"] for gate in provenance["gates"]] == [True] * 13
    assert provenance["versions"]["torch"] == metadata.version("torch")


def test_the_method_of_torchscript_is_told(archive: Path) -> None:
    assert open_archive(archive).read_json(PROVENANCE_FILE)["artifact"]["method"] == "trace"


def test_no_paths_are_in_it(archive: Path, checkpoint: Path) -> None:
    text = open_archive(archive).read(PROVENANCE_FILE).decode()
    assert str(checkpoint.parent) not in text
    assert str(Path(torch.__file__).parents[2]) not in text


def test_versions_name_the_runtime_that_is_installed() -> None:
    versions = package_versions()
    assert {"python", "torchport", "torch", "onnx", "torchserve"} <= set(versions)
    assert {"onnxruntime", "onnxruntime-gpu"} & set(versions)


def test_what_a_reader_needs_to_judge_the_gates_is_told(archive: Path) -> None:
    provenance = open_archive(archive).read_json(PROVENANCE_FILE)
    assert provenance["thresholds"]["atol"] == 1e-4
    assert provenance["evaluated"] == 12
    assert provenance["machine"]["isa"] == cpu_isa()
    assert provenance["artifact"]["shapes"] == {"image": ["batch", 1, 8, 8], "logits": ["batch", 3]}
    assert provenance["artifact"]["device"] == "cpu"
    assert "calibration" not in provenance["artifact"]


def test_the_operator_sets_of_a_graph_are_told(exported: Callable[[str], ExportReport]) -> None:
    report = exported("onnx")
    assert report.archive is not None
    assert open_archive(report.archive).read_json(PROVENANCE_FILE)["artifact"]["opsets"]["ai.onnx"] >= 18
