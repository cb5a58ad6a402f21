"""The continuous worker: plans over every request in flight, and answers each as soon as it is computed.

In TorchServe's usual way a worker holds one batch: it waits for a batch to fill, and the next one waits for the last
answer of this one. With ``asyncCommunication`` the frontend hands over every request at once. Where computing takes
long, three threads share the work here: one reads and decodes, one computes (outside of Python, so the others run
meanwhile), one answers; images, which take long to decode, have threads of their own for it; and for a GPU there are
two that compute, so that one batch is brought to it and back while the other is computed. Where computing takes next to
nothing, one thread does all in turn: passing Python's lock between them would cost more than the work itself.

TorchServe's own loop for it (``ts.async_service``, 0.12.0) copies its context and prints for every message, takes one
message at a time, and passes each through four threads; this takes its place. See docs/decisions/014.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from handlers.backlog import Backlog
from handlers.batch_runner import Row
from handlers.deadline import deadline
from handlers.decoder import Decoded
from handlers.errors import OverloadedError, RequestError, defect
from handlers.frames import Frame, FrameReader, Reply
from handlers.metrics import STAGE_SECONDS
from handlers.model import Answer, ServedModel, error_answer
from handlers.planner import MOST_PLANNED
from handlers.preemption import interrupt_nobody, interrupt_others
from handlers.request import Part
from handlers.room import Room
from handlers.tensors import TensorBatch

logger = logging.getLogger("torchport")

KNOWN_RELEASE = "0.12.0"

_RECEIVED_BYTES = 1 << 18
# Of Python's lock, between the three threads. By default, a thread that comes back from computing waits up to 5 ms.
_SWITCH_INTERVAL_S = 0.0001
_WATCH_S = 1.0
# Of the bodies and samples that a worker holds; what comes beyond them waits in the frontend.
_MOST_HELD_BYTES = 512 << 20
# Answers that go out in one system call.
_MOST_ANSWERS = 64
# By the thread that computes, itself.
_MOST_ANSWERED_AT_ONCE = 2


@dataclass(slots=True)
class _Held:
    """A request that is not answered yet.

    Attributes:
        frame: As it came.
        decoded: Its samples.
        arrived: On the monotonic clock.
        deadline: On the same; infinite when the client named none.
        rows: One a sample, as far as they are computed.
        missing: Samples that are not computed yet.
        size: Bytes that its samples take.
    """

    frame: Frame
    decoded: Decoded
    arrived: float
    deadline: float
    rows: list[Row | None] = field(default_factory=list)
    missing: int = 0
    size: int = 0


_Places = list[tuple[_Held, int]]
_Batch = tuple[_Places, list[TensorBatch]]
_Computed = tuple[Sequence[tuple[_Held, int]], Sequence[Row]]


class ContinuousWorker:
    """Answers what comes over a connection until it is closed.

    Args:
        model: Warmed up.
        connection: To TorchServe's frontend.
        parts: Makes a request's parts of its fields and headers.
        encode: Makes the reply of an answer.
        response_timeout_s: A request or a batch that takes longer to decode or to compute ends the process: the
            frontend then answers what it held and starts another.
        pipelined: Whether to decode, to compute and to answer in threads of their own.
        lanes: Threads that compute, where there are threads: see :attr:`handlers.backend.Backend.lanes`.
    """

    def __init__(
        self,
        model: ServedModel,
        connection: socket.socket,
        *,
        parts: Callable[[Frame], list[Part]],
        encode: Callable[[Answer, Frame], Reply],
        response_timeout_s: float,
        pipelined: bool = True,
        lanes: int = 1,
    ) -> None:
        self._model = model
        self._connection = connection
        self._parts = parts
        self._encode = encode
        self._response_timeout_s = response_timeout_s
        self._pipelined = pipelined
        self._lanes = lanes
        self._arrived = threading.Condition()
        self._waiting: deque[_Held] = deque()
        # What the threads that compute have taken over of it.
        self._backlog: Backlog[tuple[_Held, int]] = Backlog(model.plan_in_turn)
        self._planning = threading.Lock()
        self._finished = threading.Condition()
        self._computed: deque[_Computed | tuple[Frame, Answer]] = deque()
        self._sending = threading.Lock()
        self._room = Room(_MOST_HELD_BYTES)
        # By thread, when it began with the request that it decodes.
        self._decoding: dict[int, float] = {}
        # By thread, when the batch that it computes should be done.
        self._done_at: dict[int, float] = {}
        self._closed = False
        self._ended = threading.Event()

    def run(self) -> None:
        """Answer until the frontend closes the connection; its threads end then, and the process may."""
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        for job in (self._read, self._answer, self._watch) if self._pipelined else (self._watch,):
            self._begin(job)
        # One more computes in this thread.
        computing = [self._begin(self._compute_beside) for _ in range(self._lanes - 1)] if self._pipelined else []
        self._guarded(self._compute if self._pipelined else self._take_turns)
        for thread in computing:
            thread.join()
        self._ended.set()
        with self._finished:
            self._finished.notify()

    def _begin(self, job: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._beside, args=(job,), name=f"torchport{job.__name__}", daemon=True)
        thread.start()
        return thread

    def _beside(self, job: Callable[[], None]) -> None:
        interrupt_nobody()
        self._guarded(job)

    def _guarded(self, job: Callable[..., None], *given: object) -> None:
        """A thread that dies would leave clients waiting: the process goes with it, and the frontend notices."""
        try:
            job(*given)
        except BaseException:
            logger.critical("the worker ends: a defect in%s", job.__name__.replace("_", " "), exc_info=True)
            os._exit(1)

    def _read(self) -> None:
        reader = FrameReader()
        while chunk := self._receive():
            self._hand_on(reader.feed(chunk))
            del chunk  # or it would stay in memory until the next one comes
        with self._arrived:
            self._closed = True
            self._arrived.notify()

    def _hand_on(self, frames: Sequence[Frame]) -> None:
        """To whoever decodes."""
        for frame in frames:
            size = _size(frame)
            self._room.enter(size)
            if self._model.decoders is None:
                self._take_in(frame, size)
            else:
                self._model.decoders.submit(self._guarded, self._take_in, frame, size)

    def _take_turns(self) -> None:
        """Take in what has arrived, compute it, and again."""
        reader = FrameReader()
        while chunk := self._receive():
            self._serve(reader.feed(chunk))
            del chunk  # as in reading

    def _serve(self, frames: Sequence[Frame]) -> None:
        """Take requests in, and compute all of them."""
        for frame in frames:
            size = _size(frame)
            self._room.change(0, size)
            self._take_in(frame, size)
            # The rest of a chunk waits, where this much has no room.
            while self._room.is_full and self._waiting:
                self._compute_round()
        while self._waiting:
            self._compute_round()

    def _receive(self) -> bytes:
        """What has arrived, or will as the next; nothing once the frontend is gone."""
        try:
            return self._connection.recv(_RECEIVED_BYTES)
        except OSError:  # the frontend was killed
            return b""

    def _take_in(self, frame: Frame, size: int) -> None:
        arrived, began = time.monotonic(), time.perf_counter()
        thread = threading.get_ident()
        self._decoding[thread] = arrived
        decoded = self._decoded(frame)
        del self._decoding[thread]
        self._model.meter.observe(STAGE_SECONDS, time.perf_counter() - began, (("stage", "decode"),))
        if isinstance(decoded, RequestError):
            self._room.leave(size)
            self._give_out((frame, error_answer(decoded)))
            return
        count = len(decoded.samples)
        taken = sum(array.nbytes for sample in decoded.samples for array in sample.values())
        self._room.change(size, taken)
        # Without its body, which the samples were made of.
        kept = Frame(frame.id, {}, dict.fromkeys(frame.fields, b""))
        gives_up = deadline(frame.headers, arrived)
        held = _Held(kept, decoded, arrived, gives_up, rows=[None] * count, missing=count, size=taken)
        with self._arrived:
            self._waiting.append(held)
            self._arrived.notify()

    def _decoded(self, frame: Frame) -> Decoded | RequestError:
        try:
            return self._model.read(self._parts(frame))
        except Exception as error:  # our own defect, and still one request's alone
            return defect("request_failed", "The server failed to read this request.", error)

    def _compute_beside(self) -> None:
        interrupt_others()
        self._model.warm_up_beside()
        self._compute()

    def _compute(self) -> None:
        """Batch after batch, until there is nothing more to come."""
        while (batch := self._next_batch()) is not None:
            self._run(*batch)
            del batch  # not until the next request comes

    def _next_batch(self) -> _Batch | None:
        """One that no other thread has; all that has arrived by then counts."""
        with self._planning:
            with self._arrived:
                while not (self._waiting or self._backlog):
                    if self._closed:
                        return None
                    self._arrived.wait()
                arrived = list(self._waiting)
                self._waiting.clear()
            for held in arrived:
                for i, sample in enumerate(held.decoded.samples):
                    self._backlog.add((held, i), sample, held.arrived)
            return self._backlog.take(time.monotonic())

    def _compute_round(self) -> None:
        """Plan over what has arrived, and run batch after batch: what comes meanwhile is not read before."""
        places = [(held, i) for held in self._next_round() for i in range(len(held.decoded.samples))]
        samples = [held.decoded.samples[i] for held, i in places]
        for indices in self._model.plan(samples):
            self._run([places[i] for i in indices], [samples[i] for i in indices])

    def _next_round(self) -> list[_Held]:
        """The oldest requests, as many as can be planned well; what comes later waits for no more than these."""
        round_ = [self._waiting.popleft()]
        samples = len(round_[0].decoded.samples)
        while self._waiting and samples + len(self._waiting[0].decoded.samples) <= MOST_PLANNED:
            samples += len(self._waiting[0].decoded.samples)
            round_.append(self._waiting.popleft())
        return round_

    def _run(self, places: _Places, samples: list[TensorBatch]) -> None:
        # What the other thread has begun with is computed first, where two are under way.
        begins = max([time.monotonic(), *list(self._done_at.values())])
        expected = begins + self._model.expected_seconds(samples)
        late = [held.deadline < expected for held, _ in places]
        if any(late):
            places, samples = self._shed(places, samples, late)
            if not samples:
                return
        self._done_at[threading.get_ident()] = expected
        try:
            rows = self._model.run(samples)
        finally:
            del self._done_at[threading.get_ident()]
        if len(places) <= _MOST_ANSWERED_AT_ONCE and not (self._waiting or self._backlog or self._computed):
            # There is nothing else to compute: the other thread would have to wake up first.
            self._send([(places, rows)])
        else:
            self._give_out((places, rows))

    def _shed(self, places: _Places, samples: list[TensorBatch], late: list[bool]) -> _Batch:
        """Leave out the samples whose client will have given up; its request gets an error."""
        error = OverloadedError(
            "deadline_exceeded", "The answer would come later than the request's timeout allows; try again later."
        )
        gone = [place for place, is_late in zip(places, late, strict=True) if is_late]
        self._give_out((gone, [error] * len(gone)))
        kept = [i for i, is_late in enumerate(late) if not is_late]
        return [places[i] for i in kept], [samples[i] for i in kept]

    def _give_out(self, what: _Computed | tuple[Frame, Answer]) -> None:
        if not self._pipelined:
            self._send([what])
            return
        with self._finished:
            self._computed.append(what)
            self._finished.notify()

    def _answer(self) -> None:
        while True:
            with self._finished:
                while not self._computed:
                    if self._ended.is_set():
                        return
                    self._finished.wait()
                done = list(self._computed)
                self._computed.clear()
            self._send(done)
            del done

    def _send(self, done: Sequence[_Computed | tuple[Frame, Answer]]) -> None:
        with self._sending:
            began = time.perf_counter()
            replies = [reply for item in done for reply in self._replies(item)]
            self._model.meter.observe(STAGE_SECONDS, time.perf_counter() - began, (("stage", "encode"),))
            for start in range(0, len(replies), _MOST_ANSWERS):
                # Where the frontend is gone, the reader notices.
                with contextlib.suppress(OSError):
                    self._connection.sendall(b"".join(replies[start : start + _MOST_ANSWERS]))

    def _replies(self, item: _Computed | tuple[Frame, Answer]) -> list[bytes]:
        first, second = item
        if isinstance(first, Frame) and isinstance(second, Answer):
            return [self._encode(second, first).encode()]
        replies = []
        for (held, i), row in zip(first, second, strict=True):  # type: ignore[arg-type]  # the other of the two
            held.rows[i] = row
            held.missing -= 1
            if not held.missing:
                self._room.leave(held.size)
                answer = self._model.build_answer(held.decoded, [row for row in held.rows if row is not None])
                replies.append(self._encode(answer, held.frame).encode())
        return replies

    def _watch(self) -> None:
        """A model that hangs holds every request: TorchServe's own timeout does not cover this way of serving."""
        while not self._ended.wait(_WATCH_S):
            earliest = time.monotonic() - self._response_timeout_s
            computing = self._model.busy_since
            if computing is not None and computing < earliest:
                self._end("a batch takes longer than responseTimeout to compute")
            if any(began < earliest for began in list(self._decoding.values())):
                self._end("a request takes longer than responseTimeout to decode")

    def _end(self, why: str) -> None:
        logger.critical("the worker ends: %s, %g s", why, self._response_timeout_s)
        os._exit(1)


def _size(frame: Frame) -> int:
    return sum(len(value) for value in frame.fields.values() if isinstance(value, bytes))


def serve_continuously(start: Callable[[socket.socket], ContinuousWorker]) -> bool:
    """Let TorchServe's asynchronous loop, should this worker be in one, be a continuous worker.

    Returns:
        Whether this is the release whose loop is known.
    """
    try:
        import ts  # noqa: PLC0415  # only there inside TorchServe
        from ts.async_service import AsyncService  # noqa: PLC0415
    except ImportError:
        return False
    if ts.__version__ != KNOWN_RELEASE:
        return False

    def run(self: AsyncService) -> None:
        start(self.service.cl_socket).run()

    AsyncService.run = run
    return True
