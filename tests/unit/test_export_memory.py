"""Memory: a fresh process loads an artifact and runs it."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from export.errors import MeasurementError
from export.memory import measure_memory


@pytest.fixture
def folder(extracted: Path, tmp_path: Path) -> Path:
    """What a candidate's folder holds."""
    shutil.copytree(extracted, tmp_path / "candidate")
    return tmp_path / "candidate"


def batch(size: int) -> dict[str, np.ndarray]:
    return {"image": np.zeros((size, 1, 8, 8), np.float32)}


def test_a_fresh_process_says_what_it_needed_and_leaves_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    memory = measure_memory(folder, [batch(1), batch(4)])
    # Python and numpy need ten or more megabytes, torch a hundred.
    assert 5e6 < memory.before_bytes < memory.peak_bytes < 2e9
    assert memory.gpu_bytes is None
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts] == before


def test_an_artifact_that_fails_there_gives_a_sentence(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(MeasurementError, match="it fails in a fresh process: "):
        measure_memory(folder, [{"image": np.zeros((1, 7), np.float32)}])
    (folder / "model.pt").write_bytes(b"no model")
    with pytest.raises(MeasurementError, match="it fails in a fresh process: "):
        measure_memory(folder, [batch(1)])
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_process_that_dies_gives_a_sentence(folder: Path) -> None:
    (folder / "numpy.py").write_text("import os\nos._exit(3)\n")  # the current folder comes first on the path
    with pytest.raises(MeasurementError, match="died with exit code 3: no message"):
        measure_memory(folder, [batch(1)])
