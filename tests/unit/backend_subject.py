"""A tiny module with two inputs, two outputs and a dynamic length, and an artifact of it in every format."""

import contextlib
import shutil
import warnings

import numpy as np
import pytest
import torch

from export import onnx_graph, pt2
from export.combinations import Combination, refusal
from handlers.artifact import Artifact, ModuleSource
from handlers.backend import build_backend
from handlers.calling import NamedModule
from handlers.isa import cpu_isa
from handlers.signature import TENSOR, Signature
from handlers.tensors import Axis, TensorSpec

# The source of an eager archive, which the other formats are made of as well.
SOURCE = '''
"""Two inputs, two outputs, a dynamic length."""
import torch


class Tokens(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, width)
        self.head = torch.nn.Linear(width, 3)

    def forward(self, weights, ids):
        tokens = self.embedding(ids) * weights.unsqueeze(-1)
        return {"tokens": tokens, "pooled": self.head(tokens.sum(1))}


def build(width):
    return Tokens(width)
'''
SIGNATURE = Signature(
    task=TENSOR,
    inputs=(
        TensorSpec(name="ids", dtype="int64", shape=("batch", "length"), minimum=0, maximum=9, padding=0),
        TensorSpec(name="weights", dtype="float32", shape=("batch", "length"), minimum=0, maximum=1, padding=0),
    ),
    outputs=(
        TensorSpec(name="pooled", dtype="float32", shape=("batch", 3)),
        TensorSpec(name="tokens", dtype="float32", shape=("batch", "length", 4)),
    ),
    axes={"length": Axis(minimum=1, maximum=16)},
)
NAMES = [spec.name for spec in SIGNATURE.inputs], [spec.name for spec in SIGNATURE.outputs]
FILES = {"torchscript": "model.pt", "onnx": "model.onnx", "pt2": "model.pt2", "eager": "weights.pt"}
FORMATS = tuple(FILES)
# The one from which eager artifacts are built has a name that nothing else here has.
PACKAGE = "tokens_of_an_archive"


@contextlib.contextmanager
def quietly():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def module():
    scope = {}
    exec(SOURCE, scope)
    torch.manual_seed(0)
    return scope["build"](4).eval()


def arrays(batch=2, length=5):
    random = np.random.default_rng(batch * 100 + length)
    ids = random.integers(0, 10, (batch, length))
    return {"ids": ids, "weights": random.random((batch, length), dtype=np.float32)}


def tensors(batch=2, length=5):
    return tuple(torch.from_numpy(array) for array in arrays(batch, length).values())


def write_torchscript(named, path):
    torch.jit.trace(named, tensors()).save(str(path))


def write_onnx(named, path):
    onnx_graph.write_onnx(named, SIGNATURE, tensors(), path, fuse=False)


def write_pt2(named, path):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    if (reason := refusal(Combination(format="pt2", precision="fp32"))) is not None:
        pytest.skip(reason)
    pt2.write_pt2(named, SIGNATURE, tensors(), path, device="cpu")


def write_eager(named, path):
    torch.save(named.module.state_dict(), path)
    (path.parent / "source").mkdir()
    (path.parent / "source" / f"{PACKAGE}.py").write_text(SOURCE)


def write(format, folder):
    """Write the artifact of a format into a folder."""
    with quietly():
        WRITERS[format](NamedModule(module(), *NAMES), folder / FILES[format])


WRITERS = {"torchscript": write_torchscript, "onnx": write_onnx, "pt2": write_pt2, "eager": write_eager}


def artifact(format, **changes):
    fields = {"format": format, "precision": "fp32", "file": FILES[format]}
    if format == "pt2":
        fields["requires"] = {"torch": str(torch.__version__), "isa": cpu_isa()}
    if format == "eager":
        fields["module"] = ModuleSource(factory=f"{PACKAGE}:build", config={"width": 4})
    return Artifact(**{**fields, **changes})


def load(folder, format, *, signature=SIGNATURE, threads=1, max_batch=0, **changes):
    signature = signature.with_artifact(artifact(format, **changes))
    return build_backend(signature, folder, threads=threads, max_batch=max_batch)


def expected(batch):
    with torch.inference_mode():
        outputs = module()(torch.from_numpy(batch["weights"]), torch.from_numpy(batch["ids"]))
    return {name: outputs[name].numpy() for name in NAMES[1]}
