"""Archives: the same bytes for the same files, whole or absent, and every change noticed."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.archive import (
    CONFIG_FILE,
    MANIFEST_FILE,
    ArchiveFiles,
    check_name,
    created_on,
    open_archive,
    write_archive,
    write_canonical,
)
from export.errors import ArchiveError
from handlers.digests import DIGESTS_FILE, digests_document, sha256

MANIFEST = {"createdOn": "now", "model": {"modelName": "small", "modelVersion": "1.0"}}


def make_files(folder: Path, seed: int = 0, size_bytes: int = 50_000) -> ArchiveFiles:
    folder.mkdir(parents=True, exist_ok=True)
    artifact = folder / "model.pt"
    artifact.write_bytes(random.Random(seed).randbytes(size_bytes))
    return ArchiveFiles(
        artifact=artifact,
        documents={"signature.json": b"{}\n", "golden/000.png": b"png", "golden/expected.json": b"[]\n"},
        config=b"minWorkers: 1\n",
    )


@pytest.fixture
def files(tmp_path: Path) -> ArchiveFiles:
    return make_files(tmp_path / "files")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def write(files: ArchiveFiles, store: Path) -> Path:
    return write_archive(files, name="digits", version="2.1", out=store)


def small_archive_bytes() -> bytes:
    """The canonical form of a zip that another program made."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("b.txt", "second")
        target.writestr(MANIFEST_FILE, json.dumps(MANIFEST))
        target.writestr("a/a.txt", "first")
    out = io.BytesIO()
    write_canonical(packed, out)  # type: ignore[arg-type]  # a zip file is a path or an open file
    return out.getvalue()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.mar"
    path.write_bytes(small_archive_bytes())
    return path


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Let every longer write of this process and its children fail, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestForm:
    def test_an_archive_opens_and_says_what_it_is(self, files: ArchiveFiles, store: Path) -> None:
        archive = open_archive(write(files, store))
        assert (archive.path, archive.name, archive.version) == (store / "digits.mar", "digits", "2.1")
        assert archive.read("model.pt") == files.artifact.read_bytes()
        assert archive.read_json("golden/expected.json") == []
        assert archive.read(CONFIG_FILE) == b"minWorkers: 1\n"
        assert set(archive.digests) >= {MANIFEST_FILE, "entry.py", "handlers/service.py", "model.pt"}

    def test_the_zip_is_canonical(self, files: ArchiveFiles, store: Path) -> None:
        with zipfile.ZipFile(write(files, store)) as source:
            entries = source.infolist()
            names = [entry.filename for entry in entries]
            assert names == sorted(names)
            assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
            assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
            assert {(entry.external_attr >> 16, entry.create_system) for entry in entries} == {(0o100644, 3)}
            manifest = json.loads(source.read(MANIFEST_FILE))
        assert manifest["createdOn"] == "01/01/1980 00:00:00"
        assert manifest["model"]["handler"] == "entry.py"
        assert not [name for name in names if name.startswith("handlers/entry") or "__pycache__" in name]

    def test_it_extracts_whole(self, files: ArchiveFiles, store: Path, tmp_path: Path) -> None:
        open_archive(write(files, store)).extract(tmp_path / "out")
        assert (tmp_path / "out/golden/000.png").read_bytes() == b"png"

    def test_the_same_files_give_the_same_bytes_whatever_the_surroundings(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = write(make_files(tmp_path / "one"), tmp_path / "store-one")
        files = make_files(tmp_path / "another place")
        os.utime(files.artifact, (1e9, 1e9))
        files.artifact.chmod(0o700)
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        for variable, value in (("TZ", "Pacific/Auckland"), ("LC_ALL", "tr_TR.UTF-8"), ("LANG", "tr_TR.UTF-8")):
            monkeypatch.setenv(variable, value)
        time.tzset()
        before = os.umask(0o077)
        try:
            second = write(files, tmp_path / "store-two")
        finally:
            os.umask(before)
            monkeypatch.undo()
            time.tzset()
        assert first.read_bytes() == second.read_bytes()

    def test_another_file_gives_other_bytes(self, tmp_path: Path) -> None:
        written = [write(make_files(tmp_path / "f", seed=seed), tmp_path / "store").read_bytes() for seed in (0, 1)]
        assert written[0] != written[1]

    def test_nothing_is_left_beside_it(self, files: ArchiveFiles, store: Path) -> None:
        write(files, store)
        assert [path.name for path in store.iterdir()] == ["digits.mar"]


class TestDate:
    def test_source_date_epoch_dates_the_manifest_in_utc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TZ", "Pacific/Auckland")
        time.tzset()
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        try:
            assert created_on() == "14/11/2023 22:13:20"
        finally:
            monkeypatch.undo()
            time.tzset()

    @pytest.mark.parametrize("text", [None, ""])
    def test_without_it_the_date_is_the_first_that_a_zip_can_hold(
        self, monkeypatch: pytest.MonkeyPatch, text: str | None
    ) -> None:
        monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
        if text is not None:
            monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
        assert created_on() == "01/01/1980 00:00:00"

    @pytest.mark.parametrize("text", ["yesterday", "1.5", "1e9", "9" * 20, "9" * 5000, "0x10", "2026-01-01"])
    def test_a_bad_one_is_refused_in_one_sentence(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
        with pytest.raises(ArchiveError, match=r"^SOURCE_DATE_EPOCH is .* seconds since 1970$") as caught:
            created_on()
        assert len(str(caught.value)) < 200

    def test_the_archive_carries_it(self, files: ArchiveFiles, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
        archive = open_archive(write(files, store))
        assert archive.read_json(MANIFEST_FILE)["createdOn"] == "02/01/1970 00:00:00"


class TestNames:
    @pytest.mark.parametrize("name", ["a", "Digits-1.2_x", "0", "a" * 128])
    def test_usable_names_are_taken(self, name: str) -> None:
        assert check_name(name, "model name") == name

    @pytest.mark.parametrize(
        "name", ["", ".", "..", ".hidden", "-x", "a/b", "../a", "a b", "a\n", "a\0", "é", "a" * 129, "a;b", "a%2f"]
    )
    def test_others_are_refused_before_anything_is_written(self, files: ArchiveFiles, store: Path, name: str) -> None:
        with pytest.raises(ArchiveError, match=r"the model name .* is not usable: write letters, digits"):
            write_archive(files, name=name, version="1", out=store)
        with pytest.raises(ArchiveError, match=r"the model version .* is not usable"):
            write_archive(files, name="a", version=name, out=store)
        assert not store.exists()

    @given(st.text(max_size=8))
    def test_what_is_taken_stays_one_word_in_a_path_and_a_url(self, name: str) -> None:
        try:
            check_name(name, "model name")
        except ArchiveError:
            return
        assert name.isascii()
        assert not set(name) & set("/\\ %?#&;:'\"\n\r\t\0")
        assert not name.startswith((".", "-"))


class TestDamage:
    def test_every_flipped_byte_of_a_small_archive_is_refused(self, small: Path) -> None:
        content = small.read_bytes()
        assert open_archive(small).name == "small"
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            small.write_bytes(damaged)
            with pytest.raises(ArchiveError, match=r"small\.mar"):
                open_archive(small)
        small.write_bytes(content)
        open_archive(small)

    def test_flipped_bytes_of_a_real_archive_are_refused(self, archive: Path, tmp_path: Path) -> None:
        content = archive.read_bytes()
        copy = tmp_path / "copy.mar"
        generator = random.Random(0)
        # Everywhere in the file, and thickly in the zip's own directory at its end.
        positions = generator.sample(range(len(content)), 150) + generator.sample(
            range(len(content) - 4000, len(content)), 50
        )
        for position in positions:
            damaged = bytearray(content)
            damaged[position] ^= generator.randrange(1, 256)
            copy.write_bytes(damaged)
            with pytest.raises(ArchiveError):
                open_archive(copy)

    def test_truncation_at_any_length_is_refused(self, small: Path) -> None:
        content = small.read_bytes()
        for length in range(len(content)):
            small.write_bytes(content[:length])
            with pytest.raises(ArchiveError, match=r"small\.mar"):
                open_archive(small)

    @pytest.mark.parametrize("extra", [b"\0", b"x" * 100, b"PK\5\6" + b"\0" * 18])
    def test_appended_and_prepended_bytes_are_refused(self, small: Path, extra: bytes) -> None:
        content = small.read_bytes()
        for damaged in (content + extra, extra + content):
            small.write_bytes(damaged)
            with pytest.raises(ArchiveError):
                open_archive(small)

    def test_an_added_entry_is_refused_and_named(self, small: Path) -> None:
        with zipfile.ZipFile(small, "a") as target:
            target.writestr("sitecustomize.py", "")
        with pytest.raises(ArchiveError, match=r"sitecustomize\.py is not recorded"):
            open_archive(small)

    def test_a_zip_comment_is_refused(self, small: Path) -> None:
        with zipfile.ZipFile(small, "a") as target:
            target.comment = b"hello"
        with pytest.raises(ArchiveError, match="changed after its export"):
            open_archive(small)

    def rewrite(self, path: Path, *entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
        """An archive with right digests by somebody who knows how they are made."""
        content = [(MANIFEST_FILE, json.dumps(MANIFEST).encode()), *entries]
        content.append((DIGESTS_FILE, digests_document({name: sha256([data]) for name, data in content})))
        with zipfile.ZipFile(path, "w", compression) as target:
            for name, data in content:
                target.writestr(zipfile.ZipInfo(name), data, compress_type=compression)

    @pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "a//b", "./a", "a/", "a/./b"])
    def test_a_path_out_of_the_folder_is_refused(self, small: Path, name: str) -> None:
        self.rewrite(small, (name, b"evil"))
        with pytest.raises(ArchiveError, match=r"small\.mar holds the path .* do not use it"):
            open_archive(small)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_the_same_path_twice_is_refused(self, small: Path) -> None:
        self.rewrite(small, ("a.txt", b"good"), ("a.txt", b"evil"))
        with pytest.raises(ArchiveError, match=r"small\.mar holds the same path twice"):
            open_archive(small)

    def test_what_unpacks_to_more_than_it_is_is_never_unpacked(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.rewrite(small, ("bomb", bytes(10 << 20)), compression=zipfile.ZIP_DEFLATED)
        monkeypatch.setattr(zipfile.ZipFile, "open", lambda *arguments: pytest.fail("a byte was unpacked"))
        with pytest.raises(ArchiveError, match=r"unpacks to more than 100 times its size; do not use it"):
            open_archive(small)

    def test_a_compressed_archive_is_not_in_canonical_form(self, small: Path) -> None:
        self.rewrite(small, ("a.txt", b"a" * 1000), compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(ArchiveError, match="changed after its export"):
            open_archive(small)

    @pytest.mark.parametrize("model", [{}, {"modelName": "../x", "modelVersion": "1"}, {"modelName": 3}, []])
    def test_a_manifest_with_an_unusable_name_is_refused(self, small: Path, model: object) -> None:
        packed, out = io.BytesIO(), io.BytesIO()
        with zipfile.ZipFile(packed, "w") as target:
            target.writestr(MANIFEST_FILE, json.dumps({"model": model}))
        write_canonical(packed, out)  # type: ignore[arg-type]
        small.write_bytes(out.getvalue())
        with pytest.raises(ArchiveError, match=r"not usable|damaged or not an archive"):
            open_archive(small)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        for path in (tmp_path / "nope.mar", tmp_path):
            with pytest.raises(ArchiveError, match=r"there is no archive at .*; `torchport export` writes one"):
                open_archive(path)

    @pytest.mark.parametrize("content", [b"", b"no zip", b"PK\3\4"])
    def test_another_file_is_no_archive(self, small: Path, content: bytes) -> None:
        small.write_bytes(content)
        with pytest.raises(ArchiveError, match=r"small\.mar is damaged or not an archive"):
            open_archive(small)

    def test_an_archive_of_somebody_else_is_told_apart(self, small: Path) -> None:
        with zipfile.ZipFile(small, "w") as target:
            target.writestr(MANIFEST_FILE, json.dumps(MANIFEST))
        with pytest.raises(ArchiveError, match=r"not an archive that torchport wrote: it has no digests\.json"):
            open_archive(small)


class TestFailures:
    def test_a_full_temporary_folder_is_not_blamed_on_the_archive(self, small: Path) -> None:
        with (
            largest_file(10),
            pytest.raises(ArchiveError, match=r"cannot be verified, .*; name another folder with TM"),
        ):
            open_archive(small)

    def test_a_store_that_is_a_file_is_named(self, files: ArchiveFiles, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        for store in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ArchiveError, match=r"digits\.mar cannot be written: (File exists|Not a directory)"):
                write(files, store)

    def test_an_archive_name_taken_by_a_folder_is_refused(self, files: ArchiveFiles, store: Path) -> None:
        (store / "digits.mar").mkdir(parents=True)
        with pytest.raises(ArchiveError, match="cannot be written: Is a directory"):
            write(files, store)
        assert [path.name for path in store.iterdir()] == ["digits.mar"]

    # 100 kB is more than every staged file and the compressed archive have, and less than the canonical one.
    @pytest.mark.parametrize("size_bytes", [0, 1_000, 30_000, 100_000])
    def test_a_full_disk_leaves_the_old_archive_and_nothing_else(
        self, files: ArchiveFiles, store: Path, tmp_path: Path, size_bytes: int
    ) -> None:
        before = write(files, store).read_bytes()
        other = make_files(tmp_path / "other", seed=1)
        assert len(before) > 105_000
        with largest_file(size_bytes), pytest.raises(ArchiveError):
            write(other, store)
        assert (store / "digits.mar").read_bytes() == before
        assert [path.name for path in store.iterdir()] == ["digits.mar"]

    def test_a_full_disk_at_the_very_last_byte_leaves_nothing(self, files: ArchiveFiles, store: Path) -> None:
        size = write(files, store).stat().st_size
        (store / "digits.mar").unlink()
        with largest_file(size - 1), pytest.raises(ArchiveError, match="cannot be written: File too large"):
            write(files, store)
        assert list(store.iterdir()) == []

    def test_an_archiver_that_fails_is_quoted(
        self, files: ArchiveFiles, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "model_archiver").mkdir()
        (tmp_path / "model_archiver" / "__init__.py").write_text("raise SystemExit('no space left')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(ArchiveError, match=r"^torch-model-archiver failed: no space left$"):
            write(files, store)
        assert not store.exists()


# Packs DIR/N into STORE for each N given, and ends itself by SIGKILL at a moment of the last one.
PACK = """
import os, signal, sys, zipfile
from pathlib import Path
from export.archive import ArchiveFiles, write_archive

moment, store, *artifacts = sys.argv[1:]

def end(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

for i, artifact in enumerate(artifacts):
    if i == len(artifacts) - 1:
        if moment == "write":
            close = zipfile.ZipFile.close
            def closing(self):
                self.fp.flush()
                return end() if self.mode == "w" else close(self)
            zipfile.ZipFile.close = closing
        elif moment in ("fsync", "replace"):
            setattr(os, moment, end)
        elif moment == "after":
            replace = os.replace
            os.replace = lambda *arguments: (replace(*arguments), end())
    files = ArchiveFiles(artifact=Path(artifact), documents={}, config=b"minWorkers: 1")
    write_archive(files, name="digits", version="1", out=Path(store))
"""


def pack(moment: str, store: Path, *artifacts: Path) -> "subprocess.Popen[bytes]":
    # Killed, it leaves its staging folder: here rather than in the system's temporary folder.
    environment = {**os.environ, "TMPDIR": str(store.parent)}
    return subprocess.Popen([sys.executable, "-c", PACK, moment, str(store), *map(str, artifacts)], env=environment)


class TestKilled:
    @pytest.mark.parametrize(
        ("moment", "expected"), [("write", "old"), ("fsync", "old"), ("replace", "old"), ("after", "new")]
    )
    def test_a_killed_export_leaves_the_old_archive_or_the_new_one(
        self, tmp_path: Path, store: Path, moment: str, expected: str
    ) -> None:
        artifacts = {name: make_files(tmp_path / name, seed).artifact for seed, name in enumerate(("old", "new"))}
        process = pack(moment, store, artifacts["old"], artifacts["new"])
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert open_archive(store / "digits.mar").read("model.pt") == artifacts[expected].read_bytes()
        left = [path.name for path in store.iterdir() if path.suffix == ".part"]
        assert len(left) == (expected == "old"), "the kill came at another moment"

        write(make_files(tmp_path / "next", seed=2), store)
        assert [path.name for path in store.iterdir()] == ["digits.mar"]
        open_archive(store / "digits.mar")

    def test_a_kill_at_any_moment_leaves_a_whole_archive(self, tmp_path: Path, store: Path) -> None:
        artifacts = [make_files(tmp_path / str(seed), seed, size_bytes=4_000_000).artifact for seed in range(2)]
        generator = random.Random(0)
        write_archive(
            ArchiveFiles(artifact=artifacts[0], documents={}, config=b""), name="digits", version="1", out=store
        )
        for _ in range(4):
            process = pack("never", store, *artifacts * 100)
            time.sleep(generator.uniform(0.5, 1.2))
            process.kill()
            process.wait(timeout=60)
            archive = open_archive(store / "digits.mar")
            assert archive.read("model.pt") in [artifact.read_bytes() for artifact in artifacts]
        write_archive(
            ArchiveFiles(artifact=artifacts[0], documents={}, config=b""), name="digits", version="1", out=store
        )
        assert [path.name for path in store.iterdir()] == ["digits.mar"]


def test_exports_of_one_name_at_once_do_not_destroy_each_other(tmp_path: Path, store: Path) -> None:
    artifacts = [make_files(tmp_path / str(seed), seed).artifact for seed in range(3)]
    seen = 0
    with ExitStack() as stack:
        processes = [stack.enter_context(pack("never", store, *[artifact] * 3)) for artifact in artifacts]
        while any(process.poll() is None for process in processes):
            if (store / "digits.mar").exists():
                open_archive(store / "digits.mar")  # whole at every moment
                seen += 1
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert seen > 5
    last = open_archive(store / "digits.mar").read("model.pt")
    assert last in [artifact.read_bytes() for artifact in artifacts]
    assert [path.name for path in store.iterdir()] == ["digits.mar"]


def test_an_archive_that_was_replaced_after_it_was_verified_is_not_taken_for_it(tmp_path: Path, store: Path) -> None:
    archive = open_archive(write(make_files(tmp_path / "a", seed=0), store))
    write(make_files(tmp_path / "b", seed=1), store)
    for read in (lambda: archive.read("model.pt"), lambda: archive.extract(tmp_path / "out")):
        with pytest.raises(ArchiveError, match=r"another archive took the place of .*digits\.mar while it was read"):
            read()


def test_reading_refuses_what_is_not_json(small: Path, tmp_path: Path) -> None:
    packed, out = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as target:
        target.writestr(MANIFEST_FILE, json.dumps(MANIFEST))
        target.writestr("x.json", '{"accuracy": NaN}')
    write_canonical(packed, out)  # type: ignore[arg-type]
    small.write_bytes(out.getvalue())
    archive = open_archive(small)
    with pytest.raises(ValueError, match="NaN is not JSON"):
        archive.read_json("x.json")
    with pytest.raises(KeyError):
        archive.read_json("y.json")
