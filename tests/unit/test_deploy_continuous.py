"""Continuous serving's preparations: the copy of an archive, and the class of the frontend."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import deploy
from deploy.archive_copy import change_settings
from deploy.continuous import IN_FLIGHT, obstacle, settings
from deploy.errors import StartError
from deploy.frontend_classes import CLASSES, install, is_known_release, remove
from export.archive import CONFIG_FILE, Archive, ArchiveFiles, open_archive, write_archive
from export.staging import PACK_FILE, write_staging
from handlers.digests import DIGESTS_FILE, sha256, verify_folder
from handlers.errors import DigestError
from handlers.settings import WorkerSettings

# Classes that TorchServe has none of.
NOBODYS = {
    f"org/pytorch/serve/{name}.class"
    for name in ("wlm/Arrivals", "wlm/ModelQueues", "Uploads", "InOrder", "ClientErrors", "Exchanges")
}
BY_SCHEDULING = {f"org/pytorch/serve/wlm/{name}.class" for name in ("Arrivals", "AsyncBatchAggregator")}
SOURCES = Path(deploy.__file__).parent / "frontend"
JAR = Path(str(find_spec("ts").submodule_search_locations[0])) / "frontend" / "model-server.jar"  # type: ignore[union-attr, index]
CONFIG = b"minWorkers: 2\nmaxWorkers: 2\nbatchSize: 16\nmaxBatchDelay: 5\ntorchport:\n  threads: 3\n"


@pytest.fixture
def files(tmp_path: Path) -> ArchiveFiles:
    artifact = tmp_path / "model.pt"
    artifact.write_bytes(bytes(range(256)) * 9000)
    return ArchiveFiles(artifact=artifact, documents={"signature.json": b"{}\n"}, config=CONFIG)


def canonical(files: ArchiveFiles, folder: Path) -> Path:
    return write_archive(files, name="digits", version="1.0", out=folder)


def by_hand(files: ArchiveFiles, folder: Path) -> Path:
    staged = write_staging(files, name="digits", version="1.0", out=folder / "staged")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["sh", str(staged.path / PACK_FILE), str(folder)], check=True, env=environment, cwd=folder)
    return folder / "digits.mar"


def make_continuous(path: Path, **options: int) -> None:
    change_settings(path, [functools.partial(settings, **options)])


FORMS = pytest.mark.parametrize("write", [canonical, by_hand])


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as source:
        return {name: source.read(name) for name in source.namelist()}


class TestMakeContinuous:
    @FORMS
    def test_only_the_settings_and_their_digest_change(
        self, files: ArchiveFiles, tmp_path: Path, write: Callable[..., Path]
    ) -> None:
        path = write(files, tmp_path)
        before = contents(path)
        make_continuous(path)
        after = contents(path)
        assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {
            CONFIG_FILE,
            DIGESTS_FILE,
        }
        assert sorted(name.name for name in tmp_path.glob("*.changed")) == []

    @FORMS
    def test_a_worker_accepts_the_copy_and_still_notices_changes(
        self, files: ArchiveFiles, tmp_path: Path, write: Callable[..., Path]
    ) -> None:
        path = write(files, tmp_path)
        make_continuous(path)
        folder = tmp_path / "extracted"
        with zipfile.ZipFile(path) as source:
            source.extractall(folder)
        verify_folder(folder)
        (folder / CONFIG_FILE).write_bytes(CONFIG)
        with pytest.raises(DigestError, match=CONFIG_FILE.replace(".", r"\.")):
            verify_folder(folder)

    def test_a_canonical_archive_stays_one(self, files: ArchiveFiles, tmp_path: Path) -> None:
        path = canonical(files, tmp_path)
        make_continuous(path)
        archive = open_archive(path)
        assert (archive.name, archive.version, archive.packed_by_hand) == ("digits", "1.0", False)

    def test_the_settings_say_what_is_in_flight_and_what_is_computed_at_once(
        self, files: ArchiveFiles, tmp_path: Path
    ) -> None:
        path = canonical(files, tmp_path)
        make_continuous(path)
        config = yaml.safe_load(contents(path)[CONFIG_FILE])
        assert config == {
            **yaml.safe_load(CONFIG),
            "asyncCommunication": True,
            "batchSize": IN_FLIGHT,
            "torchport": {"threads": 3, "max_batch": 16},
        }
        assert WorkerSettings.read(config, {}).max_batch == 16

    @pytest.mark.parametrize(
        ("config", "max_batch"),
        [(b"batchSize: 16\ntorchport:\n  max_batch: 7\n", 7), (b"minWorkers: 1\n", 0), (b"torchport:\n", 0)],
    )
    def test_a_setting_of_the_archive_is_kept(
        self, files: ArchiveFiles, tmp_path: Path, config: bytes, max_batch: int
    ) -> None:
        path = canonical(replace(files, config=config), tmp_path)
        make_continuous(path, in_flight=3)
        changed = yaml.safe_load(contents(path)[CONFIG_FILE])
        assert (changed["batchSize"], changed["torchport"]["max_batch"]) == (3, max_batch)
        assert WorkerSettings.read(changed, {}).max_batch == max_batch

    def test_a_real_archive_is_still_verified(self, archive: Path, tmp_path: Path) -> None:
        path = Path(shutil.copy(archive, tmp_path / "brightness.mar"))
        make_continuous(path)
        open_archive(path).extract(tmp_path / "extracted")
        verify_folder(tmp_path / "extracted")


class TestObstacle:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A TorchServe of which there is nothing yet: the folder of its jar."""
        places = [str(tmp_path / "ts")]
        monkeypatch.setattr(
            "deploy.frontend_classes.importlib.util.find_spec",
            lambda name: SimpleNamespace(submodule_search_locations=places),
        )
        (tmp_path / "ts" / "frontend").mkdir(parents=True)
        return tmp_path / "ts" / "frontend"

    @pytest.fixture
    def digits(self, files: ArchiveFiles, tmp_path: Path) -> Archive:
        return open_archive(canonical(files, tmp_path))

    def test_with_the_installed_torchserve_and_an_archive_of_today(self, digits: Archive, archive: Path) -> None:
        assert obstacle(digits) is None
        assert obstacle(open_archive(archive)) is None

    def test_not_with_an_archive_without_the_workers_loop(self, digits: Archive) -> None:
        older = {name: digest for name, digest in digits.digests.items() if name != "handlers/continuous.py"}
        assert obstacle(replace(digits, digests=older)) is not None

    @pytest.fixture
    def stock(self) -> dict[str, bytes]:
        """The classes that ours take the place of."""
        with zipfile.ZipFile(JAR) as source:
            return {name: source.read(name) for name in CLASSES if name in source.namelist()}

    def test_ours_take_the_place_of_three(self, stock: dict[str, bytes]) -> None:
        assert set(CLASSES) - set(stock) == NOBODYS

    def test_with_the_stock_classes_alone(self, package: Path, stock: dict[str, bytes]) -> None:
        with zipfile.ZipFile(package / "model-server.jar", "w") as jar:
            for name, content in stock.items():
                jar.writestr(name, content)
        assert is_known_release()

    @pytest.mark.parametrize("other", [name for name in CLASSES if name not in NOBODYS])
    @pytest.mark.parametrize("content", [None, b"another release's", b""])
    def test_not_where_one_class_is_another(
        self, package: Path, stock: dict[str, bytes], other: str, content: bytes | None
    ) -> None:
        with zipfile.ZipFile(package / "model-server.jar", "w") as jar:
            for name, own in stock.items():
                if name != other:
                    jar.writestr(name, own)
                elif content is not None:
                    jar.writestr(name, content)
        assert not is_known_release()

    @pytest.mark.parametrize("content", [None, b"no zip"])
    def test_not_without_a_frontend(self, digits: Archive, package: Path, content: bytes | None) -> None:
        if content is not None:
            (package / "model-server.jar").write_bytes(content)
        assert "0.12.0" in str(obstacle(digits))

    @pytest.mark.parametrize("way", ["useJobTicket", "continuousBatching", "sequenceBatching"])
    def test_not_with_another_way_to_hand_out_requests(self, tmp_path: Path, way: str) -> None:
        for value, possible in ((b"true", False), (b"false", True)):
            config = CONFIG + way.encode() + b": " + value
            path = tmp_path / "digits.mar"
            with zipfile.ZipFile(path, "w") as target:
                target.writestr(CONFIG_FILE, config)
            digests = {CONFIG_FILE: sha256([config]), "handlers/continuous.py": sha256([b""])}
            archive = Archive(path=path, name="digits", version="1.0", sha256="", digests=digests)
            assert obstacle(archive) == (None if possible else f"its model-config.yaml sets {way}")

    @pytest.mark.parametrize("package", [None, SimpleNamespace(submodule_search_locations=None)])
    def test_not_without_torchserve(self, digits: Archive, monkeypatch: pytest.MonkeyPatch, package: Any) -> None:
        monkeypatch.setattr("deploy.frontend_classes.importlib.util.find_spec", lambda name: package)
        assert obstacle(digits) is not None


