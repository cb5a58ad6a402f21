"""Images in memory: counted exactly, normalised batch by batch, as a data set that a training takes."""

import pickle

import numpy as np
import pytest
import torch

from models.dataloader import build_loader
from models.dataset import Dataset
from models.digits import build_digits_dataset, evaluation_samples, load_digits_dataset
from models.errors import DataError
from models.images import (
    ImageCollate,
    ImageDataset,
    ImageSample,
    ImageSplit,
    LabelledImages,
    PixelCounter,
    normalise,
    pixel_statistics,
    to_dataset,
)
from models.sampler import EvaluationSampler
from models.signature import image_classification_signature


def some_images(*shape: int, seed: int = 0) -> LabelledImages:
    generator = np.random.default_rng(seed)
    return LabelledImages(
        images=generator.integers(0, 256, shape, dtype=np.uint8), labels=generator.integers(0, 2, shape[0])
    )


def as_dataset(**changes: LabelledImages) -> Dataset:
    splits = {"train": some_images(6, 4, 5), "validation": some_images(2, 4, 5), "held_out": some_images(3, 4, 5)}
    images = ImageDataset(**{**splits, **changes}, class_names=("a", "b"), mean=(0.5,), std=(0.25,))
    return to_dataset(images, evaluation={"source": "somewhere", "options": {}})


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 3), (5, 4, 3, 1)])
def test_statistics_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    images = some_images(*shape).images
    mean, std = pixel_statistics(images)

    scaled = images.reshape(-1, shape[3] if len(shape) == 4 else 1) / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std(axis=0), rtol=1e-12)


def test_counting_image_by_image_gives_the_same_bits_in_any_order() -> None:
    images = some_images(20, 6, 6, 3).images
    counter = PixelCounter(channels=3)
    for image in images[::-1]:
        counter.add(image)

    assert counter.statistics() == pixel_statistics(images)


def test_a_channel_without_any_difference_is_refused() -> None:
    images = some_images(5, 4, 4, 3).images
    images[..., 1] = 7

    with pytest.raises(DataError, match="All pixels of the training images are the same; check the images"):
        pixel_statistics(images)


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 5, 3)])
def test_a_batch_holds_what_the_whole_split_would(shape: tuple[int, ...]) -> None:
    images = some_images(*shape)
    mean, std = pixel_statistics(images.images)
    split, collate = ImageSplit(images), ImageCollate(mean=mean, std=std)

    batch = collate([split[3], split[1]])

    whole = normalise(images.images, mean=mean, std=std)
    assert batch.inputs["image"].shape == (2, len(mean), 3, 5)
    assert batch.inputs["image"].dtype == torch.float32
    assert torch.equal(batch.inputs["image"], whole[[3, 1]])
    assert batch.labels.tolist() == images.labels[[3, 1]].tolist()
    assert batch.ids.tolist() == [3, 1]
    assert batch.labels.dtype == batch.ids.dtype == torch.int64


def test_a_pixel_is_normalised_as_the_signature_says() -> None:
    collate = ImageCollate(mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 0.2))
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[1, 0] = (255, 51, 102)

    batch = collate([ImageSample(0, pixels, 1)])

    assert batch.inputs["image"][0, :, 1, 0].tolist() == pytest.approx([1.0, -0.2, 1.375], abs=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_yields_every_image_once(workers: int) -> None:
    dataset = as_dataset()
    sampler = EvaluationSampler(6, batch_size=4)

    batches = list(build_loader(dataset.train, sampler, dataset.collate, device=torch.device("cpu"), workers=workers))

    assert [batch.ids.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert pickle.loads(pickle.dumps(dataset.collate)) == dataset.collate


def test_images_in_memory_need_no_workers_and_have_no_lengths() -> None:
    split = as_dataset().train

    assert split.in_memory
    assert split.lengths is None
    assert len(split) == 6


@pytest.mark.parametrize("split", ["train", "validation", "held_out"])
def test_the_digest_changes_with_every_pixel_and_label(split: str) -> None:
    before: LabelledImages = some_images({"train": 6, "validation": 2, "held_out": 3}[split], 4, 5)
    pixels, labels = before.images.copy(), before.labels.copy()
    pixels[1, 2, 3] ^= 1
    labels[1] ^= 1

    digest = as_dataset(**{split: before}).digest

    assert digest == as_dataset().digest
    assert as_dataset(**{split: LabelledImages(images=pixels, labels=before.labels)}).digest != digest
    assert as_dataset(**{split: LabelledImages(images=before.images, labels=labels)}).digest != digest


def test_the_digits_are_a_data_set() -> None:
    dataset, images = build_digits_dataset(seed=2), load_digits_dataset(seed=2)

    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.held_out)] == [1293, 144, 360]
    assert dataset.class_names == tuple("0123456789")
    assert dataset.model_arguments == {"in_channels": 1, "num_classes": 10}
    assert dataset.signature == image_classification_signature(images)
    assert dataset.files == {}
    assert dataset.skipped_rows == 0
    batch = dataset.collate([dataset.train[i] for i in range(50)])
    assert torch.equal(batch.inputs["image"], normalise(images.train.images[:50], mean=images.mean, std=images.std))
    assert dataset.digest != build_digits_dataset(seed=3).digest


def test_the_digits_say_how_to_find_the_held_out_ones() -> None:
    dataset = build_digits_dataset(seed=2, held_out_fraction=0.3)

    assert dataset.evaluation["source"] == "models.digits:evaluation_samples"
    samples = list(evaluation_samples(**dataset.evaluation["options"]))

    assert [label for _, label in samples] == dataset.held_out.labels.tolist()
    np.testing.assert_array_equal(samples[7][0], dataset.held_out[7].pixels)
