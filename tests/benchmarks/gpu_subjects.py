"""What gpu_limits.py measures: an encoder as large as BERT-base, a ResNet-50, and tiny ones for rehearsals.

Weights are random, made to disagree about the inputs: their answers are as sure as a trained model's, so that a label
does not change when a batch is padded or rounded otherwise.
"""

import copy
import importlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_classifier import tell_apart
from torch import Tensor, nn

from export.combinations import Combination
from export.convert import convert
from handlers.artifact import ModuleSource
from handlers.batching import stack
from handlers.model import SIGNATURE_FILE
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch
from loadtest.pictures import generate_pictures

ENCODER, IMAGES = "encoder", "images"
CLASSES = 10
SEED = 6
# Tokens of texts: log-normal, clipped. Half of them have up to 64, one in twenty more than 170.
MEDIAN_LENGTH, SIGMA = 64, 0.6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_FITTED = 32


@dataclass(kw_only=True)
class Subject:
    """A model and its inputs.

    Attributes:
        name: ``encoder`` or ``images``.
        title: For people.
        factory: Import path of what builds it.
        config: Its arguments.
        document: The signature.
        shortest: Tokens of the shortest sample; None for images.
        slo_ms: Within which 99 of 100 answers must come, as MLPerf asks of such a model.
    """

    name: str
    title: str
    factory: str
    config: Mapping[str, Any]
    document: Mapping[str, Any]
    shortest: int | None
    slo_ms: float
    _built: nn.Module | None = field(default=None, repr=False)

    @property
    def signature(self) -> Signature:
        """The parsed signature, without an artifact."""
        return Signature.from_document(copy.deepcopy(dict(self.document)))

    def build(self) -> nn.Module:
        """A module of its own for every caller, float32 on the CPU in eval mode: the same weights every time."""
        if self._built is None:
            package, _, name = self.factory.partition(":")
            torch.manual_seed(SEED)
            module: nn.Module = getattr(importlib.import_module(package), name)(**self.config)
            samples = stack(self.samples(_FITTED, seed=SEED), self.signature)
            self._built = _fitted(module, torch.from_numpy(samples[self.input_name]))
        return copy.deepcopy(self._built)

    @property
    def input_name(self) -> str:
        """Of the only input."""
        return str(self.document["inputs"][0]["name"])

    def samples(self, count: int, *, seed: int) -> list[TensorBatch]:
        """Random samples as a worker has decoded them, without a batch axis."""
        if self.shortest is None:
            return [{self.input_name: _pixels(data)} for data in self.pictures(count, seed=seed)]
        generator = np.random.default_rng(seed)
        longest = self.config["max_length"]
        drawn = generator.lognormal(np.log(min(MEDIAN_LENGTH, longest / 4)), SIGMA, count)
        lengths = np.clip(drawn, self.shortest, longest).astype(int)
        return [{self.input_name: generator.integers(1, self.config["vocab_size"], length)} for length in lengths]

    def requests(self, count: int, *, seed: int) -> list[tuple[str, bytes]]:
        """The same samples as requests: content type and body."""
        if self.shortest is None:
            return [("image/jpeg", data) for data in self.pictures(count, seed=seed)]
        return [
            (
                "application/json",
                json.dumps({"inputs": {name: array.tolist() for name, array in sample.items()}}).encode(),
            )
            for sample in self.samples(count, seed=seed)
        ]

    def pictures(self, count: int, *, seed: int) -> Sequence[bytes]:
        """JPEG photographs."""
        size = self.document["preprocessing"]["image"]["height"]
        return generate_pictures(count, height=size, width=size, seed=seed)

    def write_artifact(self, folder: Path, combination: Combination) -> Signature:
        """Convert into a new folder, without gates: tests/gpu has those."""
        folder.mkdir(parents=True)
        artifact = convert(
            self.build(),
            self.signature,
            folder,
            combination=combination,
            origin=ModuleSource(factory=self.factory, config=dict(self.config)),
        )
        signature = self.signature.with_artifact(artifact)
        (folder / SIGNATURE_FILE).write_text(json.dumps(signature.to_document()), encoding="utf-8")
        return signature


def build_subjects(*, tiny: bool) -> dict[str, Subject]:
    """Both subjects by name; tiny ones take a CPU milliseconds."""
    longest = 32 if tiny else 256
    encoder = {
        "vocab_size": 512 if tiny else 30522,
        "num_classes": CLASSES,
        "hidden_dim": 32 if tiny else 768,
        "num_layers": 2 if tiny else 12,
        "num_heads": 2 if tiny else 12,
        "intermediate_dim": 64 if tiny else 3072,
        "max_length": longest,
    }
    resnet = {"blocks": [1, 1, 1, 1] if tiny else [3, 4, 6, 3], "width": 8 if tiny else 64, "num_classes": CLASSES}
    size = 32 if tiny else 224
    ids = {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "padding": 0}
    ids |= {"minimum": 0, "maximum": encoder["vocab_size"] - 1}
    image = {"mode": "RGB", "height": size, "width": size, "mean": list(MEAN), "std": list(STD)}
    shared = {
        "format_version": 1,
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", CLASSES]}],
    }
    return {
        ENCODER: Subject(
            name=ENCODER,
            title="tiny encoder" if tiny else "encoder of BERT-base's size",
            factory="models.text_encoder:build_text_classifier",
            config=encoder,
            document={
                **shared,
                "task": "tensor",
                "inputs": [ids],
                "axes": {"length": {"minimum": 1, "maximum": longest}},
            },
            shortest=4 if tiny else 16,
            slo_ms=130,
        ),
        IMAGES: Subject(
            name=IMAGES,
            title="tiny ResNet" if tiny else "ResNet-50",
            factory="gpu_resnet:build_resnet",
            config=resnet,
            document={
                **shared,
                "task": "image-classification",
                "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 3, size, size]}],
                "labels": [f"class{number}" for number in range(CLASSES)],
                "preprocessing": {"image": image},
            },
            shortest=None,
            slo_ms=15,
        ),
    }


def _fitted(module: nn.Module, inputs: Tensor) -> nn.Module:
    """Give normalisations the statistics of these inputs, and the last layer logits that tell them apart."""
    features: list[Tensor] = []
    classifier: nn.Linear = module.get_submodule("classifier")  # type: ignore[assignment]
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the plain mean
            if isinstance(layer, nn.Embedding):
                layer.weight[1:].normal_()  # as large as what the layers add to them
        module.train()(inputs)
        hook = classifier.register_forward_hook(lambda layer, given, output: features.append(given[0]))
        module.eval()(inputs)
        hook.remove()
        tell_apart(classifier, features[0])
    return module


def _pixels(data: bytes) -> Array:
    """[3, H, W] float32, normalised as the signature says."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) / 255
    return np.ascontiguousarray(((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1))
