"""Gates: what must pass passes, and everything else fails with a reason."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.checks import Evidence, check_artifact, company_gates
from export.errors import CheckpointError, EvaluationError
from export.evaluation import LabelledRequest, tensor_request
from export.gates import Comparison, GateResult, margin
from export.reference import Reference
from export.task_gates import task_gates
from export.thresholds import Thresholds
from handlers.calling import NamedModule
from handlers.model import ServedModel
from handlers.signature import Signature
from handlers.tensors import Array

FP32, INT8 = Thresholds.of("fp32"), Thresholds.of("int8")
Outputs = dict[str, Array]

ROWS = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 3]}],
    }
)
SEQUENCES = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["batch", "length"], "padding": 0},
            {"name": "mask", "dtype": "int64", "shape": ["batch", "length"], "minimum": 1, "maximum": 1, "padding": 0},
        ],
        "axes": {"length": {"minimum": 1, "maximum": 9}},
        "outputs": [
            {"name": "each", "dtype": "float32", "shape": ["batch", "length"]},
            {"name": "largest", "dtype": "int64", "shape": ["batch"]},
        ],
    }
)


def by_name(gates: Sequence[GateResult]) -> dict[str, GateResult]:
    return {gate.gate: gate for gate in gates}


def failed(gates: Sequence[GateResult]) -> set[str]:
    return {gate.gate for gate in gates if not gate.passed}


class Computes:
    """A backend that is a function of a batch."""

    device = "cpu"

    def __init__(self, function: Callable[[Mapping[str, Array]], Outputs]) -> None:
        self.function = function

    def run(self, batch: Mapping[str, Array]) -> Outputs:
        return self.function(batch)


def compare(expected: Any, actual: Any, thresholds: Thresholds = FP32, **options: Any) -> dict[str, GateResult]:
    """Gates of one batch of rows of three."""
    comparison = Comparison(ROWS, thresholds, **options)
    right, found = np.asarray(expected, np.float32), np.asarray(actual, np.float32)
    comparison.add("batch", [{"x": row} for row in right], {"y": right}, {"y": found})
    ranking = comparison.ranking_gate("ranking")
    return by_name([*comparison.results(), *([ranking] if ranking else [])])


RIGHT = [[1.0, 2.0, 3.0], [3.0, -1.0, 0.5], [-2.0, 0.0, 1.0]]


class TestParity:
    def test_equal_outputs_pass(self) -> None:
        gates = compare(RIGHT, RIGHT)
        assert set(gates) == {"outputs", "parity", "noise"}
        assert failed(list(gates.values())) == set()
        assert (gates["parity"].measured, gates["noise"].measured) == (0.0, 0.0)

    @given(
        expected=st.floats(-1, 1, width=32),
        difference=st.floats(-0.5, 0.5, width=32),
        atol=st.floats(1e-6, 1),
        rtol=st.floats(0, 0.1),
    )
    def test_the_rule_is_that_of_numpy(self, expected: float, difference: float, atol: float, rtol: float) -> None:
        right = np.full((1, 3), expected, np.float32)
        found = right + np.float32(difference)
        distance = abs(float(found[0, 0]) - float(right[0, 0]))
        if abs(distance - (atol + rtol * abs(expected))) < 1e-9:
            return  # on the border, the two round differently
        result = compare(right, found, replace(FP32, atol=atol, rtol=rtol))["parity"]
        assert result.passed == np.allclose(found.astype(np.float64), right, rtol=rtol, atol=atol)

    def test_large_outputs_have_a_tolerance_of_their_own_size(self) -> None:
        # Elements near zero of outputs around 10,000 carry the rounding of their neighbours.
        right = np.array([[1e4, -1e4, 0.01]])
        assert compare(right, right + np.array([[0, 0, 0.5]]))["parity"].passed
        assert not compare(right, right + np.array([[0, 0, 2.0]]))["parity"].passed

    def test_lower_precisions_are_not_compared_value_by_value(self) -> None:
        assert "parity" not in compare(RIGHT, RIGHT, INT8)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("thresholds", [FP32, INT8])
    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("artifact", "the artifact gives NaN or infinity where the checkpoint itself does not"),
            ("checkpoint", "the checkpoint itself gives NaN or infinity (batch)"),
            ("both", "the checkpoint itself gives NaN or infinity, and so does the artifact"),
        ],
    )
    def test_what_is_not_finite_fails_wherever_it_stands(
        self, value: float, thresholds: Thresholds, place: str, message: str
    ) -> None:
        right, found = np.array(RIGHT), np.array(RIGHT)
        if place != "artifact":
            right[1, 1] = value
        if place != "checkpoint":
            found[1, 1] = value
        result = compare(right, found, thresholds)["outputs"]
        assert not result.passed
        assert message in result.detail

    @pytest.mark.parametrize(
        ("outputs", "message"),
        [
            ({}, "the artifact gives no output 'y'"),
            ({"y": np.zeros((3, 2), np.float32)}, "'y' with the shape [3, 2] instead of [3, 3]"),
            ({"y": np.zeros((1, 3), np.float32)}, "'y' with the shape [1, 3] instead of [3, 3]"),
            ({"y": np.zeros((3, 3, 1), np.float32)}, "'y' with the shape [3, 3, 1] instead of [3, 3]"),
            ({"y": np.zeros((3, 3))}, "'y' as float64 instead of float32"),
        ],
    )
    def test_another_form_fails_even_when_it_would_broadcast(self, outputs: Outputs, message: str) -> None:
        comparison = Comparison(ROWS, FP32)
        right = np.zeros((3, 3), np.float32)
        comparison.add("batch", [{"x": row} for row in right], {"y": right}, outputs)
        (result,) = comparison.results()
        assert not result.passed
        assert message in result.detail

    def test_nothing_compared_is_nothing_passed(self) -> None:
        assert failed(Comparison(ROWS, FP32).results()) == {"outputs"}


class TestNoise:
    @pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
    def test_it_does_not_depend_on_the_scale_of_the_outputs(self, scale: float) -> None:
        right = np.random.default_rng(0).normal(size=(50, 3)) * scale
        found = right + np.random.default_rng(1).normal(size=(50, 3)) * scale * 0.05
        assert compare(right, found, INT8)["noise"].measured == pytest.approx(0.05, rel=0.2)
        assert not compare(right, right[::-1], INT8)["noise"].passed

    def test_a_small_fault_below_the_absolute_tolerance_fails(self) -> None:
        right = np.random.default_rng(0).normal(size=(50, 3)) * 1e-4
        assert failed(list(compare(right, right * 1.1).values())) == {"noise"}

    def test_a_constant_offset_of_all_samples_does_not_hide_a_fault(self) -> None:
        right = np.random.default_rng(0).normal(size=(50, 3)) + np.array([5, -5, 2])
        assert not compare(right, right[::-1], INT8)["noise"].passed

    def test_outputs_that_do_not_vary_are_held_to_their_own_size(self) -> None:
        right = np.full((4, 3), 2.0)
        assert compare(right, right + 1e-6)["noise"].passed
        assert not compare(right, right * 1.1)["noise"].passed
        # Nothing but zeros: the difference itself counts.
        assert not compare(np.zeros((4, 3)), np.full((4, 3), 1e-3))["noise"].passed
        assert compare(np.zeros((4, 3)), np.zeros((4, 3)))["noise"].passed

    def test_one_sample_far_off_fails_among_many_good_ones(self) -> None:
        right = np.random.default_rng(0).normal(size=(5000, 3))
        found = right.copy()
        found[17] *= -3
        result = compare(right, found, INT8)["noise"]
        assert result.measured is not None
        assert result.measured < INT8.noise
        assert not result.passed
        assert "for one sample" in result.detail

    def test_each_kind_of_batches_is_held_to_the_bound(self) -> None:
        comparison = Comparison(ROWS, INT8)
        right = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
        for case, rows, factor in (("short", right, 1.0), ("long", right[:20], 0.8)):
            samples = [{"x": row} for row in rows]
            comparison.add(case, samples, {"y": rows}, {"y": rows * np.float32(factor)})
        result = by_name(comparison.results())["noise"]
        assert not result.passed
        assert "(long)" in result.detail


class TestChannels:
    SCALES = np.array([90.0, 0.005, 1.0])
    MEANS = np.array([3000.0, 0.01, 0.0])

    def test_a_small_channel_that_is_wrong_fails_beside_a_large_one(self) -> None:
        right = np.random.default_rng(0).normal(size=(50, 3)) * self.SCALES + self.MEANS
        result = compare(right, right * np.array([1, -1, 1]))["noise"]
        assert not result.passed
        assert "those of channel 1" in result.detail

    def test_channels_may_carry_the_rounding_of_their_neighbours(self) -> None:
        generator = np.random.default_rng(0)
        right = generator.normal(size=(50, 3)) * self.SCALES + self.MEANS
        assert compare(right, right + generator.normal(size=(50, 3)) * 1e-7 * 3000)["noise"].passed

    def test_dead_channels_pass(self) -> None:
        right = np.zeros((50, 3))
        right[:, 0] = np.random.default_rng(0).normal(size=50)
        assert compare(right, right + np.array([0, 1e-9, 1e-20]))["noise"].passed


class TestRanking:
    def test_samples_that_are_all_too_close_are_not_judged(self) -> None:
        result = compare([[1.0, 1.0, 0.0]] * 3, [[1.0, 1.0, 0.0]] * 3, INT8, ranked=True)["ranking"]
        assert result.detail == "could not be judged: all 3 samples are too close to call"

    def test_a_near_tie_may_turn_round_and_is_counted(self) -> None:
        right = np.array([[1.0, 1.0001, -5], [5, 0, -5], [0, 5, -5], [-5, 0, 5]])
        found = right + np.array([[0.0002, 0, 0], [0, 0, 0], [0, 0.001, 0], [0.001, 0, 0]])
        result = compare(right, found, INT8, ranked=True)["ranking"]
        assert (result.passed, result.measured) == (True, 1.0)
        assert "3 of 3 samples; 1 more are too close to call" in result.detail

    def test_a_clear_lead_may_not(self) -> None:
        right = np.tile([[5.0, 0, -5], [0, 5, -5], [-5, 0, 5]], (40, 1))
        found = right.copy()
        found[:6] = found[:6, ::-1]
        result = compare(right, found, INT8, ranked=True)["ranking"]
        assert not result.passed
        assert result.measured == pytest.approx(116 / 120)

    def test_the_margin_is_between_the_first_two(self) -> None:
        assert margin(np.array([1.0, 7.0, 4.0])) == 3.0
        assert margin(np.array([1.0])) == np.inf


class TestReference:
    def test_it_leaves_its_input_and_the_threads_alone(self) -> None:
        class InPlace(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.clamp_(min=0)

        batch = np.array([[-1.0]], dtype=np.float32)
        threads = torch.get_num_threads()
        assert Reference(NamedModule(InPlace(), ["x"], ["y"])).run({"x": batch})["y"] == 0
        assert batch == -1
        assert torch.get_num_threads() == threads

    @pytest.mark.parametrize("result", [{"logits": torch.zeros(1)}, None, ("a",)])
    def test_a_module_that_gives_something_else_is_the_checkpoints_fault(self, result: object) -> None:
        class Odd(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> object:
                return result

        with pytest.raises(CheckpointError, match=r"the checkpoint's own model fails on x \[2, 3\]: "):
            Reference.of(Odd(), ROWS).run({"x": np.zeros((2, 3), np.float32)})


class Running(torch.nn.Module):
    """A sum up to each step, and where the largest is; padding has no influence."""

    def __init__(self, masked: bool = True) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = x.masked_fill(mask == 0, -9) if self.masked else x
        total = x.cumsum(1) if self.masked else x - x.mean(1, keepdim=True)
        return total, seen.argmax(1)


def sequences(module: torch.nn.Module, change: Callable[[Outputs], Outputs] = lambda outputs: outputs) -> ServedModel:
    reference = Reference.of(module, SEQUENCES)
    return ServedModel(SEQUENCES, Computes(lambda batch: change(reference.run(batch))))


class TestSequences:
    def check(self, served: ServedModel, thresholds: Thresholds = FP32, **evidence: Any) -> list[GateResult]:
        return check_artifact(served, Evidence(reference=Reference.of(Running(), SEQUENCES), **evidence), thresholds)

    def test_a_right_artifact_passes_at_every_length(self) -> None:
        gates = by_name(self.check(sequences(Running())))
        assert failed(list(gates.values())) == set()
        names = {"outputs", "parity", "noise", "equality", "extreme inputs", "padding of the checkpoint", "padding"}
        assert set(gates) == names
        assert "145 samples in 28 batches" in gates["outputs"].detail

    def test_what_stands_in_the_padding_does_not_count(self) -> None:
        def run(batch: Mapping[str, Array]) -> Outputs:
            outputs = Reference.of(Running(), SEQUENCES).run(batch)
            return {**outputs, "each": np.where(batch["mask"] == 1, outputs["each"], np.float32(np.nan))}

        assert failed(self.check(ServedModel(SEQUENCES, Computes(run)))) == set()

    def test_a_baked_in_length_fails(self) -> None:
        def run(batch: Mapping[str, Array]) -> Outputs:
            if batch["x"].shape[1] != 9:
                raise RuntimeError("expected 9 steps")
            return Reference.of(Running(), SEQUENCES).run(batch)

        gates = by_name(self.check(ServedModel(SEQUENCES, Computes(run))))
        assert not gates["outputs"].passed
        assert "the artifact fails (single samples): expected 9 steps" in gates["outputs"].detail

    def test_a_whole_number_off_by_one_fails(self) -> None:
        gates = self.check(sequences(Running(), lambda o: {**o, "largest": (o["largest"] + 1) % 9}))
        assert failed(gates) == {"equality"}

    def test_a_checkpoint_that_sees_its_padding_is_refused_with_both_remedies(self) -> None:
        reference = Reference.of(Running(masked=False), SEQUENCES)
        gates = by_name(company_gates(sequences(Running(masked=False)), Evidence(reference=reference), FP32))
        assert failed(list(gates.values())) == {"padding of the checkpoint", "padding"}
        detail = gates["padding of the checkpoint"].detail
        assert "mask padding in the model, or remove `padding` from the signature" in detail

    def test_an_artifact_that_sees_its_padding_is_refused(self) -> None:
        gates = by_name(
            company_gates(
                sequences(Running(masked=False)), Evidence(reference=Reference.of(Running(), SEQUENCES)), FP32
            )
        )
        assert failed(list(gates.values())) == {"padding"}

    def test_without_padding_samples_of_one_size_share_the_batch(self) -> None:
        alone = replace(SEQUENCES, inputs=tuple(replace(spec, padding=None) for spec in SEQUENCES.inputs))
        module = Running(masked=False)
        served = ServedModel(alone, Computes(Reference.of(module, alone).run))
        gates = check_artifact(served, Evidence(reference=Reference.of(module, alone)), FP32)
        assert failed(gates) == set()
        names = {"outputs", "parity", "noise", "equality", "extreme inputs"}
        names |= {"batching of the checkpoint", "batching"}
        assert {gate.gate for gate in gates} == names

    def test_a_comparison_that_crashes_is_a_failure(self) -> None:
        served = ServedModel(SEQUENCES, Computes(lambda batch: {"each": "no array"}))  # type: ignore[dict-item]
        gates = self.check(served)
        assert "random inputs" in failed(gates)
        assert "the comparison itself fails" in by_name(gates)["random inputs"].detail


@pytest.fixture
def requests(picture: Callable[[str], bytes], signature: Signature) -> list[LabelledRequest]:
    return [
        LabelledRequest(body=picture(label), content_type="image/png", label=signature.labels.index(label))
        for label in ("dark", "mid", "bright", "mid")
    ]


@pytest.fixture
def task(
    module: torch.nn.Module, served_signature: Signature, requests: list[LabelledRequest]
) -> Callable[..., dict[str, GateResult]]:
    """The gates on evaluation data of an artifact that alters the module's logits."""

    def task(
        change: Callable[[Array], Array] = lambda logits: logits,
        thresholds: Thresholds = FP32,
        requests: Sequence[LabelledRequest] = requests,
        **options: Any,
    ) -> dict[str, GateResult]:
        reference = Reference.of(module, served_signature)
        served = ServedModel(
            served_signature, Computes(lambda batch: {"logits": change(reference.run(batch)["logits"])})
        )
        settings = {"trained": {}, "own_data": False, **options}
        return by_name(task_gates(served, reference, requests, thresholds, **settings))

    return task


