"""The Locust users. Runs only inside the subprocess that `loadtest.run` starts, never in torchport's own.

Two users, of which a run picks one:

* `OpenLoopUser`, one per process, sends at planned times and never waits for an answer before the next request.
  Latency counts from the planned send: when the server (or this client) stalls, every request that should have
  been sent meanwhile shows the wait, which timing from the actual send would hide (coordinated omission).
* `ClosedLoopUser`, many per process, each sends its next request when the last was answered. There is no planned
  send, so this measures capacity, not latency.
"""

import json
import os
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import gevent
import psutil
from gevent.pool import Group
from locust import FastHttpUser, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from loadtest.answers import IN_FLIGHT_LIMIT, Fault, check_answer, judge_failure
from loadtest.files import write_atomically
from loadtest.job import JOB_VARIABLE, Job
from loadtest.payloads import Payload
from loadtest.recorder import Recorder
from loadtest.schedule import poisson_arrivals


class Session:
    """What the users of one load process share: the job, the clock, the recorder.

    Args:
        job: What to do.
        index: Number of this load process, from 0.
    """

    def __init__(self, job: Job, *, index: int) -> None:
        plan = job.plan
        self.job = job
        self.plan = plan
        self.index = index
        self.start_s = time.perf_counter()
        self.end_s = self.start_s + plan.total_s
        self.recorder = Recorder(
            start_s=self.start_s,
            warm_up_s=plan.warm_up_s,
            duration_s=plan.duration_s,
            interval_s=plan.interval_s,
            late_s=plan.max_send_lag_ms / 1e3,
        )
        self.random = random.Random(f"payloads/{plan.seed}/{index}")
        self._cpu_meter = gevent.spawn(self._measure_cpu)
        self._crash: BaseException | None = None

    def pick_payload(self) -> Payload:
        """The next request body."""
        return self.random.choice(self.job.payloads)

    def _measure_cpu(self) -> float:
        """Share of one core that this process uses during the measured window."""
        process = psutil.Process()
        gevent.sleep(self.plan.warm_up_s)
        wall_s, used_s = time.perf_counter(), sum(process.cpu_times()[:2])
        gevent.sleep(self.plan.duration_s)
        return float((sum(process.cpu_times()[:2]) - used_s) / (time.perf_counter() - wall_s))

    def note_crash(self, request: gevent.Greenlet) -> None:
        """Remembers that a request ended in a defect of ours and was not counted."""
        self._crash = request.exception

    def write_record(self) -> None:
        """Leaves this process's tally in the results folder, unless a request was lost from it."""
        if self._crash is not None:
            raise self._crash
        self.recorder.tally.cpu_shares.append(self._cpu_meter.get())
        path = self.job.results / f"{self.index}.json"
        write_atomically(path, json.dumps(self.recorder.tally.to_json()).encode())


@cache
def read_job() -> Job:
    """The job of this run."""
    return Job.read(Path(os.environ[JOB_VARIABLE]))


@cache
def _session(index: int) -> Session:
    return Session(read_job(), index=index)


def open_session(environment: Environment) -> Session:
    """The session of this load process; its clock starts with the first user that asks."""
    runner = environment.runner
    if not isinstance(runner, LocalRunner | WorkerRunner):
        raise TypeError(f"{runner!r} sends no load")
    return _session(runner.worker_index)


@events.test_stop.add_listener  # type: ignore[untyped-decorator]  # Locust leaves its hooks untyped
def write_record(environment: Environment, **_: Any) -> None:
    """Locust's signal that every user of this process has finished."""
    if not isinstance(environment.runner, MasterRunner):
        open_session(environment).write_record()


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def set_exit_code(environment: Environment, **_: Any) -> None:
    """Failed requests are results; only a defect in a user makes the run itself fail."""
    if environment.runner is not None:
        environment.process_exit_code = 1 if environment.runner.exceptions else 0


