import dataclasses
import sys

import numpy as np
import pytest
import torch

from export.archive import open_archive
from handlers.backend import build_backend
from handlers.errors import BackendError
from handlers.onnx import OnnxBackend
from handlers.signature import Artifact, Signature

FORMATS = ("torchscript", "onnx")


@pytest.fixture(params=FORMATS)
def archive_folder(request, exported, tmp_path):
    open_archive(exported(request.param).archive).extract(tmp_path)
    return tmp_path


def load(folder, **options):
    import json

    signature = Signature.from_document(json.loads((folder / "signature.json").read_text()))
    return build_backend(signature, folder, **{"threads": 1, **options}), folder / signature.artifact.file


@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_any_batch_size_gives_what_the_module_gives(archive_folder, module, size):
    backend, _ = load(archive_folder)
    batch = np.random.default_rng(size).standard_normal((size, 1, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(batch)).numpy()
    actual = backend.run(batch)
    assert (backend.device, actual.dtype) == ("cpu", np.float32)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_that_is_a_view_into_a_larger_array_is_taken(archive_folder):
    backend, _ = load(archive_folder)
    whole = np.random.default_rng(0).standard_normal((8, 1, 8, 8)).astype(np.float32)
    view = whole[::2, :, :, ::-1]
    np.testing.assert_allclose(backend.run(view), backend.run(view.copy()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"junk" * 99, lambda data: data[: len(data) // 2]])
def test_a_corrupt_file_is_a_backend_error(archive_folder, damage):
    _, path = load(archive_folder)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BackendError, match=f"{path.name} "):
        load(archive_folder)


def test_a_missing_file_is_a_backend_error(archive_folder):
    _, path = load(archive_folder)
    path.unlink()
    with pytest.raises(BackendError, match=f"{path.name} "):
        load(archive_folder)


def test_torchscript_takes_the_threads_it_is_given(extracted):
    before = torch.get_num_threads()
    try:
        load(extracted, threads=2)
        assert torch.get_num_threads() == 2
        load(extracted, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_onnx_runtime_takes_the_threads_it_is_given(exported, tmp_path):
    open_archive(exported("onnx").archive).extract(tmp_path)
    backend, _ = load(tmp_path, threads=2)
    options = backend._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_without_onnx_runtime_the_remedy_is_told(monkeypatch, tmp_path, signature):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        OnnxBackend(tmp_path / "model.onnx", signature, threads=1)


def test_an_unknown_format_lists_the_known_ones(signature, tmp_path):
    artifact = Artifact(format="torchscript", precision="fp32", file="model.pt")
    unknown = signature.with_artifact(dataclasses.replace(artifact, format="pt2"))
    with pytest.raises(BackendError, match="no backend for the format 'pt2'; known are: torchscript, onnx"):
        build_backend(unknown, tmp_path, threads=1)
