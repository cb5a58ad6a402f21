"""Golden samples: a few of every class, with answers that the artifact repeats and that no rounding flips."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.errors import GateError
from export.evaluation import LabelledRequest, load_evaluation, random_requests
from export.golden import MAX_SAMPLES, choose_golden
from export.reference import Reference
from export.thresholds import Thresholds
from handlers.errors import GoldenError
from handlers.golden import GoldenSet
from handlers.model import ServedModel
from handlers.signature import Signature
from handlers.tensors import Array

FP32, INT8 = Thresholds.of("fp32"), Thresholds.of("int8")
Change = Callable[[Array], Array]


class Altered:
    """The module's own logits, altered."""

    device = "cpu"

    def __init__(self, reference: Reference, change: Change) -> None:
        self._reference = reference
        self._change = change

    def run(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        return {name: self._change(values) for name, values in self._reference.run(batch).items()}


@pytest.fixture
def requests(signature: Signature, evaluation_folder: Path) -> list[LabelledRequest]:
    return load_evaluation(signature, data=evaluation_folder, source=None)


@pytest.fixture
def choose(
    module: torch.nn.Module, served_signature: Signature
) -> Callable[..., tuple[GoldenSet, dict[str, bytes], ServedModel]]:
    def choose(
        requests: list[LabelledRequest], precision: str = "fp32", change: Change = lambda logits: logits
    ) -> tuple[GoldenSet, dict[str, bytes], ServedModel]:
        artifact = served_signature.artifact
        assert artifact is not None
        signature = served_signature.with_artifact(replace(artifact, precision=precision))
        reference = Reference.of(module, signature)
        served = ServedModel(signature, Altered(reference, change))
        return *choose_golden(requests, reference, served, Thresholds.of(precision)), served

    return choose


def write(golden: GoldenSet, files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "golden/expected.json").write_text(json.dumps(golden.to_document()))


def recorded(golden: GoldenSet, files: dict[str, bytes]) -> list[Array]:
    return [np.load(io.BytesIO(files[sample.outputs["logits"]]), allow_pickle=False) for sample in golden.samples]


def test_the_first_of_each_class_come_first(requests: list[LabelledRequest], choose: Callable[..., tuple]) -> None:
    golden, files, _ = choose(requests * 2)
    assert len(golden.samples) == MAX_SAMPLES
    # The folder is sorted by class: bright, dark, mid, four images each.
    assert [sample.label for sample in golden.samples[:5]] == ["bright", "dark", "mid", "bright", "bright"]
    assert files["golden/001.png"] == requests[4].body
    assert golden.samples[1].outputs == {"logits": "golden/001.logits.npy"}
    assert len(files) == 2 * MAX_SAMPLES


def test_fp32_records_the_checkpoints_outputs(
    requests: list[LabelledRequest], module: torch.nn.Module, choose: Callable[..., tuple]
) -> None:
    golden, files, served = choose(requests[:1], "fp32", lambda logits: logits + np.float32(0.01))
    batch = {"image": served.decode(requests[0].parts())[0]["image"][np.newaxis]}
    expected = Reference.of(module, served.signature).run(batch)["logits"][0]
    (values,) = recorded(golden, files)
    assert values.dtype == np.float32
    assert values == pytest.approx(expected, abs=1e-6)
    assert golden.rtol == 1e-3
    size = float(np.sqrt(np.square(expected).mean()))
    assert golden.atol == {"logits": pytest.approx(1e-4 * size, rel=0.05)}
    assert GoldenSet.from_document(golden.to_document()) == golden


def test_lower_precisions_record_the_artifacts_outputs_with_twice_their_distance(
    requests: list[LabelledRequest], choose: Callable[..., tuple]
) -> None:
    shift = np.float32([0.02, 0.0, -0.01])
    golden, files, served = choose(requests, "int8", lambda logits: logits + shift)
    assert golden.atol == {"logits": pytest.approx(0.04, rel=0.05)}
    for sample, values in zip(golden.samples, recorded(golden, files), strict=True):
        (answer,) = served.answer([[*LabelledRequest(body=files[sample.file], content_type="image/png").parts()]])
        assert values == pytest.approx(answer.outputs[0]["logits"], abs=1e-6)


def test_samples_whose_label_rounding_could_flip_are_left_out(
    requests: list[LabelledRequest], choose: Callable[..., tuple]
) -> None:
    everything, _, _ = choose(requests, "int8")
    noisy, files, _ = choose(requests, "int8", lambda logits: logits + np.float32([0.08, 0, -0.08]))
    assert 0 < len(noisy.samples) < len(everything.samples)
    for values in recorded(noisy, files):
        second, first = np.sort(values)[-2:]
        assert first - second > 2 * noisy.atol["logits"]


def test_without_a_clear_label_outputs_alone_are_compared(
    requests: list[LabelledRequest], choose: Callable[..., tuple]
) -> None:
    golden, _, _ = choose(requests, "int8", lambda logits: logits * np.float32(1e-9))
    assert [sample.label for sample in golden.samples] == [None] * 12


def test_random_requests_serve_where_there_are_no_others(
    signature: Signature, choose: Callable[..., tuple], tmp_path: Path
) -> None:
    golden, files, served = choose(random_requests(signature, 64))
    assert len(golden.samples) == MAX_SAMPLES
    write(golden, files, tmp_path)
    assert served.replay(tmp_path) < 1e-4


def test_a_jpeg_stays_a_jpeg(encode: Callable[..., bytes], choose: Callable[..., tuple]) -> None:
    body = encode(np.full((8, 8), 250, dtype=np.uint8), format="JPEG")
    golden, files, _ = choose([LabelledRequest(body=body, content_type="image/jpeg", label=2)])
    assert files["golden/000.jpg"] == body
    assert golden.samples[0].content_type == "image/jpeg"


def test_the_same_answers_give_the_same_bytes(requests: list[LabelledRequest], choose: Callable[..., tuple]) -> None:
    assert choose(requests)[1] == choose(requests, "fp32", lambda logits: logits * np.float32(1 - 1e-9))[1]


def test_an_artifact_that_fails_on_one_is_refused(
    requests: list[LabelledRequest], choose: Callable[..., tuple]
) -> None:
    with pytest.raises(GateError, match="the artifact fails on a golden sample"):
        choose(requests, "fp32", lambda logits: logits * np.nan)


def test_one_number_a_sample_is_repeated(tmp_path: Path) -> None:
    signature = Signature.from_document(
        {
            "format_version": 1,
            "task": "tensor",
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch"]}],
            "outputs": [
                {"name": "y", "dtype": "float32", "shape": ["batch"]},
                {"name": "positive", "dtype": "bool", "shape": ["batch"]},
            ],
        }
    )

    class Doubles(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 2 * x, x > 0

    reference = Reference.of(Doubles(), signature)
    served = ServedModel(signature, Altered(reference, lambda values: values))
    golden, files = choose_golden(random_requests(signature, 4), reference, served, FP32)
    write(golden, files, tmp_path)
    assert served.replay(tmp_path) < 1e-5


class Scaled(torch.nn.Module):
    """Two outputs, each the input times a constant."""

    def __init__(self, small: float, large: float) -> None:
        super().__init__()
        self.small, self.large = small, large

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.small, x * self.large


def choose_scaled(
    small: float, large: float, *, precision: str, dtype: str = "float32", change: Change = lambda values: values
) -> tuple[GoldenSet, dict[str, bytes], ServedModel]:
    document = {
        "format_version": 1,
        "task": "tensor",
        "inputs": [{"name": "x", "dtype": dtype, "shape": ["batch", 8], "minimum": 0.5, "maximum": 1}],
        "outputs": [{"name": name, "dtype": dtype, "shape": ["batch", 8]} for name in ("small", "large")],
        "artifact": {"file": "model.onnx", "format": "onnx", "precision": precision, "device": "cpu"},
    }
    signature = Signature.from_document(document)
    reference = Reference.of(Scaled(small, large), signature)
    served = ServedModel(signature, Altered(reference, change))
    golden, files = choose_golden(random_requests(signature, 4), reference, served, Thresholds.of(precision))
    return golden, files, served


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-6, 1.0, 1e30])
def test_outputs_of_any_size_are_checked(precision: str, scale: float, tmp_path: Path) -> None:
    golden, files, served = choose_scaled(scale, scale, precision=precision)
    write(golden, files, tmp_path)
    assert served.replay(tmp_path) < 1e-5 * scale
    wrong = ServedModel(
        served.signature, Altered(Reference.of(Scaled(1.1 * scale, scale), served.signature), lambda values: values)
    )
    with pytest.raises(GoldenError, match="small differs from the checkpoint's"):
        wrong.replay(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_output_has_its_own_tolerance(precision: str, tmp_path: Path) -> None:
    golden, files, served = choose_scaled(1e-3, 1e3, precision=precision)
    assert golden.atol["large"] == pytest.approx(1e6 * golden.atol["small"], rel=0.1)
    write(golden, files, tmp_path)
    wrong = ServedModel(served.signature, Altered(Reference.of(Scaled(0.0, 1e3), served.signature), lambda v: v))
    with pytest.raises(GoldenError, match="small differs"):
        wrong.replay(tmp_path)


@pytest.mark.parametrize("scale", [1e-310, 1e59, 1e300])
def test_float64_outputs_stay_float64(scale: float, tmp_path: Path) -> None:
    golden, files, served = choose_scaled(scale, 1.0, precision="fp32", dtype="float64")
    values = np.load(io.BytesIO(files[golden.samples[0].outputs["small"]]), allow_pickle=False)
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
    assert values.min() > 0.4 * scale
    write(golden, files, tmp_path)
    served.replay(tmp_path)


def test_outputs_that_are_always_0_are_repeated(tmp_path: Path) -> None:
    golden, files, served = choose_scaled(0.0, -0.0, precision="fp32")
    write(golden, files, tmp_path)
    assert served.replay(tmp_path) == 0


def test_the_last_bit_of_small_outputs_is_not_recorded() -> None:
    def files(change: Change) -> dict[str, bytes]:
        return choose_scaled(1e-6, 1e3, precision="bf16", change=change)[1]

    same = files(lambda values: values)
    assert files(lambda values: values) == same
    values = np.load(io.BytesIO(same["golden/000.small.npy"]))
    step = 2.0**-41  # a millionth of 0.8e-6, as a power of two
    assert np.array_equal(values / step, np.round(values / step))


def test_answers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(GateError, match="'large' holds infinity or NaN for a golden sample, so there is no archive"):
        choose_scaled(1.0, 1e39, precision="fp32", change=lambda values: np.nan_to_num(values, posinf=1.0))
