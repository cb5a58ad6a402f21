"""A model small enough to reason about, and what the packages make of it.

It tells grey images apart by their brightness: dark, mid or bright, with borders at one standard deviation from the
mean. So wrong normalisation costs accuracy, and a transposed image, a wrong epsilon or a changed weight moves outputs.
"""

import copy
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from export.archive import open_archive
from export.pipeline import ExportOptions, export_archive
from handlers.request import Part
from handlers.signature import Artifact, Signature
from models.convnet import build_conv_classifier

from . import backend_subject

MEAN, STD, SIZE = 0.5, 0.25, 8
LABELS = ("dark", "mid", "bright")
CONFIG = {"in_channels": 1, "num_classes": 3, "widths": [4]}
# In standard deviations from the mean; close enough to the borders that small shifts cross them.
LEVELS = {"dark": (-1.9, -1.5, -1.3, -1.1), "mid": (-0.8, -0.4, 0.3, 0.8), "bright": (1.1, 1.3, 1.5, 1.9)}

SIGNATURE = {
    "format_version": 1,
    "task": "image-classification",
    "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 1, SIZE, SIZE]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 3]}],
    "labels": list(LABELS),
    "preprocessing": {"image": {"mode": "L", "height": SIZE, "width": SIZE, "mean": [MEAN], "std": [STD]}},
}


def _brightness_module():
    module = build_conv_classifier(**CONFIG)
    generator = torch.Generator().manual_seed(0)
    kernel = torch.zeros(4, 1, 3, 3)
    kernel[0, 0, 1, 1], kernel[1, 0, 1, 1] = 1.0, -1.0
    kernel[2:] = torch.randn(2, 1, 3, 3, generator=generator)  # not symmetric: sees a transposed image
    variance = 0.01
    state = {
        "features.0.conv.weight": kernel,
        "features.0.bn.weight": torch.ones(4),
        "features.0.bn.bias": torch.zeros(4),
        "features.0.bn.running_mean": torch.zeros(4),
        "features.0.bn.running_var": torch.full((4,), variance),
        "features.0.bn.num_batches_tracked": torch.tensor(0),
        "classifier.weight": torch.tensor([[0.0, 1, 1e-3, 0], [0, 0, 0, 0], [1, 0, 0, 1e-3]]) * variance**0.5,
        "classifier.bias": torch.tensor([0.0, 1.0, 0.0]),
    }
    module.load_state_dict(state)
    return module.eval()


def _pixels(level):
    return np.full((SIZE, SIZE), round((MEAN + STD * level) * 255), dtype=np.uint8)


def _encode(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def signature_document():
    """A fresh copy of a good signature, without an artifact."""
    return copy.deepcopy(SIGNATURE)


@pytest.fixture(scope="session")
def signature():
    return Signature.from_document(SIGNATURE)


@pytest.fixture(scope="session")
def encode():
    """Encodes pixels or a Pillow image as PNG or another format."""
    return _encode


@pytest.fixture(scope="session")
def picture():
    """PNG bytes of the first image of a label."""
    return lambda label: _encode(_pixels(LEVELS[label][0]))


@pytest.fixture(scope="session")
def png_request(picture):
    """The fields of a request that asks for the first image of a label."""
    return lambda label: [Part(value=picture(label), content_type="image/png")]


@pytest.fixture
def module():
    """The brightness classifier, in eval mode; each test may change its own."""
    return _brightness_module()


@pytest.fixture
def checkpoint_content():
    """A fresh checkpoint, as training writes it; pass it to ``torch.save``."""
    return _checkpoint_content()


def _checkpoint_content():
    return {
        "format": "torchport-checkpoint",
        "format_version": 1,
        "model": {"factory": "models.convnet:build_conv_classifier", "config": CONFIG},
        "state_dict": dict(_brightness_module().state_dict()),
        "signature": copy.deepcopy(SIGNATURE),
        "evaluation": None,
        "metrics": {"accuracy": 1.0, "loss": 0.1, "samples": 12},
        "epoch": 1,
        "recipe": {"name": "brightness"},
        "versions": {"torch": str(torch.__version__)},
        "git_revision": None,
    }


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    torch.save(_checkpoint_content(), path)
    return path


@pytest.fixture(scope="session")
def evaluation_folder(tmp_path_factory):
    """Labelled images, one sub-folder a label; the checkpoint gets all of them right."""
    folder = tmp_path_factory.mktemp("evaluation")
    for label, levels in LEVELS.items():
        (folder / label).mkdir()
        for i, level in enumerate(levels):
            (folder / label / f"{i}.png").write_bytes(_encode(_pixels(level)))
    return folder


@pytest.fixture(scope="session")
def exported(checkpoint, evaluation_folder, tmp_path_factory):
    """The report of a real export by format; each is made when it is first asked for."""
    reports = {}

    def export(format):
        if format not in reports:
            store = tmp_path_factory.mktemp("store")
            options = ExportOptions(
                source=checkpoint, name="brightness", format=format, evaluation=evaluation_folder, out=store
            )
            reports[format] = export_archive(options)
        return reports[format]

    return export


@pytest.fixture(scope="session")
def archive(exported):
    """An exported TorchScript archive. Nobody writes to it: copy it first."""
    return exported("torchscript").archive


@pytest.fixture(scope="session")
def extracted(archive, tmp_path_factory):
    """The TorchScript archive, extracted as TorchServe does. Nobody writes to it: copy it first."""
    folder = tmp_path_factory.mktemp("extracted")
    open_archive(archive).extract(folder)
    return folder


@pytest.fixture(scope="session")
def served_signature(signature):
    """The signature of a model that is computed by a TorchScript artifact."""
    return signature.with_artifact(Artifact(format="torchscript", precision="fp32", file="model.pt"))


class FakeBackend:
    """Computes logits from a function of one image; counts its batches."""

    device = "cpu"
    holds_lock = False

    def __init__(self, compute):
        self._compute = compute
        self.batch_sizes = []

    def run(self, batch):
        images = batch["image"]
        self.batch_sizes.append(len(images))
        return {"logits": np.stack([self._compute(image) for image in images]).astype(np.float32)}


@pytest.fixture
def brightness_backend():
    """Answers with the same label as the real module, without an artifact."""

    def compute(sample):
        level = float(sample.mean())
        return np.array([-level, 1.0, level])

    return FakeBackend(compute)


@pytest.fixture(scope="session")
def fake_backend():
    """Builds a backend from a function of one sample."""
    return FakeBackend


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with an artifact of ``backend_subject``, by format; each is made when it is first asked for."""
    folders = {}

    def build(format):
        if format not in folders:
            folder = tmp_path_factory.mktemp(format)
            backend_subject.write(format, folder)
            folders[format] = folder
        return folders[format]

    return build


@pytest.fixture
def _process_as_it_was(monkeypatch):
    """Threads, imports and the path of this process, which a worker would keep to itself."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "0")
    yield
    torch.set_num_threads(threads)
    sys.modules.pop(backend_subject.PACKAGE, None)
