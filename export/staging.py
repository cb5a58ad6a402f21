"""Staged folders: everything that an archive holds, and the command that packs it by hand.

For people whose pipeline calls ``torch-model-archiver`` itself, or who want to look at the files first. The gates have
passed: what is staged is what would have been packed, and its digests are recorded. A file that is changed afterwards
is refused by every reader of the archive.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.archive import (
    CONFIG_FILE,
    ENTRY_FILE,
    SUFFIX,
    ArchiveFiles,
    archiver_arguments,
    check_name,
    handlers_folder,
    stage_extra_files,
)
from export.atomic import appearing
from export.errors import ArchiveError
from export.zip_form import MOST_BYTES_BY_HAND
from handlers.digests import DIGESTS_FILE, digests_document, file_sha256

PACK_FILE = "pack.sh"
EXTRA_FOLDER = "extra"

_PACK = """\
#!/bin/sh
# Packs this folder into {archive}, in the folder that is given or in this one.
#
# Change nothing here: digests.json holds the SHA-256 of every file, and an archive that differs from it is not served.
# Only --model-name and --version may be others. The archiver empties a folder of the model's name in TMPDIR: give it
# a TMPDIR of its own.
set -e
out=$(cd "${{1:-$(dirname "$0")}}" && pwd)
cd "$(dirname "$0")"
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
{command} --export-path "$out"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedFolder:
    """A folder that is ready to be packed.

    Attributes:
        path: The folder.
        command: What packs it, run inside of it; paths are relative, so the folder can be moved.
    """

    path: Path
    command: str

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"folder": str(self.path), "command": self.command, "script": str(self.path / PACK_FILE)}


def staged_path(out: Path, name: str) -> Path:
    """Where the staged folder of a model is in a model store."""
    return out / f"{check_name(name, 'model name')}-staging"


def check_staging(out: Path, name: str) -> None:
    """Refuse a staged folder that is there already, before the slow steps: somebody may have worked on it.

    Raises:
        ArchiveError: If it is there.
    """
    folder = staged_path(out, name)
    if folder.exists() or folder.is_symlink():
        raise ArchiveError(f"{folder} is there already; remove it, or choose another --name or --out")


def write_staging(files: ArchiveFiles, *, name: str, version: str, out: Path) -> StagedFolder:
    """Put what would be packed into a folder of the model store, whole or not at all.

    Args:
        files: The content.
        name: Model name; the folder is ``NAME-staging``.
        version: Model version.
        out: The model store; it is made if need be.

    Raises:
        ArchiveError: If the folder is there already, cannot be written, or is too large to be packed by hand.
    """
    check_staging(out, name)
    folder = staged_path(out, name)
    arguments = archiver_arguments(
        name=name,
        version=check_name(version, "model version"),
        artifact=files.artifact.name,
        handler=ENTRY_FILE,
        extra=EXTRA_FOLDER,
        config=CONFIG_FILE,
    )
    command = shlex.join(["torch-model-archiver", *arguments])
    try:
        with appearing(folder) as part:
            _stage(files, part)
            script = part / PACK_FILE
            script.write_text(_PACK.format(archive=f"{name}{SUFFIX}", command=command), encoding="utf-8")
            script.chmod(script.stat().st_mode | 0o111 & script.stat().st_mode >> 2)
    except FileExistsError as error:  # it came meanwhile
        raise ArchiveError(f"{folder} is there already; remove it, or choose another --name or --out") from error
    except OSError as error:
        raise ArchiveError(f"{folder} cannot be written: {error.strerror or error}") from error
    return StagedFolder(path=folder, command=command)


def _stage(files: ArchiveFiles, folder: Path) -> None:
    extra = folder / EXTRA_FOLDER
    extra.mkdir()
    stage_extra_files(files, extra)
    shutil.copyfile(files.artifact, folder / files.artifact.name)
    shutil.copyfile(handlers_folder() / ENTRY_FILE, folder / ENTRY_FILE)
    (folder / CONFIG_FILE).write_bytes(files.config)
    beside = {path.name: path for path in folder.iterdir() if path.is_file()}
    inside = {path.relative_to(extra).as_posix(): path for path in extra.rglob("*") if path.is_file()}
    if beside.keys() & inside.keys():
        raise ArchiveError(f"the archive has two files called {min(beside.keys() & inside.keys())!r}; rename one")
    packed = {**beside, **inside}
    if sum(path.stat().st_size for path in packed.values()) > MOST_BYTES_BY_HAND:
        raise ArchiveError(
            f"the archive would be larger than {MOST_BYTES_BY_HAND / 1e9:.1f} GB, which cannot be packed by hand; "
            "export it without --staging-only"
        )
    digests = {name: file_sha256(path) for name, path in packed.items()}
    named = {"handler": ENTRY_FILE, "serializedFile": files.artifact.name, "configFile": CONFIG_FILE}
    (extra / DIGESTS_FILE).write_bytes(digests_document(digests, named))
