"""Answers of the Open Inference Protocol, version 2: outputs as JSON, or as bytes that follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from handlers.open_inference import BYTES, ELEMENT_LENGTH, OpenReply
from handlers.tensors import Array

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
"""Says of requests and of answers how many of their bytes are JSON, where the bytes of tensors follow."""

_IDENTITY = {"model": "model_name", "version": "model_version"}
_DTYPES = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT32": "<i4", "BOOL": "?"}


def tensor_document(name: str, values: Array, datatype: str, *, binary: bool = False) -> dict[str, Any]:
    """One output of an answer.

    Args:
        name: What it is called.
        values: ``[batch, ...]``; strings, in an array of objects, for BYTES.
        datatype: The protocol's name of its dtype.
        binary: Whether its ``data`` are to be bytes, for :func:`binary_form`.
    """
    data = _bytes(values, datatype) if binary else values.ravel().tolist()
    return {"name": name, "datatype": datatype, "shape": list(values.shape), "data": data}


def answer_document(
    outputs: Sequence[Mapping[str, Any]], reply: OpenReply, identity: Mapping[str, str]
) -> dict[str, Any]:
    """One answer.

    Args:
        outputs: What :func:`tensor_document` gave.
        reply: What the request says about its answer.
        identity: The served model's ``model`` and ``version``, if it has them.
    """
    answer: dict[str, Any] = {_IDENTITY.get(key, key): value for key, value in identity.items()}
    if reply.id is not None:
        answer["id"] = reply.id
    return {**answer, "outputs": list(outputs)}


def is_open_answer(body: Mapping[str, Any]) -> bool:
    """Whether a document is what :func:`answer_document` gave."""
    return isinstance(body.get("outputs"), list)


def binary_form(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[bytes]]:
    """Take the bytes out of an answer of any form.

    Args:
        body: Outputs of the Open Inference Protocol may have bytes as ``data``.

    Returns:
        The JSON document, and the bytes that follow it; none for most answers.
    """
    outputs = body["outputs"] if is_open_answer(body) else ()
    pieces = [output["data"] for output in outputs if isinstance(output.get("data"), bytes)]
    return ({**body, "outputs": [_without_bytes(output) for output in outputs]} if pieces else body), pieces


def ranked(values: Array, count: int, labels: Sequence[str]) -> Array:
    """The classification extension: the classes of the highest values, as ``value:index:label``.

    Args:
        values: ``[batch, classes]``.
        count: How many classes a sample lists, the highest first; of equal ones the one with the smaller index.
        labels: Of the classes; empty if they have none.

    Returns:
        Strings, ``[batch, count]``.
    """
    last = values.shape[1] - 1
    # From behind, for the sort is stable and ascending.
    order = last - np.argsort(values[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :count]
    number = "{:f}" if values.dtype.kind == "f" else "{:d}"
    rows = [
        [":".join([number.format(row[i]), str(i), *labels[i : i + 1]]) for i in indices.tolist()]
        for row, indices in zip(values, order, strict=True)
    ]
    return np.array(rows, dtype=object)


def _without_bytes(output: Mapping[str, Any]) -> dict[str, Any]:
    document = dict(output)
    if isinstance(document["data"], bytes):
        document["parameters"] = {"binary_data_size": len(document.pop("data"))}
    return document


def _bytes(values: Array, datatype: str) -> bytes:
    """Little-endian, row by row; strings with their lengths before them."""
    if datatype != BYTES:
        return values.astype(_DTYPES[datatype]).tobytes()
    # A label that is no Unicode text must not cost its request: JSON would say it in escapes.
    elements = [text.encode("utf-8", errors="backslashreplace") for text in values.ravel()]
    return b"".join(piece for element in elements for piece in (ELEMENT_LENGTH.pack(len(element)), element))
