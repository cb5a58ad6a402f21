import warnings
from types import SimpleNamespace

import pytest
import torch

from handlers.errors import BackendError
from handlers.torch_device import check_device, torch_device


class TestTorchDevice:
    @pytest.fixture(autouse=True)
    def _two_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    @pytest.fixture(autouse=True)
    def products(self):
        """What is said of fp32, as it was before; torch may warn of how it is said."""
        products = (torch.backends.cuda.matmul, torch.backends.cudnn)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            before = [own.allow_tf32 for own in products]
            yield products
            for own, value in zip(products, before, strict=True):
                own.allow_tf32 = value

    def test_attention_on_a_gpu_is_not_left_to_cudnn(self, products, monkeypatch):
        said = []
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", said.append)
        torch_device("cpu")
        assert said == []
        torch_device("cuda")
        assert said == [False]

    def test_fp32_is_computed_as_such_on_a_gpu(self, products):
        for own in products:
            own.allow_tf32 = True
        torch_device("cpu")
        assert all(own.allow_tf32 for own in products)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch_device("cuda")
        assert not any(own.allow_tf32 for own in products)

    def test_without_a_gpu_the_variable_that_hides_them_is_named(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        with pytest.raises(BackendError, match=r"torch finds none here \(CUDA_VISIBLE_DEVICES is 7\); export it with"):
            torch_device("cuda")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        with pytest.raises(BackendError, match="torch finds none here; export it with"):
            torch_device("cuda")

    @pytest.mark.parametrize(("gpu", "index"), [(0, 0), (1, 1), (None, 1)])
    def test_a_gpu_has_its_number(self, gpu, index):
        assert torch_device("cuda", gpu) == torch.device("cuda", index)

    @pytest.mark.parametrize("gpu", [2, -1])
    def test_a_gpu_that_is_not_there_is_refused(self, gpu):
        with pytest.raises(BackendError, match=f"to run on GPU {gpu}, and torch finds 2 here"):
            torch_device("cuda", gpu)

    def test_the_cpu_has_none(self):
        assert torch_device("cpu", 1) == torch.device("cpu")

    @pytest.mark.parametrize("there", ["cuda:1", "cpu"])
    def test_weights_on_another_device_are_refused(self, there):
        weights = [SimpleNamespace(device=torch.device("cuda:0")), SimpleNamespace(device=torch.device(there))]
        check_device(weights[:1], torch.device("cuda", 0))
        with pytest.raises(BackendError, match=f"weights lie on {there} instead of cuda:0; export it for cuda again"):
            check_device(weights, torch.device("cuda", 0))
