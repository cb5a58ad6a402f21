"""Real load on a tiny real server; the windows are short, so the bounds on this machine's own speed are off."""

import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from loadtest import cli, run
from loadtest.errors import RefusedError, RunError
from loadtest.payloads import Payload
from loadtest.plan import Plan
from loadtest.result import measure

PAYLOAD = Payload(body=b"pixels", content_type="image/png", expected_label="7")
RIGHT = (200, {"label": "7", "probability": 0.99})
ANY_CLIENT = {"max_send_lag_ms": 10_000.0, "max_client_cpu": 2.0}  # this machine may be busy with other tests


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.lock = threading.Lock()
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hangs up is what some of these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), body))
        status, document = self.server.answer(number)
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(answer):
    """A server whose answer to its n-th request is what `answer(n)` returns: (status, document)."""
    with Server(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(timeout=10)


def new_plan(server, **options):
    load = {} if "users" in options else {"rate_rps": 60.0}
    defaults = {"model": "digits", "url": server.url, "duration_s": 2.0, "warm_up_s": 0.5, **load, **ANY_CLIENT}
    return Plan(**{**defaults, **options})


class Stall:
    """Answers at once, but nobody for one second that begins one second after the first request."""

    def __init__(self):
        self.start_s = None

    def __call__(self, number):
        now_s = time.monotonic()
        if self.start_s is None:
            self.start_s = now_s + 1.0
        if self.start_s <= now_s < self.start_s + 1.0:
            time.sleep(self.start_s + 1.0 - now_s)
        return RIGHT


def test_an_open_loop_shows_a_stall_that_a_closed_loop_hides():
    with serving(Stall()) as server:
        honest = measure(new_plan(server, duration_s=2.5), [PAYLOAD])
    with serving(Stall()) as server:
        flattering = measure(new_plan(server, duration_s=2.5, users=1), [PAYLOAD])
    # One request in a closed loop waited; the sixty that should have been sent meanwhile never were.
    assert honest.latency.p99 > 800
    assert honest.latency.p90 > 500
    assert flattering.latency.max > 800
    assert flattering.latency.p99 < 300
    assert honest.tally.failed == flattering.tally.failed == 0
    assert honest.verdict.valid


def test_a_request_without_a_place_in_flight_fails_and_makes_the_measurement_invalid():
    # Two requests fit in flight, each takes 50 ms: of 60 planned per second, 40 can be sent.
    def slow(number):
        time.sleep(0.05)
        return RIGHT

    with serving(slow) as server:
        result = measure(new_plan(server, max_in_flight=2, duration_s=1.5), [PAYLOAD])
    missed = result.tally.faults["in-flight limit"].count
    assert missed > 0
    assert result.tally.requests == result.tally.right + missed
    assert result.tally.on_time == result.tally.right
    assert result.latency.p99 is None
    assert result.service.p99 > 50
    assert not result.verdict.ok
    assert any("the target rate was not reached" in reason for reason in result.verdict.invalid)


def test_every_answer_is_checked_and_every_error_counted():
    answers = [
        RIGHT,
        (200, {"label": "3"}),
        (200, {"no": "label"}),
        (503, {"error": {"code": "overloaded", "message": "the queue is full"}}),
    ]
    with serving(lambda number: answers[number % 4]) as server:
        result = measure(new_plan(server, users=1, duration_s=1.0, warm_up_s=0.0), [PAYLOAD], token="secret")
        seen = list(server.requests)
    tally = result.tally
    assert set(tally.faults) == {"wrong answer", "unreadable answer", "HTTP 503"}
    assert tally.faults["HTTP 503"].example == "the queue is full"
    assert tally.faults["wrong answer"].example == "label '3' instead of '7'"
    # One user sends in turn, so the four kinds can differ by one at most.
    counts = [tally.right, *(fault.count for fault in tally.faults.values())]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == tally.requests == len(seen)
    path, headers, body = seen[0]
    assert (path, body) == ("/predictions/digits", b"pixels")
    assert headers["Content-Type"] == "image/png"
    assert headers["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(result.to_json())


def test_a_silent_server_counts_as_timed_out():
    silent = threading.Event()

    def hang(number):
        silent.wait(timeout=10)
        return RIGHT

    with serving(hang) as server:
        result = measure(new_plan(server, rate_rps=20.0, duration_s=1.0, warm_up_s=0.0, timeout_s=0.5), [PAYLOAD])
        silent.set()
    assert set(result.tally.faults) == {"timed out"}
    assert result.tally.failed == result.tally.requests > 0
    assert "no request got a right answer" in result.verdict.invalid[0]


def test_a_dead_server_counts_as_refused():
    with serving(lambda number: RIGHT) as server:
        plan = new_plan(server, rate_rps=20.0, duration_s=0.5, warm_up_s=0.0)
    result = measure(plan, [PAYLOAD])
    assert set(result.tally.faults) == {"connection refused"}
    assert not result.verdict.valid


def test_two_processes_share_the_rate_and_are_merged():
    with serving(lambda number: RIGHT) as server:
        result = measure(new_plan(server, processes=2, rate_rps=100.0), [PAYLOAD])
        seen = len(server.requests)
    assert len(result.tally.cpu_shares) == 2
    assert result.tally.right == result.tally.requests <= seen
    assert result.tally.requests == pytest.approx(200, abs=70)  # five standard deviations


def test_a_load_generator_that_fails_shows_its_log(tmp_path, monkeypatch):
    broken = tmp_path / "locustfile.py"
    broken.write_text("raise SystemError('broken on purpose')\n")
    monkeypatch.setattr(run, "LOCUSTFILE", broken)
    plan = Plan(model="m", url="http://127.0.0.1:9", rate_rps=1.0, duration_s=1.0)
    with pytest.raises(RunError, match="broken on purpose"):
        measure(plan, [PAYLOAD])


def test_a_load_generator_that_hangs_is_ended_with_its_workers(monkeypatch):
    monkeypatch.setattr(run, "START_UP_S", -20.0)  # the deadline lies 2 s after the start, when the workers are up
    plan = Plan(
        model="m", url="http://127.0.0.1:9", users=2, duration_s=10.0, warm_up_s=1.0, timeout_s=1.0, processes=2
    )
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RunError, match="not done after 2 s"):
        measure(plan, [PAYLOAD])
    assert set(psutil.Process().children(recursive=True)) <= before


def test_nothing_but_the_locustfile_loads_gevent():
    # Its monkey-patching would change sockets and threads under torchport, or under this very test.
    modules = "cli client job predict report result run verdict"
    code = "".join(f"import loadtest.{name}\n" for name in modules.split())
    code += "import sys; sys.exit(any(name.split('.')[0] in ('gevent', 'locust') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("slo_p99_ms", "ok"), [(5_000.0, True), (1.0, False)])
def test_the_command_reports_and_its_outcome_follows_the_objective(tmp_path, monkeypatch, capsys, slo_p99_ms, ok):
    monkeypatch.setattr(cli, "Plan", lambda **options: Plan(**{**options, **ANY_CLIENT}))
    sample = tmp_path / "seven.png"
    sample.write_bytes(b"pixels")

    def answer(number):
        time.sleep(0.003)
        return RIGHT

    with serving(answer) as server:
        outcome = cli.loadtest(
            "digits",
            rate=100.0,
            duration=1.6,
            warm_up=0.2,
            slo_p99_ms=slo_p99_ms,
            inputs=[sample],
            out=tmp_path / "report",
            url=server.url,
            token="secret",
        )
    json.dumps(outcome, allow_nan=False)
    assert outcome["ok"] is ok
    assert outcome["slo_met"] is ok
    assert "secret" not in json.dumps(outcome)
    assert f"--input {sample}" in outcome["command"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "latency.hgrm",
        "report.html",
        "results.json",
    ]
    printed = capsys.readouterr()
    assert ("SLO MET" if ok else "SLO MISSED") in printed.out
    assert printed.err == ""  # no terminal, no progress bar


def test_an_unknown_model_is_found_before_any_load(tmp_path):
    sample = tmp_path / "seven.png"
    sample.write_bytes(b"pixels")
    with serving(lambda number: (404, {"message": "Model not found: digits"})) as server:
        with pytest.raises(RefusedError, match=r"answered 404: Model not found: digits; is 'digits' the name"):
            cli.loadtest("digits", rate=10.0, inputs=[sample], out=tmp_path / "out", url=server.url, token="t")
        assert len(server.requests) == 1
    assert not (tmp_path / "out").exists()
