"""`torchport serve`, with a frontend that only plays TorchServe, and what it prints."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy import cli
from deploy.errors import StartError
from deploy.ports import Ports
from deploy.state import STATE_VARIABLE, ServerState, find_server
from export.archive import Archive, ArchiveFiles, open_archive, signature_path, write_archive
from export.errors import ArchiveError, SigningError
from export.signing import MAKE_PRIVATE_KEY, MAKE_PUBLIC_KEY, sign_archive

from .fake_java import make_java

DEADLINE_S = 30
HOSTILE_TYPE = "image/png; a='$(touch hurt)' \"`touch hurt`\""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole archive of a model that nobody will ask."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "model.pt").write_bytes(b"weights")
    sample = {"file": "golden/0.png", "content_type": HOSTILE_TYPE, "label": "it's 7"}
    documents = {
        "golden/expected.json": json.dumps({"samples": [sample]}).encode(),
        "golden/0.png": b"pixels",
    }
    files = ArchiveFiles(artifact=folder / "model.pt", documents=documents, config=b"minWorkers: 1\n")
    return write_archive(files, name="digits", version="1.0", out=folder / "store")


class Serving:
    """A running `torchport serve`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, port: int) -> None:
        self.process, self.folder, self.port = process, folder, port

    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.stderr()
            assert time.monotonic() < deadline, self.stderr()
            time.sleep(0.02)

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: "stop with Ctrl-C" in self.stdout())

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=DEADLINE_S)

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.stdout().splitlines()[-1])
        return document

    def assert_nothing_is_left(self) -> None:
        assert list((self.folder / "temporary").iterdir()) == []
        kept = {path.name for path in (self.folder / "state").glob("serve-*/*")}
        assert kept <= {"torchserve.log", "config.properties", "lock"}
        for pid in (self.folder / "pids").read_text(encoding="utf-8").split():
            status = Path("/proc") / pid / "status"
            assert not status.exists() or "zombie" in status.read_text(encoding="utf-8")
        assert "Traceback" not in self.stderr()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setenv("JAVA_HOME", str(make_java(tmp_path / "java")))
    monkeypatch.setenv("FAKE_JAVA_PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("FAKE_JAVA_SEEN", str(tmp_path / "seen"))
    return tmp_path


@contextmanager
def serving(archive: Path, folder: Path, *options: str, **popen: Any) -> Iterator[Serving]:
    port = Ports.first_of_free_range()
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "torchport", "serve", str(archive), "--port", str(port), "--json", *options],
            **{"stdout": stdout, "stderr": stderr, "text": True, **popen},
        )
        try:
            yield Serving(process, folder, port)
        finally:
            if process.poll() is None:  # only after a failed test
                process.terminate()
                process.wait(timeout=DEADLINE_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_cleanly(archive: Path, folder: Path, number: signal.Signals) -> None:
    with serving(archive, folder) as server:
        server.wait_until_ready()
        assert find_server(server.port).pid == server.process.pid
        assert server.end(number) == 0
    assert server.document() == {
        "ok": True,
        "url": f"http://127.0.0.1:{server.port}",
        "models": {"digits": "1.0"},
    }
    server.assert_nothing_is_left()


def test_a_burst_of_signals_stops_it_cleanly(archive: Path, folder: Path) -> None:
    with serving(archive, folder) as server:
        server.wait_until_ready()
        for _ in range(20):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                server.process.send_signal(number)
        assert server.end(signal.SIGTERM) == 0
    server.assert_nothing_is_left()


def test_under_nohup_it_outlives_the_terminal(archive: Path, folder: Path) -> None:
    with serving(archive, folder, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as server:
        server.wait_until_ready()
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert server.process.poll() is None
        assert server.end(signal.SIGTERM) == 0


def test_interrupted_before_it_is_ready_it_has_not_served(
    archive: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_JAVA", "silent")
    with serving(archive, folder) as server:
        server.wait_for((folder / "pids").exists)
        assert server.end(signal.SIGTERM) == 130
    assert server.document() == {"ok": False, "error": {"type": "KeyboardInterrupt", "message": "interrupted"}}
    server.assert_nothing_is_left()


def test_a_server_that_ends_by_itself_is_a_failure(
    archive: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_JAVA", "ends when ready")
    with serving(archive, folder) as server:
        assert server.process.wait(timeout=DEADLINE_S) == 1
    assert "TorchServe ended by itself" in server.stderr().splitlines()[-1]
    server.assert_nothing_is_left()


def test_a_reader_that_goes_away_stops_it(archive: Path, folder: Path) -> None:
    with serving(archive, folder, stdout=subprocess.PIPE) as server:
        assert server.process.stdout is not None
        server.process.stdout.close()
        assert server.process.wait(timeout=DEADLINE_S) == 1
    server.assert_nothing_is_left()


def test_a_port_in_use_is_one_sentence(archive: Path, folder: Path) -> None:
    with serving(archive, folder) as first:
        first.wait_until_ready()
        port = str(first.port)
        second = subprocess.run(
            [sys.executable, "-m", "torchport", "serve", str(archive), "--port", port, "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 1
        (sentence,) = second.stderr.splitlines()
        assert sentence.startswith(f"Error: the port {first.port + 1} is in use")  # of the five it holds this one
        assert json.loads(second.stdout)["error"] == {
            "type": "PortError",
            "message": sentence.removeprefix("Error: "),
        }
        assert find_server(first.port).inference_token() == "inference-token"
        assert first.end(signal.SIGTERM) == 0


def test_an_unusable_state_folder_is_one_sentence(archive: Path, folder: Path) -> None:
    (folder / "state").write_text("in the way", encoding="utf-8")
    with serving(archive, folder) as server:
        assert server.process.wait(timeout=DEADLINE_S) == 1
    sentence = server.stderr().splitlines()[-1]
    assert sentence.startswith(f"Error: the state folder {folder}/state/serve-{server.port} cannot be used")
    assert STATE_VARIABLE in sentence
    assert list((folder / "temporary").iterdir()) == []


def named(*names: str) -> list[Archive]:
    return [
        Archive(path=Path(f"{i}.mar"), name=name, version="1.0", sha256="", digests={}) for i, name in enumerate(names)
    ]


def test_two_archives_of_one_name_are_refused() -> None:
    cli._refuse_twins(named("digits", "other"))
    with pytest.raises(StartError, match=r"two of the archives are called 'other'; .*--name"):
        cli._refuse_twins(named("digits", "other", "other"))


def test_an_unknown_scheduling_is_refused_with_those_that_there_are(archive: Path, folder: Path) -> None:
    with pytest.raises(StartError, match=r"--scheduling is 'batch'; choose continuous or batches"):
        cli.serve([archive], scheduling="batch")
    assert not (folder / "state").exists()


@pytest.mark.parametrize(("options", "installed"), [((), True), (("--scheduling", "batches"), False)])
def test_the_scheduling_reaches_the_server(
    archive: Path, folder: Path, options: tuple[str, ...], installed: bool
) -> None:
    with serving(archive, folder, *options) as server:
        server.wait_until_ready()
        assert any((folder / "state").rglob("AsyncBatchAggregator.class")) == installed
        with zipfile.ZipFile(next((folder / "temporary").rglob("digits.mar"))) as loaded:
            assert (b"asyncCommunication" in loaded.read("model-config.yaml")) == installed
        assert server.end(signal.SIGTERM) == 0
    server.assert_nothing_is_left()


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    for command in (MAKE_PRIVATE_KEY, MAKE_PUBLIC_KEY):
        subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "private.pem", tmp_path / "public.pem"


def test_a_required_signature_is_verified_before_anything_is_started(
    archive: Path, folder: Path, keys: tuple[Path, Path]
) -> None:
    copy = Path(shutil.copy(archive, folder))
    with pytest.raises(SigningError, match=r"digits\.mar is not signed: there is no digits\.mar\.sig beside it"):
        cli.serve([copy], require_signature=keys[1])
    sign_archive(copy, keys[0])
    signature_path(copy).write_bytes(signature_path(copy).read_bytes().replace(b'"sig":"', b'"sig":"A'))
    with pytest.raises(SigningError, match="the signature is damaged"):
        cli.serve([copy], require_signature=keys[1])
    assert not (folder / "pids").exists()
    assert not (folder / "state").exists()


def test_a_signed_archive_is_served(archive: Path, folder: Path, keys: tuple[Path, Path]) -> None:
    copy = Path(shutil.copy(archive, folder))
    sign_archive(copy, keys[0])
    with serving(copy, folder, "--require-signature", str(keys[1])) as server:
        server.wait_until_ready()
        assert server.end(signal.SIGTERM) == 0
    server.assert_nothing_is_left()


def test_a_flipped_byte_of_any_region_is_refused_before_anything_is_started(archive: Path, folder: Path) -> None:
    content = archive.read_bytes()
    with zipfile.ZipFile(archive) as source:
        directory = source.start_dir
        entry = source.getinfo("model.pt")
    regions = {
        "an entry's date": entry.header_offset + 10,
        "an entry's length": entry.header_offset + 22,
        "an entry's name": entry.header_offset + 30,
        "an entry's content": entry.header_offset + 30 + len("model.pt"),
        "the directory's permissions": directory + 38,
        "the directory's offset": directory + 42,
        "the end": len(content) - 22 + 8,
        "the length of the comment": len(content) - 2,
    }
    for region, position in regions.items():
        damaged = bytearray(content)
        damaged[position] ^= 1
        (folder / "digits.mar").write_bytes(damaged)
        with pytest.raises(ArchiveError, match=r"digits\.mar"):
            cli.serve([folder / "digits.mar"])
        assert not (folder / "state").exists(), region


class StandingServer:
    """What :func:`deploy.cli._print_ready` needs of a server."""

    def __init__(self, folder: Path) -> None:
        self.temporary_folder = folder
        self.places: dict[str, str] = {}
        self.log_file = folder / "torchserve.log"
        self.state = ServerState(
            folder=folder,
            pid=os.getpid(),
            inference_url="http://127.0.0.1:8080",
            management_url="http://127.0.0.1:8081",
            metrics_url="http://127.0.0.1:8082",
            models={},
        )


def test_the_printed_curl_line_survives_the_shell(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a $(touch hurt) folder; touch hurt 'quoted"
    folder.mkdir()
    entry = {"key": "to'ken", "expiration time": "2999-01-01T00:00:00Z"}
    keys = {kind: entry for kind in ("management", "inference", "API")}
    (folder / "key_file.json").write_text(json.dumps(keys), encoding="utf-8")
    curl = tmp_path / "bin" / "curl"
    curl.parent.mkdir()
    curl.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n", encoding="utf-8")
    curl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{curl.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    cli._print_ready(StandingServer(folder), [open_archive(archive)])  # type: ignore[arg-type]

    announced, line, metrics = capsys.readouterr().out.splitlines()
    assert announced.startswith("digits 1.0 is ready.")
    assert '"it\'s 7"' in announced
    assert "http://127.0.0.1:8082/metrics" in metrics
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    *arguments, body = json.loads(done.stdout)
    assert arguments == [
        *("-s", "http://127.0.0.1:8080/predictions/digits", "-H", "Authorization: Bearer to'ken"),
        *("-H", f"Content-Type: {HOSTILE_TYPE}", "--data-binary"),
    ]
    assert Path(body.removeprefix("@")).read_bytes() == b"pixels"
    assert not (tmp_path / "hurt").exists()


def test_a_model_called_server_does_not_overwrite_the_state(archive: Path, folder: Path) -> None:
    expected = json.dumps({"samples": [{"file": "golden/0.json", "content_type": "application/json", "label": "1"}]})
    (folder / "model.pt").write_bytes(b"weights")
    documents = {"golden/expected.json": expected.encode(), "golden/0.json": b'{"inputs": []}'}
    files = ArchiveFiles(artifact=folder / "model.pt", documents=documents, config=b"minWorkers: 1\n")
    for name in ("server", "key_file"):
        with serving(write_archive(files, name=name, version="1.0", out=folder / "store"), folder) as server:
            server.wait_until_ready()
            assert find_server(server.port).inference_token() == "inference-token"
            assert server.end(signal.SIGTERM) == 0


def test_a_port_taken_by_anything_is_named(archive: Path, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] - 2
        with pytest.raises(Exception, match=rf"port \d+ is in use \(TorchServe takes {port}"):
            cli.serve([archive], port=port)
    assert not (folder / "state").exists()
