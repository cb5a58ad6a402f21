"""The models of the GPU tests: a small encoder with a dynamic length and a small convolutional classifier."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from handlers.tensors import TensorBatch
from models.convnet import build_conv_classifier
from models.text_encoder import build_text_classifier

DEVICE = os.environ.get("TORCHPORT_GPU_TESTS_ON", "cuda")
REHEARSED = DEVICE == "cpu"

ENCODER, IMAGES = "encoder", "images"
LONGEST = 48
SIZE = 16
CLASSES = 4
_ENCODER_CONFIG = {
    "vocab_size": 256,
    "num_classes": CLASSES,
    "hidden_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_dim": 128,
    "max_length": LONGEST,
}
_IMAGES_CONFIG = {"in_channels": 3, "num_classes": CLASSES, "widths": [8, 16, 32]}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with weights that are the same every time."""

    name: str
    factory: str
    config: Mapping[str, Any]
    document: str
    build: Callable[[], nn.Module]
    sample: Callable[[np.random.Generator, int], TensorBatch]
    """A sample of a length, without a batch axis."""


def _build_encoder() -> nn.Module:
    torch.manual_seed(3)
    module = build_text_classifier(**_ENCODER_CONFIG).eval()
    with torch.no_grad():
        module.token_embedding.weight[1:].normal_()
    return module


def _build_images() -> nn.Module:
    torch.manual_seed(4)
    module = build_conv_classifier(**_IMAGES_CONFIG)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the plain mean
        module.train()(torch.randn(32, 3, SIZE, SIZE))
    return module.eval()


def _document(tensor: dict[str, Any], axes: dict[str, Any]) -> str:
    return json.dumps(
        {
            "format_version": 1,
            "task": "tensor",
            "inputs": [tensor],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", CLASSES]}],
            **axes,
        }
    )


SUBJECTS = {
    ENCODER: Subject(
        name=ENCODER,
        factory="models.text_encoder:build_text_classifier",
        config=_ENCODER_CONFIG,
        document=_document(
            {
                "name": "input_ids",
                "dtype": "int64",
                "shape": ["batch", "length"],
                "minimum": 0,
                "maximum": _ENCODER_CONFIG["vocab_size"] - 1,
                "padding": 0,
            },
            {"axes": {"length": {"minimum": 1, "maximum": LONGEST}}},
        ),
        build=_build_encoder,
        sample=lambda generator, length: {"input_ids": generator.integers(1, _ENCODER_CONFIG["vocab_size"], length)},
    ),
    IMAGES: Subject(
        name=IMAGES,
        factory="models.convnet:build_conv_classifier",
        config=_IMAGES_CONFIG,
        document=_document({"name": "image", "dtype": "float32", "shape": ["batch", 3, SIZE, SIZE]}, {}),
        build=_build_images,
        sample=lambda generator, length: {"image": generator.standard_normal((3, SIZE, SIZE), dtype=np.float32)},
    ),
}


def random_samples(subject: Subject, lengths: Sequence[int], *, seed: int) -> list[TensorBatch]:
    """One sample of each length."""
    generator = np.random.default_rng(seed)
    return [subject.sample(generator, length) for length in lengths]
