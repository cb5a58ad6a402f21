"""What an artifact needs of the machine: checked before it loads, since some artifacts crash the process instead."""

from __future__ import annotations

from importlib import metadata

from handlers.artifact import Artifact
from handlers.errors import BackendError

ISA = "isa"
COMPUTE_CAPABILITY = "compute_capability"
# What code compiled for one torch and one processor must say; anything else would load and crash.
_COMPILED_NEEDS = ("torch", ISA)


def check_requirements(artifact: Artifact) -> None:
    """Compare what an artifact requires with this machine.

    Raises:
        BackendError: If a package has another version, the processor lacks instructions, or the GPU is another one.
    """
    if artifact.format == "pt2":
        unsaid = next((name for name in _COMPILED_NEEDS if name not in artifact.requires), None)
        if unsaid is not None:
            raise BackendError(f"artifact.requires does not say which {unsaid} the pt2 artifact needs; export it again")
    # Packages first: another torch calls instruction sets by other names.
    for name, needed in sorted(artifact.requires.items(), key=lambda item: item[0] in (ISA, COMPUTE_CAPABILITY)):
        if name == ISA:
            _check_isa(needed)
        elif name == COMPUTE_CAPABILITY:
            _check_capability(needed)
        else:
            _check_package(name, needed)


def _check_isa(needed: str) -> None:
    from handlers.isa import missing_isa  # noqa: PLC0415  # only compiled code needs torch here

    missing = missing_isa(needed)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BackendError(
            f"this machine's processor lacks {', '.join(missing[:3])}{more}, for which the artifact was compiled; "
            "export it on a machine like this one, or as torchscript or onnx"
        )


def _check_capability(needed: str) -> None:
    from handlers.isa import cuda_capability  # noqa: PLC0415

    found = cuda_capability()
    if found != needed:
        raise BackendError(
            f"the artifact was compiled for GPUs of compute capability {needed}, and this machine has "
            f"{found or 'no GPU'}; export it on a machine like this one"
        )


def _check_package(name: str, needed: str) -> None:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise BackendError(
            f"the artifact needs {name} {needed}, which is not installed; run `pip install {name}=={needed}`"
        ) from error
    # "2.13.0+cpu" and "2.13.0+cu130" are one version, built twice.
    if found.partition("+")[0] != needed.partition("+")[0]:
        raise BackendError(
            f"the artifact needs {name} {needed}, and {found} is installed; "
            f"run `pip install {name}=={needed.partition('+')[0]}`, or export it again with {name} {found}"
        )
