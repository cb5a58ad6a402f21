"""Staged folders: packed by hand they serve the same, and nothing but the manifest escapes its digest."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from export.archive import CONFIG_FILE, ArchiveFiles, open_archive, write_archive
from export.errors import ArchiveError
from export.staging import PACK_FILE, StagedFolder, check_staging, staged_path, write_staging
from handlers.digests import DIGESTS_FILE, digests_document, parse_digests, sha256, verify_folder
from handlers.errors import DigestError
from handlers.manifest import MANIFEST_FILE

# Where torch-model-archiver was installed beside this Python.
SCRIPTS = Path(sys.executable).parent
END = struct.Struct("<4sHHHHIIH")


def make_files(folder: Path, *, seed: int = 0) -> ArchiveFiles:
    folder.mkdir(parents=True, exist_ok=True)
    artifact = folder / "model.pt"
    artifact.write_bytes(random.Random(seed).randbytes(3000))
    documents = {"signature.json": b"{}\n", "golden/000.png": b"png", "source/package/module.py": b"x = 1\n"}
    return ArchiveFiles(artifact=artifact, documents=documents, config=b"minWorkers: 1\n")


@pytest.fixture
def files(tmp_path: Path) -> ArchiveFiles:
    return make_files(tmp_path / "files")


@pytest.fixture
def staged(files: ArchiveFiles, tmp_path: Path) -> StagedFolder:
    return write_staging(files, name="digits", version="2.1", out=tmp_path / "store")


def pack(folder: Path, out: Path) -> Path:
    """Run the folder's script, as people do."""
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["sh", str(folder / PACK_FILE), str(out)], check=True, env=environment, cwd=out)
    return out / "digits.mar"


@pytest.fixture
def packed(staged: StagedFolder, tmp_path: Path) -> Path:
    return pack(staged.path, tmp_path / "packed")


def repack(path: Path, change: Callable[[dict[str, bytes]], object], method: int = zipfile.ZIP_STORED) -> None:
    """Change an archive's files and write them as torch-model-archiver does, with dates and without directories."""
    with zipfile.ZipFile(path) as source:
        content = {name: source.read(name) for name in source.namelist()}
    change(content)
    with zipfile.ZipFile(path, "w", method) as target:
        for name, data in content.items():
            target.writestr(name, data)


def change_manifest(**fields: object) -> Callable[[dict[str, bytes]], object]:
    def change(content: dict[str, bytes]) -> None:
        manifest = json.loads(content[MANIFEST_FILE])
        manifest["model"].update(fields)
        content[MANIFEST_FILE] = json.dumps(manifest).encode()

    return change


