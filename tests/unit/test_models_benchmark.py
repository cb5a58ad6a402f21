"""Latencies: what is timed, how often, and that the model is left as it was."""

import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import benchmark
from models.benchmark import benchmark_model
from models.errors import BenchmarkError, DeviceError


class Probe(nn.Module):
    """Takes a given time, and notes how it was called."""

    def __init__(self, *sleeps_s: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout()
        self.calls: list[tuple[bool, bool, bool]] = []
        self._sleeps_s = sleeps_s

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append((self.training, torch.is_inference_mode_enabled(), mask is not None))
        if self._sleeps_s:
            time.sleep(self._sleeps_s[(len(self.calls) - 1) % len(self._sleeps_s)])
        return x * self.scale


def test_the_warm_up_is_not_timed_and_percentiles_are_those_of_the_runs() -> None:
    model = Probe(0.2, *[0.002] * 9, 0.02)  # the warm-up, nine quick runs, a slow one

    result = benchmark_model(model, torch.ones(4, 2), num_runs=10, warmup=1)

    assert len(model.calls) == 11
    assert 2 <= result.p50_ms < 10
    assert result.p50_ms <= result.p90_ms <= result.p99_ms
    assert 15 < result.p99_ms < 100
    assert 3.8 <= result.mean_ms < 30
    assert result.std_ms > 2
    assert result.samples_per_s == pytest.approx(4 * 1000 / result.mean_ms)
    assert (result.batch_size, result.num_runs, result.device) == (4, 10, "cpu")
    assert result.threads == torch.get_num_threads()


def test_the_statistics_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    latencies = iter(range(1, 101))
    monkeypatch.setattr(benchmark, "_run_ms", lambda *_: float(next(latencies)))

    result = benchmark_model(Probe(), torch.ones(2, 2))

    values = np.arange(1.0, 101.0)
    assert [result.p50_ms, result.p90_ms, result.p99_ms] == np.percentile(values, [50, 90, 99]).tolist()
    assert (result.mean_ms, result.std_ms) == (50.5, pytest.approx(values.std()))
    assert result.samples_per_s == pytest.approx(2 / 0.0505)
    assert "50.500 ms ± 28.866 (p50 50.500, p90 90.100, p99 99.010), 40 samples/s in batches of 2" in str(result)
    assert result.as_dict()["p99_ms"] == result.p99_ms


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_eval_mode_and_gets_its_own_back(training: bool) -> None:
    model = Probe().train(training)
    model.dropout.eval()  # frozen, whatever the rest does

    benchmark_model(model, torch.ones(1, 2), num_runs=2, warmup=1)

    assert model.calls == [(False, True, False)] * 3
    assert model.training is training
    assert not model.dropout.training
    assert torch.is_grad_enabled()


def test_the_mode_comes_back_after_an_error() -> None:
    model = nn.Linear(3, 2)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        benchmark_model(model, torch.ones(1, 4))

    assert model.training


def test_inputs_by_position_and_by_name() -> None:
    x, mask = torch.ones(3, 2), torch.ones(3, 2)
    for inputs in ((x, mask), {"mask": mask, "x": x}):
        model = Probe()
        assert benchmark_model(model, inputs, num_runs=1, warmup=0).batch_size == 3
        assert model.calls == [(False, True, True)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_model_is_measured() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))

    assert benchmark_model(model, torch.ones(5, 2), num_runs=2, warmup=1).batch_size == 5
    assert model.training


@pytest.mark.parametrize("arguments", [{"num_runs": 0}, {"num_runs": -1}, {"warmup": -1}])
def test_no_run_is_no_measurement(arguments: dict[str, int]) -> None:
    with pytest.raises(BenchmarkError, match=r"num_runs is -?\d+ and warmup -?\d+; time at least one run"):
        benchmark_model(Probe(), torch.ones(1), **arguments)


@pytest.mark.parametrize("inputs", [(), {}, [torch.ones(1)], (1, 2), {"x": "y"}])
def test_other_inputs_are_refused(inputs: object) -> None:
    with pytest.raises(BenchmarkError, match="does not hold tensors; give a tensor, a tuple of tensors or a dict"):
        benchmark_model(Probe(), inputs)  # type: ignore[arg-type]


def test_a_device_that_is_absent_or_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="The benchmark is to run on cuda, and torch finds no CUDA device here"):
        benchmark_model(Probe(), torch.ones(1), device="cuda")

    with pytest.raises(BenchmarkError, match=r'The model is on meta and the benchmark on cpu; .* model\.to\("cpu"\)'):
        benchmark_model(nn.Linear(2, 2, device="meta"), torch.ones(1, 2), device="cpu")


def test_a_gpu_is_waited_for_before_and_after_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    clock = iter(range(0, 10**9, 10**6))

    def now() -> int:
        events.append("clock")
        return next(clock)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(time, "perf_counter_ns", now)

    took = benchmark._run_ms(lambda: events.append("run"), (), {}, torch.device("cuda", 0))  # type: ignore[arg-type]

    assert events == ["wait", "clock", "run", "wait", "clock"]
    assert took == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu() -> None:
    result = benchmark_model(nn.Linear(512, 512).cuda(), torch.ones(64, 512), device="cuda")

    assert result.device == "cuda:0"
    assert 0 < result.p50_ms < 1000
