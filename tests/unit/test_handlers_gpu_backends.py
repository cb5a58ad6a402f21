"""Backends on a GPU, where there is none: the CPU stands in for it, and what is copied, captured and replayed is the
same."""

import dataclasses
import logging
import threading
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from handlers.artifact import ModuleSource
from handlers.errors import BackendError
from handlers.onnx import OnnxBackend
from handlers.onnx_gpu import cuda_options
from handlers.onnx_recorder import CAPTURING, OnnxRecorder
from handlers.pt2 import Pt2Backend
from handlers.signature import TENSOR, Signature
from handlers.tensors import TensorSpec

from .backend_subject import FILES, NAMES, SIGNATURE, arrays, expected, load
from .fake_gpu import FakeRecorder, LateTransfers

pytestmark = pytest.mark.usefixtures("_process_as_it_was")

CPU = torch.device("cpu")
MAX_BATCH = 4
# Of MAX_BATCH: 1, 2 and 4 samples, all of the longest length.
GRAPHS = 3


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    """Lines of the log; another test may have kept them from caplog."""
    monkeypatch.setattr(logging.getLogger("torchport"), "propagate", True)
    caplog.set_level(logging.WARNING, "torchport")
    return caplog


def assert_right(backend, *shape):
    """A batch gives what the module gives."""
    batch = arrays(*shape)
    outputs = backend.run(batch)
    assert list(outputs) == NAMES[1]
    for name, right in expected(batch).items():
        assert outputs[name].dtype == np.float32
        np.testing.assert_allclose(outputs[name], right, rtol=1e-4, atol=1e-5)


def assert_threads_do_not_disturb_each_other(backend):
    """Two batches with the same graph, one with another, one without."""
    batches = [arrays(*shape) for shape in [(3, 5), (4, 3), (1, 9), (5, 5)]]
    wrong = []

    def ask(batch, right):
        for _ in range(10):
            if not np.allclose(backend.run(batch)["pooled"], right, rtol=1e-4, atol=1e-5):
                wrong.append(right.shape)

    threads = [threading.Thread(target=ask, args=(batch, expected(batch)["pooled"])) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.fixture
def late(monkeypatch):
    """Copies come as late as a GPU's may."""
    monkeypatch.setattr("handlers.staging.CudaTransfers", lambda device: LateTransfers())


class TestEager:
    @pytest.fixture
    def recorder(self, monkeypatch, late):
        recorder = FakeRecorder()

        def build(device, model, *, tune):
            recorder.model = model
            return recorder

        monkeypatch.setattr("handlers.eager.torch_device", lambda name, gpu: torch.device("cpu"))
        monkeypatch.setattr("handlers.eager.CudaRecorder", build)
        return recorder

    def load(self, folder, **options):
        return load(folder, "eager", device="cuda", **options)

    @pytest.mark.parametrize(("max_batch", "replays"), [(0, 0), (MAX_BATCH, 1)])
    def test_graphs_are_replayed_where_the_largest_batch_is_known(self, built, recorder, max_batch, replays):
        backend = self.load(built("eager"), max_batch=max_batch)
        assert_right(backend, 3, 5)
        assert (recorder.captures, recorder.replays) == (max_batch and GRAPHS, replays)

    def test_two_batches_may_be_under_way(self, built, recorder):
        backend = self.load(built("eager"), max_batch=MAX_BATCH)
        assert backend.lanes == 2
        assert_threads_do_not_disturb_each_other(backend)
        assert recorder.replays == 30

    def test_larger_batches_run_plainly(self, built, recorder):
        assert_right(self.load(built("eager"), max_batch=MAX_BATCH), 5, 5)
        assert recorder.replays == 0

    def test_the_weights_are_converted(self, built, recorder):
        backend = self.load(built("eager"), max_batch=MAX_BATCH, precision="bf16")
        assert {weight.dtype for weight in backend._module.parameters()} == {torch.bfloat16}
        outputs = backend.run(arrays())
        assert outputs["pooled"].dtype == np.float32
        np.testing.assert_allclose(outputs["pooled"], expected(arrays())["pooled"], atol=0.05)

    @pytest.mark.parametrize("max_batch", [0, 2])
    def test_convolutions_have_their_channels_last(self, tmp_path, recorder, max_batch):
        layer = nn.Conv2d(3, 4, 3)
        torch.save(layer.state_dict(), tmp_path / "weights.pt")
        signature = Signature(
            task=TENSOR,
            inputs=(TensorSpec(name="input", dtype="float32", shape=("batch", 3, 6, 7)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 4, 4, 5)),),
        )
        config = {"in_channels": 3, "out_channels": 4, "kernel_size": 3}
        source = ModuleSource(factory="torch.nn:Conv2d", config=config)
        backend = self.load(tmp_path, max_batch=max_batch, signature=signature, module=source)
        assert backend._module.module.weight.is_contiguous(memory_format=torch.channels_last)
        batch = {"input": np.random.default_rng(0).random((2, 3, 6, 7), dtype=np.float32)}
        seen = []
        backend._module.module.register_forward_pre_hook(
            lambda module, _, given: seen.append(given["input"].is_contiguous(memory_format=torch.channels_last)),
            with_kwargs=True,
        )
        with torch.inference_mode():
            right = layer(torch.from_numpy(batch["input"])).numpy()
        np.testing.assert_allclose(backend.run(batch)["y"], right, rtol=1e-4, atol=1e-5)
        assert seen == [True]
        assert recorder.replays == bool(max_batch)


