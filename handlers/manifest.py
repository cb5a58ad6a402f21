"""The manifest that ``torch-model-archiver`` writes and TorchServe reads: which file answers, and under which name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from handlers.document import Section, shown
from handlers.errors import DigestError, SignatureError

MANIFEST_FILE = "MAR-INF/MANIFEST.json"
# What the archiver writes of the files that it was given. Anything else there, such as requirements that TorchServe
# would install, comes from options that torchport does not use.
FILE_FIELDS = ("configFile", "handler", "serializedFile")

_NAME_FIELDS = ("modelName", "modelVersion")
_RUNTIMES = ("python", "python3")
# What torch-model-archiver accepts, and what stays one word in a URL, a shell and a metric label.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def is_usable_name(name: object) -> bool:
    """Whether a model name or version fits into a file name and a URL."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_manifest(data: bytes, files: Mapping[str, str]) -> None:
    """Check the meaning of a manifest whose bytes nobody recorded.

    Args:
        data: The manifest.
        files: File names by the fields of ``FILE_FIELDS``: the manifest must name these, and no others.

    Raises:
        DigestError: If it says anything else than those files, a usable name and version, and when it was written.
    """
    try:
        # Java reads it as UTF-8 and takes the first or the last of two equal keys: leave nothing to choose.
        root = Section(json.loads(data.decode("ascii"), object_pairs_hook=_unique), "manifest")
        root.string("createdOn")
        root.string("runtime", choices=_RUNTIMES)
        if root.has("archiverVersion"):
            root.string("archiverVersion")
        model = root.section("model")
        root.finish()
        for field in _NAME_FIELDS:
            if not is_usable_name(name := model.string(field)):
                raise SignatureError(f"manifest.model.{field} is {shown(name)}, which is not usable")
        for field, file in files.items():
            if (found := model.string(field)) != file:
                raise SignatureError(f"manifest.model.{field} is {shown(found)} instead of {file!r}")
        model.finish()
    except (ValueError, RecursionError, SignatureError) as error:
        raise DigestError(
            f"{MANIFEST_FILE} is not what the staged folder's command writes ({error}); "
            "pack the folder again with its pack.sh"
        ) from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)
