"""Request bodies, read from an archive's golden samples or from files."""

import base64
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from loadtest.errors import PayloadError

EXPECTED = "golden/expected.json"

# Written out, not asked of `mimetypes`: that module reads the machine's own tables, so answers differ by machine.
CONTENT_TYPES = {
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".png": "image/png",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".txt": "text/plain; charset=utf-8",
    ".webp": "image/webp",
}
UNKNOWN_CONTENT_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """One request body and what the model should answer to it.

    Attributes:
        body: The bytes to send.
        content_type: Value of the Content-Type header.
        expected_label: Top-1 label of a right answer; None when it is not known, so only the status is checked.
    """

    body: bytes
    content_type: str
    expected_label: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The payload as JSON-serialisable values."""
        return {
            "body": base64.b64encode(self.body).decode("ascii"),
            "content_type": self.content_type,
            "expected_label": self.expected_label,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            body=base64.b64decode(document["body"]),
            content_type=document["content_type"],
            expected_label=document["expected_label"],
        )


def content_type_of(path: Path) -> str:
    """The media type that a file's suffix stands for."""
    return CONTENT_TYPES.get(path.suffix.lower(), UNKNOWN_CONTENT_TYPE)


def read_files(paths: Iterable[Path], *, content_type: str | None = None) -> list[Payload]:
    """Reads one payload per file.

    Args:
        paths: Files to send as they are.
        content_type: Overrides what the suffix says.

    Raises:
        PayloadError: A file is missing or cannot be read.
    """
    payloads = []
    for path in paths:
        try:
            body = path.read_bytes()
        except OSError as error:
            raise PayloadError(f"cannot read the input {path}: {error.strerror}; give an existing file") from error
        payloads.append(Payload(body=body, content_type=content_type or content_type_of(path)))
    return payloads


def read_golden_samples(archive: Path) -> list[Payload]:
    """Reads the golden samples of an archive, each with the label that it must be answered with.

    Args:
        archive: A `.mar` written by `torchport export`.

    Raises:
        PayloadError: The archive is missing, is no archive, or holds no usable golden samples.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            expected = json.loads(opened.read(EXPECTED))
            payloads = [_golden_payload(opened, sample) for sample in expected["samples"]]
    except FileNotFoundError as error:
        raise PayloadError(
            f"there is no archive {archive}: name one with --archive, or send your own files with --input"
        ) from error
    except OSError as error:
        raise PayloadError(f"cannot read the archive {archive}: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise PayloadError(f"{archive} is not a whole archive ({error}): export it again") from error
    except KeyError as error:
        raise PayloadError(
            f"{archive} holds no usable golden samples ({error.args[0]}): export it again with torchport, "
            "or send your own files with --input"
        ) from error
    except (ValueError, TypeError) as error:
        raise PayloadError(f"{EXPECTED} in {archive} is malformed ({error}): export the model again") from error
    if not payloads:
        raise PayloadError(f"{archive} holds no golden samples: send your own files with --input")
    return payloads


def _golden_payload(opened: zipfile.ZipFile, sample: dict[str, Any]) -> Payload:
    """One entry of expected.json with its body."""
    label = sample.get("label")
    return Payload(
        body=opened.read(sample["file"]),
        content_type=sample["content_type"],
        expected_label=None if label is None else str(label),
    )
