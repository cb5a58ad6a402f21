"""Signatures: of the right key, over the bytes that are served, and never beside an archive that is not theirs."""

from __future__ import annotations

import base64
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from export.archive import Archive, ArchiveFiles, Signer, open_archive, signature_path, write_archive
from export.errors import ArchiveError, SigningError
from export.signing import MAKE_PRIVATE_KEY, MAKE_PUBLIC_KEY, load_signer, sign_archive, verify_signature
from export.staging import write_staging


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A key pair, by the commands that errors and documentation name."""
    folder.mkdir()
    for command in (MAKE_PRIVATE_KEY, MAKE_PUBLIC_KEY):
        subprocess.run(shlex.split(command), cwd=folder, check=True, capture_output=True)
    return folder / "private.pem", folder / "public.pem"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys") / "ours")


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys") / "theirs")


def make_files(folder: Path, seed: int = 0) -> ArchiveFiles:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pt").write_bytes(random.Random(seed).randbytes(2000))
    return ArchiveFiles(artifact=folder / "model.pt", documents={}, config=b"minWorkers: 1\n")


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, keys: tuple[Path, Path]) -> Write:
    def write(seed: int = 0, *, sign: Signer | None = None) -> Path:
        files = make_files(tmp_path / str(seed), seed)
        return write_archive(files, name="digits", version="1.0", out=tmp_path / "store", sign=sign)

    return write


@pytest.fixture
def signed(write: Write, keys: tuple[Path, Path]) -> Archive:
    return open_archive(write(sign=load_signer(keys[0])))


class TestSigning:
    def test_a_signed_archive_is_verified_by_its_key(self, signed: Archive, keys: tuple[Path, Path]) -> None:
        assert {path.name for path in signed.path.parent.iterdir()} == {"digits.mar", "digits.mar.sig"}
        verify_signature(signed, keys[1])

    def test_the_signature_says_nothing_of_this_machine(self, signed: Archive, tmp_path: Path) -> None:
        bundle = json.loads(signature_path(signed.path).read_bytes())
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        assert payload["subject"][0]["name"] == "digits.mar"
        assert [resource["digest"] for resource in payload["predicate"]["resources"]] == [signed.sha256]
        assert "tmp" not in json.dumps(payload)

    def test_a_signed_archive_has_the_same_bytes_as_one_that_is_not(
        self, write: Write, keys: tuple[Path, Path]
    ) -> None:
        unsigned = write().read_bytes()
        assert write(sign=load_signer(keys[0])).read_bytes() == unsigned

    def test_the_librarys_own_command_verifies_and_makes_the_same(
        self, signed: Archive, keys: tuple[Path, Path]
    ) -> None:
        beside = signature_path(signed.path)
        command = [sys.executable, "-m", "model_signing"]
        verify = ["verify", "key", str(signed.path), "--signature", str(beside), "--public_key", str(keys[1])]
        assert subprocess.run([*command, *verify], check=False, capture_output=True).returncode == 0
        beside.unlink()
        sign = ["sign", "key", str(signed.path), "--signature", str(beside), "--private_key", str(keys[0])]
        assert subprocess.run([*command, *sign], check=False, capture_output=True).returncode == 0
        verify_signature(signed, keys[1])

    def test_an_archive_that_was_packed_by_hand_can_be_signed(
        self, tmp_path: Path, keys: tuple[Path, Path], other_keys: tuple[Path, Path]
    ) -> None:
        staged = write_staging(make_files(tmp_path / "files"), name="digits", version="1.0", out=tmp_path / "store")
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run([str(staged.path / "pack.sh")], check=True, env=environment)
        path = staged.path / "digits.mar"
        assert sign_archive(path, other_keys[0]) == signature_path(path)
        assert sign_archive(path, keys[0]) == signature_path(path)
        verify_signature(open_archive(path), keys[1])

    def test_what_is_not_whole_is_not_signed(self, write: Write, keys: tuple[Path, Path]) -> None:
        path = write()
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ArchiveError):
            sign_archive(path, keys[0])
        assert not signature_path(path).exists()


class TestVerification:
    def test_an_unsigned_archive_is_refused(self, write: Write, keys: tuple[Path, Path]) -> None:
        archive = open_archive(write())
        with pytest.raises(SigningError, match=r"is not signed: there is no digits\.mar\.sig beside it; .*--sign"):
            verify_signature(archive, keys[1])

    def test_another_key_is_refused(self, signed: Archive, other_keys: tuple[Path, Path]) -> None:
        with pytest.raises(SigningError, match=r"is not signed by the key of .*public\.pem: the signature is another"):
            verify_signature(signed, other_keys[1])

    def test_the_signature_of_another_archive_is_refused(
        self, write: Write, signed: Archive, keys: tuple[Path, Path]
    ) -> None:
        beside = signature_path(signed.path)
        old = beside.read_bytes()
        archive = open_archive(write(seed=1, sign=load_signer(keys[0])))
        beside.write_bytes(old)
        with pytest.raises(SigningError, match="the signature is that of another archive"):
            verify_signature(archive, keys[1])

    def test_a_flipped_byte_of_the_signature_is_refused_or_means_nothing(
        self, signed: Archive, keys: tuple[Path, Path]
    ) -> None:
        beside = signature_path(signed.path)
        content = beside.read_bytes()
        bundle = json.loads(content)
        generator = random.Random(0)
        for position in generator.sample(range(len(content)), 120):
            damaged = bytearray(content)
            damaged[position] ^= 1 << generator.randrange(7)
            beside.write_bytes(damaged)
            try:
                verify_signature(signed, keys[1])
            except SigningError:
                continue
            changed = json.loads(bytes(damaged))  # still signs the same payload by the same key
            assert changed["dsseEnvelope"]["payload"] == bundle["dsseEnvelope"]["payload"]

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b"{" + b" " * (2 << 20) + b"}"])
    def test_another_file_is_no_signature(self, signed: Archive, keys: tuple[Path, Path], content: bytes) -> None:
        signature_path(signed.path).write_bytes(content)
        with pytest.raises(SigningError, match="the signature is damaged") as caught:
            verify_signature(signed, keys[1])
        assert len(str(caught.value)) < 1000

    def test_a_signature_that_is_a_folder_is_refused(self, signed: Archive, keys: tuple[Path, Path]) -> None:
        signature_path(signed.path).unlink()
        signature_path(signed.path).mkdir()
        with pytest.raises(SigningError, match=r"digits\.mar\.sig cannot be read: Is a directory"):
            verify_signature(signed, keys[1])

    def test_an_archive_that_was_replaced_by_one_that_is_signed_is_refused(
        self, write: Write, keys: tuple[Path, Path]
    ) -> None:
        verified = open_archive(write(seed=0))
        write(seed=1, sign=load_signer(keys[0]))
        with pytest.raises(SigningError, match="another archive took the place of"):
            verify_signature(verified, keys[1])


class TestKeys:
    @pytest.mark.parametrize("content", [b"", b"no key", b"\xff\xfe"])
    def test_a_file_that_is_no_key_is_refused_with_the_command_that_makes_one(
        self, signed: Archive, tmp_path: Path, content: bytes
    ) -> None:
        key = tmp_path / "key.pem"
        key.write_bytes(content)
        with pytest.raises(SigningError, match=r"is not a private key that can .*; make one with `openssl ecparam"):
            load_signer(key)
        with pytest.raises(SigningError, match=r"is not a public key that can .*; make one with `openssl ec -in priv"):
            verify_signature(signed, key)

    def test_the_wrong_half_is_refused(self, signed: Archive, keys: tuple[Path, Path]) -> None:
        with pytest.raises(SigningError, match="is not a private key"):
            load_signer(keys[1])
        with pytest.raises(SigningError, match="is not a public key"):
            verify_signature(signed, keys[0])

    def test_a_missing_key_is_named(self, signed: Archive, tmp_path: Path) -> None:
        with pytest.raises(SigningError, match=r"the private key .*nope\.pem cannot be read: No such file"):
            load_signer(tmp_path / "nope.pem")
        with pytest.raises(SigningError, match=r"the public key .*nope\.pem cannot be read: No such file"):
            verify_signature(signed, tmp_path / "nope.pem")

    @pytest.mark.parametrize(
        "arguments",
        [
            "genpkey -algorithm ed25519",
            "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048",
            "ecparam -name secp256k1 -genkey -noout",
            "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -aes256 -pass pass:secret",
        ],
    )
    def test_keys_of_other_kinds_and_with_passwords_are_refused(self, tmp_path: Path, arguments: str) -> None:
        key = tmp_path / "key.pem"
        subprocess.run(["openssl", *arguments.split(), "-out", str(key)], check=True, capture_output=True)
        with pytest.raises(SigningError, match=r"P-256, P-384 or P-521, as PEM, without a password"):
            load_signer(key)

    @pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
    def test_keys_of_all_supported_curves_work(self, write: Write, tmp_path: Path, curve: str) -> None:
        private, public = tmp_path / "private.pem", tmp_path / "public.pem"
        make = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", f"ec_paramgen_curve:{curve}"]
        subprocess.run([*make, "-out", str(private)], check=True, capture_output=True)
        subprocess.run(["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)], check=True)
        verify_signature(open_archive(write(sign=load_signer(private))), public)

    def test_without_the_library_its_package_is_named(
        self, signed: Archive, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "model_signing.signing", None)
        for call in (lambda: load_signer(keys[0]), lambda: verify_signature(signed, keys[1])):
            with pytest.raises(
                SigningError, match=r"not installed; install it with `pip install 'torchport\[signing\]'`"
            ):
                call()


class TestTogether:
    """An archive is never beside a signature that is not its own."""

    def test_an_unsigned_export_takes_the_old_signature_away(self, write: Write, signed: Archive) -> None:
        path = write(seed=1)
        assert [other.name for other in path.parent.iterdir()] == ["digits.mar"]

    def test_a_signed_export_replaces_the_old_signature(
        self, write: Write, signed: Archive, keys: tuple[Path, Path]
    ) -> None:
        path = write(seed=1, sign=load_signer(keys[0]))
        verify_signature(open_archive(path), keys[1])
        assert {other.name for other in path.parent.iterdir()} == {"digits.mar", "digits.mar.sig"}

    def test_an_export_that_fails_leaves_both(
        self, write: Write, signed: Archive, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(archive: Path) -> bytes:
            raise SigningError("no")

        with pytest.raises(SigningError, match=r"^no$"):
            write(seed=1, sign=refuse)
        monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(ArchiveError, match="No space left"):
            write(seed=1, sign=load_signer(keys[0]))
        verify_signature(open_archive(signed.path), keys[1])
        assert {other.name for other in signed.path.parent.iterdir()} == {"digits.mar", "digits.mar.sig"}

    @pytest.mark.parametrize("moment", range(4))
    def test_a_killed_export_leaves_an_archive_with_its_own_signature_or_none(
        self, write: Write, signed: Archive, keys: tuple[Path, Path], tmp_path: Path, moment: int
    ) -> None:
        files = make_files(tmp_path / "new", seed=1)
        code = f"""
