"""Carries a comparison out: in every round each system is started, loaded and ended, one after the other."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType

from deploy.ports import LOOPBACK
from loadtest.closed_loop import LoadJob
from loadtest.compare_archive import UnpackedArchive
from loadtest.compare_environment import PeerEnvironment
from loadtest.compare_errors import SystemStartError
from loadtest.compare_limit import Limit, measure_limit
from loadtest.compare_load import send_load
from loadtest.compare_plan import ComparePlan, usable_cores
from loadtest.compare_requests import is_file
from loadtest.compare_result import Comparison, Visit
from loadtest.compare_server import Model, serving
from loadtest.compare_stages import look, look_settled
from loadtest.compare_systems import TORCHPORT, System
from loadtest.errors import RunError
from loadtest.machine import describe_hardware
from loadtest.payloads import Payload

OnStep = Callable[[str, int], None]
"""Called with what happens next, and how many steps have been done since the last call."""

_VERSIONS = ("torch", "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "torchserve", "torchport")


class Run:
    """One comparison.

    Args:
        plan: What to do.
        archive: What torchport serves, unpacked.
        reference: What the peers serve, unpacked.
        bodies: Requests, the same for all.
        environment: Where the peers run; it holds their packages.
        on_step: Told of every step.
    """

    def __init__(
        self,
        plan: ComparePlan,
        archive: UnpackedArchive,
        reference: UnpackedArchive,
        bodies: Sequence[Payload],
        *,
        environment: PeerEnvironment,
        on_step: OnStep,
    ) -> None:
        self._plan = plan
        self._archive = archive
        self._reference = reference
        self._bodies = tuple(bodies)
        self._files = is_file(self._bodies[0])
        self._environment = environment
        self._on_step = on_step
        self._visits: list[Visit] = []
        self._failures: dict[str, str] = {}
        self._lost: list[str] = []
        self._limits: list[tuple[Limit, Limit]] = []

    def measure(self, *, requests: str, command: str) -> Comparison:
        """Goes through all rounds.

        Args:
            requests: Where the requests came from, in words.
            command: What repeats the comparison.

        Raises:
            RunError: The model cannot be run in process.
        """
        with bound_to_cores(self._plan.cores) as cores, ended_by_signals():
            for number in range(self._plan.rounds):
                self._measure_limits(number)
                for system in self._plan.order(number):
                    self._visit(system, number)
        return Comparison(
            plan=self._plan,
            visits=tuple(self._visits),
            failures=self._failures,
            lost=tuple(self._lost),
            limits=tuple(self._limits),
            archives=(self._archive.describe(), self._reference.describe()),
            requests=requests,
            bodies=len(self._bodies),
            files=self._files,
            cores=cores,
            measured_at=datetime.now(UTC),
            command=command,
            hardware=describe_hardware(),
            versions=self._versions(),
        )

    def _measure_limits(self, number: int) -> None:
        plan = self._plan
        self._on_step(f"round {number + 1} of {plan.rounds}: in-process limit", 0)
        both = [self._reference] if self._archive.path == self._reference.path else [self._reference, self._archive]
        try:
            limits = [
                measure_limit(
                    each.folder, self._bodies, threads=plan.threads, duration_s=plan.duration_s, seed=plan.seed
                )
                for each in both
            ]
            self._limits.append((limits[0], limits[-1]))
        except RunError as error:
            if not self._limits:  # nobody knows the right answers yet
                raise
            self._lost.append(f"in-process limit, round {number + 1}: {error}")
            self._limits.append(self._limits[-1])
        self._on_step("", 1)

    def _visit(self, system: System, number: int) -> None:
        """Starts a system, loads it with each number of users, and ends it; a failure is noted, not raised."""
        plan = self._plan
        steps = len(plan.users)
        if system.name in self._failures:  # it would cost minutes in every round
            self._on_step("", steps)
            return
        head = f"round {number + 1} of {plan.rounds}: {system.title}"
        self._on_step(f"{head} starts", 0)
        ours = system.name == TORCHPORT
        expected = self._limits[0][ours].expected
        model = Model(
            archive=self._archive.path,
            folder=self._reference.folder,
            name=self._archive.name,
            threads=plan.threads,
            workers=plan.workers,
            body=self._bodies[0],
            files=self._files,
            expected=expected[0],
        )
        try:
            with serving(system, model, self._environment.python if system.packages else None) as endpoint:
                usage = look(endpoint.processes(), endpoint.metrics_url)
                for users in plan.users:
                    self._on_step(f"{head}, {users} in flight", 0)
                    job = LoadJob(
                        host=LOOPBACK,
                        port=endpoint.port,
                        path=endpoint.path,
                        headers=endpoint.headers,
                        bodies=tuple(system.envelope(body, files=self._files) for body in self._bodies),
                        expected=expected,
                        users=users,
                        warm_up_s=plan.warm_up_s,
                        duration_s=plan.duration_s,
                        timeout_s=plan.timeout_s,
                        seed=plan.seed + number,
                    )
                    steps -= 1
                    try:
                        record = send_load(job)
                    except RunError as error:  # one turn; what the others have found, perhaps for hours, stays
                        self._lost.append(f"{system.title} at {users} in flight, round {number + 1}: {error}")
                        usage = look(endpoint.processes(), endpoint.metrics_url)
                    else:
                        before, usage = (
                            usage,
                            look_settled(
                                endpoint.processes(), endpoint.metrics_url, samples=usage.samples + record.sent
                            ),
                        )
                        cpu_ms, stages_ms = usage.since(before, record.sent)
                        visit = Visit(
                            system=system.name,
                            users=users,
                            round=number,
                            record=record,
                            cpu_ms=cpu_ms,
                            stages_ms=stages_ms,
                        )
                        self._visits.append(visit)
                    self._on_step("", 1)
        except SystemStartError as error:
            self._failures[system.name] = str(error)
            self._on_step("", steps)

    def _versions(self) -> dict[str, str]:
        own: dict[str, str] = {}
        for package in _VERSIONS:
            with contextlib.suppress(metadata.PackageNotFoundError):
                own[package] = metadata.version(package)
        peers = [name for system in self._plan.systems if system.packages for name in system.versions]
        return {**own, **self._environment.versions(peers)} if peers else own


@contextlib.contextmanager
def bound_to_cores(cores: int | None) -> Iterator[str]:
    """Binds this thread, and so every process that it starts, to the first so many cores; says what was done."""
    usable = usable_cores()
    if cores is None:
        yield f"servers and client share all {len(usable)} cores that this process may use; nothing is bound"
        return
    os.sched_setaffinity(0, usable[:cores])
    try:
        listed = ", ".join(map(str, usable[:cores]))
        yield f"servers and client are bound to {cores} of {len(usable)} usable cores: {listed}"
    finally:
        os.sched_setaffinity(0, usable)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into Ctrl-C: servers have sessions of their own, and would outlive us."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            if before[number] is not signal.SIG_IGN:  # which nohup sets
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def steps_of(plan: ComparePlan) -> int:
    """How many steps a progress bar has."""
    return plan.rounds * (1 + len(plan.systems) * len(plan.users))


def reports_folder(name: str) -> Path:
    """Where a comparison's report goes unless told otherwise."""
    return Path("reports") / f"{name}-compare"
