"""The digits: real, scaled, split without overlap, normalised on the training part."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from models.digits import evaluation_samples, load_digits_dataset
from models.images import ImageDataset, LabelledImages, normalise, pixel_statistics
from models.signature import image_classification_signature


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    return load_digits_dataset(seed=0)


def all_splits(dataset: ImageDataset) -> list[LabelledImages]:
    return [dataset.train, dataset.validation, dataset.held_out]


def contents(split: LabelledImages) -> Counter[tuple[bytes, int]]:
    return Counter((image.tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True))


def test_the_splits_hold_every_digit_exactly_once(dataset: ImageDataset) -> None:
    raw = load_digits()
    scaled = np.rint(raw.images * 255 / 16).astype(np.uint8)
    every_digit = contents(LabelledImages(images=scaled, labels=raw.target.astype(np.int64)))

    assert sum((contents(split) for split in all_splits(dataset)), Counter()) == every_digit
    assert [len(split) for split in all_splits(dataset)] == [1293, 144, 360]


def test_pixels_use_the_whole_range_of_a_byte(dataset: ImageDataset) -> None:
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.images.shape[1:] == (8, 8)
    assert (dataset.train.images.min(), dataset.train.images.max()) == (0, 255)
    assert len(np.unique(dataset.train.images)) == 17


def test_each_split_is_stratified(dataset: ImageDataset) -> None:
    for split in all_splits(dataset):
        counts = np.bincount(split.labels, minlength=10)
        assert counts.max() - counts.min() <= 0.06 * len(split)
        assert counts.min() >= 0.08 * len(split)


def test_the_seed_chooses_the_splits(dataset: ImageDataset) -> None:
    again, other = load_digits_dataset(seed=0), load_digits_dataset(seed=1)

    np.testing.assert_array_equal(again.held_out.images, dataset.held_out.images)
    np.testing.assert_array_equal(again.train.images, dataset.train.images)
    assert not np.array_equal(other.held_out.images, dataset.held_out.images)


def test_the_validation_share_does_not_touch_the_held_out_split(dataset: ImageDataset) -> None:
    other = load_digits_dataset(seed=0, validation_fraction=0.3)

    np.testing.assert_array_equal(other.held_out.images, dataset.held_out.images)
    assert len(other.validation) == 432


def test_normalisation_is_that_of_the_training_part(dataset: ImageDataset) -> None:
    train = normalise(dataset.train.images, mean=dataset.mean, std=dataset.std)
    held_out = normalise(dataset.held_out.images, mean=dataset.mean, std=dataset.std)

    assert train.shape == (1293, 1, 8, 8)
    assert train.dtype == torch.float32
    assert dataset.train.labels.dtype == np.int64
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert held_out.mean().abs() > 1e-4


def test_colour_images_are_normalised_per_channel() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    split = LabelledImages(images=images, labels=np.zeros(6, dtype=np.int64))
    mean, std = pixel_statistics(images)
    dataset = ImageDataset(train=split, validation=split, held_out=split, class_names=("a", "b"), mean=mean, std=std)

    tensors = normalise(images, mean=mean, std=std)

    expected = (images[2, 1, 3, 2] / 255 - mean[2]) / std[2]
    assert tensors.shape == (6, 3, 4, 5)
    assert tensors[2, 2, 1, 3].item() == pytest.approx(expected, rel=1e-5)
    assert image_classification_signature(dataset)["inputs"] == [
        {"name": "image", "dtype": "float32", "shape": ["batch", 3, 4, 5]}
    ]


@pytest.mark.parametrize("split", ["held_out", "validation", "train"])
def test_evaluation_samples_are_those_of_the_split(dataset: ImageDataset, split: str) -> None:
    samples = list(evaluation_samples(seed=0, split=split))
    expected: LabelledImages = getattr(dataset, split)

    assert samples[0][0].shape == (8, 8)
    assert samples[0][0].dtype == np.uint8
    assert type(samples[0][1]) is int
    np.testing.assert_array_equal(np.stack([image for image, _ in samples]), expected.images)
    assert [label for _, label in samples] == expected.labels.tolist()


def test_the_signature_says_how_to_prepare_an_image(dataset: ImageDataset) -> None:
    assert image_classification_signature(dataset) == {
        "format_version": 1,
        "task": "image-classification",
        "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}],
        "labels": list("0123456789"),
        "preprocessing": {
            "image": {
                "mode": "L",
                "height": 8,
                "width": 8,
                "mean": [pytest.approx(dataset.train.images.mean() / 255)],
                "std": [pytest.approx(dataset.train.images.std() / 255)],
            }
        },
    }
