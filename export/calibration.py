"""Calibration data on its way to the process that quantises: samples in one ``.npz`` file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from export.errors import ConversionError
from handlers.tensors import Array, TensorBatch

_SEPARATOR = "."
_HINT = "write it with export.calibration.write_calibration"


def write_calibration(path: Path, samples: Iterable[TensorBatch]) -> None:
    """Write samples to a file that :func:`read_calibration` reads.

    Each array of each sample is a record of its own, named ``000000.name``: samples may differ in size.

    Args:
        path: The file, ``.npz``.
        samples: Arrays by input name, without a batch axis.
    """
    records = {
        f"{i:06d}{_SEPARATOR}{name}": np.asarray(values)
        for i, sample in enumerate(samples)
        for name, values in sample.items()
    }
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **records)


def read_calibration(path: Path) -> list[TensorBatch]:
    """Read the samples of a calibration file, in their order.

    Raises:
        ConversionError: If it is not such a file.
    """
    samples: dict[str, dict[str, Array]] = {}
    try:
        with np.load(path, allow_pickle=False) as records:
            for key in sorted(records.files):
                number, separator, name = key.partition(_SEPARATOR)
                if not separator or not number.isdecimal():
                    raise ConversionError(f"the calibration file {path.name} has a record {key!r}; {_HINT}")
                samples.setdefault(number, {})[name] = records[key]
    except OSError as error:
        raise ConversionError(f"the calibration file {path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ConversionError(f"the calibration file {path.name} is damaged or not an .npz file; {_HINT}") from error
    return list(samples.values())
