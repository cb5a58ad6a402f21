"""Continuous serving: TorchServe hands over every request at once, and the worker plans over all of them.

It takes three things that stock TorchServe with a stock archive does not have: the setting ``asyncCommunication``; the
worker's own loop, which archives carry (``handlers/continuous.py``); and a class of the frontend, without which
TorchServe 0.12.0 loses requests in this mode (``aggregator/AsyncBatchAggregator.java``). See docs/decisions/014.
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
_CLASS = "org/pytorch/serve/wlm/AsyncBatchAggregator.class"
_OURS = Path(__file__).parent / "aggregator" / "AsyncBatchAggregator.class"
# Of the class that ours takes the place of, in TorchServe 0.12.0. Any other release may call it differently.
_STOCK_SHA256 = "aed0a24091f876e16c3138c335df25fca0380fb704212bc3b53f004c78111cf4"


def is_possible(archive: Archive) -> bool:
    """Whether this TorchServe and this archive can serve continuously."""
    return _WORKER_LOOP in archive.digests and _stock_class_sha256() == _STOCK_SHA256


def in_flight(workers: int) -> int:
    """Requests that each of a model's workers holds at most."""
    return max(_LEAST_OF_A_WORKER, IN_FLIGHT // workers)


def install(folder: Path, *, wanted: bool) -> None:
    """Put the frontend's class where Java finds it first, or take away what an earlier server left there.

    Args:
        folder: TorchServe's current folder: the first place on its class path.
        wanted: Whether any model is served continuously.

    Raises:
        StartError: If the folder cannot be written.
    """
    target = folder / _CLASS
    try:
        shutil.rmtree(folder / Path(_CLASS).parts[0], ignore_errors=True)
        if wanted:
            target.parent.mkdir(parents=True)
            shutil.copyfile(_OURS, target)
    except OSError as error:
        raise StartError(f"{target} cannot be written ({error.strerror}); serve with --scheduling batches") from error


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


def _stock_class_sha256() -> str | None:
    """The digest of the class in the installed TorchServe; None where there is none."""
    package = importlib.util.find_spec("ts")
    if package is None or not package.submodule_search_locations:
        return None
    jar = Path(package.submodule_search_locations[0]) / "frontend" / "model-server.jar"
    try:
        with zipfile.ZipFile(jar) as source:
            return sha256([source.read(_CLASS)])
    except (OSError, KeyError, zipfile.BadZipFile):
        return None
