"""Settings of a worker: those of the archive, and those of the environment that it runs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from handlers.backend import MOST_LANES
from handlers.document import Section
from handlers.errors import LoadError, SignatureError
from handlers.slots import MOST_SLOTS

SECTION = "torchport"
# By field: the least and the most that it may be.
_BOUNDS = {
    "threads": (1, 1024),
    "computing": (0, MOST_SLOTS),
    "max_batch": (0, 65536),
    "decoding": (0, 1024),
    "lanes": (0, MOST_LANES),
    "cuda_graphs": (0, 1),
    "gpu_memory_mib": (0, 1 << 24),
    "jpeg_on_gpu": (0, 1),
}
# TorchServe hands its own environment on to its workers; an archive is signed and cannot be changed where it serves.
_PREFIX = "TORCHPORT_"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """The ``torchport`` section of an archive's model-config.yaml.

    Attributes:
        threads: Intra-op threads of each worker. Never "all cores": workers share the machine.
        computing: How many of the model's workers compute at the same time; 0 for all of them.
        max_batch: Samples computed at once; 0 for as many as TorchServe's batches have requests.
        decoding: Threads of each worker that decode requests; 0 for one, and several where the model takes images.
        lanes: Batches of each worker that are under way at once, one of them computing; 0 for as many as the device has
            a use for: two on a GPU, one on a CPU.
        cuda_graphs: 0 for no CUDA graphs on a GPU, to find out what they change.
        gpu_memory_mib: The most of a GPU's memory that torch or ONNX Runtime may allocate in each worker; 0 for no
            limit.
        jpeg_on_gpu: 1 to decode JPEG files on the worker's GPU.
    """

    threads: int = 1
    computing: int = 0
    max_batch: int = 0
    decoding: int = 0
    lanes: int = 0
    cuda_graphs: int = 1
    gpu_memory_mib: int = 0
    jpeg_on_gpu: int = 0

    @classmethod
    def read(cls, config: Mapping[str, object] | None, environment: Mapping[str, str]) -> WorkerSettings:
        """Read the section, and what variables replace of it.

        Args:
            config: The whole of model-config.yaml.
            environment: ``TORCHPORT_THREADS`` and so on count, one for each setting.

        Raises:
            LoadError: If a setting is unknown, no number, or out of range.
        """
        variables = {f"{_PREFIX}{name.upper()}": name for name in _BOUNDS}
        given = {variable: _number(environment[variable]) for variable in variables if environment.get(variable)}
        try:
            root = Section(config or {}, "model-config.yaml")
            section = root.section(SECTION) if root.has(SECTION) else Section({}, SECTION)
            values = _integers(section, {name: name for name in _BOUNDS})
            section.finish()
            values |= _integers(Section(given, "environment"), variables)
        except SignatureError as error:
            raise LoadError(str(error)) from error
        return cls(**values)


def _integers(section: Section, names: Mapping[str, str]) -> dict[str, int]:
    """The settings that a section has, by their own names."""
    found = {}
    for key, name in names.items():
        if section.has(key):
            minimum, maximum = _BOUNDS[name]
            found[name] = section.integer(key, minimum=minimum, maximum=maximum)
    return found


def _number(text: str) -> int | str:
    """A whole number, or the text itself, which is then refused with its name."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text
