"""The files of `--profile`."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from models import profiling
from models.errors import RunFolderError
from models.profiling import NoProfiler, Profiler, StepProfiler, build_profiler

CPU = torch.device("cpu")


def train(profiler: Profiler, *, steps: int) -> None:
    model = nn.Linear(8, 8)
    for _ in range(steps):
        model(torch.ones(4, 8)).sum().backward()
        profiler.step()


def recorded_steps(folder: Path) -> list[str]:
    trace = json.loads((folder / "profile" / "trace.json").read_text())
    return sorted({event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")})


def test_the_active_steps_are_recorded_and_only_those(tmp_path: Path) -> None:
    with StepProfiler(tmp_path, device=CPU, wait=1, warmup=1, active=2) as profiler:
        train(profiler, steps=3)
        assert not profiler.written
        train(profiler, steps=1)
        assert profiler.written  # a training that is killed later has them
        train(profiler, steps=10)

    assert recorded_steps(tmp_path) == ["ProfilerStep#2", "ProfilerStep#3"]
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert "aten::addmm" in table
    assert "Self CPU" in table
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["table.txt", "trace.json"]


def test_after_the_last_step_nothing_is_profiled(tmp_path: Path) -> None:
    with StepProfiler(tmp_path, device=CPU, wait=0, warmup=1, active=1) as profiler:
        train(profiler, steps=1)
        assert torch.autograd._profiler_enabled()
        train(profiler, steps=1)
        assert not torch.autograd._profiler_enabled()
        train(profiler, steps=1)


def test_a_short_training_gets_what_was_recorded(tmp_path: Path) -> None:
    with StepProfiler(tmp_path, device=CPU, wait=1, warmup=1, active=5) as profiler:
        train(profiler, steps=3)

    assert profiler.written
    assert "ProfilerStep#2" in recorded_steps(tmp_path)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_training_shorter_than_the_warm_up_gets_nothing(tmp_path: Path, steps: int) -> None:
    with StepProfiler(tmp_path, device=CPU, wait=1, warmup=1, active=5) as profiler:
        train(profiler, steps=steps)

    assert not profiler.written
    assert list((tmp_path / "profile").iterdir()) == []


def test_a_training_that_fails_keeps_the_earlier_profile_and_stops_profiling(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "trace.json").write_text("earlier")
    (tmp_path / "profile" / ".trace.json.1.part").write_text("of a killed training")

    def fail() -> None:
        with StepProfiler(tmp_path, device=CPU, wait=0, warmup=1, active=5) as profiler:
            train(profiler, steps=3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert not torch.autograd._profiler_enabled()
    assert (tmp_path / "profile" / "trace.json").read_text() == "earlier"
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["trace.json"]


def test_a_folder_that_cannot_be_written_is_an_error_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")

    with pytest.raises(RunFolderError, match=r"profile cannot be written \(File exists\); .* leave out --profile"):
        StepProfiler(tmp_path, device=CPU).__enter__()


def test_a_folder_that_vanishes_is_an_error(tmp_path: Path) -> None:
    with StepProfiler(tmp_path, device=CPU, wait=0, warmup=1, active=1) as profiler:
        (tmp_path / "profile").rmdir()
        (tmp_path / "profile").write_text("in the way")
        with pytest.raises(RunFolderError, match="profile cannot be written"):
            train(profiler, steps=2)
    assert not profiler.written


def test_off_means_off(tmp_path: Path) -> None:
    profiler = build_profiler(tmp_path, device=CPU, enabled=False)

    with profiler as entered:
        train(entered, steps=20)
        assert not torch.autograd._profiler_enabled()

    assert isinstance(profiler, NoProfiler)
    assert list(tmp_path.iterdir()) == []


def test_on_profiles_the_first_epoch(tmp_path: Path) -> None:
    with build_profiler(tmp_path, device=CPU, enabled=True) as profiler:
        train(profiler, steps=12)

    assert recorded_steps(tmp_path) == [f"ProfilerStep#{number}" for number in range(4, 10)]


def test_a_gpu_is_recorded_and_decides_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = torch.profiler.profile

    def without_gpu(*, activities: list[torch.profiler.ProfilerActivity], **options: object) -> torch.profiler.profile:
        seen.append([activity.name for activity in activities])
        return original(activities=activities[:1], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(profiling, "profile", without_gpu)
    with StepProfiler(tmp_path, device=torch.device("cuda"), wait=0, warmup=1, active=1) as profiler:
        train(profiler, steps=2)

    assert seen == [["CPU", "CUDA"]]
    assert profiler.written


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu(tmp_path: Path) -> None:
    model = nn.Linear(64, 64).cuda()
    with StepProfiler(tmp_path, device=torch.device("cuda")) as profiler:
        for _ in range(12):
            model(torch.ones(8, 64, device="cuda")).sum().backward()
            profiler.step()

    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    assert "Self CUDA" in (tmp_path / "profile" / "table.txt").read_text()
