"""The archives of a comparison, unpacked for the peers."""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from handlers.digests import verify_folder
from handlers.errors import HandlerError
from handlers.manifest import MANIFEST_FILE
from handlers.model import SIGNATURE_FILE
from handlers.signature import Signature
from loadtest.errors import PayloadError, PlanError

CONFIG_FILE = "model-config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackedArchive:
    """An archive with its files in a folder.

    Attributes:
        path: The `.mar` file.
        folder: Where its files lie.
        name: The model's name.
        version: The model's version.
        signature: What the model takes and gives, and its artifact.
        threads: Threads of one batch in a worker of torchport.
    """

    path: Path
    folder: Path
    name: str
    version: str
    signature: Signature
    threads: int

    def describe(self) -> dict[str, Any]:
        """What it holds, for reports."""
        artifact = self.signature.artifact
        return {
            "archive": self.path.name,
            "model": self.name,
            "version": self.version,
            "task": self.signature.task,
            "format": artifact.format if artifact else None,
            "precision": artifact.precision if artifact else None,
            "device": artifact.device if artifact else None,
            "threads": self.threads,
        }


def unpack(path: Path, folder: Path) -> UnpackedArchive:
    """Unpacks an archive and checks every file against its digest.

    Raises:
        PayloadError: It is missing, damaged, or no archive of torchport.
    """
    try:
        with zipfile.ZipFile(path) as source:
            source.extractall(folder)
        verify_folder(folder)
        model = json.loads((folder / MANIFEST_FILE).read_bytes())["model"]
        signature = Signature.from_document(json.loads((folder / SIGNATURE_FILE).read_bytes()))
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return UnpackedArchive(
            path=path,
            folder=folder,
            name=model["modelName"],
            version=model["modelVersion"],
            signature=signature,
            threads=int(config.get("torchport", {}).get("threads", 1)),
        )
    except FileNotFoundError as error:
        if error.filename == str(path):
            raise PayloadError(f"there is no archive at {path}; `torchport export` writes one") from error
        raise PayloadError(f"{path} is not an archive of torchport: {error.filename} is missing") from error
    except HandlerError as error:
        raise PayloadError(f"{path}: {error}") from error
    except OSError as error:
        raise PayloadError(f"cannot read the archive {path}: {error.strerror or error}") from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
    ) as error:
        raise PayloadError(f"{path} is damaged or not an archive of torchport ({error}): export it again") from error


def check_reference(archive: UnpackedArchive, reference: UnpackedArchive) -> None:
    """Refuses a reference that takes other requests, or gives other answers.

    Raises:
        PlanError: It does.
    """
    ours, theirs = archive.signature, reference.signature
    same = (
        ours.task == theirs.task
        and ours.labels == theirs.labels
        and [spec.name for spec in ours.inputs] == [spec.name for spec in theirs.inputs]
        and [spec.name for spec in ours.outputs] == [spec.name for spec in theirs.outputs]
    )
    if not same:
        raise PlanError(
            f"--reference {reference.path} is of another model than {archive.path}: give another artifact of the same"
        )
