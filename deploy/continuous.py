"""Continuous serving: TorchServe hands over every request at once, and the worker plans over all of them.

It takes three things that stock TorchServe with a stock archive does not have: the setting ``asyncCommunication``; the
worker's own loop, which archives carry (``handlers/continuous.py``); and a class of the frontend, without which
TorchServe 0.12.0 loses requests in this mode (``aggregator/AsyncBatchAggregator.java``). See docs/decisions/014.

Three more classes let the frontend answer what is in flight before it stops, in either way of serving
(``aggregator/ServerGroups.java``).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import zipfile
from pathlib import Path

import yaml

from deploy.errors import StartError
from export.archive import CONFIG_FILE, Archive
from export.zip_form import add_entry, entry_chunks
from handlers.digests import DIGESTS_FILE, digests_document, parse_digests, sha256

# Requests that all workers of a model hold; what comes beyond them waits in the model's queue, which is bounded too.
IN_FLIGHT = 256
# One worker should not hold what another could have begun with, but enough to plan over.
_LEAST_OF_A_WORKER = 64

_WORKER_LOOP = "handlers/continuous.py"
_PACKAGE = "org/pytorch/serve"
_BY_SCHEDULING = f"{_PACKAGE}/wlm/AsyncBatchAggregator.class"
# Of the classes that ours take the place of, in TorchServe 0.12.0. Any other release may call them differently.
_STOCK_SHA256 = {
    _BY_SCHEDULING: "aed0a24091f876e16c3138c335df25fca0380fb704212bc3b53f004c78111cf4",
    f"{_PACKAGE}/ServerInitializer.class": "096cdc16ec94359c5bafd0fddf4443e3d9a8c7656863d0b57bf1586fd2f8f700",
    f"{_PACKAGE}/util/ServerGroups.class": "8c4327920bcaae8e5f6a9f9b6ec5c028515e95752140a4c74e43ebe29db3ef65",
}
# The fourth takes nobody's place.
CLASSES = (*_STOCK_SHA256, f"{_PACKAGE}/Exchanges.class")
_OURS = Path(__file__).parent / "aggregator"

# Ways of TorchServe to hand out requests that exclude ours. With tickets, it would refuse every request.
_OTHER_WAYS = ("useJobTicket", "continuousBatching", "sequenceBatching")


def is_possible(archive: Archive) -> bool:
    """Whether this TorchServe and this archive can serve continuously."""
    return obstacle(archive) is None


def obstacle(archive: Archive) -> str | None:
    """Why this TorchServe cannot serve this archive continuously; None where it can.

    Raises:
        ArchiveError: If another archive has taken its place since it was verified.
    """
    if _WORKER_LOOP not in archive.digests or CONFIG_FILE not in archive.digests:
        return "the archive has no continuous worker; export it again"
    if not is_known_release():
        return "this TorchServe is not the release 0.12.0, the only one that can do otherwise"
    config = yaml.safe_load(archive.read(CONFIG_FILE)) or {}
    other = next((way for way in _OTHER_WAYS if config.get(way) is True), None)
    return None if other is None else f"its {CONFIG_FILE} sets {other}"


def is_known_release() -> bool:
    """Whether the installed TorchServe is the one whose classes ours can take the place of."""
    package = importlib.util.find_spec("ts")
    if package is None or not package.submodule_search_locations:
        return False
    jar = Path(package.submodule_search_locations[0]) / "frontend" / "model-server.jar"
    try:
        with zipfile.ZipFile(jar) as source:
            return all(sha256([source.read(name)]) == digest for name, digest in _STOCK_SHA256.items())
    except (OSError, KeyError, zipfile.BadZipFile):
        return False


def in_flight(workers: int) -> int:
    """Requests that each of a model's workers holds at most."""
    return max(_LEAST_OF_A_WORKER, IN_FLIGHT // workers)


def install(folder: Path, *, continuous: bool) -> bool:
    """Put the frontend's classes where Java finds them first, where this is the release that they are made for.

    Args:
        folder: TorchServe's current folder: the first place on its class path.
        continuous: Whether any model is served continuously.

    Returns:
        Whether they are there, and TorchServe will answer what is in flight before it stops.

    Raises:
        StartError: If the folder cannot be written.
    """
    remove(folder)
    if not is_known_release():
        return False
    for name in CLASSES:
        if name == _BY_SCHEDULING and not continuous:
            continue
        target = folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_OURS / target.name, target)
        except OSError as error:
            raise StartError(
                f"{target} cannot be written ({error.strerror}); make {folder} writable, and remove what is in the way"
            ) from error
    return True


def remove(folder: Path) -> None:
    """Take away the classes that :func:`install` put there, for this server or an earlier one."""
    shutil.rmtree(folder / Path(_PACKAGE).parts[0], ignore_errors=True)


def make_continuous(path: Path, *, in_flight: int = IN_FLIGHT) -> None:
    """Change a server's own copy of a verified archive: its settings, and their digest.

    Args:
        path: The copy.
        in_flight: Requests that each worker holds at most.

    Raises:
        OSError: If it cannot be read or written.
    """
    changed = path.with_suffix(".continuous")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as target:
        config = yaml.safe_load(source.read(CONFIG_FILE))
        section = dict(config.get("torchport") or {})
        section.setdefault("max_batch", config.get("batchSize") or 0)
        config |= {"asyncCommunication": True, "batchSize": in_flight, "torchport": section}
        settings = yaml.safe_dump(config, sort_keys=False).encode()
        recorded = parse_digests(source.read(DIGESTS_FILE))
        digests = digests_document({**recorded.files, CONFIG_FILE: sha256([settings])}, recorded.manifest)
        replaced = {CONFIG_FILE: settings, DIGESTS_FILE: digests}
        for name in sorted(source.namelist()):
            own = replaced.get(name)
            chunks = entry_chunks(source, name) if own is None else [own]
            add_entry(target, name, chunks, source.getinfo(name).file_size if own is None else len(own))
    os.replace(changed, path)
