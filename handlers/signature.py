"""The signature: the one contract between export, handlers and load test.

It says what a model takes (names, dtypes, shapes with named dynamic axes, value ranges, preprocessing), what it
gives, what its classes are called, and, once exported, which artifact computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from handlers.artifact import Artifact
from handlers.document import Section, is_word
from handlers.errors import SignatureError
from handlers.preprocessing import ImagePreprocessing, TextPreprocessing
from handlers.tensors import BATCH_AXIS, Axis, TensorSpec

FORMAT_VERSION = 1
IMAGE_CLASSIFICATION = "image-classification"
TEXT_CLASSIFICATION = "text-classification"
TENSOR = "tensor"
TASKS = (IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, TENSOR)
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        task: One of ``TASKS``; it chooses how requests are decoded and answers are built.
        inputs: The model's input tensors, in the order of its arguments.
        outputs: The model's output tensors.
        labels: Class names, in the order of the last output axis; empty for the task ``tensor``.
        axes: Bounds of every dynamic axis of the inputs other than the batch.
        image: Preprocessing of images; None for other tasks.
        text: Preprocessing of texts; None for other tasks.
        artifact: What computes the model; None until it is exported.
    """

    task: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    axes: Mapping[str, Axis] = field(default_factory=dict)
    image: ImagePreprocessing | None = None
    text: TextPreprocessing | None = None
    artifact: Artifact | None = None

    @classmethod
    def from_document(cls, document: object) -> Signature:
        """Read and check a whole signature.

        Args:
            document: What JSON or YAML parsing gave.

        Raises:
            SignatureError: If a field is missing, unknown, of the wrong type, or at odds with another one.
        """
        root = Section(document, "signature")
        root.integer("format_version", minimum=FORMAT_VERSION, maximum=FORMAT_VERSION)
        task = root.string("task", choices=TASKS)
        image: ImagePreprocessing | None = None
        text: TextPreprocessing | None = None
        if task != TENSOR:
            preprocessing = root.section("preprocessing")
            if task == IMAGE_CLASSIFICATION:
                image = ImagePreprocessing.from_section(preprocessing.section("image"))
            else:
                text = TextPreprocessing.from_section(preprocessing.section("text"))
            preprocessing.finish()
        axes: dict[str, Axis] = {}
        if root.has("axes"):
            table = root.section("axes")
            axes = {name: Axis.from_section(table.section(name), name) for name in table.names() if is_word(name)}
            table.finish()
        inputs = tuple(TensorSpec.from_section(item) for item in root.sections("inputs"))
        if text is not None:
            inputs, axes = _complete_text(inputs, axes, text)
        signature = cls(
            task=task,
            inputs=inputs,
            outputs=tuple(TensorSpec.from_section(item) for item in root.sections("outputs")),
            labels=root.strings("labels") if task != TENSOR else (),
            axes=axes,
            image=image,
            text=text,
            artifact=Artifact.from_section(root.section("artifact")) if root.has("artifact") else None,
        )
        root.finish()
        signature._check_tensors()
        if task != TENSOR:
            signature._check_classes()
        if image is not None:
            signature._check_image(image)
        if text is not None:
            signature._check_text(text)
        return signature

    def input(self, name: str) -> TensorSpec:
        """The input of that name.

        Raises:
            KeyError: If there is none.
        """
        return {spec.name: spec for spec in self.inputs}[name]

    def _check_tensors(self) -> None:
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            if not names:
                raise SignatureError(f"signature.{kind} is empty; list at least one tensor")
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise SignatureError(f"signature.{kind} lists {twice!r} twice")
        named = {axis for spec in self.inputs for axis in spec.dynamic_axes.values()}
        missing = sorted(named - self.axes.keys())
        if missing:
            raise SignatureError(
                f"the axis {missing[0]!r} has no bounds; "
                f"give its smallest and largest size as axes.{missing[0]}.minimum and .maximum"
            )
        unknown = sorted(self.axes.keys() - named)
        if unknown:
            raise SignatureError(f"axes.{unknown[0]} is the axis of no input; remove it or name it in a shape")
        for spec in self.inputs:
            if spec.dtype in ("int32", "int64") and None in (spec.minimum, spec.maximum):
                raise SignatureError(
                    f"input {spec.name!r} holds whole numbers; give their minimum and maximum, since an index out of "
                    "range can crash a worker"
                )

    def _check_classes(self) -> None:
        if len(self.outputs) != 1:
            raise SignatureError(f"{self.task} gives exactly one output, not {len(self.outputs)}")
        output = self.outputs[0]
        expected = (BATCH_AXIS, len(self.labels))
        if output.shape != expected:
            raise SignatureError(
                f"output {output.name!r} has the shape {list(output.shape)}, but there are "
                f"{len(self.labels)} labels; it must be {list(expected)}"
            )
        if not output.dtype.startswith("float"):
            raise SignatureError(f"output {output.name!r} is {output.dtype}; the logits of classes are float32")

    def _check_image(self, image: ImagePreprocessing) -> None:
        if len(self.inputs) != 1:
            raise SignatureError(f"{self.task} takes exactly one input, not {len(self.inputs)}")
        (spec,) = self.inputs
        expected = (BATCH_AXIS, image.channels, image.height, image.width)
        if spec.shape != expected:
            raise SignatureError(
                f"input {spec.name!r} has the shape {list(spec.shape)}, but preprocessing.image "
                f"makes {list(expected)}; correct one of them"
            )
        if spec.dtype != "float32":
            raise SignatureError(f"input {spec.name!r} is {spec.dtype}; normalised pixels are float32")

    def _check_text(self, text: TextPreprocessing) -> None:
        names = [spec.name for spec in self.inputs]
        if names not in ([INPUT_IDS], [INPUT_IDS, ATTENTION_MASK]):
            raise SignatureError(
                f"{self.task} takes {INPUT_IDS} and, if it has one, {ATTENTION_MASK}, not {', '.join(names)}; "
                f"use the task {TENSOR!r} for other inputs"
            )
        for spec in self.inputs:
            if spec.dtype not in ("int64", "int32"):
                raise SignatureError(f"input {spec.name!r} is {spec.dtype}; token ids and masks are int64 or int32")
            if len(spec.shape) != 2 or spec.shape != self.inputs[0].shape or not isinstance(spec.shape[1], str):
                raise SignatureError(
                    f"input {spec.name!r} has the shape {list(spec.shape)}; the inputs of texts share one dynamic "
                    f"axis, such as [{BATCH_AXIS}, length]"
                )
            if spec.padding is None:
                raise SignatureError(f"input {spec.name!r} has no padding, without which texts cannot share a batch")
        ids = self.inputs[0]
        if ids.padding != text.pad_id:
            raise SignatureError(
                f"input {ids.name!r} is padded with {ids.padding:g} and preprocessing.text.pad_id is {text.pad_id}; "
                "correct one of them"
            )
        axis = self.axes[str(ids.shape[1])]
        if (axis.minimum, axis.maximum) != (1, text.max_length):
            raise SignatureError(
                f"axes.{ids.shape[1]} runs from {axis.minimum} to {axis.maximum}, and texts have 1 to "
                f"{text.max_length} tokens (preprocessing.text.max_length); correct one of them"
            )

    def with_artifact(self, artifact: Artifact) -> Signature:
        """The same signature, computed by ``artifact``."""
        return replace(self, artifact=artifact)

    def to_document(self) -> dict[str, Any]:
        """The JSON form; :meth:`from_document` reads it back."""
        document: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "inputs": [spec.to_document() for spec in self.inputs],
            "outputs": [spec.to_document() for spec in self.outputs],
        }
        if self.task != TENSOR:
            document["labels"] = list(self.labels)
        if self.axes:
            document["axes"] = {name: axis.to_document() for name, axis in self.axes.items()}
        if self.image is not None:
            document["preprocessing"] = {"image": self.image.to_document()}
        if self.text is not None:
            document["preprocessing"] = {"text": self.text.to_document()}
        if self.artifact is not None:
            document["artifact"] = self.artifact.to_document()
        return document


def _complete_text(
    inputs: tuple[TensorSpec, ...], axes: dict[str, Axis], text: TextPreprocessing
) -> tuple[tuple[TensorSpec, ...], dict[str, Axis]]:
    """Fill in what texts leave no choice about: bounds of their axis, padding, and the values of a mask."""
    completed = []
    for spec in inputs:
        for axis in spec.dynamic_axes.values():
            axes.setdefault(axis, Axis(minimum=1, maximum=text.max_length))
        given = {key: value for key in ("minimum", "maximum", "padding") if (value := getattr(spec, key)) is not None}
        if spec.name == INPUT_IDS:
            usual = {"minimum": 0.0, "padding": float(text.pad_id)}
        elif spec.name == ATTENTION_MASK:
            usual = {"minimum": 1.0, "maximum": 1.0, "padding": 0.0}
        else:
            usual = {}
        completed.append(replace(spec, **{**usual, **given}))
    return tuple(completed), axes
