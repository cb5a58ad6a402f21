"""What TensorBoard and Weights & Biases get to see."""

import os
import socket
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from models import tracking
from models.errors import TrackingError
from models.tracking import TensorBoardWriter, Tracker, WandbWriter, build_tracker, scalars

SETTINGS = {"name": "digits", "optimizer": {"learning_rate": 0.003}}


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(epoch, value) as TensorBoard shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_curves_and_the_recipe(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path / "tensorboard", settings=SETTINGS)
    writer.write({"train/loss": 0.5, "validation/accuracy": 0.75}, 1)
    writer.write({"train/loss": 0.25, "validation/accuracy": 0.875}, 2)
    writer.close(failed=False)

    assert curve(tmp_path / "tensorboard", "train/loss") == [(1, 0.5), (2, 0.25)]
    assert curve(tmp_path / "tensorboard", "validation/accuracy") == [(1, 0.75), (2, 0.875)]
    text = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("recipe/text_summary")
    assert [event.step for event in text] == [0]
    assert b"learning_rate: 0.003" in text[0].tensor_proto.string_val[0]


def test_an_epoch_is_on_disk_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TensorBoardWriter(tmp_path, settings=SETTINGS)
    flushed = []
    flush = SummaryWriter.flush
    monkeypatch.setattr(SummaryWriter, "flush", lambda self: (flushed.append(self), flush(self)))

    writer.write({"train/loss": 0.5}, 1)

    assert len(flushed) == 1
    assert curve(tmp_path, "train/loss") == [(1, 0.5)]
    writer.close(failed=False)


