import sys
from types import SimpleNamespace

import pytest
import torch

from handlers.artifact import Artifact
from handlers.errors import BackendError, LoadError
from handlers.gpu_memory import BatchCeilings, CudaGpu, MemoryWatch, is_out_of_memory, let_go, watch_memory

from .fake_gpu import GIB, FakeGpu, out_of_memory

ONNX = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. Status "
    "Message: bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) "
    "Failed to allocate memory for requested buffer of size 3221225472"
)


class TestIsOutOfMemory:
    @pytest.mark.parametrize(
        "error",
        [
            out_of_memory(),
            torch.OutOfMemoryError("any text"),
            RuntimeError(
                "The following operation failed in the TorchScript interpreter.\nRuntimeError: " + str(out_of_memory())
            ),
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            Exception(ONNX),
        ],
    )
    def test_what_runtimes_say_for_want_of_memory(self, error):
        assert is_out_of_memory(error)

    @pytest.mark.parametrize(
        "error", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("memory"), KeyError(1)]
    )
    def test_other_failures_are_not_taken_for_it(self, error):
        assert not is_out_of_memory(error)

    def test_causes_count(self):
        told, raised_meanwhile = BackendError("the model fails on a batch of 4"), ValueError("ending failed as well")
        told.__cause__ = raised_meanwhile.__context__ = out_of_memory()
        assert is_out_of_memory(told)
        assert is_out_of_memory(raised_meanwhile)

    def test_a_circle_of_causes_ends(self):
        first, second = ValueError("one"), ValueError("two")
        first.__cause__, second.__cause__ = second, first
        assert not is_out_of_memory(first)

    def test_torch_need_not_be_there(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "torch")
        assert is_out_of_memory(Exception(ONNX))
        assert not is_out_of_memory(Exception("else"))


def test_letting_go_frees_what_the_failed_call_had():
    freed = []

    class Tensor:
        def __del__(self):
            freed.append(True)

    def fail():
        tensor = Tensor()
        raise RuntimeError("no memory", id(tensor))

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert freed == []
    let_go(caught.value)
    assert freed == [True]
    assert caught.value.__traceback__ is not None