class TestFolder:
    def test_it_holds_everything_and_its_command_is_relative(self, staged: StagedFolder, tmp_path: Path) -> None:
        assert staged.path == tmp_path / "store" / "digits-staging"
        here = {path.name for path in staged.path.iterdir()}
        assert here == {"model.pt", "entry.py", CONFIG_FILE, "extra", PACK_FILE}
        assert (staged.path / "extra/golden/000.png").read_bytes() == b"png"
        assert (staged.path / "extra/handlers/service.py").is_file()
        assert not (staged.path / "extra/handlers/entry.py").exists()
        assert staged.command == (
            "torch-model-archiver --model-name digits --version 2.1 --serialized-file model.pt --handler entry.py "
            "--extra-files extra --config-file model-config.yaml --archive-format zip-store"
        )
        assert staged.command in (staged.path / PACK_FILE).read_text()
        assert os.access(staged.path / PACK_FILE, os.X_OK)
        assert staged.to_document()["command"] == staged.command
        assert str(tmp_path) not in "".join(path.read_text(errors="ignore") for path in staged.path.glob("*.*"))

    def test_the_same_files_give_the_same_folder(self, staged: StagedFolder, tmp_path: Path) -> None:
        again = write_staging(make_files(tmp_path / "again"), name="digits", version="2.1", out=tmp_path / "other")

        def content(folder: Path) -> dict[str, bytes]:
            return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

        assert content(again.path) == content(staged.path)

    def test_others_may_read_and_run_what_they_may_read(self, files: ArchiveFiles, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            folder = write_staging(files, name="digits", version="1", out=tmp_path / "store").path
        finally:
            os.umask(before)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        assert stat.S_IMODE((folder / PACK_FILE).stat().st_mode) == 0o750

    def test_one_that_is_there_already_is_left_alone(self, staged: StagedFolder, files: ArchiveFiles) -> None:
        (staged.path / "notes.txt").write_text("mine")
        for call in (
            lambda: check_staging(staged.path.parent, "digits"),
            lambda: write_staging(files, name="digits", version="1", out=staged.path.parent),
        ):
            with pytest.raises(ArchiveError, match=r"digits-staging is there already; remove it, or choose another"):
                call()
        assert (staged.path / "notes.txt").read_text() == "mine"
        assert [path.name for path in staged.path.parent.iterdir()] == ["digits-staging"]

    def test_one_that_comes_meanwhile_is_left_alone(
        self, files: ArchiveFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = tmp_path / "store"
        copy = shutil.copyfile

        def copy_slowly(source: Path, target: Path) -> None:
            (store / "digits-staging").mkdir(exist_ok=True)
            copy(source, target)

        monkeypatch.setattr(shutil, "copyfile", copy_slowly)
        with pytest.raises(ArchiveError, match="is there already"):
            write_staging(files, name="digits", version="1", out=store)
        assert [(path.name, list(path.iterdir())) for path in store.iterdir()] == [("digits-staging", [])]

    @pytest.mark.parametrize("name", ["../x", "a b", ""])
    def test_unusable_names_are_refused(self, files: ArchiveFiles, tmp_path: Path, name: str) -> None:
        with pytest.raises(ArchiveError, match="model name"):
            write_staging(files, name=name, version="1", out=tmp_path / "store")
        with pytest.raises(ArchiveError, match="model version"):
            write_staging(files, name="a", version=name, out=tmp_path / "store")
        assert not (tmp_path / "store").exists()

    def test_a_failure_leaves_nothing(self, files: ArchiveFiles, tmp_path: Path) -> None:
        files.artifact.unlink()
        with pytest.raises(ArchiveError, match=r"digits-staging cannot be written: No such file"):
            write_staging(files, name="digits", version="1", out=tmp_path / "store")
        assert list((tmp_path / "store").iterdir()) == []

    def test_two_files_of_one_name_are_refused(self, files: ArchiveFiles, tmp_path: Path) -> None:
        clash = ArchiveFiles(artifact=files.artifact, documents={"model.pt": b""}, config=files.config)
        with pytest.raises(ArchiveError, match=r"two files called 'model\.pt'"):
            write_staging(clash, name="digits", version="1", out=tmp_path / "store")

    @pytest.mark.parametrize("path", [".hidden/a", "source/__pycache__/a.pyc", "a/.git/config"])
    def test_what_the_archiver_would_leave_out_is_refused(self, files: ArchiveFiles, tmp_path: Path, path: str) -> None:
        other = ArchiveFiles(artifact=files.artifact, documents={path: b""}, config=files.config)
        for write in (write_staging, write_archive):
            with pytest.raises(ArchiveError, match=r"torch-model-archiver leaves '.*' out"):
                write(other, name="digits", version="1", out=tmp_path / "store")

    def test_what_cannot_be_packed_by_hand_is_refused(
        self, files: ArchiveFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("export.staging.MOST_BYTES_BY_HAND", 2000)
        with pytest.raises(ArchiveError, match="cannot be packed by hand; export it without --staging-only"):
            write_staging(files, name="digits", version="1", out=tmp_path / "store")
        assert list((tmp_path / "store").iterdir()) == []

    def test_what_a_killed_export_left_goes_with_the_next_one(self, files: ArchiveFiles, tmp_path: Path) -> None:
        code = f"""
import os, shutil, signal
from pathlib import Path
from export.archive import ArchiveFiles
from export.staging import write_staging
shutil.copyfile = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
files = ArchiveFiles(artifact=Path({str(files.artifact)!r}), documents={{}}, config=b"")
write_staging(files, name="digits", version="1", out=Path({str(tmp_path / "store")!r}))
"""
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == -signal.SIGKILL
        (left,) = (tmp_path / "store").iterdir()
        assert left.name.startswith(".digits-staging.")
        write_staging(files, name="digits", version="1", out=tmp_path / "store")
        assert [path.name for path in (tmp_path / "store").iterdir()] == ["digits-staging"]


class TestPackedByHand:
    def test_it_opens_extracts_and_is_whole_for_a_worker(
        self, packed: Path, files: ArchiveFiles, tmp_path: Path
    ) -> None:
        archive = open_archive(packed)
        assert (archive.name, archive.version, archive.packed_by_hand) == ("digits", "2.1", True)
        assert archive.sha256 == sha256([packed.read_bytes()])
        assert archive.read("model.pt") == files.artifact.read_bytes()
        assert archive.read_json(MANIFEST_FILE)["model"]["handler"] == "entry.py"
        archive.extract(tmp_path / "extracted")
        verify_folder(tmp_path / "extracted")

    def test_it_holds_what_an_export_would_have_packed(self, packed: Path, files: ArchiveFiles, tmp_path: Path) -> None:
        exported = open_archive(write_archive(files, name="digits", version="2.1", out=tmp_path / "exported"))
        by_hand = open_archive(packed)
        assert not exported.packed_by_hand
        assert {**by_hand.digests, MANIFEST_FILE: ""} == {**exported.digests, MANIFEST_FILE: ""}
        manifests = [archive.read_json(MANIFEST_FILE) for archive in (exported, by_hand)]
        assert manifests[0]["model"] == manifests[1]["model"]

    def test_the_folder_may_be_moved_and_the_script_needs_no_argument(
        self, staged: StagedFolder, tmp_path: Path
    ) -> None:
        moved = staged.path.rename(tmp_path / "moved here")
        environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run([str(moved / PACK_FILE)], check=True, env=environment, cwd="/")
        assert open_archive(moved / "digits.mar").packed_by_hand

    def test_the_printed_command_packs_it_too_and_may_name_it_otherwise(self, staged: StagedFolder) -> None:
        command = staged.command.replace("digits", "numbers").replace("2.1", "3") + " --force --export-path ."
        assert command.startswith("torch-model-archiver ")
        for options in ("", " --runtime python3"):
            subprocess.run(f"{SCRIPTS}/{command}{options}", shell=True, check=True, cwd=staged.path)
            archive = open_archive(staged.path / "numbers.mar")
            assert (archive.name, archive.version) == ("numbers", "3")

    def test_a_compressed_one_opens_too(self, staged: StagedFolder) -> None:
        command = staged.command.replace("zip-store", "default")
        subprocess.run(f"{SCRIPTS}/{command} --export-path .", shell=True, check=True, cwd=staged.path)
        with zipfile.ZipFile(staged.path / "digits.mar") as source:
            assert {entry.compress_type for entry in source.infolist()} == {zipfile.ZIP_DEFLATED}
        assert open_archive(staged.path / "digits.mar").packed_by_hand

    @pytest.mark.parametrize("file", ["model.pt", "entry.py", "model-config.yaml", "extra/handlers/service.py"])
    def test_a_file_that_was_changed_before_packing_is_refused(
        self, staged: StagedFolder, tmp_path: Path, file: str
    ) -> None:
        with (staged.path / file).open("ab") as target:
            target.write(b" ")
        with pytest.raises(ArchiveError, match=rf"{Path(file).name} has changed"):
            open_archive(pack(staged.path, tmp_path / "packed"))

    def test_a_file_that_was_added_is_refused(self, staged: StagedFolder, tmp_path: Path) -> None:
        (staged.path / "extra/sitecustomize.py").write_text("")
        with pytest.raises(ArchiveError, match=r"sitecustomize\.py is not recorded"):
            open_archive(pack(staged.path, tmp_path / "packed"))

    @pytest.mark.parametrize(
        "fields",
        [
            {"handler": "handlers/service.py"},
            {"handler": "base_handler"},
            {"serializedFile": "signature.json"},
            {"configFile": "signature.json"},
            {"requirementsFile": "signature.json"},
            {"modelFile": "entry.py"},
            {"extensions": {}},
            {"modelName": "../x"},
            {"modelVersion": "a b"},
            {"modelVersion": None},
        ],
    )
    def test_a_manifest_that_means_something_else_is_refused(
        self, packed: Path, tmp_path: Path, fields: dict[str, object]
    ) -> None:
        repack(packed, change_manifest(**fields))
        with pytest.raises(ArchiveError, match=r"MANIFEST\.json is not what the staged folder's command writes"):
            open_archive(packed)
        with zipfile.ZipFile(packed) as source:
            source.extractall(tmp_path / "worker")
        with pytest.raises(DigestError, match=r"MANIFEST\.json"):
            verify_folder(tmp_path / "worker")

    def test_an_exported_archive_does_not_become_one_by_its_manifest_alone(
        self, files: ArchiveFiles, tmp_path: Path
    ) -> None:
        path = write_archive(files, name="digits", version="2.1", out=tmp_path / "exported")
        repack(path, change_manifest(modelVersion="3"))
        with pytest.raises(ArchiveError, match=r"MANIFEST\.json has changed"):
            open_archive(path)

    @pytest.mark.parametrize("name", ["model.pt", "entry.py", "handlers/service.py", "signature.json"])
    def test_claiming_to_be_packed_by_hand_escapes_nothing_but_the_manifests_bytes(
        self, files: ArchiveFiles, tmp_path: Path, name: str
    ) -> None:
        path = write_archive(files, name="digits", version="2.1", out=tmp_path / "exported")
        named = {"handler": "entry.py", "serializedFile": "model.pt", "configFile": CONFIG_FILE}

        def claim(content: dict[str, bytes]) -> None:
            recorded = dict(parse_digests(content[DIGESTS_FILE]).files)
            del recorded[MANIFEST_FILE]
            content[DIGESTS_FILE] = digests_document(recorded, named)

        repack(path, claim)
        assert open_archive(path).packed_by_hand
        repack(path, lambda content: content.update({name: content[name] + b" "}))
        with pytest.raises(ArchiveError, match=f"{name} has changed"):
            open_archive(path)


class TestStructure:
    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_a_flipped_byte_is_refused_or_changes_nothing_that_is_extracted(self, packed: Path, method: int) -> None:
        repack(packed, shorten, method)
        whole = packed.read_bytes()
        archive = open_archive(packed)
        with zipfile.ZipFile(packed) as source:
            permissions = permission_bytes(source, whole)
            last_bytes = {entry.header_offset + 30 + len(entry.filename) + entry.compress_size - 1
                          for entry in source.infolist()}  # fmt: skip
        unnoticed = set()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            packed.write_bytes(damaged)
            try:
                found = open_archive(packed)
            except ArchiveError:
                continue
            unnoticed.add(position)
            assert found.digests == archive.digests
            assert found.sha256 != archive.sha256  # a signature notices even that
        # Compressed data ends with up to seven bits that nobody reads.
        assert unnoticed <= permissions | (last_bytes if method == zipfile.ZIP_DEFLATED else set())

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content + b"\0",
            lambda content: b"\0" + content,
            lambda content: content[: content.index(b"PK\1\2")] + b"\0" + content[content.index(b"PK\1\2") :],
            lambda content: content[:-2] + b"\5\0hello",
            lambda content: content[:-22] + END.pack(b"PK\5\6", 0, 0, 1, 1, *END.unpack(content[-22:])[5:]),
        ],
    )
    def test_nothing_hides_between_before_or_behind_the_entries(
        self, packed: Path, change: Callable[[bytes], bytes]
    ) -> None:
        packed.write_bytes(change(packed.read_bytes()))
        with pytest.raises(ArchiveError, match=r"changed after its export|damaged or not an archive"):
            open_archive(packed)

    def test_extra_fields_comments_and_other_methods_are_refused(self, packed: Path) -> None:
        with zipfile.ZipFile(packed) as source:
            content = {name: source.read(name) for name in source.namelist()}
        for field, value in (("extra", b"\1\0\2\0ab"), ("comment", b"x"), ("compress_type", zipfile.ZIP_LZMA)):
            with zipfile.ZipFile(packed, "w") as target:
                for name, data in content.items():
                    info = zipfile.ZipInfo(name)
                    if name == "model.pt":
                        setattr(info, field, value)
                    target.writestr(info, data)
            with pytest.raises(ArchiveError, match="changed after its export"):
                open_archive(packed)

    def test_bytes_behind_the_end_of_compressed_data_are_refused(self, tmp_path: Path, packed: Path) -> None:
        repack(packed, shorten, zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(packed) as source:
            entries = {name: source.read(name) for name in source.namelist()}
        packed.write_bytes(zip_with_hidden_bytes(entries, b"hidden"))
        with zipfile.ZipFile(packed) as source:
            assert source.testzip() is None  # Python's reader does not mind
        with pytest.raises(ArchiveError, match="changed after its export"):
            open_archive(packed)
        packed.write_bytes(zip_with_hidden_bytes(entries, b""))
        open_archive(packed)

    def test_what_unpacks_to_far_more_than_it_is_is_never_unpacked(
        self, packed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repack(packed, lambda content: content.update(bomb=bytes(200 << 20)), zipfile.ZIP_DEFLATED)
        monkeypatch.setattr(zipfile.ZipFile, "open", lambda *arguments: pytest.fail("a byte was unpacked"))
        with pytest.raises(ArchiveError, match=r"unpacks to more than 100 times its size; .*--archive-format zip-st"):
            open_archive(packed)

    def test_a_bomb_whose_size_is_a_lie_is_refused(self, packed: Path) -> None:
        repack(packed, shorten, zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(packed) as source:
            entries = {name: source.read(name) for name in source.namelist()}
        packed.write_bytes(zip_with_hidden_bytes(entries, b"", longer=bytes(5 << 20)))
        with pytest.raises(ArchiveError, match=r"changed after its export|damaged"):
            open_archive(packed)

    def test_a_document_that_is_read_whole_is_bounded(self, packed: Path) -> None:
        def grow(content: dict[str, bytes]) -> None:
            content[DIGESTS_FILE] = b" " * (17 << 20) + content[DIGESTS_FILE]

        repack(packed, grow)
        with pytest.raises(ArchiveError, match="damaged or not an archive"):
            open_archive(packed)

    def test_one_that_is_too_large_for_this_check_is_refused(
        self, packed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("export.zip_form.MOST_BYTES_BY_HAND", 1000)
        with pytest.raises(ArchiveError, match="packed by hand and is larger than"):
            open_archive(packed)


def shorten(content: dict[str, bytes]) -> None:
    """Leave little of an archive, so that every byte of it can be tried."""
    for name in list(content):
        if name.startswith("handlers/") or name == "source/package/module.py":
            del content[name]
    content["model.pt"] = b"weights" * 10
    digests = {name: sha256([data]) for name, data in content.items() if name not in (MANIFEST_FILE, DIGESTS_FILE)}
    named = {"handler": "entry.py", "serializedFile": "model.pt", "configFile": CONFIG_FILE}
    content[DIGESTS_FILE] = digests_document(digests, named)


def permission_bytes(source: zipfile.ZipFile, content: bytes) -> set[int]:
    """Where the directory keeps permissions, which umasks differ in and nobody looks at."""
    positions = set()
    at = source.start_dir
    for entry in source.infolist():
        assert content[at : at + 4] == b"PK\1\2"
        positions |= {at + 40, at + 41}
        at += 46 + len(entry.filename)
    return positions


def zip_with_hidden_bytes(entries: dict[str, bytes], hidden: bytes, longer: bytes = b"") -> bytes:
    """A deflated zip whose data go on after their content, or whose content goes on after the size that it gives."""
    body, directory = b"", b""
    for name, data in entries.items():
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        raw = deflate.compress(data + longer) + deflate.flush() + hidden
        common = struct.pack("<HHHHIII", 0, 8, 0, 33, zlib.crc32(data), len(raw), len(data))
        directory += b"PK\1\2" + struct.pack("<BBH", 20, 3, 20) + common
        directory += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0o600 << 16, len(body)) + name.encode()
        body += b"PK\3\4" + struct.pack("<H", 20) + common + struct.pack("<HH", len(name), 0) + name.encode() + raw
    return body + directory + END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), len(body), 0)


def test_the_staged_path_is_in_the_store(tmp_path: Path) -> None:
    assert staged_path(tmp_path, "a") == tmp_path / "a-staging"
    check_staging(tmp_path / "not there", "a")
