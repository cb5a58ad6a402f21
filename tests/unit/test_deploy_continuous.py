"""Continuous serving's preparations: the copy of an archive, and the class of the frontend."""

from __future__ import annotations

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
from deploy.continuous import IN_FLIGHT, install, is_possible, make_continuous
from deploy.errors import StartError
from export.archive import CONFIG_FILE, Archive, ArchiveFiles, open_archive, write_archive
from export.staging import PACK_FILE, write_staging
from handlers.digests import DIGESTS_FILE, verify_folder
from handlers.errors import DigestError
from handlers.settings import WorkerSettings

CLASS = "org/pytorch/serve/wlm/AsyncBatchAggregator.class"
SOURCES = Path(deploy.__file__).parent / "aggregator"
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
        assert sorted(name.name for name in tmp_path.glob("*.continuous")) == []

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


class TestIsPossible:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A TorchServe of which there is nothing yet: the folder of its jar."""
        places = [str(tmp_path / "ts")]
        monkeypatch.setattr(
            "deploy.continuous.importlib.util.find_spec",
            lambda name: SimpleNamespace(submodule_search_locations=places),
        )
        (tmp_path / "ts" / "frontend").mkdir(parents=True)
        return tmp_path / "ts" / "frontend"

    @pytest.fixture
    def digits(self, files: ArchiveFiles, tmp_path: Path) -> Archive:
        return open_archive(canonical(files, tmp_path))

    def test_with_the_installed_torchserve_and_an_archive_of_today(self, digits: Archive, archive: Path) -> None:
        assert is_possible(digits)
        assert is_possible(open_archive(archive))

    def test_not_with_an_archive_without_the_workers_loop(self, digits: Archive) -> None:
        older = {name: digest for name, digest in digits.digests.items() if name != "handlers/continuous.py"}
        assert not is_possible(replace(digits, digests=older))

    def test_with_the_stock_class_alone(self, digits: Archive, package: Path) -> None:
        with zipfile.ZipFile(JAR) as source:
            stock = source.read(CLASS)
        with zipfile.ZipFile(package / "model-server.jar", "w") as jar:
            jar.writestr(CLASS, stock)
        assert is_possible(digits)

    @pytest.mark.parametrize("content", [None, {}, {CLASS: b"another release's"}, b"no zip", {CLASS: b""}])
    def test_not_with_another_class(self, digits: Archive, package: Path, content: Any) -> None:
        path = package / "model-server.jar"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            with zipfile.ZipFile(path, "w") as jar:
                for name, data in content.items():
                    jar.writestr(name, data)
        assert not is_possible(digits)

    @pytest.mark.parametrize("package", [None, SimpleNamespace(submodule_search_locations=None)])
    def test_not_without_torchserve(self, digits: Archive, monkeypatch: pytest.MonkeyPatch, package: Any) -> None:
        monkeypatch.setattr("deploy.continuous.importlib.util.find_spec", lambda name: package)
        assert not is_possible(digits)


class TestInstall:
    def test_the_class_lies_where_java_looks_first(self, tmp_path: Path) -> None:
        install(tmp_path, wanted=True)
        assert (tmp_path / CLASS).read_bytes() == (SOURCES / "AsyncBatchAggregator.class").read_bytes()
        install(tmp_path, wanted=True)
        assert (tmp_path / CLASS).is_file()

    def test_it_is_taken_away_where_nobody_wants_it(self, tmp_path: Path) -> None:
        (tmp_path / "torchserve.log").write_text("kept")
        install(tmp_path, wanted=False)
        install(tmp_path, wanted=True)
        install(tmp_path, wanted=False)
        assert [path.name for path in tmp_path.iterdir()] == ["torchserve.log"]

    def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(self, tmp_path: Path) -> None:
        (tmp_path / "org").write_text("in the way")
        with pytest.raises(StartError, match=r"AsyncBatchAggregator\.class cannot be written .*--scheduling batches"):
            install(tmp_path, wanted=True)


def javac() -> str | None:
    return shutil.which("javac")


@pytest.mark.skipif(javac() is None, reason="javac, which makes the class of its source, is not installed")
def test_the_committed_class_is_what_its_source_gives(tmp_path: Path) -> None:
    """By a compiler of Java 17; another one may number constants otherwise."""
    version = subprocess.run([str(javac()), "-version"], capture_output=True, text=True, check=True).stdout.split()[1]
    if version.partition(".")[0] != "17":
        pytest.skip(f"the class was made by javac 17, and this is {version}")
    source = SOURCES / "AsyncBatchAggregator.java"
    options = ["--release", "17", "-g:none", "-cp", str(JAR), "-d", str(tmp_path)]
    subprocess.run([str(javac()), *options, str(source)], check=True)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.relative_to(tmp_path).as_posix() for path in made] == [CLASS]
    assert made[0].read_bytes() == (SOURCES / "AsyncBatchAggregator.class").read_bytes()


def test_the_class_is_of_a_java_that_serving_allows() -> None:
    content = (SOURCES / "AsyncBatchAggregator.class").read_bytes()
    assert int.from_bytes(content[6:8], "big") == 61  # Java 17's
