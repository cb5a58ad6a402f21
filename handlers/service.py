"""The TorchServe side of a worker: its configuration, its readiness, and the wire form of requests and answers."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from handlers.digests import verify_folder
from handlers.document import Section
from handlers.errors import InferenceError, LoadError, RequestError, SignatureError
from handlers.model import Answer, ServedModel, error_answer
from handlers.request import Part

logger = logging.getLogger("torchport")

# Fields that hold the body of a request that is not multipart; anything else beside them came from the URL's query.
_BODY_FIELDS = ("body", "data")
_DEFAULT_THREADS = 1


class Context(Protocol):
    """The part of TorchServe's ``ts.context.Context`` that handlers use."""

    model_name: str
    manifest: dict[str, Any]
    system_properties: dict[str, Any]
    model_yaml_config: dict[str, Any]

    def get_all_request_header(self, idx: int) -> dict[str, Any]: ...  # noqa: D102
    def get_request_id(self, idx: int) -> str | None: ...  # noqa: D102
    def set_response_content_type(self, idx: int, value: str) -> None: ...  # noqa: D102
    def set_response_status(self, code: int, phrase: str, idx: int) -> None: ...  # noqa: D102


class Service:
    """One worker's model. TorchServe calls :meth:`initialize` once, then :meth:`handle` for every batch."""

    def __init__(self) -> None:
        self._model: ServedModel | None = None

    def initialize(self, context: Context) -> None:
        """Load, verify, warm up and replay. Only when all of it succeeds does the worker become ready.

        Raises:
            LoadError: If anything is wrong; the sentence goes to the log as well, since TorchServe hides it.
        """
        _log_to_stderr()
        folder = Path(context.system_properties["model_dir"])
        try:
            verify_folder(folder)
            model = ServedModel.load(
                folder,
                threads=_threads(context.model_yaml_config),
                max_batch=max(1, int(context.system_properties.get("batch_size") or 1)),
                identity={"model": context.model_name, "version": context.manifest["model"]["modelVersion"]},
            )
            model.warm_up()
            model.replay(folder)
        except LoadError as error:
            logger.error("model %s is not served: %s", context.model_name, error)
            raise
        self._model = model

    def handle(self, data: Sequence[Mapping[str, object]], context: Context) -> list[bytes]:
        """Answer one batch.

        Args:
            data: For each request, its fields by name.
            context: Headers in, statuses and content types out.

        Returns:
            One JSON body a request, in order.
        """
        if self._model is None:
            raise LoadError("the worker has not been initialised")
        answers = self._model.answer([_parts(row, context.get_all_request_header(i)) for i, row in enumerate(data)])
        return [self._encode(answer, context, i) for i, answer in enumerate(answers)]

    def _encode(self, answer: Answer, context: Context, index: int) -> bytes:
        """Set one request's status and build its bytes."""
        try:
            body = json.dumps(answer.body, allow_nan=False).encode()
        except ValueError as error:
            answer = error_answer(InferenceError("model_output_not_finite", str(error)))
            body = json.dumps(answer.body).encode()
        context.set_response_content_type(index, "application/json")
        if answer.error is not None:
            status = HTTPStatus(answer.error.status)
            # The reason phrase goes over TorchServe's wire by character count: it must stay ASCII.
            context.set_response_status(status.value, status.phrase, index)
            _log_failure(answer.error, context.get_request_id(index))
        return body


def _threads(config: Mapping[str, object] | None) -> int:
    """Threads of this worker, from the ``torchport`` section of the archive's model-config.yaml."""
    try:
        root = Section(config or {}, "model-config.yaml")
        if not root.has("torchport"):
            return _DEFAULT_THREADS
        section = root.section("torchport")
        threads = section.integer("threads", minimum=1, maximum=1024)
        section.finish()
    except SignatureError as error:
        raise LoadError(str(error)) from error
    return threads


def _parts(row: Mapping[str, object], headers: Mapping[str, object]) -> list[Part]:
    """The body of a request, or the fields of a multipart one."""
    body = [] if _request_type(headers) == "multipart/form-data" else [name for name in _BODY_FIELDS if name in row]
    names = body[:1] or list(row)
    return [Part(value=row[name], content_type=_content_type(name, headers)) for name in names]


def _content_type(field: str, headers: Mapping[str, object]) -> str:
    """The media type of one field: its own in a multipart body, else the request's."""
    own = headers.get(field)
    value = own.get("content-type") if isinstance(own, Mapping) else None
    return _media_type(str(value)) if value else _request_type(headers)


def _request_type(headers: Mapping[str, object]) -> str:
    """The media type that the request itself declares."""
    return _media_type(
        next((v for name, v in headers.items() if name.lower() == "content-type" and isinstance(v, str)), "")
    )


def _media_type(header: str) -> str:
    return header.partition(";")[0].strip().lower()


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
