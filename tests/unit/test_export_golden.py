"""Golden samples: a few of every class, with the checkpoint's answers, which the artifact must repeat."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.errors import GateError
from export.evaluation import LabelledRequest, load_evaluation, random_images
from export.gates import Reference, Thresholds
from export.golden import MAX_SAMPLES, choose_golden
from handlers.golden import GoldenSet
from handlers.model import ServedModel
from handlers.signature import Signature

Batch = NDArray[np.float32]


class Altered:
    """The module's own outputs, altered."""

    device = "cpu"

    def __init__(self, module: torch.nn.Module, change: Callable[[Batch], Batch] = lambda output: output) -> None:
        self._reference = Reference(module)
        self._change = change

    def run(self, batch: Batch) -> Batch:
        return self._change(self._reference.run(batch))


@pytest.fixture
def requests(signature: Signature, evaluation_folder: Path) -> list[LabelledRequest]:
    return load_evaluation(signature, folder=evaluation_folder, source=None)


@pytest.fixture
def served(module: torch.nn.Module, served_signature: Signature) -> ServedModel:
    return ServedModel(served_signature, Altered(module))


def choose(
    requests: list[LabelledRequest], module: torch.nn.Module, served: ServedModel
) -> tuple[GoldenSet, dict[str, bytes]]:
    return choose_golden(requests, Reference(module), served, Thresholds())


def test_the_first_of_each_class_come_first(
    requests: list[LabelledRequest], module: torch.nn.Module, served: ServedModel
) -> None:
    golden, files = choose(requests * 2, module, served)
    assert len(golden.samples) == len(files) == MAX_SAMPLES
    # The folder is sorted by class: bright, dark, mid, four images each.
    assert [sample.label for sample in golden.samples[:5]] == ["bright", "dark", "mid", "bright", "bright"]
    assert list(files) == [sample.file for sample in golden.samples]
    assert files["golden/001.png"] == requests[4].body


def test_they_hold_the_outputs_of_the_checkpoint(
    requests: list[LabelledRequest], module: torch.nn.Module, served: ServedModel
) -> None:
    golden, _ = choose(requests[:1], module, served)
    expected = Reference(module).run(served.decode(requests[0].parts()))[0]
    assert golden.samples[0].output == pytest.approx(expected, abs=1e-6)
    assert (golden.output_name, golden.atol, golden.rtol) == ("logits", 1e-4, 1e-3)
    assert GoldenSet.from_document(golden.to_document(), "logits") == golden


def test_random_images_serve_where_there_are_no_others(
    signature: Signature, module: torch.nn.Module, served: ServedModel
) -> None:
    images: Iterator[LabelledRequest] = random_images(signature, MAX_SAMPLES, seed=0)
    golden, _ = choose(list(images), module, served)
    assert len({sample.output for sample in golden.samples}) == MAX_SAMPLES
    assert all(sample.label in signature.labels for sample in golden.samples)


def test_a_jpeg_stays_a_jpeg(encode: Callable[..., bytes], module: torch.nn.Module, served: ServedModel) -> None:
    body = encode(np.full((8, 8), 250, dtype=np.uint8), format="JPEG")
    golden, files = choose([LabelledRequest(body=body, content_type="image/jpeg", label="bright")], module, served)
    assert files == {"golden/000.jpg": body}
    assert golden.samples[0].content_type == "image/jpeg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output: output + np.float32(0.01), r"golden/000\.png: the output differs from the checkpoint's"),
        (lambda output: output * np.nan, r"fails on a golden sample"),
    ],
)
def test_an_artifact_that_does_not_repeat_them_is_refused(
    requests: list[LabelledRequest],
    module: torch.nn.Module,
    served_signature: Signature,
    change: Callable[[Batch], Batch],
    message: str,
) -> None:
    served = ServedModel(served_signature, Altered(module, change))
    with pytest.raises(GateError, match=message):
        choose(requests, module, served)


def test_labels_in_another_order_are_refused(
    requests: list[LabelledRequest], module: torch.nn.Module, served_signature: Signature
) -> None:
    served = ServedModel(replace(served_signature, labels=("x", "y", "z")), Altered(module, lambda o: o[:, ::-1]))
    with pytest.raises(GateError, match="does not repeat its golden samples, so there is no archive"):
        choose(requests, module, served)
