"""What a block uses, what there is, and giving some back; GPUs are simulated, but for the last test."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
import torch

from models import memory
from models.errors import DeviceError
from models.memory import MemoryTracker, clear_memory, monitor_memory

MIB = 2**20


class FakeCuda:
    """An allocator with one high-water mark for a GPU, as torch's; `calls` says in what order it was used."""

    def __init__(self) -> None:
        self.allocated = self.peak = 100
        self.reserved = 1000
        self.calls: list[str] = []

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: torch.device) -> None:
        self.calls.append("synchronize")

    def memory_allocated(self, device: torch.device) -> int:
        self.calls.append("memory_allocated")
        return self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.allocated

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.reserved = self.allocated

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 3 * 2**30, 4 * 2**30

    def get_device_name(self, device: torch.device) -> str:
        return "Imaginary GPU"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(memory.torch, "cuda", fake)
    return fake


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def collector_off() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def measured_in_a_process_of_its_own(before: str, block: str) -> dict[str, int]:
    """Bytes that a `MemoryTracker` finds; a process as large as this one has more pages for the kernel to take."""
    script = (
        "import json, time, torch\nfrom models.memory import MemoryTracker\n"
        f"{before}\n"
        f"with MemoryTracker('cpu') as tracker:\n    {block}\n"
        "print(json.dumps({name: getattr(tracker, name) for name in ('start', 'end', 'used', 'peak')}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    figures: dict[str, int] = json.loads(done.stdout)
    return figures


def test_a_block_on_the_cpu_is_measured() -> None:
    # 200 MiB that stay, and 400 MiB that are gone at once; a crowded machine takes a few MiB of libraries meanwhile.
    found = measured_in_a_process_of_its_own("", "kept = torch.ones(50 * 2**20); torch.ones(100 * 2**20)")

    assert found["used"] == found["end"] - found["start"]
    assert 150 * MIB < found["used"] < 250 * MIB
    assert found["peak"] - found["start"] > 550 * MIB


def test_a_peak_below_an_earlier_one_is_sampled() -> None:
    # 800 MiB before, so the process has been larger than it will be in the block, which takes 400 MiB for a while.
    found = measured_in_a_process_of_its_own(
        "torch.ones(200 * 2**20)", "large = torch.ones(100 * 2**20); time.sleep(0.5); del large"
    )

    assert 350 * MIB < found["peak"] - found["start"] < 500 * MIB
    assert found["used"] < 50 * MIB


def test_a_block_that_fails_is_measured_and_its_error_gets_out(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = MemoryTracker("cpu", verbose=True)

    with pytest.raises(ZeroDivisionError), tracker:
        1 / 0  # noqa: B018

    assert tracker.end > 0
    assert tracker.peak >= tracker.end
    assert "memory on cpu: " in capsys.readouterr().out


def test_nothing_is_printed_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with MemoryTracker("cpu"):
        pass

    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("no_cuda")
def test_without_a_gpu_the_cpu_is_measured_and_a_gpu_is_refused() -> None:
    assert MemoryTracker().device == torch.device("cpu")
    assert monitor_memory().gpu is None
    clear_memory()
    for call in (MemoryTracker, monitor_memory, clear_memory):
        with pytest.raises(DeviceError, match="Memory of cuda is asked for, and torch finds no CUDA device here"):
            call("cuda")


def test_a_gpu_is_measured_with_its_queue_drained(cuda: FakeCuda) -> None:
    with MemoryTracker() as tracker:
        cuda.allocate(500)
        cuda.allocate(-450)
        cuda.calls.append("block")

    assert tracker.device == torch.device("cuda", 0)
    assert (tracker.start, tracker.end, tracker.peak, tracker.used) == (100, 150, 600, 50)
    assert cuda.calls == ["synchronize", "memory_allocated", "block", "synchronize", "memory_allocated"]


def test_an_inner_tracker_does_not_hide_the_peak_of_the_outer_one(cuda: FakeCuda) -> None:
    with MemoryTracker() as outer:
        cuda.allocate(500)
        cuda.allocate(-500)
        with MemoryTracker() as inner:
            cuda.allocate(10)

    assert inner.peak == 110
    assert outer.peak == 600


def test_a_tracker_whose_block_failed_is_forgotten(cuda: FakeCuda) -> None:
    with suppress(KeyError), MemoryTracker() as failed:
        raise KeyError
    cuda.allocate(1000)

    with MemoryTracker() as later:
        pass

    assert failed.peak == 100
    assert later.peak == 1100


@pytest.mark.usefixtures("collector_off")
def test_tensors_are_collected_before_their_memory_is_handed_back(cuda: FakeCuda) -> None:
    class Cycle:
        pass

    cycle = Cycle()
    cycle.itself = cycle  # type: ignore[attr-defined]
    weakref.finalize(cycle, lambda: cuda.allocate(-80))  # a tensor in a cycle: only the collector frees it
    del cycle

    assert clear_memory() == 1000 - 20
    assert cuda.reserved == 20


@pytest.mark.usefixtures("no_cuda")
def test_the_heap_goes_back_to_the_operating_system() -> None:
    tensors = [torch.ones(1000) for _ in range(50_000)]  # 4 KB each: from the heap, not mapped one by one
    before = psutil.Process().memory_info().rss
    last = tensors[-1]
    del tensors

    given_back = clear_memory()

    assert last.sum() == 1000
    assert given_back > 100 * MIB
    assert before - psutil.Process().memory_info().rss > 100 * MIB


def test_usage_reads_as_a_sentence(cuda: FakeCuda) -> None:
    usage = monitor_memory()

    assert usage.rss > 10 * MIB
    assert 0 < usage.available < usage.total
    assert usage.gpu == memory.GpuMemory(
        name="Imaginary GPU", allocated=100, reserved=1000, free=3 * 2**30, total=4 * 2**30
    )
    assert str(usage).endswith("Imaginary GPU: 100 B allocated, 1000 B reserved, 3.00 GiB of 4.00 GiB free")
    assert str(monitor_memory("cpu")).startswith("process ")
    assert "GPU" not in str(monitor_memory("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu() -> None:
    with MemoryTracker() as tracker:
        kept = torch.ones(MIB, device="cuda")
        torch.ones(4 * MIB, device="cuda")
    assert tracker.used == 4 * MIB
    assert tracker.peak - tracker.start == 20 * MIB

    del kept
    assert clear_memory() > 0
    assert monitor_memory().gpu is not None
