"""State folders and tokens, with a small server in the place of TorchServe's management API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deploy.errors import StateError
from deploy.state import (
    KEY_FILE,
    SERVER_FILE,
    STATE_VARIABLE,
    ServerState,
    claimed,
    find_server,
    make_private,
    state_folder,
)

PAST, FUTURE = "2001-01-01T00:00:00.123456789Z", "2999-01-01T00:00:00.123456789Z"
PORT = 18080


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def folder(root: Path) -> Path:
    folder = state_folder(PORT)
    make_private(folder)
    return folder


def write_keys(folder: Path, *, expiration: str, prefix: str = "old") -> None:
    keys = {kind: {"key": f"{prefix}-{kind}", "expiration time": expiration} for kind in ("management", "inference")}
    (folder / KEY_FILE).write_text(json.dumps({**keys, "API": {"key": "api"}}), encoding="utf-8")


def make_state(folder: Path, management_url: str = "http://127.0.0.1:1") -> ServerState:
    return ServerState(
        folder=folder,
        pid=os.getpid(),
        inference_url=f"http://127.0.0.1:{PORT}",
        management_url=management_url,
        metrics_url="http://127.0.0.1:1",
        models={"digits": "1.0"},
    )


class Management(HTTPServer):
    """Gives new tokens as TorchServe does: into the key file, for the API key alone."""

    folder: Path
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Management

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        allowed = self.headers["Authorization"] == "Bearer api"
        if allowed:
            write_keys(self.server.folder, expiration=FUTURE, prefix="new")
        self.send_response(200 if allowed else 400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def management(folder: Path) -> Iterator[Management]:
    with Management(("127.0.0.1", 0), Handler) as server:
        server.folder, server.asked = folder, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)


@pytest.fixture
def state(folder: Path, management: Management) -> ServerState:
    return make_state(folder, f"http://127.0.0.1:{management.server_port}")


def test_a_valid_token_is_read(state: ServerState, management: Management) -> None:
    write_keys(state.folder, expiration=FUTURE)
    assert (state.inference_token(), state.management_token()) == ("old-inference", "old-management")
    assert management.asked == []


@pytest.mark.parametrize("expiration", [PAST, "", "soon"])
def test_an_expired_token_is_renewed(state: ServerState, management: Management, expiration: str) -> None:
    write_keys(state.folder, expiration=expiration)
    assert state.inference_token() == "new-inference"
    assert management.asked == ["/token?type=inference"]
    write_keys(state.folder, expiration=expiration)
    assert state.management_token() == "new-management"
    assert management.asked[1:] == ["/token?type=management"]


def test_a_renewal_does_not_go_through_a_proxy(state: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    write_keys(state.folder, expiration=PAST)
    assert state.inference_token() == "new-inference"


def test_a_refused_renewal_is_told(state: ServerState) -> None:
    write_keys(state.folder, expiration=PAST)
    keys = json.loads((state.folder / KEY_FILE).read_text(encoding="utf-8"))
    keys["API"]["key"] = "wrong"
    (state.folder / KEY_FILE).write_text(json.dumps(keys), encoding="utf-8")
    with pytest.raises(StateError, match=r"gives no new inference token: .*400"):
        state.inference_token()


def test_a_server_that_does_not_answer_gives_no_token(folder: Path) -> None:
    write_keys(folder, expiration=PAST)
    with pytest.raises(StateError, match=r"http://127.0.0.1:1 gives no new management token"):
        make_state(folder).management_token()


@pytest.mark.parametrize(
    "content",
    [None, b"", b'{"management": {"key', b"[]", b"null", b"{}", b'{"inference": {"key": "a"}}', b"\xff\xfe"],
)
def test_a_key_file_that_cannot_be_read_is_told(folder: Path, content: bytes | None) -> None:
    if content is not None:
        (folder / KEY_FILE).write_bytes(content)
    with pytest.raises(StateError, match=r"the tokens in .*key_file.json cannot be read \(.*--token"):
        make_state(folder).inference_token()


def test_looking_for_a_server_leaves_nothing_behind(root: Path) -> None:
    with pytest.raises(StateError, match=f"serves nothing on port {PORT}; start it with `torchport serve`"):
        find_server(PORT)
    assert not root.exists()


def test_the_state_lies_where_the_platform_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(STATE_VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_state_path", lambda name: tmp_path / name)
    assert state_folder(8080) == tmp_path / "torchport" / "serve-8080"


def test_a_relative_state_folder_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(STATE_VARIABLE, "here")
    assert state_folder(8080) == tmp_path / "here" / "serve-8080"


def test_a_server_is_found_while_its_folder_is_claimed(folder: Path) -> None:
    state = make_state(folder)
    with claimed(folder):
        state.write()
        assert find_server(PORT) == state
    with pytest.raises(StateError, match=f"the server on port {PORT} is gone; start it again"):
        find_server(PORT)
    with claimed(folder):
        state.remove()
        with pytest.raises(StateError, match="serves nothing"):
            find_server(PORT)


def test_a_claim_ends_with_the_process_that_holds_it(folder: Path) -> None:
    code = f"""
import os, pathlib
from deploy.state import claimed
with claimed(pathlib.Path({str(folder)!r})):
    print("claimed", flush=True)
    input()
    os._exit(9)
"""
    make_state(folder).write()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        assert find_server(PORT).pid == os.getpid()
        with pytest.raises(StateError, match="another `torchport serve`"), claimed(folder):
            pytest.fail("it was claimed twice")
        process.communicate("\n")
    with pytest.raises(StateError, match="is gone"):
        find_server(PORT)
    with claimed(folder):
        assert find_server(PORT).pid == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"folder": "a"}', '{"folder": "a", "what": 1}'])
def test_a_damaged_state_is_no_server(folder: Path, content: str) -> None:
    (folder / SERVER_FILE).write_text(content, encoding="utf-8")
    with claimed(folder), pytest.raises(StateError, match="serves nothing"):
        find_server(PORT)


def test_a_state_folder_that_others_can_read_is_closed_to_them(root: Path) -> None:
    folder = state_folder(PORT)
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)
    make_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_state_folder_that_cannot_be_made_is_told(root: Path) -> None:
    root.write_text("in the way", encoding="utf-8")
    with pytest.raises(StateError, match=rf"state folder {root}/serve-{PORT} cannot be used \(.*{STATE_VARIABLE}"):
        make_private(state_folder(PORT))


def test_a_state_folder_without_the_right_to_write_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(StateError, match=rf"cannot be used \(Permission denied\); .*{STATE_VARIABLE}"):
        make_private(folder)


def test_a_state_folder_of_somebody_else_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(StateError, match="belongs to another user"):
        make_private(folder)
