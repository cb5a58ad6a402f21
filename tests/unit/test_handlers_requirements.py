import platform

import numpy as np
import pytest
import torch

from handlers import isa
from handlers.artifact import Artifact
from handlers.errors import BackendError
from handlers.requirements import check_requirements

TORCH = str(torch.__version__)


def check(format="pt2", **requires):
    check_requirements(Artifact(format=format, precision="fp32", file="model.bin", requires=requires))


def test_this_machine_has_what_it_names_itself():
    check(torch=TORCH, isa=isa.cpu_isa(), numpy=np.__version__)


def test_the_isa_names_the_architecture_and_is_the_same_each_time():
    assert isa.cpu_isa().split()[0] == platform.machine()
    assert isa.cpu_isa() == isa.cpu_isa()


@pytest.mark.parametrize(
    ("cpuinfo", "sets"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu sse2 aes avx avx512f avx512_vnni abm f16c sse4a rep_good\n\nprocessor: 1\n",
            "abm avx avx512_vnni avx512f f16c sse2",
        ),
        ("Features\t: fp asimd crc32 sve i8mm\n", "asimd i8mm sve"),
        ("model name: of a kernel that tells nothing\n", ""),
        (None, ""),
    ],
    ids=["x86", "Arm", "nothing told", "another system"],
)
def test_an_older_torch_leaves_it_to_the_kernel(monkeypatch, tmp_path, cpuinfo, sets):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(isa, "_CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert isa.cpu_isa() == " ".join([platform.machine(), *sets.split()])


def test_the_kernels_words_tell_machines_apart(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    check(torch=TORCH, isa=isa.cpu_isa())
    with pytest.raises(BackendError, match="processor lacks avx9"):
        check(torch=TORCH, isa=f"{isa.cpu_isa()} avx9")


def test_another_torch_is_named_before_its_words_for_instructions():
    with pytest.raises(BackendError, match=r"needs torch 1\.0\.0"):
        check(isa="x86_64 avx9", torch="1.0.0")


def test_an_instruction_set_that_nobody_compiles_for_does_not_bind_an_artifact():
    assert not {"aes", "sha", "sse4a", "clwb"} & set(isa.cpu_isa().split())


def test_a_subset_of_the_instructions_is_enough():
    check(torch=TORCH, isa=" ".join(isa.cpu_isa().split()[:-1]))


def test_missing_instructions_are_named():
    with pytest.raises(BackendError, match=r"processor lacks avx9, for which .* export it on a machine like this one"):
        check(torch=TORCH, isa=f"{isa.cpu_isa()} avx9")
    with pytest.raises(BackendError, match="lacks a, b, c and 2 more"):
        check(torch=TORCH, isa="a b c d e")


def test_another_torch_is_refused_with_the_remedy():
    with pytest.raises(
        BackendError, match=r"needs torch 1\.0\.0, and .* is installed; run `pip install torch==1\.0\.0`"
    ):
        check(torch="1.0.0", isa=isa.cpu_isa())


def test_builds_of_one_version_are_the_same():
    check(torch=f"{TORCH.partition('+')[0]}+cu130", isa=isa.cpu_isa())


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(BackendError, match=r"needs nosuchpackage 2\.0, which is not installed; run `pip install"):
        check("eager", nosuchpackage="2.0")


@pytest.mark.parametrize("given", [{}, {"torch": TORCH}, {"isa": "x86_64"}])
def test_compiled_code_must_say_what_it_needs(given):
    with pytest.raises(BackendError, match=r"does not say which .* export it again"):
        check("pt2", **given)


@pytest.mark.parametrize("format", ["torchscript", "onnx", "eager"])
def test_other_formats_need_say_nothing(format):
    check(format)


@pytest.mark.parametrize(("found", "said"), [(None, "no GPU"), ("8.0", r"8\.0")])
def test_another_gpu_is_refused(monkeypatch, found, said):
    monkeypatch.setattr(isa, "cuda_capability", lambda: found)
    with pytest.raises(BackendError, match=rf"compute capability 9\.0, and this machine has {said}"):
        check(torch=TORCH, isa=isa.cpu_isa(), compute_capability="9.0")


def test_the_same_gpu_is_taken(monkeypatch):
    monkeypatch.setattr(isa, "cuda_capability", lambda: "9.0")
    check(torch=TORCH, isa=isa.cpu_isa(), compute_capability="9.0")


def test_without_a_gpu_there_is_no_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isa.cuda_capability() is None