class TestInstall:
    def test_the_classes_lie_where_java_looks_first(self, tmp_path: Path) -> None:
        for _ in range(2):
            assert install(tmp_path, continuous=True)
            for name in CLASSES:
                assert (tmp_path / name).read_bytes() == (SOURCES / Path(name).name).read_bytes()

    def test_batches_get_those_for_the_stop(self, tmp_path: Path) -> None:
        install(tmp_path, continuous=True)
        assert install(tmp_path, continuous=False)
        assert [(tmp_path / name).exists() for name in CLASSES] == [name not in BY_SCHEDULING for name in CLASSES]

    def test_they_are_taken_away(self, tmp_path: Path) -> None:
        (tmp_path / "torchserve.log").write_text("kept")
        remove(tmp_path)
        install(tmp_path, continuous=True)
        remove(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["torchserve.log"]

    def test_another_release_gets_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path, continuous=True)
        monkeypatch.setattr("deploy.frontend_classes.is_known_release", lambda: False)
        assert not install(tmp_path, continuous=False)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(self, tmp_path: Path) -> None:
        (tmp_path / "org").write_text("in the way")
        with pytest.raises(StartError, match=r"\.class cannot be written .*remove what is in the way"):
            install(tmp_path, continuous=True)


def javac() -> str | None:
    return shutil.which("javac")


@pytest.mark.skipif(javac() is None, reason="javac, which makes the class of its source, is not installed")
def test_the_committed_classes_are_what_their_sources_give(tmp_path: Path) -> None:
    """By a compiler of Java 17; another one may number constants otherwise."""
    version = subprocess.run([str(javac()), "-version"], capture_output=True, text=True, check=True).stdout.split()[1]
    if version.partition(".")[0] != "17":
        pytest.skip(f"the classes were made by javac 17, and this is {version}")
    options = ["--release", "17", "-g:none", "-cp", str(JAR), "-d", str(tmp_path)]
    subprocess.run([str(javac()), *options, *map(str, SOURCES.glob("*.java"))], check=True)
    made = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.class")}
    assert made == {name: (SOURCES / Path(name).name).read_bytes() for name in CLASSES}


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_are_of_a_java_that_serving_allows(name: str) -> None:
    content = (SOURCES / Path(name).name).read_bytes()
    assert int.from_bytes(content[6:8], "big") == 61  # Java 17's
