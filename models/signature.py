"""The signature of a trained model: all of it but the artifact, which export adds."""

from collections.abc import Sequence
from typing import Any, Protocol

_COLOUR_MODES = {1: "L", 3: "RGB"}


class ImageDescription(Protocol):
    """What is the same for all images of a data set."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Index i names class i."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixel / 255."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of pixel / 255."""
        ...

    @property
    def height(self) -> int:
        """Pixels."""
        ...

    @property
    def width(self) -> int:
        """Pixels."""
        ...

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        ...


def image_classification_signature(dataset: ImageDescription) -> dict[str, Any]:
    """Describes what a classifier trained on `dataset` takes and returns.

    Pixels are uint8; the model's input is (pixel / 255 - mean) / std, per channel.
    """
    return {
        "format_version": 1,
        "task": "image-classification",
        "inputs": [
            {
                "name": "image",
                "dtype": "float32",
                "shape": ["batch", dataset.channels, dataset.height, dataset.width],
            }
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", len(dataset.class_names)]}],
        "labels": list(dataset.class_names),
        "preprocessing": {
            "image": {
                "mode": _COLOUR_MODES[dataset.channels],
                "height": dataset.height,
                "width": dataset.width,
                "mean": list(dataset.mean),
                "std": list(dataset.std),
            }
        },
    }


def text_classification_signature(
    class_names: Sequence[str], *, tokenizer: str, vocab_size: int, max_length: int, pad_id: int
) -> dict[str, Any]:
    """Describes what a text classifier takes and returns.

    Texts are cut into at most `max_length` tokens; the shorter ones of a batch are filled up with `pad_id`, where
    attention_mask is 0 and not 1.

    Args:
        class_names: index i names class i.
        tokenizer: name of the file beside the weights that cuts texts into tokens, truncation included.
        vocab_size: rows of the embedding table; ids are smaller.
        max_length: tokens of the longest text.
        pad_id: the token that fills up.
    """
    return {
        "format_version": 1,
        "task": "text-classification",
        "inputs": [
            {
                "name": "input_ids",
                "dtype": "int64",
                "shape": ["batch", "length"],
                "minimum": 0,
                "maximum": vocab_size - 1,
                "padding": pad_id,
            },
            # A token's mask is 1, so only padding differs.
            {
                "name": "attention_mask",
                "dtype": "int64",
                "shape": ["batch", "length"],
                "minimum": 1,
                "maximum": 1,
                "padding": 0,
            },
        ],
        "axes": {"length": {"minimum": 1, "maximum": max_length}},
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", len(class_names)]}],
        "labels": list(class_names),
        "preprocessing": {"text": {"tokenizer": tokenizer, "max_length": max_length, "pad_id": pad_id}},
    }
