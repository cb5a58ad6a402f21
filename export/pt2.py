"""AOTInductor packages (``.pt2``): machine code for one torch and one kind of processor.

The code is compiled below a folder of its own, whose name the compiler is told to forget, and the generated C++ stays
out of the package. So on one machine the same model gives the same bytes, in any folder and at any time; except int8,
into which Inductor 2.13 writes the address of one of its own functions. Between machines it cannot: the code depends on
the processor, on the C++ compiler and its standard library, and, on a GPU, on which kernels were the fastest when they
were tried.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from export.errors import ConversionError
from export.program import export_program
from export.torch_release import TORCH
from export.torchscript import rewritten
from handlers.calling import NamedModule
from handlers.isa import cpu_isa, cuda_capability
from handlers.signature import Signature

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# PyTorch chooses a convolution by whether the batch is below 16, and the code would hold for that side only: smaller
# examples gave packages that refuse 16 samples, while larger ones give packages that take one as well. A prime, so that
# it is the size of no other axis.
_EXAMPLE_BATCH = 37
# Operators of PyTorch, as the generated code calls them.
_INT8_KERNELS = (b"qlinear", b"qconv")


def write_pt2(
    module: NamedModule,
    signature: Signature,
    example: Sequence[torch.Tensor],
    path: Path,
    *,
    device: str,
    int8: bool = False,
) -> dict[str, str]:
    """Compile a module ahead of time and write the package.

    Args:
        module: The module, in eval mode, on the device.
        signature: Names and dynamic axes of the tensors.
        example: Valid inputs in the signature's order, on the device.
        path: The file to write.
        device: ``cpu`` or ``cuda``.
        int8: The module is one of :func:`export.pt2e.quantized_module`, to be computed by int8 kernels.

    Returns:
        What the package needs of a machine, for ``artifact.requires``.

    Raises:
        ConversionError: If there is no C++ compiler, a dynamic axis cannot be kept, or the compiler finds no int8
            kernel for the module.
        Exception: Whatever the compiler says about the module.
    """
    compiler = _find_compiler()
    with _attention_for_any_length(device), tempfile.TemporaryDirectory(prefix="torchport-pt2-") as temporary:
        program = export_program(module, signature, repeated(example))
        folder = Path(temporary)
        if any(character.isspace() for character in temporary):
            raise ConversionError(
                "the C++ compiler is called without quotes, and the folder for temporary files has a space in its "
                "name; set TMPDIR to one without"
            )
        with _inductor_cache(folder / "cache"):
            package = torch._inductor.aoti_compile_and_package(
                program.exported,
                package_path=str(folder / "model.pt2"),
                inductor_configs=_known(
                    {
                        # Without a name of its own it is called after a hash, of the folder's name among other things.
                        "aot_inductor.model_name_for_generated_files": "model",
                        # Compiled for later programs, and larger than most models.
                        "aot_inductor.precompile_headers": False,
                        "aot_inductor.enable_line_tables": False,
                        # Refuses a batch of one: symbols of torch.export are "at least 2" by convention only.
                        "aot_inductor.check_lowerbound": False,
                        "cpp.cxx": (str(_forgetful(compiler, folder)),),
                        # Weights become constants. Without it int8 is computed in fp32, without a word.
                        **({"freezing": True} if int8 else {}),
                    }
                ),
            )
        sources: list[bytes] = []
        content = rewritten(package, lambda name, data: _without_source(name, data, sources))
    if int8 and not any(kernel in source for kernel in _INT8_KERNELS for source in sources):
        raise ConversionError(
            "the compiler makes no int8 kernel of any layer of the model, and would compute int8 in fp32; "
            "use --format torchscript or --format onnx for int8, or --precision bf16"
        )
    path.write_bytes(content)
    requires = {"torch": str(torch.__version__), "isa": cpu_isa()}
    capability = cuda_capability() if device == "cuda" else None
    return {**requires, "compute_capability": capability} if capability else requires


def _known(options: dict[str, object]) -> dict[str, object]:
    """Those of the compiler's options that this torch has: older ones neither check nor write what others turn off."""
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in options.items() if name in known}


def _attention_for_any_length(device: str) -> contextlib.AbstractContextManager[object]:
    """Keep cuDNN's kernels for attention out of code for a GPU; see :func:`handlers.torch_device.torch_device`.

    Compiled code keeps to the kernel that suits its example at every other length, and cuDNN's have none for one key.
    """
    if device == "cpu":
        return contextlib.nullcontext()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(others)


def repeated(example: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The samples of an example over and over again, up to a batch of a size for which code holds at any other."""
    times = -(-_EXAMPLE_BATCH // len(example[0]))
    return [torch.cat([tensor] * times)[:_EXAMPLE_BATCH].contiguous() for tensor in example]


def _without_source(name: str, data: bytes, sources: list[bytes]) -> bytes | None:
    """Take the generated C++ out: its comments hold the command line of the compiler, and so this machine's folders."""
    if not name.endswith(".cpp"):
        return data
    sources.append(data)
    # The loader of earlier releases finds the metadata by the name of the source.
    return b"" if TORCH < (2, 13) else None


def _find_compiler() -> str:
    """The C++ compiler that Inductor would take.

    Raises:
        ConversionError: If there is none.
    """
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    found = shutil.which(command[0])
    if found is None:
        raise ConversionError(
            f"pt2 is compiled with a C++ compiler, and {command[0]!r} is not on the PATH of this machine; "
            "install one (apt-get install g++), or use --format torchscript or onnx"
        )
    return shlex.join([found, *command[1:]])


def _forgetful(compiler: str, folder: Path) -> Path:
    """A compiler that writes none of this machine's folders into what it makes.

    Inductor has no option for further flags, so this is a script around the compiler. It has the compiler's name,
    by which Inductor tells compilers apart.
    """
    folders = {str(folder): ".", str(Path(torch.__file__).parent): "torch", sysconfig.get_path("include"): "python"}
    flags = " ".join(shlex.quote(f"-ffile-prefix-map={path}={name}") for path, name in folders.items())
    script = folder / Path(shlex.split(compiler)[0]).name
    script.write_text(f'#!/bin/sh\nexec {compiler} {flags} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script


@contextlib.contextmanager
def _inductor_cache(folder: Path) -> Iterator[None]:
    """Let Inductor work below a folder that goes afterwards: what others left in its cache would come in by hash."""
    before = os.environ.get(_CACHE_VARIABLE)
    os.environ[_CACHE_VARIABLE] = str(folder)
    try:
        yield
    finally:
        del os.environ[_CACHE_VARIABLE]
        if before is not None:
            os.environ[_CACHE_VARIABLE] = before
