"""What a comparison is asked to do."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from loadtest.compare_systems import DEFAULT_PEERS, SYSTEMS, TORCHPORT, System
from loadtest.errors import PlanError

MOST_USERS = 1000
DEFAULT_USERS = (1, 64)
DEFAULT_ROUNDS = 5
DEFAULT_DURATION_S = 8.0
DEFAULT_WARM_UP_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparePlan:
    """One comparison.

    Attributes:
        archive: What torchport serves.
        reference: What the peers serve; the same archive, or the one that everybody else would run.
        peers: Names of the systems beside torchport.
        users: Requests in flight; each number is measured by itself.
        duration_s: Measured seconds a system, number of users and round.
        warm_up_s: Load before that, not counted: connections, caches and adaptive batching settle.
        rounds: How often every system takes its turn.
        threads: Threads of one batch, in all systems and in the limit.
        workers: Processes that compute, in all systems; the limit has one.
        cores: Cores for all of it, client included; None for all that this process may use.
        seed: Decides the generated requests and the order in which requests are sent.
        timeout_s: A request without an answer after this long has failed.
        max_error_share: Failed requests tolerated, as a share of all. The default allows one in a thousand.
        max_client_cpu: A measurement is invalid when the client used more of a core than this.
        max_stall_s: A measurement is invalid when the client stood still for longer: it was suspended, or starved.

    Raises:
        PlanError: A value is out of range.
    """

    archive: Path
    reference: Path
    peers: tuple[str, ...] = DEFAULT_PEERS
    users: tuple[int, ...] = DEFAULT_USERS
    duration_s: float = DEFAULT_DURATION_S
    warm_up_s: float = DEFAULT_WARM_UP_S
    rounds: int = DEFAULT_ROUNDS
    threads: int = 1
    workers: int = 1
    cores: int | None = None
    seed: int = 0
    timeout_s: float = 10.0
    max_error_share: float = 0.001
    max_client_cpu: float = 0.9
    max_stall_s: float = 1.0

    def __post_init__(self) -> None:
        for option, value in (
            ("--duration", self.duration_s),
            ("--rounds", self.rounds),
            ("--threads", self.threads),
            ("--workers", self.workers),
        ):
            if not (math.isfinite(value) and value > 0):
                raise PlanError(f"{option} is {value}: give a number greater than 0")
        if not (math.isfinite(self.warm_up_s) and self.warm_up_s >= 0):
            raise PlanError(f"--warm-up is {self.warm_up_s}: give zero or a positive number of seconds")
        if self.cores is not None:
            _check_cores(self.cores)

    @property
    def systems(self) -> tuple[System, ...]:
        """What is measured, torchport first."""
        return tuple(SYSTEMS[name] for name in (TORCHPORT, *self.peers))

    @property
    def packages(self) -> tuple[str, ...]:
        """What the peers' environment has to hold."""
        return tuple(package for system in self.systems for package in system.packages)

    @property
    def load_s(self) -> float:
        """Seconds of load altogether; starting the servers comes on top."""
        return self.rounds * len(self.systems) * len(self.users) * (self.warm_up_s + self.duration_s)

    def order(self, round_number: int) -> tuple[System, ...]:
        """The systems in the order of a round: there and back, so that nobody always follows the same one."""
        return self.systems if round_number % 2 == 0 else self.systems[::-1]


def parse_users(text: str) -> tuple[int, ...]:
    """Reads ``--users``: numbers with commas between them.

    Raises:
        PlanError: One is no number of users, or given twice.
    """
    words = [word.strip() for word in text.split(",")]
    good = all(word.isdigit() and 1 <= int(word) <= MOST_USERS for word in words)
    if not good or len(set(words)) < len(words):
        raise PlanError(
            f"--users {text!r}: give numbers of requests in flight from 1 to {MOST_USERS}, each once, like 1,64"
        )
    return tuple(sorted(int(word) for word in words))


def usable_cores() -> tuple[int, ...]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _check_cores(cores: int) -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise PlanError("--cores needs a system that can bind processes to cores, such as Linux: leave it out")
    if not 1 <= cores <= len(usable_cores()):
        raise PlanError(f"--cores is {cores}: give a number from 1 to {len(usable_cores())}, which may be used here")
