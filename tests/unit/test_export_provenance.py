"""Provenance: enough to make an archive again, and nothing that differs between two who make it."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from export.archive import open_archive
from export.checkpoint import load_checkpoint
from export.pipeline import ExportReport
from export.provenance import PROVENANCE_FILE, build_provenance, package_versions
from handlers.digests import file_sha256
from handlers.signature import Artifact


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
    assert [gate["passed"] for gate in provenance["gates"]] == [True] * 4
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


def test_the_same_facts_give_the_same_document(checkpoint: Path) -> None:
    artifact = Artifact(format="onnx", precision="fp32", file="model.onnx")
    documents = [build_provenance(load_checkpoint(checkpoint), artifact, "0", "dynamo", []) for _ in range(2)]
    assert json.dumps(documents[0]) == json.dumps(documents[1])
