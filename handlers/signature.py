"""The signature: the one contract between export, handlers and load test.

It says what a model takes (names, dtypes, shapes with named dynamic axes, preprocessing), what it gives, what
its classes are called, and, once exported, which artifact computes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from handlers.document import Section, shown
from handlers.errors import SignatureError

FORMAT_VERSION = 1
TASKS = ("image-classification",)
DTYPES = ("float32",)
FORMATS = ("torchscript", "onnx")
PRECISIONS = ("fp32",)
CHANNELS = {"L": 1, "RGB": 3}
BATCH_AXIS = "batch"

DEFAULT_MAX_PIXELS = 4096 * 4096
# Pillow's own limit (PIL.Image.MAX_IMAGE_PIXELS): it warns of larger images, and refuses those of twice as many.
_PILLOW_MAX_PIXELS = (1 << 30) // 4 // 3
# Far outside of what normalisation needs, and well inside of what float32 holds.
_MIN_STD = 1e-6
_MAX_MAGNITUDE = 1e6

_MAX_DIMENSION = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor that goes into or comes out of the model.

    Attributes:
        name: Name of the graph's input or output.
        dtype: One of ``DTYPES``.
        shape: Sizes of the axes; a string names a dynamic axis. The first axis is always ``batch``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def from_section(cls, section: Section) -> TensorSpec:
        """Read one entry of ``inputs`` or ``outputs``."""
        name = section.string("name")
        dtype = section.string("dtype", choices=DTYPES)
        axes = section.sequence("shape")
        section.finish()
        shape: list[int | str] = []
        for axis in axes:
            fixed = isinstance(axis, int) and not isinstance(axis, bool) and 1 <= axis <= _MAX_DIMENSION
            if not fixed and not (isinstance(axis, str) and axis.isidentifier()):
                raise SignatureError(
                    f"the shape of {shown(name)} has the axis {shown(axis)}; "
                    "give a size of at least 1 or the name of a dynamic axis"
                )
            shape.append(axis)  # type: ignore[arg-type]  # narrowed by the two checks above
        if not shape or shape[0] != BATCH_AXIS:
            raise SignatureError(
                f"the shape of {shown(name)} must begin with the axis {BATCH_AXIS!r}, not {shown(shape)}"
            )
        return cls(name=name, dtype=dtype, shape=tuple(shape))

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePreprocessing:
    """How pixels become the input tensor: ``(pixel / 255 - mean) / std``, channels first.

    Attributes:
        mode: Pillow mode that images are converted to: ``L`` (grey) or ``RGB``.
        height: Rows that images are resized to, in pixels.
        width: Columns that images are resized to, in pixels.
        mean: One number a channel, in units of full scale (0 to 1).
        std: One positive number a channel, in units of full scale.
        max_pixels: Larger images are refused before they are decoded (decompression bombs).
    """

    mode: str
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int = DEFAULT_MAX_PIXELS

    @property
    def channels(self) -> int:
        """Number of colour channels."""
        return CHANNELS[self.mode]

    @classmethod
    def from_section(cls, section: Section) -> ImagePreprocessing:
        """Read the ``preprocessing.image`` mapping."""
        mode = section.string("mode", choices=tuple(CHANNELS))
        channels = CHANNELS[mode]
        image = cls(
            mode=mode,
            height=section.integer("height", minimum=1, maximum=_MAX_DIMENSION),
            width=section.integer("width", minimum=1, maximum=_MAX_DIMENSION),
            mean=section.numbers("mean", length=channels, minimum=-_MAX_MAGNITUDE, maximum=_MAX_MAGNITUDE),
            std=section.numbers("std", length=channels, minimum=_MIN_STD, maximum=_MAX_MAGNITUDE),
            max_pixels=(
                section.integer("max_pixels", minimum=1, maximum=_PILLOW_MAX_PIXELS)
                if section.has("max_pixels")
                else DEFAULT_MAX_PIXELS
            ),
        )
        section.finish()
        return image

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "mode": self.mode,
            "height": self.height,
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "max_pixels": self.max_pixels,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """The exported file that computes the model.

    Attributes:
        format: One of ``FORMATS``.
        precision: One of ``PRECISIONS``.
        file: Its name at the archive's root.
    """

    format: str
    precision: str
    file: str

    @classmethod
    def from_section(cls, section: Section) -> Artifact:
        """Read the ``artifact`` mapping."""
        artifact = cls(
            format=section.string("format", choices=FORMATS),
            precision=section.string("precision", choices=PRECISIONS),
            file=section.string("file"),
        )
        section.finish()
        if "/" in artifact.file or "\\" in artifact.file or artifact.file.startswith("."):
            raise SignatureError(f"artifact.file must be a plain file name, not {artifact.file!r}")
        return artifact

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"format": self.format, "precision": self.precision, "file": self.file}


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        task: One of ``TASKS``; it chooses how requests are decoded and answers are built.
        inputs: The model's input tensors.
        outputs: The model's output tensors.
        labels: Class names, in the order of the last output axis.
        image: Preprocessing of images.
        artifact: What computes the model; None until it is exported.
    """

    task: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    image: ImagePreprocessing
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
        preprocessing = root.section("preprocessing")
        signature = cls(
            task=root.string("task", choices=TASKS),
            inputs=tuple(TensorSpec.from_section(item) for item in root.sections("inputs")),
            outputs=tuple(TensorSpec.from_section(item) for item in root.sections("outputs")),
            labels=root.strings("labels"),
            image=ImagePreprocessing.from_section(preprocessing.section("image")),
            artifact=Artifact.from_section(root.section("artifact")) if root.has("artifact") else None,
        )
        preprocessing.finish()
        root.finish()
        signature._check_image_classification()
        return signature

    def _check_image_classification(self) -> None:
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise SignatureError(
                f"{self.task} takes exactly one input and gives one output, "
                f"not {len(self.inputs)} and {len(self.outputs)}"
            )
        image = self.image
        expected_in = (BATCH_AXIS, image.channels, image.height, image.width)
        if self.inputs[0].shape != expected_in:
            raise SignatureError(
                f"input {self.inputs[0].name!r} has the shape {list(self.inputs[0].shape)}, but preprocessing.image "
                f"makes {list(expected_in)}; correct one of them"
            )
        expected_out = (BATCH_AXIS, len(self.labels))
        if self.outputs[0].shape != expected_out:
            raise SignatureError(
                f"output {self.outputs[0].name!r} has the shape {list(self.outputs[0].shape)}, but there are "
                f"{len(self.labels)} labels; it must be {list(expected_out)}"
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
            "labels": list(self.labels),
            "preprocessing": {"image": self.image.to_document()},
        }
        if self.artifact is not None:
            document["artifact"] = self.artifact.to_document()
        return document
