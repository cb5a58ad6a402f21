import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from handlers.errors import BackendError
from handlers.signature import TENSOR, Signature
from handlers.staging import CudaTransfers, DirectExchange, Staging, build_exchange, shaped
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
    return Staging(SIGNATURE, transfers)


class TestIn:
    def test_tensors_hold_the_batch_in_the_order_of_the_signature(self, staging):
        given = batch()
        ids, picture = staging.take_in(dict(reversed(given.items())))
        np.testing.assert_array_equal(ids.numpy(), given["ids"])
        np.testing.assert_array_equal(picture.numpy(), given["picture"])
        assert (ids.dtype, picture.dtype) == (torch.int64, torch.float32)

    def test_arrays_of_any_layout_are_taken(self, staging):
        given = batch(4, 6)
        turned = {"ids": np.asfortranarray(given["ids"]), "picture": given["picture"][::-1, :, ::-1]}
        ids, picture = staging.take_in(turned)
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
        (tensor,) = Staging(signature, transfers, channels_last=True).take_in({"x": array})
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(tensor.numpy(), array)

    def test_the_host_waits_for_the_last_copies_and_the_copies_for_what_computes(self, staging, transfers):
        staging.take_in(batch())
        wanted = ["arrive", "begin", "copy in", "copy in", "join"]
        assert [event for event in transfers.events if not event.startswith("pinned")] == wanted

    def test_pinned_memory_is_used_again(self, staging, transfers):
        for samples in (4, 2, 4, 1):
            staging.take_in(batch(samples))
        assert [event for event in transfers.events if event.startswith("pinned")] == ["pinned 160", "pinned 960"]

    def test_pinned_memory_grows(self, staging, transfers):
        staging.take_in(batch(1))
        ids, _ = staging.take_in(batch(3, 16))
        assert "pinned 384" in transfers.events
        np.testing.assert_array_equal(ids.numpy(), batch(3, 16)["ids"])

    def test_a_later_batch_does_not_change_tensors_of_an_earlier_one(self, staging):
        ids, _ = staging.take_in(batch(seed=1))
        staging.take_in(batch(seed=2))
        np.testing.assert_array_equal(ids.numpy(), batch(seed=1)["ids"])

    def test_without_memory_for_an_input_the_others_are_waited_for(self):
        transfers = LateTransfers(room=100)
        staging = Staging(SIGNATURE, transfers)
        with pytest.raises(torch.OutOfMemoryError):
            staging.take_in(batch())
        assert transfers.events[-2:] == ["copy in", "join"]
        transfers.room = None
        np.testing.assert_array_equal(staging.take_in(batch(seed=3))[0].numpy(), batch(seed=3)["ids"])


class TestInto:
    def room(self, samples=4, length=8):
        return [torch.zeros(samples, length, dtype=torch.int64), torch.zeros(samples, 3, 4, 5)]

    def test_larger_tensors_are_filled_up_with_padding_and_the_first_sample(self, staging):
        room = self.room()
        assert staging.take_in(batch(2, 5), into=room) == room
        ids = room[0].numpy()
        np.testing.assert_array_equal(ids[:2, :5], batch(2, 5)["ids"])
        assert (ids[:, 5:] == 7).all()
        np.testing.assert_array_equal(ids[2:], ids[[0, 0]])
        np.testing.assert_array_equal(room[1].numpy()[2:], batch(2, 5)["picture"][[0, 0]])

    def test_nothing_of_an_earlier_batch_is_left(self, staging):
        room = self.room()
        staging.take_in(batch(4, 8, seed=1), into=room)
        staging.take_in(batch(1, 2, seed=2), into=room)
        expected = np.full((4, 8), 7)
        expected[:, :2] = batch(1, 2, seed=2)["ids"]
        np.testing.assert_array_equal(room[0].numpy(), expected)

    def test_one_of_the_same_shape_is_copied_as_it_is(self, staging):
        room = self.room(2, 5)
        staging.take_in(batch(), into=room)
        np.testing.assert_array_equal(room[1].numpy(), batch()["picture"])

    def test_an_input_without_padding_is_not_stretched(self, staging):
        with pytest.raises(ValueError, match="no padding"):
            staging.take_in(batch(), into=[self.room()[0], torch.zeros(4, 3, 8, 5)])


