import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from handlers.cuda_recorder import CudaRecorder, _tuned

INPUTS = ["input"]


class FakeCuda:
    """What the recorder calls of ``torch.cuda``, in order."""

    def __init__(self, monkeypatch):
        self.events = []
        self.current = self.stream_named("computing")
        self._pools = itertools.count()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream_named("recording"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.new_graph)
        for name in ("graph_pool_handle", "current_stream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch, "zeros", lambda size, *, device: self.events.append(f"something on {device}"))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(
                torch._C, name, lambda *given, name=name: self.events.append((name, *given)), raising=False
            )

    def stream_named(self, name):
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.events.append(f"{name} waits for {other.name}")
        )

    def new_graph(self):
        return SimpleNamespace(replay=lambda: self.events.append("replay"))

    def graph_pool_handle(self):
        return f"pool {next(self._pools)}"

    def current_stream(self, device):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, *, stream, capture_error_mode, pool="its own pool"):
        assert capture_error_mode == "thread_local"
        self.events.append(f"capture on {stream.name} in {pool}")
        yield
        self.events.append("captured")


class TestCudaRecorder:
    def model(self, cuda, fails=False):
        def model(inputs):
            cuda.events.append(f"run on {cuda.current.name}")
            if fails and any(str(event).startswith("capture on") for event in cuda.events):
                raise RuntimeError("looks at a value")
            return [f"output of {inputs[0]}"]

        return model

    def test_it_runs_first_where_it_then_records(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        recorder = CudaRecorder(torch.device("cuda", 1), self.model(cuda), tune=False)
        replay, outputs = recorder.capture(INPUTS)
        assert outputs == ["output of input"]
        assert cuda.events == [
            "recording waits for computing",
            *["run on recording"] * 3,
            "capture on recording in pool 0",
            "run on recording",
            "captured",
            "computing waits for recording",
        ]
        replay()
        assert cuda.events[-1] == "replay"

    def test_graphs_share_a_pool(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        recorder = CudaRecorder(torch.device("cuda", 1), self.model(cuda), tune=False)
        for _ in range(2):
            recorder.capture(INPUTS)
        assert cuda.events.count("capture on recording in pool 0") == 2

    def test_a_capture_that_fails_is_forgotten_and_the_stream_is_as_it_was(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        recorder = CudaRecorder(torch.device("cuda", 1), self.model(cuda, fails=True), tune=True)
        with pytest.raises(RuntimeError, match="looks at a value"):
            recorder.capture(INPUTS)
        assert cuda.events[-5:] == [
            ("_cuda_endAllocateToPool", 1, "pool 0"),
            ("_cuda_releasePool", 1, "pool 0"),
            # For the generator of random numbers, which takes only a capture that succeeds for ended.
            "capture on recording in its own pool",
            "something on cuda:1",
            "captured",
        ]
        assert cuda.current.name == "computing"
        assert torch.backends.cudnn.benchmark is False

    def test_an_allocator_that_knows_is_left_alone(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)

        def knows(*given):
            raise RuntimeError("no such capture")

        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", knows)
        recorder = CudaRecorder(torch.device("cuda", 1), self.model(cuda, fails=True), tune=False)
        with pytest.raises(RuntimeError, match="looks at a value"):
            recorder.capture(INPUTS)
        # Releasing what was released ends the process.
        assert not [event for event in cuda.events if event[0] == "_cuda_releasePool"]

    def test_cudnn_stops_trying_when_it_has_tried_for_long(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        times = itertools.accumulate(itertools.cycle([0, 6]))
        tuned = []
        recorder = CudaRecorder(
            torch.device("cuda", 1),
            lambda inputs: tuned.append(torch.backends.cudnn.benchmark) or ["output"],
            tune=True,
            clock=lambda: next(times),
        )
        for _ in range(4):
            recorder.capture(INPUTS)
        assert tuned == [True] * 8 + [False] * 8
        assert cuda.events.count("captured") == 4


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_cudnn_is_tuned_for_captures_only(monkeypatch, before, wanted):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)

    def capture():
        with _tuned(wanted):
            assert torch.backends.cudnn.benchmark is (before or wanted)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        capture()
    assert torch.backends.cudnn.benchmark is before