import os, pathlib, signal
from pathlib import Path
from export.archive import ArchiveFiles, write_archive
from export.signing import load_signer
left = {moment}
def counted(function):
    def call(*arguments, **options):
        global left
        if "digits.mar" in str(arguments[-1]) or "digits.mar" in str(arguments[0]):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return function(*arguments, **options)
    return call
sign = load_signer(Path({str(keys[0])!r}))
os.replace, pathlib.Path.unlink = counted(os.replace), counted(pathlib.Path.unlink)
files = ArchiveFiles(artifact=Path({str(files.artifact)!r}), documents={{}}, config=b"minWorkers: 1\\n")
write_archive(files, name="digits", version="1.0", out=Path({str(signed.path.parent)!r}), sign=sign)
"""
        done = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "TMPDIR": str(tmp_path)})
        assert done.returncode == (-signal.SIGKILL if moment < 3 else 0)
        archive = open_archive(signed.path)
        assert signature_path(signed.path).exists() == (moment in (0, 3))
        if signature_path(signed.path).exists():
            verify_signature(archive, keys[1])
        assert (archive.sha256 == signed.sha256) == (moment < 2)
        verify_signature(open_archive(write(seed=2, sign=load_signer(keys[0]))), keys[1])
        assert {other.name for other in signed.path.parent.iterdir()} == {"digits.mar", "digits.mar.sig"}

    def test_exports_at_once_leave_a_pair(self, write: Write, keys: tuple[Path, Path], tmp_path: Path) -> None:
        sign = load_signer(keys[0])
        threads = [threading.Thread(target=lambda s=seed: [write(s, sign=sign) for _ in range(2)]) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        path = tmp_path / "store" / "digits.mar"
        verify_signature(open_archive(path), keys[1])
        assert {other.name for other in path.parent.iterdir()} == {"digits.mar", "digits.mar.sig"}
