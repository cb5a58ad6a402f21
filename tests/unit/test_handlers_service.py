import json
import logging
import os
import shutil
import socket
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from handlers.entry import Entry
from handlers.errors import BackendError, DigestError, GoldenError, LoadError
from handlers.metrics import Emitter
from handlers.model import DEFAULT_MAX_BATCH, ServedModel
from handlers.service import Service, logger

from .stock_torchserve import Replies, inference_request, message

DEADLINE_S = 200


class FakeContext:
    """What TorchServe 0.12 hands to handlers, as far as they use it."""

    model_name = "brightness"

    def __init__(self, folder=None, *, headers=(), config=None, batch_size=4):
        self.manifest = {"model": {"modelVersion": "1.0"}}
        self.system_properties = {"model_dir": str(folder), "batch_size": batch_size}
        self.model_yaml_config = config
        self.headers = headers
        self.statuses = {}
        self.content_types = {}

    def get_all_request_header(self, idx):
        return self.headers[idx] if idx < len(self.headers) else {}

    def get_request_id(self, idx):
        return f"id-{idx}"

    def set_response_content_type(self, idx, value):
        self.content_types[idx] = value

    def set_response_status(self, code, phrase, idx):
        self.statuses[idx] = (code, phrase)


@pytest.fixture(autouse=True)
def _quiet_logger(caplog):
    """Keep the service's own handler off the test run's stderr, and let caplog hear it."""
    before = logger.handlers[:], logger.propagate
    logger.handlers[:] = [caplog.handler]
    logger.propagate = False
    yield
    logger.handlers[:], logger.propagate = before


@pytest.fixture(autouse=True)
def changed(monkeypatch):
    """What a worker changes of its process stays as it was; says what it would have changed, in order."""
    changes = []
    monkeypatch.setattr("handlers.service._in_worker_process", lambda: True)
    monkeypatch.setattr("handlers.service.serve_continuously", lambda start: changes.append(("loop", start)))
    for name in ("read_in_few_pieces", "quieten_frontend_lines"):
        monkeypatch.setattr(f"handlers.service.{name}", lambda name=name: changes.append((name, None)))
    monkeypatch.setattr("handlers.service.gc", SimpleNamespace(collect=lambda: None, freeze=lambda: None))
    monkeypatch.setattr(Emitter, "start", lambda self: changes.append(("metrics", self)))
    return changes


@pytest.fixture
def service(served_signature, brightness_backend):
    service = Service()
    service._model = ServedModel(served_signature, brightness_backend)
    return service


def ask(service, rows, headers=()):
    context = FakeContext(headers=headers)
    bodies = service.handle(rows, context)
    assert len(bodies) == len(rows)
    assert all(context.content_types[i] == "application/json" for i in range(len(rows)))
    statuses = [context.statuses.get(i, (200, "OK"))[0] for i in range(len(rows))]
    return statuses, [json.loads(body) for body in bodies], context


PNG_HEADER = {"Content-Type": "image/png"}


