"""What gpu_limits.py measures: an encoder as large as BERT-base, a ResNet-50, and tiny ones for rehearsals."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export.convert import convert
from export.combinations import Combination
from handlers.artifact import ModuleSource
from handlers.model import SIGNATURE_FILE
from handlers.signature import Signature
from handlers.tensors import TensorBatch

ENCODER, IMAGES = "encoder", "images"
SEED = 6
# Tokens of texts: log-normal, clipped. Half of them have up to 64, one in twenty more than 170.
MEDIAN_LENGTH, SIGMA = 64, 0.6


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and its inputs.

    Attributes:
        name: ``encoder`` or ``images``.
        title: For people.
        factory: Import path of what builds it.
        config: Its arguments.
        document: The signature.
        lengths: Shortest and longest sample; None for images.
        slo_ms: Within which 99 of 100 answers must come, as MLPerf asks of such a model.
    """

    name: str
    title: str
    factory: str
    config: Mapping[str, Any]
    document: Mapping[str, Any]
    lengths: tuple[int, int] | None
    slo_ms: float

    @property
    def signature(self) -> Signature:
        """The parsed signature, without an artifact."""
        return Signature.from_document(dict(self.document))

    def build(self) -> nn.Module:
        """The module, float32 on the CPU in eval mode: the same weights every time."""
        package, _, name = self.factory.partition(":")
        torch.manual_seed(SEED)
        module: nn.Module = getattr(importlib.import_module(package), name)(**self.config)
        return module.eval()

    def samples(self, count: int, *, seed: int) -> list[TensorBatch]:
        """Random samples as requests bring them, without a batch axis."""
        generator = np.random.default_rng(seed)
        if self.lengths is None:
            shape = tuple(self.document["inputs"][0]["shape"][1:])
            return [{"image": generator.standard_normal(shape, dtype=np.float32)} for _ in range(count)]
        shortest, longest = self.lengths
        drawn = generator.lognormal(np.log(min(MEDIAN_LENGTH, longest / 4)), SIGMA, count)
        return [
            {"input_ids": generator.integers(1, self.config["vocab_size"], int(np.clip(length, shortest, longest)))}
            for length in drawn
        ]

    def write_artifact(self, folder: Path, combination: Combination) -> None:
        """Convert into an empty folder, without gates: tests/gpu has those."""
        folder.mkdir(parents=True)
        artifact = convert(
            self.build(),
            self.signature,
            folder,
            combination=combination,
            origin=ModuleSource(factory=self.factory, config=dict(self.config)),
        )
        document = self.signature.with_artifact(artifact).to_document()
        (folder / SIGNATURE_FILE).write_text(json.dumps(document), encoding="utf-8")


def build_subjects(*, tiny: bool) -> dict[str, Subject]:
    """Both subjects by name; tiny ones take a CPU milliseconds."""
    longest = 32 if tiny else 256
    encoder = {
        "vocab_size": 512 if tiny else 30522,
        "num_classes": 4,
        "hidden_dim": 32 if tiny else 768,
        "num_layers": 2 if tiny else 12,
        "num_heads": 2 if tiny else 12,
        "intermediate_dim": 64 if tiny else 3072,
        "max_length": longest,
    }
    resnet = {
        "blocks": [1, 1, 1, 1] if tiny else [3, 4, 6, 3],
        "width": 8 if tiny else 64,
        "num_classes": 10 if tiny else 1000,
    }
    size = 32 if tiny else 224
    ids = {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "padding": 0}
    ids |= {"minimum": 0, "maximum": encoder["vocab_size"] - 1}
    return {
        ENCODER: Subject(
            name=ENCODER,
            title="tiny encoder" if tiny else "encoder of BERT-base's size",
            factory="models.text_encoder:build_text_classifier",
            config=encoder,
            document=_document(ids, classes=4, axes={"length": {"minimum": 1, "maximum": longest}}),
            lengths=(4 if tiny else 16, longest),
            slo_ms=130,
        ),
        IMAGES: Subject(
            name=IMAGES,
            title="tiny ResNet" if tiny else "ResNet-50",
            factory="gpu_resnet:build_resnet",
            config=resnet,
            document=_document(
                {"name": "image", "dtype": "float32", "shape": ["batch", 3, size, size]}, classes=resnet["num_classes"]
            ),
            lengths=None,
            slo_ms=15,
        ),
    }


def _document(tensor: dict[str, Any], *, classes: int, axes: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "format_version": 1,
        "task": "tensor",
        "inputs": [tensor],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", classes]}],
        **({"axes": axes} if axes else {}),
    }
