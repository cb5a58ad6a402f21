import functools
import hashlib
import json
import shlex
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import yaml

from deploy import container
from deploy.archive_copy import change_settings
from deploy.container import ArchiveFaultError, NotReadyError, check_archives, check_ready, main
from deploy.continuous import in_flight, settings
from deploy.frontend_classes import CLASSES

ROOT = Path(__file__).resolve().parents[2]
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
        ([version("READY", "UNLOADING"), version("READY", name="other")], "digits 1.0: worker 9001 is still loading"),
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


def write_archive(path, *, name="digits", digests=True, method=zipfile.ZIP_STORED, **files):
    manifest = json.dumps({"model": {"modelName": name, "modelVersion": "1.0"}}).encode()
    content = {"MAR-INF/MANIFEST.json": manifest, "model.pt": bytes(range(256)), **files}
    if digests:
        table = {file: hashlib.sha256(data).hexdigest() for file, data in content.items()}
        content["digests.json"] = json.dumps({"sha256": table}).encode()
    with zipfile.ZipFile(path, "w", method) as archive:
        for file, data in content.items():
            archive.writestr(file, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("digests", [True, False])
def test_whole_archives_pass(tmp_path, digests, method):
    paths = [write_archive(tmp_path / f"{n}.mar", name=n, digests=digests, method=method) for n in ("one", "two")]
    assert main(["check", *map(str, paths)]) == 0


def test_an_archive_that_was_written_to_a_pipe_passes(tmp_path):
    path = tmp_path / "digits.mar"
    with path.open("wb") as file:
        pipe = SimpleNamespace(write=file.write, flush=file.flush)
        with zipfile.ZipFile(pipe, "w") as archive:
            archive.writestr("MAR-INF/MANIFEST.json", '{"model": {"modelName": "digits", "modelVersion": "1.0"}}')
    with zipfile.ZipFile(path) as archive:
        assert archive.infolist()[0].flag_bits & 0x08  # checksum and sizes come after the data
    check_archives([path])


def test_a_flipped_byte_is_refused_in_one_line(tmp_path, capsys):
    whole = write_archive(tmp_path / "digits.mar").read_bytes()
    with zipfile.ZipFile(tmp_path / "digits.mar") as archive:
        entries, directory = archive.infolist(), archive.start_dir
    # What no reader takes from an entry's own header, so that a change does nothing: needed version, time and date.
    idle = {entry.header_offset + i for entry in entries for i in (4, 5, 10, 11, 12, 13)}
    for position in set(range(directory)) - idle:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (tmp_path / "damaged.mar").write_bytes(damaged)
        assert main(["check", str(tmp_path / "damaged.mar")]) == 2, position
        message = capsys.readouterr().err
        assert message.startswith("torchport: ")
        assert "damaged.mar is damaged" in message
        assert message.count("\n") == 1


def test_a_file_that_differs_from_its_digest_is_refused(tmp_path):
    path = write_archive(tmp_path / "digits.mar")
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**content, "model.pt": b"other weights"}.items():
            archive.writestr(name, data)
    with pytest.raises(ArchiveFaultError, match=r"model\.pt differs from its digest"):
        check_archives([path])


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "digits.mar"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.pt", b"")
    else:
        path.write_bytes(content)
    with pytest.raises(ArchiveFaultError, match="damaged or no archive"):
        check_archives([path])


def test_two_archives_of_one_model_are_refused(tmp_path):
    paths = [write_archive(tmp_path / name) for name in ("a.mar", "b.mar")]
    with pytest.raises(ArchiveFaultError, match=r"a\.mar and b\.mar both hold digits 1\.0"):
        check_archives(paths)


def by_hand(path, **manifest):
    """An archive whose digests describe the manifest, which came after them."""
    model = {"modelName": "digits", "modelVersion": "1.0", "handler": "entry.py", **manifest}
    content = {"entry.py": b"class Entry: ...", "model.pt": b"weights"}
    table = {file: hashlib.sha256(data).hexdigest() for file, data in content.items()}
    content["digests.json"] = json.dumps({"manifest": {"handler": "entry.py"}, "sha256": table}).encode()
    content["MAR-INF/MANIFEST.json"] = json.dumps({"model": model}).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in content.items():
            archive.writestr(file, data)
    return path


