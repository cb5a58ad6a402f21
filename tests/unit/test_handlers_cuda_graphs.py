import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import nn

from handlers.calling import NamedModule
from handlers.cuda_graphs import MOST_GRAPHS, Bucket, CudaGraphs, buckets, is_paddable
from handlers.signature import TENSOR, Signature
from handlers.staging import Staging
from handlers.tensors import Axis, TensorSpec

from .fake_gpu import FakeRecorder, LateTransfers, out_of_memory

TEXT = Signature(
    task=TENSOR,
    inputs=(
        TensorSpec(name="ids", dtype="int64", shape=("batch", "length"), minimum=1, maximum=9, padding=0),
        TensorSpec(name="weights", dtype="float32", shape=("batch", "length"), minimum=0, maximum=1, padding=0),
    ),
    outputs=(
        TensorSpec(name="pooled", dtype="float32", shape=("batch", 4)),
        TensorSpec(name="tokens", dtype="float32", shape=("batch", "length", 4)),
    ),
    axes={"length": Axis(minimum=1, maximum=40)},
)
PICTURE = Signature(
    task=TENSOR,
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3, 4, 5)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 2, 4, 5)),),
)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4)

    def forward(self, ids, weights):
        tokens = self.embedding(ids) * weights.unsqueeze(-1)
        return tokens.sum(1), tokens


def named(module, signature):
    names = ([spec.name for spec in specs] for specs in (signature.inputs, signature.outputs))
    return NamedModule(module, *names).eval()


def graphs(module=None, signature=TEXT, *, recorder=None, max_batch=6, **options):
    staging = Staging(signature, [LateTransfers()], channels_last=options.get("channels_last", False))
    recorder = recorder or FakeRecorder()
    model = named(module or Tokens(), signature)
    recorder.model = lambda inputs: model(*inputs)
    found = CudaGraphs(signature, staging, recorder, max_batch=max_batch, **options)
    return found, staging, recorder


def text(samples, length):
    random = np.random.default_rng(100 * samples + length)
    return {
        "ids": random.integers(1, 10, (samples, length)),
        "weights": random.random((samples, length), dtype=np.float32),
    }


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    """Lines of the log; another test may have kept them from caplog."""
    monkeypatch.setattr(logging.getLogger("torchport"), "propagate", True)
    caplog.set_level(logging.WARNING, "torchport")
    return caplog


class TestBuckets:
    def test_batches_and_lengths_are_powers_of_two_and_the_largest(self):
        found = buckets(TEXT, 6)
        assert {bucket.samples for bucket in found} == {1, 2, 4, 6}
        assert {bucket.sizes["length"] for bucket in found} == {16, 32, 40}
        assert len(found) == 12

    def test_the_largest_comes_first(self):
        found = buckets(TEXT, 6)
        assert found[0] == Bucket(samples=6, sizes={"length": 40})
        assert [bucket.positions for bucket in found] == sorted((b.positions for b in found), reverse=True)

    def test_without_dynamic_axes_there_are_batches_alone(self):
        assert [(bucket.samples, bucket.sizes) for bucket in buckets(PICTURE, 5)] == [
            (5, {}),
            (4, {}),
            (2, {}),
            (1, {}),
        ]

    @pytest.mark.parametrize(
        ("minimum", "maximum", "lengths"),
        [(1, 8, {8}), (1, 16, {16}), (1, 17, {16, 17}), (20, 50, {32, 50}), (64, 64, {64}), (33, 128, {64, 128})],
    )
    def test_lengths_lie_between_the_bounds_and_are_not_short(self, minimum, maximum, lengths):
        signature = dataclasses.replace(TEXT, axes={"length": Axis(minimum=minimum, maximum=maximum)})
        assert {bucket.sizes["length"] for bucket in buckets(signature, 2)} == lengths

    def test_axes_that_cannot_be_padded_have_their_bounds_alone(self):
        inputs = tuple(dataclasses.replace(spec, padding=None) for spec in TEXT.inputs)
        found = buckets(dataclasses.replace(TEXT, inputs=inputs), 1)
        assert [bucket.sizes["length"] for bucket in found] == [40, 1]

    @pytest.mark.parametrize("axes", [1, 2, 3, 6])
    def test_their_number_is_bounded_and_the_largest_is_among_them(self, axes):
        names = [f"axis{i}" for i in range(axes)]
        spec = TensorSpec(name="x", dtype="float32", shape=("batch", *names), padding=0)
        signature = Signature(
            task=TENSOR,
            inputs=(spec,),
            outputs=(TensorSpec(name="y", dtype="float32", shape=("batch",)),),
            axes={name: Axis(minimum=1, maximum=5000) for name in names},
        )
        found = buckets(signature, 256)
        assert 1 <= len(found) <= MOST_GRAPHS
        assert found[0] == Bucket(samples=256, sizes=dict.fromkeys(names, 5000))

    def test_an_output_whose_length_nobody_knows_rules_padding_out(self):
        assert is_paddable(TEXT)
        strange = TensorSpec(name="boxes", dtype="float32", shape=("batch", "count", 4))
        assert not is_paddable(dataclasses.replace(TEXT, outputs=(*TEXT.outputs, strange)))


