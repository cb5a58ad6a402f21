"""The TorchServe side of a worker: its configuration, its readiness, and the wire form of requests and answers."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from handlers.backend import MOST_LANES
from handlers.continuous import ContinuousWorker, serve_continuously
from handlers.digests import verify_folder
from handlers.errors import InferenceError, LoadError, RequestError, TooLargeError
from handlers.fields import asks_for_description, read_parts
from handlers.frames import Frame, Reply
from handlers.limits import check_answer_size, max_answer_bytes
from handlers.metadata import describe
from handlers.metrics import ANSWERS, STAGE_SECONDS, Emitter
from handlers.model import DEFAULT_MAX_BATCH, Answer, ServedModel, error_answer
from handlers.open_answer import JSON_LENGTH_HEADER, binary_form, is_open_answer
from handlers.preemption import interrupt_others
from handlers.settings import WorkerSettings
from handlers.slots import ComputeSlot
from handlers.visible_gpus import see_only
from handlers.wire import quieten_frontend_lines, read_in_few_pieces

logger = logging.getLogger("torchport")

# Not json.dumps, which would build an encoder for every answer.
_ENCODER = json.JSONEncoder(allow_nan=False)
_JSON = "application/json"
_BINARY = "application/octet-stream"
# TorchServe's own, where model-config.yaml has none.
_RESPONSE_TIMEOUT_S = 120


class Context(Protocol):
    """The part of TorchServe's ``ts.context.Context`` that handlers use."""

    model_name: str
    manifest: dict[str, Any]
    system_properties: dict[str, Any]
    model_yaml_config: dict[str, Any]

    def get_all_request_header(self, idx: int) -> dict[str, Any]: ...  # noqa: D102
    def get_request_id(self, idx: int) -> str | None: ...  # noqa: D102
    def set_response_content_type(self, idx: int, value: str) -> None: ...  # noqa: D102
    def set_response_header(self, idx: int, key: str, value: str) -> None: ...  # noqa: D102
    def set_response_status(self, code: int, phrase: str, idx: int) -> None: ...  # noqa: D102


