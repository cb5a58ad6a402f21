import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from deploy.errors import StateError
from loadtest import cli
from loadtest.client import Client
from loadtest.errors import PayloadError, PlanError, RefusedError, UnreachableError
from loadtest.payloads import Payload
from loadtest.predict import read_input
from loadtest.tokens import find_token


class Handler(BaseHTTPRequestHandler):
    """Answers with what the server's `reply` holds, and keeps what it was asked."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), body))
        status, content = self.server.reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        server.reply = (200, json.dumps({"label": "7", "probability": 0.987}).encode())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)


def test_files_json_and_text_are_sent_in_order(server, tmp_path, capsys):
    picture = tmp_path / "seven.png"
    picture.write_bytes(b"pixels")
    outcome = cli.predict("digits", [str(picture), '{"inputs": [1]}', "a text"], url=server.url, token="secret")
    assert outcome["ok"]
    assert [answer["label"] for answer in outcome["answers"]] == ["7", "7", "7"]
    assert [(path, headers["Content-Type"], body) for path, headers, body in server.asked] == [
        ("/predictions/digits", "image/png", b"pixels"),
        ("/predictions/digits", "application/json", b'{"inputs": [1]}'),
        ("/predictions/digits", "text/plain; charset=utf-8", b"a text"),
    ]
    assert server.asked[0][1]["Authorization"] == "Bearer secret"
    assert "98.7%" in capsys.readouterr().out


def test_an_answer_that_is_no_classification_is_printed_as_json(server, capsys):
    server.reply = (200, b'{"predictions": [{"label": "7"}]}')
    cli.predict("digits", ["text"], url=server.url, token="t")
    assert '{"predictions": [{"label": "7"}]}' in capsys.readouterr().out


def test_the_content_type_can_be_given(server):
    cli.predict("digits", ["{broken"], url=server.url, token="t", content_type="application/json")
    assert server.asked[0][1]["Content-Type"] == "application/json"
    assert server.asked[0][2] == b"{broken"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (422, b'{"error": {"code": "shape", "message": "8 x 8 pixels wanted"}}', "answered 422: 8 x 8 pixels wanted$"),
        (404, b'{"code": 404, "message": "Model not found: digits"}', "Model not found: digits; is 'digits' the name"),
        (400, b'{"message": "Token authentication failed."}', "failed; give a valid token with --token or TORCHPORT"),
        (403, b"", r"answered 403: \(empty answer\); give a valid token"),
        (500, b"oops", "answered 500: oops"),
        (200, b"<html>", "not with JSON: <html>"),
    ],
)
def test_an_error_answer_becomes_one_sentence(server, status, body, message):
    server.reply = (status, body)
    with pytest.raises(RefusedError, match=message) as raised:
        cli.predict("digits", ["text"], url=server.url, token="t")
    assert raised.value.status == status


def test_no_server_names_the_command_that_starts_one():
    with socket.socket() as probe:  # bound but not listening: nobody else can take the port meanwhile
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=f"nothing is listening at {url} .*torchport serve"):
            cli.predict("digits", ["text"], url=url, token="t")


def test_a_silent_server_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        payload = Payload(body=b"x", content_type="text/plain")
        with Client(url, timeout_s=0.2) as client, pytest.raises(UnreachableError, match=r"within 0\.2 s"):
            client.predict("digits", payload)


def test_a_url_that_is_none_is_refused():
    with pytest.raises(PlanError, match="localhost:8080"):
        Client("localhost:8080")


@pytest.mark.parametrize("given", ["missing.png", "some/where", "/abs.json"])
def test_a_missing_file_is_not_sent_as_text(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PayloadError, match=f"there is no file {given}"):
        read_input(given)


def test_malformed_json_is_not_sent():
    with pytest.raises(PayloadError, match="malformed JSON"):
        read_input('{"inputs": [1,}')


@pytest.mark.parametrize("given", ["good", "a great film. truly", "x" * 5000, "nul\0byte"])
def test_text_is_sent_as_text(given):
    assert read_input(given) == Payload(body=given.encode(), content_type="text/plain; charset=utf-8")


class FakeServer:
    def inference_token(self):
        return "found"


@pytest.mark.parametrize("token", ["", " t", "t\n", "\u00fc"])
def test_what_can_be_no_token_is_refused_without_showing_it(server, token):
    with pytest.raises(PlanError, match=r"--token .* can be no token: give one word of printable ASCII"):
        cli.predict("digits", ["text"], url=server.url, token=token)
    assert not server.asked


@pytest.mark.parametrize("content_type", ["image/png\nX-Other: y", "image/\u00fc"])
def test_what_can_be_no_content_type_is_refused(server, content_type):
    with pytest.raises(PlanError, match=r"the content type .* can be none: give one like image/png"):
        cli.predict("digits", ["text"], url=server.url, token="t", content_type=content_type)
    assert not server.asked


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "http://localhost:8080", "http://[::1]:8080"])
def test_the_token_of_a_server_on_this_machine_is_looked_up(monkeypatch, url):
    ports = []
    monkeypatch.setattr("deploy.state.find_server", lambda port: ports.append(port) or FakeServer())
    assert find_token(url, None) == "found"
    assert ports == [8080]


def test_a_given_token_is_taken(monkeypatch):
    monkeypatch.setattr("deploy.state.find_server", lambda port: FakeServer())
    assert find_token("http://127.0.0.1:8080", "given") == "given"


def test_the_token_of_this_machine_is_not_sent_to_another(monkeypatch):
    monkeypatch.setattr("deploy.state.find_server", lambda port: FakeServer())
    assert find_token("http://example.org:8080", None) is None
    assert find_token("http://127.0.0.1.example.org:8080", None) is None


def test_a_server_that_torchport_did_not_start_may_need_no_token(monkeypatch):
    def find_nothing(port):
        raise StateError("nothing on that port")

    monkeypatch.setattr("deploy.state.find_server", find_nothing)
    assert find_token("http://127.0.0.1:8080", None) is None