def test_an_archive_that_was_packed_by_hand_passes(tmp_path):
    check_archives([by_hand(tmp_path / "digits.mar")])


def test_an_archive_that_was_packed_by_hand_names_the_files_that_it_should(tmp_path):
    path = by_hand(tmp_path / "digits.mar", handler="other.py")
    with pytest.raises(ArchiveFaultError, match=r"MANIFEST\.json names other files than digests\.json"):
        check_archives([path])


def test_only_the_manifest_of_an_archive_that_was_packed_by_hand_has_no_digest(tmp_path):
    path = by_hand(tmp_path / "digits.mar")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("sitecustomize.py", "")
    with pytest.raises(ArchiveFaultError, match=r"sitecustomize\.py differs from its digest"):
        check_archives([path])


CONFIG = "minWorkers: 1\nmaxWorkers: {workers}\nbatchSize: 32\ntorchport:\n  threads: 2\n"


def served(path, *, workers=1, config=CONFIG, **files):
    own = {"handlers/continuous.py": b"", "model-config.yaml": config.format(workers=workers).encode(), **files}
    return write_archive(path, **own)


def contents(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_the_copy_is_the_one_that_torchport_serve_makes(tmp_path, capsys, workers):
    path = served(tmp_path / "digits.mar", workers=workers)
    before = path.read_bytes()
    (tmp_path / "store").mkdir()
    assert main(["continuous", str(tmp_path / "store"), str(path)]) == 0
    copy = tmp_path / "store" / "digits.mar"
    check_archives([copy])
    assert path.read_bytes() == before
    change_settings(path, [functools.partial(settings, in_flight=in_flight(workers))])
    ours, torchports = contents(copy), contents(path)
    assert yaml.safe_load(ours["model-config.yaml"])["asyncCommunication"] is True
    assert json.loads(ours.pop("digests.json")) == json.loads(torchports.pop("digests.json"))
    assert ours == torchports
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("path_and_files", "reason"),
    [
        (write_archive, "no continuous worker"),
        (lambda path: served(path, config=CONFIG + "useJobTicket: true\n"), "sets useJobTicket"),
    ],
)
def test_what_cannot_be_served_continuously_is_copied_as_it_is(tmp_path, capsys, path_and_files, reason):
    path = path_and_files(tmp_path / "digits.mar")
    (tmp_path / "store").mkdir()
    assert main(["continuous", str(tmp_path / "store"), str(path)]) == 0
    assert (tmp_path / "store" / "digits.mar").read_bytes() == path.read_bytes()
    message = capsys.readouterr().err
    assert "digits.mar is served in batches" in message
    assert reason in message


def test_a_folder_that_is_full_or_missing_is_one_line(tmp_path, capsys):
    path = served(tmp_path / "digits.mar")
    assert main(["continuous", str(tmp_path / "missing"), str(path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("torchport: ")
    assert message.count("\n") == 1


def test_the_classes_replace_what_an_earlier_start_left(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "_CLASSES", tmp_path / "classes")
    (tmp_path / "classes/org/serve").mkdir(parents=True)
    (tmp_path / "classes/org/serve/New.class").write_bytes(b"new")
    folder = tmp_path / "working"
    (folder / "org/serve").mkdir(parents=True)
    (folder / "org/serve/Old.class").write_bytes(b"old")
    monkeypatch.chdir(folder)
    assert main(["install"]) == 0
    assert [path.name for path in folder.rglob("*.class")] == ["New.class"]


def test_the_image_has_each_class_where_java_looks_for_it():
    words = shlex.split((ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " "), comments=True)
    places: dict[str, str] = {}
    sources: list[str] = []
    for word in words:
        if word.startswith("deploy/frontend/"):
            sources.append(word)
        elif sources:
            places |= {f"{word}{PurePosixPath(source).name}": source for source in sources}
            sources = []
    assert sorted(places) == sorted(f"/opt/torchport/classes/{name}" for name in CLASSES)


def test_the_image_has_the_release_that_the_classes_are_made_for():
    assert "torchserve==0.12.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
