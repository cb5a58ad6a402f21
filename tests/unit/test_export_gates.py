"""Gates: what must pass passes, and everything else fails with a reason."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.errors import CheckpointError
from export.evaluation import LabelledRequest
from export.gates import Reference, Thresholds, accuracy_gate, agreement_gate, parity_gate
from handlers.model import ServedModel
from handlers.signature import Signature

Batch = NDArray[np.float32]
LOOSE = Thresholds(atol=1e-4, rtol=1e-3)


class Computes:
    """A backend that is a function of a batch."""

    device = "cpu"

    def __init__(self, function: Callable[[Batch], Any]) -> None:
        self._function = function

    def run(self, batch: Batch) -> Batch:
        result: Batch = self._function(batch)
        return result


class Echo(torch.nn.Module):
    """The reference of these tests: its output is its input."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch


@pytest.fixture
def parity(served_signature: Signature) -> Callable[..., Any]:
    def parity(function: Callable[[Batch], Any], *batches: Any, thresholds: Thresholds = LOOSE) -> Any:
        served = ServedModel(served_signature, Computes(function))
        arrays = [np.asarray(batch, dtype=np.float32) for batch in batches]
        return parity_gate(Reference(Echo()), served, arrays, thresholds)

    return parity


class TestParity:
    def test_equal_outputs_pass_and_the_batch_sizes_are_told(self, parity: Callable[..., Any]) -> None:
        result = parity(lambda batch: batch, [[1, 2]], np.zeros((3, 2)))
        assert (result.gate, result.passed, result.measured, result.bound) == ("parity", True, 0.0, 1.0)
        assert "largest difference 0 (atol 0.0001, rtol 0.001) over 4 samples at batch sizes 1, 3" in result.detail

    @pytest.mark.parametrize(
        ("expected", "difference", "passes"),
        [
            (0.0, 0.9e-4, True),  # within atol
            (0.0, 1.1e-4, False),  # rtol gives nothing at zero
            (100.0, 0.09, True),  # far outside atol, within rtol
            (100.0, 0.11, False),
            (-100.0, -0.09, True),
            (-100.0, 0.11, False),
        ],
    )
    def test_both_tolerances_count(
        self, parity: Callable[..., Any], expected: float, difference: float, passes: bool
    ) -> None:
        assert parity(lambda batch: batch + np.float32(difference), [[expected]]).passed is passes

    @given(
        expected=st.floats(-1e3, 1e3, width=32),
        difference=st.floats(-1, 1, width=32),
        atol=st.floats(1e-6, 1),
        rtol=st.floats(0, 0.1),
    )
    def test_the_rule_is_that_of_numpy(
        self, served_signature: Signature, expected: float, difference: float, atol: float, rtol: float
    ) -> None:
        batch = np.array([[expected]], dtype=np.float32)
        actual = batch + np.float32(difference)
        distance = abs(float(actual[0, 0]) - float(batch[0, 0]))
        if abs(distance - (atol + rtol * abs(expected))) < 1e-9:
            return  # on the border, the two round differently
        served = ServedModel(served_signature, Computes(lambda _: actual))
        result = parity_gate(Reference(Echo()), served, [batch], Thresholds(atol=atol, rtol=rtol))
        assert result.passed == np.allclose(actual.astype(np.float64), batch, rtol=rtol, atol=atol)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("place", ["artifact", "checkpoint", "both"])
    def test_what_is_not_finite_fails_wherever_it_stands(
        self, parity: Callable[..., Any], value: float, place: str
    ) -> None:
        batch = np.ones((2, 3), dtype=np.float32)
        answer = batch.copy()
        if place != "artifact":
            batch[1, 1] = value
        if place != "checkpoint":
            answer[1, 1] = value
        # Not last: a later good batch must not hide it.
        assert not parity(lambda b: answer if len(b) == 2 else b, batch, [[1, 1, 1]]).passed

    def test_one_bad_batch_among_good_ones_fails(self, parity: Callable[..., Any]) -> None:
        result = parity(lambda batch: batch + (len(batch) == 3), [[1.0]], np.ones((3, 1)), [[1.0]])
        assert not result.passed
        assert result.measured > 100

    def test_a_crash_fails(self, parity: Callable[..., Any]) -> None:
        def crash(batch: Batch) -> Batch:
            if len(batch) > 1:
                raise RuntimeError("shape is baked in")
            return batch

        result = parity(crash, [[1.0]], np.ones((3, 1)))
        assert (result.passed, result.measured) == (False, None)
        assert result.detail == "the artifact fails on a batch of 3: shape is baked in"

    @pytest.mark.parametrize("shape", [(1, 3), (2, 1), (3,), (2, 3, 1)])
    def test_another_shape_fails_even_when_it_would_broadcast(
        self, parity: Callable[..., Any], shape: tuple[int, ...]
    ) -> None:
        result = parity(lambda batch: np.zeros(shape, dtype=np.float32), np.zeros((2, 3)))
        assert not result.passed
        assert f"gives the shape {shape} instead of (2, 3)" in result.detail


