"""A model's metadata: what TorchServe's describe call answers, in the form of the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

from handlers.limits import MAX_REQUEST_BYTES, MAX_SAMPLES_PER_REQUEST, MAX_TEXT_CHARS
from handlers.open_inference import BYTES, DATATYPES, TEXT_INPUT, output_tensors
from handlers.signature import Signature
from handlers.tensors import TensorSpec


def describe(
    signature: Signature, *, name: str, version: str, max_batch: int, max_answer_bytes: int | None = None
) -> dict[str, Any]:
    """Describe a served model.

    Args:
        signature: What it takes and gives.
        name: What it is called.
        version: Of the archive.
        max_batch: Samples computed at once.
        max_answer_bytes: The longest answer that the server takes from a worker; None to leave it out.

    Returns:
        A JSON document: ``name``, ``versions``, ``platform``, ``inputs`` and ``outputs`` as the Open Inference Protocol
        has them (-1 is any size), and what it has no word for: ``task``, ``labels``, ``preprocessing``, ``limits``.
    """
    limits: dict[str, Any] = {
        "max_request_bytes": MAX_REQUEST_BYTES,
        "max_samples": MAX_SAMPLES_PER_REQUEST,
        "max_batch": max_batch,
    }
    if max_answer_bytes is not None:
        limits["max_answer_bytes"] = max_answer_bytes
    if signature.image is not None:
        limits["max_pixels"] = signature.image.max_pixels
    if signature.text is not None:
        limits["max_text_chars"] = MAX_TEXT_CHARS
        limits["max_tokens"] = signature.text.max_length
    if signature.axes:
        limits["axes"] = {axis: bounds.to_document() for axis, bounds in signature.axes.items()}
    document: dict[str, Any] = {
        "name": name,
        "versions": [version],
        "platform": _platform(signature),
        "inputs": _inputs(signature),
        "outputs": [
            {"name": output, "datatype": datatype, "shape": shape}
            for output, (datatype, shape) in output_tensors(signature).items()
        ],
        "task": signature.task,
        "labels": list(signature.labels),
        "limits": limits,
    }
    if signature.image is not None:
        document["preprocessing"] = {"image": signature.image.to_document()}
    if signature.text is not None:
        document["preprocessing"] = {"text": signature.text.to_document()}
    return document


def _platform(signature: Signature) -> str:
    """``pytorch_torchscript``, ``onnx_onnxruntime`` and their like, as the protocol's servers call themselves."""
    artifact = signature.artifact
    if artifact is None:
        return "pytorch"
    return "onnx_onnxruntime" if artifact.format == "onnx" else f"pytorch_{artifact.format}"


def _inputs(signature: Signature) -> list[dict[str, Any]]:
    if signature.text is not None:
        return [{"name": TEXT_INPUT, "datatype": BYTES, "shape": [-1]}]
    return [_input(spec) for spec in signature.inputs]


def _input(spec: TensorSpec) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": spec.name,
        "datatype": DATATYPES[spec.dtype],
        "shape": [axis if isinstance(axis, int) else -1 for axis in spec.shape],
    }
    for key in ("minimum", "maximum"):
        if (value := spec.to_document().get(key)) is not None:
            document[key] = value
    return document
