"""Which GPUs TorchServe gives to which workers: how many there are to give, and in which order each model gets them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.gpu import read_gpus_in_time
from handlers.model import SIGNATURE_FILE

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

_PLACE = "gpuId::"
# With them an archive says itself where its workers run.
_OWN_PLACE = ("deviceIds", "parallelType", "parallelLevel")


class Placement:
    """Gives GPUs to models in turn, so that the workers of each, and those of all together, are spread evenly.

    By itself TorchServe 0.12 counts on over all models, and first starts one worker of each: of two models with two
    workers on two GPUs, both workers of the first would be on one GPU, and both of the second on the other.

    Args:
        gpus: To give, at least one.
        workers: Of every model; None for each archive's own number.
    """

    def __init__(self, gpus: int, workers: int | None) -> None:
        self._workers = workers
        # Of the models so far, by GPU.
        self._placed = [0] * gpus

    def place_next(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Place the workers of the next model: those that begin get the GPUs with the fewest workers so far.

        Args:
            config: Its model-config.yaml.

        Returns:
            The same with the order in which its workers get the GPUs. One that says itself where the workers run is
            left as it is, and what it names is counted.
        """
        if any(config.get(key) for key in _OWN_PLACE):
            self._count(config, config.get("deviceIds") or [])
            return dict(config)
        order = sorted(range(len(self._placed)), key=self._placed.__getitem__)
        self._count(config, order)
        return {**config, "deviceIds": order}

    def _count(self, config: Mapping[str, Any], order: Sequence[Any]) -> None:
        """Count a model's workers, which get the GPUs of an order in turn."""
        if not order or any(gpu not in range(len(self._placed)) for gpu in order):  # TorchServe ignores such an order
            return
        for worker in range(self._workers or config.get("minWorkers") or 1):
            self._placed[order[worker % len(order)]] += 1


def runs_on_gpu(archive: Path) -> bool:
    """Whether an archive is one for GPUs; one that cannot be read is for TorchServe to refuse."""
    try:
        with zipfile.ZipFile(archive) as opened:
            document = json.loads(opened.read(SIGNATURE_FILE))
        return bool(document["artifact"]["device"] == "cuda")
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError):
        return False


def usable_gpus(environment: Mapping[str, str]) -> int:
    """How many GPUs CUDA shows to a process with this environment.

    Raises:
        ValueError: If the variable names GPUs otherwise than by numbers: TorchServe 0.12 does not start then.
        TimeoutError: If their driver does not answer.
    """
    visible = environment.get(VISIBLE_DEVICES)
    if visible is None:
        return len(read_gpus_in_time())
    words = [word.strip() for word in visible.split(",")] if visible.strip() else []
    if any(not word.removeprefix("-").isdecimal() for word in words):
        raise ValueError(f"{VISIBLE_DEVICES} is {visible!r}")
    present = len(read_gpus_in_time())
    usable = 0
    for word in words:  # CUDA stops at the first that is not there
        if not 0 <= int(word) < present:
            break
        usable += 1
    return usable


def gpu_of(worker: Mapping[str, Any]) -> int | None:
    """The GPU that TorchServe gave to a worker.

    Args:
        worker: One of the ``workers`` that its management API lists.

    Returns:
        A number from 0 among the GPUs that CUDA shows; None if the worker has none, or TorchServe does not say.
    """
    if not worker.get("gpu"):
        return None
    word = str(worker.get("gpuUsage", "")).partition(_PLACE)[2].split(maxsplit=1)
    return int(word[0]) if word and word[0].isdecimal() else None


def in_words(workers: Sequence[Mapping[str, Any]]) -> str:
    """Where a model's workers run, in words; empty if none of them is known to run on a GPU."""
    places: dict[int, int] = {}
    for worker in workers:
        gpu = gpu_of(worker)
        if gpu is not None:
            places[gpu] = places.get(gpu, 0) + 1
    return ", ".join(
        f"{number} worker{'s' if number > 1 else ''} on GPU {gpu}" for gpu, number in sorted(places.items())
    )
