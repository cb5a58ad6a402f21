"""Every format and precision that is offered on a GPU against fp32 on the CPU, and batches of every size."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from export.candidate import Candidate
from export.combinations import Combination, allowed
from export.thresholds import Thresholds
from handlers.batching import stack
from handlers.cuda_graphs import Bucket, CudaGraphs, buckets
from handlers.model import ServedModel
from handlers.onnx import OnnxBackend
from handlers.tensors import Array, TensorBatch

from .subjects import DEVICE, ENCODER, IMAGES, LONGEST, REHEARSED, SUBJECTS, Subject, random_samples

GetCandidate = Callable[[str, Combination], Candidate]

# The rehearsal leaves out what takes a CPU a minute to compile, and int8, which no GPU is offered.
COMBINATIONS = [
    combination
    for combination in allowed(DEVICE)
    if not (REHEARSED and (combination.format == "pt2" or combination.precision == "int8"))
]
# fp32, where no rounding hides a mistake, and what is measured.
EVERY_SIZE = [
    one
    for one in COMBINATIONS
    if one.precision == "fp32" or (one.precision == "bf16" and one.format in ("eager", "pt2"))
]
MAX_BATCH = 32


def reference(subject: Subject, batch: TensorBatch) -> Array:
    """fp32 on the CPU."""
    with torch.inference_mode():
        result: Array = subject.build()(*map(torch.from_numpy, batch.values())).numpy()
    return result


def assert_close(expected: Array, actual: Array, precision: str) -> None:
    """Within the bounds that the gates have for a precision."""
    thresholds = Thresholds.of(precision)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    if thresholds.atol is not None:
        np.testing.assert_allclose(actual, expected, rtol=thresholds.rtol, atol=thresholds.atol)
    else:
        noise = np.sqrt(np.square(actual - expected).mean())
        assert noise <= 2 * thresholds.noise * max(float(expected.std()), 0.1)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize("name", [ENCODER, IMAGES])
def test_an_artifact_passes_its_gates_on_the_device_that_it_names(
    candidate: GetCandidate, name: str, combination: Combination
) -> None:
    made = candidate(name, combination)
    assert made.served is not None, [gate.detail for gate in made.gates]
    assert made.served.backend.device == DEVICE
    failed = {gate.gate: gate.detail for gate in made.gates if not gate.passed}
    assert failed == {}


@pytest.mark.parametrize("combination", EVERY_SIZE, ids=str)
@pytest.mark.parametrize("name", [ENCODER, IMAGES])
def test_batches_of_every_size_at_the_limits_of_the_lengths(
    candidate: GetCandidate, name: str, combination: Combination, caplog: pytest.LogCaptureFixture
) -> None:
    """Some fill a bucket, most do not, and one is larger than all of them."""
    made = candidate(name, combination)
    served = ServedModel.load(made.folder, threads=1, max_batch=MAX_BATCH)
    if combination.format != "torchscript" and not REHEARSED:
        graphs = captured(served.backend)
        assert sorted(map(str, graphs)) == sorted(map(str, buckets(served.signature, MAX_BATCH)))
    subject = SUBJECTS[name]
    caplog.clear()
    for size in range(1, MAX_BATCH + 2):
        if size == MAX_BATCH + 1:
            # The log would say that a batch ran without a graph.
            assert [record.getMessage() for record in caplog.records if record.name == "torchport"] == []
        for length in (1, LONGEST) if name == ENCODER else (1,):
            samples = random_samples(subject, [length] * size, seed=size)
            batch = stack(samples, served.signature)
            assert_close(reference(subject, batch), served.backend.run(batch)["logits"], combination.precision)


def captured(backend: Any) -> list[Bucket]:
    """The shapes that a backend has graphs for."""
    graphs: CudaGraphs | None = backend._on_gpu._graphs if isinstance(backend, OnnxBackend) else backend._graphs
    return [] if graphs is None else graphs.captured


@pytest.mark.parametrize("combination", [one for one in COMBINATIONS if one.precision != "fp16"], ids=str)
def test_samples_of_all_lengths_answer_as_they_do_alone(candidate: GetCandidate, combination: Combination) -> None:
    served = candidate(ENCODER, combination).served
    assert served is not None
    subject = SUBJECTS[ENCODER]
    samples = random_samples(subject, [1 + (7 * i) % LONGEST for i in range(70)], seed=5)
    rows = served.compute(samples)
    assert all(isinstance(row, dict) for row in rows)
    alone = np.concatenate([reference(subject, stack([sample], served.signature)) for sample in samples])
    assert_close(alone, np.stack([row["logits"] for row in rows]), combination.precision)  # type: ignore[index]


def test_an_answer_is_the_same_after_others(candidate: GetCandidate) -> None:
    """Buffers are used again: neither an answer that was given nor the next one may change."""
    served = candidate(ENCODER, Combination(format="eager", precision="fp32", device=DEVICE)).served
    assert served is not None
    first, second = (stack(random_samples(SUBJECTS[ENCODER], [20] * 8, seed=seed), served.signature) for seed in (1, 2))
    before = served.backend.run(first)["logits"]
    kept = before.copy()
    served.backend.run(second)
    np.testing.assert_array_equal(before, kept)
    np.testing.assert_array_equal(served.backend.run(first)["logits"], kept)