class TestPt2:
    @pytest.fixture
    def given(self, monkeypatch, late):
        """What torch's loader was given; it loads a package for the CPU and says that it is for a GPU."""
        given = []
        loader = torch._C._aoti.AOTIModelPackageLoader

        class Loader:
            def __init__(self, path, model, unwatched, runners, index):
                given.append((unwatched, runners, index))
                self.run = loader(path, model, unwatched, runners, -1).run

            def get_metadata(self):
                return {"AOTI_DEVICE_KEY": "cuda"}

        monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
        return given

    @pytest.fixture
    def recorder(self, monkeypatch):
        recorder = FakeRecorder()

        def build(device, model, *, tune):
            recorder.model = model
            return recorder

        monkeypatch.setattr("handlers.pt2.torch_device", lambda name, gpu: torch.device("cpu"))
        monkeypatch.setattr("handlers.pt2.CudaRecorder", build)
        return recorder

    @pytest.mark.parametrize(("max_batch", "replays"), [(0, 0), (MAX_BATCH, 1)])
    def test_graphs_are_replayed_where_the_largest_batch_is_known(self, built, given, recorder, max_batch, replays):
        backend = load(built("pt2"), "pt2", device="cuda", max_batch=max_batch)
        assert_right(backend, 3, 5)
        assert (recorder.captures, recorder.replays) == (max_batch and GRAPHS, replays)
        assert_right(backend, 5, 5)
        assert recorder.replays == replays
        # Its own events would be asked for while a graph is captured, which CUDA forbids.
        assert given == [(True, 1, -1)]

    def test_two_batches_may_be_under_way_and_python_only_launches(self, built, given, recorder):
        backend = load(built("pt2"), "pt2", device="cuda", max_batch=MAX_BATCH)
        assert (backend.lanes, backend.holds_lock) == (2, False)
        assert_threads_do_not_disturb_each_other(backend)
        assert recorder.replays == 30

    @pytest.mark.parametrize("gpu", [0, 3])
    def test_code_is_loaded_on_the_gpu_that_is_named(self, built, given, monkeypatch, gpu):
        monkeypatch.setattr("handlers.pt2.torch_device", torch.device)
        path = built("pt2") / FILES["pt2"]
        backend = Pt2Backend(path, SIGNATURE, device="cuda", threads=1, gpu=gpu)
        assert given == [(True, 1, gpu)]
        assert backend.device == "cuda"
        # Its outputs lie on the CPU here.
        with pytest.raises(BackendError, match=f"lie on cpu instead of cuda:{gpu}"):
            backend.run(arrays())

    def test_code_for_another_device_is_refused(self, built, monkeypatch):
        monkeypatch.setattr("handlers.pt2.torch_device", torch.device)
        with pytest.raises(BackendError, match=r"model\.pt2 was compiled for cpu, and the signature says cuda"):
            load(built("pt2"), "pt2", device="cuda")


class CudaBinding:
    """A binding of the CPU's that calls its device ``cuda``."""

    def __init__(self, binding, index):
        self.binding = binding
        self._index = index
        self.bind_cpu_input = binding.bind_cpu_input
        self.copy_outputs_to_cpu = binding.copy_outputs_to_cpu

    def bind_input(self, name, device, index, *rest):
        assert (device, index) == ("cuda", self._index)
        self.binding.bind_input(name, "cpu", 0, *rest)

    def bind_output(self, name, device, index, *rest):
        assert (device, index) == ("cuda", self._index)
        self.binding.bind_output(name, "cpu", 0, *rest)


