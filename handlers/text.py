"""Texts: from requests to token ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handlers.decoder import Decoded, decode_body
from handlers.errors import LoadError, MalformedError, OutOfRangeError, TooLargeError, one_line
from handlers.limits import MAX_REQUEST_CHARS, MAX_TEXT_CHARS, too_many_samples
from handlers.open_inference import TEXT_INPUT, OpenReply, OpenRequest, check_outputs, output_tensors
from handlers.open_tensors import check_names, count_samples, read_texts
from handlers.parameters import NO_PARAMETERS, read_parameters
from handlers.preprocessing import REFUSE, TextPreprocessing
from handlers.request import Body, JsonBody, Medium, Part, looks_like_json, no_samples
from handlers.signature import INPUT_IDS, Signature
from handlers.tensors import TensorBatch
from handlers.words import kind

TEXTS = Medium(
    # The second is what a field of a form has that declares no type of its own.
    types=("text/plain", "multipart/form-data"),
    recognises=lambda data: not looks_like_json(data) and _is_utf8(data),
    accepted="send application/json or text/plain",
    absent="neither UTF-8 text nor JSON",
    wrong_field="Each field of a multipart request must be UTF-8 text; send JSON as a body of its own.",
)


def load_tokenizer(folder: Path, text: TextPreprocessing) -> Any:
    """Read an archive's ``tokenizer.json``.

    Args:
        folder: Where it lies.
        text: Its file name and the longest text.

    Returns:
        A ``tokenizers.Tokenizer`` that cuts off what is too long and pads nothing.

    Raises:
        LoadError: If the library is missing, or the file cannot be read.
    """
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415  # only models of texts need it
    except ImportError as error:
        raise LoadError(
            "this archive needs the tokenizers library, which is not installed; "
            "run `pip install tokenizers` where TorchServe runs"
        ) from error
    # Or the library starts as many threads as there are cores, which other workers use too.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path = folder / text.tokenizer
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises plain Exceptions
        raise LoadError(
            f"{text.tokenizer} is no tokenizer that can be read ({one_line(error)}); export the model again"
        ) from error
    tokenizer.no_padding()
    truncation = tokenizer.truncation
    if truncation is None or truncation["max_length"] > text.max_length:
        tokenizer.enable_truncation(text.max_length, direction=(truncation or {}).get("direction", "right"))
    return tokenizer


class TextDecoder:
    """Decodes requests of texts; see :class:`handlers.decoder.Decoder`.

    Args:
        signature: Names, dtypes and ranges of ``input_ids`` and ``attention_mask``, the longest text, the labels.
        tokenizer: What :func:`load_tokenizer` gave.
        max_samples: Requests with more texts are refused.
    """

    def __init__(self, signature: Signature, tokenizer: Any, *, max_samples: int) -> None:
        self._inputs = [(spec.name, spec.numpy_dtype) for spec in signature.inputs]
        self._outputs = output_tensors(signature)
        self._classes = len(signature.labels)
        self._tokenizer = tokenizer
        self._max_samples = max_samples
        self._refuses = signature.text is not None and signature.text.too_long == REFUSE
        ids = signature.input(INPUT_IDS)
        self._lowest, self._highest = ids.minimum, ids.maximum
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown_id = tokenizer.token_to_id(unknown) if unknown else None

    def decode(self, parts: Sequence[Part]) -> Decoded:
        """Decode one request; see :class:`handlers.decoder.Decoder`."""
        return decode_body(parts, TEXTS, self._decode)

    def _decode(self, body: Body) -> Decoded:
        parameters = NO_PARAMETERS
        if body.parameters is not None:
            parameters = read_parameters(body.parameters, classes=self._classes)
        texts, many, reply = self._texts(body)
        if len(texts) > self._max_samples:
            raise too_many_samples(len(texts), self._max_samples)
        chars = sum(map(len, texts))
        if chars > MAX_REQUEST_CHARS:
            raise TooLargeError(
                "text_too_long",
                f"The texts have {chars} characters; the limit is {MAX_REQUEST_CHARS}; send fewer in one request.",
            )
        samples = []
        truncated = set()
        for position, text in enumerate(texts):
            ids, cut = self._encode(text)
            if cut:
                truncated.add(position)
            samples.append(self._sample(ids))
        return Decoded(samples=samples, many=many, parameters=parameters, truncated=frozenset(truncated), reply=reply)

    def _texts(self, body: Body) -> tuple[list[str], bool, OpenReply | None]:
        """The texts of a request, whether they were sent as a list, and what its own form says about its answer."""
        if isinstance(body, JsonBody):
            return *_json_texts(body), None
        if not isinstance(body, OpenRequest):
            return [_text_of(value) for value in body.values], body.many, None
        check_outputs(body.reply, self._outputs)
        check_names(body, [TEXT_INPUT])
        count_samples(body, max_samples=self._max_samples)
        return read_texts(body.inputs[0]), True, body.reply

    def _encode(self, text: str) -> tuple[list[int], bool]:
        """The token ids of one text, at least one, and whether its end was cut off."""
        if len(text) > MAX_TEXT_CHARS:
            raise TooLargeError(
                "text_too_long",
                f"A text has {len(text)} characters; the limit is {MAX_TEXT_CHARS}; send its beginning.",
            )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise MalformedError(
                    "not_unicode",
                    f"A text holds half a surrogate pair (character {error.start}); send whole characters.",
                ) from error
        # Not `encode`, which also finds where in the text each token lies, at 5 % of the requests of a small model.
        encoding = self._tokenizer.encode_batch_fast([text])[0]
        ids: list[int] = encoding.ids
        cut = bool(encoding.overflowing)
        if cut and self._refuses:
            raise OutOfRangeError(
                "too_many_tokens",
                f"A text has more than the {len(ids)} tokens that the model takes; send a part of it.",
            )
        if not ids:
            # As in training: a text of blanks alone is one unknown token.
            if self._unknown_id is None:
                raise OutOfRangeError("empty_text", "A text has no token; send at least one word.")
            ids = [self._unknown_id]
        return ids, cut

    def _sample(self, ids: list[int]) -> TensorBatch:
        """The inputs of one text, each ``[tokens]``."""
        if (self._lowest is not None and min(ids) < self._lowest) or (
            self._highest is not None and max(ids) > self._highest
        ):
            raise OutOfRangeError(
                "out_of_range",
                f"A text has tokens that the model does not know ({max(ids)}, of {self._highest:g}); send other words.",
            )
        return {
            name: np.array(ids, dtype) if name == INPUT_IDS else np.ones(len(ids), dtype)
            for name, dtype in self._inputs
        }


def _json_texts(body: JsonBody) -> tuple[list[str], bool]:
    """The texts of a JSON body, and whether they were sent as a list."""
    if isinstance(body.value, str):
        return [body.value], False
    if not isinstance(body.value, list):
        raise MalformedError("not_text", f"'inputs' must be a text or a list of texts, not {kind(body.value)}.")
    if not body.value:
        raise no_samples(body.key)
    for value in body.value:
        if not isinstance(value, str):
            raise MalformedError("not_text", f"'{body.key}' must hold only texts, not {kind(value)}.")
    return body.value, True


def _text_of(value: bytes | str) -> str:
    if isinstance(value, str):
        return value.removeprefix("\ufeff")  # a byte order mark, which is no part of the text
    try:
        return value.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedError("not_utf8", f"The text is not UTF-8 (byte {error.start}); encode it as UTF-8.") from error


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
