"""Limits: how much one request may ask for, and how much one answer may hold.

TorchServe has limits of its own, which say nothing: a request beyond ``max_request_size`` gets an empty 413, and an
answer beyond ``max_response_size`` kills the worker with every request that it holds. So ours lie below them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from handlers.errors import TooLargeError

MAX_REQUEST_BYTES = 16 << 20
MAX_SAMPLES_PER_REQUEST = 256
# All of a text is cut into tokens, at some 1 MB/s, before it is cut off: a long one would keep its neighbours waiting.
MAX_TEXT_CHARS = 100_000
# Of all texts of a request together: less than a second.
MAX_REQUEST_CHARS = 8 * MAX_TEXT_CHARS
# An empty list has 2 bytes in JSON and 56 in memory, and the garbage collector walks through all of them again and
# again: 16 MiB of them take 2.4 s, this many 0.2 s.
MAX_JSON_LISTS = 1 << 20
# What TorchServe allows when its configuration does not say max_response_size.
DEFAULT_MAX_ANSWER_BYTES = 6_553_500

_SETTING = re.compile(r"^[ \t]*(max_response_size|enable_envvars_config)[ \t]*[=: \t][ \t]*(\S+)[ \t]*$", re.MULTILINE)
_SERVER = "org.pytorch.serve.ModelServer"
_ENVIRONMENT_VARIABLE = "TS_MAX_RESPONSE_SIZE"


def too_many_samples(count: int, max_samples: int) -> TooLargeError:
    """The error for a request with more samples than allowed."""
    return TooLargeError(
        "too_many_samples", f"The request holds {count} samples; send at most {max_samples} in one request."
    )


def check_answer_size(body: bytes, max_bytes: int) -> None:
    """Refuse an answer that TorchServe would kill the worker for.

    Raises:
        TooLargeError: If it has more bytes than the server takes from a worker.
    """
    if len(body) > max_bytes:
        raise TooLargeError(
            "answer_too_large",
            f"The answer has {len(body)} bytes; the limit is {max_bytes}; "
            "send fewer or smaller samples in one request, or have max_response_size raised in config.properties.",
        )


def max_answer_bytes(
    *,
    process: int | None = None,
    processes: Path = Path("/proc"),
    environment: Mapping[str, str] = os.environ,
) -> int:
    """The longest answer that the TorchServe above this worker takes.

    TorchServe does not tell its workers, so this reads the configuration file that the parent's command line names.

    Args:
        process: Number of the process that may be TorchServe; None for the parent.
        processes: Where the system describes its processes.
        environment: Environment variables, which may override the file's settings.

    Returns:
        Bytes. TorchServe's own default when the parent is something else, as in tests, or cannot be read.
    """
    folder = processes / str(os.getppid() if process is None else process)
    try:
        arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        if _SERVER not in arguments:
            return DEFAULT_MAX_ANSWER_BYTES
        text = (folder / "cwd" / _configuration_file(arguments)).read_text(encoding="latin-1")  # as Java does
    except OSError:
        return DEFAULT_MAX_ANSWER_BYTES
    settings = dict(_SETTING.findall(text))  # the last one counts, as for Java
    if settings.get("enable_envvars_config") == "true" and _ENVIRONMENT_VARIABLE in environment:
        settings["max_response_size"] = environment[_ENVIRONMENT_VARIABLE]
    try:
        return int(settings.get("max_response_size", DEFAULT_MAX_ANSWER_BYTES))
    except ValueError:
        return DEFAULT_MAX_ANSWER_BYTES


def _configuration_file(arguments: Sequence[str]) -> str:
    """What follows ``-f`` on the command line of TorchServe's Java process, or the file that it reads without one."""
    return arguments[arguments.index("-f") + 1] if "-f" in arguments[:-1] else "config.properties"
