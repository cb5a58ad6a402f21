"""Calibration files: samples come back as they went in, and anything else is refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest

from export.calibration import read_calibration, write_calibration
from export.errors import ConversionError


def test_samples_come_back_in_their_order_whatever_their_size(tmp_path: Path) -> None:
    samples = [
        {"ids": np.arange(length, dtype=np.int64), "mask": np.ones(length, dtype=bool), "x": np.float32([[0.5]])}
        for length in (3, 1, 12, 2, 5, 4, 7, 6, 8, 9, 10, 11)
    ]
    write_calibration(tmp_path / "c.npz", samples)
    read = read_calibration(tmp_path / "c.npz")
    assert len(read) == len(samples)
    for one, other in zip(read, samples, strict=True):
        assert one.keys() == other.keys()
        for name, values in other.items():
            assert one[name].dtype == values.dtype
            np.testing.assert_array_equal(one[name], values)


def test_no_sample_is_a_file_too(tmp_path: Path) -> None:
    write_calibration(tmp_path / "c.npz", [])
    assert read_calibration(tmp_path / "c.npz") == []


@pytest.mark.parametrize("content", [b"", b"PK", b"text", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.npz").write_bytes(content)
    with pytest.raises(ConversionError, match=r"^the calibration file c.npz is damaged or not an .npz file"):
        read_calibration(tmp_path / "c.npz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"c.npz cannot be read: No such file"):
        read_calibration(tmp_path / "c.npz")


def test_other_records_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", images=np.zeros(3))
    with pytest.raises(ConversionError, match="has a record 'images'"):
        read_calibration(tmp_path / "c.npz")


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", **{"000000.x": np.array([object()])})
    with pytest.raises(ConversionError, match=r"damaged or not an \.npz file"):
        read_calibration(tmp_path / "c.npz")
