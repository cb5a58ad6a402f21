"""The C interface of a model that AOTInductor compiled, called directly.

torch's own loader keeps Python's lock while the model computes (2.13): requests that arrive meanwhile are neither read
nor decoded. The interface below it, which every package's library exports, needs no lock. It is that of
``torch/csrc/inductor/aoti_runtime/interface.h``, and the capsules that carry tensors over to it are those of torch's
own C++ wrapper.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch

_LIBRARY_FOLDER = "data/aotinductor"
# What a package may have beside the library: metadata and sources. Weights beside it would have to be loaded by torch.
_HARMLESS = (".json", ".cpp", ".h")

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class CompiledContainer:
    """One compiled model for the CPU.

    Args:
        library: The package's shared library.

    Raises:
        OSError: If it cannot be loaded.
        AttributeError: If it, or torch, has not the interface that is used here.
        RuntimeError: If the model cannot be set up.
    """

    def __init__(self, library: Path) -> None:
        self._to_capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
        self._from_capsules = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
        loaded = ctypes.CDLL(str(library))
        self._run = loaded.AOTInductorModelContainerRun
        self._handle = ctypes.c_void_p()
        self._outputs = ctypes.c_size_t()
        _check(
            loaded.AOTInductorModelContainerCreateWithDevice(
                ctypes.byref(self._handle), ctypes.c_size_t(1), b"cpu", None
            )
        )
        _check(loaded.AOTInductorModelContainerGetNumOutputs(self._handle, ctypes.byref(self._outputs)))

    @classmethod
    def of_package(cls, path: Path) -> CompiledContainer | None:
        """The model of a ``.pt2`` file; None where only torch's loader can run it.

        The library is unpacked for as long as it takes to load it.
        """
        with zipfile.ZipFile(path) as package:
            compiled = [name for name in package.namelist() if _LIBRARY_FOLDER in name and not name.endswith("/")]
            libraries = [name for name in compiled if PurePosixPath(name).suffix == ".so"]
            others = [name for name in compiled if PurePosixPath(name).suffix not in (".so", *_HARMLESS)]
            if len(libraries) != 1 or others or _calls_torch(package, compiled):
                return None
            with tempfile.TemporaryDirectory(prefix="torchport-pt2-") as folder:
                library = Path(folder) / "model.so"
                library.write_bytes(package.read(libraries[0]))
                try:
                    return cls(library)
                except (AttributeError, OSError, RuntimeError):
                    return None

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute one batch; other threads go on meanwhile.

        Args:
            inputs: In the order, with the dtypes and on the device that the model was compiled for. It takes them over.

        Raises:
            RuntimeError: If the model refuses them; it writes to stderr why.
        """
        handles = [_pointer_of(capsule, None) for capsule in self._to_capsules(list(inputs))]
        given = (ctypes.c_void_p * len(handles))(*handles)
        outputs = (ctypes.c_void_p * self._outputs.value)()
        _check(
            self._run(
                self._handle, given, ctypes.c_size_t(len(handles)), outputs, ctypes.c_size_t(len(outputs)), None, None
            )
        )
        found: list[torch.Tensor] = self._from_capsules([_new_capsule(pointer, None, None) for pointer in outputs])
        return found


def _calls_torch(package: zipfile.ZipFile, names: Sequence[str]) -> bool:
    """Whether some operators have no C interface, and the library asks torch's loader to run them.

    They are listed beside it; ``quantized::max_pool2d`` is one.
    """
    described = [json.loads(package.read(name)) for name in names if PurePosixPath(name).suffix == ".json"]
    return any(document.get("nodes") for document in described)


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"the compiled model reports the error {code}")
