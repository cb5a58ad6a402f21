"""How many GPUs TorchServe has to give, which of them a model's workers get, and where they say they are."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from deploy import placement
from deploy.configuration import count_gpus, find_properties, read_properties, server_properties
from deploy.errors import StartError
from deploy.gpu import Gpu, collector_command
from deploy.placement import Placement, gpu_of, in_words, runs_on_gpu, usable_gpus
from deploy.ports import Ports

TWO = [
    Gpu(index=i, name="NVIDIA H200", utilisation_percent=0.0, memory_used_mib=0.0, memory_total_mib=143771.0)
    for i in range(2)
]
PORTS = Ports(inference=18000, management=18001, metrics=18002, grpc_inference=18003, grpc_management=18004)


def archive(path: Path, device: str | None) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("signature.json", json.dumps({"artifact": {"device": device}} if device else {}))
    return path


def gpu_settings(folder: Path, gpus: int | None) -> dict[str, str]:
    """What a server's properties say of GPUs and their metrics, unlike the project's own file."""
    text = server_properties(PORTS, host="127.0.0.1", model_store=folder, models={}, scalable=True, gpus=gpus)
    (folder / "config.properties").write_text(text, encoding="ascii")
    before = read_properties(find_properties())
    keys = ("number_of_gpu", "disable_system_metrics", "system_metrics_cmd", "metric_time_interval")
    return {
        key: value
        for key, value in read_properties(folder / "config.properties").items()
        if key in keys and before.get(key) != value
    }


@pytest.mark.parametrize(
    ("visible", "usable"), [(None, 2), ("0,1", 2), (" 1 ", 1), ("", 0), ("-1", 0), ("0,7,1", 1), ("5", 0)]
)
def test_as_many_gpus_are_used_as_cuda_shows(monkeypatch: pytest.MonkeyPatch, visible: str | None, usable: int) -> None:
    monkeypatch.setattr(placement, "read_gpus_in_time", lambda: TWO)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert usable_gpus(environment) == usable


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False), (None, False)])
def test_an_archive_says_where_it_runs(tmp_path: Path, device: str | None, expected: bool) -> None:
    assert runs_on_gpu(archive(tmp_path / "a.mar", device)) is expected


def test_what_is_no_archive_runs_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.mar").write_bytes(b"an archive")
    assert not runs_on_gpu(tmp_path / "a.mar")
    assert not runs_on_gpu(tmp_path / "missing.mar")


def test_a_model_for_gpus_gets_all_of_them_and_their_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "read_gpus_in_time", lambda: TWO)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    models = {"text": archive(tmp_path / "text.mar", "cpu"), "images": archive(tmp_path / "images.mar", "cuda")}
    assert count_gpus(models) == 2
    assert gpu_settings(tmp_path, 2) == {
        "number_of_gpu": "2",
        "disable_system_metrics": "false",
        "system_metrics_cmd": collector_command(),
        "metric_time_interval": "15",
    }
    assert count_gpus({"text": models["text"]}) is None
    assert gpu_settings(tmp_path, None) == {"number_of_gpu": "0"}


def test_without_a_gpu_the_worker_is_left_to_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "read_gpus_in_time", list)
    assert count_gpus({"images": archive(tmp_path / "images.mar", "cuda")}) == 0
    assert gpu_settings(tmp_path, 0) == {}


def test_gpus_that_are_not_named_by_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2b,GPU-11")
    with pytest.raises(StartError, match=r"CUDA_VISIBLE_DEVICES is 'GPU-8f2b,GPU-11', .* such as CUDA_VISIBLE_DEV"):
        count_gpus({"images": archive(tmp_path / "images.mar", "cuda")})


def test_a_driver_that_does_not_answer_is_told_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> list[Gpu]:
        raise TimeoutError("NVIDIA's driver has not answered within 30 s")

    monkeypatch.setattr(placement, "read_gpus_in_time", wait)
    for set_visible in (
        lambda: monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False),
        lambda: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0"),
    ):
        set_visible()
        with pytest.raises(
            StartError, match=r"within 30 s, and a model needs a GPU; try nvidia-smi, .* restart the mac"
        ):
            count_gpus({"images": archive(tmp_path / "images.mar", "cuda")})
    assert count_gpus({"text": archive(tmp_path / "text.mar", "cpu")}) is None


def worker(usage: str | None, *, on_gpu: bool = True) -> dict[str, object]:
    return {"id": "9000", "status": "READY", "gpu": on_gpu, **({} if usage is None else {"gpuUsage": usage})}


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (worker("gpuId::1 utilization.gpu [%]::3 % memory.used [MiB]::1024 MiB"), 1),
        (worker("gpuId::12"), 12),
        (worker("N/A", on_gpu=False), None),
        (worker("failed to obtained gpu usage"), None),
        (worker(None), None),
    ],
)
def test_torchserve_says_where_a_worker_runs(described: dict[str, object], expected: int | None) -> None:
    assert gpu_of(described) == expected


def test_placement_in_words() -> None:
    places = [worker(f"gpuId::{index} x") for index in (1, 0, 1)]
    assert in_words(places) == "1 worker on GPU 0, 2 workers on GPU 1"
    assert in_words([worker("N/A", on_gpu=False)]) == ""


class TestPlacement:
    def given(self, found: Placement, workers: int | None, minimums: list[int]) -> list[list[int]]:
        """The GPU of every worker, by model, as TorchServe hands out what a model's settings name."""
        rows = []
        for minimum in minimums:
            config = found.place_next({"minWorkers": minimum, "deviceType": "gpu"})
            ids = config["deviceIds"]
            rows.append([ids[i % len(ids)] for i in range(workers or minimum)])
        return rows

    @pytest.mark.parametrize("gpus", [1, 2, 3, 8])
    @pytest.mark.parametrize("workers", [None, 1, 2, 3, 5])
    @pytest.mark.parametrize("minimums", [[1], [1, 1], [2, 1, 1], [4, 3], [1, 1, 1, 1, 1]])
    def test_every_models_workers_and_all_together_are_spread(
        self, gpus: int, workers: int | None, minimums: list[int]
    ) -> None:
        rows = self.given(Placement(gpus, workers), workers, minimums)
        for row in [*rows, list(itertools.chain(*rows))]:
            counts = [Counter(row)[gpu] for gpu in range(gpus)]
            assert max(counts) - min(counts) <= 1

    @pytest.mark.parametrize(("workers", "minimum"), [(None, 2), (2, 1)])
    def test_workers_that_an_archive_places_itself_are_made_up_for(self, workers: int | None, minimum: int) -> None:
        found = Placement(4, workers)
        assert found.place_next({"minWorkers": minimum, "deviceIds": [2, 0]})["deviceIds"] == [2, 0]
        assert self.given(found, workers, [minimum, minimum]) == [[1, 3], [0, 1]]
        assert self.given(found, workers, [minimum]) == [[2, 3]]

    @pytest.mark.parametrize("ids", [[0, 3], [-1], ["0"], "0", 0, []])
    def test_gpus_that_are_not_there_count_nothing(self, ids: object) -> None:
        found = Placement(3, None)
        found.place_next({"deviceIds": ids, "parallelType": "tp"})
        assert found.place_next({})["deviceIds"] == [0, 1, 2]

    @pytest.mark.parametrize("own", [{"deviceIds": [1]}, {"parallelType": "tp"}, {"parallelLevel": 2}])
    def test_an_archive_that_says_itself_is_left_alone(self, own: dict[str, object]) -> None:
        found = Placement(2, None)
        config = {"minWorkers": 1, **own}
        assert found.place_next(config) == config
        assert found.place_next({})["deviceIds"] == [0, 1]
