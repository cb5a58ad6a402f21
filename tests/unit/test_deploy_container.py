import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy.container import NotReadyError, check_ready, main

PAST, FUTURE = "2001-01-01T00:00:00.123456789Z", "2999-01-01T00:00:00.123456789Z"


def version(*statuses, name="digits", min_workers=1):
    workers = [{"id": str(9000 + i), "status": status} for i, status in enumerate(statuses)]
    return {"modelName": name, "modelVersion": "1.0", "minWorkers": min_workers, "workers": workers}


@contextmanager
def torchserve(folder, *, versions, expiration):
    """A management API like TorchServe's: its answer about a token is an empty line, the token is in the key file."""
    keys = {kind: {"key": f"old-{kind}", "expiration time": expiration} for kind in ("management", "inference")}
    key_file = folder / "key_file.json"

    def write_keys():
        key_file.write_text(json.dumps({**keys, "API": {"key": "api"}}))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = self.path.partition("?")
            token = self.headers["Authorization"].removeprefix("Bearer ")
            if path == "/token" and token == "api":
                kind = query.removeprefix("type=")
                keys[kind] = {"key": f"new-{kind}", "expiration time": FUTURE}
                write_keys()
                self._answer(200, b"\n")
            elif token != keys["management"]["key"] or keys["management"]["expiration time"] == PAST:
                self._answer(400, b"Token Authorization failed")
            elif path == "/models":
                self._answer(200, json.dumps({"models": [{"modelName": v["modelName"]} for v in versions]}).encode())
            else:
                self._answer(200, json.dumps([v for v in versions if path == f"/models/{v['modelName']}/all"]).encode())

        def _answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    write_keys()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        (folder / "config.properties").write_text(
            "# comment=1\nload_models=none\n"
            f"management_address=http://127.0.0.1:{server.server_port}\n"
            "load_models=digits.mar,other.mar\n"
        )
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def test_all_workers_ready_is_ready():
    check_ready(["a.mar", "b.mar"], [version("READY", "READY"), version("READY", name="other")])


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ([], "0 of 2 archives"),
        ([version("READY")], "1 of 2 archives"),
        ([version("READY"), version(name="other")], "other 1.0 has 0 of 1 workers"),
        ([version("READY"), version(name="other", min_workers=0)], "other 1.0 has 0 of 0 workers"),
        ([version("READY"), version("READY", name="other", min_workers=2)], "other 1.0 has 1 of 2 workers"),
        ([version("READY", "LOADING"), version("READY", name="other")], "digits 1.0: worker 9001 is LOADING"),
    ],
)
def test_anything_less_is_not(versions, message):
    with pytest.raises(NotReadyError, match=message):
        check_ready(["a.mar", "b.mar"], versions)


@pytest.mark.parametrize("expiration", [PAST, FUTURE])
def test_ready_with_and_without_an_expired_token(tmp_path, monkeypatch, capsys, expiration):
    monkeypatch.chdir(tmp_path)
    with torchserve(tmp_path, versions=[version("READY"), version("READY", name="other")], expiration=expiration):
        assert main(["ready"]) == 0
    assert capsys.readouterr().out == "ready\n"


@pytest.mark.parametrize(("expiration", "token"), [(PAST, "new-inference"), (FUTURE, "old-inference")])
def test_a_token_is_renewed_when_it_has_expired(tmp_path, monkeypatch, capsys, expiration, token):
    monkeypatch.chdir(tmp_path)
    with torchserve(tmp_path, versions=[], expiration=expiration):
        assert main(["token"]) == 0
    assert capsys.readouterr().out == f"{token}\n"


def test_before_the_server_is_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ready"]) == 1
    assert "has not been started" in capsys.readouterr().err
    with torchserve(tmp_path, versions=[], expiration=FUTURE):
        pass
    assert main(["ready"]) == 1
    assert "refused" in capsys.readouterr().err
    (tmp_path / "key_file.json").unlink()
    assert main(["ready"]) == 1
    assert "not written its tokens" in capsys.readouterr().err


def test_a_wrong_question(capsys):
    assert main(["reddy"]) == 2
    assert "usage" in capsys.readouterr().err
