"""Classes of TorchServe's frontend that are ours, put where Java finds them before its own.

Two hand out requests in continuous serving (``frontend/Arrivals.java``, ``frontend/AsyncBatchAggregator.java``). Three
let the frontend answer what is in flight before it stops, in either way of serving (``frontend/ServerGroups.java``),
one answers broken forms with 400 (``frontend/ClientErrors.java``), two bound what uploads take of the frontend's memory
and time (``frontend/Uploads.java``, ``frontend/ModelQueues.java``), and one keeps the answers of a connection in the
order of its requests (``frontend/InOrder.java``). See docs/decisions/014.
"""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path

from deploy.errors import StartError
from handlers.digests import sha256

_PACKAGE = "org/pytorch/serve"
_AGGREGATOR = f"{_PACKAGE}/wlm/AsyncBatchAggregator.class"
# Of the classes that ours take the place of, in TorchServe 0.12.0. Any other release may call them differently.
_STOCK_SHA256 = {
    _AGGREGATOR: "aed0a24091f876e16c3138c335df25fca0380fb704212bc3b53f004c78111cf4",
    f"{_PACKAGE}/ServerInitializer.class": "096cdc16ec94359c5bafd0fddf4443e3d9a8c7656863d0b57bf1586fd2f8f700",
    f"{_PACKAGE}/util/ServerGroups.class": "8c4327920bcaae8e5f6a9f9b6ec5c028515e95752140a4c74e43ebe29db3ef65",
}
_ARRIVALS = f"{_PACKAGE}/wlm/Arrivals.class"
# All but those take nobody's place.
CLASSES = (
    *_STOCK_SHA256,
    _ARRIVALS,
    *(f"{_PACKAGE}/{name}.class" for name in ("wlm/ModelQueues", "Uploads", "InOrder", "ClientErrors", "Exchanges")),
)
CONTINUOUS_CLASSES = (_AGGREGATOR, _ARRIVALS)
_OURS = Path(__file__).parent / "frontend"


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
        if name in CONTINUOUS_CLASSES and not continuous:
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
