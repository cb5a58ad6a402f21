"""Signatures: who exported an archive, by a key pair. Digests say that it is whole; only a signature says whose it is.

A signature is a file ``NAME.mar.sig`` beside the archive, in the format of the OpenSSF's model-signing: a Sigstore
bundle over the SHA-256 of the whole file, made with a private key on an elliptic curve. Nothing of it needs a network.
``python -m model_signing`` makes and verifies the same.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.archive import Archive, Signer, open_archive, signature_path
from export.atomic import replacing
from export.errors import SigningError
from handlers.digests import file_sha256
from handlers.errors import one_line

MAKE_PRIVATE_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out private.pem"
MAKE_PUBLIC_KEY = "openssl ec -in private.pem -pubout -out public.pem"

# A few hundred bytes; read whole, so bounded.
_MOST_SIGNATURE_BYTES = 1 << 20


def load_signer(private_key: Path) -> Signer:
    """What signs archives with a private key, for :func:`export.archive.write_archive`.

    Args:
        private_key: A PEM file of a private key on the curve P-256, P-384 or P-521, without a password.

    Raises:
        SigningError: If the key cannot be used, or model-signing is not installed.
    """
    config = _import("signing").Config()
    with _key_errors(private_key, "private key", MAKE_PRIVATE_KEY):
        config.use_elliptic_key_signer(private_key=private_key)

    def sign(archive: Path) -> bytes:
        with tempfile.TemporaryDirectory(prefix="torchport-sign-") as folder:
            signature = Path(folder) / "signature"
            try:
                config.sign(archive, signature)
                return signature.read_bytes()
            except Exception as error:  # whatever the library raises, there is no signature
                raise SigningError(f"{archive.name} cannot be signed: {one_line(error)}") from error

    return sign


def sign_archive(path: Path, private_key: Path) -> Path:
    """Sign an archive that is there already, such as one that was packed by hand, after verifying it.

    Returns:
        The path of the signature.

    Raises:
        ArchiveError: If the archive is not whole.
        SigningError: If it cannot be signed.
    """
    sign = load_signer(private_key)
    archive = open_archive(path)
    destination = signature_path(path)
    try:
        with tempfile.TemporaryDirectory(prefix="torchport-sign-") as folder:
            verified = Path(folder) / path.name
            archive.copy(verified)
            with replacing(destination) as file:
                file.write(sign(verified))
    except OSError as error:
        raise SigningError(f"{destination} cannot be written: {error.strerror or error}") from error
    return destination


def verify_signature(archive: Archive, public_key: Path) -> None:
    """Make sure that the signature beside an archive is that of a key, over the very bytes that were verified.

    Raises:
        SigningError: If there is none, it is another key's, or it belongs to other bytes.
    """
    config = _import("verifying").Config()
    with _key_errors(public_key, "public key", MAKE_PUBLIC_KEY):
        config.use_elliptic_key_verifier(public_key=public_key)
    beside = signature_path(archive.path)
    content = _read_signature(beside, archive)
    with tempfile.TemporaryDirectory(prefix="torchport-verify-") as folder:
        # What is verified and what is read below must be the same: the file may be replaced at any moment.
        signature = Path(folder) / beside.name
        signature.write_bytes(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints warnings
                config.verify(archive.path, signature)
            signed = _signed_digest(content)
        except Exception as error:  # whatever the library raises, it is not verified
            reason = _reason(error, archive)
            raise SigningError(
                f"{archive.path} is not signed by the key of {public_key}: {reason}; "
                "fetch the archive and its signature again, or sign it with the right key"
            ) from error
    if signed != archive.sha256:
        raise SigningError(f"another archive took the place of {archive.path} while it was verified; try again")


def _read_signature(path: Path, archive: Archive) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_SIGNATURE_BYTES)
    except FileNotFoundError as error:
        raise SigningError(
            f"{archive.path} is not signed: there is no {path.name} beside it; "
            "export it with --sign PRIVATE_KEY.pem, or fetch its signature"
        ) from error
    except OSError as error:
        raise SigningError(f"{path} cannot be read: {error.strerror or error}") from error


def _signed_digest(bundle: bytes) -> str:
    """The SHA-256 that a bundle, whose signature was verified, is over."""
    payload = json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
    (resource,) = payload["predicate"]["resources"]
    if resource["algorithm"] != "sha256":
        raise ValueError("it is over another kind of digest; sign it with --sign")
    return str(resource["digest"])


def _reason(error: Exception, archive: Archive) -> str:
    text = one_line(error)
    if text.startswith("Key mismatch"):
        return "the signature is another key's"
    if text.startswith("Signature mismatch") or file_sha256(archive.path) != archive.sha256:
        return "the signature is that of another archive"
    return f"the signature is damaged ({text})"


@contextlib.contextmanager
def _key_errors(path: Path, what: str, command: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SigningError(f"the {what} {path} cannot be read: {error.strerror}; make one with `{command}`") from error
    except Exception as error:  # of the library and of cryptography, for every kind of file that is no such key
        raise SigningError(
            f"{path} is not a {what} that can be used (an elliptic curve P-256, P-384 or P-521, as PEM, "
            f"without a password); make one with `{command}`"
        ) from error


def _import(module: str) -> Any:
    try:
        import model_signing.signing  # noqa: PLC0415  # an extra
        import model_signing.verifying  # noqa: PLC0415
    except ImportError as error:
        raise SigningError(
            "signatures need the package model-signing, which is not installed; "
            "install it with `pip install 'torchport[signing]'`"
        ) from error
    return getattr(model_signing, module)