class Service:
    """One worker's model. TorchServe calls :meth:`initialize` once, then :meth:`handle` for every batch."""

    def __init__(self) -> None:
        self._model: ServedModel | None = None
        self._max_answer_bytes = max_answer_bytes()
        self._description = Answer(body={})

    def initialize(self, context: Context) -> None:
        """Load, verify, warm up and replay. Only when all of it succeeds does the worker become ready.

        Raises:
            LoadError: If anything is wrong; the sentence goes to the log as well, since TorchServe hides it.
        """
        _log_to_stderr()
        # Before any other thread is started that computes, for the frontend and what it starts interrupt nobody.
        interrupt_others()
        folder = Path(context.system_properties["model_dir"])
        config = context.model_yaml_config or {}
        identity = {"model": context.model_name, "version": context.manifest["model"]["modelVersion"]}
        try:
            verify_folder(folder)
            settings = WorkerSettings.read(config, os.environ)
            gpu = _gpu(context)
            if gpu is not None and _in_worker_process():
                see_only(gpu, os.environ)
                gpu = 0
            model = ServedModel.load(
                folder,
                threads=settings.threads,
                max_batch=settings.max_batch or _max_batch(context, config),
                identity=identity,
                slot=ComputeSlot(folder, settings.computing),
                decoding=settings.decoding,
                gpu=gpu,
                gpu_memory_bytes=settings.gpu_memory_mib << 20 or None,
                jpeg_on_gpu=bool(settings.jpeg_on_gpu),
                cuda_graphs=bool(settings.cuda_graphs),
            )
            model.warm_up()
            model.measure_cost()
            model.replay(folder)
        except LoadError as error:
            logger.error("model %s is not served: %s", context.model_name, error)
            raise
        self._model = model
        self._description = Answer(
            body=describe(
                model.signature,
                name=identity["model"],
                version=identity["version"],
                max_batch=settings.max_batch or _max_batch(context, config),
                max_answer_bytes=self._max_answer_bytes,
            )
        )
        model.meter.take()  # the golden samples are nobody's requests
        if _in_worker_process():
            self._take_over_process(context, model, settings)

    def _take_over_process(self, context: Context, model: ServedModel, settings: WorkerSettings) -> None:
        """What concerns the whole process: metrics, TorchServe's loop and wire, the garbage collector."""
        labels = (("ModelName", context.model_name), ("ModelVersion", context.manifest["model"]["modelVersion"]))
        Emitter(model.meter, labels).start()
        quieten_frontend_lines()
        timeout_s = float((context.model_yaml_config or {}).get("responseTimeout") or _RESPONSE_TIMEOUT_S)
        serve_continuously(
            lambda connection: ContinuousWorker(
                model,
                connection,
                parts=lambda frame: read_parts(frame.fields, frame.headers),
                encode=self._reply,
                response_timeout_s=timeout_s,
                pipelined=not model.wants_one_thread(),
                # Threads of one process would hold the same compute slot.
                lanes=1 if settings.computing else min(settings.lanes or MOST_LANES, model.backend.lanes),
            )
        )
        read_in_few_pieces()
        # What is there now stays: the collector need not look at it again at every full collection.
        gc.collect()
        gc.freeze()

    def handle(self, data: Sequence[Mapping[str, object]], context: Context) -> list[bytes]:
        """Answer one batch.

        Args:
            data: For each request, its fields by name.
            context: Headers in, statuses and content types out.

        Returns:
            One body a request, in order: JSON, behind which bytes may follow if an Open Inference Protocol request asks
            for them.
        """
        if self._model is None:
            raise LoadError("the worker has not been initialised")
        headers = [context.get_all_request_header(i) for i in range(len(data))]
        answers = self._model.answer([read_parts(row, own) for row, own in zip(data, headers, strict=True)])
        began = time.perf_counter()
        bodies = []
        for i, answer in enumerate(answers):
            chosen = self._description if asks_for_description(data[i], headers[i]) else answer
            body, status, more = self._body(chosen, context.get_request_id(i))
            context.set_response_content_type(i, _BINARY if more else _JSON)
            for name, value in more.items():
                context.set_response_header(i, name, value)
            if status is not HTTPStatus.OK:
                # The reason phrase goes over TorchServe's wire by character count: it must stay ASCII.
                context.set_response_status(status.value, status.phrase, i)
            bodies.append(body)
        self._model.meter.observe(STAGE_SECONDS, time.perf_counter() - began, (("stage", "encode"),))
        return bodies

    def _reply(self, answer: Answer, frame: Frame) -> Reply:
        if asks_for_description(frame.fields, frame.headers):
            answer = self._description
        body, status, headers = self._body(answer, frame.id.decode())
        return Reply(frame.id, status.value, status.phrase, _BINARY if headers else _JSON, body, headers)

    def _body(self, answer: Answer, request_id: str | None) -> tuple[bytes, HTTPStatus, dict[str, str]]:
        """One answer's bytes, status and headers of its own; a failure is counted and logged."""
        headers: dict[str, str] = {}
        try:
            document, pieces = binary_form(answer.body)
            body = _ENCODER.encode(document).encode()
            if pieces:
                headers = {JSON_LENGTH_HEADER: str(len(body))}
                body = b"".join((body, *pieces))
            check_answer_size(body, self._max_answer_bytes)
        except TooLargeError as error:
            answer, headers = error_answer(error, open_protocol=is_open_answer(answer.body)), {}
            body = json.dumps(answer.body).encode()
        except ValueError as error:
            answer = error_answer(InferenceError("model_output_not_finite", str(error)))
            body = json.dumps(answer.body).encode()
        status = HTTPStatus.OK if answer.error is None else HTTPStatus(answer.error.status)
        if answer.error is not None:
            _log_failure(answer.error, request_id)
        if self._model is not None:
            self._model.meter.count(ANSWERS, 1, (("code", str(status.value)),))
        return body, status, headers


def _in_worker_process() -> bool:
    """Whether this process is a worker that TorchServe started, and does nothing else."""
    return hasattr(sys.modules["__main__"], "TorchModelServiceWorker")


def _gpu(context: Context) -> int | None:
    """The GPU that TorchServe gave this worker; None where it gave none, which some releases write as -1."""
    given = context.system_properties.get("gpu_id")
    return None if given is None or int(given) < 0 else int(given)


def _max_batch(context: Context, config: Mapping[str, object]) -> int:
    """Samples computed at once, where no setting says it: TorchServe's batches, unless they are requests in flight."""
    if config.get("asyncCommunication"):
        return DEFAULT_MAX_BATCH
    return max(1, int(context.system_properties.get("batch_size") or 1))


def _log_failure(error: RequestError, request_id: str | None) -> None:
    """One line a failed request, never with its contents; our own defects with their cause."""
    if isinstance(error, InferenceError):
        logger.error("request %s failed: %s", request_id, error.code, exc_info=error.__cause__)
    else:
        logger.warning("request %s refused: %s %s", request_id, error.status, error.code)


def _log_to_stderr() -> None:
    """TorchServe logs a worker's stdout at INFO, which production drops, and its stderr at WARN."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("torchport %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
