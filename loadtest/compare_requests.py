"""The requests of a comparison: one list of bodies that every system gets byte for byte.

Images are sent as files, ``image/jpeg`` or ``image/png``. Everything else is KServe's ``{"instances": [sample]}``, the
one form of JSON that torchport and all peers read without a detour: a text, or an object of tensors.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handlers.signature import IMAGE_CLASSIFICATION, TENSOR, TEXT_CLASSIFICATION, Signature
from handlers.tensors import Array, TensorSpec
from loadtest.errors import PayloadError, PlanError
from loadtest.payloads import Payload, read_files, read_golden_samples
from loadtest.pictures import QUALITY, generate_pictures

GENERATED = 256
GENERATED_PICTURES = 64
_JSON = "application/json"
_LARGEST_PICTURE = 4096
# Fewer samples where they are large: every client holds all of them.
_MOST_VALUES = 2_000_000
_LEAST_SAMPLES = 8
# Where an input of floats has no bounds.
_FLOAT_BOUND = 1.0
_MOST_TEXTS = 10_000


def read_bodies(
    signature: Signature,
    archive: Path,
    *,
    inputs: Sequence[Path] = (),
    texts: Path | None = None,
    lengths: tuple[int, int] | None = None,
    pictures: tuple[int, int] | None = None,
    seed: int = 0,
) -> tuple[list[Payload], str]:
    """The bodies, and in words where they come from.

    Args:
        signature: Of the model.
        archive: Whose golden samples are sent when nothing else is named; a model of tensors gets generated ones.
        inputs: Files to send, one sample each.
        texts: A file of texts, one a line.
        lengths: Bounds of the dynamic axes of generated tensors, both included.
        pictures: Width and height of generated photographs, in pixels.
        seed: Of generated tensors and photographs.

    Raises:
        PlanError: The options do not fit together, or not to the model.
        PayloadError: A file cannot be read, or holds no one sample.
    """
    if sum([bool(inputs), texts is not None, lengths is not None, pictures is not None]) > 1:
        raise PlanError("give only one of --input, --texts, --lengths and --pictures")
    if texts is not None:
        _need_task(signature, TEXT_CLASSIFICATION, "--texts")
        bodies = [_instance(text) for text in _read_texts(texts)]
        source = f"{len(bodies)} texts of {texts.name}"
    elif pictures is not None:
        _need_task(signature, IMAGE_CLASSIFICATION, "--pictures")
        bodies, source = _generate_pictures(*pictures, seed)
    elif inputs:
        bodies = [_body(payload, signature, str(path)) for path in inputs for payload in read_files([path])]
        source = f"{len(bodies)} files"
    elif signature.task == TENSOR:
        bodies = [_instance(sample) for sample in generate_tensors(signature, lengths=lengths, seed=seed)]
        source = f"{len(bodies)} random samples, seed {seed}{_bounds(signature, lengths)}"
    else:
        if lengths is not None:
            _need_task(signature, TENSOR, "--lengths")
        bodies = [_body(payload, signature, str(archive)) for payload in read_golden_samples(archive)]
        source = f"{len(bodies)} golden samples of {archive.name}"
    if len({is_file(body) for body in bodies}) > 1:  # a peer is told once what it gets
        raise PlanError("some inputs are JSON and some are images: give files of one kind")
    return bodies, source


def is_file(body: Payload) -> bool:
    """Whether a request is a file as it is, and not JSON."""
    return body.content_type != _JSON


def generate_tensors(
    signature: Signature, *, lengths: tuple[int, int] | None = None, seed: int = 0, count: int = GENERATED
) -> list[dict[str, Any]]:
    """Random samples within the signature's bounds, each dynamic axis of a random size.

    Raises:
        PlanError: The lengths lie outside an axis's bounds, or there is no dynamic axis.
    """
    dice = np.random.default_rng(seed)
    if lengths is not None and not signature.axes:
        raise PlanError("--lengths is for models with a dynamic axis, and this one has none: leave it out")
    for name, axis in signature.axes.items():
        if lengths is not None and not axis.minimum <= lengths[0] <= lengths[1] <= axis.maximum:
            raise PlanError(
                f"--lengths {lengths[0]}-{lengths[1]}: the axis {name} of this model takes "
                f"{axis.minimum} to {axis.maximum}"
            )
    samples: list[dict[str, Any]] = []
    values = 0
    while len(samples) < count and (values < _MOST_VALUES or len(samples) < _LEAST_SAMPLES):
        sizes = {
            name: int(dice.integers(*(lengths or (axis.minimum, axis.maximum)), endpoint=True))
            for name, axis in signature.axes.items()
        }
        arrays = {spec.name: _random(spec, sizes, dice) for spec in signature.inputs}
        values += sum(array.size for array in arrays.values())
        samples.append({name: array.tolist() for name, array in arrays.items()})
    return samples


def parse_lengths(text: str) -> tuple[int, int]:
    """Reads ``--lengths``: two numbers with a hyphen between them.

    Raises:
        PlanError: It is something else.
    """
    first, hyphen, last = text.partition("-")
    if not (hyphen and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise PlanError(f"--lengths {text!r}: give the shortest and the longest, like 8-64")
    return int(first), int(last)


def parse_pictures(text: str) -> tuple[int, int]:
    """Reads ``--pictures``: width and height with an x between them.

    Raises:
        PlanError: It is something else, or too large to be drawn.
    """
    width, cross, height = text.partition("x")
    good = cross and width.isdigit() and height.isdigit()
    if not (good and all(1 <= int(word) <= _LARGEST_PICTURE for word in (width, height))):
        raise PlanError(
            f"--pictures {text!r}: give width and height in pixels, at most {_LARGEST_PICTURE} each, like 224x224"
        )
    return int(width), int(height)


def _generate_pictures(width: int, height: int, seed: int) -> tuple[list[Payload], str]:
    files = generate_pictures(GENERATED_PICTURES, height=height, width=width, seed=seed)
    sizes = sorted(len(data) for data in files)
    source = (
        f"{len(files)} generated JPEG photographs, {width} x {height}, quality {QUALITY}, seed {seed}, "
        f"{sizes[0] / 1e3:.1f} to {sizes[-1] / 1e3:.1f} kB"
    )
    return [Payload(body=data, content_type="image/jpeg") for data in files], source


def _random(spec: TensorSpec, sizes: dict[str, int], dice: np.random.Generator) -> Array:
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape[1:]]
    if spec.dtype == "bool":
        return dice.integers(0, 2, shape).astype(bool)
    lowest = -_FLOAT_BOUND if spec.minimum is None else spec.minimum
    highest = max(lowest, _FLOAT_BOUND) if spec.maximum is None else spec.maximum
    if spec.dtype.startswith("int"):
        return dice.integers(int(lowest), int(highest), shape, endpoint=True)
    # Four digits: a request of floats is long enough.
    # Within the bounds all the same, which rounding may leave.
    return np.clip(np.round(dice.uniform(lowest, highest, shape), 4), lowest, highest)


def _bounds(signature: Signature, lengths: tuple[int, int] | None) -> str:
    parts = [
        f"{name} {(lengths or (axis.minimum, axis.maximum))[0]} to {(lengths or (axis.minimum, axis.maximum))[1]}"
        for name, axis in signature.axes.items()
    ]
    return f", {', '.join(parts)}" if parts else ""


def _need_task(signature: Signature, task: str, option: str) -> None:
    if signature.task != task:
        raise PlanError(f"{option} is for models of {task}, and this one is of {signature.task}: leave it out")


def _read_texts(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PayloadError(f"cannot read the texts {path}: {error.strerror}; give an existing file") from error
    except UnicodeDecodeError as error:
        raise PayloadError(f"the texts {path} are not UTF-8 (byte {error.start}); convert the file") from error
    texts = [line.strip() for line in lines if line.strip()][:_MOST_TEXTS]
    if not texts:
        raise PayloadError(f"there is no text in {path}; write one a line")
    return list(texts)


def _instance(sample: Any) -> Payload:
    body = json.dumps({"instances": [sample]}, separators=(",", ":")).encode()
    return Payload(body=body, content_type=_JSON)


def _body(payload: Payload, signature: Signature, where: str) -> Payload:
    """The request of one sample, which may come in any of the forms that torchport takes."""
    if payload.content_type == _JSON:
        return _instance(_json_sample(payload.body, signature, where))
    if signature.task == IMAGE_CLASSIFICATION:
        return payload
    if signature.task == TEXT_CLASSIFICATION:
        try:
            return _instance(payload.body.decode())
        except UnicodeDecodeError as error:
            raise PayloadError(f"{where} is not UTF-8 (byte {error.start}); give a text") from error
    raise PayloadError(f"{where} is no JSON, which this model of tensors takes alone; give .json files")


def _json_sample(body: bytes, signature: Signature, where: str) -> Any:
    try:
        document = json.loads(body)
        key = "instances" if "instances" in document else "inputs"
        value = document[key]
    except (ValueError, KeyError, TypeError) as error:
        raise PayloadError(f'{where} is not JSON with the key "inputs" or "instances"; correct it') from error
    several = isinstance(value, list)
    if several and key == "inputs" and signature.task != TEXT_CLASSIFICATION:
        several = bool(value) and isinstance(value[0], dict)  # else it is the one sample's tensor
    if not several:
        return value
    if len(value) != 1:
        raise PayloadError(f"{where} holds {len(value)} samples; a comparison sends one a request")
    return value[0]
