"""A server's own copies of archives, with settings that suit this server."""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy import continuous as continuous_serving
from deploy.placement import Placement, runs_on_gpu
from export.archive import CONFIG_FILE, Archive
from export.zip_form import add_entry, entry_chunks
from handlers.digests import DIGESTS_FILE, digests_document, parse_digests, sha256

# Makes another one of a model-config.yaml.
Change = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def copy_archives(archives: Iterable[Archive], folder: Path) -> dict[str, Path]:
    """Copy archives into a new folder.

    Copies, not links, and such as have the verified digest: what was verified is what is loaded, whatever happened to
    the originals meanwhile.

    Args:
        archives: Verified, each with a name of its own.
        folder: It must not exist.

    Returns:
        The copies by model name.

    Raises:
        ArchiveError: If an archive was replaced after it was verified.
        OSError: If one cannot be read or written.
    """
    folder.mkdir()
    copies = {}
    for archive in archives:
        copies[archive.name] = folder / f"{archive.name}.mar"
        archive.copy(copies[archive.name])
    return copies


def suit_server(copies: Mapping[str, Path], *, continuous: Collection[str], workers: int | None, gpus: int) -> None:
    """Give copies of archives the settings of their server.

    Args:
        copies: By model name.
        continuous: Names of the models that are served continuously.
        workers: Of every model; None for each archive's own number.
        gpus: For workers.

    Raises:
        OSError: If one cannot be read or written.
    """
    placement = Placement(gpus, workers) if gpus > 1 else None
    for name, path in copies.items():
        changes: list[Change] = []
        if name in continuous:
            in_flight = continuous_serving.in_flight(workers or 1)
            changes.append(functools.partial(continuous_serving.settings, in_flight=in_flight))
        if placement is not None and runs_on_gpu(path):
            changes.append(placement.place_next)
        if changes:
            change_settings(path, changes)


def change_settings(path: Path, changes: Sequence[Change]) -> None:
    """Change the settings of a copy of a verified archive, and their digest.

    Args:
        path: The copy.
        changes: Each makes another one of its model-config.yaml.

    Raises:
        OSError: If it cannot be read or written.
    """
    beside = path.with_suffix(".changed")
    with zipfile.ZipFile(path) as source:
        config: Mapping[str, Any] = yaml.safe_load(source.read(CONFIG_FILE)) or {}
        for change in changes:
            config = change(config)
        settings = yaml.safe_dump(dict(config), sort_keys=False).encode()
        recorded = parse_digests(source.read(DIGESTS_FILE))
        digests = digests_document({**recorded.files, CONFIG_FILE: sha256([settings])}, recorded.manifest)
        replaced = {CONFIG_FILE: settings, DIGESTS_FILE: digests}
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as target:
            for name in sorted(source.namelist()):
                own = replaced.get(name)
                chunks = entry_chunks(source, name) if own is None else [own]
                add_entry(target, name, chunks, source.getinfo(name).file_size if own is None else len(own))
    os.replace(beside, path)