class TestReference:
    def test_it_leaves_its_input_and_the_threads_alone(self, served_signature: Signature) -> None:
        class InPlace(torch.nn.Module):
            def forward(self, batch: torch.Tensor) -> torch.Tensor:
                return batch.clamp_(min=0)

        batch = np.array([[-1.0]], dtype=np.float32)
        threads = torch.get_num_threads()
        reference = Reference(InPlace())
        assert reference.run(batch) == 0
        assert batch == -1
        assert torch.get_num_threads() == threads
        # An artifact that forgets the clamp must not be fed what the reference has clamped already.
        served = ServedModel(served_signature, Computes(lambda batch: batch))
        assert not parity_gate(reference, served, [batch], LOOSE).passed

    def test_the_same_input_gives_the_same_bits(self, module: torch.nn.Module) -> None:
        batch = np.random.default_rng(0).random((7, 1, 8, 8), dtype=np.float32)
        reference = Reference(module)
        assert reference.run(batch).tobytes() == reference.run(batch).tobytes()

    @pytest.mark.parametrize("result", [(torch.zeros(1),), {"logits": torch.zeros(1)}, None])
    def test_a_module_that_gives_no_tensor_is_the_checkpoints_fault(self, result: object) -> None:
        class Odd(torch.nn.Module):
            def forward(self, batch: torch.Tensor) -> object:
                return result

        with pytest.raises(CheckpointError, match="fails on a batch of 2, or does not return one tensor"):
            Reference(Odd()).run(np.zeros((2, 1), dtype=np.float32))


@pytest.fixture
def requests(picture: Callable[[str], bytes]) -> list[LabelledRequest]:
    labels = ["dark", "mid", "bright", "mid"]
    return [LabelledRequest(body=picture(label), content_type="image/png", label=label) for label in labels]


def logits(module: torch.nn.Module, *, order: tuple[int, ...] = (0, 1, 2)) -> Callable[[Batch], Batch]:
    def compute(batch: Batch) -> Batch:
        output: Batch = Reference(module).run(batch)[:, list(order)]
        return output

    return compute


class TestAgreement:
    def test_the_same_ranking_passes(
        self, module: torch.nn.Module, served_signature: Signature, requests: list[LabelledRequest]
    ) -> None:
        served = ServedModel(served_signature, Computes(logits(module)))
        result = agreement_gate(Reference(module), served, requests, Thresholds())
        assert (result.gate, result.passed, result.measured, result.bound) == ("top-1 agreement", True, 1.0, 1.0)
        assert result.detail == "the same class ranks first for 4 of 4 requests"

    def test_one_other_ranking_fails_unless_the_bound_allows_it(
        self, module: torch.nn.Module, served_signature: Signature, requests: list[LabelledRequest]
    ) -> None:
        def compute(batch: Batch) -> Batch:
            output = logits(module)(batch)
            output[2] = output[2, ::-1]
            return output

        served = ServedModel(served_signature, Computes(compute))
        reference = Reference(module)
        result = agreement_gate(reference, served, requests, Thresholds())
        assert (result.passed, result.measured) == (False, 0.75)
        assert agreement_gate(reference, served, requests, Thresholds(top1_agreement=0.75)).passed

    def test_labels_in_another_order_fail(
        self, module: torch.nn.Module, served_signature: Signature, requests: list[LabelledRequest]
    ) -> None:
        served = ServedModel(served_signature, Computes(logits(module, order=(2, 1, 0))))
        result = agreement_gate(Reference(module), served, requests, Thresholds())
        assert (result.passed, result.measured) == (False, 0.5)

    def test_a_request_that_is_refused_fails(
        self, module: torch.nn.Module, served_signature: Signature, requests: list[LabelledRequest]
    ) -> None:
        def crash(batch: Batch) -> Batch:
            raise RuntimeError

        served = ServedModel(served_signature, Computes(crash))
        result = agreement_gate(Reference(module), served, requests, Thresholds())
        assert (result.passed, result.measured) == (False, None)
        assert "a valid request is refused" in result.detail


class TestAccuracy:
    @pytest.fixture
    def served(self, module: torch.nn.Module, served_signature: Signature) -> ServedModel:
        return ServedModel(served_signature, Computes(logits(module)))

    def relabelled(self, requests: list[LabelledRequest], wrong: int) -> list[LabelledRequest]:
        """The same requests, a thousand of them, some with another label than the model gives."""
        many = [requests[0]] * 1000
        other = LabelledRequest(body=requests[0].body, content_type="image/png", label="bright")
        return [other] * wrong + many[wrong:]

    @pytest.mark.parametrize(
        ("wrong", "trained", "passes"),
        [(0, 1.0, True), (5, 1.0, True), (6, 1.0, False), (25, 0.98, True), (26, 0.98, False), (999, None, True)],
    )
    def test_it_may_fall_by_the_metric_drop_and_no_further(
        self, served: ServedModel, requests: list[LabelledRequest], wrong: int, trained: float | None, passes: bool
    ) -> None:
        result = accuracy_gate(served, self.relabelled(requests, wrong), trained, Thresholds())
        assert (result.gate, result.passed) == ("accuracy", passes)
        assert result.measured == pytest.approx(1 - wrong / 1000)
        assert f"{1000 - wrong} of 1000 right" in result.detail

    def test_a_request_that_fails_counts_as_wrong(
        self, served_signature: Signature, requests: list[LabelledRequest]
    ) -> None:
        served = ServedModel(served_signature, Computes(lambda batch: np.full((len(batch), 3), np.nan)))
        result = accuracy_gate(served, requests, 0.9, Thresholds())
        assert (result.passed, result.measured) == (False, 0.0)

    def test_the_outcome_is_json(self, served: ServedModel, requests: list[LabelledRequest]) -> None:
        document = accuracy_gate(served, requests, 1.0, Thresholds()).to_document()
        assert json.loads(json.dumps(document, allow_nan=False)) == document
        assert set(document) == {"gate", "passed", "measured", "bound", "detail"}
