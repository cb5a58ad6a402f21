"""A server's own copy of an archive, with settings that suit this server."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from export.archive import CONFIG_FILE
from export.zip_form import add_entry, entry_chunks
from handlers.digests import DIGESTS_FILE, digests_document, parse_digests, sha256


def change_settings(path: Path, changes: Sequence[Callable[[Mapping[str, Any]], Mapping[str, Any]]]) -> None:
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
