"""Starting and ending systems, and the environment that they run in; with peers that need no installation."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from deploy.state import STATE_VARIABLE
from loadtest import compare_environment, compare_run, compare_server
from loadtest.closed_loop import LoadRecord
from loadtest.compare_answers import Expected
from loadtest.compare_environment import PeerEnvironment
from loadtest.compare_errors import PeersError, SystemStartError
from loadtest.compare_limit import Limit
from loadtest.compare_plan import ComparePlan, usable_cores
from loadtest.compare_run import Run, bound_to_cores, ended_by_signals, steps_of
from loadtest.compare_server import Endpoint, Model, serving
from loadtest.compare_systems import SYSTEMS, System
from loadtest.compare_whole import Whole
from loadtest.errors import RunError
from loadtest.histogram import Histogram
from loadtest.payloads import Payload
from loadtest.peers.settings import VARIABLE, PeerSettings

SERVER = textwrap.dedent(
    """
    import http.server, json, os, pathlib, subprocess, sys, time
    port, behaviour = int(sys.argv[1]), sys.argv[2]
    here = pathlib.Path(os.environ["TMPDIR"])
    if behaviour == "ends":
        sys.exit("it is broken")
    # As Ray does: a helper in a session of its own, which does not end with its parent.
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print("helper", helper.pid, flush=True)
    asked = 0
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            global asked
            asked += 1
            self.rfile.read(int(self.headers["Content-Length"]))
            label = "a" if behaviour == "right" and asked > 2 else "still loading"
            body = json.dumps({"predictions": [{"label": label}]}).encode()
            self.send_response(200 if asked > 1 else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *arguments):
            pass
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """
)


class FakeSystem(System):
    """A peer that is `SERVER`."""

    def peer_command(self, python, *, folder, port, threads, workers, files):
        return [str(python), "-c", SERVER, str(port), self.options[0]]


def fake(behaviour):
    return FakeSystem(name="fake", title="Fake", batching="none", module="fake", options=(behaviour,))


@pytest.fixture
def model(tmp_path):
    return Model(
        archive=tmp_path / "none.mar",
        folder=tmp_path,
        name="none",
        threads=1,
        workers=1,
        body=Payload(body=b'{"instances": [1]}', content_type="application/json"),
        files=False,
        expected=Expected(labels=("a",)),
    )


def test_a_server_is_ready_when_it_answers_rightly_and_ends_with_what_it_started(model, monkeypatch):
    works = []
    make = compare_server.tempfile.mkdtemp
    monkeypatch.setattr(
        compare_server.tempfile, "mkdtemp", lambda prefix: works.append(make(prefix=prefix)) or works[0]
    )
    # Other tests may have servers of their own.
    before = set(psutil.pids())
    with serving(fake("right"), model, None) as endpoint:
        assert endpoint.path == "/predict"
        helper = int((Path(works[0]) / "server.log").read_text().split()[1])
        assert helper not in before
        assert psutil.pid_exists(helper)
        children = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert children
    assert not any(child.is_running() for child in children)
    assert not psutil.pid_exists(helper) or psutil.Process(helper).status() == psutil.STATUS_ZOMBIE
    assert not Path(works[0]).exists()


def test_a_server_that_ends_is_reported_with_its_last_words(model):
    with (
        pytest.raises(SystemStartError, match="Fake ended while starting: it is broken"),
        serving(fake("ends"), model, None),
    ):
        pass


def test_a_server_that_answers_wrongly_is_ended(model, monkeypatch):
    monkeypatch.setattr(compare_server, "READY_TIMEOUT_S", 2.0)
    before = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises(SystemStartError, match="no right answer within 2 s: wrong answer: label 'still loading'"),
        serving(fake("wrong"), model, None),
    ):
        pass
    assert set(psutil.Process().children(recursive=True)) <= before


def test_an_error_in_the_block_ends_the_server(model):
    with pytest.raises(KeyboardInterrupt), serving(fake("right"), model, None):
        raise KeyboardInterrupt
    assert not [child for child in psutil.Process().children() if "HTTPServer" in " ".join(child.cmdline())]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to cores here")
def test_cores_bind_what_is_started_and_nothing_afterwards():
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    before = usable_cores()
    with bound_to_cores(1) as words:
        assert json.loads(subprocess.check_output([sys.executable, "-c", code])) == [before[0]]
    assert "bound to 1 of" in words
    assert usable_cores() == before
    with bound_to_cores(None) as words:
        assert usable_cores() == before
    assert "nothing is bound" in words


def test_sigterm_is_an_interrupt_while_servers_run():
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is handler


class TestEnvironment:
    def test_it_sees_our_packages_after_its_own(self, tmp_path):
        environment = PeerEnvironment(tmp_path / "peers")
        environment._make()
        code = "import json, sys, torch, handlers, loadtest.peers; print(json.dumps([torch.__version__, sys.path]))"
        found = subprocess.check_output([environment.python, "-P", "-c", code], cwd=tmp_path, text=True)
        version, path = json.loads(found)
        torch = pytest.importorskip("torch")
        assert version == str(torch.__version__)
        own = [i for i, place in enumerate(path) if place.startswith(str(tmp_path))]
        ours = path.index(str(Path(torch.__file__).parents[1]))
        assert own
        assert max(own) < ours

    def test_it_is_made_where_distutils_is_in_use(self, tmp_path, monkeypatch):
        # As after torch has compiled something: setuptools, asked for pip, would warn that it takes its place.
        monkeypatch.setitem(sys.modules, "distutils", SimpleNamespace(__file__="elsewhere"))
        environment = PeerEnvironment(tmp_path / "peers")
        environment._make()
        assert environment.python.exists()

    def test_another_set_of_pins_is_another_place_and_the_state_folder_moves_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))
        first = PeerEnvironment.default().folder
        assert first.parent == tmp_path
        pins = tmp_path / "pins.txt"
        pins.write_text("mosec==0\n")
        monkeypatch.setattr(compare_environment, "REQUIREMENTS", pins)
        assert PeerEnvironment.default().folder != first

    def test_what_pip_refuses_is_an_error_and_is_tried_again(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        environment = PeerEnvironment(tmp_path / "peers")
        with pytest.raises(PeersError, match=r"pip cannot install mosec: .*mosec.*; see whether pip reaches its index"):
            environment.install(["mosec"])
        assert environment.missing(["mosec"]) == ("mosec",)

    def test_what_is_installed_is_not_installed_again(self, tmp_path, monkeypatch):
        environment = PeerEnvironment(tmp_path / "peers")
        # Satisfied by our own environment, so that no index is needed.
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        environment.install(["numpy"])
        assert environment.missing(["numpy", "mosec"]) == ("mosec",)
        monkeypatch.setattr(compare_environment.subprocess, "run", None)
        environment.install(["numpy"])
        assert environment.versions(["numpy"]).keys() == {"numpy"}

    def test_a_place_that_cannot_be_is_an_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(PeersError, match=STATE_VARIABLE):
            PeerEnvironment(tmp_path / "file" / "peers").install(["numpy"])


class TestRounds:
    """Two rounds of Mosec at 1 and 8 in flight, with everything that starts a process replaced."""

    LIMIT = Limit(
        arrival_per_s=100.0,
        grouped_per_s=200.0,
        whole=Whole(
            alone_ms=5.0,
            one_per_s=80.0,
            one_batch=8,
            all_per_s=160.0,
            all_batch=8,
            lanes=2,
            stages_ms={size: dict.fromkeys(("decode", "stack", "compute", "encode"), 1.0) for size in (1, 8, 32)},
        ),
        expected=(Expected(),),
    )
    PLAN = ComparePlan(archive=Path("a"), reference=Path("a"), peers=("mosec",), users=(1, 8), rounds=2)

    @pytest.fixture
    def measure(self, monkeypatch, tmp_path):
        def measure(serve, send, limit=lambda *arguments, **options: self.LIMIT):
            monkeypatch.setattr(compare_run, "serving", serve)
            monkeypatch.setattr(compare_run, "send_load", send)
            monkeypatch.setattr(compare_run, "measure_limit", limit)
            archive = SimpleNamespace(path=Path("a"), folder=tmp_path, name="none", describe=lambda: {"model": "none"})
            environment = PeerEnvironment(tmp_path)
            steps = []
            run = Run(
                self.PLAN,
                archive,
                archive,
                [Payload(body=b"{}", content_type="application/json")],
                environment=environment,
                on_step=lambda text, done: steps.append(done),
            )
            comparison = run.measure(requests="one", command="torchport compare")
            assert sum(steps) == steps_of(self.PLAN)
            return comparison

        return measure

    @staticmethod
    @contextlib.contextmanager
    def serve(system, model, python):
        yield Endpoint(port=1, path="/", headers={})

    @staticmethod
    def send(job):
        latency = Histogram()
        latency.record(0.01)
        return LoadRecord(
            sent=job.users,
            right=job.users,
            failed=0,
            duration_s=1.0,
            cpu_share=0.1,
            stall_s=0.1,
            latency=latency,
            faults={},
        )

    def test_a_system_that_fails_once_is_not_tried_again(self, measure):
        started = []

        @contextlib.contextmanager
        def refuse(system, model, python):
            started.append(system.name)
            if system.name == "mosec":
                raise SystemStartError("Mosec ended while starting: no")
            yield Endpoint(port=1, path="/", headers={})

        comparison = measure(refuse, self.send)
        assert started == ["torchport", "mosec", "torchport"]
        assert comparison.invalid == ["Mosec ended while starting: no"]
        assert comparison.cell("torchport", 8).rps == 8

    def test_a_turn_that_is_lost_costs_no_other(self, measure):
        jobs = []

        def fail_once(job):
            jobs.append(job)
            if len(jobs) == 2:
                raise RunError("the load generator was not done")
            return self.send(job)

        comparison = measure(self.serve, fail_once)
        assert comparison.invalid == ["torchport at 8 in flight, round 1: the load generator was not done"]
        assert {visit.round for visit in comparison.visits if visit.system == "torchport"} == {0, 1}
        assert len(comparison.visits) == 7
        assert [job.seed for job in jobs] == [0] * 4 + [1] * 4  # the same for all systems of a round

    def test_a_limit_that_is_lost_costs_its_round_alone_unless_it_is_the_first(self, measure):
        calls = []

        def second_fails(*arguments, **options):
            calls.append(options)
            if len(calls) == 2:
                raise RunError("not done")
            return self.LIMIT

        comparison = measure(self.serve, self.send, second_fails)
        assert comparison.invalid == ["in-process limit, round 2: not done"]
        assert comparison.cell("mosec", 8).of_limit == pytest.approx(0.08)

        def fail(*arguments, **options):
            raise RunError("cannot be run")

        with pytest.raises(RunError, match="cannot be run"):
            measure(self.serve, self.send, fail)


def test_threads_reach_torchport_and_peers_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHPORT_THREADS", "7")
    monkeypatch.setenv("TORCHPORT_MAX_BATCH", "8")
    ours = compare_server._environment(SYSTEMS["torchport"], tmp_path, "mark", 2)
    assert (ours["TORCHPORT_THREADS"], ours["TORCHPORT_MAX_BATCH"]) == ("2", "8")
    theirs = compare_server._environment(SYSTEMS["mosec"], tmp_path, "mark", 2)
    assert theirs["OMP_NUM_THREADS"] == "2"


def test_a_peer_is_told_what_requests_are(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")  # is left to children, not to other tests
    for files in (False, True):
        command = SYSTEMS["mosec"].peer_command(
            Path("python"), folder=tmp_path, port=1, threads=2, workers=3, files=files
        )
        given = PeerSettings.from_arguments(command[command.index("--folder") :])
        assert given == PeerSettings(folder=tmp_path, port=1, threads=2, workers=3, files=files)
        assert PeerSettings.from_environment() == given