class TestTask:
    def test_a_right_artifact_passes(self, task: Callable[..., dict[str, GateResult]]) -> None:
        gates = task(trained={"accuracy": 1.0, "loss": 0.5}, own_data=False)
        assert failed(list(gates.values())) == set()
        assert gates["top-1 agreement"].detail == "the same class ranks first for 4 of 4 requests"
        assert "4 of 4 right, 1.0000" in gates["accuracy"].detail
        # The loss is that of other samples.
        assert "loss in training" not in gates

    def test_labels_in_another_order_fail(self, task: Callable[..., dict[str, GateResult]]) -> None:
        gates = task(lambda logits: logits[:, ::-1], INT8)
        assert gates["top-1 agreement"].measured == 0.5
        assert {"top-1 agreement", "accuracy", "noise on evaluation data"} <= failed(list(gates.values()))

    def test_one_other_ranking_fails_unless_the_bound_allows_it(
        self, task: Callable[..., dict[str, GateResult]], requests: list[LabelledRequest]
    ) -> None:
        def flip_one(logits: Array) -> Array:
            logits = logits.copy()
            if len(logits) > 3:
                logits[2] = logits[2, ::-1]
            return logits

        many = requests * 8
        gates = task(flip_one, INT8, many)
        assert gates["top-1 agreement"].measured == pytest.approx(31 / 32)
        assert not gates["top-1 agreement"].passed
        assert task(flip_one, replace(INT8, agreement=0.9), many)["top-1 agreement"].passed

    def test_a_tie_within_rounding_is_excused_where_all_must_agree(
        self, served_signature: Signature, requests: list[LabelledRequest]
    ) -> None:
        class Tie(torch.nn.Module):
            def forward(self, image: torch.Tensor) -> torch.Tensor:
                level = image.mean((1, 2, 3))
                return torch.stack([-level, level * 0, torch.full_like(level, -0.5) + (level > 1) * (0.5 + 1e-7)], 1)

        reference = Reference.of(Tie(), served_signature)
        served = ServedModel(
            served_signature,
            Computes(lambda b: {"logits": reference.run(b)["logits"] + np.float32([0, 2e-7, 0])}),
        )
        gates = by_name(task_gates(served, reference, requests, FP32, trained={}, own_data=False))
        assert gates["top-1 agreement"].passed
        assert "3 of 3 requests; 1 more are too close to call" in gates["top-1 agreement"].detail

    def test_a_request_that_fails_is_named_and_counts_as_wrong(
        self, task: Callable[..., dict[str, GateResult]]
    ) -> None:
        gates = task(lambda logits: logits * np.nan)
        assert "a valid request is refused" in gates["outputs on evaluation data"].detail
        assert (gates["accuracy"].measured, gates["top-1 agreement"].measured) == (0.0, 0.0)

    def test_data_that_the_model_does_not_take_is_named(self, task: Callable[..., dict[str, GateResult]]) -> None:
        with pytest.raises(EvaluationError, match=r"data/3\.png is nothing that the model takes: "):
            task(requests=[LabelledRequest(body=b"no image", content_type="image/png", label=0, where="data/3.png")])

    @pytest.mark.parametrize(
        ("wrong", "trained", "passes"),
        [(0, 1.0, True), (5, 1.0, True), (6, 1.0, False), (25, 0.98, True), (26, 0.98, False)],
    )
    def test_the_checkpoint_must_reach_what_training_measured(
        self,
        task: Callable[..., dict[str, GateResult]],
        requests: list[LabelledRequest],
        wrong: int,
        trained: float,
        passes: bool,
    ) -> None:
        other = replace(requests[0], label=2)
        many = [other] * wrong + [requests[0]] * (1000 - wrong)
        gates = task(requests=many, trained={"accuracy": trained})
        assert gates["accuracy in training"].passed is passes
        # The artifact loses nothing against its checkpoint.
        assert gates["accuracy"].passed
        assert passes or "or this data is harder" in gates["accuracy in training"].detail

    def test_the_loss_of_the_training_is_repeated_on_its_own_data(
        self, task: Callable[..., dict[str, GateResult]], module: torch.nn.Module, requests: list[LabelledRequest]
    ) -> None:
        first = task(trained={"accuracy": 1.0, "loss": 1.0, "samples": 4}, own_data=True)["loss in training"]
        assert not first.passed
        loss = float(first.detail.split(" is ")[1].split()[0])
        assert task(trained={"accuracy": 1.0, "loss": loss, "samples": 4}, own_data=True)["loss in training"].passed
        assert "loss in training" not in task(trained={"loss": loss, "samples": 5}, own_data=True)

    def test_accuracy_may_fall_by_the_metric_drop_and_no_further(
        self, task: Callable[..., dict[str, GateResult]], requests: list[LabelledRequest]
    ) -> None:
        many = [requests[0]] * 96 + [replace(requests[1], label=1)] * 4

        def lose(logits: Array) -> Array:
            return np.where(logits.argmax(1, keepdims=True) == 1, logits[:, [1, 0, 2]], logits)

        result = task(lose, replace(INT8, metric_drop=0.04), many)["accuracy"]
        assert (result.passed, result.measured) == (True, 0.96)
        assert not task(lose, replace(INT8, metric_drop=0.03), many)["accuracy"].passed

    def test_a_checkpoint_below_the_commonest_class_fails(
        self, task: Callable[..., dict[str, GateResult]], requests: list[LabelledRequest]
    ) -> None:
        assert "least accuracy" not in task()
        assert task(requests=requests * 5)["least accuracy"].passed
        labels = {0: 1, 1: 2, 2: 0}
        shuffled = [replace(one, label=labels[one.label or 0]) for one in requests] * 5
        result = task(requests=shuffled)["least accuracy"]
        assert (result.passed, result.measured, result.bound) == (False, 0.0, 0.5)
        assert result.detail == (
            "the checkpoint is right for 0 of 20, and always answering 'bright' would be for 10: labels, "
            "preprocessing or weights are wrong; with the labels in another order 20 would be right (it answers "
            "'dark' as 'bright', 'mid' as 'dark', 'bright' as 'mid')"
        )
        assert task(requests=shuffled, thresholds=replace(FP32, least_accuracy=0.0))["least accuracy"].passed
        assert not task(requests=shuffled[:4], thresholds=replace(FP32, least_accuracy=0.1))["least accuracy"].passed

    def test_given_outputs_must_be_met(self) -> None:
        class Double(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * x

        reference = Reference.of(Double(), ROWS)
        served = ServedModel(ROWS, Computes(reference.run))
        rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
        for factor, outcome in ((2, set()), (3, {"noise against given outputs"})):
            requests = [tensor_request({"x": row}, outputs={"y": np.float32(factor) * row}) for row in rows]
            gates = task_gates(served, reference, requests, FP32, trained={}, own_data=False)
            assert failed(gates) == outcome

    def test_the_outcome_is_json(self, task: Callable[..., dict[str, GateResult]]) -> None:
        for gate in task(trained={"accuracy": 1.0}).values():
            document = gate.to_document()
            assert json.loads(json.dumps(document, allow_nan=False)) == document
        lost = GateResult(gate="g", passed=False, measured=float("nan"), detail="d").to_document()
        assert lost["measured"] is None


class TestCompany:
    def gates(self, checkpoint: torch.nn.Module, artifact: torch.nn.Module) -> list[GateResult]:
        served = ServedModel(ROWS, Computes(Reference.of(artifact, ROWS).run))
        return check_artifact(served, Evidence(reference=Reference.of(checkpoint, ROWS)), FP32)

    def test_a_checkpoint_whose_answers_depend_on_the_batch_is_refused(self) -> None:
        class Centred(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x - x.mean(0)

        gates = by_name(self.gates(Centred(), Centred()))
        assert failed(list(gates.values())) == {"batching of the checkpoint", "batching"}
        assert "let the model compute each on its own" in gates["batching of the checkpoint"].detail

    def test_a_baked_in_branch_is_seen_by_single_samples(self) -> None:
        class Branches(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x if x[0, 0] > -0.75 else -x

        assert {"parity", "noise"} <= failed(self.gates(Branches(), torch.nn.Identity()))


class Negates(torch.nn.Module):
    """The cosine of its inputs, with the other sign where a condition on their values holds."""

    def __init__(self, condition: Callable[[torch.Tensor], bool], factor: float = -1.0) -> None:
        super().__init__()
        self.condition = condition
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float().cos()
        return self.factor * y if self.condition(x) else y


def never(x: torch.Tensor) -> bool:
    return False


class TestExtremes:
    IDS = Signature.from_document(
        {
            "format_version": 1,
            "task": "tensor",
            "inputs": [{"name": "x", "dtype": "int64", "shape": ["batch", 4], "minimum": 0, "maximum": 30000}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 4]}],
        }
    )

    @pytest.mark.parametrize("thresholds", [FP32, INT8])
    @pytest.mark.parametrize(
        ("signature", "condition"),
        [
            (ROWS, lambda x: bool((x >= 1.0).any())),
            (ROWS, lambda x: bool((x <= -1.0).all())),
            (ROWS, lambda x: bool((x.abs() < 1e-3).all())),
            (IDS, lambda x: bool((x == 7).any())),
            (IDS, lambda x: bool((x == 30000).any())),
        ],
    )
    def test_a_branch_that_random_inputs_do_not_reach_is_seen(
        self, signature: Signature, condition: Callable[[torch.Tensor], bool], thresholds: Thresholds
    ) -> None:
        served = ServedModel(signature, Computes(Reference.of(Negates(never), signature).run))
        evidence = Evidence(reference=Reference.of(Negates(condition), signature))
        gates = by_name(check_artifact(served, evidence, thresholds))
        assert failed(list(gates.values())) == {"extreme inputs"}
        assert "use --method script or --format eager" in gates["extreme inputs"].detail

    def test_where_the_checkpoint_is_not_finite_the_artifact_need_not_be(self) -> None:
        module = Negates(lambda x: bool((x >= 1.0).all()), factor=float("nan"))
        served = ServedModel(ROWS, Computes(Reference.of(module, ROWS).run))
        gates = by_name(check_artifact(served, Evidence(reference=Reference.of(module, ROWS)), FP32))
        assert failed(list(gates.values())) == set()
        assert "in 4 batches" in gates["extreme inputs"].detail

    def test_an_artifact_that_is_not_finite_there_fails(self) -> None:
        broken = Negates(lambda x: bool((x >= 1.0).all()), factor=float("nan"))
        served = ServedModel(ROWS, Computes(Reference.of(broken, ROWS).run))
        gates = check_artifact(served, Evidence(reference=Reference.of(Negates(never), ROWS)), FP32)
        assert failed(gates) == {"extreme inputs"}
