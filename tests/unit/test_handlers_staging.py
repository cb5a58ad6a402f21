import threading
import time

import numpy as np
import pytest
import torch

from handlers.errors import BackendError
from handlers.signature import TENSOR, Signature
from handlers.staging import DirectExchange, Staging, build_exchange, shaped
from handlers.tensors import Axis, TensorSpec

from .fake_gpu import LateTransfers

SIGNATURE = Signature(
    task=TENSOR,
    inputs=(
        TensorSpec(name="ids", dtype="int64", shape=("batch", "length"), minimum=0, maximum=9, padding=7),
        TensorSpec(name="picture", dtype="float32", shape=("batch", 3, 4, 5)),
    ),
    outputs=(
        TensorSpec(name="whole", dtype="float32", shape=("batch", 3, 4, 5)),
        TensorSpec(name="flags", dtype="bool", shape=("batch",)),
    ),
    axes={"length": Axis(minimum=1, maximum=16)},
)


def batch(samples=2, length=5, seed=0):
    random = np.random.default_rng(seed)
    return {
        "ids": random.integers(0, 10, (samples, length)),
        "picture": random.random((samples, 3, 4, 5), dtype=np.float32),
    }


@pytest.fixture
def transfers():
    return LateTransfers()


@pytest.fixture
def staging(transfers):
    return Staging(SIGNATURE, [transfers])


def passed(staging, given, **options):
    """What the module gets of a batch, as it is while it computes."""
    seen = []

    def compute(tensors):
        seen.extend(tensor.clone(memory_format=torch.preserve_format) for tensor in tensors)
        return outputs()

    staging.run(given, compute, **options)
    return seen


def outputs(fill=1):
    return [torch.full((2, 3, 4, 5), float(fill)), torch.tensor([True, False])]


def without_memory(events):
    return [event for event in events if not event.startswith("pinned")]


class TestIn:
    def test_tensors_hold_the_batch_in_the_order_of_the_signature(self, staging):
        given = batch()
        ids, picture = passed(staging, dict(reversed(given.items())))
        np.testing.assert_array_equal(ids.numpy(), given["ids"])
        np.testing.assert_array_equal(picture.numpy(), given["picture"])
        assert (ids.dtype, picture.dtype) == (torch.int64, torch.float32)

    def test_arrays_of_any_layout_are_taken(self, staging):
        given = batch(4, 6)
        turned = {"ids": np.asfortranarray(given["ids"]), "picture": given["picture"][::-1, :, ::-1]}
        ids, picture = passed(staging, turned)
        assert ids.is_contiguous()
        assert picture.is_contiguous()
        np.testing.assert_array_equal(ids.numpy(), given["ids"])
        np.testing.assert_array_equal(picture.numpy(), given["picture"][::-1, :, ::-1])

    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (2, 1, 4, 5), (1, 3, 1, 1)])
    def test_pictures_lie_with_their_channels_last_where_that_is_wanted(self, transfers, shape):
        signature = Signature(
            task=TENSOR, inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", *shape[1:])),), outputs=()
        )
        array = np.random.default_rng(1).random(shape, dtype=np.float32)
        seen = []
        staging = Staging(signature, [transfers], channels_last=True)
        staging.run({"x": array}, lambda tensors: seen.extend(tensors) or [])
        assert seen[0].is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(seen[0].numpy(), array)

    def test_streams_wait_where_they_must(self, staging, transfers):
        passed(staging, batch())
        copied = ["begin", "copy in", "begin", "copy in", "join"]
        assert without_memory(transfers.events) == [
            *["enter", "arrive", *copied],
            *["copy out", "copy out", "leave", "exit"],
        ]

    def test_copies_wait_for_what_computes_only_where_memory_is_new(self, staging, transfers):
        passed(staging, batch())
        transfers.events.clear()
        passed(staging, batch())
        assert "begin" not in transfers.events
        passed(staging, batch(3))
        assert transfers.events.count("begin") == 2

    def test_memory_is_used_again(self, staging, transfers):
        for samples in (4, 2, 4, 1):
            passed(staging, batch(samples))
        pinned = [event for event in transfers.events if event.startswith("pinned")]
        assert pinned == ["pinned 160", "pinned 960", "pinned 480", "pinned 2"]

    def test_memory_grows(self, staging, transfers):
        passed(staging, batch(1))
        ids, _ = passed(staging, batch(3, 16))
        assert "pinned 384" in transfers.events
        np.testing.assert_array_equal(ids.numpy(), batch(3, 16)["ids"])

    def test_without_memory_for_an_input_the_next_batch_passes(self):
        transfers = LateTransfers(capacity=100)
        staging = Staging(SIGNATURE, [transfers])
        with pytest.raises(torch.OutOfMemoryError):
            passed(staging, batch())
        assert transfers.events[-2:] == ["pinned 480", "exit"]
        transfers.capacity = None
        np.testing.assert_array_equal(passed(staging, batch(seed=3))[0].numpy(), batch(seed=3)["ids"])
        assert not torch.is_inference_mode_enabled()


