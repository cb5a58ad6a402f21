"""The device that an artifact names is the one that it runs on, or it does not load; and its memory running out."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from export.candidate import Candidate
from export.combinations import Combination
from handlers.backend import build_backend
from handlers.cuda_graphs import CudaGraphs
from handlers.cuda_recorder import CudaRecorder
from handlers.errors import BackendError, RequestError
from handlers.model import ServedModel
from handlers.signature import Signature
from handlers.staging import Staging
from handlers.tensors import Array, TensorBatch
from handlers.torch_device import torch_device

from .subjects import DEVICE, ENCODER, IMAGES, LONGEST, REHEARSED, SUBJECTS, random_samples

GetCandidate = Callable[[str, Combination], Candidate]

WIDTH = 8
MEMORY = 512 << 20
# So that sixteen fit into the memory that the test leaves, and thirty-two do not.
BYTES_A_SAMPLE = MEMORY // 24
needs_gpu = pytest.mark.skipif(REHEARSED, reason="a rehearsal has no GPU")


@needs_gpu
@pytest.mark.parametrize("format", ["eager", "torchscript", "pt2", "onnx"])
def test_a_gpu_that_is_not_there_is_refused(candidate: GetCandidate, format: str) -> None:
    made = candidate(ENCODER, Combination(format=format, precision="fp32", device=DEVICE))
    with pytest.raises(BackendError, match=r"to run on GPU|does not load in ONNX Runtime|chose"):
        build_backend(made.signature, made.folder, threads=1, gpu=torch.cuda.device_count())


@needs_gpu
def test_a_model_for_which_memory_is_short_is_refused_with_figures(candidate: GetCandidate) -> None:
    made = candidate(ENCODER, Combination(format="eager", precision="fp32", device=DEVICE))
    # In a process of its own: what torch has allocated here would do.
    code = (
        "from pathlib import Path\n"
        "from handlers.model import ServedModel\n"
        f"ServedModel.load(Path({str(made.folder)!r}), threads=1, gpu_memory_bytes=1 << 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert re.search(r"BackendError: the model needs .* for its weights, and the worker may take 1 MiB", done.stderr)


@needs_gpu
def test_a_capture_that_fails_leaves_the_gpu_as_it_was() -> None:
    signature, device = _signature(), torch_device(DEVICE)
    staging = Staging.on(device, signature)
    batch = {"x": np.ones((3, WIDTH), np.float32)}

    def looks(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [2 * tensors[0] if tensors[0].sum().item() > 0 else tensors[0]]

    graphs = CudaGraphs(signature, staging, CudaRecorder(device, looks, tune=False), max_batch=4)
    assert graphs.captured == []
    assert graphs.run(batch) is None
    np.testing.assert_array_equal(staging.run(batch, looks)["y"], 2 * batch["x"])
    # The generator would take it for part of the capture.
    assert torch.rand(9, device=device).shape == (9,)
    graphs = CudaGraphs(signature, staging, CudaRecorder(device, lambda given: [2 * given[0]], tune=True), max_batch=4)
    assert len(graphs.captured) == 3
    outputs = graphs.run(batch)
    assert outputs is not None
    np.testing.assert_array_equal(outputs["y"], 2 * batch["x"])


@needs_gpu
@pytest.mark.parametrize("name", [ENCODER])
def test_code_compiled_for_a_gpu_is_refused_on_a_cpu(candidate: GetCandidate, name: str) -> None:
    made = candidate(name, Combination(format="pt2", precision="fp32", device=DEVICE))
    claimed = dataclasses.replace(made.artifact, device="cpu")
    with pytest.raises(BackendError, match="compiled for cuda"):
        build_backend(made.signature.with_artifact(claimed), made.folder, threads=1)


@needs_gpu
def test_every_gpu_gives_the_same_answers(candidate: GetCandidate) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    made = candidate(IMAGES, Combination(format="eager", precision="fp32", device=DEVICE))
    samples = random_samples(SUBJECTS[IMAGES], [1] * 5, seed=9)
    answers = []
    for gpu in range(torch.cuda.device_count()):
        before = torch.cuda.memory_allocated(gpu)
        served = ServedModel.load(made.folder, threads=1, gpu=gpu)
        assert torch.cuda.memory_allocated(gpu) > before
        answers.append([row["logits"] for row in served.compute(samples)])  # type: ignore[index]
    for other in answers[1:]:
        np.testing.assert_allclose(other, answers[0], rtol=1e-3, atol=1e-4)


class Greedy:
    """Doubles its input, and takes memory in proportion to the batch meanwhile."""

    device = DEVICE
    holds_lock = False

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.freed = 0

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        (values,) = batch.values()
        self.sizes.append(len(values))
        if REHEARSED:
            if len(values) * BYTES_A_SAMPLE > MEMORY:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return {"y": 2 * values}
        held = torch.empty(len(values) * BYTES_A_SAMPLE, dtype=torch.uint8, device=DEVICE)
        result: Array = (2 * torch.from_numpy(values).to(DEVICE)).cpu().numpy()
        del held
        return {"y": result}

    def free_memory(self) -> None:
        self.freed += 1
        torch.cuda.empty_cache()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Leave this process half a gigabyte more of the GPU than it has."""
    if REHEARSED:
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + MEMORY) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def _signature() -> Signature:
    document: Mapping[str, object] = {
        "format_version": 1,
        "task": "tensor",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", WIDTH]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", WIDTH]}],
    }
    return Signature.from_document(dict(document))


@pytest.mark.usefixtures("little_memory")
def test_a_batch_for_which_memory_is_short_is_split() -> None:
    backend = Greedy()
    served = ServedModel(_signature(), backend, max_batch=32)
    samples = [{"x": np.full(WIDTH, i, np.float32)} for i in range(32)]
    rows = served.compute(samples)
    assert not [row for row in rows if isinstance(row, RequestError)]
    np.testing.assert_array_equal(
        np.stack([row["y"] for row in rows]),  # type: ignore[index]
        2 * np.stack([sample["x"] for sample in samples]),
    )
    assert backend.sizes == [32, 16, 16]
    if not REHEARSED:  # what the CPU is short of is not a GPU's memory
        assert backend.freed >= 1
        backend.sizes.clear()
        served.compute(samples)
        assert max(backend.sizes) < 32, "the size that failed is not tried again"


@needs_gpu
@pytest.mark.usefixtures("little_memory")
def test_a_model_goes_on_after_memory_was_short(candidate: GetCandidate) -> None:
    made = candidate(ENCODER, Combination(format="eager", precision="fp32", device=DEVICE))
    assert made.served is not None
    greedy = Greedy()
    with pytest.raises(torch.OutOfMemoryError):
        greedy.run({"x": np.zeros((64, WIDTH), np.float32)})
    rows = made.served.compute(random_samples(SUBJECTS[ENCODER], [LONGEST] * 4, seed=2))
    assert all(isinstance(row, dict) for row in rows)
