"""Starting and stopping TorchServe: its own launcher, with a frontend that fails in every way."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deploy.errors import DeployError, PortError, StartError, StateError
from deploy.frontend_classes import CLASSES
from deploy.gpu import Gpu
from deploy.ports import Ports
from deploy.server import TorchServe
from deploy.state import KEY_FILE, SERVER_FILE, STATE_VARIABLE, find_server, state_folder
from export.archive import CONFIG_FILE, Archive, ArchiveFiles, open_archive, write_archive
from export.errors import ArchiveError
from handlers.digests import sha256

from .fake_java import make_java

READY_TIMEOUT_S = 20

Behave = Callable[[str], None]


class Scene:
    """Where a test's server keeps everything."""

    def __init__(self, folder: Path) -> None:
        self.state, self.temporary = folder / "state", folder / "temporary"
        self.seen_file, self.pid_file = folder / "seen.json", folder / "pids"
        content = b"an archive"
        self.archive = Archive(
            path=folder / "digits.mar", name="digits", version="1.0", sha256=sha256([content]), digests={}
        )
        self.archive.path.write_bytes(content)
        self.ports = Ports.free()

    def server(self, **options: Any) -> TorchServe:
        return TorchServe([self.archive], self.ports, **options)

    def seen(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.seen_file.read_text(encoding="utf-8"))
        return document

    def pids(self, number: int) -> list[int]:
        """The process ids of the frontend and its workers, when they are as many as they should be."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.pid_file.exists() and len(pids := self.pid_file.read_text(encoding="utf-8").split()) == number:
                return [int(pid) for pid in pids]
            time.sleep(0.02)
        raise AssertionError(f"there were never {number} processes")

    def assert_nothing_is_left(self) -> None:
        assert list(self.temporary.iterdir()) == []
        folder = state_folder(self.ports.inference)
        assert not (folder / KEY_FILE).exists()
        assert not (folder / SERVER_FILE).exists()
        if self.pid_file.exists():
            assert not [pid for pid in self.pid_file.read_text(encoding="utf-8").split() if is_alive(int(pid))]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    scene.temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scene.temporary))
    monkeypatch.setenv(STATE_VARIABLE, str(scene.state))
    monkeypatch.setenv("JAVA_HOME", str(make_java(tmp_path / "java")))
    monkeypatch.setenv("FAKE_JAVA_PIDS", str(scene.pid_file))
    monkeypatch.setenv("FAKE_JAVA_SEEN", str(scene.seen_file))
    monkeypatch.setattr("deploy.server._POLL_S", 0.05)
    yield scene
    for pid in scene.pid_file.read_text(encoding="utf-8").split() if scene.pid_file.exists() else []:
        if is_alive(int(pid)):  # only after a failed test
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Behave:
    return lambda mode: monkeypatch.setenv("FAKE_JAVA", mode)


def test_a_server_is_found_while_it_runs_and_leaves_nothing(scene: Scene) -> None:
    port = scene.ports.inference
    with scene.server() as server:
        with pytest.raises(StateError, match="serves nothing"):
            find_server(port)
        server.wait_until_ready(READY_TIMEOUT_S)
        state = find_server(port)
        assert state == server.state
        assert state.inference_token() == "inference-token"
        assert state.models == {"digits": "1.0"}
        assert state.folder.stat().st_mode & 0o777 == 0o700
        assert server.temporary_folder.stat().st_mode & 0o777 == 0o700
    scene.assert_nothing_is_left()
    with pytest.raises(StateError, match="serves nothing"):
        find_server(port)


@pytest.mark.parametrize(
    ("gpus", "scheduling", "changes"),
    [
        (None, "continuous", ["settings"]),
        (1, "continuous", ["settings"]),
        (2, "continuous", ["settings", "Placement.place_next"]),
        (2, "batches", ["Placement.place_next"]),
        (1, "batches", []),
    ],
)
def test_a_model_for_gpus_is_told_which_where_there_are_several(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, gpus: int | None, scheduling: str, changes: list[str]
) -> None:
    given: list[str] = []

    def change(path: Path, changes: list[Any]) -> None:
        given.extend(getattr(change, "func", change).__qualname__ for change in changes)

    monkeypatch.setattr("deploy.continuous.obstacle", lambda archive: None)
    monkeypatch.setattr("deploy.server.count_gpus", lambda models: gpus)
    monkeypatch.setattr("deploy.archive_copy.runs_on_gpu", lambda path: gpus is not None)
    monkeypatch.setattr("deploy.archive_copy.change_settings", change)
    with scene.server(scheduling=scheduling) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        assert scene.seen()["config"].get("number_of_gpu") == str(gpus or 0)
    assert given == changes


def test_the_copies_say_on_which_gpus_their_workers_run(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(index=0, name="", utilisation_percent=None, memory_used_mib=None, memory_total_mib=None)
    monkeypatch.setattr("deploy.placement.read_gpus_in_time", lambda: [gpu, gpu])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    artifact = tmp_path / "model.pt"
    artifact.write_bytes(b"weights")
    archives = []
    for name, device in (("first", "cuda"), ("on-cpu", "cpu"), ("second", "cuda")):
        signature = json.dumps({"artifact": {"device": device}}).encode()
        files = ArchiveFiles(artifact=artifact, documents={"signature.json": signature}, config=b"minWorkers: 1\n")
        archives.append(open_archive(write_archive(files, name=name, version="1.0", out=tmp_path)))
    with TorchServe(archives, scene.ports, workers=2, scheduling="batches") as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        store = Path(scene.seen()["config"]["model_store"])
        written = {
            archive.name: yaml.safe_load(open_archive(store / f"{archive.name}.mar").read(CONFIG_FILE))
            for archive in archives
        }
    assert written == {
        # One worker on each, so the second model begins with GPU 0 as well.
        "first": {"minWorkers": 1, "deviceIds": [0, 1]},
        "on-cpu": {"minWorkers": 1},
        "second": {"minWorkers": 1, "deviceIds": [0, 1]},
    }


def test_a_full_disk_is_named(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(
        StateError, match=r"config\.properties cannot be written \(No space .*; name another folder with"
    ):
        scene.server().__enter__()
    scene.assert_nothing_is_left()


def test_the_frontend_gets_the_production_configuration(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_CONFIG_FILE", "/somebody/elses.properties")
    monkeypatch.setenv("TS_DISABLE_TOKEN_AUTHORIZATION", "true")
    with scene.server(host="0.0.0.0") as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        loaded = Path(scene.seen()["config"]["model_store"]) / "digits.mar"
        assert loaded.read_bytes() == b"an archive"
        assert not loaded.is_symlink()
        assert server.state.inference_url == f"http://127.0.0.1:{scene.ports.inference}"
    seen = scene.seen()
    assert seen["config"]["inference_address"] == f"http://0.0.0.0:{scene.ports.inference}"
    assert seen["config"]["load_models"] == "digits=digits.mar"
    assert seen["config"]["disable_token_authorization"] == "false"
    assert seen["config"]["enable_model_api"] == "false"
    assert "-ncs" in seen["arguments"]
    assert any(argument.endswith("/deploy/log4j2.xml") for argument in seen["arguments"])
    assert not [name for name in seen["environment"] if name.startswith("TS_")]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("dies", "ended before it was ready: .*Could not reserve enough space"),
        ("refuses", r"cannot serve: golden sample 2 differs \(log: .*torchserve.log\)"),
        ("cannot bind", "cannot serve: Address already in use"),
    ],
)
def test_a_failed_start_says_why_and_leaves_nothing(scene: Scene, behave: Behave, mode: str, message: str) -> None:
    behave(mode)
    with pytest.raises(StartError, match=message), scene.server() as server:
        server.wait_until_ready(READY_TIMEOUT_S)
    scene.assert_nothing_is_left()


@pytest.mark.parametrize("mode", ["silent", "never ready"])
def test_a_start_that_takes_too_long_is_given_up(scene: Scene, behave: Behave, mode: str) -> None:
    behave(mode)
    with scene.server() as server:
        scene.pids(1)
        with pytest.raises(StartError, match=r"not ready within 0\.3 s: (it printed nothing|serving)"):
            server.wait_until_ready(0.3)
    scene.assert_nothing_is_left()


def test_half_written_tokens_mean_not_yet(scene: Scene, behave: Behave) -> None:
    behave("writes slowly")
    with scene.server() as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        assert server.state.management_token() == "management-token"


def test_tokens_that_stay_half_written_are_told_at_the_deadline(scene: Scene, behave: Behave) -> None:
    behave("never writes on")
    with scene.server() as server:
        scene.pids(1)
        with pytest.raises(StartError, match=r"not ready within 1 s: the tokens in .*key_file.json cannot be read"):
            server.wait_until_ready(1)
    scene.assert_nothing_is_left()


def test_the_chosen_number_of_workers_is_waited_for(scene: Scene) -> None:
    with scene.server(workers=3) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        workers = server._workers_by_model()["digits"]
    assert [worker["status"] for worker in workers] == ["READY"] * 3
    assert scene.seen()["config"]["enable_model_api"] == "true"


def test_refused_workers_are_an_error(scene: Scene, behave: Behave) -> None:
    behave("refuses to scale")
    with scene.server(workers=3) as server, pytest.raises(StartError, match=r"refuses 3 workers .*: no memory"):
        server.wait_until_ready(READY_TIMEOUT_S)
    scene.assert_nothing_is_left()


def test_a_proxy_in_the_environment_is_not_asked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with scene.server() as server:
        server.wait_until_ready(READY_TIMEOUT_S)


def test_what_ignores_the_request_to_stop_is_killed_with_its_children(
    scene: Scene, behave: Behave, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.server._STOP_TIMEOUT_S", 0.3)
    behave("stubborn")
    with scene.server(drain_s=0) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        assert all(map(is_alive, scene.pids(2)))
    scene.assert_nothing_is_left()


def test_a_worker_that_outlives_the_frontend_is_ended(
    scene: Scene, behave: Behave, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.server._STOP_TIMEOUT_S", 0.3)
    behave("leaves a worker")
    with scene.server(drain_s=0) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        scene.pids(2)
    scene.assert_nothing_is_left()


def test_a_frontend_whose_launcher_was_killed_is_ended(scene: Scene) -> None:
    with scene.server() as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        (frontend,) = scene.pids(1)
        launcher = psutil.Process(frontend).parent()
        assert launcher is not None
        launcher.kill()
        assert server.wait() == -signal.SIGKILL
        assert is_alive(frontend)
    scene.assert_nothing_is_left()


def test_only_its_own_processes_are_ended(scene: Scene) -> None:
    # A child of this process as a server is, in a session and with a temporary folder of its own.
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(scene.temporary)},
    ) as bystander:
        try:
            with scene.server() as server:
                server.wait_until_ready(READY_TIMEOUT_S)
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_ctrl_c_while_stopping_ends_it_at_once(scene: Scene, behave: Behave, monkeypatch: pytest.MonkeyPatch) -> None:
    behave("stubborn")
    started = time.monotonic()
    with scene.server() as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
    timer.join()
    assert time.monotonic() - started < 15  # it would wait for 30 s
    scene.assert_nothing_is_left()


def test_stopping_twice_is_harmless(scene: Scene) -> None:
    server = scene.server()
    server.stop()
    with server:
        server.wait_until_ready(READY_TIMEOUT_S)
    server.stop()
    scene.assert_nothing_is_left()


def test_the_log_is_kept_and_echoed(scene: Scene) -> None:
    echo = io.StringIO()
    with scene.server(echo=echo) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
    assert echo.getvalue() == server.log_file.read_text(encoding="utf-8")
    why, said = echo.getvalue().splitlines()
    assert why == "digits is served in batches: the archive has no continuous worker; export it again"
    assert said == "serving"


def test_a_closed_terminal_does_not_stop_the_log(scene: Scene, behave: Behave, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.server._STOP_TIMEOUT_S", 0.3)
    behave("leaves a worker")  # which prints a second line
    echo = io.StringIO()
    echo.close()
    with scene.server(echo=echo, drain_s=0) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while len(server.log_file.read_text(encoding="utf-8").splitlines()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_second_server_on_the_port_does_not_touch_the_first(scene: Scene) -> None:
    # While the first is starting its ports are still free, so the ports alone do not tell.
    with scene.server() as first:
        first.wait_until_ready(READY_TIMEOUT_S)
        with pytest.raises(StateError, match=r"another `torchport serve` is using .*--port"), scene.server():
            pytest.fail("the second server was started")
        assert find_server(scene.ports.inference).inference_token() == "inference-token"
        assert len(scene.pids(1)) == 1
        assert len(list(scene.temporary.iterdir())) == 1
    scene.assert_nothing_is_left()


def test_a_server_that_was_killed_is_gone_whoever_has_its_process_id(scene: Scene) -> None:
    with scene.server() as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        folder = server.state.folder
        remains = {name: (folder / name).read_bytes() for name in (SERVER_FILE, KEY_FILE)}
    for name, content in remains.items():
        (folder / name).write_bytes(content)
    assert json.loads(remains[SERVER_FILE])["pid"] == os.getpid()  # a process that lives, but serves nothing
    with pytest.raises(StateError, match="is gone; start it again"):
        find_server(scene.ports.inference)
    with scene.server() as server:
        with pytest.raises(StateError):  # not the old one's coordinates
            find_server(scene.ports.inference)
        server.wait_until_ready(READY_TIMEOUT_S)
    scene.assert_nothing_is_left()


@pytest.mark.parametrize("host", ["::1", "192.0.2.1", "not a host", "", "a..b"])
def test_a_host_that_is_none_of_this_machine_is_refused(scene: Scene, host: str) -> None:
    with pytest.raises(PortError, match=r"cannot listen on .*0.0.0.0 for all"), scene.server(host=host):
        pytest.fail("the server was started")
    assert list(scene.temporary.iterdir()) == []
    assert not scene.state.exists()


def test_without_java_nothing_is_left(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.java._candidates", lambda: iter(()))
    with pytest.raises(DeployError, match="Java"), scene.server():
        pytest.fail("the server was started")
    assert list(scene.temporary.iterdir()) == []
    assert not scene.state.exists()


def test_an_archive_that_vanished_leaves_nothing(scene: Scene) -> None:
    scene.archive.path.unlink()
    with pytest.raises(FileNotFoundError), scene.server():
        pytest.fail("the server was started")
    scene.assert_nothing_is_left()


def test_an_archive_that_was_replaced_after_it_was_verified_is_not_served(scene: Scene) -> None:
    scene.archive.path.write_bytes(b"an orchive")
    with pytest.raises(ArchiveError, match=r"another archive took the place of .*digits\.mar"), scene.server():
        pytest.fail("the server was started")
    scene.assert_nothing_is_left()
    assert not scene.pid_file.exists()


def test_a_server_that_was_not_started_says_so(scene: Scene) -> None:
    server = scene.server()
    for call in (server.wait, lambda: server.temporary_folder, lambda: server.wait_until_ready(1)):
        with pytest.raises(StartError):
            call()
    assert not scene.state.exists()


BY_SCHEDULING = {f"org/pytorch/serve/wlm/{name}.class" for name in ("Arrivals", "AsyncBatchAggregator")}


@pytest.mark.parametrize(("scheduling", "possible"), [("continuous", True), ("continuous", False), ("batches", True)])
def test_the_copy_is_made_continuous_where_it_is_wanted_and_possible(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, scheduling: str, possible: bool
) -> None:
    monkeypatch.setattr("deploy.continuous.obstacle", lambda archive: None if possible else "of a test")
    monkeypatch.setattr(
        "deploy.archive_copy.change_settings", lambda path, changes: path.write_bytes(b"a continuous one")
    )
    wanted = possible and scheduling == "continuous"
    left = scene.server().state.folder / min(BY_SCHEDULING)
    left.parent.mkdir(parents=True)
    left.write_bytes(b"what a server that was killed left")
    with scene.server(scheduling=scheduling) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        loaded = Path(scene.seen()["config"]["model_store"]) / "digits.mar"
        assert loaded.read_bytes() == (b"a continuous one" if wanted else b"an archive")
        assert left.exists() == wanted
        for name in CLASSES:  # the others are for the stop, in either way
            if wanted or name not in BY_SCHEDULING:
                assert (server.state.folder / name).read_bytes().startswith(b"\xca\xfe\xba\xbe")
        explained = "digits is served in batches: of a test" in server.log_file.read_text(encoding="utf-8")
        assert explained == (not possible)
    assert not (server.state.folder / "org").exists()
    assert scene.archive.path.read_bytes() == b"an archive"
    scene.assert_nothing_is_left()


def test_it_is_continuous_where_nobody_says_otherwise(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.continuous.obstacle", lambda archive: None)
    assert scene.server()._continuous == {"digits"}
    assert scene.server(scheduling="batches")._continuous == set()


def test_the_frontend_learns_how_long_it_may_answer(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHPORT_DRAIN_SECONDS", "somebody else's")
    with scene.server(drain_s=7) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
    assert scene.seen()["environment"]["TORCHPORT_DRAIN_SECONDS"] == "7"


@pytest.mark.parametrize(("known", "at_least_s"), [(True, 1.5), (False, 0)])
def test_it_is_killed_when_the_time_for_answers_and_for_the_stop_is_over(
    scene: Scene, behave: Behave, monkeypatch: pytest.MonkeyPatch, known: bool, at_least_s: float
) -> None:
    monkeypatch.setattr("deploy.server._STOP_TIMEOUT_S", 0.3)
    monkeypatch.setattr("deploy.frontend_classes.is_known_release", lambda: known)
    behave("stubborn")
    with scene.server(drain_s=1.5 if known else 600) as server:
        server.wait_until_ready(READY_TIMEOUT_S)
        began = time.monotonic()
    assert at_least_s < time.monotonic() - began < 60
    scene.assert_nothing_is_left()