class TestHandle:
    def test_a_good_batch(self, service, picture):
        statuses, bodies, _ = ask(
            service, [{"body": bytearray(picture("dark"))}, {"body": bytearray(picture("bright"))}], [PNG_HEADER] * 2
        )
        assert statuses == [200, 200]
        assert [body["label"] for body in bodies] == ["dark", "bright"]

    def test_each_request_has_its_own_status(self, service, picture):
        rows = [{"body": picture("dark")}, {"body": b"junk"}, {"body": b"{"}, {"body": picture("mid")}, {}]
        headers = [PNG_HEADER, PNG_HEADER, {"content-type": "application/json"}, PNG_HEADER, {}]
        statuses, bodies, context = ask(service, rows, headers)
        assert statuses == [200, 415, 400, 200, 400]
        assert [body.get("error", {}).get("code") for body in bodies] == [
            None,
            "unsupported_image",
            "malformed_json",
            None,
            "empty_request",
        ]
        assert context.statuses[1] == (415, "Unsupported Media Type")
        assert all(phrase.isascii() for _, phrase in context.statuses.values())

    @pytest.mark.parametrize("name", ["Content-Type", "content-type", "CONTENT-TYPE"])
    def test_the_content_type_is_read_without_case_and_parameters(self, service, name):
        body = json.dumps({"inputs": np.zeros((8, 8)).tolist()}).encode()
        statuses, _, _ = ask(service, [{"body": body}], [{name: "Application/JSON; charset=utf-8"}])
        assert statuses == [200]

    def test_an_undeclared_image_is_recognised(self, service, picture):
        statuses, _, _ = ask(service, [{"body": picture("dark")}])
        assert statuses == [200]

    def test_a_client_header_named_like_the_field_changes_nothing(self, service, picture):
        headers = {"body": "text/plain", "Content-Type": "image/png"}
        statuses, _, _ = ask(service, [{"body": picture("dark")}], [headers])
        assert statuses == [200]

    @pytest.mark.parametrize("name", ["describe", "explain", "data", "inputs"])
    def test_other_client_headers_change_nothing(self, service, picture, name):
        statuses, bodies, _ = ask(service, [{"body": picture("dark")}], [{name: "True", **PNG_HEADER}])
        assert (statuses, bodies[0]["label"]) == ([200], "dark")

    def test_query_parameters_beside_a_body_are_ignored(self, service, picture):
        row = {"verbose": "1", "body": picture("dark"), "x": b"y"}
        statuses, bodies, _ = ask(service, [row], [PNG_HEADER])
        assert (statuses, bodies[0]["label"]) == ([200], "dark")

    def test_json_that_torchserve_has_parsed(self, service):
        row = {"body": {"inputs": np.full((8, 8), 255).tolist()}}
        statuses, bodies, _ = ask(service, [row], [{"Content-Type": "application/json"}])
        assert (statuses, bodies[0]["label"]) == ([200], "bright")

    def test_text_that_torchserve_has_decoded_is_no_image(self, service):
        statuses, bodies, _ = ask(service, [{"body": "hello"}], [{"Content-Type": "text/plain"}])
        assert (statuses, bodies[0]["error"]["code"]) == ([415], "unsupported_type")

    def test_multipart_has_a_content_type_a_field(self, service, picture):
        row = {"first": picture("bright"), "second": picture("dark")}
        headers = {
            "first": {"content-type": "image/png"},
            "second": {"content-type": "image/png"},
            "content-type": "multipart/form-data; boundary=x",
        }
        statuses, bodies, _ = ask(service, [row], [headers])
        assert statuses == [200]
        assert [item["label"] for item in bodies[0]["predictions"]] == ["bright", "dark"]

    @pytest.mark.parametrize("names", [("data", "other"), ("other", "data"), ("body", "data")])
    def test_multipart_fields_may_have_any_name(self, service, picture, names):
        row = dict(zip(names, (picture("bright"), picture("dark")), strict=True))
        headers = {"Content-Type": "Multipart/Form-Data; boundary=x", **dict.fromkeys(names, PNG_HEADER)}
        _, bodies, _ = ask(service, [row], [headers])
        assert [item["label"] for item in bodies[0]["predictions"]] == ["bright", "dark"]

    def test_one_multipart_field_is_one_sample(self, service, picture):
        headers = {"picture": {"content-type": "image/png"}, "content-type": "multipart/form-data; boundary=x"}
        statuses, bodies, _ = ask(service, [{"picture": picture("mid")}], [headers])
        assert (statuses, bodies[0]["label"]) == ([200], "mid")

    def test_a_field_named_content_type_does_no_harm(self, service, picture):
        headers = {"content-type": {"content-type": "image/png"}}
        statuses, _, _ = ask(service, [{"content-type": picture("mid")}], [headers])
        assert statuses == [200]

    def test_an_empty_body_is_not_taken_for_an_absent_one(self, service):
        statuses, bodies, _ = ask(service, [{"body": b"", "data": b"x"}], [PNG_HEADER])
        assert (statuses, bodies[0]["error"]["code"]) == ([400], "empty_request")

    def test_the_log_has_no_contents(self, service, caplog):
        ask(service, [{"body": b"secret contents"}], [{"content-type": "text/secret"}])
        assert "id-0" in caplog.text
        assert "unsupported_type" in caplog.text
        assert "secret" not in caplog.text

    def test_our_own_defect_is_logged_with_its_cause(self, served_signature, fake_backend, picture, caplog):
        def fail(sample):
            raise RuntimeError("kernel broke")

        service = Service()
        service._model = ServedModel(served_signature, fake_backend(fail))
        statuses, bodies, _ = ask(service, [{"body": picture("dark")}])
        assert statuses == [500]
        assert "kernel broke" in caplog.text
        assert "kernel broke" not in json.dumps(bodies)

    def test_a_worker_that_was_not_initialised_says_so(self):
        with pytest.raises(LoadError, match="has not been initialised"):
            Service().handle([{"body": b""}], FakeContext())


