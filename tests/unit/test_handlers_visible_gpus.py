"""A worker sees its own GPU alone."""

import subprocess
import sys

import pytest

from handlers.errors import LoadError
from handlers.visible_gpus import VARIABLE, gpu_name, see_only


@pytest.mark.parametrize(
    ("before", "gpu", "after"),
    [(None, 0, "0"), (None, 3, "3"), ("4,5", 0, "4"), ("4, 5 ", 1, "5"), ("GPU-8f2a,MIG-7", 1, "MIG-7"), ("2", 0, "2")],
)
def test_one_of_those_seen_so_far_is_left(before, gpu, after):
    environment = {} if before is None else {VARIABLE: before}
    see_only(gpu, environment)
    assert environment == {VARIABLE: after}


@pytest.mark.parametrize(("before", "count"), [("4,5", 2), ("", 0), (" ", 0)])
def test_one_that_is_hidden_is_refused_and_nothing_changes(before, count):
    environment = {VARIABLE: before}
    with pytest.raises(LoadError, match=f"run on GPU 2, and CUDA_VISIBLE_DEVICES shows {count}, .*; correct deviceIds"):
        see_only(2, environment)
    assert environment == {VARIABLE: before}


@pytest.mark.parametrize(
    ("visible", "index", "name"), [(None, 2, "2"), ("6", 0, "6"), ("6,7", 1, "7"), ("6", 1, "1"), ("", 0, "0")]
)
def test_outside_a_gpu_has_the_name_that_the_variable_gives(visible, index, name):
    assert gpu_name(index, {} if visible is None else {VARIABLE: visible}) == name


def test_importing_what_a_worker_runs_asks_cuda_for_nothing():
    """Or it would have read the variable by then."""
    code = (
        "import torch\n"
        "def asked(*given, **options): raise AssertionError('CUDA was asked')\n"
        "for name in ('is_available', 'device_count', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, asked)\n"
        "import handlers.service, handlers.eager, handlers.onnx, handlers.pt2, handlers.torchscript\n"
        "import handlers.jpeg_batches\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
