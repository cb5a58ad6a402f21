"""Image folders and arrays: decoded as handlers do, split, and broken files named or counted."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from handlers.image import EncodedImage, ImageDecoder
from handlers.signature import ImagePreprocessing, Signature
from models.dataloader import build_loader, choose_workers
from models.dataset import Dataset
from models.errors import DataError, PictureError
from models.image_folder import ImageSource, evaluation_samples, load_image_dataset
from models.images import pixel_statistics
from models.picture_file import read_picture
from models.sampler import EvaluationSampler

Pixels = npt.NDArray[np.uint8]
Fill = Callable[..., str]


def picture(seed: int, *shape: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape or (6, 5, 3), dtype=np.uint8)


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """Fills class folders with so many images each."""

    def fill(root: str = "set", **counts: int) -> str:
        for place, (name, count) in enumerate(counts.items()):
            folder = tmp_path / root / name
            folder.mkdir(parents=True)
            for i in range(count):
                suffix = [".png", ".PNG"][i % 2]
                Image.fromarray(picture(1000 * place + i + len(root))).save(folder / f"{i:03}{suffix}", format="PNG")
        return str(tmp_path / "set")

    return fill


def load(path: str, *, memory_limit_bytes: int = 2**20, **options: object) -> Dataset:
    source = ImageSource(path=path, **{"height": 6, "width": 5, **options})  # type: ignore[arg-type]
    return load_image_dataset(source, memory_limit_bytes=memory_limit_bytes)


def splits_of(dataset: Dataset) -> list[list[tuple[bytes, int]]]:
    return [
        [(split[i].pixels.tobytes(), split[i].label) for i in range(len(split))]
        for split in (dataset.train, dataset.validation, dataset.held_out)
    ]


def test_class_folders_are_split_stratified_by_the_seed(fill: Fill) -> None:
    path = fill(cat=20, ape=20)
    dataset, again, other = load(path), load(path), load(path, seed=1)

    assert dataset.class_names == ("ape", "cat")
    assert [np.bincount(split.labels).tolist() for split in (dataset.train, dataset.validation, dataset.held_out)] == [
        [14, 14],
        [2, 2],
        [4, 4],
    ]
    everything = [sample for split in splits_of(dataset) for sample in split]
    expected = [(picture(i + 3).tobytes(), 1) for i in range(20)]
    expected += [(picture(1000 + i + 3).tobytes(), 0) for i in range(20)]
    assert sorted(everything) == sorted(expected)
    assert splits_of(again) == splits_of(dataset)
    assert again.digest == dataset.digest != other.digest


def test_split_folders_are_taken_as_they_are(fill: Fill, tmp_path: Path) -> None:
    path = fill("set/train", ape=3, cat=5)
    fill("set/validation", cat=2)
    fill("set/test", ape=1, cat=4)
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "set" / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "train" / "cat" / ".hidden.png").write_text("no image")

    dataset = load(path)

    labels = [split.labels.tolist() for split in (dataset.train, dataset.validation, dataset.held_out)]
    assert labels == [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1], [0, 1, 1, 1, 1]]


def test_a_missing_split_folder_is_a_share_of_train(fill: Fill) -> None:
    path = fill("set/train", ape=20, cat=20)
    fill("set/test", ape=1, cat=4)

    dataset = load(path, validation_fraction=0.25)

    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.held_out)] == [30, 10, 5]


def test_statistics_and_signature_are_those_of_the_training_split(fill: Fill) -> None:
    dataset = load(fill(cat=20, ape=20))

    train = np.stack([dataset.train[i].pixels for i in range(len(dataset.train))])
    mean, std = pixel_statistics(train)
    assert dataset.signature["preprocessing"] == {
        "image": {"mode": "RGB", "height": 6, "width": 5, "mean": list(mean), "std": list(std)}
    }
    assert Signature.from_document(dataset.signature).labels == ("ape", "cat")
    assert dataset.model_arguments == {"in_channels": 3, "num_classes": 2}
    images = dataset.collate([dataset.train[i] for i in range(len(dataset.train))]).inputs["image"]
    torch.testing.assert_close(images.mean(dim=[0, 2, 3]), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(images.std(dim=[0, 2, 3], correction=0), torch.ones(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_that_fit_into_memory_and_those_that_do_not_are_the_same(fill: Fill, mode: str) -> None:
    path = fill(cat=20, ape=20)
    small, large = (load(path, mode=mode, height=4, memory_limit_bytes=limit) for limit in (2**20, 100))

    assert (small.train.in_memory, large.train.in_memory) == (True, False)
    assert splits_of(large) == splits_of(small)
    assert large.digest == small.digest
    assert large.signature == small.signature
    assert choose_workers(small.train) == 0
    sampler = EvaluationSampler(28, batch_size=16)
    pairs = [
        build_loader(data.train, sampler, data.collate, device=torch.device("cpu"), workers=workers)
        for data, workers in ((small, 0), (large, 1))
    ]
    for batch, other in zip(*pairs, strict=True):
        assert torch.equal(batch.inputs["image"], other.inputs["image"])
        assert batch.labels.tolist() == other.labels.tolist()


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def sideways() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURES = {
    "rgb.png": encode(Image.fromarray(picture(0, 31, 17, 3)), "PNG"),
    "grey.png": encode(Image.fromarray(picture(1, 12, 40)), "PNG"),
    "rgba.png": encode(Image.fromarray(picture(2, 20, 20, 4)), "PNG"),
    "palette.png": encode(Image.fromarray(picture(3, 9, 9, 3)).quantize(8), "PNG", transparency=1),
    "bits.png": encode(Image.fromarray(picture(4, 9, 9)).convert("1"), "PNG"),
    "photo.jpg": encode(Image.fromarray(picture(5, 30, 20, 3)), "JPEG"),
    "turned.jpeg": encode(Image.fromarray(picture(6, 30, 20, 3)), "JPEG", exif=sideways()),
    "cmyk.jpg": encode(Image.fromarray(picture(7, 30, 20, 3)).convert("CMYK"), "JPEG"),
    "same size.png": encode(Image.fromarray(picture(8, 8, 7, 3)), "PNG"),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_files_are_decoded_exactly_as_handlers_do(name: str, mode: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PICTURES[name])
    channels = {"L": 1, "RGB": 3}[mode]
    preprocessing = ImagePreprocessing(mode=mode, height=8, width=7, mean=(0.0,) * channels, std=(1.0,) * channels)
    decoder = ImageDecoder(preprocessing, max_samples=1)

    pixels = read_picture(str(tmp_path / name), height=8, width=7, mode=mode)  # type: ignore[arg-type]

    served, _ = decoder.decode(EncodedImage(data=PICTURES[name]))
    assert pixels.shape == ((8, 7) if mode == "L" else (8, 7, 3))
    np.testing.assert_array_equal(
        pixels.reshape(8, 7, channels), np.rint(served[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    )


BROKEN = {
    "empty": b"",
    "text": b"no image",
    "truncated": PICTURES["photo.jpg"][:400],
    "gif": encode(Image.fromarray(picture(0, 9, 9)), "GIF"),
    "16 bits": encode(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999), "PNG"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_named_or_skipped_and_counted(fill: Fill, kind: str) -> None:
    path = fill("set/train", ape=4, cat=4)
    fill("set/validation", ape=1)
    fill("set/test", cat=2)
    for split in ("train/ape", "test/cat"):
        Path(path, split, "broken.png").write_bytes(BROKEN[kind])

    with pytest.raises(
        PictureError, match=r"train/ape/broken\.png (cannot be read|has the mode I;16).*--skip-bad-rows\.$"
    ):
        load(path)
    for limit in (2**20, 10):
        dataset = load(path, skip_bad_rows=True, memory_limit_bytes=limit)
        assert dataset.skipped_rows == 2
        assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.held_out)] == [8, 1, 2]
        assert [len(split) for split in splits_of(dataset)] == [8, 1, 2]
        samples = list(evaluation_samples(**dataset.evaluation["options"]))
        assert [label for _, label in samples] == [1, 1]


@pytest.mark.parametrize("split", ["held_out", "train"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_evaluation_samples_are_those_of_the_split(fill: Fill, split: str, mode: str) -> None:
    dataset = load(fill(cat=20, ape=20), mode=mode, height=3, width=9)
    options = dataset.evaluation["options"]

    assert dataset.evaluation["source"] == "models.image_folder:evaluation_samples"
    assert all(type(value) in (str, int, float, bool) for value in options.values())
    samples = list(evaluation_samples(**options, split=split))

    expected = getattr(dataset, split)
    assert samples[0][0].dtype == np.uint8
    assert samples[0][0].shape == ((3, 9) if mode == "L" else (3, 9, 3))
    assert [(pixels.tobytes(), label) for pixels, label in samples] == [
        (expected[i].pixels.tobytes(), expected[i].label) for i in range(len(expected))
    ]


@pytest.mark.parametrize("shape", [(40, 6, 5), (40, 6, 5, 1), (40, 6, 5, 3)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_arrays_become_what_files_of_the_same_pixels_would(tmp_path: Path, shape: tuple[int, ...], mode: str) -> None:
    images, labels = picture(0, *shape), np.array([10, 9] * 20)
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "folder" / f"{label:02}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / f"{i:02}.png")

    dataset = load(str(tmp_path / "set.npz"), mode=mode, width=4)
    files = load(str(tmp_path / "folder"), mode=mode, width=4)

    assert dataset.class_names == ("9", "10")
    assert dataset.train.in_memory
    everything, expected = ([s for split in splits_of(data) for s in split] for data in (dataset, files))
    assert sorted(everything) == sorted(expected)
    assert [len(split) for split in splits_of(dataset)] == [28, 4, 8]


def test_labels_of_arrays_may_be_strings(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=picture(0, 40, 6, 5), labels=np.array(["dog", "cat"] * 20))

    assert load(str(tmp_path / "set.npz"), mode="L").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": picture(0, 4, 6, 5)}, "has no array named 'labels', only 'images'; save it with images"),
        ({"images": np.zeros((4, 6, 5)), "labels": np.arange(4)}, r"are float64 of the shape \[4, 6, 5\]; they must"),
        ({"images": picture(0, 4, 6), "labels": np.arange(4)}, r"are uint8 of the shape \[4, 6\]; they must be uint8"),
        ({"images": picture(0, 4, 6, 5, 2), "labels": np.arange(4)}, r"of the shape \[4, 6, 5, 2\]; they must"),
        ({"images": picture(0, 4, 6, 5), "labels": np.arange(3)}, r"are int64 of the shape \[3\]; .* the 4 images"),
        ({"images": picture(0, 4, 6, 5), "labels": np.arange(4) / 2}, "labels of .* are float64 of the shape"),
        ({"images": picture(0, 4, 6, 5), "labels": np.zeros(4, dtype=int)}, "has only the class '0'; a classifier"),
        ({"images": picture(0, 4, 6, 5), "labels": np.array([{}] * 4)}, "cannot be read as an .npz file"),
        ({"images": picture(0, 4, 6, 5), "labels": np.arange(4)}, "The class '0' has too few samples to be split"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, npt.NDArray[np.generic]], message: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)  # type: ignore[arg-type]

    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "set.npz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no zip"])
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.npz").write_bytes(content)

    with pytest.raises(DataError, match=r"set\.npz cannot be read as an \.npz file \(.*\); save it with numpy"):
        load(str(tmp_path / "set.npz"))


@pytest.mark.parametrize(("path", "kind"), [("none", "folder"), ("none.npz", "file")])
def test_a_missing_path_is_named(path: str, kind: str) -> None:
    with pytest.raises(DataError, match=rf"There is no {kind} {path}; say where it is with -s data."):
        load(path)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], r"set has no folders in it; it needs one for each class\.$"),
        (["ape"], r"has only the class 'ape'; a classifier needs two"),
        (["ape", "cat", "empty"], r"set/empty holds no \.png, \.jpg, \.jpeg files; add some, or remove the folder"),
        (["train/ape", "train/cat", "other/ape"], "has the folder train, and other, which is no split; move it"),
        (["train/ape", "train/cat", "test/dog"], "set/test has the class dog, and train has not; add it there"),
    ],
)
def test_a_folder_of_another_shape_is_refused(fill: Fill, tmp_path: Path, folders: list[str], message: str) -> None:
    (tmp_path / "set").mkdir()
    for folder in folders:
        fill(**{folder: 0 if folder == "empty" else 5})

    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "set"))


def test_a_class_of_broken_images_only_is_refused(fill: Fill) -> None:
    path = fill(ape=5, cat=5)
    for file in Path(path, "cat").iterdir():
        file.write_bytes(b"")

    with pytest.raises(DataError, match="The training split has no sound image of the class 'cat'; add some"):
        load(path, skip_bad_rows=True, held_out_fraction=0.3, validation_fraction=0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "The height of images is 0; it must be at least 1."),
        ({"mode": "RGBA"}, "The mode of images is 'RGBA'; it must be one of L, RGB."),
    ],
)
def test_a_source_is_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("set", **options)
