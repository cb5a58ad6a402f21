"""Where a running server's time goes: CPU time by process, and what torchport's workers say of their stages."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import psutil

from handlers.metrics import SAMPLES, STAGE_SECONDS

# Workers write their metrics once a second, and the frontend reads them off its log.
_SETTLE_S = 3.0
_POLL_S = 0.25
_LINE = re.compile(r"^(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
_STAGE = re.compile(r'stage="(\w+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a server has used since it was started.

    Attributes:
        cpu_s: CPU seconds, by the name of the process.
        stages_s: Seconds in each stage of torchport's workers; empty for others.
        samples: Samples that torchport's workers have computed; 0 for others.
    """

    cpu_s: dict[str, float]
    stages_s: dict[str, float]
    samples: float

    def since(self, earlier: "Usage", requests: int) -> tuple[dict[str, float], dict[str, float]]:
        """Milliseconds a request between two looks: of CPU time by process, and of each stage.

        Args:
            earlier: The first look.
            requests: How many were answered between them.
        """
        share = 1e3 / max(requests, 1)
        cpu_ms = {name: (spent - earlier.cpu_s.get(name, 0.0)) * share for name, spent in self.cpu_s.items()}
        stages_ms = {name: (spent - earlier.stages_s.get(name, 0.0)) * share for name, spent in self.stages_s.items()}
        return cpu_ms, stages_ms


def look(processes: Sequence[psutil.Process], metrics_url: str) -> Usage:
    """Looks once.

    Args:
        processes: The server's.
        metrics_url: Of torchport's metrics; empty for others.
    """
    cpu_s: Counter[str] = Counter()
    for process in processes:
        try:
            times = process.cpu_times()
            cpu_s[process.name()] += times.user + times.system  # type: ignore[assignment]  # Counter takes any number
        except psutil.Error:  # it has just ended
            continue
    stages_s, samples = _read_metrics(metrics_url)
    return Usage(cpu_s=dict(cpu_s), stages_s=stages_s, samples=samples)


def look_settled(processes: Sequence[psutil.Process], metrics_url: str, *, samples: float) -> Usage:
    """Looks when the metrics have caught up with the answers.

    Args:
        processes: The server's.
        metrics_url: Of torchport's metrics; empty for others, which are not waited for.
        samples: How many are to have been computed by now.
    """
    usage = look(processes, metrics_url)
    deadline_s = time.monotonic() + _SETTLE_S
    while metrics_url and usage.samples < samples and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        # The CPU time of the first look: waiting is no part of a request.
        stages_s, seen = _read_metrics(metrics_url)
        usage = Usage(cpu_s=usage.cpu_s, stages_s=stages_s, samples=seen)
    return usage


def parse_metrics(text: str) -> tuple[dict[str, float], float]:
    """Seconds by stage and the number of samples, out of a Prometheus page; all workers together."""
    stages: Counter[str] = Counter()
    samples = 0.0
    for name, labels, value in _LINE.findall(text):
        if name == f"{STAGE_SECONDS}_sum" and (stage := _STAGE.search(labels)):
            stages[stage.group(1)] += float(value)  # type: ignore[assignment]
        elif name == SAMPLES:
            samples += float(value)
    return dict(stages), samples


def _read_metrics(url: str) -> tuple[dict[str, float], float]:
    """What `parse_metrics` finds; a page that cannot be read costs the breakdown, not the measurement."""
    if not url:
        return {}, 0.0
    try:
        answer = httpx.get(f"{url}/metrics", timeout=_SETTLE_S, trust_env=False)
        return parse_metrics(answer.raise_for_status().text)
    except httpx.HTTPError:
        return {}, 0.0