class CudaSession:
    """A session of the CPU's that calls its device ``cuda``.

    Attributes:
        options: Of the provider.
        device_id: The GPU that it says it is on.
        runs: The number of its graph and the thread, for every run.
        fails: Raised by runs that capture; None for none.
    """

    def __init__(self, session, options):
        self.session = session
        self.options = options
        self.device_id = options["device_id"]
        self.runs = []
        self.fails = None
        self.get_inputs = session.get_inputs
        self.get_outputs = session.get_outputs

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_provider_options(self):
        return {"CUDAExecutionProvider": {"device_id": self.device_id}}

    def io_binding(self):
        return CudaBinding(self.session.io_binding(), int(self.options["device_id"]))

    def run_with_iobinding(self, binding, options):
        number = int(options.get_run_config_entry("gpu_graph_id"))
        self.runs.append((number, threading.get_ident()))
        if number >= 0 and self.fails is not None:
            raise self.fails
        self.session.run_with_iobinding(binding.binding, options)


class TestOnnx:
    GPU = 3

    @pytest.fixture
    def sessions(self, monkeypatch, built):
        """The sessions that were opened; a test may have ``change`` called with each."""
        built("onnx")  # while there is no GPU yet, of which exporting would make use
        opened = []
        real = onnxruntime.InferenceSession
        opened_change = []

        def start(path, options, *, providers, provider_options, enable_fallback):
            assert (providers, enable_fallback) == (["CUDAExecutionProvider"], 0)
            session = CudaSession(real(path, options, providers=["CPUExecutionProvider"]), provider_options[0])
            opened.append(session)
            for change in opened_change:
                change(session)
            return session

        monkeypatch.setattr("handlers.onnx._prepare_cuda", lambda onnxruntime: None)
        monkeypatch.setattr(onnxruntime, "InferenceSession", start)
        monkeypatch.setattr("handlers.onnx_gpu.torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("handlers.onnx_gpu.OnnxRecorder", lambda session, _: OnnxRecorder(session, CPU))
        return SimpleNamespace(opened=opened, change=opened_change.append)

    def load(self, built, *, max_batch=0, signature=SIGNATURE, **options):
        path = built("onnx") / FILES["onnx"]
        return OnnxBackend(path, signature, device="cuda", threads=1, gpu=self.GPU, max_batch=max_batch, **options)

    def test_options_of_a_gpu_name_it_and_spare_its_memory(self):
        options = {
            "device_id": "3",
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",
        }
        assert cuda_options(3) == options
        assert cuda_options(3, memory_bytes=1 << 30) == {**options, "gpu_mem_limit": "1073741824"}

    def test_a_session_gets_its_options(self, built, sessions, late):
        backend = self.load(built, gpu_memory_bytes=5)
        assert [session.options for session in sessions.opened] == [cuda_options(3, memory_bytes=5)]
        assert (backend.device, backend.lanes) == ("cuda", 2)

    def test_another_gpu_than_the_one_asked_for_is_refused(self, built, sessions, late):
        sessions.change(lambda session: setattr(session, "device_id", "0"))
        with pytest.raises(BackendError, match="ONNX Runtime chose GPU 0 instead of 3"):
            self.load(built)

    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 16), (1, 2)])
    def test_bound_inputs_and_outputs_give_the_same(self, built, sessions, late, shape):
        assert_right(self.load(built), *shape)
        assert [number for number, _ in sessions.opened[0].runs] == [-1]

    def test_with_a_torch_for_the_cpu_the_session_copies(self, built, sessions, monkeypatch):
        monkeypatch.setattr("handlers.onnx_gpu.torch.cuda.is_available", lambda: False)
        backend = self.load(built, max_batch=MAX_BATCH)
        assert backend.lanes == 1
        assert_right(backend, 3, 7)
        assert [session.options for session in sessions.opened] == [cuda_options(3)]

    def test_everything_has_been_copied_before_it_computes(self, built, sessions, monkeypatch):
        transfers = []
        monkeypatch.setattr(
            "handlers.staging.CudaTransfers", lambda device: transfers.append(LateTransfers()) or transfers[-1]
        )
        backend = self.load(built)
        for _ in range(3):  # the third has the lane of the first, whose memory is there
            backend.run(arrays())
        # It computes on another stream, which does not wait for the copies.
        assert transfers[0].events[-4:] == ["copy in", "copy in", "arrive", "exit"]

    @pytest.mark.parametrize("max_batch", [0, MAX_BATCH])
    def test_inputs_that_the_graph_has_no_use_for_are_left_out(self, built, sessions, late, max_batch):
        unused = TensorSpec(name="unused", dtype="float32", shape=("batch",))
        signature = dataclasses.replace(SIGNATURE, inputs=(unused, *SIGNATURE.inputs))
        backend = self.load(built, signature=signature, max_batch=max_batch)
        batch = {**arrays(), "unused": np.zeros(2, np.float32)}
        np.testing.assert_allclose(backend.run(batch)["pooled"], expected(batch)["pooled"], rtol=1e-4, atol=1e-5)

    def test_graphs_have_a_number_each_and_one_thread(self, built, sessions, late):
        backend = self.load(built, max_batch=MAX_BATCH)
        (session,) = sessions.opened
        assert session.options == {**cuda_options(3), **CAPTURING}
        numbers = {number for number, _ in session.runs if number >= 0}
        assert len(numbers) == GRAPHS
        session.runs.clear()
        assert_right(backend, 3, 5)
        assert_right(backend, 1, 16)
        assert {number for number, _ in session.runs} < numbers
        assert_right(backend, 5, 5)
        assert session.runs[-1][0] == -1

    def test_two_batches_may_be_under_way(self, built, sessions, late):
        backend = self.load(built, max_batch=MAX_BATCH)
        assert_threads_do_not_disturb_each_other(backend)
        (session,) = sessions.opened
        assert len({thread for number, thread in session.runs if number >= 0}) == 1

    def test_a_model_that_cannot_be_captured_runs_without(self, built, sessions, late, log):
        sessions.change(lambda session: setattr(session, "fails", RuntimeError("CUDA failure 900: capturing\nmore")))
        backend = self.load(built, max_batch=MAX_BATCH)
        # The stream of the first may still be capturing.
        assert [session.options for session in sessions.opened] == [{**cuda_options(3), **CAPTURING}, cuda_options(3)]
        assert_right(backend, 3, 5)
        assert [record.getMessage() for record in log.records] == [
            "the model runs without CUDA graphs, since it cannot be captured: CUDA failure 900: capturing more"
        ]

    def test_a_session_that_refuses_to_capture_is_opened_without(self, built, sessions, late, log):
        def refuse(session):
            if CAPTURING.items() <= session.options.items():
                raise RuntimeError("This session cannot use the graph capture feature")

        sessions.change(refuse)
        backend = self.load(built, max_batch=MAX_BATCH)
        assert_right(backend, 3, 5)
        (record,) = log.records
        assert "cannot use the graph capture feature" in record.getMessage()
        assert [number for number, _ in sessions.opened[-1].runs] == [-1]

    @pytest.mark.parametrize(("release", "has"), [("1.30.2", False), ("1.31.0", True), ("2.0.0", True), ("1.4", False)])
    def test_older_releases_have_none_since_they_replay_wrongly(
        self, built, sessions, late, monkeypatch, log, release, has
    ):
        monkeypatch.setattr(onnxruntime, "__version__", release)
        backend = self.load(built, max_batch=MAX_BATCH)
        assert_right(backend, 3, 5)
        assert (CAPTURING.items() <= sessions.opened[0].options.items()) == has
        assert ("install 1.31 or newer" in log.text) == (not has)


class TestOnnxRecorder:
    def test_it_waits_for_torchs_copies_before_every_run(self, monkeypatch):
        events = []
        stream = SimpleNamespace(synchronize=lambda: events.append("settled"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(
            "handlers.onnx_recorder.torch.empty", lambda shape, *, dtype, device: torch.zeros(shape, dtype=dtype)
        )
        session = SimpleNamespace(
            bind_device=lambda tensors: tensors,
            run=lambda binding: events.append("run") or [np.ones(2, np.float32)],
            bind_outputs=lambda binding, tensors: events.append("bind"),
            run_graph=lambda binding, number: events.append(f"graph {number}"),
        )
        recorder = OnnxRecorder(session, torch.device("cuda", 1))
        replays = [recorder.capture(["x"])[0] for _ in range(2)]
        assert events == [
            *["settled", "run", "bind", "settled", "graph 0"],
            *["settled", "run", "bind", "settled", "graph 1"],
        ]
        del events[:]
        for replay in replays:
            replay()
        assert events == ["settled", "graph 0", "settled", "graph 1"]
