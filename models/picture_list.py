"""Labelled pictures, not read yet: from class folders, or from an array file."""

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.errors import DataError
from models.picture_file import SUFFIXES, ColourMode, read_picture, resize_picture
from models.splits import IntArray, SplitName
from models.table import label_order

ARRAY_SUFFIX = ".npz"

_SPLIT_FOLDERS: dict[str, SplitName] = {"train": "train", "validation": "validation", "test": "held_out"}


class PictureList(Protocol):
    """Pictures and their classes, index by index."""

    @property
    def labels(self) -> IntArray:
        """[N], each an index into the class names."""
        ...

    def select(self, indices: IntArray) -> Self:
        """Some of the pictures, in the order of `indices`."""
        ...

    def read(self, index: int, *, height: int, width: int, mode: ColourMode) -> npt.NDArray[np.uint8]:
        """One picture, as `models.picture_file.read_picture` returns it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PictureFiles:
    """Pictures in files."""

    paths: list[str]

    labels: IntArray
    """[N], each an index into the class names."""

    def select(self, indices: IntArray) -> Self:
        """Some of the pictures, in the order of `indices`."""
        return type(self)(paths=[self.paths[index] for index in indices], labels=self.labels[indices])

    def read(self, index: int, *, height: int, width: int, mode: ColourMode) -> npt.NDArray[np.uint8]:
        """Reads a file; raises PictureError when it is broken."""
        return read_picture(self.paths[index], height=height, width=width, mode=mode)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PictureArray:
    """Pictures in an array."""

    pixels: npt.NDArray[np.uint8]
    """[N, H, W], or [N, H, W, 3] for RGB."""

    labels: IntArray
    """[N], each an index into the class names."""

    def select(self, indices: IntArray) -> Self:
        """Some of the pictures, in the order of `indices`."""
        return type(self)(pixels=self.pixels[indices], labels=self.labels[indices])

    def read(self, index: int, *, height: int, width: int, mode: ColourMode) -> npt.NDArray[np.uint8]:
        """Takes a picture out of the array, and converts it where it has another size or mode."""
        return resize_picture(Image.fromarray(self.pixels[index]), height=height, width=width, mode=mode)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FoundPictures:
    """What a folder or file holds."""

    splits: Mapping[SplitName, PictureList]
    """Those splits that have a folder of their own; "train" has all the others."""

    class_names: tuple[str, ...]
    """Index i names class i."""


def find_pictures(path: str) -> FoundPictures:
    """Lists the pictures of a folder or an array file.

    Args:
        path: a folder with one sub-folder of .png, .jpg or .jpeg files for each class; or one with the folders train,
            validation and test, each with sub-folders for the classes, of which only train must be there; or an .npz
            file with images [N, H, W] or [N, H, W, 3] uint8 and labels [N], numbers or strings.

    Returns:
        The pictures; classes are sorted by their names.

    Raises:
        DataError: when they cannot be listed; names the folder or file and the remedy.
    """
    if path.lower().endswith(ARRAY_SUFFIX):
        found = _from_array(path)
    else:
        try:
            found = _from_folder(path)
        except OSError as error:
            raise DataError(
                f"{error.filename or path} cannot be read ({error.strerror or error}); check its permissions."
            ) from error
    if len(found.class_names) < 2:
        raise DataError(
            f"{path} has only the class {', '.join(found.class_names)!r}; a classifier needs two, "
            "each with a folder or a label of its own."
        )
    return found


def _from_folder(path: str) -> FoundPictures:
    if not os.path.isdir(path):
        raise DataError(
            f"There is no folder {path}; say where it is with -s data.path=FOLDER, from the working folder on."
        )
    folders = _folders(path)
    if "train" not in folders:
        return FoundPictures(splits={"train": _files(path, folders, needed=True)}, class_names=tuple(folders))
    foreign = [name for name in folders if name not in _SPLIT_FOLDERS]
    if foreign:
        raise DataError(
            f"{path} has the folder train, and {foreign[0]}, which is no split; "
            f"move it, or name it one of {', '.join(_SPLIT_FOLDERS)}."
        )
    class_names = _folders(os.path.join(path, "train"))
    splits: dict[SplitName, PictureList] = {}
    for name in folders:
        folder = os.path.join(path, name)
        unknown = [found for found in _folders(folder) if found not in class_names]
        if unknown:
            raise DataError(f"{folder} has the class {unknown[0]}, and train has not; add it there, or remove it here.")
        splits[_SPLIT_FOLDERS[name]] = _files(folder, class_names, needed=name == "train")
    return FoundPictures(splits=splits, class_names=tuple(class_names))


def _folders(path: str) -> list[str]:
    found = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DataError(f"{path} has no folders in it; it needs one for each class.")
    return found


def _files(path: str, class_names: Sequence[str], *, needed: bool) -> PictureFiles:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        folder = os.path.join(path, name)
        entries = os.scandir(folder) if os.path.isdir(folder) else ()
        files = sorted(
            entry.name
            for entry in entries
            if Path(entry.name).suffix.lower() in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
        )
        if needed and not files:
            raise DataError(f"{folder} holds no {', '.join(SUFFIXES)} files; add some, or remove the folder.")
        paths.extend(os.path.join(folder, file) for file in files)
        labels.extend([label] * len(files))
    if not paths:
        raise DataError(f"{path} holds no {', '.join(SUFFIXES)} files; add some, or remove the folder.")
    return PictureFiles(paths=paths, labels=np.asarray(labels, dtype=np.int64))


def _from_array(path: str) -> FoundPictures:
    images, labels = _load_arrays(path)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise DataError(
            f"The images of {path} are {images.dtype} of the shape {list(images.shape)}; "
            "they must be uint8, [N, height, width] or [N, height, width, 3]."
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU" or not images.size:
        raise DataError(
            f"The labels of {path} are {labels.dtype} of the shape {list(labels.shape)}; "
            f"there must be one number or string for each of the {len(images)} images."
        )
    found = [str(label) for label in labels.tolist()]
    class_names = sorted(set(found), key=label_order)
    index = {name: place for place, name in enumerate(class_names)}
    indices = np.asarray([index[name] for name in found], dtype=np.int64)
    return FoundPictures(splits={"train": PictureArray(pixels=images, labels=indices)}, class_names=tuple(class_names))


def _load_arrays(path: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.generic]]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = [name for name in ("images", "labels") if name not in arrays]
            if missing:
                raise DataError(
                    f"{path} has no array named {missing[0]!r}, only {', '.join(map(repr, arrays)) or 'none'}; "
                    "save it with images and labels."
                )
            return arrays["images"], arrays["labels"]
    except FileNotFoundError as error:
        raise DataError(
            f"There is no file {path}; say where it is with -s data.path=FOLDER, from the working folder on."
        ) from error
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        TypeError,
        MemoryError,
    ) as error:
        raise DataError(f"{path} cannot be read as an .npz file ({error}); save it with numpy.savez.") from error
