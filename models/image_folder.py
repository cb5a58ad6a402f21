"""Image data sets of one's own: class folders or arrays, decoded, resized and split."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.dataset import Dataset, Split
from models.digest import SampleDigest
from models.errors import DataError, PictureError
from models.images import ImageCollate, ImageSample, ImageSplit, LabelledImages, PixelCounter
from models.picture_file import ColourMode
from models.picture_list import FoundPictures, PictureList, find_pictures
from models.signature import image_classification_signature
from models.splits import SplitName, divide

EVALUATION_SOURCE = "models.image_folder:evaluation_samples"
"""Import path of `evaluation_samples`, as a checkpoint names it."""

_SPLITS: tuple[SplitName, ...] = ("train", "validation", "held_out")
_CHANNELS: dict[ColourMode, int] = {"L": 1, "RGB": 3}
_MEMORY_LIMIT_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """Where labelled images come from, what becomes of them, and how they are split."""

    path: str
    """A folder or an .npz file; see `models.picture_list.find_pictures`."""

    height: int
    """Rows that images are resized to."""

    width: int
    """Columns that images are resized to."""

    mode: ColourMode = "RGB"
    """What their colours are converted to: L is grey."""

    skip_bad_rows: bool = False
    """Leave out images that cannot be read, and count them."""

    seed: int = 0
    """Chooses the splits that have no folder of their own."""

    held_out_fraction: float = 0.2
    """Share of all images that only measures the finished model."""

    validation_fraction: float = 0.1
    """Share of the remaining images that chooses the best epoch."""

    def __post_init__(self) -> None:
        """Checks the size and mode.

        Raises:
            DataError: naming the field.
        """
        for name, size in (("height", self.height), ("width", self.width)):
            if size < 1:
                raise DataError(f"The {name} of images is {size}; it must be at least 1.")
        if self.mode not in _CHANNELS:
            raise DataError(f"The mode of images is {self.mode!r}; it must be one of {', '.join(_CHANNELS)}.")

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return _CHANNELS[self.mode]

    def options(self) -> dict[str, Any]:
        """All fields as plain values, for a checkpoint to keep."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFormat:
    """What is the same for all images of a data set; a `models.signature.ImageDescription`."""

    class_names: tuple[str, ...]
    """Index i names class i."""

    height: int
    """Pixels."""

    width: int
    """Pixels."""

    mean: tuple[float, ...]
    """Per channel, of pixel / 255 over the training split."""

    std: tuple[float, ...]
    """Per channel, of pixel / 255 over the training split."""

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return len(self.mean)


class PictureSplit:
    """Images that are read when asked for; a `models.dataset.Split`.

    Args:
        pictures: sound ones only.
        source: their size and mode.
    """

    in_memory = False
    lengths: npt.NDArray[np.int64] | None = None

    def __init__(self, pictures: PictureList, source: ImageSource) -> None:
        self.labels = pictures.labels
        self._pictures = pictures
        self._source = source

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> ImageSample:
        return ImageSample(index, _read(self._pictures, index, self._source), int(self.labels[index]))


def load_image_dataset(source: ImageSource, *, memory_limit_bytes: int = _MEMORY_LIMIT_BYTES) -> Dataset:
    """Reads every image once: to check it, for the statistics and the digest.

    Args:
        source: where they come from, what becomes of them, and how they are split.
        memory_limit_bytes: resized images stay in memory when all take no more; else they are read anew in each epoch.

    Raises:
        DataError: for images that cannot be listed, read or split; names the path and the remedy.
    """
    found = find_pictures(source.path)
    chosen = _choose_splits(found, source)
    sample_bytes = source.height * source.width * source.channels
    in_memory = sample_bytes * sum(len(pictures.labels) for pictures in chosen.values()) <= memory_limit_bytes
    counter = PixelCounter(channels=source.channels)
    digest = SampleDigest([found.class_names, source.height, source.width, source.channels])
    splits: dict[SplitName, Split] = {}
    skipped = 0
    for name in _SPLITS:
        digest.start_split()
        good: list[int] = []
        kept: list[npt.NDArray[np.uint8]] = []
        for index, pixels, label in _sound_samples(chosen[name], source):
            good.append(index)
            digest.add(pixels.tobytes(), label)
            if name == "train":
                counter.add(pixels)
            if in_memory:
                kept.append(pixels)
        sound = chosen[name].select(np.asarray(good, dtype=np.int64))
        skipped += len(chosen[name].labels) - len(good)
        _check_classes(name, sound, found)
        splits[name] = (
            ImageSplit(LabelledImages(images=np.stack(kept), labels=sound.labels))
            if in_memory
            else PictureSplit(sound, source)
        )
    mean, std = counter.statistics()
    described = ImageFormat(class_names=found.class_names, height=source.height, width=source.width, mean=mean, std=std)
    return Dataset(
        train=splits["train"],
        validation=splits["validation"],
        held_out=splits["held_out"],
        class_names=found.class_names,
        collate=ImageCollate(mean=mean, std=std),
        model_arguments={"in_channels": source.channels, "num_classes": len(found.class_names)},
        signature=image_classification_signature(described),
        evaluation={"source": EVALUATION_SOURCE, "options": source.options()},
        digest=digest.hexdigest(),
        skipped_rows=skipped,
    )


def evaluation_samples(*, split: SplitName = "held_out", **options: Any) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    """Yields the images a checkpoint's metrics were measured on.

    Args:
        split: the split to yield; only `last.pt` names another than "held_out".
        **options: the fields of an `ImageSource`; a relative path counts from the working folder.

    Yields:
        An image [height, width] or [height, width, 3] uint8, resized, and its label's index.
    """
    source = ImageSource(**options)
    for _, pixels, label in _sound_samples(_choose_splits(find_pictures(source.path), source)[split], source):
        yield pixels, label


def _choose_splits(found: FoundPictures, source: ImageSource) -> Mapping[SplitName, PictureList]:
    """Takes what has no folder of its own from the training pictures, as `stratified_splits` would."""
    splits = dict(found.splits)
    shares: dict[SplitName, float] = {
        "held_out": source.held_out_fraction,
        "validation": source.validation_fraction,
    }
    for name, share in shares.items():
        if name not in splits:
            train = splits["train"]
            rest, taken = divide(
                np.arange(len(train.labels)), train.labels, found.class_names, share=share, seed=source.seed
            )
            splits["train"], splits[name] = train.select(rest), train.select(taken)
    return splits


def _sound_samples(pictures: PictureList, source: ImageSource) -> Iterator[tuple[int, npt.NDArray[np.uint8], int]]:
    """Yields (index, pixels, label); bad pictures raise or are left out, as the source says."""
    for index, label in enumerate(pictures.labels.tolist()):
        try:
            pixels = _read(pictures, index, source)
        except PictureError:
            if not source.skip_bad_rows:
                raise
        else:
            yield index, pixels, label


def _read(pictures: PictureList, index: int, source: ImageSource) -> npt.NDArray[np.uint8]:
    return pictures.read(index, height=source.height, width=source.width, mode=source.mode)


def _check_classes(name: SplitName, pictures: PictureList, found: FoundPictures) -> None:
    counts = np.bincount(pictures.labels, minlength=len(found.class_names))
    if name == "train" and not counts.all():
        raise DataError(
            f"The training split has no sound image of the class {found.class_names[int(counts.argmin())]!r}; add some."
        )
    if not counts.any():
        raise DataError(f"The {name} split has no sound image; add some.")
