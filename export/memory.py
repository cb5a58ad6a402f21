"""Memory of an artifact: what a fresh process needs to load it and run it.

The process (``python -m export.memory``) imports what a worker's handlers import and nothing else of torchport, so a
format that needs no torch is not charged for it. It is also the first process but the exporter's own that runs the
artifact: one that only works where it was made fails here.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import MeasurementError
from export.fresh_process import run_in_fresh_process
from handlers.errors import one_line
from handlers.model import SIGNATURE_FILE, ServedModel
from handlers.tensors import TensorBatch

ANSWER_FILE = "memory.json"
_BATCH_FILE = "memory-{}.npz"
_KIB = 1024
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What a process needed.

    Attributes:
        peak_bytes: The most main memory that was resident (``VmHWM``) while it loaded the artifact and ran it on every
            batch, once each with one thread. Python, the runtime's libraries and the batches are in it.
        before_bytes: What was resident before it loaded anything: Python, numpy and the handlers.
        gpu_bytes: By how much the GPU's free memory fell meanwhile, a bare CUDA context not counted; None on a CPU.
            Other processes on the same GPU falsify it.
    """

    peak_bytes: int
    before_bytes: int
    gpu_bytes: int | None = None

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def measure_memory(folder: Path, batches: Sequence[TensorBatch]) -> Memory:
    """Load an artifact in a new process and run it.

    Args:
        folder: A candidate's folder: artifact and signature. Nothing is left in it.
        batches: What to run it on.

    Raises:
        MeasurementError: If it does not load or run there.
    """
    folder = folder.resolve()
    files = [folder / _BATCH_FILE.format(i) for i in range(len(batches))]
    try:
        for file, batch in zip(files, batches, strict=True):
            with file.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **batch)
        answer = run_in_fresh_process(
            "export.memory",
            folder,
            ANSWER_FILE,
            what="a fresh process that runs it",
            error=MeasurementError,
            arguments=[str(len(files))],
        )
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    if "error" in answer:
        raise MeasurementError(f"it fails in a fresh process: {answer['error']}")
    return Memory(**answer)


def main() -> None:
    """Answer one request of :func:`measure_memory` about the current folder."""
    folder = Path.cwd()
    batches = [_read(folder / _BATCH_FILE.format(i)) for i in range(int(sys.argv[1]))]
    answer: dict[str, Any]
    try:
        answer = _run(folder, batches).to_document()
    except Exception as error:  # runtimes raise types of their own
        answer = {"error": one_line(error)}
    (folder / ANSWER_FILE).write_text(json.dumps(answer), encoding="utf-8")


def _run(folder: Path, batches: Sequence[TensorBatch]) -> Memory:
    on_gpu = json.loads((folder / SIGNATURE_FILE).read_bytes())["artifact"]["device"] == "cuda"
    free_before = _free_gpu_bytes() if on_gpu else 0
    before = _resident_bytes("VmRSS")
    served = ServedModel.load(folder, threads=1)
    for batch in batches:
        served.backend.run(batch)
    return Memory(
        peak_bytes=_resident_bytes("VmHWM"),
        before_bytes=before,
        gpu_bytes=max(0, free_before - _free_gpu_bytes()) if on_gpu else None,
    )


def _read(path: Path) -> TensorBatch:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _resident_bytes(field: str) -> int:
    # Not getrusage, where there is a choice: a process inherits the peak of the one that started it.
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * _KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else _KIB)


def _free_gpu_bytes() -> int:
    import torch  # noqa: PLC0415  # only GPUs need it here

    return int(torch.cuda.mem_get_info()[0])


if __name__ == "__main__":
    main()
