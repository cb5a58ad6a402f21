"""Which GPUs this process sees: a worker, none but its own.

What forgets to name a GPU means the first: a CUDA context there takes some hundred MiB, and a module that was traced on
``cuda:0`` makes its tensors there wherever its weights lie. Where there is one GPU to be seen, none of it can happen.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from handlers.errors import LoadError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def see_only(gpu: int, environment: MutableMapping[str, str]) -> None:
    """Let this process see one GPU, which is number 0 to it from then on.

    CUDA reads the environment once, when it is first asked for anything: this has to come before.

    Args:
        gpu: Its number among those that the process sees so far, from 0.
        environment: Of this process.

    Raises:
        LoadError: If there are fewer.
    """
    words = _visible(environment)
    if words is None:
        environment[VARIABLE] = str(gpu)
        return
    if gpu >= len(words):
        raise LoadError(
            f"this worker is to run on GPU {gpu}, and {VARIABLE} shows {len(words)}, numbered from 0; "
            f"correct deviceIds in model-config.yaml, number_of_gpu in config.properties or {VARIABLE}"
        )
    environment[VARIABLE] = words[gpu]


def gpu_name(index: int, environment: Mapping[str, str]) -> str:
    """What a GPU that this process numbers so is called outside of it.

    Args:
        index: From 0.
        environment: Of this process.
    """
    words = _visible(environment) or []
    return words[index] if index < len(words) else str(index)


def _visible(environment: Mapping[str, str]) -> list[str] | None:
    """The GPUs that the variable names, in order; None if it is not set."""
    value = environment.get(VARIABLE)
    if value is None:
        return None
    return [word.strip() for word in value.split(",")] if value.strip() else []
