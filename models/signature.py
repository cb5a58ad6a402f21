"""The signature of a trained model: all of it but the artifact, which export adds."""

from models.images import ImageDataset

_COLOUR_MODES = {1: "L", 3: "RGB"}


def image_classification_signature(dataset: ImageDataset) -> dict[str, object]:
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