class TestWatch:
    def run_out(self, gpu, error, what):
        """A model that has taken 9 GiB fails."""
        with MemoryWatch(gpu).explaining(what):
            gpu.take(9 * GIB)
            raise error

    def test_a_model_that_leaves_enough_is_served(self):
        gpu = FakeGpu(free=10 * GIB)
        watch = MemoryWatch(gpu)
        gpu.take(9 * GIB)
        watch.check("batches of 8")

    def test_one_that_leaves_next_to_none_is_refused_with_figures(self):
        gpu = FakeGpu(2, free=10 * GIB)
        watch = MemoryWatch(gpu)
        gpu.take(98 * GIB // 10)
        with pytest.raises(LoadError) as caught:
            watch.check("batches of 8")
        assert str(caught.value) == (
            "the model needs 10.3 GiB for batches of 8, and GPU 2 has 10.0 GiB free; "
            "set a lower max_batch, or serve it on another GPU or with fewer workers on this one"
        )

    def test_the_peak_counts_when_some_of_it_was_given_back(self):
        gpu = FakeGpu(free=10 * GIB)
        watch = MemoryWatch(gpu)
        gpu.take(98 * GIB // 10)
        gpu.take(-8 * GIB)
        with pytest.raises(LoadError, match=r"needs 10\.3 GiB"):
            watch.check("batches of 8")

    def test_what_another_runtime_takes_counts(self):
        gpu = FakeGpu(free=10 * GIB)
        watch = MemoryWatch(gpu)
        gpu.take(1 * GIB)
        gpu.free_bytes -= 8 * GIB
        watch.check("batches of 8")
        gpu.free_bytes -= GIB // 2 + GIB // 4
        with pytest.raises(LoadError, match=r"needs 10\.2 GiB"):
            watch.check("batches of 8")

    def test_what_torch_had_before_does_not_count(self):
        gpu = FakeGpu(free=2 * GIB, reserved=8 * GIB)
        watch = MemoryWatch(gpu)
        gpu.take(1 * GIB)
        watch.check("batches of 8")

    def test_memory_that_other_processes_give_back_is_not_negative_need(self):
        gpu = FakeGpu(free=10 * GIB)
        watch = MemoryWatch(gpu)
        gpu.take(98 * GIB // 10)
        gpu.free_bytes += 5 * GIB
        with pytest.raises(LoadError, match=r"needs 10\.3 GiB"):
            watch.check("batches of 8")

    @pytest.mark.parametrize(("error", "gib"), [(out_of_memory("2.00 GiB"), "11.0"), (Exception(ONNX), "12.0")])
    def test_running_out_is_told_with_what_was_asked_for(self, error, gib):
        with pytest.raises(LoadError, match=rf"needs {gib} GiB for batches of 8, and GPU 1 has 10\.0 GiB") as caught:
            self.run_out(FakeGpu(free=10 * GIB), error, "batches of 8")
        assert caught.value.__cause__ is error

    @pytest.mark.parametrize(
        ("requested", "gib"), [("512.00 MiB", "9.5"), ("1048576.00 KiB", "10.0"), ("nothing known", "more than 9.0")]
    )
    def test_units_are_read_and_may_be_missing(self, requested, gib):
        with pytest.raises(LoadError, match=rf"needs {gib} GiB for its weights"):
            self.run_out(FakeGpu(free=9 * GIB), out_of_memory(requested), "its weights")

    def test_an_error_around_the_runtimes_own_is_told_as_well(self):
        watch = MemoryWatch(FakeGpu())
        with pytest.raises(LoadError, match=r"needs 2\.0 GiB for its weights"), watch.explaining("its weights"):
            raise BackendError("model.pt is not a TorchScript file") from out_of_memory()

    def test_a_limit_is_torchs_as_well_and_counts_where_it_is_less_than_what_is_free(self):
        gpu = FakeGpu(free=10 * GIB)
        watch = MemoryWatch(gpu, 4 * GIB)
        assert gpu.limits == [4 * GIB]
        gpu.take(3 * GIB)
        watch.check("batches of 8")
        gpu.take(GIB)
        with pytest.raises(LoadError) as caught:
            watch.check("batches of 8")
        assert str(caught.value) == (
            "the model needs 4.2 GiB for batches of 8, and the worker may take 4.0 GiB of GPU 1; "
            "set a lower max_batch or a higher gpu_memory_mib"
        )

    def test_less_free_than_the_limit_is_told_as_such(self):
        gpu = FakeGpu(free=2 * GIB)
        watch = MemoryWatch(gpu, 4 * GIB)
        gpu.take(2 * GIB)
        with pytest.raises(LoadError, match=r"GPU 1 has 2\.0 GiB free; set a lower max_batch, or serve it on another"):
            watch.check("batches of 8")

    def test_the_gpu_has_the_name_that_it_has_outside(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
        gpu = FakeGpu(0, free=GIB)
        watch = MemoryWatch(gpu)
        gpu.take(GIB)
        with pytest.raises(LoadError, match="and GPU 6 has"):
            watch.check("batches of 8")

    def test_other_errors_pass(self):
        with pytest.raises(BackendError, match=r"^corrupt$"), MemoryWatch(FakeGpu()).explaining("its weights"):
            raise BackendError("corrupt")


class TestWhatIsWatched:
    def artifact(self, device):
        return Artifact(format="torchscript", precision="fp32", file="model.pt", device=device)

    @pytest.fixture
    def cuda(self, monkeypatch):
        """Two GPUs, the second of which is torch's current one."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        asked = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (asked.append(index), (7 * GIB, 8 * GIB))[1])
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 3 * GIB)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index: 4 * GIB)
        return asked

    @pytest.mark.parametrize(("gpu", "index"), [(0, 0), (1, 1), (None, 1)])
    def test_the_gpu_is_the_workers(self, cuda, gpu, index):
        assert watch_memory(self.artifact("cuda"), gpu)._gpu.index == index
        assert set(cuda) == {index}

    def test_a_gpu_that_is_not_there_is_left_to_what_loads_the_model(self, cuda):
        assert watch_memory(self.artifact("cuda"), 2) is None
        assert cuda == []

    def test_artifacts_for_the_cpu_have_nothing_to_watch(self, cuda):
        assert watch_memory(self.artifact("cpu"), 0) is None
        assert watch_memory(None, 0) is None

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_there_is_nothing_to_watch(self):
        assert watch_memory(self.artifact("cuda"), None) is None

    def test_figures_are_torchs(self, cuda):
        gpu = CudaGpu(1)
        assert (gpu.free(), gpu.reserved(), gpu.peak()) == (7 * GIB, 3 * GIB, 4 * GIB)

    @pytest.mark.parametrize(("limit", "share"), [(2, 0.25), (8, 1.0), (80, 1.0)])
    def test_torch_takes_a_limit_as_a_share(self, cuda, monkeypatch, limit, share):
        given = []
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=8 * GIB))
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *pair: given.append(pair))
        watch_memory(self.artifact("cuda"), 0, limit * GIB)
        watch_memory(self.artifact("cuda"), 0)
        assert given == [(share, 0)]


class TestCeilings:
    def cut(self, ceilings, batch, positions):
        return [len(piece) for piece in ceilings.cut([list(range(batch))], lambda indices: positions)]

    def test_without_failures_batches_stay_whole(self):
        batches = [[0, 1], [2]]
        assert BatchCeilings().cut(batches, lambda batch: pytest.fail("nobody needs to know")) == batches

    def test_half_of_what_failed_is_tried_next(self):
        ceilings = BatchCeilings()
        assert ceilings.lower(32, 100) == 16
        assert self.cut(ceilings, 32, 100) == [16, 16]
        assert self.cut(ceilings, 33, 200) == [16, 16, 1]

    def test_shorter_samples_may_still_be_many(self):
        ceilings = BatchCeilings()
        ceilings.lower(32, 100)
        assert self.cut(ceilings, 32, 99) == [32]

    def test_the_lowest_ceiling_counts(self):
        ceilings = BatchCeilings()
        ceilings.lower(32, 100)
        ceilings.lower(16, 200)
        assert self.cut(ceilings, 16, 100) == [16]
        assert self.cut(ceilings, 16, 200) == [8, 8]
        ceilings.lower(8, 100)
        assert self.cut(ceilings, 16, 200) == [4] * 4

    def test_pieces_are_never_empty_and_keep_their_order(self):
        ceilings = BatchCeilings()
        assert ceilings.lower(2, 10) == 1
        assert ceilings.lower(3, 5) == 1
        assert ceilings.cut([[3, 1], [2]], lambda batch: 10) == [[3], [1], [2]]

    def test_few_are_remembered(self):
        ceilings = BatchCeilings()
        for i in range(100):
            ceilings.lower(1000 - i, 1000 - i)
        assert len(ceilings._found) <= 16
