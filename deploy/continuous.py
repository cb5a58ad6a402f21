"""Continuous serving: TorchServe hands over every request at once, and the worker plans over all of them.

It takes three things that stock TorchServe with a stock archive does not have: the setting ``asyncCommunication``; the
worker's own loop, which archives carry (``handlers/continuous.py``); and a class of the frontend, without which
TorchServe 0.12.0 loses requests in this mode (``frontend_classes.py``). See docs/decisions/014.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from deploy.frontend_classes import is_known_release
from export.archive import CONFIG_FILE, Archive

# Requests that all workers of a model hold; what comes beyond them waits in the model's queue, which is bounded too.
IN_FLIGHT = 256
# One worker should not hold what another could have begun with, but enough to plan over.
_LEAST_OF_A_WORKER = 64

_WORKER_LOOP = "handlers/continuous.py"

# Ways of TorchServe to hand out requests that exclude ours. With tickets, it would refuse every request.
_OTHER_WAYS = ("useJobTicket", "continuousBatching", "sequenceBatching")


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


def in_flight(workers: int) -> int:
    """Requests that each of a model's workers holds at most."""
    return max(_LEAST_OF_A_WORKER, IN_FLIGHT // workers)


def settings(config: Mapping[str, Any], *, in_flight: int = IN_FLIGHT) -> dict[str, Any]:
    """The settings of a model that is served continuously.

    Args:
        config: Its model-config.yaml.
        in_flight: Requests that each worker holds at most.
    """
    section = dict(config.get("torchport") or {})
    section.setdefault("max_batch", config.get("batchSize") or 0)
    return {**config, "asyncCommunication": True, "batchSize": in_flight, "torchport": section}
