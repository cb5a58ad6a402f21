"""Inspection: what an archive says of itself, and whether it is still true on this machine."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from export.archive import (
    CONFIG_FILE,
    LICENCE_FILE,
    MODEL_CARD_FILE,
    PROVENANCE_FILE,
    Archive,
    open_archive,
    signature_path,
)
from export.errors import ArchiveError
from export.signing import verify_signature
from handlers.document import Section
from handlers.errors import LoadError, SignatureError
from handlers.golden import GOLDEN_FILE, GoldenSet
from handlers.model import SIGNATURE_FILE, ServedModel
from handlers.signature import Signature

UNSIGNED = "unsigned"
UNVERIFIED = "unverified"
VERIFIED = "verified"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What is known of an archive whose digests are right.

    Attributes:
        archive: The archive.
        signing: ``unsigned``; ``unverified`` if there is a signature and no key was given; ``verified``.
        signature: What the model takes and gives.
        provenance: Where it comes from.
        config: Its TorchServe settings.
        golden_samples: How many golden samples it holds.
        golden_difference: Largest difference of a replayed golden output from the checkpoint's; None if not replayed.
    """

    archive: Archive
    signing: str
    signature: Signature
    provenance: dict[str, Any]
    config: dict[str, Any]
    golden_samples: int
    golden_difference: float | None

    @property
    def model_card(self) -> bool:
        """Whether the archive holds a model card."""
        return MODEL_CARD_FILE in self.archive.digests

    @property
    def licence(self) -> bool:
        """Whether the archive holds a licence."""
        return LICENCE_FILE in self.archive.digests

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "archive": str(self.archive.path),
            "name": self.archive.name,
            "version": self.archive.version,
            "sha256": self.archive.sha256,
            "packed_by_hand": self.archive.packed_by_hand,
            "signing": self.signing,
            "signature": self.signature.to_document(),
            "provenance": self.provenance,
            "config": self.config,
            "digests": dict(self.archive.digests),
            "model_card": self.model_card,
            "licence": self.licence,
            "golden_samples": self.golden_samples,
            "golden_difference": self.golden_difference,
        }


def inspect_archive(path: Path, *, verify: bool = False, public_key: Path | None = None) -> Inspection:
    """Open an archive, verify its digests and read its documents.

    Args:
        path: The ``.mar`` file.
        verify: Also load the model in this process, which runs the code of an eager archive, and replay the golden
            samples.
        public_key: The archive must be signed by it.

    Raises:
        ArchiveError: If the archive is damaged, incomplete, or no longer gives its golden answers.
        SigningError: If it is not signed by the key.
    """
    archive = open_archive(path)
    if public_key is not None:
        verify_signature(archive, public_key)  # before anything of it is read, or run
    try:
        signature = Signature.from_document(archive.read_json(SIGNATURE_FILE))
        golden = GoldenSet.from_document(archive.read_json(GOLDEN_FILE))
        provenance = archive.read_json(PROVENANCE_FILE)
        config = yaml.safe_load(archive.read(CONFIG_FILE))
        _check_whole(archive, signature, golden, provenance, config)
    except (KeyError, ValueError, RecursionError, yaml.YAMLError, SignatureError) as error:
        reason = str(error).splitlines()[0]
        raise ArchiveError(f"{path} is not a whole torchport archive: {reason}") from error
    return Inspection(
        archive=archive,
        signing=_signing(path, public_key),
        signature=signature,
        provenance=provenance,
        config=config,
        golden_samples=len(golden.samples),
        golden_difference=replay_golden(archive) if verify else None,
    )


def _signing(path: Path, public_key: Path | None) -> str:
    if public_key is not None:
        return VERIFIED
    return UNVERIFIED if signature_path(path).exists() else UNSIGNED


def _check_whole(archive: Archive, signature: Signature, golden: GoldenSet, provenance: object, config: object) -> None:
    """Digests say that nothing was changed, not that torchport wrote it: check what is read and shown.

    Raises:
        SignatureError: If a document breaks its schema.
        KeyError: If a file that a document names is missing.
    """
    if signature.artifact is None:
        raise SignatureError("signature.artifact is missing")
    needed = [signature.artifact.file]
    if signature.text is not None:
        needed.append(signature.text.tokenizer)
    for sample in golden.samples:
        needed += [sample.file, *sample.outputs.values()]
    for file in needed:
        if file not in archive.digests:
            raise KeyError(f"{file} is missing")
    Section(config, "config")
    root = Section(provenance, "provenance")
    checkpoint = root.section("checkpoint")
    checkpoint.string("sha256")
    metrics = checkpoint.section("metrics")
    for name in metrics.names():
        metrics.number(name)
    for gate in root.sections("gates"):
        gate.string("gate")
        gate.string("detail")
    versions = root.section("versions")
    for name in versions.names():
        versions.string(name)


def replay_golden(archive: Archive) -> float:
    """Load an archive's model in this process and replay its golden samples.

    Returns:
        The largest absolute difference of an output from the checkpoint's.

    Raises:
        ArchiveError: If the model does not load or answers differently.
    """
    with tempfile.TemporaryDirectory(prefix="torchport-inspect-") as folder:
        try:
            archive.extract(Path(folder))
            model = ServedModel.load(Path(folder), threads=1)
            model.warm_up()
            return model.replay(Path(folder))
        except LoadError as error:
            raise ArchiveError(f"{archive.path} does not give its golden answers here: {error}") from error
        except OSError as error:
            raise ArchiveError(f"{archive.path} cannot be unpacked: {error.strerror or error}") from error