class TestShapes:
    SHAPES = ((4, 8), (4, 3, 4, 5))

    def test_larger_tensors_are_filled_up_with_padding_and_the_first_sample(self, staging):
        ids, picture = (tensor.numpy() for tensor in passed(staging, batch(2, 5), shapes=self.SHAPES))
        np.testing.assert_array_equal(ids[:2, :5], batch(2, 5)["ids"])
        assert (ids[:, 5:] == 7).all()
        np.testing.assert_array_equal(ids[2:], ids[[0, 0]])
        np.testing.assert_array_equal(picture[2:], batch(2, 5)["picture"][[0, 0]])

    def test_nothing_of_an_earlier_batch_is_left(self, staging):
        passed(staging, batch(4, 8, seed=1), shapes=self.SHAPES)
        ids, _ = passed(staging, batch(1, 2, seed=2), shapes=self.SHAPES)
        expected = np.full((4, 8), 7)
        expected[:, :2] = batch(1, 2, seed=2)["ids"]
        np.testing.assert_array_equal(ids.numpy(), expected)

    def test_one_of_the_same_shape_is_copied_as_it_is(self, staging):
        _, picture = passed(staging, batch(), shapes=((2, 5), (2, 3, 4, 5)))
        np.testing.assert_array_equal(picture.numpy(), batch()["picture"])

    def test_an_input_without_padding_is_not_stretched(self, staging):
        with pytest.raises(ValueError, match="no padding"):
            passed(staging, batch(), shapes=((4, 8), (4, 3, 8, 5)))


class TestOut:
    def test_arrays_are_by_name_and_stay_as_they_are(self, staging):
        first = staging.run(batch(), lambda tensors: outputs(1))
        second = staging.run(batch(), lambda tensors: outputs(2))
        assert list(first) == ["whole", "flags"]
        assert (first["whole"] == 1).all()
        assert (second["whole"] == 2).all()
        assert first["flags"].tolist() == [True, False]
        assert first["whole"].flags.owndata

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_halves_come_back_as_float32(self, staging, dtype):
        whole, flags = outputs(3)
        array = staging.run(batch(), lambda tensors: [whole.to(dtype), flags])["whole"]
        assert array.dtype == np.float32
        assert (array == 3).all()

    def test_parts_of_larger_tensors_are_taken(self, staging):
        whole = torch.arange(240.0).view(4, 3, 4, 5)
        array = staging.run(batch(), lambda tensors: [whole[:2, :, ::2], torch.ones(2, dtype=torch.bool)])["whole"]
        np.testing.assert_array_equal(array, whole[:2, :, ::2].numpy())

    def test_another_number_of_outputs_is_refused(self, staging):
        with pytest.raises(BackendError, match="gives 1 tensors and the signature names 2"):
            staging.run(batch(), lambda tensors: outputs()[:1])