class TestOut:
    def outputs(self, fill):
        return [torch.full((2, 3, 4, 5), float(fill)), torch.tensor([True, False])]

    def test_arrays_are_by_name_and_stay_as_they_are(self, staging):
        first = staging.give_out(self.outputs(1))
        second = staging.give_out(self.outputs(2))
        assert list(first) == ["whole", "flags"]
        assert (first["whole"] == 1).all()
        assert (second["whole"] == 2).all()
        assert first["flags"].tolist() == [True, False]
        assert first["whole"].flags.owndata

    def test_the_host_waits_once_for_all_of_them(self, staging, transfers):
        staging.give_out(self.outputs(1))
        wanted = ["copy out", "copy out", "leave"]
        assert [event for event in transfers.events if not event.startswith("pinned")] == wanted

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_halves_come_back_as_float32(self, staging, dtype):
        whole, flags = self.outputs(3)
        array = staging.give_out([whole.to(dtype), flags])["whole"]
        assert array.dtype == np.float32
        assert (array == 3).all()

    def test_parts_of_larger_tensors_are_taken(self, staging):
        whole = torch.arange(240.0).view(4, 3, 4, 5)
        array = staging.give_out([whole[:2, :, ::2], torch.ones(2, dtype=torch.bool)])["whole"]
        np.testing.assert_array_equal(array, whole[:2, :, ::2].numpy())

    def test_another_number_of_outputs_is_refused(self, staging):
        with pytest.raises(BackendError, match="gives 1 tensors and the signature names 2"):
            staging.give_out(self.outputs(1)[:1])


def test_one_batch_at_a_time_passes_and_only_on_the_device(staging, transfers):
    entered = threading.Event()

    def second():
        with staging.computing():
            entered.set()

    with staging.computing():
        assert torch.is_inference_mode_enabled()
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(60)
    assert entered.is_set()
    assert transfers.events == ["enter", "exit"] * 2


def test_the_next_batch_passes_after_one_that_failed(staging):
    with pytest.raises(ZeroDivisionError), staging.computing():
        raise ZeroDivisionError
    with staging.computing():
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()


def test_the_cpu_has_no_staging():
    exchange = build_exchange(SIGNATURE, torch.device("cpu"))
    assert isinstance(exchange, DirectExchange)
    with exchange.computing():
        ids, _ = exchange.take_in(batch())
        ids += 1
    np.testing.assert_array_equal(ids.numpy(), batch()["ids"] + 1)


class TestCudaTransfers:
    @pytest.fixture
    def events(self, monkeypatch):
        """What is asked of ``torch.cuda``, in order."""
        events = []
        names = iter(["in", "out"])
        streams = {name: self.stream(name, events) for name in ("copying", "computing")}
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams["copying"])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["computing"])
        monkeypatch.setattr(torch.cuda, "Event", lambda: self.event(next(names), events))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.on(stream.name, events))
        return events

    def stream(self, name, events):
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: events.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: events.append(f"{name} waits for event {event.name}"),
        )

    def event(self, name, events):
        return SimpleNamespace(
            name=name,
            record=lambda stream: events.append(f"event {name} after {stream.name}"),
            synchronize=lambda: events.append(f"host waits for event {name}"),
        )

    @contextlib.contextmanager
    def on(self, name, events):
        events.append(f"on {name}")
        yield
        events.append(f"off {name}")

    def test_streams_wait_for_each_other_and_the_host_for_the_end(self, events):
        transfers = CudaTransfers(torch.device("cuda", 1))
        source = torch.ones(2)
        target = torch.zeros(2)
        transfers.arrive()
        transfers.begin()
        transfers.copy_in(target, source)
        transfers.join()
        transfers.copy_out(source, target)
        transfers.leave()
        assert target.tolist() == [1, 1]
        assert events == [
            "host waits for event in",
            "copying waits for computing",
            "on copying",
            "off copying",
            "event in after copying",
            "computing waits for event in",
            "event out after computing",
            "host waits for event out",
        ]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.float64])
def test_memory_takes_any_form(dtype):
    memory = torch.zeros(100, dtype=torch.uint8)
    tensor = shaped(memory, (2, 3), dtype)
    tensor[1, 2] = 1
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (2, 3))
    assert memory.any()
    assert tuple(shaped(memory, (), dtype).shape) == ()
