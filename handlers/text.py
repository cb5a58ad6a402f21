"""Texts: from requests to token ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handlers.decoder import Decoded
from handlers.errors import LoadError, MalformedError, OutOfRangeError, TooLargeError, one_line
from handlers.preprocessing import TextPreprocessing
from handlers.request import JsonBody, Medium, Part, kind, looks_like_json, no_samples, read_body, too_many_samples
from handlers.signature import INPUT_IDS, Signature
from handlers.tensors import TensorBatch

# All of a text is cut into tokens, at some 1 MB/s, before it is cut off: a long one would keep its neighbours waiting.
MAX_TEXT_CHARS = 100_000

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
        signature: Names, dtypes and ranges of ``input_ids`` and ``attention_mask``.
        tokenizer: What :func:`load_tokenizer` gave.
        max_samples: Requests with more texts are refused.
    """

    def __init__(self, signature: Signature, tokenizer: Any, *, max_samples: int) -> None:
        self._inputs = signature.inputs
        self._tokenizer = tokenizer
        self._max_samples = max_samples
        ids = signature.input(INPUT_IDS)
        self._lowest, self._highest = ids.minimum, ids.maximum
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown_id = tokenizer.token_to_id(unknown) if unknown else None

    def decode(self, parts: Sequence[Part]) -> Decoded:
        """Decode one request; see :class:`handlers.decoder.Decoder`."""
        body = read_body(parts, TEXTS)
        if isinstance(body, JsonBody):
            texts, many = _json_texts(body)
        else:
            texts, many = [_text_of(value) for value in body.values], body.many
        if len(texts) > self._max_samples:
            raise too_many_samples(len(texts), self._max_samples)
        return Decoded(samples=[self._sample(text) for text in texts], many=many)

    def _sample(self, text: str) -> TensorBatch:
        """The inputs of one text, each ``[tokens]``; at least one token."""
        if len(text) > MAX_TEXT_CHARS:
            raise TooLargeError(
                "text_too_long",
                f"A text has {len(text)} characters; the limit is {MAX_TEXT_CHARS}; send its beginning.",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MalformedError(
                "not_unicode", f"A text holds half a surrogate pair (character {error.start}); send whole characters."
            ) from error
        ids = self._tokenizer.encode(text).ids
        if not ids:
            # As in training: a text of blanks alone is one unknown token.
            if self._unknown_id is None:
                raise OutOfRangeError("empty_text", "A text has no token; send at least one word.")
            ids = [self._unknown_id]
        if (self._lowest is not None and min(ids) < self._lowest) or (
            self._highest is not None and max(ids) > self._highest
        ):
            raise OutOfRangeError(
                "out_of_range",
                f"A text has tokens that the model does not know ({max(ids)}, of {self._highest:g}); send other words.",
            )
        return {
            spec.name: np.array(ids, dtype=spec.numpy_dtype)
            if spec.name == INPUT_IDS
            else np.ones(len(ids), dtype=spec.numpy_dtype)
            for spec in self._inputs
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
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError("not_utf8", f"The text is not UTF-8 (byte {error.start}); encode it as UTF-8.") from error


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