class TestLanes:
    """Two batches under way, each in a thread of its own."""

    DEADLINE_S = 60

    @pytest.fixture
    def lanes(self):
        return [LateTransfers(), LateTransfers()]

    @pytest.fixture
    def wide(self, lanes):
        return Staging(SIGNATURE, lanes)

    def beside(self, job):
        thread = threading.Thread(target=job)
        thread.start()
        return thread

    def test_the_next_batch_is_copied_in_while_one_computes(self, wide, lanes):
        assert wide.lanes == 2
        computing, may_end, found = threading.Event(), threading.Event(), []

        def slow(tensors):
            computing.set()
            assert may_end.wait(self.DEADLINE_S)
            return outputs(1)

        first = self.beside(lambda: found.append(wide.run(batch(seed=1), slow)["whole"].max()))
        assert computing.wait(self.DEADLINE_S)
        ran = threading.Event()

        def quick(tensors):
            ran.set()
            return outputs(2)

        second = self.beside(lambda: found.append(wide.run(batch(seed=2), quick)["whole"].max()))
        wait_for(lambda: lanes[1].events.count("copy in") == 2)
        assert not ran.wait(0.05), "the device computes one batch after the other"
        assert "join" not in lanes[1].events
        may_end.set()
        first.join(self.DEADLINE_S)
        second.join(self.DEADLINE_S)
        assert sorted(found) == [1, 2]

    def test_the_next_batch_computes_while_outputs_come_back(self, wide, lanes):
        leaving, may_leave = threading.Event(), threading.Event()
        leave = lanes[0].leave

        def slowly():
            leaving.set()
            assert may_leave.wait(self.DEADLINE_S)
            leave()

        lanes[0].leave = slowly
        found = []
        thread = self.beside(lambda: found.append(wide.run(batch(), lambda _: outputs(1))))
        assert leaving.wait(self.DEADLINE_S)
        assert (wide.run(batch(), lambda _: outputs(2))["whole"] == 2).all()
        may_leave.set()
        thread.join(self.DEADLINE_S)
        assert (found[0]["whole"] == 1).all()

    def test_a_third_batch_waits_for_a_lane(self, wide):
        may_end = threading.Event()
        entered = [threading.Event() for _ in range(3)]

        def take(i):
            with wide._lane():
                entered[i].set()
                assert may_end.wait(self.DEADLINE_S)

        threads = [self.beside(lambda i=i: take(i)) for i in range(3)]
        wait_for(lambda: sum(event.is_set() for event in entered) == 2)
        time.sleep(0.05)
        assert sum(event.is_set() for event in entered) == 2
        may_end.set()
        for thread in threads:
            thread.join(self.DEADLINE_S)
        assert all(event.is_set() for event in entered)

    def test_batches_one_after_the_other_prepare_all_lanes(self, wide, lanes):
        for _ in range(2):
            passed(wide, batch())
        assert [transfers.events.count("leave") for transfers in lanes] == [1, 1]

    @pytest.mark.parametrize("fails", ["compute", "out"])
    def test_a_batch_that_fails_leaves_its_lane_and_its_turn(self, wide, lanes, fails):
        def compute(tensors):
            if fails == "compute":
                raise ZeroDivisionError
            return outputs()[:1]

        for i in range(4):
            with pytest.raises((ZeroDivisionError, BackendError)):
                wide.run(batch(), compute)
            # What was launched may still write to the lane's inputs.
            assert lanes[i % 2].events[-2:] == ["begin", "exit"]
        assert (wide.run(batch(), lambda _: outputs(5))["whole"] == 5).all()
        assert not torch.is_inference_mode_enabled()

    def test_many_threads_get_their_own_answers(self, wide):
        def triple(tensors):
            ids, picture = tensors
            return [picture * ids.sum(), ids.sum(1) > 0]

        wrong = []

        def ask(seed):
            for i in range(20):
                given = batch(1 + (seed + i) % 4, 1 + (3 * seed + i) % 16, seed=100 * seed + i)
                got = wide.run(given, triple)["whole"]
                if not np.allclose(got, given["picture"] * given["ids"].sum(), rtol=1e-5):
                    wrong.append((seed, i))

        threads = [self.beside(lambda seed=seed: ask(seed)) for seed in range(4)]
        for thread in threads:
            thread.join(self.DEADLINE_S)
        assert wrong == []


class TestLent:
    def test_inputs_are_there_and_nobody_else_computes(self):
        transfers = [LateTransfers(), LateTransfers()]
        staging = Staging(SIGNATURE, transfers)
        ran = threading.Event()
        with staging.lent(batch(seed=4)) as (ids, _):
            np.testing.assert_array_equal(ids.numpy(), batch(seed=4)["ids"])
            thread = threading.Thread(target=lambda: staging.run(batch(), lambda _: ran.set() or outputs()))
            thread.start()
            assert not ran.wait(0.05)
        thread.join(60)
        assert ran.is_set()

    def test_it_ends_with_an_error(self, staging):
        with pytest.raises(ZeroDivisionError), staging.lent(batch()):
            raise ZeroDivisionError
        with staging.lent(batch()):
            assert torch.is_inference_mode_enabled()
        assert not torch.is_inference_mode_enabled()


def wait_for(condition, deadline_s=60):
    """Until it holds."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_cpu_has_no_staging():
    exchange = build_exchange(SIGNATURE, torch.device("cpu"))
    assert isinstance(exchange, DirectExchange)
    assert exchange.lanes == 1
    given = batch()

    def compute(tensors):
        ids, picture = tensors
        assert torch.is_inference_mode_enabled()
        ids += 1
        return [picture + ids.sum(), ids.sum(1) > 0]

    found = exchange.run(given, compute)
    np.testing.assert_array_equal(given["ids"], batch()["ids"])
    np.testing.assert_allclose(found["whole"], given["picture"] + (given["ids"] + 1).sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.float64])
def test_memory_takes_any_form(dtype):
    memory = torch.zeros(100, dtype=torch.uint8)
    tensor = shaped(memory, (2, 3), dtype)
    tensor[1, 2] = 1
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (2, 3))
    assert memory.any()
    assert tuple(shaped(memory, (), dtype).shape) == ()
