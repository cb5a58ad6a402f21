"""Choice of golden samples: a few requests whose right answers travel with the archive."""

from __future__ import annotations

from collections.abc import Sequence

from export.errors import GateError
from export.evaluation import LabelledRequest
from export.gates import Reference, Thresholds
from handlers.errors import GoldenError
from handlers.golden import GoldenSample, GoldenSet
from handlers.model import ServedModel

MAX_SAMPLES = 16
# Six decimals are far finer than the tolerances, and hide the last bit in which machines differ.
_DECIMALS = 6
_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg"}


def choose_golden(
    requests: Sequence[LabelledRequest], reference: Reference, served: ServedModel, thresholds: Thresholds
) -> tuple[GoldenSet, dict[str, bytes]]:
    """Choose golden samples: the first of each class, then the next ones, in data order.

    Returns:
        The samples with the reference's outputs, and the request bodies by path within the archive.

    Raises:
        GateError: If the artifact does not repeat them: no worker would ever become ready with it.
    """
    firsts: list[LabelledRequest] = []
    rest: list[LabelledRequest] = []
    seen: set[str] = set()
    for request in requests:
        (rest if request.label in seen else firsts).append(request)
        seen.add(request.label)
    samples = []
    files = {}
    outputs = []
    labels = []
    for i, request in enumerate((firsts + rest)[:MAX_SAMPLES]):
        output = reference.run(served.decode(request.parts()))[0]
        name = f"golden/{i:03d}.{_EXTENSIONS[request.content_type]}"
        files[name] = request.body
        (answer,) = served.answer([request.parts()])
        if answer.error is not None:
            raise GateError(f"the artifact fails on a golden sample, so there is no archive: {answer.error.message}")
        outputs.append(answer.outputs[0])
        labels.append(answer.body["label"])
        samples.append(
            GoldenSample(
                file=name,
                content_type=request.content_type,
                output=tuple(round(float(value), _DECIMALS) for value in output),
                label=served.signature.labels[int(output.argmax())],
            )
        )
    golden = GoldenSet(
        output_name=served.signature.outputs[0].name,
        rtol=thresholds.rtol,
        atol=thresholds.atol,
        samples=tuple(samples),
    )
    try:
        golden.check(outputs, labels)
    except GoldenError as error:
        raise GateError(f"the artifact does not repeat its golden samples, so there is no archive: {error}") from error
    return golden, files