class PredictionUser(FastHttpUser):
    """Sends prediction requests and checks every answer."""

    abstract = True
    insecure = False  # check certificates: the requests carry a token
    max_redirects = 0

    def __init__(self, environment: Environment) -> None:
        plan = read_job().plan
        self.connection_timeout = self.network_timeout = plan.timeout_s
        # A pool smaller than the requests in flight would make them queue in the client.
        self.concurrency = plan.max_in_flight
        super().__init__(environment)

    def on_start(self) -> None:
        """Locust's hook for a new user."""
        self.session = open_session(self.environment)

    def send(self, payload: Payload, *, planned_s: float | None) -> None:
        """Sends one request, checks the answer and records it.

        Args:
            payload: What to send.
            planned_s: When it should be sent, on the clock of `time.perf_counter`; None for now.
        """
        job = self.session.job
        headers = {"Content-Type": payload.content_type}
        if job.token:
            headers["Authorization"] = f"Bearer {job.token}"
        sent_s = time.perf_counter()
        try:
            # The client's own time-out restarts with every packet; this one bounds the whole request.
            with gevent.Timeout(job.plan.timeout_s, TimeoutError(f"no answer in {job.plan.timeout_s:g} s")):
                # catch_response only keeps Locust from reporting the request before the answer is checked.
                response = self.client.post(
                    job.plan.path,
                    data=payload.body,  # type: ignore[arg-type]  # bytes are sent as they are
                    headers=headers,
                    catch_response=True,
                )
                status, body = response.status_code, response.content or b""
        except Exception as error:  # whatever the HTTP client raises, this request failed and must be counted
            fault: Fault | None = judge_failure(error)
        else:
            if status:
                fault = check_answer(status=status, body=body, expected_label=payload.expected_label)
            else:
                fault = judge_failure(response.request_meta["exception"])
        self.finish(planned_s=sent_s if planned_s is None else planned_s, sent_s=sent_s, fault=fault)

    def finish(self, *, planned_s: float, sent_s: float | None, fault: Fault | None) -> None:
        """Records a finished request, for us and in Locust's own statistics, which then tell the same story."""
        done_s = time.perf_counter()
        self.session.recorder.record(planned_s=planned_s, sent_s=sent_s, done_s=done_s, fault=fault)
        self.environment.events.request.fire(
            request_type="POST",
            name=self.session.plan.model,
            response_time=(done_s - planned_s) * 1e3,
            response_length=0,
            exception=None if fault is None else fault.kind,
            context={},
        )


class ClosedLoopUser(PredictionUser):
    """Sends the next request as soon as the last one is answered."""

    @task
    def send_next(self) -> None:
        """One request."""
        if time.perf_counter() >= self.session.end_s:
            raise StopUser
        self.send(self.session.pick_payload(), planned_s=None)


class OpenLoopUser(PredictionUser):
    """Sends at planned times, whatever the server does. One per process."""

    @task
    def send_all(self) -> None:
        """Every request of this process, from the first planned send to the last answer."""
        session, plan = self.session, self.session.plan
        arrivals = poisson_arrivals(
            rate_rps=plan.process_rate_rps,
            duration_s=plan.total_s,
            seed=plan.seed,
            stream=session.index,
        )
        in_flight = Group()
        for offset_s in arrivals:
            planned_s = session.start_s + offset_s
            # Also when late: without a pause no request in flight would ever be served.
            gevent.sleep(max(0.0, planned_s - time.perf_counter()))
            payload = session.pick_payload()
            if len(in_flight) * plan.processes < plan.max_in_flight:
                in_flight.spawn(self.send, payload, planned_s=planned_s).link_exception(session.note_crash)
            else:
                # No place among those in flight: a failed request, never a skipped one.
                detail = f"{plan.max_in_flight} requests were waiting already"
                self.finish(planned_s=planned_s, sent_s=None, fault=Fault(IN_FLIGHT_LIMIT, detail))
        in_flight.join()
        raise StopUser
