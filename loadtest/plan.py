"""What a load test is asked to do."""

import math
import shlex
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from loadtest.errors import PlanError

# One process holds at most this many connections: its client checks idle sockets with select(), which refuses
# file descriptors from 1024 on.
MAX_IN_FLIGHT_PER_PROCESS = 1000
MAX_INTERVALS = 600
DEFAULT_MAX_SEND_LAG_MS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One load test.

    Attributes:
        model: Name of the model as the server knows it.
        url: Where the server answers predictions, e.g. http://127.0.0.1:8080.
        rate_rps: Open loop: mean requests per second over all processes; None for a closed loop.
        users: Closed loop: requests kept in flight; None for an open loop.
        duration_s: Length of the measured window.
        warm_up_s: Load sent before the window and not counted: connections, caches and batching settle.
        slo_p99_ms: Latency that 99 % of the requests must meet; None when there is no objective.
        processes: Load processes, one core each at most.
        seed: Decides the arrivals and the order of the payloads.
        timeout_s: A request without an answer after this long has failed.
        max_in_flight: Open loop: requests that may wait at once. One more counts as failed, it is never skipped.
        max_error_share: Failed requests tolerated, as a share of all. The default allows one in a thousand.
        max_send_lag_ms: The measurement is invalid when 1 % of the requests left later than planned by more.
        max_client_cpu: The measurement is invalid when a load process used more of its core than this.

    Raises:
        PlanError: A value is out of range or two exclude each other.
    """

    model: str
    url: str
    rate_rps: float | None = None
    users: int | None = None
    duration_s: float = 30.0
    warm_up_s: float = 2.0
    slo_p99_ms: float | None = None
    processes: int = 1
    seed: int = 0
    timeout_s: float = 10.0
    max_in_flight: int = MAX_IN_FLIGHT_PER_PROCESS
    max_error_share: float = 0.001
    max_send_lag_ms: float = DEFAULT_MAX_SEND_LAG_MS
    max_client_cpu: float = 0.9

    def __post_init__(self) -> None:
        if (self.rate_rps is None) == (self.users is None):
            raise PlanError(
                "give exactly one of --rate (open loop, for latency) and --users (closed loop, for capacity)"
            )
        check_url(self.url)
        _require_positive("--rate", self.rate_rps)
        _require_positive("--users", self.users)
        _require_positive("--duration", self.duration_s)
        _require_positive("--processes", self.processes)
        _require_positive("--slo-p99-ms", self.slo_p99_ms)
        _require_positive("--max-send-lag-ms", self.max_send_lag_ms)
        if not (math.isfinite(self.warm_up_s) and self.warm_up_s >= 0):
            raise PlanError(f"--warm-up is {self.warm_up_s}: give zero or a positive number of seconds")
        if self.users is not None and self.users < self.processes:
            raise PlanError(
                f"--processes {self.processes} is more than --users {self.users}: each process needs a user"
            )
        in_flight = self.max_in_flight if self.users is None else self.users
        if math.ceil(in_flight / self.processes) > MAX_IN_FLIGHT_PER_PROCESS:
            raise PlanError(
                f"{in_flight} requests in flight are too many for {self.processes} load process(es): "
                f"allow at least one process per {MAX_IN_FLIGHT_PER_PROCESS} with --processes"
            )

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent at planned times, whatever the server does."""
        return self.rate_rps is not None

    @property
    def process_rate_rps(self) -> float:
        """Open loop: each load process's part of the rate."""
        if self.rate_rps is None:
            raise PlanError("a closed loop has no rate")
        return self.rate_rps / self.processes

    @property
    def total_s(self) -> float:
        """Warm-up and measured window together, in seconds."""
        return self.warm_up_s + self.duration_s

    @property
    def interval_s(self) -> float:
        """Width of one point in the plots over time: a second, or more so that a long run stays readable."""
        return max(1.0, math.ceil(self.duration_s / MAX_INTERVALS))

    @property
    def path(self) -> str:
        """Path of the prediction endpoint on the server."""
        return prediction_path(self.model)

    @property
    def command(self) -> str:
        """A command line that repeats this test; it never holds a token."""
        words = ["torchport", "loadtest", self.model]
        words += ["--rate", f"{self.rate_rps:g}"] if self.rate_rps is not None else ["--users", str(self.users)]
        words += ["--duration", f"{self.duration_s:g}", "--warm-up", f"{self.warm_up_s:g}"]
        words += ["--processes", str(self.processes), "--seed", str(self.seed), "--url", self.url]
        words += [] if self.slo_p99_ms is None else ["--slo-p99-ms", f"{self.slo_p99_ms:g}"]
        words += (
            []
            if self.max_send_lag_ms == DEFAULT_MAX_SEND_LAG_MS
            else ["--max-send-lag-ms", f"{self.max_send_lag_ms:g}"]
        )
        return shlex.join(words)


def prediction_path(model: str) -> str:
    """Path of a model's prediction endpoint."""
    return f"/predictions/{quote(model, safe='')}"


def check_url(url: str) -> None:
    """Refuses what is not the base address of an HTTP server.

    Raises:
        PlanError: The scheme is not http(s), or there is no host, or the port is no port.
    """
    parts = urlsplit(url)
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # urlsplit reads the port only when asked for it
        usable = False
    if not usable:
        raise PlanError(f"--url {url!r} is not the address of a server: give one like http://127.0.0.1:8080")


def _require_positive(option: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise PlanError(f"{option} is {value}: give a number greater than 0")
