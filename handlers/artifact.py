"""The artifact as a signature describes it: the exported file, and what it needs to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handlers.document import Section, shown
from handlers.errors import SignatureError
from handlers.preprocessing import plain_file_name

FORMATS = ("torchscript", "onnx", "pt2", "eager")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSource:
    """How an eager artifact's module is built before its weights are loaded.

    Attributes:
        factory: Import path ``package.module:function``.
        config: Keyword arguments of the factory, plain JSON values.
    """

    factory: str
    config: Mapping[str, Any]

    @classmethod
    def from_section(cls, section: Section) -> ModuleSource:
        """Read the ``artifact.module`` mapping."""
        factory = section.string("factory")
        config = section.mapping("config")
        section.finish()
        package, separator, name = factory.partition(":")
        if not separator or not name.isidentifier() or not all(part.isidentifier() for part in package.split(".")):
            raise SignatureError(f"artifact.module.factory is {shown(factory)}; write package.module:function")
        try:
            json.dumps(config, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise SignatureError("artifact.module.config must hold plain JSON values only") from error
        return cls(factory=factory, config=config)

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"factory": self.factory, "config": dict(self.config)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """The exported file that computes the model.

    Attributes:
        format: One of ``FORMATS``.
        precision: One of ``PRECISIONS``.
        file: Its name at the archive's root.
        device: One of ``DEVICES``: where it was checked, and where it runs.
        requires: What the machine must have, exactly: versions by package name, and ``isa`` or
            ``compute_capability`` for compiled code.
        module: How the module is built; eager only.
    """

    format: str
    precision: str
    file: str
    device: str = "cpu"
    requires: Mapping[str, str] = field(default_factory=dict)
    module: ModuleSource | None = None

    @classmethod
    def from_section(cls, section: Section) -> Artifact:
        """Read the ``artifact`` mapping."""
        format = section.string("format", choices=FORMATS)
        requires: dict[str, str] = {}
        if section.has("requires"):
            table = section.section("requires")
            requires = {name: table.string(name) for name in table.names()}
        artifact = cls(
            format=format,
            precision=section.string("precision", choices=PRECISIONS),
            file=plain_file_name(section.string("file"), "artifact.file"),
            device=section.string("device", choices=DEVICES) if section.has("device") else "cpu",
            requires=requires,
            module=ModuleSource.from_section(section.section("module")) if section.has("module") else None,
        )
        section.finish()
        if (artifact.module is not None) != (format == "eager"):
            raise SignatureError(
                "artifact.module says how an eager artifact is built: an eager artifact must have it, and no other may"
            )
        return artifact

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        document: dict[str, Any] = {
            "format": self.format,
            "precision": self.precision,
            "file": self.file,
            "device": self.device,
        }
        if self.requires:
            document["requires"] = dict(self.requires)
        if self.module is not None:
            document["module"] = self.module.to_document()
        return document