class TestCompute:
    @pytest.mark.parametrize("samples", range(1, 7))
    @pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 39, 40])
    def test_a_graph_gives_what_the_module_gives(self, samples, length):
        found, _, recorder = graphs()
        batch = text(samples, length)
        outputs = found.run(batch)
        assert recorder.replays == 1
        with torch.inference_mode():
            pooled, tokens = Tokens()(*(torch.from_numpy(array) for array in batch.values()))
        np.testing.assert_allclose(outputs["pooled"], pooled.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs["tokens"], tokens.numpy(), rtol=1e-5, atol=1e-6)

    def test_the_smallest_bucket_is_taken(self, monkeypatch):
        found, staging, _ = graphs()
        taken = []
        run = staging.run
        monkeypatch.setattr(
            staging,
            "run",
            lambda batch, compute, *, shapes: taken.append(tuple(shapes[0])) or run(batch, compute, shapes=shapes),
        )
        for samples, length in [(1, 1), (3, 16), (2, 17), (5, 40), (4, 33)]:
            found.run(text(samples, length))
        assert taken == [(1, 16), (4, 16), (2, 32), (6, 40), (4, 40)]

    def test_batches_in_any_order_do_not_disturb_each_other(self):
        found, _, _ = graphs()
        shapes = [(6, 40), (1, 3), (2, 20), (6, 40), (5, 11), (1, 40)]
        outputs = [found.run(text(*shape))["pooled"] for shape in shapes]
        for shape, pooled in zip(shapes, outputs, strict=True):
            alone, _, _ = graphs()
            np.testing.assert_array_equal(pooled, alone.run(text(*shape))["pooled"])

    def test_inputs_of_all_graphs_share_their_memory(self):
        found, _, recorder = graphs()
        assert recorder.captures == len(found.captured) == 12
        assert len({graph.inputs[0].data_ptr() for graph in found._graphs}) == 1

    def test_what_fits_no_bucket_runs_without_and_the_log_says_so_once(self, log):
        found, _, recorder = graphs()
        assert found.run(text(7, 3)) is None
        assert found.run(text(1, 41)) is None
        assert found.run(text(6, 40)) is not None
        assert recorder.replays == 1
        assert [record.getMessage() for record in log.records] == [
            "batches that no CUDA graph was captured for run without one, such as ids [7, 3], weights [7, 3]"
        ]

    @pytest.mark.parametrize(
        "change",
        [
            lambda batch: {**batch, "weights": batch["weights"][:, :2]},
            lambda batch: {**batch, "weights": batch["weights"][:1]},
            lambda batch: {**batch, "weights": batch["weights"].astype(np.float64)},
            lambda batch: {**batch, "ids": batch["ids"][..., np.newaxis]},
        ],
        ids=["another length", "fewer samples", "another dtype", "another axis"],
    )
    def test_batches_unlike_the_signature_are_left_to_the_module(self, change):
        found, _, _ = graphs()
        assert found.run(change(text(2, 4))) is None

    def test_without_padding_only_exact_lengths_are_replayed_and_batches_still_filled_up(self):
        inputs = tuple(dataclasses.replace(spec, padding=None) for spec in TEXT.inputs)
        found, _, recorder = graphs(signature=dataclasses.replace(TEXT, inputs=inputs))
        assert found.run(text(3, 39)) is None
        outputs = found.run(text(3, 40))
        assert (recorder.replays, outputs["tokens"].shape) == (1, (3, 40, 4))

    def test_pictures_have_their_channels_last(self):
        seen = []

        class Convolution(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.layer = nn.Conv2d(3, 2, 3, padding=1)

            def forward(self, x):
                seen.append(x.is_contiguous(memory_format=torch.channels_last))
                return self.layer(x)

        found, _, _ = graphs(Convolution(), PICTURE, channels_last=True)
        batch = {"x": np.random.default_rng(0).random((3, 3, 4, 5), dtype=np.float32)}
        outputs = found.run(batch)
        assert all(seen)
        with torch.inference_mode():
            expected = Convolution()(torch.from_numpy(batch["x"])).numpy()
        np.testing.assert_allclose(outputs["y"], expected, rtol=1e-5, atol=1e-6)

    def test_an_output_that_only_the_model_knows_the_length_of_stays_whole(self):
        class Pairs(nn.Module):
            def forward(self, x):
                return torch.cat([x, x], 1)

        signature = Signature(
            task=TENSOR,
            inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", "count")),),
        )
        found, _, _ = graphs(Pairs(), signature)
        assert found.run({"x": np.ones((5, 3), np.float32)})["y"].shape == (5, 6)


class TestCaptureThatFails:
    @pytest.mark.parametrize("at", [1, 5])
    @pytest.mark.parametrize(
        "error",
        [RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore"), out_of_memory()],
        ids=["values decide", "no memory"],
    )
    def test_the_model_runs_without_graphs_and_one_line_says_so(self, log, error, at):
        found, _, recorder = graphs(recorder=FakeRecorder(fails=error, at=at))
        assert recorder.captures == at
        assert found.captured == []
        assert found.run(text(2, 3)) is None
        assert found.run(text(7, 3)) is None
        (record,) = log.records
        assert record.getMessage().startswith("the model runs without CUDA graphs, since it cannot be captured: CUDA")
        assert "\n" not in record.getMessage()

    def test_the_log_has_the_first_of_two_errors(self, log):
        class FailsTwice(FakeRecorder):
            def capture(self, inputs):
                try:
                    raise RuntimeError("the model looks at a value")
                finally:
                    raise RuntimeError("the capture was invalidated")

        graphs(recorder=FailsTwice())
        assert "cannot be captured: the model looks at a value" in log.text

    def test_an_output_whose_rows_are_no_samples_is_not_captured(self, log):
        class Merges(nn.Module):
            def forward(self, x):
                return x[:1, :2]

        found, _, _ = graphs(Merges(), PICTURE)
        assert found.captured == []
        assert "its 'y' has the shape [1, 2, 4, 5], unlike the signature" in log.text

    def test_captures_end_when_they_take_long(self, log):
        times = iter([0.0, 1.0, 29.0, 31.0])
        found, _, recorder = graphs(clock=lambda: next(times))
        assert recorder.captures == 2
        assert [bucket.positions for bucket in found.captured] == [192, 240]
        assert found.run(text(6, 40)) is not None
        assert [record.getMessage() for record in log.records] == [
            "CUDA graphs took long to capture: the 10 smallest of 12 shapes of batches run without"
        ]