class TestInitialize:
    @pytest.fixture
    def folder(self, extracted, tmp_path):
        return shutil.copytree(extracted, tmp_path / "archive")

    def redigest(self, folder):
        from handlers.digests import DIGESTS_FILE, digests_document, file_sha256

        names = [p for p in folder.rglob("*") if p.is_file() and p.name != DIGESTS_FILE]
        document = digests_document({p.relative_to(folder).as_posix(): file_sha256(p) for p in names})
        (folder / DIGESTS_FILE).write_bytes(document)

    def test_a_whole_archive_answers_with_its_name_and_version(self, extracted, picture):
        entry = Entry()
        entry.initialize(FakeContext(extracted, config={"torchport": {"threads": 1}}))
        _, bodies, _ = ask(entry, [{"body": picture("bright")}])
        assert (bodies[0]["label"], bodies[0]["model"], bodies[0]["version"]) == ("bright", "brightness", "1.0")

    def test_the_batch_size_of_torchserve_is_the_largest_batch(self, extracted):
        entry = Entry()
        entry.initialize(FakeContext(extracted, batch_size=3))
        assert entry._model._max_batch == 3

    def test_with_requests_in_flight_it_is_not_the_largest_batch(self, extracted):
        entry = Entry()
        entry.initialize(FakeContext(extracted, batch_size=256, config={"asyncCommunication": True}))
        assert entry._model._max_batch == DEFAULT_MAX_BATCH

    @pytest.fixture
    def loaded(self, monkeypatch):
        """The options that models were loaded with; they are loaded for the CPU."""
        found = []
        load = ServedModel.load

        def spy(folder, **options):
            found.append(options)
            return load(folder, **{**options, "gpu": None, "gpu_memory_bytes": None, "jpeg_on_gpu": False})

        monkeypatch.setattr("handlers.service.ServedModel", SimpleNamespace(load=spy))
        return found

    def start(self, extracted, **properties):
        context = FakeContext(extracted)
        context.system_properties.update(properties)
        Entry().initialize(context)

    @pytest.mark.parametrize(
        ("given", "gpu", "visible"),
        [
            ({}, None, None),
            ({"gpu_id": None}, None, None),
            ({"gpu_id": -1}, None, None),
            ({"gpu_id": 0}, 0, "0"),
            ({"gpu_id": 3}, 0, "3"),
        ],
    )
    def test_a_worker_sees_the_gpu_that_torchserve_gave_it(self, extracted, monkeypatch, loaded, given, gpu, visible):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")  # so that it is as it was afterwards
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        self.start(extracted, **given)
        assert [options["gpu"] for options in loaded] == [gpu]
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible

    def test_outside_of_torchserve_the_process_goes_on_seeing_all(self, extracted, monkeypatch, loaded):
        monkeypatch.setattr("handlers.service._in_worker_process", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        self.start(extracted, gpu_id=1)
        assert [options["gpu"] for options in loaded] == [1]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"

    def test_a_gpu_that_is_hidden_is_refused(self, extracted, monkeypatch, loaded):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        with pytest.raises(LoadError, match="run on GPU 2, and CUDA_VISIBLE_DEVICES shows 2, numbered from 0"):
            self.start(extracted, gpu_id=2)
        assert loaded == []

    @pytest.mark.parametrize(("setting", "size"), [("0", None), ("512", 512 << 20)])
    def test_memory_of_the_gpu_may_be_limited(self, extracted, monkeypatch, loaded, setting, size):
        monkeypatch.setenv("TORCHPORT_GPU_MEMORY_MIB", setting)
        self.start(extracted)
        assert [options["gpu_memory_bytes"] for options in loaded] == [size]

    @pytest.mark.parametrize(("setting", "wanted"), [("", True), ("1", True), ("0", False)])
    def test_there_may_be_no_cuda_graphs(self, extracted, monkeypatch, loaded, setting, wanted):
        monkeypatch.setenv("TORCHPORT_CUDA_GRAPHS", setting)
        self.start(extracted)
        assert [options["cuda_graphs"] for options in loaded] == [wanted]

    @pytest.mark.parametrize("wanted", [False, True])
    def test_jpeg_files_may_be_decoded_on_the_gpu(self, extracted, monkeypatch, loaded, wanted):
        monkeypatch.setenv("TORCHPORT_JPEG_ON_GPU", str(int(wanted)))
        self.start(extracted)
        assert [options["jpeg_on_gpu"] for options in loaded] == [wanted]

    @pytest.mark.parametrize(
        ("settings", "of_backend", "lanes"),
        [({}, 1, 1), ({}, 2, 2), ({"lanes": 1}, 2, 1), ({"lanes": 2}, 1, 1), ({"computing": 1}, 2, 1)],
    )
    def test_as_many_threads_compute_as_the_backend_has_lanes(
        self, extracted, monkeypatch, changed, settings, of_backend, lanes
    ):
        given = []
        monkeypatch.setattr("handlers.torchscript.TorchScriptBackend.lanes", of_backend)
        monkeypatch.setattr(
            "handlers.service.ContinuousWorker", lambda *arguments, **options: given.append(options["lanes"])
        )
        Entry().initialize(FakeContext(extracted, config={"torchport": settings}))
        dict(changed)["loop"](None)
        assert given == [lanes]

    @pytest.mark.parametrize("in_flight", [True, False])
    def test_a_setting_is_the_largest_batch_either_way(self, extracted, in_flight):
        entry = Entry()
        config = {"asyncCommunication": in_flight, "torchport": {"max_batch": 5}}
        entry.initialize(FakeContext(extracted, batch_size=256, config=config))
        assert entry._model._max_batch == 5

    def test_the_environment_replaces_a_setting(self, extracted, monkeypatch):
        monkeypatch.setenv("TORCHPORT_MAX_BATCH", "2")
        entry = Entry()
        entry.initialize(FakeContext(extracted, config={"torchport": {"max_batch": 5}}))
        assert entry._model._max_batch == 2

    def test_a_wrong_variable_is_refused_with_its_name(self, extracted, monkeypatch, caplog):
        monkeypatch.setenv("TORCHPORT_THREADS", "many")
        with pytest.raises(LoadError, match="TORCHPORT_THREADS must be a whole number"):
            Entry().initialize(FakeContext(extracted))
        assert "model brightness is not served: environment.TORCHPORT_THREADS" in caplog.text

    def test_a_slot_is_what_computes_where_it_is_asked_for(self, extracted, picture, monkeypatch):
        held = []
        monkeypatch.setattr("handlers.service.ComputeSlot", lambda folder, slots: held.append((folder, slots)))
        entry = Entry()
        entry.initialize(FakeContext(extracted, config={"torchport": {"computing": 2}}))
        assert held == [(extracted, 2)]

    def test_golden_answers_are_not_counted_and_requests_are(self, extracted, picture, changed):
        entry = Entry()
        entry.initialize(FakeContext(extracted))
        assert entry._model.meter.take() == {}
        ask(entry, [{"body": picture("bright")}])
        (emitter,) = [what for name, what in changed if name == "metrics"]
        lines = []
        emitter._write = lines.append
        emitter.emit()
        assert (
            "torchport_samples_total.Count:1.000000000|#ModelName:brightness,ModelVersion:1.0|#type:COUNTER" in lines[0]
        )

    def test_the_process_is_changed_only_when_the_model_is_served(self, folder, extracted, changed):
        (folder / "model.pt").write_bytes(b"x")
        with pytest.raises(DigestError):
            Entry().initialize(FakeContext(folder))
        assert changed == []
        Entry().initialize(FakeContext(extracted))
        assert [name for name, _ in changed] == ["metrics", "quieten_frontend_lines", "loop", "read_in_few_pieces"]

    def test_a_process_that_is_no_worker_is_left_alone(self, extracted, changed, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setattr("handlers.service.Service._take_over_process", lambda *arguments: pytest.fail("it was not"))
        Entry().initialize(FakeContext(extracted))

    def test_the_continuous_worker_answers_what_a_batch_does(self, extracted, picture, changed):
        """The same requests both ways: the same bodies and statuses."""
        entry = Entry()
        entry.initialize(FakeContext(extracted, config={"asyncCommunication": True, "responseTimeout": 7}))
        bodies = [(picture("bright"), "image/png"), (b"junk", "image/png"), (b"{", "application/json"), (b"", "")]
        statuses, expected, _ = ask(
            entry, [{"body": body} for body, _ in bodies], [{"content-type": kind} for _, kind in bodies]
        )
        ours, theirs = socket.socketpair()
        with ours, theirs, ours.makefile("rb") as stream:
            ours.settimeout(DEADLINE_S)
            requests = [
                inference_request(str(i), [("body", kind, body)], [("content-type", kind)])
                for i, (body, kind) in enumerate(bodies)
            ]
            ours.sendall(message(*requests))
            worker = dict(changed)["loop"](theirs)
            assert worker._response_timeout_s == 7
            interval = sys.getswitchinterval()
            thread = threading.Thread(target=worker.run, daemon=True)
            thread.start()
            found = {}
            for answers in Replies(stream):
                found.update({id: (status, json.loads(body)) for id, status, _, _, body in answers})
                if len(found) == len(bodies):
                    break
            ours.shutdown(socket.SHUT_WR)
            thread.join(DEADLINE_S)
            sys.setswitchinterval(interval)
        assert found == {str(i): answer for i, answer in enumerate(zip(statuses, expected, strict=True))}
        assert statuses == [200, 415, 400, 400]

    def test_a_changed_file_is_refused_and_the_reason_logged(self, folder, caplog):
        (folder / "model.pt").write_bytes(b"x")
        with pytest.raises(DigestError, match=r"model\.pt has changed"):
            Entry().initialize(FakeContext(folder))
        assert "model brightness is not served: the archive differs" in caplog.text

    def test_a_corrupt_artifact_is_refused(self, folder):
        (folder / "model.pt").write_bytes(b"x")
        self.redigest(folder)
        with pytest.raises(BackendError, match=r"model\.pt"):
            Entry().initialize(FakeContext(folder))

    def test_a_golden_mismatch_is_refused(self, folder):
        path = folder / "golden/expected.json"
        document = json.loads(path.read_text())
        document["samples"][0]["label"] = "wrong"
        path.write_text(json.dumps(document))
        self.redigest(folder)
        entry = Entry()
        with pytest.raises(GoldenError):
            entry.initialize(FakeContext(folder))
        assert entry._model is None

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"torchport": {"threads": 0}}, "threads must be a whole number"),
            ({"torchport": {"threads": 1, "treads": 2}}, "did you mean 'threads'"),
            ({"torchport": 1}, "must be a mapping"),
        ],
    )
    def test_a_wrong_configuration_is_refused(self, extracted, config, message):
        with pytest.raises(LoadError, match=message):
            Entry().initialize(FakeContext(extracted, config=config))

    @pytest.mark.parametrize(("config", "threads"), [(None, 1), ({}, 1), ({"torchport": {"threads": 2}}, 2)])
    def test_threads_come_from_the_configuration(self, extracted, monkeypatch, config, threads):
        given = []
        load = ServedModel.load

        def spy(folder, **options):
            given.append(options["threads"])
            return load(folder, **{**options, "threads": 1})

        monkeypatch.setattr("handlers.service.ServedModel", SimpleNamespace(load=spy))
        Entry().initialize(FakeContext(extracted, config=config))
        assert given == [threads]


def test_every_load_error_is_a_runtime_error():
    # TorchServe's loader reports these, and hides all others.
    assert issubclass(LoadError, RuntimeError)


def test_warnings_go_to_stderr_where_torchserve_keeps_them(extracted, capsys):
    logger.handlers.clear()
    Entry().initialize(FakeContext(extracted))
    assert [type(handler) for handler in logger.handlers] == [logging.StreamHandler]
    logger.warning("hello")
    assert "torchport WARNING hello" in capsys.readouterr().err