def test_a_resumed_curve_has_each_epoch_once(tmp_path: Path) -> None:
    killed = TensorBoardWriter(tmp_path, settings=SETTINGS)
    for epoch in (1, 2, 3):
        killed.write({"train/loss": float(epoch)}, epoch)
    killed.close(failed=True)
    (events,) = tmp_path.glob("events.out.tfevents.*")
    with events.open("ab") as file:
        file.write(b"\x20\0\0\0\0\0")  # the beginning of a record

    resumed = TensorBoardWriter(tmp_path, settings=SETTINGS, after_epoch=2)
    for epoch in (3, 4):
        resumed.write({"train/loss": epoch * 10.0}, epoch)
    resumed.close(failed=False)

    assert curve(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert len(EventAccumulator(str(tmp_path)).Reload().Tensors("recipe/text_summary")) == 1


def test_a_new_training_removes_the_curves_of_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    old = TensorBoardWriter(tmp_path, settings=SETTINGS)
    old.write({"train/loss": 9.0, "gone": 1.0}, 7)
    old.close(failed=False)
    (tmp_path / "notes.txt").write_text("mine")

    new = TensorBoardWriter(tmp_path, settings=SETTINGS)
    new.write({"train/loss": 1.0}, 1)
    new.close(failed=False)

    assert curve(tmp_path, "train/loss") == [(1, 1.0)]
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == ["train/loss"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")

    with pytest.raises(TrackingError, match=r"tensorboard cannot be written \(.*\); free space or choose another"):
        TensorBoardWriter(tmp_path / "tensorboard", settings=SETTINGS)


class RecordingWriter:
    """Remembers what it was told, and may fail to close."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[tuple[dict[str, float], int]] = []
        self.closed: list[bool] = []
        self._error = error

    def write(self, scalars: Mapping[str, float], epoch: int) -> None:
        self.told.append((dict(scalars), epoch))

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)
        if self._error is not None:
            raise self._error


def test_every_writer_is_told_and_closed() -> None:
    writers = [RecordingWriter(), RecordingWriter()]

    with Tracker(writers) as tracker:
        tracker.write({"train/loss": 1.0}, 1)

    assert [writer.told for writer in writers] == [[({"train/loss": 1.0}, 1)]] * 2
    assert [writer.closed for writer in writers] == [[False]] * 2


def test_writers_are_closed_after_an_error_and_told_of_it() -> None:
    writers = [RecordingWriter(), RecordingWriter(TrackingError("The disk is full.")), RecordingWriter()]

    with pytest.raises(KeyError), Tracker(writers):
        raise KeyError

    assert [writer.closed for writer in writers] == [[True]] * 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_writer_that_cannot_be_closed_does_not_keep_the_others_open(failing: int) -> None:
    writers = [RecordingWriter(TrackingError("The disk is full.") if i == failing else None) for i in range(3)]

    with pytest.raises(TrackingError, match="The disk is full"), Tracker(writers):
        pass

    assert [writer.closed for writer in writers] == [[False]] * 3


def test_without_a_project_there_is_tensorboard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)

    with build_tracker(tmp_path, name="digits", settings=SETTINGS) as tracker:
        tracker.write({"train/loss": 0.5}, 1)

    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    assert curve(tmp_path / "tensorboard", "train/loss") == [(1, 0.5)]


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])
def test_wandb_that_is_not_installed_is_an_error_that_leaves_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None
) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text("earlier")
    monkeypatch.setitem(sys.modules, "wandb", module)

    with pytest.raises(TrackingError, match=r"not installed; install it with pip install 'torchport\[wandb\]'"):
        build_tracker(tmp_path, name="digits", settings=SETTINGS, wandb_project="p")

    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["events.out.tfevents.1"]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The package, on a machine where nobody has configured anything."""
    wandb = pytest.importorskip("wandb")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # settings are also looked for in ./wandb
    wandb.teardown()
    yield wandb
    wandb.teardown()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Stands in for the server of Weights & Biases, and holds who called it."""
    server = socket.create_server(("127.0.0.1", 0))
    callers: list[Any] = []

    def listen() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            callers.append(address)
            connection.close()

    thread = threading.Thread(target=listen)
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    yield callers
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


def test_wandb_records_offline_into_the_run_folder(
    tmp_path: Path, wandb: types.ModuleType, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"

    with build_tracker(run_dir, name="digits", settings=SETTINGS, wandb_project="p") as tracker:
        tracker.write({"train/loss": 0.123456789}, 1)
    with build_tracker(run_dir, name="digits", settings=SETTINGS, wandb_project="p", after_epoch=1) as tracker:
        tracker.write({"train/loss": 0.987654321}, 2)

    wandb.teardown()  # it writes a moment after a run was closed, or when the process ends
    first, second = [path.read_bytes() for path in offline_runs(run_dir)]
    assert b"train/loss" in first
    assert b"0.123456789" in first
    assert b"learning_rate" in first
    assert b"0.987654321" in second
    run_id = (run_dir / "wandb" / "run_id").read_text().strip()
    assert {path.name for path in offline_runs(run_dir)} == {f"run-{run_id}.wandb"}
    assert curve(run_dir / "tensorboard", "train/loss") == [
        (1, pytest.approx(0.123456789)),
        (2, pytest.approx(0.987654321)),
    ]
    assert calls == []
    assert list((tmp_path / "here").iterdir()) == []

    WandbWriter(run_dir, project="p", name="digits", settings=SETTINGS).close(failed=False)
    assert (run_dir / "wandb" / "run_id").read_text().strip() != run_id, "a new training is another run"


def test_wandb_without_a_key_is_an_error_and_asks_for_nothing(
    tmp_path: Path, wandb: types.ModuleType, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked for something"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    with pytest.raises(TrackingError, match=r"no API key .* run wandb login, set WANDB_API_KEY, or record offline"):
        build_tracker(tmp_path / "run", name="digits", settings=SETTINGS, wandb_project="p")

    assert calls == []
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_server_that_does_not_answer_is_given_up(
    tmp_path: Path, wandb: types.ModuleType, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(tracking, "_INIT_TIMEOUT_S", 2)

    with pytest.raises(TrackingError, match=r"^Weights & Biases cannot be used \(.*\); mend that, or record offline"):
        WandbWriter(tmp_path / "run", project="p", name="digits", settings=SETTINGS)

    assert calls


def test_wandb_that_is_switched_off_records_nothing(
    tmp_path: Path, wandb: types.ModuleType, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")

    with build_tracker(tmp_path / "run", name="digits", settings=SETTINGS, wandb_project="p") as tracker:
        tracker.write({"train/loss": 0.5}, 1)

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tensorboard"]
    assert calls == []


def test_scalars_are_the_numbers_of_a_report() -> None:
    report = {
        "epoch": 3,
        "seconds": 1.5,
        "train": {"loss": 0.5, "learning_rate": 0.001},
        "validation": {"accuracy": 1, "classes": [{"f1": 1.0}], "confusion": [[1]], "split": "validation", "ok": True},
    }

    assert scalars(report) == {
        "seconds": 1.5,
        "train/loss": 0.5,
        "train/learning_rate": 0.001,
        "validation/accuracy": 1.0,
    }
